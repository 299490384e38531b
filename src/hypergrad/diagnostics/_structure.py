"""The structure of A = ∂₁F (∇²₁₁g, or I − ∂₁Φ) at a point, from products with random vectors, and solvers for it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import _random, operators, solvers
from .._basis import Basis
from .._modules import modules_of
from .._options import check_whole
from .._tree import flatten
from .._vector import Vector
from ..implicit import Problem
from ..operators import LinearOperator
from ..solvers import Structure

FAR_FROM_NORMAL = 100  # condition number of an eigenvalue above which its first-order error says nothing


def structure(problem: Problem, *, steps: int = 50) -> Structure:
    """The structure of A = ∇²₁₁g, I − ∂₁Φ or ∂₁F at (w, λ): see `operator_structure`.

    Buffers of modules that the callables visibly use, and torch's random state, are restored afterwards.

    Args:
        problem: `implicit.Problem(None, params=..., hparams=..., inner_loss=...)` with a function for the inner loss
            or map, or the problem of a result.
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
        # Declared symmetric only if that is certain, because A is then used in place of Aᵀ.
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

    Arnoldi from a random vector (Lanczos with full reorthogonalisation if A is symmetric) gives Ritz values θ. For a
    symmetric A these lie within the spectrum, so θ < 0 < θ' proves it indefinite. The singular values of AV_m, V_m
    being the basis, lie between the extreme ones of A, which are known exactly only for m = n.

    Args:
        op: A or Aᵀ. Its declared symmetry is compared with what is found.
        like: a Vector or a pytree of tensors of the form that A takes; its values do not matter.
        steps: m ≥ 1, at most n. With m = n, the eigenvalues and singular values are exact.
        generator: a generator on the CPU for the random vectors (default: a new one with a fixed seed).

    Returns: a Structure; with batch_dims=1 that of the worst system: the one with the most negligible singular values
        and, among these, the largest condition number.
    Raises: TypeError for sharded tensors; ValueError for steps below 1, no unknowns, or a product that is not finite.
    Cost: 6 + m products; m + 1 vectors.
    Source: Parlett 1998, section 13 (residual bounds).

    Example:
        >>> a = torch.tensor([[0.5, 4.0], [0.0, 0.5]])
        >>> found = operator_structure(hg.operators.matrix(torch.eye(2) - a), torch.zeros(2))
        >>> print(f"ρ = {found.radius:.1f}, ‖J‖ = {found.contraction:.2f}")
        ρ = 0.5, ‖J‖ = 4.06
    """
    check_whole(steps=(steps, 1))
    vector = like if isinstance(like, Vector) else Vector.of(like, "like", op.batch_dims)
    space, before, generator = vector.space, op.products, seeded(generator)
    if not space.length or not vector.norm().numel():
        raise ValueError("the linear system has no unknowns, so it has no structure: params hold no numbers")
    steps = min(steps, space.length)
    with torch.no_grad():
        asymmetry = _asymmetry(op, vector, generator).to("cpu", torch.float64)
        symmetric = bool((asymmetry <= space.eps**0.5).all())
        h = _arnoldi(op, vector, steps, generator).to("cpu", torch.float64)
    if not (bool(torch.isfinite(asymmetry).all()) and bool(torch.isfinite(h).all())):
        raise ValueError("a product of the operator holds NaN or infinity: look at the loss or map at this point")
    known = {"n": space.length, "steps": steps, "declared_symmetric": op.symmetric, "symmetric": symmetric}
    known |= {"eps": space.eps, "products": op.products - before}
    found = []
    for i, each in enumerate(asymmetry.reshape(-1).tolist()):
        small = h.reshape(-1, *h.shape[-2:])[i]
        about = known | {"asymmetry": each, "system": i if space.batch_dims else None}
        found.append(_from_arnoldi(small, about))
    return max(found, key=lambda s: (s.negligible, s.condition))


def checked(problem: Problem) -> Problem:
    """The problem, to be evaluated again. Raises TypeError for an evaluated inner problem, and for complex hparams."""
    require_callable(problem.inner, problem.kind)
    flatten(problem.hparams, "hparams")  # of real tensors
    return problem.again()


def require_callable(value: Any, name: str) -> None:
    if not callable(value):
        raise TypeError(
            f"{name} must be a function of (params, hparams), because it is evaluated several times, got "
            f"{type(value).__name__}"
        )


@contextmanager
def unchanged(problem: Problem) -> Iterator[None]:
    """Restore buffers of the modules that the callables visibly use, and torch's random state, on exit."""
    modules = modules_of(problem.outer_loss, problem.inner)
    buffers = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]
    try:
        with _random.replayed(_random.capture(_random.devices_of(problem.leaves))):
            yield
    finally:
        with torch.no_grad():
            for buffer, kept in buffers:
                if not torch.equal(buffer, kept):
                    buffer.copy_(kept)


def seeded(generator: torch.Generator | None) -> torch.Generator:
    """The given generator, or a new one with a fixed seed."""
    return torch.Generator(device="cpu").manual_seed(0) if generator is None else generator


def _asymmetry(op: LinearOperator, like: Vector, generator: torch.Generator) -> Tensor:
    worst = like.space.scalar(0.0)
    for _ in range(3):
        x, y = like.random(generator), like.random(generator)
        ax, ay = op(x), op(y)
        size = x.norm() * ay.norm() + y.norm() * ax.norm()
        skew = (x.dot(ay) - y.dot(ax)).abs()
        worst = torch.maximum(worst, torch.where(skew == 0, 0.0, skew / size))
    return worst


def _from_arnoldi(h: Tensor, about: dict[str, Any]) -> Structure:
    """The Structure from A V_m = V_{m+1} H. The first m rows of H are symmetric if A is."""
    n, m, eps, symmetric = about["n"], about["steps"], about["eps"], about["symmetric"]
    values = torch.linalg.svdvals(h)  # those of A V_m, which lie between the extreme ones of A
    least, largest = float(values.min()), float(values.max())
    negligible = int((values <= 10 * math.sqrt(n) * eps * largest).sum())
    if symmetric:
        theta, y = torch.linalg.eigh((h[:m] + h[:m].mT) / 2)
        conditions = torch.ones_like(theta)
    else:
        theta, y = torch.linalg.eig(h[:m])
        conditions = torch.linalg.vector_norm(torch.linalg.inv_ex(y)[0], dim=1)  # columns of y have length 1
        conditions = torch.nan_to_num(conditions, torch.inf)
    errors = (h[m, m - 1].abs() * y[m - 1].abs() + max(m, 10) * eps * largest) * conditions
    order, outside = theta.real.argsort(), (1 - theta).abs()
    far = int(outside.argmax())
    radius = float(outside[far])
    known = radius if symmetric else max(radius - float(errors[far]), 0.0) if conditions[far] < FAR_FROM_NORMAL else 0.0
    identity = torch.eye(m + 1, m, dtype=h.dtype, device=h.device)
    return Structure(
        eigenvalues=tuple(theta[order].tolist()),
        eigenvalue_errors=tuple(errors[order].tolist()),
        norm=largest,
        least=least,
        negligible=negligible,
        condition=math.inf if negligible or not least else largest / least,
        radius=radius,
        radius_at_least=known,
        contraction=float(torch.linalg.matrix_norm(identity - h, 2)),
        **about,
    )


def _arnoldi(op: LinearOperator, like: Vector, steps: int, generator: torch.Generator) -> Tensor:
    """H [m + 1, m] (or [B, m + 1, m]) of A V_m = V_{m+1} H for m = steps ≤ n; the last row is 0 for m = n.

    With repeated Gram–Schmidt. A random vector continues an exhausted Krylov space, so that n steps span the space.
    """
    basis = Basis(like, steps + 1)
    first = like.random(generator)
    basis[0] = first / first.norm()
    h = like.space.scalar(0.0)[..., None, None].repeat(*[1] * like.space.batch_dims, steps + 1, steps)
    for j in range(steps):
        w = op(basis[j])
        rounding = 100 * w.space.eps * w.norm()
        for _ in range(2):
            part = basis.coefficients(w, j + 1)
            w, h[..., : j + 1, j] = w - basis.combine(part), h[..., : j + 1, j] + part
        if j + 1 < like.space.length:
            norm = w.norm()
            h[..., j + 1, j] = norm = torch.where(norm <= rounding, 0.0, norm)
            basis[j + 1] = _next_vector(w, norm, basis, j + 1, generator)
    return h


def _next_vector(w: Vector, norm: Tensor, basis: Basis, count: int, generator: torch.Generator) -> Vector:
    """w / ‖w‖, or for systems with w = 0 a random unit vector orthogonal to the basis."""
    spent = norm == 0
    if not bool(spent.any()):
        return w / norm
    other = w.random(generator)
    for _ in range(3):
        other = other - basis.combine(basis.coefficients(other, count))
        other = other / other.norm()
    return other.where(spent, w / torch.where(spent, 1.0, norm))


@dataclass(frozen=True)
class SolverChoice:
    """A solver's name, the products that it needs (None if no bound is known), and why it does not apply (or None).

    Example:
        >>> matrix = torch.diag(torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64))
        >>> structure = hg.diagnostics.operator_structure(hg.operators.matrix(matrix, symmetric=True), matrix[0])
        >>> choices = {choice.solver: choice for choice in hg.diagnostics.solver_choice(structure)}
        >>> choices["CG"].valid, choices["MINRES"].valid
        (False, True)
        >>> print(choices["CG"].against)
        A is indefinite, not positive definite
    """

    solver: str
    products: float | None
    against: str | None

    @property
    def valid(self) -> bool:
        return self.against is None


def solver_choice(structure: Structure, rtol: float = 1e-6) -> tuple[SolverChoice, ...]:
    """Whether each solver of hg.solvers, with its default options, applies to a system, and at what cost.

    The choices come from `valid_for` and `products_needed` of the solvers, which name the bounds. Unless the structure
    is `exact`, more products may be needed. Valid solvers come first, in order of their products.

    Raises: ValueError for an rtol outside (0, 1).

    Example:
        >>> found = hg.diagnostics.operator_structure(
        ...     hg.operators.matrix(torch.diag(torch.tensor([1.0, 4.0])), symmetric=True), torch.zeros(2)
        ... )
        >>> next(c.products for c in solver_choice(found, 1e-3) if c.solver == "CG")
        7
    """
    if not 0 < rtol < 1:
        raise ValueError(f"rtol must lie between 0 and 1, got {rtol!r}")
    choices = []
    for name in solvers.__all__:
        kind = getattr(solvers, name)
        if inspect.isclass(kind) and issubclass(kind, solvers.LinearSolver) and not inspect.isabstract(kind):
            against = kind().valid_for(structure)
            choices.append(SolverChoice(name, None if against else kind().products_needed(structure, rtol), against))
    return tuple(sorted(choices, key=lambda c: (not c.valid, math.inf if c.products is None else c.products)))


def solver_rows(structure: Structure) -> str:
    """`solver_choice` as three lines of a table."""
    choices = solver_choice(structure)
    rows = {
        "products for 1e-06": [f"{c.solver} {c.products:.0f}" for c in choices if c.products is not None],
        "no bound": [c.solver for c in choices if c.valid and c.products is None],
        "not valid": [c.solver for c in choices if not c.valid],
    }
    return "\n".join(f"{name:<22}{', '.join(names)}" for name, names in rows.items() if names)
