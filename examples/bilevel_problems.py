"""The four problems of benchmark_bilevel for several seeds at once, and a sampler of blocks of rows.

params and hparams have a leading axis of seeds, rows are [seeds, rows of a block], and a loss is [seeds]. The gradient
of the sum of the losses then holds the gradient of each seed. So, if an algorithm is linear in the gradients, one
tracker runs all seeds, each on its own trajectory.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from scipy.optimize import minimize
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

import hypergrad as hg
from examples.datasets import covtype, ijcnn1, mnist


class Blocks:
    """Endless iterator over blocks of consecutive rows of data: each block once per epoch, in a new order.

    `rows` [seeds, rows] lists the rows of data block by block, in another order of blocks for each seed, so a number
    that all seeds draw is another block for each. The last block may share rows with the one before it.
    """

    def __init__(self, count: int, size: int, seeds: list[int]):
        self.size = size = min(size, count)
        starts = torch.arange(0, count, size).clamp(max=count - size)
        draws = [torch.Generator().manual_seed(seed) for seed in seeds]
        mixed = torch.stack([starts[torch.randperm(len(starts), generator=draw)] for draw in draws])
        self.rows = (mixed[:, :, None] + torch.arange(size)).flatten(1)
        self.number, self.draw = len(starts), torch.Generator().manual_seed(count)
        self.order: list[int] = []
        self.position = 0

    def __iter__(self) -> Iterator[tuple[int, slice]]:
        return self

    def __next__(self) -> tuple[int, slice]:
        """The number of a block, and its columns in `rows`."""
        if self.position == len(self.order):
            self.order, self.position = torch.randperm(self.number, generator=self.draw).tolist(), 0
        number = self.order[self.position]
        self.position += 1
        return number, slice(number * self.size, (number + 1) * self.size)

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order, "position": self.position, "random": self.draw.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order, self.position = state["order"], state["position"]
        self.draw.set_state(state["random"])


Rows: TypeAlias = "Tensor | slice"  # [seeds, rows], or the same for all seeds
ALL = slice(None)


def split(x: Any, y: Any, test: float, draw: Any, train: float | None = None) -> list[np.ndarray]:
    """Split into two parts: x of the first, x of the second, y of the first, y of the second."""
    parts = train_test_split(x, y, test_size=test, train_size=train, random_state=draw)
    return [np.asarray(part) for part in parts]


class Problem(ABC):
    """Inner and outer loss, the start, and measurements.

    Attributes:
        data: the name of the data.
        sizes: rows of the inner and of the outer loss.
        metrics: keys of the result of `measure`.
    """

    data: str
    sizes: tuple[int, int]
    metrics: tuple[str, ...]

    @abstractmethod
    def start(self) -> tuple[Tensor, Tensor]:
        """w and λ without the axis of seeds: all seeds have the same start, as in the suite."""

    @abstractmethod
    def inner_loss(self, w: Tensor, lam: Tensor, rows: Rows) -> Tensor: ...

    @abstractmethod
    def outer_loss(self, w: Tensor, lam: Tensor, rows: Rows) -> Tensor: ...

    def arranged(self, inner: Tensor, outer: Tensor) -> "Problem | None":
        """The problem with rows in these orders [seeds, rows], so that a block is a slice; None if it is too large."""
        return None

    @abstractmethod
    def measure(self, w: Tensor, lam: Tensor) -> dict[str, list[float]]:
        """The values of each metric for all seeds; NaN for a diverged seed."""


class Value(NamedTuple):
    """h(λ) = f(w*(λ), λ), its gradient, w*, and the per-sample evaluations that they cost."""

    h: float
    gradient: Tensor
    w: Tensor
    evaluations: int


class ValueProblem(Problem):
    """A problem whose inner problem is solved to rounding level, so that h and ∇h can be measured."""

    metrics = ("h − h*", "‖∇h‖²")
    bounds: tuple[float, float] | None = None
    _best: float | None = None

    @abstractmethod
    def value(self, lam: Tensor, w: Tensor) -> Value:
        """h and its gradient at the λ of one seed; the inner solver starts at w."""

    @abstractmethod
    def optimum(self) -> float:
        """h*."""

    @property
    def best(self) -> float:
        if self._best is None:
            self._best = self.optimum()
        return self._best

    def measure(self, w: Tensor, lam: Tensor) -> dict[str, list[float]]:
        finite = (w.isfinite() & (w.abs() < 1e100)).all(1) & (lam.abs() < 500).all(1)
        values = [self.value(lam[i], w[i]) if ok else None for i, ok in enumerate(finite.tolist())]
        off = [torch.nan if value is None else value.h - self.best for value in values]
        norms = [torch.nan if value is None else value.gradient.square().sum().item() for value in values]
        return dict(zip(self.metrics, (off, norms), strict=True))


class Simulated(ValueProblem):
    """g and f are means of ½ (aᵢ·w + bᵢ·λ − cᵢ)², random quadratics of rank one.

    The eigenvalues of E aaᵀ are in [.1, 1]; b is such a vector plus a linear map of a, times .1 in g.
    """

    def __init__(self, sizes: tuple[int, int] = (32768, 1024), dims: tuple[int, int] = (100, 10)):
        draw = torch.Generator().manual_seed(2442)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64)

        def rows(count: int, width: int) -> Tensor:
            basis, _ = torch.linalg.qr(normal(width, width))
            return normal(count, width) * torch.linspace(0.1, 1, width).double().sqrt() @ basis.T

        self.data, self.sizes, self.dims = "random quadratics", sizes, dims
        mixed = normal(*dims) / dims[0] ** 0.5
        self.parts = []
        for count, cross in zip(sizes, (0.1, 1.0), strict=True):
            a = rows(count, dims[0])
            b = cross * (rows(count, dims[1]) + a @ mixed)
            self.parts.append((torch.cat([a, b], 1), normal(count)))
        (x, c), _ = self.parts
        moments = x.T @ x / sizes[0]
        self.hessian, self.cross = moments[: dims[0], : dims[0]], moments[: dims[0], dims[0] :]
        self.linear = x.T[: dims[0]] @ c / sizes[0]

    def arranged(self, inner: Tensor, outer: Tensor) -> Problem:
        made = copy(self)
        made.parts = [(x[rows], c[rows]) for (x, c), rows in zip(self.parts, (inner, outer), strict=True)]
        return made

    def start(self) -> tuple[Tensor, Tensor]:
        return torch.zeros(self.dims[0], dtype=torch.float64), torch.full((self.dims[1],), -2.0, dtype=torch.float64)

    def _loss(self, part: int, w: Tensor, lam: Tensor, rows: Rows) -> Tensor:
        x, c = self.parts[part]
        off = (x[..., rows, :] @ torch.cat([w, lam], 1).unsqueeze(2)).squeeze(2) - c[..., rows]
        return off.square().mean(1) / 2

    def inner_loss(self, w: Tensor, lam: Tensor, rows: Rows) -> Tensor:
        return self._loss(0, w, lam, rows)

    def outer_loss(self, w: Tensor, lam: Tensor, rows: Rows) -> Tensor:
        return self._loss(1, w, lam, rows)

    def value(self, lam: Tensor, w: Tensor) -> Value:
        """Closed form with w*(λ) = H⁻¹(linear − cross λ)."""
        x, c = self.parts[1]
        slope = -torch.linalg.solve(self.hessian, self.cross)
        w = torch.linalg.solve(self.hessian, self.linear) + slope @ lam
        off = x @ torch.cat([w, lam]) - c
        total = x[:, : len(w)] @ slope + x[:, len(w) :]
        (n, m), d = self.sizes, len(w)
        return Value(off.square().mean().item() / 2, total.T @ off / m, w, n * (d + 2) + m)

    def optimum(self) -> float:
        w, zero = (torch.zeros(dim, dtype=torch.float64) for dim in self.dims)
        basis = torch.eye(self.dims[1], dtype=torch.float64)
        first = self.value(zero, w).gradient
        hessian = torch.stack([self.value(each, w).gradient - first for each in basis])
        return self.value(torch.linalg.solve(hessian, -first), w).h


class Logistic(ValueProblem):
    """ijcnn1: logistic regression with a penalty ½ exp(λₖ) wₖ² for each weight, and its loss on validation data."""

    bounds = (-25.0, 8.0)

    def __init__(self, folder: Path | None):
        if folder is None:
            x, y = load_breast_cancer(return_X_y=True)
            x, xv, y, yv = split(x, 2.0 * np.asarray(y) - 1, 0.5, 2442)
            scaler = StandardScaler().fit(x)
            x, xv = scaler.transform(x), scaler.transform(xv)
        else:
            x, y, xv, yv = ijcnn1(folder)
        self.data = "scikit-learn's breast_cancer" if folder is None else "ijcnn1"
        # ℓ(x·w, y) = log(1 + exp(−y x·w)), so x is multiplied by the label.
        self.x, self.xv = (torch.tensor(part * labels[:, None]) for part, labels in ((x, y), (xv, yv)))
        self.sizes = len(self.x), len(self.xv)
        self.factor: Tensor | None = None  # Cholesky factor of a Hessian at a previous point

    def arranged(self, inner: Tensor, outer: Tensor) -> Problem:
        made = copy(self)
        made.x, made.xv = self.x[inner], self.xv[outer]
        return made

    def start(self) -> tuple[Tensor, Tensor]:
        """w is normally distributed, exp(λ) uniformly in (0, 1)."""
        draw, width = np.random.default_rng(1), self.x.shape[1]
        w = torch.from_numpy(draw.standard_normal(width))
        return w, torch.from_numpy(draw.random(width)).log()

    def _loss(self, x: Tensor, w: Tensor, rows: Rows) -> Tensor:
        return -logsigmoid((x[..., rows, :] @ w.unsqueeze(2)).squeeze(2)).mean(1)

    def inner_loss(self, w: Tensor, lam: Tensor, rows: Rows) -> Tensor:
        return self._loss(self.x, w, rows) + (lam.exp() * w**2).sum(1) / 2

    def outer_loss(self, w: Tensor, lam: Tensor, rows: Rows) -> Tensor:
        return self._loss(self.xv, w, rows)

    def solve(self, w: Tensor, lam: Tensor, tolerance: float = 1e-11) -> tuple[Tensor, int]:
        """w*(λ) by Newton's method, and its per-sample evaluations; a Hessian counts as d products.

        The Hessian is kept, for further steps and other λ, until the gradient decreases by less than 70 % in a step.
        """
        x, penalty, count, last = self.x, lam.exp(), len(self.x), torch.inf

        def at_point(w: Tensor) -> tuple[float, Tensor, Tensor]:
            scores = x @ w
            p = torch.sigmoid(-scores)
            value = -logsigmoid(scores).mean() + (penalty * w**2).sum() / 2
            return value.item(), penalty * w - p @ x / count, p

        value, gradient, p = at_point(w)
        evaluations = count
        for _ in range(100):
            norm = gradient.norm().item()
            if norm <= tolerance:
                break
            factor = self.factor
            if factor is None or norm > 0.3 * last:
                hessian = (x.T * (p * (1 - p))) @ x / count + penalty.diag()
                self.factor = factor = torch.linalg.cholesky(hessian)
                evaluations += count * len(w)
            step = torch.cholesky_solve(gradient.unsqueeze(1), factor).squeeze(1)
            size, falls = 1.0, float(gradient @ step)
            while True:
                new = at_point(w - size * step)
                evaluations += count
                if new[0] <= value - 1e-4 * size * falls + 1e-14 or size < 1e-6:
                    break
                size, self.factor = size / 2, None
            w, last, (value, gradient, p) = w - size * step, norm, new
            last = last if size == 1 else 0.0
        return w, evaluations

    def value(self, lam: Tensor, w: Tensor) -> Value:
        """By implicit.grad, with the kept Hessian as the preconditioner of CG."""
        w, evaluations = self.solve(w, lam)
        n, m = self.sizes

        def precondition(r: Tensor) -> Tensor:
            return r if self.factor is None else torch.cholesky_solve(r.unsqueeze(1), self.factor).squeeze(1)

        result = hg.implicit.grad(
            lambda w, lam: self.outer_loss(w[None], lam[None], ALL).sum(),
            inner_loss=lambda w, lam: self.inner_loss(w[None], lam[None], ALL).sum(),
            params=w,
            hparams=lam.detach().clone().requires_grad_(),
            solver=hg.solvers.CG(rtol=1e-10, preconditioner=precondition),
        )
        evaluations += n * (2 + int(result.solution.steps)) + m
        return Value(result.outer_value.item(), result.grads, w, evaluations)

    def optimum(self) -> float:
        """The lowest h that L-BFGS-B finds within the bounds from λ = −5."""
        width = self.x.shape[1]
        return min(h for _, _, h, _ in descend(self, torch.zeros(width).double(), torch.full((width,), -5.0).double()))


def descend(problem: ValueProblem, w: Tensor, lam: Tensor, most: int = 600) -> list[tuple[int, float, float, float]]:
    """Minimise h by L-BFGS-B from λ; each inner solver starts at the last w.

    Returns a tuple for each hypergradient: evaluations and CPU seconds so far, h, and ‖∇h‖².
    """
    seen: list[tuple[int, float, float, float]] = []
    start, spent = time.process_time(), 0

    def both(lam: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal w, spent
        found = problem.value(torch.from_numpy(lam.copy()), w)
        w, spent = found.w, spent + found.evaluations
        seen.append((spent, time.process_time() - start, found.h, found.gradient.square().sum().item()))
        return found.h, found.gradient.numpy()

    bounds = None if problem.bounds is None else [problem.bounds] * len(lam)
    options = {"maxiter": most, "ftol": 1e-16, "gtol": 1e-10}
    minimize(both, lam.numpy(), jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    return seen


class Softmax(Problem):
    """Softmax regression without bias on standardised features; its metric is the error on test data."""

    metrics = ("test error",)

    def __init__(self, data: str, parts: list[tuple[np.ndarray, np.ndarray]]):
        """parts: features and labels for training, validation and test."""
        scaler = StandardScaler().fit(parts[0][0])
        x, xv, xt = (torch.tensor(scaler.transform(each), dtype=torch.float32) for each, _ in parts)
        self.y, self.yv, self.yt = (torch.tensor(labels, dtype=torch.long) for _, labels in parts)
        self.x, self.xv, self.xt, self.data, self.sizes = x, xv, xt, data, (len(x), len(xv))
        self.classes = int(self.y.max()) + 1

    def start(self) -> tuple[Tensor, Tensor]:
        return torch.zeros(self.x.shape[1], self.classes), torch.full((self.tuned,), -2.0)

    @property
    @abstractmethod
    def tuned(self) -> int:
        """The number of hyperparameters."""

    def losses(self, x: Tensor, y: Tensor, w: Tensor, rows: Rows) -> Tensor:
        """The loss of each row: [seeds, rows]."""
        scores = x[rows] @ w
        labels = y[rows].expand(scores.shape[:2])
        return cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)

    def outer_loss(self, w: Tensor, lam: Tensor, rows: Rows) -> Tensor:
        return self.losses(self.xv, self.yv, w, rows).mean(1)

    def measure(self, w: Tensor, lam: Tensor) -> dict[str, list[float]]:
        errors = [((self.xt @ each).argmax(1) != self.yt).double().mean().item() for each in w]
        finite = (w.flatten(1).isfinite().all(1) & lam.isfinite().all(1)).tolist()
        return {"test error": [error if ok else torch.nan for error, ok in zip(errors, finite, strict=True)]}


class Covtype(Softmax):
    """covtype: a penalty ½ exp(λₖ) ‖wₖ‖² for each class."""

    def __init__(self, folder: Path | None):
        x, y = load_digits(return_X_y=True) if folder is None else covtype(folder)
        draw = np.random.RandomState(2442)
        x, xt, y, yt = split(x, y, 0.2, draw)
        x, xv, y, yv = split(x, y, 0.2, draw)
        name = "scikit-learn's digits" if folder is None else "covtype"
        super().__init__(name, [(x, y), (xv, yv), (xt, yt)])

    @property
    def tuned(self) -> int:
        return self.classes

    def inner_loss(self, w: Tensor, lam: Tensor, rows: Rows) -> Tensor:
        return self.losses(self.x, self.y, w, rows).mean(1) + (lam.exp() * w.square().sum(1)).sum(1) / 2


class Cleaning(Softmax):
    """MNIST: half of the training labels are drawn at random; a weight σ(λᵢ) for each training image, and .2 ‖w‖²."""

    metrics = ("test error", "AUC")

    def __init__(self, folder: Path | None, part: float = 0.5):
        name, (x, y), test = mnist(folder)
        draw = np.random.RandomState(32)
        train, validation = min(20000, len(y) // 2), min(5000, len(y) // 8)
        if test is None:
            x, xt, y, yt = split(x, y, 3 / 8, draw)
        else:
            xt, yt = test
        x, xv, y, yv = split(x, y, validation, draw, train)
        clean, changed = y.copy(), draw.rand(len(y)) < part
        y[changed] = draw.randint(0, 10, changed.sum())
        self.wrong = y != clean
        super().__init__(name, [(x, y), (xv, yv), (xt, yt)])

    @property
    def tuned(self) -> int:
        return len(self.y)

    def inner_loss(self, w: Tensor, lam: Tensor, rows: Rows) -> Tensor:
        weights = lam[:, rows] if isinstance(rows, slice) else lam.gather(1, rows)
        return (weights.sigmoid() * self.losses(self.x, self.y, w, rows)).mean(1) + 0.2 * w.square().sum((1, 2))

    def measure(self, w: Tensor, lam: Tensor) -> dict[str, list[float]]:
        """The test error, and the area under the ROC curve of −λ as a detector of wrong labels."""
        found = super().measure(w, lam)
        finite = lam.isfinite().all(1).tolist()
        areas = [
            float(roc_auc_score(self.wrong, -each.numpy())) if ok else torch.nan
            for each, ok in zip(lam, finite, strict=True)
        ]
        return found | {"AUC": areas}


def problem(name: str, folder: Path | None, fast: bool) -> Problem:
    if name == "simulated":
        return Simulated((512, 256), (20, 5)) if fast else Simulated()
    return {"ijcnn1": Logistic, "covtype": Covtype, "mnist": Cleaning}[name](folder)
