"""The choice of a solver from what is known of the system."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .._solution import Status
from ._direct import Dense
from ._krylov import CG, GMRES, LSQR, MINRES
from ._solver import IterativeSolver, LinearSolver, Outcome, System, continued, where


@dataclass(frozen=True, kw_only=True)
class Auto(IterativeSolver):
    """Takes the method that fits the system, and another one where that fails; `Solution.method` says which and why.

    | system | first | then |
    |---|---|---|
    | n ≤ `dense` | Dense | – |
    | symmetric | CG | MINRES, where xᵀAx ≤ 0 is met; GMRES, where A is not symmetric after all |
    | any | GMRES | LSQR, where GMRES stagnates and Aᵀ is known |

    The next method goes on from where the one before stopped, with max_steps of its own. Without a tolerance the first
    does exactly max_steps, and Dense is not considered. At a minimum of an inner loss xᵀAx ≤ 0 does not happen: take CG
    there, whose failure is news.

    Args:
        dense: number of unknowns (of one system) up to which A is materialised.
        restart: of GMRES.

    Cost: that of the methods; a read from the device after each.
    """

    dense: int = 100
    restart: int = 30

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("dense", 0), ("restart", 1)):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise ValueError(f"Auto: {name} must be an integer ≥ {least}, got {getattr(self, name)!r}")

    def _iterate(self, system: System) -> Outcome:
        method, why = self._first(system)
        outcome = method._iterate(system)
        while system.goal is not None and outcome.code is not None:
            code = torch.as_tensor(outcome.code)
            again = (code > 0) & ~torch.as_tensor(outcome.trace[-1] <= system.stop)  # NaN too: of an iteration, perhaps
            worst = Status(int(torch.where(again, code, 0).max()))
            following = self._after(method, worst, system)
            if following is None:
                break
            # Iterates of CG on an A that is not symmetric are no start for anything.
            start = system.b.zeros() if system.x0 is None else system.x0
            start = start.where(again & (code == Status.NOT_SYMMETRIC.value), outcome.x)
            again = system.look(again)
            rest = replace(system, x0=start, residual=None, stop=where(again, system.stop, torch.inf))
            why, method = f"{type(method).__name__} ended with {worst.name}", following
            outcome = continued(outcome, method._iterate(rest), again)
        outcome.method = f"{type(method).__name__}: {why}"
        return outcome

    def _first(self, system: System) -> tuple[LinearSolver, str]:
        n = system.b.space.length
        if system.goal is not None and n <= self.dense and all(system.b.space.plain):
            return Dense(), f"{n} unknowns, at most {self.dense}"
        if system.op.symmetric:
            return CG(), "declared symmetric"
        return GMRES(restart=self.restart), "not declared symmetric"

    def _after(self, method: LinearSolver, worst: Status, system: System) -> LinearSolver | None:
        if worst is Status.NOT_SYMMETRIC and not isinstance(method, Dense):
            return GMRES(restart=self.restart)
        if isinstance(method, CG) and worst is Status.NOT_POSITIVE_DEFINITE:
            return MINRES()
        transposable = system.op.has_transpose and not system.op.symmetric
        if isinstance(method, GMRES) and worst is Status.STAGNATED and transposable:
            return LSQR()
        return None
