"""What a meta-gradient is given as: collected chunk by chunk, with the tasks that failed named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import optree
import torch
from torch import Tensor

from .._solution import NotConverged, NotFinite, OnFailure, Status, UnsolvedInnerProblem, warn
from .._tree import PyTree, flatten, split
from ..implicit import Hypergradient
from ..implicit._hypergradient import UNSOLVED
from ._methods import Part
from ._tasks import Plan

Reduction = Literal["mean", "sum", "none"]


class TaskError(ValueError):
    """Tasks that failed, under on_failure="raise", or all of them. `failed` holds their indices."""

    def __init__(self, message: str, failed: list[int]):
        super().__init__(message)
        self.failed = failed


@dataclass(frozen=True)
class MetaGradient:
    """A meta-gradient and how good it is, task by task.

    Attributes:
        grads: ∇f(λ), in the structure of hparams; with reduction="none" each leaf has a leading axis of tasks, and rows
            of failed tasks are zero.
        params: w_T of each task, a leading axis of tasks on every leaf; as they ended where a task diverged.
        outer_values: E(w_T, λ) of each task, [B]; None without an outer loss.
        statuses: how each task ended: NON_FINITE where it was left out, else that of its adjoint system (`Implicit`),
            or CONVERGED.
        adjoint_residual: ‖∇₁E − A v‖ / ‖∇₁E‖ of each task, [B], NaN where it was left out; None but for `Implicit`.
        inner_residual: ‖∇₁g‖ at w_T, likewise.
        inner_distance: estimate of the relative distance of w_T from the inner solution, likewise.
        plan: how many tasks went side by side, and why.
    """

    grads: PyTree
    params: PyTree
    outer_values: Tensor | None
    statuses: list[Status]
    adjoint_residual: Tensor | None
    inner_residual: Tensor | None
    inner_distance: Tensor | None
    plan: Plan

    @property
    def failed(self) -> list[int]:
        """The tasks that were left out."""
        return [i for i, status in enumerate(self.statuses) if status is Status.NON_FINITE]


@dataclass(frozen=True)
class Adaptation:
    """What `adapt` gives.

    Attributes:
        params: w_T of each task, a leading axis of tasks on every leaf.
        failed: tasks whose params are not finite.
        plan: how many tasks went side by side, and why.
    """

    params: PyTree
    failed: list[int]
    plan: Plan


@dataclass
class Total:
    """What was found so far, task by task."""

    count: int
    reduction: Reduction
    hparams: PyTree
    failed: list[int] = field(default_factory=list)
    pieces: list[tuple[Sequence[int], PyTree]] = field(default_factory=list)
    values: list[tuple[Sequence[int], Tensor]] = field(default_factory=list)
    quality: list[tuple[Sequence[int], Hypergradient]] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)

    def fail(self, failed: Sequence[int], index: Sequence[int], params: PyTree, values: Tensor) -> None:
        self.failed += failed
        places = [index.index(i) for i in failed]
        leaves, _, rebuild = flatten(params, "params")
        self.pieces.append((failed, rebuild([x.detach()[places] for x in leaves])))
        self.values.append((failed, values[places]))

    def add(self, index: Sequence[int], part: Part) -> None:
        self.pieces.append((index, part.params))
        self.values.append((index, part.values))
        if part.hypergradient is not None:
            self.quality.append((index, part.hypergradient))
        new = optree.tree_leaves(part.grads)
        if self.reduction == "none":
            leaves = flatten(self.hparams, "hparams")[0]
            self.grads = self.grads or [x.new_zeros(self.count, *x.shape) for x in leaves]
            for total, x in zip(self.grads, new, strict=True):
                total[list(index)] = x.reshape(len(index), *total.shape[1:])
        else:
            self.grads = [a + b for a, b in zip(self.grads, new, strict=True)] if self.grads else new

    def result(self, plan: Plan, has_outer: bool) -> MetaGradient:
        left = self.count - len(self.failed)
        if not left:
            raise TaskError(
                f"all {self.count} tasks diverged: their params, losses or gradients hold NaN or infinity, so there is "
                f"no meta-gradient. Use a smaller lr, fewer steps, or look at the losses and data",
                sorted(self.failed),
            )
        grads = [g / left for g in self.grads] if self.reduction == "mean" else self.grads
        codes = torch.zeros(self.count, dtype=torch.long)
        codes[self.failed] = Status.NON_FINITE.value
        for index, each in self.quality:
            codes[list(index)] = each.solution.code.cpu()

        def collect(read: Callable[[Hypergradient], Tensor]) -> Tensor | None:
            if not self.quality:
                return None
            parts = [(index, read(each)) for index, each in self.quality]
            return joined(parts, self.count, torch.nan)

        return MetaGradient(
            grads=flatten(self.hparams, "hparams")[2](grads),
            params=joined(self.pieces, self.count),
            outer_values=joined(self.values, self.count) if has_outer else None,
            statuses=[Status(code) for code in codes.tolist()],
            adjoint_residual=collect(lambda h: h.solution.relative_residual),
            inner_residual=collect(lambda h: h.inner_residual),
            inner_distance=collect(lambda h: h.inner_distance),
            plan=plan,
        )


def joined(pieces: list[tuple[Sequence[int], PyTree]], count: int, missing: float = 0.0) -> PyTree:
    """Trees of some tasks each as one of all tasks, in their order."""
    first = pieces[0][1]
    if len(pieces) == 1 and len(pieces[0][0]) == count:
        return first
    leaves, rebuild = split(first)
    whole = [x.new_full((count, *x.shape[1:]), missing) for x in leaves]
    for index, tree in pieces:
        for target, x in zip(whole, split(tree)[0], strict=True):
            target[list(index)] = x
    return rebuild(whole)


def named(tasks: Sequence[int], count: int) -> str:
    shown = ", ".join(map(str, sorted(tasks)[:10])) + (", …" if len(tasks) > 10 else "")
    return f"{len(tasks)} of {count} tasks ({shown})"


def report_failed(
    failed: list[int],
    count: int,
    on_failure: OnFailure,
    fate: str = "they are left out of the meta-gradient",
) -> None:
    if not failed or on_failure == "ignore":
        return
    text = (
        f"{named(failed, count)} diverged: params, losses or gradients hold NaN or infinity, and {fate}. "
        f"Use a smaller lr, fewer steps, or look at the losses and data of these tasks"
    )
    if on_failure == "raise":
        raise TaskError(text, sorted(failed))
    warn(text, NotFinite)


def report_unsolved(result: MetaGradient, on_failure: OnFailure) -> None:
    if on_failure == "ignore":
        return
    count = len(result.statuses)
    bad = [i for i, s in enumerate(result.statuses) if s.value > Status.COMPLETED.value and s is not Status.NON_FINITE]
    if bad:
        assert result.adjoint_residual is not None
        worst = max(bad, key=lambda i: result.statuses[i].value)
        text = (
            f"the adjoint systems of {named(bad, count)} are not solved; task {worst}, at a relative residual of "
            f"{float(result.adjoint_residual[worst]):.2e}: {result.statuses[worst].name}: "
            f"{result.statuses[worst].message}"
        )
        if on_failure == "raise":
            raise TaskError(text, bad)
        warn(text, NotConverged)
    assert result.inner_distance is not None
    far = (result.inner_distance > UNSOLVED).nonzero().flatten().tolist()
    if far:
        warn(
            f"the inner problems of {named(far, count)} are not solved: params are an estimated "
            f"{float(result.inner_distance.nan_to_num().max()):.1%} (of their norm) or more away from the solution, so "
            f"the implicit gradient means little there. Take more steps, regularise more, or use Unrolled()",
            UnsolvedInnerProblem,
        )
