"""Linear filters of the directions: an average, recursive momentum (STORM, SARAH, PAGE), and tables (SAGA).

A filter is called at each `backward`, and updates its memory at each `step`. If several batches are accumulated between
two steps, the memory is added only once, so that the sum is the direction of one large batch.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._oracles import Grads, plus, times

State = dict[str, Any]


class Filter(ABC):
    """The methods of each filter that a tracker calls after it has computed the direction."""

    @abstractmethod
    def accept(self) -> None:
        """Record that the last direction was added to .grad."""

    @abstractmethod
    def step(self) -> None:
        """Update the memory with the directions added since the last step."""

    @abstractmethod
    def drop(self) -> None:
        """Forget the directions added since the last step."""

    @abstractmethod
    def state_dict(self) -> State: ...

    def check(self, state: State) -> None:  # noqa: B027 (most filters have nothing to check)
        """Raise if a state does not belong to this filter."""

    @abstractmethod
    def load_state_dict(self, state: State) -> None: ...

    @abstractmethod
    def to(self, device: torch.device) -> None: ...


class Average(Filter):
    """h ← (1 − β) h + β D, from h = 0. A sparse D updates only the rows that it holds.

    Source: Chen, Xiao and Balasubramanian 2023 (MA-SOBA, arXiv:2306.12067), the update of h.
    """

    def __init__(self, rate: float, like: Sequence[Tensor]):
        if not 0 < rate <= 1:
            raise ValueError(f"average must be in (0, 1], the weight of the newest direction; got {rate!r}")
        self.rate = rate
        self.mean = [torch.zeros_like(x, requires_grad=False) for x in like]
        self.given: Grads = [None] * len(self.mean)  # the sum of directions since the last step

    def __call__(self, new: Grads) -> Grads:
        """The direction to be added to .grad for this batch. The caller calls `accept` if it is added."""
        self.pending = [
            x if x is None and g is not None else self._one(mean, x, g)
            for mean, x, g in zip(self.mean, new, self.given, strict=True)
        ]
        return self.pending

    def _one(self, mean: Tensor, x: Tensor | None, given: Tensor | None) -> Tensor | None:
        if x is not None and x.layout is not torch.strided:
            x = x.coalesce()
            rows = x.indices()
            seen = torch.zeros(mean.shape[: x.sparse_dim()], dtype=torch.bool, device=mean.device)
            if given is not None:
                seen[tuple(given.coalesce().indices())] = True
            kept = mean[tuple(rows)] * (~seen[tuple(rows)]).reshape(-1, *[1] * x.dense_dim())
            values = (1 - self.rate) * kept + self.rate * x.values()
            return torch.sparse_coo_tensor(rows, values, x.shape, is_coalesced=True, check_invariants=False)
        start = (1 - self.rate) * mean if given is None else None
        return start if x is None else self.rate * x if start is None else start.add_(x, alpha=self.rate)

    def accept(self) -> None:
        self.given = plus(self.given, self.pending)

    def step(self) -> None:
        for i, given in enumerate(self.given):
            if given is not None and given.layout is not torch.strided:
                given = given.coalesce()
                self.mean[i][tuple(given.indices())] = given.values()
            elif given is not None:
                self.mean[i] = given.clone()
        self.drop()

    def drop(self) -> None:
        self.given = [None] * len(self.mean)

    def state_dict(self) -> State:
        return {"mean": list(self.mean), "given": list(self.given)}

    def load_state_dict(self, state: State) -> None:
        self.mean = [x.clone() for x in state["mean"]]
        self.given = [None if x is None else x.clone() for x in state["given"]]

    def to(self, device: torch.device) -> None:
        self.mean = [x.to(device) for x in self.mean]
        self.given = [None if x is None else x.to(device) for x in self.given]


@dataclass
class Point:
    """Copies of w, v (or another variable of the algorithm) and λ, at which a direction is computed."""

    params: list[Tensor]
    own: list[Tensor]
    hparams: list[Tensor]


class Recursive(Filter):
    """D_t = D(x_t; ξ) + (1 − η) (D_{t−1} − D(x_{t−1}; ξ)), with the same batch ξ at both points.

    η > 0 is STORM, as in SUSTAIN and MRBO. η = 0 is SARAH, as in SRBA, which restarts from a direction over all data.

    Args:
        rate: η.
        period: number of steps from one restart to the next; None without restarts.
        probability: probability of a restart at each step, instead of period (PAGE).
        generator: on the CPU, to draw these restarts.

    Attributes:
        anew: whether the next direction is a restart, taken over all data.

    Source: Cutkosky and Orabona 2019; Khanduri et al. 2021 (SUSTAIN); Dagréou et al. 2024 (SRBA).
    """

    def __init__(
        self,
        rate: float,
        period: int | None = None,
        probability: float | None = None,
        generator: torch.Generator | None = None,
    ):
        if not 0 <= rate <= 1:
            raise ValueError(f"recursive must be in [0, 1], the weight of the newest batch alone; got {rate!r}")
        self.rate, self.period, self.probability, self.generator = rate, period, probability, generator
        self.anew, self.since = period is not None or probability is not None, 0
        self.old: Point | None = None  # x_{t−1}
        self.previous: Grads = []  # D_{t−1}
        self.now: Point | None = None  # x_t, where batches since the last step were evaluated
        self.given: Grads = []  # the sum of the directions of these batches

    def __call__(self, new: Grads, at: Callable[[Point], Grads], here: Callable[[], Point]) -> Grads:
        """The corrected direction of this batch. `new` is its direction at the present point here(), at(x) at x."""
        self.arrived = here() if self.now is None else self.now
        if self.old is not None and not self.anew:
            if self.rate < 1:
                new = plus(new, times(at(self.old), self.rate - 1))
            if not self.given:
                new = plus(new, times(self.previous, 1 - self.rate))
        self.pending = new
        return new

    def accept(self) -> None:
        self.now = self.arrived
        self.given = plus(self.given, self.pending) if self.given else self.pending

    def step(self) -> None:
        if self.now is None:  # no outer loss since the last step, so there was no direction
            return
        self.old, self.previous = self.now, [None if g is None else g.clone() for g in self.given]
        self.drop()
        self.since += 1
        if self.probability is not None:
            self.anew = bool(torch.rand((), generator=self.generator, device="cpu") < self.probability)
        elif self.period is not None:
            self.anew = self.since % self.period == 0

    def drop(self) -> None:
        self.now, self.given = None, []

    def state_dict(self) -> State:
        points = {name: None if p is None else dict(vars(p)) for name, p in (("old", self.old), ("now", self.now))}
        lists = {"previous": list(self.previous), "given": list(self.given)}
        random = None if self.generator is None else self.generator.get_state()
        return points | lists | {"anew": self.anew, "since": self.since, "generator": random}

    def load_state_dict(self, state: State) -> None:
        self.old, self.now = (None if state[name] is None else Point(**state[name]) for name in ("old", "now"))
        self.previous, self.given = list(state["previous"]), list(state["given"])
        self.anew, self.since = state["anew"], state["since"]
        if self.generator is not None and state["generator"] is not None:
            self.generator.set_state(state["generator"])

    def to(self, device: torch.device) -> None:
        for point in filter(None, (self.old, self.now)):
            for name, tensors in vars(point).items():
                setattr(point, name, [x.to(device) for x in tensors])
        self.previous, self.given = (
            [None if g is None else g.to(device) for g in gs] for gs in (self.previous, self.given)
        )


class Table(Filter):
    """The last direction of each of n batches, and their mean (SAGA): D = D_i − mem_i + mean.

    Args:
        count: n.
        like: tensors of the same shapes, dtypes and devices as the parts of a direction.
        file: path of a file that holds the table, mapped into memory; None: in memory.

    Source: Defazio, Bach and Lacoste-Julien 2014; Dagréou et al. 2022 (SABA), section 3.2. Here it starts from zeros.
    """

    def __init__(self, count: int, like: Sequence[Tensor], file: str | None = None):
        shapes = [(count, *x.shape) for x in like]
        if file is None:
            self.rows = [
                torch.zeros(shape, dtype=x.dtype, device=x.device) for shape, x in zip(shapes, like, strict=True)
            ]
        else:
            self.rows = [
                mapped(f"{file}.{i}", shape, x.dtype) for i, (shape, x) in enumerate(zip(shapes, like, strict=True))
            ]
        self.mean = [torch.zeros_like(x, requires_grad=False) for x in like]
        self.count, self.file = count, file

    def __call__(self, new: Grads, row: int) -> list[Tensor]:
        """The corrected direction of batch `row`. The caller calls `accept` if it is added to .grad."""
        if not 0 <= row < self.count:
            raise IndexError(f"the index of a batch must be in [0, {self.count}), got {row}")
        filled = [
            torch.zeros_like(mean) if g is None else g if g.layout is torch.strided else g.to_dense()
            for g, mean in zip(new, self.mean, strict=True)
        ]
        self.pending = row, filled, [g - rows[row].to(g.device) for g, rows in zip(filled, self.rows, strict=True)]
        return [change + mean for change, mean in zip(self.pending[2], self.mean, strict=True)]

    def accept(self) -> None:
        row, new, changes = self.pending
        for rows, mean, g, change in zip(self.rows, self.mean, new, changes, strict=True):
            rows[row] = g
            mean.add_(change, alpha=1 / self.count)

    def step(self) -> None:
        """Does nothing, because each batch has already updated the table."""

    def drop(self) -> None:
        """Does nothing: a row holds the direction at the point of its evaluation, whether or not a step follows."""

    def state_dict(self) -> State:
        return {"rows": list(self.rows), "mean": list(self.mean)}

    def check(self, state: State) -> None:
        count = len(state["rows"][0])
        if count != self.count:
            raise ValueError(f"the state has a table of {count} batches, and this tracker one of {self.count}")

    def load_state_dict(self, state: State) -> None:
        for kept, new in ((self.rows, state["rows"]), (self.mean, state["mean"])):
            for x, y in zip(kept, new, strict=True):
                x.copy_(y)

    def to(self, device: torch.device) -> None:
        self.mean = [x.to(device) for x in self.mean]
        if self.file is None:  # a table in a file stays there
            self.rows = [x.to(device) for x in self.rows]


def mapped(file: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros in a file that is mapped into memory. An existing file must be an earlier table of the same size."""
    size = torch.Size(shape).numel()
    if os.path.exists(file) and os.path.getsize(file) != size * dtype.itemsize:
        raise FileExistsError(f"{file} exists already and is not a table of this size: name another file, or remove it")
    with open(file, "wb") as handle:
        handle.truncate(size * dtype.itemsize)
    return torch.from_file(file, shared=True, size=size, dtype=dtype).reshape(*shape)


def table_bytes(count: int, like: Sequence[Tensor]) -> int:
    return sum((count + 1) * x.numel() * x.element_size() for x in like)
