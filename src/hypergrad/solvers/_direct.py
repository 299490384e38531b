"""The dense solve: every column of A, then a factorisation. For small systems, and as the reference for all others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._basis import Basis
from .._solution import Status
from .._vector import Vector
from ..operators import LinearOperator
from ._solver import LinearSolver, Outcome, System, event, require_symmetric


@dataclass(frozen=True, kw_only=True)
class Dense(LinearSolver):
    """A, materialised and factorised: Cholesky where A is declared positive definite, else LU.

    A singular A (pivots below n · eps) gets the least-squares solution of least norm and BREAKDOWN. A Cholesky factor
    that does not exist gives NOT_POSITIVE_DEFINITE, and a declared symmetry that is not there NOT_SYMMETRIC, unless LU,
    from which the value then comes, reaches the tolerance. Without a tolerance, rtol is 1e-6 in float64 and 1e-4 in
    float32.

    It is also a preconditioner, the exact inverse of an A of before, for sequences in which A changes slowly:
    CG(preconditioner=Reused(Dense())). There an A that is not positive definite is replaced by |A| = V|Λ|Vᵀ, with which
    MINRES needs two steps.

    Args:
        batch_size: columns computed at once (default: as many as fit 2²⁴ numbers).

    Cost: n products, vectorised; n² numbers of memory and O(n³) arithmetic; one device synchronisation.
        As a preconditioner likewise, once.
    Raises: TypeError for sharded tensors.
    """

    batch_size: int | None = None

    def _iterate(self, system: System) -> Outcome:
        x, r = system.start()
        a = materialise(system.op, r, self.batch_size)
        inverse, code = factorise(a, system.op.positive_definite)
        rhs = r.flat()
        y = inverse(rhs)
        y = y + inverse(rhs - apply(a, y))
        trace = torch.stack([r.norm(), torch.linalg.vector_norm(rhs - apply(a, y), dim=-1)])
        return Outcome(x + x.space.from_flat(y), trace, 1, code)

    def preconditioner(self, op: LinearOperator, like: Vector) -> Callable[[Vector], Vector]:
        """r ↦ |A|⁻¹r for this operator; n products now, none later."""
        require_symmetric(op, "Dense as a preconditioner")
        a = materialise(op, like, self.batch_size)
        inverse = absolute_inverse((a + a.mT) / 2)
        return lambda r: r.space.from_flat(inverse(r.flat()))


def apply(a: Tensor, x: Tensor) -> Tensor:
    return (a @ x.unsqueeze(-1)).squeeze(-1)


def materialise(op: LinearOperator, like: Vector, batch_size: int | None = None) -> Tensor:
    """The matrix of an operator: [n, n], or [B, n, n]. One product serves a column of all systems."""
    space = like.space
    n = space.length
    size = batch_size or max(1, min(n, 2**24 // max(n, 1)))
    columns = []
    for start in range(0, n, size):
        count = min(size, n - start)
        rows = torch.zeros(count, n, dtype=space.dtype, device=space.device)
        rows.diagonal(start).fill_(1.0)
        columns.append(op.many(Basis.from_rows(like, rows)).matrix())
    return torch.cat(columns, -2).mT


def absolute_inverse(a: Tensor) -> Callable[[Tensor], Tensor]:
    """b ↦ |A|⁻¹b of a symmetric A, by Cholesky where A is positive definite."""
    factor, info = torch.linalg.cholesky_ex(a)
    if not bool(info.any()):
        return lambda b: torch.cholesky_solve(b.unsqueeze(-1), factor).squeeze(-1)
    # eigh raises for NaN; the residual will tell of it.
    values, vectors = torch.linalg.eigh(torch.nan_to_num(a, 0.0, 0.0, 0.0))
    floor = a.shape[-1] * torch.finfo(a.dtype).eps * values.abs().amax(-1, keepdim=True)
    size = torch.where(floor > 0, torch.maximum(values.abs(), floor), 1.0)
    return lambda b: apply(vectors, apply(vectors.mT, b) / size)


def factorise(a: Tensor, positive_definite: bool) -> tuple[Any, Tensor | None]:
    """b ↦ A⁻¹b and what was wrong with A. Factors and solves by torch.linalg, never torch.linalg.solve."""
    code: Any = None
    if positive_definite:
        skew = (a - a.mT).abs().amax((-2, -1)) > torch.finfo(a.dtype).eps ** 0.5 * a.abs().amax((-2, -1))
        factor, info = torch.linalg.cholesky_ex(a)
        code = event(event(None, skew, Status.NOT_SYMMETRIC), info > 0, Status.NOT_POSITIVE_DEFINITE)
        if not bool(code.any()):
            return lambda b: torch.cholesky_solve(b.unsqueeze(-1), factor).squeeze(-1), code
    lu, pivots, _ = torch.linalg.lu_factor_ex(a)
    diagonal = lu.diagonal(dim1=-2, dim2=-1).abs()
    singular = diagonal.amin(-1) <= a.shape[-1] * torch.finfo(a.dtype).eps * diagonal.amax(-1)
    if bool((singular & torch.isfinite(diagonal.amax(-1))).any()):
        pinv = torch.linalg.pinv(torch.nan_to_num(a), rtol=a.shape[-1] * torch.finfo(a.dtype).eps)

        def least_squares(b: Tensor) -> Tensor:
            regular = torch.linalg.lu_solve(lu, pivots, b.unsqueeze(-1)).squeeze(-1)
            return torch.where(singular.unsqueeze(-1), apply(pinv, b), regular)

        return least_squares, event(code, singular, Status.BREAKDOWN)
    return lambda b: torch.linalg.lu_solve(lu, pivots, b.unsqueeze(-1)).squeeze(-1), code
