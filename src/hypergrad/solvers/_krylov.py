"""Krylov methods for any A. With several systems, scalars hold one entry for each, and converged systems are frozen.

The letters are those of the papers. A step reads from the device only in `system.finished`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor

from .._basis import Basis
from .._solution import Status
from .._vector import Vector, anywhere, where
from ._solver import IterativeSolver, Outcome, System, divide, event
from ._symmetric import MINRES
from ._theory import Structure, steps_needed

BLOCK = 8  # vectors of a Krylov basis that are allocated together


@dataclass(frozen=True, kw_only=True)
class GMRES(IterativeSolver):
    """Restarted generalised minimal residuals for any A: the usual choice if A is not symmetric.

    Arnoldi with repeated Gram–Schmidt: A V_m = V_{m+1} H, then min_y ‖βe₁ − Hy‖, x ← x + V_m y. The solve ends as
    STAGNATED if a cycle of m steps (fewer if the Krylov space becomes invariant) reduces the residual by less than
    0.1 %. For a singular A that residual may exceed that of the least-squares solution, which LSQR finds.

    Args:
        restart: m, the number of steps after which the basis is discarded.

    Cost: one product a step; a vector for each step of a cycle, allocated eight at a time, m + 1 at most.
    Source: Saad and Schultz 1986.

    Example:
        >>> import torch, hypergrad as hg
        >>> op = hg.operators.matrix(torch.tensor([[2.0, 1.0], [0.0, 1.0]]))
        >>> hg.solvers.GMRES(rtol=1e-6)(op, torch.tensor([1.0, 2.0])).value.round(decimals=3)
        tensor([-0.5000,  2.0000])
    """

    restart: int = 30

    def _iterate(self, system: System) -> Outcome:
        x, r = system.start()
        beta = r.norm()
        going, code, size = beta > system.stop, None, system.size(x, r)
        trace, steps = [beta.unsqueeze(0)], 0
        while steps < system.max_steps and not system.finished(steps, going):
            rest = min(self.restart, system.max_steps - steps)
            basis, h, closed, size = arnoldi(system, r, going, rest, steps, size)
            cycle = h.shape[-1]
            q, triangle, norms = hessenberg_qr(h, beta, negligible(size, closed))
            y = triangular_solve(triangle, q[..., 0, :] * beta.unsqueeze(-1), negligible(size, closed))
            y = torch.where(going.unsqueeze(-1), y, 0.0)
            x = x + basis.combine(y)
            left = -(h @ y.unsqueeze(-1)).squeeze(-1)
            left[..., 0] += beta
            r = basis.combine(left)
            trace.append(torch.where(going, norms, beta))
            stuck = (norms[-1] > 0.999 * beta) & (closed | (cycle == self.restart))
            beta = r.norm()
            going = going & (beta > system.stop)
            code = event(code, going & stuck, Status.STAGNATED)
            going = going & ~stuck
            steps += cycle
            del basis  # frees its memory before the next one is allocated
        return Outcome(x, torch.cat(trace), steps, code)

    def products_needed(self, structure: Structure, rtol: float = 1e-6) -> float | None:
        """As MINRES if A is symmetric, else by ‖I − A‖^k; at most n. Without restarts (Saad 2003, section 6.11)."""
        if structure.singular:
            return None
        if structure.symmetric:
            steps = MINRES().products_needed(structure, rtol)
        else:
            steps = steps_needed(structure.contraction, rtol)
        return structure.n if steps is None else min(steps, structure.n)


class GrowingBasis:
    """A basis of at most m vectors, allocated when needed, `BLOCK` vectors at a time."""

    def __init__(self, m: int):
        self.m = m
        self.blocks: list[Basis] = []

    def __setitem__(self, j: int, vector: Vector) -> None:
        if j == BLOCK * len(self.blocks):
            self.blocks.append(Basis(vector, min(BLOCK, self.m - j)))
        self.blocks[j // BLOCK][j % BLOCK] = vector

    def __getitem__(self, j: int) -> Vector:
        return self.blocks[j // BLOCK][j % BLOCK]

    def coefficients(self, vector: Vector, count: int) -> Tensor:
        pairs = zip(self.blocks, range(count, 0, -BLOCK), strict=False)
        parts = [block.coefficients(vector, min(BLOCK, left)) for block, left in pairs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def combine(self, weights: Tensor) -> Vector:
        pairs = zip(self.blocks, weights.split(BLOCK, -1), strict=False)
        return reduce(add, (block.combine(part) for block, part in pairs))


def arnoldi(
    system: System, r: Vector, going: Tensor | bool, most: int, before: int, size: Tensor
) -> tuple[GrowingBasis, Tensor, Tensor, Tensor]:
    """One cycle: the basis, the Hessenberg matrix [steps + 1, steps] (or [B, …]), whether the space is invariant, size.

    most: the most steps of this cycle; before: steps done in earlier cycles; size: the largest ‖Av‖ / ‖v‖ so far.
    """
    basis, beta = GrowingBasis(most + 1), r.norm()
    reads = system.goal is not None and system.check_every == 1
    basis[0] = r * divide(1.0, beta)
    h = torch.zeros(*beta.shape, most + 1, most, dtype=beta.dtype, device=beta.device)
    # min ‖βe₁ − Hy‖ is β|n₀| for the unit vector n orthogonal to H's columns, updated by one rotation a column.
    null, least, closed = torch.ones_like(beta).unsqueeze(-1), beta, beta == 0
    for j in range(most):
        w = system.op(basis[j])
        norm = w.norm()
        size = torch.maximum(size, norm)
        if not j:  # if r is the residual of a least-squares solution, A r is only rounding
            closed = norm <= negligible(size, True)
        column = h[..., : j + 1, j]
        for _ in range(2):  # if numbers are read anyway, again only if the first removed 90 % (Rutishauser)
            old, part = norm, basis.coefficients(w, j + 1)
            w, column = w - basis.combine(part), column + part
            norm = w.norm()
            if reads and not anywhere(norm < 0.1 * old):
                break
        closed = closed | (norm <= negligible(size))
        basis[j + 1] = w * torch.where(closed, 0.0, 1 / norm)
        norm = torch.where(closed, 0.0, norm)
        h[..., : j + 2, j] = torch.cat([column, norm.unsqueeze(-1)], -1)
        if system.goal is not None:
            a = torch.linalg.vecdot(null, column)
            length = torch.hypot(a, norm)
            tiny = length <= negligible(size, closed)
            s, c = torch.where(tiny, 1.0, norm / length), torch.where(tiny, 0.0, a / length)
            null = torch.cat([null * s.unsqueeze(-1), -c.unsqueeze(-1)], -1)
            least = least * s
            if system.finished(before + j + 1, going & ~closed & (least > system.stop)):
                return basis, h[..., : j + 2, : j + 1], closed, size
    return basis, h, closed, size


def hessenberg_qr(h: Tensor, beta: Tensor, rounding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q and R of a Hessenberg matrix [m + 1, m], and min_y ‖βe₁ − H_j y‖ for j = 1 … m: [m, …]."""
    q, triangle = torch.linalg.qr(h)
    diagonal = triangle.diagonal(dim1=-2, dim2=-1).abs()
    below = h.diagonal(offset=-1, dim1=-2, dim2=-1)
    sines = torch.where(diagonal <= rounding.unsqueeze(-1), 1.0, below / diagonal).clamp_max(1.0)
    norms = beta.unsqueeze(-1) * sines.cumprod(-1)
    return q, triangle, norms.movedim(-1, 0)


def negligible(size: Tensor, closed: Any = False) -> Tensor:
    """The magnitude below which a difference of numbers of this size is rounding."""
    # The last column of an invariant space (closed) is a difference of the others, and contains their rounding too.
    eps = torch.finfo(size.dtype).eps
    return where(closed, eps ** (2 / 3), 10 * eps) * size


def triangular_solve(triangle: Tensor, rhs: Tensor, rounding: Tensor) -> Tensor:
    """R⁻¹ rhs, with zeros in directions where the diagonal of R is at most `rounding`."""
    tiny = triangle.diagonal(dim1=-2, dim2=-1).abs() <= rounding.unsqueeze(-1)
    eye = torch.eye(triangle.shape[-1], dtype=triangle.dtype, device=triangle.device)
    safe = torch.where(tiny.unsqueeze(-1), eye, triangle)
    right = torch.where(tiny, 0.0, rhs).unsqueeze(-1)
    return torch.linalg.solve_triangular(safe, right, upper=True).squeeze(-1)


@dataclass(frozen=True, kw_only=True)
class BiCGStab(IterativeSolver):
    """Stabilised biconjugate gradients for any A, in constant memory.

    The residual is not monotone. If ρ = r̂ᵀr, r̂ᵀv or ω vanishes to rounding, it ends as BREAKDOWN at the iterate before.

    Cost: two products a step; seven vectors beside b.
    Source: van der Vorst 1992.

    Example:
        >>> import torch, hypergrad as hg
        >>> op = hg.operators.matrix(torch.tensor([[2.0, 1.0], [0.0, 1.0]]))
        >>> hg.solvers.BiCGStab(rtol=1e-6)(op, torch.tensor([1.0, 2.0])).value.round(decimals=3)
        tensor([-0.5000,  2.0000])
    """

    def _iterate(self, system: System) -> Outcome:
        op, stop, eps = system.op, system.stop, system.b.space.eps
        x, r = system.start()
        shadow, p = r.copy(), r.copy()
        rho = r.dot(r)
        norm = rho.sqrt()
        shadow_norm = norm
        going, code, trace = norm > stop, None, [norm]
        for k in range(system.max_steps):
            if system.finished(k, going):
                break
            v = op(p).copy()  # the next product may overwrite its memory
            along = shadow.dot(v)
            broke = (along.abs() <= eps * shadow_norm * v.norm()) | (rho.abs() <= eps * shadow_norm * norm)
            code = event(code, going & broke, Status.BREAKDOWN)
            going = going & ~broke
            alpha = torch.where(going, divide(rho, along), 0.0)
            s = r - v * alpha
            t = op(s)
            omega = torch.where(going, divide(t.dot(s), t.dot(t)), 0.0)
            x.add_(p, alpha).add_(s, omega)
            r = s - t * omega
            rho, old = shadow.dot(r), rho
            p.add_(v, omega, -1.0).scale_add_(divide(rho, old) * divide(alpha, omega), r)
            norm = r.norm()
            trace.append(norm)
            going = going & (norm > stop)
            stuck = going & (omega == 0)
            code = event(code, stuck, Status.BREAKDOWN)
            going = going & ~stuck
        if system.goal is not None:
            code = event(code, going & (norm >= system.rhs_norm), Status.BREAKDOWN)
        return Outcome(x, torch.stack(trace), len(trace) - 1, code)

    def valid_for(self, structure: Structure) -> str | None:
        return "A is singular" if structure.singular else super().valid_for(structure)
