"""Pairs from text: the tokens found are the entity's, in three kinds of tokenizer; and what is refused, and how."""

import runpy
import string
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from revprobe import (
    ProbedModel,
    RaddConfig,
    RaddForMaskedLM,
    ReversalPair,
    ReversalPairs,
    RevprobeError,
    from_table,
    letter_tokenizer,
    one_layer_gpt2,
    pair_from_text,
    pairs_from_frame,
    probe,
    probe_reverse_probability,
)
from revprobe.probes.pairs import spans
from revprobe.probes.pairs import text as text_pairs
from revprobe.probes.pairs.fact_rows import read_rows

FORWARD, REVERSE = "{target}'s child is {evidence}", "{evidence}'s parent is {target}"
WORDING = {"forward": FORWARD, "reverse": REVERSE, "target": "parent", "evidence": "child"}
FACTS = pd.DataFrame(
    {
        "parent": ["Samira Calle", "Ann Lee", "Zoé Bright"],
        "child": ["Sasha Calle", "Bo Hart", "Max Dunn"],
        "year": ["1990", "1991", "1992"],
    }
)
LETTERS = string.ascii_letters + string.digits + ".:'"
SENTENCES = [
    FORWARD.format(target=p, evidence=c) + f". Fact: in {y} {c} was born. " + REVERSE.format(target=p, evidence=c)
    for p, c, y in FACTS.itertuples(index=False)
]


def byte_level(add_prefix_space: bool = False, trim_offsets: bool = True) -> PreTrainedTokenizerFast:
    """GPT-2's kind: a leading blank is part of the token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.post_processor = processors.ByteLevel(add_prefix_space=add_prefix_space, trim_offsets=trim_offsets)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<mask>", "<bos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, mask_token="<mask>", bos_token="<bos>")


def word_piece() -> PreTrainedTokenizerFast:
    """BERT's kind: lower case, no accents, no blanks, [CLS] and [SEP] around the text."""
    special = ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=170, initial_alphabet=list(LETTERS), special_tokens=special, show_progress=False
    )
    backend.train_from_iterator(SENTENCES, trainer)
    around = [("[CLS]", 1), ("[SEP]", 2)]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=around)
    names = dict(zip(("unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def unigram() -> PreTrainedTokenizerFast:
    """SentencePiece's kind: blanks become ▁, and one is put before the text."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    special = ["<unk>", "<mask>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=130, special_tokens=special, unk_token="<unk>", initial_alphabet=list(LETTERS), show_progress=False
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", mask_token="<mask>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """Llama 2's kind: SentencePiece BPE over whole texts (a merge may cross words), unknown characters as bytes."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    blank = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(blank)
    special = ["<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, max_token_length=6, show_progress=False)
    backend.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", mask_token="<mask>")


def masked(tokenizer: PreTrainedTokenizerFast, **options) -> ProbedModel:
    config = RaddConfig(vocab_size=len(tokenizer), mask_token_id=tokenizer.mask_token_id, **options)
    return ProbedModel(RaddForMaskedLM(config), tokenizer, objective="masked")


TOKENIZERS = {
    "byte-level": byte_level(),
    "byte-level, blanks in the offsets": byte_level(trim_offsets=False),
    "byte-level, blank before the text": byte_level(add_prefix_space=True),
    "WordPiece": word_piece(),
    "Unigram": unigram(),
    "byte fallback": byte_fallback(),
}
MASKED = {name: masked(tokenizer) for name, tokenizer in TOKENIZERS.items()}
BPE = MASKED["byte-level"]
CAUSAL = ProbedModel(one_layer_gpt2(len(TOKENIZERS["byte-level"])), TOKENIZERS["byte-level"], objective="causal")
by_tokenizer = pytest.mark.parametrize("kind", TOKENIZERS)


def words(tokenizer: PreTrainedTokenizerFast, ids) -> str:
    """What tokens read as, without blanks, which WordPiece does not keep."""
    return "".join(tokenizer.decode(list(ids)).split())


def plain(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    """Text as a tokenizer that changes it would leave it, without blanks."""
    if tokenizer is TOKENIZERS["WordPiece"]:
        text = normalizers.BertNormalizer().normalize_str(text)
    if tokenizer in (TOKENIZERS["Unigram"], TOKENIZERS["byte fallback"]):
        text = text.replace("▁", " ")
    return "".join(text.split())


def require_right_spans(pair: ReversalPair, tokenizer, texts: list[str], target: str, evidence: str) -> None:
    """Cut each query at its spans: every piece must read as the text's own piece, so no span can be off by one."""
    for query, text in zip((pair.forward, pair.reverse), texts, strict=True):
        spans_of = sorted([(query.target_positions, target), (query.evidence_positions, evidence)])
        (first, first_text), (second, second_text) = spans_of
        body = [i for i, token in enumerate(query.token_ids) if token not in tokenizer.all_special_ids]
        cuts = [(body[0], first[0]), (first[0], first[-1] + 1), (first[-1] + 1, second[0]), (second[0], second[-1] + 1)]
        before, between = text.split(first_text)[0], text.split(first_text)[1].split(second_text)[0]
        expected = [before, first_text, between, second_text]
        for (start, end), piece in zip(cuts, expected, strict=True):
            assert words(tokenizer, query.token_ids[start:end]) == plain(tokenizer, piece), (query, text, piece)


@by_tokenizer
def test_each_kind_of_tokenizer_gives_the_entitys_own_tokens(kind: str) -> None:
    """Target, evidence and all that lies between, piece by piece: an offset rule that fits one tokenizer only fails."""
    tokenizer = TOKENIZERS[kind]
    forward, reverse = "Fact: {target} raised {evidence} .", "Fact: {evidence} is from {target} ."
    for target, evidence in FACTS[["parent", "child"]].itertuples(index=False):
        try:
            pair = pair_from_text(forward, reverse, target=target, evidence=evidence, model=MASKED[kind])
        except RevprobeError as error:
            assert kind == "byte fallback" and error.reason in ("straddling_span", "different_tokens"), error
            continue
        texts = [side.format(target=target, evidence=evidence) for side in (forward, reverse)]
        require_right_spans(pair, tokenizer, texts, target, evidence)


ENTITY = st.text(st.one_of(st.sampled_from("SamirCleBoH 'é.▁Ġ"), st.characters(codec="utf-8")), min_size=1, max_size=8)
BETWEEN = st.text(st.one_of(st.sampled_from(" .'s\u0301\n"), st.characters(codec="utf-8")), min_size=1, max_size=5)


@by_tokenizer
@settings(max_examples=150)
@given(target=ENTITY, evidence=ENTITY, before=BETWEEN, between=BETWEEN)
@example(target="🎉", evidence="日本", before=" ", between=" is ")
@example(target="e", evidence="Bo", before=" ", between="\u0301 ")
@example(target="▁a", evidence="Ġb", before="x", between="▁")
def test_any_text_gives_the_entity_or_an_error_never_a_wrong_span(
    kind: str, target: str, evidence: str, before: str, between: str
) -> None:
    """An off-by-one in the offsets, a token shared with the template, a composed accent: wrong or refused."""
    tokenizer, braces = TOKENIZERS[kind], str.maketrans({"{": "{{", "}": "}}"})
    head, middle = before.translate(braces), between.translate(braces)
    forward, reverse = f"{head}{{target}}{middle}{{evidence}}", f"{head}{{evidence}}{middle}{{target}}"
    options = {"model": MASKED[kind], "allow_different_tokens": True}
    try:
        pair = pair_from_text(forward, reverse, target=target, evidence=evidence, **options)
    except RevprobeError:
        return
    for query, order in ((pair.forward, (target, evidence)), (pair.reverse, (evidence, target))):
        assert words(tokenizer, query.target) == plain(tokenizer, target)
        assert words(tokenizer, query.evidence) == plain(tokenizer, evidence)
        start = min(query.target_positions + query.evidence_positions)
        body = [token for token in query.token_ids[:start] if token not in tokenizer.all_special_ids]
        whole = [token for token in query.token_ids if token not in tokenizer.all_special_ids]
        if len(whole) == len(query.token_ids) - (2 if kind == "WordPiece" else 0):  # else the text has unknown tokens
            assert words(tokenizer, body) == plain(tokenizer, before), order


@pytest.mark.parametrize("shift", [-1, 1])
def test_offsets_off_by_one_are_caught_when_the_tokens_are_read_back(
    monkeypatch: pytest.MonkeyPatch, shift: int
) -> None:
    """The planted fault: each token claims its neighbour's characters, so all that looks at offsets is content."""
    honest = spans._encode

    def planted(tokenizer, texts):
        shifted = (np.roll(encoded.offsets, shift, axis=0).tolist() for encoded in honest(tokenizer, texts))
        return [replace(e, offsets=tuple(o)) for e, o in zip(honest(tokenizer, texts), shifted, strict=True)]

    monkeypatch.setattr(spans, "_encode", planted)
    with pytest.raises(RevprobeError, match=r"row 0: the tokens .* of the target 'Samira Calle' decode to"):
        pairs_from_frame(FACTS, **WORDING, model=BPE, carrier="Fact: ")


def test_these_tests_would_see_a_span_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same fault behind the checks of the package: the piece-by-piece comparison above must turn red."""
    honest = text_pairs.entity_positions
    shifted = lambda *arguments: [position + 1 for position in honest(*arguments)]  # noqa: E731
    forward, reverse = "Fact: {target} raised {evidence} .", "Fact: {evidence} is from {target} ."
    options = {"target": "Ann Lee", "evidence": "Bo Hart", "model": BPE, "allow_different_tokens": True}
    texts = [side.format(target="Ann Lee", evidence="Bo Hart") for side in (forward, reverse)]
    require_right_spans(pair_from_text(forward, reverse, **options), BPE.tokenizer, texts, "Ann Lee", "Bo Hart")
    monkeypatch.setattr(text_pairs, "entity_positions", shifted)
    pair = pair_from_text(forward, reverse, **options)
    with pytest.raises(AssertionError):
        require_right_spans(pair, BPE.tokenizer, texts, "Ann Lee", "Bo Hart")


def test_a_name_that_starts_a_text_is_other_tokens_and_the_error_offers_the_carrier() -> None:
    with pytest.raises(RevprobeError) as caught:
        pairs_from_frame(FACTS, **WORDING, model=BPE)
    text = str(caught.value)
    assert text.startswith("row 0: the target 'Samira Calle' is ['S") and "'ĠSamira', 'ĠCalle'] in reverse" in text
    assert "carrier='Fact: '" in text and "allow_different_tokens=True" in text and "drop=['different_tokens']" in text
    assert "3 x different_tokens among 3 pairs" in text


def test_the_carrier_makes_both_directions_ask_for_the_same_tokens() -> None:
    pairs = pairs_from_frame(FACTS, **WORDING, model=BPE, carrier="Fact: ")
    assert pairs.kind == "same_target" and not any(pairs.flags["different_tokens"])
    for pair, parent in zip(pairs, FACTS["parent"], strict=True):
        assert (pair.forward.target, pair.forward.evidence) == (pair.reverse.target, pair.reverse.evidence)
        assert BPE.tokenizer.decode(pair.forward.target) == f" {parent}"
        assert pair.forward.target_positions < pair.forward.evidence_positions
        assert pair.reverse.target_positions > pair.reverse.evidence_positions


def test_a_carrier_that_does_not_help_is_not_offered_again() -> None:
    with pytest.raises(RevprobeError, match=r"carrier '\(' does not help here, so put a space before both slots"):
        pairs_from_frame(FACTS[1:2], **WORDING, model=BPE, carrier="(")


def test_opting_out_is_recorded_pair_by_pair() -> None:
    """In the column, the report, the repr and the file; a pair that has nothing to opt out of is not marked."""
    wording = WORDING | {"forward": "{target} : {evidence}", "reverse": "{evidence} : {target}"}
    pairs = pairs_from_frame(FACTS, **wording, model=BPE, allow_different_tokens=True)
    assert pairs.flags["different_tokens"].all() and pairs.report["different_tokens"] == 3
    assert pairs.to_frame()["different_tokens"].all() and "3 with different tokens" in repr(pairs)
    assert pairs[0].different_tokens and pairs[0].forward.target != pairs[0].reverse.target
    same = pairs_from_frame(FACTS, **WORDING, model=BPE, carrier="Fact: ", allow_different_tokens=True)
    assert (
        "different_tokens" not in same.report
        and same[0] == pairs_from_frame(FACTS, **WORDING, model=BPE, carrier="Fact: ")[0]
    )


def test_pairs_that_opted_out_are_still_probed() -> None:
    pairs = pairs_from_frame(FACTS, **WORDING, model=BPE, allow_different_tokens=True)
    reading = probe_reverse_probability(BPE, pairs)
    assert 0 < reading.value < 1 and reading.n == 3


def test_a_causal_model_is_asked_for_what_comes_last_and_the_roles_swap() -> None:
    """Forward the child given the parent, in reverse the parent given the child; nothing follows the answer."""
    wording = WORDING | {"forward": FORWARD + " . Indeed", "reverse": REVERSE + " ."}
    pairs = pairs_from_frame(FACTS, **wording, model=CAUSAL, carrier="Fact: ")
    assert pairs.kind == "swapped"
    for pair, row in zip(pairs, FACTS.itertuples(), strict=True):
        for query, asked, given_ in ((pair.forward, row.child, row.parent), (pair.reverse, row.parent, row.child)):
            assert CAUSAL.tokenizer.decode(query.target) == f" {asked}"
            assert CAUSAL.tokenizer.decode(query.evidence) == f" {given_}"
            assert query.evidence_positions[-1] < query.target_positions[0]
            assert query.target_positions[-1] == len(query.token_ids) - 1
        assert pair.forward.target == pair.reverse.evidence
    with pytest.raises(RevprobeError, match="must be the same tokens in both directions"):
        pairs_from_frame(FACTS, **WORDING, model=CAUSAL)


def test_special_tokens_stay_in_the_query_and_positions_follow() -> None:
    tokenizer = TOKENIZERS["WordPiece"]
    pair = pairs_from_frame(FACTS, **WORDING, model=MASKED["WordPiece"])[0]
    pieces = tokenizer.convert_ids_to_tokens(pair.forward.token_ids)
    assert (pieces[0], pieces[-1]) == ("[CLS]", "[SEP]")
    assert pair.forward.target_positions[0] == 1
    assert words(tokenizer, pair.forward.target) == "samiracalle"


def test_one_text_is_the_row_of_a_frame() -> None:
    """pair_from_text and pairs_from_frame agree, further slots included."""
    wording = {"forward": "In {year} {target} had {evidence}", "reverse": "In {year} {evidence} had {target}"}
    from_frame = pairs_from_frame(FACTS, **wording, target="parent", evidence="child", model=BPE)
    for pair, row in zip(from_frame, FACTS.itertuples(), strict=True):
        slots = {"year": row.year}
        one = pair_from_text(**wording, target=row.parent, evidence=row.child, slots=slots, model=BPE)
        assert one == pair and one.fact == f"{row.parent} | {row.child}"
    assert pair_from_text(**wording, target="Bo", evidence="Al", slots={"year": "1"}, fact="f", model=BPE).fact == "f"


def test_several_templates_are_paired_one_by_one_and_a_single_one_with_all() -> None:
    forward = [FORWARD, "{parent} has {child}"]  # the columns' own names will do
    pairs = pairs_from_frame(FACTS, **WORDING | {"forward": forward}, model=BPE, carrier="Fact: ", fact="year")
    assert len(pairs) == 6 and list(pairs.flags["template"]) == [0, 1] * 3
    assert len(pairs.queries) == 9, "the reverse query of a fact is one query, run once"
    assert list(pairs.facts) == ["1990", "1990", "1991", "1991", "1992", "1992"]
    assert not pairs.flags["duplicate_fact"].any(), "another wording of a fact is no duplicate"
    assert "template" not in pairs.report


def test_flags_are_columns_and_counts_and_nothing_is_dropped_unless_asked() -> None:
    facts = pd.concat([FACTS, FACTS[1:2]], ignore_index=True)
    facts.loc[2, "child"] = "Maximilian Bartholomew Dunn"
    unlimited = pairs_from_frame(facts, **WORDING, model=BPE, carrier="Fact: ")
    limit = max(len(query.token_ids) for query in unlimited.queries) - 1
    model = masked(BPE.tokenizer, max_length=limit)
    pairs = pairs_from_frame(facts, **WORDING, model=model, carrier="Fact: ")
    shares = [bool(set(p.forward.target) & set(p.forward.evidence)) for p in pairs]
    long = [max(len(p.forward.token_ids), len(p.reverse.token_ids)) > limit for p in pairs]
    assert shares[0] and not all(shares) and any(long) and not all(long)
    frame = pairs.to_frame().query("direction == 'forward'")
    for name, expected in (("shares_tokens", shares), ("too_long", long), ("duplicate_fact", [False] * 3 + [True])):
        assert list(frame[name]) == expected == list(pairs.flags[name]), name
        assert pairs.report[name] == sum(expected)
    dropped = pairs_from_frame(facts, **WORDING, model=model, carrier="Fact: ", drop=["too_long", "duplicate_fact"])
    keep = ~(np.array(long) | np.array([False] * 3 + [True]))
    assert list(dropped.facts) == list(pairs.facts[keep])
    assert dropped.report["dropped_too_long"] + dropped.report.get("dropped_duplicate_fact", 0) == 4 - keep.sum()


def test_the_begin_token_that_probes_will_add_counts_for_the_length() -> None:
    """A shift-1 masked model (Dream's kind) whose target stands at position 0 runs one token more."""
    wording = {"forward": "{target} : {evidence}", "reverse": "{evidence} : {target}", "allow_different_tokens": True}
    pair = pair_from_text(**wording, target="Bo Hart", evidence="Ann Lee", model=BPE)
    length = len(pair.forward.token_ids)
    module = masked(BPE.tokenizer, max_length=max(length, len(pair.reverse.token_ids))).module
    facts = pd.DataFrame({"target": ["Bo Hart"], "evidence": ["Ann Lee"]})
    for shift, too_long in ((0, False), (1, True)):
        model = ProbedModel(module, BPE.tokenizer, objective="masked", logit_shift=shift)
        assert list(pairs_from_frame(facts, **wording, model=model).flags["too_long"]) == [too_long]


def test_refusals_can_be_dropped_by_name_and_are_counted() -> None:
    facts = pd.DataFrame({"parent": ["Ann Lee", "Sam Lee", "Bo <mask>"], "child": ["Lee", "Max Dunn", "Ann"]})
    with pytest.raises(
        RevprobeError, match=r"row 0: the evidence 'Lee' stands twice .*1 x ambiguous_span, 1 x special"
    ):
        pairs_from_frame(facts, **WORDING, model=BPE, carrier="Fact: ")
    drop = ["ambiguous_span", "special_token"]
    pairs = pairs_from_frame(facts, **WORDING, model=BPE, carrier="Fact: ", drop=drop)
    assert len(pairs) == 1 and pairs.report == {"dropped_ambiguous_span": 1, "dropped_special_token": 1}
    with pytest.raises(RevprobeError, match=r"all 1 pairs were dropped: .'ambiguous_span': 1"):
        pairs_from_frame(facts[:1], **WORDING, model=BPE, carrier="Fact: ", drop="ambiguous_span")


def test_flags_and_dropped_counts_survive_the_file(tmp_path) -> None:
    facts = pd.concat([FACTS, FACTS[1:2]], ignore_index=True)
    pairs = pairs_from_frame(facts, **WORDING, model=BPE, allow_different_tokens=True, drop="duplicate_fact")
    loaded = ReversalPairs.load(pairs.save(tmp_path / "pairs.jsonl"), tokenizer=BPE.tokenizer)
    assert loaded.report == pairs.report and loaded.digest == pairs.digest and list(loaded) == list(pairs)
    pd.testing.assert_frame_equal(loaded.to_frame(), pairs.to_frame())


@pytest.mark.parametrize(
    ("target", "evidence", "forward", "reason", "shown"),
    [
        ("Ann", "Ann Lee", "Fact: {target} has {evidence}", "ambiguous_span", "'ĠAnn', 'ĠLee'"),
        ("Ann", "Bo", "Fact: {target} unlike Ann has {evidence}", "ambiguous_span", "stands twice"),
        ("Calle", "Bo", "Fact: {target}e has {evidence}", "straddling_span", "covers part of the target 'Calle'"),
        ("Bo <mask>", "Ann", "Fact: {target} has {evidence}", "special_token", "'<mask>'"),
    ],
)
def test_a_span_that_cannot_be_told_is_an_error_that_shows_the_tokens(target, evidence, forward, reason, shown) -> None:
    reverse = "Fact: {evidence} has {target}"
    tokenizer = byte_level()
    tokenizer.add_tokens(["lee"])  # one token over the slot's edge
    with pytest.raises(RevprobeError) as caught:
        pair_from_text(forward, reverse, target=target, evidence=evidence, model=masked(tokenizer), carrier="")
    assert caught.value.reason == reason and shown in str(caught.value) and "okens [" in str(caught.value)


def test_a_name_within_a_longer_word_is_not_ambiguous() -> None:
    pairs = pair_from_text(FORWARD, REVERSE, target="Ann", evidence="Annabel", model=BPE, carrier="Fact: ")
    assert BPE.tokenizer.decode(pairs.forward.target) == " Ann"


def test_an_unknown_token_stands_for_too_much() -> None:
    with pytest.raises(RevprobeError, match=r"special or unknown token '\[UNK\]'"):
        pair_from_text(FORWARD, REVERSE, target="日本", evidence="Bo", model=MASKED["WordPiece"])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"forward": "{target} has a child"}, "names the evidence 0 times; expected one slot {evidence}"),
        ({"forward": "{target} {target} has {evidence}"}, "names the target 2 times"),
        ({"forward": "{target}'s {chidl} is {evidence}"}, "unknown slot 'chidl'; the closest is 'child'"),
        ({"forward": "{target} has {}{evidence}"}, "unknown slot ''"),
        ({"forward": "{target}{evidence}"}, "slots {target} and {evidence} touch, so it is ambiguous"),
        ({"forward": "{target!r} has {evidence}"}, "has a format"),
        ({"forward": "{target has {evidence}"}, "write literal braces as {{ and }}"),
        ({"forward": 3}, "forward=3: expected text or a list of texts"),
        ({"reverse": FORWARD}, "opposite orders, the second being reverse"),
        ({"forward": [FORWARD, REVERSE]}, "the same order, both being forward"),
        ({"forward": [FORWARD] * 3, "reverse": [REVERSE] * 2}, "3 forward and 2 reverse templates"),
        ({"forward": []}, "0 forward and 1 reverse"),
        ({"target": "parnet"}, "no column 'parnet' .for target.; the closest is 'parent'"),
        ({"target": "child"}, "column 'child' is both target and evidence"),
        ({"fact": "yaer"}, "no column 'yaer' .for fact.; the closest is 'year'"),
        ({"drop": "shared_tokens"}, "cannot drop 'shared_tokens'; the closest is 'shares_tokens'"),
        ({"drop": "different_tokens", "allow_different_tokens": True}, "both allowed and dropped"),
        ({"carrier": 3}, "carrier=3: expected text"),
    ],
)
def test_what_was_written_wrong_is_named_with_the_nearest_right_thing(change: dict, match: str) -> None:
    with pytest.raises(RevprobeError, match=match.replace("{", "\\{").replace("}", "\\}")):
        pairs_from_frame(FACTS, **WORDING | {"model": BPE} | change)


@pytest.mark.parametrize(
    ("cell", "match"),
    [
        (None, "row 1: column 'parent' is empty"),
        (float("nan"), "row 1: column 'parent' is empty"),
        ("  ", "row 1: column 'parent' is empty"),
        (3.5, r"row 1: column 'parent' holds 3.5 \(float\), expected text; .*astype\(str\)"),
        (["a"], r"row 1: column 'parent' holds \['a'\] \(list\)"),
        (" Ann", r"row 1: column 'parent' holds ' Ann' with blanks around it.*str.strip"),
    ],
)
def test_a_cell_that_is_no_text_is_named_by_row_and_column(cell, match: str) -> None:
    facts = FACTS.astype(object)
    facts.at[1, "parent"] = cell
    with pytest.raises(RevprobeError, match=match):
        pairs_from_frame(facts, **WORDING, model=BPE)


def test_spellings_that_are_read_alike_are_one_fact_twice() -> None:
    """An uncased tokenizer reads "ANN LEE" as "ann lee": the strings differ, what is asked does not."""
    upper = FACTS[1:2].assign(parent="ANN LEE", child="bo hart")
    facts = pd.concat([FACTS, upper, FACTS[2:].assign(child="Max Dun")], ignore_index=True)
    for kind, expected in (("WordPiece", [False] * 3 + [True, False]), ("byte-level", [False] * 5)):
        pairs = pairs_from_frame(facts, **WORDING, model=MASKED[kind], carrier="Fact: ")
        assert list(pairs.flags["duplicate_fact"]) == expected, kind
        assert [pairs[3].forward == pairs[1].forward, pairs[3].reverse == pairs[1].reverse] == [expected[3]] * 2
    dropped = pairs_from_frame(facts, **WORDING, model=MASKED["WordPiece"], carrier="Fact: ", drop="duplicate_fact")
    assert len(dropped) == 4 and dropped.report["dropped_duplicate_fact"] == 1


def test_an_index_that_lacks_values_names_rows_too() -> None:
    """ "boolean value of NA is ambiguous", of pd.NA == 1."""
    for index in (
        pd.Index([0, pd.NA, 2], dtype="Int64"),
        pd.Index([0, np.nan, 2]),
        pd.Index([0, None, 2], dtype=object),
    ):
        assert len(pairs_from_frame(FACTS.set_axis(index), **WORDING, model=BPE, carrier="Fact: ")) == 3
        facts = FACTS.set_axis(index).astype(object)
        facts.iloc[1, 1] = 7
        with pytest.raises(RevprobeError, match=r"^row 1 \(index (<NA>|nan|None)\): column 'child' holds 7"):
            pairs_from_frame(facts, **WORDING, model=BPE)
        with pytest.raises(RevprobeError, match=r"row 1 \(index (<NA>|nan|None)\)"):
            from_table(facts, ("parent", "child"), {"P": "{parent} has {child}", "C": "{child} of {parent}"})


def test_the_row_is_named_by_its_place_and_its_index() -> None:
    facts = FACTS.set_axis(["a", "b", "c"]).astype(object)
    facts.at["c", "child"] = 7
    with pytest.raises(RevprobeError, match=r"row 2 \(index 'c'\): column 'child' holds 7 \(int\)"):
        pairs_from_frame(facts, **WORDING, model=BPE)


def test_only_a_frame_with_rows_and_single_columns_is_read() -> None:
    with pytest.raises(RevprobeError, match=r"frame=.*: expected a DataFrame"):
        pairs_from_frame({"parent": ["a"]}, **WORDING, model=BPE)  # type: ignore[arg-type]
    with pytest.raises(RevprobeError, match="the frame has no rows"):
        pairs_from_frame(FACTS[:0], **WORDING, model=BPE)
    with pytest.raises(RevprobeError, match="has 2 columns 'parent'"):
        read_rows(FACTS.rename(columns={"year": "parent"}), {"target": "parent", "evidence": "child"})


def test_a_model_without_character_offsets_says_how_to_get_them() -> None:
    class Slow:
        is_fast = False
        mask_token_id = 0

    for tokenizer, match in ((None, "has no tokenizer, so text cannot"), (Slow(), "Slow has no character offsets")):
        model = ProbedModel(BPE.module, tokenizer, objective="masked")
        with pytest.raises(RevprobeError, match=match):
            pairs_from_frame(FACTS, **WORDING, model=model)


def test_a_text_the_tokenizer_fails_on_is_named() -> None:
    """The letters tokenizer has no unknown token: it raises, and the error must say on which text."""
    model = ProbedModel(RaddForMaskedLM(RaddConfig()), letter_tokenizer(), objective="masked")
    facts = pd.DataFrame({"target": ["d", "é"], "evidence": ["D", "E"]})
    wording = {"forward": "{target}0{evidence}", "reverse": "{evidence}0{target}", "model": model}
    with pytest.raises(RevprobeError, match="the tokenizer fails on 'é0E'"):
        pairs_from_frame(facts, **wording)
    pair = pairs_from_frame(facts[:1], **wording)[0]
    assert (pair.forward.token_ids, pair.forward.target_positions, pair.reverse.target_positions) == (
        (4, 0, 30),
        (0,),
        (2,),
    )


def test_the_frame_shows_token_by_token_what_is_asked_blanks_and_bytes_included() -> None:
    """`Ann` and ` Ann` are different tokens and must not look alike; bytes of one character are joined to read."""
    facts = pd.DataFrame({"target": ["Ann Lee"], "evidence": ["日"]})
    pairs = pairs_from_frame(
        facts, forward="Fact: {target} : {evidence}", reverse="Fact: {evidence} : {target}", model=BPE
    )
    row = pairs.to_frame().iloc[0]
    assert "[␣Ann] [␣Lee]" in row["query"] and row["query"].endswith("{日(1/3)} {日(2/3)} {日(3/3)}")
    assert (row["target"], row["evidence"], row["direction"]) == ("Ann Lee", "日", "forward")
    start = pairs_from_frame(
        facts, forward="{target} : {evidence}", reverse="{evidence} : {target}", model=BPE, allow_different_tokens=True
    )
    assert "␣Ann" not in start.to_frame()["query"][0]


def test_sentence_piece_blanks_show_too() -> None:
    pairs = pairs_from_frame(FACTS, **WORDING, model=MASKED["Unigram"])
    assert "{␣" in pairs.to_frame()["query"][0] and "▁" not in pairs.to_frame()["query"][0]


def test_the_notebook_table_escapes_text_and_colours_both_parts() -> None:
    facts = pd.DataFrame({"target": ["<b>Ann</b>"], "evidence": ["Bo"]})
    pairs = pairs_from_frame(
        facts, forward="Fact: {target} : {evidence}", reverse="Fact: {evidence} : {target}", model=BPE
    )
    shown = pairs._repr_html_()
    assert "<b>" not in shown and "&lt;b" in shown
    assert shown.count("background:#E69F00") == 1 + 2 * len(pairs[0].forward.target)


def test_text_pairs_pass_through_all_three_probes() -> None:
    """Multi-token targets of different lengths, in one batch, on both kinds of model."""
    for model in (BPE, CAUSAL, MASKED["WordPiece"]):
        readings = probe(model, pairs_from_frame(FACTS, **WORDING, model=model, carrier="Fact: "))
        assert all(reading.n > 0 for reading in readings), readings


def test_summaries_can_be_split_by_flag() -> None:
    """Flags stand in every probe's frame: the part of the flagged pairs is their own reading."""
    pairs = pairs_from_frame(FACTS, **WORDING, model=BPE, carrier="Fact: ")
    flagged = np.asarray(pairs.flags["shares_tokens"], dtype=bool)
    for reading in probe(BPE, pairs, control=False):
        assert reading.frame.groupby("pair").shares_tokens.first().to_list() == flagged.tolist()
        parts = reading.summary(by="shares_tokens").set_index("shares_tokens")
        assert set(parts.index) == set(flagged.tolist())
    frame = reading.frame[reading.frame.direction == "reverse"]
    for flag, part in frame.groupby("shares_tokens"):
        assert parts.value[flag] == pytest.approx(part.probability.mean())


def test_the_carrier_example_runs_and_counts(root: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """On a table of the published file's shape: all pairs break without a carrier, none with it."""
    example = runpy.run_path(str(root / "examples" / "carrier_check.py"))
    FACTS.to_csv(tmp_path / "facts.csv", index=False)
    monkeypatch.setattr(sys, "argv", ["carrier_check.py", str(tmp_path / "facts.csv"), "--merges", "500"])
    example["main"]()
    every_row = [line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("every row")]
    assert [("3 (100.0%)" in line, "0 (0.0%)" in line) for line in every_row] == [(True, False)] + [(False, True)] * 2


def test_droppable_names_are_pinned() -> None:
    """A new flag or reason is a decision: it is written here, and in the docstring."""
    assert text_pairs.DROPPABLE == (
        "ambiguous_span",
        "straddling_span",
        "unreadable_span",
        "special_token",
        "different_tokens",
        "shares_tokens",
        "too_long",
        "duplicate_fact",
    )
    assert all(name in str(pairs_from_frame.__doc__) for name in text_pairs.DROPPABLE)
