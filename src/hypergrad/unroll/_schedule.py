"""How steps are cut into blocks, and where checkpoints stand, within a given memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from math import comb
from typing import NamedTuple

import torch
from torch import Tensor

from .._tree import PyTree
from ._memory import Allocated
from ._steps import Run, State, random_state, set_random_state

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


class Plan(NamedTuple):
    """Boundaries of the blocks of steps whose graph is kept at once, and how many states may be kept before them."""

    bounds: list[int]
    checkpoints: int


def parse(memory: str | int) -> str | int | float:
    """A name, a number of checkpoints (int), or of bytes (float)."""
    if isinstance(memory, int) and not isinstance(memory, bool) and memory >= 1:
        return memory
    if memory in ("graph", "iterates", "sqrt"):
        return memory
    number = re.fullmatch(r"([\d.]+) ?([KMG]i?B|B)", memory) if isinstance(memory, str) else None
    if number is None:
        raise ValueError(
            f'memory must be "graph", "iterates", "sqrt", a number of checkpoints ≥ 1, or bytes like "64MiB", '
            f"got {memory!r}"
        )
    return float(number[1]) * UNITS[number[2]]


def stride(length: int, checkpoints: int) -> int:
    """How far to advance to the next checkpoint: Griewank and Walther 2000, with β(c, r) = C(c + r, c)."""
    r = 1
    while comb(checkpoints + r, r) < length:
        r += 1
    return min(comb(checkpoints + r - 1, r - 1), length - comb(checkpoints + r - 2, r - 1))


def _blocks(begin: int, end: int, available: float, iterate: int, graph: int) -> list[int] | None:
    """Boundaries of blocks: while i iterates are kept, the graph of as many steps as fit beside them. None if too few.

    available = n · iterate + graph gives n blocks at most.
    """
    bounds = [begin]
    while bounds[-1] < end:
        length = int((available - len(bounds) * iterate) // graph)
        if length < 1:
            return None
        bounds.append(min(bounds[-1] + length, end))
    return bounds


def schedule(
    storage: str | int | float,
    run: Run,
    first: State,
    begin: int,
    end: int,
    *,
    away: bool,
    outer_loss: Callable[[PyTree, PyTree], Tensor],
) -> Plan:
    """How steps begin … end − 1 are cut, by what `parse` gave; first is the state before them.

    away: iterates are kept elsewhere and count nothing in a budget.
    """
    single = list(range(begin, end + 1))
    if storage == "graph" or end - begin < 2:
        return Plan(sorted({begin, end}), 1)
    if storage == "iterates":
        return Plan(single, end - begin)
    if isinstance(storage, int):
        return Plan(single, storage)
    if isinstance(storage, float):
        iterate, graph, working, least = _needs(run, first, begin, outer_loss)
        if storage < least:
            raise ValueError(f"a budget of {storage:.0f} bytes is too small: one step needs about {least:.0f}")
        available = storage - working
        bounds = _blocks(begin, end, available, 0 if away else iterate, graph)
        if bounds is None:
            return Plan(single, int((available - graph) // iterate))
    else:
        iterate, graph, _ = run.measure(first, begin)
        n, total = 1, 1
        while total < end - begin:
            total += 1 + n * iterate // graph
            n += 1
        bounds = _blocks(begin, end, n * iterate + graph, iterate, graph)
        assert bounds is not None
    return Plan(bounds, len(bounds) - 1)


def _needs(
    run: Run, first: State, begin: int, outer_loss: Callable[[PyTree, PyTree], Tensor]
) -> tuple[int, int, int, int]:
    """Bytes of an iterate, of a step's graph, of all beside iterates and graphs, and of the smallest budget."""

    def pull() -> None:
        alpha = [torch.zeros_like(y) for y in both.outputs if y.is_floating_point()]
        run.pull(both, alpha, [torch.zeros_like(x) for x in run.differentiated], retain=True)

    with Allocated() as allocated:
        iterate, graph, both = run.measure(first, begin)
        random = random_state(run.devices)
        after, most = allocated.now, allocated.peak
        final = [y.detach() for y in both.outputs]
        ahead = max(allocated.taken(pull), allocated.taken(lambda: run.close(final, both.rebuild, outer_loss)))
        set_random_state(random)
    params, hparams, drawn = (sum(x.nbytes for x in xs) for xs in (first.tensors, run.differentiated, random.values()))
    # Beside the checkpoints: the state that a block must end in, its outputs, α, w_T and an iterate on its way; ∇; and
    # the random state where it is kept by run and by those who put it back.
    working = 5 * params + hparams + 5 * drawn + max(most - after, ahead)
    measured = params + hparams + 5 * drawn + max(most, after + ahead)
    return iterate, graph, working, max(working + graph + iterate, measured)
