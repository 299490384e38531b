"""Modules: Equilibrium layers, and functions for training them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from . import _autodiff, _torch
from ._modules import couples_samples, records_statistics
from ._solution import Solution
from ._tree import KIND, PyTree, flatten, split
from .fixed_points import Anderson, FixedPointSolver
from .implicit import Info, WarmStart, fixed_point
from .solvers import GMRES, Solver


def functional(module: nn.Module) -> Callable[..., Any]:
    """A module as a pure function of its parameters: (parameters, *args) ↦ module(*args).

    Parameters are passed as a dict like dict(module.named_parameters()). It may also hold buffers, which are copied at
    each call. A tensor with several names is passed under the first. BatchNorm in training mode uses its batch's
    statistics without recording them. Derivatives of all orders are correct, through weight_norm and checkpoints too.

    Example:
        >>> layer = torch.nn.Linear(2, 1)
        >>> f = functional(layer)
        >>> f(dict(layer.named_parameters()), torch.ones(2)).shape
        torch.Size([1])
    """
    further_names = _further_names(module)

    def function(parameters: dict[str, Tensor], *args: Any) -> Any:
        buffers = dict(module.named_buffers())
        given = {name: x for name, x in parameters.items() if name not in buffers}
        tensors = given | {name: _copied(name, parameters.get(name, x)) for name, x in buffers.items()}
        tensors |= {name: tensors[first] for name, first in further_names.items() if name not in tensors}

        # tie_weights=True would leave the given tensors in a module that holds one submodule under two names.
        with _nothing_recorded(module), _torch.correct_derivatives():
            return torch.func.functional_call(module, tensors, args, tie_weights=False)

    return function


def _copied(name: str, buffer: Tensor) -> Tensor:
    """A copy of a buffer, to be written into. torch accepts no running statistics that require grad."""
    constant = name.rpartition(".")[2] in ("running_mean", "running_var")
    return buffer.detach().clone() if constant else buffer.clone()


def _further_names(module: nn.Module) -> dict[str, str]:
    """A dict from the further names of tensors that several submodules hold to their names in named_parameters()."""
    first: dict[int, str] = {}
    further: dict[str, str] = {}
    for prefix, part in module.named_modules():
        own = [*part.named_parameters(prefix, recurse=False), *part.named_buffers(prefix, recurse=False)]
        for name, tensor in own:
            if first.setdefault(id(tensor), name) != name:
                further[name] = first[id(tensor)]
    return further


@contextlib.contextmanager
def _nothing_recorded(module: nn.Module) -> Iterator[None]:
    """In this context normalisation in training mode writes no running statistics, which is impossible under vmap."""
    recording: list[Any] = [part for part in module.modules() if records_statistics(part)]
    for part in recording:
        part.track_running_stats = False
    try:
        yield
    finally:
        for part in recording:
            part.track_running_stats = True


class Equilibrium(nn.Module):
    """z* = cell(z*, x) as a layer: any forward solver, gradients by the implicit function theorem.

    The memory does not depend on the number of forward steps. Each sample (first axis of each leaf of z) converges by
    itself, forward and backward. The layer works under torch.func (including vmap: per-sample gradients, ensembles) and
    in a non-reentrant checkpoint, and its cell may call torch.autograd.grad.

    Args:
        cell: a Module or a function (z, u) ↦ z; u = x, or inject(x). A function may use no other tensor with grad.
        forward: solver from hg.fixed_points; default Anderson().
        backward: linear solver of (I − ∂₁cellᵀ) v = z̄; default GMRES().
        inject: a Module or a function of x that computes what does not depend on z (xB + c). It is evaluated once per
            call, not at every step, and differentiated as usual.
        start: x ↦ the first z, or None for zeros like inject(x), or like x.
        batch_dims: 1 if the first axis of each leaf of z counts independent samples, 0 if the samples are coupled (a
            graph network); None: 0 while the cell has a BatchNorm that uses the batch's statistics, else 1.
        warm_start: start each call from the last z*, and each backward pass from the last v, while shapes stay the
            same. Both are part of the state_dict and of pickles.

    Attributes:
        forward_info: the Solution of the last forward solve.
        backward_info: the Info of the last backward pass.

    Cost: forward, one evaluation of cell a step, and one at z* to record BatchNorm's statistics (not under torch.func);
        backward, one evaluation and the products of the linear solver.
    Source: Bai, Kolter and Koltun 2019.

    Example:
        >>> layer = Equilibrium(lambda z, u: torch.tanh(0.5 * z + u), forward=hg.fixed_points.Picard(rtol=1e-5))
        >>> layer(torch.zeros(3, 2)).shape, layer.forward_info.status.name
        (torch.Size([3, 2]), 'CONVERGED')
    """

    def __init__(
        self,
        cell: Callable[..., PyTree],
        *,
        forward: FixedPointSolver | None = None,
        backward: Solver | None = None,
        inject: Callable[..., PyTree] | None = None,
        start: Callable[..., PyTree] | None = None,
        batch_dims: int | None = None,
        warm_start: bool = False,
    ):
        super().__init__()
        self.cell = cell
        self.inject = inject
        self.start = start
        self.forward_solver = forward or Anderson()
        self.backward_solver = backward or GMRES()
        self.batch_dims = batch_dims
        self.warm_start = warm_start
        self.forward_info: Solution | None = None
        self.backward_info = Info()
        self._last_state: list[Tensor] = []
        self._last_adjoint = WarmStart()

    def forward(self, x: PyTree, start: PyTree | None = None) -> PyTree:
        """z* for inputs x, from `start` if given."""
        u = x if self.inject is None else self.inject(x)
        z = self._start(x, u) if start is None else start
        hparams = (self._cell_tensors(), u)
        batch_dims = self._batch_dims()
        step = self._step(z)
        first = step if _torch.transforms_active() else self._step(z, live=True)
        solution, self.forward_info = self.forward_solver.solve_below(first, z, hparams, batch_dims)
        if self.warm_start:
            self._last_state = split(self.forward_info.value)[0]
        self._record_statistics(solution.value, u)
        return fixed_point(
            step,
            solution.value,
            hparams,
            solver=self.backward_solver,
            batch_dims=batch_dims,
            info=self.backward_info,
            warm_start=self._last_adjoint if self.warm_start else None,
        )

    def jacobian_penalty(
        self, z: PyTree, x: PyTree, probes: int = 1, generator: torch.Generator | None = None
    ) -> Tensor:
        """Hutchinson's estimate of ‖∂₁cell(z, x)‖²_F per state variable, differentiable in the parameters and x.

        Args:
            z: the state, usually the layer's output; it is detached.
            probes: the number of normal vectors that are averaged; `generator` (on any device) draws them.

        Source: Bai, Koltun and Kolter 2021, equation 5.
        """
        u = x if self.inject is None else self.inject(x)
        leaves, _, rebuild = flatten(z, "z")
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        with torch.enable_grad():
            outputs = flatten(self._step(z)(rebuild(leaves), (self._cell_tensors(), u)), "cell(z, x)")[0]
            total = outputs[0].new_zeros(())
            device = outputs[0].device if generator is None else generator.device
            for _ in range(probes):
                drawn = (torch.randn(y.shape, generator=generator, dtype=y.dtype, device=device) for y in outputs)
                v = [each.to(y.device) for each, y in zip(drawn, outputs, strict=True)]
                rows = _autodiff.grad(outputs, leaves, v, create_graph=True)
                total = total + sum((row**2).sum() for row in rows)
        return total / (probes * sum(leaf.numel() for leaf in leaves))

    def _start(self, x: PyTree, u: PyTree) -> PyTree:
        leaves, rebuild = split(u)
        zeros = rebuild([torch.zeros_like(leaf, requires_grad=False) for leaf in leaves])
        first = zeros if self.start is None else self.start(x)
        if not self.warm_start:
            return first
        leaves, rebuild = split(first)
        if [*map(KIND, leaves)] == [*map(KIND, self._last_state)]:
            return rebuild(self._last_state)
        self._last_adjoint = WarmStart()
        return first

    def _step(self, z: PyTree, live: bool = False) -> Callable[[PyTree, PyTree], PyTree]:
        """(z, (tensors, u)) ↦ cell(z, u) in z's dtype, under the present autocast even if it is differentiated later.

        live: it will not be differentiated, so a cell without buffers is called as it is, in half the time.
        """
        dtypes = [leaf.dtype for leaf in split(z)[0]]
        device = split(z)[0][0].device.type
        device = device if torch.amp.is_autocast_available(device) else "cpu"
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        function, cell = self.cell, None
        if isinstance(self.cell, nn.Module) and not (live and next(self.cell.buffers(), None) is None):
            cell = functional(self.cell)

        def step(z: PyTree, hparams: PyTree) -> PyTree:
            tensors, u = hparams
            same = torch.is_autocast_enabled(device) == enabled and not enabled
            with contextlib.nullcontext() if same else torch.autocast(device, dtype=dtype, enabled=enabled):
                new = function(z, u) if cell is None else cell(tensors, z, u)
            if not enabled:
                return new
            leaves, rebuild = split(new)
            return rebuild([leaf.to(old) for leaf, old in zip(leaves, dtypes, strict=True)])

        return step

    def _cell_tensors(self) -> dict[str, Tensor]:
        """The cell's parameters, and copies of its buffers, because these may change before the backward pass."""
        if not isinstance(self.cell, nn.Module):
            return {}
        buffers = {name: buffer.clone() for name, buffer in self.cell.named_buffers()}
        return buffers | dict(self.cell.named_parameters())

    def _batch_dims(self) -> int:
        if self.batch_dims is not None:
            return self.batch_dims
        modules = self.cell.modules() if isinstance(self.cell, nn.Module) else []
        return 0 if any(map(couples_samples, modules)) else 1

    def _record_statistics(self, z: PyTree, u: PyTree) -> None:
        """One evaluation at z* with the real buffers, so that running statistics count each batch once."""
        if _torch.transforms_active() or not isinstance(self.cell, nn.Module) or not self.cell.training:
            return
        if any(True for _ in self.cell.buffers()):
            with torch.no_grad():
                self.cell(z, u)

    def __getstate__(self) -> dict[str, Any]:
        """Pickles and copies exclude forward_info and backward_info."""
        return self.__dict__ | {"forward_info": None, "backward_info": Info()}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for kind, leaves in (("state", self._last_state), ("adjoint", self._last_adjoint.value or [])):
            destination |= {f"{prefix}warm_start.{kind}.{i}": leaf.detach() for i, leaf in enumerate(leaves)}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        kept: dict[str, list[Tensor]] = {"state": [], "adjoint": []}
        for kind, leaves in kept.items():
            while (key := f"{prefix}warm_start.{kind}.{len(leaves)}") in state_dict:
                leaves.append(state_dict.pop(key).clone())
        if self.warm_start:
            self._last_state, self._last_adjoint = kept["state"], WarmStart(kept["adjoint"] or None)
        super()._load_from_state_dict(state_dict, prefix, *args)


def project_spectral_(weight: Tensor, radius: float) -> Tensor:
    """Project a matrix onto the ball ‖W‖₂ ≤ radius, in place: larger singular values are set to radius.

    Args:
        weight: [n, m], such as a parameter after an optimiser's step.
        radius: > 0; below 1 it makes tanh(zWᵀ + u) a contraction.

    Returns: weight.
    Cost: one singular value decomposition.

    Example:
        >>> project_spectral_(torch.diag(torch.tensor([2.0, 0.5])), 0.9)
        tensor([[0.9000, 0.0000],
                [0.0000, 0.5000]])
    """
    if weight.ndim != 2:
        raise ValueError(f"weight must be a matrix, got shape {tuple(weight.shape)}")
    with torch.no_grad():
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        if bool(s[0] > radius):
            weight.copy_((u * s.clamp_max(radius)) @ vh)
    return weight
