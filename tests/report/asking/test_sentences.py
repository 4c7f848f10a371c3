"""Typed sentences become the pairs that `rp.pair_from_text` makes, and what cannot be read says how it is written."""

import pytest
from tokenizers import decoders, pre_tokenizers

import revprobe as rp
import tiny
from revprobe.report.asking.sentences import LONGEST, read_sentence, sentence_query, typed_pair

WORDS = ["Fact:", "Ann", "Bob", "Lee", "May", "is", "the", "parent", "child", "of", "Eve"]
FORWARD, REVERSE = "Fact: [Ann Lee] is the parent of {Bob Lee}", "Fact: {Bob Lee} is the child of [Ann Lee]"


def masked() -> rp.ProbedModel:
    config = rp.RaddConfig(vocab_size=20, d_model=16, mask_token_id=2)
    return rp.ProbedModel(
        tiny.drawn(lambda: rp.RaddForMaskedLM(config)), tiny.word_tokenizer(WORDS), objective="masked", mask_token_id=2
    )


def causal() -> rp.ProbedModel:
    return rp.ProbedModel(tiny.llama("eager").module, tiny.word_tokenizer(WORDS), objective="causal")


def test_a_masked_pair_is_that_of_the_templates() -> None:
    model = masked()
    found = typed_pair(model, FORWARD, REVERSE)
    expected = rp.pair_from_text(
        "Fact: {target} is the parent of {evidence}",
        "Fact: {evidence} is the child of {target}",
        target="Ann Lee",
        evidence="Bob Lee",
        model=model,
    )
    assert (found.forward, found.reverse, found.kind) == (expected.forward, expected.reverse, "same_target")
    assert found.fact == "Ann Lee | Bob Lee"
    assert sentence_query(model, read_sentence(FORWARD)) == expected.forward
    assert sentence_query(model, read_sentence(REVERSE)) == expected.reverse


def test_a_causal_pair_is_asked_for_what_each_sentence_ends_with() -> None:
    model = causal()
    forward, reverse = "Fact: {Ann Lee} is the parent of [Bob Lee]", "Fact: {Bob Lee} is the child of [Ann Lee]"
    found = typed_pair(model, forward, reverse)
    expected = rp.pair_from_text(
        "Fact: {target} is the parent of {evidence}",
        "Fact: {evidence} is the child of {target}",
        target="Ann Lee",
        evidence="Bob Lee",
        model=model,
    )
    assert (found.forward, found.reverse, found.kind) == (expected.forward, expected.reverse, "swapped")
    assert sentence_query(model, read_sentence(forward)) == expected.forward
    with pytest.raises(
        rp.RevprobeError, match=r"forward sentence hides 'Ann Lee' before its evidence .*put the hidden"
    ):
        typed_pair(model, FORWARD, reverse)
    with pytest.raises(rp.RevprobeError, match="the reverse hides what forward gives"):
        typed_pair(model, forward, "Fact: {Eve} is the child of [Ann Lee]")


@pytest.mark.parametrize("build", [masked, causal])
def test_one_sentence_alone_is_one_query_twice(build: object) -> None:
    found = typed_pair(build(), "Fact: {Bob Lee} is the child of [Ann Lee]")  # type: ignore[operator]
    assert found.forward == found.reverse and found.forward.target_positions == (7, 8)
    assert found.forward.evidence_positions == (1, 2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Fact: Ann is the parent of {Bob}", "expected one hidden name in [brackets] and one given in {braces}"),
        ("[Ann] is the parent of Bob", "expected one hidden name"),
        ("[Ann] and [Eve] is the parent of {Bob}", "expected one hidden name"),
        ("[] is the parent of {Bob}", "expected one hidden name"),
        ("[Ann is the parent of {Bob}", "expected one hidden name"),
        ("[Ann] is the {parent of {Bob}", "expected one hidden name"),
        ("", "expected one hidden name"),
        ("[Ann] is " + "x" * LONGEST + " {Bob}", f"letters; expected at most {LONGEST}"),
    ],
)
def test_a_sentence_that_cannot_be_read_says_how_it_is_written(text: str, words: str) -> None:
    with pytest.raises(rp.RevprobeError) as caught:
        read_sentence(text)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400, "a long sentence is not told back whole"


def test_two_sentences_about_different_facts_are_refused() -> None:
    with pytest.raises(rp.RevprobeError, match="the same hidden name from the same evidence in both"):
        typed_pair(masked(), FORWARD, "Fact: {Bob Lee} is the child of [Eve]")
    with pytest.raises(rp.RevprobeError, match="stand in the same order in both"):
        typed_pair(masked(), FORWARD, "Fact: [Ann Lee] is the child of {Bob Lee}")


def test_names_that_are_other_tokens_at_the_start_get_a_remedy_that_can_be_typed() -> None:
    words = ["Fact:", *(f"{blank}{word}" for word in ("Ann", "Bob", "is", "of") for blank in ("", "▁"))]
    split = pre_tokenizers.Metaspace(prepend_scheme="never")
    config = rp.RaddConfig(vocab_size=20, d_model=16, mask_token_id=2)
    module = tiny.drawn(lambda: rp.RaddForMaskedLM(config))
    tokenizer = tiny.word_tokenizer(words, split=split)
    tokenizer.backend_tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    model = rp.ProbedModel(module, tokenizer, objective="masked", mask_token_id=2)
    with pytest.raises(rp.RevprobeError, match="begin both sentences with the same word, such as 'Fact: '") as caught:
        typed_pair(model, "[Ann] is {Bob}", "{Bob} of [Ann]")
    assert "carrier" not in str(caught.value)
    assert typed_pair(model, "Fact: [Ann] is {Bob}", "Fact: {Bob} of [Ann]").kind == "same_target", "the remedy works"


def test_letters_are_sentences_too() -> None:
    model = tiny.radd()
    pair = typed_pair(model, "0[d]0{D}", "0{D}0[d]")
    letters = rp.letter_pairs(4, model=model, placements="all")
    assert pair.forward in letters.queries and pair.reverse in letters.queries
