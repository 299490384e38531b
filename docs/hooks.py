"""Make the README the front page of the documentation."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def on_page_markdown(markdown: str, page, **_) -> str:
    if page.file.src_uri != "index.md":
        return markdown
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    readme = readme.replace("](docs/", "](").replace('src="docs/', 'src="')
    # What lies outside docs/ is not on the site: keep the words of the link.
    return re.sub(r"(?<!!)\[([^\]]+)\]\((?!https?:|#)([^)]+)\)", lambda m: m[0] if in_docs(m[2]) else m[1], readme)


def in_docs(link: str) -> bool:
    return (ROOT / "docs" / link.split("#")[0]).is_file()
