"""The examples run as a user runs them, and print what they measured."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

EXAMPLES = Path(__file__).parents[1] / "examples"
ROWS = ("untuned", "best single strength", "per pixel and class")


def run(script: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "utf8", str(EXAMPLES / script), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, encoding="utf-8", timeout=100)


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
    done = run("tune_digits.py", "--fast", "--seed", "4", "--output", "made/digits.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert "grid search: 100%" in done.stderr and "hypergradients: 100%" in done.stderr

    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["digits.json", "digits.png"]
    png = (tmp_path / "made" / "digits.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(png[16:20], "big") >= 800
    report = json.loads((tmp_path / "made" / "digits.json").read_text())
    configuration, table, curves = report["configuration"], report["table"], report["curves"]
    assert configuration["seed"] == 4 and {len(curve) for curve in curves.values()} == {configuration["steps"]}

    assert list(table) == list(ROWS)
    for name, row in table.items():
        shown = re.search(rf"^{name} +(.*)$", done.stdout, re.MULTILINE)
        assert shown, done.stdout
        values = [f(score) for score in row.values() for f in ("{0[loss]:.4f}".format, "{0[accuracy]:.2%}".format)]
        assert shown[1].split() == values
    untuned = [table["untuned"][part][key] for part in ("validation", "test") for key in ("loss", "accuracy")]
    np.testing.assert_allclose(untuned, scikit_learn(4), rtol=1e-5)
    losses = [table[name]["validation"]["loss"] for name in ROWS]
    assert losses[2] < min(losses[:2])
    assert curves["validation"] == sorted(curves["validation"], reverse=True)

    assert max(curves["inner problem"]) < 1e-5 and max(curves["adjoint"]) <= configuration["adjoint rtol"]
    for name in ("inner problem", "adjoint"):
        assert f"{max(curves[name]):.1e}" in done.stdout
    assert "'seed': 4" in done.stdout and re.search(r"^\d+\.\d s with ", done.stdout, re.MULTILINE)
