"""What "Ask" shows of a question is what the public probes say of it, before an edit and after each kind."""

from dataclasses import replace
from math import exp
from typing import Any

import numpy as np
import pandas as pd
import pytest

import revprobe as rp
import tiny
from revprobe.report.asking.answer import Answer, answer, evidence_of
from revprobe.report.asking.edits import NO_COUNTERPART, OTHER_LENGTH, Edit

PAIR = rp.ReversalPair(rp.Query([7, 20, 1, 30, 9, 2], [0], [3, 4]), rp.Query([1, 30, 9, 2, 20, 7], [5], [1, 2]))
OTHER = rp.ReversalPair(rp.Query([8, 20, 1, 31, 11, 2], [0], [3, 4]), rp.Query([1, 31, 11, 2, 20, 8], [5], [1, 2]))
CAUSAL = rp.ReversalPair(rp.Query([3, 7, 20, 4, 9], [4], [1]), rp.Query([3, 9, 20, 4, 7], [4], [1]), "swapped")


def masked() -> rp.ProbedModel:
    return tiny.radd("rope", n_heads=2, n_layers=2, scale=0.2)


def causal() -> rp.ProbedModel:
    return tiny.llama("eager", scale=0.2)


MODELS: Any = pytest.mark.parametrize(("build", "pair"), [(masked, PAIR), (causal, CAUSAL)], ids=["masked", "causal"])


def numbers(found: Answer) -> pd.DataFrame:
    return found.numbers.set_index("direction")


@MODELS
@pytest.mark.parametrize(
    ("edit", "options"),
    [
        (Edit("knockout"), {"edit": "knockout"}),
        (Edit("knockout", layer=1, head=0), {"edit": "knockout", "layers": [1], "heads": [0]}),
        (Edit("transplant", match="score", layer=0), {"edit": "transplant", "match": "score", "layers": [0]}),
        (Edit("scale", factor=8.0, head=1), {"edit": "scale", "factor": 8.0, "heads": [1]}),
    ],
    ids=["knockout", "knockout of one head", "transplant", "scale"],
)
def test_an_edit_of_the_route_is_the_probes(build: Any, pair: rp.ReversalPair, edit: Edit, options: Any) -> None:
    """Change and control of both directions; another layer, head, factor or seed of the control would differ."""
    model = build()
    found = numbers(answer(model, pair, edit))
    frame = rp.probe_route_edit(model, [pair], scope="all", **options).frame.set_index("direction")
    for side in ("forward", "reverse"):
        for name in ("log_probability", "log_probability_edited", "change", "change_control"):
            assert found.loc[side, name] == pytest.approx(frame.loc[side, name], abs=1e-6, nan_ok=True), (side, name)
        assert found.loc[side, "reason_control"] == frame.loc[side, "reason_control"]
    assert abs(found["change"]).max() > 1e-4, "nothing moved: this could not fail"


@MODELS
def test_what_is_shown_without_an_edit_is_the_probes(build: Any, pair: rp.ReversalPair) -> None:
    """Probability and rank, attention on the evidence, the row of the token strip, the likeliest tokens."""
    model = build()
    found = answer(model, pair, top=4)
    priced = rp.probe_reverse_probability(model, [pair], control=False).frame.set_index("direction")
    scores = rp.probe_attention_correlation(model, [pair]).frame
    likely = rp.top_predictions(model, pair, top=4)
    for one in found.queries:
        assert one.log_probability == pytest.approx(priced.loc[one.direction, "log_probability"], abs=1e-6)
        assert one.rank == priced.loc[one.direction, "rank"]
        mine = likely[likely["direction"] == one.direction]
        assert list(one.top["token"]) == list(mine["token"])
        assert one.top["probability"].to_numpy() == pytest.approx(mine["probability"].to_numpy(), abs=1e-6)
        evidence = [place for place, part in enumerate(one.read.parts) if part == "evidence"]
        for row in scores.itertuples():
            weights = one.read.weights_at(row.layer, row.head)
            assert weights is not None and weights.sum() == pytest.approx(1.0, abs=1e-5)
            assert weights[evidence].sum() == pytest.approx(getattr(row, f"weight_{one.direction}"), abs=1e-6)
        for layer, head in ((None, None), (1, None), (None, 1), (1, 1)):
            strip = rp.token_strip(model, getattr(pair, one.direction), layer=layer, head=head).data[0].z[0]
            assert one.read.weights_at(layer, head) == pytest.approx(np.array(strip), abs=1e-6)


@pytest.mark.parametrize("edit", [Edit("knockout", layer=0), Edit("scale", factor=5.0)])
def test_the_likeliest_tokens_after_an_edit_are_those_of_the_edited_run(edit: Edit) -> None:
    """The target's probability among them is that of the probe, for a target of one token."""
    found = answer(masked(), PAIR, edit)
    for one in found.queries:
        assert one.top_edited is not None
        mine = one.top_edited[one.top_edited["is_target"]]["log_probability"].item()
        assert mine == pytest.approx(numbers(found).loc[one.direction, "log_probability_edited"], abs=1e-5)
    assert answer(masked(), PAIR, Edit("transplant")).queries[0].unshown.startswith("not shown for a transplant")


def test_masking_a_token_is_the_probe_on_the_masked_query() -> None:
    """Its like in the other query is masked too; the control masks each of the others in turn."""
    model = masked()
    found = answer(model, PAIR, Edit("mask", at="forward-1"))
    mask = model.mask_token_id
    for side, places, others in (("forward", 1, (2, 5)), ("reverse", 4, (0, 3))):
        query = getattr(PAIR, side)

        def price(place: int, query: rp.Query = query) -> float:
            hidden = rp.Query(
                [mask if at == place else token for at, token in enumerate(query.token_ids)],
                query.target_positions,
                query.evidence_positions,
            )
            return float(
                rp.probe_reverse_probability(model, [rp.ReversalPair(hidden, hidden)], control=False).frame[
                    "log_probability"
                ][0]
            )

        before = float(
            rp.probe_reverse_probability(model, [PAIR], control=False)
            .frame.set_index("direction")
            .loc[side, "log_probability"]
        )
        row = numbers(found).loc[side]
        assert row["change"] == pytest.approx(price(places) - before, abs=1e-6)
        assert row["change_control"] == pytest.approx(np.mean([price(one) for one in others]) - before, abs=1e-6)
        assert "each of the 2 other tokens" in row["control"]
        one = next(each for each in found.queries if each.direction == side)
        assert one.by_token is not None and one.by_token[places] == pytest.approx(row["change"], abs=1e-6)
        assert np.isnan(one.by_token[query.target_positions[0]])
        assert one.edited is not None and one.edited.tokens != one.read.tokens


def test_a_token_that_the_other_query_has_not_once_is_masked_in_one_alone() -> None:
    twice = replace(PAIR, reverse=rp.Query([20, 30, 9, 2, 20, 7], [5], [1, 2]))
    found = numbers(answer(masked(), twice, Edit("mask", at="forward-1")))
    assert found.loc["reverse", "reason"] == NO_COUNTERPART and np.isnan(found.loc["reverse", "change"])
    assert np.isfinite(found.loc["forward", "change"])


@MODELS
def test_swapped_evidence_is_the_probe_on_the_other_query(build: Any, pair: rp.ReversalPair) -> None:
    """The target asked for stays; the control writes the same tokens elsewhere, and not where target or evidence is."""
    model = build()
    other = (
        OTHER
        if pair is PAIR
        else rp.ReversalPair(rp.Query([3, 8, 20, 4, 11], [4], [1]), rp.Query([3, 11, 20, 4, 8], [4], [1]), "swapped")
    )
    evidence = evidence_of(pair, other)
    found = numbers(answer(model, pair, Edit("swap", evidence=evidence)))
    for side in ("forward", "reverse"):
        query = getattr(pair, side)
        tokens = list(query.token_ids)
        for place, token in zip(query.evidence_positions, evidence[side], strict=True):
            tokens[place] = token
        swapped = rp.Query(tokens, query.target_positions, query.evidence_positions)
        asked = [rp.ReversalPair(one, one) for one in (query, swapped)]
        before, after = rp.probe_reverse_probability(model, asked, control=False).frame.query("direction == 'forward'")[
            "log_probability"
        ]
        assert found.loc[side, "change"] == pytest.approx(after - before, abs=1e-6) and abs(after - before) > 1e-4
        assert np.isfinite(found.loc[side, "change_control"])
        assert found.loc[side, "change_control"] != pytest.approx(found.loc[side, "change"], abs=1e-5)


def test_evidence_of_another_length_moves_what_stands_behind_it() -> None:
    found = answer(masked(), PAIR, Edit("swap", evidence={"forward": (31,), "reverse": (31, 32, 33)}))
    assert set(found.numbers["reason_control"]) == {OTHER_LENGTH} and found.numbers["change"].notna().all()
    reverse = found.queries[1].edited
    assert reverse is not None and len(reverse.tokens) == 7 and reverse.parts[6] == "target"


def test_one_sentence_alone_is_one_query_and_has_no_route_to_be_given() -> None:
    alone = rp.ReversalPair(PAIR.forward, PAIR.forward)
    found = answer(masked(), alone, Edit("knockout"))
    assert [one.direction for one in found.queries] == ["query"] == list(found.numbers["direction"])
    frame = rp.probe_route_edit(masked(), [PAIR], edit="knockout", scope="all").frame.set_index("direction")
    assert found.numbers["change"][0] == pytest.approx(frame.loc["forward", "change"], abs=1e-6)
    with pytest.raises(rp.RevprobeError, match="type the reverse sentence too"):
        answer(masked(), alone, Edit("transplant"))


def test_a_target_at_the_first_place_gets_its_begin_token_everywhere() -> None:
    """With shift 1 both queries of a pair begin with it, or their numbers would be of other sequences."""
    model = causal()
    shifted = rp.ProbedModel(
        tiny.radd("rope", scale=0.2).module, objective="masked", mask_token_id=53, logit_shift=1, begin_token_id=54
    )
    frame = rp.probe_reverse_probability(shifted, [PAIR], control=False).frame.set_index("direction")
    found = answer(shifted, PAIR, Edit("mask", at="forward-2"))
    for one in found.queries:
        assert one.log_probability == pytest.approx(frame.loc[one.direction, "log_probability"], abs=1e-6)
        assert len(one.read.tokens) == 7
        assert numbers(found).loc[one.direction, "log_probability"] == pytest.approx(one.log_probability, abs=1e-6)
        right = one.top[one.top["is_target"]]["probability"].item()
        assert right == pytest.approx(exp(one.log_probability), abs=1e-6)
    assert model.logit_shift == 1


def test_what_cannot_be_edited_says_why() -> None:
    for edit, words in {
        Edit("mask", at="forward-0"): "is the hidden place itself",
        Edit("mask", at="forward-99"): "no token 99: expected 0 to 5",
        Edit("mask", at="query-1"): "no query query here: expected forward or reverse",
        Edit("mask", at="../1"): "expected a direction and a place",
        Edit("knockout", layer=7): "layer 7",
    }.items():
        with pytest.raises(rp.RevprobeError, match=words):
            answer(masked(), PAIR, edit)
    with pytest.raises(rp.RevprobeError, match="is causal and has no mask token"):
        answer(causal(), CAUSAL, Edit("mask"))
    with pytest.raises(rp.RevprobeError, match=r"unknown edit 'knock'"):
        Edit("knock")


def test_an_answer_can_be_ended_between_any_two_runs() -> None:
    """The n-th look raises; nothing is left on the model, which answers as before."""
    model = masked()
    whole = answer(model, PAIR, Edit("mask", at="forward-1"))
    for after in range(6):
        left = [after]

        def check(left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            answer(model, PAIR, Edit("mask", at="forward-1"), check=check)
    again = answer(model, PAIR, Edit("mask", at="forward-1"))
    pd.testing.assert_frame_equal(again.numbers, whole.numbers)


def test_a_probe_that_is_running_is_ended_at_its_next_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    from revprobe.report.asking import answer as module

    def running(*_: object, progress: Any, **__: object) -> None:
        progress(1, 2)
        pytest.fail("it ran on")

    def given_up() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "probe_reverse_probability", running)
    with pytest.raises(KeyboardInterrupt):
        answer(masked(), PAIR, check=given_up)
