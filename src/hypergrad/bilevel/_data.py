"""Batches without end, in an order that a resumed run repeats."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

import torch

Item = TypeVar("Item")


class cycle(Generic[Item]):
    """An iterator over a DataLoader (or another iterable that can be begun again) without end.

    Every pass iterates it anew, so a shuffled loader shuffles anew.

    Args:
        loader: what is passed through; not an iterator, which ends once.

    Example:
        >>> batches = cycle([1, 2, 3])
        >>> [next(batches) for _ in range(5)]
        [1, 2, 3, 1, 2]
    """

    def __init__(self, loader: Iterable[Item]):
        if isinstance(loader, Iterator):
            raise TypeError("cycle needs what can be iterated again (a DataLoader, a list), not an iterator")
        self.loader, self.passes, self.position = loader, 0, 0
        self._items: Iterator[Item] | None = None
        self._random: torch.Tensor | None = None  # the random state before this pass

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
                raise ValueError("the loader is empty: cycle would never give anything") from None
            self.passes += 1
            self._begin()
            return next(self)
        self.position += 1
        return item

    def _begin(self) -> None:
        self._random = self._state()
        self._items, self.position = iter(self.loader), 0

    @property
    def _generator(self) -> Any:
        own = getattr(self.loader, "generator", None)
        return own if isinstance(own, torch.Generator) else torch.default_generator

    def _state(self) -> torch.Tensor:
        return self._generator.get_state()

    def state_dict(self) -> dict[str, Any]:
        """Where it is; torch.load(weights_only=True) reads it."""
        return {"passes": self.passes, "position": self.position, "random": self._random}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batch that was the last: this pass is begun as it was, and its batches so far are dropped."""
        self.passes, position = state["passes"], state["position"]
        self._items, self.position = None, 0
        if state["random"] is None:
            return
        now = self._state()
        self._generator.set_state(state["random"])
        for _ in range(position):
            next(self)
        if not position:
            self._begin()
        if self._generator is torch.default_generator:
            self._generator.set_state(now)
