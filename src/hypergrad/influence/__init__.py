"""Data attribution: how the loss of a query would change with the weights of the training examples.

    g(w, ω) = (1/n) Σᵢ ωᵢ ℓᵢ(w) + p(w),      s_qi = ∂ℓ_q(w(ω)) / ∂ωᵢ  at ω = 1

w(ω) is the minimiser of g (`scores`, `self_influence`), or what a training arrives at (`unrolled`). Leaving example i
out changes the loss of query q by −s_qi, to first order: harmful examples have positive scores.
"""

from ._evaluation import Retrained, metasmoothness, retrained
from ._result import Influence
from ._scores import scores, self_influence
from ._unrolled import unrolled

__all__ = ["scores", "self_influence", "unrolled", "Influence", "retrained", "Retrained", "metasmoothness"]
