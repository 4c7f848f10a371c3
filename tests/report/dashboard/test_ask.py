"""The tab that asks the model: from what a page sends to the probes' numbers, and what is refused on the way."""

import shutil
import threading
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest

import revprobe as rp
from revprobe.finetune.config.finetuning import FinetuneConfig
from revprobe.finetune.runs.finetuning import fine_tune
from revprobe.report.asking.asked_sentences import asked_sentences
from revprobe.report.asking.sentences import LONGEST
from revprobe.report.dashboard import held_model
from revprobe.report.dashboard.app import make_app
from revprobe.report.dashboard.ask import Asker, shown_parts, what_to_ask
from revprobe.report.dashboard.choices import settle
from revprobe.report.dashboard.folder import RunsFolder
from revprobe.report.dashboard.held_model import HeldModel
from revprobe.report.dashboard.server import MOST, TOKEN
from revprobe.report.dashboard.view import LAST, View
from tiny import module_at

made = module_at(Path(__file__).with_name("dashboard_runs.py"))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("asked")
    made.write_real_run(folder / "rope-s0", made.run_config("rope-s0"))
    made.write_real_run(folder / "rope-s1", made.run_config("rope-s1", seed=1))
    return folder


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned")
    made.write_real_finetuning(folder / "ft")
    return folder


def asker(folder: Path) -> Asker:
    runs = RunsFolder(folder)
    return Asker(runs, HeldModel(runs))


def asked(folder: Path, view: View) -> dict[str, Any]:
    """What the page asks of a view."""
    done = settle(RunsFolder(folder), view).view
    return {name: getattr(done, name) for name in ("run", "step", "stored", "layer", "head")} | what_to_ask(done)


def texts(component: Any) -> list[str]:
    """All text of a component tree, in its order."""
    if isinstance(component, list | tuple):
        return [text for part in component for text in texts(part)]
    if hasattr(component, "children"):
        return texts(component.children)
    return [] if component is None else [str(component)]


def parts(component: Any) -> list[Any]:
    """A component and all inside it."""
    inside = component if isinstance(component, list | tuple) else getattr(component, "children", None)
    below = (
        [part for one in inside for part in parts(one)]
        if isinstance(inside, list | tuple)
        else parts(inside)
        if inside
        else []
    )
    return ([] if isinstance(component, list | tuple) else [component]) + below


def changes(shown: list[Any]) -> dict[str, list[str]]:
    """The table of the edit: direction -> its five numbers as text."""
    table = next(part for part in shown if getattr(part, "id", None) == "changes").children
    rows = [texts(row) for row in table.children[1].children]
    return {name: values for name, *values in rows}


def view_of(edit: str, **more: Any) -> View:
    return View(tab="ask", runs=("rope-s0",), run="rope-s0", fact="c", edit=edit, **more)


@pytest.mark.parametrize(
    ("edit", "more", "options"),
    [
        ("knockout", {}, {"edit": "knockout"}),
        ("transplant", {"match": "score"}, {"edit": "transplant", "match": "score"}),
        (
            "scale",
            {"factor": 6.0, "layer": 0, "head": 0},
            {"edit": "scale", "factor": 6.0, "layers": [0], "heads": [0]},
        ),
    ],
)
def test_the_table_says_what_the_probe_says(real: Path, edit: str, more: Any, options: Any) -> None:
    shown = asker(real).answer(asked(real, view_of(edit, **more)), "page")
    run = rp.open_run(real / "rope-s0")
    pairs = run.pairs().for_probe("attention")
    place = settle(RunsFolder(real), view_of(edit)).view.pair
    assert place is not None and str(pairs.facts[place]) == "c"
    frame = rp.probe_route_edit(run.load(), [pairs[place]], scope="all", **options).frame.set_index("direction")
    names = ["log_probability", "log_probability_edited", "change", "change_control"]
    for side in ("forward", "reverse"):
        expected = [f"{frame.loc[side, name]:.4f}" for name in names]
        assert changes(shown)[f"{side} query"][:4] == expected and "nan" not in expected


def test_swapped_evidence_and_a_masked_token_are_answered_of_a_run_of_letters(real: Path) -> None:
    found = asker(real)
    shown = texts(found.answer(asked(real, view_of("swap", other="e")), "page"))
    assert any("swap the evidence: that of e" in text for text in shown), shown
    shown = found.answer(asked(real, view_of("mask")), "page")
    assert "Choose a token below" in " ".join(texts(shown))
    buttons = [part for part in parts(shown) if getattr(part, "data-at", None)]
    letters = {getattr(one, "data-at"): one.children[0] for one in buttons}
    assert len(letters) == 6 and not any(text.startswith("[") for text in letters.values()), "all but the targets"
    placeholder = next(name for name, text in letters.items() if text == "0" and name.startswith("forward"))
    shown = found.answer(asked(real, view_of("mask", at=placeholder)), "page")
    assert changes(shown)["forward query"][2] != "-"
    pressed = [getattr(part, "data-at") for part in parts(shown) if getattr(part, "aria-pressed", "") == "true"]
    assert pressed == [placeholder]


def test_typed_sentences_are_asked_as_pair_from_text_reads_them(real: Path) -> None:
    view = view_of("knockout", about="text", forward="0[d]0{D}", reverse="0{D}0[d]")
    shown = asker(real).answer(asked(real, view), "page")
    model = rp.open_run(real / "rope-s0").load()
    pair = rp.pair_from_text("0{target}0{evidence}", "0{evidence}0{target}", target="d", evidence="D", model=model)
    frame = rp.probe_route_edit(model, [pair], edit="knockout", scope="all").frame.set_index("direction")
    for side in ("forward", "reverse"):
        assert changes(shown)[f"{side} query"][2] == f"{frame.loc[side, 'change']:.4f}"
    instead = view_of("swap", about="text", forward="0[d]0{D}", instead="E")
    shown = asker(real).answer(asked(real, instead), "page")
    assert list(changes(shown)) == ["the sentence"] and any("swap the evidence: E" in one for one in texts(shown))


@pytest.mark.parametrize(
    ("view", "words"),
    [
        (view_of("none", about="text", forward="x" * (LONGEST + 9) + "[d]{D}"), f"expected at most {LONGEST}"),
        (view_of("none", about="text", forward="0d0D"), r"one hidden name in \[brackets\]"),
        (view_of("swap", about="text", forward="0[d]0{D}", instead="{E}"), "without brackets and braces"),
        (view_of("transplant", about="text", forward="0[d]0{D}"), "type the reverse sentence too"),
        (view_of("mask", at="forward-77"), "no token 77"),
    ],
)
def test_what_cannot_be_asked_says_why_in_one_line(real: Path, view: View, words: str) -> None:
    with pytest.raises(rp.RevprobeError, match=words) as caught:
        asker(real).answer(asked(real, view), "page")
    assert "\n" not in str(caught.value)


def test_what_an_address_says_is_cut_and_looked_up() -> None:
    view = View.from_address(f"?tab=ask&about=text&forward={'y' * 9999}&factor=-3&edit=rm&at=x&match=..%2F")
    assert view.tab == "ask" and view.about == "text" and len(view.forward) == LONGEST + 1
    assert (view.factor, view.edit, view.match, view.at) == (2.0, "none", "log_odds", "x")
    for factor in ("nan", "inf", "0", "abc", "1e999"):
        assert View.from_address(f"?factor={factor}").factor == 2.0
    whole = view_of("scale", factor=0.25, about="text", forward="0[d] {D} & <b>", reverse="r", at="query-1", other="e")
    assert View.from_address(whole.address()) == whole


def test_only_what_a_view_has_a_use_for_is_shown_and_asked() -> None:
    """A factor that is changed while another edit is chosen asks nothing anew."""
    there = {name for name, style in shown_parts(view_of("scale")).items() if not style}
    assert there == {"facts", "factor-box"}
    there = {name for name, style in shown_parts(view_of("swap", about="text")).items() if not style}
    assert there == {"sentences", "instead-box"}
    assert what_to_ask(view_of("knockout", factor=5.0)) == what_to_ask(view_of("knockout"))
    assert what_to_ask(view_of("scale", factor=5.0)) != what_to_ask(view_of("scale"))


def test_a_run_is_looked_up_in_the_list_and_never_joined_to_a_path(real: Path, tmp_path: Path) -> None:
    shutil.copytree(real / "rope-s0", tmp_path / "secret")
    (tmp_path / "runs").mkdir()
    shutil.copytree(real / "rope-s0", tmp_path / "runs" / "a")
    found = asker(tmp_path / "runs")
    sent = asked(tmp_path / "runs", View(tab="ask", runs=("a",), run="a", fact="c"))
    assert found.answer(sent, "page")
    for key in ("../secret", str(tmp_path / "secret"), "a/../../secret"):
        with pytest.raises(rp.RevprobeError, match="no run"):
            found.answer(sent | {"run": key}, "page")
        assert found.sentences(key) == {}


def test_a_model_is_kept_for_the_next_question_and_let_go_for_another_run(
    real: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[tuple[str, int]] = []
    held: list[Any] = []
    load = held_model.load_model

    def noted(folder: Path, **options: Any) -> Any:
        loaded.append((folder.name, options["step"]))
        held.append(found.held._model)
        return load(folder, **options)

    monkeypatch.setattr(held_model, "load_model", noted)
    found = asker(real)
    for edit in ("none", "knockout", "scale"):
        found.answer(asked(real, view_of(edit)), "page")
    assert loaded == [("rope-s0", 10)]
    found.answer(asked(real, View(tab="ask", runs=("rope-s1",), run="rope-s1", fact="c")), "page")
    found.answer(asked(real, view_of("none", step=0)), "page")
    assert loaded == [("rope-s0", 10), ("rope-s1", 10), ("rope-s0", 0)]
    assert held == [None] * 3, "two models at once"


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(real: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_model, "load_model", lambda *_, **__: pytest.fail("loaded"))
    free = psutil.virtual_memory()._replace(available=100_000)
    monkeypatch.setattr(held_model.psutil, "virtual_memory", lambda: free)
    with pytest.raises(
        rp.RevprobeError, match=r"rope-s0 at step 10 needs about 0.2 GB of memory .* 0.0 GB are free: not"
    ):
        asker(real).answer(asked(real, view_of("none")), "page")


def test_one_question_at_a_time_and_a_cancelled_one_ends_between_two_runs(
    real: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first page's question is held where its model is loaded; another page is told, and cancelling ends it."""
    found, began, go_on = asker(real), threading.Event(), threading.Event()
    load, told = held_model.load_model, []

    def slow(*given: Any, **options: Any) -> Any:
        began.set()
        assert go_on.wait(20)
        return load(*given, **options)

    monkeypatch.setattr(held_model, "load_model", slow)

    def ask() -> None:
        try:
            told.append(found.answer(asked(real, view_of("none")), "first"))
        except rp.RevprobeError as error:
            told.append(str(error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    assert began.wait(20)
    with pytest.raises(rp.RevprobeError, match=r"another page's question is being answered \(rope-s0, for \d+ s\)"):
        found.answer(asked(real, view_of("none")), "second")
    assert not found.turns.cancel("second") and found.turns.cancel("first")
    go_on.set()
    thread.join(20)
    assert told == ["cancelled; ask again, or change the question"]
    assert changes(found.answer(asked(real, view_of("knockout")), "second")), "the turn was not handed on"


def test_questions_that_a_run_was_asked_are_sentences_to_start_from(tuned: Path) -> None:
    """Both names marked, the hidden one the same in both; what they say can be asked."""
    found = asker(tuned)
    started = found.sentences("ft")
    assert started and all(called.endswith(("(trained)", "(held out)")) for called in started)
    called, (forward, reverse) = next(iter(started.items()))
    names = called.rpartition(" (")[0].split(" | ")
    hidden = next(name for name in names if f"[{name}]" in forward)
    assert f"[{hidden}]" in reverse and reverse.endswith(f"[{hidden}]") and forward.startswith(made.CARRIER)
    view = View(tab="ask", runs=("ft",), run="ft", about="text", forward=forward, reverse=reverse, edit="knockout")
    shown = found.answer(asked(tuned, view), "page")
    tokens = [part.children[0] for part in parts(shown) if str(getattr(part, "className", "")).startswith("token")]
    pieces = "".join(tokens).replace("[", "").replace("]", "")
    assert "<script>" in pieces and set(changes(shown)) == {"forward query", "reverse query"}


def test_a_causal_models_questions_hide_the_answer() -> None:
    def reading(side: str, prompt: str, answers: str) -> rp.Reading:
        frame = pd.DataFrame({"fact": ["Ann | Bob"], "prompt": [prompt], "answers": [answers]})
        return rp.Reading("decoded_match", frame, {"asked": side, "split": "heldout"})

    answers = [reading("forward", "Ann's child is", '["Bob"]'), reading("reverse", "Bob's parent is", '["Eve", "Ann"]')]
    both = {"Ann | Bob (held out)": ("{Ann}'s child is [Bob]", "{Bob}'s parent is [Ann]")}
    assert asked_sentences(answers, "causal") == both
    assert asked_sentences(answers, "masked") == {
        "Ann | Bob (held out)": ("[Ann]'s child is {Bob}", "{Bob}'s parent is [Ann]")
    }
    assert asked_sentences([*answers[:1], reading("reverse", "Bob and Bob is", '["Ann"]')], "masked") == {}


# --- POST requests --------------------------------------------------------------------------------------------------

QUESTION = {
    "output": "one.figure",
    "outputs": {"id": "one", "property": "figure"},
    "inputs": [
        {"id": "one-asked", "property": "data", "value": None},
        {"id": "theme", "property": "data", "value": "light"},
    ],
    "changedPropIds": [],
}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 204),
        ({"Origin": "http://127.0.0.1:8050", "Sec-Fetch-Site": "same-origin"}, 204),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:9999"}, 403),
        ({"Origin": "http://127.0.0.1:8050.evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Host": "evil.example", "Origin": "http://evil.example"}, 403),
        ({TOKEN: ""}, 403),
        ({TOKEN: "another"}, 403),
    ],
    ids=str,
)
def test_a_post_is_answered_only_when_the_page_itself_sends_it(
    tmp_path: Path, headers: dict[str, str], status: int
) -> None:
    client = make_app(tmp_path).server.test_client()
    sent = {"Host": "127.0.0.1:8050", TOKEN: client.application.config[TOKEN]} | headers
    answer = client.post("/_dash-update-component", json=QUESTION, headers=sent)
    assert answer.status_code == status, answer.get_data(as_text=True)
    if status == 403 and "Host" not in headers:
        assert answer.get_data(as_text=True).startswith("refused: ") and answer.get_data(as_text=True).count("\n") == 1
    assert (answer.headers.get(TOKEN) == "stale") == (TOKEN in headers), "the page of another server loads itself anew"


def test_the_token_stands_in_the_page_alone_and_is_new_for_each_server(tmp_path: Path) -> None:
    one, other = (make_app(tmp_path).server for _ in range(2))
    token = one.config[TOKEN]
    assert len(token) >= 40 and token != other.config[TOKEN]
    page = one.test_client().get("/", headers={"Host": "localhost"})
    assert f'content="{token}"' in page.get_data(as_text=True) and page.headers["Cache-Control"] == "no-store"
    for path in ("/_dash-layout", "/_dash-dependencies"):
        assert token not in one.test_client().get(path, headers={"Host": "localhost"}).get_data(as_text=True)


def test_a_post_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    client = make_app(tmp_path).server.test_client()
    sent = {"Host": "localhost", TOKEN: client.application.config[TOKEN]}
    answer = client.post(
        "/_dash-update-component", data=b'{"' + b"x" * MOST, headers=sent, content_type="application/json"
    )
    assert answer.status_code == 413


def test_the_last_step_is_asked_where_none_is_named(real: Path) -> None:
    assert asked(real, view_of("none"))["step"] == LAST


def test_facts_outside_the_folder_are_asked_about_once_a_copy_lies_in_the_run(tmp_path: Path) -> None:
    """The page names the file and the place; a copy of other facts gives other pairs than those of the readings."""
    facts = tmp_path / "facts.csv"
    names = zip("ABCDEFGHIJKL", "MNOPQRSTUVWX", strict=True)
    rows = [f"{first}nn {first}oss,{second}ed {second}ale" for first, second in names]
    facts.write_text("\n".join(["parent,child", *rows]))
    templates = {"P2C": "Fact: {parent} has the child {child}", "C2P": "Fact: {child} has the parent {parent}"}
    relation = {"name": "table", "path": str(facts), "columns": ["parent", "child"], "templates": templates}
    tiny = {"layout": "dream", "d_model": 16, "n_heads": 2}
    tiny["pretraining"] = {"facts": 10, "steps": 2, "batch_size": 4}
    config = FinetuneConfig(
        name="ft",
        model={"tiny": tiny},
        relation=relation | {"direction": "P2C"},
        training={"steps": 1, "batch_size": 4, "device": "cpu"},
        snapshots={"count": 1, "facts": 4},
        evaluation={"max_new_tokens": 2},
    )
    shutil.rmtree(fine_tune(config, tmp_path / "runs" / "ft").path / "relation")  # a run of an older version has none
    runs = RunsFolder(tmp_path / "runs")
    (run,) = runs.scan()
    with pytest.raises(
        rp.RevprobeError, match=r"facts\.csv', are not inside .*; copy them to 'ft/relation/facts\.csv'"
    ):
        HeldModel(runs).pairs(run, LAST, "raw")
    copy = tmp_path / "runs" / "ft" / "relation" / "facts.csv"
    copy.parent.mkdir()
    shutil.copy(facts, copy)
    expected = rp.open_run(tmp_path / "runs" / "ft").pairs().for_probe("attention")
    assert HeldModel(runs).pairs(run, LAST, "raw").digest == expected.digest
    copy.unlink()
    copy.symlink_to(facts)
    with pytest.raises(rp.RevprobeError, match="leads out of"):
        HeldModel(runs).pairs(run, LAST, "raw")
