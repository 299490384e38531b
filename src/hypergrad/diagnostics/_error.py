"""An estimate of how far a hypergradient is from the exact one."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .._solution import Status
from .._tree import PyTree
from .._vector import Vector
from ..implicit._correction import Correction, correct, newton_step
from ..implicit._problem import Point, Problem
from ..solvers import GMRES, MINRES, Dense, Solver, solve

DENSE = 200  # unknowns of a system up to which it is solved by factors
LINEAR = 0.003  # estimated relative error up to which the first-order estimate is taken as it is
SETTLED = 0.01  # what the last Newton step may change of the estimate, and of the corrected hypergradient
NEGLIGIBLE = 1e-3  # what it may change of the estimate in any case


@dataclass(frozen=True)
class Estimate:
    """An estimate of the error of a hypergradient h at (w, v), against the exact ∇f(λ) at the inner solution w*.

    Attributes:
        inner_residual: ‖F‖ = ‖∇₁g‖ or ‖w − Φ(w)‖.
        inner_relative_residual: ‖F‖ / ‖A w‖.
        distance: estimate of ‖w − w*‖ / ‖w*‖.
        adjoint_residual: ‖r_v‖ = ‖∇₁E − Aᵀv‖, computed anew.
        adjoint_relative_residual: ‖r_v‖ / ‖∇₁E‖.
        adjoint_norm: ‖v‖.
        hypergradient_norm: ‖h‖ as given.
        mismatch: ‖h − (∇₂E − ∂₂Fᵀv)‖: rounding, if h was computed from this v; else its distance from what v gives.
        error: estimate of ‖h − ∇f(λ)‖.
        relative_error: the same relative to the corrected hypergradient.
        from_inner, from_adjoint: the first-order effects of the residual F (with v following w) and of r_v, as norms.
        uncertainty: how far `error` may be off, relative: the share of the last Newton step; the estimated relative
            error itself where the first-order estimate was enough.
        settled: whether that is small. If not, the estimate is not to be trusted.
        newton_steps: Newton steps of the inner problem that the estimate took.
        status: the worst status of the linear systems behind the estimate.
        outer_value: E(w, λ).
        corrected_value: E − vᵀF at the last Newton step: f(λ) to second order or better.
        corrected_norm: norm of the corrected hypergradient.
        corrected: the corrected hypergradient, in hparams' structure.
        params: the estimate of w*: w after the Newton steps, and one more.
        products: with A and Aᵀ, beside the two reverse passes of each correction.
    """

    inner_residual: float
    inner_relative_residual: float
    distance: float
    adjoint_residual: float
    adjoint_relative_residual: float
    adjoint_norm: float
    hypergradient_norm: float
    mismatch: float
    error: float
    relative_error: float
    from_inner: float
    from_adjoint: float
    uncertainty: float
    settled: bool
    newton_steps: int
    status: Status
    outer_value: float
    corrected_value: float
    corrected_norm: float
    corrected: PyTree
    params: PyTree
    products: int


def default_solver(point: Point) -> Solver:
    """Factors for small systems; else MINRES where A is symmetric, which need not be definite, and GMRES."""
    space = point.b.space
    if space.length <= DENSE and all(space.plain):
        return Dense(on_failure="ignore")
    return MINRES(on_failure="ignore") if point.problem.symmetric else GMRES(on_failure="ignore")


def estimate(
    problem: Problem, grads: PyTree, adjoint: PyTree | None, solver: Solver | None = None, newton_steps: int = 20
) -> Estimate:
    """The error of grads, as a hypergradient of the problem.

    The first-order correction dh (see `implicit.grad`, polish) at the given params and adjoint is a first estimate.
    Where it exceeds 0.3 % of the hypergradient, or δ a tenth of w, it is no longer small, so w takes a Newton step,
    halved until ‖F‖ falls, v is solved for again, and the correction there is added; until one adds less than 1 % to
    the whole, and to the hypergradient. The estimate is the difference between grads and the hypergradient where that
    ends.

    Args:
        problem: deterministic, its losses callables.
        grads: what is to be judged, in hparams' structure.
        adjoint: v; None solves for it first, and then grads may come from anywhere.
        solver: of the linear systems (default: Dense up to 200 unknowns, else MINRES where A is symmetric, or GMRES).
        newton_steps: at most; 0 for the first-order estimate alone.

    Cost: the graphs of both losses and three systems; each Newton step the same again.
    """
    point = Point(problem, problem.variables)
    solver = default_solver(point) if solver is None else solver
    space = point.variables.space
    given = point.variables.differentiated_of(grads, "the hypergradient")
    w = space.pack([x.detach() for x in point.variables.given])
    v = _adjoint(point, solver, None) if adjoint is None else space.vector(adjoint, "the adjoint")

    residual, b, outer_value = norm(point.residual), norm(point.b), float(point.outer.detach())
    stretch = norm(point.op.T(w))
    first = correct(point, v, solver)
    from_adjoint = _adjoint_part(point, first.adjoint_residual, solver)
    end = _followed(point, first, given, solver, newton_steps)
    last, moved = end.last, end.moved

    r_v, error, size = norm(first.adjoint_residual), norm(last.corrected - given), norm(last.corrected)
    return Estimate(
        inner_residual=residual,
        inner_relative_residual=ratio(residual, stretch),
        distance=ratio(norm(moved - w), norm(moved)),
        adjoint_residual=r_v,
        adjoint_relative_residual=ratio(r_v, b),
        adjoint_norm=norm(v),
        hypergradient_norm=norm(given),
        mismatch=norm(first.hypergradient - given),
        error=error,
        relative_error=ratio(error, size),
        from_inner=norm(first.change - from_adjoint),
        from_adjoint=norm(from_adjoint),
        uncertainty=end.uncertainty,
        settled=end.settled,
        newton_steps=end.steps,
        status=end.status,
        outer_value=outer_value,
        corrected_value=float(last.value),
        corrected_norm=size,
        corrected=point.variables.outer_grads(last.corrected.leaves),
        params=moved.tree,
        products=end.products,
    )


@dataclass(frozen=True)
class _End:
    """Where Newton's method ended: its last correction, the estimate of w*, and how far to trust it."""

    last: Correction
    moved: Vector
    steps: int
    settled: bool
    uncertainty: float
    status: Status
    products: int


def _followed(point: Point, last: Correction, given: Vector, solver: Solver, newton_steps: int) -> _End:
    """Newton steps from a point and its correction until one changes the estimate no more."""
    ops, steps, status = [point.op], 0, last.status
    settled, uncertainty = _settled(last, given, steps)
    while not settled and steps < newton_steps:
        new = newton_step(point, last.step)
        if new is None:
            break
        point, steps = new, steps + 1
        ops.append(point.op)
        last = correct(point, _adjoint(point, solver, last.adjoint + last.adjoint_step), solver)
        status = max(status, last.status, key=lambda s: s.value)
        settled, uncertainty = _settled(last, given, steps)
    moved = point.b.space.pack([x.detach() for x in point.variables.given]) + last.step
    return _End(last, moved, steps, settled, uncertainty, status, sum(op.products for op in ops))


def _adjoint(point: Point, solver: Solver, start: Vector | None) -> Vector:
    return solve(solver, point.op, point.b.copy(), start).value


def _adjoint_part(point: Point, r_v: Vector, solver: Solver) -> Vector:
    """−∂₂Fᵀ A⁻ᵀ r_v: what solving the adjoint system further would change."""
    last = point.last_product(retain_graph=True)
    solve(solver, point.op, r_v.copy(), None, last)
    return point.variables.outer_space.pack(last.cross)


def _settled(last: Correction, given: Vector, steps: int) -> tuple[bool, float]:
    """Whether the estimate is good, and its relative uncertainty."""
    change, size = norm(last.change), norm(last.corrected)
    if not steps:
        uncertainty = ratio(change, size)
        return uncertainty <= LINEAR and bool(last.holds), uncertainty
    # The corrected hypergradient is to be right too, where it is much smaller than the error: but it may be zero.
    uncertainty = ratio(change, norm(last.corrected - given))
    return uncertainty <= SETTLED and (change <= SETTLED * size or uncertainty <= NEGLIGIBLE), uncertainty


def norm(x: Vector) -> float:
    """The norm over all systems."""
    return float(x.norm().square().sum().sqrt())


def ratio(a: float, b: float) -> float:
    """a / b, 0 where both are 0; NaN stays NaN."""
    return 0.0 if a == 0 else a / b if b else math.inf
