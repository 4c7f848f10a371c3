"""What readings look like: golden texts of their reprs and of tables that fit a terminal."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import revprobe as rp
from revprobe.probes.readings.reading import Reading, compact_table
from revprobe.probes.readings.readings import Readings
from revprobe.probes.statistics.by_role import NETWORK
from revprobe.probes.statistics.coverage import counted
from tiny import FIXTURES, gpt2, pairs_at, radd

META = {"model": "m", "step": 2000, "weights": "raw", "kind": "swapped", "seed": 0}


def ranking(control: bool = True) -> Reading:
    """Twelve facts, of two heads; the control of the last fact is not to be had."""
    facts = np.tile(np.arange(12), 2)
    effect = np.linspace(0.5, 1.5, 24).round(2)
    columns = {"pair": facts, "fact": facts.astype(str), "layer": np.repeat([0, 3], 12), "head": 1, "effect": effect}
    frame = pd.DataFrame(columns | {"reason": ""})
    if control:
        null = np.where(facts == 11, np.nan, 0.1 * (facts % 3))
        frame = frame.assign(effect_control=null, reason_control=np.where(facts == 11, "no other", ""))
    return Reading("head_ranking", frame, META)


def test_a_reading_says_value_unit_sample_and_control() -> None:
    assert repr(ranking(control=False)) == (
        "Reading(head_ranking=1 [0.8993, 1.101] nats, n = 12 pairs of 12 facts, control=None, caution='few facts (12): "
        "95 % intervals of a mean were seen to cover 90 % only from 13 facts on', kind=swapped, step=2000, weights=raw)"
    )
    assert repr(ranking()) == (
        "Reading(head_ranking=1 [0.8993, 1.101] nats, n = 12 pairs of 12 facts, control=0.09091 [0.03507, 0.1468] "
        "(n = 11 pairs of 11 facts), excess=0.8873 [0.777, 0.9975] (n = 11 pairs of 11 facts), "
        "undefined={'no other': 1}, caution='few facts (12): 95 % intervals of a mean were seen to cover 90 % only "
        "from 13 facts on', kind=swapped, step=2000, weights=raw)"
    )


def test_in_a_notebook_it_is_a_table_with_the_same_words_and_nothing_of_the_data_is_markup() -> None:
    reading = ranking()
    page = Reading(reading.name, reading.frame, META | {"model": "<b>"})._repr_html_()
    for told in (
        "head_ranking",
        "1 [0.8993, 1.101] nats",
        "n = 12 pairs of 12 facts",
        "&lt;b&gt;, step 2,000, raw, swapped",
    ):
        assert told in page
    assert "<b>" not in page and "1 no other" in page and "24 rows" in page


def test_a_control_says_pairs_and_facts() -> None:
    assert repr(ranking().control) == (
        "Control(0.09091 [0.03507, 0.1468], n = 11 pairs of 11 facts, random heads of the same layers, same facts)"
    )
    old = rp.Control(0.5, (0.4, 0.6), 11, "m")  # as version 0.1 wrote it
    assert repr(old) == "Control(0.5 [0.4, 0.6], n = 11 pairs, m)"


def test_pairs_say_facts_and_what_was_flagged() -> None:
    pairs = pairs_at((1, 5), (5, 1), count=4)
    assert repr(pairs) == "ReversalPairs(4 pairs of 4 facts, 8 queries, kind='same_target')"
    flagged = rp.ReversalPairs(
        pairs.queries,
        pairs.forward,
        pairs.reverse,
        np.array(["<a>", "<a>", "b", "c"]),
        pairs.kind,
        {"shared_tokens": np.array([True, False, True, False])},
    )
    assert repr(flagged) == ("ReversalPairs(4 pairs of 3 facts, 8 queries, kind='same_target', 2 shared tokens)")
    page = flagged._repr_html_()
    assert page.startswith("<p>ReversalPairs(4 pairs of 3 facts, 8 queries") and "&lt;a&gt;" in page
    assert "<a>" not in page and page.count("<tr>") == 5, "a head and four pairs"


def test_several_readings_in_a_notebook_are_one_line_a_number() -> None:
    half = rp.open_run(FIXTURES / "v0_1" / "lora").readings()
    page = half._repr_html_()
    assert page.startswith("<p>12 readings, weights raw, kind same_target</p><table")
    heads = re.findall("<th>(.*?)</th>", page)
    assert heads == ["step", "measure", "value", "control", "n/facts", "undef."]
    assert page.count("<tr>") == len(half.measures()) and "<td>0.52 [0.24, 0.72]</td>" in page
    assert "<td>27/9</td>" in page and "nan" not in page.lower()


def test_a_compact_summary_fits_80_columns() -> None:
    text = ranking().summary(["layer", "head"], compact=True).to_string()
    assert text.splitlines()[0].split() == ["layer", "head", "value", "control", "n/facts", "undef."]
    assert max(map(len, text.splitlines())) <= 80
    assert "0.74 [0.64, 0.84]" in text


def test_the_shuffled_facts_say_what_their_number_is_to_be_read_with() -> None:
    reason = ranking().controls["reason"].iloc[0]
    assert (
        reason.startswith("difference: over 11 of 12 pairs (11 facts)") and "few facts (12): 95 % intervals" in reason
    )


def test_several_readings_have_one_frame_and_one_summary_whatever_their_probes(tmp_path: Path) -> None:
    twice = pd.DataFrame({"pair": [0, 1], "fact": ["a", "b"], "kind": "swapped", "direction": "reverse"})
    numbers = {"probability": [0.5, 0.7], "log_probability": 0.0, "rank": 1, "argmax_match": [1, 0], "reason": ""}
    both = Readings([ranking(), Reading("reverse_probability", twice.assign(**numbers), META)])
    frame = both.frame
    assert frame.columns[:4].tolist() == ["reading", "model", "step", "weights"]
    assert frame["reading"].value_counts().to_dict() == {"head_ranking": 24, "reverse_probability": 2}
    assert frame.loc[frame["reading"] == "reverse_probability", "effect"].isna().all()
    table = both.summary(compact=True)
    assert table["reading"].tolist() == ["head_ranking", "reverse_probability"]
    assert max(map(len, table.to_string().splitlines())) <= 80
    assert both.summary()["value"].tolist() == [both[0].value, both[1].value]
    again = Readings.load(both.save(tmp_path / "readings"))
    assert {one.name: one.value for one in again} == {one.name: one.value for one in both}
    assert Readings([]).frame.empty and Readings([]).summary().empty


@pytest.mark.parametrize(
    ("n", "facts", "text"), [(1, 1, "n = 1 pair of 1 fact"), (2106, 26, "n = 2,106 pairs of 26 facts")]
)
def test_a_sample_is_told_as_pairs_and_facts(n: int, facts: int, text: str) -> None:
    assert counted(n, facts) == text


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ((0.5312, 0.5309, 0.5314), "0.5312 [0.5309, 0.5314]"),  # was 0.53 [0.53, 0.53]
        ((99.7, 99.6, 100.4), "99.70 [99.60, 100.40]"),  # 100.4 was 100, below which 99.7 stood as 1e+02
        ((3e-5, 2.9e-5, 3.1e-5), "3.0e-5 [2.9e-5, 3.1e-5]"),
        ((0.9966, 0.99, 1.0), "0.997 [0.990, 1.000]"),
        ((-1.0, -1.0, -0.9999), "-1.0000 [-1.0000, -0.9999]"),
        ((float("nan"), 0.1, 0.2), "undefined"),
    ],
)
def test_no_compact_interval_reads_as_one_of_no_width(numbers: tuple[float, float, float], text: str) -> None:
    row = dict(zip(("value", "low", "high"), numbers, strict=True)) | {"n": 9, "facts": 9, "undefined": 0}
    row |= dict(zip(("control", "control_low", "control_high"), numbers, strict=True))
    shown = compact_table([row], []).iloc[0]
    assert shown["value"] == shown["control"] == text


def test_roles_stand_in_network_order_and_two_digits_never_make_a_bound() -> None:
    reading = rp.probe_gradient_cosine(radd(), pairs_at((1, 5), (5, 1), count=4))
    roles = reading.summary(by="role")["role"].tolist()
    assert roles == [role for role in NETWORK if role in roles] and roles[:2] == ["embed", "q"]
    rows = reading.summary(by=["role", "layer"])
    assert rows["role"].map(NETWORK.index).is_monotonic_increasing
    exact, short = reading.summary(by="role"), reading.summary(by="role", compact=True)
    for value, text in zip(exact["value"], short["value"], strict=True):
        shown = float(text.split()[0])
        assert shown == pytest.approx(value, rel=0.06) and (shown == 1) == (value == 1)


def test_runs_sweeps_and_models_say_what_a_person_asks_first() -> None:
    half, whole = rp.open_run(FIXTURES / "v0_1" / "half"), rp.open_run(FIXTURES / "v0_1" / "lora")
    assert repr(half) == (
        "OneLayerRun(half; not finished: stopped at step 10 of 20; run the same command again to go on; step 10 of 20; "
        "masked; 18 of 18 readings)"
    )
    assert repr(whole) == "FinetuneRun(lora; finished; step 4 of 4; masked; 12 of 12 readings)"
    assert whole._repr_html_().startswith("<table><tr><th>lora</th></tr><tr><td>finished</td></tr>")
    sweep = rp.open_sweep(FIXTURES / "v0_1" / "tiny-sweep")
    assert repr(sweep) == "Sweep(tiny-sweep; 2 of 2 runs finished)" and "<th>tiny-sweep</th>" in sweep._repr_html_()
    assert ", 1 layer x 1 head, " in repr(radd()), "one is no plural"
    assert repr(gpt2()) == (
        "ProbedModel(GPT2LMHeadModel, causal, logit_shift=1, 2 layers x 2 heads, 8,512 parameters, tokenizer "
        "TokenizersBackend)"
    )
    bare = rp.ProbedModel(radd().module, objective="masked", mask_token_id=53, name="<i>")
    assert "no tokenizer" in repr(bare) and "&lt;i&gt;" in bare._repr_html_() and "<i>" not in bare._repr_html_()


def test_a_damaged_run_is_said_and_does_not_raise_in_a_notebook(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: [")
    run = type(rp.open_run(FIXTURES / "v0_1" / "half"))(tmp_path)
    assert "cannot be read: " in repr(run) and "cannot be read: " in run._repr_html_()


def test_contributions_name_their_tokens() -> None:
    model, query = radd(), rp.Query([3, 0, 40, 5], [1], [2])
    table = rp.token_contributions(model, query)
    shown = {row.token: row.text for row in table.itertuples()}
    assert shown == {t: str(model.tokenizer.decode([t])) for t in (3, model.mask_token_id, 40, 5)}
    assert set(table["target_text"]) == {model.tokenizer.decode([0])}
