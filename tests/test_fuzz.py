"""Random calls against dense NumPy in float64: an answer is right, or an error or a warning says that it may not be.

FUZZ=5000 pytest tests/test_fuzz.py takes that many calls; the suite takes a few hundred.
"""

from __future__ import annotations

import os
import warnings
from collections import OrderedDict

import numpy as np
import pytest
import torch

import hypergrad as hg

S = hg.solvers
CALLS = int(os.environ.get("FUZZ", "400"))
BATCH = 50
FORMS = ("inner_loss", "fp_map", "residual")
SOLVERS = {
    "default": lambda rtol: None,
    "Auto": lambda rtol: S.Auto(rtol=rtol),
    "CG": lambda rtol: S.CG(rtol=rtol),
    "CG, K": lambda rtol: S.CG(max_steps=12),
    "MINRES": lambda rtol: S.MINRES(rtol=rtol),
    "MINRES, K": lambda rtol: S.MINRES(max_steps=12),
    "GMRES": lambda rtol: S.GMRES(rtol=rtol),
    "GMRES, K": lambda rtol: S.GMRES(max_steps=6),
    "BiCGStab": lambda rtol: S.BiCGStab(rtol=rtol),
    "NormalCG": lambda rtol: S.NormalCG(rtol=rtol),
    "LSQR": lambda rtol: S.LSQR(rtol=rtol),
    "Dense": lambda rtol: S.Dense(),
    "FixedPoint": lambda rtol: S.FixedPoint(rtol=rtol),
    "Neumann, K": lambda rtol: S.Neumann(max_steps=8),
    "Nystrom": lambda rtol: S.Nystrom(rank=2),
    "OneStep": lambda rtol: S.OneStep(),
}
SYMMETRIC = ("CG", "CG, K", "MINRES", "MINRES, K", "Nystrom")
SPECTRA = ("easy", "ill", "singular", "indefinite", "identity", "zero", "unsymmetric", "tiny", "huge")
HOSTILE = ("none", "none", "none", "nan", "inf", "small", "large", "zero rhs")
CONTAINERS = ("tensor", "list", "dict", "ordered", "strided", "scalars")


class Case:
    """½wᵀAw − wᵀ(Bλ + c) (or its map or residual) with E = ½‖w − t‖² + ½‖λ‖², everything dense."""

    def __init__(self, seed: int):
        random = np.random.RandomState(seed)
        pick = lambda options: options[random.randint(len(options))]  # noqa: E731
        self.form, self.name, self.spectrum = pick(FORMS), pick(tuple(SOLVERS)), pick(SPECTRA)
        self.hostile, self.container = pick(HOSTILE), pick(CONTAINERS)
        self.dtype = pick((torch.float64, torch.float64, torch.float32))
        self.n, self.m = random.randint(1, 9), random.randint(1, 4)
        self.a = self.matrix(random)
        self.b, self.t = random.randn(self.n, self.m), random.randn(self.n)
        self.lam, w = random.randn(self.m), random.randn(self.n)
        scale = {"small": 1e-30, "large": 1e18 if self.dtype is torch.float32 else 1e30}.get(self.hostile, 1.0)
        self.c = self.a @ w - self.b @ self.lam
        self.w, self.t = w, (w if self.hostile == "zero rhs" else w + scale * self.t)
        if self.hostile in ("nan", "inf"):
            self.t[random.randint(self.n)] = np.nan if self.hostile == "nan" else np.inf

    def matrix(self, random: np.random.RandomState) -> np.ndarray:
        n = self.n
        q = np.linalg.qr(random.randn(n, n))[0]
        values = random.uniform(0.3, 1.5, n)
        if self.spectrum == "ill":
            values = np.logspace(-6, 0, n)
        if self.spectrum == "singular":
            values[: max(1, n // 2)] = 0.0
        if self.spectrum == "indefinite":
            values[0] *= -1
        if self.spectrum in ("identity", "zero"):
            values = np.full(n, float(self.spectrum == "identity"))
        if self.spectrum == "unsymmetric":
            return np.eye(n) + 0.3 * random.randn(n, n) / np.sqrt(n)
        return q @ np.diag(values * {"tiny": 1e-12, "huge": 1e12}.get(self.spectrum, 1.0)) @ q.T

    @property
    def symmetric(self) -> bool:
        return self.spectrum != "unsymmetric"

    def truth(self) -> np.ndarray | None:
        """∇f with the least-squares adjoint; None where the answer is not determined, or not finite."""
        a = (self.a + self.a.T) / 2 if self.form == "inner_loss" else self.a
        if self.name == "Nystrom":  # it solves the damped system
            a = a + S.Nystrom().damping * np.eye(self.n)
        gradient = self.w - self.t
        if not np.isfinite(gradient).all():
            return None
        v = np.linalg.pinv(a.T, rcond=1e-10) @ gradient
        consistent = np.linalg.norm(a.T @ v - gradient) <= 1e-8 * np.linalg.norm(gradient)
        return self.lam + self.b.T @ v if consistent else None

    def tree(self, w: np.ndarray):
        x = torch.tensor(w, dtype=self.dtype)
        if self.container == "list":
            return [x[:1].clone(), x[1:].clone()]
        if self.container in ("dict", "ordered"):
            kind = dict if self.container == "dict" else OrderedDict
            return kind([("z", x[:1].clone()), ("a", x[1:].clone())])
        if self.container == "strided":
            return torch.stack([x, x], 1)[:, 0]
        return [y.clone() for y in x] if self.container == "scalars" else x

    def flat(self, tree) -> torch.Tensor:
        if isinstance(tree, torch.Tensor):
            return tree
        leaves = [tree["z"], tree["a"]] if isinstance(tree, dict) else list(tree)
        return torch.cat([x.reshape(-1) for x in leaves])

    def like(self, tree, x: torch.Tensor):
        if isinstance(tree, torch.Tensor):
            return x
        if isinstance(tree, dict):
            return {"a": x[1:], "z": x[:1]}
        if self.container == "scalars":
            return list(x)
        return [x[:1], x[1:]]

    def call(self) -> tuple[hg.Hypergradient, list[warnings.WarningMessage]]:
        a, b, c, t = (torch.tensor(x, dtype=self.dtype) for x in (self.a, self.b, self.c, self.t))
        lam = torch.tensor(self.lam, dtype=self.dtype, requires_grad=True)

        def residual(tree, lam):
            return self.like(tree, a @ self.flat(tree) - b @ lam - c)

        def fp_map(tree, lam):
            return self.like(tree, self.flat(tree) - (a @ self.flat(tree) - b @ lam - c))

        def inner_loss(tree, lam):
            w = self.flat(tree)
            return w @ (a @ w) / 2 - w @ (b @ lam + c)

        form = {"inner_loss": inner_loss, "fp_map": fp_map, "residual": residual}[self.form]
        outer = lambda tree, lam: ((self.flat(tree) - t) ** 2).sum() / 2 + (lam**2).sum() / 2  # noqa: E731
        rtol = 1e-10 if self.dtype is torch.float64 else 1e-5
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            result = hg.implicit.grad(
                outer,
                params=self.tree(self.w),
                hparams=lam,
                solver=SOLVERS[self.name](rtol),
                symmetric=self.symmetric and (self.form == "inner_loss" or self.name in SYMMETRIC),
                **{self.form: form},
            )
        return result, seen

    def __str__(self) -> str:
        return f"{self.name}, {self.form}, {self.spectrum}, {self.hostile}, {self.container}, {self.dtype}, n={self.n}"


def silent_failure(seed: int) -> str | None:
    """What is wrong without a word of it; None for what is right, an error or a warning."""
    case = Case(seed)
    if case.name in SYMMETRIC and not case.symmetric and case.form != "inner_loss":
        return None
    try:
        result, seen = case.call()
    except (ValueError, TypeError):
        return None
    if seen:
        return None
    truth = case.truth()
    grads = result.grads.double().numpy()
    if truth is None:
        return None if not result.solution.ok else f"{case}: {result.solution.status.name} where nothing is determined"
    # What rounding does to v: the condition number of A, and one unit in the last place of the gradient.
    values = np.linalg.svd(case.a, compute_uv=False)
    condition = values[0] / values[values > 1e-10 * values[0]].min() if values[0] else 1.0
    eps = 1e-10 if case.dtype is torch.float64 else 1e-4
    size = np.linalg.norm(truth) + np.linalg.norm(case.b) * np.linalg.norm(truth - case.lam)
    allowed = min(1.0, 30 * eps * condition) * size
    few = case.name.endswith("K") or case.name in ("OneStep", "Nystrom", "default")
    allowed = max(allowed, (0.35 if case.name != "default" else 1e-3 * condition) * size) if few else allowed
    off = np.linalg.norm(grads - truth)
    return None if off <= allowed else f"{case}: off by {off / size:.1e}, {result.solution.message}"


@pytest.mark.parametrize("first", range(0, CALLS, BATCH))
def test_no_silent_failure(first):
    failures = [text for seed in range(first, first + BATCH) if (text := silent_failure(seed))]
    assert not failures, "\n".join(failures)
