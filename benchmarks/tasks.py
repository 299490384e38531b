"""hg.meta compared with a loop over tasks, as in HyperTorch: same net, T and K. Results are checked before the timing.

The loop is HyperTorch's experiment, written again here: for one task after the other, T gradient steps, then CG with K
products on the map w − ∇g (or, for MAML, one reverse pass through the steps), and a sum over tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from tqdm import tqdm

import hypergrad as hg

from .measure import Spread, interleaved, peak_memory, ratios
from .methods import HyperTorch
from .pictures import Bar, Panel
from .pictures import draw as draw_panels
from .problems import Problem
from .report import Section

LR = 0.01
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}  # relative errors; K steps of CG amplify rounding
METHODS = {
    "implicit": lambda steps: hg.meta.Implicit(solver=hg.solvers.CG(max_steps=steps, on_failure="ignore")),
    "unrolled": lambda steps: hg.meta.Unrolled(),
}


@dataclass(frozen=True)
class Setting:
    """A net, its tasks ((x, y) for the inner loss, (x, y) for the outer loss), and the speed-up that we aim at."""

    name: str
    net: Callable[[], nn.Module]
    data: Callable[[int], tuple[Any, Any]]
    loss: Callable[[Tensor, Tensor], Tensor]
    counts: Sequence[int]
    target: float
    strength: float = 2.0  # ρ
    steps: int = 16  # T
    products: int = 5  # K
    rounds: int = 9


@dataclass(frozen=True)
class Row:
    """`ratio` is the loop's CPU time over that of hg.meta; errors are relative to the loop in float64."""

    setting: str
    method: str
    tasks: int
    chunk: int
    ratio: Spread
    milliseconds: float
    loop_milliseconds: float
    peak_mib: float
    loop_peak_mib: float
    error64: float
    error32: float
    loop_error32: float
    target: float


class Case:
    """One setting with `count` tasks in one dtype, and its meta-gradient by hg.meta and by the loop."""

    def __init__(self, setting: Setting, method: str, count: int, dtype: torch.dtype):
        torch.manual_seed(0)
        self.setting, self.method = setting, method
        net = setting.net()
        self.tasks = _cast(setting.data(count), dtype)
        self.net = net.to(dtype)
        self.hparams = dict(self.net.named_parameters())
        self.model = hg.nn.functional(self.net)

    def fit(self, params: dict[str, Tensor], data: Any) -> Tensor:
        return self.setting.loss(self.model(params, data[0]), data[1])

    def meta(self, chunk: int | None = None) -> tuple[list[Tensor], int]:
        inner = hg.meta.biased(lambda w, h, task: self.fit(w, task[0]), self.setting.strength)
        result = hg.meta.grad(
            lambda w, h, task: self.fit(w, task[1]),
            inner,
            self.hparams,
            self.tasks,
            method=METHODS[self.method](self.setting.products),
            steps=self.setting.steps,
            rule=hg.diff_optimizers.SGD(lr=LR),
            reduction="sum",
            chunk=chunk,
        )
        return list(result.grads.values()), result.plan.chunk

    def loop(self) -> list[Tensor]:
        total = [torch.zeros_like(h) for h in self.hparams.values()]
        (x, y), (q, z) = self.tasks
        for task in zip(x, y, q, z, strict=True):
            grads = self.loop_implicit(task) if self.method == "implicit" else self.loop_unrolled(task)
            total = [a + b for a, b in zip(total, grads, strict=True)]
        return total

    def inner(self, params: Sequence[Tensor], hparams: Sequence[Tensor], task: Any) -> Tensor:
        away = sum(((h - w) ** 2).sum() for h, w in zip(hparams, params, strict=True))
        return self.fit(dict(zip(self.hparams, params, strict=True)), task[:2]) + 0.5 * self.setting.strength * away

    def outer(self, params: Sequence[Tensor], hparams: Sequence[Tensor], task: Any) -> Tensor:
        return self.fit(dict(zip(self.hparams, params, strict=True)), task[2:])

    def loop_implicit(self, task: Any) -> list[Tensor]:
        hparams: list[Tensor] = list(self.hparams.values())
        params = [h.detach().requires_grad_() for h in hparams]
        for _ in range(self.setting.steps):
            grads = torch.autograd.grad(self.inner(params, hparams, task), params)
            params = [(w - LR * g).detach().requires_grad_() for w, g in zip(params, grads, strict=True)]
        inner, outer = (lambda w, h, _, f=f: f(w, h, task) for f in (self.inner, self.outer))
        return HyperTorch(Problem("", params, hparams, {}, inner, outer, 1.0, self.setting.products)).cg()

    def loop_unrolled(self, task: Any) -> list[Tensor]:
        hparams = params = list(self.hparams.values())
        for _ in range(self.setting.steps):
            grads = torch.autograd.grad(self.inner(params, hparams, task), params, create_graph=True)
            params = [w - LR * g for w, g in zip(params, grads, strict=True)]
        return list(torch.autograd.grad(self.outer(params, hparams, task), hparams))


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    if isinstance(tree, Tensor):
        return tree.to(dtype) if tree.is_floating_point() else tree
    return tuple(_cast(each, dtype) for each in tree)


def by_gather(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy by gather, which costs less under vmap than torch's function (see hg.meta)."""
    return -logits.log_softmax(-1).gather(-1, y.unsqueeze(-1)).mean()


def sinusoids(count: int) -> tuple[Any, Any]:
    """y = a sin(x + φ) of Finn et al. 2017, with 10 points for each of the two losses."""
    a, phase = 0.1 + 4.9 * torch.rand(count, 1, 1), torch.pi * torch.rand(count, 1, 1)
    x = 10 * torch.rand(count, 20, 1) - 5
    y = a * torch.sin(x + phase)
    return (x[:, :10], y[:, :10]), (x[:, 10:], y[:, 10:])


def classes(shape: tuple[int, ...], shots: int, queries: int, ways: int = 5) -> Callable[[int], tuple[Any, Any]]:
    def draw(count: int) -> tuple[Any, Any]:
        centres = torch.randn(count, ways, 1, *shape)
        x = centres + torch.randn(count, ways, shots + queries, *shape)
        y = torch.arange(ways).reshape(1, ways, 1).expand(count, ways, shots + queries)
        parts = (slice(None, shots), slice(shots, None))
        support, query = ((x[:, :, part].flatten(1, 2), y[:, :, part].flatten(1)) for part in parts)
        return support, query

    return draw


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))


def convolutions(filters: int, blocks: int = 4) -> nn.Module:
    layers: list[nn.Module] = []
    for i in range(blocks):
        layers += [nn.Conv2d(filters if i else 1, filters, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.BatchNorm2d(filters, track_running_stats=False)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(filters, 5))


SETTINGS = (
    Setting("sinusoid, MLP 40-40", perceptron, sinusoids, mse_loss, (16, 64), 5.0, strength=50.0),
    Setting("linear heads", lambda: nn.Linear(64, 5), classes((64,), 5, 15), cross_entropy, (16, 64), 5.0),
    Setting(
        "linear heads, cross-entropy by gather",
        lambda: nn.Linear(64, 5),
        classes((64,), 5, 15),
        by_gather,
        (16, 64),
        5.0,
    ),
    Setting(
        "4 convolutions of 64 filters, 28×28, 5-way 1-shot",
        lambda: convolutions(64),
        classes((1, 28, 28), 1, 15),
        cross_entropy,
        (4,),
        1.0,
        steps=16,
        rounds=5,
    ),
)
QUICK = (
    replace(SETTINGS[0], counts=(3,), steps=2, products=2, rounds=1),
    replace(SETTINGS[2], counts=(3,), steps=2, products=2, rounds=1),
    replace(
        SETTINGS[3],
        net=lambda: convolutions(2),
        data=classes((1, 16, 16), 1, 1),
        counts=(2,),
        steps=2,
        products=2,
        rounds=1,
    ),
)


def relative(values: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    a, b = (torch.cat([x.reshape(-1).double() for x in xs]) for xs in (values, truth))
    return float((a - b).norm() / b.norm())


def check(setting: Setting, method: str, count: int) -> tuple[float, float, float]:
    """Errors of hg.meta in float64 and float32, and of the loop in float32. Raises if one of hg.meta is too large."""
    exact, single = (Case(setting, method, count, dtype) for dtype in (torch.float64, torch.float32))
    truth = exact.loop()
    errors = relative(exact.meta()[0], truth), relative(single.meta()[0], truth), relative(single.loop(), truth)
    if errors[0] > TOLERANCE[torch.float64] or errors[1] > max(TOLERANCE[torch.float32], 10 * errors[2]):
        raise AssertionError(f"{setting.name}, {method}, {count} tasks: wrong by {errors[0]:.1e}, {errors[1]:.1e}")
    return errors


def measure(setting: Setting, method: str, count: int, rounds: int | None = None) -> Row:
    errors = check(setting, method, count)
    case = Case(setting, method, count, torch.float32)
    times = interleaved({"meta": case.meta, "loop": case.loop}, rounds or setting.rounds)
    ratio, _ = ratios(times["loop"], times["meta"])
    own, loop = (1e3 * Spread.of(times[name].cpu).middle for name in ("meta", "loop"))
    return Row(
        setting=setting.name,
        method=method,
        tasks=count,
        chunk=case.meta()[1],
        ratio=ratio,
        milliseconds=own,
        loop_milliseconds=loop,
        peak_mib=peak_memory(case.meta) / 2**20,
        loop_peak_mib=peak_memory(case.loop) / 2**20,
        error64=errors[0],
        error32=errors[1],
        loop_error32=errors[2],
        target=setting.target,
    )


def measure_all(
    names: Sequence[str], words: Sequence[str] | None, rounds: int | None, settings: Sequence[Setting] = SETTINGS
) -> tuple[list[Row], list[dict]]:
    """Measure every setting with every method and number of tasks."""
    chosen = [setting for setting in settings if setting.name in names]
    methods = [method for method in METHODS if words is None or any(word in method for word in words)]
    every = [(setting, method, count) for setting in chosen for method in methods for count in setting.counts]
    results = [measure(*each, rounds) for each in tqdm(every, desc="tasks", leave=False)]
    keys = ("name", "steps", "products", "counts", "target")
    return results, [{key: getattr(s, key) for key in keys} | {"rounds": rounds or s.rounds} for s in chosen]


def table(results: Sequence[Row]) -> str:
    lines = [
        f"{'':56}{'method':12}{'tasks':>6}  {'loop / hg.meta, CPU':22}{'target':>7}{'ms':>9}{'peak MiB':>10}{'loop':>8}"
        f"{'at once':>9}{'error, float64':>16}{'float32':>9}{'loop':>9}"
    ]
    for r in results:
        quartiles = f"{r.ratio.middle:.2f} [{r.ratio.low:.2f}, {r.ratio.high:.2f}]"
        lines.append(
            f"{r.setting:56}{r.method:12}{r.tasks:6}  {quartiles:22}{r.target:7.0f}{r.milliseconds:9.1f}"
            f"{r.peak_mib:10.1f}{r.loop_peak_mib:8.1f}{r.chunk:9}{r.error64:16.1e}{r.error32:9.1e}{r.loop_error32:9.1e}"
        )
    return "\n".join(lines)


def draw(results: Sequence[Row], path: Path) -> None:
    """One bar per setting, method and number of tasks: the speed-up over the loop, with a tick at the target."""
    panels = [
        Panel(
            setting,
            [Bar(f"{r.method}, {r.tasks} tasks", r.ratio, target=r.target) for r in results if r.setting == setting],
            line=1,
        )
        for setting in dict.fromkeys(r.setting for r in results)
    ]
    draw_panels(path, "How many times faster hg.meta is than a loop over tasks\n(CPU time; red: target)", panels)


ABOUT = """The meta-gradient of many tasks at once by `hg.meta`, compared with a loop over tasks as HyperTorch has
it: the same network, number of steps and products. `loop / hg.meta` is the ratio of CPU times: above 1, `hg.meta` is
faster."""
SECTION = Section("Batched tasks", lambda: [s.name for s in SETTINGS], measure_all, table, draw, ABOUT)
