"""Growth of the cost with parameters, hyperparameters, steps of the solver, steps of the optimiser, and tasks.

The cost of the adjoint is a difference between two calls in the same round, of which one takes more steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import sqrt
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import hypergrad as hg

from . import problems, small_rows, unrolled
from .measure import Times, interleaved, peak_memory
from .methods import floor, implicit
from .pictures import BLUE, GREY, RED, column
from .problems import Problem
from .report import Section

Calls = dict[tuple[str, int], Callable[[], Any]]


@dataclass(frozen=True)
class Result:
    """One curve: `values` (CPU seconds, or bytes) at `sizes`, and the exponent fitted to the sizes from `start` on."""

    row: str
    method: str
    unit: str
    sizes: list[int]
    values: list[float]
    start: int
    exponent: float
    expected: tuple[float, float] | None


def curve(
    row: str,
    method: str,
    values: dict[int, float],
    expected: tuple[float, float] | None = None,
    unit: str = "s",
    start: int = 0,
) -> Result:
    """Fit log value against log size by least squares."""
    fitted = {n: v for n, v in values.items() if n >= start and v > 0}
    logs = [np.log(list(each)) for each in (fitted.keys(), fitted.values())]
    exponent = float(np.polyfit(logs[0], logs[1], 1)[0]) if len(fitted) > 1 else float("nan")
    return Result(row, method, unit, list(values), list(values.values()), max(start, min(values)), exponent, expected)


def clock(row: str, calls: Calls, rounds: int, warm_up: int = 1) -> dict[tuple[str, int], Times]:
    with tqdm(total=len(calls) * (rounds + warm_up), desc=f"{row}: clock", leave=False) as bar:
        return interleaved(calls, rounds, step=bar.update, warm_up=warm_up)


def seconds(times: dict[tuple[str, int], Times], name: str) -> dict[int, float]:
    return {n: median(each.cpu) for (method, n), each in times.items() if method == name}


def growth(times: dict[tuple[str, int], Times], name: str, base: str) -> dict[int, float]:
    """Median over rounds of the difference between two calls, for each size."""
    sizes = [n for method, n in times if method == name]
    return {n: median(np.subtract(times[name, n].cpu, times[base, n].cpu)) for n in sizes}


def cg(problem: Problem, steps: int) -> list[Tensor]:
    return implicit(problem, hg.solvers.CG(max_steps=steps, on_failure="ignore"))


def parameters(rounds: int) -> list[Result]:
    """A perceptron (w, w, 10), 500 rows, K = 5. Below 10⁶ parameters the overhead and activations (∝ √n) are large."""
    calls: Calls = {}
    for size in (10**3, 10**4, 10**5, 10**6, 3 * 10**6, 10**7):
        width = round(sqrt(size + 30)) - 5
        made = problems.biased_mlp("scaling", 500, (width, width, 10), rho=0.2, step_size=1.0, steps=5)
        problem = made.to(torch.float32)
        calls["implicit.grad, CG", problem.size] = partial(cg, problem, 5)
        calls["floor", problem.size] = partial(floor, problem, fixed_point=False)
    times = clock("parameters", calls, rounds)
    ours, least = seconds(times, "implicit.grad, CG"), seconds(times, "floor")
    ratio = {n: ours[n] / least[n] for n in ours}
    return [
        curve("parameters", "implicit.grad, CG", ours, (0.9, 1.1), start=9 * 10**5),
        curve("parameters", "floor", least, start=9 * 10**5),
        curve("parameters", "over the floor", ratio, unit="×", start=9 * 10**5),
    ]


def data_inner(params: Sequence[Tensor], hparams: Sequence[Tensor], data: dict[str, Tensor]) -> Tensor:
    """Ridge regression; the first m entries of X are hyperparameters."""
    (w,), (entries,) = params, hparams
    x = torch.cat([entries, data["rest"]]).view(-1, len(w))
    return 0.5 * (x @ w - data["y"]).square().mean() + 0.05 * w.square().sum()


def data_outer(params: Sequence[Tensor], hparams: Sequence[Tensor], data: dict[str, Tensor]) -> Tensor:
    return 0.5 * (data["xv"] @ params[0] - data["yv"]).square().mean()


def hyperparameters(rounds: int) -> list[Result]:
    """1,000 parameters; 1 to 10⁶ entries of the data are hyperparameters. Cost of the adjoint: 20 more steps of CG."""
    draw, n = np.random.RandomState(0), 1000
    x, w = draw.randn(n, n) / sqrt(n), draw.randn(n)
    xv, yv = draw.randn(200, n) / sqrt(n), draw.randn(200)
    y = x @ w + np.linalg.solve(x.T, 0.1 * n * w)  # makes w the exact solution
    flat = torch.from_numpy(x.reshape(-1))
    data = {"y": torch.from_numpy(y), "xv": torch.from_numpy(xv), "yv": torch.from_numpy(yv)}
    calls: Calls = {}
    for m in (1, 10, 100, 1000, 10**4, 10**5, 10**6):
        given = [torch.from_numpy(w)], [flat[:m]], data | {"rest": flat[m:]}
        problem = Problem("scaling", *given, data_inner, data_outer, 1.0).to(torch.float32)
        calls["20 steps", m], calls["40 steps", m] = partial(cg, problem, 20), partial(cg, problem, 40)
    times = clock("hyperparameters", calls, rounds)
    part = growth(times, "40 steps", "20 steps")
    return [
        curve("hyperparameters", "adjoint part, 20 steps", part, (-0.05, 0.05)),
        curve("hyperparameters", "whole, K = 20", seconds(times, "20 steps")),
    ]


def solver_steps(rounds: int) -> list[Result]:
    """Logistic regression, n = 2,000, d = 500, K from 10 to 640. Cost of the adjoint: the difference from K = 0."""
    problem = problems.logistic("scaling", 2000, 500, -4.0, 7.0, 0.0).to(torch.float32)
    calls: Calls = {}
    for k in (10, 40, 160, 640):
        calls["K", k], calls["0", k] = partial(cg, problem, k), partial(cg, problem, 0)
    times = clock("steps", calls, rounds)
    return [
        curve("solver's steps", "adjoint part", growth(times, "K", "0"), (0.9, 1.1)),
        curve("solver's steps", "whole", seconds(times, "K")),
    ]


def optimiser_steps(rounds: int) -> list[Result]:
    """unroll.reverse through T = 50 to 3,200 steps of logistic regression with n = 500 and d = 200."""
    options = {"timed": 1, "checkpoints": 1, "budget": "1MiB", "memory_limit": 1.0}
    descent = unrolled.logistic(500, 200, steps=1, **options).to(torch.float32)
    calls: Calls = {}
    memory: dict[int, float] = {}
    run = unrolled.library(lambda _: "sqrt")
    for steps in (50, 200, 800, 3200):
        calls["sqrt", steps] = partial(run, descent, steps)
        memory[steps] = float(peak_memory(calls["sqrt", steps]))
    times = clock("optimiser's steps", calls, rounds)
    return [
        curve("optimiser's steps", 'time, memory="sqrt"', seconds(times, "sqrt"), (0.9, 1.1)),
        curve("optimiser's steps", 'peak memory, memory="sqrt"', memory, (0.0, 0.6), unit="B"),
    ]


def task_inner(params: Any, hparams: Any, data: dict[str, Tensor]) -> Tensor:
    """The sum over tasks of softmax regression with a penalty on the distance from a common start."""
    logits = torch.einsum("bnd,bdc->bnc", data["x"], params)
    fit = F.cross_entropy(logits.flatten(0, 1), data["y"].flatten(), reduction="sum") / data["x"].shape[1]
    return fit + 0.5 * (params - hparams).square().sum()


def task_outer(params: Any, hparams: Any, data: dict[str, Tensor]) -> Tensor:
    logits = torch.einsum("bnd,bdc->bnc", data["xv"], params)
    return F.cross_entropy(logits.flatten(0, 1), data["yv"].flatten())


def task_call(tasks: int) -> Callable[[], Any]:
    draw = torch.Generator().manual_seed(0)
    data = {k: torch.randn(tasks, 25, 16, generator=draw) for k in ("x", "xv")}
    data |= {k: torch.randint(5, (tasks, 25), generator=draw) for k in ("y", "yv")}
    start = torch.zeros(16, 5, requires_grad=True)
    params = 0.1 * torch.randn(tasks, 16, 5, generator=draw)

    def call() -> Any:
        return hg.implicit.grad(
            lambda w, h: task_outer(w, h, data),
            inner_loss=lambda w, h: task_inner(w, h, data),
            params=params,
            hparams=start,
            solver=hg.solvers.CG(max_steps=10, on_failure="ignore"),
            batch_dims=1,
        )

    return call


def tasks(rounds: int) -> list[Result]:
    """1 to 10⁴ independent systems of 80 parameters, solved at once."""
    calls: Calls = {("batched", n): task_call(n) for n in (1, 10, 100, 1000, 10_000)}
    times = clock("tasks", calls, rounds)
    values = seconds(times, "batched")
    each = {n: value / n for n, value in values.items()}
    return [
        curve("tasks", "all at once", values, (0.0, 1.1)),
        curve("tasks", "a task", each),
    ]


def small_problems(rounds: int) -> list[Result]:
    """The Jacobians of 10 to 10⁵ roots of 5 unknowns, by vmap(jacrev(root)) with the default solver."""
    calls: Calls = {("at once", n): small_rows.roots(5, n).columns[1].run for n in (10, 100, 1000, 10_000, 100_000)}
    times = clock("small problems", calls, rounds)
    return [curve("small problems", "at once", seconds(times, "at once"), (0.8, 1.1), start=10_000)]


def leaves(rounds: int) -> list[Result]:
    """A hypergradient of 10,000 parameters in 1 to 1,000 leaves, K = 10."""
    calls: Calls = {}
    for count in (1, 10, 100, 1000):
        params = list(torch.linspace(0.1, 1.0, 10_000).split(10_000 // count))
        decay = torch.tensor(0.0, requires_grad=True)

        def inner(w: Any, h: Any) -> Tensor:
            return h.exp() * torch.stack([(x**2).sum() + (x**4).sum() for x in w]).sum()

        calls["implicit.grad, CG", count] = partial(
            hg.implicit.grad,
            lambda w, h: torch.stack([x.sum() for x in w]).sum(),
            inner_loss=inner,
            params=params,
            hparams=decay,
            solver=hg.solvers.CG(max_steps=10, on_failure="ignore"),
        )
    values = seconds(clock("leaves", calls, rounds), "implicit.grad, CG")
    return [curve("leaves", "implicit.grad, CG", values, (0.0, 1.1), start=10)]


ROWS: dict[str, tuple[Callable[[int], list[Result]], int]] = {
    "parameters": (parameters, 3),
    "hyperparameters": (hyperparameters, 15),
    "solver's steps": (solver_steps, 7),
    "optimiser's steps": (optimiser_steps, 3),
    "tasks": (tasks, 7),
    "small problems": (small_problems, 5),
    "leaves": (leaves, 7),
}


def measure(rows: Sequence[str], words: Sequence[str] | None, rounds: int | None) -> tuple[list[Result], list[dict]]:
    results, settings = [], []
    for row in tqdm(rows, desc="rows"):
        function, own = ROWS[row]
        results += function(rounds or own)
        settings.append({"row": row, "problem": function.__doc__, "rounds": rounds or own, "threads": 1})
    return [r for r in results if not words or any(word in r.method for word in words)], settings


def table(results: list[Result]) -> str:
    lines = [f"{'':32}{'exponent':>10}{'expected':>16}{'fit from':>10}{'smallest':>22}{'largest':>22}"]
    row = None
    for r in results:
        if r.row != row:
            row = r.row
            lines.append(f"{row}: {ROWS[row][0].__doc__}")
        due = f"[{r.expected[0]:g}, {r.expected[1]:g}]" if r.expected else "–"
        ends = [f"{r.sizes[i]:.0e}: {r.values[i]:.3g} {r.unit}" for i in (0, -1)]
        lines.append(f"  {r.method:30}{r.exponent:10.3f}{due:>16}{r.start:10.0e}{ends[0]:>22}{ends[1]:>22}")
    return "\n".join(lines)


def draw(results: list[Result], path: Path) -> None:
    rows = list(dict.fromkeys(r.row for r in results))
    with column(path, "How the cost grows", [3.0] * len(rows)) as axes:
        for axis, row in zip(axes, rows, strict=True):
            for place, r in enumerate(r for r in results if r.row == row and r.unit != "×"):
                met = r.expected is None or r.expected[0] <= r.exponent <= r.expected[1]
                colour = (BLUE if place == 0 else GREY) if met else RED
                values = np.array(r.values) / (1 if r.unit == "s" else 2**20)
                label = f"{r.method}{'' if r.unit == 's' else ' (MiB)'}: exponent {r.exponent:.2f}"
                if r.expected:
                    label += f" (expected {r.expected[0]:g} … {r.expected[1]:g})"
                axis.plot(r.sizes, values, "o-", color=colour, label=label, linewidth=1.5, markersize=5)
            axis.set(xscale="log", yscale="log", ylabel="CPU seconds", xlabel=row)
            low, high = axis.get_ylim()
            axis.set_ylim(low / 3, high * 8)
            axis.legend(fontsize=8, loc="upper left", frameon=False)
            axis.spines[["top", "right"]].set_visible(False)


ABOUT = """The exponent p of a fit cost ∝ size^p, as parameters, hyperparameters, steps of the solver, steps of the
optimiser and tasks grow. `expected` is the interval that theory gives, where it gives one; the last columns are the
smallest and the largest size with their costs. The cost of the adjoint is a difference between two calls."""
SECTION = Section("How the cost grows", lambda: ROWS, measure, table, draw, ABOUT)
