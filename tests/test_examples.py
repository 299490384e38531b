"""The examples run as a user runs them, and print what they measured."""

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from examples import common

ROOT = Path(__file__).parents[1]
ROWS = ("untuned", "best single strength", "per pixel and class")


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "utf8", "-m", f"examples.{name}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=100)


def run_fast(name: str, *arguments: str, output: Path) -> Any:
    """The results of an example with --fast, after a look at all that it writes."""
    done = run(name, "--fast", "--output", str(output), *arguments)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr and "100%" in done.stderr
    assert sorted(path.name for path in output.iterdir()) == [f"{name}.{ending}" for ending in ("json", "md", "png")]
    png = (output / f"{name}.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(png[16:20], "big") >= 800
    report = json.loads((output / f"{name}.json").read_text())
    assert report["config"]["fast"] and report["versions"]["torch"] == torch.__version__
    text = (output / f"{name}.md").read_text(encoding="utf-8")
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(rows) > 2 and all(row in text for row in rows) and report["command"] in text
    return report["results"]


def scikit_learn(seed: int) -> tuple[float, float, float, float]:
    """Validation loss and accuracy, test loss and accuracy, of the untuned model."""
    x, y = load_digits(return_X_y=True)
    train, validation, test = np.split(
        torch.randperm(len(y), generator=torch.Generator().manual_seed(seed)), [400, 1200]
    )
    std = x[train].std(0, ddof=1)
    x = (x - x[train].mean(0)) / np.where(std > 0, std, 1)
    model = LogisticRegression(C=1.0, tol=1e-9, max_iter=10_000).fit(x[train], y[train])
    losses = [log_loss(y[rows], model.predict_proba(x[rows])) for rows in (validation, test)]
    return losses[0], model.score(x[validation], y[validation]), losses[1], model.score(x[test], y[test])


@pytest.mark.slow
def test_tune_digits(tmp_path):
    results = run_fast("tune_digits", "--seed", "4", output=tmp_path / "made")
    table, curves = results["table"], results["curves"]
    assert {len(curve) for curve in curves.values()} == {3}

    assert list(table) == list(ROWS)
    text = (tmp_path / "made" / "tune_digits.md").read_text(encoding="utf-8")
    for name, row in table.items():
        cells = [f"{part['loss']:.4f}, {part['accuracy']:.2%}" for part in row.values()]
        assert f"| {' | '.join([name, *cells])} |" in text
    untuned = [table["untuned"][part][key] for part in ("validation", "test") for key in ("loss", "accuracy")]
    np.testing.assert_allclose(untuned, scikit_learn(4), rtol=1e-5)
    losses = [table[name]["validation"]["loss"] for name in ROWS]
    assert losses[2] < min(losses[:2])
    assert curves["validation"] == sorted(curves["validation"], reverse=True)

    assert max(curves["inner problem"]) < 1e-5 and max(curves["adjoint"]) <= 1e-8
    for name in ("inner problem", "adjoint"):
        assert f"{max(curves[name]):.1e}" in text


@dataclass
class Config(common.Common):
    steps: int = 10
    """Steps."""
    sizes: tuple[int, ...] = (40, 40)
    """Sizes."""
    shuffle: bool = True
    """Whether."""


FAST = {"steps": 2, "sizes": (3,)}


def parse(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Config:
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    return common.parse(Config, "A test.", FAST)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--fast"],
        ["--fast", "--steps", "10"],  # the default without --fast
        ["--data", "folder", "--seed", "3", "--no-shuffle", "--sizes", "1", "2", "3"],
    ],
)
def test_the_saved_command_gives_the_configuration(arguments, monkeypatch):
    config = parse(monkeypatch, *arguments)
    program, *again = shlex.split(common.command(config))[2:]
    assert program == f"examples.{__name__}" and parse(monkeypatch, *again) == config


def test_options(monkeypatch, capsys):
    config = parse(monkeypatch, "--fast", "--seed", "5", "--sizes", "7")
    assert (config.steps, config.sizes, config.seed) == (2, (7,), 5) and torch.initial_seed() == 5
    assert json.loads(capsys.readouterr().out)["config"]["sizes"] == [7]


@pytest.mark.parametrize("wrong", [["--stepz", "3"], ["--steps", "three"], ["--steps"]])
def test_wrong_options(wrong, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(monkeypatch, *wrong)
    assert stopped.value.code == 2 and "--steps" in capsys.readouterr().err


def test_help(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(monkeypatch, "--help")
    shown = capsys.readouterr().out
    assert stopped.value.code == 0 and "A test." in shown and "Folder of the data set" in shown and "--steps" in shown


def test_save(monkeypatch, tmp_path, capsys):
    config = parse(monkeypatch, "--data", "/a/secret/folder", "--output", str(tmp_path / "made"))
    common.save(config, "Title", "| a |\n|---|\n| 1 |", Figure(), {"loss": [1.5]})
    report = json.loads((tmp_path / "made" / f"{__name__}.json").read_text())
    text = (tmp_path / "made" / f"{__name__}.md").read_text(encoding="utf-8")
    assert report["results"] == {"loss": [1.5]} and report["config"]["data"] == "folder"
    assert text.startswith("# Title\n\n| a |\n|---|\n| 1 |\n") and f"![Title]({__name__}.png)" in text
    assert report["command"] in text and "secret" not in text + json.dumps(report)
    assert "| 1 |" in capsys.readouterr().out


def test_peak_memory():
    given = torch.zeros(1000)
    with common.PeakMemory() as memory:
        for _ in range(3):
            made = given + 1
            made.add_(1)[:10].exp_()
            given.mul_(2)
    assert memory.peak in (4000, 8000)  # the old sum may still be there when the new one is made
