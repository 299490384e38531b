"""The linear map of a reverse pass, recorded in one product: the operations whose results depend on v.

A product with a retained graph calls the same operations on the same saved tensors each time, and autograd takes longer
to find them than a small one takes to run. What does not depend on v is a constant here, computed while recording.

Nothing of the user's code is traced or run again: the graph is that of the usual products, with its random draws.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ._vector import is_plain

aten = torch.ops.aten

# Elementwise operations that are linear in the argument at any one of these places.
LINEAR: dict[Any, tuple[int, ...]] = {
    aten.mul.Tensor: (0, 1),
    aten.mul.Scalar: (0,),
    aten.div.Tensor: (0,),
    aten.div.Scalar: (0,),
    aten.neg.default: (0,),
    aten.clone.default: (0,),
    aten.threshold_backward.default: (0,),
    aten.sigmoid_backward.default: (0,),
    aten.tanh_backward.default: (0,),
    aten.gelu_backward.default: (0,),
    aten.silu_backward.default: (0,),
    aten.softplus_backward.default: (0,),
    # and in all of these together: what does not depend on v must be zero there
    aten.add.Tensor: (0, 1),
    aten.sub.Tensor: (0, 1),
    aten.where.self: (1, 2),
}
TOGETHER = (aten.add.Tensor, aten.sub.Tensor, aten.where.self)
# Operations whose other arguments only multiply what depends on v, or say where it goes.
FACTORS = {
    *(func for func in LINEAR if func not in TOGETHER),
    aten.mv.default,
    aten.mm.default,
    aten.bmm.default,
    aten._softmax_backward_data.default,
    aten._log_softmax_backward_data.default,
    aten.convolution.default,
    aten.convolution_backward.default,
    aten.max_pool2d_with_indices_backward.default,
    aten.native_layer_norm_backward.default,
    aten.native_batch_norm_backward.default,
    aten.elu_backward.default,
    aten.leaky_relu_backward.default,
    aten.hardtanh_backward.default,
    aten.embedding.default,
    aten.embedding_dense_backward.default,
    aten.gather.default,
    aten.index.Tensor,
    aten.index_select.default,
}
# In which of their arguments these are linear together; others are in all tensors that they take.
PLACES: dict[Any, tuple[int, ...]] = {
    **{func: LINEAR[func] for func in TOGETHER},
    aten.scatter_add.default: (0, 3),
    aten.index_add.default: (0, 3),
    aten.index_put.default: (0, 2),
}
ZEROS = (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
# Memory of the shape of v, which nothing of v is in until it is written.
EMPTY = (aten.empty_like.default, aten.new_empty.default, aten.new_empty_strided.default)
# Operations whose result may be an argument of theirs.
PLAIN = (aten.t.default, aten.detach.default, aten.add.Tensor, aten.sub.Tensor)

# An argument: ("v", i) for value i that depends on v, ("c", j) for constant j, ("0", j) for one that is known to be
# zero, ("s", j) for one that is sparse, ("n", j) for a number, ("[", ...) for a list of arguments, ("=", x) for x
# itself.
Ref = tuple


class Step(NamedTuple):
    """One operation whose result depends on v: the values `outs` (`many`: a list of them, −1 for None).

    alike: it is one value, and those that it is made from have its shape, dtype and device.
    """

    func: Any
    args: tuple[Ref, ...]
    kwargs: tuple[tuple[str, Ref], ...]
    outs: tuple[int, ...]
    many: bool
    alike: bool

    def chained(self) -> list[int]:
        """The values that this is elementwise and linear in, if it is so in all its values; else none."""
        found = [a[1] for a in self.args if a[0] == "v"]
        places = LINEAR.get(self.func, ())
        if not self.alike or not found or any(a[0] in ("v", "[") for _, a in self.kwargs):
            return []
        if any(a[0] == "[" or (a[0] == "v" and i not in places) for i, a in enumerate(self.args)):
            return []
        if self.func in TOGETHER:
            return found if all(self.args[i][0] in ("v", "0") for i in places) else []
        return found if len(found) == 1 else []

    @property
    def values(self) -> list[int]:
        return [r[1] for r in self._refs if r[0] == "v"]

    @property
    def constants(self) -> list[int]:
        return [r[1] for r in self._refs if r[0] in "c0sn"]

    @property
    def _refs(self) -> list[Ref]:
        return _flat([*self.args, *(ref for _, ref in self.kwargs)])

    @property
    def linear(self) -> bool:
        """Whether it is surely linear in the values that it takes: 0 for v = 0, whatever the constants."""
        if self.func in FACTORS:
            return True
        args = [self.args[i] for i in PLACES[self.func]] if self.func in PLACES else self._refs
        allowed = "v0" if self.func in PLACES else "v0n="
        return all(ref[0] in allowed for ref in _flat(args))


class Form(NamedTuple):
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @property
    def one(self) -> Tensor:
        return torch.ones((1,) * len(self.shape), dtype=self.dtype, device=self.device)


class _Traits(NamedTuple):
    random: bool
    writes: bool
    view: bool
    zero: bool
    unwritten: bool  # nothing of its arguments is in the result but their form
    functional: Any  # the same operation without writing


@cache
def _traits(func: Any) -> _Traits:
    schema = func._schema
    name, functional = schema.name.removeprefix("aten::"), None
    if schema.is_mutable and name.endswith("_") and not name.endswith("__") and hasattr(aten, name[:-1]):
        functional = getattr(getattr(aten, name[:-1]), func._overloadname, None)
    view = name == "_unsafe_view" or (not schema.is_mutable and any(r.alias_info is not None for r in schema.returns))
    random, zero = torch.Tag.nondeterministic_seeded in func.tags, func in ZEROS
    return _Traits(random, schema.is_mutable, view, zero, zero or func in EMPTY, functional)


class Recorder(TorchDispatchMode):
    """Runs what is done in its block as usual, and writes down what depends on v.

    Attributes:
        steps: the operations whose results depend on v, in order.
        constants: the tensors and numbers that they use, which do not.
        forms: shape, dtype and device of each value; the first ones are v.
        reason: why what was recorded is not the whole map, or None.
    """

    def __init__(self, v: Sequence[Tensor]):
        super().__init__()
        self.steps: list[Step] = []
        self.constants: list[Any] = []
        self.forms = [Form(x.shape, x.dtype, x.device) for x in v]
        self.reason = None if all(is_plain(x) for x in v) else "its tensors are not plain ones"
        self._refs = _Notes()
        self._new = _Notes()  # made here, in memory of their own; whether they are zero
        self._viewed: set[int] = set()  # storages of which there are views
        self._versions: list[tuple[Tensor, int]] = []
        self._turned: dict[Ref, Ref] = {}
        self._zeros: list[int] = []
        self._lone: Ref | None = None  # of the zeros that came last, where no step takes them
        for i, x in enumerate(v):
            self._refs.note(x, ("v", i))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Not where torch would wrap the next function for it, which costs more than the function."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.reason is not None:
            return func(*args, **kwargs)
        traits = _traits(func)
        if traits.random:
            self.reason = f"it draws random numbers ({func})"
        if traits.writes:
            return self._write(func, traits.functional, args, kwargs)
        out = func(*args, **kwargs)
        if traits.view:
            self._viewed.add(_storage(args[0]))
        elif isinstance(out, Tensor):
            self._new.note(out, traits.zero or (func is aten.scalar_tensor.default and args[0] == 0))
            if self._viewed:
                self._viewed.discard(_storage(out))  # of one before it in the same place
        if not traits.unwritten and self._depends(args, kwargs):
            self._value(func, self._refs_of(args), self._named(kwargs) if kwargs else (), out)
        return out

    def _write(self, func: Any, functional: Any, args: Any, kwargs: Any) -> Any:
        """An operation in place, on a tensor made here that has no views, is written down as one that is not.

        Not where that would give another dtype than the tensor has.
        """
        target: Any = args[0] if args else None
        own = functional is not None and self._new.get(target) is not None and _storage(target) not in self._viewed
        if not own or any(isinstance(x, Tensor) and torch.result_type(target, x) != target.dtype for x in args[1:]):
            self.reason = f"it changes a tensor in place ({func})"
            return func(*args, **kwargs)
        if not self._depends(args, kwargs):
            self._new.note(target, False)
            return func(*args, **kwargs)
        before = self._ref(target if self._depends((target,)) else target.clone())
        given = (before, *self._refs_of(args[1:])), self._named(kwargs)
        out = func(*args, **kwargs)
        self._value(functional, *given, target)
        return out

    def _depends(self, args: Any, kwargs: dict[str, Any] | None = None) -> bool:
        for a in args:
            if isinstance(a, Tensor):
                if self._refs.get(a, "c")[0] == "v":
                    return True
            elif isinstance(a, (list, tuple)) and self._depends(a):
                return True
        return bool(kwargs) and self._depends(kwargs.values())

    def _value(self, func: Any, args: tuple[Ref, ...], kwargs: tuple[tuple[str, Ref], ...], out: Any) -> None:
        many, forms = isinstance(out, (list, tuple)), self.forms
        places: list[int] = []
        for x in out if many else (out,):
            if isinstance(x, Tensor):
                places.append(len(forms))
                forms.append(Form(x.shape, x.dtype, x.device))
                self._refs.note(x, ("v", places[-1]))
            elif x is None:
                places.append(-1)
            else:
                self.reason = f"it reads numbers from a tensor ({func})"
                return
        alike = not many
        for a in args:
            alike = alike and (a[0] != "v" or forms[a[1]] == forms[-1])
        if func in PLAIN and not kwargs and (same := self._same(func, args, alike)) is not None:
            self._refs.note(out, same)
            if self._lone in args:
                self._forget_zeros()
            return
        self._lone = None
        self.steps.append(Step(func, args, kwargs, tuple(places), many, alike))
        if func is aten.t.default:
            self._turned["v", places[0]] = args[0]

    def _same(self, func: Any, args: tuple[Ref, ...], alike: bool) -> Ref | None:
        """The argument that a value is equal to: x + 0, x without its graph, the transpose of xᵀ."""
        if func is aten.t.default:
            return self._turned.get(args[0])
        if func is aten.add.Tensor and args[0][0] == "0" and alike:
            return args[1]
        return args[0] if alike and args[0][0] == "v" and (func is aten.detach.default or args[1][0] == "0") else None

    def _forget_zeros(self) -> None:
        """Let go of the constant that came last: what it was added to is the sum."""
        self._lone, x = None, self.constants.pop()
        self._zeros.pop()
        self._refs.forget(x)
        if self._versions and self._versions[-1][0] is x:
            self._versions.pop()
        self._check_zeros(x)

    def _check_zeros(self, x: Tensor) -> None:
        # any() makes a tensor of booleans first.
        if bool(torch.linalg.vector_norm(x, 1) if x.is_floating_point() else x.any()):
            self.reason = self.reason or "a part of it was done where torch does not see it"

    def _refs_of(self, given: Any) -> tuple[Ref, ...]:
        return tuple([self._ref(x) for x in given])

    def _named(self, given: dict[str, Any]) -> tuple[tuple[str, Ref], ...]:
        return tuple([(name, self._ref(x)) for name, x in given.items()])

    def _ref(self, x: Any) -> Ref:
        if isinstance(x, Tensor):
            ref = self._refs.get(x)
            if ref is None:
                kind = "s" if x.layout is not torch.strided else "0" if self._new.get(x) else "c"
                ref = kind, len(self.constants)
                self._refs.note(x, ref)
                self.constants.append(x)
                if kind == "0":
                    self._zeros.append(ref[1])
                    self._lone = ref
                if not x.is_inference():
                    self._versions.append((x, x._version))
            return ref
        if isinstance(x, (list, tuple)):
            return ("[", *self._refs_of(x))
        if type(x) in (int, float):  # sizes and factors may differ from one outer step to the next
            self.constants.append(x)
            return ("n", len(self.constants) - 1)
        if isinstance(x, Hashable):
            return ("=", x)
        self.reason = f"an operation takes a {type(x).__name__}"
        return ("=", None)

    def finish(self, results: Sequence[Tensor]) -> tuple[Ref, ...]:
        """What the results are."""
        found = self._refs_of(results)
        if any(x._version != version for x, version in self._versions):
            self.reason = self.reason or "it changes in place what it has used before"
        for j in self._zeros:
            self._check_zeros(self.constants[j])
        return found


class _Notes:
    """Something noted of each tensor, by what it is and not by its numbers; keeps no memory alive."""

    def __init__(self) -> None:
        self._notes: dict[int, tuple[weakref.ref[Tensor], Any]] = {}

    def note(self, x: Tensor, what: Any) -> None:
        self._notes[id(x)] = weakref.ref(x), what

    def forget(self, x: Tensor) -> None:
        self._notes.pop(id(x), None)

    def get(self, x: Any, default: Any = None) -> Any:
        who, what = self._notes.get(id(x), (None, default))
        return what if who is not None and who() is x else default


def _storage(x: Any) -> int:
    return x.untyped_storage()._cdata if isinstance(x, Tensor) and x.layout is torch.strided else id(x)


def _flat(refs: Sequence[Ref]) -> list[Ref]:
    return [r for ref in refs for r in (_flat(ref[1:]) if ref[0] == "[" else [ref])]
