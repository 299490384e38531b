"""`polish` removes the first-order error of a hypergradient; `refine` makes the error smaller than a tolerance.

Let L(w, λ, v) = E(w, λ) − vᵀF(w, λ). The exact pair (w, v) solves F = 0 and ∇₁L = ∇₁E − Aᵀv = 0, and there ∇f(λ) =
∇₂L. At another pair, with r_v = ∇₁L, one Newton step for both equations is

    A δ = −F,      Aᵀ dv = r_v + ∇²₁₁L δ,      dh = ∇²₂₁L δ − ∂₂Fᵀ dv

dh is the derivative of h(w, v) = ∇₂L along (δ, dv), so the error of h + dh is of the order of the square of the errors
of w and v, and so is the error of L as a value of f(λ).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import _autodiff, _torch
from .._solution import InaccurateHypergradient, Solution, SolverError, Status, warn
from .._torch import random_state_kept_on_error
from .._tree import PyTree
from .._vector import Vector, anywhere, norm, ratio, read
from ..operators import LinearOperator, has_curvature
from ..solvers import Auto, LinearSolver, Solver, on_failure_of, solve
from ._hypergradient import Hypergradient, result_of
from ._problem import Problem

NEAR = 0.1  # relative distance from the inner solution up to which a first-order estimate is trusted
ROUGH = 0.1  # relative residual to which the systems of an error estimate are solved
REFINEMENTS = 20


@dataclass(frozen=True)
class Correction:
    """The Newton step of a pair (w, v), and its first-order effect on the hypergradient."""

    hypergradient: Vector  # h(w, v) = ∇₂E − ∂₂Fᵀv
    change: Vector  # dh
    value: Tensor  # L = E − vᵀF, second-order accurate as f(λ)
    adjoint_residual: Vector  # r_v = ∇₁E − Aᵀv
    adjoint: Vector  # v
    step: Vector  # δ
    adjoint_step: Vector  # dv
    distance: Tensor  # ‖δ‖ / ‖w + δ‖
    solutions: tuple[Solution, Solution]  # of the systems for δ and dv

    @property
    def corrected(self) -> Vector:
        return self.hypergradient + self.change

    @property
    def relative(self) -> Tensor:
        """‖dh‖ / ‖h + dh‖, and 0 where both are 0."""
        size = self.change.norm().abs()  # the norm of complex gradients is a complex number
        return torch.where(size == 0, 0.0, size / self.corrected.norm().abs())

    @property
    def holds(self) -> Tensor:
        """Whether w is near enough for a first-order estimate. A small dh alone does not show that."""
        return self.distance <= NEAR

    @property
    def status(self) -> Status:
        """The worse status of the two systems."""
        return max((solution.status for solution in self.solutions), key=lambda status: status.value)


def correct(problem: Problem, v: Vector, solver: Solver, operator: LinearOperator | None = None) -> Correction:
    """The correction at (w, v) of a problem that was evaluated with keep=True. Its graphs are kept."""
    assert problem.linearisation is not None
    space, outer, n = problem.space, problem.outer_space, len(problem.leaves)
    inputs = [*problem.leaves, *problem.differentiated]
    operator, f = operator or problem.operator(), problem.residual_of(problem.linearisation)

    # The gradient of L; for a fixed point that of E + vᵀΦ = L + vᵀw.
    outputs = [problem.outer_value, *problem.linearisation.outputs]
    cotangents = [torch.ones_like(problem.outer_value), *(v if problem.fixed_point else -v).leaves]
    gradient = _autodiff.grad(outputs, inputs, cotangents, create_graph=True)
    detached = [x.detach() for x in gradient]
    r_v, h = space.pack(detached[:n]).copy(), outer.pack(detached[n:]).copy()
    r_v = r_v - v if problem.fixed_point else r_v

    delta = solve(solver, operator.T, -f, None)
    try:
        along = _autodiff.grad(gradient[:n], inputs, delta.value.leaves, retain_graph=True)
    except RuntimeError as error:
        if "derivative" not in str(error) and "differentiate" not in str(error):
            raise
        raise NotImplementedError(
            f"corrections and estimates of the error take third derivatives of the inner loss, which torch lacks here: "
            f"{error} Put modules such as BatchNorm into eval() mode, or replace the operation by simpler ones"
        ) from error
    dv = solve(solver, operator, r_v + space.pack(along[:n]), None, problem.last_product)
    change = outer.pack(along[n:]) + problem.cross_vector()
    value = problem.outer_value.detach() - v.dot(f).sum()
    there = problem.point + delta.value
    squares = [x.norm().square().sum() for x in (delta.value, there)]
    distance = space.tensor(ratio(*map(read, squares))).sqrt().nan_to_num(0.0)
    return Correction(h, change, value, r_v, v, delta.value, dv.value, distance, (delta, dv))


def polish(result: Hypergradient, solver: Solver | None = None) -> Hypergradient:
    """Remove the first-order effect of the errors of w and v: the remaining error is of the order of their squares.

        ∇f ≈ h + dh,      f ≈ E − vᵀF

    Args:
        result: a result of `implicit.grad` or `backward` whose losses were given as callables. params and hparams must
            not have changed since.
        solver: a linear solver for the two systems of the correction. Default: `solvers.Auto()`.

    Returns:
        The result with the corrected grads, outer_value and relative_error. No .grad is written.

    Raises: TypeError for losses that were given evaluated, or a Stochastic or GaussNewton inner problem; ValueError if
        params or hparams changed.
    Warns: HypergradientWarning if a system of the correction was not solved.
    Cost: one evaluation of each loss, two systems (one with A, one with Aᵀ), about four reverse passes.
    Source: Pierce and Giles 2000, for the corrected value.

    Example:
        >>> lam = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
        >>> near = hg.implicit.grad(
        ...     lambda w, lam: w**2 / 2,
        ...     inner_loss=lambda w, lam: (w - lam) ** 2,
        ...     params=lam.detach() + 0.1,
        ...     hparams=lam,
        ... )
        >>> near.grads, polish(near).grads
        (tensor(3.1000, dtype=torch.float64), tensor(3., dtype=torch.float64))
    """
    solver = Auto() if solver is None else solver
    problem = _again(result, "polish")
    with random_state_kept_on_error(problem.leaves), problem.without_hooks_and_autocast() as hooked:
        problem.evaluate(keep=True)
        correction = correct(problem, problem.space.vector(result.adjoint, "result.adjoint"), solver)
    polished = replace(
        result,
        grads=problem.tree_of(_torch.with_hooks(problem.differentiated, correction.corrected.leaves, hooked)),
        outer_value=correction.value,
        relative_error=correction.relative.square(),
    )
    on_failure = on_failure_of(solver)
    for solution in correction.solutions:
        solution.report("a system of the correction", on_failure)
    if on_failure != "ignore":
        polished.check_finite(on_failure)
    return polished


def refine(
    result: Hypergradient,
    rtol: float,
    *,
    update: Callable[[PyTree, PyTree], PyTree] | None = None,
    solver: LinearSolver | None = None,
) -> Hypergradient:
    """Reduce the estimated error to rtol · ‖∇f(λ)‖, and solve inner problem and adjoint system only as far as needed.

    The adjoint system is solved until a tenfold smaller residual changes the hypergradient by at most rtol. Then the
    effect of the inner residual is estimated, from systems with a relative residual of 0.1, and w improved if needed.

    Args:
        result: as in `polish`.
        rtol: in (0, 1).
        update: (params, hparams) ↦ better params, called up to 20 times; by default Newton steps with `solver`.
        solver: a linear solver with a tolerance, which is replaced; its max_steps is used. Default: `solvers.Auto()`.

    Returns:
        A Hypergradient with relative_error. It is taken at its `problem.params`; the given params do not change.

    Raises: as `polish`; TypeError for a solver without a tolerance; SolverError if rtol is missed and the solver has
        on_failure="raise".
    Warns: InaccurateHypergradient if rtol is missed.
    Cost: the adjoint's products, one product with respect to hparams for each tolerance, and a `polish` each update.
    Source: Pedregosa 2016, section 3, for the tolerances.

    Example:
        >>> lam = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
        >>> rough = hg.implicit.grad(
        ...     lambda w, lam: w**2 / 2,
        ...     inner_loss=lambda w, lam: (w - lam) ** 2,
        ...     params=lam.detach() + 0.1,
        ...     hparams=lam,
        ... )
        >>> refine(rough, rtol=1e-6).grads
        tensor(3., dtype=torch.float64)
    """
    if not isinstance(rtol, (int, float)) or not 0 < rtol < 1:
        raise ValueError(f"rtol must be between 0 and 1, got {rtol!r}")
    if update is not None and not callable(update):
        raise TypeError(f"update must be None or a function of (params, hparams), got {update!r}")
    solver = Auto() if solver is None else solver
    rough = at_tolerance(solver, ROUGH)
    problem, start, updates = _again(result, "refine"), result.adjoint, 0
    while True:
        with random_state_kept_on_error(problem.leaves), problem.without_hooks_and_autocast() as hooked:
            problem.evaluate(keep=True)
            solution = _adjoint_to(rtol, problem, solver, start)
            grads = problem.grads()
            correction = correct(problem, solution.value, rough)
        if bool((correction.relative <= rtol) & correction.holds) or updates == REFINEMENTS:
            break
        better = newton_step(problem, correction.step) if update is None else _updated(problem, update)
        if better is None:
            break
        problem, start, updates = better, solution.value, updates + 1
    grads = _torch.with_hooks(problem.differentiated, grads, hooked)
    refined = replace(result_of(problem, solution, grads), relative_error=correction.relative)
    _check_accuracy(refined, rtol, solver.on_failure)
    return refined


def _again(result: Hypergradient, name: str) -> Problem:
    """The problem of a result, to be evaluated again. Raises if that is impossible."""
    kept = result.problem
    if kept.inner is None or kept.outer_loss is None:
        raise TypeError(f"{name} evaluates both losses again, so both must be given as callables of (params, hparams)")
    if kept.stochastic or has_curvature(kept.inner):
        raise TypeError(f"{name} needs the derivative of one fixed problem, not a {type(kept.inner).__name__}")
    if kept.changed:
        raise ValueError(
            f"{' and '.join(kept.changed)} were changed in place since the hypergradient was taken: {name} it before "
            f"the next step of an optimiser"
        )
    return kept.again()


def _adjoint_to(rtol: float, problem: Problem, solver: LinearSolver, start: Any) -> Solution:
    """Solve for v until a tenfold smaller residual changes h = ∇₂E − ∂₂Fᵀv by at most rtol ‖h‖."""
    outer, tolerance, before, operator = problem.outer_space, rtol, None, problem.operator()
    while True:
        inner = at_tolerance(solver, tolerance)
        solution = solve(inner, operator, problem.b.copy(), start, problem.last_product)
        h = outer.pack(problem.grads())
        moved = anywhere(solution.steps > 0)  # a solve without a step shows nothing
        settled = moved and before is not None and bool((h - before).norm().abs() <= rtol * h.norm().abs())
        if settled or not solution.ok or tolerance <= 10 * problem.space.eps:
            return solution
        before, start, tolerance = h, solution.value, max(tolerance / 10, 10 * problem.space.eps)


def newton_step(problem: Problem, step: Vector) -> Problem | None:
    """The problem at w + tδ for the first t in 1, ½, ¼, … that decreases ‖F‖; None if none of the first twenty does."""
    size = norm(problem.residual_of(problem.linearisation))
    for k in range(20):
        better = problem.again(problem.with_params(problem.point + step * 0.5**k))
        better.linearisation = better.linearise()
        fell = norm(better.residual_of(better.linearisation)) < size
        if bool(fell.all() if isinstance(fell, Tensor) else fell):
            return better
    return None


def _updated(problem: Problem, update: Callable[[PyTree, PyTree], PyTree]) -> Problem:
    value = update(problem.with_params(problem.point.copy()), problem.hparams)
    return problem.again(problem.with_params(problem.space.vector(value, "the value of update").copy()))


def _check_accuracy(result: Hypergradient, rtol: float, on_failure: str) -> None:
    error = float("nan") if result.relative_error is None else float(result.relative_error)
    if error <= rtol or on_failure == "ignore":
        return
    text = (
        f"the hypergradient has an estimated relative error of {error:.1e} instead of {rtol:.1e}: the inner problem is "
        f"not solved well enough (residual {float(result.inner_residual.max()):.1e}), or the linear systems are not; "
        f"let update= take more steps, or solve the inner problem further, or polish the result"
    )
    if on_failure == "raise":
        raise SolverError(text, result.solution)
    warn(text, InaccurateHypergradient)


def at_tolerance(solver: Solver, rtol: float) -> LinearSolver:
    """The solver with this rtol and without warnings. Raises TypeError if it does not iterate to a tolerance."""
    if not isinstance(solver, LinearSolver) or not solver._runs_to_tolerance:
        raise TypeError(f"solver must be one from hg.solvers that iterates to a tolerance, got {solver!r}")
    return replace(solver, rtol=rtol, atol=None, on_failure="ignore")
