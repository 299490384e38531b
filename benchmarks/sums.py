"""operators.Sum: a hypergradient by CG over 32 batches, compared with a loop by hand and with one graph of all rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import hypergrad as hg

from .measure import Spread, interleaved, peak_memory, ratios
from .pictures import Bar, Panel
from .pictures import draw as draw_panels
from .report import MIB, Section, cell

ROUNDS = {"network, 8,192 rows": 7}
ROWS, BATCH, FEATURES, CLASSES, HIDDEN = 8192, 256, 100, 10, 256
STEPS = 10
BY_HAND, ONE_GRAPH = "by hand, batch by batch", "one graph of all rows"


@dataclass(frozen=True)
class Result:
    row: str
    method: str
    error: float  # relative difference from the hypergradient of one graph
    seconds: Spread  # CPU seconds of a call
    ratio: Spread  # CPU time over that of the loop by hand
    memory: int  # peak memory in bytes


class Case:
    """A network in float32 at its initial weights, with a decay for each of its tensors."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES))
        self.x, self.y = torch.randn(ROWS, FEATURES), torch.randint(CLASSES, (ROWS,))
        self.valid = torch.randn(512, FEATURES), torch.randint(CLASSES, (512,))
        self.batches = list(zip(self.x.split(BATCH), self.y.split(BATCH), strict=True))
        self.w = {name: x.detach() for name, x in self.net.named_parameters()}
        self.lam = torch.zeros(len(self.w), requires_grad=True)

    def loss(self, w: dict[str, Tensor], lam: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(functional_call(self.net, w, (batch[0],)), batch[1])

    def penalty(self, w: dict[str, Tensor], lam: Tensor) -> Tensor:
        return torch.stack([0.2 * s.exp() * x.square().sum() for s, x in zip(lam, w.values(), strict=True)]).sum()

    def outer(self, w: dict[str, Tensor], lam: Tensor) -> Tensor:
        return self.loss(w, lam, self.valid)

    def ours(self, inner: Callable[..., Tensor]) -> Tensor:
        solver = hg.solvers.CG(max_steps=STEPS, on_failure="ignore")
        return hg.implicit.grad(self.outer, inner_loss=inner, params=self.w, hparams=self.lam, solver=solver).grads

    def methods(self) -> dict[str, Callable[[], Tensor]]:
        def summed(keep: str | None) -> Tensor:
            total = hg.operators.Sum(self.loss, self.batches, mean=True, penalty=self.penalty, keep=keep)
            return self.ours(total)

        def whole(w: dict[str, Tensor], lam: Tensor) -> Tensor:
            return self.loss(w, lam, (self.x, self.y)) + self.penalty(w, lam)

        return {
            BY_HAND: self.by_hand,
            "Sum": lambda: summed(None),
            'Sum(keep="64MiB")': lambda: summed("64MiB"),
            ONE_GRAPH: lambda: self.ours(whole),
        }

    def by_hand(self) -> Tensor:
        """CG on products that are accumulated batch by batch, after the residual of the inner problem."""
        w = {name: x.detach().requires_grad_() for name, x in self.w.items()}
        leaves, share = list(w.values()), 1 / len(self.batches)

        def accumulated(v: Sequence[Tensor] | None, inputs: Sequence[Tensor]) -> list[Tensor]:
            penalty = self.penalty(w, self.lam)
            gradient = torch.autograd.grad(penalty, leaves, create_graph=v is not None)
            total = list(gradient if v is None else torch.autograd.grad(gradient, inputs, v))
            for batch in self.batches:
                gradient = torch.autograd.grad(self.loss(w, self.lam, batch), leaves, create_graph=v is not None)
                parts = gradient if v is None else torch.autograd.grad(gradient, leaves, v)
                for x, part in zip(total, parts, strict=False):
                    x.add_(part, alpha=share)
            return total

        accumulated(None, leaves)
        r = list(torch.autograd.grad(self.outer(w, self.lam), leaves))
        x, p = [torch.zeros_like(g) for g in r], list(r)
        size = dot(r, r)
        for _ in range(STEPS):
            image = accumulated(p, leaves)
            step = size / dot(p, image)
            x = [a + step * b for a, b in zip(x, p, strict=True)]
            r = [a - step * b for a, b in zip(r, image, strict=True)]
            last, size = size, dot(r, r)
            p = [a + size / last * b for a, b in zip(r, p, strict=True)]
        return -accumulated(x, [*leaves, self.lam])[-1]


def dot(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(xs, ys, strict=True)]).sum()


def measure(rows: Sequence[str], words: Sequence[str] | None, rounds: int | None) -> tuple[list[Result], list[dict]]:
    results, settings = [], []
    for name in rows:
        case, turns = Case(), rounds or ROUNDS[name]
        methods = case.methods()
        chosen = {m: call for m, call in methods.items() if words is None or m == BY_HAND or any(w in m for w in words)}
        truth = methods[ONE_GRAPH]()
        errors = {m: float((call() - truth).norm() / truth.norm()) for m, call in chosen.items()}
        memory = {m: peak_memory(call) for m, call in chosen.items()}
        with tqdm(total=len(chosen) * (turns + 1), desc=f"{name}: clock", leave=False) as bar:
            times = interleaved(chosen, turns, 1, bar.update)
        for m in chosen:
            ratio = ratios(times[m], times[BY_HAND])[0]
            results.append(Result(name, m, errors[m], Spread.of(times[m].cpu), ratio, memory[m]))
        size = sum(x.numel() for x in case.w.values())
        settings.append(
            {"row": name, "batches": len(case.batches), "parameters": size, "steps": STEPS, "rounds": turns}
        )
    return results, settings


def table(results: list[Result]) -> str:
    lines = [f"{'':28}{'error':>10}{'s':>8}{'over by hand':>24}{'MiB':>8}"]
    for r in results:
        ratio = f"{r.ratio.middle:.2f} [{r.ratio.low:.2f}, {r.ratio.high:.2f}]"
        lines.append(f"  {r.method:26}{r.error:10.1e}{cell(r.seconds, '8.2f')}{ratio:>24}{r.memory * MIB:8.1f}")
    return "\n".join(lines)


def draw(results: list[Result], path: Path) -> None:
    chosen = [
        Bar(r.method, r.ratio, f"{r.ratio.middle:.2f}, {r.memory * MIB:.0f} MiB", r.method not in (BY_HAND, ONE_GRAPH))
        for r in results
    ]
    panels = [Panel("", chosen, label="CPU time over the loop by hand; peak memory", line=1)]
    draw_panels(path, "A hypergradient over 32 batches", panels)


ABOUT = """A hypergradient by CG over 32 batches with `operators.Sum`, compared with the same loop by hand, and with
one graph of all rows."""
SECTION = Section("Sums over batches", lambda: ROUNDS, measure, table, draw, ABOUT)
