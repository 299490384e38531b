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
from ._proximal import FISTA, L1, Box, ElasticNet, GroupLasso, Prox, ProximalGradient, Simplex
from ._rule import PerLeaf, PerStep, Rule
from ._rule import State as State  # used by hypergrad.meta: a rule's state, {"step": ..., buffers by name}
from ._rules import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, AMSGrad, RAdam, RMSprop
from ._rules import plus as plus  # used by hypergrad.meta: x + a y, rounded as torch.optim does

__all__ = ["Rule", "PerStep", "PerLeaf"]
__all__ += ["SGD", "Adam", "AdamW", "AMSGrad", "RMSprop", "Adagrad", "Adadelta", "Adamax", "RAdam"]
# for a constraint or a nonsmooth term
__all__ += ["ProximalGradient", "FISTA", "Prox", "L1", "ElasticNet", "Box", "Simplex", "GroupLasso"]
__all__ += ["from_torch", "Twin"]
# HyperTorch's interface
__all__ += ["DifferentiableOptimizer", "GradientDescent", "HeavyBall", "Momentum"]
__all__ += ["gd_step", "heavy_ball_step", "torch_momentum_step"]
