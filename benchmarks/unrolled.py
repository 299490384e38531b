"""The gradient through T steps of gradient descent: time and peak memory of every way to store them.

Limits: memory="sqrt" needs at most 1/10 (MLP) or 1/4 (logistic) of the memory of HyperTorch's reverse, 1.1 times its
time and 1.6 times that of the plain graph. Fewer steps than T are timed, because ratios depend little on their number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vjp
from tqdm import tqdm

import hypergrad as hg

from . import peers
from .measure import Spread, counting, interleaved, peak_memory, ratios
from .methods import Tensors
from .pictures import Bar, Panel
from .pictures import draw as draw_panels
from .problems import flat, logistic_inner, logistic_outer, perceptron
from .report import MIB, Section, cell

TOLERANCE = 1e-3  # relative error in float32 above which a method is not timed
GRAPH, HYPERTORCH = "plain graph, by hand", "HyperTorch reverse"


@dataclass(frozen=True)
class Descent:
    """w ← w − lr ∇₁g(w, λ; batch t) from `start`, T = `steps` times; `timed` of the steps are timed."""

    name: str
    start: list[Tensor]
    hparams: list[Tensor]
    inner: Callable[..., Tensor]
    outer: Callable[..., Tensor]
    batches: list[dict[str, Tensor]]
    valid: dict[str, Tensor]
    lr: float
    steps: int
    timed: int
    checkpoints: int
    budget: str
    memory_limit: float  # of "sqrt", over HyperTorch's

    def batch(self, t: int) -> dict[str, Tensor]:
        return self.batches[t % len(self.batches)]

    def step(self, params: Sequence[Tensor], hparams: Sequence[Tensor], t: int, live: bool = True) -> Tensors:
        """live: keep the graph of the gradient."""
        with torch.enable_grad():
            slopes = torch.autograd.grad(self.inner(params, hparams, self.batch(t)), params, create_graph=live)
        return [w - self.lr * g for w, g in zip(params, slopes, strict=True)]

    def outer_loss(self, params: Sequence[Tensor], hparams: Sequence[Tensor]) -> Tensor:
        return self.outer(params, hparams, self.valid)

    def to(self, dtype: torch.dtype) -> Descent:
        def cast(data: dict[str, Tensor]) -> dict[str, Tensor]:
            return {k: v.to(dtype) if v.is_floating_point() else v for k, v in data.items()}

        return replace(
            self,
            start=[w.to(dtype) for w in self.start],
            hparams=[h.detach().to(dtype).requires_grad_() for h in self.hparams],
            batches=[cast(b) for b in self.batches],
            valid=cast(self.valid),
        )


def decayed_inner(params: Sequence[Tensor], hparams: Sequence[Tensor], data: dict[str, Tensor]) -> Tensor:
    """Cross-entropy + ½ Σ e^{θᵢ} ‖wᵢ‖², with one θᵢ for each tensor."""
    decay = torch.stack([h.exp() * w.square().sum() for w, h in zip(params, hparams, strict=True)]).sum()
    return F.cross_entropy(perceptron(params, data["x"]), data["y"]) + 0.5 * decay


def decayed_outer(params: Sequence[Tensor], hparams: Sequence[Tensor], data: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(perceptron(params, data["x"]), data["y"])


def mlp(rows: int = 2000, widths: Sequence[int] = (784, 256, 256, 10), size: int = 100, **options: Any) -> Descent:
    draw = np.random.RandomState(0)
    params = []
    for fan_in, fan_out in pairwise(widths):
        params += [draw.randn(fan_out, fan_in) / np.sqrt(fan_in), np.zeros(fan_out)]
    x = draw.randn(2 * rows, widths[0])
    y = (x @ draw.randn(widths[0], widths[-1])).argmax(1)
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    batches = [{"x": x[i : i + size], "y": y[i : i + size]} for i in range(0, rows, size)]
    start, hparams = [torch.from_numpy(p) for p in params], [torch.tensor(-5.0, dtype=x.dtype) for _ in params]
    valid = {"x": x[rows : rows + 500], "y": y[rows : rows + 500]}
    return Descent("mlp", start, hparams, decayed_inner, decayed_outer, batches, valid, lr=0.05, **options)


def logistic(rows: int = 2000, size: int = 1000, **options: Any) -> Descent:
    draw = np.random.RandomState(0)
    x = draw.randn(rows + rows // 2, size)
    y = (x @ draw.randn(size) / np.sqrt(size) + 0.1 * draw.randn(len(x)) > 0).astype(float)
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    start, theta = [torch.zeros(size, dtype=x.dtype)], torch.from_numpy(-4 + 0.3 * draw.randn(size))
    batches, valid = [{"x": x[:rows], "y": y[:rows]}], {"xv": x[rows:], "yv": y[rows:]}
    return Descent("logistic", start, [theta], logistic_inner, logistic_outer, batches, valid, lr=0.5, **options)


ROWS: dict[str, Callable[[], Descent]] = {
    "mlp": lambda: mlp(steps=1000, timed=100, checkpoints=30, budget="64MiB", memory_limit=1 / 10),
    "logistic": lambda: logistic(steps=1000, timed=1000, checkpoints=30, budget="1MiB", memory_limit=1 / 4),
}

QUICK: dict[str, Callable[[], Descent]] = {
    "mlp": lambda: mlp(200, (20, 16, 5), 50, steps=40, timed=20, checkpoints=3, budget="240KiB", memory_limit=1.0),
    "logistic": lambda: logistic(100, 30, steps=40, timed=20, checkpoints=3, budget="80KiB", memory_limit=1.0),
}


def truth(descent: Descent) -> Tensor:
    """The hypergradient in float64 by torch.func from stored iterates, as a flat vector."""
    descent = descent.to(torch.float64)
    hparams, iterates = [h.detach() for h in descent.hparams], [descent.start]

    def step(params: Tensors, hparams: Tensors, t: int) -> Tensors:
        slopes = grad(lambda w: descent.inner(w, hparams, descent.batch(t)))(params)
        return [w - descent.lr * g for w, g in zip(params, slopes, strict=True)]

    for t in range(descent.timed):
        iterates.append(step(iterates[-1], hparams, t))
    alpha, total = grad(descent.outer_loss, (0, 1))(iterates[-1], hparams)
    for t in reversed(range(descent.timed)):
        alpha, cross = vjp(lambda w, h, t=t: step(w, h, t), iterates[t], hparams)[1](alpha)
        total = [a + b for a, b in zip(total, cross, strict=True)]
    return flat(total)


def plain_graph(descent: Descent, steps: int) -> Tensors:
    params = [w.detach().requires_grad_() for w in descent.start]
    for t in range(steps):
        params = descent.step(params, descent.hparams, t)
    return list(torch.autograd.grad(descent.outer_loss(params, descent.hparams), descent.hparams))


def hypertorch(descent: Descent, steps: int) -> Tensors:
    """HyperTorch's reverse, written again: it stores all iterates and takes two reverse passes per step."""
    history = [descent.start]
    for t in range(steps):
        leaves = [w.detach().requires_grad_() for w in history[-1]]
        history.append([w.detach() for w in descent.step(leaves, descent.hparams, t, live=False)])
    last = [w.detach().requires_grad_() for w in history[-1]]
    loss = descent.outer_loss(last, descent.hparams)
    alpha = list(torch.autograd.grad(loss, last, retain_graph=True))
    direct = torch.autograd.grad(loss, descent.hparams, allow_unused=True)
    grads = [torch.zeros_like(h) if d is None else d for h, d in zip(descent.hparams, direct, strict=True)]
    for t in reversed(range(steps)):
        leaves = [w.detach().requires_grad_() for w in history[t]]
        mapped = descent.step(leaves, descent.hparams, t)
        cross = torch.autograd.grad(mapped, descent.hparams, alpha, retain_graph=True)
        grads = [a + b for a, b in zip(grads, cross, strict=True)]
        alpha = list(torch.autograd.grad(mapped, leaves, alpha))
    return grads


def library(storage: Callable[[Descent], Any]) -> Callable[[Descent, int], Tensors]:
    def run(descent: Descent, steps: int) -> Tensors:
        kept = storage(descent)
        policy: Any = {"checkpoints": kept} if isinstance(kept, int) else {"memory": kept}
        result = hg.unroll.reverse(
            descent.step,
            descent.start,
            descent.hparams,
            descent.outer_loss,
            steps,
            **policy,
            with_time=True,
        )
        return result.grads

    return run


@dataclass(frozen=True)
class Column:
    """One way to store the steps.

    `evaluations(T, checkpoints)` is the largest number of evaluations of the step (None for other libraries).
    `linear`: its memory is linear in T.
    """

    name: str
    run: Callable[[Descent, int], Tensors]
    library: str = "hypergrad"
    evaluations: Callable[[int, int], int] | None = None
    linear: bool = False

    def title(self, descent: Descent) -> str:
        """The name with the row's own number of checkpoints and budget."""
        name = self.name.replace("=checkpoints", f"={descent.checkpoints}")
        return name.replace("=budget", f'="{descent.budget}"')


def revolve(steps: int, checkpoints: int) -> int:
    """The least number of evaluations (Griewank and Walther 2000), including one per step in the reverse pass."""
    r = 1
    while comb(checkpoints + r, r) < steps:
        r += 1
    return steps + r * steps - comb(checkpoints + r, r - 1)


COLUMNS = [
    Column(GRAPH, plain_graph, "floor", lambda t, c: t, linear=True),
    Column(HYPERTORCH, hypertorch, "HyperTorch", lambda t, c: 2 * t),
    Column('hg memory="graph"', library(lambda d: "graph"), "hypergrad", lambda t, c: t, linear=True),
    Column('hg memory="iterates"', library(lambda d: "iterates"), "hypergrad", lambda t, c: 2 * t - 1),
    Column('hg memory="sqrt"', library(lambda d: "sqrt"), "hypergrad", lambda t, c: 2 * t - 1),
    Column("hg checkpoints=checkpoints", library(lambda d: d.checkpoints), "hypergrad", revolve),
    Column("hg memory=budget", library(lambda d: d.budget), "hypergrad", lambda t, c: 2 * t),
]
if peers.installed("torchopt"):
    COLUMNS.append(Column("TorchOpt MetaSGD", peers.torchopt_unrolled, "TorchOpt", linear=True))
if peers.installed("higher"):
    COLUMNS.append(Column("higher", peers.higher_unrolled, "higher", linear=True))


@dataclass(frozen=True)
class Result:
    row: str
    method: str
    library: str
    error: float
    evaluations: int  # of the step, over the timed steps
    steps: int
    timed: int
    peak: float | None = None  # peak memory in bytes for T steps, beyond the data
    memory: float | None = None  # peak memory over that of HyperTorch
    cpu: Spread | None = None
    wall: Spread | None = None
    hypertorch_cpu: Spread | None = None
    graph_cpu: Spread | None = None
    memory_limit: float | None = None
    time_limits: tuple[float, float] | None = None  # over HyperTorch's time, over that of the plain graph


def measure(rows: Sequence[str], words: Sequence[str] | None, rounds: int | None) -> tuple[list[Result], list[dict]]:
    results, settings = [], []
    wanted = [c for c in COLUMNS if not words or any(w in c.name for w in (*words, GRAPH, HYPERTORCH))]
    for row in tqdm(rows, desc="rows"):
        descent, turns = ROWS[row](), rounds or 5
        exact, descent = truth(descent), descent.to(torch.float32)
        results += measure_row(descent, wanted, exact, turns)
        size = sum(w.numel() for w in descent.start)
        settings.append({"row": row, "parameters": size, "steps": descent.steps, "timed": descent.timed})
        settings[-1] |= {"checkpoints": descent.checkpoints, "budget": descent.budget, "rounds": turns}
        settings[-1] |= {"dtype": "torch.float32", "seed": 0, "threads": 1}
    return results, settings


def measure_row(descent: Descent, columns: Sequence[Column], exact: Tensor, rounds: int) -> list[Result]:
    found = [check(descent, c, exact) for c in tqdm(columns, desc=f"{descent.name}: answers, memory", leave=False)]
    right = [c for c, r in zip(columns, found, strict=True) if r.error <= TOLERANCE]
    calls = {c.title(descent): partial(c.run, descent, descent.timed) for c in right}
    with tqdm(total=len(calls) * (rounds + 1), desc=f"{descent.name}: clock", leave=False) as bar:
        times = interleaved(calls, rounds, step=bar.update)
    peaks = {r.method: r.peak for r in found}

    def timed(result: Result) -> Result:
        own = times.get(result.method)
        if own is None:
            return result
        peak, most = peaks[result.method], peaks.get(HYPERTORCH)
        result = replace(result, cpu=Spread.of(own.cpu), wall=Spread.of(own.wall))
        if HYPERTORCH in times:
            result = replace(result, hypertorch_cpu=ratios(own, times[HYPERTORCH])[0])
            result = replace(result, memory=peak / most if peak and most else None)
        if GRAPH in times:
            result = replace(result, graph_cpu=ratios(own, times[GRAPH])[0])
        if "sqrt" in result.method:
            result = replace(result, memory_limit=descent.memory_limit, time_limits=(1.1, 1.6))
        return result

    return [timed(result) for result in found]


def check(descent: Descent, column: Column, exact: Tensor) -> Result:
    """The error of the result, the number of evaluations of the step, and the peak memory for T steps."""
    counts: Counter[str] = Counter()
    watched = replace(descent, inner=counting(descent.inner, counts, "inner"))
    error = float((flat(column.run(watched, descent.timed)).double() - exact).norm() / exact.norm())
    name = column.title(descent)
    result = Result(descent.name, name, column.library, error, counts["inner"], descent.steps, descent.timed)
    return replace(result, peak=peak_at(descent, column)) if error <= TOLERANCE else result


def peak_at(descent: Descent, column: Column) -> float:
    """Peak bytes for T steps. If the memory is linear in T, it is extrapolated from two shorter runs, which fit."""
    if not column.linear:
        return peak_memory(lambda: column.run(descent, descent.steps))
    few = descent.timed // 2
    low, high = (peak_memory(lambda n=n: column.run(descent, n)) for n in (few, 2 * few))
    return high + (high - low) / few * (descent.steps - 2 * few)


def table(results: list[Result]) -> str:
    lines = [
        f"{'':26}{'evaluations':>12}{'MiB':>10}{'× HyperTorch':>14}{'limit':>8}"
        f"{'CPU s':>9}{'× HyperTorch':>14}{'limit':>7}{'× graph':>9}{'limit':>7}{'error':>9}"
    ]
    row = None
    for r in results:
        if r.row != row:
            row = r.row
            lines.append(f"{row}: memory of {r.steps} steps, time and evaluations of {r.timed}")
        if r.cpu is None:
            lines.append(f"  {r.method:24}{r.evaluations:12}   wrong by {r.error:.1e}: no time")
            continue
        limits = r.time_limits or (None, None)
        lines.append(
            f"  {r.method:24}{r.evaluations:12}{cell(r.peak, '.2f', MIB):>10}{cell(r.memory, '.3f'):>14}"
            f"{cell(r.memory_limit, '.2f'):>8}{cell(r.cpu, '.3f'):>9}{cell(r.hypertorch_cpu, '.3f'):>14}"
            f"{cell(limits[0], '.1f'):>7}{cell(r.graph_cpu, '.3f'):>9}{cell(limits[1], '.1f'):>7}{r.error:>9.0e}"
        )
    lines.append(
        'MiB: peak beside the data; of methods that keep every graph (plain, memory="graph", TorchOpt, higher), '
        "extrapolated\nin T from two shorter runs. error: in float32, against float64."
    )
    return "\n".join(lines)


SHOWN = (HYPERTORCH, 'hg memory="graph"', 'hg memory="sqrt"', "TorchOpt MetaSGD", "higher")  # in the picture


def draw(results: list[Result], path: Path) -> None:
    """Two panels per row, with the memory and the time of each method; red ticks are the limits of memory="sqrt"."""
    panels = []
    for row in dict.fromkeys(r.row for r in results):
        cells = [r for r in results if r.row == row and r.cpu]
        base = next((c for c in cells if c.method == HYPERTORCH), None)
        memory, clock = [], []
        for r in [r for r in cells if r.method in SHOWN] or cells:
            own, limits = r.library == "hypergrad", (None, None)
            if base and base.peak and base.cpu and r.memory_limit and r.time_limits:
                limits = (base.peak * MIB * r.memory_limit, base.cpu.middle * r.time_limits[0])
            mib, seconds = (r.peak or 0.0) * MIB, r.cpu.middle if r.cpu else 0.0
            memory.append(Bar(r.method, mib, f"{mib:,.0f} MiB" if mib >= 100 else f"{mib:.3g} MiB", own, limits[0]))
            clock.append(Bar(r.method, seconds, f"{seconds:.3g} s", own, limits[1]))
        panels += [
            Panel(f"{row}: peak memory of {cells[0].steps} steps", memory, log=True),
            Panel(f"{row}: CPU time of {cells[0].timed} steps", clock),
        ]
    draw_panels(path, "Through the steps of gradient descent (red: limits of sqrt)", panels)


ABOUT = """Time and peak memory of the gradient through T steps of gradient descent, for each way to store the
iterates, compared with HyperTorch's reverse mode and with the plain graph. `limit` is the ratio that must not be
exceeded."""
SECTION = Section("Through the steps", lambda: ROWS, measure, table, draw, ABOUT)
