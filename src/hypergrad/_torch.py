"""Every use of torch's private or unstable interfaces, each with the plain fallback where it is missing.

A new version of torch is looked at here, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function

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
def hooks_suspended(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Gradient hooks of these tensors do not act meanwhile; gives the tensors that have one.

    torch.autograd.grad calls the hooks of its inputs too: at each of many products, and before the total is known.
    """
    found = [(x, hooks, dict(hooks)) for x in tensors if (hooks := getattr(x, "_backward_hooks", None))]
    for _, hooks, _ in found:
        hooks.clear()
    try:
        yield [x for x, _, _ in found]
    finally:
        for _, hooks, kept in found:
            hooks.update(kept)


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
