"""The forward solvers, side by side."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import _torch, operators
from .._autodiff import Linearisation
from .._basis import Basis
from .._vector import Vector
from ..solvers import GMRES, LinearSolver, check_options, solve
from ._solver import Evaluate, FixedPointSolver, Iterate, Propose


@dataclass(frozen=True, kw_only=True)
class Picard(FixedPointSolver):
    """w ← (1 − τ) w + τ Φ(w): the error falls by the contraction factor of Φ a step.

    With mixing=1 the value of a solve to a tolerance is Φ(w), which is known: one contraction closer than w. Its
    residual is not known: residual_norm is that of w, an upper bound where Φ contracts.

    Args:
        mixing: τ in (0, 1]; 1 is the plain iteration.

    Cost: one evaluation a step; two vectors.

    Example:
        >>> Picard(rtol=1e-6)(lambda w: w.cos(), torch.tensor(1.0, dtype=torch.float64)).value
        tensor(0.7391, dtype=torch.float64)
    """

    mixing: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_mixing(self)

    @property
    def _patience(self) -> None:
        return None

    @property
    def _is_plain(self) -> bool:
        return self.mixing == 1

    def _method(self, start: Vector, evaluate: Evaluate) -> Propose:
        return lambda at: at.image if self._is_plain else at.w + at.residual * self.mixing


def _check_mixing(solver: Picard | Anderson) -> None:
    if not 0 < solver.mixing <= 1:
        raise ValueError(f"{type(solver).__name__}: mixing must be in (0, 1], got {solver.mixing!r}")


@dataclass(frozen=True, kw_only=True)
class Anderson(FixedPointSolver):
    """Anderson acceleration: w ← Σᵢ αᵢ (wᵢ + β rᵢ) over the last m iterates, with Σα = 1 and ‖Σᵢ αᵢ rᵢ‖ least.

    Args:
        history: m ≥ 1, iterates remembered.
        regularisation: of the least squares problem, relative to its largest diagonal entry.
        mixing: β in (0, 1].

    Cost: one evaluation a step; 2m + 2 vectors.
    Source: Anderson 1965; Walker and Ni 2011.

    Example:
        >>> Anderson(rtol=1e-10)(lambda w: w.cos(), torch.tensor(1.0, dtype=torch.float64)).value
        tensor(0.7391, dtype=torch.float64)
    """

    history: int = 5
    regularisation: float = 1e-12
    mixing: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self, numbers=("regularisation",), integers={"history": 1})
        _check_mixing(self)

    @property
    def _patience(self) -> tuple[int, int]:
        return 10 + self.history, self.history

    def _method(self, start: Vector, evaluate: Evaluate) -> Propose:
        space, m = start.space, self.history
        iterates, residuals = Basis(start, m), Basis(start, m)  # residuals divided by their sizes
        sizes = torch.ones(*space.batch_shape, m, dtype=torch.float64, device=space.device)
        gram = torch.zeros(*space.batch_shape, m, m, dtype=torch.float64, device=space.device)
        # Residuals may be dependent to the last bit: some regularisation there must be, in the Gram matrix's dtype.
        regularisation = max(self.regularisation, 1e2 * space.eps**2, 4 * torch.finfo(gram.dtype).eps)
        seen = 0

        def propose(at: Iterate) -> Vector:
            nonlocal seen
            slot, seen = seen % m, seen + 1
            count = min(seen, m)
            size = at.residual.scale()
            unit = at.residual / size
            iterates[slot], residuals[slot], sizes[..., slot] = at.w, unit, size.double()
            row = residuals.coefficients(unit, count).double()
            gram[..., slot, :count] = row
            gram[..., :count, slot] = row
            ratios = sizes[..., :count] / sizes[..., :count].amax(-1, keepdim=True)
            inner = gram[..., :count, :count] * ratios.unsqueeze(-1) * ratios.unsqueeze(-2)
            alpha = _affine_least_squares(inner, regularisation)
            step = residuals.combine((alpha * sizes[..., :count] * self.mixing).to(space.dtype))
            return iterates.combine(alpha.to(space.dtype)) + step

        return propose


def _affine_least_squares(gram: Tensor, regularisation: float) -> Tensor:
    """argmin αᵀGα subject to Σα = 1, by G⁻¹1 scaled: [..., m]."""
    top = gram.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None]
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    scaled = gram / torch.where(top > 0, top, 1.0) + regularisation * eye
    lu, pivots, _ = torch.linalg.lu_factor_ex(scaled)
    solution = torch.linalg.lu_solve(lu, pivots, torch.ones_like(gram[..., :1])).squeeze(-1)
    return solution / solution.sum(-1, keepdim=True)


@dataclass(frozen=True, kw_only=True)
class Broyden(FixedPointSolver):
    """Broyden's good method in limited memory, on r(w) = Φ(w) − w.

        B = −I + Σᵢ uᵢ vᵢᵀ ≈ (∂r)⁻¹,   w ← w − B r,   v = Bᵀ Δw,   u = (Δw − B Δr) / vᵀΔr

    Args:
        history: rank-one updates kept; the method starts anew from −I when it is full.

    Cost: one evaluation a step; 2 · history + 4 vectors.
    Source: Broyden 1965; Bai, Kolter and Koltun 2019, section 3.1.4.
    """

    history: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self, integers={"history": 1})

    @property
    def _patience(self) -> tuple[int, int]:
        return 10 + self.history, 5

    def _method(self, start: Vector, evaluate: Evaluate) -> Propose:
        us, vs = Basis(start, self.history), Basis(start, self.history)
        count = 0
        before: Iterate | None = None

        def times(x: Vector) -> Vector:
            return us.combine(vs.coefficients(x, count)) - x if count else -x

        def transposed(x: Vector) -> Vector:
            return vs.combine(us.coefficients(x, count)) - x if count else -x

        def propose(at: Iterate) -> Vector:
            nonlocal count, before
            if before is not None:
                if count == self.history:
                    count = 0
                dw, dr = at.w - before.w, at.residual - before.residual
                size = dw.scale()  # u vᵀ is the same for Δw and Δr in any unit
                dw, dr = dw / size, dr / size
                v = transposed(dw)
                curvature = v.dot(dr)
                usable = curvature.abs() > start.space.eps * v.norm() * dr.norm()
                u = (dw - times(dr)) * torch.where(usable, 1 / curvature, 0.0)
                us[count], vs[count] = u, v
                count += 1
            before = at
            return at.w - times(at.residual)

        return propose


@dataclass(frozen=True, kw_only=True)
class Newton(FixedPointSolver):
    """Newton's method, matrix-free: (I − ∂₁Φ(w)) δ = Φ(w) − w, w ← w + δ.

    Args:
        solver: the linear solver for δ; a loose tolerance is enough far from the solution.

    Cost: a step evaluates Φ twice (once with its graph) and does the linear solver's products with I − ∂₁Φ.
    Source: Dembo, Eisenstat and Steihaug 1982 (inexact Newton).
    """

    solver: LinearSolver = field(default_factory=lambda: GMRES(rtol=1e-4, max_steps=100, on_failure="ignore"))

    def _method(self, start: Vector, evaluate: Evaluate) -> Propose:
        def propose(at: Iterate) -> Vector:
            leaves = [_torch.tracked(leaf.detach()) for leaf in at.w.leaves]
            with torch.enable_grad():
                linearisation = Linearisation(evaluate(leaves), leaves, [])
            op = operators.adjoint(
                lambda: linearisation,
                fixed_point=True,
                symmetric=False,
                positive_definite=False,
                batch_dims=start.space.batch_dims,
            )
            return at.w + solve(self.solver, op.T, at.residual.copy(), None).value

        return propose
