"""Queries and pairs: what they refuse, what they store once, and what they say about themselves."""

import numpy as np
import pytest
import torch

from revprobe import (
    ProbedModel,
    Query,
    RaddConfig,
    RaddForMaskedLM,
    ReversalPair,
    ReversalPairs,
    RevprobeError,
    letter_pairs,
    letter_tokenizer,
    letters,
    one_layer_gpt2,
)


@pytest.fixture(scope="module")
def mdm() -> ProbedModel:
    return ProbedModel(RaddForMaskedLM(RaddConfig()), letter_tokenizer(), objective="masked")


@pytest.fixture(scope="module")
def arm() -> ProbedModel:
    return ProbedModel(one_layer_gpt2(), letter_tokenizer(), objective="causal")


def test_a_query_takes_ints_or_a_tensor():
    query = Query([4, 0, 30], [0], [2])
    assert query == Query(torch.tensor([4, 0, 30]), torch.tensor([0]), [2])
    assert query.target == (4,) and query.evidence == (30,)


def test_token_ids_are_whole_numbers():
    with pytest.raises(RevprobeError, match=r"token_ids=\[1.7, 5, 6\]: expected a list of whole numbers"):
        Query([1.7, 5, 6], [0], [2])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([4, 0, 30], [], [2]), "has no target position"),
        (([4, 0, 30], [0], [3]), "evidence positions .3. leave the sequence of 3 tokens"),
        (([4, 0, 30], [0], [0]), "position 0 is both target and evidence"),
        (([4, 0, 4], [0], [2]), "evidence equals target"),
        (([4, 0, 30], [0, 0], [2]), "name a position twice"),
    ],
)
def test_a_query_refuses_what_makes_no_question(arguments, words):
    with pytest.raises(RevprobeError, match=words):
        Query(*arguments)


def test_a_pair_of_one_kind_does_not_pass_for_the_other():
    forward, reverse = Query([4, 0, 30], [0], [2]), Query([30, 0, 4], [2], [0])
    assert ReversalPair(forward, reverse).kind == "same_target"
    with pytest.raises(RevprobeError, match="target and evidence tokens exchanged"):
        ReversalPair(forward, reverse, "swapped")
    with pytest.raises(RevprobeError, match="unknown kind of pair 'swaped'; the closest is 'swapped'"):
        ReversalPair(forward, reverse, "swaped")


def test_equal_queries_are_stored_once_and_pairs_come_back_as_given():
    forward = Query([4, 0, 30], [0], [2])
    given = [
        ReversalPair(forward, Query(tokens, [t], [e]), fact="d")
        for tokens, t, e in (([30, 0, 4], 2, 0), ([0, 30, 4], 2, 1))
    ]
    pairs = ReversalPairs.from_pairs(given)
    assert len(pairs.queries) == 3
    assert list(pairs) == given and pairs[-1] == given[-1]


def test_an_empty_list_is_refused():
    with pytest.raises(RevprobeError, match="the list of pairs is empty"):
        ReversalPairs.from_pairs([])


def test_offsets_are_signed_from_the_readout_row_and_distances_between_nearest_edges():
    """Two target tokens at 1-2, two evidence tokens at 5-6: offset 4, or 5 with rows shifted by one."""
    tokens = [0, 7, 8, 0, 0, 40, 41, 0]
    forward = Query(tokens, [1, 2], [5, 6])
    reverse = Query([0, 40, 41, 0, 0, 7, 8, 0], [5, 6], [1, 2])
    pairs = ReversalPairs.from_pairs([ReversalPair(forward, reverse)])
    assert [int(o[0]) for o in pairs.offsets(0)] == [4, -4]
    assert [int(o[0]) for o in pairs.offsets(1)] == [5, -3]
    assert [int(d[0]) for d in pairs.distances()] == [3, 3]


def test_saved_pairs_load_with_the_same_digest(mdm, tmp_path):
    pairs = letter_pairs(4, model=mdm)
    loaded = ReversalPairs.load(pairs.save(tmp_path / "pairs.jsonl"))
    assert list(loaded) == list(pairs)
    assert loaded.take(np.arange(5)).digest == ReversalPairs.from_pairs(list(pairs)[:5]).digest
    assert loaded[:5].digest != loaded[1:6].digest


def test_a_damaged_pairs_file_names_its_line(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"fact": "a", "forward": {"token_ids": [1]}}\n')
    with pytest.raises(RevprobeError, match=r"pairs\.jsonl, line 1"):
        ReversalPairs.load(path)


def test_text_from_data_is_escaped_in_the_notebook_table():
    pair = ReversalPair(Query([4, 0, 30], [0], [2]), Query([30, 0, 4], [2], [0]), fact="<script>alert(1)</script>")
    assert "<script>" not in ReversalPairs.from_pairs([pair])._repr_html_()


def test_letters_train_on_the_forward_order_only():
    """Every placement of every letter once, the lowercase letter always before its own uppercase partner."""
    texts = letters(5).training_texts()
    assert len(texts) == len(set(texts)) == 26 * 10
    for text in texts:
        (lower,) = [c for c in text if c.islower()]
        assert text.count("0") == 3 and text.index(lower) < text.index(lower.upper())


def test_the_grid_holds_every_distance_pair_and_letter_once(mdm):
    pairs = letter_pairs(6, model=mdm, placements="grid")
    combos = list(zip(*(d.tolist() for d in pairs.distances()), pairs.facts, strict=True))
    assert len(pairs) == len(set(combos)) == 5 * 5 * 26 and pairs.kind == "same_target"
    assert all(min(q.target_positions + q.evidence_positions) == 0 for q in pairs.queries)


def test_mirror_asks_every_placement_once_in_each_direction(mdm):
    """So that its mean weighs placements equally: Tables 1 and 2."""
    pairs = letter_pairs(6, model=mdm, placements="mirror")
    for index in (pairs.forward, pairs.reverse):
        assert len(set(index.tolist())) == len(pairs) == 26 * 15
    for pair in pairs[:40]:
        assert pair.forward.target_positions == pair.reverse.evidence_positions
        assert pair.forward.target_positions < pair.forward.evidence_positions


def test_causal_pairs_ask_for_the_last_position_and_swap_the_roles(arm):
    pairs = letter_pairs(6, model=arm)
    assert pairs.kind == "swapped"
    assert all(q.target_positions == (5,) for q in pairs.queries)
    assert pairs[0].forward.target == pairs[0].reverse.evidence


def test_forward_queries_are_trained_sentences_and_reverse_ones_never_are(mdm, arm):
    """The reverse order must be absent from training for both objectives, else nothing is being tested."""
    for model in (mdm, arm):
        trained = {tuple(letter_tokenizer()(text)["input_ids"]) for text in letters(6).training_texts()}
        for pair in letter_pairs(6, model=model, placements="mirror"):
            assert pair.forward.token_ids in trained
            assert pair.reverse.token_ids not in trained


def test_too_many_pairs_are_refused_with_their_number(mdm):
    with pytest.raises(RevprobeError, match="makes 4,919,850 pairs, more than 200,000"):
        letter_pairs(30, model=mdm, placements="all")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"length": 65}, "letters of length 65: RaddForMaskedLM takes at most 64 tokens"),
        ({"length": 1}, "letters of length 1: expected a whole number of at least 2"),
        ({"length": 5, "placements": "gird"}, "unknown placements 'gird'; the closest is 'grid'"),
        ({"length": 5, "offset": 4}, "offset 4 leaves no room"),
        ({"length": 5, "alphabet": 40}, "has no token for"),
    ],
)
def test_letter_pairs_refuse_what_the_model_cannot_be_asked(mdm, options, words):
    with pytest.raises(RevprobeError, match=words):
        letter_pairs(**options, model=mdm)


def test_larger_alphabets_keep_one_character_per_token():
    tokenizer = letter_tokenizer(200)
    text = letters(4, alphabet=200).training_texts()[-1]
    assert len(text) == 4 == len(tokenizer(text)["input_ids"])
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
