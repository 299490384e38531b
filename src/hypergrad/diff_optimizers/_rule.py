"""What all update rules share: the walk over leaves, and the rule as a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar, TypeAlias, final

import torch
from torch import Tensor

from .. import _autodiff
from .._autodiff import as_scalar
from .._solution import warn
from .._tree import Paths, PyTree, flatten
from ._hyperparameters import PerLeaf, PerStep, Values, aligned

State: TypeAlias = "dict[str, Any]"


@dataclass(frozen=True, kw_only=True)
class Rule(ABC):
    """What all update rules share: (w, s) ← U(w, s, g; hyperparameters), a pure function. Nothing is written in place.

    Every hyperparameter that is not a bool may be a number, a 0-d tensor (with a graph, if it is to be learned),
    `PerStep`, `PerLeaf`, or a callable of hparams that gives one of these; `betas` is a pair of them. In the formulas
    η is lr, λ weight_decay, μ momentum, (β₁, β₂) betas, ε eps, α alpha, ρ rho, t the number of the update from 1.

    Args:
        maximize: step up the gradient instead of down.
        frozen: places, in the order of params' leaves, of leaves that no update changes.
    """

    maximize: bool = False
    frozen: tuple[int, ...] = ()
    _counts: ClassVar[bool] = False  # whether the formula depends on how many updates a leaf has had
    _below_one: ClassVar[tuple[str, ...]] = ("alpha", "rho", "betas[0]", "betas[1]")

    def __post_init__(self) -> None:
        pairs = [(f.name, getattr(self, f.name)) for f in fields(self)]
        betas = getattr(self, "betas", ())
        if "betas" in dict(pairs) and (not isinstance(betas, Sequence) or len(betas) != 2):
            raise ValueError(f"{type(self).__name__}: betas must be a pair, got {betas!r}")
        pairs += [(f"betas[{i}]", beta) for i, beta in enumerate(betas)]
        for name, value in pairs:
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            below = 1 if name in self._below_one else float("inf")
            if name != "dampening" and not 0 <= value < below:
                raise ValueError(f"{type(self).__name__}: {name} must be a number in [0, {below}), got {value!r}")

    def _slots(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        """What the state holds for each leaf, and how each begins."""
        return {}

    @abstractmethod
    def _leaf(self, w: Tensor, g: Tensor, s: Mapping[str, Tensor], value: Values) -> tuple[Tensor, dict[str, Tensor]]:
        """The update of one leaf: the rule's formula."""

    @property
    def needs_hparams(self) -> bool:
        """Whether a hyperparameter, or one of a part such as prox, is a callable of hparams."""
        return _is_called(self)

    @final
    def init(self, params: PyTree) -> State:
        """The state at the start.

        Args:
            params: w, any pytree of floating point tensors.

        Returns: a dict of "step", a 0-d tensor on the CPU, of each buffer in params' structure, by torch.optim's
            names, and, where the formula depends on it, of "missed": in how many steps each leaf had no gradient.
        """
        leaves, _, unflatten = flatten(params, "params")
        dtype = torch.promote_types(leaves[0].dtype, torch.float32)
        state: State = {"step": torch.zeros((), dtype=dtype, device="cpu")}
        if self._counts and self._slots():
            state["missed"] = torch.zeros(len(leaves), dtype=dtype, device="cpu")
        return state | {name: unflatten([new(w) for w in leaves]) for name, new in self._slots().items()}

    @final
    def update(self, params: PyTree, state: State, grads: PyTree, hparams: PyTree = None) -> tuple[PyTree, State]:
        """One step.

        Args:
            params: w.
            state: from `init` or the last update.
            grads: ∇g(w), of params' structure, mappings being matched by key. A leaf whose gradient is None stays as
                it is with its buffers, as in torch.optim. To differentiate through it, use create_graph=True.
            hparams: λ, what callable hyperparameters are called with.

        Returns:
            (params, state) after the step, new tensors in the same structures.

        Raises:
            TypeError, ValueError: params are complex, structures or shapes do not match, a PerStep has ended, a
                callable gives a value without a graph though hparams require grad, or none takes the hparams given.

        Warns: HypergradientWarning where params and grads carry a graph and the state's buffers were detached.
        Cost: elementwise; nothing is read from an accelerator but the counter for a PerStep, if it is there.
        """
        leaves, paths, unflatten = flatten(params, "params")
        slots = self._slots()
        self._check(state, slots, hparams)
        slopes = _dense(aligned(grads, paths, "grads"), paths, "grads")
        buffers = {name: _dense(aligned(state[name], paths, name), paths, name) for name in slots}
        _warn_if_detached(leaves, slopes, buffers, state["step"])
        value = Values(paths, state, hparams)
        new_params, new_buffers = list(leaves), {name: list(own) for name, own in buffers.items()}
        missed = [g is None or i in self.frozen for i, g in enumerate(slopes)]
        for i, (w, g) in enumerate(zip(leaves, slopes, strict=True)):
            if missed[i] or not w.numel():
                continue
            if g.shape != w.shape:
                raise ValueError(
                    f"grads{paths.within[i]} must be of shape {tuple(w.shape)}, got one of shape {tuple(g.shape)}"
                )
            own = {name: buffers[name][i] for name in slots}
            new, s = self._leaf(w, -g if self.maximize else g, own, value.of(i, w))
            # A 0-d float32 leaf times a 0-d float64 number would be float64.
            new_params[i] = new.to(w.dtype)
            for name in slots:
                new_buffers[name][i] = s[name].to(own[name].dtype)
        counters = {"step": state["step"] + 1}
        if "missed" in state:
            counters["missed"] = (
                state["missed"] + state["missed"].new_tensor(missed) if any(missed) else state["missed"]
            )
        return unflatten(new_params), counters | {name: unflatten(own) for name, own in new_buffers.items()}

    def _check(self, state: Any, slots: Mapping[str, Any], hparams: PyTree) -> None:
        if not isinstance(state, Mapping) or {*state} - {"missed"} != {"step", *slots}:
            got = sorted(state) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"{type(self).__name__}: state must hold {['step', *slots]}, got {got}: see init(params)")
        if hparams is not None and not self.needs_hparams:
            raise ValueError(
                f"hparams were passed, but no hyperparameter of {type(self).__name__} is a callable of hparams: write "
                "lr=lambda hparams: ..., or leave hparams out"
            )

    @final
    def on(self, inner_loss: Callable[..., Tensor], create_graph: bool = True) -> Callable[..., tuple[PyTree, State]]:
        """The rule as a map of (params, state): what unrolled loops and fixed point methods are given.

        A leaf that inner_loss does not depend on stays as it is, as in torch.optim.

        Args:
            inner_loss: g(params, hparams, ...), scalar.
            create_graph: whether to differentiate through the gradient as well. False gives first-order
                hypergradients (FOMAML).

        Returns: step((params, state), hparams, ...) ↦ (params, state).

        Example:
            >>> import hypergrad
            >>> rule = hypergrad.diff_optimizers.SGD(lr=lambda h: h.exp())
            >>> step = rule.on(lambda w, h: w**2 / 2)
            >>> w, log_lr = torch.tensor(1.0), torch.tensor(0.5).log().requires_grad_()
            >>> step((w, rule.init(w)), log_lr)[0].detach()
            tensor(0.5000)
        """

        def step(carry: tuple[PyTree, State], hparams: PyTree = None, *rest: Any) -> tuple[PyTree, State]:
            if not isinstance(carry, (tuple, list)) or len(carry) != 2:
                raise TypeError(f"a step of {type(self).__name__} takes (params, init(params)), got {carry!r}")
            if torch.is_inference_mode_enabled():
                raise RuntimeError("nothing can be differentiated under torch.inference_mode(): use torch.no_grad()")
            leaves, _, unflatten = flatten(carry[0], "params")
            with torch.enable_grad():
                at = list(leaves)
                moved = [i for i in range(len(leaves)) if i not in self.frozen]
                for i in moved:
                    leaves[i] = leaves[i] if leaves[i].requires_grad else leaves[i].detach().requires_grad_()
                    at[i] = leaves[i] if create_graph else leaves[i].detach().requires_grad_()
                loss = as_scalar(inner_loss(unflatten(at), hparams, *rest), "the inner loss")
                grads = _autodiff.grad_or_none([loss], [at[i] for i in moved], create_graph=create_graph)
                if all(g is None for g in grads):
                    raise ValueError(
                        "the inner loss does not depend on params; was it computed under no_grad, or by a live model "
                        "instead of from its argument?"
                    )
                found: dict[int, Any] = dict(zip(moved, grads, strict=True))
                every: list[Any] = [found.get(i) for i in range(len(leaves))]
                return self.update(
                    unflatten(leaves), carry[1], unflatten(every), hparams if self.needs_hparams else None
                )

        return step


def _dense(tensors: list[Any], paths: Paths, name: str) -> list[Any]:
    """The same with sparse tensors made dense; TypeError for what is neither a tensor nor None."""
    for i, x in enumerate(tensors):
        if x is not None and not isinstance(x, Tensor):
            raise TypeError(f"{name}{paths.within[i]} must be a tensor or None, got {x!r}")
    return [x if x is None or x.layout is torch.strided else x.to_dense() for x in tensors]


def _is_called(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(map(_is_called, value))
    if is_dataclass(value) and not isinstance(value, (PerStep, PerLeaf)):
        return any(_is_called(getattr(value, f.name)) for f in fields(value))
    return callable(value)


def _warn_if_detached(
    params: Sequence[Tensor], grads: Sequence[Any], buffers: Mapping[str, Sequence[Tensor]], step: Tensor
) -> None:
    # After the first step buffers depend on what grads depend on, unless params came from elsewhere than a step.
    tensors = [b for name in buffers for b in buffers[name]]
    if not tensors or not torch.is_grad_enabled() or any(b.requires_grad for b in tensors):
        return
    live = any(w.grad_fn is not None for w in params) and any(g is not None and g.grad_fn is not None for g in grads)
    if not live:
        return
    try:
        begun = int(step) > 0
    except RuntimeError:  # a batch of counters under vmap
        begun = False
    if begun:
        warn(
            "params and grads carry a graph but the optimiser's state carries none: derivatives through its "
            "buffers are lost. Carry (params, state) together; to truncate on purpose, detach both"
        )
