"""The report of a tracker: its numbers against NumPy, and warnings exactly where they are due."""

import logging
import math
import warnings

import numpy as np
import pytest
import torch

import bilevel_cases as cases
import hypergrad as hg
from bilevel_cases import INNER, OUTER, STEP, Ridge, pairs
from bilevel_programs import KINDS, LR, Program, make, optimizers, train

B = hg.bilevel
WARNING = hg.HypergradientWarning


def test_the_numbers_of_a_report_are_those_of_numpy():
    p, order = Ridge(), pairs(15)
    w, lam = p.tensors()
    inner, outer = p.losses(w, lam)
    tracker = B.SOBA([w], [lam], lr=STEP)
    optimizer = torch.optim.SGD([w, lam], lr=STEP)
    last, mean = None, dict.fromkeys(("vHv", "vv", "fv", "slow"), 0.0)
    for count, (i, j) in enumerate(order, 1):
        at = [x.detach().numpy().copy() for x in (w, tracker.variables[0], lam)]
        tracker.backward(outer(OUTER[j]), inner(INNER[i]))
        d_w, d_v, d_lam = p.directions(*at, INNER[i], OUTER[j])
        f, v = p.f_w(at[0], at[2], OUTER[j]), at[1]
        report = tracker.report()
        assert report.inner_norm == pytest.approx(np.linalg.norm(d_w), rel=1e-12)
        assert report.outer_norm == pytest.approx(np.linalg.norm(d_lam), rel=1e-12)
        assert report.adjoint_residual == pytest.approx(np.linalg.norm(d_v) / np.linalg.norm(f), rel=1e-12)
        energy = v @ (d_v - f)
        for key, most, new in (("vHv", 0.9, energy), ("vv", 0.9, v @ v), ("fv", 0.99, f @ v), ("slow", 0.99, energy)):
            decay = min(most, 1 - 1 / count)
            mean[key] = decay * mean[key] + (1 - decay) * new
        if last is None:
            assert math.isnan(report.cosine) and report.adjoint_residual == 1 and math.isnan(report.curvature)
        else:
            cosine = d_lam @ last / np.linalg.norm(d_lam) / np.linalg.norm(last)
            assert report.cosine == pytest.approx(cosine, rel=1e-10)
            assert report.curvature == pytest.approx(mean["vHv"] / mean["vv"], rel=1e-9)
            assert report.allowed_lr == pytest.approx(2 * mean["vv"] / mean["vHv"], rel=1e-9)
            assert report.adjoint_ratio == pytest.approx(-mean["fv"] / mean["slow"], rel=1e-9)
        last = d_lam
        optimizer.step()
        tracker.step()
        optimizer.zero_grad()
    assert tracker.report().step == 15 and tracker.report().skipped == 0
    assert tracker.report().evaluations == {"inner_gradients": 15, "outer_gradients": 15, "products": 15}


@pytest.mark.parametrize("name", KINDS)
def test_metrics_are_flat_numbers_for_any_logger(name, caplog):
    p = Program()
    tracker = make(name, p)
    assert tracker.metrics() == {"step": 0.0, "skipped": 0.0, **dict.fromkeys(tracker.report().evaluations, 0.0)}
    train(name, tracker, p, range(3))
    metrics = tracker.metrics()
    assert all(type(key) is str and type(x) is float and math.isfinite(x) for key, x in metrics.items())
    assert metrics["step"] == 3 and metrics["inner_norm"] > 0 and metrics["outer_norm"] > 0
    with caplog.at_level(logging.INFO):
        logging.getLogger("run").info("%s", tracker.report())
    assert "outer_norm" in caplog.text
    own = {"F2SA": "copy_distance", "F2SA-1": "copy_distance", "BOME": "penalty", "SAMA": "step_norm"}
    assert own.get(name, "adjoint_residual") in metrics


@pytest.mark.parametrize("name", ["SOBA", "AmIGO", "SAMA", "F2SA"])
def test_the_error_of_a_direction_is_that_of_numpy(name):
    p = Ridge()
    w, lam = p.tensors()
    inner, outer = p.losses(w, lam)
    tracker = cases.ROWS["DARTS" if name == "SAMA" else "F2SA-2" if name == "F2SA" else name][0](
        [w], [lam], inner, outer
    )
    with pytest.raises(ValueError, match="no direction yet"):
        tracker.error(lambda: outer(cases.ALL), lambda: inner(cases.ALL))
    for i, j in pairs(4):
        tracker.backward(lambda j=j: outer(OUTER[j]), lambda i=i: inner(INNER[i]))
        tracker.step()
        found, lam.grad, w.grad = lam.grad.numpy(), None, None
    every = slice(None)
    a = p.x.T @ p.x / cases.N + np.diag(np.exp(p.lam))
    truth = p.f_lam(p.w, p.lam, every) + p.cross(p.w, p.lam, every, -np.linalg.solve(a, p.f_w(p.w, p.lam, every)))
    for losses in ((lambda: outer(every), lambda: inner(every)), (outer(every), inner(every))):
        result = tracker.error(*losses)
        assert result.relative_error == pytest.approx(np.linalg.norm(found - truth) / np.linalg.norm(truth), rel=1e-4)
        cosine = found @ truth / np.linalg.norm(found) / np.linalg.norm(truth)
        assert result.cosine == pytest.approx(cosine, rel=1e-4)
    assert lam.grad is None and w.grad is None


def test_an_error_over_a_sum_of_batches():
    """The inner loss is a mean over a loader; no random number is drawn and no statistic is recorded."""
    p, results = Ridge(), []
    w, lam = p.tensors()
    inner, outer = p.losses(w, lam)
    tracker = B.SOBA([w], [lam], lr=STEP)
    tracker.backward(outer(OUTER[0]), inner(INNER[0]))
    x, y = torch.tensor(p.x), torch.tensor(p.y)

    def part(w, lam, rows):
        return ((x[rows] @ w[0] - y[rows]) ** 2).mean() / 2 / len(INNER) + (
            (lam[0].exp() * w[0] ** 2).sum() / 2 / len(INNER)
        )

    def drawing():
        torch.rand(3)
        return outer(cases.ALL)

    before = torch.get_rng_state()
    for loss in (hg.operators.Sum(part, INNER), lambda: inner(cases.ALL)):
        results.append(tracker.error(drawing, loss, solver=hg.solvers.CG(rtol=1e-13)))
    assert torch.equal(before, torch.get_rng_state())
    assert results[0].relative_error == pytest.approx(results[1].relative_error, rel=1e-10)
    assert results[0].relative_error > 0.1


def test_a_small_error_is_not_lost_to_rounding():
    p = Ridge()
    w, lam = p.tensors()
    inner, outer = p.losses(w, lam)
    tracker = B.AmIGO([w], [lam], solver=hg.solvers.CG(rtol=1e-14))
    tracker.backward(outer(cases.ALL), inner(cases.ALL))
    result = tracker.error(outer(cases.ALL), inner(cases.ALL), solver=hg.solvers.CG(rtol=1e-14))
    assert result.relative_error < 1e-12 and result.cosine == pytest.approx(1, rel=1e-12)


# Warnings


def training(lr, own=None, outer_lr=0.0, steps=150, sign=1.0):
    """SOBA on quadratics g = ½ wᵀdiag(h)w − ⟨λ, w⟩ with curvature up to 4."""
    h = torch.linspace(0.5, 4, 8, dtype=torch.float64)
    w, lam = (torch.ones(8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    tracker = B.SOBA([w], [lam], lr=lr) if own is None else B.SOBA([w], [lam], optimizer=own)
    optimizer = torch.optim.SGD([{"params": [w]}, {"params": [lam], "lr": outer_lr}], lr=0.1)
    for _ in range(steps):
        tracker.backward(sign * ((w - 1) ** 2).sum() / 2 + w.sum(), (h * w**2).sum() / 2 - (lam * w).sum())
        sign = sign if own is None else -sign
        for each in (optimizer, tracker):
            each.step()
        optimizer.zero_grad()
    return tracker


def test_a_step_size_too_large_for_the_curvature_is_warned_of():
    with pytest.warns(WARNING, match=r"SOBA: lr=0.55 is above 2 / curvature = 0\.5.*lower lr"):
        training(0.55)


@pytest.mark.parametrize("lr", [0.45, 0.1, 0.02])
def test_a_step_size_within_the_limit_is_not_warned_of(lr):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = training(lr).report()
    assert report.curvature <= 4 and report.allowed_lr >= 0.5
    assert report.adjoint_residual < 0.9 and report.adjoint_ratio > 0.5


def test_an_adjoint_that_ascends_is_warned_of():
    """The optimiser of v maximises."""
    with pytest.warns(WARNING, match="the adjoint v was worse than v = 0"):
        training(None, own=lambda v: torch.optim.SGD(v, lr=1e-3, maximize=True), steps=120)


@pytest.mark.parametrize("name", ["SOBA", "MA-SOBA", "AmIGO", "F2SA", "SABA"])
@pytest.mark.parametrize("seed", range(2))
def test_healthy_runs_on_noisy_minibatches_do_not_warn(name, seed):
    p = Program(seed=seed)
    tracker, optims = make(name, p), optimizers(p)
    optims[1] = torch.optim.Adam([p.decay], lr=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(name, tracker, p, range(160), optims)
    assert tracker.metrics()["step"] == 160


@pytest.mark.parametrize("seed", range(3))
def test_healthy_runs_on_ridge_do_not_warn(seed):
    """Batches have 4 of 24 rows, so the noise is as large as the signal."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cases.run(Ridge(seed), lambda w, h, g, f: B.SOBA(w, h, lr=0.05), pairs(250, seed), closures=False)


def test_step_sizes_of_optimisers_other_than_plain_sgd_are_not_judged():
    """With momentum or Adam the limit of a plain gradient step does not apply."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        training(None, own=lambda v: torch.optim.SGD(v, lr=0.02, momentum=0.9), steps=3)
    assert LR == 0.1
