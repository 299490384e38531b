"""Hypergradients of the CV loss, against closed forms in NumPy to 1e-10 and finite differences of solved problems."""

import warnings

import numpy as np
import pytest
import scipy.sparse
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import ElasticNet, Lasso, LinearRegression, LogisticRegression, Ridge
from sklearn.model_selection import KFold, PredefinedSplit
from sklearn.svm import LinearSVC

import oracles
from hypergrad.sklearn import ElasticNetHG, LogisticRegressionHG, RidgeHG


def scaled(load):
    x, y = load(return_X_y=True)
    return (x - x.mean(0)) / x.std(0), y


def whole(data):
    """X, y and the splitter of a reference problem: training rows first, then validation rows."""
    x, y = np.concatenate([data["x"], data["xv"]]), np.concatenate([data["y"], data["yv"]])
    return x, y, PredefinedSplit(np.r_[np.full(len(data["x"]), -1), np.zeros(len(data["xv"]))])


@pytest.mark.parametrize("name", ["ridge", "logistic", "elastic net"])
def test_reference_problems(name):
    """The CV loss of one split is the outer loss of the reference problem (twice it, for squared errors)."""
    if name == "ridge":
        true, factor = oracles.ridge(np.linspace(-4, 0, 10)), 2
        x, y, cv = whole(true.data)
        model, alpha = RidgeHG(cv=cv, fit_intercept=False), len(y) * np.exp(true.hparams[0])
    elif name == "logistic":
        true, factor = oracles.logistic(np.linspace(-5, -1, 30)), 1
        x, y, cv = whole(true.data)
        model, alpha = LogisticRegressionHG(cv=cv, fit_intercept=False), len(y) * np.exp(true.hparams[0])
    else:
        true, factor = oracles.elastic_net(), 2
        x, y, cv = whole(true.data)
        model, alpha = ElasticNetHG(cv=cv, fit_intercept=False, l1_ratio=2 / 3), np.full(10, 0.15)
    loss, gradient = model.cv_loss(x, y, alpha)
    assert loss == pytest.approx(factor * true.value, rel=1e-10)
    expected = factor * true.grads[0]
    if name == "elastic net":
        gradient, expected = gradient.sum(), expected.sum()
    assert np.linalg.norm(gradient - expected) <= 1e-10 * np.linalg.norm(expected)


def numpy_ridge(x, y, alpha, weights, splits):
    """The CV loss and its gradient for weighted rows and an intercept, by normal equations and explicit inverses."""
    total, loss, gradient = weights.sum(), 0.0, np.zeros_like(alpha)
    mass = sum(weights[valid].sum() for _, valid in splits)
    for train, valid in splits:
        s, t = weights[train] / weights[train].sum(), weights[valid] / weights[valid].sum()
        mean, offset = s @ x[train], s @ y[train]
        xc, yc = x[train] - mean, y[train] - offset
        inverse = np.linalg.inv(xc.T @ (s[:, None] * xc) + np.diag(alpha / total))
        w = inverse @ (xc.T @ (s * yc))
        r = (x[valid] - mean) @ w + offset - y[valid]
        v = inverse @ ((x[valid] - mean).T @ (2 * t * r))
        share = weights[valid].sum() / mass
        loss += share * (t @ r**2)
        gradient -= share * alpha / total * w * v
    return loss, gradient


@pytest.mark.parametrize("shape", [(90, 12), (40, 70)], ids=["primal", "kernels"])
def test_closed_form_of_weighted_folds(shape):
    rng = np.random.RandomState(0)
    x = rng.randn(*shape) + 3
    y, weights = x[:, :4] @ rng.randn(4, 3) + rng.randn(len(x), 3), rng.rand(len(x))
    alpha = np.exp(rng.randn(3, shape[1]))
    splits = list(KFold(4, shuffle=True, random_state=0).split(x))
    loss, gradient = RidgeHG(cv=splits).cv_loss(x, y, alpha, sample_weight=weights)
    for target in range(3):
        true, slope = numpy_ridge(x, y[:, target], alpha[target], weights, splits)
        assert loss[target] == pytest.approx(true, rel=1e-10)
        assert np.linalg.norm(gradient[target] - slope) <= 1e-10 * np.linalg.norm(slope)


def differences(model, x, y, alpha, step, **given):
    """The largest relative error against fourth-order finite differences, over random directions."""
    _, gradient = model.cv_loss(x, y, alpha, **given)
    rng, worst = np.random.RandomState(1), 0.0
    for _ in range(2):
        d = rng.randn(*alpha.shape)

        def loss(t, d=d):
            return np.sum(model.cv_loss(x, y, alpha * np.exp(t * d), **given)[0])

        slope = (8 * (loss(step) - loss(-step)) - loss(2 * step) + loss(-2 * step)) / (12 * step)
        worst = max(worst, abs(slope - (gradient * d).sum()) / abs(slope))
    return worst


def huber(prediction, y):
    return torch.nn.functional.huber_loss(prediction, y, reduction="none", delta=50.0)


def brier(logits, y):
    return (torch.softmax(logits, 1) - torch.nn.functional.one_hot(y, 3)).square().sum(1)


@pytest.mark.parametrize(
    ("model", "load", "step", "tolerance"),
    [
        (RidgeHG(), load_diabetes, 1e-3, 1e-8),
        (RidgeHG(scoring=huber), load_diabetes, 1e-3, 1e-6),
        (ElasticNetHG(), load_diabetes, 1e-4, 1e-8),
        (ElasticNetHG(l1_ratio=1.0), load_diabetes, 1e-5, 1e-7),
        (LogisticRegressionHG(), load_breast_cancer, 1e-3, 1e-8),
        (LogisticRegressionHG(cv=3), load_iris, 1e-3, 1e-7),
        (LogisticRegressionHG(cv=3, scoring=brier), load_iris, 1e-3, 1e-7),
    ],
    ids=["ridge", "huber", "elastic", "lasso", "logistic", "softmax", "brier"],
)
def test_differences_of_the_solved_problem(model, load, step, tolerance):
    x, y = scaled(load)
    alpha = np.exp(np.random.RandomState(0).randn(x.shape[1]) + (load is load_diabetes))
    assert differences(model, x, y, alpha, step) < tolerance


def test_differences_for_each_class_and_with_weights():
    x, y = scaled(load_iris)
    rng = np.random.RandomState(0)
    model = LogisticRegressionHG(cv=3, fit_intercept=False)
    assert differences(model, x, y, np.exp(rng.randn(3, 4)), 1e-3, sample_weight=rng.rand(150)) < 1e-7


def test_large_sparse_ridge_is_solved_without_factors():
    """X has more than 20 million entries, so only products with it are used; the CV loss is that of its few columns."""
    rng = np.random.RandomState(0)
    few = scipy.sparse.random_array((3_100, 25), density=0.3, rng=rng, format="csr")
    wide = scipy.sparse.hstack([few, scipy.sparse.csr_array((3_100, 7_000))], format="csr")
    y = few @ rng.randn(25) + rng.randn(3_100)
    alpha = np.exp(rng.randn(25))
    loss, gradient = RidgeHG(cv=2).cv_loss(wide, y, np.append(alpha, np.ones(7_000)))
    true, slope = RidgeHG(cv=2).cv_loss(few, y, alpha)
    assert loss == pytest.approx(true, rel=1e-10)
    assert np.linalg.norm(gradient[:25] - slope) <= 1e-8 * np.linalg.norm(slope) and not gradient[25:].any()


@pytest.mark.parametrize(
    ("ours", "theirs", "load"),
    [
        (RidgeHG, lambda a: Ridge(alpha=a), load_diabetes),
        (ElasticNetHG, lambda a: ElasticNet(alpha=a, tol=1e-12, max_iter=100_000), load_diabetes),
        (
            LogisticRegressionHG,
            lambda a: LogisticRegression(C=1 / a, solver="newton-cholesky", tol=1e-12),
            load_breast_cancer,
        ),
    ],
)
def test_units_of_alpha_are_those_of_scikit_learn(ours, theirs, load):
    x, y = scaled(load)
    model = ours(max_iter=0).fit(x, y)
    other = theirs(model.start_alpha_).fit(x, y)
    np.testing.assert_allclose(model.alpha_, model.start_alpha_)
    np.testing.assert_allclose(model.coef_, other.coef_, rtol=1e-6, atol=1e-8 * np.abs(other.coef_).max())
    np.testing.assert_allclose(model.predict(x), other.predict(x), rtol=1e-7)


def test_strengths_of_features_act_as_scaled_features():
    x, y = scaled(load_diabetes)
    model = RidgeHG(shrinkage=0.1).fit(x, y)
    other = Ridge(alpha=1.0).fit(x / np.sqrt(model.alpha_), y)
    np.testing.assert_allclose(model.coef_, other.coef_ / np.sqrt(model.alpha_), rtol=1e-9)


@pytest.mark.parametrize(
    ("model", "estimator", "load"),
    [
        (RidgeHG, Ridge(solver="lsqr", tol=1e-12), load_diabetes),
        (LogisticRegressionHG, LogisticRegression(solver="newton-cholesky", tol=1e-10), load_breast_cancer),
        (LogisticRegressionHG, LogisticRegression(tol=1e-8, max_iter=10_000), load_iris),
    ],
)
def test_an_estimator_of_scikit_learn_as_inner_solver(model, estimator, load):
    x, y = scaled(load)
    alpha = np.exp(np.random.RandomState(0).randn(x.shape[1]))
    loss, gradient = model(cv=3, estimator=estimator).cv_loss(x, y, alpha)
    true, slope = model(cv=3).cv_loss(x, y, alpha)
    assert loss == pytest.approx(true, rel=1e-6)
    assert np.linalg.norm(gradient - slope) <= 1e-4 * np.linalg.norm(slope)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = model(cv=3, estimator=estimator, max_iter=1).fit(x, y)
    assert fitted.cv_loss_path_[-1] <= fitted.cv_loss_path_[0]


@pytest.mark.parametrize(
    ("model", "estimator"),
    [(RidgeHG(), Ridge(solver="lsqr", tol=1e-10)), (ElasticNetHG(l1_ratio=1.0), Lasso(alpha=0.3, tol=1e-10))],
)
def test_the_users_estimator_is_not_changed(model, estimator):
    before = estimator.get_params()
    model.set_params(estimator=estimator, cv=3, max_iter=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(*scaled(load_diabetes))
    assert model.estimator is estimator and estimator.get_params() == before and not hasattr(estimator, "coef_")


def test_an_estimator_that_solves_another_problem_is_refused():
    x, y = scaled(load_breast_cancer)
    with pytest.raises(ValueError, match="do not solve this problem"):
        LogisticRegressionHG(cv=2, estimator=LinearSVC(max_iter=10_000)).fit(x, y)
    with pytest.raises(TypeError, match="must have the parameters"):
        RidgeHG(estimator=LinearRegression()).fit(x, y)
    with pytest.raises(ValueError, match="one strength for each feature"):
        LogisticRegressionHG("class", cv=2, estimator=LogisticRegression(max_iter=5000)).fit(*scaled(load_iris))
    rough = Ridge(solver="lsqr", tol=3e-3)
    with pytest.warns(ConvergenceWarning, match="smaller tolerance"):
        RidgeHG(max_iter=0, alphas=[10.0], estimator=rough).fit(*scaled(load_diabetes))


def test_large_sparse_classifier_is_that_of_its_columns_in_use():
    """X has more than 20 million entries; CG in float32 on the few columns in use gives the dense solution."""
    rng = np.random.RandomState(0)
    few = scipy.sparse.random_array((2_100, 20), density=0.5, rng=rng, format="csr")
    wide = scipy.sparse.hstack([few, scipy.sparse.csr_array((2_100, 9_600))], format="csr")
    y = (few @ rng.randn(20, 3) + rng.randn(2_100, 3)).argmax(1)
    alpha = np.exp(rng.randn(20))
    loss, gradient = LogisticRegressionHG(cv=2).cv_loss(wide, y, np.append(alpha, np.ones(9_600)))
    true, slope = LogisticRegressionHG(cv=2).cv_loss(few, y, alpha)
    assert loss == pytest.approx(true, rel=1e-10)
    assert np.linalg.norm(gradient[:20] - slope) <= 1e-8 * np.linalg.norm(slope) and not gradient[20:].any()
    found = LogisticRegressionHG(cv=2, max_iter=0, alphas=[3.0]).fit(wide, y)
    coef = LogisticRegressionHG(cv=2, max_iter=0, alphas=[3.0]).fit(few, y).coef_
    assert np.abs(found.coef_[:, :20] - coef).max() < 1e-3 * np.abs(coef).max() and not found.coef_[:, 20:].any()


def test_targets_of_equal_strengths_share_factors_and_nothing_else():
    """Losses and hypergradients of many targets, some of equal strengths, are those of each target alone."""
    rng = np.random.RandomState(0)
    x = rng.randn(40, 60)
    y = x[:, :4] @ rng.randn(4, 5) + rng.randn(40, 5)
    alpha = np.exp(rng.randn(5, 60))
    alpha[[1, 4]] = alpha[0]
    loss, gradient = RidgeHG(cv=4).cv_loss(x, y, alpha)
    for target in range(5):
        true, slope = RidgeHG(cv=4).cv_loss(x, y[:, target], alpha[target])
        assert loss[target] == pytest.approx(true, rel=1e-11)
        assert np.linalg.norm(gradient[target] - slope) <= 1e-10 * np.linalg.norm(slope)
