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
    """A hypergradient, its adjoint, and estimates of their accuracy.

    Attributes:
        grads: ∇f(λ), in hparams' structure; zeros for a leaf that does not require grad or that no loss depends on.
        adjoint: v, in params' structure; pass it as x0= to warm-start the next outer step.
        solution: how the adjoint system was solved: status, steps, true residual.
        inner_residual: ‖∇₁g‖, ‖w − Φ(w)‖ or ‖F‖ at the given params: 0-d, or [B]. It costs nothing extra.
        inner_distance: ‖F‖ ‖v‖ / (‖∇₁E‖ ‖w‖), an estimate of the relative distance of w from the inner solution; it
            uses ‖v‖ / ‖∇₁E‖, a lower bound of ‖A⁻¹‖, in place of ‖A⁻¹‖: 0-d, or [B]. For a fixed point, the rounding
            error of w − Φ(w) is added to ‖F‖.
        outer_value: E(w, λ). After `polish` E − vᵀF, which differs from f(λ) by the square of the errors of w and v.
        problem: the problem that was differentiated, for `diagnostics.check`, `polish` and `refine`. It holds w and λ
            without graphs, in the user's memory (not copied), and the losses that were given as functions.
        relative_error: an estimate of ‖grads − ∇f(λ)‖ / ‖∇f(λ)‖ from `polish` or `refine`; else None. `polish` squares
            the estimate for the uncorrected hypergradient, so it gives only the order of magnitude.
        compiled: how the products were computed, and why; None without compile=.
        direct: ∇₂E(w, λ), which is part of grads, leaf by leaf; None for a leaf, or an empty list, means zeros.
        at_kink: ‖∇₁g‖ over the entries of w that are exactly 0; None if the problem has no inner_loss.

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
        """Warn or raise if the hypergradient is not finite although the adjoint is."""
        if finite(optree.tree_leaves(self.grads)) or self.solution.status is Status.NON_FINITE:
            return
        if on_failure == "raise":
            raise SolverError(NOT_FINITE, self.solution)
        warn(NOT_FINITE, NotFinite)

    def warn_if_unsolved(self) -> None:
        """Warn with UnsolvedInnerProblem if params are far from the inner solution, or at a kink of the inner loss."""
        if warned_of_kink(self.at_kink, self.inner_residual, self.inner_distance, self.solution.value.space.eps):
            return
        found = _torch.numbers(self.inner_distance)
        distances = found if isinstance(found, list) else [found]
        for i, (theta, _) in enumerate(self.solution.remaining):
            distances[i] *= 1 + theta if theta < math.inf else 1
        warn_if_unsolved(max(distances, default=0.0), self.inner_residual)

    def adjoint_error(self, stacked: bool = False) -> tuple[float, float]:
        """Estimate ‖grads − ∇f(λ)‖ / ‖∇f(λ)‖ from the solver's residual; also return the rate at which that falls.

        The estimate (θ, see `Solution.remaining`) takes the error of v to be θv, so the error of grads is θ times
        their implicit part −∂₂Fᵀv. With stacked=True (several outer losses), the worst of them counts.
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
            return _effect(theta, grads, cross), rate
        return max(_effect(theta, [g[i] for g in grads], [c[i] for c in cross]) for i, theta in enumerate(thetas)), rate

    def warn_if_inaccurate(self, stacked: bool = False) -> None:
        """Warn with InaccurateHypergradient if the solver did all its steps and these were too few.

        A solver that stagnated fails only if its relative residual exceeds √eps of the dtype.
        """
        solution = self.solution
        enough = solution.value.space.eps**0.5
        if solution.status is Status.STAGNATED and bool((solution.relative_residual > enough).any()):
            solution.report("the adjoint system of the hypergradient", "warn")
        if solution.status not in (Status.COMPLETED, Status.MAX_STEPS):
            return
        warn_of_few_steps("the hypergradient", solution, *self.adjoint_error(stacked))


def _effect(theta: float, grads: list[Tensor], cross: list[Tensor]) -> float:
    """θ‖c‖ / ‖g + θc‖ for g = grads and c = cross."""
    # Scaled, because squares of small numbers underflow.
    top = max(float(full(x.abs().sum())) for x in [*grads, *cross]) or 1.0
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
    """Hypergradient ∇f(λ) of f(λ) = E(w(λ), λ) at a solution w of the inner problem. It changes none of its arguments.

        Aᵀ v = ∇₁E(w, λ),      ∇f(λ) = ∇₂E(w, λ) − ∂₂Fᵀ v

    Losses and maps are callables of (params, hparams), or values already computed from params and hparams. In the
    latter case params must be the very tensors that the values were computed from, and the graph of the inner value is
    freed. Exactly one of inner_loss, fp_map and residual defines the inner problem.

    Args:
        outer_loss: E, scalar.
        params: w, a tensor or any pytree of floating point tensors, at (or near) the solution. If some leaves require
            grad, the others are frozen: they are constants, not unknowns.
        hparams: λ, a tensor or any pytree; at least one leaf requires grad. Leaves may be outputs of a network.
        inner_loss: g, scalar, minimised by w: A = ∇²₁₁g. It may be an `operators.GaussNewton`.
            Whatever inner_loss, fp_map or residual takes out of the graph (loss.detach() as the input of a weighting
            network, .data, .item(), no_grad) counts as a constant. If a callable loses part of its derivative that
            way, a LostDerivative warning says how much. Evaluated losses and outer_loss lose it without a warning,
            but `diagnostics.check` detects it.
        fp_map: Φ, returns params' structure, w = Φ(w, λ): A = I − ∂₁Φ.
        residual: F, returns params' structure, F(w, λ) = 0: A = ∂₁F. All three may be an `operators.Stochastic`.
        solver: a linear solver from hg.solvers, or a function (op, b, x0) of Vectors. Default: `solvers.Auto()`.
        x0: start for v, in params' structure, for example the previous hypergradient's `adjoint`; or one
            `solvers.Recycled` that is passed at every outer step.
        symmetric: whether A of fp_map or residual is symmetric (A of inner_loss always is).
        positive_definite: whether A of fp_map or residual is symmetric positive definite.
        batch_dims: 1 if each leaf of params has a leading axis of independent inner problems (inner_loss is their
            sum): A is block diagonal, and the solver's scalars are computed for each problem.
        compile: True records one product and replays it in place of reverse passes, if enough products follow; the
            name of a torch.compile backend ("inductor") compiles the recording. The result's `compiled` says what was
            done. Products with many vectors at once, and with Aᵀ if A is not symmetric, are not compiled.

    Raises:
        TypeError, ValueError: an argument does not have the form above (the message names the leaf, what was expected
            and what was given), or no loss depends on params, or on hparams.
        SolverError: with on_failure="raise" in the solver, in place of the first two warnings.
        RuntimeError: the graph of an evaluated loss was freed before.
    Warns: HypergradientWarning if the adjoint system was not solved, the result is not finite, params are so far from
        the inner solution that the result means little, the inner problem uses tensors that require grad and are in
        neither params nor hparams, params have gradient hooks, or a derivative is lost.
    Cost: one evaluation of each loss (two of an inner loss that takes something out of the graph), the solver's
        products, and one last product with respect to params and hparams together, which also gives the true residual.
        The graph of ∇₁g (or Φ, F) is kept until then. Besides the solver's own reads from the device, the checks
        behind the warnings read at most six numbers, more if they warn, and none with on_failure="ignore".
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


def hypergradient_of(problem: Problem, solver: Solver, x0: Any, backup: Solver | None = None) -> Hypergradient:
    """∇f(λ), without warnings; `backup` solves again if the solver ends as NOT_POSITIVE_DEFINITE or DIVERGED."""
    if isinstance(solver, IterativeSolver) and solver.fixed_steps:
        problem.expected_products = solver.max_steps
    with problem.without_hooks_and_autocast() as hooked:
        problem.evaluate()
        operator = problem.operator().stacked() if problem.several else problem.operator()
        solution = solve(solver, operator, problem.b if backup is None else problem.b.copy(), x0, problem.last_product)
        if backup is not None and solution.status in (Status.NOT_POSITIVE_DEFINITE, Status.DIVERGED):
            solution = solve(backup, operator, problem.b, None, problem.last_product)
        grads = problem.grads()
    return result_of(problem, solution, _torch.with_hooks(problem.differentiated, grads, hooked))


def report(problem: Problem, result: Hypergradient, what: str, on_failure: OnFailure) -> None:
    """Warn or raise if the result is inaccurate; `what` names the linear system in messages."""
    result.solution.report(what, on_failure)
    if on_failure == "ignore":
        return
    result.check_finite(on_failure)
    # The residual of one draw does not show whether the mean is solved.
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
    """As `grad`, but also adds ∇f(λ) to .grad of hparams' leaves, as loss.backward() does.

    If hparams are outputs of a network, the gradient flows on to the network's parameters. Gradient hooks of hparams
    act once.

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
    """Add grads to .grad of hparams' leaves, or of what these were computed from; hooks have acted on them already."""
    leaves = flatten(hparams, "hparams", complex=True)[0]
    with _torch.outside_inference_mode(), _torch.hooks_suspended(leaves, retained=False):
        _autodiff.backward(leaves, flatten(grads, "grads", complex=True)[0])


def result_of(problem: Problem, solution: Solution, grads: Sequence[Tensor]) -> Hypergradient:
    """The Hypergradient of a problem, after its last product."""
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
