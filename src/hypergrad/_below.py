"""Forward solves under transforms of torch.func: they run on plain tensors, and under vmap as one batched solve."""

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
    """The map uses a tensor of a torch.func transform that was not passed to it."""

    def __init__(self) -> None:
        super().__init__("fp_map uses a tensor that a transform outside (vmap, ...) maps: pass it in hparams")


def explain_tracing(error: RuntimeError) -> None:
    """Raise an error in place of torch's if a number cannot be read because the call's operations are being traced."""
    if "out of a tracing tensor" in str(error):
        raise NotImplementedError(
            "a solver cannot be traced (by torch.func.linearize, make_fx, torch.export or compiled steps), because its "
            "steps depend on the values of tensors. In place of linearize use torch.func.jvp for products with the "
            "Jacobian, torch.func.vjp for products with its transpose, or torch.func.jacrev"
        ) from error


@dataclass(frozen=True)
class Call:
    """A solve as a function of tensors."""

    solve: Callable[[PyTree, Callable[..., Sequence[Tensor]], int], Solution]  # takes start, Φ, batch_dims
    function: Callable[[Leaves, Leaves], Sequence[Tensor]]  # (w, λ) ↦ Φ(w, λ), on leaves
    unflatten: Callable[..., PyTree]  # the leaves of w ↦ the tree w
    batch_dims: int  # the number of leading axes of independent samples

    def vmapped(self, dims: Sequence[int | None]) -> Call:
        """The solve with one more leading axis of w, and of those tensors of λ whose entry in dims is 0."""
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


class _SolveBelow(torch.autograd.Function):
    """A solve on plain tensors, by apply(call, keep, count, *w, *λ) with `count` tensors w; keep gets its Solution."""

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
        outputs = _SolveBelow.apply(call.vmapped(dims), keep, count, *lead)
        return outputs, (*[0] * (count + 3), 1 if outputs[-1].ndim > 1 else None)


def lead_axes(
    size: int, tensors: Sequence[Tensor], dims: Sequence[int | None], all_mapped: int
) -> tuple[list[Tensor], list[int | None]]:
    """Tensors with the mapped axis first (the first `all_mapped` get one in any case), and in_dims of the others."""
    lead = [t if dim is None else t.movedim(dim, 0) for t, dim in zip(tensors, dims, strict=True)]
    for i in range(all_mapped):
        if dims[i] is None:
            lead[i] = lead[i].expand(size, *lead[i].shape)
    return lead, [None if dim is None else 0 for dim in dims[all_mapped:]]


def solved(call: Call, start: Leaves, hparams: Leaves) -> tuple[Solution, Solution]:
    """The Solution in tensors of the active transforms, and the same Solution in plain tensors."""
    if not _torch.transforms_active():
        solution = call.run(start, hparams)
        return solution, solution
    tensors, kept = [x.detach() for x in (*start, *hparams)], []
    with torch.no_grad():
        outputs = _SolveBelow.apply(call, kept.append, len(start), *tensors)
    code, residual_norm, rhs_norm, trace = outputs[len(start) :]
    value, plain = call.unflatten(outputs[: len(start)]), kept[0]
    return Solution(value, code, plain.steps, residual_norm, rhs_norm, trace, plain.method), plain
