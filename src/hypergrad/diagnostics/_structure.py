"""What is known of A = ∂₁F (∇²₁₁g, or I − ∂₁Φ) at a point, from products with random vectors; what follows from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from .. import operators
from .._vector import Space, Vector
from ..implicit import InnerProblem, Problem
from ..operators import LinearOperator
from ._modules import unchanged, visible_modules
from ._spectrum import arnoldi, golub_kahan, growth, unseen

Range: TypeAlias = tuple[float, float]
Definiteness: TypeAlias = Literal[
    "positive definite", "positive semidefinite", "indefinite", "negative semidefinite", "negative definite", "none"
]


@dataclass(frozen=True)
class Structure:
    """What m products with random vectors say of A, and of J = I − A (for a fixed point map, J = ∂₁Φ).

    A range (low, high) holds the number that it is named after; where `exact` is False, an outer end comes from the
    random start: it fails with probability 1e-6, and may be infinite. The other ends are proven, up to rounding, but
    for `radius_range`.

    Attributes:
        n: unknowns (of each system).
        steps: m, the dimension of the Krylov spaces; `exact` where m = n.
        declared_symmetric: as the caller declared.
        asymmetry: max |xᵀAy − yᵀAx| / (‖x‖‖Ay‖ + ‖y‖‖Ax‖) over the random probes x, y.
        symmetric: whether that is below √eps, and so taken for rounding.
        eigenvalues: Ritz values of A in rising order of their real parts: real ones where A is symmetric.
        eigenvalue_errors: for each: symmetric A has an eigenvalue within; otherwise to first order only (residual times
            the condition number of the Ritz value: large where A is far from normal).
        lowest, highest: ranges of the extreme eigenvalues of a symmetric A; else None.
        norm: range of ‖A‖₂.
        least: range of the least singular value.
        negligible: at least so many singular values are below 10 √n eps ‖A‖: A is singular to rounding where > 0.
        condition: a lower bound of ‖A‖ ‖A⁻¹‖; the number itself where `exact`. Infinite where A is singular.
        radius: the largest |eigenvalue| of J seen, its spectral radius ρ; `radius_range` around it. Where A is not
            symmetric the lower end is what first-order errors of the Ritz value and a power iteration both allow, which
            for a matrix far from normal may be 0.
        contraction: range of q = ‖J‖₂. For J far from normal ρ < 1 < q is possible: Φ contracts in the long run alone.
        products: what all this cost.
        system: which of B independent systems this is, the worst of them; None without batch_dims.
    """

    n: int
    steps: int
    declared_symmetric: bool
    asymmetry: float
    symmetric: bool
    eigenvalues: tuple[float, ...] | tuple[complex, ...]
    eigenvalue_errors: tuple[float, ...]
    lowest: Range | None
    highest: Range | None
    norm: Range
    least: Range
    negligible: int
    condition: float
    radius: float
    radius_range: Range
    contraction: Range
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
        return 10 * math.sqrt(self.n) * self.eps * self.norm[0]

    @property
    def definiteness(self) -> Definiteness:
        """By the signs of the Ritz values; "none" where A is not symmetric. See `definiteness_proven`."""
        if not self.symmetric:
            return "none"
        low, high = float(self.eigenvalues[0].real), float(self.eigenvalues[-1].real)
        if low < -self.tolerance:
            if high > self.tolerance:
                return "indefinite"
            return "negative semidefinite" if self.singular else "negative definite"
        return "positive semidefinite" if self.singular or high <= self.tolerance else "positive definite"

    @property
    def definiteness_proven(self) -> bool:
        """Indefinite is proven by two Ritz values; the others where all of A, or enough of it, was seen."""
        kind = self.definiteness
        if kind == "none" or self.lowest is None or self.highest is None:
            return False
        enough = self.lowest[0] > 0 or self.highest[1] < 0
        return self.exact or kind == "indefinite" or (enough and not self.singular)

    def to_dict(self) -> dict[str, Any]:
        """All of this as numbers, texts and lists; a complex number as [real, imaginary]."""
        numbers = asdict(self) | {
            "exact": self.exact,
            "definiteness": self.definiteness,
            "definiteness_proven": self.definiteness_proven,
        }
        if not self.symmetric:
            numbers["eigenvalues"] = [[z.real, z.imag] for z in self.eigenvalues]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in numbers.items()}

    def __str__(self) -> str:
        return "\n".join(f"{name:<22}{text}" for name, text in _rows(self))


def structure(
    *,
    params: Any,
    hparams: Any,
    inner_loss: Callable[[Any, Any], Tensor] | None = None,
    fp_map: Callable[[Any, Any], Any] | None = None,
    residual: Callable[[Any, Any], Any] | None = None,
    symmetric: bool = False,
    positive_definite: bool = False,
    batch_dims: int = 0,
    steps: int = 50,
    probes: int = 3,
    seed: int = 0,
) -> Structure:
    """The structure of A = ∇²₁₁g, I − ∂₁Φ or ∂₁F at (w, λ).

    Buffers of modules that the callables can be seen to use, and torch's random state, are put back.

    Args:
        params, hparams, inner_loss, fp_map, residual, symmetric, positive_definite, batch_dims: as in `implicit.grad`.
        steps, probes, seed: see `operator_structure`.

    Returns: a Structure; with batch_dims=1 that of the worst system.
    Raises: TypeError, ValueError as `implicit.grad` does.
    Cost: one evaluation of the loss or map, and what `operator_structure` says.

    Example:
        >>> w, lam = torch.zeros(2), torch.ones(2, requires_grad=True)
        >>> found = structure(inner_loss=lambda w, lam: lam @ (w**2 / 2) - 2 * w[0] ** 2, params=w, hparams=lam)
        >>> found.definiteness, [round(x, 4) for x in found.eigenvalues]
        ('indefinite', [-3.0, 1.0])
    """
    inner = InnerProblem.of(inner_loss, fp_map, residual)
    problem = Problem(None, inner, params, hparams, symmetric, positive_definite, batch_dims=batch_dims)
    return structure_of(problem, steps=steps, probes=probes, seed=seed)


def structure_of(problem: Problem, *, steps: int = 50, probes: int = 3, seed: int = 0) -> Structure:
    """As `structure`, of a Problem."""
    inner, variables = problem.inner, problem.variables
    if not callable(inner.given):
        raise TypeError(f"{inner.kind} must be a callable of (params, hparams): an evaluated value has only one graph")
    with unchanged(visible_modules(inner.given), variables.space.devices):
        linearisation = inner.linearise(variables)
        # Declared as little as possible: a wrong declaration would stand in for the transposed product.
        op = operators.adjoint(
            lambda: linearisation,
            fixed_point=problem.fixed_point,
            symmetric=inner.kind == "inner_loss",
            positive_definite=False,
            batch_dims=problem.batch_dims,
        )
        like = variables.space.pack([leaf.detach() for leaf in variables.given])
        found = operator_structure(op, like, steps=steps, probes=probes, seed=seed)
    declared = problem.symmetric or problem.positive_definite or inner.kind == "inner_loss"
    return replace(found, declared_symmetric=declared)


def operator_structure(op: LinearOperator, like: Any, *, steps: int = 50, probes: int = 3, seed: int = 0) -> Structure:
    """The structure of an operator A.

    Arnoldi from a random vector (Lanczos with full reorthogonalisation where A is symmetric) gives Ritz values θ. For
    a symmetric A these lie inside the spectrum, so that θ < 0 < θ' proves it indefinite, and its extreme eigenvalues
    are at most ε (λ_max − λ_min) outside of them, ε = (ln(1.648 √n / δ) / (2m − 1))², with probability 1 − δ, δ = 1e-6.
    For another A, Golub–Kahan of A and of I − A gives singular values likewise, ‖A‖ ≤ σ / √(1 − ε). Without a
    transposed product the Arnoldi basis gives them: no upper bounds then.

    Args:
        op: A or Aᵀ. How it is declared is compared with what is found.
        like: a Vector or a pytree of tensors as A takes it; only its form counts.
        steps: m ≥ 1; at most n are done. All of them give the eigenvalues and singular values themselves.
        probes: pairs of random vectors for the symmetry, ≥ 1.
        seed: of a generator of its own; torch's global random state is not touched.

    Returns: a Structure; with batch_dims=1 that of the worst system: the most negligible singular values, else the
        largest condition number.
    Raises: TypeError for sharded tensors; ValueError for steps or probes below 1, or a product that is not finite.
    Cost: 2 · probes + m products for a symmetric A, 5m − 2 more for another (half of them transposed); 2m vectors.
    Source: Kuczyński and Woźniakowski 1992, Theorem 4.2 (ε); Parlett 1998, section 13 (residual bounds).

    Example:
        >>> a = torch.tensor([[0.5, 4.0], [0.0, 0.5]])
        >>> found = operator_structure(hg.operators.matrix(torch.eye(2) - a), torch.zeros(2))
        >>> print(f"ρ = {found.radius:.1f}, ‖J‖ = {found.contraction[0]:.2f}")
        ρ = 0.5, ‖J‖ = 4.06
    """
    for name, value in (("steps", steps), ("probes", probes)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer ≥ 1, got {value!r}")
    vector = like if isinstance(like, Vector) else Space(like, "like", op.batch_dims).vector(like, "like")
    space, before, generator = vector.space, op.products, torch.Generator().manual_seed(seed)
    most, steps = steps, min(steps, space.length)
    with torch.no_grad():
        asymmetry = _small(_asymmetry(op, vector, probes, generator))
        symmetric = bool((asymmetry <= space.eps**0.5).all())
        h = _small(arnoldi(op, vector, steps, generator))
        if symmetric or not op.has_transpose or op.symmetric:
            own = shifted = None
        else:
            own = _small(golub_kahan(op, vector, steps, generator, contract=False))
            shifted = _small(golub_kahan(op, vector, steps, generator, contract=True))
        rate = None if symmetric else _small(growth(op.contract, vector, most, generator))
    if not all(bool(torch.isfinite(x).all()) for x in (asymmetry, h, own, shifted) if x is not None):
        raise ValueError("a product of the operator holds NaN or infinity: look at the loss or map at this point")
    known = {"n": space.length, "steps": steps, "declared_symmetric": op.symmetric, "symmetric": symmetric}
    known |= {"eps": space.eps, "products": op.products - before}
    found = []
    for i, each in enumerate(asymmetry.reshape(-1).tolist()):
        small, of_a, of_j = (None if x is None else x.reshape(-1, *x.shape[-2:])[i] for x in (h, own, shifted))
        about = known | {"asymmetry": each, "system": i if space.batch_dims else None}
        if rate is None:
            found.append(_symmetric(small, about))
        else:
            found.append(_general(small, of_a, of_j, float(rate.reshape(-1)[i]), about))
    return max(found, key=lambda s: (s.negligible, s.condition))


def _small(x: Tensor) -> Tensor:
    """A small matrix where small dense algebra is done."""
    return x.to(device="cpu", dtype=torch.float64)


def _asymmetry(op: LinearOperator, like: Vector, probes: int, generator: torch.Generator) -> Tensor:
    worst = like.space.scalar(0.0)
    for _ in range(probes):
        x, y = like.random(generator), like.random(generator)
        ax, ay = op(x), op(y)
        size = x.norm() * ay.norm() + y.norm() * ax.norm()
        skew = (x.dot(ay) - y.dot(ax)).abs()
        worst = torch.maximum(worst, torch.where(skew == 0, 0.0, skew / size))
    return worst


def _negligible(singular_values: Tensor, n: int, eps: float) -> int:
    return int((singular_values <= 10 * math.sqrt(n) * eps * singular_values.max()).sum())


def _ratio(a: float, b: float) -> float:
    return a / b if b > 0 else math.inf


def _symmetric(h: Any, about: dict[str, Any]) -> Structure:
    """From Lanczos: T = Vᵀ A V and β, what is left of A v_m."""
    n, m, eps = about["n"], about["steps"], about["eps"]
    t = h[:m]
    theta, y = torch.linalg.eigh((t + t.mT) / 2)
    rounding = 10 * eps * float(theta.abs().max())
    errors = h[m, m - 1].abs() * y[m - 1].abs() + rounding
    low, high = float(theta[0]), float(theta[-1])
    beyond = unseen(n, m)
    beyond = beyond / (1 - 2 * beyond) * (high - low) if beyond < 0.5 else math.inf
    lowest, highest = (low - beyond, low), (high, high + beyond)
    size, top = max(abs(low), abs(high)), max(abs(lowest[0]), abs(highest[1]))
    values = torch.linalg.svdvals(h)  # of A V_m, so none is below the least of A
    negligible = _negligible(values, n, eps)
    least = float(values.min())
    surely = lowest[0] if lowest[0] > 0 else -highest[1] if highest[1] < 0 else least if m == n else 0.0
    radius = max(abs(1 - low), abs(1 - high))
    radius_range = (radius, max(abs(1 - lowest[0]), abs(1 - highest[1])))
    return Structure(
        eigenvalues=tuple(theta.tolist()),
        eigenvalue_errors=tuple(errors.tolist()),
        lowest=lowest,
        highest=highest,
        norm=(size, top),
        least=(surely, least),
        negligible=negligible,
        condition=math.inf if negligible else _ratio(size, least),
        radius=radius,
        radius_range=radius_range,
        contraction=radius_range,
        **about,
    )


def _general(h: Any, own: Any, shifted: Any, rate: float, about: dict[str, Any]) -> Structure:
    """From Arnoldi, A V_m = V_{m+1} H, from Golub–Kahan of A and of I − A where there are transposed products, and from
    the rate at which powers of I − A grow."""
    n, m, eps = about["n"], about["steps"], about["eps"]
    theta, y = torch.linalg.eig(h[:m])
    order = theta.real.argsort()
    conditions = torch.linalg.vector_norm(torch.linalg.inv_ex(y)[0], dim=1)  # columns of y have length 1
    size = float(torch.linalg.matrix_norm(h, 2))
    errors = (h[m, m - 1].abs() * y[m - 1].abs() + m * eps * size) * torch.nan_to_num(conditions, torch.inf)
    values = torch.linalg.svdvals(h if own is None else own)
    beyond = 1.0 if own is None and m < n else unseen(n, m)
    stretch = 1 / math.sqrt(1 - beyond) if beyond < 1 else math.inf
    negligible, least = _negligible(values, n, eps), float(values.min())
    norm = (float(values.max()), float(values.max()) * stretch)
    identity = torch.eye(m + 1, m, dtype=h.dtype)
    q = float(torch.linalg.matrix_norm(identity - h if shifted is None else shifted, 2))
    contraction = (q, q * stretch)
    outside = (1 - theta).abs()
    far = int(outside.argmax())
    radius, error = float(outside[far]), float(errors[far])
    upper = min(contraction[1], radius + error) if m == n else contraction[1]
    return Structure(
        eigenvalues=tuple(theta[order].tolist()),
        eigenvalue_errors=tuple(errors[order].tolist()),
        lowest=None,
        highest=None,
        norm=norm,
        least=(least if m == n else 0.0, least),
        negligible=negligible,
        condition=math.inf if negligible else _ratio(norm[0], least),
        radius=radius,
        radius_range=(max(min(radius - error, rate), 0.0), max(upper, radius)),
        contraction=contraction,
        **about,
    )


def _between(ends: Range) -> str:
    low, high = ends
    if math.isinf(low) or math.isinf(high):
        return f"≤ {high:.4g}" if math.isinf(low) else f"≥ {low:.4g}"
    return f"{low:.4g}" if high - low <= 1e-4 * abs(high) else f"{low:.4g} to {high:.4g}"


def _rows(s: Structure) -> list[tuple[str, str]]:
    """What the structure prints as: (name, text) pairs."""
    at_least = "" if s.exact else "≥ "
    symmetry = "symmetric" if s.symmetric else "not symmetric"
    declared = ", as declared" if s.declared_symmetric and s.symmetric else ""
    declared = ", though declared" if s.declared_symmetric and not s.symmetric else declared
    rows = [("symmetry", f"{symmetry}{declared} (asymmetry {s.asymmetry:.1e})")]
    if s.lowest is not None and s.highest is not None:
        proven = "" if s.definiteness_proven else ", as far as seen"
        rows += [("definiteness", s.definiteness + proven)]
        rows += [("least eigenvalue", _between(s.lowest)), ("largest eigenvalue", _between(s.highest))]
    else:
        rows += [("least singular value", _between(s.least)), ("‖A‖", _between(s.norm))]
    rows += [("negligible", f"{at_least}{s.negligible} of {s.n} singular values")]
    rows += [("condition number", f"{at_least}{s.condition:.4g}")]
    rows += [("ρ(I − A)", f"{s.radius:.6g} ({_between(s.radius_range)})"), ("‖I − A‖", _between(s.contraction))]
    return rows
