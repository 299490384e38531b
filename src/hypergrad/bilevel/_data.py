"""Endless iteration over batches, in an order that a resumed run repeats."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

import torch

Item = TypeVar("Item")


class cycle(Generic[Item]):
    """An endless iterator over a DataLoader (or another iterable that can be iterated again).

    Each pass iterates over it again, so a shuffled loader shuffles again.

    Args:
        loader: the iterable; not an iterator, which ends after one pass.

    Example:
        >>> batches = cycle([1, 2, 3])
        >>> [next(batches) for _ in range(5)]
        [1, 2, 3, 1, 2]
    """

    def __init__(self, loader: Iterable[Item]):
        if isinstance(loader, Iterator):
            raise TypeError("cycle needs an iterable that can be repeated (a DataLoader, a list), not an iterator")
        self.loader, self.passes, self.position = loader, 0, 0
        self._items: Iterator[Item] | None = None
        self._random: list[torch.Tensor] | None = None  # states of the generators before this pass

    def __iter__(self) -> cycle[Item]:
        return self

    def __next__(self) -> Item:
        if self._items is None:
            self._begin()
        assert self._items is not None
        try:
            item = next(self._items)
        except StopIteration:
            if not self.position:
                raise ValueError("the loader is empty, so cycle has no item to return") from None
            self.passes += 1
            self._begin()
            return next(self)
        self.position += 1
        return item

    def _begin(self) -> None:
        self._random = [each.get_state() for each in self._generators]
        self._items, self.position = iter(self.loader), 0

    @property
    def _generators(self) -> list[torch.Generator]:
        """torch's default generator, and those of the loader and of its samplers."""
        batch_sampler = getattr(self.loader, "batch_sampler", None)
        parts = (self.loader, getattr(self.loader, "sampler", None), batch_sampler)
        found = [getattr(each, "generator", None) for each in (*parts, getattr(batch_sampler, "sampler", None))]
        own = {id(each): each for each in found if isinstance(each, torch.Generator)}
        return [torch.default_generator, *own.values()]

    def state_dict(self) -> dict[str, Any]:
        """The position in the loader, and random states; torch.load(weights_only=True) reads it."""
        return {"passes": self.passes, "position": self.position, "random": self._random}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the last batch: repeat the pass from its random state, and skip the batches already used."""
        self.passes, position = state["passes"], state["position"]
        self._items, self.position = None, 0
        if state["random"] is None:
            return
        now, generators = torch.get_rng_state(), self._generators
        for generator, before in zip(generators, state["random"], strict=True):
            generator.set_state(before)
        for _ in range(position):
            next(self)
        if not position:
            self._begin()
        torch.set_rng_state(now)  # other code draws from it too
