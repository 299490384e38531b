"""The report on a hypergradient: what `check` finds, as numbers, as a table, and as advice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from optree import tree_leaves
from torch import Tensor

from .._tree import PyTree
from ..implicit import Hypergradient, Problem
from ..implicit._problem import InnerProblem
from ..solvers import Solver
from ..unroll import ForwardResult, ReverseResult, check_whole
from ._advice import advice, contraction
from ._bound import Constants, bound
from ._choice import solver_choice, solver_rows
from ._differences import Differences, finite_differences
from ._error import Estimate, estimate
from ._findings import Finding, findings_of
from ._structure import Structure, structure_of

UNROLLED = (ReverseResult, ForwardResult)


@dataclass(frozen=True)
class Report:
    """What is known of the error of a hypergradient. print(report) shows it as a table that ends in advice.

    Attributes:
        estimate: of the error, with the residuals it comes from.
        bound: guaranteed by the declared constants; None without them.
        looseness: bound / estimated error.
        differences: finite differences of the whole map; None if not asked for.
        structure: of A; None if not asked for.
        findings: what is recognised as wrong with the problem.
        advice: what to do, in sentences.
    """

    estimate: Estimate
    bound: float | None
    differences: Differences | None
    structure: Structure | None
    findings: tuple[Finding, ...]
    advice: tuple[str, ...]

    @property
    def looseness(self) -> float | None:
        return None if self.bound is None or not self.estimate.error else self.bound / self.estimate.error

    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers, texts, lists and dicts (no tensors), for a file."""
        skipped = {"corrected", "params", "status"}
        numbers = {f.name: getattr(self.estimate, f.name) for f in fields(self.estimate) if f.name not in skipped}
        return numbers | {
            "status": self.estimate.status.name,
            "bound": self.bound,
            "looseness": self.looseness,
            "differences": None if self.differences is None else asdict(self.differences),
            "structure": None if self.structure is None else self.structure.to_dict(),
            "solvers": None if self.structure is None else [asdict(each) for each in solver_choice(self.structure)],
            "findings": [asdict(each) for each in self.findings],
            "advice": list(self.advice),
        }

    def __str__(self) -> str:
        rows = list(_rows(self))
        width = max(len(name) for name, _ in rows)
        table = [f"{name:<{width}}  {value}" for name, value in rows]
        system = [] if self.structure is None else ["", str(self.structure), solver_rows(self.structure)]
        return "\n".join([*table, *system, "", *(f"- {line}" for line in self.advice)])


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
    result: Hypergradient | ReverseResult | ForwardResult | PyTree,
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
    structure: bool = True,
    inner_steps: int | None = None,
) -> Report:
    """How wrong a hypergradient is, and why. Changes nothing of the user's.

    A result of `implicit.grad` knows its problem, as long as the losses were functions and neither params nor hparams
    changed since (check before the optimizer's step). What it does not know is passed as keywords, which replace what
    it knows. Other results come with all of outer_loss, hparams, params (a result of `unroll` has its own) and one form
    of the inner problem; whatever they are, their error is that against the exact hypergradient at the inner solution.

    Args:
        result: a Hypergradient, a result of `unroll`, or the gradients themselves in hparams' structure (HyperTorch's
            lists).
        outer_loss, inner_loss, fp_map, residual, params, hparams, symmetric: as in `implicit.grad`; functions.
        adjoint: v of a result that does not hold it; solved for if None.
        solver: of the linear systems behind the estimate (default: Dense up to 200 unknowns, else MINRES where A is
            symmetric and GMRES where it is not).
        newton_steps: that the estimate may take; 0 for the first-order estimate (see Estimate).
        constants: Constants, declared, for the guaranteed bound. There is no bound without them.
        solve: hparams ↦ params, solving the inner problem from scratch: asks for finite differences.
        directions, step: see `finite_differences`.
        structure: also find the structure of A, and what is wrong with the problem (`structure`, `findings`).
        inner_steps: T, the steps that the inner solver took, for the advice.

    Returns:
        A Report.

    Raises:
        ValueError: params or hparams changed since, or the problem is stochastic.
        TypeError: a part of the problem is missing, or the result is that of `implicit.jacobian`.
    Cost: see `estimate`, `structure` and `findings`; with solve four solves for each direction.

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
    check_whole(newton_steps=(newton_steps, 0), inner_steps=(inner_steps, 0))
    for name, value in (("solver", solver), ("solve", solve)):
        if value is not None and not callable(value):
            raise TypeError(f"{name} must be a function, got {value!r}")
    if constants is not None and not isinstance(constants, Constants):
        raise TypeError(f"constants must be a hg.diagnostics.Constants, got {constants!r}")
    given = {"inner_loss": inner_loss, "fp_map": fp_map, "residual": residual}
    problem = _problem(result, outer_loss, given, params, hparams, symmetric)
    known = isinstance(result, Hypergradient)
    grads = result.grads if isinstance(result, (Hypergradient, *UNROLLED)) else result
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
    system, there, wrong = None, None, ()
    if structure and math.isfinite(found.error):
        system = structure_of(problem)
        wrong = findings_of(problem, found=system)
        moved = found.settled and found.newton_steps
        # How fast the inner solver is on its way depends on A where the way ends.
        there = structure_of(replace(problem, params=found.params)) if moved else system
    before = float(result.inner_residual.square().sum().sqrt()) if known else None
    rate = contraction(problem, there, constants)
    lines = advice(found, problem, differences, before, rate, inner_steps)
    every = (*(str(each) for each in wrong), *lines)
    return Report(found, guaranteed, differences, system, wrong, every)


def _problem(
    result: Any, outer_loss: Any, inner: dict[str, Any], params: PyTree, hparams: PyTree, symmetric: bool
) -> Problem:
    """The problem that the result knows, with what was passed anew in its places."""
    known = result.problem if isinstance(result, Hypergradient) else None
    if known is not None and tree_leaves(result.adjoint)[0].ndim > tree_leaves(known.params)[0].ndim:
        raise TypeError(
            f"check takes one hypergradient, and a result of implicit.jacobian holds {len(result.outer_value)}: pass "
            f"row i of its grads in hparams' structure, row i of its adjoint as adjoint=, and outer_loss=, params=, "
            f"hparams= and the inner problem as keywords"
        )
    if params is None and isinstance(result, UNROLLED):
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
        form = InnerProblem("inner_loss (or fp_map, or residual)", None) if known is None else known.inner
    parts = {
        "outer_loss": outer_loss or (known and known.outer_loss),
        form.kind: form.given,
        "params": known.params if params is None and known is not None else params,
        "hparams": known.hparams if hparams is None and known is not None else hparams,
    }
    missing = [name for name, value in parts.items() if value is None]
    if missing:
        why = "it was given evaluated, and its graph is gone" if known is not None else "the result does not know it"
        raise TypeError(
            f"check needs {', '.join(missing)} ({why}): pass it as a keyword, losses and maps as functions of (params, "
            f"hparams), which for a live module go through torch.func.functional_call"
        )
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
        inner=form.exact,
        compile=False,
        params=parts["params"],
        hparams=parts["hparams"],
        symmetric=first.symmetric or symmetric or form.kind == "inner_loss",
    )
