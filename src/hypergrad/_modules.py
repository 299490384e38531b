"""The nn.Modules that a callable can be seen to use, names of their tensors, and properties of normalisation layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ._reach import reached

INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


def modules_of(*functions: Any) -> list[nn.Module]:
    """Modules in closures, defaults, partials, bound methods, callable objects' attributes and globals used by name."""
    return [each for each in reached(functions) if isinstance(each, nn.Module)]


def name_of(leaf: Tensor, user: Any) -> str:
    """A text that identifies a tensor: its shape, and its name if a module that the user's callable uses holds it."""
    for module in modules_of(user):
        for name, parameter in module.named_parameters():
            if parameter is leaf:
                return f"{name} of a {type(module).__name__}, of shape {tuple(leaf.shape)}"
    return f"of shape {tuple(leaf.shape)}"


def records_statistics(module: nn.Module) -> bool:
    """Whether an evaluation writes running statistics: BatchNorm or InstanceNorm in training mode."""
    return module.training and bool(getattr(module, "track_running_stats", False))


def couples_samples(module: nn.Module) -> bool:
    """Whether a normalisation uses its batch's statistics: BatchNorm in training mode or without running statistics."""
    if not hasattr(module, "running_mean") or isinstance(module, INSTANCE_NORMS):
        return False
    return module.training or not getattr(module, "track_running_stats", True)


def statistics_of(closure: Any) -> list[tuple[Tensor, Tensor]]:
    """Running statistics and copies of them, for modules in any mode, since the closure may switch the mode."""
    parts = {id(part): part for module in modules_of(closure) for part in module.modules()}.values()
    modules = [part for part in parts if getattr(part, "track_running_stats", False)]
    return [(buffer, buffer.clone()) for module in modules for buffer in module.buffers(recurse=False)]


def changed(kept: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The running statistics that no longer have the values that `statistics_of` copied."""
    return [buffer for buffer, values in kept if not torch.equal(buffer, values)]


def put_back(kept: list[tuple[Tensor, Tensor]]) -> None:
    """Give running statistics the values that `statistics_of` copied."""
    for buffer, values in reversed(kept):  # the oldest copies last
        buffer.data.copy_(values)  # hidden from autograd, because no graph in training mode uses running statistics
