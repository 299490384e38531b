"""The result of a meta-gradient, collected from chunks of tasks, and reports of the tasks that failed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .._solution import UNSOLVED, NotConverged, NotFinite, OnFailure, Status, UnsolvedInnerProblem, warn
from .._tree import PyTree, flatten, split

REMEDY = (
    "params, losses or gradients hold NaN or infinity; use a smaller lr or fewer steps, or look at the losses and the "
    "data of these tasks"
)


class TaskError(ValueError):
    """Raised for tasks that failed with on_failure="raise", and if all failed. `failed` holds their indices.

    Example:
        >>> inner_loss, outer_loss = lambda w, start, task: (w - task.log()) ** 2, lambda w, start, task: w**2
        >>> start, tasks = torch.tensor(0.0, requires_grad=True), torch.tensor([1.0, -1.0])
        >>> try:
        ...     method = hg.meta.Unrolled()
        ...     _ = hg.meta.grad(outer_loss, inner_loss, start, tasks, method=method, steps=1, on_failure="raise")
        ... except hg.meta.TaskError as error:
        ...     print(error.failed)
        [1]
    """

    def __init__(self, message: str, failed: list[int]):
        super().__init__(message)
        self.failed = failed


@dataclass(frozen=True)
class Plan:
    """How many tasks run in parallel, and why.

    Attributes:
        chunk: number of tasks in parallel; 1 is a loop over tasks.
        outer_chunk: the same for the outer loss: chunk, or 1 if its graph is big (many query images).
        task_bytes: estimated memory of one task; None if nothing had to be estimated.
        reason: the reason in words.

    Example:
        >>> loss = lambda w, start, task: (w - task) ** 2 / 2
        >>> plan = hg.meta.adapt(loss, torch.tensor(0.0), torch.tensor([1.0, 3.0]), steps=1).plan
        >>> plan.chunk, plan.reason.split(":")[0]
        (2, 'all at once')
    """

    chunk: int
    outer_chunk: int
    task_bytes: int | None
    reason: str


@dataclass(frozen=True)
class MetaGradient:
    """A meta-gradient and how good it is, task by task.

    Attributes:
        grads: ∇f(λ), in the structure of hparams; with reduction="none" each leaf has a leading axis of tasks, and rows
            of failed tasks are zero.
        params: w_T of each task, with a leading axis of tasks in every leaf, or a list of the params of each task if
            their shapes differ; also of the tasks that diverged.
        outer_values: E(w_T, λ) of each task, [B]; None without an outer loss.
        statuses: how each task ended: NON_FINITE if it was left out, otherwise the status of its adjoint system
            (`Implicit`), or COMPLETED.
        adjoint_residual: ‖∇₁E − A v‖ / ‖∇₁E‖ of each task, [B], NaN if it was left out; None except for `Implicit`.
        inner_residual: ‖∇₁g‖ at w_T, likewise.
        inner_distance: estimate of the relative distance of w_T from the inner solution, likewise.
        plan: how many tasks ran in parallel, and why.

    Example:
        >>> loss = lambda w, start, task: (w - task) ** 2 / 2
        >>> start, tasks = torch.tensor(0.0, requires_grad=True), torch.tensor([1.0, 3.0])
        >>> result = hg.meta.grad(loss, loss, start, tasks, method=hg.meta.Unrolled(), steps=1)
        >>> result.grads, result.params, result.outer_values  # w = .1 task + .9 start
        (tensor(-1.6200), tensor([0.1000, 0.3000]), tensor([0.4050, 3.6450]))
        >>> result.failed, [status.name for status in result.statuses]
        ([], ['COMPLETED', 'COMPLETED'])
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
        """Indices of the tasks that were left out."""
        return [i for i, status in enumerate(self.statuses) if status is Status.NON_FINITE]


@dataclass(frozen=True)
class Adaptation:
    """The result of `adapt`.

    Attributes:
        params: w_T of each task, as in `MetaGradient`.
        failed: indices of the tasks whose params are not finite.
        plan: how many tasks ran in parallel, and why.

    Example:
        >>> loss = lambda w, start, task: (w - task) ** 2 / 2
        >>> adapted = hg.meta.adapt(loss, torch.tensor(0.0), torch.tensor([1.0, 3.0]), steps=1)
        >>> adapted.params, adapted.failed, adapted.plan.chunk
        (tensor([0.1000, 0.3000]), [], 2)
    """

    params: PyTree
    failed: list[int]
    plan: Plan


class Piece(NamedTuple):
    """Results of some tasks: w_T, E (None without an outer loss), how each ended, and `Found.residuals`."""

    index: list[int]
    params: PyTree
    values: Tensor | None
    statuses: list[Status]
    residuals: tuple[Tensor, Tensor, Tensor] | None = None


def collected(pieces: Sequence[Piece], grads: PyTree, plan: Plan) -> MetaGradient:
    """The result of all tasks, from the pieces of the chunks."""
    count = sum(len(piece.index) for piece in pieces)
    statuses = {i: status for piece in pieces for i, status in zip(piece.index, piece.statuses, strict=True)}
    systems = [(piece.index, piece.residuals) for piece in pieces if piece.residuals is not None]
    residuals = joined(systems, count, torch.nan) if systems else (None, None, None)
    return MetaGradient(
        grads=grads,
        params=joined([(piece.index, piece.params) for piece in pieces], count),
        outer_values=joined([(piece.index, piece.values) for piece in pieces], count),
        statuses=[statuses[i] for i in range(count)],
        adjoint_residual=residuals[0],
        inner_residual=residuals[1],
        inner_distance=residuals[2],
        plan=plan,
    )


def joined(pieces: Sequence[tuple[Sequence[int], PyTree]], count: int, missing: float = 0.0) -> PyTree:
    """One tree of all tasks, in order, from trees of some tasks each; a list with a tree for each if shapes differ."""
    first, rebuild = split(pieces[0][1])
    if len(pieces) == 1 and len(pieces[0][0]) == count:
        return pieces[0][1]
    trees = [(index, *split(tree)) for index, tree in pieces]
    if any([x.shape[1:] for x in tensors] != [x.shape[1:] for x in first] for _, tensors, _ in trees):
        each = {i: own([x[k] for x in xs]) for index, xs, own in trees for k, i in enumerate(index)}
        return [each[i] for i in range(count)]
    whole = [x.new_full((count, *x.shape[1:]), missing) for x in first]
    for index, tensors, _ in trees:
        for target, x in zip(whole, tensors, strict=True):
            target[list(index)] = x
    return rebuild(whole)


def named(tasks: Sequence[int], count: int) -> str:
    shown = ", ".join(map(str, sorted(tasks)[:10])) + (", …" if len(tasks) > 10 else "")
    return f"{len(tasks)} of {count} tasks ({shown})"


def report_failed(
    failed: list[int], count: int, on_failure: OnFailure, fate: str = "they are left out of the meta-gradient"
) -> None:
    if not failed or on_failure == "ignore":
        return
    text = f"{named(failed, count)} diverged, and {fate}: {REMEDY}"
    if on_failure == "raise":
        raise TaskError(text, sorted(failed))
    warn(text, NotFinite)


def report_unreached(unreached: set[int], hparams: PyTree, method: str) -> None:
    if unreached:
        names = flatten(hparams, "hparams")[1]
        warn(
            f"{method} gives a gradient of zero for {', '.join(names[i] for i in sorted(unreached)[:5])}, on which "
            f"nothing that it differentiates depends: is it read as a number (.item(), float()), or is it used only in "
            f"what this method treats as constant?"
        )


def report_unsolved(result: MetaGradient, on_failure: OnFailure) -> None:
    """Warn of adjoint systems and inner problems that are not solved; "raise" raises for the adjoint systems."""
    if on_failure == "ignore" or result.adjoint_residual is None or result.inner_distance is None:
        return
    count = len(result.statuses)
    bad = [i for i, s in enumerate(result.statuses) if s.value > Status.COMPLETED.value and s is not Status.NON_FINITE]
    if bad:
        worst = max(bad, key=lambda i: result.statuses[i].value)
        text = (
            f"the adjoint systems of {named(bad, count)} are not solved; task {worst}, at a relative residual of "
            f"{float(result.adjoint_residual[worst]):.2e}: {result.statuses[worst].name}: "
            f"{result.statuses[worst].message}"
        )
        if on_failure == "raise":
            raise TaskError(text, bad)
        warn(text, NotConverged)
    far = (result.inner_distance > UNSOLVED).nonzero().flatten().tolist()
    if far:
        warn(
            f"the inner problems of {named(far, count)} are not solved: params are an estimated "
            f"{float(result.inner_distance.nan_to_num().max()):.1%} (of their norm) or more away from the solution, so "
            f"the implicit gradient means little there. Take more steps, regularise more, or use Unrolled()",
            UnsolvedInnerProblem,
        )
