"""Tasks side by side: their losses as [B] numbers, by vmap, one at a time, or by the user's own batched loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .. import _autodiff, _graph
from .._autodiff import as_scalar
from .._tree import PyTree, describe, difference, flatten, split
from ..diff_optimizers import Rule, State, plus
from ..unroll import parse_bytes
from ._spelling import Spelled

# Bytes that the graph of one task's loss may keep for tasks to go side by side on a CPU. Measured, one thread, 16
# tasks, time of the loop over that of vmap: MLP 40-40 (10 KiB) 5.8, MLP 100-100 (56 KiB) 2.9, MLP 400-400 (946 KiB)
# .9; 4 convolutions of 8 / 16 / 32 filters on 5 images (.6 / .9 / 1.6 MiB) 3.0 / 1.9 / 1.3; of 64 filters (3.2 MiB)
# .9 to 1.0; 16 / 32 / 64 filters on 25 images (4 / 8 / 14 MiB) .9 / .7 / .6: there the arithmetic is all, and vmap's
# grouped convolutions and big buffers do it slower.
SMALL_TASK = 2**21


@dataclass(frozen=True)
class Plan:
    """How many tasks go side by side, and why.

    Attributes:
        chunk: tasks at once; 1 is a loop over tasks.
        outer_chunk: tasks at once in the outer loss: chunk, or 1 where its graph is big (many query images).
        task_bytes: estimated memory of one task; None where nothing had to be estimated.
        reason: in words.
    """

    chunk: int
    outer_chunk: int
    task_bytes: int | None
    reason: str


@dataclass(frozen=True)
class biased:
    """The inner loss of one task, ℓ(w, λ, task) + ½ρ ‖w − λ‖²: biased regularisation.

    Args:
        loss: ℓ(params, hparams, task), scalar.
        strength: ρ > 0, a number or a 0-d tensor.
        centre: the part of hparams that params are drawn to, of params' structure; default: hparams itself.

    Returns: g(params, hparams, task).
    Cost: beside ℓ, one pass over params for all tasks together.
    Source: Rajeswaran et al. 2019, equation 3.

    Example:
        >>> g = biased(lambda w, lam, task: 0.0 * w.sum(), strength=2.0)
        >>> g(torch.ones(3), torch.zeros(3), None)
        tensor(3.)
    """

    loss: Callable[[PyTree, PyTree, PyTree], Tensor]
    strength: float | Tensor
    centre: Callable[[PyTree], PyTree] | None = None

    def __call__(self, params: PyTree, hparams: PyTree, task: PyTree) -> Tensor:
        return self.loss(params, hparams, task) + self._penalty(params, hparams, 0)

    def _penalty(self, params: PyTree, hparams: PyTree, batch_dims: int) -> Tensor:
        """½ρ ‖w − λ‖² of each task: 0-d, or [B]."""
        flat = [d.reshape(*d.shape[:batch_dims], -1) for d in self._away(split(params)[0], hparams)]
        return 0.5 * self.strength * torch.stack([torch.linalg.vecdot(d, d) for d in flat]).sum(0)

    def _pulled(self, grads: list[Tensor], leaves: list[Tensor], hparams: PyTree) -> list[Tensor]:
        """∇₁ℓ + ρ (w − λ)"""
        return [plus(g, self.strength, d) for g, d in zip(grads, self._away(leaves, hparams), strict=True)]

    def _away(self, leaves: list[Tensor], hparams: PyTree) -> tuple[Tensor, ...]:
        return difference(leaves, split(hparams if self.centre is None else self.centre(hparams))[0])


@dataclass(frozen=True)
class Problem:
    """What is the same for all tasks."""

    inner_loss: Callable[..., Tensor]
    outer_loss: Callable[..., Tensor] | None
    start: Callable[..., PyTree] | None
    rule: Rule
    steps: int
    batched: bool

    @cached_property
    def inner(self) -> tuple[Callable[..., Tensor], list[biased]]:
        """The inner loss without its regularisations, and these."""
        loss, regularisations = self.inner_loss, []
        while isinstance(loss, biased):
            regularisations.append(loss)
            loss = loss.loss
        return loss, regularisations

    @cached_property
    def rule_calls(self) -> bool:
        """Whether a hyperparameter of the rule is a callable of hparams."""
        return self.rule.needs_hparams


class Tasks:
    """The tasks as given, checked: a pytree whose tensors have one leading axis of the same length."""

    def __init__(self, tasks: PyTree):
        self.tensors, self.rebuild = split(tasks)
        if not self.tensors:
            raise ValueError("tasks holds no tensor")
        first = self.tensors[0]
        for i, x in enumerate(self.tensors):
            if not x.ndim or x.shape[0] != first.shape[0]:
                raise ValueError(
                    f"the first axis of every tensor in tasks counts tasks: tensor 0 has shape {tuple(first.shape)}, "
                    f"tensor {i} has {tuple(x.shape)}"
                )
        self.count = first.shape[0]
        if not self.count:
            raise ValueError("tasks holds no task: the first axis of its tensors has length 0")

    def take(self, index: Sequence[int]) -> list[Tensor]:
        """The tensors of some tasks; views where these are neighbours."""
        if list(index) == list(range(index[0], index[0] + len(index))):
            return [x[index[0] : index[0] + len(index)] for x in self.tensors]
        return [x[torch.tensor(index, device=x.device)] for x in self.tensors]


class Diverged(Exception):
    """Tasks whose inner loop or outer loss is not finite. `good` says of each task of the chunk whether it is."""

    def __init__(self, good: Tensor, params: PyTree, values: Tensor):
        super().__init__("a task diverged")
        self.good, self.params, self.values = good, params, values


class Chunk:
    """Some tasks at once; in the outer loss one by one where `loop` says so.

    With `rows` each task has its own copy of hparams, whose leaves are then [B, ...].
    """

    def __init__(self, problem: Problem, tasks: Tasks, index: Sequence[int], rows: bool = False, loop: bool = False):
        self.problem, self.index, self.rows, self.loop = problem, list(index), rows, loop
        self.tree = tasks.rebuild(tasks.take(index))
        self.params: PyTree = None
        self.values = torch.empty(0)

    def slope(self, params: PyTree, hparams: PyTree) -> PyTree:
        """∇₁g of each task: the gradient of Σᵢ g(wᵢ, λ, taskᵢ), whose Hessian is block diagonal."""
        leaves, rebuild = split(params)
        return rebuild(self._slopes(leaves, rebuild(leaves), hparams, create_graph=True))

    def step(self, carry: tuple[PyTree, State], hparams: PyTree, create_graph: bool = True) -> tuple[PyTree, State]:
        """A step of the rule on Σᵢ g."""
        params, state = carry
        leaves, rebuild = split(params)
        with torch.enable_grad():
            leaves = [w if create_graph and w.requires_grad else w.detach().requires_grad_() for w in leaves]
            at = rebuild(leaves)
            grads = rebuild(self._slopes(leaves, at, hparams, create_graph))
        called = hparams if self.problem.rule_calls else None
        with torch.set_grad_enabled(create_graph):
            return self.problem.rule.update(at if create_graph else params, state, grads, called)

    def _slopes(self, leaves: list[Tensor], params: PyTree, hparams: PyTree, create_graph: bool) -> list[Tensor]:
        """∇₁g with respect to the leaves of params, which require grad.

        Biased regularisation enters by its derivative ρ (w − λ), which takes a fraction of the nodes that autograd
        makes of its value.
        """
        loss, regularisations = (self.problem.inner_loss, []) if self.rows else self.problem.inner
        losses = self.losses(loss, "inner_loss", params, hparams)
        message = None if regularisations else "inner_loss does not depend on params; was it computed under no_grad?"
        ones = [torch.ones_like(losses)]
        grads = _autodiff.grad([losses], leaves, ones, create_graph=create_graph, must_reach=message)
        with torch.set_grad_enabled(create_graph):
            for each in regularisations:
                grads = each._pulled(grads, leaves, hparams)
        return grads

    def outer(self, params: PyTree, hparams: PyTree) -> Tensor:
        """Σᵢ E(wᵢ, λ, taskᵢ). Keeps params and each value. Raises Diverged where one is not finite."""
        self.params = params
        if self.problem.outer_loss is None:
            losses = flatten(params, "params")[0][0].new_zeros(len(self.index))
        else:
            losses = self.losses(self.problem.outer_loss, "outer_loss", params, hparams, self.loop)
        self.values = losses.detach()
        good = finite_tasks([self.values, *(x.detach() for x in flatten(params, "params")[0])])
        if not bool(good.all()):
            raise Diverged(good, params, self.values)
        return losses.sum()

    def start(self, hparams: PyTree) -> PyTree:
        """w₀ of each task, with its graph to hparams."""
        start = self.problem.start
        if start is None:
            leaves, _, rebuild = flatten(hparams, "hparams")
            return hparams if self.rows else rebuild([x.expand(len(self.index), *x.shape) for x in leaves])
        found: dict[str, Any] = {}

        def first(hparams: PyTree, tasks: PyTree) -> list[Tensor]:
            leaves, _, found["rebuild"] = flatten(start(hparams, tasks), "start(hparams, task)")
            return leaves

        leaves = self.map(first, (hparams,), (self.rows,))
        for x in leaves:
            if self.problem.batched and (not x.ndim or x.shape[0] != len(self.index)):
                raise ValueError(
                    f"with batched=True start gives params with a leading axis of {len(self.index)} tasks, got a "
                    f"tensor of shape {tuple(x.shape)}"
                )
        return found["rebuild"](leaves)

    def map(
        self, function: Callable[..., list[Tensor]], trees: Sequence[PyTree], mapped: Sequence[bool], loop: bool = False
    ) -> list[Tensor]:
        """function(*trees, task) of each task, stacked; trees that are mapped have a leading axis of tasks."""
        if self.problem.batched:
            return function(*trees, self.tree)
        own = [tree if each else None for tree, each in zip(trees, mapped, strict=True)]
        tensors, rebuild = split([*own, self.tree])

        def one(tensors: Sequence[Tensor]) -> list[Tensor]:
            *own, task = rebuild(tensors)
            return function(*(x if each else tree for x, tree, each in zip(own, trees, mapped, strict=True)), task)

        if len(self.index) == 1:  # squeezed, for the derivative of x[0] would be a new tensor of zeros, and a copy
            return [x.unsqueeze(0) for x in one([x.squeeze(0) for x in tensors])]
        if loop:
            results = [one(each) for each in zip(*(x.unbind() for x in tensors), strict=True)]
            return [torch.stack(stacked) for stacked in zip(*results, strict=True)]
        return _autodiff.each(one, tensors)

    def losses(
        self, loss: Callable[..., Tensor], name: str, params: PyTree, hparams: PyTree, loop: bool = False
    ) -> Tensor:
        """A loss of each task, [B]."""
        batched, count = self.problem.batched, len(self.index)
        if isinstance(loss, biased) and not self.rows:  # all tasks' penalties in one pass
            return self.losses(loss.loss, name, params, hparams, loop) + loss._penalty(params, hparams, 1)
        spelled = Spelled(1 if loop or batched else count)

        def value(params: PyTree, hparams: PyTree, tasks: PyTree) -> list[Tensor]:
            with spelled:
                result = loss(params, hparams, tasks)
            if not batched:
                result = as_scalar(result, f"{name} of one task")
                return [result.reshape(()) if result.ndim else result]
            if not isinstance(result, Tensor) or result.shape != (count,):
                got = type(result).__name__
                if isinstance(result, Tensor):
                    got = describe(result.shape, result.dtype, result.device)
                raise ValueError(f"with batched=True {name} gives one number a task, of shape ({count},); got {got}")
            return [result]

        return self.map(value, (params, hparams), (True, self.rows), loop)[0]

    def adapt(self, hparams: PyTree, start: PyTree) -> PyTree:
        """w_T of each task: T steps of the rule, without a graph."""
        leaves, _, rebuild = flatten(hparams, "hparams")
        hparams = rebuild([x.detach() for x in leaves])
        leaves, _, rebuild = flatten(start, "start")
        params = rebuild([x.detach() for x in leaves])
        carry = params, self.problem.rule.init(params)
        for _ in range(self.problem.steps):
            carry = self.step(carry, hparams, create_graph=False)
        return carry[0]


def finite_tasks(tensors: Sequence[Tensor]) -> Tensor:
    """Which rows are finite in all tensors, [B]: by their sums, and entry by entry only where a sum is not."""
    rows = [x.reshape(len(x), -1) for x in tensors]
    good = torch.isfinite(torch.stack([x.sum(1) for x in rows]).sum(0))
    return good if bool(good.all()) else torch.stack([torch.isfinite(x).all(1) for x in rows]).all(0)


def chunks(plan: Plan, index: Sequence[int]) -> Iterator[Sequence[int]]:
    for begin in range(0, len(index), plan.chunk):
        yield index[begin : begin + plan.chunk]


def make_plan(
    problem: Problem,
    tasks: Tasks,
    hparams: PyTree,
    chunk: int | None,
    memory: str | int,
    need: tuple[float, float],
    alone: bool,
) -> Plan:
    """The number of tasks side by side: as given, or by the size of one task's graphs, on a CPU, and the budget.

    need: memory of one task, in graphs of its inner loss and in vectors of its params.
    """
    if chunk is not None:
        if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
            raise ValueError(f"chunk must be a number of tasks ≥ 1, or None to let it be chosen; got {chunk!r}")
        if alone and chunk > 1:
            raise ValueError(
                'reduction="none" with batched=True or a rule that reads hparams takes one task at a time: chunk must '
                f"be None or 1, got {chunk}"
            )
        chunk = min(chunk, tasks.count)
        return Plan(chunk, chunk, None, "given")
    budget = in_bytes(memory)
    if alone:
        return Plan(1, 1, None, 'one by one: reduction="none" with batched=True or a rule that reads hparams')
    one = Chunk(problem, tasks, [0])
    leaves, _, rebuild = flatten(hparams, "hparams")
    with torch.enable_grad():
        hparams = rebuild([x.detach() for x in leaves])
        begin, _, rebuild = flatten(one.start(hparams), "start")
        params = [x.detach().requires_grad_() for x in begin]
        known = [*tasks.tensors, *params, *leaves]
        inner = _kept(one.losses(problem.inner[0], "inner_loss", rebuild(params), hparams), known)
        big = SMALL_TASK if params[0].device.type == "cpu" and not problem.batched else float("inf")
        if inner > big:
            kept = f"one task keeps {inner / 2**20:.1f} MiB, so arithmetic is what takes the time"
            return Plan(1, 1, None, f"a loop: {kept}")
        outer = 0
        if problem.outer_loss is not None:
            outer = _kept(one.losses(problem.outer_loss, "outer_loss", rebuild(params), hparams), known)
    size = max(int(need[0] * inner + 3 * outer + need[1] * sum(x.nbytes for x in params)), 1)
    fit = int(min(max(budget // size, 1), tasks.count))
    why = "all at once" if fit == tasks.count else f"as many as fit into {budget / 2**20:.0f} MiB"
    return Plan(fit, 1 if outer > big else fit, size, f"{why}: about {size / 2**20:.2f} MiB a task")


def _kept(loss: Tensor, known: list[Tensor]) -> int:
    """Bytes that the graph of a loss keeps, beside tensors that are there anyway (tasks are views of one tensor)."""
    sizes = _graph.saved_bytes([loss], set())
    for x in known:
        sizes.pop(x.untyped_storage().data_ptr(), None)
    return sum(sizes.values())


def in_bytes(memory: str | int) -> float:
    budget = (
        float(memory)
        if type(memory) is int and memory > 0
        else parse_bytes(memory)
        if isinstance(memory, str)
        else None
    )
    if not isinstance(budget, float) or budget <= 0:
        raise ValueError(f'memory must be a number of bytes > 0, or like "1GiB", got {memory!r}')
    return budget
