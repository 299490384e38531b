"""Time to a relative error of the hypergradient, over 50 outer steps on ill-conditioned problems.

Every method gets the same λ_t and the exact inner solutions. A search finds the loosest setting of each method (its
tolerance, or its number of steps if it has none) for which the error of each of the 50 hypergradients is below the
target; then the methods are timed. If a search takes more than `SECONDS`, the method is reported as stopped.

To add a method, write a function from the setting to a function of the outer step's problem, which may keep state
between the steps, and add a line to `COLUMNS`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

import hypergrad as hg

from . import illconditioned, peers
from .illconditioned import Step
from .measure import Spread, counted, interleaved, ratios
from .methods import HyperTorch, hypergradient
from .pictures import Bar, Panel
from .pictures import draw as draw_panels
from .problems import Problem
from .report import Section

TARGETS = (1e-3, 1e-6)  # from loose to tight
PROBE = 4  # outer steps on which the search compares settings before it tries them on all outer steps
ROUNDS = 2
MOST = 5000  # steps that a method with a tolerance may take
SECONDS = 90.0  # CPU time that the search of one setting may take

Run = Callable[[Problem], Sequence[Tensor]]
TOLERANCES = tuple(10 ** (-k / 4) for k in range(0, 53))
STEPS = tuple(sorted({round(4 * 1.12**k) for k in range(60)}))


@dataclass(frozen=True)
class Column:
    """A method: `start(setting)` begins a run over the outer steps; `settings` go from the loosest to the tightest."""

    name: str
    library: str
    start: Callable[[float], Run]
    settings: tuple[float, ...] = TOLERANCES
    passes: Callable[[Sequence[Step], float], int] | None = None  # counts reverse passes where `counted` cannot
    largest: int | None = None  # parameters of the largest problem on which it is run

    @property
    def torch_peer(self) -> bool:
        return self.library not in ("hypergrad", "JAXopt")


def ours(
    solver: Callable[[float], Any], warm: bool = True, compile: bool = False, recycle: int = 0
) -> Callable[[float], Run]:
    """hg.implicit.grad with a solver made from the tolerance.

    warm: each solve starts at the last adjoint. recycle: each solve starts in the span of this many last adjoints.
    """

    def start(setting: float) -> Run:
        configured = solver(setting)
        x0: Any = hg.solvers.Recycled(recycle) if recycle else None

        def run(problem: Problem) -> list[Tensor]:
            nonlocal x0
            result = hypergradient(problem, configured, x0, compile)
            if warm and not recycle:
                x0 = result.adjoint
            return result.grads

        return run

    return start


def cg(setting: float, **options: Any) -> hg.solvers.CG:
    return hg.solvers.CG(rtol=setting, max_steps=MOST, on_failure="ignore", **options)


def minres(setting: float) -> hg.solvers.MINRES:
    return hg.solvers.MINRES(rtol=setting, max_steps=MOST, on_failure="ignore")


def reused(setting: float, recipe: Any) -> hg.solvers.CG:
    """CG with a preconditioner that is kept for the following outer steps as long as that saves time."""
    return cg(setting, preconditioner=hg.solvers.Reused(recipe))


def hypertorch_cg(setting: float) -> Run:
    return lambda problem: HyperTorch(replace(problem, steps=MOST)).cg(rtol=setting)


def passes_of(start: Callable[[float], Run], steps: Sequence[Step], setting: float) -> int:
    """Reverse passes of a run, as counted by `counted`; a pass for k cotangents at once counts as k."""
    run = start(setting)
    with counted(reads=False) as counts:
        for step in steps:
            run(step.problem)
    return counts["passes"]


def compiled(name: str, solver: Callable[[float], Any], recycle: int = 0) -> Column:
    """A column with compiled products, which `counted` does not see: it counts the passes of the same run without."""
    passes = partial(passes_of, ours(solver, recycle=recycle))
    return Column(f"{name}, compiled", "hypergrad", ours(solver, compile=True, recycle=recycle), passes=passes)


NYSTROM = partial(reused, recipe=hg.solvers.Nystrom(rank=80, damping=1e-5))
DENSE = partial(reused, recipe=hg.solvers.Dense())
SMALL = 500  # parameters of the largest problem whose whole matrix is formed
COLUMNS = [
    Column("hg CG, cold", "hypergrad", ours(cg, warm=False)),
    Column("hg CG", "hypergrad", ours(cg)),
    compiled("hg CG", cg),
    Column("hg MINRES", "hypergrad", ours(minres)),
    Column("hg CG, Nystrom(80) reused", "hypergrad", ours(NYSTROM)),
    Column("hg CG, Recycled(4)", "hypergrad", ours(cg, recycle=4)),
    compiled("hg CG, Recycled(4)", cg, recycle=4),
    Column("hg CG, Recycled, Nystrom(80)", "hypergrad", ours(NYSTROM, recycle=4)),
    Column("hg CG, Dense reused", "hypergrad", ours(DENSE), largest=SMALL),
    replace(compiled("hg CG, Dense reused", DENSE), largest=SMALL),
    Column("hg Dense", "hypergrad", ours(lambda _: hg.solvers.Dense(on_failure="ignore")), (0.0,), largest=SMALL),
    Column("HyperTorch CG", "HyperTorch", hypertorch_cg),
]
if peers.installed("torchopt"):
    COLUMNS.append(
        Column(
            "TorchOpt CG",
            "TorchOpt",
            lambda s: partial(peers.torchopt_cg, rtol=s, max_steps=MOST),
            passes=lambda steps, s: sum(peers.torchopt_passes(step.problem, s, MOST) for step in steps),
        )
    )
if peers.installed("betty"):
    COLUMNS.append(Column("Betty CG", "Betty", lambda k: partial(peers.betty_cg, max_steps=int(k)), STEPS))
if peers.installed("jax", "jaxopt"):
    COLUMNS.append(
        Column(
            "JAXopt CG, jit",
            "JAXopt",
            lambda s: partial(peers.jaxopt_cg, tol=s, max_steps=MOST),
            passes=lambda steps, s: sum(peers.jaxopt_passes(step.problem, s, MOST) for step in steps),
        )
    )


@dataclass(frozen=True)
class Result:
    """One method at one target on one row. Seconds and passes are totals over all outer steps."""

    row: str
    method: str
    library: str
    target: float
    outer_steps: int
    setting: float | None  # None: no setting reaches the target
    error: float  # the largest of all outer steps; if no setting reaches the target, the smallest found in the search
    passes: int
    failure: str | None = None
    cpu: Spread | None = None
    wall: Spread | None = None
    peer: str | None = None
    peer_cpu: Spread | None = None


class TooLong(Exception):
    """The search of a setting has taken longer than `SECONDS`."""


def worst(run: Run, steps: Sequence[Step], limit: float, end: float = np.inf) -> float:
    """The largest relative error; stops at the first one above `limit`. Raises TooLong after the CPU time `end`."""
    largest = 0.0
    for step in steps:
        (found,) = run(step.problem)
        error = np.linalg.norm(found.numpy() - step.truth) / np.linalg.norm(step.truth)
        largest = max(largest, float(error) if np.isfinite(error) else np.inf)
        if largest > limit:
            break
        if time.process_time() > end:
            raise TooLong(f"stopped: no setting found in {SECONDS:g} s")
    return largest


def search(
    column: Column, steps: Sequence[Step], target: float, loosest: float | None = None
) -> tuple[float | None, float, int]:
    """The loosest setting with which all steps reach the target, its error, and its reverse passes (k at once count k).

    The search starts at the loose end (or at `loosest`) with growing strides, because the tightest settings cost most:
    rounding lets no method stop there. It then bisects the last stride on the first `PROBE` steps, and finally tries
    one setting after the other on all steps.
    """
    settings, best, end = column.settings, np.inf, time.process_time() + SECONDS
    low = 0 if loosest is None else settings.index(loosest)
    tried, stride = low, 1
    while tried < len(settings):
        error = worst(column.start(settings[tried]), steps[:PROBE], target, end)
        best = min(best, error)
        if error <= target:
            break
        low, tried, stride = tried + 1, tried + stride, 2 * stride
    high = min(tried, len(settings) - 1)
    while low < high:
        middle = (low + high) // 2
        error = worst(column.start(settings[middle]), steps[:PROBE], target, end)
        best = min(best, error)
        low, high = (low, middle) if error <= target else (middle + 1, high)
    for setting in settings[low:]:
        error = worst(column.start(setting), steps, target, end)
        best = min(best, error)
        if error <= target:
            passes = column.passes or partial(passes_of, column.start)
            return setting, error, passes(steps, setting)
    return None, best, 0


def measure(rows: Sequence[str], words: Sequence[str] | None, rounds: int | None) -> tuple[list[Result], list[dict]]:
    results, settings = [], []
    columns = [c for c in COLUMNS if not words or any(word in c.name for word in words)]
    for row in tqdm(rows, desc="rows"):
        steps = list(illconditioned.sequence(row))
        results += measure_row(row, columns, steps, rounds or ROUNDS)
        settings.append(
            {"row": row, "parameters": steps[0].problem.size, "hyperparameters": len(steps[0].truth)}
            | {"outer_steps": len(steps), "rounds": rounds or ROUNDS, "dtype": "torch.float64", "threads": 1}
        )
    return results, settings


def measure_row(row: str, columns: Sequence[Column], steps: Sequence[Step], rounds: int) -> list[Result]:
    found, calls = [], {}
    by_name = {column.name: column for column in columns}
    size = steps[0].problem.size
    columns = [c for c in columns if c.largest is None or size <= c.largest]
    pairs = [(column, target) for column in columns for target in TARGETS]
    loosest: dict[str, float | None] = {}
    for column, target in tqdm(pairs, desc=f"{row}: settings", leave=False):
        missed = next((r for r in found if r.method == column.name and r.setting is None), None)
        if missed is not None:  # a looser target was not reached either
            found.append(replace(missed, target=target))
            continue
        try:
            setting, error, passes = search(column, steps, target, loosest.get(column.name))
            loosest[column.name] = setting
        except (hg.NotCompiled, TooLong) as reason:
            failure = str(reason) if isinstance(reason, TooLong) else f"not compiled: {reason}"
            found.append(Result(row, column.name, column.library, target, len(steps), None, np.nan, 0, failure))
            continue
        if setting is not None:
            calls[column.name, target] = partial(run_all, column, setting, steps)
        found.append(Result(row, column.name, column.library, target, len(steps), setting, error, passes))
    with tqdm(total=len(calls) * rounds, desc=f"{row}: clock", leave=False) as bar:
        times = interleaved(calls, rounds, step=bar.update, warm_up=0)

    def timed(result: Result) -> Result:
        own = times.get((result.method, result.target))
        if own is None:
            return result
        result = replace(result, cpu=Spread.of(own.cpu), wall=Spread.of(own.wall))
        rivals = [key for key in times if key[1] == result.target and by_name[key[0]].torch_peer]
        if result.library != "hypergrad" or not rivals:
            return result
        best = min(rivals, key=lambda key: Spread.of(times[key].cpu).middle)
        return replace(result, peer=best[0], peer_cpu=ratios(own, times[best])[0])

    return [timed(result) for result in found]


def run_all(column: Column, setting: float, steps: Sequence[Step]) -> None:
    run = column.start(setting)
    for step in steps:
        run(step.problem)


def table(results: list[Result]) -> str:
    lines = [
        f"{'':32}{'target':>8}{'passes':>9}{'a step':>8}{'CPU s':>9}  {'× best PyTorch peer':26}"
        f"{'setting':>9}{'error':>9}"
    ]
    row = None
    for r in results:
        if r.row != row:
            row = r.row
            lines.append(f"{row}, {r.outer_steps} outer steps")
        if r.failure:
            lines.append(f"  {r.method:30}{r.target:8.0e}   {r.failure[:100]}")
            continue
        if r.cpu is None:
            lines.append(f"  {r.method:30}{r.target:8.0e}   not reached: its best error is {r.error:.1e}, no time")
            continue
        against = r.peer_cpu and f"{r.peer_cpu.middle:.2f} [{r.peer_cpu.low:.2f}, {r.peer_cpu.high:.2f}]"
        lines.append(
            f"  {r.method:30}{r.target:8.0e}{r.passes:9}{r.passes / r.outer_steps:8.1f}{r.cpu.middle:9.3f}  "
            f"{against or '':26}{r.setting:9.1e}{r.error:9.0e}"
        )
    best = dict.fromkeys((r.row, r.target, r.peer) for r in results if r.peer)
    if best:
        lines.append("Best PyTorch peer: " + "; ".join(f"{peer} ({row}, {target:.0e})" for row, target, peer in best))
    lines.append(
        "passes: reverse passes in all (the solver's products and three more a step). error: the largest of all outer "
        "steps.\nsetting: the loosest tolerance (or number of steps) that does it; HyperTorch's, absolute there, over "
        "‖b‖.\nhg starts at the last adjoint, unless said cold or recycled (in the span of the last four); the others "
        "from zero,\nfor they do not give theirs. Preconditioners are kept from step to step while that pays."
    )
    return "\n".join(lines)


SHOWN = ("hg CG", "hg CG, compiled", "hg CG, Recycled(4)", "hg CG, Dense reused")  # of hypergrad's, in the picture


def draw(results: list[Result], path: Path) -> None:
    """Seconds of all outer steps to the tighter target; red: half of the best PyTorch peer's."""
    panels = []
    for row in dict.fromkeys(r.row for r in results):
        cells = [r for r in results if r.row == row and r.target == min(TARGETS)]
        cells = [r for r in cells if r.library != "hypergrad" or r.method in SHOWN] or cells
        rivals = [r.cpu.middle for r in cells if r.cpu and r.library not in ("hypergrad", "JAXopt")]
        goal = min(rivals) / 2 if rivals else None
        panels.append(Panel(row, [bar(r, goal) for r in cells], label="CPU seconds", log=True))
    title = f"50 outer steps to a relative error of {min(TARGETS):.0e}\n(red: half of the best PyTorch peer's time)"
    draw_panels(path, title, panels)


def bar(r: Result, goal: float | None) -> Bar:
    own = r.library == "hypergrad"
    if r.cpu is None:
        return Bar(r.method, None, r.failure.split(":")[0] if r.failure else "wrong: no time", own)
    text = f"{r.cpu.middle:.2f} s, {r.passes / r.outer_steps:.0f} passes"
    return Bar(r.method, r.cpu, text, own, goal if own else None)


def rows() -> list[str]:
    return list(illconditioned.SOURCES)


ABOUT = f"""Time for the hypergradients of 50 outer steps on ill-conditioned problems, with a relative error below the
target in every step. All methods get the same λ and the exact inner solutions. Each runs with the loosest setting that
reaches the target; if the search for it takes more than {SECONDS:.0f} seconds, it is stopped."""
SECTION = Section("Time to an accuracy", rows, measure, table, draw, ABOUT)
