"""Each page of the built site in a headless browser, at the width of a desk and of a phone.

`python tools/screenshots.py build/site build/screenshots`. It takes Chromium or Chrome, by whatever name it is
installed, and fails where a page is wider than the phone: then readers have to scroll sideways.
"""

from __future__ import annotations

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
<script>page.onload = () => {{ const all = page.contentDocument.documentElement;
document.title = all.scrollWidth; document.body.append("width=" + all.scrollWidth + ";"); }}</script>"""


def browse(browser: str, *options: str) -> str:
    common = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files"]
    done = subprocess.run([browser, *common, *options], capture_output=True, text=True, timeout=120)
    return done.stdout


def width_of(browser: str, page: Path, width: int) -> int:
    """How wide the page is, where there is this much room."""
    with tempfile.NamedTemporaryFile("w", suffix=".html", delete=False) as file:
        file.write(PROBE.format(width=width, address=page.as_uri()))
    text = browse(browser, "--virtual-time-budget=4000", "--dump-dom", Path(file.name).as_uri())
    Path(file.name).unlink()
    found = re.search(r"width=(\d+);", text)
    return int(found[1]) if found else 0


def main() -> None:
    site, out = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        sys.exit(f"no browser: install one of {', '.join(BROWSERS)}")
    pages = [page for page in sorted(site.rglob("*.html")) if page.name not in ("genindex.html", "search.html")]
    wide = []
    for page in pages:
        name = str(page.relative_to(site).with_suffix("")).replace("/", "-")
        for kind, width in WIDTHS.items():
            target = out / kind / f"{name}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            browse(browser, f"--window-size={width},2400", f"--screenshot={target}", page.as_uri())
        found = width_of(browser, page, WIDTHS["phone"])
        if found == 0 or found > WIDTHS["phone"]:
            wide.append(f"{page.relative_to(site)}: {found or 'unknown'} pixels wide on a phone")
    print("\n".join(wide) or f"{len(pages)} pages at {len(WIDTHS)} widths, none wider than the phone")
    sys.exit(bool(wide))


if __name__ == "__main__":
    main()
