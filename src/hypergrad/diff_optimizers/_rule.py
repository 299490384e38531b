"""What all update rules share: the walk over leaves, and what a hyperparameter may be."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar, TypeAlias, final

import optree
import torch
from torch import Tensor

from .. import _autodiff
from .._autodiff import as_scalar
from .._solution import warn
from .._tree import PyTree, flatten

Value: TypeAlias = "float | Tensor"
State: TypeAlias = "dict[str, Any]"


@dataclass(frozen=True)
class PerStep:
    """A hyperparameter with a value for each step: at the t-th update (from 0, counted by state["step"]) values[t].

    Args:
        values: a tensor whose first axis counts steps, or a sequence of numbers or 0-d tensors.

    Example:
        >>> import hypergrad
        >>> rule = hypergrad.diff_optimizers.SGD(lr=PerStep(torch.linspace(0.1, 0.01, 100)))
    """

    values: Tensor | Sequence[Value]

    def __post_init__(self) -> None:
        if not isinstance(self.values, (Tensor, Sequence)) or (
            isinstance(self.values, Tensor) and not self.values.ndim
        ):
            raise ValueError(f"PerStep wants a tensor with an axis of steps or a sequence, got {self.values!r}")

    def at(self, step: Tensor, name: str) -> Value:
        try:
            index = int(step)
        except RuntimeError:  # a batch of counters under vmap, which cannot be read
            if not isinstance(self.values, Tensor):
                raise
            place = step.to(device=self.values.device, dtype=torch.long).reshape(1)
            return self.values.index_select(0, place).squeeze(0)
        if index >= len(self.values):
            raise ValueError(f"{name}: PerStep holds {len(self.values)} values, and this is update number {index + 1}")
        return self.values[index]


@dataclass(frozen=True)
class PerLeaf:
    """A hyperparameter with a value for each leaf of params.

    Args:
        values: of params' structure, or a list in the order of its leaves. Each is a number, a tensor whose shape
            broadcasts to the leaf's (0-d, or one value for each entry), or a PerStep of those.

    Example:
        >>> import hypergrad
        >>> rule = hypergrad.diff_optimizers.SGD(lr=PerLeaf([0.1, PerStep([0.2, 0.1])]))
    """

    values: PyTree

    def at(self, index: int, count: int, name: str) -> Value | PerStep:
        leaves = optree.tree_leaves(self.values)
        if len(leaves) != count:
            raise ValueError(f"{name}: PerLeaf holds {len(leaves)} values, but params has {count} leaves")
        return leaves[index]


Hyper: TypeAlias = "float | Tensor | PerStep | PerLeaf | Callable[[Any], float | Tensor | PerStep | PerLeaf]"


def is_zero(value: Any) -> bool:
    """Whether a hyperparameter is the plain number 0, for which torch.optim leaves out the term and its buffer."""
    return isinstance(value, (int, float)) and value == 0


class Here:
    """The values of hyperparameters at one step, leaf after leaf: here(rule, "lr"). Its t counts updates from 1."""

    def __init__(self, count: int, step: Tensor, hparams: PyTree):
        self.count, self.step, self.hparams = count, step, hparams
        self.called: dict[Any, Any] = {}
        self.leaf, self.index = step, 0

    def at(self, leaf: Tensor, index: int) -> Here:
        self.leaf, self.index = leaf, index
        return self

    @cached_property
    def t(self) -> Tensor:
        # Powers such as β₂ᵗ in float64, as torch.optim has them, whatever the counter's dtype.
        return (self.step if self.step.device.type == "mps" else self.step.to(torch.float64)) + 1

    @cached_property
    def number(self) -> int | None:
        """t where reading it waits for nothing: on the CPU, outside vmap."""
        try:
            return int(self.step.detach()) + 1 if self.step.device.type == "cpu" else None
        except RuntimeError:
            return None

    def power(self, beta: Value) -> Value:
        """βᵗ: of a number a number, as torch.optim has it, where the counter can be read at no cost."""
        return beta**self.t if self.number is None or isinstance(beta, Tensor) else beta**self.number

    def __call__(self, config: Any, name: str) -> Any:
        value = getattr(config, name)
        if name == "betas":
            return tuple(self._read(config, f"betas[{i}]", beta) for i, beta in enumerate(value))
        return self._read(config, name, value)

    def _read(self, config: Any, name: str, value: Any) -> Value:
        name = f"{type(config).__name__}: {name}"
        if callable(value):
            if name not in self.called:
                self.called[name] = self._call(value, name)
            value = self.called[name]
        local = isinstance(value, PerLeaf)
        if isinstance(value, PerLeaf):
            value = value.at(self.index, self.count, name)
        if isinstance(value, PerStep):
            value = value.at(self.step, name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return value
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{name} must be a number, a tensor, PerStep, PerLeaf or a callable of hparams, got {value!r}"
            )
        room = self.leaf.shape if local else torch.Size()
        if value.ndim > len(room) or any(
            n not in (1, m) for n, m in zip(reversed(value.shape), reversed(room), strict=False)
        ):
            hint = (
                f"does not broadcast to the leaf's {tuple(room)}" if local else "is no number: say PerStep or PerLeaf"
            )
            raise ValueError(f"{name}: a tensor of shape {tuple(value.shape)} {hint}")
        return value

    def _call(self, function: Callable[[Any], Any], name: str) -> Any:
        if self.hparams is None:
            raise ValueError(f"{name} is a callable of hparams: pass hparams to update")
        value = function(self.hparams)
        if torch.is_grad_enabled() and _has_graph(self.hparams):
            inside: Any = value.values if isinstance(value, (PerStep, PerLeaf)) else value
            if not _has_graph([x.values if isinstance(x, PerStep) else x for x in optree.tree_leaves(inside)]):
                raise ValueError(
                    f"{name} has no graph back to hparams, which require grad: was it computed with .item(), .detach() "
                    "or under no_grad? A constant is passed as a number"
                )
        return value


def _has_graph(tree: PyTree) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in optree.tree_leaves(tree))


def _aligned(tree: PyTree, leaves: Sequence[Tensor], name: str, shapes: bool = True) -> list[Tensor]:
    """The leaves of a tree that must stand beside params'."""
    others = optree.tree_leaves(tree)
    if len(others) != len(leaves):
        hint = "; a gradient that is None must be given as zeros" if name == "grads" else ""
        raise ValueError(f"{name} must have params' structure: {len(leaves)} leaves, got {len(others)}{hint}")
    for i, (other, leaf) in enumerate(zip(others, leaves, strict=True)):
        if not isinstance(other, Tensor) or other.layout is not torch.strided:
            raise TypeError(f"leaf {i} of {name} must be a dense tensor, got {getattr(other, 'layout', other)!r}")
        if shapes and other.shape != leaf.shape:
            raise ValueError(f"leaf {i} of {name} must be of shape {tuple(leaf.shape)}, got {tuple(other.shape)}")
    return others


@dataclass(frozen=True, kw_only=True)
class Rule(ABC):
    """What all update rules share: (w, s) ← U(w, s, g; hyperparameters), a pure function. Nothing is written in place.

    Every hyperparameter that is not a bool may be a number, a 0-d tensor (with a graph, if it is to be learned),
    `PerStep`, `PerLeaf`, or a callable of hparams that gives one of these; `betas` is a pair of them.

    Args:
        maximize: step up the gradient instead of down.
    """

    maximize: bool = False
    _unit: ClassVar[tuple[str, ...]] = ("alpha", "rho")  # numbers in [0, 1), as betas are

    def __post_init__(self) -> None:
        pairs = [(f.name, getattr(self, f.name)) for f in fields(self)]
        betas = getattr(self, "betas", ())
        if "betas" in dict(pairs) and (not isinstance(betas, Sequence) or len(betas) != 2):
            raise ValueError(f"{type(self).__name__}: betas must be a pair, got {betas!r}")
        pairs += [(f"betas[{i}]", beta) for i, beta in enumerate(betas)]
        for name, value in pairs:
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            below = 1 if name in self._unit or name.startswith("betas") else float("inf")
            if name != "dampening" and not 0 <= value < below:
                raise ValueError(f"{type(self).__name__}: {name} must be a number in [0, {below}), got {value!r}")

    def _slots(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        """What the state holds for each leaf, and how each begins."""
        return {}

    @abstractmethod
    def _leaf(self, w: Tensor, g: Tensor, s: Mapping[str, Tensor], here: Here) -> tuple[Tensor, dict[str, Tensor]]:
        """The update of one leaf: the rule's formula."""

    @final
    def init(self, params: PyTree) -> State:
        """The state at the start.

        Args:
            params: w, any pytree of floating point tensors.

        Returns: a dict of the step counter, a 0-d tensor on the CPU, and of each buffer in params' structure, by
            torch.optim's names: a pytree of tensors, to be carried by a loop.
        """
        leaves, _, unflatten = flatten(params, "params")
        dtype = torch.promote_types(leaves[0].dtype, torch.float32)
        step = torch.zeros((), dtype=dtype)
        return {"step": step} | {name: unflatten([new(w) for w in leaves]) for name, new in self._slots().items()}

    @final
    def update(self, params: PyTree, state: State, grads: PyTree, hparams: PyTree = None) -> tuple[PyTree, State]:
        """One step.

        Args:
            params: w.
            state: from `init` or the last update.
            grads: ∇g(w), of params' structure. To differentiate through it, compute it with create_graph=True.
            hparams: λ, what callable hyperparameters are called with.

        Returns:
            (params, state) after the step, new tensors in the same structures.

        Raises:
            ValueError: structures or shapes do not match, a PerStep has ended, a callable gives a value without a graph
                though hparams require grad, or hparams are passed but nothing is callable.

        Warns: HypergradientWarning where params and grads carry a graph and the state's buffers were detached.
        Cost: elementwise; nothing is read from an accelerator but the counter for a PerStep, if it is there.
        """
        leaves, _, unflatten = flatten(params, "params")
        slots = self._slots()
        if not isinstance(state, Mapping) or set(state) != {"step", *slots}:
            got = sorted(state) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"{type(self).__name__}: state must hold {['step', *slots]}, got {got}: see init(params)")
        if hparams is not None and not self._calls():
            raise ValueError(
                f"hparams were passed, but no hyperparameter of {type(self).__name__} is a callable of hparams: say "
                "lr=lambda hparams: ..., or leave hparams out"
            )
        slopes = _aligned(grads, leaves, "grads")
        buffers = {name: _aligned(state[name], leaves, name, shapes=False) for name in slots}
        if _looks_detached(leaves, slopes, buffers, state["step"]):
            warn(
                "params and grads carry a graph but the optimiser's state carries none: derivatives through its "
                "buffers are lost. Carry (params, state) together; to truncate on purpose, detach both"
            )
        here = Here(len(leaves), state["step"], hparams)
        new_params, new_buffers = [], {name: [] for name in slots}
        for i, (w, g) in enumerate(zip(leaves, slopes, strict=True)):
            own = {name: buffers[name][i] for name in slots}
            new, s = self._leaf(w, -g if self.maximize else g, own, here.at(w, i))
            # A 0-d float32 leaf times a 0-d float64 number would be float64.
            new_params.append(new.to(w.dtype))
            for name in slots:
                new_buffers[name].append(s[name].to(buffers[name][i].dtype))
        return unflatten(new_params), {"step": state["step"] + 1} | {k: unflatten(v) for k, v in new_buffers.items()}

    @final
    def on(self, inner_loss: Callable[..., Tensor], create_graph: bool = True) -> Callable[..., tuple[PyTree, State]]:
        """The rule as a map of (params, state): what unrolled loops and fixed point methods are given.

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
            params, state = carry
            leaves, _, unflatten = flatten(params, "params")
            with torch.enable_grad():
                needing = [w if w.requires_grad else w.detach().requires_grad_() for w in leaves]
                params = unflatten(needing)
                at = needing if create_graph else [w.detach().requires_grad_() for w in needing]
                loss = as_scalar(inner_loss(unflatten(at), hparams, *rest), "the inner loss")
                message = "the inner loss does not depend on params; was it computed under no_grad?"
                grads = _autodiff.grad([loss], at, create_graph=create_graph, must_reach=message)
                return self.update(params, state, unflatten(grads), hparams if self._calls() else None)

        return step

    def _calls(self) -> bool:
        """Whether a hyperparameter, or one of a part such as prox, is a callable of hparams."""
        return any(map(_is_called, (getattr(self, f.name) for f in fields(self))))


def _is_called(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(map(_is_called, value))
    if isinstance(value, Configuration):
        return any(_is_called(getattr(value, f.name)) for f in fields(value))
    return callable(value)


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """A part of a rule with hyperparameters of its own."""


def _looks_detached(
    params: Sequence[Tensor], grads: Sequence[Tensor], buffers: Mapping[str, Sequence[Tensor]], step: Tensor
) -> bool:
    # After the first step buffers depend on what grads depend on, unless params came from elsewhere than a step.
    tensors = [b for name in buffers for b in buffers[name]]
    if not tensors or not torch.is_grad_enabled() or any(b.requires_grad for b in tensors):
        return False
    live = any(w.grad_fn is not None for w in params) and any(g.requires_grad for g in grads)
    return live and any(g.grad_fn is not None for g in grads) and _counted(step) > 0


def _counted(step: Tensor) -> int:
    try:
        return int(step)
    except RuntimeError:  # a batch of counters under vmap
        return 0
