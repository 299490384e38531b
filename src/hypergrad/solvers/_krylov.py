"""Krylov methods, side by side. Every scalar is per system; a system that is solved rests while others go on.

Letters are those of the papers. A step never reads from the device unless the system asks for a look.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._solution import Status
from .._vector import Basis, Vector
from ..operators import LinearOperator, function
from ._preconditioners import Reused, is_recipe
from ._solver import IterativeSolver, Outcome, Real, System, length, ratio, root, where


def divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0: a direction that has vanished takes no further step."""
    return torch.where(b == 0, 0.0, a / b)


def event(code: Real | None, happened: Real, status: Status) -> Real:
    """Record a status where it happened, unless something else happened before."""
    code = 0 if code is None else code
    return where(happened & (code == 0), status.value, code)


def pairing(q: Vector, ap: Vector, look: Callable[[Tensor], Real]) -> tuple[Real, Real]:
    """qᵀ(Ap), and ‖q‖ ‖Ap‖."""
    return look(q.dot(ap)), length(q, look) * length(ap, look)


def asymmetry(one: tuple[Real, Real], other: tuple[Real, Real], eps: float) -> Real:
    """Whether pᵀ(Aq) ≠ qᵀ(Ap), from products that the method has done anyway: true for no symmetric A."""
    return abs(one[0] - other[0]) > eps**0.5 * (one[1] + other[1])


def build_preconditioner(preconditioner: Any, system: System) -> Callable[[Vector], Vector] | None:
    """r ↦ M⁻¹ r from what the user gave: None, an operator, a function of pytrees, or a recipe such as Nystrom."""
    if preconditioner is None or isinstance(preconditioner, LinearOperator):
        return preconditioner
    if isinstance(preconditioner, Reused) and system.goal is None:
        raise ValueError(
            "Reused needs a solver with a tolerance (rtol or atol): a fixed number of steps does not show that the "
            "preconditioner has aged"
        )
    if is_recipe(preconditioner):
        if system.precondition is None:
            system.precondition = preconditioner.preconditioner(system.op, system.b)
        return system.precondition
    if not callable(preconditioner) or isinstance(preconditioner, type):
        raise TypeError(
            f"preconditioner must be a LinearOperator, a function r ↦ M⁻¹r of pytrees, or a recipe such as "
            f"Nystrom(...), got {preconditioner!r}"
        )
    return function(preconditioner)


@dataclass(frozen=True, kw_only=True)
class CG(IterativeSolver):
    """Conjugate gradients for a symmetric positive definite A.

        α = rᵀz / pᵀAp,   x ← x + αp,   r ← r − αAp,   z = M⁻¹r,   β = (rᵀz)₊ / rᵀz,   p ← z + βp

    Curvature pᵀAp ≤ 0 ends it with NOT_POSITIVE_DEFINITE at the last iterate before; the first two products are
    compared, so that an A that is not symmetric after all is found (NOT_SYMMETRIC).

    Args:
        preconditioner: r ↦ M⁻¹r, symmetric positive definite: a LinearOperator, a function of pytrees like b, or
            `Nystrom(...)`, which is built from A.

    Cost: one product a step; four vectors beside b (one more with a preconditioner or x0).
    Source: Hestenes and Stiefel 1952.

    Example:
        >>> op = hg.operators.matrix(torch.tensor([[4.0, 1.0], [1.0, 3.0]]), symmetric=True)
        >>> CG(rtol=1e-6)(op, torch.tensor([1.0, 2.0])).value
        tensor([0.0909, 0.6364])
    """

    preconditioner: Any = None
    _needs_symmetric: ClassVar[bool] = True

    def _iterate(self, system: System) -> Outcome:
        op, look, stop2 = system.op, system.look, system.look(system.stop * system.stop)
        precondition = build_preconditioner(self.preconditioner, system)
        x, r = system.start()
        z = r if precondition is None else precondition(r)
        p = z.copy()
        first = system.b if precondition is None and system.x0 is None else z.copy()
        rz = look(r.dot(z))
        rr = rz if precondition is None else look(r.dot(r))
        going = rr > stop2
        code, trace, curvatures, probe = None, [rr], [], None
        for k in range(system.max_steps):
            if system.finished(k, going):
                break
            ap = op(p)
            if probe is not None:
                asymmetric = asymmetry(pairing(first, ap, look), probe, p.space.eps)
                code, first, probe = event(None, asymmetric & going, Status.NOT_SYMMETRIC), system.b, None
            curvature = look(p.dot(ap))
            curvatures.append(curvature)
            going = going & (curvature > 0)
            alpha = ratio(rz, curvature, going)
            x.add_(p, alpha)
            r.add_(ap, alpha, -1.0)
            z = r if precondition is None else precondition(r)
            rz, old = look(r.dot(z)), rz
            rr = rz if precondition is None else look(r.dot(r))
            going = going & (rr > stop2)
            trace.append(rr)
            p.scale_add_(ratio(rz, old, going), z)
            if k == 0:
                probe = pairing(p, ap, look)
            del ap
        norms2, flat = system.stack(trace), False
        if isinstance(norms2, Tensor):
            norms = norms2.sqrt()
            flat = ((torch.stack(curvatures) <= 0) & (norms2[:-1] > stop2)).any(0) if curvatures else False
        else:
            norms = [root(norm2) for norm2 in norms2]
            flat = any(c <= 0 and norm2 > stop2 for c, norm2 in zip(curvatures, norms2, strict=False))
        return Outcome(x, norms, len(trace) - 1, event(code, flat, Status.NOT_POSITIVE_DEFINITE))


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
        least = max(100 * v.space.eps, v.space.eps**0.75)
        first: list[Vector] = []
        for k in range(system.max_steps):
            if system.finished(k, going):
                break
            z = z * divide(torch.ones_like(gamma), gamma)
            az = op(z)
            if k == 0:
                first = [z, az]
            elif k == 1:
                one, other = (pairing(*pair, lambda scalar: scalar) for pair in ((first[0], az), (z, first[1])))
                code = event(code, asymmetry(one, other, v.space.eps) & going, Status.NOT_SYMMETRIC)
                first.clear()
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


@dataclass(frozen=True, kw_only=True)
class GMRES(IterativeSolver):
    """Generalised minimal residuals for any A, restarted: the usual choice where A is not symmetric.

    Arnoldi with Gram–Schmidt done twice: A V_m = V_{m+1} H, then min_y ‖βe₁ − Hy‖, x ← x + V_m y. A whole cycle that
    gains less than a thousandth ends it as STAGNATED.

    Args:
        restart: m, steps after which the basis is thrown away.

    Cost: one product a step; m + 1 vectors.
    Source: Saad and Schultz 1986.
    """

    restart: int = 30

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.restart, int) or self.restart < 1:
            raise ValueError(f"GMRES: restart must be an integer ≥ 1, got {self.restart!r}")

    def _iterate(self, system: System) -> Outcome:
        x, r = system.start()
        beta = r.norm()
        going, code = beta > system.stop, None
        trace, steps, cycle = [beta.unsqueeze(0)], 0, -1
        while steps < system.max_steps and cycle and not system.finished(steps, going):
            rest = min(self.restart, system.max_steps - steps)
            basis, h, cycle = self._arnoldi(system, r, beta, going, rest, steps)
            if not cycle:
                break
            q, triangle, norms = hessenberg_qr(h, beta)
            y = triangular_solve(triangle, q[..., 0, :] * beta.unsqueeze(-1))
            y = torch.where(going.unsqueeze(-1), y, 0.0)
            x = x + basis.combine(y)
            left = -(h @ y.unsqueeze(-1)).squeeze(-1)
            left[..., 0] += beta
            r = basis.combine(left)
            trace.append(torch.where(going, norms, beta))
            stuck = (norms[-1] > 0.999 * beta) & going if cycle == self.restart else going & False
            code = event(code, stuck, Status.STAGNATED)
            beta = r.norm()
            going = going & ~stuck & (beta > system.stop)
            steps += cycle
            del basis  # before the next one is there
        return Outcome(x, torch.cat(trace), steps, code)

    def _arnoldi(
        self, system: System, r: Vector, beta: Tensor, going: Tensor, most: int, before: int
    ) -> tuple[Basis, Tensor, int]:
        """The basis, the Hessenberg matrix [steps + 1, steps] (or [B, …]) and the steps done."""
        basis = Basis(r, most + 1)
        basis[0] = r * divide(torch.ones_like(beta), beta)
        h = torch.zeros(*beta.shape, most + 1, most, dtype=beta.dtype, device=beta.device)
        # ‖βe₁ − Hy‖ is least at β|n₀|, n the unit vector orthogonal to H's columns: one rotation for each new column.
        null, largest, least = torch.ones_like(beta).unsqueeze(-1), torch.zeros_like(beta), beta
        for j in range(most):
            w = system.op(basis[j])
            for _ in range(2):
                projection = basis.coefficients(w, j + 1)
                w = w - basis.combine(projection)
                h[..., : j + 1, j] += projection
            norm = w.norm()
            h[..., j + 1, j] = norm
            basis[j + 1] = w * divide(torch.ones_like(norm), norm)
            if system.goal is not None:
                a = torch.linalg.vecdot(null, h[..., : j + 1, j])
                size = torch.hypot(a, norm)
                largest = torch.maximum(largest, size)
                dead = size <= negligible(largest)
                s, c = torch.where(dead, 1.0, norm / size), torch.where(dead, 0.0, a / size)
                null = torch.cat([null * s.unsqueeze(-1), -c.unsqueeze(-1)], -1)
                least = least * s
                if system.finished(before + j + 1, going & (least > system.stop)):
                    return basis, h[..., : j + 2, : j + 1], j + 1
        return basis, h, most


def hessenberg_qr(h: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q, R of a Hessenberg matrix [m + 1, m], and the least residual norms ‖βe₁ − H_j y‖ for j = 1 … m: [m, …]."""
    q, triangle = torch.linalg.qr(h)
    diagonal = triangle.diagonal(dim1=-2, dim2=-1).abs()
    below = h.diagonal(offset=-1, dim1=-2, dim2=-1)
    dead = diagonal <= negligible(diagonal.amax(-1, keepdim=True))
    sines = torch.where(dead, 1.0, below / diagonal).clamp_max(1.0)
    norms = beta.unsqueeze(-1) * sines.cumprod(-1)
    return q, triangle, norms.movedim(-1, 0)


def negligible(largest: Tensor) -> Tensor:
    """The size below which a diagonal entry of R is rounding."""
    return 10 * torch.finfo(largest.dtype).eps * largest


def triangular_solve(triangle: Tensor, rhs: Tensor) -> Tensor:
    """R⁻¹ rhs, leaving out directions in which R is zero to rounding."""
    diagonal = triangle.diagonal(dim1=-2, dim2=-1).abs()
    dead = diagonal <= negligible(diagonal.amax(-1, keepdim=True))
    eye = torch.eye(triangle.shape[-1], dtype=triangle.dtype, device=triangle.device)
    safe = torch.where(dead.unsqueeze(-1), eye, triangle)
    right = torch.where(dead, 0.0, rhs).unsqueeze(-1)
    return torch.linalg.solve_triangular(safe, right, upper=True).squeeze(-1)


@dataclass(frozen=True, kw_only=True)
class BiCGStab(IterativeSolver):
    """Stabilised biconjugate gradients for any A, in constant memory.

    Its residual is not monotone, and ρ = r̂ᵀr, r̂ᵀv or ω may vanish: BREAKDOWN, at the last iterate before.

    Cost: two products a step; seven vectors beside b.
    Source: van der Vorst 1992.
    """

    def _iterate(self, system: System) -> Outcome:
        op, stop, eps = system.op, system.stop, system.b.space.eps
        x, r = system.start()
        shadow, p, v = r.copy(), r.copy(), r.zeros()
        rho = r.dot(r)
        norm = rho.sqrt()
        shadow_norm = norm
        going, code, trace = norm > stop, None, [norm]
        for k in range(system.max_steps):
            if system.finished(k, going):
                break
            v = op(p)
            along = shadow.dot(v)
            broke = (along.abs() <= eps * eps * shadow_norm * v.norm()) | (rho.abs() <= eps * shadow_norm * norm)
            code = event(code, going & broke, Status.BREAKDOWN)
            going = going & ~broke
            alpha = torch.where(going, divide(rho, along), 0.0)
            s = r - v * alpha
            t = op(s)
            omega = torch.where(going, divide(t.dot(s), t.dot(t)), 0.0)
            x.add_(p, alpha).add_(s, omega)
            r = s.add_(t, omega, -1.0)
            rho, old = shadow.dot(r), rho
            p.add_(v, omega, -1.0).scale_add_(divide(rho, old) * divide(alpha, omega), r)
            norm = r.norm()
            trace.append(norm)
            going = going & (norm > stop)
            stuck = going & (omega == 0)
            code = event(code, stuck, Status.BREAKDOWN)
            going = going & ~stuck
        return Outcome(x, torch.stack(trace), len(trace) - 1, code)


@dataclass(frozen=True, kw_only=True)
class NormalCG(IterativeSolver):
    """Conjugate gradients on the normal equations AᵀA x = Aᵀb, for any A; the condition number is squared.

        s = Aᵀr,   q = Ap,   α = sᵀs / qᵀq,   x ← x + αp,   r ← r − αq,   p ← s₊ + (s₊ᵀs₊ / sᵀs) p

    AᵀA is never formed. On an inconsistent singular system it ends as STAGNATED at a least-squares solution.

    Cost: one product with A and one with Aᵀ a step; five vectors beside b.
    Source: Hestenes and Stiefel 1952, section 10; the form is that of CGLS in Paige and Saunders 1982.
    """

    def _iterate(self, system: System) -> Outcome:
        op, transposed, stop2, eps = system.op, system.op.T, system.stop**2, system.b.space.eps
        x, r = system.start()
        rr = r.dot(r)
        going, trace = rr > stop2, [rr]
        if not system.max_steps or system.finished(0, going):
            return Outcome(x, rr.sqrt().unsqueeze(0), 0)
        s = transposed(r)
        p = s.copy()
        ss, zero, flat = s.dot(s), torch.zeros_like(rr), torch.zeros_like(going)
        least = (10 * eps) ** 2 * ss
        del s
        for k in range(system.max_steps):
            if k and system.finished(k, going):
                break
            steep = ss > least
            flat = flat | (going & ~steep)
            going = going & steep
            q = op(p)
            alpha = torch.where(going, divide(ss, q.dot(q)), zero)
            x.add_(p, alpha)
            r.add_(q, alpha, -1.0)
            del q
            rr = r.dot(r)
            trace.append(rr)
            going = going & (rr > stop2)
            if k + 1 < system.max_steps:
                s = transposed(r)
                ss, old = s.dot(s), ss
                p.scale_add_(divide(ss, old), s)
                del s
        return Outcome(x, torch.stack(trace).sqrt(), len(trace) - 1, event(None, flat, Status.STAGNATED))


@dataclass(frozen=True, kw_only=True)
class LSQR(IterativeSolver):
    """Golub–Kahan bidiagonalisation of A: min ‖Ax − b‖ for any A, steadier than NormalCG where A is ill-conditioned.

        βu = Av − αu,   αv = Aᵀu − βv,   one rotation (c, s) a step;   ‖r‖ = φ̄,   ‖Aᵀr‖ = φ̄ α |c|

    On an inconsistent singular system it ends as STAGNATED at the least-squares solution.

    Cost: one product with A and one with Aᵀ a step; four vectors beside b.
    Source: Paige and Saunders 1982.
    """

    def _iterate(self, system: System) -> Outcome:
        op, transposed, stop, eps = system.op, system.op.T, system.stop, system.b.space.eps
        x, u = system.start()
        beta = u.norm()
        going, code, trace = beta > stop, None, [beta]
        if not system.max_steps or system.finished(0, going):
            return Outcome(x, beta.unsqueeze(0), 0)
        one = torch.ones_like(beta)
        u.scale_(divide(one, beta))
        v = transposed(u).copy()
        alpha = v.norm()
        v.scale_(divide(one, alpha))
        w = v.copy()
        rho_bar, phi_bar, size = alpha, beta, alpha
        flat = alpha == 0
        for k in range(system.max_steps):
            if k and system.finished(k, going):
                break
            code = event(code, going & flat, Status.STAGNATED)
            going = going & ~flat
            u.scale_add_(-alpha, op(v))
            beta = u.norm()
            u.scale_(divide(one, beta))
            rho = torch.hypot(rho_bar, beta)
            c, s = divide(rho_bar, rho), divide(beta, rho)
            x.add_(w, torch.where(going, divide(c * phi_bar, rho), 0.0))
            phi_bar = torch.where(going, s * phi_bar, phi_bar)
            trace.append(phi_bar)
            going = going & (phi_bar > stop)
            if k + 1 < system.max_steps:
                v.scale_add_(-beta, transposed(u))
                alpha = v.norm()
                v.scale_(divide(one, alpha))
                w.scale_add_(-divide(s * alpha, rho), v)
                rho_bar = -c * alpha
                size = torch.maximum(size, torch.hypot(alpha, beta))
                flat = alpha * c.abs() <= 10 * eps * size
        return Outcome(x, torch.stack(trace), len(trace) - 1, code)
