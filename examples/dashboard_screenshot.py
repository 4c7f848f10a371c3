"""Take a picture of the dashboard: serve a folder of runs, open one view of it in a headless Chromium.

    python examples/dashboard_screenshot.py runs/one-layer-quick examples/images/dashboard.png
    python examples/dashboard_screenshot.py runs dashboard.png --runs one-layer/rope-l10-s0 one-layer/alibi-l10-s0
    python examples/dashboard_screenshot.py runs/one-layer-quick examples/images/ask.png --runs rope-l10-s0 \
        --view 'tab=ask&fact=a&edit=knockout'

A view is what stands behind the question mark of the dashboard's address. The picture is as high as the view.
Needs the extra `revprobe[dashboard]`, `pip install selenium`, and Chromium with its driver (Debian and Ubuntu:
`apt-get install chromium chromium-driver`).
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

from revprobe.errors import RevprobeError, did_you_mean
from revprobe.report.dashboard.app import make_app
from revprobe.report.dashboard.server import LOOPBACK, make_dashboard_server
from revprobe.report.dashboard.view import TABS, View

WIDTH, HEIGHT, SCALE = 1400, 1000, 0.75
HIGHEST = 8000  # pixels of the page in one picture
MOST = 4  # runs over each other, where none is named
# What stands in a tab once it is drawn.
DRAWN = {"training": "#curves .main-svg", "checkpoint": "#one .main-svg", "pair": "#opened .token"}
DRAWN |= {"ask": "#answer .token"}
# The page's parts scroll by themselves: as high as the highest of them, below what stands above.
WHOLE = """
const parts = [document.querySelector("#main"), document.querySelector("#side")];
const foot = (part) => Math.max(...[...part.querySelectorAll("*")].map((one) => one.getBoundingClientRect().bottom));
return Math.ceil(Math.max(...parts.map((part) => foot(part) + part.scrollTop))) + 24;
"""
PATIENCE = 180  # seconds until a figure must stand; a busy machine reads a run in tens of them


def picture(runs_dir: Path, out: Path, *, chosen: list[str] | None = None, view: str = "") -> Path:
    """Save one view of the dashboard of `runs_dir` as `out`: by default training, its first runs over each other.

    Args:
        chosen: paths of runs from `runs_dir`, which are drawn over each other.
        view: what stands behind the question mark of the view's address, without the runs.
    Raises: RevprobeError, for no such folder, run or tab; OSError, without a browser; TimeoutError, when nothing is
        drawn.
    """
    tab = View.from_address(view).tab
    if (asked := dict(parse_qsl(view)).get("tab", tab)) != tab:
        raise RevprobeError(f"no tab {asked!r}{did_you_mean(asked, TABS)}")
    with served(runs_dir) as address, browser() as driver:
        driver.get(address)
        shown = runs_to_show(driver, runs_dir, chosen)
        said = [*parse_qsl(view), *(("chosen", key) for key in shown)]
        driver.get(f"{address}?{urlencode(said)}")
        await_true(
            lambda: driver.find_elements("css selector", DRAWN.get(tab, f"#panel-{tab} .main-svg")), f"the tab {tab!r}"
        )
        if tab == "training":
            await_true(lambda: len(table_rows(driver)) >= len(shown), "the numbers")
        time.sleep(2)  # what moves while it is drawn
        high = min(driver.execute_script(WHOLE), HIGHEST)
        size = {"width": WIDTH, "height": high, "deviceScaleFactor": SCALE, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        time.sleep(2)
        out.parent.mkdir(parents=True, exist_ok=True)
        driver.save_screenshot(str(out))
    return out


def runs_to_show(driver: Any, runs_dir: Path, chosen: list[str] | None) -> list[str]:
    """The runs that were asked for, else the first of the list. Raises: RevprobeError, for one that is not listed."""
    keys = await_true(lambda: drawable(driver), "the list of runs")
    for key in chosen or []:
        if key not in keys:
            raise RevprobeError(f"no run {key!r} in {runs_dir}: expected some of {', '.join(keys)}")
    return list(chosen or keys[:MOST])


@contextmanager
def served(runs_dir: Path, *, every: float = 2.0) -> Iterator[str]:
    """The dashboard at a free port of this machine, while open."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = make_dashboard_server(make_app(runs_dir, every=every).server, LOOPBACK[0], 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://{LOOPBACK[0]}:{server.port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def browser() -> Iterator[Any]:
    """A headless Chromium with a profile of its own."""
    from selenium import webdriver

    program, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if program is None or driver is None:
        raise OSError("no Chromium and its driver found; try `apt-get install chromium chromium-driver`")
    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = program
        fixed = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage"]
        # A mouse, as a desk has one: what shows itself under the pointer stays out of the picture.
        mouse = "primaryHoverType=2,availableHoverTypes=2,primaryPointerType=4,availablePointerTypes=4"
        for option in [
            *fixed,
            f"--blink-settings={mouse}",
            f"--user-data-dir={profile}",
            f"--window-size={WIDTH},{HEIGHT}",
            f"--force-device-scale-factor={SCALE}",
        ]:
            options.add_argument(option)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        try:
            yield opened
        finally:
            opened.quit()


# In one script each: the list is made anew whenever a run changes, and an element held here would be gone.
RUNS = "[...document.querySelectorAll('#runs [data-run]')]"


def drawable(driver: Any) -> list[str]:
    """The runs that can be chosen, as paths from RUNS_DIR."""
    return [str(key) for key in driver.execute_script(f"return {RUNS}.map((line) => line.dataset.run)")]


def pick(driver: Any, key: str, *, chosen: bool = True) -> None:
    """Choose a run, or no longer."""
    wanted = "line.dataset.run === arguments[0] && (line.getAttribute('aria-checked') === 'true') !== arguments[1]"
    driver.execute_script(f"{RUNS}.filter((line) => {wanted}).forEach((line) => line.click())", key, chosen)


def open_tab(driver: Any, name: str) -> None:
    """Open a tab by its name in the address."""
    driver.find_element("id", f"tab-{name}").click()


def table_rows(driver: Any) -> list[Any]:
    """The rows of the last checkpoints."""
    return list(driver.find_elements("css selector", "#numbers tbody tr"))


def choose(driver: Any, name: str, wanted: str | None = None) -> None:
    """Open a drop-down list and take an entry, the first one unless its text is given."""
    await_true(lambda: driver.find_element("id", name).is_displayed(), name)  # the server says which choices there are
    driver.find_element("id", name).click()
    script = (
        "const found = [...document.querySelectorAll('.dash-dropdown-content .dash-options-list-option')]"
        ".find((one) => arguments[0] === null || one.textContent === arguments[0]);"
        "if (found) found.click(); return Boolean(found);"
    )
    await_true(lambda: driver.execute_script(script, wanted), f"{wanted or 'an entry'} under {name}")


def await_true(condition: Callable[[], Any], what: str) -> Any:
    """What `condition` returns once it is true. Raises: TimeoutError, when it never is."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.2)
    raise TimeoutError(f"{what} did not appear within {PATIENCE} s")


def main() -> None:
    """Read the command line, take the picture, or say in one line why not."""
    parser = argparse.ArgumentParser(description="Save the dashboard of a folder of runs as a picture.")
    parser.add_argument("runs_dir", type=Path, help="a folder of runs or sweeps")
    parser.add_argument("picture", type=Path, help="the PNG to write")
    parser.add_argument("--runs", nargs="+", metavar="RUN", help="paths from RUNS_DIR; the first four by default")
    parser.add_argument(
        "--view", default="", help="what stands behind the question mark of an address of the dashboard"
    )
    asked = parser.parse_args()
    try:
        print(picture(asked.runs_dir, asked.picture, chosen=asked.runs, view=asked.view))
    except (RevprobeError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
