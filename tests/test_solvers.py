"""Every solver on every system of `systems.GRID`: a right value or a status that says so; then each promise by itself.

A new solver is one row of ROWS.
"""

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import optree
import pytest
import scipy.sparse.linalg
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hypergrad as hg
from hypergrad import solvers as S
from hypergrad.solvers import Status
from hypergrad.solvers._solver import System as SolverSystem
from systems import GRID, System, logspace, norm, side, with_singular_values, with_spectrum

RTOL, LIMIT = 1e-10, 80
ETA = 0.3  # Neumann's step size


def conditioned(limit: float) -> Callable[[System], list[bool]]:
    return lambda s: [r and c <= 1.01 * limit for r, c in zip(s.regular, s.condition, strict=True)]


def definite(limit: float) -> Callable[[System], list[bool]]:
    return lambda s: [d and c for d, c in zip(s.definite, conditioned(limit)(s), strict=True)]


def symmetric(limit: float) -> Callable[[System], list[bool]]:
    """Symmetric and well enough conditioned, or singular and consistent."""
    rows = lambda s: zip(s.symmetric, conditioned(limit)(s), s.finite, s.consistent, s.regular, strict=True)  # noqa: E731
    return lambda s: [sym and (c or (f and con and not reg)) for sym, c, f, con, reg in rows(s)]


def contracts(step: float, steps: int = LIMIT) -> Callable[[System], list[bool]]:
    """Whether these steps of x ← x + η (b − Ax) are enough, by ‖I − ηA‖."""
    return lambda s: [
        bool(f and min(q, 1) ** steps <= 1e-13) for q, f in zip(s.contraction(step), s.finite, strict=True)
    ]


def either(*facts: Callable[[System], list[bool]]) -> Callable[[System], list[bool]]:
    return lambda s: [any(row) for row in zip(*(fact(s) for fact in facts), strict=True)]


@dataclass(frozen=True)
class Row:
    """A solver and what is promised of it.

    `products(K, n)` are the products of K steps on n unknowns, without that for the residual; `solves` tells of each
    system of a `System` whether it must be solved; `tag` is declared of every operator, true or not.
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
    """Nystrom's damping has no zero; 0.01 stands for it."""
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
    "OneStep": Row(S.OneStep, lambda k, n: 0, lambda s: [bool(q == 0) for q in s.contraction(1)]),
    "Dense": Row(S.Dense, lambda k, n: n, conditioned(1e6)),
    "Dense, Cholesky": Row(S.Dense, lambda k, n: n, conditioned(1e6), tag="positive_definite"),
    "Nystrom(10)": Row(
        low_rank(10), lambda k, n: 10, lambda s: [s.n <= 10 and d for d in s.definite], "symmetric", (0.01, 0.3)
    ),
    "Nystrom(40)": Row(low_rank(40), lambda k, n: n, definite(1e3), "symmetric", (0.01, 0.3)),
    "Auto": Row(partial(S.Auto, dense=1), lambda k, n: k, either(conditioned(1e3), contracts(1))),
    "Auto, symmetric": Row(partial(S.Auto, dense=1), lambda k, n: k, symmetric(1e6), tag="symmetric"),
    "Auto, dense": Row(S.Auto, lambda k, n: k, conditioned(1e6)),
    "Optimizer": Row(S.Optimizer, lambda k, n: k, contracts(1, 40), limit=40),
}
KRYLOV = ("CG", "MINRES", "GMRES(5)", "GMRES(60)", "BiCGStab", "LSQR", "NormalCG")
LAZY = (*KRYLOV, "FixedPoint", "Neumann", "OneStep", "Auto", "Auto, symmetric")
BATCHES = [name for name, system in GRID.items() if system.a.ndim == 3]


@dataclass(frozen=True)
class Answer:
    """A Solution with NumPy's own view of it; arrays have one entry a system."""

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
        """‖b − Ax‖ ≤ rtol ‖b‖ up to rounding and, where A⁻¹ exists, ‖x − A⁻¹b‖ ≤ ‖A⁻¹‖ times that."""
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
        """Names for a report of the systems where `bad` holds."""
        names = zip(bad, self.statuses, self.residual, self.reported, strict=True)
        return [f"{self.name}[{i}]: {st.name} {r:.1e} {s:.1e}" for i, (no, st, r, s) in enumerate(names) if no]

    def silent(self) -> list[str]:
        """Said to be solved and not right."""
        return self.systems([s is Status.CONVERGED and not ok for s, ok in zip(self.statuses, self.right, strict=True)])

    def unsolved(self, due: list[bool]) -> list[str]:
        """Not solved though due."""
        return self.systems([d and s is not Status.CONVERGED for d, s in zip(due, self.statuses, strict=True)])

    def misreported(self) -> list[str]:
        """The reported residual is not the true one, beyond rounding; where not finite, nothing is reported."""
        slack = self.system.rounding(self.x) + 1e-12 * self.residual
        lost = [status is Status.NON_FINITE for status in self.statuses]
        last = self.solution.trace[-1].reshape(-1).numpy()
        with np.errstate(invalid="ignore"):
            near = np.abs(self.reported - self.residual) <= slack
        return self.systems(list(np.where(lost, np.isfinite(self.reported) & np.isfinite(last), ~near)))

    def misnamed(self) -> list[str]:
        """NaN or infinity without NON_FINITE, or NON_FINITE for a sane system beside an insane one."""
        lost = [status is Status.NON_FINITE for status in self.statuses]
        insane = not all(self.system.finite)
        return self.systems([insane and f == n for f, n in zip(self.system.finite, lost, strict=True)])

    def mistraced(self) -> list[str]:
        """The trace is not one longer than the steps, or does not begin with ‖b‖."""
        steps = self.solution.steps
        exact = isinstance(steps, int)
        bad = [steps + 1 != len(self.solution.trace) if exact else int(steps.max()) + 1 > len(self.solution.trace)]
        if self.cold and all(self.system.finite):
            norms = np.array([norm(b) for b in self.system.sides])
            bad.append(bool(np.any(np.abs(self.solution.trace[0].reshape(-1).numpy() - norms) > 1e-13 * norms)))
        return [self.name] if any(bad) else []


@functools.cache
def answer(row: str, system: str, started: bool = False, gamma: float = 0.0) -> Answer:
    """A solver to RTOL on a system of the grid, from x0 = 0 or a random x0."""
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


@pytest.mark.parametrize("row", ROWS)
def test_grid(row):
    """No failure is silent, what is due is solved, residuals and traces are true, NaN is named.

    In one test, so that the grid is solved once and on one core.
    """
    every = answers(row)
    due = [ROWS[row].solves(a.system) for a in every]
    print(f"{row}: {count(every)}")
    assert [case for a in every for case in a.silent()] == []
    assert [case for a, wanted in zip(every, due, strict=True) for case in a.unsolved(wanted)] == []
    assert sum(map(sum, due)) >= 6  # systems that the solver is made for are there
    assert [case for a in every for case in a.misreported()] == []
    assert [case for a in every for case in a.misnamed()] == []
    assert [case for a in every for case in a.mistraced()] == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_count_of_silent_failures(capsys):
    every = [a for row in ROWS for a in answers(row)]
    with capsys.disabled():
        print(f"\n{len(ROWS)} solvers × {len(GRID)} systems × x0 × damping: {count(every)}")
    assert sum(len(a.silent()) for a in every) == 0


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("system", [name for name in GRID if name.startswith("b = 0")])
def test_b_zero_gives_zero_from_any_start(row, system):
    for started, gamma in itertools.product((False, True), ROWS[row].dampings):
        a = answer(row, system, started, gamma)
        assert a.solution.status is Status.CONVERGED
        assert not a.x.any() and a.reported == 0 and a.solution.relative_residual == 0


INCONSISTENT = ("singular symmetric inconsistent", "singular indefinite inconsistent", "zero")
INCONSISTENT_TOO = ("singular inconsistent", "nilpotent")
SINGULAR = ("singular symmetric consistent", "singular consistent", *INCONSISTENT, *INCONSISTENT_TOO)
EXPECTED = [
    (
        "CG",
        Status.NOT_POSITIVE_DEFINITE,
        ("symmetric indefinite", "negative definite", "zero diagonal", "1×1 negative"),
    ),
    (
        "CG",
        Status.NOT_SYMMETRIC,
        ("near identity", "contraction .8", "nonsymmetric 1e3", "triangular, far from normal"),
    ),
    ("MINRES", Status.NOT_SYMMETRIC, ("near identity", "contraction .8", "nonsymmetric 1e3", "skew-symmetric")),
    ("MINRES", Status.STAGNATED, INCONSISTENT),
    ("GMRES(5)", Status.STAGNATED, ("cyclic shift", "zero", "nilpotent")),
    ("BiCGStab", Status.BREAKDOWN, ("cyclic shift", "skew-symmetric", "zero")),
    ("LSQR", Status.STAGNATED, INCONSISTENT + INCONSISTENT_TOO),
    ("NormalCG", Status.STAGNATED, INCONSISTENT + INCONSISTENT_TOO),
    ("FixedPoint", Status.DIVERGED, ("A = 4I", "symmetric indefinite", "cyclic shift", "1×1 negative", "wide scale")),
    ("FixedPoint", Status.MAX_STEPS, ("spd 1e3", "A = 1e-3 I")),
    ("Neumann", Status.DIVERGED, ("negative definite", "few eigenvalues")),
    ("OneStep", Status.MAX_STEPS, ("spd 10", "contraction .8")),
    ("Dense", Status.BREAKDOWN, SINGULAR),
    ("Dense, Cholesky", Status.NOT_POSITIVE_DEFINITE, INCONSISTENT),
    ("Dense, Cholesky", Status.NOT_SYMMETRIC, ("nonsymmetric 1e8",)),
    ("Nystrom(10)", Status.MAX_STEPS, ("spd 10", "poisson 1d")),
    ("Nystrom(10)", Status.NOT_POSITIVE_DEFINITE, ("symmetric indefinite", "negative definite", "1×1 negative")),
]


@pytest.mark.parametrize(
    ("row", "system", "status"), [(row, system, status) for row, status, systems in EXPECTED for system in systems]
)
def test_status_names_what_is_wrong(row, system, status):
    a = answer(row, system, gamma=ROWS[row].dampings[0])
    assert a.solution.status is status
    assert a.solution.message.startswith(f"{status.name} after ") and a.solution.message.endswith(status.message)


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize(
    ("row", "system"),
    [
        *itertools.product(["MINRES"], INCONSISTENT),
        *itertools.product(["LSQR", "NormalCG", "Dense"], INCONSISTENT + INCONSISTENT_TOO),
    ],
)
def test_least_squares_solution_of_an_inconsistent_system(row, system, started):
    a = answer(row, system, started)
    assert a.solution.status is (Status.BREAKDOWN if row == "Dense" else Status.STAGNATED)
    r = a.system.sides[0] - a.system.matrices[0] @ a.x[0]
    best = a.system.residuals(a.system.solutions)[0]
    assert norm(a.system.matrices[0].T @ r) <= 1e-9 * a.system.norm[0] * norm(a.system.sides[0])
    assert abs(norm(r) - best) <= 1e-9 * best
    if row != "MINRES" and not started:
        agree(a.x[0], a.system.solutions[0], 1e-8)


@pytest.mark.parametrize("options", [{"rtol": 1e-6}, {"max_steps": 10}, {"max_steps": 60}])
@pytest.mark.parametrize(("factor", "make"), [(3.0, lambda q: 4 * np.eye(20)), (1.5, lambda q: np.eye(20) - 1.5 * q)])
def test_diverged_tells_the_growth_rate(factor, make, options):
    q = with_singular_values(np.ones(20), 3)
    system = System("", make(q), side(20))
    with pytest.warns(hg.solvers.HypergradientWarning, match=f"DIVERGED after .* growing by a factor of {factor:g} a"):
        solution = S.FixedPoint(**options)(system.operator(), system.rhs())
    agree(solution.growth_rate, factor, 1e-9)


@pytest.mark.parametrize(
    ("trace", "factor"),
    [
        ([8.0, 4.0, 2.0, 1.0], 0.5),
        ([8.0, 4.0, torch.nan, torch.nan, 0.5], 0.5),
        ([1.0, 0.0, 1.0], torch.inf),
        ([0.0, 0.0, 0.0], torch.nan),
        ([torch.nan], torch.nan),
        ([[8.0, 2.0], [4.0, 1.0]], [0.5, 0.5]),
    ],
)
def test_growth_rate(trace, factor):
    trace = torch.tensor(trace)
    code = torch.zeros(trace.shape[1:], dtype=torch.long)
    solution = hg.solvers.Solution(torch.zeros(3), code, len(trace) - 1, trace[-1], trace[0], trace)
    torch.testing.assert_close(solution.growth_rate, torch.tensor(factor), equal_nan=True)


@pytest.mark.parametrize("make", [S.CG, S.MINRES, S.Nystrom])
def test_an_operator_that_is_not_declared_symmetric_is_refused(make):
    system = GRID["spd 10"]
    with pytest.raises(TypeError, match=r"symmetric=True.*GMRES, BiCGStab, NormalCG or LSQR"):
        make()(system.operator("none"), system.rhs())


@pytest.mark.parametrize("make", [S.LSQR, S.NormalCG])
def test_an_operator_without_transpose_is_refused(make):
    with pytest.raises(TypeError, match="pass transpose="):
        make()(hg.operators.function(lambda v: 2 * v), torch.ones(3))


def krylov(a: np.ndarray, r: np.ndarray, steps: int) -> np.ndarray:
    """An orthonormal basis of span{r, Ar, …, A^{K−1} r}: [n, K]."""
    basis = np.zeros((len(r), 0))
    for _ in range(steps):
        v = r if not basis.shape[1] else a @ basis[:, -1]
        for _ in range(2):
            v = v - basis @ (basis.T @ v)
        basis = np.column_stack([basis, v / norm(v)])
    return basis


def least_residual(space: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """x₀ + the d of a Krylov space that makes ‖b − A(x₀ + d)‖ least."""

    def solve(a: np.ndarray, b: np.ndarray, x0: np.ndarray | None, steps: int) -> np.ndarray:
        x0 = np.zeros(len(b)) if x0 is None else x0
        v = space(a, b - a @ x0, steps)
        return x0 + v @ np.linalg.lstsq(a @ v, b - a @ x0, rcond=None)[0]

    return solve


def least_energy(a: np.ndarray, b: np.ndarray, x0: np.ndarray | None, steps: int) -> np.ndarray:
    """CG: the least error in the norm of A over the Krylov space."""
    x0 = np.zeros(len(b)) if x0 is None else x0
    v = krylov(a, b - a @ x0, steps)
    return x0 + v @ np.linalg.solve(v.T @ a @ v, v.T @ (b - a @ x0))


def stationary(step: float, more: int, from_b: bool = False) -> Callable[..., np.ndarray]:
    """K + more steps of x ← x + η (b − Ax)."""

    def solve(a: np.ndarray, b: np.ndarray, x0: np.ndarray | None, steps: int) -> np.ndarray:
        x = x0 if x0 is not None else b if from_b else np.zeros(len(b))
        for _ in range(steps + more):
            x = x + step * (b - a @ x)
        return x

    return solve


def scipy_bicgstab(a: np.ndarray, b: np.ndarray, x0: np.ndarray | None, steps: int) -> np.ndarray:
    return scipy.sparse.linalg.bicgstab(a, b, x0, rtol=0, atol=0, maxiter=steps)[0]


SPACE_OF_NORMAL_EQUATIONS = lambda a, r, steps: krylov(a.T @ a, a.T @ r, steps)  # noqa: E731
STEPS = {  # what K steps compute, by dense linear algebra, and on which system
    "CG": (least_energy, "spd 10"),
    "MINRES": (least_residual(krylov), "symmetric indefinite"),
    "GMRES(60)": (least_residual(krylov), "nonsymmetric 10"),
    "BiCGStab": (scipy_bicgstab, "contraction .8"),
    "LSQR": (least_residual(SPACE_OF_NORMAL_EQUATIONS), "nonsymmetric 10"),
    "NormalCG": (least_residual(SPACE_OF_NORMAL_EQUATIONS), "nonsymmetric 10"),
    "FixedPoint": (stationary(1, 0), "contraction .8"),
    "Neumann": (stationary(ETA, 1), "contraction .8"),
    "Optimizer": (stationary(1, 0, from_b=True), "contraction .8"),
}


@pytest.mark.parametrize("gamma", [0.0, 0.3])
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("row", STEPS)
def test_value_of_k_steps(row, steps, started, gamma):
    oracle, system = STEPS[row][0], GRID[STEPS[row][1]]
    x0 = system.start() if started else None
    solution = ROWS[row].solver(max_steps=steps, damping=gamma)(system.operator(), system.rhs(), x0)
    assert solution.status is Status.CONVERGED
    truth = oracle(system.damped(gamma).a, system.b, None if x0 is None else x0.numpy(), steps)
    agree(solution.value, truth, 1e-11)


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("row", ROWS)
def test_fixed_steps_cost_what_they_say_and_are_success(row, started):
    system = GRID["spd 10"]
    for steps in (0, 1, 3, 7) if ROWS[row].iterative else (1,):
        op = system.operator(ROWS[row].tag)
        solution = ROWS[row].solver(max_steps=steps)(op, system.rhs(), system.start() if started else None)
        # The residual of x0 is one more; Optimizer has its own in each step, FixedPoint's first step is free from zero.
        first = started and row != "Optimizer" and not (row == "FixedPoint" and steps == 0)
        assert op.products == ROWS[row].products(steps, system.n) + 1 + first
        assert solution.status is Status.CONVERGED and solution.ok
        assert solution.steps == steps and len(solution.trace) == steps + 1
        damped = system.damped(ROWS[row].dampings[0])
        residual, slack = damped.residuals(solution.value.numpy())[0], damped.rounding(solution.value.numpy())[0]
        assert abs(float(solution.residual_norm) - residual) <= slack
        assert abs(float(solution.trace[-1]) - residual) <= 10 * slack
        agree(solution.rhs_norm, norm(system.b), 1e-14)
        agree(solution.relative_residual, solution.residual_norm / norm(system.b), 1e-14)


@pytest.mark.parametrize("row", [row for row in ROWS if ROWS[row].iterative])
def test_no_steps_give_the_start(row):
    system = GRID["spd 10"]
    op, b, x0 = system.operator(), system.rhs(), system.start()
    nothing = {"Neumann": ETA * b, "Optimizer": b}.get(row, torch.zeros_like(b))
    agree(ROWS[row].solver(max_steps=0)(op, b).value, nothing, 1e-15)
    start = x0 + ETA * (b - op(x0)) if row == "Neumann" else x0
    agree(ROWS[row].solver(max_steps=0)(op, b, x0).value, start, 1e-15)


def test_one_step_is_b_or_a_step_from_x0():
    system = GRID["spd 10"]
    op, b, x0 = system.operator(), system.rhs(), system.start()
    assert torch.equal(S.OneStep()(op, b).value, b)
    agree(S.OneStep()(op, b, x0).value, x0 + b - op(x0), 1e-15)


class Reads(TorchDispatchMode):
    """Counts what would wait for the device."""

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


@pytest.fixture
def accelerator(monkeypatch):
    """As if the tensors stood on a device that a read has to wait for."""
    monkeypatch.setattr("hypergrad.solvers._solver.FREE_TO_READ", ())


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("system", ["spd 10", "batch spd", "NaN in A"])
@pytest.mark.parametrize("row", LAZY)
def test_fixed_steps_never_read_from_the_device(row, system):
    solver = ROWS[row].solver(max_steps=7, on_failure="ignore")
    for x0 in (None, GRID[system].start()):
        count, solution = reads(solver, GRID[system], x0)
        assert count == 0
        with Reads() as counted:
            bool(solution.code.any())
        assert counted.count > 0  # the counter sees reads


@pytest.mark.parametrize("batch_shape", [(), (3,)])
@pytest.mark.parametrize("row", LAZY)
def test_fixed_steps_run_on_the_meta_device_where_every_read_raises(row, batch_shape):
    """torch.compile and graph capture need as much."""
    op = hg.operators.matrix(torch.empty(*batch_shape, 6, 6, device="meta"), symmetric=True)
    b = torch.empty(*batch_shape, 6, device="meta")
    for x0 in (None, b):
        solution = ROWS[row].solver(max_steps=7, on_failure="ignore")(op, b, x0)
        assert solution.value.shape == b.shape and solution.code.shape == batch_shape


@pytest.mark.parametrize("options", [{"max_steps": 7}, {"max_steps": 300, "rtol": 1e-9}])
@pytest.mark.parametrize("system", ["spd 10", "spd 1e6", "NaN in A", "symmetric indefinite", "b = 0", "1×1", "A = 4I"])
@pytest.mark.parametrize("row", ["CG", "FixedPoint", "Neumann"])
def test_numbers_on_the_cpu_and_tensors_elsewhere_give_the_same(row, system, options, monkeypatch):
    solver = ROWS[row].solver(on_failure="ignore", check_every=1, **options)
    op, b = GRID[system].operator(), GRID[system].rhs()
    numbers = solver(op, b)
    monkeypatch.setattr("hypergrad.solvers._solver.FREE_TO_READ", ())
    monkeypatch.setattr(SolverSystem, "look", lambda self, scalar: scalar)
    tensors = solver(op, b)
    assert (numbers.status, numbers.steps) == (tensors.status, tensors.steps)
    torch.testing.assert_close(numbers.value, tensors.value, rtol=1e-12, atol=0.0, equal_nan=True)
    torch.testing.assert_close(numbers.trace, tensors.trace, rtol=1e-12, atol=0.0, equal_nan=True)


@pytest.mark.parametrize(
    ("dtype", "rtol", "sizes"),
    [
        # 1e-301 to 1e301; ‖b‖² is near enough to 1 up to 2^±170, and a normal number up to 2^±511.
        (torch.float64, 1e-8, (-1000, -900, -532, -260, -256, -252, -90, -85, -80, -60)),
        # 1e-32 to 1e32; 2^±21 and 2^±63.
        (torch.float32, 1e-4, (-105, -80, -73, -70, -60, -34, -33, -32, -31, -30)),
        # b is scaled by its largest entry.
        (torch.bfloat16, 1e-1, (-105, -60, -30)),
    ],
)
@pytest.mark.parametrize("row", ["CG", "GMRES(5)", "NormalCG"])
def test_the_size_of_b_changes_nothing_but_the_size_of_x(row, dtype, rtol, sizes):
    """By powers of two, through the sizes at which b is scaled near 1 before and at which it is left as it is."""
    op, b = GRID["spd 10"].operator(dtype=dtype), GRID["spd 10"].rhs(dtype)
    one = ROWS[row].solver(rtol=rtol)(op, b)
    assert one.ok
    for k in (*sizes, *range(-12, 13), *(-k for k in sizes)):
        solution = ROWS[row].solver(rtol=rtol)(op, b * 2.0**k)
        assert solution.status is one.status and solution.steps == one.steps
        assert torch.equal(solution.value, one.value * 2.0**k) and torch.equal(solution.trace, one.trace * 2.0**k)
        assert solution.residual_norm == one.residual_norm * 2.0**k and solution.rhs_norm == one.rhs_norm * 2.0**k


@pytest.mark.parametrize("system", ["nonsymmetric 10", "nonsymmetric 1e3", "contraction .8", "spd 1e3"])
def test_gmres_stops_at_the_first_step_that_is_good_enough(system):
    """What it tracks by rotations is the least residual, by dense least squares over the Krylov space."""
    system = GRID[system]
    op, b = system.operator(), system.rhs()
    rtol, krylov, wanted = 1e-3, [b / b.norm()], 0
    stop = 0.9 * rtol * b.norm()
    while True:
        image = torch.stack([op(v) for v in krylov], -1)
        least = (image @ (torch.linalg.pinv(image) @ b) - b).norm()
        wanted += 1
        if least <= stop:
            break
        q, _ = torch.linalg.qr(torch.stack([*krylov, op(krylov[-1])], -1))
        krylov = list(q.unbind(-1))
    assert wanted > 3
    assert S.GMRES(restart=200, rtol=rtol)(op, b).steps == wanted


def test_a_step_that_float32_cannot_hold_is_reported():
    """‖A‖ = 1e-39: the step is 1e39, beyond float32, and so is the solution."""
    op = hg.operators.matrix(1e-39 * torch.eye(3), symmetric=True)
    for options in ({"max_steps": 2}, {"rtol": 1e-4}):
        solution = S.CG(on_failure="ignore", **options)(op, torch.ones(3))
        assert solution.status is Status.NON_FINITE


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("row", [*KRYLOV, "FixedPoint", "Neumann", "Optimizer"])
def test_check_every_saves_reads_and_changes_no_answer(row):
    system = GRID["contraction .8" if row not in ("CG", "MINRES") else "spd 10"]
    (often, one), (seldom, five) = (
        reads(ROWS[row].solver(max_steps=300, rtol=1e-10, on_failure="ignore", check_every=every), system)
        for every in (1, 5)
    )
    assert one.status is five.status is Status.CONVERGED
    assert seldom <= often / 2
    if row in (
        "GMRES(5)",
        "GMRES(60)",
        "FixedPoint",
        "Neumann",
        "Optimizer",
    ):  # these use the steps until the next look
        assert five.residual_norm <= 1e-10 * norm(system.b)
        agree(five.value, one.value, 2e-10 * system.condition[0])
    else:
        agree(five.value, one.value, 1e-14)


@pytest.mark.parametrize("row", [*KRYLOV, "FixedPoint"])
@pytest.mark.parametrize("system", ["spd 10", "spd 1e3"])
def test_warm_start_at_the_solution_does_nothing(row, system):
    given = GRID[system]
    op, x0 = given.operator(), torch.tensor(given.solutions[0])
    solution = ROWS[row].solver(max_steps=LIMIT, rtol=1e-10)(op, given.rhs(), x0)
    assert solution.status is Status.CONVERGED and solution.steps == 0 and op.products == 2
    assert torch.equal(solution.value, x0)


@pytest.mark.parametrize("row", [*KRYLOV, "FixedPoint"])
def test_warm_start_nearby_saves_steps(row):
    system = GRID["contraction .8" if row not in ("CG", "MINRES") else "spd 10"]
    solver = ROWS[row].solver(max_steps=LIMIT, rtol=1e-8)
    near = torch.tensor(system.solutions[0] * (1 + 1e-5 * side(system.n)))
    cold, warm = (solver(system.operator(), system.rhs(), x0) for x0 in (None, near))
    assert warm.status is cold.status is Status.CONVERGED and warm.steps < cold.steps


@pytest.mark.parametrize("row", ROWS)
def test_damping_is_a_system_with_a_larger_diagonal(row):
    given = GRID["spd 1e3"]
    for started in (False, True):
        x0 = given.start() if started else None
        damped = ROWS[row].solver(max_steps=5, damping=0.3)(given.operator(ROWS[row].tag), given.rhs(), x0)
        if row.startswith("Nystrom"):
            continue
        plain = ROWS[row].solver(max_steps=5)(given.damped(0.3).operator(ROWS[row].tag), given.rhs(), x0)
        agree(damped.value, plain.value, 1e-12)
        assert abs(damped.residual_norm - plain.residual_norm) <= 1e-12 * norm(given.b)


@pytest.mark.parametrize("row", [row for row in ROWS if row.startswith("Nystrom")])
def test_nystrom_of_full_rank_is_the_damped_inverse(row):
    n = 10
    system = System("", with_spectrum(logspace(1e3, n), 3), side(n)).damped(0.3)
    solution = ROWS[row].solver(damping=0.3)(System("", system.a - 0.3 * np.eye(n), system.b).operator(), system.rhs())
    agree(solution.value, system.solutions[0], 1e-11)


def test_nystrom_of_an_exactly_low_rank_operator_is_the_damped_inverse():
    n = 30
    a = with_spectrum(np.r_[np.linspace(1, 5, 8), np.zeros(n - 8)], 3)
    system = System("", a, side(n)).damped(0.1)
    solution = S.Nystrom(rank=10, damping=0.1)(hg.operators.matrix(torch.tensor(a), symmetric=True), system.rhs())
    agree(solution.value, system.solutions[0], 1e-11)
    assert solution.relative_residual < 1e-11


@pytest.mark.parametrize("system", BATCHES)
@pytest.mark.parametrize("row", ROWS)
def test_batched_is_looped(row, system):
    """The same numbers after the same steps; to a tolerance, as good an answer and the same status for each."""
    given = GRID[system]
    x0 = given.start()
    for options in ({"max_steps": 4}, {"max_steps": 30, "rtol": 1e-6}):
        solver = ROWS[row].solver(**options, on_failure="ignore")
        together = solver(given.operator(ROWS[row].tag), given.rhs(), x0)
        for i, status in enumerate(together.statuses):
            single = given.single(i)
            alone = solver(single.operator(ROWS[row].tag), single.rhs(), x0[i])
            assert status is alone.status
            if "rtol" not in options and given.regular[i]:
                # Rounding grows with the condition number, for methods on AᵀA with its square.
                tolerance = 1e-12 if given.condition[i] <= 1.01e3 else 1e-19 * given.condition[i] ** 2
                assert norm(together.value[i] - alone.value) <= tolerance * (norm(alone.value) + norm(x0[i]))
                traces = together.trace[:, i].nan_to_num(), alone.trace.nan_to_num()  # NaN where it was not taken
                assert abs(together.residual_norm[i] - alone.residual_norm) <= tolerance * traces[1].max()
                assert (traces[0] - traces[1]).abs().max() <= tolerance * traces[1].max()
            elif "rtol" in options and status is Status.CONVERGED:
                assert together.residual_norm[i] <= 1e-6 * together.rhs_norm[i]


@pytest.mark.parametrize("row", [row for row in ROWS if row not in ("OneStep", "Dense, Cholesky", "Nystrom(10)")])
def test_on_failure_warns_raises_or_says_nothing(row):
    name = type(ROWS[row].make()).__name__
    system = GRID["NaN in b"]

    def solve(**options: Any) -> S.Solution:
        return ROWS[row].solver(max_steps=3, **options)(system.operator(), system.rhs())

    message = (
        rf"^{name}: NON_FINITE after \d+ steps at a relative residual of .*: NaN or infinity in the right hand side"
    )
    with pytest.warns(S.HypergradientWarning, match=message) as caught:
        warned = solve()
    assert [w.filename for w in caught] == [__file__]
    with pytest.raises(S.SolverError, match=message) as raised:
        solve(on_failure="raise")
    ignored = solve(on_failure="ignore")
    assert warned.status is raised.value.solution.status is ignored.status is Status.NON_FINITE
    assert not ignored.ok and isinstance(raised.value, ValueError)


def test_relative_residual_of_nan_is_nan():
    assert answer("CG", "NaN in b").solution.relative_residual.isnan()


def test_a_failure_in_a_batch_is_named_by_its_index():
    system = GRID["batch spd, one indefinite"]
    with pytest.warns(S.HypergradientWarning, match="CG: 1 of 3 systems, the first at index 1: NOT_POSITIVE_DEFINITE"):
        solution = S.CG(rtol=1e-8)(system.operator("symmetric"), system.rhs())
    assert solution.statuses == [Status.CONVERGED, Status.NOT_POSITIVE_DEFINITE, Status.CONVERGED]
    assert solution.status is Status.NOT_POSITIVE_DEFINITE


@pytest.mark.parametrize(
    "row", [row for row in ROWS if not row.startswith(("OneStep", "Nystrom", "Neumann", "Optimizer"))]
)
def test_the_default_is_a_tolerance_and_steps_alone_are_not(row):
    system = GRID["contraction .8" if ROWS[row].tag is None else "spd 10"]
    for dtype, rtol in ((torch.float64, 1e-6), (torch.float32, 1e-4)):
        solution = ROWS[row].make()(system.operator(ROWS[row].tag, dtype), system.rhs(dtype))
        assert solution.status is Status.CONVERGED and solution.relative_residual <= rtol
    with pytest.warns(S.HypergradientWarning, match="MAX_STEPS|STAGNATED"):
        ROWS[row].solver(max_steps=1, rtol=0.0)(system.operator(ROWS[row].tag), system.rhs())


@pytest.mark.parametrize(("rtol", "atol"), [(None, 1e-3), (1e-9, 1e-3), (1e-3, 1e-9), (None, 1e3)])
def test_atol_and_rtol_are_joined_by_the_larger(rtol, atol):
    system = GRID["spd 10"]
    b = 100 * system.rhs()
    solution = S.CG(rtol=rtol, atol=atol)(system.operator(), b)
    goal = max(atol, (rtol or 0) * float(b.norm()))
    assert solution.status is Status.CONVERGED and solution.residual_norm <= goal
    assert solution.steps == 0 or solution.trace[-2] > 0.9 * goal  # and no step too many


def test_inputs_and_random_state_are_left_alone():
    system = GRID["spd 10"]
    b, x0 = system.rhs().requires_grad_(), system.start().requires_grad_()
    before, state = (b.detach().clone(), x0.detach().clone()), torch.get_rng_state()
    for row in ROWS.values():
        solution = row.solver(max_steps=3)(system.operator(row.tag), b, x0)
        assert not solution.value.requires_grad and solution.value.data_ptr() not in (b.data_ptr(), x0.data_ptr())
    assert torch.equal(b, before[0]) and torch.equal(x0, before[1]) and b.grad is None
    assert torch.equal(torch.get_rng_state(), state)


WIDE = System("", with_spectrum(logspace(1e2, 30), 12) * np.outer(*2 * [np.logspace(0, 3, 30)]), side(30))
DIAGONAL = torch.tensor(1 / np.diag(WIDE.a))
PRECONDITIONERS = {
    "operator": hg.operators.matrix(torch.diag(DIAGONAL), positive_definite=True),
    "function": lambda r: DIAGONAL * r,
}


def preconditioned_space(a: np.ndarray, r: np.ndarray, steps: int) -> np.ndarray:
    m = DIAGONAL.numpy()
    return krylov(m[:, None] * a, m * r, steps)


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("preconditioner", PRECONDITIONERS.values(), ids=PRECONDITIONERS)
def test_value_of_k_preconditioned_steps(preconditioner, steps):
    """CG has the least error in the norm of A over K(M⁻¹A, M⁻¹b), MINRES the least residual in that of M⁻¹."""
    a, b, v = WIDE.a, WIDE.b, preconditioned_space(WIDE.a, WIDE.b, steps)
    cg = S.CG(max_steps=steps, preconditioner=preconditioner)(WIDE.operator(), WIDE.rhs())
    agree(cg.value, v @ np.linalg.solve(v.T @ a @ v, v.T @ b), 1e-9)
    minres = S.MINRES(max_steps=steps, preconditioner=preconditioner)(WIDE.operator(), WIDE.rhs())
    root = np.sqrt(DIAGONAL.numpy())
    agree(minres.value, v @ np.linalg.lstsq(root[:, None] * (a @ v), root * b, rcond=None)[0], 1e-9)


@pytest.mark.parametrize("make", [S.CG, S.MINRES])
@pytest.mark.parametrize(
    "preconditioner", [*PRECONDITIONERS.values(), S.Nystrom(rank=10)], ids=[*PRECONDITIONERS, "Nystrom"]
)
def test_preconditioned_trace_is_the_true_residual(make, preconditioner):
    for k in range(8):
        solution = make(max_steps=k, preconditioner=preconditioner)(WIDE.operator(), WIDE.rhs())
        traced = make(max_steps=8, preconditioner=preconditioner)(WIDE.operator(), WIDE.rhs()).trace[k]
        agree(traced, WIDE.residuals(solution.value.numpy())[0], 1e-8)


@pytest.mark.parametrize("make", [S.CG, S.MINRES])
def test_a_preconditioner_saves_steps_and_keeps_the_answer(make):
    plain = make(rtol=1e-8)(WIDE.operator(), WIDE.rhs())
    for preconditioner in PRECONDITIONERS.values():
        solution = make(rtol=1e-8, preconditioner=preconditioner)(WIDE.operator(), WIDE.rhs())
        assert solution.status is Status.CONVERGED and solution.steps < plain.steps / 2
        assert WIDE.residuals(solution.value.numpy()) <= 1e-8 * norm(WIDE.b) + WIDE.rounding(solution.value.numpy())
    exact = torch.tensor(np.linalg.inv(WIDE.a))
    once = make(rtol=1e-8, preconditioner=lambda r: exact @ r)(WIDE.operator(), WIDE.rhs())
    assert once.status is Status.CONVERGED and once.steps <= 2


def test_a_preconditioner_may_take_pytrees_and_batches():
    system, trees = GRID["batch spd"], (lambda r: {"x": 2 * r["x"]})
    op = hg.operators.function(
        lambda v: {"x": (torch.tensor(system.a) @ v["x"][..., None])[..., 0]}, symmetric=True, batch_dims=1
    )
    solution = S.CG(rtol=1e-10, preconditioner=trees)(op, {"x": system.rhs()})
    plain = S.CG(rtol=1e-10)(op, {"x": system.rhs()})
    agree(solution.value["x"], plain.value["x"], 1e-10)


@pytest.mark.parametrize("make", [S.CG, S.MINRES])
def test_nystrom_preconditioner_beats_plain_by_orders_of_magnitude(make):
    """Eigenvalues 10^(−j/3), damping 10⁻³: five steps with a sketch of rank 10 against five plain ones."""
    n, gamma = 200, 1e-3
    system = System("", with_spectrum(10.0 ** (-np.arange(n) / 3), 13), side(n))
    truth = system.damped(gamma).solutions[0]

    def error(preconditioner: Any) -> float:
        op = system.operator()
        value = make(max_steps=5, damping=gamma, preconditioner=preconditioner)(op, system.rhs()).value.numpy()
        assert op.products == 6 + 10 * (preconditioner is not None)
        return norm(value - truth) / norm(truth)

    assert error(S.Nystrom(rank=10, damping=gamma)) < error(None) / 300
    # Here damping is part of A, so that the sketch sees it too.
    op = system.damped(gamma).operator()
    inside = make(max_steps=5, preconditioner=S.Nystrom(rank=10, damping=gamma))(op, system.rhs()).value.numpy()
    assert norm(inside - truth) / norm(truth) < error(None) / 3


@pytest.mark.parametrize(
    "system", ["spd 10", "spd 1e3", "contraction .8", "nonsymmetric 10", "symmetric indefinite", "batch spd"]
)
@pytest.mark.parametrize("row", ROWS)
def test_float32_reaches_what_the_condition_number_allows(row, system):
    """A reachable tolerance is reached; an unreachable one leaves the limit of rounding, and no false claim."""
    eps = float(np.finfo(np.float32).eps)
    given = dataclasses.replace(GRID[system], a=GRID[system].a.astype(np.float32).astype(np.float64))
    given = dataclasses.replace(given, b=given.b.astype(np.float32).astype(np.float64))
    damped = given.damped(ROWS[row].dampings[0])
    op, b = given.operator(ROWS[row].tag, torch.float32), given.rhs(torch.float32)
    solvable = [s and c <= 1e3 for s, c in zip(ROWS[row].solves(damped), damped.condition, strict=True)]
    for rtol in (5e-2, 1e-4, 1e-10):
        solution = ROWS[row].solver(max_steps=400, rtol=rtol, on_failure="ignore")(op, b)
        assert solution.value.dtype == solution.residual_norm.dtype == torch.float32
        x = solution.value.numpy().astype(np.float64).reshape(damped.sides.shape)
        limit = damped.rounding(x) * eps / np.finfo(np.float64).eps
        for i, status in enumerate(solution.statuses):
            residual, goal = damped.residuals(x)[i], rtol * norm(damped.sides[i])
            if status is Status.CONVERGED:
                assert residual <= goal + limit[i]
            if solvable[i]:
                # What rounding leaves of b outside Nystrom's basis is divided by its damping.
                loss = damped.norm[i] / ROWS[row].dampings[0] if "Nystrom" in row else 1
                reachable = rtol > 1e-6 and (loss == 1 or goal >= limit[i] * loss)
                assert status is Status.CONVERGED or not reachable
                assert residual <= goal + limit[i] * loss
                error = norm(x[i] - damped.solutions[i]) / norm(damped.solutions[i])
                assert error <= damped.condition[i] * (rtol + 4 * damped.n * eps * loss)


CONFIGURATION = [
    ("rtol", -1.0),
    ("rtol", float("nan")),
    ("atol", float("inf")),
    ("atol", -1e-3),
    ("damping", -0.1),
    ("damping", float("nan")),
    ("on_failure", "shout"),
]


@pytest.mark.parametrize(
    ("make", "field", "value"),
    [
        *(
            (make, *wrong)
            for make in (S.CG, S.MINRES, S.GMRES, S.Neumann, S.OneStep, S.Dense, S.Nystrom)
            for wrong in CONFIGURATION
        ),
        *((make, "max_steps", -1) for make in (S.CG, S.LSQR, S.FixedPoint, S.Optimizer)),
        (S.CG, "max_steps", 2.5),
        (S.CG, "check_every", 0),
        (S.GMRES, "restart", 0),
        (S.GMRES, "restart", 3.0),
        (S.Neumann, "step_size", 0.0),
        (S.Neumann, "step_size", float("inf")),
        (S.Nystrom, "rank", 0),
        (S.Nystrom, "damping", 0.0),
    ],
)
def test_wrong_configuration_is_named(make, field, value):
    with pytest.raises(ValueError, match=f"{field} must be .*got {value!r}"):
        make(**{field: value})


@pytest.mark.parametrize("row", ROWS)
def test_configuration_is_frozen_and_by_keyword(row):
    solver = ROWS[row].make()
    with pytest.raises(dataclasses.FrozenInstanceError):
        solver.rtol = 1.0
    with pytest.raises(TypeError):
        type(solver)(10)
    assert dataclasses.replace(solver, rtol=0.5).rtol == 0.5 and solver.rtol is None


def test_x0_unlike_b_is_named():
    system = GRID["spd 10"]
    with pytest.raises(
        ValueError, match=r"x0 must be like b: expected shape \(20,\), float64 .* got shape \(3,\), float32"
    ):
        S.CG()(system.operator(), system.rhs(), torch.zeros(3))
    with pytest.raises(ValueError, match="x0 must have the structure of b"):
        S.CG()(system.operator(), system.rhs(), [system.rhs()])


def tree_of(flat: torch.Tensor, name: str) -> Any:
    """24 numbers in a container."""
    a, b, c, d = flat.split([6, 1, 8, 9])
    match name:
        case "list":
            return [a.reshape(2, 3), b, c, d]
        case "tuple":
            return (a, b.reshape(()), c.reshape(2, 2, 2), d.reshape(3, 3))
        case "dict":
            return {"z": a, "a": b.reshape(1, 1), "m": c, "b": d}
        case "nested":
            return {"layers": [(a.reshape(3, 2), b.reshape(())), {"w": c}], "last": d}
        case "strided":
            return [a.reshape(2, 3).T.contiguous().T, b, c.repeat_interleave(2)[::2], d.reshape(3, 3).T]
        case "channels last":
            image = flat.reshape(1, 4, 3, 2).contiguous(memory_format=torch.channels_last)
            return {"image": image, "scalar": flat[0].clone()}
        case "mixed dtypes":
            return {"double": [a, d], "single": (b.reshape(()).float(), c.float())}
    raise KeyError(name)


TREES = ("list", "tuple", "dict", "nested", "strided", "channels last", "mixed dtypes")


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("row", ROWS)
def test_pytrees_come_back_as_they_went_in(row, tree):
    """The same numbers as for one flat tensor, in b's own containers, shapes and dtypes."""
    b = tree_of(torch.tensor(side(24)), tree)
    x0 = optree.tree_map(lambda leaf: 0.5 * leaf + 1, b)
    leaves, spec = optree.tree_flatten(b)
    sizes = [leaf.numel() for leaf in leaves]
    spread = {"spd": with_spectrum(logspace(10, sum(sizes)), 1), "any": None}
    a = torch.tensor(spread["spd"])
    if ROWS[row].tag is None:
        a = a + 0.1 * torch.tensor(np.triu(np.ones(a.shape), 1))

    def flat(v: Any) -> torch.Tensor:
        return torch.cat([leaf.double().reshape(-1) for leaf in optree.tree_leaves(v)])

    def product(m: torch.Tensor) -> Callable[[Any], Any]:
        def apply(v: Any) -> Any:
            assert optree.tree_structure(v) == spec
            parts = (m @ flat(v)).split(sizes)
            return optree.tree_unflatten(
                spec, [p.reshape(b.shape).to(b.dtype) for p, b in zip(parts, leaves, strict=True)]
            )

        return apply

    tags = {ROWS[row].tag: True} if ROWS[row].tag else {}
    op = hg.operators.function(product(a), product(a.T), **tags)
    solution = ROWS[row].solver(max_steps=5)(op, b, x0)
    plain = ROWS[row].solver(max_steps=5)(hg.operators.matrix(a, **tags), flat(b), flat(x0))
    assert optree.tree_structure(solution.value) == spec
    for value, leaf in zip(optree.tree_leaves(solution.value), leaves, strict=True):
        assert value.shape == leaf.shape and value.dtype == leaf.dtype
    # In float32 leaves rounding is of 1e-7, which methods on AᵀA multiply by κ² = 100.
    agree(flat(solution.value), plain.value, 1e-12 if tree != "mixed dtypes" else 1e-4)
    assert solution.residual_norm.dtype == torch.float64


@pytest.mark.parametrize("row", ["CG", "MINRES", "GMRES(5)", "BiCGStab", "LSQR", "FixedPoint", "Dense", "Nystrom(40)"])
def test_two_batch_axes(row):
    """[2, 3, n] as six systems: the numbers of [6, n]."""
    a = np.stack([with_spectrum(np.linspace(0.5, 1.5, 5), i) for i in range(6)])
    b = np.stack([side(5, i) for i in range(6)])
    one = hg.operators.matrix(torch.tensor(a), symmetric=True)
    grid = torch.tensor(a).reshape(2, 3, 5, 5)
    two = hg.operators.function(
        lambda v: (grid @ v[..., None])[..., 0], lambda v: (grid @ v[..., None])[..., 0], symmetric=True, batch_dims=2
    )
    solver = ROWS[row].solver(max_steps=3)
    flat, square = solver(one, torch.tensor(b)), solver(two, torch.tensor(b).reshape(2, 3, 5))
    agree(square.value.reshape(6, 5), flat.value, 1e-13)
    assert square.residual_norm.shape == square.code.shape == (2, 3) and len(square.statuses) == 6


@pytest.mark.parametrize("size", [1, 7, 20, 100])
def test_dense_takes_columns_in_batches(size):
    system = GRID["nonsymmetric 10"]
    agree(S.Dense(batch_size=size)(system.operator(), system.rhs()).value, system.solutions[0], 1e-12)


OPTIMIZERS = {
    "SGD with a schedule": lambda p: (o := torch.optim.SGD(p, lr=0.5), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=3),
}


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e3])
@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizer_steps_in_the_users_own_units(build, size):
    """The same numbers as the optimizer run by hand on ½xᵀAx − bᵀx, whose learning rates know no scaling."""
    system = GRID["spd 10"]
    a, b = torch.tensor(system.a), size * system.rhs()
    solution = S.Optimizer(max_steps=6, build=build)(system.operator(), b)
    x = b.clone().requires_grad_()
    built = build([x])
    optimizer, scheduler = built if isinstance(built, tuple) else (built, None)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = 0.5 * x @ a @ x - b @ x
        loss.backward()
        return loss

    for _ in range(6):
        optimizer.step(closure)
        if scheduler is not None:
            scheduler.step()
    agree(solution.value, x.detach(), 1e-10)
    assert solution.steps == 6 and len(solution.trace) == 7
    agree(solution.trace[0], system.residuals(b.numpy() / size)[0] * size, 1e-12)


def test_lbfgs_solves_a_system_it_can():
    system = GRID["spd 10"]
    solution = S.Optimizer(
        max_steps=60, rtol=1e-8, build=lambda p: torch.optim.LBFGS(p, tolerance_grad=0, tolerance_change=0)
    )(system.operator(), system.rhs())
    assert solution.status is Status.CONVERGED
    agree(solution.value, system.solutions[0], 1e-7)


def test_refinement_reaches_the_tolerance_where_the_recursion_alone_does_not():
    """MINRES's own residual is too hopeful at condition 10⁶; the rest of a batch is left as it was."""
    hard, easy = GRID["spd 1e6"], GRID["spd 10"]
    failing = GRID["symmetric indefinite"]
    together = System("", np.stack([hard.a, easy.a, failing.a]), np.stack([hard.b, easy.b, failing.b]))
    for make, last in ((S.MINRES, Status.CONVERGED), (S.CG, Status.NOT_POSITIVE_DEFINITE)):
        solution = make(rtol=1e-10, max_steps=300, on_failure="ignore")(together.operator(), together.rhs())
        assert solution.statuses == [Status.CONVERGED, Status.CONVERGED, last]
        alone = make(rtol=1e-10, max_steps=300, on_failure="ignore")(failing.operator(), failing.rhs())
        agree(solution.value[2], alone.value, 1e-9)
    once = S.MINRES(max_steps=73)(hard.operator(), hard.rhs())
    assert once.residual_norm > 1e-9 * once.rhs_norm  # so the refinement was needed


@pytest.mark.parametrize("row", ["FixedPoint", "Neumann"])
def test_a_diverging_system_in_a_batch_is_named(row):
    n = 5
    a = np.stack([np.eye(n), -4 * np.eye(n), 0.9 * np.eye(n)])
    system = System("", a, np.stack([side(n, i) for i in range(3)]))
    for options in ({"max_steps": 40}, {"max_steps": 60, "rtol": 1e-6}):
        solution = ROWS[row].solver(**options, on_failure="ignore")(system.operator(), system.rhs())
        assert solution.statuses == [Status.CONVERGED, Status.DIVERGED, Status.CONVERGED]


@pytest.mark.parametrize("row", [row for row in ROWS if row != "Optimizer"])
def test_a_start_far_out_is_not_believed(row):
    """x0 of size 1 for b of size 1e-25: what is left of x0 by rounding is larger than b."""
    system = GRID["b of 1e-20"]
    given = dataclasses.replace(system, b=1e-5 * system.b)
    x0 = torch.tensor(side(system.n))
    solution = ROWS[row].solver(max_steps=40, rtol=1e-6, on_failure="ignore")(given.operator(), given.rhs(), x0)
    residual = given.damped(ROWS[row].dampings[0]).residuals(solution.value.numpy())[0]
    assert solution.status is not Status.CONVERGED or residual <= 1e-6 * norm(given.b)


@pytest.mark.parametrize("system", ["nonsymmetric 1e8", "spd 1e6", "wide scale", "triangular, far from normal"])
def test_a_whole_cycle_of_gmres_is_backward_stable(system):
    """n steps leave what rounding does: the basis stays orthogonal where A is badly conditioned."""
    given = GRID[system]
    x = S.GMRES(max_steps=given.n, restart=given.n)(given.operator(), given.rhs()).value.numpy()
    assert given.residuals(x) <= given.rounding(x)


@pytest.mark.parametrize("system", ["cyclic shift", "skew-symmetric"])
def test_bicgstab_keeps_the_iterate_before_a_breakdown(system):
    solution = answer("BiCGStab", system).solution
    assert solution.status is Status.BREAKDOWN and not solution.value.any()


def test_a_system_at_rest_counts_no_steps_of_others():
    """Some of these systems are taken up again; the others' own residuals stand a little above their limit by then."""
    a = np.stack([with_spectrum(logspace(10.0**k, 20), k + 2) for k in range(2, 7)])
    b = np.stack([side(20, seed) for seed in range(4, 9)])
    for rtol in np.logspace(-14, -11, 10):
        solver = S.CG(rtol=float(rtol), max_steps=500, on_failure="ignore")
        together = solver(hg.operators.matrix(torch.tensor(a), symmetric=True), torch.tensor(b))
        for i in range(2):
            alone = solver(hg.operators.matrix(torch.tensor(a[i]), symmetric=True), torch.tensor(b[i]))
            if alone.ok and together.statuses[i] is Status.CONVERGED:
                assert abs(int(together.steps[i]) - alone.steps) <= 3


def test_going_on_has_all_the_steps_that_are_left():
    op = hg.operators.matrix(torch.tensor(with_spectrum(logspace(1e8, 60), 1)), symmetric=True)
    b = torch.tensor(side(60))
    free = S.CG(rtol=1e-11, max_steps=5000, on_failure="ignore")(op, b)
    bound = S.CG(rtol=1e-11, max_steps=int(free.steps), on_failure="ignore")(op, b)
    assert bound.steps == free.steps and torch.equal(bound.value, free.value)
