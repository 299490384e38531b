"""Implicit differentiation at a solution of the inner problem: as a hypergradient (grad, backward), or as a value.

    A = ∂₁F,   Aᵀ v = ∇₁E(w, λ),   ∇f(λ) = ∇₂E(w, λ) − ∂₂Fᵀ v

with F = ∇₁g for an inner loss g, and F = w − Φ for a fixed point map Φ.
"""

from .._implicit_function import Info, WarmStart
from .._solution_maps import Phantom, argmin, fixed_point, linear_solve, root, solver
from . import tolerances
from ._hypergradient import Hypergradient, backward, grad
from ._hypergradient import accumulate as accumulate
from ._jacobian import jacobian
from ._problem import InnerProblem as InnerProblem
from ._problem import Problem
from ._problem import Variables as Variables
from ._problem import check_hparams as check_hparams
from ._problem import outer_gradients as outer_gradients
from ._problem import random_state_kept_on_error as random_state_kept_on_error

__all__ = [
    # the hypergradient at a solution
    "grad",
    "backward",
    "jacobian",
    "Hypergradient",
    "Problem",
    "tolerances",
    # the solution as a differentiable value
    "root",
    "fixed_point",
    "argmin",
    "linear_solve",
    "solver",
    "Phantom",
    "Info",
    "WarmStart",
]
