"""Krylov methods for a symmetric A, with the conventions of `_krylov`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._solution import Status
from .._vector import Scalar, Vector, larger, norm, ratio, square_root
from ._preconditioners import build_preconditioner
from ._solver import IterativeSolver, Outcome, System, divide, event
from ._theory import Structure, doubled, rate_of, steps_needed

ROUNDING = 10  # multiples of eps that count as rounding
IDLE = 10  # steps without a gain after which MINRES has stagnated; in exact arithmetic every other step gains


class SymmetryCheck:
    """Tests whether yᵀ(Ax) = xᵀ(Ay), as for a symmetric A, with the first two vectors x, y that a method multiplies."""

    def __init__(self, system: System, first: Vector):
        self.number, self.drawn_anew, self.first = system.number, system.op.stochastic, first
        self.before: tuple[Scalar, Scalar] | None = None

    def take(self, step: int, value: Scalar, ax: Vector) -> None:
        """Record yᵀ(Ax) and ‖Ax‖ after step 0, before the memory of Ax is reused."""
        if step == 0 and not self.drawn_anew:
            self.before = value, norm(ax, self.number)

    def fails(self, step: int, y: Vector, ay: Vector) -> Scalar:
        """Whether Ay, the product of step 1, shows that A is not symmetric."""
        if step != 1 or self.before is None:
            return False
        value, size = self.before
        sizes = size * norm(y, self.number) + norm(self.first, self.number) * norm(ay, self.number)
        return abs(value - self.number(self.first.dot(ay))) > ay.space.eps**0.5 * sizes


@dataclass(frozen=True, kw_only=True)
class CG(IterativeSolver):
    """Conjugate gradients for a symmetric positive definite A.

        α = rᵀz / pᵀAp,   x ← x + αp,   r ← r − αAp,   z = M⁻¹r,   β = (rᵀz)₊ / rᵀz,   p ← z + βp

    Curvature pᵀAp that is not positive (to rounding) ends the solve as NOT_POSITIVE_DEFINITE at the previous iterate
    (Steihaug's rule); `Solution.curvature` holds the least pᵀAp / pᵀp. The first two products show whether A is
    NOT_SYMMETRIC. Every step lowers ½xᵀAx − bᵀx and, if A is positive definite, ‖x − A⁻¹b‖. The last iterate is
    therefore returned even if its residual is above ‖b‖ (DIVERGED, with a warning). If A is singular and b outside its
    range, iterates grow along the null space; MINRES and `Auto` find a least-squares solution.

    Args:
        preconditioner: r ↦ M⁻¹r, symmetric positive definite: a LinearOperator, a function of pytrees like b, or
            `Nystrom(...)`, which is built from A.

    Cost: one product a step; four vectors beside b (one more with a preconditioner or x0).
    Source: Hestenes and Stiefel 1952; Steihaug 1983.

    Example:
        >>> op = hg.operators.matrix(torch.tensor([[4.0, 1.0], [1.0, 3.0]]), symmetric=True)
        >>> CG(rtol=1e-6)(op, torch.tensor([1.0, 2.0])).value
        tensor([0.0909, 0.6364])
    """

    preconditioner: Any = None
    _needs_symmetric: ClassVar[bool] = True

    def _iterate(self, system: System) -> Outcome:
        op, stop2 = system.op, system.stop * system.stop
        number = Tensor.item if system.reads else system.number
        precondition = None if self.preconditioner is None else build_preconditioner(self.preconditioner, system)
        x, r = system.start()
        z = r if precondition is None else precondition(r)
        p = z.copy()
        rz = number(r.dot(z))
        rr = rz if precondition is None else number(r.dot(r))
        going, code, trace, curvatures = rr > stop2, None, [rr], []
        symmetry = SymmetryCheck(system, system.b if precondition is None and system.x0 is None else p.copy())
        pp, steepest = rz, 0.0 * rz  # pp = pᵀMp, updated by zᵀMp = 0 for the previous p
        for k in range(system.max_steps):
            if system.finished(k, going):
                break
            ap = op(p)
            if k == 1:
                code = event(code, going & symmetry.fails(k, p, ap), Status.NOT_SYMMETRIC)
            curvature = number(p.dot(ap))
            quotient = ratio(curvature, pp, going)
            curvatures.append(quotient if precondition is None else ratio(curvature, number(p.dot(p)), going))
            steepest = larger(steepest, quotient)
            flat = ROUNDING * p.space.eps * steepest * pp
            code = event(code, going & (curvature <= flat), Status.NOT_POSITIVE_DEFINITE)
            going = going & (curvature > flat)
            alpha = ratio(rz, curvature, going)
            x.add_(p, alpha)
            r.add_(ap, alpha, -1.0)
            z = r if precondition is None else precondition(r)
            rz, old = number(r.dot(z)), rz
            rr = rz if precondition is None else number(r.dot(r))
            going = going & (rr > stop2)
            trace.append(rr)
            beta = ratio(rz, old, going)
            pp = rz + beta * beta * pp
            if k == 0 and system.max_steps > 1:  # before p is overwritten, because ap may share its memory
                symmetry.take(k, beta * curvature + number(z.dot(ap)), ap)
            p.scale_add_(beta, z)
            del ap
        return Outcome(x, _roots(trace), len(trace) - 1, code, "", _least(curvatures), steepest)

    def valid_for(self, structure: Structure) -> str | None:
        definite = structure.definiteness == "positive definite"
        wrong = None if definite else f"A is {structure.definiteness}, not positive definite"
        return super().valid_for(structure) or wrong

    def products_needed(self, structure: Structure, rtol: float = 1e-6) -> float | None:
        """By the bound 2 ((√κ − 1)/(√κ + 1))^k on the error in the norm of A (Saad 2003, section 6.11.4)."""
        return steps_needed(rate_of(math.sqrt(structure.condition)), rtol, 2.0)


def _roots(squares: list[Scalar]) -> Any:
    return torch.stack(squares).sqrt() if isinstance(squares[0], Tensor) else [square_root(a) for a in squares]


def _least(curvatures: list[Scalar]) -> Scalar | None:
    if not curvatures:
        return None
    return torch.stack(curvatures).amin(0) if isinstance(curvatures[0], Tensor) else min(curvatures)


@dataclass(frozen=True, kw_only=True)
class MINRES(IterativeSolver):
    """Minimal residuals for a symmetric A, which may be indefinite or singular.

    Lanczos vectors v (and z = M⁻¹v), one Givens rotation (c, s) a step; ‖r‖ = |η| never grows. A step that would gain
    less than its rounding, c² |η| ≤ 10 eps ‖A‖ |cη| ‖w‖, is skipped. Ten skipped steps in succession, or an invariant
    Krylov space, end the solve as STAGNATED: for an inconsistent singular system, at a least-squares solution.

    Args:
        preconditioner: r ↦ M⁻¹r, symmetric positive definite, as in CG.

    Cost: one product a step; seven vectors beside b (two more with a preconditioner).
    Source: Paige and Saunders 1975; letters as in Elman, Silvester and Wathen, Algorithm 6.1. The stopping rule for
        STAGNATED is ours: rounding errors of x grow along the null space and do not show in η.

    Example:
        >>> import torch, hypergrad as hg
        >>> op = hg.operators.matrix(torch.diag(torch.tensor([2.0, -1.0])), symmetric=True)
        >>> hg.solvers.MINRES(rtol=1e-6)(op, torch.tensor([2.0, 3.0])).value.round(decimals=3)
        tensor([ 1., -3.])
    """

    preconditioner: Any = None
    _needs_symmetric: ClassVar[bool] = True

    def _iterate(self, system: System) -> Outcome:
        op, rounding, closed = system.op, ROUNDING * system.b.space.eps, system.b.space.eps**0.75
        precondition = None if self.preconditioner is None else build_preconditioner(self.preconditioner, system)
        x, r = system.start()
        v = r.copy()
        z = v if precondition is None else precondition(v)
        v_old, w, w_old = v.zeros(), v.zeros(), v.zeros()
        gamma = v.dot(z).clamp_min(0).sqrt()
        eta, norm, rotation = gamma, r.norm(), Rotation(gamma)
        gamma_old, idle, code, trace, size = 1 + 0 * gamma, 0 * gamma, None, [norm], system.size(x, r)
        going, az, symmetry = norm > system.stop, v, None
        for k in range(system.max_steps):
            if system.finished(k, going):
                break
            z = z * divide(1.0, gamma)
            symmetry = symmetry or SymmetryCheck(system, z)
            symmetry.take(k - 1, z.dot(az), az)
            az = op(z)
            code = event(code, going & symmetry.fails(k, z, az), Status.NOT_SYMMETRIC)
            delta = az.dot(z)
            size = torch.maximum(size, az.norm() if precondition is None else divide(az.norm(), z.norm()))
            v_new = az - v * divide(delta, gamma)
            v_new.add_(v_old, divide(gamma, gamma_old), -1.0)
            z_new = v_new if precondition is None else precondition(v_new)
            gamma_new = v_new.dot(z_new).clamp_min(0).sqrt()
            a1, a2, a3 = rotation.turn(delta, gamma, gamma_new)
            c, s = rotation.c, rotation.s
            w_new = (z - w_old * a3 - w * a2) * divide(1.0, a1)
            step = c * eta
            gains = going & (c * c * norm > rounding * size * step.abs() * w_new.norm())
            idle = torch.where(gains, 0.0, idle + 1)
            stuck = (idle >= IDLE) | (a1 <= closed * size)
            code = event(code, going & stuck, Status.STAGNATED)
            going = going & ~stuck
            x.add_(w_new, torch.where(gains & going, step, 0.0))
            c, s = torch.where(gains, c, 0.0), torch.where(gains, s, 1.0)
            eta = torch.where(going, -s * eta, eta)
            if precondition is None:
                norm = eta.abs()
            else:
                r = r * torch.where(going, s * s, 1.0) + v_new * torch.where(going, divide(c * eta, gamma_new), 0.0)
                norm = r.norm()
            going = going & (norm > system.stop)
            trace.append(norm)
            v_old, v, z, w_old, w = v, v_new, z_new, w, w_new
            gamma_old, gamma = gamma, gamma_new
        return Outcome(x, torch.stack(trace), len(trace) - 1, code)

    def products_needed(self, structure: Structure, rtol: float = 1e-6) -> float | None:
        """By the bound 2 ((√κ − 1)/(√κ + 1))^k on the residual if A is definite, else 2 ((κ − 1)/(κ + 1))^⌊k/2⌋.

        Source: Elman, Silvester and Wathen 2014, section 2.4.
        """
        if structure.singular:
            return None
        if structure.definiteness == "indefinite":
            return doubled(steps_needed(rate_of(structure.condition), rtol, 2.0))
        return steps_needed(rate_of(math.sqrt(structure.condition)), rtol, 2.0)


class Rotation:
    """The last two Givens rotations (c, s) of MINRES."""

    def __init__(self, like: Tensor):
        self.c, self.c_old, self.s, self.s_old = 1 + 0 * like, 1 + 0 * like, 0 * like, 0 * like

    def turn(self, delta: Tensor, gamma: Tensor, gamma_new: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotate the column (γ, δ, γ₊) of the Lanczos matrix; return its entries in R, the diagonal first."""
        a0 = self.c * delta - self.c_old * self.s * gamma
        a1 = torch.hypot(a0, gamma_new)
        a2 = self.s * delta + self.c_old * self.c * gamma
        a3 = self.s_old * gamma
        self.c_old, self.s_old = self.c, self.s
        self.c, self.s = divide(a0, a1), divide(gamma_new, a1)
        return a1, a2, a3
