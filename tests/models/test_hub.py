"""Tokenizers of LLaDA and Dream without remote code, from tiny folders in the published layouts; unreadable ones."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from revprobe import load_model
from tiny import FIXTURES

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [("Ġ", "A"), ("n", "n"), ("A", "nn"), ("ĠA", "nn")]
VOCABULARY = {token: i for i, token in enumerate([*ALPHABET, *("".join(pair) for pair in MERGES)])}
# The order of Dream's file: control tokens and tool tags after the vocabulary, begin and mask at its very end.
DREAM_ADDED = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<tool_call>",
    "</tool_call>",
    "<|beginoftext|>",
    "<|mask|>",
]


def added_token(content: str) -> dict:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": content, **flags, "special": content.startswith("<|")}


def write_dream_tokenizer(folder: Path) -> None:
    """vocab.json, merges.txt, tokenizer_config.json and special_tokens_map.json as in Dream-v0; no tokenizer.json."""
    (folder / "vocab.json").write_text(json.dumps(VOCABULARY, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in MERGES))
    named = {
        "bos_token": "<|beginoftext|>",
        "eos_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "pad_token": "<|endoftext|>",
    }
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(len(VOCABULARY) + i): added_token(t) for i, t in enumerate(DREAM_ADDED)},
        "additional_special_tokens": ["<|beginoftext|>", "<|mask|>"],
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": 131072,
        "split_special_tokens": False,
        "tokenizer_class": "DreamTokenizer",
        "unk_token": None,
        **named,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps({k: added_token(v) for k, v in named.items()}))
    (folder / "tokenization_dream.py").write_text("raise SystemExit('remote code was run')\n")


def byte_level(added: list[str]) -> Tokenizer:
    backend = Tokenizer(models.BPE(VOCABULARY, MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in added])
    return backend


def write_llada_tokenizer(folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json as in LLaDA-8B: the mask is an added token, but no `mask_token`."""
    byte_level(["<|startoftext|>", "<|endoftext|>", "[CLS]", "<|mdm_mask|>"]).save(str(folder / "tokenizer.json"))
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": "<|startoftext|>",
        "clean_up_tokenization_spaces": False,
        "cls_token": "[CLS]",
        "eos_token": "<|endoftext|>",
        "fast_tokenizer": True,
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "trust_remote_code": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def model_folder(name: str, tmp_path: Path, **config) -> Path:
    """A tiny checkpoint whose vocabulary has room for the tokenizer: its weights are drawn anew."""
    folder = tmp_path / name
    tiny = load_model(FIXTURES / f"{name}-tiny").module
    sizes = {"vocab_size": 300, "embedding_size": 300} if name == "llada" else {"vocab_size": 300}
    type(tiny)(type(tiny.config)(**{**tiny.config.to_dict(), **sizes, **config})).save_pretrained(folder)
    return folder


def test_dreams_tokenizer_reads_from_vocab_and_merges(tmp_path):
    mask, begin = len(VOCABULARY) + 6, len(VOCABULARY) + 5
    folder = model_folder("dream", tmp_path, mask_token_id=mask)
    write_dream_tokenizer(folder)
    model = load_model(folder)
    tokenizer = model.tokenizer
    assert (model.mask_token_id, model.begin_token_id) == (mask, begin)
    assert [tokenizer.convert_tokens_to_ids(t) for t in DREAM_ADDED] == [len(VOCABULARY) + i for i in range(7)]
    assert tokenizer.is_fast and tokenizer("Ann", return_offsets_mapping=True)["offset_mapping"] == [(0, 3)]
    assert tokenizer("Ann", add_special_tokens=True).input_ids == [VOCABULARY["Ann"]], "a begin token was added"


def test_dreams_tokens_equal_qwen2s_byte_level_bpe(tmp_path):
    """Against the published pre-tokenization written out: digits one by one, a space with the word after it."""
    write_dream_tokenizer(tmp_path)
    shutil.copy(FIXTURES / "dream-tiny" / "config.json", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "Ann's  Ann 42 é<|mask|> Ann"
    pieces = ["Ann", "'", "s", "Ġ", "ĠAnn", "Ġ", "4", "2", "Ġ", "Ã", "©", "<|mask|>", "ĠAnn"]
    assert tokenizer.tokenize(text) == pieces
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_lladas_tokenizer_reads_and_the_config_names_the_mask(tmp_path):
    mask = len(VOCABULARY) + 3
    folder = model_folder("llada", tmp_path, mask_token_id=mask)
    write_llada_tokenizer(folder)
    model = load_model(folder)
    assert model.tokenizer.mask_token_id is None and model.mask_token_id == mask
    assert model.tokenizer.convert_tokens_to_ids("<|mdm_mask|>") == mask
    assert model.begin_token_id == len(VOCABULARY)
    assert model.tokenizer("Ann Ann").input_ids == [VOCABULARY["Ann"], VOCABULARY["ĠAnn"]]


def test_a_tokenizer_survives_saving(tmp_path):
    write_dream_tokenizer(tmp_path)
    shutil.copy(FIXTURES / "dream-tiny" / "config.json", tmp_path)
    first = AutoTokenizer.from_pretrained(tmp_path)
    first.save_pretrained(tmp_path / "again")
    shutil.copy(FIXTURES / "dream-tiny" / "config.json", tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    text = "Ann's Ann 42<|mask|><|im_end|>"
    assert again(text).input_ids == first(text).input_ids
    assert (again.mask_token_id, again.bos_token_id) == (first.mask_token_id, first.bos_token_id)


@pytest.mark.parametrize("damage", ["{", '{"version": "1.0", "model": {"type": "NoSuchModel"}}'])
def test_an_unreadable_tokenizer_is_a_warning_that_names_the_reason(damage, tmp_path):
    """Letter and token-id pairs need none, so the model loads; but nobody is left to guess why text pairs fail."""
    folder = Path(shutil.copytree(FIXTURES / "llada-tiny", tmp_path / "llada"))
    (folder / "tokenizer.json").write_text(damage)
    with pytest.warns(UserWarning, match=r"tokenizer of 'llada' cannot be read: \w+: ."):
        model = load_model(folder)
    assert model.tokenizer is None and model.mask_token_id == 253


def test_a_folder_without_a_tokenizer_loads_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_model(FIXTURES / "llada-tiny").tokenizer is None
