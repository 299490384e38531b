"""Unrolled loops of small steps: a network of 6,922 parameters, by SGD with momentum and by Adam.

λ is the logarithm of a weight decay for each tensor. The floor is the plain graph of all steps in torch. It is compared
with checkpointing by hand, the library in reverse and in forward mode, with and without a compiled step, TorchOpt, and
a JAX scan under jit. The result of every method is first compared in float64 with that of the plain graph (1e-10), over
at most 20 steps, after which rounding errors are still small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, sqrt
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import hypergrad as hg

from . import peers
from .measure import Spread, interleaved, peak_memory, ratios
from .pictures import Bar, Panel
from .pictures import draw as draw_panels
from .report import MIB, Section, cell

Tensors = list[Tensor]
WIDTHS = (32, 64, 64, 10)
GRAPH = "plain graph"
TOLERANCE, CHECKED = 1e-10, 20  # largest relative error in float64, and over how many steps
LR, MOMENTUM = {"SGD": 0.1, "Adam": 0.01}, 0.9
BETAS, EPS = (0.9, 0.999), 1e-8


class Loop:
    """An update rule, a number of steps, and the data. The state is (params, buffer, …), each a list of tensors."""

    def __init__(self, rule: str, steps: int, dtype: torch.dtype = torch.float32):
        self.rule, self.steps, self.dtype = rule, steps, dtype
        draw = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

        self.start = []
        for fan_in, fan_out in pairwise(WIDTHS):
            self.start += [normal(fan_out, fan_in) / sqrt(fan_in), torch.zeros(fan_out, dtype=dtype)]
        x, xv = normal(64, WIDTHS[0]), normal(100, WIDTHS[0])
        y, yv = (torch.randint(WIDTHS[-1], (n,), generator=draw) for n in (64, 100))
        self.data = x, y, xv, yv
        self.lam = torch.full((len(self.start),), -5.0, dtype=dtype, requires_grad=True)

    def inner(self, w: Sequence[Tensor], lam: Tensor) -> Tensor:
        """Cross-entropy + ½ Σᵢ e^{λᵢ} ‖wᵢ‖²."""
        squares = torch.stack([x.square().sum() for x in w])
        return F.cross_entropy(network(w, self.data[0]), self.data[1]) + (lam.exp() * squares).sum() / 2

    def outer(self, w: Sequence[Tensor]) -> Tensor:
        return F.cross_entropy(network(w, self.data[2]), self.data[3])

    def state(self) -> tuple[Tensors, ...]:
        zeros = [torch.zeros_like(x) for x in self.start]
        return (zeros,) if self.rule == "SGD" else (zeros, zeros)

    def step(self, carry: Any, lam: Tensor, t: Any) -> Any:
        """Step t of the rule, written by hand."""
        w, *buffers = carry
        g = torch.autograd.grad(self.inner(w, lam), w, create_graph=True)
        if self.rule == "SGD":
            m = [MOMENTUM * a + b for a, b in zip(buffers[0], g, strict=True)]
            return [a - LR["SGD"] * b for a, b in zip(w, m, strict=True)], m
        m = [BETAS[0] * a + (1 - BETAS[0]) * b for a, b in zip(buffers[0], g, strict=True)]
        v = [BETAS[1] * a + (1 - BETAS[1]) * b.square() for a, b in zip(buffers[1], g, strict=True)]
        size, root = LR["Adam"] / (1 - BETAS[0] ** (t + 1)), (1 - BETAS[1] ** (t + 1)) ** 0.5
        return [a - size * b / (c.sqrt() / root + EPS) for a, b, c in zip(w, m, v, strict=True)], m, v


def network(w: Sequence[Tensor], x: Tensor) -> Tensor:
    for i in range(0, len(w), 2):
        x = F.linear(x, w[i], w[i + 1])
        x = x.relu() if i < len(w) - 2 else x
    return x


def flat(carry: Any) -> Tensors:
    return [x for part in carry for x in part]


def plain_graph(loop: Loop) -> Tensor:
    carry: Any = ([x.clone().requires_grad_() for x in loop.start], *loop.state())
    for t in range(loop.steps):
        carry = loop.step(carry, loop.lam, t)
    return torch.autograd.grad(loop.outer(carry[0]), loop.lam)[0]


def by_hand(loop: Loop) -> Tensor:
    """√T blocks of √T steps; the graph of one block at a time is in memory."""
    length = ceil(sqrt(loop.steps))
    bounds = [*range(0, loop.steps, length), loop.steps]
    kept, count = [flat((loop.start, *loop.state()))], len(loop.start)

    def parted(tensors: Tensors) -> Any:
        return tuple(tensors[i : i + count] for i in range(0, len(tensors), count))

    def leaves(tensors: Tensors) -> Tensors:
        return [x.detach().requires_grad_() for x in tensors]

    for begin, end in list(pairwise(bounds))[:-1]:
        tensors = kept[-1]
        for t in range(begin, end):
            tensors = [x.detach() for x in flat(loop.step(parted(leaves(tensors)), loop.lam, t))]
        kept.append(tensors)
    alpha, total = [], torch.zeros_like(loop.lam)
    for (begin, end), tensors in reversed(list(zip(pairwise(bounds), kept, strict=True))):
        first = leaves(tensors)
        carry = parted(first)
        for t in range(begin, end):
            carry = loop.step(carry, loop.lam, t)
        if not alpha:
            last = leaves(carry[0])
            slopes = torch.autograd.grad(loop.outer(last), last)
            alpha = [*slopes, *(torch.zeros_like(x) for x in flat(carry[1:]))]
        *alpha, part = torch.autograd.grad(flat(carry), [*first, loop.lam], alpha)
        total = total + part
    return total


def reversed_by(loop: Loop, rule: bool = False, **options: Any) -> Callable[[], hg.unroll.ReverseResult]:
    """unroll.reverse on the step written by hand, or (`rule`) on the rule of diff_optimizers."""
    if rule:
        own = hg.diff_optimizers.SGD(lr=LR["SGD"], momentum=MOMENTUM)
        own = own if loop.rule == "SGD" else hg.diff_optimizers.Adam(lr=LR["Adam"], betas=BETAS, eps=EPS)
        step, start = own.on(loop.inner), (loop.start, own.init(loop.start))
    else:
        step, start, options = loop.step, (loop.start, *loop.state()), {"with_time": True, **options}
    return lambda: hg.unroll.reverse(
        step, start, loop.lam, lambda carry, lam: loop.outer(carry[0]), loop.steps, **options
    )


def library(loop: Loop, **options: Any) -> Callable[[], Tensor]:
    call = reversed_by(loop, **options)
    return lambda: call().grads


def forwards(loop: Loop, **options: Any) -> Callable[[], hg.unroll.ForwardResult]:
    """unroll.forward with one tangent for each entry of λ."""
    start, validation = (loop.start, *loop.state()), lambda carry, lam: loop.outer(carry[0])
    return lambda: hg.unroll.forward(loop.step, start, loop.lam, validation, loop.steps, with_time=True, **options)


def forward_mode(loop: Loop, **options: Any) -> Callable[[], Tensor]:
    call = forwards(loop, **options)
    return lambda: call().grads


COLUMNS: dict[str, tuple[str, Callable[[Loop], Callable[[], Tensor]]]] = {
    GRAPH: ("floor", lambda loop: lambda: plain_graph(loop)),
    "√T blocks by hand": ("floor", lambda loop: lambda: by_hand(loop)),
    'memory="graph"': ("hypergrad", lambda loop: library(loop, memory="graph")),
    'memory="sqrt"': ("hypergrad", library),
    'memory="64MiB"': ("hypergrad", lambda loop: library(loop, memory="64MiB")),
    'rule of diff_optimizers, "graph"': ("hypergrad", lambda loop: library(loop, rule=True, memory="graph")),
    'compile=True, "iterates"': ("hypergrad", lambda loop: library(loop, memory="iterates", compile=True)),
    'compile=True, "sqrt"': ("hypergrad", lambda loop: library(loop, compile=True)),
    "forward mode": ("hypergrad", forward_mode),
    "forward mode, compile=True": ("hypergrad", lambda loop: forward_mode(loop, compile=True)),
}
if peers.installed("torchopt"):
    COLUMNS["TorchOpt"] = ("TorchOpt", lambda loop: lambda: peers.torchopt_loop(loop))
if peers.installed("jax"):
    COLUMNS["scan, checkpoint, jit"] = ("JAX", lambda loop: peers.jax_loop(loop))

ROWS: dict[str, Callable[[], Loop]] = {
    "SGD, T = 3": lambda: Loop("SGD", 3),
    "SGD, T = 10": lambda: Loop("SGD", 10),
    "SGD, T = 20": lambda: Loop("SGD", 20),
    "SGD, T = 200": lambda: Loop("SGD", 200),
    "SGD, T = 2000": lambda: Loop("SGD", 2000),
    "Adam, T = 20": lambda: Loop("Adam", 20),
    "Adam, T = 200": lambda: Loop("Adam", 200),
}


@dataclass(frozen=True)
class Result:
    row: str
    method: str
    library: str
    error: float  # relative error in float64 over at most 20 steps
    cpu: Spread | None  # CPU seconds of a call
    ratio: Spread | None  # CPU time over that of the plain graph
    peak: int | None  # peak memory in bytes, for at most 200 steps


def errors(loop: Loop, methods: Sequence[str]) -> dict[str, float]:
    """The relative error of each method in float64, compared with the plain graph."""
    wide = Loop(loop.rule, min(loop.steps, CHECKED), torch.float64)
    exact = plain_graph(wide)
    return {name: float((COLUMNS[name][1](wide)() - exact).norm() / exact.norm()) for name in methods}


def measure(rows: Sequence[str], words: Sequence[str] | None, rounds: int | None) -> tuple[list[Result], list[dict]]:
    results, settings = [], []
    names = [name for name in COLUMNS if not words or name == GRAPH or any(word in name for word in words)]
    for row in tqdm(rows, desc="rows"):
        loop = ROWS[row]()
        found = errors(loop, names)
        wrong = {name: error for name, error in found.items() if not error <= TOLERANCE}
        calls = {name: COLUMNS[name][1](loop) for name in names if name not in wrong}
        turns = rounds or max(3, min(30, 2000 // loop.steps))
        with tqdm(total=len(calls) * (turns + 1), desc=f"{row}: clock", leave=False) as bar:
            times = interleaved(calls, turns, step=bar.update)
        for name in names:
            own = times.get(name)
            results.append(
                Result(
                    row,
                    name,
                    COLUMNS[name][0],
                    found[name],
                    None if own is None else Spread.of(own.cpu),
                    None if own is None else ratios(own, times[GRAPH])[0],
                    peak_memory(calls[name]) if own and COLUMNS[name][0] != "JAX" and loop.steps <= 200 else None,
                )
            )
        size = sum(x.numel() for x in loop.start)
        settings.append({"row": row, "parameters": size, "hparams": loop.lam.numel(), "steps": loop.steps})
        settings[-1] |= {"rounds": turns, "dtype": "torch.float32", "seed": 0, "threads": 1}
    return results, settings


def table(results: Sequence[Result]) -> str:
    lines = []
    for row in dict.fromkeys(r.row for r in results):
        lines.append(f"{row:46}{'ms':>9}  {'over the plain graph':22}{'peak MiB':>9}{'error':>9}")
        for r in results:
            if r.row == row:
                ratio = f"{r.ratio.middle:.2f} [{r.ratio.low:.2f}, {r.ratio.high:.2f}]" if r.ratio else "wrong: no time"
                lines.append(
                    f"  {r.method:34}{r.library:10}{cell(r.cpu, '9.2f', 1e3):>9}  {ratio:22}"
                    f"{cell(r.peak, '9.2f', MIB):>9}{r.error:9.0e}"
                )
    lines.append("error: in float64, of 20 steps at most. A compiled step is built before the clock starts.")
    return "\n".join(lines)


SHOWN = ("√T blocks by hand", 'memory="graph"', 'memory="sqrt"', 'compile=True, "sqrt"')  # in the picture


def draw(results: Sequence[Result], path: Path) -> None:
    """One bar per method: CPU time over that of the plain graph."""
    panels = []
    for row in dict.fromkeys(r.row for r in results):
        cells = [r for r in results if r.row == row and r.ratio]
        cells = [r for r in cells if r.method in SHOWN] or cells
        panels.append(Panel(row, [Bar(r.method, r.ratio, own=r.library == "hypergrad") for r in cells], line=1))
    draw_panels(path, "Unrolled loops of small steps:\nCPU time over the plain graph", panels)


ABOUT = """The gradient of T steps of SGD with momentum, or of Adam, on a network of 6,922 parameters, with respect
to one weight decay for each tensor. Times are divided by that of the plain graph of all steps in torch."""
SECTION = Section("Unrolled loops of small steps", lambda: ROWS, measure, table, draw, ABOUT)
