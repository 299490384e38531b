"""Polished and refined hypergradients against the true ones, by dense NumPy; kinds of warnings."""

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

import hypergrad as hg
from helpers import EXACT, S, errors, hypergradient, noisy, nothing_changed, problem_at
from perturbed import error, moved, plain
from problems import Problem
from test_oracles import relative

check = hg.diagnostics.check
QUIET = S.Dense(on_failure="ignore")


def polish(p: Problem, form: str, solver=QUIET) -> hg.Hypergradient:
    return hg.implicit.polish(hypergradient(p, form, solver), solver)


def refine(p: Problem, form: str, solver, rtol: float, update=None) -> hg.Hypergradient:
    """Refine the result of one solver step at the problem's params, whose warnings are silenced."""
    rough = hypergradient(p, form, replace(solver, max_steps=1, on_failure="ignore"))
    return hg.implicit.refine(rough, rtol, update=update, solver=solver)


SQUARE = [("logistic", form) for form in ("inner_loss", "fp_map", "residual")] + [
    ("equilibrium", "fp_map"),
    ("ridge", "inner_loss"),
    ("ridge", "fp_map"),
    ("ridge", "residual"),
]
LINEAR = [(name, form) for name in ("biased", "quadratic-1e3", "contraction-.9") for form in ("fp_map", "residual")]


@pytest.mark.parametrize(("name", "form"), SQUARE)
def test_polish_squares_the_error_of_gradient_and_value(name, form):
    p = problem_at(name, seed=1)
    sizes = [1e-2, 1e-3, 1e-4]
    plain, polished = [], []
    for size in sizes:
        q = moved(p, size)
        results = hypergradient(q, form, QUIET), polish(q, form)
        for result, found in zip(results, (plain, polished), strict=True):
            found.append((error(result.grads, p), abs(float(result.outer_value) - p.value) / abs(p.value)))
    plain, polished = np.array(plain), np.array(polished)
    assert np.allclose(np.log10(plain[:-1] / plain[1:]), 1, atol=0.1)
    assert np.allclose(np.log10(polished[:-1] / polished[1:]), 2, atol=0.1)
    assert (polished <= 50 * plain[:, :1] ** 2).all()


@pytest.mark.parametrize(("name", "form"), LINEAR)
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_polish_is_exact_where_everything_is_linear(name, form, size):
    """With quadratic E and linear F the polished gradient is exact, and the value is off by −½ δᵀ∇²E δ."""
    p = plain(name)
    q = moved(p, size)
    result = polish(q, form)
    assert max(errors(result.grads, p.grads)) < EXACT * max(1.0, p.condition / 100)
    delta = q.params - p.params
    hessian = torch.autograd.functional.hessian(lambda w: p.outer_loss(w, p.hparams), p.params)
    wrong = -0.5 * float(delta @ hessian @ delta)
    assert abs(float(result.outer_value) - p.value - wrong) < EXACT * (abs(p.value) + abs(wrong)) * p.condition**0.5


def test_polish_of_evaluated_losses_is_refused():
    p = moved(plain("logistic"), 1e-3)
    w = p.params.clone().requires_grad_()
    live = hg.implicit.grad(
        p.outer_loss(w, p.hparams), inner_loss=p.inner_loss(w, p.hparams), params=w, hparams=p.hparams, solver=QUIET
    )
    for call in (lambda: hg.implicit.polish(live), lambda: hg.implicit.refine(live, 0.1)):
        with pytest.raises(TypeError, match="must be given as callables"):
            call()


def test_polish_of_what_changed_since_is_refused():
    p = moved(plain("logistic"), 1e-3)
    q = replace(p, params=p.params.clone())
    result = hypergradient(q, "inner_loss", QUIET)
    with torch.no_grad():
        q.params.add_(1.0)
    with pytest.raises(ValueError, match="params were changed in place"):
        hg.implicit.polish(result)


def test_polish_and_refine_change_nothing():
    p = moved(plain("logistic"), 1e-3)
    with nothing_changed(p.params, p.hparams):
        result = hypergradient(p, "inner_loss", QUIET)
        hg.implicit.polish(result)
        hg.implicit.refine(result, 1e-6)


def test_polish_with_frozen_params():
    """A quadratic in w and c whose c is frozen away from its solution: the truth is that of the problem in w."""
    a = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    lam = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    c = torch.tensor(0.3, dtype=torch.float64)

    def inner(p, lam):
        x = torch.stack([p["w"], p["c"]])
        return x @ a @ x / 2 - lam * p["w"]

    w = ((lam.detach() - 0.5 * c) / 2 + 0.01).requires_grad_()  # off by 0.01
    rough = hg.implicit.grad(
        lambda p, lam: p["w"] ** 3 + p["c"], inner_loss=inner, params={"w": w, "c": c}, hparams=lam, solver=QUIET
    )
    exact = 3 * ((lam.detach() - 0.5 * c) / 2) ** 2 / 2
    assert abs(float(rough.grads - exact)) > 1e-3
    assert abs(float(hg.implicit.polish(rough).grads - exact)) < 3e-4
    refined = hg.implicit.refine(rough, 1e-8)
    assert abs(float(refined.grads - exact)) < 1e-10 and float(refined.problem.params["c"]) == float(c)


# Goal-oriented stopping


@pytest.mark.parametrize("goal", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("name", ["logistic", "quadratic-1e3", "quadratic-1e5"])
def test_the_adjoint_is_solved_as_far_as_the_hypergradient_needs(name, goal):
    p = plain(name)
    result = refine(p, "inner_loss", S.CG(max_steps=2000), goal)
    assert error(result.grads, p) <= goal
    assert float(result.relative_error) <= goal
    assert goal < 1e-3 or float(result.solution.relative_residual) > 1e-2 * goal


def test_a_residual_that_is_small_is_not_enough_for_a_goal():
    """A = diag(1, 1e-2, 1e-4): the component that gives most of ∇f is the smallest part of the residual."""
    a = torch.tensor([1.0, 1e-2, 1e-4], dtype=torch.float64)
    b = torch.tensor([1.0, 3e-3, 3e-4], dtype=torch.float64)
    lam = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    linear = lambda w, lam: w[0] + lam * (w[1] + w[2])  # noqa: E731
    rough = hg.implicit.grad(
        lambda w, lam: b @ w,
        inner_loss=lambda w, lam: 0.5 * (a * w) @ w - linear(w, lam),
        params=torch.tensor([1.0, 70.0, 7000.0], dtype=torch.float64),
        hparams=lam,
        solver=S.CG(max_steps=1, on_failure="ignore"),
    )
    result = hg.implicit.refine(rough, 1e-2, solver=S.CG())
    assert abs(float(result.grads) - 3.3) < 0.033


def gradient_steps(p: Problem, count: int):
    calls = []

    def update(w, h):
        calls.append(1)
        for _ in range(count):
            w = p.fp_map(w, h).detach()
        return w

    return update, calls


@pytest.mark.parametrize("form", ["inner_loss", "fp_map", "residual"])
@pytest.mark.parametrize("goal", [1e-2, 1e-5])
def test_the_inner_problem_is_refined_as_far_as_the_hypergradient_needs(form, goal):
    p = plain("logistic")
    q = moved(p, 0.3)
    update, calls = gradient_steps(p, 20)
    with nothing_changed(q.params, q.hparams):
        result = refine(q, form, S.CG(max_steps=200), goal, update)
        newton = refine(q, form, S.CG(max_steps=200), goal)
    assert 1 <= len(calls) <= 20
    for found in (result, newton):
        assert error(found.grads, p) <= 1.5 * goal and float(found.relative_error) <= goal
        assert relative(found.problem.params, p.params) < 0.1
    assert check(result).estimate.relative_error <= 1.5 * goal


def test_a_goal_that_is_missed_is_warned_of():
    q, stays = moved(plain("logistic"), 0.1), lambda w, h: w
    with pytest.warns(hg.InaccurateHypergradient, match="instead of 1.0e-04.*update="):
        result = refine(q, "inner_loss", S.CG(), 1e-4, stays)
    true = error(result.grads, q)
    assert 0.7 < float(result.relative_error) / true < 1.4
    with pytest.raises(hg.SolverError, match="instead of"):
        refine(q, "inner_loss", S.CG(on_failure="raise"), 1e-4, stays)
    refine(q, "inner_loss", S.CG(on_failure="ignore"), 1e-4, stays)


def test_polish_reaches_what_the_inner_problem_does_not():
    q = moved(plain("logistic"), 1e-3)
    result = polish(q, "inner_loss", S.CG(rtol=1e-8))
    assert error(result.grads, q) <= 1e-4 < error(hypergradient(q, "inner_loss", QUIET).grads, q)


class _Curvature(torch.autograd.Function):
    """3 w² g c, whose backward pass is not differentiable."""

    @staticmethod
    def forward(ctx, w, g, c):
        return 3 * w**2 * g * c

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError("quartic does not support 3rd+ order derivatives.")


class _Slope(torch.autograd.Function):
    """w³ g."""

    @staticmethod
    def forward(ctx, w, g):
        ctx.save_for_backward(w, g)
        return w**3 * g

    @staticmethod
    def backward(ctx, c):
        w, g = ctx.saved_tensors
        return _Curvature.apply(w, g, c), w**3 * c


class _Quartic(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w):
        ctx.save_for_backward(w)
        return w**4 / 4

    @staticmethod
    def backward(ctx, g):
        return _Slope.apply(ctx.saved_tensors[0], g)


@pytest.mark.parametrize("correct", [hg.implicit.polish, hg.diagnostics.check])
def test_a_missing_third_derivative_is_an_error_that_names_it(correct):
    lam = torch.ones(2, dtype=torch.float64, requires_grad=True)
    result = hg.implicit.grad(
        lambda w, lam: (w**2).sum(),
        inner_loss=lambda w, lam: (_Quartic.apply(w) - lam * w).sum(),
        params=torch.ones(2, dtype=torch.float64),
        hparams=lam,
    )
    assert relative(result.grads, torch.full((2,), 2 / 3, dtype=torch.float64)) < EXACT
    with pytest.raises(NotImplementedError, match="third derivatives of the inner loss"):
        correct(result)


def test_bad_goals():
    p = plain("logistic")
    result = hypergradient(p, "inner_loss", QUIET)
    for goal in (0.0, 1.0, -1, math.nan, "1e-3"):
        with pytest.raises(ValueError, match="between 0 and 1"):
            hg.implicit.refine(result, goal)
    with pytest.raises(TypeError, match="update must be None or a function"):
        hg.implicit.refine(result, 0.1, update=3)
    for solver in (S.Nystrom(), lambda op, b, x0=None: b):
        with pytest.raises(TypeError, match="iterates to a tolerance"):
            hg.implicit.refine(result, 0.1, solver=solver)
    far = hypergradient(moved(p, 0.3), "inner_loss", QUIET)
    with pytest.raises(ValueError, match="the value of update"):
        hg.implicit.refine(far, 1e-3, update=lambda w, h: w[:3])


def test_an_error_in_the_users_function_passes_and_changes_nothing():
    p, count = moved(plain("logistic"), 0.3), [0]

    def fails(w, h):
        count[0] += 1
        if count[0] > 1:
            raise ZeroDivisionError
        return p.outer_loss(w, h)

    result = hypergradient(replace(p, outer_loss=noisy(fails)), "inner_loss", QUIET)
    for call in (hg.implicit.polish, lambda result: hg.implicit.refine(result, 1e-3)):
        with nothing_changed(p.params, p.hparams), pytest.raises(ZeroDivisionError):
            call(result)


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


def test_non_finite_hypergradients_have_their_own_warning_class():
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


@pytest.mark.parametrize("correct", [hg.implicit.polish, lambda result: hg.implicit.refine(result, 1e-8)])
def test_hooks_of_hparams_act_once(correct):
    lam, calls = torch.tensor(3.0, dtype=torch.float64, requires_grad=True), []
    w = lam.detach() + 1e-3
    result = hg.implicit.grad(lambda w, h: w**2 / 2, inner_loss=lambda w, h: (w - h) ** 2, params=w, hparams=lam)
    lam.register_hook(lambda g: calls.append(g) or -g)
    assert abs(float(correct(result).grads) + 3) < 1e-7 and len(calls) == 1


@pytest.mark.parametrize("correct", [hg.implicit.polish, lambda result: hg.implicit.refine(result, 1e-8)])
def test_complex_hparams(correct):
    """w = |h|² / 2 of (2w − |h|²)², and f = Σ w²: ∇f = |h|² h."""
    h = torch.tensor([0.5 + 0.2j, -0.3 + 0.4j], dtype=torch.complex128, requires_grad=True)
    w = h.detach().abs() ** 2 / 2
    rough = hg.implicit.grad(
        lambda w, h: (w**2).sum(),
        inner_loss=lambda w, h: ((2 * w - h.abs() ** 2) ** 2).sum(),
        params=w + 1e-3,
        hparams=h,
        solver=S.Dense(),
    )
    result = correct(rough)
    assert result.relative_error is not None and not result.relative_error.is_complex()
    torch.testing.assert_close(result.grads, (h.abs() ** 2 * h).detach(), rtol=1e-5, atol=0)
