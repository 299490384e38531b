"""Reverse mode through the steps, with the storage of iterates as a choice.

f(λ) = E(w_T(λ), λ);   α ← ∇₁E(w_T, λ), ∇ ← ∇₂E;   for t = T−1 … 0:   ∇ ← ∇ + ∂₂Φ_tᵀ α,   α ← ∂₁Φ_tᵀ α
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._random import random_state_kept_on_error
from .._tree import PyTree
from ._memory import Put, kept
from ._schedule import Plan, parse, schedule, stride
from ._steps import Run, State, batch_at, check_whole, same, set_random_state

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
    offload: str | os.PathLike[str] | None = None,
    truncate: int | None = None,
    batches: Sequence[Any] | Callable[[int], Any] | None = None,
    with_time: bool = False,
    allow_detached: bool = False,
) -> Unrolled:
    """Gradient of E(w_T(λ), λ) through T steps of w_{t+1} = Φ_t(w_t, λ), in reverse mode. Writes no .grad.

    Iterates between which nothing is kept are evaluated again from the last one that is (a checkpoint). torch's random
    numbers, on the CPU and on the CUDA devices in use, are replayed bit for bit (dropout, noise), and that each
    replay ends where the first run did is checked. Afterwards the random state is as after one run of the steps and
    outer_loss. In the inner gradient write create_graph=True: without it second derivatives are lost, with a warning.

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
            "iterates", all iterates: 2T − 1 evaluations (w_T is known from the first pass), T I + G;
            "sqrt", n iterates and the graph of one block of steps, the longer the fewer iterates are left: less than
            2T evaluations, n I + G with n ≈ √(2TG/I);
            an integer c, so many checkpoints, the start included (revolve): T + rT − C(c+r, r−1) evaluations, with
            r the smallest for which C(c+r, c) ≥ T, and no schedule with c iterates needs fewer; c I + G;
            a budget such as "64MiB": the graph if it fits, else blocks as in "sqrt", else checkpoints.
            That is T, less than 2T, less than 2T, and with c checkpoints up to r + 1 times T evaluations.
        offload: where iterates are kept: None, where they are; "cpu", on the CPU while steps run elsewhere, in pinned
            memory beside CUDA; a folder as pathlib.Path, in files of a new folder in it, removed in the end and on an
            error. A budget counts none of them then. Graphs and the working memory stay.
        truncate: k, differentiate the last k steps only, the iterate before them taken as constant.
        batches: batch t for step t, by index or by call; drawn again at a replay.
        with_time: pass t to step.
        allow_detached: take tensors in step's result that have no graph for constants, and say nothing where a tensor
            of params reaches nothing or the inner gradient has no graph.

    Returns:
        An Unrolled.

    Raises:
        TypeError, ValueError: something is not of the form above, nothing reaches hparams, or a budget is too small;
            also where step's result has no graph, or was computed from the live start instead of its argument.
        RuntimeError: step changed its arguments in place, or did not replay.
        OSError: a folder for offload cannot be written, or its disk is full.

    Warns: HypergradientWarning where a leaf of hparams is reached by nothing (a learning rate read with .item(), say),
        where at the second step a tensor of params reaches nothing (a momentum detached between steps), where the
        first step takes a gradient without a graph, and where the result is not finite (steps that diverge).
    Cost: the evaluations above and T reverse passes. Beside what memory says, five iterates, hparams, and the working
        memory of a step, of its reverse pass or of outer_loss, whichever is the most. "sqrt" and a budget measure I, G
        at the first two steps, which are not evaluated again for that; a budget measures the working memory there as
        well, by the tensors that operations return (not what a kernel takes inside), for one reverse pass through two
        steps and one call of outer_loss more. Steps that need more later on can exceed it. One device synchronisation a
        replayed block. Offloading writes an iterate once and reads it once for each time that it is gone on from.
        Buffers that a module writes in step are written once more at each replay.
    Source: Franceschi et al. 2017; Grazzi et al. 2020, section 2.1 (ITD); Griewank and Walther 2000 (revolve), here
        over blocks of steps whose graph is kept at once.

    Example:
        w ← w / 2 + λ from 0 gives w₃ = 1.75 λ.

        >>> lam = torch.tensor(2.0, requires_grad=True)
        >>> result = reverse(lambda w, lam: w / 2 + lam, torch.tensor(0.0), lam, lambda w, lam: w, steps=3)
        >>> result.grads, result.start_grads
        (tensor(1.7500), tensor(0.1250))
    """
    check_whole(steps=(steps, 0), truncate=(truncate, 0))
    length = steps if truncate is None else min(truncate, steps)
    storage = parse(memory)
    if storage == "graph" and offload is not None:
        raise ValueError('memory="graph" keeps no iterates that could be offloaded')
    run = Run(step, start, hparams, batch_at(batches, steps), with_time or batches is not None, allow_detached)
    with (
        random_state_kept_on_error([*run.start, *run.outer]),
        kept(offload, run.start) as put,
        torch.enable_grad(),
    ):
        begin = steps - length
        first = run.advance(run.keep([x.detach().clone() for x in run.start], run.rebuild), 0, begin)
        plan = schedule(storage, run, first, begin, steps, away=offload is not None, outer_loss=outer_loss)
        fetch = put(first)
        del first
        alpha, grads = _pull_back(run, _backwards(run, fetch, plan, put), outer_loss)
        if not length:
            alpha, grads = run.close(fetch().tensors, fetch().rebuild, outer_loss)
        set_random_state(run.random_after)
        start_grads = run.start_gradients(alpha) if length == steps else None
        if start_grads is not None:
            grads = run.through_start(start_grads, grads)
        return Unrolled(
            grads=run.hypergradient(grads, complain=length == steps),
            start_grads=None if start_grads is None else run.rebuild(start_grads),
            params=run.params,
            outer_value=run.outer_value,
            evaluations=run.evaluations,
        )


def _pull_back(
    run: Run, blocks: Iterator[tuple[int, int, State]], outer_loss: Callable[[PyTree, PyTree], Tensor]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """α where the last of these blocks begins, and ∇ through all of them."""
    later, alpha, grads = None, [], []
    for begin, end, state in blocks:
        graph = run.record(state, begin, end)
        if later is None:
            alpha, grads = run.close([x.detach() for x in graph.outputs], graph.rebuild, outer_loss)
        elif not all(map(same, graph.outputs, later.tensors)):
            raise RuntimeError(NO_REPLAY.format(begin, end - 1))
        later = state
        alpha, grads = run.pull(graph, alpha, grads)
        del graph, state
    return alpha, grads


def _backwards(run: Run, first: Callable[[], State], plan: Plan, put: Put) -> Iterator[tuple[int, int, State]]:
    """The blocks of steps, the last first, each with the state that it begins at.

    Revolve: a block is reached from the last checkpoint before it, leaving others on the way.
    """
    bounds, checkpoints = plan
    stack = [(0, first)]
    for end in range(len(bounds) - 1, 0, -1):
        here, fetch = stack[-1]
        state = fetch()
        while end - here > 1:
            free = checkpoints - len(stack)
            ahead = here + (stride(end - here, free + 1) if free else end - here - 1)
            state = run.advance(state, bounds[here], bounds[ahead])
            here = ahead
            if free:
                stack.append((here, put(state)))
        if stack[-1][0] == here:
            stack.pop()
        del fetch
        yield bounds[end - 1], bounds[end], state
        del state
