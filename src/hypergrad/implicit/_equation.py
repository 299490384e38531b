"""The equation F(w, λ) = 0 as a function of leaves, and the solution of its linear systems at plain tensors."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from .. import _autodiff, _graph, _torch, operators
from .._autodiff import Linearisation, users_autocast
from .._basis import Basis
from .._below import Leaves, explain_tracing
from .._detached import warn_of_lost
from .._reach import noticing
from .._solution import Solution, at_kink, inner_distance, warn, warn_if_unsolved, warn_of_few_steps, warned_of_kink
from .._tree import KIND, difference, filled, flatten
from .._vector import Space, Vector
from ..operators import LinearOperator
from ..solvers import Recycled, Solver, Stateful, on_failure_of, solve, solve_at_once, solves_at_once
from ._problem import INNER_UNREACHED, warn_of_hooks

Function: TypeAlias = "Callable[[Leaves, Leaves], Leaves]"  # F(w, λ) on leaves

_within_a_map: ContextVar[bool] = ContextVar("within_a_map", default=False)  # whether an Equation is being evaluated

OUTSIDE = "a tensor of an enclosing transform (grad, jvp, vmap, ...)"


def undeclared(names: str) -> ValueError:
    return ValueError(
        f"the map uses a tensor that requires grad and was not declared: {names}. Its derivative would be lost. Pass "
        f"it in hparams (for a module: torch.func.functional_call with dict(module.named_parameters()) in hparams), or "
        f"detach it"
    )


@dataclass
class Info:
    """A record of how the adjoint (or tangent) system was solved, which each derivative fills in.

    Attributes:
        solution: status, steps, true residual and trace of the last solve; None before the first.
        solves: the number of systems that were solved.

    Example:
        >>> info, lam = hg.implicit.Info(), torch.tensor(3.0, requires_grad=True)
        >>> w = hg.implicit.argmin(lambda w, lam: (w - lam) ** 2, torch.tensor(3.0), lam, info=info)
        >>> torch.autograd.grad(w**2, lam)
        (tensor(6.),)
        >>> info.solves, info.solution.status.name
        (1, 'CONVERGED')
    """

    solution: Solution | None = None
    solves: int = 0


@dataclass
class WarmStart(Stateful):
    """Keeps v from one backward pass as the start of the next. Use one object for each implicit function of a model.

    Attributes:
        value: the leaves of the last v, or None to start from zero (set it to None when the problem changes).

    Example:
        >>> kept, lam = hg.implicit.WarmStart(), torch.tensor(3.0, requires_grad=True)
        >>> for _ in range(2):  # the second system starts from the solution of the first
        ...     info = hg.implicit.Info()
        ...     w = hg.implicit.argmin(
        ...         lambda w, lam: (w - lam) ** 2, torch.tensor(3.0), lam, info=info, warm_start=kept
        ...     )
        ...     print(torch.autograd.grad(w, lam), kept.value, info.solution.steps)
        (tensor(1.),) [tensor(0.5000)] 1
        (tensor(1.),) [tensor(0.5000)] 0
    """

    value: list[Tensor] | None = None
    _state: ClassVar[tuple[str, ...]] = ("value",)

    def start(self, op: LinearOperator, b: Vector) -> tuple[Vector, None] | None:
        if self.value is None:
            return None
        space = b.space
        if list(map(KIND, self.value)) != space.kinds:
            raise ValueError(
                f"warm_start holds a v of shapes {[tuple(leaf.shape) for leaf in self.value]}, and the solution has "
                f"{[tuple(shape) for shape in space.shapes]}: set its value to None when the problem changes"
            )
        return space.pack(self.value), None

    def keep(self, v: Vector) -> None:
        """Store v, with zeros for each system whose v is not finite."""
        self.value = [leaf.clone() for leaf in v.where(torch.isfinite(v.largest()), v.zeros()).leaves]


@dataclass(frozen=True)
class Axis:
    """A leading axis of w that a vmap has added."""

    copied: bool  # whether w and λ are the same along it
    carried: frozenset[int]  # indices of the leaves of λ that have it


@dataclass(frozen=True)
class Equation:
    """F and how its linear systems are solved, as the autograd.Functions in `_function` pass it on."""

    function: Function  # of tuples of leaves: F, or Φ if fixed_point (F = w − Φ), or ∇₁g if minimises
    count: int  # number of leaves of w
    solver: Solver  # for Aᵀv = b and Av = b
    name: Callable[[Tensor], str]  # how an error message names an undeclared tensor
    fixed_point: bool = False
    minimises: bool = False
    symmetric: bool = False
    positive_definite: bool = False
    batch_dims: int = 0
    transposed: bool = False  # whether the systems have the matrix Aᵀ in place of A
    info: Info = field(default_factory=Info)
    warm: WarmStart | Recycled | None = None
    axes: tuple[Axis, ...] = ()  # the leading axes of b and w, one for each enclosing vmap, the outermost first
    base: Equation | None = None  # this equation without the axes that are copied

    @property
    def T(self) -> Equation:
        """This equation with Aᵀ in place of A."""
        if self.symmetric:
            return self
        return replace(self, transposed=not self.transposed, base=None if self.base is None else self.base.T)

    def vmapped(self, dims: Sequence[int | None], copied: bool = False) -> Equation:
        """This equation with one more leading axis of w (constant if `copied`), and of the leaves of λ with dim 0."""
        mapped, base = torch.func.vmap(self.function, in_dims=(0, tuple(dims))), self.base
        if copied:
            base = base or self
        elif base is not None:
            base = base.vmapped(dims)
        axis = Axis(copied, frozenset(i for i, dim in enumerate(dims) if dim is not None))
        axes, batch_dims = (axis, *self.axes), self.batch_dims + 1
        return replace(self, function=mapped, batch_dims=batch_dims, warm=None, base=base, axes=axes)

    def once(self, leaf: Tensor, place: int | None = None) -> Tensor:
        """A leaf of w, or the leaf of λ with index `place`, without the axes along which it is copied."""
        own = [axis for axis in self.axes if place is None or place in axis.carried]
        return leaf[tuple(0 if axis.copied else slice(None) for axis in own)]

    def evaluate(self, leaves: Leaves) -> Leaves:
        """F (or Φ) at the leaves of (w, λ)."""
        outermost = _within_a_map.set(True)
        try:
            with _torch.correct_derivatives(dense=True), users_autocast():
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
        """The retained graph of F (or Φ) at plain tensors. Raises ValueError for undeclared tensors in it."""
        with noticing(self.function) as noticed:
            outputs = self.evaluate((*w, *hparams))
        if any(map(_torch.is_wrapped, outputs)):
            raise undeclared(OUTSIDE)
        others = _graph.undeclared_leaves(outputs, [*w, *hparams])
        if others:
            raise undeclared(", ".join(self.name(leaf) for leaf in others[:3]))
        linearisation = Linearisation(outputs, w, list(wanted))
        linearisation.detaches = noticed.found
        return linearisation

    def check_declared(self, w: Sequence[Tensor], hparams: Sequence[Tensor]) -> None:
        """Raise ValueError for undeclared tensors that `linearise` would not see, by evaluating F at constants.

        `linearise` runs below all transforms, and not if no declared tensor requires grad, or inside another map.
        """
        count = len(w)
        if _torch.transforms_active():
            constants = tuple(leaf.detach() for leaf in (*w, *hparams))
            mapped = set().union(*map(_torch.mapped_levels, constants))
            outputs = torch.func.vjp(lambda *w: self.evaluate((*w, *constants[count:])), *constants[:count])[0]
            if any(_torch.depends_on_transform(y, mapped) for y in outputs):
                raise undeclared(OUTSIDE)
        elif torch.is_grad_enabled() and (
            _within_a_map.get() or not any(leaf.requires_grad for leaf in (*w, *hparams))
        ):
            with _torch.saved_tensor_hooks_suspended():
                self.linearise(tuple(x.detach().requires_grad_() for x in w), tuple(x.detach() for x in hparams))

    def solved(
        self, b: Leaves, w: Leaves, hparams: Leaves, wanted: Sequence[int] = (), adjoint: bool = False
    ) -> tuple[Leaves, Leaves]:
        """v = A⁻¹b (or A⁻ᵀb) at plain tensors and, if adjoint, λ̄ = −∂₂Fᵀv for the leaves of λ in wanted."""
        places = [i - self.count for i in wanted]
        if self.base is not None:
            axes = tuple(i for i, axis in enumerate(self.axes) if axis.copied)
            first = tuple(range(len(axes)))
            shape = b[0].movedim(axes, first).shape[: len(axes)]
            b = tuple(x.movedim(axes, first).flatten(0, len(axes) - 1) for x in b)
            hparams = tuple(self.once(x, i) for i, x in enumerate(hparams))
            with _torch.outside_inference_mode():
                found = self.base._solved(b, tuple(map(self.once, w)), hparams, places, adjoint, True)
            v, bars = (tuple(x.unflatten(0, shape).movedim(first, axes) for x in xs) for xs in found)
            return v, bars
        with _torch.outside_inference_mode():
            return self._solved(b, w, hparams, places, adjoint, False)

    def _solved(
        self, b: Leaves, w: Leaves, hparams: Leaves, places: list[int], adjoint: bool, stacked: bool
    ) -> tuple[Leaves, Leaves]:
        """As `solved`. stacked: b has one more leading axis, of several right hand sides for the same A."""
        w = tuple(_torch.plain(x).requires_grad_() for x in w)
        hparams = tuple(_torch.plain(x).requires_grad_(i in places) for i, x in enumerate(hparams))
        chosen = [hparams[i] for i in places]
        with torch.enable_grad(), _torch.saved_tensor_hooks_suspended():
            linearisation = self.linearise(w, hparams, chosen)
        space = Space(*flatten(list(w), "w"), self.batch_dims)
        bars, reached = [], True

        def last(v: Vector) -> Vector:
            both = linearisation.vjp_both_many(v.leaves) if stacked else linearisation.vjp_both(v.leaves, False)
            image, found = v.space.pack(both[0]), both[1]
            keep(found)
            return v - image if self.fixed_point else image

        def keep(found: Sequence[Tensor | None]) -> None:
            if linearisation.hooks:
                warn_of_hooks(linearisation.hooks, "inner_loss" if self.minimises else "the map")
            nonlocal reached
            reached = not chosen or any(x is not None for x in found)
            if not reached:
                warn(INNER_UNREACHED)
            lead = (len(b[0]),) if stacked else ()
            bars[:] = _autodiff.scaled(_autodiff.new_zeros(found, chosen, *lead), 1.0 if self.fixed_point else -1.0)

        right = (space.stack_of(len(b[0])) if stacked else space).pack([_torch.plain(x) for x in b])
        try:
            v = self.run(linearisation, space, right, last if adjoint else None, keep)
        except RuntimeError as error:
            explain_tracing(error)
            raise
        if linearisation.detaches and reached and on_failure_of(self.solver) != "ignore":
            self.warn_of_lost(w, hparams, tuple(x[0] if stacked else x for x in v.leaves))
        # New tensors, because autograd attaches its graph to those returned, and Info would keep the graph alive.
        return tuple(x.detach() for x in v.leaves), tuple(bars)

    def warn_of_lost(self, w: Leaves, hparams: Leaves, v: Leaves) -> None:
        """Warn with LostDerivative if F detaches what the derivative needs; v solves the linear system."""
        leaves = tuple(x.detach().requires_grad_(x.is_floating_point() or x.is_complex()) for x in hparams)
        chosen, name = [x for x in leaves if x.requires_grad], "inner_loss" if self.minimises else "the map"
        warn_of_lost(name, self.function, lambda: self.evaluate((*w, *leaves)), w, chosen, v)

    def run(self, linearisation: Linearisation, space: Space, b: Vector, last: Any, keep: Any) -> Vector:
        """Solve with A or Aᵀ, report a failure, and fill in Info. b is a vector of `space`, or a stack of such."""
        if not space.length or 0 in b.space.batch_shape:
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
        op = op if self.transposed else op.T
        solution = None
        if b.space is not space:
            solution = self.factorised(linearisation, point, b, keep if last else None)
            op = op.stacked()
        if solution is None:
            solution = solve(self.solver, op, b.copy(), None if last is None else self.warm, last)
        self.info.solution, self.info.solves = solution, self.info.solves + 1
        policy = on_failure_of(self.solver)
        solution.report("the linear system of an implicit derivative", policy)
        if policy != "ignore":
            distance = inner_distance(residual, solution, point, self.fixed_point)
            if not warned_of_kink(kink, residual, distance, space.eps):
                warn_if_unsolved(float(distance.max()), residual)
            if solution.ok and last is not None and (rest := solution.remaining):
                thetas, rates = zip(*rest, strict=True)
                theta, rate = math.hypot(*thetas) / len(thetas) ** 0.5, max(rates)
                error = theta / (1 + theta) if theta < math.inf else theta
                warn_of_few_steps("the derivative of an implicit function", solution, error, rate)
        return solution.value

    def factorised(self, linearisation: Linearisation, point: Vector, b: Vector, keep: Any) -> Solution | None:
        """The solution v for a stack of right hand sides by one factorisation, or None; ∂₂Fᵀv goes to `keep`."""
        n, k = point.space.length, b.space.batch_shape[0]
        if not solves_at_once(self.solver, n, k) or not all(point.space.plain):
            return None
        units = Basis.from_rows(point, torch.eye(n, dtype=point.space.dtype, device=point.space.device)).leaves()
        crosses: list[Tensor | None] = []
        if keep is None or k < n:
            rows = linearisation.vjp_many(units)
        else:  # the same pass gives ∂₂F, which for n ≤ k is no larger than the result ∂₂Fᵀv
            rows, crosses = linearisation.vjp_both_many(units)
        rows = point.space.joined(point.space.chunks_of(rows, (n,))).movedim(0, -2 if self.transposed else -1)
        rows = torch.eye(n, dtype=rows.dtype, device=rows.device) - rows if self.fixed_point else rows.contiguous()
        found = solve_at_once(self.solver, rows, b, self.symmetric, self.positive_definite)
        if found is None or keep is None:
            return found and found[0]
        solution, x = found
        lead = b.space.batch_shape
        if k < n:
            crosses = linearisation.vjp_both_many(solution.value.leaves)[1]
        else:
            crosses = [None if c is None else _combined(x, c, lead) for c in crosses]
        keep(crosses)
        return solution


def _combined(x: Tensor, rows: Tensor, lead: torch.Size) -> Tensor:
    """Σᵢ xᵢ rowᵢ for x [*B, k, n] and rows [n, *B, ...]: [k, *B, ...]."""
    flat = rows.flatten(len(lead)) if rows.ndim > len(lead) else rows.unsqueeze(-1)
    product = x.to(flat.dtype) @ flat.movedim(0, -2)
    return product.movedim(-2, 0).reshape(*lead, *rows.shape[len(lead) :])


def pull(function: Callable[[Leaves], Leaves], leaves: Leaves, cotangent: Leaves, wanted: Sequence[int]) -> Leaves:
    """(∂function/∂leafᵢ)ᵀ cotangent for the leaves i in wanted, as a differentiable function of leaves and cotangent.

    It uses torch.autograd, which accepts what torch.func refuses (buffers that are written, hooks, checkpoints). Under
    a transform it uses torch.func.grad: a pullback of torch.func.vjp cannot be called after its level has ended.
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
