"""Auto: which method it takes, when it goes on to another, and what the default gives."""

import numpy as np
import pytest
import torch

import hypergrad as hg
from hypergrad import solvers as S
from hypergrad.solvers import Status
from solver_rows import (
    N,
)
from systems import logspace, side, with_spectrum


def auto(a: np.ndarray, tag: bool, **options) -> S.Solution:
    return S.Auto(rtol=1e-9, dense=100, **options)(
        hg.operators.matrix(torch.tensor(a), symmetric=tag), torch.tensor(side(len(a)))
    )


SHIFT = np.roll(np.eye(N), 1, axis=0)


CHOICES = {
    "small": (with_spectrum(np.ones(20), 1), False, "Dense: 20 unknowns, at most 100"),
    "symmetric": (with_spectrum(logspace(100, N), 1), True, "CG: declared symmetric"),
    "indefinite": (
        with_spectrum(np.append(-np.ones(3), logspace(10, N - 3)), 1),
        True,
        "MINRES: CG ended with NOT_POSITIVE_DEFINITE",
    ),
    "general": (np.eye(N) + 0.3 * SHIFT, False, "GMRES: not declared symmetric"),
    "stagnating": (SHIFT, False, "LSQR: GMRES ended with STAGNATED"),
    "not symmetric after all": (np.eye(N) + 0.3 * SHIFT, True, "GMRES: CG ended with NOT_SYMMETRIC"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_auto_chooses_and_says_why(name):
    a, tag, method = CHOICES[name]
    solution = auto(a, tag)
    assert solution.method == method and solution.status is Status.CONVERGED
    np.testing.assert_allclose(solution.value.numpy(), np.linalg.solve(a, side(len(a))), rtol=1e-6, atol=1e-8)


def test_auto_goes_on_with_those_systems_of_a_batch_that_failed():
    definite, indefinite = CHOICES["symmetric"][0], CHOICES["indefinite"][0]
    a, b = np.stack([definite, indefinite, 2 * definite]), np.stack([side(N)] * 3)
    op = hg.operators.matrix(torch.tensor(a), symmetric=True)
    solution = S.Auto(rtol=1e-9)(op, torch.tensor(b))
    assert solution.method.startswith("MINRES") and solution.ok
    alone = S.CG(rtol=1e-9)(hg.operators.matrix(torch.tensor(a[::2]), symmetric=True), torch.tensor(b[::2]))
    assert torch.equal(solution.value[::2], alone.value)
    np.testing.assert_allclose(solution.value.numpy(), np.linalg.solve(a, b[..., None])[..., 0], rtol=1e-6, atol=1e-8)


def test_auto_without_a_tolerance_does_exactly_the_first_methods_steps():
    a = CHOICES["indefinite"][0]
    op = hg.operators.matrix(torch.tensor(a), symmetric=True)
    with pytest.warns(hg.HypergradientWarning, match="NOT_POSITIVE_DEFINITE"):
        solution = S.Auto(max_steps=30)(op, torch.tensor(side(N)))
    assert solution.method == "CG: declared symmetric" and solution.steps == 30 and op.products == 31


def test_auto_keeps_what_solves_the_system():
    """Dense by LU, where the symmetry that was declared is not there; CG, where a small asymmetry did no harm."""
    n = 90
    op = hg.operators.matrix(torch.tensor(np.roll(np.eye(n), 1, axis=0)), positive_definite=True)
    solution = S.Auto(rtol=1e-9, dense=100)(op, torch.tensor(side(n)))
    assert solution.method == "Dense: 90 unknowns, at most 100" and solution.status is Status.CONVERGED
    np.testing.assert_allclose(solution.value.numpy(), np.roll(side(n), -1), rtol=0, atol=1e-14)
    skew = 1e-5 * np.random.RandomState(0).randn(N, N)
    a = with_spectrum(logspace(10, N), 1) + skew
    op = hg.operators.matrix(torch.tensor(a), symmetric=True)
    solution = S.Auto(rtol=1e-3)(op, torch.tensor(side(N)))
    assert solution.method == "CG: declared symmetric" and solution.ok
    with pytest.warns(hg.HypergradientWarning, match="NOT_SYMMETRIC"):  # CG saw it
        S.CG(max_steps=5)(op, torch.tensor(side(N)))
    both = np.stack([a, with_spectrum(np.append(-np.ones(3), logspace(10, N - 3)), 1)])
    op, b = hg.operators.matrix(torch.tensor(both), symmetric=True), np.stack([side(N)] * 2)
    together = S.Auto(rtol=1e-3)(op, torch.tensor(b))
    assert together.ok and together.method == "MINRES: CG ended with NOT_POSITIVE_DEFINITE"
    torch.testing.assert_close(together.value[0], solution.value, rtol=1e-12, atol=0)


def test_auto_materialises_no_sharded_tensor():
    class Sharded(torch.Tensor):
        """Stands for one: a vector of such tensors has no flat form."""

    op = hg.operators.function(lambda v: 2 * v, symmetric=True)
    solution = S.Auto(rtol=1e-9)(op, torch.tensor(side(6)).as_subclass(Sharded))
    assert solution.method == "CG: declared symmetric" and solution.ok


def test_auto_starts_anew_where_the_iterates_of_cg_are_lost():
    """A positive definite A with a large skew part, declared symmetric: CG's residual grows a thousandfold."""
    a = np.eye(N) + 5 * (SHIFT - SHIFT.T)
    solution = auto(a, True)
    assert solution.method == "GMRES: CG ended with NOT_SYMMETRIC" and solution.ok
    op, b = (hg.operators.matrix(torch.tensor(a), symmetric=True), torch.tensor(side(N)))
    lost = S.CG(rtol=1e-9, on_failure="ignore")(op, b)
    assert lost.status is Status.NOT_SYMMETRIC and lost.trace[-2] > 1e3 and not lost.value.any()
    assert solution.steps - lost.steps == S.GMRES(rtol=1e-9)(op, b).steps
    np.testing.assert_allclose(solution.value.numpy(), np.linalg.solve(a, side(N)), rtol=1e-6, atol=1e-8)
