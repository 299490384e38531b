"""Numbers in README, CHANGELOG and the pages: each is that of a committed result, or a test shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
SQRT = 'hg memory="sqrt"'
README = (ROOT / "README.md").read_text()


def found(file: str, **row: Any) -> dict[str, Any]:
    rows = json.loads((RESULTS / f"{file}.json").read_text())["results"]
    (only,) = [each for each in rows if all(each.get(key) == value for key, value in row.items())]
    return only


def equal(row: str, method: str) -> float:
    return found("benchmarks", row=row, method=method)["floor_cpu"]["middle"]


def accurate(method: str) -> float:
    times = [
        found("benchmarks_accuracy", row="quadratic", target=1e-6, method=each) for each in (method, "HyperTorch CG")
    ]
    return times[0]["cpu"]["middle"] / times[1]["cpu"]["middle"]


def memory(method: str) -> float:
    peaks = [found("benchmarks_unrolled", row="mlp", method=each)["memory"] for each in (method, "HyperTorch reverse")]
    return peaks[0] / peaks[1]


def speed() -> list[str]:
    eight = found("benchmarks_blocks", row="quadratic", method="hg.implicit.jacobian, BlockCG")["ratio"]["middle"]
    rows = [
        (
            "20 steps of CG, network of 269,322 parameters; time over that of the bare products",
            f"{equal('mlp', 'hg.implicit.grad, CG'):.2f}",
            f"HyperTorch {equal('mlp', 'HyperTorch CG'):.2f}, TorchOpt {equal('mlp', 'TorchOpt CG'):.2f}, "
            f"JAXopt {equal('mlp', 'JAXopt CG, jit'):.2f}",
        ),
        (
            "20 steps of an equilibrium, 10⁶ states; time over that of the bare steps",
            f"{equal('equilibrium', 'hg.nn.Equilibrium, inject'):.2f}",
            f"torchdeq {equal('equilibrium', 'torchdeq, inject'):.2f}",
        ),
        (
            "50 outer steps to an error of 1e-6, κ = 10⁵; time over HyperTorch's CG",
            f"{accurate('hg CG, Recycled(4)'):.2f} (`Recycled`), "
            f"{accurate('hg CG, Dense reused'):.2f} (`Reused(Dense())`)",
            f"TorchOpt {accurate('TorchOpt CG'):.2f}, JAXopt {accurate('JAXopt CG, jit'):.2f}",
        ),
        ("hypergradients of eight outer losses; time over HyperTorch's CG", f"{eight:.2f}", "one by one 1.00"),
        (
            "1,000 steps of gradient descent in reverse; memory over HyperTorch's",
            f"{memory(SQRT):.2f}",
            f"higher {memory('higher'):.2f}",
        ),
    ]
    return [f"| {' | '.join(row)} |" for row in rows]


@pytest.mark.parametrize("line", speed())
def test_the_table_of_speed_is_that_of_the_results(line):
    assert line in README.splitlines()


def test_the_readme_is_one_page():
    assert len(README.splitlines()) <= 120
