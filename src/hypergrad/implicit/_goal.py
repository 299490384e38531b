"""Solving no further than the hypergradient needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import torch

from .. import _autodiff
from .._solution import Solution
from .._vector import PyTree, Vector
from ..solvers._solver import Solver, solve
from ._correction import Correction, at_tolerance, correct, newton_step
from ._problem import LastProduct, Point

Refine: TypeAlias = "Callable[[PyTree, PyTree], PyTree] | bool"

ROUGH = 0.1  # relative residual of the systems that estimate an error
REFINEMENTS = 20


def reach(
    rtol: float, point: Point, solver: Solver, start: Vector | None, polish: bool, refine: Refine
) -> tuple[Point, Solution, LastProduct, Correction]:
    """The adjoint, and params refined, until the estimated relative error of the hypergradient is at most rtol."""
    if not isinstance(rtol, (int, float)) or not 0 < rtol < 1:
        raise ValueError(f"hypergradient_rtol must be between 0 and 1, got {rtol!r}")
    rough = at_tolerance(solver, min(ROUGH, rtol) if polish else ROUGH)
    refinements = 0
    while True:
        solution, last = adjoint_to(rtol, point, solver, start)
        correction = correct(point, solution.value, rough)
        error = correction.relative.square() if polish else correction.relative
        new = None
        if refine and refinements < REFINEMENTS and not bool((error <= rtol) & correction.holds):
            new = newton_step(point, correction.step) if refine is True else _refined(point, refine)
        if new is None:
            return point, solution, last, correction
        point, start, refinements = new, solution.value, refinements + 1


def adjoint_to(rtol: float, point: Point, solver: Solver, start: Vector | None) -> tuple[Solution, LastProduct]:
    """v for which a tenfold smaller residual changed h = ∇₂E − ∂₂Fᵀv by at most rtol ‖h‖."""
    outer, tolerance, before = point.variables.outer_space, rtol, None
    while True:
        last = point.last_product(retain_graph=True)
        solution = solve(at_tolerance(solver, tolerance), point.op, point.b.copy(), start, last)
        h = outer.pack(_autodiff.add(point.direct, last.cross))
        went = bool(torch.as_tensor(solution.steps).max() > 0)  # a stage without a step shows nothing
        settled = went and before is not None and bool((h - before).norm() <= rtol * h.norm())
        if settled or not solution.ok or tolerance <= 10 * point.b.space.eps:
            return solution, last
        before, start, tolerance = h, solution.value, max(tolerance / 10, 10 * point.b.space.eps)


def _refined(point: Point, refine: Callable[[PyTree, PyTree], PyTree]) -> Point:
    """The problem at refine(params, hparams)."""
    space, problem = point.variables.space, point.problem
    given = space.pack([leaf.detach() for leaf in point.variables.given]).tree
    moved = space.vector(refine(given, problem.hparams), "the value of refine").copy()
    problem = replace(problem, params=moved.tree)
    return Point(problem, problem.variables)
