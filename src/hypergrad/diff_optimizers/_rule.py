"""The base of all update rules: hyperparameters, their values at a step and leaf, and the update of all leaves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from typing import Any, ClassVar, TypeAlias, final

import optree
import torch
from torch import Tensor

from .. import _autodiff, _torch
from .._autodiff import as_scalar
from .._solution import warn
from .._tree import Paths, PyTree, filled, flatten

State: TypeAlias = "dict[str, Any]"
Number: TypeAlias = "float | Tensor"


@dataclass(frozen=True)
class PerStep:
    """A hyperparameter with a value for each step: update t, from 0 and counted by state["step"], uses values[t].

    Args:
        values: a tensor whose first axis runs over steps, or a sequence of numbers or 0-d tensors.

    Example:
        >>> D = hg.diff_optimizers
        >>> rule, w = D.SGD(lr=D.PerStep(torch.tensor([0.1, 0.2]))), torch.ones(1)
        >>> state = rule.init(w)
        >>> for _ in range(2):
        ...     w, state = rule.update(w, state, torch.ones(1))
        >>> w  # 1 − 0.1 − 0.2
        tensor([0.7000])
    """

    values: Tensor | Sequence[Number]

    def __post_init__(self) -> None:
        if not (self.values.ndim if isinstance(self.values, Tensor) else isinstance(self.values, Sequence)):
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
        values: a tree of params' structure, or a list in the order of its leaves. Each value is a number, a tensor
            whose shape broadcasts to the leaf's (0-d, or one value for each entry), or a PerStep of those.

    Example:
        >>> D = hg.diff_optimizers
        >>> w = {"body": torch.ones(1), "head": torch.ones(1)}
        >>> rule = D.SGD(lr=D.PerLeaf({"body": 0.0, "head": 0.5}))
        >>> rule.update(w, rule.init(w), w)[0]
        {'body': tensor([1.]), 'head': tensor([0.5000])}
    """

    values: PyTree

    def in_order(self, paths: Paths, name: str) -> list[Any]:
        values, spec = self.values, optree.tree_structure(self.values)
        if not isinstance(values, (list, tuple)) or spec == paths.spec:
            return aligned(values, paths, f"{name}: PerLeaf")
        if len(values) != len(paths):
            raise ValueError(f"{name}: PerLeaf holds {len(values)} values, but params has {len(paths)} leaves")
        return list(values)


Hyper: TypeAlias = "float | Tensor | PerStep | PerLeaf | Callable[[Any], float | Tensor | PerStep | PerLeaf]"


def is_zero(value: Any) -> bool:
    """Whether a hyperparameter is the plain number 0, for which torch.optim omits the term and its buffer."""
    return isinstance(value, (int, float)) and value == 0


def aligned(tree: PyTree, paths: Paths, name: str) -> list[Any]:
    """The leaves of a tree of params' structure, matched by key, in the order of params' leaves; None is a leaf."""
    leaves, spec = optree.tree_flatten(tree)
    if spec == paths.spec:
        return leaves
    leaves, spec = optree.tree_flatten(tree, none_is_leaf=True)
    found = dict(zip(Paths(name, spec).within, leaves, strict=True))
    odd = {*paths.within} ^ {path for path, leaf in found.items() if leaf is not None or path in paths.within}
    if odd:
        listed = ", ".join(sorted(path or "(a single tensor)" for path in odd)[:5])
        raise ValueError(
            f"{name} must have params' structure: {len(paths)} leaves, got {len(leaves)}; only one of the two has "
            f"{listed}"
        )
    return [found[path] for path in paths.within]


class Values:
    """The hyperparameters of one update: value(rule, "lr") is a number or a tensor that broadcasts to the current leaf.

    t is the number of the current leaf's updates, this one included, without the steps that the leaf missed.
    """

    def __init__(self, paths: Paths, state: Mapping[str, Any], hparams: PyTree):
        self.paths, self.step, self.missed, self.hparams = paths, state["step"], state.get("missed"), hparams
        self.index, self.leaf = 0, self.step
        self.known: dict[str, tuple[Any, bool]] = {}  # values of callables and PerLeaf, and whether they are per leaf

    def of(self, index: int, leaf: Tensor) -> Values:
        """Make this the current leaf."""
        self.index, self.leaf = index, leaf
        return self

    @property
    def number(self) -> int | None:
        """t as a number if it can be read without synchronisation: on the CPU, outside vmap. Otherwise None."""
        return None if self._numbers is None else self._numbers[self.index]

    @cached_property
    def _numbers(self) -> list[int] | None:
        counters = [self.step] if self.missed is None else [self.step, self.missed]
        if any(x.device.type != "cpu" for x in counters):
            return None
        try:
            steps, *missed = (x.detach().tolist() for x in counters)
        except RuntimeError:
            return None
        counts = [int(steps) + 1 - k for k in (missed[0] if missed else [0] * len(self.paths))]
        return [int(n) for n in counts] if all(n == int(n) for n in counts) else None

    @property
    def t(self) -> Tensor:
        return self._next if self.missed is None else self._next - self.missed[self.index].detach()

    @cached_property
    def _next(self) -> Tensor:
        # Powers such as β₂ᵗ are computed in float64, as in torch.optim, whatever the counter's dtype.
        step = self.step.detach()  # with a graph, a reverse pass would have to read the counter from the device
        return (step if step.device.type == "mps" else step.to(torch.float64)) + 1

    def power(self, beta: Number) -> Number:
        """βᵗ; a number, as in torch.optim, if β is a number and t can be read."""
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
                    "or under no_grad? Pass a constant as a number"
                )
        return value


def _has_graph(tree: PyTree) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in optree.tree_leaves(tree))


@dataclass(frozen=True, kw_only=True)
class Rule(ABC):
    """The base class of update rules: (w, s) ← U(w, s, g; hyperparameters), a pure function. Nothing changes in place.

    Every hyperparameter that is not a bool may be a number, a 0-d tensor (with a graph if it is to be learned),
    `PerStep`, `PerLeaf`, or a callable of hparams that returns one of these; `betas` is a pair of them. In the formulas
    η is lr, λ weight_decay, μ momentum, (β₁, β₂) betas, ε eps, α alpha, ρ rho, t the number of the update from 1.

    Args:
        maximize: step up the gradient instead of down.
        frozen: indices, in the order of params' leaves, of leaves that no update changes.

    Example:
        A custom rule defines its state and its formula; this one steps along a running mean of the gradients.

        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True, kw_only=True)
        ... class Averaged(hg.diff_optimizers.Rule):
        ...     lr: float = 0.1
        ...     alpha: float = 0.9
        ...
        ...     def slots(self):
        ...         return {"mean": torch.zeros_like}
        ...
        ...     def leaf(self, w, g, s, value):
        ...         alpha = value(self, "alpha")
        ...         mean = alpha * s["mean"] + (1 - alpha) * g
        ...         return w - value(self, "lr") * mean, {"mean": mean}
        >>> rule, w = Averaged(lr=lambda hparams: hparams["lr"]), torch.ones(2)
        >>> rule.update(w, rule.init(w), torch.tensor([1.0, -1.0]), {"lr": 0.5})[0]
        tensor([0.9500, 1.0500])
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

    def slots(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        """The name of each buffer that the state holds, and the function of a leaf that gives its first value."""
        return {}

    @abstractmethod
    def leaf(self, w: Tensor, g: Tensor, s: Mapping[str, Tensor], value: Values) -> tuple[Tensor, dict[str, Tensor]]:
        """The rule's formula: the new w and s of one leaf. value(self, name) is the value of a hyperparameter."""

    @cached_property
    def needs_hparams(self) -> bool:
        """Whether a hyperparameter, of this rule or of a part such as prox, is a callable of hparams."""
        return _is_called(self)

    @final
    def init(self, params: PyTree) -> State:
        """The state at the start.

        Args:
            params: w, any pytree of floating point tensors.

        Raises: ValueError if some parameters of a module require grad and others neither do nor are `frozen`.
        Returns: a dict that holds "step", a 0-d tensor on the CPU; each buffer, by torch.optim's name, in params'
            structure; and, if the formula needs it, "missed", the number of steps in which each leaf had no gradient.
        """
        leaves, names, unflatten = flatten(params, "params")
        fixed = [isinstance(w, torch.nn.Parameter) and not w.requires_grad for w in leaves]
        lost = [i for i, each in enumerate(fixed) if each and i not in self.frozen]
        if lost and not all(fixed):
            raise ValueError(
                f"{', '.join(names[i] for i in lost[:5])} do not require grad while others do, and a step would change "
                f"them: pass {type(self).__name__}(frozen={(*lost, *self.frozen)}), or leave them out of params"
            )
        dtype = torch.promote_types(leaves[0].dtype, torch.float32)
        state: State = {"step": torch.zeros((), dtype=dtype, device="cpu")}
        if self._counts and self.slots():
            state["missed"] = torch.zeros(len(leaves), dtype=dtype, device="cpu")
        return state | {name: unflatten([new(w) for w in leaves]) for name, new in self.slots().items()}

    @final
    def update(self, params: PyTree, state: State, grads: PyTree, hparams: PyTree = None) -> tuple[PyTree, State]:
        """One step.

        Args:
            params: w.
            state: from `init` or the last update.
            grads: ∇g(w), in params' structure; mappings are matched by key. A leaf whose gradient is None is not
                updated, nor are its buffers, as in torch.optim. To differentiate through ∇g, use create_graph=True.
            hparams: λ, the argument of callable hyperparameters.

        Returns:
            (params, state) after the step, new tensors in the same structures.

        Raises:
            TypeError, ValueError: params are complex, structures or shapes do not match, a PerStep has ended, a
                callable returns a value without a graph though hparams require grad, or no callable takes hparams.

        Warns: HypergradientWarning if params and grads carry a graph but the state's buffers were detached.
        Cost: elementwise. Nothing is read from an accelerator, except the counter for a PerStep if it was moved there.
        """
        leaves, paths, unflatten = flatten(params, "params")
        slots = self.slots()
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
            new, s = self.leaf(w, -g if self.maximize else g, own, value.of(i, w))
            # A 0-d float32 leaf times a 0-d float64 number would be float64.
            new_params[i] = new.to(w.dtype)
            for name in slots:
                new_buffers[name][i] = s[name].to(own[name].dtype)
        counters = {"step": state["step"] + 1}
        if "missed" in state:
            before = state["missed"]
            counters["missed"] = before + before.new_tensor(missed) if any(missed) else before
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
        """The rule as a map of (params, state), to be passed to unrolled loops and fixed point methods.

        A leaf on which inner_loss does not depend is not updated, as in torch.optim.

        Args:
            inner_loss: g(params, hparams, ...), scalar.
            create_graph: whether the result is differentiated through ∇g as well. False gives first-order
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
            with torch.enable_grad(), _torch.correct_derivatives():
                at = list(leaves)
                moved = [i for i in range(len(leaves)) if i not in self.frozen]
                for i in moved:
                    leaves[i] = leaves[i] if leaves[i].requires_grad else leaves[i].detach().requires_grad_()
                    at[i] = leaves[i] if create_graph else leaves[i].detach().requires_grad_()
                loss = as_scalar(inner_loss(unflatten(at), hparams, *rest), "the inner loss")
                grads = _autodiff.grad_or_none([loss], [at[i] for i in moved], create_graph=create_graph)
                if all(g is None for g in grads):
                    raise ValueError(_autodiff.UNREACHED)
                slopes = unflatten(filled([None] * len(leaves), moved, grads))
                return self.update(unflatten(leaves), carry[1], slopes, hparams if self.needs_hparams else None)

        return step


def _dense(tensors: list[Any], paths: Paths, name: str) -> list[Any]:
    """tensors, with sparse ones made dense. Raises TypeError for an entry that is neither a tensor nor None."""
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
    # If a step computed params, its buffers depend on what grads depend on, so after the first step they have a graph.
    tensors = [b for name in buffers for b in buffers[name]]
    if not tensors or not torch.is_grad_enabled() or any(b.requires_grad for b in tensors):
        return
    live = any(w.grad_fn is not None for w in params) and any(g is not None and g.grad_fn is not None for g in grads)
    if not live:
        return
    try:
        later = int(step) > 0
    except RuntimeError:  # a batch of counters under vmap
        later = False
    if later:
        warn(
            "params and grads carry a graph but the optimiser's state carries none: derivatives through its "
            "buffers are lost. Carry (params, state) together; to truncate on purpose, detach both"
        )
