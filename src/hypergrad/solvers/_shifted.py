"""`shifted`: one Krylov space for several dampings of one symmetric operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._autodiff import without_autocast
from .._solution import OnFailure, Solution, Status
from .._vector import Vector
from ..operators import LinearOperator
from ._solver import check_options, divide, event, require_symmetric
from ._symmetric import CG, ROUNDING


def shifted(
    op: LinearOperator,
    b: Vector,
    dampings: Sequence[float],
    *,
    rtol: float | None = None,
    max_steps: int | None = None,
    on_failure: OnFailure = "warn",
) -> list[Solution]:
    """Solve (A + γᵢ I) xᵢ = b for several dampings γᵢ by CG in Lanczos form: one product a step serves all γᵢ.

        β₊v₊ = Av − αv − βv₋;   for each γ:  l = β / d₋,  d = α + γ − lβ,  ζ = −lζ₋,  p = (v − βp₋) / d,  x ← x + ζp

    A pivot d that is not positive ends the system of that γ as NOT_POSITIVE_DEFINITE, at the previous iterate; the
    others continue. As in CG, the vectors v are not reorthogonalised.

    Args:
        op: a symmetric A, or `op.stacked()` for several right hand sides.
        b: a Vector, or a pytree of tensors.
        dampings: the γᵢ ≥ 0.
        rtol, max_steps, on_failure: as in `CG`.

    Returns: a Solution for each γᵢ, with its true residual.
    Raises: TypeError for an operator that is not symmetric; SolverError under on_failure="raise".
    Cost: one product a step, and one for each γ at the end; 3 vectors, and 2 for each γ.
    Source: Saad 2003, Algorithm 6.17 (D-Lanczos); Frommer and Maass 1999 for shifted systems.

    Example:
        >>> op = hg.operators.matrix(torch.tensor([[4.0, 1.0], [1.0, 3.0]]), symmetric=True)
        >>> [solution.value for solution in shifted(op, torch.tensor([1.0, 2.0]), [0.0, 1.0])]
        [tensor([0.0909, 0.6364]), tensor([0.1053, 0.4737])]
    """
    check_options(CG(rtol=rtol, max_steps=max_steps, on_failure=on_failure))
    if not dampings or not all(0 <= damping < torch.inf for damping in dampings):
        raise ValueError(f"shifted: dampings must be one or more finite numbers ≥ 0, got {list(dampings)}")
    require_symmetric(op, "shifted")
    rhs = b if isinstance(b, Vector) else Vector.of(b, "b", op.batch_dims)
    rtol = rhs.space.rtol if rtol is None else rtol
    max_steps = min(10 * rhs.space.length, 1000) if max_steps is None else max_steps
    with torch.no_grad(), without_autocast(rhs.space.device):
        scale = rhs.scale()  # without it, squares of small numbers underflow
        rhs = rhs / scale
        size, solutions = rhs.norm(), []
        x, codes, steps, trace = _iterate(op, rhs, dampings, rtol, max_steps)
        for i, damping in enumerate(dampings):
            residual = (rhs - op.damped(damping)(rhs.space.from_flat(x[i]))).norm()
            code = _judged(codes[i], residual, size, rtol, trace[-1, i])
            value = rhs.space.from_flat(x[i] * scale.unsqueeze(-1))
            count = steps[i] if rhs.space.batch_dims else int(steps[i])
            norms = residual * scale, size * scale, trace[:, i] * scale
            solutions.append(Solution(value if isinstance(b, Vector) else value.tree, code, count, *norms, "shifted"))
    for damping, solution in zip(dampings, solutions, strict=True):
        solution.report(f"shifted, damping {damping:g}", on_failure)
    return solutions


def _iterate(
    op: LinearOperator, b: Vector, dampings: Sequence[float], rtol: float, max_steps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [γ, …, n], Status values of failures [γ, …], steps [γ, …], and ‖r‖ by the recursion [steps + 1, γ, …]."""
    space, size = b.space, b.norm()
    stop = 0.9 * rtol * size  # a margin for rounding between the recursion's residual and the true one
    v = divide(b.flat(), size.unsqueeze(-1))
    gamma = torch.tensor(dampings, dtype=space.dtype, device=space.device)
    gamma = gamma.reshape(-1, *[1] * size.ndim).expand(-1, *size.shape)
    x = torch.zeros(*gamma.shape, v.shape[-1], dtype=v.dtype, device=v.device)
    p, v_old, beta = torch.zeros_like(x), torch.zeros_like(v), torch.zeros_like(size)
    zeta, d, steepest = size.expand_as(gamma), torch.ones_like(gamma), torch.zeros_like(size)
    norm, code = zeta, torch.zeros_like(gamma, dtype=torch.long)
    going, steps, trace = norm > stop, torch.zeros_like(code), [norm]
    for k in range(max_steps):
        if not bool(going.any()):
            break
        w = op(space.from_flat(v)).flat() - beta.unsqueeze(-1) * v_old
        alpha = torch.linalg.vecdot(w, v)
        w = w - alpha.unsqueeze(-1) * v
        lower = divide(beta, d) if k else torch.zeros_like(d)
        d = alpha + gamma - lower * beta
        steepest = torch.maximum(steepest, alpha.abs())
        flat = d <= ROUNDING * space.eps * (steepest + gamma)
        code = event(code, going & flat, Status.NOT_POSITIVE_DEFINITE)
        going = going & ~flat
        zeta = -lower * zeta if k else zeta
        p = divide(v - beta.unsqueeze(-1) * p, d.unsqueeze(-1))
        x = torch.where(going.unsqueeze(-1), x + zeta.unsqueeze(-1) * p, x)
        beta = torch.linalg.vector_norm(w, dim=-1)
        norm = torch.where(going, (beta * divide(zeta, d)).abs(), norm)
        trace.append(norm)
        steps = steps + going
        going = going & (norm > stop)
        v_old, v = v, divide(w, beta.unsqueeze(-1))
    return x, code, steps, torch.stack(trace)


def _judged(code: Tensor, residual: Tensor, size: Tensor, rtol: float, own: Tensor) -> Tensor:
    """The Status values that follow from the true residual and from the recursion's residual (own)."""
    ended = torch.where(own <= rtol * size, Status.STAGNATED.value, Status.MAX_STEPS.value)
    ended = torch.where((residual >= size) & (size > 0), Status.DIVERGED.value, ended)
    code = torch.where(residual <= rtol * size, Status.CONVERGED.value, torch.where(code > 0, code, ended))
    return torch.where(torch.isfinite(residual), code, Status.NON_FINITE.value)
