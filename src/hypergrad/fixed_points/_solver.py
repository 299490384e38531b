"""What all forward solvers share: their configuration, the tolerance, and the loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias, final

import torch
from torch import Tensor

from .._solution import OnFailure, Solution, Status
from .._tree import PyTree
from .._vector import Vector
from ..solvers import check_options
from ._transforms import solved


class Iterate:
    """w with Φ(w), and what is taken of them when it is first asked for; norms are NaN until they are measured."""

    def __init__(self, w: Vector, image: Vector):
        self.w, self.image = w, image
        self.norm = self.size = self.merit = w.space.scalar(torch.nan)  # ‖Φ(w) − w‖, ‖Φ(w)‖, what is compared

    @cached_property
    def residual(self) -> Vector:
        """r = Φ(w) − w."""
        return self.image - self.w

    def measure(self) -> Iterate:
        self.norm, self.size = _norm(self.residual), _norm(self.image)
        self.merit = self.norm
        return self

    def where(self, mask: Tensor, other: Iterate) -> Iterate:
        """This one for the samples where the mask holds, the other elsewhere."""
        if not mask.ndim and mask.device.type == "cpu":
            return self if bool(mask) else other
        new = Iterate(self.w.where(mask, other.w), self.image.where(mask, other.image))
        for name in ("norm", "size", "merit"):
            setattr(new, name, torch.where(mask, getattr(self, name), getattr(other, name)))
        return new


def _norm(v: Vector) -> Tensor:
    """‖v‖ of each system, also where squares leave the range of the dtype."""
    space, squared = v.space, v.dot(v)
    exact = (squared > space.tiny**0.5) & (squared < space.tiny**-0.5)
    if space.uniform and space.device.type == "cpu" and bool(exact.all()):  # where reading is free
        return squared.sqrt()
    scale = v.scale()
    return (v / scale).norm() * scale


Propose: TypeAlias = Callable[[Iterate], Vector]  # what a method makes the next w of
Evaluate: TypeAlias = Callable[[Sequence[Tensor]], Sequence[Tensor]]  # Φ on the leaves of w


class Goal:
    """The tolerance: ‖Φ(w) − w‖ ≤ max(atol, rtol · ‖Φ(w)‖), where growth of ‖Φ(w)‖ alone is no convergence.

    ‖Φ(w)‖ counts at most as `limit`, a multiple of what the start had. An extrapolation may throw w far beyond it, to
    1e16 say, where the residual rounds to 0: there the residual counts as no smaller than its rounding, and as larger
    in proportion to ‖Φ(w)‖.
    """

    def __init__(self, rtol: float, atol: float, eps: float, start: Iterate):
        self.rtol, self.atol, self.eps = rtol, atol, eps
        factor = min(max(10.0, 1e-3 / rtol), 1e6) if rtol else 1e6
        self.limit = factor * torch.maximum(start.norm, start.size)

    def measure(self, at: Iterate) -> None:
        at.measure()
        counted = torch.maximum(at.norm, self.eps * at.size) * (at.size / self.limit)
        at.merit = torch.where(at.size > self.limit, counted, at.norm)

    def unsolved(self, at: Iterate) -> Tensor:
        return ~(at.merit <= torch.clamp_min(self.rtol * torch.minimum(at.size, self.limit), self.atol))


class Guard:
    """Back to Φ(best) where the residual has not fallen for `patience` steps, and on from there by plain steps.

    An accelerated method may wander off for good where Φ is no contraction (around the kinks of a proximal step); the
    plain iteration does not. The plain steps are as many as the method remembers iterates, twice as many the next time.
    """

    def __init__(self, patience: int, memory: int, start: Iterate):
        self.patience = patience
        self.waited = torch.zeros_like(start.norm, dtype=torch.long)
        self.plain = torch.zeros_like(self.waited)  # plain steps left
        self.length = torch.full_like(self.waited, memory)
        self.active = False

    def next(self, propose: Propose, at: Iterate, best: Iterate, looks: bool) -> Vector:
        """The next w; read from the device where it looks."""
        self.waited = torch.where(at.merit <= best.merit, 0, self.waited + 1)
        self.plain = torch.clamp_min(self.plain - 1, 0)
        if looks:
            stalled = (self.waited > self.patience) & (self.plain == 0)
            self.active = bool((stalled | (self.plain > 0)).any())
            self.plain = torch.where(stalled, self.length, self.plain)
            self.length = torch.where(stalled, 2 * self.length, self.length)
            self.waited = torch.where(stalled, 0, self.waited)
            if self.active:
                at = best.where(stalled, at)
        new = propose(at)
        return at.image.where(self.plain > 0, new) if self.active else new


@dataclass(frozen=True, kw_only=True)
class FixedPointSolver(ABC):
    """What all forward solvers share. A step evaluates Φ once, at w, and is done when ‖Φ(w) − w‖ is small.

    Args:
        max_steps: steps at most; exactly that many where neither rtol nor atol is given. The residual of the last w
            takes one evaluation more.
        rtol, atol: solved when ‖Φ(w) − w‖ ≤ max(atol, rtol · ‖Φ(w)‖), where ‖Φ(w)‖ counts at most as 1e-3 / rtol times
            (10 to 1e6 times) that of the start. With max_steps, rtol and atol all left out, rtol is 1e-6 in float64 and
            1e-4 in float32 (4 eps in half precision), and max_steps 200.
        batch_dims: 1 where the first axis of each leaf counts independent samples.
        on_failure: "warn" (HypergradientWarning), "raise" (SolverError) or "ignore".
        check_every: steps between two looks at the residual (default: 1 on the CPU, 5 elsewhere).
        trace: keep the residual norm of each sample at each step, [steps + 1, B]; else that of the worst, [steps + 1],
            and without a tolerance only at steps 1, 2, 4, … and the last (NaN in between).
    """

    max_steps: int | None = None
    rtol: float | None = None
    atol: float | None = None
    batch_dims: int = 0
    on_failure: OnFailure = "warn"
    check_every: int | None = None
    trace: bool = False

    def __post_init__(self) -> None:
        check_options(self, numbers=("rtol", "atol"), integers={"max_steps": 0, "check_every": 1})

    @property
    def _patience(self) -> tuple[int, int] | None:
        """Steps without a fall of the residual that the method may take, and plain steps that make it forget."""
        return 10, 5

    @property
    def _is_plain(self) -> bool:
        """Whether the next w is Φ(w), which is then the value of a solve to a tolerance."""
        return False

    @abstractmethod
    def _method(self, start: Vector, evaluate: Evaluate) -> Propose:
        """The method's step, with what it remembers between steps."""

    @final
    def __call__(self, fp_map: Callable[..., PyTree], start: PyTree, hparams: PyTree = None) -> Solution:
        """Solve w = Φ(w, λ).

        Args:
            fp_map: Φ(params, hparams), or Φ(params) where hparams is None; of params' structure and shapes. It may call
                torch.autograd.grad itself (the step of an energy model).
            start: the first w, any pytree of floating point tensors.
            hparams: λ. Under torch.func.vmap all that is mapped must be in start or hparams; all entries are one solve.

        Returns: Solution whose value is w in start's structure, with residual_norm ‖Φ(w) − w‖ and rhs_norm ‖Φ(w)‖. With
            a tolerance it is the best w met; without one the last. Picard() returns Φ(w) for a w within the tolerance.
        Raises: ValueError where Φ changes structure, shape, dtype or device, and for a mapped tensor that was not
            passed; SolverError under on_failure="raise".
        """
        return solved(self, fp_map, start, hparams)[0]

    def _run(self, phi: Callable[[Vector], Vector], w: Vector, propose: Propose) -> Solution:
        space = w.space
        default = self.rtol is None and self.atol is None and self.max_steps is None
        fixed = self.rtol is None and self.atol is None and not default
        most = 200 if self.max_steps is None else self.max_steps
        every = self.check_every or (1 if space.device.type == "cpu" else 5)
        at = Iterate(w, phi(w)).measure()
        goal = Goal(space.rtol if default else self.rtol or 0.0, self.atol or 0.0, space.eps, at)
        best, going, guard = at, goal.unsolved(at), Guard(*self._patience, at) if self._patience else None
        first = before = at.merit  # before: at the last power of two, to see growth by
        trace, steps = [self._traced(at.norm)], 0
        while steps < most and (fixed or steps % every or bool(going.any())):
            before = before if steps & (steps - 1) else at.merit
            new = propose(at) if fixed or guard is None else guard.next(propose, at, best, steps % every == 0)
            new = new if fixed or not self.batch_dims else new.where(going, at.w)
            steps += 1
            at = Iterate(new, phi(new))
            if not fixed or self.trace or not steps & (steps - 1) or steps == most:
                goal.measure(at)
            trace.append(self._traced(at.norm))
            best = at if fixed else at.where(at.merit < best.merit, best)  # what is not finite never wins
            going = going & goal.unsolved(at)
        failed = torch.zeros_like(best.norm, dtype=torch.bool) if fixed else goal.unsolved(best)
        code = torch.where(failed, Status.MAX_STEPS.value, (Status.COMPLETED if fixed else Status.CONVERGED).value)
        grown = (at.merit > first) & ((at.merit > before) | (at.size > goal.limit)) & (steps > 1)
        grown = grown & ~(at.merit <= 100 * space.eps * best.size)  # at rounding level nothing is growth
        code = torch.where(grown & (failed | fixed), Status.DIVERGED.value, code)
        finite = torch.isfinite(best.norm) & (torch.isfinite(at.norm) | ~failed)
        code = torch.where(finite, code, Status.NON_FINITE.value)
        value = best.image.where(~failed, best.w) if self._is_plain and not fixed else best.w
        return Solution(value.tree, code, steps, best.norm, best.size, torch.stack(trace), type(self).__name__)

    def _traced(self, norm: Tensor) -> Tensor:
        return norm.amax() if norm.ndim and norm.numel() and not self.trace else norm


# --- one solve, on tensors alone ---
