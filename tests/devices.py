"""Counts the reads of numbers from a device, and simulates an accelerator by torch's "meta" device.

On the meta device itself nothing is computed, and reading a number raises. Here a twin on the CPU holds the numbers of
each storage, so that code which reads them runs too. Mixing the CPU's tensors or generators with the device's raises.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

READS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2")
MIXED = ("copy_", "_to_copy", "index", "index_put_", "_index_put_impl_")  # may mix tensors of the CPU and a device


class Device(TorchDispatchMode):
    """Counts in `reads` how often the CPU waits for numbers of the device; within it "meta" tensors have numbers."""

    def __init__(self, kind: str = "meta") -> None:
        super().__init__()
        self.kind, self.reads = kind, 0
        self._twins: dict[int, tuple[Any, Any]] = {}  # address of a storage: (the storage, to keep it alive; its twin)
        self._python_numbers = _PythonNumbers()

    def __enter__(self) -> Device:
        self._python_numbers.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._python_numbers.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = any(x.device.type == self.kind for x in given)
        target = torch.device(kwargs.get("device") or (self.kind if there else "cpu")).type
        leaves = target == "cpu" or (name == "copy_" and args[0].device.type == "cpu")
        self.reads += there and (name in READS or leaves)
        if self.kind != "meta" or not (there or target == "meta"):
            return func(*args, **kwargs)
        if there and name not in MIXED and any(x.ndim and not x.is_meta for x in given):
            raise RuntimeError(f"{name}: tensors of two devices, of shapes {[tuple(x.shape) for x in given]}")
        if target == "meta" and getattr(kwargs.get("generator"), "device", torch.device("meta")).type == "cpu":
            raise RuntimeError(f"{name}: a generator of the CPU for a tensor of the device")
        return self._computed(func, args, kwargs, target)

    def _computed(self, func: Any, args: Any, kwargs: Any, target: str) -> Any:
        plain_args, plain = tree_map(self.on_cpu, (args, kwargs))
        result = func(*plain_args, **(plain | {"device": torch.device("cpu")} if "device" in kwargs else plain))
        returned = [each.alias_info for each in func._schema.returns]
        if func._schema.is_mutable:
            return kwargs.get("out", args[0]) if returned else None
        if any(returned):  # a view of the same storage
            return func(*args, **kwargs)
        return result if target == "cpu" else tree_map(self.on_meta, result)

    def on_meta(self, x: Any) -> Any:
        """A tensor on "meta" whose twin holds the numbers of x."""
        if not isinstance(x, Tensor):
            return x
        with _disable_current_modes():
            new = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
            storage = new.untyped_storage()
            self._twins[storage._cdata] = (storage, torch.UntypedStorage(storage.nbytes(), device="cpu"))
            self.on_cpu(new).copy_(x.detach())
            return new

    def on_cpu(self, x: Any) -> Any:
        """A tensor on "meta" as a view of its twin on the CPU. This is not counted as a read."""
        if not isinstance(x, Tensor) or not x.is_meta:
            return x
        with _disable_current_modes():
            twin = self._twins[x.untyped_storage()._cdata][1]
            return torch.empty(0, dtype=x.dtype, device="cpu").set_(twin, x.storage_offset(), x.shape, x.stride())


class _PythonNumbers(TorchFunctionMode):
    """Puts numbers from Python into tensors on "meta" by way of the CPU, because torch itself would drop them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") and not isinstance(args[0], Tensor):
            return func(*args, **kwargs | {"device": "cpu"}).to(kwargs["device"])
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[1], list):
            args = (args[0], torch.tensor(args[1], device="cpu"), *args[2:])
        return func(*args, **kwargs)
