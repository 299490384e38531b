"""python -m benchmarks: time every column on every row; print a table, write benchmarks.json and benchmarks.png.

python -m benchmarks --quick: assert counts (products, evaluations, reads from the device, vectors), never times.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

import hypergrad as hg

from . import counts, problems
from .measure import Spread, Times, interleaved, ratios
from .methods import FLOOR, METHODS, TOLERANCE, Method
from .problems import Problem

RESULTS = Path(__file__).parents[1] / "docs" / "results"


@dataclass(frozen=True)
class Result:
    """One cell. Seconds are those of a call; ratios are taken round by round."""

    row: str
    method: str
    correct: bool
    error: float | None  # relative difference from K steps without rounding
    distance: float | None  # relative difference from the exact hypergradient
    passes: int
    reads: int
    vectors: float | None = None  # peak memory beside the graph and one product
    cpu: Spread | None = None
    wall: Spread | None = None
    step: Spread | None = None  # CPU seconds of one more step
    floor_cpu: Spread | None = None
    floor_wall: Spread | None = None
    peer_cpu: Spread | None = None
    peer_step: Spread | None = None  # a step, over that of the peer
    target: float | None = None


def measure(problem: Problem, methods: list[Method], rounds: int) -> list[Result]:
    """All cells of one row: answers first, then the clock for those that are right."""
    methods = [method for method in methods if method.fits(problem)]
    checked = [check(problem, method) for method in tqdm(methods, desc=f"{problem.name}: answers", leave=False)]
    right = [method for method, result in zip(methods, checked, strict=True) if result.correct]
    calls = {(method.name, problem.steps): partial(method.run, problem) for method in right}
    if problem.small:
        half = problem.steps // 2
        calls |= {(method.name, half): partial(method.run, replace(problem, steps=half)) for method in right}
    with tqdm(total=len(calls) * (rounds + 1), desc=f"{problem.name}: clock", leave=False) as bar:
        times = interleaved(calls, rounds, problem.calls, bar.update)
    by_name = {method.name: method for method in methods}
    return [timed(problem, by_name[result.method], result, times) for result in checked]


def check(problem: Problem, method: Method) -> Result:
    """Whether the answer is right, and what it takes."""
    counted, grads = counts.count(problem, method.run)
    error = distance = None
    if method.truth:
        error, distance = problem.system.error(grads, method.truth), problem.system.error(grads, "exact")
    correct = error is None or error <= TOLERANCE[method.truth or ""]
    fixed_point = FLOOR not in (method.name, method.floor)
    vectors = None if problem.small else counts.vectors(problem, method.run, fixed_point)
    return Result(problem.name, method.name, correct, error, distance, counted["passes"], counted["reads"], vectors)


def timed(problem: Problem, method: Method, result: Result, times: dict[tuple[str, int], Times]) -> Result:
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
    if method.peer and (method.peer, steps) in times:
        result = replace(result, peer_cpu=ratios(own, times[method.peer, steps])[0])
        if problem.small:
            pairs = zip(growth(method.name), growth(method.peer), strict=True)
            result = replace(result, peer_step=Spread.of([x / y for x, y in pairs]))
    return result


def table(results: Iterable[Result]) -> str:
    """The results as text: medians, and quartiles of the ratio in CPU time."""
    lines = [
        f"{'':34}{'passes':>7}{'ms':>10}  {'× floor, CPU':20}{'wall':>6}{'target':>8}{'× peer':>8}"
        f"{'µs/step':>9}{'× peer':>8}{'vectors':>9}{'error':>10}{'to exact':>10}"
    ]
    row = None
    for r in results:
        if r.row != row:
            row = r.row
            lines.append(row)
        if not r.correct or r.cpu is None or r.floor_cpu is None or r.floor_wall is None:
            lines.append(f"  {r.method:32}{r.passes:7}   wrong by {r.error:.1e}: no time")
            continue
        quartiles = f"{r.floor_cpu.middle:.3f} [{r.floor_cpu.low:.3f}, {r.floor_cpu.high:.3f}]"
        lines.append(
            f"  {r.method:32}{r.passes:7}{1e3 * r.cpu.middle:10.3f}  {quartiles:22}{r.floor_wall.middle:.3f}"
            f"{cell(r.target, '.2f'):>7}{cell(r.peer_cpu, '.3f'):>8}{cell(r.step, '.1f', 1e6):>9}"
            f"{cell(r.peer_step, '.3f'):>8}{cell(r.vectors, '.2f'):>9}{cell(r.error, '.1e'):>10}"
            f"{cell(r.distance, '.1e'):>10}"
        )
    return "\n".join(lines)


def cell(value: float | Spread | None, form: str, factor: float = 1.0) -> str:
    if value is None:
        return ""
    return format((value.middle if isinstance(value, Spread) else value) * factor, form)


def draw(results: list[Result], path: Path) -> None:
    """A bar a cell: the ratio to the floor in CPU time, with quartiles; a tick where the target is."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = list(dict.fromkeys(r.row for r in results))
    columns = min(len(rows), 2)
    figure, axes = plt.subplots(-(-len(rows) // columns), columns, figsize=(6.5 * columns, 4 * len(rows) / columns))
    for axis in axes.flat[len(rows) :] if len(rows) > 1 else ():
        axis.remove()
    for axis, row in zip(axes.flat if len(rows) > 1 else [axes], rows, strict=False):
        cells = [r for r in results if r.row == row]
        for place, r in enumerate(reversed(cells)):
            if r.floor_cpu is None:
                axis.text(1.02, place, "wrong", va="center", fontsize=8, color="tab:red")
                continue
            low, middle, high = r.floor_cpu.low, r.floor_cpu.middle, r.floor_cpu.high
            colour = "tab:blue" if r.method.startswith("hg.") else "0.7"
            axis.barh(place, middle, color=colour, xerr=[[middle - low], [high - middle]], ecolor="0.3")
            axis.text(high * 1.04, place, f"{middle:.2f}", va="center", fontsize=8)
            if r.target:
                axis.plot([r.target, r.target], [place - 0.45, place + 0.45], color="tab:red", linewidth=2)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set(title=row, xscale="log", xlim=(0.4, 20), yticks=range(len(cells)))
        axis.set_xticks([0.5, 1, 2, 4, 8], ["½", "1", "2", "4", "8"], minor=False)
        axis.set_xticks([], minor=True)
        axis.set_yticklabels([r.method for r in reversed(cells)])
        axis.set_xlabel("CPU time over the floor's")
    figure.suptitle("Time of one hypergradient at equal K (red: target)")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def surroundings() -> dict[str, object]:
    """The machine's kind and the versions."""
    listing = Path("/proc/cpuinfo")
    cpuinfo = listing.read_text() if listing.exists() else ""
    models = [line.split(":")[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    packages = {name: version(name) for name in ("torch", "numpy", "optree")} | {"hypergrad": hg.__version__}
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "python": platform.python_version(),
        "packages": packages,
        "commit": commit.stdout.strip(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="assert counts on small problems; no times")
    parser.add_argument("--rows", nargs="+", choices=list(problems.rows()), default=list(problems.rows()))
    parser.add_argument("--methods", nargs="+", metavar="WORD", help="only methods whose name holds one of these")
    parser.add_argument("--rounds", type=int, help="rounds of the clock (default: each row's own)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for benchmarks.json and .png")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if options.quick:
        counts.run()
        return
    # What the library has to say about float32 after K steps is in the table: the errors.
    warnings.simplefilter("ignore", hg.HypergradientWarning)
    methods = [m for m in METHODS if not options.methods or any(word in m.name for word in options.methods)]
    before, results, settings = surroundings(), [], []
    for row in tqdm(options.rows, desc="rows"):
        problem = problems.rows()[row]()
        rounds = options.rounds or problem.rounds
        results += measure(problem, methods, rounds)
        settings.append(
            {"row": row, "parameters": problem.size, "steps": problem.steps, "rounds": rounds, "calls": problem.calls}
            | {"step_size": problem.step_size, "dtype": str(problem.params[0].dtype), "seed": 0, "threads": 1}
        )
    print(table(results))
    options.output.mkdir(parents=True, exist_ok=True)
    document = {"machine": before, "rows": settings, "results": [asdict(r) for r in results]}
    (options.output / "benchmarks.json").write_text(json.dumps(document, indent=1) + "\n")
    draw(results, options.output / "benchmarks.png")


if __name__ == "__main__":
    main()
