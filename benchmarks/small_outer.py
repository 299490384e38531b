"""Rows of `small`: 100 outer steps on real data, each an inner solve, a hypergradient and a gradient step on λ."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import hypergrad as hg

from . import peers
from .small import Column, Row

FLOOR = "by hand"


def outer_steps(steps: int = 100, rtol: float = 1e-4) -> Row:
    """100 outer steps of gradient descent on the breast cancer data: inner Newton's method, warm-started CG to 1e-4."""
    datasets = peers.load("sklearn.datasets")
    x, y = datasets.load_breast_cancer(return_X_y=True)
    x = (x - x.mean(0)) / x.std(0)
    order = np.random.RandomState(0).permutation(len(x))
    tx, ty, vx, vy = x[order[:285]], y[order[:285]].astype(float), x[order[285:]], y[order[285:]].astype(float)
    data = [torch.from_numpy(a) for a in (tx, ty, vx, vy)]

    def inner(w: Tensor, theta: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(data[0] @ w, data[1]) + 0.5 * (theta.exp() * w * w).sum()

    def outer(w: Tensor, theta: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(data[2] @ w, data[3])

    def newton(w: Tensor, theta: Tensor, count: int = 3) -> Tensor:
        with torch.no_grad():
            for _ in range(count):
                s = torch.sigmoid(data[0] @ w)
                g = data[0].mT @ (s - data[1]) / len(s) + theta.exp() * w
                h = (data[0].mT * (s * (1 - s))) @ data[0] / len(s) + theta.exp().diag()
                w = w - torch.linalg.solve(h, g)
        return w

    def loop(direction: Callable[[Tensor, Tensor, Any], tuple[Tensor, Any]]) -> Tensor:
        theta, state = torch.full((30,), -3.0, dtype=torch.float64), None
        w = newton(torch.zeros(30, dtype=torch.float64), theta, 10)
        for _ in range(steps):
            w = newton(w, theta)
            g, state = direction(w, theta.requires_grad_(), state)
            theta = (theta - 10 * g).detach()
        return theta

    columns = methods(loop, inner, outer, partial(jax_logistic, (tx, ty, vx, vy), steps), rtol)
    return Row(f"{steps} outer steps, breast cancer", columns, by_numpy(tx, ty, vx, vy, steps), rounds=5)


def ridge_steps(steps: int = 100, rtol: float = 1e-4) -> Row:
    """100 outer steps on cubic features of the diabetes data, a penalty for each: exact solutions, warm CG to 1e-4."""
    x, y = peers.load("sklearn.datasets").load_diabetes(return_X_y=True)
    x = peers.load("sklearn.preprocessing").PolynomialFeatures(3, include_bias=False).fit_transform(x / x.std(0))
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    order = np.random.RandomState(0).permutation(len(x))
    parts = x[order[:221]], y[order[:221]], x[order[221:]], y[order[221:]]
    tx, ty, vx, vy = map(torch.from_numpy, parts)
    n, count = len(tx), tx.shape[1]

    def inner(w: Tensor, theta: Tensor) -> Tensor:
        return (tx @ w - ty).square().sum() / (2 * n) + 0.5 * (theta.exp() * w * w).sum()

    def outer(w: Tensor, theta: Tensor) -> Tensor:
        return (vx @ w - vy).square().mean() / 2

    def loop(direction: Callable[[Tensor, Tensor, Any], tuple[Tensor, Any]]) -> Tensor:
        theta, state = torch.full((count,), -1.0, dtype=torch.float64), None
        for _ in range(steps):
            with torch.no_grad():
                w = torch.linalg.solve(tx.mT @ tx / n + theta.exp().diag(), tx.mT @ ty / n)
            g, state = direction(w, theta.requires_grad_(), state)
            theta = (theta - 30 * g).detach()
        return theta

    theta = np.full(count, -1.0)
    for _ in range(steps):
        a = parts[0].T @ parts[0] / n + np.diag(np.exp(theta))
        w = np.linalg.solve(a, parts[0].T @ parts[1] / n)
        v = np.linalg.solve(a, parts[2].T @ (parts[2] @ w - parts[3]) / len(parts[2]))
        theta = theta + 30 * np.exp(theta) * w * v
    columns = methods(loop, inner, outer, partial(jax_ridge, parts, steps), rtol)
    return Row(f"{steps} outer steps, diabetes", columns, theta, rounds=5)


def methods(loop: Any, inner: Any, outer: Any, in_jax: Callable[[float], Any], rtol: float) -> list[Column]:
    """A row's columns. loop takes all outer steps with a function (w, λ, state) ↦ (direction, new state)."""

    def along(hypergradient: Callable[..., Any], rtol: float) -> Tensor:
        return loop(lambda w, theta, kept: hypergradient(inner, outer, w, theta, kept, rtol))

    columns = [
        Column(name, partial(along, way, rtol), FLOOR, library, target, exact=partial(along, way, 1e-13))
        for name, way, library, target in (
            (FLOOR, warm_cg, "floor", None),
            ("implicit.grad, CG, x0=", implicit, "hypergrad", 1.0),
        )
    ]
    if peers.installed("jax"):
        columns.append(Column("JAX, jit", in_jax(rtol), FLOOR, "JAX", exact=in_jax(1e-13)))
    return columns


def warm_cg(inner: Any, outer: Any, w: Tensor, theta: Tensor, v: Any, rtol: float) -> tuple[Tensor, Tensor]:
    """The hypergradient by conjugate gradients that start at the last v, and the new v."""
    w = w.requires_grad_()
    (slope,) = torch.autograd.grad(inner(w, theta), w, create_graph=True)
    (b,) = torch.autograd.grad(outer(w, theta), w)
    v = torch.zeros_like(b) if v is None else v
    r = b - torch.autograd.grad(slope, w, v, retain_graph=True)[0]
    p, rr, goal = r, (r @ r).item(), rtol * b.norm().item()
    while rr**0.5 > goal:
        (ap,) = torch.autograd.grad(slope, w, p, retain_graph=True)
        alpha = rr / (p @ ap).item()
        v, r, old = v + alpha * p, r - alpha * ap, rr
        rr = (r @ r).item()
        p = r + rr / old * p
    return -torch.autograd.grad(slope, theta, v)[0], v


def implicit(inner: Any, outer: Any, w: Tensor, theta: Tensor, x0: Any, rtol: float) -> tuple[Tensor, Tensor]:
    solver = hg.solvers.CG(rtol=rtol)
    result = hg.implicit.grad(outer, inner_loss=inner, params=w, hparams=theta, solver=solver, x0=x0)
    return result.grads, result.adjoint


def by_numpy(tx: Any, ty: Any, vx: Any, vy: Any, steps: int) -> Any:
    """The same outer steps with dense solves."""
    theta, w = np.full(tx.shape[1], -3.0), np.zeros(tx.shape[1])
    for step in range(steps):
        for _ in range(3 if step else 13):
            s = 1 / (1 + np.exp(-tx @ w))
            h = (tx.T * (s * (1 - s))) @ tx / len(tx) + np.diag(np.exp(theta))
            w = w - np.linalg.solve(h, tx.T @ (s - ty) / len(tx) + np.exp(theta) * w)
        s = 1 / (1 + np.exp(-tx @ w))
        h = (tx.T * (s * (1 - s))) @ tx / len(tx) + np.diag(np.exp(theta))
        b = vx.T @ (1 / (1 + np.exp(-vx @ w)) - vy) / len(vx)
        theta = theta + 10 * np.exp(theta) * w * np.linalg.solve(h, b)
    return theta


def jax_logistic(parts: tuple[Any, ...], steps: int, rtol: float) -> Callable[[], Tensor]:
    """`outer_steps` in JAX, all steps in one compiled function."""
    jax, jnp = peers.jax_in_double()
    tx, ty, vx, vy = map(jnp.asarray, parts)

    def log_loss(w: Any, x: Any, y: Any) -> Any:
        return jnp.mean(jax.nn.softplus(x @ w) - y * (x @ w))

    def newton(w: Any, theta: Any) -> Any:
        s = jax.nn.sigmoid(tx @ w)
        g = tx.T @ (s - ty) / len(s) + jnp.exp(theta) * w
        return w - jnp.linalg.solve((tx.T * (s * (1 - s))) @ tx / len(s) + jnp.diag(jnp.exp(theta)), g)

    def inner(w: Any, theta: Any) -> Any:
        return log_loss(w, tx, ty) + 0.5 * jnp.sum(jnp.exp(theta) * w * w)

    def solve(w: Any, theta: Any) -> Any:
        return newton(newton(newton(w, theta), theta), theta)

    theta = jnp.full(tx.shape[1], -3.0)
    w = jnp.zeros_like(theta)
    for _ in range(10):
        w = newton(w, theta)
    return jax_loop(solve, inner, lambda w: log_loss(w, vx, vy), w, theta, steps, 10, rtol)


def jax_ridge(parts: tuple[Any, ...], steps: int, rtol: float) -> Callable[[], Tensor]:
    """`ridge_steps` in JAX, all steps in one compiled function."""
    _, jnp = peers.jax_in_double()
    tx, ty, vx, vy = map(jnp.asarray, parts)
    n = len(tx)

    def solve(w: Any, theta: Any) -> Any:
        return jnp.linalg.solve(tx.T @ tx / n + jnp.diag(jnp.exp(theta)), tx.T @ ty / n)

    def inner(w: Any, theta: Any) -> Any:
        return jnp.sum((tx @ w - ty) ** 2) / (2 * n) + 0.5 * jnp.sum(jnp.exp(theta) * w * w)

    theta = jnp.full(tx.shape[1], -1.0)
    return jax_loop(
        solve, inner, lambda w: jnp.mean((vx @ w - vy) ** 2) / 2, jnp.zeros_like(theta), theta, steps, 30, rtol
    )


def jax_loop(
    solve: Any, inner: Any, outer: Any, w: Any, theta: Any, steps: int, size: float, rtol: float
) -> Callable[[], Tensor]:
    """theta after `steps` outer steps: inner solutions by `solve`, warm-started conjugate gradients."""
    jax, jnp = peers.jax_in_double()

    def step(_: Any, state: Any) -> Any:
        w, theta, v = state
        w = solve(w, theta)
        _, product = jax.linearize(lambda w: jax.grad(inner)(w, theta), w)
        b = jax.grad(outer)(w)
        r = b - product(v)
        goal = rtol * jnp.linalg.norm(b)

        def iteration(state: Any) -> Any:
            v, r, p, rr = state
            ap = product(p)
            alpha = rr / (p @ ap)
            r, old = r - alpha * ap, rr
            return v + alpha * p, r, r + r @ r / old * p, r @ r

        v, *_ = jax.lax.while_loop(lambda state: state[3] ** 0.5 > goal, iteration, (v, r, r, r @ r))
        cross = jax.grad(lambda theta: jax.grad(inner)(w, theta) @ v)(theta)
        return w, theta + size * cross, v

    jitted = jax.jit(lambda w, theta: jax.lax.fori_loop(0, steps, step, (w, theta, jnp.zeros_like(w)))[1])
    return lambda: torch.from_dlpack(jax.block_until_ready(jitted(w, theta)))


ROWS: dict[str, Callable[[], Row]] = {
    "outer steps, breast cancer": outer_steps,
    "outer steps, diabetes": ridge_steps,
}
