"""Diagonal, and what a preconditioner may be."""

import numpy as np
import pytest
import torch

import hypergrad as hg
from hypergrad import solvers as S
from solver_rows import (
    N,
    solved,
)
from systems import GRID, side, with_spectrum


def scaled(strength: float) -> np.ndarray:
    """Scales 10⁻⁴ to 10² on the diagonal of a well-conditioned matrix."""
    scale = np.sqrt(np.logspace(-4, 2, N))
    return scale[:, None] * (np.eye(N) + strength * (with_spectrum(np.linspace(-1, 1, N), 5))) * scale


def estimate(a: np.ndarray, probes: int, seed: int = 0) -> np.ndarray:
    """The diagonal that `Diagonal` divides by."""
    op = hg.operators.matrix(torch.tensor(a), symmetric=True)
    like = hg._vector.Space(torch.ones(len(a), dtype=torch.float64), "b").zeros()
    return S.Diagonal(probes=probes, seed=seed).factors(op, like)[0].numpy()


def test_diagonal_is_exact_where_a_is_diagonal():
    diagonal = np.logspace(-6, 3, N)
    np.testing.assert_allclose(estimate(np.diag(diagonal), 2), diagonal, rtol=1e-12)


def test_diagonal_is_the_mean_over_random_signs():
    """Errors have the variance Σ_{k≠i} a_ik² / m: their mean square over many seeds, entry by entry."""
    a, probes = scaled(0.3), 50
    errors = np.stack([estimate(a, probes, seed) - np.diag(a) for seed in range(400)])
    variance = ((a**2).sum(1) - np.diag(a) ** 2) / probes
    ratio = (errors**2).mean(0) / variance
    assert ratio.min() > 0.3 and ratio.max() < 2 and abs(np.median(ratio) - 1) < 0.05


def test_diagonal_is_never_below_its_own_error():
    """A zero diagonal is all noise: the preconditioner stays positive definite."""
    a = with_spectrum(np.linspace(-1, 1, N), 5)
    a -= np.diag(np.diag(a))
    assert np.all(estimate(a, 4) > 0)
    assert np.all(estimate(np.zeros((5, 5)), 4) == 1)


@pytest.mark.parametrize("make", [S.CG, S.MINRES])
def test_diagonal_saves_steps_where_scales_differ(make):
    solver = make(rtol=1e-10, preconditioner=S.Diagonal(probes=30))
    assert solved(scaled(0.3), solver)[0].steps < 60
    with pytest.warns(hg.HypergradientWarning, match="MAX_STEPS|DIVERGED"):
        plain = make(rtol=1e-10, max_steps=200)(
            hg.operators.matrix(torch.tensor(scaled(0.3)), symmetric=True), torch.tensor(side(N))
        )
    assert not plain.ok


def test_diagonal_serves_a_batch():
    system = GRID["batch spd"]
    solution = S.CG(rtol=1e-10, preconditioner=S.Diagonal())(system.operator(), system.rhs())
    assert solution.ok
    np.testing.assert_allclose(solution.value.numpy(), system.solutions, rtol=1e-6, atol=1e-8)


def test_diagonal_keeps_the_random_state_and_refuses_what_is_not_symmetric():
    state = torch.get_rng_state()
    solved(scaled(0.3), S.CG(rtol=1e-8, preconditioner=S.Diagonal()))
    assert torch.equal(state, torch.get_rng_state())
    op = hg.operators.matrix(torch.tensor(scaled(0.3)))
    like = hg._vector.Space(torch.ones(N), "b").zeros()
    with pytest.raises(TypeError, match="Diagonal needs a symmetric operator"):
        S.Diagonal().factors(op, like)
    with pytest.raises(ValueError, match="probes must be an integer ≥ 2, got 1"):
        S.Diagonal(probes=1)


def test_every_solution_names_its_method():
    op, b = hg.operators.matrix(torch.eye(3), positive_definite=True), torch.ones(3)
    for make in (S.CG, S.MINRES, S.GMRES, S.Dense, S.Nystrom):
        assert make(on_failure="ignore")(op, b).method == make.__name__

    def mine(op, b, x0):
        return b

    assert hg.solvers._solver.solve(mine, op, hg._vector.Space(b, "b").vector(b, "b"), None).method == "mine"


def test_bad_preconditioners_are_named():
    op, b = hg.operators.matrix(torch.eye(3), symmetric=True), torch.ones(3)
    for make in (S.CG, S.MINRES):
        for bad, said in ((5, "got 5"), ("jacobi", "got 'jacobi'"), (S.Nystrom, "got <class"), (b, r"got tensor\(")):
            with pytest.raises(TypeError, match=f"preconditioner must be a LinearOperator.*{said}"):
                make(preconditioner=bad)(op, b)
        with pytest.raises(ValueError, match="Reused needs a solver with a tolerance"):
            make(max_steps=3, preconditioner=S.Reused(S.Nystrom()))(op, b)
    for bad in (None, 5, S.Nystrom, lambda r: r):
        with pytest.raises(TypeError, match=r"Reused needs a recipe .*, got "):
            S.Reused(bad)
    for seed in ("a", 1.5):
        with pytest.raises(ValueError, match=f"seed must be an integer, got {seed!r}"):
            S.Diagonal(seed=seed)
