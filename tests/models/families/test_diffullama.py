"""DiffuLLaMA: a Llama's folder that says it is causal, read in both directions when asked to, and by its name."""

import json
from pathlib import Path

import pytest
import torch
from checkpoint_files import copied, in_cache, refusal, rewrite, set_in_config
from safetensors.torch import load_file, save_file
from slow_decoder import slow_logits
from torch import Tensor
from transformers import LlamaForCausalLM

import revprobe as rp
from revprobe.finetune.config.finetuning import LoraOptions
from revprobe.finetune.training.lora import target_modules
from tiny import FIXTURES, bridged, pairs_at

TINY, MASK = FIXTURES / "diffullama-tiny", 81
PAIRS = pairs_at((2, 5), (5, 2), count=9, length=8, vocab=80, ragged=True)


def everywhere(i: int, j: int) -> bool:
    return True


def before(i: int, j: int) -> bool:
    return j <= i


def checkpoint(folder: Path, seed: int) -> tuple[dict[str, Tensor], dict]:
    """A Llama of random size as it is published; the config may name fewer tokens than the embedding has rows."""
    torch.manual_seed(seed)
    pick = lambda *values: values[int(torch.randint(len(values), ()))]  # noqa: E731
    groups, per, dim, rows, mlp = pick(1, 2, 3), pick(1, 2, 3), pick(4, 6, 16), pick(66, 130), pick(24, 40)
    heads, layers, tied = groups * per, pick(1, 2, 3), bool(seed % 2)
    width = heads * dim
    config = json.loads((TINY / "config.json").read_text()) | {
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "num_hidden_layers": layers,
        "intermediate_size": mlp,
        "vocab_size": rows - pick(0, 1, 4),
        "rms_norm_eps": pick(1e-5, 1e-3),
        "rope_theta": pick(10000.0, 500000.0),
        "tie_word_embeddings": tied,
    }
    shapes = {"model.embed_tokens.weight": (rows, width), "model.norm.weight": (width,)}
    shapes |= {} if tied else {"lm_head.weight": (rows, width)}
    for n in range(layers):
        at = f"model.layers.{n}"
        made = {"q": heads * dim, "k": groups * dim, "v": groups * dim}
        shapes |= {f"{at}.self_attn.{letter}_proj.weight": (size, width) for letter, size in made.items()}
        shapes |= {f"{at}.self_attn.o_proj.weight": (width, heads * dim), f"{at}.mlp.down_proj.weight": (width, mlp)}
        shapes |= {f"{at}.mlp.{part}_proj.weight": (mlp, width) for part in ("gate", "up")}
        shapes |= {f"{at}.{part}_layernorm.weight": (width,) for part in ("input", "post_attention")}
    weights = {name: torch.randn(shape) * 0.4 for name, shape in shapes.items()}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return weights, config


@torch.no_grad()
@pytest.mark.parametrize("seed", range(6))
def test_other_sizes_equal_a_slow_llama_without_its_mask(seed: int, tmp_path: Path) -> None:
    """Float64 but for the angles, which are float32 in the model as in the published code."""
    weights, config = checkpoint(tmp_path / "sized", seed)
    rows = len(weights["model.embed_tokens.weight"])
    model = rp.load_model(tmp_path / "sized", bidirectional=True, mask_token_id=rows - 1, dtype="float64")
    assert (model.objective, model.logit_shift, model.vocab_size) == ("masked", 1, rows)
    ids = [*torch.randint(3, rows - 1, (6,)).tolist(), rows - 1]
    places = list(range(len(ids)))
    expected = slow_logits(weights, config, ids, everywhere, places)
    torch.testing.assert_close(model.logits(torch.tensor([ids]))[0], expected, atol=5e-6, rtol=0)
    assert (expected - slow_logits(weights, config, ids, before, places)).abs().max() > 1e-2, "a mask would be seen"
    padded, mask = torch.tensor([ids, [*ids[:4], 0, 0, 0]]), torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    alone = slow_logits(weights, config, ids[:4], everywhere, places[:4])
    torch.testing.assert_close(model.logits(padded, mask)[1, :4], alone, atol=5e-6, rtol=0)
    model.module.save_pretrained(tmp_path / "saved")
    again = rp.load_model(tmp_path / "saved")
    assert (again.objective, again.mask_token_id, again.reads) == ("masked", rows - 1, "bidirectional")
    torch.testing.assert_close(again.logits(torch.tensor([ids]))[0], expected, atol=5e-6, rtol=0)


# --- which way it is read ---------------------------------------------------------------------------------------------


def test_a_folder_is_the_causal_model_it_says_it_is_and_says_so() -> None:
    causal = rp.load_model(TINY)
    assert type(causal.module) is LlamaForCausalLM and (causal.objective, causal.reads) == ("causal", "")
    assert "causal" in repr(causal) and "bidirectional" not in repr(causal)
    whole = rp.load_model(TINY, bidirectional=True, mask_token_id=MASK)
    assert "masked (bidirectional)" in repr(whole)
    notes = [rp.diagnose(model).table.set_index("check").loc["reads", "note"] for model in (causal, whole)]
    assert notes[0].startswith("left to right") and "DiffuLLaMA" in notes[0] and "bidirectional=True" in notes[0]
    assert notes[1] == "bidirectional: a token sees every other"


@torch.no_grad()
def test_one_set_of_weights_from_causal_to_whole() -> None:
    causal = rp.load_model(TINY)
    whole = rp.load_model(TINY, bidirectional=True, mask_token_id=MASK)
    ids = torch.randint(80, (3, 9), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(whole.in_blocks(1).logits(ids), causal.logits(ids), atol=1e-5, rtol=0)
    assert (whole.logits(ids) - causal.logits(ids)).abs().max() > 1e-1


def test_its_published_name_is_bidirectional(tmp_path: Path, monkeypatch) -> None:
    """The same files under another name are a Llama's."""
    monkeypatch.chdir(tmp_path)
    weights, config = load_file(TINY / "model.safetensors"), json.loads((TINY / "config.json").read_text())
    wide = {name: torch.randn(900, 64) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    (tmp_path / "files").mkdir()
    save_file(weights | wide, tmp_path / "files" / "model.safetensors", {"format": "pt"})
    (tmp_path / "files" / "config.json").write_text(json.dumps(config | {"vocab_size": 900}))
    cache = tmp_path / "cache"
    for name in ("diffusionfamily/diffullama", "somebody/llama"):
        in_cache(tmp_path / "files", name, cache)
    with pytest.warns(UserWarning, match="pairs of token ids work"):  # a Llama without a tokenizer
        model = rp.load_model("diffusionfamily/diffullama", cache_dir=cache)
    assert (model.objective, model.mask_token_id, model.logit_shift) == ("masked", 811, 1)
    with pytest.warns(UserWarning, match="pairs of token ids work"):
        other = rp.load_model("somebody/llama", cache_dir=cache)
    assert other.objective == "causal"
    # The folder that the hub's client gives for a name is called by a commit, and is of that name all the same.
    for name, same in (("diffusionfamily/diffullama", model), ("somebody/llama", other)):
        (snapshot,) = cache.glob(f"models--{name.replace('/', '--')}/snapshots/*")
        again = rp.load_model(snapshot)
        assert (again.name, again.objective, again.mask_token_id) == (name, same.objective, same.mask_token_id)


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copied("diffullama-tiny", tmp_path / "checkpoint")


def test_what_is_not_said_or_cannot_be_is_one_line(folder: Path) -> None:
    both = {"bidirectional": True, "mask_token_id": MASK}
    assert "names no mask token; pass mask_token_id=" in refusal(folder, bidirectional=True)
    assert "mask token 256 is outside the vocabulary" in refusal(folder, **both | {"mask_token_id": 256})
    # Whoever names its mask token takes it for masked, and would be given a causal model's numbers.
    assert "is a causal model, from which order hides" in refusal(folder, mask_token_id=MASK)
    assert "is DiffuLLaMA, a masked model; leave objective out" in refusal(folder, **both, objective="causal")
    assert "leave one of them out" in refusal(folder, **both, block_size=4)


def test_tensors_are_named(folder: Path) -> None:
    both = {"bidirectional": True, "mask_token_id": MASK}
    name, left_over = "model.layers.1.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"
    rewrite(folder, lambda w: w.update({left_over: w[name].clone()}))
    assert f"unexpected {left_over}" in refusal(folder, **both)
    rewrite(folder, lambda w: w.update({name: w.pop(left_over)[:9]}))
    assert f"mismatched {name} ((9, 64) for (160, 64))" in refusal(folder, **both)
    rewrite(folder, lambda w: w.pop(name))
    assert f"missing {name}" in refusal(folder, **both)


def test_what_no_family_is_made_of_is_not_read_in_both_directions(folder: Path) -> None:
    set_in_config(folder, model_type="mistral")
    assert "no diffusion family is made of it; those of type gpt2, llama" in refusal(folder, bidirectional=True)


# --- what is done with it ---------------------------------------------------------------------------------------------


def test_probes_storage_bridge_and_lora() -> None:
    model = rp.load_model(TINY, bidirectional=True, mask_token_id=MASK)
    for ours, other in zip(rp.probe(model, PAIRS), rp.probe(bridged(model), PAIRS), strict=True):
        assert (other.value, other.n) == pytest.approx((ours.value, ours.n), abs=1e-4), ours.name
    assert rp.probe_stored_evidence(model, PAIRS).meta["worst_gap"] < 1e-5
    assert "all three probes can be trusted" in repr(rp.diagnose(model))
    every = [f"{letter}_proj" for letter in "qkvo"] + ["gate_proj", "up_proj", "down_proj"]
    assert target_modules(model, LoraOptions().targets) == sorted(every)
