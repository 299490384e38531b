"""Rows of the table of benchmark_bilevel.py (algorithms with the suite's steps), and a run of one for all seeds."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import hypergrad as hg
from examples.bilevel_problems import Blocks, Problem

BUDGETS = {"simulated": 1e7, "ijcnn1": 5e7, "covtype": 1e7, "mnist": 2_048_000}  # per-sample evaluations of a seed
ADJOINT_STEPS = 10  # in AmIGO and stocBiO
PENALTY = 10.0  # in F2SA


@dataclass(frozen=True)
class Row:
    """An algorithm with its step sizes at the outer iteration t, step / (t + 1)^decay and, outside, over the ratio.

    Attributes:
        kind: the algorithm.
        step, decay: of the inner steps, and of those of the adjoint.
        ratio, outer_decay: outer steps are step / ratio / (t + 1)^outer_decay.
        inner_steps: inner steps for each outer step.
        rate, rate_decay: rate / (t + 1)^rate_decay, at most 1, is that of an average or of recursive momentum.
        period: of SRBA, in epochs of both levels.
        tuned: the suite has tuned these steps; otherwise they are guesses.
        most: largest number of iterations.
    """

    kind: str
    step: float
    ratio: float = 1.0
    decay: float = 0.0
    outer_decay: float = 0.0
    inner_steps: int = 1
    rate: float = 1.0
    rate_decay: float = 0.0
    period: float = 0.5
    tuned: bool = True
    most: int = 10**9

    @property
    def blocks(self) -> int:
        """The cost of an iteration in evaluations of blocks, except for SRBA's iterations on all rows."""
        steps = self.inner_steps
        many = {"SABA": 4, "SOBA": 4, "MA-SOBA": 4, "STORM": 8, "SRBA": 8, "F2SA-2": 5 * steps, "no weights": 1}
        # AmIGO: inner gradients; a gradient and a product per adjoint step; a cross product; an outer gradient.
        return many.get(self.kind, steps + 2 * ADJOINT_STEPS + 2)

    def restarts(self, sizes: tuple[int, int], batch: int) -> int:
        """SRBA's period in iterations."""
        return max(1, int(self.period * sum(sizes) / batch))


def soba(step: float, ratio: float, **more: Any) -> Row:
    return Row(**({"kind": "SOBA", "step": step, "ratio": ratio, "decay": 0.5, "outer_decay": 0.5} | more))


def storm(step: float, ratio: float, **more: Any) -> Row:
    """Recursive momentum with the exponents and η of SUSTAIN."""
    third = {"decay": 1 / 3, "outer_decay": 1 / 3, "rate": 0.5, "rate_decay": 2 / 3, "tuned": False}
    return Row("STORM", step, ratio, **(third | more))


def looped(kind: str, step: float, ratio: float, **more: Any) -> Row:
    return Row(kind, step, ratio, inner_steps=10, **more)


AVERAGED: dict[str, Any] = {"kind": "MA-SOBA", "rate": 3.0, "rate_decay": 0.5, "tuned": False}
ROWS: dict[str, dict[str, Row]] = {
    "simulated": {
        "SABA": Row("SABA", 0.1),
        "SRBA": Row("SRBA", 0.1),
        "AmIGO": looped("AmIGO", 0.01, 0.1),
        "stocBiO": looped("stocBiO", 0.1, 1),
        "SOBA": soba(0.1, 1, tuned=False),
        "F2SA-2": looped("F2SA-2", 0.1, 1, tuned=False),
    },
    "ijcnn1": {
        "SABA": Row("SABA", 0.25),
        "SRBA": Row("SRBA", 0.5),
        "AmIGO": looped("AmIGO", 0.125, 0.1),
        "stocBiO": looped("stocBiO", 0.25, 1),
        "SOBA": soba(0.5, 0.1, tuned=False),
        "MA-SOBA": soba(0.5, 0.1, **AVERAGED),
        "STORM": storm(0.5, 0.1),
        "F2SA-2": looped("F2SA-2", 0.25, 1, tuned=False),
    },
    "covtype": {
        "SOBA": soba(1, 0.01),
        "MA-SOBA": soba(1, 0.01, **AVERAGED),
        "STORM": storm(0.5, 0.01),
        "SRBA": Row("SRBA", 0.03125, 0.01, period=8),
        "AmIGO": looped("AmIGO", 0.03125, 0.1),
        "stocBiO": looped("stocBiO", 0.0625, 0.01),
    },
    "mnist": {
        "no weights": Row("no weights", 0.1, decay=0.5, tuned=False, most=8000),
        "SOBA": soba(1, 1e-4),
        "MA-SOBA": soba(1, 1e-4, **AVERAGED),
        "STORM": storm(0.1, 1e-4),
        "SABA": Row("SABA", 0.1, 1e-3),
        "SRBA": Row("SRBA", 1e-3, 1e-5, period=512),
        "AmIGO": looped("AmIGO", 1e-3, 1e-5),
        "stocBiO": looped("stocBiO", 1e-2, 1e-5),
        "F2SA-2": looped("F2SA-2", 0.1, 1e-4, tuned=False),
    },
}


@dataclass
class Run:
    """A run of one algorithm on one problem for all seeds, which can be saved and continued."""

    problem: Problem
    row: Row
    seeds: list[int]
    batch: int
    state: dict[str, Any] = field(default_factory=lambda: {"t": 0, "evaluations": 0, "seconds": 0.0, "curve": []})

    def __post_init__(self) -> None:
        row, starts = self.row, [self.problem.start()] * len(self.seeds)
        self.w, self.lam = (torch.stack(each).requires_grad_() for each in zip(*starts, strict=True))
        levels = enumerate(self.problem.sizes)
        self.inner, self.outer = (
            Blocks(n, self.batch, [2 * seed + level for seed in self.seeds]) for level, n in levels
        )
        self.blocks = self.problem.arranged(self.inner.rows, self.outer.rows)
        self.inner_loss, self.outer_loss = self.losses(inner=True), self.losses(inner=False)
        self.tracker = self.make_tracker()
        self.optimizers = torch.optim.SGD([self.w], row.step), torch.optim.SGD([self.lam], row.step / row.ratio)

    def make_tracker(self) -> hg.bilevel.Tracker:
        row = self.row
        given: dict[str, Any] = {"params": self.w, "hparams": self.lam, "lr": row.step, "on_nonfinite": "ignore"}
        kinds: dict[str, Callable[[], hg.bilevel.Tracker]] = {
            "SOBA": lambda: hg.bilevel.SOBA(**given),
            "no weights": lambda: hg.bilevel.SOBA(**given),
            "MA-SOBA": lambda: hg.bilevel.SOBA(average=1.0, **given),
            "STORM": lambda: hg.bilevel.SOBA(recursive=1.0, **given),
            "SABA": lambda: hg.bilevel.SABA(batches=(self.inner.number, self.outer.number), **given),
            "SRBA": lambda: hg.bilevel.SRBA(
                full=self.full, period=row.restarts(self.problem.sizes, self.batch), **given
            ),
            "AmIGO": lambda: hg.bilevel.AmIGO(steps=ADJOINT_STEPS, **given),
            "stocBiO": lambda: hg.bilevel.AmIGO(steps=ADJOINT_STEPS, warm=False, **given),
            "F2SA-2": lambda: hg.bilevel.F2SA(order=2, penalty=PENALTY, **given),
        }
        return kinds[row.kind]()

    def losses(self, inner: bool) -> Callable[[slice], Callable[[], Tensor]]:
        """A function from a block to a closure, which evaluates the loss on the block, summed over seeds."""
        problem, w, lam = self.blocks or self.problem, self.w, self.lam
        loss, sampler = (problem.inner_loss, self.inner) if inner else (problem.outer_loss, self.outer)

        def of(block: slice) -> Callable[[], Tensor]:
            rows = block if self.blocks else sampler.rows[:, block]
            return lambda: loss(w, lam, rows).sum()

        return of

    def full(self) -> tuple[Iterator[Tensor], Iterator[Tensor]]:
        """Both losses on all rows, as terms whose sums they are (outer loss first)."""

        def parts(loss: Callable[..., Tensor], size: int, most: int = 65536) -> Iterator[Tensor]:
            for start in range(0, size, most):
                rows = slice(start, min(start + most, size))
                yield loss(self.w, self.lam, rows).sum() * ((rows.stop - start) / size)

        n, m = self.problem.sizes
        return parts(self.problem.outer_loss, m), parts(self.problem.inner_loss, n)

    @property
    def anew(self) -> bool:
        """Whether the next iteration is one of SRBA's on all rows."""
        return isinstance(self.tracker, hg.bilevel.SRBA) and self.tracker.recursive.anew

    def cost(self) -> int:
        """Per-sample evaluations of the next iteration for each seed."""
        n, m = self.problem.sizes
        return 3 * n + m if self.anew else self.batch * self.row.blocks

    def iterate(self) -> None:
        row, tracker, t = self.row, self.tracker, self.state["t"] + 1
        inner, outer = self.optimizers
        inner.param_groups[0]["lr"] = row.step / t**row.decay
        outer.param_groups[0]["lr"] = row.step / row.ratio / t**row.outer_decay
        if row.decay:
            tracker.lr = row.step / t**row.decay
        for name in {"average", "recursive"} & {*tracker.filters}:
            if row.kind != "SRBA":
                setattr(tracker.filters[name], "rate", min(1.0, row.rate / t**row.rate_decay))  # noqa: B010
        self.state["evaluations"] += self.cost()
        self.state["t"] = t
        for step in range(row.inner_steps):
            last = step == row.inner_steps - 1
            self.lam.grad = None  # F2SA computes a direction in each inner step; only the last one is used
            self.backward(last)
            inner.step()
            self.w.grad = None
            if last or row.kind == "F2SA-2":
                tracker.step()
        if row.kind != "no weights":
            outer.step()

    def backward(self, last: bool) -> None:
        kind, tracker = self.row.kind, self.tracker
        i, rows = next(self.inner)
        inner_loss = self.inner_loss(rows)
        if kind == "no weights" or (kind in ("AmIGO", "stocBiO") and not last):
            inner_loss().backward(inputs=[self.w])
            return
        j, others = next(self.outer)
        outer_loss = self.outer_loss(others)
        if kind in ("STORM", "SRBA", "F2SA-2"):
            tracker.backward(outer_loss, inner_loss)
            return
        more: dict[str, Any] = {"index": (i, j)} if kind == "SABA" else {}
        if kind in ("AmIGO", "stocBiO"):
            more["adjoint_losses"] = (self.inner_loss(next(self.inner)[1])() for _ in range(ADJOINT_STEPS))
        tracker.backward(outer_loss(), inner_loss(), **more)

    def measure(self) -> None:
        found = self.problem.measure(self.w.detach(), self.lam.detach())
        at = {key: self.state[key] for key in ("evaluations", "seconds")}
        self.state["curve"].append(at | found)

    @property
    def parts(self) -> dict[str, Any]:
        named = {"tracker": self.tracker, "inner": self.inner, "outer": self.outer}
        return named | dict(zip(("inner optimizer", "outer optimizer"), self.optimizers, strict=True))

    def state_dict(self) -> dict[str, Any]:
        tensors = {"w": self.w.detach(), "lam": self.lam.detach(), "state": self.state}
        return tensors | {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            self.w.copy_(state["w"])
            self.lam.copy_(state["lam"])
        self.state = state["state"]
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


def finish(
    run: Run, budget: float, points: int, progress: tqdm, save: Callable[[], None] | None = None, every: float = 0.0
) -> dict[str, Any]:
    """Run to the budget. Measure at points with equal ratios of evaluations, and call `save` every `every` seconds."""
    state, saved = run.state, time.monotonic()
    grid = np.geomspace(budget / 1000, budget, points)
    while True:
        begin = time.process_time()
        due = grid[len(state["curve"])]
        while state["evaluations"] < due and state["t"] < run.row.most:
            before = state["evaluations"]
            run.iterate()
            progress.update(state["evaluations"] - before)
            if save is not None and time.monotonic() - saved >= every:
                state["seconds"] += time.process_time() - begin
                save()
                saved, begin = time.monotonic(), time.process_time()
        state["seconds"] += time.process_time() - begin
        run.measure()
        if state["evaluations"] >= budget or state["t"] >= run.row.most:
            return state


def keep(path: Path, content: dict[str, Any]) -> None:
    """Replace a file at once, so that an interrupted write leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)
