"""Influence: scores, and how accurately their systems were solved."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Influence:
    """Scores of training examples for queries, and how their linear systems were solved.

    Attributes:
        scores: ∂(loss of the query)/∂(weight of the example): [queries, examples], or [queries, groups]; [examples]
            from `self_influence`. Several dampings add a leading axis.
        query_losses: the losses of the queries at params.
        method: the name of the solver, or of the other method that computed the scores.
        residual: ‖∇ℓ_q − (A + γI)v‖ / ‖∇ℓ_q‖, recomputed: [queries], or [dampings, queries]; None from `unrolled`,
            which solves no system.
        damping: γ, 0-d or [dampings]; None from `unrolled`.
        inner_residual: ‖∇g‖ at params, which is 0 at a minimiser; None from `unrolled`.
        products: the number of products with A, each for all queries of a batch.

    Example:
        >>> x = torch.tensor([1.0, 2.0, 6.0])
        >>> result = hg.influence.scores(
        ...     lambda w, x: (x - w) ** 2 / 2, lambda w, query: w * query, x.mean(), train=[x], queries=[torch.ones(1)]
        ... )
        >>> result.scores  # (xᵢ − mean) / 3
        tensor([[-0.6667, -0.3333,  1.0000]])
        >>> values, places = result.top(1, harmful=True)
        >>> values, places
        (tensor([[1.]]), tensor([[2]]))
    """

    scores: Tensor
    query_losses: Tensor
    method: str
    residual: Tensor | None = None
    damping: Tensor | None = None
    inner_residual: Tensor | None = None
    products: int = 0

    def top(self, k: int = 10, harmful: bool = False) -> tuple[Tensor, Tensor]:
        """The scores and indices of the k most helpful (or harmful) examples of each query, the strongest first.

        Helpful examples have negative scores: more weight on them lowers the loss of the query.

        Example:
            >>> Influence(torch.tensor([[3.0, -2.0, 1.0]]), torch.tensor([0.1]), "by hand").top(2)
            (tensor([[-2.,  1.]]), tensor([[1, 2]]))
        """
        values, indices = self.scores.topk(min(k, self.scores.shape[-1]), largest=harmful)
        return values, indices

    def at(self, index: int) -> Influence:
        """The result for the damping with this index."""
        if self.damping is None or not self.damping.ndim or self.residual is None:
            raise ValueError("at() selects one of several dampings, but these scores have one or none")
        chosen = {name: getattr(self, name)[index] for name in ("scores", "residual", "damping")}
        return replace(self, **chosen)

    def report(self) -> str:
        """One line for each damping: the residuals of its systems, and the correlation with the scores of the next.

        The correlation is Spearman's. Where it is near 1, the choice of damping hardly changes the ranking.
        """
        if self.residual is None or self.damping is None:
            return f"{self.method}: no system was solved"
        dampings, residuals = self.damping.reshape(-1), self.residual.reshape(self.damping.numel(), -1)
        scores = self.scores.reshape(len(dampings), -1)
        lines = [f"{self.method}, {self.products} products, ‖∇g‖ = {_number(self.inner_residual)}"]
        for i, (damping, rows) in enumerate(zip(dampings, residuals, strict=True)):
            text = (
                f"damping {float(damping):.3g}: relative residual {_size(rows.median())}, at most {_size(rows.max())}"
            )
            if i + 1 < len(dampings):
                text += f"; rank correlation with the next {float(spearman(scores[i], scores[i + 1])):.3f}"
            lines.append(text)
        return "\n".join(lines)


def _number(value: Tensor | None) -> str:
    return "unknown" if value is None else f"{float(value):.2g}"


def _size(residual: Tensor) -> str:
    value = float(residual)
    return f"{value:.1e}" if value < 0.01 else f"{value:.0%}"


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation along the last axis; equal numbers get the mean of their ranks."""
    x, y = (each - each.mean(-1, keepdim=True) for each in (_ranks(a), _ranks(b)))
    return (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))


def _ranks(a: Tensor) -> Tensor:
    ordered = a.sort(-1).values.contiguous()
    below = torch.searchsorted(ordered, a.contiguous())
    upto = torch.searchsorted(ordered, a.contiguous(), right=True)
    return (below + upto).double() / 2
