"""Iterative differentiation: the gradient through the inner optimiser's own steps, w_{t+1} = Φ_t(w_t, λ).

    f(λ) = E(w_T(λ), λ);   α ← ∇₁E(w_T, λ), ∇ ← ∇₂E;   for t = T−1 … 0:   ∇ ← ∇ + ∂₂Φ_tᵀ α,   α ← ∂₁Φ_tᵀ α

Nothing needs to have converged, so step sizes, schedules and starts can be learned.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any, TypeAlias

import torch
from torch import Tensor

from . import _autodiff
from ._autodiff import as_scalar
from ._solution import warn
from ._vector import PyTree, describe, flatten, split
from .implicit import check_hparams, random_state_kept_on_error

__all__ = ["reverse", "Unrolled"]

Rebuild: TypeAlias = Callable[[Iterable[Tensor]], PyTree]

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
NONE: Mapping[int, Any] = {}
NODE = 512  # bytes of one node of a graph, beside the tensors it keeps
IN_PLACE = (
    "step changed its params (or hparams) in place, and with them the iterates that the reverse pass starts from: "
    "write w = w - lr * g, not w -= lr * g or w.sub_(lr * g), and build a new container"
)
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

    Warns: HypergradientWarning where a leaf of hparams is reached by nothing (a learning rate read with .item(), say).
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
    run = _Run(step, start, hparams, _batches(batches, steps), with_time or batches is not None, allow_detached)
    with random_state_kept_on_error([*run.start, *run.outer]), torch.enable_grad():
        first = run.advance(run.keep([x.detach().clone() for x in run.start], run.rebuild), 0, steps - kept)
        origin = steps - kept
        bounds, checkpoints, known = _plan(storage, run, first, origin, kept)
        stack, later = [(0, first)], None
        outer_value, alpha, grads, random_after = None, [], [], {}
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
                run.final, run.final_rebuild = [x.detach() for x in outputs], rebuild
                outer_value, alpha, grads = run.outer_gradients(outer_loss)
                random_after = _random_state(run.devices)
            elif not all(_same(x, y) for x, y in zip(outputs, later.tensors, strict=True)):
                raise RuntimeError(NO_REPLAY.format(origin + bounds[end - 1], origin + bounds[end] - 1))
            later, known = state, {}
            alpha, grads = run.pull(leaves, outputs, alpha, grads)
            del leaves, outputs
        if later is None:  # no step is differentiated
            run.final, run.final_rebuild = first.tensors, first.rebuild
            outer_value, alpha, grads = run.outer_gradients(outer_loss)
            random_after = _random_state(run.devices)
        _set_random_state(random_after)
        assert outer_value is not None
        start_grads = run.start_gradients(alpha) if kept == steps else None
        if start_grads is not None:
            grads = run.through_start(start_grads, grads)
        return Unrolled(
            grads=run.hypergradient(grads, complain=kept == steps),
            start_grads=None if start_grads is None else run.rebuild(start_grads),
            params=run.final_rebuild(run.final),
            outer_value=outer_value,
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


def _batches(batches: Any, steps: int) -> Callable[[int], Any] | None:
    if batches is None or callable(batches):
        return batches
    if not hasattr(batches, "__getitem__") or not hasattr(batches, "__len__"):
        raise TypeError(
            f"batches must be a sequence or a function of t, for a batch is drawn again at a replay; got "
            f"{type(batches).__name__}: pass list(...)"
        )
    if len(batches) < steps:
        raise ValueError(f"{steps} steps need as many batches, got {len(batches)}; batches may be a function of t")
    return batches.__getitem__


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
    storage: str | int | float, run: _Run, first: _State, origin: int, steps: int
) -> tuple[list[int], int, dict[int, _State]]:
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


def _random_state(devices: Sequence[torch.device]) -> dict[torch.device, Tensor]:
    states = {torch.device("cpu"): torch.get_rng_state()}
    return states | {device: torch.cuda.get_rng_state(device) for device in devices}


def _set_random_state(states: dict[torch.device, Tensor]) -> None:
    for device, state in states.items():
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, device)


def _same(x: Tensor, y: Tensor) -> bool:
    """Equal bit for bit, NaN included."""
    return torch.equal(x, y) or bool(((x == y) | ((x != x) & (y != y))).all())


@dataclass(frozen=True)
class _State:
    """An iterate, with all that the steps from here on depend on."""

    tensors: list[Tensor]
    rebuild: Rebuild
    random: dict[torch.device, Tensor]
    versions: list[int]


class _Run:
    """The steps of one call: evaluates, counts and checks them."""

    def __init__(
        self,
        step: Callable[..., PyTree],
        start: PyTree,
        hparams: PyTree,
        batches: Callable[[int], Any] | None,
        with_time: bool,
        allow_detached: bool,
    ):
        self.step, self.batches, self.with_time, self.allow_detached = step, batches, with_time, allow_detached
        self.start, self.rebuild = split(start)
        if any(x.is_complex() for x in self.start):
            raise TypeError("start holds a complex tensor: pass torch.view_as_real of it")
        if not any(x.is_floating_point() for x in self.start):
            raise ValueError("start holds no floating point tensor")
        self.outer, self.names, self.hparams_tree = flatten(hparams, "hparams")
        self.differentiated = check_hparams(self.outer, self.names)
        self.hparams = self.hparams_tree(self.outer)
        self.devices = sorted({x.device for x in (*self.start, *self.outer) if x.device.type == "cuda"}, key=str)
        self.final: list[Tensor] = []
        self.final_rebuild = self.rebuild
        self.evaluations = 0
        self._random: dict[torch.device, Tensor] = {}

    def keep(self, tensors: list[Tensor], rebuild: Rebuild) -> _State:
        """A state to go on from; the random state is shared with the last one where nothing was drawn."""
        new = _random_state(self.devices)
        if not self._random or any(not torch.equal(new[d], self._random[d]) for d in new):
            self._random = new
        return _State(tensors, rebuild, self._random, [x._version for x in tensors])

    def restore(self, state: _State) -> list[Tensor]:
        """The leaves of a new graph at this state."""
        if [x._version for x in state.tensors] != state.versions:
            raise RuntimeError(IN_PLACE)
        _set_random_state(state.random)
        return [_leaf(x) for x in state.tensors]

    def evaluate(self, tensors: list[Tensor], rebuild: Rebuild, t: int) -> tuple[list[Tensor], Rebuild]:
        """Φ_t, checked: tensors like the start, with a graph, and nothing changed in place."""
        time = (t,) if self.with_time else ()
        batch = (self.batches(t),) if self.batches else ()
        guarded = [*tensors, *self.outer]
        versions = [x._version for x in guarded]
        self.evaluations += 1
        try:
            value = self.step(rebuild(tensors), self.hparams, *time, *batch)
        except RuntimeError as error:
            if "in-place operation" in str(error) or "inplace operation" in str(error):
                raise RuntimeError(IN_PLACE) from error
            raise
        if [x._version for x in guarded] != versions:
            raise RuntimeError(IN_PLACE)
        outputs, new_rebuild = split(value)
        if self.evaluations == 1:
            self.check_reached(tensors, outputs)
        if len(outputs) != len(self.start):
            raise ValueError(f"step must give the tensors that it gets: {len(self.start)}, got {len(outputs)}")
        for i, (x, due) in enumerate(zip(outputs, self.start, strict=True)):
            if (x.shape, x.dtype, x.device) != (due.shape, due.dtype, due.device):
                expected, got = (describe(y.shape, y.dtype, y.device) for y in (due, x))
                raise ValueError(
                    f"tensor {i} of step's result must be like the start's: expected {expected}, got {got}"
                )
            if x.is_floating_point() and not x.requires_grad and not self.allow_detached:
                raise ValueError(
                    f"tensor {i} of step's result (shape {tuple(x.shape)}) has no graph to params or hparams, so no "
                    f"gradient would pass: was it computed under no_grad, or with detach(), .data or .item()? "
                    f"If it is meant to be constant, pass allow_detached=True"
                )
        return outputs, new_rebuild

    def check_reached(self, tensors: list[Tensor], outputs: list[Tensor]) -> None:
        """Raise where step uses the live start that it closes over instead of what it is given."""
        live = [x for x in self.start if x.requires_grad and not any(x is y for y in self.outer)]
        floats = [x for x in tensors if x.requires_grad]
        if live and not _autodiff.depends(outputs, floats) and _autodiff.depends(outputs, live):
            raise ValueError(
                "step does not use the params that it is called with, but the live start: use its argument"
            )

    def advance(self, state: _State, begin: int, end: int, known: Mapping[int, _State] = NONE) -> _State:
        """The state after steps begin … end − 1, keeping no graph; from the last known state on the way, if any."""
        at = max((t for t in known if begin < t <= end), default=begin)
        begin, state = at, known.get(at, state)
        if begin == end:
            return state
        tensors, rebuild = self.restore(state), state.rebuild
        for t in range(begin, end):
            outputs, rebuild = self.evaluate([_leaf(x) for x in tensors], rebuild, t)
            tensors = [x.detach() for x in outputs]
            del outputs
        return self.keep(tensors, rebuild)

    def record(self, state: _State, begin: int, end: int) -> tuple[list[Tensor], list[Tensor], Rebuild]:
        """Leaves and outputs of the graph of steps begin … end − 1."""
        leaves, rebuild = self.restore(state), state.rebuild
        outputs = leaves
        for t in range(begin, end):
            inputs = [x if x.requires_grad else _leaf(x) for x in outputs]
            outputs, rebuild = self.evaluate(inputs, rebuild, t)
        return leaves, outputs, rebuild

    def measure(self, state: _State, begin: int) -> tuple[dict[int, _State], int]:
        """The states one and two steps on, and the bytes that the graph of the second keeps for itself."""
        _, middle, rebuild = self.record(state, begin, begin + 1)
        one = self.keep([x.detach() for x in middle], rebuild)
        seen: set[Any] = set()
        before = _autodiff.saved(middle, seen)
        inputs = [x if x.requires_grad else _leaf(x) for x in middle]
        outputs, rebuild = self.evaluate(inputs, rebuild, begin + 1)
        nodes = len(seen)
        sizes = _autodiff.saved(outputs, seen)
        own = sum(size for place, size in sizes.items() if place not in before)
        two = self.keep([x.detach() for x in outputs], rebuild)
        return {begin + 1: one, begin + 2: two}, own + NODE * max(len(seen) - nodes, 1)

    def outer_gradients(self, outer_loss: Callable[..., Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
        """E, ∇₁E and ∇₂E at the final iterate."""
        leaves = [_leaf(x) for x in self.final]
        loss = as_scalar(outer_loss(self.final_rebuild(leaves), self.hparams), "outer_loss")
        inputs = [x for x in leaves if x.requires_grad]
        both = self._vjp([loss], inputs, [torch.ones_like(loss)])
        alpha = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, both, strict=False)]
        return loss.detach().clone(), alpha, both[len(inputs) :]

    def pull(
        self, leaves: list[Tensor], outputs: list[Tensor], alpha: list[Tensor], grads: list[Tensor | None]
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """α ← ∂₁Φᵀ α and ∇ ← ∇ + ∂₂Φᵀ α over one block."""
        inputs = [x for x in leaves if x.requires_grad]
        both = self._vjp([y for y in outputs if y.is_floating_point()], inputs, alpha)
        alpha = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, both, strict=False)]
        return alpha, _add(grads, both[len(inputs) :])

    def _vjp(self, outputs: list[Tensor], inputs: list[Tensor], cotangents: list[Tensor]) -> list[Tensor | None]:
        # Between hparams that one network computes torch would free the network's graph as well.
        retain = not all(x.is_leaf for x in self.differentiated)
        return _autodiff.grad_or_none(outputs, [*inputs, *self.differentiated], cotangents, retain_graph=retain)

    def start_gradients(self, alpha: list[Tensor]) -> list[Tensor]:
        each = iter(alpha)
        return [next(each).clone() if x.is_floating_point() else torch.zeros_like(x) for x in self.start]

    def through_start(self, start_grads: list[Tensor], grads: list[Tensor | None]) -> list[Tensor | None]:
        """∇ ← ∇ + (∂w₀/∂λ)ᵀ α, where the start was computed from hparams."""
        if not _autodiff.depends(self.start, self.differentiated):
            return grads
        more = _autodiff.grad_or_none(self.start, self.differentiated, start_grads, retain_graph=True)
        return _add(grads, more)

    def hypergradient(self, grads: list[Tensor | None], complain: bool) -> PyTree:
        """∇ in the structure of hparams, in memory of its own; unreached leaves are zero, and said so."""
        if all(g is None for g in grads):
            raise ValueError(
                "neither step nor outer_loss depends on hparams: are they used from the argument, and as tensors (not "
                "through .item(), float() or .data)?"
            )
        named = [name for x, name in zip(self.outer, self.names, strict=True) if x.requires_grad]
        lost = [name for name, g in zip(named, grads, strict=True) if g is None]
        if lost and complain:
            warn(
                f"neither step nor outer_loss depends on {', '.join(lost)}, so the gradient there is zero: was it read "
                f"as a number (.item(), float(), .data)?"
            )
        each = iter(grads)
        full = [next(each) if x.requires_grad else None for x in self.outer]
        zipped = zip(full, self.outer, strict=True)
        return self.hparams_tree([torch.zeros_like(x) if g is None else g.clone() for g, x in zipped])


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_() if x.is_floating_point() else x


def _add(xs: Sequence[Tensor | None], ys: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [y if x is None else x if y is None else x + y for x, y in zip(xs, ys, strict=True)]
