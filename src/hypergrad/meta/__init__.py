"""Meta-learning: one hypergradient over a batch of tasks, solved side by side.

    f(λ) = (1/B) Σᵢ E(wᵢ(λ), λ, taskᵢ),      wᵢ(λ) ≈ argmin_w g(w, λ, taskᵢ), in T steps from w₀(λ)

Losses are those of one task; implicit (iMAML), unrolled (MAML) and first-order (FOMAML, Reptile) gradients come through
the same call. While losses are evaluated torch's cross_entropy, nll_loss, linear and max_pool2d are spelled otherwise
where that costs less, to the same numbers (module `_spelling`).
"""

from ._gradient import adapt, backward, each, grad
from ._methods import FirstOrder, Implicit, Method, Reptile, Unrolled
from ._result import Adaptation, MetaGradient, TaskError
from ._tasks import Plan, biased

__all__ = [
    # the meta-gradient
    "grad",
    "backward",
    "MetaGradient",
    # how it is taken
    "Implicit",
    "Unrolled",
    "FirstOrder",
    "Reptile",
    "Method",
    "biased",
    # adaptation alone
    "adapt",
    "each",
    "Adaptation",
    # what all of them may say
    "Plan",
    "TaskError",
]
