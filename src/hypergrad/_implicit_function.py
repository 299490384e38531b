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
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

from . import _autodiff, _graph, operators
from ._autodiff import Linearisation
from ._solution import Solution
from ._tree import difference
from ._vector import Space, Vector
from .solvers import LinearSolver, Recycled, Solver, solve

Leaves: TypeAlias = "tuple[Tensor, ...]"
Function: TypeAlias = "Callable[[Leaves, Leaves], Leaves]"  # F(w, λ) on leaves


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

    def start(self, space: Space) -> Vector | None:
        if self.value is None:
            return None
        held = [(leaf.shape, leaf.dtype, leaf.device) for leaf in self.value]
        if held != list(zip(space.shapes, space.dtypes, space.devices, strict=True)):
            raise ValueError(
                f"warm_start holds a v of shapes {[tuple(leaf.shape) for leaf in self.value]}, and the solution has "
                f"{[tuple(shape) for shape in space.shapes]}: set its value to None when the problem changes"
            )
        return space.pack(self.value)


@dataclass(frozen=True)
class Problem:
    """F and how its linear systems are solved: what both Functions carry along unchanged.

    Args:
        function: F, or Φ where fixed_point (F = w − Φ), on tuples of leaves.
        count: the number of leaves of w.
        solver, tangent: linear solvers of Aᵀv = b and of Av = b.
        symmetric, positive_definite: of A.
        batch_dims: leading axes of independent problems.
    """

    function: Function
    count: int
    solver: Solver
    tangent: Solver
    fixed_point: bool = False
    symmetric: bool = False
    positive_definite: bool = False
    batch_dims: int = 0
    transposed: bool = False
    info: Info = field(default_factory=Info)
    warm: WarmStart | Recycled | None = None
    names: Callable[[Tensor], str] = lambda leaf: f"of shape {tuple(leaf.shape)}"

    @property
    def T(self) -> Problem:
        """The same with Aᵀ for A."""
        return self if self.symmetric else replace(self, transposed=not self.transposed)

    def residual(self, w: Leaves, hparams: Leaves) -> Leaves:
        """F(w, λ)."""
        values = self.function(w, hparams)
        return difference(w, values) if self.fixed_point else values

    def vmapped(self, dims: Sequence[int | None]) -> Problem:
        """The same over one more leading axis of w, and of those leaves of λ whose entry in dims is 0."""
        mapped = torch.func.vmap(self.function, in_dims=(0, tuple(dims)))
        return replace(self, function=mapped, batch_dims=self.batch_dims + 1, warm=None)

    def linearise(self, w: Leaves, hparams: Leaves, wanted: Sequence[Tensor] = ()) -> Linearisation:
        """The retained graph of F (or Φ) at plain tensors; undeclared tensors in it are an error."""
        outputs = self._evaluate(w, hparams)
        if any(_functorch.is_functorch_wrapped_tensor(y) for y in outputs):
            raise ValueError(UNDECLARED.format(OUTSIDE))
        undeclared = _graph.undeclared_leaves(outputs, [*w, *hparams])
        if undeclared:
            raise ValueError(UNDECLARED.format(", ".join(self.names(leaf) for leaf in undeclared[:3])))
        linearisation = Linearisation(outputs, w, list(wanted))
        linearisation.drop_values()
        return linearisation

    def _evaluate(self, w: Leaves, hparams: Leaves) -> Leaves:
        try:
            return self.function(w, hparams)
        except RuntimeError as error:
            if "INTERNAL ASSERT" in str(error) and "functorch" in str(error):  # a tensor of a transform that is not on
                raise ValueError(UNDECLARED.format(OUTSIDE)) from error
            raise

    def check_declared(self, w: Sequence[Tensor], hparams: Sequence[Tensor]) -> None:
        """Look at once for undeclared tensors that `linearise` would miss.

        It runs below all transforms, where what they differentiate or map looks like a constant, and it does not run
        at all where no declared tensor requires grad. In these two cases F is evaluated here, at constants.
        """
        constants = tuple(leaf.detach() for leaf in w), tuple(leaf.detach() for leaf in hparams)
        if torch._C._are_functorch_transforms_active():
            mapped = set().union(*(mapped_levels(leaf) for leaf in (*constants[0], *constants[1])))
            if any(depends_on_outside(y, mapped) for y in self._evaluate(*constants)):
                raise ValueError(UNDECLARED.format(OUTSIDE))
        elif torch.is_grad_enabled() and not any(leaf.requires_grad for leaf in (*w, *hparams)):
            self.linearise(tuple(leaf.requires_grad_() for leaf in constants[0]), constants[1])

    def run(self, linearisation: Linearisation, b: Vector, last: Any = None) -> Vector:
        """Solve with A or Aᵀ, reporting a failure and filling in Info."""
        op = operators.adjoint(
            lambda: linearisation,
            fixed_point=self.fixed_point,
            symmetric=self.symmetric,
            positive_definite=self.positive_definite,
            batch_dims=self.batch_dims,
        )
        solver = self.solver if self.transposed or self.symmetric else self.tangent
        warm = None if last is None else self.warm
        start = warm.start(b.space) if isinstance(warm, WarmStart) else warm
        solution = solve(solver, op if self.transposed else op.T, b, start, last)
        self.info.solution, self.info.solves = solution, self.info.solves + 1
        if isinstance(warm, WarmStart):
            v = solution.value
            warm.value = [leaf.clone() for leaf in v.where(torch.isfinite(solution.residual_norm), v.zeros()).leaves]
        policy = solver.on_failure if isinstance(solver, LinearSolver) else "warn"
        solution.report("the linear system of an implicit derivative", policy)
        return solution.value


UNDECLARED = (
    "the map uses a tensor that requires grad and was not declared: {}. Its derivative would be lost. Pass it in "
    "hparams (for a module: torch.func.functional_call with dict(module.named_parameters()) in hparams), or detach it"
)

OUTSIDE = "one that a transform outside (grad, jvp, vmap, ...) differentiates or maps"


def mapped_levels(x: Tensor) -> set[int]:
    """The levels of vmap at which x is mapped."""
    levels = set()
    while _functorch.is_functorch_wrapped_tensor(x):
        if _functorch.is_batchedtensor(x):
            levels.add(_functorch.maybe_get_level(x))
        x = _functorch.get_unwrapped(x)
    return levels


def depends_on_outside(y: Tensor, mapped: set[int]) -> bool:
    """Whether a transform differentiates y, made from constants, or maps it at another level than these."""
    if not _functorch.is_functorch_wrapped_tensor(y):
        return False
    if _functorch.is_batchedtensor(y):
        here = _functorch.maybe_get_level(y) not in mapped
    else:
        here = y.requires_grad or torch.autograd.forward_ad.unpack_dual(y).tangent is not None
    if here:
        return True
    with retrieve_current_functorch_interpreter().lower():
        return depends_on_outside(_functorch.get_unwrapped(y), mapped)


def pull(function: Callable[[Leaves], Leaves], at: Leaves, cotangent: Leaves) -> Leaves:
    """∂functionᵀ cotangent at a point, differentiable."""
    pullback = torch.func.vjp(lambda *x: function(x), *at)[1]
    return pullback(cotangent)


def push(function: Callable[[Leaves], Leaves], at: Leaves, tangent: Leaves) -> Leaves:
    """∂function tangent: the derivative of the pull, which is linear in its cotangent; differentiable."""
    outputs, pullback, *_ = torch.func.vjp(lambda *x: function(x), *at)
    zeros = tuple(torch.zeros_like(y) for y in outputs)
    return pull(lambda u: pullback(u), zeros, tangent)


def pulled(problem: Problem, u: Leaves, w: Leaves, hparams: Leaves) -> Leaves:
    """∂₁Fᵀ u as a differentiable function of u, w and λ."""
    return pull(lambda x: problem.residual(x, hparams), w, u)


def floating(leaves: Leaves) -> list[int]:
    """Which leaves can carry a derivative."""
    return [i for i, leaf in enumerate(leaves) if leaf.is_floating_point()]


def over(leaves: Leaves, kept: Sequence[int]) -> Callable[[Leaves], Leaves]:
    """The leaves with those in kept replaced."""

    def put(new: Leaves) -> Leaves:
        whole = list(leaves)
        for i, leaf in zip(kept, new, strict=True):
            whole[i] = leaf
        return tuple(whole)

    return put


class LinearSolve(torch.autograd.Function):
    """x = A⁻¹ b for A = ∂₁F(w, λ), or Aᵀ where problem.transposed: arguments (problem, *b, *w, *λ)."""

    @staticmethod
    def forward(problem: Problem, *tensors: Tensor) -> Leaves:
        n = problem.count
        w = tuple(leaf.detach().requires_grad_() for leaf in tensors[n : 2 * n])
        hparams = tuple(leaf.detach() for leaf in tensors[2 * n :])
        with torch.enable_grad():
            linearisation = problem.linearise(w, hparams)
        space = Space(list(w), "w", problem.batch_dims)
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
    def _unpack(ctx: Any) -> tuple[Problem, Leaves, Leaves, Leaves]:
        problem, n = ctx.problem, ctx.problem.count
        return problem, ctx.saved_tensors[:n], ctx.saved_tensors[n : 2 * n], ctx.saved_tensors[2 * n :]

    @staticmethod
    def backward(ctx: Any, *x_bar: Tensor) -> tuple[Any, ...]:
        problem, x, w, hparams = LinearSolve._unpack(ctx)
        b_bar = LinearSolve.apply(problem.T, *x_bar, *w, *hparams)
        theta, kept, put = _theta(w, hparams)
        # ⟨b̄, A x⟩ = ⟨Aᵀ b̄, x⟩: the side with the transposed product takes one reverse pass fewer.
        u, v = (x, b_bar) if problem.transposed else (b_bar, x)
        bars = pull(lambda t: pulled(problem, u, *put(t)), theta, v)
        rest: list[Tensor | None] = [None] * (len(w) + len(hparams))
        for i, bar in zip(kept, bars, strict=True):
            rest[i] = -bar
        return (None, *b_bar, *rest)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Leaves:
        refuse_nested_forward_mode()
        problem, x, w, hparams = LinearSolve._unpack(ctx)
        n = problem.count
        theta, kept, put = _theta(w, hparams)
        dots = tuple(zeros_if_none(tangents[n + i], t) for i, t in zip(kept, theta, strict=True))
        if problem.transposed:
            a_dot_x = push(lambda t: pulled(problem, x, *put(t)), theta, dots)
        else:  # the derivative of u ↦ ⟨∂θ⟨∂₁Fᵀ u, x⟩, θ̇⟩, which is linear
            zeros = tuple(torch.zeros_like(y) for y in x)
            a_dot_x = pull(lambda u: pull(lambda t: pulled(problem, u, *put(t)), theta, x), zeros, dots)
        rhs = [zeros_if_none(b, y) - y for b, y in zip(tangents[:n], a_dot_x, strict=True)]
        return LinearSolve.apply(problem, *rhs, *w, *hparams)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], problem: Problem, *tensors: Tensor) -> tuple[Leaves, Any]:
        n = problem.count
        lead = [to_front(t, dim) for t, dim in zip(tensors, in_dims[1:], strict=True)]
        dims = [None if dim is None else 0 for dim in in_dims[1 + 2 * n :]]
        for i in range(2 * n):
            if in_dims[1 + i] is None:
                lead[i] = lead[i].expand(info.batch_size, *lead[i].shape)
        return LinearSolve.apply(problem.vmapped(dims), *lead), (0,) * n


def _theta(w: Leaves, hparams: Leaves) -> tuple[Leaves, list[int], Callable[[Leaves], tuple[Leaves, Leaves]]]:
    """The floating point leaves of (w, λ), where they stand, and how to put new ones there."""
    whole = (*w, *hparams)
    kept = floating(whole)
    put = over(whole, kept)

    def parts(new: Leaves) -> tuple[Leaves, Leaves]:
        both = put(new)
        return both[: len(w)], both[len(w) :]

    return tuple(whole[i] for i in kept), kept, parts


def zeros_if_none(tangent: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if tangent is None else tangent


def to_front(tensor: Tensor, dim: int | None) -> Tensor:
    return tensor if dim is None else tensor.movedim(dim, 0)


class Root(torch.autograd.Function):
    """w(λ): arguments (problem, find, *w, *λ). Where find is given there is no w, and find(λ) gives it."""

    @staticmethod
    def forward(problem: Problem, find: Callable[[Leaves], Leaves] | None, *tensors: Tensor) -> Leaves:
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
        problem, n = ctx.problem, ctx.problem.count
        w, hparams = ctx.saved_tensors[:n], ctx.saved_tensors[n:]
        kept = [i for i in floating(hparams) if ctx.needs_input_grad[2 + ctx.given + i]]
        bars = adjoint(problem, w, hparams, w_bar, kept)
        grads: list[Tensor | None] = [None] * len(hparams)
        for i, bar in zip(kept, bars, strict=True):
            grads[i] = bar
        return (None, None, *[None] * ctx.given, *grads)

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, *tangents: Tensor | None) -> Leaves:
        refuse_nested_forward_mode()
        problem, n = ctx.problem, ctx.problem.count
        w, hparams = ctx.saved_tensors[:n], ctx.saved_tensors[n:]
        kept = floating(hparams)
        put = over(hparams, kept)
        at = tuple(hparams[i] for i in kept)
        dots = tuple(zeros_if_none(tangents[ctx.given + i], hparams[i]) for i in kept)
        rhs = push(lambda new: problem.residual(w, put(new)), at, dots)
        return LinearSolve.apply(problem, *(-y for y in rhs), *w, *hparams)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], problem: Problem, find: Any, *tensors: Tensor
    ) -> tuple[Leaves, Any]:
        given = problem.count if find is None else 0
        lead = [to_front(t, dim) for t, dim in zip(tensors, in_dims[2:], strict=True)]
        for i in range(given):
            if in_dims[2 + i] is None:
                lead[i] = lead[i].expand(info.batch_size, *lead[i].shape)
        dims = [None if dim is None else 0 for dim in in_dims[2 + given :]]

        find_all = None if find is None else functools.partial(find_each, find, dims, info.batch_size)
        outputs = Root.apply(problem.vmapped(dims), find_all, *lead)
        return outputs, (0,) * len(outputs)


def find_each(find: Callable[[Leaves], Leaves], dims: Sequence[int | None], count: int, hparams: Leaves) -> Leaves:
    """The solutions for each entry of the mapped leaves of λ, stacked."""
    entries = (tuple(t if dim is None else t[j] for t, dim in zip(hparams, dims, strict=True)) for j in range(count))
    return tuple(torch.stack(parts) for parts in zip(*(find(entry) for entry in entries), strict=True))


def adjoint(problem: Problem, w: Leaves, hparams: Leaves, w_bar: Leaves, kept: Sequence[int]) -> Sequence[Tensor]:
    """λ̄ = −∂₂Fᵀ A⁻ᵀ w̄ for the leaves of λ in kept."""
    put = over(hparams, kept)
    wanted = tuple(hparams[i] for i in kept)
    plain = not any(_functorch.is_functorch_wrapped_tensor(t) for t in (*w, *hparams, *w_bar))
    if torch.is_grad_enabled() or not plain:
        v = LinearSolve.apply(replace(problem, transposed=True), *w_bar, *w, *hparams)
        return tuple(-bar for bar in pull(lambda new: problem.residual(w, put(new)), wanted, v))
    # No derivative of this will be asked for: one graph serves all products, the last of which gives λ̄ too.
    with torch.enable_grad():
        wanted = tuple(leaf.detach().requires_grad_() for leaf in wanted)
        w = tuple(leaf.detach().requires_grad_() for leaf in w)
        rest = tuple(leaf.detach() for leaf in hparams)
        linearisation = problem.linearise(w, over(rest, kept)(wanted), wanted)
    space = Space(list(w), "w", problem.batch_dims)
    cross: list[Tensor] = []

    def last(v: Vector) -> Vector:
        image, cross[:] = linearisation.vjp_both(v.leaves, retain_graph=False)
        return v - v.space.pack(image) if problem.fixed_point else v.space.pack(image)

    problem_t = replace(problem, transposed=True)
    problem_t.run(linearisation, space.pack(list(w_bar)).copy(), last)
    return _autodiff.scaled(cross, 1.0 if problem.fixed_point else -1.0)


def refuse_nested_forward_mode() -> None:
    """Forward mode inside forward mode through an autograd.Function is silently wrong in torch (pytorch#197867)."""
    stack = _functorch.get_interpreter_stack() or []
    if sum(level.key() == _functorch.TransformType.Jvp for level in stack) > 1:
        raise NotImplementedError(
            "forward mode over forward mode (jacfwd(jacfwd), jvp of jvp) through an implicit function is silently "
            "wrong in torch (pytorch#197867); use jacfwd(jacrev), jacrev(jacrev) or torch.func.hessian"
        )
