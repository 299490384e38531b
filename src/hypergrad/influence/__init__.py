"""Data attribution: how the loss of a query changes with the weights of the training examples.

    g(w, ω) = (1/n) Σᵢ ωᵢ ℓᵢ(w) + p(w),      s_qi = ∂ℓ_q(w(ω)) / ∂ωᵢ  at ω = 1

w(ω) is the minimiser of g (`scores`, `self_influence`), or the result of a training run (`unrolled`). To first order,
leaving example i out changes the loss of query q by −s_qi, so harmful examples have positive scores.
"""

from ._evaluation import Retrained, metasmoothness, retrained
from ._result import Influence
from ._scores import scores, self_influence
from ._unrolled import unrolled

__all__ = ["scores", "self_influence", "unrolled", "Influence", "retrained", "Retrained", "metasmoothness"]
