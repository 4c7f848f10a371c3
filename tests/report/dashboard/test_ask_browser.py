"""Asking the model in a real browser: an edit runs again and says what the probe says; by keyboard; with typed text."""

import threading
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest
from axe_findings import axe_findings
from headless import needs_chromium
from selenium.webdriver.common.keys import Keys

import revprobe as rp
from revprobe.report.dashboard import ask
from tiny import ROOT, module_at

pytestmark = needs_chromium

made = module_at(Path(__file__).with_name("dashboard_runs.py"))
shot = module_at(ROOT / "examples" / "dashboard_screenshot.py")
shot.PATIENCE = 60

# The edit's table: {query: [log P, after the edit, change, control's change, difference]}.
CHANGES = """
return Object.fromEntries([...document.querySelectorAll("#changes tbody tr")].map((row) => {
  const [name, ...numbers] = [...row.cells].map((cell) => cell.textContent);
  return [name, numbers];
}));
"""

DARK = "return document.documentElement.classList.contains('dark')"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ask") / "runs"
    made.write_real_run(folder / "real", made.run_config("real"))
    made.write_real_finetuning(folder / "ft")
    return folder


def open_view(driver: Any, run: str = "real", **view: str) -> None:
    home = driver.current_url.partition("?")[0]
    driver.get("about:blank")
    driver.get(f"{home}?{urlencode({'chosen': run, 'tab': 'ask', **view})}")


def text(driver: Any, selector: str) -> str:
    return str(driver.execute_script("return document.querySelector(arguments[0])?.textContent ?? ''", selector))


def address(driver: Any) -> dict[str, str]:
    return {name: values[-1] for name, values in parse_qs(urlsplit(driver.current_url).query).items()}


def expected(folder: Path, pair: rp.ReversalPair, **options: Any) -> dict[str, list[str]]:
    """The table that the probe's numbers give."""
    frame = rp.probe_route_edit(rp.open_run(folder / "real").load(), [pair], scope="all", **options).frame
    found = {}
    for row in frame.to_dict("records"):
        numbers = [row[name] for name in ("log_probability", "log_probability_edited", "change", "change_control")]
        found[f"{row['direction']} query"] = [f"{number:.4f}" for number in [*numbers, numbers[2] - numbers[3]]]
    return found


def test_an_edit_that_runs_again_is_the_probes(driver: Any, folder: Path) -> None:
    """From a fact to a knockout, a scaling and another factor, each asked again at once."""
    open_view(driver)
    shot.await_true(lambda: "Choose a fact" in text(driver, "#answer"), "what to do")
    shot.choose(driver, "fact", "c")
    shot.await_true(lambda: len(driver.find_elements("css selector", "#answer .strip")) == 2, "both queries")
    pairs = rp.open_run(folder / "real").pairs().for_probe("attention")
    pair = next(one for one in pairs if one.fact == "c")
    shot.choose(driver, "edit", "knock out the route to the evidence")
    want = expected(folder, pair, edit="knockout")
    assert "nan" not in str(want) and want["forward query"][2] != "0.0000"
    shot.await_true(lambda: driver.execute_script(CHANGES) == want, "the knockout's numbers")
    shot.choose(driver, "edit", "scale the route")
    shot.await_true(lambda: driver.execute_script(CHANGES) == expected(folder, pair, edit="scale"), "the scaling's")
    factor = driver.find_element("id", "factor")
    shot.await_true(factor.is_displayed, "the factor")
    factor.send_keys(Keys.BACKSPACE * 3, "9", Keys.ENTER)
    want = expected(folder, pair, edit="scale", factor=9.0)
    shot.await_true(lambda: driver.execute_script(CHANGES) == want, "those of another factor")
    assert address(driver)["factor"] == "9.0" and address(driver)["edit"] == "scale"
    driver.refresh()
    shot.await_true(lambda: driver.execute_script(CHANGES) == want, "the same after reloading")
    driver.back()
    shot.await_true(lambda: driver.execute_script(CHANGES) == expected(folder, pair, edit="scale"), "one step back")


def test_tokens_and_edits_are_worked_by_the_keyboard(driver: Any) -> None:
    """A token is a button: Enter masks it and the focus stays; the edit is a list that opens with Enter."""
    open_view(driver, fact="d")
    shot.await_true(
        lambda: len(driver.find_elements("css selector", "#answer button.token")) == 6, "tokens that can be masked"
    )
    token = driver.find_element("css selector", "#answer button.token")
    place = token.get_attribute("data-at")
    token.send_keys(Keys.ENTER)
    pressed = "return document.querySelector('[aria-pressed=true]')?.dataset.at"
    shot.await_true(lambda: driver.execute_script(pressed) == place, "the masked token")
    shot.await_true(lambda: (address(driver).get("at"), address(driver).get("edit")) == (place, "mask"), "the address")
    shot.await_true(lambda: driver.execute_script(CHANGES), "its numbers")
    focus = "return document.activeElement.dataset.at"
    shot.await_true(lambda: driver.execute_script(focus) == place, "the focus on the token")
    assert driver.find_elements("css selector", "#answer .changes"), "what masking each alone does"
    driver.find_element("id", "edit").send_keys(Keys.ENTER)
    shot.await_true(lambda: driver.find_elements("css selector", ".dash-dropdown-content"), "the open list")
    entry = "return document.activeElement.closest('.dash-dropdown-content label')?.textContent"
    shot.await_true(lambda: driver.execute_script(entry) == "mask another token", "the focus on the chosen entry")
    driver.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
    shot.await_true(lambda: driver.execute_script(entry) == "swap the evidence", "the focus on the next entry")
    driver.switch_to.active_element.send_keys(Keys.ENTER)
    shot.await_true(lambda: address(driver).get("edit") == "swap", "the next edit")
    shot.await_true(lambda: "swap the evidence: that of" in text(driver, "#answer"), "another fact's evidence")


def test_typed_text_is_asked_by_enter_and_escaped(driver: Any) -> None:
    open_view(driver, about="text")
    shot.await_true(lambda: "Type a sentence" in text(driver, "#answer"), "what to do")
    shot.await_true(driver.find_element("id", "forward").is_displayed, "the fields")
    driver.find_element("id", "forward").send_keys("0[d]0{D}", Keys.ENTER)
    shot.await_true(lambda: len(driver.find_elements("css selector", "#answer .strip")) == 1, "one sentence")
    driver.find_element("id", "reverse").send_keys("0{D}0[d]", Keys.ENTER)
    shot.await_true(lambda: len(driver.find_elements("css selector", "#answer .strip")) == 2, "both")
    assert address(driver)["forward"] == "0[d]0{D}"
    planted = "<img src=x onerror=\"document.title='planted'\">"
    field = driver.find_element("id", "reverse")
    field.send_keys(Keys.END, planted, Keys.ENTER)
    shot.await_true(lambda: driver.find_elements("css selector", "#answer .problem"), "a reason in place of an answer")
    assert text(driver, "#answer").count("\n") == 0 and "cannot be asked" not in text(driver, "#answer")
    assert not driver.find_elements("css selector", "img[src=x]") and driver.title == "revprobe: runs"
    assert driver.execute_script("return document.getElementById('forward').maxLength") == 500


def test_a_run_is_asked_what_it_was_asked_before(driver: Any) -> None:
    open_view(driver, run="ft", about="text")
    shot.await_true(lambda: "ft" in text(driver, "#run"), "the run")
    shot.await_true(driver.find_element("id", "start").is_displayed, "what to start from")
    shot.choose(driver, "start")
    shot.await_true(lambda: len(driver.find_elements("css selector", "#answer .strip")) == 2, "both queries")
    typed = driver.find_element("id", "forward").get_attribute("value")
    assert typed.startswith("<script>x ") and "[" in typed and "{" in typed
    assert "<script>x" in driver.execute_script(
        "return [...document.querySelectorAll('#answer .token')].map((t) => t.firstChild.textContent).join('')"
    ).replace("[", "")


def test_what_is_being_answered_can_be_cancelled_and_another_page_is_told(
    driver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, answer = threading.Event(), ask.answer

    def slow(*given: Any, check: Any, **options: Any) -> Any:
        while not go_on.wait(0.05):
            check()
        return answer(*given, check=check, **options)

    monkeypatch.setattr(ask, "answer", slow)
    open_view(driver, fact="e")
    cancel = "#panel-ask [data-cancel]"
    shot.await_true(lambda: driver.find_elements("css selector", cancel), "the button that cancels")
    first, home = driver.current_window_handle, driver.current_url
    driver.switch_to.new_window("tab")
    driver.get(home)
    shot.await_true(
        lambda: "another page's question is being answered (real" in text(driver, "#answer"), "the other page told"
    )
    driver.close()
    driver.switch_to.window(first)
    driver.find_element("css selector", cancel).click()
    shot.await_true(lambda: "cancelled; ask again" in text(driver, "#answer"), "a word that it is cancelled")
    go_on.set()
    driver.find_element("id", "ask-again").click()
    shot.await_true(lambda: len(driver.find_elements("css selector", "#answer .strip")) == 2, "the answer")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_grave_in_what_is_asked(driver: Any, theme: str) -> None:
    found = []
    for name, view in {
        "a masked token": {"fact": "c", "edit": "mask", "at": "forward-2"},
        "other evidence": {"fact": "c", "edit": "swap"},
        "a typed sentence": {"about": "text", "forward": "0[d]0{D}", "reverse": "0{D}0[d]", "edit": "scale"},
        "a reason": {"about": "text", "forward": "0d0D"},
    }.items():
        open_view(driver, **view)
        shot.await_true(lambda: shot.drawable(driver), "the list")
        driver.find_element("css selector", f"#theme-choice label:nth-of-type({2 if theme == 'light' else 3})").click()
        shot.await_true(lambda: driver.execute_script(DARK) == (theme == "dark"), theme)
        shot.await_true(lambda: driver.find_elements("css selector", "#changes td, #answer .problem"), name)
        found += [f"{name}: {one}" for one in axe_findings(driver)]
    assert not found, "\n".join(found)


def test_nothing_failed_and_every_post_brought_the_token(driver: Any) -> None:
    assert driver.title == "revprobe: runs"
    severe = [entry for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    assert not severe, severe
    answer = driver.execute_async_script(
        "const done = arguments[0], frame = document.createElement('iframe');"
        "document.body.append(frame);"  # its fetch is not the page's, which adds the token
        "frame.contentWindow.fetch(location.origin + '/_dash-update-component', {method: 'POST', body: '{}'})"
        ".then((answer) => done(answer.status), () => done(0));"
    )
    assert answer == 403
