"""The step of a chunk of tasks with the tasks as an argument, so that the compiled step serves other tasks too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .._tree import PyTree
from ._tasks import Chunk, without_penalties


def stepping(chunk: Chunk, compile: bool | str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The step and options for `unroll.reverse`. If tasks are repeated because others diverged, nothing is compiled."""
    again = not chunk.tried.isdisjoint(chunk.index)
    chunk.tried.update(chunk.index)
    if again or not compile:
        return chunk.step, {}
    return TaskStep(chunk), {"batches": [chunk.task] * chunk.problem.steps, "compile": compile}


class TaskStep:
    """Φ(carry, λ, t, tasks). Compiled functions and sizes are kept with the inner loss, which outlives a call."""

    def __init__(self, chunk: Chunk):
        self.chunk = chunk
        loss = without_penalties(chunk.problem.inner_loss)[0]
        # The attributes of a bound method, by which `unroll` keeps what it found out about a step.
        self.__self__ = getattr(loss, "__self__", loss)
        self.__func__ = type(self), getattr(loss, "__func__", None)

    def __call__(self, carry: Any, hparams: PyTree, _: Tensor | int, tasks: PyTree) -> Any:
        own, self.chunk.task = self.chunk.task, tasks
        try:
            return self.chunk.step(carry, hparams)
        finally:
            self.chunk.task = own
