"""Ridge regression with one penalty per feature over minibatches in torch and NumPy, and the algorithms in NumPy."""

from __future__ import annotations

import numpy as np
import torch

import hypergrad as hg

N, M, D = 24, 16, 5  # training rows, validation rows, features
BATCH = 4
STEP, OUTER_STEP = 0.1, 0.3


class Ridge:
    """g = ‖Xw − y‖²/2n + ½ Σ e^λ w² and f = ‖Vw − u‖²/2m + .05 Σ λ², means over the rows of a batch."""

    def __init__(self, seed: int = 0):
        random = np.random.RandomState(seed)
        self.x, self.v = random.randn(N, D), random.randn(M, D)
        truth = random.randn(D)
        self.y, self.u = self.x @ truth + random.randn(N), self.v @ truth + random.randn(M)
        self.w, self.lam = random.randn(D), -1 + 0.3 * random.randn(D)

    # NumPy

    def g_w(self, w, lam, i):
        x, y = self.x[i], self.y[i]
        return x.T @ (x @ w - y) / len(y) + np.exp(lam) * w

    def g(self, w, lam, i):
        x, y = self.x[i], self.y[i]
        return ((x @ w - y) ** 2).mean() / 2 + (np.exp(lam) * w * w).sum() / 2

    def g_lam(self, w, lam, i):
        return np.exp(lam) * w * w / 2

    def hessian(self, w, lam, i, v):
        x = self.x[i]
        return x.T @ (x @ v) / len(x) + np.exp(lam) * v

    def cross(self, w, lam, i, v):
        return np.exp(lam) * w * v

    def f(self, w, lam, j):
        return ((self.v[j] @ w - self.u[j]) ** 2).mean() / 2 + 0.05 * (lam**2).sum()

    def f_w(self, w, lam, j):
        v, u = self.v[j], self.u[j]
        return v.T @ (v @ w - u) / len(u)

    def f_lam(self, w, lam, j):
        return 0.1 * lam

    def directions(self, w, v, lam, i, j):
        """D_w, D_v, D_λ."""
        return (
            self.g_w(w, lam, i),
            self.hessian(w, lam, i, v) + self.f_w(w, lam, j),
            self.cross(w, lam, i, v) + self.f_lam(w, lam, j),
        )

    def solution(self, lam):
        return np.linalg.solve(self.x.T @ self.x / N + np.diag(np.exp(lam)), self.x.T @ self.y / N)

    def hypergradient(self, lam):
        """∇h(λ), h(λ) = f(w*(λ), λ)."""
        w = self.solution(lam)
        a = self.x.T @ self.x / N + np.diag(np.exp(lam))
        v = -np.linalg.solve(a, self.f_w(w, lam, slice(None)))
        return self.cross(w, lam, slice(None), v) + self.f_lam(w, lam, slice(None))

    def value(self, lam):
        return self.f(self.solution(lam), lam, slice(None))

    # torch

    def tensors(self):
        """w and λ as leaves that require grad."""
        return (torch.tensor(a.copy(), requires_grad=True) for a in (self.w, self.lam))

    def losses(self, w, lam):
        """The functions inner(i) and outer(j): the losses of the rows i or j at the tensors w and lam themselves."""
        x, y, v, u = (torch.tensor(a) for a in (self.x, self.y, self.v, self.u))

        def inner(i):
            return ((x[i] @ w - y[i]) ** 2).mean() / 2 + (lam.exp() * w * w).sum() / 2

        def outer(j):
            return ((v[j] @ w - u[j]) ** 2).mean() / 2 + 0.05 * (lam**2).sum()

        return inner, outer


def blocks(count: int, batch: int = BATCH) -> list[slice]:
    return [slice(k, k + batch) for k in range(0, count, batch)]


def pairs(steps: int, seed: int = 0) -> list[tuple[int, int]]:
    """For each step the number of its training batch and of its validation batch."""
    random = np.random.RandomState(seed)
    return [(random.randint(N // BATCH), random.randint(M // BATCH)) for _ in range(steps)]


INNER, OUTER = blocks(N), blocks(M)
ALL = slice(None)


# The algorithms in NumPy; each returns (w, λ) after the steps.


def soba(p, order, average=None, recursive=None):
    w, v, lam, h = p.w.copy(), np.zeros(D), p.lam.copy(), np.zeros(D)
    old, kept = None, None
    for i, j in order:
        i, j = INNER[i], OUTER[j]
        new = p.directions(w, v, lam, i, j)
        if recursive is not None and old is not None:
            before = p.directions(*old, i, j)
            new = tuple(n + (1 - recursive) * (k - b) for n, k, b in zip(new, kept, before, strict=True))
        old, kept = (w, v, lam), new
        dw, dv, dlam = new
        if average is not None:
            h = (1 - average) * h + average * dlam
            dlam = h
        w, v, lam = w - STEP * dw, v - STEP * dv, lam - OUTER_STEP * dlam
    return w, lam


def saba(p, order):
    w, v, lam = p.w.copy(), np.zeros(D), p.lam.copy()
    tables = [np.zeros((len(INNER), D)) for _ in range(3)] + [np.zeros((len(OUTER), D)) for _ in range(2)]
    for i, j in order:
        rows = [i] * 3 + [j] * 2
        new = [
            p.g_w(w, lam, INNER[i]),
            p.hessian(w, lam, INNER[i], v),
            p.cross(w, lam, INNER[i], v),
            p.f_w(w, lam, OUTER[j]),
            p.f_lam(w, lam, OUTER[j]),
        ]
        d = [n - t[k] + t.mean(0) for n, t, k in zip(new, tables, rows, strict=True)]
        for n, t, k in zip(new, tables, rows, strict=True):
            t[k] = n
        w, v, lam = w - STEP * d[0], v - STEP * (d[1] + d[3]), lam - OUTER_STEP * (d[2] + d[4])
    return w, lam


def srba(p, order, period):
    w, v, lam = p.w.copy(), np.zeros(D), p.lam.copy()
    d = old = ()
    for t, (i, j) in enumerate(order):
        if t % period == 0:
            d = p.directions(w, v, lam, ALL, ALL)
        else:
            new, before = (p.directions(*x, INNER[i], OUTER[j]) for x in ((w, v, lam), old))
            d = tuple(k + n - b for k, n, b in zip(d, new, before, strict=True))
        old = (w, v, lam)
        w, v, lam = w - STEP * d[0], v - STEP * d[1], lam - OUTER_STEP * d[2]
    return w, lam


def amigo(p, order, steps, warm):
    """AmIGO, whose steps on v within an outer step all use the same batch."""
    w, v, lam = p.w.copy(), np.zeros(D), p.lam.copy()
    for i, j in order:
        i, j = INNER[i], OUTER[j]
        f = p.f_w(w, lam, j)
        v = v if warm else -STEP * f
        for _ in range(steps):
            v = v - STEP * (p.hessian(w, lam, i, v) + f)
        d = p.g_w(w, lam, i), p.cross(w, lam, i, v) + p.f_lam(w, lam, j)
        w, lam = w - STEP * d[0], lam - OUTER_STEP * d[1]
    return w, lam


def stocbio(p, order, steps):
    """stocBiO: q = η Σ_{k≤K} (I − ηH)^k ∇₁f, and λ moves along −(∇₂f − ∇²₂₁g q)."""
    w, lam = p.w.copy(), p.lam.copy()
    for i, j in order:
        i, j = INNER[i], OUTER[j]
        term = total = p.f_w(w, lam, j)
        for _ in range(steps):
            term = term - STEP * p.hessian(w, lam, i, term)
            total = total + term
        d = p.g_w(w, lam, i), p.f_lam(w, lam, j) - p.cross(w, lam, i, STEP * total)
        w, lam = w - STEP * d[0], lam - OUTER_STEP * d[1]
    return w, lam


STENCILS = {1: {0: -1, 1: 1}, 2: {-1: -0.5, 1: 0.5}, 4: {-2: 1 / 12, -1: -8 / 12, 1: 8 / 12, 2: -1 / 12}}


def f2sa(p, order, p_order, sigma):
    w, lam, stencil = p.w.copy(), p.lam.copy(), STENCILS[p_order]
    copies = {k: w.copy() for k in stencil if k}
    for i, j in order:
        i, j = INNER[i], OUTER[j]
        points = {0: w, **copies}
        dlam = sum(
            c / sigma * (p.g_lam(points[k], lam, i) + k * sigma * p.f_lam(points[k], lam, j))
            for k, c in stencil.items()
        )
        dw = p.g_w(w, lam, i)
        copies = {k: y - STEP * (p.g_w(y, lam, i) + k * sigma * p.f_w(y, lam, j)) for k, y in copies.items()}
        w, lam = w - STEP * dw, lam - OUTER_STEP * dlam
    return w, lam


def bome(p, order, steps, eta):
    w, lam = p.w.copy(), p.lam.copy()
    for i, j in order:
        i, j = INNER[i], OUTER[j]
        z = w.copy()
        for _ in range(steps):
            z = z - STEP * p.g_w(z, lam, i)
        gap = np.concatenate([p.g_w(w, lam, i), p.g_lam(w, lam, i) - p.g_lam(z, lam, i)])
        f = np.concatenate([p.f_w(w, lam, j), p.f_lam(w, lam, j)])
        mu = max(eta - f @ gap / (gap @ gap), 0)
        d = f + mu * gap
        w, lam = w - STEP * d[:D], lam - OUTER_STEP * d[D:]
    return w, lam


def darts(p, order, radius):
    w, lam = p.w.copy(), p.lam.copy()
    for i, j in order:
        i, j = INNER[i], OUTER[j]
        u = STEP * p.f_w(w, lam, j)
        e = radius / np.linalg.norm(u)
        difference = (p.g_lam(w + e * u, lam, i) - p.g_lam(w - e * u, lam, i)) / (2 * e)
        d = p.g_w(w, lam, i), p.f_lam(w, lam, j) - difference
        w, lam = w - STEP * d[0], lam - OUTER_STEP * d[1]
    return w, lam


def run(p, make, order, closures=True, index=False, **options):
    """Train by a tracker and plain gradient steps for both variables; return (w, λ) and the tracker."""
    w, lam = p.tensors()
    inner, outer = p.losses(w, lam)
    tracker = make([w], [lam], inner, outer)
    optimizers = torch.optim.SGD([w], lr=STEP), torch.optim.SGD([lam], lr=OUTER_STEP)
    for i, j in order:
        losses = [lambda j=j: outer(OUTER[j]), lambda i=i: inner(INNER[i])]
        extra = {"index": (i, j)} if index else {}
        tracker.backward(*(losses if closures else [loss() for loss in losses]), **extra, **options)
        for each in (*optimizers, tracker):
            each.step()
        for each in optimizers:
            each.zero_grad()
    return (w.detach().numpy(), lam.detach().numpy()), tracker


def full(inner, outer):
    """The argument `full` of trackers: both losses over all data, as iterables of batch losses that add up to them."""

    def sums():
        outers = (outer(j) / len(OUTER) for j in OUTER)
        inners = (inner(i) / len(INNER) for i in INNER)
        return outers, inners

    return sums


B = hg.bilevel
# name: (maker of the tracker, algorithm in NumPy, whether losses must be closures, whether backward takes an index)
ROWS = {
    "SOBA": (lambda w, h, g, f: B.SOBA(w, h, lr=STEP), lambda p, o: soba(p, o), False, False),
    "MA-SOBA": (
        lambda w, h, g, f: B.SOBA(w, h, lr=STEP, average=0.3),
        lambda p, o: soba(p, o, average=0.3),
        False,
        False,
    ),
    "STORM": (
        lambda w, h, g, f: B.SOBA(w, h, lr=STEP, recursive=0.4),
        lambda p, o: soba(p, o, recursive=0.4),
        True,
        False,
    ),
    "SABA": (lambda w, h, g, f: B.SABA(w, h, lr=STEP, batches=(len(INNER), len(OUTER))), saba, False, True),
    "SRBA": (
        lambda w, h, g, f: B.SRBA(w, h, lr=STEP, full=full(g, f), period=7),
        lambda p, o: srba(p, o, 7),
        True,
        False,
    ),
    "AmIGO": (lambda w, h, g, f: B.AmIGO(w, h, lr=STEP, steps=3), lambda p, o: amigo(p, o, 3, True), False, False),
    "stocBiO": (
        lambda w, h, g, f: B.AmIGO(w, h, lr=STEP, steps=3, warm=False),
        lambda p, o: stocbio(p, o, 3),
        False,
        False,
    ),
    "F2SA-1": (lambda w, h, g, f: B.F2SA(w, h, lr=STEP, order=1), lambda p, o: f2sa(p, o, 1, 0.1), True, False),
    "F2SA-2": (lambda w, h, g, f: B.F2SA(w, h, lr=STEP), lambda p, o: f2sa(p, o, 2, 0.1), True, False),
    "F2SA-4": (lambda w, h, g, f: B.F2SA(w, h, lr=STEP, order=4), lambda p, o: f2sa(p, o, 4, 0.1), True, False),
    "BOME": (lambda w, h, g, f: B.BOME(w, h, lr=STEP, steps=3), lambda p, o: bome(p, o, 3, 0.5), True, False),
    "DARTS": (lambda w, h, g, f: B.SAMA(w, h, lr=STEP), lambda p, o: darts(p, o, 0.01), True, False),
}
