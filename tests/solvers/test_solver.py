"""Every solver on every system of `systems.GRID` gives a right value or a status of failure; then single properties.

A new solver is one row of `solver_rows.ROWS`.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import optree
import pytest
import scipy.sparse.linalg
import torch

import hypergrad as hg
from helpers import default_device
from hypergrad import solvers as S
from hypergrad.solvers import Status
from solver_rows import (
    BATCHES,
    ETA,
    KRYLOV,
    LAZY,
    LIMIT,
    ROWS,
    Reads,
    agree,
    answer,
    answers,
    count,
    krylov,
    reads,
)
from systems import GRID, logspace, norm, side, with_spectrum


@pytest.mark.parametrize("row", ROWS)
def test_grid(row):
    """No failure is silent, promised systems are solved, residuals and traces are true, and NaN has its status.

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


def fixed(solution: S.Solution, converged: bool = False) -> Status:
    """The status due after a fixed number of steps: DIVERGED if the residual is no smaller than that of zero."""
    if solution.relative_residual >= 1:
        return Status.DIVERGED
    return Status.CONVERGED if converged else Status.COMPLETED


INCONSISTENT = ("singular symmetric inconsistent", "singular indefinite inconsistent", "zero")


INCONSISTENT_TOO = ("singular inconsistent", "nilpotent")


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
    ("Dense", Status.BREAKDOWN, INCONSISTENT + INCONSISTENT_TOO),
    ("Dense", Status.CONVERGED, ("singular symmetric consistent", "singular consistent")),
    ("Dense, Cholesky", Status.NOT_POSITIVE_DEFINITE, INCONSISTENT),
    ("Dense, Cholesky", Status.NOT_SYMMETRIC, ("nonsymmetric 1e8",)),
    ("Nystrom(10)", Status.DIVERGED, ("spd 10", "poisson 1d")),
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
    solver = ROWS[row].solver(max_steps=steps, damping=gamma, on_failure="ignore")
    solution = solver(system.operator(), system.rhs(), x0)
    assert solution.status is fixed(solution)
    truth = oracle(system.damped(gamma).a, system.b, None if x0 is None else x0.numpy(), steps)
    agree(solution.value, truth, 1e-11)


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("row", ROWS)
def test_fixed_steps_cost_what_they_say_and_are_success(row, started):
    system = GRID["spd 10"]
    for steps in (0, 1, 3, 7) if ROWS[row].iterative else (1,):
        op = system.operator(ROWS[row].tag)
        solver = ROWS[row].solver(max_steps=steps, on_failure="ignore")
        solution = solver(op, system.rhs(), system.start() if started else None)
        # The residual of x0 is one more; Optimizer has its own in each step, FixedPoint's first step is free from zero.
        first = started and row != "Optimizer" and not (row == "FixedPoint" and steps == 0)
        assert op.products == ROWS[row].products(steps, system.n) + 1 + first
        assert solution.status is fixed(solution, converged=row.startswith("Dense"))
        assert solution.steps == steps and len(solution.trace) == steps + 1
        damped = system.damped(ROWS[row].dampings[0])
        residual, slack = damped.residuals(solution.value.numpy())[0], damped.rounding(solution.value.numpy())[0]
        assert abs(float(solution.residual_norm) - residual) <= slack
        assert abs(float(solution.trace[-1]) - residual) <= 10 * slack
        agree(solution.rhs_norm, norm(system.b), 1e-14)
        agree(solution.relative_residual, solution.residual_norm / norm(system.b), 1e-14)


@pytest.mark.parametrize("row", [row for row in ROWS if ROWS[row].iterative])
def test_zero_steps_return_the_start(row):
    system = GRID["spd 10"]
    op, b, x0 = system.operator(), system.rhs(), system.start()
    nothing = {"Neumann": ETA * b, "Optimizer": b}.get(row, torch.zeros_like(b))
    solver = ROWS[row].solver(max_steps=0, on_failure="ignore")
    agree(solver(op, b).value, nothing, 1e-15)
    start = x0 + ETA * (b - op(x0)) if row == "Neumann" else x0
    agree(solver(op, b, x0).value, start, 1e-15)


@pytest.mark.parametrize("system", ["spd 10", "batch spd", "NaN in A"])
@pytest.mark.parametrize("row", LAZY)
def test_fixed_steps_never_read_from_the_device(row, system):
    """The systems get a batch axis, because on the CPU a single system computes with Python numbers."""
    solver = ROWS[row].solver(max_steps=7, on_failure="ignore")
    given = GRID[system].stacked()
    for x0 in (None, given.start()):
        count, solution = reads(solver, given, x0)
        assert count == 0
        with Reads() as counted:
            bool(solution.code.any())
        assert counted.count > 0  # this is a read, and it is counted


@pytest.mark.parametrize("batch_shape", [(), (3,)])
@pytest.mark.parametrize("row", LAZY)
def test_fixed_steps_run_on_the_meta_device_where_every_read_raises(row, batch_shape):
    """torch.compile and the capture of graphs need steps without reads."""
    op = hg.operators.matrix(torch.empty(*batch_shape, 6, 6, device="meta"), symmetric=True)
    b = torch.empty(*batch_shape, 6, device="meta")
    for x0 in (None, b):
        solution = ROWS[row].solver(max_steps=7, on_failure="ignore")(op, b, x0)
        assert solution.value.shape == b.shape and solution.code.shape == batch_shape


@pytest.mark.parametrize("options", [{"max_steps": 7}, {"max_steps": 300, "rtol": 1e-9}])
@pytest.mark.parametrize("system", ["spd 10", "spd 1e6", "NaN in A", "symmetric indefinite", "b = 0", "1×1", "A = 4I"])
@pytest.mark.parametrize("row", ["CG", "FixedPoint", "Neumann"])
def test_numbers_for_one_system_and_tensors_for_a_batch_give_the_same(row, system, options):
    solver, given = ROWS[row].solver(on_failure="ignore", check_every=1, **options), GRID[system]
    numbers = solver(given.operator(), given.rhs())
    tensors = solver(given.stacked().operator(), given.stacked().rhs())
    assert numbers.status is tensors.status
    if "rtol" in options and numbers.ok:  # rounding, which grows with the condition number, decides the last step
        agree(numbers.value, tensors.value[0], 1e-8 * GRID[system].condition[0])
    else:
        assert numbers.steps == int(tensors.steps)
        size = numbers.trace.nan_to_num().max() if numbers.trace.isfinite().any() else 1.0
        torch.testing.assert_close(numbers.value, tensors.value[0], rtol=1e-9, atol=1e-9 * size, equal_nan=True)
        torch.testing.assert_close(numbers.trace, tensors.trace[:, 0], rtol=1e-9, atol=1e-9 * size, equal_nan=True)


@pytest.mark.parametrize(
    ("dtype", "rtol", "sizes"),
    [
        # ‖b‖ from 1e-301 to 1e301. ‖b‖² is near enough to 1 up to 2^±170, and a normal number up to 2^±511.
        (torch.float64, 1e-8, (-1000, -900, -532, -260, -256, -252, -90, -85, -80, -60)),
        # ‖b‖ from 1e-32 to 1e32. The two limits are 2^±21 and 2^±63.
        (torch.float32, 1e-4, (-105, -80, -73, -70, -60, -34, -33, -32, -31, -30)),
        # b is scaled by its largest entry.
        (torch.bfloat16, 1e-1, (-105, -60, -30)),
    ],
)
@pytest.mark.parametrize("row", ["CG", "GMRES(5)", "NormalCG"])
def test_scaling_b_scales_x_and_changes_nothing_else(row, dtype, rtol, sizes):
    """The factors are powers of two, both where the solver first scales b to about 1 and where it does not."""
    op, b = GRID["spd 10"].operator(dtype=dtype), GRID["spd 10"].rhs(dtype)
    one = ROWS[row].solver(rtol=rtol)(op, b)
    assert one.ok
    for k in (*sizes, *range(-12, 13), *(-k for k in sizes)):
        solution = ROWS[row].solver(rtol=rtol)(op, b * 2.0**k)
        assert solution.status is one.status and solution.steps == one.steps
        assert torch.equal(solution.value, one.value * 2.0**k) and torch.equal(solution.trace, one.trace * 2.0**k)
        assert solution.residual_norm == one.residual_norm * 2.0**k and solution.rhs_norm == one.rhs_norm * 2.0**k


def test_a_step_that_float32_cannot_hold_is_reported():
    """With ‖A‖ = 1e-39 the step is 1e39, beyond the range of float32, and so is the solution."""
    op = hg.operators.matrix(1e-39 * torch.eye(3), symmetric=True)
    for options in ({"max_steps": 2}, {"rtol": 1e-4}):
        solution = S.CG(on_failure="ignore", **options)(op, torch.ones(3))
        assert solution.status is Status.NON_FINITE


@pytest.mark.parametrize("row", [*KRYLOV, "FixedPoint", "Neumann", "Optimizer"])
def test_check_every_saves_reads_and_changes_no_answer(row):
    system = GRID["contraction .8" if row not in ("CG", "MINRES") else "spd 10"].stacked()
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
        assert five.residual_norm <= 1e-10 * norm(system.b[0])
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
    steps = {"max_steps": 5, "on_failure": "ignore"}
    for started in (False, True) if not row.startswith("Nystrom") else ():
        x0 = given.start() if started else None
        damped = ROWS[row].solver(damping=0.3, **steps)(given.operator(ROWS[row].tag), given.rhs(), x0)
        plain = ROWS[row].solver(**steps)(given.damped(0.3).operator(ROWS[row].tag), given.rhs(), x0)
        agree(damped.value, plain.value, 1e-12)
        assert abs(damped.residual_norm - plain.residual_norm) <= 1e-12 * norm(given.b)


@pytest.mark.parametrize("system", BATCHES)
@pytest.mark.parametrize("row", ROWS)
def test_batched_is_looped(row, system):
    """A batch and its systems alone agree after fixed steps; with a tolerance the status and the accuracy agree."""
    given = GRID[system]
    x0 = given.start()
    for options in ({"max_steps": 4}, {"max_steps": 30, "rtol": 1e-6}):
        solver = ROWS[row].solver(**options, on_failure="ignore")
        together = solver(given.operator(ROWS[row].tag), given.rhs(), x0)
        for i, status in enumerate(together.statuses):
            single = given.single(i)
            alone = solver(single.operator(ROWS[row].tag), single.rhs(), x0[i])
            if given.finite[i] and not given.regular[i] and row == "BiCGStab":  # rounding decides how it fails
                assert "rtol" not in options or not (status is Status.CONVERGED or alone.ok)
            else:
                assert status is alone.status
            if "rtol" not in options and given.regular[i]:
                # Rounding grows with the condition number, and with its square for methods on AᵀA.
                tolerance = 1e-12 if given.condition[i] <= 1.01e3 else 1e-19 * given.condition[i] ** 2
                assert norm(together.value[i] - alone.value) <= tolerance * (norm(alone.value) + norm(x0[i]))
                traces = together.trace[:, i].nan_to_num(), alone.trace.nan_to_num()  # NaN where none was recorded
                assert abs(together.residual_norm[i] - alone.residual_norm) <= tolerance * traces[1].max()
                assert (traces[0] - traces[1]).abs().max() <= tolerance * traces[1].max()
            elif "rtol" in options and status is Status.CONVERGED:
                assert together.residual_norm[i] <= 1e-6 * together.rhs_norm[i]


@pytest.mark.parametrize("row", [row for row in ROWS if row not in ("Dense, Cholesky", "Nystrom(10)")])
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


@pytest.mark.parametrize("row", [row for row in ROWS if not row.startswith(("Nystrom", "Neumann", "Optimizer"))])
def test_max_steps_without_rtol_means_no_tolerance(row):
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
        solution = row.solver(max_steps=3, on_failure="ignore")(system.operator(row.tag), b, x0)
        assert not solution.value.requires_grad and solution.value.data_ptr() not in (b.data_ptr(), x0.data_ptr())
    assert torch.equal(b, before[0]) and torch.equal(x0, before[1]) and b.grad is None
    assert torch.equal(torch.get_rng_state(), state)


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
            for make in (S.CG, S.MINRES, S.GMRES, S.Neumann, S.FixedPoint, S.Dense, S.Nystrom)
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


def test_an_x0_of_another_structure_than_b_is_named():
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
    solver = ROWS[row].solver(max_steps=5, on_failure="ignore")
    solution, plain = solver(op, b, x0), solver(hg.operators.matrix(a, **tags), flat(b), flat(x0))
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


@pytest.mark.parametrize("row", [row for row in ROWS if row != "Optimizer"])
def test_a_start_much_larger_than_the_solution_gives_no_false_convergence(row):
    """x0 has size 1 and b has size 1e-25, so the rounding errors of x0 are larger than b."""
    system = GRID["b of 1e-20"]
    given = dataclasses.replace(system, b=1e-5 * system.b)
    x0 = torch.tensor(side(system.n))
    solution = ROWS[row].solver(max_steps=40, rtol=1e-6, on_failure="ignore")(given.operator(), given.rhs(), x0)
    residual = given.damped(ROWS[row].dampings[0]).residuals(solution.value.numpy())[0]
    assert solution.status is not Status.CONVERGED or residual <= 1e-6 * norm(given.b)


def test_a_finished_system_of_a_batch_counts_no_steps_of_the_others():
    """Some of these systems restart from their true residual while the residuals of others are just above the limit."""
    a = np.stack([with_spectrum(logspace(10.0**k, 20), k + 2) for k in range(2, 7)])
    b = np.stack([side(20, seed) for seed in range(4, 9)])
    for rtol in np.logspace(-14, -11, 10):
        solver = S.CG(rtol=float(rtol), max_steps=500, on_failure="ignore")
        together = solver(hg.operators.matrix(torch.tensor(a), symmetric=True), torch.tensor(b))
        for i in range(2):
            alone = solver(hg.operators.matrix(torch.tensor(a[i]), symmetric=True), torch.tensor(b[i]))
            if alone.ok and together.statuses[i] is Status.CONVERGED:
                assert int(together.steps[i]) <= 1.2 * alone.steps + 10  # the others take hundreds of steps


def test_a_restarted_solve_may_use_all_remaining_steps():
    op = hg.operators.matrix(torch.tensor(with_spectrum(logspace(1e8, 60), 1)), symmetric=True)
    b = torch.tensor(side(60))
    free = S.CG(rtol=1e-11, max_steps=5000, on_failure="ignore")(op, b)
    bound = S.CG(rtol=1e-11, max_steps=int(free.steps), on_failure="ignore")(op, b)
    assert bound.steps == free.steps and torch.equal(bound.value, free.value)


class OneBuffer:
    """A as an operator that writes all products, of one vector or of several, into the same memory, and returns it."""

    def __init__(self, a: torch.Tensor, **tags: bool):
        self.memory: dict[tuple[int, ...], torch.Tensor] = {}
        self.a, self.tags = a, tags

    def into(self, value: torch.Tensor) -> torch.Tensor:
        return self.memory.setdefault(tuple(value.shape), torch.empty_like(value)).copy_(value)

    def operator(self) -> hg.operators.LinearOperator:
        def one(a: torch.Tensor):
            return lambda v: v.space.pack([self.into(a @ v.leaves[0])])

        def several(a: torch.Tensor):
            return lambda basis: basis.with_leaves([self.into(basis.leaves()[0] @ a.T)])

        many = {"many": several(self.a), "many_transpose": several(self.a.T)}
        eye = torch.eye(len(self.a), dtype=self.a.dtype)
        return hg.operators.LinearOperator(
            one(self.a), one(self.a.T), contraction=one(eye - self.a), **many, **self.tags
        )


@pytest.mark.parametrize("row", [*ROWS, "BlockCG", "CG, Nystrom", "CG, operator", "CG, Recycled"])
def test_products_that_share_memory(row):
    """A backward pass may return the same buffer each time, so solvers must copy a product that they keep."""
    system = GRID["spd 10"]
    a, b, tag = torch.tensor(system.a), system.rhs(), {"symmetric": True}
    options = {"max_steps": 6, "on_failure": "ignore"}
    inverse = torch.diag(1 / torch.diag(a))
    makes = {
        "BlockCG": lambda op: S.BlockCG(**options)(op, b),
        "CG, Nystrom": lambda op: S.CG(preconditioner=S.Nystrom(rank=3), **options)(op, b),
        "CG, Recycled": lambda op: [S.CG(**options)(op, c, x0=recycled) for c in (b, 2 * b + 1, b**2)][-1],
    }
    for started in (False, True):
        values = []
        for shared in (False, True):
            recycled = S.Recycled(2)
            op = OneBuffer(a, **tag).operator() if shared else hg.operators.matrix(a, **tag)
            pre = OneBuffer(inverse, **tag).operator() if shared else hg.operators.matrix(inverse, **tag)
            if row in ROWS:
                tags = {ROWS[row].tag: True} if ROWS[row].tag else {}
                op = OneBuffer(a, **tags).operator() if shared else hg.operators.matrix(a, **tags)
                solution = ROWS[row].solver(**options)(op, b, system.start() if started else None)
            elif row == "CG, operator":
                solution = S.CG(preconditioner=pre, **options)(op, b)
            else:
                solution = makes[row](op)
            values.append(solution.value.clone())
        agree(values[1], values[0], 1e-12)


@pytest.mark.parametrize("row", [*KRYLOV, "Neumann", "Auto, symmetric", "Optimizer"])
def test_products_that_are_their_argument(row):
    """A swaps two leaves that are large enough to be stored separately, so Av shares the memory of v."""
    n = 2**19 + 1
    draw = torch.Generator().manual_seed(0)
    b = [torch.randn(n, generator=draw, dtype=torch.float64) for _ in range(2)]
    values = []

    def exchanged(v):
        return v.space.pack([v.leaves[1], v.leaves[0]])

    for product in (exchanged, lambda v: exchanged(v).copy()):
        op = hg.operators.LinearOperator(product, symmetric=True)
        values.append(ROWS[row].solver(max_steps=3, damping=1.5, on_failure="ignore")(op, b).value)
    for x, y in zip(*values, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("row", [row for row in ROWS if ROWS[row].iterative])
def test_the_trace_holds_the_residuals_of_fewer_steps(row, batched):
    """With a fixed number of steps, where it is taken; so the growth rate is that of the iterates."""
    system = GRID["contraction .8" if ROWS[row].tag is None else "spd 10"]
    system = system.stacked() if batched else system
    steps = 9

    def run(k: int) -> S.Solution:
        return ROWS[row].solver(max_steps=k, on_failure="ignore")(system.operator(ROWS[row].tag), system.rhs())

    solution = run(steps)
    trace = solution.trace.reshape(steps + 1)
    assert int(torch.as_tensor(solution.steps).max()) == steps
    for k in range(steps + 1):
        residual = float(run(k).residual_norm)
        assert trace[k].isnan() or abs(float(trace[k]) - residual) <= 1e-10 * norm(system.sides[0])
    known = [k for k in range(steps + 1) if not trace[k].isnan()]
    last, half = known[-1], known[(len(known) - 1) // 2]
    agree(solution.growth_rate.reshape(()), (trace[last] / trace[half]) ** (1 / (last - half)), 1e-12)


EMPTY = {"no unknowns": (0,), "no unknowns, batched": (3, 0), "no systems": (0, 4)}


@pytest.mark.parametrize("shape", EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize("row", [*ROWS, "BlockCG"])
def test_empty_systems(row, shape):
    b = torch.zeros(shape, dtype=torch.float64)
    if row == "BlockCG":
        solver = S.BlockCG()
        op = hg.operators.matrix(torch.eye(shape[-1], dtype=torch.float64), symmetric=True)
        op = op.stacked() if len(shape) == 2 else op
    else:
        solver, tags = ROWS[row].make(), {ROWS[row].tag: True} if ROWS[row].tag else {}
        op = hg.operators.matrix(torch.zeros(*shape, shape[-1], dtype=torch.float64), **tags)
    solution = solver(op, b)
    assert solution.value.shape == b.shape and solution.ok and solution.status in (Status.CONVERGED, Status.COMPLETED)
    assert solution.code.shape == b.shape[:-1] and solution.relative_residual.shape == b.shape[:-1]
    assert solution.message
    recycled = S.Recycled()
    for _ in range(2):
        assert solver(op, b, recycled).ok


@pytest.mark.parametrize("default", [{"device": "meta"}, {"dtype": torch.float16}, {"dtype": torch.float32}])
@pytest.mark.parametrize("system", ["spd 10", "batch spd", "symmetric indefinite", "0-d"])
@pytest.mark.parametrize("row", [*ROWS, "CG, Nystrom", "MINRES, Nystrom"])
def test_default_device_and_dtype_change_nothing(row, system, default):
    """A default device that holds no numbers, or a default dtype in which a tolerance rounds to 0."""
    given, tag = GRID[system], "symmetric" if "," in row and row not in ROWS else ROWS[row].tag
    preconditioners = {"CG, Nystrom": S.Nystrom(rank=3), "MINRES, Nystrom": S.Nystrom(rank=3)}
    if row in preconditioners:
        make = S.CG if row.startswith("CG") else S.MINRES
        solver = make(rtol=1e-8, max_steps=60, preconditioner=preconditioners[row], on_failure="ignore")
    else:
        solver = ROWS[row].solver(max_steps=60, rtol=1e-8, on_failure="ignore")
    op, b, x0 = given.operator(tag), given.rhs(), given.start()
    plain = solver(op, b, x0)
    dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(default.get("dtype", dtype))
        with default_device(default.get("device")):
            other = solver(op, b, x0)
    finally:
        torch.set_default_dtype(dtype)
    assert other.statuses == plain.statuses and other.value.dtype == plain.value.dtype
    assert torch.equal(other.value, plain.value) and torch.equal(other.residual_norm, plain.residual_norm)


def test_complex_numbers_are_refused_with_what_to_do():
    op = hg.operators.function(lambda v: 2 * v)
    for b, x0 in ((torch.ones(3, dtype=torch.complex128), None), (torch.ones(3), torch.ones(3, dtype=torch.complex64))):
        with pytest.raises(TypeError, match=r"must be a floating point tensor, got .*complex.*torch\.view_as_real"):
            S.GMRES()(op, b, x0)


@pytest.mark.parametrize("row", list(ROWS))
def test_a_system_without_a_right_hand_side_has_the_solution_zero_wherever_it_starts(row):
    given = GRID["spd 10"]
    solver = ROWS[row].solver(max_steps=3, on_failure="raise")
    solution = solver(given.operator(), torch.zeros_like(given.rhs()), given.start())
    assert solution.ok and not solution.value.any() and not solution.relative_residual
