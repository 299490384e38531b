"""Estimators for scikit-learn with one penalty per feature, group or class, tuned by hypergradients of the CV loss.

`RidgeHG`, `LogisticRegressionHG` and `ElasticNetHG` correspond to `RidgeCV`, `LogisticRegressionCV` and `ElasticNetCV`,
which tune one penalty. They need scikit-learn: `pip install torch-hypergrad[sklearn]`.
"""

try:
    import sklearn as _sklearn  # noqa: F401
except ImportError as error:
    raise ImportError("hypergrad.sklearn needs scikit-learn: pip install 'torch-hypergrad[sklearn]'") from error

from ._estimators import ElasticNetHG, LogisticRegressionHG, RidgeHG

__all__ = ["RidgeHG", "LogisticRegressionHG", "ElasticNetHG"]
