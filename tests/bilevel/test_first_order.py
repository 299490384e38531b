"""Trackers without second derivatives: derivatives of optimisers' steps, orders of differences, where they converge."""

import copy
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import hypergrad as hg
from bilevel_cases import ALL, Ridge
from bilevel_programs import Program, make

B = hg.bilevel
OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, lr=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
    "dampening": partial(torch.optim.SGD, lr=0.1, momentum=0.9, dampening=0.4),
    "nesterov": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "SGD maximize": partial(torch.optim.SGD, lr=0.01, momentum=0.5, maximize=True),
    "Adam": partial(torch.optim.Adam, lr=0.01, eps=1e-3),
    "Adam, decay": partial(torch.optim.Adam, lr=0.01, eps=1e-3, weight_decay=0.5),
    "Adam maximize": partial(torch.optim.Adam, lr=0.01, eps=1e-3, maximize=True),
    "AMSGrad": partial(torch.optim.Adam, lr=0.01, eps=1e-3, betas=(0.5, 0.5), amsgrad=True),
    "AdamW": partial(torch.optim.AdamW, lr=0.01, eps=1e-3, weight_decay=0.5),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.01, eps=1e-3, momentum=0.5),
}


def after_step(optimizer, params, grads):
    """The parameters after a real step of the optimizer with these gradients, as one vector."""
    optimizer, own = copy.deepcopy((optimizer, params))
    for x, g in zip(own, grads, strict=True):
        x.grad = g.clone()
    optimizer.step()
    return torch.cat([x.detach().reshape(-1) for x in own])


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sama_differentiates_the_step_of_the_optimizer(name, groups):
    """g(w, λ) = g₀(w) + ⟨λ, w⟩ has ∇²₂₁g = I, so D_λ − ∇₂f is −u, which finite differences of real steps give."""
    random = torch.Generator().manual_seed(0)
    params = [torch.randn(n, dtype=torch.float64, generator=random).requires_grad_() for n in (3, 2)]
    lam = [torch.randn(n, dtype=torch.float64, generator=random).requires_grad_() for n in (3, 2)]
    target = [torch.randn(n, dtype=torch.float64, generator=random) for n in (3, 2)]

    def inner():
        return sum((x**4).sum() / 4 + (x * e).sum() for x, e in zip(params, lam, strict=True))

    def outer():
        return sum(((x - t) ** 2).sum() for x, t in zip(params, target, strict=True))

    kinds = [{"params": params[:1], "lr": 0.02}, {"params": params[1:]}] if groups else params
    optimizer = OPTIMIZERS[name](kinds)
    tracker = B.SAMA(params, lam, optimizer=optimizer)
    for _ in range(5):
        tracker.backward(outer, inner)
        found = torch.cat([x.grad for x in lam])
        grads = [x.grad.clone() for x in params]
        size, slopes = [g.numel() for g in grads], torch.autograd.grad(outer(), params)
        flat, rows, small = torch.cat(grads), [], 1e-6
        for i in range(len(flat)):
            step = torch.zeros_like(flat)
            step[i] = small
            ends = [after_step(optimizer, params, torch.split(flat + s * step, size)) for s in (1, -1)]
            rows.append((ends[0] - ends[1]) / (2 * small) @ torch.cat(slopes))
        torch.testing.assert_close(found, torch.stack(rows), rtol=1e-7, atol=1e-9)
        optimizer.step()
        for x in (*params, *lam):
            x.grad = None


def test_sama_where_gradients_vanish():
    """Adam's √v has no derivative at v = 0, where its step is 0."""
    w, lam = torch.zeros(3, requires_grad=True), torch.ones(3, requires_grad=True)
    tracker = B.SAMA([w], [lam], optimizer=torch.optim.Adam([w]))
    tracker.backward(lambda: (w - 1).square().sum(), lambda: (lam * w**2).sum())
    assert lam.grad.isfinite().all()


# F2SA: g = Σ log cosh(w − Aλ) + ½ ‖w‖², f = Σ w³/3 + ½ ‖w − 1‖²: smooth, and not quadratic.

SIZE, M = 4, 3


def smooth():
    random = np.random.RandomState(0)
    return random.randn(SIZE, M), random.randn(M)


def minimiser(a, lam, tilt):
    """argmin g + tilt f, by Newton steps."""
    w = np.zeros(SIZE)
    for _ in range(60):
        t = np.tanh(w - a @ lam)
        slope = t + w + tilt * (w**2 + w - 1)
        w = w - slope / (2 - t**2 + tilt * (2 * w + 1))
    return w


def smooth_hypergradient(a, lam):
    w = minimiser(a, lam, 0.0)
    t = np.tanh(w - a @ lam)
    v = -(w**2 + w - 1) / (2 - t**2)
    return -a.T @ ((1 - t**2) * v)


@pytest.mark.parametrize("order", [1, 2, 4])
def test_f2sas_error_falls_as_the_order_says(order):
    """The copies of params are solved exactly here."""
    a, lam0 = smooth()
    matrix, errors, sigmas = torch.tensor(a), [], 2.0 ** -np.arange(3, 7)
    for sigma in sigmas:
        w = torch.tensor(minimiser(a, lam0, 0.0), requires_grad=True)
        lam = torch.tensor(lam0, requires_grad=True)
        tracker = B.F2SA([w], [lam], order=order, penalty=1 / sigma)
        for k, (copy_of_w,) in tracker.copies.items():
            copy_of_w.copy_(torch.tensor(minimiser(a, lam0, k * sigma)))

        def inner(w=w, lam=lam):
            return (w - matrix @ lam).cosh().log().sum() + (w**2).sum() / 2

        def outer(w=w):
            return (w**3).sum() / 3 + ((w - 1) ** 2).sum() / 2

        tracker.backward(outer, inner)
        assert max(x.grad.abs().max() for x in tracker.variables) < 1e-12
        errors.append(np.linalg.norm(lam.grad.numpy() - smooth_hypergradient(a, lam0)))
    slope = np.polyfit(np.log(sigmas), np.log(errors), 1)[0]
    assert abs(slope - order) < 0.25, errors


@pytest.mark.parametrize("name", [pytest.param("F2SA", marks=pytest.mark.slow), "BOME"])
def test_first_order_trackers_converge_near_the_optimum(name):
    """F2SA of order 4 reaches the optimum up to its small error; BOME approaches it more slowly."""
    p = Ridge()
    w, lam = p.tensors()
    inner, outer = p.losses(w, lam)
    tracker = (
        B.BOME([w], [lam], lr=0.5, steps=10) if name == "BOME" else B.F2SA([w], [lam], lr=0.3, order=4, penalty=30.0)
    )
    rates = (0.05, 0.3) if name == "BOME" else (0.3, 0.5)
    optimizer = torch.optim.SGD([{"params": [x], "lr": rate} for x, rate in zip((w, lam), rates, strict=True)])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: (1 + t / 50) ** -0.5 if name == "BOME" else 1.0)
    for _ in range(300 if name == "BOME" else 1200):
        tracker.backward(lambda: outer(ALL), lambda: inner(ALL))
        for each in (optimizer, tracker, schedule):
            each.step()
        optimizer.zero_grad()
    start, end = (np.linalg.norm(p.hypergradient(x)) for x in (p.lam, lam.detach().numpy()))
    assert end < (0.03 if name == "BOME" else 1e-5) * start
    assert np.linalg.norm(w.detach().numpy() - p.solution(lam.detach().numpy())) < (0.02 if name == "BOME" else 1e-8)


def test_f2sa_warns_of_copies_that_ascend_without_end():
    """f grows faster than g, so g − σf has no minimum."""
    w, lam = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    tracker = B.F2SA([w], [lam], penalty=1.0, lr=0.05)
    optimizer = torch.optim.SGD([w, lam], lr=0.01)

    def losses():
        return (lambda: (w**4).sum()), (lambda: ((w - lam) ** 2).sum() / 2)

    with pytest.warns(hg.HypergradientWarning, match="ascend the outer loss.*Raise penalty"), warnings.catch_warnings():
        warnings.simplefilter("always")
        for _ in range(300):
            with torch.no_grad():
                for x in tracker.copies[-1]:
                    x.clamp_(-3, 3)
            tracker.backward(*losses())
            optimizer.step()
            tracker.step()
            optimizer.zero_grad()


def test_f2sa_does_not_warn_where_the_copies_are_close():
    p = Program()
    tracker = make("F2SA", p)
    optimizer = torch.optim.SGD(p.tensors(), lr=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(200):
            tracker.backward(*p.closures(step))
            optimizer.step()
            tracker.step()
            optimizer.zero_grad()


class Attention(nn.Module):
    def forward(self, x):
        q = x.reshape(1, 1, x.shape[0], x.shape[1]).expand(1, 2, -1, -1)
        return scaled_dot_product_attention(q, q, q).mean(1).reshape(x.shape)


@pytest.mark.parametrize("name", ["F2SA", "BOME", "SAMA", "SOBA", "AmIGO"])
def test_fused_attention(name):
    """First-order trackers agree with the plain kernel; second-order ones raise an error that says what to do."""
    kernel, backend = torch.nn.attention.sdpa_kernel, torch.nn.attention.SDPBackend
    results = []
    for fused in (False, True):
        p = Program(Attention())
        tracker = make(name, p)
        with kernel(backend.FLASH_ATTENTION if fused else backend.MATH):
            if fused and name in ("SOBA", "AmIGO"):
                with pytest.raises(RuntimeError, match=r"SDPBackend\.MATH.*F2SA, BOME or SAMA"):
                    tracker.backward(*p.closures(0))
                return
            tracker.backward(*p.closures(0))
        results.append(torch.cat([x.grad.reshape(-1) for x in p.tensors()]))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-9)
