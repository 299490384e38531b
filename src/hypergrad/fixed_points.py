"""Forward solvers of w = Φ(w, λ), side by side: frozen configuration, called as solver(fp_map, start, hparams).

Nothing here is differentiated: `implicit.fixed_point` attaches derivatives to what comes out. With batch_dims=1 each
sample converges by itself and then rests.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from . import operators
from ._autodiff import Linearisation
from ._basis import Basis
from ._solution import OnFailure, Solution, Status
from ._tree import PyTree
from ._vector import Space, Vector
from .solvers import GMRES, LinearSolver, solve

Propose = Callable[[Vector, Vector, Any], Vector]  # (w, Φ(w), r = Φ(w) − w) ↦ the next w


@dataclass(frozen=True, kw_only=True)
class FixedPointSolver(ABC):
    """What all forward solvers share. A step evaluates Φ once, at w, and is done when ‖Φ(w) − w‖ is small.

    Args:
        max_steps: steps at most; exactly that many where neither rtol nor atol is given. The residual of the last w
            takes one evaluation more.
        rtol, atol: solved when ‖Φ(w) − w‖ ≤ max(atol, rtol · ‖Φ(w)‖). With max_steps, rtol and atol all left out, rtol
            is 1e-6 in float64 and 1e-4 in float32 (4 eps in half precision), and max_steps 200.
        batch_dims: 1 where the first axis of each leaf counts independent samples.
        on_failure: "warn" (HypergradientWarning), "raise" (SolverError) or "ignore".
        check_every: steps between two looks at the residual (default: 1 on the CPU, 5 elsewhere).
        trace: keep the residual norm of each sample at each step, [steps + 1, B]; else that of the worst, [steps + 1],
            and without a tolerance only at steps 1, 2, 4, … and the last (NaN in between).
    """

    max_steps: int | None = None
    rtol: float | None = None
    atol: float | None = None
    batch_dims: int = 0
    on_failure: OnFailure = "warn"
    check_every: int | None = None
    trace: bool = False

    def __post_init__(self) -> None:
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{type(self).__name__}: {name} must be a finite number ≥ 0, got {value!r}")
        for name, least in (("max_steps", 0), ("check_every", 1)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise ValueError(f"{type(self).__name__}: {name} must be an integer ≥ {least}, got {value!r}")
        if self.on_failure not in ("warn", "raise", "ignore"):
            raise ValueError(f'on_failure must be "warn", "raise" or "ignore", got {self.on_failure!r}')

    @property
    def _uses_residual(self) -> bool:
        """Whether a step of the method takes r, and not only Φ(w)."""
        return True

    @abstractmethod
    def _method(self, phi: Callable[[Vector], Vector], start: Vector, fp_map: Any, hparams: Any) -> Propose:
        """The method's step, with what it remembers between steps."""

    @final
    def __call__(self, fp_map: Callable[..., PyTree], start: PyTree, hparams: PyTree = None) -> Solution:
        """Solve w = Φ(w, λ).

        Args:
            fp_map: Φ(params, hparams), or Φ(params) where hparams is None; of params' structure and shapes.
            start: the first w, any pytree of floating point tensors.
            hparams: λ.

        Returns: Solution whose value is w in start's structure, with residual_norm ‖Φ(w) − w‖ and rhs_norm ‖Φ(w)‖. With
            a tolerance it is the best w met; without one the last.
        Raises: ValueError where Φ changes structure, shape, dtype or device; SolverError under on_failure="raise".
        """
        space = Space(start, "start", self.batch_dims)

        def evaluate(tree: PyTree) -> PyTree:
            return fp_map(tree) if hparams is None else fp_map(tree, hparams)

        def phi(w: Vector) -> Vector:
            return space.vector(evaluate(w.tree), "the value of the fixed point map")

        with torch.no_grad():
            w = space.vector(start, "start").copy()
            solution = self._run(phi, w, self._method(phi, w, evaluate, hparams))
        solution.report(type(self).__name__, self.on_failure)
        return solution

    def _run(self, phi: Callable[[Vector], Vector], w: Vector, propose: Propose) -> Solution:
        rtol, atol, most = self.rtol, self.atol, self.max_steps
        if rtol is None and atol is None and most is None:
            rtol = w.space.rtol
        fixed = rtol is None and atol is None
        most = 200 if most is None else most
        every = self.check_every or (1 if w.space.device.type == "cpu" else 5)

        unknown = torch.full(w.space.batch_shape, torch.nan, dtype=w.space.dtype, device=w.space.device)

        def measure(w: Vector, step: int) -> tuple[Vector, Any, Tensor, Tensor]:
            image = phi(w)
            looks = not fixed or self.trace or not step & (step - 1) or step == most
            r = image - w if looks or self._uses_residual else None
            return (image, r, r.norm(), image.norm()) if looks and r is not None else (image, r, unknown, unknown)

        image, r, norm, size = measure(w, 0)
        best = (w, norm, size)
        going = self._unsolved(norm, size, rtol, atol)
        first = before = norm  # before: at the last power of two, to see growth by
        trace, steps = [self._traced(norm)], 0
        while steps < most and (fixed or steps % every or bool(going.any())):
            before = before if steps & (steps - 1) else norm
            new = propose(w, image, r)
            w = new if fixed or not self.batch_dims else new.where(going, w)
            steps += 1
            image, r, norm, size = measure(w, steps)
            trace.append(self._traced(norm))
            best = (w, norm, size) if fixed else _better((w, norm, size), best)
            going = going & self._unsolved(norm, size, rtol, atol)
        last, (w, norm, size) = norm, best
        unsolved = norm.new_zeros(norm.shape, dtype=torch.bool) if fixed else self._unsolved(norm, size, rtol, atol)
        done = Status.COMPLETED if fixed else Status.CONVERGED
        code = torch.where(unsolved, Status.MAX_STEPS.value, done.value)
        grown = (last > first) & (last > before) & (steps > 1)
        grown = grown & ~(last <= 100 * w.space.eps * size)  # at rounding level nothing is growth
        code = torch.where(grown & (unsolved | fixed), Status.DIVERGED.value, code)
        finite = torch.isfinite(norm) & (torch.isfinite(last) | ~unsolved)
        code = torch.where(finite, code, Status.NON_FINITE.value)
        return Solution(w.tree, code, steps, norm, size, torch.stack(trace), type(self).__name__)

    def _traced(self, norm: Tensor) -> Tensor:
        return norm.amax() if norm.ndim and not self.trace else norm

    def _unsolved(self, norm: Tensor, size: Tensor, rtol: float | None, atol: float | None) -> Tensor:
        return ~(norm <= torch.clamp_min((rtol or 0.0) * size, atol or 0.0))


def _better(new: tuple[Vector, Tensor, Tensor], old: tuple[Vector, Tensor, Tensor]) -> tuple[Vector, Tensor, Tensor]:
    """The one with the smaller residual, for each sample; what is not finite never wins."""
    wins = new[1] < old[1]
    if not wins.ndim and wins.device.type == "cpu":
        return new if bool(wins) else old
    return new[0].where(wins, old[0]), torch.where(wins, new[1], old[1]), torch.where(wins, new[2], old[2])


@dataclass(frozen=True, kw_only=True)
class Picard(FixedPointSolver):
    """w ← (1 − τ) w + τ Φ(w): the error falls by the contraction factor of Φ a step.

    Args:
        damping: τ in (0, 1]; 1 is the plain iteration.

    Cost: one evaluation a step; two vectors.

    Example:
        >>> Picard(rtol=1e-6)(lambda w: w.cos(), torch.tensor(1.0, dtype=torch.float64)).value
        tensor(0.7391, dtype=torch.float64)
    """

    damping: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.damping <= 1:
            raise ValueError(f"Picard: damping must be in (0, 1], got {self.damping!r}")

    @property
    def _uses_residual(self) -> bool:
        return self.damping < 1

    def _method(self, phi: Callable[[Vector], Vector], start: Vector, fp_map: Any, hparams: Any) -> Propose:
        return lambda w, image, r: image if self.damping == 1 else w + r * self.damping


@dataclass(frozen=True, kw_only=True)
class Anderson(FixedPointSolver):
    """Anderson acceleration: w ← Σᵢ αᵢ (wᵢ + β rᵢ) over the last m iterates, with Σα = 1 and ‖Σᵢ αᵢ rᵢ‖ least.

    Args:
        m: iterates remembered, ≥ 1.
        regularisation: of the least squares problem, relative to its largest diagonal entry.
        mixing: β in (0, 1].

    Cost: one evaluation a step; 2m + 2 vectors.
    Source: Anderson 1965; Walker and Ni 2011.

    Example:
        >>> Anderson(rtol=1e-10)(lambda w: w.cos(), torch.tensor(1.0, dtype=torch.float64)).value
        tensor(0.7391, dtype=torch.float64)
    """

    m: int = 5
    regularisation: float = 1e-12
    mixing: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.m, int) or self.m < 1:
            raise ValueError(f"Anderson: m must be an integer ≥ 1, got {self.m!r}")
        if not (self.regularisation >= 0 and 0 < self.mixing <= 1):
            raise ValueError("Anderson: regularisation must be ≥ 0 and mixing in (0, 1]")

    def _method(self, phi: Callable[[Vector], Vector], start: Vector, fp_map: Any, hparams: Any) -> Propose:
        iterates, residuals = Basis(start, self.m), Basis(start, self.m)
        gram = torch.zeros(*start.space.batch_shape, self.m, self.m, dtype=torch.float64, device=start.space.device)
        seen = 0

        def propose(w: Vector, image: Vector, r: Vector) -> Vector:
            nonlocal seen
            slot = seen % self.m
            seen += 1
            iterates[slot], residuals[slot] = w, r
            count = min(seen, self.m)
            row = residuals.coefficients(r, count).double()
            gram[..., slot, :count] = row
            gram[..., :count, slot] = row
            # Residuals may be dependent to the last bit: some regularisation there must be, in the Gram matrix's dtype.
            least = max(1e2 * start.space.eps**2, 4 * torch.finfo(gram.dtype).eps)
            alpha = _affine_least_squares(gram[..., :count, :count], max(self.regularisation, least))
            alpha = alpha.to(start.space.dtype)
            return iterates.combine(alpha) + residuals.combine(alpha * self.mixing)

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
        memory: rank-one updates kept; the method starts anew from −I when it is full.

    Cost: one evaluation a step; 2 · memory + 4 vectors.
    Source: Broyden 1965; Bai, Kolter and Koltun 2019, section 3.1.4.
    """

    memory: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.memory, int) or self.memory < 1:
            raise ValueError(f"Broyden: memory must be an integer ≥ 1, got {self.memory!r}")

    def _method(self, phi: Callable[[Vector], Vector], start: Vector, fp_map: Any, hparams: Any) -> Propose:
        us, vs = Basis(start, self.memory), Basis(start, self.memory)
        count = 0
        before: tuple[Vector, Vector] | None = None

        def times(x: Vector) -> Vector:
            return us.combine(vs.coefficients(x, count)) - x if count else -x

        def transposed(x: Vector) -> Vector:
            return vs.combine(us.coefficients(x, count)) - x if count else -x

        def propose(w: Vector, image: Vector, r: Vector) -> Vector:
            nonlocal count, before
            if before is not None:
                if count == self.memory:
                    count = 0
                dw, dr = w - before[0], r - before[1]
                v = transposed(dw)
                scale = v.dot(dr)
                usable = scale.abs() > start.space.eps * v.norm() * dr.norm()
                u = (dw - times(dr)) * torch.where(usable, 1 / scale, 0.0)
                us[count], vs[count] = u, v
                count += 1
            before = w, r
            return w - times(r)

        return propose


@dataclass(frozen=True, kw_only=True)
class Newton(FixedPointSolver):
    """Newton's method, matrix-free: (I − ∂₁Φ(w)) δ = Φ(w) − w, w ← w + δ.

    Args:
        linear: the linear solver for δ; a loose tolerance is enough far from the solution.

    Cost: a step evaluates Φ twice (once with its graph) and does the linear solver's products with I − ∂₁Φ.
    Source: Dembo, Eisenstat and Steihaug 1982 (inexact Newton).
    """

    linear: LinearSolver = field(default_factory=lambda: GMRES(rtol=1e-4, max_steps=100, on_failure="ignore"))

    def _method(self, phi: Callable[[Vector], Vector], start: Vector, fp_map: Any, hparams: Any) -> Propose:
        space = start.space

        def propose(w: Vector, image: Vector, r: Vector) -> Vector:
            leaves = [leaf.detach().requires_grad_() for leaf in w.leaves]
            with torch.enable_grad():
                outputs = space.check(fp_map(space.unflatten(leaves)), "the value of the fixed point map")
            linearisation = Linearisation(outputs, leaves, [])
            op = operators.adjoint(
                lambda: linearisation,
                fixed_point=True,
                symmetric=False,
                positive_definite=False,
                batch_dims=self.batch_dims,
            )
            return w + solve(self.linear, op.T, r.copy(), None).value

        return propose
