"""The user's batches, and the losses of their rows."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def as_rows(losses: Any, name: str) -> Tensor:
    if not isinstance(losses, Tensor) or losses.ndim != 1 or not losses.is_floating_point():
        got = f"shape {tuple(losses.shape)}, {losses.dtype}" if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(
            f"{name} must give a tensor [rows] with the loss of each example of the batch, got {got}: leave out the "
            f'mean (reduction="none"), and put terms that belong to no example into penalty'
        )
    return losses


def batches_of(source: Any) -> Any:
    """The iterable for one pass; a function is called to make it."""
    return source() if callable(source) else source
