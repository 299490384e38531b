"""Preconditioners for CG and MINRES beside `Nystrom`: recipes with preconditioner(op, like) → (r ↦ M⁻¹r)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .._basis import Basis
from .._vector import Vector
from ..operators import LinearOperator, function
from ._solver import System, require_symmetric

Precondition = Callable[[Vector], Vector]


def is_recipe(thing: Any) -> bool:
    """Whether it builds a preconditioner from an operator; a class in the place of its object does not."""
    return hasattr(thing, "preconditioner") and not isinstance(thing, type)


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
        if not isinstance(self.probes, int) or self.probes < 2:
            raise ValueError(f"Diagonal: probes must be an integer ≥ 2, got {self.probes!r}")
        if not isinstance(self.seed, int):
            raise ValueError(f"Diagonal: seed must be an integer, got {self.seed!r}")

    def preconditioner(self, op: LinearOperator, like: Vector) -> Precondition:
        """r ↦ M⁻¹r for this operator; m products now, none later."""
        require_symmetric(op, "Diagonal")
        space, m = like.space, self.probes
        generator = torch.Generator().manual_seed(self.seed)
        signs = torch.randint(0, 2, (m, space.length), generator=generator).to(space.device, space.dtype) * 2 - 1
        samples = signs * op.many(Basis.from_rows(like, signs)).matrix()
        error, mean = torch.std_mean(samples, -2)
        diagonal = torch.maximum(mean, error / m**0.5)
        # A row of zeros, and NaN: no scale is better than a wrong one, and the residual will tell of NaN.
        diagonal = torch.where(diagonal > 0, diagonal, 1.0)
        return lambda r: r.space.from_flat(r.flat() / diagonal)


@dataclass(eq=False)
class Reused:
    """A preconditioner that is kept from one system to the next, and built anew when that pays.

    As A moves away from the system it was built for, solves take more steps s. Once the steps lost since then,
    Σ (s − min s), are as many as the products that building it took, it is built for the system at hand. One object for
    each sequence of systems:

        precondition = hg.solvers.Reused(hg.solvers.Nystrom(rank=50, damping=1e-3))
        for ...: hg.implicit.backward(..., solver=hg.solvers.CG(rtol=1e-6, preconditioner=precondition), x0=adjoint)

    Args:
        recipe: what builds it: `Nystrom`, `Diagonal`, `Dense`, or any object with preconditioner(op, like).

    Attributes:
        builds: how often it was built.
        steps: those of each solve since, the one at hand last. Solves without a step do not count for the choice.

    Raises: TypeError for a recipe of another form. At a solve ValueError where the solver has no tolerance: with a
        fixed number of steps nothing shows that the preconditioner has aged.
    """

    recipe: Any
    builds: int = field(default=0, init=False)
    steps: list[int] = field(default_factory=list, init=False)
    _precondition: Precondition | None = field(default=None, init=False, repr=False)
    _cost: int = field(default=0, init=False, repr=False)
    _kind: Any = field(default=None, init=False, repr=False)
    _applied: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if not is_recipe(self.recipe):
            raise TypeError(f"Reused needs a recipe such as Nystrom(...) or Diagonal(...), got {self.recipe!r}")

    def preconditioner(self, op: LinearOperator, like: Vector) -> Precondition:
        """r ↦ M⁻¹r, built for this operator or for one before."""
        space = like.space
        kind = (space.shapes, space.dtypes, space.devices, space.batch_dims)
        steps = [s for s in self.steps if s]  # a start that was good enough says nothing
        lost = sum(steps) - len(steps) * min(steps, default=0)
        if self._precondition is None or kind != self._kind or lost >= max(self._cost, 1):
            before = op.products
            self._precondition = self.recipe.preconditioner(op, like)
            self._cost, self._kind, self.steps = op.products - before, kind, []
            self.builds += 1
        self._applied = False
        return self._counted

    def _counted(self, r: Vector) -> Vector:
        assert self._precondition is not None
        if self._applied:
            self.steps[-1] += 1
        else:  # before the first step
            self.steps.append(0)
            self._applied = True
        return self._precondition(r)


def build_preconditioner(preconditioner: Any, system: System) -> Callable[[Vector], Vector] | None:
    """r ↦ M⁻¹ r from what the user gave: None, an operator, a function of pytrees, or a recipe such as Nystrom."""
    if preconditioner is None or isinstance(preconditioner, LinearOperator):
        return preconditioner
    if isinstance(preconditioner, Reused) and system.goal is None:
        raise ValueError(
            "Reused needs a solver with a tolerance (rtol or atol): a fixed number of steps does not show that the "
            "preconditioner has aged"
        )
    if is_recipe(preconditioner):
        if system.precondition is None:
            system.precondition = preconditioner.preconditioner(system.op, system.b)
        return system.precondition
    if not callable(preconditioner) or isinstance(preconditioner, type):
        raise TypeError(
            f"preconditioner must be a LinearOperator, a function r ↦ M⁻¹r of pytrees, or a recipe such as "
            f"Nystrom(...), got {preconditioner!r}"
        )
    return function(preconditioner)
