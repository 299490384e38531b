"""The steps of an inner optimiser as `unroll` evaluates them: counted, checked, replayed and differentiated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple, TypeAlias

import optree
import torch
from torch import Tensor

from .. import _autodiff, _graph, _random
from .._autodiff import as_losses, as_scalar, check_hparams
from .._detached import LostDerivative, warn_of_lost
from .._modules import Buffers, statistics_of
from .._options import Batches, batch_at, check_whole
from .._reach import found_of, noticing
from .._solution import warn, warn_if_not_finite
from .._torch import correct_derivatives, hooks_suspended, outside_inference_mode, with_hooks
from .._tree import KIND, Paths, PyTree, describe, difference, filled, flatten, refuse_objects, split
from ..implicit import LIVE_TOO, warn_of_local

Rebuild: TypeAlias = Callable[[Iterable[Tensor]], PyTree]

LIVE, VERSION = attrgetter("requires_grad"), attrgetter("_version")  # inference tensors have no _version
NODE = 512  # bytes of one node of a graph, beside the tensors it keeps
IN_PLACE = (
    "step changed its params (or hparams) in place, and with them the iterates that the reverse pass starts from: "
    "write w = w - lr * g, not w -= lr * g or w.sub_(lr * g), and build a new container"
)
CHANGED_LATER = (
    "a tensor that the derivative of a step needs was changed in place, by the step itself or a later one (the error "
    "above names it). A buffer that a later step writes is replayed with memory='iterates'; a tensor outside must "
    "enter through params, and step return a new one"
)
NO_SECOND = (
    "step takes a gradient with respect to its params that has no graph, so the second derivatives are lost: write "
    "create_graph=True there. If a first-order hypergradient is meant, pass allow_detached=True"
)
EXHAUSTED = (
    "an iterator that {} reads has ended at step {} (counted from 0). It must give a batch to every step, and "
    'unroll.reverse evaluates steps twice unless memory="graph": pass batches= as a list or a function of t'
)
STATISTICS = (
    "outer_loss uses a model in eval mode, whose running statistics (of BatchNorm) step has written: these depend on "
    "params, but count as constants. Use a layer without them (GroupNorm, track_running_stats=False), or train mode in "
    "outer_loss; if the derivative is left out on purpose, warnings.simplefilter('ignore', hg.LostDerivative) says so"
)
UNUSED_PARAMS = (
    "outer_loss does not depend on the params that it is called with{}: compute it from its argument (a module by "
    "torch.func.functional_call(model, params, inputs)), with gradients enabled and without .item() or .detach()"
)


def is_continuous(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_() if is_continuous(x) else x


def add(xs: Sequence[Tensor | None], ys: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [y if x is None else x if y is None else x + y for x, y in zip(xs, ys, strict=True)]


class Iterate(NamedTuple):
    """The tensors of w_t, and everything else that the following steps depend on."""

    tensors: list[Tensor]
    rebuild: Rebuild
    random: dict[torch.device, Tensor]
    versions: list[int]
    buffers: list[Tensor] | None = None  # of modules


class Recorded(NamedTuple):
    """The graph of some steps: its leaves and its outputs."""

    leaves: list[Tensor]
    outputs: list[Tensor]
    rebuild: Rebuild


class Run:
    """The steps of one call: evaluates, counts and checks them, and differentiates them in reverse mode."""

    def __init__(
        self,
        step: Callable[..., PyTree],
        outer_loss: Callable[[PyTree, PyTree], Tensor],
        start: PyTree,
        hparams: PyTree,
        batches: Batches,
        steps: int,
        with_time: bool,
        allow_detached: bool,
    ):
        check_whole(steps=(steps, 0))
        self.step, self.outer_loss, self.allow_detached = step, outer_loss, allow_detached
        self.batches, self.indexed = batch_at(batches, steps), not callable(batches)
        self.with_time = with_time or batches is not None
        start = list(start) if isinstance(start, Iterator) else start
        self.leaves, spec = optree.tree_flatten(start)
        self.paths = Paths("start", spec)
        self.start, self.rebuild = split(start)
        refuse_objects(self.leaves)
        if not any(map(is_continuous, self.start)):
            raise ValueError("start holds no floating point tensor")
        self.kinds = list(map(KIND, self.start))
        self.outer, self.names, self.hparams_tree = flatten(hparams, "hparams", complex=True)
        self.hparams = self.hparams_tree(self.outer)
        self.places, self.differentiated = check_hparams(self.outer, self.names)
        for x, name in zip(self.outer, self.names, strict=True):
            if x.is_inference():
                raise ValueError(f"{name} was made under torch.inference_mode(): make it outside, or pass a clone()")
        # Tensors of the start that step may use by mistake instead of its argument. Those in hparams are no mistake.
        self.live = [x for x in self.start if x.requires_grad and not _among(x, self.outer)]
        self.hooked: list[Tensor] = []
        self.devices = _random.devices_of([*self.start, *self.outer])
        self.params: PyTree = None
        self.outer_value: Any = None
        self.random_after: dict[torch.device, Tensor] = {}
        self.buffers = Buffers((step, outer_loss))
        self._first_buffers = self._buffers_after = self.buffers.values
        self.evaluations = 0
        self.several, self.lead = False, ()  # whether outer_loss returns [k] losses; then (k,), once it was called
        self._random: dict[torch.device, Tensor] = {}
        self._detaches = False  # whether the first step detaches values, and no other warning says so
        self.found = found_of(step)
        self.form = (self.paths.spec, *map(KIND, (*self.start, *self.outer)))
        # What `measure` evaluated in advance: iterates by t, and the graph of the first steps, as (t₀, steps, graph).
        self._known: dict[int, Iterate] = {}
        self._recorded: tuple[int, int, Recorded] | None = None

    @contextmanager
    def differentiating(self) -> Iterator[None]:
        """Enable gradients and suspend the hooks of start and hparams; `hypergradient` calls those of hparams once."""
        hooks = hooks_suspended([*self.start, *self.outer])
        with outside_inference_mode(), torch.enable_grad(), correct_derivatives(), hooks as self.hooked:
            for i, x in enumerate(self.leaves if self.hooked else ()):
                if _among(x, self.hooked) and not _among(x, self.outer):
                    warn(
                        f"the gradient hook of {self.paths[i]} is not called: steps start from a copy. Move it to step"
                    )
            yield

    def keep(self, tensors: list[Tensor], rebuild: Rebuild) -> Iterate:
        """An iterate to continue from. It shares the random state of the last one if nothing was drawn in between."""
        new = _random.capture(self.devices)
        if not self._random or not _random.equal(new, self._random):
            self._random = new
        return Iterate(tensors, rebuild, self._random, list(map(VERSION, tensors)), self.buffers.copies())

    def resume(self, iterate: Iterate) -> list[Tensor]:
        """The leaves of a new graph at this iterate."""
        if list(map(VERSION, iterate.tensors)) != iterate.versions:
            raise RuntimeError(IN_PLACE)
        _random.restore(iterate.random)
        if iterate.buffers is not None:
            self.buffers.restore(iterate.buffers)
        return [leaf(x) for x in iterate.tensors]

    def evaluate(self, tensors: list[Tensor], rebuild: Rebuild, t: int) -> tuple[list[Tensor], Rebuild]:
        """Φ_t(w, λ), checked: tensors like the start's, with a graph, and nothing changed in place."""
        arguments = (t,) if self.with_time else ()
        guarded = [*tensors, *self.outer]
        versions = list(map(VERSION, guarded))
        self.evaluations += 1
        watched = self.evaluations == 1 and not self.allow_detached
        try:
            if self.batches:
                arguments = (t, self.batches(t))
            self._arguments = arguments
            graphs = _autodiff.gradients_taken(tensors) if watched else nullcontext(())
            with graphs as with_graph, noticing(self.step if watched else None) as noticed:
                value = self.step(rebuild(tensors), self.hparams, *arguments)
        except StopIteration:
            raise ValueError(EXHAUSTED.format("step (or batches)", t)) from None
        except RuntimeError as error:
            if "in-place operation" not in str(error) and "inplace operation" not in str(error):
                raise
            if list(map(VERSION, guarded)) == versions and not self._writes(tensors, rebuild, arguments):
                raise
            raise RuntimeError(IN_PLACE) from error
        if list(map(VERSION, guarded)) != versions:
            raise RuntimeError(IN_PLACE)
        if not all(with_graph):
            warn(NO_SECOND)
        self._detaches |= noticed.found and all(with_graph)
        outputs, new_rebuild = self.arranged(value)
        if self.evaluations == 1:
            self._check_argument_used(tensors, outputs)
            warn_of_local(outputs, "step")
        elif self.evaluations == 2 and not self.allow_detached:
            self._warn_if_cut(tensors, outputs)
        if list(map(KIND, outputs)) != self.kinds or not all(map(LIVE, outputs)):
            self._check_outputs(outputs)
        return outputs, new_rebuild

    def _writes(self, tensors: list[Tensor], rebuild: Rebuild, arguments: tuple[Any, ...]) -> bool:
        """Whether step writes into its arguments (and not into a module), found by a call with copies."""
        copies = [x.clone() for x in (*tensors, *self.outer)]
        versions = list(map(VERSION, copies))
        with suppress(Exception):
            self.step(rebuild(copies[: len(tensors)]), self.hparams_tree(copies[len(tensors) :]), *arguments)
        return list(map(VERSION, copies)) != versions

    def arranged(self, value: Any) -> tuple[list[Tensor], Rebuild]:
        """The tensors of step's result, in the start's containers (mappings matched by key), and how to rebuild it."""
        leaves, spec = optree.tree_flatten(value)
        if spec == self.paths.spec and len(leaves) == len(self.start) and all(isinstance(x, Tensor) for x in leaves):
            return leaves, spec.unflatten
        if isinstance(value, Iterator):
            return self.arranged(list(value))
        if spec != self.paths.spec:
            order = self.paths.order(Paths("step's result", spec))
            value = self.paths.spec.unflatten(leaves if order is None else [leaves[i] for i in order])
        tensors, rebuild = split(value)
        if len(leaves) > len(tensors):
            refuse_objects(leaves)
        if len(tensors) != len(self.start):
            raise ValueError(
                f"step must return {len(self.start)} tensors, got {len(tensors)} in a {type(value).__name__}"
            )
        return tensors, rebuild

    def _warn_if_cut(self, tensors: list[Tensor], outputs: list[Tensor]) -> None:
        """Warn if step's result does not depend on a tensor of params. Called at step 1: step 0 is often special."""
        lost = [i for i in _graph.unreached(outputs, tensors) if tensors[i].numel()]
        if lost:
            self._detaches = False
            parts = ", ".join(f"tensor {i} {describe(*KIND(tensors[i]))}" for i in lost)
            warn(
                f"nothing in step's result depends on {parts} of the params that it was called with, so no gradient "
                f"passes there: was it detached (as a momentum may be), or read as a number? If that is intended, pass "
                f"allow_detached=True"
            )

    def _check_outputs(self, outputs: list[Tensor]) -> None:
        """Raise if step's result is not like the start, or has no graph."""
        for i, (x, due) in enumerate(zip(outputs, self.kinds, strict=True)):
            if KIND(x) != due:
                expected, got = describe(*due), describe(*KIND(x))
                raise ValueError(
                    f"tensor {i} of step's result must be like the start's: expected {expected}, got {got}"
                )
            if is_continuous(x) and not x.requires_grad and not self.allow_detached:
                raise ValueError(
                    f"tensor {i} of step's result (shape {tuple(x.shape)}) has no graph to params or hparams, so no "
                    f"gradient would pass: was it computed under no_grad, or with detach(), .data or .item()? "
                    f"If it is meant to be constant, pass allow_detached=True"
                )

    def _check_argument_used(self, tensors: list[Tensor], outputs: list[Tensor]) -> None:
        """Raise if step uses the live start that it closes over instead of its argument; warn if it uses both."""
        if not self.live or not _graph.depends(outputs, self.live):
            return
        if not _graph.depends(outputs, [x for x in tensors if x.requires_grad]):
            raise ValueError("step uses the live start instead of the params that it is called with: use its argument")
        if not self.allow_detached:
            warn(LIVE_TOO.format("step", "start"))

    def advance(self, iterate: Iterate, begin: int, end: int) -> Iterate:
        """The iterate after steps begin … end − 1, without a graph; iterates that are already known are reused."""
        self._recorded = None
        at = max((t for t in self._known if begin < t <= end), default=begin)
        begin, iterate = at, self._known.get(at, iterate)
        if begin == end:
            return iterate
        tensors, rebuild = self.resume(iterate), iterate.rebuild
        for t in range(begin, end):
            outputs, rebuild = self.evaluate(tensors, rebuild, t)
            tensors = [leaf(x) for x in outputs]
            del outputs
        return self.keep([x.detach() for x in tensors], rebuild)

    def record(self, iterate: Iterate, begin: int, end: int) -> Recorded:
        """The graph of steps begin … end − 1; continues the graph that `measure` recorded if that starts at `begin`."""
        (origin, steps, graph), self._recorded = self._recorded or (-1, 0, None), None
        self._known.clear()
        if graph is None or origin != begin or steps > end - begin:
            leaves, steps = self.resume(iterate), 0
            graph = Recorded(leaves, leaves, iterate.rebuild)
        leaves, outputs, rebuild = graph
        for t in range(begin + steps, end):
            inputs = [x if x.requires_grad else leaf(x) for x in outputs]
            outputs, rebuild = self.evaluate(inputs, rebuild, t)
        return Recorded(leaves, outputs, rebuild)

    def sizes(self, kind: str, begin: int, measure: Callable[[], tuple[int, ...]]) -> tuple[int, ...]:
        """The bytes that `measure` returns, measured once for a step and the forms of its arguments."""
        if self.several or (self.batches and not self.indexed):  # batches as a function may be called for steps only
            return measure()
        batch = map(KIND, split(self.batches(begin))[0]) if self.batches else ()
        key = kind, getattr(self.outer_loss, "__code__", None), *self.form, *batch
        if key not in self.found:
            self.found[key] = measure()
        return self.found[key]

    def measure(self, iterate: Iterate, begin: int) -> tuple[int, int, Recorded]:
        """Bytes of an iterate and of the second step's graph from here, and the graph of both, kept for `record`."""
        leaves, middle, rebuild = self.record(iterate, begin, begin + 1)
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
        drawn += sum(y.nbytes for x, y in zip(one.buffers or (), two.buffers or (), strict=True) if x is not y)
        return max(sum(x.nbytes for x in two.tensors) + drawn, 1), own + NODE * max(len(seen) - nodes, 1), both

    def close(self, final: list[Tensor], rebuild: Rebuild) -> tuple[list[Tensor], list[Tensor | None]]:
        """∇₁E and ∇₂E at the final iterate. Stores the value of E, and the random state after it."""
        self.params, before = rebuild(final), self.buffers.copies()
        leaves = [leaf(x) for x in final]
        try:
            value = self.outer_loss(rebuild(leaves), self.hparams)
            loss = as_losses(value, "outer_losses") if self.several else as_scalar(value, "outer_loss")
        except StopIteration:
            raise ValueError(EXHAUSTED.format("outer_loss", "T")) from None
        warn_of_local([loss], "outer_loss")
        self.outer_value = loss.detach().clone()
        inputs = [x for x in leaves if x.requires_grad]
        self.lead = tuple(loss.shape) if self.several else ()
        unit = torch.ones_like(loss)
        both = self._vjp([loss], inputs, [torch.diag(unit) if self.several else unit], of_steps=False)
        if not self.allow_detached:
            self._check_outer(loss, any(g is not None for g in both[: len(inputs)]))
            self._warn_of_statistics(before)
        alpha = _autodiff.new_zeros(both[: len(inputs)], inputs, *self.lead)
        self.random_after = _random.capture(self.devices)
        self._buffers_after = self.buffers.copies()
        self._final = (final, rebuild, alpha) if self._detaches else None
        return alpha, both[len(inputs) :]

    def _warn_of_statistics(self, before: list[Tensor]) -> None:
        """Warn if outer_loss may read running statistics that the steps wrote. before: buffers before outer_loss."""
        each = zip(self.buffers.tensors, self._first_buffers, before, self.buffers.copies(), strict=True)
        written = {id(x) for x, first, last, after in each if first is not last and last is after}
        if written and any(id(x) in written for x in statistics_of(self.outer_loss)):
            warn(STATISTICS, LostDerivative)

    def end_replays(self) -> None:
        """Restore the random state and the buffers of modules to those after one run of the steps and outer_loss."""
        _random.restore(self.random_after)
        self.buffers.restore(self._buffers_after)

    def _warn_of_lost(self, final: list[Tensor], rebuild: Rebuild, alpha: list[Tensor]) -> None:
        """Warn (LostDerivative) if step detaches what its derivative needs."""
        leaves = [leaf(x) for x in final]

        def evaluate() -> Sequence[Tensor]:  # w − Φ: relative to Φ a small step would seem negligible
            outputs = self.arranged(self.step(rebuild(leaves), self.hparams, *self._arguments))[0]
            return difference(inputs, list(filter(is_continuous, outputs)))

        inputs, v = [x for x in leaves if x.requires_grad], [x[0] if self.several else x for x in alpha]
        # The derivative in params is not used where there is a single step from a constant start.
        alone = self.evaluations == 1 and not _graph.depends(self.start, self.differentiated)
        warn_of_lost("step", self.step, evaluate, [] if alone else inputs, self.differentiated, v)

    def _check_outer(self, loss: Tensor, used: bool) -> None:
        """Raise if outer_loss does not use its params; warn if it also uses the live start, or uses hparams only."""
        if used and self.live and _graph.depends([loss], self.live):
            warn(LIVE_TOO.format("outer_loss", "start"))
        if used:
            return
        if not loss.requires_grad:
            raise ValueError(UNUSED_PARAMS.format(", nor on hparams"))
        if others := _graph.undeclared_leaves([loss], self.differentiated):
            shapes = ", ".join(str(tuple(x.shape)) for x in others[:5])
            raise ValueError(UNUSED_PARAMS.format(f", but on tensors of shape {shapes} that it was not given"))
        warn(f"{UNUSED_PARAMS.format(', but on hparams')}. The steps do not count in this hypergradient")

    def pull(
        self, graph: Recorded, alpha: list[Tensor], grads: list[Tensor | None], retain: bool = False
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """α ← ∂₁Φᵀ α and ∇ ← ∇ + ∂₂Φᵀ α over one block."""
        inputs = [x for x in graph.leaves if x.requires_grad]
        both = self._vjp(list(filter(is_continuous, graph.outputs)), inputs, alpha, retain)
        alpha = _autodiff.new_zeros(both[: len(inputs)], inputs, *self.lead)
        return alpha, add(grads, both[len(inputs) :])

    def _vjp(
        self, outputs: list[Tensor], inputs: list[Tensor], cotangents: list[Tensor], retain=False, of_steps=True
    ) -> list[Tensor | None]:
        if self.several:
            return _autodiff.stacked(outputs, [*inputs, *self.differentiated], cotangents)
        # If one network computes several of hparams, torch would free the network's graph as well.
        retain = retain or not all(x.is_leaf for x in self.differentiated)
        try:
            return _autodiff.grad_or_none(outputs, [*inputs, *self.differentiated], cotangents, retain_graph=retain)
        except RuntimeError as error:
            if not of_steps or "modified by an inplace operation" not in str(error):
                raise
            raise RuntimeError(CHANGED_LATER) from error

    def start_gradients(self, alpha: list[Tensor]) -> list[Tensor]:
        each = iter(alpha)
        return [next(each).clone() if is_continuous(x) else x.new_zeros((*self.lead, *x.shape)) for x in self.start]

    def through_start(self, start_grads: list[Tensor], grads: list[Tensor | None]) -> list[Tensor | None]:
        """∇ ← ∇ + (∂w₀/∂λ)ᵀ α, if the start was computed from hparams."""
        if not _graph.depends(self.start, self.differentiated):
            return grads
        pull = _autodiff.stacked if self.several else partial(_autodiff.grad_or_none, retain_graph=True)
        return add(grads, pull(self.start, self.differentiated, start_grads))

    def hypergradient(self, grads: list[Tensor | None], complain: bool) -> PyTree:
        """∇ in the structure of hparams, in new memory, after the hooks of hparams; zero for leaves not used."""
        if all(g is None for g in grads):
            raise ValueError(
                "neither step nor outer_loss depends on hparams: are they used from the argument, and as tensors (not "
                "through .item(), float() or .data)?"
            )
        lost = [self.names[i] for i, g in zip(self.places, grads, strict=True) if g is None]
        if lost and complain:
            warn(
                f"neither step nor outer_loss depends on {', '.join(lost)}, so the gradient there is zero: was it read "
                f"as a number (.item(), float(), .data)?"
            )
        if self._final and not lost:
            self._warn_of_lost(*self._final)
        grads = with_hooks(self.differentiated, grads, self.hooked)
        warn_if_not_finite(g for g in grads if g is not None)
        every = filled([None] * len(self.outer), self.places, _autodiff.copies(grads))
        return self.hparams_tree(_autodiff.new_zeros(every, self.outer, *self.lead))


def _among(x: Any, tensors: Sequence[Tensor]) -> bool:
    return any(x is y for y in tensors)
