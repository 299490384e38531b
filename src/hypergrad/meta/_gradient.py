"""The meta-gradient over all tasks, chunk by chunk; tasks that diverge are left out and named."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import add
from typing import Literal

import torch
from torch import Tensor

from .. import _autodiff, _graph, _random, _torch
from .._autodiff import check_hparams
from .._options import check_whole, memory_bytes
from .._reach import found_of
from .._solution import OnFailure, Status, finite
from .._torch import random_state_kept_on_error
from .._tree import KIND, PyTree, flatten, split
from ..diff_optimizers import SGD, Rule
from ..implicit import accumulate
from ..solvers import on_failure_of
from ._methods import Found, Implicit, Method, Reptile
from ._result import (
    REMEDY,
    Adaptation,
    MetaGradient,
    Piece,
    Plan,
    TaskError,
    collected,
    joined,
    report_failed,
    report_unreached,
    report_unsolved,
)
from ._tasks import Chunk, Diverged, Loss, TaskProblem, Tasks, finite_tasks, without_penalties

# On a CPU tasks run in parallel if the graph of one task's loss keeps at most so many bytes. Measured, one thread, 16
# tasks, time of the loop over that of vmap: MLPs of 10, 56 and 946 KiB 5.8, 2.9 and .9; 4 convolutions of .6 to 14 MiB
# 3.0 to .6, and .9 to 1.0 at 3.2 MiB, where arithmetic takes all the time, and vmap's grouped convolutions are slower.
SMALL_TASK = 2**21


def grad(
    outer_loss: Loss | None,
    inner_loss: Loss,
    hparams: PyTree,
    tasks: PyTree,
    *,
    method: Method,
    steps: int,
    rule: Rule | None = None,
    start: Callable[[PyTree, PyTree], PyTree] | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    chunk: int | None = None,
    memory: int | str = 2**30,
    on_failure: OnFailure = "warn",
) -> MetaGradient:
    """Meta-gradient ∇f(λ) of f(λ) = (1/B) Σᵢ E(wᵢ(λ), λ, taskᵢ) over B tasks. Writes no .grad and no parameter.

    wᵢ is the result of T steps of the rule on g(·, λ, taskᵢ) from w₀(λ). The losses take one task. All tasks, or as
    many as is faster, are evaluated in parallel (torch.func.vmap), and their adjoint systems are solved together.

    Args:
        outer_loss: E(params, hparams, task), scalar; None with `Reptile`, which needs none.
        inner_loss: g(params, hparams, task), scalar. Call a module by torch.func.functional_call or nn.functional,
            which does not write its buffers; buffers of each task may be part of tasks.
        hparams: λ, a tensor or any pytree of real floating point tensors; at least one leaf requires grad. Hooks on
            them are called once, with the result.
        tasks: a pytree of tensors (such as support and query sets) whose first axis runs over tasks; a task is the same
            pytree without that axis. Or tasks one by one, which may differ in size (those of one size run in
            parallel): a list of tuples or dicts, an iterator, or a DataLoader, whose batches are batches of tasks
            unless its batch_size is None.
        method: `Implicit(solver=...)`, `Unrolled()`, `FirstOrder()` or `Reptile()`.
        steps: T ≥ 0.
        rule: inner optimiser, from hg.diff_optimizers; default SGD(lr=0.1). Its params have a leading axis of tasks.
        start: w₀(hparams, task), the params of one task; default: hparams themselves. Leaves of hparams and Parameters
            in it with requires_grad=False are frozen: they are not adapted.
        reduction: "mean" or "sum" over tasks, or "none": the gradient of each task, one task at a time.
        chunk: number of tasks in parallel; 1 is a loop. By default as many as fit into `memory`, but one on a CPU if
            the graph of one task's inner loss keeps more than 2 MiB. If vmap cannot evaluate a loss (recurrent layers,
            .item(), masks, an if), chunk is 1 in any case, and `plan` of the result gives the reason.
        memory: budget for the choice of chunk, in bytes or like "1GiB"; the memory of a task is an estimate.
        on_failure: what to do if tasks diverge: "warn" (HypergradientWarning), "raise" (TaskError), or "ignore".

    Returns:
        A MetaGradient. A task whose params, outer loss or gradient is not finite is left out of the mean or sum (which
        is over the other tasks), named in the warning, and NON_FINITE in `statuses`.

    Raises:
        TypeError, ValueError: an argument does not have the form above; the message says what was passed.
        TaskError: a task diverged and on_failure is "raise", or all tasks diverged.
    Warns: HypergradientWarning, with the indices of the tasks, if tasks diverge, and (for `Implicit`, by its solver's
        on_failure) if adjoint systems or inner problems are not solved; also if nothing depends on a leaf of hparams.
    Cost: that of the method, for each task. To choose chunk, one evaluation of one task's losses. Two or
        three device synchronisations for each chunk. If tasks diverge, their chunk is repeated without them.

    Example:
        Task i: w minimises ½(w − cᵢ)² + ½(w − λ)², so w = (cᵢ + λ)/2, and E = ½w² gives ∇f = mean (cᵢ + λ)/4.

        >>> lam, c = torch.tensor(2.0, requires_grad=True), torch.tensor([0.0, 4.0])
        >>> inner = hg.meta.biased(lambda w, lam, c: (w - c) ** 2 / 2, strength=1.0)
        >>> result = grad(lambda w, lam, c: w**2 / 2, inner, lam, c, method=hg.meta.Implicit(), steps=100)
        >>> result.grads, result.params
        (tensor(1.0000), tensor([1.0000, 3.0000]))
    """
    problem = TaskProblem(outer_loss, inner_loss, start, SGD(lr=0.1) if rule is None else rule, steps, on_failure)
    _check_method(method, outer_loss, reduction)
    leaves, names, rebuild = flatten(hparams, "hparams")
    check_hparams(leaves, names)
    hparams, given = rebuild(leaves), Tasks(tasks)
    pieces: list[Piece] = []
    total: list[Tensor] = []
    rows: list[tuple[list[int], list[Tensor]]] = []  # indices and gradients of tasks, with reduction="none"
    unreached = set(range(len(leaves)))

    def evaluate(index: list[int], plan: Plan) -> list[list[int]]:
        some = Chunk(problem, given, index, loop=plan.outer_chunk == 1)
        ended, found, again = _differentiated(method, some, hparams)
        pieces.extend(ended)
        if found is not None:
            unreached.intersection_update(found.unreached)
            if reduction == "none":
                rows.append((index, found.grads))
            total[:] = map(add, total, found.grads) if total else found.grads
        return again

    kept = _autodiff.graphs_kept()  # all chunks share the graphs of hparams, and of what losses close over
    random, outside = random_state_kept_on_error(leaves), _torch.outside_inference_mode()
    with random, outside, torch.enable_grad(), kept, _torch.hooks_suspended(leaves) as hooked:
        plan = _plan(problem, given, hparams, chunk, memory, method._need(steps), one_by_one=reduction == "none")
        plan = _each_chunk(evaluate, plan, given, leaves)
        failed = [i for piece in pieces for i in piece.index if piece.statuses[0] is Status.NON_FINITE]
        if not total:
            raise TaskError(f"all {given.count} tasks diverged, so there is no meta-gradient: {REMEDY}", sorted(failed))
        report_failed(failed, given.count, on_failure)
        report_unreached(unreached, hparams, type(method).__name__)
    if reduction == "mean":
        total = [g / (given.count - len(failed)) for g in total]
    if reduction == "none":
        hooks = [(index, _torch.with_hooks(leaves, own, hooked)) for index, own in rows]
        grads = joined([(index, [g.unsqueeze(0) for g in own]) for index, own in hooks], given.count)
    else:
        grads = _torch.with_hooks(leaves, total, hooked)
    result = collected(pieces, rebuild(grads), plan)
    if isinstance(method, Implicit):
        report_unsolved(result, on_failure_of(method.solver))
    return result


def backward(
    outer_loss: Loss | None,
    inner_loss: Loss,
    hparams: PyTree,
    tasks: PyTree,
    *,
    method: Method,
    steps: int,
    rule: Rule | None = None,
    start: Callable[[PyTree, PyTree], PyTree] | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    chunk: int | None = None,
    memory: int | str = 2**30,
    on_failure: OnFailure = "warn",
) -> MetaGradient:
    """As `grad`, but adds ∇f(λ) to .grad of hparams' leaves, as loss.backward() does.

    Args: those of `grad`; reduction is "mean" or "sum".

    Example:
        >>> lam, c = torch.tensor(2.0, requires_grad=True), torch.tensor([0.0, 4.0])
        >>> loss = lambda w, lam, c: (w - c) ** 2 / 2
        >>> _ = backward(loss, loss, lam, c, method=hg.meta.FirstOrder(), steps=1)
        >>> lam.grad
        tensor(0.)
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f'backward adds one gradient: reduction must be "mean" or "sum", got {reduction!r}')
    leaves, _, rebuild = flatten(hparams, "hparams")
    hparams = rebuild(leaves)
    with random_state_kept_on_error(leaves):
        result = grad(
            outer_loss,
            inner_loss,
            hparams,
            tasks,
            method=method,
            steps=steps,
            rule=rule,
            start=start,
            reduction=reduction,
            chunk=chunk,
            memory=memory,
            on_failure=on_failure,
        )
        with _torch.hooks_suspended(leaves):  # `grad` has called them already
            accumulate(hparams, result.grads)
    return result


def adapt(
    inner_loss: Loss,
    hparams: PyTree,
    tasks: PyTree,
    *,
    steps: int,
    rule: Rule | None = None,
    start: Callable[[PyTree, PyTree], PyTree] | None = None,
    chunk: int | None = None,
    memory: int | str = 2**30,
    on_failure: OnFailure = "warn",
) -> Adaptation:
    """w_T of each task, without a meta-gradient, to test a trained model.

    Args: those of `grad`. If no leaf of hparams requires grad, none is frozen.

    Returns: an Adaptation.
    Raises: TypeError, ValueError as in `grad`; TaskError if a task diverged and on_failure is "raise".
    Warns: HypergradientWarning, naming the tasks whose params are not finite.
    Cost: T gradients of each task.

    Example:
        >>> loss = lambda w, lam, c: (w - c) ** 2 / 2
        >>> adapt(loss, torch.tensor(2.0), torch.tensor([0.0, 4.0]), steps=1).params
        tensor([1.8000, 2.2000])
    """
    problem = TaskProblem(None, inner_loss, start, SGD(lr=0.1) if rule is None else rule, steps, on_failure)
    given = Tasks(tasks)
    pieces: list[tuple[Sequence[int], PyTree]] = []
    failed: list[int] = []

    def evaluate(index: list[int], plan: Plan) -> list[list[int]]:
        some = Chunk(problem, given, index)
        with torch.no_grad():
            params = some.adapt(some.start(hparams), hparams)
        failed.extend(i for i, good in zip(index, finite_tasks(params), strict=True) if not good)
        pieces.append((index, some.rebuild(params)))
        return []

    leaves = flatten(hparams, "hparams")[0]
    with random_state_kept_on_error(leaves):
        plan = _each_chunk(evaluate, _plan(problem, given, hparams, chunk, memory, (2, 8)), given, leaves)
        report_failed(failed, given.count, on_failure, "they hold NaN or infinity")
    return Adaptation(joined(pieces, given.count), sorted(failed), plan)


def _check_method(method: Method, outer_loss: Loss | None, reduction: str) -> None:
    if not isinstance(method, Method):
        raise TypeError(f"method must be Implicit(), Unrolled(), FirstOrder() or Reptile(), got {method!r}")
    if outer_loss is None and not isinstance(method, Reptile):
        raise TypeError(f"{type(method).__name__} needs an outer_loss; only Reptile does without")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')


def _differentiated(method: Method, some: Chunk, hparams: PyTree) -> tuple[list[Piece], Found | None, list[list[int]]]:
    """The finished tasks, the sum of their gradients or None, and lists of the tasks that must be evaluated again."""
    index = some.index
    try:
        found = method._differentiate(some, hparams)
    except Diverged as error:
        good = error.good
    else:
        if finite(found.grads):
            statuses = found.statuses or [Status.COMPLETED] * len(index)
            return [Piece(index, some.params, some.values, statuses, found.residuals)], found, []
        if len(index) > 1:
            return [], None, [[i] for i in index]
        good = [False]
    bad = [k for k, finite in enumerate(good) if not finite]
    rest = [i for i, finite in zip(index, good, strict=True) if finite]
    piece = Piece([index[k] for k in bad], *some.rows(bad), [Status.NON_FINITE] * len(bad))
    return [piece], None, [rest] if rest else []


def _each_chunk(
    evaluate: Callable[[list[int], Plan], list[list[int]]], plan: Plan, tasks: Tasks, leaves: list[Tensor]
) -> Plan:
    """Evaluate all tasks, `plan.chunk` at a time, or one at a time after an error. Returns the plan as carried out.

    evaluate: (indices of some tasks, plan) ↦ lists of indices to be evaluated again.
    """
    size = plan.chunk
    waiting = deque(group[i : i + size] for group in tasks.groups for i in range(0, len(group), size))
    while waiting:
        index = waiting.popleft()
        try:
            with random_state_kept_on_error(leaves):
                again = evaluate(index, plan)
        except Exception as error:  # an error that is not due to vmap occurs with one task alone too
            if len(index) == 1:
                raise
            reason = f"one by one, because in parallel {type(error).__name__}: {str(error).partition(chr(10))[0]}"
            plan = replace(plan, chunk=1, outer_chunk=1, reason=reason)
            again, waiting = [[i] for some in (index, *waiting) for i in some], deque()
        waiting.extendleft(reversed(again))
    return plan


def _plan(
    problem: TaskProblem,
    tasks: Tasks,
    hparams: PyTree,
    chunk: int | None,
    memory: int | str,
    need: tuple[float, float],
    one_by_one: bool = False,
) -> Plan:
    """The number of tasks in parallel: chunk if given, otherwise by the budget and, on a CPU, the size of one task.

    need: the memory of one task is need[0] graphs of its inner loss and need[1] vectors of its params.
    """
    check_whole(chunk=(chunk, 1))
    budget, most = memory_bytes(memory, "memory"), max(map(len, tasks.groups))
    if one_by_one:
        return Plan(1, 1, None, 'one by one, so that reduction="none" is exact')
    if chunk is not None:
        return Plan(min(chunk, most), min(chunk, most), None, "given")
    inner, outer, params = _sizes(problem, tasks, hparams)
    on_cpu = flatten(hparams, "hparams")[0][0].device.type == "cpu"
    if on_cpu and inner > SMALL_TASK:
        return Plan(1, 1, None, f"a loop: one task keeps {inner / 2**20:.1f} MiB, so arithmetic takes most of the time")
    size = max(int(need[0] * inner + 3 * outer + need[1] * params), 1)
    fit = int(min(max(budget // size, 1), most))
    why = f"as many as fit into {budget / 2**20:.0f} MiB"
    if fit == most:
        why = "all at once" if len(tasks.groups) == 1 else "all of one size at once"
    each = f"about {size / 2**20:.2f} MiB for each task"
    return Plan(fit, 1 if on_cpu and outer > SMALL_TASK else fit, size, f"{why}: {each}")


def _sizes(problem: TaskProblem, tasks: Tasks, hparams: PyTree) -> tuple[int, int, int]:
    """`_bytes_of_a_task`, measured once for an inner loss and the forms of the arguments of the losses."""
    tensors = [*tasks.tensors, *flatten(hparams, "hparams")[0]]
    codes = [getattr(function, "__code__", None) for function in (problem.outer_loss, problem.start)]
    forms = [(*KIND(x), x.requires_grad) for x in tensors]
    key = "bytes of a task", *codes, *forms, *map(len, tasks.groups)
    found = found_of(without_penalties(problem.inner_loss)[0])
    if key not in found:
        found[key] = _bytes_of_a_task(problem, tasks, hparams)
    return found[key]


def _bytes_of_a_task(problem: TaskProblem, tasks: Tasks, hparams: PyTree) -> tuple[int, int, int]:
    """Bytes kept by the graphs of the inner and of the outer loss of the largest task, and bytes of its params."""
    largest = max(tasks.groups, key=lambda group: sum(x.numel() for x in split(tasks.take(group[:1]))[0]))
    chunk = Chunk(problem, tasks, largest[:1])
    leaves, _, rebuild = flatten(hparams, "hparams")
    with _random.replayed(_random.capture(_random.devices_of(leaves))), torch.enable_grad():
        params = [x.detach().requires_grad_() for x in chunk.start(hparams)]
        hparams = rebuild([x.detach() for x in leaves])
        known = [*tasks.tensors, *params, *leaves]
        loss, outer = without_penalties(problem.inner_loss)[0], 0
        inner = _kept(chunk.losses(loss, "inner_loss", params, hparams), known)
        if problem.outer_loss is not None:
            outer = _kept(chunk.losses(problem.outer_loss, "outer_loss", params, hparams), known)
    return inner, outer, sum(x.nbytes for x in params)


def _kept(loss: Tensor, known: list[Tensor]) -> int:
    """Bytes that the graph of a loss keeps, without the known tensors, which exist anyway (tasks are views of one)."""
    sizes = _graph.saved_bytes([loss], set())
    for x in known:
        sizes.pop(x.untyped_storage().data_ptr(), None)
    return sum(sizes.values())
