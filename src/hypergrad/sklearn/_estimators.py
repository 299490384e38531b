"""The estimators RidgeHG, LogisticRegressionHG and ElasticNetHG."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import validate_data
from torch import Tensor

from ._elastic import Elastic
from ._folds import Folds, Labels
from ._glm import Linear, logistic, squared
from ._inner import UserEstimator
from ._ridge import Ridge
from ._tuned import Data, Tuned, on_cpu, row_losses

CLOSED = 3_000  # a ridge regression is factorised if it has at most so many rows or so many features


class _Regressor(RegressorMixin, Tuned):
    """An estimator for one or more real targets."""

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def _read(self, X: Any, y: Any, sample_weight: Any, reset: bool) -> Data:
        self._check_arguments()
        X, y = validate_data(
            self,
            X,
            y,
            accept_sparse="csr",
            dtype=[np.float64, np.float32],
            multi_output=True,
            y_numeric=True,
            ensure_min_samples=2,
            reset=reset,
        )
        y = np.asarray(y, dtype=np.float64)
        self._single = y.ndim == 1
        weights = self._weights(sample_weight, X)
        return Data(X, y.reshape(len(y), -1), weights, self.fit_intercept)

    @on_cpu
    def fit(self, X: Any, y: Any, sample_weight: Any = None, groups: Any = None) -> Any:
        """Tune the strengths by cross-validation and fit on all rows.

        Args:
            X: [n, d], dense or sparse.
            y: [n] or [n, T].
            sample_weight: [n], ≥ 0; weights both the inner and the outer loss.
            groups: [n], for a `cv` that keeps groups of samples together.
        """
        data = self._read(X, y, sample_weight, True)
        w, b = self._fit(data, groups, None)
        dtype = np.float32 if data.given.dtype == np.float32 else np.float64
        b = b.numpy() - w.numpy() @ data.mean if self.fit_intercept else np.zeros(len(b))
        self.coef_ = (w[0] if self._single else w).numpy().astype(dtype)
        self.intercept_ = dtype(b[0]) if self._single else b.astype(dtype)
        return self

    @on_cpu
    def cv_loss(self, X: Any, y: Any, alpha: Any, sample_weight: Any = None, groups: Any = None) -> Any:
        """The CV loss at strengths `alpha`, and its hypergradient with respect to log alpha; no fit is needed.

        Args:
            alpha: positive, [d] or [T, d], like alpha_.

        Returns:
            The loss (one for each target), and the gradient in alpha's shape.
        """
        return self._loss_at(self._read(X, y, sample_weight, True), alpha, groups, None)

    def predict(self, X: Any) -> np.ndarray:
        """Predictions in y's shape, [n] or [n, T]."""
        return self._decision(X)


class RidgeHG(_Regressor):
    """Ridge regression with a strength for each target and each feature or group of features, tuned by hypergradients.

        w(α) = argmin Σᵢ (xᵢᵀw + b − yᵢ)² + Σⱼ αⱼ wⱼ²,    min_α  CV loss(w(α)) + shrinkage of log α to a common value

    The search starts from the best single strength, minimises the objective by L-BFGS, and returns the best point that
    was scored. Each of K folds and T targets needs one factorisation per step, of size min(n, d), for the solution and
    the adjoint. If both n and d are above 3,000, CG replaces the factorisation.

    Args:
        penalty: which coefficients share a strength: "feature" (none), "group" (columns named group__feature), "class"
            (all of a target), or an array of labels: of shape [d], with separate strengths for each target, or [d, T]
            over all coefficients, where equal labels share a strength across targets.
        alphas: single strengths, of which the best is the start; by default 15 over seven decades.
        cv: number of folds, a splitter, or pairs of training and validation rows.
        scoring: the outer loss: "squared_error", or a function of tensors (prediction, y) that returns losses like y.
        estimator: a linear estimator of scikit-learn to solve the inner problems, such as Ridge(solver="lsqr").
        shrinkage: ρ ≥ 0, the precision of a normal prior of each log α around the log of the best single strength; the
            CV loss of n samples is the likelihood. 0 uses the CV loss alone, a large ρ gives the single strength.
        early_stopping: leave the last split of cv out of the objective, and return the point with the least loss on it.
        max_iter: the largest number of steps of the search; 0 only tunes the single strength.
        fit_intercept: whether to fit b, which is not penalised.
        warm_start: start from the strengths of the last fit instead of single ones.
        progress: show a progress bar (tqdm).

    Attributes:
        alpha_: the strengths, in the units of `Ridge(alpha=)`, [d] or [T, d].
        start_alpha_: the best single strength (for each target).
        coef_, intercept_: fitted on all rows.
        cv_loss_path_: the CV loss at the start and after each step, [n_iter_ + 1] or [n_iter_ + 1, T].
        hypergradient_error_: relative distance of the last hypergradient from one whose systems were solved more
            accurately (for about ten targets, if there are more).
        n_iter_, stop_reason_: the number of steps, and why the search ended (for each target).

    Cost: K T (k³/3 + 2 n d) per step, k = min(n, d).

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> X = rng.normal(size=(200, 20))
        >>> y = X[:, :3].sum(1) + rng.normal(size=200)  # of 20 features 3 matter
        >>> model = RidgeHG(penalty=["first"] * 3 + ["rest"] * 17).fit(X, y)
        >>> bool(model.alpha_[3] > 5 * model.alpha_[0]), model.hypergradient_error_ < 1e-8
        (True, True)
    """

    def __init__(
        self,
        penalty: Any = "feature",
        *,
        alphas: Any = None,
        cv: Any = 5,
        scoring: Any = None,
        estimator: Any = None,
        shrinkage: float = 0.3,
        early_stopping: bool = False,
        max_iter: int = 100,
        fit_intercept: bool = True,
        warm_start: bool = False,
        progress: bool = False,
    ):
        self.penalty, self.alphas, self.cv, self.scoring, self.estimator = penalty, alphas, cv, scoring, estimator
        self.shrinkage, self.early_stopping, self.max_iter = shrinkage, early_stopping, max_iter
        self.fit_intercept, self.warm_start, self.progress = fit_intercept, warm_start, progress

    def _problem(self, data: Data, folds: Folds, labels: Labels) -> Any:
        loss, _ = row_losses(self.scoring, "squared_error", False)
        y = torch.from_numpy(data.y)
        given = None
        if self.estimator is not None:
            given = UserEstimator(self.estimator, data.X, data.y, folds, self.fit_intercept, False).regression
        if not data.sparse and min(data.X.shape) <= CLOSED:
            return Ridge(torch.from_numpy(data.X), y, folds, labels, loss, self.fit_intercept, given)
        if given is not None:
            raise ValueError(f"estimator= needs an X with at most {CLOSED} rows or features, not too large to be dense")
        X = data.X if data.sparse else torch.from_numpy(data.X)
        return Linear(X, y, folds, squared, loss, self.fit_intercept)


class ElasticNetHG(_Regressor):
    """Elastic net, or lasso, with a strength for each target and each feature or group, tuned by hypergradients.

        w(α) = argmin 1/2n Σᵢ (xᵢᵀw + b − yᵢ)² + Σⱼ αⱼ (ρ |wⱼ| + (1 − ρ) wⱼ²/2),    ρ = l1_ratio

    As `RidgeHG`, but scikit-learn's coordinate descent finds the supports, on which solution and adjoint are exact.
    Folds are solved one after another. A feature whose coefficient is zero in every fold has a hypergradient of zero.

    Args:
        penalty, alphas, cv, scoring, shrinkage, early_stopping, max_iter, fit_intercept, warm_start, progress: as in
            `RidgeHG`; `alphas` must lie below α_max, at which every coefficient is zero.
        estimator: instead of `Lasso()`, another solver of the lasso with its settings; its coef_ is used unchanged.
        l1_ratio: ρ in (0, 1]; 1 is the lasso.

    Attributes: as in `RidgeHG`; alpha_ is in the units of `ElasticNet(alpha=)`.

    Example:
        >>> from sklearn.datasets import load_diabetes
        >>> X, y = load_diabetes(return_X_y=True)
        >>> model = ElasticNetHG(l1_ratio=1.0).fit(X, y)
        >>> model.alpha_.shape, bool(model.cv_loss_path_[-1] < model.cv_loss_path_[0])
        ((10,), True)
    """

    def __init__(
        self,
        penalty: Any = "feature",
        *,
        l1_ratio: float = 0.5,
        alphas: Any = None,
        cv: Any = 5,
        scoring: Any = None,
        estimator: Any = None,
        shrinkage: float = 0.3,
        early_stopping: bool = False,
        max_iter: int = 100,
        fit_intercept: bool = True,
        warm_start: bool = False,
        progress: bool = False,
    ):
        self.penalty, self.alphas, self.cv, self.scoring, self.estimator = penalty, alphas, cv, scoring, estimator
        self.l1_ratio, self.shrinkage, self.early_stopping, self.max_iter = (
            l1_ratio,
            shrinkage,
            early_stopping,
            max_iter,
        )
        self.fit_intercept, self.warm_start, self.progress = fit_intercept, warm_start, progress

    def _check_arguments(self) -> None:
        super()._check_arguments()
        if not 0 < self.l1_ratio <= 1:
            raise ValueError(f"l1_ratio must lie in (0, 1], got {self.l1_ratio!r}: without an L1 term use RidgeHG")

    def _problem(self, data: Data, folds: Folds, labels: Labels) -> Any:
        if data.sparse and self.fit_intercept:
            raise ValueError(
                f"X is sparse with {data.X.shape[0]} × {data.X.shape[1]} entries, too many to centre: pass "
                f"fit_intercept=False and a centred y"
            )
        loss, _ = row_losses(self.scoring, "squared_error", False)
        return Elastic(data.X, data.y, folds, loss, self.fit_intercept, float(self.l1_ratio), self.estimator)

    def _unit(self, data: Data) -> float:
        return 1.0

    def _grid(self, problem: Any, outputs: int) -> Tensor:
        largest = problem.largest().clamp(min=1e-300)
        if self.alphas is not None and np.min(self.alphas) >= float(largest.max()):
            raise ValueError(
                f"all of alphas={self.alphas!r} are at least α_max = {float(largest.max()):.6g}, where every "
                f"coefficient is zero and no strength can be tuned: pass smaller ones"
            )
        return torch.logspace(-0.05, -4, 25, dtype=torch.float64)[:, None] * largest


class LogisticRegressionHG(ClassifierMixin, Tuned):
    """Logistic or softmax regression with a strength for each feature, group or class, tuned by hypergradients.

        w(α) = argmin Σᵢ log-loss(xᵢᵀw + b, yᵢ) + ½ Σⱼ αⱼ ‖wⱼ‖²,    min_α  CV loss(w(α)) + shrinkage of log α

    As `RidgeHG`, but Newton's method and CG solve the inner problems, on all folds in parallel. With more than a
    thousand coefficients, or a large sparse X, they work without factors and stop at a gradient of 1e-4 of the
    penalty's gradient, or of 1e-2 with more than 100,000 coefficients.

    Args:
        penalty, alphas, cv, shrinkage, early_stopping, max_iter, fit_intercept, warm_start, progress: as in `RidgeHG`,
            but the default shrinkage is 1. "class" is a strength for each class; labels [d, C] are over all
            coefficients of C classes.
        scoring: the outer loss: "log_loss", or a function of tensors (logits, y) that returns the losses [n]; logits
            are [n] with y in {0, 1}, or [n, C] with y the index of the class.
        estimator: a classifier of scikit-learn to solve the inner problems, such as LogisticRegression(tol=1e-8).

    Attributes: as in `RidgeHG`, and classes_; alpha_ is in the units of 1/C of `LogisticRegression(C=)`, [d] or [C, d].

    Example:
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> model = LogisticRegressionHG(cv=3).fit(X, y)
        >>> model.alpha_.shape, model.predict_proba(X).shape, model.score(X, y) > 0.95
        ((4,), (150, 3), True)
    """

    _joint, _default_scoring = True, "log_loss"

    def __init__(
        self,
        penalty: Any = "feature",
        *,
        alphas: Any = None,
        cv: Any = 5,
        scoring: Any = None,
        estimator: Any = None,
        shrinkage: float = 1.0,
        early_stopping: bool = False,
        max_iter: int = 100,
        fit_intercept: bool = True,
        warm_start: bool = False,
        progress: bool = False,
    ):
        self.penalty, self.alphas, self.cv, self.scoring, self.estimator = penalty, alphas, cv, scoring, estimator
        self.shrinkage, self.early_stopping, self.max_iter = shrinkage, early_stopping, max_iter
        self.fit_intercept, self.warm_start, self.progress = fit_intercept, warm_start, progress

    def _read(self, X: Any, y: Any, sample_weight: Any) -> tuple[Data, np.ndarray]:
        self._check_arguments()
        X, y = validate_data(self, X, y, accept_sparse="csr", dtype=[np.float64, np.float32], ensure_min_samples=2)
        check_classification_targets(y)
        weights = self._weights(sample_weight, X)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(np.unique(codes[weights > 0])) < 2:
            raise ValueError(
                f"y has one class only, {self.classes_[codes[weights > 0][0]]}, among samples of positive weight: a "
                f"classifier needs samples of at least two classes"
            )
        columns = codes[:, None].astype(float) if len(self.classes_) == 2 else np.eye(len(self.classes_))[codes]
        return Data(X, columns, weights, self.fit_intercept), y

    @on_cpu
    def fit(self, X: Any, y: Any, sample_weight: Any = None, groups: Any = None) -> LogisticRegressionHG:
        """Tune the strengths by cross-validation and fit on all rows.

        Args:
            X: [n, d], dense or sparse.
            y: [n], classes.
            sample_weight: [n], ≥ 0; weights both the inner and the outer loss.
            groups: [n], for a `cv` that keeps groups of samples together.
        """
        data, classes = self._read(X, y, sample_weight)
        w, b = self._fit(data, groups, classes)
        dtype = np.float32 if data.given.dtype == np.float32 else np.float64
        self.coef_ = w.numpy().astype(dtype)
        b = b.numpy() - w.numpy() @ data.mean if self.fit_intercept else np.zeros(len(b))
        self.intercept_ = b.astype(dtype)
        return self

    @on_cpu
    def cv_loss(self, X: Any, y: Any, alpha: Any, sample_weight: Any = None, groups: Any = None) -> Any:
        """The CV loss at strengths `alpha`, [d] or [C, d], and its hypergradient with respect to log alpha."""
        data, classes = self._read(X, y, sample_weight)
        return self._loss_at(data, alpha, groups, classes)

    def _problem(self, data: Data, folds: Folds, labels: Labels) -> Any:
        loss, _ = row_losses(self.scoring, "log_loss", True)
        given = None
        if self.estimator is not None:
            codes = data.y[:, 0] if data.y.shape[1] == 1 else data.y.argmax(1)
            given = UserEstimator(self.estimator, data.X, codes, folds, self.fit_intercept, True).classification
        X = data.X if data.sparse else torch.from_numpy(data.X)
        return Linear(X, torch.from_numpy(data.y), folds, logistic, loss, self.fit_intercept, given)

    def decision_function(self, X: Any) -> np.ndarray:
        """Logits: [n], of the second class, if there are two classes; otherwise [n, C]."""
        scores = self._decision(X)
        return scores[:, 0] if scores.shape[1] == 1 else scores

    def predict_proba(self, X: Any) -> np.ndarray:
        """[n, C]."""
        logits = torch.from_numpy(self.decision_function(X))
        if logits.ndim == 1:
            second = torch.sigmoid(logits)
            return torch.stack([1 - second, second], 1).numpy()
        return torch.softmax(logits, 1).numpy()

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """[n, C]."""
        return np.log(self.predict_proba(X))

    def predict(self, X: Any) -> np.ndarray:
        """[n], classes."""
        scores = self.decision_function(X)
        return self.classes_[(scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(1)]
