"""What is wrong with the losses and maps of a bilevel problem at a point, each found by evaluating them near by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import _autodiff, _graph
from .._autodiff import Linearisation, as_scalar
from .._modules import modules_of
from .._tree import flatten
from .._vector import Vector
from ..implicit import Problem
from ._error import ratio
from ._modules import active_dropout, random_state
from ._structure import Structure

REPEATABLE = 1e3  # eps: two evaluations that differ by more are not the same map
ROUNDING = 10.0  # a residual below so many times what one unit in the last place of w changes is rounding
HARMLESS = 1e-8  # relative distance to the solution below which that does not matter


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


class Near:
    """A problem at (w, λ), and at points near by."""

    def __init__(self, problem: Problem, generator: torch.Generator):
        self.problem, self.generator = problem.again(), generator
        self.w = self.problem.point
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

    def linearise(self, params: Vector | None = None) -> Linearisation:
        """The graph of ∇₁g, Φ or F."""
        return (self.problem if params is None else self.at(params)).linearise()

    def outputs(self, problem: Problem, outer: bool) -> list[Tensor]:
        """E, or ∇₁g, Φ or F, with its graph."""
        if not outer:
            return list(problem.linearise().outputs)
        with torch.enable_grad():
            loss = as_scalar(problem.outer_loss(*problem.arguments), "outer_loss")
        return [loss]

    def values(self, linearisation: Linearisation) -> Vector:
        return self.w.space.pack([y.detach() for y in linearisation.outputs])

    def residual(self, w: Vector) -> Vector:
        values = self.values(self.linearise(w))
        return values - w if self.problem.fixed_point else values


def random(near: Near, *, outer: bool) -> list[Finding]:
    name = "outer_loss" if outer else near.problem.kind
    devices = near.w.space.devices
    before = random_state(devices)
    first, second = ([y.detach() for y in near.outputs(near.problem, outer)] for _ in range(2))
    moved = random_state(devices) != before
    apart = math.hypot(*(float((x - y).norm()) for x, y in zip(first, second, strict=True)))
    difference = ratio(apart, max(math.hypot(*(float(x.norm()) for x in each)) for each in (first, second)))
    if not difference > REPEATABLE * near.w.space.eps:
        return []
    numbers = {"difference": difference}
    dropping = active_dropout(modules_of(near.problem.outer_loss if outer else near.problem.inner))
    if dropping and moved:
        text = (
            f"two evaluations of {name} differ by {difference:.1e}: {', '.join(dropping[:3])} "
            f"{'is' if len(dropping) == 1 else 'are'} in training mode; call eval() on the model"
        )
        return [Finding("dropout", text, numbers)]
    why = "it draws from torch's random state (dropout, or noise)" if moved else "it uses other data, or other noise"
    remedy = "" if outer else ", or pass it as operators.Stochastic"
    text = f"two evaluations of {name} at the same point differ by {difference:.1e}: {why}; make it repeatable{remedy}"
    return [Finding("stochastic", text, numbers)]


def ignored_params(near: Near) -> list[Finding]:
    if _graph.depends(near.outputs(near.problem, True), near.problem.leaves):
        return []
    text = (
        "outer_loss does not depend on params, so nothing goes through the inner problem: was it computed from other "
        "tensors (a live model instead of the argument), detached, or under no_grad?"
    )
    return [Finding("outer loss ignores params", text)]


def unreached_hparams(near: Near) -> list[Finding]:
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


def kink(near: Near) -> list[Finding]:
    eps = near.w.space.eps
    d, u = near.direction(), near.w.random(near.generator)
    u = u / u.norm()

    def on_side(step: float) -> tuple[Vector, Vector]:
        """The value and a product at w + step · d, from a graph that is used before another evaluation."""
        there = near.linearise(near.w + d * step)
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


def wrong_derivatives(near: Near, *, outer: bool) -> list[Finding]:
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


def rounding_floor(near: Near, s: Structure) -> list[Finding]:
    here = near.residual(near.w)
    least, noise = here.norm(), here.norm() * 0
    for _ in range(3):
        moved = near.w.space.pack([_nudged(x, near.generator) for x in near.w.leaves])
        noise = torch.maximum(noise, (near.residual(moved) - here).norm())
    at_floor = bool((least <= ROUNDING * noise).all())
    away = _largest(noise / near.size) / max(s.least[1], s.tolerance) if s.norm[0] > 0 else math.inf
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
