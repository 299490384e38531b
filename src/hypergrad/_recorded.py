"""compile=: one product by a reverse pass is recorded, and later products repeat the operations that depend on v.

Every product through a retained graph calls the same operations on the same saved tensors, and autograd takes longer to
find small operations than they take to run. A recording keeps the operations whose results depend on v; all other
results are constants, computed once while recording. None of the user's code is traced or run again.

A chain of linear elementwise operations from x to y is y = d ∘ x, where d is its value at x = 1, and becomes this one
multiplication. What remains of the Hessian product of a logistic regression is Xᵀ(d ∘ Xv) + e ∘ v.
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
# A reference to an argument: ("v", i) is value i, which depends on v; ("c", j) is constant j, a tensor or a number;
# ("s", j) is constant j, a sparse tensor; ("d", i) is the factor of the chain that ends in value i; ("[", ...) is a
# list of references; and ("=", x) is x itself.
Ref = tuple

# Recording a product takes as long as five to seven small ones, and repeating it takes about half as long as one.
MIN_PRODUCTS = 16  # if fewer products are expected, none is recorded
WAIT = 10  # products before one is recorded if their number is not known
aten = torch.ops.aten


def _operators(names: str) -> set[Any]:
    """torch's operators of these names; the default overload if a name has none."""
    pairs = [name.partition(".")[::2] for name in names.split()]
    return {getattr(getattr(aten, name), overload or "default") for name, overload in pairs}


# Elementwise operations, and the arguments in each of which they are linear if the others are constant.
LINEAR = dict.fromkeys(_operators("mul.Scalar div.Tensor div.Scalar neg clone threshold_backward gelu_backward"), (0,))
LINEAR |= dict.fromkeys(_operators("sigmoid_backward tanh_backward silu_backward softplus_backward"), (0,))
LINEAR |= {aten.mul.Tensor: (0, 1)}
# Elementwise operations, and the arguments in which they are jointly linear.
JOINTLY_LINEAR = {aten.add.Tensor: (0, 1), aten.sub.Tensor: (0, 1), aten.where.self: (1, 2)}
# Operations that return new memory, and use only the shapes, dtypes and devices of their arguments.
FRESH = _operators("zeros zeros_like new_zeros empty_like new_empty new_empty_strided")
# The same functions without the generic call of an operator, which takes as long as a small product.
QUICK: dict[Any, Any] = {getattr(aten, name).default: getattr(torch, name) for name in ("neg", "t", "mv", "mm", "bmm")}
QUICK |= {getattr(aten, name).Tensor: getattr(torch, name) for name in ("mul", "add", "sub")}
# A later v may have other strides, with which a view is not possible.
QUICK |= {aten.view.default: torch.reshape, aten._unsafe_view.default: torch.reshape}
# Matrix products, and the functions that also add a tensor to them.
FUSED: dict[Any, Any] = {aten.mv.default: torch.addmv, aten.mm.default: torch.addmm}


class NotCompiled(HypergradientWarning):
    """Products or steps could not be compiled; they were evaluated without compilation instead.

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
    """v ↦ ∂₁Fᵀv by reverse passes, until one of them is recorded; from then on by the recorded operations.

    Before a recording is used, it is compared with the reverse pass of another v.

    Args:
        plain: the product by a reverse pass through the retained graph.
        space: the space of v.
        backend: a backend of torch.compile, by which the recording is compiled, whatever the number of products; None:
            the recording is used without a compiler, if enough products follow to pay for it.
        expected: the number of products; None if it is not known.
    """

    def __init__(self, plain: Product, space: Space, backend: str | None = None, expected: int | None = None):
        self.plain, self.space, self.backend = plain, space, backend
        self.report = "reverse passes: too few products to record one"  # how products are done, and why
        self._wait = 0  # products before one is recorded; negative if none will be recorded
        if backend is None and (expected is None or expected < MIN_PRODUCTS):
            self._wait = WAIT if expected is None else -1
        # No attribute refers to this object: a reference cycle would keep the graph until it is garbage collected.
        self._pending: Program | None = None  # recorded but not yet compared with a reverse pass
        self._replay: Product | None = None
        self._held: list[Any] = []

    def __call__(self, v: Sequence[Tensor]) -> list[Tensor]:
        if self._replay is not None:
            try:
                return self._replay(*v, *self._held)
            except Exception as error:  # as for a v with other strides than those recorded
                self._give_up(error)
        if self._wait == 0:
            return self._record(v) if self._pending is None else self._compare(v, self._pending)
        self._wait -= 1
        return self.plain(v)

    def forget(self) -> None:
        """Free the recording. From now on products are reverse passes."""
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
        # A result that is a constant of the recording is copied, because the caller may write into it.
        return [x if ref[0] == "v" else x.clone() for x, ref in zip(results, program.results, strict=True)]

    @torch.no_grad()
    def _compare(self, v: Sequence[Tensor], program: Program) -> list[Tensor]:
        """The product by a reverse pass. The recording is used from now on if it gives the same product."""
        results = self.plain(v)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # warnings of the compiler
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
    outs: tuple[int, ...]  # the numbers of the values that it returns, −1 for None
    returns_list: bool = False
    same_form: bool = True  # whether it returns one value, with the shape, dtype and device of all values that it takes

    @property
    def refs(self) -> list[Ref]:
        return _flat([*self.args, *(ref for _, ref in self.kwargs)])

    @property
    def values(self) -> list[int]:
        return [ref[1] for ref in self.refs if ref[0] == "v"]

    @property
    def is_linear(self) -> bool:
        """Whether it is elementwise and linear in the values that it takes."""
        found = tuple([i for i, ref in enumerate(self.args) if ref[0] == "v"])
        if not self.same_form or len(found) != len(self.values):
            return False
        return found == JOINTLY_LINEAR.get(self.func) or (len(found) == 1 and found[0] in LINEAR.get(self.func, ()))


def _constants(refs: Iterable[Ref]) -> list[int]:
    return list(dict.fromkeys(ref[1] for ref in refs if ref[0] in "cs"))


def _flat(refs: Iterable[Ref]) -> list[Ref]:
    return [r for ref in refs for r in (_flat(ref[1:]) if ref[0] == "[" else [ref])]


class Program:
    """A recording with its chains reduced to multiplications, as a function (*v, *held) ↦ results."""

    def __init__(self, steps: Sequence[Step], results: tuple[Ref, ...], inputs: int):
        self.results = results
        starts, lengths = _chains(steps)
        live, kept, ends = {ref[1] for ref in results if ref[0] == "v"}, [], []
        for step in reversed(steps):
            if live.isdisjoint(step.outs):
                continue
            if lengths.get(step.outs[0], 0) > 1:  # a chain of one operation is left as it is
                ends.append(step.outs[0])
                step = Step(torch.mul, (("v", starts[ends[-1]]), ("d", ends[-1])), (), step.outs)
            kept.append(step)
            live.update(step.values)
        self.steps = _fused(kept[::-1], results)
        self._used = _constants([*(ref for step in self.steps for ref in step.refs), *results])
        given = [f"v{i}" for i in range(inputs)] + [f"c{j}" for j in self._used] + [f"d{i}" for i in ends]
        self._functions: dict[str | None, Product] = {None: _generated(given, self.steps, results)}
        # The factors are the values of the chains at 1.
        chain, wanted = [], set(ends)
        for step in reversed(steps):
            if step.outs[0] in wanted and step.outs[0] in lengths:
                chain.append(step)
                wanted.update(step.values)
        self._starts = list(dict.fromkeys(starts[i] for i in ends))
        self._read = _constants([ref for step in chain for ref in step.refs])
        given = [f"v{i}" for i in self._starts] + [f"c{j}" for j in self._read]
        self._factors = _generated(given, chain[::-1], [("v", i) for i in ends])

    def held(self, constants: Sequence[Any], forms: Sequence[Any]) -> list[Any]:
        """The arguments `held` of the function: the recorded constants that it uses, and the factors of the chains."""
        kinds = [forms[i] for i in self._starts]
        ones = [torch.ones((1,) * len(shape), dtype=dtype, device=device) for shape, dtype, device in kinds]
        held = [c.detach() if isinstance(c, Tensor) else c for c in (constants[j] for j in self._used)]
        return held + self._factors(*ones, *[_unexpanded(constants[j]) for j in self._read])

    def function(self, backend: str | None) -> Product:
        source = self._functions[None]
        if backend is not None and backend not in self._functions:
            # A pattern of torch.compile fuses a matrix product with the sum, but copies the other summand first.
            options: Any = {"options": {"pattern_matcher": False}} if backend == "inductor" else {}
            self._functions[backend] = torch.compile(source, backend=backend, fullgraph=True, **options)
        return self._functions[backend]


# Later recordings of the same operations reuse the program and what was compiled for it.
_program = lru_cache(maxsize=256)(Program)


def _chains(steps: Sequence[Step]) -> tuple[dict[int, int], dict[int, int]]:
    """For each value at the end of a chain of linear elementwise operations: the value at its start, and its length."""
    starts: dict[int, int] = {}
    lengths: dict[int, int] = {}
    for step in steps:
        origins = {starts.get(i, i) for i in step.values}
        if len(origins) == 1 and step.is_linear:
            starts[step.outs[0]] = origins.pop()
            lengths[step.outs[0]] = 1 + max(lengths.get(i, 0) for i in step.values)
    return starts, lengths


def _fused(steps: Sequence[Step], results: Sequence[Ref]) -> list[Step]:
    """The steps with x + My as one operation where My is not used elsewhere."""
    uses = Counter([i for step in steps for i in step.values] + [ref[1] for ref in results if ref[0] == "v"])
    alone = [s for s in steps if s.func in FUSED and uses[s.outs[0]] == 1 and all(ref[0] != "s" for ref in s.args)]
    products, found = {step.outs[0]: step for step in alone}, {}
    for step in steps:
        if step.func is aten.add.Tensor and step.same_form and not step.kwargs and len(step.values) == 2:
            x, y = step.values if step.values[1] in products else reversed(step.values)
            if y in products:
                product = products.pop(y)
                del found[product.outs]
                step = Step(FUSED[product.func], (("v", x), *product.args), (), step.outs)
        found[step.outs] = step
    return list(found.values())


def _generated(given: list[str], steps: Sequence[Step], results: Sequence[Ref]) -> Product:
    """The steps as a Python function with the arguments `given`, which frees each value after its last use."""
    names: dict[str, Any] = {}  # the objects to which the code refers

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
        outs = ", ".join("_" if i < 0 else f"v{i}" for i in step.outs) + "," * step.returns_list
        freed = "".join(f"; v{i} = None" for i in dict.fromkeys(step.values) if last[i] == n)
        lines.append(f"    {outs} = {name(QUICK.get(step.func, step.func))}({', '.join(arguments)}){freed}")
    # The caller may write into a result, so it must not be an argument or another result.
    own = [text(ref) + ".clone()" * (text(ref) in given or ref in results[:n]) for n, ref in enumerate(results)]
    lines.append(f"    return [{', '.join(own)}]")
    # torch 2.6 counts all functions from files unknown to Python as one function, and compiles one only a few times.
    linecache.cache.setdefault(file := "<recorded product>", (0, None, [], file))
    exec(compile("\n".join(lines), file, "exec"), names)
    return names["product"]


def _unexpanded(x: Any) -> Any:
    """A tensor without the copies along its expanded axes; it broadcasts to the same tensor."""
    if not isinstance(x, Tensor) or x.layout is not torch.strided:
        return x
    return x.detach()[tuple(slice(None) if stride else slice(0, 1) for stride in x.stride())]


class Recorder:
    """Runs operations, and records those whose results depend on v as steps on values and constants.

    reason: why the steps are not the whole map, or None.
    """

    def __init__(self, v: Sequence[Tensor]):
        self.steps: list[Step] = []
        self.constants: list[Any] = []  # tensors and numbers
        self.forms: list[tuple[torch.Size, torch.dtype, torch.device]] = []  # of the values; the first values are v
        self.reason = None if all(is_plain(x) for x in v) else "v holds tensors of a subclass"
        # By id(tensor): a weak reference to it, its Ref (None: new memory without parts of v), its memory's number.
        self._notes: dict[int, tuple[Any, Ref | None, int]] = {}
        self._memories = count()
        self._versions: list[tuple[Tensor, int]] = []
        self._assumed_zeros: list[Tensor] = []  # tensors whose addition to a value is not recorded
        self._transposes: dict[int, Ref] = {}
        self._inputs = [self._value(x, next(self._memories)) for x in v]
        # Memory that may be read elsewhere: memory not made here (−1), memory of v, and memory with views.
        self._shared: set[int | None] = {-1, *self._inputs}

    def operation(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The result of one operation of the product, which is recorded if it depends on v."""
        traits = _torch.operation_traits(func) if self.reason is None else None
        if traits is None:
            self.reason = self.reason or f"a product draws random numbers or calls no operator of torch ({func})"
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
        """The result of an operation in place. It is recorded out of place if its tensor is new and has no views."""
        target: Any = args[0] if args else None
        _, ref, memory = self._note(target)
        # Out of place the result would have a wider dtype than the target.
        wider = any(isinstance(x, Tensor) and torch.result_type(target, x) != target.dtype for x in args[1:])
        if functional is None or memory in self._shared or wider:
            self.reason = f"a product changes a tensor in place ({func})"
            return func(*args, **kwargs)
        before = ref if ref is not None and ref[0] == "v" else self._ref(target.clone())
        given = before, *map(self._ref, args[1:])
        out = func(*args, **kwargs)
        self._step(functional, given, kwargs, target, memory)
        return out

    def _step(self, func: Any, args: tuple[Ref, ...], kwargs: Any, out: Any, memory: int | None) -> None:
        """Record an operation whose result lies in this memory, or in new memory if None."""
        returns_list = isinstance(out, (list, tuple))
        tensors = out if returns_list else (out,)
        if not all(x is None or isinstance(x, Tensor) for x in tensors):
            self.reason = f"a product reads numbers from a tensor ({func})"
            return
        outs = tuple([-1 if x is None else self._value(x, memory) for x in tensors])
        same_form = not returns_list and all([self.forms[ref[1]] == self.forms[-1] for ref in args if ref[0] == "v"])
        equal = self._equal_argument(func, args, same_form and not kwargs)
        if equal is not None:
            who, _, memory = self._notes[id(out)]
            self._notes[id(out)] = who, equal, memory
        else:
            named = tuple([(name, self._ref(x)) for name, x in kwargs.items()])
            self.steps.append(Step(func, args, named, outs, returns_list, same_form))
            if func is aten.t.default:
                self._transposes[outs[0]] = args[0]

    def _equal_argument(self, func: Any, args: tuple[Ref, ...], same_form: bool) -> Ref | None:
        """The reference to which the result is equal, if it is known: x for (xᵀ)ᵀ and for x + 0."""
        if func is aten.t.default:
            return self._transposes.get(args[0][1])
        for x, zero in (args, args[::-1]) if func is aten.add.Tensor and same_form else ():
            # New memory into which nothing of v was written. `program` checks that it is zero.
            if zero[0] == "c" and self._note(self.constants[zero[1]])[2] != -1:
                self._assumed_zeros.append(self.constants[zero[1]])
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
        """The program of the recorded steps. Raises NotCompiled if they are not the whole map."""
        refs = tuple(map(self._ref, results))
        if any(_torch.version_of(x) != before for x, before in self._versions):
            self.reason = self.reason or "a product changes in place a tensor that it has used before"
        if any(bool(torch.linalg.vector_norm(x)) for x in self._assumed_zeros):
            self.reason = self.reason or "a part of a product is computed outside torch"
        if self.reason is not None:
            raise NotCompiled(self.reason)
        return _program(tuple(self.steps), refs, len(self._inputs))
