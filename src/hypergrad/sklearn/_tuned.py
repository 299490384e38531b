"""The base class of the three estimators: it reads arguments, starts and runs the search, and sets the attributes."""

from __future__ import annotations

import functools
import math
import numbers
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import scipy.sparse
import torch
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.extmath import safe_sparse_dot
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import Tensor

from .._options import progress_bar
from ._folds import Folds, Labels, make_folds, make_labels, whole
from ._search import Found, Objective, Point, search

CHECKED = 10  # number of targets whose hypergradients are computed again for hypergradient_error_
DENSE = 20_000_000  # a sparse X with at most so many entries, zeros included, is made dense
WRONG, ROUGH = 1e-2, 1e-4  # ‖∇g‖ / ‖∇g(0)‖ at the coefficients of a user's estimator: error above, warning above


def on_cpu(method: Callable[..., Any]) -> Callable[..., Any]:
    """Make the method create its tensors on the CPU, whatever torch.set_default_device says."""

    @functools.wraps(method)
    def called(*args: Any, **kwargs: Any) -> Any:
        with nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"):
            return method(*args, **kwargs)

    return called


class Data:
    """X and y in the form that problems need, weights, and the mean that was subtracted from a dense X."""

    def __init__(self, X: Any, y: np.ndarray, weights: np.ndarray, center: bool):
        self.sparse = scipy.sparse.issparse(X) and math.prod(X.shape) > DENSE
        self.y, self.weights, self.given = y, weights, X
        self.mean = np.zeros(X.shape[1])
        if self.sparse:
            self.X: Any = scipy.sparse.csr_array(X, dtype=np.float64)
            return
        dense = X.toarray() if scipy.sparse.issparse(X) else X
        dense = np.asarray(dense, dtype=np.float64)
        if center:
            self.mean = weights @ dense / weights.sum()
            dense = dense - self.mean
            flat = np.abs(dense).max(0) <= 1e-13 * np.abs(self.mean)  # constant columns, to rounding
            dense[:, flat] = 0.0
        self.X = dense


def row_losses(scoring: Any, default: str, joint: bool) -> tuple[Callable[..., Any], bool]:
    """The function (predictions, y) ↦ losses of the rows and derivatives, and whether it is the log-loss.

    Raises: ValueError for an unknown name.
    """
    from ._glm import logistic

    name = default if scoring is None else scoring
    if name == "squared_error" and not joint:
        return (lambda p, y: ((p - y).square(), 2 * (p - y))), False
    if name == "log_loss" and joint:
        return logistic, True
    if not callable(scoring):
        raise ValueError(
            f"scoring={scoring!r} is not a differentiable loss: pass {default!r}, or a function of tensors "
            f"(prediction, y) that returns the loss of each row"
        )

    def loss(prediction: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        leaf = prediction.detach().clone().requires_grad_()
        given, truth = leaf, y
        if joint:
            given = leaf[:, 0] if leaf.shape[1] == 1 else leaf
            truth = y[:, 0].long() if leaf.shape[1] == 1 else y.argmax(1)
        values = scoring(given, truth)
        shape = (len(y),) if joint else y.shape
        if not isinstance(values, Tensor) or values.shape != shape:
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"scoring must return the loss of each row, a tensor of shape {tuple(shape)}, not {got}")
        if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
            raise ValueError("scoring returned losses that are negative or not finite")
        if not values.requires_grad:
            raise ValueError("scoring is not differentiable: its losses have no graph to the predictions")
        return values.detach(), torch.autograd.grad(values.sum(), leaf)[0]

    return loss, False


class Tuned(BaseEstimator):
    """A linear model whose strengths are tuned; subclasses define the problem."""

    # Set by the constructors of the subclasses.
    penalty: Any
    alphas: Any
    cv: Any
    scoring: Any
    estimator: Any
    shrinkage: float
    early_stopping: bool
    max_iter: int
    fit_intercept: bool
    warm_start: bool
    progress: bool
    coef_: np.ndarray
    intercept_: Any

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    # Defined by subclasses.

    def _problem(self, data: Data, folds: Folds, labels: Labels) -> Any:
        raise NotImplementedError

    def _unit(self, data: Data) -> float:
        """The ratio of alpha_ to the strength of the same problem with a mean loss."""
        return float(data.weights.sum())

    def _grid(self, problem: Any, outputs: int) -> Tensor:
        """Single strengths in descending order, [A, T] or [A, 1]; hypergradients vanish above the first one."""
        return (torch.logspace(1, -6, 15, dtype=torch.float64) * max(problem.scale(), 1e-300))[:, None]

    def _labels(self, data: Data) -> Labels:
        names = getattr(self, "feature_names_in_", None)
        return make_labels(self.penalty, data.X.shape[1], data.y.shape[1], self._joint, names)

    _joint = False

    # Fitting.

    def _check_arguments(self) -> None:
        if not isinstance(self.shrinkage, numbers.Real) or not 0 <= float(self.shrinkage) < math.inf:
            raise ValueError(f"shrinkage must be a finite number ≥ 0, got {self.shrinkage!r}")
        if not isinstance(self.max_iter, numbers.Integral) or self.max_iter < 0:
            raise ValueError(f"max_iter must be an integer ≥ 0, got {self.max_iter!r}")
        if self.alphas is not None:
            alphas = np.asarray(self.alphas, dtype=float)
            if not alphas.size or alphas.ndim > 1 or not np.all(np.isfinite(alphas) & (alphas > 0)):
                raise ValueError(f"alphas must be positive finite numbers, got {self.alphas!r}")

    def _weights(self, sample_weight: Any, X: Any) -> np.ndarray:
        weights = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        if not weights.any():  # older versions of scikit-learn accept zeros
            raise ValueError("sample_weight must have at least one non-zero entry, got zeros only")
        return weights

    def _objective(
        self, data: Data, groups: Any, classes: np.ndarray | None, labels: Labels | None = None
    ) -> Objective:
        folds = make_folds(self.cv, data.given, data.y, data.weights, groups, classes, self.early_stopping)
        labels = self._labels(data) if labels is None else labels
        _, likelihood = row_losses(self.scoring, self._default_scoring, self._joint)
        return Objective(self._problem(data, folds, labels), labels, folds, float(self.shrinkage), likelihood)

    _default_scoring = "squared_error"

    def _fit(self, data: Data, groups: Any, classes: np.ndarray | None) -> tuple[Tensor, Tensor]:
        """Run the search; return coefficients and intercepts of the refit on all rows."""
        objective = self._objective(data, groups, classes)
        unit, problems = self._unit(data), 1 if objective.labels.coupled or self._joint else data.y.shape[1]
        before, single = getattr(self, "_found", (None, None)) if self.warm_start else (None, None)
        if before is not None and single is not None and before.shape == (problems, objective.labels.count):
            theta = before.clone()
        else:
            single = self._start(objective, data, unit, problems)
            theta = single.log()[:, None].repeat(1, objective.labels.count)
        objective.center = single.log()
        self._check_given(objective, theta)
        here = objective(theta, torch.arange(1 if self._joint else data.y.shape[1]))
        bar = partial(progress_bar, self.progress, desc=type(self).__name__, leave=True)
        found = search(objective, here, int(self.max_iter), bar, self._nothing_to_tune(data, here))
        self._record(objective, found, data, unit, single)
        final = self._problem(data, whole(data.weights), objective.labels)
        if hasattr(final, "begin"):
            final.begin(objective.problem)
        return final.coefficients(objective.labels.strengths(found.best.theta))

    def _start(self, objective: Objective, data: Data, unit: float, problems: int) -> Tensor:
        """The best single strength of each problem, [P]."""
        outputs = 1 if self._joint else data.y.shape[1]
        grid = self._grid(objective.problem, outputs)
        if self.alphas is not None:
            ordered = np.sort(np.ravel(np.asarray(self.alphas, dtype=float)))[::-1]
            grid = torch.from_numpy(ordered / unit)[:, None]
        targets = torch.arange(outputs)

        def score(strengths: Tensor) -> Tensor:
            a = strengths[:, None].expand(-1, data.X.shape[1])
            losses, _ = objective.problem.evaluate(a, targets, gradient=False)
            loss = objective.folds.share @ losses
            loss = loss if objective.likelihood else loss.clamp(min=torch.finfo(loss.dtype).tiny).log()
            return loss.sum(0, keepdim=True) if problems < outputs else loss

        if self.alphas is None and getattr(objective.problem, "dense", True) is False:
            return _bisected(score, grid).expand(problems).clone()
        best = torch.stack([score(strengths) for strengths in grid]).argmin(0)
        return grid[best, torch.arange(problems) if grid.shape[1] > 1 else 0].expand(problems).clone()

    def _nothing_to_tune(self, data: Data, point: Point) -> dict[int, str]:
        """The problems without a search, because the CV loss is zero or depends on no strength, with the reason."""
        outputs, problems = 1 if self._joint else data.y.shape[1], len(point.theta)
        done = {}
        constant = np.ptp(data.y, axis=0) == 0
        for problem in range(problems):
            if not self._joint and (bool(constant.all()) if problems < outputs else constant[problem]):
                done[problem] = "y is constant: there is nothing to tune"
            elif bool((point.loss[problem if problems == outputs else slice(None)] == 0).all()):
                done[problem] = "the CV loss is zero: there is nothing to tune"
            elif not bool(point.slope[problem].any()):
                done[problem] = (
                    "the CV loss depends on no strength, because every coefficient is zero at the best single "
                    "strength: the features predict nothing there, or alphas are too large"
                )
                warnings.warn(f"{type(self).__name__}: {done[problem]}", ConvergenceWarning, stacklevel=4)
        return done

    def _check_given(self, objective: Objective, theta: Tensor) -> None:
        """Raise or warn if the user's estimator does not solve this problem."""
        if self.estimator is None:
            return
        outputs = len(theta) if not objective.labels.coupled else len(objective.labels.index)
        which = torch.zeros(1, dtype=torch.long) if self._joint else torch.arange(outputs)
        rest = float(objective.problem.residual(objective.labels.strengths(theta), which).max())
        if rest > WRONG:
            raise ValueError(
                f"the coefficients of estimator={self.estimator!r} do not solve this problem: they leave {rest:.1e} of "
                f"its gradient. Pass an estimator with the same loss and penalty, or with a smaller tolerance"
            )
        if rest > ROUGH:
            warnings.warn(
                f"the coefficients of estimator={self.estimator!r} leave {rest:.1e} of the inner problem's gradient, "
                f"so the hypergradient is inaccurate too: give the estimator a smaller tolerance",
                ConvergenceWarning,
                stacklevel=4,
            )

    def _record(self, objective: Objective, found: Found, data: Data, unit: float, single: Tensor) -> None:
        single_output = self._single
        self._found = found.best.theta, single
        dtype = np.float32 if data.given.dtype == np.float32 else np.float64
        strengths = (objective.labels.strengths(found.best.theta) * unit).numpy()
        self.alpha_ = strengths[0] if len(strengths) == 1 and single_output else strengths
        self.alpha_ = self.alpha_.astype(dtype)
        self.start_alpha_ = float(single[0] * unit) if len(single) == 1 else (single * unit).numpy()
        path = torch.stack(found.path).numpy()
        self.cv_loss_path_ = path[:, 0] if path.shape[1] == 1 else path
        self.n_iter_ = max(found.steps, 1)
        self.stop_reason_ = found.reasons[0] if len(found.reasons) == 1 else np.array(found.reasons)
        outputs = torch.arange(1 if self._joint else data.y.shape[1])
        some = torch.arange(len(found.best.theta))
        if not objective.labels.coupled and not self._joint:
            some = outputs = some[:: max(1, len(some) // CHECKED)]
        exact = objective(found.best.theta[some], outputs, tighter=True).slope
        size = float(exact.norm())
        self.hypergradient_error_ = float((found.best.slope[some] - exact).norm()) / size if size else 0.0
        ended = [reason for reason in found.reasons if reason.startswith("max_iter")]
        if ended and self.max_iter:
            warnings.warn(
                f"{type(self).__name__}: {len(ended)} of {len(found.reasons)} searches ended by max_iter="
                f"{self.max_iter} before they converged; the best point that was scored is returned. Increase max_iter",
                ConvergenceWarning,
                stacklevel=4,
            )

    _single = True

    def _loss_at(
        self, data: Data, alpha: Any, groups: Any, classes: np.ndarray | None
    ) -> tuple[float | np.ndarray, np.ndarray]:
        features = data.X.shape[1]
        every = Labels(torch.arange(features), features)  # alpha may differ within a group of the penalty
        objective, unit = self._objective(data, groups, classes, every), self._unit(data)
        outputs = 1 if self._joint else data.y.shape[1]
        alpha = np.asarray(alpha, dtype=np.float64)
        shape, rows = (features,), data.y.shape[1]
        if alpha.shape not in (shape, (rows, *shape)) or not np.all(np.isfinite(alpha) & (alpha > 0)):
            raise ValueError(
                f"alpha must hold positive finite numbers of shape {shape} or {(rows, *shape)}, like alpha_; got "
                f"shape {alpha.shape}"
            )
        strengths = torch.from_numpy(np.atleast_2d(alpha) / unit)
        losses, slopes = objective.problem.evaluate(strengths, torch.arange(outputs), tighter="all")
        loss = (objective.folds.share @ losses).numpy()
        return float(loss[0]) if len(loss) == 1 else loss, slopes.numpy().reshape(
            alpha.shape if len(slopes) == len(strengths) else -1
        )

    def _decision(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        X = validate_data(self, X, accept_sparse="csr", dtype=[np.float64, np.float32], reset=False)
        return np.asarray(safe_sparse_dot(X, self.coef_.T, dense_output=True)) + self.intercept_

    def plot_path(self, ax: Any = None) -> Any:
        """Plot the CV loss along the search on matplotlib's axes `ax`, or new ones, and return the axes."""
        check_is_fitted(self)
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plot_path needs matplotlib: pip install 'torch-hypergrad[plots]'") from error
        if ax is None:
            ax = Figure(layout="constrained").subplots()
        path = np.asarray(self.cv_loss_path_)
        ax.plot(path / path[0] if path.ndim > 1 else path, marker=".")
        ax.set(xlabel="step of the search", ylabel="CV loss" + (" / its value at the start" if path.ndim > 1 else ""))
        return ax


def _bisected(score: Callable[[Tensor], Tensor], grid: Tensor) -> Tensor:
    """The best strength from few scores: every second one until they rise, the best one's neighbours, a parabola."""
    known = {}
    for k in range(0, len(grid), 2):
        known[k] = float(score(grid[k]).sum())
        if k > 2 and known[k] > known[k - 2]:
            break
    best = min(known, key=lambda k: known[k])
    for k in {best - 1, best + 1} & set(range(len(grid))):
        known[k] = float(score(grid[k]).sum())
    best = min(known, key=lambda k: known[k])
    if best - 1 not in known or best + 1 not in known:
        return grid[best]
    below, here, above = known[best - 1], known[best], known[best + 1]
    curvature = below - 2 * here + above
    shift = 0.5 * (below - above) / curvature if curvature > 0 else 0.0
    return grid[best] * (grid[best] / grid[best - 1]) ** shift
