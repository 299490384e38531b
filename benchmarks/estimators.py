"""The error of every estimator of a hypergradient on real networks in mid-training.

The truth is the derivative of retraining: `unroll.reverse` through all T steps from the start, in float64, which is
compared with central differences of retraining. Every estimator is evaluated at the weights after these T steps.
Trackers with a state (copies, an adjoint) update it in every step from the start, at fixed λ. All batches are full, so
the errors are those of the estimators alone; minibatches add theirs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import hypergrad as hg

from . import networks
from .measure import counted
from .networks import F64, Case, Named
from .pictures import BLUE, RED, column
from .report import Section

SEEDS = 3
PARTS = {"decay": "decay of each tensor", "weights": "weight of each example"}
PRODUCTS = 50  # largest number of CG's
PENALTY = 100.0  # of F2SA
DIFFERENCES = (1e-4, 0.1)  # distances over which λ is moved in retraining


class Point:
    """A network after training by torch's optimizer: the input of an estimator.

    Attributes:
        metric: the optimizer's steps are −η ∇g / metric. For SGD metric is 1 and η is lr/(1 − momentum); for Adam
            metric is √v + ε over its mean, so that its own mean is 1, and η is lr over that mean.
        damping: 1/ηT. top, least: the largest and the smallest eigenvalue of the Hessian of the inner loss.
    """

    def __init__(self, case: Case):
        self.case, self.h = case, case.hparams()
        self.live, self.optimizer = case.trained(case.steps)
        self.w = {name: x.detach() for name, x in self.live.items()}
        self.metric, self.damping = self._metric_and_damping()
        problem = hg.implicit.Problem(None, inner_loss=case.inner, params=self.w, hparams=self.h)
        found = hg.diagnostics.structure(problem, steps=40)
        self.least, self.top = (float(found.eigenvalues[i].real) for i in (0, -1))

    def along(self, make: Callable[[Named], hg.bilevel.Tracker]) -> Named:
        """The direction at the last weights of a tracker that was updated in every step of training."""
        trackers: list[hg.bilevel.Tracker] = []

        def each(w: Named) -> None:
            if not trackers:
                trackers.append(make(w))
            self.direction(trackers[0], w)
            trackers[0].step()

        w, _ = self.case.trained(self.case.steps, each=each)
        return self.direction(trackers[0], w)

    def direction(self, tracker: hg.bilevel.Tracker, w: Named) -> Named:
        """The direction that a tracker adds to the .grad of λ; the one for w stays in the .grad of w for a step."""
        for x in (*w.values(), *self.h.values()):
            x.grad = None
        tracker.backward(lambda: self.case.outer(w, self.h), lambda: self.case.inner(w, self.h))
        return {k: torch.zeros_like(x) if x.grad is None else x.grad for k, x in self.h.items()}

    def implicit(self, solver: Any, inner: Any = None) -> Named:
        inner = self.case.inner if inner is None else inner
        return hg.implicit.grad(self.case.outer, inner_loss=inner, params=self.w, hparams=self.h, solver=solver).grads

    def anchored(self, w: Named, h: Named) -> Tensor:
        """The penalty plus ½ Σ metric (w − w_T)² / ηT."""
        apart = [(d * (w[n] - self.w[n]).square()).sum() for n, d in self.metric.items()]
        return self.case.penalty(w, h) + self.damping / 2 * torch.stack(apart).sum()

    def unrolled(self, optimizer: torch.optim.Optimizer, steps: int) -> tuple[Named, Named]:
        """The hypergradient through `steps` further steps of an optimizer, and the weights after them."""

        def named(leaves: Sequence[Tensor]) -> Named:
            return dict(zip(self.w, leaves, strict=True))

        rule, leaves, state = hg.diff_optimizers.from_torch(optimizer)
        run = hg.unroll.reverse(
            rule.on(lambda w, h: self.case.inner(named(w), h)),
            (leaves, state),
            self.h,
            lambda carry, h: self.case.outer(named(carry[0]), h),
            steps=steps,
        )
        return run.grads, named(run.params[0])

    def truth(self) -> Named:
        """The derivative of retraining, through all steps."""
        start = [x.clone().requires_grad_() for x in self.case.start.values()]
        grads, w = self.unrolled(self.case.optimizer(start), self.case.steps)
        apart = max(float((w[n] - x).abs().max()) for n, x in self.w.items())
        assert apart < 1e-9, f"{self.case.name}: the differentiated steps end {apart:.1e} from torch's"
        return grads

    def differences(self, truth: Named, step: float) -> float:
        """The relative difference between the norm of a hypergradient and the central difference along it."""
        size = norm(truth)
        ends = []
        for s in (step, -step):
            w, _ = self.case.trained(self.case.steps, {k: x + s * truth[k] / size for k, x in self.h.items()})
            with torch.no_grad():
                ends.append(float(self.case.outer(w, self.h)))
        return abs((ends[0] - ends[1]) / (2 * step) - size) / size

    def _metric_and_damping(self) -> tuple[Named, float]:
        group, steps = self.optimizer.param_groups[0], self.case.steps
        if "momentum" in group:
            return {n: torch.ones_like(x) for n, x in self.w.items()}, (1 - group["momentum"]) / (group["lr"] * steps)
        sizes = {}
        for name, x in self.live.items():
            state = self.optimizer.state[x]
            corrected = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
            sizes[name] = corrected.sqrt() + group["eps"]
        mean = float(torch.cat([x.flatten() for x in sizes.values()]).mean())
        return {n: x / mean for n, x in sizes.items()}, mean / (group["lr"] * steps)


def cg(damping: float) -> hg.solvers.CG:
    return hg.solvers.CG(max_steps=PRODUCTS, rtol=1e-4, damping=damping, on_failure="ignore")


def gauss_newton(point: Point, metric: bool) -> Named:
    case = point.case
    penalty, damping = (point.anchored, 0.0) if metric else (case.penalty, point.damping)
    inner = hg.operators.GaussNewton(lambda w, h: case.model(w, case.data["x"]), case.fit, penalty)
    return point.implicit(cg(damping), inner)


def f2sa(point: Point) -> Named:
    """F2SA's direction; NaN if its copies diverge."""
    options: Any = {"penalty": PENALTY, "optimizer": point.case.optimizer, "on_nonfinite": "ignore"}
    return point.along(lambda w: hg.bilevel.F2SA(list(w.values()), point.h, order=2, **options))


METHODS: dict[str, Callable[[Point], Named]] = {
    "default": lambda p: p.implicit(None),
    "CG, damping 1/ηT": lambda p: p.implicit(cg(p.damping)),
    "CG, damping −2 least": lambda p: p.implicit(cg(max(-2 * p.least, p.damping))),
    "CG, damping top/10": lambda p: p.implicit(cg(p.top / 10)),
    "MINRES, 20 steps": lambda p: p.implicit(hg.solvers.MINRES(max_steps=20, on_failure="ignore")),
    "Gauss–Newton, damping 1/ηT": partial(gauss_newton, metric=False),
    "Gauss–Newton, metric/ηT": partial(gauss_newton, metric=True),
    "Neumann, 20 terms": lambda p: p.implicit(
        hg.solvers.Neumann(step_size=1 / p.top, max_steps=20, on_failure="ignore")
    ),
    "SOBA, going along": lambda p: p.along(lambda w: hg.bilevel.SOBA(w, p.h, lr=1 / p.top)),
    "F2SA-2, going along": f2sa,
    "10 steps unrolled": lambda p: p.unrolled(p.optimizer, 10)[0],
    "one step unrolled": lambda p: p.unrolled(p.optimizer, 1)[0],
    "SAMA": lambda p: p.direction(hg.bilevel.SAMA(p.live, p.h, optimizer=p.optimizer), p.live),
    "T1–T2": lambda p: p.implicit(hg.solvers.FixedPoint(max_steps=1, on_failure="ignore")),
}


# Reverse passes, as functions of T, of the estimators that always take the same number.
PASSES: dict[str, Callable[[int], int]] = {
    "MINRES, 20 steps": lambda steps: 23,
    "Neumann, 20 terms": lambda steps: 23,
    "SOBA, going along": lambda steps: 3 * (steps + 1),
    "F2SA-2, going along": lambda steps: 5 * (steps + 1),
    "one step unrolled": lambda steps: 3,
    "SAMA": lambda steps: 5,
    "T1–T2": lambda steps: 3,
}
# Largest relative error of the estimators that are right if the inner problem is strongly convex and solved.
RIGHT = {"default": 1e-5, "MINRES, 20 steps": 1e-3, "SOBA, going along": 1e-5, "F2SA-2, going along": 1e-2}


@dataclass(frozen=True)
class Result:
    """One estimator for one part of λ (see `PARTS`) of one network. Lists have one entry per seed."""

    row: str
    part: str
    method: str
    errors: list[float]  # relative
    cosines: list[float]
    passes: list[int]  # reverse passes for both parts of λ; those of a tracker are the sum over all T steps


def norm(grads: Named) -> float:
    return math.hypot(*(float(g.norm()) for g in grads.values()))


def compared(found: Tensor, truth: Tensor) -> tuple[float, float]:
    """Relative error and cosine; (inf, 0) if `found` is not finite."""
    size, own = float(truth.norm()), float(found.norm())
    if not math.isfinite(own):
        return math.inf, 0.0
    return float((found - truth).norm()) / size, float((found * truth).sum()) / (size * own) if own else 0.0


def measure_row(
    name: str, make: Callable[[int], Case], methods: Sequence[str], seeds: int, progress: Callable[[], object] = int
) -> tuple[list[Result], dict]:
    """The results of all methods for all seeds on one network, and its settings, losses and eigenvalues."""
    found: dict[tuple[str, str], Result] = {
        (part, m): Result(name, part, m, [], [], []) for part in PARTS for m in methods
    }
    stood: dict[str, list[float]] = {}
    for seed in range(seeds):
        point = Point(make(seed))
        truth = point.truth()
        with torch.no_grad():
            values = {
                "inner loss at the start": point.case.inner(point.case.start, point.h),
                "inner loss": point.case.inner(point.w, point.h),
                "outer loss": point.case.outer(point.w, point.h),
            }
        values |= {"1/ηT": point.damping, "top eigenvalue": point.top, "least eigenvalue": point.least}
        values |= {f"norm, {part}": truth[part].norm() for part in PARTS}
        values |= {f"differences, {step:g}": point.differences(truth, step) for step in DIFFERENCES}
        for key, value in values.items():
            stood.setdefault(key, []).append(float(value))
        for m in methods:
            with counted(reads=False) as counts:
                grads = METHODS[m](point)
            for part in PARTS:
                error, cosine = compared(grads[part], truth[part])
                found[part, m].errors.append(error)
                found[part, m].cosines.append(cosine)
                found[part, m].passes.append(counts["passes"])
            progress()
    case = make(0)
    sizes = {"parameters": sum(x.numel() for x in case.start.values()), "steps": case.steps}
    optimizer: Any = case.make
    chosen = {"optimizer": optimizer.func.__name__, **optimizer.keywords, "dtype": str(F64), "seeds": seeds}
    return list(found.values()), {"row": name, **sizes, **chosen, **stood}


def measure(rows: Sequence[str], words: Sequence[str] | None, rounds: int | None) -> tuple[list[Result], list[dict]]:
    """rounds: the number of seeds."""
    methods = [m for m in METHODS if words is None or any(word in m for word in words)]
    results, settings, seeds = [], [], rounds or SEEDS
    with tqdm(total=len(rows) * len(methods) * seeds, desc="estimators", leave=False) as bar, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library warns that the inner problem is not solved: that is the subject
        for name in rows:
            found, setting = measure_row(name, networks.CASES[name], methods, seeds, bar.update)
            results += found
            settings.append(setting)
    return results, settings


def spread(values: Sequence[float], form: str) -> str:
    return f"{median(values):{form}} [{min(values):{form}}, {max(values):{form}}]"


def table(results: Sequence[Result]) -> str:
    lines = []
    for row in dict.fromkeys(r.row for r in results):
        titles = "".join(f"{f'{part}: error':>30}{'cosine':>24}" for part in PARTS)
        lines.append(f"{row:28}{titles}{'passes':>9}")
        pairs: dict[str, dict[str, Result]] = {}
        for r in results:
            if r.row == row:
                pairs.setdefault(r.method, {})[r.part] = r
        for m, parts in pairs.items():
            cells = [f"{spread(r.errors, '.2g'):>30}{spread(r.cosines, '.2f'):>24}" for r in map(parts.get, PARTS) if r]
            lines.append(f"  {m:26}{''.join(cells)}{median(parts['decay'].passes):9.0f}")
    return "\n".join(lines)


def draw(results: Sequence[Result], path: Path) -> None:
    """Median cosine of each estimator: a point per network (hollow: trained to the end), a line at their median."""
    rows = list(dict.fromkeys(r.row for r in results))
    methods = list(dict.fromkeys(r.method for r in results))
    places = {(r.part, r.row, r.method): r for r in results}
    ends, midway = ([row for row in rows if row.endswith("to the end") is over] for over in (True, False))
    title = "Cosine with the derivative of retraining: a point a network\n(hollow: trained to the end), a line: median"
    with column(path, title, [0.36 * len(methods) + 0.6] * len(PARTS)) as axes:
        for axis, part in zip(axes, PARTS, strict=True):
            for i, m in enumerate(methods):
                cosines = [median(places[part, row, m].cosines) for row in midway]
                solved = [median(places[part, row, m].cosines) for row in ends]
                axis.plot(cosines, [i] * len(cosines), "o", color=BLUE, alpha=0.6, markersize=5, markeredgewidth=0)
                axis.plot(solved, [i] * len(solved), "o", color=BLUE, markersize=7, fillstyle="none")
                if cosines:
                    axis.plot([median(cosines)] * 2, [i - 0.35, i + 0.35], color=RED, linewidth=2)
            axis.set_yticks(range(len(methods)), methods, fontsize=9)
            axis.set(xlim=(-1.05, 1.05), ylim=(len(methods) - 0.5, -0.5))
            axis.set_title(PARTS[part], fontsize=10, loc="left", fontweight="bold")
            axis.axvline(0, color="0.3", linewidth=0.8, zorder=0)
            axis.grid(axis="y", color="0.9")
            axis.tick_params(axis="x", labelsize=9)
            axis.spines[["top", "right"]].set_visible(False)


ABOUT = """Relative error and cosine of each estimator of a hypergradient, compared with the derivative of retraining,
where λ is a decay for each tensor or a weight for each training example: median, smallest and largest value over three
seeds. The derivative of retraining comes from `unroll.reverse` through all steps in float64. All batches are full.
[What this means](../estimators.md)."""
SECTION = Section("Estimators on networks in mid-training", networks.available, measure, table, draw, ABOUT)
