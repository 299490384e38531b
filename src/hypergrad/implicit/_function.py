"""Implicit functions as ordinary differentiable values: two autograd.Functions, LinearSolve and Root.

    LinearSolve:  x = A⁻¹ b  with  A = ∂₁F(w, λ)  or its transpose
        reverse:  b̄ = A⁻ᵀ x̄,   (w̄, λ̄) = −∂_(w,λ) ⟨b̄, A x⟩
        forward:  ẋ = A⁻¹ (ḃ − Ȧ x)
    Root:         w(λ) with F(w(λ), λ) = 0
        reverse:  λ̄ = −∂₂Fᵀ A⁻ᵀ w̄
        forward:  ẇ = −A⁻¹ ∂₂F λ̇

Both rules call LinearSolve again, on the transposed operator, so derivatives of any order exist. A vmap over either is
one batched solve on plain tensors, so a solver may look at its residuals under any transform. Only reverse products are
used (a product with a Jacobian is the derivative of its transposed product): forward mode inside reverse mode is wrong
through normalisation layers (torch 2.13).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .. import _autodiff, _graph, _torch, operators
from .._autodiff import Linearisation, users_autocast
from .._below import Leaves, lead_axes
from .._solution import Solution, at_kink, inner_distance, warn, warn_if_unsolved, warned_of_kink
from .._tree import difference, filled, flatten
from .._vector import Space, Vector
from ..operators import LinearOperator
from ..solvers import Recycled, Solver, on_failure_of, solve
from ._problem import INNER_UNREACHED

Function: TypeAlias = "Callable[[Leaves, Leaves], Leaves]"  # F(w, λ) on leaves

_within_a_map: ContextVar[bool] = ContextVar("within_a_map", default=False)  # whether a Equation is being evaluated

OUTSIDE = "one that a transform outside (grad, jvp, vmap, ...) differentiates or maps"


def undeclared(names: str) -> ValueError:
    return ValueError(
        f"the map uses a tensor that requires grad and was not declared: {names}. Its derivative would be lost. Pass "
        f"it in hparams (for a module: torch.func.functional_call with dict(module.named_parameters()) in hparams), or "
        f"detach it"
    )


@dataclass
class Info:
    """Filled in when a derivative is computed: how the adjoint (or tangent) system was solved.

    Attributes:
        solution: status, steps, true residual and trace of the last solve; None before.
        solves: how many systems were solved since this object was made.
    """

    solution: Solution | None = None
    solves: int = 0


@dataclass
class WarmStart:
    """Keeps v from one backward pass as the start of the next. One object for each place in a model where it is used.

    Attributes:
        value: the last v as leaves; None to start from zero (set it so when the problem changes).
    """

    value: list[Tensor] | None = None

    def start(self, op: LinearOperator, b: Vector) -> tuple[Vector, None] | None:
        """v of the last pass."""
        if self.value is None:
            return None
        space = b.space
        held = [(leaf.shape, leaf.dtype, leaf.device) for leaf in self.value]
        if held != list(zip(space.shapes, space.dtypes, space.devices, strict=True)):
            raise ValueError(
                f"warm_start holds a v of shapes {[tuple(leaf.shape) for leaf in self.value]}, and the solution has "
                f"{[tuple(shape) for shape in space.shapes]}: set its value to None when the problem changes"
            )
        return space.pack(self.value), None

    def keep(self, v: Vector) -> None:
        """Keep v, and zeros for a system where it is not finite."""
        self.value = [leaf.clone() for leaf in v.where(torch.isfinite(v.largest()), v.zeros()).leaves]

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, in a form that torch.load(weights_only=True) reads."""
        return {"value": None if self.value is None else [leaf.clone() for leaf in self.value]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = None if state["value"] is None else [leaf.clone() for leaf in state["value"]]


@dataclass(frozen=True)
class Equation:
    """F and how its linear systems are solved: what both Functions carry along unchanged."""

    function: Function  # F, or Φ where fixed_point (F = w − Φ), or ∇₁g of a g that it minimises, on tuples of leaves
    count: int  # of the leaves of w
    solver: Solver  # of Aᵀv = b and of Av = b
    name: Callable[[Tensor], str]  # how an error speaks of an undeclared tensor
    fixed_point: bool = False
    minimises: bool = False
    symmetric: bool = False
    positive_definite: bool = False
    batch_dims: int = 0
    transposed: bool = False  # whether systems are those of Aᵀ
    info: Info = field(default_factory=Info)
    warm: WarmStart | Recycled | None = None

    @property
    def T(self) -> Equation:
        """The same with Aᵀ for A."""
        return self if self.symmetric else replace(self, transposed=not self.transposed)

    def vmapped(self, dims: Sequence[int | None]) -> Equation:
        """The same over one more leading axis of w, and of those leaves of λ whose entry in dims is 0."""
        mapped = torch.func.vmap(self.function, in_dims=(0, tuple(dims)))
        return replace(self, function=mapped, batch_dims=self.batch_dims + 1, warm=None)

    def evaluate(self, leaves: Leaves) -> Leaves:
        """F (or Φ) at the leaves of (w, λ)."""
        outermost = _within_a_map.set(True)
        try:
            with _torch.differentiated_rightly(dense=True), users_autocast():
                return self.function(leaves[: self.count], leaves[self.count :])
        except RuntimeError as error:
            if _torch.is_of_ended_transform(error):
                raise undeclared(OUTSIDE) from error
            raise
        finally:
            _within_a_map.reset(outermost)

    def residual(self, leaves: Leaves) -> Leaves:
        """F(w, λ)."""
        values = self.evaluate(leaves)
        return difference(leaves[: self.count], values) if self.fixed_point else values

    def pulled(self, u: Leaves, leaves: Leaves) -> Leaves:
        """∂₁Fᵀ u as a differentiable function of u, w and λ."""
        return pull(self.residual, leaves, u, range(self.count))

    def linearise(self, w: Leaves, hparams: Leaves, wanted: Sequence[Tensor] = ()) -> Linearisation:
        """The retained graph of F (or Φ) at plain tensors; undeclared tensors in it are an error."""
        outputs = self.evaluate((*w, *hparams))
        if any(map(_torch.is_wrapped, outputs)):
            raise undeclared(OUTSIDE)
        others = _graph.undeclared_leaves(outputs, [*w, *hparams])
        if others:
            raise undeclared(", ".join(self.name(leaf) for leaf in others[:3]))
        return Linearisation(outputs, w, list(wanted))

    def check_declared(self, w: Sequence[Tensor], hparams: Sequence[Tensor]) -> None:
        """Look at once for undeclared tensors that `linearise` would miss, by an evaluation of F at constants.

        It runs below all transforms, where what they differentiate or map looks like a constant, and not at all where
        no declared tensor requires grad, or the map of another implicit function asks for the derivative in an
        undeclared tensor alone.
        """
        count = len(w)
        constants = tuple(leaf.detach() for leaf in (*w, *hparams))
        if _torch.transforms_active():
            mapped = set().union(*map(_torch.mapped_levels, constants))
            outputs = torch.func.vjp(lambda *w: self.evaluate((*w, *constants[count:])), *constants[:count])[0]
            if any(_torch.depends_on_transform(y, mapped) for y in outputs):
                raise undeclared(OUTSIDE)
        elif torch.is_grad_enabled() and (
            _within_a_map.get() or not any(leaf.requires_grad for leaf in (*w, *hparams))
        ):
            self.linearise(tuple(leaf.requires_grad_() for leaf in constants[:count]), constants[count:])

    def run(self, linearisation: Linearisation, b: Vector, last: Any = None) -> Vector:
        """Solve with A or Aᵀ, reporting a failure and filling in Info."""
        space = b.space
        if not space.length or 0 in space.batch_shape:  # nothing to solve for
            return b if last is None else last(b)
        point, value = (space.pack([x.detach() for x in xs]) for xs in (linearisation.params, linearisation.outputs))
        f = point - value if self.fixed_point else value
        residual, kink = f.norm(), at_kink(point, f) if self.minimises else None
        del f, value
        linearisation.drop_values()
        op = operators.adjoint(
            lambda: linearisation,
            fixed_point=self.fixed_point,
            symmetric=self.symmetric,
            positive_definite=self.positive_definite,
            batch_dims=self.batch_dims,
        )
        solution = solve(self.solver, op if self.transposed else op.T, b, None if last is None else self.warm, last)
        self.info.solution, self.info.solves = solution, self.info.solves + 1
        policy = on_failure_of(self.solver)
        solution.report("the linear system of an implicit derivative", policy)
        if policy != "ignore":
            distance = inner_distance(residual, solution, point)
            if not warned_of_kink(kink, residual, distance, space.eps):
                warn_if_unsolved(distance, residual)
        return solution.value


def floating(leaves: Sequence[Tensor]) -> list[int]:
    """Which leaves can carry a derivative."""
    return [i for i, leaf in enumerate(leaves) if leaf.is_floating_point() or leaf.is_complex()]


def pull(function: Callable[[Leaves], Leaves], leaves: Leaves, cotangent: Leaves, wanted: Sequence[int]) -> Leaves:
    """Σ ∂function/∂leafᵢᵀ cotangent for the leaves i in wanted, as a differentiable function of leaves and cotangent.

    By torch.autograd, which takes what torch.func refuses: modules that write their buffers or have hooks, Functions
    without setup_context, checkpoints. Under a transform by torch.func.grad, which sees no derivative but those of its
    own level. (A pullback of torch.func.vjp could not be called after its level has ended.)
    """
    at = tuple(leaves[i] for i in wanted)
    if _torch.transforms_active():

        def paired(at: Leaves) -> Tensor:
            pairs = zip(function(tuple(filled(leaves, wanted, at))), cotangent, strict=True)
            return functools.reduce(
                torch.add, [((y * c.conj()).real if y.is_complex() else y * c).sum() for y, c in pairs]
            )

        return torch.func.grad(paired)(at)
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        at = tuple(_torch.tracked(leaf.view_as(leaf)) for leaf in at)  # a view, for forward mode
        outputs = function(tuple(filled(leaves, wanted, at)))
        return tuple(_autodiff.grad(outputs, at, cotangent, create_graph=create_graph))


def push(
    function: Callable[[Leaves], Leaves], leaves: Leaves, tangents: Leaves, wanted: Sequence[int], like: Leaves
) -> Leaves:
    """Σ ∂function/∂leafᵢ tangentᵢ, like `like`: the pull is linear in its cotangent; this is its transpose."""
    zeros = tuple(torch.zeros_like(y) for y in like)
    return pull(lambda u: pull(function, leaves, u, wanted), zeros, tangents, range(len(zeros)))


def zeros_if_none(tangent: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if tangent is None else tangent


class LinearSolve(torch.autograd.Function):
    """x = A⁻¹ b for A = ∂₁F(w, λ), or Aᵀ where problem.transposed: arguments (problem, *b, *w, *λ)."""

    @staticmethod
    def forward(problem: Equation, *tensors: Tensor) -> Leaves:
        n = problem.count
        w = tuple(leaf.detach().requires_grad_() for leaf in tensors[n : 2 * n])
        hparams = tuple(leaf.detach() for leaf in tensors[2 * n :])
        with torch.enable_grad():
            linearisation = problem.linearise(w, hparams)
        space = Space(*flatten(list(w), "w"), problem.batch_dims)
        b = space.pack([leaf.detach() for leaf in tensors[:n]]).copy()
        # New tensors: autograd hangs the graph on what it gets back, and Info would keep it alive.
        return tuple(leaf.detach() for leaf in problem.run(linearisation, b).leaves)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Leaves) -> None:
        problem, *tensors = inputs
        saved = (*output, *tensors[problem.count :])
        ctx.problem = problem
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, *x_bar: Tensor) -> tuple[Any, ...]:
        refuse(x_bar, forward_mode=False)
        problem, saved = ctx.problem, ctx.saved_tensors  # read once: checkpoints recompute at each reading
        x, leaves = saved[: problem.count], saved[problem.count :]
        b_bar = LinearSolve.apply(problem.T, *_autodiff.densified(x_bar), *leaves)
        # ⟨b̄, A x⟩ = ⟨Aᵀ b̄, x⟩: the side with the transposed product takes one reverse pass fewer.
        u, v = (x, b_bar) if problem.transposed else (b_bar, x)
        needed = ctx.needs_input_grad[1 + problem.count :]
        wanted = [i for i in floating(leaves) if needed[i]]
        bars = pull(lambda leaves: problem.pulled(u, leaves), leaves, v, wanted)
        rest: list[Tensor | None] = [None] * len(leaves)
        for i, bar in zip(wanted, bars, strict=True):
            rest[i] = -bar
        return (None, *b_bar, *rest)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Leaves:
        refuse(tangents, forward_mode=True)
        problem, saved = ctx.problem, ctx.saved_tensors
        n = problem.count
        x, leaves = saved[:n], saved[n:]
        wanted = [i for i in floating(leaves) if i < n or tangents[n + i] is not None]
        dots = tuple(zeros_if_none(tangents[n + i], leaves[i]) for i in wanted)
        if problem.transposed:
            a_dot_x = push(lambda leaves: problem.pulled(x, leaves), leaves, dots, wanted, x)
        else:  # the derivative of u ↦ ⟨∂θ⟨∂₁Fᵀ u, x⟩, θ̇⟩, which is linear

            def bilinear(u: Leaves) -> Leaves:
                return pull(lambda leaves: problem.pulled(u, leaves), leaves, x, wanted)

            zeros = tuple(torch.zeros_like(y) for y in x)
            a_dot_x = pull(bilinear, zeros, dots, range(n))
        rhs = [zeros_if_none(b, y) - y for b, y in zip(tangents[:n], a_dot_x, strict=True)]
        return LinearSolve.apply(problem, *rhs, *leaves)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], problem: Equation, *tensors: Tensor) -> tuple[Leaves, Any]:
        lead, dims = lead_axes(info.batch_size, tensors, in_dims[1:], 2 * problem.count)
        return LinearSolve.apply(problem.vmapped(dims), *lead), (0,) * problem.count


class Root(torch.autograd.Function):
    """w(λ): arguments (problem, find, *w, *λ). Where find is given there is no w, and find(λ) gives it."""

    @staticmethod
    def forward(problem: Equation, find: Callable[[Leaves], Leaves] | None, *tensors: Tensor) -> Leaves:
        if find is None:
            return tuple(leaf.clone() for leaf in tensors[: problem.count])
        return find(tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Leaves) -> None:
        problem, find, *tensors = inputs
        given = problem.count if find is None else 0
        ctx.problem, ctx.given = replace(problem, count=len(output)), given
        ctx.save_for_backward(*output, *tensors[given:])
        ctx.save_for_forward(*output, *tensors[given:])

    @staticmethod
    def backward(ctx: Any, *w_bar: Tensor) -> tuple[Any, ...]:
        refuse(w_bar, forward_mode=False)
        problem, leaves = ctx.problem, ctx.saved_tensors
        n = problem.count
        wanted = [i for i in floating(leaves) if i >= n and ctx.needs_input_grad[2 + ctx.given + i - n]]
        grads: list[Tensor | None] = [None] * (len(leaves) - n)
        w_bar = tuple(_autodiff.densified(w_bar))
        for i, bar in zip(wanted, adjoint(problem, leaves, w_bar, wanted), strict=True):
            grads[i - n] = bar
        return (None, None, *[None] * ctx.given, *grads)

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, *tangents: Tensor | None) -> Leaves:
        refuse(tangents, forward_mode=True)
        problem, leaves = ctx.problem, ctx.saved_tensors
        n = problem.count
        wanted = [i for i in floating(leaves) if i < n or tangents[ctx.given + i - n] is not None]
        dots = [zeros_if_none(None if i < n else tangents[ctx.given + i - n], leaves[i]) for i in wanted]
        rhs = push(problem.residual, leaves, tuple(dots), wanted, leaves[:n])
        return LinearSolve.apply(problem, *(-y for y in rhs), *leaves)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], problem: Equation, find: Any, *tensors: Tensor
    ) -> tuple[Leaves, Any]:
        given = problem.count if find is None else 0
        lead, dims = lead_axes(info.batch_size, tensors, in_dims[2:], given)
        find_all = None if find is None else functools.partial(find_each, find, dims, info.batch_size)
        outputs = Root.apply(problem.vmapped(dims), find_all, *lead)
        return outputs, (0,) * len(outputs)


def find_each(find: Callable[[Leaves], Leaves], dims: Sequence[int | None], count: int, hparams: Leaves) -> Leaves:
    """The solutions for each entry of the mapped leaves of λ, stacked."""
    entries = (tuple(t if dim is None else t[j] for t, dim in zip(hparams, dims, strict=True)) for j in range(count))
    return tuple(torch.stack(parts) for parts in zip(*(find(entry) for entry in entries), strict=True))


def adjoint(problem: Equation, leaves: Leaves, w_bar: Leaves, wanted: Sequence[int]) -> Sequence[Tensor]:
    """λ̄ = −∂₂Fᵀ A⁻ᵀ w̄ for the leaves (of w, then of λ) in wanted."""
    n, problem = problem.count, replace(problem, transposed=True)
    if torch.is_grad_enabled() or any(map(_torch.is_wrapped, (*leaves, *w_bar))):
        v = LinearSolve.apply(problem, *w_bar, *leaves)
        # With respect to w too: a map that takes derivatives of its own takes them there.
        return [-bar for bar in pull(problem.residual, leaves, v, [*range(n), *wanted])[n:]]
    # No derivative of this will be asked for: one graph serves all products, the last of which gives λ̄ too.
    tracked = {*range(n), *wanted}
    with torch.enable_grad():
        leaves = tuple(leaf.detach().requires_grad_(i in tracked) for i, leaf in enumerate(leaves))
        linearisation = problem.linearise(leaves[:n], leaves[n:], [leaves[i] for i in wanted])
    space = Space(*flatten(list(leaves[:n]), "w"), problem.batch_dims)
    cross: list[Tensor] = []

    def last(v: Vector) -> Vector:
        image, found = linearisation.vjp_both(v.leaves, retain_graph=False)
        if all(x is None for x in found):
            warn(INNER_UNREACHED)
        cross[:] = _autodiff.new_zeros(found, [leaves[i] for i in wanted])
        return v - space.pack(image) if problem.fixed_point else space.pack(image)

    problem.run(linearisation, space.pack(list(w_bar)).copy(), last)
    return cross if problem.fixed_point else [-x for x in cross]


def refuse(tensors: Sequence[Tensor | None], forward_mode: bool) -> None:
    """Raise where a derivative along these tensors would fail in torch, or be wrong without a word (pytorch#197867)."""
    if any(map(_torch.is_legacy_batch, tensors)):
        raise NotImplementedError(
            "is_grads_batched=True, vectorize=True and check_batched_grad map by torch's older vmap, in which an "
            "implicit function has no derivative: use torch.func.jacrev (jacfwd, hessian), or torch.func.vmap of "
            "torch.func.vjp"
        )
    if forward_mode and _torch.forward_mode_levels() > 1:
        raise NotImplementedError(
            "forward mode over forward mode (jacfwd(jacfwd), jvp of jvp) through an implicit function is silently "
            "wrong in torch (pytorch#197867); use jacfwd(jacrev), jacrev(jacrev) or torch.func.hessian"
        )
