"""Stationary iterations, side by side: x ← x + η (b − A x). With A = I − Jᵀ and η = 1 that is v ← Jᵀv + b."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from .._solution import Status
from .._vector import Vector
from ._krylov import event
from ._solver import IterativeSolver, LinearSolver, Outcome, System

HOPELESS = 1e8  # growth of the residual at which the iteration is given up


def richardson(system: System, x: Vector, r: Vector, step_size: float) -> Outcome:
    """max_steps of x ← x + η r from x with residual r. DIVERGED where the residual ends above its start and growing."""
    norm = r.norm()
    start = norm
    going, trace = norm > system.stop, [norm]
    for k in range(system.max_steps):
        if system.finished(k, going):
            break
        x.add_(r, going.to(norm.dtype) * step_size)
        if k + 1 < system.max_steps or system.goal is not None:
            r = system.b - system.op(x)
            norm = r.norm()
            trace.append(norm)
            going = going & (norm > system.stop) & (norm <= HOPELESS * start)
    steps, norms = max(len(trace) - (system.goal is not None), 0), torch.stack(trace)
    steps = steps if system.max_steps else 0
    growing = (norms[-1] > norms[len(norms) // 2]) | (norms[-1] > HOPELESS * norms[0])
    grown = (norms[-1] > norms[0]) & growing & (len(norms) > 2)
    return Outcome(x, norms, steps, event(None, grown, Status.DIVERGED))


@dataclass(frozen=True, kw_only=True)
class FixedPoint(IterativeSolver):
    """v ← Jᵀv + b, the iteration that the inner problem's own map gives: x ← x + (b − Ax) for any A = I − Jᵀ.

    K steps from zero give Σ_{k<K} (Jᵀ)ᵏ b: what reverse mode through the last K steps of the map gives at a solution.
    The error falls by the contraction factor q = ‖J‖ a step; for q ≥ 1 it ends as DIVERGED with the growth rate.

    Cost: one product a step, none in the first from zero; two vectors beside b.
    Source: Grazzi et al. 2020, section 3.2.
    """

    def _iterate(self, system: System) -> Outcome:
        return richardson(system, *system.start(), 1.0)


@dataclass(frozen=True, kw_only=True)
class Neumann(IterativeSolver):
    """Neumann series x = η Σ_{k≤K} (I − ηA)ᵏ b, with K = max_steps: one term more than FixedPoint has.

    Args:
        step_size: η > 0; for a symmetric A it must be below 2 / λ_max(A).

    Cost: one product a step; two vectors beside b.
    Source: Lorraine, Vicol and Duvenaud 2020, Algorithm 3; the start x0 is continued likewise.
    """

    step_size: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.step_size > 0 and math.isfinite(self.step_size)):
            raise ValueError(f"Neumann: step_size must be a finite number > 0, got {self.step_size!r}")

    def _iterate(self, system: System) -> Outcome:
        x, r = system.start()
        if not system.max_steps:
            return Outcome(x.add_(r, self.step_size), r.norm().unsqueeze(0)[:0], 0)
        x.add_(r, self.step_size)
        return richardson(system, x, system.b - system.op(x), self.step_size)


@dataclass(frozen=True, kw_only=True)
class OneStep(LinearSolver):
    """x = b: A is taken for the identity ("Jacobian-free", "T1–T2"). An approximation; its residual tells how good.

    From a start x0 it is one step of FixedPoint, x0 + (b − A x0).

    Cost: no product (one with x0).
    Source: Luketina et al. 2016 (T1–T2); Fung et al. 2022 (Jacobian-free backpropagation).
    """

    _runs_to_tolerance: ClassVar[bool] = False

    def _iterate(self, system: System) -> Outcome:
        return richardson(replace(system, max_steps=1, goal=None), *system.start(), 1.0)
