"""The example on many ranks: run as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_fast(tmp_path):
    command = [sys.executable, "-X", "utf8", "-m", "examples.distributed", "--fast", "--output", "made"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8", errors="replace", timeout=110
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "made" / "distributed.json").read_text())["results"]
    assert {name: sorted(rows) for name, rows in results.items()} == {name: ["1", "2"] for name in results}
    for rows in results.values():
        assert rows["2"]["difference"] < 1e-8 and rows["2"]["bytes"] > 0
    clean, noise = results["GPT, F2SA on FSDP2"]["1"]["weights"]
    assert clean > noise
