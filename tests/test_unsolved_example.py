"""The example whose inner problem is not solved runs as a user runs it, and its numbers are NumPy's."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import hypergrad as hg
import oracles
from helpers import problem_at
from test_oracles import relative

ROOT = Path(__file__).parents[1]


def check_numbers(results: dict) -> None:
    """What is called exact is so, by Newton's method and a dense solve in NumPy."""
    lam, curves, after = np.array(results["hparams"]), results["curves"], results["remedy"]
    true = oracles.hypertorch(lam)
    assert curves["exact loss"][-1] == pytest.approx(true.value, rel=1e-7)
    assert curves["exact norm"][-1] == pytest.approx(true.grad_norm, rel=1e-7)
    w = oracles.hypertorch_reverse(true.data, lam)
    assert curves["loss"][-1] == pytest.approx(w[0], rel=1e-10)
    assert curves["norm"][-1] == pytest.approx(np.linalg.norm(w[1]), rel=1e-8)
    assert curves["loss"][0] == pytest.approx(0.57440, abs=1e-5) and curves["loss"][10] == pytest.approx(
        0.53377, abs=1e-5
    )
    report = results["report"]
    assert report["settled"] and report["corrected_value"] == pytest.approx(true.value, rel=0.1)
    assert report["corrected_norm"] == pytest.approx(true.grad_norm, rel=0.1)
    assert any("the inner problem is not solved" in line and "refine" in line for line in report["advice"])
    best = np.array(after["hparams"])
    assert best.min() >= 1e-8
    assert min(after["loss"]) == pytest.approx(oracles.hypertorch(best).value, rel=1e-5)


def test_report_of_the_published_run():
    """The contraction factor of gradient descent is that at the solution, not where the example stands."""
    run = oracles.hypertorch_logistic()
    true = oracles.hypertorch(run.hparams)
    lam, w = torch.from_numpy(run.hparams).requires_grad_(), torch.from_numpy(run.params)
    p = problem_at("hypertorch")
    given = {"outer_loss": p.outer_loss, "params": [w], "hparams": [lam], "fp_map": p.fp_map, "symmetric": True}
    report = hg.diagnostics.check([torch.from_numpy(run.grad)], **given)
    assert report.estimate.settled and relative(report.estimate.params[0], true.solution) < 0.02
    assert report.estimate.corrected_value == pytest.approx(true.value, rel=0.1)
    assert report.estimate.corrected_norm == pytest.approx(true.grad_norm, rel=0.1)
    q = 1 - 0.1 * np.linalg.eigvalsh(true.matrix)[0]
    (line,) = [line for line in report.advice if "the inner problem is not solved" in line]
    assert f"contraction factor is {q:.5g}"[:-1] in line
    steps = int(re.search(r"about (\d+) more", line)[1])
    assert steps == pytest.approx(np.log(1e-3) / np.log(q), rel=0.03)
    assert "0.9935" in str(report)  # ρ where the example stands


@pytest.mark.slow
def test_fast(tmp_path):
    command = [sys.executable, "-X", "utf8", "-m", "examples.unsolved", "--fast", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=100)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr and "100%" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"unsolved.{ending}" for ending in ("json", "md", "png")
    ]
    results = json.loads((tmp_path / "unsolved.json").read_text())["results"]
    check_numbers(results)
    assert min(results["remedy"]["loss"]) < 0.04 < results["curves"]["exact loss"][-1]
    text = (tmp_path / "unsolved.md").read_text(encoding="utf-8")
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(rows) == 6 and all(row in text for row in rows)


def test_results_page():
    """The numbers on the results page: 0.2805 and 0.07 claimed, 0.0784 and 55.0 true, 0.0321 reached."""
    results = json.loads((ROOT / "docs" / "results" / "unsolved.json").read_text())["results"]
    check_numbers(results)
    curves = results["curves"]
    assert curves["loss"][100] == pytest.approx(0.28535, abs=1e-5)
    assert curves["loss"][-1] == pytest.approx(0.2805, abs=5e-5) and curves["norm"][-1] == pytest.approx(0.07, abs=5e-3)
    assert curves["exact loss"][-1] == pytest.approx(0.0784, abs=5.1e-5)
    assert curves["exact norm"][-1] == pytest.approx(55.0, abs=0.05)
    assert min(results["remedy"]["loss"]) == pytest.approx(oracles.hypertorch_optimum().value, abs=5e-5)
