"""What the checks that are always on add to implicit.grad: `python -m benchmarks.checks [row ...]`.

Both columns solve with K steps of CG. The bare one takes no residual of the inner problem, estimates no distance, looks
for no NaN and keeps no record of the problem. CPU time of one thread, rounds interleaved.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from unittest.mock import patch

import torch

import hypergrad as hg
from hypergrad.implicit import _hypergradient, _problem

from .measure import Spread, interleaved, ratios
from .methods import implicit_cg
from .problems import Problem, rows

ROWS, ROUNDS = ("mlp", "logistic"), 15


class Nothing:
    """Stands for the residual of the inner problem."""

    def norm(self) -> torch.Tensor:
        return ZERO


ZERO = torch.zeros(())
BARE = (
    patch.object(_problem, "inner_residual", lambda *args: Nothing()),
    patch.object(_hypergradient, "_distance", lambda *args: ZERO),
    patch.object(hg.Hypergradient, "check_finite", lambda *args: None),
    patch.object(hg.Hypergradient, "warn_if_unsolved", lambda *args: None),
    patch.object(_problem.Problem, "kept", lambda self, variables: self),
)


def bare(problem: Problem) -> object:
    for part in BARE:
        part.start()
    try:
        return implicit_cg(problem)
    finally:
        for part in BARE:
            part.stop()


def added(build: Callable[[], Problem], rounds: int = ROUNDS) -> Spread:
    """CPU time with the checks over that without, round by round."""
    problem = build()
    calls = {"checked": lambda: implicit_cg(problem), "bare": lambda: bare(problem)}
    times = interleaved(calls, rounds)
    return ratios(times["checked"], times["bare"])[0]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:] or ROWS:
        ratio = added(rows()[name])
        low, middle, high = (100 * (x - 1) for x in (ratio.low, ratio.middle, ratio.high))
        print(f"{name}: the default checks add {middle:+.2f} % (quartiles {low:+.2f} %, {high:+.2f} %)")
