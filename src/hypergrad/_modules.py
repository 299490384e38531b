"""The nn.Modules that a callable can be seen to use, names of their tensors, and what normalisation does."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
DEPTH = 4  # of containers, partials and closures inside each other
LONG = 1000  # a container of more than so many is data
PLAIN = (int, float, complex, str, bytes, type(None), Tensor)  # no module is in these


def modules_of(*functions: Any) -> list[nn.Module]:
    """Modules in closures, defaults, partials, bound methods, callable objects' attributes and globals used by name."""
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()
    stack = [(each, 0) for each in functions]
    while stack:
        each, depth = stack.pop()
        if id(each) in seen or depth > DEPTH:
            continue
        seen.add(id(each))
        if isinstance(each, nn.Module):
            found[id(each)] = each
        else:
            stack.extend((part, depth + 1) for part in _parts(each, depth) if not isinstance(part, PLAIN))
    return list(found.values())


def _parts(each: Any, depth: int) -> Iterable[Any]:
    if isinstance(each, functools.partial):
        return [each.func, *each.args, *each.keywords.values()]
    if isinstance(each, types.MethodType):
        return [each.__self__, each.__func__]
    if isinstance(each, types.FunctionType):
        return _of_function(each)
    if isinstance(each, (dict, list, tuple)):
        return list(each.values() if isinstance(each, dict) else each) if len(each) <= LONG else []
    if isinstance(each, (torch.Tensor, type)) or not (callable(each) or depth) or _known(type(each).__module__):
        return []
    attributes = getattr(each, "__dict__", None)
    return list(attributes.values()) if isinstance(attributes, dict) else []


def _of_function(function: types.FunctionType) -> list[Any]:
    cells = []
    for cell in function.__closure__ or ():
        try:
            cells.append(cell.cell_contents)
        except ValueError:  # not filled yet
            continue
    names = () if _known(function.__globals__.get("__name__", "")) else _names(function.__code__)
    used = [function.__globals__[name] for name in names if name in function.__globals__]
    used = [each for each in used if not isinstance(each, types.ModuleType)]
    return [*cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *used]


def _known(module: str) -> bool:
    """Whether a module is torch's, or one of trackers: what it defines names no module of the user's."""
    return module == "torch" or module.startswith(("torch.", "hypergrad.bilevel."))


@functools.lru_cache(1024)
def _names(code: types.CodeType) -> set[str]:
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def name_of(leaf: Tensor, user: Any) -> str:
    """How to speak of a tensor: its shape, and its name if a module that the user's callable reaches holds it."""
    for module in modules_of(user):
        for name, parameter in module.named_parameters():
            if parameter is leaf:
                return f"{name} of a {type(module).__name__}, of shape {tuple(leaf.shape)}"
    return f"of shape {tuple(leaf.shape)}"


def records_statistics(module: nn.Module) -> bool:
    """Whether an evaluation writes running statistics: BatchNorm or InstanceNorm in training mode."""
    return module.training and bool(getattr(module, "track_running_stats", False))


def couples_samples(module: nn.Module) -> bool:
    """Whether a normalisation uses the statistics of its batch: a BatchNorm in training mode, or one without others."""
    if not hasattr(module, "running_mean") or isinstance(module, INSTANCE_NORMS):
        return False
    return module.training or not getattr(module, "track_running_stats", True)
