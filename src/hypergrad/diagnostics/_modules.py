"""The nn.Modules that a callable can be seen to use, and what of them an evaluation would change."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

DEPTH = 4  # of containers, partials and closures inside each other
LONG = 1000  # a container of more than so many is data


def visible_modules(*callables: Any) -> list[nn.Module]:
    """Modules in closures, defaults, partials, bound methods, callable objects' attributes and globals used by name."""
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()
    stack = [(each, 0) for each in callables]
    while stack:
        each, depth = stack.pop()
        if id(each) in seen or depth > DEPTH:
            continue
        seen.add(id(each))
        if isinstance(each, nn.Module):
            found[id(each)] = each
        else:
            stack.extend((part, depth + 1) for part in _parts(each, depth))
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
    if isinstance(each, torch.Tensor):
        return []
    if callable(each) or depth:
        attributes = getattr(each, "__dict__", None)
        return list(attributes.values()) if isinstance(attributes, dict) and not isinstance(each, type) else []
    return []


def _of_function(function: types.FunctionType) -> list[Any]:
    cells = []
    for cell in function.__closure__ or ():
        try:
            cells.append(cell.cell_contents)
        except ValueError:  # not filled yet
            continue
    names = _names(function.__code__)
    used = [function.__globals__[name] for name in names if name in function.__globals__]
    used = [each for each in used if not isinstance(each, types.ModuleType)]
    return [*cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *used]


def _names(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names(constant)
    return names


def active_dropout(modules: Iterable[nn.Module]) -> list[str]:
    """Names of the submodules in training mode that drop something."""
    names = []
    for module in modules:
        for name, part in module.named_modules():
            rate = getattr(part, "p", 0.0) if "Dropout" in type(part).__name__ else getattr(part, "dropout", 0.0)
            if part.training and isinstance(rate, float) and rate > 0:
                names.append(f"{type(module).__name__}{'.' * bool(name)}{name} ({type(part).__name__})")
    return names


def random_state(devices: Iterable[torch.device]) -> list[bytes]:
    """torch's random state, on the CPU and these devices."""
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(index) for index in _cuda(devices))]
    return [bytes(state.tolist()) for state in states]


def _cuda(devices: Iterable[torch.device]) -> list[int]:
    return sorted({device.index or 0 for device in devices if device.type == "cuda"})


@contextmanager
def unchanged(modules: Iterable[nn.Module], devices: Iterable[torch.device]) -> Iterator[None]:
    """The modules' buffers and torch's random state, on the CPU and these devices, are put back afterwards."""
    buffers = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]
    try:
        with torch.random.fork_rng(_cuda(devices)):
            yield
    finally:
        with torch.no_grad():
            for buffer, kept in buffers:
                if not torch.equal(buffer, kept):
                    buffer.copy_(kept)
