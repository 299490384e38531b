"""Where iterates are kept between the passes, and how much memory a piece of code takes."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, TypeAlias

import optree
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ._steps import VERSION, State

Put: TypeAlias = Callable[[State], Callable[[], State]]


@contextmanager
def kept(offload: str | os.PathLike[str] | None, tensors: Sequence[Tensor]) -> Iterator[Put]:
    """A function that puts a state away and gives the function that fetches it; files are gone at the end.

    A state's file is deleted as soon as nothing holds its fetch.
    """
    if offload is None:
        yield lambda state: lambda: state
    elif offload == "cpu":
        if all(x.device.type == "cpu" for x in tensors):
            raise ValueError('offload="cpu": the iterates are on the CPU already; pass a folder (pathlib.Path) or None')
        yield on_cpu
    elif isinstance(offload, os.PathLike):
        try:
            folder = tempfile.TemporaryDirectory(prefix="hypergrad-", dir=offload)
        except OSError as error:
            raise OSError(f"offload: cannot write in the folder {os.fspath(offload)!r}: {error}") from error
        with folder as path:
            yield partial(in_file, Path(path), count())
    else:
        raise ValueError(f'offload must be None, "cpu" or a folder as pathlib.Path, got {offload!r}')


def on_cpu(state: State) -> Callable[[], State]:
    """Tensors of other devices go to the CPU; from CUDA to pinned memory, in the order of its stream."""
    away, devices = [_on_cpu(x) for x in state.tensors], [x.device for x in state.tensors]
    versions, light = state.versions, replace(state, tensors=[])

    def fetch() -> State:
        back = [
            y if y.device == device else y.to(device, non_blocking=y.is_pinned())
            for y, device in zip(away, devices, strict=True)
        ]
        kept = [v if x is y else x._version for x, y, v in zip(back, away, versions, strict=True)]
        return replace(light, tensors=back, versions=kept)

    return fetch


def _on_cpu(x: Tensor) -> Tensor:
    if x.device.type == "cpu":
        return x
    return torch.empty_like(x, device="cpu", pin_memory=x.is_cuda).copy_(x, non_blocking=x.is_cuda)


def in_file(folder: Path, number: Iterator[int], state: State) -> Callable[[], State]:
    """Tensors go to a file, with their strides and devices."""
    path = folder / f"{next(number)}.pt"
    try:
        with path.open("wb") as file:
            torch.save(state.tensors, file)
    except (OSError, RuntimeError) as error:
        size = sum(x.nbytes for x in state.tensors)
        raise OSError(
            f"offload: could not write an iterate of {size} bytes in {str(folder.parent)!r}; is the disk full? "
            f"({error})"
        ) from error
    light = replace(state, tensors=[])

    def fetch() -> State:
        tensors = torch.load(path, weights_only=True)
        return replace(light, tensors=tensors, versions=list(map(VERSION, tensors)))

    weakref.finalize(fetch, path.unlink, missing_ok=True)
    return fetch


class Allocated(TorchDispatchMode):
    """Bytes of the tensors made in the block that are alive: `now`, and at most (`peak`).

    By what operations return; what a kernel takes and gives back inside is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x._cdata for x in _storages((args, kwargs))}
        for storage in _storages(result):
            place, size = storage._cdata, storage.nbytes()
            if place not in given and place not in self._alive:
                self._alive[place] = weakref.ref(storage, partial(self._free, place, size))
                self.now += size
        self.peak = max(self.peak, self.now)
        return result

    def _free(self, place: int, size: int, _: object) -> None:
        del self._alive[place]
        self.now -= size

    def taken(self, call: Callable[[], object]) -> int:
        """The most bytes beyond those alive before that the call had alive at once."""
        before, self.peak = self.now, self.now
        call()
        return self.peak - before

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled code runs as it does without this mode, for it must give the same numbers at a replay."""
        return True


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    leaves = optree.tree_leaves(tree)
    return [x.untyped_storage() for x in leaves if isinstance(x, Tensor) and x.layout is torch.strided]
