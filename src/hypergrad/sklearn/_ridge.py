"""Ridge regression with many strengths, in closed form: one factorisation serves the solution and the adjoint.

    A = XᵀSX + diag a,    A w = XᵀSy,    A v = ∇E(w),    ∂E/∂ log aⱼ = −aⱼ wⱼ vⱼ

holds for each fold and target; rows are centred by the fold's training mean, and S are the weights of its training
rows. With more features than rows, the dual matrix I + S½ X diag(1/a) Xᵀ S½ is factorised instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ._folds import Folds, Labels

KERNELS, CHUNK = 30_000_000, 3_000_000  # the most numbers in kernels that are kept, and in factors at one time
TOGETHER = 400_000  # the most numbers in matrices that are built at one time

Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # (prediction, y) ↦ losses of the rows, their derivatives


class Ridge:
    """The folds of a ridge regression with T targets.

    Args:
        X: [n, d], at least approximately centred.
        y: [n, T].
        solution: the user's solver, (strengths [T, d], targets) ↦ w [F, T, d]; None for the closed form.
    """

    def __init__(
        self,
        X: Tensor,
        y: Tensor,
        folds: Folds,
        labels: Labels,
        loss: Loss,
        fit_intercept: bool = True,
        solution: Callable[[Tensor, Tensor], Tensor] | None = None,
    ):
        self.X, self.y, self.folds, self.loss, self.given = X, y, folds, loss, solution
        self.mean, self.offset = folds.train @ X, folds.train @ y
        if not fit_intercept:
            self.mean, self.offset = torch.zeros_like(self.mean), torch.zeros_like(self.offset)
        self.rows = [folds.rows(fold) for fold in range(folds.number)]
        parts = [self._scaled(fold) for fold in range(folds.number)]
        self.dual = max(len(x) for x, _ in parts) < X.shape[1]
        self.q = torch.stack([x.mT @ t for x, t in parts]).mT  # [F, T, d]
        if self.dual:
            height = max(len(x) for x, _ in parts)
            pad = torch.nn.functional.pad
            self.Xt = torch.stack([pad(x, (0, 0, 0, height - len(x))) for x, _ in parts])
            self.yt = torch.stack([pad(t, (0, 0, 0, height - len(t))) for _, t in parts])
            self.kernels, self.first = self._kernels(labels)
        else:
            self.G = torch.stack([x.mT @ x for x, _ in parts])

    def _scaled(self, fold: int) -> tuple[Tensor, Tensor]:
        """S½ (X − x̄) and S½ (y − ȳ) of the training rows."""
        rows = self.folds.rows(fold, "train")
        root = self.folds.train[fold, rows].sqrt()[:, None]
        return root * (self.X[rows] - self.mean[fold]), root * (self.y[rows] - self.offset[fold])

    def _kernels(self, labels: Labels) -> tuple[Tensor | None, Tensor]:
        """Kernels of the groups [F, p, n, n] and one feature of each group; None if there are too many groups."""
        folds, height, _ = self.Xt.shape
        if labels.coupled or labels.count * folds * height**2 > KERNELS or labels.count > self.X.shape[1] / 4:
            return None, torch.empty(0)
        members = [(labels.index == group).nonzero()[:, 0] for group in range(labels.count)]
        kernels = torch.stack([self.Xt[..., each] @ self.Xt[..., each].mT for each in members], 1)
        return kernels, torch.stack([each[0] for each in members])

    def scale(self) -> float:
        """The mean eigenvalue of XᵀSX over columns that are not constant."""
        diagonal = self.Xt.square().sum(1) if self.dual else self.G.diagonal(dim1=1, dim2=2)
        rank = min(self.Xt.shape[1] if self.dual else self.X.shape[1], int((diagonal > 0).any(0).sum()))
        return float(diagonal.sum()) / (len(diagonal) * max(rank, 1))

    def residual(self, strengths: Tensor, targets: Tensor) -> Tensor:
        """‖Aw − XᵀSy‖ / ‖XᵀSy‖ of each fold and target."""
        w = self._solution(strengths, targets, None)
        product = (w @ self.Xt.mT) @ self.Xt if self.dual else w @ self.G
        q = self.q[:, targets]
        return (product + strengths * w - q).norm(dim=-1) / q.norm(dim=-1).clamp(min=1e-300)

    def evaluate(
        self, strengths: Tensor, targets: Tensor, gradient: bool = True, tighter: bool | str = False
    ) -> tuple[Tensor, Tensor]:
        """Losses [F, T] and slopes [T, d]; strengths are [T, d], or [1, d] if all targets share them."""
        side = self.Xt.shape[1] if self.dual else self.X.shape[1]
        losses = self.q.new_zeros(len(self.q), len(targets))
        slopes = self.q.new_zeros(len(targets), self.X.shape[1])
        for a, places in _alike(strengths, len(targets), max(1, CHUNK // (len(self.q) * side**2))):
            found = self._evaluate(a, targets[places], gradient, 2 if tighter else 0)
            losses[:, places], slopes[places] = found
        return losses, slopes

    def _evaluate(self, a: Tensor, targets: Tensor, gradient: bool, refinements: int) -> tuple[Tensor, Tensor]:
        factor = None if self.given is not None and not gradient else self._factor(a)
        w = self._solution(a, targets, factor, refinements)
        losses, pulls = [], []
        for fold, rows in enumerate(self.rows):
            x, weights = self.X[rows] - self.mean[fold], self.folds.valid[fold, rows]
            prediction = x @ w[fold].mT + self.offset[fold, targets]
            loss, slope = self.loss(prediction, self.y[rows][:, targets])
            losses.append(weights @ loss)
            pulls.append((x.mT @ (weights[:, None] * slope)).mT)
        losses = torch.stack(losses)
        if not gradient:
            return losses, torch.zeros_like(w[0])
        assert factor is not None
        v = self._refined(a, factor, torch.stack(pulls), None, refinements)
        return losses, -a * torch.einsum("f,ftd,ftd->td", self.folds.share, w, v)

    def _solution(self, a: Tensor, targets: Tensor, factor: Tensor | None, refinements: int = 2) -> Tensor:
        if self.given is not None:
            return self.given(a.expand(len(targets), -1), targets)
        assert factor is not None
        return self._refined(a, factor, self.q[:, targets], targets, refinements)

    def coefficients(self, strengths: Tensor) -> tuple[Tensor, Tensor]:
        """w [T, d] and intercepts [T] of the first fold."""
        w = self.y.new_zeros(self.y.shape[1], self.X.shape[1])
        for a, targets in _alike(strengths, len(w), 1):
            w[targets] = self._solution(a, targets, self._factor(a))[0]
        return w, self.offset[0] - w @ self.mean[0]

    def _factor(self, a: Tensor) -> Tensor:
        """Cholesky factors [F, S, k, k], k the smaller of rows and features, one by one to stay in cache."""
        folds, side = len(self.q), self.Xt.shape[1] if self.dual else self.X.shape[1]
        factors = a.new_empty(folds, len(a), side, side).mT  # column-major, as LAPACK needs them
        size = self.Xt[0].numel() if self.dual and self.kernels is None else side**2
        step = max(1, TOGETHER // size)
        for fold in range(folds):
            for some in range(0, len(a), step):
                strengths = a[some : some + step]
                matrices = self._kernel(fold, strengths) if self.dual else self.G[fold] + strengths.diag_embed()
                for system, matrix in enumerate(matrices, some):
                    torch.linalg.cholesky(matrix, out=factors[fold, system])
        return factors

    def _kernel(self, fold: int, strengths: Tensor) -> Tensor:
        """I + S½ X diag(1/a) Xᵀ S½ of each system."""
        if self.kernels is None:
            half = self.Xt[fold] * strengths.rsqrt()[:, None]
            kernels = half @ half.mT
        else:
            own = self.kernels[fold]
            kernels = ((1 / strengths[:, self.first]) @ own.flatten(1)).unflatten(1, own.shape[1:])
        kernels.diagonal(dim1=1, dim2=2).add_(1.0)
        return kernels

    def _refined(self, a: Tensor, factor: Tensor, r: Tensor, targets: Tensor | None, refinements: int) -> Tensor:
        """A⁻¹r for r [F, T, d]. If targets are given, r is their XᵀSy, and the dual solve avoids cancellation."""
        x = self._solve(a, factor, r, targets)
        for _ in range(refinements):
            product = (x @ self.Xt.mT) @ self.Xt if self.dual else x @ self.G
            x = x + self._solve(a, factor, r - product - a * x, None)
        return x

    def _solve(self, a: Tensor, factor: Tensor, r: Tensor, targets: Tensor | None) -> Tensor:
        if not self.dual:
            return _columns(factor, r)
        if targets is not None:
            return (_columns(factor, self.yt[..., targets].mT) @ self.Xt) / a
        return (r - _columns(factor, (r / a) @ self.Xt.mT) @ self.Xt) / a


def _alike(strengths: Tensor, targets: int, most: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Groups of targets, as strengths [S, d] and indices: S = 1 if they share all strengths, else S ≤ `most`."""
    if len(strengths) == 1:
        yield strengths, torch.arange(targets)
        return
    distinct, which, counts = torch.unique(strengths, dim=0, return_inverse=True, return_counts=True)
    for row in (counts > 1).nonzero()[:, 0]:
        yield distinct[row][None], (which == row).nonzero()[:, 0]
    for places in (counts[which] == 1).nonzero()[:, 0].split(most):
        yield strengths[places], places


def _columns(factor: Tensor, r: Tensor) -> Tensor:
    """Solve for r [F, T, k] with factors [F, S, k, k], where S = T, or S = 1 for all targets."""
    r = r.mT if factor.shape[1] == 1 else r[..., None]
    factor = factor[:, 0] if factor.shape[1] == 1 else factor
    half = torch.linalg.solve_triangular(factor, r, upper=False)
    x = torch.linalg.solve_triangular(factor.mT, half, upper=True)
    return x.mT if r.ndim == 3 else x[..., 0]
