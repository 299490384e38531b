"""Iterative refinement: products in low precision, the answer in full."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .._solution import Status
from ._krylov import CG, event
from ._solver import IterativeSolver, LinearSolver, Outcome, System, require_symmetric, solve

LOW = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, kw_only=True)
class Refined(IterativeSolver):
    """Iterative refinement: corrections from products in low precision, residuals from products in full precision.

        r = b − A x,      x ← x + Ã⁻¹ r,      Ã = A in `dtype`

    The error falls by about ‖Ã − A‖ ‖A⁻¹‖ (or by the rtol of `solver`, if that is larger) a correction, down to the
    full precision. Where that is above 1 it ends as STAGNATED or DIVERGED, at the best iterate. (Without a tolerance a
    correction that gains nothing is a failure only above half the digits: further down it is rounding.) It pays where
    products in the low precision are much faster, as bfloat16 matrix products (not matrix-vector ones) are on recent
    hardware.

    Args:
        dtype: of the products. torch.bfloat16 or torch.float16: the inner problem is evaluated under torch.autocast,
            which leaves float64 as it is. torch.float32 where params are float64: it is evaluated at params and hparams
            in float32, so the losses must take their data in the dtype of params.
        solver: a LinearSolver for the corrections. Its failures are not reported (its on_failure does not matter): the
            residual in full precision tells.
        max_steps, check_every: in corrections (check_every 1 by default: a look costs little beside a correction).

    Raises: TypeError for a dtype or a solver that is none of these, and for an operator that has no form in low
        precision (that of losses evaluated beforehand, or of a stochastic inner problem).
    Cost: a correction takes one product, and those of `solver` in the low precision. One more graph, in that precision.
    Source: Wilkinson 1963; Carson and Higham 2018.

    Example:
        >>> a, b = torch.tensor([[4.0, 1.0], [1.0, 3.0]]), torch.tensor([1.0, 2.0])
        >>> solution = Refined(rtol=1e-6)(hg.operators.matrix(a, symmetric=True), b)
        >>> solution.value, int(solution.steps) < 6
        (tensor([0.0909, 0.6364]), True)
    """

    dtype: torch.dtype = torch.bfloat16
    solver: LinearSolver = field(default_factory=lambda: CG(rtol=1e-2, max_steps=200))
    check_every: int | None = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype not in LOW:
            raise TypeError(f"Refined: dtype must be one of {', '.join(map(str, LOW))}, got {self.dtype!r}")
        if not isinstance(self.solver, LinearSolver):
            raise TypeError(f"Refined: solver must be a linear solver from hg.solvers, got {self.solver!r}")

    def _iterate(self, system: System) -> Outcome:
        if self.solver._needs_symmetric:
            require_symmetric(system.op, type(self.solver).__name__)
        low = system.op.low(self.dtype)
        x, r = system.start()
        norm = r.norm()
        best, least = x, norm
        half = system.b.space.rtol * system.rhs_norm
        going, code, trace = norm > system.stop, None, [norm]
        for k in range(system.max_steps):
            if system.finished(k, going):
                break
            correction = solve(self.solver, low, r, None).value
            x = (x + correction).where(going, x)
            r = system.b - system.op(x)
            old, norm = norm, r.norm()
            trace.append(norm)
            better = norm < least
            best, least = x.where(better, best), torch.where(better, norm, least)
            gains, coarse = norm <= 0.9 * old, ~(norm <= half)
            code = event(code, going & coarse & ~(norm <= 2 * old), Status.DIVERGED)
            code = event(code, going & ~gains if system.goal is not None else going & ~gains & coarse, Status.STAGNATED)
            going = going & (norm > system.stop) & gains
        return Outcome(best, torch.stack(trace), len(trace) - 1, code)
