"""The sum of a loss over batches, one batch's graph at a time, as an ordinary differentiable value of any order.

Σ_b φ_b(x) is evaluated batch by batch. Its transposed derivative is again such a sum, Σ_b ∂φ_b(x)ᵀ c, so one
autograd.Function whose backward calls itself serves the loss, its gradient, Hessian products, and what follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from . import _autodiff, _graph, _random, _torch
from ._autodiff import as_scalar
from ._tree import PyTree, memory_bytes, split

Values: TypeAlias = "list[Tensor | None]"  # None: nothing of it depends on what was asked for
Weigh: TypeAlias = "Callable[[int, Any], float]"


class Batches:
    """One way through all batches, again and again the same one, with the random numbers of the first time.

    Args:
        source: a DataLoader or another iterable, or a function that gives one.
        weigh: the factor of a batch's loss, of its number and the batch.
        devices: where random numbers may be drawn, besides the CPU.
        by_batch: the random state is noted at every batch, for passes that do not evaluate all of them.
        progress: shows a bar.

    Attributes:
        count, total: the number of batches and the sum of their factors, known after the first pass.
    """

    def __init__(self, source: Any, weigh: Weigh, devices: list[torch.device], by_batch: bool, progress: bool):
        self.source, self.weigh, self.devices, self.progress = source, weigh, devices, progress
        self.start, self.noted = self._states(), [] if by_batch else None
        self.count, self.total = 0, 0.0

    def __iter__(self) -> Iterator[tuple[int, Any, float]]:
        first, now, total, count = not self.count, self._states(), 0.0, 0
        if not first:
            self._restore(self.start)
        try:
            for number, batch in enumerate(self._opened()):
                weight = self.weigh(number, batch)
                if self.noted is not None and first:
                    before = self._states()
                    yield number, batch, weight
                    self.noted.append((before, self._states()))
                elif self.noted is not None and number < len(self.noted):
                    self._restore(self.noted[number][0])
                    yield number, batch, weight
                    self._restore(self.noted[number][1])
                else:
                    yield number, batch, weight
                count, total = count + 1, total + weight
        finally:
            if not first:
                self._restore(now)
        if not count or (not first and count != self.count):
            was = "" if first else f" in one pass and {self.count} in the first"
            raise ValueError(
                f"Sum: batches gave {count} batches{was}; every pass needs the same ones: pass what can be iterated "
                f"again (a DataLoader, a list), or a function that gives an iterator"
            )
        self.count, self.total = count, total

    def _opened(self) -> Iterable[Any]:
        batches = self.source() if callable(self.source) else self.source
        if not self.progress:
            return batches
        try:
            from tqdm import tqdm
        except ImportError:
            raise ImportError("Sum: progress=True needs the package tqdm") from None
        return tqdm(batches, desc="batches", leave=False)

    @property
    def _own_generator(self) -> torch.Generator | None:
        own = getattr(self.source, "generator", None)
        return own if isinstance(own, torch.Generator) else None

    def _states(self) -> tuple[Any, Tensor | None]:
        own = self._own_generator
        return _random.capture(self.devices), None if own is None else own.get_state()

    def _restore(self, states: tuple[Any, Tensor | None]) -> None:
        _random.restore(states[0])
        own = self._own_generator
        if own is not None and states[1] is not None:
            own.set_state(states[1])


@dataclass
class Job:
    """Σ_b weight_b · function(b, x) over all batches b, for a function of tensors x that gives some tensors.

    Args:
        function: (number, batch), x, create_graph ↦ values; with create_graph they have a graph of x.
        batches: where they come from.
        keep: bytes of graphs of the values that may be kept for the next derivative.
        kept: by number, such a graph: (x, values).
    """

    function: Callable[[tuple[int, Any], Sequence[Tensor], bool], Values]
    batches: Batches
    keep: float = 0.0
    kept: dict[int, tuple[list[Tensor], Values]] = field(default_factory=dict)

    def run(self, tensors: Sequence[Tensor], keep: bool) -> Values:
        """The sums. keep: graphs are kept as far as they fit."""
        sums: Values = []
        room, seen, sizes = self.keep if keep else 0.0, set(), {}
        for number, batch, weight in self.batches:
            leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in tensors]
            values = self.function((number, batch), leaves, room > 0)
            if room > 0:
                sizes |= _graph.saved_bytes([y for y in values if y is not None], seen)
                room = self.keep - sum(sizes.values())
                if room > 0:
                    self.kept[number] = leaves, values
            parts = [None if y is None else y.detach() * weight for y in values]
            del values, leaves
            sums = [_added(x, y) for x, y in zip(sums, parts, strict=True)] if sums else parts
        return sums

    def transposed(self, count: int, wanted: Sequence[int], reached: Sequence[int]) -> Job:
        """Σ_b ∂function(b, x)ᵀ c with respect to the wanted of x, `count` tensors; a function of (x, c).

        reached: which values have a cotangent.
        """

        def pull(item: tuple[int, Any], tensors: Sequence[Tensor], create_graph: bool) -> Values:
            kept = None if create_graph else self.kept.get(item[0])
            if kept is None:
                leaves = list(tensors[:count])
                with torch.enable_grad():
                    values = self.function(item, leaves, True)
            else:
                leaves, values = kept
            pairs = [(values[i], c) for i, c in zip(reached, tensors[count:], strict=True)]
            pairs = [(y, c) for y, c in pairs if y is not None and y.requires_grad]
            return _autodiff.grad_or_none(
                [y for y, _ in pairs],
                [leaves[i] for i in wanted],
                [c for _, c in pairs],
                retain_graph=kept is not None,
                create_graph=create_graph,
            )

        return Job(pull, self.batches, self.keep)


def _added(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    return y if x is None else x if y is None else x.add_(y)


class Accumulated(torch.autograd.Function):
    """The sums of a job as functions of its tensors."""

    @staticmethod
    def forward(job: Job, keep: bool, *tensors: Tensor) -> Any:
        with torch.enable_grad():
            return tuple(job.run(tensors, keep))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.job = inputs[0]
        ctx.save_for_backward(*inputs[2:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        wanted = _torch.wanted_inputs(ctx, skip=2)
        reached = [i for i, c in enumerate(cotangents) if c is not None]
        grads: list[Any] = [None] * len(tensors)
        if wanted and reached:
            job = ctx.job.transposed(len(tensors), wanted, reached)
            found = Accumulated.apply(job, torch.is_grad_enabled(), *tensors, *(cotangents[i] for i in reached))
            for i, g in zip(wanted, found, strict=True):
                grads[i] = g
        return (None, None, *grads)


class Sum:
    """The exact sum, or mean, of a loss over batches, with the memory of one batch's graph.

        g(w, λ) = Σ_b weight_b · loss(w, λ, b)  (divided by Σ_b weight_b)  + penalty(w, λ)

    Pass it as inner_loss or as outer_loss wherever a function of (params, hparams) is taken: it is one, whose value has
    derivatives of every order, each of them accumulated in one pass over the batches. Every pass of one evaluation
    takes the same batches in the same order and draws the same random numbers (shuffling, dropout, augmentation).

    Args:
        loss: loss(params, hparams, batch) ↦ scalar. Only these two, and the batch, may require grad.
        batches: a DataLoader, a list or another iterable that can be begun again, or a function that gives an iterator.
        weights: the weight of each batch: a function of the batch (its number of rows, say), or a list; 1 by default.
        mean: divide by the sum of the weights. With a loss that is a mean over rows, and weights that are numbers of
            rows, this is the mean over all rows, also where the last batch is smaller.
        penalty: penalty(params, hparams) ↦ scalar: what is no part of any batch, such as weight decay.
        keep: "64MiB", or bytes: graphs of as many batches' gradients are kept for the products that follow; those of
            the others are built again for each product.
        progress: show a bar for every pass (needs tqdm).

    Cost: an evaluation is one pass without a graph, a gradient one with reverse passes, a product with a Hessian one
        with a reverse pass and another one through it; of a batch whose graph is kept only the latter. Memory: the
        graph of one batch, and `keep`.

    Example:
        >>> batches = [torch.tensor([1.0, 2.0]), torch.tensor([3.0])]
        >>> loss = Sum(lambda w, lam, x: ((w - x) ** 2).mean(), batches, weights=len, mean=True)
        >>> loss(torch.tensor(2.0), None)
        tensor(0.6667)
    """

    def __init__(
        self,
        loss: Callable[[Any, Any, Any], Tensor],
        batches: Any,
        *,
        weights: Callable[[Any], float] | Sequence[float] | None = None,
        mean: bool = False,
        penalty: Callable[[Any, Any], Tensor] | None = None,
        keep: float | str | None = None,
        progress: bool = False,
    ):
        for name, part in (("loss", loss), ("penalty", penalty)):
            if not callable(part) and not (name == "penalty" and part is None):
                raise TypeError(f"Sum: {name} must be a function, got {type(part).__name__}")
        if isinstance(batches, Iterator) or not (callable(batches) or isinstance(batches, Iterable)):
            raise TypeError(
                "Sum: batches must be iterable again and again (a DataLoader, a list), or a function that gives an "
                f"iterator; got {type(batches).__name__}"
            )
        self.loss, self.batches, self.weights, self.mean, self.penalty = loss, batches, weights, mean, penalty
        self.keep, self.progress = 0.0 if keep is None else memory_bytes(keep, "keep"), progress

    def __call__(self, params: PyTree, hparams: PyTree) -> Tensor:
        """g(w, λ): a pass over the batches."""
        w, rebuild_params = split(params)
        h, rebuild_hparams = split(hparams)

        def function(item: tuple[int, Any], tensors: Sequence[Tensor], create_graph: bool) -> Values:
            given = rebuild_params(tensors[: len(w)]), rebuild_hparams(tensors[len(w) :])
            value = as_scalar(self.loss(*given, item[1]), "the loss of a batch").reshape(())
            if not item[0]:
                self._check_declared(value, tensors)
            return [value]

        devices = _random.devices_of([*w, *h])
        batches = Batches(self.batches, self._weight, devices, self.keep > 0, self.progress)
        total = Accumulated.apply(Job(function, batches, self.keep), False, *w, *h)[0]
        if self.mean:
            total = total / batches.total
        return total if self.penalty is None else total + as_scalar(self.penalty(params, hparams), "penalty")

    def _weight(self, number: int, batch: Any) -> float:
        if self.weights is None:
            return 1.0
        return float(self.weights(batch) if callable(self.weights) else self.weights[number])

    def _check_declared(self, value: Tensor, tensors: Sequence[Tensor]) -> None:
        others = _graph.undeclared_leaves([value], tensors)
        if others:
            raise ValueError(
                f"Sum: the loss uses a tensor of shape {tuple(others[0].shape)} that requires grad and is in neither "
                f"params nor hparams, so its derivative would be lost. Pass it in one of them (for a module: "
                f"torch.func.functional_call with its parameters), or detach it"
            )
