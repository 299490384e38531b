"""Scalars of an iteration: numbers where reading them from the device is free, else tensors."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch
from torch import Tensor

# A scalar of an iteration: a number where reading is free, else a tensor, 0-d or [B]. Arithmetic with numbers costs
# nothing beside a small product; that with 0-d tensors does.
Scalar: TypeAlias = Any

FREE_TO_READ = ("cpu",)  # kinds of device on which reading a number waits for nothing


def read(scalar: Tensor) -> Scalar:
    """A 0-d tensor as a number, where reading is free."""
    return scalar.item() if not scalar.ndim and scalar.device.type in FREE_TO_READ else scalar


def where(condition: Any, a: Scalar, b: Scalar) -> Scalar:
    """a where the condition holds, else b."""
    return torch.where(condition, a, b) if isinstance(condition, Tensor) else (a if condition else b)


def anywhere(condition: Any) -> bool:
    """Whether a condition holds for any system."""
    return bool(condition.any() if isinstance(condition, Tensor) and condition.ndim else condition)


def larger(a: Scalar, b: Scalar) -> Scalar:
    """The larger one; NaN where a is NaN."""
    return torch.maximum(a, torch.as_tensor(b, dtype=a.dtype, device=a.device)) if isinstance(a, Tensor) else max(a, b)


def square_root(a: Scalar) -> Scalar:
    return a.sqrt() if isinstance(a, Tensor) else math.sqrt(a)


def ratio(a: Scalar, b: Scalar, known: Any = True) -> Scalar:
    """a / b where known, else 0; infinite for a number over 0."""
    if isinstance(known, Tensor):
        return torch.where(known, a / b, 0.0)
    if not known:
        return 0.0
    return a / b if isinstance(b, Tensor) or b else a * math.inf
