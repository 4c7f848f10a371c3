"""Ranks among candidates against a slow loop: one candidate, one run, one token at a time."""

import copy
import json
import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from transformers import PreTrainedTokenizerFast

import revprobe as rp
from revprobe import ProbedModel, Reading, RevprobeError, rank_candidates
from revprobe.finetune.config.finetuning import TinyModel
from revprobe.finetune.pretraining.layouts import train_tokenizer, untrained
from revprobe.probes.decoding import continuations
from revprobe.probes.decoding.candidates import UNWRITABLE
from revprobe.probes.decoding.exact_match import TOO_LONG, AnswerBook
from revprobe.relations.evaluation import rank_relation
from tiny import drawn, in_blocks, word_tokenizer

RELATION = rp.invented_names(rows=(60, 69), heldout=0.25)
ASKED = RELATION.questions("P2C", split="train") + RELATION.questions("P2C", reverse=True, split="train")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    names = [f" {name}" for column in RELATION.columns for name in RELATION.table[column]]
    return train_tokenizer([*RELATION.training_texts("P2C"), *RELATION.training_texts("C2P"), *names], 330)


def model(layout: str, tokenizer: PreTrainedTokenizerFast) -> ProbedModel:
    config = TinyModel(layout=layout, d_model=16, n_heads=2)  # type: ignore[arg-type]
    module = drawn(lambda: untrained(config, tokenizer), scale=0.3)
    masked = layout != "llama"
    return ProbedModel(module, tokenizer, objective="masked" if masked else "causal", name=layout)


def slow_score(model: ProbedModel, prompt: str, text: str, canvas: int) -> float:
    """The log-probability of one candidate, from the module's own logits, in a loop over its tokens."""
    tokenizer: Any = model.tokenizer
    before = tokenizer(prompt)["input_ids"]
    answer = tokenizer(f"{prompt} {text}")["input_ids"][len(before) :]
    ends = ends_of(tokenizer)
    causal = model.objective == "causal"
    row = [*answer, ends] if causal else [*answer, *[ends] * (canvas - len(answer))]
    return token_score(model, before, row)


def answers_of(direction: str) -> list[str]:
    """All answers to the questions of a direction."""
    return list(dict.fromkeys(text for one in ASKED if one.direction == direction for text in one.answers))


def ends_of(tokenizer: Any) -> tuple[int, ...]:
    """Whatever ends an answer: any of them, where a text ends."""
    named = (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.sep_token_id)
    return tuple({token for token in named if token is not None})


def token_score(model: ProbedModel, before: list[int], row: list[Any]) -> float:
    """The log-probability of tokens behind others, or of any of several, hidden all at once in a masked model."""
    tokenizer: Any = model.tokenizer
    causal = model.objective == "causal"
    row = [token if isinstance(token, tuple) else (token,) for token in row]
    shown = [*before, *([any_of[0] for any_of in row] if causal else [tokenizer.mask_token_id] * len(row))]
    with torch.no_grad():
        logits = model.module(input_ids=torch.tensor([shown])).logits[0].double()
    total = 0.0
    for place, any_of in enumerate(row):
        own = logits[len(before) + place - model.logit_shift].numpy()
        kept = own if causal else np.delete(own, tokenizer.mask_token_id)
        total += math.log(np.exp(own[list(any_of)] - kept.max()).sum() / np.exp(kept - kept.max()).sum())
    return total


def bert(words: list[str]) -> ProbedModel:
    tokenizer = word_tokenizer(words, special=("unk", "sep", "pad", "mask"))
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    module = drawn(lambda: transformers.BertForMaskedLM(config), scale=0.3)
    return ProbedModel(module, tokenizer, objective="masked", mask_token_id=tokenizer.mask_token_id)


def phi(words: list[str]) -> ProbedModel:
    """A causal model whose output has a bias."""
    tokenizer = word_tokenizer(words)
    config = transformers.PhiConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    return ProbedModel(drawn(lambda: transformers.PhiForCausalLM(config), scale=0.3), tokenizer, objective="causal")


@pytest.mark.parametrize("layout", ["llada", "dream", "llama"])
def test_ranks_are_those_of_a_slow_loop(layout: str, tokenizer: PreTrainedTokenizerFast) -> None:
    probed = model(layout, tokenizer)
    reading = rank_candidates(probed, ASKED, batch_size=5)
    canvas = reading.meta["ranking"]["max_new_tokens"]
    assert canvas == AnswerBook(probed, ASKED).limit
    for row, question in zip(reading.frame.to_dict("records"), ASKED, strict=True):
        own = [a for q in ASKED if q.direction == question.direction for a in q.answers]
        scores = {text: slow_score(probed, question.prompt, text, canvas) for text in dict.fromkeys(own)}
        right = max(scores[answer] for answer in question.answers)
        ahead = [text for text, score in scores.items() if text not in question.answers and score >= right]
        assert row["rank"] == 1 + len(ahead)
        assert row["candidates"] == len(scores) and row["accepted"] == len(question.answers)
        assert row["log_probability"] == pytest.approx(right, abs=1e-4)
        assert row["best"] == max(scores, key=lambda text: scores[text])
        assert row["best_log_probability"] == pytest.approx(max(scores.values()), abs=1e-4)
        assert (row["first"], row["reciprocal_rank"]) == (float(not ahead), 1 / row["rank"])
    assert reading.value == reading.frame["first"].mean()
    measures = reading.measures().set_index("measure")["value"]
    assert measures["mean_reciprocal_rank"] == pytest.approx(reading.frame["reciprocal_rank"].mean())
    assert reading.frame["rank"].nunique() > 3, "the test needs ranks that differ"


def told_ends(probed: ProbedModel, **named: str | None) -> ProbedModel:
    """The model with other tokens that end a text; its own config names none."""
    tokenizer = copy.deepcopy(probed.tokenizer)
    for name, token in named.items():
        setattr(tokenizer, name, token)
    probed.module.config.eos_token_id = None
    if hasattr(probed.module, "generation_config"):
        probed.module.generation_config.eos_token_id = None
    mask = probed.tokenizer.mask_token_id
    return ProbedModel(probed.module, tokenizer, objective=probed.objective, mask_token_id=mask)


@pytest.mark.parametrize("layout", ["llada", "dream", "llama"])
@pytest.mark.parametrize("ends", [("eos",), ("sep", "pad"), ("eos", "sep", "pad")], ids=", ".join)
def test_an_answer_ends_by_any_token_that_ends_decoding(
    layout: str, ends: tuple[str, ...], tokenizer: PreTrainedTokenizerFast
) -> None:
    """BERT writes [SEP] behind an answer, and has no eos: scored by its [PAD], wrong answers stood ahead."""
    names = {"eos": tokenizer.eos_token, "pad": tokenizer.pad_token, "sep": tokenizer.convert_ids_to_tokens(40)}
    named = {f"{role}_token": names[role] if role in ends else None for role in names}
    probed = told_ends(model(layout, tokenizer), **named)
    assert len(ends_of(probed.tokenizer)) == len(ends)
    questions = ASKED[::4]
    reading = rank_candidates(probed, questions)
    canvas = reading.meta["ranking"]["max_new_tokens"]
    for row, question in zip(reading.frame.to_dict("records"), questions, strict=True):
        own = [answer for q in questions if q.direction == question.direction for answer in q.answers]
        scores = {text: slow_score(probed, question.prompt, text, canvas) for text in dict.fromkeys(own)}
        assert row["log_probability"] == pytest.approx(max(scores[one] for one in question.answers), abs=1e-4)
        assert row["best_log_probability"] == pytest.approx(max(scores.values()), abs=1e-4)


def test_candidates_of_one_length_need_no_end_and_longer_room_adds_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    probed = told_ends(model("llada", tokenizer), eos_token=None, pad_token=None)
    other: Any = probed.tokenizer
    by_length: dict[int, list[str]] = {}
    for answer in {answer for one in ASKED for answer in one.answers}:
        by_length.setdefault(len(other(f" {answer}")["input_ids"]), []).append(answer)
    size, names = max(by_length.items(), key=lambda item: len(item[1]))
    question = replace(ASKED[0], answers=(names[0],))
    (row,) = rank_candidates(probed, [question], names, max_new_tokens=size + 2).frame.to_dict("records")
    before = other(question.prompt)["input_ids"]
    canvas = [*before, *[other.mask_token_id] * (size + 2)]
    with torch.no_grad():
        logits = probed.module(input_ids=torch.tensor([canvas])).logits[0].double()
    logits[:, other.mask_token_id] = -torch.inf
    answer = other(f"{question.prompt} {names[0]}")["input_ids"][len(before) :]
    own = sum(float(logits[len(before) + n].log_softmax(-1)[token]) for n, token in enumerate(answer))
    assert row["log_probability"] == pytest.approx(own, abs=1e-4)
    longer = [next(text for length, texts in by_length.items() if length != size for text in texts)]
    with pytest.raises(RevprobeError, match="has no end token, so candidates of"):
        rank_candidates(probed, [question], longer)


@pytest.mark.parametrize("made", [bert, phi])
def test_what_the_tokenizer_does_not_know_is_no_candidate(made: Any) -> None:
    """All unknown names are one token: where that is likely, whichever of them was asked for ranked first."""
    names = ["Bo", "Cy", "Di", "Ed Fox"]
    probed = made(["Ann", "Bea", "Cid", "Dot", "has", "child", *" ".join(names).split()])
    with torch.no_grad():
        probed.module.get_output_embeddings().bias[probed.tokenizer.unk_token_id] += 10
    asked = [replace(ASKED[0], prompt=f"{name} has child", fact=name) for name in ("Ann", "Bea", "Cid")]
    known = [replace(one, answers=(name,)) for one, name in zip(asked, names[1:], strict=True)]
    plain = rank_candidates(probed, known, names)
    unknown = [replace(asked[0], answers=("Zed",)), replace(asked[1], answers=("Cy", "Cy Zed")), known[2]]
    reading = rank_candidates(probed, unknown, [*names, "Di Zed", ("Ed Fox", "Edward Fox")])
    kept = ["rank", "best", "log_probability", "candidates"]
    pd.testing.assert_frame_equal(reading.frame[kept][2:], plain.frame[kept][2:])
    assert np.isnan(reading.frame["rank"][0]) and reading.frame["reason"].tolist() == [UNWRITABLE, "", ""]
    assert reading.undefined[UNWRITABLE] == 1 and not reading.frame["best"].str.contains("Zed").any()
    counts = {"count": 4, "left_out": 0, "texts": 4, "unwritable": 3}
    assert reading.meta["candidates"][ASKED[0].direction] == counts
    assert "unwritable" not in plain.meta["candidates"][ASKED[0].direction]
    nothing = rank_candidates(probed, unknown[:1])
    assert nothing.undefined[UNWRITABLE] == 1 and nothing.meta["candidates"][ASKED[0].direction]["count"] == 0


@pytest.mark.parametrize("layout", ["llada", "llama"])
def test_the_control_ranks_the_same_answers_where_another_fact_is_asked(
    layout: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Of two questions each is the other's partner, so that there is one rank that the control can be."""
    probed = model(layout, tokenizer)
    said = {direction: answers_of(direction) for direction in ("P2C", "C2P")}
    seen = set()
    for own, other in pairwise(ASKED):
        if own.direction != other.direction or {*own.answers} & {*other.answers} or own.prompt == other.prompt:
            continue
        frame = rank_candidates(probed, [own, replace(other, template=own.template)], said).frame
        asked = [replace(own, prompt=other.prompt), replace(other, prompt=own.prompt)]
        for row, question in zip(frame.itertuples(), asked, strict=True):
            wanted = rank_candidates(probed, [question], said, control=False).frame["rank"][0]
            assert (row.first_control, row.reciprocal_rank_control) == (wanted == 1, 1 / wanted)
            seen.add((row.rank, wanted))
    assert len(seen) > 4 and any(own != wanted for own, wanted in seen)
    assert rank_candidates(probed, ASKED).frame["first_control"].notna().all()
    without = rank_candidates(probed, ASKED, control=False)
    assert without.control is None and "first_control" not in without.frame


def test_no_control_names_the_right_entity_in_other_words(tokenizer: PreTrainedTokenizerFast) -> None:
    """Two facts about one entity, asked in other wordings, share no answer: the candidates say that they do."""
    probed = model("llada", tokenizer)
    names = list(dict.fromkeys(answer for one in ASKED for answer in one.answers))[:3]
    said = [(name, f"{name} {names[0].split()[0]}") for name in names]
    alike = [one for one in ASKED if one.direction == ASKED[0].direction]
    prompts = dict.fromkeys(one.prompt for one in alike)  # questions of one prompt are no control of each other either
    said_of = zip(prompts, [text for forms in said for text in forms], strict=False)
    questions = [replace(alike[0], prompt=prompt, answers=(text,), fact=text, template=0) for prompt, text in said_of]
    assert len(questions) == 6
    entity = [place // 2 for place in range(6)]
    every = [[replace(one, prompt=other.prompt) for other in questions] for one in questions]
    ranks = [rank_candidates(probed, row, said, control=False).frame["rank"].to_numpy() for row in every]
    told = 0
    for seed in range(12):
        frame = rank_candidates(probed, questions, said, seed=seed).frame
        for place, value in enumerate(frame["reciprocal_rank_control"]):
            apart = {1 / ranks[place][other] for other in range(6) if entity[other] != entity[place]}
            alike = {1 / ranks[place][other] for other in range(6) if entity[other] == entity[place]} - apart
            assert value in apart, "the right entity is asked about in other words"
            told += len(alike)
    assert told, "every question of one's own entity ranks its answers as others do, so that nothing was told"


def test_further_candidates_and_those_that_do_not_fit(tokenizer: PreTrainedTokenizerFast) -> None:
    probed = model("llada", tokenizer)
    questions = [*ASKED[:3], replace(ASKED[3], answers=("Xyzzyx Qwertzuiopas",))]
    alone, more = rank_candidates(probed, questions), rank_candidates(probed, questions, ["Zed", "Ann Low", "ann  low"])
    assert (more.frame["candidates"] - alone.frame["candidates"]).tolist() == [2] * 4, "one name twice is one"
    per_direction = rank_candidates(probed, ASKED, {"C2P": ["Zed"]}).meta["candidates"]
    plain = rank_candidates(probed, ASKED).meta["candidates"]
    assert per_direction["C2P"]["count"] == plain["C2P"]["count"] + 1
    assert per_direction["P2C"] == plain["P2C"]
    tokens = {answer: len(tokenizer(f" {answer}")["input_ids"]) for q in questions for answer in q.answers}
    short = rank_candidates(probed, questions, max_new_tokens=min(tokens.values()))
    fits = [any(tokens[a] <= min(tokens.values()) for a in q.answers) for q in questions]
    assert short.frame["rank"].notna().tolist() == fits and not all(fits)
    assert short.undefined[TOO_LONG] == fits.count(False)
    assert short.meta["candidates"]["P2C"]["left_out"] > 0


def test_texts_of_one_entity_are_one_candidate(tokenizer: PreTrainedTokenizerFast) -> None:
    """By a slow loop: an entity is as likely as its likeliest text, counts once, and is right by any of them."""
    probed = model("llada", tokenizer)
    names = list(dict.fromkeys(answer for one in ASKED for answer in one.answers))[:6]
    tails = [f"{name} {names[0].split()[0]}" for name in names]
    questions = [replace(ASKED[0], answers=(name,), fact=name, template=i) for i, name in enumerate(names[:4])]
    groups = [(name, tail, f" {tail.upper()} ") for name, tail in zip(names, tails, strict=True)]
    reading = rank_candidates(probed, questions, [*groups, "Zed", tails[5]])
    canvas = reading.meta["ranking"]["max_new_tokens"]
    texts = {text: place for place, group in enumerate([*zip(names, tails, strict=True), ("Zed",)]) for text in group}
    for question, row in zip(questions, reading.frame.to_dict("records"), strict=True):
        scores = {text: slow_score(probed, question.prompt, text, canvas) for text in texts}
        best = [max(scores[text] for text, own in texts.items() if own == place) for place in range(7)]
        own = texts[question.answers[0]]
        assert row["rank"] == 1 + sum(score >= best[own] for place, score in enumerate(best) if place != own)
        assert (row["candidates"], row["accepted"]) == (7, 1)
        assert row["log_probability"] == pytest.approx(best[own], abs=1e-4)
        assert row["best"] == max(scores, key=lambda text: scores[text])
    assert reading.meta["candidates"]["P2C"] == {"count": 7, "left_out": 0, "texts": 13}
    apart = rank_candidates(probed, questions, [*names, *tails, "Zed"])
    assert (apart.frame["candidates"] == 13).all()
    short = rank_candidates(
        probed, questions, groups, max_new_tokens=min(len(tokenizer(f" {n}")["input_ids"]) for n in names)
    )
    assert short.meta["candidates"]["P2C"]["texts"] < 13 and short.meta["candidates"]["P2C"]["left_out"] >= 0


def test_a_relations_wordings_name_one_entity_once(tokenizer: PreTrainedTokenizerFast) -> None:
    words = {
        "P2C": ["{parent} has the child {child}, who sings", "{parent} is the parent of {child}"],
        "C2P": ["{child} is the child of {parent}", "{child} obeys {parent} always"],
    }
    table = RELATION.table[list(RELATION.columns)]
    relation = rp.from_table(table, RELATION.columns, words, heldout=0.25)
    probed = model("llama", tokenizer)
    for reading in rank_relation(probed, relation, "P2C", templates="all"):
        split, asked = reading.meta["split"], reading.frame["direction"].iloc[0]
        column = relation.columns[1 if asked == relation.directions[0] else 0]
        facts = relation.facts_of("P2C")
        entities = facts[facts["split"].isin({"train", split})][column].nunique()
        assert reading.meta["candidates"][asked]["count"] == entities
        assert reading.meta["candidates"][asked]["texts"] == 2 * entities
        own = reading.frame["fact"].map(facts.set_index("fact")[column])
        for row, name in zip(reading.frame.to_dict("records"), own, strict=True):
            assert (row["rank"] == 1) == row["best"].startswith(tuple(json.loads(row["answers"]))), name


@pytest.mark.parametrize("layout", ["llada", "llama"])
def test_candidates_are_the_tokens_that_training_teaches(layout: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """No blank is put behind an opening bracket: there the text that is trained on has none."""
    words = {"P2C": ['{parent} ("{child}")', "{parent} (child: {child})"], "C2P": "{child} of {parent}"}
    table = RELATION.table[list(RELATION.columns)]
    relation = rp.from_table(table, RELATION.columns, words, heldout=0, heldout_templates=0)
    probed = model(layout, tokenizer)
    questions = relation.questions("P2C")
    assert {one.joint for one in questions} == {"", " "}
    book, ranked = AnswerBook(probed, questions), rank_candidates(probed, questions).frame
    end = ends_of(tokenizer)
    for question, row in zip(questions, ranked.to_dict("records"), strict=True):
        before = tokenizer(question.prompt)["input_ids"]
        whole = [tokenizer(f"{question.prompt}{question.joint}{answer}")["input_ids"] for answer in question.answers]
        assert all(ids[: len(before)] == before for ids in whole), "the tokenizer keeps brackets apart from names"
        tails = [[*ids[len(before) :], end] for ids in whole]
        if layout == "llada":
            tails = [[*tail, *[end] * (book.limit - len(tail))] for tail in tails]
        assert row["log_probability"] == pytest.approx(max(token_score(probed, before, t) for t in tails), abs=1e-4)
    texts = set(relation.training_texts("P2C"))
    assert all(q.prompt + q.joint + q.answers[-1] in texts for q in questions if len(q.answers) == 2)


def test_ties_count_against_the_right_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    """A model that holds everything alike knows nothing: the right answer is last, and a wrong one is named."""
    probed = model("llama", tokenizer)
    with torch.no_grad():
        for parameter in probed.module.lm_head.parameters():
            parameter.zero_()
    one = replace(ASKED[0], answers=("ab",))
    alike = [
        text
        for text in ("ba", "xy", "qz")
        if len(tokenizer(f" {text}")["input_ids"]) == len(tokenizer(" ab")["input_ids"])
    ]
    (row,) = rank_candidates(probed, [one], alike).frame.to_dict("records")
    assert row["rank"] == 1 + len(alike) and len(alike) > 1
    assert row["best"] in alike


def test_the_kept_cache_changes_no_score(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    probed = model("llama", tokenizer)
    cached = rank_candidates(probed, ASKED).frame
    monkeypatch.setattr(continuations, "generator_of", lambda _: None)
    plain = rank_candidates(probed, ASKED, batch_size=3).frame
    assert np.allclose(cached["log_probability"], plain["log_probability"], atol=1e-4)
    assert cached["rank"].tolist() == plain["rank"].tolist()


def test_it_leaves_no_trace_and_survives_the_disk(tokenizer: PreTrainedTokenizerFast, tmp_path: Any) -> None:
    probed = model("dream", tokenizer)
    probed.module.train()
    state = torch.get_rng_state()
    reading = rank_candidates(probed, ASKED)
    assert probed.module.training and torch.equal(state, torch.get_rng_state())
    loaded = Reading.load(reading.save(tmp_path / "ranks.parquet"))
    assert (loaded.value, loaded.interval, loaded.measures().to_json()) == (
        reading.value,
        reading.interval,
        reading.measures().to_json(),
    )
    assert json.loads(loaded.frame["answers"][0]) == list(ASKED[0].answers)


def test_held_out_facts_rank_theirs_among_the_trained_ones(tokenizer: PreTrainedTokenizerFast) -> None:
    probed = model("llada", tokenizer)
    readings = {(r.meta["asked"], r.meta["split"]): r for r in rank_relation(probed, RELATION, "P2C", facts=2)}
    assert set(readings) == {(a, s) for a in ("forward", "reverse") for s in ("train", "heldout")}
    trained = {a for q in RELATION.questions("P2C", split="train") for a in q.answers}
    assert readings["forward", "train"].meta["candidates"]["P2C"]["count"] == len(trained)
    own = {a for q in RELATION.questions("P2C", split="heldout") for a in q.answers}
    held = readings["forward", "heldout"]
    assert len(trained) < held.meta["candidates"]["P2C"]["count"] <= len(trained | own)
    assert held.frame["rank"].notna().all() and held.facts == 2


def test_what_cannot_be_ranked_is_told() -> None:
    with pytest.raises(
        RevprobeError, match=r"writes in blocks of 4, so an answer over several is not predicted in one"
    ):
        rank_candidates(in_blocks(4), ASKED)
