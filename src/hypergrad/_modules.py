"""The nn.Modules that a callable can be seen to use, names of their tensors, and properties of normalisation layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ._reach import reached
from ._torch import version_of

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


def statistics_of(closure: Any) -> list[Tensor]:
    """The running statistics of modules in any mode, since the closure may switch the mode."""
    modules = [part for part in _parts(closure) if getattr(part, "track_running_stats", False)]
    return [buffer for module in modules for buffer in module.buffers(recurse=False)]


def _parts(closure: Any) -> list[nn.Module]:
    return list({id(part): part for module in modules_of(closure) for part in module.modules()}.values())


class Buffers:
    """The buffers of modules that functions use, which evaluations may write, with copies of their values."""

    def __init__(self, functions: Any):
        found = {id(x): x for part in _parts(functions) for x in part.buffers(recurse=False) if not is_lazy(x)}
        self.tensors = list(found.values())
        self.versions, self.values = list(map(version_of, self.tensors)), [x.clone() for x in self.tensors]
        self._statistics = set(map(id, statistics_of(functions)))  # torch does not count writes into these

    def copies(self) -> list[Tensor]:
        """Copies of the present values. The copy of a buffer that was not written since the last call is shared."""
        each = zip(self.tensors, self.versions, self.values, strict=True)
        self.values = [value if self._unwritten(x, version, value) else x.clone() for x, version, value in each]
        self.versions = list(map(version_of, self.tensors))
        return self.values

    def _unwritten(self, x: Tensor, version: int, value: Tensor) -> bool:
        return version_of(x) == version and (id(x) not in self._statistics or torch.equal(x, value))

    def restore(self, values: list[Tensor]) -> None:
        """Give the buffers values that `copies` returned."""
        with torch.no_grad():
            for x, present, value in zip(self.tensors, self.copies(), values, strict=True):
                if value is not present:  # no graph in training mode uses running statistics
                    (x.data if id(x) in self._statistics else x).copy_(value)
        self.values, self.versions = values, list(map(version_of, self.tensors))
