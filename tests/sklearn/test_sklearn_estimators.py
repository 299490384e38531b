"""The estimators within scikit-learn's tools, and the result of the search."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import scipy.sparse
from joblib import Parallel, delayed
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris
from sklearn.model_selection import GridSearchCV, GroupKFold, KFold, PredefinedSplit, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import hypergrad as hg
from hypergrad.sklearn import ElasticNetHG, LogisticRegressionHG, RidgeHG

ALL = [RidgeHG, ElasticNetHG, LogisticRegressionHG]
pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


def scaled(load):
    x, y = load(return_X_y=True)
    return (x - x.mean(0)) / x.std(0), y


def data_of(kind):
    return scaled(load_iris if kind is LogisticRegressionHG else load_diabetes)


def bands(seed=0, targets=3, n=120, width=60):
    """Three groups of features, and targets that each depend on other groups."""
    rng = np.random.RandomState(seed)
    x, labels = rng.randn(2 * n, 3 * width), np.repeat(np.arange(3), width)
    use = np.array([rng.permutation([4.0, 0.3, 0.0]) for _ in range(targets)])
    signal = x @ (rng.randn(targets, 3 * width) * np.sqrt(use[:, labels] / width)).T
    y = signal + rng.randn(2 * n, targets) * signal.std(0)
    return x[:n], y[:n], x[n:], y[n:], labels


def checks_of(*estimators):
    """parametrize_with_checks with a list of cases, as pytest 9 needs; scikit-learn before 1.8 returns none."""
    mark = parametrize_with_checks(list(estimators))
    names, cases = mark.args
    return pytest.mark.parametrize(names, list(cases), **mark.kwargs)


@pytest.mark.filterwarnings("ignore")
@checks_of(RidgeHG())
def test_scikit_learns_checks(estimator, check):
    check(estimator)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@checks_of(RidgeHG("class"), ElasticNetHG(), LogisticRegressionHG(), LogisticRegressionHG("class"))
def test_scikit_learns_checks_of_the_others(estimator, check):
    check(estimator)


@pytest.mark.parametrize("kind", ALL)
def test_dense_and_sparse_single_and_double_give_the_same(kind):
    x, y = data_of(kind)
    model = kind(cv=3, max_iter=3).fit(x, y)
    sparse = kind(cv=3, max_iter=3).fit(scipy.sparse.csr_array(x), y)
    single = kind(cv=3, max_iter=3).fit(x.astype(np.float32), y)
    np.testing.assert_allclose(sparse.coef_, model.coef_, rtol=1e-6, atol=1e-8 * np.abs(model.coef_).max())
    assert single.coef_.dtype == single.alpha_.dtype == np.float32 and model.coef_.dtype == np.float64
    np.testing.assert_allclose(single.predict(x.astype(np.float32)), model.predict(x), rtol=1e-2)


def test_pipeline_grid_search_clone_joblib_pickle():
    x, y = load_diabetes(return_X_y=True)
    pipeline = make_pipeline(StandardScaler(), RidgeHG(cv=3))
    search = GridSearchCV(pipeline, {"ridgehg__shrinkage": [0.1, 1.0, 10.0]}, cv=3).fit(x, y)
    assert search.best_params_["ridgehg__shrinkage"] in (0.1, 1.0, 10.0)
    model = search.best_estimator_[-1]
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.predict(x), model.predict(x))
    assert clone(model).get_params() == model.get_params() and not hasattr(clone(model), "alpha_")
    found = Parallel(n_jobs=2, backend="threading")(delayed(clone(model).fit)(x, y) for _ in range(2))
    np.testing.assert_array_equal(found[0].alpha_, found[1].alpha_)
    assert cross_val_score(pipeline, x, y, cv=3).mean() > 0.4


def test_strengths_of_bands_find_what_each_target_needs():
    x, y, xt, yt, labels = bands()
    single, many = RidgeHG(labels, max_iter=0).fit(x, y), RidgeHG(labels).fit(x, y)
    assert many.score(xt, yt) > single.score(xt, yt) + 0.05
    assert many.alpha_.shape == many.coef_.shape == (3, 180) and len(many.stop_reason_) == 3
    assert all(len(np.unique(row)) == 3 for row in many.alpha_)
    alone = RidgeHG(labels).fit(x, y[:, 1])
    np.testing.assert_allclose(alone.alpha_, many.alpha_[1], rtol=1e-6)
    shared = RidgeHG(np.tile(labels[:, None], 3)).fit(x, y)
    assert len(np.unique(shared.alpha_)) == 3 and np.ptp(shared.alpha_, axis=0).max() == 0
    assert many.score(xt, yt) > shared.score(xt, yt)


def test_the_best_point_that_was_scored_is_returned():
    x, y, _, _, labels = bands()
    model = RidgeHG(labels, shrinkage=0.0).fit(x, y[:, 0])
    assert model.cv_loss_path_[-1] == model.cv_loss_path_.min() < model.cv_loss_path_[0]
    loss, _ = model.cv_loss(x, y[:, 0], model.alpha_)
    assert loss == pytest.approx(model.cv_loss_path_[-1], rel=1e-10)
    assert "converged" in model.stop_reason_ and model.n_iter_ == len(model.cv_loss_path_) - 1
    assert model.hypergradient_error_ < 1e-8
    assert RidgeHG(labels, shrinkage=1e6).fit(x, y[:, 0]).alpha_.std() < 0.01 * model.alpha_.std()


@pytest.mark.parametrize("kind", [RidgeHG, ElasticNetHG])
def test_scale_of_y_and_of_x(kind):
    x, y = data_of(kind)
    model, power = kind(), {RidgeHG: 2, ElasticNetHG: 1}[kind]
    alpha = model.fit(x, y).alpha_
    if kind is RidgeHG:
        np.testing.assert_allclose(clone(model).fit(x, 1e-7 * y).alpha_, alpha, rtol=1e-6)
        np.testing.assert_allclose(clone(model).fit(x, 1e7 * y).alpha_, alpha, rtol=1e-6)
        np.testing.assert_allclose(clone(model).fit(1e-5 * x, y).alpha_, alpha * 1e-5**power, rtol=1e-6)
    else:
        ridge = ElasticNetHG(l1_ratio=1.0)
        alpha = clone(ridge).fit(x, y).alpha_
        np.testing.assert_allclose(clone(ridge).fit(x, 1e-7 * y).alpha_, 1e-7 * alpha, rtol=1e-6)
        np.testing.assert_allclose(clone(ridge).fit(1e-5 * x, y).alpha_, 1e-5 * alpha, rtol=1e-6)


def test_early_stopping_says_why_and_watches_the_last_split():
    rng = np.random.RandomState(0)
    x, y = rng.randn(60, 30), rng.randn(60)
    model = RidgeHG(cv=5, early_stopping=True, shrinkage=0.0).fit(x, y)
    assert model.stop_reason_.startswith(("early stopping", "converged"))
    splits = list(KFold(3).split(x))
    watched = RidgeHG(cv=splits, early_stopping=True, max_iter=0).fit(x, y)
    rest = [(np.setdiff1d(train, splits[-1][1]), valid) for train, valid in splits[:-1]]
    loss, _ = RidgeHG(cv=rest).cv_loss(x, y, watched.alpha_)
    assert watched.cv_loss_path_[0] == pytest.approx(loss, rel=1e-10)
    with pytest.raises(ValueError, match="at least two splits"):
        RidgeHG(cv=PredefinedSplit(np.r_[np.full(30, -1), np.zeros(30)]), early_stopping=True).fit(x, y)


def test_warm_start_and_groups_and_class_penalty():
    x, y = scaled(load_iris)
    model = LogisticRegressionHG("class", cv=3, warm_start=True).fit(x, y)
    assert model.alpha_.shape == (3, 4) and np.ptp(model.alpha_, axis=1).max() == 0
    path = model.cv_loss_path_
    assert model.fit(x, y).cv_loss_path_[0] == pytest.approx(path[-1], rel=1e-6)
    xd, yd = scaled(load_diabetes)
    groups = np.arange(len(yd)) // 7
    fitted = RidgeHG(cv=GroupKFold(4)).fit(xd, yd, groups=groups)
    assert fitted.alpha_.shape == (10,)


def test_groups_of_named_columns():
    class Frame:  # validate_data needs these of a data frame
        columns = np.array(["age__a", "age__b", "sex__a"], dtype=object)

    from hypergrad.sklearn._folds import make_labels

    assert make_labels("group", 3, 1, False, Frame.columns).index.tolist() == [0, 0, 1]


def test_plot_and_progress(capsys):
    x, y = scaled(load_breast_cancer)
    model = LogisticRegressionHG(cv=2, max_iter=2, progress=True).fit(x, y)
    assert "LogisticRegressionHG" in capsys.readouterr().err
    (line,) = model.plot_path().get_lines()
    np.testing.assert_array_equal(line.get_ydata(), model.cv_loss_path_)


def test_import_is_lazy_and_a_missing_extra_is_one_sentence():
    script = (
        "import sys, hypergrad; assert 'sklearn' not in sys.modules; sys.modules['sklearn'] = None\n"
        "try: hypergrad.sklearn\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, encoding="utf-8", timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "hypergrad.sklearn needs scikit-learn: pip install 'torch-hypergrad[sklearn]'"
    assert hg.sklearn.RidgeHG is RidgeHG
