"""A forward solve under torch.func: on plain tensors, whatever transforms are on, and for a vmap one batched solve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .. import _torch
from .._solution import Solution
from .._tree import PyTree, flatten, matching, split
from .._vector import Space, Vector

Leaves: TypeAlias = "tuple[Tensor, ...]"


class NotPassed(ValueError):
    """fp_map uses a tensor of a transform of torch.func that it was not given."""

    def __init__(self) -> None:
        super().__init__("fp_map uses a tensor that a transform outside (vmap, ...) maps: pass it in hparams")


@dataclass(frozen=True)
class Call:
    """A solve on the leaves of start and the tensors of hparams.

    Args:
        function: (w, λ) ↦ Φ(w, λ), on leaves.
        unflatten: makes a tree of the leaves of w.
        below: whether it runs below all transforms of torch.func.
    """

    solver: Any  # a FixedPointSolver
    function: Callable[[Leaves, Leaves], Sequence[Tensor]]
    unflatten: Callable[..., PyTree]
    below: bool = False

    def vmapped(self, dims: Sequence[int | None]) -> Call:
        """The same over one more leading axis of w, and of those tensors of λ whose entry in dims is 0."""
        function = torch.func.vmap(self.function, in_dims=(0, tuple(dims)))
        return replace(self, solver=replace(self.solver, batch_dims=self.solver.batch_dims + 1), function=function)

    def evaluate(self, w: Sequence[Tensor], hparams: Leaves) -> Sequence[Tensor]:
        try:
            values = self.function(tuple(w), hparams)
        except RuntimeError as error:
            if _torch.is_of_ended_transform(error):
                raise NotPassed from error
            raise
        if any(map(_torch.is_wrapped if self.below else _torch.mapped_levels, values)):
            raise NotPassed
        return values

    def run(self, start: Sequence[Tensor], hparams: Leaves) -> Solution:
        """The solution; a failure is reported."""
        space = Space(self.unflatten(start), "start", self.solver.batch_dims)

        def phi(w: Vector) -> Vector:
            return space.pack([leaf.detach() for leaf in self.evaluate([leaf.detach() for leaf in w.leaves], hparams)])

        with torch.no_grad():
            w = space.pack([leaf.detach() for leaf in start]).copy()
            solution = self.solver._run(phi, w, self.solver._method(w, lambda leaves: self.evaluate(leaves, hparams)))
        solution.report(type(self.solver).__name__, self.solver.on_failure)
        return solution


class _Below(torch.autograd.Function):
    """A solve on plain tensors, whatever transforms are on, and for a vmap one solve: (call, keep, count, *w, *λ)."""

    @staticmethod
    def forward(call: Call, keep: Callable[[Solution], None], count: int, *tensors: Tensor) -> Leaves:
        solution = call.run(tensors[:count], tensors[count:])
        keep(solution)
        leaves = split(solution.value)[0]
        return (*leaves, solution.code, solution.residual_norm, solution.rhs_norm, solution.trace)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Leaves) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], call: Call, keep: Any, count: int, *tensors: Tensor) -> Any:
        lead, dims = lead_axes(info.batch_size, tensors, in_dims[3:], count)
        outputs = _Below.apply(call.vmapped(dims), keep, count, *lead)
        return outputs, (*[0] * (count + 3), 1 if call.solver.trace else None)


def lead_axes(
    size: int, tensors: Sequence[Tensor], dims: Sequence[int | None], all_mapped: int
) -> tuple[list[Tensor], list[int | None]]:
    """Tensors with the mapped axis in front, the first `all_mapped` of them in any case; and 0 or None for the rest."""
    lead = [t if dim is None else t.movedim(dim, 0) for t, dim in zip(tensors, dims, strict=True)]
    for i in range(all_mapped):
        if dims[i] is None:
            lead[i] = lead[i].expand(size, *lead[i].shape)
    return lead, [None if dim is None else 0 for dim in dims[all_mapped:]]


def solved(
    solver: Any, fp_map: Callable[..., PyTree], start: PyTree, hparams: PyTree = None
) -> tuple[Solution, Solution]:
    """The Solution in terms of the transforms of torch.func that are on, and the same on plain tensors."""
    leaves, paths, unflatten = flatten(start, "start")
    given, rebuild = split(hparams)

    def function(w: Leaves, h: Leaves) -> Sequence[Tensor]:
        tree = unflatten(w)
        value = fp_map(tree) if hparams is None else fp_map(tree, rebuild(h))
        return matching(value, paths, w, "the value of the fixed point map")

    call, count = Call(solver, _torch.taking_derivatives(function), unflatten), len(leaves)
    if not _torch.transforms_active():
        return (solution := call.run(leaves, tuple(given))), solution
    tensors, kept = [x.detach() for x in (*leaves, *given)], []
    try:
        with torch.no_grad():
            *value, code, residual_norm, rhs_norm, trace = _Below.apply(
                replace(call, below=True), kept.append, count, *tensors
            )
    except NotPassed:
        if any(map(_torch.mapped_levels, tensors)):
            raise
        # What no vmap maps can be computed with where it is.
        solution = _plain(call.run(leaves, tuple(given)))
        return solution, solution
    plain = kept[0]
    return Solution(unflatten(value), code, plain.steps, residual_norm, rhs_norm, trace, plain.method), plain


def _plain(solution: Solution) -> Solution:
    """Without the wrappers of transforms, from which older torch reads no numbers."""
    tensors, rebuild = split([getattr(solution, part.name) for part in fields(solution)])
    return Solution(*rebuild(map(_torch.unwrapped, tensors)))
