"""Take pictures of every view of a report: each tab, light and dark, in windows of several widths.

    python examples/report_views.py runs/one-layer-quick pictures
    python examples/report_views.py runs/one-layer-quick/report.html pictures --widths 1024 --tabs overview routing

The files are called `<tab>-<theme>-<width>.png`. What a page should not do is told beside them: to be wider than its
window, and to complain on the console. Needs `pip install selenium` and Chromium with its driver (Debian and Ubuntu:
`apt-get install chromium chromium-driver`).
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from dashboard_screenshot import browser

WIDTHS, THEMES = (1440, 1024, 800), ("light", "dark")
HIGHEST = 8000  # pixels of one picture
PATIENCE = 120  # seconds until a tab must be drawn


def views(report: Path, out: Path, *, tabs: list[str] | None = None, widths: list[int] | None = None) -> list[str]:
    """Save a picture of each view; returns what is wrong with them, a line each.

    Raises: ValueError, for a tab that the page lacks; OSError, without a browser; TimeoutError, when nothing is drawn.
    """
    out.mkdir(parents=True, exist_ok=True)
    wrong = []
    with browser() as driver:
        driver.get(report.resolve().as_uri())
        there = driver.execute_script("return [...document.querySelectorAll('[role=tab]')].map((t) => t.dataset.tab)")
        for name in tabs or []:
            if name not in there:
                raise ValueError(f"no tab {name!r} in {report}: expected some of {', '.join(there)}")
        for width in widths or WIDTHS:
            for theme in THEMES:
                for tab in tabs or there:
                    wrong += [f"{tab}-{theme}-{width}: {text}" for text in view(driver, out, tab, theme, width)]
        wrong += [f"console: {entry['message']}" for entry in driver.get_log("browser")]
    return wrong


def view(driver: Any, out: Path, tab: str, theme: str, width: int) -> list[str]:
    """Save one view as high as it is; returns what is wrong with it."""
    set_size(driver, width, 900)
    driver.execute_script(
        "themes.find((one) => one.value === arguments[0]).click(); openTab(arguments[1]); redraw([arguments[1]])",
        theme,
        tab,
    )
    await_drawn(driver)
    wide, high = driver.execute_script("return [document.documentElement.scrollWidth, document.body.scrollHeight]")
    set_size(driver, width, min(int(high) + 40, HIGHEST))
    await_drawn(driver)
    driver.save_screenshot(str(out / f"{tab}-{theme}-{width}.png"))
    return [f"the page is {wide} pixels wide in a window of {width}"] if wide > width else []


def set_size(driver: Any, width: int, height: int) -> None:
    """The page's own size, one pixel of the picture for each of the page."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    time.sleep(0.2)  # the page is told some frames later


def await_drawn(driver: Any) -> None:
    """Wait until the page has drawn what it was asked for. Raises: TimeoutError, when it never does."""
    end = time.monotonic() + PATIENCE
    while driver.execute_script("return document.body.dataset.drawn") != "yes":
        if time.monotonic() > end:
            raise TimeoutError(f"a tab was not drawn within {PATIENCE} s: {driver.get_log('browser')}")
        time.sleep(0.1)


def add_widths(parser: argparse.ArgumentParser) -> None:
    """The option that says how wide windows are."""
    parser.add_argument(
        "--widths", nargs="+", type=int, metavar="PIXELS", help="of the window (default: 1440 1024 800)"
    )


def end_with(wrong: list[str], out: Path) -> None:
    """Say what is wrong with the pictures, and end with status 1 where something is."""
    print(*wrong, f"pictures: {out}", sep="\n")
    if wrong:
        sys.exit(1)


def main() -> None:
    """Read the command line, take the pictures, or say in one line why not."""
    parser = argparse.ArgumentParser(description="Save every view of a report of revprobe as a picture.")
    parser.add_argument("report", type=Path, help="a report.html, or the folder of a run or sweep that has one")
    parser.add_argument("out", type=Path, help="the folder for the pictures")
    parser.add_argument("--tabs", nargs="+", metavar="NAME", help="overview, routing, ... (default: all)")
    add_widths(parser)
    asked = parser.parse_args()
    report = asked.report / "report.html" if asked.report.is_dir() else asked.report
    try:
        wrong = views(report, asked.out, tabs=asked.tabs, widths=asked.widths)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    end_with(wrong, asked.out)


if __name__ == "__main__":
    main()
