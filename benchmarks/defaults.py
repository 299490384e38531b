"""What the checks that are on by default add to implicit.grad: the same solver, silent and as it comes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

import hypergrad as hg
from hypergrad._solution import OnFailure

from . import problems
from .measure import Spread, interleaved, ratios
from .methods import hypergradient
from .problems import Problem
from .report import BLUE, RED, Section, bars

LIMIT = 1.02
ROUNDS = {"mlp": 10, "logistic": 40, "equilibrium": 20, "tiny": 60}


@dataclass(frozen=True)
class Result:
    row: str
    method: str
    silent: Spread  # CPU seconds with on_failure="ignore"
    checked: Spread  # as it comes
    ratio: Spread
    limit: float = LIMIT


def call(problem: Problem, on_failure: OnFailure) -> None:
    kind = hg.solvers.CG if problem.step_size is not None else hg.solvers.GMRES
    hypergradient(problem, kind(max_steps=problem.steps, on_failure=on_failure))


def measure(rows: Sequence[str], words: Sequence[str] | None, rounds: int | None) -> tuple[list[Result], list[dict]]:
    results, settings = [], []
    for row in tqdm(rows, desc="rows"):
        problem, turns = problems.rows()[row](), rounds or ROUNDS[row]
        calls = {on_failure: partial(call, problem, on_failure) for on_failure in ("ignore", "warn")}
        with tqdm(total=2 * (turns + 1), desc=f"{row}: clock", leave=False) as bar:
            times = interleaved(calls, turns, 20 if problem.small else 1, bar.update)
        silent, checked = times["ignore"], times["warn"]
        name = "CG" if problem.step_size is not None else "GMRES"
        spreads = Spread.of(silent.cpu), Spread.of(checked.cpu), ratios(checked, silent)[0]
        results.append(Result(row, f"implicit.grad, {name}", *spreads))
        settings.append({"row": row, "parameters": problem.size, "steps": problem.steps, "rounds": turns, "threads": 1})
    return results, settings


def table(results: list[Result]) -> str:
    lines = [f"{'':34}{'silent, ms':>12}{'checked, ms':>13}  {'ratio':24}{'limit':>6}"]
    for r in results:
        ratio = f"{r.ratio.middle:.3f} [{r.ratio.low:.3f}, {r.ratio.high:.3f}]"
        lines.append(
            f"  {f'{r.row}: {r.method}':32}{1e3 * r.silent.middle:12.2f}{1e3 * r.checked.middle:13.2f}  "
            f"{ratio:24}{r.limit:6.2f}"
        )
    return "\n".join(lines)


def draw(results: list[Result], path: Path) -> None:
    with bars(path, [None], "What the default checks add to implicit.grad", height=2.6) as (axis,):
        for place, r in enumerate(results):
            added = [100 * (x - 1) for x in (r.ratio.low, r.ratio.middle, r.ratio.high)]
            width = [[added[1] - added[0]], [added[2] - added[1]]]
            axis.errorbar(added[1], place, xerr=width, fmt="o", color=BLUE, capsize=3)
        axis.axvline(100 * (LIMIT - 1), color=RED)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(results)), [f"{r.row}: {r.method}" for r in results], fontsize=8)
        axis.set(xlabel="% of CPU time (median, quartiles; red: limit)")
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)


SECTION = Section("The default checks", lambda: ROUNDS, measure, table, draw)
