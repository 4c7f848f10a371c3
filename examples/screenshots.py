"""Take a picture of a report: open it in a headless Chromium, wait until its figures are drawn, save a PNG.

    python examples/screenshots.py runs/one-layer-quick/report.html examples/images/report.png
    python examples/screenshots.py report.html curves.png --sections signatures routing

Needs Chromium (Debian and Ubuntu: `apt-get install chromium`) and nothing else: it is run twice on a copy of the page,
once to learn how high the page is and once for the picture.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH = 1240  # the page's 1200 pixels and a margin
# Hides the sections that were not asked for, and tells the page's height once the figures stand.
MEASURE = """
<style>.modebar { display: none !important } %s</style>
<script>
(async () => {
  while (document.body.dataset.drawn !== "yes") await new Promise((resolve) => setTimeout(resolve, 50));
  if (%s) await showAll();  // the sections that were asked for may lie in other tabs than the first
  document.body.dataset.height = Math.ceil(document.body.getBoundingClientRect().bottom);
})();
</script>
"""


def screenshot(report: Path, picture: Path, *, sections: list[str] | None = None, width: int = WIDTH) -> Path:
    """Save `report`, or some of its sections, as `picture`.

    Raises: ValueError, for a page without such a section or whose figures are not drawn; OSError, without a browser.
    """
    page = report.read_text(encoding="utf-8")
    there = re.findall(r'<section id="section-([\w-]+)"', page)
    for name in sections or []:
        if name not in there:
            raise ValueError(f"no section {name!r} in {report}: expected some of {', '.join(there)}")
    hidden = [f"#section-{name}" for name in there if sections and name not in sections]
    style = f"{', '.join(hidden)} {{ display: none; }}" if hidden else ""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "page.html"
        every = str(bool(sections)).lower()
        copy.write_text(page.replace("</body>", MEASURE % (style, every) + "</body>"), encoding="utf-8")
        drawn = browse(copy, "--dump-dom", f"--window-size={width},1000")
        height = re.search(r'data-height="(\d+)"', drawn)
        if not height:
            raise ValueError(f"the figures of {report} were not drawn: expected a page written by `revprobe report`")
        picture.parent.mkdir(parents=True, exist_ok=True)
        browse(copy, f"--screenshot={picture.resolve()}", f"--window-size={width},{height[1]}")
    return picture


def browse(page: Path, *options: str) -> str:
    """Open a page in a headless browser, with a profile of its own, and return what it prints."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        raise OSError(f"no browser found: expected one of {', '.join(BROWSERS)}; try `apt-get install chromium`")
    # No sandbox: containers rarely allow it, and the page is our own. Virtual time: all timers have run at the shot.
    fixed = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=20000"]
    command = [browser, *fixed, f"--user-data-dir={page.parent / 'profile'}", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=True).stdout


def main() -> None:
    """Read the command line, take the picture, or say in one line why not."""
    parser = argparse.ArgumentParser(description="Save a report of revprobe as a picture.")
    parser.add_argument("report", type=Path, help="the report.html of a run or sweep")
    parser.add_argument("picture", type=Path, help="the PNG to write")
    parser.add_argument(
        "--sections", nargs="+", metavar="NAME", help="top, final, signatures, routing, ... (default: the first tab)"
    )
    asked = parser.parse_args()
    try:
        print(screenshot(asked.report, asked.picture, sections=asked.sections))
    except (ValueError, OSError, subprocess.SubprocessError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
