"""LLaDA Base, Instruct and 1.5 of any size: one layout, one config, against a slow decoder in float64."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from slow_decoder import draw_checkpoint, pick, slow_logits, write_checkpoint
from torch import Tensor

import revprobe as rp
from revprobe.models.families.llada import official_name
from tiny import FIXTURES, GROUPED, drawn

CLOSE = 2e-5
KEYS = {
    "hidden_size": "d_model",
    "num_attention_heads": "n_heads",
    "num_hidden_layers": "n_layers",
    "intermediate_size": "mlp_hidden_size",
    "vocab_size": "embedding_size",
    "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "tie_word_embeddings": "weight_tying",
    "max_position_embeddings": "max_sequence_length",
}


def checkpoint(folder: Path, seed: int) -> tuple[dict[str, Tensor], dict, int]:
    """Published names and keys; some tables longer than the vocabulary. Returns: our weights and config, the mask."""
    weights, config = draw_checkpoint(seed, "llama")
    rows, heads, groups = (config[key] for key in ("vocab_size", "num_attention_heads", "num_key_value_heads"))
    published = {theirs: config[ours] for ours, theirs in KEYS.items()}
    published |= {"model_type": "llada", "architectures": ["LLaDAModelLM"], "vocab_size": rows - pick(0, 5)}
    # All three published files say both; elsewhere a missing number means as many as there are heads.
    published |= {"n_kv_heads": groups} if groups < heads or pick(True, False) else {}
    published |= {"mask_token_id": rows - 9, "eos_token_id": rows - 8, "pad_token_id": rows - 8, "block_type": "llama"}
    published |= {"activation_type": "silu", "alibi": False, "rope": True, "flash_attention": pick(True, False)}
    write_checkpoint(folder, {official_name(name): tensor for name, tensor in weights.items()}, published)
    return weights, config, rows - 9


@pytest.mark.parametrize("seed", range(6))
@torch.no_grad()
def test_any_size_equals_a_slow_decoder(seed: int, tmp_path: Path) -> None:
    weights, config, mask = checkpoint(tmp_path / "llada", seed)
    model = rp.load_model(tmp_path / "llada")
    ids = [*torch.randint(config["vocab_size"] - 9, (8,)).tolist(), mask, 1, mask]
    expected = slow_logits(weights, config, ids, lambda i, j: True, range(len(ids)))
    close = CLOSE * float(expected.abs().max().clamp(min=1))
    assert float((model.logits(torch.tensor([ids]))[0].double() - expected).abs().max()) < close
    shown, kept = torch.tensor([[*ids, 0, 0, 0]]), torch.tensor([[1] * len(ids) + [0, 0, 0]])
    assert float((model.logits(shown, kept)[0, : len(ids)].double() - expected).abs().max()) < close
    assert (model.logit_shift, model.mask_token_id, model.vocab_size) == (0, mask, config["vocab_size"])
    model.module.save_pretrained(tmp_path / "again")
    assert torch.equal(rp.load_model(tmp_path / "again").logits(torch.tensor([ids])), model.logits(torch.tensor([ids])))


def test_added_tokens_are_saved_so_that_both_codes_size_their_tables_by_them(tmp_path: Path) -> None:
    """The published code reads embedding_size, transformers changes vocab_size: what was saved could not be loaded."""
    model, ids = rp.load_model(FIXTURES / "llada-tiny"), torch.arange(9)[None]
    rows = model.vocab_size
    with torch.no_grad():
        before = model.logits(ids)
        model.module.resize_token_embeddings(rows + 8, mean_resizing=False)
        model.module.save_pretrained(tmp_path)
        assert torch.equal(rp.load_model(tmp_path).logits(ids)[..., :rows], before)
        settings = json.loads((tmp_path / "config.json").read_text())
        assert settings["vocab_size"] == settings["embedding_size"] == rows + 8
        (tmp_path / "config.json").write_text(json.dumps(settings | {"embedding_size": rows}))  # as it was saved before
        assert torch.equal(rp.load_model(tmp_path).logits(ids)[..., :rows], before)


def test_smdm_takes_no_token_behind_its_mask_token() -> None:
    model = rp.load_model(FIXTURES / "smdm-tiny", n_heads=4).module
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    with pytest.raises(rp.RevprobeError, match=r"resize_token_embeddings\(264\): SMDM's mask token is the last of the"):
        model.resize_token_embeddings(264)


def test_a_causal_class_whose_config_takes_its_mask_away_is_read_as_masked(tmp_path: Path) -> None:
    """It was refused as causal, as masked and as bidirectional, each error naming the next."""
    config = transformers.Qwen2Config(**GROUPED, is_causal=False)
    module = drawn(transformers.Qwen2ForCausalLM(config))
    module.save_pretrained(tmp_path)
    model = rp.load_model(tmp_path, mask_token_id=3, logit_shift=1)
    assert model.objective == "masked" and model.reads == "bidirectional"
    one, other = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[5, 6, 7, 9]])
    with torch.no_grad():
        assert not torch.equal(model.logits(one)[0, 0], model.logits(other)[0, 0])
