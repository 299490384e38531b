"""torch's random state: read, put back, and kept where a call ends in an error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def random_state(leaves: Iterable[Any] = ()) -> Callable[[], None]:
    """A function that puts the random state back: that of the CPU and of the CUDA devices where these leaves are."""
    devices = {leaf.device for leaf in leaves if isinstance(leaf, Tensor) and leaf.device.type == "cuda"}
    generator = torch.default_generator
    # A clone takes half the memory of the state as a tensor.
    kept = generator.clone_state() if hasattr(generator, "clone_state") else None
    state = torch.get_rng_state() if kept is None else None
    cuda = {device: torch.cuda.get_rng_state(device) for device in devices}

    def restore() -> None:
        torch.set_rng_state(kept.get_state() if kept is not None else state)
        for device, numbers in cuda.items():
            torch.cuda.set_rng_state(numbers, device)

    return restore


@contextmanager
def random_state_kept_on_error(leaves: Iterable[Any]) -> Iterator[None]:
    """Put the random state back if an error leaves a half-done call."""
    restore = random_state(leaves)
    try:
        yield
    except BaseException:
        restore()
        raise
