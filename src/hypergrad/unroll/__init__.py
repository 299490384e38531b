"""Iterative differentiation: the gradient through the inner optimiser's own steps, w_{t+1} = Φ_t(w_t, λ).

The steps need not have converged, so step sizes, schedules and starts can be learned. Use `reverse` for many
hyperparameters, and `forward` for few hyperparameters and any number of steps.
"""

from ._forward import ForwardResult, forward
from ._jacobian import jacobian
from ._reverse import ReverseResult, reverse
from ._reverse import check_storage as check_storage  # used by hypergrad.meta: memory, checkpoints and compile

__all__ = ["forward", "reverse", "jacobian", "ForwardResult", "ReverseResult"]
