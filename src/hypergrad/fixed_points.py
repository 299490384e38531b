"""Forward solvers of w = Φ(w, λ): frozen configuration, called as solver(fp_map, start, hparams).

Nothing here is differentiated: `implicit.fixed_point` attaches derivatives to the solution. With batch_dims=1 each
sample converges by itself and is not changed any more.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias, final

import torch
from torch import Tensor

from . import _torch, operators
from ._autodiff import Linearisation, taking_derivatives, users_autocast, without_autocast
from ._basis import Basis
from ._below import Call, Leaves, solved
from ._solution import OnFailure, Solution, Status
from ._tree import KIND, PyTree, flatten, matching, split
from ._vector import Space, Vector
from .solvers import GMRES, LinearSolver, check_options, solve


class Iterate:
    """w and Φ(w), with their residual and its norms, which are `unknown` (NaN) until `StoppingRule.measure`."""

    def __init__(self, w: Vector, image: Vector, unknown: Tensor):
        self.w, self.image = w, image
        self.norm = self.size = self.merit = unknown  # ‖Φ(w) − w‖, ‖Φ(w)‖, and what iterates are compared by

    @cached_property
    def residual(self) -> Vector:
        """r = Φ(w) − w."""
        return self.image - self.w

    def where(self, mask: Tensor, other: Iterate) -> Iterate:
        """This iterate for the samples where the mask holds, the other one elsewhere."""
        if mask.device.type == "cpu":
            if bool(mask.all()):
                return self
            if not bool(mask.any()):
                return other
        new = Iterate(self.w.where(mask, other.w), self.image.where(mask, other.image), self.norm)
        for name in ("norm", "size", "merit"):
            setattr(new, name, torch.where(mask, getattr(self, name), getattr(other, name)))
        return new


def _norms(at: Iterate) -> Sequence[Tensor]:
    """‖Φ(w) − w‖ and ‖Φ(w)‖ of each system, even if squares leave the range of the dtype."""
    space, vectors = at.w.space, (at.image - at.w, at.image)  # not at.residual, which would stay in memory
    norms = torch.stack([v.norm() for v in vectors])
    if space.uniform and norms.device.type == "cpu" and norms.numel():  # reading is free
        low, high = torch.aminmax(norms)
        if low.item() > space.tiny**0.25 and high.item() < space.tiny**-0.25:
            return norms.unbind()
    return [(v / scale).norm() * scale for v in vectors for scale in [v.scale()]]


Propose: TypeAlias = Callable[[Iterate], Vector]  # a method's step: the next w
Evaluate: TypeAlias = Callable[[Sequence[Tensor]], Sequence[Tensor]]  # Φ on the leaves of w


class StoppingRule:
    """‖Φ(w) − w‖ ≤ max(atol, rtol · ‖Φ(w)‖), which must not be met by growth of ‖Φ(w)‖ alone.

    ‖Φ(w)‖ counts at most as `limit`, a multiple of its value at the start. Beyond it (an extrapolation may throw w to
    1e16, where the residual rounds to 0), at least eps · ‖Φ(w)‖ counts as residual, multiplied by ‖Φ(w)‖ / limit.
    """

    def __init__(self, rtol: float, atol: float, eps: float, start: Iterate):
        self.rtol, self.atol, self.eps = rtol, atol, eps
        factor = min(max(10.0, 1e-3 / rtol), 1e6) if rtol else 1e6
        self.limit = factor * torch.maximum(*_norms(start))
        self.measure(start)

    def measure(self, at: Iterate) -> None:
        at.norm, at.size = _norms(at)
        at.merit = at.norm
        beyond = at.size > self.limit
        if beyond.device.type != "cpu" or bool(beyond.any()):
            counted = torch.maximum(at.norm, self.eps * at.size) * (at.size / self.limit)
            at.merit = torch.where(beyond, counted, at.norm)

    def unsolved(self, at: Iterate) -> Tensor:
        return ~(at.merit <= torch.clamp_min(self.rtol * torch.minimum(at.size, self.limit), self.atol))


class StallGuard:
    """Restarts a method at Φ(best) with some plain steps w ← Φ(w) if its residual has not fallen for a while.

    Near the kinks of a proximal step an accelerated method may wander and never converge; the plain iteration does not.
    The number of plain steps is the number of iterates that the method remembers, and doubles with each restart.
    """

    def __init__(self, memory: int, start: Iterate):
        self.patience, self.length, self.left = 10 + memory, memory, 0
        self.before = start.merit
        self.stalled = torch.zeros_like(start.merit, dtype=torch.bool)

    def next(self, propose: Propose, at: Iterate, best: Iterate, going: Tensor, step: int) -> Vector:
        """The next w. It reads from the device once every `patience` steps."""
        if self.left:
            self.left -= 1
        elif step and step % self.patience == 0:
            self.stalled, self.before = going & ~(best.merit < self.before), best.merit
            if bool(self.stalled.any()):
                self.left, self.length = self.length - 1, 2 * self.length
                at = best.where(self.stalled, at)
                return at.image.where(self.stalled, propose(at))
        new = propose(at)
        return at.image.where(self.stalled, new) if self.left else new


@dataclass(frozen=True, kw_only=True)
class FixedPointSolver(ABC):
    """What all forward solvers share: a step evaluates Φ once, and the solve ends when ‖Φ(w) − w‖ is small.

    Args:
        max_steps: the most steps (default: 200); exactly that many if neither rtol nor atol is given. The residual of
            the last w takes one evaluation more.
        rtol, atol: solved when ‖Φ(w) − w‖ ≤ max(atol, rtol · ‖Φ(w)‖), where ‖Φ(w)‖ counts at most as 1e-3 / rtol times
            (10 to 1e6 times) that of the start. With max_steps, rtol and atol all left out, rtol is 1e-6 in float64 and
            1e-4 in float32 (4 eps in half precision).
        batch_dims: 1 if the first axis of each leaf counts independent samples.
        on_failure: "warn" (HypergradientWarning), "raise" (SolverError) or "ignore", which reads nothing from the
            device if the number of steps is fixed.
        check_every: steps between two checks of the residual (default: 1 on the CPU, 5 elsewhere).
        trace: keep the residual norm of each sample at each step, [steps + 1, B]. Otherwise that of the worst sample is
            kept, [steps + 1], and without a tolerance only at steps 1, 2, 4, … and the last (NaN in between).

    Example:
        >>> for solver in (hg.fixed_points.Picard(rtol=1e-10), hg.fixed_points.Anderson(rtol=1e-10)):
        ...     solution = solver(lambda w: w.cos(), torch.tensor(1.0, dtype=torch.float64))
        ...     print(isinstance(solver, hg.fixed_points.FixedPointSolver), solution.value)
        True tensor(0.7391, dtype=torch.float64)
        True tensor(0.7391, dtype=torch.float64)
    """

    max_steps: int | None = None
    rtol: float | None = None
    atol: float | None = None
    batch_dims: int = 0
    on_failure: OnFailure = "warn"
    check_every: int | None = None
    trace: bool = False

    def __post_init__(self) -> None:
        check_options(self)

    @abstractmethod
    def _method(self, start: Vector, evaluate: Evaluate) -> Propose:
        """The method's step, a function that keeps what it remembers between steps."""

    @final
    def __call__(self, fp_map: Callable[..., PyTree], start: PyTree, hparams: PyTree = None) -> Solution:
        """Solve w = Φ(w, λ).

        Args:
            fp_map: Φ(params, hparams), or Φ(params) if hparams is None; its value is like params. It may itself call
                torch.autograd.grad (as the step of an energy model does).
            start: the first w, any pytree of floating point tensors.
            hparams: λ. Under torch.func.vmap all mapped tensors must be in start or hparams.

        Returns: a Solution with the best w that was met (without a tolerance, the last one), residual_norm ‖Φ(w) − w‖
            and rhs_norm ‖Φ(w)‖. Picard() returns Φ(w) for a w within the tolerance.
        Raises: ValueError if Φ changes structure, shape, dtype or device, or uses a mapped tensor that was not passed;
            SolverError under on_failure="raise".
        """
        return self.solve_below(fp_map, start, hparams)[0]

    def solve_below(
        self, fp_map: Callable[..., PyTree], start: PyTree, hparams: PyTree, batch_dims: int | None = None
    ) -> tuple[Solution, Solution]:
        """The Solution in tensors of the active torch.func transforms, and the same Solution in plain tensors."""
        leaves, paths, unflatten = flatten(start, "start")
        given, rebuild = split(hparams)

        @taking_derivatives
        def function(w: Leaves, h: Leaves) -> Sequence[Tensor]:
            tree = unflatten(w)
            value = fp_map(tree) if hparams is None else fp_map(tree, rebuild(h))
            return matching(value, paths, map(KIND, w), "the value of the fixed point map")

        call = Call(self._solve, function, unflatten, self.batch_dims if batch_dims is None else batch_dims)
        return solved(call, tuple(leaves), tuple(given))

    def _solve(self, start: PyTree, evaluate: Evaluate, batch_dims: int) -> Solution:
        space = Space(*flatten(start, "start"), batch_dims)

        def phi(w: Vector) -> Vector:
            with users_autocast():
                values = evaluate([leaf.detach() for leaf in w.leaves])
            return space.pack([leaf.detach() for leaf in values])

        with torch.no_grad(), without_autocast(space.device):
            w = space.vector(start, "start").copy()
            solution = self._run(phi, w, self._method(w, evaluate))
        solution.report(type(self).__name__, self.on_failure)
        return solution

    def _run(self, phi: Callable[[Vector], Vector], w: Vector, propose: Propose) -> Solution:
        space = w.space
        default = self.rtol is None and self.atol is None and self.max_steps is None
        fixed = self.rtol is None and self.atol is None and not default
        most = 200 if self.max_steps is None else self.max_steps
        every = self.check_every or (1 if space.device.type == "cpu" else 5)
        unknown = space.scalar(torch.nan)
        at = Iterate(w, phi(w), unknown)
        rule = StoppingRule(space.rtol if default else self.rtol or 0.0, self.atol or 0.0, space.eps, at)
        guard = None if isinstance(self, Picard) else StallGuard(getattr(self, "history", 5), at)
        best, going = at, rule.unsolved(at)
        first = before = at.merit  # before: the merit at the last power of two of steps, to detect growth
        trace, steps = [self._traced(at.norm)], 0
        while steps < most and (fixed or steps % every or bool(going.any())):
            before = before if steps & (steps - 1) else at.merit
            new = propose(at) if fixed or guard is None else guard.next(propose, at, best, going, steps)
            if not fixed and space.batch_dims and not (going.device.type == "cpu" and bool(going.all())):
                new = new.where(going, at.w)
            steps += 1
            at = Iterate(new, phi(new), unknown)
            if not fixed or self.trace or not steps & (steps - 1) or steps == most:
                rule.measure(at)
            trace.append(self._traced(at.norm))
            best = at if fixed else at.where(at.merit <= best.merit, best)  # NaN is never best
            going = going if fixed else going & rule.unsolved(at)
        failed = torch.zeros_like(best.norm, dtype=torch.bool) if fixed else rule.unsolved(best)
        code = torch.where(failed, Status.MAX_STEPS.value, (Status.COMPLETED if fixed else Status.CONVERGED).value)
        grown = (at.merit > first) & ((at.merit > before) | (at.size > rule.limit)) & (steps > 1)
        grown = grown & ~(at.merit <= 100 * space.eps * best.size)  # a change at rounding level is not growth
        code = torch.where(grown & (failed | fixed), Status.DIVERGED.value, code)
        finite = torch.isfinite(best.norm) & (torch.isfinite(at.norm) | ~failed)
        code = torch.where(finite, code, Status.NON_FINITE.value)
        plain = isinstance(self, Picard) and self.mixing == 1 and not fixed
        value = best.image.where(~failed, best.w) if plain else best.w
        return Solution(value.tree, code, steps, best.norm, best.size, torch.stack(trace), type(self).__name__)

    def _traced(self, norm: Tensor) -> Tensor:
        return norm.amax() if norm.ndim and norm.numel() and not self.trace else norm


@dataclass(frozen=True, kw_only=True)
class Picard(FixedPointSolver):
    """w ← (1 − τ) w + τ Φ(w): each step reduces the error by the contraction factor of Φ (for τ = 1).

    With mixing=1 and a tolerance the value is Φ(w), one step closer to the solution than w. residual_norm is that of w,
    which is an upper bound if Φ contracts.

    Args:
        mixing: τ in (0, 1]; 1 is the plain iteration.

    Cost: one evaluation a step; two vectors.

    Example:
        >>> Picard(rtol=1e-6)(lambda w: w.cos(), torch.tensor(1.0, dtype=torch.float64)).value
        tensor(0.7391, dtype=torch.float64)
    """

    mixing: float = 1.0

    def _method(self, start: Vector, evaluate: Evaluate) -> Propose:
        return lambda at: at.image if self.mixing == 1 else at.w + at.residual * self.mixing


@dataclass(frozen=True, kw_only=True)
class Anderson(FixedPointSolver):
    """Anderson acceleration: w ← Σᵢ αᵢ (wᵢ + β rᵢ) over the last m iterates, with Σα = 1 and minimal ‖Σᵢ αᵢ rᵢ‖.

    Args:
        history: m ≥ 1, the number of iterates remembered.
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

    def _method(self, start: Vector, evaluate: Evaluate) -> Propose:
        space, m = start.space, self.history
        proposals, residuals = Basis(start, m), Basis(start, m)  # residuals in units of the first one
        gram = torch.zeros(*space.batch_shape, m, m, dtype=torch.float64, device=space.device)
        # Residuals may be dependent to the last bit, so the Gram matrix needs some regularisation in its dtype.
        regularisation = max(self.regularisation, 1e2 * space.eps**2, 4 * torch.finfo(gram.dtype).eps)
        seen, unit = 0, None

        def propose(at: Iterate) -> Vector:
            nonlocal seen, unit
            unit = _unit(at.residual) if unit is None else unit
            slot, seen = seen % m, seen + 1
            count = min(seen, m)
            r = at.residual if isinstance(unit, float) else at.residual / unit
            residuals[slot] = r
            proposals[slot] = at.image if self.mixing == 1 else at.w + at.residual * self.mixing
            row = residuals.coefficients(r, count).double()
            gram[..., slot, :count] = row
            gram[..., :count, slot] = row
            alpha = _affine_least_squares(gram[..., :count, :count], regularisation).to(space.dtype)
            return proposals.combine(alpha)

        return propose


def _unit(r: Vector) -> float | Tensor:
    """A unit for each system (a power of two) in which squares of r and of later residuals are in the dtype's range."""
    unit = r.scale()
    if unit.device.type == "cpu" and bool(((unit > 2.0**-32) & (unit < 2.0**32)).all()):
        return 1.0
    return unit


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
        history: the number of rank-one updates kept. When it is reached, the method restarts from −I.

    Cost: one evaluation a step; 2 · history + 4 vectors.
    Source: Broyden 1965; Bai, Kolter and Koltun 2019, section 3.1.4.

    Example:
        >>> import torch, hypergrad as hg
        >>> hg.fixed_points.Broyden(rtol=1e-8)(torch.cos, torch.tensor(1.0, dtype=torch.float64)).value
        tensor(0.7391, dtype=torch.float64)
    """

    history: int = 20

    def _method(self, start: Vector, evaluate: Evaluate) -> Propose:
        us, vs = Basis(start, self.history), Basis(start, self.history)
        count = 0
        before: Iterate | None = None

        def product(left: Basis, right: Basis, x: Vector) -> Vector:
            """−x + Σᵢ leftᵢ rightᵢᵀ x: B x, or Bᵀ x with the two exchanged."""
            return left.combine(right.coefficients(x, count)) - x if count else -x

        def propose(at: Iterate) -> Vector:
            nonlocal count, before
            if before is not None:
                if count == self.history:
                    count = 0
                dw, dr = at.w - before.w, at.residual - before.residual
                size = dw.scale()  # u vᵀ does not depend on the unit of Δw and Δr
                dw, dr = dw / size, dr / size
                v = product(vs, us, dw)
                curvature = v.dot(dr)
                usable = curvature.abs() > start.space.eps * v.norm() * dr.norm()
                u = (dw - product(us, vs, dr)) * torch.where(usable, 1 / curvature, 0.0)
                us[count], vs[count] = u, v
                count += 1
            before = at
            return at.w - product(us, vs, at.residual)

        return propose


@dataclass(frozen=True, kw_only=True)
class Newton(FixedPointSolver):
    """Newton's method, matrix-free: (I − ∂₁Φ(w)) δ = Φ(w) − w, w ← w + δ.

    Args:
        solver: the linear solver for δ; a loose tolerance is enough far from the solution.

    Cost: a step evaluates Φ twice (once with its graph) and does the linear solver's products with I − ∂₁Φ.
    Source: Dembo, Eisenstat and Steihaug 1982 (inexact Newton).

    Example:
        >>> import torch, hypergrad as hg
        >>> hg.fixed_points.Newton(rtol=1e-8)(torch.cos, torch.tensor(1.0, dtype=torch.float64)).value
        tensor(0.7391, dtype=torch.float64)
    """

    solver: LinearSolver = field(default_factory=lambda: GMRES(rtol=1e-4, max_steps=100, on_failure="ignore"))

    def _method(self, start: Vector, evaluate: Evaluate) -> Propose:
        def propose(at: Iterate) -> Vector:
            leaves = [_torch.tracked(leaf.detach()) for leaf in at.w.leaves]
            with torch.enable_grad(), users_autocast():
                linearisation = Linearisation(evaluate(leaves), leaves, [])
            op = operators.adjoint(lambda: linearisation, fixed_point=True, batch_dims=start.space.batch_dims)
            return at.w + solve(self.solver, op.T, at.residual.copy(), None).value

        return propose
