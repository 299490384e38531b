"""Screenshots of each page of the built site in a headless browser, on a desktop and on a phone, in both themes.

`python tools/screenshots.py build/site build/screenshots` uses Chromium or Chrome, under any name of its executable.
It fails if a page is wider than the phone, if text has less contrast with its background than WCAG 2 requires at level
AA (4.5:1, large text 3:1), or if a picture has no description. With --check it only checks and takes no screenshots.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chromium-headless-shell")
WIDTHS = {"desk": 1300, "phone": 390}
PROBE = """<!doctype html><meta charset="utf-8">
<iframe id="page" width="{width}" height="2000" src="{address}"></iframe>
<script>{script}
page.onload = () => document.body.append("found=" + JSON.stringify(looked(page.contentWindow)) + "=found");</script>"""
SCRIPT = Path(__file__).with_name("screenshots.js")


def browse(browser: str, *options: str) -> str:
    common = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files"]
    done = subprocess.run([browser, *common, *options], capture_output=True, text=True, timeout=120)
    return done.stdout


def complaints(browser: str, page: Path, width: int) -> list[str]:
    """The errors of a page in a window of this width (pixels)."""
    with tempfile.NamedTemporaryFile("w", suffix=".html", delete=False) as file:
        file.write(PROBE.format(width=width, address=page.as_uri(), script=SCRIPT.read_text()))
    text = browse(browser, "--virtual-time-budget=6000", "--dump-dom", Path(file.name).as_uri())
    Path(file.name).unlink()
    answer = re.search(r"found=(\{.*\})=found", text)
    if answer is None:
        return ["the browser did not answer"]
    found = json.loads(html.unescape(answer[1]))
    wrong = [f"{found['width']} pixels wide in a window of {width}"] if found["width"] > width else []
    wrong += [] if found["letters"] > 100 else ["too few letters were found to judge their contrast"]
    return wrong + found["faint"] + found["undescribed"]


def main() -> None:
    site, out = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        sys.exit(f"no browser: install one of {', '.join(BROWSERS)}")
    pages = [page for page in sorted(site.rglob("*.html")) if page.name not in ("genindex.html", "search.html")]
    wrong = []
    for page in pages:
        name = str(page.relative_to(site).with_suffix("")).replace("/", "-")
        for kind, width in WIDTHS.items():
            if "--check" not in sys.argv:
                target = out / kind / f"{name}.png"
                target.parent.mkdir(parents=True, exist_ok=True)
                browse(browser, f"--window-size={width},2400", f"--screenshot={target}", page.as_uri())
            wrong += [f"{page.relative_to(site)}, {kind}: {each}" for each in complaints(browser, page, width)]
    print(
        "\n".join(wrong) or f"{len(pages)} pages: none wider than the screen, no faint letters, all pictures described"
    )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
