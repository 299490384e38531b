"""A forward solve under the transforms of torch.func: on plain tensors below them, and for a vmap one solve of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from . import _torch
from ._solution import Solution
from ._tree import PyTree, split

Leaves: TypeAlias = "tuple[Tensor, ...]"


class NotPassed(ValueError):
    """The map uses a tensor of a transform of torch.func that it was not given."""

    def __init__(self) -> None:
        super().__init__("fp_map uses a tensor that a transform outside (vmap, ...) maps: pass it in hparams")


def explain_tracing(error: RuntimeError) -> None:
    """Raise in place of torch's error that no number can be read from a tensor whose operations are recorded."""
    if "out of a tracing tensor" in str(error):
        raise NotImplementedError(
            "what records the operations of a call (torch.func.linearize, make_fx, torch.export, compiled steps) "
            "cannot record a solver, whose steps depend on numbers. In place of linearize take torch.func.jvp for "
            "products with the Jacobian, torch.func.vjp for those with its transpose, or torch.func.jacrev"
        ) from error


@dataclass(frozen=True)
class Call:
    """One solve, on tensors alone."""

    solve: Callable[[PyTree, Callable[..., Sequence[Tensor]], int], Solution]  # of start, Φ on leaves, and batch_dims
    function: Callable[[Leaves, Leaves], Sequence[Tensor]]  # (w, λ) ↦ Φ(w, λ), on leaves
    unflatten: Callable[..., PyTree]  # makes a tree of the leaves of w
    batch_dims: int  # leading axes of independent samples

    def vmapped(self, dims: Sequence[int | None]) -> Call:
        """The same over one more leading axis of w, and of those tensors of λ whose entry in dims is 0."""
        function = torch.func.vmap(self.function, in_dims=(0, tuple(dims)))
        return replace(self, function=function, batch_dims=self.batch_dims + 1)

    def run(self, start: Leaves, hparams: Leaves) -> Solution:
        def evaluate(w: Sequence[Tensor]) -> Sequence[Tensor]:
            try:
                values = self.function(tuple(w), hparams)
            except RuntimeError as error:
                if _torch.is_of_ended_transform(error):
                    raise NotPassed from error
                raise
            if any(map(_torch.is_wrapped, values)):
                raise NotPassed
            return values

        try:
            return self.solve(self.unflatten(start), evaluate, self.batch_dims)
        except RuntimeError as error:
            explain_tracing(error)
            raise


class _Below(torch.autograd.Function):
    """Arguments (call, keep, count, *w, *λ); keep(solution) is called with the plain Solution, of all entries."""

    @staticmethod
    def forward(call: Call, keep: Callable[[Solution], None], count: int, *tensors: Tensor) -> Leaves:
        solution = call.run(tensors[:count], tensors[count:])
        keep(solution)
        return (*split(solution.value)[0], solution.code, solution.residual_norm, solution.rhs_norm, solution.trace)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Leaves) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], call: Call, keep: Any, count: int, *tensors: Tensor) -> Any:
        lead, dims = lead_axes(info.batch_size, tensors, in_dims[3:], count)
        outputs = _Below.apply(call.vmapped(dims), keep, count, *lead)
        return outputs, (*[0] * (count + 3), 1 if outputs[-1].ndim > 1 else None)


def lead_axes(
    size: int, tensors: Sequence[Tensor], dims: Sequence[int | None], all_mapped: int
) -> tuple[list[Tensor], list[int | None]]:
    """Tensors with the mapped axis in front, the first `all_mapped` of them in any case; and 0 or None for the rest."""
    lead = [t if dim is None else t.movedim(dim, 0) for t, dim in zip(tensors, dims, strict=True)]
    for i in range(all_mapped):
        if dims[i] is None:
            lead[i] = lead[i].expand(size, *lead[i].shape)
    return lead, [None if dim is None else 0 for dim in dims[all_mapped:]]


def solved(call: Call, start: Leaves, hparams: Leaves) -> tuple[Solution, Solution]:
    """The Solution in terms of the transforms that are on, and the same on plain tensors."""
    if not _torch.transforms_active():
        solution = call.run(start, hparams)
        return solution, solution
    tensors, kept = [x.detach() for x in (*start, *hparams)], []
    with torch.no_grad():
        outputs = _Below.apply(call, kept.append, len(start), *tensors)
    code, residual_norm, rhs_norm, trace = outputs[len(start) :]
    value, plain = call.unflatten(outputs[: len(start)]), kept[0]
    return Solution(value, code, plain.steps, residual_norm, rhs_norm, trace, plain.method), plain
