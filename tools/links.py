"""Check the links of the built site and of the repository's Markdown: their pages and sections have to exist.

Every page has to be at most two clicks from the front page. `python tools/links.py build/site`; with --external, the
addresses of other sites are opened, too.
"""

from __future__ import annotations

import re
import sys
import urllib.request
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parent.parent


class Page(HTMLParser):
    """The links, the sections and the pictures of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.links: set[str] = set()
        self.ids: set[str] = set()
        self.pictures: list[dict[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids |= {value for key in ("id", "name") if (value := values.get(key))}
        if tag == "a" and (link := values.get("href")):
            self.links.add(link)
        if tag == "img":
            self.pictures.append(values)


def checked(site: Path) -> tuple[list[str], set[str]]:
    """The errors of a built site, and the addresses of other sites that it links to."""
    pages = {
        file: Page(file.read_text(encoding="utf-8"))
        for file in sorted(site.rglob("*.html"))
        if "_static" not in file.parts
    }
    wrong, elsewhere, near = [], set(), {}
    for file, page in pages.items():
        near[file] = set()
        for link in sorted(page.links):
            parts = urlsplit(link)
            if parts.scheme in ("http", "https"):
                elsewhere.add(link)
                continue
            if parts.scheme:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            if not target.exists():
                wrong.append(f"{file.relative_to(site)}: {link} does not exist")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
                wrong.append(f"{file.relative_to(site)}: {link} has no such section")
            near[file].add(target)
        wrong += [f"{file.relative_to(site)}: a picture without alt" for p in page.pictures if p.get("alt") is None]
    front = site / "index.html"
    one = near[front]
    two = one.union(*(near.get(page, set()) for page in one), {front})
    names = {"genindex.html", "search.html", "py-modindex.html"}
    wrong += [
        f"{p.relative_to(site)} is more than two clicks away" for p in pages if p not in two and p.name not in names
    ]
    return wrong, elsewhere


def markdown() -> list[str]:
    """Links between files of the repository that do not exist."""
    wrong = []
    for file in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        text = re.sub(r"```.*?```", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            parts = urlsplit(link)
            if not parts.scheme and parts.path and not (file.parent / unquote(parts.path)).exists():
                wrong.append(f"{file.relative_to(ROOT)}: {link} does not exist")
    return wrong


def opened(address: str) -> str | None:
    request = urllib.request.Request(address, headers={"User-Agent": "hypergrad's documentation"})
    try:
        with urllib.request.urlopen(request, timeout=20):
            return None
    except Exception as error:
        return f"{address}: {error}"


def main() -> None:
    site = Path(sys.argv[1]).resolve()
    wrong, elsewhere = checked(site)
    wrong += markdown()
    if "--external" in sys.argv:
        wrong += [error for address in sorted(elsewhere) if (error := opened(address))]
    print("\n".join(wrong) or f"links: no errors; {len(elsewhere)} addresses of other sites")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
