# %% [markdown]
# # Loggers: the metrics of a tracker in TensorBoard and in a CSV file
#
# `tracker.metrics()` is a flat dict of numbers, which every logger takes: `wandb.log(metrics, step)`,
# `mlflow.log_metrics(metrics, step)`, Lightning's `log_dict(metrics)`, the Trainer's `log(metrics)`.

# %%
import csv
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from torch.utils.tensorboard import SummaryWriter

import hypergrad as hg
from examples.common import Base, parse


@dataclass
class Config(Base):
    steps: int = 300
    """Training steps."""
    every: int = 10
    """Steps between two logs."""


if __name__ == "__main__":
    config = parse(Config, "A tracker's numbers in loggers", {"steps": 20})
    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    x = x.float() / 16
    model, decay = torch.nn.Linear(64, 10), torch.full((64,), -4.0, requires_grad=True)
    inner, outer = torch.optim.SGD(model.parameters(), 0.1), torch.optim.Adam([decay], 0.05)
    tracker = hg.bilevel.SOBA(model.parameters(), [decay], lr=0.1)
    folder = config.output / "with_loggers"
    folder.mkdir(parents=True, exist_ok=True)
    with SummaryWriter(str(folder)) as board, (folder / "metrics.csv").open("w", newline="") as file:
        table = None
        for step in range(config.steps):
            rows, others = torch.randint(0, 1000, (100,)), torch.randint(1000, 1400, (100,))
            train_loss = cross_entropy(model(x[rows]), y[rows]) + (decay.exp() * model.weight.square()).sum() / 2
            valid_loss = cross_entropy(model(x[others]), y[others])
            tracker.backward(valid_loss, train_loss)
            for each in (inner, outer, tracker):
                each.step()
            for each in (inner, outer):
                each.zero_grad()
            if (step + 1) % config.every == 0:
                metrics = {"train_loss": train_loss.item(), "valid_loss": valid_loss.item()} | tracker.metrics()
                for name, value in metrics.items():
                    board.add_scalar(name, value, step)
                if table is None:
                    table = csv.DictWriter(file, [*metrics], restval="", extrasaction="ignore")
                    table.writeheader()
                table.writerow(metrics)  # "step" is the number of steps of the tracker
    print(f"{config.steps // config.every} rows in {folder / 'metrics.csv'}; curves: tensorboard --logdir {folder}")
