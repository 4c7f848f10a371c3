"""The dashboard in a real browser: it follows a run, overlays two, opens a pair, and outlives a corrupted run."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tiny import ROOT, module_at

pytestmark = pytest.mark.skipif(
    not (shutil.which("chromium") or shutil.which("google-chrome")) or not shutil.which("chromedriver"),
    reason="no Chromium with its driver on this machine; .ci/run installs them",
)


made = module_at(Path(__file__).with_name("dashboard_runs.py"))
shot = module_at(ROOT / "examples" / "dashboard_screenshot.py")
shot.PATIENCE = 60
# A file name holds no slash; this markup needs none to run.
EVIL_NAME = "<img src=x onerror=\"document.title='planted'\">"
EVIL_PROBLEM = f"stopped: {made.EVIL} </script><script>document.title='planted'</script>"

# The steps drawn of each run in the panel of the answer to the reverse query, as {run: [how many points]}.
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
def driver(folder: Path) -> Iterator[Any]:
    """A browser at the dashboard, its first run drawn; what it asks for is kept in the performance log."""
    with shot.served(folder, every=0.5) as address, shot.browser() as driver:
        driver.get(address)
        drawn(driver, {"0-training": 2})
        driver.execute_script("window.sameCopyOfThePage = true")
        yield driver


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
    return str(driver.execute_script("return document.querySelector(arguments[0]).textContent", selector))


def test_the_whole_visit(driver: Any, folder: Path) -> None:
    """One page from opening to the end, never reloaded: each step is one claim, in the order a visitor makes them."""
    # A checkpoint written after the page was opened appears, in curves, table and list.
    made.write_step(folder / "0-training", 10)
    drawn(driver, {"0-training": 3})
    shot.await_true(lambda: "3 checkpoints, step 10 of 10" in text(driver, "#runs"), "the list")
    shot.await_true(lambda: "last (step 10)" in text(driver, "#one-step"), "the choice of checkpoints")
    # A run that begins while the page is open appears in the list.
    made.write_run(folder / "late", 0)
    shot.await_true(lambda: "late" in shot.drawable(driver), "the new run")
    # Two runs over each other, one of them with markup for a name, problem and facts.
    shot.pick(driver, EVIL_NAME)
    drawn(driver, {"0-training": 3, EVIL_NAME: 1})
    shot.await_true(lambda: len(shot.table_rows(driver)) == 2, "both in the table")
    assert EVIL_NAME in text(driver, "#numbers") and "document.title='planted'</script>" in text(driver, "#runs")
    # A checkpoint that is corrupted while it is shown: the reason stands there, the other run stays drawn.
    file = folder / "0-training" / "readings" / "step-000005" / "reverse_probability.raw.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    drawn(driver, {"0-training": 2, EVIL_NAME: 1})
    assert "step-000005/reverse_probability.raw.parquet is cut off" in text(driver, "#runs")
    shot.await_true(lambda: "is damaged" in text(driver, "#notes"), "the reason under the curves")
    # A config that is overwritten with rubbish: the run stays listed, as broken.
    (folder / "late" / "config.yaml").write_text("[")
    shot.await_true(
        lambda: "1 broken" not in text(driver, "#status") and "broken" in text(driver, "#status"), "2 broken"
    )
    # Filters take a run out of the curves and let it back in.
    driver.find_element("id", "search").send_keys("training\n")
    drawn(driver, {"0-training": 2})
    driver.find_element("id", "search").send_keys("\b" * 8 + "\n")
    drawn(driver, {"0-training": 2, EVIL_NAME: 1})
    # One pair down to its tokens, of a run with real checkpoints.
    for key in ("0-training", EVIL_NAME):
        shot.pick(driver, key, chosen=False)
        shot.await_true(lambda key=key: key not in driver.execute_script(DRAWN), f"{key} gone")
    shot.pick(driver, "real")
    drawn(driver, {"real": 2})
    shot.await_true(lambda: "real" in text(driver, "#one-run"), "the run's checkpoints")
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
    drawn(driver, {"ft": 3})
    shot.await_true(lambda: "last (step 2)" in text(driver, "#one-step"), "the fine-tuning's checkpoints")
    shot.await_true(lambda: not text(driver, "#opened"), "the other run's pair gone")
    shot.choose(driver, "fact")
    shot.await_true(lambda: "fact" in text(driver, "#opened"), "the fine-tuning's pair")
    pieces = driver.execute_script(PIECES)
    assert "<script>x" in pieces.replace("[", "").replace("]", ""), pieces
    assert driver.execute_script("return window.sameCopyOfThePage === true"), "the page was reloaded on the way"


def test_nothing_planted_ran_nothing_failed_and_nothing_left_the_page(driver: Any) -> None:
    """After the visit: no script of the data's, no console error, no request to any other place, no way to make one."""
    assert driver.title == "revprobe: runs", "planted script ran"
    assert not driver.find_elements("css selector", "img[src=x]"), "planted text became an element"
    severe = [entry for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    assert not severe, severe
    sent = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    urls = {one["params"]["request"]["url"] for one in sent if one["method"] == "Network.requestWillBeSent"} | {
        one["params"]["url"] for one in sent if one["method"] == "Network.webSocketCreated"
    }
    ours = urlsplit(driver.current_url).netloc
    asked = {url for url in urls if urlsplit(url).scheme not in ("data", "blob", "chrome")}  # chrome: its own first tab
    assert any("_dash-update-component" in url for url in asked), "the log kept nothing: this test could not fail"
    assert {urlsplit(url).netloc for url in asked} == {ours}, asked
    buttons = {one.get_attribute("data-title") for one in driver.find_elements("css selector", ".modebar-btn")}
    assert buttons and not any("hare" in str(title) or "loud" in str(title) for title in buttons), buttons
