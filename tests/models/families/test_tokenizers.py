"""Tokenizers of the families: own files, classes that only a repository's code has, added mask tokens, row counts.

What a tokenizer should give is written down here, or computed by the `tokenizers` library from the same vocabulary.
"""

import builtins
import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from long_cases import rest_long
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

import revprobe as rp
from revprobe.models.families.known import FAMILIES, family_of_config
from tiny import FIXTURES, SIZES, module_at

CASES = module_at(Path(__file__).with_name("test_every_family.py")).CASES
WORDS = ["the", "child", "parent", "of", "is", "Ann", "Bob", "Cid", "Dan", "Eve", "Fay"]
CODE = "raise SystemExit('code of a model folder was run')\n"


def family_at(name: str):
    return family_of_config(rp.load_model(FIXTURES / name, **CASES[name]).module.config)


# Of the families whose tokenizers list the mask under a text of its own.
MASK_TEXT = {name: getattr(family_at(name).model_class, "mask_text", None) for name in CASES}
MASK_TEXT = {name: text for name, text in MASK_TEXT.items() if text is not None}
LISTED = list(MASK_TEXT)


@pytest.fixture(autouse=True)
def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A question on the terminal would wait for ever."""

    def ask(*words: object) -> str:
        pytest.fail(f"asked {words}")

    monkeypatch.setattr(builtins, "input", ask)


def copied(name: str, folder: Path, **config: object) -> Path:
    """A fixture's own files, with settings of its config.json changed; None takes a key out."""
    shutil.copytree(FIXTURES / name, folder, ignore=shutil.ignore_patterns("reference.safetensors"))
    if not (folder / "config.json").is_file():  # a bare file
        return folder
    told = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps({key: one for key, one in told.items() if one is not None}))
    return folder


def unmasked(name: str) -> dict:
    """What must still be said when the tokenizer names the mask."""
    return {key: value for key, value in CASES[name].items() if key != "mask_token_id"}


def backend(*added: str, words: list[str] = WORDS) -> Tokenizer:
    """One token a word, the added ones behind them."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<eos>", *words])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(list(added))
    return made


def write(folder: Path, made: Tokenizer | None, **settings: object) -> None:
    """tokenizer.json and tokenizer_config.json, as a repository has them, with its code beside them."""
    if made is not None:
        made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenization_new.py").write_text(CODE)


def test_reading_a_tokenizer_says_nothing_of_config_json(tmp_path: Path) -> None:
    """transformers reads it on the way, and remarks on `rope_scaling`; who loads the model did not write the file."""
    folder = Path(shutil.copytree(FIXTURES / "sdar-tiny", tmp_path / "model"))
    assert "rope_scaling" in json.loads((folder / "config.json").read_text())
    write(folder, backend(), tokenizer_class="PreTrainedTokenizerFast")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rp.load_model(folder).tokenizer is not None


# --- mask tokens that a tokenizer lists without calling them its mask -------------------------------------------------


@pytest.mark.parametrize("name", LISTED)
def test_the_familys_mask_is_looked_up_in_the_vocabulary_and_written_down(name: str, tmp_path: Path) -> None:
    folder = copied(name, tmp_path / "model", mask_token_id=None)
    write(folder, backend("<one>", MASK_TEXT[name]), tokenizer_class="PreTrainedTokenizerFast", eos_token="<eos>")
    expected = 2 + len(WORDS) + 1
    model = rp.load_model(folder, **unmasked(name))
    assert model.tokenizer.mask_token_id is None and model.mask_token_id == expected
    model.module.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["mask_token_id"] == expected
    wrapped = rp.ProbedModel(model.module, model.tokenizer, objective="masked", block_size=model.block_size or "whole")
    assert wrapped.mask_token_id == expected


@pytest.mark.parametrize("name", LISTED)
def test_a_vocabulary_without_it_leaves_the_mask_to_be_said(name: str, tmp_path: Path) -> None:
    """Another family's mask, or a word that looks like one, is none."""
    folder = copied(name, tmp_path / "model", mask_token_id=None)
    others = [text for text in ("<mask>", "[MASK]", *MASK_TEXT.values()) if text != MASK_TEXT[name]]
    write(folder, backend(*others), tokenizer_class="PreTrainedTokenizerFast")
    with pytest.raises(rp.RevprobeError, match="names no mask token; pass mask_token_id="):
        rp.load_model(folder, **unmasked(name))
    assert rp.load_model(folder, **unmasked(name), mask_token_id="[MASK]").mask_token_id == 2 + len(WORDS) + 1


@pytest.mark.parametrize("name", LISTED)
def test_vocabulary_config_and_what_is_given_must_agree(name: str, tmp_path: Path) -> None:
    folder = copied(name, tmp_path / "model", mask_token_id=90)
    text, listed = MASK_TEXT[name], 2 + len(WORDS)
    write(folder, backend(text), tokenizer_class="PreTrainedTokenizerFast")
    words = f"the config's is 90, the family's, '{text}', is {listed}; say which with mask_token_id="
    with pytest.raises(rp.RevprobeError, match=re.escape(words)):
        rp.load_model(folder, **unmasked(name))
    for given in (90, listed, text):
        assert rp.load_model(folder, **unmasked(name), mask_token_id=given).mask_token_id in (90, listed)
    with pytest.raises(rp.RevprobeError, match=r"mask_token_id=7, but the config's is 90, .*; leave it out"):
        rp.load_model(folder, **unmasked(name), mask_token_id=7)


def test_a_tokenizers_own_mask_that_is_another_than_the_listed_one_is_seen(tmp_path: Path) -> None:
    folder = copied("a2d-qwen3-mdlm-tiny", tmp_path / "model")
    write(folder, backend("<|mask|>", "<other>"), tokenizer_class="PreTrainedTokenizerFast", mask_token="<other>")
    with pytest.raises(rp.RevprobeError, match=r"the tokenizer's mask token is 14, the family's, .* is 13; say which"):
        rp.load_model(folder, bidirectional=True)


def test_a_mask_that_is_listed_beyond_the_rows_is_no_mask(tmp_path: Path) -> None:
    """The first free id of a tokenizer, of a model that was never given a row for it."""
    folder = copied("a2d-qwen3-mdlm-tiny", tmp_path / "model")
    write(folder, backend(*(f"<{n}>" for n in range(300)), "<|mask|>"), tokenizer_class="PreTrainedTokenizerFast")
    with pytest.raises(rp.RevprobeError, match="the tokenizer has 314 tokens and the embedding of 'model' 256 rows"):
        rp.load_model(folder, bidirectional=True)


# --- classes that no library has -------------------------------------------------------------------------------------

SPECIAL = {"bos_token": "<begin>", "eos_token": "<eos>", "pad_token": "<eos>", "mask_token": "<hidden>"}
CLASSES: dict[str, dict] = {
    "unknown class": {"tokenizer_class": "NewTokenizer"},
    "unknown fast class": {"tokenizer_class": "NewTokenizerFast"},
    "its own auto_map": {
        "tokenizer_class": "NewTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_new.New", None]},
    },
    "a fast auto_map": {
        "tokenizer_class": "NewTokenizer",
        "auto_map": {"AutoTokenizer": [None, "tokenization_new.New"]},
    },
    "an old auto_map": {"tokenizer_class": "NewTokenizer", "auto_map": ["tokenization_new.New", None]},
    "DiffuGPT's": {"tokenizer_class": "MaskTokenWrapper"},
    "SDAR's, of a known name": {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "auto_map": {"AutoTokenizer": ["tokenization_new.Qwen2Tokenizer", None]},
    },
    "no class": {},
}


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("name", ["sdar-tiny", "a2d-llama-mdlm-tiny", "fastdllm2-tiny", "llada-tiny", "dream-tiny"])
def test_tokenizer_json_is_read_with_its_special_tokens_and_no_code_is_run(
    name: str, kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = {"AutoConfig": "configuration_new.New", "AutoModel": "modeling_new.New"}
    folder = copied(name, tmp_path / "model", mask_token_id=None, auto_map=code)
    for part in ("configuration", "modeling"):
        (folder / f"{part}_new.py").write_text(CODE)
    made = backend("<begin>", "<hidden>")
    write(folder, made, **SPECIAL, **CLASSES[kind])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = rp.load_model(folder, **unmasked(name))
    tokenizer, text = model.tokenizer, "the child of Ann is Bob nobody"
    assert tokenizer.is_fast and tokenizer(text, add_special_tokens=False).input_ids == made.encode(text).ids
    ids = {key: made.token_to_id(word) for key, word in SPECIAL.items()}
    assert {key: getattr(tokenizer, f"{key}_id") for key in SPECIAL} == ids
    assert (model.mask_token_id, model.begin_token_id) == (ids["mask_token"], ids["bos_token"])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("how", ["added_tokens_decoder", "added_tokens.json"])
def test_a_mask_that_was_added_beside_tokenizer_json_is_found(how: str, tmp_path: Path) -> None:
    """DiffuGPT-medium's: its tokenizer.json is GPT-2's, and the added token stands in files beside it."""
    folder = copied("a2d-qwen3-mdlm-tiny", tmp_path / "model")
    mask = {"content": "<|mask|>", "special": True}
    mask |= dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    listed = {"added_tokens_decoder": {"13": mask}} if how == "added_tokens_decoder" else {}
    write(folder, backend(), tokenizer_class="MaskTokenWrapper", **listed)
    if how == "added_tokens.json":
        (folder / how).write_text('{"<|mask|>": 13}')
    assert rp.load_model(folder, bidirectional=True).mask_token_id == 13


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_so_it_is_beside_a_plain_transformers_model(model_type: str, tmp_path: Path) -> None:
    """Where DiffuGPT's and DiffuLLaMA's config.json say that they are."""
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    write(tmp_path, backend("<begin>", "<hidden>"), **SPECIAL, tokenizer_class="MaskTokenWrapper")
    assert rp.load_model(tmp_path).tokenizer.mask_token == "<hidden>"


VOCABULARY_ALONE: dict[str, Callable[[Path], object]] = {
    "vocab.json": lambda folder: (folder / "vocab.json").write_text(json.dumps({"<unk>": 0, "the": 1})),
    "tokenizer.model": lambda folder: (folder / "tokenizer.model").write_bytes(b"sentencepiece"),
    "nothing": lambda folder: None,
}


@pytest.mark.parametrize("files", VOCABULARY_ALONE)
def test_without_a_tokenizer_json_such_a_class_is_refused_in_one_line_and_the_model_loads(
    files: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = copied("sdar-tiny", tmp_path / "model")
    write(folder, None, tokenizer_class="NewTokenizer", auto_map={"AutoTokenizer": ["tokenization_new.New", None]})
    VOCABULARY_ALONE[files](folder)
    cause = "its class 'NewTokenizer' is code of a model's folder, which is never run, and there is no tokenizer.json"
    with pytest.warns(UserWarning, match=f"the tokenizer of 'model' cannot be read: {cause}") as warned:
        model = rp.load_model(folder)
    assert len(warned) == 1 and "\n" not in str(warned[0].message)
    assert model.tokenizer is None and model.mask_token_id == 254
    with pytest.raises(rp.RevprobeError, match=f"tokenizer='.*model' cannot be read: {cause}"):
        rp.load_model(FIXTURES / "sdar-tiny", tokenizer=folder)
    assert capfd.readouterr() == ("", "")


# --- from elsewhere, or none -----------------------------------------------------------------------------------------

WORDING = {"forward": "the child of {target} is {evidence}", "reverse": "the parent of {evidence} is {target}"}
FACTS = pd.DataFrame({"target": ["Ann", "Cid", "Eve"], "evidence": ["Bob", "Dan", "Fay"]})


@pytest.mark.parametrize("name", CASES)
def test_without_a_tokenizer_ids_are_answered_and_text_gets_a_line_that_says_where_one_is(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = rp.load_model(FIXTURES / name, **CASES[name])
    source = family_of_config(model.module.config).tokenizer_source
    ids = rp.ReversalPairs.from_pairs(
        [rp.ReversalPair(rp.Query([3, 4, 5, 6], [2], [1]), rp.Query([3, 5, 4, 6], [1], [2]))]
    )
    assert 0 < rp.probe_reverse_probability(model, ids, control=False).value < 1
    named = f"tokenizer='{source}'\\), which its family uses" if source else "tokenizer=FOLDER_OR_NAME"
    for read in (model, model.in_blocks(None)):
        with pytest.raises(rp.RevprobeError, match=f"has no tokenizer, so text cannot become tokens; pass .*{named}"):
            rp.pairs_from_frame(FACTS, **WORDING, model=read)


def test_every_family_says_where_its_tokenizer_is_but_those_without_a_published_name() -> None:
    assert [one.name for one in FAMILIES if one.tokenizer_source is None] == ["A2D Llama"]


@pytest.mark.parametrize("name", rest_long(CASES, 5))
@pytest.mark.parametrize("give", ["folder", "text", "object"])
def test_a_tokenizer_from_elsewhere_makes_pairs_of_text(name: str, give: str, tmp_path: Path) -> None:
    """Answers equal those of the same ids written down."""
    write(
        copied("sdar-tiny", tmp_path / "other"), backend("<begin>"), tokenizer_class="NewTokenizer", eos_token="<eos>"
    )
    given = {"folder": tmp_path / "other", "text": str(tmp_path / "other")}.get(give)
    given = given or rp.load_model(tmp_path / "other").tokenizer
    model = rp.load_model(FIXTURES / name, tokenizer=given, **CASES[name]).in_blocks(None)
    assert model.mask_token_id == rp.load_model(FIXTURES / name, **CASES[name]).mask_token_id
    pairs = rp.pairs_from_frame(FACTS, **WORDING, model=model)
    made = backend("<begin>")
    for pair, fact in zip(pairs, FACTS.itertuples(), strict=True):
        for query, wording in ((pair.forward, "forward"), (pair.reverse, "reverse")):
            text = WORDING[wording].format(target=fact.target, evidence=fact.evidence)
            assert list(query.token_ids) == made.encode(text).ids and query.target == (made.token_to_id(fact.target),)
    by_text = rp.probe_reverse_probability(model, pairs, control=False)
    query = pairs[0].reverse
    hidden = torch.tensor([query.token_ids]).index_fill(1, torch.tensor(query.target_positions), model.mask_token_id)
    row = query.target_positions[0] - model.logit_shift
    probability = model.logits(hidden)[0, row].double().softmax(-1)[query.target[0]]
    shown = by_text.frame.query("pair == 0 and direction == 'reverse'").probability.item()
    assert shown == pytest.approx(probability.item(), rel=1e-4)


def test_a_name_that_has_no_tokenizer_and_a_file_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    for given in (tmp_path, tmp_path / "tokenizer.json", "nobody/has-this", tmp_path / "absent"):
        with pytest.raises(
            rp.RevprobeError, match=r"tokenizer='.*' cannot be read: .*; expected a folder or hub"
        ) as caught:
            rp.load_model(FIXTURES / "sdar-tiny", tokenizer=given)
        assert "\n" not in str(caught.value)


# --- as many tokens as rows, or fewer --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", rest_long(CASES, 5))
@pytest.mark.parametrize("give", [True, False], ids=["given", "own"])
def test_a_tokenizer_with_more_tokens_than_rows_is_refused_and_one_with_fewer_is_not(
    name: str, give: bool, tmp_path: Path
) -> None:
    rows = rp.load_model(FIXTURES / name, **CASES[name]).vocab_size
    for more in (-1, 0, 1):
        folder = copied(name, tmp_path / str(more))
        words = [*WORDS, *(f"w{n}" for n in range(rows + more - len(WORDS) - 2))]
        write(folder, backend(words=words), tokenizer_class="NewTokenizer")
        place, asked = (FIXTURES / name, {"tokenizer": folder}) if give else (folder, {})
        if more <= 0:
            assert len(rp.load_model(place, **asked, **CASES[name]).tokenizer) == rows + more
            continue
        with pytest.raises(
            rp.RevprobeError, match=f"the tokenizer has {rows + 1} tokens and the embedding of .* {rows} rows"
        ):
            rp.load_model(place, **asked, **CASES[name])


def test_a_plain_models_own_tokenizer_may_have_tokens_beside_its_vocabulary(tmp_path: Path) -> None:
    """Gemma 3's text models list an image token that they have no row for."""
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    words = [f"w{n}" for n in range(54)]
    write(tmp_path, backend("<image>", words=words), tokenizer_class="PreTrainedTokenizerFast")
    assert len(rp.load_model(tmp_path).tokenizer) == 57
    write(tmp_path, backend(words=[*words, "one more"]), tokenizer_class="PreTrainedTokenizerFast")
    with pytest.raises(rp.RevprobeError, match=r"the tokenizer has 57 tokens and the embedding of .* 56 rows"):
        rp.load_model(tmp_path)
