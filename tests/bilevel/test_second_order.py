"""Trackers against their formulas in NumPy, on minibatches and on all data, and against the exact hypergradient."""

from functools import partial

import numpy as np
import pytest
import torch

import bilevel_cases as cases
import hypergrad as hg
from bilevel_cases import BATCH, INNER, OUTER, OUTER_STEP, ROWS, STEP, M, N, Ridge, pairs, run

B = hg.bilevel


@pytest.mark.parametrize("name", ROWS)
def test_fifty_steps_on_minibatches_are_those_of_the_formula(name):
    make, formula, closures, index = ROWS[name]
    p, order = Ridge(), pairs(50)
    found, _ = run(p, make, order, closures, index)
    for mine, theirs in zip(found, formula(p, order), strict=True):
        # A difference of first-order gradients loses digits to its small step.
        np.testing.assert_allclose(mine, theirs, rtol=1e-12 if name != "DARTS" else 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SOBA", "STORM", "AmIGO", "SABA", "SRBA"])
def test_all_data_lead_to_the_optimum(name):
    """With all data in one batch, or with variance reduction, λ converges to a zero of the hypergradient."""
    p = Ridge()
    w, lam = p.tensors()
    inner, outer = p.losses(w, lam)
    if name in ("SABA", "SRBA"):
        options = (
            {"batches": (len(INNER), len(OUTER))}
            if name == "SABA"
            else {"full": cases.full(inner, outer), "period": 12}
        )
        tracker = getattr(B, name)([w], [lam], lr=STEP, **options)
        order = pairs(6000)
    else:
        tracker = {"SOBA": B.SOBA([w], [lam], lr=STEP), "STORM": B.SOBA([w], [lam], lr=STEP, recursive=0.3)}.get(
            name, B.AmIGO([w], [lam], solver=hg.solvers.CG(rtol=1e-12))
        )
        order = [(None, None)] * 2500
    optimizer = torch.optim.SGD([{"params": [w], "lr": STEP}, {"params": [lam], "lr": 0.5 * OUTER_STEP}])
    for i, j in order:
        rows = (slice(None), slice(None)) if i is None else (OUTER[j], INNER[i])
        extra = {"index": (i, j)} if name == "SABA" else {}
        tracker.backward(lambda j=rows[0]: outer(j), lambda i=rows[1]: inner(i), **extra)
        for each in (optimizer, tracker):
            each.step()
        optimizer.zero_grad()
    lam = lam.detach().numpy()
    assert np.abs(p.hypergradient(lam)).max() < 1e-10
    np.testing.assert_allclose(w.detach().numpy(), p.solution(lam), rtol=1e-8)


@pytest.mark.parametrize("name", ["SOBA", "AmIGO"])
def test_the_mean_direction_over_all_pairs_of_batches_is_that_of_all_data(name):
    """AmIGO takes no steps on v here, so that the adjoint is the same for all pairs."""
    p = Ridge()
    v = torch.randn(cases.D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def direction(i, j):
        w, lam = p.tensors()
        inner, outer = p.losses(w, lam)
        tracker = B.SOBA([w], [lam]) if name == "SOBA" else B.AmIGO([w], [lam], steps=0)
        tracker.variables[0].copy_(v)
        tracker.backward(outer(j), inner(i))
        return torch.cat([w.grad, lam.grad, *[x.grad for x in tracker.variables]])

    mean = torch.stack([direction(i, j) for i in INNER for j in OUTER]).mean(0)
    torch.testing.assert_close(mean, direction(slice(None), slice(None)), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("warm", [True, False])
def test_every_step_on_the_adjoint_may_use_another_batch(warm):
    p, v, order = Ridge(), np.zeros(cases.D), pairs(5)
    w, lam = p.tensors()
    inner, outer = p.losses(w, lam)
    tracker = B.AmIGO([w], [lam], lr=STEP, warm=warm)
    for i, j in order:
        f = p.f_w(p.w, p.lam, OUTER[j])
        v = v if warm else -STEP * f
        for k in (i, j, 0):
            v = v - STEP * (p.hessian(p.w, p.lam, INNER[k], v) + f)
        tracker.backward(outer(OUTER[j]), inner(INNER[i]), adjoint_losses=(inner(INNER[k]) for k in (i, j, 0)))
        truth = p.cross(p.w, p.lam, INNER[i], v) + p.f_lam(p.w, p.lam, OUTER[j])
        np.testing.assert_allclose(lam.grad.numpy(), truth, rtol=1e-12)
        tracker.step()
        lam.grad = None


def test_a_linear_solver_solves_the_adjoint_system_of_the_batch():
    p = Ridge()
    w, lam = p.tensors()
    inner, outer = p.losses(w, lam)
    tracker = B.AmIGO([w], [lam], solver=hg.solvers.CG(rtol=1e-13))
    tracker.backward(outer(OUTER[1]), inner(INNER[2]))
    a = p.x[INNER[2]].T @ p.x[INNER[2]] / BATCH + np.diag(np.exp(p.lam))
    v = -np.linalg.solve(a, p.f_w(p.w, p.lam, OUTER[1]))
    truth = p.cross(p.w, p.lam, None, v) + p.f_lam(p.w, p.lam, None)
    np.testing.assert_allclose(lam.grad.numpy(), truth, rtol=1e-10)


def test_page_takes_all_data_with_its_probability():
    p = Ridge()
    w, lam = p.tensors()
    inner, outer = p.losses(w, lam)
    calls = []

    def full():
        calls.append(tracker.steps)
        return [outer(slice(None))], [inner(slice(None))]

    generator = torch.Generator().manual_seed(3)
    tracker = B.SRBA([w], [lam], full=full, probability=0.25, generator=generator)
    for i, j in pairs(60):
        tracker.backward(lambda j=j: outer(OUTER[j]), lambda i=i: inner(INNER[i]))
        tracker.step()
    again = torch.Generator().manual_seed(3)
    drawn = [bool(torch.rand((), generator=again) < 0.25) for _ in range(60)]
    assert calls == [0] + [t + 1 for t, anew in enumerate(drawn[:-1]) if anew]


def part_of(loss, rows, parts):
    return loss(rows) / parts


@pytest.mark.parametrize("name", ["SOBA", "MA-SOBA", "STORM", "SABA", "F2SA-2", "DARTS"])
def test_batches_accumulate_to_the_direction_of_one_large_batch(name):
    """Each step accumulates two halves of a batch, with losses divided by two. SABA has a table entry per half."""
    make, _, _, index = ROWS[name]
    p, results = Ridge(), []
    for parts in (1, 2) if not index else (2,):
        w, lam = p.tensors()
        inner, outer = p.losses(w, lam)
        tracker = make([w], [lam], inner, outer)
        optimizer = torch.optim.SGD([w, lam], lr=STEP)
        for i, j in pairs(10):
            for part in range(parts):
                size = BATCH // parts
                rows = [slice(k * BATCH + part * size, k * BATCH + (part + 1) * size) for k in (i, j)]
                extra = {"index": (i, j)} if index else {}
                losses = (
                    partial(part_of, loss, row, parts) for loss, row in zip((outer, inner), rows[::-1], strict=True)
                )
                tracker.backward(*losses, **extra)
            for each in (optimizer, tracker):
                each.step()
            optimizer.zero_grad()
        results.append(torch.cat([w.detach(), lam.detach()]))
    if name == "DARTS":  # finite differences, whose radius differs for each half
        torch.testing.assert_close(results[0], results[1], rtol=0.1, atol=0.02)
    elif len(results) > 1:
        torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-14)


def test_sizes_are_named():
    assert (len(INNER), len(OUTER)) == (N // BATCH, M // BATCH)


def test_a_plain_function_is_a_solver_too():
    """It may return the bare value, as for other functions."""
    p = Ridge()
    w, lam = p.tensors()
    inner, outer = p.losses(w, lam)
    exact = hg.solvers.Dense()
    tracker = B.AmIGO([w], [lam], solver=lambda op, b, x0: exact(op, b).value)
    tracker.backward(outer(OUTER[1]), inner(INNER[2]))
    a = p.x[INNER[2]].T @ p.x[INNER[2]] / BATCH + np.diag(np.exp(p.lam))
    v = -np.linalg.solve(a, p.f_w(p.w, p.lam, OUTER[1]))
    truth = p.cross(p.w, p.lam, None, v) + p.f_lam(p.w, p.lam, None)
    np.testing.assert_allclose(lam.grad.numpy(), truth, rtol=1e-10)
