"""What theory says of solvers on a system of known structure: the terms of `valid_for` and `products_needed`."""

from __future__ import annotations

import math
from typing import Protocol


class SystemStructure(Protocol):
    """The part of a `diagnostics.Structure` that solvers read. J = I − A."""

    @property
    def n(self) -> int: ...
    @property
    def symmetric(self) -> bool: ...
    @property
    def singular(self) -> bool: ...
    @property
    def definiteness(self) -> str: ...
    @property
    def eigenvalues(self) -> tuple[float, ...] | tuple[complex, ...]: ...
    @property
    def condition(self) -> float: ...
    @property
    def radius(self) -> float: ...
    @property
    def contraction(self) -> float: ...


def steps_needed(rate: float, rtol: float, factor: float = 1.0) -> int | None:
    """The least k ≥ 1 with factor · rate^k ≤ rtol; None where there is none."""
    if rate >= 1 or math.isnan(rate):
        return None
    if rate <= 0:
        return 1
    return max(1, math.ceil(math.log(rtol / factor) / math.log(rate)))


def rate_of(condition: float) -> float:
    """(κ − 1)/(κ + 1)."""
    return 1.0 if math.isinf(condition) else (condition - 1) / (condition + 1)


def doubled(steps: int | None) -> int | None:
    """Products of so many steps that take two each."""
    return None if steps is None else 2 * steps
