"""A generator of random problems with a closed form, solved by dense NumPy in float64.

    F(w, λ) = ρ(λ) (A w − B s(λ) − c),    s = λ + λ²/2,    ρ = 2 / (2 + ‖λ‖²),    E = ½‖w − w₀ − d‖² + ½‖λ‖²

w₀ solves F(w, λ) = 0, and ∇₁E = −d there. ρ changes no solution, but the operator depends on λ through it.
"""

import math
from collections import OrderedDict, namedtuple

import numpy as np
import optree
import torch

Pair = namedtuple("Pair", ["z", "a"])
SPECTRA = (
    "easy",
    "easy",
    "ill",
    "singular",
    "inconsistent",
    "indefinite",
    "identity",
    "zero",
    "unsymmetric",
    "tiny",
    "huge",
)
HOSTILE = ("none", "none", "none", "nan", "inf", "small", "large", "zero rhs")
CONTAINERS = ("tensor", "list", "dict", "ordered", "named", "strided", "scalars", "empty", "mixed", "frozen")


class Case:
    """A random problem, its containers, its dtype and its kind of extreme numbers (`hostile`)."""

    def __init__(self, seed: int):
        self.random = random = np.random.RandomState(seed)
        self.pick = lambda options: options[random.randint(len(options))]
        self.spectrum, self.hostile, self.container = self.pick(SPECTRA), self.pick(HOSTILE), self.pick(CONTAINERS)
        self.outer_container = self.pick(("tensor", "tensor", "tensor", "list", "frozen", "strided"))
        self.dtype = self.pick((torch.float64, torch.float64, torch.float32))
        self.n, self.m = random.randint(2, 9), random.randint(2, 5)
        n, m = self.n, self.m
        self.a, self.b = self.matrix(random), random.randn(n, m) / 2
        self.lam, self.w = random.uniform(-0.7, 0.7, m), random.randn(n).astype(np.float32).astype(float)
        if self.spectrum in ("singular", "inconsistent", "zero"):
            self.b = self.a @ np.linalg.pinv(self.a, rcond=1e-10) @ self.b
        self.c = self.a @ self.w - self.b @ (self.lam + self.lam**2 / 2)
        off = random.randn(n)
        if self.spectrum in ("singular", "zero"):
            off = self.a.T @ off
        scale = {"small": 1e-30, "large": 1e15 if self.dtype is torch.float32 else 1e30, "zero rhs": 0.0}
        self.d = scale.get(self.hostile, 1.0) * off
        if self.hostile in ("nan", "inf"):
            self.d[random.randint(n)] = np.nan if self.hostile == "nan" else np.inf
        self.free = np.ones(n, bool)
        self.learned = np.ones(m, bool)
        self.slack = 1e-8
        if self.outer_container == "frozen":
            self.learned[0] = False

    def matrix(self, random: np.random.RandomState) -> np.ndarray:
        n = self.n
        q = np.linalg.qr(random.randn(n, n))[0]
        values = random.uniform(0.3, 1.5, n)
        if self.spectrum == "ill":
            values = np.logspace(-6, 0, n)
        if self.spectrum in ("singular", "inconsistent"):
            values[: max(1, n // 2)] = 0.0
        if self.spectrum == "indefinite":
            values[0] *= -1
        if self.spectrum in ("identity", "zero"):
            values = np.full(n, float(self.spectrum == "identity"))
        if self.spectrum == "unsymmetric":
            return np.eye(n) + 0.3 * random.randn(n, n) / np.sqrt(n)
        a = q @ np.diag(values * {"tiny": 1e-12, "huge": 1e12}.get(self.spectrum, 1.0)) @ q.T
        return (a + a.T) / 2

    @property
    def symmetric(self) -> bool:
        return self.spectrum != "unsymmetric"

    def freeze(self) -> None:
        """Make the first entry of w a constant if the container is "frozen"."""
        self.free[0] = self.container != "frozen"

    # The truth, as functions of λ.

    def rho(self, lam):
        return 2 / (2 + lam @ lam)

    def rhs(self, lam):
        return self.b @ (lam + lam**2 / 2) + self.c

    def inverse(self, shift: float = 0.0) -> np.ndarray:
        f = self.free
        out = np.zeros((self.n, self.n))
        out[np.ix_(f, f)] = np.linalg.pinv(self.a[np.ix_(f, f)] + shift * np.eye(f.sum()), rcond=1e-10)
        return out

    def solution(self, lam) -> np.ndarray:
        return self.w + self.inverse() @ (self.rhs(lam) - self.rhs(self.lam))

    def jacobian(self, lam, shift: float = 0.0) -> np.ndarray:
        """dw/dλ."""
        return self.inverse(shift / self.rho(lam)) @ self.b @ np.diag(1 + lam)

    def slope(self, w) -> np.ndarray:
        """∇₁E, with 0 for frozen entries."""
        return np.where(self.free, w - self.w - self.d, 0.0)

    def determined(self, *gradients: np.ndarray) -> bool:
        """Whether all numbers are finite and Aᵀv = ∇₁E has a solution up to a relative residual of `slack`."""
        f = self.free
        a = self.a[np.ix_(f, f)].T
        for g in (g[f] for g in gradients):
            if not np.isfinite(g).all():
                return False
            v = np.linalg.pinv(a, rcond=1e-10) @ g
            if np.linalg.norm(a @ v - g) > self.slack * np.linalg.norm(g):
                return False
        return True

    def first(self, lam=None, shift: float = 0.0) -> np.ndarray | None:
        """∇f(λ)."""
        lam = self.lam if lam is None else lam
        slope = self.slope(self.solution(lam))
        if not self.determined(slope):
            return None
        return (lam + self.jacobian(lam, shift).T @ slope) * self.learned

    def second(self) -> np.ndarray | None:
        """∇²f(λ)."""
        slope = self.slope(self.w)
        if not self.determined(slope, *self.inverse().T):
            return None
        j = self.jacobian(self.lam)
        return np.eye(self.m) + j.T @ j + np.diag(self.b.T @ self.inverse().T @ slope)

    def size(self) -> float:
        """The norm of the terms of which ∇f is the sum; rounding errors are proportional to it."""
        norm = np.linalg.norm
        with np.errstate(over="ignore", invalid="ignore"):
            slope = norm(self.slope(self.w))
            terms = norm(self.a) * norm(self.w) + norm(self.rhs(self.lam))  # these cancel in F = 0
            size = norm(self.lam) * (1 + norm(self.inverse()) * slope * terms) + norm(self.jacobian(self.lam)) * slope
        return math.inf if math.isnan(size) else size  # NaN comes from infinite terms

    @property
    def condition(self) -> float:
        values = np.linalg.svd(self.a[np.ix_(self.free, self.free)], compute_uv=False)
        return values[0] / values[values > 1e-10 * values[0]].min() if values[0] else 1.0

    # The problem in torch.

    def tensor(self, x) -> torch.Tensor:
        return torch.tensor(x, dtype=self.dtype)

    def tree(self, x: np.ndarray, container: str | None = None):
        """n numbers in the case's container."""
        kind, x = container or self.container, self.tensor(x)
        if kind in ("list", "frozen", "mixed"):
            parts = [x[:1].clone(), x[1:].clone()]
            if kind == "mixed":
                parts[0] = parts[0].float()
            if kind == "frozen":
                parts[1].requires_grad_()
            return parts
        if kind == "named":
            return Pair(x[:1].clone(), x[1:].clone())
        if kind in ("dict", "ordered"):
            return (dict if kind == "dict" else OrderedDict)([("z", x[:1].clone()), ("a", x[1:].clone())])
        if kind == "strided":
            return torch.stack([x, x], 1)[:, 0]
        if kind == "empty":
            return [x[:0].clone(), x.clone()]
        return [y.clone() for y in x] if kind == "scalars" else x

    def flat(self, tree) -> torch.Tensor:
        """The n numbers of a tree, differentiably."""
        if isinstance(tree, torch.Tensor):
            return tree
        leaves = [tree["z"], tree["a"]] if isinstance(tree, dict) else list(tree)
        return torch.cat([x.reshape(-1).to(self.dtype) for x in leaves])

    def like(self, tree, x: torch.Tensor):
        """n numbers in the container of a tree; a plain dict for any mapping."""
        if isinstance(tree, torch.Tensor):
            return x
        if isinstance(tree, dict):
            return {"a": x[1:], "z": x[:1]}
        if isinstance(tree, Pair):
            return Pair(x[:1], x[1:])
        if self.container == "scalars":
            return list(x)
        k = 0 if self.container == "empty" else 1
        return [x[:k].to(tree[0].dtype), x[k:]]

    def hparams(self, lam=None):
        """λ in its container, requiring grad."""
        lam = self.tensor(self.lam if lam is None else lam)
        if self.outer_container == "strided":
            return torch.stack([lam, lam], 1).requires_grad_()[:, 1].detach().requires_grad_()
        if self.outer_container in ("list", "frozen"):
            return [lam[:1].clone().requires_grad_(self.outer_container == "list"), lam[1:].clone().requires_grad_()]
        return lam.requires_grad_()

    def outer_flat(self, hparams) -> torch.Tensor:
        if isinstance(hparams, torch.Tensor):
            return hparams
        return torch.cat([x.reshape(-1) for x in hparams])

    def functions(self):
        """inner_loss, fp_map, residual and outer_loss of (params, hparams)."""
        a, b, c, w0, d = map(self.tensor, (self.a, self.b, self.c, self.w, self.d))

        def residual(tree, hparams):
            lam = self.outer_flat(hparams)
            f = 2 / (2 + lam @ lam) * (a @ self.flat(tree) - b @ (lam + lam**2 / 2) - c)
            return self.like(tree, f)

        def fp_map(tree, hparams):
            f = self.flat(residual(tree, hparams))
            return self.like(tree, self.flat(tree) - f)

        def inner_loss(tree, hparams):
            w, lam = self.flat(tree), self.outer_flat(hparams)
            return 2 / (2 + lam @ lam) * (w @ (a @ w) / 2 - w @ (b @ (lam + lam**2 / 2) + c))

        def outer_loss(tree, hparams):
            return ((self.flat(tree) - w0 - d) ** 2).sum() / 2 + (self.outer_flat(hparams) ** 2).sum() / 2

        return {"inner_loss": inner_loss, "fp_map": fp_map, "residual": residual}, outer_loss

    def __str__(self) -> str:
        about = (self.spectrum, self.hostile, self.container, self.outer_container, self.dtype, f"n={self.n}")
        return ", ".join(map(str, about))


def numbers(tree) -> np.ndarray:
    """All numbers of a tree as one array in float64, in the order of an optree flattening."""
    return np.concatenate([x.detach().double().reshape(-1).numpy() for x in optree.tree_leaves(tree)])
