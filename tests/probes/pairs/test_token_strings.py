"""Pairs carry the strings of their token ids, and no model that calls one of them otherwise gives a number."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

import revprobe as rp
from revprobe.finetune.pretraining.layouts import train_tokenizer
from revprobe.probes.fused import PROBES
from revprobe.probes.pairs.token_strings import joined_strings, token_strings
from tiny import FIXTURES, drawn, radd, text_like_pairs

WORDING: dict[str, Any] = {
    "forward": "{target}'s child is {evidence}",
    "reverse": "{evidence}'s parent is {target}",
    "target": "parent",
    "evidence": "child",
}
FACTS = pd.DataFrame([("Ann Hale", "Cy Dorn"), ("Bo Hale", "Di Vey")], columns=["parent", "child"])
TEXTS = ["Fact: Ann Hale's child is Cy Dorn", "Fact: Di Vey's parent is Bo Hale", "the world is wide and old"]
SPECIAL = {"unk_token": "<unk>", "mask_token": "<mask>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}


def byte_level(texts: list[str]) -> PreTrainedTokenizerFast:
    """As GPT-2 has it: a blank is the Ġ of the token behind it."""
    return train_tokenizer(texts, vocabulary=320)


def _fast(model: Any, trainer: Any, texts: list[str], split: Any, decoder: Any) -> PreTrainedTokenizerFast:
    backend = Tokenizer(model)
    backend.pre_tokenizer, backend.decoder = split, decoder
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)


def sentencepiece(texts: list[str]) -> PreTrainedTokenizerFast:
    """Unigram pieces, a blank the ▁ of the piece behind it."""
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=list(SPECIAL.values()), unk_token="<unk>")
    return _fast(models.Unigram(), trainer, texts, pre_tokenizers.Metaspace(), decoders.Metaspace())


def wordpiece(texts: list[str]) -> PreTrainedTokenizerFast:
    """As BERT has it: ## before what goes on with a word."""
    trainer = trainers.WordPieceTrainer(vocab_size=45, special_tokens=list(SPECIAL.values()))
    model = models.WordPiece(unk_token="<unk>")
    return _fast(model, trainer, texts, pre_tokenizers.BertPreTokenizer(), decoders.WordPiece())


TOKENIZERS = {"byte-level": byte_level, "sentencepiece": sentencepiece, "wordpiece": wordpiece}


def bert(tokenizer: Any, *, rows: int = 400) -> rp.ProbedModel:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    module = drawn(lambda: BertForMaskedLM(BertConfig(vocab_size=rows, **sizes)))
    named = {"objective": "masked", "mask_token_id": None if tokenizer is not None else 1}
    return rp.ProbedModel(module, tokenizer, **named, name="tiny BERT")


def pairs_for(model: rp.ProbedModel) -> rp.ReversalPairs:
    return rp.pairs_from_frame(FACTS, **WORDING, model=model, carrier="Fact: ")


# ---- the string of an id ----


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_strings_are_the_vocabularys_own(name: str) -> None:
    """By the vocabulary the other way round, for the ids in use and no others."""
    tokenizer = TOKENIZERS[name](TEXTS)
    pairs = pairs_for(bert(tokenizer))
    vocabulary = {token: text for text, token in tokenizer.get_vocab().items()}
    used = {token for query in pairs.queries for token in query.token_ids}
    assert pairs.tokens == {token: vocabulary[token] for token in used} and len(used) < len(vocabulary)
    mark = {"byte-level": "Ġ", "sentencepiece": "▁", "wordpiece": "##"}[name]
    assert any(mark in text for text in pairs.tokens.values())


def test_ids_that_a_tokenizer_does_not_know_have_no_string() -> None:
    """Also where it raises instead of saying so, as sentencepiece does; and bytes are kept one by one."""

    class Piece:
        def convert_ids_to_tokens(self, ids: Any) -> Any:
            if isinstance(ids, list):
                return [self.convert_ids_to_tokens(one) for one in ids]
            return [b"\xc3", "a", "b"][ids]

    assert token_strings(Piece(), [0, 2, 7]) == {0: "\xc3", 2: "b"}
    assert token_strings(byte_level(TEXTS), [5, 10**6, 10**12, -1]).keys() == {5}
    assert token_strings(object(), [0]) == token_strings(None, [0]) == {}


# ---- another vocabulary is refused ----


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_model_of_another_vocabulary_is_refused_with_the_first_id(name: str) -> None:
    """One trained on the same texts and others: most ids are in range, and any of them would give numbers."""
    made, other = TOKENIZERS[name](TEXTS), TOKENIZERS[name](["zu zug zaun", *TEXTS, "zu zaun und zug"])
    model, pairs = bert(other), pairs_for(bert(made))
    theirs, ours = ({i: text for text, i in t.get_vocab().items()} for t in (other, made))
    first = min(i for q in pairs.queries for i in q.token_ids if theirs.get(i) != ours[i])
    with pytest.raises(rp.RevprobeError) as refused:
        rp.probe(model, pairs)
    said = str(refused.value)
    assert f"token id {first} is {ours[first]!r} in these pairs" in said and "make them with model= this one" in said
    assert (f"{theirs[first]!r} to the tokenizer of tiny BERT" if first in theirs else "no token of the") in said
    assert rp.probe(bert(made), pairs)[0].meta["tokens"] == "checked"


def test_letters_of_a_larger_alphabet_are_other_ids() -> None:
    """'A' is 27 of 26 letters and 41 of 40: the same texts, another model's ids, all of them in its vocabulary."""
    tokenizer = rp.letter_tokenizer(40)
    config = rp.RaddConfig(d_model=16, vocab_size=len(tokenizer), mask_token_id=tokenizer.mask_token_id)
    large = rp.ProbedModel(drawn(lambda: rp.RaddForMaskedLM(config)), tokenizer, objective="masked")
    theirs = {token: text for text, token in tokenizer.get_vocab().items()}[27]
    pairs = rp.letter_pairs(4, model=radd())
    with pytest.raises(rp.RevprobeError, match=f"token id 27 is 'A' in these pairs and '{theirs}' to"):
        rp.probe(large, pairs)


def _each_probe(model: rp.ProbedModel, pairs: rp.ReversalPairs) -> dict[str, Callable[[], object]]:
    return {
        "fused": lambda: rp.probe(model, pairs),
        **{name: lambda name=name: rp.probe(model, pairs, only=[name]) for name in PROBES},
        "attention alone": lambda: rp.probe_attention_correlation(model, pairs),
        "gradient alone": lambda: rp.probe_gradient_cosine(model, pairs, cross=True),
        "probability alone": lambda: rp.probe_reverse_probability(model, pairs),
        "storage": lambda: rp.probe_stored_evidence(model, pairs),
        "route edit": lambda: rp.probe_route_edit(model, pairs),
        "gradients of S": lambda: rp.storage_gradient_cosines(model, pairs),
        "one pair": lambda: rp.token_contributions(model, pairs[0]),
        "a list of pairs": lambda: rp.probe(model, list(pairs)),
    }


@pytest.mark.parametrize("name", _each_probe(radd(), rp.letter_pairs(4, model=radd())))
def test_every_probe_checks_before_the_model_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs = radd(), rp.letter_pairs(4, model=radd())
    vocabulary = rp.letter_tokenizer().get_vocab()
    exchanged = dict(vocabulary, a=vocabulary["b"], b=vocabulary["a"])
    backend = Tokenizer(models.WordLevel(exchanged, unk_token="<unk>"))
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    ran: list[int] = []
    model.module.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(rp.RevprobeError, match=r"token id 1 is 'a' in these pairs and 'b' to the tokenizer"):
        _each_probe(model, pairs)[name]()
    assert not ran


# ---- what does not matter, and what cannot be told ----


def test_added_and_unused_tokens_do_not_matter() -> None:
    """An id that no pair uses may be called anything; new ones at the end too."""
    tokenizer = byte_level(TEXTS)
    pairs = pairs_for(bert(tokenizer))
    used = set(pairs.tokens)
    state = tokenizer.backend_tokenizer
    grown = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(state.to_str()), mask_token="<mask>")
    grown.add_tokens(["<new>", "<newer>"])
    vocabulary = tokenizer.get_vocab()
    one, other = [text for text, token in sorted(vocabulary.items()) if token not in used and "<" not in text][:2]
    words = dict(vocabulary) | {one: vocabulary[other], other: vocabulary[one]}
    moved = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words)), mask_token="<mask>")
    for accepted in (grown, moved):
        assert rp.probe_reverse_probability(bert(accepted), pairs).meta["tokens"] == "checked"


def test_a_model_without_a_tokenizer_is_accepted_with_a_note() -> None:
    pairs = pairs_for(bert(byte_level(TEXTS)))
    reading = rp.probe_reverse_probability(bert(None), pairs)
    assert reading.meta["tokens"] == "not checked: the model has no tokenizer"
    assert np.isfinite(reading.value)


def test_pairs_of_version_0_1_keep_their_digest_and_are_accepted_with_a_note() -> None:
    """A tokenizer given to show them says nothing about how they were made."""
    model = rp.load_model(FIXTURES / "v0_1" / "tiny-sweep" / "rope-l4-s0")
    old = rp.ReversalPairs.load(FIXTURES / "v0_1" / "pairs.jsonl", tokenizer=model.tokenizer)
    reading = rp.probe_reverse_probability(model, old)
    assert old.tokens == {} and old.digest == "fc6999dc802ac906"
    assert reading.meta["tokens"] == "not checked: the pairs do not say what their token ids are"
    ids = rp.probe_reverse_probability(radd(), text_like_pairs())
    assert ids.meta["tokens"] == "not checked: the pairs do not say what their token ids are"


def test_ids_that_pairs_leave_open_are_counted() -> None:
    model = radd()
    known = rp.letter_pairs(4, model=model, placements="mirror")[:1]
    more = rp.ReversalPair(rp.Query([2, 28, 54, 0], [0], [1]), rp.Query([28, 2, 54, 0], [1], [0]), fact="b")
    both = rp.ReversalPairs.from_pairs([*known, more])
    assert rp.probe_reverse_probability(model, both).meta["tokens"] == (
        "not checked: 1 of 6 token ids, which the pairs leave open"
    )


# ---- what is made of pairs keeps them ----


def kept(pairs: rp.ReversalPairs) -> bool:
    """Whether a model of another vocabulary is still refused."""
    model = bert(byte_level(["zu zug zaun", *TEXTS, "zu zaun und zug"]))
    with pytest.raises(rp.RevprobeError, match="in these pairs and"):
        rp.probe_reverse_probability(model, pairs)
    return True


def test_they_survive_slicing_filtering_joining_and_the_disk(tmp_path: Path) -> None:
    model = bert(byte_level(TEXTS))
    pairs = pairs_for(model)
    again = rp.ReversalPairs.load(pairs.save(tmp_path / "pairs.jsonl"))
    parts = {
        "slice": pairs[1:],
        "take": pairs.take(np.array([0])),
        "filter": rp.ReversalPairs.from_pairs(pair for pair in pairs if pair.fact.startswith("Ann")),
        "join": rp.ReversalPairs.from_pairs([*pairs, *pairs[:1]]),
        "file": again,
        "file, then filter": rp.ReversalPairs.from_pairs(list(again)[:1]),
        "from text": rp.ReversalPairs.from_pairs(
            [rp.pair_from_text(WORDING["forward"], WORDING["reverse"], target="Ann Hale", evidence="Cy Dorn",
                               model=model, carrier="Fact: ")]
        ),
    }  # fmt: skip
    assert all(kept(part) for part in parts.values())
    assert again.tokens == pairs.tokens and rp.probe(model, again)[0].meta["tokens"] == "checked"


def test_relations_keep_them_through_groups_of_wordings_and_kinds() -> None:
    relation = rp.invented_names(rows=(0, 20))
    tokenizer = train_tokenizer([t for way in ("P2C", "C2P") for t in relation.training_texts(way)], vocabulary=500)
    model = bert(tokenizer, rows=600)
    for kind in ("same_target", "swapped"):
        pairs = relation.pairs(model, "P2C", kind=kind)
        used = {token for query in pairs.queries for token in query.token_ids}
        assert used <= set(pairs.tokens) and kept(pairs)


def test_pairs_of_two_vocabularies_are_not_put_together() -> None:
    one, other = (pairs_for(bert(byte_level(texts))) for texts in (TEXTS, ["zu zug zaun", *TEXTS, "zu zaun und zug"]))
    with pytest.raises(rp.RevprobeError, match="they were made with different tokenizers"):
        rp.ReversalPairs.from_pairs([*one, *other])
    assert joined_strings([one.tokens, dict(one.tokens)]) == one.tokens


def test_they_do_not_enter_the_digest() -> None:
    model = radd()
    pairs = rp.letter_pairs(4, model=model, placements="grid")
    bare = rp.ReversalPairs(pairs.queries, pairs.forward, pairs.reverse, pairs.facts)
    assert bare.tokens == {} and bare.digest == pairs.digest and list(bare) == list(pairs)


# ---- a causal model is asked for what comes last ----


def test_pairs_made_for_a_masked_model_say_so_to_a_causal_one_before_it_runs() -> None:
    causal = rp.ProbedModel(drawn(rp.one_layer_gpt2), rp.letter_tokenizer(), objective="causal", name="arm")
    pairs = rp.letter_pairs(4, model=radd(), placements="mirror")
    ran: list[int] = []
    causal.module.register_forward_pre_hook(lambda *_: ran.append(1))
    for name in PROBES:
        with pytest.raises(rp.RevprobeError) as refused:
            rp.probe(causal, pairs, only=[name])
        said = str(refused.value)
        assert "156 of 156 pairs (kind 'same_target') have a target before its evidence" in said
        assert "pairs of kind 'swapped'" in said and "rp.pairs_from_frame(..., model=)" in said
    with pytest.raises(rp.RevprobeError, match="target before its evidence"):
        rp.probe_route_edit(causal, pairs)
    assert not ran
    assert torch.isfinite(torch.tensor([r.value for r in rp.probe(causal, rp.letter_pairs(4, model=causal))])).all()


def test_text_pairs_of_a_masked_model_too_and_what_both_ask_last_is_accepted() -> None:
    """By position, not by name: two wordings that both name the evidence first are a causal model's to answer."""
    tokenizer = byte_level(TEXTS)
    module = drawn(lambda: rp.one_layer_gpt2(400))
    causal = rp.ProbedModel(module, tokenizer, objective="causal")
    masked = rp.ReversalPairs.from_pairs(list(pairs_for(bert(tokenizer))))
    with pytest.raises(rp.RevprobeError, match="2 of 2 pairs"):
        rp.probe(causal, masked)
    assert rp.probe_reverse_probability(causal, text_like_pairs()).n == 6
    assert rp.probe_reverse_probability(causal, pairs_for(causal)).n == 2


@pytest.mark.parametrize("mark", ["\u2028", "\x85", "\x0c", "\x1d"])
def test_a_line_of_a_file_of_pairs_ends_at_a_line_feed_alone(mark: str, tmp_path: Path) -> None:
    """Names from Wikipedia hold such characters, and JSON leaves them as they are."""
    pairs = rp.ReversalPairs.from_pairs(
        [
            rp.ReversalPair(rp.Query([1, 2, 3], [0], [2]), rp.Query([3, 2, 1], [2], [0]), fact=f"Ann{mark}Hale{n}")
            for n in (0, 1)
        ]
    )
    assert rp.ReversalPairs.load(pairs.save(tmp_path / "pairs.jsonl")).facts.tolist() == pairs.facts.tolist()
