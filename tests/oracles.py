"""Reference problems of DESIGN section 7, solved densely in NumPy: the truth that the library is compared with.

Every problem is a function that returns an `Oracle`: the data, λ, w*, f, ∇f and the dense system Aᵀ v = ∇₁E. `seed=0`
is the problem as listed in DESIGN; any other seed draws another split of real data, or other synthetic arrays. λ
defaults to the value in DESIGN's row. A docstring "g / E; default λ" states the inner loss, the outer loss and λ.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits

Array = np.ndarray
Data = dict[str, Any]


@dataclass(frozen=True)
class Oracle:
    """A problem at λ by dense algebra; independent systems give `matrix` and `adjoint` a leading axis."""

    data: Data
    hparams: tuple[Array, ...]
    solution: Array
    value: float
    grads: tuple[Array, ...]
    matrix: Array
    adjoint: Array

    @property
    def grad_norm(self) -> float:
        """‖∇f‖ over all leaves of λ."""
        return float(np.sqrt(sum(np.sum(g * g) for g in self.grads)))

    @property
    def conditions(self) -> Array:
        """Condition number of A, one for each independent system."""
        sigma = np.atleast_2d(np.linalg.svd(self.matrix, compute_uv=False))
        return sigma.max(-1) / sigma.min(-1)

    @property
    def condition(self) -> float:
        """Condition number of A as one block-diagonal system."""
        sigma = np.linalg.svd(self.matrix, compute_uv=False)
        return float(sigma.max() / sigma.min())


def solve(a: Array, b: Array) -> Array:
    """x = a⁻¹ b with residuals in extended precision, so that x is exact to about the last digit of float64."""
    x = np.linalg.solve(a, b)
    for _ in range(3):
        residual = b - a.astype(np.longdouble) @ x
        x = x + np.linalg.solve(a, residual.astype(np.float64))
    return x


def standardise(x: Array) -> Array:
    """(x − mean)/std by column."""
    return (x - x.mean(0)) / x.std(0)


def split(x: Array, y: Array, n: int, seed: int) -> Data:
    """Permute the rows by a seeded permutation; the first n are for training, the others for validation."""
    order = np.random.RandomState(seed).permutation(len(x))
    x, y = x[order], y[order]
    return {"x": x[:n], "y": y[:n], "xv": x[n:], "yv": y[n:]}


def diabetes(seed: int = 0) -> Data:
    """The diabetes data: 221 training and 221 validation rows, features and target standardised."""
    raw = load_diabetes()
    return split(standardise(raw.data), standardise(raw.target), 221, seed)


def breast_cancer(seed: int = 0) -> Data:
    """The breast-cancer data: 285 training and 284 validation rows, features standardised, labels 0 and 1."""
    raw = load_breast_cancer()
    return split(standardise(raw.data), raw.target.astype(np.float64), 285, seed)


def sigmoid(z: Array) -> Array:
    """1/(1 + e^−z) without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * z))


def log_loss(x: Array, y: Array, w: Array) -> float:
    """Mean logistic loss of labels 0 and 1."""
    return float(np.mean(np.logaddexp(0.0, x @ w) - y * (x @ w)))


def log_loss_grad(x: Array, y: Array, w: Array) -> Array:
    """Gradient of `log_loss`."""
    return x.T @ (sigmoid(x @ w) - y) / len(y)


def log_loss_hessian(x: Array, w: Array) -> Array:
    """Hessian of `log_loss`."""
    p = sigmoid(x @ w)
    return (x.T * (p * (1.0 - p))) @ x / len(x)


def logistic_fit(x: Array, y: Array, penalty: Array) -> Array:
    """argmin of log_loss + ½Σ penaltyⱼ wⱼ² by Newton's method with step halving, to a relative step of 1e-14."""

    def loss(w: Array) -> float:
        return log_loss(x, y, w) + 0.5 * float(penalty @ (w * w))

    w = np.zeros(x.shape[1])
    for _ in range(100):
        step = np.linalg.solve(log_loss_hessian(x, w) + np.diag(penalty), log_loss_grad(x, y, w) + penalty * w)
        while loss(w - step) > loss(w) * (1.0 + 1e-13):
            step = step / 2.0
        w = w - step
        if np.linalg.norm(step) <= 1e-14 * np.linalg.norm(w):
            break
    return w


def ridge(theta: Array | None = None, seed: int = 0) -> Oracle:
    """‖Xw−y‖²/2n + ½Σe^{θⱼ}wⱼ² / ‖Xᵥw−yᵥ‖²/2m; default θ = −2."""
    theta = np.full(10, -2.0) if theta is None else theta
    d = diabetes(seed)
    a = d["x"].T @ d["x"] / len(d["x"]) + np.diag(np.exp(theta))
    w = solve(a, d["x"].T @ d["y"] / len(d["x"]))
    r = d["xv"] @ w - d["yv"]
    q = solve(a, d["xv"].T @ r / len(r))
    return Oracle(d, (theta,), w, r @ r / (2 * len(r)), (-np.exp(theta) * w * q,), a, q)


def logistic(theta: Array | None = None, seed: int = 0) -> Oracle:
    """Mean log-loss + ½Σe^{θⱼ}wⱼ² / mean log-loss; default θ = −3."""
    theta = np.full(30, -3.0) if theta is None else theta
    d = breast_cancer(seed)
    w = logistic_fit(d["x"], d["y"], np.exp(theta))
    a = log_loss_hessian(d["x"], w) + np.diag(np.exp(theta))
    q = solve(a, log_loss_grad(d["xv"], d["yv"], w))
    return Oracle(d, (theta,), w, log_loss(d["xv"], d["yv"], w), (-np.exp(theta) * w * q,), a, q)


def biased(lam: Array | None = None, seed: int = 0) -> Oracle:
    """½‖Xw−y‖² + 5‖w−λ‖² / ½‖Xᵥw−yᵥ‖²; default λ = 0."""
    lam = np.zeros(10) if lam is None else lam
    d = diabetes(seed)
    a = d["x"].T @ d["x"] + 10.0 * np.eye(10)
    w = solve(a, d["x"].T @ d["y"] + 10.0 * lam)
    r = d["xv"] @ w - d["yv"]
    v = solve(a, d["xv"].T @ r)
    return Oracle(d, (lam,), w, 0.5 * r @ r, (10.0 * v,), a, v)


def biased_optimum(seed: int = 0) -> Oracle:
    """`biased` at its best λ: each w is w*(λ) for some λ, so w minimises validation, and λ = (Aw − Xᵀy)/10."""
    d = diabetes(seed)
    w = solve(d["xv"].T @ d["xv"], d["xv"].T @ d["yv"])
    return biased(w + d["x"].T @ (d["x"] @ w - d["y"]) / 10.0, seed)


def quadratic_data(kappa: float, seed: int = 0) -> Data:
    """A = Q diag(logspace(−log₁₀κ, 0, 50)) Qᵀ, made symmetric to the last bit; Q, B, c, t are drawn in this order."""
    rng = np.random.RandomState(seed)
    q = np.linalg.qr(rng.randn(50, 50)).Q
    a = (q * np.logspace(-np.log10(kappa), 0.0, 50)) @ q.T
    return {"a": (a + a.T) / 2.0, "b": rng.randn(50, 8), "c": rng.randn(50), "t": rng.randn(50)}


def quadratic(kappa: float, lam: Array | None = None, seed: int = 0) -> Oracle:
    """½wᵀAw − wᵀ(Bλ+c) / ½‖w−t‖² + .05‖λ‖²; default RandomState(1).randn(8), because DESIGN's row has no λ."""
    lam = np.random.RandomState(1).randn(8) if lam is None else lam
    d = quadratic_data(kappa, seed)
    w = solve(d["a"], d["b"] @ lam + d["c"])
    v = solve(d["a"], w - d["t"])
    f = 0.5 * np.sum((w - d["t"]) ** 2) + 0.05 * lam @ lam
    return Oracle(d, (lam,), w, float(f), (d["b"].T @ v + 0.1 * lam,), d["a"], v)


def quadratic_optimum(kappa: float, seed: int = 0) -> Oracle:
    """`quadratic` at its best λ, from the normal equations of ½‖A⁻¹Bλ + A⁻¹c − t‖² + .05‖λ‖²."""
    d = quadratic_data(kappa, seed)
    m, w0 = solve(d["a"], d["b"]), solve(d["a"], d["c"])
    return quadratic(kappa, solve(m.T @ m + 0.1 * np.eye(8), m.T @ (d["t"] - w0)), seed)


def contraction(q: float, lam: Array | None = None, seed: int = 0) -> Oracle:
    """w = Mw + Bλ + c with ‖M‖₂ = q / ½‖w−t‖²; M, B, c, t are drawn in this order; default λ = 0."""
    lam = np.zeros(8) if lam is None else lam
    rng = np.random.RandomState(seed)
    m = rng.randn(50, 50)
    d = {"m": m * (q / np.linalg.norm(m, 2)), "b": rng.randn(50, 8), "c": rng.randn(50), "t": rng.randn(50)}
    a = np.eye(50) - d["m"]
    w = solve(a, d["b"] @ lam + d["c"])
    v = solve(a.T, w - d["t"])
    return Oracle(d, (lam,), w, 0.5 * float(np.sum((w - d["t"]) ** 2)), (d["b"].T @ v,), a, v)


def equilibrium_data(seed: int = 0) -> Data:
    """The first 64 digits, divided by 16; W, U, C and b are drawn in this order, but b = 0 for seed 0."""
    raw = load_digits()
    rng = np.random.RandomState(seed)
    w = rng.randn(20, 20)
    hparams = [w * (0.9 / np.linalg.norm(w, 2)), 0.1 * rng.randn(20, 64), np.zeros(20)]
    c = 0.5 * rng.randn(10, 20)
    if seed:
        hparams[2] = 0.1 * rng.randn(20)
    return {"x": raw.data[:64] / 16.0, "y": raw.target[:64], "c": c, "hparams": tuple(hparams)}


def equilibrium_solution(x: Array, w: Array, u: Array, b: Array) -> Array:
    """z = tanh(zWᵀ + xUᵀ + b): 100 Picard steps, then Newton's method sample by sample."""
    drive, z = x @ u.T + b, np.zeros((len(x), len(b)))
    for _ in range(100):
        z = np.tanh(z @ w.T + drive)
    for _ in range(5):
        phi = np.tanh(z @ w.T + drive)
        jacobian = np.eye(len(b)) - (1.0 - phi**2)[:, :, None] * w
        z = z + np.linalg.solve(jacobian, (phi - z)[:, :, None])[:, :, 0]
    return z


def equilibrium(w: Array | None = None, u: Array | None = None, b: Array | None = None, seed: int = 0) -> Oracle:
    """z = tanh(zWᵀ + xUᵀ + b) / mean softmax cross-entropy of zCᵀ / (W, U, b); A is one 20×20 block a sample."""
    d = equilibrium_data(seed)
    w, u, b = (given if given is not None else own for given, own in zip((w, u, b), d["hparams"], strict=True))
    z = equilibrium_solution(d["x"], w, u, b)
    logits = z @ d["c"].T
    log_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    f = -np.mean(log_p[np.arange(64), d["y"]])
    outer_grad = (np.exp(log_p) - np.eye(10)[d["y"]]) @ d["c"] / 64.0
    slope = 1.0 - z**2
    a = np.eye(20) - slope[:, :, None] * w
    v = np.linalg.solve(a.transpose(0, 2, 1), outer_grad[:, :, None])[:, :, 0]
    s = v * slope
    return Oracle(d, (w, u, b), z, float(f), (s.T @ z, s.T @ d["x"], s.sum(0)), a, v)


def elastic_net(a: Array | None = None, seed: int = 0) -> Oracle:
    """‖Xw−y‖²/2n + e^{a₁}‖w‖₁ + ½e^{a₂}‖w‖² / ‖Xᵥw−yᵥ‖²/2m; default (log .1, log .05); A is that of w's support."""
    a = np.log([0.1, 0.05]) if a is None else a
    d = diabetes(seed)
    (l1, l2), n = np.exp(a), len(d["x"])
    h, xy = d["x"].T @ d["x"] / n + l2 * np.eye(10), d["x"].T @ d["y"] / n
    size, w = 1.0 / np.linalg.norm(h, 2), np.zeros(10)
    for _ in range(3000):
        u = w - size * (h @ w - xy)
        w = np.sign(u) * np.maximum(np.abs(u) - size * l1, 0.0)
    on, sign = w != 0.0, np.sign(w)
    matrix = h[np.ix_(on, on)]
    w[on] = solve(matrix, xy[on] - l1 * sign[on])
    r = d["xv"] @ w - d["yv"]
    q = np.zeros(10)
    q[on] = solve(matrix, d["xv"][:, on].T @ r / len(r))
    return Oracle(d, (a,), w, r @ r / (2 * len(r)), (np.array([-l1 * sign @ q, -l2 * w @ q]),), matrix, q)


def heavy_ball_data(seed: int = 0) -> Data:
    """Eigenvalues linspace(.1, 1, 10) of the quadratic, and the start: ones for seed 0, random for other seeds."""
    start = np.ones(10) if seed == 0 else np.random.RandomState(seed).randn(10)
    return {"h": np.linspace(0.1, 1.0, 10), "start": start, "steps": 30}


def heavy_ball(a: Array | None = None, seed: int = 0) -> Oracle:
    """30 steps v ← μv + h∘w, w ← w − ηv / ½‖w₃₀‖² / λ = (log η, logit μ), default (log .3, 0); ∇f by forward tangents.

    There is no linear system: `matrix` is diag(h), and `adjoint` is ∇E(w₃₀) = w₃₀.
    """
    a = np.array([np.log(0.3), 0.0]) if a is None else a
    d = heavy_ball_data(seed)
    eta, mu, h = np.exp(a[0]), sigmoid(a[1]), d["h"]
    w, v = d["start"], np.zeros(10)
    dw, dv = np.zeros((10, 2)), np.zeros((10, 2))
    for _ in range(d["steps"]):
        dv = mu * dv + np.outer(v, [0.0, mu * (1.0 - mu)]) + h[:, None] * dw
        v = mu * v + h * w
        dw = dw - eta * dv - np.outer(v, [eta, 0.0])
        w = w - eta * v
    return Oracle(d, (a,), w, 0.5 * float(w @ w), (dw.T @ w,), np.diag(h), w)


def hypertorch_data(seed: int = 0) -> Data:
    """1000×20 normal x, y = [x·w_oracle + .1 noise > 0]; the same random stream draws the split, as in the notebook."""
    from sklearn.model_selection import train_test_split

    rng = np.random.RandomState(1 + seed)
    w_oracle, x = rng.randn(20), rng.randn(1000, 20)
    y = (x @ w_oracle + 0.1 * rng.randn(1000) > 0.0).astype(np.float64)
    x, xv, y, yv = train_test_split(x, y, test_size=0.5, random_state=rng)
    return {"x": x, "y": y, "xv": xv, "yv": yv}


def hypertorch(lam: Array | None = None, seed: int = 0) -> Oracle:
    """HyperTorch's example with its inner problem solved: mean log-loss + ½Σλⱼwⱼ² / mean log-loss; default λ = 1."""
    lam = np.ones(20) if lam is None else lam
    d = hypertorch_data(seed)
    w = logistic_fit(d["x"], d["y"], lam)
    a = log_loss_hessian(d["x"], w) + np.diag(lam)
    q = solve(a, log_loss_grad(d["xv"], d["yv"], w))
    return Oracle(d, (lam,), w, log_loss(d["xv"], d["yv"], w), (-w * q,), a, q)


@dataclass(frozen=True)
class HyperTorchRun:
    """HyperTorch's published run: validation loss and ‖approximate ∇f‖ before each outer update, and the last λ."""

    data: Data
    losses: Array
    grad_norms: Array
    hparams: Array
    params: Array
    grad: Array


def hypertorch_reverse(d: Data, lam: Array, steps: int = 100, last: int = 10) -> tuple[float, Array, Array]:
    """f, ∇f through the last steps alone, and w, after `steps` gradient steps of size .1 from zero."""
    path = [np.zeros(20)]
    for _ in range(steps):
        path.append(path[-1] - 0.1 * (log_loss_grad(d["x"], d["y"], path[-1]) + lam * path[-1]))
    alpha, grad = log_loss_grad(d["xv"], d["yv"], path[-1]), np.zeros(20)
    for w in path[-2 : -2 - last : -1]:
        grad = grad - 0.1 * w * alpha
        alpha = alpha - 0.1 * (log_loss_hessian(d["x"], w) @ alpha + lam * alpha)
    return log_loss(d["xv"], d["yv"], path[-1]), grad, path[-1]


def hypertorch_logistic(outer_steps: int = 1000) -> HyperTorchRun:
    """HyperTorch's notebook in NumPy: λ from ones, SGD with lr 1 and momentum .9, clamp at 1e-8 after each update."""
    d, lam, momentum = hypertorch_data(), np.ones(20), np.zeros(20)
    losses, norms = [], []
    for t in range(outer_steps + 1):
        loss, grad, w = hypertorch_reverse(d, lam)
        losses.append(loss)
        norms.append(float(np.linalg.norm(grad)))
        if t < outer_steps:
            momentum = 0.9 * momentum + grad
            lam = np.maximum(lam - momentum, 1e-8)
    return HyperTorchRun(d, np.array(losses), np.array(norms), lam, w, grad)


def hypertorch_optimum() -> Oracle:
    """The exact problem at its best λ ≥ 1e-8 (L-BFGS-B on log λ ≤ 10; starts from 1 to 1e-5 end at the same value)."""
    from scipy.optimize import minimize

    def value_and_grad(log_lam: Array) -> tuple[float, Array]:
        oracle = hypertorch(np.exp(log_lam))
        return oracle.value, np.exp(log_lam) * oracle.grads[0]

    options = {"maxiter": 1000, "ftol": 1e-15, "gtol": 1e-9}
    bounds = [(np.log(1e-8), 10.0)] * 20
    best = minimize(value_and_grad, np.zeros(20), jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    return hypertorch(np.exp(best.x))


def random_direction(oracle: Oracle, seed: int = 0) -> tuple[Array, ...]:
    """A direction in λ of unit length."""
    rng = np.random.default_rng(seed)
    draws = [rng.standard_normal(h.shape) for h in oracle.hparams]
    length = np.sqrt(sum(np.sum(u * u) for u in draws))
    return tuple(u / length for u in draws)


def derivative_along(
    oracle: Callable[..., Oracle], direction: tuple[Array, ...], step: float = 5e-3
) -> tuple[float, tuple[Array, ...]]:
    """⟨∇f, u⟩ and ∇²f u, by eighth-order central differences of the oracle's f and of its ∇f."""
    hparams = oracle().hparams
    value, grads = 0.0, [np.zeros_like(h) for h in hparams]
    for k, weight in ((1, 4 / 5), (2, -1 / 5), (3, 4 / 105), (4, -1 / 280)):
        for side in (k, -k):
            o = oracle(*(h + side * step * u for h, u in zip(hparams, direction, strict=True)))
            scale = np.sign(side) * weight / step
            value += scale * o.value
            grads = [total + scale * g for total, g in zip(grads, o.grads, strict=True)]
    return value, tuple(grads)
