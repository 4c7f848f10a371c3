"""Models side by side: facts joined by label, values on common facts, paired differences, twins of the same weights."""

import gc
import json
import math
import re
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from torch import nn

import revprobe as rp
from revprobe.models.bases.configs import DreamConfig
from revprobe.models.families.a2d import (
    A2DLlamaConfig,
    A2DLlamaForMaskedDiffusion,
    A2DQwen3Config,
    A2DQwen3ForMaskedDiffusion,
)
from revprobe.models.families.diffugpt import DiffuGPTConfig, DiffuGPTForMaskedDiffusion
from revprobe.models.families.dream import DreamForMaskedDiffusion
from revprobe.probes.compare_models import fact_words
from revprobe.probes.readings.model_comparison import MEASURES
from revprobe.probes.readings.sides import NO_COMMON, NONE_DEFINED
from tiny import GROUPED, MASK, SIZES, causal, made_probabilities, radd, word_tokenizer

PARENT, CHILD = "AR parent", "diffusion child"
MEASURED = [measure for measures in MEASURES.values() for measure in measures]
SMALL_GPT2 = {key: SIZES[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
SMALL_GPT2 |= {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
NUMBERS = ["value", "n", "facts", "low", "high", "control", "excess"]


@pytest.fixture(scope="module")
def parent() -> rp.ProbedModel:
    """A tiny Qwen3 that reads from left to right."""
    return causal(transformers.Qwen3Config(**GROUPED), scale=0.3)


@pytest.fixture(scope="module")
def child(parent: rp.ProbedModel, tmp_path_factory: pytest.TempPathFactory) -> rp.ProbedModel:
    """The same weights as an A2D checkpoint, loaded from its folder to read both ways."""
    module = A2DQwen3ForMaskedDiffusion(A2DQwen3Config(**GROUPED))
    module.load_state_dict(parent.module.state_dict())
    folder = tmp_path_factory.mktemp("a2d") / "child"
    module.save_pretrained(folder)
    loaded = rp.load_model(folder, mask_token_id=MASK, block_size="whole", tokenizer=rp.letter_tokenizer())
    assert loaded.logit_shift == 0 and loaded.block_size is None
    return loaded


@pytest.fixture(scope="module")
def letters(parent: rp.ProbedModel) -> rp.ReversalPairs:
    """Pairs of the parent's kind: what comes last is asked for, in both directions."""
    return rp.letters(5, 12).pairs(parent)


@pytest.fixture(scope="module")
def compared(parent: rp.ProbedModel, child: rp.ProbedModel, letters: rp.ReversalPairs) -> rp.ModelComparison:
    return rp.compare_models({PARENT: parent, CHILD: child}, letters)


def rows(comparison: rp.ModelComparison, part: str, model: str | None = None) -> pd.DataFrame:
    frame = comparison.frame
    return frame[(frame["part"] == part) & ((frame["model"] == model) | (model is None))].set_index("measure")


def swapped_names(width: int) -> rp.ReversalPairs:
    """Names of so many tokens, what is asked for last; queries of unequal lengths, which are padded in a batch."""
    generator, pairs = torch.Generator().manual_seed(3), []
    for fact in range(9):
        ids = torch.randperm(50, generator=generator).tolist()
        names, words = (ids[:width], ids[width : 2 * width]), ids[10 : 12 + fact % 3]
        asked = []
        for first, last in (names, names[::-1]):
            tokens = [ids[20], *first, *words, *last]
            asked.append(rp.Query(tokens, range(len(tokens) - width, len(tokens)), range(1, 1 + width)))
        pairs.append(rp.ReversalPair(*asked, kind="swapped", fact=str(fact)))
    return rp.ReversalPairs.from_pairs(pairs)


# ---- twins ----


def test_in_blocks_of_one_the_child_is_its_parent_up_to_the_shift(
    parent: rp.ProbedModel, child: rp.ProbedModel, letters: rp.ReversalPairs
) -> None:
    """Row i sees tokens 0 to i in both. The parent's row i is of token i + 1; read so, the child says the same."""
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(child.in_blocks(1).logits(ids), parent.logits(ids), atol=2e-5)
        assert not torch.allclose(child.logits(ids), parent.logits(ids), atol=0.1)
    shifted = rp.ProbedModel(child, objective="masked", logit_shift=1).in_blocks(1)
    for pairs in (letters, swapped_names(width=1)):
        found = rp.compare_models({PARENT: parent, CHILD: shifted}, pairs)
        for probe in MEASURES:
            one, other = (found.readings[name][probe].frame for name in (PARENT, CHILD))
            # A model in blocks has reasons of its own for what stands in a later block: nothing does here.
            reasons = [column for column in other if column.startswith("reason")]
            assert (other[reasons] == "").all(axis=None)
            numbers = [column for column in one if not column.startswith("reason")]
            pd.testing.assert_frame_equal(one[numbers], other[numbers], rtol=1e-3, atol=1e-5, check_dtype=False)
        difference = rows(found, "difference")
        assert difference.index.tolist() == MEASURED and difference["value"].abs().max() < 1e-5
        assert (difference["low"] <= 0).all() and (difference["high"] >= 0).all()


@pytest.mark.parametrize(
    ("parent_config", "child_config", "child_class", "sizes"),
    [
        (transformers.Qwen2Config, DreamConfig, DreamForMaskedDiffusion, GROUPED),
        (transformers.LlamaConfig, A2DLlamaConfig, A2DLlamaForMaskedDiffusion, GROUPED),
        (transformers.GPT2Config, DiffuGPTConfig, DiffuGPTForMaskedDiffusion, SMALL_GPT2),
    ],
    ids=["Dream and Qwen2", "A2D and Llama", "DiffuGPT and GPT-2"],
)
def test_other_children_in_blocks_of_one_are_their_parents_too(
    parent_config: Any, child_config: Any, child_class: Any, sizes: dict[str, int]
) -> None:
    own = causal(parent_config(**sizes), scale=0.3)
    module = child_class(child_config(**sizes)).eval()
    module.load_state_dict(own.module.state_dict())
    told = {"mask_token_id": MASK, "logit_shift": 1, "block_size": "whole"}
    read = rp.ProbedModel(module, rp.letter_tokenizer(), objective="masked", **told)
    pairs = rp.letters(4, 9).pairs(own)
    found = rp.compare_models({PARENT: own, "in blocks of 1": read.in_blocks(1), CHILD: read}, pairs)
    difference = found.frame[(found.frame["part"] == "difference") & (found.frame["against"] == PARENT)]
    by_model = difference.set_index("model")["value"].abs().groupby(level=0).max()
    assert by_model["in blocks of 1"] < 1e-5 and by_model[CHILD] > 1e-3


def test_of_targets_of_two_tokens_twins_share_the_probability_and_no_more(
    parent: rp.ProbedModel, child: rp.ProbedModel
) -> None:
    """Attention and gradient are read with the child's whole target hidden, while the parent sees its first token."""
    shifted = rp.ProbedModel(child, objective="masked", logit_shift=1).in_blocks(1)
    difference = rows(rp.compare_models({PARENT: parent, CHILD: shifted}, swapped_names(width=2)), "difference")
    priced = difference.index.str.endswith(("probability", "accuracy"))
    assert difference["value"][priced].abs().max() < 1e-5 and difference["value"][~priced].abs().min() > 3e-4
    assert (difference["caution"].str.contains("targets of up to 2 tokens") == ~priced).all()


def test_the_two_readings_of_one_set_of_weights_differ(compared: rp.ModelComparison) -> None:
    """Else the test above could not fail."""
    difference = rows(compared, "difference")["value"].drop("forward_accuracy")  # neither knows a letter
    assert (difference.abs() > 1e-3).all()


# ---- values, common facts, differences ----


def test_a_models_own_numbers_are_those_of_its_probes(
    compared: rp.ModelComparison, child: rp.ProbedModel, letters: rp.ReversalPairs
) -> None:
    own = rp.probe(child, letters).measures().set_index("measure")
    found = rows(compared, "all", CHILD)
    assert found.index.tolist() == own.index.tolist() == MEASURED
    pd.testing.assert_frame_equal(found[NUMBERS], own[NUMBERS])
    assert (found["kind"] == "swapped").all() and (found["facts"] == 12).all()


def test_values_on_common_facts_are_those_of_the_probes_on_their_pairs(
    parent: rp.ProbedModel, child: rp.ProbedModel, letters: rp.ReversalPairs
) -> None:
    """The child is asked about other facts, in another order: joined by place, every difference would be another."""
    pairs = letters.for_probe("attention")
    of_child = pairs.take(np.flatnonzero(~np.isin(pairs.facts, ["a", "b", "c"]))[::-1])
    of_parent = pairs.take(np.flatnonzero(pairs.facts != "l"))
    found = rp.compare_models({PARENT: parent, CHILD: child}, {PARENT: of_parent, CHILD: of_child})
    common = pairs.take(np.flatnonzero(~np.isin(pairs.facts, ["a", "b", "c", "l"])))
    for name, model, other in ((PARENT, parent, CHILD), (CHILD, child, PARENT)):
        own = rp.probe(model, common).measures().set_index("measure")
        part = rows(found, "common", name)
        assert (part["against"] == other).all() and (part["facts"] == 8).all()
        # Controls are drawn among more facts there, where the readings were taken.
        pd.testing.assert_frame_equal(part[["value", "n", "facts"]], own[["value", "n", "facts"]], atol=1e-6)
    whole, difference = rows(found, "all"), rows(found, "difference")
    assert set(whole["facts"]) == {9, 11} and (difference["facts"] == 8).all()
    assert (difference["model"] == CHILD).all() and (difference["against"] == PARENT).all()
    apart = rows(found, "common", CHILD)["value"] - rows(found, "common", PARENT)["value"]
    pd.testing.assert_series_equal(difference["value"], apart)
    assert (difference["reason"].str.contains(f"3 asked of {PARENT} alone; 1 asked of {CHILD} alone")).all()
    assert (difference["undefined"] == 4).all()
    whole_gap = rows(found, "all", CHILD)["value"] - rows(found, "all", PARENT)["value"]
    assert (abs(whole_gap - apart) > 1e-6).any(), "values on all facts differ from those on common ones"


def test_a_difference_by_hand() -> None:
    """Mean of the per-fact differences, facts in any order and with as many pairs as they have."""
    one = made_probabilities(1, list("abcdef"), {"kind": "swapped", "control": True})
    two = made_probabilities(2, list("fbgdea"), {"kind": "swapped", "control": True})
    found = rp.ModelComparison({"one": rp.Readings([one]), "two": rp.Readings([two])})
    columns = ["probability", "probability_control"]
    p, q = (one.frame[one.frame["direction"] == "reverse"].set_index("fact")[columns] for one in (one, two))
    gaps = (q - p).dropna()
    row = rows(found, "difference").loc["reverse_probability"]
    assert sorted(gaps.index) == list("abdef") and row["facts"] == 5 and row["n"] == 5
    assert row["value"] == pytest.approx(gaps["probability"].mean())
    assert row["control"] == pytest.approx(gaps["probability_control"].mean())
    assert row["excess"] == pytest.approx((gaps["probability"] - gaps["probability_control"]).mean())
    assert (
        gaps["probability"].min() - 1e-9 <= row["low"] < row["value"] < row["high"] <= gaps["probability"].max() + 1e-9
    )
    assert "few facts (5)" in row["caution"]


def test_three_models_are_compared_two_by_two_with_common_facts_of_their_own() -> None:
    facts = {"a": "abcdef", "b": "cdefgh", "c": "efghij"}
    readings = {name: rp.Readings([made_probabilities(5, list(own), {})]) for name, own in facts.items()}
    difference = rp.ModelComparison(readings).frame.query("part == 'difference' and measure == 'reverse_probability'")
    assert list(zip(difference["model"], difference["against"], difference["facts"], strict=True)) == [
        ("b", "a", 4), ("c", "a", 2), ("c", "b", 4),
    ]  # fmt: skip


def test_facts_without_a_value_in_one_model_are_left_out_and_counted() -> None:
    one, two = (made_probabilities(place, list("abcdef"), {}) for place in (1, 2))
    frame = two.frame.assign(reason="")
    frame.loc[frame["fact"] == "c", ["probability", "reason"]] = [math.nan, "hidden"]
    found = rp.ModelComparison({"one": rp.Readings([one]), "two": rp.Readings([replace(two, frame=frame)])})
    row = rows(found, "difference").loc["reverse_probability"]
    assert row["facts"] == 5 and row["reason"] == "1 without a value in two"
    assert rows(found, "common", "one").loc["reverse_probability"]["facts"] == 5


# ---- what is not compared ----


def test_pairs_of_different_kinds_stand_side_by_side(parent: rp.ProbedModel) -> None:
    masked = radd()
    asked = {PARENT: rp.letters(4, 9).pairs(parent), CHILD: rp.letters(4, 9).pairs(masked)}
    found = rp.compare_models({PARENT: parent, CHILD: masked}, asked)
    difference = rows(found, "difference")
    assert difference[["value", "low", "high", "control", "excess"]].isna().all(axis=None)
    assert (difference["reason"] == "9 pairs of different kinds: same_target and swapped").all()
    assert (difference["facts"] == 9).all() and (difference["kind"] == "same_target - swapped").all()
    assert rows(found, "all")["value"].notna().all() and rows(found, "common")["value"].notna().all()
    assert set(rows(found, "all", CHILD)["kind"]) == {"same_target"}


def test_modes_are_not_mixed() -> None:
    one, two = (made_probabilities(1, list("abc"), {"mode": mode}) for mode in ("chain", "parallel"))
    row = rp.ModelComparison({"one": rp.Readings([one]), "two": rp.Readings([two])}).frame.iloc[-1]
    assert math.isnan(row["value"]) and row["reason"] == "3 targets priced by different modes: parallel and chain"


def test_no_common_fact_is_a_reason() -> None:
    one, two = made_probabilities(1, list("abc"), {}), made_probabilities(1, list("xyz"), {})
    found = rp.ModelComparison({"one": rp.Readings([one]), "two": rp.Readings([two])})
    difference = rows(found, "difference")
    assert difference["value"].isna().all() and (difference["facts"] == 0).all()
    assert difference["reason"].str.startswith(f"1 {NO_COMMON}; 3 asked of one alone; 3 asked of two alone").all()
    assert rows(found, "common")["value"].isna().all() and (rows(found, "common")["reason"] == f"1 {NO_COMMON}").all()
    assert "undefined" in found.table()["common facts"].to_list()
    assert found.plot().data


def test_facts_that_no_two_models_have_a_value_of_are_told_from_other_facts() -> None:
    one, two = (made_probabilities(place, list("abcd"), {}) for place in (1, 2))
    halves = [replace(r, frame=r.frame.assign(reason="")) for r in (one, two)]
    for reading, hidden in zip(halves, ("ab", "cd"), strict=True):
        lost = reading.frame["fact"].isin(list(hidden))
        reading.frame.loc[lost, ["probability", "reason"]] = [math.nan, "hidden"]
    found = rp.ModelComparison({"one": rp.Readings(halves[:1]), "two": rp.Readings(halves[1:])})
    row, common = (rows(found, part).loc["reverse_probability"] for part in ("difference", "common"))
    assert math.isnan(row["value"]) and row["reason"].startswith(f"1 {NONE_DEFINED}; 2 without a value in one")
    assert (common["reason"] == f"1 {NONE_DEFINED}").all()


def test_a_probe_that_one_model_lacks_has_no_difference() -> None:
    one = made_probabilities(1, list("abc"), {})
    scores = rp.probe(radd(), rp.letters(4, 9).pairs(radd()), only=["attention"])
    frame = rp.ModelComparison({"one": rp.Readings([one]), "two": scores}).frame
    assert set(frame["part"]) == {"all"} and len(frame) == 5


def test_one_label_of_two_facts_carries_a_caution(parent: rp.ProbedModel) -> None:
    """Labels that are row numbers join whatever stands in those rows."""
    pairs = rp.letters(4, 9).pairs(parent).for_probe("attention")
    other = replace(pairs, facts=np.roll(pairs.facts, 16))
    found = rp.compare_models({"a": parent, "b": parent}, {"a": pairs, "b": other}, only=["probability"])
    said = rows(found, "difference")["caution"]
    assert said.str.contains("labels are of another fact in each: 'a' is 'a | a' to 'b'").sum() == 0
    assert said.str.contains("of 9 labels are of another fact in each").all()
    same = rp.compare_models({"a": parent, "b": parent}, pairs, only=["probability"])
    assert not rows(same, "difference")["caution"].str.contains("label").any()


def test_words_are_compared_without_blanks_case_and_accents() -> None:
    """Two tokenizers write one name in their own ways."""
    queries = rp.Query([3, 4], [0], [1]), rp.Query([4, 3], [1], [0])
    told = [
        fact_words(rp.ReversalPairs.from_pairs([rp.ReversalPair(*queries, fact="x")], tokenizer=word_tokenizer(words)))
        for words in (["Zoë", "Bo-Hale"], ["zoe", "bohale"], ["ann", "bohale"])
    ]
    assert told[0] == told[1] == {"x": "bohale | zoe"} and told[2] != told[0]
    assert fact_words(rp.ReversalPairs.from_pairs([rp.ReversalPair(*queries, fact="x")])) == {}


# ---- models ----


def test_models_by_name_are_in_memory_one_after_the_other(parent: rp.ProbedModel, letters: rp.ReversalPairs) -> None:
    """Two 8B models do not fit beside each other; pairs are made of each model once it is there."""
    held: list[weakref.ref[nn.Module]] = []
    alive: list[int] = []

    def load(**options: object) -> rp.ProbedModel:
        gc.collect()
        alive.append(sum(reference() is not None for reference in held))
        made = causal(transformers.Qwen3Config(**GROUPED))
        held.append(weakref.ref(made.module))
        return made

    rp.register_model("compared twin", load)
    named = dict.fromkeys(("one", "two"), "compared twin")
    found = rp.compare_models(named, lambda model: rp.letters(4, 9).pairs(model), only=["probability"])
    assert alive == [0, 0] and (rows(found, "difference")["value"] == 0).all()


def test_comparing_leaves_no_trace(parent: rp.ProbedModel, child: rp.ProbedModel, letters: rp.ReversalPairs) -> None:
    for model in (parent, child):
        model.module.train()
        model.module.requires_grad_(False)
    before = [{name: value.clone() for name, value in m.module.state_dict().items()} for m in (parent, child)]
    state, drawn = torch.get_rng_state(), np.random.get_state()[1].copy()
    rp.compare_models({PARENT: parent, CHILD: child.module}, letters[:24])
    assert torch.equal(torch.get_rng_state(), state) and np.array_equal(np.random.get_state()[1], drawn)
    for model, own in zip((parent, child), before, strict=True):
        assert model.module.training and all(p.grad is None and not p.requires_grad for p in model.module.parameters())
        assert all(torch.equal(value, own[name]) for name, value in model.module.state_dict().items())
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.module.modules())
        model.module.eval().requires_grad_(True)


def test_progress_names_the_model(parent: rp.ProbedModel, letters: rp.ReversalPairs) -> None:
    told: list[tuple[str, int, int]] = []
    rp.compare_models(
        {"a": parent, "b": parent}, letters[:6], only=["probability"], progress=lambda *at: told.append(at)
    )
    assert {name for name, _, _ in told} == {"a", "b"} and told[-1][1] == told[-1][2]


@pytest.mark.parametrize(
    ("models", "pairs", "words"),
    [
        (["a"], None, "models to compare: 1; expected two or more"),
        (["", "b"], None, "a model is called ''"),
        (["a", "b"], ["a"], "no pairs of 'b'"),
        (["parent", "child"], ["parent", "chid"], "pairs of 'chid', but no model is called so; the closest is 'child'"),
    ],
)
def test_what_is_missing_is_told_before_anything_is_loaded(
    models: list[str], pairs: list[str] | None, words: str, letters: rp.ReversalPairs, tmp_path: Path
) -> None:
    asked = letters if pairs is None else dict.fromkeys(pairs, letters)
    with pytest.raises(rp.RevprobeError, match=re.escape(words)):
        rp.compare_models(dict.fromkeys(models, tmp_path / "none"), asked)


def test_an_error_names_the_model_that_it_is_about(
    parent: rp.ProbedModel, letters: rp.ReversalPairs, tmp_path: Path
) -> None:
    wrong = rp.letters(4, 9).pairs(radd())  # of a masked model
    for models, pairs, words in (
        ({"one": parent, "the other": parent}, {"one": letters, "the other": wrong}, "the other: "),
        ({"one": parent, "two": parent}, lambda model: 3, "one: pairs"),
        ({"one": parent, "two": tmp_path / "none"}, letters[:6], "two: no model folder at"),
    ):
        with pytest.raises(rp.RevprobeError) as caught:
            rp.compare_models(models, pairs, only=["probability"])
        assert str(caught.value).startswith(words) and "\n" not in str(caught.value)
    two = {"one": parent, "two": parent}
    with pytest.raises(rp.RevprobeError, match="two: block_size= does not apply to a model that is loaded already"):
        rp.compare_models(two, letters, only=["probability"], load={"two": {"block_size": 2}})
    with pytest.raises(rp.RevprobeError, match="options of 'tow', but no model is called so; the closest is 'two'"):
        rp.compare_models(two, letters, load={"tow": {"block_size": 2}})


def test_readings_that_cannot_be_compared_are_refused(compared: rp.ModelComparison) -> None:
    own = compared.readings[PARENT]
    with pytest.raises(rp.RevprobeError, match="'b' has 2 readings of 'gradient_cosine': expected one"):
        rp.ModelComparison({"a": own, "b": rp.Readings([*own, own["gradient_cosine"]])})
    with pytest.raises(rp.RevprobeError, match="'b' has no readings"):
        rp.ModelComparison({"a": own, "b": rp.Readings([])})
    with pytest.raises(rp.RevprobeError, match="'b': readings of 'route_edit' are not compared"):
        rp.ModelComparison({"a": own, "b": rp.Readings([rp.Reading("route_edit", own[0].frame, {})])})


# ---- files, tables, figures ----


def test_a_comparison_is_read_as_it_was_written(compared: rp.ModelComparison, tmp_path: Path) -> None:
    folder = compared.save(tmp_path / "compared")
    again = rp.ModelComparison.load(folder)
    pd.testing.assert_frame_equal(again.frame, compared.frame)
    assert repr(again) == repr(compared) and list(again.readings) == [PARENT, CHILD] and again.asked == compared.asked
    made = rp.ModelComparison(again.readings, again.asked, again.seed)  # worked out anew, from the files' rows
    pd.testing.assert_frame_equal(made.frame, compared.frame, atol=1e-9)
    compared.save(folder)  # an older one is replaced
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(rp.RevprobeError, match=r"holds 'notes\.txt', which would be lost"):
        compared.save(folder)
    assert (folder / "notes.txt").read_text() == "mine"
    with pytest.raises(rp.RevprobeError, match="no comparison at"):
        rp.ModelComparison.load(tmp_path)
    compared.readings[PARENT][0].save(folder / "comparison.parquet")
    with pytest.raises(rp.RevprobeError, match="holds one reading, no comparison"):
        rp.ModelComparison.load(folder)


def test_numbers_of_other_statistics_are_worked_out_anew(
    compared: rp.ModelComparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("revprobe.probes.readings.model_comparison.STATISTICS_VERSION", 1)
        patch.setitem(compared.__dict__, "frame", compared.frame.assign(value=-9.0))
        folder = compared.save(tmp_path / "old")
    again = rp.ModelComparison.load(folder)
    pd.testing.assert_frame_equal(again.frame, compared.frame, atol=1e-9)


def test_names_are_escaped_and_numbers_stand_with_their_n() -> None:
    one, two = (made_probabilities(place, list("abcdefghijklmno"), {"kind": "swapped"}) for place in (1, 2))
    found = rp.ModelComparison({"<b>one</b>": rp.Readings([one]), "two": rp.Readings([two])})
    page, figure = found._repr_html_(), found.plot()
    assert "<b>one" not in page and "&lt;b&gt;one" in page
    assert not any("<b>one</b>" in str(trace.name) for trace in figure.data)
    table = found.table()
    assert table["model"].tolist()[:3] == ["<b>one</b>", "two", "two - <b>one</b>"]
    assert table["n / facts"].tolist()[:3] == ["15 / 15", "15 / 15", "-"] and (table["n / common"] == "15 / 15").all()
    line = next(line for line in repr(found).splitlines() if "reverse probability, two - <b>one</b>" in line)
    assert "15 / 15" in line and "[" in line


def test_the_figure_has_every_value_with_its_interval_and_every_difference(compared: rp.ModelComparison) -> None:
    figure = compared.plot(theme="dark")
    by_name = {trace.name: trace for trace in figure.data}
    drawn = {PARENT: f"{PARENT} (swapped)", CHILD: f"{CHILD} (swapped)"}  # with the kind of its pairs
    assert {*drawn.values(), f"{CHILD} − {PARENT}", f"control of {drawn[PARENT]}"} <= set(by_name)
    for name, part in ((drawn[PARENT], "all"), (drawn[CHILD], "all"), (f"{CHILD} − {PARENT}", "difference")):
        own = rows(compared, part, PARENT if name == drawn[PARENT] else CHILD)
        assert list(by_name[name].x) == pytest.approx(own["value"].tolist())
        assert list(by_name[name].error_x.array) == pytest.approx((own["high"] - own["value"]).tolist())
        assert by_name[name].xaxis == ("x" if part == "all" else "x2")
    assert "12 common facts" in figure.layout.xaxis2.title.text
    json.dumps(figure.to_plotly_json(), default=str)


def test_an_undefined_difference_is_a_cross_that_says_why() -> None:
    one, two = (made_probabilities(1, list("abcd"), {"kind": kind}) for kind in ("swapped", "same_target"))
    figure = rp.ModelComparison({"one": rp.Readings([one]), "two": rp.Readings([two])}).plot()
    crosses = next(trace for trace in figure.data if trace.name == "two − one, undefined")
    assert len(crosses.x) == 4 and "pairs of different kinds" in crosses.hovertext[0]
