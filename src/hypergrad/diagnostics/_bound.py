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
        if (self.mu is not None and not 0 < self.mu < math.inf) or (self.q is not None and not 0 <= self.q < 1):
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
        constants: as declared.
        inner_residual: ‖F‖, that is ‖∇₁g‖ or ‖w − Φ(w)‖.
        adjoint_residual: ‖r_v‖ = ‖∇₁E − Aᵀv‖.
        adjoint_norm: ‖v‖.

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


@dataclass(frozen=True)
class Truncation:
    """What T inner and K adjoint steps leave of the error, at most.

    Attributes:
        unrolled: bound of the error of differentiating T steps from w₀ (ITD: `unroll.reverse`, `reverse`).
        implicit: bound of the error of K adjoint steps at w_T (AID: `fixed_point`); `from_inner` + `from_adjoint`.
        from_inner: its part that T decides.
        from_adjoint: its part that K decides.
        balanced: the K at which both parts are equal.
    """

    unrolled: float
    implicit: float
    from_inner: float
    from_adjoint: float
    balanced: int


def truncation(
    constants: Constants, inner_steps: int, adjoint_steps: int, *, distance: float, outer_gradient: float
) -> Truncation:
    """Bounds of the error of iterative (ITD) and implicit (AID) differentiation of w ← Φ(w, λ), by numbers of steps.

        c₁ = (L_λ + L_E B/(1 − q)) D,   c₂ = (L_B + L_A B/(1 − q)) G D,   c₃ = G B/(1 − q)
        ITD:  (c₁ + c₂ T/q + c₃) qᵀ          AID:  (c₁ + c₂/(1 − q)) qᵀ + c₃ qᴷ

    The adjoint steps are v ← ∂₁Φᵀv + ∇₁E from 0.

    Args:
        constants: with q; B bounds ‖∂₂Φ‖ on the whole path here.
        inner_steps: T.
        adjoint_steps: K.
        distance: D ≥ ‖w₀ − w*‖, of the start.
        outer_gradient: G ≥ ‖∇₁E‖ on the path.

    Source: Grazzi et al. 2020, Theorems 2.1 and 2.2. There the start is w₀ = 0 and D bounds ‖w*‖. The form here follows
        from ‖w_T − w*‖ ≤ qᵀD, ‖v_K − v‖ ≤ qᴷ G/(1 − q), and for ITD Σ_{t<T} q^{T−1−t} qᵗ = T q^{T−1}.
    """
    q = constants.q
    if q is None:
        raise ValueError("truncation needs the contraction factor of Φ: Constants(q=...)")
    if inner_steps < 0 or adjoint_steps < 0:
        raise ValueError(f"numbers of steps must be ≥ 0, got {inner_steps} and {adjoint_steps}")
    c, gap = constants, 1 - q
    c1 = (c.L_lambda + c.L_E * c.B / gap) * distance
    c2 = (c.L_B + c.L_A * c.B / gap) * outer_gradient * distance
    c3 = outer_gradient * c.B / gap
    from_inner, from_adjoint = (c1 + c2 / gap) * q**inner_steps, c3 * q**adjoint_steps
    memory = c2 * inner_steps * q ** (inner_steps - 1) if inner_steps else 0.0
    usable = min(q, from_inner, c3) > 0
    balanced = max(0, math.ceil(math.log(from_inner / c3) / math.log(q))) if usable else inner_steps
    return Truncation(
        unrolled=(c1 + c3) * q**inner_steps + memory,
        implicit=from_inner + from_adjoint,
        from_inner=from_inner,
        from_adjoint=from_adjoint,
        balanced=balanced,
    )
