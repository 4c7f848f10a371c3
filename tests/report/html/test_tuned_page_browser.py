"""The page of fine-tunings in a real browser: what is chosen of the signatures, their axes, colours and words."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from headless import chromium, needs_chromium

from revprobe import Reading, Readings
from revprobe.finetune.runs.record import RunRecord
from revprobe.report.html.report import write_report
from tiny import module_at

pytestmark = needs_chromium
made = module_at(Path(__file__).with_name("report_runs.py"))
views = module_at(Path(__file__).with_name("test_report_view_browser.py"))

SHOWN = (
    "[...new Set(byId('signatures').data.filter((t) => t.meta.part === 'value' && t.visible).map((t) => t.meta.task))]"
)
# Of each axis: its limits, and the lowest and highest number that is shown there.
FILLED = """
const found = {};
for (const {y, yaxis, visible, meta} of byId("signatures").data)
  if (visible && !["undefined", "key"].includes(meta.part)) (found[yaxis] ??= []).push(...y.filter(Number.isFinite));
return Object.entries(found).map(([axis, of]) =>
  [...byId("signatures").layout[axis.replace("y", "yaxis")].range, Math.min(...of), Math.max(...of)]);
"""
LINES = """
const lines = byId("signatures").data.filter((trace) => trace.meta.part === "value");
return lines.map((trace) => [trace.meta.model, trace.line.color]);
"""
DOTS = """
return [...document.querySelectorAll("#section-runs [data-dot]")].map((dot) =>
  [dot.dataset.dot, getComputedStyle(dot).backgroundColor, dot.hidden]);
"""


def small(reading: Reading) -> Reading:
    """A reading whose gradients hardly agree; another probe's stays as it is."""
    if reading.name != "gradient_cosine":
        return reading
    frame = reading.frame
    return Reading(reading.name, frame.assign(inner=0.1 * frame["inner"]), dict(reading.meta))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two models trained on two datasets; gradients of the first lie near zero."""
    runs = []
    for model in ("a", made.EVIL):
        for dataset, step in (("near", 0), ("far", 900)):
            axes = {"model": model, "dataset": dataset, "direction": "P2C", "seed": 0, "objective": "masked"}
            readings = made.readings(step, step + 10, step + 20, weights=("raw",))
            readings = Readings(small(one) for one in readings) if dataset == "near" else readings
            runs.append(RunRecord(f"{model}-{dataset}", axes, {}, readings, None))
    path = tmp_path_factory.mktemp("tuned") / "report.html"
    return write_report(runs, path, progress=False).as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("profile"), "1280,1200") as browser:
        yield browser


def test_a_sweep_opens_on_one_dataset_and_the_choice_outlives_a_reload(browser: Any, page: str) -> None:
    views.opened_at(browser, page)
    made.awaited(browser, f"{SHOWN}.join() === 'near (P2C)'")
    made.change(browser, "choose-task", "all")
    made.awaited(browser, f"{SHOWN}.length === 2")
    made.awaited(browser, "location.hash.includes('task=all')")
    browser.refresh()
    made.drawn(browser)
    made.awaited(browser, f"{SHOWN}.length === 2")
    assert "task=all" in browser.current_url


def test_axes_fit_what_is_chosen(browser: Any, page: str) -> None:
    """They stood for all that could be chosen, so that a small effect lay flat in a wide plot."""
    views.opened_at(browser, page)
    for task in ("near (P2C)", "far (P2C)"):
        made.change(browser, "choose-task", task)
        made.awaited(browser, f"{SHOWN}.join() === '{task}'")
        filled = browser.execute_script(FILLED)
        assert len(filled) == 4
        for low, high, least, most in filled:
            assert low < least and most < high, "nothing is cut"
            room = max(most, 0) - min(least, 0)
            assert room > 0.5 * (high - low) or high - low < 0.25, (task, low, high, least, most)


def test_a_models_dots_are_its_lines_colour_in_light_and_dark(browser: Any, page: str) -> None:
    views.opened_at(browser, page)
    found = {}
    for theme, dark in (("light", "false"), ("dark", "true")):
        made.choose_theme(browser, theme)
        made.awaited(browser, f"String(dark) === '{dark}' && document.body.dataset.drawn === 'yes'")
        lines = browser.execute_script(LINES)
        dots = browser.execute_script(DOTS)
        assert len(dots) == 4 and not any(hidden for *_, hidden in dots)
        of = {name: {colour for dot, colour, _ in dots if dot.startswith(f"run {name}-")} for name, _ in lines}
        assert len(of) == 2 and all(len(colours) == 1 for colours in of.values()), "one colour for a model"
        for name, colour in lines:
            red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
            assert of[name] == {f"rgb({red}, {green}, {blue})"}
        found[theme] = of
    assert found["light"] != found["dark"], "blue is lighter on dark paper"


@pytest.mark.parametrize("width", [1440, 1024, 800])
def test_no_word_of_the_signatures_is_cut_or_lies_on_another(browser: Any, page: str, width: int) -> None:
    browser.set_window_size(width, 1200)
    views.opened_at(browser, page)
    found = views.misplaced(browser)
    wide = browser.execute_script("return document.documentElement.scrollWidth - innerWidth")
    browser.set_window_size(1280, 1200)
    assert not found and wide <= 0, (wide, found)
