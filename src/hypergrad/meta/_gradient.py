"""The meta-gradient over all tasks: chunk by chunk, with the tasks that diverge found, named and left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from .._random import random_state_kept_on_error
from .._solution import OnFailure, finite
from .._tree import PyTree, flatten, split
from ..diff_optimizers import SGD, GroupLasso, Rule
from ..implicit import accumulate, check_hparams
from ._methods import Implicit, Method, Part
from ._result import Adaptation, MetaGradient, Reduction, Total, joined, report_failed, report_unsolved
from ._tasks import Chunk, Diverged, Problem, Tasks, chunks, finite_tasks, make_plan


def grad(
    inner_loss: Callable[[PyTree, PyTree, PyTree], Tensor],
    outer_loss: Callable[[PyTree, PyTree, PyTree], Tensor] | None,
    hparams: PyTree,
    tasks: PyTree,
    *,
    method: Method,
    steps: int,
    rule: Rule | None = None,
    start: Callable[[PyTree, PyTree], PyTree] | None = None,
    reduction: Reduction = "mean",
    batched: bool = False,
    chunk: int | None = None,
    memory: str | int = "1GiB",
    on_failure: OnFailure = "warn",
) -> MetaGradient:
    """Meta-gradient ∇f(λ) of f(λ) = (1/B) Σᵢ E(wᵢ(λ), λ, taskᵢ) over B tasks at once. Changes nothing of the user's.

    wᵢ is where T steps of the rule on g(·, λ, taskᵢ) end, from w₀(λ). Losses are those of one task; all tasks, or as
    many as pay, are evaluated side by side (torch.func.vmap), and their adjoint systems are solved together.

    Args:
        inner_loss: g(params, hparams, task), scalar. A module enters by torch.func.functional_call or nn.functional,
            which leaves the buffers alone; buffers of each task may be part of tasks.
        outer_loss: E(params, hparams, task), scalar; None with `Reptile`, which needs none.
        hparams: λ, a tensor or any pytree of floating point tensors; at least one leaf requires grad.
        tasks: a pytree of tensors (support and query sets, say) whose first axes count the tasks; a task is the same
            pytree without that axis. Sets of different sizes are padded, and weighted in the losses.
        method: `Implicit(solver=...)`, `Unrolled()`, `FirstOrder()` or `Reptile()`.
        steps: T ≥ 0.
        rule: inner optimiser, from hg.diff_optimizers; default SGD(lr=0.1). It sees params with their axis of tasks.
        start: w₀(hparams, task), the params of one task; default: hparams themselves.
        reduction: "mean" or "sum" over tasks, or "none": the gradient of each task.
        batched: the losses and start are the user's own for any number of tasks at once: params and tasks come with
            their leading axis, hparams without, and losses give one number a task, [B].
        chunk: how many tasks go side by side; 1 is a loop. None: all that fit into `memory`; on a CPU one, where
            the graph of one task's inner loss keeps more than 2 MiB (see `Plan`).
        memory: budget in bytes, or like "1GiB", that chunk is chosen for; an estimate.
        on_failure: what to do where tasks diverge: "warn" (HypergradientWarning), "raise" (TaskError), or "ignore".

    Returns:
        A MetaGradient. A task whose params, outer loss or gradient is not finite is left out of the mean or sum (of
        the others alone), named in the warning, and NON_FINITE in `statuses`.

    Raises:
        TypeError, ValueError: something is not of the form above; the message says what came.
        TaskError: a task diverged and on_failure is "raise", or all tasks did.
    Warns: HypergradientWarning, with the numbers of the tasks, where tasks diverge, and (`Implicit`, by its solver's
        on_failure) where adjoint systems or inner problems are not solved.
    Cost: that of the method, for each task. To choose chunk, one evaluation of one task's inner loss. One device
        synchronisation or two a chunk. Where tasks diverge their chunk is done again without them.

    Example:
        Task i: w minimises ½(w − cᵢ)² + ½(w − λ)², so w = (cᵢ + λ)/2, and E = ½w² gives ∇f = mean (cᵢ + λ)/4.

        >>> lam, c = torch.tensor(2.0, requires_grad=True), torch.tensor([0.0, 4.0])
        >>> inner = hg.meta.biased(lambda w, lam, c: (w - c) ** 2 / 2, strength=1.0)
        >>> result = grad(inner, lambda w, lam, c: w**2 / 2, lam, c, method=hg.meta.Implicit(), steps=100)
        >>> result.grads, result.params
        (tensor(1.0000), tensor([1.0000, 3.0000]))
    """
    outer, names, rebuild = flatten(hparams, "hparams")
    check_hparams(outer, names)
    hparams = rebuild(outer)
    if not isinstance(method, Method):
        raise TypeError(f"method must be Implicit(), Unrolled(), FirstOrder() or Reptile(), got {method!r}")
    if outer_loss is None and method.needs_outer_loss:
        raise TypeError(f"{type(method).__name__} needs an outer_loss; only Reptile does without")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    problem = _problem(inner_loss, outer_loss, start, rule, steps, batched, on_failure)
    each_alone = reduction == "none" and (batched or problem.rule_calls)
    given = Tasks(tasks)
    with random_state_kept_on_error(outer):
        plan = make_plan(problem, given, hparams, chunk, memory, method._need(steps), each_alone)
        total = Total(given.count, reduction, hparams)
        for index in chunks(plan, range(given.count)):
            for some, part in _parts(method, problem, given, hparams, index, total, plan.outer_chunk == 1):
                total.add(some, part)
        result = total.result(plan, outer_loss is not None)
        report_failed(result.failed, given.count, on_failure)
        if isinstance(method, Implicit):
            report_unsolved(result, method._on_failure)
    return result


def backward(
    inner_loss: Callable[..., Tensor],
    outer_loss: Callable[..., Tensor] | None,
    hparams: PyTree,
    tasks: PyTree,
    **options: Any,
) -> MetaGradient:
    """As `grad`, and adds ∇f(λ) to .grad of hparams' leaves as loss.backward() does.

    Args: those of `grad`; reduction is "mean" or "sum".

    Example:
        >>> lam, c = torch.tensor(2.0, requires_grad=True), torch.tensor([0.0, 4.0])
        >>> loss = lambda w, lam, c: (w - c) ** 2 / 2
        >>> _ = backward(loss, loss, lam, c, method=hg.meta.FirstOrder(), steps=1)
        >>> lam.grad
        tensor(0.)
    """
    if options.get("reduction") == "none":
        raise ValueError('backward adds one gradient to .grad: reduction must be "mean" or "sum"; grad gives each')
    hparams = list(hparams) if isinstance(hparams, Iterator) else hparams
    with random_state_kept_on_error(optree.tree_leaves(hparams)):
        result = grad(inner_loss, outer_loss, hparams, tasks, **options)
        accumulate(hparams, result.grads)
    return result


def adapt(
    inner_loss: Callable[[PyTree, PyTree, PyTree], Tensor],
    hparams: PyTree,
    tasks: PyTree,
    *,
    steps: int,
    rule: Rule | None = None,
    start: Callable[[PyTree, PyTree], PyTree] | None = None,
    batched: bool = False,
    chunk: int | None = None,
    memory: str | int = "1GiB",
    on_failure: OnFailure = "warn",
) -> Adaptation:
    """w_T of each task, without a gradient: what a trained model is tested with.

    Args: those of `grad`.

    Returns: an Adaptation.
    Raises: TypeError, ValueError as in `grad`; TaskError where a task diverged and on_failure is "raise".
    Warns: HypergradientWarning, naming the tasks whose params are not finite.
    Cost: T gradients of each task.

    Example:
        >>> loss = lambda w, lam, c: (w - c) ** 2 / 2
        >>> adapt(loss, torch.tensor(2.0), torch.tensor([0.0, 4.0]), steps=1).params
        tensor([1.8000, 2.2000])
    """
    outer, _, rebuild = flatten(hparams, "hparams")
    hparams = rebuild([x.detach() for x in outer])
    problem = _problem(inner_loss, None, start, rule, steps, batched, on_failure)
    given = Tasks(tasks)
    with random_state_kept_on_error(outer):
        plan = make_plan(problem, given, hparams, chunk, memory, (2, 8), False)
        pieces, failed = [], []
        for index in chunks(plan, range(given.count)):
            one = Chunk(problem, given, index)
            params = one.adapt(hparams, one.start(hparams))
            good = finite_tasks(flatten(params, "params")[0]).tolist()
            failed += [i for i, well in zip(index, good, strict=True) if not well]
            pieces.append((index, params))
        report_failed(failed, given.count, on_failure, "they hold NaN or infinity")
    return Adaptation(joined(pieces, given.count), failed, plan)


def each(
    function: Callable[[PyTree, PyTree, PyTree], PyTree],
    params: PyTree,
    hparams: PyTree,
    tasks: PyTree,
    *,
    chunk: int | None = None,
) -> PyTree:
    """function(params, hparams, task) of each task, stacked: predictions or accuracies after `adapt`, say.

    Args:
        function: of one task, without derivatives; gives a tensor or a pytree of tensors.
        params: with a leading axis of tasks, as `adapt` gives them.
        hparams, tasks: as in `grad`.
        chunk: how many tasks go side by side: `plan.chunk` of the adaptation, say; default: all.

    Example:
        >>> each(lambda w, lam, c: w * c, torch.tensor([1.0, 2.0]), torch.tensor(0.0), torch.tensor([3.0, 4.0]))
        tensor([3., 8.])
    """
    given = Tasks(tasks)
    problem = Problem(lambda *_: torch.empty(()), None, None, SGD(lr=0.1), 0, False)
    pieces, (leaves, whole) = [], split(params)
    for i, x in enumerate(leaves):
        if not x.ndim or x.shape[0] != given.count:
            raise ValueError(
                f"params must have a leading axis of {given.count} tasks: tensor {i} has shape {tuple(x.shape)}"
            )
    plan = make_plan(problem, given, hparams, chunk or given.count, 1, (0, 0), False)
    found: dict[str, Any] = {}

    def flat(*trees: PyTree) -> list[Tensor]:
        tensors, found["rebuild"] = split(function(*trees))
        return tensors

    with torch.no_grad():
        for index in chunks(plan, range(given.count)):
            own = whole([x[index[0] : index[-1] + 1] for x in leaves])
            pieces.append(Chunk(problem, given, index).map(flat, (own, hparams), (True, False)))
    return found["rebuild"]([torch.cat(parts) for parts in zip(*pieces, strict=True)])


def _problem(
    inner_loss: Callable[..., Tensor],
    outer_loss: Callable[..., Tensor] | None,
    start: Callable[..., PyTree] | None,
    rule: Rule | None,
    steps: int,
    batched: bool,
    on_failure: str,
) -> Problem:
    if not (callable(inner_loss) and (outer_loss is None or callable(outer_loss))):
        raise TypeError("inner_loss and outer_loss must be functions of (params, hparams, task)")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps must be an integer ≥ 0, got {steps!r}")
    if on_failure not in ("warn", "raise", "ignore"):
        raise ValueError(f'on_failure must be "warn", "raise" or "ignore", got {on_failure!r}')
    rule = SGD(lr=0.1) if rule is None else rule
    if not isinstance(rule, Rule):
        raise TypeError(f"rule must be an update rule of hg.diff_optimizers, such as SGD(lr=0.1); got {rule!r}")
    prox = getattr(rule, "prox", None)
    if isinstance(prox, GroupLasso) and (prox.dim is None or prox.dim >= 0):
        raise ValueError(
            f"GroupLasso(dim={prox.dim}) would take all tasks, the first axis, for one group: count dim from the end"
        )
    return Problem(inner_loss, outer_loss, start, rule, steps, batched)


def _parts(
    method: Method,
    problem: Problem,
    tasks: Tasks,
    hparams: PyTree,
    index: Sequence[int],
    total: Total,
    loop: bool,
) -> Iterator[tuple[Sequence[int], Part]]:
    """The parts of the meta-gradient that are finite: of a chunk as a whole, or of those of its tasks that are."""
    rows = total.reduction == "none" and len(index) > 1
    chunk = Chunk(problem, tasks, index, rows, loop)
    try:
        part = method._take(chunk, _own_copies(hparams, len(index)) if rows else hparams)
    except Diverged as found:
        good = [i for i, good in zip(index, found.good.tolist(), strict=True) if good]
        total.fail([i for i in index if i not in good], index, found.params, found.values)
        if good:
            yield from _parts(method, problem, tasks, hparams, good, total, loop)
        return
    if finite(optree.tree_leaves(part.grads)):
        yield index, part
    elif len(index) == 1:
        total.fail(index, index, part.params, part.values)
    else:
        for i in index:
            yield from _parts(method, problem, tasks, hparams, [i], total, loop)


def _own_copies(hparams: PyTree, count: int) -> PyTree:
    leaves, _, rebuild = flatten(hparams, "hparams")
    return rebuild([x.detach().expand(count, *x.shape).clone().requires_grad_(x.requires_grad) for x in leaves])
