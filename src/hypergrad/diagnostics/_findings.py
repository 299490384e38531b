"""What is wrong with a bilevel problem at a point, found and named: each Finding by a test of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import _graph
from .._autodiff import Linearisation, as_scalar
from .._tree import flatten
from .._vector import Vector
from ..implicit import InnerProblem, Problem, Variables
from ._modules import active_dropout, random_state, unchanged, visible_modules
from ._structure import Structure, structure_of

REPEATABLE = 1e3  # eps: two evaluations that differ by more are not the same map
ROUNDING = 10.0  # a residual below so many times what one unit in the last place of w changes is rounding
HARMLESS = 1e-8  # relative distance to the solution below which that does not matter
CERTAIN = 1e-2  # κ · eps above which rounding alone spoils the hypergradient


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        name: one of "not symmetric", "indefinite", "singular", "expansion", "stochastic", "dropout", "kink",
            "rounding floor", "outer loss ignores params", "hyperparameter reaches nothing".
        message: what was seen, with numbers, and what to do.
        numbers: these numbers by name.
    """

    name: str
    message: str
    numbers: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}: {self.message}"


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
    found: Structure | None = None,
    seed: int = 0,
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
    - rounding floor: the residual is no larger than what a change of w in its last digit makes of it, and that is worth
      more than 1e-8 of ‖w‖. It cannot be solved further in this dtype.
    - outer loss ignores params, hyperparameter reaches nothing: by the graphs of the losses.

    Of a stochastic map one draw is looked at, and neither kink nor rounding floor.

    Args:
        outer_loss, params, hparams, inner_loss, fp_map, residual, symmetric, positive_definite, batch_dims: as in
            `implicit.grad`, all losses and maps callables.
        found: the Structure, if it is known already; else it is made.
        seed: of a generator of its own.

    Returns: a tuple of Findings. Buffers of visible modules and torch's random state are put back.
    Raises: TypeError, ValueError as `implicit.grad` and `structure` do.
    Cost: two evaluations of the outer loss; eleven of the inner loss or map, with five products; those of `structure`.

    Example:
        >>> w, lam = torch.tensor([1.5, 0.0]), torch.tensor(1.0, requires_grad=True)
        >>> every = findings(
        ...     lambda w, lam: w.sum(), inner_loss=lambda w, lam: lam * (w[0] - 1) ** 2, params=w, hparams=lam
        ... )
        >>> [each.name for each in every]
        ['singular']
    """
    inner = InnerProblem.of(inner_loss, fp_map, residual)
    problem = Problem(outer_loss, inner, params, hparams, symmetric, positive_definite, batch_dims=batch_dims)
    return findings_of(problem, found=found, seed=seed)


def findings_of(problem: Problem, *, found: Structure | None = None, seed: int = 0) -> tuple[Finding, ...]:
    """As `findings`, of a Problem; of one that is declared stochastic one draw is looked at, and that is no finding."""
    inner, variables = problem.inner, problem.variables
    for name, given in (("outer_loss", problem.outer_loss), (inner.kind, inner.given)):
        if not callable(given):
            raise TypeError(f"{name} must be a callable of (params, hparams), got {type(given).__name__}")
    with unchanged(visible_modules(problem.outer_loss, inner.given), variables.space.devices):
        place = Place(problem, variables, torch.Generator().manual_seed(seed))
        random = [] if problem.stochastic else _random(place, outer=False)
        every = [*random, *_random(place, outer=True), *_ignored_params(place), *_unreached_hparams(place)]
        if found is None:
            found = structure_of(problem, seed=seed)
        every += _system(found, inner.kind, problem.positive_definite)
        if not random and not problem.stochastic:
            every += [*_kink(place), *_floor(place, found)]
    return tuple(every)


class Place:
    """A problem at (w, λ), and at other w."""

    def __init__(self, problem: Problem, variables: Variables, generator: torch.Generator):
        self.outer_loss, self.inner = problem.outer_loss, problem.inner
        self.variables, self.generator = variables, generator
        self.here = variables.space.pack([leaf.detach() for leaf in variables.given])
        size = self.here.norm()
        self.size = torch.where(size > 0, size, 1.0)
        self.linearisation = self.inner.linearise(variables)

    def at(self, w: Vector) -> Linearisation:
        """The graph of ∇₁g, Φ or F at w."""
        moved = Variables(w.tree, self.variables.hparams, w.space.batch_dims)
        return self.inner.linearise(moved)

    def values(self, linearisation: Linearisation) -> Vector:
        return self.here.space.pack([y.detach() for y in linearisation.outputs])

    def residual(self, w: Vector) -> Vector:
        values = self.values(self.at(w))
        return values - w if self.inner.kind == "fp_map" else values

    def outer(self) -> Tensor:
        with torch.enable_grad():
            value = self.outer_loss(self.variables.params, self.variables.hparams)
        loss = as_scalar(value, "outer_loss")
        self.variables.check_reached([loss], "outer_loss")
        return loss


def _random(place: Place, *, outer: bool) -> list[Finding]:
    name = "outer_loss" if outer else place.inner.kind
    devices = place.here.space.devices
    before = random_state(devices)
    first, second = (
        place.outer().detach().reshape(1) if outer else place.values(place.at(place.here)).flat() for _ in range(2)
    )
    moved = random_state(devices) != before
    size = torch.maximum(first.norm(), second.norm())
    difference = _largest(_ratio((first - second).norm(), size))
    if not difference > REPEATABLE * place.here.space.eps:
        return []
    numbers = {"difference": difference}
    given = place.outer_loss if outer else place.inner.given
    dropping = active_dropout(visible_modules(given))
    if dropping and moved:
        text = (
            f"two evaluations of {name} differ by {difference:.1e}: {', '.join(dropping[:3])} "
            f"{'is' if len(dropping) == 1 else 'are'} in training mode; call eval() on the model"
        )
        return [Finding("dropout", text, numbers)]
    why = "it draws from torch's random state (dropout, or noise)" if moved else "it uses other data, or other noise"
    remedy = "" if outer else ", or pass stochastic=True to implicit.grad"
    text = f"two evaluations of {name} at the same point differ by {difference:.1e}: {why}; make it repeatable{remedy}"
    return [Finding("stochastic", text, numbers)]


def _ignored_params(place: Place) -> list[Finding]:
    if _graph.depends([place.outer()], place.variables.leaves):
        return []
    text = (
        "outer_loss does not depend on params, so nothing goes through the inner problem: was it computed from other "
        "tensors (a live model instead of the argument), detached, or under no_grad?"
    )
    return [Finding("outer loss ignores params", text)]


def _unreached_hparams(place: Place) -> list[Finding]:
    leaves, names, _ = flatten(place.variables.hparams, "hparams")
    outputs = [*place.linearisation.outputs, place.outer()]
    found = []
    for leaf, name in zip(leaves, names, strict=True):
        if leaf.requires_grad and not _graph.depends(outputs, [leaf]):
            what = "∇₁ of inner_loss" if place.inner.kind == "inner_loss" else place.inner.kind
            text = f"{name} stands neither in {what} nor in outer_loss, so its hypergradient is zero; leave it out?"
            found.append(Finding("hyperparameter reaches nothing", text))
    return found


def _system(s: Structure, kind: str, positive_definite: bool) -> list[Finding]:
    """What the structure of A shows."""
    found = []
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
    if s.symmetric and (kind == "inner_loss" or positive_definite):
        low, high = float(s.eigenvalues[0].real), float(s.eigenvalues[-1].real)
        if low < -s.tolerance:
            negative = sum(float(x.real) < -s.tolerance for x in s.eigenvalues)
            text = (
                f"A has an eigenvalue of at most {low:.3g} (the largest is about {high:.3g}; {negative} of {s.steps} "
                f"Ritz values are negative){where}: params are no minimum of the inner problem; solve it further, add "
                f"damping, or use MINRES if a saddle is what you mean"
            )
            found.append(Finding("indefinite", text, {"least eigenvalue": low, "negative": float(negative)}))
    if s.singular or s.condition * s.eps > CERTAIN:
        least = f"{s.negligible} {'or more ' * (not s.exact)}singular values of {s.n} are zero to rounding"
        nearly = f"the condition number is at least {s.condition:.1e}, so rounding alone may change 1 % or more of v"
        text = (
            f"{least if s.singular else nearly}{where}: the inner solution is not unique, or barely; add a "
            f"penalty to the inner problem or damping to the solver, or fix what params leave free"
        )
        numbers = {"negligible": float(s.negligible), "condition": s.condition, "least": s.least[1]}
        found.append(Finding("singular", text, numbers))
    surely = s.radius_range[0]
    if kind == "fp_map" and surely > 1 + 10 * math.sqrt(s.n) * s.eps * max(1.0, s.radius):
        text = (
            f"the spectral radius of ∂₁Φ is at least {surely:.6g}{where}: the map moves away from this point, so "
            f"neither it nor FixedPoint converges; use a smaller step in the map; for the adjoint CG, MINRES or GMRES"
        )
        found.append(Finding("expansion", text, {"radius": s.radius, "at least": surely, "norm": s.contraction[0]}))
    return found


def _kink(place: Place) -> list[Finding]:
    eps = place.here.space.eps
    d, u = (place.here.random(place.generator) for _ in range(2))
    d, u = d * (place.size / d.norm()), u / u.norm()

    def look(step: float) -> tuple[Vector, Vector]:
        """The value and a product at w + step · d, from a graph that is used before another evaluation."""
        there = place.at(place.here + d * step)
        return place.values(there), place.here.space.pack(there.vjp(u.leaves))

    base = look(0.0)[1].norm()
    changes, jumps = [], []
    for step in (eps ** (1 / 3), eps**0.5):
        (value, product), (other_value, other_product) = look(step), look(-step)
        size = torch.maximum(base, torch.maximum(product.norm(), other_product.norm()))
        changes.append(_ratio((product - other_product).norm(), size))
        jumps.append(_ratio((value - other_value).norm(), size * place.size))
    # Of several systems the one that shows it most.
    turned = _largest(torch.where(changes[1] > 0.5 * changes[0], changes[1], 0.0))
    jumped = _largest(torch.where(jumps[1] > 0.5 * jumps[0], jumps[1] / (30 * eps**0.5), 0.0))
    what = {"inner_loss": "∇₁ of inner_loss"}.get(place.inner.kind, place.inner.kind)
    remedy = "an implicit derivative there is one of several; smooth the map (softplus for relu), or move off the kink"
    if jumped > 1:
        text = f"{what} itself jumps at params (by {_largest(jumps[1]):.1e} of ‖A‖ ‖w‖ in a random direction): {remedy}"
        return [Finding("kink", text, {"jump": _largest(jumps[1])})]
    if turned > eps ** (1 / 6):
        text = f"the derivative of {what} jumps at params (products on two sides differ by {turned:.1%}): {remedy}"
        return [Finding("kink", text, {"change": turned})]
    return []


def _floor(place: Place, s: Structure) -> list[Finding]:
    here = place.residual(place.here)
    least, noise = here.norm(), here.norm() * 0
    for _ in range(3):
        moved = place.here.space.pack([_nudged(x, place.generator) for x in place.here.leaves])
        noise = torch.maximum(noise, (place.residual(moved) - here).norm())
    at_floor = bool((least <= ROUNDING * noise).all())
    away = _largest(noise / place.size) / max(s.least[1], s.tolerance) if s.norm[0] > 0 else math.inf
    if not at_floor or not away > HARMLESS:
        return []
    dtype = str(place.here.space.dtype).removeprefix("torch.")
    text = (
        f"the inner residual, {_largest(least):.1e}, is rounding in {dtype}: params changed in their last digit change "
        f"it by {_largest(noise):.1e}. It cannot fall further, and params may be {away:.1e} of their norm away from "
        f"the solution; use float64 where that is too much"
    )
    return [Finding("rounding floor", text, {"residual": _largest(least), "noise": _largest(noise), "distance": away})]


def _nudged(x: Tensor, generator: torch.Generator) -> Tensor:
    """x with each entry moved by about one unit in its last place, up or down."""
    sign = 2 * torch.randint(2, x.shape, generator=generator).to(x) - 1
    return x + x * sign * torch.finfo(x.dtype).eps


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a == 0, 0.0, a / b)


def _largest(x: Tensor) -> float:
    return float(x.max())
