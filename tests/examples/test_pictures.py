"""The scripts that take pictures of pages: every view that was asked for, as high as it is, and what is wrong told."""

import struct
import sys
from pathlib import Path
from typing import Any

import pytest
from headless import needs_chromium

import revprobe as rp
from revprobe.report.html.report import write_report
from tiny import ROOT, module_at

pytestmark = needs_chromium
shot = module_at(ROOT / "examples" / "dashboard_screenshot.py")
shot.PATIENCE = 60


def with_neighbours(name: str) -> Any:
    """A script of examples/, which imports its neighbour as it does when it is run."""
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        return module_at(ROOT / "examples" / name)
    finally:
        sys.path.remove(str(ROOT / "examples"))


@pytest.fixture(scope="module")
def views() -> Any:
    return with_neighbours("report_views.py")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = module_at(ROOT / "tests" / "report" / "html" / "report_runs.py")
    return write_report(made.made_runs(), tmp_path_factory.mktemp("report") / "report.html", title="t")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two trained runs, as a dashboard lists them."""
    made = module_at(ROOT / "tests" / "report" / "dashboard" / "dashboard_runs.py")
    folder = tmp_path_factory.mktemp("runs")
    for name in ("a", "b"):
        made.write_real_run(folder / name, made.run_config(name))
    return folder


def size(picture: Path) -> tuple[int, int]:
    """Width and height of a PNG, as its header says."""
    head = picture.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n", f"{picture} is no PNG"
    return struct.unpack(">II", head[16:24])


def test_each_view_is_saved_light_and_dark_as_high_as_it_is(views: Any, report: Path, tmp_path: Path) -> None:
    """Of made runs nothing is wrong; a theme or a tab that was not changed would give a picture twice."""
    wrong = views.views(report, tmp_path, tabs=["overview", "configuration"], widths=[800])
    assert wrong == []
    taken = {picture.stem: picture for picture in tmp_path.iterdir()}
    assert set(taken) == {f"{tab}-{theme}-800" for tab in ("overview", "configuration") for theme in views.THEMES}
    assert len({picture.read_bytes() for picture in taken.values()}) == 4, "two views are one picture"
    for name, picture in taken.items():
        wide, high = size(picture)
        assert wide == 800
        assert high > 900 or "overview" not in name, f"{name} is cut at the window's height: {high}"


def test_a_page_wider_than_its_window_and_an_error_on_the_console_are_told(
    views: Any, report: Path, tmp_path: Path
) -> None:
    planted = '<div style="width: 3000px">x</div><script>console.error("planted")</script></body>'
    page = tmp_path / "report.html"
    page.write_text(report.read_text(encoding="utf-8").replace("</body>", planted), encoding="utf-8")
    wrong = views.views(page, tmp_path / "out", tabs=["configuration"], widths=[1024])
    assert [one for one in wrong if "pixels wide in a window of 1024" in one], wrong
    assert [one for one in wrong if one.startswith("console: ")], wrong
    with pytest.raises(ValueError, match=r"no tab 'routes' in .*: expected some of overview, routing"):
        views.views(report, tmp_path / "out", tabs=["routes"])


def test_a_view_of_the_dashboard_is_saved_as_high_as_it_is(runs: Path, tmp_path: Path) -> None:
    """A short tab gives a low picture; one cut at the window, or padded to a fixed height, would be as high."""
    training = shot.picture(runs, tmp_path / "training.png")
    pair = shot.picture(runs, tmp_path / "pair.png", chosen=["b"], view="tab=pair&fact=a")
    (wide, high), (_, low) = size(training), size(pair)
    assert wide == shot.WIDTH * shot.SCALE
    assert low < high < 2 * shot.HEIGHT * shot.SCALE, f"{low} and {high} pixels"
    with pytest.raises(rp.RevprobeError, match=r"no run 'c' in .*: expected some of a, b"):
        shot.picture(runs, tmp_path / "no.png", chosen=["c"])
    with pytest.raises(rp.RevprobeError, match="no tab 'pairs'; the closest is 'pair'"):
        shot.picture(runs, tmp_path / "no.png", view="tab=pairs")


def test_each_view_of_the_dashboard_is_saved_in_both_themes(runs: Path, tmp_path: Path) -> None:
    """Every drawing of every tab has a name and an address."""
    pictures = with_neighbours("dashboard_views.py")
    named = pictures.all_views()
    assert {said["tab"] for said in named.values()} == set(pictures.TABS)
    assert named["storage-curves"] == {"tab": "storage", "drawing": "curves"}
    out = tmp_path / "out"
    assert pictures.views(runs, out, runs=["b"], tabs=["pair", "tracing"], widths=[1024]) == []
    taken = {picture.stem: picture for picture in out.iterdir()}
    views = [f"tracing-{one}" for one in pictures.INSTRUMENTS["tracing"].drawings] + ["pair"]
    assert set(taken) == {f"{view}-{theme}-1024" for view in views for theme in ("light", "dark")}
    assert taken["pair-light-1024"].read_bytes() != taken["pair-dark-1024"].read_bytes()
    assert {size(picture)[0] for picture in taken.values()} == {1024}
    with pytest.raises(rp.RevprobeError, match="no tab 'pairs'; the closest is 'pair'"):
        pictures.views(runs, out, tabs=["pairs"])


def test_a_part_of_the_dashboard_beyond_the_window_is_told(runs: Path) -> None:
    """The page's main part scrolls by itself, so the document is never wider than its window."""
    pictures = with_neighbours("dashboard_views.py")
    plant = "document.querySelector(arguments[0]).insertAdjacentHTML('beforeend', arguments[1])"
    wide = '<div id="planted" style="width: 3000px">x</div>'
    with shot.served(runs) as address, shot.browser() as driver:
        driver.get(address)
        shot.await_true(lambda: shot.table_rows(driver), "the numbers")
        assert driver.execute_script(pictures.BEYOND) == []
        driver.execute_script(plant, "#numbers", wide)
        assert driver.execute_script(pictures.BEYOND) == [], "a box that scrolls may hold what is wider"
        driver.execute_script(plant, "#main", wide)
        assert "div#planted" in driver.execute_script(pictures.BEYOND)
