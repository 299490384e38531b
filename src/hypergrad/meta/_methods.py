"""How the meta-gradient of some tasks at once is taken: four methods over one adaptation."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import _autodiff, _graph, implicit, unroll
from .._solution import NotFinite, OnFailure, Status
from .._tree import PyTree, difference, flatten, split
from ..solvers import CG, LinearSolver, Solver
from ._tasks import Chunk, Diverged


@dataclass(frozen=True)
class Part:
    """The meta-gradient Σᵢ ∇fᵢ of some tasks in hparams' structure (of each task, where it has its own hparams)."""

    grads: PyTree
    params: PyTree
    values: Tensor
    hypergradient: implicit.Hypergradient | None = None


class Method(ABC):
    """How a meta-gradient is taken: `Implicit`, `Unrolled`, `FirstOrder` or `Reptile`."""

    needs_outer_loss: ClassVar[bool] = True

    @abstractmethod
    def _take(self, chunk: Chunk, hparams: PyTree) -> Part: ...

    @abstractmethod
    def _need(self, steps: int) -> tuple[float, float]:
        """Memory of one task, in graphs of its inner loss and in vectors of its params: at least what was measured."""


@dataclass(frozen=True, kw_only=True)
class Implicit(Method):
    """At the solution: (∇²₁₁g) v = ∇₁E, ∇f = ∇₂E − ∇²₁₂g v, the systems of all tasks together (iMAML).

    The inner loss must hold λ itself (`biased`, features, a learned regularisation): the start and the steps drop out.

    Args:
        solver: of hg.solvers; scalars are per task, and a task that is solved rests. Default: CG(). Its on_failure
            says what to do where an adjoint system, or an inner problem, is not solved.

    Cost: T + 1 gradients and the solver's products of each task, whatever their number one graph at a time.
    Source: Rajeswaran, Finn, Kakade and Levine 2019.
    """

    solver: Solver | None = None

    def _take(self, chunk: Chunk, hparams: PyTree) -> Part:
        with torch.no_grad():
            start = chunk.start(hparams)
        # What went wrong is reported once, under the numbers that tasks have for the user.
        solver = replace(self._solver, on_failure="ignore") if isinstance(self._solver, LinearSolver) else self._solver
        outer, reached = differentiated(flatten(hparams, "hparams")[0]), []

        def noting(function: Callable[[PyTree, PyTree], PyTree]) -> Callable[[PyTree, PyTree], PyTree]:
            def evaluate(params: PyTree, hparams: PyTree) -> PyTree:
                value = function(params, hparams)
                reached.append(bool(reached and reached[-1]) or _graph.depends(split(value)[0], outer))
                return value

            return evaluate

        result = implicit.grad(
            noting(chunk.outer),
            residual=noting(chunk.slope),
            symmetric=True,
            params=chunk.adapt(hparams, start),
            hparams=hparams,
            solver=solver,
            batch_dims=1,
        )
        if not any(reached):
            raise ValueError(
                "neither inner_loss nor outer_loss depends on hparams, and the start and the steps drop out of an "
                "implicit gradient, which would be zero: let hparams enter the inner loss (hg.meta.biased), or use "
                "Unrolled() or FirstOrder()"
            )
        lost = result.solution.code == Status.NON_FINITE.value
        if bool(lost.any()):  # CG rests at 0 there, which is no adjoint
            raise Diverged(~lost, chunk.params, chunk.values)
        return Part(result.grads, detached(chunk.params), chunk.values, result)

    @property
    def _solver(self) -> Solver:
        return CG() if self.solver is None else self.solver

    @property
    def _on_failure(self) -> OnFailure:
        return self._solver.on_failure if isinstance(self._solver, LinearSolver) else "warn"

    def _need(self, steps: int) -> tuple[float, float]:
        return 4, 12


@dataclass(frozen=True, kw_only=True)
class Unrolled(Method):
    """Through the T steps: ∇f = d/dλ E(w_T(λ), λ) in reverse mode (MAML).

    Args:
        memory: what is kept of the steps for the reverse pass, as in `unroll.reverse`: "graph" (each step evaluated
            once), "iterates", "sqrt", or a number of checkpoints.

    Cost: T to 2T evaluations and T reverse passes of each task.
    Source: Finn, Abbeel and Levine 2017.
    """

    memory: str | int = "graph"

    def _take(self, chunk: Chunk, hparams: PyTree) -> Part:
        start, rule = chunk.start(hparams), chunk.problem.rule
        with warnings.catch_warnings():
            # Said once for all tasks, under the numbers that they have for the user.
            warnings.simplefilter("ignore", NotFinite)
            result = unroll.reverse(
                chunk.step,
                (start, rule.init(start)),
                hparams,
                lambda carry, hparams: chunk.outer(carry[0], hparams),
                chunk.problem.steps,
                memory=self.memory,
            )
        return Part(result.grads, detached(chunk.params), chunk.values)

    def _need(self, steps: int) -> tuple[float, float]:
        if self.memory == "graph":
            return 3 + 2 * steps, 12 + 2 * steps
        iterates = {"iterates": steps, "sqrt": 2 * sqrt(steps)}.get(str(self.memory))
        if iterates is None:
            iterates = self.memory if isinstance(self.memory, int) else 0
        return 5 + sqrt(steps) * (self.memory == "sqrt"), 14 + iterates


@dataclass(frozen=True)
class FirstOrder(Method):
    """As if w_T = w₀ + a constant: ∇f ≈ ∇₂E + (∂w₀/∂λ)ᵀ ∇₁E (first-order MAML).

    Cost: T + 1 gradients of each task.
    Source: Finn, Abbeel and Levine 2017, section 5.2.
    """

    def _take(self, chunk: Chunk, hparams: PyTree) -> Part:
        start = chunk.start(hparams)
        leaves, _, rebuild = flatten(chunk.adapt(hparams, start), "params")
        leaves = [x.requires_grad_() for x in leaves]
        outer, _, _ = flatten(hparams, "hparams")
        loss = chunk.outer(rebuild(leaves), hparams)
        if not _graph.depends([loss, *flatten(start, "start")[0]], differentiated(outer)):
            raise ValueError(
                "neither start nor outer_loss depends on hparams, so the first-order gradient would be zero"
            )
        kept = not all(x.is_leaf for x in outer)
        both = _autodiff.grad([loss], [*leaves, *differentiated(outer)], retain_graph=kept)
        through = pull(start, outer, both[: len(leaves)])
        return Part(
            in_place_of(hparams, _autodiff.add(both[len(leaves) :], through)), detached(chunk.params), chunk.values
        )

    def _need(self, steps: int) -> tuple[float, float]:
        return 2, 8


@dataclass(frozen=True)
class Reptile(Method):
    """Towards the adapted parameters: ∇f is replaced by (∂w₀/∂λ)ᵀ (w₀ − w_T). No outer loss is needed.

    Cost: T gradients of each task, and the outer loss where there is one, to report it.
    Source: Nichol, Achiam and Schulman 2018, Algorithm 2; not divided by the step size.
    """

    needs_outer_loss: ClassVar[bool] = False

    def _take(self, chunk: Chunk, hparams: PyTree) -> Part:
        start = chunk.start(hparams)
        params = chunk.adapt(hparams, start)
        with torch.no_grad():
            chunk.outer(params, hparams)
        first, last = (flatten(tree, "params")[0] for tree in (start, params))
        away = [x.detach() for x in difference(first, last)]
        message = "Reptile moves the start towards what was learnt, but start does not depend on hparams"
        grads = pull(start, flatten(hparams, "hparams")[0], away, message)
        return Part(in_place_of(hparams, grads), params, chunk.values)

    def _need(self, steps: int) -> tuple[float, float]:
        return 2, 8


def detached(tree: PyTree) -> PyTree:
    leaves, _, rebuild = flatten(tree, "params")
    return rebuild([x.detach() for x in leaves])


def differentiated(leaves: list[Tensor]) -> list[Tensor]:
    return [x for x in leaves if x.requires_grad]


def pull(start: PyTree, outer: list[Tensor], cotangents: Any, must_reach: str | None = None) -> list[Tensor]:
    """(∂w₀/∂λ)ᵀ u for the hparams that require grad."""
    leaves, _, _ = flatten(start, "start")
    kept = not all(x.is_leaf for x in outer)
    return _autodiff.grad(leaves, differentiated(outer), cotangents, retain_graph=kept, must_reach=must_reach)


def in_place_of(hparams: PyTree, grads: list[Tensor]) -> PyTree:
    """Gradients of the differentiated leaves in hparams' structure; zeros elsewhere."""
    outer, _, rebuild = flatten(hparams, "hparams")
    each = iter(grads)
    return rebuild([next(each) if x.requires_grad else torch.zeros_like(x) for x in outer])
