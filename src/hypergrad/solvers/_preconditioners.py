"""What a preconditioner of CG and MINRES may be.

A recipe (`Nystrom`, `Dense`) builds one from A: factors(op, like) → tensors, once for a system, and apply(factors, r) →
M⁻¹r.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .._vector import Vector
from ..operators import LinearOperator, function
from ._solver import System


def is_recipe(thing: Any) -> bool:
    """Whether it builds a preconditioner from an operator; a class in the place of its object does not."""
    return hasattr(thing, "factors") and hasattr(thing, "apply") and not isinstance(thing, type)


def build_preconditioner(preconditioner: Any, system: System) -> Callable[[Vector], Vector] | None:
    """r ↦ M⁻¹ r from what the user gave: None, an operator, a function of pytrees, or a recipe such as Nystrom."""
    if preconditioner is None or isinstance(preconditioner, LinearOperator):
        return preconditioner
    if getattr(preconditioner, "needs_tolerance", False) and system.goal is None:
        raise ValueError(
            "Reused needs a solver with a tolerance (rtol or atol): a fixed number of steps does not show that the "
            "preconditioner has aged"
        )
    if is_recipe(preconditioner):
        if system.precondition is None:
            factors = preconditioner.factors(system.op, system.b)
            system.precondition = lambda r: preconditioner.apply(factors, r)
        return system.precondition
    if not callable(preconditioner) or isinstance(preconditioner, type):
        raise TypeError(
            f"preconditioner must be a LinearOperator, a function r ↦ M⁻¹r of pytrees, or a recipe such as "
            f"Nystrom(...), got {preconditioner!r}"
        )
    return function(preconditioner)
