"""The verdict on a hypergradient and the advice of `check`, as sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from .._solution import Solution, Status
from ..solvers import rate_of, steps_needed
from ._differences import Differences
from ._error import Estimate
from ._findings import Finding
from ._structure import Structure, solver_choice

GOOD = 1e-3  # relative error up to which a hypergradient counts as right
POOR = 0.1  # relative residual of the adjoint system above which there is a finding
FLOOR = "rounding floor"  # the only finding that limits the accuracy and nothing else


def verdict(e: Estimate, findings: Sequence[Finding]) -> tuple[bool, str]:
    """Whether the hypergradient can be used as it is, and the sentence that says so. All findings count."""
    if not math.isfinite(e.error):
        return False, "the residuals or the hypergradient hold NaN or infinity: look at the losses at this point"
    floor = max([0.0, *(f.numbers["distance"] for f in findings if f.name == FLOOR)])
    doubts = list(dict.fromkeys(f.name for f in findings if f.name != FLOOR or floor > GOOD))
    if not e.settled and "indefinite" in doubts:
        start = f"params are not at an inner minimum; to first order the hypergradient is off by {_percent(e)}"
    elif not e.settled:
        start = (
            f"the error cannot be estimated: after {e.newton_steps} Newton steps the estimate is {_percent(e)} and "
            f"still changes by {e.uncertainty:.0%}"
        )
    elif e.relative_error > GOOD:
        start = f"the hypergradient is off by about {_percent(e)}"
    elif doubts:
        start = f"the residuals alone say that the hypergradient is right to about {max(e.relative_error, 1e-16):.0e}"
    else:
        right = max(e.relative_error, floor, 1e-16)
        return True, f"the hypergradient is right to about {right:.0e}; nothing needs to be done"
    return False, start + (f", but see: {', '.join(doubts)}" if doubts else "")


def findings_about_the_check(
    e: Estimate, differences: Differences | None, before: float | None, left_out: Sequence[str], better: str
) -> Iterator[Finding]:
    """Findings about the given result and about the estimate. before: ‖F‖ when the result was computed."""
    relative = e.adjoint_relative_residual
    if relative > POOR:
        worse = ", no smaller than for v = 0" if relative >= 1 else ""
        text = f"the adjoint system has a relative residual of {relative:.2g}{worse}{better}"
        yield Finding("adjoint unsolved", text, {"relative residual": relative})
    changed = before is not None and abs(before - e.inner_residual) > 1e-3 * max(before, e.inner_residual)
    if changed and e.distance > 1e-10:
        text = (
            f"the inner residual is {e.inner_residual:.2e} now and was {before:.2e} when the hypergradient was "
            f"computed: the inner problem is random, or its data, buffers, params or hparams changed (by .data)"
        )
        yield Finding("problem changed", text)
    if math.isfinite(e.error) and e.status.value > Status.COMPLETED.value:
        text = f"a system of the estimate ended as {e.status.name}: {e.status.message}. Pass another solver= to check"
        yield Finding("estimate unsolved", text)
    if left_out:
        yield Finding("max_products", f"the limit left too few for {' and '.join(dict.fromkeys(left_out))}")
    if differences is not None and not differences.agrees and differences.relative_error > GOOD:
        error, own = differences.relative_error, differences.uncertainty
        text = f"they differ from the hypergradient by {error:.1e} (relative), and their uncertainty is {own:.1e}"
        if not any(differences.derivatives):
            text = "they are all zero: does solve use its argument, and outer_loss the params that solve returns?"
        elif e.relative_error >= error / 2:
            text += ", which the estimated error explains"
        yield Finding("finite differences", text, {"relative error": error})


def better_solver(structure: Structure | None, solution: Solution | None) -> str:
    """Why the solver of the hypergradient does not suit its system, and which one needs the fewest products."""
    choices = () if structure is None else solver_choice(structure)
    name = "" if solution is None else solution.method.partition(":")[0]
    against = [f"; {name} does not fit: {c.against}" for c in choices if c.solver == name and c.against]
    bounded = [c for c in choices if c.products and c.solver != "Auto"]
    better = [f"; {c.solver} needs at most {c.products:.0f} products" for c in bounded[:1]]
    return "".join([*against, *better])


def remedies(
    e: Estimate, at: Structure | None, there: Structure | None, fixed_point: bool, better: str
) -> Iterator[str]:
    """What to do about the error. at, there: the structure of A at params, and at the estimated inner solution."""
    if not math.isfinite(e.error) or (e.settled and e.relative_error <= GOOD):
        return
    most = max(e.from_inner, e.from_adjoint, e.from_damping)
    if e.from_inner >= most or not e.settled:
        away = f"{e.distance:.1%} of their norm away from" if math.isfinite(e.distance) else "not 0, which seems to be"
        kink = "" if e.settled else ". Or a kink (an L1 term, relu, max) lies between params and the solution"
        yield (
            f"the inner problem is not solved: {_rate_text(e.relative_error, there, fixed_point)}params are {away} its "
            f"solution. Run its solver longer, or use a faster one (a second-order method for a loss, Anderson or "
            f"Newton for a map), or implicit.refine, which solves both as far as the hypergradient needs, or "
            f"implicit.polish, which squares the error; or expect an error of {_percent(e)}{kink}"
        )
    if e.from_damping > 0.1 * most:
        yield (
            f"the adjoint system was solved with a damping of about {e.damping:.2g}, which changes the hypergradient "
            f"by about {e.from_damping:.2g}: use less damping, as far as the system allows; or, if the damped problem "
            f"is meant, pass check an inner_loss with damping/2 ‖w − w₀‖² added"
        )
    if e.from_adjoint > 0.1 * most and e.adjoint_relative_residual <= POOR:
        yield (
            f"the adjoint system is not solved: its relative residual is {e.adjoint_relative_residual:.1e}. Give its "
            f"solver more steps or a smaller rtol, or a preconditioner{better}"
        )
    if at is not None and not fixed_point and at.definiteness == "indefinite":
        yield (
            "if params are in mid-training and you want the derivative of the training: on small networks "
            "(docs/estimators.md), hypergradients from one linear system were off by 30 to 100 % of its norm. For its "
            "direction use operators.GaussNewton, or the damping of the finding above; for the derivative itself use "
            "unroll.reverse through the steps, and compare by check(..., solve=the training)"
        )
    pair = sorted([(e.from_inner, "inner problem"), (e.from_adjoint, "adjoint system")])
    if e.settled and pair[0][0] < 0.1 * pair[1][0] and most == pair[1][0]:
        yield (
            f"inner and adjoint steps are out of balance: the {pair[0][1]} is solved further than the {pair[1][1]} "
            f"deserves, so spend its steps there"
        )


def _rate_text(error: float, s: Structure | None, fixed_point: bool) -> str:
    """A phrase on the contraction factor of the inner solver, and on the steps that it needs."""
    if s is None or not (fixed_point or s.definiteness == "positive definite"):
        return ""
    q = s.radius if fixed_point else rate_of(s.condition)
    whose = "its contraction factor" if fixed_point else "the contraction factor of gradient descent, at its best step,"
    if q >= 1:
        return f"{whose} is {q:.6g}, no less than 1, so its steps need not converge; "
    more = steps_needed(q, GOOD, max(error, GOOD)) if math.isfinite(error) else None
    enough = "" if more is None else f", about {more} more steps would bring the hypergradient's error to {GOOD:.1%}"
    return f"{whose} is {q:.6g}{enough}; "


def _percent(e: Estimate) -> str:
    finite = math.isfinite(e.relative_error)
    return f"{e.relative_error:.2%}" if finite else f"{e.error:.2g} where the true hypergradient is 0"
