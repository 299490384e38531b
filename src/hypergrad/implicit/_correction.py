"""The first-order error of a hypergradient: what a Newton step of w, and of v with it, changes.

With L(w, λ, v) = E(w, λ) − vᵀF(w, λ) the pair (w, v) solves F = 0 and ∇₁L = ∇₁E − Aᵀv = 0, and ∇f(λ) = ∇₂L there. At a
pair that does not, with r_v = ∇₁L, one Newton step of both is

    A δ = −F,      Aᵀ dv = r_v + ∇²₁₁L δ,      dh = ∇²₂₁L δ − ∂₂Fᵀ dv

(∇²₁₁L δ = ∇²₁₁E δ − (D_w Aᵀ[δ]) v: the change of both sides of the adjoint system with w). dh is the derivative of
h(w, v) = ∇₂L along (δ, dv), so h + dh is off by the square of the errors of w and v, and so is L as a value of f(λ).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import _autodiff
from .._solution import OnFailure, Solution, Status
from .._vector import Vector
from ..solvers import LinearSolver
from ..solvers._solver import Solver, solve
from ._problem import Point

NEAR = 0.1  # relative distance from the inner solution up to which a first-order estimate is believed


@dataclass(frozen=True)
class Correction:
    """The Newton step of a pair (w, v), and its first-order effect.

    Attributes:
        hypergradient: h(w, v) = ∇₂E − ∂₂Fᵀv, a vector of hparams' space.
        change: dh.
        value: L = E − vᵀF, second-order accurate as f(λ).
        adjoint_residual: r_v = ∇₁E − Aᵀv.
        adjoint: v.
        step: δ.
        adjoint_step: dv.
        distance: ‖δ‖ / ‖w + δ‖.
        solutions: how the systems for δ and dv were solved.
    """

    hypergradient: Vector
    change: Vector
    value: Tensor
    adjoint_residual: Vector
    adjoint: Vector
    step: Vector
    adjoint_step: Vector
    distance: Tensor
    solutions: tuple[Solution, Solution]

    @property
    def corrected(self) -> Vector:
        return self.hypergradient + self.change

    @property
    def relative(self) -> Tensor:
        """‖dh‖ / ‖h + dh‖, and 0 where both are 0."""
        size = self.change.norm()
        return torch.where(size == 0, 0.0, size / self.corrected.norm())

    @property
    def holds(self) -> Tensor:
        """Whether w is near enough for first order to mean something: at a critical point of f, say, dh is 0 anyway."""
        return self.distance <= NEAR

    @property
    def status(self) -> Status:
        """The worse of the two systems."""
        return max((solution.status for solution in self.solutions), key=lambda status: status.value)

    def report(self, on_failure: OnFailure) -> None:
        for solution in self.solutions:
            solution.report("a system of the correction", on_failure)


def correct(point: Point, v: Vector, solver: Solver) -> Correction:
    """The correction at (w, v). The graphs at the point stay.

    Cost: the solver's products for two systems, one with A and one with Aᵀ; a gradient of E and one product with
        respect to params and hparams whose graph is kept, one reverse pass through it (a third derivative of an
        inner_loss), and one last product.
    """
    variables, linearisation = point.variables, point.linearise()
    space, outer, n = variables.space, variables.outer_space, len(variables.leaves)
    inputs = [*variables.leaves, *variables.differentiated]
    fixed_point = point.problem.fixed_point

    # L up to vᵀw: (E, −F) or, at a fixed point, (E, Φ) pulled back by (1, v).
    outputs = [point.outer, *linearisation.outputs]
    cotangents = [torch.ones_like(point.outer), *(v if fixed_point else -v).leaves]
    gradient = _autodiff.grad(outputs, inputs, cotangents, create_graph=True)
    first, second = _detached(gradient[:n]), _detached(gradient[n:])
    r_v = space.pack(first) - v if fixed_point else space.pack(first).own()
    h = outer.pack(second).own()

    delta = _solve(solver, point.op.T, -point.residual)
    along = _autodiff.grad(gradient[:n], inputs, delta.value.leaves, retain_graph=True)
    last = point.last_product(retain_graph=True)
    dv = _solve(solver, point.op, r_v + space.pack(along[:n]), last)
    change = outer.pack(_autodiff.add(along[n:], last.cross))
    value = point.outer.detach() - v.dot(point.residual).sum()
    there = space.pack(_detached(variables.given)) + delta.value
    distance = (delta.value.norm().square().sum() / there.norm().square().sum()).sqrt().nan_to_num(0.0)
    return Correction(h, change, value, r_v, v, delta.value, dv.value, distance, (delta, dv))


def _detached(tensors: list[Tensor]) -> list[Tensor]:
    return [x.detach() for x in tensors]


def _solve(solver: Solver, op: Any, b: Vector, last: Any = None) -> Solution:
    return solve(solver, op, b.copy(), None, last)


def newton_step(point: Point, step: Vector, halvings: int = 20) -> Point | None:
    """The problem at w + tδ with t the first of 1, ½, ¼, … at which ‖F‖ falls; None if it falls at none of these.

    Cost: one evaluation of the inner problem for each t, and of the outer loss.
    """
    size = point.residual.norm().square().sum()
    w = point.variables.space.pack(_detached(point.variables.given))
    for k in range(halvings):
        moved = w + step * 0.5**k
        problem = replace(point.problem, params=moved.tree)
        new = Point(problem, problem.variables)
        if bool(new.residual.norm().square().sum() < size):
            return new
    return None


def at_tolerance(solver: Solver, rtol: float) -> Solver:
    """The solver with another tolerance, silent. Raises TypeError where it has none."""
    if not isinstance(solver, LinearSolver) or not solver._runs_to_tolerance:
        raise TypeError(f"a tolerance needs a solver from hg.solvers that iterates to one, got {solver!r}")
    return replace(solver, rtol=rtol, atol=None, on_failure="ignore")
