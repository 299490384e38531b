"""The guaranteed bound is never violated: random problems whose constants are known by construction, in NumPy."""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import binary_cross_entropy_with_logits as log_loss

import hypergrad as hg
import oracles
from helpers import S
from hypergrad.diagnostics import Constants, bound
from oracles import sigmoid

# max |d²tanh| = 4 / (3√3), max |σ''| = 1 / (6√3)
BEND, SIGMOID_BEND = 4 / (3 * 3**0.5), 1 / (6 * 3**0.5)
LOOSENESS: dict[str, list[float]] = defaultdict(list)


@dataclass
class Case:
    """F, its derivatives and E's at (w, λ), as functions of w; and what is declared."""

    w: np.ndarray
    residual: object
    a: object
    cross: object
    outer_1: object
    outer_2: object
    constants: Constants

    def hypergradient(self, w, v):
        return self.outer_2(w) - self.cross(w).T @ v

    def adjoint(self, w):
        return np.linalg.solve(self.a(w).T, self.outer_1(w))


def solved(residual, a, w):
    """F = 0 by Newton's method, halving until ‖F‖ falls."""
    for _ in range(200):
        f = residual(w)
        step, t = np.linalg.solve(a(w), f), 1.0
        while np.linalg.norm(residual(w - t * step)) > np.linalg.norm(f) * (1 - t / 4) and t > 1e-10:
            t /= 2
        w = w - t * step
        if np.linalg.norm(step) <= 1e-15 * (1 + np.linalg.norm(w)):
            break
    return w


def spectral(x) -> float:
    return float(np.linalg.norm(x, 2))


def perturbed_quadratic(rng, n, m) -> Case:
    """½wᵀQw − cᵀw + Σᵢ (aᵢ or λᵢ) log cosh(uᵢᵀw) − wᵀBλ / ½wᵀHw + tᵀw + λᵀ tanh(Gw): everything varies."""
    q, _ = np.linalg.qr(rng.standard_normal((n, n)))
    spectrum = 10.0 ** rng.uniform(-1.5, 1, n)
    matrix = (q * spectrum) @ q.T
    u, d = (rng.standard_normal((k, n)) * 10 ** rng.uniform(-1, 0.5) for k in (n, m))
    a, lam = np.abs(rng.standard_normal(n)), np.abs(rng.standard_normal(m))
    b, g = rng.standard_normal((n, m)), rng.standard_normal((m, n)) * 10 ** rng.uniform(-1, 0.3)
    c, t, h = rng.standard_normal(n), rng.standard_normal(n), rng.standard_normal((n, n))

    def residual(w):
        return matrix @ w - c - b @ lam + u.T @ (a * np.tanh(u @ w)) + d.T @ (lam * np.tanh(d @ w))

    def jacobian(w):
        return matrix + (u.T * (a / np.cosh(u @ w) ** 2)) @ u + (d.T * (lam / np.cosh(d @ w) ** 2)) @ d

    def cross(w):
        return d.T * np.tanh(d @ w) - b

    def outer_1(w):
        return (h + h.T) @ w / 2 + t + g.T @ (lam / np.cosh(g @ w) ** 2)

    def constants(w):
        rows = {name: np.linalg.norm(x, axis=1) for name, x in (("u", u), ("d", d), ("g", g))}
        return Constants(
            mu=spectrum.min(),
            B=spectral(cross(w)),
            L_B=float(np.sqrt((rows["d"] ** 4).sum())),
            L_A=float(BEND * ((a * rows["u"] ** 3).sum() + (lam * rows["d"] ** 3).sum())),
            L_E=spectral(h + h.T) / 2 + float(BEND * (lam * rows["g"] ** 3).sum()) + 0.0,
            L_lambda=spectral(g),
        )

    return Case(
        solved(residual, jacobian, np.zeros(n)), residual, jacobian, cross, outer_1, lambda w: np.tanh(g @ w), constants
    )


def logistic(rng, n, m) -> Case:
    """Mean log-loss + ½Σ e^{θⱼ} wⱼ² / mean log-loss: an explicit ℓ₂ term gives μ."""
    rows = 3 * n + m
    x, xv = (rng.standard_normal((rows, n)) * 10 ** rng.uniform(-0.5, 0.5, n) for _ in range(2))
    y, yv = ((rng.standard_normal(rows) > 0).astype(float) for _ in range(2))
    strength = 10.0 ** rng.uniform(-3, 0.5, n)

    def residual(w):
        return oracles.log_loss_grad(x, y, w) + strength * w

    def jacobian(w):
        return oracles.log_loss_hessian(x, w) + np.diag(strength)

    def constants(w):
        lengths = np.linalg.norm(x, axis=1)
        return Constants(
            mu=strength.min(),
            B=float((strength * np.abs(w)).max()),
            L_B=strength.max(),
            L_A=float(SIGMOID_BEND * (lengths**3).mean()),
            L_E=spectral(xv) ** 2 / (4 * rows),
            L_lambda=0.0,
        )

    return Case(
        solved(residual, jacobian, np.zeros(n)),
        residual,
        jacobian,
        lambda w: np.diag(strength * w),
        lambda w: oracles.log_loss_grad(xv, yv, w),
        lambda w: np.zeros(n),
        constants,
    )


def contraction(rng, n, m) -> Case:
    """w = tanh(Ww + Uλ + b) / ½‖w − t‖² + ¼ρ‖λ‖²‖w‖²: F = w − Φ, in fixed point form."""
    q, rho = rng.uniform(0.05, 0.98), rng.uniform(0, 0.5)
    weight, u = rng.standard_normal((n, n)), rng.standard_normal((n, m))
    weight *= q / spectral(weight)
    b, lam, t = rng.standard_normal(n), rng.standard_normal(m), rng.standard_normal(n)

    def phi(w):
        return np.tanh(weight @ w + u @ lam + b)

    def slope(w):
        return 1 - phi(w) ** 2

    def jacobian(w):
        return np.eye(n) - slope(w)[:, None] * weight

    def constants(w):
        return Constants(
            q=q,
            B=spectral(slope(w)[:, None] * u),
            L_B=BEND * q * spectral(u),
            L_A=BEND * q * q,
            L_E=1 + rho * float(lam @ lam) / 2,
            L_lambda=rho * float(np.linalg.norm(lam)) * 4 * n**0.5,  # |w| ≤ 3 on the set that holds w and w*
        )

    return Case(
        solved(lambda w: w - phi(w), jacobian, np.zeros(n)),
        lambda w: w - phi(w),
        jacobian,
        lambda w: -slope(w)[:, None] * u,
        lambda w: w - t + rho * float(lam @ lam) * w / 2,
        lambda w: rho * lam * float(w @ w) / 2,
        constants,
    )


def assert_bounded(family, seed: int) -> None:
    """A random problem, a random w and a random v, near the solution or far from it."""
    rng = np.random.default_rng(seed)
    n, m = rng.integers(1, 6, 2)
    case = family(rng, n, m)
    size = 10.0 ** rng.uniform(-8, 0.3)
    direction = rng.standard_normal(n)
    w = case.w + min(size, 1.0 if family is contraction else size) * direction / np.linalg.norm(direction)
    v = case.adjoint(w)
    v = v + 10.0 ** rng.uniform(-12, 0) * np.linalg.norm(v) * rng.standard_normal(n)
    true = case.hypergradient(case.w, case.adjoint(case.w))
    error = float(np.linalg.norm(case.hypergradient(w, v) - true))
    r_v = case.outer_1(w) - case.a(w).T @ v
    norms = [float(np.linalg.norm(x)) for x in (case.residual(w), r_v, v)]
    guaranteed = bound(case.constants(w), *norms)
    rounding = 1e-12 * (1 + np.linalg.norm(true)) * np.linalg.cond(case.a(case.w))
    assert error <= guaranteed + rounding, (seed, error, guaranteed)
    if error > rounding:
        LOOSENESS[family.__name__].append(guaranteed / error)


FAMILIES = [perturbed_quadratic, logistic, contraction]


def assert_never_violated(family, examples: int) -> None:
    settle = settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    settle(given(st.integers(0, 2**32 - 1))(lambda seed: assert_bounded(family, seed)))()
    looseness = np.quantile(LOOSENESS[family.__name__], [0.0, 0.5, 0.9])
    print(f"{family.__name__}: {examples} problems, bound / error: least, median, 90 %: {looseness.round(2)}")
    assert looseness[0] > 0.999


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bound_is_never_violated(family):
    assert_never_violated(family, 250)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_bound_is_never_violated_on_thousands_of_problems(family):
    assert_never_violated(family, 3000)


def test_the_bound_by_hand():
    """ε = .2/2 = .1; ‖v − v*‖ ≤ (.3 + (11 + 7 · .4) .1)/2 = .84; 13 · .1 + 5 · .1 · .4 + (3 + 5 · .1) .84."""
    constants = {"B": 3.0, "L_B": 5.0, "L_A": 7.0, "L_E": 11.0, "L_lambda": 13.0}
    for modulus, residual in (({"mu": 2.0}, 0.2), ({"q": 0.75}, 0.025)):
        scale = 1.0 if "mu" in modulus else 8.0
        found = bound(Constants(**constants, **modulus), residual, 0.3, 0.4)
        assert found == pytest.approx(1.3 + 0.2 + 3.5 * 0.84 * scale, rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["L_B", "L_A", "L_E", "L_lambda", "mu"])
def test_a_wrong_declaration_is_found_out(name):
    """The problems are hard enough that each constant matters: with it wrong, some bound is violated."""

    def declared(w, constants):
        values = {key: getattr(constants(w), key) for key in ("B", "L_B", "L_A", "L_E", "L_lambda", "mu", "q")}
        values[name] = values[name] * 100 if name == "mu" else 0.0
        return Constants(**values)

    def spoiled(rng, n, m):
        case = perturbed_quadratic(rng, n, m)
        constants = case.constants
        case.constants = lambda w: declared(w, constants)
        return case

    def violated(seed):
        try:
            assert_bounded(spoiled, seed)
        except AssertionError:
            return True
        return False

    assert any(violated(seed) for seed in range(2000))


@pytest.mark.parametrize("size", [1e-1, 1e-3, 1e-6])
def test_the_bound_from_a_report(size):
    """The ℓ₂ term of breast-cancer logistic regression as μ."""
    o = oracles.logistic()
    x, y, xv, yv = (torch.as_tensor(o.data[k]) for k in ("x", "y", "xv", "yv"))
    strength = np.exp(-3.0)
    theta = torch.full((30,), -3.0, dtype=torch.float64, requires_grad=True)
    w = torch.as_tensor(o.solution) * (1 + size)
    result = hg.implicit.grad(
        lambda w, h: log_loss(xv @ w, yv),
        inner_loss=lambda w, h: log_loss(x @ w, y) + 0.5 * (h.exp() * w * w).sum(),
        params=w,
        hparams=theta,
        solver=S.CG(rtol=1e-8, on_failure="ignore"),
    )
    constants = Constants(
        mu=strength,
        B=float(strength * w.abs().max()),
        L_B=strength,
        L_A=float(SIGMOID_BEND * x.norm(dim=1).pow(3).mean()),
        L_E=spectral(o.data["xv"]) ** 2 / (4 * len(yv)),
        L_lambda=0.0,
    )
    e = hg.diagnostics.check(result).estimate
    true = float(np.linalg.norm(result.grads.numpy() - o.grads[0]))
    assert true <= bound(constants, e.inner_residual, e.adjoint_residual, e.adjoint_norm) + e.mismatch


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mu": 1.0, "q": 0.5}, "exactly one of mu and q"),
        ({}, "exactly one of mu and q"),
        ({"mu": 0.0}, "mu must be positive"),
        ({"q": 1.0}, r"q in \[0, 1\)"),
        ({"mu": 1.0, "L_A": -1.0}, "L_A must be a finite number"),
        ({"mu": 1.0, "B": float("inf")}, "B must be a finite number"),
    ],
)
def test_constants_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=message):
        Constants(**({"B": 1.0, "L_B": 0.0, "L_A": 0.0, "L_E": 1.0, "L_lambda": 0.0} | wrong))


def test_sigmoid_and_tanh_bend_no_more_than_declared():
    x = np.linspace(-5, 5, 200_001)
    assert abs(np.abs(2 * np.tanh(x) / np.cosh(x) ** 2).max() - BEND) < 1e-8
    s = sigmoid(x)
    assert abs(np.abs(s * (1 - s) * (1 - 2 * s)).max() - SIGMOID_BEND) < 1e-8
