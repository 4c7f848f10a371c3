"""Numbers of other statistics are worked out again, no NaN goes without a reason, and few facts are said to be few."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from revprobe.finetune.runs.record import SERIES
from revprobe.probes.readings import reading as module
from revprobe.probes.readings.reading import Reading
from revprobe.probes.readings.readings import Readings
from revprobe.report.summary.terminal import print_final


def attention(groups: list[int], seed: int = 0) -> Reading:
    pairs = np.arange(len(groups))
    scores = np.random.default_rng(seed).normal(size=(2, len(groups)))
    columns = {"pair": pairs, "fact": pairs.astype(str), "group": groups, "kind": "same_target", "layer": 0, "head": 0}
    columns |= {"score_forward": scores[0], "score_reverse": scores[1], "weight_forward": 0.1, "weight_reverse": 0.1}
    return Reading("attention_correlation", pd.DataFrame(columns | {"reason": ""}), {"seed": 0})


def answers(right: list[float], facts: list[str]) -> Reading:
    columns = {"pair": range(len(right)), "fact": facts, "kind": "same_target", "direction": "reverse"}
    columns |= {"probability": right, "log_probability": 0.0, "rank": 1, "argmax_match": right, "reason": ""}
    return Reading("reverse_probability", pd.DataFrame(columns), {"seed": 0, "control": False})


@pytest.mark.parametrize(
    ("groups", "reasons"),
    [
        ([0], {"alone in its group, so without a correlation": 1}),
        ([0, 1, 2, 3, 4], {"alone in its group, so without a correlation": 5}),
        ([0, 0], {"two pairs, whose correlation is 1 or -1 whatever they are": 2}),
    ],
)
def test_a_correlation_that_is_undefined_says_why_and_of_how_many(groups: list[int], reasons: dict[str, int]) -> None:
    reading = attention(groups)
    assert np.isnan(reading.value) and reasons.items() <= reading.undefined.items()
    row = reading.summary().iloc[0]
    assert row["undefined"] >= len(groups) and next(iter(reasons)) in row["reason"]


def test_a_lonely_pair_has_no_control_and_says_so() -> None:
    alone = attention([0, 1, 2])
    assert alone.control is None and alone.undefined["no other fact in the group for the control"] == 3


def test_one_fact_has_a_mean_without_an_interval_and_a_share_that_could_be_almost_anything() -> None:
    reading = answers([1.0, 0.5], ["a", "a"])
    assert np.isnan(reading.interval[0]) and reading.undefined == {"of one fact, so without an interval": 2}
    accuracy = answers([1.0, 1.0], ["a", "a"]).measures().set_index("measure").loc["reverse_accuracy"]
    assert (accuracy["low"], accuracy["high"]) == (pytest.approx(0.025), 1) and accuracy["n"] == 2


def test_few_facts_carry_a_caution_everywhere(tmp_path: Path) -> None:
    few, many = answers([0.2, 0.4, 0.3], list("abc")), answers([0.2, 0.4] * 10, [str(i) for i in range(20)])
    assert "few facts (3)" in few.caution and "caution=" in repr(few)
    assert few.summary()["caution"].iloc[0] == few.caution
    again = Reading.load(few.save(tmp_path / "few.parquet"))
    assert not again.recomputed and again.caution == few.caution, "it is stored with the numbers"
    stored = json.loads(pq.read_schema(tmp_path / "few.parquet").metadata[b"revprobe"])
    assert stored["measured"]["caution"] == few.caution and stored["statistics_version"] == module.STATISTICS_VERSION
    table = Readings([again]).measures().set_index("measure")["caution"]
    assert "few facts (3): 95 % intervals of a mean" in table["reverse_probability"]
    assert table["reverse_accuracy"] == "", "a proportion of three facts covers"
    console = Console(record=True, width=120)
    about = {"run": "r", "step": 1, "weights": "raw", "kind": "same_target"}
    print_final(again.measures().assign(**dict.fromkeys(SERIES, "") | about), console)
    assert "reverse probability: few facts (3)" in " ".join(console.export_text().split())
    assert many.caution == "" and "caution" not in repr(many) and many.facts == 20


def test_a_reading_of_other_statistics_is_worked_out_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's version may stay what it is: what was stored under other statistics is not trusted."""
    whole = answers([1.0] * 20, [str(i) for i in range(20)])
    monkeypatch.setattr(module, "STATISTICS_VERSION", 1)
    wrong = Reading(whole.name, whole.frame, whole.meta)
    wrong.__dict__["measured"] = answers([0.5, 0.4], ["a", "b"]).measured
    path = wrong.save(tmp_path / "old.parquet")
    assert Reading.load(path).value == wrong.value, "of the same statistics, numbers are those that were saved"
    monkeypatch.undo()
    again = Reading.load(path)
    assert again.recomputed and again.value == whole.value and "recomputed from statistics 1" in repr(again)
    assert not Reading.load(again.save(tmp_path / "new.parquet")).recomputed
