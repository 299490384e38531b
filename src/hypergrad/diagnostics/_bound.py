"""What declared constants guarantee of the error of a hypergradient."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Constants:
    """What the user declares of a bilevel problem, on a convex set of params that holds both w and w*, at this λ.

    Norms are Euclidean, of matrices spectral; "L-Lipschitz" is meant in w. Nothing here is checked.

    Args:
        mu: ‖A⁻¹‖ ≤ 1/μ and ‖w − w*‖ ≤ ‖F(w)‖/μ: μ is the strong convexity of an inner_loss (½c‖w‖² added to a convex
            loss gives μ = c), the strong monotonicity of a residual. Either μ or q.
        q: Φ is a contraction with this factor < 1; μ = 1 − q.
        B: ‖∂₂F‖ at the given w (‖∂₂∇₁g‖, ‖∂₂Φ‖).
        L_B: ∂₂F is L_B-Lipschitz.
        L_A: A is L_A-Lipschitz.
        L_E: ∇₁E is L_E-Lipschitz.
        L_lambda: ∇₂E is L_lambda-Lipschitz.
    """

    B: float
    L_B: float
    L_A: float
    L_E: float
    L_lambda: float
    mu: float | None = None
    q: float | None = None

    def __post_init__(self) -> None:
        if (self.mu is None) == (self.q is None):
            raise ValueError("Constants: declare exactly one of mu and q")
        if not 0 < self.modulus < math.inf or (self.q is not None and self.q < 0):
            raise ValueError(f"Constants: mu must be positive and q in [0, 1), got mu={self.mu!r}, q={self.q!r}")
        for name in ("B", "L_B", "L_A", "L_E", "L_lambda"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"Constants: {name} must be a finite number ≥ 0, got {value!r}")

    @property
    def modulus(self) -> float:
        """μ, or 1 − q."""
        return self.mu if self.mu is not None else 1 - (self.q or 0.0)


def bound(constants: Constants, inner_residual: float, adjoint_residual: float, adjoint_norm: float) -> float:
    """A guaranteed bound of ‖h(w, v) − ∇f(λ)‖ for h(w, v) = ∇₂E − ∂₂Fᵀv, if what is declared holds.

        ε = ‖F‖/μ ≥ ‖w − w*‖,     ‖v − v*‖ ≤ (‖r_v‖ + (L_E + L_A‖v‖) ε) / μ
        ‖h − ∇f‖ ≤ L_λ ε + L_B ε‖v‖ + (B + L_B ε) ‖v − v*‖

    With Δ for the difference between w and w*: h − ∇f = Δ∇₂E − (Δ∂₂F)ᵀ v − ∂₂F(w*)ᵀ (v − v*), and
    A(w*)ᵀ (v − v*) = Δ∇₁E − (ΔA)ᵀ v − r_v. Any w and v are allowed. Rounding is not counted.

    Args:
        inner_residual, adjoint_residual, adjoint_norm: ‖F‖, ‖r_v‖ = ‖∇₁E − Aᵀv‖ and ‖v‖, as `check` estimates them.

    Example:
        w minimises ½(w − λ)², E = ½w²: μ = B = L_E = 1, and nothing else varies. At λ = 3, w = 2.9, v = 2.9 the
        hypergradient is 2.9 and ∇f = 3.

        >>> constants = Constants(mu=1, B=1, L_B=0, L_A=0, L_E=1, L_lambda=0)
        >>> round(bound(constants, inner_residual=0.1, adjoint_residual=0.0, adjoint_norm=2.9), 6)
        0.1
    """
    c, mu = constants, constants.modulus
    epsilon = inner_residual / mu
    adjoint_error = (adjoint_residual + (c.L_E + c.L_A * adjoint_norm) * epsilon) / mu
    return c.L_lambda * epsilon + c.L_B * epsilon * adjoint_norm + (c.B + c.L_B * epsilon) * adjoint_error
