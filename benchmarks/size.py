"""Large problems in float32: the time of each method over that of the same passes by hand, and the vectors it holds.

A network of three layers has one decay for each tensor, for each weight, or (many leaves) for all. The methods are K
products of CG or of a Neumann series on one graph, CG over batches by `operators.Sum`, a step of SOBA, and a step of
F2SA. The code by hand does the same on lists of tensors without any check. A vector has as many numbers as params.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import isqrt
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import hypergrad as hg

from .measure import Spread, Times, interleaved, peak_memory, ratios
from .pictures import Bar, Panel
from .pictures import draw as draw_panels
from .report import Section, cell

Tensors = list[Tensor]
FEATURES, CLASSES, ROWS, BATCHES, STEPS = 64, 10, 32, 2, 3


@dataclass(frozen=True)
class Row:
    """Number of parameters, and of leaves (None: the tensors of the network); `each`: a decay for each weight."""

    parameters: int
    leaves: int | None = None
    each: bool = False
    rounds: int = 3


SIZES = {
    "1e6 parameters": Row(10**6, rounds=7),
    "1e7 parameters": Row(10**7),
    "1e5 parameters, 20,000 leaves": Row(10**5, leaves=20_000, rounds=1),
    "1e7 parameters, 1e7 hparams": Row(10**7, each=True, rounds=2),
    "1e8 parameters": Row(10**8, rounds=1),
}
FULL = ("1e8 parameters",)  # 6 GiB


@dataclass(frozen=True)
class Result:
    row: str
    method: str
    error: float  # relative difference from the result of the code by hand
    seconds: Spread  # CPU seconds of a call
    ratio: Spread  # CPU time over that of the code by hand
    vectors: float  # vectors held at the peak beyond one graph and one product
    by_hand: float  # the same number for the code by hand


class Case:
    """A network at its initial weights; its losses are functions of lists of tensors."""

    def __init__(self, row: Row):
        draw = torch.Generator().manual_seed(0)
        width = (isqrt((FEATURES + CLASSES) ** 2 + 4 * row.parameters) - FEATURES - CLASSES) // 2
        shapes = [(width, FEATURES), (width, width), (CLASSES, width)]
        weights = [torch.randn(*s, generator=draw) / s[1] ** 0.5 for s in shapes]
        self.shapes: list[tuple[int, int]] | None = None
        if row.leaves is not None:
            self.shapes = shapes
            flat = torch.cat([w.flatten() for w in weights])
            length = -(-len(flat) // row.leaves)
            weights = list(nn.functional.pad(flat, (0, length * row.leaves - len(flat))).view(row.leaves, length))
        self.w = [w.clone() for w in weights]
        kind = (lambda w: torch.zeros_like(w)) if row.each else (lambda w: torch.tensor(0.0))
        self.h = (
            [kind(w).requires_grad_() for w in self.w] if row.leaves is None else [torch.tensor(0.0).requires_grad_()]
        )
        self.x = torch.randn(2 * ROWS, FEATURES, generator=draw)
        self.y = torch.randint(CLASSES, (2 * ROWS,), generator=draw)
        self.size = sum(w.numel() for w in self.w)

    def fit(self, w: Sequence[Tensor], rows: slice) -> Tensor:
        if self.shapes is not None:
            sizes = [a * b for a, b in self.shapes]
            # Stacking all leaves once: second derivatives of torch.cat and torch.stack copy everything for each part.
            parts = torch.stack(list(w)).flatten()[: sum(sizes)].split(sizes)
            w = [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]
        z = self.x[rows]
        for layer in w[:-1]:
            z = torch.tanh(z @ layer.mT)
        return cross_entropy(z @ w[-1].mT, self.y[rows])

    def penalty(self, w: Sequence[Tensor], h: Sequence[Tensor]) -> Tensor:
        whole = w if len(h) == len(w) else [torch.stack(list(w))]
        return torch.stack([(s.exp() * x.square()).sum() / 2 for s, x in zip(h, whole, strict=True)]).sum()

    def inner(self, w: Sequence[Tensor], h: Sequence[Tensor]) -> Tensor:
        return self.fit(w, slice(0, ROWS)) + self.penalty(w, h)

    def outer(self, w: Sequence[Tensor], h: Sequence[Tensor]) -> Tensor:
        return self.fit(w, slice(ROWS, None))

    def leaves(self) -> Tensors:
        return [x.detach().requires_grad_() for x in self.w]


def dot(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    return torch.stack([torch.dot(x.reshape(-1), y.reshape(-1)) for x, y in zip(xs, ys, strict=True)]).sum()


# The methods written by hand.


def graph_and_product(case: Case) -> None:
    """The graph of ∇₁g, a vector, and the product: the memory that is subtracted from the peaks."""
    w = case.leaves()
    gradient = torch.autograd.grad(case.inner(w, case.h), w, create_graph=True)
    v = [torch.ones_like(x) for x in w]
    torch.autograd.grad(gradient, w, v)


def product_of(case: Case, w: Tensors) -> Callable[..., Any]:
    gradient = torch.autograd.grad(case.inner(w, case.h), w, create_graph=True)
    return lambda v, inputs, keep=True: torch.autograd.grad(gradient, inputs, v, retain_graph=keep)


def conjugate(products: Callable[..., Any], b: Tensors, w: Tensors, h: Tensors) -> Tensors:
    x, r, p = [torch.zeros_like(g) for g in b], b, [g.clone() for g in b]
    size = dot(r, r)
    for _ in range(STEPS):
        image = products(p, w)
        step = size / dot(p, image)
        for xi, ri, pi, ai in zip(x, r, p, image, strict=True):
            xi.addcmul_(step, pi)
            ri.addcmul_(-step, ai)
        last, size = size, dot(r, r)
        for pi, ri in zip(p, r, strict=True):
            pi.mul_(size / last).add_(ri)
        del image
    return [-g for g in products(x, [*w, *h], False)[len(w) :]]


def cg_by_hand(case: Case) -> Tensors:
    w = case.leaves()
    b = list(torch.autograd.grad(case.outer(w, case.h), w))
    return conjugate(product_of(case, w), b, w, case.h)


def neumann_by_hand(case: Case, step: float = 0.1) -> Tensors:
    w = case.leaves()
    p = list(torch.autograd.grad(case.outer(w, case.h), w))
    products, x = product_of(case, w), [g.clone() for g in p]
    for _ in range(STEPS):
        image = products(p, w)
        for xi, pi, ai in zip(x, p, image, strict=True):
            pi.sub_(ai, alpha=step)
            xi.add_(pi)
        del image
    return [g * -step for g in products(x, [*w, *case.h], False)[len(w) :]]


def batches() -> list[slice]:
    return [slice(i, i + ROWS // BATCHES) for i in range(0, ROWS, ROWS // BATCHES)]


def sum_by_hand(case: Case) -> Tensors:
    """CG on a sum over batches, with the graph of one batch at a time."""
    w = case.leaves()

    def products(v: Tensors, inputs: Tensors, keep: bool = True) -> Tensors:
        gradient = torch.autograd.grad(case.penalty(w, case.h), w, create_graph=True)
        total = list(torch.autograd.grad(gradient, inputs, v))
        del gradient
        for rows in batches():
            gradient = torch.autograd.grad(case.fit(w, rows), w, create_graph=True)
            for x, part in zip(total, torch.autograd.grad(gradient, w, v), strict=False):
                x.add_(part, alpha=1 / BATCHES)
            del gradient
        return total

    return conjugate(products, list(torch.autograd.grad(case.outer(w, case.h), w)), w, case.h)


def soba_by_hand(case: Case) -> Tensors:
    """The passes and the directions of a step at v = ∇₁f."""
    w = case.leaves()
    v = list(torch.autograd.grad(case.outer(w, case.h), w))
    gradient = torch.autograd.grad(case.inner(w, case.h), w, create_graph=True)
    return [g.neg() for g in torch.autograd.grad(gradient, [*w, *case.h], v)[len(w) :]]


def f2sa_by_hand(case: Case, penalty: float = 10.0) -> Tensors:
    """The gradients of a step at params and at both copies, which are 1 % larger and smaller than params."""
    total: Tensors = [torch.zeros_like(h) for h in case.h]
    w = case.leaves()
    torch.autograd.grad(case.inner(w, case.h), w)
    for sign in (1, -1):
        y = [(x * (1 + 0.01 * sign)).requires_grad_() for x in case.w]
        own = list(torch.autograd.grad(case.inner(y, case.h), [*y, *case.h]))
        slopes = torch.autograd.grad(case.outer(y, case.h), y)
        for t, g in zip(total, own[len(y) :], strict=True):
            t.add_(g, alpha=sign * penalty / 2)
        for x, g in zip(own, slopes, strict=False):
            x.add_(g, alpha=sign / penalty)
    return total


# The methods of hypergrad.


def implicit(case: Case, solver: hg.solvers.LinearSolver, inner: Any = None) -> Tensors:
    return hg.implicit.grad(
        case.outer, inner_loss=inner or case.inner, params=case.w, hparams=case.h, solver=solver
    ).grads


def cg(case: Case) -> Tensors:
    return implicit(case, hg.solvers.CG(max_steps=STEPS, on_failure="ignore"))


def neumann(case: Case) -> Tensors:
    return implicit(case, hg.solvers.Neumann(step_size=0.1, max_steps=STEPS, on_failure="ignore"))


def summed(case: Case) -> Tensors:
    total = hg.operators.Sum(lambda w, h, rows: case.fit(w, rows), batches(), mean=True, penalty=case.penalty)
    return implicit(case, hg.solvers.CG(max_steps=STEPS, on_failure="ignore"), total)


def stepped(case: Case, make: Callable[[Tensors, Tensors], hg.bilevel.Tracker]) -> Callable[[], Tensors]:
    """A step of a tracker, which every call takes at the same point."""
    w = case.leaves()
    tracker = make(w, case.h)

    def step() -> Tensors:
        for x in (*w, *case.h):
            x.grad = None
        tracker.backward(lambda: case.outer(w, case.h), lambda: case.inner(w, case.h))
        return [x.grad for x in case.h if x.grad is not None]

    return step


def soba(case: Case) -> Callable[[], Tensors]:
    def make(w: Tensors, h: Tensors) -> hg.bilevel.Tracker:
        tracker = hg.bilevel.SOBA(w, h, lr=1.0)
        slopes = torch.autograd.grad(case.outer(w, h), w)
        for v, g in zip(tracker.variables, tracker.oracles.space.pack(list(slopes)).chunks, strict=True):
            v.copy_(-g)
        return tracker

    return stepped(case, make)


def f2sa(case: Case) -> Callable[[], Tensors]:
    def make(w: Tensors, h: Tensors) -> hg.bilevel.Tracker:
        tracker = hg.bilevel.F2SA(w, h, order=2, penalty=10.0)
        for k, copy in tracker.copies.items():
            for y, x in zip(copy, case.w, strict=True):
                y.copy_(x * (1 + 0.01 * k))
        return tracker

    return stepped(case, make)


# Each method: a function of the case that returns hypergrad's call, and the code by hand.
METHODS: dict[str, tuple[Callable[[Case], Callable[[], Tensors]], Callable[[Case], Tensors]]] = {
    "implicit.grad, CG": (lambda case: partial(cg, case), cg_by_hand),
    "implicit.grad, Neumann": (lambda case: partial(neumann, case), neumann_by_hand),
    "implicit.grad, CG, Sum": (lambda case: partial(summed, case), sum_by_hand),
    "SOBA, a step": (soba, soba_by_hand),
    "F2SA, a step": (f2sa, f2sa_by_hand),
}


@dataclass(frozen=True)
class Sample:
    value: Tensors
    peak: int  # bytes
    times: Times


def once(call: Callable[[], Tensors]) -> Sample:
    """The result, the peak memory and the time of one call."""
    values: list[Tensors] = []
    wall, cpu = perf_counter(), process_time()
    peak = peak_memory(lambda: values.append(call()))
    return Sample(values[0], peak, Times([process_time() - cpu], [perf_counter() - wall]))


def apart(found: Tensors, truth: Tensors) -> float:
    size = sum(float(b.square().sum()) for b in truth)
    return (sum(float((a - b).square().sum()) for a, b in zip(found, truth, strict=True)) / size) ** 0.5


def measure(rows: Sequence[str], words: Sequence[str] | None, rounds: int | None) -> tuple[list[Result], list[dict]]:
    results, settings = [], []
    chosen = {m: pair for m, pair in METHODS.items() if words is None or any(word in m for word in words)}
    for name in tqdm(rows, desc="sizes", leave=False):
        case, turns = Case(SIZES[name]), rounds or SIZES[name].rounds
        least = peak_memory(partial(graph_and_product, case))
        for m, (make, by_hand) in tqdm(chosen.items(), desc=name, leave=False):
            ours, theirs = make(case), partial(by_hand, case)
            samples = [once(ours), once(theirs)]
            error = apart(samples[0].value, samples[1].value)
            held = [(each.peak - least) / (4 * case.size) for each in samples]
            times = {"ours": samples[0].times, "by hand": samples[1].times}
            if turns > 1:
                times = interleaved({"ours": ours, "by hand": theirs}, turns, warm_up=0)
            ratio = ratios(times["ours"], times["by hand"])[0]
            results.append(Result(name, m, error, Spread.of(times["ours"].cpu), ratio, *held))
            del ours, theirs, samples
        sizes = {"parameters": case.size, "leaves": len(case.w), "hparams": sum(h.numel() for h in case.h)}
        settings.append({"row": name, **sizes, "steps": STEPS, "rows of data": ROWS, "rounds": turns, "seed": 0})
        del case
    return results, settings


def table(results: Sequence[Result]) -> str:
    lines = []
    for row in dict.fromkeys(r.row for r in results):
        lines.append(f"{row:32}{'difference':>11}{'s':>9}{'time over by hand':>24}{'vectors':>9}{'by hand':>9}")
        for r in results:
            if r.row == row:
                ratio = f"{r.ratio.middle:.2f} [{r.ratio.low:.2f}, {r.ratio.high:.2f}]"
                held = f"{r.vectors:9.1f}{r.by_hand:9.1f}"
                lines.append(f"  {r.method:30}{r.error:11.1e}{cell(r.seconds, '9.3f')}{ratio:>24}{held}")
    return "\n".join(lines)


def draw(results: Sequence[Result], path: Path) -> None:
    panels = [
        Panel(
            row,
            [
                Bar(
                    r.method,
                    r.ratio,
                    f"{r.ratio.middle:.2f}; {r.vectors:.1f} vectors ({round(r.by_hand, 1) + 0.0:.1f} by hand)",
                )
                for r in results
                if r.row == row
            ],
            line=1,
        )
        for row in dict.fromkeys(r.row for r in results)
    ]
    title = "Time over the same passes by hand, and vectors held\nbeyond a graph and a product"
    draw_panels(path, title, panels)


ABOUT = """Each method in float32 on a network of three layers, compared with the same passes written by hand on
lists of tensors, without any check. `difference` is the relative one of the results. `vectors` and `by hand` count the
vectors of params' size that are in memory in addition to a graph and a product. [What this means](../size.md)."""
SECTION = Section("Large problems", lambda: SIZES, measure, table, draw, ABOUT)
