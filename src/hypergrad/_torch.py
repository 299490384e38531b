"""Every use of torch's private or unstable interfaces, each with the plain fallback where it is missing.

A new version of torch is looked at here, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function

try:
    from torch.utils._python_dispatch import TorchDispatchMode
except ImportError:  # nothing is then recorded
    TorchDispatchMode = object
try:
    from torch.autograd.function import BackwardCFunction
except ImportError:  # every node then counts as that of a torch.autograd.Function
    BackwardCFunction = object

# What torch.autograd.grad calls in the end; its checks of the arguments take a quarter of a small product's time.
_run_backward = getattr(getattr(torch.autograd.Variable, "_execution_engine", None), "run_backward", None)


def reverse_pass(
    outputs: tuple[Any, ...],
    inputs: tuple[Tensor, ...],
    cotangents: tuple[Tensor, ...] | None,
    retain_graph: bool,
    create_graph: bool,
    batched: bool,
) -> Sequence[Tensor | None]:
    """torch.autograd.grad with allow_unused=True; outputs may be edges of the graph."""
    if _run_backward is None or cotangents is None or batched or has_torch_function(cotangents + inputs):
        return torch.autograd.grad(
            outputs, inputs, cotangents, retain_graph, create_graph, allow_unused=True, is_grads_batched=batched
        )
    return _run_backward(outputs, cotangents, retain_graph, create_graph, inputs, True, accumulate_grad=False)


@contextmanager
def hooks_suspended(tensors: Iterable[Tensor], retained: bool = True) -> Iterator[list[Tensor]]:
    """Gradient hooks of these tensors do not act meanwhile; gives the tensors that have one.

    torch.autograd.grad calls the hooks of its inputs too: at each of many products, and before the total is known. It
    also writes the .grad of tensors that retain it, which with `retained` is put back afterwards.
    """
    tensors = list(tensors)
    before = [(x, x.grad) for x in tensors if x.retains_grad] if retained else []
    # torch holds this very dictionary, so emptying it takes the hooks away.
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


def with_hooks(leaves: Sequence[Tensor], grads: Sequence[Tensor], hooked: Sequence[Tensor]) -> list[Tensor]:
    """The gradients after the hooks of their leaves, each called once, as torch.autograd.grad calls them."""
    places, grads = {id(x) for x in hooked}, list(grads)
    for i, x in enumerate(leaves):
        if id(x) in places:
            retained = x.grad if x.retains_grad else None
            (grads[i],) = torch.autograd.grad(x, x, grads[i])
            if x.retains_grad:
                x.grad = retained
    return grads


def is_python_function(node: Any) -> bool:
    """Whether a node of the graph belongs to a torch.autograd.Function, which only its result keeps alive."""
    return isinstance(node, BackwardCFunction)


def version_of(x: Tensor) -> int:
    """torch's counter of in-place changes; 0 where there is none."""
    return 0 if x.is_inference() else getattr(x, "_version", 0)


def saved_values(node: Any) -> list[Any]:
    """What a node of the graph keeps for its derivative; nothing where torch does not tell."""
    values = [getattr(node, name) for name in _saved_names(type(node))]
    return [*values, *getattr(node, "saved_tensors", ())]


@lru_cache(maxsize=1024)
def _saved_names(kind: type) -> list[str]:
    return [name for name in dir(kind) if name.startswith("_saved_")]


class _Watch(TorchDispatchMode):  # pyright: ignore[reportGeneralTypeIssues]
    """A mode in which every operation is done by a function."""

    def __init__(self, operation: Callable[[Any, Any, dict[str, Any]], Any]):
        super().__init__()
        self.operation = operation

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would wrap the next method, which takes as long as what it does

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.operation(func, args, kwargs or {})


@contextmanager
def watched(operation: Callable[[Any, Any, dict[str, Any]], Any]) -> Iterator[None]:
    """Every operation of the block is done by `operation(func, args, kwargs)`; none where torch cannot."""
    # A mode is of one thread.
    with (
        _Watch(operation) if TorchDispatchMode is not object else nullcontext(),
        torch.autograd.set_multithreading_enabled(False),
    ):
        yield


@lru_cache(maxsize=4096)
def operation_traits(func: Any) -> tuple[bool, bool, Any] | None:
    """Whether it writes, whether it gives a view, and the same without writing; None where it is random or unknown."""
    schema, functional = getattr(func, "_schema", None), None
    if schema is None or torch.Tag.nondeterministic_seeded in func.tags:
        return None
    name = schema.name.removeprefix("aten::")
    if schema.is_mutable and name.endswith("_") and not name.endswith("__") and hasattr(torch.ops.aten, name[:-1]):
        functional = getattr(getattr(torch.ops.aten, name[:-1]), func._overloadname, None)
    view = name == "_unsafe_view" or (not schema.is_mutable and any(r.alias_info is not None for r in schema.returns))
    return schema.is_mutable, view, functional
