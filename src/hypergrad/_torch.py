"""All uses of torch's private or unstable interfaces, each with a fallback if it is missing.

Changes for a new version of torch are made here, and nowhere else.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache, partial
from typing import Any

import optree
import torch
from torch import Tensor
from torch.nn.utils import parametrize
from torch.overrides import has_torch_function

from ._replaced import REPLACED, inside

try:
    from torch.utils._python_dispatch import TorchDispatchMode
except ImportError:  # then nothing is recorded
    TorchDispatchMode = nullcontext
try:
    from torch.autograd.function import BackwardCFunction
except ImportError:  # then every node counts as that of a torch.autograd.Function
    BackwardCFunction = object
try:
    from torch._functorch.vmap import lazy_load_decompositions as _load_decompositions
except ImportError:  # then torch.func.vmap is called
    _load_decompositions = None

# torch.autograd.grad calls this after checks of its arguments, which take a quarter of the time of a small product.
_run_backward: Any = getattr(getattr(torch.autograd.Variable, "_execution_engine", None), "run_backward", None)


def reverse_pass(
    outputs: tuple[Any, ...],
    inputs: tuple[Tensor, ...],
    cotangents: tuple[Tensor, ...] | None,
    retain_graph: bool,
    create_graph: bool,
    batched: bool,
) -> Sequence[Tensor | None]:
    """torch.autograd.grad with allow_unused=True; outputs may be edges of the graph. batched: is_grads_batched."""
    if batched and cotangents and len(cotangents[0]) and None not in _vmap_parts:
        # is_grads_batched uses an older vmap of torch, whose overhead is the time of a small product.
        return vmap(lambda *v: reverse_pass(outputs, inputs, v, retain_graph, create_graph, False), cotangents, "error")
    if _run_backward is None or cotangents is None or batched or has_torch_function(cotangents + inputs):
        return torch.autograd.grad(
            outputs, inputs, cotangents, retain_graph, create_graph, allow_unused=True, is_grads_batched=batched
        )
    return _run_backward(outputs, cotangents, retain_graph, create_graph, inputs, True, accumulate_grad=False)


# The code of the Python functions from which autograd's engine is called.
ENGINE_CALLERS = {
    f.__code__ for f in (reverse_pass, getattr(torch.autograd.graph, "_engine_run_backward", reverse_pass))
}


@contextmanager
def hooks_suspended(tensors: Iterable[Tensor], retained: bool = True) -> Iterator[list[Tensor]]:
    """Gradient hooks of these tensors, which torch.autograd.grad would call, do nothing; yields those that have hooks.

    retained: restore the .grad of tensors that retain it, because torch.autograd.grad writes into it.
    """
    tensors = list(tensors)
    before = [(x, x.grad) for x in tensors if x.retains_grad] if retained else []
    # torch reads this dictionary itself, so the hooks are disabled by emptying it.
    found = [(x, hooks, dict(hooks)) for x in tensors if (hooks := getattr(x, "_backward_hooks", None))]
    for _, hooks, _ in found:
        hooks.clear()
    try:
        yield [x for x, _, _ in found]
    finally:
        for _, hooks, kept in found:
            hooks.update(kept)
        for x, grad in before:
            x.grad = grad


def outside_inference_mode() -> Any:
    """A context without torch.inference_mode: hypergradients can be taken inside it, as they can under no_grad."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


_saved_tensor_hooks: Any = tuple(
    getattr(getattr(torch._C, "_autograd", None), f"_{what}_saved_tensors_default_hooks", None)
    for what in ("top", "pop", "push")
)


@contextmanager
def saved_tensor_hooks_suspended() -> Iterator[None]:
    """In this context hooks on saved tensors do nothing. (A checkpoint's hooks would recompute at each product.)"""
    hooks = None if None in _saved_tensor_hooks else _saved_tensor_hooks[0](False)
    if hooks is None:
        yield
        return
    _saved_tensor_hooks[1]()
    try:
        with saved_tensor_hooks_suspended():  # the hooks of outer contexts
            yield
    finally:
        _saved_tensor_hooks[2](*hooks)


def plain(x: Tensor) -> Tensor:
    """x without its graph, or a copy if x was made under inference_mode. Call it in `outside_inference_mode`."""
    return x.clone() if x.is_inference() else x.detach()


def new_leaf(x: Tensor) -> Tensor:
    """A leaf that requires grad, with the values of x."""
    with outside_inference_mode():
        return plain(x).requires_grad_()


def has_gradient_hooks(x: Tensor) -> bool:
    """Whether hooks of a leaf run when its .grad is written, as far as torch tells."""
    return bool(getattr(x, "_backward_hooks", None) or getattr(x, "_post_accumulate_grad_hooks", None))


def with_hooks(leaves: Sequence[Tensor], grads: Sequence[Any], hooked: Sequence[Tensor]) -> list[Any]:
    """The gradients after the hooks of their leaves. Hooks get the gradients of several losses (a stack) one by one."""
    places, grads = {id(x) for x in hooked}, list(grads)
    for i, x in enumerate(leaves):
        if id(x) in places and grads[i] is not None:
            retained = x.grad if x.retains_grad else None
            several = grads[i].ndim > x.ndim
            rows = [torch.autograd.grad(x, x, row)[0] for row in (grads[i] if several else [grads[i]])]
            grads[i] = torch.stack(rows) if several else rows[0]
            if x.retains_grad:
                x.grad = retained
    return grads


@contextmanager
def random_state_kept_on_error(leaves: Iterable[Any]) -> Iterator[None]:
    """In this context an error restores the random states of the CPU and of the CUDA devices of these leaves."""
    devices = {x.device for x in leaves if isinstance(x, Tensor) and x.is_cuda}
    cuda, cpu = {device: torch.cuda.get_rng_state(device) for device in devices}, torch.get_rng_state()
    try:
        yield
    except BaseException:
        torch.set_rng_state(cpu)
        for device, own in cuda.items():
            torch.cuda.set_rng_state(own, device)
        raise


_will_execute = getattr(torch._C, "_will_engine_execute_node", None)


def wanted_inputs(ctx: Any, skip: int) -> list[int]:
    """In the backward of an autograd.Function: indices, after `skip` other inputs, of the gradients that are needed."""
    needed = [i for i, wanted in enumerate(ctx.needs_input_grad[skip:]) if wanted]
    nodes = getattr(ctx, "next_functions", ())
    if _will_execute is None or len(nodes) != len(ctx.needs_input_grad) - skip:
        return needed
    try:
        return [i for i in needed if _will_execute(nodes[i][0])]
    except RuntimeError:  # not within the engine
        return needed


def is_python_function(node: Any) -> bool:
    """Whether a node of the graph belongs to a torch.autograd.Function; only the Function's result keeps it alive."""
    return isinstance(node, BackwardCFunction)


def version_of(x: Tensor) -> int:
    """torch's counter of in-place changes of x; 0 if there is none."""
    return 0 if x.is_inference() else getattr(x, "_version", 0)


def saved_values(node: Any) -> list[Any]:
    """The values that a node of the graph saves for its derivative; none if torch does not tell."""
    values = [getattr(node, name) for name in _saved_names(type(node))]
    return [*values, *getattr(node, "saved_tensors", ())]


@lru_cache(maxsize=1024)
def _saved_names(kind: type) -> list[str]:
    return [name for name in dir(kind) if name.startswith("_saved_")]


class _Watch(TorchDispatchMode):  # pyright: ignore[reportGeneralTypeIssues]
    def __init__(self, operation: Callable[[Any, Any, dict[str, Any]], Any]):
        super().__init__()
        self.operation = operation

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise torch wraps the next method, which doubles its time

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.operation(func, args, kwargs or {})


@contextmanager
def watched(operation: Callable[[Any, Any, dict[str, Any]], Any]) -> Iterator[None]:
    """In this context `operation(func, args, kwargs)` runs in place of every operation, if torch has dispatch modes."""
    with _Watch(operation), torch.autograd.set_multithreading_enabled(False):  # a mode acts in one thread only
        yield


@lru_cache(maxsize=4096)
def operation_traits(func: Any) -> tuple[bool, bool, Any] | None:
    """Whether it writes, whether it returns a view, and its functional form; None if it is random or unknown."""
    schema, functional = getattr(func, "_schema", None), None
    if schema is None or torch.Tag.nondeterministic_seeded in func.tags:
        return None
    name = schema.name.removeprefix("aten::")
    if schema.is_mutable and name.endswith("_") and not name.endswith("__") and hasattr(torch.ops.aten, name[:-1]):
        functional = getattr(getattr(torch.ops.aten, name[:-1]), func._overloadname, None)
    view = name == "_unsafe_view" or (not schema.is_mutable and any(r.alias_info is not None for r in schema.returns))
    return schema.is_mutable, view, functional


def has_step_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether hooks are registered to run before or after step(); False if torch does not tell."""
    return any(getattr(optimizer, f"_optimizer_step_{when}_hooks", None) for when in ("pre", "post"))


def compiled(graph_module: torch.fx.GraphModule, inputs: Sequence[Tensor], backend: str) -> Callable[..., Any]:
    """The graph compiled for inputs of these forms, if possible without the guards of torch.compile."""
    if backend == "eager":
        return graph_module
    if backend != "inductor" or not hasattr(torch._inductor, "compile"):
        return torch.compile(graph_module, backend=backend, fullgraph=True)
    with torch.no_grad():
        result: Any = torch._inductor.compile(graph_module, list(inputs))
    return result


class Allocated(TorchDispatchMode):  # pyright: ignore[reportGeneralTypeIssues]
    """Bytes of the living tensors that operations in this context have returned: `now`, and the maximum (`peak`)."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x._cdata for x in _storages((args, kwargs))}
        for storage in _storages(result):
            place, size = storage._cdata, storage.nbytes()
            if place not in given and place not in self._alive:
                self._alive[place] = weakref.ref(storage, partial(self._free, place, size))
                self.now += size
        self.peak = max(self.peak, self.now)
        return result

    def _free(self, place: int, size: int, _: object) -> None:
        del self._alive[place]
        self.now -= size

    def taken(self, call: Callable[[], object]) -> int:
        """The most bytes that were alive during the call, minus those alive before it."""
        before, self.peak = self.now, self.now
        call()
        return self.peak - before

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """True: compiled code runs as without this mode, because a replay must give the same numbers."""
        return True


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    leaves: list[Any] = [x for x in optree.tree_leaves(tree) if isinstance(x, Tensor) and x.layout is torch.strided]
    # For a sharded tensor, the storage of this rank's part.
    return [(x.detach().to_local() if hasattr(x, "to_local") else x).untyped_storage() for x in leaves]


_functorch: Any = getattr(torch._C, "_functorch", None)


def transforms_active() -> bool:
    """Whether a transform of torch.func (grad, vjp, jvp, vmap, ...) is active."""
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return bool(active is not None and active())


_vmap_names = ("_vmap_increment_nesting", "_vmap_decrement_nesting", "_add_batch_dim", "_remove_batch_dim")
_vmap_parts: Any = tuple(getattr(_functorch, name, None) for name in _vmap_names)


def vmap(function: Callable[..., Sequence[Any]], tensors: Sequence[Tensor], randomness: str = "different") -> list[Any]:
    """torch.func.vmap without its handling of containers, which takes as long as a small loss."""
    if None in _vmap_parts or _load_decompositions is None or not len(tensors[0]):
        return list(torch.func.vmap(lambda *xs: tuple(function(*xs)), randomness=randomness)(*tensors))
    enter, leave, add, remove = _vmap_parts
    _load_decompositions()  # without them nll_loss, for example, is a slow loop over the entries
    level = enter(count := len(tensors[0]), randomness)
    try:
        return [y if y is None else remove(y, level, count, 0) for y in function(*(add(x, 0, level) for x in tensors))]
    finally:
        leave()


def is_wrapped(x: Tensor) -> bool:
    """Whether x is a tensor of a transform of torch.func."""
    return _functorch is not None and _functorch.is_functorch_wrapped_tensor(x)


def mapped_levels(x: Tensor) -> set[int]:
    """The levels of vmap at which x is mapped."""
    levels = set()
    while is_wrapped(x):
        if _functorch.is_batchedtensor(x):
            levels.add(_functorch.maybe_get_level(x))
        x = _functorch.get_unwrapped(x)
    return levels


def numbers(x: Tensor) -> list[Any]:
    """x.tolist(), which before torch 2.9 fails under a transform, even for an x that is constant in it."""
    if not transforms_active():
        return x.tolist()
    with getattr(torch._C, "_DisableFuncTorch", nullcontext)():
        while is_wrapped(x) and not mapped_levels(x):
            x = _functorch.get_unwrapped(x)
        return x.tolist()


def depends_on_transform(y: Tensor, mapped: set[int]) -> bool:
    """Whether y, computed from constants, is differentiated by a transform, or mapped at a level not in `mapped`."""
    if not is_wrapped(y):
        return False
    if _functorch.is_batchedtensor(y):
        depends = _functorch.maybe_get_level(y) not in mapped
    else:
        depends = y.requires_grad or torch.autograd.forward_ad.unpack_dual(y).tangent is not None
    if depends:
        return True
    from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

    with retrieve_current_functorch_interpreter().lower():
        return depends_on_transform(_functorch.get_unwrapped(y), mapped)


def is_legacy_batch(x: Tensor | None) -> bool:
    """Whether x is mapped by the vmap of torch.autograd (is_grads_batched, vectorize), which is not torch.func's."""
    known = getattr(_functorch, "is_legacy_batchedtensor", None)
    return known is not None and x is not None and known(x)


def forward_mode_levels() -> int:
    """The number of active forward-mode transforms (jvp, jacfwd)."""
    if _functorch is None:
        return 0
    stack = _functorch.get_interpreter_stack() or []
    return sum(level.key() == _functorch.TransformType.Jvp for level in stack)


def is_of_ended_transform(error: RuntimeError) -> bool:
    """Whether torch failed because a tensor belongs to a transform that has ended."""
    text = str(error)
    return ("INTERNAL ASSERT" in text and "functorch" in text) or "escaped from inside a function being vmapped" in text


@contextmanager
def requires_grad_allowed() -> Iterator[None]:
    """In this context x.requires_grad_() is allowed under a transform; torch.func allows itself the same."""
    allowed = getattr(_functorch, "get_inplace_requires_grad_allowed", None)
    if allowed is None or not transforms_active():
        yield
        return
    before = allowed()
    _functorch.set_inplace_requires_grad_allowed(True)
    try:
        yield
    finally:
        _functorch.set_inplace_requires_grad_allowed(before)


def tracked(x: Tensor) -> Tensor:
    """A tensor with the values of x that requires grad, and is connected to x if x requires grad."""
    if x.requires_grad and torch.is_grad_enabled():
        return x.view_as(x)
    with requires_grad_allowed():
        return x.detach().requires_grad_()


_lock, _users = threading.Lock(), 0  # how many contexts of `correct_derivatives` are open, in all threads


def _change_users(by: int) -> None:
    """Replace torch's functions for the first context, and restore them after the last. (A mode would be slower.)"""
    global _users
    with _lock:
        _users += by
        for holder, name, own, other in REPLACED:
            setattr(holder, name, other if _users else own)


@contextmanager
def correct_derivatives(dense: bool = False) -> Iterator[None]:
    """A map that is evaluated in this context has correct derivatives of every order.

    The functions in `_replaced` are replaced. parametrize.cached() is off, because a cached weight belongs to other
    parameters or to no graph. dense: gradients of embeddings are dense, because sparse ones have zero derivatives.
    """
    before = inside.get()
    if before or before is dense:
        yield
        return
    cached = getattr(parametrize, "_cache_enabled", 0)
    token = inside.set(dense)
    _change_users(1)
    try:
        if cached:
            parametrize._cache_enabled = 0  # pyright: ignore[reportAttributeAccessIssue]
        yield
    finally:
        _change_users(-1)
        inside.reset(token)
        if cached:
            parametrize._cache_enabled = cached  # pyright: ignore[reportAttributeAccessIssue]
