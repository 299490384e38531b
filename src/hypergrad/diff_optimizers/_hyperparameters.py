"""What a hyperparameter of an update rule may be, and its value at one step and leaf."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import optree
import torch
from torch import Tensor

from .._tree import Paths, PyTree

Number: TypeAlias = "float | Tensor"


@dataclass(frozen=True)
class PerStep:
    """A hyperparameter with a value for each step: at the t-th update (from 0, counted by state["step"]) values[t].

    Args:
        values: a tensor whose first axis counts steps, or a sequence of numbers or 0-d tensors.

    Example:
        >>> import hypergrad
        >>> rule = hypergrad.diff_optimizers.SGD(lr=PerStep(torch.linspace(0.1, 0.01, 100)))
    """

    values: Tensor | Sequence[Number]

    def __post_init__(self) -> None:
        if not isinstance(self.values, (Tensor, Sequence)) or (
            isinstance(self.values, Tensor) and not self.values.ndim
        ):
            raise ValueError(f"PerStep needs a tensor with an axis of steps or a sequence, got {self.values!r}")

    def at(self, step: Tensor, name: str) -> Number:
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

    def in_order(self, paths: Paths, name: str) -> list[Any]:
        """The values in the order of params' leaves."""
        values, spec = self.values, optree.tree_structure(self.values)
        if not isinstance(values, (list, tuple)) or spec == paths.spec:
            return aligned(values, paths, f"{name}: PerLeaf")
        if len(values) != len(paths):
            raise ValueError(f"{name}: PerLeaf holds {len(values)} values, but params has {len(paths)} leaves")
        return list(values)


Hyper: TypeAlias = "float | Tensor | PerStep | PerLeaf | Callable[[Any], float | Tensor | PerStep | PerLeaf]"


def is_zero(value: Any) -> bool:
    """Whether a hyperparameter is the plain number 0, for which torch.optim leaves out the term and its buffer."""
    return isinstance(value, (int, float)) and value == 0


def aligned(tree: PyTree, paths: Paths, name: str) -> list[Any]:
    """The leaves of a tree of params' structure in the order of params' leaves, matched by key; None is a leaf."""
    leaves, spec = optree.tree_flatten(tree)
    if spec == paths.spec:
        return leaves
    leaves, spec = optree.tree_flatten(tree, none_is_leaf=True)
    found = dict(zip(Paths(name, spec).within, leaves, strict=True))
    odd = {*paths.within} ^ {path for path, leaf in found.items() if leaf is not None or path in paths.within}
    if odd:
        listed = ", ".join(sorted(path or "(a single tensor)" for path in odd)[:5])
        raise ValueError(
            f"{name} must have params' structure: {len(paths)} leaves, got {len(leaves)}; in one of the two only: "
            f"{listed}"
        )
    return [found[path] for path in paths.within]


class Values:
    """The hyperparameters of one update, leaf after leaf: value(rule, "lr") is a number, or a tensor that broadcasts.

    With t, the number of this update of the current leaf, from 1: updates that it missed are not counted.
    """

    def __init__(self, paths: Paths, state: Mapping[str, Any], hparams: PyTree):
        self.paths, self.step, self.missed, self.hparams = paths, state["step"], state.get("missed"), hparams
        self.index, self.leaf = 0, self.step
        self.known: dict[str, tuple[Any, bool]] = {}  # what callables and PerLeaf gave, and whether it is per leaf

    def of(self, index: int, leaf: Tensor) -> Values:
        """The values for this leaf."""
        self.index, self.leaf = index, leaf
        return self

    @property
    def number(self) -> int | None:
        """t as a number, where reading it waits for nothing: on the CPU, outside vmap."""
        return None if self._numbers is None else self._numbers[self.index]

    @cached_property
    def _numbers(self) -> list[int] | None:
        counters = [self.step] if self.missed is None else [self.step, self.missed]
        if any(x.device.type != "cpu" for x in counters):
            return None
        try:
            begun, *missed = (x.detach().tolist() for x in counters)
        except RuntimeError:
            return None
        counts = [int(begun) + 1 - k for k in (missed[0] if missed else [0] * len(self.paths))]
        return [int(n) for n in counts] if all(n == int(n) for n in counts) else None

    @property
    def t(self) -> Tensor:
        """t as a tensor."""
        return self._next if self.missed is None else self._next - self.missed[self.index]

    @cached_property
    def _next(self) -> Tensor:
        # Powers such as β₂ᵗ are taken in float64, as torch.optim takes them, whatever the counter's dtype.
        return (self.step if self.step.device.type == "mps" else self.step.to(torch.float64)) + 1

    def power(self, beta: Number) -> Number:
        """βᵗ: of a number a number, as in torch.optim, where t can be read."""
        return beta**self.t if self.number is None or isinstance(beta, Tensor) else beta**self.number

    def __call__(self, config: Any, name: str) -> Any:
        value = getattr(config, name)
        if name == "betas":
            return tuple(self._resolved(config, f"betas[{i}]", beta) for i, beta in enumerate(value))
        return self._resolved(config, name, value)

    def _resolved(self, config: Any, name: str, value: Any) -> Number:
        if type(value) is float:  # the most frequent case by far
            return value
        name, per_leaf = f"{type(config).__name__}: {name}", False
        if callable(value) or isinstance(value, PerLeaf):
            if name not in self.known:
                value = self._called(value, name) if callable(value) else value
                per_leaf = isinstance(value, PerLeaf)
                self.known[name] = value.in_order(self.paths, name) if per_leaf else value, per_leaf
            value, per_leaf = self.known[name]
            value = value[self.index] if per_leaf else value
        if isinstance(value, PerStep):
            value = value.at(self.step, name)
        if isinstance(value, Tensor):
            room = self.leaf.shape if per_leaf else torch.Size()
            sizes = zip(reversed(value.shape), reversed(room), strict=False)
            if value.ndim > len(room) or any(n not in (1, m) for n, m in sizes):
                hint = f"does not broadcast to the leaf's {tuple(room)}" if per_leaf else "needs PerStep or PerLeaf"
                raise ValueError(f"{name}: a tensor of shape {tuple(value.shape)} {hint}")
        elif not isinstance(value, (int, float)) or isinstance(value, bool):
            raise TypeError(
                f"{name} must be a number, a tensor, PerStep, PerLeaf or a callable of hparams, got {value!r}"
            )
        return value

    def _called(self, function: Callable[[Any], Any], name: str) -> Any:
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
