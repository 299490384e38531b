"""What all linear solvers share: their options, the scaled system that they work on, and the check of their result."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeAlias, TypeGuard, final

import torch
from torch import Tensor

from .._autodiff import without_autocast
from .._solution import OnFailure, Solution, Status
from .._vector import FREE_TO_READ, Scalar, Vector, anywhere, larger, norm, read, squares_are_exact, where
from ..operators import LinearOperator
from ._theory import Structure

# A solver is a callable (op, b, x0) → Solution; a plain function may return x alone.
Solver: TypeAlias = Callable[..., Any]


@dataclass
class System:
    """A x = b as an iteration works on it: A with damping, b scaled to a norm near 1, and the limits as numbers."""

    op: LinearOperator
    b: Vector
    x0: Vector | None
    max_steps: int
    stop: Scalar  # a system is frozen once ‖r‖ ≤ stop: just below the tolerance or, without one, rounding level
    goal: Scalar | None  # the tolerance for ‖r‖; None runs max_steps without reading a residual
    check_every: int
    rhs_norm: Scalar  # ‖b‖ in scaled units
    scale: Scalar  # power of two: the user's units are scaled units times scale
    precondition: Callable[[Vector], Vector] | None = None  # built from op once, even if the iteration restarts
    residual: Vector | None = None  # b − A x0 if known

    def __post_init__(self) -> None:
        space, checks = self.b.space, self.goal is not None and self.check_every == 1
        self.reads = not space.batch_dims and (checks or space.device.type in FREE_TO_READ)
        self.stop, self.goal, self.rhs_norm = map(self.number, (self.stop, self.goal, self.rhs_norm))

    def start(self) -> tuple[Vector, Vector]:
        """Copies of x and r = b − A x; this takes no product without an x0."""
        if self.x0 is None:
            return self.b.zeros(), self.b.copy()
        return self.x0.copy(), self.b - self.op(self.x0) if self.residual is None else self.residual.copy()

    def size(self, x: Vector, r: Vector) -> Tensor:
        """‖Ax‖ / ‖x‖ for the start x, a scale for the rounding of later products; 0 without x0."""
        return self.b.space.scalar(0.0) if self.x0 is None else divide((self.b - r).norm(), x.norm())

    def finished(self, step: int, going: Tensor | bool) -> bool:
        """Whether all systems are frozen: read from the device every check_every steps, never without a tolerance."""
        return self.goal is not None and step % self.check_every == 0 and not anywhere(going)

    def number(self, scalar: Any) -> Scalar:
        """The scalar as a Python number if there is one system and reading is free or done anyway; else unchanged."""
        return scalar.item() if self.reads and isinstance(scalar, Tensor) else scalar


def divide(a: Tensor | float, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0, so that no step is taken along a direction that has vanished."""
    return torch.where(b == 0, 0.0, a / b)


def event(code: Scalar | None, happened: Scalar, status: Status) -> Scalar:
    """Record a status for the systems where it happened, unless another was recorded before."""
    if not isinstance(happened, Tensor) and not happened:
        return code
    code = 0 if code is None else code
    return where(happened & (code == 0), status.value, code)


@dataclass
class Outcome:
    """The result of an iteration, in scaled units, before its residual is recomputed."""

    x: Vector
    trace: Tensor | list[Any]  # ‖r‖ by the recursion before each step and, if known, at the end: [steps (+ 1)(, B)]
    steps: int
    code: Scalar | None = None  # Status values of failures during the iteration; 0 for none
    method: str = ""  # the method, if the solver chose one
    curvature: Scalar | None = None  # the least xᵀAx / xᵀx that was met, if the method computes it
    steepest: Scalar | None = None  # the largest one

    def __post_init__(self) -> None:
        if isinstance(self.trace, list) and self.trace and isinstance(self.trace[0], Tensor):
            self.trace = torch.stack(self.trace)


@dataclass(frozen=True, kw_only=True)
class LinearSolver(ABC):
    """Options of a solver for (A + damping · I) x = b, called as solver(op, b, x0=None) → Solution.

    Args:
        rtol, atol: the system is solved when ‖b − Ax‖ ≤ max(atol, rtol · ‖b‖). With neither given, the method does all
            its steps and ends as COMPLETED.
        damping: γ ≥ 0, added to the diagonal; residuals are those of the damped system.
        on_failure: "warn" (HypergradientWarning), "raise" (SolverError) or "ignore", which does not read the status
            from the device. With a fixed number of steps, nothing at all is read then, except by `Dense`.

    Example:
        >>> op = hg.operators.matrix(torch.diag(torch.tensor([1.0, 4.0])), symmetric=True)
        >>> for solver in (hg.solvers.CG(rtol=1e-6), hg.solvers.CG(rtol=1e-6, damping=1.0), hg.solvers.Dense()):
        ...     print(isinstance(solver, hg.solvers.LinearSolver), solver(op, torch.ones(2)).value)
        True tensor([1.0000, 0.2500])
        True tensor([0.5000, 0.2000])
        True tensor([1.0000, 0.2500])
    """

    rtol: float | None = None
    atol: float | None = None
    damping: float = 0.0
    on_failure: OnFailure = "warn"

    def __post_init__(self) -> None:
        check_options(self)

    @final
    def __call__(self, op: LinearOperator, b: Any, x0: Any = None) -> Solution:
        """Solve for x.

        Args:
            op: the operator A.
            b: right hand side: a Vector or a pytree of tensors (each [B, ...] with batch_dims=1).
            x0: a start like b, or a `Recycled`; None starts from zero.

        Returns: a Solution whose value has b's structure. A method that finds that it does not apply
            (NOT_POSITIVE_DEFINITE, NOT_SYMMETRIC, BREAKDOWN) returns its last valid iterate, or x = 0 if that has the
            smaller residual.
        Raises: TypeError or ValueError for an x0 unlike b, or an operator that this solver cannot take; SolverError
            with on_failure="raise".
        Cost: the method's products and one more, for the true residual.
        """
        vector = b if isinstance(b, Vector) else Vector.of(b, "b", op.batch_dims)
        solution = solve(self, op, vector.copy(), x0)
        solution = solution if isinstance(b, Vector) else replace(solution, value=solution.value.tree)
        solution.report(type(self).__name__, self.on_failure)
        return solution

    _runs_to_tolerance: ClassVar[bool] = True  # False for an approximation, which needs no tolerance to succeed
    _needs_symmetric: ClassVar[bool] = False

    def valid_for(self, structure: Structure) -> str | None:
        """Why this method does not apply to a system of this structure (damping included); None if it does apply."""
        return "A is not symmetric" if self._needs_symmetric and not structure.symmetric else None

    def products_needed(self, structure: Structure, rtol: float = 1e-6) -> float | None:
        """An upper bound from theory on the products with A and Aᵀ, if the method is valid; None if none is known.

        Bounds are often far from sharp: a clustered spectrum needs fewer products, and with rounding it may take more.
        rtol refers to the error or to the residual, whichever the method's bound is about.
        """
        return None

    @abstractmethod
    def _iterate(self, system: System) -> Outcome:
        """Run the method. The caller recomputes the residual afterwards."""


@dataclass(frozen=True, kw_only=True)
class IterativeSolver(LinearSolver):
    """A solver that iterates.

    Args:
        max_steps: the number of steps if neither rtol nor atol is given, else an upper limit (default: 10 n, at most
            1,000). If max_steps, rtol and atol are all left out, rtol is 1e-6 in float64 and 1e-4 in float32 (4 eps in
            half precision).
        check_every: steps between two reads of the residual, each a device synchronisation (default: 1 on the CPU,
            where reading is free, 5 elsewhere). Without a tolerance it is never read.

    Example:
        >>> op = hg.operators.matrix(torch.diag(torch.tensor([1.0, 4.0])), symmetric=True)
        >>> for solver in (hg.solvers.CG(max_steps=1), hg.solvers.CG(rtol=1e-4)):
        ...     solution = solver(op, torch.ones(2))
        ...     print(solution.status.name, solution.steps)
        COMPLETED 1
        CONVERGED 2
    """

    max_steps: int | None = None
    check_every: int | None = None

    @property
    def fixed_steps(self) -> bool:
        """Whether it does exactly max_steps."""
        return self.max_steps is not None and self.rtol is None and self.atol is None


def _integer(least: int) -> tuple[Callable[[Any], bool], str]:
    return lambda value: isinstance(value, int) and value >= least, f"an integer ≥ {least}"


# What an option must satisfy in any solver that has it; None is always allowed.
LIMITS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("rtol", "atol", "damping", "regularisation"), (lambda x: 0 <= x < math.inf, "a finite number ≥ 0")
    ),
    "step_size": (lambda x: 0 < x < math.inf, "a finite number > 0"),
    "mixing": (lambda x: 0 < x <= 1, "in (0, 1]"),
    "max_steps": _integer(0),
    **dict.fromkeys(("check_every", "restart", "rank", "history"), _integer(1)),
    "seed": (lambda x: isinstance(x, int), "an integer"),
    "on_failure": (lambda x: x in ("warn", "raise", "ignore"), '"warn", "raise" or "ignore"'),
}


def check_options(solver: Any) -> None:
    """Raise ValueError for an option of a solver that is out of range."""
    for name, value in vars(solver).items():
        valid, what = LIMITS.get(name, (None, ""))
        if valid is not None and value is not None and not valid(value):
            raise ValueError(f"{type(solver).__name__}: {name} must be {what}, got {value!r}")


def on_failure_of(solver: Solver) -> OnFailure:
    """The solver's on_failure; "warn" for a plain function."""
    return solver.on_failure if isinstance(solver, LinearSolver) else "warn"


def keeps_starts(x0: Any) -> TypeGuard[Any]:
    """Whether x0 is an object that provides a start for each system and keeps its solution, as `Recycled` does."""
    return callable(getattr(x0, "keep", None)) and not isinstance(x0, type)


def require_symmetric(op: LinearOperator, name: str) -> None:
    if not op.symmetric:
        raise TypeError(
            f"{name} needs a symmetric operator: if this one is symmetric, declare it so (symmetric=True); if not, use "
            f"GMRES, BiCGStab, NormalCG or LSQR"
        )


def solve(
    solver: Solver, op: LinearOperator, b: Vector, x0: Any, last_product: Callable[[Vector], Vector] | None = None
) -> Solution:
    """Run a solver and recompute its residual, without warnings. b is overwritten.

    last_product: v ↦ A v, for a caller that needs that product anyway. It replaces the product for the residual; the
    iteration is then not restarted if its own residual was too optimistic.
    """
    with torch.set_grad_enabled(False), without_autocast(b.space.device):
        ready = x0 is None or isinstance(x0, Vector) or keeps_starts(x0)
        start: Any = x0 if ready else b.space.vector(x0, "x0")
        run: Any = _run if isinstance(solver, LinearSolver) else _run_function
        solution = run(solver, op, b, start, last_product)
        if keeps_starts(start):
            start.keep(solution.value)
        return solution


def _run(solver: LinearSolver, op: LinearOperator, b: Vector, start: Any, last_product: Any) -> Solution:
    if solver._needs_symmetric:
        require_symmetric(op, type(solver).__name__)
    op, space = op.damped(solver.damping), b.space
    empty, residual = not space.length or 0 in space.batch_shape, None
    if keeps_starts(start):
        start, residual = (None if empty else start.start(op, b)) or (None, None)
    scale, rhs_norm = _scaled(b)
    system = _system(solver, op, b, None if start is None else start / scale, scale, rhs_norm)
    system.residual = None if residual is None else residual / scale
    outcome = Outcome(b, space.scalar(0.0)[None], 0) if empty else solver._iterate(system)
    outcome, x, residual, code = _verified(solver, system, outcome, last_product)
    trace: Any = outcome.trace
    return Solution(  # which turns numbers into tensors on access
        x,
        code,  # pyright: ignore[reportArgumentType]
        _steps(outcome, system),
        residual * scale,
        system.rhs_norm * scale,
        trace if isinstance(scale, float) and scale == 1 else space.tensor(trace) * scale,
        outcome.method or type(solver).__name__,
        None if outcome.curvature is None else outcome.curvature - solver.damping,
    )


def _verified(
    solver: LinearSolver, system: System, outcome: Outcome, last_product: Any
) -> tuple[Outcome, Vector, Scalar, Scalar]:
    """The outcome, x in the user's units, its true residual and the Status value.

    If the residual of the recursion was too optimistic, the iteration is restarted from x, up to twice.
    """
    for refinements_left in (2, 1, 0):
        if len(outcome.trace) > outcome.steps:
            _zero_if_worse(outcome, outcome.trace[-1], system)
        x = outcome.x.scale_(system.scale)
        image = system.op(x) if last_product is None else last_product(x)
        if last_product is not None and solver.damping:
            image = image + x * solver.damping
        left = system.max_steps - outcome.steps
        last = last_product is not None or system.goal is None or not refinements_left or left <= 0
        r = (system.b if last else system.b.copy()).add_(image, 1 / system.scale, -1.0)
        residual = norm(r, system.number)
        if len(outcome.trace) == outcome.steps:
            if isinstance(outcome.trace, list) and not isinstance(residual, Tensor):
                outcome.trace.append(residual)
            else:
                outcome.trace = torch.cat([r.space.tensor(outcome.trace), r.space.tensor(residual)[None]])
        if last_product is None:
            residual = _zero_if_worse(outcome, residual, system)
            x = outcome.x
        code = _judge(outcome, residual, system)
        if last:
            break
        again = code == Status.STAGNATED.value
        if outcome.code is not None:
            again = again & (outcome.code == 0)
        if not anywhere(again):
            break
        system.x0, system.residual = x / system.scale, None
        rest = replace(system, max_steps=left, stop=where(again, system.stop, torch.inf))
        outcome = continued(outcome, solver._iterate(rest), again)
    return outcome, x, residual, code


def _zero_if_worse(outcome: Outcome, residual: Scalar, system: System) -> Scalar:
    """Replace x by 0 if the method failed and the residual is no smaller than ‖b‖; return the resulting residual."""
    if outcome.code is None:
        return residual
    residual = system.number(residual)
    worse = (residual >= system.rhs_norm) & (residual < math.inf)
    # A DIVERGED iterate is kept: a diverging stationary iteration returns what was asked for.
    rejected = (system.number(outcome.code) > Status.DIVERGED.value) & worse
    if isinstance(rejected, Tensor):
        outcome.x = outcome.x.zeros().where(rejected, outcome.x)
    elif rejected:
        outcome.x = outcome.x.zeros()
    outcome.trace[-1] = where(rejected, system.rhs_norm, outcome.trace[-1])
    return where(rejected, system.rhs_norm, residual)


def _scaled(b: Vector) -> tuple[Scalar, Scalar]:
    """Divide b by a power of two, so that ‖b‖ is near 1 (or 0), and return that power and ‖b‖."""
    norm2 = read(b.dot(b))
    if isinstance(norm2, Tensor) or not squares_are_exact(norm2, b.space):
        scale = b.scale(read)
        return scale, norm(b.scale_(1 / scale))
    # No scaling if squares of residuals, and of Aᵀr, neither underflow nor overflow.
    near = b.space.tiny ** (1 / 6) <= norm2 <= b.space.tiny ** (-1 / 6)
    scale = 1.0 if near else 2.0 ** round(math.log2(norm2) / 2)
    b.scale_(1 / scale)
    return scale, math.sqrt(norm2) / scale


def _system(
    solver: LinearSolver, op: LinearOperator, b: Vector, x0: Vector | None, scale: Scalar, norm: Scalar
) -> System:
    rtol, atol = solver.rtol, solver.atol
    max_steps, every = (getattr(solver, name, None) for name in ("max_steps", "check_every"))
    if rtol is None and atol is None and max_steps is None and solver._runs_to_tolerance:
        rtol = b.space.rtol
    stop, goal = b.space.eps * norm, None
    if rtol is not None or atol is not None:
        goal = larger((rtol or 0.0) * norm, (atol or 0.0) / scale)
        # A margin for rounding between the recursion's residual and the true one.
        stop = larger(stop, 0.9 * goal)
    if x0 is not None:
        x0 = x0 * where(norm != 0, 1.0, 0.0)  # for b = 0, no iteration from another start reaches x = 0 exactly
    if max_steps is None:
        max_steps = min(10 * b.space.length, 1000)
    every = every or (1 if b.space.device.type in FREE_TO_READ else 5)
    return System(op, b, x0, max_steps, stop, goal, every, norm, scale)


def _judge(outcome: Outcome, residual: Scalar, system: System) -> Scalar:
    """The Status values that follow from the true residual and from recorded events; reads only where that is free."""
    own = system.number(outcome.trace[-1])
    code = 0 if outcome.code is None else system.number(outcome.code)
    if system.goal is None:  # a residual at rounding level counts as solved, and STAGNATED is no failure
        ended = done = Status.COMPLETED.value
        goal = system.b.space.eps**0.75 * system.rhs_norm
        code = where(code == Status.STAGNATED.value, 0, code)
    else:
        ended = where(own <= system.stop, Status.STAGNATED.value, Status.MAX_STEPS.value)
        done, goal = Status.CONVERGED.value, system.goal
    solved = residual <= goal
    known = isinstance(solved, Tensor) and system.goal is not None and solved.device.type in FREE_TO_READ
    if known and bool((solved & (residual < math.inf)).all()):
        return torch.full_like(residual, done, dtype=torch.long)
    worse_than_none = (residual >= system.rhs_norm) & (system.rhs_norm > 0)
    ended = where(worse_than_none, Status.DIVERGED.value, ended)
    code = where(solved, done, where(code > 0, code, ended))
    return where((residual < math.inf) & ((own < math.inf) | solved), code, Status.NON_FINITE.value)


def continued(first: Outcome, second: Outcome, again: Scalar) -> Outcome:
    """The outcome of two consecutive iterations, of which the second continued only the systems in `again`."""
    code = where(again, 0 if second.code is None else second.code, 0 if first.code is None else first.code)
    before, after = map(first.x.space.tensor, (first.trace, second.trace))
    # Frozen systems keep their last norm, because rounding may take a recomputed one above the limit.
    trace = torch.cat([before, where(again, after[1:], before[-1])])
    curvature = first.curvature if second.curvature is None else second.curvature
    return Outcome(second.x, trace, first.steps + second.steps, code, second.method, curvature)


def _steps(outcome: Outcome, system: System) -> int | Tensor:
    """The steps done; with a tolerance and batched systems, the steps of each system before it was frozen."""
    if isinstance(outcome.trace, list) or outcome.trace.ndim == 1:
        return outcome.steps
    if system.goal is None:
        return torch.full(system.b.space.batch_shape, outcome.steps, device=outcome.trace.device)
    return (~(outcome.trace[:-1] <= system.stop)).sum(0)


def _run_function(function: Solver, op: LinearOperator, b: Vector, start: Any, last_product: Any) -> Solution:
    """Run a user's plain function, which may write into its arguments, and compute the true residual of its result."""
    before = op.products
    if keeps_starts(start):
        start = (start.start(op, b) or (None,))[0]
    result = function(op.copying(), b.copy(), start if start is None else start.copy())
    value = result.value if isinstance(result, Solution) else result
    tree = value.tree if isinstance(value, Vector) else value
    own = isinstance(value, Vector) and value.space is b.space
    x = value if own else b.space.vector(tree, "the solver's result")
    residual, rhs_norm = (b - (last_product or op)(x)).norm(), b.norm()
    if isinstance(result, Solution):
        code, steps, trace = result.code, result.steps, result.trace
    else:
        worse_than_none = (residual >= rhs_norm) & (rhs_norm > 0)
        code = torch.where(worse_than_none, Status.DIVERGED.value, Status.COMPLETED.value)
        steps, trace = op.products - before, torch.stack([residual])
    code = torch.where(torch.isfinite(residual), code, Status.NON_FINITE.value)
    return Solution(x, code, steps, residual, rhs_norm, trace, getattr(function, "__name__", type(function).__name__))
