"""A hypergradient against finite differences of the whole map λ ↦ E(w*(λ), λ): slow, and independent."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .._tree import PyTree
from .._vector import Vector
from ..implicit._problem import Problem
from ._error import ratio


@dataclass(frozen=True)
class Differences:
    """Finite differences of the whole map λ ↦ E(w*(λ), λ) along random directions of length 1.

    Attributes:
        derivatives: by central differences at t and t/2, extrapolated (Richardson).
        errors: their own errors, as estimated from the two steps.
        given: ⟨h, u⟩ of the hypergradient along the same directions.
        step: t.
    """

    derivatives: tuple[float, ...]
    errors: tuple[float, ...]
    given: tuple[float, ...]
    step: float

    @property
    def relative_error(self) -> float:
        """‖derivatives − given‖ / ‖derivatives‖."""
        difference = math.hypot(*(d - g for d, g in zip(self.derivatives, self.given, strict=True)))
        return ratio(difference, math.hypot(*self.derivatives))

    @property
    def uncertainty(self) -> float:
        """‖errors‖ / ‖derivatives‖: what `relative_error` cannot tell from 0."""
        return ratio(math.hypot(*self.errors), math.hypot(*self.derivatives))

    @property
    def flat(self) -> bool:
        """Whether all derivatives are 0, beside a hypergradient that is not."""
        return not any(self.derivatives) and any(self.given)

    @property
    def agrees(self) -> bool:
        """Whether the difference is no larger than the differences' own error."""
        return self.relative_error <= self.uncertainty


def finite_differences(
    problem: Problem,
    grads: PyTree,
    solve: Callable[[PyTree], PyTree],
    *,
    directions: int = 3,
    step: float | None = None,
    seed: int = 0,
) -> Differences:
    """The hypergradient against D(t) = (f(λ + tu) − f(λ − tu)) / 2t, each f(λ) with the inner problem solved anew.

        D = D(t/2) + (D(t/2) − D(t)) / 3,      error ≈ |D(t/2) − D(t)| / 3 + 10 eps |f| / t

    The first term of the error is that of D(t/2), so a smooth f is estimated far better than it says. An inner problem
    that `solve` leaves unsolved to τ adds about τ/t, which shows in the first term too.

    Args:
        problem: its outer_loss is evaluated.
        grads: in hparams' structure.
        solve: hparams ↦ params, any code, run without autograd of this function: the inner problem solved from scratch.
        directions: the number of random u.
        step: t (default: eps^(1/5) · max(‖λ‖, 1)); hparams that must stay positive need a smaller one.
        seed: of the directions.

    Cost: four solves and evaluations of outer_loss for each direction.
    """
    variables = problem.variables
    outer = variables.outer_space
    here = outer.pack([x.detach() for x in variables.differentiated])
    given = variables.differentiated_of(grads, "the hypergradient")
    t = outer.eps**0.2 * max(float(here.norm()), 1.0) if step is None else step
    if not t > 0 or directions < 1:
        raise ValueError(f"step must be positive and directions ≥ 1, got {step!r} and {directions!r}")
    generator = torch.Generator().manual_seed(seed)

    def value(hparams: Vector) -> float:
        tree = variables.hparams_with(hparams.copy().leaves)
        params = variables.space.vector(solve(tree), "the value of solve").tree
        with torch.no_grad():
            return float(problem.outer_loss(params, tree))

    derivatives, errors, along = [], [], []
    for _ in range(directions):
        u = here.random(generator)
        u = u / u.norm()
        values = [[value(here + u * (sign * size)) for sign in (1, -1)] for size in (t, t / 2)]
        wide, narrow = ((plus - minus) / (2 * size) for (plus, minus), size in zip(values, (t, t / 2), strict=True))
        derivatives.append(narrow + (narrow - wide) / 3)
        errors.append(abs(narrow - wide) / 3 + 10 * outer.eps * max(abs(x) for pair in values for x in pair) / t)
        along.append(float(given.dot(u)))
    return Differences(tuple(derivatives), tuple(errors), tuple(along), t)
