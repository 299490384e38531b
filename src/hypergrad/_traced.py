"""A function of tensors traced to a list of operations without any autograd graph, for a compiler.

What it takes besides its arguments (data, buffers, live parameters) becomes an argument, read anew at each call, and so
do the random numbers that it draws: they are drawn before it, in its order, as it would draw them.
"""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from . import _torch
from ._autodiff import without_autocast
from ._recorded import NotCompiled

KEPT = 64  # compiled functions
ROUNDING = 30  # how many times what rounding of params changes a compiled function may be off
aten = torch.ops.aten
# What reads a tensor without an operation that a trace would see.
READS = {Tensor.tolist, Tensor.numpy, Tensor.__array__}
READ = "gets a value out of a tensor"
CONVERSIONS = {Tensor.to, Tensor.type, Tensor.type_as, Tensor.float, Tensor.half, Tensor.bfloat16}
# Whose tensor argument, where there is one, gives the form of the result alone.
DRAWS = ("rand", "randn", "rand_like", "randn_like", "randint", "randint_like", "randperm")
FILLS = ("bernoulli_", "uniform_", "normal_", "exponential_", "random_", "log_normal_", "cauchy_", "geometric_")


class Draw(NamedTuple):
    """One operation that draws random numbers: func(*args, **kwargs), with a tensor of this form before, if any."""

    func: Any
    form: tuple[torch.Size, torch.dtype, torch.device] | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self) -> Tensor:
        if self.form is None:
            return self.func(*self.args, **self.kwargs)
        shape, dtype, device = self.form
        return self.func(torch.empty(shape, dtype=dtype, device=device), *self.args, **self.kwargs)


class _TensorNumbers(TorchFunctionMode):
    """0-d tensors of whole numbers act as Python's numbers: x[t] does not read t, and t / 3 is in double precision."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            raise RuntimeError(f"Tensor.{func.__name__} {READ}")
        if func is Tensor.__getitem__:
            x, index = args
            each: tuple[Any, ...] = index if isinstance(index, tuple) and index else (index,)
            first, *rest = each
            if _is_number(first):
                row = x.index_select(0, first.reshape(1).to(x.device)).squeeze(0)
                return row[tuple(rest)] if rest else row
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not result.ndim and result.is_floating_point() and func not in CONVERSIONS:
            tensors = [x for x in args if isinstance(x, Tensor)]
            if tensors and all(map(_is_number, tensors)):
                return func(*[x.double() if isinstance(x, Tensor) else x for x in args], **(kwargs or {}))
        return result


def _is_number(x: Any) -> bool:
    return isinstance(x, Tensor) and not x.ndim and x.dtype in (torch.int64, torch.int32)


# By the text of the graph and the forms of its inputs, the newest last.
_COMPILED: OrderedDict[Any, Callable[..., Sequence[Tensor]]] = OrderedDict()


class Traced:
    """function(*inputs) ↦ tensors, traced at these inputs and compiled; later inputs must have their forms.

    Args:
        function: of contiguous tensors, giving a list of tensors. It is called once. Its Python code is not run again,
            so what it reads but tensors is as it was.
        inputs: where to trace it; copies are given to it.
        backend: "inductor", or another of torch.compile.

    Attributes:
        operations: how many there are.
        draws: those that draw random numbers.

    Raises: NotCompiled, with the reason.
    """

    def __init__(self, function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], backend: str):
        try:
            with _TensorNumbers():
                graph_module = _trace(function, [_contiguous(x).clone() for x in inputs])
            self.draws, self.held = _lifted(graph_module)
            self.operations = sum(node.op == "call_function" for node in graph_module.graph.nodes)
            examples = [*map(_contiguous, inputs), *(draw() for draw in self.draws), *self.held]
            forms = [(x.shape, x.stride(), x.dtype, x.device) for x in examples]
            key = backend, str(graph_module.graph), str(forms), torch.get_num_threads()
            if key not in _COMPILED:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # a compiler's own
                    _COMPILED[key] = _torch.compiled(graph_module, examples, backend)
            _COMPILED.move_to_end(key)
            while len(_COMPILED) > KEPT:
                _COMPILED.popitem(last=False)
        except NotCompiled:
            raise
        except Exception as error:  # whatever tracing or a compiler may raise
            raise NotCompiled(_reason(error)) from error
        self._compiled = _COMPILED[key]

    def __call__(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """The results; inputs are contiguous. Raises NotCompiled where a tensor has another form than when traced."""
        try:
            with torch.no_grad(), without_autocast(self.held[0].device if self.held else inputs[0].device):
                return self._compiled(*inputs, *[draw() for draw in self.draws], *self.held)
        except Exception as error:  # whatever compiled code may raise at another form
            raise NotCompiled(_reason(error)) from error


def autocast_state() -> tuple[Any, ...]:
    """What of torch.autocast a trace depends on."""
    kinds = (kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind))
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds)


def gap(x: Tensor, y: Tensor) -> float:
    """‖x − y‖: 0 for entries that are both NaN or the same infinity, and ∞ where only one of two is finite."""
    found = float(torch.linalg.vector_norm(x - y))
    if not math.isfinite(found):
        same = (x == y) | (x.isnan() & y.isnan())
        found = float(torch.linalg.vector_norm((x - y).masked_fill(same, 0)))
    return math.inf if math.isnan(found) else found


def size(x: Tensor) -> float:
    """‖x‖ over the entries that are finite."""
    found = float(torch.linalg.vector_norm(x))
    return found if math.isfinite(found) else float(torch.linalg.vector_norm(x.masked_fill(~x.isfinite(), 0)))


def _trace(function: Callable[..., Any], inputs: Sequence[Tensor]) -> torch.fx.GraphModule:
    """The operations of function(*inputs) below autograd, those of reverse passes in it included."""
    from torch.fx.experimental.proxy_tensor import make_fx

    with torch.autograd.set_multithreading_enabled(False):
        return make_fx(function)(*inputs)


def _contiguous(x: Tensor) -> Tensor:
    return x.detach().contiguous()


def _lifted(graph_module: torch.fx.GraphModule) -> tuple[list[Draw], list[Tensor]]:
    """Turn draws and constants of the graph into inputs, in this order after its own; gives both."""
    graph, draws, constants = graph_module.graph, [], {}
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]

    def given(node: Any, name: str) -> None:
        nonlocal last
        with graph.inserting_after(last):
            last = graph.placeholder(name)
        node.replace_all_uses_with(last)
        graph.erase_node(node)

    nodes = list(graph.nodes)
    for node in nodes:
        tags = getattr(node.target, "tags", ())
        if node.op == "call_function" and torch.Tag.nondeterministic_seeded in tags:
            draws.append(_draw(node))
            given(node, f"draw{len(draws)}")
    for node in nodes:
        if node.op == "get_attr":
            value = getattr(graph_module, node.target)
            if id(value) not in constants:
                constants[id(value)] = value, []
            constants[id(value)][1].append(node)
    for n, (_, places) in enumerate(constants.values()):
        given(places[0], f"constant{n}")
        for node in places[1:]:
            node.replace_all_uses_with(last)
            graph.erase_node(node)
    graph.eliminate_dead_code()
    graph_module.recompile()
    return draws, [value for value, _ in constants.values()]


def _draw(node: Any) -> Draw:
    name, (first, *rest) = node.target._schema.name.removeprefix("aten::"), node.args or (None,)
    filled = isinstance(first, torch.fx.Node)
    others = [*rest, *node.kwargs.values()]
    if any(isinstance(x, (torch.fx.Node, torch.Generator)) for x in others) or not (
        name in FILLS or name in DRAWS or (name == "bernoulli" and node.target is aten.bernoulli.p)
    ):
        raise NotCompiled(f"{name} draws random numbers in a way that cannot be taken out of the step")
    value = node.meta["val"] if "val" in node.meta else node.meta["tensor_meta"]
    form = (torch.Size(value.shape), value.dtype, value.device) if filled else None
    return Draw(node.target, form, tuple(rest) if filled else node.args, dict(node.kwargs))


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    if READ in text or "value out of a tracing tensor" in text or "data-dependent" in text.lower():
        return (
            "a number is read from a tensor (.item(), float(), int(), bool(), an if or an index): with compile the "
            "number t of the step is a tensor too. Use torch.where in place of if, and pass batches= in place of "
            "indexing a list by t"
        )
    return f"{type(error).__name__}: {text}"
