"""Ill-conditioned problems, and sequences of 50 outer steps on them with exact hypergradients by NumPy and SciPy.

The inner solutions and the hypergradients come from dense Cholesky factors, or from Newton's method with the
preconditioned conjugate gradients below on a SciPy matrix. No column uses any of these.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse
import torch
from scipy.special import expit
from torch import Tensor

from .problems import Problem, logistic_inner, logistic_outer

Array = np.ndarray
OUTER_STEPS = 50


class _Product(torch.autograd.Function):
    """X w for a sparse X, differentiable to any order in both modes; the backward pass uses the stored transpose."""

    generate_vmap_rule = False

    @staticmethod
    def forward(matrix: Sparse, w: Tensor) -> Tensor:
        return matrix.csr @ w

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.matrix = inputs[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, ctx.matrix.T @ grad

    @staticmethod
    def jvp(ctx: Any, _: None, tangent: Tensor) -> Tensor:
        return ctx.matrix @ tangent

    @staticmethod
    def vmap(info: Any, in_dims: Any, matrix: Sparse, w: Tensor) -> tuple[Tensor, int]:
        return matrix.csr @ w.movedim(in_dims[1], 1), 1  # all columns in one pass over X


class Sparse:
    """A constant sparse matrix X with a stored transpose. torch's own backward pass of X @ w transposes X each time."""

    def __init__(self, matrix: Any, transposed: Sparse | None = None):
        self.scipy = scipy.sparse.csr_array(matrix)
        ends, columns = (torch.from_numpy(x.astype("int32")) for x in (self.scipy.indptr, self.scipy.indices))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            values, shape = torch.from_numpy(self.scipy.data), self.scipy.shape
            self.csr = torch.sparse_csr_tensor(ends, columns, values, shape, check_invariants=True)
        self.T = Sparse(self.scipy.T, self) if transposed is None else transposed

    def __matmul__(self, w: Tensor) -> Tensor:
        return _Product.apply(self, w)  # type: ignore[return-value]

    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """Row indices, column indices and values, ordered by rows."""
        coordinates = self.scipy.tocoo()
        return tuple(torch.from_numpy(each) for each in (*coordinates.coords, coordinates.data))  # type: ignore[return-value]

    def is_floating_point(self) -> bool:
        """False, so that `Problem.to` leaves it in float64."""
        return False


# The formulas of `logistic_inner`; the second name lets peers recognise a sparse X and compute X w in their own way.
def sparse_inner(params: Sequence[Tensor], hparams: Sequence[Tensor], data: dict[str, Any]) -> Tensor:
    return logistic_inner(params, hparams, data)


def quadratic_inner(params: Sequence[Tensor], hparams: Sequence[Tensor], data: dict[str, Tensor]) -> Tensor:
    """½ wᵀAw − wᵀ(Bλ + c)."""
    (w,), (h,) = params, hparams
    return 0.5 * w @ (data["a"] @ w) - w @ (data["b"] @ h + data["c"])


def quadratic_outer(params: Sequence[Tensor], hparams: Sequence[Tensor], data: dict[str, Tensor]) -> Tensor:
    """½‖w − t‖² + .05‖λ‖²."""
    return 0.5 * (params[0] - data["t"]).square().sum() + 0.05 * hparams[0].square().sum()


class Quadratic:
    """The quadratic of the reference problems in any size: w* = A⁻¹(Bλ + c), ∇f = .1λ + BᵀA⁻¹(w − t)."""

    inner, outer = staticmethod(quadratic_inner), staticmethod(quadratic_outer)
    rate = 0.1

    def __init__(self, size: int, condition: float, hyper: int = 8):
        draw = np.random.RandomState(0)
        q = np.linalg.qr(draw.randn(size, size))[0]
        self.a = (q * np.logspace(-np.log10(condition), 0, size)) @ q.T
        self.a = (self.a + self.a.T) / 2
        self.b, self.c, self.t = draw.randn(size, hyper), draw.randn(size), draw.randn(size)
        self.start = np.zeros(hyper)
        self.factor = scipy.linalg.cho_factor(self.a)

    @property
    def data(self) -> dict[str, Any]:
        return {k: torch.from_numpy(getattr(self, k)) for k in "abct"}

    def solve(self, h: Array, w: Array | None) -> Array:
        return scipy.linalg.cho_solve(self.factor, self.b @ h + self.c)

    def hypergradient(self, h: Array, w: Array) -> Array:
        return 0.1 * h + self.b.T @ scipy.linalg.cho_solve(self.factor, w - self.t)


class Logistic:
    """Logistic regression, a penalty per feature, X dense or sparse: A = XᵀDX/n + diag e^θ, ∇f = −e^θ ∘ w ∘ A⁻¹∇E."""

    outer = staticmethod(logistic_outer)
    rate = 0.07

    def __init__(self, x: Any, y: Array, rows: int, start: Array):
        self.x, self.y, self.xv, self.yv, self.start = x[:rows], y[:rows], x[rows:], y[rows:], start
        self.sparse = scipy.sparse.issparse(x)
        self.inner = sparse_inner if self.sparse else logistic_inner

    @cached_property
    def data(self) -> dict[str, Any]:
        matrices = {"x": self.x, "xv": self.xv}
        kind = Sparse if self.sparse else torch.from_numpy
        return {k: kind(m) for k, m in matrices.items()} | {k: torch.from_numpy(getattr(self, k)) for k in ("y", "yv")}

    def inverse(self, w: Array, h: Array, b: Array) -> Array:
        s = expit(self.x @ w)
        d, penalty = s * (1 - s) / len(self.y), np.exp(h)
        if not self.sparse:
            factor = scipy.linalg.cho_factor((self.x.T * d) @ self.x + np.diag(penalty))
            return scipy.linalg.cho_solve(factor, b)
        transposed = self.x.T.tocsr()
        diagonal = self.x.power(2).T @ d + penalty
        return conjugate_gradients(lambda v: transposed @ (d * (self.x @ v)) + penalty * v, b, diagonal)

    def solve(self, h: Array, w: Array | None) -> Array:
        w = np.zeros(len(h)) if w is None else w
        for _ in range(50):
            gradient = self.x.T @ (expit(self.x @ w) - self.y) / len(self.y) + np.exp(h) * w
            w = w - self.inverse(w, h, gradient)
            if np.linalg.norm(gradient) < 1e-11:
                break
        return w

    def hypergradient(self, h: Array, w: Array) -> Array:
        b = self.xv.T @ (expit(self.xv @ w) - self.yv) / len(self.yv)
        return -np.exp(h) * w * self.inverse(w, h, b)


def group_losses(source: Any, count: int) -> tuple[list[Callable[..., Tensor]], Callable[[Array, Array], Array]]:
    """`count` outer losses of a problem, and their exact hypergradients at (λ, w): [count, hyperparameters].

    Those of the quadratic differ in t; those of logistic regression are means over disjoint parts of validation rows.
    """
    if isinstance(source, Quadratic):
        targets = np.random.RandomState(1).randn(count, len(source.t))
        given = [{"t": torch.from_numpy(t)} for t in targets]
        replaced = [copy(source) for _ in targets]
        for each, t in zip(replaced, targets, strict=True):
            each.t = t
    else:
        parts = np.array_split(np.arange(len(source.yv)), count)
        kind = Sparse if source.sparse else torch.from_numpy
        given = [{"xv": kind(source.xv[i]), "yv": torch.from_numpy(source.yv[i])} for i in parts]
        replaced = [copy(source) for _ in parts]
        for each, i in zip(replaced, parts, strict=True):
            each.xv, each.yv = source.xv[i], source.yv[i]

    def loss(data: dict[str, Any]) -> Callable[..., Tensor]:
        return lambda params, hparams, _: source.outer(params, hparams, data)

    def truth(h: Array, w: Array) -> Array:
        return np.stack([each.hypergradient(h, w) for each in replaced])

    return [loss(data) for data in given], truth


def conjugate_gradients(apply: Callable[[Array], Array], b: Array, diagonal: Array, rtol: float = 1e-13) -> Array:
    """A⁻¹ b to a relative residual of `rtol`, preconditioned by the diagonal of A."""
    x, r = np.zeros_like(b), b
    z = r / diagonal
    p, rz = z, r @ z
    for _ in range(10_000):
        if np.linalg.norm(r) <= rtol * np.linalg.norm(b):
            break
        ap = apply(p)
        alpha = rz / (p @ ap)
        x, r = x + alpha * p, r - alpha * ap
        z = r / diagonal
        p, rz = z + (r @ z) / rz * p, r @ z
    return x


def weak_logistic(rows: int = 600, size: int = 200, scales: float = -1.5, decay: float = -9.0) -> Logistic:
    """Features with scales from 1 down to 10^scales, labels that are not separable, little regularisation."""
    draw = np.random.RandomState(0)
    x = draw.randn(2 * rows, size) * np.logspace(0, scales, size)
    x = x @ np.linalg.qr(draw.randn(size, size))[0]
    y = (x @ draw.randn(size) / 3 + draw.logistic(size=2 * rows) > 0).astype(float)
    return Logistic(x, y, rows, np.full(size, decay))


def sparse_text(rows: int = 1500, words: int = 2000, decay: float = -9.0) -> Logistic:
    """Documents on two topics over a Zipf-distributed vocabulary: logarithmic term frequencies, rows of norm 1."""
    draw = np.random.RandomState(0)
    frequency = 1 / np.arange(1, words + 1)
    topics = [frequency * np.exp(0.5 * draw.randn(words)) for _ in range(2)]
    total = 2 * rows
    y, lengths = draw.randint(2, size=total), np.maximum(draw.lognormal(4.2, 0.6, total), 20).astype(int)
    columns = [draw.choice(words, size=n, p=topics[t] / topics[t].sum()) for n, t in zip(lengths, y, strict=True)]
    ends = np.concatenate([[0], np.cumsum(lengths)])
    x = scipy.sparse.csr_array((np.ones(ends[-1]), np.concatenate(columns), ends), shape=(total, words))
    x.sum_duplicates()
    x.data = 1 + np.log(x.data)
    norms = np.sqrt(x.power(2).sum(1))
    x = scipy.sparse.csr_array(x.multiply(1 / norms[:, None]))
    flipped = draw.rand(total) < 0.1
    return Logistic(x, np.where(flipped, 1 - y, y).astype(float), rows, np.full(words, decay))


@dataclass(frozen=True)
class Step:
    """One outer step: the problem at λ_t with its exact inner solution, and the exact hypergradient."""

    problem: Problem
    truth: Array


def problem_at(name: str, source: Any, h: Array, w: Array, **options: Any) -> Problem:
    params, hparams = [torch.from_numpy(w)], [torch.from_numpy(h).requires_grad_()]
    return Problem(name, params, hparams, source.data, source.inner, source.outer, **options)


def row(name: str, step_size: float, **options: Any) -> Problem:
    """The first outer step of a sequence, as a row."""
    source = SOURCES[name]()
    w = source.solve(source.start, None)
    return problem_at(name, source, source.start, w, step_size=step_size, **options)


def sequence(name: str, steps: int = OUTER_STEPS) -> Iterator[Step]:
    """Outer steps by Adam on the exact hypergradient: the same λ_t for every method."""
    return outer_steps(name, SOURCES[name](), steps)


def quick_sequence() -> Iterator[Step]:
    """A small sequence of the same kind, for counts."""
    return outer_steps("quick", weak_logistic(100, 30), 6)


def outer_steps(name: str, source: Any, steps: int) -> Iterator[Step]:
    h, w, m, v = source.start, None, 0.0, 0.0
    template = None
    for t in range(1, steps + 1):
        w = source.solve(h, w)
        g = source.hypergradient(h, w)
        if template is None:
            template = problem_at(name, source, h, w, step_size=1.0)
        yield Step(replace(template, params=[torch.from_numpy(w)], hparams=[torch.from_numpy(h).requires_grad_()]), g)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        h = h - source.rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-12)


SOURCES: dict[str, Callable[[], Any]] = {
    "quadratic": lambda: Quadratic(150, 1e5),
    "logistic, weak": weak_logistic,
    "sparse text": sparse_text,
}
