"""compile=: the steps as two compiled functions, w ↦ Φ_t(w, λ) and (w, α, ∇) ↦ (∂₁Φ_tᵀα, ∇ + ∂₂Φ_tᵀα).

No graph is kept: the second evaluates the step again, with its derivative, as one function of tensors.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from typing import Any

import optree
import torch
from torch import Tensor

from .. import _autodiff, _random
from .._recorded import NotCompiled
from .._traced import ROUNDING, Traced, autocast_state, gap, size
from .._tree import parse_bytes
from ._steps import KIND, Iterate, Recorded, Run, is_continuous, leaf

Key = tuple[Any, ...]
FORMS = 8  # of batches, for each of which both functions are compiled
OTHER = (
    "compiled, step {} gives other numbers than step itself (off by {:.1e} of the change of params): step reads "
    "something beside tensors that is not the same at each call (an iterator, a counter, NumPy's random numbers). Pass "
    "it as batches= or t"
)
DERIVATIVE = (
    "compiled, the derivative of step {} is off by {:.1e}: does step use hparams of the surroundings in place of its "
    "argument?"
)


@dataclass
class Pair:
    """Both functions, for one form of the batch."""

    forward: Traced
    reverse: Traced
    reached: list[bool]  # for each of the differentiated leaves of λ, whether the step depends on it
    compared: bool = False  # at two steps, which finds what differs from call to call


class Compiled:
    """The steps of a run, compiled: what `Run` gives the reverse pass, without a graph.

    Each function is compared with the step itself: where it is built (the first two steps and a derivative), and at the
    first step of every call.
    """

    def __init__(self, run: Run, backend: str):
        self.run, self.backend = run, backend
        self.pairs: dict[Key, Any] = run.found.setdefault("compiled", {})
        self.seconds = 0.0  # of building
        self.used: dict[Key, Pair] = {}
        self.outer = [x.detach().contiguous() for x in run.outer]
        self.form: Key = (backend, autocast_state(), *run.form)
        if any(x.layout is not torch.strided or hasattr(x, "placements") for x in (*run.start, *run.outer)):
            raise NotCompiled("sparse and sharded tensors are not compiled")

    @property
    def report(self) -> str:
        pair = next(iter(self.used.values()), None)
        sizes = "" if pair is None else f" of {pair.forward.operations} and {pair.reverse.operations} operations"
        built = f", built in {self.seconds:.1f} s" if self.seconds else ", which were there"
        return f"two functions{sizes} compiled by {self.backend}{built}"

    def begin(self, first: Iterate, steps: int) -> Iterate:
        """The first iterate as the functions take it, after they were compared with the steps that follow it."""
        first = first._replace(tensors=[x.contiguous() for x in first.tensors])
        _, key = self._inputs(first.tensors, 0)
        if self._known(key) is not None:
            try:
                self._compare(self.pairs[key], first, 0, self._evaluated(first, 0))
                self.used[key] = self.pairs[key]
            except NotCompiled:  # the step's surroundings have changed since
                del self.pairs[key]
        try:
            if key not in self.used:
                self.used[key] = self.pairs[key] = self._built(first, 0)
            if steps > 1 and not self.used[key].compared:
                second = self.advance(first, 0, 1)
                self._compare(self._at(second.tensors, 1)[0], second, 1, self._evaluated(second, 1))
                self.used[key].compared = True
        except NotCompiled as error:
            self.pairs[key] = str(error)
            raise
        return first

    def _known(self, key: Key) -> Pair | None:
        """What is known for this form. Raises where it is known that nothing can be compiled, and why."""
        known = self.pairs.get(key)
        if isinstance(known, str):
            raise NotCompiled(known)
        return known

    def advance(self, iterate: Iterate, begin: int, end: int) -> Iterate:
        """The iterate after steps begin … end − 1."""
        if self._drawn:
            _random.restore(iterate.random)
        tensors = iterate.tensors
        for t in range(begin, end):
            pair, inputs = self._at(tensors, t)
            tensors = list(pair.forward(inputs))
        self.run.evaluations += end - begin
        return self.run.keep(tensors, self.run.rebuild) if self._drawn else iterate._replace(tensors=tensors)

    def pull_back(self, blocks: Iterable[tuple[int, int, Iterate]]) -> tuple[list[Tensor], list[Tensor | None]]:
        """α where the last of these blocks of one step begins, and ∇ through all of them."""
        alpha, grads, closed = [], [], False
        for t, end, iterate in blocks:
            if not closed:
                final = self.advance(iterate, t, end)
                (alpha, grads), closed = self.run.close(final.tensors, final.rebuild), True
                alpha = [a.contiguous() for a in alpha]
            if self._drawn:
                _random.restore(iterate.random)
            pair, inputs = self._at(iterate.tensors, t)
            alpha, grads = self._pull(pair, inputs, alpha, grads)
            self.run.evaluations += 1
        return alpha, grads

    @property
    def _drawn(self) -> bool:
        """Whether steps may draw random numbers, as far as is known."""
        return callable(self.run.batches) or any(pair.forward.draws for pair in self.used.values())

    def _pull(
        self, pair: Pair, inputs: list[Tensor], alpha: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        pairs = zip(grads, self.run.differentiated, strict=True)
        given = [torch.zeros_like(x, requires_grad=False) if g is None else g.contiguous() for g, x in pairs]
        results = list(pair.reverse([*inputs, *alpha, *given]))
        sums = iter(results[len(alpha) :])
        return results[: len(alpha)], [next(sums) if hit else g for hit, g in zip(pair.reached, grads, strict=True)]

    def _inputs(self, tensors: Sequence[Tensor], t: int) -> tuple[list[Tensor], Key]:
        """What both functions take first, and what else they depend on."""
        run = self.run
        inputs = [*tensors, *self.outer]
        if not run.with_time:
            return inputs, self.form
        inputs.append(torch.tensor(t, device="cpu"))
        if run.batches is None:
            return inputs, self.form
        leaves, spec = optree.tree_flatten(run.batches(t), none_is_leaf=True)
        inputs += [x.detach().contiguous() for x in leaves if isinstance(x, Tensor)]
        if not all(isinstance(x, (Tensor, int, float, str, type(None))) for x in leaves):
            raise NotCompiled("batches hold leaves that are neither tensors nor plain values")
        return inputs, (*self.form, spec, *(KIND(x) if isinstance(x, Tensor) else x for x in leaves))

    def _at(self, tensors: Sequence[Tensor], t: int) -> tuple[Pair, list[Tensor]]:
        """The functions for step t, and what they take; built where its batch has another form than those before."""
        before = _random.capture(self.run.devices) if callable(self.run.batches) else None
        inputs, key = self._inputs(tensors, t)
        if key not in self.used:
            if len(self.pairs) == FORMS:
                raise NotCompiled(
                    f"batches have more than {FORMS} forms: give them one shape, and numbers that change as tensors"
                )
            before = _random.capture(self.run.devices) if before is None else before
            iterate = Iterate(list(tensors), self.run.rebuild, before, [])
            self.used[key] = self.pairs[key] = self._known(key) or self._built(iterate, t)
            _random.restore(before)
            inputs, _ = self._inputs(tensors, t)
        return self.used[key], inputs

    def _built(self, iterate: Iterate, t: int) -> Pair:
        """Both functions, traced at this iterate, compiled, and compared with the step."""
        true = self._evaluated(iterate, t)  # first, so that an error of the user's is raised as it is
        begun = time.perf_counter()
        _random.restore(iterate.random)
        inputs, _ = self._inputs(iterate.tensors, t)
        batch = optree.tree_flatten(self.run.batches(t), none_is_leaf=True) if self.run.batches else None
        forward = Traced(lambda *given: [y.contiguous() for y in self._step(given, batch)[1]], inputs, self.backend)
        reached: list[bool] = []

        def reverse(*given: Tensor) -> list[Tensor]:
            leaves, outputs, moving = self._step(given[: len(inputs)], batch)
            outputs = [y for y in outputs if is_continuous(y)]
            alpha, sums = given[len(inputs) : len(inputs) + len(outputs)], given[len(inputs) + len(outputs) :]
            grads = _autodiff.grad_or_none(outputs, [*leaves, *moving], alpha)
            own = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=False)]
            cross = grads[len(leaves) :]
            reached[:] = [g is not None for g in cross]
            return [x.contiguous() for x in own] + [a + g for a, g in zip(sums, cross, strict=True) if g is not None]

        like = [*filter(is_continuous, iterate.tensors), *self.run.differentiated]
        pair = Pair(forward, Traced(reverse, [*inputs, *map(torch.zeros_like, like)], self.backend), reached)
        self._compare(pair, iterate, t, true)
        self._compare_derivative(pair, iterate, t, true)
        self.seconds += time.perf_counter() - begun
        return pair

    def _step(
        self, inputs: Sequence[Tensor], batch: tuple[list[Any], Any] | None
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The step as `Run` evaluates it, of leaves of its own: leaves of w, the results, and leaves of λ.

        batch: leaves and structure of one like it.
        """
        run = self.run
        tensors = [leaf(x) for x in inputs[: len(run.start)]]
        outer, rest = list(inputs[len(run.start) :][: len(run.outer)]), inputs[len(run.start) + len(run.outer) :]
        for i in run.places:
            outer[i] = leaf(outer[i])
        arguments: list[Any] = list(rest[:1])
        if batch is not None:
            each = iter(rest[1:])
            arguments.append(batch[1].unflatten([next(each) if isinstance(x, Tensor) else x for x in batch[0]]))
        outputs, _ = run.arranged(run.step(run.rebuild(tensors), run.hparams_tree(outer), *arguments))
        return [x for x in tensors if x.requires_grad], outputs, [outer[i] for i in run.places]

    def _evaluated(self, iterate: Iterate, t: int, off: float = 0.0) -> Recorded:
        """The step itself, with its graph; where params are off by so much, as by rounding."""
        _random.restore(iterate.random)
        leaves = [leaf(x * (1 + off) if off and is_continuous(x) else x) for x in iterate.tensors]
        return Recorded(leaves, *self.run.evaluate(leaves, iterate.rebuild, t))

    def _compare(self, pair: Pair, iterate: Iterate, t: int, true: Recorded) -> None:
        """Raise where the compiled step gives other numbers than the step."""
        _random.restore(iterate.random)
        found = pair.forward(self._inputs(iterate.tensors, t)[0])
        due, got, before = map(_flat, (true.outputs, found, true.leaves))
        error, change = gap(due, got), size(due - before)
        allowed = self._eps**0.5 * change + 8 * self._eps * size(due)
        if error > allowed:
            again, rounded = (_flat(self._evaluated(iterate, t, off).outputs) for off in (0.0, self._eps))
            if gap(due, again) > allowed or error > ROUNDING * size(due - rounded):
                raise NotCompiled(OTHER.format(t, error / change if change else error))
        _random.restore(iterate.random)

    def _compare_derivative(self, pair: Pair, iterate: Iterate, t: int, true: Recorded) -> None:
        """The same of ∂Φ_tᵀα, for α = 1."""
        alpha = [torch.ones_like(y) for y in true.outputs if is_continuous(y)]
        nothing: list[Tensor | None] = [None] * len(self.run.differentiated)
        due = self._joined(*self.run.pull(true, alpha, nothing))
        _random.restore(iterate.random)
        got = self._joined(*self._pull(pair, self._inputs(iterate.tensors, t)[0], alpha, nothing))
        error, norm = gap(due, got), size(due)
        if error > self._eps**0.5 * norm:
            rounded = self._joined(*self.run.pull(self._evaluated(iterate, t, self._eps), alpha, nothing))
            if error > ROUNDING * size(due - rounded):
                raise NotCompiled(DERIVATIVE.format(t, error / norm if norm else error))
        _random.restore(iterate.random)

    def _joined(self, alpha: list[Tensor], grads: list[Tensor | None]) -> Tensor:
        return _flat([*alpha, *_autodiff.or_zeros(grads, self.run.differentiated)])

    @property
    def _eps(self) -> float:
        return max(torch.finfo(x.dtype).eps for x in (*self.run.start, *self.run.outer) if is_continuous(x))


def iterates_kept(first: Iterate, length: int, memory: str, checkpoints: int | None) -> int:
    """How many iterates compiled steps keep: "sqrt" so many that no step is evaluated more than three times."""
    if checkpoints is not None or memory == "iterates":
        return checkpoints or length
    if memory == "sqrt":
        return ceil(sqrt(2 * length))
    budget, each = parse_bytes(memory) or 0.0, max(1, sum(x.nbytes for x in first.tensors))
    if budget < 2 * each:
        raise ValueError(f"a budget of {budget:.0f} bytes is too small: two iterates need {2 * each}")
    return min(int(budget // each) - 1, length)


def _flat(xs: Sequence[Tensor]) -> Tensor:
    """All tensors, those of whole numbers and truth values too, as one vector in double precision."""
    wide = torch.complex128 if any(x.is_complex() for x in xs) else torch.float64
    flat = [x.detach().reshape(-1) for x in xs]
    if len({(x.dtype, x.device) for x in xs}) > 1:
        flat = [x.to("cpu", wide) for x in flat]
    return torch.cat(flat).to("cpu", wide)
