"""Logistic and softmax regression, and ridge regression without factors, by Newton's method and CG.

    ∇g = Xᵀ(s ∘ ℓ'(XW)) + a ∘ W,    A V = Xᵀ(s ∘ ℓ''(XW) XV) + a ∘ V,    A V = ∇E(W),    ∂E/∂ log aⱼ = −aⱼ ⟨wⱼ, vⱼ⟩

The B systems of all folds (and targets, for the squared loss) are solved in parallel. They differ in the weights of
the rows of one X, so one product with X serves all of them, and also gives their validation predictions. If X is too
large to factorise, steps and adjoints of low accuracy are computed in float32, gradients and solutions in float64.
Columns of a sparse X that are zero in every training row are left out: their coefficients and slopes are zero.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from ..operators import function
from ..solvers import CG, Status
from ._folds import Folds

SMALL = 150  # systems with at most so many coefficients are factorised for each solve
DENSE, MEMORY = 1_000, 60_000_000  # the most coefficients, and numbers in all factors, if factors precondition CG
INEXACT = 200  # the most steps of CG for a Newton step, which may be inexact
STALE = 15  # if CG takes more steps than this, the factors are computed again
LARGE = 100_000  # the refit of a classifier with more coefficients is only as accurate as the search
SINGLE = 1e-4  # relative residual down to which CG runs in float32


def squared(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """½ Σ_c (z − y)² and its derivative in z."""
    return (z - y).square().sum(-1) / 2, z - y


def logistic(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The log-loss of one logit against y in {0, 1}, or of C logits against one-hot y, and its derivative in z."""
    if z.shape[-1] == 1:
        return (torch.nn.functional.softplus(z) - y * z).sum(-1), torch.sigmoid(z) - y
    return torch.logsumexp(z, -1) - (y * z).sum(-1), torch.softmax(z, -1) - y


class Linear:
    """The folds of a penalised linear model with the inner loss `inner`, solved by products with X.

    Args:
        X: [n, d], dense or a scipy.sparse matrix.
        y: [n, C] of one problem, or [n, T] of T problems if `inner` is `squared`.
        outer: (predictions [R, C], y [R, C]) ↦ losses of the rows and their derivatives; [R, T] for `squared`.
        solution: the user's solver, (strengths, targets) ↦ W [B, d + 1, C]; None for Newton's method.
    """

    def __init__(
        self,
        X: Any,
        y: Tensor,
        folds: Folds,
        inner: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        outer: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        fit_intercept: bool = True,
        solution: Callable[[Tensor, Tensor], Tensor] | None = None,
    ):
        self.y, self.folds, self.inner, self.outer, self.given = y, folds, inner, outer, solution
        self.fit_intercept, self.shape = fit_intercept, X.shape
        self.separate = inner is squared
        self.C = 1 if self.separate else y.shape[1]
        self.free_sum = float(self.C > 1 and fit_intercept)  # 1 if the loss ignores the sum of intercepts (softmax)
        self.used = folds.train.any(0).nonzero()[:, 0]  # the training rows of all folds
        self.train = folds.train[:, self.used]
        self.kept = torch.arange(X.shape[1])  # columns that have a coefficient
        if scipy.sparse.issparse(X):
            X = scipy.sparse.csr_array(X)
            self.kept = torch.from_numpy(np.unique(X[self.used.numpy()].indices).astype("int64"))
            ones = scipy.sparse.csr_array((X.shape[0], 1)) if not fit_intercept else [[1.0]] * X.shape[0]
            rows = scipy.sparse.csr_array(scipy.sparse.hstack([X[:, self.kept.numpy()], ones], format="csr"))
            self.every, self.X = compressed(rows), compressed(rows[self.used.numpy()])
            self.every_t, self.Xt = compressed(rows.T.tocsr()), compressed(rows[self.used.numpy()].T.tocsr())
        else:
            self.every = torch.cat([X, torch.full((len(X), 1), float(fit_intercept), dtype=X.dtype)], 1)
            self.X = self.every if len(self.used) == len(X) else self.every[self.used]
            self.every_t, self.Xt = self.every.mT, self.X.mT
        targets = y.shape[1] if self.separate else 1
        self.W = y.new_zeros(folds.number, targets, len(self.kept) + 1, self.C)
        self.V = torch.zeros_like(self.W)
        size, systems = self.W[0, 0].numel(), folds.number
        self.dense = not scipy.sparse.issparse(X) and size <= DENSE and systems * size**2 <= MEMORY
        self.dense = self.dense and not self.separate
        self.factors: Tensor | None = None
        self.single: tuple[Tensor, Tensor] | None = None  # X and Xᵀ in float32
        self.rtol = 1e-8 if self.dense else 1e-2

    def scale(self) -> float:
        """The mean eigenvalue of XᵀSX, computed as if its columns were orthogonal to the vector of ones."""
        total = self.train.mean(0)
        values = self.X.values() if self.X.layout == torch.sparse_csr else self.X
        if self.X.layout == torch.sparse_csr:
            counts = self.X.crow_indices().diff()
            squares = torch.repeat_interleave(total, counts) @ values.square()
        else:
            squares = (total @ values.square()).sum()
        return float(squares - (total.sum() if self.fit_intercept else 0.0)) / min(self.shape)

    # Products with all systems at once: [B, d + 1, C] ↔ [n, B, C].

    def _times(self, w: Tensor, x: Tensor | None = None) -> Tensor:
        return ((self.X if x is None else x) @ w.permute(1, 0, 2).flatten(1)).unflatten(1, w.shape[::2])

    def _transposed(self, r: Tensor, x: Tensor | None = None) -> Tensor:
        return ((self.Xt if x is None else x) @ r.flatten(1)).unflatten(1, r.shape[1:]).permute(1, 0, 2)

    def _curved(self, z: Tensor, zv: Tensor) -> Tensor:
        """ℓ''(z) zv."""
        if self.separate:
            return zv
        if self.C == 1:
            p = torch.sigmoid(z)
            return p * (1 - p) * zv
        p = torch.softmax(z, -1)
        return p * (zv - (p * zv).sum(-1, keepdim=True))

    def evaluate(
        self, strengths: Tensor, targets: Tensor, gradient: bool = True, tighter: bool | str = False
    ) -> tuple[Tensor, Tensor]:
        """Losses [F, T] (T = 1 for a classifier) and slopes like strengths, [T, d] or [C, d]."""
        folds, rtol = self.folds.number, self.rtol if gradient else 1e-4 if self.dense else 0.1
        rtol = 1e-11 if tighter == "all" else rtol / (100 if self.dense else 10) if tighter else rtol
        which = targets if self.separate else torch.zeros(1, dtype=torch.long)
        a, y, train = self._systems(strengths, which)
        w = self._solution(a, y, train, strengths, which, rtol)
        everywhere = self._times(w, self.every)
        predictions = everywhere.unflatten(1, (folds, len(which)))  # [n, F, T, C]
        losses, pull = [], torch.zeros_like(predictions)
        for fold in range(folds):
            rows = self.folds.rows(fold)
            weights = self.folds.valid[fold, rows]
            own, truth = predictions[rows, fold], self.y[rows]
            own, truth = (own[..., 0], truth[:, which]) if self.separate else (own[:, 0], truth)
            loss, slope = self.outer(own, truth)
            losses.append(weights @ loss.reshape(len(rows), -1))
            pull[rows, fold] = (weights.reshape(-1, 1) * slope).reshape(pull[rows, fold].shape)
        losses = torch.stack(losses)
        if not gradient:
            return losses, torch.zeros_like(strengths)
        q = self._transposed(pull.flatten(1, 2), self.every_t)
        v = self._adjoint(a, train, everywhere[self.used], q, which, min(rtol, 1e-2))
        share = self.folds.share.repeat_interleave(len(which))
        slopes = -share[:, None, None] * a * w * v
        slopes = slopes.unflatten(0, (folds, len(which))).sum(0)[:, :-1]
        slopes = slopes[..., 0] if self.separate else slopes[0].mT
        slopes = slopes if len(strengths) > 1 or self.separate else slopes.sum(0, keepdim=True)
        return losses, self._spread(slopes)

    def _spread(self, kept: Tensor) -> Tensor:
        """Add zeros for the columns that were left out: [..., kept] ↦ [..., d]."""
        return kept.new_zeros(*kept.shape[:-1], self.shape[1]).index_copy_(-1, self.kept, kept)

    def _systems(self, strengths: Tensor, which: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Strengths [B, d + 1, 1 or C], targets [n, B or 1, C], weights of the rows [n, B, 1]."""
        folds = self.folds.number
        zero = strengths.new_zeros(len(strengths), 1)
        a = torch.cat([strengths[:, self.kept], zero], 1)
        if self.separate:
            a = a.expand(len(which), -1)[None].expand(folds, -1, -1).flatten(0, 1)[..., None]
            y = self.y[self.used][:, which].repeat(1, folds)[..., None]
        else:
            a, y = a.mT[None].expand(folds, -1, -1), self.y[self.used][:, None]
        return a, y, self.train.mT.repeat_interleave(len(which), 1)[..., None]

    def _solution(self, a: Tensor, y: Tensor, train: Tensor, strengths: Tensor, which: Tensor, rtol: float) -> Tensor:
        """W [B, d + 1, C] with ‖∇g‖ ≤ rtol ‖a ∘ W‖ or to rounding, by Newton's method from the last solution."""
        if self.given is not None:
            w = self.given(strengths, which)
            return torch.cat([w[:, self.kept], w[:, -1:]], 1)
        w = self.W[:, which].flatten(0, 1)
        z = self._times(w)
        size = self._transposed(train * self.inner(torch.zeros_like(z), y)[1]).flatten(1).norm(dim=1)
        rounding, floor = 4e-16 * size.clamp(min=1e-300), 1e-3 if self.dense or rtol < SINGLE else 0.1
        for _ in range(50):
            value, slope = self.inner(z, y)
            value = (train[..., 0] * value).sum(0) + (a * w * w).sum((1, 2)) / 2
            gradient = self._transposed(train * slope) + a * w
            left, pull = gradient.flatten(1).norm(dim=1), (a * w).flatten(1).norm(dim=1)
            if bool((left <= torch.maximum(rtol * pull, rounding)).all()) or not bool(torch.isfinite(left).all()):
                break
            rest = left / torch.maximum(pull, rounding)
            step = self._solve(a, train, z, gradient, None, min(0.3, max(rtol / float(rest.max()), floor)), INEXACT)
            along, length, worse = self._times(step), torch.ones_like(value), torch.ones_like(value) > 0
            for _ in range(20):
                trial = w - length[:, None, None] * step
                reached = (train[..., 0] * self.inner(z - length[:, None] * along, y)[0]).sum(0)
                reached = reached + (a * trial * trial).sum((1, 2)) / 2
                worse = reached > value + 1e-14 * value.abs()
                if not worse.any():
                    break
                length = torch.where(worse, length / 2, length)
            length = torch.where(worse, torch.where(rest > 1e-9, length, 1.0), length)
            w, z = w - length[:, None, None] * step, z - length[:, None] * along
        self.W[:, which] = w.unflatten(0, (self.folds.number, len(which)))
        return w

    def _adjoint(self, a: Tensor, train: Tensor, z: Tensor, q: Tensor, which: Tensor, rtol: float) -> Tensor:
        v = self._solve(a, train, z, q, self.V[:, which].flatten(0, 1), rtol)
        self.V[:, which] = v.unflatten(0, (self.folds.number, len(which)))
        return v

    def _solve(
        self, a: Tensor, train: Tensor, z: Tensor, r: Tensor, x0: Tensor | None, rtol: float, most: int = 1000
    ) -> Tensor:
        """A⁻¹r of every system, by factors, by CG in float32 if that reaches rtol, or by CG in float64."""
        if self.dense and r[0].numel() <= SMALL:
            factors = self._factors(a, train, z)
            x = _backward(factors, r)
            return x + _backward(factors, r - self._product(a, train, z, self.X, self.Xt)(x))
        if not self.dense and rtol >= SINGLE:
            if self.single is None:
                self.single = _float(self.X), _float(self.Xt)
            size = r.flatten(1).norm(dim=1).clamp(min=1e-300)[:, None, None]
            start = None if x0 is None else (x0 / size).float()
            system = a.float(), train.float(), z.float(), (r / size).float()
            found = self._cg(*system, start, *self.single, rtol, most)
            x0 = torch.where(found.value.isfinite(), found.value, 0.0).to(r.dtype) * size
            if found.status is Status.CONVERGED or (found.status is Status.MAX_STEPS and most == INEXACT):
                return x0
        return self._cg(a, train, z, r, x0, self.X, self.Xt, rtol, most).value

    def _product(self, a: Tensor, train: Tensor, z: Tensor, x: Tensor, xt: Tensor) -> Callable[[Tensor], Tensor]:
        """V ↦ AV."""

        def product(v: Tensor) -> Tensor:
            image = self._transposed(train * self._curved(z, self._times(v, x)), xt).addcmul(a, v)
            image[:, -1] += v[:, -1].mean(-1, keepdim=True) * self.free_sum + v[:, -1] * (1 - self.fit_intercept)
            return image

        return product

    def _cg(
        self,
        a: Tensor,
        train: Tensor,
        z: Tensor,
        r: Tensor,
        x0: Tensor | None,
        x: Tensor,
        xt: Tensor,
        rtol: float,
        most: int,
    ) -> Any:
        solver = CG(max_steps=most, rtol=rtol, preconditioner=self._preconditioner(a, train, z), on_failure="ignore")
        product = function(self._product(a, train, z, x, xt), symmetric=True, batch_dims=1)
        solution = solver(product, r, x0=x0)
        if int(torch.as_tensor(solution.steps).max()) > STALE:
            self.factors = None
        return solution

    def _preconditioner(self, a: Tensor, train: Tensor, z: Tensor) -> Callable[[Tensor], Tensor]:
        """The inverse of an earlier A, by its factors, or of the diagonal of this A."""
        if not self.dense:
            p = torch.softmax(z, -1) if self.C > 1 else torch.sigmoid(z)
            curvature = torch.ones_like(z) if self.separate else p * (1 - p)
            diagonal = self._squares((train * curvature).double()) + a
            diagonal[:, -1] += 1.0 - self.fit_intercept
            inverse = (1 / diagonal.clamp(min=1e-300)).to(a.dtype)
            return lambda r: r * inverse
        if self.factors is None:
            self.factors = self._factors(a, train, z)
        factors = self.factors
        return lambda r: _backward(factors, r)

    def _squares(self, weights: Tensor) -> Tensor:
        """(X∘X)ᵀ weights: [n, B, C] ↦ [B, d + 1, C]."""
        if not hasattr(self, "_squared"):
            sparse = self.Xt.layout == torch.sparse_csr
            self._squared = squared_csr(self.Xt) if sparse else self.Xt.square()
        return (self._squared @ weights.flatten(1)).unflatten(1, weights.shape[1:]).permute(1, 0, 2)

    def _factors(self, a: Tensor, train: Tensor, z: Tensor) -> Tensor:
        """Cholesky factors of A for a dense X, [B, C(d + 1), C(d + 1)]."""
        p = torch.softmax(z, -1) if self.C > 1 else torch.sigmoid(z)
        side, each = self.X.shape[1], []
        for system in range(z.shape[1]):
            blocks = z.new_zeros(self.C, side, self.C, side)
            own = p[:, system]
            for c in range(self.C):
                for k in range(c + 1):
                    weights = train[:, system, 0] * own[:, c] * (float(c == k) - own[:, k])
                    block = (self.Xt * weights) @ self.X
                    block[-1, -1] += self.free_sum / self.C
                    blocks[c, :, k] = blocks[k, :, c] = block
            matrix = blocks.reshape(self.C * side, -1)
            strengths = a[system].expand(-1, self.C).mT.clone()
            strengths[:, -1] += 1.0 - self.fit_intercept
            matrix.diagonal().add_(strengths.flatten())
            matrix.diagonal().mul_(1 + 1e-12)
            each.append(torch.linalg.cholesky(matrix))
        return torch.stack(each)

    def begin(self, other: Linear) -> None:
        """Start from the mean over folds of another problem's solutions."""
        places = torch.cat([self.kept, torch.tensor([self.shape[1]])])
        w = self.W.new_zeros(1, other.W.shape[1], self.shape[1] + 1, self.C)
        w[:, :, torch.cat([other.kept, torch.tensor([self.shape[1]])])] = other.W.mean(0, keepdim=True)
        self.W = w[:, :, places].repeat(self.folds.number, 1, 1, 1)

    def coefficients(self, strengths: Tensor) -> tuple[Tensor, Tensor]:
        """W [C or T, d] and intercepts of the first fold, with a tolerance of 1e-10, 1e-4 or, if large, 1e-2."""
        which = torch.arange(self.W.shape[1])
        a, y, train = self._systems(strengths, which)
        large = not self.separate and self.W[0].numel() > LARGE
        w = self._solution(a, y, train, strengths, which, 1e-10 if self.dense else self.rtol if large else 1e-4)
        w = w[: len(which)]
        w = w[..., 0] if self.separate else w[0].mT
        return self._spread(w[:, :-1]), w[:, -1]

    def residual(self, strengths: Tensor, which: Tensor) -> Tensor:
        """‖∇g(W)‖ / ‖∇g(0)‖ of each system, W its solution."""
        a, y, train = self._systems(strengths, which)
        w = self._solution(a, y, train, strengths, which, self.rtol)
        z = self._times(w)
        gradient = self._transposed(train * self.inner(z, y)[1]) + a * w
        start = self._transposed(train * self.inner(torch.zeros_like(z), y)[1])
        return gradient.flatten(1).norm(dim=1) / start.flatten(1).norm(dim=1).clamp(min=1e-300)


def _backward(factors: Tensor, r: Tensor) -> Tensor:
    """Solve for r [B, d + 1, C] with Cholesky factors whose rows are ordered by class, then feature."""
    # cholesky_solve would copy the factors
    half = torch.linalg.solve_triangular(factors, r.mT.reshape(len(r), -1, 1), upper=False)
    return torch.linalg.solve_triangular(factors.mT, half, upper=True).reshape(r.mT.shape).mT


def _float(x: Tensor) -> Tensor:
    if x.layout != torch.sparse_csr:
        return x.float()
    return _csr(x.crow_indices(), x.col_indices(), x.values().float(), x.shape)


def compressed(x: Any) -> Tensor:
    """A scipy.sparse matrix as a torch tensor of compressed rows."""
    rows, columns = (torch.from_numpy(part) for part in (x.indptr, x.indices))
    return _csr(rows, columns, torch.from_numpy(x.data.copy()), x.shape)


def squared_csr(x: Tensor) -> Tensor:
    return _csr(x.crow_indices(), x.col_indices(), x.values().square(), x.shape)


def _csr(rows: Tensor, columns: Tensor, values: Tensor, shape: Any) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(rows, columns, values, size=tuple(shape), check_invariants=True)
