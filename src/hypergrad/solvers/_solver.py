"""What all linear solvers share: their configuration, the system they see, and the check of their answer."""

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

# A solver is anything of this form; a plain function may return the bare value.
Solver: TypeAlias = Callable[..., Any]


@dataclass
class System:
    """A x = b as an iteration sees it: damped operator, right hand side scaled near 1, limits resolved."""

    op: LinearOperator
    b: Vector
    x0: Vector | None
    max_steps: int
    stop: Scalar  # a system is frozen once ‖r‖ ≤ stop: the tolerance or, without one, rounding level
    goal: Scalar | None  # the tolerance itself; None runs max_steps without reading a residual
    check_every: int
    rhs_norm: Scalar  # ‖b‖ in scaled units
    scale: Scalar  # power of two that one scaled unit is worth in the user's units
    precondition: Callable[[Vector], Vector] | None = None  # built from op once, however often the iteration restarts
    residual: Vector | None = None  # b − A x0 where it is known

    def __post_init__(self) -> None:
        space, checks = self.b.space, self.goal is not None and self.check_every == 1
        self.reads = not space.batch_dims and (checks or space.device.type in FREE_TO_READ)
        self.stop, self.goal, self.rhs_norm = map(self.number, (self.stop, self.goal, self.rhs_norm))

    def start(self) -> tuple[Vector, Vector]:
        """x and r = b − A x in memory of their own; no product where there is no x0."""
        if self.x0 is None:
            return self.b.zeros(), self.b.copy()
        return self.x0.copy(), self.b - self.op(self.x0) if self.residual is None else self.residual.copy()

    def size(self, x: Vector, r: Vector) -> Tensor:
        """‖Ax‖ / ‖x‖ of a start, which tells what in further products is rounding; 0 without one."""
        return self.b.space.scalar(0.0) if self.x0 is None else divide((self.b - r).norm(), x.norm())

    def finished(self, step: int, going: Tensor | bool) -> bool:
        """Whether all systems are frozen, read from the device every check_every steps; never in fixed-step mode."""
        return self.goal is not None and step % self.check_every == 0 and not anywhere(going)

    def number(self, scalar: Any) -> Scalar:
        """A scalar to compute with: a number where there is one system and reading is free, or done anyway."""
        return scalar.item() if self.reads and isinstance(scalar, Tensor) else scalar


def divide(a: Tensor | float, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0: a direction that has vanished takes no further step."""
    return torch.where(b == 0, 0.0, a / b)


def event(code: Scalar | None, happened: Scalar, status: Status) -> Scalar:
    """Record a status where it happened, unless something else happened before."""
    if not isinstance(happened, Tensor) and not happened:
        return code
    code = 0 if code is None else code
    return where(happened & (code == 0), status.value, code)


@dataclass
class Outcome:
    """Where an iteration arrived, in scaled units, before its residual is recomputed."""

    x: Vector
    trace: Tensor | list[Any]  # ‖r‖ by the recursion before each step and, if known, after it: [steps (+ 1)(, B)]
    steps: int
    code: Scalar | None = None  # Status values of what went wrong on the way
    method: str = ""  # where a solver chose one
    curvature: Scalar | None = None  # the least xᵀAx / xᵀx met, where the method knows it
    steepest: Scalar | None = None  # the largest, likewise

    def __post_init__(self) -> None:
        if isinstance(self.trace, list) and self.trace and isinstance(self.trace[0], Tensor):
            self.trace = torch.stack(self.trace)


@dataclass(frozen=True, kw_only=True)
class LinearSolver(ABC):
    """Configuration of a solver of (A + damping · I) x = b, called as solver(op, b, x0=None) → Solution.

    Args:
        rtol, atol: solved when ‖b − Ax‖ ≤ max(atol, rtol · ‖b‖). With neither given, the method does all its steps and
            ends as COMPLETED.
        damping: γ ≥ 0, added to the diagonal; residuals are those of the damped system.
        on_failure: "warn" (HypergradientWarning), "raise" (SolverError) or "ignore": the status is not read from the
            device, and with a fixed number of steps nothing is (`Dense` and, with a tolerance, every method read).

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
            b: right hand side: a Vector or a pytree of tensors (with batch_dims=1: [B, ...] each).
            x0: start, like b, or a `Recycled`; zero if None.

        Returns: a Solution whose value has b's structure. A method that finds that it does not apply
            (NOT_POSITIVE_DEFINITE, NOT_SYMMETRIC, BREAKDOWN) returns its last sound iterate, or x = 0 where that has
            the smaller residual.
        Raises: TypeError or ValueError for an x0 unlike b, or an operator that this solver cannot take; SolverError
            under on_failure="raise".
        Cost: the method's products and one more, for the true residual.
        """
        vector = b if isinstance(b, Vector) else Vector.of(b, "b", op.batch_dims)
        solution = solve(self, op, vector.copy(), x0)
        solution = solution if isinstance(b, Vector) else replace(solution, value=solution.value.tree)
        solution.report(type(self).__name__, self.on_failure)
        return solution

    _runs_to_tolerance: ClassVar[bool] = True  # False: an approximation, successful without a tolerance
    _needs_symmetric: ClassVar[bool] = False

    def valid_for(self, structure: Structure) -> str | None:
        """Why this method does not apply to a system of this structure (with the damping in it); None where it does."""
        return "A is not symmetric" if self._needs_symmetric and not structure.symmetric else None

    def products_needed(self, structure: Structure, rtol: float = 1e-6) -> float | None:
        """Products with A and Aᵀ that are enough where the method is valid, by theory; None where no bound is known.

        Bounds are often far from sharp: a clustered spectrum needs fewer products, and rounding may ask for more. rtol
        is that of the error or of the residual, as the method's bound has it.
        """
        return None

    @abstractmethod
    def _iterate(self, system: System) -> Outcome:
        """Run the method. The residual is recomputed afterwards, by whoever called."""


@dataclass(frozen=True, kw_only=True)
class IterativeSolver(LinearSolver):
    """A solver that goes step by step.

    Args:
        max_steps: the number of steps: exact where neither rtol nor atol is given, else the most that are done
            (default: 10 n, at most 1,000). With max_steps, rtol and atol all left out, rtol is 1e-6 in float64 and
            1e-4 in float32 (4 eps in half precision).
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


# What an option must satisfy, whichever solver has it; None is always allowed.
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
    """What a solver does when it fails; a plain function warns."""
    return solver.on_failure if isinstance(solver, LinearSolver) else "warn"


def keeps_starts(x0: Any) -> TypeGuard[Any]:
    """Whether x0 finds a start for each system and learns from its solution, as `Recycled` does."""
    return callable(getattr(x0, "keep", None)) and not isinstance(x0, type)


def require_symmetric(op: LinearOperator, name: str) -> None:
    if not op.symmetric:
        raise TypeError(
            f"{name} needs a symmetric operator: declare this one so (symmetric=True) if it is; if not, use GMRES, "
            f"BiCGStab, NormalCG or LSQR"
        )


def solve(
    solver: Solver, op: LinearOperator, b: Vector, x0: Any, last_product: Callable[[Vector], Vector] | None = None
) -> Solution:
    """Run a solver and recompute its residual; does not warn. b is overwritten.

    last_product: v ↦ A v, where the caller needs that product anyway; it replaces the product for the residual, and the
    iteration is then not started again where its own residual was too optimistic.
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
    return Solution(  # whose numbers become tensors where these are asked for
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

    Where the residual of the recursion was too optimistic, the iteration is started again from x, up to twice.
    """
    for refinements_left in (2, 1, 0):
        if len(outcome.trace) > outcome.steps:
            _give_up(outcome, outcome.trace[-1], system)
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
            residual = _give_up(outcome, residual, system)
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


def _give_up(outcome: Outcome, residual: Scalar, system: System) -> Scalar:
    """x = 0 in place of an answer that its method gave up and whose residual is no smaller; the residual after that."""
    if outcome.code is None:
        return residual
    residual = system.number(residual)
    worse = (residual >= system.rhs_norm) & (residual < math.inf)
    # What a stationary iteration that diverges gives is what was asked for.
    given_up = (system.number(outcome.code) > Status.DIVERGED.value) & worse
    if isinstance(given_up, Tensor):
        outcome.x = outcome.x.zeros().where(given_up, outcome.x)
    elif given_up:
        outcome.x = outcome.x.zeros()
    outcome.trace[-1] = where(given_up, system.rhs_norm, outcome.trace[-1])
    return where(given_up, system.rhs_norm, residual)


def _scaled(b: Vector) -> tuple[Scalar, Scalar]:
    """A power of two by which b is divided, and ‖b‖ after that: near 1 where it is not 0."""
    norm2 = read(b.dot(b))
    if isinstance(norm2, Tensor) or not squares_are_exact(norm2, b.space):
        scale = b.scale(read)
        return scale, norm(b.scale_(1 / scale))
    # Near enough to 1 as it is: squares of residuals, and of Aᵀr, neither vanish nor overflow.
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
        # A little below the goal, so that rounding between the recursion's and the true residual does not matter.
        stop = larger(stop, 0.9 * goal)
    if x0 is not None:
        x0 = x0 * where(norm != 0, 1.0, 0.0)  # b = 0 has a solution that no iteration from elsewhere reaches
    if max_steps is None:
        max_steps = min(10 * b.space.length, 1000)
    every = every or (1 if b.space.device.type in FREE_TO_READ else 5)
    return System(op, b, x0, max_steps, stop, goal, every, norm, scale)


def _judge(outcome: Outcome, residual: Scalar, system: System) -> Scalar:
    """The Status values that the true residual and the events on the way lead to; read only where that is free."""
    own = system.number(outcome.trace[-1])
    code = 0 if outcome.code is None else system.number(outcome.code)
    if system.goal is None:  # what rounding leaves is solved, and STAGNATED is no failure
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
    """One outcome of two that followed each other: the second worked on the systems in `again` alone."""
    code = where(again, 0 if second.code is None else second.code, 0 if first.code is None else first.code)
    before, after = map(first.x.space.tensor, (first.trace, second.trace))
    # Frozen systems keep the norm that they were frozen with: computed again it may exceed the limit by rounding.
    trace = torch.cat([before, where(again, after[1:], before[-1])])
    curvature = first.curvature if second.curvature is None else second.curvature
    return Outcome(second.x, trace, first.steps + second.steps, code, second.method, curvature)


def _steps(outcome: Outcome, system: System) -> int | Tensor:
    """Steps done; for batched systems those before each was frozen, where there is a tolerance."""
    if isinstance(outcome.trace, list) or outcome.trace.ndim == 1:
        return outcome.steps
    if system.goal is None:
        return torch.full(system.b.space.batch_shape, outcome.steps, device=outcome.trace.device)
    return (~(outcome.trace[:-1] <= system.stop)).sum(0)


def _run_function(function: Solver, op: LinearOperator, b: Vector, start: Any, last_product: Any) -> Solution:
    """A user's plain function as a solver: it may write into what it is given, and its answer is checked like any."""
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
