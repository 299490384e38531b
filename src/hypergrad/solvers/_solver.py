"""What all linear solvers share: their configuration, the system they see, and the check of their answer."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, TypeAlias, TypeGuard, final

import torch
from torch import Tensor

from .._solution import OnFailure, Solution, Status
from .._vector import Space, Vector
from ..operators import LinearOperator

# A solver is anything of this form; a plain function may return the bare value.
Solver: TypeAlias = Callable[..., Any]


class Start(Protocol):
    """What finds a start for a system, x₀ and b − A x₀, and learns from its solution: `Recycled`."""

    def start(self, op: LinearOperator, b: Vector) -> tuple[Vector, Vector] | None: ...
    def keep(self, x: Vector) -> None: ...


# A scalar of an iteration: a number where reading is free, else a tensor, 0-d or [B]. Arithmetic with numbers costs
# nothing beside a small product; that with 0-d tensors does.
Real: TypeAlias = Any

FREE_TO_READ = ("cpu",)  # kinds of device on which reading a number waits for nothing


def read(scalar: Tensor) -> Real:
    """A 0-d tensor as a number, where reading is free."""
    return scalar.item() if not scalar.ndim and scalar.device.type in FREE_TO_READ else scalar


def where(condition: Any, a: Real, b: Real) -> Real:
    """a where the condition holds, else b."""
    return torch.where(condition, a, b) if isinstance(condition, Tensor) else (a if condition else b)


def anywhere(condition: Any) -> bool:
    """Whether a condition holds for any system."""
    return bool(condition.any() if isinstance(condition, Tensor) and condition.ndim else condition)


def larger(a: Real, b: Real) -> Real:
    """The larger one; NaN where a is NaN."""
    return torch.maximum(a, b) if isinstance(a, Tensor) else max(a, b)


def root(a: Real) -> Real:
    return a.sqrt() if isinstance(a, Tensor) else math.sqrt(a)


def precise(norm2: Real, space: Space) -> bool:
    """Whether a ‖v‖² is a number, of a size at which no square that matters to it underflowed, and none overflowed."""
    return space.uniform and not isinstance(norm2, Tensor) and space.tiny**0.5 <= norm2 <= space.tiny**-0.5


def length(v: Vector, look: Callable[[Tensor], Real] = read) -> Real:
    """‖v‖, as a number where `look` gives one."""
    return root(look(v.dot(v)))


@dataclass
class System:
    """A x = b as an iteration sees it: damped operator, right hand side scaled near 1, limits resolved."""

    op: LinearOperator
    b: Vector
    x0: Vector | None
    max_steps: int
    stop: Real  # a system rests once ‖r‖ ≤ stop: the tolerance or, without one, rounding level
    goal: Real | None  # the tolerance itself; None runs max_steps without looking
    check_every: int
    rhs_norm: Real  # ‖b‖ in scaled units
    scale: Real  # power of two that one scaled unit is worth in the user's units
    precondition: Callable[[Vector], Vector] | None = None  # built from op once, however often the system is taken up
    residual: Vector | None = None  # b − A x0 where it is known

    def __post_init__(self) -> None:
        space, looked = self.b.space, self.goal is not None and self.check_every == 1
        self.reads = not space.batch_dims and (looked or space.device.type in FREE_TO_READ)

    def start(self) -> tuple[Vector, Vector]:
        """x and r = b − A x in memory of their own; no product where there is no x0."""
        if self.x0 is None:
            return self.b.zeros(), self.b.copy()
        return self.x0.copy(), self.b - self.op(self.x0) if self.residual is None else self.residual.copy()

    def finished(self, step: int, going: Tensor | bool) -> bool:
        """Whether no system goes on, read from the device every check_every steps; never in fixed-step mode."""
        if self.goal is None or step % self.check_every:
            return False
        return not anywhere(going)

    def look(self, scalar: Any) -> Real:
        """A scalar to compute with: of one system where reading is free, or looked for anyway, a number."""
        return scalar.item() if self.reads and isinstance(scalar, Tensor) else scalar

    def stack(self, scalars: list[Real]) -> Tensor | list[float]:
        """Scalars of an iteration as one tensor: [steps], or [steps, B]; numbers stay a list."""
        return torch.stack(scalars) if isinstance(scalars[0], Tensor) else scalars


def ratio(a: Real, b: Real, going: Any) -> Real:
    """a / b where going, else 0."""
    if isinstance(going, Tensor):
        return torch.where(going, a / b, 0.0)
    if not going:
        return 0.0
    return a / b if b else a * math.inf


@dataclass
class Outcome:
    """Where an iteration arrived, in scaled units, before its residual is recomputed."""

    x: Vector
    trace: Tensor | list[float]  # ‖r‖ by the recursion before each step and, if known, after it: [steps (+ 1)(, B)]
    steps: int
    code: Real | None = None  # Status values of what went wrong on the way
    method: str = ""  # where a solver chose one


@dataclass(frozen=True, kw_only=True)
class LinearSolver(ABC):
    """Configuration of a solver of (A + damping · I) x = b, called as solver(op, b, x0=None) → Solution.

    Args:
        rtol, atol: solved when ‖b − Ax‖ ≤ max(atol, rtol · ‖b‖). With neither given, the method runs as far as it is
            told to and that is success.
        damping: γ ≥ 0, added to the diagonal; residuals are those of the damped system.
        on_failure: "warn" (HypergradientWarning), "raise" (SolverError) or "ignore" (reads nothing from the device).
    """

    rtol: float | None = None
    atol: float | None = None
    damping: float = 0.0
    on_failure: OnFailure = "warn"

    def __post_init__(self) -> None:
        for name in ("rtol", "atol", "damping"):
            value = getattr(self, name)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{type(self).__name__}: {name} must be a finite number ≥ 0, got {value!r}")
        if self.on_failure not in ("warn", "raise", "ignore"):
            raise ValueError(f'on_failure must be "warn", "raise" or "ignore", got {self.on_failure!r}')

    @final
    def __call__(self, op: LinearOperator, b: Any, x0: Any = None) -> Solution:
        """Solve for x.

        Args:
            op: the operator A.
            b: right hand side: a Vector or a pytree of tensors (with batch_dims=1: [B, ...] each).
            x0: start, like b, or a `Recycled`; zero if None.

        Returns:
            A Solution whose value has b's structure.

        Raises: TypeError or ValueError for an x0 unlike b, or for an operator that this solver cannot take;
            SolverError under on_failure="raise".
        Cost: the method's products and one more, for the true residual.
        """
        vector = b if isinstance(b, Vector) else Space(b, "b", op.batch_dims).vector(b, "b")
        solution = solve(self, op, vector.copy(), start_of(x0, vector.space))
        solution.report(type(self).__name__, self.on_failure)
        return solution if isinstance(b, Vector) else replace(solution, value=solution.value.tree)

    _runs_to_tolerance: ClassVar[bool] = True  # False: an approximation, successful without a tolerance
    _needs_symmetric: ClassVar[bool] = False

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
        check_every: steps between two looks at the residual, each a device synchronisation (default: 1 on the CPU,
            where looking is free, 5 elsewhere). Without a tolerance it is never looked at.
    """

    max_steps: int | None = None
    check_every: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("max_steps", 0), ("check_every", 1)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise ValueError(f"{type(self).__name__}: {name} must be an integer ≥ {least}, got {value!r}")


def start_of(x0: Any, space: Space) -> Vector | Start | None:
    """x0 as a solve takes it: a pytree becomes a vector."""
    return x0 if x0 is None or isinstance(x0, Vector) or is_start(x0) else space.vector(x0, "x0")


def is_start(x0: Any) -> TypeGuard[Start]:
    return all(callable(getattr(x0, name, None)) for name in ("start", "keep")) and not isinstance(x0, type)


def begin(x0: Vector | Start | None, op: LinearOperator, b: Vector) -> Vector | None:
    """The start as a vector."""
    if x0 is None or isinstance(x0, Vector):
        return x0
    begun = x0.start(op, b)
    return None if begun is None else begun[0]


def require_symmetric(op: LinearOperator, name: str) -> None:
    if not op.symmetric:
        raise TypeError(
            f"{name} needs a symmetric operator, and this one is not declared so. If it is symmetric, declare it "
            f"(symmetric=True); if not, use GMRES, BiCGStab, NormalCG or LSQR"
        )


def solve(
    solver: Solver,
    op: LinearOperator,
    b: Vector,
    x0: Vector | Start | None,
    last_product: Callable[[Vector], Vector] | None = None,
) -> Solution:
    """Run a solver and recompute its residual; does not warn. b is overwritten; a Start keeps the solution.

    Args:
        solver: a LinearSolver, or a plain function (op, b, x0) → Vector, pytree or Solution.
        last_product: v ↦ A v, where the caller needs that product anyway; it replaces the product for the residual,
            and the iteration is then not taken up again when the recursion was too optimistic.
    """
    with torch.no_grad():
        if not isinstance(solver, LinearSolver):
            return _kept(x0, _run_function(solver, op, b, begin(x0, op, b), last_product or op))
        if solver._needs_symmetric:
            require_symmetric(op, type(solver).__name__)
        op, space = op.damped(solver.damping), b.space
        scale, norm = _scaled(b)
        system = _system(solver, op, b, x0 / scale if isinstance(x0, Vector) else None, scale, norm)
        if is_start(x0):
            system.x0, system.residual = x0.start(op, b) or (None, None)
        outcome = solver._iterate(system)
        for refinements_left in (2, 1, 0):
            x = outcome.x.scale_(scale)
            image = op(x) if last_product is None else _damped(last_product(x), x, solver.damping)
            left = system.max_steps - outcome.steps
            last = last_product is not None or system.goal is None or not refinements_left or left <= 0
            residual = length((b if last else b.copy()).add_(image, 1 / scale, -1.0), system.look)
            trace = outcome.trace
            if len(trace) == outcome.steps:
                numbers = isinstance(trace, list)
                outcome.trace = [*trace, residual] if numbers else torch.cat([trace, space.tensor(residual)[None]])
            code = _judge(outcome, residual, system)
            if last:
                break
            again = code == Status.STAGNATED.value
            if outcome.code is not None:
                again = again & (outcome.code == 0)
            if not anywhere(again):
                break
            system.x0, system.residual = x / scale, None
            rest = replace(system, max_steps=left, stop=where(again, system.stop, torch.inf))
            outcome = continued(outcome, solver._iterate(rest), again)
        trace = space.tensor(outcome.trace)
        solution = Solution(
            x,
            torch.as_tensor(code, device=space.device),
            _steps(outcome, system),
            space.tensor(residual * scale),
            space.tensor(system.rhs_norm * scale),
            trace if isinstance(scale, float) and scale == 1 else trace * scale,
            outcome.method or type(solver).__name__,
        )
        if not isinstance(code, Tensor):  # known without another look
            vars(solution)["_codes"] = [code]
        return _kept(x0, solution)


def _kept(x0: Vector | Start | None, solution: Solution) -> Solution:
    if is_start(x0):
        x0.keep(solution.value)
    return solution


def _scaled(b: Vector) -> tuple[Real, Real]:
    """A power of two by which b is divided, and ‖b‖ after that: near 1 where it is not 0."""
    norm2 = read(b.dot(b))
    if not precise(norm2, b.space):
        scale = b.scale(read)
        return scale, length(b.scale_(1 / scale))
    # Near enough to 1 as it is: squares of residuals, and of Aᵀr, neither vanish nor overflow.
    near = b.space.tiny ** (1 / 6) <= norm2 <= b.space.tiny ** (-1 / 6)
    scale = 1.0 if near else 2.0 ** round(math.log2(norm2) / 2)
    b.scale_(1 / scale)
    return scale, math.sqrt(norm2) / scale


def _damped(image: Vector, x: Vector, damping: float) -> Vector:
    return image + x * damping if damping else image


def _system(solver: LinearSolver, op: LinearOperator, b: Vector, x0: Vector | None, scale: Real, norm: Real) -> System:
    rtol, atol = solver.rtol, solver.atol
    limits = (solver.max_steps, solver.check_every) if isinstance(solver, IterativeSolver) else (None, None)
    max_steps, every = limits
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


def _judge(outcome: Outcome, residual: Real, system: System) -> Real:
    """The Status values that the true residual and the events on the way lead to; read only where that is free."""
    norm = system.look(outcome.trace[-1])
    code = 0 if outcome.code is None else system.look(outcome.code)
    worse_than_none = (residual >= system.rhs_norm) & (system.rhs_norm > 0)
    if system.goal is None:
        ended = where(worse_than_none, Status.DIVERGED.value, Status.COMPLETED.value)
        code = where(code > 0, code, ended)
        finite = (residual < math.inf) & (norm < math.inf)
    else:
        ended = where(norm <= system.stop, Status.STAGNATED.value, Status.MAX_STEPS.value)
        ended = where(worse_than_none, Status.DIVERGED.value, ended)
        code = where(code > 0, code, ended)
        solved = (residual <= system.goal) & (code != Status.BREAKDOWN.value)
        code = where(solved, Status.CONVERGED.value, code)
        finite = (residual < math.inf) & ((norm < math.inf) | (code == Status.CONVERGED.value))
    return where(finite, code, Status.NON_FINITE.value)


def continued(first: Outcome, second: Outcome, again: Real) -> Outcome:
    """One outcome of two that followed each other: the second worked on the systems in `again` alone."""
    code = where(again, 0 if second.code is None else second.code, 0 if first.code is None else first.code)
    before, after = (first.x.space.tensor(outcome.trace) for outcome in (first, second))
    # Those at rest keep the norm that they were put to rest with: taken anew it may stand above the limit by rounding.
    trace = torch.cat([before, where(again, after[1:], before[-1])])
    return Outcome(second.x, trace, first.steps + second.steps, code, second.method)


def _steps(outcome: Outcome, system: System) -> int | Tensor:
    """Steps done; for batched systems those before each rested."""
    if isinstance(outcome.trace, list) or outcome.trace.ndim == 1:
        return outcome.steps
    return (outcome.trace[:-1] > system.stop).sum(0)


def _run_function(
    function: Solver, op: LinearOperator, b: Vector, x0: Vector | None, last_product: Callable[[Vector], Vector]
) -> Solution:
    """A user's plain function as a solver: its answer is checked like any other."""
    before = op.products
    result = function(op, b.copy(), x0 if x0 is None else x0.copy())  # theirs to write into
    value = result.value if isinstance(result, Solution) else result
    tree = value.tree if isinstance(value, Vector) else value
    own = isinstance(value, Vector) and value.space is b.space
    x = value if own else b.space.vector(tree, "the solver's result")
    residual = (b - last_product(x)).norm()
    completed = torch.full_like(residual, Status.COMPLETED.value, dtype=torch.long)
    code = result.code if isinstance(result, Solution) else completed
    code = torch.where(torch.isfinite(residual), code, Status.NON_FINITE.value)
    steps = result.steps if isinstance(result, Solution) else op.products - before
    trace = result.trace if isinstance(result, Solution) else torch.stack([residual])
    return Solution(x, code, steps, residual, b.norm(), trace, getattr(function, "__name__", type(function).__name__))
