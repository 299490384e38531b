"""The rows: bilevel problems at an exact solution of the inner problem, and their hypergradients in float64.

Every row starts at a known inner solution, whose cost is not measured: the biased one by its choice of λ, the logistic
ones by Newton's method, the equilibrium by iteration. The true hypergradients use torch.func, which no column uses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, hessian, jvp, vjp

Loss = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
DENSE = 500  # parameters of the largest problem whose matrix A is formed


@dataclass(frozen=True)
class Problem:
    """min over λ of E(w*(λ), λ), at w = w*(λ): the minimiser of `inner` = g(·, λ), or the fixed point of Φ = `inner`.

    The map of a loss is w − step_size · ∇₁g. If `step_size` is None, `inner` is a map with a non-symmetric Jacobian.
    `steps` is K. For a `small` problem the time of a step is compared instead of the ratio to the floor and the memory.
    """

    name: str
    params: list[Tensor]
    hparams: list[Tensor]
    data: dict[str, Tensor]
    inner: Callable[..., Any]
    outer: Callable[..., Tensor]
    step_size: float | None
    steps: int = 20
    rounds: int = 15
    calls: int = 1  # calls in one sample of the clock
    small: bool = False

    def inner_loss(self, params: Sequence[Tensor], hparams: Sequence[Tensor]) -> Tensor:
        return self.inner(params, hparams, self.data)

    def outer_loss(self, params: Sequence[Tensor], hparams: Sequence[Tensor]) -> Tensor:
        return self.outer(params, hparams, self.data)

    def fp_map(self, params: Sequence[Tensor], hparams: Sequence[Tensor]) -> list[Tensor]:
        """The map, or one step of gradient descent, whose Jacobian is symmetric but not declared to be."""
        if self.step_size is None:
            return self.inner(params, hparams, self.data)
        with torch.enable_grad():
            grads = torch.autograd.grad(self.inner_loss(params, hparams), list(params), create_graph=True)
        return [w - self.step_size * g for w, g in zip(params, grads, strict=True)]

    def to(self, dtype: torch.dtype) -> Problem:
        return replace(
            self,
            params=[w.detach().to(dtype) for w in self.params],
            hparams=[h.detach().to(dtype).requires_grad_() for h in self.hparams],
            data={k: v.to(dtype) if v.is_floating_point() else v for k, v in self.data.items()},
        )

    @property
    def size(self) -> int:
        return sum(w.numel() for w in self.params)

    @cached_property
    def system(self) -> System:
        problem = self.to(torch.float64)
        return System(problem) if self.step_size is not None else MapSystem(problem)


class System:
    """The system A v = b of a problem in float64 on flat vectors, A = ∇²₁₁g, b = ∇₁E, and its estimates by K steps."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self.w = flat(problem.params)
        self.shapes = [w.shape for w in problem.params]
        self.hparams = [h.detach() for h in problem.hparams]
        self.gradient = grad(lambda w: problem.inner_loss(self.split(w), self.hparams))
        self.b = grad(lambda w: problem.outer_loss(self.split(w), self.hparams))(self.w)
        if len(self.w) <= DENSE:
            dense = hessian(lambda w: problem.inner_loss(self.split(w), self.hparams))(self.w)
            self.apply = lambda v: dense @ v
            self.solution = torch.linalg.solve(dense, self.b)
        else:
            self.apply = lambda v: jvp(self.gradient, (self.w,), (v,))[1]
            self.solution = self.cg(5000, 1e-10)
        self.truths: dict[str, Tensor] = {}
        self.unsolved = float(self.gradient(self.w).norm() * self.solution.norm() / self.b.norm() / self.w.norm())
        self.residual = float((self.b - self.apply(self.solution)).norm() / self.b.norm())

    def split(self, w: Tensor) -> list[Tensor]:
        return [part.view(s) for part, s in zip(w.split([s.numel() for s in self.shapes]), self.shapes, strict=True)]

    def cg(self, steps: int, rtol: float = 0.0) -> Tensor:
        """K steps of conjugate gradients on A v = b."""
        v, r = torch.zeros_like(self.b), self.b
        p = r
        for _ in range(steps):
            if r.norm() <= rtol * self.b.norm():
                break
            ap = self.apply(p)
            alpha = (r @ r) / (p @ ap)
            v, r, old = v + alpha * p, r - alpha * ap, r @ r
            p = r + (r @ r) / old * p
        return v

    def transposed(self, u: Tensor) -> Tensor:
        return self.apply(u)

    def normal_cg(self, steps: int) -> Tensor:
        """K steps of conjugate gradients on AᵀA v = Aᵀ b."""
        v, r = torch.zeros_like(self.b), self.transposed(self.b)
        p = r
        for _ in range(steps):
            ap = self.transposed(self.apply(p))
            alpha = (r @ r) / (p @ ap)
            v, r, old = v + alpha * p, r - alpha * ap, r @ r
            p = r + (r @ r) / old * p
        return v

    def fixed_point(self, steps: int) -> Tensor:
        """η Σ_{k<K} (I − ηA)ᵏ b."""
        v = torch.zeros_like(self.b)
        for _ in range(steps):
            v = v + self.problem.step_size * (self.b - self.apply(v))
        return v

    def hypergradient(self, v: Tensor) -> Tensor:
        """∇₂E − ∂₂(∇₁g)ᵀ v, flat."""

        def both(*hparams: Tensor) -> tuple[Tensor, Tensor]:
            inner = grad(lambda w: self.problem.inner_loss(self.split(w), list(hparams)))(self.w)
            return inner, self.problem.outer_loss(self.split(self.w), list(hparams))

        pull = vjp(both, *self.hparams)[1]
        return flat(pull((-v, torch.ones((), dtype=v.dtype))))

    def truth(self, kind: str) -> Tensor:
        """The hypergradient by an "exact" solve, or by K steps of "cg", "normal_cg" or "fixed_point", in float64."""
        if kind not in self.truths:
            v = self.solution if kind == "exact" else getattr(self, kind)(self.problem.steps)
            self.truths[kind] = self.hypergradient(v)
        return self.truths[kind]

    def error(self, grads: Sequence[Tensor], kind: str) -> float:
        """‖grads − truth‖ / ‖truth‖."""
        wanted = self.truth(kind)
        return float((flat(grads).double() - wanted).norm() / wanted.norm())


class MapSystem(System):
    """The system (I − ∂₁Φᵀ) v = ∇₁E of a problem whose inner problem is a map."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self.w = flat(problem.params)
        self.shapes = [w.shape for w in problem.params]
        self.hparams = [h.detach() for h in problem.hparams]
        self.b = grad(lambda w: problem.outer_loss(self.split(w), self.hparams))(self.w)
        image, self.pull, *_ = vjp(self.map, self.w)
        self.apply = lambda v: v - self.pull(v)[0]
        self.solution = self.fixed_point(1000)
        self.truths = {}
        size = float(self.solution.norm() / self.b.norm() / self.w.norm())
        self.unsolved = float((self.w - image).norm()) * size
        self.residual = float((self.b - self.apply(self.solution)).norm() / self.b.norm())

    def map(self, w: Tensor) -> Tensor:
        return flat_live(self.problem.fp_map(self.split(w), self.hparams))

    def transposed(self, u: Tensor) -> Tensor:
        """(I − ∂₁Φ) u."""
        return u - jvp(self.map, (self.w,), (u,))[1]

    def fixed_point(self, steps: int) -> Tensor:
        """Σ_{k<K} (∂₁Φᵀ)ᵏ b; stops early at rounding level."""
        v = torch.zeros_like(self.b)
        for _ in range(steps):
            v, old = self.pull(v)[0] + self.b, v
            if (v - old).norm() <= 1e-15 * v.norm():
                break
        return v

    def hypergradient(self, v: Tensor) -> Tensor:
        """∇₂E + ∂₂Φᵀ v, flat."""

        def both(*hparams: Tensor) -> tuple[Tensor, Tensor]:
            image = flat_live(self.problem.fp_map(self.split(self.w), list(hparams)))
            return image, self.problem.outer_loss(self.split(self.w), list(hparams))

        return flat(vjp(both, *self.hparams)[1]((v, torch.ones((), dtype=v.dtype))))


def flat_live(tensors: Sequence[Tensor]) -> Tensor:
    """`flat` without detaching."""
    return torch.cat([t.reshape(-1) for t in tensors])


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def logistic_inner(params: Sequence[Tensor], hparams: Sequence[Tensor], data: dict[str, Tensor]) -> Tensor:
    """Mean log-loss + ½ Σ e^{θⱼ} wⱼ²."""
    (w,), (theta,) = params, hparams
    return F.binary_cross_entropy_with_logits(data["x"] @ w, data["y"]) + 0.5 * (theta.exp() * w * w).sum()


def logistic_outer(params: Sequence[Tensor], hparams: Sequence[Tensor], data: dict[str, Tensor]) -> Tensor:
    return F.binary_cross_entropy_with_logits(data["xv"] @ params[0], data["yv"])


def logistic(name: str, rows: int, size: int, decay: float, step_size: float, scales: float, **options: Any) -> Problem:
    """Logistic regression with one penalty per feature; the scales of the columns fall from 1 to 10^scales."""
    draw = np.random.RandomState(0)
    oracle, x = draw.randn(size) / np.sqrt(size), draw.randn(rows + rows // 2, size) * np.logspace(0, scales, size)
    y = (x @ oracle + 0.1 * draw.randn(len(x)) > 0).astype(float)
    pieces = {"x": x[:rows], "y": y[:rows], "xv": x[rows:], "yv": y[rows:]}
    data = {k: torch.from_numpy(v) for k, v in pieces.items()}
    theta = torch.from_numpy(decay + 0.3 * draw.randn(size))
    w = torch.zeros(size, dtype=torch.float64)
    for _ in range(30):
        s = torch.sigmoid(data["x"] @ w)
        gradient = data["x"].T @ (s - data["y"]) / rows + theta.exp() * w
        curvature = (data["x"].T * (s * (1 - s))) @ data["x"] / rows + theta.exp().diag()
        w = w - torch.linalg.solve(curvature, gradient)
        if gradient.norm() < 1e-13:
            break
    return Problem(name, [w], [theta], data, logistic_inner, logistic_outer, step_size, **options).to(torch.float64)


def perceptron(params: Sequence[Tensor], x: Tensor) -> Tensor:
    *hidden, (weight, bias) = zip(params[::2], params[1::2], strict=True)
    for w, b in hidden:
        x = F.relu(F.linear(x, w, b))
    return F.linear(x, weight, bias)


def biased_inner(params: Sequence[Tensor], hparams: Sequence[Tensor], data: dict[str, Tensor], rho: float) -> Tensor:
    """Cross-entropy + ½ρ‖w − λ‖²."""
    bias = torch.stack([(w - h).square().sum() for w, h in zip(params, hparams, strict=True)]).sum()
    return F.cross_entropy(perceptron(params, data["x"]), data["y"]) + 0.5 * rho * bias


def biased_outer(params: Sequence[Tensor], hparams: Sequence[Tensor], data: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(perceptron(params, data["xv"]), data["yv"])


def biased_mlp(name: str, rows: int, widths: Sequence[int], rho: float, **options: Any) -> Problem:
    """A perceptron drawn towards λ. λ = w + ∇L(w) / ρ makes any w the exact solution."""
    draw = np.random.RandomState(0)
    params = []
    for fan_in, fan_out in pairwise(widths):
        params += [
            draw.randn(fan_out, fan_in) * np.sqrt(1 / (3 * fan_in)),
            draw.randn(fan_out) * np.sqrt(1 / (3 * fan_in)),
        ]
    teacher = draw.randn(widths[0], widths[-1])
    x = draw.randn(rows + rows // 2, widths[0])
    y = (x @ teacher).argmax(1)
    params = [torch.from_numpy(p) for p in params]
    pieces = {"x": x[:rows], "y": y[:rows], "xv": x[rows:], "yv": y[rows:]}
    data = {k: torch.from_numpy(v) for k, v in pieces.items()}
    slopes = grad(lambda w: F.cross_entropy(perceptron(w, data["x"]), data["y"]))(params)
    hparams = [w + slope / rho for w, slope in zip(params, slopes, strict=True)]
    return Problem(name, params, hparams, data, partial(biased_inner, rho=rho), biased_outer, **options).to(
        torch.float64
    )


def tanh_map(params: Sequence[Tensor], hparams: Sequence[Tensor], data: dict[str, Tensor]) -> list[Tensor]:
    """z ↦ tanh(zA + xB + c)."""
    (z,), (a, b, c, *_) = params, hparams
    return [torch.tanh(z @ a + data["x"] @ b + c)]


def tanh_outer(params: Sequence[Tensor], hparams: Sequence[Tensor], data: dict[str, Tensor]) -> Tensor:
    *_, weight, bias = hparams
    return F.cross_entropy(params[0] @ weight + bias, data["y"])


def equilibrium(name: str, rows: int, inputs: int, states: int, classes: int, norm: float, **options: Any) -> Problem:
    """z = tanh(zA + xB + c), logits zC + d; ‖A‖₂ = norm, and all of A, B, c, C, d are hyperparameters."""
    draw = np.random.RandomState(0)
    a, b = draw.randn(states, states), draw.randn(inputs, states) / np.sqrt(inputs)
    c, weight, bias = 0.1 * draw.randn(states), draw.randn(states, classes) / np.sqrt(states), 0.1 * draw.randn(classes)
    a *= norm / np.linalg.norm(a, 2)
    x, y = draw.randn(rows, inputs), draw.randint(classes, size=rows)
    hparams = [torch.from_numpy(h) for h in (a, b, c, weight, bias)]
    data = {"x": torch.from_numpy(x), "y": torch.from_numpy(y)}
    z, u = torch.zeros(rows, states, dtype=torch.float64), torch.from_numpy(x @ b + c)
    for _ in range(2000):
        z, old = torch.tanh(z @ hparams[0] + u), z
        if (z - old).norm() <= 1e-15 * z.norm():
            break
    return Problem(name, [z], hparams, data, tanh_map, tanh_outer, None, **options).to(torch.float64)


def rows() -> dict[str, Callable[[], Problem]]:
    """Every row of the full table, the ill-conditioned ones in float64, the others in float32, built when measured."""
    from . import illconditioned

    return {
        "mlp": lambda: biased_mlp("mlp", 2000, (784, 256, 256, 10), rho=0.2, step_size=1.5, rounds=7).to(torch.float32),
        "logistic": lambda: logistic("logistic", 10_000, 1000, -4.0, 7.0, 0.0, rounds=20).to(torch.float32),
        "equilibrium": lambda: equilibrium("equilibrium", 5000, 784, 200, 10, 0.95, rounds=8).to(torch.float32),
        "quadratic": lambda: illconditioned.row("quadratic", step_size=1.0, rounds=20, calls=3, small=True),
        "sparse text": lambda: illconditioned.row("sparse text", step_size=10.0, rounds=20, small=True),
        "tiny": lambda: logistic("tiny", 100, 20, -6.0, 30.0, -1.0, rounds=30, calls=5, small=True).to(torch.float32),
    }


def quick_rows() -> dict[str, Callable[[], Problem]]:
    """Small rows of the same kinds in float64, for counts."""
    return {
        "mlp": lambda: biased_mlp("mlp", 50, (12, 8, 8, 3), rho=1.0, step_size=1.0, steps=6),
        "tiny": lambda: logistic("tiny", 100, 20, -6.0, 30.0, -1.0, steps=6),
        "equilibrium": lambda: equilibrium("equilibrium", 12, 5, 4, 3, 0.7, steps=6),
    }


def wide() -> Problem:
    """A perceptron with few rows of data and many parameters, so that vectors of params' size dominate the memory."""
    return biased_mlp("wide", 4, (256, 256, 10), rho=2.0, step_size=1.0, steps=4).to(torch.float32)
