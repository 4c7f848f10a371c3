"""A bundle as a co-author opens it: from disk, in a browser, moved elsewhere, with no request leaving."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_findings import axe_findings
from headless import chromium, needs_chromium, requests_sent

import revprobe as rp
from revprobe.finetune.config.one_layer import RunConfig
from revprobe.report.bundle.bundle import write_bundle

EVIL = "<img src=x onerror=\"document.title='planted'\">"
pytestmark = needs_chromium


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of one run, with markup as the reason why it ended early."""
    folder = tmp_path_factory.mktemp("shared") / "runs"
    training = {"steps": 4, "batch_size": 8, "warmup_steps": 0, "ema_decay": None, "device": "cpu"}
    about = {"model": {"d_model": 8}, "relation": {"length": 4, "alphabet": 9}, "snapshots": {"every": 4}}
    rp.train(RunConfig(name="one", training=training, **about), folder / "one", listener=False)
    shutil.rmtree(folder / "one" / "checkpoints" / "step-000004")
    (folder / "one" / "problem.txt").write_text(EVIL, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("browser"), "1280,1000") as driver:
        yield driver


def test_a_bundle_opens_from_disk_with_no_request_leaving(browser: Any, runs: Path, tmp_path: Path) -> None:
    """Index, report by its link, all tabs; each page is one file, and what was planted is text."""
    write_bundle(runs, tmp_path / "moved" / "elsewhere", say=lambda text: None)
    folder = (tmp_path / "moved").rename(tmp_path / "away") / "elsewhere"
    browser.get("about:blank")
    requests_sent(browser)  # those of other tests
    browser.get((folder / "index.html").as_uri())
    assert EVIL in browser.find_element("id", "runs").text
    assert browser.title == "runs", "planted script ran"
    assert not axe_findings(browser)
    links = [one.get_attribute("href") for one in browser.find_elements("css selector", "a")]
    assert len(links) > 5
    for link in links:
        target = Path(link.removeprefix("file://"))
        assert target.exists() and target.is_relative_to(folder), link
    browser.find_element("css selector", "p a[href='report.html']").click()
    deadline = time.monotonic() + 60
    while browser.execute_script("return document.body?.dataset.drawn") != "yes":
        assert time.monotonic() < deadline, browser.get_log("browser")
        time.sleep(0.05)
    for tab in browser.find_elements("css selector", "[role=tab]"):
        browser.execute_script("arguments[0].click()", tab)
        assert tab.get_attribute("aria-selected") == "true"
    assert browser.execute_script("return document.getElementById('signatures').data.length") > 0, "nothing is drawn"
    files = [url.partition("#")[0] for url in requests_sent(browser)]
    assert files == [(folder / name).as_uri() for name in ("index.html", "report.html")]
    assert not browser.get_log("browser"), "the console complains"


def test_a_request_that_leaves_would_be_seen(browser: Any) -> None:
    browser.get("about:blank")
    requests_sent(browser)
    browser.execute_script("for (const url of ['http://127.0.0.1:9/', 'data:image/png,']) new Image().src = url")
    sent: list[str] = []
    deadline = time.monotonic() + 60
    while not sent and time.monotonic() < deadline:
        sent = requests_sent(browser)
    assert sent == ["http://127.0.0.1:9/"]
