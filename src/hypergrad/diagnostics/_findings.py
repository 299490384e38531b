"""What is wrong with a bilevel problem at a point, found and named: each Finding by a test of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._modules import modules_of
from ..implicit import Problem
from ..operators import GaussNewton
from ._maps import Finding, Near, ignored_params, kink, random, rounding_floor, unreached_hparams, wrong_derivatives
from ._modules import unchanged
from ._structure import Structure, require_real, seeded, structure_of

CERTAIN = 1e-2  # κ · eps above which rounding alone spoils the hypergradient


def findings(
    outer_loss: Callable[[Any, Any], Tensor],
    *,
    params: Any,
    hparams: Any,
    inner_loss: Callable[[Any, Any], Tensor] | None = None,
    fp_map: Callable[[Any, Any], Any] | None = None,
    residual: Callable[[Any, Any], Any] | None = None,
    symmetric: bool = False,
    positive_definite: bool = False,
    batch_dims: int = 0,
    structure: Structure | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Finding, ...]:
    """All that is recognised as wrong with this problem at (w, λ). Nothing found does not prove that nothing is wrong.

    - not symmetric: a fixed point map or residual declared symmetric is not (xᵀAy ≠ yᵀAx for random x, y).
    - indefinite: the Hessian of the inner loss, or an A declared positive definite, has a negative eigenvalue: proven.
    - singular: so many singular values of A are zero to rounding, or κ eps > 1 %.
    - expansion: the spectral radius of ∂₁Φ is above 1, so the map does not converge to this point.
    - stochastic, dropout: two evaluations of a map or loss differ; "dropout" where a module that the callable can be
      seen to use (closure, partial, bound method, global) drops something in training mode.
    - kink: the derivative of ∇₁g, Φ or F jumps at w in a random direction d, or ∇₁g, Φ or F itself does. Compared are
      Jacobian products and values at w ± εd for ε = eps^⅓ and eps^½ (times ‖w‖): those of a smooth map agree better at
      the smaller ε. A kink that moves the products by less than eps^⅙ (0.25 % in float64, 7 % in float32), as that of
      one sample in very many may, is not seen; one nearer than eps^½ ‖w‖ counts as at w.
    - wrong derivative: where there is no kink, finite differences of ∇₁g, Φ or F along random directions of w and of λ
      differ from what autograd gives by more than eps^⅕ (0.07 % in float64, 4 % in float32) and than their own error: a
      value that depends on them was detached, say.
    - rounding floor: the residual is no larger than what a change of w in its last digit makes of it, and that is worth
      more than 1e-8 of ‖w‖. It cannot be solved further in this dtype.
    - outer loss ignores params, hyperparameter reaches nothing: by the graphs of the losses.

    Of a stochastic map one draw is tested, and neither for kinks nor for rounding.

    Args:
        outer_loss, params, hparams, inner_loss, fp_map, residual, symmetric, positive_definite, batch_dims: as in
            `implicit.grad`, all losses and maps callables.
        structure: of A, if it is known already; else it is made.
        generator: of random directions, on the CPU (default: one with a seed of its own).

    Returns: a tuple of Findings. Buffers of visible modules and torch's random state are put back.
    Raises: TypeError, ValueError as `implicit.grad` and `structure` do.
    Cost: three evaluations of the outer loss; 19 of the inner loss or map, with eleven products; those of `structure`.

    Example:
        >>> w, lam = torch.tensor([1.5, 0.0]), torch.tensor(1.0, requires_grad=True)
        >>> every = findings(
        ...     lambda w, lam: w.sum(), inner_loss=lambda w, lam: lam * (w[0] - 1) ** 2, params=w, hparams=lam
        ... )
        >>> [each.name for each in every]
        ['singular']
    """
    require_real(params, "params")
    require_real(hparams, "hparams")
    forms = {"inner_loss": inner_loss, "fp_map": fp_map, "residual": residual}
    for name, given in (("outer_loss", outer_loss), *forms.items()):
        if not callable(given) and (given is not None or name == "outer_loss"):
            raise TypeError(f"{name} must be a callable of (params, hparams), got {type(given).__name__}")
    problem = Problem(
        outer_loss,
        params=params,
        hparams=hparams,
        inner_loss=inner_loss,
        fp_map=fp_map,
        residual=residual,
        symmetric=symmetric,
        positive_definite=positive_definite,
        batch_dims=batch_dims,
    )
    if structure is None:
        structure = structure_of(problem, generator=generator)
    return findings_of(problem, structure, generator)


def findings_of(
    problem: Problem, structure: Structure | None, generator: torch.Generator | None = None
) -> tuple[Finding, ...]:
    """As `findings`, of a Problem; without its structure nothing is said of its system."""
    with unchanged(modules_of(problem.outer_loss, problem.inner), problem.again().space.devices):
        near = Near(problem, seeded(generator))
        drawn = [] if problem.stochastic else random(near, outer=False)
        outer = random(near, outer=True)
        every = [*drawn, *outer, *ignored_params(near), *unreached_hparams(near)]
        if structure is not None:
            every += _system(structure, problem)
        if not drawn and not problem.stochastic:
            every += kink(near) or wrong_derivatives(near, outer=False)
            every += [] if structure is None else rounding_floor(near, structure)
        if not outer:
            every += wrong_derivatives(near, outer=True)
    return tuple(every)


def _system(s: Structure, problem: Problem) -> list[Finding]:
    """What the structure of A shows."""
    kind, found = problem.kind, []
    where = "" if s.system is None else f" (system {s.system})"
    if s.declared_symmetric and not s.symmetric:
        remedy = "leave the declaration out and use GMRES, BiCGStab, NormalCG or LSQR"
        if kind == "inner_loss":
            remedy = (
                "the Hessian of a loss is, so either the systems of batch_dims=1 are not independent, or a derivative "
                "in the loss is wrong (a custom backward)"
            )
        text = f"A was declared symmetric and is not: |xᵀAy − yᵀAx| is {s.asymmetry:.1e} of its size{where}; {remedy}"
        found.append(Finding("not symmetric", text, {"asymmetry": s.asymmetry}))
    if s.symmetric and (kind == "inner_loss" or problem.positive_definite):
        found += _indefinite(s, where, problem)
    if s.singular or s.condition * s.eps > CERTAIN:
        least = f"{s.negligible} {'or more ' * (not s.exact)}singular values of {s.n} are zero to rounding"
        nearly = f"the condition number is at least {s.condition:.1e}, so rounding alone may change 1 % or more of v"
        damping = s.eps**0.5 * s.norm[0]
        text = (
            f"{least if s.singular else nearly}{where}: the inner solution is not unique, or barely; add a "
            f"penalty to the inner problem or damping to the solver (damping={damping:.1g} is √eps ‖A‖), or fix what "
            f"params leave free"
        )
        numbers = {"negligible": float(s.negligible), "condition": s.condition, "least": s.least[1]}
        found.append(Finding("singular", text, numbers | {"damping": damping}))
    surely = s.radius_range[0]
    if kind == "fp_map" and surely > 1 + 10 * math.sqrt(s.n) * s.eps * max(1.0, s.radius):
        text = (
            f"the spectral radius of ∂₁Φ is at least {surely:.6g}{where}: the map moves away from this point, so "
            f"neither it nor FixedPoint converges; use a smaller step in the map; for the adjoint CG, MINRES or GMRES"
        )
        found.append(Finding("expansion", text, {"radius": s.radius, "at least": surely, "norm": s.contraction[0]}))
    return found


def _indefinite(s: Structure, where: str, problem: Problem) -> list[Finding]:
    low, high = float(s.eigenvalues[0].real), float(s.eigenvalues[-1].real)
    if low >= -s.tolerance:
        return []
    negative = sum(float(x.real) < -s.tolerance for x in s.eigenvalues)
    damping = -2 * low
    other = ", or, where inner_loss is a convex loss of a model's outputs, pass operators.GaussNewton(model, loss)"
    if problem.kind != "inner_loss" or isinstance(getattr(problem.inner, "__self__", None), GaussNewton):
        other = ""
    text = (
        f"A has an eigenvalue of at most {low:.3g} (the largest is about {high:.3g}; {negative} of {s.steps} "
        f"Ritz values are negative){where}: params are no minimum of the inner problem; solve it further, give the "
        f"solver damping={damping:.2g}, which makes A positive definite as far as was seen{other}; or "
        f"use MINRES if a saddle is what you mean"
    )
    return [Finding("indefinite", text, {"least eigenvalue": low, "negative": float(negative), "damping": damping})]
