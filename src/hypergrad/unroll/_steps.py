"""The steps of an inner optimiser as `unroll` evaluates them: counted, checked, replayed and differentiated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .. import _autodiff, _graph
from .._autodiff import as_scalar
from .._solution import warn, warn_if_not_finite
from .._tree import PyTree, describe, flatten, split
from ..implicit import check_hparams

Rebuild: TypeAlias = Callable[[Iterable[Tensor]], PyTree]

VERSION, KIND, LIVE = attrgetter("_version"), attrgetter("shape", "dtype", "device"), attrgetter("requires_grad")
NOTHING = nullcontext(())
NODE = 512  # bytes of one node of a graph, beside the tensors it keeps
IN_PLACE = (
    "step changed its params (or hparams) in place, and with them the iterates that the reverse pass starts from: "
    "write w = w - lr * g, not w -= lr * g or w.sub_(lr * g), and build a new container"
)

NO_SECOND = (
    "step takes a gradient with respect to its params that has no graph, so the second derivatives are lost: write "
    "create_graph=True there. If a first-order hypergradient is meant, pass allow_detached=True"
)


def random_state(devices: Sequence[torch.device]) -> dict[torch.device, Tensor]:
    states = {torch.device("cpu"): torch.get_rng_state()}
    return states | {device: torch.cuda.get_rng_state(device) for device in devices}


def set_random_state(states: dict[torch.device, Tensor]) -> None:
    for device, state in states.items():
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, device)


def same(x: Tensor, y: Tensor) -> bool:
    """Equal bit for bit, NaN included."""
    return torch.equal(x, y) or bool(((x == y) | ((x != x) & (y != y))).all())


def check_whole(**numbers: tuple[Any, int]) -> None:
    """ValueError for a number, if given, that is not whole or below its least value."""
    for name, (value, least) in numbers.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ValueError(f"{name} must be a whole number ≥ {least}, got {value!r}")


def batch_at(batches: Any, steps: int) -> Callable[[int], Any] | None:
    """Batches, given by index or by call, as a function of t."""
    if batches is None or callable(batches):
        return batches
    if not hasattr(batches, "__getitem__") or not hasattr(batches, "__len__"):
        raise TypeError(
            f"batches must be a sequence or a function of t (in reverse mode a batch is drawn again at a replay), got "
            f"{type(batches).__name__}: pass list(...), or in forward mode lambda t: next(iterator)"
        )
    if len(batches) < steps:
        raise ValueError(f"{steps} steps need as many batches, got {len(batches)}; batches may be a function of t")
    return batches.__getitem__


@dataclass(frozen=True)
class State:
    """An iterate, with all that the steps from here on depend on."""

    tensors: list[Tensor]
    rebuild: Rebuild
    random: dict[torch.device, Tensor]
    versions: list[int]


class Recorded(NamedTuple):
    """The graph of some steps: its leaves and its outputs."""

    leaves: list[Tensor]
    outputs: list[Tensor]
    rebuild: Rebuild


class Run:
    """The steps of one call: evaluates, counts and checks them."""

    def __init__(
        self,
        step: Callable[..., PyTree],
        start: PyTree,
        hparams: PyTree,
        batches: Callable[[int], Any] | None,
        with_time: bool,
        allow_detached: bool,
    ):
        self.step, self.batches, self.with_time, self.allow_detached = step, batches, with_time, allow_detached
        self.start, self.rebuild = split(start)
        if any(x.is_complex() for x in self.start):
            raise TypeError("start holds a complex tensor: pass torch.view_as_real of it")
        if not any(x.is_floating_point() for x in self.start):
            raise ValueError("start holds no floating point tensor")
        self.outer, self.names, self.hparams_tree = flatten(hparams, "hparams")
        self.differentiated = check_hparams(self.outer, self.names)
        self.kinds = list(map(KIND, self.start))
        self.hparams = self.hparams_tree(self.outer)
        self.devices = sorted({x.device for x in (*self.start, *self.outer) if x.device.type == "cuda"}, key=str)
        self.params: PyTree = None
        self.outer_value = torch.tensor(torch.nan)
        self.random_after: dict[torch.device, Tensor] = {}
        self.evaluations = 0
        self._random: dict[torch.device, Tensor] = {}
        # What `measure` evaluated ahead: states by t, and the graph of the steps from t₀ on, as (t₀, how many, graph).
        self._known: dict[int, State] = {}
        self._recorded: tuple[int, int, Recorded] | None = None

    def keep(self, tensors: list[Tensor], rebuild: Rebuild) -> State:
        """A state to go on from; the random state is shared with the last one where nothing was drawn."""
        new = random_state(self.devices)
        if not self._random or any(not torch.equal(new[d], self._random[d]) for d in new):
            self._random = new
        return State(tensors, rebuild, self._random, list(map(VERSION, tensors)))

    def restore(self, state: State) -> list[Tensor]:
        """The leaves of a new graph at this state."""
        if list(map(VERSION, state.tensors)) != state.versions:
            raise RuntimeError(IN_PLACE)
        set_random_state(state.random)
        return [leaf(x) for x in state.tensors]

    def evaluate(self, tensors: list[Tensor], rebuild: Rebuild, t: int) -> tuple[list[Tensor], Rebuild]:
        """Φ_t, checked: tensors like the start, with a graph, and nothing changed in place."""
        time = (t,) if self.with_time else ()
        batch = (self.batches(t),) if self.batches else ()
        guarded = [*tensors, *self.outer]
        versions = list(map(VERSION, guarded))
        self.evaluations += 1
        watched = self.evaluations == 1 and not self.allow_detached
        try:
            with _autodiff.gradients_taken(tensors) if watched else NOTHING as with_graph:
                value = self.step(rebuild(tensors), self.hparams, *time, *batch)
        except RuntimeError as error:
            if "in-place operation" in str(error) or "inplace operation" in str(error):
                raise RuntimeError(IN_PLACE) from error
            raise
        if list(map(VERSION, guarded)) != versions:
            raise RuntimeError(IN_PLACE)
        if not all(with_graph):
            warn(NO_SECOND)
        outputs, new_rebuild = split(value)
        if self.evaluations == 1:
            self.check_reached(tensors, outputs)
        elif self.evaluations == 2 and not self.allow_detached:
            self.warn_if_cut(tensors, outputs)
        if list(map(KIND, outputs)) != self.kinds or not all(map(LIVE, outputs)):
            self.check_outputs(outputs)
        return outputs, new_rebuild

    def warn_if_cut(self, tensors: list[Tensor], outputs: list[Tensor]) -> None:
        """Warn where a part of the state that step was given reaches nothing; not at step 0, often a case apart."""
        lost = _graph.unreached(outputs, tensors)
        if lost:
            parts = ", ".join(f"tensor {i} {describe(*KIND(tensors[i]))}" for i in lost)
            warn(
                f"nothing in step's result depends on {parts} of the params that it was called with, so no gradient "
                f"passes there: was it detached (a momentum, say), or read as a number? If it is meant so, pass "
                f"allow_detached=True"
            )

    def check_outputs(self, outputs: list[Tensor]) -> None:
        """Raise where step's result is not like the start, or has no graph."""
        if len(outputs) != len(self.start):
            raise ValueError(f"step must give the tensors that it gets: {len(self.start)}, got {len(outputs)}")
        for i, (x, due) in enumerate(zip(outputs, self.kinds, strict=True)):
            if KIND(x) != due:
                expected, got = describe(*due), describe(*KIND(x))
                raise ValueError(
                    f"tensor {i} of step's result must be like the start's: expected {expected}, got {got}"
                )
            if x.is_floating_point() and not x.requires_grad and not self.allow_detached:
                raise ValueError(
                    f"tensor {i} of step's result (shape {tuple(x.shape)}) has no graph to params or hparams, so no "
                    f"gradient would pass: was it computed under no_grad, or with detach(), .data or .item()? "
                    f"If it is meant to be constant, pass allow_detached=True"
                )

    def check_reached(self, tensors: list[Tensor], outputs: list[Tensor]) -> None:
        """Raise where step uses the live start that it closes over instead of what it is given."""
        live = [x for x in self.start if x.requires_grad and not any(x is y for y in self.outer)]
        floats = [x for x in tensors if x.requires_grad]
        if live and not _graph.depends(outputs, floats) and _graph.depends(outputs, live):
            raise ValueError(
                "step does not use the params that it is called with, but the live start: use its argument"
            )

    def advance(self, state: State, begin: int, end: int) -> State:
        """The state after steps begin … end − 1, keeping no graph; from the last known state on the way, if any."""
        self._recorded = None
        at = max((t for t in self._known if begin < t <= end), default=begin)
        begin, state = at, self._known.get(at, state)
        if begin == end:
            return state
        tensors, rebuild = self.restore(state), state.rebuild
        for t in range(begin, end):
            outputs, rebuild = self.evaluate(tensors, rebuild, t)
            tensors = [leaf(x) for x in outputs]
            del outputs
        return self.keep([x.detach() for x in tensors], rebuild)

    def record(self, state: State, begin: int, end: int) -> Recorded:
        """The graph of steps begin … end − 1; goes on from what `measure` recorded, if that is where this begins."""
        (origin, steps, graph), self._recorded = self._recorded or (-1, 0, None), None
        self._known.clear()
        if graph is None or origin != begin or steps > end - begin:
            leaves, steps = self.restore(state), 0
            graph = Recorded(leaves, leaves, state.rebuild)
        leaves, outputs, rebuild = graph
        for t in range(begin + steps, end):
            inputs = [x if x.requires_grad else leaf(x) for x in outputs]
            outputs, rebuild = self.evaluate(inputs, rebuild, t)
        return Recorded(leaves, outputs, rebuild)

    def measure(self, state: State, begin: int) -> tuple[int, int, Recorded]:
        """Bytes of an iterate and of the graph of the second step from here, and the graph of both.

        `advance` and `record` do not evaluate the two again.
        """
        leaves, middle, rebuild = self.record(state, begin, begin + 1)
        one = self.keep([x.detach() for x in middle], rebuild)
        seen: set[Any] = set()
        before = _graph.saved_bytes(middle, seen)
        inputs = [x if x.requires_grad else leaf(x) for x in middle]
        outputs, rebuild = self.evaluate(inputs, rebuild, begin + 1)
        nodes = len(seen)
        sizes = _graph.saved_bytes(outputs, seen)
        own = sum(size for place, size in sizes.items() if place not in before)
        two = self.keep([x.detach() for x in outputs], rebuild)
        both = Recorded(leaves, outputs, rebuild)
        self._known, self._recorded = {begin + 1: one, begin + 2: two}, (begin, 2, both)
        drawn = 0 if two.random is one.random else sum(x.nbytes for x in two.random.values())
        return max(sum(x.nbytes for x in two.tensors) + drawn, 1), own + NODE * max(len(seen) - nodes, 1), both

    def close(
        self, final: list[Tensor], rebuild: Rebuild, outer_loss: Callable[..., Tensor]
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """∇₁E and ∇₂E at the final iterate; keeps E, and the random state that the user goes on with."""
        self.params = rebuild(final)
        leaves = [leaf(x) for x in final]
        loss = as_scalar(outer_loss(rebuild(leaves), self.hparams), "outer_loss")
        self.outer_value = loss.detach().clone()
        inputs = [x for x in leaves if x.requires_grad]
        both = self._vjp([loss], inputs, [torch.ones_like(loss)])
        alpha = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, both, strict=False)]
        self.random_after = random_state(self.devices)
        return alpha, both[len(inputs) :]

    def pull(
        self, graph: Recorded, alpha: list[Tensor], grads: list[Tensor | None], retain: bool = False
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """α ← ∂₁Φᵀ α and ∇ ← ∇ + ∂₂Φᵀ α over one block."""
        inputs = [x for x in graph.leaves if x.requires_grad]
        both = self._vjp([y for y in graph.outputs if y.is_floating_point()], inputs, alpha, retain)
        alpha = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, both, strict=False)]
        return alpha, add(grads, both[len(inputs) :])

    def _vjp(
        self, outputs: list[Tensor], inputs: list[Tensor], cotangents: list[Tensor], retain: bool = False
    ) -> list[Tensor | None]:
        # Between hparams that one network computes torch would free the network's graph as well.
        retain = retain or not all(x.is_leaf for x in self.differentiated)
        return _autodiff.grad_or_none(outputs, [*inputs, *self.differentiated], cotangents, retain_graph=retain)

    def start_gradients(self, alpha: list[Tensor]) -> list[Tensor]:
        each = iter(alpha)
        return [next(each).clone() if x.is_floating_point() else torch.zeros_like(x) for x in self.start]

    def through_start(self, start_grads: list[Tensor], grads: list[Tensor | None]) -> list[Tensor | None]:
        """∇ ← ∇ + (∂w₀/∂λ)ᵀ α, where the start was computed from hparams."""
        if not _graph.depends(self.start, self.differentiated):
            return grads
        more = _autodiff.grad_or_none(self.start, self.differentiated, start_grads, retain_graph=True)
        return add(grads, more)

    def hypergradient(self, grads: list[Tensor | None], complain: bool) -> PyTree:
        """∇ in the structure of hparams, in memory of its own; unreached leaves are zero, and said so."""
        if all(g is None for g in grads):
            raise ValueError(
                "neither step nor outer_loss depends on hparams: are they used from the argument, and as tensors (not "
                "through .item(), float() or .data)?"
            )
        named = [name for x, name in zip(self.outer, self.names, strict=True) if x.requires_grad]
        lost = [name for name, g in zip(named, grads, strict=True) if g is None]
        if lost and complain:
            warn(
                f"neither step nor outer_loss depends on {', '.join(lost)}, so the gradient there is zero: was it read "
                f"as a number (.item(), float(), .data)?"
            )
        warn_if_not_finite(g for g in grads if g is not None)
        return self.in_hparams(grads)

    def in_hparams(self, values: Sequence[Tensor | None]) -> PyTree:
        """A value for each leaf of hparams that requires grad, in the structure of hparams; zeros for the others."""
        each = iter(values)
        full = [next(each) if x.requires_grad else None for x in self.outer]
        zipped = zip(full, self.outer, strict=True)
        return self.hparams_tree([torch.zeros_like(x) if g is None else g.clone() for g, x in zipped])


def leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_() if x.is_floating_point() else x


def add(xs: Sequence[Tensor | None], ys: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [y if x is None else x if y is None else x + y for x, y in zip(xs, ys, strict=True)]
