"""Products with ∂₁Fᵀ by a recording of one of them, as it is or compiled, where that is faster than a reverse pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._blocks import ByBlocks
from ._program import Program
from ._recording import Recorder, Ref
from ._solution import HypergradientWarning, finite, warn
from ._vector import Space

Leaves = Sequence[Tensor]
Pull = Callable[[Leaves], list[Tensor]]

PASSES, RECORDED, BLOCKS, INDUCTOR = "reverse passes", "recorded", "blocks of rows", "inductor"
# torch.compile's own patterns make one operation of a product and a sum, which copies the sum first.
OPTIONS: dict[str, Any] = {"options": {"pattern_matcher": False}}
MOST = 256  # recordings that are kept
WORTH = 5e-5  # seconds of a product under which inductor is not tried: torch.compile takes that long to call its code


class NotCompiled(HypergradientWarning):
    """Products were to be compiled and could not be; the usual ones took their place."""


class Verdict(NamedTuple):
    """The way in which products are done, what there is to say of it, and whether no other way was possible."""

    way: str
    report: str
    failed: bool = False


class Product:
    """v ↦ ∂₁Fᵀv: the first is done by a reverse pass and recorded, the others in the way that was found the fastest.

    That is found at the second product, by trying every way and comparing what it gives, and kept with the form of the
    recording, which knows nothing of the tensors' numbers, for later hypergradients of about the same size. Where the
    recording is not linear by its form alone, their second products are compared as well.

    Args:
        plain: the product by a reverse pass through the retained graph.
        space: that of v.
        backend: of torch.compile, whose code is used; None for the fastest of inductor's, the recording and `plain`.

    Attributes:
        report: how products are done, and why.
    """

    def __init__(self, plain: Pull, space: Space, backend: str | None):
        self.plain, self.space, self.backend = plain, space, backend
        self.report = f"{PASSES}: too few products to compile"
        # Nothing here refers to this object: a cycle would keep the graph until it is found.
        self._recorded: tuple[Recording, list[Any]] | None = None
        self._settled: Pull | None = None

    def __call__(self, v: Leaves) -> list[Tensor]:
        if self._settled is not None:
            return self._settled(v)
        if self._recorded is None:
            return self._first(v)
        expected, (recording, held) = self.plain(v), self._recorded
        self._settle(recording.judge(held, self, v, expected), recording, held)
        return expected

    def forget(self) -> None:
        """Let go of what the graph does not keep itself: products are reverse passes from now on."""
        self._settled, self._recorded = self.plain, None

    def _first(self, v: Leaves) -> list[Tensor]:
        with Recorder(v) as recorder, torch.autograd.set_multithreading_enabled(False):
            results = self.plain(v)
        refs = recorder.finish(results)
        if recorder.reason is not None:
            self._settle(_failure(recorder.reason))
            return results
        try:
            recording = _known(recorder, refs, len(v))
            held = recording.program.held(recorder.constants, recorder.forms)
        except Exception as error:  # an operation may not take what the recording makes of it
            self._settle(_failure(_said(error)))
            return results
        verdict = recording.verdicts.get(_key(held, self.backend))
        # A part that torch does not see is a constant to the recording, and one that was zero before may not be now.
        if verdict is None or not (recording.program.linear or verdict.way == PASSES):
            self._recorded = recording, held
        else:
            self._settle(verdict, recording, held)
        # A result that is a constant of the recording stays with it: the caller may write into his.
        return [x if ref[0] == "v" else x.clone() for x, ref in zip(results, refs, strict=True)]

    def _settle(self, verdict: Verdict, recording: Recording | None = None, held: Sequence[Any] = ()) -> None:
        self.forget()
        self.report = verdict.report
        if recording is not None and verdict.way != PASSES:
            self._settled = partial(_either, recording.way(RECORDED, held), self.plain, PASSES)
            if verdict.way != RECORDED:
                way = recording.way(verdict.way, held)
                self._settled = partial(_either, way, self._settled, "recorded operations")
        if verdict.failed:
            warn(f"products could not be compiled: {verdict.report}", NotCompiled)


class Recording:
    """A program, what compilers made of it, and the verdicts on it, by backend and size."""

    def __init__(self, program: Program):
        self.program, self.blocks = program, ByBlocks(program)
        self.verdicts: dict[tuple[str | None, int], Verdict] = {}
        self._compiled: dict[str, Callable[..., Any]] = {}

    def way(self, name: str, held: Sequence[Any]) -> Pull:
        """v ↦ the product, by the recorded operations, as they are or by blocks, or by a backend's code for them."""
        if name in (RECORDED, BLOCKS):
            call: Any = (self.blocks.way(held) if name == BLOCKS else None) or self.program.product.forward
        else:
            if name not in self._compiled:
                options = OPTIONS if name == "inductor" else {}
                source = self.program.source.forward
                self._compiled[name] = torch.compile(source, backend=name, fullgraph=True, **options)
            call = self._compiled[name]
        return lambda v: call(*v, *held)

    @torch.no_grad()
    def judge(self, held: Sequence[Any], product: Product, v: Leaves, expected: Leaves) -> Verdict:
        """Which way to take, found by trying; it is kept. A way that was found before is compared alone."""
        if not finite(expected):
            return Verdict(PASSES, f"{PASSES}: a product that is not finite tells nothing of others")
        key = _key(held, product.backend)
        if key in self.verdicts:
            try:
                _check(self.way(self.verdicts[key].way, held), v, expected, product.space)
            except Exception as error:
                self.verdicts[key] = _failure(_said(error))
            return self.verdicts[key]
        times, failures = {}, []
        if product.backend is not None:
            ways = [product.backend]
        else:
            ways = [RECORDED, *([BLOCKS] if self.blocks.way(held) else []), INDUCTOR]
        for name in ways:
            if times.get(RECORDED, WORTH) < WORTH:
                break
            try:
                call = self.way(name, held)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of the compiler's own parts
                    _check(call, v, expected, product.space)
                times[name] = _seconds(call, v)
            except Exception as error:  # whatever a compiler may say: there are other ways
                failures.append(f"{name}: {_said(error)}")
                if name == RECORDED:
                    break
        if not times:
            verdict = _failure("; ".join(failures))
        elif product.backend is not None:
            verdict = Verdict(product.backend, f"compiled by {product.backend}")
        else:
            times[PASSES] = _seconds(product.plain, v)
            best = min(times, key=lambda name: times[name])
            others = ", ".join(f"{1e6 * t:.3g} by {name}" for name, t in times.items() if name != best)
            report = f"{best}: {1e6 * times[best]:.3g} µs a product, against {others}"
            verdict = Verdict(best, "; ".join([report, *failures]))
        self.verdicts[key] = verdict
        return verdict


def _either(way: Pull, other: Pull, name: str, v: Leaves) -> list[Tensor]:
    """The product in the one way; in the other where that fails at sizes, or in memory, that it has not seen."""
    try:
        return way(v)
    except Exception as error:
        warn(f"products could not be compiled again, and are done by {name}: {_said(error)}", NotCompiled)
        return other(v)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _failure(reason: str) -> Verdict:
    return Verdict(PASSES, f"{PASSES}, for {reason}", failed=True)


def _key(held: Sequence[Any], backend: str | None) -> tuple[str | None, int]:
    """Hypergradients whose sizes are of one power of two share a verdict."""
    return backend, sum(c.numel() * c.element_size() for c in held if isinstance(c, Tensor)).bit_length()


def _check(call: Pull, v: Leaves, expected: Leaves, space: Space) -> None:
    """Raise where a product is another one, or not linear: a part of it was done where torch does not see it."""
    due = space.pack(expected)
    error, size = (space.pack(call(v)) - due).norm(), due.norm()
    if not bool((error <= space.eps**0.5 * size).all()):
        raise RuntimeError(f"its product is {float((error / size).max()):.1e} away from that of a reverse pass")
    if bool(space.pack(call([torch.zeros_like(x) for x in v])).norm().any()):
        raise RuntimeError("its product with 0 is not 0")


def _seconds(call: Pull, v: Leaves) -> float:
    """Of a product, at best: what else the machine does only ever makes one longer."""
    call(v)
    times = []
    while len(times) < 5 or (sum(times) < 2e-3 and len(times) < 50):
        times.append(seconds_of(call, v))
    return min(times)


_recordings: dict[Any, Recording] = {}


def _known(recorder: Recorder, results: tuple[Ref, ...], inputs: int) -> Recording:
    """The recording of this form: of the same operations, whatever the tensors, sizes and other numbers."""
    form = (tuple(recorder.steps), results, inputs)
    found = _recordings.get(form)
    if found is None:
        if len(_recordings) >= MOST:
            _recordings.pop(next(iter(_recordings)), None)  # another thread may have taken it
        found = _recordings[form] = Recording(Program(recorder.steps, results, inputs, len(recorder.forms)))
    return found


def seconds_of(product, v):
    import time

    start = time.perf_counter()
    product(v)
    return time.perf_counter() - start
