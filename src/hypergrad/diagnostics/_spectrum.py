"""Arnoldi's process, whose small matrix shows what an operator is like."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .._basis import Basis
from .._vector import Vector

Product = Callable[[Vector], Vector]

FAILURE = 1e-6  # the probability, over the random start, with which an upper bound may fail


def arnoldi(product: Product, like: Vector, steps: int, generator: torch.Generator) -> Tensor:
    """H [m + 1, m] (or [B, m + 1, m]) of A V_m = V_{m+1} H for m = steps ≤ n; the last row is 0 for m = n.

    Gram–Schmidt twice, against all vectors. Where the Krylov space is exhausted it goes on with a new random vector, so
    that n steps see all of A.

    Cost: m products; m + 1 vectors.
    """
    basis = Basis(like, steps + 1)
    first = like.random(generator)
    basis[0] = first / first.norm()
    h = like.space.scalar(0.0)[..., None, None].repeat(*[1] * like.space.batch_dims, steps + 1, steps)
    for j in range(steps):
        w, h[..., : j + 1, j], norm = orthogonalised(product(basis[j]), basis, j + 1)
        h[..., j + 1, j] = norm if j + 1 < like.space.length else 0.0
        if j + 1 < like.space.length:
            basis[j + 1] = next_vector(w, norm, basis, j + 1, generator)
    return h


def orthogonalised(w: Vector, basis: Basis, count: int) -> tuple[Vector, Tensor, Tensor]:
    """w without its components along the first vectors of the basis; these components; the norm of what is left.

    A rest that is rounding has norm 0.
    """
    size, components = w.norm(), torch.zeros_like(basis.coefficients(w, count))
    for _ in range(2):
        part = basis.coefficients(w, count)
        w, components = w - basis.combine(part), components + part
    norm = w.norm()
    return w, components, torch.where(norm <= 100 * w.space.eps * size, 0.0, norm)


def next_vector(w: Vector, norm: Tensor, basis: Basis, count: int, generator: torch.Generator) -> Vector:
    """w / ‖w‖, or a random unit vector orthogonal to the basis where nothing is left of w."""
    spent = norm == 0
    if not bool(spent.any()):
        return w / norm
    other = w.random(generator)
    for _ in range(3):
        other = other - basis.combine(basis.coefficients(other, count))
        other = other / other.norm()
    return other.where(spent, w / torch.where(spent, 1.0, norm))


def unseen(n: int, steps: int) -> float:
    """ε such that the largest eigenvalue λ of a symmetric positive semi-definite matrix is at most θ / (1 − ε).

        P(λ − θ > ελ) ≤ 1.648 √n exp(−√ε (2m − 1)) = FAILURE

    θ is the largest Ritz value after m steps from a random start.

    Source: Kuczyński and Woźniakowski 1992, Theorem 4.2.
    """
    if steps >= n:
        return 0.0
    return min(1.0, (math.log(1.648 * math.sqrt(n) / FAILURE) / (2 * steps - 1)) ** 2)
