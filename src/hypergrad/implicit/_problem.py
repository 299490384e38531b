"""A bilevel problem at a point: its variables, its inner problem in one of three forms, its outer loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor

from .. import _autodiff, _compiled, operators
from .._autodiff import Linearisation, as_scalar
from .._vector import PyTree, Space, Vector, check_distinct, flatten
from ..operators import GaussNewton

Products = Literal["reverse", "forward", "measured"]
UNREACHED = (
    "inner_loss does not depend on params; was it computed under no_grad, or from other tensors (a live model's)?"
)


class Variables:
    """params and hparams as given, checked, and in the forms that losses and autograd want."""

    def __init__(self, params: PyTree, hparams: PyTree, batch_dims: int = 0):
        self.given, self.names, self._params_tree = flatten(params, "params")
        self._outer, self._outer_names, self._hparams_tree = flatten(hparams, "hparams")
        self.differentiated = check_hparams(self._outer, self._outer_names)
        self.space = Space.of(self.given, self.names, self._params_tree, batch_dims)
        self.hparams = self._hparams_tree(self._outer)
        # New leaves of autograd, for callables.
        self.leaves = [leaf.detach().requires_grad_() for leaf in self.given]
        self.params = self._params_tree(self.leaves)

    @cached_property
    def outer_space(self) -> Space:
        """The space of hypergradients: that of the hparams which are differentiated."""
        return Space(self.differentiated, "hparams")

    def keep_live(self) -> None:
        """Params stay the tensors that evaluated losses were computed from."""
        for leaf, name in zip(self.given, self.names, strict=True):
            if not leaf.requires_grad:
                raise ValueError(f"{name} does not require grad, so no evaluated loss has a derivative in it")
        if {id(leaf) for leaf in self.given} & {id(leaf) for leaf in self._outer}:
            raise ValueError("with evaluated losses no tensor may be in params and in hparams; pass callables")
        _check_independent([*self.given, *self._outer], [*self.names, *self._outer_names])
        self.leaves = self.given
        self.params = self._params_tree(self.leaves)

    def check_reached(self, values: list[Tensor], name: str) -> None:
        """Raise where a callable used the live params that it closes over instead of those that it was given."""
        live = [leaf for leaf in self.given if leaf.requires_grad]
        if live and not _autodiff.depends(values, self.leaves) and _autodiff.depends(values, live):
            raise ValueError(
                f"{name} does not use the params that it is called with, but the live ones, so its derivative would "
                f"count as zero: use its argument (torch.func.functional_call), or pass evaluated losses"
            )

    def versions(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """torch's counters of in-place changes, of params and of hparams."""
        inner, outer = ([0 if x.is_inference() else x._version for x in leaves] for leaves in (self.given, self._outer))
        return tuple(inner), tuple(outer)

    def without_graph(self) -> tuple[PyTree, PyTree]:
        """params and hparams in the user's memory: the very tensors where they are leaves of autograd, else aliases."""
        inner = [x if x.is_leaf else x.detach() for x in self.given]
        outer = [x if x.is_leaf else x.detach().requires_grad_() for x in self._outer]
        return self._params_tree(inner), self._hparams_tree(outer)

    def differentiated_of(self, tree: PyTree, name: str) -> Vector:
        """A tree in hparams' structure as a vector of those leaves that are differentiated."""
        leaves = Space(self._hparams_tree(self._outer), "hparams").check(tree, name)
        picked = [leaf.detach() for leaf, x in zip(leaves, self._outer, strict=True) if x.requires_grad]
        return self.outer_space.pack(picked)

    def hparams_with(self, leaves: Iterable[Tensor]) -> PyTree:
        """hparams with other tensors for the differentiated leaves, without a graph."""
        each = iter(leaves)
        return self._hparams_tree([next(each) if leaf.requires_grad else leaf for leaf in self._outer])

    def copies(self, dtype: torch.dtype | None) -> tuple[PyTree, PyTree, list[Tensor]]:
        """params and hparams without graphs, in another dtype if given; and params' leaves, which require grad."""
        inner = [x.detach().to(dtype or x.dtype).requires_grad_() for x in self.leaves]
        outer = [x.detach().to(dtype or x.dtype) for x in self._outer]
        return self._params_tree(inner), self._hparams_tree(outer), inner

    def outer_grads(self, grads: list[Tensor], count: int | None = None) -> PyTree:
        """Gradients of the differentiated leaves in hparams' structure; zeros for leaves that do not require grad.

        count: k, where they have a leading axis of k outer losses.
        """
        each, lead = iter(grads), () if count is None else (count,)
        return self._hparams_tree(
            [next(each) if leaf.requires_grad else leaf.new_zeros(*lead, *leaf.shape) for leaf in self._outer]
        )

    def in_params_structure(self, leaves: Iterable[Tensor]) -> PyTree:
        return self._params_tree(leaves)


def check_hparams(leaves: list[Tensor], names: Sequence[str]) -> list[Tensor]:
    """The leaves that require grad. Raises ValueError for none, for one tensor twice, for one computed from another."""
    check_distinct(leaves, names)
    _check_independent(leaves, names)
    differentiated = [leaf for leaf in leaves if leaf.requires_grad]
    if not differentiated:
        raise ValueError("none of hparams requires grad; call requires_grad_() on those to differentiate")
    return differentiated


def _check_independent(leaves: list[Tensor], names: Sequence[str]) -> None:
    pair = None if all(leaf.is_leaf for leaf in leaves) else _autodiff.computed_from(leaves)
    if pair is not None:
        late, early = (names[i] for i in pair)
        raise ValueError(
            f"{late} was computed from {early}, so what reaches {early} through {late} would be counted twice: detach "
            f"{late} (before evaluating the losses), or leave {early} out"
        )


@dataclass(frozen=True)
class InnerProblem:
    """The one of inner_loss, fp_map and residual that was given."""

    kind: str
    given: Any

    @staticmethod
    def of(inner_loss: Any, fp_map: Any, residual: Any) -> InnerProblem:
        every = {"inner_loss": inner_loss, "fp_map": fp_map, "residual": residual}
        given = {kind: value for kind, value in every.items() if value is not None}
        if len(given) != 1:
            raise TypeError(f"pass exactly one of inner_loss, fp_map and residual; got {list(given) or 'none'}")
        kind, value = given.popitem()
        if isinstance(value, GaussNewton) and kind != "inner_loss":
            raise TypeError(f"GaussNewton is an inner_loss, and was passed as {kind}")
        return InnerProblem(kind, value)

    @property
    def exact(self) -> InnerProblem:
        """The same with its Hessian, where a Gauss–Newton matrix stands in for it."""
        return InnerProblem(self.kind, self.given.__call__ if isinstance(self.given, GaussNewton) else self.given)

    def linearise(
        self, variables: Variables, compile: bool | str = False, products: Products = "reverse"
    ) -> Linearisation:
        """The graph of ∇₁g, Φ or F at params and hparams; compile: products are compiled (by the named backend)."""
        with torch.enable_grad():
            if isinstance(self.given, GaussNewton):
                given = (variables.params, variables.hparams, variables.leaves, variables.differentiated)
                return self.given.linearise(*given, UNREACHED)
            value = self.given(variables.params, variables.hparams) if callable(self.given) else self.given
            if self.kind == "inner_loss":
                loss = as_scalar(value, "inner_loss")
                outputs = _autodiff.grad([loss], variables.leaves, create_graph=True, must_reach=UNREACHED)
            else:
                outputs = variables.space.check(value, f"the value of {self.kind}")
                if callable(self.given):
                    variables.check_reached(outputs, self.kind)
        compiled = None
        if compile:
            backend = None if compile is True else compile
            compiled = partial(_compiled.Product, space=variables.space, backend=backend)
        linearisation = Linearisation(outputs, variables.leaves, variables.differentiated, compiled=compiled)
        if products != "reverse":
            linearisation.push_for_pull(always=products == "forward")
        return linearisation

    def in_precision(self, dtype: torch.dtype, variables: Variables) -> Linearisation:
        """The graph of ∇₁g, Φ or F in another dtype, for products with ∂₁F: under autocast for 16 bits, else cast."""
        short = torch.finfo(dtype).bits == 16
        params, hparams, leaves = variables.copies(None if short else dtype)
        with torch.enable_grad(), torch.autocast(variables.space.device.type, dtype, enabled=short):
            if isinstance(self.given, GaussNewton):
                return self.given.linearise(params, hparams, leaves, (), UNREACHED)
            value = self.given(params, hparams)
            if self.kind == "inner_loss":
                outputs = _autodiff.grad([as_scalar(value, "inner_loss")], leaves, create_graph=True)
            else:
                outputs = _autodiff.cast(flatten(value, f"the value of {self.kind}")[0], leaves)
        return Linearisation(outputs, leaves, ())


def outer_gradients(
    outer_loss: Any, variables: Variables, retain_graph: bool = False
) -> tuple[Tensor, Vector, list[Tensor | None]]:
    """E with its graph, ∇₁E as a vector in memory of its own, and ∇₂E for the differentiated hparams (None: zeros)."""
    with torch.enable_grad():
        value = outer_loss(variables.params, variables.hparams) if callable(outer_loss) else outer_loss
    loss = as_scalar(value, "outer_loss")
    if callable(outer_loss):
        variables.check_reached([loss], "outer_loss")
    live = variables.leaves is variables.given
    if live and not callable(outer_loss) and not _autodiff.depends([loss], variables.leaves):
        raise ValueError("outer_loss does not depend on params; was it computed from other tensors, or under no_grad?")
    retain = retain_graph or live or not all(leaf.is_leaf for leaf in variables.differentiated)
    inputs = [*variables.leaves, *variables.differentiated]
    grads, count = _autodiff.grad_or_none([loss], inputs, retain_graph=retain), len(variables.leaves)
    gradient = variables.space.pack(_autodiff.or_zeros(grads[:count], variables.leaves))
    return loss, gradient.own(), grads[count:]


def inner_residual(linearisation: Linearisation, space: Space, fixed_point: bool) -> Vector:
    """F: ∇₁g, w − Φ, or F itself."""
    value = space.pack([y.detach() for y in linearisation.outputs])
    return space.pack([w.detach() for w in linearisation.params]) - value if fixed_point else value


def norm_alone(linearisation: Linearisation, space: Space, fixed_point: bool) -> Tensor:
    """‖F‖; of F itself only the graph is kept."""
    norm = inner_residual(linearisation, space, fixed_point).norm()
    linearisation.drop_values()
    return norm


class LastProduct:
    """The last product, with respect to params and hparams at once: v ↦ Aᵀv; keeps −∂₂Fᵀv and the norm of F.

    norm: ‖F‖; where it is None it is taken of the F of the (last) draw.
    stacked: v is a stack of vectors, and so are the products; the graph stays.
    """

    def __init__(
        self,
        linearise: Callable[[], Linearisation],
        fixed_point: bool,
        draws: int = 1,
        retain_graph: bool = False,
        *,
        norm: Tensor | None = None,
        stacked: bool = False,
    ):
        self.linearise, self.fixed_point, self.draws, self.retain_graph = linearise, fixed_point, draws, retain_graph
        self.norm, self.stacked = norm, stacked

    def __call__(self, v: Vector) -> Vector:
        image, cross = self._draw(v)
        for _ in range(self.draws - 1):
            # A map may write every product into the same memory.
            image, cross = image.copy(), [x.clone() for x in cross]
            new_image, new_cross = self._draw(v)
            image, cross = image + new_image, _autodiff.add(cross, new_cross)
        scale = 1 / self.draws
        image = image * scale if self.draws > 1 else image
        self.cross = _autodiff.scaled(cross, scale if self.fixed_point else -scale)
        return v - image if self.fixed_point else image

    def _draw(self, v: Vector) -> tuple[Vector, list[Tensor]]:
        pack, linearisation = v.space.pack, self.linearise()
        if self.stacked:
            pulled, cross = linearisation.vjp_both_many(v.leaves)
        else:
            pulled, cross = linearisation.vjp_both(v.leaves, self.retain_graph)
        norm = self.norm
        self.residual = inner_residual(linearisation, v.space, self.fixed_point).norm() if norm is None else norm
        return pack(pulled), cross


@dataclass(frozen=True)
class Problem:
    """A bilevel problem and the point (w, λ) that a hypergradient was taken at.

    Attributes:
        outer_loss: E(params, hparams).
        inner: which of inner_loss, fp_map and residual was given, and the callable.
        params, hparams: w and λ.
        symmetric, positive_definite: of A.
        stochastic: whether the inner problem is drawn anew at every product.
        batch_dims: 1 where A is block diagonal.
        compile: whether products are compiled, or by which backend of torch.compile.
        products: how a symmetric A is applied.
        versions: torch's counters of in-place changes of params and hparams at the time.
    """

    outer_loss: Any
    inner: InnerProblem
    params: PyTree
    hparams: PyTree
    symmetric: bool = False
    positive_definite: bool = False
    stochastic: bool = False
    batch_dims: int = 0
    compile: bool | str = False
    products: Products = "reverse"
    versions: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    @property
    def fixed_point(self) -> bool:
        return self.inner.kind == "fp_map"

    def kept(self, variables: Variables) -> Problem:
        """The same to be kept: without graphs, in the user's memory; None stands for what was given evaluated."""
        params, hparams = variables.without_graph()
        outer_loss, inner = self.outer_loss, self.inner
        return Problem(
            outer_loss if callable(outer_loss) else None,
            inner if callable(inner.given) else replace(inner, given=None),
            params,
            hparams,
            *(self.symmetric, self.positive_definite, self.stochastic, self.batch_dims, self.compile, self.products),
            variables.versions(),
        )

    @property
    def variables(self) -> Variables:
        return Variables(self.params, self.hparams, self.batch_dims)

    @property
    def changed(self) -> list[str]:
        """Which of "params" and "hparams" were changed in place since (by an optimizer's step, say)."""
        if self.versions is None:
            return []
        pairs = zip(("params", "hparams"), self.versions, self.variables.versions(), strict=True)
        return [name for name, before, now in pairs if before != now]


class Point:
    """A problem at params: the graphs of ∇₁g, Φ or F and of E, the gradients of E, and Aᵀ as an operator.

    keep: the graph of E stays, and so do the numbers of F; else there is ‖F‖ alone.
    """

    def __init__(self, problem: Problem, variables: Variables, keep: bool = True):
        self.problem, self.variables = problem, variables
        kept = None if problem.stochastic else problem.inner.linearise(variables, problem.compile, problem.products)
        if problem.products == "measured" and kept is not None:
            self.problem = problem = replace(problem, products="forward" if kept.forward else "reverse")

        def linearise() -> Linearisation:
            return problem.inner.linearise(variables) if kept is None else kept

        self.norm = None
        if kept is not None and not keep:
            self.norm = norm_alone(kept, variables.space, problem.fixed_point)
        self.compiled = None if kept is None else kept.compiled
        self.linearise = linearise  # no method: the operator would hold the point that holds it
        self.outer, self.b, self.direct = outer_gradients(problem.outer_loss, variables, keep)
        repeatable = callable(problem.inner.given) and not problem.stochastic
        self.op = operators.adjoint(
            linearise,
            fixed_point=problem.fixed_point,
            symmetric=problem.symmetric,
            positive_definite=problem.positive_definite,
            batch_dims=problem.batch_dims,
            low=partial(problem.inner.in_precision, variables=variables) if repeatable else None,
        )

    def last_product(self, draws: int = 1, retain_graph: bool = False) -> LastProduct:
        return LastProduct(self.linearise, self.problem.fixed_point, draws, retain_graph, norm=self.norm)

    @cached_property
    def residual(self) -> Vector:
        """F: ∇₁g, w − Φ, or F itself."""
        return inner_residual(self.linearise(), self.variables.space, self.problem.fixed_point)


@contextmanager
def random_state_kept_on_error(leaves: Iterable[Any]) -> Iterator[None]:
    """Put torch's random state, on the CPU and where these leaves are, back if an error leaves a half-done call."""
    devices = {leaf.device for leaf in leaves if isinstance(leaf, Tensor) and leaf.device.type == "cuda"}
    state = torch.default_generator.clone_state()  # half the memory of its state as a tensor
    cuda = {device: torch.cuda.get_rng_state(device) for device in devices}
    try:
        yield
    except BaseException:
        torch.set_rng_state(state.get_state())
        for device, kept in cuda.items():
            torch.cuda.set_rng_state(kept, device)
        raise
