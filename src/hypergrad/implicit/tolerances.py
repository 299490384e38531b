"""Tolerances that fall from one outer step to the next: solve roughly as long as λ is far from its best value.

The k-th outer step solves the inner problem and the adjoint system to a tolerance εₖ. With Σ εₖ < ∞, and step sizes
that would do for exact gradients, λ converges to a stationary point. The first, rough steps may warn of an
`UnsolvedInnerProblem`, as they should.

    exponential  εₖ = first · factorᵏ       quadratic  εₖ = first / (k + 1)²       cubic  εₖ = first / (k + 1)³

Source: Pedregosa 2016, "Hyperparameter optimization with approximate gradient", Theorem 2 and section 5.

Example:
    The inner problem w² / 2 − λw is solved by w = λ; the outer loss is (w − 1)² / 2. A gradient step is a fixed point
    map of it, so that a forward solver with a tolerance is at hand.

    >>> step = lambda w, lam: w - 0.5 * (w - lam)
    >>> w, lam = torch.tensor(0.0), torch.tensor(3.0, requires_grad=True)
    >>> for k in range(30):
    ...     tolerance = hg.implicit.tolerances.cubic(k)
    ...     w = hg.fixed_points.Picard(atol=tolerance)(step, w, lam.detach()).value
    ...     result = hg.implicit.grad(
    ...         lambda w, lam: (w - 1) ** 2 / 2,
    ...         fp_map=step,
    ...         params=w,
    ...         hparams=lam,
    ...         solver=hg.solvers.GMRES(rtol=tolerance),
    ...     )
    ...     with torch.no_grad():
    ...         _ = lam.sub_(0.5 * result.grads)
    >>> round(lam.item(), 3)
    1.0
"""

from __future__ import annotations

__all__ = ["exponential", "quadratic", "cubic"]


def _check(k: int, first: float) -> None:
    if k < 0 or not first > 0:
        raise ValueError(f"k counts outer steps from 0 and first is positive; got k={k!r}, first={first!r}")


def exponential(k: int, first: float = 0.1, factor: float = 0.9) -> float:
    """first · factorᵏ, for the outer step k = 0, 1, 2, …"""
    _check(k, first)
    if not 0 < factor < 1:
        raise ValueError(f"factor must be between 0 and 1, got {factor!r}")
    return first * factor**k


def quadratic(k: int, first: float = 0.1) -> float:
    """first / (k + 1)², for the outer step k = 0, 1, 2, …"""
    _check(k, first)
    return first / (k + 1) ** 2


def cubic(k: int, first: float = 0.1) -> float:
    """first / (k + 1)³, for the outer step k = 0, 1, 2, …"""
    _check(k, first)
    return first / (k + 1) ** 3
