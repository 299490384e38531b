"""compile= in forward mode: (w, λ, Z, U) ↦ (Φ_t(w, λ), ∂₁Φ_t Z + ∂₂Φ_t U), one function for a chunk of tangents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _random
from .._autodiff import Linearisation
from .._recorded import NotCompiled
from .._solution import warn
from .._traced import Traced
from ._compiled import NOT_COMPILED, Batch, Compiled, Functions, flat
from ._steps import Iterate, Recorded, Run, is_continuous

if TYPE_CHECKING:
    from ._forward import Push, Tangents


class CompiledPushes:
    """Compiles the steps of a run, up to the first step that cannot be compiled, with a warning there.

    backend: of torch.compile; None compiles nothing.
    """

    def __init__(self, run: Run, push: Push, backend: str | None):
        self.run, self.push, self.backend = run, push, backend
        self.steps: CompiledPush | None = None

    def __call__(self, tensors: list[Tensor], tangents: Tangents, t: int) -> tuple[list[Tensor], Tangents] | None:
        """The next iterate and its tangents; None if the step must be evaluated without compilation."""
        if self.backend is None:
            return None
        try:
            self.steps = self.steps or CompiledPush(self.run, self.backend, self.push)
            return self.steps(tensors, tangents, t)
        except NotCompiled as error:
            warn(NOT_COMPILED.format(error), NotCompiled)
            self.backend = self.steps = None
            return None

    @property
    def report(self) -> str | None:
        return self.steps and self.steps.report


class CompiledPush(Compiled):
    """Compiled steps that push the tangents through Φ_t without a graph. Each batch is drawn once, and in order."""

    def __init__(self, run: Run, backend: str, push: Push):
        super().__init__(run, backend)
        self.push, self.count, self.steps = push, sum(x.numel() for x in run.differentiated), 0
        if not self.count:
            raise NotCompiled("hparams hold no number")
        self.size = min(push.chunk, self.count)
        self.form = *self.form, self.size
        self.outputs = len(run.start)
        run.batches = None if run.batches is None else _kept(run.batches)

    def __call__(self, tensors: list[Tensor], tangents: Tangents, t: int) -> tuple[list[Tensor], Tangents]:
        """The next iterate and its tangents. NotCompiled leaves the random state as it was before the step."""
        self._batch(t)  # draws the batch now, so that random numbers drawn for it are not drawn again with the step
        before = _random.capture(self.run.devices)
        iterate = Iterate([x.contiguous() for x in tensors], self.run.rebuild, before, [])
        try:
            if self.steps == 0:
                self._first(iterate, t)
            elif self.steps == 1:
                self._second(iterate, t)
            self.steps += 1
            if len(tangents.rows) < self.count:
                tangents = self.push.with_entries(tangents, torch.ones(self.count, dtype=torch.bool, device="cpu"))
            return self._pushed(iterate, tangents, t)
        except NotCompiled:
            _random.restore(before)
            raise

    def _pushed(self, iterate: Iterate, tangents: Tangents, t: int) -> tuple[list[Tensor], Tangents]:
        functions, inputs = self._at(iterate.tensors, t)
        outputs, parts = [], []
        for begin in range(0, self.count, self.size):
            at = min(begin, self.count - self.size)  # the last chunk, as long as the others, may overlap the one before
            own = slice(at, at + self.size)
            if begin and functions.traced[0].draws:
                _random.restore(iterate.random)
            columns = [*(z[own].contiguous() for z in tangents.leaves), *self.push.directions(tangents, own)]
            results = functions.traced[0]([*inputs, *columns])
            self.run.evaluations += 1
            outputs = list(results[: self.outputs])
            parts.append([z[begin - at :] for z in results[self.outputs :]])
        leaves = parts[0] if len(parts) == 1 else [torch.cat(each) for each in zip(*parts, strict=True)]
        reached = [a or b for a, b in zip(tangents.reached, functions.reached, strict=True)]
        return outputs, replace(tangents, leaves=leaves, reached=reached)

    def _traced(self, inputs: list[Tensor], batch: Batch) -> Functions:
        reached: list[bool] = []

        def push(*given: Tensor) -> list[Tensor]:
            leaves, outputs, moving = self._step(given[: len(inputs)], batch)
            linear = Linearisation(list(filter(is_continuous, outputs)), [*leaves, *moving])
            reached[:] = [g is not None for g in linear.pulled[len(leaves) :]]
            pushed = self.push.along(linear, given[len(inputs) :])
            return [y.contiguous() for y in (*outputs, *pushed)]

        return Functions([Traced(push, [*inputs, *self._columns(1, 1)], self.backend)], reached)

    def _image(self, functions: Functions, inputs: list[Tensor]) -> Sequence[Tensor]:
        return functions.traced[0]([*inputs, *self._columns(0, 0)])[: self.outputs]

    def _derivative(self, functions: Functions, inputs: list[Tensor]) -> list[Tensor]:
        function, n = functions.traced[0], self.outputs
        return [flat(function([*inputs, *self._columns(*each)])[n:]) for each in ((1, 0), (0, 1))]

    def _true_derivative(self, true: Recorded) -> list[Tensor]:
        inputs = [x for x in true.leaves if x.requires_grad]
        outputs = list(filter(is_continuous, true.outputs))
        linear = Linearisation(outputs, [*inputs, *self.run.differentiated], probe=self.push.probe)
        return [flat(self.push.along(linear, self._columns(*each), check=True)) for each in ((1, 0), (0, 1))]

    def _columns(self, along_params: int, along_hparams: int) -> list[Tensor]:
        """Directions to compare along: a normal vector in params and unit vectors in hparams, each times 0 or 1."""
        z = [(c * along_params).expand(self.size, *c.shape).contiguous() for c in self.push.probe]
        units = self.push.units(torch.arange(self.size, device="cpu"))
        return z + [u * along_hparams for u in units]


def _kept(batches: Callable[[int], Any]) -> Callable[[int], Any]:
    """batches, with the last batch remembered so that it is not drawn again."""
    last: tuple[int, Any] = -1, None

    def at(t: int) -> Any:
        nonlocal last
        if last[0] != t:
            last = t, batches(t)
        return last[1]

    return at
