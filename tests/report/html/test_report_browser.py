"""In a real browser: tabs, slider and selectors change what is drawn, nothing is fetched, nothing complains."""

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from axe_findings import axe_findings
from headless import chromium, needs_chromium, requests_sent

from revprobe import Reading
from revprobe.finetune.runs.record import RunRecord
from revprobe.probes.figures.drawable import sample_of
from revprobe.probes.figures.theme import interval_text
from revprobe.report.html.report import write_report
from tiny import module_at

pytestmark = needs_chromium
made = module_at(Path(__file__).with_name("report_runs.py"))
EVIL = made.EVIL
awaited, change, choose_theme, drawn, open_tab, said, traces = (
    getattr(made, name) for name in ("awaited", "change", "choose_theme", "drawn", "open_tab", "said", "traces")
)


@pytest.fixture(scope="module")
def runs() -> list[RunRecord]:
    found: list[RunRecord] = made.made_runs()
    return found


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("browser"), "1280,1600") as driver:
        yield driver


@pytest.fixture(scope="module")
def opened(runs: list[RunRecord], browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = write_report(runs, tmp_path_factory.mktemp("report") / "report.html", title="t")
    browser.get("about:blank")
    requests_sent(browser)  # those of other tests
    browser.get(path.as_uri())
    drawn(browser)
    return browser


def test_the_slider_and_the_selectors_draw_the_readings_numbers(opened: Any, runs: list[RunRecord]) -> None:
    """Each choice shows the correlation that `Reading.summary` gives for it; a shifted index turns it red."""
    open_tab(opened, "routing")
    change(opened, "explore-run", "run-0")
    for step, weights, layer, head in (
        (500, "ema", None, None),
        (0, "ema", 1, None),
        (10, "raw", 1, 1),
        (10, "raw", 0, 0),
    ):
        change(opened, "explore-series", f"{'EMA' if weights == 'ema' else 'raw'}, same target")
        change(opened, "explore-step", [0, 10, 500].index(step))
        change(opened, "explore-layer", "all" if layer is None else layer)
        change(opened, "explore-head", "all" if head is None else head)
        reading = runs[0].readings.select(name="attention_correlation", step=step, weights=weights)[0]
        frame = reading.frame
        for column, wanted in (("layer", layer), ("head", head)):
            frame = frame if wanted is None else frame[frame[column] == wanted]
        part = Reading(reading.name, frame.reset_index(drop=True), reading.meta)
        band, line, control = traces(opened, "course")
        at = [0, 10, 500].index(step)
        assert line["y"][at] == pytest.approx(part.value, abs=1e-4), (step, weights, layer, head)
        assert [band["y"][at], band["y"][5 - at]] == pytest.approx(part.interval, abs=1e-4)
        assert reading.control is not None and control["y"][at] == pytest.approx(reading.control.value, abs=1e-4)
        assert control["line"]["dash"] == "dash" and "control" in control["name"]
        cells = part.summary(by=["distance_forward", "distance_reverse"]).set_index(
            ["distance_forward", "distance_reverse"]
        )
        shown = traces(opened, "distances")[1]["z"]
        for (forward, reverse), row in cells.iterrows():
            assert shown[forward - 1][reverse - 1] == pytest.approx(row["value"], abs=0.0051)
        assert shown[1][1] is None, "no pair was measured there"
        points = traces(opened, "scores")[1]
        keys = ["group", "layer", "head"]
        centred = frame["score_forward"] - frame.groupby(keys)["score_forward"].transform("mean")
        np.testing.assert_allclose(points["x"], centred.groupby(frame["pair"]).mean(), atol=1e-3)
        assert "step" in points["hovertext"][0] and "&lt;/script&gt;" in points["hovertext"][0]
    assert f"r = {reading.value:.2f} [" in said(opened, "routing-said")
    assert sample_of(reading) in said(opened, "routing-said") and " facts" in sample_of(reading)


def test_the_page_writes_numbers_as_the_package_does(opened: Any) -> None:
    """Small ones, ends that are nearly alike, zero and no interval; a rule kept on one side alone turns this red."""
    nan = math.nan
    for numbers in (
        (0.534, 0.41, 0.619, 0.0199),
        (0.5, nan, nan, nan),
        (0.0038, nan, nan, nan),
        (0.003, 0.0021, 0.0048, -0.0041),
        (0.99996, 0.99995, 0.99998, 0.22),
        (2.2e-9, 2.18e-9, 2.22e-9, 0.021),
        (3e-8, 0.0, 9e-8, 0.0042),
        (-4e-4, -6e-4, 2e-4, nan),
        (3e-8, 1e-8, 0.002, nan),
        (0.0, 0.0, 0.132, -0.0004),
        (0.0, nan, nan, nan),
        (1e-17, -1e-18, 1e-17, nan),
        (nan, 0.1, 0.2, 0.0),
    ):
        given = [None if math.isnan(one) else one for one in numbers]
        assert opened.execute_script("return interval(...arguments)", *given) == interval_text(*numbers)
    draw = random.Random(0)
    shares = [
        (0.9996, 0.9989, 0.99999),
        (0.0002, 0.00001, 0.0009),
        (0.9996, nan, nan),
        (1.0, 0.99996, 1.0),
        (0.0, 0.0, 4e-4),
    ]
    shares += [(2e-6, 1e-6, 3e-6), (0.99999999, 0.5, 1.0), (nan, nan, nan), (0.5, 0.5, 0.5)]
    for _ in range(60):  # near both ends, where digits are lost
        far = [10 ** draw.uniform(-7, -0.4) for _ in range(3)]
        low, value, high = sorted(far if draw.random() < 0.5 else [1 - one for one in far])
        shares.append((value, low, high))
    for share in shares:
        given = [None if math.isnan(one) else one for one in share]
        words = opened.execute_script("return interval(...arguments, null, true)", *given)
        assert words == interval_text(*share, percent=True), share


def test_a_long_setting_goes_on_below(opened: Any) -> None:
    """On one line its end lay outside a narrow window."""
    planted = (
        "const section = document.getElementById('section-versions');"
        "section.insertAdjacentHTML('beforeend', '<table><tr><td>name</td><td>value</td></tr></table>');"
        "return [...section.querySelectorAll('table:last-child td')].map((one) => getComputedStyle(one).whiteSpace)"
    )
    assert opened.execute_script(planted) == ["nowrap", "normal"]


def test_an_undefined_checkpoint_is_a_gap_of_line_and_band(opened: Any) -> None:
    """The band is drawn stretch by stretch, so that it never bridges what was not measured."""
    stretches = "return JSON.stringify(stretches([[0, 1], [1, NaN], [2, 3], [3, 4]], ([, low]) => !Number.isNaN(low)))"
    assert json.loads(opened.execute_script(stretches)) == [[[0, 1]], [[2, 3], [3, 4]]]


def test_a_click_on_a_head_chooses_it(opened: Any) -> None:
    open_tab(opened, "routing")
    event = "document.getElementById('heads').emit('plotly_click', {points: [{x: '1', y: '0'}]})"
    opened.execute_script(event)
    drawn(opened)
    shown = opened.execute_script(
        "return ['layer', 'head'].map((name) => document.getElementById('explore-' + name).value)"
    )
    assert shown == ["0", "1"]
    assert "layer 0, head 1" in opened.execute_script("return document.getElementById('course').layout.title.text")


def test_gradients_and_probabilities_follow_the_same_choices(opened: Any, runs: list[RunRecord]) -> None:
    change(opened, "explore-run", "run-0")
    change(opened, "explore-series", "raw, same target")
    change(opened, "explore-step", 1)
    change(opened, "explore-layer", "all")
    open_tab(opened, "gradients")
    reading = runs[0].readings.select(name="gradient_cosine", step=10, weights="raw")[0]
    roles = reading.summary(by="role").set_index("role")
    control, value = traces(opened, "roles")
    shown = {name.partition(" ")[0]: place for place, name in enumerate(value["y"])}
    assert list(shown) == ["v", "q", "embed", "all"]
    assert all(name.endswith(" pairs)") for name in value["y"]), value["y"]
    for role, row in roles.iterrows():
        at = shown[role]
        assert value["x"][at] == pytest.approx(row["value"], abs=1e-4)
        assert value["x"][at] - value["error_x"]["arrayminus"][at] == pytest.approx(row["low"], abs=1e-4)
        assert control["x"][at] == pytest.approx(row["control"], abs=1e-4)
    change(opened, "explore-layer", "1")
    layer = reading.summary(by=["layer", "role"]).query("layer == 1").set_index("role")["value"]
    value = traces(opened, "roles")[1]
    found = {name.partition(" ")[0]: x for name, x in zip(value["y"], value["x"], strict=True)}
    assert found["q"] == pytest.approx(layer["q"], abs=1e-4) and set(found) == {"q", "v", "all"}
    open_tab(opened, "probability")
    frame = runs[0].readings.select(name="reverse_probability", step=10, weights="raw")[0].frame
    reverse = frame.loc[frame["direction"] == "reverse", "probability"]
    expected = np.histogram(reverse, bins=np.linspace(0, 1, 21))[0] / 10
    np.testing.assert_allclose(traces(opened, "shares")[1]["y"][:20], expected, atol=1e-4)
    said_n = opened.execute_script("return document.getElementById('shares').layout.yaxis.title.text")
    shown = runs[0].readings.select(name="reverse_probability", step=10, weights="raw")[0]
    assert said_n == f"share of pairs ({sample_of(shown)})"
    assert shown.control is not None
    control = f"control (reverse, shuffled facts): mean {interval_text(shown.control.value, math.nan, math.nan)}"
    assert traces(opened, "shares")[2]["name"] == control


def test_another_run_keeps_the_checkpoint_and_a_tab_without_data_says_why(opened: Any) -> None:
    change(opened, "explore-run", "run-0")
    change(opened, "explore-step", 1)
    change(opened, "explore-run", "run-1")
    assert said(opened, "explore-step-shown") == "10"
    listed = opened.execute_script("return [...document.getElementById('explore-run').options].map((one) => one.text)")
    assert listed == [EVIL, "b"], "a run without readings has nothing to explore"
    for name, words in (("storage", "probe_stored_evidence"), ("edits", "probe_route_edit")):
        open_tab(opened, name)
        assert words in said(opened, f"tab-{name}")
        assert opened.execute_script("return document.getElementById('explore').hidden"), "controls that change nothing"
    open_tab(opened, "overview")
    assert "step-000010 is truncated: <cut>" in said(opened, "tab-overview")


def test_the_choice_of_a_control_shows_it_alone(opened: Any) -> None:
    open_tab(opened, "overview")
    for choice, shown in (("sink", {"sink"}), ("none", set()), ("all", {"untrained", "sink"})):
        change(opened, "choose-against", choice)
        drawn_now = [one for one in traces(opened, "signatures") if one["visible"] is True]
        for part in ("against", "key"):
            assert {one["meta"]["against"] for one in drawn_now if one["meta"]["part"] == part} == shown, (choice, part)
        assert any(one["meta"]["part"] == "value" for one in drawn_now), "the signatures stay"


def test_the_dark_page_draws_in_the_dark(opened: Any) -> None:
    open_tab(opened, "overview")
    paper = "return document.getElementById('signatures').layout.template.layout.paper_bgcolor"
    light = opened.execute_script(paper)
    choose_theme(opened, "dark")
    assert (light, opened.execute_script(paper)) == ("white", "#16191D")
    choose_theme(opened, "light")


@pytest.mark.parametrize(("theme", "width"), [("light", 1280), ("dark", 1280), ("light", 800), ("dark", 800)])
def test_axe_finds_nothing_grave_in_any_tab(opened: Any, theme: str, width: int) -> None:
    """Contrast, names, roles and what the keyboard reaches, as axe-core tells them."""
    opened.set_window_size(width, 1600)
    choose_theme(opened, theme)
    assert opened.execute_script("return dark") is (theme == "dark")
    found = []
    for tab in opened.execute_script("return everyTab()"):
        open_tab(opened, tab)
        for one in opened.find_elements("css selector", f"#tab-{tab} details"):
            opened.execute_script("arguments[0].open = true", one)
        found += [f"{tab}: {one}" for one in axe_findings(opened)]
    opened.set_window_size(1280, 1600)
    assert not found, "\n".join(found)


def test_a_figure_follows_the_width_of_the_window(opened: Any) -> None:
    """Seen, and when its tab is opened again."""
    place = "document.getElementById('signatures')"
    fits = f"{place}._fullLayout.width === {place}.clientWidth"
    open_tab(opened, "overview")
    awaited(opened, f"{place}.clientWidth > 1100 && {fits}")
    opened.set_window_size(820, 1600)
    awaited(opened, f"{place}.clientWidth < 800 && {fits}")
    open_tab(opened, "edits")
    opened.set_window_size(1280, 1600)
    open_tab(opened, "overview")
    awaited(opened, f"{place}.clientWidth > 1100 && {fits}")


def test_axe_is_one_that_finds(opened: Any) -> None:
    """Pale text and a field without a name, planted and taken away again."""
    planted = '<div id="planted"><p style="color: #ccc; background: #fff">pale</p><input type="text"></div>'
    opened.execute_script("document.body.insertAdjacentHTML('beforeend', arguments[0])", planted)
    found = axe_findings(opened)
    opened.execute_script("document.getElementById('planted').remove()")
    assert {one.partition(" ")[0] for one in found} == {"color-contrast", "label"}, found


def test_tabs_and_slider_are_worked_by_the_keyboard(opened: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    def press(key: str) -> Any:
        opened.switch_to.active_element.send_keys(key)
        drawn(opened)
        return opened.switch_to.active_element

    tabs = opened.execute_script("return everyTab()")
    open_tab(opened, "overview")
    opened.find_element("css selector", "[data-tab=overview]").click()
    for key, wanted in ((Keys.ARROW_RIGHT, 1), (Keys.END, -1), (Keys.ARROW_RIGHT, 0), (Keys.ARROW_LEFT, -1)):
        assert press(key).get_attribute("data-tab") == tabs[wanted], key
        shown = opened.execute_script("return [...document.querySelectorAll('main > :not([hidden])')].map((t) => t.id)")
        assert shown == [f"tab-{tabs[wanted]}"]
    press(Keys.HOME)
    assert press(Keys.ARROW_RIGHT).get_attribute("data-tab") == "routing"
    change(opened, "explore-run", "run-0")
    assert press(Keys.TAB).get_attribute("id") == "explore-run"
    press(Keys.TAB)
    assert press(Keys.TAB).get_attribute("id") == "explore-step"
    for key, step in ((Keys.HOME, "0"), (Keys.ARROW_RIGHT, "10"), (Keys.END, "500"), (Keys.ARROW_LEFT, "10")):
        press(key)
        assert said(opened, "explore-step-shown") == step
    line = traces(opened, "course")[1]
    places = opened.execute_script("return document.getElementById('course').layout.shapes[0].x0")
    assert places == line["x"][1], "the mark of the drawn checkpoint follows"


def test_nothing_leaves_the_page_and_nothing_complains(opened: Any) -> None:
    """Last of all, after every control was used: no request, no console message, no planted script."""
    (asked,) = requests_sent(opened)
    assert asked.startswith("file://"), "the log must hold the page's own request"
    console = opened.get_log("browser")
    assert not console, console
    assert opened.title == "t", "planted script ran"
    assert opened.execute_script("return document.querySelectorAll('img').length") == 0
