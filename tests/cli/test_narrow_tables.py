"""Tables at 80 columns: golden texts, and no word of any command's output broken."""

import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

import revprobe as rp
from revprobe.cli.reproduce import theory_cells
from revprobe.finetune.config.finetuning import parse_finetune
from revprobe.finetune.config.loading import parse_config
from revprobe.finetune.config.one_layer import RunConfig
from revprobe.probes.readings.reading import Reading
from revprobe.probes.readings.readings import Readings
from revprobe.probes.theory.tables import theory_tables
from revprobe.relations.evaluation import match_table
from revprobe.report.summary.fitted import Narrow
from revprobe.report.summary.terminal import OF_EVALUATION, print_final, print_readings, text_table
from tiny import FIXTURES

Cli = Callable[..., tuple[int, str, str]]
RUN = (
    "name: NAME\nrelation: {length: 4}\nmodel: {d_model: 16}\n"
    "training: {steps: 4, batch_size: 16, warmup_steps: 2, device: cpu}\nsnapshots: {every: 4}\n"
)
TINY = "{layout: llada, d_model: 16, n_layers: 1, n_heads: 2, vocabulary: 400, pretraining: {steps: 2, facts: 10}}"
FINETUNING = (
    f"name: tuned\nmodel: {{tiny: {TINY}}}\nrelation: {{name: invented_names, direction: P2C}}\n"
    "training: {steps: 2, batch_size: 4, device: cpu}\nsnapshots: {every: 2, facts: 8}\nevaluation: {facts: 4}\n"
)


def lines_of(print_to: Callable[[Console], None], width: int = 80) -> list[str]:
    """What is printed on a terminal of so many columns, without the spaces behind."""
    with Path("/dev/null").open("w") as nowhere:
        console = Console(markup=False, highlight=False, width=width, record=True, file=nowhere)
        print_to(console)
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_readings_stand_value_above_and_interval_below() -> None:
    rows = pd.DataFrame({"pair": range(20), "fact": [str(n) for n in range(20)], "kind": "same_target"})
    numbers = {"probability": [0.2, 0.4] * 10, "log_probability": 0.0, "rank": 1, "argmax_match": [0, 1] * 10}
    frame = rows.assign(direction="reverse", reason="", **numbers)
    about = {"seed": 0, "control": False, "kind": "same_target", "weights": "ema"}
    readings = Readings([Reading("reverse_probability", frame, about)])
    lines = lines_of(lambda console: print_readings(readings, "m, letters:5", console))
    assert lines[:4] == [
        "m, letters:5",
        "                  value         control  value - control",
        "measure           [95 %]        [95 %]   [95 %]           n",
        "─" * 66,
    ]
    assert lines[7:13] == [
        "reverse           0.30          -        -                20 pairs",
        "probability       [0.25, 0.35]                            20 facts",
        "ema, same target",
        "forward           undefined     -        -                0 pairs",
        "accuracy                                                  0 facts",
        "ema, same target",
    ]
    assert "forward accuracy: 1 no forward query in this part" in lines


def test_an_evaluation_stands_value_above_and_interval_below() -> None:
    sides = [
        about | {"direction": direction, "match": match, "begins": match, "match_control": 0.0, "begins_control": 0.0}
        for direction, match in (("P2C", 1.0), ("C2P", 0.0))
        for about in [{"fact": "", "reason": ""}]
    ]
    readings = []
    for asked, split, side in (("forward", "train", sides[0]), ("reverse", "heldout", sides[1])):
        frame = pd.DataFrame([side | {"fact": str(n)} for n in range(20)])
        about = {"asked": asked, "split": split, "templates": "all", "seed": 0, "errors": {"other name": 20}}
        readings.append(Reading("decoded_match", frame, about))
    table = match_table(Readings(readings))
    lines = lines_of(lambda console: console.print(text_table(table, "t", OF_EVALUATION)))
    assert lines == EVALUATION, lines


EVALUATION = [
    "t",
    "               exact match",
    "               (%)            begins with it   excess",
    "asked          [95 %]         (%)              [95 %]         n",
    "─" * 80,
    "forward (P2C)  100.0          100.0            100.0          20 questions, 20",
    "trained        [83.2, 100.0]  [83.2, 100.0]    [76.2, 100.0]  facts",
    "all wordings   ctrl 0.0",
    "               [0.0, 16.8]",
    "reverse (C2P)  0.0            0.0              0.0            20 questions, 20",
    "held out       [0.0, 16.8]    [0.0, 16.8]      [-16.8, 16.8]  facts",
    "(floor)        ctrl 0.0",
    "all wordings   [0.0, 16.8]",
    "forward (P2C), trained: wrong answers: 20 other name",
    "reverse (C2P), held out (floor): wrong answers: 20 other name",
    "",
]


def test_the_end_of_a_run_says_pairs_and_facts_at_80_columns() -> None:
    summary = rp.open_sweep(FIXTURES / "v0_1" / "tiny-sweep").summary()
    lines = lines_of(lambda console: print_final(summary[summary["run"] == "arm-l4-s0"], console))
    assert lines == END, lines


END = [
    "last checkpoint: value, 95 % interval, control, n (pairs / facts)",
    "",
    "               forward         reverse         attention        gradient",
    " run           accuracy (%)    accuracy (%)    correlation      cosine",
    " ──────────────────────────────────────────────────────────────────────────────",
    " arm-l4-s0     0.0             0.0             0.25             0.07",
    " raw, step 20  [0.0, 36.9]     [0.0, 36.9]     [-0.33, 0.69]    [0.02, 0.11]",
    " swapped       ctrl 0.0        ctrl 0.0        ctrl 0.00        ctrl -0.07",
    "               n 24 / 8        n 24 / 8        n 72 / 8         n 24 / 8",
    "",
    "probabilities: see the report, or widen the terminal",
    "forward probability, gradient cosine, reverse probability: few facts (8): 95 %",
    "intervals of a mean were seen to cover 90 % only from 13 facts on",
]


def test_models_says_families_relations_and_configs_apart(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TTY_COMPATIBLE": "1", "NO_COLOR": "1", "COLUMNS": "80", "TERM": "dumb"}.items():
        monkeypatch.setenv(name, value)
    code, out, _ = cli("models")
    lines = [line.rstrip() for line in out.splitlines()]
    titles = [
        "families of published models",
        "their code and weights",
        "other models",
        "relations (`relation.name` of a fine-tuning, `evaluate --relation`)",
        "example configs, by name instead of a file",
    ]
    assert code == 0 and [line for line in lines if line in titles] == titles
    start = lines.index(titles[3])
    assert lines[start + 1 : start + 8] == RELATIONS


RELATIONS = [
    "name                about",
    "─" * 80,
    "letters             The letters relation at one sequence length",
    "parent_child        Parent-Child (Berglund et al., 2024)",
    "person_description  Person-Description (Berglund et al., 2024)",
    "pore                A dataset of PORE (Lu et al., 2024) in the directions",
    '                    "positive" ("Aramco\'s CEO is ...") and "negative"',
]
ROWS = pd.DataFrame(
    {
        "asked": ["forward (P2C)", "reverse (C2P)"],
        "facts": ["trained", "held out (floor)"],
        "match [95 %]": ["96.0 [90.1, 98.4]", "3.0 [0.6, 8.5] (control 1.0)"],
        "about the answers that were wrong": ["-", "97 other names, most of them of the same family"],
    }
)


def test_a_table_gives_up_as_little_as_it_must() -> None:
    """Wide as it is; narrower with intervals below values and notes below the table; then a block for each row."""
    narrow = Narrow({"facts": ("asked", "{}")}, notes=("about the answers that were wrong",), named=("asked",))
    shown = {
        width: lines_of(lambda console: console.print(text_table(ROWS, "t", narrow)), width) for width in (150, 40, 30)
    }
    assert "96.0 [90.1, 98.4]" in shown[150][4]
    assert shown[40] == [
        "t",
        "                  match",
        "asked             [95 %]",
        "─" * len("asked             (control 1.0)"),
        "forward (P2C)     96.0",
        "trained           [90.1, 98.4]",
        "reverse (C2P)     3.0",
        "held out (floor)  [0.6, 8.5]",
        "                  (control 1.0)",
        "reverse (C2P): about the answers that",
        "were wrong: 97 other names, most of them",
        "of the same family",
        "",
    ]
    assert shown[30] == [
        "t",
        "",
        "forward (P2C)",
        "  facts   trained",
        "  match   96.0",
        "  [95 %]  [90.1, 98.4]",
        "",
        "reverse (C2P)",
        "  facts         held out",
        "                (floor)",
        "  match [95 %]  3.0",
        "                [0.6, 8.5]",
        "                (control 1.0)",
        "  about the     97 other",
        "  answers that  names, most of",
        "  were wrong    them of the",
        "                same family",
        "",
    ]


def test_the_theory_has_no_columns_of_zeros_and_no_minus_nought() -> None:
    shown = theory_cells(theory_tables(samples=50))
    assert shown.columns.tolist() == ["table", "row", "column", "paper", "ours", "difference", "verdict"]
    assert not shown["difference"].eq("-0.0000").any()
    assert shown.iloc[0].tolist()[2:5] == ["d=64", "0.337", "0.3365"]
    lines = [line for line in lines_of(lambda console: console.print(text_table(shown, "Tables 3, 4 and 5"))) if line]
    assert len(lines) == len(shown) + 3 and max(map(len, lines)) <= 80, "one line a cell"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("made")
    runs = {
        name: rp.train(parse_config(RUN.replace("NAME", name), RunConfig, "t"), home / name).path for name in ("a", "b")
    }
    return runs | {"tuned": rp.fine_tune(parse_finetune(FINETUNING, "t"), home / "tuned").path}


COMMANDS = {
    "probe": "probe {a} --pairs letters:4",
    "controls": "probe {a} --pairs letters:4 --probes attention --controls untrained,neighbour",
    "evaluate": "evaluate {tuned}",
    "compare-models": "compare-models first={a} second={b} --pairs letters:4 --probes attention,probability",
    "block-sweep": "block-sweep {tuned} --pairs letters:4 --probes probability --sizes 2,whole",
    "diagnose": "diagnose {a}",
    "models": "models",
    "theory": "reproduce theory",
    "report": "report {a}",
}
# What narrow tables say beside the words of the wide ones.
LABELS = {
    "ctrl",
    "n",
    "of",
    "wordings",
    "probabilities",
    "pairs",
    "facts",
    "see",
    "the",
    "report,",
    "or",
    "widen",
    "terminal",
    "-",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_word_is_broken_at_80_columns(
    command: str, cli: Cli, made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken word leaves two that the same table, with room for it, does not have."""
    asked = COMMANDS[command].format(**made).split()
    if command == "block-sweep":
        asked = ["block-sweep", str(Path(rp.__file__).parent / "tests/fixtures/sdar-tiny"), *asked[2:]]
    shown = {}
    for columns in (80, 500):
        for name, value in {"TTY_COMPATIBLE": "1", "NO_COLOR": "1", "COLUMNS": str(columns), "TERM": "dumb"}.items():
            monkeypatch.setenv(name, value)
        code, out, err = cli(*asked)
        assert code == 0, err
        shown[columns] = out
    lines = [line for line in shown[80].splitlines() if str(made["a"].parent) not in line]
    assert max(map(len, lines)) <= 80
    # Numbers may have other digits, and controls their intervals: of those no bracket is left open on a line.
    assert not [line for line in lines if line.count("[") != line.count("]")]
    pieces, whole = (
        {word.strip(",;:()[]") for word in re.split(r"[\s─━]+", text)} for text in ("\n".join(lines), shown[500])
    )
    pieces = {word for word in pieces if re.match("[A-Za-z]", word)}
    assert pieces - whole - LABELS == set()
