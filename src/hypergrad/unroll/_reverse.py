"""Reverse mode through the steps, with several ways to store or recompute iterates.

f(λ) = E(w_T(λ), λ);   α ← ∇₁E(w_T, λ), ∇ ← ∇₂E;   for t = T−1 … 0:   ∇ ← ∇ + ∂₂Φ_tᵀ α,   α ← ∂₁Φ_tᵀ α
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil, comb, prod, sqrt

import torch
from torch import Tensor

from .. import _random
from .._options import check_whole, parse_bytes
from .._torch import Allocated, random_state_kept_on_error
from .._tree import PyTree
from ._compiled import CompiledReverse, checked_backend, compiled_gradients
from ._steps import Batches, Iterate, Run, is_continuous

POLICIES = ("graph", "iterates", "sqrt")
NO_REPLAY = (
    "steps {} to {} gave other numbers when they were evaluated again. torch's random numbers are replayed (does "
    "another thread draw from the same generator? Give it a separate torch.Generator). Anything else that changes (the "
    "random module, NumPy's random numbers, a torch.Generator, an iterator or counter outside, nondeterministic "
    'kernels) must enter through params, t or batches; or use memory="graph", which replays nothing'
)


@dataclass(frozen=True)
class ReverseResult:
    """A hypergradient through the steps of an inner optimiser.

    Attributes:
        grads: ∇f(λ), in the structure of hparams; zeros for a leaf that does not require grad or is not used.
        start_grads: the gradient with respect to the start, in the start's structure, with zeros for integer tensors;
            None if truncated.
        params: w_T, in the start's structure.
        outer_value: E(w_T, λ).
        evaluations: the number of evaluations of step, those by compiled functions included.
        compiled: what was compiled, and how long that took; None if nothing was.

    Example:
        >>> step = lambda w, lam: w - 0.5 * (w - lam)
        >>> lam, start = torch.tensor(2.0, requires_grad=True), torch.tensor(0.0)
        >>> run = hg.unroll.reverse(step, start, lam, lambda w, lam: w**2 / 2, steps=2)
        >>> run.params, run.grads, run.start_grads  # w₂ = ¾λ + ¼w₀
        (tensor(1.5000), tensor(1.1250), tensor(0.3750))
    """

    grads: PyTree
    start_grads: PyTree
    params: PyTree
    outer_value: Tensor
    evaluations: int
    compiled: str | None = None


def reverse(
    step: Callable[..., PyTree],
    start: PyTree,
    hparams: PyTree,
    outer_loss: Callable[[PyTree, PyTree], Tensor],
    steps: int,
    *,
    memory: str = "sqrt",
    checkpoints: int | None = None,
    truncate: int | None = None,
    batches: Batches = None,
    with_time: bool = False,
    allow_detached: bool = False,
    compile: bool | str = False,
) -> ReverseResult:
    """Gradient of E(w_T(λ), λ) through T steps of w_{t+1} = Φ_t(w_t, λ), in reverse mode. Writes no .grad.

    Iterates that are not stored are recomputed from the last one that is (a checkpoint). torch's random numbers, on the
    CPU and on the CUDA devices in use, are replayed bit for bit, and every replay is checked to end at the iterate of
    the first run; so are buffers of the modules that step can be seen to use (BatchNorm). Afterwards both are as after
    one run of the steps and outer_loss. Compute the inner gradient with create_graph=True: without it second
    derivatives are lost, with a warning.

    Args:
        step: Φ(params, hparams), returns the structure of params (mappings are matched by key). It is called with
            gradients enabled and must change nothing in place. With with_time it is called as Φ(params, hparams, t),
            with batches as Φ(params, hparams, t, batch).
        start: w₀, any pytree of tensors; may include an optimiser's state. Integer tensors get no gradient.
        hparams: λ, a pytree of floating point or complex tensors; at least one requires grad. start may be computed
            from them, or be one of them. Their gradient hooks are called once, with the total gradient.
        outer_loss: E(params, hparams), scalar.
        steps: T.
        memory: what is kept for the reverse pass, with I the bytes of an iterate and G those of the graph of a step:
            "graph", all graphs: T evaluations, T G;
            "iterates", all iterates: 2T − 1 evaluations, T I + G;
            "sqrt", n < √(2TG/I) iterates and the graph of one block of steps: 2T − √T/2 evaluations, n I + √T/2 G;
            a budget such as "64MiB": all graphs if they fit, else blocks as in "sqrt", else checkpoints.
        checkpoints: c, instead of memory: keep c iterates, the start included (revolve). This takes c I + G and
            T + rT − C(c+r, r−1) evaluations, the fewest possible, with r the smallest for which C(c+r, c) ≥ T.
        truncate: k: differentiate the last k steps only, and treat the iterate before them as constant.
        batches: batch t for step t, by index or by call; drawn again at a replay.
        with_time: pass t to step.
        compile: True compiles step and its transposed derivative with torch's inductor, once for each form of their
            arguments; a string names another backend of torch.compile. No graph is kept: "iterates" keeps T iterates,
            "sqrt" about √(2T), a budget as many as fit. t is then a 0-d tensor. Every call compares the compiled step
            with step at the second iterate, and compiles again if they differ. A step that cannot be compiled is
            evaluated without compilation, with a warning (NotCompiled) that gives the reason. Define step once,
            outside the loop over λ: the compiled functions are kept with it.
        allow_detached: accept tensors in step's result that have no graph, a part of params that is not used, an
            outer_loss that does not use its params, and an inner gradient without a graph.

    Returns:
        A ReverseResult.

    Raises:
        TypeError, ValueError: an argument does not have the form above, nothing depends on hparams, or a budget is too
            small; step's result has no graph; step or outer_loss uses a live start or model instead of its argument.
        RuntimeError: step changed its arguments in place, or gave other numbers at a replay.

    Warns: HypergradientWarning if nothing depends on a leaf of hparams, if at the second step nothing depends on a
        part of params (a momentum detached between steps), if the first step computes a gradient without a graph, if
        start has gradient hooks, which are not called, if the result is not finite, and if step detaches what its
        derivative needs (LostDerivative, which takes one more evaluation of such a step), or outer_loss reads running
        statistics (BatchNorm in eval mode) that step wrote.
    Cost: the evaluations above and T reverse passes. In addition to `memory`: five iterates, hparams, and the
        working memory of a step, of its reverse pass or of outer_loss, whichever is the most. "sqrt" and a budget
        measure I and G at the first two steps; a budget also measures the working memory, by one more reverse pass and
        call of outer_loss. This is done once for a step and the forms of its arguments; later steps that need more can
        exceed a budget. One device synchronisation, and one for each tensor of the iterate after a replayed block.
        compile: 2T + 1 evaluations with "iterates", less than 4T with "sqrt", and seconds to build, once.
    Source: Franceschi et al. 2017; Grazzi et al. 2020, section 2.1 (ITD); Griewank and Walther 2000 (revolve), here
        over blocks of steps, with the graph of one block at a time.

    Example:
        w ← w / 2 + λ from 0 gives w₃ = 1.75 λ.

        >>> lam = torch.tensor(2.0, requires_grad=True)
        >>> result = reverse(lambda w, lam: w / 2 + lam, torch.tensor(0.0), lam, lambda w, lam: w, steps=3)
        >>> result.grads, result.start_grads
        (tensor(1.7500), tensor(0.1250))
    """
    run = Run(step, outer_loss, start, hparams, batches, steps, with_time, allow_detached)
    return differentiated(run, steps, truncate, (memory, checkpoints), check_storage(memory, checkpoints, compile))


def differentiated(
    run: Run, steps: int, truncate: int | None, storage: tuple[str, int | None], backend: str | None = None
) -> ReverseResult:
    """The result of `reverse` for a run. storage: (memory, checkpoints), as in `reverse`."""
    check_whole(truncate=(truncate, 0), checkpoints=(storage[1], 1))
    length = steps if truncate is None else min(truncate, steps)
    with random_state_kept_on_error([*run.start, *run.outer]):
        with run.differentiating():
            first = run.keep([x.detach().clone() for x in run.start], run.rebuild)
            span = first, steps - length, steps, storage
            gradients, compiled = compiled_gradients(run, backend, *span, _backwards) if backend else (None, None)
            alpha, grads = gradients or _gradients(run, *span)
            run.end_replays()
            start_grads = run.start_gradients(alpha) if length == steps else None
            if start_grads is not None:
                grads = run.through_start(start_grads, grads)
        return ReverseResult(
            grads=run.hypergradient(grads, complain=length == steps),
            start_grads=None if start_grads is None else run.rebuild(start_grads),
            params=run.params,
            outer_value=run.outer_value,
            evaluations=run.evaluations,
            compiled=compiled,
        )


def _gradients(
    run: Run, first: Iterate, begin: int, end: int, storage: tuple[str, int | None]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """α at step `begin`, the first that is differentiated, and ∇. storage: (memory, checkpoints), as in `reverse`."""
    first = run.advance(first, 0, begin)
    if begin == end:
        return run.close(first.tensors, first.rebuild)
    blocks = _backwards(run, [(0, first)], *_schedule(run, first, begin, end, *storage))
    del first
    return _pull_back(run, blocks)


def check_storage(memory: str, checkpoints: int | None, compile: bool | str = False) -> str | None:
    """The backend of torch.compile, or None without compilation. Raises if the options contradict one another."""
    backend = checked_backend(compile)
    if backend and memory == "graph":
        raise ValueError('compiled steps keep no graphs: with compile use memory="iterates", "sqrt" or bytes')
    if memory not in POLICIES and parse_bytes(memory) is None:
        hint = f" (to keep {memory} iterates pass checkpoints={memory})" if isinstance(memory, int) else ""
        raise ValueError(f'memory must be "graph", "iterates", "sqrt", or bytes like "64MiB", got {memory!r}{hint}')
    if checkpoints is not None and memory != "sqrt":
        raise ValueError(f"pass checkpoints={checkpoints} or memory={memory!r}, not both")
    return backend


def _schedule(
    run: Run, first: Iterate, begin: int, end: int, memory: str, checkpoints: int | None
) -> tuple[list[int], int]:
    """The boundaries of the blocks of steps whose graph is recorded at once, and the number of iterates to keep."""
    single = list(range(begin, end + 1))
    if memory == "graph" or end - begin < 2:
        return sorted({begin, end}), 1
    if checkpoints is not None or memory == "iterates":
        return single, checkpoints or end - begin
    if memory == "sqrt":
        iterate, graph = run.sizes("sqrt", begin, lambda: run.measure(first, begin)[:2])
        last = ceil(sqrt(end - begin) / 2)  # steps of the last block, which are not evaluated twice
        n, total = 1, last
        while total < end - begin:
            total += last + n * iterate // graph
            n += 1
        bounds = _blocks(begin, end, n * iterate + last * graph, iterate, graph)
    else:
        budget = parse_bytes(memory) or 0.0
        iterate, graph, working, least = run.sizes("budget", begin, lambda: _measured(run, first, begin))
        if budget < least:
            raise ValueError(f"a budget of {budget:.0f} bytes is too small: one step needs about {least}")
        room = budget - working
        bounds = _blocks(begin, end, room, iterate, graph)
        if bounds is None:
            return single, int((room - graph) // iterate)
    bounds = bounds or single
    return bounds, len(bounds) - 1


def _measured(run: Run, first: Iterate, begin: int) -> tuple[int, int, int, int]:
    """Bytes of an iterate, of a step's graph, of the working memory beside them, and the least budget for one step."""

    def pull() -> None:
        alpha = [y.new_zeros((*run.lead, *y.shape)) for y in both.outputs if is_continuous(y)]
        run.pull(both, alpha, [torch.zeros_like(x) for x in run.differentiated], retain=True)

    allocated = Allocated()
    with allocated:
        iterate, graph, both = run.measure(first, begin)
        random, buffers = _random.capture(run.devices), run.buffers.copies()
        after, most = allocated.now, allocated.peak
        final = [y.detach() for y in both.outputs]
        ahead = allocated.taken(lambda: run.close(final, both.rebuild))
        ahead = max(ahead, allocated.taken(pull))
        _random.restore(random)
        run.buffers.restore(buffers)
    params, hparams, drawn = (sum(x.nbytes for x in xs) for xs in (first.tensors, run.differentiated, random.values()))
    several, hparams = params * (prod(run.lead) - 1), hparams * prod(run.lead)  # for k losses: k − 1 more α, k ∇
    # Beside the checkpoints: five iterates (the one in which a block must end, the block's outputs, α, w_T, and the one
    # being computed), ∇, and the copies of the random state in run and in the functions that restore it.
    working = 5 * params + several + hparams + 5 * drawn + max(most - after, ahead)
    least = max(working + graph + iterate, params + several + hparams + 5 * drawn + max(most, after + ahead))
    return iterate, graph, working, least


def _blocks(begin: int, end: int, room: float, iterate: int, graph: int) -> list[int] | None:
    """Boundaries of blocks, each as long as its graph fits beside the iterates kept before it; None if no step fits."""
    bounds = [begin]
    while bounds[-1] < end:
        length = int((room - len(bounds) * iterate) // graph)
        if length < 1:
            return None
        bounds.append(min(bounds[-1] + length, end))
    return bounds


def _stride(length: int, checkpoints: int) -> int:
    """The number of blocks to the next checkpoint: Griewank and Walther 2000, with β(c, r) = C(c + r, c)."""
    r = 1
    while comb(checkpoints + r, r) < length:
        r += 1
    return min(comb(checkpoints + r - 1, r - 1), length - comb(checkpoints + r - 2, r - 1))


def _backwards(
    run: Run | CompiledReverse, stack: list[tuple[int, Iterate]], bounds: list[int], checkpoints: int
) -> Iterator[tuple[int, int, Iterate]]:
    """The blocks of steps in reverse order, each with the iterate at its beginning, by revolve.

    stack: the checkpoints, each with the number of the block that follows it; the caller passes the first one.
    """
    for end in range(len(bounds) - 1, 0, -1):
        at, iterate = stack[-1]
        while end - at > 1:
            free = checkpoints - len(stack)
            ahead = at + (_stride(end - at, free + 1) if free else end - at - 1)
            iterate = run.advance(iterate, bounds[at], bounds[ahead])
            at = ahead
            if free:
                stack.append((at, iterate))
        if stack[-1][0] == at:
            stack.pop()
        yield bounds[end - 1], bounds[end], iterate
        del iterate


def _pull_back(run: Run, blocks: Iterator[tuple[int, int, Iterate]]) -> tuple[list[Tensor], list[Tensor | None]]:
    """α at the beginning of the first block of steps, and ∇ through all blocks, which come in reverse order."""
    later, alpha, grads = None, [], []
    for begin, end, iterate in blocks:
        graph = run.record(iterate, begin, end)
        if later is None:
            alpha, grads = run.close([x.detach() for x in graph.outputs], graph.rebuild)
        elif not all(map(_same, graph.outputs, later)):
            raise RuntimeError(NO_REPLAY.format(begin, end - 1))
        later = iterate.tensors
        alpha, grads = run.pull(graph, alpha, grads)
        del graph, iterate
    return alpha, grads


def _same(x: Tensor, y: Tensor) -> bool:
    """Equal bit for bit, NaN included."""
    return torch.equal(x, y) or bool(((x == y) | ((x != x) & (y != y))).all())
