"""compile=: the directions of one pair of batches, with evaluations and all reverse passes, as one compiled function.

Its inputs are the two batches; it reads live parameters, hparams and the tracker's variables in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import optree
import torch
from torch import Tensor

from .. import _random
from .._autodiff import users_autocast
from .._recorded import NotCompiled
from .._solution import warn
from .._traced import ROUNDING, Traced, autocast_state, gap, size
from ._oracles import Batch, kept_statistics, put_back

if TYPE_CHECKING:
    from ._tracker import Directions, Tracker

MAX_FORMS = 8  # forms of pairs of batches (shapes, dtypes, plain values); each is compiled once
CHANGED = (
    "something that the losses read (a number, a module's parameter that was replaced) has changed since it was "
    "compiled, in the last {} batches, whose directions may have used its old value. It is now compiled again. Put "
    "what changes into the batches, as tensors"
)


class CompiledDirections:
    """The directions of a tracker for two losses, compiled once for each form of the batches.

    At the 1st, 2nd, 4th, 8th, … call they are compared with the uncompiled directions.

    Args:
        losses: the outer and the inner loss, functions of a batch.
    """

    def __init__(self, tracker: Tracker, losses: Sequence[Callable[[Any], Tensor]], backend: str):
        self.tracker, self.losses, self.backend = tracker, losses, backend
        self.programs: dict[Any, Program | None] = {}  # by form; None for a form that cannot be compiled
        self.calls = 0

    def __call__(self, outer: Batch, inner: Batch, batches: Sequence[Any]) -> Directions:
        self.calls += 1
        pair: Any = tuple(batches)
        leaves, spec = optree.tree_flatten(pair, none_is_leaf=True)
        key = self._key(leaves, spec)
        program = self.programs.get(key)
        tensors = [x.detach().contiguous() for x in leaves if isinstance(x, Tensor)]
        if program is not None and self.calls & (self.calls - 1):
            try:
                return program(tensors, outer, inner)
            except NotCompiled:  # a tensor that the losses read has another form now
                program = None
                del self.programs[key]
        devices = _random.devices_of(self.tracker.oracles.params)
        state = _random.capture(devices)
        before = dict(self.tracker.oracles.counts)
        found = _directions(self.tracker, outer, inner)
        judged = all(bool(x.isfinite().all()) for x in _parts(found, outer, inner))
        if not judged or (key in self.programs and program is None):
            return found
        recorded, after = kept_statistics(self.losses), _random.capture(devices)
        counts = self.tracker.oracles.counts
        delta = {name: counts[name] - before[name] for name in counts}
        kept = list(self.tracker.oracles.recorded)
        try:
            self.programs[key] = self._checked(program, tensors, leaves, spec, state, (found, outer, inner), delta)
        except NotCompiled as error:
            self.programs[key] = None
            warn(
                f"{type(self.tracker).__name__} could not be compiled and continues without compilation: {error}",
                NotCompiled,
            )
        finally:
            put_back(recorded)
            self.tracker.oracles.recorded[:] = kept
            counts.update({name: before[name] + delta[name] for name in counts})
            _random.restore(after)
        return found

    def _key(self, leaves: list[Any], spec: Any) -> Any:
        forms = [(x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x for x in leaves]
        if not all(isinstance(x, (Tensor, int, float, str, type(None))) for x in leaves):
            raise TypeError("with compile, batches must hold only tensors and plain values")
        with users_autocast():
            return spec, *forms, autocast_state()

    def _checked(
        self,
        program: Program | None,
        tensors: list[Tensor],
        leaves: list[Any],
        spec: Any,
        state: Any,
        true: tuple[Directions, Batch, Batch],
        delta: dict[str, int],
    ) -> Program:
        """The program after a comparison with the true directions; a new one if there is none or if they differ."""
        if program is not None:
            if not self._error(program, tensors, state, true):
                return program
            warn(CHANGED.format(self.calls // 2))
            del self.programs[self._key(leaves, spec)]
        if len(self.programs) >= MAX_FORMS:
            raise NotCompiled(
                f"there are more than {MAX_FORMS} forms of batches: give all one shape, and pass numbers as tensors"
            )
        _random.restore(state)
        program = Program(self.tracker, self.losses, tensors, leaves, spec, self.backend, delta)
        if error := self._error(program, tensors, state, true):
            raise NotCompiled(f"compiled directions are off by {error:.1e}")
        return program

    def _error(
        self, program: Program, tensors: list[Tensor], state: Any, true: tuple[Directions, Batch, Batch]
    ) -> float:
        """The relative error of the program's directions; 0 if rounding of params explains it."""
        oracles = self.tracker.oracles
        eps = max(torch.finfo(x.dtype).eps for x in oracles.params)

        def again() -> tuple[Batch, Batch]:
            _random.restore(state)
            outer, inner = (oracles.batch(batch.loss, batch.name) for batch in true[1:])
            return outer, inner

        due, pair = _parts(*true), again()
        try:
            got = _parts(program(tensors, *pair), *pair)
        except NotCompiled:
            return torch.inf
        if any(len(x) != len(y) for x, y in zip(due, got, strict=True)):
            return torch.inf
        errors = [gap(x, y) for x, y in zip(due, got, strict=True)]
        if all(error <= eps**0.5 * size(x) for error, x in zip(errors, due, strict=True)):
            return 0.0
        pair = again()
        with oracles.at([x.detach() * (1 + eps) for x in oracles.params]):
            rounded = _parts(_directions(self.tracker, *pair), *pair)
        noise = [ROUNDING * size(x - y) + eps**0.5 * size(x) for x, y in zip(due, rounded, strict=True)]
        if all(error <= most for error, most in zip(errors, noise, strict=True)):
            return 0.0
        return max(error / (size(x) or 1.0) for error, x in zip(errors, due, strict=True))


class Program:
    """One compiled function of the tensors of both batches, and the structure of its result (`like`)."""

    def __init__(
        self,
        tracker: Tracker,
        losses: Sequence[Callable[[Any], Tensor]],
        tensors: list[Tensor],
        leaves: list[Any],
        spec: Any,
        backend: str,
        counts: dict[str, int],
    ):
        oracles, shape = tracker.oracles, {}
        self.oracles, self.counts = oracles, counts

        def function(*given: Tensor) -> list[Tensor]:
            each = iter(given)
            outer_batch, inner_batch = spec.unflatten([next(each) if isinstance(x, Tensor) else x for x in leaves])
            outer = oracles.batch(lambda: losses[0](outer_batch), "outer_loss")
            inner = oracles.batch(lambda: losses[1](inner_batch), "inner_loss")
            found = _directions(tracker, outer, inner)
            shape["like"] = found
            return [x.contiguous() for x in _flat(found, outer, inner)]

        self._traced = Traced(function, tensors, backend)
        self.like: Directions = shape["like"]

    def __call__(self, tensors: list[Tensor], outer: Batch, inner: Batch) -> Directions:
        results = iter(self._traced(tensors))
        like = self.like
        params, own = [next(results) for _ in like.params], [next(results) for _ in like.own]
        hparams = [None if g is None else next(results) for g in like.hparams]
        watched = {name: next(results) for name in like.watched}
        outer.value, inner.value = next(results), next(results)
        for name, count in self.counts.items():
            self.oracles.counts[name] += count
        return type(like)(params, own, hparams, watched)


def _directions(tracker: Tracker, outer: Batch, inner: Batch) -> Directions:
    return tracker.directions(outer, inner, *[None for _ in tracker.takes])


def _parts(found: Directions, outer: Batch, inner: Batch) -> list[Tensor]:
    """Each direction, and the values of both losses, as one vector in double precision."""
    groups = found.params, found.own, found.hparams, [outer.value, inner.value]
    dense = ([x.to_dense() if x.is_sparse else x for x in xs if x is not None] for xs in groups)
    return [torch.cat([torch.zeros(1)] + [x.reshape(-1).cpu() for x in xs]).double() for xs in dense]


def _flat(found: Directions, outer: Batch, inner: Batch) -> list[Tensor]:
    tensors: list[Any] = [*found.params, *found.own, *(g for g in found.hparams if g is not None)]
    tensors += [*found.watched.values(), outer.value, inner.value]
    if any(not isinstance(x, Tensor) or x.layout is not torch.strided for x in tensors):
        raise NotCompiled("a direction is sparse")
    return tensors
