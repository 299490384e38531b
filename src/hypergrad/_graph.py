"""Walks through autograd's graph: dependence, undeclared leaves, bytes kept, and hooks that change gradients."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from . import _torch
from ._tree import local

Edge = tuple[Any, int]  # a node of the graph, and the index of one of its outputs
LEAF: Any = type(get_gradient_edge(torch.zeros((), requires_grad=True)).node)  # the type of the nodes of leaves


def _edge(x: Tensor | GradientEdge) -> Edge:
    edge = get_gradient_edge(x) if isinstance(x, Tensor) else x
    return edge.node, edge.output_nr


def _edges(outputs: Iterable[Tensor | GradientEdge]) -> list[Edge]:
    """The edges of those outputs that have a graph."""
    return [_edge(y) for y in outputs if not isinstance(y, Tensor) or y.requires_grad]


def _ancestors(edges: Iterable[Edge], seen: set[Any]) -> Iterator[Edge]:
    """These edges and their ancestors, some more than once. The walk stops at nodes in `seen`, and adds new ones."""
    stack = list(edges)
    while stack:
        node, output = stack.pop()
        yield node, output
        if node not in seen:
            seen.add(node)
            stack.extend(parent for parent in node.next_functions if parent[0] is not None)


def depends(outputs: Sequence[Tensor | GradientEdge], inputs: Sequence[Tensor]) -> bool:
    """Whether any output depends on any input."""
    sought = {_edge(x) for x in inputs if x.requires_grad}
    return any(edge in sought for edge in _ancestors(_edges(outputs), set()))


def refuse_weight_norm(outputs: Sequence[Tensor], inputs: Sequence[Tensor], name: str) -> None:
    """Raise ValueError if outputs depend on inputs through torch's weight_norm, whose second derivative is wrong."""
    reached = {node for node, _ in _ancestors(_edges(outputs), set())}
    nodes = [node for node in reached if type(node).__name__.startswith("WeightNormInterface")]
    if nodes and depends([GradientEdge(node, 0) for node in nodes], inputs):
        raise ValueError(
            f"{name} was computed through torch's weight_norm, whose second derivative is wrong: pass it as a function "
            f"or a closure, in which weight_norm is replaced by g * v / v.norm(), or write that in the layer"
        )


def unreached(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[int]:
    """The indices of inputs that require grad and that no output depends on."""
    places = {_edge(x): i for i, x in enumerate(inputs) if x.requires_grad}
    for edge in _ancestors(_edges(outputs), {node for node, _ in places}):
        places.pop(edge, None)
        if not places:
            break
    return list(places.values())


def check_independent(leaves: Sequence[Tensor], names: Sequence[str]) -> None:
    """Raise ValueError if one leaf was computed from another."""
    places = {_edge(x): i for i, x in enumerate(leaves) if x.requires_grad}
    seen: set[Any] = set()
    for i, x in enumerate(leaves):
        parents = () if x.grad_fn is None else x.grad_fn.next_functions
        for edge in _ancestors([parent for parent in parents if parent[0] is not None], seen):
            if (j := places.get(edge, i)) != i:
                raise ValueError(
                    f"{names[i]} was computed from {names[j]}, so the gradient of {names[j]} through it would be "
                    f"counted twice: detach {names[i]} (before evaluating the losses), or leave {names[j]} out"
                )


def undeclared_leaves(outputs: Sequence[Tensor | GradientEdge], declared: Sequence[Tensor]) -> list[Tensor]:
    """The leaves in the graph of outputs that require grad and are not declared. Empty tensors are left out."""
    known = {id(x) for x in declared}
    seen: set[Any] = {None, *(x.grad_fn for x in declared)}  # the walk stops at declared tensors
    found: dict[int, Tensor] = {}
    ends = [getattr(y, "grad_fn", None) or _edge(y)[0] for y in outputs if getattr(y, "requires_grad", True)]
    stack = [node for node in dict.fromkeys(ends) if node not in seen]
    seen.update(stack)
    while stack:  # `_ancestors` would take twice as long, and this walk is done at every evaluation of a map
        node = stack.pop()
        for parent, _ in node.next_functions:
            if parent not in seen:
                seen.add(parent)
                stack.append(parent)
        if type(node) is LEAF and id(x := node.variable) not in known and x.numel():
            found[id(x)] = x
    return list(found.values())


def saved_bytes(outputs: Sequence[Tensor], seen: set[Any]) -> dict[int, int]:
    """The bytes of each storage that the graph of outputs keeps, by address.

    Nodes in `seen` are not counted again, and new ones are added to it. (Saved-tensor hooks would forbid torch.func.)
    """
    before, sizes = set(seen), {}
    for node, _ in _ancestors(_edges(outputs), seen):
        if node in before or type(node) is LEAF:
            continue
        for value in _torch.saved_values(node):
            for x in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(x, Tensor) and x.layout is torch.strided:
                    x = local(x)
                    sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return sizes


def ranks() -> int:
    """The number of ranks of torch.distributed; 1 if it is not initialised."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


COLLECTIVES = ("CopyToRanks", "MeanOverRanks", "GatherShards", "MeanToShards")
COLLECTIVES += ("_ToTorchTensor", "_FromTorchTensor", "Redistribute")


def crosses_ranks(outputs: Iterable[Tensor | GradientEdge]) -> bool:
    """Whether a derivative of outputs communicates between ranks, through functions of `distributed` or DTensors."""
    nodes = (node for node, _ in _ancestors(_edges(outputs), set()))
    return any(type(node).__name__.startswith(COLLECTIVES) for node in nodes)


def refuse_freed(leaves: Sequence[Tensor]) -> None:
    """Raise ValueError for leaves without memory: FSDP2 frees the parameters that it gathered after a reverse pass."""
    own = [x for x in leaves if x.is_leaf and not hasattr(x, "placements")]
    if any(x.numel() and not x.untyped_storage().nbytes() for x in own):
        raise ValueError(
            "FSDP2 gathered these params for an evaluation and has freed them: its hooks give no graph for second "
            "derivatives. Copy the model before fully_shard and evaluate the copy by torch.func.functional_call at "
            "hg.distributed.gathered(its parameters), or use bilevel.F2SA, BOME or SAMA, which take the model as it is"
        )


LIBRARY_FOLDERS = tuple(f"{Path(file).parent}{os.sep}" for file in (__file__, torch.__file__))  # not the user's code


def noticing_hooks(found: list[str], inputs: Sequence[Tensor], reverse_pass: Callable[[], Any]) -> Any:
    """The result of a reverse pass; names and places of hooks that change a gradient in it are appended to `found`.

    A graph does not list its hooks, but Python's profiler sees the engine's calls of them, and calls of module hooks.
    """
    if sys.getprofile() is not None:
        return reverse_pass()
    # The reverse pass must run on this thread, which is the profiled one, for a GPU too.
    with nullcontext() if inputs[0].is_cpu else torch.autograd.set_multithreading_enabled(False):
        sys.setprofile(partial(_watch, found, {}))
        try:
            return reverse_pass()
        finally:
            sys.setprofile(None)


def _watch(found: list[str], given: dict[Any, list[tuple[Tensor, int]]], frame: Any, event: str, result: Any) -> None:
    caller = frame.f_back
    if caller is None or (
        caller.f_code not in _torch.ENGINE_CALLERS and caller.f_code.co_filename != torch.utils.hooks.__file__
    ):
        return
    code = frame.f_code
    internal = code.co_filename.startswith(LIBRARY_FOLDERS) or code.co_name.startswith("__torch_")
    if event not in ("call", "return") or internal:
        return
    if event == "call":
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARARGS)]
        tensors = _tensors([frame.f_locals[name] for name in names if name in frame.f_locals])
        given[frame] = [(x, _torch.version_of(x)) for x in tensors]
        return
    before = given.pop(frame, [])
    forms = [(x.shape, x.dtype, x.device) for x, _ in before]
    new = [y for y in _tensors([result]) if (y.shape, y.dtype, y.device) in forms]
    new = [y for y in new if not any(y is x for x, _ in before)]
    if new or any(_torch.version_of(x) != version for x, version in before):
        found.append(f"{code.co_name} ({Path(code.co_filename).name}, line {code.co_firstlineno})")


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among values, and in tuples of tensors and None, which is how gradients are passed."""
    flat = []
    for x in values:
        gradients = isinstance(x, tuple) and all(y is None or isinstance(y, Tensor) for y in x)
        flat += x if gradients else (x,)
    return [x for x in flat if isinstance(x, Tensor)]
