"""Reverse mode through the steps, with the storage of iterates as a choice.

f(λ) = E(w_T(λ), λ);   α ← ∇₁E(w_T, λ), ∇ ← ∇₂E;   for t = T−1 … 0:   ∇ ← ∇ + ∂₂Φ_tᵀ α,   α ← ∂₁Φ_tᵀ α
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import torch
from torch import Tensor

from .._vector import PyTree
from ..implicit import random_state_kept_on_error
from ._steps import Run, State, batch_at, same, set_random_state

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
NO_REPLAY = (
    "steps {} to {} gave other numbers when they were evaluated again. torch's random numbers are replayed; what else "
    "changes (Python's or NumPy's random, an iterator or counter outside, buffers of a module, kernels that are not "
    'deterministic) must enter through params, t or batches; or use memory="graph", which replays nothing'
)


@dataclass(frozen=True)
class Unrolled:
    """A hypergradient through the steps of an inner optimiser.

    Attributes:
        grads: ∇f(λ), in the structure of hparams; zeros for a leaf that does not require grad or reaches nothing.
        start_grads: the gradient with respect to the start, in its structure, zeros where a tensor is not of floating
            point; None if truncated.
        params: w_T, as step gave it.
        outer_value: E(w_T, λ).
        evaluations: how often step was called.
    """

    grads: PyTree
    start_grads: PyTree
    params: PyTree
    outer_value: Tensor
    evaluations: int


def reverse(
    step: Callable[..., PyTree],
    start: PyTree,
    hparams: PyTree,
    outer_loss: Callable[[PyTree, PyTree], Tensor],
    steps: int,
    *,
    memory: str | int = "sqrt",
    truncate: int | None = None,
    batches: Sequence[Any] | Callable[[int], Any] | None = None,
    with_time: bool = False,
    allow_detached: bool = False,
) -> Unrolled:
    """Gradient of E(w_T(λ), λ) through T steps of w_{t+1} = Φ_t(w_t, λ), in reverse mode. Writes no .grad.

    Iterates between which nothing is kept are evaluated again from the last one that is (a checkpoint). torch's random
    numbers, on the CPU and on the CUDA devices in use, are replayed bit for bit (dropout, noise), and that each
    replay ends where the first run did is checked. Afterwards the random state is as after one run of the steps and
    outer_loss. In the inner gradient write create_graph=True: without it second derivatives are lost.

    Args:
        step: Φ(params, hparams), of params' structure; called with gradients enabled, must change nothing in place.
            Φ(params, hparams, t) with with_time; Φ(params, hparams, t, batch) with batches.
        start: w₀, any pytree of tensors, an optimiser's state included. Integer tensors are carried along.
        hparams: λ, likewise of floating point; at least one leaf requires grad. If start was computed from hparams,
            or is one of them, what passes through start is included.
        outer_loss: E(params, hparams), scalar.
        steps: T.
        memory: what is kept for the reverse pass, I being the bytes of an iterate, G those of the graph of a step:
            "graph", all graphs: T evaluations, T G;
            "iterates", all iterates: 2T − 1 evaluations, T I + G;
            "sqrt", n iterates and the graph of one block of steps, the longer the fewer iterates are left: less than
            2T evaluations, n I + G with n ≈ √(2TG/I);
            an integer c, so many checkpoints, the start included (revolve): T + rT − C(c+r, r−1) evaluations, with
            r the smallest for which C(c+r, c) ≥ T, and no schedule with c iterates needs fewer; c I + G;
            a budget such as "64MiB": the graph if it fits, else blocks as in "sqrt", else checkpoints.
        truncate: k, differentiate the last k steps only, the iterate before them taken as constant.
        batches: batch t for step t, by index or by call; drawn again at a replay.
        with_time: pass t to step.
        allow_detached: take tensors in step's result that have no graph for constants.

    Returns:
        An Unrolled.

    Raises:
        TypeError, ValueError: something is not of the form above, nothing reaches hparams, or a budget is too small;
            also where step's result has no graph, or was computed from the live start instead of its argument.
        RuntimeError: step changed its arguments in place, or did not replay.

    Warns: HypergradientWarning where a leaf of hparams is reached by nothing (a learning rate read with .item(), say),
        and where the result is not finite (steps that diverge).
    Cost: the evaluations above and T reverse passes. Beside what memory says, a few iterates, twice hparams, and the
        working memory of one step's reverse pass; a budget sets 6 I + G aside for these, an estimate. I and G are
        measured at the first two steps; where all is one block, these are evaluated again. One device synchronisation
        a replayed block. Buffers that a module writes in step are written once more at each replay.
    Source: Franceschi et al. 2017; Grazzi et al. 2020, section 2.1 (ITD); Griewank and Walther 2000 (revolve), here
        over blocks of steps whose graph is kept at once.

    Example:
        w ← w / 2 + λ from 0 gives w₃ = 1.75 λ.

        >>> lam = torch.tensor(2.0, requires_grad=True)
        >>> result = reverse(lambda w, lam: w / 2 + lam, torch.tensor(0.0), lam, lambda w, lam: w, steps=3)
        >>> result.grads, result.start_grads
        (tensor(1.7500), tensor(0.1250))
    """
    kept = steps if truncate is None else min(truncate, steps)
    if steps < 0 or kept < 0:
        raise ValueError(f"steps and truncate must be ≥ 0, got {steps} and {truncate}")
    storage = _storage(memory)
    run = Run(step, start, hparams, batch_at(batches, steps), with_time or batches is not None, allow_detached)
    with random_state_kept_on_error([*run.start, *run.outer]), torch.enable_grad():
        first = run.advance(run.keep([x.detach().clone() for x in run.start], run.rebuild), 0, steps - kept)
        origin = steps - kept
        bounds, checkpoints, known = _plan(storage, run, first, origin, kept)
        stack, later = [(0, first)], None
        alpha, grads = [], []
        # Revolve: the last block that is not done is reached from the last checkpoint, leaving others on the way.
        for end in range(len(bounds) - 1, 0, -1):
            here, state = stack[-1]
            while end - here > 1:
                free = checkpoints - len(stack)
                ahead = here + (_split(end - here, free + 1) if free else end - here - 1)
                state = run.advance(state, origin + bounds[here], origin + bounds[ahead], known)
                here = ahead
                if free:
                    stack.append((here, state))
            if stack[-1][0] == here:
                stack.pop()
            leaves, outputs, rebuild = run.record(state, origin + bounds[end - 1], origin + bounds[end])
            if later is None:
                alpha, grads = run.close([x.detach() for x in outputs], rebuild, outer_loss)
            elif not all(same(x, y) for x, y in zip(outputs, later.tensors, strict=True)):
                raise RuntimeError(NO_REPLAY.format(origin + bounds[end - 1], origin + bounds[end] - 1))
            later, known = state, {}
            alpha, grads = run.pull(leaves, outputs, alpha, grads)
            del leaves, outputs
        if later is None:  # no step is differentiated
            alpha, grads = run.close(first.tensors, first.rebuild, outer_loss)
        set_random_state(run.random_after)
        start_grads = run.start_gradients(alpha) if kept == steps else None
        if start_grads is not None:
            grads = run.through_start(start_grads, grads)
        return Unrolled(
            grads=run.hypergradient(grads, complain=kept == steps),
            start_grads=None if start_grads is None else run.rebuild(start_grads),
            params=run.params,
            outer_value=run.outer_value,
            evaluations=run.evaluations,
        )


def _storage(memory: str | int) -> str | int | float:
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


def _split(length: int, checkpoints: int) -> int:
    """How far to advance to the next checkpoint: Griewank and Walther 2000, with β(c, r) = C(c + r, c)."""
    r = 1
    while comb(checkpoints + r, r) < length:
        r += 1
    return min(comb(checkpoints + r - 1, r - 1), length - comb(checkpoints + r - 2, r - 1))


def _blocks(steps: int, available: float, iterate: int, graph: int) -> list[int] | None:
    """Boundaries of blocks: while i iterates are kept, the graph of as many steps as fit beside them. None if too few.

    available = n · iterate + graph gives n blocks at most.
    """
    bounds = [0]
    while bounds[-1] < steps:
        length = int((available - len(bounds) * iterate) // graph)
        if length < 1:
            return None
        bounds.append(min(bounds[-1] + length, steps))
    return bounds


def _plan(
    storage: str | int | float, run: Run, first: State, origin: int, steps: int
) -> tuple[list[int], int, dict[int, State]]:
    """Boundaries of the blocks of steps, the number of checkpoints, and the states that are known already."""
    single = list(range(steps + 1))
    if storage == "graph" or steps < 2:
        return sorted({0, steps}), 1, {}
    if storage == "iterates":
        return single, steps, {}
    if isinstance(storage, int):
        return single, storage, {}
    known, graph = run.measure(first, origin)
    iterate = max(sum(x.nbytes for x in first.tensors), 1)
    if storage == "sqrt":
        count, total = 1, 1
        while total < steps:
            total += 1 + count * iterate // graph
            count += 1
        bounds = _blocks(steps, count * iterate + graph, iterate, graph)
        assert bounds is not None
        return bounds, len(bounds) - 1, known
    assert isinstance(storage, float)
    available = storage - graph - 6 * iterate - 2 * sum(x.nbytes for x in run.differentiated)
    checkpoints = int((available - graph) // iterate)
    if checkpoints < 1:
        least = storage - available + graph + iterate
        raise ValueError(f"a budget of {storage:.0f} bytes is too small: one step needs about {least:.0f}")
    bounds = _blocks(steps, available, iterate, graph)
    return (single, checkpoints, known) if bounds is None else (bounds, len(bounds) - 1, known)
