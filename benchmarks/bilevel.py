"""Trackers of hg.bilevel compared with BOAT and Betty at fixed hparams, and the time of a step of SOBA over its passes.

On ridge regression with a decay for each weight, and on data cleaning with a weight for each example, every method
takes the same small steps on full batches until its direction no longer changes. That direction is compared with the
hypergradient from a dense solve, and a step is timed. (BOME and VFO move params along the outer loss, too, so at fixed
hparams their direction need not be a hypergradient; SAMA replaces the inverse Hessian by the identity.) On a small
convolutional network the time of a step of SOBA is compared with the passes that it consists of, written by hand: an
evaluation and two reverse passes of g, an evaluation and one reverse pass of f.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import hypergrad as hg

from . import peers
from .measure import Spread, counted, counting, interleaved, peak_memory, ratios
from .pictures import Bar, Panel
from .pictures import draw as draw_panels
from .report import Section, cell

Tensors = list[Tensor]
PENALTIES = (10.0, 100.0, 1000.0)
STEPS = 300  # after which the direction of the slowest method no longer changes
INNER = 10  # K of AmIGO, BOME, VFO and VSO
COMPILE: bool | str = True  # the backend of compiled steps
ROUNDS = {"ridge": 20, "cleaning": 10, "CNN": 30, "logistic, d = 22": 100}


class Values(nn.Module):
    """A vector as a module: the hparams in BOAT's form."""

    def __init__(self, values: Tensor):
        super().__init__()
        self.values = nn.Parameter(values)


# The losses in BOAT's form: functions of a dict of data, the module of hparams (upper), and that of params (lower).


def ridge_inner(data: dict[str, Tensor], upper: Any, lower: Any) -> Tensor:
    w = lower.weight[0]
    return ((data["x"] @ w - data["y"]) ** 2).mean() / 2 + (upper.values.exp() * w**2).sum() / 2


def ridge_outer(data: dict[str, Tensor], upper: Any, lower: Any) -> Tensor:
    return ((data["xv"] @ lower.weight[0] - data["yv"]) ** 2).mean() / 2


def cleaning_inner(data: dict[str, Tensor], upper: Any, lower: Any) -> Tensor:
    losses = cross_entropy(lower(data["x"]), data["y"], reduction="none")
    return (upper.values.sigmoid() * losses).mean() + 0.05 * (lower.weight**2).sum()


def cleaning_outer(data: dict[str, Tensor], upper: Any, lower: Any) -> Tensor:
    return cross_entropy(lower(data["xv"]), data["yv"])


class Case:
    """A problem at its start: modules in float64, both losses, the exact hypergradient, and a step size 1/L."""

    def __init__(self, name: str, inner: Any, outer: Any, data: dict[str, Tensor], lower: nn.Linear, upper: Values):
        self.name, self.data, self.losses = name, data, (inner, outer)
        self.lower, self.upper = lower.double(), upper.double()
        nn.init.zeros_(self.lower.weight)
        self.exact, top, self.least = self.solved()
        self.lr = 0.9 / top

    @property
    def params(self) -> Tensors:
        return list(self.lower.parameters())

    @property
    def hparams(self) -> Tensors:
        return list(self.upper.parameters())

    def inner(self) -> Tensor:
        return self.losses[0](self.data, self.upper, self.lower)

    def outer(self) -> Tensor:
        return self.losses[1](self.data, self.upper, self.lower)

    def fresh(self) -> Case:
        """A copy of the problem with params at zero."""
        case = deepcopy(self)
        nn.init.zeros_(case.lower.weight)
        return case

    def solved(self) -> tuple[Tensor, float, float]:
        """Solve by Newton's method. Returns the hypergradient by a dense solve, the Hessian's top eigenvalue, and g."""
        w, shape = self.lower.weight, self.lower.weight.shape
        gradient, hessian = self._dense(self.inner)
        for _ in range(30):
            with torch.no_grad():
                w -= torch.linalg.solve(hessian, gradient).reshape(shape)
            gradient, hessian = self._dense(self.inner)
        slope, direct = torch.autograd.grad(self.outer(), [w, *self.hparams], allow_unused=True)
        v = torch.linalg.solve(hessian, slope.reshape(-1)).reshape(shape)
        (gradient,) = torch.autograd.grad(self.inner(), [w], create_graph=True)
        (cross,) = torch.autograd.grad(gradient, self.hparams, v)
        exact = -cross if direct is None else direct - cross
        return exact, float(torch.linalg.eigvalsh(hessian)[-1]), self.inner().item()

    def _dense(self, loss: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        w = self.lower.weight
        (gradient,) = torch.autograd.grad(loss(), [w], create_graph=True)
        each = torch.eye(w.numel(), dtype=w.dtype).reshape(-1, *w.shape)
        (rows,) = torch.autograd.grad(gradient, [w], each, is_grads_batched=True)
        return gradient.detach().reshape(-1), rows.reshape(w.numel(), -1)


def ridge(n: int = 200, d: int = 30) -> Case:
    draw = torch.Generator().manual_seed(0)
    x, xv = (torch.randn(n, d, generator=draw, dtype=torch.float64) for _ in range(2))
    w = torch.randn(d, generator=draw, dtype=torch.float64)
    y, yv = (each @ w + torch.randn(n, generator=draw, dtype=torch.float64) for each in (x, xv))
    data = {"x": x, "y": y, "xv": xv, "yv": yv}
    return Case("ridge", ridge_inner, ridge_outer, data, nn.Linear(d, 1, bias=False), Values(torch.full((d,), -1.0)))


def cleaning(n: int = 500, d: int = 30, classes: int = 5, wrong: float = 0.4) -> Case:
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, d, generator=draw, dtype=torch.float64) / 2
    y, yv = (torch.randint(classes, (count,), generator=draw) for count in (n, n // 2))
    x, xv = (centres[each] + torch.randn(len(each), d, generator=draw, dtype=torch.float64) for each in (y, yv))
    flipped = torch.rand(n, generator=draw) < wrong
    labels = torch.where(flipped, torch.randint(classes, (n,), generator=draw), y)
    data = {"x": x, "y": labels, "xv": xv, "yv": yv}
    lower, upper = nn.Linear(d, classes, bias=False), Values(torch.zeros(n))
    return Case("cleaning", cleaning_inner, cleaning_outer, data, lower, upper)


CASES: dict[str, Callable[[], Case]] = {"ridge": ridge, "cleaning": cleaning}
QUICK: dict[str, Callable[[], Case]] = {"ridge": lambda: ridge(40, 5), "cleaning": lambda: cleaning(40, 5, 3)}
Step = Callable[[], Tensor]  # updates params and the method's state once; returns the direction for hparams


@dataclass(frozen=True)
class Method:
    """A method that computes the direction for hparams.

    Attributes:
        counts: evaluations of g and f, reverse passes and second-order products of a step (None: not asserted).
        exact: largest relative error of its direction, for a method that converges to the hypergradient.
    """

    name: str
    library: str
    make: Callable[[Case], Step]
    counts: dict[str, int] | None = field(default=None, hash=False)
    exact: float | None = None


def ours(make: Callable[[Case, torch.optim.Optimizer], hg.bilevel.Tracker]) -> Callable[[Case], Step]:
    def build(case: Case) -> Step:
        optimizer = torch.optim.SGD(case.params, lr=case.lr)
        tracker = make(case, optimizer)

        def step() -> Tensor:
            tracker.backward(lambda: case.outer(), lambda: case.inner())
            optimizer.step()
            tracker.step()
            optimizer.zero_grad()
            direction, case.hparams[0].grad = case.hparams[0].grad, None
            assert direction is not None
            return direction

        return step

    return build


def f2sa(order: int, penalty: float) -> Method:
    copies = {1: 1, 2: 2}[order]
    return Method(
        f"F2SA-{order}, penalty {penalty:g}",
        "hypergrad",
        ours(lambda c, _: hg.bilevel.F2SA(c.params, c.hparams, order=order, penalty=penalty, lr=c.lr)),
        {"inner": 1 + copies, "outer": copies, "passes": 1 + 2 * copies, "products": 0},
    )


def tracked(name: str, kind: Any, counts: tuple[int, int, int, int], exact: float | None, **options: Any) -> Method:
    """A method of hg.bilevel; `lr=None` and `optimizer=None` in `options` stand for the case's own."""

    def make(case: Case, optimizer: torch.optim.Optimizer) -> hg.bilevel.Tracker:
        given = {"lr": case.lr, "optimizer": optimizer}
        return kind(case.params, case.hparams, **{k: given[k] if v is None else v for k, v in options.items()})

    names = ("inner", "outer", "passes", "products")
    return Method(name, "hypergrad", ours(make), dict(zip(names, counts, strict=True)), exact)


METHODS = (
    tracked("SOBA", hg.bilevel.SOBA, (1, 1, 3, 1), 1e-8, lr=None),
    tracked("AmIGO", hg.bilevel.AmIGO, (1, 1, INNER + 3, INNER + 1), 1e-8, steps=INNER, lr=None),
    *(f2sa(order, penalty) for order in (1, 2) for penalty in PENALTIES),
    tracked("BOME", hg.bilevel.BOME, (INNER + 1, 1, INNER + 2, 0), None, steps=INNER, lr=None),
    tracked("SAMA (plain steps)", hg.bilevel.SAMA, (3, 1, 4, 0), None, lr=1.0),
    Method("SAMA (plain steps)", "Betty", peers.betty_sama),
    *(Method(f"PGDO, penalty {x:g}", "BOAT", partial(peers.boat, "PGDO", penalty=x)) for x in PENALTIES),
    *(Method(f"MESO, penalty {x:g}", "BOAT", partial(peers.boat, "MESO", penalty=x)) for x in PENALTIES),
    *(Method(f"VSO, penalty {x:g}", "BOAT", partial(peers.boat, "VSO", penalty=x, steps=INNER)) for x in PENALTIES),
    Method("VFO", "BOAT", partial(peers.boat, "VFO", steps=INNER)),
)


def available(words: Sequence[str] | None = None) -> list[Method]:
    there = {"BOAT": peers.installed("boat_torch", "higher"), "Betty": peers.betty_has("sama")}
    installed = [m for m in METHODS if there.get(m.library, True)]
    return [m for m in installed if words is None or any(word in m.name for word in words)]


@dataclass(frozen=True)
class Result:
    """One method on one problem. `error` and `cosine` compare its last direction with the hypergradient."""

    row: str
    method: str
    library: str
    error: float | None
    cosine: float | None
    cpu: Spread | None  # CPU seconds of a step
    ratio: Spread | None  # CPU time over that of SOBA, or of the passes by hand
    peak: int | None  # peak memory of a step in bytes
    vectors: float | None = None  # vectors of params' size that a step holds beyond the passes by hand


def settled(case: Case, method: Method, steps: int) -> tuple[float, float, Step]:
    """Relative error and cosine of the direction after `steps` steps, and the function that takes the next step."""
    step = method.make(case.fresh())
    direction = step()
    for _ in range(steps - 1):
        direction = step()
    direction, exact = direction.reshape(-1), case.exact.reshape(-1)
    cosine = float(direction @ exact / (direction.norm() * exact.norm()))
    return float((direction - exact).norm() / exact.norm()), cosine, step


def measure_case(case: Case, methods: Sequence[Method], rounds: int, steps: int) -> list[Result]:
    """Compute all directions first, then time all methods in turns; every method continues from its last step."""
    found, calls = {}, {}
    for method in tqdm(methods, desc=f"{case.name}: directions", leave=False):
        error, cosine, step = settled(case, method, steps)
        if method.exact is not None and not error <= method.exact:
            raise AssertionError(f"{case.name}, {method.name}: wrong by {error:.1e}")
        found[method], calls[method] = (error, cosine), step
    with tqdm(total=len(calls) * (rounds + 1), desc=f"{case.name}: clock", leave=False) as bar:
        times = interleaved(calls, rounds, 5, bar.update)
    base = times[methods[0]]
    return [
        Result(
            case.name,
            method.name,
            method.library,
            *found[method],
            cpu=Spread.of(times[method].cpu),
            ratio=ratios(times[method], base)[0],
            peak=peak_memory(calls[method]),
        )
        for method in methods
    ]


# The time of a step of SOBA over that of its passes.


class Network:
    """A model on random data with hparams; the losses are functions of a batch."""

    def __init__(self, model: nn.Module, hparams: Tensor, x: Tensor, classes: int):
        self.model, self.hparams = model, hparams.requires_grad_()
        self.params = list(model.parameters())
        labels = torch.randint(classes, (2, x.shape[1]))
        self.train, self.valid = zip(x, labels, strict=True)
        self.v = [torch.randn_like(w) for w in self.params]
        self.tracker, self.compiled = (hg.bilevel.SOBA(self.params, [hparams], lr=0.0) for _ in range(2))

    def inner(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """hparams weight the examples if there is one for each, else they are decays of the first tensor's entries."""
        losses = cross_entropy(self.model(batch[0]), batch[1], reduction="none")
        if len(self.hparams) == len(losses):
            return (self.hparams.sigmoid() * losses).mean() + 1e-3 * sum((w**2).sum() for w in self.params)
        return losses.mean() + (self.hparams.exp() * self.params[0] ** 2).sum()

    def outer(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(self.model(batch[0]), batch[1])

    def by_hand(self) -> Any:
        """Only the passes of a step: an evaluation and two reverse passes of g, an evaluation and a pass of f."""
        slopes = torch.autograd.grad(self.outer(self.valid), self.params)
        gradient = torch.autograd.grad(self.inner(self.train), self.params, create_graph=True)
        return slopes, torch.autograd.grad(gradient, [*self.params, self.hparams], self.v)

    def step(self) -> None:
        """A user's step without the optimizers of the two levels."""
        self._clear()
        self.tracker.backward(lambda: self.outer(self.valid), lambda: self.inner(self.train))
        self.tracker.step()

    def compiled_step(self) -> None:
        self._clear()
        self.compiled.backward(self.outer, self.inner, batches=(self.valid, self.train), compile=COMPILE)
        self.compiled.step()

    def training(self) -> None:
        """The passes of an ordinary training step on g, for comparison."""
        torch.autograd.grad(self.inner(self.train), self.params)

    def _clear(self) -> None:
        for x in (*self.params, self.hparams):
            x.grad = None


def convolutional(batch: int = 100, side: int = 28, channels: int = 8) -> Network:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, channels, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * channels * ((side + 3) // 4) ** 2, 10),
    )
    return Network(model, torch.zeros(batch), torch.randn(2, batch, 1, side, side), 10)


def logistic(batch: int = 64, size: int = 22) -> Network:
    torch.manual_seed(0)
    return Network(nn.Linear(size, 2, bias=False), torch.full((size,), -3.0), torch.randn(2, batch, size), 2)


NETWORKS: dict[str, Callable[[], Network]] = {"CNN": convolutional, "logistic, d = 22": logistic}


def measure_network(row: str, network: Network, rounds: int) -> list[Result]:
    calls = {
        "its passes by hand": network.by_hand,
        "SOBA, backward and step": network.step,
        "SOBA, compile=True": network.compiled_step,
        "∇g alone": network.training,
    }
    with tqdm(total=len(calls) * (rounds + 1), desc=f"{row}: clock", leave=False) as bar:
        times = interleaved(calls, rounds, 5, bar.update)
    peaks = {name: peak_memory(call) for name, call in calls.items()}
    vector = sum(w.numel() * w.element_size() for w in network.params)
    first = "its passes by hand"
    return [
        Result(row, name, "hypergrad" if "SOBA" in name else "floor", None, None, Spread.of(times[name].cpu),
               ratios(times[name], times[first])[0], peaks[name], (peaks[name] - peaks[first]) / vector)
        for name in calls
    ]  # fmt: skip


def count(case: Case, method: Method) -> dict[str, int]:
    """Evaluations of both losses, reverse passes and second-order products of a method's second step."""
    case, counts = case.fresh(), Counter[str]()
    step, (inner, outer), pull = method.make(case), case.losses, hg.bilevel.Oracles.pull
    step()
    case.losses = counting(inner, counts, "inner"), counting(outer, counts, "outer")
    with (
        counted(reads=False) as found,
        patch.object(hg.bilevel.Oracles, "pull", autospec=True, side_effect=pull) as pulls,
    ):
        step()
    return {**counts, "passes": found["passes"], "products": pulls.call_count}


def measure(rows: Sequence[str], words: Sequence[str] | None, rounds: int | None) -> tuple[list[Result], list[dict]]:
    results: list[Result] = []
    settings = []
    for name in tqdm(rows, desc="rows"):
        turns = rounds or ROUNDS[name]
        if name in CASES:
            case = CASES[name]()
            results += measure_case(case, available(words), turns, STEPS)
            sizes = {"params": case.lower.weight.numel(), "hparams": case.hparams[0].numel(), "steps": STEPS}
        else:
            network = NETWORKS[name]()
            results += measure_network(name, network, turns)
            sizes = {"params": sum(w.numel() for w in network.params), "hparams": network.hparams.numel()}
        settings.append({"row": name, **sizes, "rounds": turns, "calls a round": 5, "threads": 1})
    return results, settings


def table(results: Sequence[Result]) -> str:
    lines = []
    for row in dict.fromkeys(r.row for r in results):
        over = "by hand" if row in NETWORKS else "SOBA"
        lines.append(
            f"{row:26}{'':10}{'error':>9}{'cosine':>9}{'ms a step':>11}  {f'over {over}, CPU':22}{'peak KiB':>10}"
            f"{'vectors beyond' if row in NETWORKS else '':>16}"
        )
        for r in results:
            if r.row == row:
                quartiles = f"{r.ratio.middle:.2f} [{r.ratio.low:.2f}, {r.ratio.high:.2f}]" if r.ratio else ""
                lines.append(
                    f"  {r.method:24}{r.library:10}{cell(r.error, '9.1e'):>9}{cell(r.cosine, '9.5f'):>9}"
                    f"{cell(r.cpu, '11.3f', 1e3):>11}  {quartiles:22}{cell(r.peak, '10.1f', 2**-10):>10}"
                    f"{cell(r.vectors, '16.2f'):>16}"
                )
    return "\n".join(lines)


def draw(results: Sequence[Result], path: Path) -> None:
    """One bar per method: the time of a step over that of the base, labelled with the error."""
    panels = []
    for row in dict.fromkeys(r.row for r in results):
        cells = [r for r in results if r.row == row and r.ratio and not r.method.endswith((" 10", " 1000"))]
        chosen = [Bar(f"{r.library}: {r.method}", r.ratio, own=r.library == "hypergrad") for r in cells]
        panels.append(Panel(row, [replace(b, text=off(b, r)) for b, r in zip(chosen, cells, strict=True)], line=1))
    title = "A step: CPU time over SOBA's (networks: over its\npasses by hand), and error of the direction"
    draw_panels(path, title, panels)


def off(bar: Bar, r: Result) -> str:
    assert isinstance(bar.value, Spread)
    return f"{bar.value.middle:.2f}" + ("" if r.error is None else f", off by {r.error:.0e}")


ABOUT = """A step of each tracker of `hg.bilevel`, of BOAT and of Betty, on full batches at fixed λ. First every
method takes small steps until its direction no longer changes; `error` and `cosine` compare that direction with the
hypergradient of a dense solve. (At fixed λ the directions of BOME and VFO need not be hypergradients, and SAMA takes
the identity for the inverse Hessian.) Then a step is timed. On the convolutional network a step of SOBA is compared
with the passes that it consists of."""
SECTION = Section("Minibatch algorithms: a step", lambda: ROUNDS, measure, table, draw, ABOUT)
