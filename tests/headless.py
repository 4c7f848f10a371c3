"""Headless Chromium for tests of pages: it notes every request and everything said on the console."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

DRIVER = shutil.which("chromedriver")
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="no Chromium with its driver on this machine; .ci/run installs both"
)


@contextmanager
def chromium(profile: Path, size: str) -> Iterator[Any]:
    """A driver with a window of so many pixels ("1280,1600") and a profile of its own."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    # A mouse, as a desk has one: what shows itself under the pointer stays hidden elsewhere.
    mouse = "primaryHoverType=2,availableHoverTypes=2,primaryPointerType=4,availablePointerTypes=4"
    options.add_argument(f"--blink-settings={mouse}")
    for option in ("--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={size}"):
        options.add_argument(option)
    options.add_argument(f"--user-data-dir={profile}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    driver.set_page_load_timeout(120)
    driver.set_script_timeout(120)
    try:
        yield driver
    finally:
        driver.quit()


def requests_sent(driver: Any) -> list[str]:
    """Addresses that pages asked for since this was last called: what lies in the page itself (`data:`, `blob:`) and
    what the browser asks itself for (its first tab: `chrome:`, `chrome-untrusted:`; `about:`) is no request."""
    told = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [one["params"]["request"]["url"] for one in told if one["method"] == "Network.requestWillBeSent"]
    asked += [one["params"]["url"] for one in told if one["method"] == "Network.webSocketCreated"]
    return [url for url in asked if not re.match("(data|blob|about|chrome(-[a-z]+)?):", url)]


def open_figure(browser: Any, figure: Any, page: Path, **told: Any) -> None:
    """A plotly figure as a page of its own; it draws after the page has loaded, so this waits until it has."""
    page.write_text(figure.to_html(post_script="document.body.dataset.drawn = 'yes'", **told), encoding="utf-8")
    browser.get(page.as_uri())
    end = time.monotonic() + 60
    while browser.execute_script("return document.body?.dataset.drawn") != "yes":
        assert time.monotonic() < end, browser.get_log("browser")
        time.sleep(0.05)
