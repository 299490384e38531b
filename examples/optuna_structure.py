# %% [markdown]
# # Structure by trials, continuous hyperparameters by hypergradients
#
# Optuna chooses the hyperparameters without a gradient, here the splines into which each feature is expanded. In each
# trial, `RidgeHG` tunes a penalty for the splines of each feature. A trial reports the CV loss of its tuned model.

# %%
import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from sklearn.datasets import load_diabetes
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import SplineTransformer, StandardScaler

from examples.common import Base, parse, rounded, save
from hypergrad.sklearn import RidgeHG


@dataclass
class Config(Base):
    trials: int = 20
    """Trials of Optuna."""


def model(knots: int, degree: int, features: int) -> Any:
    groups = np.repeat(np.arange(features), knots + degree - 1)
    return make_pipeline(SplineTransformer(knots, degree=degree), StandardScaler(), RidgeHG(groups))


if __name__ == "__main__":
    config = parse(Config, "Structure by trials, penalties by hypergradients", {"trials": 3})
    if importlib.util.find_spec("optuna") is None:
        print("This example needs Optuna: pip install optuna")
        raise SystemExit(0)  # no error, because no extra of hypergrad installs Optuna
    optuna: Any = importlib.import_module("optuna")
    data: Any = load_diabetes(return_X_y=True)
    parts: Any = train_test_split(*data, random_state=config.seed)
    x, xt, y, yt = parts

    def objective(trial: Any) -> float:
        shape = trial.suggest_int("knots", 2, 8), trial.suggest_int("degree", 1, 3)
        return float(np.min(model(*shape, x.shape[1]).fit(x, y)[-1].cv_loss_path_))

    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=config.seed))
    study.optimize(objective, config.trials)
    best = model(**study.best_params, features=x.shape[1]).fit(x, y)
    losses = [trial.value for trial in study.trials]
    figure = Figure(layout="constrained")
    figure.subplots().plot(losses, "o")
    table = f"Best of {config.trials} trials: {study.best_params}, test R² {best.score(xt, yt):.3f}."
    save(config, "Structure by trials", table, figure, rounded({"losses": losses, "best": study.best_params}))
