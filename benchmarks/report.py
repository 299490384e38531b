"""A section of the benchmark (results, a table of text, a picture), and how it is written to files."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import hypergrad as hg

from .measure import Spread

MIB = 2.0**-20
_SPREAD = {"low", "middle", "high"}
PEERS = ("torchopt", "higher", "torchdeq", "betty-ml", "boat-torch", "jaxopt", "jax", "optimistix")


@dataclass(frozen=True)
class Section:
    """One part of the benchmark.

    `rows` returns the names of its problems. `measure(rows, words, rounds)` returns one dataclass per method and row,
    and the settings of each row, for methods whose name holds one of the words (None: all). `about` is the text of the
    page: what is compared, and what the columns are.
    """

    title: str
    rows: Callable[[], Iterable[str]]
    measure: Callable[[Sequence[str], Sequence[str] | None, int | None], tuple[list[Any], list[dict]]]
    table: Callable[[list[Any]], str]
    draw: Callable[[list[Any], Path], None]
    about: str


def cell(value: float | Spread | None, form: str, factor: float = 1.0) -> str:
    if value is None:
        return ""
    return format((value.middle if isinstance(value, Spread) else value) * factor, form)


def write(section: Section, results: list[Any], settings: list[dict], stem: Path) -> str:
    """Write the section's JSON and picture. Returns its table, with the libraries that are not installed."""
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
    """A table of text as one Markdown table per problem. Two blanks part entries; each goes below the nearest title."""
    parts: list[str] = []
    titles: list[re.Match[str]] = []
    open_table = False
    for line in lines:
        words = list(re.finditer(r"\S+(?: (?!-\d|to exact)(?<!\] )\S+)*", line))
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
    """The name of a row, and its entry below each title."""

    def away(word: re.Match[str], shift: int) -> list[int]:
        return [max(title.start() - word.end() + shift, word.start() - shift - title.end()) for title in titles]

    def places(shift: int) -> list[int]:
        return [min(range(len(titles)), key=away(word, shift).__getitem__) for word in words[1:]]

    # A name longer than its column moves the other entries of its line to the right.
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


def pages(sections: Mapping[str, Section], folder: Path) -> None:
    """Write a page for each section with a JSON file in the folder, and the page that lists them."""
    listing = [
        "# Benchmarks",
        "`make bench` measures all of it, `make bench-peers` with the other libraries installed.",
    ]
    for name, section in sections.items():
        stem = folder / f"benchmarks_{name}"
        if not stem.with_suffix(".json").exists():
            continue
        document = json.loads(stem.with_suffix(".json").read_text())
        title = section.title
        machine, packages = document["machine"], document["machine"]["packages"]
        versions = ", ".join(f"{package} {number}" for package, number in packages.items())
        parts = [
            f"# {title}",
            section.about,
            f"![{title}: a picture of the table below]({stem.name}.png)",
            markdown(document["table"]),
            f"`python -m benchmarks {name}`, {machine['cpu']}, one thread, Python {machine['python']}; {versions}. "
            f"Load when measured: {machine['load'][0]:.1f}. [All numbers]({stem.name}.json).",
        ]
        stem.with_suffix(".md").write_text("\n\n".join(parts) + "\n")
        listing.append(f"- [{title}]({stem.name}.md)")
    (folder / "benchmarks.md").write_text("\n\n".join(listing[:2]) + "\n\n" + "\n".join(listing[2:]) + "\n")


def redraw(section: Section, stem: Path) -> None:
    """Draw the picture again from the JSON file."""

    def revived(entry: dict[str, Any]) -> SimpleNamespace:
        spreads = {k: Spread(**v) for k, v in entry.items() if isinstance(v, dict) and v.keys() == _SPREAD}
        return SimpleNamespace(**entry | spreads)

    document = json.loads(stem.with_suffix(".json").read_text())
    section.draw([revived(entry) for entry in document["results"]], stem.with_suffix(".png"))


def surroundings() -> dict[str, Any]:
    """The machine, its load, and the versions of the software."""
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
