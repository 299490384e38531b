"""CG and MINRES: preconditioners, negative curvature, singular systems."""

from typing import Any

import numpy as np
import pytest
import torch

import hypergrad as hg
from hypergrad import solvers as S
from hypergrad.solvers import Status
from solver_rows import (
    agree,
    krylov,
)
from systems import GRID, System, logspace, norm, side, with_spectrum

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
    """In K(M⁻¹A, M⁻¹b), CG has the least error in the norm of A, MINRES the least residual in the norm of M⁻¹."""
    a, b, v = WIDE.a, WIDE.b, preconditioned_space(WIDE.a, WIDE.b, steps)
    options = {"max_steps": steps, "preconditioner": preconditioner, "on_failure": "ignore"}
    cg = S.CG(**options)(WIDE.operator(), WIDE.rhs())
    agree(cg.value, v @ np.linalg.solve(v.T @ a @ v, v.T @ b), 1e-9)
    minres = S.MINRES(**options)(WIDE.operator(), WIDE.rhs())
    root = np.sqrt(DIAGONAL.numpy())
    agree(minres.value, v @ np.linalg.lstsq(root[:, None] * (a @ v), root * b, rcond=None)[0], 1e-9)


@pytest.mark.parametrize("make", [S.CG, S.MINRES])
@pytest.mark.parametrize(
    "preconditioner", [*PRECONDITIONERS.values(), S.Nystrom(rank=10)], ids=[*PRECONDITIONERS, "Nystrom"]
)
def test_preconditioned_trace_is_the_true_residual(make, preconditioner):
    for k in range(8):
        options = {"preconditioner": preconditioner, "on_failure": "ignore"}
        solution = make(max_steps=k, **options)(WIDE.operator(), WIDE.rhs())
        traced = make(max_steps=8, **options)(WIDE.operator(), WIDE.rhs()).trace[k]
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
def test_cg_with_a_nystrom_preconditioner_is_orders_of_magnitude_more_accurate(make):
    """Eigenvalues are 10^(−j/3), damping is 10⁻³; five steps with a sketch of rank 10 against five plain steps."""
    n, gamma = 200, 1e-3
    system = System("", with_spectrum(10.0 ** (-np.arange(n) / 3), 13), side(n))
    truth = system.damped(gamma).solutions[0]

    def error(preconditioner: Any) -> float:
        op = system.operator()
        solver = make(max_steps=5, damping=gamma, preconditioner=preconditioner, on_failure="ignore")
        value = solver(op, system.rhs()).value.numpy()
        assert op.products == 6 + 10 * (preconditioner is not None)
        return norm(value - truth) / norm(truth)

    assert error(S.Nystrom(rank=10, damping=gamma)) < error(None) / 300
    # Here damping is part of A, and so part of the sketch.
    op = system.damped(gamma).operator()
    inside = make(max_steps=5, preconditioner=S.Nystrom(rank=10, damping=gamma))(op, system.rhs()).value.numpy()
    assert norm(inside - truth) / norm(truth) < error(None) / 3


def test_restarts_from_the_true_residual_reach_the_tolerance():
    """At condition 10⁶ MINRES's recursion underestimates the residual. Other systems of a batch are not changed."""
    hard, easy = GRID["spd 1e6"], GRID["spd 10"]
    failing = GRID["symmetric indefinite"]
    together = System("", np.stack([hard.a, easy.a, failing.a]), np.stack([hard.b, easy.b, failing.b]))
    for make, last in ((S.MINRES, Status.CONVERGED), (S.CG, Status.NOT_POSITIVE_DEFINITE)):
        solution = make(rtol=1e-10, max_steps=300, on_failure="ignore")(together.operator(), together.rhs())
        assert solution.statuses == [Status.CONVERGED, Status.CONVERGED, last]
        alone = make(rtol=1e-10, max_steps=300, on_failure="ignore")(failing.operator(), failing.rhs())
        agree(solution.value[2], alone.value, 1e-9)
    once = S.MINRES(max_steps=73)(hard.operator(), hard.rhs())
    assert once.residual_norm > 1e-9 * once.rhs_norm  # so a restart was needed


def inconsistent(condition: float, tail: float, signs: bool, seed: int, dtype: torch.dtype = torch.float64) -> System:
    """50 eigenvalues of which five are 0; the part of b in the null space has norm `tail`, the least residual."""
    rng = np.random.default_rng(seed)
    values = np.r_[np.zeros(5), logspace(condition, 45) * (rng.choice([-1, 1], 45) if signs else 1)]
    a = with_spectrum(values, seed)
    vectors = np.linalg.eigh(a)[1]
    null = vectors[:, np.argsort(abs(np.linalg.eigvalsh(a)))[:5]]
    b = rng.standard_normal(50)
    inside = null @ (null.T @ b)
    b = (b - inside) / norm(b - inside) + tail * inside / norm(inside)
    return System("", a, b)


@pytest.mark.parametrize("steps", [100, 200, *(pytest.param(n, marks=pytest.mark.slow) for n in (500, 1000))])
@pytest.mark.parametrize("tail", [1.0, 0.002])
@pytest.mark.parametrize("signs", [False, True])
@pytest.mark.parametrize("condition", [1e1, 1e3])
def test_minres_ends_at_the_least_residual_of_an_inconsistent_system(condition, signs, tail, steps):
    """Rounding errors in the null space must not grow, however many steps are allowed."""
    systems = [inconsistent(condition, tail, signs, seed) for seed in range(3)]
    together = System("", np.stack([s.a for s in systems]), np.stack([s.b for s in systems]))
    due = steps >= 200
    for options in ({"rtol": 1e-10, "max_steps": steps}, {"max_steps": steps}):
        solution = S.MINRES(on_failure="ignore", **options)(together.operator(), together.rhs())
        for i, system in enumerate(systems):
            alone = S.MINRES(on_failure="ignore", **options)(system.operator(), system.rhs())
            for value in (alone.value, solution.value[i]):
                residual = system.residuals(value.numpy())[0]
                assert residual <= tail * (1 + 1e-6) or not due
                assert residual <= norm(system.b)
            if due and "rtol" in options:
                assert alone.status is Status.STAGNATED


def test_minres_in_float32_ends_near_the_least_residual():
    for seed in range(4):
        system = inconsistent(10.0, 0.1, bool(seed % 2), seed)
        solution = S.MINRES(rtol=1e-6, max_steps=1000, on_failure="ignore")(
            system.operator(dtype=torch.float32), system.rhs(torch.float32)
        )
        assert system.residuals(solution.value.double().numpy())[0] <= 0.1 * (1 + 1e-3)


def test_a_start_at_a_least_squares_solution_is_kept():
    for seed in range(5):
        system = inconsistent(1e3, 0.5, True, seed)
        for make in (S.MINRES, S.GMRES):
            solution = make(rtol=1e-10, on_failure="ignore")(
                system.operator(), system.rhs(), torch.tensor(system.solutions[0])
            )
            assert solution.status is Status.STAGNATED and solution.steps <= 40
            assert system.residuals(solution.value.numpy())[0] <= 0.5 * (1 + 1e-6)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options", [{}, {"max_steps": 20}, {"max_steps": 60}])
def test_cg_on_a_semidefinite_inconsistent_system_is_no_worse_than_zero(options, dtype, batched):
    """A has zero rows where b is not 0, or comes from 10 samples of 20 features; the status must be a failure."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((10, 20)) if seed % 2 else rng.standard_normal((30, 20)) * (np.arange(20) < 16)
        system = System("", x.T @ x / len(x), rng.standard_normal(20))
        system = system.stacked() if batched else system
        solution = S.CG(on_failure="ignore", **options)(system.operator("symmetric", dtype), system.rhs(dtype))
        assert solution.status in (Status.NOT_POSITIVE_DEFINITE, Status.DIVERGED)
        assert system.residuals(solution.value.double().numpy())[0] <= norm(system.sides[0]) * (1 + 1e-5)


def test_k_steps_of_cg_are_the_textbooks_even_if_the_residual_is_larger_than_b():
    system = System("", with_spectrum(logspace(1e5, 40), 2), side(40))
    for steps in (3, 8):
        solution = S.CG(max_steps=steps, on_failure="ignore")(system.operator(), system.rhs())
        assert solution.status is Status.DIVERGED and solution.relative_residual > 1
        v = krylov(system.a, system.b, steps)
        agree(solution.value, v @ np.linalg.solve(v.T @ system.a @ v, v.T @ system.b), 1e-8)
        assert "growing" not in solution.message or float(solution.growth_rate) > 1


@pytest.mark.parametrize("steps", [2, 3, 5, 8])
def test_few_steps_of_cg_on_an_inconsistent_system_lower_the_quadratic(steps):
    """Few steps cannot tell a singular A from one with a tiny eigenvalue; a residual above ‖b‖ has status DIVERGED."""
    seen = set()
    for seed in range(30):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((10, 20))
        a, b = x.T @ x / 10, x.T @ rng.standard_normal(10) + 2 * rng.standard_normal(20)
        system = System("", a, b)
        given = (system.operator("symmetric"), system.rhs())
        solution = S.CG(max_steps=steps, on_failure="ignore")(*given)
        w = solution.value.numpy()
        assert w @ a @ w / 2 - w @ b < 0
        assert (solution.status is Status.DIVERGED) == (norm(b - a @ w) >= norm(b))
        seen.add(solution.status)
        for solver in (S.MINRES(max_steps=steps, on_failure="ignore"), S.Auto(on_failure="ignore")):
            assert norm(b - a @ solver(*given).value.numpy()) < norm(b)
    assert Status.DIVERGED in seen or steps < 8


@pytest.mark.parametrize("preconditioner", [None, lambda r: DIAGONAL[:20] * r], ids=["plain", "preconditioned"])
@pytest.mark.parametrize("gamma", [0.0, 0.01])
def test_curvature_is_the_least_rayleigh_quotient_of_the_steps(gamma, preconditioner):
    """It is between the least eigenvalue of A, without damping, and 0; the message names a damping that exceeds it."""
    system = GRID["symmetric indefinite"]
    solution = S.CG(damping=gamma, preconditioner=preconditioner, on_failure="ignore")(system.operator(), system.rhs())
    curvature, least = float(solution.curvature), np.linalg.eigvalsh(system.a)[0]
    assert solution.status is Status.NOT_POSITIVE_DEFINITE and least <= curvature < 0
    assert f"xᵀAx / xᵀx = {curvature:.3g} (damping must be at least {-1.2 * curvature:.2g})" in solution.message
    assert "GaussNewton" in solution.message
    if preconditioner is None and not gamma:  # the first direction is b
        first = S.CG(max_steps=1)(GRID["spd 10"].operator(), GRID["spd 10"].rhs())
        b = GRID["spd 10"].b
        agree(first.curvature, b @ GRID["spd 10"].a @ b / (b @ b), 1e-12)


@pytest.mark.parametrize("make", [S.CG, S.MINRES, S.BlockCG])
def test_stochastic_operators_are_not_checked_for_symmetry(make):
    draw = torch.Generator().manual_seed(0)

    def product(v):
        noise = torch.randn(5, 5, generator=draw, dtype=v.space.dtype)
        return v.space.pack([v.leaves[0] * 2 + 0.1 * (noise + noise.T) @ v.leaves[0]])

    b = torch.ones(5, dtype=torch.float64)
    for stochastic, status in ((False, Status.NOT_SYMMETRIC), (True, Status.COMPLETED)):
        op = hg.operators.LinearOperator(product, symmetric=True, stochastic=stochastic)
        assert op.damped(0.5).stochastic is stochastic and op.stacked().stochastic is stochastic
        assert make(max_steps=3, on_failure="ignore")(op, b).status is status
