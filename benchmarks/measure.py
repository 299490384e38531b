"""Measurements of any function: interleaved times, the allocator's peak memory, and counts, all in one thread."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any, ClassVar, TypeVar

import torch
from torch._C import _autograd
from torch._C._profiler import RecordScope
from torch.autograd.profiler import profile
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

Call = Callable[[], Any]
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Times:
    """Seconds per call, one entry per round."""

    cpu: list[float]
    wall: list[float]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    low: float
    middle: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, _, high = quantiles(values, n=4, method="inclusive")
        return cls(low, median(values), high)

    def times(self, factor: float) -> Spread:
        return Spread(factor * self.low, factor * self.middle, factor * self.high)


def interleaved(
    calls: dict[Name, Call], rounds: int, repeat: int = 1, step: Callable[[], object] = int, warm_up: int = 1
) -> dict[Name, Times]:
    """Time each function once per round, in an order that rotates from round to round.

    repeat: calls in one sample, for functions that are too fast for the clock.
    step: called after each sample, for a progress bar.
    warm_up: rounds before the first that counts.
    """
    names = list(calls)
    times = {name: Times([], []) for name in names}
    for turn in range(rounds + warm_up):
        shift = turn % max(len(names), 1)
        for name in names[shift:] + names[:shift]:
            call = calls[name]
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(repeat):
                call()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            if turn >= warm_up:
                times[name].cpu.append(cpu / repeat)
                times[name].wall.append(wall / repeat)
            step()
    return times


def ratios(times: Times, base: Times) -> tuple[Spread, Spread]:
    """CPU and wall time divided by those of the base in the same round."""
    cpu = Spread.of([x / y for x, y in zip(times.cpu, base.cpu, strict=True)])
    wall = Spread.of([x / y for x, y in zip(times.wall, base.wall, strict=True)])
    return cpu, wall


def peak_memory(call: Call) -> int:
    """The peak memory (bytes) of a call in torch's CPU allocator, beyond what was allocated before.

    Only the allocator's events are recorded: a record of torch's operations takes gigabytes for a thousand steps.
    """
    record = profile(profile_memory=True)
    config: Any = record.config()
    enable: Any = _autograd._enable_profiler  # its third argument is missing in torch's own stubs
    _autograd._prepare_profiler(config, record.kineto_activities)
    enable(config, record.kineto_activities, {RecordScope.USER_SCOPE})
    try:
        call()
    finally:
        found: Any = _autograd._disable_profiler()
    held = peak = 0
    events: list[Any] = [e for e in found.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


class _Calls(TorchFunctionMode):
    """Counts reverse passes, and reads of tensors, which the dispatcher does not report as scalar reads."""

    READS: ClassVar = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.nonzero}

    def __init__(self, counts: Counter[str]):
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.autograd.grad:
            self.counts["passes"] += _cotangents(**(kwargs or {}))
        # tolist of a 0-d tensor is item(), which `_Scalars` counts
        if func in self.READS and args[0].ndim:
            self.counts["reads"] += 1
        return func(*args, **(kwargs or {}))


def _cotangents(grad_outputs: Any = None, is_grads_batched: bool = False, **_: Any) -> int:
    """The number of cotangents of a reverse pass: more than one under is_grads_batched or torch.func.vmap."""
    first = grad_outputs[0] if isinstance(grad_outputs, (tuple, list)) else grad_outputs
    if is_grads_batched:
        return len(first)
    functorch: Any = getattr(torch._C, "_functorch")  # noqa: B009
    if first is None or not functorch.is_batchedtensor(first):
        return 1
    return functorch.get_unwrapped(first).shape[functorch.maybe_get_bdim(first)]


class _Scalars(TorchDispatchMode):
    """Counts scalar reads, each of which waits for all queued work on an accelerator."""

    def __init__(self, counts: Counter[str]):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.counts["reads"] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(reads: bool = True) -> Iterator[Counter[str]]:
    """Counts calls of torch.autograd.grad ("passes") and reads of numbers from the device ("reads") in the block.

    A call for k cotangents at once counts as k passes. With reads=False the block runs several times as fast.
    """
    counts: Counter[str] = Counter(passes=0, reads=0)
    with _Calls(counts), _Scalars(counts) if reads else nullcontext():
        yield counts


class _Operations(TorchDispatchMode):
    def __init__(self, counts: Counter[str]):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def operations() -> Iterator[Counter[str]]:
    """Counts torch's operations in the block by name; an operation on all entries of a vmap counts once."""
    counts: Counter[str] = Counter()
    with _Operations(counts):
        yield counts


def counting(function: Callable[..., Any], counts: Counter[str], key: str) -> Callable[..., Any]:
    """The function, which now counts its calls under this key."""

    def call(*args: Any, **kwargs: Any) -> Any:
        counts[key] += 1
        return function(*args, **kwargs)

    return call
