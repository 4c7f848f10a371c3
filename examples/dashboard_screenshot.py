"""Take a picture of the dashboard: serve a folder of runs, open it in a headless Chromium, choose runs and a pair.

    python examples/dashboard_screenshot.py runs/one-layer-quick examples/images/dashboard.png
    python examples/dashboard_screenshot.py runs dashboard.png --runs one-layer/rope-l10-s0 one-layer/alibi-l10-s0

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

from revprobe.errors import RevprobeError
from revprobe.report.dashboard.app import make_app
from revprobe.report.dashboard.server import LOOPBACK, make_dashboard_server

WIDTH, HEIGHT, SCALE = 1400, 2450, 0.75
PATIENCE = 180  # seconds until a figure must stand; a busy machine reads a run in tens of them


def picture(runs_dir: Path, out: Path, *, chosen: list[str] | None = None) -> Path:
    """Save the dashboard of `runs_dir`, with some runs over each other and one pair opened, as `out`.

    Raises: RevprobeError, for no such folder; OSError, without a browser; TimeoutError, when nothing is drawn.
    """
    with served(runs_dir) as address, browser() as driver:
        driver.get(address)
        await_true(lambda: driver.find_elements("css selector", "#curves .main-svg"), "the curves")
        keys = await_true(lambda: drawable(driver), "the list of runs")
        for key in chosen or keys[:1]:
            if key not in keys:
                raise RevprobeError(f"no run {key!r} in {runs_dir}: expected some of {', '.join(keys)}")
            pick(driver, key)
        await_true(lambda: len(table_rows(driver)) >= len(chosen or keys[:1]), "the numbers")
        open_tab(driver, "pair")
        choose(driver, "fact")
        await_true(lambda: driver.find_elements("css selector", "#opened .token"), "the pair")
        time.sleep(2)  # what moves while it is drawn
        out.parent.mkdir(parents=True, exist_ok=True)
        driver.save_screenshot(str(out))
    return out


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
    parser.add_argument("--runs", nargs="+", metavar="RUN", help="paths from RUNS_DIR; the first run by default")
    asked = parser.parse_args()
    try:
        print(picture(asked.runs_dir, asked.picture, chosen=asked.runs))
    except (RevprobeError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
