"""Several outer losses in one reverse pass through the steps."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .._tree import PyTree
from ._reverse import ReverseResult, check_storage, differentiated
from ._steps import Batches, Run


def jacobian(
    step: Callable[..., PyTree],
    start: PyTree,
    hparams: PyTree,
    outer_losses: Callable[[PyTree, PyTree], Tensor],
    steps: int,
    *,
    memory: str = "sqrt",
    checkpoints: int | None = None,
    batches: Batches = None,
    with_time: bool = False,
    allow_detached: bool = False,
) -> ReverseResult:
    """Gradients of k outer losses E₁ … E_k through T steps, in one reverse pass that uses each step's graph for all.

    Args:
        outer_losses: E(params, hparams) ↦ [k].
        step, start, hparams, steps, memory, checkpoints, batches, with_time, allow_detached: as in `reverse`.

    Returns: a ReverseResult whose grads and start_grads have a leading axis k in every leaf; outer_value is [k].
    Raises: as `reverse`; ValueError for losses that are not of shape [k].
    Warns: as `reverse`.
    Cost: the evaluations of `reverse`; reverse passes with k cotangents at once, vectorised where torch can. Memory: k
        gradients with respect to the iterate and k with respect to hparams, which a budget includes.

    Example:
        >>> lam = torch.tensor(2.0, requires_grad=True)
        >>> result = jacobian(
        ...     lambda w, lam: w / 2 + lam, torch.tensor(0.0), lam, lambda w, lam: torch.stack([w, w**2]), steps=3
        ... )
        >>> result.grads, result.outer_value
        (tensor([ 1.7500, 12.2500]), tensor([ 3.5000, 12.2500]))
    """
    run = Run(step, outer_losses, start, hparams, batches, steps, with_time, allow_detached)
    run.several = True
    check_storage(memory, checkpoints)
    return differentiated(run, steps, None, (memory, checkpoints))
