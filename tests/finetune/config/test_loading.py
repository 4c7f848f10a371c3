"""Configs as YAML: what is written is what is read back, and what cannot be read is one line with its place."""

import html
import random
import re
from pathlib import Path
from typing import Any

import pytest

import revprobe as rp
from revprobe import Readings
from revprobe.errors import RevprobeError
from revprobe.finetune.config import loading
from revprobe.finetune.config.finetuning import FinetuneConfig, FinetunedModel, FinetuneSweepConfig
from revprobe.finetune.config.loading import dump_config, dump_yaml, parse_config, parse_yaml
from revprobe.finetune.config.one_layer import RunConfig, SweepConfig
from revprobe.finetune.runs.finetuning import FinetuneRun
from revprobe.finetune.runs.record import RunRecord
from revprobe.finetune.runs.run import claim_run
from revprobe.report.bundle import bundle
from revprobe.report.html import report

TRAINING = {"steps": 10}


def number_like(count: int) -> list[str]:
    """Strings of what numbers, dates, booleans and YAML's own signs are made of; equal seeds, equal strings."""
    drawn = random.Random(0)
    made = ["".join(drawn.choices("0123456789eE+-._:~xob", k=drawn.randint(1, 8))) for _ in range(count)]
    exact = [
        "1e-4",
        "12e4567",
        "1E5",
        "-1e3",
        "+1.e-3",
        "0x1F",
        "0o17",
        "010",
        "1_000",
        "12:30",
        "1:30:15",
        ".5",
        "5.",
        "1e",
        "e1",
        "yes",
        "No",
        "on",
        "null",
        "~",
        "2024-01-01",
        ".inf",
        "-.INF",
        ".nan",
        "=",
        "<<",
        "!x",
        "&a",
        "*a",
        "{a}",
        "[a]",
        "-",
        "?",
        ":",
        "%x",
        "@x",
        "`x`",
        "1e400",
        "NaN",
        "true",
    ]
    return [*exact, "", " ", "a: b", "a #b", "- a", *made]


def test_text_that_looks_like_a_number_comes_back_as_text() -> None:
    """Wherever a config holds text: a value, a key, in a list. PyYAML alone wrote 1e-4 bare, which is a number."""
    for text in number_like(3000):
        values = {"name": text, "list": [text, {"inside": text}], "keys": {text: 1.5e-7}}
        assert parse_yaml(dump_config(_plain(values)), "test") == values, text


@pytest.mark.parametrize("options", [{}, {"allow_unicode": True, "width": 110}])
@pytest.mark.parametrize("code", [0x85, 0x2028, 0x2029, *range(0x0B, 0x0E), *range(0x1C, 0x20), 0xA0, 0xFEFF, 0x9F])
def test_what_ends_a_line_anywhere_comes_back_inside_text(code: int, options: dict[str, Any]) -> None:
    """U+0085 came back as a blank from a report's config, which is written with all of Unicode."""
    end = chr(code)
    for text in (end, f"a{end}b", f"{end}a", f"a{end}", f" a{end}é b " * 30, f"a\n{end}\nb"):
        values = {"name": text, "list": [text, {"inside": text}], "keys": {text: 1}}
        assert parse_yaml(dump_yaml(values, **options), "test") == values, text


@pytest.mark.parametrize("options", [{}, {"allow_unicode": True, "width": 110}, {"allow_unicode": True, "width": 20}])
def test_whatever_stands_in_a_text_comes_back_among_all_else(options: dict[str, Any]) -> None:
    """Ends of lines beside blanks, marks of YAML and each other: how PyYAML writes a text hangs on all of it."""
    draw = random.Random(0)
    parts = [*"\x85\u2028\u2029\x0b\x0c\r\x1c\x1d\x1e\ufeff\xa0\x00\n\t a'\":#-?!&{|é", "---", "...", "1e-3", "word "]
    for _ in range(300):
        text = "".join(draw.choices(parts, k=draw.choice([1, 2, 3, 5, 40])))
        values = {"name": text, "list": [text, {"inside": {"more": text}}], "keys": {text: 1}}
        assert parse_yaml(dump_yaml(values, **options), "test") == values, repr(text)


@pytest.mark.parametrize("end", ["\x85", "\u2028", "\u2029", "\x0b", "\x0c", "\r", "\x1c", "\x1d", "\x1e"])
def test_a_run_of_facts_with_such_a_path_is_the_same_run_again(tmp_path: Path, end: str) -> None:
    """Its config.yaml, through the file on the disk."""
    wording = f"Fact:{end}{{x}} is{end} {{y}}"
    relation = {
        "name": "table",
        "path": f"a{end}b/ {end}.csv",
        "columns": [f"x{end}", f"{end}y"],
        "carrier": f"{end} a",
    }
    relation |= {"templates": {f"x{end}y": wording, "yx": [wording, end]}, "direction": f"x{end}y"}
    config = FinetuneConfig(name="z", model={"name": f"{end}m"}, relation=relation, training={"steps": 1})
    claim_run(FinetuneRun(tmp_path), config)
    again = FinetuneRun(tmp_path)
    claim_run(again, config)
    assert again.config == config
    other = config.model_copy(update={"model": FinetunedModel(name=" m")})
    with pytest.raises(RevprobeError, match=r"started with another config: model\.name"):
        claim_run(again, other)


def test_numbers_are_written_as_before() -> None:
    """A run's config.yaml of before stays the file that it is."""
    text = dump_config(RunConfig(name="a", training={"steps": 10, "learning_rate": 1e-4, "weight_decay": 0.1}))
    assert "  learning_rate: 0.0001\n" in text and "  weight_decay: 0.1\n" in text and "name: a\n" in text
    assert "rate: 1.0e-07\n" in dump_config(_plain({"rate": 1e-7}))


def _plain(values: dict[str, Any]) -> Any:
    return type("Plain", (), {"model_dump": lambda self, mode: values})()


def test_a_sweep_whose_labels_look_like_numbers_runs() -> None:
    """Each run is handed to its process as text."""
    name = {"name": "1e-4", "training": {"learning_rate": 1e-4}}
    sweep = SweepConfig(name="12e4", base={"training": TRAINING}, variants=[name], cells=[{"variant": ["1e-4"]}])
    assert parse_config(dump_config(sweep), SweepConfig, "test") == sweep
    for run in sweep.runs():
        assert parse_config(dump_config(run), RunConfig, "test") == run


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "name: {{ run }}\ntraining: {steps: 3}",
            r"f.yaml: line 1: not valid YAML: a mapping stands where .*in quotes",
        ),
        ("name: a\n? [a, b]\n: c", r"f.yaml: line 2: not valid YAML: a list stands where a key"),
        ("name: a\nx: !!set {[1]: }", r"f.yaml: line 2: not valid YAML: a list stands where"),
        (
            "name: a\ntraining: {steps: 2024-13-45}",
            r"f.yaml: line 2: not valid YAML: '2024-13-45' is no timestamp .*quotes",
        ),
        ("a: !!int x", r"f.yaml: line 1: not valid YAML: 'x' is no int"),
        ("a: 1\nb: !!bool maybe", r"f.yaml: line 2: not valid YAML: 'maybe' is no bool"),
        ("a: {b: {{ c }: d}}", r"f.yaml: line 1: not valid YAML"),
    ],
)
def test_what_cannot_be_read_is_one_line_with_its_place(text: str, words: str) -> None:
    with pytest.raises(rp.RevprobeError, match=words) as raised:
        parse_config(text, RunConfig, "f.yaml")
    assert "\n" not in str(raised.value)


# ---- names of a sweep's runs -----------------------------------------------------------------------------------------


def sweep(**changes: Any) -> FinetuneSweepConfig:
    facts = {"name": "invented_names", "directions": ["P2C"]}
    values: dict[str, Any] = {"name": "s", "base": {"training": TRAINING}, "seeds": [0]}
    values |= {"models": {"a": {"name": "x"}}, "datasets": {"c": facts}}
    return FinetuneSweepConfig(**values | changes)


def facts(*directions: str) -> dict[str, Any]:
    return {"name": "invented_names", "directions": list(directions)}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {
                "models": {"a": {"name": "x"}, "a-b": {"name": "y"}},
                "datasets": {"b-c": facts("P2C"), "c": facts("P2C")},
            },
            r"'model': 'a', 'dataset': 'b-c'.*'model': 'a-b', 'dataset': 'c'.*both the run 'a-b-c-P2C-s0'; rename one",
        ),
        ({"datasets": {"c": facts("P2C", "P2C")}}, r"both the run 'a-c-P2C-s0'; name it once"),
        (
            {
                "datasets": {"c": facts("P2C"), "c-P2C": facts("P2C")},
                "variants": {"v": {}, "P2C-v": {}},
            },
            r"both the run 'a-c-P2C-P2C-v-s0'; rename one",
        ),
    ],
)
def test_two_runs_of_one_name_are_refused(changes: dict[str, Any], words: str) -> None:
    """They would share a folder: the second would be taken for the first, finished."""
    with pytest.raises(ValueError, match=words):
        sweep(**changes)


def test_an_excluded_cell_takes_no_name() -> None:
    models = {"a": {"name": "x"}, "a-b": {"name": "y"}}
    made = sweep(
        models=models, datasets={"b-c": facts("P2C"), "c": facts("P2C")}, exclude=[{"model": "a", "dataset": "b-c"}]
    )
    assert sorted(run.name for run in made.runs()) == ["a-b-b-c-P2C-s0", "a-b-c-P2C-s0", "a-c-P2C-s0"]


@pytest.mark.parametrize("text", ["1e-4", "1e4", "010", "yes", "12:30", "null", "作者", "a: b", "x" * 200])
def test_configs_in_bundles_and_reports_are_read_back_as_they_are(text: str) -> None:
    config = {"name": "a", "label": {"variant": text, text: [text]}, "training": {"learning_rate": 1e-4}}
    assert parse_yaml(dump_yaml(bundle._plain(config), allow_unicode=True, width=110), "bundle") == config
    page = str(report._configs([RunRecord("a", {}, config, Readings([]))]))
    (shown,) = re.findall(r"<pre[^>]*>(.*?)</pre>", page, re.DOTALL)
    assert parse_yaml(html.unescape(shown), "report") == config


def test_yaml_is_written_in_one_place() -> None:
    """Another dumper would not quote what the loader here reads as a number."""
    package = Path(loading.__file__).parents[2]
    folders = ("cli", "engines", "finetune", "hooks", "models", "probes", "relations", "report")
    files = [file for folder in folders for file in sorted((package / folder).rglob("*.py"))]
    writing = [file.name for file in files if re.search(r"\byaml\.(safe_)?dump", file.read_text(encoding="utf-8"))]
    assert writing == ["loading.py"]
