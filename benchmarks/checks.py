"""The cost of implicit.grad beyond its products: the checks that are on by default, and the vector arithmetic of CG.

Checks: the share of a call's CPU time (one thread) that is spent on the inner residual, the estimated distance from the
solution, the search for NaN, and the record of the problem. Shares are medians over calls. The ratio of whole calls
(default over on_failure="ignore") is listed as well, but the noise of the clock is larger than the effect. Arithmetic:
the time that the solver's K steps spend outside reverse passes over the time inside.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tqdm import tqdm

import hypergrad as hg
from hypergrad._autodiff import Linearisation
from hypergrad._solution import OnFailure
from hypergrad.implicit import _hypergradient, _problem

from . import problems
from .measure import Spread, interleaved, ratios
from .methods import hypergradient
from .pictures import Bar, Panel
from .pictures import draw as draw_panels
from .problems import Problem
from .report import Section

ROWS = ("mlp", "logistic")  # rows to which the limit applies; calls on the others are too short or not typical
LIMIT = 0.02
WIDE = "a million parameters"
ARITHMETIC = {WIDE: 0.03, "tiny": 1.0}  # rows on which the arithmetic is measured, with their limits
CALLS = 15
ROUNDS = {"mlp": 7, "logistic": 20, "equilibrium": 10, "tiny": 40, WIDE: 5}
CHECKS = (
    (_problem.Problem, "residual_of"),
    (_hypergradient, "inner_distance"),
    (hg.Hypergradient, "check_finite"),
    (hg.Hypergradient, "warn_if_unsolved"),
    (hg.Hypergradient, "warn_if_inaccurate"),
    (_problem, "at_kink"),
    (_problem.Problem, "without_graphs"),
)


@dataclass(frozen=True)
class Result:
    row: str
    method: str
    seconds: Spread  # CPU time of a call with the default settings
    share: Spread  # share of the checks in it, or time of the arithmetic over that of the products
    ratio: Spread | None  # CPU time over that of calls with on_failure="ignore"
    limit: float | None


def call(problem: Problem, on_failure: OnFailure = "warn") -> None:
    kind = hg.solvers.CG if problem.step_size is not None else hg.solvers.GMRES
    hypergradient(problem, kind(max_steps=problem.steps, on_failure=on_failure))


@contextmanager
def clocked(functions: Sequence[tuple[Any, str]]) -> Iterator[list[float]]:
    """Collect the CPU seconds of each call of these functions within the block."""
    spent: list[float] = []

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            before = time.process_time()
            result = function(*args, **options)
            spent.append(time.process_time() - before)
            return result

        return call

    with ExitStack() as stack:
        for owner, name in functions:
            stack.enter_context(patch.object(owner, name, timed(getattr(owner, name))))
        yield spent


def share(problem: Problem, calls: int = CALLS) -> Spread:
    """CPU time in the checks over that of the whole call."""
    call(problem)
    shares = []
    for _ in range(calls):
        with clocked(CHECKS) as spent:
            before = time.process_time()
            call(problem)
            shares.append(sum(spent) / (time.process_time() - before))
    return Spread.of(shares)


def arithmetic(problem: Problem, calls: int = CALLS) -> Spread:
    """CPU time of CG's K steps outside reverse passes over the time inside."""
    call(problem)
    found = []
    for _ in range(calls):
        with clocked([(hg.solvers.CG, "_iterate")]) as steps, clocked([(Linearisation, "vjp")]) as products:
            call(problem)
        found.append(steps[0] / sum(products) - 1)
    return Spread.of(found)


def row(name: str) -> Problem:
    if name == WIDE:
        widths = (784, 512, 1024, 64, 10)
        return problems.biased_mlp(name, 5000, widths, rho=0.2, step_size=1.0, steps=6).to(torch.float32)
    return problems.rows()[name]()


def measure(rows: Sequence[str], words: Sequence[str] | None, rounds: int | None) -> tuple[list[Result], list[dict]]:
    results, settings = [], []
    for name in tqdm(rows, desc="rows"):
        problem, turns = row(name), rounds or ROUNDS[name]
        settings.append(
            {"row": name, "parameters": problem.size, "steps": problem.steps, "rounds": turns, "threads": 1}
        )
        if name != WIDE:
            results.append(checked(name, problem, turns))
        if name in ARITHMETIC:
            beside, seconds = (
                arithmetic(problem, turns),
                Spread.of(interleaved({"": partial(call, problem)}, turns)[""].cpu),
            )
            results.append(Result(name, "arithmetic over products", seconds, beside, None, ARITHMETIC[name]))
    return results, settings


def checked(name: str, problem: Problem, turns: int) -> Result:
    """The share of the checks, and the ratio of the times of whole calls."""
    found = share(problem, turns)
    calls = {"silent": partial(call, problem, "ignore"), "checked": partial(call, problem)}
    with tqdm(total=2 * (turns + 1), desc=f"{name}: clock", leave=False) as bar:
        times = interleaved(calls, turns, 20 if problem.small else 1, bar.update)
    method = f"checks, {'CG' if problem.step_size is not None else 'GMRES'}"
    ratio = ratios(times["checked"], times["silent"])[0]
    limit = LIMIT if name in ROWS else None
    return Result(name, method, Spread.of(times["checked"].cpu), found, ratio, limit)


def table(results: list[Result]) -> str:
    lines = [f"{'':50}{'ms':>10}   {'share':28}{'limit':>8}   over silent calls"]
    for r in results:
        inside = f"{r.share.middle:.2%} [{r.share.low:.2%}, {r.share.high:.2%}]"
        ratio = f"{r.ratio.middle:.3f} [{r.ratio.low:.3f}, {r.ratio.high:.3f}]" if r.ratio else ""
        limit = "" if r.limit is None else f"{r.limit:.0%}"
        lines.append(f"  {f'{r.row}: {r.method}':48}{1e3 * r.seconds.middle:10.2f}   {inside:28}{limit:>8}   {ratio}")
    return "\n".join(lines)


def draw(results: list[Result], path: Path) -> None:
    chosen = [
        Bar(
            f"{r.row}: {r.method}", r.share.times(100), f"{100 * r.share.middle:.2f} %", True, r.limit and 100 * r.limit
        )
        for r in results
    ]
    panels = [Panel("", chosen, label="% (of the call; or over the products)", log=True)]
    draw_panels(path, "What implicit.grad does beside its products (red: limit)", panels)


ABOUT = """What `implicit.grad` does in addition to its products. *Checks*: the share of a call's CPU time that goes
into the inner residual, the estimated distance from the solution, the search for NaN, and the record of the problem;
the last column is the time of a call over that of one without checks. *Arithmetic over products*: the time of the
solver's steps outside of reverse passes, over the time within."""
SECTION = Section("The cost of checks and of vector arithmetic", lambda: ROUNDS, measure, table, draw, ABOUT)
