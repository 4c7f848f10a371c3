"""Text pairs of a bridge or a bare module: its own tokenizer, or one that the call is given."""

from pathlib import Path

import pandas as pd
import pytest
import torch
import transformers

import revprobe as rp
from tiny import GROUPED, language_model, word_tokenizer

NAMES = ["Ann", "Bob", "Cy", "Di", "Ed", "Flo"]
TOKENIZER = word_tokenizer([*NAMES, "begat", "is", "of"])
FACTS = pd.DataFrame({"target": NAMES[:3], "evidence": NAMES[3:]})
WORDING = {"forward": "is {target} begat {evidence}", "reverse": "is {evidence} is of {target}"}


def llama() -> rp.ProbedModel:
    """Causal, over as many rows as there are words and more."""
    module = language_model(transformers.LlamaConfig(**GROUPED))
    return rp.ProbedModel(module, TOKENIZER, objective="causal")


def bert() -> torch.nn.Module:
    """Masked; its config names no mask token."""
    config = transformers.BertConfig(
        **{k: v for k, v in GROUPED.items() if k not in ("num_key_value_heads", "head_dim")}
    )
    return transformers.BertForMaskedLM(config).eval()


def test_a_bridge_keeps_the_models_tokenizer() -> None:
    model = llama()
    bridge = model.to_bridge()
    assert bridge.tokenizer is TOKENIZER
    assert rp.ProbedModel(bridge, objective="causal").tokenizer is TOKENIZER, "a module's own is taken"
    of_bridge, of_model = (rp.pairs_from_frame(FACTS, **WORDING, model=one) for one in (bridge, model))
    assert of_bridge.queries == of_model.queries and of_bridge.kind == "swapped"
    found, own = (rp.probe_reverse_probability(one, of_model) for one in (bridge, model))
    assert found.value == pytest.approx(own.value, rel=1e-4), "the pairs are read by the bare bridge"


def test_a_bare_module_or_bridge_takes_a_tokenizer() -> None:
    model = llama()
    bridge = rp.ProbedModel(model.module, objective="causal").to_bridge()
    assert bridge.tokenizer is None
    wanted = rp.pairs_from_frame(FACTS, **WORDING, model=model).queries
    for bare in (bridge, model.module, rp.ProbedModel(model.module, objective="causal")):
        with pytest.raises(rp.RevprobeError, match=r"has no tokenizer.*, or tokenizer= to this call"):
            rp.pairs_from_frame(FACTS, **WORDING, model=bare)
        assert rp.pairs_from_frame(FACTS, **WORDING, model=bare, tokenizer=TOKENIZER).queries == wanted
        pair = rp.pair_from_text(**WORDING, target="Ann", evidence="Di", model=bare, tokenizer=TOKENIZER)
        assert pair.forward == rp.pairs_from_frame(FACTS, **WORDING, model=model)[0].forward


def test_a_bare_masked_modules_mask_is_that_of_the_tokenizer() -> None:
    """Without one nothing names the mask."""
    with pytest.raises(rp.RevprobeError, match="names no mask token"):
        rp.pairs_from_frame(FACTS, **WORDING, model=bert())
    pairs = rp.pairs_from_frame(FACTS, **WORDING, model=bert(), tokenizer=TOKENIZER)
    assert pairs.kind == "same_target" and len(pairs) == len(FACTS)


def test_a_tokenizer_is_read_from_a_folder_and_held_to_the_model(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    module = llama().module
    pairs = rp.pairs_from_frame(FACTS, **WORDING, model=module, tokenizer=tmp_path)
    assert pairs.queries == rp.pairs_from_frame(FACTS, **WORDING, model=llama()).queries
    with pytest.raises(rp.RevprobeError, match=r"tokenizer='.*nowhere' cannot be read"):
        rp.pairs_from_frame(FACTS, **WORDING, model=module, tokenizer=tmp_path / "nowhere")
    large = word_tokenizer([f"w{i}" for i in range(100)])
    for model in (module, llama()):
        with pytest.raises(rp.RevprobeError, match=r"103 tokens and the embedding of .* 56 rows"):
            rp.pairs_from_frame(FACTS, **WORDING, model=model, tokenizer=large)
    with pytest.raises(rp.RevprobeError, match="tokenizer=3: expected a tokenizer, or the folder or hub name of one"):
        rp.pairs_from_frame(FACTS, **WORDING, model=module, tokenizer=3)


def test_what_is_called_tokenizer_and_is_none_is_not_taken_for_one() -> None:
    module = llama().module
    module.tokenizer = "gpt2"
    assert rp.ProbedModel(module, objective="causal").tokenizer is None
