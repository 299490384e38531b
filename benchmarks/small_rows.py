"""The rows of `small`: each builds its problem, its oracle in NumPy, the code by hand, and the columns."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap

import hypergrad as hg

from . import peers, problems, small_layers, small_outer
from .methods import HyperTorch, hypergradient, library
from .small import Column, Row

COUNT = 1000  # problems
FLOOR = "by hand"


def cubic(n: int, count: int) -> tuple[Any, Tensor, Tensor, np.ndarray]:
    """F(w, a) = w³ + 2w + Mw + 5 − a², `count` of its roots (w, a), and the derivative dw/da of each by NumPy."""
    draw = np.random.RandomState(0)
    m = 0.3 * draw.randn(n, n) / np.sqrt(n)
    w = draw.uniform(-1, 1, (count, n))
    a = np.sqrt(w**3 + 2 * w + w @ m.T + 5)
    j = np.stack([np.diag(3 * x**2 + 2) + m for x in w])
    truth = np.linalg.solve(j, np.stack([np.diag(2 * x) for x in a]))
    matrix = torch.from_numpy(m)
    w, a = torch.from_numpy(w), torch.from_numpy(a)
    return (lambda w, a: w**3 + 2 * w + matrix @ w + 5 - a**2), w, a, truth


def by_lu(residual: Any, w: Tensor, a: Tensor) -> Tensor:
    j, p = vmap(jacrev(residual, argnums=(0, 1)))(w, a)
    lu, pivots = torch.linalg.lu_factor(j)
    return -torch.linalg.lu_solve(lu, pivots, p)


def roots(n: int, count: int = COUNT) -> Row:
    """The Jacobian dw/da of each of 1,000 given roots of n equations: vmap(jacrev(root))."""
    residual, w, a, truth = cubic(n, count)

    def ours(solver: Any = None) -> Tensor:
        return vmap(jacrev(lambda a, w: hg.implicit.root(residual, w, a, solver=solver)))(a, w)

    columns = [
        Column(FLOOR, partial(by_lu, residual, w, a), FLOOR, "floor"),
        Column("implicit.root, default solver", ours, FLOOR, target=1.5, memory=1.5),
        Column("implicit.root, Dense", partial(ours, hg.solvers.Dense()), FLOOR, target=1.5, memory=1.5),
    ]
    if peers.installed("jax", "jaxopt"):
        columns.append(Column("jaxopt solve_lu, jit", jaxopt_roots(residual, w, a), FLOOR, "JAXopt"))
    return Row(f"{count} roots of {n} unknowns", columns, truth, rounds=25)


def jaxopt_roots(residual: Any, w: Tensor, a: Tensor) -> Callable[[], Tensor]:
    jax, jnp = peers.jax_in_double()
    implicit_diff, linear_solve = peers.load("jaxopt.implicit_diff"), peers.load("jaxopt.linear_solve")
    m = jnp.asarray(matrix_of(residual, w.shape[1]))

    def equation(w: Any, a: Any) -> Any:
        return w**3 + 2 * w + m @ w + 5 - a**2

    def solution(w: Any, a: Any) -> Any:
        return implicit_diff.custom_root(equation, solve=linear_solve.solve_lu)(lambda init, a: init)(w, a)

    jitted = jax.jit(jax.vmap(jax.jacrev(solution, argnums=1)))
    arrays = [jnp.asarray(x.numpy()) for x in (w, a)]
    return lambda: torch.from_dlpack(jax.block_until_ready(jitted(*arrays)))


def matrix_of(residual: Any, n: int) -> Any:
    """M of `cubic`: the derivative of F at w = 0 minus 2I."""
    zero = torch.zeros(n, dtype=torch.float64)
    return (jacrev(residual)(zero, zero) - 2 * torch.eye(n, dtype=torch.float64)).numpy()


def minima(n: int = 10, count: int = COUNT) -> Row:
    """The Jacobian dw/da of each of 1,000 given minimisers: vmap(jacrev(argmin))."""
    draw = np.random.RandomState(0)
    s = draw.randn(n, n) / np.sqrt(n)
    s = s @ s.T
    w = draw.uniform(-1, 1, (count, n))
    a = w**3 + w + w @ s
    truth = np.linalg.inv(np.stack([np.diag(3 * x**2 + 1) + s for x in w]))
    matrix = torch.from_numpy(s)
    w, a = torch.from_numpy(w), torch.from_numpy(a)

    def loss(w: Tensor, a: Tensor) -> Tensor:
        return (w**4).sum() / 4 + (w @ w + w @ matrix @ w) / 2 - a @ w

    def ours(solver: Any = None) -> Tensor:
        return vmap(jacrev(lambda a, w: hg.implicit.argmin(loss, w, a, solver=solver)))(a, w)

    columns = [
        Column(FLOOR, partial(by_lu, grad(loss), w, a), FLOOR, "floor"),
        Column("implicit.argmin, default solver", ours, FLOOR, target=2.0),
        Column("implicit.argmin, Dense", partial(ours, hg.solvers.Dense()), FLOOR, target=2.0),
    ]
    return Row(f"{count} minima of {n} unknowns", columns, truth)


Matrices = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def programs(count: int, n: int, m: int, p: int) -> tuple[tuple[Tensor, Tensor, Tensor], Matrices]:
    """Quadratic programs ½zᵀQz + qᵀz, Gz ≤ h, Az = b, with solutions (z, λ, ν) and m / 3 active inequalities."""
    draw = np.random.RandomState(0)
    q = draw.randn(count, n, n) / np.sqrt(n)
    q = q @ q.transpose(0, 2, 1) + np.eye(n)
    g, a, z, nu = draw.randn(count, m, n), draw.randn(count, p, n), draw.randn(count, n), draw.randn(count, p)
    active = np.arange(m) < m // 3
    lam, slack = np.where(active, draw.rand(count, m) + 0.1, 0.0), np.where(active, 0.0, draw.rand(count, m) + 0.1)
    product = partial(np.einsum, "bij,bj->bi")
    h, b = product(g, z) + slack, product(a, z)
    c = -(product(q, z) + product(g.transpose(0, 2, 1), lam) + product(a.transpose(0, 2, 1), nu))
    tensors = [torch.from_numpy(x) for x in (z, lam, nu, q, c, g, h, a, b)]
    return tuple(tensors[:3]), tuple(tensors[3:])  # type: ignore[return-value]


def apply(matrix: Tensor, x: Tensor) -> Tensor:
    return (matrix @ x.unsqueeze(-1)).squeeze(-1)


def conditions(w: Any, given: Any) -> Any:
    """The residual of the Karush–Kuhn–Tucker equations."""
    z, lam, nu = w
    q, c, g, h, a, b = given
    return apply(q, z) + c + apply(g.mT, lam) + apply(a.mT, nu), lam * (apply(g, z) - h), apply(a, z) - b


def optnet(w: Any, given: Any, slope: Tensor, xp: Any = torch) -> list[Any]:
    """The backward pass of Amos and Kolter 2017, equations 7 and 8; `slope` is the gradient in z."""
    (z, lam, nu), (q, _, g, h, a, _) = w, given
    (count, n), m, p = z.shape, lam.shape[1], nu.shape[1]
    k = torch.zeros(count, n + m + p, n + m + p, dtype=z.dtype)
    k[:, :n, :n], k[:, :n, n : n + m], k[:, :n, n + m :] = q, g.mT * lam.unsqueeze(1), a.mT
    k[:, n : n + m, :n], k[:, n + m :, :n] = g, a
    k[:, n : n + m, n : n + m] = torch.diag_embed(apply(g, z) - h)
    right = torch.zeros(count, n + m + p, 1, dtype=z.dtype)
    right[:, :n, 0] = -slope
    lu, pivots = torch.linalg.lu_factor(k)
    dz, dl, dn = torch.linalg.lu_solve(lu, pivots, right).squeeze(-1).split([n, m, p], -1)

    def outer(x: Tensor, y: Tensor) -> Tensor:
        return x.unsqueeze(2) * y.unsqueeze(1)

    dg, da = outer(lam * dl, z) + outer(lam, dz), outer(dn, z) + outer(nu, dz)
    return [outer(dz, z), dz, dg, -lam * dl, da, -dn]


def quadratic_programs(count: int = 128, n: int = 10, m: int = 5, p: int = 3) -> Row:
    """The gradients of 128 quadratic programs with respect to all of their matrices, through residual=."""
    solution, given = programs(count, n, m, p)
    slope = torch.from_numpy(np.random.RandomState(1).randn(count, n))
    given = tuple(x.requires_grad_() for x in given)

    def ours(solver: Any = None) -> list[Tensor]:
        z = hg.implicit.root(conditions, solution, given, batch_dims=1, solver=solver)[0]
        return list(torch.autograd.grad(z, given, slope))

    def by_hand() -> list[Tensor]:
        with torch.no_grad():
            return optnet(solution, given, slope)

    columns = [
        Column("OptNet's backward by hand", by_hand, "OptNet's backward by hand", "floor"),
        Column("implicit.root, default solver", ours, "OptNet's backward by hand", target=1.2),
        Column("implicit.root, Dense", partial(ours, hg.solvers.Dense()), "OptNet's backward by hand", target=1.2),
    ]
    return Row(f"{count} quadratic programs", columns, by_numpy(solution, given, slope), repeat=3)


def by_numpy(solution: Any, given: Any, slope: Tensor) -> list[np.ndarray]:
    """−∂₂Fᵀ(∂₁F)⁻ᵀ slope of each program, with the derivatives of F written out."""
    parts: list[list[np.ndarray]] = [[] for _ in given]
    z_all, lam_all, nu_all, q_all, _, g_all, h_all, a_all, _ = (x.detach().numpy() for x in (*solution, *given))
    for z, lam, nu, q, g, h, a, s in zip(
        z_all, lam_all, nu_all, q_all, g_all, h_all, a_all, slope.numpy(), strict=True
    ):
        n, m, p = len(z), len(lam), len(nu)
        j = np.block(
            [
                [q, g.T, a.T],
                [lam[:, None] * g, np.diag(g @ z - h), np.zeros((m, p))],
                [a, np.zeros((p, m)), np.zeros((p, p))],
            ]
        )
        v = -np.linalg.solve(j.T, np.concatenate([s, np.zeros(m + p)]))
        x, y, u = v[:n], v[n : n + m], v[n + m :]
        found = (
            np.outer(x, z),
            x,
            np.outer(lam, x) + np.outer(lam * y, z),
            -lam * y,
            np.outer(nu, x) + np.outer(u, z),
            -u,
        )
        for part, value in zip(parts, found, strict=True):
            part.append(value)
    return [np.stack(part) for part in parts]


def solved(count: int = COUNT, n: int = 5, steps: int = 12) -> Row:
    """1,000 solutions by Newton's method in the user's function under vmap, and the gradient through each."""
    residual, _, a, jacobians = cubic(n, count)

    def newton(a: Tensor) -> Tensor:
        w = torch.zeros_like(a)
        for _ in range(steps):
            lu, pivots = torch.linalg.lu_factor(jacrev(residual)(w, a))
            w = w - torch.linalg.lu_solve(lu, pivots, residual(w, a).unsqueeze(-1)).squeeze(-1)
        return w

    fit = hg.implicit.solver(residual=residual)(newton)

    def by_hand() -> Tensor:
        w = vmap(newton)(a)
        j, p = vmap(jacrev(residual, argnums=(0, 1)))(w, a)
        lu, pivots = torch.linalg.lu_factor(j.mT)
        return -(p.mT @ torch.linalg.lu_solve(lu, pivots, torch.ones_like(w).unsqueeze(-1))).squeeze(-1)

    columns = [
        Column(FLOOR, by_hand, FLOOR, "floor"),
        Column("implicit.solver", lambda: vmap(grad(lambda a: fit(a).sum()))(a), FLOOR, target=1.5),
    ]
    if peers.installed("jax", "optimistix"):
        columns.append(
            Column("optimistix Newton, jit", optimistix_roots(residual, a, steps), FLOOR, "optimistix", correct=1e-8)
        )
    return Row(f"implicit.solver under vmap, {count} solves", columns, jacobians.sum(1), rounds=9)


def optimistix_roots(residual: Any, a: Tensor, steps: int) -> Callable[[], Tensor]:
    jax, jnp = peers.jax_in_double()
    optimistix = peers.load("optimistix")
    m, given = jnp.asarray(matrix_of(residual, a.shape[1])), jnp.asarray(a.numpy())
    method = optimistix.Newton(rtol=1e-12, atol=1e-12)

    def equation(w: Any, a: Any) -> Any:
        return w**3 + 2 * w + m @ w + 5 - a**2

    def total(a: Any) -> Any:
        found = optimistix.root_find(
            lambda w, a: w**3 + 2 * w + m @ w + 5 - a**2,
            method,
            jnp.zeros_like(a),
            a,
            max_steps=10 * steps,
            throw=False,
        )
        return found.value.sum()

    jitted = jax.jit(jax.vmap(jax.grad(total)))
    return lambda: torch.from_dlpack(jax.block_until_ready(jitted(given)))


def small_call(n: int, steps: int) -> Row:
    """One hypergradient of n parameters by K steps, through HyperTorch's interface, compared with HyperTorch."""
    problem = problems.logistic("small", 50, n, -2.0, 2.0, 0.0, steps=steps, small=True)
    problem.hparams[0].requires_grad_()
    late = 1e-10 if steps < n else 1e-2
    columns = [
        # If K steps converge, HyperTorch returns the iterate before the last.
        Column("HyperTorch CG", lambda: HyperTorch(problem).cg(), "HyperTorch CG", "floor", correct=late),
        Column("hg.CG", lambda: library(hg.CG)(problem), "HyperTorch CG", target=1.1),
    ]
    if peers.installed("jax", "jaxopt"):
        columns.append(Column("JAXopt CG, jit", lambda: peers.jaxopt_cg(problem), "HyperTorch CG", "JAXopt"))
    return Row(f"hg.CG, n = {n}, K = {steps}", columns, problem.system.truth("cg"), repeat=20, rounds=25)


def small_fixed_point(n: int, steps: int) -> Row:
    """One hypergradient of n parameters by K steps of the fixed point method, through HyperTorch's interface."""
    problem = problems.logistic("small", 50, n, -2.0, 2.0, 0.0, steps=steps, small=True)
    problem.hparams[0].requires_grad_()
    floor = "HyperTorch fixed_point"
    columns = [
        Column(floor, lambda: HyperTorch(problem).fixed_point(), floor, "floor"),
        Column("hg.fixed_point", lambda: library(hg.fixed_point)(problem), floor, target=1.1),
    ]
    return Row(f"hg.fixed_point, n = {n}, K = {steps}", columns, problem.system.truth("fixed_point"), 20, 25)


def small_dense(n: int = 20) -> Row:
    """One hypergradient of n parameters by a dense solve."""
    problem = problems.logistic("small", 50, n, -2.0, 2.0, 0.0, small=True)
    problem.hparams[0].requires_grad_()

    def by_hand() -> Tensor:
        w = problem.params[0].detach().requires_grad_()
        (slope,) = torch.autograd.grad(problem.inner_loss([w], problem.hparams), w, create_graph=True)
        units = torch.eye(n, dtype=w.dtype)
        (hessian,) = torch.autograd.grad(slope, w, units, retain_graph=True, is_grads_batched=True)
        (b,) = torch.autograd.grad(problem.outer_loss([w], problem.hparams), w)
        lu, pivots = torch.linalg.lu_factor(hessian)
        v = torch.linalg.lu_solve(lu, pivots, b.unsqueeze(-1)).squeeze(-1)
        return -torch.autograd.grad(slope, problem.hparams, v)[0]

    columns = [
        Column(FLOOR, by_hand, FLOOR, "floor"),
        Column("implicit.grad, Dense", lambda: hypergradient(problem, hg.solvers.Dense()).grads, FLOOR, target=1.4),
    ]
    return Row(f"dense, n = {n}", columns, problem.system.truth("exact"), 10, 25)


ROWS: dict[str, Callable[[], Row]] = {
    "roots 5": partial(roots, 5),
    "roots 10": partial(roots, 10),
    "roots 20": partial(roots, 20),
    "minima": minima,
    "quadratic programs": quadratic_programs,
    "solver under vmap": solved,
    "CG 5 5": partial(small_call, 5, 5),
    "CG 20 1": partial(small_call, 20, 1),
    "CG 20 10": partial(small_call, 20, 10),
    "fixed_point 5 5": partial(small_fixed_point, 5, 5),
    "fixed_point 20 1": partial(small_fixed_point, 20, 1),
    "fixed_point 20 10": partial(small_fixed_point, 20, 10),
    "dense": small_dense,
    **small_layers.ROWS,
    **small_outer.ROWS,
}
