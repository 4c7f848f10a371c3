"""The instruments' tabs in a real browser: figures, addresses that survive a reload, empty tabs, contrast."""

from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest
from axe_findings import axe_findings
from headless import needs_chromium, requests_sent

import revprobe as rp
from revprobe.report.html.instruments import INSTRUMENTS, SOURCES, command
from tiny import ROOT, module_at

pytestmark = needs_chromium

made = module_at(Path(__file__).with_name("dashboard_runs.py"))
shot = module_at(ROOT / "examples" / "dashboard_screenshot.py")
shot.PATIENCE = 60

DARK = "return document.documentElement.classList.contains('dark')"
DRAWN_OF = "return document.querySelector('#instrument-said [data-for]')?.dataset.for"
POINTS = """
const plot = document.querySelector("#instrument .js-plotly-plot");
return (plot?.data ?? []).map((trace) => [trace.name, [...(trace.x?._inputArray ?? trace.x ?? [])].map(String)]);
"""
SHOWN = """
const shown = (name) => document.getElementById(name).offsetParent ? document.getElementById(name).textContent : null;
return Object.fromEntries(["run", "step", "stored", "layer", "head", "drawing"].map((one) => [one, shown(one)]));
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was asked everything, and one that was asked nothing."""
    folder = tmp_path_factory.mktemp("instruments") / "runs"
    made.write_real_run(folder / "bare", made.run_config("bare"))
    full = made.write_real_run(folder / "full", made.run_config("full"))
    for source in SOURCES:
        exec(command(source, str(full)), {})
    earlier = full / "readings" / "step-000000"
    rp.probe_route_edit(rp.open_run(full).load(0), rp.open_run(full).pairs()).save(earlier / "route_edit.raw.parquet")
    return folder


def open_view(driver: Any, tab: str, run: str = "full", **view: str) -> None:
    home = driver.current_url.partition("?")[0]
    driver.get("about:blank")
    driver.get(f"{home}?{urlencode({'chosen': run, 'tab': tab, **view})}")
    awaited(driver, tab)


def awaited(driver: Any, tab: str) -> None:
    """Wait until a tab's own figure stands there."""
    fresh = "return !document.getElementById('panel-instrument').classList.contains('stale')"
    shot.await_true(lambda: driver.execute_script(DRAWN_OF) == tab and driver.execute_script(fresh), tab)


def address(driver: Any) -> dict[str, str]:
    return {name: values[-1] for name, values in parse_qs(urlsplit(driver.current_url).query).items()}


def said(driver: Any) -> str:
    return str(driver.execute_script("return document.getElementById('instrument-said').textContent"))


def test_what_is_chosen_on_a_tab_outlives_a_reload_and_steps_back(driver: Any, folder: Path) -> None:
    """Figure, checkpoint, layer and head of the edits, beside a fact and a pair that another tab shows."""
    home = {"fact": "c", "pair": "4"}
    open_view(driver, "edits", **home)
    shot.choose(driver, "drawing", "forward queries")
    shot.await_true(lambda: address(driver).get("drawing") == "forward", "the figure in the address")
    shot.choose(driver, "step", "step 0")
    shot.await_true(lambda: address(driver).get("step") == "0", "the checkpoint in the address")
    shot.choose(driver, "layer", "0")
    shot.await_true(lambda: address(driver).get("layer") == "0", "the layer in the address")
    shot.choose(driver, "head", "0")
    reading = rp.Reading.load(folder / "full" / "readings" / "step-000000" / "route_edit.raw.parquet")
    table = reading.part(reading.frame[reading.frame["direction"] == "forward"]).summary(by=["scope", "layer", "head"])
    wanted = sorted(str(float(value)) for value in table["value"])  # one layer of one head: all of them
    points = lambda: sorted(str(float(x)) for x in dict(driver.execute_script(POINTS)).get("evidence", []))  # noqa: E731
    shot.await_true(lambda: points() == wanted, "the numbers of the reading")
    shot.await_true(lambda: address(driver).get("head") == "0", "the head in the address")
    before, there = driver.execute_script(SHOWN), driver.current_url
    assert before["step"].strip() == "step 0" and before["drawing"].strip() == "forward queries", before
    assert address(driver) | home == address(driver), "fact and pair stay in the address"
    driver.refresh()
    awaited(driver, "edits")
    shot.await_true(lambda: driver.execute_script(SHOWN) == before and points() == wanted, "all as it was, reloaded")
    assert driver.current_url == there
    shot.open_tab(driver, "lens")
    awaited(driver, "lens")
    shown = driver.execute_script(SHOWN)
    assert shown["layer"] is None and shown["head"] is None, "choices that this figure does not depend on"
    assert {"layer": "0", "head": "0", **home}.items() <= address(driver).items(), "and that stay in the address"
    driver.back()
    awaited(driver, "edits")
    shot.await_true(lambda: points() == wanted and driver.current_url == there, "one step back")


def test_every_tab_draws_and_says_pairs_facts_and_control(driver: Any) -> None:
    open_view(driver, "storage")
    for tab in INSTRUMENTS:
        shot.open_tab(driver, tab)
        awaited(driver, tab)
        shot.await_true(lambda: len(driver.execute_script(POINTS)) >= 1, f"the figure of {tab}")
        assert "n = " in said(driver) and "facts" in said(driver), said(driver)
        panel = driver.find_element("id", "panel-instrument")
        assert panel.is_displayed() and panel.get_attribute("aria-labelledby") == f"tab-{tab}"
        visible = driver.execute_script("return document.querySelectorAll('[role=tabpanel]:not([hidden])').length")
        assert visible == 1, "two panels are open"


def test_a_tab_of_nothing_says_what_fills_it_and_fills_by_itself(driver: Any, folder: Path) -> None:
    """No empty axes: a sentence and the commands; what they write is drawn without a reload."""
    open_view(driver, "lens", run="bare")
    assert not driver.find_element("id", "instrument-figure").is_displayed()
    assert "bare has nothing of it: logit lens." in said(driver)
    (code,) = [one.text for one in driver.find_elements("css selector", "#instrument-said pre")]
    quiet = "return document.getElementById('tab-lens').classList.contains('empty')"
    assert driver.execute_script(quiet)
    exec(code, {})
    shot.await_true(lambda: driver.find_element("id", "instrument-figure").is_displayed(), "the figure")
    shot.await_true(lambda: len(driver.execute_script(POINTS)) > 4, "its curves")
    shot.await_true(lambda: not driver.execute_script(quiet), "the tab is one that has something")
    (folder / "bare" / "readings" / "step-000010" / "logit_lens.raw.parquet").unlink()
    shot.await_true(lambda: "bare has nothing of it" in said(driver), "the sentence again")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_grave_in_the_instruments(driver: Any, theme: str) -> None:
    found = []
    for run in ("full", "bare"):
        open_view(driver, "storage", run=run)
        driver.find_element("css selector", f"#theme-choice label:nth-of-type({2 if theme == 'light' else 3})").click()
        shot.await_true(lambda: driver.execute_script(DARK) == (theme == "dark"), theme)
        for tab in INSTRUMENTS:
            shot.open_tab(driver, tab)
            awaited(driver, tab)
            for details in driver.find_elements("css selector", "#instrument-said summary"):
                details.click()
            found += [f"{run}, {tab}: {one}" for one in axe_findings(driver)]
    assert not found, "\n".join(found)


def test_nothing_failed_and_nothing_left_the_page(driver: Any) -> None:
    severe = [entry for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    assert not severe, severe
    asked = set(requests_sent(driver))
    assert any("_dash-update-component" in url for url in asked), "the log kept nothing: this test could not fail"
    assert {urlsplit(url).netloc for url in asked} == {urlsplit(driver.current_url).netloc}, asked
