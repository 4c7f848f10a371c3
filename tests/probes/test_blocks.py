"""Models that are read in blocks: each query alone on the bare module, its mask written out by hand, is the measure."""

import math
from unittest import mock

import numpy as np
import pytest
import torch
from blocks_alone import chain_alone, gradient_alone, hidden, loss_alone, random_pairs, run_alone, seen_by_hand

import revprobe as rp
from revprobe.probes.decoding.decode import decode_tokens
from revprobe.probes.decoding.masked import Prompt, block_starts, unmasking
from revprobe.probes.passes.asked import out_of_sight
from revprobe.probes.passes.slopes import loss_slopes
from revprobe.probes.statistics.estimators import LATER_BLOCK, LATER_BLOCK_CONTROL
from tiny import MASK, in_blocks, llama

SHIFTS = pytest.mark.parametrize("shift", [0, 1])
BEGIN = 54


@SHIFTS
@pytest.mark.parametrize(("size", "width"), [(3, 1), (4, 2), (1, 1), (2, 3)])
def test_each_query_alone_gives_the_numbers_and_says_which_are_none(shift, size, width):
    model, pairs = in_blocks(size, shift=shift), random_pairs(width=width)
    readings = {reading.name: reading for reading in rp.probe(model, pairs, batch_size=5)}
    seen = {q: seen_by_hand(q, size, shift) for q in pairs.queries}
    both = np.array([seen[p.forward] and seen[p.reverse] for p in pairs])
    assert not both.all() and any(seen.values()), "some of each"
    frame = readings["attention_correlation"].frame
    for row in frame.itertuples():
        for side in ("forward", "reverse"):
            query = getattr(pairs[row.pair], side)
            score, weight = getattr(row, f"score_{side}"), getattr(row, f"weight_{side}")
            if not seen[query]:
                assert math.isnan(score) and math.isnan(weight) and row.reason == LATER_BLOCK
                continue
            rows = torch.tensor(query.target_positions) - shift
            alone = run_alone(model, hidden(query), size)[1][row.layer][row.head][rows]
            there = alone[:, list(query.evidence_positions)].mean()
            assert score == pytest.approx(float(there), abs=2e-5)
            visible = alone.masked_fill(torch.arange(alone.shape[1]) // size > (rows // size)[:, None], -math.inf)
            there = visible.softmax(-1)[:, list(query.evidence_positions)].sum(1).mean()
            assert weight == pytest.approx(float(there), abs=2e-6)
    frame = readings["reverse_probability"].frame
    for row in frame.itertuples():
        query = getattr(pairs[row.pair], row.direction)
        expected = chain_alone(model, query, size) if seen[query] else math.nan
        assert row.log_probability == pytest.approx(expected, abs=1e-5, nan_ok=True)
        assert row.reason == ("" if seen[query] else LATER_BLOCK)
        assert math.isnan(row.rank) == math.isnan(row.argmax_match) == (not seen[query])
    cosines = []
    for pair, visible in zip(pairs, both, strict=True):
        if visible:
            left, right = (gradient_alone(model, q, size) for q in (pair.forward, pair.reverse))
            cosines.append(float(left @ right / left.norm() / right.norm()))
    reading = readings["gradient_cosine"]
    assert reading.n == both.sum()
    if cosines:
        assert reading.value == pytest.approx(np.mean(cosines), abs=1e-5)
    reverse_unseen = sum(not seen[p.reverse] for p in pairs)
    counts = {"attention_correlation": (~both).sum(), "gradient_cosine": (~both).sum()}
    for name, reading in readings.items():
        assert reading.undefined[LATER_BLOCK] == counts.get(name, reverse_unseen), name
        assert reading.meta["block_size"] == size
    assert readings["reverse_probability"].n == len(pairs) - reverse_unseen


@SHIFTS
def test_parallel_is_one_run_with_the_whole_target_hidden_each_row_by_its_own_block(shift):
    model, pairs = in_blocks(2, shift=shift), random_pairs(width=3, seed=4)
    reading = rp.probe_reverse_probability(model, pairs, mode="parallel")
    for row in reading.frame.itertuples():
        query = getattr(pairs[row.pair], row.direction)
        expected = -3 * float(loss_alone(model, query, 2).detach()) if seen_by_hand(query, 2, shift) else math.nan
        assert row.log_probability == pytest.approx(expected, abs=1e-5, nan_ok=True)


def test_a_begin_token_moves_the_blocks_with_the_queries():
    """A target at position 0 of a shift-1 model puts a begin token before every query; blocks count from it."""
    model, size = in_blocks(4, shift=1), 4
    pairs = random_pairs(first=0, seed=2)
    assert any(q.target_positions[0] == 0 for q in pairs.queries)
    moved = {
        q: rp.Query([BEGIN, *q.token_ids], [p + 1 for p in q.target_positions], [p + 1 for p in q.evidence_positions])
        for q in pairs.queries
    }
    for row in rp.probe_reverse_probability(model, pairs).frame.itertuples():
        query = moved[getattr(pairs[row.pair], row.direction)]
        expected = chain_alone(model, query, size) if seen_by_hand(query, size, 1) else math.nan
        assert row.log_probability == pytest.approx(expected, abs=1e-5, nan_ok=True)


def test_of_a_target_over_two_blocks_the_first_row_decides():
    """Evidence in the block of the target's second token is not seen by the row of its first."""
    query = rp.Query(list(range(10, 20)), [3, 4], [5])
    at = lambda size, shift: out_of_sight(in_blocks(size, shift=shift), [query])[0]  # noqa: E731
    assert at(4, 0) and not at(6, 0) and at(3, 1) and not at(7, 1)
    behind = rp.Query(list(range(10, 20)), [4], [5])
    assert not out_of_sight(in_blocks(4), [behind])[0], "the same block"
    assert out_of_sight(in_blocks(4, shift=1), [behind])[0], "the readout row lies in the block before"


def test_a_control_whose_query_is_out_of_sight_is_counted():
    model, pairs = in_blocks(4), random_pairs(20, seed=1)
    # One group, so that every pair has a partner, seen or not.
    with mock.patch.object(rp.ReversalPairs, "groups", lambda self, shift: np.zeros(len(self), dtype=int)):
        readings = [rp.probe_gradient_cosine(model, pairs), rp.probe_reverse_probability(model, pairs)]
    for reading in readings:
        frame = reading.frame if reading.name == "gradient_cosine" else reading.frame.query("direction == 'reverse'")
        lost = frame[frame.reason_control != ""].drop_duplicates("pair")
        assert set(lost.reason_control) == {LATER_BLOCK_CONTROL} and (lost.reason == "").all()
        assert reading.undefined[LATER_BLOCK_CONTROL] == len(lost) > 0
        assert reading.control.n == reading.n - len(lost)
        assert "no other fact in the group for the control" not in reading.undefined


def test_readings_of_blocks_are_drawn_summed_up_and_saved(tmp_path):
    model, pairs = in_blocks(4), random_pairs(20, seed=1)
    for reading in rp.probe(model, pairs):
        back = rp.Reading.load(reading.save(tmp_path / f"{reading.name}.parquet"))
        assert back.undefined == reading.undefined and repr(back) == repr(reading)
        assert LATER_BLOCK in reading._repr_html_() or LATER_BLOCK in repr(reading)
        assert len(reading.plot().data)
        key = {"attention_correlation": "layer", "gradient_cosine": "role", "reverse_probability": "direction"}
        table = reading.summary(by=key[reading.name])
        assert (table["undefined"] > 0).all() and table["reason"].str.contains(LATER_BLOCK).all()
    by_head = rp.probe_attention_correlation(model, pairs).summary(by=["layer", "head"])
    assert (by_head["n"] + by_head["undefined"] >= len(pairs)).all()


@SHIFTS
@pytest.mark.parametrize("edit", ["knockout", "transplant", "scale"])
def test_a_route_of_another_block_cannot_be_edited(shift, edit):
    model, pairs = in_blocks(4, shift=shift), random_pairs(seed=3)
    reading = rp.probe_route_edit(model, pairs, edit=edit, scope="all")
    for row in reading.frame.itertuples():
        pair = pairs[row.pair]
        own = seen_by_hand(getattr(pair, row.direction), 4, shift)
        both = all(seen_by_hand(q, 4, shift) for q in (pair.forward, pair.reverse))
        fine = both if edit == "transplant" else own
        assert (row.reason == LATER_BLOCK) == (not fine) and math.isnan(row.change) >= (not fine)
        assert math.isnan(row.log_probability) == (not own)
    assert reading.undefined[LATER_BLOCK] + reading.n <= len(pairs)


@SHIFTS
def test_storage_and_contributions_know_the_blocks(shift):
    model, pairs = in_blocks(4, shift=shift), random_pairs(seed=3)
    reading = rp.probe_stored_evidence(model, pairs)
    seen = [all(seen_by_hand(q, 4, shift) for q in (p.forward, p.reverse)) for p in pairs]
    assert reading.n == sum(seen) and reading.undefined[LATER_BLOCK] == len(pairs) - sum(seen)
    query = pairs.queries[0]
    table = rp.token_contributions(model, query)
    row = query.target_positions[0] - shift
    assert set(table.position) == {p for p in range(len(query.token_ids)) if p // 4 <= row // 4}


@SHIFTS
def test_the_slope_of_a_query_is_its_gradient_along_the_step(shift):
    model, pairs = in_blocks(4, shift=shift), random_pairs(4, seed=5)
    generator = torch.Generator().manual_seed(0)
    parameters = dict(model.module.named_parameters())
    along = {name: torch.randn(p.shape, generator=generator) for name, p in parameters.items()}
    found = loss_slopes(model, pairs.queries, [along], batch_size=3)
    flat = torch.cat([step.flatten() for step in along.values()]).double()
    expected = [float(gradient_alone(model, query, 4) @ flat) for query in pairs.queries]
    np.testing.assert_allclose(found.slope[0], expected, rtol=1e-4, atol=1e-5)


def test_a_causal_model_keeps_its_refusal():
    with pytest.raises(rp.RevprobeError, match="have a target before its evidence"):
        rp.probe_reverse_probability(llama(), random_pairs())


@SHIFTS
def test_an_answer_is_written_block_by_block_counted_from_the_prompt(shift):
    """By hand: the model is given the prompt and masks, and reveals the surest token of the first unfinished block."""
    model, prompt, length = in_blocks(4, shift=shift), [3, 7, 30, 2, 9, 11], 7
    tokens = [*prompt, *[MASK] * length]
    while MASK in tokens:
        first = tokens.index(MASK)
        end = first + 1 if shift and first % 4 == 0 else (first // 4 + 1) * 4
        open_places = [p for p in range(first, min(end, len(tokens))) if tokens[p] == MASK]
        logs = run_alone(model, tokens, 4)[0]
        logs[:, MASK] = -math.inf
        logs = logs.log_softmax(-1)
        sure = {
            p: -torch.special.entr(logs[p - shift].exp()).sum() if shift else logs[p - shift].max() for p in open_places
        }
        place = max(open_places, key=lambda p: float(sure[p]))
        tokens[place] = int(logs[place - shift].argmax())
    assert decode_tokens(model, [Prompt(tuple(prompt))], [length]) == [tokens[len(prompt) :]]
    assert block_starts(model, unmasking(model), range(6, 13)) == ([0, 2, 6] if shift == 0 else [0, 2, 3, 6])
    with pytest.raises(rp.RevprobeError, match=r"block_length 3 .* blocks of 4 tokens: expected a number that divides"):
        unmasking(model, block_length=3)
