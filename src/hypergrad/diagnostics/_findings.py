"""Tests for what can be wrong with a bilevel problem at a point, one for each kind of Finding."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .. import _autodiff, _graph, _random
from .._autodiff import Linearisation, as_scalar
from .._modules import modules_of
from .._tree import difference, flatten
from .._vector import Vector, ratio
from ..implicit import Problem
from ..operators import has_curvature
from ._structure import Structure, checked, require_callable, seeded, unchanged

REPEATABLE = 1e3  # relative difference of two evaluations, in units of eps, above which a map is not deterministic
ROUNDING = 10.0  # a residual is rounding if it is below this multiple of its change when w changes in the last digit
HARMLESS = 1e-8  # relative distance to the solution below which a residual that is rounding is no finding
ILL_CONDITIONED = 1e-2  # κ · eps above which rounding alone spoils the hypergradient


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a problem or a hypergradient.

    Attributes:
        name: one of the names in `findings`; `check` adds "adjoint unsolved" (v hardly solves its system), "problem
            changed" (since the hypergradient was computed), "finite differences" (they disagree with it), "estimate
            unsolved" and "max_products" (the estimate could not be completed).
        message: what was found, with numbers, and what to do.
        numbers: the same numbers by name.

    Example:
        >>> lam = torch.tensor([3.0, 1.0], dtype=torch.float64, requires_grad=True)
        >>> saddle = lambda w, lam: (w[0] - lam[0]) ** 2 - (w[1] - lam[1]) ** 2
        >>> result = hg.implicit.grad(
        ...     lambda w, lam: (w**2).sum() / 2,
        ...     inner_loss=saddle,
        ...     params=lam.detach(),
        ...     hparams=lam,
        ...     solver=hg.solvers.MINRES(),
        ... )
        >>> [finding.name for finding in hg.diagnostics.check(result).findings]
        ['indefinite']
    """

    name: str
    message: str
    numbers: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}: {self.message}"


def findings(problem: Problem, structure: Structure | None = None) -> tuple[Finding, ...]:
    """Test a problem at (w, λ) for known defects. An empty result proves nothing.

    - not symmetric: A was declared symmetric, and xᵀAy ≠ yᵀAx for random x, y.
    - indefinite: the Hessian of the inner loss, or an A declared positive definite, provably has a negative eigenvalue.
    - singular: some singular values of A are zero to rounding, or κ eps > 1 %.
    - expansion: the spectral radius of ∂₁Φ is above 1, so the map does not converge to this point.
    - stochastic, dropout: two evaluations of a map or loss differ; "dropout" if a module that can be seen (in a
      closure, partial, bound method or global) drops something in training mode.
    - kink: ∇₁g, Φ or F, or a product with its derivative, jumps between w − εd and w + εd for a random d: its change
      hardly shrinks from ε = eps^⅓ ‖w‖ to eps^½ ‖w‖; of a product it exceeds eps^⅙ (0.25 % in float64, 7 % in float32).
    - wrong derivative: finite differences of the outer loss and, if there is no kink, of ∇₁g, Φ or F along random
      directions of w and λ differ from autograd's derivative by more than eps^⅕ (0.07 % in float64, 4 % in float32)
      and by more than their own error.
    - rounding floor: changing w in its last digit changes the residual by a tenth of it or more, and w may be off by
      more than 1e-8 of its norm. The inner problem cannot be solved further in this dtype.
    - outer loss ignores params, hyperparameter reaches nothing: by the graphs of the losses.

    A stochastic map is tested at one draw, and not for kinks, wrong derivatives and rounding.

    Args:
        problem: `implicit.Problem(outer_loss, params=..., hparams=..., inner_loss=...)` with functions for losses and
            maps, or the problem of a result.
        structure: the structure of A; without it, the linear system and rounding are not tested.

    Returns: a tuple of Findings. Buffers of visible modules and torch's random state are restored.
    Raises: TypeError for an evaluated loss, or complex hparams.
    Cost: 9 evaluations of the outer loss, with 8 reverse passes; 17 of the inner loss or map, with 13 products.

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
        drawn = [*_random_values(near, outer=False)] if not problem.stochastic else []
        drawn_outside = [*_random_values(near, outer=True)]
        found = [*drawn, *drawn_outside, *_ignored_params(near), *_unreached_hparams(near)]
        if structure is not None:
            found += _system_defects(structure, problem)
        if not drawn and not problem.stochastic:
            found += [*_kink(near)] or _wrong_derivatives(near, outer=False)
            found += [] if structure is None else _rounding_floor(near, structure)
        if not drawn_outside:
            found += _wrong_derivatives(near, outer=True)
    return tuple(found)


def _system_defects(s: Structure, problem: Problem) -> Iterator[Finding]:
    """Findings from the structure of A."""
    kind, where = problem.kind, "" if s.system is None else f" (system {s.system})"
    if s.declared_symmetric and not s.symmetric:
        remedy = "leave the declaration out and use GMRES, BiCGStab, NormalCG or LSQR"
        if kind == "inner_loss":
            remedy = (
                "a Hessian is symmetric, so either the systems of batch_dims=1 are not independent, or a derivative in "
                "the loss is wrong (a custom backward)"
            )
        text = f"A was declared symmetric and is not: |xᵀAy − yᵀAx| is {s.asymmetry:.1e} of its size{where}; {remedy}"
        yield Finding("not symmetric", text, {"asymmetry": s.asymmetry})
    low, high = float(s.eigenvalues[0].real), float(s.eigenvalues[-1].real)
    if s.symmetric and (kind == "inner_loss" or problem.positive_definite) and low < -s.tolerance:
        negative, damping = sum(float(x.real) < -s.tolerance for x in s.eigenvalues), -2 * low
        other = ", or, where inner_loss is a convex loss of a model's outputs, pass operators.GaussNewton(model, loss)"
        if kind != "inner_loss" or has_curvature(getattr(problem.inner, "__self__", None)):
            other = ""
        text = (
            f"A has an eigenvalue of at most {low:.3g} (the largest is about {high:.3g}; {negative} of {s.steps} "
            f"Ritz values are negative){where}: params are not at a minimum of the inner problem; solve it further, "
            f"give the solver damping={damping:.2g}, which makes A positive definite as far as was seen{other}; or "
            f"use MINRES if a saddle is what you mean"
        )
        numbers = {"least eigenvalue": low, "negative": float(negative), "damping": damping}
        yield Finding("indefinite", text, numbers)
    if s.singular or s.condition * s.eps > ILL_CONDITIONED:
        least = f"{s.negligible} {'or more ' * (not s.exact)}singular values of {s.n} are zero to rounding"
        nearly = f"the condition number is at least {s.condition:.1e}, so rounding alone may change 1 % or more of v"
        damping = s.eps**0.5 * s.norm
        text = (
            f"{least if s.singular else nearly}{where}: the inner solution is not unique, or barely so; add a "
            f"penalty to the inner problem or damping to the solver (damping={damping:.1g} is √eps ‖A‖), or remove "
            f"redundant params"
        )
        numbers = {"negligible": float(s.negligible), "condition": s.condition, "least": s.least}
        yield Finding("singular", text, numbers | {"damping": damping})
    radius = s.radius_at_least
    if kind == "fp_map" and radius > 1 + 10 * math.sqrt(s.n) * s.eps * max(1.0, s.radius):
        text = (
            f"the spectral radius of ∂₁Φ is at least {radius:.6g}{where}: the map moves away from this point, so "
            f"neither it nor FixedPoint converges; use a smaller step in the map; for the adjoint CG, MINRES or GMRES"
        )
        yield Finding("expansion", text, {"radius": s.radius, "at least": radius, "norm": s.contraction})


class _Near:
    """Evaluates a problem at (w, λ) and at nearby points."""

    def __init__(self, problem: Problem):
        self.problem, self.generator = problem, seeded(None)
        self.w = problem.point
        size = self.w.norm()
        self.size = torch.where(size > 0, size, 1.0)
        self.map = "∇₁ of inner_loss" if problem.kind == "inner_loss" else problem.kind

    def direction(self) -> Vector:
        """A random vector with the norm of w (1 if w = 0)."""
        d = self.w.random(self.generator)
        return d * (self.size / d.norm())

    def at(self, params: Vector | None = None, hparams: Vector | None = None) -> Problem:
        tree = None
        if hparams is not None:
            tree = self.problem.hparams_with([x.requires_grad_() for x in hparams.copy().leaves])
        return self.problem.again(self.problem.with_params(self.w if params is None else params), tree)

    def values(self, linearisation: Linearisation) -> Vector:
        return self.w.space.pack([y.detach() for y in linearisation.outputs])

    def residual(self, w: Vector) -> Vector:
        values = self.values(self.at(w).linearise())
        return values - w if self.problem.fixed_point else values


def _outputs(problem: Problem, outer: bool) -> list[Tensor]:
    """E if outer, else ∇₁g, Φ or F, with its graph."""
    if not outer:
        return list(problem.linearise().outputs)
    with torch.enable_grad():
        return [as_scalar(problem.outer_loss(*problem.arguments), "outer_loss")]


def _random_values(near: _Near, *, outer: bool) -> Iterator[Finding]:
    name, problem = "outer_loss" if outer else near.problem.kind, near.problem
    devices = _random.devices_of(near.w.leaves)
    before = _random.capture(devices)
    first, second = ([y.detach() for y in _outputs(problem, outer)] for _ in range(2))
    drew = not _random.equal(before, _random.capture(devices))
    sizes = [_norm(each) for each in (difference(first, second), first, second)]
    apart = ratio(sizes[0], max(sizes[1:]))
    if not apart > REPEATABLE * near.w.space.eps:
        return
    text = f"two evaluations of {name} at the same point differ by {apart:.1e}"
    dropping = _active_dropout(modules_of(problem.outer_loss if outer else problem.inner))
    if dropping and drew:
        them = f"{', '.join(dropping[:3])} {'is' if len(dropping) == 1 else 'are'}"
        text = f"{text}: {them} in training mode; call eval() on the model"
        yield Finding("dropout", text, {"difference": apart})
        return
    why = "it draws from torch's random state (dropout, or noise)" if drew else "it uses other data, or other noise"
    remedy = "" if outer else ", or pass it as operators.Stochastic"
    yield Finding("stochastic", f"{text}: {why}; make it repeatable{remedy}", {"difference": apart})


def _active_dropout(modules: Iterable[nn.Module]) -> list[str]:
    """Names of the submodules in training mode that drop something."""
    names = []
    for module in modules:
        for name, part in module.named_modules():
            rate = getattr(part, "p", 0.0) if "Dropout" in type(part).__name__ else getattr(part, "dropout", 0.0)
            if part.training and isinstance(rate, float) and rate > 0:
                names.append(f"{type(module).__name__}{'.' * bool(name)}{name} ({type(part).__name__})")
    return names


def _ignored_params(near: _Near) -> Iterator[Finding]:
    if _graph.depends(_outputs(near.problem, True), near.problem.leaves):
        return
    text = (
        "outer_loss does not depend on params, so nothing goes through the inner problem: was it computed from other "
        "tensors (a live model instead of the argument), detached, or under no_grad?"
    )
    yield Finding("outer loss ignores params", text)


def _unreached_hparams(near: _Near) -> Iterator[Finding]:
    leaves, names, _ = flatten(near.problem.hparams, "hparams")
    ends = [*_outputs(near.problem, False), *_outputs(near.problem, True)]
    given = [(x, name) for x, name in zip(leaves, names, strict=True) if x.requires_grad and x.numel()]
    lost = [name for x, name in given if not _graph.depends(ends, [x])]
    if len(lost) == len(given) > 0:
        text = (
            f"neither {near.map} nor outer_loss depends on hparams, so the hypergradient is zero: were they read as "
            f"numbers (.item(), float(), .data), detached, or are other tensors used in their place?"
        )
        yield Finding("hyperparameter reaches nothing", text)
        return
    for name in lost:
        text = f"{name} appears neither in {near.map} nor in outer_loss, so its hypergradient is zero; leave it out?"
        yield Finding("hyperparameter reaches nothing", text)


def _kink(near: _Near) -> Iterator[Finding]:
    eps = near.w.space.eps
    d, u = near.direction(), near.w.random(near.generator)
    u = u / u.norm()

    def at(step: float) -> tuple[Vector, Vector]:
        """The value and a product at w + step · d, both computed before the next evaluation."""
        linearisation = near.at(near.w + d * step).linearise()
        return near.values(linearisation), near.w.space.pack(linearisation.vjp(u.leaves))

    base = at(0.0)[1].norm()
    changes, jumps = [], []
    for step in (eps ** (1 / 3), eps**0.5):
        (value, product), (other_value, other_product) = at(step), at(-step)
        size = torch.maximum(base, torch.maximum(product.norm(), other_product.norm()))
        changes.append(ratio((product - other_product).norm(), size))
        jumps.append(ratio((value - other_value).norm(), size * near.size))
    # The largest of all systems.
    turned = float(torch.where(changes[1] > 0.5 * changes[0], changes[1], 0.0).max())
    jumped = float(torch.where(jumps[1] > 0.5 * jumps[0], jumps[1] / (30 * eps**0.5), 0.0).max())
    remedy = (
        "the implicit derivative is not unique there; smooth the map (softplus for relu), pass the proximal step of an "
        "L1 term as fp_map, or move off the kink"
    )
    if jumped > 1:
        jump = float(jumps[1].max())
        text = f"{near.map} itself jumps at params (by {jump:.1e} of ‖A‖ ‖w‖ in a random direction): {remedy}"
        yield Finding("kink", text, {"jump": jump})
    elif turned > eps ** (1 / 6):
        text = f"the derivative of {near.map} jumps at params (products on two sides differ by {turned:.1%}): {remedy}"
        yield Finding("kink", text, {"change": turned})


def _wrong_derivatives(near: _Near, *, outer: bool) -> Iterator[Finding]:
    """Compare finite differences of a loss or map along directions of w and of λ with the derivatives of its graph."""
    eps, problem = near.w.space.eps, near.problem
    given = problem.outer_space.pack([x.detach() for x in problem.differentiated])
    # Relative to each entry, which keeps its sign.
    drawn = given.random(near.generator).leaves
    across = [torch.where(x == 0, u, x * u) for x, u in zip(given.leaves, drawn, strict=True)]
    outputs, t = _outputs(problem, outer), eps ** (1 / 3)
    moves = [("params", problem.leaves, near.w, near.direction())]
    moves += [("hparams", problem.differentiated, given, problem.outer_space.pack(across))]
    for name, inputs, start, along in moves:
        sides = [_outputs(near.at(**{name: start + along * step}), outer) for step in (-t, t)]
        change, doubt = [], []  # central differences, and their error from one-sided ones (at kinks) and rounding
        for x, *others in zip(outputs, *sides, strict=True):
            minus, here, plus = (y.detach() for y in (others[0], x, others[1]))
            change.append((plus - minus) / (2 * t))
            doubt.append((plus + minus - 2 * here).abs() / t + 10 * eps / t * here.abs())
        sizes = [float(x.norm()) for x in change]
        least, numbers = t * max(sizes) or 1.0, []
        for _ in range(4):  # random weights of the outputs, scaled so that each leaf counts
            drawn = [torch.randn(x.shape, generator=near.generator, dtype=x.dtype, device="cpu") for x in change]
            y = [r.to(x.device) / max(size, least) for r, x, size in zip(drawn, change, sizes, strict=True)]
            exact = _autodiff.grad(outputs, inputs, y, retain_graph=True)
            rounding = _norm([a * b for a, b in zip(y, doubt, strict=True)])
            numbers.append([_dot(exact, along.leaves), _dot(y, change), rounding])
        exact, measured, error = torch.tensor(numbers, dtype=torch.float64, device="cpu").mT
        off, size = float((measured - exact).norm()), float(torch.maximum(exact.norm(), measured.norm()))
        if off > eps**0.2 * size and off > 2 * float(error.norm()):
            text = (
                f"along a random direction of {name} the change of {'outer_loss' if outer else near.map} differs from "
                f"what its derivative says by {off / size:.1%}: something in it that depends on {name} was detached "
                f"(.detach(), .item(), .data, no_grad, NumPy), or a custom backward is wrong, or it has very many "
                f"kinks; the hypergradient is that of the derivative"
            )
            yield Finding("wrong derivative", text, {"difference": off / size})


def _norm(xs: Sequence[Tensor]) -> float:
    return math.hypot(*(float(x.norm()) for x in xs))


def _dot(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> float:
    return sum(float((x.detach() * y).sum()) for x, y in zip(xs, ys, strict=True))


def _rounding_floor(near: _Near, s: Structure) -> Iterator[Finding]:
    residual = near.residual(near.w)
    least, noise = residual.norm(), residual.norm() * 0
    for _ in range(3):  # each entry of w moved by about one unit in its last place, up or down
        signs = [2 * torch.randint(2, x.shape, generator=near.generator, device="cpu") - 1 for x in near.w.leaves]
        moved = [x + x * sign.to(x) * torch.finfo(x.dtype).eps for x, sign in zip(near.w.leaves, signs, strict=True)]
        noise = torch.maximum(noise, (near.residual(near.w.space.pack(moved)) - residual).norm())
    away = float((noise / near.size).max()) / max(s.least, s.tolerance) if s.norm > 0 else math.inf
    if bool((least <= ROUNDING * noise).all()) and away > HARMLESS:
        dtype = str(near.w.space.dtype).removeprefix("torch.")
        text = (
            f"the inner residual, {float(least.max()):.1e}, is rounding in {dtype}: params changed in their last "
            f"digit change it by {float(noise.max()):.1e}. It cannot fall further, and params may be {away:.1e} of "
            f"their norm away from the solution; use float64 where that is too much"
        )
        numbers = {"residual": float(least.max()), "noise": float(noise.max()), "distance": away}
        yield Finding("rounding floor", text, numbers)
