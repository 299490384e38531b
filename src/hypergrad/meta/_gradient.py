"""The meta-gradient over all tasks: chunk by chunk, with the tasks that diverge found, named and left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import optree
import torch
from torch import Tensor

from .._solution import OnFailure, Status, finite, warn
from .._vector import PyTree, flatten, split
from ..diff_optimizers import SGD, GroupLasso, Rule
from ..implicit import UNSOLVED, Hypergradient, accumulate, check_hparams, random_state_kept_on_error
from ._methods import Implicit, Method, Part
from ._tasks import Chunk, Diverged, Plan, Problem, Tasks, chunks, finite_tasks, make_plan

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
    each_alone = reduction == "none" and (batched or problem.rule._calls())
    given = Tasks(tasks)
    with random_state_kept_on_error(outer):
        plan = make_plan(problem, given, hparams, chunk, memory, method._graphs(steps), each_alone)
        total = _Total(given.count, reduction, hparams)
        for index in chunks(plan, range(given.count)):
            for some, part in _parts(method, problem, given, hparams, index, total, plan.outer_chunk == 1):
                total.add(some, part)
        result = total.result(plan, outer_loss is not None)
        _report_failed(result.failed, given.count, on_failure)
        if isinstance(method, Implicit):
            _report_unsolved(result, method._on_failure)
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
        plan = make_plan(problem, given, hparams, chunk, memory, 3, False)
        pieces, failed = [], []
        for index in chunks(plan, range(given.count)):
            one = Chunk(problem, given, index)
            params = one.adapt(hparams, one.start(hparams))
            good = finite_tasks(flatten(params, "params")[0]).tolist()
            failed += [i for i, well in zip(index, good, strict=True) if not well]
            pieces.append((index, params))
        _report_failed(failed, given.count, on_failure, "they hold NaN or infinity")
    return Adaptation(_joined(pieces, given.count), failed, plan)


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
    plan = make_plan(problem, given, hparams, chunk or given.count, 1, 0, False)
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
    total: _Total,
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


@dataclass
class _Total:
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
            return _joined(parts, self.count, torch.nan)

        return MetaGradient(
            grads=flatten(self.hparams, "hparams")[2](grads),
            params=_joined(self.pieces, self.count),
            outer_values=_joined(self.values, self.count) if has_outer else None,
            statuses=[Status(code) for code in codes.tolist()],
            adjoint_residual=collect(lambda h: h.solution.relative_residual),
            inner_residual=collect(lambda h: h.inner_residual),
            inner_distance=collect(lambda h: h.inner_distance),
            plan=plan,
        )


def _joined(pieces: list[tuple[Sequence[int], PyTree]], count: int, missing: float = 0.0) -> PyTree:
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


def _named(tasks: Sequence[int], count: int) -> str:
    shown = ", ".join(map(str, sorted(tasks)[:10])) + (", …" if len(tasks) > 10 else "")
    return f"{len(tasks)} of {count} tasks ({shown})"


def _report_failed(
    failed: list[int],
    count: int,
    on_failure: OnFailure,
    fate: str = "they are left out of the meta-gradient",
) -> None:
    if not failed or on_failure == "ignore":
        return
    text = (
        f"{_named(failed, count)} diverged: params, losses or gradients hold NaN or infinity, and {fate}. "
        f"Use a smaller lr, fewer steps, or look at the losses and data of these tasks"
    )
    if on_failure == "raise":
        raise TaskError(text, sorted(failed))
    warn(text)


def _report_unsolved(result: MetaGradient, on_failure: OnFailure) -> None:
    if on_failure == "ignore":
        return
    count = len(result.statuses)
    bad = [i for i, s in enumerate(result.statuses) if s not in (Status.CONVERGED, Status.NON_FINITE)]
    if bad:
        assert result.adjoint_residual is not None
        worst = max(bad, key=lambda i: result.statuses[i].value)
        text = (
            f"the adjoint systems of {_named(bad, count)} are not solved; task {worst}, at a relative residual of "
            f"{float(result.adjoint_residual[worst]):.2e}: {result.statuses[worst].name}: "
            f"{result.statuses[worst].message}"
        )
        if on_failure == "raise":
            raise TaskError(text, bad)
        warn(text)
    assert result.inner_distance is not None
    far = (result.inner_distance > UNSOLVED).nonzero().flatten().tolist()
    if far:
        warn(
            f"the inner problems of {_named(far, count)} are not solved: params are an estimated "
            f"{float(result.inner_distance.nan_to_num().max()):.1%} (of their norm) or more away from the solution, so "
            f"the implicit gradient means little there. Take more steps, regularise more, or use Unrolled()"
        )
