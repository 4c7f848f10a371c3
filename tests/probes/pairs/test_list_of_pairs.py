"""A list of pairs is a ReversalPairs, and some of them can be drawn."""

import copy
import pickle

import pytest

import revprobe as rp
from tiny import pairs_at


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
