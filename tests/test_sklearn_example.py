"""The comparison of many penalties with one: run as a user runs it."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_fast(tmp_path):
    command = [sys.executable, "-X", "utf8", "-m", "examples.sklearn_penalties", "--fast", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=110)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "sklearn_penalties.json").read_text())["results"]
    assert set(results) == {"diabetes", "3 x 4"}
    bands = results["3 x 4"]["scores"]
    assert bands["RidgeHG"][0] > bands["RidgeHG, single"][0] + 0.02
    text = (tmp_path / "sklearn_penalties.md").read_text(encoding="utf-8")
    assert "**3 bands, 4 targets**, test R²" in text and "| RidgeHG, no shrinkage | 2 |" in text


@pytest.mark.slow
def test_structure_by_trials(tmp_path):
    command = [sys.executable, "-X", "utf8", "-m", "examples.optuna_structure", "--fast", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=110)
    assert done.returncode == 0, done.stderr
    if importlib.util.find_spec("optuna") is None:
        assert "This example needs Optuna: pip install optuna" in done.stdout
    else:
        assert len(json.loads((tmp_path / "optuna_structure.json").read_text())["results"]["losses"]) == 3
