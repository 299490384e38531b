"""`check`, and the report on a hypergradient as numbers, a table and advice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from .. import _torch
from .._options import check_whole
from .._tree import PyTree
from ..implicit import Hypergradient, Problem
from ..operators import has_curvature
from ..solvers import IterativeSolver, LinearSolver, Nystrom, Solver
from ..unroll import ForwardResult, ReverseResult
from ._advice import better_solver, findings_about_the_check, remedies, verdict
from ._differences import Differences, finite_differences
from ._error import Budget, Estimate, estimate, total
from ._findings import Finding, findings
from ._structure import Structure, require_callable, solver_choice, solver_rows, structure, unchanged

UNROLLED = (ReverseResult, ForwardResult)
STEPS = 50  # dimension of the Krylov space for the structure of A


@dataclass(frozen=True)
class Report:
    """What `check` found about the error of a hypergradient. print(report) shows a table followed by advice.

    Attributes:
        ok: whether the hypergradient can be used as it is.
        verdict: the reason in one sentence, which takes everything below into account.
        estimate: the estimated error, with the residuals that it comes from.
        differences: finite differences of λ ↦ E(w*(λ), λ); None without solve=.
        structure: the structure of A; None if max_products did not allow it or a product was not finite.
        findings: what was found to be wrong with the problem or the hypergradient.
        advice: the verdict, the findings, and what to do, in sentences.
        products: the number of products with A and Aᵀ, without the two reverse passes of each correction.
        left_out: what was left out because max_products were spent.

    Example:
        >>> lam = torch.tensor([3.0, 1.0], dtype=torch.float64, requires_grad=True)
        >>> result = hg.implicit.grad(
        ...     lambda w, lam: (w**2).sum() / 2,
        ...     inner_loss=lambda w, lam: ((w - lam) ** 4 / 4 + (w - lam) ** 2).sum(),
        ...     params=1.01 * lam.detach(),
        ...     hparams=lam,
        ... )
        >>> report = hg.diagnostics.check(result)
        >>> report.ok, report.verdict
        (False, 'the hypergradient is off by about 1.00%')
    """

    ok: bool
    verdict: str
    estimate: Estimate
    differences: Differences | None
    structure: Structure | None
    findings: tuple[Finding, ...]
    advice: tuple[str, ...]
    products: int
    left_out: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """All fields as numbers, strings, lists and dicts (no tensors), for a file; complex numbers become pairs."""
        found = asdict(replace(self, estimate=replace(self.estimate, corrected=None, params=None)))
        numbers = found.pop("estimate") | {"status": self.estimate.status.name}
        if self.structure is not None:
            pairs = [z if isinstance(z, float) else (z.real, z.imag) for z in self.structure.eigenvalues]
            found["structure"] |= {"eigenvalues": pairs, "definiteness": self.structure.definiteness}
            found["solvers"] = [asdict(each) for each in solver_choice(self.structure)]
        return numbers | found

    def __str__(self) -> str:
        rows = list(_rows(self))
        width = max(len(name) for name, _ in rows)
        table = [f"{name:<{width}}  {value}" for name, value in rows]
        system = [] if self.structure is None else ["", str(self.structure), solver_rows(self.structure)]
        return "\n".join([*table, *system, "", *(f"- {line}" for line in self.advice)])


def _rows(report: Report) -> Iterator[tuple[str, str]]:
    e = report.estimate
    yield "inner residual", f"{e.inner_residual:.3e}  (w is {e.distance:.1e} of its norm off, estimated)"
    damping = f", with a damping of {e.damping:.2g}" if e.damping else ""
    yield "adjoint residual", f"{e.adjoint_residual:.3e}  (relative {e.adjoint_relative_residual:.1e}{damping})"
    yield "hypergradient norm", f"{e.hypergradient_norm:.6g}  (corrected {e.corrected_norm:.6g})"
    doubt = f"± {e.uncertainty:.0%}" if e.settled else "not settled"
    yield "estimated error", f"{e.error:.3e}  (relative {e.relative_error:.1e}, {doubt})"
    yield "  by the inner residual", f"{e.from_inner:.3e}  (first order)"
    yield "  by the adjoint residual", f"{e.from_adjoint:.3e}  (first order)"
    if e.damping:
        yield "  by the damping", f"{e.from_damping:.3e}  (first order)"
    yield "outer value", f"{e.outer_value:.8g}  (corrected {e.corrected_value:.8g})"
    if report.differences is not None:
        d = report.differences
        yield "against finite differences", f"{d.relative_error:.1e}  (± {d.uncertainty:.1e})"
    yield "products", f"{report.products}, {e.newton_steps} Newton steps"


def check(
    result: Hypergradient | ReverseResult | ForwardResult | PyTree,
    *,
    outer_loss: Callable[[PyTree, PyTree], Tensor] | None = None,
    inner_loss: Callable[[PyTree, PyTree], Tensor] | None = None,
    fp_map: Callable[[PyTree, PyTree], PyTree] | None = None,
    residual: Callable[[PyTree, PyTree], PyTree] | None = None,
    params: PyTree | None = None,
    hparams: PyTree | None = None,
    symmetric: bool = False,
    solver: Solver | None = None,
    solve: Callable[[PyTree], PyTree] | None = None,
    max_products: int = 3000,
    progress: bool | None = None,
) -> Report:
    """Estimate how wrong a hypergradient is, and why. It changes none of its arguments.

    A result of `implicit.grad` holds its problem if the losses were functions and neither params nor hparams have
    changed since (so check before the optimizer's step); keywords override parts of it. For other results pass
    outer_loss, hparams, params (a result of `unroll` has its own) and one form of the inner problem; their error is
    the difference from the exact hypergradient at the inner solution.

    Args:
        result: a Hypergradient, a result of `unroll`, or the gradients themselves in hparams' structure (HyperTorch's
            lists).
        outer_loss, inner_loss, fp_map, residual, params, hparams, symmetric: as in `implicit.grad`, but losses and
            maps must be functions. To check a hypergradient of a damped system, add γ/2 ‖w − w₀‖² to inner_loss,
            where w₀ is a detached copy of params.
        solver: for the linear systems of the estimate, without damping (default: Dense up to 200 unknowns, else MINRES
            if A is symmetric and GMRES if not).
        solve: hparams ↦ params, solves the inner problem from scratch. If given, finite differences are computed.
        max_products: about how many products with A and Aᵀ may be taken (without finite differences); the report names
            what was left out.
        progress: True shows a bar (by tqdm), False none; None shows one after three seconds, given a terminal and tqdm.

    Returns: a Report.
    Raises:
        ValueError: params or hparams changed since, or the problem is stochastic.
        TypeError: a part of the problem is missing or complex, solver only approximates, or the result is one of
            `implicit.jacobian`.
        ImportError: progress=True without tqdm.
    Cost: see `structure`, `findings` and Estimate: three linear systems, and three more for each Newton step; with
        solve four solves for each of three directions.

    Example:
        w minimises ½(w − λ)², so f(λ) = ½λ² and ∇f(λ) = λ, but the given params are 1 % off.

        >>> lam = torch.tensor(3.0, requires_grad=True)
        >>> result = hg.implicit.grad(
        ...     lambda w, lam: 0.5 * w**2,
        ...     inner_loss=lambda w, lam: 0.5 * (w - lam) ** 2,
        ...     params=torch.tensor(2.97),
        ...     hparams=lam,
        ... )
        >>> report = check(result)
        >>> print(report.verdict)
        the hypergradient is off by about 1.00%
        >>> report.estimate.corrected
        tensor(3.)
    """
    check_whole(max_products=(max_products, 1))
    _check_solver(solver)
    if solve is not None and not callable(solve):
        raise TypeError(f"solve must be a function, got {solve!r}")
    given = {"outer_loss": outer_loss, "params": params, "hparams": hparams}
    inner = {"inner_loss": inner_loss, "fp_map": fp_map, "residual": residual}
    problem, budget = _problem(result, given, inner, symmetric), Budget(max_products, progress)
    known = result if isinstance(result, Hypergradient) else None
    grads = result.grads if isinstance(result, (Hypergradient, *UNROLLED)) else result
    solution = None if known is None else known.solution
    solved = math.inf if solution is None else total(solution.residual_norm)
    before = None if known is None else total(known.inner_residual)
    with _torch.outside_inference_mode(), closing(budget), unchanged(problem):
        system = there = _structure(problem, budget)
        minimum = problem.kind != "inner_loss" or system is None or system.definiteness != "indefinite"
        adjoint = None if known is None else known.adjoint
        found = estimate(problem, grads, adjoint, solver, budget, solved=solved, newton=minimum)
        differences = None if solve is None else finite_differences(problem, grads, solve)
        better = better_solver(system, solution)
        wrong = [*findings_about_the_check(found, differences, before, budget.left_out, better)]
        if math.isfinite(found.error):
            wrong = [*findings(problem, system), *wrong]
        if found.settled and found.newton_steps:
            # The speed of the inner solver depends on A at the solution, where it ends.
            there = _structure(problem.again(found.params), budget)
    ok, sentence = verdict(found, wrong)
    lines = (sentence, *map(str, wrong), *remedies(found, system, there, problem.fixed_point, better))
    left_out = tuple(dict.fromkeys(budget.left_out))
    return Report(ok, sentence, found, differences, system, tuple(wrong), lines, budget.done, left_out)


def _check_solver(solver: Any) -> None:
    """Raise TypeError for a solver that does not solve the systems of the estimate."""
    if solver is not None and not callable(solver):
        raise TypeError(f"solver must be a function, got {solver!r}")
    if isinstance(solver, Nystrom) or (isinstance(solver, IterativeSolver) and solver.fixed_steps):
        raise TypeError(f"check's solver must solve its systems, and {solver!r} approximates: give one with an rtol")
    if isinstance(solver, LinearSolver) and solver.damping:
        raise TypeError(
            f"check's solver must solve its systems as they are, got damping={solver.damping!r}: to judge a "
            f"hypergradient as that of the damped problem, pass inner_loss= with damping/2 ‖w − w₀‖² added"
        )


def _structure(problem: Problem, budget: Budget) -> Structure | None:
    """The structure of A from at most a third of the products left; None if these are too few, or not finite."""
    steps = min(STEPS, budget.left // 3 - 6)
    if steps < 1:
        budget.left_out.append("the structure of A")
        return None
    try:
        found = structure(problem, steps=steps)
    except ValueError:  # a product is not finite, which the estimate reports
        return None
    budget.spend(found.products)
    return found


def _problem(result: Any, given: dict[str, Any], inner: dict[str, Any], symmetric: bool) -> Problem:
    """The problem of the result, with the keywords of `check` in place of its parts."""
    known = result.problem if isinstance(result, Hypergradient) else None
    if known is not None:
        _check_known(result, [name for name in ("params", "hparams") if given[name] is None])
    before = {name: getattr(known or result, name, None) for name in given}
    forms = {kind: value for kind, value in inner.items() if value is not None}
    if len(forms) > 1:
        raise TypeError(f"pass exactly one of inner_loss, fp_map and residual; got {list(forms)}")
    if not forms and known is not None:
        forms = {known.kind: known.inner}
    parts = {name: before[name] if value is None else value for name, value in given.items()}
    form = forms or {"inner_loss (or fp_map, or residual)": None}
    missing = [name for name, value in {"outer_loss": parts["outer_loss"], **form, **parts}.items() if value is None]
    if missing:
        why = "it was given evaluated, and its graph is gone" if known is not None else "the result does not know it"
        raise TypeError(
            f"check needs {', '.join(missing)} ({why}): pass it as a keyword, losses and maps as functions of (params, "
            f"hparams), which call a live module by torch.func.functional_call"
        )
    for name, value in (("outer_loss", parts["outer_loss"]), *forms.items()):
        require_callable(value, name)
    # The error is measured against the Hessian, also if a Gauss–Newton matrix replaced it.
    forms = {kind: value.__call__ if has_curvature(value) else value for kind, value in forms.items()}
    tags: dict[str, Any] = {"symmetric": symmetric}
    if known is not None:
        tags["batch_dims"] = known.batch_dims
    if known is not None and known.kind in forms:
        tags |= {"symmetric": symmetric or known.symmetric, "positive_definite": known.positive_definite}
    return Problem(parts.pop("outer_loss"), **parts, **forms, **tags)


def _check_known(result: Hypergradient, used: list[str]) -> None:
    """Raise if a result holds several hypergradients, a changed problem or a random one."""
    problem = result.problem
    if result.outer_value.ndim:
        raise TypeError(
            f"check takes one hypergradient, and a result of implicit.jacobian holds {len(result.outer_value)}: pass "
            f"row i of its grads in hparams' structure, and outer_loss=, params=, hparams= and the inner problem as "
            f"keywords"
        )
    changed = [name for name in used if name in problem.changed]
    if changed:
        raise ValueError(
            f"{' and '.join(changed)} changed since the hypergradient was computed (an optimizer's step?): check "
            f"before that, or pass {'= and '.join(changed)}= as they were"
        )
    if problem.stochastic:
        raise ValueError(
            "the inner problem is drawn again at every product, so it has no single residual: pass a hypergradient of "
            "one fixed draw"
        )
