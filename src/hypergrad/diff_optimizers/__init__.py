"""Differentiable update rules: one step of an optimiser as a differentiable function of params and hyperparameters.

Two interfaces. A `Rule` is a frozen dataclass of hyperparameters, a pure function of (params, state, gradient):

    state = rule.init(params)
    params, state = rule.update(params, state, grads)

HyperTorch's optimiser objects hold the inner loss and are themselves fixed point maps.
"""

from ._from_torch import Twin, from_torch
from ._hypertorch import (
    DifferentiableOptimizer,
    GradientDescent,
    HeavyBall,
    Momentum,
    gd_step,
    heavy_ball_step,
    torch_momentum_step,
)
from ._proximal import FISTA, L1, Box, ElasticNet, GroupLasso, MirrorDescent, Prox, ProximalGradient, Simplex
from ._rule import PerLeaf, PerStep, Rule
from ._rules import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, AMSGrad, NAdam, Polyak, RAdam, RMSprop

__all__ = [
    # what all rules share, and what a hyperparameter may be
    "Rule",
    "PerStep",
    "PerLeaf",
    # rules
    "SGD",
    "Polyak",
    "Adam",
    "AdamW",
    "AMSGrad",
    "RMSprop",
    "Adagrad",
    "Adadelta",
    "Adamax",
    "NAdam",
    "RAdam",
    # with a constraint or a term that is not smooth
    "ProximalGradient",
    "FISTA",
    "MirrorDescent",
    "Prox",
    "L1",
    "ElasticNet",
    "Box",
    "Simplex",
    "GroupLasso",
    # of a live optimizer
    "from_torch",
    "Twin",
    # HyperTorch's interface
    "DifferentiableOptimizer",
    "GradientDescent",
    "HeavyBall",
    "Momentum",
    "gd_step",
    "heavy_ball_step",
    "torch_momentum_step",
]
