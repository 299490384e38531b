"""A grid of easy and difficult linear systems A x = b in NumPy, with the properties of each by dense algebra.

A `System` is one system, or B independent ones of the same size ([B, n, n]). Its properties (symmetry, rank,
definiteness, solution, residuals) are computed by numpy.linalg, one system after the other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

import hypergrad as hg

Array = np.ndarray
EPS = np.finfo(np.float64).eps


@dataclass(frozen=True)
class System:
    """`a` is [n, n] or [B, n, n], `b` is [], [n] or [B, n]; lists below have one entry for each system."""

    name: str
    a: Array
    b: Array

    @cached_property
    def matrices(self) -> Array:
        return self.a if self.a.ndim == 3 else self.a[None]

    @cached_property
    def sides(self) -> Array:
        return self.b if self.a.ndim == 3 else self.b.reshape(1, -1)

    @property
    def n(self) -> int:
        return self.a.shape[-1]

    @cached_property
    def finite(self) -> list[bool]:
        return [
            bool(np.isfinite(a).all() and np.isfinite(b).all()) for a, b in zip(self.matrices, self.sides, strict=True)
        ]

    @cached_property
    def symmetric(self) -> list[bool]:
        return [np.array_equal(a, a.T, equal_nan=True) for a in self.matrices]

    @cached_property
    def singular_values(self) -> list[Array]:
        """Singular values in falling order. Those of rounding level are set to 0; all are NaN where A is not finite."""
        every = [np.linalg.svd(a, compute_uv=False) if np.isfinite(a).all() else a[0] * np.nan for a in self.matrices]
        return [np.where(s <= 10 * self.n * EPS * s[:1], 0.0, s) for s in every]

    @cached_property
    def norm(self) -> Array:
        return np.array([s[0] for s in self.singular_values])

    @cached_property
    def condition(self) -> Array:
        """‖A‖ ‖A⁻¹‖; inf where A is singular or zero, NaN where it is not finite."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.array([s[0] / s[-1] if s[0] > 0 or np.isnan(s[0]) else np.inf for s in self.singular_values])

    @cached_property
    def regular(self) -> list[bool]:
        return [bool(np.isfinite(c)) and f for c, f in zip(self.condition, self.finite, strict=True)]

    @cached_property
    def definite(self) -> list[bool]:
        """Symmetric with positive eigenvalues."""
        checks = zip(self.matrices, self.symmetric, self.regular, strict=True)
        return [bool(s and r and np.linalg.eigvalsh(a)[0] > 0) for a, s, r in checks]

    def contraction(self, step: float) -> Array:
        """‖I − ηA‖₂, the factor of x ← x + η (b − Ax); NaN where A is not finite."""
        maps = np.eye(self.n) - step * self.matrices
        return np.array([np.linalg.norm(m, 2) if np.isfinite(m).all() else np.nan for m in maps])

    @cached_property
    def solutions(self) -> list[Array]:
        """A⁻¹b, the least-squares solution of least norm where A is singular, NaN where A or b is not finite."""
        out = []
        for a, b, regular, finite in zip(self.matrices, self.sides, self.regular, self.finite, strict=True):
            if not finite:
                out.append(np.full(self.n, np.nan))
            elif regular:
                x = np.linalg.solve(a, b)
                out.append(x + np.linalg.solve(a, b - a @ x))
            else:
                out.append(np.linalg.lstsq(a, b, rcond=10 * self.n * EPS)[0])
        return out

    @cached_property
    def consistent(self) -> list[bool]:
        return [bool(r <= 1e-12 * norm(b)) for r, b in zip(self.residuals(self.solutions), self.sides, strict=True)]

    def residuals(self, x: Array | list[Array]) -> Array:
        """‖b − Ax‖ of each system."""
        xs = np.asarray(x).reshape(self.sides.shape)
        with np.errstate(invalid="ignore", over="ignore"):
            return np.array([norm(b - a @ x) for a, b, x in zip(self.matrices, self.sides, xs, strict=True)])

    def rounding(self, x: Array | list[Array]) -> Array:
        """How far two float64 evaluations of ‖b − Ax‖ may lie apart."""
        xs = np.asarray(x).reshape(self.sides.shape)
        with np.errstate(invalid="ignore", over="ignore"):
            systems = zip(self.singular_values, xs, self.sides, strict=True)
            sizes = [s[0] * norm(x) + norm(b) for s, x, b in systems]
            return 2 * self.n * EPS * np.array(sizes)

    def stacked(self) -> System:
        """The same system as a batch of one."""
        return self if self.a.ndim == 3 else replace(self, a=self.a[None], b=self.b.reshape(1, -1))

    def damped(self, gamma: float) -> System:
        """A + γI."""
        return replace(self, a=self.a + gamma * np.eye(self.n)) if gamma else self

    def single(self, i: int) -> System:
        """One system of a batch, without the batch axis."""
        return replace(self, a=self.matrices[i], b=self.sides[i])

    def operator(self, tag: str | None = None, dtype: torch.dtype = torch.float64) -> hg.operators.LinearOperator:
        """The operator with this declaration ("symmetric", "positive_definite" or "none"); None: with what is true."""
        if tag is None:
            tag = "symmetric" if all(self.symmetric) else "none"
        tags = {} if tag == "none" else {tag: True}
        a = torch.tensor(self.a, dtype=dtype)
        if self.b.ndim:
            return hg.operators.matrix(a, **tags)
        return hg.operators.function(lambda v: a[0, 0] * v, lambda v: a[0, 0] * v, **tags)

    def rhs(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.tensor(self.b, dtype=dtype)

    def start(self, seed: int = 0) -> torch.Tensor:
        """A random x0 with about the norm of b."""
        draw = np.random.default_rng(seed).standard_normal(self.sides.shape)
        size = np.array([norm(b[np.isfinite(b)]) or 1.0 for b in self.sides])
        return torch.tensor((draw * size[:, None]).reshape(self.b.shape))


def norm(x: Array | torch.Tensor) -> float:
    """‖x‖₂ without underflow or overflow."""
    x = np.asarray(x)
    size = np.max(np.abs(x), initial=0.0)
    return float(size * np.linalg.norm(x / size)) if 0 < size < np.inf else float(size)


def orthogonal(rng: np.random.Generator, n: int) -> Array:
    return np.linalg.qr(rng.standard_normal((n, n))).Q


def with_spectrum(eigenvalues: Array, seed: int = 0) -> Array:
    """A symmetric matrix of these eigenvalues, symmetric to the last bit."""
    q = orthogonal(np.random.default_rng(seed), len(eigenvalues))
    a = (q * eigenvalues) @ q.T
    return (a + a.T) / 2


def with_singular_values(values: Array, seed: int = 0) -> Array:
    """A non-symmetric matrix of these singular values."""
    rng = np.random.default_rng(seed)
    return (orthogonal(rng, len(values)) * values) @ orthogonal(rng, len(values))


def logspace(condition: float, n: int) -> Array:
    return np.logspace(-np.log10(condition), 0, n)


def side(n: int, seed: int = 7) -> Array:
    return np.random.default_rng(seed).standard_normal(n)


def poisson(n: int, dims: int = 1) -> Array:
    one = 2 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1)
    return one if dims == 1 else np.kron(one, np.eye(n)) + np.kron(np.eye(n), one)


def graph_laplacian(n: int) -> Array:
    """The Laplacian of a cycle with a chord. Its entries are integers, so that A·1 = 0 holds to the last bit."""
    adjacency = np.roll(np.eye(n), 1, 0) + np.roll(np.eye(n), -1, 0)
    adjacency[0, n // 2] = adjacency[n // 2, 0] = 1
    return np.diag(adjacency.sum(0)) - adjacency


def singular_nonsymmetric(n: int, rank: int, seed: int = 5) -> Array:
    """A singular matrix as a product of integer factors, so that the rank is exact."""
    rng = np.random.default_rng(seed)
    return rng.integers(-2, 3, (n, rank)).astype(float) @ rng.integers(-2, 3, (rank, n))


def spoiled(a: Array, value: float) -> Array:
    """A with `value` in the entries (1, 2) and (2, 1); it is symmetric if A is."""
    a = a.copy()
    a[1, 2] = a[2, 1] = value
    return a


def batch(name: str, *systems: tuple[Array, Array]) -> System:
    return System(name, np.stack([a for a, _ in systems]), np.stack([b for _, b in systems]))


def grid() -> list[System]:
    n = 20
    spd = {c: with_spectrum(logspace(c, n), 1) for c in (10.0, 1e3, 1e6)}
    skewed = {c: with_singular_values(logspace(c, n), 2) for c in (10.0, 1e3, 1e8)}
    near_identity = np.eye(n) + 0.5 * with_singular_values(logspace(10, n), 3)
    contraction = np.eye(n) - 0.8 * with_singular_values(logspace(10, n), 4)
    indefinite = with_spectrum(np.r_[-logspace(10, n // 2), logspace(10, n // 2)], 5)
    laplacian, low = graph_laplacian(n), singular_nonsymmetric(n, n - 4)
    b = side(n)
    integers = np.random.default_rng(8).integers(-3, 4, n).astype(float)
    unbalanced = np.eye(n)[0]
    shift = np.roll(np.eye(n), 1, 0)
    skew = np.triu(with_singular_values(logspace(10, n), 6), 1)
    wide = np.logspace(8, 0, n)
    m = 12
    small = {c: with_spectrum(logspace(c, m), 9) for c in (2.0, 10.0, 1e3, 1e5)}
    bs = [side(m, seed) for seed in range(6)]
    tilted = [np.eye(m) - q * with_singular_values(logspace(10, m), 10) for q in (0.1, 0.5, 0.9)]
    m_indefinite = with_spectrum(np.r_[-logspace(10, m // 2), logspace(10, m // 2)], 11)
    return [
        System("spd 10", spd[10.0], b),
        System("spd 1e3", spd[1e3], b),
        System("spd 1e6", spd[1e6], b),
        System("spd above 1", 50 * spd[1e3], b),
        System("few eigenvalues", np.diag(np.repeat([0.1, 1.0, 7.0, 30.0], n // 4)), b),
        System("poisson 1d", poisson(30), side(30)),
        System("poisson 2d", poisson(6, 2), side(36)),
        System("near identity", near_identity, b),
        System("contraction .8", contraction, b),
        System("nonsymmetric 10", skewed[10.0], b),
        System("nonsymmetric 1e3", skewed[1e3], b),
        System("nonsymmetric 1e8", skewed[1e8], b),
        System("triangular, far from normal", np.eye(n) + 3 * np.triu(np.ones((n, n)), 1), b),
        System("symmetric indefinite", indefinite, b),
        System("negative definite", -spd[10.0], b),
        System("zero diagonal", np.kron(np.eye(n // 2), np.array([[0.0, 1.0], [1.0, 0.0]])), b),
        System("singular symmetric consistent", laplacian, laplacian @ integers),
        System("singular symmetric inconsistent", laplacian, b + 1.0),
        System("singular indefinite inconsistent", np.diag(np.r_[0.0, 0.0, -np.ones(8), np.arange(1.0, 11.0)]), b),
        System("singular consistent", low, low @ integers),
        System("singular inconsistent", low, b),
        System("nilpotent", np.eye(n, k=1), b),
        System("zero", np.zeros((n, n)), b),
        System("cyclic shift", shift, unbalanced),
        System("skew-symmetric", skew - skew.T, b),
        System("NaN in A", spoiled(spd[10.0], np.nan), b),
        System("inf in A", spoiled(spd[10.0], np.inf), b),
        System("NaN in b", spd[10.0], np.where(np.arange(n) == 3, np.nan, b)),
        System("inf in b", spd[10.0], np.where(np.arange(n) == 3, np.inf, b)),
        System("b = 0", spd[10.0], np.zeros(n)),
        System("b = 0, nonsymmetric", contraction, np.zeros(n)),
        System("identity", np.eye(n), b),
        System("A = 4I", 4 * np.eye(n), b),
        System("A = 1e-3 I", 1e-3 * np.eye(n), b),
        System("wide scale", np.diag(wide), b),
        System("wide scale, one large b", np.diag(wide), np.where(np.arange(n) == 0, 1e8, b)),
        System("b of 1e-20", spd[10.0], 1e-20 * b),
        System("b of 1e20", spd[10.0], 1e20 * b),
        System("b of 1e-200", spd[10.0], 1e-200 * b),
        System("b of 1e200", contraction, 1e200 * b),
        System("1×1", np.array([[0.7]]), np.array([-1.3])),
        System("0-d", np.array([[0.7]]), np.array(-1.3)),
        System("1×1 negative", np.array([[-0.7]]), np.array([-1.3])),
        batch("batch spd", *zip([*small.values(), 3 * np.eye(m)], bs, strict=False)),
        batch("batch spd, one indefinite", (small[2.0], bs[0]), (m_indefinite, bs[1]), (small[1e3], bs[2])),
        batch("batch spd, one NaN", (small[10.0], bs[0]), (spoiled(small[2.0], np.nan), bs[1]), (small[2.0], bs[2])),
        batch("batch spd, one b = 0", (small[10.0], bs[0]), (small[2.0], 0 * bs[1]), (small[2.0], 1e-30 * bs[2])),
        batch("batch nonsymmetric", *zip(tilted, bs, strict=False)),
        batch(
            "batch nonsymmetric, one singular",
            (tilted[0], bs[0]),
            (singular_nonsymmetric(m, m - 2), bs[1]),
            (tilted[1], bs[2]),
        ),
        batch("batch nonsymmetric, one inf in b", (tilted[0], bs[0]), (tilted[2], bs[1] * np.inf), (tilted[1], bs[2])),
    ]


GRID = {system.name: system for system in grid()}
