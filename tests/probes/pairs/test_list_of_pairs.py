"""A list of pairs is a ReversalPairs, and some of them can be drawn."""

import copy
import hashlib
import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import revprobe as rp
from tiny import pairs_at, radd


def test_a_list_of_pairs_is_enough() -> None:
    made = pairs_at((1, 5), (5, 1), count=4)
    again = rp.ReversalPairs([*made])  # type: ignore[call-arg]
    assert again.digest == made.digest and repr(again) == repr(made) and len(again) == 4
    assert pickle.loads(pickle.dumps(again)).digest == copy.copy(again).digest == made.digest
    with pytest.raises(rp.RevprobeError):
        rp.ReversalPairs([])  # type: ignore[call-arg]


def test_a_sample_is_of_the_pairs_in_their_order_and_the_same_for_a_seed() -> None:
    made = pairs_at((1, 5), (5, 1), count=20)
    some = made.sample(5, seed=3)
    numbers = [int(fact) for fact in some.facts]
    assert numbers == sorted(set(numbers)) and len(numbers) == 5
    assert some.digest == made.sample(5, 3).digest != made.sample(5, 4).digest
    assert made.sample(20).digest == made.digest
    for n in (0, 21):
        with pytest.raises(rp.RevprobeError, match=f"n={n}: expected 1 to 20, the pairs there are"):
            made.sample(n)


def test_pairs_say_how_many_facts_they_are_of_and_what_was_flagged() -> None:
    assert repr(pairs_at((1, 5), (5, 1), count=4)) == "ReversalPairs(4 pairs of 4 facts, 8 queries, kind='same_target')"


def stored_otherwise(pairs: rp.ReversalPairs) -> rp.ReversalPairs:
    """The same pairs, their queries stored backwards, with one that no pair asks."""
    last = len(pairs.queries) - 1
    spare = rp.Query([1, 2, 3], [0], [2])
    return replace(
        pairs, queries=(*pairs.queries[::-1], spare), forward=last - pairs.forward, reverse=last - pairs.reverse
    )


def test_a_digest_is_of_the_pairs_and_not_of_how_their_queries_are_stored(tmp_path: Path) -> None:
    """A file stores queries as pairs ask them: pairs saved and loaded were other pairs to a reading's figure."""
    model = radd()
    made = rp.letter_pairs(5, model=model).for_probe("attention")
    loaded = rp.ReversalPairs.load(made.save(tmp_path / "pairs.jsonl"))
    for same in (loaded, stored_otherwise(made), made[:], rp.ReversalPairs([*made])):  # type: ignore[call-arg]
        assert same.digest == made.digest and list(same) == list(made)
    order = np.r_[1, 0, 2 : len(made)]
    changed = [made.take(order), made[1:], replace(made, forward=made.reverse, reverse=made.forward)]
    changed += [replace(made, facts=made.facts[::-1]), replace(made, kind="swapped")]
    assert len({made.digest, *(one.digest for one in changed)}) == 6
    reading = rp.probe_attention_correlation(model, made, progress=False)
    assert reading.plot(pairs=loaded).data


def test_the_digest_of_an_older_version_is_known() -> None:
    """It hashed the queries as they are stored."""
    made = stored_otherwise(pairs_at((1, 5), (5, 1), count=4))
    state = hashlib.sha256(made.kind.encode())
    for query in made.queries:
        state.update(repr(tuple(query.as_row().values())).encode())
    state.update(np.stack([made.forward, made.reverse]).astype("<i8").tobytes())
    state.update(json.dumps([str(fact) for fact in made.facts]).encode())
    old = state.hexdigest()[:16]
    assert old != made.digest and made.has_digest(old) and made.has_digest(made.digest)
    assert not made.has_digest(None) and not made.has_digest("others") and not made[:3].has_digest(old)


def test_lists_that_are_joined_keep_what_they_said_of_their_pairs() -> None:
    """Flags were lost, and with them the templates and the repeated facts."""
    made = pairs_at((1, 5), (5, 1), count=4)
    own = replace(made, flags={"template": np.arange(4), "too_long": np.arange(4) > 2})
    other = replace(made, flags={"too_long": np.arange(4) < 1, "more": np.arange(4)})
    joined = rp.ReversalPairs([*own, *own[1:3]])  # type: ignore[call-arg]
    assert {name: values.tolist() for name, values in joined.flags.items()} == {
        "template": [0, 1, 2, 3, 1, 2],
        "too_long": [False, False, False, True, False, False],
    }
    assert joined.report == {"too_long": 1} and joined.flags["too_long"].dtype == bool
    both = rp.ReversalPairs([*own, *other])  # type: ignore[call-arg]
    assert list(both.flags) == ["too_long"] and both.report == {"too_long": 2}, "what one list alone says is left out"
    assert own[0] == made[0] and hash(own[0]) == hash(made[0])


def test_pairs_are_taken_by_lists_and_by_true_and_false() -> None:
    made = pairs_at((1, 5), (5, 1), count=4)
    for chosen in ([0, 2], np.array([0, 2]), [True, False, True, False], pd.Index([0, -2]), np.array([-4, 2])):
        for some in (made[chosen], made.take(chosen)):  # type: ignore[index, arg-type]
            assert list(some) == [made[0], made[2]]
    assert made[np.int64(1)] == made[1] and list(made[pd.Series([True, True, False, False])]) == list(made[:2])
    for wrong, told in (
        ([True, False], "pairs by 2 of true and false: expected places from -4 to 3, or 4 of true and false"),
        ([0, 4], "pair 4 of 4: expected places from -4 to 3"),
        ([-5], "pair -5 of 4"),
        ([0.5], r"pairs by \[0.5\]: expected places"),
        ("a", "pairs by 'a': expected places"),
        ([[0]], "expected places"),
        ([], "the list of pairs is empty"),
    ):
        for take in (made.__getitem__, made.take):
            with pytest.raises(rp.RevprobeError, match=told):
                take(wrong)  # type: ignore[arg-type]
