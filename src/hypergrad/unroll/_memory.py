"""Where iterates are kept between the passes, and how many bytes a piece of code takes."""

from __future__ import annotations

import os
import re
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, TypeAlias

import optree
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .. import _random
from .._torch import version_of
from ._steps import Iterate, Run, is_continuous

Store: TypeAlias = Callable[
    [Iterate], Callable[[], Iterate]
]  # keeps an iterate, and gives the function that fetches it
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def parse_bytes(text: Any) -> float | None:
    """The number of bytes of a text such as "64MiB", in B, KB, MB, GB, KiB, MiB or GiB; None for anything else."""
    number = re.fullmatch(r"(\d+\.?\d*) ?([KMG]i?B|B)", text) if isinstance(text, str) else None
    return None if number is None else float(number[1]) * UNITS[number[2]]


@contextmanager
def elsewhere(offload: Any, tensors: Sequence[Tensor]) -> Iterator[Store]:
    """What keeps iterates on the CPU or in files, which are gone at the end.

    The file of an iterate is deleted as soon as nothing holds the function that fetches it.
    """
    if offload == "cpu":
        if all(x.device.type == "cpu" for x in tensors):
            raise ValueError('offload="cpu": the iterates are on the CPU already; pass a folder (pathlib.Path) or None')
        yield on_cpu
    elif isinstance(offload, os.PathLike):
        if any(hasattr(x, "to_local") for x in tensors):
            raise ValueError("offload: files take no sharded tensors; pass None")
        try:
            folder = tempfile.TemporaryDirectory(prefix="hypergrad-", dir=offload)
        except OSError as error:
            raise OSError(f"offload: cannot write in the folder {os.fspath(offload)!r}: {error}") from error
        with folder as path:
            yield partial(in_file, Path(path), count())
    else:
        raise ValueError(f'offload must be None, "cpu" or a folder as pathlib.Path, got {offload!r}')


def on_cpu(iterate: Iterate) -> Callable[[], Iterate]:
    """Tensors of other devices go to the CPU; from CUDA to pinned memory, in the order of its stream."""
    away = [
        x
        if x.device.type == "cpu"
        else torch.empty_like(x, device="cpu", pin_memory=x.is_cuda).copy_(x, non_blocking=x.is_cuda)
        for x in iterate.tensors
    ]
    devices, versions, light = [x.device for x in iterate.tensors], iterate.versions, iterate._replace(tensors=[])

    def fetch() -> Iterate:
        pairs = zip(away, devices, strict=True)
        back = [y if y.device == device else y.to(device, non_blocking=y.is_pinned()) for y, device in pairs]
        kept = [v if x is y else version_of(x) for x, y, v in zip(back, away, versions, strict=True)]
        return light._replace(tensors=back, versions=kept)

    return fetch


def in_file(folder: Path, number: Iterator[int], iterate: Iterate) -> Callable[[], Iterate]:
    """Tensors go to a file, and come back with their strides and devices.

    As plain bytes: the torch.save of some versions keeps what it wrote in memory.
    """
    path, light = folder / f"{next(number)}.bin", iterate._replace(tensors=[])
    kinds = [(torch.empty_like(x, device="meta"), x.device) for x in iterate.tensors]
    try:
        with path.open("wb") as file:
            for x, (like, _) in zip(iterate.tensors, kinds, strict=True):
                buffer = bytearray(x.nbytes)
                _view(buffer, like).copy_(x)
                file.write(buffer)
    except OSError as error:
        size = sum(x.nbytes for x in iterate.tensors)
        raise OSError(
            f"offload: could not write an iterate of {size} bytes in {str(folder.parent)!r}; is the disk full? "
            f"({error})"
        ) from error

    def fetch() -> Iterate:
        with path.open("rb") as file:
            tensors = [_view(bytearray(file.read(like.nbytes)), like).to(device) for like, device in kinds]
        return light._replace(tensors=tensors, versions=list(map(version_of, tensors)))

    weakref.finalize(fetch, path.unlink, missing_ok=True)
    return fetch


def _view(buffer: bytearray, like: Tensor) -> Tensor:
    """The memory of a buffer as a tensor of this shape, dtype and strides."""
    if not buffer:
        return torch.empty_like(like, device="cpu")
    return torch.frombuffer(buffer, dtype=like.dtype).as_strided(like.shape, like.stride())


def available(run: Run, first: Iterate, begin: int, budget: float) -> tuple[int, int, float]:
    """Bytes of an iterate and of a step's graph, and how many of the budget are left for both."""

    def pull() -> None:
        alpha = [torch.zeros_like(y) for y in both.outputs if is_continuous(y)]
        run.pull(both, alpha, [torch.zeros_like(x) for x in run.differentiated], retain=True)

    with Allocated() as allocated:
        iterate, graph, both = run.measure(first, begin)
        random = _random.capture(run.devices)
        after, most = allocated.now, allocated.peak
        final = [y.detach() for y in both.outputs]
        ahead = max(allocated.taken(pull), allocated.taken(lambda: run.close(final, both.rebuild)))
        _random.restore(random)
    params, hparams, drawn = (sum(x.nbytes for x in xs) for xs in (first.tensors, run.differentiated, random.values()))
    # Beside the checkpoints: the iterate that a block must end in, its outputs, α, w_T and an iterate on its way; ∇;
    # and the random state where it is kept by run and by those who put it back.
    working = 5 * params + hparams + 5 * drawn + max(most - after, ahead)
    least = max(working + graph + iterate, params + hparams + 5 * drawn + max(most, after + ahead))
    if budget < least:
        raise ValueError(f"a budget of {budget:.0f} bytes is too small: one step needs about {least:.0f}")
    return iterate, graph, budget - working


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
    leaves: list[Any] = [x for x in optree.tree_leaves(tree) if isinstance(x, Tensor) and x.layout is torch.strided]
    # Of a sharded tensor this rank's part.
    return [(x.detach().to_local() if hasattr(x, "to_local") else x).untyped_storage() for x in leaves]
