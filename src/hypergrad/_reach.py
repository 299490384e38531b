"""What a callable can be seen to use, and whether it takes values out of autograd's graph when it is called."""

from __future__ import annotations

import dis
import functools
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ._graph import LIBRARY_FOLDERS

DEPTH = 4  # how deeply nested containers, partials and closures are searched
LONG = 1000  # longer containers are data, and are not searched
PLAIN = (int, float, complex, str, bytes, type(None), Tensor, types.ModuleType)  # not searched
LIBRARIES = ("torch", "hypergrad", "numpy", "math")
_SWITCHES = ("no_grad", "inference_mode", "set_grad_enabled")  # without a graph
_TAKEN = ("detach", "detach_", "data", "item", "tolist", "numpy", *_SWITCHES)  # attributes
# Special methods that are not called by the evaluation of a function.
_UNCALLED = {f"__{name}__" for name in ["init", "post_init", "repr", "eq", "hash", "setattr", "getstate", "setstate"]}
LEAVE: dict[str, Any] = {  # names by which values leave autograd's graph, for each instruction that loads them
    **dict.fromkeys(("LOAD_ATTR", "LOAD_METHOD"), _TAKEN),
    **dict.fromkeys(
        ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF"), ("float", "complex", "math", "numpy", "np", *_SWITCHES)
    ),
}

DETACH = {Tensor.detach, torch.detach, Tensor.data.__get__}  # pyright: ignore[reportAttributeAccessIssue]
READ = {Tensor.item, Tensor.__float__}
_PASSED = {__file__, torch.overrides.__file__}  # files whose frames `place_of` skips
UNWATCHED = nullcontext(SimpleNamespace(found=False))


# What was found out about a function while it lives. The key is its id, or the id of its object and its method.
_FOUND: dict[tuple[int, Any], tuple[weakref.ref[Any], dict[Any, Any]]] = {}


def found_of(function: Callable[..., Any]) -> dict[Any, Any]:
    """A dict in which calls keep what they found out about this function (sizes, compiled functions) for later ones."""
    owner, name = getattr(function, "__self__", function), getattr(function, "__func__", None)
    place = id(owner), name
    if place not in _FOUND or _FOUND[place][0]() is not owner:
        try:
            _FOUND[place] = weakref.ref(owner, lambda _: _FOUND.pop(place, None)), {}
        except TypeError:  # the object takes no weak references
            return {}
    return _FOUND[place][1]


def reached(functions: Iterable[Any], depth: int = 0) -> Iterator[Any]:
    """These functions and what they can be seen to use, each object once; modules are not searched."""
    seen: set[int] = set()
    stack = [(each, depth) for each in functions]
    while stack:
        each, level = stack.pop()
        if id(each) in seen or level > DEPTH:
            continue
        seen.add(id(each))
        yield each
        if not isinstance(each, nn.Module):
            stack.extend((part, level + 1) for part in _parts(each, level > depth) if not issubclass(type(part), PLAIN))


def may_detach(*functions: Any) -> bool:
    """Whether code that a callable can be seen to use names something by which values leave autograd's graph."""
    names, kinds = set(), {}  # kinds: an ordered set
    for each in reached(functions, -2):
        if isinstance(each, types.FunctionType):
            if _code_detaches(each.__code__):
                return True
            names |= _names(each.__code__)
        elif isinstance(each, (types.BuiltinFunctionType, types.MethodDescriptorType)):  # such as torch.detach
            if each.__name__ in _TAKEN:
                return True
        else:
            kinds.update((type(part), None) for part in (each.modules() if isinstance(each, nn.Module) else (each,)))
    return _methods_detach(tuple(kinds), frozenset(names))


@functools.lru_cache(4096)
def _methods_detach(kinds: tuple[type, ...], names: frozenset[str]) -> bool:
    """Whether a method detaches that is called by one of these names, by Python or torch, or by such a method."""
    own = [each for kind in kinds for each in kind.__mro__]
    own = [each for each in dict.fromkeys(own) if not each.__module__.startswith(("torch.", "hypergrad.", "builtins"))]
    parts = [(name, getattr(part, "__func__", part)) for each in own for name, part in vars(each).items()]
    left = [(name, part.__code__) for name, part in parts if isinstance(part, types.FunctionType)]
    called = {*names, "forward", *(name for name, _ in left if name.startswith("__") and name not in _UNCALLED)}
    while found := [code for name, code in left if name in called]:
        if any(map(_code_detaches, found)):
            return True
        left = [(name, code) for name, code in left if name not in called]
        called.update(*map(_names, found))
    return False


@functools.lru_cache(4096)
def _code_detaches(code: types.CodeType) -> bool:
    if code.co_filename.startswith(LIBRARY_FOLDERS):  # where a function decorated by torch.no_grad() comes from
        return code.co_name == "decorate_context"
    inner, before = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)], None
    for step in dis.get_instructions(code):  # self.data is an attribute of the user's object, not a tensor's
        if step.argval in LEAVE.get(step.opname, ()) and (before, step.argval) != ("self", "data"):
            return True
        before = step.argval
    return any(map(_code_detaches, inner))


class Noticing(TorchFunctionMode):
    """Evaluates as torch does. found: whether the user's code took something out of the graph."""

    found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.found and any(isinstance(x, Tensor) and x.requires_grad for x in args):
            inside = not torch.is_grad_enabled()
            self.found = (func in DETACH or func in READ or inside) and bool(place_of(func in READ or inside))
        return func(*args, **(kwargs or {}))


def noticing(user: Any) -> Any:
    """A context in which to evaluate the user's function, if any; `found` of what it gives says whether it detaches.

    What the function uses is searched at its 1st, 2nd, 3rd, 5th, 9th, … call: it may change between two calls.
    """
    if user is None:
        return UNWATCHED
    known = found_of(user)
    calls, detaches = known.get("detaches", (0, False))
    if not calls & (calls - 1):
        detaches = may_detach(user)
    known["detaches"] = calls + 1, detaches
    return Noticing() if detaches else UNWATCHED


def place_of(through: bool) -> str:
    """The line of the user's code that is running, or "" if it is a library's. through: skip frames of torch."""
    frame: Any = sys._getframe(2)
    while frame is not None and (frame.f_code.co_filename in _PASSED or (through and _is_torchs(frame))):
        frame = frame.f_back
    if frame is None or frame.f_code.co_filename.startswith(LIBRARY_FOLDERS):
        return ""
    code = frame.f_code
    return f"{code.co_name} ({Path(code.co_filename).name}, line {frame.f_lineno})"


def _is_torchs(frame: Any) -> bool:
    return frame.f_code.co_filename.startswith(LIBRARY_FOLDERS[1])


def _parts(each: Any, inside: bool) -> Iterable[Any]:
    if isinstance(each, functools.partial):
        return [each.func, *each.args, *each.keywords.values()]
    if isinstance(each, types.MethodType):
        return [each.__self__, each.__func__]
    if isinstance(each, types.FunctionType):
        return _of_function(each)
    if isinstance(each, (dict, list, tuple)):
        return list(each.values() if isinstance(each, dict) else each) if len(each) <= LONG else []
    if isinstance(each, (torch.Tensor, type)) or not (callable(each) or inside) or _known(type(each).__module__):
        return []
    attributes = getattr(each, "__dict__", None)
    return list(attributes.values()) if isinstance(attributes, dict) else []


def _of_function(function: types.FunctionType) -> list[Any]:
    cells = []
    for cell in function.__closure__ or ():
        try:
            cells.append(cell.cell_contents)
        except ValueError:  # the cell is still empty
            continue
    own = function.__globals__.get("__name__", "").startswith(("torch.", "hypergrad."))  # no objects of the user
    names = () if own else _names(function.__code__)
    used = [function.__globals__[name] for name in names if name in function.__globals__]
    files = [each for each in used if isinstance(each, types.ModuleType) and not each.__name__.startswith(LIBRARIES)]
    used += [vars(file)[name] for file in files for name in names if name in vars(file)]
    used = [each for each in used if not isinstance(each, types.ModuleType)]
    return [*cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *used]


def _known(module: str) -> bool:
    """Whether a module is torch's or of `bilevel`, whose objects are not searched for the user's modules."""
    return module == "torch" or module.startswith(("torch.", "hypergrad.bilevel."))


@functools.lru_cache(1024)
def _names(code: types.CodeType) -> set[str]:
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*map(_names, inner))
