"""Stationary iterations x ← x + η (b − A x). With A = I − Jᵀ and η = 1 this is v ← Jᵀv + b."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .._solution import Status
from .._vector import Scalar, Vector, norm
from ._solver import IterativeSolver, Outcome, System, event
from ._theory import Structure, steps_needed

HOPELESS = 1e8  # growth of the residual at which the iteration stops


def richardson(system: System, x: Vector | None, step_size: float) -> Outcome:
    """max_steps of x ← x + η (b − A x), for η = 1 as x ← (I − A) x + b. x is overwritten; None starts from zero.

    The status is DIVERGED if the residual ends above its first value and growing. Without a tolerance, the residual is
    measured only three times (the trace is NaN elsewhere): next to a cheap product it costs as much as the update.
    """
    b, most, number, tolerant = system.b, system.max_steps, system.number, system.goal is not None
    measured = range(0, most, system.check_every) if tolerant else {0, (most + 1) // 2, most - 1}
    masks, unknown = tolerant and bool(b.space.batch_dims), system.stop * torch.nan
    hopeless: Any = torch.inf
    going: Any = True
    norms, trace, steps = [], [], 0
    for k in range(most):
        if x is None:
            new = b.copy()
        elif step_size == 1:
            new = system.op.contract(x) + b
        else:
            new = b - system.op(x)
        trace.append(unknown)
        if k in measured:
            size = trace[-1] = norm(new - x if x is not None and step_size == 1 else new, number)
            norms.append(size)
            if tolerant:
                going = going & (size > system.stop) & (size <= hopeless)
                hopeless = HOPELESS * size if k == 0 else hopeless
        if system.finished(k, going):
            break
        if masks and not (system.check_every == 1 and bool(going.all())):
            new = new.where(going, x if x is not None and step_size == 1 else new.zeros())
        x = new if x is None or step_size == 1 else x.add_(new, step_size)
        steps += 1
    code = event(None, _diverged(norms), Status.DIVERGED) if norms else None
    return Outcome(b.zeros() if x is None else x, trace, steps, code)


def _diverged(norms: list[Scalar]) -> Scalar:
    first, half, last = norms[0], norms[len(norms) // 2], norms[-1]
    return (last > first) & ((last > half) | (last > HOPELESS * first) | (len(norms) < 3))


@dataclass(frozen=True, kw_only=True)
class FixedPoint(IterativeSolver):
    """v ← Jᵀv + b, the adjoint of the fixed point iteration: x ← x + (b − Ax) for any A = I − Jᵀ.

    K steps from zero compute Σ_{k<K} (Jᵀ)ᵏ b, as reverse mode through the last K steps of the map does at a solution.
    One step, v = b, takes A for the identity ("Jacobian-free", "T1–T2").
    Each step multiplies the error by at most q = ‖J‖. A residual that grows ends as DIVERGED, with its growth rate.

    Cost: one product a step, none in the first from zero; two vectors beside b.
    Source: Grazzi et al. 2020, section 3.2; of one step Luketina et al. 2016 (T1–T2) and Fung et al. 2022.

    Example:
        >>> import torch, hypergrad as hg
        >>> op = hg.operators.matrix(torch.tensor([[1.0, 0.2], [0.1, 0.9]]))
        >>> hg.solvers.FixedPoint(rtol=1e-5)(op, torch.tensor([1.0, 2.0])).status.name
        'CONVERGED'
    """

    def _iterate(self, system: System) -> Outcome:
        return richardson(system, system.x0, 1.0)

    def valid_for(self, structure: Structure) -> str | None:
        return None if structure.radius < 1 else f"ρ(I − A) = {structure.radius:.6g} ≥ 1: it does not converge"

    def products_needed(self, structure: Structure, rtol: float = 1e-6) -> float | None:
        """By the error bound ‖I − A‖^k if that norm is below 1, else by ρ(I − A)^k (the error may grow at first)."""
        norm = structure.contraction
        return steps_needed(norm if norm < 1 else structure.radius, rtol)


@dataclass(frozen=True, kw_only=True)
class Neumann(IterativeSolver):
    """Neumann series x = η Σ_{k≤K} (I − ηA)ᵏ b with K = max_steps, one term more than FixedPoint.

    Args:
        step_size: η > 0; for a symmetric A it must be below 2 / λ_max(A).

    Cost: one product a step; two vectors beside b.
    Source: Lorraine, Vicol and Duvenaud 2020, Algorithm 3; the iteration is the same from a start x0.

    Example:
        >>> import torch, hypergrad as hg
        >>> op = hg.operators.matrix(torch.tensor([[4.0, 1.0], [1.0, 3.0]]), positive_definite=True)
        >>> hg.solvers.Neumann(step_size=0.2, max_steps=100)(op, torch.tensor([1.0, 2.0])).value.round(decimals=3)
        tensor([0.0910, 0.6360])
    """

    step_size: float = 1.0

    def _iterate(self, system: System) -> Outcome:
        x, r = system.start()
        x.add_(r, self.step_size)
        del r  # saves a vector
        return richardson(system, x, self.step_size)

    def valid_for(self, structure: Structure) -> str | None:
        rate, values = self._rate(structure), structure.eigenvalues
        if rate is None or rate < 1:
            return None
        definite = structure.definiteness == "positive definite"
        best = f"; step_size={2 / abs(values[0] + values[-1]):.4g} converges" if definite else ""
        return f"ρ(I − ηA) = {rate:.6g} ≥ 1: it does not converge{best}"

    def products_needed(self, structure: Structure, rtol: float = 1e-6) -> float | None:
        """One more than the bound ρ(I − ηA)^k on the error requires; as FixedPoint if A is not symmetric and η = 1."""
        rate, norm = self._rate(structure), structure.contraction
        if rate is not None and not structure.symmetric and norm < 1:
            rate = norm
        steps = None if rate is None else steps_needed(rate, rtol)
        return None if steps is None else steps + 1

    def _rate(self, structure: Structure) -> float | None:
        """ρ(I − ηA); None if unknown."""
        if structure.symmetric:
            return max(abs(1 - self.step_size * value) for value in structure.eigenvalues)
        return structure.radius if self.step_size == 1 else None
