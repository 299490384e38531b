"""The estimated error of a hypergradient against the true one, and the corrected hypergradient, by dense NumPy."""

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

import hypergrad as hg
import oracles
from helpers import EXACT, S, errors, hypergradient, noisy, nothing_changed, problem_at
from hypergrad.implicit import tolerances
from perturbed import error, moved, plain
from problems import Problem
from test_oracles import relative

check = hg.diagnostics.check
QUIET = S.Dense(on_failure="ignore")
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
