"""torch's random state: captured, restored and replayed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def devices_of(leaves: Iterable[Any]) -> list[torch.device]:
    """The CUDA devices of these leaves. The CPU is not listed, because `capture` always includes it."""
    return sorted({x.device for x in leaves if isinstance(x, Tensor) and x.is_cuda}, key=str)


def capture(devices: Iterable[torch.device] = ()) -> dict[torch.device, Tensor]:
    """The random states of the CPU and of these CUDA devices, to be compared or restored."""
    states = {torch.device("cpu"): torch.get_rng_state()}
    return states | {device: torch.cuda.get_rng_state(device) for device in devices}


def restore(states: Mapping[torch.device, Tensor]) -> None:
    """Put back the states that `capture` returned, so that the same numbers are drawn again."""
    for device, state in states.items():
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, device)


def equal(states: Mapping[torch.device, Tensor], others: Mapping[torch.device, Tensor]) -> bool:
    """Whether nothing was drawn between two captures on the same devices."""
    return all(torch.equal(state, others[device]) for device, state in states.items())


@contextmanager
def replayed(states: Mapping[torch.device, Tensor]) -> Iterator[None]:
    """The random numbers drawn after a capture are drawn again in this context; then the present state is restored."""
    now = capture(device for device in states if device.type == "cuda")
    restore(states)
    try:
        yield
    finally:
        restore(now)
