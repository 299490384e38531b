# %% [markdown]
# # In Lightning: a weight decay for each pixel, while the model trains
# A `CombinedLoader` holds both loaders; the tracker's state is saved in checkpoints, and its metrics are logged.

# %%
from dataclasses import dataclass
from typing import Any

import lightning
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset, TensorDataset

import hypergrad as hg
from examples.common import Base, parse


@dataclass
class Config(Base):
    epochs: int = 30
    """Epochs over the training digits."""


class Digits(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model, self.decay = torch.nn.Linear(64, 10), torch.nn.Parameter(torch.full((64,), -4.0))
        self.tracker = hg.bilevel.SOBA(self.model.parameters(), [self.decay], lr=0.1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (x, y), (xv, yv) = batch["train"], batch["valid"]
        train_loss = cross_entropy(self.model(x), y) + (self.decay.exp() * self.model.weight.square()).sum() / 2
        self.tracker.backward(cross_entropy(self.model(xv), yv), train_loss)
        for each in (*self.optimizers(), self.tracker):  # pyright: ignore
            each.step()
        self.zero_grad()
        self.log_dict(self.tracker.metrics() | {"train_loss": train_loss.item()}, batch_size=len(x))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.model.parameters(), 0.1), torch.optim.Adam([self.decay], 0.05)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["tracker"] = self.tracker.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.tracker.load_state_dict(checkpoint["tracker"])


if __name__ == "__main__":
    config = parse(Config, "A weight decay for each pixel in Lightning", {"epochs": 2})
    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    rows = TensorDataset(x.float() / 16, y)
    parts = {"train": Subset(rows, range(1000)), "valid": Subset(rows, range(1000, 1400))}
    loaders = {name: DataLoader(part, 100) for name, part in parts.items()}
    trainer = lightning.Trainer(max_epochs=config.epochs, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(Digits(), lightning.pytorch.utilities.CombinedLoader(loaders, "max_size_cycle"))  # pyright: ignore
    print(trainer.logged_metrics)
