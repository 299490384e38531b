# %% [markdown]
# # In skorch: a weight decay for each pixel, while the model trains
# `train_step_single` takes the tracker's `backward` in place of the loss's; skorch steps the model's optimizer, and
# `train_step` the others. The rows that skorch's `train_split` keeps are the validation data.

# %%
from dataclasses import dataclass
from typing import Any

import torch
from sklearn.datasets import load_digits
from skorch import NeuralNetClassifier
from skorch.dataset import unpack_data

import hypergrad as hg
from examples.common import Base, parse


@dataclass
class Config(Base):
    epochs: int = 30
    """Over the training digits."""


class Net(NeuralNetClassifier):
    def initialize(self) -> Any:
        super().initialize()
        self.decay_ = torch.full((64,), -4.0, requires_grad=True)
        self.tracker_ = hg.bilevel.SOBA(self.module_.parameters(), [self.decay_], lr=0.1)
        self.others_ = [
            torch.optim.Adam([self.decay_], 0.05)
        ]  # in a list: skorch steps what it takes for its optimizer
        return self

    def get_split_datasets(self, *args: Any, **kwargs: Any) -> Any:
        train, valid = super().get_split_datasets(*args, **kwargs)
        self.valid_ = hg.bilevel.cycle(self.get_iterator(valid, training=False))
        return train, valid

    def train_step_single(self, batch: Any, **fit_params: Any) -> dict[str, Any]:
        self._set_training(True)
        (x, y), (xv, yv) = unpack_data(batch), unpack_data(next(self.valid_))
        predicted: Any = self.infer(x, **fit_params)
        weight: Any = self.module_.weight
        penalty = (self.decay_.exp() * weight.square()).sum()
        loss = self.get_loss(predicted, y, training=True) + penalty / 2
        self.tracker_.backward(self.get_loss(self.infer(xv), yv, training=True), loss)
        return {"loss": loss.detach(), "y_pred": predicted}

    def train_step(self, batch: Any, **fit_params: Any) -> Any:
        step = super().train_step(batch, **fit_params)
        for each in (*self.others_, self.tracker_):
            each.step()
        self.others_[0].zero_grad()
        return step


if __name__ == "__main__":
    config = parse(Config, "A weight decay for each pixel in skorch", {"epochs": 2})
    x, y = load_digits(return_X_y=True)
    more: Any = {"criterion": torch.nn.CrossEntropyLoss, "batch_size": 100, "lr": 0.1}
    net = Net(torch.nn.Linear(64, 10), max_epochs=config.epochs, **more).fit(
        (x[:1400] / 16).astype("float32"), y[:1400]
    )
    print(f"accuracy on the other digits: {net.score((x[1400:] / 16).astype('float32'), y[1400:]):.3f}")
