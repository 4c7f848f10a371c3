"""In a real browser: a view's address, the theme, and figures whose words fit and are not covered."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlencode

import pytest
from axe_findings import axe_findings
from headless import chromium, needs_chromium

from revprobe.report.html.finetune_sections import exact_matches
from revprobe.report.html.page import section
from revprobe.report.html.report import write_report
from tiny import module_at

pytestmark = needs_chromium
made = module_at(Path(__file__).with_name("report_runs.py"))
EVIL = made.EVIL
awaited, change, choose_theme, drawn, open_tab, said = (
    getattr(made, name) for name in ("awaited", "change", "choose_theme", "drawn", "open_tab", "said")
)
CHOSEN = ("explore-run", "explore-series", "explore-step", "explore-layer", "explore-head", "choose-against")
# The rectangles of the words of every figure in sight, with whether they are inside the figure.
WORDS = """
return [...document.querySelectorAll("[role=tabpanel]:not([hidden]) .js-plotly-plot")].filter((one) => one.offsetParent)
  .map((figure) => {
    const frame = figure.getBoundingClientRect();
    const seen = (one) => one.textContent.trim() && !one.closest(".hm, .modebar, .hoverlayer")
      && one.getClientRects().length && getComputedStyle(one).opacity !== "0";
    const words = [...figure.querySelectorAll("text")].filter(seen).map((one) => {
      const {left, top, right, bottom} = one.getBoundingClientRect();
      return [one.textContent, left, top, right, bottom];
    });
    return [figure.id, [frame.left, frame.top, frame.right, frame.bottom], words];
  });
"""
# The rectangles of the lines in the cells of heat tables.
CELLS = """
return [...document.querySelectorAll("[id^=table7] .heatmap-label text")].flatMap((one) =>
  [...(one.querySelectorAll("tspan.line").length ? one.querySelectorAll("tspan.line") : [one])]).map((one) => {
    const {left, top, right, bottom} = one.getBoundingClientRect();
    return [one.textContent, left, top, right, bottom];
  });
"""
# What the tools of a figure must not lie on, while the pointer is over it: plots, titles, scales, legend.
COVERED = """
const figure = document.getElementById(arguments[0]), bar = figure.querySelector(".modebar");
const at = bar.getBoundingClientRect();
const parts = [...figure.querySelectorAll(
  ".gtitle, .nsewdrag, .legend text, .annotation text, .colorbar .cbaxis text")];
const shown = getComputedStyle(bar.querySelector(".modebar-group") ?? bar).opacity;
const covered = parts.filter((one) => {
  const r = one.getBoundingClientRect();
  return r.width && r.left < at.right - 1 && at.left < r.right - 1 && r.top < at.bottom - 1 && at.top < r.bottom - 1;
});
return [at.width, Number(shown), covered.map((one) => one.getAttribute("class") + ": " + one.textContent)];
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report(made.made_runs(), tmp_path_factory.mktemp("view") / "report.html", title="t").as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("browser"), "1280,1200") as driver:
        yield driver


def opened_at(browser: Any, address: str) -> Any:
    """A page opened anew: the same address but for its # would only be stepped to."""
    browser.get("about:blank")
    browser.get(address)
    drawn(browser)
    return browser


def view(browser: Any) -> dict[str, str]:
    """What is chosen, as a reader sees it."""
    shown = "(one) => one.tagName === 'SELECT' ? one.selectedOptions[0]?.text : one.value"
    script = f"return arguments[0].map((id) => document.getElementById(id)).map({shown})"
    found = dict(zip(CHOSEN, browser.execute_script(script, list(CHOSEN)), strict=True))
    return found | {"tab": browser.execute_script("return opened"), "step": said(browser, "explore-step-shown")}


def await_view(browser: Any, wanted: dict[str, str]) -> None:
    """Wait until these are chosen: a step through the browser's history is told to its page some time later."""
    deadline = time.monotonic() + 60
    while (found := view(browser)) | wanted != found:
        assert time.monotonic() < deadline, f"{found}, not {wanted}"
        time.sleep(0.05)
    drawn(browser)


def fragment(browser: Any) -> dict[str, str]:
    """What the address says behind its #."""
    text = browser.execute_script("return location.hash").removeprefix("#")
    return {name: values[-1] for name, values in parse_qs(text, strict_parsing=bool(text)).items()}


def test_the_address_says_the_view_and_a_reload_keeps_it(browser: Any, page: str) -> None:
    opened_at(browser, page)
    assert fragment(browser) == {}, "a view that is as usual needs no words"
    open_tab(browser, "routing")
    for name, value in (("run", "run-0"), ("series", "raw, same target"), ("layer", "1"), ("head", "0")):
        change(browser, f"explore-{name}", value)
    browser.find_element("id", "explore-step").send_keys("\ue012")  # the arrow key to the left
    drawn(browser)
    wanted = {"tab": "routing", "series": "raw, same target", "step": "10", "layer": "1", "head": "0"}
    assert fragment(browser) == wanted
    before = view(browser)
    browser.refresh()
    drawn(browser)
    assert view(browser) == before and fragment(browser) == wanted
    title = "return document.getElementById('course').layout.title.text"
    assert "layer 1, head 0" in browser.execute_script(title), "what is drawn follows the address"


def test_back_leads_through_the_views_and_forth_again(browser: Any, page: str) -> None:
    """Each choice is one step; however far a slider is moved, it is one."""
    opened_at(browser, page)
    views = [view(browser)]
    browser.find_element("css selector", "[data-tab=routing]").click()
    drawn(browser)
    views.append(view(browser))
    change(browser, "explore-run", "run-1")
    views.append(view(browser))
    change(browser, "explore-run", "run-0")
    views.append(view(browser))
    for _ in range(2):
        browser.find_element("id", "explore-step").send_keys("\ue012")
        drawn(browser)
    await_view(browser, {"step": "0"})
    open_tab(browser, "overview")
    change(browser, "choose-against", "sink")
    for wanted in [None, None, *reversed(views)]:
        browser.back()
        drawn(browser)
        if wanted is not None:
            await_view(browser, wanted)
    browser.forward()
    await_view(browser, views[1])


def test_a_run_stands_in_the_address_by_its_name(browser: Any, page: str) -> None:
    """The next report may list others before it; and a name is text, whatever it holds."""
    opened_at(browser, f"{page}#{urlencode({'tab': 'gradients', 'run': 'b'})}")
    assert view(browser)["explore-run"] == "b" and view(browser)["tab"] == "gradients"
    change(browser, "explore-run", "run-0")
    assert "run" not in fragment(browser), "the first run is the usual one"
    opened_at(browser, f"{page}#{urlencode({'run': EVIL, 'step': 10})}")
    assert view(browser)["explore-run"] == EVIL and view(browser)["step"] == "10"
    assert browser.title == "t", "planted script ran"


@pytest.mark.parametrize(
    "asked",
    [
        {"tab": "nowhere", "run": "gone", "layer": "99", "head": "5", "series": EVIL, "controls": "?"},
        {"step": "7", "storage": "no such reading", EVIL: EVIL, "__proto__": "x", "constructor": "y"},
        {"step": "-1e999"},
    ],
)
def test_what_an_address_asks_for_and_the_page_lacks_is_left_out(
    browser: Any, page: str, asked: dict[str, str]
) -> None:
    opened_at(browser, page)
    usual = view(browser)
    opened_at(browser, f"{page}#{urlencode(asked)}")
    assert view(browser) == usual and fragment(browser) == {}
    opened_at(browser, f"{page}#{urlencode(asked | {'tab': 'routing', 'layer': '1'})}")
    assert fragment(browser) == {"tab": "routing", "layer": "1"}, "what the page has is taken"
    assert not browser.get_log("browser")


@pytest.mark.parametrize("asked", ["%", "%E0%A4%A", "&&==&", "section-nothing", "section-%", "x" * 200_000])
def test_an_address_of_nonsense_opens_the_page(browser: Any, page: str, asked: str) -> None:
    opened_at(browser, f"{page}#{asked}")
    assert view(browser)["tab"] == "overview" and not browser.get_log("browser")


def test_short_addresses_of_tabs_and_sections_lead_there(browser: Any, page: str) -> None:
    """`report.html#routing` and `report.html#section-final`, as earlier reports had them."""
    opened_at(browser, f"{page}#probability")
    assert view(browser)["tab"] == "probability"
    opened_at(browser, f"{page}#section-versions")
    assert view(browser)["tab"] == "configuration"
    top = "return document.getElementById('section-versions').getBoundingClientRect().top"
    assert browser.execute_script(top) < browser.execute_script("return innerHeight"), "and the section is in sight"


def test_the_theme_is_a_labelled_control_that_is_kept(browser: Any, page: str) -> None:
    """By the keyboard alone; a reload keeps it, and "as the system" follows the system."""
    from selenium.webdriver.common.keys import Keys

    def system(scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        drawn(browser)

    opened_at(browser, page)
    browser.execute_script("localStorage.clear()")
    opened_at(browser, page)
    group = browser.find_element("css selector", "[role=radiogroup]")
    assert (group.aria_role, group.accessible_name) == ("radiogroup", "Theme")
    # Chromium 150 keeps the blank before a label's words.
    names = [one.accessible_name.strip() for one in group.find_elements("css selector", "input")]
    assert names == ["as the system", "light", "dark"]
    dark = "[dark, document.documentElement.classList.contains('dark')].every((one) => one === %s)"
    for scheme in ("dark", "light"):
        system(scheme)
        awaited(browser, dark % str(scheme == "dark").lower())
    browser.find_element("css selector", "body").send_keys(Keys.TAB)
    awaited(browser, "document.activeElement.value === 'system'")  # the first stop of the page
    for key, value in ((Keys.ARROW_RIGHT, "light"), (Keys.ARROW_RIGHT, "dark")):
        browser.switch_to.active_element.send_keys(key)
        awaited(browser, f"document.activeElement.value === '{value}'")
        awaited(browser, dark % str(value == "dark").lower())
        drawn(browser)
    browser.refresh()
    drawn(browser)
    awaited(browser, dark % "true")  # kept
    assert not axe_findings(browser)
    choose_theme(browser, "system")
    awaited(browser, dark % "false")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def close(one: list[Any], other: list[Any]) -> bool:
    """Whether two words lie on each other by more than their edges."""
    return min(one[3], other[3]) - max(one[1], other[1]) > 2 and min(one[4], other[4]) - max(one[2], other[2]) > 3


def misplaced(browser: Any) -> list[str]:
    """Words of the figures in sight that leave their figure or lie on each other."""
    found = []
    for name, (left, top, right, bottom), words in browser.execute_script(WORDS):
        assert len(words) > 3, f"{name} has no words"
        for place, one in enumerate(words):
            if one[1] < left - 1 or one[2] < top - 1 or one[3] > right + 1 or one[4] > bottom + 1:
                found.append(f"{name}: {one[0]!r} leaves its figure")
            found += [f"{name}: {one[0]!r} lies on {other[0]!r}" for other in words[:place] if close(one, other)]
    return found


@pytest.mark.parametrize("width", [1440, 1024, 800])
def test_no_word_of_a_figure_is_cut_or_lies_on_another(browser: Any, page: str, width: int) -> None:
    browser.set_window_size(width, 1200)
    opened_at(browser, page)
    found = []
    for tab in browser.execute_script("return everyTab()"):
        open_tab(browser, tab)
        found += [f"{tab}: {text}" for text in misplaced(browser)]
        wide = browser.execute_script("return document.documentElement.scrollWidth - innerWidth")
        found += [f"{tab}: the page is {wide} pixels wider than its window"] if wide > 0 else []
    browser.set_window_size(1280, 1200)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("width", [1440, 1024, 800])
def test_a_heat_table_of_many_columns_leaves_the_page_as_wide_as_its_window(
    browser: Any, tmp_path: Path, width: int
) -> None:
    """It is scrolled in its own place, which the keyboard reaches, and no cell's words lie on the next's."""
    parts = [section("table7", "Exact match (Table 7)", *exact_matches(made.matches(4)))]
    page = write_report(made.made_runs(), tmp_path / "report.html", sections=parts)
    browser.set_window_size(width, 1200)
    opened_at(browser, page.as_uri())
    wide = browser.execute_script("return document.documentElement.scrollWidth - innerWidth")
    place = "document.getElementById('table7-train')"
    beyond = browser.execute_script(f"return {place}.parentElement.scrollWidth - {place}.parentElement.clientWidth")
    cells = browser.execute_script(CELLS)
    browser.set_window_size(1280, 1200)
    assert wide <= 0, f"the page is {wide} pixels wider than its window"
    assert beyond > 0, "it is wider than its place, or nothing is shown"
    assert len(cells) == 2 * 4 * 6 * 3, "trained and held-out facts, four rows, six columns, three lines"
    found = [f"{a[0]!r} on {b[0]!r}" for at, a in enumerate(cells) for b in cells[:at] if close(a, b)]
    assert not found, "\n".join(found)
    assert not axe_findings(browser)


def test_a_table_of_few_rows_is_not_drawn_once_more() -> None:
    assert "table7-train" not in "".join(exact_matches(made.matches(3)))
    page = "".join(exact_matches(made.matches(4)))
    assert "table7-train" in page
    small = "<small>3 seeds, n = 3,000, 500 facts</small></td>"
    assert page.count(small) == 2 * 4 * 6, "interval and counts stand under a value, not beside it"


@pytest.mark.parametrize("width", [1440, 800])
def test_the_tools_of_a_figure_lie_on_nothing_and_show_under_the_pointer_alone(
    browser: Any, page: str, width: int
) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    browser.set_window_size(width, 1200)
    opened_at(browser, page)
    looked, found = 0, []
    for tab in browser.execute_script("return everyTab()"):
        open_tab(browser, tab)
        for figure in browser.find_elements("css selector", f"#tab-{tab} .js-plotly-plot"):
            if not figure.is_displayed():
                continue
            ActionChains(browser).move_to_element(browser.find_element("css selector", "h1")).perform()
            name = figure.get_attribute("id")
            covering = f"(() => {{ {COVERED.replace('arguments[0]', repr(name))} }})()"
            made.awaited(browser, f"{covering}[1] === 0")
            ActionChains(browser).move_to_element(figure).perform()
            made.awaited(browser, f"{covering}[1] > 0.5")
            wide, _, covered = browser.execute_script(COVERED, name)
            looked += wide > 0
            found += [f"{tab}, {name}: {text}" for text in covered]
    browser.set_window_size(1280, 1200)
    assert looked >= 6 and not found, f"{looked} figures\n" + "\n".join(found)


def test_axes_end_where_the_curves_do(browser: Any, page: str) -> None:
    """Curves fill at least half of the height of their plot, at every choice of the layer."""
    opened_at(browser, f"{page}#tab=routing&run={quote('b')}")
    for layer in ("all", "0", "1"):
        change(browser, "explore-layer", layer)
        low, high = browser.execute_script("return document.getElementById('course').layout.yaxis.range")
        numbers = [n for one in made.traces(browser, "course") for n in one["y"] if n is not None]
        assert low < min(numbers) and high > max(numbers), "nothing is cut"
        assert max(numbers) - min(numbers) > 0.5 * (high - low), (layer, low, high)
