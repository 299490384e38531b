"""The outer search: L-BFGS for many independent problems in parallel, with a separate line search for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ._folds import Folds, Labels

HISTORY, ARMIJO, HALVINGS = 10, 1e-4, 12  # pairs of L-BFGS; sufficient decrease, and halvings, of the line search
LONGEST, RANGE = 2.0, 16.0  # the longest step of an entry of θ, and its largest distance from the start
GAIN, PATIENCE = 0.01, 10  # negligible change of the sample's log-likelihood, in nats; steps before early stopping


class Problem(Protocol):
    """The folds of a problem with strengths."""

    def evaluate(
        self, strengths: Tensor, targets: Tensor, gradient: bool = True, tighter: bool | str = False
    ) -> tuple[Tensor, Tensor]:
        """The losses of the folds [F, T], and ∂(Σ_f share_f loss_f)/∂ log strength in the shape of strengths.

        tighter: True solves systems more accurately, "all" solves them to rounding.
        """
        ...

    def residual(self, strengths: Tensor, targets: Tensor) -> Tensor:
        """The norms of the inner gradients at the solutions, relative to those at w = 0."""
        ...


@dataclass
class Objective:
    """J(θ) = h(L(θ)) + ρ/2n Σ_g (θ_g − c)² for each problem, per row of the data.

    L is the CV loss, n its sample size, c the logarithm of the best single strength. h(L) is L for the log-loss and
    ½ log L for any other loss, so n h(L) is a negative log-likelihood (in the second case, of Gaussian errors with
    unknown variance), and the last term is that of the prior θ_g ~ N(c, 1/ρ).
    """

    problem: Problem
    labels: Labels
    folds: Folds
    shrinkage: float
    likelihood: bool
    center: Tensor = field(default_factory=lambda: torch.zeros(1))

    def __call__(self, theta: Tensor, which: Tensor, tighter: bool = False) -> Point:
        losses, slope = self.problem.evaluate(self.labels.strengths(theta), which, tighter=tighter)
        loss = self.folds.share @ losses
        tiny = torch.finfo(loss.dtype).tiny
        factor = torch.ones_like(loss) if self.likelihood else 0.5 / loss.clamp(min=tiny)
        value = loss if self.likelihood else 0.5 * loss.clamp(min=tiny).log()
        center = self.center if self.labels.coupled or len(self.center) == 1 else self.center[which]
        spread = theta - center[:, None]
        strength = self.shrinkage / self.folds.count
        value = value.sum(0, keepdim=True) if self.labels.coupled else value
        value = value + strength / 2 * spread.square().sum(1)
        gradient = self.labels.collect(factor[:, None] * slope) + strength * spread
        watched = losses[self.folds.watched] if self.folds.watched is not None else loss
        if self.labels.coupled:
            watched = watched.sum(0, keepdim=True)
        return Point(theta, value, gradient, loss, watched, self.labels.collect(slope))


@dataclass
class Point:
    """θ [P, p], J [P], ∇J [P, p], the CV loss [T], the watched loss [P], the hypergradient of the CV loss [P, p]."""

    theta: Tensor
    value: Tensor
    gradient: Tensor
    loss: Tensor
    watched: Tensor
    slope: Tensor

    def put(self, which: Tensor, other: Point, taken: Tensor) -> None:
        """Copy the problems marked in `taken` from another point, which holds only the problems `which`."""
        for name, mine in vars(self).items():
            if len(mine) == len(self.theta):
                mine[which[taken]] = getattr(other, name)[taken]
            elif bool(taken.any()):  # the targets of one coupled problem
                setattr(self, name, getattr(other, name))

    def copy(self) -> Point:
        return Point(**{name: each.clone() for name, each in vars(self).items()})


@dataclass
class Found:
    """The best point of each problem, the CV losses along the way, and why each problem's search ended."""

    best: Point
    path: list[Tensor]
    reasons: list[str]
    steps: int


@dataclass
class Memory:
    """The pairs of L-BFGS for all problems; a pair without positive curvature is ignored."""

    pairs: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def add(self, s: Tensor, y: Tensor) -> None:
        product = (s * y).sum(1)
        good = product > 1e-10 * s.norm(dim=1) * y.norm(dim=1)
        self.pairs = [*self.pairs, (s, y, torch.where(good, 1 / product.where(good, 1.0), 0.0))][-HISTORY:]

    def direction(self, gradient: Tensor) -> Tensor:
        """−H∇J (Nocedal and Wright 2006, algorithm 7.4); without pairs, −∇J scaled to a largest entry of 1."""
        q, kept = gradient.clone(), []
        largest = gradient.abs().amax(1, keepdim=True).clamp(min=1e-300)
        scale = 1 / largest
        for s, y, rho in reversed(self.pairs):
            alpha = rho * (s * q).sum(1)
            q -= alpha[:, None] * y
            kept.append(alpha)
        for _, y, rho in self.pairs:
            curved = rho[:, None] > 0
            scale = torch.where(curved, 1 / (rho * y.square().sum(1)).clamp(min=1e-300)[:, None], scale)
        q *= scale
        for (s, y, rho), alpha in zip(self.pairs, reversed(kept), strict=True):
            q += (alpha - rho * (y * q).sum(1))[:, None] * s
        q = torch.where((q * gradient).sum(1, keepdim=True) > 0, q, gradient / largest)
        return -q * (LONGEST / q.abs().amax(1, keepdim=True).clamp(min=1e-300)).clamp(max=1.0)


def search(
    objective: Objective, here: Point, max_iter: int, progress: Callable[[Any], Any], done: dict[int, str]
) -> Found:
    """Minimise J from `here`, independently for each problem. Changes `here`.

    Args:
        progress: function that wraps the range of steps in a progress bar.
        done: the problems that are not searched, with the reason.
    """
    theta, problems = here.theta.clone(), len(here.theta)
    every = torch.arange(problems)
    memory, path, best = Memory(), [here.loss.clone()], here.copy()
    reasons = [done.get(each, "") for each in range(problems)]
    low, high = theta - RANGE, theta + RANGE
    idle, unchanged, steps = torch.zeros(problems), torch.zeros(problems), 0
    for _ in progress(range(max_iter)):
        active = torch.tensor([not reason for reason in reasons])
        if not active.any():
            break
        before, direction = here.copy(), memory.direction(here.gradient)
        out = ((here.theta <= low) & (direction < 0)) | ((here.theta >= high) & (direction > 0))
        direction[out] = 0.0
        if memory.pairs:  # stop if the gain that the quadratic model predicts, −∇Jᵀd/2, is negligible
            promised = -(here.gradient * direction).sum(1) * objective.folds.count / 2
            for each in (active & (promised < GAIN)).nonzero()[:, 0].tolist():
                reasons[each], active[each] = f"converged: the next step would gain less than {GAIN} nats", False
            if not active.any():
                break
        steps += 1
        failed = _line_search(objective, here, direction, active.nonzero()[:, 0], low, high)
        memory.add(here.theta - before.theta, here.gradient - before.gradient)
        path.append(here.loss.clone())
        gain = (before.value - here.value) * objective.folds.count
        idle = torch.where(gain < GAIN, idle + 1, 0.0)
        better = here.watched < best.watched if objective.folds.watched is not None else here.value < best.value
        unchanged = torch.where(better, 0.0, unchanged + 1)
        best.put(every, here, better)
        for each in active.nonzero()[:, 0].tolist():
            if each in failed:
                reasons[each] = "no step along the search direction lowers the objective: it is minimal up to rounding"
            elif objective.folds.watched is not None and unchanged[each] >= PATIENCE:
                reasons[each] = f"early stopping: the watched fold's loss has not fallen for {PATIENCE} steps"
            elif idle[each] >= 2:
                reasons[each] = f"converged: each of the last two steps gained less than {GAIN} nats"
    reasons = [reason or f"max_iter={max_iter} steps were made without convergence" for reason in reasons]
    return Found(best, path, reasons, steps)


def _targets(objective: Objective, which: Tensor) -> Tensor:
    """The targets of these problems; a coupled problem has all targets."""
    return torch.arange(len(objective.labels.index)) if objective.labels.coupled else which


def _line_search(
    objective: Objective, here: Point, direction: Tensor, pending: Tensor, low: Tensor, high: Tensor
) -> set[int]:
    """Move `here` by the first step size of 1, ½, ¼, … that lowers J enough; returns the problems without one."""
    size, start = torch.ones(len(direction), 1, dtype=direction.dtype), here.copy()
    for _ in range(HALVINGS):
        trial = torch.minimum(torch.maximum(start.theta + size * direction, low), high)[pending]
        point = objective(trial, _targets(objective, pending))
        promised = ((trial - start.theta[pending]) * start.gradient[pending]).sum(1).clamp(max=0.0)
        taken = (point.value <= start.value[pending] + ARMIJO * promised) & torch.isfinite(point.gradient).all(1)
        here.put(pending, point, taken)
        pending = pending[~taken]
        if not len(pending):
            break
        size[pending] /= 2
    return set(pending.tolist())
