"""Several right hand sides for each of one or many small systems: each matrix is factorised once for all of them."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor

from .._autodiff import without_autocast
from .._solution import Solution, Status
from .._vector import Vector
from ._auto import SMALL, Auto
from ._direct import Dense, regular_solve
from ._solver import Solver


def solves_at_once(solver: Solver, n: int, k: int) -> TypeGuard[Dense | Auto]:
    """Whether a solver factorises the matrix for k right hand sides of n unknowns.

    Auto does if n is small or at most k, because the n products for the matrix are then cheaper than iterations.
    """
    if isinstance(solver, Auto):
        return (n <= SMALL or n <= k) and not solver.fixed_steps
    return isinstance(solver, Dense)


def solve_at_once(
    solver: Dense | Auto, rows: Tensor, b: Vector, symmetric: bool, positive_definite: bool
) -> tuple[Solution, Tensor] | None:
    """x = A⁻¹b for Aᵀ = rows [*B, n, n] and a stack b of leaves [k, *B, ...], and x as a tensor xᵀ [*B, k, n].

    None if any system misses the tolerance or is not as declared. The caller then runs the solver itself, which
    reports what is wrong.
    """
    space = b.space
    with torch.no_grad(), without_autocast(space.device):
        if solver.damping:
            rows = rows + solver.damping * torch.eye(rows.shape[-1], dtype=rows.dtype, device=rows.device)
        rhs = b.flat().movedim(0, -2).contiguous()
        norm = torch.linalg.vector_norm(rhs, dim=-1)
        rtol = space.rtol if solver.rtol is None and solver.atol is None else solver.rtol or 0.0
        stop = (rtol * norm).clamp_min(solver.atol or 0.0)
        found = regular_solve(rows, rhs, stop, space.eps, symmetric, positive_definite)
        if found is None:
            return None
        x, residual = found
        norm, residual = norm.movedim(-1, 0), residual.movedim(-1, 0)
        code = torch.full(space.batch_shape, Status.CONVERGED.value, device=space.device)
        trace = torch.stack([norm, residual])
        method = f"Dense: {space.batch_shape[0]} right hand sides at once"
        value = space.from_flat(x.movedim(-2, 0))
        return Solution(value, code, torch.ones_like(code), residual, norm, trace, method), x
