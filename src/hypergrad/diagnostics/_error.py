"""An estimate of how far a hypergradient is from the exact one."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from .._options import progress_bar
from .._solution import Status
from .._tree import PyTree
from .._vector import Vector, ratio
from ..implicit import Correction, Problem, correct, newton_step
from ..solvers import GMRES, MINRES, Dense, IterativeSolver, Solver, solve

DENSE = 200  # unknowns up to which a system is solved by a factorisation
LINEAR = 0.003  # relative effect of the inner residual up to which the first-order estimate is accepted
SETTLED = 0.01  # the last Newton step may change the estimate and the corrected hypergradient by this (relative)
NEGLIGIBLE = 1e-3  # a change of the estimate by this (relative) is accepted whatever the hypergradient's change
NEWTON_STEPS = 20


@dataclass(frozen=True)
class Estimate:
    """An estimate of the error of a hypergradient h at (w, v), compared with ∇f(λ) at the inner solution w*.

    The first estimate is the first-order correction (see `implicit.polish`) at the given w and v. If the effect of the
    inner residual in it exceeds 0.3 % of the hypergradient, or its Newton step a tenth of w, then w takes Newton steps
    (each halved until ‖F‖ falls), with a new v and a new correction after each, until a step changes the estimate and
    the hypergradient by less than 1 %. `error` is the distance of h from the last corrected hypergradient.

    Attributes:
        inner_residual: ‖F‖ = ‖∇₁g‖ or ‖w − Φ(w)‖.
        distance: estimate of ‖w − w*‖ / ‖w*‖.
        damping: γ if the residuals show that v solves a damped system (Aᵀ + γI)v = ∇₁E; else 0.
        adjoint_residual: ‖r_v‖ = ‖∇₁E − (Aᵀ + γI)v‖, recomputed.
        adjoint_relative_residual: ‖r_v‖ / ‖∇₁E‖.
        hypergradient_norm: ‖h‖ as given.
        error: estimate of ‖h − ∇f(λ)‖.
        relative_error: error divided by the norm of the corrected hypergradient.
        from_inner, from_adjoint, from_damping: norms of the first-order effects of F (through w and v), r_v and γ.
        uncertainty: relative uncertainty of `error`: its last change by a Newton step, or to first order.
        settled: whether the uncertainty is small. If not, do not trust the estimate.
        newton_steps: the Newton steps that w took for the estimate.
        status: the worst status of the linear systems of the estimate.
        outer_value: E(w, λ).
        corrected_value: E − vᵀF after the last Newton step: f(λ) to second order or better.
        corrected_norm: norm of the corrected hypergradient.
        corrected: the corrected hypergradient, in hparams' structure.
        params: the estimate of w*, which is w after one more Newton step than newton_steps.

    Example:
        >>> lam, scale = torch.tensor([3.0, 1.0], dtype=torch.float64, requires_grad=True), torch.tensor([1.0, 4.0])
        >>> inner_loss = lambda w, lam: (scale * (w - lam) ** 2).sum() / 2
        >>> result = hg.implicit.grad(
        ...     lambda w, lam: (w**2).sum() / 2, inner_loss=inner_loss, params=1.01 * lam.detach(), hparams=lam
        ... )
        >>> estimate = hg.diagnostics.check(result).estimate
        >>> f"{estimate.relative_error:.3f}", estimate.corrected
        ('0.010', tensor([3., 1.], dtype=torch.float64))
    """

    inner_residual: float
    distance: float
    damping: float
    adjoint_residual: float
    adjoint_relative_residual: float
    hypergradient_norm: float
    error: float
    relative_error: float
    from_inner: float
    from_adjoint: float
    from_damping: float
    uncertainty: float
    settled: bool
    newton_steps: int
    status: Status
    outer_value: float
    corrected_value: float
    corrected_norm: float
    corrected: PyTree
    params: PyTree


def estimate(
    problem: Problem,
    grads: PyTree,
    adjoint: PyTree | None,
    solver: Solver | None,
    budget: Budget,
    *,
    solved: float = math.inf,
    newton: bool = True,
) -> Estimate:
    """Estimate the error of grads as a hypergradient of a deterministic problem.

    Args:
        adjoint: v; None solves for it, for grads that were not computed by implicit differentiation.
        solver: as in `check`.
        solved: the residual of the (damped) adjoint system when v was computed.
        newton: whether to take Newton steps; without them the estimate is of first order.
    """
    systems = _Systems(problem, solver, budget)
    start, space = systems.problem, systems.problem.space
    given = start.outer_space.vector(grads, "the hypergradient")
    v = systems.adjoint() if adjoint is None else space.vector(adjoint, "the adjoint")
    first = last = systems.correct(v)
    damping = _damping(first.adjoint_residual, v, solved)
    r_v = first.adjoint_residual - v * damping
    from_adjoint = systems.effect(r_v)
    from_damping = systems.effect(v * damping) if damping else from_adjoint * 0.0
    from_inner = first.change - from_adjoint - from_damping
    # h is linear in v, so only the effect of w has a second-order error.
    uncertainty = ratio(norm(from_inner), norm(first.corrected))
    settled, steps, status = uncertainty <= LINEAR and bool(first.holds), 0, first.status
    while newton and not settled and steps < NEWTON_STEPS and systems.newton_step(last.step):
        last = systems.correct(systems.adjoint(last.adjoint + last.adjoint_step))
        settled, uncertainty = _settled(last, given)
        steps, status = steps + 1, max(status, last.status, key=lambda s: s.value)
    if budget.tight and status is Status.MAX_STEPS:
        budget.left_out.append("solving the systems behind the estimate to their tolerance")
    moved, error, size = systems.problem.point + last.step, norm(last.corrected - given), norm(last.corrected)
    return Estimate(
        inner_residual=norm(start.residual_of(start.linearisation)),
        distance=ratio(norm(moved - start.point), norm(moved)),
        damping=damping,
        adjoint_residual=norm(r_v),
        adjoint_relative_residual=ratio(norm(r_v), norm(start.b)),
        hypergradient_norm=norm(given),
        error=error,
        relative_error=ratio(error, size),
        from_inner=norm(from_inner),
        from_adjoint=norm(from_adjoint),
        from_damping=norm(from_damping),
        uncertainty=uncertainty,
        settled=settled,
        newton_steps=steps,
        status=status,
        outer_value=float(start.outer_value.detach()),
        corrected_value=float(last.value),
        corrected_norm=size,
        corrected=start.tree_of(last.corrected.leaves),
        params=start.with_params(moved),
    )


class Budget:
    """Counts products with A and Aᵀ, up to a limit that may be exceeded by a few."""

    def __init__(self, most: int, progress: bool | None):
        self.most, self.done = most, 0
        self.tight = False  # whether the budget lowered max_steps of a solver
        self.left_out: list[str] = []  # what was left out because the products were spent
        self.bar = progress_bar(progress, total=most, desc="check, at most", unit="product")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    @property
    def left(self) -> int:
        return max(self.most - self.done, 0)

    def spend(self, products: int) -> None:
        self.done += products
        if self.bar is not None:
            self.bar.update(products)

    def limited(self, solver: Any, systems: int, rtol: float) -> Any:
        """The solver with max_steps at most its share of the products left, for this number of systems to come."""
        if not isinstance(solver, IterativeSolver):
            return solver
        if solver.rtol is None and solver.atol is None and solver.max_steps is None:
            solver = replace(solver, rtol=rtol)
        share, own = max(1, self.left // systems), 1000 if solver.max_steps is None else solver.max_steps
        self.tight = self.tight or share < own
        return replace(solver, max_steps=min(share, own))


class _Systems:
    """Solves linear systems within the budget, at a point that `newton_step` moves."""

    def __init__(self, problem: Problem, solver: Solver | None, budget: Budget):
        self.budget, self.chosen = budget, solver
        self._move_to(problem.again())

    def _move_to(self, problem: Problem) -> None:
        problem.evaluate(keep=True)
        self.op, self.counted = problem.operator(), 0
        self.problem, self.before = problem, self.budget.done

    def solver(self, systems: int) -> Solver:
        """The solver for the next of this number of systems to come."""
        space, chosen = self.problem.space, self.chosen
        if chosen is None:
            few = 0 < space.length <= min(DENSE, self.budget.left / systems) and all(space.plain)
            krylov = MINRES if self.problem.symmetric else GMRES
            chosen = Dense(on_failure="ignore") if few else krylov(on_failure="ignore")
        return self.budget.limited(chosen, systems, space.rtol)

    def spend(self) -> None:
        """Charge the products since the last call to the budget."""
        self.budget.spend(self.op.products - self.counted)
        self.counted = self.op.products

    def adjoint(self, start: Vector | None = None) -> Vector:
        v = solve(self.solver(4), self.op, self.problem.b.copy(), start).value
        self.spend()
        return v

    def correct(self, v: Vector) -> Correction:
        correction = correct(self.problem, v, self.solver(3), self.op)
        self.spend()
        return correction

    def effect(self, r: Vector) -> Vector:
        """−∂₂Fᵀ A⁻ᵀ r: the change of the hypergradient when r is added to the right hand side of the adjoint system."""
        solve(self.solver(2), self.op, r.copy(), None, self.problem.last_product)
        self.spend()
        return self.problem.cross_vector().copy()

    def newton_step(self, step: Vector) -> bool:
        """Move to w + tδ; return False, and do not move, if no t decreases ‖F‖ or the budget is spent."""
        if self.budget.left < max(self.budget.done - self.before, 3):
            self.budget.left_out.append("Newton steps of the inner problem")
            return False
        new = newton_step(self.problem, step)
        if new is not None:
            self._move_to(new)
        return new is not None


def _damping(r_v: Vector, v: Vector, solved: float) -> float:
    """γ if r_v = γv + r with ‖r‖ no larger than `solved`, the residual that the solver reported; else 0."""
    size = norm(v)
    gamma = float(r_v.dot(v).sum()) / size**2 if size else 0.0
    rounding = 10 * r_v.space.eps * norm(r_v)
    damped = gamma > 0 and solved <= norm(r_v) / 2 and norm(r_v - v * gamma) <= 1.01 * solved + rounding
    return gamma if damped else 0.0


def _settled(last: Correction, given: Vector) -> tuple[bool, float]:
    """Whether the estimate has settled after a Newton step, and its relative uncertainty."""
    change, size = norm(last.change), norm(last.corrected)
    # The corrected hypergradient must settle too, even if it is much smaller than the error, unless it is zero.
    uncertainty = ratio(change, norm(last.corrected - given))
    return uncertainty <= SETTLED and (change <= SETTLED * size or uncertainty <= NEGLIGIBLE), uncertainty


def norm(x: Vector) -> float:
    return total(x.norm())


def total(norms: Tensor) -> float:
    """The norm over all systems, from the norm of each."""
    return float(norms.square().sum().sqrt())
