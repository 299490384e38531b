"""The examples in other frameworks: their numbers are those of a plain loop, and resumed runs end as whole ones do."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import hypergrad as hg

ROOT = Path(__file__).parents[1]


def parts():
    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    rows = (slice(1000), slice(1000, 1400))
    return [DataLoader(TensorDataset(x[part].float() / 16, y[part]), 100) for part in rows]


def plain(model, train, valid, epochs, anew=False):
    """The loop of docs/minibatches.md: weights and decays; with `anew`, each epoch begins the validation data anew."""
    decay = torch.full((64,), -4.0, requires_grad=True)
    inner, outer = torch.optim.SGD(model.parameters(), 0.1), torch.optim.Adam([decay], 0.05)
    tracker, others = hg.bilevel.SOBA(model.parameters(), [decay], lr=0.1), hg.bilevel.cycle(valid)
    for _ in range(epochs):
        others = hg.bilevel.cycle(valid) if anew else others
        for x, y in train:
            xv, yv = next(others)
            loss = cross_entropy(model(x), y) + (decay.exp() * model.weight.square()).sum() / 2
            tracker.backward(cross_entropy(model(xv), yv), loss)
            for each in (inner, outer, tracker):
                each.step()
            for each in (inner, outer):
                each.zero_grad()
    return model.weight, decay


def close(found, expected):
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.detach(), y.detach(), rtol=1e-5, atol=1e-7)


def test_accelerate(tmp_path):
    pytest.importorskip("accelerate")
    from examples.with_accelerate import Training

    def made(seed):
        torch.manual_seed(seed)
        return Training()

    whole, first, second = made(0), made(0), made(1)
    model = torch.nn.Linear(64, 10)
    model.load_state_dict(whole.model.state_dict())
    whole.run(2)
    first.run(1)
    first.accelerator.save_state(str(tmp_path))
    second.accelerator.load_state(str(tmp_path))
    second.run(1)
    assert torch.equal(second.model.weight, whole.model.weight) and torch.equal(second.decay, whole.decay)
    close((whole.model.weight, whole.decay), plain(model, *parts(), 2))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.utilities.combined_loader import CombinedLoader

    from examples.with_lightning import Digits

    def fit(module, epochs, resume=None):
        loaders = CombinedLoader(dict(zip(("train", "valid"), parts(), strict=True)), "max_size_cycle")
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", enable_checkpointing=False, default_root_dir=tmp_path, **quiet
        )
        trainer.fit(module, loaders, ckpt_path=resume)
        return trainer

    whole, first, second = Digits(), Digits(), Digits()
    first.load_state_dict(whole.state_dict())
    model = torch.nn.Linear(64, 10)
    model.load_state_dict(whole.model.state_dict())
    trainer = fit(whole, 2)
    assert trainer.global_step == 40 and trainer.logged_metrics["step"] == 20
    fit(first, 1).save_checkpoint(tmp_path / "half.ckpt")
    fit(second, 2, tmp_path / "half.ckpt")
    assert torch.equal(second.model.weight, whole.model.weight) and torch.equal(second.decay, whole.decay)
    assert second.tracker.metrics() == whole.tracker.metrics()
    close((whole.model.weight, whole.decay), plain(model, *parts(), 2, anew=True))


@pytest.mark.slow
def test_skorch():
    pytest.importorskip("skorch")
    from skorch.helper import predefined_split

    from examples.with_skorch import Net

    train, valid = parts()
    model, own = torch.nn.Linear(64, 10), torch.nn.Linear(64, 10)
    own.load_state_dict(model.state_dict())
    net = Net(
        own,
        criterion=torch.nn.CrossEntropyLoss,
        batch_size=100,
        lr=0.1,
        max_epochs=2,
        verbose=0,
        train_split=predefined_split(valid.dataset),
    )
    net.fit(train.dataset, y=None)
    close((net.module_.weight, net.decay_), plain(model, train, valid, 2))


@pytest.mark.slow
def test_loggers_hold_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    command = [sys.executable, "-X", "utf8", "-m", "examples.with_loggers", "--fast", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=110)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "with_loggers" / "metrics.csv").read_text().splitlines()))
    board = EventAccumulator(str(tmp_path / "with_loggers")).Reload()
    assert [float(row["step"]) for row in rows] == [10, 20] and "cosine" in rows[0]
    for name in ("valid_loss", "inner_norm"):
        np.testing.assert_allclose(
            [event.value for event in board.Scalars(name)], [float(row[name]) for row in rows], rtol=1e-6
        )


@pytest.mark.parametrize(
    "name", ["with_lightning", "with_accelerate", "with_skorch", "with_loggers", "optuna_structure"]
)
def test_examples_for_frameworks_are_short(name):
    assert (ROOT / "examples" / f"{name}.py").read_text().count("\n") < 60
