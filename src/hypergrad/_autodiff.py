"""Derivatives with zeros for unused inputs, and products with the derivative of a map at one point."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from . import _torch
from ._graph import check_independent, noticing_hooks, undeclared_leaves
from ._tree import check_distinct

FREED = (
    "the graph of this loss or map, or of hparams, was already freed by an earlier backward(), grad() or "
    "hypergradient: evaluate it again, or pass losses and maps as callables"
)
UNREACHED = (
    "inner_loss does not depend on params; was it computed under no_grad, or from other tensors (of a live model)?"
)
ATTENTION = (
    "a fused attention kernel has no second derivative: evaluate the model under "
    "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)"
)
COMPILED = (
    "a model compiled by torch.compile has no second derivative, and its graph cannot be kept: evaluate the plain "
    'model here, or compile it with backend="eager"'
)
NO_SECOND = ("donated buffers", "aot_autograd does not currently support double backward")
_keep_graphs: ContextVar[bool] = ContextVar("keep_graphs", default=False)


@contextmanager
def graphs_kept() -> Iterator[None]:
    """In this context no reverse pass frees a graph, because the functions of several passes may share one."""
    token = _keep_graphs.set(True)
    try:
        yield
    finally:
        _keep_graphs.reset(token)


_users_autocast: ContextVar[dict[str, Any] | None] = ContextVar("users_autocast", default=None)
_NOTHING = nullcontext()
_has_autocast = lru_cache(torch.amp.is_autocast_available)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """In this context torch.autocast acts only inside `users_autocast`."""
    kind = device.type
    return _autocast_off(kind) if _has_autocast(kind) and torch.is_autocast_enabled(kind) else _NOTHING


@contextmanager
def _autocast_off(kind: str) -> Iterator[None]:
    token = _users_autocast.set({"device_type": kind, "dtype": torch.get_autocast_dtype(kind)})
    try:
        with torch.autocast(kind, enabled=False):
            yield
    finally:
        _users_autocast.reset(token)


def users_autocast() -> AbstractContextManager[Any]:
    """The autocast that `without_autocast` turned off, in which the user's losses and maps are evaluated."""
    kept = _users_autocast.get()
    return _NOTHING if kept is None else torch.autocast(**kept)


def _explain(error: RuntimeError) -> None:
    """Raise an error with a remedy in place of torch's error, if its cause is known."""
    text = str(error)
    if "backward through the graph a second time" in text:
        raise RuntimeError(FREED) from error
    if "scaled_dot_product" in text and "derivative" in text:
        raise RuntimeError(ATTENTION) from error
    compiled = any("_aot_autograd" in frame.filename for frame in traceback.extract_tb(error.__traceback__))
    if any(part in text for part in NO_SECOND) or ("leaf Variable" in text and compiled):
        raise RuntimeError(COMPILED) from error


def grad(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor] | None = None,
    *,
    retain_graph: bool = False,
    create_graph: bool = False,
    batched: bool = False,
    must_reach: str | None = None,
) -> list[Tensor]:
    """Σᵢ cotangentᵢᵀ ∂outputᵢ/∂input for each input, or zeros if no output depends on it.

    batched: cotangents have a leading axis, and so do the results. must_reach: the message of a ValueError that is
    raised if no output depends on any input.
    """
    grads = grad_or_none(
        outputs, inputs, cotangents, retain_graph=retain_graph, create_graph=create_graph, batched=batched
    )
    for g in grads:
        if g is None:
            break
    else:  # no gradient is None, which is the usual case
        return grads  # pyright: ignore[reportReturnType]
    if must_reach and all(g is None for g in grads):
        raise ValueError(must_reach)
    return new_zeros(grads, inputs, *((len(cotangents[0]),) if batched and cotangents else ()))


def new_zeros(grads: Iterable[Tensor | None], like: Iterable[Tensor], *lead: int) -> list[Tensor]:
    """The gradients, with new zeros of shape [*lead, *x.shape] in place of None."""
    pairs = zip(grads, like, strict=True)
    return [g if g is not None else x.new_zeros(*lead, *x.shape) if lead else torch.zeros_like(x) for g, x in pairs]


def or_zeros(grads: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """The gradients, with views of a single zero in place of None: they take no memory and must not be written to."""
    return [x.new_zeros(()).expand_as(x) if g is None else g for g, x in zip(grads, like, strict=True)]


def grad_or_none(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor] | None = None,
    *,
    retain_graph: bool = False,
    create_graph: bool = False,
    batched: bool = False,
    dense: bool = True,
    hooks: list[str] | None = None,
) -> list[Tensor | None]:
    """As `grad`, but None for zeros. dense: make sparse gradients dense. hooks: `found` of `noticing_hooks`."""
    for y in outputs:
        if not (isinstance(y, GradientEdge) or y.requires_grad):
            kept = [i for i, y in enumerate(outputs) if isinstance(y, GradientEdge) or y.requires_grad]
            outputs = [outputs[i] for i in kept]
            cotangents = None if cotangents is None else [cotangents[i] for i in kept]
            break
    if not outputs or not inputs:
        return [None] * len(inputs)
    outputs, inputs, keep = tuple(outputs), tuple(inputs), retain_graph or create_graph or _keep_graphs.get()
    if cotangents is None and len(outputs) == 1 and outputs[0].numel() == 1:
        cotangents = (torch.ones_like(outputs[0]),)
    elif cotangents is not None:
        cotangents = tuple(cotangents)
    reverse = partial(_torch.reverse_pass, outputs, inputs, cotangents, keep, create_graph, batched)
    try:
        grads = reverse() if hooks is None else noticing_hooks(hooks, inputs, reverse)
    except RuntimeError as error:
        _explain(error)
        raise
    for g in grads:
        if dense and g is not None and g.layout is not torch.strided:
            return densified(grads)
    return list(grads)


def densified(grads: Sequence[Any]) -> list[Any]:
    return [g if g is None or g.layout is torch.strided else g.to_dense() for g in grads]


@contextmanager
def gradients_taken(inputs: Iterable[Tensor]) -> Iterator[list[bool]]:
    """A list to which each gradient that is taken with respect to an input appends whether it has a graph."""
    taken: list[bool] = []
    hooks = [x.register_hook(lambda _: taken.append(torch.is_grad_enabled())) for x in inputs if x.requires_grad]
    try:
        yield taken
    finally:
        for hook in hooks:
            hook.remove()


def backward(tensors: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """tensor.backward(grad) for the tensors that require grad, in one pass. An error leaves every .grad unchanged."""
    pairs = [(x, g) for x, g in zip(tensors, grads, strict=True) if x.requires_grad]
    outputs = [x for x, _ in pairs]
    written = [] if all(x.is_leaf for x in outputs) else undeclared_leaves(outputs, ())
    written += [x for x in outputs if x.retains_grad]
    kept = [(x, x.grad, None if x.grad is None else x.grad.clone()) for x in written]
    try:
        torch.autograd.backward(outputs, [g for _, g in pairs])
    except BaseException as error:
        for x, before, numbers in kept:
            x.grad = before
            if before is not None and numbers is not None:
                before.detach().copy_(numbers)
        if isinstance(error, RuntimeError):
            _explain(error)
        raise


def add_or_none(xs: Sequence[Tensor | None], ys: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The sums x + y in new memory. None stands for zeros; None + None is None."""
    pairs = zip(xs, ys, strict=True)
    return [(None if y is None else y.clone()) if x is None else (x.clone() if y is None else x + y) for x, y in pairs]


def copies(xs: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if x is None else x.clone() for x in xs]


def scaled(xs: Sequence[Tensor | None], a: float) -> list[Tensor | None]:
    return list(xs) if a == 1 else [None if x is None else -x if a == -1 else x * a for x in xs]


def _retained(outputs: Sequence[Tensor], params: Sequence[Tensor], v: Sequence[Tensor]) -> list[Tensor]:
    return grad(outputs, params, v, retain_graph=True)


class Linearisation:
    """Products with the derivative of F(w, λ) at one point, all from one graph that lives as long as this object.

    compile: takes v ↦ ∂₁Fᵀv, a retained reverse pass, and returns the function that is called in its place.
    """

    def __init__(
        self,
        outputs: Sequence[Tensor],
        params: Sequence[Tensor],
        hparams: Sequence[Tensor] = (),
        curvature: Callable[[Sequence[Tensor], bool], list[Tensor]] | None = None,
        probe: Sequence[Tensor] | None = None,
        compile: Callable[[Callable[[Sequence[Tensor]], list[Tensor]]], Any] | None = None,
    ):
        self.outputs: list[Any] = list(outputs)  # the leaves of F, or edges of their graph after `drop_values`
        self.like = outputs  # tensors with the shapes and dtypes of F's leaves
        self.params = params  # the leaves of w in that graph
        self.hparams = hparams  # the leaves of λ that require grad
        self.curvature = curvature  # (v, batched) ↦ Bv, with a symmetric B that replaces ∂₁F
        self.probe = probe  # the cotangent c at which `pulled` is evaluated
        # Not a bound method, which would make a reference cycle.
        plain = partial(_retained, self.outputs, params)
        self.compiled = None if compile is None else compile(plain)
        self.params_unreached = False  # whether `vjp_both` found that no output depends on any of params
        self.hooks: list[str] = []  # names of hooks that changed a gradient in `vjp_both` or `vjp_both_many`
        self.detaches = False  # whether F was seen to take numbers out of the graph
        self._transposed: tuple[list[Tensor], list[Any]] | None = None

    def drop_values(self) -> None:
        """Free the values of F, which has the form of w; its graph stays. A value that alone keeps the graph stays."""
        self.like = self.params
        for i, y in enumerate(self.outputs):
            if (node := y.grad_fn) is not None and not _torch.is_python_function(node):
                self.outputs[i] = GradientEdge(node, y.output_nr)

    def vjp(self, v: Sequence[Tensor]) -> list[Tensor]:
        """∂₁Fᵀ v: one retained reverse pass."""
        if self.curvature is not None:
            return self.curvature(v, False)
        return _retained(self.outputs, self.params, v) if self.compiled is None else self.compiled(v)

    def vjp_many(self, vs: Sequence[Tensor]) -> list[Tensor]:
        """∂₁Fᵀ v for a stack [m, *shape] of v: one vectorised pass, or a loop where torch cannot vectorise it."""
        curvature = self.curvature
        if curvature is not None:
            return many(self.vjp, lambda vs: curvature(vs, True), vs)
        return new_zeros(stacked(self.outputs, self.params, vs), self.params, len(vs[0]))

    def vjp_both(self, v: Sequence[Tensor], retain_graph: bool) -> tuple[list[Tensor], list[Tensor | None]]:
        """(∂₁Fᵀ v, ∂₂Fᵀ v) in one reverse pass, with None for a λ on which F does not depend."""
        # If a network computes hparams, freeing the graph would free the part of the network between them, too.
        retain_graph = retain_graph or not all(x.is_leaf for x in self.hparams)
        if self.compiled is not None and not retain_graph:
            self.compiled.forget()
        options: dict[str, Any] = {"retain_graph": retain_graph, "hooks": self.hooks}
        if self.curvature is not None:
            return self.curvature(v, False), grad_or_none(self.outputs, self.hparams, v, **options)
        both = grad_or_none(self.outputs, [*self.params, *self.hparams], v, **options)
        pulled, cross = both[: len(self.params)], both[len(self.params) :]
        self.params_unreached = all(g is None for g in pulled)
        return new_zeros(pulled, self.params), cross

    def vjp_both_many(self, vs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
        """(∂₁Fᵀ v, ∂₂Fᵀ v) as in `vjp_both`, for a stack [m, *shape] of v. The graph stays."""
        if self.curvature is not None:
            return self.vjp_many(vs), stacked(self.outputs, self.hparams, vs)
        both = stacked(self.outputs, [*self.params, *self.hparams], vs, self.hooks)
        return new_zeros(both[: len(self.params)], self.params, len(vs[0])), both[len(self.params) :]

    @property
    def pulled(self) -> list[Tensor | None]:
        """∂₁Fᵀ c at c = probe, with a graph of c; None for a leaf on which F does not depend."""
        return self._transpose()[1]

    def jvp(self, u: Sequence[Tensor]) -> list[Tensor]:
        """∂₁F u: the derivative of the vjp with respect to its cotangent. Its graph is built at the first call."""
        return self._push(u, batched=False)

    def jvp_many(self, us: Sequence[Tensor]) -> list[Tensor]:
        """∂₁F u for a stack [m, *shape] of u."""
        return many(self.jvp, lambda us: self._push(us, batched=True), us)

    def _push(self, u: Sequence[Tensor], batched: bool) -> list[Tensor]:
        if self.curvature is not None:
            return self.curvature(u, batched)
        cotangents, pulled = self._transpose()
        reached = [i for i, y in enumerate(pulled) if y is not None]
        outputs, u = [pulled[i] for i in reached], [u[i] for i in reached]
        return grad(outputs, cotangents, u, retain_graph=True, batched=batched)

    def _transpose(self) -> tuple[list[Tensor], list[Any]]:
        """c and ∂₁Fᵀ c. Without a probe c is zero, and edges of the graph stand for ∂₁Fᵀ c, which is zero as well."""
        if self._transposed is None:
            at = or_zeros([None] * len(self.like), self.like) if self.probe is None else self.probe
            with torch.enable_grad():
                cotangents = [c.detach().requires_grad_() for c in at]
                pulled = grad_or_none(self.outputs, self.params, cotangents, create_graph=True)
            if self.probe is None:
                pulled = [y if y is None or not y.requires_grad else get_gradient_edge(y) for y in pulled]
            self._transposed = cotangents, pulled
        return self._transposed


def stacked(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor], hooks: list[str] | None = None
) -> list[Tensor | None]:
    """`grad_or_none` for a stack [m, *shape] of cotangents, vectorised where torch can. The graph stays."""

    def pull(v: Sequence[Tensor], batched: bool = False) -> list[Any]:
        return grad_or_none(outputs, inputs, v, retain_graph=True, batched=batched, hooks=hooks)

    return many(pull, lambda vs: pull(vs, True), cotangents)


def many(
    one: Callable[[list[Tensor]], list[Any]], batched: Callable[[Sequence[Tensor]], list[Any]], stacks: Sequence[Tensor]
) -> list[Any]:
    """The batched function of the stacks if torch can vectorise it, else one call of `one` after another."""
    with suppress(RuntimeError):
        if len(stacks[0]) != 1:
            return batched(stacks)
    # A map may write every product into the same memory.
    columns = [copies(one([stack[j : j + 1].squeeze(0) for stack in stacks])) for j in range(len(stacks[0]))]
    return [None if parts[0] is None else torch.stack(parts) for parts in zip(*columns, strict=True)]


def taking_derivatives(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """function(w, λ) on leaves, which may itself call torch.autograd.grad with respect to w.

    If a call fails because w does not require grad, that call and all later ones get a w that does.
    """
    untracked = True

    def evaluate(w: tuple[Tensor, ...], h: Any) -> Any:
        nonlocal untracked
        if untracked:
            try:
                return function(w, h)
            except RuntimeError as error:
                if not any(text in str(error) for text in ("does not require grad", "requires_grad_()")):
                    raise
        if _torch.transforms_active():
            with _torch.requires_grad_allowed():
                values = torch.func.vjp(lambda *w: tuple(function(w, h)), *w)[0]
        else:
            with _torch.outside_inference_mode(), torch.enable_grad():
                w, h = (tuple(x.clone() if x.is_inference() else x for x in xs) for xs in (w, h))
                values = function(tuple(map(_torch.tracked, w)), h)
        untracked = False
        return values

    return evaluate


def check_hparams(leaves: list[Tensor], names: Sequence[str]) -> tuple[list[int], list[Tensor]]:
    """The indices of the leaves that require grad, and these leaves; ValueError for none, equal or dependent leaves."""
    check_distinct(leaves, names)
    if not all(x.is_leaf for x in leaves):
        check_independent(leaves, names)
    places = [i for i, leaf in enumerate(leaves) if leaf.requires_grad]
    if not places:
        raise ValueError("none of hparams requires grad; call requires_grad_() on those to differentiate")
    return places, [leaves[i] for i in places]


def as_scalar(loss: Any, name: str) -> Tensor:
    if not isinstance(loss, Tensor):
        raise TypeError(f"{name} must give a scalar tensor, got {type(loss).__name__}")
    if loss.numel() != 1 or not loss.is_floating_point():
        raise ValueError(
            f"{name} must give a scalar, got shape {tuple(loss.shape)}, {loss.dtype}; reduce it to one number"
        )
    return loss


def as_losses(values: Any, name: str) -> Tensor:
    if not isinstance(values, Tensor) or not values.is_floating_point() or values.ndim != 1 or not len(values):
        got = f"shape {tuple(values.shape)}, {values.dtype}" if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"{name} must give a tensor [k] of k ≥ 1 losses, got {got}; torch.stack makes one of scalars; for a single "
            f"loss use implicit.grad (unroll.reverse)"
        )
    return values
