"""The four methods to compute the meta-gradient of several tasks at once."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _autodiff, _graph, implicit, unroll
from .._solution import NotFinite, Status
from .._tree import PyTree, filled, flatten
from ..solvers import Auto, LinearSolver, Solver
from ._compiled import stepping
from ._tasks import Chunk, Diverged


class Found(NamedTuple):
    """The result of a method for the tasks of a chunk; only `Implicit` sets the last two."""

    grads: list[Tensor]  # Σᵢ ∇fᵢ, for each leaf of hparams
    unreached: set[int]  # indices of the leaves that require grad but on which nothing depends
    statuses: list[Status] | None = None  # of each task's adjoint system
    residuals: tuple[Tensor, Tensor, Tensor] | None = None  # its residual, the inner residual, the inner distance


class Method(ABC):
    """How a meta-gradient is computed: `Implicit`, `Unrolled`, `FirstOrder` or `Reptile`.

    Example:
        >>> loss = lambda w, start, task: (w - task) ** 2 / 2
        >>> start, tasks = torch.tensor(0.0, requires_grad=True), torch.tensor([1.0, 3.0])
        >>> for method in (hg.meta.Unrolled(), hg.meta.FirstOrder()):
        ...     print(hg.meta.grad(loss, loss, start, tasks, method=method, steps=1).grads)  # w = .1 task + .9 start
        tensor(-1.6200)
        tensor(-1.8000)
    """

    @abstractmethod
    def _differentiate(self, chunk: Chunk, hparams: PyTree) -> Found: ...

    def _need(self, steps: int) -> tuple[float, float]:
        """Memory of one task, in graphs of its inner loss and in vectors of its params; bounds of measured memory."""
        return 2, 8


@dataclass(frozen=True, kw_only=True)
class Implicit(Method):
    """Differentiates the solution: (∇²₁₁g) v = ∇₁E, ∇f = ∇₂E − ∇²₁₂g v (iMAML).

    The inner loss must depend on λ itself (`biased`, features, a learned regularisation), because the solution depends
    neither on the start nor on the steps.

    Args:
        solver: of hg.solvers; it solves the systems of all tasks at once, with separate scalars for each task. Its
            on_failure says what to do if an adjoint system or an inner problem is not solved.

    Cost: T + 1 gradients and the solver's products for each task; one graph at a time, for any T.
    Source: Rajeswaran, Finn, Kakade and Levine 2019.

    Example:
        >>> import torch, hypergrad as hg
        >>> start, tasks = torch.tensor(0.0, requires_grad=True), torch.tensor([1.0, 3.0])
        >>> loss = lambda w, start, task: (w - task) ** 2 / 2
        >>> inner = hg.meta.biased(loss, strength=1.0)  # w = (task + start) / 2
        >>> hg.meta.grad(loss, inner, start, tasks, method=hg.meta.Implicit(), steps=200).grads.round(decimals=3)
        tensor(-0.5000)
    """

    solver: Solver = field(default_factory=Auto)

    def _differentiate(self, chunk: Chunk, hparams: PyTree) -> Found:
        with torch.no_grad():
            start = chunk.start(hparams)
        adapted = chunk.adapt(start, hparams)
        unreached: list[set[int]] = []  # leaves of hparams on which the outer loss, then the residual, do not depend

        def note(outputs: list[Tensor], hparams: PyTree) -> None:
            unreached.append(set(_graph.unreached(outputs, flatten(hparams, "hparams")[0])))
            if len(unreached) == 2 and set.intersection(*unreached) == _differentiated(hparams):
                raise ValueError(
                    "neither inner_loss nor outer_loss depends on hparams, and the start and the steps do not count in "
                    "an implicit gradient, which would be zero: let hparams enter the inner loss (hg.meta.biased), or "
                    "use Unrolled() or FirstOrder()"
                )

        def outer_loss(moving: list[Tensor], hparams: PyTree) -> Tensor:
            value = chunk.outer(chunk.completed(moving, adapted), hparams)
            note([value], hparams)
            return value

        def residual(moving: list[Tensor], hparams: PyTree) -> list[Tensor]:
            slopes = chunk.moving(chunk.slopes(chunk.completed(moving, adapted), hparams))
            note(slopes := _autodiff.or_zeros(slopes, moving), hparams)
            return slopes

        # `grad` reports failures once for all chunks, with the user's indices of tasks.
        solver = replace(self.solver, on_failure="ignore") if isinstance(self.solver, LinearSolver) else self.solver
        result = implicit.grad(
            outer_loss,
            residual=residual,
            positive_definite=True,
            params=chunk.moving(adapted),
            hparams=hparams,
            solver=solver,
            batch_dims=1,
        )
        statuses = result.solution.statuses
        if Status.NON_FINITE in statuses:  # CG returns 0 there, which is not the adjoint
            raise Diverged([status is not Status.NON_FINITE for status in statuses])
        residuals = (result.solution.relative_residual, result.inner_residual, result.inner_distance)
        return Found(flatten(result.grads, "grads")[0], set.intersection(*unreached), statuses, residuals)

    def _need(self, steps: int) -> tuple[float, float]:
        return 4, 12


@dataclass(frozen=True, kw_only=True)
class Unrolled(Method):
    """Differentiates through the T steps: ∇f = d/dλ E(w_T(λ), λ) in reverse mode (MAML).

    Args:
        memory, checkpoints: what is kept of the steps for the reverse pass, as in `unroll.reverse`: "graph" (each step
            evaluated once), "iterates", "sqrt", or a number of checkpoints with memory="sqrt".
        compile: as in `unroll.reverse`, not with "graph". The compiled step is kept with inner_loss, so define that
            once. If tasks diverge, the other tasks of their chunk are repeated without compilation.

    Cost: T to 2T evaluations and T reverse passes for each task, or more with checkpoints.
    Source: Finn, Abbeel and Levine 2017.

    Example:
        >>> import torch, hypergrad as hg
        >>> start, tasks = torch.tensor(0.0, requires_grad=True), torch.tensor([1.0, 3.0])
        >>> loss = lambda w, start, task: (w - task) ** 2 / 2
        >>> hg.meta.grad(loss, loss, start, tasks, method=hg.meta.Unrolled(), steps=1).grads  # w = .1 task + .9 start
        tensor(-1.6200)
    """

    memory: str = "graph"
    checkpoints: int | None = None
    compile: bool | str = False

    def __post_init__(self) -> None:
        unroll.check_storage(self.memory, self.checkpoints, self.compile)

    def _differentiate(self, chunk: Chunk, hparams: PyTree) -> Found:
        start, problem = chunk.start(hparams), chunk.problem
        step, options = stepping(chunk, self.compile)
        with warnings.catch_warnings():
            # `grad` reports it once for all chunks, with the user's indices of tasks.
            warnings.simplefilter("ignore", NotFinite)
            result = unroll.reverse(
                step,
                (start, problem.rule.init(chunk.rebuild(start))),
                hparams,
                lambda carry, hparams: chunk.outer(carry[0], hparams),
                problem.steps,
                memory=self.memory,
                checkpoints=self.checkpoints,
                **options,
            )
        return Found(flatten(result.grads, "grads")[0], set())  # unroll itself warns of unused hparams

    def _need(self, steps: int) -> tuple[float, float]:
        if self.memory == "graph":
            return 3 + 2 * steps, 12 + 2 * steps
        iterates = self.checkpoints or {"iterates": steps, "sqrt": 2 * sqrt(steps)}.get(self.memory, 0)
        return 5 + sqrt(steps) * (self.memory == "sqrt"), 14 + iterates


@dataclass(frozen=True)
class FirstOrder(Method):
    """Treats w_T − w₀ as constant: ∇f ≈ ∇₂E + (∂w₀/∂λ)ᵀ ∇₁E (first-order MAML).

    Cost: T + 1 gradients for each task.
    Source: Finn, Abbeel and Levine 2017, section 5.2.

    Example:
        >>> import torch, hypergrad as hg
        >>> start, tasks = torch.tensor(0.0, requires_grad=True), torch.tensor([1.0, 3.0])
        >>> loss = lambda w, start, task: (w - task) ** 2 / 2
        >>> hg.meta.grad(loss, loss, start, tasks, method=hg.meta.FirstOrder(), steps=1).grads  # ∇E at w
        tensor(-1.8000)
    """

    def _differentiate(self, chunk: Chunk, hparams: PyTree) -> Found:
        start = chunk.start(hparams)
        adapted = [x.detach().requires_grad_() for x in chunk.adapt(start, hparams)]
        loss = chunk.outer(adapted, hparams)
        slopes = _autodiff.grad([loss], adapted)
        return _pulled(
            [loss, *start], [torch.ones_like(loss), *slopes], hparams, "neither start nor outer_loss depends"
        )


@dataclass(frozen=True)
class Reptile(Method):
    """Moves the start towards the adapted params: ∇f is replaced by (∂w₀/∂λ)ᵀ (w₀ − w_T). Needs no outer loss.

    Cost: T gradients for each task, and the outer loss if it is given, to report its value.
    Source: Nichol, Achiam and Schulman 2018, Algorithm 2; not divided by the step size.

    Example:
        >>> import torch, hypergrad as hg
        >>> start, tasks = torch.tensor(0.0, requires_grad=True), torch.tensor([1.0, 3.0])
        >>> loss = lambda w, start, task: (w - task) ** 2 / 2
        >>> hg.meta.grad(None, loss, start, tasks, method=hg.meta.Reptile(), steps=1).grads  # start − mean of w
        tensor(-0.2000)
    """

    def _differentiate(self, chunk: Chunk, hparams: PyTree) -> Found:
        start = chunk.start(hparams)
        adapted = chunk.adapt(start, hparams)
        with torch.no_grad():
            chunk.outer(adapted, hparams)
        away = [(w - x).detach() for w, x in zip(start, adapted, strict=True)]
        return _pulled(start, away, hparams, "start does not depend")


def _differentiated(hparams: PyTree) -> set[int]:
    """The indices of the leaves that require grad."""
    return {i for i, x in enumerate(flatten(hparams, "hparams")[0]) if x.requires_grad}


def _pulled(outputs: list[Tensor], cotangents: list[Tensor], hparams: PyTree, lost: str) -> Found:
    """Σᵢ cotangentᵢᵀ ∂outputᵢ/∂λ."""
    leaves, places = flatten(hparams, "hparams")[0], sorted(_differentiated(hparams))
    found = _autodiff.grad_or_none(outputs, [leaves[i] for i in places], cotangents)
    unreached = {i for i, g in zip(places, found, strict=True) if g is None}
    if len(unreached) == len(places):
        raise ValueError(f"{lost} on hparams, so the meta-gradient would be zero")
    return Found(_autodiff.new_zeros(filled([None] * len(leaves), places, found), leaves), unreached)
