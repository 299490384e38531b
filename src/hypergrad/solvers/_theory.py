"""The structure of a linear system, from which solvers' `valid_for` and `products_needed` are computed."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Structure:
    """What m products with random vectors show about A and J = I − A (for a fixed point map, J = ∂₁Φ).

    The bounds are proven, up to rounding. If `exact`, they are the numbers themselves.

    Attributes:
        n: the number of unknowns (of each system).
        steps: m, the dimension of the Krylov spaces; `exact` if m = n.
        declared_symmetric: whether the caller declared A symmetric.
        asymmetry: max |xᵀAy − yᵀAx| / (‖x‖‖Ay‖ + ‖y‖‖Ax‖) over random x, y.
        symmetric: whether asymmetry is at most √eps, which counts as rounding.
        eigenvalues: Ritz values of A in rising order of real parts; for a symmetric A between its extreme eigenvalues.
        eigenvalue_errors: for each, the distance within which A has an eigenvalue; to first order if not symmetric.
        norm: lower bound of ‖A‖₂.
        least: upper bound of the least singular value.
        negligible: lower bound of the number of singular values below 10 √n eps ‖A‖; if > 0, A is singular to rounding.
        condition: lower bound of ‖A‖ ‖A⁻¹‖; infinite if A is singular.
        radius: the largest |1 − Ritz value|, an estimate of the spectral radius ρ of J.
        radius_at_least: lower bound of ρ, to first order if A is not symmetric; 0 if A is far from normal.
        contraction: lower bound of q = ‖J‖₂. If ρ < 1 < q, Φ contracts only over many steps.
        eps: machine epsilon of the dtype.
        products: the number of products with A that were taken.
        system: the index of this system, the worst of B independent ones; None without batch_dims.

    Example:
        >>> matrix = torch.diag(torch.tensor([1.0, 2.0, 10.0], dtype=torch.float64))
        >>> structure = hg.diagnostics.operator_structure(hg.operators.matrix(matrix, symmetric=True), matrix[0])
        >>> structure.n, structure.symmetric, round(structure.condition, 6)
        (3, True, 10.0)
        >>> [round(value, 6) for value in structure.eigenvalues]
        [1.0, 2.0, 10.0]
    """

    n: int
    steps: int
    declared_symmetric: bool
    asymmetry: float
    symmetric: bool
    eigenvalues: tuple[float, ...] | tuple[complex, ...]
    eigenvalue_errors: tuple[float, ...]
    norm: float
    least: float
    negligible: int
    condition: float
    radius: float
    radius_at_least: float
    contraction: float
    eps: float
    products: int
    system: int | None = None

    @property
    def exact(self) -> bool:
        """Whether the Krylov spaces are the whole space, so that all bounds are exact."""
        return self.steps == self.n

    @property
    def singular(self) -> bool:
        return self.negligible > 0

    @property
    def tolerance(self) -> float:
        """The magnitude below which an eigenvalue counts as zero."""
        return 10 * math.sqrt(self.n) * self.eps * self.norm

    @property
    def definiteness(self) -> str:
        """The definiteness by the signs of the Ritz values (two prove "indefinite"); "none" if A is not symmetric."""
        if not self.symmetric:
            return "none"
        low, high = float(self.eigenvalues[0].real), float(self.eigenvalues[-1].real)
        if low < -self.tolerance:
            if high > self.tolerance:
                return "indefinite"
            return "negative semidefinite" if self.singular else "negative definite"
        return "positive semidefinite" if self.singular or high <= self.tolerance else "positive definite"

    def __str__(self) -> str:
        at_least, at_most = ("", "") if self.exact else ("≥ ", "≤ ")
        declared = (", as declared" if self.symmetric else ", though declared") if self.declared_symmetric else ""
        kind = f"{'' if self.symmetric else 'not '}symmetric{declared}"
        rows = {"symmetry": f"{kind} (asymmetry {self.asymmetry:.1e})"}
        if self.symmetric:
            seen = "" if self.exact or self.definiteness == "indefinite" else ", as far as seen"
            rows["definiteness"] = self.definiteness + seen
            rows["least eigenvalue"] = f"{at_most}{self.eigenvalues[0].real:.4g}"
            rows["largest eigenvalue"] = f"{at_least}{self.eigenvalues[-1].real:.4g}"
        else:
            rows["least singular value"] = f"{at_most}{self.least:.4g}"
            rows["‖A‖"] = f"{at_least}{self.norm:.4g}"
        rows["negligible"] = f"{at_least}{self.negligible} of {self.n} singular values"
        rows["condition number"] = f"{at_least}{self.condition:.4g}"
        rows["ρ(I − A)"] = f"{self.radius:.6g} (at least {self.radius_at_least:.6g})"
        rows["‖I − A‖"] = f"{at_least}{self.contraction:.4g}"
        return "\n".join(f"{name:<22}{text}" for name, text in rows.items())


def steps_needed(rate: float, rtol: float, factor: float = 1.0) -> int | None:
    """The least k ≥ 1 with factor · rate^k ≤ rtol; None if there is none."""
    if rate >= 1 or math.isnan(rate):
        return None
    if rate <= 0:
        return 1
    return max(1, math.ceil(math.log(rtol / factor) / math.log(rate)))


def rate_of(condition: float) -> float:
    """(κ − 1)/(κ + 1), and 1 for an infinite κ."""
    return 1.0 if math.isinf(condition) else (condition - 1) / (condition + 1)


def doubled(steps: int | None) -> int | None:
    """Twice the steps, for methods with two products a step."""
    return None if steps is None else 2 * steps
