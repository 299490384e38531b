"""The hypergradients of several outer losses on one inner problem: all at once compared with one after the other.

The problems are the ill-conditioned ones at their first λ, with 8 outer losses. Each method runs with the loosest
tolerance for which the relative error of every hypergradient is below 1e-6.

To add a method, write a function of the problem, the outer losses and the tolerance, and add a line to `METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import hypergrad as hg

from . import illconditioned
from .accuracy import MOST, TOLERANCES, cg, hypertorch_cg
from .illconditioned import problem_at
from .measure import Spread, counted, interleaved, ratios
from .methods import hypergradient
from .pictures import Bar, Panel
from .pictures import draw as draw_panels
from .problems import Problem
from .report import Section

LOSSES, TARGET, ROUNDS = 8, 1e-6, 5
Losses = Sequence[Callable[..., Tensor]]


def apart(problem: Problem, losses: Losses, rtol: float) -> Tensor:
    return torch.stack([hypergradient(replace(problem, outer=loss), cg(rtol)).grads[0] for loss in losses])


def hypertorch(problem: Problem, losses: Losses, rtol: float) -> Tensor:
    return torch.stack([hypertorch_cg(rtol)(replace(problem, outer=loss))[0] for loss in losses])


def together(problem: Problem, losses: Losses, rtol: float, kind: Any = hg.solvers.BlockCG) -> Tensor:
    return hg.implicit.jacobian(
        lambda params, hparams: torch.stack([loss(params, hparams, problem.data) for loss in losses]),
        inner_loss=problem.inner_loss,
        params=problem.params,
        hparams=problem.hparams,
        solver=kind(rtol=rtol, max_steps=MOST, on_failure="ignore"),
    ).grads[0]


METHODS: dict[str, Callable[[Problem, Losses, float], Tensor]] = {
    "hg.implicit.jacobian, BlockCG": together,
    "hg.implicit.jacobian, CG": partial(together, kind=hg.solvers.CG),
    "hg.implicit.grad, CG, one by one": apart,
    "HyperTorch CG, one by one": hypertorch,
}


@dataclass(frozen=True)
class Result:
    """One method on one row. `ratio` is its CPU time over that of HyperTorch's CG."""

    row: str
    method: str
    losses: int
    setting: float | None  # None: no tolerance reaches the target
    error: float  # the largest relative error over the outer losses
    passes: int
    cpu: Spread | None = None
    ratio: Spread | None = None


def search(
    method: Callable[..., Tensor], problem: Problem, losses: Losses, truth: np.ndarray
) -> tuple[Any, float, int]:
    best = np.inf
    for rtol in TOLERANCES:
        with counted(reads=False) as counts:
            found = method(problem, losses, rtol).numpy()
        error = float((np.linalg.norm(found - truth, axis=1) / np.linalg.norm(truth, axis=1)).max())
        best = min(best, error)
        if error <= TARGET:
            return rtol, error, counts["passes"]
    return None, best, 0


def measure(rows: Sequence[str], words: Sequence[str] | None, rounds: int | None) -> tuple[list[Result], list[dict]]:
    results, settings = [], []
    chosen = {name: method for name, method in METHODS.items() if not words or any(word in name for word in words)}
    for row in tqdm(rows, desc="rows"):
        source = illconditioned.SOURCES[row]()
        w = source.solve(source.start, None)
        results += measure_row(row, source, w, chosen, rounds or ROUNDS)
        settings.append({"row": row, "parameters": len(w), "hyperparameters": len(source.start), "losses": LOSSES})
    return results, settings


def measure_row(
    row: str, source: Any, w: np.ndarray, methods: dict[str, Callable[..., Tensor]], rounds: int
) -> list[Result]:
    losses, exact = illconditioned.group_losses(source, LOSSES)
    problem, truth = problem_at(row, source, source.start, w, step_size=1.0), exact(source.start, w)
    found = [Result(row, name, LOSSES, *search(method, problem, losses, truth)) for name, method in methods.items()]
    calls = {r.method: partial(methods[r.method], problem, losses, r.setting) for r in found if r.setting is not None}
    times, base = interleaved(calls, rounds), "HyperTorch CG, one by one"

    def timed(r: Result) -> Result:
        if r.method not in times:
            return r
        ratio = ratios(times[r.method], times[base])[0] if base in times else None
        return replace(r, cpu=Spread.of(times[r.method].cpu), ratio=ratio)

    return [timed(r) for r in found]


def table(results: list[Result]) -> str:
    lines = [f"{'':36}{'passes':>8}{'CPU s':>9}  {'× HyperTorch':24}{'setting':>9}{'error':>9}"]
    for row in dict.fromkeys(r.row for r in results):
        lines.append(f"{row}, {LOSSES} outer losses, each to {TARGET:.0e}")
        for r in (r for r in results if r.row == row):
            if r.cpu is None:
                lines.append(f"  {r.method:34}   not reached: its best error is {r.error:.1e}, no time")
                continue
            against = r.ratio and f"{r.ratio.middle:.2f} [{r.ratio.low:.2f}, {r.ratio.high:.2f}]"
            times = f"{r.passes:8}{r.cpu.middle:9.3f}  {against or '':24}"
            lines.append(f"  {r.method:34}{times}{r.setting:9.1e}{r.error:9.0e}")
    lines.append("passes: reverse passes in all; k at once, vectorised, count as k. All start from zero.")
    return "\n".join(lines)


def draw(results: list[Result], path: Path) -> None:
    panels = [
        Panel(
            row,
            [
                Bar(r.method, r.cpu, f"{r.cpu.middle:.3f} s, {r.passes} passes", r.method.startswith("hg"))
                for r in results
                if r.row == row and r.cpu
            ],
        )
        for row in dict.fromkeys(r.row for r in results)
    ]
    draw_panels(path, f"{LOSSES} hypergradients on one inner problem,\neach to {TARGET:.0e}: CPU seconds", panels)


def rows() -> list[str]:
    return list(illconditioned.SOURCES)


ABOUT = """The hypergradients of eight outer losses on one inner problem, all at once or one by one. Each method gets
the loosest tolerance with which every hypergradient has a relative error below 1e-6."""
SECTION = Section("Several outer losses", rows, measure, table, draw, ABOUT)
