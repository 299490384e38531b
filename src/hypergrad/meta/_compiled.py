"""The step of all tasks of a chunk with the tasks as its argument, so that compiled it serves other tasks too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .._tree import PyTree
from ._tasks import Chunk, without_penalties


def stepping(chunk: Chunk, compile: bool | str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The step for `unroll.reverse`, with options. Tasks that come again, without some others, are not compiled for."""
    again = not chunk.tried.isdisjoint(chunk.index)
    chunk.tried.update(chunk.index)
    if again or not compile:
        return chunk.step, {}
    return TaskStep(chunk), {"batches": [chunk.task] * chunk.problem.steps, "compile": compile}


class TaskStep:
    """Φ(carry, λ, t, tasks). What is found out about it is kept with the inner loss, which outlives a call."""

    def __init__(self, chunk: Chunk):
        self.chunk = chunk
        loss = without_penalties(chunk.problem.inner_loss)[0]
        # As a bound method has them: `unroll` keeps what it finds out by these.
        self.__self__ = getattr(loss, "__self__", loss)
        self.__func__ = type(self), getattr(loss, "__func__", None)

    def __call__(self, carry: Any, hparams: PyTree, _: Tensor | int, tasks: PyTree) -> Any:
        own, self.chunk.task = self.chunk.task, tasks
        try:
            return self.chunk.step(carry, hparams)
        finally:
            self.chunk.task = own
