"""compile=: each step as a compiled function of tensors, compared with the user's step.

Reverse mode compiles two functions, w ↦ Φ_t(w, λ) and (w, α, ∇) ↦ (∂₁Φ_tᵀα, ∇ + ∂₂Φ_tᵀα). No graph is kept: the second
function evaluates the step again, together with its derivative.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil, sqrt
from typing import Any

import optree
import torch
from torch import Tensor

from .. import _autodiff, _random
from .._options import parse_bytes
from .._recorded import NotCompiled
from .._solution import warn
from .._torch import correct_derivatives
from .._traced import ROUNDING, Traced, as_number, autocast_state, gap, size
from .._tree import KIND
from ._steps import EXHAUSTED, Iterate, Recorded, Run, is_continuous, leaf

Key = tuple[Any, ...]
Batch = tuple[list[Any], Any] | None  # leaves and structure
MAX_FORMS = 8  # forms of the batch (shapes, dtypes, plain values) in one call; the step is compiled once for each
NOT_COMPILED = "the steps could not be compiled and are evaluated without compilation: {}"
OTHER_VALUES = (
    "the compiled step {} gives other numbers than step itself (error relative to the change of params: {:.1e}): step "
    "reads something that is not a tensor and that changes between calls (an iterator, a counter, NumPy's random "
    "numbers). Pass it as batches= or t"
)
WRITES_BUFFERS = (
    "step writes buffers of a module (BatchNorm or spectral_norm in training mode), which a compiled step does not: "
    "use track_running_stats=False or another layer, or evaluate the layer in eval mode"
)
OTHER_DERIVATIVE = (
    "the derivative of the compiled step {} has a relative error of {:.1e}: does step use hparams from outside in "
    'place of its argument, or is the compiler at fault (then compile="eager" is right)?'
)


def checked_backend(compile: object) -> str | None:
    """The backend of torch.compile that `compile` names; None without compilation."""
    if not isinstance(compile, (bool, str)):
        raise TypeError(f"compile must be True, False or the name of a backend of torch.compile, got {compile!r}")
    return "inductor" if compile is True else compile or None


@dataclass
class Functions:
    """The compiled functions of a step, for one form of the batch."""

    traced: list[Traced]
    reached: list[bool]  # for each of the differentiated leaves of λ, whether the step depends on it
    compared: bool = False  # whether they were compared at a second step too, where changes between calls show


class Compiled(ABC):
    """The steps of a run as compiled functions of tensors.

    They are compared with the user's step when they are built (at two steps, and the derivative at the first of them),
    and in every later call at the second iterate.
    """

    def __init__(self, run: Run, backend: str):
        self.run, self.backend = run, backend
        self.known: dict[Key, Any] = run.found.setdefault("compiled", {})
        self.seconds = 0.0  # spent on building functions in this call
        self.used: dict[Key, Functions] = {}
        self.outer = [x.detach().contiguous() for x in run.outer]
        self.form: Key = type(self), backend, autocast_state(), run.with_time, tuple(run.places), *run.form
        if any(x.layout is not torch.strided or hasattr(x, "placements") for x in (*run.start, *run.outer)):
            raise NotCompiled("sparse and sharded tensors are not compiled")

    @abstractmethod
    def _traced(self, inputs: list[Tensor], batch: Batch) -> Functions:
        """Functions for batches of this batch's form, traced at these inputs."""

    @abstractmethod
    def _image(self, functions: Functions, inputs: list[Tensor]) -> Sequence[Tensor]:
        """Φ_t(w, λ), computed by the functions."""

    @abstractmethod
    def _derivative(self, functions: Functions, inputs: list[Tensor]) -> list[Tensor]:
        """The derivatives in w and in λ along fixed directions, computed by the functions; each as one vector."""

    @abstractmethod
    def _true_derivative(self, true: Recorded) -> list[Tensor]:
        """The same derivatives, computed from the graph of the user's step."""

    @property
    def report(self) -> str:
        functions = next(iter(self.used.values()), None)
        counts = [] if functions is None else [str(each.operations) for each in functions.traced]
        sizes = f" of {' and '.join(counts)} operations" if counts else ""
        built = f", built in {self.seconds:.1f} s" if self.seconds else ", which an earlier call built"
        return f"{'one function' if len(counts) == 1 else 'two functions'}{sizes} compiled by {self.backend}{built}"

    def _first(self, first: Iterate, t: int, more: bool = False) -> list[list[Tensor]]:
        """Choose the functions for the first step of a call; return the iterates that were computed for this.

        Functions of an earlier call are used if they still agree with the step. more: whether a second step follows.
        """
        inputs, self.key = self._inputs(first.tensors, t)
        found = self._found(self.key)
        if found is not None:
            try:
                # Compare at the second iterate, where momenta and distances from the start are no longer zero.
                after = first._replace(tensors=list(self._image(found, inputs)))
                later = t + 1 if more and self.run.batches is None else t
                last = self._compare(found, after, later, self._evaluated(after, later))
                self.used[self.key] = found
                self.run.evaluations += 1 + more
                return [after.tensors, last]
            except NotCompiled:  # something that the step reads from outside has changed since
                del self.known[self.key]
        true = self._evaluated(first, t)
        with self._noted():
            self.used[self.key] = self.known[self.key] = self._built(first, t, true)
        return [[y.detach().contiguous() for y in true.outputs]]

    def _second(self, second: Iterate, t: int) -> None:
        """Compare new functions with the step at a second step too."""
        if not self.used[self.key].compared:
            with self._noted():
                self._compare(self._at(second.tensors, t)[0], second, t, self._evaluated(second, t))
            self.used[self.key].compared = True

    @contextmanager
    def _noted(self) -> Iterator[None]:
        """Remember, for later calls, the reason why the step cannot be compiled."""
        try:
            yield
        except NotCompiled as error:
            self.known[self.key] = str(error)
            raise

    def _found(self, key: Key) -> Functions | None:
        """The functions of an earlier call for this form, or None. Raises NotCompiled if compilation failed there."""
        known = self.known.get(key)
        if isinstance(known, str):
            raise NotCompiled(known)
        return known

    @property
    def _may_draw(self) -> bool:
        """Whether steps may draw random numbers, as far as is known."""
        return self.run.batches is not None or any(f.traced[0].draws for f in self.used.values())

    def _inputs(self, tensors: Sequence[Tensor], t: int) -> tuple[list[Tensor], Key]:
        """The tensors of w, λ, t and the batch, which the functions take, and the key of what else they depend on."""
        run = self.run
        inputs = [*tensors, *self.outer]
        if not run.with_time:
            return inputs, self.form
        inputs.append(torch.tensor(t, device="cpu"))
        if run.batches is None:
            return inputs, self.form
        leaves, spec = self._batch(t)
        inputs += [x.detach().contiguous() for x in leaves if isinstance(x, Tensor)]
        if not all(isinstance(x, (Tensor, int, float, str, type(None))) for x in leaves):
            raise NotCompiled("batches hold leaves that are neither tensors nor plain values")
        return inputs, (*self.form, spec, *(KIND(x) if isinstance(x, Tensor) else x for x in leaves))

    def _batch(self, t: int) -> Any:
        try:
            return None if self.run.batches is None else optree.tree_flatten(self.run.batches(t), none_is_leaf=True)
        except StopIteration:
            raise ValueError(EXHAUSTED.format("batches", t)) from None

    def _at(self, tensors: Sequence[Tensor], t: int) -> tuple[Functions, list[Tensor]]:
        """The functions for step t, and their inputs. A batch of a new form gets new functions."""
        before = _random.capture(self.run.devices) if self.run.batches else None
        inputs, key = self._inputs(tensors, t)
        if key not in self.used:
            if len(self.used) == MAX_FORMS:
                raise NotCompiled(
                    f"batches have more than {MAX_FORMS} forms: give all one shape, and pass changing values as tensors"
                )
            before = _random.capture(self.run.devices) if before is None else before
            iterate = Iterate(list(tensors), self.run.rebuild, before, [])
            self.used[key] = self.known[key] = self._found(key) or self._built(iterate, t, self._evaluated(iterate, t))
            _random.restore(before)
            inputs, _ = self._inputs(tensors, t)
        return self.used[key], inputs

    def _built(self, iterate: Iterate, t: int, true: Recorded) -> Functions:
        """New functions, traced at this iterate, and compared with the step.

        true: the step, evaluated before compilation so that an error in it reaches the user unchanged.
        """
        begun = time.perf_counter()
        _random.restore(iterate.random)
        inputs, _ = self._inputs(iterate.tensors, t)
        functions = self._traced(inputs, self._batch(t))
        self._compare(functions, iterate, t, true)
        self._compare_derivative(functions, iterate, t, true)
        self.seconds += time.perf_counter() - begun
        return functions

    def _step(self, inputs: Sequence[Tensor], batch: Batch) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Evaluate the step as `Run` does, on new leaves: returns the leaves of w, the results, and the leaves of λ."""
        run = self.run
        tensors = [leaf(x) for x in inputs[: len(run.start)]]
        outer, rest = list(inputs[len(run.start) :][: len(run.outer)]), inputs[len(run.start) + len(run.outer) :]
        for i in run.places:
            outer[i] = leaf(outer[i])
        arguments: list[Any] = list(map(as_number, rest[:1]))
        if batch is not None:
            each = iter(rest[1:])
            arguments.append(batch[1].unflatten([next(each) if isinstance(x, Tensor) else x for x in batch[0]]))
        with correct_derivatives(dense=True):
            outputs, _ = run.arranged(run.step(run.rebuild(tensors), run.hparams_tree(outer), *arguments))
        return [x for x in tensors if x.requires_grad], outputs, [outer[i] for i in run.places]

    def _evaluated(self, iterate: Iterate, t: int, off: float = 0.0) -> Recorded:
        """The user's step with its graph, at (1 + off) w: off = eps shows by how much rounding changes the result."""
        _random.restore(iterate.random)
        buffers = self.run.buffers.copies()
        leaves = [leaf(x * (1 + off) if off and is_continuous(x) else x) for x in iterate.tensors]
        with correct_derivatives(dense=True):
            true = Recorded(leaves, *self.run.evaluate(leaves, iterate.rebuild, t))
        if any(x is not y for x, y in zip(self.run.buffers.copies(), buffers, strict=True)):
            self.run.buffers.restore(buffers)
            raise NotCompiled(WRITES_BUFFERS)
        return true

    def _compare(self, functions: Functions, iterate: Iterate, t: int, true: Recorded) -> list[Tensor]:
        """The result of the compiled step. Raises NotCompiled if it differs from the step's result."""
        _random.restore(iterate.random)
        found = list(self._image(functions, self._inputs(iterate.tensors, t)[0]))
        if list(map(KIND, found)) != list(map(KIND, true.outputs)):
            raise NotCompiled(f"the compiled step {t} gives tensors of other shapes or dtypes than step itself")
        due, got, before = map(flat, (true.outputs, found, true.leaves))
        error, change = gap(due, got), size(due - before)
        allowed = self._eps**0.5 * change + 8 * self._eps * size(due)
        if error > allowed:
            again, rounded = (flat(self._evaluated(iterate, t, off).outputs) for off in (0.0, self._eps))
            if gap(due, again) > allowed or error > ROUNDING * size(due - rounded):
                raise NotCompiled(OTHER_VALUES.format(t, error / change if change else error))
        _random.restore(iterate.random)
        return found

    def _compare_derivative(self, functions: Functions, iterate: Iterate, t: int, true: Recorded) -> None:
        """Compare the derivatives in w and in λ, one by one since their sizes may differ."""
        _random.restore(iterate.random)
        got = self._derivative(functions, self._inputs(iterate.tensors, t)[0])
        for i, (x, y) in enumerate(zip(self._true_derivative(true), got, strict=True)):
            error, norm = gap(x, y), size(x)
            if error > self._eps**0.5 * norm:
                rounded = self._true_derivative(self._evaluated(iterate, t, self._eps))[i]
                if error > ROUNDING * size(x - rounded):
                    raise NotCompiled(OTHER_DERIVATIVE.format(t, error / norm if norm else error))
        _random.restore(iterate.random)

    @property
    def _eps(self) -> float:
        return max(torch.finfo(x.dtype).eps for x in (*self.run.start, *self.run.outer) if is_continuous(x))


class CompiledReverse(Compiled):
    """Takes the place of `Run` in the reverse pass, and keeps no graph."""

    ahead: dict[int, list[Tensor]]  # iterates by t that the comparisons have already computed

    def begin(self, first: Iterate, steps: int) -> Iterate:
        """Choose the functions and compare them with the steps. Returns the first iterate in contiguous tensors."""
        first = first._replace(tensors=[x.contiguous() for x in first.tensors])
        ahead = self._first(first, 0, steps > 1)
        self.ahead = {} if self._may_draw else dict(enumerate(ahead, 1))
        if steps > 1 and not self.used[self.key].compared:
            self._second(self.advance(first, 0, 1), 1)
        return first

    def advance(self, iterate: Iterate, begin: int, end: int) -> Iterate:
        """The iterate after steps begin … end − 1."""
        if self._may_draw:
            _random.restore(iterate.random)
        tensors = iterate.tensors
        for t in range(begin, end):
            known = self.ahead.pop(t + 1, None)
            if known is None:
                functions, inputs = self._at(tensors, t)
                known = list(self._image(functions, inputs))
                self.run.evaluations += 1
            tensors = known
        return self.run.keep(tensors, self.run.rebuild) if self._may_draw else iterate._replace(tensors=tensors)

    def pull_back(self, blocks: Iterable[tuple[int, int, Iterate]]) -> tuple[list[Tensor], list[Tensor | None]]:
        """α at the first step, and ∇ summed over all steps. Each block holds one step; the last step comes first."""
        alpha, grads, closed = [], [], False
        for t, end, iterate in blocks:
            if not closed:
                final = self.advance(iterate, t, end)
                (alpha, grads), closed = self.run.close(final.tensors, final.rebuild), True
                alpha = [a.contiguous() for a in alpha]
            if self._may_draw:
                _random.restore(iterate.random)
            functions, inputs = self._at(iterate.tensors, t)
            alpha, grads = self._pull(functions, inputs, alpha, grads)
            self.run.evaluations += 1
        return alpha, grads

    def _pull(
        self, functions: Functions, inputs: list[Tensor], alpha: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        pairs = zip(grads, self.run.differentiated, strict=True)
        given = [torch.zeros_like(x, requires_grad=False) if g is None else g.contiguous() for g, x in pairs]
        results = list(functions.traced[1]([*inputs, *alpha, *given]))
        sums = iter(results[len(alpha) :])
        return results[: len(alpha)], [
            next(sums) if hit else g for hit, g in zip(functions.reached, grads, strict=True)
        ]

    def _traced(self, inputs: list[Tensor], batch: Batch) -> Functions:
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

        like = [*filter(is_continuous, self.run.start), *self.run.differentiated]
        zeros = [torch.zeros_like(x, requires_grad=False) for x in like]
        return Functions([forward, Traced(reverse, [*inputs, *zeros], self.backend)], reached)

    def _image(self, functions: Functions, inputs: list[Tensor]) -> Sequence[Tensor]:
        return functions.traced[0](inputs)

    def _derivative(self, functions: Functions, inputs: list[Tensor]) -> list[Tensor]:
        alpha = [torch.ones(x.shape, dtype=x.dtype, device=x.device) for x in self.run.start if is_continuous(x)]
        return self._joined(*self._pull(functions, inputs, alpha, [None] * len(self.run.differentiated)))

    def _true_derivative(self, true: Recorded) -> list[Tensor]:
        alpha = [torch.ones_like(y) for y in true.outputs if is_continuous(y)]
        return self._joined(*self.run.pull(true, alpha, [None] * len(self.run.differentiated)))

    def _joined(self, alpha: list[Tensor], grads: list[Tensor | None]) -> list[Tensor]:
        return [flat(alpha), flat(_autodiff.or_zeros(grads, self.run.differentiated))]


def compiled_gradients(
    run: Run,
    backend: str,
    first: Iterate,
    begin: int,
    end: int,
    storage: tuple[str, int | None],
    backwards: Callable[..., Iterator[tuple[int, int, Iterate]]],
) -> tuple[tuple[list[Tensor], list[Tensor | None]] | None, str | None]:
    """(α, ∇) as from `_gradients`, and a report; (None, None) for no steps, or with a warning if compilation failed."""
    if not end:
        return None, None
    before = first.random
    try:
        compiled = CompiledReverse(run, backend)
        first = compiled.advance(compiled.begin(first, end), 0, begin)
        if begin == end:
            return run.close(first.tensors, first.rebuild), compiled.report
        kept = iterates_kept(first, end - begin, *storage)
        blocks = backwards(compiled, [(0, first)], list(range(begin, end + 1)), kept)
        del first
        return compiled.pull_back(blocks), compiled.report
    except NotCompiled as error:
        warn(NOT_COMPILED.format(error), NotCompiled)
        _random.restore(before)
        run.evaluations = 0
        return None, None


def iterates_kept(first: Iterate, length: int, memory: str, checkpoints: int | None) -> int:
    """The number of iterates that compiled steps keep. With "sqrt" no step is evaluated more than three times."""
    if checkpoints is not None or memory == "iterates":
        return checkpoints or length
    if memory == "sqrt":
        return ceil(sqrt(2 * length))
    budget, each = parse_bytes(memory) or 0.0, max(1, sum(x.nbytes for x in first.tensors))
    if budget < 2 * each:
        raise ValueError(f"a budget of {budget:.0f} bytes is too small: two iterates need {2 * each}")
    return min(int(budget // each) - 1, length)


def flat(xs: Sequence[Tensor]) -> Tensor:
    """All tensors, including those of integers and booleans, as one vector in double precision."""
    wide = torch.complex128 if any(x.is_complex() for x in xs) else torch.float64
    flat = [x.detach().reshape(-1) for x in xs]
    if len({(x.dtype, x.device) for x in xs}) > 1:
        flat = [x.to("cpu", wide) for x in flat]
    return torch.cat(flat).to("cpu", wide)
