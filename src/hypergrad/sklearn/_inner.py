"""A linear estimator of scikit-learn as the solver of the inner problems, whose coef_ is used as the solution."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.base import clone
from sklearn.linear_model import Ridge, RidgeClassifier
from sklearn.utils.validation import has_fit_parameter
from torch import Tensor

from ._folds import Folds


class UserEstimator:
    """Fits the user's estimator on features divided by √a, whose strengths are all 1.

    Args:
        y: labels [n] of a classifier, or targets [n, T].

    Raises: TypeError for an estimator without a parameter `alpha` or `C` for the strength.
    """

    def __init__(self, estimator: Any, X: Any, y: np.ndarray, folds: Folds, fit_intercept: bool, classifier: bool):
        self.estimator: Any = clone(estimator)
        self.X, self.y, self.folds, self.classifier = X, y, folds, classifier
        known = self.estimator.get_params()
        self.strength = next((name for name in ("alpha", "C") if name in known), "")
        if not self.strength or "fit_intercept" not in known:
            raise TypeError(
                f"estimator={estimator!r} must have the parameters `fit_intercept` and `alpha` or `C`: pass a linear "
                f"model of scikit-learn such as Ridge or LogisticRegression"
            )
        self.estimator.set_params(fit_intercept=fit_intercept)

    def _fit(self, fold: int, a: np.ndarray, target: int) -> Any:
        rows = self.folds.rows(fold, "train").numpy()
        weights = self.folds.train[fold, rows].numpy() * len(rows)
        sums = self.strength == "C" or isinstance(self.estimator, (Ridge, RidgeClassifier))
        value = (1 / len(rows) if self.strength == "C" else len(rows)) if sums else 1.0
        x, scale = self.X[rows], 1 / np.sqrt(a)
        x = x.multiply(scale).tocsr() if hasattr(x, "multiply") else x * scale
        y = self.y[rows] if self.classifier else self.y[rows, target]
        more = {}
        if not np.allclose(weights, 1.0, rtol=1e-12):
            if not has_fit_parameter(self.estimator, "sample_weight"):
                raise TypeError(f"estimator={self.estimator!r} has no sample_weight, but the rows are weighted")
            more["sample_weight"] = weights
        solver: Any = clone(self.estimator)
        return solver.set_params(**{self.strength: value}).fit(x, y, **more)

    def regression(self, strengths: Tensor, targets: Tensor) -> Tensor:
        """w [F, T, d]."""
        w = torch.zeros(self.folds.number, len(targets), self.X.shape[1], dtype=torch.float64)
        for fold in range(self.folds.number):
            for number, target in enumerate(targets.tolist()):
                a = strengths[min(number, len(strengths) - 1)].numpy()
                w[fold, number] = torch.from_numpy(np.ravel(self._fit(fold, a, target).coef_) / np.sqrt(a))
        return w

    def classification(self, strengths: Tensor, targets: Tensor) -> Tensor:
        """W [F, d + 1, C]."""
        if len(strengths) > 1:
            raise ValueError(
                "estimator= needs one strength for each feature, and this penalty has separate ones for each class"
            )
        each, a = [], strengths[0].numpy()
        for fold in range(self.folds.number):
            fitted = self._fit(fold, a, 0)
            intercept = np.broadcast_to(fitted.intercept_, len(fitted.coef_))
            if len(intercept) > 1:
                intercept = intercept - intercept.mean()
            each.append(np.vstack([fitted.coef_.T / np.sqrt(a)[:, None], intercept]))
        return torch.from_numpy(np.stack(each).astype(float))
