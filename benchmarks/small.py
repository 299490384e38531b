"""Many small problems, small calls, equilibria, meta-learning and outer loops, compared with torch code by hand.

Each column is first checked in float64 against an oracle that shares no code with it (NumPy, or a dense solve), with a
tight tolerance if it has one. CPU time and the peak memory of torch's allocator are divided by those of the floor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .measure import Spread, interleaved, peak_memory, ratios
from .pictures import Bar, Panel
from .pictures import draw as draw_panels
from .report import MIB, Section, cell

CORRECT = 1e-10


@dataclass(frozen=True)
class Column:
    """One way to do a row's work.

    `run` is timed. If it stops at a loose tolerance, `exact` is the same with a tight one, which is checked. `floor`
    names the column that its time is divided by, whose `library` begins with "floor". `target` and `memory` are the
    largest ratios of time and of memory that we accept. `measured`: torch allocates its memory.
    """

    name: str
    run: Callable[[], Any]
    floor: str
    library: str = "hypergrad"
    target: float | None = None
    memory: float | None = None
    exact: Callable[[], Any] | None = None
    correct: float = CORRECT

    @property
    def measured(self) -> bool:
        return self.library not in ("JAXopt", "JAX", "optimistix")


@dataclass(frozen=True)
class Row:
    """Columns with the same result, `truth` (a tensor or several). One sample of the clock takes `repeat` calls."""

    name: str
    columns: Sequence[Column]
    truth: Any
    repeat: int = 1
    rounds: int = 15


@dataclass(frozen=True)
class Result:
    row: str
    method: str
    library: str
    error: float | None
    correct: bool
    cpu: Spread | None = None
    ratio: Spread | None = None
    peak: int | None = None
    memory: float | None = None
    target: float | None = None
    memory_target: float | None = None
    failure: str | None = None


def flat(value: Any) -> Tensor:
    """A tensor, an array, or several of them, as one vector."""
    parts = value if isinstance(value, (tuple, list)) else [value]
    return torch.cat([torch.as_tensor(part).detach().reshape(-1).double() for part in parts])


def error_of(value: Any, truth: Any) -> float:
    a, b = flat(value), flat(truth)
    return float((a - b).norm() / b.norm())


def check(row: Row, column: Column) -> Result:
    """Check the result of a column. An error that another library raises is recorded as its result."""
    try:
        error = error_of((column.exact or column.run)(), row.truth)
    except Exception as failure:
        if column.library in ("hypergrad", "floor"):
            raise
        text = f"{type(failure).__name__}: {' '.join(str(failure).split())[:90]}"
        return Result(row.name, column.name, column.library, None, False, failure=text)
    return Result(row.name, column.name, column.library, error, error <= column.correct)


def measure_row(row: Row, words: Sequence[str] | None, rounds: int | None) -> list[Result]:
    """Check all columns of a row, then time those with the right result."""
    columns = [c for c in row.columns if not words or "floor" in c.library or any(word in c.name for word in words)]
    checked = {c.name: check(row, c) for c in columns}
    right = [c for c in columns if checked[c.name].correct]
    turns = rounds or row.rounds
    with tqdm(total=len(right) * (turns + 1), desc=f"{row.name}: clock", leave=False) as bar:
        times = interleaved({c.name: c.run for c in right}, turns, row.repeat, bar.update)
    peaks = {c.name: peak_memory(c.run) for c in right if c.measured}
    results = []
    for c in columns:
        result = checked[c.name]
        if c.name in times and c.floor in times:
            ratio, _ = ratios(times[c.name], times[c.floor])
            peak, base = peaks.get(c.name), peaks.get(c.floor)
            memory = peak / base if peak and base else None
            found = {"cpu": Spread.of(times[c.name].cpu), "ratio": ratio, "peak": peak, "memory": memory}
            result = replace(result, **found, target=c.target, memory_target=c.memory)
        results.append(result)
    return results


def measure(names: Sequence[str], words: Sequence[str] | None, rounds: int | None) -> tuple[list[Result], list[dict]]:
    from .small_rows import ROWS

    results, settings = [], []
    for name in tqdm(names, desc="rows"):
        row = ROWS[name]()
        results += measure_row(row, words, rounds)
        work = getattr(ROWS[name], "func", ROWS[name]).__doc__
        turns = rounds or row.rounds
        settings.append({"row": name, "work": work, "rounds": turns, "calls": row.repeat, "threads": 1})
    return results, settings


def table(results: Sequence[Result]) -> str:
    lines = [f"{'':46}{'ms':>10}  {'× floor, CPU':22}{'target':>8}{'MiB':>8}{'× floor':>9}{'target':>8}{'error':>8}"]
    row = None
    for r in results:
        if r.row != row:
            row = r.row
            lines.append(row)
        if r.cpu is None or r.ratio is None:
            lines.append(f"  {r.method:44}   {r.failure or f'wrong by {r.error:.1e}: no time'}")
            continue
        quartiles = f"{r.ratio.middle:.2f} [{r.ratio.low:.2f}, {r.ratio.high:.2f}]"
        lines.append(
            f"  {r.method:44}{1e3 * r.cpu.middle:10.3f}  {quartiles:22}{cell(r.target, '.2f'):>8}"
            f"{cell(r.peak, '.2f', MIB):>8}{cell(r.memory, '.2f'):>9}{cell(r.memory_target, '.2f'):>8}"
            f"{cell(r.error, '.0e'):>8}"
        )
    return "\n".join(lines)


NOT_OTHERS = ("hypergrad", "floor", "floor (loop)")
KINDS = {
    "hg.": "Small calls, over HyperTorch's",
    "dense": "Whole loops and single calls",
    "equilibrium": "Equilibrium layers",
    "MAML": "MAML",
    "outer steps": "Whole loops and single calls",
    "bags": "Whole loops and single calls",
    "": "Many small problems at once",
}  # title of a panel by a part of the row's name


def draw(results: Sequence[Result], path: Path) -> None:
    """One bar per problem: time of hypergrad's default over code by hand, labelled with those of other libraries."""
    kinds: dict[str, list[Bar]] = {}
    for row in dict.fromkeys(r.row for r in results):
        cells = [r for r in results if r.row == row and r.ratio]
        own = next(r for r in cells if r.library == "hypergrad")
        others = [f"{r.library} {r.ratio.middle:.2f}" for r in cells if r.library not in NOT_OTHERS and r.ratio]
        text = "; ".join([f"{own.ratio.middle:.2f}" if own.ratio else "", *others])
        kind = next(name for sign, name in KINDS.items() if sign in row)
        kinds.setdefault(kind, []).append(Bar(row, own.ratio, text, target=own.target))
    panels = [Panel(kind, chosen, log=True, line=1) for kind, chosen in kinds.items()]
    draw_panels(path, "CPU time over code written by hand (red: target)", panels)


def rows() -> list[str]:
    from .small_rows import ROWS

    return list(ROWS)


ABOUT = """Many small problems, small calls, equilibria, meta-learning and outer loops, compared with code written by
hand in torch (the floor) and with other libraries. CPU time and the peak of torch's allocator are divided by those of
the floor, and `target` is the ratio that we aim at. Each method is first compared with an independent result:
`error`."""
SECTION = Section("Small problems and small calls", rows, measure, table, draw, ABOUT)
