"""What `valid_for` and `products_needed` of solvers go by: the structure of a system, and what theory says."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Structure:
    """What m products with random vectors say of A, and of J = I − A (for a fixed point map, J = ∂₁Φ).

    Bounds are proven, up to rounding. Where `exact`, they are the numbers themselves.

    Attributes:
        n: unknowns (of each system).
        steps: m, the dimension of the Krylov spaces; `exact` where m = n.
        declared_symmetric: as the caller declared.
        asymmetry: max |xᵀAy − yᵀAx| / (‖x‖‖Ay‖ + ‖y‖‖Ax‖) over the random probes x, y.
        symmetric: whether that is below √eps, and so taken for rounding.
        eigenvalues: Ritz values of A in rising order of real parts; of a symmetric A between its extreme eigenvalues.
        eigenvalue_errors: for each: a symmetric A has an eigenvalue within; otherwise to first order only.
        norm: lower bound of ‖A‖₂.
        least: upper bound of the least singular value.
        negligible: at least so many singular values are below 10 √n eps ‖A‖: A is singular to rounding where > 0.
        condition: lower bound of ‖A‖ ‖A⁻¹‖. Infinite where A is singular.
        radius: the largest |eigenvalue| of J seen, its spectral radius ρ.
        radius_at_least: lower bound of ρ, to first order where A is not symmetric; 0 far from normal.
        contraction: lower bound of q = ‖J‖₂. Where ρ < 1 < q, Φ contracts in the long run alone.
        eps: of the dtype.
        products: what all this cost.
        system: which of B independent systems this is, the worst of them; None without batch_dims.

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
        """Whether the Krylov spaces are the whole space."""
        return self.steps == self.n

    @property
    def singular(self) -> bool:
        return self.negligible > 0

    @property
    def tolerance(self) -> float:
        """What counts as zero beside ‖A‖."""
        return 10 * math.sqrt(self.n) * self.eps * self.norm

    @property
    def definiteness(self) -> str:
        """By the signs of the Ritz values, of which two prove "indefinite"; "none" where A is not symmetric."""
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
    """The least k ≥ 1 with factor · rate^k ≤ rtol; None where there is none."""
    if rate >= 1 or math.isnan(rate):
        return None
    if rate <= 0:
        return 1
    return max(1, math.ceil(math.log(rtol / factor) / math.log(rate)))


def rate_of(condition: float) -> float:
    """(κ − 1)/(κ + 1)."""
    return 1.0 if math.isinf(condition) else (condition - 1) / (condition + 1)


def doubled(steps: int | None) -> int | None:
    """Products of so many steps that take two each."""
    return None if steps is None else 2 * steps
