"""What one product Av costs by each of the ways that implicit.grad offers, beside the one that it takes by default.

reverse: through the retained graph of ∇₁g. forward: through its transposed graph (products="forward"). compiled:
compile=True, built before the clock starts. bfloat16: the product in low precision, for solvers.Refined.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from hypergrad.implicit._problem import InnerProblem, Point, Variables
from hypergrad.implicit._problem import Problem as Bilevel

from . import problems
from .measure import Spread, interleaved, ratios
from .report import BLUE, GREY, RED, Section, bars, cell

ROUNDS = 20
WRONG = 1e-3  # relative distance from the product by the retained graph, of a way in the same precision
WAYS: dict[str, dict[str, Any]] = {
    "reverse": {},
    "forward": {"products": "forward"},
    "compiled": {"compile": True},
    "bfloat16": {},
}


class Attention(nn.Module):
    """Embedding, self-attention with a residual connection, layer norm, mean over the words, a linear head."""

    def __init__(self, words: int = 20_000, width: int = 64, classes: int = 10):
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            h = self.norm(h + self.attention(h, h, h, need_weights=False)[0])
        return self.head(h.mean(1))


def convolutions(filters: int = 64, blocks: int = 4, classes: int = 5) -> nn.Sequential:
    """The network of few-shot learning: 3×3 convolution, batch norm, ReLU and pooling, four times."""
    layers: list[nn.Module] = []
    for block in range(blocks):
        layers += [nn.Conv2d(filters if block else 1, filters, 3, padding=1)]
        layers += [nn.BatchNorm2d(filters, track_running_stats=False), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(filters, classes))


@dataclass(frozen=True)
class System:
    """An inner loss at its params, whose Hessian is A."""

    inner: Callable[[Any, Any], Tensor]
    params: Any
    hparams: Any

    def point(self, **options: Any) -> Point:
        inner = InnerProblem("inner_loss", self.inner)
        problem = Bilevel(_size, inner, self.params, self.hparams, symmetric=True, **options)
        return Point(problem, Variables(self.params, self.hparams))


def _size(params: Any, _: Any) -> Tensor:
    return torch.stack([p.sum() for p in (params.values() if isinstance(params, dict) else params)]).sum()


def of_model(make: Callable[[], nn.Module], inputs: Callable[[torch.Generator], tuple[Tensor, Tensor]]) -> System:
    """Cross-entropy + ½e^λ‖w‖² of a network with random weights."""
    torch.manual_seed(0)
    model, (x, y) = make(), inputs(torch.Generator().manual_seed(0))

    def inner(params: dict[str, Tensor], decay: Tensor) -> Tensor:
        size = torch.stack([p.square().sum() for p in params.values()]).sum()
        return F.cross_entropy(functional_call(model, params, (x,)), y) + 0.5 * decay.exp() * size

    params = {name: p.detach() for name, p in model.named_parameters()}
    return System(inner, params, torch.tensor(-3.0, requires_grad=True))


def of_row(name: str) -> System:
    problem = problems.rows()[name]()
    return System(lambda w, h: problem.inner(w, h, problem.data), problem.params, problem.hparams)


def images(draw: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(5, 1, 28, 28, generator=draw), torch.arange(5)


def texts(draw: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randint(20_000, (16, 32), generator=draw), torch.randint(10, (16,), generator=draw)


ROWS: dict[str, Callable[[], System]] = {
    "mlp": partial(of_row, "mlp"),
    "logistic": partial(of_row, "logistic"),
    "tiny": partial(of_row, "tiny"),
    "64-filter convolutions, 5 images": partial(of_model, convolutions, images),
    "attention and embedding": partial(of_model, Attention, texts),
}


@dataclass(frozen=True)
class Result:
    """One way of taking a product."""

    row: str
    method: str
    parameters: int
    seconds: Spread | None  # None: wrong
    ratio: Spread | None  # over reverse
    build: float  # seconds until its first product was there
    error: float  # relative, to the reverse product
    taken: str  # what compile=True found the fastest


def measure(rows: Sequence[str], words: Sequence[str] | None, rounds: int | None) -> tuple[list[Result], list[dict]]:
    results, settings = [], []
    for row in tqdm(rows, desc="rows"):
        torch.compiler.reset()
        system, calls, build, kept, taken = ROWS[row](), {}, {}, [], {}
        for way, options in WAYS.items():
            start = time.perf_counter()
            point = system.point(**options)
            op = point.op.low(torch.bfloat16) if way == "bfloat16" else point.op
            v = point.b.space.from_flat(torch.randn(point.b.space.length, generator=torch.Generator().manual_seed(1)))
            for _ in range(2 if way == "compiled" else 0):  # the first is recorded, the second finds the fastest way
                op(v)
            kept.append((way, op(v)))
            build[way] = time.perf_counter() - start
            taken[way] = "" if point.compiled is None else point.compiled.report.split(":")[0]
            calls[way] = partial(op, v)
        exact = kept[0][1]
        errors = {way: float(((image - exact).norm() / exact.norm()).max()) for way, image in kept}
        turns = rounds or ROUNDS
        repeat = max(1, round(0.005 / build["reverse"]))
        times = interleaved(calls, turns, repeat)
        for way in calls:
            right = way == "bfloat16" or errors[way] < WRONG
            seconds = Spread.of(times[way].cpu) if right else None
            ratio = ratios(times[way], times["reverse"])[0] if right else None
            results.append(Result(row, way, exact.space.length, seconds, ratio, build[way], errors[way], taken[way]))
        settings.append({"row": row, "parameters": exact.space.length, "rounds": turns, "threads": 1})
    return [r for r in results if not words or any(word in r.method for word in words)], settings


def table(results: list[Result]) -> str:
    lines = [f"{'':14}{'ms a product':>14}   {'× reverse':24}{'build, s':>10}{'to reverse':>12}"]
    row = None
    for r in results:
        if r.row != row:
            row = r.row
            lines.append(f"{row} ({r.parameters:,} parameters)")
        ratio = f"{r.ratio.middle:.3f} [{r.ratio.low:.3f}, {r.ratio.high:.3f}]" if r.ratio else "wrong: no time"
        numbers = f"{cell(r.seconds, '.3f', 1e3):>14}   {ratio:24}{r.build:10.2f}{r.error:12.0e}"
        lines.append(f"  {r.method:12}{numbers}   {r.taken}".rstrip())
    return "\n".join(lines)


def draw(results: list[Result], path: Path) -> None:
    rows = list(dict.fromkeys(r.row for r in results))
    with bars(path, rows, "Time of one product by each way, over the retained graph's", height=2.2) as axes:
        for axis, row in zip(axes, rows, strict=True):
            cells = [r for r in results if r.row == row]
            for place, r in enumerate(cells):
                if r.ratio is None:
                    axis.text(0, place, " wrong: no time", va="center", fontsize=8, color=RED)
                    continue
                axis.barh(place, r.ratio.middle, color=GREY if r.method == "reverse" else BLUE)
                axis.text(r.ratio.middle, place, f" {r.ratio.middle:.2f}", va="center", fontsize=8)
            axis.set_yticks(range(len(cells)), [r.method for r in cells], fontsize=8)
            axis.axvline(1, color="black", linewidth=0.8)
            axis.margins(x=0.15)
            axis.set(title=row)
            axis.invert_yaxis()
            axis.spines[["top", "right"]].set_visible(False)


SECTION = Section("One product", lambda: ROWS, measure, table, draw)
