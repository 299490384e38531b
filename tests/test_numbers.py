"""Numbers in README, CHANGELOG and the pages must be those of committed results, or be shown by a test."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path
from statistics import median
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


def short(value: float, digits: int = 2) -> str:
    """A number as text, without the 0 before the decimal point."""
    return f"{value:.{digits}f}".replace("-", "−").replace("0.", ".", 1 if abs(value) < 1 else 0)


ESTIMATORS = json.loads((RESULTS / "benchmarks_estimators.json").read_text())
MIDWAY = [row["row"] for row in ESTIMATORS["rows"] if not row["row"].endswith(("to the end", "large steps"))]
NAMES = {
    "CG, damping −2 least": "CG, damping −2 · least",
    "CG, damping top/10": "CG, damping top/10",
    "MINRES, 20 steps": "MINRES, 20 steps",
    "Gauss–Newton, damping 1/ηT": "Gauss–Newton, damping 1/ηT",
    "Gauss–Newton, metric/ηT": "Gauss–Newton, the optimiser's metric/ηT",
    "Neumann, 20 terms": "Neumann, 20 terms",
    "SOBA, going along": "SOBA, run along",
    "F2SA-2, going along": "F2SA-2, run along (penalty 100)",
    "10 steps unrolled": "10 more steps, unrolled",
    "one step unrolled": "one more step, unrolled",
    "SAMA": "SAMA",
    "T1–T2": "T1–T2",
}


def each(key: str, method: str, part: str, rows: list[str] = MIDWAY, by_row: bool = False) -> list[float]:
    """The values of all networks and seeds, or the median of each network."""
    found = [r[key] for r in ESTIMATORS["results"] if (r["method"], r["part"]) == (method, part) and r["row"] in rows]
    return [median(values) for values in found] if by_row else [value for values in found for value in values]


def estimators() -> list[str]:
    """The rows of the page on estimators, and the numbers of its sentences."""
    lines = []
    for method, name in NAMES.items():
        cosines = [each("cosines", method, part) for part in ("decay", "weights")]
        errors = [f"{median(each('errors', method, part)):.2g}" for part in ("decay", "weights")]
        passes = each("passes", method, "decay", by_row=True)
        cost = f"{min(passes):.0f}" + (f"–{max(passes):.0f}" if max(passes) > min(passes) else "")
        if "going along" in method:
            cost = f"{3 if 'SOBA' in method else 5} a step"
        cells = [f"{short(median(values))}, {short(min(values))}" for values in cosines]
        lines.append(f"| {name} | {' | '.join(cells)} | {', '.join(errors).replace('0.', '.')} | {cost} |")
    settings = ESTIMATORS["rows"]
    rough = next(row for row in settings if row["row"] == "GPT-2, large steps")
    solved = [
        error
        for method in NAMES
        for part in ("decay", "weights")
        for error in each("errors", method, part, [settings[0]["row"]], by_row=True)
        if "unrolled" not in method and method != "SAMA"
    ]
    best = [
        min(each("errors", method, part, [row], by_row=True)[0] for method in NAMES)
        for row, part in product(MIDWAY, ("decay", "weights"))
    ]
    sizes = [row["parameters"] for row in settings]
    agree = [error < 1.05e-6 for row in settings for error in row["differences, 0.0001"]]
    far = [100 * error for error in rough["differences, 0.1"]]
    metric, plain = (
        each("errors", f"Gauss–Newton, {kind}/ηT", "decay", ["ViT"], by_row=True)[0] for kind in ("metric", "damping 1")
    )
    copies = [
        median(each("errors", "F2SA-2, going along", part, [row]))
        for row, part in product(("ViT", "GPT-2", "LoRA of GPT-2"), ("decay", "weights"))
    ]
    eval_, vit = (
        max(each("errors", method, part, [row]))
        for method, part, row in (
            ("F2SA-2, going along", "decay", "ResNet, BatchNorm eval"),
            ("T1–T2", "weights", "ViT"),
        )
    )
    return [
        *lines,
        f"{min(sizes)} to {max(sizes):,} parameters",
        f"agree to 1e-6 on {sum(agree)} of {len(agree)} runs",
        f"damping and truncation cost errors of {min(e for e in solved if e > 1e-3):.1%} to {max(solved):.0%}",
        f"the smallest relative error is {short(min(best))} to {max(best):.0f}",
        f"on the ViT a relative error of {short(metric)}, where the same damping without the metric has {plain:.1f}",
        f"(relative errors of {short(min(copies))} to {short(max(copies))} on the ViT, GPT-2 and LoRA)",
        f"a relative error of {eval_:.0f} on one seed of the ResNet with frozen statistics",
        f"T1–T2 has a relative error of up to {vit:.0f}",
        f"(they agree to {100 * max(rough['differences, 0.0001']):.2f} % over a step of 1e-4)",
        f"over a step of .1 in log λ it is {min(far):.0f} to {max(far):.0f} % off",
    ]


def sizes() -> list[str]:
    """The rows of the page on large problems that were measured, and what F2SA takes."""
    methods = {
        "implicit.grad, CG": "`implicit.grad`, `CG(3)`",
        "implicit.grad, Neumann": "`implicit.grad`, `Neumann(3)`",
        "implicit.grad, CG, Sum": "CG over a `Sum` of two batches",
        "SOBA, a step": "`SOBA`, a step",
        "F2SA, a step": "`F2SA(order=2)`, a step",
    }
    columns = (
        "1e6 parameters",
        "1e7 parameters",
        "1e7 parameters, 1e7 hparams",
        "1e5 parameters, 20,000 leaves",
        "1e8 parameters",
    )
    lines, ratios = [], []
    for method, name in methods.items():
        found_ = [found("benchmarks_size", row=row, method=method) for row in columns]
        times = [f"{row['ratio']['middle']:.2f}" for row in found_]
        held = [f"{abs(row['vectors']):.1f} ({abs(row['by_hand']):.1f})" for row in found_]
        lines += [f"| {name} | {' | '.join(times)} |", f"| {name} | {' | '.join(held)} |"]
        ratios += [row["ratio"]["middle"] for row in found_ if "F2SA" in method]
    low, high = (round(100 * (bound(ratios) - 1), -1) for bound in (min, max))
    return [*lines, f"`F2SA` takes {low:.0f} to {high:.0f} % longer than its passes"]


def plan(parameters: float, ranks: int) -> dict[str, float]:
    """The memory of sharded parameters in GB per rank: weights in bfloat16, everything else in float32."""
    weights, part = 2 * parameters / 1e9, parameters / 1e9 / ranks
    sent = weights * (ranks - 1) / ranks
    return {
        "whole": weights,
        "weights": 2 * part,
        "vector": 4 * part,
        "adam": 12 * part,
        "sent": sent,
        "step": 4 * sent,
    }


def on_paper() -> list[str]:
    """What the plans of the page on large problems come to."""
    seven, one, hundred = plan(7e9, 8), plan(1e9, 8), plan(1e11, 256)
    v, step, bandwidth = seven["vector"], seven["step"], 50
    cg, soba = (round(count * step, -1) for count in (13, 3))
    held = round(60 * seven["adam"])
    return [
        f"{seven['weights']:.2f} GB of weights, {seven['adam']:.1f} GB of master weights and moments",
        f"and {v:.1f} GB of gradients a GPU, {seven['weights'] + seven['adam'] + v:.0f} GB in all",
        f"A whole copy of the weights is {seven['whole']:.0f} GB",
        f"a sharded vector is {v:.1f} GB a GPU",
        f"sends {seven['sent']:.1f} GB (bfloat16) or {2 * seven['sent']:.1f} GB (float32) from each GPU",
        f"for S = 8,192 about {short(6 * 7e9 * 8192 / 400e12, 1)} s at 400 Tflop/s",
        f"| {step:.0f} GB (two all-gathers, a reduce-scatter) | {step / bandwidth:.0f} s |",
        f"| {seven['whole']:.0f} + 5 · {v:.1f} = {seven['whole'] + 5 * v:.1f} GB, and the graph",
        f"| about 13 · {step:.0f} = {cg:.0f} GB | {cg / bandwidth:.0f} s |",
        f"| {seven['whole']:.0f} + {v:.1f} = {seven['whole'] + v:.1f} GB, and that graph "
        f"| about 3 · {step:.0f} = {soba:.0f} GB | {soba / bandwidth:.0f} s |",
        f"| 2 · {v:.1f} = {2 * v:.0f} GB ({6 * v:.0f} GB with Adam) | 5 · {step:.0f} = {5 * step:.0f} GB "
        f"| {5 * step / bandwidth:.0f} s |",
        f"| 2 · {v:.1f} = {2 * v:.0f} GB | 4 · {step:.0f} = {4 * step:.0f} GB | {4 * step / bandwidth:.0f} s |",
        f"60 checkpoints of weights and moments, {seven['adam']:.1f} GB each: offloaded to the hosts, {held} GB a GPU "
        f"| 3,000 · {step:.0f} GB | {round(3000 * step / bandwidth / 60, -1):.0f} min |",
        f"a replicated vector is {8 * one['vector']:.0f} GB, whole weights are {one['whole']:.0f} GB",
        f"CG(10) sends 13 · {one['step']:.0f} = {round(13 * one['step'], -1):.0f} GB a GPU",
        f"a sharded vector is {hundred['vector']:.1f} GB a GPU, and whole weights are {hundred['whole']:.0f} GB",
        f"({2 * hundred['vector']:.1f} GB for two copies, {6 * hundred['vector']:.1f} GB with Adam; five passes, "
        f"each of which sends {round(hundred['step'], -1):.0f} GB a GPU",
    ]


def plain(text: str) -> str:
    return " ".join(text.split())


# Sentences of pages with numbers from the results; the test below checks all other numbers.
SAID = {"README.md": speed(), "docs/estimators.md": estimators(), "docs/size.md": [*sizes(), *on_paper()]}


@pytest.mark.parametrize(("page", "words"), [(page, words) for page, every in SAID.items() for words in every])
def test_pages_say_what_the_results_are(page, words):
    assert words in plain((ROOT / page).read_text())


def test_the_readme_is_one_page():
    assert len(README.splitlines()) <= 120


NUMBER = re.compile(
    r"(?<![\w.])\d*[.·]\d+(?![\w.])|\d+(?:\.\d+)? ?%|\d[\d,]* times|\d+(?:\.\d+)? (?:s|ms|MiB|minutes|seconds)\b"
)
# Thresholds of the library, each of which a separate test asserts, and versions, which are in pyproject.toml.
KNOWN = {"10 %": "hg.InaccurateHypergradient", "3.10": "requires-python", "2.6": "torch>=", "2.13": "constraints.txt"}
KNOWN |= dict.fromkeys(("3.11", "3.12", "3.13", "3.14"), "noxfile.py")


def prose(file: Path) -> str:
    """A page without sentences taken from the results, code, formulas and addresses."""
    text = re.sub(r"```.*?```|\$\$.*?\$\$", "", file.read_text(), flags=re.DOTALL)
    text = plain(text)
    for words in SAID.get(str(file.relative_to(ROOT)), ()):
        text = text.replace(words, "")
    return re.sub(r"`[^`]*`|\$[^$]*\$|\]\([^)]*\)|https?://\S+", "", text)


PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md"]
PAGES += [file for file in sorted((ROOT / "docs").rglob("*.md")) if "results" not in file.parts]


@pytest.mark.parametrize("file", PAGES, ids=lambda file: str(file.relative_to(ROOT)))
def test_measured_numbers_are_those_of_results(file):
    links = {Path(link).name for link in re.findall(r"results/\w+\.md", file.read_text())}
    links |= {page.name for page in RESULTS.glob("benchmarks_*.md") if "benchmarks.md" in links}
    linked = " ".join((RESULTS / name).read_text() for name in links)
    numbers = NUMBER.findall(prose(file))
    numbers = [number for number in numbers if not re.search(rf"(?<![\d.])0?{re.escape(number)}", linked)]
    assert not [number for number in numbers if number not in KNOWN], "state it in docs/results, and link to it"
