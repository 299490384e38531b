"""Derivatives with zeros for unused inputs. With _implicit_function.py the only caller of torch.autograd."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import has_torch_function

FREED = (
    "the graph of this loss or map, or of hparams, was already freed by an earlier backward(), grad() or "
    "hypergradient: evaluate it again; losses and maps passed as callables are evaluated anew"
)
ATTENTION = (
    "a fused attention kernel has no second derivative: evaluate the model under "
    "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)"
)


# What torch.autograd.grad calls in the end; its checks of what comes take a quarter of a small product's time. The
# function itself takes its place where torch has no such call, and where a mode or a subclass overrides it.
_engine = getattr(getattr(torch.autograd.Variable, "_execution_engine", None), "run_backward", None)


_keep_graphs: ContextVar[bool] = ContextVar("keep_graphs", default=False)


@contextmanager
def graphs_kept() -> Iterator[None]:
    """No reverse pass frees a graph meanwhile: several that follow may share what their functions close over."""
    token = _keep_graphs.set(True)
    try:
        yield
    finally:
        _keep_graphs.reset(token)


def _explained(error: RuntimeError) -> RuntimeError:
    """torch's error with what to do about it, or the error itself."""
    text = str(error)
    if "backward through the graph a second time" in text:
        return RuntimeError(FREED)
    if "scaled_dot_product" in text and "derivative" in text:
        return RuntimeError(ATTENTION)
    return error


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
    """Σᵢ cotangentᵢᵀ ∂outputᵢ/∂input for each input; zeros where nothing depends on it. Never writes .grad.

    batched: cotangents have one more leading axis, and so have the results (one vectorised pass).
    must_reach: the ValueError to raise where no output depends on any input.
    """
    grads: list[Any] = grad_or_none(
        outputs, inputs, cotangents, retain_graph=retain_graph, create_graph=create_graph, batched=batched
    )
    unused = [i for i, g in enumerate(grads) if g is None]
    if must_reach and len(unused) == len(grads):
        raise ValueError(must_reach)
    for i in unused:
        lead = (cotangents[0].shape[0],) if batched and cotangents else ()
        grads[i] = inputs[i].new_zeros(*lead, *inputs[i].shape) if lead else torch.zeros_like(inputs[i])
    return grads


def or_zeros(grads: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """Zeros for None, as views of one number: they take no memory and must not be written to."""
    return [x.new_zeros(()).expand_as(x) if g is None else g for g, x in zip(grads, like, strict=True)]


def grad_or_none(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor] | None = None,
    *,
    retain_graph: bool = False,
    create_graph: bool = False,
    batched: bool = False,
) -> list[Tensor | None]:
    """As `grad`, with None where nothing depends on the input."""
    kept = [i for i, y in enumerate(outputs) if isinstance(y, GradientEdge) or y.requires_grad]
    if not kept or not inputs:
        return [None] * len(inputs)
    if len(kept) < len(outputs):
        outputs = [outputs[i] for i in kept]
        cotangents = None if cotangents is None else [cotangents[i] for i in kept]
    outputs, inputs, keep = tuple(outputs), tuple(inputs), retain_graph or create_graph or _keep_graphs.get()
    if cotangents is None and len(outputs) == 1 and outputs[0].numel() == 1:
        cotangents = (torch.ones_like(outputs[0]),)
    elif cotangents is not None:
        cotangents = tuple(cotangents)
    try:
        # Cotangents are of the outputs' types, and outputs may be edges.
        if _engine is None or cotangents is None or batched or has_torch_function(cotangents + inputs):
            grads = torch.autograd.grad(
                outputs, inputs, cotangents, keep, create_graph, allow_unused=True, is_grads_batched=batched
            )
        else:
            grads = _engine(outputs, cotangents, keep, create_graph, inputs, True, accumulate_grad=False)
    except RuntimeError as error:
        better = _explained(error)
        if better is error:
            raise
        raise better from error
    return [g if g is None or g.layout is torch.strided else g.to_dense() for g in grads]


@contextmanager
def gradients_taken(inputs: Iterable[Tensor]) -> Iterator[list[bool]]:
    """For each gradient with respect to one of the inputs that is taken meanwhile, whether it has a graph."""
    taken: list[bool] = []
    hooks = [x.register_hook(lambda _: taken.append(torch.is_grad_enabled())) for x in inputs if x.requires_grad]
    try:
        yield taken
    finally:
        for hook in hooks:
            hook.remove()


def saved(outputs: Sequence[Tensor], seen: set[Any]) -> dict[int, int]:
    """Bytes of each storage that the graph of outputs keeps, by address; nodes in `seen` are left out, and added to it.

    Reads the nodes: saved-tensor hooks would forbid torch.func inside what is measured.
    """
    before, sizes = set(seen), {}
    for node, _ in _behind([_edge(y) for y in outputs if y.requires_grad], seen):
        if node in before or hasattr(node, "variable"):
            continue
        values = [getattr(node, name) for name in _kept_by(type(node))]
        for value in (*values, *getattr(node, "saved_tensors", ())):
            for x in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(x, Tensor) and x.layout is torch.strided:
                    sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return sizes


@lru_cache(maxsize=1024)
def _kept_by(kind: type) -> list[str]:
    return [name for name in dir(kind) if name.startswith("_saved_")]


def _edge(x: Tensor) -> tuple[Any, int]:
    """Where x comes from: a node of the graph, and which of its outputs x is."""
    edge = get_gradient_edge(x)
    return edge.node, edge.output_nr


def _behind(edges: Iterable[tuple[Any, int]], seen: set[Any]) -> Iterator[tuple[Any, int]]:
    """These edges and all that lead to them, some more than once; nodes in `seen` are not entered again."""
    stack = list(edges)
    while stack:
        node, output = stack.pop()
        yield node, output
        if node not in seen:
            seen.add(node)
            stack.extend(parent for parent in node.next_functions if parent[0] is not None)


def depends(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> bool:
    """Whether any output has any input in its graph. Walks the graph; evaluates nothing."""
    sought = {_edge(x) for x in inputs if x.requires_grad}
    return any(edge in sought for edge in _behind([_edge(y) for y in outputs if y.requires_grad], set()))


def unreached(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[int]:
    """The places of inputs that require grad and that no output depends on. Walks the graph between them."""
    places = {_edge(x): i for i, x in enumerate(inputs) if x.requires_grad}
    for edge in _behind([_edge(y) for y in outputs if y.requires_grad], {node for node, _ in places}):
        places.pop(edge, None)
        if not places:
            break
    return list(places.values())


def computed_from(tensors: Sequence[Tensor]) -> tuple[int, int] | None:
    """The first (i, j) where tensor i was computed from tensor j, or None. Walks the graph."""
    places = {_edge(x): i for i, x in enumerate(tensors) if x.requires_grad}
    seen: set[Any] = set()
    for i, x in enumerate(tensors):
        parents = () if x.grad_fn is None else x.grad_fn.next_functions
        for edge in _behind([parent for parent in parents if parent[0] is not None], seen):
            if places.get(edge, i) != i:
                return i, places[edge]
    return None


def strangers(outputs: Sequence[Tensor], declared: Sequence[Tensor]) -> list[Tensor]:
    """Leaves that require grad, stand in the graph of outputs and are not among the declared tensors."""
    known = {id(x) for x in declared}
    edges = _behind([_edge(y) for y in outputs if y.requires_grad], set())
    variables = (getattr(node, "variable", None) for node, _ in edges)
    return list({id(x): x for x in variables if x is not None and id(x) not in known}.values())


def backward(tensors: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """tensor.backward(grad) for each tensor that requires grad, in one pass: the only function that writes .grad.

    An error on the way (a graph that was freed, a hook) leaves every .grad as it was.
    """
    pairs = [(x, g) for x, g in zip(tensors, grads, strict=True) if x.requires_grad]
    outputs = [x for x, _ in pairs]
    written = [] if all(x.is_leaf for x in outputs) else strangers(outputs, ())
    written += [x for x in outputs if x.retains_grad]
    kept = [(x, x.grad, None if x.grad is None else x.grad.clone()) for x in written]
    try:
        torch.autograd.backward(outputs, [g for _, g in pairs])
    except BaseException as error:
        for x, before, numbers in kept:
            x.grad = before
            if before is not None and numbers is not None:
                before.detach().copy_(numbers)
        better = _explained(error) if isinstance(error, RuntimeError) else error
        if better is error:
            raise
        raise better from error


def add(xs: Sequence[Tensor | None], ys: Sequence[Tensor]) -> list[Tensor]:
    """Sums in memory of their own; None stands for zeros."""
    return [y.clone() if x is None else x + y for x, y in zip(xs, ys, strict=True)]


def cast(xs: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in the dtypes of others."""
    return [x.to(y.dtype) for x, y in zip(xs, like, strict=True)]


def scaled(xs: Sequence[Tensor], a: float) -> list[Tensor]:
    return list(xs) if a == 1 else [-x if a == -1 else x * a for x in xs]


def _retained(outputs: Sequence[Tensor], params: Sequence[Tensor], v: Sequence[Tensor]) -> list[Tensor]:
    return grad(outputs, params, v, retain_graph=True)


class Linearisation:
    """The derivative of outputs F(w, λ) at one point, from one graph that is kept until this object goes.

    Args:
        outputs: the leaves of F, with their graph. See `drop_values`.
        params: the leaves of w in that graph.
        hparams: the leaves of λ that require grad.
        curvature: v ↦ Bv (batched: for a stack of v) with a symmetric B that stands for ∂₁F; None: ∂₁F itself.
        probe: the c at which `pulled` is taken, like outputs.
        compiled: makes v ↦ ∂₁Fᵀv, by other means, of that by a retained reverse pass.

    Attributes:
        forward: take ∂₁F v for ∂₁Fᵀv, for a ∂₁F that is symmetric.
    """

    def __init__(
        self,
        outputs: Sequence[Tensor],
        params: Sequence[Tensor],
        hparams: Sequence[Tensor] = (),
        curvature: Callable[[Sequence[Tensor], bool], list[Tensor]] | None = None,
        probe: Sequence[Tensor] | None = None,
        compiled: Callable[[Callable[[Sequence[Tensor]], list[Tensor]]], Any] | None = None,
    ):
        self.outputs: list[Any] = list(outputs)
        self.like = outputs
        self.params = params
        self.hparams = hparams
        self.curvature = curvature
        self.probe = probe
        # No method of this object: it would be in a cycle with what it holds.
        plain = partial(_retained, self.outputs, params)
        self.compiled = None if compiled is None else compiled(plain)
        self.forward = False
        self._transposed: tuple[list[Tensor], list[Any]] | None = None

    def drop_values(self) -> None:
        """Keep the graph of an F that has the form of w, without its numbers: a vector less for as long as it is used.

        A tensor without a graph, and a leaf, are left as they are; so is what a torch.autograd.Function gave: it alone
        keeps its graph.
        """
        self.like = self.params
        for i, y in enumerate(self.outputs):
            if y.grad_fn is not None and not isinstance(y.grad_fn, BackwardCFunction):
                self.outputs[i] = get_gradient_edge(y)

    def vjp(self, v: Sequence[Tensor]) -> list[Tensor]:
        """∂₁Fᵀ v: one retained reverse pass."""
        return self._push(v, batched=False) if self.forward else self._pull(v, batched=False)

    def vjp_many(self, vs: Sequence[Tensor]) -> list[Tensor]:
        """∂₁Fᵀ v for a stack [m, *shape] of v: one vectorised pass, or a loop where torch has none."""
        batched = self._push if self.forward else self._pull
        return many(self.vjp, lambda vs: batched(vs, batched=True), vs)

    def push_for_pull(self, always: bool) -> None:
        """Apply a symmetric ∂₁F by `jvp` from now on: always, or if that takes less time than `vjp`.

        Raises: ValueError where the two products differ.
        """
        draw = torch.Generator().manual_seed(0)
        v = [torch.randn(y.shape, generator=draw, dtype=y.dtype).to(y.device) for y in self.like]
        pairs = list(zip(self.vjp(v), self.jvp(v), strict=True))
        apart = math.hypot(*(float((x - y).norm()) for x, y in pairs))
        size = math.hypot(*(float(x.norm()) for x, _ in pairs))
        # Of an Aᵀv that is not finite the solver tells.
        if math.isfinite(size) and not apart <= size * max(torch.finfo(y.dtype).eps for y in v) ** 0.5:
            raise ValueError(
                f"Av and Aᵀv differ by {apart:.1e}, and Aᵀv is of size {size:.1e}: A is not symmetric, or an operation "
                f'in it (once_differentiable, or a backward that detaches) has no second derivative; use "reverse"'
            )
        seconds = {self.vjp: float("inf"), self.jvp: float("inf")}
        for product in [] if always else 2 * list(seconds):
            seconds[product] = min(seconds[product], seconds_of(product, v))
        self.forward = always or seconds[self.jvp] < seconds[self.vjp]
        if not self.forward:
            self._transposed = None

    def _pull(self, v: Sequence[Tensor], batched: bool) -> list[Tensor]:
        if self.curvature is not None:
            return self.curvature(v, batched)
        if self.compiled is not None and not batched:
            return self.compiled(v)
        return grad(self.outputs, self.params, v, retain_graph=True, batched=batched)

    def vjp_both(self, v: Sequence[Tensor], retain_graph: bool) -> tuple[list[Tensor], list[Tensor]]:
        """(∂₁Fᵀ v, ∂₂Fᵀ v) in one reverse pass. Without retain_graph the last: the graph is freed on the way."""
        # Between hparams that one network computes torch would free the network's graph as well.
        retain_graph = retain_graph or not all(x.is_leaf for x in self.hparams)
        if self.compiled is not None and not retain_graph:
            self.compiled.forget()
        if self.curvature is not None:
            return self.curvature(v, False), grad(self.outputs, self.hparams, v, retain_graph=retain_graph)
        both = grad(self.outputs, [*self.params, *self.hparams], v, retain_graph=retain_graph)
        return both[: len(self.params)], both[len(self.params) :]

    def vjp_both_many(self, vs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """(∂₁Fᵀ v, ∂₂Fᵀ v) for a stack [m, *shape] of v. The graph stays."""
        inputs = [*self.params, *self.hparams] if self.curvature is None else self.hparams
        both = stacked(self.outputs, inputs, vs)
        if self.curvature is not None:
            return self.curvature(vs, True), both
        return both[: len(self.params)], both[len(self.params) :]

    @property
    def pulled(self) -> list[Tensor | None]:
        """∂₁Fᵀ c at the probe, as a function of c; None where nothing depends on the leaf."""
        return self._transpose()[1]

    def jvp(self, u: Sequence[Tensor]) -> list[Tensor]:
        """∂₁F u: the vjp is linear in its cotangent, so its derivative with respect to the cotangent is ∂₁F.

        The graph of the vjp is built at the first call, from the retained graph; F is not evaluated again.
        """
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
        """c, and ∂₁Fᵀ c; of the latter only the graph where there is no probe: zeros need no memory."""
        if self._transposed is None:
            at = or_zeros([None] * len(self.like), self.like) if self.probe is None else self.probe
            with torch.enable_grad():
                cotangents = [c.detach().requires_grad_() for c in at]
                pulled = grad_or_none(self.outputs, self.params, cotangents, create_graph=True)
            if self.probe is None:
                pulled = [y if y is None or not y.requires_grad else get_gradient_edge(y) for y in pulled]
            self._transposed = cotangents, pulled
        return self._transposed


def stacked(outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> list[Tensor]:
    """`grad` for a stack [m, *shape] of cotangents, at once where torch can. The graph stays."""

    def pull(v: Sequence[Tensor], batched: bool) -> list[Tensor]:
        return grad(outputs, inputs, v, retain_graph=True, batched=batched)

    return many(lambda v: pull(v, False), lambda vs: pull(vs, True), cotangents)


def seconds_of(product: Callable[[Sequence[Tensor]], list[Tensor]], v: Sequence[Tensor]) -> float:
    """Wall time of a product, the device's part included."""
    devices = {x.device for x in v if x.device.type != "cpu"}
    for device in devices:
        torch.accelerator.synchronize(device)
    start = time.perf_counter()
    product(v)
    for device in devices:
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start


def many(
    one: Callable[[list[Tensor]], list[Tensor]],
    batched: Callable[[Sequence[Tensor]], list[Tensor]],
    stacks: Sequence[Tensor],
) -> list[Tensor]:
    """The batched product where torch can vectorise it, else one product at a time."""
    try:
        return batched(stacks)
    except RuntimeError:
        # A map may write every product into the same memory.
        columns = [[x.clone() for x in one([stack[j] for stack in stacks])] for j in range(len(stacks[0]))]
        return [torch.stack(parts) for parts in zip(*columns, strict=True)]


def each(function: Callable[[Sequence[Tensor]], list[Tensor]], tensors: Sequence[Tensor]) -> list[Tensor]:
    """function(tensors) for each entry of their first axis, all at once: results stacked.

    Random numbers are drawn for each entry by itself.
    """

    # vmap's own handling of containers takes as long as a small loss: it gets flat arguments, and one result as it is.
    def on_flat(*tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        results = function(tensors)
        return results[0] if len(results) == 1 else tuple(results)

    results = torch.func.vmap(on_flat, in_dims=(0,) * len(tensors), randomness="different")(*tensors)
    return [results] if isinstance(results, Tensor) else list(results)


def as_scalar(loss: Any, name: str) -> Tensor:
    """The loss, or an error that says what came instead of a real scalar tensor."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"{name} must give a scalar tensor, got {type(loss).__name__}")
    if loss.numel() != 1 or not loss.is_floating_point():
        raise ValueError(
            f"{name} must give a scalar, got shape {tuple(loss.shape)}, {loss.dtype}; reduce it to one number"
        )
    return loss
