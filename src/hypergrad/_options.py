"""Checks of options that users give (whole numbers, bytes, batches), and progress bars."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

Batches: TypeAlias = "Sequence[Any] | Callable[[int], Any] | None"

LONG = 3.0  # seconds after which a bar appears that was not asked for
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def parse_bytes(text: Any) -> float | None:
    """The number of bytes of a text such as "64MiB", in B, KB, MB, GB, KiB, MiB or GiB; None for anything else."""
    number = re.fullmatch(r"(\d+\.?\d*) ?([KMG]i?B|B)", text) if isinstance(text, str) else None
    return None if number is None else float(number[1]) * UNITS[number[2]]


def memory_bytes(memory: Any, name: str) -> float:
    """The number of bytes that is given as a number or as a text. Raises ValueError for anything else."""
    found = parse_bytes(memory) if isinstance(memory, str) else memory
    if isinstance(found, bool) or not isinstance(found, (int, float)) or found < 0:
        raise ValueError(f'{name} must be bytes, as a number or like "64MiB", got {memory!r}')
    return float(found)


def batch_at(batches: Batches, steps: int) -> Callable[[int], Any] | None:
    """Batches, given by index or by call, as a function of t."""
    if batches is None or callable(batches):
        return batches
    if not hasattr(batches, "__getitem__") or not hasattr(batches, "__len__"):
        raise TypeError(
            f"batches must be a sequence or a function of t (in reverse mode a batch is drawn again at a replay), got "
            f"{type(batches).__name__}: pass list(...), or in forward mode lambda t: next(iterator)"
        )
    if len(batches) < steps:
        raise ValueError(f"{steps} steps need as many batches, got {len(batches)}; batches may be a function of t")
    return batches.__getitem__


def check_whole(**numbers: tuple[Any, int]) -> None:
    """Raise ValueError for name=(value, least) if the value is neither None nor a whole number ≥ least."""
    for name, (value, least) in numbers.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ValueError(f"{name} must be a whole number ≥ {least}, got {value!r}")


def progress_bar(
    wanted: bool | None,
    items: Any = None,
    *,
    desc: str,
    total: int | None = None,
    unit: str = "it",
    leave: bool = False,
) -> Any:
    """tqdm's bar over items, or only the items. wanted=None: a bar on a terminal after LONG seconds, if tqdm exists."""
    if wanted is not None and not wanted:
        return items
    try:
        from tqdm.auto import tqdm
    except ImportError:
        if wanted is None:
            return items
        raise ImportError("progress=True needs tqdm: pip install tqdm") from None
    quiet: dict[str, Any] = {} if wanted else {"delay": LONG, "disable": None}
    return tqdm(items, desc=desc, total=total, unit=unit, leave=leave, **quiet)
