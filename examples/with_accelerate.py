# %% [markdown]
# # With Accelerate: a weight decay for each pixel, while the model trains
#
# `prepare` takes both loaders and both optimizers, `register_for_checkpointing` the tracker. On several ranks use
# `hg.distributed` instead of DDP: docs/distributed.md.

# %%
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import hypergrad as hg
from examples.common import Base, parse


@dataclass
class Config(Base):
    epochs: int = 30
    """Epochs over the training digits."""


class Training:
    def __init__(self) -> None:
        x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
        parts = [TensorDataset(x[part].float() / 16, y[part]) for part in (slice(1000), slice(1000, 1400))]
        model, self.decay = torch.nn.Linear(64, 10), torch.full((64,), -4.0, requires_grad=True)
        optimizers = torch.optim.SGD(model.parameters(), 0.1), torch.optim.Adam([self.decay], 0.05)
        self.accelerator = Accelerator(cpu=True)
        prepared: Any = self.accelerator.prepare(model, *optimizers, *(DataLoader(part, 100) for part in parts))
        self.model, self.inner, self.outer, self.train, valid = prepared
        self.valid, self.tracker = hg.bilevel.cycle(valid), hg.bilevel.SOBA(model.parameters(), [self.decay], lr=0.1)
        self.accelerator.register_for_checkpointing(self.tracker, self.valid, torch.nn.ParameterList([self.decay]))

    def run(self, epochs: int) -> None:
        for x, y in (batch for _ in range(epochs) for batch in self.train):
            penalty = (self.decay.exp() * self.model.weight.square()).sum() / 2
            xv, yv = next(self.valid)
            self.tracker.backward(cross_entropy(self.model(xv), yv), cross_entropy(self.model(x), y) + penalty)
            for each in (self.inner, self.outer, self.tracker):
                each.step()
            for each in (self.inner, self.outer):
                each.zero_grad()


if __name__ == "__main__":
    config = parse(Config, "A weight decay for each pixel with Accelerate", {"epochs": 2})
    with tempfile.TemporaryDirectory() as folder:  # the second half of the epochs continues from a checkpoint
        first, second = Training(), Training()
        first.run(config.epochs // 2)
        first.accelerator.save_state(folder)
        second.accelerator.load_state(folder)
        second.run(config.epochs - config.epochs // 2)
    print(f"decays from {second.decay.exp().min():.1e} to {second.decay.exp().max():.1e}")
