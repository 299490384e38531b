"""The Jacobian of several outer losses, from one graph and one solve for all of them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .._torch import random_state_kept_on_error
from .._tree import PyTree
from ..solvers import GMRES, Auto, BlockCG, Recycled, Solver, on_failure_of
from ._hypergradient import Hypergradient, hypergradient_of, report
from ._problem import Problem


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
    """Hypergradients of k outer losses on one inner problem, for example the validation losses of k groups.

        Aᵀ V = (∇₁E₁, …, ∇₁E_k),      ∇fᵢ(λ) = ∇₂Eᵢ(w, λ) − ∂₂Fᵀ vᵢ

    All losses share one graph, k products are taken at once, and BlockCG takes fewer steps than k separate solves.

    Args:
        outer_losses: E(params, hparams) ↦ [k], or its value, already evaluated as in `grad`.
        params, hparams, inner_loss, fp_map, residual, symmetric, positive_definite: as in `grad`.
        solver: as in `grad`, for `op.stacked()`: k systems with the same A. Default: BlockCG() if A is symmetric, else
            GMRES(); then Auto() if that ends as NOT_POSITIVE_DEFINITE or DIVERGED.
        x0: start for V: the previous result's `adjoint` (params with a leading axis k in each leaf), or a `Recycled`.

    Returns: a Hypergradient whose grads and adjoint have a leading axis k in every leaf. outer_value, inner_distance
        and the tensors of `solution` have shape [k].
    Raises: as `grad`; ValueError for losses that are not of shape [k].
    Cost: one evaluation of the losses and of the inner problem, the solver's products, k passes for ∇E and k for the
        last products, vectorised where torch can. The solver keeps k vectors in place of each of its vectors.

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
    problem = Problem(
        outer_losses,
        params=params,
        hparams=hparams,
        inner_loss=inner_loss,
        fp_map=fp_map,
        residual=residual,
        symmetric=symmetric,
        positive_definite=positive_definite,
    )
    problem.several = True
    if problem.stochastic:
        raise TypeError("jacobian takes all its products at one draw, so the inner problem must not be Stochastic")
    backup = Auto() if solver is None else None
    solver = (BlockCG() if problem.symmetric else GMRES()) if solver is None else solver
    with random_state_kept_on_error(problem.leaves):
        result = hypergradient_of(problem, solver, x0, backup)
        report(problem, result, "the adjoint systems of the Jacobian", on_failure_of(solver))
    return result
