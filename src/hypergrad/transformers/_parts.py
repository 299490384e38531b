"""The part of each of several processes: its rows of a batch, and its shards of a tracker's state under FSDP2."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import optree
from torch import Tensor
from torch.utils.data import BatchSampler, RandomSampler

from ..bilevel import Tracker


class PartOfBatches(BatchSampler):
    """The rows of one process from each batch of all processes."""

    def __init__(self, sampler: RandomSampler, size: int, rank: int, ranks: int):
        super().__init__(sampler, size * ranks, drop_last=True)
        self.rank, self.ranks = rank, ranks

    def __iter__(self) -> Iterator[list[int]]:
        for batch in super().__iter__():
            yield batch[self.rank :: self.ranks]


def whole(state: Any) -> Any:
    """A tracker's state with its sharded tensors gathered to the CPU, one after another."""
    return optree.tree_map(lambda x: x.full_tensor().cpu() if hasattr(x, "placements") else x, state)


def sharded_as(tracker: Tracker, state: dict[str, Any]) -> dict[str, Any]:
    """A tracker's state of whole tensors, sharded like the tensors of this tracker."""
    from torch.distributed.tensor import distribute_tensor

    def like(x: Any, whole: Any) -> Any:
        if not isinstance(whole, Tensor) or not hasattr(x, "placements") or whole.shape != x.shape:
            return whole
        return distribute_tensor(whole.to(x.device), x.device_mesh, x.placements)

    state = dict(state)
    for name in ("variables", "grads"):
        state[name] = [like(x, whole) for x, whole in zip(tracker.variables, state[name], strict=True)]
    if tracker.optimizer is not None:
        moved = [x for group in tracker.optimizer.param_groups for x in group["params"]]
        of_each = state["optimizer"]["state"]
        kept = {i: {name: like(moved[i], x) for name, x in values.items()} for i, values in of_each.items()}
        state["optimizer"] = state["optimizer"] | {"state": kept}
    return state
