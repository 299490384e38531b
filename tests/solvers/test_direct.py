"""Dense, as a solver and as a preconditioner."""

import numpy as np
import pytest
import torch

import hypergrad as hg
from hypergrad import solvers as S
from hypergrad.solvers import Status
from solver_rows import (
    DECAY,
    N,
    agree,
    drifting,
    solved,
)
from systems import GRID, logspace, norm, side, with_spectrum


@pytest.mark.parametrize("size", [1, 7, 20, 100])
def test_dense_computes_columns_in_batches(size, monkeypatch):
    monkeypatch.setattr("hypergrad.solvers._direct.AT_ONCE", 20 * size)
    system = GRID["nonsymmetric 10"]
    agree(S.Dense()(system.operator(), system.rhs()).value, system.solutions[0], 1e-12)


def test_dense_preconditions_with_the_exact_inverse():
    op = hg.operators.matrix(torch.tensor(DECAY), symmetric=True)
    solution = S.CG(max_steps=1, preconditioner=S.Dense())(op, torch.tensor(side(N)))
    np.testing.assert_allclose(solution.value, np.linalg.solve(DECAY, side(N)), rtol=1e-9)
    assert op.products == N + 2
    for make in (S.CG, S.MINRES):
        assert solved(DECAY, make(rtol=1e-9, preconditioner=S.Dense()))[0].steps <= 2


def test_dense_preconditions_an_indefinite_system_with_its_absolute_value():
    values = np.append(-logspace(10, 30), logspace(1e3, N - 30))
    a, b = with_spectrum(values, 3), torch.tensor(side(N))
    assert solved(a, S.MINRES(rtol=1e-9, preconditioner=S.Dense()))[0].steps <= 3
    absolute = with_spectrum(abs(values), 3)
    step = np.linalg.solve(absolute, side(N))  # M⁻¹b with M = |A|, and the step along it that MINRES takes
    length = side(N) @ np.linalg.solve(absolute, a @ step) / (a @ step @ np.linalg.solve(absolute, a @ step))
    once = S.MINRES(max_steps=1, preconditioner=S.Dense(), on_failure="ignore")(
        hg.operators.matrix(torch.tensor(a), symmetric=True), b
    )
    np.testing.assert_allclose(once.value, length * step, rtol=1e-9)
    with pytest.warns(hg.HypergradientWarning, match="NOT_POSITIVE_DEFINITE"):
        S.CG(rtol=1e-9, preconditioner=S.Dense())(hg.operators.matrix(torch.tensor(a), symmetric=True), b)


def test_dense_preconditions_each_system_of_a_batch():
    system = GRID["batch spd, one indefinite"]
    solution = S.MINRES(rtol=1e-10, preconditioner=S.Dense())(system.operator("symmetric"), system.rhs())
    assert solution.ok and int(solution.steps.max()) <= 3
    np.testing.assert_allclose(solution.value.numpy(), system.solutions, rtol=1e-6, atol=1e-8)
    system = GRID["batch spd, one NaN"]
    solution = S.CG(rtol=1e-10, preconditioner=S.Dense(), on_failure="ignore")(
        system.operator("symmetric"), system.rhs()
    )
    assert solution.statuses == [S.Status.CONVERGED, S.Status.NON_FINITE, S.Status.CONVERGED]


def test_dense_reused_along_a_sequence_saves_nearly_all_steps():
    pre = S.Reused(S.Dense())
    solver, steps = S.CG(rtol=1e-8, preconditioner=pre), []
    for t in np.linspace(0, 0.003, 10):
        steps.append(int(solved(drifting(t), solver)[0].steps))
    plain = [int(solved(drifting(t), S.CG(rtol=1e-8))[0].steps) for t in np.linspace(0, 0.003, 10)]
    assert pre.builds == 1 and steps[0] <= 2 and sum(steps) < 0.2 * sum(plain)


def test_dense_as_a_preconditioner_refuses_operators_not_declared_symmetric():
    op = hg.operators.matrix(torch.tensor(np.roll(np.eye(N), 1, axis=0)))
    with pytest.raises(TypeError, match="Dense as a preconditioner needs a symmetric operator"):
        S.Dense().factors(op, hg.Vector.of(torch.ones(N), "b").zeros())


@pytest.mark.parametrize("positive_definite", [False, True])
def test_a_kkt_system_with_redundant_constraints_is_solved(positive_definite):
    """One constraint occurs twice, so the matrix is singular and the system consistent; Dense gives the least norm."""
    q, c = np.diag([1.0, 2.0, 3.0]), np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    a = np.block([[q, c.T], [c, np.zeros((2, 2))]])
    b = np.r_[1.0, 2.0, 3.0, 4.0, 4.0]
    op = hg.operators.matrix(torch.tensor(a), symmetric=True, positive_definite=positive_definite)
    for solver in (S.Dense(), S.MINRES(rtol=1e-10), S.GMRES(rtol=1e-10), S.LSQR(rtol=1e-10)):
        solution = solver(op, torch.tensor(b))
        assert solution.status is Status.CONVERGED
        np.testing.assert_allclose(solution.value[:3], (np.linalg.pinv(a) @ b)[:3], rtol=1e-8)
    np.testing.assert_allclose(S.Dense()(op, torch.tensor(b)).value, np.linalg.pinv(a) @ b, rtol=1e-10)


def test_matrices_that_are_singular_up_to_rounding_are_solved_by_least_squares():
    """LU may have no small pivot here. The status is BREAKDOWN and the residual is the least one."""
    for seed in range(200):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(2, 12))
        a, b = rng.standard_normal((n, n - 1)) @ rng.standard_normal((n - 1, n)), rng.standard_normal(n)
        solution = S.Dense(on_failure="ignore")(hg.operators.matrix(torch.tensor(a)), torch.tensor(b))
        least = norm(b - a @ np.linalg.lstsq(a, b, rcond=1e-12)[0])
        assert solution.status is Status.BREAKDOWN
        assert norm(b - a @ solution.value.numpy()) <= least * (1 + 1e-9)


def test_matrices_that_are_singular_up_to_the_rounding_of_a_float32_leaf_count_as_singular():
    """Float32 rounding of one leaf makes a singular matrix regular in float64; it still counts as singular."""
    half = np.random.default_rng(0).standard_normal((3, 2))
    a = torch.tensor(half @ half.T)
    split = lambda x: [x[:1].float(), x[1:]]  # noqa: E731
    op = hg.operators.function(lambda v: split(a @ torch.cat([v[0].double(), v[1]])))
    truth = a @ torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)  # orthogonal to A's null space
    value = S.Dense()(op, split(a @ truth)).value
    np.testing.assert_allclose(torch.cat([value[0].double(), value[1]]), truth, rtol=1e-5)
