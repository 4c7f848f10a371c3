"""The likeliest tokens at the hidden place: against plain logits, and against the probes' own numbers."""

import math

import pytest
import torch

import revprobe as rp
import tiny

PAIR = rp.ReversalPair(rp.Query([7, 8, 20, 1, 30, 31], [0, 1], [4, 5]), rp.Query([1, 30, 31, 7, 8, 20], [3, 4], [1, 2]))
SWAPPED = rp.ReversalPair(rp.Query([5, 7, 20, 9], [3], [1]), rp.Query([5, 9, 20, 7], [3], [1]), "swapped")


def radd(**sizes: object) -> rp.ProbedModel:
    return tiny.radd("rope", n_heads=2, scale=0.2, dtype=torch.float64, **sizes)


def test_the_tokens_are_those_of_the_logits_in_their_order() -> None:
    """Every hidden place by itself, its row read by hand; the right token is always among the rows."""
    model = radd()
    table = rp.top_predictions(model, PAIR, top=3)
    for side in ("forward", "reverse"):
        query = getattr(PAIR, side)
        ids = [model.mask_token_id if i in query.target_positions else t for i, t in enumerate(query.token_ids)]
        logits = model.module(torch.tensor([ids])).logits[0].detach()
        for place, target in zip(query.target_positions, query.target, strict=True):
            found = table[(table["direction"] == side) & (table["position"] == place)]
            expected = logits[place].log_softmax(-1)
            order = expected.argsort(descending=True).tolist()
            assert list(found["token"])[:3] == order[:3] and list(found["rank"])[:3] == [1, 2, 3]
            right = found[found["is_target"]]
            assert list(right["token"]) == [target] and list(right["rank"]) == [1 + order.index(target)]
            for row in found.itertuples():
                assert row.log_probability == pytest.approx(expected[row.token].item(), abs=1e-9)
                assert row.probability == pytest.approx(math.exp(row.log_probability))


@pytest.mark.parametrize("build", [radd, lambda: tiny.llama("eager", scale=0.2, dtype=torch.float64)])
def test_the_targets_probability_is_that_of_the_probe(build: object) -> None:
    """A readout row too early or too late gives another token's; a causal model reads before its target."""
    model = build()  # type: ignore[operator]
    pair = (
        SWAPPED
        if model.objective == "causal"
        else rp.ReversalPair(rp.Query([7, 20, 30], [0], [2]), rp.Query([30, 20, 7], [2], [0]))
    )
    right = rp.top_predictions(model, pair).query("is_target").set_index("direction")
    reading = rp.probe_reverse_probability(model, [pair], control=False).frame.set_index("direction")
    for side in ("forward", "reverse"):
        assert right.loc[side, "log_probability"] == pytest.approx(reading.loc[side, "log_probability"], abs=1e-9)
        assert right.loc[side, "rank"] == reading.loc[side, "rank"]


def test_inside_an_edit_they_are_those_of_the_edited_model() -> None:
    model = radd()
    query = rp.Query([7, 20, 30, 1], [0], [2])
    pair = rp.ReversalPair(query, rp.Query([1, 30, 20, 7], [3], [1]))
    with rp.edit_attention(model, rows=[[0]], columns=[[2]]):
        edited = rp.top_predictions(model, query).query("is_target")["log_probability"].item()
    frame = rp.probe_route_edit(model, [pair], edit="knockout", scope="all", control=False).frame
    assert edited == pytest.approx(frame.set_index("direction").loc["forward", "log_probability_edited"], abs=1e-9)
    plain = rp.top_predictions(model, query).query("is_target")["log_probability"].item()
    assert abs(edited - plain) > 1e-3, "the edit moves the answer, or this could not fail"


def test_what_is_no_question_is_refused() -> None:
    with pytest.raises(rp.RevprobeError, match=r"top=0: expected at least 1"):
        rp.top_predictions(radd(), PAIR, top=0)
