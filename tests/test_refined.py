"""Refined: products in low precision, answers in full."""

import numpy as np
import pytest
import torch

import hypergrad as hg
from helpers import assert_agrees, problem_at
from hypergrad import solvers as S
from hypergrad.solvers import Status
from systems import GRID, logspace, norm, side, with_singular_values, with_spectrum
from test_solvers import Reads

N = 60
SINGLE = {"dtype": torch.float32}


def inner(make, **options):
    return make(max_steps=500, on_failure="ignore", **({"rtol": 1e-3} | options))


@pytest.mark.parametrize(
    ("a", "tag", "solver"),
    [
        (with_spectrum(logspace(1e3, N), 1), True, inner(S.CG)),
        (with_spectrum(np.append(-np.ones(5), logspace(100, N - 5)), 1), True, inner(S.MINRES)),
        (np.eye(N) + 0.5 * with_singular_values(np.ones(N), 2), False, inner(S.GMRES)),
    ],
    ids=["CG", "MINRES", "GMRES"],
)
def test_full_accuracy_from_products_in_float32(a, tag, solver):
    op = hg.operators.matrix(torch.tensor(a), symmetric=tag)
    solution = S.Refined(rtol=1e-13, solver=solver, **SINGLE)(op, torch.tensor(side(N)))
    assert solution.status is Status.CONVERGED
    assert norm(a @ solution.value.numpy() - side(N)) <= 1.01e-13 * norm(side(N))
    np.testing.assert_allclose(solution.value.numpy(), np.linalg.solve(a, side(N)), rtol=0, atol=1e-9)
    # A correction is exact to about the rtol of its solver: 13 digits take at least four of 1e-3.
    assert 4 <= solution.steps <= 12 and solution.trace[-1] < 1e-12 * solution.trace[0]


def test_the_low_precision_is_used():
    """One correction alone is as wrong as float32 makes it, and no better."""
    a = with_spectrum(logspace(100, N), 1)
    op = hg.operators.matrix(torch.tensor(a), symmetric=True)
    once = S.Refined(max_steps=1, solver=inner(S.CG, rtol=1e-15), **SINGLE)(op, torch.tensor(side(N)))
    assert 1e-8 < float(once.relative_residual) < 1e-5


def test_products_are_counted():
    a = with_spectrum(logspace(10, N), 1)
    op = hg.operators.matrix(torch.tensor(a), symmetric=True)
    S.Refined(max_steps=3, solver=S.CG(max_steps=4, on_failure="ignore"), **SINGLE)(op, torch.tensor(side(N)))
    # Each correction: 4 steps, their residual in low precision, the residual in full precision; and the last check.
    assert op.products == 3 * (4 + 1 + 1) + 1


def test_a_batch():
    system = GRID["batch spd"]
    solution = S.Refined(rtol=1e-12, solver=inner(S.CG, rtol=1e-2), **SINGLE)(system.operator(), system.rhs())
    assert solution.ok and np.all(
        system.residuals(solution.value.numpy()) <= 1.01e-12 * np.linalg.norm(system.b, axis=-1)
    )


def test_beyond_the_low_precision_it_says_so():
    """Condition 10⁵ in bfloat16: Ã is not even definite."""
    a = with_spectrum(logspace(1e5, N), 1)
    op = hg.operators.matrix(torch.tensor(a), symmetric=True)
    with pytest.warns(hg.HypergradientWarning, match="Refined: (STAGNATED|DIVERGED)"):
        solution = S.Refined(rtol=1e-10, solver=inner(S.CG))(op, torch.tensor(side(N)))
    assert norm(a @ solution.value.numpy() - side(N)) <= norm(side(N))  # the best iterate, not the last


def test_damping_and_start():
    a = with_spectrum(logspace(100, N), 1)
    op, start = hg.operators.matrix(torch.tensor(a), symmetric=True), torch.tensor(side(N, 3))
    solution = S.Refined(rtol=1e-12, damping=0.3, solver=inner(S.CG), **SINGLE)(op, torch.tensor(side(N)), start)
    np.testing.assert_allclose(solution.value, np.linalg.solve(a + 0.3 * np.eye(N), side(N)), rtol=0, atol=1e-10)


# Problems whose losses take their data from params and hparams alone, so that a cast casts everything.
def ridge(dtype: torch.dtype):
    draw = np.random.RandomState(0)
    x, y = torch.tensor(draw.randn(40, 12), dtype=dtype), torch.tensor(draw.randn(40), dtype=dtype)
    lam = torch.tensor(draw.randn(12), dtype=dtype, requires_grad=True)
    a = x.mT @ x / 40 + torch.diag(lam.detach().exp())
    w = torch.linalg.inv(a.double()) @ (x.mT @ y / 40).double()
    truth = -lam.detach().double().exp() * w * (torch.linalg.inv(a.double()) @ w)
    loss = lambda w, lam: ((x.to(w) @ w - y.to(w)) ** 2).mean() / 2 + (lam.exp() * w**2).sum() / 2  # noqa: E731
    step = lambda w, lam: w - 0.3 * ((x.mT @ (x @ w - y)).to(w) / 40 + lam.exp() * w)  # noqa: E731
    return loss, step, w.to(dtype), lam, truth


def half_square(w, lam):
    return (w**2).sum() / 2


@pytest.mark.parametrize(("dtype", "low", "tolerance"), [("float64", "float32", 1e-10), ("float32", "bfloat16", 2e-6)])
@pytest.mark.parametrize("form", ["inner_loss", "fp_map"])
def test_hypergradients(form, dtype, low, tolerance):
    loss, step, w, lam, truth = ridge(getattr(torch, dtype))
    if form == "fp_map" and low == "float32":
        step = lambda w, lam: w - 0.3 * torch.func.grad(loss)(w, lam)  # noqa: E731
    given = {"inner_loss": loss} if form == "inner_loss" else {"fp_map": step, "symmetric": True}
    solver = S.Refined(dtype=getattr(torch, low), solver=inner(S.CG, rtol=1e-2), rtol=tolerance / 10)
    result = hg.implicit.grad(half_square, params=w, hparams=lam, solver=solver, **given)
    assert result.solution.ok and result.grads.dtype == w.dtype
    assert float((result.grads.double() - truth).norm() / truth.norm()) <= tolerance


def test_gauss_newton_in_low_precision():
    _, _, w, lam, truth = ridge(torch.float64)
    draw = np.random.RandomState(0)
    x, y = torch.tensor(draw.randn(40, 12)), torch.tensor(draw.randn(40))
    g = hg.operators.GaussNewton(
        lambda w, lam: x.to(w) @ w,
        lambda z, lam: ((z - y.to(z)) ** 2).mean() / 2,
        lambda w, lam: (lam.exp() * w**2).sum() / 2,
    )
    solver = S.Refined(rtol=1e-12, solver=inner(S.CG), **SINGLE)
    result = hg.implicit.grad(half_square, params=w, hparams=lam, inner_loss=g, solver=solver)
    torch.testing.assert_close(result.grads, truth, rtol=1e-10, atol=1e-12)


def test_what_has_no_form_in_low_precision_is_refused():
    loss, _, w, lam, _ = ridge(torch.float64)
    w.requires_grad_()
    with pytest.raises(TypeError, match=r"no form in torch.bfloat16.*given as a callable"):
        hg.implicit.grad(half_square(w, lam), params=w, hparams=lam, inner_loss=loss(w, lam), solver=S.Refined())
    with pytest.raises(TypeError, match="not stochastic"):
        hg.implicit.grad(half_square, params=w, hparams=lam, inner_loss=loss, stochastic=True, solver=S.Refined())
    with pytest.raises(TypeError, match="CG needs a symmetric operator"):
        S.Refined()(hg.operators.matrix(torch.eye(3)), torch.ones(3))


def test_the_default_serves_a_reference_problem():
    p = problem_at("ridge")
    with pytest.raises(RuntimeError, match="dtype"):  # data in float64 stays so: torch's own words pass through
        hg.implicit.grad(
            p.outer_loss, params=p.params, hparams=p.hparams, inner_loss=p.inner_loss, solver=S.Refined(**SINGLE)
        )
    result = hg.implicit.grad(
        p.outer_loss, params=p.params, hparams=p.hparams, inner_loss=p.inner_loss, solver=S.Refined(rtol=1e-12)
    )
    assert_agrees(p, result.grads)  # autocast leaves float64 alone: exact in one correction or a few


def test_without_options_it_goes_to_the_tolerance_that_all_solvers_have():
    a = with_spectrum(logspace(100, N), 1)
    op, b = hg.operators.matrix(torch.tensor(a), symmetric=True), torch.tensor(side(N))
    solution = S.Refined(**SINGLE)(op, b)
    assert solution.ok and 1e-12 < float(solution.relative_residual) <= 1e-6 and solution.steps < 8


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("steps", [8, 9, 10, 20])
def test_fixed_corrections_that_meet_rounding_are_no_failure(steps, start):
    a = with_spectrum(logspace(100, N), 1)
    op, b = hg.operators.matrix(torch.tensor(a), symmetric=True), torch.tensor(side(N))
    x0 = torch.tensor(np.linalg.solve(a, side(N))) if start else None
    solution = S.Refined(max_steps=steps, on_failure="raise", **SINGLE)(op, b, x0)
    assert solution.steps == steps and len(solution.trace) == steps + 1 and float(solution.relative_residual) < 1e-14


def test_fixed_corrections_that_gain_nothing_are_one():
    a = with_spectrum(logspace(1e5, N), 1)
    op = hg.operators.matrix(torch.tensor(a), symmetric=True)
    with pytest.warns(hg.HypergradientWarning, match="Refined: (STAGNATED|DIVERGED) after 5"):
        S.Refined(max_steps=5, solver=inner(S.CG))(op, torch.tensor(side(N)))


GENERAL = np.eye(N) + 0.5 * with_singular_values(np.ones(N), 2)


@pytest.mark.parametrize("solver", [S.GMRES, S.LSQR, S.NormalCG])
def test_the_transpose_in_low_precision(solver):
    op, b = hg.operators.matrix(torch.tensor(GENERAL)), torch.tensor(side(N))
    refined = S.Refined(rtol=1e-12, solver=inner(solver), **SINGLE)
    for each, a in (
        (op, GENERAL),
        (op.T, GENERAL.T),
        (op.T.T, GENERAL),
        (op.damped(0.3).T, GENERAL.T + 0.3 * np.eye(N)),
    ):
        solution = refined(each, b)
        assert solution.ok and solution.steps < 8
        np.testing.assert_allclose(solution.value, np.linalg.solve(a, side(N)), rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", ["fp_map", "residual"])
@pytest.mark.parametrize("solver", [S.GMRES, S.LSQR])
def test_polish_needs_the_transpose_of_an_inner_problem(solver, form):
    """The first-order correction has a system with A beside that with Aᵀ."""
    m = torch.tensor(0.5 * with_singular_values(np.ones(N), 2))
    lam, off = torch.tensor(side(N, 1), requires_grad=True), torch.tensor(side(N, 2))
    step = lambda w, lam: m.to(w) @ torch.tanh(w) + lam  # noqa: E731
    w = torch.zeros(N, dtype=torch.float64)
    for _ in range(100):
        w = step(w, lam.detach())
    given = {"fp_map": step} if form == "fp_map" else {"residual": lambda w, lam: w - step(w, lam)}

    def polished(solver):
        options = {"params": w + 1e-3 * off, "hparams": lam, "solver": solver, "polish": True}
        return hg.implicit.grad(lambda w, lam: (w**3).sum(), **given, **options)

    low, full = polished(S.Refined(rtol=1e-12, solver=inner(solver), **SINGLE)), polished(S.GMRES(rtol=1e-12))
    torch.testing.assert_close(low.grads, full.grads, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(low.relative_error, full.relative_error, rtol=1e-6, atol=0)


def test_bad_options_are_named():
    for dtype in ("bfloat16", torch.int32, torch.complex64, None):
        with pytest.raises(TypeError, match=f"dtype must be one of torch.bfloat16, .*, got {dtype!r}"):
            S.Refined(dtype=dtype)
    for solver in (None, S.CG, lambda op, b, x0: b):
        with pytest.raises(TypeError, match=r"solver must be a linear solver from hg\.solvers, got"):
            S.Refined(solver=solver)


def test_reads_from_the_device(monkeypatch):
    """None with fixed steps; with a tolerance a look after each correction, which costs more than the look."""
    monkeypatch.setattr("hypergrad.solvers._solver.FREE_TO_READ", ())
    for name in ("spd 10", "batch spd", "NaN in A"):
        op, b = GRID[name].operator(), GRID[name].rhs()
        with Reads() as counted:
            S.Refined(max_steps=3, solver=S.CG(max_steps=4), on_failure="ignore", **SINGLE)(op, b)
        assert counted.count == 0
    op, b = GRID["spd 10"].operator(), GRID["spd 10"].rhs()
    assert S.Refined(rtol=1e-12, **SINGLE)(op, b).steps % 5  # no multiple of five
