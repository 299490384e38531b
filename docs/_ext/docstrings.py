"""Docstrings as the source has them, made into reStructuredText before napoleon reads their lists of arguments.

Formulas are blocks by their indentation, names stand in single backquotes, and a section such as `Returns: ...` is a
sentence.
"""

import re
from collections.abc import Iterator

from sphinx.application import Sphinx

SENTENCES = ("Returns", "Raises", "Warns", "Yields", "Cost", "Source", "Memory", "Precision")
SENTENCE = re.compile(rf"({'|'.join(SENTENCES)}):\s*(.*)")
LIST = re.compile(r"(Args|Attributes|Example|Examples):")
LITERAL = re.compile(r"(``.+?``|`[^`]+`)")


def indentation(line: str) -> int:
    return len(line) - len(line.lstrip())


def escaped(line: str) -> str:
    """A line whose *, | and final underscores are meant as such, where they stand outside backquotes."""
    parts = LITERAL.split(line)
    parts[::2] = [re.sub(r"([*|])", r"\\\1", re.sub(r"(\w)_(?!\w)", r"\1\\_", part)) for part in parts[::2]]
    return "".join(parts)


def table(rows: list[str]) -> Iterator[str]:
    """A table of Markdown as a list-table."""
    cells = [[cell.strip() for cell in row.strip().strip("|").split("|")] for row in rows]
    yield from ("", ".. list-table::", "   :header-rows: 1", "")
    for row in [cells[0], *cells[2:]]:
        yield from (f"   {'*' if number == 0 else ' '} - {escaped(cell)}" for number, cell in enumerate(row))
    yield ""


def blocks(lines: list[str]) -> Iterator[list[str]]:
    """Runs of lines that are set alike: a blank line, and a change of indentation to or from 0, end one."""
    block: list[str] = []
    for line in lines:
        if block and (not line or bool(indentation(line)) != bool(indentation(block[0]))):
            yield block
            block = []
        if line:
            block.append(line)
        else:
            yield [""]
    if block:
        yield block


def as_restructured(app, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    out: list[str] = []
    section = ""
    for block in blocks(lines):
        if block[0] and not indentation(block[0]):
            section = ""
            for line in block:
                if found := SENTENCE.fullmatch(line):
                    section = found[1]
                    out += ["", f"**{section}:** {escaped(found[2])}".rstrip()]
                elif LIST.fullmatch(line):
                    section = line
                    out += ["", line]
                elif line.startswith("| "):
                    out.append(line)
                else:
                    out.append(line if line.startswith(">>>") else escaped(line))
        elif not block[0]:
            out.append("")
        elif section in SENTENCES:
            out += [escaped(line.strip()) for line in block]
        elif section.startswith("Example"):
            out += block
        elif section:
            out += [escaped(line) for line in block]
        elif block[0].lstrip().startswith(("- ", ">>>")):
            out += block
        elif block[0].lstrip().startswith("| "):
            out += table(block)
        else:
            out += ["", "::", "", *block, ""]
    lines[:] = out
    rows = [number for number, line in enumerate(lines) if line.startswith("| ")]
    if rows:
        lines[rows[0] : rows[-1] + 1] = table(lines[rows[0] : rows[-1] + 1])


def as_a_sentence(app, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """napoleon takes what stands before a colon in the docstring of a property for its type: it is put back."""
    kinds = [number for number, line in enumerate(lines) if line.startswith(":type: ")]
    if what in ("attribute", "data", "property") and kinds:
        kind = lines.pop(kinds[0]).removeprefix(":type: ")
        lines[0] = f"{kind}: {lines[0]}"


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", as_restructured, priority=400)  # before napoleon's
    app.connect("autodoc-process-docstring", as_a_sentence, priority=600)  # after it
    return {"parallel_read_safe": True, "parallel_write_safe": True}
