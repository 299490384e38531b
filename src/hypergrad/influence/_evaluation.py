"""Evaluation of scores by retraining: linear datamodelling score, leave-one-out, metasmoothness."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import optree
import torch
from torch import Tensor

from .._options import progress_bar
from .._solution import warn
from .._torch import random_state_kept_on_error
from .._tree import PyTree
from ._result import Influence, spearman


@dataclass(frozen=True)
class Retrained:
    """Losses of the queries after trainings on subsets of the examples, which scores should predict.

    Attributes:
        weights: [trainings, examples]: 1 for an example that was used, 0 for one that was left out.
        losses: [trainings, queries].
        whole: [queries], the losses after the training on all examples.

    Example:
        >>> x = torch.tensor([1.0, 2.0, 6.0])
        >>> mean = lambda weights: (weights * x).sum() / weights.sum()  # the training, by a formula
        >>> truth = hg.influence.retrained(lambda weights: mean(weights)[None], 3, leave_out=[0, 2])
        >>> truth.whole, truth.losses.flatten()
        (tensor([3.]), tensor([4.0000, 1.5000]))
    """

    weights: Tensor
    losses: Tensor
    whole: Tensor

    def predicted(self, result: Influence) -> Tensor:
        """The changes of the losses that the scores predict, Σᵢ (ωᵢ − 1) s_qi: [..., trainings, queries]."""
        scores = result.scores
        if scores.shape[-2:] != (len(self.whole), self.weights.shape[1]):
            raise ValueError(
                f"scores must be [{len(self.whole)} queries, {self.weights.shape[1]} examples], got "
                f"{list(scores.shape[-2:])}"
            )
        return (self.weights - 1).to(scores) @ scores.mT

    def lds(self, result: Influence) -> Tensor:
        """Linear datamodelling score of each query: Spearman's correlation of predicted and retrained losses.

        It is [queries], or [dampings, queries] if the result has several. NaN if all trainings give the same loss.
        Source: Park et al. 2023, Definition 2.3.
        """
        return spearman(self.predicted(result).mT, self.losses.mT.to(result.scores))

    def error(self, result: Influence) -> Tensor:
        """‖predicted − true change‖ / ‖true change‖ over the trainings, for each query. It measures size and sign of
        the scores, while `lds` measures only their order."""
        truth = (self.losses - self.whole).to(result.scores)
        return (self.predicted(result) - truth).norm(dim=-2) / truth.norm(dim=-2)


def retrained(
    train: Callable[[Tensor], Tensor],
    examples: int,
    *,
    subsets: int = 50,
    drop: float = 0.05,
    leave_out: Sequence[int] = (),
    seed: int = 0,
    progress: bool = False,
) -> Retrained:
    """Train on random subsets of the examples, or without single ones, to evaluate scores.

    Args:
        train: weights [examples] of zeros and ones ↦ losses of the queries [queries] after a training with these
            weights. Everything else in it (start, order of batches, dropout) must be the same each time.
        examples: n.
        subsets: the number of random subsets.
        drop: the fraction of the examples that each subset lacks.
        leave_out: indices of examples to leave out one at a time, in place of subsets (leave-one-out).
        seed: seed for drawing the subsets.
        progress: show a bar (needs tqdm).

    Returns: a Retrained, whose `lds` and `error` evaluate scores.
    Raises: ValueError for numbers out of range, and for losses that are not a finite vector.
    Warns: HypergradientWarning if the first training gives other losses when it is repeated, because the difference is
        noise that no score predicts.
    Cost: subsets (or left out examples) + 2 trainings.

    Example:
        >>> x = torch.tensor([1.0, 2.0, 6.0])
        >>> truth = retrained(lambda weights: ((weights * x).sum() / 3)[None], 3, leave_out=[0, 2])
        >>> truth.losses
        tensor([[2.6667],
                [1.0000]])
    """
    count = round(drop * examples)
    if not leave_out and not (subsets >= 1 and 1 <= count < examples):
        raise ValueError(
            f"each of {subsets} subsets lacks {count} of {examples} examples: at least one subset is needed, and each "
            f"must lack at least one example and keep one"
        )
    if not all(0 <= i < examples for i in leave_out):
        raise ValueError(f"leave_out must hold indices in 0 … {examples - 1}, got {list(leave_out)}")
    generator = torch.Generator(device="cpu").manual_seed(seed)
    drawn = [
        torch.randperm(examples, generator=generator, device="cpu")[:count] for _ in range(0 if leave_out else subsets)
    ]
    weights = torch.ones(len(leave_out) or subsets, examples, device="cpu")
    for row, out in zip(weights, [[i] for i in leave_out] or drawn, strict=True):
        row[out] = 0
    ones = torch.ones(examples, device="cpu")
    with random_state_kept_on_error([ones]):
        whole, again = _losses(train, ones), _losses(train, ones)
        if not torch.allclose(whole, again, rtol=torch.finfo(whole.dtype).eps ** 0.5, atol=0):
            apart = float((whole - again).abs().max())
            warn(
                f"the same training gave other losses when it was repeated (by {apart:.2g} at most): seed everything "
                f"random in train, or average several trainings"
            )
        rows = [_losses(train, row) for row in progress_bar(progress, list(weights), desc="trainings")]
    return Retrained(weights, torch.stack(rows), whole)


def _losses(train: Callable[[Tensor], Tensor], weights: Tensor) -> Tensor:
    losses = torch.as_tensor(train(weights.clone())).detach().cpu()
    if losses.ndim != 1 or not bool(torch.isfinite(losses).all()):
        raise ValueError(f"train must give the finite losses of the queries, [queries], got {losses}")
    return losses


def metasmoothness(train: Callable[[PyTree], PyTree], hparams: PyTree, direction: PyTree, step: float) -> float:
    """How smoothly a training responds to its hyperparameters: S in [−1, 1], 1 if smoothly, 0 for noise.

        Δ₁ = f(λ + hv) − f(λ),   Δ₂ = f(λ + 2hv) − f(λ + hv),      S = Σ |Δ₁| sign(Δ₁) sign(Δ₂) / Σ |Δ₁|

    If S is far below 1, derivatives through the training (`unrolled`, `unroll.reverse`) say little about changes of
    size h. To raise S, use less momentum, a smaller step size, or smooth activations.

    Args:
        train: f(hparams) ↦ a tensor or a pytree: params after the training, or outputs for validation data.
        hparams: λ, for example weights of the examples.
        direction: v, like hparams.
        step: h.

    Raises: ValueError if hparams change nothing.
    Cost: three trainings.
    Source: Engstrom et al. 2025, Definition 2.

    Example:
        >>> metasmoothness(
        ...     lambda lam: torch.stack([lam**2, (1e3 * lam).sin()]), torch.tensor(1.0), torch.tensor(1.0), 0.5
        ... )
        -0.1...
    """
    points = [optree.tree_map(lambda x, v, k=k: x + k * step * v, hparams, direction) for k in range(3)]
    values = [torch.cat([x.detach().double().flatten() for x in optree.tree_leaves(train(point))]) for point in points]
    first, second = values[1] - values[0], values[2] - values[1]
    if not bool(first.any()):
        raise ValueError(f"train gives the same for hparams and for hparams + {step:g} direction: are they used?")
    return float((first.abs() * first.sign() * second.sign()).sum() / first.abs().sum())
