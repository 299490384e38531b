"""What is wrong with a bilevel problem at a point, found and named: each Finding by a test of its own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .. import _autodiff, _graph, _random
from .._autodiff import Linearisation, as_scalar
from .._modules import modules_of
from .._tree import flatten
from .._vector import Vector
from ..implicit import Problem
from ..operators import GaussNewton
from ._error import ratio
from ._structure import Structure, checked, require_callable, seeded, unchanged

REPEATABLE = 1e3  # eps: two evaluations that differ by more are not the same map
ROUNDING = 10.0  # a residual below so many times what one unit in the last place of w changes is rounding
HARMLESS = 1e-8  # relative distance to the solution below which that does not matter
CERTAIN = 1e-2  # κ · eps above which rounding alone spoils the hypergradient


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        name: one of those in `findings`; of `check` also "adjoint unsolved" (v hardly solves its system), "problem
            changed" (since the hypergradient was computed), "finite differences" (they disagree), "estimate unsolved"
            and "max_products" (the estimate could not be finished).
        message: what was seen, with numbers, and what to do.
        numbers: these numbers by name.
    """

    name: str
    message: str
    numbers: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}: {self.message}"


def findings(problem: Problem, structure: Structure | None = None) -> tuple[Finding, ...]:
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
      differ from what autograd gives by more than eps^⅕ (0.07 % in float64, 4 % in float32) and by more than their own
      error: a value that depends on them was detached, say.
    - rounding floor: the residual is no larger than what a change of w in its last digit makes of it, and this amounts
      to more than 1e-8 of ‖w‖. It cannot be solved further in this dtype.
    - outer loss ignores params, hyperparameter reaches nothing: by the graphs of the losses.

    Of a stochastic map one draw is tested, and neither for kinks nor for rounding.

    Args:
        problem: `implicit.Problem(outer_loss, params=..., hparams=..., inner_loss=...)` with functions for losses and
            maps, or that of a result.
        structure: of A; without it nothing is said of the system, nor of rounding.

    Returns: a tuple of Findings. Buffers of visible modules and torch's random state are put back.
    Raises: TypeError for an evaluated loss, or complex hparams.
    Cost: three evaluations of the outer loss; 19 of the inner loss or map, with eleven products.

    Example:
        >>> problem = hg.implicit.Problem(
        ...     lambda w, lam: w.sum(),
        ...     inner_loss=lambda w, lam: lam * (w[0] - 1) ** 2,
        ...     params=torch.tensor([1.5, 0.0]),
        ...     hparams=torch.tensor(1.0, requires_grad=True),
        ... )
        >>> [each.name for each in findings(problem, hg.diagnostics.structure(problem))]
        ['singular']
    """
    require_callable(problem.outer_loss, "outer_loss")
    problem = checked(problem)
    with unchanged(problem):
        near = _Near(problem)
        drawn = [] if problem.stochastic else _random_values(near, outer=False)
        drawn_outside = _random_values(near, outer=True)
        found = [*drawn, *drawn_outside, *_ignored_params(near), *_unreached_hparams(near)]
        if structure is not None:
            found += _of_system(structure, problem)
        if not drawn and not problem.stochastic:
            found += _kink(near) or _wrong_derivatives(near, outer=False)
            found += [] if structure is None else _rounding_floor(near, structure)
        if not drawn_outside:
            found += _wrong_derivatives(near, outer=True)
    return tuple(found)


def _of_system(s: Structure, problem: Problem) -> list[Finding]:
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
        damping = s.eps**0.5 * s.norm
        text = (
            f"{least if s.singular else nearly}{where}: the inner solution is not unique, or barely; add a "
            f"penalty to the inner problem or damping to the solver (damping={damping:.1g} is √eps ‖A‖), or fix what "
            f"params leave free"
        )
        numbers = {"negligible": float(s.negligible), "condition": s.condition, "least": s.least}
        found.append(Finding("singular", text, numbers | {"damping": damping}))
    surely = s.radius_at_least
    if kind == "fp_map" and surely > 1 + 10 * math.sqrt(s.n) * s.eps * max(1.0, s.radius):
        text = (
            f"the spectral radius of ∂₁Φ is at least {surely:.6g}{where}: the map moves away from this point, so "
            f"neither it nor FixedPoint converges; use a smaller step in the map; for the adjoint CG, MINRES or GMRES"
        )
        found.append(Finding("expansion", text, {"radius": s.radius, "at least": surely, "norm": s.contraction}))
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


class _Near:
    """A problem at (w, λ), and at points near by."""

    def __init__(self, problem: Problem):
        self.problem, self.generator = problem, seeded(None)
        self.w = problem.point
        size = self.w.norm()
        self.size = torch.where(size > 0, size, 1.0)

    def name(self, outer: bool) -> str:
        kind = self.problem.kind
        return "outer_loss" if outer else "∇₁ of inner_loss" if kind == "inner_loss" else kind

    def direction(self) -> Vector:
        """A random direction of w's length."""
        d = self.w.random(self.generator)
        return d * (self.size / d.norm())

    def at(self, params: Vector | None = None, hparams: Vector | None = None) -> Problem:
        """The problem at other params or hparams."""
        tree = None
        if hparams is not None:
            tree = self.problem.hparams_with([x.requires_grad_() for x in hparams.copy().leaves])
        return self.problem.again(self.problem.with_params(self.w if params is None else params), tree)

    def outputs(self, problem: Problem, outer: bool) -> list[Tensor]:
        """E, or ∇₁g, Φ or F, with its graph."""
        if not outer:
            return list(problem.linearise().outputs)
        with torch.enable_grad():
            return [as_scalar(problem.outer_loss(*problem.arguments), "outer_loss")]

    def values(self, linearisation: Linearisation) -> Vector:
        return self.w.space.pack([y.detach() for y in linearisation.outputs])

    def residual(self, w: Vector) -> Vector:
        values = self.values(self.at(w).linearise())
        return values - w if self.problem.fixed_point else values


def _random_values(near: _Near, *, outer: bool) -> list[Finding]:
    name, problem = "outer_loss" if outer else near.problem.kind, near.problem
    devices = _random.devices_of(near.w.leaves)
    before = _random.capture(devices)
    first, second = ([y.detach() for y in near.outputs(problem, outer)] for _ in range(2))
    moved = not _random.equal(before, _random.capture(devices))
    apart = math.hypot(*(float((x - y).norm()) for x, y in zip(first, second, strict=True)))
    difference = ratio(apart, max(math.hypot(*(float(x.norm()) for x in each)) for each in (first, second)))
    if not difference > REPEATABLE * near.w.space.eps:
        return []
    text, numbers = (
        f"two evaluations of {name} at the same point differ by {difference:.1e}",
        {"difference": difference},
    )
    dropping = _active_dropout(modules_of(problem.outer_loss if outer else problem.inner))
    if dropping and moved:
        them = f"{', '.join(dropping[:3])} {'is' if len(dropping) == 1 else 'are'}"
        return [Finding("dropout", f"{text}: {them} in training mode; call eval() on the model", numbers)]
    why = "it draws from torch's random state (dropout, or noise)" if moved else "it uses other data, or other noise"
    remedy = "" if outer else ", or pass it as operators.Stochastic"
    return [Finding("stochastic", f"{text}: {why}; make it repeatable{remedy}", numbers)]


def _active_dropout(modules: Iterable[nn.Module]) -> list[str]:
    """Names of the submodules in training mode that drop something."""
    names = []
    for module in modules:
        for name, part in module.named_modules():
            rate = getattr(part, "p", 0.0) if "Dropout" in type(part).__name__ else getattr(part, "dropout", 0.0)
            if part.training and isinstance(rate, float) and rate > 0:
                names.append(f"{type(module).__name__}{'.' * bool(name)}{name} ({type(part).__name__})")
    return names


def _ignored_params(near: _Near) -> list[Finding]:
    if _graph.depends(near.outputs(near.problem, True), near.problem.leaves):
        return []
    text = (
        "outer_loss does not depend on params, so nothing goes through the inner problem: was it computed from other "
        "tensors (a live model instead of the argument), detached, or under no_grad?"
    )
    return [Finding("outer loss ignores params", text)]


def _unreached_hparams(near: _Near) -> list[Finding]:
    leaves, names, _ = flatten(near.problem.hparams, "hparams")
    ends = [*near.outputs(near.problem, False), *near.outputs(near.problem, True)]
    given = [(x, name) for x, name in zip(leaves, names, strict=True) if x.requires_grad and x.numel()]
    lost = [name for x, name in given if not _graph.depends(ends, [x])]
    what = near.name(False)
    if len(lost) == len(given) > 0:
        text = (
            f"neither {what} nor outer_loss depends on hparams, so the hypergradient is zero: were they read as "
            f"numbers (.item(), float(), .data), detached, or are other tensors used in their place?"
        )
        return [Finding("hyperparameter reaches nothing", text)]
    text = "{} stands neither in {} nor in outer_loss, so its hypergradient is zero; leave it out?"
    return [Finding("hyperparameter reaches nothing", text.format(name, what)) for name in lost]


def _kink(near: _Near) -> list[Finding]:
    eps = near.w.space.eps
    d, u = near.direction(), near.w.random(near.generator)
    u = u / u.norm()

    def on_side(step: float) -> tuple[Vector, Vector]:
        """The value and a product at w + step · d, from a graph that is used before another evaluation."""
        there = near.at(near.w + d * step).linearise()
        return near.values(there), near.w.space.pack(there.vjp(u.leaves))

    base = on_side(0.0)[1].norm()
    changes, jumps = [], []
    for step in (eps ** (1 / 3), eps**0.5):
        (value, product), (other_value, other_product) = on_side(step), on_side(-step)
        size = torch.maximum(base, torch.maximum(product.norm(), other_product.norm()))
        changes.append(_ratio((product - other_product).norm(), size))
        jumps.append(_ratio((value - other_value).norm(), size * near.size))
    # Of several systems the one that shows it most.
    turned = _largest(torch.where(changes[1] > 0.5 * changes[0], changes[1], 0.0))
    jumped = _largest(torch.where(jumps[1] > 0.5 * jumps[0], jumps[1] / (30 * eps**0.5), 0.0))
    what = near.name(False)
    remedy = (
        "an implicit derivative there is one of several; smooth the map (softplus for relu), pass the proximal step of "
        "an L1 term as fp_map, or move off the kink"
    )
    if jumped > 1:
        text = f"{what} itself jumps at params (by {_largest(jumps[1]):.1e} of ‖A‖ ‖w‖ in a random direction): {remedy}"
        return [Finding("kink", text, {"jump": _largest(jumps[1])})]
    if turned > eps ** (1 / 6):
        text = f"the derivative of {what} jumps at params (products on two sides differ by {turned:.1%}): {remedy}"
        return [Finding("kink", text, {"change": turned})]
    return []


def _wrong_derivatives(near: _Near, *, outer: bool) -> list[Finding]:
    """Finite differences of a loss or map along directions of w and of λ, against the derivatives of its graph."""
    eps, problem = near.w.space.eps, near.problem
    given = problem.outer_space.pack([x.detach() for x in problem.differentiated])
    # Relative to each entry, so that its sign stays.
    drawn = given.random(near.generator).leaves
    across = [torch.where(x == 0, u, x * u) for x, u in zip(given.leaves, drawn, strict=True)]
    outputs, t = near.outputs(problem, outer), eps ** (1 / 3)
    moves = [("params", problem.leaves, near.w, near.direction())]
    moves += [("hparams", problem.differentiated, given, problem.outer_space.pack(across))]
    found = []
    for name, inputs, start, along in moves:
        before, after = (near.outputs(near.at(**{name: start + along * step}), outer) for step in (-t, t))
        change, doubt = _differences([x.detach() for x in outputs], before, after, t, eps)
        sizes = [float(x.norm()) for x in change]
        least, numbers = t * max(sizes) or 1.0, []
        for _ in range(4):  # with weights that give each leaf a say
            y = [_normal(x, near.generator) / max(size, least) for x, size in zip(change, sizes, strict=True)]
            exact = _autodiff.grad(outputs, inputs, y, retain_graph=True)
            rounding = math.hypot(*(float((a * b).norm()) for a, b in zip(y, doubt, strict=True)))
            numbers.append([_dot(exact, along.leaves), _dot(y, change), rounding])
        exact, measured, error = torch.tensor(numbers, dtype=torch.float64, device="cpu").mT
        off, size = float((measured - exact).norm()), float(torch.maximum(exact.norm(), measured.norm()))
        if off > eps**0.2 * size and off > 2 * float(error.norm()):
            text = (
                f"along a random direction of {name} {near.name(outer)} changes otherwise than its derivative says, by "
                f"{off / size:.1%}: something in it that depends on {name} was detached (.detach(), .item(), .data, "
                f"no_grad, NumPy), or a custom backward is wrong, or it has very many kinks; the hypergradient is that "
                f"of the derivative"
            )
            found.append(Finding("wrong derivative", text, {"difference": off / size}))
    return found


def _differences(
    here: list[Tensor], before: list[Tensor], after: list[Tensor], t: float, eps: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Central differences, and what they may be off by: forward less backward ones (a kink), and rounding."""
    change, doubt = [], []
    for x, minus, plus in zip(here, before, after, strict=True):
        change.append((plus.detach() - minus.detach()) / (2 * t))
        doubt.append((plus.detach() + minus.detach() - 2 * x).abs() / t + 10 * eps / t * x.abs())
    return change, doubt


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device="cpu").to(like.device)


def _dot(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> float:
    return sum(float((x.detach() * y).sum()) for x, y in zip(xs, ys, strict=True))


def _rounding_floor(near: _Near, s: Structure) -> list[Finding]:
    here = near.residual(near.w)
    least, noise = here.norm(), here.norm() * 0
    for _ in range(3):
        moved = near.w.space.pack([_nudged(x, near.generator) for x in near.w.leaves])
        noise = torch.maximum(noise, (near.residual(moved) - here).norm())
    at_floor = bool((least <= ROUNDING * noise).all())
    away = _largest(noise / near.size) / max(s.least, s.tolerance) if s.norm > 0 else math.inf
    if not at_floor or not away > HARMLESS:
        return []
    dtype = str(near.w.space.dtype).removeprefix("torch.")
    text = (
        f"the inner residual, {_largest(least):.1e}, is rounding in {dtype}: params changed in their last digit change "
        f"it by {_largest(noise):.1e}. It cannot fall further, and params may be {away:.1e} of their norm away from "
        f"the solution; use float64 where that is too much"
    )
    return [Finding("rounding floor", text, {"residual": _largest(least), "noise": _largest(noise), "distance": away})]


def _nudged(x: Tensor, generator: torch.Generator) -> Tensor:
    """x with each entry moved by about one unit in its last place, up or down."""
    sign = 2 * torch.randint(2, x.shape, generator=generator, device="cpu").to(x) - 1
    return x + x * sign * torch.finfo(x.dtype).eps


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a == 0, 0.0, a / b)


def _largest(x: Tensor) -> float:
    return float(x.max())
