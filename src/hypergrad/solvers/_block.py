"""Block conjugate gradients: one Krylov space for several right hand sides of one operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._basis import Basis
from .._solution import Status
from .._vector import Vector
from ._solver import IterativeSolver, Outcome, System, event
from ._symmetric import CG
from ._theory import Structure


@dataclass(frozen=True, kw_only=True)
class BlockCG(IterativeSolver):
    """Block conjugate gradients: A X = B for k right hand sides and one symmetric positive definite A.

        R = Qξ,   W = AP,   G = PᵀW,   α = G⁻¹PᵀQ,   X ← X + Pαξ,   Q₊ζ = Q − Wα,   ξ ← ζξ,   P ← orth(Q₊ − P G⁻¹WᵀQ₊)

    Each step minimises the error in the norm of A over k directions for all k systems at once, so that roughly the k
    smallest eigenvalues no longer slow convergence. Householder QR keeps Q and P orthonormal, so right hand sides that
    are equal, zero, dependent or solved before the others cause no division by zero.

        solution = hg.solvers.BlockCG(rtol=1e-8)(op.stacked(), b)           # b: [k, ...] in every leaf

    Status, steps and residual are those of each right hand side. Curvature that is not positive ends the solve for all
    of them as NOT_POSITIVE_DEFINITE, at the previous iterate. NaN in one right hand side does not reach the others.
    BlockCG takes no preconditioner; CG(preconditioner=...) on op.stacked() does.

    Raises: TypeError for an operator with independent systems that is not `stacked()`, or for sharded tensors.
    Cost: k products a step, vectorised, and about 6k² vector operations; 5k vectors.
    Source: O'Leary 1980, with the orthonormal residuals of Dubrulle 2001 (BCGrQ; ζᵀ and ξ there are −G⁻¹WᵀQ₊ and PᵀQ).

    Example:
        >>> op = hg.operators.matrix(torch.tensor([[4.0, 1.0], [1.0, 3.0]]), symmetric=True)
        >>> BlockCG(rtol=1e-6)(op.stacked(), torch.tensor([[1.0, 2.0], [0.0, 11.0]])).value
        tensor([[ 0.0909,  0.6364],
                [-1.0000,  4.0000]])
    """

    _needs_symmetric: ClassVar[bool] = True

    def _iterate(self, system: System) -> Outcome:
        product, space = products(system), system.b.space
        start, r = (columns(each) for each in system.start())
        sound = torch.isfinite(r).all(0)
        q, xi = torch.linalg.qr(torch.where(sound, r, 0.0))
        x, p, p_old, w_old = torch.zeros_like(start), q, q, q
        norms = torch.where(sound, torch.linalg.vector_norm(xi, dim=0), torch.nan)
        trace, code, definite = [norms], None, torch.ones((), dtype=torch.bool, device=q.device)
        for k in range(system.max_steps):
            if system.finished(k, definite & (norms > system.stop)):
                break
            w = product(p)
            g = p.mT @ w
            if k < 2 and not system.op.stochastic:
                skew = asymmetric(g, g, w, w, space.eps)
                skew = skew | asymmetric(p_old.mT @ w, p.mT @ w_old, w, w_old, space.eps) if k else skew
                code = event(code, skew & definite, Status.NOT_SYMMETRIC)
            factor, info = torch.linalg.cholesky_ex((g + g.mT) / 2)
            code = event(code, definite & (info > 0) & (norms > system.stop).any(), Status.NOT_POSITIVE_DEFINITE)
            definite = definite & (info == 0)
            alpha = torch.where(definite, torch.cholesky_solve(p.mT @ q, factor), 0.0)
            x = x + p @ (alpha @ xi)
            q, zeta = torch.linalg.qr(q - w @ alpha)
            xi = zeta @ xi
            beta = torch.where(definite, torch.cholesky_solve(w.mT @ q, factor), 0.0)
            p_old, w_old, p = p, w, torch.linalg.qr(q - p @ beta)[0]
            norms = torch.where(sound, torch.linalg.vector_norm(xi, dim=0), torch.nan)
            trace.append(norms)
        shape = space.batch_shape
        code = None if code is None else code.expand(shape)
        x = start + x
        x = space.from_flat(x.mT if space.batch_dims else x.squeeze(-1))
        return Outcome(x, torch.stack(trace).reshape(-1, *shape), len(trace) - 1, code)

    def valid_for(self, structure: Structure) -> str | None:
        return CG().valid_for(structure)

    def products_needed(self, structure: Structure, rtol: float = 1e-6) -> float | None:
        """At most the products of CG, for each right hand side."""
        return CG().products_needed(structure, rtol)


def products(system: System) -> Callable[[Tensor], Tensor]:
    """The function P ↦ AP for any number of columns; its results are copies."""
    op, like = system.op, system.b
    if op.batch_dims:
        if op.each is None or op.each.batch_dims:
            raise TypeError(
                "BlockCG solves for several right hand sides of one operator: pass op.stacked(), where op has no "
                "batch axis; independent systems have no Krylov space in common, so use CG"
            )
        op, like = op.each.damped(op.damping), like.space.one
    return lambda p: op.many(Basis.from_rows(like, p.mT)).matrix().clone().mT


def columns(v: Vector) -> Tensor:
    """A stack of k vectors as a matrix [n, k], or a single vector as [n, 1]."""
    return v.flat().mT if v.space.batch_dims else v.flat().unsqueeze(-1)


def asymmetric(one: Tensor, other: Tensor, w: Tensor, v: Tensor, eps: float) -> Tensor:
    """Whether XᵀW ≠ (VᵀY)ᵀ beyond rounding, for orthonormal X and Y, W = AY and V = AX."""
    size = torch.linalg.vector_norm(w, dim=0) + torch.linalg.vector_norm(v, dim=0).unsqueeze(-1)
    return ((one - other.mT).abs() > eps**0.5 * size).any()
