"""`revprobe probe --in-parts`: rows in parquet part by part, the numbers of one call, and taken up where it ended."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import revprobe as rp
from revprobe.probes import in_parts
from tiny import gpt2

Cli = Callable[..., tuple[int, str, str]]
NUMBERS = ["value", "low", "high", "n", "facts"]


@pytest.fixture
def held(tmp_path: Path) -> rp.ReversalPairs:
    """A model's folder and a file of pairs in tmp_path, where the command is run."""
    model = gpt2()
    model.module.save_pretrained(tmp_path / "model")
    pairs = rp.letter_pairs(5, model=model, alphabet=8).for_probe("gradient")
    pairs.save(tmp_path / "pairs.jsonl")
    return pairs


ASKED = ["probe", "./model", "--pairs", "pairs.jsonl", "--out", "rows"]


def test_the_numbers_are_those_of_one_process_and_the_rows_are_parts(
    cli: Cli, held: rp.ReversalPairs, tmp_path: Path
) -> None:
    code, out, err = cli(*ASKED, "--in-parts", 5)
    assert (code, err) == (0, ""), err
    whole = rp.probe(rp.load_model(tmp_path / "model"), held)
    expected = pd.concat([reading.measures() for reading in whole], ignore_index=True)
    table = pd.read_csv(tmp_path / "rows" / "measures.csv")
    assert table["measure"].tolist() == expected["measure"].tolist()
    np.testing.assert_allclose(table[NUMBERS].astype(float), expected[NUMBERS].astype(float), rtol=1e-5, atol=1e-6)
    for reading in whole:
        rows = pd.read_parquet(tmp_path / "rows" / reading.name)
        assert len(rows) == len(reading.frame) and rows["pair"].nunique() == len(held)
        assert len(list((tmp_path / "rows" / reading.name).iterdir())) == -(-len(held) // 5)
    assert out.count(f"model: pair {len(held)}/{len(held)}\n") == 1
    for row in expected.to_dict("records"):
        assert f"{row['value']:.2f}" in out and row["measure"].split("_")[-1] in out
    assert held.kind.replace("_", " ") in out and "rows of 3 probes, and measures.csv: rows" in out


def test_what_was_ended_goes_on_by_the_same_command(
    cli: Cli, held: rp.ReversalPairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And ends with the same bytes; a folder of another question is refused."""
    asked = [*ASKED[:-1], "ended", "--in-parts", "4", "--probes", "attention,probability"]
    calls: list[int] = []
    probe = in_parts.probe

    def ends_in_the_second(model: Any, part: Any, **options: Any) -> Any:
        calls.append(len(part))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return probe(model, part, **options)

    monkeypatch.setattr(in_parts, "probe", ends_in_the_second)
    code, out, _ = cli(*asked)
    assert code == 130 and "everything up to the last part is kept, run the same command again to go on" in out
    assert len(list((tmp_path / "ended/attention_correlation").iterdir())) == 1
    calls[:] = [0, 0]
    assert cli(*asked)[0] == 0
    parts = -(-len(held) // 4)
    assert len(calls) == 2 + parts - 1, "a part that was there was probed again"
    assert cli(*[*asked, "--out", "whole"])[0] == 0
    for file in sorted((tmp_path / "whole").rglob("*.*")):
        other = tmp_path / "ended" / file.relative_to(tmp_path / "whole")
        assert other.read_bytes() == file.read_bytes(), file
    code, out, err = cli(*asked, "--in-parts", 3)
    assert code == 1 and "holds parts of another question (size 4, not 3)" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--pairs", "pairs.jsonl", "--in-parts", 1, "--out", "rows"], "--in-parts 1: expected two pairs"),
        (["--pairs", "pairs.jsonl", "--in-parts", 9], "--in-parts 9 needs a folder for the rows"),
        (["--pairs", "letters:5", "--in-parts", 9, "--out", "rows"], "letters are few; expected a file of pairs"),
        (
            ["--pairs", "pairs.jsonl", "--in-parts", 9, "--out", "rows", "--controls", "sink"],
            "--controls sink --in-parts 9: parts have shuffled facts alone",
        ),
    ],
)
def test_what_parts_cannot_do_is_said_before_the_model_is_loaded(
    cli: Cli, arguments: list[object], words: str, tmp_path: Path
) -> None:
    code, out, err = cli("probe", "./nowhere", *arguments)
    assert (code, out) == (1, "") and words in err and err.count("\n") == 1
    assert not (tmp_path / "rows").exists()
