"""The estimated error of a hypergradient against the true one, and the corrected hypergradient, by dense NumPy."""

import numpy as np
import pytest
import torch

import hypergrad as hg
from helpers import EXACT, S, as_lists, hypergradient, nothing_changed, problem_at
from perturbed import away_from, breast_cancer, error, moved, plain
from test_oracles import flat, forms

check = hg.diagnostics.check
QUIET = S.Dense(on_failure="ignore")


def assert_estimates(condition: float, seeds: list, sizes: np.ndarray) -> None:
    p = breast_cancer(condition)
    assert 0.99 < p.condition / condition < 1.01
    worst, square = 1.0, 0.0
    for seed in seeds:
        for size in sizes:
            q = away_from(p, float(size), seed)
            result = hypergradient(q, "inner_loss", QUIET)
            polished = hg.implicit.polish(result, QUIET)
            e = check(result).estimate
            true = error(result.grads, p)
            ratio = e.error / (true * np.linalg.norm(p.grads[0]))
            if not e.settled:  # this happens only if the hypergradient is worse than zero
                assert true > 1.0
                continue
            if true < 0.1:
                assert 0.9 <= ratio <= 1.1, (seed, size, true, ratio)
                worst = max(worst, ratio, 1 / ratio)
                assert error(polished.grads, p) <= 20 * true**2 + 1e-13
                if true > 0.005:  # 1.6e-2 becomes 4e-4 or less, by at least one Newton step
                    assert error(e.corrected, p) <= 1.6 * true**2
                square = max(square, (error(polished.grads, p) - 1e-13) / true**2)
            elif true <= 1.0 + 1e-6:
                assert 0.3 <= ratio <= 3, (seed, size, true, ratio)
            assert error(e.corrected, p) <= max(0.05 * true, 20 * true**2 if true < 0.005 else 0.0) + 1e-13
    print(f"condition {condition:g}: estimate within {worst - 1:.1%}, corrected error ≤ {square:.1f} times the square")


@pytest.mark.parametrize("condition", [4, 14, 55, 1000])
def test_estimate_and_correction_on_breast_cancer(condition):
    assert_estimates(condition, [None, 0], np.logspace(0, -8, 9))


@pytest.mark.slow
@pytest.mark.parametrize("condition", [4, 14, 55, 1000])
def test_estimate_and_correction_on_breast_cancer_from_many_points(condition):
    assert_estimates(condition, [None, *range(12)], np.logspace(0, -8, 25))


@pytest.mark.parametrize("form", ["inner_loss", "fp_map", "residual"])
def test_polish_corrects_the_adjoint_too(form):
    """At the exact solution with few CG steps, the correction continues the solve of the adjoint system."""
    p = plain("logistic", seed=1)
    rough = hypergradient(p, form, S.CG(max_steps=3))
    e = check(rough).estimate
    assert 0.9 < e.error / (error(rough.grads, p) * np.linalg.norm(p.grads[0])) < 1.1
    assert e.from_adjoint > 1e3 * e.from_inner
    assert error(e.corrected, p) < EXACT


@pytest.mark.parametrize("name", ["logistic", "equilibrium", "ridge", "quadratic-1e3", "contraction-.9"])
def test_check_in_every_form(name):
    p = problem_at(name, seed=2)
    for form in forms(p):
        q = moved(p, 1e-2)
        result = hypergradient(q, form, S.GMRES(rtol=1e-3, on_failure="ignore"))
        with nothing_changed(q.params, q.hparams):
            e = check(result).estimate
        true = error(result.grads, p) * np.linalg.norm(np.concatenate([g.ravel() for g in p.grads]))
        assert e.settled and 0.9 < e.error / true < 1.1
        assert error(e.corrected, p) < 0.1 * error(result.grads, p)
        assert abs(e.inner_residual - float(result.inner_residual.square().sum().sqrt())) <= 1e-12 * e.inner_residual
        assert abs(e.adjoint_residual - float(result.solution.residual_norm.square().sum().sqrt())) < 1e-9
        away = float((flat(q.params) - flat(p.params)).norm() / flat(p.params).norm())
        assert 0.8 < e.distance / away < 1.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.filterwarnings("ignore::hypergrad.InaccurateHypergradient")
def test_check_of_hypertorchs_lists(dtype):
    p = as_lists(moved(problem_at("logistic", dtype=dtype), 1e-2))
    truth = np.linalg.norm(np.concatenate(p.grads))
    problem = {"outer_loss": p.outer_loss, "params": p.params, "hparams": p.hparams, "fp_map": p.fp_map}
    for method in (hg.CG, hg.fixed_point, hg.CG_normaleq):
        grads = method(p.params, p.hparams, 5, p.fp_map, p.outer_loss, set_grad=False)
        e = check(grads, **problem).estimate
        assert 0.9 < e.error / (error(grads, p) * truth) < 1.1


@pytest.mark.parametrize("unroll", [hg.unroll.reverse, hg.unroll.forward])
def test_check_of_an_unrolled_result(unroll):
    p = plain("logistic")
    result = unroll(p.fp_map, torch.zeros_like(p.params), p.hparams, p.outer_loss, steps=30)
    e = check(result, fp_map=p.fp_map, outer_loss=p.outer_loss, hparams=p.hparams).estimate
    assert 0.9 < e.error / (error(result.grads, p) * np.linalg.norm(p.grads[0])) < 1.1
    assert abs(e.corrected_value - p.value) < 0.05 * abs(float(result.outer_value) - p.value)


def test_gauss_newton_hypergradients_are_compared_with_the_hessians():
    """For a nonlinear model the Gauss–Newton hypergradient has an error, and the report estimates it."""
    torch.manual_seed(0)
    x, y = torch.randn(40, 3, dtype=torch.float64), torch.randn(40, dtype=torch.float64)
    g = hg.operators.GaussNewton(
        lambda w, lam: torch.tanh(x @ w), lambda z, lam: (z - y).square().mean(), lambda w, lam: lam * w @ w
    )
    lam = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    w = torch.ones(3, dtype=torch.float64)
    options = {"params": w, "hparams": lam, "solver": QUIET}
    rough = hg.implicit.grad(lambda w, lam: w.square().sum(), inner_loss=lambda w, h: g(w, h), **options)
    start = hg.implicit.refine(rough, 1e-10)
    options["params"] = start.problem.params
    rough = hg.implicit.grad(lambda w, lam: w.square().sum(), inner_loss=g, **options)
    e = check(rough).estimate
    true = float((rough.grads - start.grads).abs())
    assert true > 1e-3 * float(start.grads.abs()) and 0.95 < e.error / true < 1.05
    assert e.from_adjoint > 100 * e.from_inner
    with pytest.raises(TypeError, match="GaussNewton"):
        hg.implicit.polish(rough)
