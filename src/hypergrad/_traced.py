"""A function of tensors, traced to a list of operations without an autograd graph, for a compiler.

Tensors that it uses besides its arguments (data, buffers, live parameters) become arguments that are read anew at each
call. So do its random numbers, which are drawn before each call in the order in which the function draws them.
"""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from . import _torch
from ._autodiff import without_autocast
from ._recorded import NotCompiled

KEPT = 64  # the most compiled functions that are kept
ROUNDING = 30  # a compiled function may be off by this multiple of the change that rounding params causes
aten = torch.ops.aten
# Methods that read a tensor without an operation that a trace would record.
READS = {Tensor.tolist, Tensor.numpy, Tensor.__array__}
READ = "gets a value out of a tensor"
MADE = {torch.tensor, torch.as_tensor}  # which turn a number into a tensor
SUBSCRIPTS = (int, slice, type(Ellipsis))
NUMBER = "is_number"  # an attribute of tensors
CONVERSIONS = {Tensor.to, Tensor.type, Tensor.type_as, Tensor.float, Tensor.half, Tensor.bfloat16}
# Random operations that use only the shape, dtype and device of a tensor argument.
DRAWS = ("rand", "randn", "rand_like", "randn_like", "randint", "randint_like", "randperm")
FILLS = ("bernoulli_", "uniform_", "normal_", "exponential_", "random_", "log_normal_", "cauchy_", "geometric_")


class Draw(NamedTuple):
    """An operation that draws random numbers: func(*args, **kwargs), after an empty tensor of this form if not None."""

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
    """Indexing by a 0-d integer tensor reads no number, and tensors that `as_number` marked act like Python's numbers.

    The quotient t / 3 of a marked t has double precision, and does not give its dtype to other tensors.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in READS:
            raise RuntimeError(f"Tensor.{func.__name__} {READ}")
        if func is Tensor.__getitem__:
            x, index = args
            parts = list(index) if isinstance(index, tuple) else [index]
            if any(map(_is_place, parts)) and all(_is_place(p) or isinstance(p, SUBSCRIPTS) for p in parts):
                for i, part in enumerate(parts):
                    if _is_place(part):
                        dim = i - len(parts) if any(p is Ellipsis for p in parts[:i]) else i
                        x, parts[i] = x.index_select(dim, part.reshape(1).to(x.device)), 0
                return x[tuple(parts)]
        tensors = [x for x in args if isinstance(x, Tensor)]
        others = [x for x in tensors if not hasattr(x, NUMBER)]
        if not tensors or len(others) == len(tensors) or func in CONVERSIONS:
            return func(*args, **kwargs)
        if func in MADE:
            usual = torch.get_default_dtype() if args[0].is_floating_point() else args[0].dtype
            return args[0].clone().to(kwargs.get("device"), kwargs.get("dtype", usual))
        if others:  # these have the dtype, as beside a Python number
            kinds = [torch.result_type(x, 1.0) for x in others if x.dtype is not torch.bool]
            dtype = reduce(torch.promote_types, kinds, kinds[0] if kinds else torch.get_default_dtype())
            real = [isinstance(x, Tensor) and hasattr(x, NUMBER) and x.is_floating_point() for x in args]
            return func(*[x.to(dtype) if each else x for x, each in zip(args, real, strict=True)], **kwargs)
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.is_floating_point():
            result = func(*[x.double() if isinstance(x, Tensor) else x for x in args], **kwargs)
        return as_number(result) if isinstance(result, Tensor) and not result.ndim else result


def _is_place(x: Any) -> bool:
    return isinstance(x, Tensor) and not x.ndim and x.dtype in (torch.int64, torch.int32)


def as_number(x: Tensor) -> Tensor:
    """x, which acts as a Python number while a function is traced; and so does what is computed from it alone."""
    setattr(x, NUMBER, True)
    return x


# The keys hold the backend, the text of the graph and the forms of its inputs. The last used function comes last.
_COMPILED: OrderedDict[Any, Callable[..., Sequence[Tensor]]] = OrderedDict()


class Traced:
    """function(*inputs) ↦ tensors, traced at these inputs and compiled; later inputs must have the same forms.

    Args:
        function: takes contiguous tensors and returns a list of tensors. It is called once; its Python code does not
            run again, so everything that it reads except tensors stays as it was.
        inputs: the point at which it is traced; it is called with copies.
        backend: "inductor", or another backend of torch.compile.

    Attributes:
        operations: the number of operations.
        draws: the operations that draw random numbers.

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
                    warnings.simplefilter("ignore")  # warnings of the compiler
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
        """The results for contiguous inputs. Raises NotCompiled if a tensor has another form than when traced."""
        try:
            with torch.no_grad(), without_autocast(self.held[0].device if self.held else inputs[0].device):
                return self._compiled(*inputs, *[draw() for draw in self.draws], *self.held)
        except Exception as error:  # whatever compiled code may raise at another form
            raise NotCompiled(_reason(error)) from error


def autocast_state() -> tuple[Any, ...]:
    """The state of torch.autocast on which a trace depends."""
    kinds = (kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind))
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds)


def gap(x: Tensor, y: Tensor) -> float:
    """‖x − y‖, where two entries that are both NaN or the same infinity differ by 0, and a NaN from a number by ∞."""
    found = float(torch.linalg.vector_norm(x - y))
    if not math.isfinite(found):
        same = (x == y) | (x.isnan() & y.isnan())
        found = float(torch.linalg.vector_norm((x - y).masked_fill(same, 0)))
    return math.inf if math.isnan(found) else found


def size(x: Tensor) -> float:
    """‖x‖ over the finite entries."""
    found = float(torch.linalg.vector_norm(x))
    return found if math.isfinite(found) else float(torch.linalg.vector_norm(x.masked_fill(~x.isfinite(), 0)))


def _trace(function: Callable[..., Any], inputs: Sequence[Tensor]) -> torch.fx.GraphModule:
    """The operations of function(*inputs) below autograd, including those of its reverse passes."""
    from torch.fx.experimental.proxy_tensor import make_fx

    with torch.autograd.set_multithreading_enabled(False):
        return make_fx(function)(*inputs)


def _contiguous(x: Tensor) -> Tensor:
    return x.detach().contiguous()


def _lifted(graph_module: torch.fx.GraphModule) -> tuple[list[Draw], list[Tensor]]:
    """Turn the draws and the constants of the graph into inputs that follow its own, in this order; return both."""
    graph, draws, constants = graph_module.graph, [], {}
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]

    def replace_by_input(node: Any, name: str) -> None:
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
            replace_by_input(node, f"draw{len(draws)}")
    for node in nodes:
        if node.op == "get_attr":
            value = getattr(graph_module, node.target)
            if id(value) not in constants:
                constants[id(value)] = value, []
            constants[id(value)][1].append(node)
    for n, (_, places) in enumerate(constants.values()):
        replace_by_input(places[0], f"constant{n}")
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
            "number t of the step is a tensor too. Use torch.where(torch.as_tensor(t) < 10, a, b) in place of if, and "
            "pass batches= in place of indexing a list by t"
        )
    return f"{type(error).__name__}: {text}"
