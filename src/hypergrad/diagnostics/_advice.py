"""From numbers to sentences: what is wrong with a hypergradient, and what to do."""

from __future__ import annotations

import math
from collections.abc import Iterator

from .._solution import Status
from ..implicit import Problem
from ._bound import Constants
from ._choice import rate_of, steps_needed
from ._differences import Differences
from ._error import Estimate
from ._structure import Structure

GOOD = 1e-3  # relative error of a hypergradient about which there is nothing to say
Rate = tuple[float, str]  # a contraction factor, and whose it is


def contraction(problem: Problem, structure: Structure | None, constants: Constants | None) -> Rate | None:
    """The factor by which a step of the inner solver reduces the error: declared, or found; None where unknown."""
    if constants is not None and constants.q is not None:
        return constants.q, "its declared contraction factor"
    if structure is None:
        return None
    if problem.fixed_point:
        return structure.radius, "its contraction factor"
    if structure.definiteness == "positive definite":
        return rate_of(structure.condition), "the contraction factor of gradient descent, at its best step size,"
    return None


def advice(
    e: Estimate,
    problem: Problem,
    differences: Differences | None,
    before: float | None,
    rate: Rate | None,
    inner_steps: int | None,
) -> Iterator[str]:
    """The sentences at the end of a report. before: ‖F‖ when the hypergradient was computed."""
    if not math.isfinite(e.error):
        yield "the residuals or the hypergradient hold NaN or infinity: look at the losses at this point"
        return
    if before is not None and _differs(e, before):
        yield (
            f"the inner residual is {e.inner_residual:.2e} now and was {before:.2e} when the hypergradient was "
            f"computed: the inner problem is random, or its data or buffers changed, or params or hparams "
            f"did (by .data)"
        )
    if e.status is not Status.CONVERGED:
        yield (
            f"a linear system behind the estimate ended as {e.status.name}: {e.status.message}. Until then the "
            f"estimate may be off; what solves these systems is check's solver="
        )
    if not e.settled:
        yield (
            f"the error cannot be estimated: after {e.newton_steps} Newton steps the estimate still changes by "
            f"{e.uncertainty:.0%}. The inner problem is far from solved, or has no solution near by: run its solver "
            f"much longer, or use another"
        )
    if e.settled and e.relative_error <= GOOD:
        yield f"the hypergradient is right to about {max(e.relative_error, 1e-16):.0e}; nothing needs to be done"
    else:
        yield from _remedies(e, rate, inner_steps)
    if differences is not None and differences.flat:
        yield (
            "finite differences are all zero: solve gives an outer value that does not depend on hparams. Does it use "
            "its argument?"
        )
    elif differences is not None and not differences.agrees:
        explained = e.relative_error >= differences.relative_error / 2
        yield (
            f"finite differences disagree by {differences.relative_error:.1e}, more than their own uncertainty "
            f"{differences.uncertainty:.1e}{', which the estimated error explains' if explained else ''}"
        )


def _differs(e: Estimate, before: float) -> bool:
    """Whether the inner residual is another one now, by more than rounding."""
    apart = abs(before - e.inner_residual) > 1e-3 * max(before, e.inner_residual)
    return apart and e.inner_relative_residual > 1e-10


def _remedies(e: Estimate, rate: Rate | None, inner_steps: int | None) -> Iterator[str]:
    if e.from_inner >= e.from_adjoint or not e.settled:
        yield (
            f"the inner problem is not solved: {_pace(e.relative_error, rate, inner_steps)}params are "
            f"{_away(e)} its solution. Run its solver longer, or use a faster one (a "
            f"second-order method for a loss, Anderson or Newton for a map), or refine=True with hypergradient_rtol, "
            f"or polish=True, which squares the error; or expect an error of {_size(e)}"
        )
    if e.from_adjoint > 0.1 * e.from_inner:
        yield (
            f"the adjoint system is not solved: its relative residual is {e.adjoint_relative_residual:.1e}. Give its "
            f"solver more steps or a smaller rtol, or a preconditioner"
        )
    if e.settled and min(e.from_inner, e.from_adjoint) < 0.1 * max(e.from_inner, e.from_adjoint):
        names = ("inner problem", "adjoint system")
        ahead, behind = names if e.from_inner < e.from_adjoint else names[::-1]
        yield f"inner and adjoint steps are out of balance: {_balance(e, ahead, behind, rate)}"


def _pace(error: float, rate: Rate | None, inner_steps: int | None) -> str:
    """What the contraction factor says of the inner solver."""
    if rate is None:
        return ""
    q, whose = rate
    if q >= 1:
        return f"{whose} is {q:.6g}, no less than 1, so its steps need not converge; "
    taken = "" if inner_steps is None else f", {inner_steps} steps reduce the error {_reduction(q**inner_steps)}"
    more = steps_needed(q, GOOD, max(error, GOOD)) if math.isfinite(error) else None
    enough = "" if more is None else f", about {more} more would bring that of the hypergradient to {GOOD:.1%}"
    return f"{whose} is {q:.6g}{taken}{enough}; "


def _away(e: Estimate) -> str:
    return f"{e.distance:.1%} of their norm away from" if math.isfinite(e.distance) else "not 0, which seems to be"


def _size(e: Estimate) -> str:
    finite = math.isfinite(e.relative_error)
    return f"{e.relative_error:.1%}" if finite else f"{e.error:.2g} where the true hypergradient is 0"


def _reduction(left: float) -> str:
    """What is left of an error, in words that say something near 0 and near 1."""
    return f"by {100 * (1 - left):.2g}%" if left > 0.01 else f"to {left:.1e} of itself"


def _balance(e: Estimate, ahead: str, behind: str, rate: Rate | None) -> str:
    text = f"the {ahead} is solved further than the {behind} deserves, so spend its steps there"
    share = min(e.from_inner, e.from_adjoint) / max(e.from_inner, e.from_adjoint)
    if rate is None or behind != "inner problem" or not 0 < rate[0] < 1 or share < 1e-12:
        return text
    steps = math.ceil(math.log(share) / math.log(rate[0]))
    return f"{text} (at a contraction factor of {rate[0]:.6g} a step, {steps} of them make up for it)"
