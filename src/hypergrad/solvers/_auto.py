"""Auto, the solver that chooses a method for the system."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .._solution import Status
from .._vector import anywhere, where
from ._direct import AT_ONCE, materialise, regular_solve
from ._krylov import GMRES, arnoldi
from ._normal import LSQR
from ._solver import IterativeSolver, LinearSolver, Outcome, System, continued, event
from ._symmetric import CG, MINRES
from ._theory import Structure

SMALL = 32  # unknowns up to which many systems are solved densely
LANCZOS_STEPS = 40  # products that estimate the least eigenvalue of an indefinite system


@dataclass(frozen=True, kw_only=True)
class Auto(IterativeSolver):
    """The default solver: runs the method that fits the system, and another one if that fails.

    | system | first | then |
    |---|---|---|
    | symmetric | CG | MINRES, if A is singular or indefinite; GMRES, if A turns out not to be symmetric |
    | any | GMRES | LSQR, if GMRES stagnates or diverges and Aᵀ is known |
    | several of up to 32 unknowns each | a factorisation of each | the above, if one is singular |

    The A of an inner loss is declared positive definite, as it is at a minimum. Negative curvature shows that the point
    is not a minimum: Auto then ends as NOT_POSITIVE_DEFINITE, and `Solution.curvature` is an estimate of the least
    eigenvalue. Each method may take max_steps; without a tolerance there is no second method. `Solution.method` says
    which method computed the value, and why.

    Cost: that of the methods, a read from the device after each, and 40 more products at negative curvature.

    Example:
        >>> import torch, hypergrad as hg
        >>> op = hg.operators.matrix(torch.tensor([[4.0, 1.0], [1.0, 3.0]]), positive_definite=True)
        >>> solution = hg.solvers.Auto(rtol=1e-6)(op, torch.tensor([1.0, 2.0]))
        >>> solution.value.round(decimals=3), solution.status.name
        (tensor([0.0910, 0.6360]), 'CONVERGED')
    """

    def _iterate(self, system: System) -> Outcome:
        return self._dense(system) or self._iterative(system)

    def _dense(self, system: System) -> Outcome | None:
        """Factorise each of several small systems; None if they are not small, or not all regular."""
        op, space = system.op, system.b.space
        n, count = space.length, space.batch_shape.numel()
        few = 0 < n <= min(SMALL, system.max_steps) and count * n**2 <= AT_ONCE
        if not (space.batch_dims and op.each is None and few and all(space.plain)) or system.goal is None:
            return None
        x, r = system.start()
        rows, rhs, stop = materialise(op, r).mT, r.flat().unsqueeze(-2), system.stop.unsqueeze(-1)
        found = regular_solve(rows, rhs, stop, space.eps, op.symmetric, op.positive_definite)
        if found is None:
            return None
        trace, y = [r.norm(), found[1].squeeze(-1)], space.from_flat(found[0].squeeze(-2))
        return Outcome(y if system.x0 is None else x + y, trace, 1, None, f"Dense: {count} small systems")

    def _iterative(self, system: System) -> Outcome:
        symmetric = system.op.symmetric
        method: LinearSolver = CG() if symmetric else GMRES()
        why = "declared symmetric" if symmetric else "not declared symmetric"
        outcome = method._iterate(system)
        while system.goal is not None:
            last = system.b.space.tensor(outcome.trace[-1])
            code = torch.as_tensor(0 if outcome.code is None else outcome.code, device=last.device)
            code = event(code, last >= system.rhs_norm, Status.DIVERGED)
            again = (code > 0) & ~(last <= system.stop)  # true for NaN
            worst = Status(int((code * again).max()))
            following = self._after(method, worst, outcome, system)
            if following is None:
                break
            start = (system.b.zeros() if system.x0 is None else system.x0).where(again, outcome.x)
            again = system.number(again)
            rest = replace(system, x0=start, residual=None, stop=where(again, system.stop, torch.inf))
            why, method = f"{type(method).__name__} ended with {worst.name}", following
            outcome = continued(outcome, method._iterate(rest), again)
        outcome.method = f"{type(method).__name__}: {why}"
        return outcome

    def _after(self, method: LinearSolver, worst: Status, outcome: Outcome, system: System) -> LinearSolver | None:
        if worst is Status.NOT_SYMMETRIC:
            return GMRES()
        if isinstance(method, CG) and worst in (Status.NOT_POSITIVE_DEFINITE, Status.DIVERGED):
            if not (system.op.positive_definite and _is_negative(outcome)):
                return MINRES()
            if all(system.b.space.plain):
                outcome.curvature = least_eigenvalue(system)
        transposable = system.op.has_transpose and not system.op.symmetric
        if isinstance(method, GMRES) and worst in (Status.STAGNATED, Status.DIVERGED) and transposable:
            return LSQR()
        return None

    def products_needed(self, structure: Structure, rtol: float = 1e-6) -> float | None:
        """The number for the method that would give the answer."""
        if not structure.symmetric:
            return GMRES().products_needed(structure, rtol)
        definite = structure.definiteness == "positive definite"
        return (CG() if definite else MINRES()).products_needed(structure, rtol)


def _is_negative(outcome: Outcome) -> bool:
    """Whether CG met a curvature that is negative beyond rounding in any system."""
    if outcome.curvature is None or outcome.steepest is None:
        return False
    rounding = outcome.x.space.eps**0.75 * abs(outcome.steepest)
    return anywhere(outcome.curvature < -rounding)


def least_eigenvalue(system: System) -> torch.Tensor:
    """The least Ritz value of a symmetric A minus its error bound: an estimate of the least eigenvalue from below."""
    steps, zero = min(LANCZOS_STEPS, system.b.space.length), system.b.space.scalar(0.0)
    start = system.b.random(torch.Generator(device="cpu").manual_seed(0))
    h = arnoldi(replace(system, goal=None), start, True, steps, 0, zero)[1]
    values, vectors = torch.linalg.eigh((h[..., :-1, :] + h[..., :-1, :].mT) / 2)
    return values[..., 0] - h[..., -1, -1] * vectors[..., -1, 0].abs()
