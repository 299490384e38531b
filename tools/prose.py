"""Check spelling (codespell) and the style rules below in README, CONTRIBUTING, CHANGELOG and the documentation."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RULES = {
    r"\b(simply|obviously|clearly|basically|of course)\b": "leave it out",
    r"\b(utili[sz]e|leverage|facilitate)\w*": "write 'use' or 'help'",
    r"\b(seamless|blazing|powerful|cutting-edge|state-of-the-art|elegant)\w*": "say what it does instead",
    r"\bin order to\b": "write 'to'",
    r"\b(please note|note that|it should be noted)\b": "leave it out",
    r"\b(and/or|etc\.)": "say what is meant",
    r"\b(regularization|neighbor|behavior|color|analyze)\w*\b": "British spelling in prose",
    r"!(?=\s|$)": "no exclamation marks",
    r"\b(\w+) \1\b": "a word twice",
    r"\b(TODO|FIXME|XXX)\b": "unfinished",
}
LONGEST = 65  # words of a sentence
# Words that codespell takes for misspelt.
KNOWN = "fo,ot,ue,thats,nd,te,ba,hist,als,sur,statics"


def prose(text: str) -> list[tuple[int, str]]:
    """The lines with their numbers, without code, tables, headings, front matter, names in backquotes and addresses."""
    lines, fence, header = [], None, text.startswith("---\n")
    for number, line in enumerate(text.splitlines(), 1):
        if header:
            header = not (number > 1 and line == "---")
            continue
        mark = re.match(r"\s*(```+|~~~+|\$\$)", line)
        if mark and fence is None:
            fence = None if line.strip().count("$$") == 2 else mark[1]
            continue
        if fence is not None:
            if line.strip().startswith(fence) or (line.strip().endswith("$$") and fence == "$$"):
                fence = None
            continue
        if line.startswith(("    ", "|", "#", ":::")):
            lines.append((number, ""))
            continue
        line = re.sub(r"`[^`]*`|\$[^$]*\$", "X", line)
        lines.append((number, re.sub(r"\]\([^)]*\)|https?://\S+", "]", line)))
    return lines


def complaints(file: Path) -> list[str]:
    lines = prose(file.read_text(encoding="utf-8"))
    found = []
    for number, line in lines:
        for rule, advice in RULES.items():
            hit = re.search(rule, line, re.IGNORECASE)
            if hit and hit[0] != "X X":
                found.append(f"{file.relative_to(ROOT)}:{number}: '{hit[0]}': {advice}")
    paragraphs = "\n".join(line for _, line in lines).split("\n\n")
    for paragraph in paragraphs:
        for item in re.split(r"\n\s*(?:[-*]|\d+\.)\s", "\n" + paragraph):
            for sentence in re.split(r"(?<=[.?!:;])\s", " ".join(item.split())):
                if len(sentence.split()) > LONGEST:
                    found.append(
                        f"{file.relative_to(ROOT)}: a sentence of {len(sentence.split())} words: {sentence[:60]}…"
                    )
    return found


def main() -> None:
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
    files += [file for file in sorted((ROOT / "docs").rglob("*.md")) if "results" not in file.parts]
    spelling = subprocess.run(
        [sys.executable, "-m", "codespell_lib", "--ignore-words-list", KNOWN, *map(str, files), str(ROOT / "src")],
        capture_output=True,
        text=True,
    )
    found = [*spelling.stdout.splitlines(), *(line for file in files for line in complaints(file))]
    print("\n".join(found) or f"prose: {len(files)} files, no complaint")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
