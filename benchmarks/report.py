"""What every section gives: results, a table of text, a picture; and how they are written."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from math import ceil
from pathlib import Path
from typing import Any

import torch

import hypergrad as hg

from .measure import Spread

MIB = 2.0**-20
PEERS = ("torchopt", "higher", "torchdeq", "betty-ml", "boat-torch", "jaxopt", "jax", "optimistix")
BLUE, GREY, RED = "#3465a4", "#b8b8b8", "#cc3333"


@dataclass(frozen=True)
class Section:
    """One part of the benchmark.

    `rows` are its problems; `measure(rows, words, rounds)` gives a dataclass a cell and the settings of each row, for
    the methods whose name holds one of the words (None: all).
    """

    title: str
    rows: Callable[[], Iterable[str]]
    measure: Callable[[Sequence[str], Sequence[str] | None, int | None], tuple[list[Any], list[dict]]]
    table: Callable[[list[Any]], str]
    draw: Callable[[list[Any], Path], None]


def cell(value: float | Spread | None, form: str, factor: float = 1.0) -> str:
    if value is None:
        return ""
    return format((value.middle if isinstance(value, Spread) else value) * factor, form)


def write(section: Section, results: list[Any], settings: list[dict], stem: Path) -> str:
    """Write the section's JSON and picture; its table, with what is missing said."""
    machine = surroundings()
    absent = [name for name in PEERS if name not in machine["packages"]]
    text = section.table(results) + (f"\nNot installed, hence not here: {', '.join(absent)}." if absent else "")
    document = {"title": section.title, "machine": machine, "rows": settings, "table": text.splitlines()}
    document["results"] = [asdict(r) for r in results]
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    section.draw(results, stem.with_suffix(".png"))
    return text


def markdown(lines: Sequence[str]) -> str:
    """A table of text as one of Markdown for each problem: entries, two blanks apart, go below the nearest title."""
    parts: list[str] = []
    titles: list[re.Match[str]] = []
    open_table = False
    for line in lines:
        words = list(re.finditer(r"\S+(?: (?!-\d|to exact)\S+)*", line))
        named = line[:1].strip() != ""
        numbers = sum(any(sign.isdigit() for sign in word[0]) for word in words[1:])
        if len(words) > 2 and 2 * numbers < len(words) - 1 and (named or not titles):
            titles, open_table = words[named:], False
            parts += [f"\n**{words[0][0]}**"] if named else []
        elif named and len(words) < 3:
            heading = len(line) < 60 and not line.endswith(".") and not (parts and parts[-1][-1:] not in "|")
            parts += [f"\n**{line}**"] if heading else ["\n"[: open_table or not parts] + line]
            open_table = False
        elif words:
            if not open_table:
                parts += ["\n|  | " + " | ".join(title[0] for title in titles) + " |", "|---" * (1 + len(titles)) + "|"]
                open_table = True
            parts.append("| " + " | ".join(_entries(words, titles)) + " |")
    return "\n".join(parts).strip()


def _entries(words: Sequence[re.Match[str]], titles: Sequence[re.Match[str]]) -> list[str]:
    """The name of a row and what stands below each title."""

    def away(word: re.Match[str], shift: int) -> list[int]:
        return [max(title.start() - word.end() + shift, word.start() - shift - title.end()) for title in titles]

    def places(shift: int) -> list[int]:
        return [min(range(len(titles)), key=away(word, shift).__getitem__) for word in words[1:]]

    # A name longer than its column moves the rest of its line.
    def fit(shift: int) -> tuple[int, int, int]:
        edges = [min(abs(title.end() - word.end() + shift) for title in titles) for word in words[1:]]
        return len({*places(shift)}), -sum(edge > 1 for edge in edges), -shift

    shift = max(range(12), key=fit) if len(words) > 2 else 0
    entries = [words[0][0], *("" for _ in titles)]
    for word, nearest in zip(words[1:], places(shift), strict=True):
        apart = min(away(word, shift)) > 0 and not any(sign.isdigit() for sign in word[0])
        place = 0 if apart else nearest + 1
        entries[place] = f"{entries[place]} {word[0]}".strip()
    return entries


def page(stems: Iterable[Path], target: Path) -> None:
    """One page of all sections that were measured, now or before."""
    parts = ["# Benchmarks", "`make bench` measures all of it, `make bench-peers` with the other libraries installed."]
    for stem in stems:
        if not stem.with_suffix(".json").exists():
            continue
        document = json.loads(stem.with_suffix(".json").read_text())
        if "table" not in document:
            continue
        machine, packages = document["machine"], document["machine"]["packages"]
        versions = ", ".join(f"{name} {number}" for name, number in packages.items())
        parts += [
            f"## {document['title']}",
            f"![{document['title']}]({stem.name}.png)",
            markdown(document["table"]),
            f"{machine['cpu']}, one thread, Python {machine['python']}; {versions}. "
            f"Load when measured: {machine['load'][0]:.1f}. [All numbers]({stem.name}.json).",
        ]
    target.write_text("\n\n".join(parts) + "\n")


def surroundings() -> dict[str, Any]:
    """The machine's kind and the versions."""
    listing = Path("/proc/cpuinfo")
    cpuinfo = listing.read_text() if listing.exists() else ""
    models = [line.split(":")[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    packages = {"torch": torch.__version__, "hypergrad": hg.__version__}
    packages |= {name: version(name) for name in ("numpy", "optree")}
    for name in PEERS:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "python": platform.python_version(),
        "packages": packages,
        "commit": commit.stdout.strip(),
    }


@contextmanager
def bars(path: Path, panels: Sequence[Any], title: str, width: float = 6.5, height: float = 3.6) -> Iterator[list[Any]]:
    """Axes for as many panels, two a line; saved at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(len(panels), 2)
    lines = ceil(len(panels) / columns)
    figure, axes = plt.subplots(lines, columns, figsize=(width * columns, height * lines), squeeze=False)
    for spare in axes.flat[len(panels) :]:
        spare.remove()
    yield list(axes.flat[: len(panels)])
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def ratio_axis(
    axis: Any,
    names: Sequence[str],
    ratios: Sequence[Spread | None],
    own: Sequence[bool],
    targets: Sequence[float | None],
) -> None:
    """A bar a name on a logarithmic axis, with quartiles; "wrong" where there is no ratio; a tick at the target."""
    for place, (ratio, ours, target) in enumerate(zip(ratios, own, targets, strict=True)):
        if ratio is None:
            axis.text(1.02, place, "wrong: no time", va="center", fontsize=8, color=RED)
            continue
        width = [[max(ratio.middle - ratio.low, 0)], [max(ratio.high - ratio.middle, 0)]]
        axis.barh(place, ratio.middle, color=BLUE if ours else GREY, xerr=width, ecolor="0.3")
        axis.text(ratio.high * 1.06, place, f"{ratio.middle:.2f}", va="center", fontsize=8)
        if target:
            axis.plot([target, target], [place - 0.45, place + 0.45], color=RED, linewidth=2)
    highest = max((r.high for r in ratios if r is not None), default=1.0)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set(xscale="log", xlim=(0.25, max(8.0, 2 * highest)), yticks=range(len(names)))
    ticks = [t for t in (0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256) if t < max(8.0, 2 * highest)]
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks], minor=False)
    axis.set_xticks([], minor=True)
    axis.set_yticklabels(names, fontsize=8)
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
