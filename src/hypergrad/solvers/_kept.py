"""What is kept from one system of a sequence to the next: the span of the last solutions, and a preconditioner."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._basis import Basis
from .._vector import Space, Vector
from ..operators import LinearOperator
from ._direct import apply
from ._krylov import triangular_solve
from ._preconditioners import is_recipe


class Stateful:
    """Base of objects whose state is tensors and numbers, so that a resumed sequence equals an uninterrupted one."""

    _state: ClassVar[tuple[str, ...]]

    def state_dict(self) -> dict[str, Any]:
        """The state, for torch.save; torch.load(weights_only=True) can read it."""
        values = {name: getattr(self, name) for name in self._state}
        return {name: list(value) if isinstance(value, list) else value for name, value in values.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state_dict. Raises ValueError for one of another kind of object."""
        if {*state} != {*self._state}:
            raise ValueError(f"{type(self).__name__}: a state_dict holds {[*self._state]}, but got {[*state]}")
        for name, value in state.items():
            setattr(self, name, list(value) if isinstance(value, list) else value)


def kind(space: Space) -> tuple[Any, ...]:
    """What a system must share with the previous one, so that the kept vectors or factors fit it."""
    return space.shapes, space.dtypes, space.batch_dims


@dataclass(eq=False)
class Recycled(Stateful):
    """A start in the span of the last m solutions: pass one object as x0 to every solve of a sequence.

        Y = (x₁, …, x_m) = QR,   AQ = CR',   CᵀC = I,      x₀ = Q R'⁻¹Cᵀb,   r₀ = b − CCᵀb

    x₀ has the least residual in the span, so it is never a worse start than the last solution (or zero). Along a smooth
    sequence it extrapolates, and its residual is smaller by orders of magnitude. If b jumps from one system to the next
    (minibatches of the outer loss), its m products are wasted. Use one object for each sequence, with any solver:

        recycled = hg.solvers.Recycled(4)
        for ...: hg.implicit.backward(..., solver=hg.solvers.CG(rtol=1e-6), x0=recycled)

    Args:
        size: m ≥ 1, the number of solutions that are kept.

    Attributes:
        kept: the number of solutions held now. A change of shape, dtype or device discards them.

    Raises: TypeError at a solve with sharded tensors, which cannot be stacked.
    Cost: m products a solve, vectorised; m vectors, and 2m more during a start; nothing is read from the device.
    Source: Fischer 1998, Method 1, with AQ computed for each system, as A changes (as in GCRO-DR, Parks et al. 2006).

    Example:
        >>> op = hg.operators.matrix(torch.diag(torch.tensor([1.0, 2.0, 3.0])), symmetric=True)
        >>> recycled = Recycled(2)
        >>> [hg.solvers.CG(rtol=1e-4)(op, torch.tensor([1.0, t, t]), x0=recycled).steps for t in (1.0, 2.0, 3.0)]
        [3, 3, 0]
    """

    size: int = 4
    _state: ClassVar[tuple[str, ...]] = ("_solutions", "_kind")
    _solutions: list[Tensor] = field(default_factory=list, init=False, repr=False)
    _kind: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"Recycled: size must be an integer ≥ 1, got {self.size!r}")

    @property
    def kept(self) -> int:
        return len(self._solutions)

    def _serves(self, space: Space) -> bool:
        return bool(self._solutions) and self._kind == kind(space) and self._solutions[0].device == space.device

    def start(self, op: LinearOperator, b: Vector) -> tuple[Vector, Vector] | None:
        """x₀ and b − A x₀; None if no solution of this form is kept."""
        if not self._serves(b.space):
            return None
        q = Basis.from_rows(b, torch.linalg.qr(torch.stack(self._solutions, -1))[0].mT)
        c, triangle = torch.linalg.qr(op.many(q).matrix().mT)
        size = triangle.diagonal(dim1=-2, dim2=-1).abs()
        # A direction that A maps to nearly zero would get a large weight, and add mostly rounding errors.
        negligible = b.space.eps**0.5 * size.amax(-1)
        triangle = torch.where((size <= negligible.unsqueeze(-1)).unsqueeze(-1), 0.0, triangle)
        weights = triangular_solve(triangle, apply(c.mT, b.flat()), negligible)
        image = apply(c, apply(triangle, weights))
        return q.combine(weights), b - b.space.from_flat(image)

    def keep(self, x: Vector) -> None:
        """Add a solution to the span and drop the oldest. Systems with NaN or infinity add zeros."""
        if not self._serves(x.space):
            self._solutions, self._kind = [], kind(x.space)
        x = x / x.scale()
        size = x.norm()
        usable = (size > 0) & (size < torch.inf)
        unit = (x / torch.where(usable, size, 1.0)).where(usable, x.zeros())
        self._solutions = [unit.flat(), *self._solutions][: self.size]


@dataclass(eq=False)
class Reused(Stateful):
    """A preconditioner that is kept from one system to the next, and rebuilt when that pays.

    As A changes from the system that the preconditioner was built for, solves take more steps s. It is rebuilt once the
    lost steps, Σ (s − min s), are as many as the products that building took. Use one object for each sequence:

        precondition = hg.solvers.Reused(hg.solvers.Nystrom(rank=50, damping=1e-3))
        for ...: hg.implicit.backward(..., solver=hg.solvers.CG(rtol=1e-6, preconditioner=precondition), x0=adjoint)

    Args:
        recipe: what builds it: `Nystrom`, `Dense`, or any object with factors(op, like) → list of tensors
            and apply(factors, r) → M⁻¹r.

    Attributes:
        builds: the number of times it was built.
        steps: the steps of each solve since the last build, the current one last. Solves without a step do not count.

    Raises: TypeError for a recipe of another form; ValueError at a solve without a tolerance, because a fixed number of
        steps does not show that the preconditioner has aged.

    Example:
        >>> import torch, hypergrad as hg
        >>> op = hg.operators.matrix(torch.tensor([[4.0, 1.0], [1.0, 3.0]]).double(), positive_definite=True)
        >>> inverse = hg.solvers.Reused(hg.solvers.Dense())  # one object for a sequence of systems
        >>> [hg.solvers.CG(preconditioner=inverse, rtol=1e-8)(op, torch.ones(2).double()).steps for _ in range(2)]
        [1, 1]
    """

    recipe: Any
    builds: int = field(default=0, init=False)
    steps: list[int] = field(default_factory=list, init=False)
    _factors: list[Tensor] = field(default_factory=list, init=False, repr=False)
    _cost: int = field(default=0, init=False, repr=False)
    _kind: Any = field(default=None, init=False, repr=False)
    _applied: bool = field(default=False, init=False, repr=False)
    needs_tolerance: ClassVar[bool] = True
    _state: ClassVar[tuple[str, ...]] = ("builds", "steps", "_factors", "_cost", "_kind")

    def __post_init__(self) -> None:
        if not is_recipe(self.recipe):
            raise TypeError(f"Reused needs a recipe such as Nystrom(...), got {self.recipe!r}")

    def factors(self, op: LinearOperator, like: Vector) -> list[Tensor]:
        """The recipe's factors, for this operator or for an earlier one."""
        steps = [s for s in self.steps if s]
        lost = sum(steps) - len(steps) * min(steps, default=0)
        serves = self._kind == kind(like.space) and all(x.device == like.space.device for x in self._factors)
        if not serves or lost >= max(self._cost, 1):
            before = op.products
            self._factors = self.recipe.factors(op, like)
            self._cost, self._kind, self.steps = op.products - before, kind(like.space), []
            self.builds += 1
        self._applied = False
        return self._factors

    def apply(self, factors: list[Tensor], r: Vector) -> Vector:
        """M⁻¹r. Counts steps by its calls, of which the first comes before the first step."""
        if self._applied:
            self.steps[-1] += 1
        else:
            self.steps.append(0)
            self._applied = True
        return self.recipe.apply(factors, r)
