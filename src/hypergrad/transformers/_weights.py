"""Modules that compute the weights of training data: of sources, examples or tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class SourceWeights(nn.Module):
    """ω = n · softmax(logits)[source], one weight for each of n sources; their mean is always 1.

    Each training example needs a column "source", the index of its source.

    Example:
        >>> SourceWeights(2)(torch.zeros(3, 5), {"source": torch.tensor([0, 1, 1])}).shape
        torch.Size([3, 1])
    """

    columns = ("source",)

    def __init__(self, count: int):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(count))

    @property
    def weights(self) -> Tensor:
        """ω of all sources."""
        return len(self.logits) * self.logits.softmax(0)

    def forward(self, losses: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.weights[inputs["source"]].unsqueeze(1)


class ExampleWeights(nn.Module):
    """ω = 2σ(logits)[index], one weight for each of n examples, 1 at the start.

    Each training example needs a column "index", its index in the dataset.

    Example:
        >>> ExampleWeights(2)(torch.zeros(2, 5), {"index": torch.tensor([1, 0])}).detach().flatten()
        tensor([1., 1.])
    """

    columns = ("index",)

    def __init__(self, count: int):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(count))

    @property
    def weights(self) -> Tensor:
        """ω of all examples."""
        return 2 * self.logits.sigmoid()

    def forward(self, losses: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.weights[inputs["index"]].unsqueeze(1)


class TokenWeights(nn.Module):
    """ω = 2σ(logits)[token], one weight for each token of the vocabulary as a label, 1 at the start.

    Example:
        >>> TokenWeights(10)(torch.zeros(1, 2), {"labels": torch.tensor([[3, 1, -100]])}).shape
        torch.Size([1, 2])
    """

    columns = ()

    def __init__(self, vocabulary: int):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(vocabulary))

    @property
    def weights(self) -> Tensor:
        """ω of all tokens."""
        return 2 * self.logits.sigmoid()

    def forward(self, losses: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.weights[inputs["labels"][:, -losses.shape[1] :].clamp(min=0)]
