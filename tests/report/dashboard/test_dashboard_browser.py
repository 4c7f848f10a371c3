"""The dashboard in a real browser: it follows a run, overlays two, opens a pair, and outlives a corrupted run."""

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from axe_findings import axe_findings
from headless import needs_chromium, requests_sent
from selenium.webdriver.common.keys import Keys

from tiny import ROOT, module_at

pytestmark = needs_chromium


made = module_at(Path(__file__).with_name("dashboard_runs.py"))
shot = module_at(ROOT / "examples" / "dashboard_screenshot.py")
shot.PATIENCE = 60
# A file name holds no slash; this markup needs none to run.
EVIL_NAME = "<img src=x onerror=\"document.title='planted'\">"
EVIL_PROBLEM = f"stopped: {made.EVIL} </script><script>document.title='planted'</script>"

# The steps drawn of each run in the panel of the answer to the reverse query, as {run: [how many points]}.
DOTS = """
const hex = (colour) => "#" + colour.match(/\\d+/g).map((n) => Number(n).toString(16).padStart(2, "0")).join("");
const dots = [...document.querySelectorAll(`${arguments[0]} [data-dot]`)].filter((dot) => dot.style.background);
return Object.fromEntries(dots.map((dot) => [dot.dataset.dot, hex(dot.style.backgroundColor)]));
"""
DRAWN = """
const plot = document.querySelector("#curves .js-plotly-plot");
if (!plot || !plot.data) return {};
const shown = plot.data.filter((t) => t.meta && t.meta.part === "value" && t.yaxis === "y4" && t.visible !== false);
return Object.fromEntries(shown.map((t) => [t.meta.run, t.y.length || t.y._inputArray?.length || 0]));
"""


# The tokens of the opened pair, without their weights.
PIECES = "return [...document.querySelectorAll('#opened .token')].map((t) => t.firstChild.textContent).join('')"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trains, one with markup for a name and a problem, and one whose pairs can be opened."""
    folder = tmp_path_factory.mktemp("dashboard") / "runs"
    made.write_run(folder / "0-training", 0, 5)
    made.write_run(folder / EVIL_NAME, 0, config=made.run_config("toy", seed=1))
    (folder / EVIL_NAME / "problem.txt").write_text(EVIL_PROBLEM)
    made.write_real_run(folder / "real", made.run_config("real"))
    made.write_real_finetuning(folder / "ft")
    return folder


@pytest.fixture(scope="module")
def driver(driver: Any) -> Any:
    """The browser with its first run drawn; what it asks for is kept in the performance log."""
    drawn(driver, {"0-training": 2})
    driver.execute_script("window.sameCopyOfThePage = true")
    return driver


def drawn(driver: Any, expected: dict[str, int]) -> None:
    """Wait until exactly these runs are drawn, with so many checkpoints each."""
    found: dict[str, int] = {}

    def told() -> bool:
        found.clear()
        found.update(driver.execute_script(DRAWN))
        return found == expected

    try:
        shot.await_true(told, "the curves")
    except TimeoutError:
        pytest.fail(f"drawn: {found}, expected {expected}")


def text(driver: Any, selector: str) -> str:
    return str(driver.execute_script("return document.querySelector(arguments[0])?.textContent ?? ''", selector))


def test_the_whole_visit(driver: Any, folder: Path) -> None:
    """One page from opening to the end, never reloaded: each step is one claim, in the order a visitor makes them."""
    # A checkpoint written after the page was opened appears, in curves, table and list.
    made.write_step(folder / "0-training", 10)
    drawn(driver, {"0-training": 3})
    # (Its gradient readings are none.)
    missing = "interrupted: 2 of 6 readings are missing"
    shot.await_true(lambda: missing in text(driver, "#runs") and missing in text(driver, "#states"), "the list")
    shot.open_tab(driver, "checkpoint")
    shot.await_true(lambda: "last (step 10)" in text(driver, "#step"), "the choice of checkpoints")
    shot.open_tab(driver, "training")
    # A run that begins while the page is open appears in the list.
    made.write_run(folder / "late", 0)
    shot.await_true(lambda: "late" in shot.drawable(driver), "the new run")
    # Two runs over each other, one of them with markup for a name, problem and facts.
    shot.pick(driver, EVIL_NAME)
    drawn(driver, {"0-training": 3, EVIL_NAME: 1})
    shot.await_true(lambda: len(shot.table_rows(driver)) == 2, "both in the table")
    shot.await_true(lambda: EVIL_NAME in text(driver, "#numbers"), "its name in the table")
    shot.await_true(lambda: "document.title='planted'</script>" in text(driver, "#runs"), "its problem in the list")
    # A checkpoint that is corrupted while it is shown: the reason stands there, the other run stays drawn.
    file = folder / "0-training" / "readings" / "step-000005" / "reverse_probability.raw.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    drawn(driver, {"0-training": 2, EVIL_NAME: 1})
    damage = "step-000005/reverse_probability.raw.parquet is damaged"
    shot.await_true(lambda: damage in text(driver, "#notes"), "the reason under the curves")
    # A config that is overwritten with rubbish: the run stays listed, as broken.
    (folder / "late" / "config.yaml").write_text("[")
    shot.await_true(lambda: "1 damaged" in text(driver, "#status"), "1 damaged")
    # Filters take a run out of the curves and let it back in.
    driver.find_element("id", "search").send_keys("training")
    drawn(driver, {"0-training": 2})
    driver.find_element("id", "search").send_keys("\b" * 8)
    drawn(driver, {"0-training": 2, EVIL_NAME: 1})
    # One pair down to its tokens, of a run with real checkpoints.
    for key in ("0-training", EVIL_NAME):
        shot.pick(driver, key, chosen=False)
        shot.await_true(lambda key=key: key not in driver.execute_script(DRAWN), f"{key} gone")
    shot.pick(driver, "real")
    drawn(driver, {"real": 2})
    shot.open_tab(driver, "pair")
    shot.await_true(lambda: "real" in text(driver, "#run"), "the run's checkpoints")
    shot.choose(driver, "fact", "a")
    shot.await_true(lambda: len(driver.find_elements("css selector", "#opened .token")) == 8, "two queries of 4 tokens")
    strips = driver.find_elements("css selector", "#opened .strip")
    for strip in strips:
        weights = [float(one.text) for one in strip.find_elements("css selector", "small")]
        assert sum(weights) == pytest.approx(1.0, abs=0.03), f"weights of a whole row: {weights}"
        assert len(strip.find_elements("css selector", ".target")) == 1
        assert len(strip.find_elements("css selector", ".evidence")) == 1
    assert "differ" not in text(driver, "#opened")
    # A pair of a fine-tuning, whose template begins with markup.
    shot.pick(driver, "real", chosen=False)
    shot.pick(driver, "ft")
    shot.await_true(lambda: "last (step 2)" in text(driver, "#step"), "the fine-tuning's checkpoints")
    shot.await_true(lambda: not text(driver, "#opened"), "the other run's pair gone")
    shot.choose(driver, "fact")
    shot.await_true(lambda: "fact" in text(driver, "#opened"), "the fine-tuning's pair")
    pieces = driver.execute_script(PIECES)
    assert "<script>x" in pieces.replace("[", "").replace("]", ""), pieces
    assert driver.execute_script("return window.sameCopyOfThePage === true"), "the page was reloaded on the way"


def theme_of(driver: Any) -> str:
    return "dark" if driver.execute_script("return document.documentElement.classList.contains('dark')") else "light"


def chosen(driver: Any) -> list[str]:
    """The runs that the list says are chosen."""
    return list(driver.execute_script(f"return {CHOSEN}.map((line) => line.dataset.run)"))


def state(driver: Any) -> dict[str, Any]:
    """All that a visitor has chosen, as the page shows it."""
    return dict(driver.execute_script(STATE) or {})


CHOSEN = "[...document.querySelectorAll('#runs [aria-checked=true]')]"
STATE = """
const shown = (name) => document.getElementById(name).textContent.trim();
const radio = (name) => [...document.querySelectorAll("#" + name + " input")].findIndex((one) => one.checked);
return {
  tab: document.querySelector("[role=tab][aria-selected=true]").dataset.tab,
  panels: [...document.querySelectorAll("[role=tabpanel]")].filter((one) => !one.hidden).map((one) => one.id).join(),
  runs: [...document.querySelectorAll("#runs [aria-checked=true]")].map((line) => line.dataset.run).join(),
  search: document.getElementById("search").value, bands: radio("bands"), weights: radio("weights"),
  ...Object.fromEntries(["run", "step", "figure", "layer", "head", "fact", "pair"].map((one) => [one, shown(one)])),
};
"""


def test_a_view_is_kept_by_reloading_by_sharing_and_by_going_back(driver: Any, folder: Path) -> None:
    """Selection, tab, lines, run, checkpoint, layer, head, fact and pair stand in the address and come out of it."""
    home = driver.current_url.partition("?")[0]
    driver.get(f"{home}?chosen=real&chosen=ft")
    drawn(driver, {"real": 2, "ft": 3})
    assert chosen(driver) == ["ft", "real"]
    driver.find_element("css selector", "#bands label:nth-of-type(2)").click()
    shot.await_true(lambda: "bands=seeds" in driver.current_url, "the lines in the address")
    shot.open_tab(driver, "pair")
    shot.await_true(lambda: "ft" in text(driver, "#run"), "a run to look into")
    for name, value in {"step": "step 1", "layer": "1", "head": "0"}.items():
        shot.choose(driver, name, value)
        shot.await_true(lambda name=name: f"{name}=" in driver.current_url, f"{name} in the address")
    shot.choose(driver, "fact")
    shot.await_true(lambda: "layer 1, head 0" in text(driver, "#opened"), "the pair at its layer and head")
    shot.await_true(lambda: "pair=" in driver.current_url or "fact=" in driver.current_url, "the fact in the address")
    before, address = state(driver), driver.current_url
    assert before["panels"] == "panel-pair" and before["step"] == "step 1" and before["bands"] == 1, before
    driver.refresh()
    shot.await_true(lambda: "layer 1, head 0" in text(driver, "#opened"), "the pair after reloading")
    shot.await_true(lambda: state(driver) == before and driver.current_url == address, "all as it was, reloaded")
    driver.get("about:blank")
    driver.get(address)  # as someone would whom it was sent to
    shot.await_true(lambda: "layer 1, head 0" in text(driver, "#opened"), "the pair of a shared address")
    shot.await_true(lambda: state(driver) == before, "all as it was, shared")
    # Two steps on, and both back.
    shot.choose(driver, "layer", "0")
    shot.await_true(lambda: "layer 0, head 0" in text(driver, "#opened"), "another layer")
    shot.open_tab(driver, "training")
    shot.await_true(lambda: "tab=" not in driver.current_url, "the first tab in the address")
    driver.back()
    shot.await_true(lambda: state(driver)["tab"] == "pair" and "layer 0" in text(driver, "#opened"), "one step back")
    driver.back()
    shot.await_true(lambda: "layer 1, head 0" in text(driver, "#opened"), "two steps back")
    shot.await_true(lambda: state(driver) == before and driver.current_url == address, "all as it was")
    driver.forward()
    shot.await_true(lambda: "layer 0, head 0" in text(driver, "#opened"), "forward again")


def test_searching_narrows_the_list_while_typing_and_says_when_nothing_is_left(driver: Any) -> None:
    driver.get(driver.current_url.partition("?")[0])
    shot.await_true(lambda: len(shot.drawable(driver)) > 3, "the list")
    field = driver.find_element("id", "search")
    for letters, left in {"rea": ["real"], "lx": []}.items():
        field.send_keys(letters)
        shot.await_true(lambda left=left: shot.drawable(driver) == left, f"the runs with {letters}")
    shot.await_true(lambda: text(driver, "#runs") == "No run matches 'realx'.", "a word for an empty list")
    shot.await_true(lambda: "search=realx" in driver.current_url, "the search in the address")
    field.send_keys("\b" * 5)
    shot.await_true(lambda: len(shot.drawable(driver)) > 3, "all of them again")


def test_light_and_dark_are_a_labelled_choice_that_is_remembered(driver: Any) -> None:
    """The page's paper and the figure's change together; reloading keeps the choice, and every figure follows it."""
    paper = (
        "const bg = (one) => getComputedStyle(one).backgroundColor;"
        "const figure = document.querySelector('#curves .main-svg');"
        "return figure ? [bg(document.body), bg(figure)] : []"
    )
    label = driver.execute_script(
        "const box = document.getElementById('theme-choice').closest('[role=group]');"
        "return document.getElementById(box.getAttribute('aria-labelledby')).textContent"
    )
    assert label == "Theme"
    driver.get(driver.current_url.partition("?")[0])
    shot.await_true(lambda: len(shot.drawable(driver)) > 3, "the list")
    for place, name in ((3, "dark"), (2, "light")):
        driver.find_element("css selector", f"#theme-choice label:nth-of-type({place})").click()
        want = [{"dark": "rgb(22, 25, 29)", "light": "rgb(255, 255, 255)"}[name]] * 2
        for again in (False, True):
            if again:
                driver.refresh()
            shot.await_true(lambda want=want: driver.execute_script(paper) == want, f"{name}, reloaded: {again}")
        assert driver.execute_script("return localStorage.getItem('revprobe-theme')") == name


def test_a_sweep_is_chosen_at_once_and_dots_have_the_colours_of_the_lines(driver: Any) -> None:
    driver.get(f"{driver.current_url.partition('?')[0]}?chosen=")
    shot.await_true(lambda: len(shot.drawable(driver)) > 3, "the list")
    assert chosen(driver) == [], "an address that chooses nothing"
    driver.find_element("css selector", ".sweep [data-every=all]").click()
    shot.await_true(lambda: chosen(driver) == shot.drawable(driver), "every run")
    shot.await_true(lambda: len(driver.execute_script(DRAWN)) >= 3, "their curves")
    colours = driver.execute_script(
        "const plot = document.querySelector('#curves .js-plotly-plot');"
        "return Object.fromEntries(plot.data.filter((t) => t.meta?.part === 'value')"
        ".map((t) => [t.meta.run, t.line.color.toLowerCase()]))"
    )
    assert len(colours) >= 3
    for place in ("#runs", "#numbers"):
        shot.await_true(lambda place=place: driver.execute_script(DOTS, place) == colours, f"the dots in {place}")
    driver.find_element("css selector", ".sweep [data-every=none]").click()
    shot.await_true(lambda: chosen(driver) == [], "none again")
    shot.await_true(lambda: "Choose a run in the list" in text(driver, "#curves"), "a word in place of empty axes")


def test_tabs_and_the_list_are_worked_by_the_keyboard(driver: Any) -> None:
    driver.get(driver.current_url.partition("?")[0])
    shot.await_true(lambda: len(shot.drawable(driver)) > 3, "the list")
    driver.find_element("id", "tab-training").send_keys(Keys.ARROW_RIGHT)
    shot.await_true(lambda: state(driver)["panels"] == "panel-checkpoint", "the next tab")
    active = "return document.activeElement.id"
    shot.await_true(lambda: driver.execute_script(active) == "tab-checkpoint", "the focus on the next tab")
    driver.switch_to.active_element.send_keys(Keys.END)
    shot.await_true(lambda: state(driver)["tab"] == "ask", "the last tab")
    driver.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    shot.await_true(lambda: state(driver)["tab"] == "training", "round to the first")
    before = chosen(driver)
    driver.find_element("css selector", "[data-run=real]").send_keys(Keys.SPACE)
    shot.await_true(lambda: sorted(chosen(driver)) == sorted([*before, "real"]), "chosen by the space bar")
    shot.await_true(lambda: "chosen=real" in driver.current_url, "and in the address")
    focus = "return document.activeElement.dataset.run"
    shot.await_true(lambda: driver.execute_script(focus) == "real", "the focus on the line")


def test_a_drop_down_list_and_the_theme_are_worked_by_the_keyboard(driver: Any) -> None:
    home = driver.current_url.partition("?")[0]
    driver.get(f"{home}?chosen=real&tab=checkpoint&run=real")
    shot.await_true(lambda: "last (step 10)" in text(driver, "#step"), "the checkpoints")
    driver.find_element("id", "step").send_keys(Keys.ENTER)
    shot.await_true(lambda: driver.find_elements("css selector", ".dash-dropdown-content"), "the open list")
    listed = [one.text for one in driver.find_elements("css selector", ".dash-dropdown-content label")]
    assert len(listed) == 3, listed
    focus = "return document.activeElement.closest('.dash-dropdown-content label')?.textContent"
    shot.await_true(lambda: driver.execute_script(focus) == listed[0], "the focus on the entry that is chosen")
    driver.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
    shot.await_true(lambda: driver.execute_script(focus) == listed[1], "the focus on the next entry")
    driver.switch_to.active_element.send_keys(Keys.ENTER)
    shot.await_true(lambda: "step=" in driver.current_url, "another checkpoint in the address")
    active = "return document.activeElement.id"
    shot.await_true(lambda: driver.execute_script(active) == "step", "the focus where it was")
    radio = driver.find_element("css selector", "#theme-choice label:nth-of-type(2) input")
    radio.click()
    shot.await_true(lambda: theme_of(driver) == "light", "light")
    driver.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    shot.await_true(lambda: theme_of(driver) == "dark", "dark by the arrow key")
    driver.switch_to.active_element.send_keys(Keys.ARROW_LEFT)
    shot.await_true(lambda: theme_of(driver) == "light", "light again")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_grave_in_any_view(driver: Any, theme: str) -> None:
    """Contrast, names, roles and what the keyboard reaches, as axe-core tells them; also in an open drop-down list."""
    home = driver.current_url.partition("?")[0]
    driver.get(f"{home}?chosen=real&chosen=0-training&chosen=ft&run=real")
    shot.await_true(lambda: len(shot.table_rows(driver)) == 3, "the numbers")
    under = driver.find_element("css selector", "#numbers td small:last-child").text
    assert under.startswith("control "), f"value, interval and control have a line each, not {under!r}"
    driver.find_element("css selector", f"#theme-choice label:nth-of-type({2 if theme == 'light' else 3})").click()
    shot.await_true(lambda: theme_of(driver) == theme, theme)
    driver.find_element("id", "filters-summary").click()
    found = [f"training: {one}" for one in axe_findings(driver)]
    shot.open_tab(driver, "checkpoint")
    shot.await_true(lambda: driver.find_elements("css selector", "#one .main-svg"), "a figure of one checkpoint")
    found += [f"checkpoint: {one}" for one in axe_findings(driver)]
    driver.find_element("id", "step").click()
    shot.await_true(lambda: driver.find_elements("css selector", ".dash-dropdown-content"), "the list of checkpoints")
    found += [f"an open list: {one}" for one in axe_findings(driver)]
    driver.find_element("css selector", "body").send_keys(Keys.ESCAPE)
    shot.open_tab(driver, "pair")
    shot.choose(driver, "fact")
    shot.await_true(lambda: driver.find_elements("css selector", "#opened .token"), "the pair")
    found += [f"pair: {one}" for one in axe_findings(driver)]
    assert not found, "\n".join(found)


def test_nothing_planted_ran_nothing_failed_and_nothing_left_the_page(driver: Any) -> None:
    """After all visits: no script of the data's, no console error, no request to another place, no way to make one."""
    assert driver.title == "revprobe: runs", "planted script ran"
    assert not driver.find_elements("css selector", "img[src=x]"), "planted text became an element"
    severe = [entry for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    assert not severe, severe
    ours = urlsplit(driver.current_url).netloc
    asked = set(requests_sent(driver))
    assert any("_dash-update-component" in url for url in asked), "the log kept nothing: this test could not fail"
    assert {urlsplit(url).netloc for url in asked} == {ours}, asked
    buttons = {one.get_attribute("data-title") for one in driver.find_elements("css selector", ".modebar-btn")}
    assert buttons and not any("hare" in str(title) or "loud" in str(title) for title in buttons), buttons
