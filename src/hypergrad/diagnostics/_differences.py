"""An independent, slow check by finite differences of λ ↦ E(w*(λ), λ), for which the inner problem is solved again."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .._tree import PyTree
from .._vector import Vector, ratio
from ..implicit import Problem
from ._structure import seeded


@dataclass(frozen=True)
class Differences:
    """Derivatives along random directions u by finite differences, their estimated errors, and given = ⟨h, u⟩.

    Example:
        >>> lam = torch.tensor([3.0, 1.0], dtype=torch.float64, requires_grad=True)
        >>> result = hg.implicit.grad(
        ...     lambda w, lam: (w**2).sum() / 2,
        ...     inner_loss=lambda w, lam: ((w - lam) ** 2).sum(),
        ...     params=lam.detach(),
        ...     hparams=lam,
        ... )
        >>> differences = hg.diagnostics.finite_differences(result.problem, result.grads, lambda lam: lam)  # w*(λ) = λ
        >>> bool(differences.relative_error < 1e-6)
        True
    """

    derivatives: tuple[float, ...]
    errors: tuple[float, ...]
    given: tuple[float, ...]

    @property
    def relative_error(self) -> float:
        """‖derivatives − given‖ / ‖derivatives‖."""
        return ratio(self._difference, math.hypot(*self.derivatives))

    @property
    def uncertainty(self) -> float:
        """‖errors‖ / ‖derivatives‖: a smaller `relative_error` is not significant."""
        return ratio(math.hypot(*self.errors), math.hypot(*self.derivatives))

    @property
    def agrees(self) -> bool:
        """Whether ‖derivatives − given‖ is no larger than ‖errors‖."""
        return self._difference <= math.hypot(*self.errors)

    @property
    def _difference(self) -> float:
        return math.hypot(*(d - g for d, g in zip(self.derivatives, self.given, strict=True)))


def finite_differences(
    problem: Problem,
    grads: PyTree,
    solve: Callable[[PyTree], PyTree],
    *,
    directions: int = 3,
    step: float | None = None,
) -> Differences:
    """Compare a hypergradient with D(t) = (f(λ + tu) − f(λ − tu)) / 2t, solving the inner problem again for each f.

        D = D(t/2) + (D(t/2) − D(t)) / 3,      error ≈ |D(t/2) − D(t)| / 3 + 10 eps |f| / t

    The first term is the error of D(t/2), so for a smooth f the error of D is far below this estimate. An error τ of
    the inner solution adds about τ/t to the error, which the first term includes.

    Args:
        problem: as for `findings`.
        grads: the hypergradient, in hparams' structure.
        solve: hparams ↦ params, any code that solves the inner problem from scratch.
        directions: the number of random u.
        step: t (default: eps^(1/5) · max(‖λ‖, 1)); hparams that must stay positive may need a smaller one.

    Cost: four solves and evaluations of outer_loss for each direction.

    Example:
        >>> lam = torch.tensor([3.0, 1.0], dtype=torch.float64, requires_grad=True)
        >>> losses = {"inner_loss": lambda w, lam: ((w - lam) ** 2).sum(), "params": lam.detach(), "hparams": lam}
        >>> problem = hg.implicit.grad(lambda w, lam: (w**2).sum() / 2, **losses).problem  # ∇f(λ) = λ
        >>> solve = lambda lam: lam  # the inner problem, solved again
        >>> right, wrong = (hg.diagnostics.finite_differences(problem, h, solve) for h in (lam.detach(), -lam.detach()))
        >>> bool(right.relative_error < 1e-6), round(float(wrong.relative_error), 3)
        (True, 2.0)
    """
    problem = problem.again()
    outer = problem.outer_space
    here = outer.pack([x.detach() for x in problem.differentiated])
    given = problem.outer_space.vector(grads, "the hypergradient")
    t = outer.eps**0.2 * max(float(here.norm()), 1.0) if step is None else step
    if not t > 0 or directions < 1:
        raise ValueError(f"step must be positive and directions ≥ 1, got {step!r} and {directions!r}")
    generator = seeded(None)

    def value(hparams: Vector) -> float:
        tree = problem.hparams_with(hparams.copy().leaves)
        params = problem.with_params(problem.space.vector(solve(tree), "the value of solve"))
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
    return Differences(tuple(derivatives), tuple(errors), tuple(along))
