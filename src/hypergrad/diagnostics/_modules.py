"""What an evaluation of a module would change, and what of it is in training mode."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


def active_dropout(modules: Iterable[nn.Module]) -> list[str]:
    """Names of the submodules in training mode that drop something."""
    names = []
    for module in modules:
        for name, part in module.named_modules():
            rate = getattr(part, "p", 0.0) if "Dropout" in type(part).__name__ else getattr(part, "dropout", 0.0)
            if part.training and isinstance(rate, float) and rate > 0:
                names.append(f"{type(module).__name__}{'.' * bool(name)}{name} ({type(part).__name__})")
    return names


def random_state(devices: Iterable[torch.device]) -> list[bytes]:
    """torch's random state, on the CPU and these devices."""
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(index) for index in _cuda(devices))]
    return [bytes(state.tolist()) for state in states]


def _cuda(devices: Iterable[torch.device]) -> list[int]:
    return sorted({device.index or 0 for device in devices if device.type == "cuda"})


@contextmanager
def unchanged(modules: Iterable[nn.Module], devices: Iterable[torch.device]) -> Iterator[None]:
    """The modules' buffers and torch's random state, on the CPU and these devices, are put back afterwards."""
    buffers = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]
    try:
        with torch.random.fork_rng(_cuda(devices)):
            yield
    finally:
        with torch.no_grad():
            for buffer, kept in buffers:
                if not torch.equal(buffer, kept):
                    buffer.copy_(kept)
