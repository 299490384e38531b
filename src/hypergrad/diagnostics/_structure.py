"""What is known of A = ∂₁F (∇²₁₁g, or I − ∂₁Φ) at a point, from products with random vectors; what follows from it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import optree
import torch
from torch import Tensor

from .. import _random, operators
from .._modules import modules_of
from .._vector import Space, Vector
from ..implicit import Problem
from ..operators import LinearOperator
from ._spectrum import arnoldi, unseen

FAR_FROM_NORMAL = 100  # condition number of an eigenvalue above which its first-order error says nothing
Range: TypeAlias = tuple[float, float]


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
        eigenvalue_errors: for each: symmetric A has an eigenvalue within; otherwise to first order only.
        lowest, highest: ranges of the extreme eigenvalues of a symmetric A; else None.
        norm: range of ‖A‖₂.
        least: range of the least singular value.
        negligible: at least so many singular values are below 10 √n eps ‖A‖: A is singular to rounding where > 0.
        condition: a lower bound of ‖A‖ ‖A⁻¹‖; the number itself where `exact`. Infinite where A is singular.
        radius: the largest |eigenvalue| of J seen, its spectral radius ρ; `radius_range` around it. Where A is not
            symmetric the lower end is what the first-order error of the Ritz value allows, 0 far from normal.
        contraction: range of q = ‖J‖₂. For J far from normal ρ < 1 < q is possible: Φ contracts in the long run alone.
        eps: of the dtype.
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
    def definiteness(self) -> str:
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

    def __str__(self) -> str:
        return "\n".join(f"{name:<22}{text}" for name, text in _rows(self))


def structure(problem: Problem, *, steps: int = 50) -> Structure:
    """The structure of A = ∇²₁₁g, I − ∂₁Φ or ∂₁F at (w, λ): see `operator_structure`.

    Buffers of modules that the callables can be seen to use, and torch's random state, are put back.

    Args:
        problem: `implicit.Problem(None, params=..., hparams=..., inner_loss=...)` with a function for the inner loss
            or map, or that of a result.
        steps: as in `operator_structure`.

    Raises: TypeError for an evaluated loss, or complex hparams; ValueError as `operator_structure`.
    Cost: one evaluation of the loss or map, and what `operator_structure` says.

    Example:
        >>> problem = hg.implicit.Problem(
        ...     None,
        ...     inner_loss=lambda w, lam: lam @ (w**2 / 2) - 2 * w[0] ** 2,
        ...     params=torch.zeros(2),
        ...     hparams=torch.ones(2, requires_grad=True),
        ... )
        >>> found = structure(problem)
        >>> found.definiteness, [round(x, 4) for x in found.eigenvalues]
        ('indefinite', [-3.0, 1.0])
    """
    problem = checked(problem)
    with unchanged(problem):
        linearisation = problem.linearise()
        # Declared as little as possible: a wrong declaration would stand in for the transposed product.
        op = operators.adjoint(
            lambda: linearisation,
            fixed_point=problem.fixed_point,
            symmetric=problem.kind == "inner_loss",
            batch_dims=problem.batch_dims,
        )
        found = operator_structure(op, problem.point, steps=steps)
    return replace(found, declared_symmetric=problem.symmetric)


def operator_structure(
    op: LinearOperator, like: Any, *, steps: int = 50, generator: torch.Generator | None = None
) -> Structure:
    """The structure of an operator A.

    Arnoldi from a random vector (Lanczos with full reorthogonalisation where A is symmetric) gives Ritz values θ. For
    a symmetric A these lie inside the spectrum, so that θ < 0 < θ' proves it indefinite, and its extreme eigenvalues
    are at most ε (λ_max − λ_min) outside of them, ε = (ln(1.648 √n / δ) / (2m − 1))², with probability 1 − δ, δ = 1e-6.
    For another A the Arnoldi basis bounds singular values from inside; what lies outside is not known then.

    Args:
        op: A or Aᵀ. How it is declared is compared with what is found.
        like: a Vector or a pytree of tensors as A takes it; only its form counts.
        steps: m ≥ 1; at most n are done. All of them give the eigenvalues and singular values themselves.
        generator: of the random vectors, on the CPU (default: one with a seed of its own).

    Returns: a Structure; with batch_dims=1 that of the worst system: the most negligible singular values, else the
        largest condition number.
    Raises: TypeError for sharded tensors; ValueError for steps below 1, no unknowns, or a product that is not finite.
    Cost: 6 + m products; m + 1 vectors.
    Source: Kuczyński and Woźniakowski 1992, Theorem 4.2 (ε); Parlett 1998, section 13 (residual bounds).

    Example:
        >>> a = torch.tensor([[0.5, 4.0], [0.0, 0.5]])
        >>> found = operator_structure(hg.operators.matrix(torch.eye(2) - a), torch.zeros(2))
        >>> print(f"ρ = {found.radius:.1f}, ‖J‖ = {found.contraction[0]:.2f}")
        ρ = 0.5, ‖J‖ = 4.06
    """
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an integer ≥ 1, got {steps!r}")
    require_real(like.leaves if isinstance(like, Vector) else like, "like")
    vector = like if isinstance(like, Vector) else Space(like, "like", op.batch_dims).vector(like, "like")
    space, before, generator = vector.space, op.products, seeded(generator)
    if not space.length or not vector.norm().numel():
        raise ValueError("a system without unknowns has no structure: params hold no numbers")
    steps = min(steps, space.length)
    with torch.no_grad():
        asymmetry = _small(_asymmetry(op, vector, generator))
        symmetric = bool((asymmetry <= space.eps**0.5).all())
        h = _small(arnoldi(op, vector, steps, generator))
    if not (bool(torch.isfinite(asymmetry).all()) and bool(torch.isfinite(h).all())):
        raise ValueError("a product of the operator holds NaN or infinity: look at the loss or map at this point")
    known = {"n": space.length, "steps": steps, "declared_symmetric": op.symmetric, "symmetric": symmetric}
    known |= {"eps": space.eps, "products": op.products - before}
    found = []
    for i, each in enumerate(asymmetry.reshape(-1).tolist()):
        small = h.reshape(-1, *h.shape[-2:])[i]
        about = known | {"asymmetry": each, "system": i if space.batch_dims else None}
        found.append((_symmetric if symmetric else _general)(small, about))
    return max(found, key=lambda s: (s.negligible, s.condition))


def checked(problem: Problem) -> Problem:
    """The problem, to be evaluated anew. Raises TypeError for an evaluated inner problem, and for complex hparams."""
    require_callable(problem.inner, problem.kind)
    require_real(problem.hparams, "hparams")
    return problem.again()


def require_callable(value: Any, name: str) -> None:
    if not callable(value):
        raise TypeError(
            f"{name} must be a function of (params, hparams), got {type(value).__name__}: an evaluated value has only "
            f"one graph"
        )


def require_real(tree: Any, name: str) -> None:
    if any(isinstance(x, Tensor) and x.is_complex() for x in optree.tree_leaves(tree)):
        raise TypeError(f"diagnostics take real tensors, and {name} holds a complex one: use torch.view_as_real")


@contextmanager
def unchanged(problem: Problem) -> Iterator[None]:
    """Buffers of the modules that the callables can be seen to use, and torch's random state, are put back."""
    modules = modules_of(problem.outer_loss, problem.inner)
    buffers = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]
    before = _random.capture(_random.devices_of(problem.leaves))
    try:
        yield
    finally:
        _random.restore(before)
        with torch.no_grad():
            for buffer, kept in buffers:
                if not torch.equal(buffer, kept):
                    buffer.copy_(kept)


def seeded(generator: torch.Generator | None) -> torch.Generator:
    """The generator, or one of the library's own whose numbers are the same at each call."""
    return torch.Generator(device="cpu").manual_seed(0) if generator is None else generator


def _small(x: Tensor) -> Tensor:
    """A small matrix where small dense algebra is done."""
    return x.to(device="cpu", dtype=torch.float64)


def _asymmetry(op: LinearOperator, like: Vector, generator: torch.Generator) -> Tensor:
    worst = like.space.scalar(0.0)
    for _ in range(3):
        x, y = like.random(generator), like.random(generator)
        ax, ay = op(x), op(y)
        size = x.norm() * ay.norm() + y.norm() * ax.norm()
        skew = (x.dot(ay) - y.dot(ax)).abs()
        worst = torch.maximum(worst, torch.where(skew == 0, 0.0, skew / size))
    return worst


def _negligible(singular_values: Tensor, n: int, eps: float) -> int:
    return int((singular_values <= 10 * math.sqrt(n) * eps * singular_values.max()).sum())


def _symmetric(h: Any, about: dict[str, Any]) -> Structure:
    """From Lanczos: T = Vᵀ A V and β, what is left of A v_m."""
    n, m, eps = about["n"], about["steps"], about["eps"]
    theta, y = torch.linalg.eigh((h[:m] + h[:m].mT) / 2)
    errors = h[m, m - 1].abs() * y[m - 1].abs() + 10 * eps * float(theta.abs().max())
    low, high = float(theta[0]), float(theta[-1])
    beyond = unseen(n, m)
    beyond = beyond / (1 - 2 * beyond) * (high - low) if beyond < 0.5 else math.inf
    lowest, highest = (low - beyond, low), (high, high + beyond)
    size = max(abs(low), abs(high))
    values = torch.linalg.svdvals(h)  # of A V_m, so none is below the least of A
    negligible, least = _negligible(values, n, eps), float(values.min())
    surely = lowest[0] if lowest[0] > 0 else -highest[1] if highest[1] < 0 else least if m == n else 0.0
    radius = max(abs(1 - low), abs(1 - high))
    radius_range = (radius, max(abs(1 - lowest[0]), abs(1 - highest[1])))
    return Structure(
        eigenvalues=tuple(theta.tolist()),
        eigenvalue_errors=tuple(errors.tolist()),
        lowest=lowest,
        highest=highest,
        norm=(size, max(abs(lowest[0]), abs(highest[1]))),
        least=(surely, least),
        negligible=negligible,
        condition=math.inf if negligible or not least else size / least,
        radius=radius,
        radius_range=radius_range,
        contraction=radius_range,
        **about,
    )


def _general(h: Any, about: dict[str, Any]) -> Structure:
    """From Arnoldi: A V_m = V_{m+1} H."""
    n, m, eps = about["n"], about["steps"], about["eps"]
    theta, y = torch.linalg.eig(h[:m])
    order = theta.real.argsort()
    conditions = torch.linalg.vector_norm(torch.linalg.inv_ex(y)[0], dim=1)  # columns of y have length 1
    size = float(torch.linalg.matrix_norm(h, 2))
    errors = (h[m, m - 1].abs() * y[m - 1].abs() + m * eps * size) * torch.nan_to_num(conditions, torch.inf)
    values = torch.linalg.svdvals(h)
    negligible, least, largest = _negligible(values, n, eps), float(values.min()), float(values.max())
    identity = torch.eye(m + 1, m, dtype=h.dtype, device=h.device)
    q = float(torch.linalg.matrix_norm(identity - h, 2))
    outside = (1 - theta).abs()
    far = int(outside.argmax())
    radius, error = float(outside[far]), float(errors[far])
    upper = min(q, radius + error) if m == n else math.inf
    return Structure(
        eigenvalues=tuple(theta[order].tolist()),
        eigenvalue_errors=tuple(errors[order].tolist()),
        lowest=None,
        highest=None,
        norm=(largest, largest if m == n else math.inf),
        least=(least if m == n else 0.0, least),
        negligible=negligible,
        condition=math.inf if negligible or not least else largest / least,
        radius=radius,
        radius_range=(max(radius - error, 0.0) if conditions[far] < FAR_FROM_NORMAL else 0.0, max(upper, radius)),
        contraction=(q, q if m == n else math.inf),
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
    declared = (", as declared" if s.symmetric else ", though declared") if s.declared_symmetric else ""
    rows = [("symmetry", f"{'' if s.symmetric else 'not '}symmetric{declared} (asymmetry {s.asymmetry:.1e})")]
    if s.lowest is not None and s.highest is not None:
        rows += [("definiteness", s.definiteness + ("" if s.definiteness_proven else ", as far as seen"))]
        rows += [("least eigenvalue", _between(s.lowest)), ("largest eigenvalue", _between(s.highest))]
    else:
        rows += [("least singular value", _between(s.least)), ("‖A‖", _between(s.norm))]
    rows += [("negligible", f"{at_least}{s.negligible} of {s.n} singular values")]
    rows += [("condition number", f"{at_least}{s.condition:.4g}")]
    rows += [("ρ(I − A)", f"{s.radius:.6g} ({_between(s.radius_range)})"), ("‖I − A‖", _between(s.contraction))]
    return rows
