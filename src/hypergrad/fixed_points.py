"""Forward solvers of w = Φ(w, λ), side by side: frozen configuration, called as solver(fp_map, start, hparams).

Nothing here is differentiated: `implicit.fixed_point` attaches derivatives to what comes out. With batch_dims=1 each
sample converges by itself and then rests.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

from . import _torch, operators
from ._autodiff import Linearisation
from ._basis import Basis
from ._solution import OnFailure, Solution, Status
from ._tree import PyTree, flatten, matching, split
from ._vector import Space, Vector
from .solvers import GMRES, LinearSolver, solve
from .solvers._solver import check_options


class NotPassed(ValueError):
    """fp_map uses a tensor of a transform of torch.func that it was not given."""

    def __init__(self) -> None:
        super().__init__("fp_map uses a tensor that a transform outside (vmap, ...) maps: pass it in hparams")


class Iterate:
    """w with Φ(w), and what is taken of them when it is first asked for; norms are NaN until they are measured."""

    def __init__(self, w: Vector, image: Vector):
        self.w, self.image = w, image
        self.norm = self.size = self.merit = w.space.scalar(torch.nan)  # ‖Φ(w) − w‖, ‖Φ(w)‖, what is compared

    @cached_property
    def residual(self) -> Vector:
        """r = Φ(w) − w."""
        return self.image - self.w

    def measure(self) -> Iterate:
        self.norm, self.size = _norm(self.residual), _norm(self.image)
        self.merit = self.norm
        return self

    def where(self, mask: Tensor, other: Iterate) -> Iterate:
        """This one for the samples where the mask holds, the other elsewhere."""
        if not mask.ndim and mask.device.type == "cpu":
            return self if bool(mask) else other
        new = Iterate(self.w.where(mask, other.w), self.image.where(mask, other.image))
        for name in ("norm", "size", "merit"):
            setattr(new, name, torch.where(mask, getattr(self, name), getattr(other, name)))
        return new


def _norm(v: Vector) -> Tensor:
    """‖v‖ of each system, also where squares leave the range of the dtype."""
    space, squared = v.space, v.dot(v)
    if space.uniform and space.device.type == "cpu":  # where looking is free
        if bool(((squared > space.tiny**0.5) & (squared < space.tiny**-0.5)).all()):
            return squared.sqrt()
    scale = v.scale()
    return (v / scale).norm() * scale


Propose: TypeAlias = Callable[[Iterate], Vector]  # what a method makes the next w of
Evaluate: TypeAlias = Callable[[Sequence[Tensor]], Sequence[Tensor]]  # Φ on the leaves of w


class Goal:
    """The tolerance: ‖Φ(w) − w‖ ≤ max(atol, rtol · ‖Φ(w)‖), where growth of ‖Φ(w)‖ alone is no convergence.

    ‖Φ(w)‖ counts at most as `limit`, a multiple of what the start had. Of a w beyond it (an extrapolation may throw one
    to 1e16, where the residual rounds to 0) the residual counts as no smaller than its rounding, and in proportion more.
    """

    def __init__(self, rtol: float, atol: float, eps: float, start: Iterate):
        self.rtol, self.atol, self.eps = rtol, atol, eps
        factor = min(max(10.0, 1e-3 / rtol), 1e6) if rtol else 1e6
        self.limit = factor * torch.maximum(start.norm, start.size)

    def measure(self, at: Iterate) -> None:
        at.measure()
        counted = torch.maximum(at.norm, self.eps * at.size) * (at.size / self.limit)
        at.merit = torch.where(at.size > self.limit, counted, at.norm)

    def unsolved(self, at: Iterate) -> Tensor:
        return ~(at.merit <= torch.clamp_min(self.rtol * torch.minimum(at.size, self.limit), self.atol))


class Guard:
    """Back to Φ(best) where the residual has not fallen for `patience` steps, and on from there by plain steps.

    An accelerated method may wander off for good where Φ is no contraction (around the kinks of a proximal step); the
    plain iteration does not. The plain steps are as many as the method remembers iterates, twice as many the next time.
    """

    def __init__(self, patience: int, memory: int, start: Iterate):
        self.patience = patience
        self.waited = torch.zeros_like(start.norm, dtype=torch.long)
        self.plain = torch.zeros_like(self.waited)  # plain steps left
        self.length = torch.full_like(self.waited, memory)
        self.active = False

    def next(self, propose: Propose, at: Iterate, best: Iterate, looks: bool) -> Vector:
        """The next w; read from the device where it looks."""
        self.waited = torch.where(at.merit <= best.merit, 0, self.waited + 1)
        self.plain = torch.clamp_min(self.plain - 1, 0)
        if looks:
            stalled = (self.waited > self.patience) & (self.plain == 0)
            self.active = bool((stalled | (self.plain > 0)).any())
            self.plain = torch.where(stalled, self.length, self.plain)
            self.length = torch.where(stalled, 2 * self.length, self.length)
            self.waited = torch.where(stalled, 0, self.waited)
            if self.active:
                at = best.where(stalled, at)
        new = propose(at)
        return at.image.where(self.plain > 0, new) if self.active else new


@dataclass(frozen=True, kw_only=True)
class FixedPointSolver(ABC):
    """What all forward solvers share. A step evaluates Φ once, at w, and is done when ‖Φ(w) − w‖ is small.

    Args:
        max_steps: steps at most; exactly that many where neither rtol nor atol is given. The residual of the last w
            takes one evaluation more.
        rtol, atol: solved when ‖Φ(w) − w‖ ≤ max(atol, rtol · ‖Φ(w)‖), where ‖Φ(w)‖ counts at most as 1e-3 / rtol times
            (10 to 1e6 times) that of the start. With max_steps, rtol and atol all left out, rtol is 1e-6 in float64 and
            1e-4 in float32 (4 eps in half precision), and max_steps 200.
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
        check_options(self, numbers=("rtol", "atol"), integers={"max_steps": 0, "check_every": 1})

    @property
    def _patience(self) -> tuple[int, int] | None:
        """Steps without a fall of the residual that the method may take, and plain steps that make it forget."""
        return 10, 5

    @property
    def _is_plain(self) -> bool:
        """Whether the next w is Φ(w), which is then the value of a solve to a tolerance."""
        return False

    @abstractmethod
    def _method(self, start: Vector, evaluate: Evaluate) -> Propose:
        """The method's step, with what it remembers between steps."""

    @final
    def __call__(self, fp_map: Callable[..., PyTree], start: PyTree, hparams: PyTree = None) -> Solution:
        """Solve w = Φ(w, λ).

        Args:
            fp_map: Φ(params, hparams), or Φ(params) where hparams is None; of params' structure and shapes. It may call
                torch.autograd.grad itself (the step of an energy model).
            start: the first w, any pytree of floating point tensors.
            hparams: λ. Under torch.func.vmap all that is mapped must be in start or hparams; all entries are one solve.

        Returns: Solution whose value is w in start's structure, with residual_norm ‖Φ(w) − w‖ and rhs_norm ‖Φ(w)‖. With
            a tolerance it is the best w met; without one the last. Picard() returns Φ(w) for a w within the tolerance.
        Raises: ValueError where Φ changes structure, shape, dtype or device, and for a mapped tensor that was not
            passed; SolverError under on_failure="raise".
        """
        return solved(self, fp_map, start, hparams)[0]

    def _run(self, phi: Callable[[Vector], Vector], w: Vector, propose: Propose) -> Solution:
        space = w.space
        default = self.rtol is None and self.atol is None and self.max_steps is None
        fixed = self.rtol is None and self.atol is None and not default
        most = 200 if self.max_steps is None else self.max_steps
        every = self.check_every or (1 if space.device.type == "cpu" else 5)
        at = Iterate(w, phi(w)).measure()
        goal = Goal(space.rtol if default else self.rtol or 0.0, self.atol or 0.0, space.eps, at)
        best, going, guard = at, goal.unsolved(at), Guard(*self._patience, at) if self._patience else None
        first = before = at.norm  # before: at the last power of two, to see growth by
        trace, steps = [self._traced(at.norm)], 0
        while steps < most and (fixed or steps % every or bool(going.any())):
            before = before if steps & (steps - 1) else at.norm
            new = propose(at) if fixed or guard is None else guard.next(propose, at, best, steps % every == 0)
            new = new if fixed or not self.batch_dims else new.where(going, at.w)
            steps += 1
            at = Iterate(new, phi(new))
            if not fixed or self.trace or not steps & (steps - 1) or steps == most:
                goal.measure(at)
            trace.append(self._traced(at.norm))
            best = at if fixed else at.where(at.merit < best.merit, best)  # what is not finite never wins
            going = going & goal.unsolved(at)
        failed = torch.zeros_like(best.norm, dtype=torch.bool) if fixed else goal.unsolved(best)
        code = torch.where(failed, Status.MAX_STEPS.value, (Status.COMPLETED if fixed else Status.CONVERGED).value)
        grown = (at.norm > first) & (at.norm > before) & (steps > 1)
        grown = grown & ~(at.norm <= 100 * space.eps * best.size)  # at rounding level nothing is growth
        code = torch.where(grown & (failed | fixed), Status.DIVERGED.value, code)
        finite = torch.isfinite(best.norm) & (torch.isfinite(at.norm) | ~failed)
        code = torch.where(finite, code, Status.NON_FINITE.value)
        value = best.image.where(~failed, best.w) if self._is_plain and not fixed else best.w
        return Solution(value.tree, code, steps, best.norm, best.size, torch.stack(trace), type(self).__name__)

    def _traced(self, norm: Tensor) -> Tensor:
        return norm.amax() if norm.ndim and norm.numel() and not self.trace else norm


# --- one solve, on tensors alone ---


Leaves: TypeAlias = "tuple[Tensor, ...]"


@dataclass(frozen=True)
class Call:
    """A solve on the leaves of start and the tensors of hparams.

    Args:
        function: (w, λ) ↦ Φ(w, λ), on leaves.
        unflatten: makes a tree of the leaves of w.
        below: whether it runs below all transforms of torch.func.
    """

    solver: FixedPointSolver
    function: Callable[[Leaves, Leaves], Sequence[Tensor]]
    unflatten: Callable[..., PyTree]
    below: bool = False

    def vmapped(self, dims: Sequence[int | None]) -> Call:
        """The same over one more leading axis of w, and of those tensors of λ whose entry in dims is 0."""
        function = torch.func.vmap(self.function, in_dims=(0, tuple(dims)))
        return replace(self, solver=replace(self.solver, batch_dims=self.solver.batch_dims + 1), function=function)

    def evaluate(self, w: Sequence[Tensor], hparams: Leaves) -> Sequence[Tensor]:
        try:
            values = self.function(tuple(w), hparams)
        except RuntimeError as error:
            if _torch.is_of_ended_transform(error):
                raise NotPassed from error
            raise
        if any(map(_torch.is_wrapped if self.below else _torch.mapped_levels, values)):
            raise NotPassed
        return values

    def run(self, start: Sequence[Tensor], hparams: Leaves) -> Solution:
        """The solution; a failure is reported."""
        space = Space(self.unflatten(start), "start", self.solver.batch_dims)

        def phi(w: Vector) -> Vector:
            return space.pack([leaf.detach() for leaf in self.evaluate([leaf.detach() for leaf in w.leaves], hparams)])

        with torch.no_grad():
            w = space.pack([leaf.detach() for leaf in start]).copy()
            solution = self.solver._run(phi, w, self.solver._method(w, lambda leaves: self.evaluate(leaves, hparams)))
        solution.report(type(self.solver).__name__, self.solver.on_failure)
        return solution


class _Below(torch.autograd.Function):
    """A solve on plain tensors, whatever transforms are on, and for a vmap one solve: (call, keep, count, *w, *λ)."""

    @staticmethod
    def forward(call: Call, keep: Callable[[Solution], None], count: int, *tensors: Tensor) -> Leaves:
        solution = call.run(tensors[:count], tensors[count:])
        keep(solution)
        leaves = split(solution.value)[0]
        return (*leaves, solution.code, solution.residual_norm, solution.rhs_norm, solution.trace)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Leaves) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], call: Call, keep: Any, count: int, *tensors: Tensor) -> Any:
        lead, dims = lead_axes(info.batch_size, tensors, in_dims[3:], count)
        outputs = _Below.apply(call.vmapped(dims), keep, count, *lead)
        return outputs, (*[0] * (count + 3), 1 if call.solver.trace else None)


def lead_axes(
    size: int, tensors: Sequence[Tensor], dims: Sequence[int | None], all_mapped: int
) -> tuple[list[Tensor], list[int | None]]:
    """Tensors with the mapped axis in front, the first `all_mapped` of them in any case; and 0 or None for the rest."""
    lead = [t if dim is None else t.movedim(dim, 0) for t, dim in zip(tensors, dims, strict=True)]
    for i in range(all_mapped):
        if dims[i] is None:
            lead[i] = lead[i].expand(size, *lead[i].shape)
    return lead, [None if dim is None else 0 for dim in dims[all_mapped:]]


def solved(
    solver: FixedPointSolver, fp_map: Callable[..., PyTree], start: PyTree, hparams: PyTree = None
) -> tuple[Solution, Solution]:
    """The Solution in terms of the transforms of torch.func that are on, and the same on plain tensors."""
    leaves, paths, unflatten = flatten(start, "start")
    given, rebuild = split(hparams)

    def function(w: Leaves, h: Leaves) -> Sequence[Tensor]:
        tree = unflatten(w)
        value = fp_map(tree) if hparams is None else fp_map(tree, rebuild(h))
        return matching(value, paths, w, "the value of the fixed point map")

    call, count = Call(solver, _torch.taking_derivatives(function), unflatten), len(leaves)
    if not _torch.transforms_active():
        return (solution := call.run(leaves, tuple(given))), solution
    tensors, kept = [x.detach() for x in (*leaves, *given)], []
    try:
        with torch.no_grad():
            *value, code, residual_norm, rhs_norm, trace = _Below.apply(
                replace(call, below=True), kept.append, count, *tensors
            )
    except NotPassed:
        if any(map(_torch.mapped_levels, tensors)):
            raise
        # What no vmap maps can be computed with where it is.
        solution = _plain(call.run(leaves, tuple(given)))
        return solution, solution
    plain = kept[0]
    return Solution(unflatten(value), code, plain.steps, residual_norm, rhs_norm, trace, plain.method), plain


def _plain(solution: Solution) -> Solution:
    """Without the wrappers of transforms, from which older torch reads no numbers."""
    tensors, rebuild = split([getattr(solution, part.name) for part in fields(solution)])
    return Solution(*rebuild(map(_torch.unwrapped, tensors)))


# --- the methods ---


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
