"""The data of the search: the rows of each fold, and which coefficients share a strength."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import check_cv
from torch import Tensor


@dataclass(frozen=True)
class Folds:
    """Weights of the rows in each fold, each row of `train` and `valid` with sum 1.

    Attributes:
        train: [F, n], weights in the inner loss of a fold.
        valid: [F, n], weights in the outer loss of a fold.
        share: [F], the weight of each fold in the CV loss; 0 for the watched fold.
        watched: the index of the fold that only serves early stopping, or None.
        count: the weight of all rows that are scored, the sample size of the CV loss.
    """

    train: Tensor
    valid: Tensor
    share: Tensor
    watched: int | None
    count: float

    @property
    def number(self) -> int:
        return len(self.train)

    def rows(self, fold: int, part: str = "valid") -> Tensor:
        """The indices of the rows with positive weight in a fold."""
        return getattr(self, part)[fold].nonzero()[:, 0]


def whole(weights: np.ndarray) -> Folds:
    """All rows as one training set, without validation rows."""
    train = torch.from_numpy(weights / weights.sum())[None]
    return Folds(train, torch.zeros_like(train), torch.ones(1, dtype=torch.float64), None, float(weights.sum()))


def make_folds(
    cv: Any, X: Any, y: np.ndarray, weights: np.ndarray, groups: Any, classes: np.ndarray | None, watch: bool
) -> Folds:
    """The splits of `cv` as weights. watch: leave the validation rows of the last split out of all other splits.

    Raises: ValueError for a fold without training or validation rows, or if its training rows lack a class.
    """
    splitter: Any = check_cv(cv, y if classes is None else classes, classifier=classes is not None)
    splits = [(np.asarray(a), np.asarray(b)) for a, b in splitter.split(X, y if classes is None else classes, groups)]
    if not splits:
        raise ValueError(f"cv={cv!r} gives no split: it needs at least one pair of training and validation rows")
    train, valid = (_masses([split[part] for split in splits], weights) for part in (0, 1))
    if watch:
        if len(splits) == 1:
            raise ValueError(
                "early_stopping=True sets the last split of cv apart, and cv has only one: give cv at least two "
                "splits, or pass early_stopping=False"
            )
        kept = valid[-1] > 0
        train[:-1, kept] = valid[:-1, kept] = 0.0
    for fold in range(len(splits)):
        for rows, name in ((train[fold], "training"), (valid[fold], "validation")):
            if not rows.sum() > 0:
                raise ValueError(
                    f"fold {fold} of cv={cv!r} has no {name} rows of positive weight: every split must have both"
                )
        if classes is not None and (missing := set(np.unique(classes)) - set(classes[train[fold] > 0])):
            raise ValueError(
                f"the training rows of fold {fold} have no sample of class {sorted(missing)[0]}: use fewer folds, or "
                f"a cv= whose training rows always contain every class"
            )
    masses = valid.sum(1)
    scored = slice(0, -1 if watch else None)
    share = np.zeros(len(splits))
    share[scored] = masses[scored] / masses[scored].sum()
    count = weights[(valid[scored] > 0).any(0)].sum()
    train, valid = (each / each.sum(1, keepdims=True) for each in (train, valid))
    return Folds(
        torch.from_numpy(train),
        torch.from_numpy(valid),
        torch.from_numpy(share),
        len(splits) - 1 if watch else None,
        float(count),
    )


def _masses(rows: list[np.ndarray], weights: np.ndarray) -> np.ndarray:
    masses = np.zeros((len(rows), len(weights)))
    for fold, index in enumerate(rows):
        np.add.at(masses[fold], np.arange(len(weights))[index], weights[index])
    return masses


@dataclass(frozen=True)
class Labels:
    """The strength that each coefficient has.

    Attributes:
        index: [d], the index of each feature's strength, with separate strengths for each target; or [C, d], the index
            of each coefficient's strength, with strengths shared by all outputs.
        count: p, the number of strengths of a problem.
    """

    index: Tensor
    count: int

    @property
    def coupled(self) -> bool:
        return self.index.ndim == 2

    def strengths(self, theta: Tensor) -> Tensor:
        """Logarithms of strengths [P, p] ↦ strengths of the coefficients, [P, d] or [C, d]."""
        return (theta[0, self.index] if self.coupled else theta[:, self.index]).exp()

    def collect(self, gradient: Tensor) -> Tensor:
        """Sums over the coefficients of each label: [P, d] or [C, d] ↦ [P, p]."""
        if self.coupled:
            sums = gradient.new_zeros(1, self.count)
            return sums.index_add_(1, self.index.flatten(), gradient.reshape(1, -1))
        return gradient.new_zeros(len(gradient), self.count).index_add_(1, self.index, gradient)

    def thetas(self, strengths: Tensor) -> Tensor:
        """The inverse of `strengths`, by the first coefficient of each label."""
        flat = strengths.reshape(1, -1) if self.coupled else strengths
        index = self.index.flatten()
        first = torch.full((self.count,), len(index)).scatter_reduce_(0, index, torch.arange(len(index)), "amin")
        return flat[:, first].log()


def make_labels(penalty: Any, features: int, outputs: int, joint: bool, names: np.ndarray | None) -> Labels:
    """The labels of `penalty`, which is "feature", "group", "class" or an array of labels, [d] or [d, outputs].

    Args:
        outputs: the number of targets, or of columns of coefficients of a classifier.
        joint: whether one problem has all outputs, as in a softmax regression.
        names: the names of the columns, for "group".
    """
    if isinstance(penalty, str):
        if penalty == "feature":
            return Labels(torch.arange(features), features)
        if penalty == "class":
            if not joint:
                return Labels(torch.zeros(features, dtype=torch.long), 1)
            return Labels(torch.arange(outputs)[:, None].expand(outputs, features), outputs)
        if penalty != "group":
            raise ValueError(
                f"penalty={penalty!r} is not one of 'feature', 'group' and 'class', nor an array with a label for each "
                f"feature, [n_features], or for each coefficient, [n_features, n_targets]"
            )
        penalty = _prefixes(names)
    labels = np.asarray(penalty)
    if labels.shape not in ((features,), (features, outputs)):
        raise ValueError(
            f"penalty has labels of shape {labels.shape}, but X has {features} features and there are {outputs} "
            f"outputs: give a label for each feature, ({features},), or for each coefficient, ({features}, {outputs})"
        )
    distinct, inverse = np.unique(labels, return_inverse=True)
    index = torch.from_numpy(inverse.reshape(labels.shape).T.copy())
    return Labels(index, len(distinct))


def _prefixes(names: Iterable[str] | None) -> list[str]:
    if names is None or not all("__" in name for name in names):
        raise ValueError(
            "penalty='group' reads the groups from column names such as band__feature, which ColumnTransformer with "
            "set_output(transform='pandas') makes. X has no such names: pass an array with a label for each feature"
        )
    return [name.split("__", 1)[0] for name in names]
