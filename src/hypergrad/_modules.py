"""The nn.Modules that a callable can be seen to use, names of their tensors, and properties of normalisation layers."""

from __future__ import annotations

from typing import Any

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
