"""The estimated error of a hypergradient against the true one, and the corrected hypergradient, by dense NumPy."""

import json
import math
import warnings
from dataclasses import replace
from functools import cache

import numpy as np
import optree
import pytest
import torch
from scipy.optimize import brentq
from torch.nn.functional import binary_cross_entropy_with_logits as log_loss

import hypergrad as hg
import oracles
from helpers import EXACT, S, as_lists, errors, hypergradient, noisy, nothing_changed, problem_at
from hypergrad.implicit import tolerances
from problems import Problem
from test_oracles import flat, forms, relative, unflatten

check = hg.diagnostics.check
QUIET = S.Dense(on_failure="ignore")
SQUARE = [("logistic", form) for form in ("inner_loss", "fp_map", "residual")] + [
    ("equilibrium", "fp_map"),
    ("ridge", "inner_loss"),
    ("ridge", "fp_map"),
    ("ridge", "residual"),
]
LINEAR = [(name, form) for name in ("biased", "quadratic-1e3", "contraction-.9") for form in ("fp_map", "residual")]


@cache
def plain(name: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> Problem:
    """A problem with one tensor for params and one for hparams."""
    p = problem_at(name, seed, dtype)

    def packed(f, value=flat):
        return None if f is None else lambda w, h: value(f(unflatten(p.params, w), unflatten(p.hparams, h)))

    return replace(
        p,
        params=flat(p.params),
        hparams=flat(p.hparams).detach().requires_grad_(),
        inner_loss=packed(p.inner_loss, lambda x: x),
        outer_loss=packed(p.outer_loss, lambda x: x),
        fp_map=packed(p.fp_map),
        residual=packed(p.residual),
        grads=[np.concatenate([g.ravel() for g in p.grads])],
    )


def moved(p: Problem, size: float, seed: int = 0) -> Problem:
    """The problem at params a relative distance `size` from the solution."""
    rng = torch.Generator().manual_seed(seed)
    leaves = optree.tree_leaves(p.params)
    away = [torch.randn(x.shape, generator=rng, dtype=x.dtype) for x in leaves]
    scale = size * flat(leaves).norm() / flat(away).norm()
    tree = optree.tree_structure(p.params)
    return replace(p, params=optree.tree_unflatten(tree, [x + scale * u for x, u in zip(leaves, away, strict=True)]))


def error(result, p: Problem) -> float:
    return relative(flat(result), flat([torch.as_tensor(g) for g in p.grads]))


@cache
def breast_cancer(condition: float) -> Problem:
    """Logistic regression with one strength for all features, chosen for this condition number of the Hessian."""

    def off(theta: float) -> float:
        return math.log(oracles.logistic(np.full(30, theta)).condition / condition)

    o = oracles.logistic(np.full(30, brentq(off, -14.0, 0.0, xtol=1e-4)))
    x, y, xv, yv = (torch.as_tensor(o.data[k]) for k in ("x", "y", "xv", "yv"))
    template = plain("logistic")
    return replace(
        template,
        params=torch.as_tensor(o.solution),
        hparams=torch.as_tensor(o.hparams[0]).requires_grad_(),
        inner_loss=lambda w, h: log_loss(x @ w, y) + 0.5 * (h.exp() * w * w).sum(),
        outer_loss=lambda w, h: log_loss(xv @ w, yv),
        value=o.value,
        grads=list(o.grads),
        condition=o.condition,
    )


def away_from(p: Problem, size: float, seed: int | None) -> Problem:
    """Params moved in a random direction, or (None) towards 0, where an inner solver starts."""
    return replace(p, params=(1 - size) * p.params) if seed is None else moved(p, size, seed)


def assert_estimates(condition: float, seeds: list, sizes: np.ndarray) -> None:
    p = breast_cancer(condition)
    assert 0.99 < p.condition / condition < 1.01
    worst, square = 1.0, 0.0
    for seed in seeds:
        for size in sizes:
            q = away_from(p, float(size), seed)
            result = hypergradient(q, "inner_loss", QUIET)
            polished = hypergradient(q, "inner_loss", QUIET, polish=True)
            e = check(result, structure=False).estimate
            true = error(result.grads, p)
            ratio = e.error / (true * np.linalg.norm(p.grads[0]))
            if not e.settled:  # said, and only where the hypergradient is more wrong than zero would be
                assert true > 1.0
                continue
            if true < 0.1:
                assert 0.9 <= ratio <= 1.1, (seed, size, true, ratio)
                worst = max(worst, ratio, 1 / ratio)
                assert error(polished.grads, p) <= 20 * true**2 + 1e-13
                if true > 0.005:  # 1.6e-2 becomes 4e-4 or less: here at least one Newton step was followed
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


def test_the_first_order_estimate_alone_is_not_enough_far_away():
    """Why the estimate takes Newton steps."""
    q = away_from(breast_cancer(1000), 1.0, None)
    result = hypergradient(q, "inner_loss", QUIET)
    rough, good = (check(result, newton_steps=n).estimate for n in (0, 20))
    true = error(result.grads, q) * np.linalg.norm(q.grads[0])
    assert not rough.settled and not 0.3 < rough.error / true < 3
    assert good.settled and 0.95 < good.error / true < 1.05


@pytest.mark.parametrize(("name", "form"), SQUARE)
def test_polish_squares_the_error_of_gradient_and_value(name, form):
    p = problem_at(name, seed=1)
    sizes = [1e-2, 1e-3, 1e-4]
    plain, polished = [], []
    for size in sizes:
        q = moved(p, size)
        for polish, found in ((False, plain), (True, polished)):
            result = hypergradient(q, form, QUIET, polish=polish)
            found.append((error(result.grads, p), abs(float(result.outer_value) - p.value) / abs(p.value)))
    plain, polished = np.array(plain), np.array(polished)
    assert np.allclose(np.log10(plain[:-1] / plain[1:]), 1, atol=0.1)
    assert np.allclose(np.log10(polished[:-1] / polished[1:]), 2, atol=0.1)
    assert (polished <= 50 * plain[:, :1] ** 2).all()


@pytest.mark.parametrize(("name", "form"), LINEAR)
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_polish_is_exact_where_everything_is_linear(name, form, size):
    """E quadratic, F linear: the gradient is exact, the value is off by −½ δᵀ∇²E δ."""
    p = plain(name)
    q = moved(p, size)
    result = hypergradient(q, form, QUIET, polish=True)
    assert max(errors(result.grads, p.grads)) < EXACT * max(1.0, p.condition / 100)
    delta = q.params - p.params
    hessian = torch.autograd.functional.hessian(lambda w: p.outer_loss(w, p.hparams), p.params)
    wrong = -0.5 * float(delta @ hessian @ delta)
    assert abs(float(result.outer_value) - p.value - wrong) < EXACT * (abs(p.value) + abs(wrong)) * p.condition**0.5


@pytest.mark.parametrize("form", ["inner_loss", "fp_map", "residual"])
def test_polish_corrects_the_adjoint_too(form):
    """Few CG steps at the exact solution: what the correction adds is the rest of A⁻¹, solved for as far as it goes."""
    p = plain("logistic", seed=1)
    rough = hypergradient(p, form, S.CG(max_steps=3))
    e = check(rough).estimate
    assert 0.9 < e.error / (error(rough.grads, p) * np.linalg.norm(p.grads[0])) < 1.1
    assert e.from_adjoint > 1e3 * e.from_inner
    assert error(e.corrected, p) < EXACT


def test_polish_and_evaluated_losses_on_live_tensors():
    p = moved(plain("logistic"), 1e-3)
    w = p.params.clone().requires_grad_()
    with nothing_changed(w, p.hparams):
        live = hg.implicit.grad(
            p.outer_loss(w, p.hparams),
            inner_loss=p.inner_loss(w, p.hparams),
            params=w,
            hparams=p.hparams,
            solver=QUIET,
            polish=True,
        )
    assert relative(live.grads, hypergradient(p, "inner_loss", QUIET, polish=True).grads) < 1e-12


def test_polish_through_a_network_that_makes_the_hparams():
    p = moved(plain("logistic"), 1e-3)
    base = p.hparams.detach().clone().requires_grad_()
    made = base * 1.0
    result = hg.implicit.grad(
        p.outer_loss, inner_loss=p.inner_loss, params=p.params, hparams=made, solver=QUIET, polish=True
    )
    assert relative(result.grads, hypergradient(p, "inner_loss", QUIET, polish=True).grads) < 1e-12
    made.sum().backward()  # its graph is still there
    assert result.problem.hparams.grad_fn is None


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


def test_a_right_hypergradient_is_said_to_be_right():
    p = plain("logistic")
    report = check(hypergradient(p, "inner_loss", S.CG(rtol=1e-12)))
    assert report.estimate.relative_error < 1e-10
    assert "right to about" in report.advice[0] and len(report.advice) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
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


def test_what_changed_since_is_an_error_that_names_it():
    p = plain("logistic")
    w, h = p.params.clone(), p.hparams.detach().clone().requires_grad_()
    options = {"inner_loss": p.inner_loss, "params": w, "hparams": h, "solver": QUIET}
    result = hg.implicit.backward(p.outer_loss, **options)
    before = h.detach().clone().requires_grad_()
    torch.optim.SGD([h], lr=0.1).step()
    with pytest.raises(ValueError, match=r"hparams changed since.*pass hparams= as they were"):
        check(result)
    assert check(result, hparams=before).estimate.relative_error < 1e-10
    w.add_(1.0)
    with pytest.raises(ValueError, match="params and hparams changed since"):
        check(result)
    with pytest.raises(ValueError, match=r"^params changed since"):
        check(result, hparams=before)


def test_evaluated_losses_are_asked_for_again():
    p = moved(plain("logistic"), 1e-2)
    w = p.params.clone().requires_grad_()
    options = {"params": w, "hparams": p.hparams, "solver": QUIET}
    result = hg.implicit.grad(p.outer_loss(w, p.hparams), inner_loss=p.inner_loss(w, p.hparams), **options)
    with pytest.raises(TypeError, match=r"needs outer_loss, inner_loss .it was given evaluated"):
        check(result)
    report = check(result, outer_loss=p.outer_loss, inner_loss=p.inner_loss)
    assert 0.9 < report.estimate.error / (error(result.grads, p) * np.linalg.norm(p.grads[0])) < 1.1


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({}, "needs outer_loss, inner_loss .or fp_map, or residual., params, hparams .the result does not know it"),
        ({"outer_loss": 1.0}, "needs inner_loss .or fp_map, or residual., params, hparams"),
        ({"inner_loss": 1, "fp_map": 2}, "exactly one"),
    ],
)
def test_a_list_without_its_problem_is_an_error(keywords, message):
    with pytest.raises(TypeError, match=message):
        check([torch.ones(3)], **keywords)


def test_a_stochastic_problem_has_no_error_estimate():
    p = plain("logistic")
    result = hypergradient(p, "fp_map", S.GMRES(max_steps=3), stochastic=True)
    with pytest.raises(ValueError, match="drawn anew"):
        check(result)
    for option in ({"polish": True}, {"hypergradient_rtol": 0.1}):
        with pytest.raises(ValueError, match="drawn anew"):
            hypergradient(p, "fp_map", S.GMRES(), stochastic=True, **option)


def test_a_problem_that_changed_without_a_trace_is_noticed():
    p, shift = moved(plain("logistic"), 1e-2), [1.0]
    q = replace(p, inner_loss=lambda w, h: p.inner_loss(w, h) * shift[0])
    result = hypergradient(q, "inner_loss", QUIET)
    assert not any("random" in line for line in check(result).advice)
    shift[0] = 2.0
    assert any("the inner problem is random, or its data or buffers changed" in line for line in check(result).advice)


def test_nan_is_said_and_nothing_is_estimated():
    p = plain("logistic")
    q = replace(p, outer_loss=lambda w, h: p.outer_loss(w, h) * torch.nan)
    report = check(hypergradient(q, "inner_loss", S.CG(on_failure="ignore")))
    assert not report.estimate.settled and "NaN" in report.advice[0]
    json.dumps(report.to_dict())


def test_the_report_is_a_table_that_ends_in_advice_and_a_dict_of_numbers():
    p = moved(plain("logistic"), 0.3)
    with pytest.warns(hg.UnsolvedInnerProblem):
        result = hypergradient(p, "inner_loss", S.CG(rtol=1e-8))
    report = check(result)
    lines = str(report).splitlines()
    assert lines[0].startswith("inner residual") and lines[-1].startswith("- ")
    assert any("the inner problem is not solved" in line for line in report.advice)
    assert any(
        "spend its steps there" in line and "the adjoint system is solved further" in line for line in report.advice
    )
    assert "condition number" in str(report) and report.structure.definiteness == "positive definite"
    numbers = json.loads(json.dumps(report.to_dict()))
    assert numbers["relative_error"] == report.estimate.relative_error and numbers["bound"] is None
    rough = check(hypergradient(plain("logistic"), "inner_loss", S.CG(max_steps=2)))
    assert any("the adjoint system is not solved" in line for line in rough.advice)
    assert any("the inner problem is solved further" in line for line in rough.advice)


@pytest.mark.parametrize("form", ["fp_map", "inner_loss"])
def test_the_advice_tells_the_pace_of_the_inner_solver(form):
    """8 gradient steps of the size that fp_map takes, which is the best: what is left falls by q a step."""
    p, w = plain("logistic"), torch.zeros(30, dtype=torch.float64)
    for _ in range(8):
        w = p.fp_map(w, p.hparams).detach()
    result = hypergradient(replace(p, params=w), form, QUIET)
    report = check(result, inner_steps=8)
    text = next(line for line in report.advice if "the inner problem is not solved" in line)
    q = float(text.split(" is ")[2].split(",")[0])
    assert abs(q - p.contraction) < 0.03  # that is at the solution
    assert f"8 steps reduce the error by {100 * (1 - q**8):.2g}%" in text
    more = int(text.split("about ")[1].split(" more")[0])
    for _ in range(more):
        w = p.fp_map(w, p.hparams).detach()
    assert error(hypergradient(replace(p, params=w), form, QUIET).grads, p) < 2e-3


def test_findings_come_first_in_the_advice():
    p = plain("logistic")
    h = p.hparams.detach().clone().requires_grad_()
    extra = torch.ones(2, dtype=torch.float64, requires_grad=True)
    result = hg.implicit.grad(
        lambda w, h: p.outer_loss(w, h[0]),
        inner_loss=lambda w, h: p.inner_loss(w, h[0]),
        params=p.params,
        hparams=[h, extra],
        solver=QUIET,
    )
    report = check(result)
    assert [each.name for each in report.findings] == ["hyperparameter reaches nothing"]
    assert report.advice[0].startswith("hyperparameter reaches nothing")
    json.dumps(report.to_dict())


def test_gauss_newton_is_judged_by_the_hessian():
    """A model that is not linear: the hypergradient of the Gauss–Newton matrix is off, and the report says how far."""
    torch.manual_seed(0)
    x, y = torch.randn(40, 3, dtype=torch.float64), torch.randn(40, dtype=torch.float64)
    g = hg.operators.GaussNewton(
        lambda w, lam: torch.tanh(x @ w), lambda z, lam: (z - y).square().mean(), lambda w, lam: lam * w @ w
    )
    lam = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    w = torch.ones(3, dtype=torch.float64)
    options = {"params": w, "hparams": lam, "solver": QUIET}
    start = hg.implicit.grad(
        lambda w, lam: w.square().sum(),
        inner_loss=lambda w, h: g(w, h),
        hypergradient_rtol=1e-10,
        refine=True,
        **options,
    )
    options["params"] = start.problem.params
    rough = hg.implicit.grad(lambda w, lam: w.square().sum(), inner_loss=g, **options)
    e = check(rough).estimate
    true = float((rough.grads - start.grads).abs())
    assert true > 1e-3 * float(start.grads.abs()) and 0.95 < e.error / true < 1.05
    assert e.from_adjoint > 100 * e.from_inner
    with pytest.raises(TypeError, match="GaussNewton"):
        hg.implicit.grad(lambda w, lam: w.square().sum(), inner_loss=g, polish=True, **options)


def test_an_estimate_that_cannot_be_had_says_so():
    """g = log(1 + e^w) has no minimiser."""
    lam = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    with pytest.warns(hg.HypergradientWarning):
        result = hg.implicit.grad(
            lambda w, lam: w.square(),
            inner_loss=lambda w, lam: torch.nn.functional.softplus(lam * w),
            params=torch.tensor(1.0, dtype=torch.float64),
            hparams=lam,
        )
    report = check(result, newton_steps=5)
    assert not report.estimate.settled
    assert any("cannot be estimated" in line for line in report.advice)


def newton_fit(p: Problem):
    """hparams ↦ the exact solution of breast-cancer logistic regression, by the oracle."""
    return lambda h: torch.as_tensor(oracles.logistic(h.numpy()).solution)


def test_finite_differences_of_the_whole_map():
    p = plain("logistic")
    right = check(hypergradient(p, "inner_loss", QUIET), solve=newton_fit(p))
    assert right.differences.relative_error < 1e-6 and right.differences.agrees
    assert not any("finite differences" in line for line in right.advice)
    wrong = hypergradient(moved(p, 0.05), "inner_loss", QUIET)
    report = check(wrong, solve=newton_fit(p))
    assert not report.differences.agrees and report.differences.relative_error > 10 * report.differences.uncertainty
    assert any("finite differences disagree" in line for line in report.advice)
    assert "against finite differences" in str(report)
    json.dumps(report.to_dict())


@pytest.mark.parametrize("step", [0.3, 1e-2, 1e-9])
def test_finite_differences_know_their_own_error(step):
    """Large steps err by curvature, small ones by rounding: the error that is said covers the true one."""
    p = plain("logistic")
    exact = hypergradient(p, "inner_loss", QUIET)
    found = hg.diagnostics.finite_differences(exact.problem, exact.grads, newton_fit(p), step=step, directions=4)
    for derivative, own, given in zip(found.derivatives, found.errors, found.given, strict=True):
        assert abs(derivative - given) <= (0.2 if step == 0.3 else 1.5) * own


def test_finite_differences_refuse_nonsense():
    p = plain("logistic")
    result = hypergradient(p, "inner_loss", QUIET)
    for bad in ({"step": 0.0}, {"directions": 0}):
        with pytest.raises(ValueError, match="step must be positive"):
            check(result, solve=newton_fit(p), **bad)


# Goal-oriented stopping


@pytest.mark.parametrize("goal", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("name", ["logistic", "quadratic-1e3", "quadratic-1e5"])
def test_the_adjoint_is_solved_as_far_as_the_hypergradient_needs(name, goal):
    p = plain(name)
    result = hypergradient(p, "inner_loss", S.CG(max_steps=2000), hypergradient_rtol=goal)
    assert error(result.grads, p) <= goal
    assert float(result.relative_error) <= goal
    assert goal < 1e-3 or float(result.solution.relative_residual) > 1e-2 * goal


def test_a_residual_that_is_small_is_not_enough_for_a_goal():
    """A = diag(1, 1e-2, 1e-4): most of ∇f is in the component that shows least in the residual."""
    a = torch.tensor([1.0, 1e-2, 1e-4], dtype=torch.float64)
    b = torch.tensor([1.0, 3e-3, 3e-4], dtype=torch.float64)
    lam = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    linear = lambda w, lam: w[0] + lam * (w[1] + w[2])  # noqa: E731
    result = hg.implicit.grad(
        lambda w, lam: b @ w,
        inner_loss=lambda w, lam: 0.5 * (a * w) @ w - linear(w, lam),
        params=torch.tensor([1.0, 70.0, 7000.0], dtype=torch.float64),
        hparams=lam,
        solver=S.CG(),
        hypergradient_rtol=1e-2,
    )
    assert abs(float(result.grads) - 3.3) < 0.033


def gradient_steps(p: Problem, count: int):
    calls = []

    def refine(w, h):
        calls.append(1)
        for _ in range(count):
            w = p.fp_map(w, h).detach()
        return w

    return refine, calls


@pytest.mark.parametrize("form", ["inner_loss", "fp_map", "residual"])
@pytest.mark.parametrize("goal", [1e-2, 1e-5])
def test_the_inner_problem_is_refined_as_far_as_the_hypergradient_needs(form, goal):
    p = plain("logistic")
    q = moved(p, 0.3)
    refine, calls = gradient_steps(p, 20)
    with nothing_changed(q.params, q.hparams):
        result = hypergradient(q, form, S.CG(max_steps=200), hypergradient_rtol=goal, refine=refine)
        newton = hypergradient(q, form, S.CG(max_steps=200), hypergradient_rtol=goal, refine=True)
    assert 1 <= len(calls) <= 20
    for found in (result, newton):
        assert error(found.grads, p) <= 1.5 * goal and float(found.relative_error) <= goal
        assert relative(found.problem.params, p.params) < 0.1
    assert check(result).estimate.relative_error <= 1.5 * goal


def test_a_goal_that_is_missed_is_said():
    q = moved(plain("logistic"), 0.1)
    with pytest.warns(hg.InaccurateHypergradient, match="instead of 1.0e-04.*refine="):
        result = hypergradient(q, "inner_loss", S.CG(), hypergradient_rtol=1e-4)
    true = error(result.grads, q)
    assert 0.7 < float(result.relative_error) / true < 1.4
    with pytest.warns(hg.InaccurateHypergradient, match=r"refine= got no nearer .*polish=True"):
        hypergradient(q, "inner_loss", S.CG(), hypergradient_rtol=1e-4, refine=lambda w, h: w)
    with pytest.warns(hg.InaccurateHypergradient, match="or solve the inner problem further$"):
        hypergradient(q, "inner_loss", S.CG(), hypergradient_rtol=1e-6, polish=True)
    with pytest.raises(hg.SolverError, match="instead of"):
        hypergradient(q, "inner_loss", S.CG(on_failure="raise"), hypergradient_rtol=1e-4)
    hypergradient(q, "inner_loss", S.CG(on_failure="ignore"), hypergradient_rtol=1e-4)


def test_polish_reaches_a_goal_that_the_inner_problem_does_not():
    q = moved(plain("logistic"), 1e-3)
    result = hypergradient(q, "inner_loss", S.CG(), hypergradient_rtol=1e-4, polish=True)
    assert error(result.grads, q) <= 1e-4 < error(hypergradient(q, "inner_loss", QUIET).grads, q)


def test_bad_goals():
    p = plain("logistic")
    for goal in (0.0, 1.0, -1, math.nan, "1e-3"):
        with pytest.raises(ValueError, match="between 0 and 1"):
            hypergradient(p, "inner_loss", S.CG(), hypergradient_rtol=goal)
    with pytest.raises(ValueError, match="pass hypergradient_rtol as well"):
        hypergradient(p, "inner_loss", S.CG(), refine=True)
    with pytest.raises(TypeError, match="refine must be True, False or a function"):
        hypergradient(p, "inner_loss", S.CG(), hypergradient_rtol=0.1, refine=3)
    for solver in (S.OneStep(), lambda op, b, x0=None: b):
        with pytest.raises(TypeError, match="iterates to one"):
            hypergradient(p, "inner_loss", solver, hypergradient_rtol=0.1)
    with pytest.raises(ValueError, match="the value of refine"):
        hypergradient(moved(p, 0.3), "inner_loss", S.CG(), hypergradient_rtol=1e-3, refine=lambda w, h: w[:3])
    w = p.params.clone().requires_grad_()
    with pytest.raises(TypeError, match="refine evaluates inner_loss"):
        hg.implicit.grad(
            p.outer_loss,
            inner_loss=p.inner_loss(w, p.hparams),
            params=w,
            hparams=p.hparams,
            hypergradient_rtol=0.1,
            refine=True,
        )


def test_an_error_in_the_users_function_passes_and_changes_nothing():
    p, count = moved(plain("logistic"), 0.3), [0]

    def fails(w, h):
        count[0] += 1
        if count[0] > 1:
            raise ZeroDivisionError
        return p.outer_loss(w, h)

    q = replace(p, outer_loss=noisy(fails))
    with nothing_changed(q.params, q.hparams), pytest.raises(ZeroDivisionError):
        hypergradient(q, "inner_loss", S.CG(), hypergradient_rtol=1e-3, refine=True)


def test_tolerance_schedules():
    assert [tolerances.quadratic(k) for k in (0, 1, 4)] == [0.1, 0.025, 0.1 / 25]
    assert [tolerances.cubic(k, first=8.0) for k in (0, 1)] == [8.0, 1.0]
    assert math.isclose(tolerances.exponential(10), 0.1 * 0.9**10)
    for bad in (lambda: tolerances.cubic(-1), lambda: tolerances.quadratic(0, first=0.0)):
        with pytest.raises(ValueError, match="first is positive"):
            bad()
    with pytest.raises(ValueError, match="factor"):
        tolerances.exponential(0, factor=1.0)


def tuned_ridge(tolerance, outer_steps: int) -> tuple[float, int]:
    """f after Adam's steps on θ, each inner problem and adjoint solved to tolerance(k); and all steps of both."""
    p, v, steps = plain("ridge"), None, 0
    step = lambda w, theta: w - 0.2 * p.residual(w, theta)  # noqa: E731
    w, theta = torch.zeros_like(p.params), p.hparams.detach().clone().requires_grad_()
    adam = torch.optim.Adam([theta], lr=0.1)
    for k in range(outer_steps):
        found = hg.fixed_points.Anderson(atol=tolerance(k), max_steps=500)(step, w, theta.detach())
        solver = S.GMRES(atol=tolerance(k), max_steps=500, on_failure="ignore")
        result = hg.implicit.grad(p.outer_loss, fp_map=step, params=found.value, hparams=theta, x0=v, solver=solver)
        w, v, theta.grad = found.value, result.adjoint, result.grads
        steps += int(found.steps) + int(result.solution.steps)
        adam.step()
    return oracles.ridge(theta.detach().numpy()).value, steps


def test_outer_loops_with_falling_tolerances_find_the_optimum():
    """On ridge regression they end where exact gradients end, with fewer steps."""
    exact, all_steps = tuned_ridge(lambda k: 1e-9, 40)
    start = oracles.ridge().value
    for schedule, size in ((tolerances.exponential, 0.05), (tolerances.quadratic, 0.01), (tolerances.cubic, 0.01)):
        value, steps = tuned_ridge(lambda k, schedule=schedule: schedule(k, first=0.01), 40)
        print(f"{schedule.__name__}: {value:.6f} for {exact:.6f} with {steps} steps for {all_steps}")
        assert abs(value - exact) < size * (start - exact)
        assert steps < all_steps / 2


# Warnings


def test_each_kind_of_warning_once_for_each_line():
    q, h = moved(plain("logistic"), 0.9), plain("logistic").hparams

    def loop():
        for size in (1.0, 1.1, 1.2):  # other numbers in each text
            options = {"params": size * q.params, "hparams": h, "solver": S.CG(max_steps=1, rtol=1e-9)}
            hg.implicit.grad(q.outer_loss, inner_loss=q.inner_loss, **options)

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        loop()
        loop()
    assert sorted(w.category.__name__ for w in seen) == ["NotConverged", "UnsolvedInnerProblem"]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        loop()
    assert len(seen) == 6
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", hg.UnsolvedInnerProblem)
        loop()
    assert {w.category for w in seen} == {hg.NotConverged}
    with warnings.catch_warnings():
        warnings.simplefilter("error", hg.UnsolvedInnerProblem)
        warnings.simplefilter("ignore", hg.NotConverged)
        for _ in range(2):
            with pytest.raises(hg.UnsolvedInnerProblem):
                loop()


def test_not_finite_is_a_kind_of_its_own():
    lam = torch.zeros((), dtype=torch.float64, requires_grad=True)
    with pytest.warns(hg.NotFinite):
        hg.implicit.grad(
            lambda w, lam: w + lam.sqrt(),
            inner_loss=lambda w, lam: (w - lam) ** 2,
            params=torch.zeros((), dtype=torch.float64),
            hparams=lam,
        )


def test_the_record_keeps_no_graph_and_no_copy():
    p = plain("logistic")
    base = p.hparams.detach().clone().requires_grad_()
    result = hypergradient(replace(p, hparams=base * 1.0), "inner_loss", QUIET)
    assert result.problem.params.data_ptr() == p.params.data_ptr()
    assert result.problem.hparams.grad_fn is None
    same = hypergradient(p, "inner_loss", QUIET).problem
    assert same.hparams is p.hparams and same.params is p.params


def test_bad_options_of_check():
    p = plain("ridge")
    result = hypergradient(p, "inner_loss", QUIET)
    for error_type, match, options in (
        (ValueError, "newton_steps must be a whole number ≥ 0, got -1", {"newton_steps": -1}),
        (ValueError, "inner_steps must be a whole number ≥ 0, got 2.5", {"inner_steps": 2.5}),
        (TypeError, "solver must be a function, got 'CG'", {"solver": "CG"}),
        (TypeError, "solve must be a function, got 3", {"solve": 3}),
        (TypeError, "constants must be a hg.diagnostics.Constants, got 3", {"constants": 3}),
        (ValueError, "the value of solve must be like params", {"solve": lambda h: p.params[:2]}),
    ):
        with pytest.raises(error_type, match=match):
            check(result, structure=False, **options)
    with pytest.raises(TypeError, match=r"inner_loss \(or fp_map, or residual\).*functional_call"):
        check([result.grads], outer_loss=p.outer_loss)


def test_a_solve_that_ignores_its_argument_is_said():
    w = torch.tensor([1.0, 2.0], dtype=torch.float64)
    lam = w.clone().requires_grad_()
    result = hg.implicit.grad(
        lambda w, lam: w.square().sum(), inner_loss=lambda w, lam: (w - lam).square().sum(), params=w, hparams=lam
    )
    assert any("does not depend on hparams" in line for line in check(result, solve=lambda h: w).advice)
    assert not any("finite differences" in line for line in check(result, solve=lambda h: h).advice)


def test_a_change_that_torch_does_not_count_is_said():
    w = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    lam = w.detach().clone().requires_grad_()
    result = hg.implicit.grad(
        lambda w, lam: w.square().sum(), inner_loss=lambda w, lam: (w - lam).square().sum(), params=w, hparams=lam
    )
    w.data.mul_(1.1)
    assert any("when the hypergradient was computed" in line and ".data" in line for line in check(result).advice)


def test_the_advice_where_the_true_hypergradient_is_zero():
    w, lam = torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    rough = hg.implicit.grad(
        lambda w, lam: w**2 / 2,
        inner_loss=lambda w, lam: (w - lam) ** 2 / 2,
        params=w,
        hparams=lam,
        solver=S.CG(on_failure="ignore"),
    )
    advice = " ".join(check(rough).advice)
    assert "an error of 1 where the true hypergradient is 0" in advice and "inf" not in advice
