"""Rankings of heads against edits by hand, a planted head, a planted null, and noise that only looks like a ranking."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import revprobe as rp
import tiny
from revprobe.errors import RevprobeError
from revprobe.probes.deep import rank_heads as ranking
from revprobe.probes.deep.rank_heads import NO_OTHER_HEAD, NO_RANKING
from revprobe.probes.statistics.estimators import LATER_BLOCK
from tiny import FIXTURES, in_blocks, pairs_at, radd

MODELS: dict[str, Callable[[], rp.ProbedModel]] = {
    "RADD": lambda: radd(n_layers=2, n_heads=2, scale=0.3),
    "LLaDA": lambda: rp.load_model(FIXTURES / "llada-tiny"),
    "Dream": lambda: rp.load_model(FIXTURES / "dream-tiny"),
    "GPT-2": partial(tiny.gpt2, scale=0.3),
    "Llama": partial(tiny.llama, scale=0.3),
    "SDAR": lambda: in_blocks(8, scale=0.3),
}


def lost_by_hand(model: rp.ProbedModel, query: rp.Query, layer: int, head: int) -> float:
    """What log P of a one-token target loses when one head no longer sees the evidence, each run alone."""
    (at,), ids = query.target_positions, list(query.token_ids)
    shown = [model.mask_token_id if p == at and model.objective == "masked" else t for p, t in enumerate(ids)]
    row, token, given = at - model.logit_shift, ids[at], torch.tensor([shown])
    with torch.no_grad():
        before = model.logits(given)[0, row].double().log_softmax(-1)[token]
        with rp.edit_attention(model, [[row]], [list(query.evidence_positions)], layers=[layer], heads=[head]):
            after = model.logits(given)[0, row].double().log_softmax(-1)[token]
    return float(before - after)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("name", ["LLaDA", "GPT-2"])
def test_ranks_and_held_out_effects_are_those_of_edits_by_hand(name: str, direction: str) -> None:
    model, pairs = MODELS[name](), pairs_at((1, 4), (2, 5), count=8, ragged=True)
    top, width = (2, 4) if name == "LLaDA" else (1, 2)
    reading = rp.rank_heads(model, pairs, direction=direction, top=top, others=1, batch_size=5)
    heads = [(layer, head) for layer in range(2) for head in range(width)]
    query = [getattr(pair, direction) for pair in pairs]
    lost = {one: np.array([lost_by_hand(model, each, *one) for each in query]) for one in heads}
    training = np.isin(pairs.facts, reading.meta["training_facts"])
    assert training.sum() == 4
    wanted = sorted(heads, key=lambda one: -lost[one][training].mean())
    assert [(one["layer"], one["head"]) for one in reading.meta["ranking"]] == wanted
    for one in reading.meta["ranking"]:
        assert one["value"] == pytest.approx(lost[one["layer"], one["head"]][training].mean(), abs=1e-5)
    assert set(reading.frame["pair"]) == set(np.flatnonzero(~training)) and len(reading.frame) == 4 * top
    for row in reading.frame.to_dict("records"):
        assert (row["layer"], row["head"]) == wanted[row["rank"] - 1]
        assert row["effect"] == pytest.approx(lost[row["layer"], row["head"]][row["pair"]], abs=2e-5)
        (other,) = reading.meta["others"][str(row["layer"])]
        assert (row["layer"], other) not in wanted[:top]
        assert row["effect_control"] == pytest.approx(lost[row["layer"], other][row["pair"]], abs=2e-5)
    assert reading.value == pytest.approx(np.mean([lost[one][~training].mean() for one in wanted[:top]]), abs=1e-5)


@pytest.mark.parametrize("by", ["effect", "excess"])
def test_the_wired_head_comes_first_and_exceeds_the_other_head_of_its_layer(by: str) -> None:
    model, pairs = tiny.wired(facts=12)
    reading = rp.rank_heads(model, pairs, by=by, top=1)
    assert {(row.layer, row.head, row.rank) for row in reading.frame.itertuples()} == {(1, 0, 1)}
    assert reading.value > 1.0 and reading.control is not None and reading.control.value == pytest.approx(0.0, abs=1e-5)
    assert reading.excess is not None and reading.excess.low > 0 and reading.n == 6
    assert [abs(one["value"]) < 1e-5 for one in reading.meta["ranking"][1:]] == [True] * 3


def test_a_transplant_ranks_the_wired_head_too() -> None:
    """The head looks everywhere alike, so that its route is stronger in the shorter query: the reverse one's."""
    model, pairs = tiny.wired(facts=12)
    reading = rp.rank_heads(model, pairs, edit="transplant", direction="forward", top=1)
    assert {(row.layer, row.head) for row in reading.frame.itertuples()} == {(1, 0)}
    assert reading.excess is not None and reading.excess.low > 0
    assert rp.rank_heads(model, pairs, edit="transplant", top=1).value < 1e-5, "the other way round nothing is gained"


def test_a_planted_null_has_no_head() -> None:
    model, pairs = tiny.wired(carries=False, facts=12)
    reading = rp.rank_heads(model, pairs, top=1)
    assert np.allclose(reading.frame[["effect", "effect_control"]], 0.0, atol=1e-6) and reading.n == 6


def test_noise_is_ranked_and_does_not_come_back_on_held_out_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 heads of pure noise: the best five shine on the facts they were chosen by, and nowhere else."""
    draw = np.random.default_rng(0)
    pairs = pairs_at((1, 4), (2, 5), count=40)

    def noise(model: Any, some: rp.ReversalPairs, *, layers: Any, heads: Any, **_: Any) -> Any:
        rows = [
            {"pair": pair, "fact": some.facts[pair], "kind": some.kind, "direction": "reverse", "scope": "head"}
            | {"layer": layer, "head": head, "reason": "", "change": draw.normal()}
            for layer in layers or range(4)
            for head in heads or range(16)
            for pair in range(len(some))
        ]
        return rp.Reading("route_edit", pd.DataFrame(rows), {})

    monkeypatch.setattr(ranking, "probe_route_edit", noise)
    found = [rp.rank_heads(MODELS["GPT-2"](), pairs, seed=seed) for seed in range(20)]
    chosen_by = [np.mean([one["value"] for one in reading.meta["ranking"][:5]]) for reading in found]
    assert min(chosen_by) > 0.25
    assert abs(np.mean([reading.value for reading in found])) < 0.05
    assert sum(bool(r.excess and r.excess.low <= 0 <= r.excess.high) for r in found) >= 17


def test_no_fact_is_in_both_halves_and_the_seed_draws_them() -> None:
    pairs = rp.letter_pairs(4, model=radd(), alphabet=5)
    model = MODELS["RADD"]()
    drawn = set()
    for seed in range(4):
        reading = rp.rank_heads(model, pairs, top=1, seed=seed)
        training, held_out = set(reading.meta["training_facts"]), set(reading.frame["fact"])
        assert not training & held_out and len(training) == 3 and training | held_out == set(pairs.facts)
        drawn.add(tuple(sorted(training)))
    assert len(drawn) > 1


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_is_ranked_and_left_as_it_was(name: str) -> None:
    model, pairs = MODELS[name](), pairs_at((1, 4), (2, 5), count=6, ragged=True)
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    state = torch.random.get_rng_state()
    seen: list[tuple[int, int]] = []
    reading = rp.rank_heads(model, pairs, progress=lambda *at: seen.append(at))
    assert reading.n == 3 and np.isfinite(reading.frame["effect"]).all()
    assert seen == sorted(seen) and seen[-1] == (reading.meta["forwards"],) * 2
    assert torch.equal(state, torch.random.get_rng_state()) and not model.module.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())
    assert all(torch.equal(value, model.module.state_dict()[key]) for key, value in before.items())


def test_a_knockout_runs_one_direction_alone() -> None:
    """3 training queries as they are, all at once, by layer and by head; then 3 held-out ones for each layer."""
    model, pairs = MODELS["LLaDA"](), pairs_at((1, 4), (2, 5), count=6)
    reading = rp.rank_heads(model, pairs, top=1, others=2)
    assert reading.meta["forwards"] == 3 * (1 + 1 + 2 + 8) + 3 * (1 + 1 + 3)


def test_swapped_pairs_and_targets_of_several_tokens_are_ranked() -> None:
    pairs = tiny.text_like_pairs()
    for mode in ("chain", "parallel"):
        assert rp.rank_heads(MODELS["LLaDA"](), pairs, mode=mode, top=2).n == 3
    swapped = rp.letter_pairs(5, model=MODELS["GPT-2"](), alphabet=4)
    assert swapped.kind == "swapped" and rp.rank_heads(MODELS["GPT-2"](), swapped, edit="transplant").n > 0


def test_what_is_undefined_says_why() -> None:
    model, pairs = MODELS["LLaDA"](), pairs_at((1, 4), (2, 5), count=6)
    alone = rp.rank_heads(model, pairs, layers=[1], heads=[2])
    assert set(alone.frame["reason_control"]) == {NO_OTHER_HEAD} and alone.control is None and alone.n == 3
    assert alone.undefined[NO_OTHER_HEAD] == 3
    without = rp.rank_heads(model, pairs, top=1, control=False)
    assert without.control is None and "effect_control" not in without.frame and not without.undefined
    later = rp.rank_heads(in_blocks(4, scale=0.3), pairs_at((1, 6), (6, 1), count=6))
    assert np.isnan(later.value) and set(later.frame["reason"]) == {NO_RANKING} and later.undefined == {NO_RANKING: 3}
    assert "No defined effect" in later.plot().layout.annotations[0].text
    part = rp.ReversalPairs.from_pairs([*pairs, *_renamed(pairs_at((1, 6), (6, 1), count=6))])
    some = rp.rank_heads(in_blocks(4, scale=0.3), part, seed=1)
    assert LATER_BLOCK in some.undefined and some.n > 0


def _renamed(pairs: rp.ReversalPairs) -> list[rp.ReversalPair]:
    return [rp.ReversalPair(pair.forward, pair.reverse, fact=f"later {pair.fact}") for pair in pairs]


def test_a_ranking_survives_saving_and_is_drawn(tmp_path: Any) -> None:
    model, pairs = tiny.wired(facts=12)
    reading = rp.rank_heads(model, pairs, top=2)
    again = rp.Reading.load(reading.save(tmp_path / "ranking.parquet"))
    pd.testing.assert_frame_equal(again.frame, reading.frame)
    assert again.meta == reading.meta and again.value == reading.value
    table = again.summary(by=["rank", "layer", "head"])
    assert list(table["rank"]) == [1, 2] and table["value"][0] > table["value"][1]
    figure = again.plot(theme="dark")
    heat, ring, control, value, chosen = figure.data
    assert np.array(heat.z).shape == (2, 2) and list(ring.x) == [str(h) for h in table["head"]]
    assert list(value.x)[::-1] == pytest.approx(list(table["value"]))
    assert list(control.x)[::-1] == pytest.approx(list(table["control"]), nan_ok=True)
    assert list(chosen.x)[::-1] == pytest.approx([one["value"] for one in reading.meta["ranking"][:2]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "size"}, "unknown by 'size'"),
        ({"edit": "scale"}, "unknown edit 'scale'"),
        ({"direction": "backward"}, "unknown direction 'backward'"),
        ({"top": 0}, "top=0: expected at least 1 head"),
        ({"others": -1}, "others=-1: expected at least 1 head"),
        ({"layers": [9]}, "no layer 9 to edit"),
        ({"mode": "both"}, "unknown mode 'both'"),
    ],
)
def test_a_wrong_option_says_what_was_expected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RevprobeError, match=message):
        rp.rank_heads(MODELS["LLaDA"](), pairs_at((1, 4), (2, 5), count=4), **options)


def test_a_query_that_two_facts_ask_is_in_one_half() -> None:
    """The same rows of a table under two names would be ranked by and shown on."""
    model, pairs = tiny.wired()
    twice = [*pairs, *(rp.ReversalPair(pair.forward, pair.reverse, fact=f"{pair.fact} again") for pair in pairs)]
    for seed in range(3):
        ranking = rp.rank_heads(model, rp.ReversalPairs.from_pairs(twice), top=1, control=False, seed=seed)
        training = {fact.split()[0] for fact in ranking.meta["training_facts"]}
        assert not training & {fact.split()[0] for fact in ranking.frame["fact"]} and len(training) == 5


def test_one_fact_cannot_be_split() -> None:
    with pytest.raises(RevprobeError, match="at least two, one to rank by"):
        rp.rank_heads(MODELS["LLaDA"](), pairs_at((1, 4), (2, 5), count=1))


def test_more_heads_than_there_are_cannot_be_shown() -> None:
    model, pairs = radd(n_layers=2, n_heads=2), pairs_at((1, 5), (5, 1), count=4)
    with pytest.raises(RevprobeError, match="top=100: 2 heads are ranked; expected at most so many"):
        rp.rank_heads(model, pairs, top=100, layers=[1])
    assert rp.rank_heads(model, pairs, layers=[1]).meta["top"] == 2, "as many as there are, where none was asked for"
