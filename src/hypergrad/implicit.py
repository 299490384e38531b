"""Implicit differentiation at a solution of the inner problem: as a hypergradient (grad, backward), or as a value.

    A = ∂₁F,   Aᵀ v = ∇₁E(w, λ),   ∇f(λ) = ∇₂E(w, λ) − ∂₂Fᵀ v

with F = ∇₁g for an inner loss g, and F = w − Φ for a fixed point map Φ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from . import _autodiff, operators
from ._autodiff import Linearisation, as_scalar
from ._implicit_function import Info, WarmStart
from ._solution import NOT_FINITE, OnFailure, Solution, SolverError, Status, finite, warn
from ._solution_maps import Phantom, argmin, fixed_point, linear_solve, root, solver
from ._vector import PyTree, Space, Vector, check_distinct, flatten
from .solvers import CG, GMRES, LinearSolver
from .solvers._solver import Solver, solve

__all__ = [
    # the hypergradient at a solution
    "grad",
    "backward",
    "Hypergradient",
    # the solution as a differentiable value
    "root",
    "fixed_point",
    "argmin",
    "linear_solve",
    "solver",
    "Phantom",
    "Info",
    "WarmStart",
]

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
        outer_value: E(w, λ).
    """

    grads: PyTree
    adjoint: PyTree
    solution: Solution
    inner_residual: Tensor
    inner_distance: Tensor
    outer_value: Tensor

    def check_finite(self, on_failure: OnFailure = "warn") -> None:
        """Warn of, or raise for, a hypergradient that is not finite though the adjoint is."""
        if self.solution.status is Status.NON_FINITE or finite(optree.tree_leaves(self.grads)):
            return
        if on_failure == "raise":
            raise SolverError(NOT_FINITE, self.solution)
        warn(NOT_FINITE)

    def warn_if_unsolved(self) -> None:
        """HypergradientWarning where params are too far from the inner solution for the result to mean much."""
        worst = float(self.inner_distance.max())
        if worst > UNSOLVED:
            away = f"an estimated {worst:.1%} (of their norm) or more away from" if math.isfinite(worst) else "0, not"
            warn(
                f"the inner problem is not solved: its residual is {float(self.inner_residual.max()):.2e}, and params "
                f"are {away} the solution, so the hypergradient means little. Run the inner solver "
                f"longer, or differentiate its steps instead (reverse)"
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
    x0: PyTree | None = None,
    symmetric: bool = False,
    positive_definite: bool = False,
    stochastic: bool = False,
    final_draws: int = 1,
    batch_dims: int = 0,
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
        x0: start for v, in params' structure: the last hypergradient's `adjoint`, say.
        symmetric: A of fp_map or residual is symmetric (that of inner_loss always is).
        positive_definite: A is symmetric positive definite (lets Dense use Cholesky).
        stochastic: the inner problem is drawn anew at every product; it must be a callable.
        final_draws: draws over which the last product is averaged, with stochastic.
        batch_dims: 1 where each leaf of params has a leading axis of independent inner problems (inner_loss their
            sum): A is block diagonal, and scalars are per problem.

    Returns:
        A Hypergradient.

    Raises:
        TypeError, ValueError: something is not of the form above; the message names the leaf and both forms.
        SolverError: the adjoint system was not solved, or the result is not finite, and the solver's on_failure is
            "raise".
        RuntimeError: the graph of an evaluated loss was freed before.
    Warns: HypergradientWarning where the adjoint system was not solved or the result is not finite
        (on_failure="warn"), or where the inner problem is so far from solved that the result means little.
    Cost: one evaluation of each loss, the solver's products, and one last product with respect to params and hparams
        together, which also gives the true residual. The graph of ∇₁g (or Φ, F) is kept meanwhile.
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
    if final_draws < 1 or (final_draws > 1 and not stochastic):
        raise ValueError(f"final_draws must be 1, or more with stochastic=True; got {final_draws}")
    if stochastic and not callable(inner.given):
        raise TypeError(f"a stochastic {inner.kind} is drawn anew at every product, so it must be a callable")
    if solver is None:
        solver = CG() if symmetric else GMRES()
    with random_state_kept_on_error(variables.given):
        if callable(outer_loss) and callable(inner.given):
            variables.detach()
        else:
            variables.keep_live()
        kept = None if stochastic else inner.linearise(variables)

        def linearise() -> Linearisation:
            return inner.linearise(variables) if kept is None else kept

        outer_value, b, direct = outer_gradients(outer_loss, variables)
        op = operators.adjoint(
            linearise,
            fixed_point=inner.kind == "fp_map",
            symmetric=symmetric,
            positive_definite=positive_definite,
            batch_dims=batch_dims,
        )
        last = LastProduct(linearise, inner.kind == "fp_map", final_draws)
        start = None if x0 is None else variables.space.vector(x0, "x0")
        solution = solve(solver, op, b, start, last)
        result = Hypergradient(
            grads=variables.outer_grads(_autodiff.add(direct, last.cross)),
            adjoint=solution.value.tree,
            solution=solution,
            inner_residual=last.residual,
            inner_distance=_distance(last.residual, solution, variables),
            outer_value=outer_value,
        )
        on_failure = solver.on_failure if isinstance(solver, LinearSolver) else "warn"
        result.solution.report("the adjoint system of the hypergradient", on_failure)
        if on_failure != "ignore":
            result.check_finite(on_failure)
        if on_failure != "ignore" and not stochastic:  # one draw's residual does not say whether the mean is solved
            result.warn_if_unsolved()
    return result


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


class Variables:
    """params and hparams as given, checked, and in the forms that losses and autograd want."""

    def __init__(self, params: PyTree, hparams: PyTree, batch_dims: int = 0):
        self.given, self.names, self._params_tree = flatten(params, "params")
        self._outer, self._outer_names, self._hparams_tree = flatten(hparams, "hparams")
        self.differentiated = check_hparams(self._outer, self._outer_names)
        self.space = Space(self._params_tree(self.given), "params", batch_dims)
        self.hparams = self._hparams_tree(self._outer)
        self.detach()

    def detach(self) -> None:
        """Params become new leaves of autograd, for callables."""
        self.leaves = [leaf.detach().requires_grad_() for leaf in self.given]
        self.params = self._params_tree(self.leaves)

    def keep_live(self) -> None:
        """Params stay the tensors that evaluated losses were computed from."""
        for leaf, name in zip(self.given, self.names, strict=True):
            if not leaf.requires_grad:
                raise ValueError(f"{name} does not require grad, so no evaluated loss has a derivative in it")
        if {id(leaf) for leaf in self.given} & {id(leaf) for leaf in self._outer}:
            raise ValueError("with evaluated losses no tensor may be in params and in hparams; pass callables")
        _check_independent([*self.given, *self._outer], [*self.names, *self._outer_names])
        self.leaves = self.given
        self.params = self._params_tree(self.leaves)

    def check_reached(self, values: list[Tensor], name: str) -> None:
        """Raise where a callable used the live params that it closes over instead of those that it was given."""
        live = [leaf for leaf in self.given if leaf.requires_grad]
        if live and not _autodiff.depends(values, self.leaves) and _autodiff.depends(values, live):
            raise ValueError(
                f"{name} does not use the params that it is called with, but the live ones, so its derivative would "
                f"count as zero: use its argument (torch.func.functional_call), or pass evaluated losses"
            )

    def outer_grads(self, grads: list[Tensor]) -> PyTree:
        """Gradients of the differentiated leaves in hparams' structure; zeros for leaves that do not require grad."""
        each = iter(grads)
        return self._hparams_tree(
            [next(each) if leaf.requires_grad else torch.zeros_like(leaf) for leaf in self._outer]
        )


def check_hparams(leaves: list[Tensor], names: list[str]) -> list[Tensor]:
    """The leaves that require grad. Raises ValueError for none, for one tensor twice, for one computed from another."""
    check_distinct(leaves, names)
    _check_independent(leaves, names)
    differentiated = [leaf for leaf in leaves if leaf.requires_grad]
    if not differentiated:
        raise ValueError("none of hparams requires grad; call requires_grad_() on those to differentiate")
    return differentiated


def _check_independent(leaves: list[Tensor], names: list[str]) -> None:
    pair = None if all(leaf.is_leaf for leaf in leaves) else _autodiff.computed_from(leaves)
    if pair is not None:
        late, early = (names[i] for i in pair)
        raise ValueError(
            f"{late} was computed from {early}, so what reaches {early} through {late} would be counted twice: detach "
            f"{late} (before evaluating the losses), or leave {early} out"
        )


@dataclass(frozen=True)
class InnerProblem:
    """The one of inner_loss, fp_map and residual that was given."""

    kind: str
    given: Any

    @staticmethod
    def of(inner_loss: Any, fp_map: Any, residual: Any) -> InnerProblem:
        every = {"inner_loss": inner_loss, "fp_map": fp_map, "residual": residual}
        given = {kind: value for kind, value in every.items() if value is not None}
        if len(given) != 1:
            raise TypeError(f"pass exactly one of inner_loss, fp_map and residual; got {list(given) or 'none'}")
        return InnerProblem(*given.popitem())

    def linearise(self, variables: Variables) -> Linearisation:
        """The graph of ∇₁g, Φ or F at params and hparams."""
        message = "inner_loss does not depend on params; was it computed under no_grad, or from other tensors?"
        with torch.enable_grad():
            if isinstance(self.given, operators.GaussNewton):
                if self.kind != "inner_loss":
                    raise TypeError(f"GaussNewton is an inner_loss, and was passed as {self.kind}")
                given = (variables.params, variables.hparams, variables.leaves, variables.differentiated)
                return self.given.linearise(*given, message)
            value = self.given(variables.params, variables.hparams) if callable(self.given) else self.given
            if self.kind == "inner_loss":
                loss = as_scalar(value, "inner_loss")
                outputs = _autodiff.grad([loss], variables.leaves, create_graph=True, must_reach=message)
            else:
                outputs = variables.space.check(value, f"the value of {self.kind}")
                if callable(self.given):
                    variables.check_reached(outputs, self.kind)
        return Linearisation(outputs, variables.leaves, variables.differentiated)


def outer_gradients(outer_loss: Any, variables: Variables) -> tuple[Tensor, Vector, list[Tensor]]:
    """E, ∇₁E as a vector in memory of its own, and ∇₂E for the differentiated hparams."""
    with torch.enable_grad():
        value = outer_loss(variables.params, variables.hparams) if callable(outer_loss) else outer_loss
    loss = as_scalar(value, "outer_loss")
    if callable(outer_loss):
        variables.check_reached([loss], "outer_loss")
    live = variables.leaves is variables.given
    if live and not callable(outer_loss) and not _autodiff.depends([loss], variables.leaves):
        raise ValueError("outer_loss does not depend on params; was it computed from other tensors, or under no_grad?")
    retain = live or not all(leaf.is_leaf for leaf in variables.differentiated)
    inputs = [*variables.leaves, *variables.differentiated]
    grads = _autodiff.grad([loss], inputs, retain_graph=retain, materialize=False)
    count = len(variables.leaves)
    return loss.detach(), variables.space.pack(grads[:count]).own(), grads[count:]


class LastProduct:
    """The last product, with respect to params and hparams at once: v ↦ Aᵀv; keeps ±∂₂(·)ᵀv and the norm of F."""

    def __init__(self, linearise: Callable[[], Linearisation], fixed_point: bool, draws: int):
        self.linearise, self.fixed_point, self.draws = linearise, fixed_point, draws

    def __call__(self, v: Vector) -> Vector:
        image, cross = self._draw(v)
        for _ in range(self.draws - 1):
            new_image, new_cross = self._draw(v)
            image, cross = image + new_image, _autodiff.add(cross, new_cross)
        scale = 1 / self.draws
        image = image * scale if self.draws > 1 else image
        self.cross = _autodiff.scaled(cross, scale if self.fixed_point else -scale)
        return v - image if self.fixed_point else image

    def _draw(self, v: Vector) -> tuple[Vector, list[Tensor]]:
        pack, linearisation = v.space.pack, self.linearise()
        pulled, cross = linearisation.vjp_both(v.leaves, retain_graph=False)
        outputs = pack([y.detach() for y in linearisation.outputs])
        inputs = pack([w.detach() for w in linearisation.params])
        self.residual = (inputs - outputs if self.fixed_point else outputs).norm()
        return pack(pulled), cross


def _distance(residual: Tensor, solution: Solution, variables: Variables) -> Tensor:
    size = variables.space.pack([leaf.detach() for leaf in variables.given]).norm()
    distance = residual / size * (solution.value / solution.rhs_norm).norm()
    unknown = (residual == 0) | (solution.rhs_norm == 0) | ~torch.isfinite(solution.residual_norm)
    return torch.where(unknown, 0.0, distance)


@contextmanager
def random_state_kept_on_error(leaves: Iterable[Any]) -> Iterator[None]:
    """Put torch's random state, on the CPU and where these leaves are, back if an error leaves a half-done call."""
    devices = {leaf.device for leaf in leaves if isinstance(leaf, Tensor) and leaf.device.type == "cuda"}
    state = torch.get_rng_state()
    cuda = {device: torch.cuda.get_rng_state(device) for device in devices}
    try:
        yield
    except BaseException:
        torch.set_rng_state(state)
        for device, kept in cuda.items():
            torch.cuda.set_rng_state(kept, device)
        raise
