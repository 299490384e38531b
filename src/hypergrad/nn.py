"""Modules: Equilibrium, and what training one needs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from . import _autodiff
from ._implicit_function import Info, WarmStart
from ._solution import Solution
from ._solution_maps import fixed_point
from ._tree import PyTree, flatten, split
from .fixed_points import Anderson, FixedPointSolver
from .solvers import GMRES, Solver


def functional(module: nn.Module) -> Callable[..., Any]:
    """A module as a pure function of its parameters: (parameters, *args) ↦ module(*args).

    Parameters come as a dict like dict(module.named_parameters()). Buffers are copied at each call, and BatchNorm in
    training mode uses its batch's statistics without recording them.

    Example:
        >>> layer = torch.nn.Linear(2, 1)
        >>> f = functional(layer)
        >>> f(dict(layer.named_parameters()), torch.ones(2)).shape
        torch.Size([1])
    """

    def function(parameters: dict[str, Tensor], *args: Any) -> Any:
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        with _nothing_recorded(module):
            return torch.func.functional_call(module, {**parameters, **buffers}, args)

    return function


@contextlib.contextmanager
def _nothing_recorded(module: nn.Module) -> Iterator[None]:
    """Normalisation in training mode writes no running statistics: under vmap it could not."""
    recording = [m for m in module.modules() if isinstance(m, _NormBase) and m.training and m.track_running_stats]
    for m in recording:
        m.track_running_stats = False
    try:
        yield
    finally:
        for m in recording:
            m.track_running_stats = True


class Equilibrium(nn.Module):
    """z* = cell(z*, x) as a layer: any forward solver, gradients by the implicit function theorem.

    The memory does not depend on the number of forward steps. Each sample (first axis of each leaf of z) converges by
    itself, forward and backward, unless the samples are coupled (batch_dims=0).

    Args:
        cell: a Module or a function (z, u) ↦ z; u = x, or inject(x). A function may use no tensor that requires grad.
        forward: solver from hg.fixed_points; default Anderson().
        adjoint: linear solver of (I − ∂₁cellᵀ) v = z̄; default GMRES().
        inject: a Module or a function of x for all that does not depend on z (xB + c): evaluated once a call, not at
            every step, and differentiated as usual.
        start: x ↦ the first z, or None for zeros like inject(x), or like x.
        batch_dims: 1 where the first axis of each leaf of z counts independent samples, 0 where the samples are coupled
            (a graph network); None: 1, or 0 while the cell has a BatchNorm that uses the batch's statistics.
        warm_start: start from the last call's z*, and each backward pass from the last v, while shapes stay the same.

    Attributes:
        forward_info: the Solution of the last forward solve.
        backward_info: the Info of the last backward pass.

    Cost: forward one evaluation of cell a step, one more to record BatchNorm's statistics (once, at z*); backward one
        evaluation and the adjoint's products.
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
        adjoint: Solver | None = None,
        inject: Callable[..., PyTree] | None = None,
        start: Callable[..., PyTree] | None = None,
        batch_dims: int | None = None,
        warm_start: bool = False,
    ):
        super().__init__()
        self.cell = cell
        self.inject = inject
        self.start = start
        self.solver = forward or Anderson()
        self.adjoint = adjoint or GMRES()
        self.batch_dims = batch_dims
        self.warm_start = warm_start
        self.forward_info: Solution | None = None
        self.backward_info = Info()
        self._adjoint_start = WarmStart()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and files hold the layer without what its last call left: infos and warm starts."""
        return self.__dict__ | {"forward_info": None, "backward_info": Info(), "_adjoint_start": WarmStart()}

    def forward(self, x: PyTree, start: PyTree | None = None) -> PyTree:
        """z* for inputs x, from `start` if given."""
        u = x if self.inject is None else self.inject(x)
        z = self._start(x, u) if start is None else start
        hparams = (self._cell_parameters(), u)
        batch_dims = self._batch_dims()
        step = self._step(z)
        solver = _with_batch(self.solver, batch_dims)
        with torch.no_grad():
            self.forward_info = solver(step, z, hparams)
            self._record_statistics(self.forward_info.value, u)
        return fixed_point(
            step,
            self.forward_info.value,
            hparams,
            adjoint=self.adjoint,
            batch_dims=batch_dims,
            info=self.backward_info,
            warm_start=self._adjoint_start if self.warm_start else None,
        )

    def jacobian_penalty(
        self, z: PyTree, x: PyTree, probes: int = 1, generator: torch.Generator | None = None
    ) -> Tensor:
        """Hutchinson's estimate of ‖∂₁cell(z, x)‖²_F per state variable, differentiable in the parameters and x.

        Args:
            z: the state to take it at, usually the layer's output; it is detached.
            probes: normal vectors averaged.
            generator: of the probes.

        Source: Bai, Koltun and Kolter 2021, equation 5.
        """
        u = x if self.inject is None else self.inject(x)
        leaves, _, rebuild = flatten(z, "z")
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        with torch.enable_grad():
            outputs = flatten(self._step(z)(rebuild(leaves), (self._cell_parameters(), u)), "cell(z, x)")[0]
            total = outputs[0].new_zeros(())
            for _ in range(probes):
                v = [torch.randn(y.shape, generator=generator, dtype=y.dtype, device=y.device) for y in outputs]
                rows = _autodiff.grad(outputs, leaves, v, create_graph=True)
                total = total + sum((row**2).sum() for row in rows)
        return total / (probes * sum(leaf.numel() for leaf in leaves))

    def _start(self, x: PyTree, u: PyTree) -> PyTree:
        leaves, rebuild = split(u)
        zeros = rebuild([torch.zeros_like(leaf, requires_grad=False) for leaf in leaves])
        first = zeros if self.start is None else self.start(x)
        if not self.warm_start or self.forward_info is None:
            self._adjoint_start.value = None
            return first
        old = self.forward_info.value
        if _kinds(old) == _kinds(first):
            return old
        self._adjoint_start.value = None
        return first

    def _step(self, z: PyTree) -> Callable[[PyTree, PyTree], PyTree]:
        """(z, (parameters, u)) ↦ cell(z, u) in z's dtype, under the autocast of this call also when differentiated."""
        device = split(z)[0][0].device.type
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        cell = functional(self.cell) if isinstance(self.cell, nn.Module) else _without_parameters(self.cell)

        def step(z: PyTree, hparams: PyTree) -> PyTree:
            parameters, u = hparams
            with torch.autocast(device, dtype=dtype, enabled=enabled):
                new = cell(parameters, z, u)
            if not enabled:
                return new
            leaves, rebuild = split(new)
            return rebuild([leaf.to(old.dtype) for leaf, old in zip(leaves, split(z)[0], strict=True)])

        return step

    def _cell_parameters(self) -> dict[str, Tensor]:
        return dict(self.cell.named_parameters()) if isinstance(self.cell, nn.Module) else {}

    def _batch_dims(self) -> int:
        if self.batch_dims is not None:
            return self.batch_dims
        modules = self.cell.modules() if isinstance(self.cell, nn.Module) else []
        coupled = any(isinstance(m, _BatchNorm) and (m.training or not m.track_running_stats) for m in modules)
        return 0 if coupled else 1

    def _record_statistics(self, z: PyTree, u: PyTree) -> None:
        """One evaluation at z* with the real buffers, so that running statistics count each batch once."""
        if isinstance(self.cell, nn.Module) and self.cell.training and any(True for _ in self.cell.buffers()):
            self.cell(z, u)


def _without_parameters(cell: Callable[..., PyTree]) -> Callable[..., PyTree]:
    return lambda _, z, u: cell(z, u)


def _kinds(tree: PyTree) -> list[tuple[torch.Size, torch.dtype, torch.device]]:
    return [(leaf.shape, leaf.dtype, leaf.device) for leaf in split(tree)[0]]


def _with_batch(solver: FixedPointSolver, batch_dims: int) -> FixedPointSolver:
    return solver if solver.batch_dims == batch_dims else replace(solver, batch_dims=batch_dims)


def project_spectral_(weight: Tensor, radius: float) -> Tensor:
    """Project a matrix on the ball ‖W‖₂ ≤ radius, in place and on its own device: singular values above are cut.

    Args:
        weight: [n, m]; a parameter, after an optimiser's step.
        radius: > 0; below 1 it makes tanh(zWᵀ + u) a contraction.

    Returns: weight.
    Raises: ValueError for another number of axes.
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
