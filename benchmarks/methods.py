"""The columns: floors, hypergrad, other libraries. To add one, write a function of a Problem and list it in METHODS.

A floor is the work that every method with K products has to do: one forward pass with the graph of the gradient (or of
the map), the outer gradient, K retained products and the last product. It has no linear algebra and no result.

"HyperTorch" is its published algorithm (Grazzi et al. 2020), written again here: lists of tensors, a read of the
residual norm at each step, and a product with the Jacobian that evaluates the map again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

import hypergrad as hg

from . import peers
from .problems import Problem

Tensors = list[Tensor]


@dataclass(frozen=True)
class Method:
    """One column.

    `library` is "hypergrad", another library, or "floor". `floor` names the method that its time is divided by, and
    `target` is the largest ratio that we accept. `truth` is the kind of `System.truth` that its result has to agree
    with (None: no result). `passes` is the number of reverse passes of K steps (None: they cannot be counted), and
    `evaluations` that of the inner loss or map. `needs` is the kind of problem: "loss" (whose system is symmetric),
    "map" or "any". `compiled`: its first call compiles. `memory`: peak bytes, if torch does not allocate them.
    """

    name: str
    run: Callable[[Problem], Sequence[Tensor]]
    passes: Callable[[int], int] | None
    floor: str | None = None
    truth: str | None = None
    target: float | None = None
    evaluations: Callable[[int], int] = lambda steps: 1
    needs: str = "any"
    library: str = "hypergrad"
    compiled: bool = False
    memory: Callable[[Problem], int] | None = None

    @property
    def peer(self) -> bool:
        return self.library not in ("floor", "hypergrad")

    @property
    def torch_peer(self) -> bool:
        return self.peer and self.library != "JAXopt"

    @property
    def work(self) -> tuple[str | None, bool]:
        """Only methods with the same work are compared: the estimate, and whether the map is iterated first."""
        return self.truth, self.floor == ITERATED_FLOOR

    def fits(self, problem: Problem) -> bool:
        return self.needs in ("any", "map" if problem.step_size is None else "loss")

    def passes_on(self, problem: Problem) -> int:
        """`passes` on this problem: it includes one pass for each gradient step, which other maps do not need."""
        free = problem.step_size is None and self.needs == "any"
        assert self.passes is not None
        return self.passes(problem.steps) - free * self.evaluations(problem.steps)


# The relative difference from K steps in float64 above which a method is not timed. In float32 every implementation of
# the normal equations loses digits, because they square the condition number.
TOLERANCE = {"cg": 1e-4, "fixed_point": 1e-4, "normal_cg": 5e-2}
TOL = 1e-12  # so small that every method does its K steps or reaches rounding level


def leaves(problem: Problem) -> Tensors:
    return [w.detach().requires_grad_() for w in problem.params]


def outer_gradient(problem: Problem, params: Tensors) -> tuple[Tensors, list[Tensor | None]]:
    loss = problem.outer_loss(params, problem.hparams)
    grads = torch.autograd.grad(loss, [*params, *problem.hparams], allow_unused=True)
    return list(grads[: len(params)]), list(grads[len(params) :])


def graph(problem: Problem, params: Tensors, fixed_point: bool) -> Tensors:
    """The image under the map, or the gradient of the inner loss, with its graph."""
    if fixed_point:
        return problem.fp_map(params, problem.hparams)
    loss = problem.inner_loss(params, problem.hparams)
    return list(torch.autograd.grad(loss, params, create_graph=True))


def floor(problem: Problem, fixed_point: bool, with_params: bool = True) -> Tensors:
    """Graph, outer gradient, K retained products, and the last one (with_params: also for params, for the residual)."""
    params = leaves(problem)
    outputs = graph(problem, params, fixed_point)
    b, _ = outer_gradient(problem, params)
    for _ in range(problem.steps):
        torch.autograd.grad(outputs, params, b, retain_graph=True)
    last = [*params, *problem.hparams] if with_params else problem.hparams
    return list(torch.autograd.grad(outputs, last, b, allow_unused=True))


def iterated_floor(problem: Problem) -> Tensors:
    """K steps of the map without a graph, and then the floor."""
    with torch.no_grad():
        params = problem.params
        for _ in range(problem.steps):
            params = problem.fp_map(params, problem.hparams)
    return floor(replace(problem, params=params), fixed_point=True)


def graph_and_product(problem: Problem, fixed_point: bool) -> Tensors:
    """A product with its graph, v and result: the memory that is subtracted from the peak of a method."""
    params = leaves(problem)
    outputs = graph(problem, params, fixed_point)
    return list(torch.autograd.grad(outputs, params, problem.params))


@contextmanager
def must_compile() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", hg.NotCompiled)
        yield


def hypergradient(
    problem: Problem,
    solver: hg.solvers.LinearSolver,
    x0: Tensors | hg.solvers.Recycled | None = None,
    compile: bool = False,
) -> hg.Hypergradient:
    """hg.implicit.grad of the inner loss or of the map. With compile=True it raises NotCompiled if that fails."""
    loss = problem.step_size is not None
    with must_compile() if compile else nullcontext():
        return hg.implicit.grad(
            problem.outer_loss,
            inner_loss=problem.inner_loss if loss else None,
            fp_map=None if loss else problem.fp_map,
            params=problem.params,
            hparams=problem.hparams,
            solver=solver,
            x0=x0,
            compile=compile,
        )


def implicit(problem: Problem, solver: hg.solvers.LinearSolver) -> Tensors:
    return hypergradient(problem, solver).grads


def implicit_cg(problem: Problem) -> Tensors:
    return implicit(problem, hg.solvers.CG(max_steps=problem.steps))


def implicit_neumann(problem: Problem) -> Tensors:
    return implicit(problem, neumann(problem))


def compiled_cg(problem: Problem) -> Tensors:
    return hypergradient(problem, hg.solvers.CG(max_steps=problem.steps), compile=True).grads


def compiled_neumann(problem: Problem) -> Tensors:
    return hypergradient(problem, neumann(problem), compile=True).grads


def neumann(problem: Problem) -> hg.solvers.Neumann:
    """K terms of the series by K − 1 products, which is the result of K steps of the map from zero."""
    assert problem.step_size is not None
    return hg.solvers.Neumann(max_steps=problem.steps - 1, step_size=problem.step_size)


def library(method: Callable[..., Tensors]) -> Callable[[Problem], Tensors]:
    """One of hypergrad's functions with HyperTorch's signature."""

    def run(problem: Problem) -> Tensors:
        return method(
            problem.params, problem.hparams, problem.steps, problem.fp_map, problem.outer_loss, tol=TOL, set_grad=False
        )

    return run


class Cell(nn.Module):
    def __init__(self, a: Tensor):
        super().__init__()
        self.a = nn.Parameter(a.detach())

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(z @ self.a + u)


def layer(problem: Problem, forward_steps: int | None = None) -> Tensors:
    """hg.nn.Equilibrium with xB + c evaluated once: K (or `forward_steps`) steps of the map, K terms of the adjoint."""
    a, b, c, weight, bias = problem.hparams
    steps = problem.steps if forward_steps is None else forward_steps
    equilibrium = hg.nn.Equilibrium(
        Cell(a),
        inject=lambda x: x @ b + c,
        start=lambda x: problem.params[0],
        forward=hg.fixed_points.Picard(max_steps=steps, on_failure="ignore"),
        backward=hg.solvers.FixedPoint(max_steps=problem.steps, on_failure="ignore"),
    )
    z = equilibrium(problem.data["x"])
    loss = problem.outer_loss([z], problem.hparams)
    return list(torch.autograd.grad(loss, [*equilibrium.parameters(), b, c, weight, bias]))


class HyperTorch:
    """HyperTorch's CG, CG_normaleq and fixed_point, written again."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self.params = leaves(problem)
        self.b, self.direct = outer_gradient(problem, self.params)
        self.mapped = problem.fp_map(self.params, problem.hparams)

    def pull(self, v: Tensors) -> Tensors:
        """∂₁Φᵀ v."""
        return list(torch.autograd.grad(self.mapped, self.params, v, retain_graph=True))

    def push(self, u: Tensors) -> Tensors:
        """∂₁Φ u by double backward through a new evaluation of Φ, after another one for the shape of the probe."""
        probe = [torch.ones_like(y).requires_grad_() for y in self.problem.fp_map(self.params, self.problem.hparams)]
        mapped = self.problem.fp_map(self.params, self.problem.hparams)
        pulled = torch.autograd.grad(mapped, self.params, probe, create_graph=True)
        return list(torch.autograd.grad(pulled, probe, u))

    def residual(self, v: Tensors) -> Tensors:
        """(I − ∂₁Φᵀ) v."""
        return [x - y for x, y in zip(v, self.pull(v), strict=True)]

    def normal(self, v: Tensors) -> Tensors:
        """(I − ∂₁Φ)(I − ∂₁Φᵀ) v."""
        u = self.residual(v)
        return [x - y for x, y in zip(u, self.push(u), strict=True)]

    def finish(self, v: Tensors) -> Tensors:
        cross = torch.autograd.grad(self.mapped, self.problem.hparams, v, allow_unused=True)
        total = []
        for c, d, h in zip(cross, self.direct, self.problem.hparams, strict=True):
            parts = [part for part in (c, d) if part is not None]
            total.append(sum(parts[1:], parts[0]) if parts else torch.zeros_like(h))
        return total

    def solve(self, product: Callable[[Tensors], Tensors], b: Tensors, tol: float = TOL) -> Tensors:
        """Conjugate gradients on lists of tensors; reads ‖r‖ in every step and returns the iterate before the last."""
        x = [torch.zeros_like(each) for each in b]
        r, p = [each.clone() for each in b], [each.clone() for each in b]
        for _ in range(self.problem.steps):
            ap = product(p)
            r_all, p_all, ap_all = joined(r), joined(p), joined(ap)
            rr = (r_all * r_all).sum()
            alpha = rr / (p_all * ap_all).sum()
            x_new = [xi + alpha * pi for xi, pi in zip(x, p, strict=True)]
            r = [ri - alpha * ai for ri, ai in zip(r, ap, strict=True)]
            r_all = joined(r)
            if float(r_all.norm()) < tol:
                break
            beta = (r_all * r_all).sum() / rr
            p = [ri + beta * pi for ri, pi in zip(r, p, strict=True)]
            x = x_new
        return x

    def cg(self, rtol: float | None = None) -> Tensors:
        """rtol: the tolerance over ‖b‖ (HyperTorch's own is absolute)."""
        tol = TOL if rtol is None else rtol * float(joined(self.b).norm())
        return self.finish(self.solve(self.residual, self.b, tol))

    def normal_cg(self) -> Tensors:
        b = [x - y for x, y in zip(self.b, self.push(self.b), strict=True)]
        return self.finish(self.solve(self.normal, b))

    def fixed_point(self) -> Tensors:
        v = [torch.zeros_like(each) for each in self.b]
        v_all = joined(v)
        for _ in range(self.problem.steps):
            v = [x + y for x, y in zip(self.pull(v), self.b, strict=True)]
            before, v_all = v_all, joined(v)
            if float((v_all - before).norm()) < TOL:
                break
        return self.finish(v)


def joined(tensors: Tensors) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


FLOOR, MAP_FLOOR, ITERATED_FLOOR = "floor", "floor (map)", "K steps, floor (map)"

METHODS = [
    Method(FLOOR, lambda p: floor(p, fixed_point=False), lambda k: k + 3, needs="loss", library="floor"),
    Method(
        f"{FLOOR}, last for hparams",
        lambda p: floor(p, fixed_point=False, with_params=False),
        lambda k: k + 3,
        FLOOR,
        needs="loss",
        library="floor",
    ),
    Method("hg.implicit.grad, CG", implicit_cg, lambda k: k + 3, FLOOR, "cg", 1.05, needs="loss"),
    Method("hg.implicit.grad, CG, compiled", compiled_cg, None, FLOOR, "cg", needs="loss", compiled=True),
    Method("hg.implicit.grad, Neumann", implicit_neumann, lambda k: k + 2, FLOOR, "fixed_point", 1.05, needs="loss"),
    Method(
        "hg.implicit.grad, Neumann, compiled", compiled_neumann, None, FLOOR, "fixed_point", needs="loss", compiled=True
    ),
    Method(MAP_FLOOR, lambda p: floor(p, fixed_point=True), lambda k: k + 3, library="floor"),
    Method(
        f"{MAP_FLOOR}, last for hparams",
        lambda p: floor(p, fixed_point=True, with_params=False),
        lambda k: k + 3,
        MAP_FLOOR,
        library="floor",
    ),
    Method("hg.CG", library(hg.CG), lambda k: k + 3, MAP_FLOOR, "cg", 1.05, needs="loss"),
    Method(
        "HyperTorch CG",
        lambda p: HyperTorch(p).cg(),
        lambda k: k + 3,
        MAP_FLOOR,
        "cg",
        needs="loss",
        library="HyperTorch",
    ),
    Method("hg.fixed_point", library(hg.fixed_point), lambda k: k + 2, MAP_FLOOR, "fixed_point", 1.05),
    Method(
        "HyperTorch fixed_point",
        lambda p: HyperTorch(p).fixed_point(),
        lambda k: k + 3,
        MAP_FLOOR,
        "fixed_point",
        library="HyperTorch",
    ),
    Method("hg.CG_normaleq", library(hg.CG_normaleq), lambda k: 2 * k + 4, MAP_FLOOR, "normal_cg", 2.3),
    Method(
        "HyperTorch CG_normaleq",
        lambda p: HyperTorch(p).normal_cg(),
        lambda k: 5 * k + 7,
        MAP_FLOOR,
        "normal_cg",
        evaluations=lambda k: 2 * k + 3,
        library="HyperTorch",
    ),
    Method(
        ITERATED_FLOOR,
        iterated_floor,
        lambda k: k + 2,
        evaluations=lambda k: k + 1,
        needs="map",
        library="floor",
    ),
    Method(
        "hg.nn.Equilibrium, inject",
        layer,
        lambda k: 1,  # passes inside a backward pass are not counted
        ITERATED_FLOOR,
        "fixed_point",
        0.55,
        evaluations=lambda k: 0,  # it evaluates its own `Cell`, not the map of the problem
        needs="map",
    ),
]
if peers.installed("torchopt"):
    METHODS += [
        Method("TorchOpt CG", peers.torchopt_cg, None, FLOOR, "cg", needs="loss", library="TorchOpt"),
        Method("TorchOpt ns", peers.torchopt_neumann, None, FLOOR, "fixed_point", needs="loss", library="TorchOpt"),
        Method("TorchOpt normal CG", peers.torchopt_normal_cg, None, MAP_FLOOR, "normal_cg", library="TorchOpt"),
    ]
if peers.installed("betty"):
    METHODS += [
        Method("Betty CG", peers.betty_cg, None, FLOOR, "cg", needs="loss", library="Betty"),
        Method(
            "Betty Neumann", peers.betty_neumann, lambda k: k + 2, FLOOR, "fixed_point", needs="loss", library="Betty"
        ),
    ]
if peers.installed("boat_torch"):
    METHODS += [
        Method("BOAT CG", peers.boat_cg, lambda k: k + 4, FLOOR, "cg", needs="loss", library="BOAT"),
        Method("BOAT NS", peers.boat_neumann, lambda k: k + 3, FLOOR, "fixed_point", needs="loss", library="BOAT"),
    ]
if peers.installed("torchdeq"):
    torchdeq = peers.torchdeq_layer
    METHODS.append(
        Method("torchdeq, inject", torchdeq, None, ITERATED_FLOOR, "fixed_point", needs="map", library="torchdeq")
    )
if peers.installed("jax", "jaxopt"):
    jitted = Method("JAXopt CG, jit", peers.jaxopt_cg, None, FLOOR, "cg", needs="loss", library="JAXopt")
    default = Method("JAXopt normal CG, jit", peers.jaxopt_normal_cg, None, MAP_FLOOR, "normal_cg", library="JAXopt")
    METHODS += [
        replace(jitted, compiled=True, memory=peers.jaxopt_memory),
        replace(default, compiled=True, memory=partial(peers.jaxopt_memory, normal=True)),
    ]
