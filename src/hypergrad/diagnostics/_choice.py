"""Which linear solvers are valid for a system of known structure, and how many steps each would need."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ._structure import Structure


@dataclass(frozen=True)
class SolverChoice:
    """What theory says of one solver on one system.

    Attributes:
        solver: its name in hg.solvers.
        valid: whether it applies; False where it is known to fail, or to give something else.
        steps: by the bound in `why`, for the accuracy asked for; None where there is no bound.
        products: with A and Aᵀ, for these steps.
        why: the bound, or the reason against.
    """

    solver: str
    valid: bool
    steps: int | None
    products: int | None
    why: str


def solver_choice(s: Structure, accuracy: float = 1e-6) -> tuple[SolverChoice, ...]:
    """For each solver of hg.solvers whether it is valid on this system, and the steps for a relative accuracy.

    Auto and Refined are left out, for they run others, and BlockCG, which is CG where there is one right hand side.

        CG               2 ((√κ − 1)/(√κ + 1))^k     of the error in the norm of A
        MINRES           2 ((√κ − 1)/(√κ + 1))^k     of the residual, A definite;  2 ((κ − 1)/(κ + 1))^⌊k/2⌋ indefinite
        NormalCG, LSQR   2 ((κ − 1)/(κ + 1))^k       of the residual
        FixedPoint       ‖J‖^k of the error where ‖J‖ < 1, else about ρ(J)^k;   J = I − A
        Neumann          ((κ − 1)/(κ + 1))^k         of the error, A positive definite, η = 2/(λ_min + λ_max)
        GMRES            MINRES's where A is symmetric, else ‖J‖^k; n steps at most; all without restarts
        BiCGStab         no bound

    These are bounds, and often far from sharp: in exact arithmetic CG, MINRES, NormalCG and LSQR end after n steps, and
    where the spectrum is clustered sooner; rounding delays them. κ and ‖J‖ are those of the Structure: unless it is
    `exact` they may be larger in truth, and so may the steps.

    Args:
        accuracy: ε in (0, 1), relative.

    Returns: a tuple of SolverChoice: the valid ones first, by their products.
    Raises: ValueError for an accuracy outside (0, 1).
    Source: Saad 2003, Theorem 6.29 and section 6.11.4 (CG, GMRES); Elman, Silvester and Wathen 2014, section 2.4
        (MINRES); Paige and Saunders 1982 (LSQR).

    Example:
        >>> found = hg.diagnostics.operator_structure(
        ...     hg.operators.matrix(torch.diag(torch.tensor([1.0, 4.0])), symmetric=True), torch.zeros(2)
        ... )
        >>> next(c.steps for c in solver_choice(found, 1e-3) if c.solver == "CG")
        7
    """
    if not 0 < accuracy < 1:
        raise ValueError(f"accuracy must lie between 0 and 1, got {accuracy!r}")
    every = [make(s, accuracy) for make in _RULES]
    return tuple(sorted(every, key=lambda c: (not c.valid, math.inf if c.products is None else c.products)))


def solver_rows(s: Structure, accuracy: float = 1e-6) -> str:
    """`solver_choice` as three lines of a table."""
    every = solver_choice(s, accuracy)
    rows = {
        f"products for {accuracy:.0e}": [f"{c.solver} {c.products}" for c in every if c.products is not None],
        "no bound": [c.solver for c in every if c.valid and c.products is None],
        "not valid": [c.solver for c in every if not c.valid],
    }
    return "\n".join(f"{name:<22}{', '.join(names)}" for name, names in rows.items() if names)


def steps_needed(rate: float, accuracy: float, factor: float = 1.0) -> int | None:
    """The least k with factor · rate^k ≤ accuracy; None where there is none."""
    if rate >= 1 or math.isnan(rate):
        return None
    if rate <= 0:
        return 1
    return max(1, math.ceil(math.log(accuracy / factor) / math.log(rate)))


def rate_of(condition: float) -> float:
    """(κ − 1)/(κ + 1)."""
    return 1.0 if math.isinf(condition) else (condition - 1) / (condition + 1)


def _choice(solver: str, steps: int | None, why: str, cost: int = 1, more: int = 0) -> SolverChoice:
    return SolverChoice(solver, True, steps, None if steps is None else cost * steps + more, why)


def _against(solver: str, why: str) -> SolverChoice:
    return SolverChoice(solver, False, None, None, why)


_NOT_SYMMETRIC = "A is not symmetric"
_LEAST_SQUARES = "A is singular: it ends at a least-squares solution, after a number of steps without a bound"


def _definite(s: Structure) -> bool:
    return s.definiteness == "positive definite"


def _cg(s: Structure, accuracy: float) -> SolverChoice:
    if not s.symmetric:
        return _against("CG", _NOT_SYMMETRIC)
    if not _definite(s):
        return _against("CG", f"A is {s.definiteness}, not positive definite")
    steps = steps_needed(rate_of(math.sqrt(s.condition)), accuracy, 2.0)
    return _choice("CG", steps, "2 ((√κ−1)/(√κ+1))^k")


def _minres(s: Structure, accuracy: float) -> SolverChoice:
    if not s.symmetric:
        return _against("MINRES", _NOT_SYMMETRIC)
    if s.singular:
        return _choice("MINRES", None, _LEAST_SQUARES)
    if s.definiteness == "indefinite":
        half = steps_needed(rate_of(s.condition), accuracy, 2.0)
        return _choice("MINRES", None if half is None else 2 * half, "2 ((κ−1)/(κ+1))^⌊k/2⌋")
    steps = steps_needed(rate_of(math.sqrt(s.condition)), accuracy, 2.0)
    return _choice("MINRES", steps, "2 ((√κ−1)/(√κ+1))^k")


def _gmres(s: Structure, accuracy: float) -> SolverChoice:
    if s.singular:
        return _choice("GMRES", None, "A is singular: it may break down before a solution")
    by_norm = _minres(s, accuracy).steps if s.symmetric else steps_needed(s.contraction[0], accuracy)
    if by_norm is not None and by_norm < s.n:
        if s.symmetric:
            return _choice("GMRES", by_norm, "as MINRES, without restarts")
        return _choice("GMRES", by_norm, "‖J‖^k, without restarts")
    return _choice("GMRES", s.n, "n, without restarts: nothing better is known of a matrix like this")


def _bicgstab(s: Structure, accuracy: float) -> SolverChoice:
    if s.singular:
        return _against("BiCGStab", "A is singular")
    return _choice("BiCGStab", None, "no bound; often twice GMRES's products", cost=2)


def _normal(solver: str) -> Callable[[Structure, float], SolverChoice]:
    def make(s: Structure, accuracy: float) -> SolverChoice:
        if s.singular:
            return _choice(solver, None, _LEAST_SQUARES)
        steps = steps_needed(rate_of(s.condition), accuracy, 2.0)
        return _choice(solver, steps, "2 ((κ−1)/(κ+1))^k, the condition number being squared", cost=2)

    return make


def _fixed_point(s: Structure, accuracy: float) -> SolverChoice:
    q, rho = s.contraction[0], s.radius
    if q < 1:
        return _choice("FixedPoint", steps_needed(q, accuracy), f"‖J‖^k, ‖J‖ = {q:.6g}")
    if rho < 1:
        why = f"about ρ^k, ρ(J) = {rho:.6g}, but the error may first grow: ‖J‖ = {q:.4g}"
        return _choice("FixedPoint", steps_needed(rho, accuracy), why)
    return _against("FixedPoint", f"ρ(J) = {rho:.6g} ≥ 1: it does not converge")


def _neumann(s: Structure, accuracy: float) -> SolverChoice:
    if _definite(s):
        best = 2 / (float(s.eigenvalues[0].real) + float(s.eigenvalues[-1].real))
        why = f"((κ−1)/(κ+1))^k with step_size = {best:.4g} = 2/(λ_min + λ_max)"
        return _choice("Neumann", steps_needed(rate_of(s.condition), accuracy), why, more=1)
    same = _fixed_point(s, accuracy)
    if same.valid:
        return _choice("Neumann", same.steps, f"as FixedPoint, with step_size = 1: {same.why}", more=1)
    return _against("Neumann", same.why)


def _one_step(s: Structure, accuracy: float) -> SolverChoice:
    q = s.contraction[0]
    if q <= accuracy:
        return SolverChoice("OneStep", True, 1, 0, f"v = b: the error is at most ‖J‖ = {q:.2g}")
    return _against("OneStep", f"an approximation: v = b is up to ‖J‖ = {q:.2g} of ‖v‖ off")


def _dense(s: Structure, accuracy: float) -> SolverChoice:
    why = "n products and n² numbers" + (": a least-squares solution, A being singular" if s.singular else "")
    return _choice("Dense", 1, why, cost=s.n)


def _nystrom(s: Structure, accuracy: float) -> SolverChoice:
    return _against("Nystrom", "an approximation without a bound here; as CG's preconditioner it is exact")


def _optimizer(s: Structure, accuracy: float) -> SolverChoice:
    return _choice("Optimizer", None, "depends on the optimizer; made for products that are noisy")


_RULES: tuple[Callable[[Structure, float], SolverChoice], ...] = (
    _cg,
    _minres,
    _gmres,
    _bicgstab,
    _normal("NormalCG"),
    _normal("LSQR"),
    _fixed_point,
    _neumann,
    _one_step,
    _dense,
    _nystrom,
    _optimizer,
)
