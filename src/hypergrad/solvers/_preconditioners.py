"""Preconditioners of CG and MINRES. A recipe, such as Nystrom, has factors(op, like) and apply(factors, r) → M⁻¹r."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._basis import Basis
from .._solution import Status
from .._vector import Vector
from ..operators import LinearOperator, function
from ._solver import LinearSolver, Outcome, System, event, require_symmetric
from ._theory import Structure


def is_recipe(thing: Any) -> bool:
    """Whether an object (not a class) builds a preconditioner from an operator."""
    return hasattr(thing, "factors") and hasattr(thing, "apply") and not isinstance(thing, type)


def build_preconditioner(preconditioner: Any, system: System) -> Callable[[Vector], Vector] | None:
    """r ↦ M⁻¹ r from the user's option: None, an operator, a function of pytrees, or a recipe such as Nystrom."""
    if preconditioner is None or isinstance(preconditioner, LinearOperator):
        return preconditioner
    if getattr(preconditioner, "needs_tolerance", False) and system.goal is None:
        raise ValueError(
            "Reused needs a solver with a tolerance (rtol or atol): a fixed number of steps does not show that the "
            "preconditioner has aged"
        )
    if is_recipe(preconditioner):
        if system.precondition is None:
            factors = preconditioner.factors(system.op, system.b)
            system.precondition = lambda r: preconditioner.apply(factors, r)
        return system.precondition
    if not callable(preconditioner) or isinstance(preconditioner, type):
        raise TypeError(
            f"preconditioner must be a LinearOperator, a function r ↦ M⁻¹r of pytrees, or a recipe such as "
            f"Nystrom(...), got {preconditioner!r}"
        )
    return function(preconditioner)


@dataclass(frozen=True, kw_only=True)
class Nystrom(LinearSolver):
    """Randomised Nyström approximation A ≈ UΛUᵀ of rank k, for a symmetric positive semi-definite A.

        as a solver:           x = U(Λ + ρI)⁻¹Uᵀb + (b − UUᵀb)/ρ                    ≈ (A + ρI)⁻¹ b
        as preconditioner:     M⁻¹r = (λ_k + ρ) U(Λ + ρI)⁻¹Uᵀr + (r − UUᵀr)         CG(preconditioner=Nystrom(...))

    As a solver it is an approximation, whose accuracy the solution's residual shows.

    Args:
        rank: k ≥ 1, the number of products in the sketch.
        damping: ρ > 0; for a preconditioner best near the damping of A, or near its smallest eigenvalue.
        seed: seed of the generator that draws the sketch.

    Cost: k products, vectorised; k vectors.
    Source: Frangella, Tropp and Udell 2023, Algorithms 2.1 and 5.1; as a solver for hypergradients Hataya and Yamada
        2023 (who sketch with columns of A).

    Example:
        >>> import torch, hypergrad as hg
        >>> op = hg.operators.matrix(torch.tensor([[4.0, 1.0], [1.0, 3.0]]).double(), positive_definite=True)
        >>> sketch = hg.solvers.Nystrom(rank=2, damping=1e-6)
        >>> hg.solvers.CG(preconditioner=sketch, rtol=1e-6)(op, torch.ones(2).double()).status.name
        'CONVERGED'
    """

    rank: int = 10
    damping: float = 1e-2
    seed: int = 0
    _runs_to_tolerance: ClassVar[bool] = False
    _needs_symmetric: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.damping > 0:
            raise ValueError(f"Nystrom: damping must be > 0, for the inverse outside the sketch, got {self.damping!r}")

    def _iterate(self, system: System) -> Outcome:
        x, r = system.start()
        u, eigenvalues, indefinite = self._sketch(system.op, r, -self.damping)
        inside = u.coefficients(r, u.m)
        weights = inside / (eigenvalues + self.damping) - inside / self.damping
        x.add_(r, 1 / self.damping).add_(u.combine(weights))
        return Outcome(x, r.norm().unsqueeze(0), 1, event(None, indefinite, Status.NOT_POSITIVE_DEFINITE))

    def factors(self, op: LinearOperator, like: Vector) -> list[Tensor]:
        """U by rows, and (λ_k + ρ)/(Λ + ρ) − 1, of this operator."""
        require_symmetric(op, "Nystrom")
        u, eigenvalues, _ = self._sketch(op, like, -op.damping)
        return [u.matrix(), (eigenvalues[..., -1:] + self.damping) / (eigenvalues + self.damping) - 1]

    def apply(self, factors: list[Tensor], r: Vector) -> Vector:
        u = Basis.from_rows(r, factors[0])
        return r + u.combine(u.coefficients(r, u.m) * factors[1])

    def valid_for(self, structure: Structure) -> str | None:
        if not structure.definiteness.startswith("positive"):
            return super().valid_for(structure) or f"A is {structure.definiteness}, not positive semidefinite"
        if self.rank < structure.n:
            return f"an approximation, exact for a rank of n = {structure.n}; take it as the preconditioner of CG"
        return None

    def products_needed(self, structure: Structure, rtol: float = 1e-6) -> float | None:
        return min(self.rank, structure.n)

    def _sketch(self, op: LinearOperator, like: Vector, shift: float) -> tuple[Basis, Tensor, Tensor]:
        """U by rows, Λ in falling order, and whether A + shift · I has negative eigenvalues on the sketch."""
        space = like.space
        k = min(self.rank, space.length)
        generator = torch.Generator(device="cpu").manual_seed(self.seed)
        draw = torch.randn(space.length, k, generator=generator, dtype=space.dtype, device="cpu")
        omega = torch.linalg.qr(draw.to(space.device))[0]
        test = Basis.from_rows(like, omega.mT)
        y = op.many(test).plus(test, shift).matrix().mT
        y = torch.where(torch.isfinite(y), y, 0.0)  # eigh and svd raise for NaN; the residual will show it
        core = omega.mT @ y
        values, vectors = torch.linalg.eigh((core + core.mT) / 2)
        floor = 10 * space.eps * values.abs().amax(-1, keepdim=True)
        root = torch.where(values > floor, values.clamp_min(space.tiny).rsqrt(), 0.0)
        u, s, _ = torch.linalg.svd(y @ (vectors * root.unsqueeze(-2)), full_matrices=False)
        return Basis.from_rows(like, u.mT), s**2, (values < -100 * floor).any(-1)
