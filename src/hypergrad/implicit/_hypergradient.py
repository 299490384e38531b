"""The hypergradient at a solution of the inner problem, by implicit differentiation.

    A = ∂₁F,   Aᵀ v = ∇₁E(w, λ),   ∇f(λ) = ∇₂E(w, λ) − ∂₂Fᵀ v

with F = ∇₁g for an inner loss g, and F = w − Φ for a fixed point map Φ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import optree
from torch import Tensor

from .. import _autodiff
from .._solution import (
    NOT_FINITE,
    InaccurateHypergradient,
    NotFinite,
    OnFailure,
    Solution,
    SolverError,
    Status,
    UnsolvedInnerProblem,
    finite,
    warn,
)
from .._vector import PyTree, check_distinct, flatten
from ..operators import GaussNewton
from ..solvers import CG, GMRES, LinearSolver, Recycled
from ..solvers._solver import (
    Real,
    Solver,
    anywhere,
    begin,
    is_start,
    length,
    precise,
    ratio,
    read,
    solve,
    start_of,
    where,
)
from ._correction import Correction, correct
from ._goal import Refine, reach
from ._problem import InnerProblem, LastProduct, Point, Problem, Products, Variables, random_state_kept_on_error

UNSOLVED = 0.1  # estimated relative distance from the inner solution at which a warning is due


@dataclass(frozen=True)
class Hypergradient:
    """A hypergradient and how good it is.

    Attributes:
        grads: ∇f(λ), in the structure of hparams; zeros for a leaf that does not require grad or reaches nothing.
        adjoint: v, in the structure of params: the warm start (x0=) of the next outer step.
        solution: how the adjoint system was solved: status, steps, true residual.
        inner_residual: ‖∇₁g‖ or ‖w − Φ(w)‖ or ‖F‖ at the given params: 0-d, or [B]. Known at no extra cost.
        inner_distance: ‖F‖ ‖v‖ / (‖∇₁E‖ ‖w‖), an estimate of the relative distance of w from the inner solution, with
            ‖v‖ / ‖∇₁E‖ standing for ‖A⁻¹‖ (of which it is a lower bound): 0-d, or [B].
        outer_value: E(w, λ); with polish E − vᵀF, which is f(λ) up to the square of the errors of w and v.
        problem: what it is the hypergradient of: the losses where they were given as functions, and w and λ in the
            user's own memory, without graphs. `diagnostics.check` reads it.
        relative_error: an estimate of ‖grads − ∇f(λ)‖ / ‖∇f(λ)‖, with hypergradient_rtol or polish, else None. With
            polish the square of that of the uncorrected one, which tells the order of magnitude only.
        compiled: with compile, how the products were done, and why: the times that were measured, or what stood in the
            way.
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

    def check_finite(self, on_failure: OnFailure = "warn") -> None:
        """Warn of, or raise for, a hypergradient that is not finite though the adjoint is."""
        if finite(optree.tree_leaves(self.grads)) or self.solution.status is Status.NON_FINITE:
            return
        if on_failure == "raise":
            raise SolverError(NOT_FINITE, self.solution)
        warn(NOT_FINITE, NotFinite)

    def check_accurate(self, rtol: float, on_failure: OnFailure, polished: bool, refined: bool) -> None:
        """Warn of, or raise for, a hypergradient whose estimated error is above the goal."""
        error = math.inf if self.relative_error is None else float(self.relative_error)
        if error <= rtol:
            return
        left = ["refine= got no nearer in up to 20 calls, so give it more to do" if refined else "pass refine="]
        left += ["solve the inner problem further", *([] if polished else ["add polish=True"])]
        text = (
            f"the hypergradient has an estimated relative error of {error:.1e} instead of {rtol:.1e}: the inner "
            f"problem is not solved well enough (residual {float(self.inner_residual.max()):.1e}), or the linear "
            f"systems are not; {', '.join(left[:-1])}, or {left[-1]}"
        )
        if on_failure == "raise":
            raise SolverError(text, self.solution)
        warn(text, InaccurateHypergradient)

    def warn_if_unsolved(self) -> None:
        """UnsolvedInnerProblem where params are too far from the inner solution for the result to mean much."""
        worst = read(self.inner_distance) * _unfinished(self.solution)
        worst = float(worst.max() if isinstance(worst, Tensor) else worst)
        if worst > UNSOLVED:
            away = f"an estimated {worst:.1%} (of their norm) or more away from" if math.isfinite(worst) else "0, not"
            warn(
                f"the inner problem is not solved: its residual is {float(self.inner_residual.max()):.2e}, and params "
                f"are {away} the solution, so the hypergradient means little. Run the inner solver "
                f"longer, or differentiate its steps instead (reverse); hg.diagnostics.check estimates the error",
                UnsolvedInnerProblem,
            )


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
    stochastic: bool = False,
    final_draws: int = 1,
    batch_dims: int = 0,
    polish: bool = False,
    hypergradient_rtol: float | None = None,
    refine: Refine = False,
    compile: bool | str = False,
    products: Products = "reverse",
) -> Hypergradient:
    """Hypergradient ∇f(λ) of f(λ) = E(w(λ), λ) at a solution w of the inner problem. Changes nothing of the user's.

        Aᵀ v = ∇₁E(w, λ),      ∇f(λ) = ∇₂E(w, λ) − ∂₂Fᵀ v

    Losses and maps are callables of (params, hparams), or values that were evaluated already on live tensors
    (model.parameters()); then params must be the very tensors that entered them, and the graph of the inner value is
    freed. Exactly one of inner_loss, fp_map and residual says what the inner problem is.

    Args:
        outer_loss: E, scalar.
        params: w, a tensor or any pytree of floating point tensors, at (or near) the solution.
        hparams: λ, likewise; at least one leaf requires grad. Leaves may be outputs of a network.
        inner_loss: g, scalar, minimised by w: A = ∇²₁₁g.
        fp_map: Φ, of params' structure, w = Φ(w, λ): A = I − ∂₁Φ.
        residual: F, of params' structure, F(w, λ) = 0: A = ∂₁F.
        solver: a linear solver from hg.solvers, or a function (op, b, x0) of Vectors. Default: CG() where the system
            is symmetric, else GMRES().
        x0: start for v, in params' structure: the last hypergradient's `adjoint`, say; or a `solvers.Recycled`, kept
            from one outer step to the next.
        symmetric: A of fp_map or residual is symmetric (that of inner_loss always is).
        positive_definite: A is symmetric positive definite (lets Dense use Cholesky).
        stochastic: the inner problem is drawn anew at every product; it must be a callable.
        final_draws: draws over which the last product is averaged, with stochastic.
        batch_dims: 1 where each leaf of params has a leading axis of independent inner problems (inner_loss their
            sum): A is block diagonal, and scalars are per problem.
        polish: add the first-order correction for the errors of w and v (module `_correction`): what remains is of the
            order of their squares, in grads and in outer_value.
        hypergradient_rtol: aim at ‖error‖ ≤ hypergradient_rtol · ‖∇f(λ)‖, errors of w and v together, both estimated by
            what they change in the hypergradient. v is solved for until a tenfold smaller residual changes the
            hypergradient by no more than that; the solver's own tolerance is not used, its max_steps is. Then the
            effect of the inner residual is estimated, with systems solved to a tenth.
        refine: how to go on where that effect is too large: (params, hparams) ↦ better params, called up to 20 times,
            or True for Newton steps with this solver. The params of the result are `result.problem.params`; the given
            ones stay as they are. False leaves it at a warning.
        compile: products with Aᵀ in a faster way than by reverse passes. True: the first product is recorded and
            simplified to the operations that depend on v; from the third on, products are done by these operations (a
            linear model's by blocks of rows of its data, where these are large), by inductor's code for them, or by
            reverse passes, whichever is the fastest. That is measured once and kept for
            later outer steps of the same form and about the same size, whatever the closures and numbers: it takes
            milliseconds, and seconds where inductor is tried (products over 50 µs). "recorded": those operations,
            unmeasured; any other name: the backend of torch.compile that compiles them. A warning says why where a
            backward pass cannot be recorded: it draws random numbers, writes through views, or leaves torch. Products
            with many vectors at once, or with A of a system that is not symmetric, are as without it.
        products: how a symmetric A is applied: "reverse", Aᵀv through the graph of ∇₁g (or Φ, F); "forward", Av
            through a second graph that is built from the first and kept beside it (about its size again), after one
            product of each that must agree; "measured", the faster one by the time of two more of each, which
            `result.problem.products` names for the outer steps after. Forward took .98 (perceptron) to 1.5
            (convolutions, batch norm) of the time of reverse.

    Returns:
        A Hypergradient.

    Raises:
        TypeError, ValueError: something is not of the form above; the message names the leaf and both forms.
        SolverError: the adjoint system was not solved, or the result is not finite, and the solver's on_failure is
            "raise".
        RuntimeError: the graph of an evaluated loss was freed before.
    Warns: HypergradientWarning where the adjoint system was not solved or the result is not finite
        (on_failure="warn"), or where the inner problem is so far from solved that the result means little, or where
        hypergradient_rtol is missed.
    Cost: one evaluation of each loss, the solver's products, and one last product with respect to params and hparams
        together, which also gives the true residual. The graph of ∇₁g (or Φ, F) is kept meanwhile. polish: two more
        systems, one of them with A, and about four reverse passes. hypergradient_rtol: one product with respect to
        hparams for each stage of the tolerance, and once for each refinement what polish costs, at low accuracy.
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
    variables = Variables(params, hparams, batch_dims)
    check_distinct(variables.given, variables.names)
    inner = InnerProblem.of(inner_loss, fp_map, residual)
    symmetric = symmetric or positive_definite or inner.kind == "inner_loss"
    _check_options(inner, outer_loss, stochastic, final_draws, polish, hypergradient_rtol, refine)
    _check_compile(compile, inner, stochastic)
    _check_products(products, symmetric, stochastic or bool(compile) or isinstance(inner.given, GaussNewton))
    if solver is None:
        solver = CG() if symmetric else GMRES()
    with random_state_kept_on_error(variables.given):
        if not (callable(outer_loss) and callable(inner.given)):
            variables.keep_live()
        tags = (symmetric, positive_definite, stochastic, batch_dims, compile, products)
        problem = Problem(outer_loss, inner, params, hparams, *tags)
        point = Point(problem, variables, keep=polish or hypergradient_rtol is not None)
        start = start_of(x0, variables.space)
        correction = None
        if hypergradient_rtol is not None:
            begun = begin(start, point.op, point.b)
            point, solution, last, correction = reach(hypergradient_rtol, point, solver, begun, polish, refine)
            if is_start(start):
                start.keep(solution.value)
        else:
            last = point.last_product(final_draws, retain_graph=polish)
            solution = solve(solver, point.op, point.b, start, last)
            if polish:
                correction = correct(point, solution.value, solver)
        result = _result(point, solution, last, correction, polish)
        on_failure = solver.on_failure if isinstance(solver, LinearSolver) else "warn"
        result.solution.report("the adjoint system of the hypergradient", on_failure)
        if polish and correction is not None:
            correction.report(on_failure)
        if on_failure != "ignore":
            result.check_finite(on_failure)
            if hypergradient_rtol is not None:
                result.check_accurate(hypergradient_rtol, on_failure, polish, bool(refine))
            elif not stochastic:  # one draw's residual does not say whether the mean is solved
                result.warn_if_unsolved()
    return result


def _check_options(
    inner: InnerProblem,
    outer_loss: Any,
    stochastic: bool,
    final_draws: int,
    polish: bool,
    goal: float | None,
    refine: Refine,
) -> None:
    estimates = polish or goal is not None
    if final_draws < 1 or (final_draws > 1 and not stochastic):
        raise ValueError(f"final_draws must be 1, or more with stochastic=True; got {final_draws}")
    if stochastic and not callable(inner.given):
        raise TypeError(f"a stochastic {inner.kind} is drawn anew at every product, so it must be a callable")
    if stochastic and estimates:
        raise ValueError("polish and hypergradient_rtol estimate the error of one problem, not of one drawn anew")
    if estimates and isinstance(inner.given, GaussNewton):
        raise TypeError(
            "polish and hypergradient_rtol need the Hessian, and GaussNewton puts another matrix in its place"
        )
    if not (isinstance(refine, bool) or callable(refine)):
        raise TypeError(f"refine must be True, False or a function of (params, hparams), got {refine!r}")
    if refine and goal is None:
        raise ValueError("refine goes on until a goal is reached: pass hypergradient_rtol as well")
    if refine and not (callable(inner.given) and callable(outer_loss)):
        raise TypeError(f"refine evaluates {inner.kind} and outer_loss at other params, so both must be callables")


def _check_products(products: Any, symmetric: bool, other: bool) -> None:
    if products not in ("reverse", "forward", "measured"):
        raise ValueError(f'products must be "reverse", "forward" or "measured", got {products!r}')
    if products == "reverse":
        return
    if not symmetric:
        raise TypeError(
            f"products={products!r} takes Av for Aᵀv, and A is not declared symmetric; if it is, pass symmetric=True"
        )
    if other:
        raise TypeError(f"products={products!r} is not for stochastic, GaussNewton or compiled products")


def _check_compile(compile: bool | str, inner: InnerProblem, stochastic: bool) -> None:
    if not isinstance(compile, (bool, str)):
        raise TypeError(f"compile must be True, False or the name of a backend, got {compile!r}")
    if compile and (stochastic or isinstance(inner.given, GaussNewton)):
        raise TypeError(f"compile needs an {inner.kind} that is neither stochastic nor GaussNewton")


def _result(
    point: Point, solution: Solution, last: LastProduct, correction: Correction | None, polish: bool
) -> Hypergradient:
    variables, grads, outer_value, error = point.variables, _autodiff.add(point.direct, last.cross), point.outer, None
    if correction is not None:
        error = correction.relative.square() if polish else correction.relative
    if correction is not None and polish:
        grads, outer_value = correction.corrected.leaves, correction.value
    return Hypergradient(
        grads=variables.outer_grads(grads),
        adjoint=solution.value.tree,
        solution=solution,
        inner_residual=last.residual,
        inner_distance=inner_distance(last.residual, solution, variables),
        outer_value=outer_value.detach(),
        problem=point.problem.kept(variables),
        relative_error=error,
        compiled=None if point.compiled is None else point.compiled.report,
    )


def backward(
    outer_loss: Callable[[PyTree, PyTree], Tensor] | Tensor, *, hparams: PyTree, **options: Any
) -> Hypergradient:
    """As `grad`, and adds ∇f(λ) to .grad of hparams' leaves as loss.backward() does.

    Through hparams that are outputs of a network the gradient goes on to the network's parameters.

    Args: those of `grad`.

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
        result = grad(outer_loss, hparams=hparams, **options)
        accumulate(hparams, result.grads)
    return result


def accumulate(hparams: PyTree, grads: PyTree) -> None:
    """Add grads to .grad of hparams' leaves, or of what these were computed from, as backward() does."""
    _autodiff.backward(flatten(hparams, "hparams")[0], flatten(grads, "grads")[0])


def _unfinished(solution: Solution) -> Real:
    """‖A⁻¹b‖ / ‖v‖ where a solve stopped early, by going on at its own rate: 1 + ρ / (1 − ρ) · ‖r‖ / ‖v‖.

    Few steps on an ill-conditioned system leave a short v, which says nothing of ‖A⁻¹‖; their slow progress does.
    """
    left, size = read(solution.residual_norm), read(solution.rhs_norm)
    if not anywhere(left > 0.01 * size):
        return 1.0  # what is left would make v about a hundredth longer
    rate = solution._growth
    # A rate that rounding does not tell from 1 (or that of no step at all) says nothing.
    told = rate < 1 - 100 * solution.value.space.eps
    rest = ratio(rate * left, (1 - rate) * length(solution.value), told)
    return 1 + where(told & (rest < math.inf), rest, 0.0)


def inner_distance(residual: Tensor, solution: Solution, variables: Variables) -> Tensor:
    space, f = variables.space, read(residual)
    size = length(space.pack([leaf.detach() for leaf in variables.given]))
    norm2, b = read(solution.value.dot(solution.value)), read(solution.rhs_norm)
    stretch = math.sqrt(norm2) / b if precise(norm2, space) and b else length(solution.value / solution.rhs_norm)
    known = (f != 0) & (b != 0) & (read(solution.residual_norm) < math.inf)
    return space.tensor(ratio(f * stretch, size, known))
