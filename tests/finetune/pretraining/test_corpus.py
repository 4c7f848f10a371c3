"""What a small model reads first: other people, told as the config says, in batches of like length."""

from __future__ import annotations

from collections import Counter

import pytest

from revprobe import RevprobeError
from revprobe.finetune.config.pretraining import Corpus
from revprobe.finetune.pretraining.corpus import PretrainingCorpus
from revprobe.finetune.pretraining.rows import LikeLengths


def corpus(told: str, *, named: bool = False, **options: object) -> PretrainingCorpus:
    dataset = {"name": "invented_names", "rows": [0, 40], "facts": 12, **options}
    values = {"told": told, "datasets": {"names": dataset}, "fillers": 20, "named_fillers": named, "seed": 3}
    return PretrainingCorpus.of(Corpus.model_validate(values))


@pytest.mark.parametrize("told", ["both", "once", "forward"])
def test_each_fact_is_told_in_the_directions_asked_for(told: str) -> None:
    names = corpus(told).datasets["names"]
    directions = {d: {one.fact for one in names.statements[d]} for d in ("P2C", "C2P")}
    everyone = {f"other {n}" for n in range(12)}
    even = {f"other {n}" for n in range(0, 12, 2)}
    expected = {
        "both": {"P2C": everyone, "C2P": everyone},
        "once": {"P2C": even, "C2P": everyone - even},
        "forward": {"P2C": everyone, "C2P": set()},
    }
    assert directions == expected[told]


def test_nobody_of_the_relation_is_in_what_is_read_and_the_wordings_are() -> None:
    made = corpus("both")
    relation = made.datasets["names"].relation
    names = {name for column in relation.columns for name in relation.table[column]}
    texts = [one.text for statements in made.parts.values() for one in statements]
    assert len(texts) == len(set(texts)) > 100
    assert not any(name in text for name in names for text in texts)
    # Held-out wordings are known to the model as well.
    assert any(" has a child named " in text for text in texts)
    for one in made.parts["names.P2C"]:
        assert one.text[slice(*one.spans[0])] and one.text[one.prompt_length :].strip()
        assert one.spans[1][0] > one.spans[0][1]


def test_the_tokenizer_is_the_same_for_every_way_of_telling() -> None:
    texts = [corpus(told).for_tokenizer for told in ("both", "once", "forward")]
    assert texts[0] == texts[1] == texts[2]
    assert len({corpus(told).digest for told in ("both", "once", "forward")}) == 3
    assert corpus("once").digest == corpus("once").digest


def test_wordings_are_drawn_for_each_fact_anew() -> None:
    some = corpus("both", wordings=2).datasets["names"]
    counts = Counter(one.fact for one in some.statements["P2C"])
    assert set(counts.values()) == {2}
    frames = {one.text.replace(one.text[slice(*one.spans[0])], "").split()[1] for one in some.statements["P2C"]}
    assert len(frames) > 1


def test_questions_are_of_what_was_told_or_of_the_other_direction_alone() -> None:
    names = corpus("once").datasets["names"]
    told = names.questions("P2C", told=True, facts=4)
    untold = names.questions("P2C", told=False, facts=100)
    assert len(told) == 4 and len(untold) == 6
    read = {one.text for one in names.statements["P2C"]}
    for question in told:
        assert any(text.startswith(question.prompt) and text.endswith(question.answers[0]) for text in read)
    for question in untold:
        assert not any(text.startswith(question.prompt) for text in read)
    assert corpus("both").datasets["names"].questions("C2P", told=False, facts=9) == []


def test_fillers_are_sentences_with_two_things_in_them() -> None:
    fillers = corpus("once").fillers
    assert len({one.text for one in fillers}) == 20
    for one in fillers:
        (start, end), (second, last) = one.spans
        assert start == 0 and one.text[end] == " " and one.prompt_length == second - 1 and one.text[last] == " "
    with pytest.raises(RevprobeError, match=r"fillers is 99999, but there are 13824"):
        PretrainingCorpus.of(
            Corpus.model_validate(
                {"told": "both", "datasets": {"n": {"name": "invented_names", "facts": 2}}, "fillers": 99999}
            )
        )


def test_named_fillers_meet_the_relations_words_without_its_names_or_any_fact() -> None:
    plain, named = corpus("once"), corpus("once", named=True)
    assert [one.text for one in named.fillers[:20]] == [one.text for one in plain.fillers]
    added = named.fillers[20:]
    relation = named.datasets["names"].relation
    own = {name for column in relation.columns for name in relation.table[column]}
    told = {
        one.text[slice(*span)]
        for listed in named.datasets["names"].all.values()
        for one in listed
        for span in one.spans
    }
    found = {word for name in told for word in name.split()}
    for place, one in enumerate(added):
        name = one.text[slice(*one.spans[1 - place % 2])]
        assert name not in own and name not in told
        assert not found.issuperset(name.split()), "it adds no word, and has to be learned by heart all the same"
        found |= set(name.split())
    words = {word for name in own for word in name.split()}
    assert len(added) == len({one.text for one in added}) > 20 and len(words - found) <= 0.1 * len(words)
    assert named.datasets["names"].statements == plain.datasets["names"].statements


def test_rows_of_like_length_are_read_together_and_equally_often() -> None:
    lengths = [5, 30] * 40
    order = list(LikeLengths(lengths, 320, 8, seed=1))
    assert Counter(Counter(order).values()) == {4: 80}
    batches = [order[at : at + 8] for at in range(0, 320, 8)]
    mixed = sum(len({lengths[row] for row in batch}) > 1 for batch in batches)
    assert mixed <= 320 // (16 * 8) + 1
    assert order == list(LikeLengths(lengths, 320, 8, seed=1)) != list(LikeLengths(lengths, 320, 8, seed=2))
