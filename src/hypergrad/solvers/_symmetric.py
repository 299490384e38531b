"""Krylov methods for a symmetric A, side by side. Every scalar is per system; a solved system rests while others go on.

Letters are those of the papers. A step reads from the device only where the system asks whether it is finished.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._solution import Status
from .._vector import Scalar, Vector, larger, norm, ratio, square_root
from ._preconditioners import build_preconditioner
from ._solver import IterativeSolver, Outcome, System, divide, event


class SymmetryCheck:
    """Whether xᵀ(Ay) = yᵀ(Ax) for the first two vectors that a method multiplies: false for no symmetric A."""

    def __init__(self, number: Callable[[Tensor], Scalar]):
        self.number = number
        self.first: tuple[Vector, Vector] | None = None
        self.forward: tuple[Scalar, Scalar] | None = None

    def fails(self, x: Vector, ax: Vector) -> Scalar:
        """Take in a product; whether it shows that A is not symmetric."""
        if self.first is None:
            self.first = x.copy(), ax.copy()
            return False
        (y, ay), eps = self.first, x.space.eps
        self.first = None
        sizes = norm(x, self.number) * norm(ay, self.number) + norm(y, self.number) * norm(ax, self.number)
        return abs(self.number(x.dot(ay)) - self.number(y.dot(ax))) > eps**0.5 * sizes


@dataclass(frozen=True, kw_only=True)
class CG(IterativeSolver):
    """Conjugate gradients for a symmetric positive definite A.

        α = rᵀz / pᵀAp,   x ← x + αp,   r ← r − αAp,   z = M⁻¹r,   β = (rᵀz)₊ / rᵀz,   p ← z + βp

    Curvature pᵀAp that is negative, or zero to rounding, ends it with NOT_POSITIVE_DEFINITE at the iterate before
    (Steihaug's rule); `Solution.curvature` holds the least quotient pᵀAp / pᵀMp met. The first two products are
    compared, so that an A that is not symmetric after all is found (NOT_SYMMETRIC).

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
        op, number, stop2 = system.op, system.number, system.number(system.stop * system.stop)
        precondition = build_preconditioner(self.preconditioner, system)
        x, r = system.start()
        z = r if precondition is None else precondition(r)
        p = z.copy()
        rz = number(r.dot(z))
        rr = rz if precondition is None else number(r.dot(r))
        going, code, trace, curvatures = rr > stop2, None, [rr], []
        rounding = system.stop if system.goal is not None else p.space.eps**0.75 * system.rhs_norm
        noise2 = number(rounding * rounding)
        pp, steepest, symmetry = rz, 0.0 * rz, SymmetryCheck(number)  # pp = pᵀMp: z and the last p are M-orthogonal
        for k in range(system.max_steps):
            if system.finished(k, going):
                break
            ap = op(p)
            if k < 2:
                code = event(code, going & symmetry.fails(p, ap), Status.NOT_SYMMETRIC)
            curvature = number(p.dot(ap))
            curvatures.append(ratio(curvature, pp, going))
            steepest = larger(steepest, curvatures[-1])
            flat = going & (curvature <= p.space.eps * steepest * pp)
            code = event(code, flat & (rr > noise2), Status.NOT_POSITIVE_DEFINITE)
            going = going & (curvature > p.space.eps * steepest * pp)
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
            p.scale_add_(beta, z)
            del ap
        norms2 = system.stack(trace)
        norms = norms2.sqrt() if isinstance(norms2, Tensor) else [square_root(norm2) for norm2 in norms2]
        return Outcome(x, norms, len(trace) - 1, code, curvature=_least(curvatures), steepest=steepest)


def _least(curvatures: list[Scalar]) -> Scalar | None:
    if not curvatures:
        return None
    return torch.stack(curvatures).amin(0) if isinstance(curvatures[0], Tensor) else min(curvatures)


@dataclass(frozen=True, kw_only=True)
class MINRES(IterativeSolver):
    """Minimal residuals for a symmetric A, which may be indefinite or singular.

    Lanczos vectors v (and z = M⁻¹v), one Givens rotation (c, s) a step, ‖r‖ = |η| never grows. On an inconsistent
    singular system it ends as STAGNATED at a least-squares solution, if rounding lets ‖Ar‖ fall to nothing; if not it
    goes on to MAX_STEPS and x grows along the null space: take LSQR there.

    Args:
        preconditioner: r ↦ M⁻¹r, symmetric positive definite, as in CG.

    Cost: one product a step; seven vectors beside b (two more with a preconditioner).
    Source: Paige and Saunders 1975; letters as in Elman, Silvester and Wathen, Algorithm 6.1.
    """

    preconditioner: Any = None
    _needs_symmetric: ClassVar[bool] = True

    def _iterate(self, system: System) -> Outcome:
        op, stop = system.op, system.stop
        precondition = build_preconditioner(self.preconditioner, system)
        x, r = system.start()
        v = r.copy()
        z = v if precondition is None else precondition(v)
        v_old, w, w_old = v.zeros(), v.zeros(), v.zeros()
        gamma = v.dot(z).clamp_min(0).sqrt()
        gamma_old = torch.ones_like(gamma)
        eta, norm = gamma, r.norm()
        c, c_old, s, s_old, size = gamma * 0 + 1, gamma * 0 + 1, gamma * 0, gamma * 0, gamma * 0
        going, code, trace = norm > stop, None, [norm]
        symmetry, least = SymmetryCheck(lambda scalar: scalar), max(100 * v.space.eps, v.space.eps**0.75)
        for k in range(system.max_steps):
            if system.finished(k, going):
                break
            z = z * divide(torch.ones_like(gamma), gamma)
            az = op(z)
            if k < 2:
                code = event(code, going & symmetry.fails(z, az), Status.NOT_SYMMETRIC)
            delta = az.dot(z)
            v_new = az - v * divide(delta, gamma)
            v_new.add_(v_old, divide(gamma, gamma_old), -1.0)
            z_new = v_new if precondition is None else precondition(v_new)
            gamma_new = v_new.dot(z_new).clamp_min(0).sqrt()
            a0 = c * delta - c_old * s * gamma
            a1 = torch.hypot(a0, gamma_new)
            a2 = s * delta + c_old * c * gamma
            a3 = s_old * gamma
            # ‖A r‖ / ‖r‖ of the iterate before this step: where it vanishes, that is a least-squares solution.
            size = torch.maximum(size, torch.hypot(delta, torch.hypot(gamma_new, gamma * (k > 0))))
            flat = torch.hypot(a0, c * gamma_new) <= least * size
            code = event(code, going & flat, Status.STAGNATED)
            going = going & ~flat
            c_old, s_old = c, s
            c, s = divide(a0, a1), divide(gamma_new, a1)
            w_new = (z - w_old * a3 - w * a2) * divide(torch.ones_like(a1), a1)
            x.add_(w_new, torch.where(going, c * eta, 0.0))
            eta = torch.where(going, -s * eta, eta)
            if precondition is None:
                norm = eta.abs()
            else:
                r = r * torch.where(going, s * s, 1.0) + v_new * torch.where(going, divide(c * eta, gamma_new), 0.0)
                norm = r.norm()
            going = going & (norm > stop)
            trace.append(norm)
            v_old, v, z, w_old, w = v, v_new, z_new, w, w_new
            gamma_old, gamma = gamma, gamma_new
        return Outcome(x, torch.stack(trace), len(trace) - 1, code)
