"""What the checks that are always on cost in implicit.grad: `python -m benchmarks.checks [row ...]`.

The share of CPU time, of one thread, that a call spends in them: taking the inner residual, estimating the distance
from the solution, looking for NaN, and keeping a record of the problem. The solver does K steps of CG. Shares are
medians over calls; a ratio of whole calls with and without the checks drowns in the noise of the clock.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

import hypergrad as hg
from hypergrad.implicit import _hypergradient, _problem

from .measure import Spread
from .methods import implicit_cg
from .problems import Problem, rows

ROWS, CALLS = ("mlp", "logistic"), 15
CHECKS = (
    (_problem, "inner_residual"),
    (_hypergradient, "_distance"),
    (hg.Hypergradient, "check_finite"),
    (hg.Hypergradient, "warn_if_unsolved"),
    (_problem.Problem, "kept"),
)


@contextmanager
def clocked() -> Iterator[list[float]]:
    """Collects the CPU seconds of each check done in the block."""
    spent: list[float] = []

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            before = time.process_time()
            result = function(*args, **options)
            spent.append(time.process_time() - before)
            return result

        return call

    with ExitStack() as stack:
        for owner, name in CHECKS:
            stack.enter_context(patch.object(owner, name, timed(getattr(owner, name))))
        yield spent


def share(problem: Problem, calls: int = CALLS) -> Spread:
    """CPU time in the checks over that of the whole call."""
    implicit_cg(problem)
    shares = []
    for _ in range(calls):
        with clocked() as spent:
            before = time.process_time()
            implicit_cg(problem)
            shares.append(sum(spent) / (time.process_time() - before))
    return Spread.of(shares)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:] or ROWS:
        found = share(rows()[name]())
        print(f"{name}: default checks {found.middle:.2%} of CPU time (quartiles {found.low:.2%}, {found.high:.2%})")
