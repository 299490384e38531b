"""Elastic nets with many strengths: coordinate descent by scikit-learn, then an exact solution on the support.

    w = argmin ½ Σᵢ sᵢ (xᵢᵀw − yᵢ)² + Σⱼ aⱼ (ρ |wⱼ| + (1 − ρ) wⱼ² / 2)

Given the support S of the solution and its signs σ, all equations are linear. The solution and the adjoint share one
factorisation:

    A = X_SᵀX_S + (1 − ρ) diag a_S,    A w_S = X_Sᵀy − ρ a_S σ,    A v = ∇E(w)_S
    ∂E/∂ log aⱼ = −aⱼ (ρ σⱼ + (1 − ρ) wⱼ) vⱼ

A feature of strength aⱼ is equivalent to the feature divided by aⱼ with strength 1, which coordinate descent solves.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import scipy.sparse
import torch
from scipy.linalg import cho_factor, cho_solve
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Lasso
from torch import Tensor

from ._folds import Folds
from ._ridge import Loss

TOLERANCE, ROUNDS = 1e-6, 10


class Elastic:
    """The folds of an elastic net with T targets.

    Args:
        X: [n, d], a NumPy array, at least approximately centred, or a scipy.sparse matrix.
        y: [n, T].
        ratio: ρ, l1_ratio of scikit-learn.
        estimator: the user's solver of the lasso, an estimator with its settings; None for scikit-learn's Lasso.
    """

    def __init__(
        self, X: Any, y: np.ndarray, folds: Folds, loss: Loss, fit_intercept: bool, ratio: float, estimator: Any = None
    ):
        self.X, self.y, self.folds, self.loss, self.ratio = X, y, folds, loss, ratio
        self.parts = [_Part(X, y, folds.train[fold].numpy(), fit_intercept) for fold in range(folds.number)]
        self.rows = [folds.rows(fold).numpy() for fold in range(folds.number)]
        self.solver: Any = Lasso(alpha=1.0, tol=TOLERANCE, max_iter=10_000) if estimator is None else clone(estimator)
        self.given = estimator is not None
        self.w = np.zeros((folds.number, y.shape[1], X.shape[1]))

    def largest(self) -> Tensor:
        """α_max of each target, the smallest strength for which every coefficient of every fold is zero."""
        return torch.from_numpy(np.max([np.abs(part.q).max(1) for part in self.parts], 0) / self.ratio)

    def evaluate(
        self, strengths: Tensor, targets: Tensor, gradient: bool = True, tighter: bool | str = False
    ) -> tuple[Tensor, Tensor]:
        """Losses [F, T] and slopes like strengths, [T, d] or [1, d]."""
        losses = torch.zeros(len(self.parts), len(targets), dtype=torch.float64)
        slopes = np.zeros((len(targets), self.X.shape[1]))
        for fold, (part, rows) in enumerate(zip(self.parts, self.rows, strict=True)):
            weights, x = self.folds.valid[fold, rows], self.X[rows]
            for number, target in enumerate(targets.tolist()):
                a = strengths[min(number, len(strengths) - 1)].numpy()
                support, w, factor = self._solution(fold, target, a)
                intercept = part.offset[target] - part.mean[support] @ w
                prediction = torch.from_numpy(x[:, support] @ w + intercept)[:, None]
                loss, slope = self.loss(prediction, torch.from_numpy(self.y[rows][:, [target]]))
                losses[fold, number] = weights @ loss[:, 0]
                share = float(self.folds.share[fold])
                if not gradient or not len(support) or not share:
                    continue
                pull = (weights * slope[:, 0]).numpy()
                q = x[:, support].T @ pull - part.mean[support] * pull.sum()
                if factor is None:
                    factor = self._factor(part, support, a)
                v = cho_solve(factor, q)
                direction = self.ratio * np.sign(w) + (1 - self.ratio) * w
                slopes[number, support] -= share * a[support] * direction * v
        return losses, torch.from_numpy(slopes)

    def coefficients(self, strengths: Tensor) -> tuple[Tensor, Tensor]:
        """w [T, d] and intercepts [T] of the first fold."""
        w = np.zeros((self.y.shape[1], self.X.shape[1]))
        for target, row in enumerate(w):
            support, values, _ = self._solution(0, target, strengths[min(target, len(strengths) - 1)].numpy())
            row[support] = values
        return torch.from_numpy(w), torch.from_numpy(self.parts[0].offset - w @ self.parts[0].mean)

    def residual(self, strengths: Tensor, which: Tensor) -> Tensor:
        """The violation of the optimality conditions, relative to XᵀSy: 0 at a solution."""
        found = []
        for fold, part in enumerate(self.parts):
            for number, target in enumerate(which.tolist()):
                a = strengths[min(number, len(strengths) - 1)].numpy()
                support, w, _ = self._solution(fold, target, a)
                distance = self._distance(part, target, a, support, w)
                found.append(distance / max(np.abs(part.q[target]).max(), 1e-300))
        return torch.tensor(found)

    def _distance(self, part: _Part, target: int, a: np.ndarray, support: np.ndarray, w: np.ndarray) -> float:
        gradient = part.gradient(target, support, w)
        bound = self.ratio * a
        off = np.maximum(np.abs(gradient) - bound, 0.0)
        off[support] = gradient[support] + bound[support] * np.sign(w) + (1 - self.ratio) * a[support] * w
        return float(np.abs(off).max())

    def _solution(self, fold: int, target: int, a: np.ndarray) -> tuple[np.ndarray, np.ndarray, Any]:
        """The support, w on it, and the factor of A, None if it was not computed."""
        part, before = self.parts[fold], self.w[fold, target]
        if self.given:
            w = self._descend(part, target, a, before)
            support = w.nonzero()[0]
            self.w[fold, target] = w
            return support, w[support], None
        w = before
        for attempt in range(3):  # try the support of the last solution, then supports found by coordinate descent
            if attempt or not w.any():
                w = self._descend(part, target, a, w, TOLERANCE / 100 if attempt > 1 else TOLERANCE)
            exact = self._exact(part, target, a, w)
            if exact is not None:
                self.w[fold, target] = 0.0
                self.w[fold, target, exact[0]] = exact[1]
                return exact
        self.w[fold, target] = w
        support = w.nonzero()[0]
        return support, w[support], None

    def _exact(
        self, part: _Part, target: int, a: np.ndarray, start: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, Any] | None:
        """The solution from the support and signs of `start`, corrected at most ROUNDS times; None if that fails."""
        sign = np.sign(start)
        bound = self.ratio * a
        for _ in range(ROUNDS):
            support = sign.nonzero()[0]
            if len(support) >= part.rows and self.ratio == 1.0:
                return None
            factor = None
            w = np.zeros(0)
            if len(support):
                try:
                    factor = self._factor(part, support, a)
                except np.linalg.LinAlgError:
                    return None
                w = cho_solve(factor, part.q[target, support] - bound[support] * sign[support])
            wrong = np.sign(w) != sign[support]
            gradient = part.gradient(target, support, w)
            missing = np.abs(gradient) > bound * (1 + 1e-12) + 1e-15 * np.abs(part.q[target]).max()
            missing[support] = False
            if not wrong.any() and not missing.any():
                return support, w, factor
            sign[support[wrong]] = 0.0
            sign[missing] = -np.sign(gradient[missing])
        return None

    def _factor(self, part: _Part, support: np.ndarray, a: np.ndarray) -> Any:
        gram = part.gram(support)
        gram[np.diag_indices_from(gram)] += (1 - self.ratio) * a[support]
        return cho_factor(gram, lower=True)

    def _descend(
        self, part: _Part, target: int, a: np.ndarray, start: np.ndarray, tolerance: float = TOLERANCE
    ) -> np.ndarray:
        """Coordinate descent of scikit-learn on features divided by their strengths, with a row for each ridge term."""
        scale = self.ratio * a
        x, y, n = part.x, part.y[:, target], part.rows
        sparse = scipy.sparse.issparse(x)
        divided: Any = scipy.sparse.csc_array(x.multiply(1 / scale)) if sparse else x / scale
        if self.ratio < 1:
            ridge = np.sqrt((1 - self.ratio) * a) / scale
            more: Any = scipy.sparse.diags_array(ridge) if sparse else np.diag(ridge)
            join: Any = scipy.sparse.vstack if sparse else np.vstack
            divided, y = join([divided, more]), np.append(y, np.zeros(len(a)))
            n += len(a)
        solver = self.solver
        solver.set_params(alpha=1.0 / n, fit_intercept=False, **({} if self.given else {"tol": tolerance}))
        if "warm_start" in solver.get_params():
            solver.set_params(warm_start=True)
            solver.coef_ = start * scale
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the remaining error is measured and reported
            solver.fit(divided.tocsc() if sparse else np.asfortranarray(divided), y)
        return np.ravel(solver.coef_) / scale


class _Part:
    """S½ (X − x̄) and S½ (y − ȳ) of one fold. A sparse X is not centred, and its intercept is 0.

    Attributes:
        x, y: rows scaled by √s.
        mean, offset: x̄ [d] and ȳ [T].
        q: (X − x̄)ᵀS(y − ȳ), [T, d].
    """

    def __init__(self, X: Any, y: np.ndarray, weights: np.ndarray, fit_intercept: bool):
        rows = weights.nonzero()[0]
        s, self.rows = weights[rows], len(rows)
        root = np.sqrt(s)[:, None]
        x, y = X[rows], y[rows]
        self.mean = np.ravel(s @ x) * fit_intercept
        self.offset = s @ y * fit_intercept
        self.y = root * (y - self.offset)
        self.x = scipy.sparse.csc_array(x.multiply(root)) if scipy.sparse.issparse(x) else root * (x - self.mean)
        self.q = (self.x.T @ self.y).T

    def gram(self, support: np.ndarray) -> np.ndarray:
        x = self.x[:, support]
        gram = x.T @ x
        return np.asarray(gram.toarray() if scipy.sparse.issparse(gram) else gram)

    def gradient(self, target: int, support: np.ndarray, w: np.ndarray) -> np.ndarray:
        """(X − x̄)ᵀS((X − x̄)w − (y − ȳ))."""
        return np.ravel(self.x.T @ (self.x[:, support] @ w)) - self.q[target]
