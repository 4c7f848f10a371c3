"""same_block=True: target, its readout rows and evidence inside one block, in both directions of all pairs."""

import numpy as np
import pandas as pd
import pytest
from blocks_alone import seen_by_hand

import revprobe as rp
from revprobe.probes.statistics.estimators import LATER_BLOCK
from tiny import MASK, in_blocks, llama, word_tokenizer

SHIFTS = pytest.mark.parametrize("shift", [0, 1])
NAMES = [f"n{i}" for i in range(12)]
WORDS = [*NAMES, *["the", "child", "of", "is", "and", "parent", "now"]]


def reader(size: int | None, shift: int, **special) -> rp.ProbedModel:
    model = in_blocks(size, shift=shift)
    tokenizer = word_tokenizer(WORDS, special=("unk", "eos", "mask"))
    return rp.ProbedModel(
        model, tokenizer, objective="masked", block_size=size or "whole", mask_token_id=MASK, **special
    )


def places(query: rp.Query, shift: int) -> set[int]:
    return {*query.target_positions, *(p - shift for p in query.target_positions), *query.evidence_positions}


def in_one(query: rp.Query, size: int, shift: int) -> bool:
    return len({p // size for p in places(query, shift)}) == 1 and min(places(query, shift)) >= 0


@SHIFTS
def test_letters_are_moved_by_placeholders_and_no_further_than_needed(shift):
    model, size = in_blocks(6, shift=shift), 6
    plain, placed = (rp.letter_pairs(5, model=model, alphabet=3, same_block=same) for same in (False, True))
    for name in ("attention", "gradient", "probability"):
        for before, after in zip(plain.for_probe(name), placed.for_probe(name), strict=True):
            for old, new in ((before.forward, after.forward), (before.reverse, after.reverse)):
                count = len(new.token_ids) - len(old.token_ids)
                assert new.token_ids[count:] == old.token_ids and set(new.token_ids[:count]) <= {0}
                assert in_one(new, size, shift)
                fewer = (
                    rp.Query(
                        new.token_ids[count - k :],
                        *([p + k for p in part] for part in (old.target_positions, old.evidence_positions)),
                    )
                    for k in range(count)
                )
                assert not any(in_one(one, size, shift) for one in fewer)
        flags = placed.for_probe(name).flags
        lengths = [len(p.forward.token_ids) - 5 for p in placed.for_probe(name)]
        assert flags["filled_forward"].tolist() == lengths and "filled_reverse" in flags
    for reading in rp.probe(model, placed):
        assert LATER_BLOCK not in reading.undefined and reading.n
        assert "filled_forward" in reading.frame
    assert any(LATER_BLOCK in r.undefined for r in rp.probe(in_blocks(3, shift=shift), plain))


@SHIFTS
@pytest.mark.parametrize("begin", [40, None])
def test_text_is_moved_by_begin_tokens_or_what_ends_a_text(shift, begin):
    model, size = reader(8, shift, begin_token_id=begin), 8
    if begin is None:
        model.begin_token_id = None
    table = pd.DataFrame({"target": NAMES[:4], "evidence": NAMES[4:8]})
    words = {
        "forward": "the child of {target} is {evidence}",
        "reverse": "now and now the parent of {evidence} is {target}",
    }
    plain = rp.pairs_from_frame(table, **words, model=model)
    pairs = rp.pairs_from_frame(table, **words, model=model, same_block=True)
    filler = 1 if begin is None else begin
    assert not all(in_one(q, size, shift) for q in plain.queries)
    for old, new in zip(plain.queries, pairs.queries, strict=True):
        count = len(new.token_ids) - len(old.token_ids)
        assert in_one(new, size, shift) and new.token_ids == (filler,) * count + old.token_ids
        assert seen_by_hand(new, size, shift)
    shown = pairs.to_frame()
    assert {"filled_forward", "filled_reverse"} <= set(shown) and shown["filled_reverse"].gt(0).all()
    reading = rp.probe_reverse_probability(model, pairs)
    assert reading.n == 4 and LATER_BLOCK not in reading.undefined
    one = rp.pair_from_text(**words, target="n0", evidence="n4", model=model, same_block=True)
    assert one.reverse == pairs[0].reverse


@SHIFTS
def test_a_relation_places_its_pairs_also_those_that_ask_a_masked_model_for_what_comes_last(shift):
    model = reader(8, shift, begin_token_id=40)
    table = pd.DataFrame({"parent": NAMES[:6], "child": NAMES[6:]})
    relation = rp.from_table(
        table,
        columns=["parent", "child"],
        templates={
            "P2C": ["the child of {parent} is {child}"],
            "C2P": ["now and now the parent of {child} is {parent}"],
        },
    )
    for kind in (None, "swapped"):
        pairs = relation.pairs(model, "P2C", kind=kind, same_block=True)
        assert all(in_one(q, 8, shift) for q in pairs.queries) and pairs.flags["filled_reverse"].any()


@SHIFTS
def test_a_block_smaller_than_the_span_is_one_line_with_both_numbers(shift):
    model, span = in_blocks(4, shift=shift), 6 + shift
    with pytest.raises(rp.RevprobeError, match=rf"span {span} tokens, more than a block of 4 .*in_blocks\({span}\)"):
        rp.letter_pairs(6, model=model, same_block=True)
    placed = rp.letter_pairs(6, model=model.in_blocks(span), same_block=True)
    assert all(in_one(q, span, shift) for q in placed.queries)


def test_without_blocks_there_is_nothing_to_place_and_a_causal_model_has_none():
    model = in_blocks(None)
    placed = rp.letter_pairs(5, model=model, same_block=True)
    assert placed.queries == rp.letter_pairs(5, model=model).queries
    assert not placed.flags["filled_forward"].any()
    with pytest.raises(rp.RevprobeError, match="a causal model, which reads token by token"):
        rp.letter_pairs(5, model=llama(), same_block=True)


def test_placed_pairs_keep_their_columns_on_disk(tmp_path):
    model = in_blocks(8, shift=1)
    placed = rp.letter_pairs(6, model=model, same_block=True)
    back = rp.ReversalPairs.load(placed.save(tmp_path / "pairs.jsonl"), tokenizer=model.tokenizer)
    assert list(back) == list(placed)
    np.testing.assert_array_equal(back.flags["filled_forward"], placed.flags["filled_forward"])
