"""Low rank approximations of A from a random sketch, as solvers and as preconditioners."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._basis import Basis
from .._solution import Status
from .._vector import Vector
from ..operators import LinearOperator
from ._solver import LinearSolver, Outcome, System, event, require_symmetric


@dataclass(frozen=True, kw_only=True)
class Nystrom(LinearSolver):
    """Randomised Nyström approximation A ≈ UΛUᵀ of rank k, for a symmetric positive semi-definite A.

        as a solver:           x = U(Λ + ρI)⁻¹Uᵀb + (b − UUᵀb)/ρ                    ≈ (A + ρI)⁻¹ b
        as preconditioner:     M⁻¹r = (λ_k + ρ) U(Λ + ρI)⁻¹Uᵀr + (r − UUᵀr)         CG(preconditioner=Nystrom(...))

    As a solver it is an approximation: without a tolerance it succeeds, and its residual tells how good it is.

    Args:
        rank: k ≥ 1, the number of products in the sketch.
        damping: ρ > 0; as a preconditioner best near the damping of A, or its smallest eigenvalue.
        seed: of the sketch's own generator; torch's global random state is not touched.

    Cost: k products, vectorised; k vectors.
    Source: Frangella, Tropp and Udell 2023, Algorithms 2.1 and 5.1; as a solver for hypergradients Hataya and Yamada
        2023 (who sketch with columns of A).
    """

    rank: int = 10
    damping: float = 1e-2
    seed: int = 0
    _runs_to_tolerance: ClassVar[bool] = False
    _needs_symmetric: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"Nystrom: rank must be an integer ≥ 1, got {self.rank!r}")
        if not self.damping > 0:
            raise ValueError(f"Nystrom: damping must be > 0, for the inverse outside the sketch, got {self.damping!r}")

    def _iterate(self, system: System) -> Outcome:
        x, r = system.start()
        u, eigenvalues, indefinite = self._sketch(system.op, r, -self.damping)
        inside = u.coefficients(r, u.m)
        weights = inside / (eigenvalues + self.damping) - inside / self.damping
        x.add_(r, 1 / self.damping).add_(u.combine(weights))
        return Outcome(x, r.norm().unsqueeze(0), 1, event(None, indefinite, Status.NOT_POSITIVE_DEFINITE))

    def preconditioner(self, op: LinearOperator, like: Vector) -> Callable[[Vector], Vector]:
        """r ↦ M⁻¹r for this operator; k products now, none later."""
        require_symmetric(op, "Nystrom")
        u, eigenvalues, _ = self._sketch(op, like, -op.damping)
        smallest = eigenvalues[..., -1:] + self.damping

        def precondition(r: Vector) -> Vector:
            inside = u.coefficients(r, u.m)
            return r + u.combine(inside * smallest / (eigenvalues + self.damping) - inside)

        return precondition

    def _sketch(self, op: LinearOperator, like: Vector, shift: float) -> tuple[Basis, Tensor, Tensor]:
        """U as rows, Λ in falling order, and whether A + shift · I is indefinite on the sketch."""
        space = like.space
        k = min(self.rank, space.length)
        generator = torch.Generator().manual_seed(self.seed)
        draw = torch.randn(space.length, k, generator=generator, dtype=space.dtype)
        omega = torch.linalg.qr(draw.to(space.device))[0]
        test = Basis.from_rows(like, omega.mT)
        y = op.many(test).plus(test, shift).matrix().mT
        y = torch.where(torch.isfinite(y), y, 0.0)  # eigh and svd raise for NaN; the residual will tell of it
        core = omega.mT @ y
        values, vectors = torch.linalg.eigh((core + core.mT) / 2)
        floor = 10 * space.eps * values.abs().amax(-1, keepdim=True)
        root = torch.where(values > floor, values.clamp_min(space.tiny).rsqrt(), 0.0)
        u, s, _ = torch.linalg.svd(y @ (vectors * root.unsqueeze(-2)), full_matrices=False)
        return Basis.from_rows(like, u.mT), s**2, (values < -100 * floor).any(-1)
