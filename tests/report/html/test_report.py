"""A report is whole or absent, opens without a network, shows data as text, and its numbers are the readings'."""

import base64
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

from revprobe import Reading, Readings, RevprobeError
from revprobe.finetune.runs.record import NOT_STARTED, RunRecord, summary_frame, tidy_summary
from revprobe.report.html import page as parts
from revprobe.report.html import report as report_module
from revprobe.report.html.explorer_tabs import EXPLORER
from revprobe.report.html.report import write_report
from revprobe.report.html.templates import compact
from revprobe.report.summary.tables import MEASURES, cell_lines, final_table, format_final_table, raw_with_ema
from tiny import made_probabilities

COLUMNS = ["run", "objective", "position_encoding", "length", "seed", "step", "weights", "kind"]
COLUMNS += ["measure", "value", "n", "facts", "low", "high", "control", "undefined", "reason", "caution"]
COLUMNS += ["statistics_version"]
NUMBERS = ["value", "low", "high", "control"]
EVIL = "</script><script>document.title='planted'</script><img src=x onerror=\"document.title='planted'\"><b>%{x}"


def attention(draw: int, about: dict[str, Any]) -> Reading:
    rng = np.random.default_rng(draw)
    parts = []
    for group, (forward, reverse) in enumerate([(1, 1), (1, 2), (2, 1), (2, 2)]):
        shared, own = rng.normal(size=(2, 9))
        columns = {"pair": 9 * group + np.arange(9), "fact": list("abcdefghi"), "group": group, "layer": 0, "head": 0}
        columns |= {"offset_forward": forward, "offset_reverse": -reverse, "reason": "", "score_forward": shared}
        columns |= {"distance_forward": forward, "distance_reverse": reverse, "score_reverse": shared + own}
        parts.append(pd.DataFrame(columns))
    return Reading("attention_correlation", pd.concat(parts, ignore_index=True), about)


def probability(draw: int, about: dict[str, Any]) -> Reading:
    return made_probabilities(draw, "abcdefghi" * 2, about)


def readings(*steps: int, weights: tuple[str, ...] = ("raw", "ema"), **more: Any) -> Readings:
    made: list[Reading] = []
    for step in steps:
        for place, which in enumerate(weights):
            about = {"kind": "same_target", "objective": "masked", "step": step, "weights": which, "dtype": "float32"}
            about |= {"model": "toy", "versions": {"torch": "2.13.0"}, "pairs": "d1"} | more
            made += [make(2 * step + place, about) for make in (attention, probability)]
    return Readings(made)


def run(name: str, *steps: int, problem: str | None = None, **more: Any) -> RunRecord:
    axes = {"objective": "masked", "position_encoding": "rope", "length": 10, "seed": 0} | more.pop("axes", {})
    config = more.pop("config", {"name": name})
    return RunRecord(name, axes, config, readings(*steps, **more) if steps else Readings([]), problem)


@pytest.fixture(scope="module")
def runs() -> list[RunRecord]:
    arm = {"objective": "causal", "position_encoding": None}
    return [
        run("rope-l10-s0", 0, 10, 500),
        run("arm-l10-s0", 0, 10, weights=("raw",), kind="swapped", objective="causal", axes=arm),
        run("broken", problem="step-000010 is truncated: <cut>"),
    ]


@pytest.fixture(scope="module")
def written(runs: list[RunRecord], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(runs, tmp_path_factory.mktemp("report") / "report.html", title="A <b>title</b>")


class Elements(HTMLParser):
    """Start tags with their attributes, the text outside scripts, and each script's content."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        inside = self.tags[-1][0] if self.tags else ""
        (self.scripts if inside == "script" and self.cdata_elem == "script" else self.words).append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def embedded(page: str) -> dict[str, dict[str, Any]]:
    """The figures in a page, by the id of the element that holds each."""
    blocks = re.findall(r'<script type="application/json" id="([\w-]+)-data">(.*?)</script>', page, re.S)
    return {name: json.loads(text) for name, text in blocks}


def test_the_summary_is_tidy_and_holds_every_number_exactly(runs: list[RunRecord], written: Path) -> None:
    """The columns of the issue, the readings' own numbers bit for bit, whole numbers whole, undefined empty."""
    raw = (written.parent / "summary.csv").read_text()
    table = pd.read_csv(written.parent / "summary.csv", dtype=dict.fromkeys(NUMBERS, str), keep_default_na=False)
    assert list(table.columns) == COLUMNS == raw.splitlines()[0].split(",")
    expected = pd.concat([one.readings.measures() for one in runs if len(one.readings)], ignore_index=True)
    for column in NUMBERS:
        assert [float(text) for text in table[column]] == expected[column].astype(float).tolist(), column
    for column in ("measure", "step", "weights", "kind", "n", "facts", "undefined", "reason", "caution"):
        assert table[column].tolist() == expected[column].tolist(), column
    assert set(table["run"]) == {"rope-l10-s0", "arm-l10-s0"} and "10.0" not in raw.splitlines()[1][:40]
    assert table.loc[table["run"] == "arm-l10-s0", "position_encoding"].eq("").all(), "an ARM has no encoding here"
    assert set(table["measure"]) == {"attention_correlation"} | {
        f"{direction}_{what}" for direction in ("forward", "reverse") for what in ("probability", "accuracy")
    }


def test_undefined_is_empty_and_never_zero(tmp_path: Path) -> None:
    broken = run("rope", 0, weights=("raw",))
    broken.readings[0].frame["score_reverse"] = np.nan
    broken.readings[0].frame["reason"] = "evidence hidden"
    text = write_report([broken], tmp_path / "report.html").read_text()
    row = (tmp_path / "summary.csv").read_text().splitlines()[1]
    assert row.startswith(
        "rope,masked,rope,10,0,0,raw,same_target,attention_correlation,,0,0,,,,36,36 evidence hidden,"
    ), row
    assert "36" in Elements(text).text and "evidence hidden" in Elements(text).text, "undefined points are not counted"
    shown = format_final_table(final_table(summary_frame([broken])))
    assert shown["attention correlation"].tolist() == ["undefined"]
    assert shown["gradient cosine"].tolist() == ["-"], "not measured is not undefined"


@pytest.mark.filterwarnings("error")
def test_measures_that_know_no_reasons_have_empty_ones() -> None:
    """A column that no run has would be numbers, all NaN, and no text may stand in it."""
    table = tidy_summary([pd.DataFrame({"run": ["a"], "value": [0.5]}), pd.DataFrame({"run": ["b"], "value": [0.25]})])
    assert table[["reason", "caution"]].to_numpy().tolist() == [["", ""], ["", ""]]
    assert table["value"].tolist() == [0.5, 0.25] and table["n"].isna().all()


def test_the_final_table_is_the_last_step_of_each_run_and_weights(runs: list[RunRecord]) -> None:
    summary = summary_frame(runs)
    table = final_table(summary)
    assert table[["run", "step", "weights", "kind"]].to_numpy().tolist() == [
        ["rope-l10-s0", 500, "raw", "same_target"],
        ["rope-l10-s0", 500, "ema", "same_target"],
        ["arm-l10-s0", 10, "raw", "swapped"],
    ]
    last = runs[0].readings.select(name="attention_correlation", step=500, weights="ema")[0]
    row = table.iloc[1]
    assert row["attention_correlation"] == last.value and row["attention_correlation_n"] == last.n
    assert (row["attention_correlation_low"], row["attention_correlation_high"]) == last.interval
    assert last.control is not None and row["attention_correlation_control"] == last.control.value
    text = format_final_table(table)
    assert text["attention correlation"][1] == (
        f"{last.value:.2f} [{last.interval[0]:.2f}, {last.interval[1]:.2f}] (control {last.control.value:.2f})"
    ).replace("-0.00", "0.00")
    accuracy = summary.query("run == 'arm-l10-s0' and step == 10 and measure == 'reverse_accuracy'")["value"].item()
    assert text["reverse accuracy (%)"][2].startswith(f"{100 * accuracy:.1f} ["), text["reverse accuracy (%)"][2]


def test_both_weights_of_a_run_stand_in_one_row_of_the_page(runs: list[RunRecord], written: Path) -> None:
    apart = format_final_table(final_table(summary_frame(runs)))
    shown = raw_with_ema(apart)
    assert shown[["run", "weights"]].to_numpy().tolist() == [["rope-l10-s0", "ema, raw"], ["arm-l10-s0", "raw"]]
    raw, ema = apart.iloc[0], apart.iloc[1]
    measured = [title for title in MEASURES.values() if raw[title] != "-"]
    assert 0 < len(measured) < len(MEASURES)
    for title in MEASURES.values():  # each with its interval and its control
        assert shown[title][0] == (f"{ema[title]}\nraw {raw[title]}" if title in measured else "-")
    assert shown.iloc[1].tolist() == apart.iloc[2].tolist(), "what has one kind of weights stays"
    assert shown["n pairs"][0] == raw["n pairs"], "told once where it is one"
    cell = shown["attention correlation"][0]
    assert cell_lines(cell) == [
        *cell_lines(ema["attention correlation"]),
        *cell_lines(f"raw {raw['attention correlation']}"),
    ]
    final = written.read_text().partition("Last checkpoint</h2>")[2].partition("</table>")[0]
    assert final.count("<tr") == 1 + 2 and final.count("<small>raw ") == len(measured)


def test_a_measure_that_stands_twice_is_refused(runs: list[RunRecord]) -> None:
    twice = RunRecord("rope", {}, {}, Readings([*runs[0].readings, *runs[0].readings]))
    with pytest.raises(RevprobeError, match=r"attention_correlation of run 'rope' stands twice at step 500"):
        final_table(summary_frame([twice]))


def test_the_page_holds_the_numbers_of_the_readings(runs: list[RunRecord], written: Path) -> None:
    """What the page draws is what was measured, to five digits: signatures, and every step of every heat map."""
    figures = embedded(written.read_text())
    assert sorted(figures) == ["colours", "look", "panels", "run-0", "run-1", "signatures"]
    traces = [t for t in figures["signatures"]["data"] if t["meta"]["part"] == "value" and t["yaxis"] == "y4"]
    dots = {f"run {t['meta']['run']}": t["line"]["color"] for t in traces}
    assert dots == figures["colours"] and len(dots) == 2, "a run's dot in the tables has the colour of its line"
    drawn = {(t["meta"]["run"], t["name"]): t["y"] for t in traces}
    for (name, label), y in drawn.items():
        one = next(one for one in runs if one.name == name)
        rows = one.readings.select(weights="ema" if "EMA" in label else "raw").measures()
        expected = rows.loc[rows["measure"] == "reverse_probability", "value"]
        np.testing.assert_allclose(y, expected, rtol=1e-4)
    assert len(drawn) == 3, drawn.keys()
    names = [a["id"] for tag, a in Elements(written.read_text()).tags if tag == "section"]
    asked = [
        "top",
        "finding",
        "signatures",
        "final",
        "runs",
        "undefined",
        "routing",
        "probability",
        "storage",
    ]
    asked += ["edits", "configuration", "versions"]
    assert names == [f"section-{name}" for name in asked], names
    data = figures["run-0"]
    assert data["steps"] == [0, 10, 500] and data["series"] == ["EMA, same target", "raw, same target"]
    frame = runs[0].readings.select(name="attention_correlation", step=10, weights="raw")[0].frame
    maps = data["attention_correlation"]["maps"]
    shown = np.frombuffer(base64.b64decode(maps["values"]), dtype="<i1").reshape(6, 3, 4)  # entry unit cell
    for at, place in enumerate(zip(maps["cells"]["distance_forward"], maps["cells"]["distance_reverse"], strict=True)):
        cell = frame[(frame["distance_forward"] == place[0]) & (frame["distance_reverse"] == place[1])]
        expected = np.corrcoef(cell["score_forward"], cell["score_reverse"])[0, 1]
        assert shown[2 * 1 + 1, 0, at] / 100 == pytest.approx(expected, abs=0.0051), place
    words = Elements(written.read_text()).text
    for value in format_final_table(final_table(summary_frame(runs)))["reverse probability"]:
        assert value.split(" ")[0] in words, f"{value} is not in the final table"
    assert "<td" not in words and "</div" not in words, "markup was escaped as if it were text"


def test_a_tab_without_a_reading_is_left_out(runs: list[RunRecord], written: Path, tmp_path: Path) -> None:
    """These runs have no gradients; a report of runs that have not begun has nothing but what was asked for."""
    tabs = [a["data-tab"] for _, a in Elements(written.read_text()).tags if a.get("role") == "tab"]
    assert tabs == ["overview", "routing", "probability", "storage", "edits", "configuration"]
    page = write_report([runs[2]], tmp_path / "report.html").read_text()
    assert [a["data-tab"] for _, a in Elements(page).tags if a.get("role") == "tab"] == ["overview", "configuration"]


@pytest.mark.parametrize(("waiting", "lines"), [(8, 8), (9, 0)])
def test_runs_that_wait_are_said_once(tmp_path: Path, waiting: int, lines: int) -> None:
    """A sweep of a hundred runs whose first has begun: a page of lines that all say the same helps nobody."""
    late = [run(f"late-{place}", problem=NOT_STARTED) for place in range(waiting)]
    page = write_report([run("first", 0, 10), *late], tmp_path / "report.html").read_text()
    assert page.count(NOT_STARTED) == lines + (not lines), "in their lines, or in one that holds them"
    assert (f"{waiting} of {waiting + 1} runs are not started yet" in page) == (not lines)
    assert all(page.count(f"late-{place}") for place in range(waiting)), "each is named"
    page = write_report(late, tmp_path / "report.html").read_text()
    assert "There are none." not in page, "no run has begun, and each is said to wait"


def test_the_page_loads_nothing_from_anywhere(written: Path) -> None:
    """No element can fetch, the style names no address, and the page's own policy forbids requests."""
    page = written.read_text()
    elements = Elements(page)
    for tag, attributes in elements.tags:
        assert not {"src", "href", "srcset", "data", "action"} & set(attributes), (tag, attributes)
        assert tag not in {"link", "iframe", "object", "embed", "img", "base"}, tag
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style and "@import" not in style
    policies = [a["content"] for tag, a in elements.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies and "default-src 'none'" in str(policies[0]) and "http" not in str(policies[0]), policies
    assert page.count("plotly.js v") == 1, "plotly.js stands in the page once"
    assert len(page) < 8e6, f"{len(page) / 1e6:.1f} MB"


def test_planted_markup_stays_text(tmp_path: Path) -> None:
    """Names, problems, configs and kinds come from files: none may add an element or end a script."""
    plain = [run("rope", 0, 10, problem="late", versions={"x": "y"}), run("alibi", 0, 10)]
    evil = [
        run(EVIL, 0, 10, problem=EVIL, kind=EVIL, model=EVIL, versions={EVIL: EVIL}, config={EVIL: [EVIL]}),
        run("alibi", 0, 10, axes={"position_encoding": EVIL}),
    ]
    expected = Elements(write_report(plain, tmp_path / "plain.html", title="t").read_text())
    path = write_report(evil, tmp_path / "evil.html", title=EVIL)
    found = Elements(path.read_text())
    assert [tag for tag, _ in found.tags] == [tag for tag, _ in expected.tags], "planted text became markup"
    assert len(found.scripts) == len(expected.scripts)
    assert found.text.count(EVIL) >= 5, "the text must still be shown: title, name, problem, config, select"
    tags = {trace["meta"]["run"] for trace in embedded(path.read_text())["signatures"]["data"]}
    assert tags == {EVIL, "alibi"}, "the script must compare the true name"


@given(
    st.recursive(
        st.text() | st.none() | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_json_in_a_script_cannot_end_it_and_reads_back(value: Any) -> None:
    block = str(parts.data_block("a", {"planted": "</script><!--\u2028", "value": value}))
    text = block.removeprefix('<script type="application/json" id="a-data">').removesuffix("</script>")
    assert not set("<>&\u2028\u2029") & set(text), text
    assert json.loads(text)["value"] == value


def drawing(text: str) -> go.Figure:
    return go.Figure(go.Scatter(x=[0], y=[0], name=text), go.Layout(title=text))


TEMPLATED: dict[str, Callable[[str], str]] = {
    "page": lambda text: parts.page(text, text, [(text, text, [parts.paragraph(text)])], chooser=Markup()),
    "section": lambda text: parts.section(text, text, parts.paragraph(text), parts.paragraph(text, note=True)),
    "a part that is no markup": lambda text: parts.section("a", "b", text, parts.folded("a", text)),  # type: ignore
    "table": lambda text: parts.table([text], [[text, f"{text} [0.1, 0.2] (control {text})"]], problems=[0]),
    "choice": lambda text: parts.controls(parts.choice(text, text, [("a", "b"), (text, text)], chosen=text)),
    "folded": lambda text: parts.folded(text, parts.details(text, text)),
    "figure": lambda text: parts.drawn_figure(text, drawing(text)) + parts.figure_place(text),
    "gallery": lambda text: parts.gallery(text, text, [(text, drawing(text)), ("b", drawing(text))]),
    "explorer": lambda text: EXPLORER.controls([("run-0", text)]) + EXPLORER.panels(text, [text]) + EXPLORER.notes(),
}


@pytest.mark.parametrize("name", TEMPLATED)
def test_every_template_shows_text_as_it_is(name: str) -> None:
    """Not escaped, it adds an element; escaped twice, it shows as `&lt;`: the page must hold it to a letter, wherever a
    plain word would stand.
    """
    plain, planted = (seen(TEMPLATED[name](text)) for text in ("a-plain-word", EVIL))
    assert plain.count("a-plain-word") > 1
    assert json.loads(planted) == json.loads(plain.replace("a-plain-word", json.dumps(EVIL)[1:-1]))


def seen(page: str) -> str:
    """All that a browser makes of a page, as JSON: elements with their attributes, text, and scripts, data read."""
    found = Elements(page)
    data = [json.loads(script) if script.startswith("{") else script for script in found.scripts]
    return json.dumps([found.tags, found.words, data])


def test_compact_rounds_and_keeps_undefined() -> None:
    assert compact({"y": [0.123456789, math.nan, 15000.0, (1, "a")]}) == {"y": [0.12346, None, 15000, [1, "a"]]}


@pytest.mark.parametrize("planted", ["figure", "disk"])
def test_a_report_that_fails_leaves_the_old_one(
    planted: str, runs: list[RunRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole or not at all, both files: an exception in drawing, or a disk that fills up at the second file."""
    path = tmp_path / "report.html"
    path.write_text("the old page")
    (tmp_path / "summary.csv").write_text("the old table")
    if planted == "figure":
        monkeypatch.setattr(report_module, "figure_data", lambda *_: 1 / 0)
    else:
        real = Path.write_text

        def full(self: Path, *args: Any, **options: Any) -> int:
            if "report" in self.name:
                real(self, "half a pa", encoding="utf-8")
                raise OSError(28, "No space left on device")
            return real(self, *args, **options)

        monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ZeroDivisionError if planted == "figure" else RevprobeError):
        write_report(runs, path)
    assert path.read_text() == "the old page" and (tmp_path / "summary.csv").read_text() == "the old table"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "summary.csv"], "a temporary file was left"


def test_an_unwritable_folder_is_named(runs: list[RunRecord], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RevprobeError, match=r"cannot write the report in '.*file'.*expected a writable folder"):
        write_report(runs[2:], tmp_path / "file" / "report.html")


def test_two_runs_of_one_name_are_refused(runs: list[RunRecord], tmp_path: Path) -> None:
    with pytest.raises(RevprobeError, match="two runs are called 'rope-l10-s0'"):
        write_report([runs[0], runs[0]], tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("which", ["no runs", "no readings"])
def test_an_empty_report_says_so(which: str, runs: list[RunRecord], tmp_path: Path) -> None:
    text = Elements(write_report(runs[2:] * (which == "no readings"), tmp_path / "report.html").read_text()).text
    assert "Nothing to show" in text and ("is truncated: <cut>" in text) == (which == "no readings")
    assert (tmp_path / "summary.csv").read_text() == ",".join(COLUMNS) + "\n"


def test_a_broken_run_and_what_makes_numbers_incomparable_are_said(runs: list[RunRecord], tmp_path: Path) -> None:
    assert "step-000010 is truncated: <cut>" in Elements(write_report(runs, tmp_path / "a.html").read_text()).text
    changed = Readings([*readings(10, pairs="d1"), *readings(20, pairs="d2")])
    late = RunRecord("late", {}, {}, changed)
    text = Elements(write_report([late], tmp_path / "b.html").read_text()).text
    assert "late: no reading of the untrained model: the first is at step 10" in text
    assert "late: attention_correlation was taken with 2 sets of pairs" in text


def held_against(reason: str = "", model: str = "toy") -> dict[str, list[dict[str, Any]]]:
    """What a run's readings say of two controls, one without a number."""
    low = {"value": 0.25, "low": 0.125, "high": 0.375, "n": 36, "facts": 9, "difference": 0.5}
    low |= {"difference_low": 0.25, "difference_high": 0.75, "reason": ""}
    gone = dict.fromkeys(low) | {"reason": reason or "no variance"}
    return {"controls": [{"control": "untrained", "model": model, **low}, {"control": "sink", "model": model, **gone}]}


def test_a_signature_is_drawn_against_its_controls(tmp_path: Path) -> None:
    path = write_report([run("rope", 0, 10, **held_against()), run("alibi", 0)], tmp_path / "report.html", title="t")
    page, kept = path.read_text(), pd.read_csv(tmp_path / "controls.csv")
    drawn = [t for t in embedded(page)["signatures"]["data"] if t["meta"]["part"] == "against"]
    # The probabilities of these made-up readings say the same; attention's panel is the first.
    attention_traces = [t for t in drawn if t["yaxis"] == "y"]
    assert {t["meta"]["run"] for t in attention_traces} == {"rope"} and attention_traces[0]["y"] == [0.25, 0.25]
    words = Elements(page).text
    for said in ("untrained twin", "attention sink", "0.50", "no variance", "control: "):
        assert said in words or said in json.dumps(embedded(page)["signatures"]), said
    assert 'id="choose-against"' in page
    assert set(kept["run"]) == {"rope"} and set(kept["control"]) == {"untrained", "sink"}
    shown = kept[(kept["measure"] == "attention_correlation") & (kept["control"] == "untrained")]
    assert shown["value"].tolist() == [0.25] * 4 and kept.loc[kept["control"] == "sink", "value"].isna().all()


def test_without_controls_an_older_table_of_them_goes(runs: list[RunRecord], tmp_path: Path) -> None:
    write_report([run("rope", 0, **held_against())], tmp_path / "report.html", title="t")
    page = write_report(runs, tmp_path / "report.html", title="t").read_text()
    assert not (tmp_path / "controls.csv").exists() and 'id="choose-against"' not in page


def test_planted_markup_in_controls_stays_text(tmp_path: Path) -> None:
    plain, evil = (
        write_report([run("rope", 0, **held_against(text, text))], tmp_path / f"{n}.html", title="t").read_text()
        for n, text in enumerate(("late", EVIL))
    )
    assert [tag for tag, _ in Elements(evil).tags] == [tag for tag, _ in Elements(plain).tags]
    assert EVIL in Elements(evil).text and len(Elements(evil).scripts) == len(Elements(plain).scripts)
