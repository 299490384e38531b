"""The solvers, the systems that each must solve, and their answers on `systems.GRID`, for all tests of solvers."""

import functools
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hypergrad as hg
from hypergrad import solvers as S
from hypergrad.solvers import Status
from systems import GRID, System, norm, side, with_spectrum

RTOL, LIMIT = 1e-10, 80
ETA = 0.3  # Neumann's step size


def conditioned(limit: float) -> Callable[[System], list[bool]]:
    return lambda s: [r and c <= 1.01 * limit for r, c in zip(s.regular, s.condition, strict=True)]


def definite(limit: float) -> Callable[[System], list[bool]]:
    return lambda s: [d and c for d, c in zip(s.definite, conditioned(limit)(s), strict=True)]


def symmetric(limit: float) -> Callable[[System], list[bool]]:
    """Whether each system is symmetric, and regular with at most this condition number or singular and consistent."""
    rows = lambda s: zip(s.symmetric, conditioned(limit)(s), s.finite, s.consistent, s.regular, strict=True)  # noqa: E731
    return lambda s: [sym and (c or (f and con and not reg)) for sym, c, f, con, reg in rows(s)]


def contracts(step: float, steps: int = LIMIT) -> Callable[[System], list[bool]]:
    """Whether ‖I − ηA‖ is so small that x ← x + η (b − Ax) solves each system in this number of steps."""
    return lambda s: [
        bool(f and min(q, 1) ** steps <= 1e-13) for q, f in zip(s.contraction(step), s.finite, strict=True)
    ]


def either(*facts: Callable[[System], list[bool]]) -> Callable[[System], list[bool]]:
    return lambda s: [any(row) for row in zip(*(fact(s) for fact in facts), strict=True)]


@dataclass(frozen=True)
class Row:
    """A solver and what it must do.

    `products(K, n)` is the number of products in K steps on n unknowns, the one for the residual excluded. `solves`
    tells which of the systems in a `System` it must solve. `tag` is declared for every operator, whether true or not.
    """

    make: Callable[..., S.LinearSolver]
    products: Callable[[int, int], int]
    solves: Callable[[System], list[bool]]
    tag: str | None = None
    dampings: tuple[float, float] = (0.0, 0.3)
    limit: int = LIMIT

    @property
    def iterative(self) -> bool:
        return hasattr(self.make(), "max_steps")

    def solver(self, max_steps: int | None = None, **options: Any) -> S.LinearSolver:
        return self.make(**options, **({"max_steps": max_steps} if self.iterative else {}))


def low_rank(rank: int) -> Callable[..., S.Nystrom]:
    """Nystrom with damping 0.01 by default, because its damping must be positive."""
    return lambda damping=0.01, **options: S.Nystrom(rank=rank, damping=damping, **options)


ROWS = {
    "CG": Row(S.CG, lambda k, n: k, definite(1e6), tag="symmetric"),
    "MINRES": Row(S.MINRES, lambda k, n: k, symmetric(1e6), tag="symmetric"),
    "GMRES(5)": Row(partial(S.GMRES, restart=5), lambda k, n: k, either(definite(10), contracts(1))),
    "GMRES(60)": Row(partial(S.GMRES, restart=60), lambda k, n: k, either(conditioned(1e6), symmetric(1e6))),
    "BiCGStab": Row(S.BiCGStab, lambda k, n: 2 * k, either(definite(1e3), contracts(1))),
    "LSQR": Row(S.LSQR, lambda k, n: 2 * k, either(conditioned(1e3), symmetric(1e3))),
    "NormalCG": Row(S.NormalCG, lambda k, n: 2 * k, either(conditioned(1e3), symmetric(1e3))),
    "FixedPoint": Row(S.FixedPoint, lambda k, n: max(k - 1, 0), contracts(1)),
    "Neumann": Row(partial(S.Neumann, step_size=ETA), lambda k, n: k, contracts(ETA)),
    "Dense": Row(S.Dense, lambda k, n: n, conditioned(1e6)),
    "Dense, Cholesky": Row(S.Dense, lambda k, n: n, conditioned(1e6), tag="positive_definite"),
    "Nystrom(10)": Row(
        low_rank(10), lambda k, n: 10, lambda s: [s.n <= 10 and d for d in s.definite], "symmetric", (0.01, 0.3)
    ),
    "Nystrom(40)": Row(low_rank(40), lambda k, n: n, definite(1e2), "symmetric", (0.01, 0.3)),
    "Auto": Row(S.Auto, lambda k, n: k, either(conditioned(1e3), contracts(1))),
    "Auto, symmetric": Row(S.Auto, lambda k, n: k, symmetric(1e6), tag="symmetric"),
    "Optimizer": Row(S.Optimizer, lambda k, n: k, contracts(1, 40), limit=40),
}


KRYLOV = ("CG", "MINRES", "GMRES(5)", "GMRES(60)", "BiCGStab", "LSQR", "NormalCG")


LAZY = (*KRYLOV, "FixedPoint", "Neumann", "Auto", "Auto, symmetric")


BATCHES = [name for name, system in GRID.items() if system.a.ndim == 3]


@dataclass(frozen=True)
class Answer:
    """A Solution, and the judgement of it by NumPy; arrays and lists have one entry for each system."""

    name: str
    system: System  # damped
    solution: S.Solution
    cold: bool  # started from zero

    @functools.cached_property
    def x(self) -> np.ndarray:
        return self.solution.value.numpy().astype(np.float64).reshape(self.system.sides.shape)

    @functools.cached_property
    def residual(self) -> np.ndarray:
        return self.system.residuals(self.x)

    @functools.cached_property
    def reported(self) -> np.ndarray:
        return self.solution.residual_norm.numpy().astype(np.float64).reshape(-1)

    @property
    def statuses(self) -> list[Status]:
        return self.solution.statuses

    @functools.cached_property
    def right(self) -> list[bool]:
        """Whether ‖b − Ax‖ ≤ rtol ‖b‖ up to rounding and, if A⁻¹ exists, ‖x − A⁻¹b‖ is at most ‖A⁻¹‖ times as much."""
        out = []
        rounding = self.system.rounding(self.x)
        for i, (x, truth) in enumerate(zip(self.x, self.system.solutions, strict=True)):
            bound = RTOL * norm(self.system.sides[i]) + rounding[i]
            good = bool(self.residual[i] <= bound)
            if self.system.regular[i]:
                good = good and bool(norm(x - truth) <= (bound + rounding[i]) / self.system.singular_values[i][-1])
            out.append(good)
        return out

    def systems(self, bad: list[bool]) -> list[str]:
        """A line of a failure report for each system where `bad` holds: name, status, true and reported residual."""
        names = zip(bad, self.statuses, self.residual, self.reported, strict=True)
        return [f"{self.name}[{i}]: {st.name} {r:.1e} {s:.1e}" for i, (no, st, r, s) in enumerate(names) if no]

    def silent(self) -> list[str]:
        """Systems that are reported as CONVERGED, with a wrong solution."""
        return self.systems([s is Status.CONVERGED and not ok for s, ok in zip(self.statuses, self.right, strict=True)])

    def unsolved(self, due: list[bool]) -> list[str]:
        """Systems that had to be solved and are not reported as CONVERGED."""
        return self.systems([d and s is not Status.CONVERGED for d, s in zip(due, self.statuses, strict=True)])

    def misreported(self) -> list[str]:
        """Systems whose reported residual is off by more than rounding, or finite though the status is NON_FINITE."""
        slack = self.system.rounding(self.x) + 1e-12 * self.residual
        lost = [status is Status.NON_FINITE for status in self.statuses]
        last = self.solution.trace[-1].reshape(-1).numpy()
        with np.errstate(invalid="ignore"):
            near = np.abs(self.reported - self.residual) <= slack
        return self.systems(list(np.where(lost, np.isfinite(self.reported) & np.isfinite(last), ~near)))

    def misnamed(self) -> list[str]:
        """Systems with NaN or infinity whose status is not NON_FINITE, and finite ones beside them whose status is."""
        lost = [status is Status.NON_FINITE for status in self.statuses]
        insane = not all(self.system.finite)
        return self.systems([insane and f == n for f, n in zip(self.system.finite, lost, strict=True)])

    def mistraced(self) -> list[str]:
        """The answer's name if its trace is not one longer than the number of steps, or does not begin with ‖b‖."""
        steps = self.solution.steps
        exact = isinstance(steps, int)
        bad = [steps + 1 != len(self.solution.trace) if exact else int(steps.max()) + 1 > len(self.solution.trace)]
        if self.cold and all(self.system.finite):
            norms = np.array([norm(b) for b in self.system.sides])
            bad.append(bool(np.any(np.abs(self.solution.trace[0].reshape(-1).numpy() - norms) > 1e-13 * norms)))
        return [self.name] if any(bad) else []


@functools.cache
def answer(row: str, system: str, started: bool = False, gamma: float = 0.0) -> Answer:
    """The answer of a solver with rtol=RTOL on a system of the grid, from x0 = 0 or from a random x0 (`started`)."""
    given = GRID[system]
    solver = ROWS[row].solver(max_steps=ROWS[row].limit, rtol=RTOL, damping=gamma, on_failure="ignore")
    solution = solver(given.operator(ROWS[row].tag), given.rhs(), given.start() if started else None)
    name = f"{row} / {system} / x0 {'random' if started else 'none'} / damping {gamma}"
    return Answer(name, given.damped(gamma), solution, not started and row not in ("Neumann", "Optimizer"))


def answers(row: str) -> list[Answer]:
    return [answer(row, *case) for case in itertools.product(GRID, (False, True), ROWS[row].dampings)]


def agree(value: Any, truth: Any, tolerance: float) -> None:
    """‖value − truth‖ ≤ tolerance ‖truth‖."""
    value, truth = np.asarray(value, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    assert value.shape == truth.shape
    assert norm(value - truth) <= tolerance * norm(truth), f"{norm(value - truth) / norm(truth):.2e} > {tolerance:.1e}"


def count(every: list[Answer]) -> str:
    statuses = Counter(status.name for a in every for status in a.statuses)
    silent = sum(len(a.silent()) for a in every)
    return f"{sum(statuses.values())} answers, {dict(statuses)}; silent failures: {silent}"


def krylov(a: np.ndarray, r: np.ndarray, steps: int) -> np.ndarray:
    """An orthonormal basis of span{r, Ar, …, A^{K−1} r}: [n, K]."""
    basis = np.zeros((len(r), 0))
    for _ in range(steps):
        v = r if not basis.shape[1] else a @ basis[:, -1]
        for _ in range(2):
            v = v - basis @ (basis.T @ v)
        basis = np.column_stack([basis, v / norm(v)])
    return basis


class Reads(TorchDispatchMode):
    """Counts the operations that would wait for an accelerator to give a number."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waiting = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2")
        self.count += func.overloadpacket.__name__ in waiting
        return func(*args, **(kwargs or {}))


def reads(solver: S.LinearSolver, system: System, x0: torch.Tensor | None = None) -> tuple[int, S.Solution]:
    op, b = system.operator(), system.rhs()
    with Reads() as counted:
        solution = solver(op, b, x0)
    return counted.count, solution


N = 120  # unknowns of the systems below
DECAY = with_spectrum(np.logspace(0, -5, N) + 1e-4, 3)


def drifting(t: float) -> np.ndarray:
    """A matrix with the eigenvalues of DECAY, whose eigenvectors rotate as t grows."""
    turn = torch.matrix_exp(t * torch.tensor(np.triu(np.ones((N, N)), 1) - np.tril(np.ones((N, N)), -1)) / N).numpy()
    return turn @ DECAY @ turn.T


def solved(a: np.ndarray, solver: S.LinearSolver, x0: torch.Tensor | None = None) -> tuple[S.Solution, int]:
    """The solution of a symmetric system with right-hand side side(n), which is checked, and the number of products."""
    op = hg.operators.matrix(torch.tensor(a), symmetric=True)
    solution = solver(op, torch.tensor(side(len(a))), x0)
    assert norm(a @ solution.value.numpy() - side(len(a))) <= 1.001 * (solver.rtol or 1) * norm(side(len(a)))
    return solution, op.products
