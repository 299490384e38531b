"""Recycling along a sequence of systems: a start in the span of the last solutions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._basis import Basis
from .._vector import Vector
from ..operators import LinearOperator
from ._direct import apply
from ._krylov import triangular_solve


@dataclass(eq=False)
class Recycled:
    """The span of the last m solutions as a start: pass it as x0 to every solve of a sequence.

        Y = (x₁, …, x_m) = QR,   AQ = CR',   CᵀC = I,      x₀ = Q R'⁻¹Cᵀb,   r₀ = b − CCᵀb

    x₀ has the least residual in the span, so it is never a worse start than the last solution (or zero). Along a smooth
    sequence the solutions are smooth in t as well, and combinations of them come nearer by orders: it extrapolates,
    and learns how from A and b. One object for each sequence; it goes with every solver and preconditioner:

        recycled = hg.solvers.Recycled(4)
        for ...: hg.implicit.backward(..., solver=hg.solvers.CG(rtol=1e-6), x0=recycled)

    Where b jumps from one system to the next (minibatches of the outer loss) there is nothing to extrapolate, and its m
    products are lost.

    Args:
        size: m ≥ 1, the number of solutions that are kept.

    Attributes:
        kept: how many there are now. Another shape, dtype or device starts anew.

    Raises: TypeError at a solve with sharded tensors, which cannot be stacked.
    Cost: m products a solve, vectorised; m vectors, two times m more meanwhile; nothing is read from the device.
    Source: Fischer 1998, Method 1, with AQ made anew for each system, for A changes (as in GCRO-DR, Parks et al. 2006).

    Example:
        >>> op = hg.operators.matrix(torch.diag(torch.tensor([1.0, 2.0, 3.0])), symmetric=True)
        >>> recycled = Recycled(2)
        >>> [hg.solvers.CG(rtol=1e-4)(op, torch.tensor([1.0, t, t]), x0=recycled).steps for t in (1.0, 2.0, 3.0)]
        [3, 3, 0]
    """

    size: int = 4
    _solutions: list[Tensor] = field(default_factory=list, init=False, repr=False)
    _kind: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"Recycled: size must be an integer ≥ 1, got {self.size!r}")

    @property
    def kept(self) -> int:
        return len(self._solutions)

    def start(self, op: LinearOperator, b: Vector) -> tuple[Vector, Vector] | None:
        """x₀ and b − A x₀; None where nothing is kept for such a b."""
        if not self._solutions or self._kind != kind(b):
            return None
        q = Basis.from_rows(b, torch.linalg.qr(torch.stack(self._solutions, -1))[0].mT)
        c, triangle = torch.linalg.qr(op.many(q).matrix().mT)
        size = triangle.diagonal(dim1=-2, dim2=-1).abs()
        # What A takes to next to nothing would come in with a large factor, and with more rounding than it is worth.
        void = size <= b.space.eps**0.5 * size.amax(-1, keepdim=True)
        weights = triangular_solve(torch.where(void.unsqueeze(-1), 0.0, triangle), apply(c.mT, b.flat()))
        image = apply(c, apply(triangle, weights))
        return q.combine(weights), b - b.space.from_flat(image)

    def keep(self, x: Vector) -> None:
        """Take a solution into the span, and the oldest out of it; NaN and infinity add nothing."""
        if self._kind != kind(x):
            self._solutions, self._kind = [], kind(x)
        x = x / x.scale()
        size = x.norm()
        usable = (size > 0) & (size < torch.inf)
        unit = (x / torch.where(usable, size, 1.0)).where(usable, x.zeros())
        self._solutions = [unit.flat(), *self._solutions][: self.size]


def kind(x: Vector) -> Any:
    return x.space.shapes, x.space.dtypes, x.space.devices, x.space.batch_dims
