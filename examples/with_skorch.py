# %% [markdown]
# # In skorch: a weight decay for each pixel, while the model trains
# The tracker's `backward` replaces that of the loss; the rows that `train_split` holds out are the validation data.

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
    """Epochs over the training digits."""


class Net(NeuralNetClassifier):
    def initialize(self) -> Any:
        super().initialize()
        self.decay_ = torch.full((64,), -4.0, requires_grad=True)
        self.tracker_ = hg.bilevel.SOBA(self.module_.parameters(), [self.decay_], lr=0.1)
        self.others_ = [torch.optim.Adam([self.decay_], 0.05)]  # a list, as skorch steps optimizers in attributes
        return self

    def get_split_datasets(self, *args: Any, **kwargs: Any) -> Any:
        train, valid = super().get_split_datasets(*args, **kwargs)
        self.valid_ = hg.bilevel.cycle(self.get_iterator(valid, training=False))
        return train, valid

    def train_step_single(self: Any, batch: Any, **fit_params: Any) -> dict[str, Any]:
        self._set_training(True)
        (x, y), (xv, yv) = unpack_data(batch), unpack_data(next(self.valid_))
        predicted = self.infer(x, **fit_params)
        loss = self.get_loss(predicted, y, training=True) + (self.decay_.exp() * self.module_.weight.square()).sum() / 2
        self.tracker_.backward(self.get_loss(self.infer(xv), yv, training=True), loss)
        return {"loss": loss.detach(), "y_pred": predicted}

    def train_step(self, batch: Any, **fit_params: Any) -> Any:
        step = super().train_step(batch, **fit_params)
        for each in (*self.others_, self.tracker_):
            each.step()
        self.decay_.grad = None
        return step


if __name__ == "__main__":
    config = parse(Config, "A weight decay for each pixel in skorch", {"epochs": 2})
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype("float32")
    more: Any = {"criterion": torch.nn.CrossEntropyLoss, "batch_size": 100, "lr": 0.1, "max_epochs": config.epochs}
    net = Net(torch.nn.Linear(64, 10), **more).fit(x[:1400], y[:1400])
    print(f"accuracy on the other digits: {net.score(x[1400:], y[1400:]):.3f}")
