"""Forward mode through the steps: tangents go along with the iterate, and nothing of the past is kept.

Z₀ = ∂w₀/∂λ,   Z_{t+1} = ∂₁Φ_t Z_t + ∂₂Φ_t;   ∇f(λ) = Z_Tᵀ ∇₁E(w_T, λ) + ∇₂E(w_T, λ)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .. import _torch
from .._random import random_state_kept_on_error
from .._recorded import NotCompiled
from .._solution import warn
from .._tree import PyTree
from ._compiled import AS_IT_IS, checked_backend
from ._compiled_push import CompiledPush
from ._steps import Batches, Run, add, check_whole, leaf
from ._tangents import Push, Tangents, checked

COMPLEX = (
    "forward mode takes no complex tensors: use unroll.reverse, or pass torch.view_as_real(x) and use "
    "torch.view_as_complex in step"
)


@dataclass(frozen=True)
class ForwardResult:
    """A hypergradient through the steps so far, and what a later call needs to go on from here.

    Attributes:
        grads: ∇f(λ), in the structure of hparams; zeros for a leaf that does not require grad or reaches nothing.
        params: w_t, in the start's structure.
        outer_value: E(w_t, λ).
        evaluations: how often this call called step.
        steps: t, the steps since the start, in this call and those before.
        tangents: Z = ∂w_t/∂λ.
        compiled: what was compiled, and how long that took; None where nothing was.
    """

    grads: PyTree
    params: PyTree
    outer_value: Tensor
    evaluations: int
    steps: int
    tangents: Tangents
    compiled: str | None = None


def forward(
    step: Callable[..., PyTree],
    start: PyTree | ForwardResult,
    hparams: PyTree,
    outer_loss: Callable[[PyTree, PyTree], Tensor],
    steps: int,
    *,
    chunk: int | None = None,
    batches: Batches = None,
    with_time: bool = False,
    allow_detached: bool = False,
    compile: bool | str = False,
) -> ForwardResult:
    """Gradient of E(w_T(λ), λ) through T steps of w_{t+1} = Φ_t(w_t, λ), in forward mode. Writes no .grad.

        Z₀ = ∂w₀/∂λ,      Z_{t+1} = ∂₁Φ_t Z_t + ∂₂Φ_t,      ∇f(λ) = ∇₂E(w_T, λ) + Z_Tᵀ ∇₁E(w_T, λ)

    The numbers are those of `reverse`. Memory does not depend on T; memory and time are proportional to the number of
    hyperparameters. Nothing is evaluated twice: random numbers are drawn as in a plain run of the steps, a batch is
    drawn once and in order, and what no replay could repeat (an iterator, a simulator) may be used in step. In the
    inner gradient write create_graph=True: without it second derivatives are lost, with a warning.

    Online: a result is also a start. `forward(step, result, hparams, outer_loss, more)` goes on where it ended, and
    hparams may be updated in between (real-time mode). The tangents are kept through such an update: grads is then the
    derivative at δ = 0 of E(w_t(λ₀+δ, …, λ_{t−1}+δ), λ_t+δ), for a shift δ of all that λ has been.

    Sharing: a schedule with one value for each window of steps, `PerStep(λ.repeat_interleave(length))`, has few
    hyperparameters however many steps there are; a tangent costs nothing before the first step that depends on it.

    Args:
        step, outer_loss, hparams, with_time, allow_detached: as in `reverse`; no complex tensors.
        start: w₀ as in `reverse`, or an earlier result, to go on from.
        steps: T, or how many more.
        chunk: how many tangents are pushed through a step in one vectorised pass, in as many times the memory of a
            step's graph; by default about a million numbers' worth, and at least one.
        compile: as in `reverse`: step and its derivative along a chunk of tangents, one compiled function. The tangents
            of all hyperparameters are kept from the start. A step is evaluated once for each chunk.
        batches: batch t for step t, by index or by call; t is counted from the start, not from an earlier result.

    Returns:
        A ForwardResult.

    Raises, Warns: as `reverse`; RuntimeError too where an operation in step cannot be differentiated as often as
        forward mode needs, once more than `reverse`.
    Cost: for each step its evaluation, a reverse pass with a graph, and a reverse pass through that for each tangent
        (vectorised over a chunk): measured, 2.3 + 1.5k times the step alone for k tangents of an MLP's 270,000
        weights. Memory: three iterates a tangent, the graph of one step, and `chunk` times the working memory of its
        reverse pass. While some hyperparameters have reached nothing yet, one device synchronisation a step. At t = 0,
        1, 2, 4, 8, … the derivative is compared with its transpose (two synchronisations).
    Source: Franceschi et al. 2017, section 3.2 (forward-HG) and 3.3 (real-time, RTHO); Micaelli and Storkey 2021
        (sharing over windows, FDS).

    Example:
        w ← w / 2 + λ from 0 gives w₃ = 1.75 λ, and three steps later w₆ = 1.96875 λ.

        >>> lam = torch.tensor(2.0, requires_grad=True)
        >>> result = forward(lambda w, lam: w / 2 + lam, torch.tensor(0.0), lam, lambda w, lam: w, steps=3)
        >>> result.grads
        tensor(1.7500)
        >>> forward(lambda w, lam: w / 2 + lam, result, lam, lambda w, lam: w, steps=3).grads
        tensor(1.9688)
    """
    check_whole(steps=(steps, 0), chunk=(chunk, 1))
    backend = checked_backend(compile)
    earlier = start if isinstance(start, ForwardResult) else None
    begin, begun = (0, start) if earlier is None else (earlier.steps, earlier.params)
    run = Run(step, outer_loss, begun, hparams, batches, begin + steps, with_time, allow_detached)
    if any(x.is_complex() for x in (*run.start, *run.outer)):
        raise TypeError(COMPLEX)
    with random_state_kept_on_error([*run.start, *run.outer]):
        with run.differentiating():
            push = Push(run, chunk)
            tangents = push.start() if earlier is None else checked(earlier.tangents, run)
            tensors = [x.detach().clone() for x in run.start]
            times = range(begin, begin + steps)
            tensors, rebuild, tangents, compiled = _pushed(run, push, tensors, tangents, times, backend)
            # What step gave may be a leaf of hparams, which will be updated in place.
            alpha, direct = run.close([x.clone() for x in tensors], rebuild)
        return ForwardResult(
            grads=run.hypergradient(add(direct, tangents.gradient(alpha)), complain=True),
            params=run.params,
            outer_value=run.outer_value,
            evaluations=run.evaluations,
            steps=begin + steps,
            tangents=tangents,
            compiled=compiled,
        )


def _pushed(
    run: Run, push: Push, tensors: list[Tensor], tangents: Tangents, times: range, backend: str | None
) -> tuple[list[Tensor], Any, Tangents, str | None]:
    """w and its container, Z, and what was compiled, after these steps."""
    rebuild, compiled = run.rebuild, None
    for t in times:
        try:
            if backend:
                compiled = compiled or CompiledPush(run, backend, push)
                tensors, tangents = compiled(tensors, tangents, t)
                continue
        except NotCompiled as error:
            warn(AS_IT_IS.format(error), NotCompiled)
            backend = compiled = None
        leaves = [leaf(x) for x in tensors]
        with _torch.differentiated_rightly(dense=True):
            outputs, rebuild = run.evaluate(leaves, rebuild, t)
        tangents = push(tangents, leaves, outputs, check=t & (t - 1) == 0)
        tensors = [x.detach() for x in outputs]
        del leaves, outputs
    return tensors, rebuild, tangents, compiled and compiled.report
