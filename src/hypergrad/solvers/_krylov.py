"""Krylov methods for any A, side by side. Every scalar is per system; a solved system rests while others go on.

Letters are those of the papers. A step reads from the device only where the system asks whether it is finished.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._basis import Basis
from .._solution import Status
from .._vector import Vector
from ._solver import IterativeSolver, Outcome, System, divide, event


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
