"""Numbers in README, CHANGELOG and the pages: each is that of a committed result, or a test shows it."""

from __future__ import annotations

import json
import re
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
    return found("benchmarks_equal", row=row, method=method)["floor_cpu"]["middle"]


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


NUMBER = re.compile(
    r"(?<![\w.])\d*[.·]\d+(?![\w.])|\d+(?:\.\d+)? ?%|\d[\d,]* times|\d+(?:\.\d+)? (?:s|ms|MiB|minutes|seconds)\b"
)
# Thresholds of the library, each of which a test of its own asserts, and versions, which pyproject.toml has.
KNOWN = {"10 %": "hg.InaccurateHypergradient", "3.10": "requires-python", "2.6": "torch>=", "2.13": "constraints.txt"}
KNOWN |= dict.fromkeys(("3.11", "3.12", "3.13", "3.14"), "noxfile.py")


def prose(file: Path) -> list[str]:
    """The lines of a page without code, formulas and addresses."""
    text = re.sub(r"```.*?```|\$\$.*?\$\$", "", file.read_text(), flags=re.DOTALL)
    return re.sub(r"`[^`]*`|\$[^$]*\$|\]\([^)]*\)|https?://\S+", "", text).splitlines()


PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md"]
# Reports of results, which stand beside the tables of docs/results that they discuss.
REPORTS = ("estimators.md", "size.md")
PAGES += [
    file for file in sorted((ROOT / "docs").rglob("*.md")) if "results" not in file.parts and file.name not in REPORTS
]


@pytest.mark.parametrize("file", PAGES, ids=lambda file: str(file.relative_to(ROOT)))
def test_measured_numbers_are_those_of_results(file):
    tables = {re.sub(r"`[^`]*`", "", line) for line in speed()} if file.name == "README.md" else set()
    links = {Path(link).name for link in re.findall(r"results/\w+\.md", file.read_text())}
    links |= {page.name for page in RESULTS.glob("benchmarks_*.md") if "benchmarks.md" in links}
    linked = " ".join((RESULTS / name).read_text() for name in links)
    numbers = [found for line in prose(file) if line not in tables for found in NUMBER.findall(line)]
    numbers = [number for number in numbers if not re.search(rf"(?<![\d.])0?{re.escape(number)}", linked)]
    assert not [number for number in numbers if number not in KNOWN], "state it in docs/results, and link to it"
