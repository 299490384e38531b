"""Iterative differentiation: the gradient through the inner optimiser's own steps, w_{t+1} = Φ_t(w_t, λ).

Nothing needs to have converged, so step sizes, schedules and starts can be learned. `reverse` for many hyperparameters,
`forward` for few and any number of steps.
"""

from ._forward import UnrolledForward, forward
from ._reverse import Unrolled, reverse

__all__ = ["forward", "reverse", "Unrolled", "UnrolledForward"]
