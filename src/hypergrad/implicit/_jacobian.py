"""The Jacobian of several outer losses: one graph, and one solve for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _autodiff, operators
from .._vector import PyTree, Space, Vector, check_distinct
from ..solvers import GMRES, BlockCG, LinearSolver, Recycled
from ..solvers._solver import Solver, solve, start_of
from ._hypergradient import Hypergradient, inner_distance
from ._problem import InnerProblem, LastProduct, Problem, Variables, norm_alone, random_state_kept_on_error


def jacobian(
    outer_losses: Callable[[PyTree, PyTree], Tensor] | Tensor,
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
) -> Hypergradient:
    """Hypergradients of k outer losses on one inner problem: the validation loss of each group, several objectives.

        Aᵀ V = (∇₁E₁, …, ∇₁E_k),      ∇fᵢ(λ) = ∇₂Eᵢ(w, λ) − ∂₂Fᵀ vᵢ

    The systems share A: one graph serves all, products are k at once, and BlockCG searches in one space for all of
    them, which takes fewer steps than k solves do.

    Args:
        outer_losses: E(params, hparams) ↦ [k], or that tensor, evaluated on live tensors.
        params, hparams, inner_loss, fp_map, residual, symmetric, positive_definite: as in `grad`.
        solver: as in `grad`; it sees `op.stacked()`, k systems with the same A. Default: BlockCG() where A is
            symmetric, else GMRES().
        x0: start for V: the last result's `adjoint` (a leading axis k in every leaf of params), or a `Recycled`.

    Returns:
        A Hypergradient whose grads and adjoint have a leading axis k in every leaf. outer_value, inner_distance and
        what `solution` tells are [k].

    Raises: as `grad`; ValueError for losses that are not of shape [k].
    Cost: one evaluation of the losses and of the inner problem, the solver's products, k passes for ∇E and k for the
        last products, all of them vectorised where torch can. k vectors for each that the solver keeps.
    Source: as `grad`; O'Leary 1980 for the solve.

    Example:
        w = λ, so the Jacobian of (w₁², w₁w₂) is ((2λ₁, 0), (λ₂, λ₁)).

        >>> lam = torch.tensor([3.0, 5.0], requires_grad=True)
        >>> jacobian(
        ...     lambda w, lam: torch.stack([w[0] ** 2, w[0] * w[1]]),
        ...     inner_loss=lambda w, lam: ((w - lam) ** 2).sum(),
        ...     params=lam.detach(),
        ...     hparams=lam,
        ... ).grads
        tensor([[6.0000, 0.0000],
                [5.0000, 3.0000]])
    """
    variables = Variables(params, hparams)
    check_distinct(variables.given, variables.names)
    inner = InnerProblem.of(inner_loss, fp_map, residual)
    symmetric = symmetric or positive_definite or inner.kind == "inner_loss"
    fixed_point = inner.kind == "fp_map"
    if solver is None:
        solver = BlockCG() if symmetric else GMRES()
    with random_state_kept_on_error(variables.given):
        if not (callable(outer_losses) and callable(inner.given)):
            variables.keep_live()
        linearisation = inner.linearise(variables)
        norm = norm_alone(linearisation, variables.space, fixed_point)
        values, b, direct = _outer_gradients(outer_losses, variables)
        op = operators.adjoint(
            lambda: linearisation,
            fixed_point=fixed_point,
            symmetric=symmetric,
            positive_definite=positive_definite,
            batch_dims=0,
        )
        last = LastProduct(lambda: linearisation, fixed_point, norm=norm, stacked=True)
        solution = solve(solver, op.stacked(), b, start_of(x0, b.space), last)
        result = Hypergradient(
            grads=variables.outer_grads(_autodiff.add(direct, last.cross), len(values)),
            adjoint=solution.value.tree,
            solution=solution,
            inner_residual=last.residual,
            inner_distance=inner_distance(last.residual, solution, variables),
            outer_value=values.detach(),
            problem=Problem(outer_losses, inner, params, hparams, symmetric, positive_definite).kept(variables),
        )
        on_failure = solver.on_failure if isinstance(solver, LinearSolver) else "warn"
        solution.report("the adjoint systems of the Jacobian", on_failure)
        if on_failure != "ignore":
            result.check_finite(on_failure)
            result.warn_if_unsolved()
    return result


def _outer_gradients(outer_losses: Any, variables: Variables) -> tuple[Tensor, Vector, list[Tensor]]:
    """E, its gradients ∇₁E as k vectors stacked, and ∇₂E likewise."""
    with torch.enable_grad():
        values = outer_losses(variables.params, variables.hparams) if callable(outer_losses) else outer_losses
    if not isinstance(values, Tensor) or not values.is_floating_point() or values.ndim != 1 or not len(values):
        got = f"shape {tuple(values.shape)}, {values.dtype}" if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"outer_losses must give a tensor [k] of k ≥ 1 losses, got {got}; torch.stack makes one of scalars, and "
            f"for a single loss there is implicit.grad"
        )
    if callable(outer_losses):
        variables.check_reached([values], "outer_losses")
    elif not _autodiff.depends([values], variables.leaves):
        raise ValueError("outer_losses do not depend on params; were they computed from other tensors, or no_grad?")
    units = torch.eye(len(values), dtype=values.dtype, device=values.device)
    grads = _autodiff.stacked([values], [*variables.leaves, *variables.differentiated], [units])
    count = len(variables.leaves)
    space = Space(variables.in_params_structure(grads[:count]), "the outer gradients", 1)
    return values, space.pack(grads[:count]).own(), grads[count:]
