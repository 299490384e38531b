"""Implicit differentiation at a solution of the inner problem: hypergradients, and solutions as differentiable values.

    A = ∂₁F,   Aᵀ v = ∇₁E(w, λ),   ∇f(λ) = ∇₂E(w, λ) − ∂₂Fᵀ v

with F = ∇₁g for an inner loss g, and F = w − Φ for a fixed point map Φ.
"""

from ._correction import Correction as Correction
from ._correction import correct as correct
from ._correction import newton_step as newton_step
from ._correction import polish, refine
from ._equation import Info, WarmStart
from ._hypergradient import Hypergradient, backward, grad
from ._hypergradient import accumulate as accumulate
from ._hypergradient import hypergradient_of as hypergradient_of
from ._jacobian import jacobian
from ._maps import argmin, fixed_point, linear_solve, root, solver
from ._problem import INNER_UNREACHED as INNER_UNREACHED
from ._problem import LIVE_TOO as LIVE_TOO
from ._problem import NO_HPARAMS as NO_HPARAMS
from ._problem import Problem
from ._problem import outer_gradients as outer_gradients
from ._problem import warn_of_hooks as warn_of_hooks
from ._problem import warn_of_local as warn_of_local  # used by hypergrad.unroll and hypergrad.bilevel

__all__ = ["grad", "backward", "jacobian", "Hypergradient", "Problem"]  # the hypergradient at a solution
__all__ += ["polish", "refine"]  # hypergradients with a smaller error
# the solution as a differentiable value
__all__ += ["root", "fixed_point", "argmin", "linear_solve", "solver", "Info", "WarmStart"]
