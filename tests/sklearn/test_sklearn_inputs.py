"""Wrong, scaled and degenerate inputs give a clear error, a warning, or the right result."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes, load_iris
from sklearn.exceptions import ConvergenceWarning

from hypergrad.sklearn import ElasticNetHG, LogisticRegressionHG, RidgeHG


def diabetes():
    x, y = load_diabetes(return_X_y=True)
    return (x - x.mean(0)) / x.std(0), y


class Splits:
    """A splitter one of whose splits has no validation rows."""

    def get_n_splits(self, X=None, y=None, groups=None):
        return 2

    def split(self, X, y=None, groups=None):
        rows = np.arange(len(y))
        yield rows[:50], rows[50:]
        yield rows, rows[:0]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (RidgeHG([0, 1, 2]), r"labels of shape \(3,\), but X has 10 features"),
        (RidgeHG("features"), "not one of 'feature', 'group' and 'class'"),
        (RidgeHG("group"), "column names such as band__feature"),
        (RidgeHG(cv=Splits()), "fold 1 .* has no validation rows"),
        (RidgeHG(cv=[]), "gives no split"),
        (RidgeHG(shrinkage=-1.0), "shrinkage must be a finite number"),
        (RidgeHG(max_iter=-1), "max_iter must be an integer"),
        (RidgeHG(alphas=[0.0, 1.0]), "alphas must be positive"),
        (RidgeHG(scoring="r2"), "not a differentiable loss"),
        (RidgeHG(scoring=lambda p, y: (p - y).square().mean()), "the loss of each row"),
        (RidgeHG(scoring=lambda p, y: p - y), "negative or not finite"),
        (RidgeHG(scoring=lambda p, y: (p.detach() - y).square()), "not differentiable"),
        (ElasticNetHG(l1_ratio=0.0), r"l1_ratio must lie in \(0, 1\]"),
        (ElasticNetHG(alphas=[1e5, 1e6]), "at least α_max = "),
    ],
)
def test_arguments(model, message):
    with pytest.raises(ValueError, match=message):
        model.fit(*diabetes())


@pytest.mark.parametrize("kind", [RidgeHG, ElasticNetHG, LogisticRegressionHG])
def test_data(kind):
    x, y = load_iris(return_X_y=True)
    spoilt = x.copy()
    spoilt[3, 1] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        kind().fit(spoilt, y)
    with pytest.raises(ValueError, match="at least one non-zero"):
        kind().fit(x, y, sample_weight=np.zeros(150))
    with pytest.raises(ValueError, match="positive finite numbers of shape"):
        kind().cv_loss(x, y, np.ones(3))


def test_classes():
    x, y = load_iris(return_X_y=True)
    with pytest.raises(ValueError, match="one class only, 2"):
        LogisticRegressionHG().fit(x, np.full(150, 2))
    with pytest.raises(ValueError, match="one class only, 0"):
        LogisticRegressionHG().fit(x, y, sample_weight=(y == 0) * 1.0)
    with pytest.raises(ValueError, match="fold 0 have no sample of class 2"):
        LogisticRegressionHG(cv=[(np.arange(100), np.arange(100, 150))]).fit(x, y)


def test_constant_columns_and_a_constant_target():
    x, y = diabetes()
    more = np.hstack([x, np.full((len(x), 1), 1e8), np.zeros((len(x), 1))])
    for kind in (RidgeHG, ElasticNetHG):
        model, plain = kind().fit(more, y), kind().fit(x, y)
        assert not model.coef_[10:].any()
        np.testing.assert_allclose(model.predict(more), plain.predict(x), rtol=0.01)
        constant = kind().fit(x, np.full(len(x), 7.0))
        assert np.abs(constant.coef_).max() < 1e-12 and constant.stop_reason_.startswith("y is constant")
        np.testing.assert_allclose(constant.predict(x), 7.0)


def test_features_that_predict_nothing_are_warned_of():
    """The α_max of the second target is a thousandth of that of the first one, and below all alphas."""
    x, y = diabetes()
    both = np.stack([y, y / 1000], 1)
    with pytest.warns(ConvergenceWarning, match="every coefficient is zero at the best single strength"):
        model = ElasticNetHG(alphas=[1.0, 10.0], l1_ratio=1.0).fit(x, both)
    assert model.coef_[0].any() and not model.coef_[1].any()
    assert model.stop_reason_[1].startswith("the CV loss depends on no strength")


def test_a_target_with_tiny_numbers_is_tuned_as_any_other():
    """A gradient of 1e-14 must not count as zero."""
    rng = np.random.RandomState(0)
    x = rng.randn(100, 20)
    y, labels = x[:, :3].sum(1) + rng.randn(100), [0] * 3 + [1] * 17
    model, tiny = (RidgeHG(labels, shrinkage=0.0).fit(x, scale * y) for scale in (1.0, 1e-7))
    assert tiny.n_iter_ == model.n_iter_ > 1
    np.testing.assert_allclose(tiny.alpha_, model.alpha_, rtol=1e-6)


def test_no_argument_is_changed():
    x, y = diabetes()
    before, weights = x.copy(), np.linspace(0, 1, len(y))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RidgeHG(alphas=[1.0, 10.0]).fit(x, y, sample_weight=weights)
    np.testing.assert_array_equal(x, before)
    np.testing.assert_array_equal(weights, np.linspace(0, 1, len(y)))


def test_too_few_steps_warn():
    rng = np.random.RandomState(0)
    x = rng.randn(100, 20)
    with pytest.warns(ConvergenceWarning, match="max_iter=1"):
        RidgeHG([0] * 3 + [1] * 17, max_iter=1).fit(x, x[:, :3].sum(1) + rng.randn(100))


@pytest.mark.parametrize("kind", [RidgeHG, LogisticRegressionHG, ElasticNetHG])
def test_another_default_device_changes_nothing(kind):
    """With a GPU set by torch.set_default_device, results are still NumPy arrays, and are computed on the CPU."""
    random = np.random.RandomState(0)
    X = random.randn(40, 3)
    y = (X[:, 0] + 0.3 * random.randn(40) > 0).astype(int)
    plain = kind(max_iter=3).fit(X, y)
    torch.set_default_device("meta")
    try:
        other = kind(max_iter=3).fit(X, y)
        loss = other.cv_loss(X, y, np.ones(3))[0]
    finally:
        torch.set_default_device(None)
    np.testing.assert_array_equal(plain.coef_, other.coef_)
    np.testing.assert_array_equal(loss, plain.cv_loss(X, y, np.ones(3))[0])
