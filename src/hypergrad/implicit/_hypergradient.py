"""The hypergradient at a solution of the inner problem, by implicit differentiation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import optree
from torch import Tensor

from .. import _autodiff, _torch
from .._autodiff import without_autocast
from .._solution import (
    NOT_FINITE,
    NotFinite,
    OnFailure,
    Solution,
    SolverError,
    Status,
    finite,
    inner_distance,
    warn,
    warn_if_unsolved,
    warn_of_few_steps,
    warned_of_kink,
)
from .._torch import random_state_kept_on_error
from .._tree import PyTree, flatten, full
from ..solvers import Auto, IterativeSolver, Recycled, Solver, on_failure_of, solve
from ._problem import Problem


@dataclass(frozen=True)
class Hypergradient:
    """A hypergradient and how good it is.

    Attributes:
        grads: ∇f(λ), in the structure of hparams; zeros for a leaf that does not require grad or reaches nothing.
        adjoint: v, in the structure of params: the warm start (x0=) of the next outer step.
        solution: how the adjoint system was solved: status, steps, true residual.
        inner_residual: ‖∇₁g‖ or ‖w − Φ(w)‖ or ‖F‖ at the given params: 0-d, or [B]. Known at no extra cost.
        inner_distance: ‖F‖ ‖v‖ / (‖∇₁E‖ ‖w‖), an estimate of the relative distance of w from the inner solution, with
            ‖v‖ / ‖∇₁E‖ standing for ‖A⁻¹‖ (of which it is a lower bound): 0-d, or [B]. Of a fixed point it counts the
            rounding of w − Φ(w).
        outer_value: E(w, λ); of `polish` E − vᵀF, which is f(λ) up to the square of the errors of w and v.
        problem: what it is the hypergradient of, for `diagnostics.check`, `polish` and `refine`: w and λ in the user's
            own memory, without graphs, and the losses where they were given as functions.
        relative_error: of `polish` and `refine`: an estimate of ‖grads − ∇f(λ)‖ / ‖∇f(λ)‖; else None. Of `polish` it is
            the square of that of the uncorrected hypergradient, which gives the order of magnitude only.
        compiled: with compile, how the products were done, and why.
        direct: ∇₂E(w, λ), a part of grads, for their leaves in order; None stands for zeros, and so does an empty list.
        at_kink: ‖∇₁g‖ over the entries of w that are exactly 0; None for another form than an inner loss.

    Example:
        >>> lam = torch.tensor(3.0, requires_grad=True)
        >>> inner_loss = lambda w, lam: (w - lam) ** 2
        >>> result = hg.implicit.grad(
        ...     lambda w, lam: w**2 / 2, inner_loss=inner_loss, params=torch.tensor(3.0), hparams=lam
        ... )
        >>> result.grads, result.adjoint, result.outer_value
        (tensor(3.), tensor(1.5000), tensor(4.5000))
        >>> result.solution.status.name, result.inner_residual
        ('CONVERGED', tensor(0.))
    """

    grads: PyTree
    adjoint: PyTree
    solution: Solution
    inner_residual: Tensor
    inner_distance: Tensor
    outer_value: Tensor
    problem: Problem = field(repr=False)
    relative_error: Tensor | None = None
    compiled: str | None = None
    direct: list[Tensor | None] = field(default_factory=list, repr=False)
    at_kink: Tensor | None = field(default=None, repr=False)

    def check_finite(self, on_failure: OnFailure = "warn") -> None:
        """Warn of, or raise for, a hypergradient that is not finite though the adjoint is."""
        if finite(optree.tree_leaves(self.grads)) or self.solution.status is Status.NON_FINITE:
            return
        if on_failure == "raise":
            raise SolverError(NOT_FINITE, self.solution)
        warn(NOT_FINITE, NotFinite)

    def warn_if_unsolved(self) -> None:
        """UnsolvedInnerProblem where params are far from the inner solution, or the inner loss has a kink there."""
        if warned_of_kink(self.at_kink, self.inner_residual, self.inner_distance, self.solution.value.space.eps):
            return
        found = _torch.numbers(self.inner_distance)
        distances = found if isinstance(found, list) else [found]
        for i, (theta, _) in enumerate(self.solution.remaining):
            distances[i] *= 1 + theta if theta < math.inf else 1
        warn_if_unsolved(max(distances, default=0.0), self.inner_residual)

    def adjoint_error(self, stacked: bool = False) -> tuple[float, float]:
        """Estimated ‖grads − ∇f(λ)‖ / ‖∇f(λ)‖ from the residual left by the solver, and its rate (stacked: the worst).

        The error of v is taken to be θv, so that of grads is θ times their implicit part −∂₂Fᵀv.
        """
        thetas, rates = zip(*(self.solution.remaining or [(0.0, 0.0)]), strict=True)
        theta, rate = max(thetas) if stacked else math.hypot(*thetas) / len(thetas) ** 0.5, max(rates)
        if theta in (0.0, math.inf):
            return theta, rate
        grads: list[Tensor] = optree.tree_leaves(self.grads)
        direct = self.direct or [None] * len(grads)
        if all(d is None for d in direct) and any(bool(full(g.any())) for g in grads):
            return theta / (1 + theta), rate
        cross = [g if d is None else g - d for g, d in zip(grads, direct, strict=True)]
        if not stacked:
            return _off(theta, grads, cross), rate
        return max(_off(theta, [g[i] for g in grads], [c[i] for c in cross]) for i, theta in enumerate(thetas)), rate

    def warn_if_inaccurate(self, stacked: bool = False) -> None:
        """InaccurateHypergradient where a solver did its steps, and these were too few.

        One that stagnated is reported where half the digits of the dtype are not reached: less than that is no failure.
        """
        solution = self.solution
        enough = solution.value.space.eps**0.5
        if solution.status is Status.STAGNATED and bool((solution.relative_residual > enough).any()):
            solution.report("the adjoint system of the hypergradient", "warn")
        if solution.status not in (Status.COMPLETED, Status.MAX_STEPS):
            return
        warn_of_few_steps("the hypergradient", solution, *self.adjoint_error(stacked))


def _off(theta: float, grads: list[Tensor], cross: list[Tensor]) -> float:
    """θ‖c‖ / ‖g + θc‖."""
    top = max(float(full(x.abs().sum())) for x in [*grads, *cross]) or 1.0  # squares of small numbers vanish
    after = [g + theta * c for g, c in zip(grads, cross, strict=True)]
    change, size = (math.hypot(*(float(full((x / top).norm())) for x in xs)) for xs in (cross, after))
    return theta * change / size if size else math.inf if theta * change else 0.0


def grad(
    outer_loss: Callable[[PyTree, PyTree], Tensor] | Tensor,
    *,
    params: PyTree,
    hparams: PyTree,
    inner_loss: Callable[[PyTree, PyTree], Tensor] | Tensor | None = None,
    fp_map: Callable[[PyTree, PyTree], PyTree] | PyTree | None = None,
    residual: Callable[[PyTree, PyTree], PyTree] | PyTree | None = None,
    solver: Solver | None = None,
    x0: PyTree | Recycled | None = None,
    symmetric: bool = False,
    positive_definite: bool = False,
    batch_dims: int = 0,
    compile: bool | str = False,
) -> Hypergradient:
    """Hypergradient ∇f(λ) of f(λ) = E(w(λ), λ) at a solution w of the inner problem. Changes nothing of the user's.

        Aᵀ v = ∇₁E(w, λ),      ∇f(λ) = ∇₂E(w, λ) − ∂₂Fᵀ v

    Losses and maps are callables of (params, hparams), or values that were evaluated on live tensors: then params must
    be the very tensors that entered them, and the graph of the inner value is freed. Exactly one of inner_loss, fp_map
    and residual says what the inner problem is.

    Args:
        outer_loss: E, scalar.
        params: w, a tensor or any pytree of floating point tensors, at (or near) the solution. Where some leaves
            require grad, the others are frozen: constants, not unknowns.
        hparams: λ, likewise; at least one leaf requires grad. Leaves may be outputs of a network.
        inner_loss: g, scalar, minimised by w: A = ∇²₁₁g. It may be an `operators.GaussNewton`.
            What it (or fp_map, residual) takes out of the graph (loss.detach() as the input of a weighting network,
            .data, .item(), no_grad) counts as a constant; where a function does so and its derivative is lost, a
            LostDerivative says how much. With evaluated losses, and in outer_loss, it is lost without a warning:
            `diagnostics.check` finds the first, its `solve=` both.
        fp_map: Φ, of params' structure, w = Φ(w, λ): A = I − ∂₁Φ.
        residual: F, of params' structure, F(w, λ) = 0: A = ∂₁F. Each of the three may be an `operators.Stochastic`.
        solver: a linear solver from hg.solvers, or a function (op, b, x0) of Vectors. Default: `solvers.Auto()`.
        x0: start for v, in params' structure, for example the last hypergradient's `adjoint`; or a
            `solvers.Recycled` that is kept from one outer step to the next.
        symmetric: A of fp_map or residual is symmetric (that of inner_loss always is).
        positive_definite: it is symmetric positive definite.
        batch_dims: 1 where each leaf of params has a leading axis of independent inner problems (inner_loss their
            sum): A is block diagonal, and scalars are per problem.
        compile: True replays one recorded product in place of reverse passes, where enough products follow; the name
            of a backend of torch.compile ("inductor") compiles that recording. The result's `compiled` says what was
            done. Products with many vectors at once, and with Aᵀ where A is not symmetric, are not compiled.

    Raises:
        TypeError, ValueError: something is not of the form above (the message names the leaf and both forms), or no
            loss depends on params, or on hparams.
        SolverError: under on_failure="raise" of the solver, in place of the first two warnings.
        RuntimeError: the graph of an evaluated loss was freed before.
    Warns: HypergradientWarning where the adjoint system was not solved, where the result is not finite, where the inner
        problem is so far from its solution that the result means little, where tensors in it that require grad are in
        neither params nor hparams, where params have gradient hooks, or where a derivative is lost.
    Cost: one evaluation of each loss (two of an inner one that takes something out of the graph), the solver's
        products, and one last product with respect to params and hparams together, which also gives the true residual.
        The graph of ∇₁g (or Φ, F) is kept meanwhile. Besides the solver's own reads from the device, the checks behind
        the warnings read at most six numbers, more where there is a warning, and none with on_failure="ignore".
    Source: Grazzi et al. 2020, section 2; Pedregosa 2016, Algorithm 1.

    Example:
        w minimises ½(w − λ)², so f(λ) = ½λ² and ∇f(λ) = λ.

        >>> lam = torch.tensor(3.0, requires_grad=True)
        >>> result = grad(
        ...     lambda w, lam: 0.5 * w**2,
        ...     inner_loss=lambda w, lam: 0.5 * (w - lam) ** 2,
        ...     params=lam.detach(),
        ...     hparams=lam,
        ... )
        >>> result.grads
        tensor(3.)
    """
    problem = Problem(
        outer_loss,
        params=params,
        hparams=hparams,
        inner_loss=inner_loss,
        fp_map=fp_map,
        residual=residual,
        symmetric=symmetric,
        positive_definite=positive_definite,
        batch_dims=batch_dims,
        compile=compile,
    )
    solver = Auto() if solver is None else solver
    with random_state_kept_on_error(problem.leaves):
        result = hypergradient_of(problem, solver, x0)
        report(problem, result, "the adjoint system of the hypergradient", on_failure_of(solver))
    return result


def hypergradient_of(problem: Problem, solver: Solver, x0: Any, second: Solver | None = None) -> Hypergradient:
    """∇f(λ), without a word on how good it is; second: for where the solver ends as not definite, or DIVERGED."""
    if isinstance(solver, IterativeSolver) and solver.fixed_steps:
        problem.expected_products = solver.max_steps
    with problem.without_hooks_and_autocast() as hooked:
        problem.evaluate()
        operator = problem.operator().stacked() if problem.several else problem.operator()
        solution = solve(solver, operator, problem.b if second is None else problem.b.copy(), x0, problem.last_product)
        if second is not None and solution.status in (Status.NOT_POSITIVE_DEFINITE, Status.DIVERGED):
            solution = solve(second, operator, problem.b, None, problem.last_product)
        grads = problem.grads()
    return result_of(problem, solution, _torch.with_hooks(problem.differentiated, grads, hooked))


def report(problem: Problem, result: Hypergradient, what: str, on_failure: OnFailure) -> None:
    """Warn of, or raise for, what makes a result doubtful."""
    result.solution.report(what, on_failure)
    if on_failure == "ignore":
        return
    result.check_finite(on_failure)
    # One draw's residual does not say whether the mean is solved.
    if not problem.stochastic:
        problem.warn_of_lost(result.solution.value)
        result.warn_if_unsolved()
        if result.solution.ok:
            result.warn_if_inaccurate(problem.several)


def backward(
    outer_loss: Callable[[PyTree, PyTree], Tensor] | Tensor,
    *,
    params: PyTree,
    hparams: PyTree,
    inner_loss: Callable[[PyTree, PyTree], Tensor] | Tensor | None = None,
    fp_map: Callable[[PyTree, PyTree], PyTree] | PyTree | None = None,
    residual: Callable[[PyTree, PyTree], PyTree] | PyTree | None = None,
    solver: Solver | None = None,
    x0: PyTree | Recycled | None = None,
    symmetric: bool = False,
    positive_definite: bool = False,
    batch_dims: int = 0,
    compile: bool | str = False,
) -> Hypergradient:
    """As `grad`, and adds ∇f(λ) to .grad of hparams' leaves as loss.backward() does.

    Through hparams that are outputs of a network the gradient goes on to the network's parameters. Gradient hooks of
    hparams act once.

    Example:
        >>> lam = torch.tensor(3.0, requires_grad=True)
        >>> result = backward(
        ...     lambda w, lam: w**2 / 2, fp_map=lambda w, lam: (w + lam) / 2, params=lam.detach(), hparams=lam
        ... )
        >>> lam.grad
        tensor(3.)
    """
    hparams = list(hparams) if isinstance(hparams, Iterator) else hparams
    with random_state_kept_on_error(optree.tree_leaves(hparams)):
        result = grad(
            outer_loss,
            params=params,
            hparams=hparams,
            inner_loss=inner_loss,
            fp_map=fp_map,
            residual=residual,
            solver=solver,
            x0=x0,
            symmetric=symmetric,
            positive_definite=positive_definite,
            batch_dims=batch_dims,
            compile=compile,
        )
        accumulate(hparams, result.grads)
    return result


def accumulate(hparams: PyTree, grads: PyTree) -> None:
    """Add grads, on which hooks have acted, to .grad of hparams' leaves or what these were computed from."""
    leaves = flatten(hparams, "hparams", complex=True)[0]
    with _torch.outside_inference_mode(), _torch.hooks_suspended(leaves, retained=False):
        _autodiff.backward(leaves, flatten(grads, "grads", complex=True)[0])


def result_of(problem: Problem, solution: Solution, grads: Sequence[Tensor]) -> Hypergradient:
    """The result of a problem whose last product is done."""
    compiled = None if problem.linearisation is None else problem.linearisation.compiled
    assert problem.residual_norm is not None
    with without_autocast(problem.space.device):
        distance = inner_distance(problem.residual_norm, solution, problem.point, problem.fixed_point)
    return Hypergradient(
        grads=problem.tree_of(grads),
        adjoint=solution.value.tree,
        solution=solution,
        inner_residual=problem.residual_norm,
        inner_distance=distance,
        outer_value=problem.outer_value.detach(),
        problem=problem.without_graphs(),
        compiled=None if compiled is None else compiled.report,
        direct=problem.of_all_leaves(problem.direct),
        at_kink=problem.at_kink,
    )
