"""The dense solver, which computes every column of A and factorises it: for small systems, and as a reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._basis import Basis
from .._solution import Status
from .._vector import Vector
from ..operators import LinearOperator
from ._solver import LinearSolver, Outcome, System, event, require_symmetric
from ._theory import Structure

AT_ONCE = 2**24  # numbers in the columns that are computed at once


@dataclass(frozen=True, kw_only=True)
class Dense(LinearSolver):
    """Materialises A and factorises it: by Cholesky if A is declared positive definite, else by LU.

    If LU misses the tolerance (1e-6 in float64, 1e-4 in float32 by default), or a pivot is below 10 n eps, x is the
    least-squares solution of least norm; if that misses the tolerance too, the solve ends as BREAKDOWN (A is singular).
    If LU misses the tolerance, an A declared positive definite without a Cholesky factor ends as NOT_POSITIVE_DEFINITE,
    and one that is not symmetric as NOT_SYMMETRIC.

    Dense is also a preconditioner, the inverse of |A| = V|Λ|Vᵀ for an earlier A, for sequences in which A changes
    slowly: CG(preconditioner=Reused(Dense())), or MINRES if A is indefinite.

    Cost: n products, vectorised; n² numbers of memory and O(n³) arithmetic; one device synchronisation, a few more if
        A is singular or not as declared, and one more outside of a hypergradient.

    Example:
        >>> import torch, hypergrad as hg
        >>> op = hg.operators.matrix(torch.tensor([[2.0, 1.0], [0.0, 1.0]]))
        >>> hg.solvers.Dense()(op, torch.tensor([1.0, 2.0])).value.round(decimals=3)
        tensor([-0.5000,  2.0000])
    """

    def _iterate(self, system: System) -> Outcome:
        x, r = (None, system.b) if system.x0 is None else system.start()
        a, rhs, op, stop, code = materialise(system.op, r), r.flat(), system.op, system.stop, None
        limits = stop.unsqueeze(-1) if isinstance(stop, Tensor) else stop
        found = regular_solve(a.mT, rhs.unsqueeze(-2), limits, r.space.eps, op.symmetric, op.positive_definite)
        if found is None:
            y, norm, code = self._irregular(a, rhs, system)
        else:
            y, norm = found[0].squeeze(-2), found[1].squeeze(-1)
        step, first = r.space.from_flat(y), system.rhs_norm if x is None else system.number(r.norm())
        return Outcome(step if x is None else x + step, [first, system.number(norm)], 1, code)

    def _irregular(self, a: Tensor, rhs: Tensor, system: System) -> tuple[Tensor, Tensor, Any]:
        """A⁻¹b (for singular systems the least-squares solution), ‖b − Ax‖, and the Status values of failures."""
        limit, eps, code = system.stop, system.b.space.eps, None
        if system.op.positive_definite:
            skew = (a - a.mT).abs().amax((-2, -1)) > eps**0.5 * a.abs().amax((-2, -1))
            indefinite = torch.linalg.cholesky_ex(a)[1] > 0
            code = event(event(None, skew, Status.NOT_SYMMETRIC), indefinite, Status.NOT_POSITIVE_DEFINITE)
        lu, pivots, _ = torch.linalg.lu_factor_ex(a)  # never torch.linalg.solve
        y = torch.linalg.lu_solve(lu, pivots, rhs.unsqueeze(-1))
        y = (y + torch.linalg.lu_solve(lu, pivots, rhs.unsqueeze(-1) - a @ y)).squeeze(-1)
        pivots = lu.diagonal(dim1=-2, dim2=-1).abs()
        singular = pivots.amin(-1) <= rounding(a, eps) * pivots.amax(-1)
        y = torch.where(singular.unsqueeze(-1), torch.nan, y)
        norm = torch.linalg.vector_norm(rhs - apply(a, y), dim=-1)
        if bool((~(norm <= limit) & torch.isfinite(a).all((-2, -1))).any()):
            z = apply(torch.linalg.pinv(torch.nan_to_num(a), rtol=rounding(a, eps)), rhs)
            least = torch.linalg.vector_norm(rhs - apply(a, z), dim=-1)
            # Without full rank, a large x whose residual happens to be small is no better than that of least norm.
            deficient = torch.linalg.matrix_rank(torch.nan_to_num(a), rtol=a.shape[-1] * eps) < a.shape[-1]
            better = ~(norm <= limit) & (deficient | ~(norm <= least))
            y, norm = torch.where(better.unsqueeze(-1), z, y), torch.where(better, least, norm)
            code = event(code, better, Status.BREAKDOWN)
        return y, norm, code

    def products_needed(self, structure: Structure, rtol: float = 1e-6) -> float | None:
        return structure.n

    def factors(self, op: LinearOperator, like: Vector) -> list[Tensor]:
        """V and |Λ|⁻¹ of the eigendecomposition of this operator."""
        require_symmetric(op, "Dense as a preconditioner")
        a = torch.nan_to_num(materialise(op, like), 0.0, 0.0, 0.0)  # eigh raises for NaN; the residual will show it
        values, vectors = torch.linalg.eigh((a + a.mT) / 2)
        floor = a.shape[-1] * like.space.eps * values.abs().amax(-1, keepdim=True)
        return [vectors, torch.where(floor > 0, 1 / torch.maximum(values.abs(), floor), 1.0)]

    def apply(self, factors: list[Tensor], r: Vector) -> Vector:
        vectors, weights = factors
        return r.space.from_flat(apply(vectors, weights * apply(vectors.mT, r.flat())))


def apply(a: Tensor, x: Tensor) -> Tensor:
    return (a @ x.unsqueeze(-1)).squeeze(-1)


def materialise(op: LinearOperator, like: Vector) -> Tensor:
    """The matrix of an operator: [n, n], or [B, n, n]. One product gives the same column of all B systems."""
    space = like.space
    n = space.length
    size = max(1, min(n, AT_ONCE // max(n, 1)))
    if size == n:
        units = torch.eye(n, dtype=space.dtype, device=space.device)
        return op.many(Basis.from_rows(like, units)).matrix().mT
    columns = torch.empty(*space.batch_shape, n, n, dtype=space.dtype, device=space.device)
    for start in range(0, n, size):
        rows = torch.zeros(min(size, n - start), n, dtype=space.dtype, device=space.device)
        rows.diagonal(start).fill_(1.0)
        columns[..., start : start + size, :] = op.many(Basis.from_rows(like, rows)).matrix()
    return columns.mT


def rounding(a: Tensor, eps: float) -> float:
    return 10 * a.shape[-1] * eps


def regular_solve(
    rows: Tensor, rhs: Tensor, stop: Tensor | float, eps: float, symmetric: bool, positive_definite: bool
) -> tuple[Tensor, Tensor] | None:
    """(x, ‖b − Ax‖) for Aᵀ = rows [*B, n, n] and right hand sides [*B, k, n], each matrix factorised once.

    None if a residual exceeds its limit [*B, k], a pivot is below rounding, or A is not as declared. Matrices and
    vectors are stored by rows, which are LAPACK's columns. All checks take one read from the device.
    """
    if positive_definite:
        factor, info = torch.linalg.cholesky_ex(rows.mT)
        x = torch.cholesky_solve(rhs.mT, factor).mT
    else:
        lu, pivots, info = torch.linalg.lu_factor_ex(rows.mT)
        x = torch.linalg.lu_solve(lu, pivots, rhs.mT).mT
        size = lu.diagonal(dim1=-2, dim2=-1).abs()
        info = info + (size.amin(-1) <= rounding(rows, eps) * size.amax(-1))
    residual = torch.linalg.vector_norm((x @ rows).sub_(rhs), dim=-1)
    good = (residual <= stop).all(-1) & (info == 0)
    if symmetric:
        skew, size = (torch.linalg.vector_norm(m, torch.inf, (-2, -1)) for m in (rows - rows.mT, rows))
        good = good & (skew <= eps**0.5 * size)
    return (x, residual) if bool(good.all()) else None
