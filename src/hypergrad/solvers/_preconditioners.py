"""Preconditioners for CG and MINRES, beside `Nystrom` and `Dense`.

A recipe builds one from A: factors(op, like) → tensors, once for a system, and apply(factors, r) → M⁻¹r.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._basis import Basis
from .._vector import Vector
from ..operators import LinearOperator, function
from ._solver import System, check_options, require_symmetric


def is_recipe(thing: Any) -> bool:
    """Whether it builds a preconditioner from an operator; a class in the place of its object does not."""
    return hasattr(thing, "factors") and hasattr(thing, "apply") and not isinstance(thing, type)


@dataclass(frozen=True, kw_only=True)
class Diagonal:
    """M = diag(A), estimated with random signs: for systems whose unknowns have different scales.

        d = (1/m) Σⱼ zⱼ ∘ A zⱼ,   zⱼ ∈ {−1, 1}ⁿ;      M⁻¹r = r / max(d, standard error of d)

    Exact where A is diagonal; the other entries of row i add the variance Σₖ aᵢₖ² / m. Where the diagonal is known in
    closed form pass a function instead: CG(preconditioner=lambda r: r / d).

    Args:
        probes: m ≥ 2, products spent.
        seed: of the probes' own generator; torch's global random state is not touched.

    Raises: TypeError for an operator that is not declared symmetric, or sharded tensors.
    Cost: m products, vectorised, when it is built; one vector.
    Source: Bekas, Kokiopoulou and Saad 2007; as a preconditioner in Newton methods Dembo and Steihaug 1983.

    Example:
        >>> op = hg.operators.matrix(torch.diag(torch.tensor([1.0, 1e4])), symmetric=True)
        >>> hg.solvers.CG(max_steps=1, preconditioner=Diagonal(probes=2))(op, torch.tensor([1.0, 1.0])).value
        tensor([1.0000e+00, 1.0000e-04])
    """

    probes: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        check_options(self, integers={"probes": 2})
        if not isinstance(self.seed, int):
            raise ValueError(f"Diagonal: seed must be an integer, got {self.seed!r}")

    def factors(self, op: LinearOperator, like: Vector) -> list[Tensor]:
        """The diagonal of this operator, [n] or [B, n]."""
        require_symmetric(op, "Diagonal")
        space, m = like.space, self.probes
        generator = torch.Generator(device="cpu").manual_seed(self.seed)
        signs = torch.randint(0, 2, (m, space.length), generator=generator, device="cpu") * 2 - 1
        signs = signs.to(space.device, space.dtype)
        samples = signs * op.many(Basis.from_rows(like, signs)).matrix()
        error, mean = torch.std_mean(samples, -2)
        diagonal = torch.maximum(mean, error / m**0.5)
        # A row of zeros, and NaN: no scale is better than a wrong one, and NaN shows in the residual.
        return [torch.where(diagonal > 0, diagonal, 1.0)]

    def apply(self, factors: list[Tensor], r: Vector) -> Vector:
        """M⁻¹r."""
        return r.space.from_flat(r.flat() / factors[0])


def build_preconditioner(preconditioner: Any, system: System) -> Callable[[Vector], Vector] | None:
    """r ↦ M⁻¹ r from what the user gave: None, an operator, a function of pytrees, or a recipe such as Nystrom."""
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
