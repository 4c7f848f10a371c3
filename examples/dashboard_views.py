"""Take pictures of every view of the dashboard: each tab and each of its figures, light and dark, of several widths.

    python examples/dashboard_views.py runs/one-layer-quick pictures --runs rope-l10-s0
    python examples/dashboard_views.py runs pictures --tabs training ask --widths 1024

The files are called `<view>-<theme>-<width>.png`. What a page should not do is told beside them: to be wider than its
window, and to complain on the console. Needs what `dashboard_screenshot.py` needs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from dashboard_screenshot import DRAWN, HIGHEST, WHOLE, await_true, browser, choose, runs_to_show, served
from report_views import THEMES, WIDTHS, add_widths, end_with, set_size

from revprobe.errors import RevprobeError, did_you_mean
from revprobe.report.dashboard.view import FIGURES, TABS
from revprobe.report.html.instruments import INSTRUMENTS

HEIGHT = 1000
STILL = 5  # looks a fifth of a second apart at which a page is as high as at the last
# What an instrument's tab shows once its run was looked into: a figure, or the command that takes one.
INSTRUMENT = "#panel-instrument:not(.stale) #instrument-said *"
# Parts beyond the window's right edge that no box of the page scrolls.
BEYOND = """
const wide = document.documentElement.clientWidth;
const scrolled = (part) => {
  for (let up = part.parentElement; up && up !== document.body; up = up.parentElement)
    if (["auto", "scroll", "hidden"].includes(getComputedStyle(up).overflowX) && up.id !== "main") return true;
  return false;
};
return [...document.querySelectorAll("#main *, #side *, header *")]
  .filter((part) => part.getClientRects().length && part.getBoundingClientRect().right > wide + 1 && !scrolled(part))
  .map((part) => `${part.tagName.toLowerCase()}#${part.id}`);
"""


def all_views(tabs: list[str] | None = None) -> dict[str, dict[str, str]]:
    """What the address of each view says, by a name for its picture. Raises: RevprobeError, for no such tab."""
    for name in tabs or []:
        if name not in TABS:
            raise RevprobeError(f"no tab {name!r}{did_you_mean(name, list(TABS))}")
    found: dict[str, dict[str, str]] = {}
    for tab in tabs or TABS:
        if tab in INSTRUMENTS:
            found |= {f"{tab}-{one}": {"tab": tab, "drawing": one} for one in INSTRUMENTS[tab].drawings}
        elif tab == "checkpoint":
            found |= {f"{tab}-{one}": {"tab": tab, "figure": one} for one in FIGURES}
        elif tab == "ask":
            found |= {tab: {"tab": tab}, f"{tab}-edited": {"tab": tab, "edit": "knockout"}}
        else:
            found[tab] = {"tab": tab}
    return found


def views(
    runs_dir: Path,
    out: Path,
    *,
    runs: list[str] | None = None,
    tabs: list[str] | None = None,
    widths: list[int] | None = None,
) -> list[str]:
    """Save a picture of each view; returns what is wrong with them, a line each.

    Args:
        runs: paths from `runs_dir`, the first of which is looked into; by default its first runs.
    Raises: RevprobeError, for no such folder, run or tab; OSError, without a browser; TimeoutError, when nothing is
        drawn.
    """
    asked, wrong = all_views(tabs), []
    out.mkdir(parents=True, exist_ok=True)
    with served(runs_dir) as address, browser() as driver:
        driver.get(address)
        shown = runs_to_show(driver, runs_dir, runs)
        fixed = [("run", shown[0]), *(("chosen", key) for key in shown)]
        fixed.append(("fact", first_fact(driver, f"{address}?{urlencode([('tab', 'pair'), *fixed])}")))
        for width in widths or WIDTHS:
            for theme in THEMES:
                for name, said in asked.items():
                    picture = out / f"{name}-{theme}-{width}.png"
                    asked_for = f"{address}?{urlencode([*said.items(), *fixed])}"
                    beyond = view(driver, asked_for, said["tab"], picture, theme, width)
                    wrong += [f"{picture.stem}: {part} is wider than the window" for part in beyond]
        wrong += [f"console: {entry['message']}" for entry in driver.get_log("browser")]
    return wrong


def first_fact(driver: Any, address: str) -> str:
    """The first fact that the page offers: without one, no pair is opened."""
    driver.get(address)
    await_true(lambda: driver.find_elements("id", "fact"), "the page")
    choose(driver, "fact")
    said = lambda: parse_qs(urlsplit(driver.current_url).query).get("fact")  # noqa: E731
    return str(await_true(said, "a fact in the address")[-1])


def view(driver: Any, address: str, tab: str, picture: Path, theme: str, width: int) -> list[str]:
    """Save one view as high as it is; returns the parts that reach beyond its window."""
    set_size(driver, width, HEIGHT)
    preferred = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", preferred)
    driver.get(address)
    drawn = INSTRUMENT if tab in INSTRUMENTS else DRAWN[tab]
    await_true(lambda: driver.find_elements("css selector", drawn), f"the tab {tab!r}")
    if tab == "training":
        await_true(lambda: driver.find_elements("css selector", "#numbers *"), "the numbers")
    await_still(driver)
    beyond = driver.execute_script(BEYOND)
    set_size(driver, width, min(int(driver.execute_script(WHOLE)), HIGHEST))
    await_still(driver)
    driver.save_screenshot(str(picture))
    return list(dict.fromkeys(beyond))


def await_still(driver: Any) -> None:
    """Wait until the page has been as high as it is for a while: figures take their room after they are drawn."""
    seen: list[int] = []

    def still() -> bool:
        seen.append(int(driver.execute_script("return document.querySelector('#main').scrollHeight")))
        return len(seen) > STILL and len(set(seen[-STILL:])) == 1

    await_true(still, "a page that stands still")


def main() -> None:
    """Read the command line, take the pictures, or say in one line why not."""
    parser = argparse.ArgumentParser(description="Save every view of the dashboard of a folder of runs as a picture.")
    parser.add_argument("runs_dir", type=Path, help="a folder of runs or sweeps")
    parser.add_argument("out", type=Path, help="the folder for the pictures")
    parser.add_argument("--runs", nargs="+", metavar="RUN", help="paths from RUNS_DIR; the first four by default")
    parser.add_argument("--tabs", nargs="+", metavar="NAME", help=f"of {', '.join(TABS)} (default: all)")
    add_widths(parser)
    asked = parser.parse_args()
    try:
        wrong = views(asked.runs_dir, asked.out, runs=asked.runs, tabs=asked.tabs, widths=asked.widths)
    except (RevprobeError, OSError) as error:
        sys.exit(f"error: {error}")
    end_with(wrong, asked.out)


if __name__ == "__main__":
    main()
