"""How many reverse queries and facts are behind the numbers of objective terms."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import revprobe as rp
from revprobe.probes.statistics.by_class import OF_THE_MEAN, SIZES
from revprobe.probes.statistics.coverage import ONE_FACT
from revprobe.probes.statistics.estimators import NO_PARTNER
from revprobe.probes.storage import control_partners
from tiny import drawn

LETTERS = 3


@pytest.fixture(scope="module")
def model() -> rp.ProbedModel:
    """Two layers in float64, over three letters."""
    tokens = {"vocab_size": 10, "mask_token_id": 7, "bos_token_id": 8, "pad_token_id": 9}
    config = rp.RaddConfig(**tokens, d_model=16, n_layers=2, max_length=8)
    module = drawn(lambda: rp.RaddForMaskedLM(config), scale=0.3, dtype=torch.float64)
    about = {"objective": "masked", "mask_token_id": 7, "logit_shift": 0}
    return rp.ProbedModel(module, rp.letter_tokenizer(LETTERS), **about)


@pytest.fixture(scope="module")
def uneven(model: rp.ProbedModel) -> rp.ReversalPairs:
    """Three facts of other numbers of pairs, some of which no other fact has at their place: no control is theirs."""
    pairs = list(rp.letter_pairs(4, model=model, alphabet=LETTERS))
    facts = sorted({pair.fact for pair in pairs})
    own = {fact: [pair for pair in pairs if pair.fact == fact] for fact in facts}
    return rp.ReversalPairs.from_pairs([*own[facts[0]][:5], *own[facts[1]][:2], *own[facts[2]][3:4]])


def by_hand(pairs: rp.ReversalPairs) -> dict[str, dict[str, int]]:
    """Queries of each fact, and those that have another fact's, one pair after the other."""
    partner = control_partners(pairs, 0, seed=0)
    found: dict[str, dict[str, int]] = {}
    for pair, fact in enumerate(pairs.facts):
        one = found.setdefault(str(fact), {"queries": 0, "queries_control": 0})
        one["queries"] += 1
        one["queries_control"] += int(partner[pair]) >= 0
    return found


@pytest.mark.parametrize("mode", ["gradients", "slopes"])
def test_numbers_count_the_queries_and_facts_that_were_asked(
    model: rp.ProbedModel, uneven: rp.ReversalPairs, mode: str
) -> None:
    """Each fact's number is a mean over its queries, and the slopes' one gradient is that of all facts."""
    reading, each = rp.objective_terms(model, uneven, mode=mode), by_hand(uneven)
    queries, with_control = (sum(one[name] for one in each.values()) for name in ("queries", "queries_control"))
    controlled = sum(one["queries_control"] > 0 for one in each.values())
    assert 0 < with_control < queries == len(uneven), "the pairs tell the two apart"
    assert reading.control is not None and reading.excess is not None
    assert (reading.n, reading.facts) == (queries, len(each)) == (8, 3)
    assert (reading.control.n, reading.control.facts) == (with_control, controlled)
    assert "n = 8 reverse queries of 3 facts" in repr(reading)
    assert reading.undefined[NO_PARTNER] == queries - with_control
    rows = reading.frame.drop_duplicates("fact")
    assert rows["queries"].sum() == queries and rows["queries_control"].sum() == with_control
    if mode == "gradients":
        assert dict(zip(rows["fact"], rows["queries"], strict=True)) == {f: one["queries"] for f, one in each.items()}
        table = reading.summary(by="fact").set_index("fact")
        assert table["n"].to_dict() == {fact: one["queries"] for fact, one in each.items()}
        assert (table["facts"] == 1).all()


def test_one_gradient_has_a_reason_of_its_own_and_no_caution_about_intervals(model: rp.ProbedModel) -> None:
    """Of three facts it was said that they were one, and few."""
    reading = rp.objective_terms(model, rp.letters(4, LETTERS), mode="slopes")
    assert reading.undefined == {OF_THE_MEAN: 18} and reading.caution == "" and np.isnan(reading.interval).all()
    table = rp.objective_classes(reading)
    assert (table["n"] == 3).all() and table["reason"].str.contains(OF_THE_MEAN).all()
    assert not table["reason"].str.contains(ONE_FACT).any()
    pairs = rp.letter_pairs(4, model=model, alphabet=LETTERS)
    single = rp.ReversalPairs.from_pairs([pair for pair in pairs if pair.fact == pairs[0].fact])
    alone = rp.objective_terms(model, single, mode="slopes", control=False)
    assert alone.undefined == {ONE_FACT: 6}, "a single fact is one fact"
    assert not {*SIZES[2:]} & {*alone.frame.columns}, "without controls there is nothing to count"


@pytest.mark.parametrize("mode", ["gradients", "slopes"])
def test_readings_that_do_not_say_how_many_queries_still_load(model: rp.ProbedModel, mode: str, tmp_path: Path) -> None:
    """Files of older versions: a fact counts as one query, and the mean of three facts as three."""
    reading = rp.objective_terms(model, rp.letters(4, LETTERS), mode=mode)
    old = rp.Reading(reading.name, reading.frame.drop(columns=[*SIZES]), reading.meta, reading.cross)
    again = rp.Reading.load(old.save(tmp_path / "old.parquet"))
    names = ["value", "low", "high", "control", "excess"]
    pd.testing.assert_frame_equal(again.summary()[names], reading.summary()[names])
    assert (again.n, again.facts) == (3, 3) and again.summary(by="priced")["facts"].max() == 3
    columns = [name for name in rp.objective_classes(reading) if name != "statistics_version"]
    pd.testing.assert_frame_equal(rp.objective_classes(again)[columns], rp.objective_classes(reading)[columns])
