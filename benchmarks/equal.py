"""Equal numbers of products: every column does K products, and its time is divided by that of the floor."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

from tqdm import tqdm

from . import counts, problems
from .measure import Spread, Times, interleaved, peak_memory, ratios
from .methods import FLOOR, METHODS, TOLERANCE, Method
from .pictures import Bar, Panel
from .pictures import draw as draw_panels
from .problems import Problem
from .report import MIB, Section, cell


@dataclass(frozen=True)
class Result:
    """One method on one row. Seconds are those of a call; ratios are taken round by round."""

    row: str
    method: str
    library: str
    correct: bool
    error: float | None  # relative difference from the result of K steps in float64
    distance: float | None  # relative difference from the exact hypergradient
    passes: int | None
    reads: int | None
    peak: int | None = None  # peak memory in bytes beyond the data
    vectors: float | None = None  # peak memory beyond the graph and one product, in vectors of params' size
    peer_peak: float | None = None  # peak over that of the leanest library with the same answer
    first: float | None = None  # wall seconds of the first call, which compiles
    failure: str | None = None
    cpu: Spread | None = None
    wall: Spread | None = None
    step: Spread | None = None  # CPU seconds of one more step
    floor_cpu: Spread | None = None
    floor_wall: Spread | None = None
    peer: str | None = None  # the fastest PyTorch library with the same answer
    peer_cpu: Spread | None = None
    peer_step: Spread | None = None  # time of one more step over that of the fastest peer in this
    target: float | None = None


def measure(rows: Sequence[str], words: Sequence[str] | None, rounds: int | None) -> tuple[list[Result], list[dict]]:
    methods = [m for m in METHODS if m.library == "floor" or not words or any(word in m.name for word in words)]
    results, settings = [], []
    for row in tqdm(rows, desc="rows"):
        problem = problems.rows()[row]()
        turns = rounds or problem.rounds
        results += measure_row(problem, methods, turns)
        settings.append(
            {"row": row, "parameters": problem.size, "steps": problem.steps, "rounds": turns, "calls": problem.calls}
            | {"step_size": problem.step_size, "dtype": str(problem.params[0].dtype), "seed": 0, "threads": 1}
        )
    return results, settings


def measure_row(problem: Problem, methods: list[Method], rounds: int) -> list[Result]:
    """Check all methods on one row, then time those with the right result."""
    methods = [method for method in methods if method.fits(problem)]
    checked = [check(problem, method) for method in tqdm(methods, desc=f"{problem.name}: answers", leave=False)]
    right = [method for method, result in zip(methods, checked, strict=True) if result.correct]
    calls = {(method.name, problem.steps): partial(method.run, problem) for method in right}
    if problem.small:
        half = problem.steps // 2
        calls |= {(method.name, half): partial(method.run, replace(problem, steps=half)) for method in right}
    with tqdm(total=len(calls) * (rounds + 1), desc=f"{problem.name}: clock", leave=False) as bar:
        times = interleaved(calls, rounds, problem.calls, bar.update)
    pairs = list(zip(methods, checked, strict=True))
    return [leanness(method, timed(problem, method, result, right, times), pairs) for method, result in pairs]


def check(problem: Problem, method: Method) -> Result:
    """The error of a method, its counts, and its peak memory."""
    begin = time.perf_counter()
    try:
        counted, grads = counts.count(problem, method.run) if method.passes else (Counter(), method.run(problem))
    except Exception as error:
        if not (method.peer or method.compiled):
            raise
        failure = f"{type(error).__name__}: {' '.join(str(error).split())[:90]}"
        return Result(problem.name, method.name, method.library, False, None, None, None, None, failure=failure)
    first = time.perf_counter() - begin
    error = distance = None
    if method.truth:
        error, distance = problem.system.error(grads, method.truth), problem.system.error(grads, "exact")
    correct = error is None or error <= TOLERANCE[method.truth or ""]
    result = Result(
        problem.name, method.name, method.library, correct, error, distance, counted["passes"], counted["reads"]
    )
    if not method.passes:
        result = replace(result, passes=None, reads=None)
    if method.compiled:
        result = replace(result, first=first)
    if method.memory:
        return replace(result, peak=method.memory(problem))
    peak = peak_memory(lambda: method.run(problem))
    fixed_point = FLOOR not in (method.name, method.floor)
    vectors = None if problem.small else counts.beside(problem, peak, fixed_point)
    return replace(result, peak=peak, vectors=vectors)


def leanness(method: Method, result: Result, pairs: list[tuple[Method, Result]]) -> Result:
    """The result with the ratio of its peak memory to that of the peer with the least."""
    peaks = [r.peak for m, r in pairs if m.peer and m.work == method.work and r.correct and r.peak]
    if method.library != "hypergrad" or not peaks or not result.peak:
        return result
    return replace(result, peer_peak=result.peak / min(peaks))


def timed(
    problem: Problem, method: Method, result: Result, methods: list[Method], times: dict[tuple[str, int], Times]
) -> Result:
    """The result with its times and ratios."""
    steps, half = problem.steps, problem.steps // 2
    own = times.get((method.name, steps))
    if own is None:
        return result

    def growth(name: str) -> list[float]:
        pairs = zip(times[name, steps].cpu, times[name, half].cpu, strict=True)
        return [(long - short) / (steps - half) for long, short in pairs]

    base = times.get((method.floor or method.name, steps), own)
    floor_cpu, floor_wall = ratios(own, base)
    result = replace(result, cpu=Spread.of(own.cpu), wall=Spread.of(own.wall))
    result = replace(result, floor_cpu=floor_cpu, floor_wall=floor_wall)
    if problem.small:
        result = replace(result, step=Spread.of(growth(method.name)))
    else:
        result = replace(result, target=method.target)
    peers = [m.name for m in methods if m.torch_peer and m.work == method.work]
    if method.library != "hypergrad" or not peers:
        return result
    best = min(peers, key=lambda name: median(times[name, steps].cpu))
    result = replace(result, peer=best, peer_cpu=ratios(own, times[best, steps])[0])
    if problem.small:
        best = min(peers, key=lambda name: median(growth(name)))
        pairs = zip(growth(method.name), growth(best), strict=True)
        result = replace(result, peer_step=Spread.of([x / y for x, y in pairs]))
    return result


def table(results: Iterable[Result]) -> str:
    """The results as text: medians, and quartiles of the ratio of CPU times."""
    lines = [
        f"{'':32}{'passes':>7}{'ms':>10}  {'× floor, CPU':22}{'wall':>6}{'target':>8}{'× peer':>8}"
        f"{'µs/step':>9}{'× peer':>8}{'MiB':>8}{'× peer':>8}{'vectors':>9}{'error':>7}{'to exact':>9}"
    ]
    row = None
    for r in results:
        if r.row != row:
            row = r.row
            lines.append(row)
        if r.failure:
            lines.append(f"  {r.method:30}{'':7}   {r.failure}")
            continue
        if not r.correct or r.cpu is None or r.floor_cpu is None or r.floor_wall is None:
            lines.append(f"  {r.method:30}{r.passes or '':7}   wrong by {r.error:.1e}: no time")
            continue
        quartiles = f"{r.floor_cpu.middle:.3f} [{r.floor_cpu.low:.3f}, {r.floor_cpu.high:.3f}]"
        lines.append(
            f"  {r.method:30}{r.passes or '':7}{1e3 * r.cpu.middle:10.3f}  {quartiles:22}{r.floor_wall.middle:6.2f}"
            f"{cell(r.target, '.2f'):>8}{cell(r.peer_cpu, '.3f'):>8}{cell(r.step, '.1f', 1e6):>9}"
            f"{cell(r.peer_step, '.3f'):>8}{cell(r.peak, '.2f', MIB):>8}{cell(r.peer_peak, '.2f'):>8}"
            f"{cell(r.vectors, '.1f'):>9}{cell(r.error, '.0e'):>7}{cell(r.distance, '.0e'):>9}"
        )
    built = [f"{r.first:.1f} s ({r.row}, {r.method})" for r in results if r.first]
    if built:
        lines.append(f"Building what is compiled, not in the times: {', '.join(built)}")
    lines.append(
        "× peer: over the fastest PyTorch library with the same answer; of MiB (the peak, beside the data), over the "
        "leanest library.\nto exact: the relative distance from the hypergradient after any number of steps."
    )
    return "\n".join(lines)


CG = ("hg.implicit.grad, CG", "hg.CG", "HyperTorch CG", "TorchOpt CG", "Betty CG", "JAXopt CG, jit")


def draw(results: list[Result], path: Path) -> None:
    """One bar per method (of CG, if the row has it): CPU time over that of the floor, with a tick at the target."""
    panels = []
    for row in dict.fromkeys(r.row for r in results):
        cells = [r for r in results if r.row == row and not r.failure and r.library != "floor"]
        cells = [r for r in cells if r.method in CG] or cells
        chosen = [
            Bar(r.method, r.floor_cpu, "" if r.floor_cpu else "wrong: no time", r.library == "hypergrad", r.target)
            for r in cells
        ]
        panels.append(Panel(row, chosen, log=True, line=1))
    draw_panels(path, "One hypergradient at equal K: CPU time over that of the\nbare products (red: target)", panels)


ABOUT = """Every method does the same number K of products, and its time is divided by that of the floor: one
evaluation with the graph of the gradient (or of the map), the outer gradient, K products and the last product,
without any linear algebra."""
SECTION = Section("Equal numbers of products", problems.rows, measure, table, draw, ABOUT)
