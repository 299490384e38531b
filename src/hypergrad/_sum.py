"""The sum of a loss over batches, with derivatives of every order and the graph of one batch at a time.

Σ_b φ_b(x) is evaluated batch by batch. Its transposed derivative is again such a sum, Σ_b ∂φ_b(x)ᵀ c, so one
autograd.Function whose backward calls itself serves the loss, its gradient, Hessian products and higher derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from . import _autodiff, _graph, _random, _torch
from ._autodiff import Linearisation, as_scalar, users_autocast
from ._modules import Buffers
from ._options import memory_bytes, progress_bar
from ._tree import PyTree, split

Values: TypeAlias = "list[Tensor | None]"  # None: a gradient that is zero because nothing depends on its input
Weigh: TypeAlias = "Callable[[int, Any], float]"


class Batches:
    """Passes through all batches. Every pass repeats the batches and the random numbers of the first one.

    Buffers that the loss writes (BatchNorm) are replayed too, and stay as the first pass left them.

    Args:
        source: a DataLoader or another iterable, or a function that returns one.
        weigh: (number, batch) ↦ the weight of the batch's loss.
        devices: devices besides the CPU on which random numbers may be drawn.
        loss: the function that is evaluated, whose modules' buffers are replayed.
        by_batch: record the states at every batch, for passes that do not evaluate all batches.
        progress: show a bar.

    Attributes:
        count, total: the number of batches and the sum of their weights, known after the first pass.
    """

    def __init__(
        self, source: Any, weigh: Weigh, devices: list[torch.device], loss: Any, by_batch: bool, progress: bool
    ):
        self.source, self.weigh, self.devices, self.progress = source, weigh, devices, progress
        self.buffers = Buffers(loss)
        self.start, self.recorded = self._states(), [] if by_batch else None
        self.count, self.total = 0, 0.0
        self.first: list[Tensor] = []  # the losses of the first pass, until they are compared with those of the second
        self.second: list[Tensor] = []

    def record_loss(self, value: Tensor) -> None:
        if not self.count:
            self.first.append(value.detach())
        elif self.first:
            self.second.append(value.detach())

    def _compare(self) -> None:
        """Raise ValueError if the second pass gave other losses than the first. It reads from the device once."""
        if not self.first or len(self.second) != len(self.first):
            return
        first, second = torch.stack(self.first), torch.stack(self.second)
        self.first, self.second = [], []
        if _torch.is_wrapped(first) or first.device.type == "meta":
            return
        apart = (first - second).abs() > torch.finfo(first.dtype).eps ** 0.5 * first.abs()
        if bool(apart.any()):
            k = int(apart.nonzero()[0])
            raise ValueError(
                f"Sum: the loss of batch {k} was {float(first[k]):.6g} and is {float(second[k]):.6g} when evaluated "
                f"again at the same point, so its derivatives would be those of another loss: torch's random numbers "
                f"are replayed, those of NumPy, of Python and of generators within a dataset are not"
            )

    def __iter__(self) -> Iterator[tuple[int, Any, float]]:
        first, now, total, count = not self.count, self._states(), 0.0, 0
        if not first:
            self._restore(self.start)
        try:
            for number, batch in enumerate(self._opened()):
                weight = self.weigh(number, batch)
                if self.recorded is not None and first:
                    before = self._states()
                    yield number, batch, weight
                    self.recorded.append((before, self._states()))
                elif self.recorded is not None and number < len(self.recorded):
                    self._restore(self.recorded[number][0])
                    yield number, batch, weight
                    self._restore(self.recorded[number][1])
                else:
                    yield number, batch, weight
                count, total = count + 1, total + weight
        finally:
            if not first:
                self._restore(now)
        if not count or (not first and count != self.count):
            was = "" if first else f" in one pass and {self.count} in the first"
            raise ValueError(
                f"Sum: batches gave {count} batches{was}; every pass needs the same ones: pass an iterable that can be "
                f"iterated again (a DataLoader, a list), or a function that returns an iterator"
            )
        if not first:
            self._compare()
        self.count, self.total = count, total

    def _opened(self) -> Iterable[Any]:
        return progress_bar(self.progress, self.source() if callable(self.source) else self.source, desc="batches")

    @property
    def _generators(self) -> list[torch.Generator]:
        """The generators of a DataLoader and of its samplers."""
        holders = (self.source, getattr(self.source, "sampler", None), getattr(self.source, "batch_sampler", None))
        found = {id(g): g for g in (getattr(each, "generator", None) for each in holders)}
        return [g for g in found.values() if isinstance(g, torch.Generator)]

    def _states(self) -> tuple[Any, list[Tensor], list[Tensor]]:
        return _random.capture(self.devices), [g.get_state() for g in self._generators], self.buffers.copies()

    def _restore(self, states: tuple[Any, list[Tensor], list[Tensor]]) -> None:
        _random.restore(states[0])
        self.buffers.restore(states[2])
        for generator, state in zip(self._generators, states[1], strict=True):
            generator.set_state(state)


@dataclass
class BatchSum:
    """Σ_b weight_b · function(b, x) over all batches b, for a function that returns a list of tensors.

    Args:
        function: ((number, batch), x, create_graph) ↦ values, which have a graph of x if create_graph.
        batches: the batches and their weights.
        keep: how many bytes of graphs may be kept for the next derivative.
        kept: (x, values) of each batch whose graph is kept, by the batch's number.
    """

    function: Callable[[tuple[int, Any], Sequence[Tensor], bool], Values]
    batches: Batches
    keep: float = 0.0
    kept: dict[int, tuple[list[Tensor], Values]] = field(default_factory=dict)

    def run(self, tensors: Sequence[Tensor], keep: bool) -> Values:
        """The sums. keep: keep the graphs that fit."""
        sums: Values = []
        room, seen, sizes = self.keep if keep else 0.0, set(), {}
        for number, batch, weight in self.batches:
            leaves = [x.detach().requires_grad_(x.is_floating_point() or x.is_complex()) for x in tensors]
            values = self.function((number, batch), leaves, room > 0)
            if room > 0:
                sizes |= _graph.saved_bytes([y for y in values if y is not None], seen)
                room = self.keep - sum(sizes.values())
                if room > 0:
                    self.kept[number] = leaves, values
            sums = [_added(x, y, weight) for x, y in zip(sums or [None] * len(values), values, strict=True)]
            del values, leaves
        return sums

    def transposed(self, count: int, wanted: Sequence[int], reached: Sequence[int]) -> BatchSum:
        """Σ_b ∂function(b, x)ᵀ c as a function of (x, c), where x are `count` tensors.

        wanted: indices of the x to differentiate with respect to. reached: indices of the values with a cotangent.
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

        return BatchSum(pull, self.batches, self.keep)


def _added(x: Tensor | None, y: Tensor | None, weight: float) -> Tensor | None:
    """x + weight · y without y's graph, written into x."""
    return x if y is None else y.detach() * weight if x is None else x.add_(y.detach(), alpha=weight)


class Accumulated(torch.autograd.Function):
    """The values of a BatchSum as a differentiable function of its tensors."""

    @staticmethod
    def forward(batch_sum: BatchSum, keep: bool, *tensors: Tensor) -> Any:
        with torch.enable_grad():
            return tuple(batch_sum.run(tensors, keep))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.batch_sum = inputs[0]
        ctx.save_for_backward(*inputs[2:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        wanted = _torch.wanted_inputs(ctx, skip=2)
        reached = [i for i, c in enumerate(cotangents) if c is not None]
        grads: list[Any] = [None] * len(tensors)
        if wanted and reached:
            pulled = ctx.batch_sum.transposed(len(tensors), wanted, reached)
            found = Accumulated.apply(pulled, torch.is_grad_enabled(), *tensors, *(cotangents[i] for i in reached))
            for i, g in zip(wanted, found, strict=True):
                grads[i] = g
        return (None, None, *grads)


class Sum:
    """The exact sum, or mean, of a loss over batches, with the memory of one batch's graph.

        g(w, λ) = Σ_b weight_b · loss(w, λ, b)  (divided by Σ_b weight_b)  + penalty(w, λ)

    Pass it as inner_loss or outer_loss wherever a function of (params, hparams) is accepted. It has derivatives of
    every order, each of which is accumulated in one pass over the batches. All passes of one evaluation use the same
    batches in the same order and the same random numbers of torch (shuffling, dropout, augmentation); a loss that
    changes when it is evaluated again is an error.

    Args:
        loss: loss(params, hparams, batch) ↦ scalar, or an `operators.GaussNewton` whose model and loss take the batch
            as a third argument. Only params and hparams may require grad.
        batches: a DataLoader, a list or another iterable for repeated use, or a function that returns an iterator.
        weights: the weight of each batch: a function of the batch (such as its size), or a list; 1 by default.
        mean: divide by the sum of the weights. If the loss is a mean over rows and the weights are numbers of rows, the
            result is the mean over all rows, even if the last batch is smaller.
        penalty: penalty(params, hparams) ↦ scalar, for terms that belong to no batch, such as weight decay.
        keep: memory for graphs of batches' gradients that products reuse, as "64MiB" or in bytes. The graphs that do
            not fit are built again for each product. (Not for a GaussNewton.)
        progress: show a bar for every pass (needs tqdm).

    Cost: each of these is one pass over the batches: an evaluation, without a graph; a gradient, with a reverse pass of
        each batch; a Hessian product, with that and a reverse pass through it (the latter alone for a batch whose graph
        is kept). Memory: the graph of one batch, and `keep`.

    Example:
        >>> batches = [torch.tensor([1.0, 2.0]), torch.tensor([3.0])]
        >>> loss = Sum(lambda w, lam, x: ((w - x) ** 2).mean(), batches, weights=len, mean=True)
        >>> loss(torch.tensor(2.0), None)
        tensor(0.6667)
    """

    def __init__(
        self,
        loss: Any,
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
                "Sum: batches must be iterable more than once (a DataLoader, a list), or a function that returns an "
                f"iterator; got {type(batches).__name__}"
            )
        if keep is not None and hasattr(loss, "linearise"):
            raise TypeError("Sum: keep is for losses; products of a GaussNewton build the graph of each batch again")
        self.loss, self.batches, self.weights, self.mean, self.penalty = loss, batches, weights, mean, penalty
        self.keep, self.progress = 0.0 if keep is None else memory_bytes(keep, "keep"), progress

    def __call__(self, params: PyTree, hparams: PyTree) -> Tensor:
        """g(w, λ): a pass over the batches."""
        w, rebuild_params = split(params)
        h, rebuild_hparams = split(hparams)

        def function(item: tuple[int, Any], tensors: Sequence[Tensor], create_graph: bool) -> Values:
            given = rebuild_params(tensors[: len(w)]), rebuild_hparams(tensors[len(w) :])
            with _torch.correct_derivatives(dense=True), users_autocast():
                value = as_scalar(self.loss(*given, item[1]), "the loss of a batch").reshape(())
            batches.record_loss(value)
            if not item[0]:
                self._check_declared(value, tensors)
            return [value]

        batches = self._new_batches([*w, *h])
        total = Accumulated.apply(BatchSum(function, batches, self.keep), False, *w, *h)[0]
        given = batches.count if self.weights is None or callable(self.weights) else len(self.weights)
        if given != batches.count:
            raise ValueError(f"Sum: there are {given} weights and {batches.count} batches")
        if self.mean:
            if not batches.total:
                raise ValueError("Sum: the weights sum to 0, so there is no mean")
            total = total / batches.total
        if self.penalty is None:
            return total
        penalty = as_scalar(self.penalty(params, hparams), "penalty")
        self._check_declared(penalty, [*w, *h], "penalty")
        return total + penalty

    def _new_batches(self, tensors: Sequence[Tensor]) -> Batches:
        """The batches of one evaluation and of its derivatives."""
        devices = _random.devices_of(tensors)
        return Batches(self.batches, self._weight, devices, self.loss, self.keep > 0, self.progress)

    @property
    def curvature(self) -> Any:
        """The loss if it is an operators.GaussNewton, else None."""
        return self.loss if hasattr(self.loss, "linearise") else None

    def linearise(
        self, params: PyTree, hparams: PyTree, leaves: Sequence[Tensor], differentiated: Sequence[Tensor]
    ) -> Linearisation:
        """The Linearisation of ∇₁g, with the batches' Gauss–Newton matrices and the penalty's Hessian for ∇²₁₁g."""
        gradient = _autodiff.grad([self(params, hparams)], leaves, create_graph=True, must_reach=_autodiff.UNREACHED)
        batches, of_penalty = self._new_batches([*leaves, *differentiated]), None
        if self.penalty is not None:
            penalty = as_scalar(self.penalty(params, hparams), "penalty")
            of_penalty = Linearisation(_autodiff.grad([penalty], leaves, create_graph=True), leaves)

        def product(v: Sequence[Tensor], batched: bool) -> list[Tensor]:
            total: Values = [None] * len(v)
            for _, batch, weight in batches:
                with torch.enable_grad(), users_autocast():
                    one = self.loss.on(batch).linearise(params, hparams, leaves, ())
                image = one.vjp_many(v) if batched else one.vjp(v)
                total = [_added(x, y, weight) for x, y in zip(total, image, strict=True)]
            whole = [x / batches.total if self.mean else x for x in total if x is not None]
            if of_penalty is None:
                return whole
            return list(map(torch.add, whole, of_penalty.vjp_many(v) if batched else of_penalty.vjp(v)))

        return Linearisation(gradient, leaves, differentiated, product)

    def _weight(self, number: int, batch: Any) -> float:
        if self.weights is None:
            return 1.0
        if callable(self.weights):
            return float(self.weights(batch))
        if number >= len(self.weights):
            raise ValueError(f"Sum: there are {len(self.weights)} weights, and more batches")
        return float(self.weights[number])

    def _check_declared(self, value: Tensor, tensors: Sequence[Tensor], name: str = "loss") -> None:
        others = _graph.undeclared_leaves([value], tensors)
        if others:
            raise ValueError(
                f"Sum: the {name} uses a tensor of shape {tuple(others[0].shape)} that requires grad and is in neither "
                f"params nor hparams, so its derivative would be lost. Pass it in one of them (for a module: "
                f"torch.func.functional_call with its parameters), or detach it"
            )
