"""compile=: one product by a reverse pass is recorded, and later ones repeat the part that depends on v.

A product through a retained graph calls the same operations on the same saved tensors each time, and autograd takes
longer to find them than small ones take to run. A recording keeps the operations whose results depend on v; the rest is
constant, computed while recording. No code of the user's is traced or run again.

A chain of elementwise operations from x to y is linear, hence y = d ∘ x with d the chain's value at x = 1: it becomes
one multiplication. The Hessian product of a logistic regression is left as Xᵀ(d ∘ Xv) + e ∘ v.
"""

from __future__ import annotations

import linecache
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _torch
from ._solution import HypergradientWarning, warn
from ._vector import Space, is_plain

Product = Callable[..., list[Tensor]]
# An argument: ("v", i) for value i, which depends on v; ("c", j) for constant j, a tensor or a number, ("s", j) for one
# that is sparse; ("d", i) for the factor of the chain that ends in value i; ("[", ...) for a list of arguments; and
# ("=", x) for x itself.
Ref = tuple

# Recording a product takes as long as five to seven small ones, and repeating it about half of one.
FEWEST = 16  # products, below which one is not recorded
WAIT = 10  # products before one is recorded, where their number is not known
aten = torch.ops.aten


def _operators(names: str) -> set[Any]:
    """torch's operators, in the default overload where none is named."""
    pairs = [name.partition(".")[::2] for name in names.split()]
    return {getattr(getattr(aten, name), overload or "default") for name, overload in pairs}


# Elementwise operations that are linear in any one of these arguments,
LINEAR = dict.fromkeys(_operators("mul.Scalar div.Tensor div.Scalar neg clone threshold_backward gelu_backward"), (0,))
LINEAR |= dict.fromkeys(_operators("sigmoid_backward tanh_backward silu_backward softplus_backward"), (0,))
LINEAR |= {aten.mul.Tensor: (0, 1)}
# and in all of these together.
TOGETHER = {aten.add.Tensor: (0, 1), aten.sub.Tensor: (0, 1), aten.where.self: (1, 2)}
# New memory; of the arguments only the form is in the result.
FRESH = _operators("zeros zeros_like new_zeros empty_like new_empty new_empty_strided")
# The same functions without the generic call of an operator, which takes as long as a small product.
QUICK: dict[Any, Any] = {getattr(aten, name).default: getattr(torch, name) for name in ("neg", "t", "mv", "mm", "bmm")}
QUICK |= {getattr(aten, name).Tensor: getattr(torch, name) for name in ("mul", "add", "sub")}
# A view of the first v may be none of a later one, which lies in memory in another way.
QUICK |= {aten.view.default: torch.reshape, aten._unsafe_view.default: torch.reshape}
# Products to which a sum is added on the way.
ADDED: dict[Any, Any] = {aten.mv.default: torch.addmv, aten.mm.default: torch.addmm}


class NotCompiled(HypergradientWarning):
    """Products could not be compiled; the usual ones were used instead.

    Example:
        >>> import warnings
        >>> w, scale, lam = torch.ones(50), torch.linspace(1.0, 10.0, 50), torch.ones(50, requires_grad=True)
        >>> inner_loss = lambda w, lam: ((scale * (w - lam) ** 2).sum() + 1e-3 * (w**4).sum()).exp()
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always", hg.NotCompiled)
        ...     result = hg.implicit.grad(
        ...         lambda w, lam: (w**2).sum(),
        ...         inner_loss=inner_loss,
        ...         params=w,
        ...         hparams=lam,
        ...         solver=hg.solvers.CG(max_steps=100),
        ...         compile="no_such_backend",
        ...     )
        >>> [each.category.__name__ for each in caught], result.compiled[:14]
        (['NotCompiled'], 'reverse passes')
    """


class Recorded:
    """v ↦ ∂₁Fᵀv: reverse passes, one of which is recorded, and then the operations recorded.

    A recording is compared with the reverse pass of another v before it is used.

    Args:
        plain: the product by a reverse pass through the retained graph.
        space: that of v.
        backend: of torch.compile, which compiles the recording, whatever the number of products; None: the recording
            itself is used, where enough products follow to pay for it.
        expected: the number of products; None where it is not known.
    """

    def __init__(self, plain: Product, space: Space, backend: str | None = None, expected: int | None = None):
        self.plain, self.space, self.backend = plain, space, backend
        self.report = "reverse passes: too few products to record one"  # how products are done, and why
        self._wait = 0  # products before one is recorded; negative: none is
        if backend is None and (expected is None or expected < FEWEST):
            self._wait = WAIT if expected is None else -1
        # Nothing here refers to this object: a cycle would keep the graph until it is found.
        self._pending: Program | None = None  # recorded, and not compared yet
        self._replay: Product | None = None
        self._held: list[Any] = []

    def __call__(self, v: Sequence[Tensor]) -> list[Tensor]:
        if self._replay is not None:
            try:
                return self._replay(*v, *self._held)
            except Exception as error:  # at sizes, or in memory, that it has not seen
                self._give_up(error)
        if self._wait == 0:
            return self._record(v) if self._pending is None else self._compare(v, self._pending)
        self._wait -= 1
        return self.plain(v)

    def forget(self) -> None:
        """Free the recording: products are reverse passes from now on."""
        self._pending, self._replay, self._held, self._wait = None, None, [], -1

    def _record(self, v: Sequence[Tensor]) -> list[Tensor]:
        recorder = Recorder(v)
        with _torch.watched(recorder.operation):
            results = self.plain(v)
        try:
            program = recorder.program(results)
            self._held = program.held(recorder.constants, recorder.forms)
        except Exception as error:  # an operation may refuse the arguments that the recording gives it
            self._give_up(error)
            return results
        self._pending = program
        # A result that is a constant of the recording stays with it: the caller may write into the copy.
        return [x if ref[0] == "v" else x.clone() for x, ref in zip(results, program.results, strict=True)]

    @torch.no_grad()
    def _compare(self, v: Sequence[Tensor], program: Program) -> list[Tensor]:
        """The product by a reverse pass; the recording is used from now on where it gives the same."""
        results = self.plain(v)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a compiler's own
                product = self.space.pack(program.function(self.backend)(*v, *self._held))
            expected = self.space.pack(results)
            error, size = (product - expected).norm(), expected.norm()
            if not bool((error <= self.space.eps**0.5 * size).all()):
                raise NotCompiled(f"a recording is off by {float((error / size).max()):.1e} from a reverse pass")
            self._pending, self._replay = None, program.function(self.backend)
            how = "recorded" if self.backend is None else f"compiled by {self.backend}"
            self.report = f"{how}: {len(program.steps)} operations a product"
        except Exception as error:  # whatever a compiler may raise
            self._give_up(error)
        return results

    def _give_up(self, error: Exception) -> None:
        self.forget()
        kind = "" if isinstance(error, NotCompiled) else f"{type(error).__name__}: "
        self.report = f"reverse passes: {kind}{' '.join(str(error).split())[:300]}"
        warn(f"products could not be compiled and are done by {self.report}", NotCompiled)


class Step(NamedTuple):
    """One operation whose result depends on v."""

    func: Any
    args: tuple[Ref, ...]
    kwargs: tuple[tuple[str, Ref], ...]
    outs: tuple[int, ...]  # the values that it gives, −1 for None
    many: bool = False  # whether these are a list
    alike: bool = True  # whether it is one value with the shape, dtype and device of those that it is made from

    @property
    def refs(self) -> list[Ref]:
        return _flat([*self.args, *(ref for _, ref in self.kwargs)])

    @property
    def values(self) -> list[int]:
        return [ref[1] for ref in self.refs if ref[0] == "v"]

    @property
    def chained(self) -> bool:
        """Whether it is elementwise and linear in the values that it takes."""
        found = tuple([i for i, ref in enumerate(self.args) if ref[0] == "v"])
        if not self.alike or len(found) != len(self.values):
            return False
        return found == TOGETHER.get(self.func) or (len(found) == 1 and found[0] in LINEAR.get(self.func, ()))


def _constants(refs: Iterable[Ref]) -> list[int]:
    return list(dict.fromkeys(ref[1] for ref in refs if ref[0] in "cs"))


def _flat(refs: Iterable[Ref]) -> list[Ref]:
    return [r for ref in refs for r in (_flat(ref[1:]) if ref[0] == "[" else [ref])]


class Program:
    """What is left of a recording, as a function (*v, *held) ↦ results."""

    def __init__(self, steps: Sequence[Step], results: tuple[Ref, ...], inputs: int):
        self.results = results
        starts, lengths = _chains(steps)
        live, kept, ends = {ref[1] for ref in results if ref[0] == "v"}, [], []
        for step in reversed(steps):
            if live.isdisjoint(step.outs):
                continue
            if lengths.get(step.outs[0], 0) > 1:  # a chain of one operation stays what it is
                ends.append(step.outs[0])
                step = Step(torch.mul, (("v", starts[ends[-1]]), ("d", ends[-1])), (), step.outs)
            kept.append(step)
            live.update(step.values)
        self.steps = _added(kept[::-1], results)
        self._used = _constants([*(ref for step in self.steps for ref in step.refs), *results])
        given = [f"v{i}" for i in range(inputs)] + [f"c{j}" for j in self._used] + [f"d{i}" for i in ends]
        self._functions: dict[str | None, Product] = {None: _written(given, self.steps, results)}
        # The factors: the chains from 1.
        chain, wanted = [], set(ends)
        for step in reversed(steps):
            if step.outs[0] in wanted and step.outs[0] in lengths:
                chain.append(step)
                wanted.update(step.values)
        self._starts = list(dict.fromkeys(starts[i] for i in ends))
        self._read = _constants([ref for step in chain for ref in step.refs])
        given = [f"v{i}" for i in self._starts] + [f"c{j}" for j in self._read]
        self._factors = _written(given, chain[::-1], [("v", i) for i in ends])

    def held(self, constants: Sequence[Any], forms: Sequence[Any]) -> list[Any]:
        """The constants that the function takes: some of those recorded, and the factors of the chains."""
        kinds = [forms[i] for i in self._starts]
        ones = [torch.ones((1,) * len(shape), dtype=dtype, device=device) for shape, dtype, device in kinds]
        held = [c.detach() if isinstance(c, Tensor) else c for c in (constants[j] for j in self._used)]
        return held + self._factors(*ones, *[_narrow(constants[j]) for j in self._read])

    def function(self, backend: str | None) -> Product:
        source = self._functions[None]
        if backend is not None and backend not in self._functions:
            # torch.compile's own patterns make one operation of a product and a sum, which copies the sum first.
            options: Any = {"options": {"pattern_matcher": False}} if backend == "inductor" else {}
            self._functions[backend] = torch.compile(source, backend=backend, fullgraph=True, **options)
        return self._functions[backend]


# Later recordings of the same operations need not build or compile again.
_program = lru_cache(maxsize=256)(Program)


def _chains(steps: Sequence[Step]) -> tuple[dict[int, int], dict[int, int]]:
    """For each value that a chain of elementwise operations leads to: where it starts, and its length."""
    starts: dict[int, int] = {}
    lengths: dict[int, int] = {}
    for step in steps:
        origins = {starts.get(i, i) for i in step.values}
        if len(origins) == 1 and step.chained:
            starts[step.outs[0]] = origins.pop()
            lengths[step.outs[0]] = 1 + max(lengths.get(i, 0) for i in step.values)
    return starts, lengths


def _added(steps: Sequence[Step], results: Sequence[Ref]) -> list[Step]:
    """The same with x + My as one operation, where My is used nowhere else."""
    uses = Counter([i for step in steps for i in step.values] + [ref[1] for ref in results if ref[0] == "v"])
    alone = [s for s in steps if s.func in ADDED and uses[s.outs[0]] == 1 and all(ref[0] != "s" for ref in s.args)]
    products, found = {step.outs[0]: step for step in alone}, {}
    for step in steps:
        if step.func is aten.add.Tensor and step.alike and not step.kwargs and len(step.values) == 2:
            x, y = step.values if step.values[1] in products else reversed(step.values)
            if y in products:
                product = products.pop(y)
                del found[product.outs]
                step = Step(ADDED[product.func], (("v", x), *product.args), (), step.outs)
        found[step.outs] = step
    return list(found.values())


def _written(given: list[str], steps: Sequence[Step], results: Sequence[Ref]) -> Product:
    """The function of these arguments, in which a value is freed after its last use."""
    names: dict[str, Any] = {}  # what its text refers to

    def name(x: Any) -> str:
        names[f"x{len(names)}"] = x
        return f"x{len(names) - 1}"

    def text(ref: Ref) -> str:
        if ref[0] == "[":
            return f"[{', '.join(map(text, ref[1:]))}]"
        return name(ref[1]) if ref[0] == "=" else f"{'c' if ref[0] == 's' else ref[0]}{ref[1]}"

    last = {i: n for n, step in enumerate(steps) for i in step.values}
    last |= {ref[1]: len(steps) for ref in results if ref[0] == "v"}
    lines = [f"def product({', '.join(given)}):"]
    for n, step in enumerate(steps):
        arguments = [text(ref) for ref in step.args] + [f"{key}={text(ref)}" for key, ref in step.kwargs]
        outs = ", ".join("_" if i < 0 else f"v{i}" for i in step.outs) + "," * step.many
        freed = "".join(f"; v{i} = None" for i in dict.fromkeys(step.values) if last[i] == n)
        lines.append(f"    {outs} = {name(QUICK.get(step.func, step.func))}({', '.join(arguments)}){freed}")
    # A result is the caller's own: neither a constant, nor v, nor another result.
    own = [text(ref) + ".clone()" * (text(ref) in given or ref in results[:n]) for n, ref in enumerate(results)]
    lines.append(f"    return [{', '.join(own)}]")
    # Torch 2.6 counts all functions whose file Python does not know as one, of which it compiles few.
    linecache.cache.setdefault(file := "<recorded product>", (0, None, [], file))
    exec(compile("\n".join(lines), file, "exec"), names)
    return names["product"]


def _narrow(x: Any) -> Any:
    """A tensor without its copies along expanded axes: it broadcasts to the same."""
    if not isinstance(x, Tensor) or x.layout is not torch.strided:
        return x
    return x.detach()[tuple(slice(None) if stride else slice(0, 1) for stride in x.stride())]


class Recorder:
    """Does operations, and writes down those whose results depend on v, as steps on values and constants.

    reason: why the steps are not the whole map, or None.
    """

    def __init__(self, v: Sequence[Tensor]):
        self.steps: list[Step] = []
        self.constants: list[Any] = []  # tensors and numbers
        self.forms: list[tuple[torch.Size, torch.dtype, torch.device]] = []  # of the values, of which the first are v
        self.reason = None if all(is_plain(x) for x in v) else "its tensors are not plain ones"
        # Of a tensor: what it is (None: new memory that nothing of v is in), and a number for the memory that it is in.
        self._notes: dict[int, tuple[Any, Ref | None, int]] = {}
        self._memories = count()
        self._versions: list[tuple[Tensor, int]] = []
        self._left_out: list[Tensor] = []  # zeros, added to values
        self._transposes: dict[int, Ref] = {}
        self._inputs = [self._value(x, next(self._memories)) for x in v]
        # Memory from elsewhere, of v, and that of which there are views.
        self._shared: set[int | None] = {-1, *self._inputs}

    def operation(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The operation's result; called for each one of the product."""
        traits = _torch.operation_traits(func) if self.reason is None else None
        if traits is None:
            self.reason = self.reason or f"it draws random numbers, or calls what is not an operator of torch ({func})"
            return func(*args, **kwargs)
        writes, view, functional = traits
        depends = self._depends(args) or (bool(kwargs) and self._depends(kwargs.values()))
        if writes and depends:
            return self._write(func, functional, args, kwargs)
        out = func(*args, **kwargs)
        if func in FRESH:
            self._notes[id(out)] = weakref.ref(out), None, next(self._memories)
            return out
        memory = self._note(args[0])[2] if view else None
        self._shared.add(memory)
        if depends:
            self._step(func, tuple(map(self._ref, args)), kwargs, out, memory)
        return out

    def _write(self, func: Any, functional: Any, args: Any, kwargs: Any) -> Any:
        """An operation in place, on a tensor made here that has no views, is written down as one that is not."""
        target: Any = args[0] if args else None
        _, ref, memory = self._note(target)
        # In place the result has the target's dtype.
        wider = any(isinstance(x, Tensor) and torch.result_type(target, x) != target.dtype for x in args[1:])
        if functional is None or memory in self._shared or wider:
            self.reason = f"it changes a tensor in place ({func})"
            return func(*args, **kwargs)
        before = ref if ref is not None and ref[0] == "v" else self._ref(target.clone())
        given = before, *map(self._ref, args[1:])
        out = func(*args, **kwargs)
        self._step(functional, given, kwargs, target, memory)
        return out

    def _step(self, func: Any, args: tuple[Ref, ...], kwargs: Any, out: Any, memory: int | None) -> None:
        """Write down an operation whose result is new, or lies in this memory."""
        many = isinstance(out, (list, tuple))
        tensors = out if many else (out,)
        if not all(x is None or isinstance(x, Tensor) for x in tensors):
            self.reason = f"it reads numbers from a tensor ({func})"
            return
        outs = tuple([-1 if x is None else self._value(x, memory) for x in tensors])
        alike = not many and all([self.forms[ref[1]] == self.forms[-1] for ref in args if ref[0] == "v"])
        same = self._same(func, args, alike and not kwargs)
        if same is not None:
            who, _, memory = self._notes[id(out)]
            self._notes[id(out)] = who, same, memory
        else:
            named = tuple([(name, self._ref(x)) for name, x in kwargs.items()])
            self.steps.append(Step(func, args, named, outs, many, alike))
            if func is aten.t.default:
                self._transposes[outs[0]] = args[0]

    def _same(self, func: Any, args: tuple[Ref, ...], alike: bool) -> Ref | None:
        """The argument that a value is equal to: the transpose of xᵀ, x + 0."""
        if func is aten.t.default:
            return self._transposes.get(args[0][1])
        for x, zero in (args, args[::-1]) if func is aten.add.Tensor and alike else ():
            # New memory that nothing of v was written into; whether it is zero is seen at the end.
            if zero[0] == "c" and self._note(self.constants[zero[1]])[2] != -1:
                self._left_out.append(self.constants[zero[1]])
                return x
        return None

    def _value(self, x: Tensor, memory: int | None) -> int:
        i = len(self.forms)
        self.forms.append((x.shape, x.dtype, x.device))
        self._notes[id(x)] = weakref.ref(x), ("v", i), next(self._memories) if memory is None else memory
        return i

    def _note(self, x: Any) -> tuple[Any, Ref | None, int]:
        note = self._notes.get(id(x))
        return (None, None, -1) if note is None or note[0]() is not x else note

    def _depends(self, given: Iterable[Any]) -> bool:
        for x in given:
            if isinstance(x, Tensor):
                note = self._notes.get(id(x))
                if note is not None and note[1] is not None and note[1][0] == "v" and note[0]() is x:
                    return True
            elif isinstance(x, (list, tuple)) and self._depends(x):
                return True
        return False

    def _ref(self, x: Any) -> Ref:
        if isinstance(x, (list, tuple)):
            return ("[", *map(self._ref, x))
        if isinstance(x, Tensor):
            _, ref, memory = self._note(x)
            if ref is None:
                ref = "c" if x.layout is torch.strided else "s", len(self.constants)
                self._notes[id(x)] = weakref.ref(x), ref, memory
                self._versions.append((x, _torch.version_of(x)))
                self.constants.append(x)
            return ref
        if type(x) not in (int, float):
            return ("=", x)
        self.constants.append(x)  # sizes and factors may differ from one outer step to the next
        return ("c", len(self.constants) - 1)

    def program(self, results: Sequence[Tensor]) -> Program:
        """The program of what was recorded. Raises NotCompiled where that is not the whole map."""
        refs = tuple(map(self._ref, results))
        if any(_torch.version_of(x) != before for x, before in self._versions):
            self.reason = self.reason or "it changes in place what it has used before"
        if any(bool(torch.linalg.vector_norm(x)) for x in self._left_out):
            self.reason = self.reason or "a part of it was done where torch does not see it"
        if self.reason is not None:
            raise NotCompiled(self.reason)
        return _program(tuple(self.steps), refs, len(self._inputs))
