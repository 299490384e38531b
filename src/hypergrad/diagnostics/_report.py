"""The report on a hypergradient: what `check` finds, as numbers, as a table, and as advice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from torch import Tensor

from .._solution import Status
from .._vector import PyTree
from ..implicit import Hypergradient, Problem
from ..implicit._problem import InnerProblem
from ..solvers._solver import Solver
from ..unroll import Unrolled
from ._bound import Constants, bound
from ._differences import Differences, finite_differences
from ._error import Estimate, estimate

LOSSES = ("inner_loss", "fp_map", "residual")


@dataclass(frozen=True)
class Report:
    """What is known of the error of a hypergradient. print(report) shows it as a table that ends in advice.

    Attributes:
        estimate: of the error, with the residuals it comes from.
        bound: guaranteed by the declared constants; None without them.
        looseness: bound / estimated error.
        differences: finite differences of the whole map; None if not asked for.
        advice: what to do, in sentences.
    """

    estimate: Estimate
    bound: float | None
    differences: Differences | None
    advice: tuple[str, ...]

    @property
    def looseness(self) -> float | None:
        return None if self.bound is None or not self.estimate.error else self.bound / self.estimate.error

    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers, texts, lists and dicts (no tensors), for a file."""
        skipped = {"corrected", "status"}
        numbers = {f.name: getattr(self.estimate, f.name) for f in fields(self.estimate) if f.name not in skipped}
        return numbers | {
            "status": self.estimate.status.name,
            "bound": self.bound,
            "looseness": self.looseness,
            "differences": None if self.differences is None else asdict(self.differences),
            "advice": list(self.advice),
        }

    def __str__(self) -> str:
        rows = list(_rows(self))
        width = max(len(name) for name, _ in rows)
        table = [f"{name:<{width}}  {value}" for name, value in rows]
        return "\n".join([*table, "", *(f"- {line}" for line in self.advice)])


def _rows(report: Report) -> Iterator[tuple[str, str]]:
    e = report.estimate
    yield "inner residual", f"{e.inner_residual:.3e}  (relative {e.inner_relative_residual:.1e})"
    yield "distance from the inner solution", f"{e.distance:.2e} of its norm, estimated"
    yield "adjoint residual", f"{e.adjoint_residual:.3e}  (relative {e.adjoint_relative_residual:.1e})"
    yield "adjoint norm", f"{e.adjoint_norm:.3e}"
    yield "hypergradient norm", f"{e.hypergradient_norm:.6g}  (corrected {e.corrected_norm:.6g})"
    doubt = f"± {e.uncertainty:.0%}" if e.settled else "not settled"
    yield "estimated error", f"{e.error:.3e}  (relative {e.relative_error:.1e}, {doubt})"
    yield "  by the inner residual", f"{e.from_inner:.3e}  (first order)"
    yield "  by the adjoint residual", f"{e.from_adjoint:.3e}  (first order)"
    if report.bound is not None:
        times = "" if report.looseness is None else f"  ({report.looseness:.2g} times the estimate)"
        yield "guaranteed bound", f"{report.bound:.3e}{times}"
    yield "outer value", f"{e.outer_value:.8g}  (corrected {e.corrected_value:.8g})"
    if report.differences is not None:
        d = report.differences
        yield "against finite differences", f"{d.relative_error:.1e}  (± {d.uncertainty:.1e})"
    yield "products", f"{e.products}, {e.newton_steps} Newton steps"


def check(
    result: Hypergradient | Unrolled | PyTree,
    *,
    outer_loss: Callable[[PyTree, PyTree], Tensor] | None = None,
    inner_loss: Callable[[PyTree, PyTree], Tensor] | None = None,
    fp_map: Callable[[PyTree, PyTree], PyTree] | None = None,
    residual: Callable[[PyTree, PyTree], PyTree] | None = None,
    params: PyTree | None = None,
    hparams: PyTree | None = None,
    adjoint: PyTree | None = None,
    symmetric: bool = False,
    solver: Solver | None = None,
    newton_steps: int = 20,
    constants: Constants | None = None,
    solve: Callable[[PyTree], PyTree] | None = None,
    directions: int = 3,
    step: float | None = None,
) -> Report:
    """How wrong a hypergradient is, and why. Changes nothing of the user's.

    A result of `implicit.grad` knows its problem, as long as the losses were functions and neither params nor hparams
    changed since (check before the optimizer's step). What it does not know is passed as keywords, which replace what
    it knows. Other results come with all of outer_loss, hparams, params (an `Unrolled` has its own) and one form of the
    inner problem; whatever they are, their error is that against the exact hypergradient at the inner solution.

    Args:
        result: a Hypergradient, an Unrolled, or the gradients themselves in hparams' structure (HyperTorch's lists).
        outer_loss, inner_loss, fp_map, residual, params, hparams, symmetric: as in `implicit.grad`; functions.
        adjoint: v of a result that does not hold it; solved for if None.
        solver: of the linear systems behind the estimate (default: Dense up to 200 unknowns, else MINRES where A is
            symmetric and GMRES where it is not).
        newton_steps: that the estimate may take; 0 for the first-order estimate (see Estimate).
        constants: Constants, declared, for the guaranteed bound. There is no bound without them.
        solve: hparams ↦ params, solving the inner problem from scratch: asks for finite differences.
        directions, step: see `finite_differences`.

    Returns:
        A Report.

    Raises:
        ValueError: params or hparams changed since, or the problem is stochastic.
        TypeError: a part of the problem is missing.
    Cost: see `estimate`; with solve four solves for each direction.

    Example:
        w minimises ½(w − λ)², so f(λ) = ½λ² and ∇f(λ) = λ, but w was taken 1 % off.

        >>> lam = torch.tensor(3.0, requires_grad=True)
        >>> result = hg.implicit.grad(
        ...     lambda w, lam: 0.5 * w**2,
        ...     inner_loss=lambda w, lam: 0.5 * (w - lam) ** 2,
        ...     params=torch.tensor(2.97),
        ...     hparams=lam,
        ... )
        >>> report = check(result)
        >>> round(report.estimate.relative_error, 6), report.estimate.corrected
        (0.01, tensor(3.))
    """
    given = {"inner_loss": inner_loss, "fp_map": fp_map, "residual": residual}
    problem = _problem(result, outer_loss, given, params, hparams, symmetric)
    known = isinstance(result, Hypergradient)
    grads = result.grads if isinstance(result, (Hypergradient, Unrolled)) else result
    if adjoint is None and known:
        adjoint = result.adjoint
    found = estimate(problem, grads, adjoint, solver, newton_steps)
    guaranteed = None
    if constants is not None:
        guaranteed = bound(constants, found.inner_residual, found.adjoint_residual, found.adjoint_norm)
        guaranteed += found.mismatch
    differences = None
    if solve is not None:
        differences = finite_differences(problem, grads, solve, directions=directions, step=step)
    before = float(result.inner_residual.square().sum().sqrt()) if known else None
    return Report(found, guaranteed, differences, tuple(_advice(found, problem, differences, before)))


def _problem(
    result: Any, outer_loss: Any, inner: dict[str, Any], params: PyTree, hparams: PyTree, symmetric: bool
) -> Problem:
    """The problem that the result knows, with what was passed anew in its places."""
    known = result.problem if isinstance(result, Hypergradient) else None
    if params is None and isinstance(result, Unrolled):
        params = result.params
    if known is not None:
        changed = [name for name, new in (("params", params), ("hparams", hparams)) if new is None]
        changed = [name for name in changed if name in known.changed]
        if changed:
            names = " and ".join(changed)
            raise ValueError(
                f"{names} changed since the hypergradient was computed (an optimizer's step?): check before that, or "
                f"pass {'= and '.join(changed)}= as they were"
            )
    if any(value is not None for value in inner.values()):
        form = InnerProblem.of(**inner)
    else:
        form = InnerProblem("inner problem", None) if known is None else known.inner
    parts = {
        "outer_loss": outer_loss or (known and known.outer_loss),
        form.kind: form.given,
        "params": known.params if params is None and known is not None else params,
        "hparams": known.hparams if hparams is None and known is not None else hparams,
    }
    missing = [name for name, value in parts.items() if value is None]
    if missing:
        why = "it was given evaluated, and its graph is gone" if known is not None else "the result does not know it"
        raise TypeError(f"check needs {', '.join(missing)} ({why}): pass it as a keyword, losses and maps as functions")
    for name in ("outer_loss", form.kind):
        if not callable(parts[name]):
            raise TypeError(f"{name} must be a function of (params, hparams), got {type(parts[name]).__name__}")
    if known is not None and known.stochastic:
        raise ValueError(
            "the inner problem is drawn anew at every product, so it has no one residual: pass a hypergradient of one "
            "fixed draw"
        )
    first = known or Problem(None, form, None, None)
    return replace(
        first,
        outer_loss=parts["outer_loss"],
        inner=form,
        params=parts["params"],
        hparams=parts["hparams"],
        symmetric=first.symmetric or symmetric or form.kind == "inner_loss",
    )


def _advice(e: Estimate, problem: Problem, differences: Differences | None, before: float | None) -> Iterator[str]:
    if not math.isfinite(e.error):
        yield "the residuals or the hypergradient hold NaN or infinity: look at the losses at this point"
        return
    if (
        before is not None
        and abs(before - e.inner_residual) > 1e-3 * max(before, e.inner_residual)
        and _above_rounding(e)
    ):
        yield (
            f"the inner residual is {e.inner_residual:.2e} now and was {before:.2e} when the hypergradient was "
            f"computed: the inner problem is random, or its data or buffers changed"
        )
    if e.status is not Status.CONVERGED:
        yield f"a linear system behind the estimate ended as {e.status.name}: {e.status.message}"
    if not e.settled:
        yield (
            f"the error cannot be estimated: after {e.newton_steps} Newton steps the estimate still changes by "
            f"{e.uncertainty:.0%}. The inner problem is far from solved, or has no solution near by: run its solver "
            f"much longer, or use Newton's method or another solver for it"
        )
    elif e.relative_error <= 1e-3:
        yield f"the hypergradient is right to about {max(e.relative_error, 1e-16):.0e}; nothing needs to be done"
    if e.relative_error > 1e-3:
        yield from _remedies(e, problem)
    if differences is not None and not differences.agrees:
        yield (
            f"finite differences disagree by {differences.relative_error:.1e}, more than their own uncertainty "
            f"{differences.uncertainty:.1e}"
            + (", which the estimated error explains" if e.relative_error >= differences.relative_error / 2 else "")
        )


def _above_rounding(e: Estimate) -> bool:
    return e.inner_relative_residual > 1e-10


def _remedies(e: Estimate, problem: Problem) -> Iterator[str]:
    if e.from_inner >= e.from_adjoint or not e.settled:
        hint = "; at this distance first-order estimates no longer hold" if e.newton_steps else ""
        yield (
            f"the inner problem is not solved: params are {e.distance:.1%} of their norm away from its solution{hint}. "
            f"Run its solver longer or use a faster one (a second-order method for a loss, Anderson or Newton for a "
            f"map), pass refine=True with hypergradient_rtol, or polish=True, which squares the error"
        )
    if e.from_adjoint > 0.1 * e.from_inner:
        yield (
            f"the adjoint system is not solved: its relative residual is {e.adjoint_relative_residual:.1e}. Give the "
            f"solver more steps or a smaller rtol, or a preconditioner"
        )
    if e.from_inner > 10 * e.from_adjoint and e.settled:
        yield "the adjoint is solved further than the inner problem deserves: spend its steps there"
    elif e.from_adjoint > 10 * e.from_inner:
        yield "the inner problem is solved further than the adjoint deserves: spend its steps there"
