"""Dream and its relatives, Dream-Coder, DreamOn and DiffuCoder: one layout, whatever their config.json says beside it.

Tiny checkpoints with the differences of the published configs, against a slow decoder in float64.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from checkpoint_files import copied, refusal, set_in_config
from long_cases import rest_long
from slow_decoder import draw_checkpoint, plain_frequencies, slow_logits, write_checkpoint, yarn_frequencies
from torch import Tensor

import revprobe as rp
from tiny import pairs_at

CLOSE = 2e-5
# What the relatives' config.json says otherwise, at the end of a small vocabulary: mask, begin, end, padding, expand.
RELATIVES = {
    "Dream": {},
    "Dream-Coder": {"bos_token_id": 58},
    "DreamOn": {"bos_token_id": 58, "expand_token_id": 60, "max_position_embeddings": 48},
    "DiffuCoder": {"pad_token_id": 60, "bos_token_id": None, "sliding_window": 5, "max_window_layers": 1},
    "written by a newer transformers": {"layer_types": ["sliding_attention"] * 3, "sliding_window": 5},
}


def checkpoint(folder: Path, seed: int, **more: object) -> tuple[dict[str, Tensor], dict, list[int]]:
    """A checkpoint of random size, its config, and ids with the mask token among them."""
    told = {"model_type": "Dream", "architectures": ["DreamModel"], "mask_token_id": 59, "use_sliding_window": False}
    told |= {"bos_token_id": 57, "eos_token_id": 57, "pad_token_id": 57, "rope_scaling": None, "use_mrope": False}
    weights, config = draw_checkpoint(seed, "qwen2", **(told | {"vocab_size": 61} | more))
    write_checkpoint(folder, weights, config)
    ids = torch.randint(56, (9,)).tolist()
    return weights, config, [*ids[:4], 59, *ids[4:], 59]


def whole(query: int, key: int) -> bool:
    return True


def apart(model: rp.ProbedModel, ids: list[int], expected: Tensor) -> float:
    """In units of the largest logit, where that is above 1."""
    with torch.no_grad():
        found = model.logits(torch.tensor([ids]))[0].double()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1))


@pytest.mark.parametrize("seed", rest_long(range(5), 2))
@pytest.mark.parametrize("name", RELATIVES)
def test_every_relative_of_any_size_equals_a_slow_decoder(name: str, seed: int, tmp_path: Path) -> None:
    weights, config, ids = checkpoint(tmp_path / "dream", seed, **RELATIVES[name])
    model = rp.load_model(tmp_path / "dream")
    expected = slow_logits(weights, config, ids, whole, range(len(ids)))
    assert apart(model, ids, expected) < CLOSE
    assert (model.logit_shift, model.mask_token_id, model.reads) == (1, 59, "bidirectional")
    causal = slow_logits(weights, config, ids, lambda i, j: j <= i, range(len(ids)))
    assert apart(model, ids, causal) > 100 * CLOSE, "a causal mask would be seen"
    padded = torch.tensor([[*ids, 0, 0]])
    with torch.no_grad():
        rows = model.logits(padded, torch.tensor([[1] * len(ids) + [0, 0]]))[0, : len(ids)].double()
    assert float((rows - expected).abs().max() / expected.abs().max().clamp(min=1)) < CLOSE


def test_the_expand_token_of_dreamon_is_a_token_like_another(tmp_path: Path) -> None:
    """It can be evidence and target: the model predicts it where the answer is longer than its masks."""
    checkpoint(tmp_path / "dreamon", 1, **RELATIVES["DreamOn"])
    model = rp.load_model(tmp_path / "dreamon")
    assert (model.vocab_size, model.module.config.expand_token_id) == (61, 60)
    model.module.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["expand_token_id"] == 60
    ids = torch.tensor([[1, 2, 59, 60, 3]])
    with torch.no_grad():
        log_probs = model.logits(ids)[0, 1].log_softmax(-1)
    assert log_probs[60].isfinite() and log_probs.exp().sum() == pytest.approx(1)


# --- rotary positions that are scaled ---------------------------------------------------------------------------------

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize("scaling", [YARN, {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8}])
@pytest.mark.parametrize("seed", range(3))
def test_yarn_is_read_as_the_published_code_reads_it(scaling: dict, seed: int, tmp_path: Path) -> None:
    weights, config, ids = checkpoint(tmp_path / "dream", seed, rope_scaling=scaling)
    dim, factor = config["hidden_size"] // config["num_attention_heads"], scaling["factor"]
    original = scaling["original_max_position_embeddings"]
    turns = yarn_frequencies(dim, float(config["rope_theta"]), factor, original)
    stretched = 1 + 0.1 * torch.tensor(factor).log().item()
    expected = slow_logits(weights, config, ids, whole, range(len(ids)), frequencies=turns, stretched=stretched)
    model = rp.load_model(tmp_path / "dream")
    assert apart(model, ids, expected) < CLOSE
    plain = slow_logits(weights, config, ids, whole, range(len(ids)))
    assert apart(model, ids, plain) > 100 * CLOSE, "positions without scaling would be seen"


def test_linear_scaling_too(tmp_path: Path) -> None:
    weights, config, ids = checkpoint(tmp_path / "dream", 2, rope_scaling={"type": "linear", "factor": 3.0})
    dim = config["hidden_size"] // config["num_attention_heads"]
    turns = plain_frequencies(dim, float(config["rope_theta"])) / 3
    expected = slow_logits(weights, config, ids, whole, range(len(ids)), frequencies=turns)
    assert apart(rp.load_model(tmp_path / "dream"), ids, expected) < CLOSE


def test_what_is_saved_of_scaled_positions_reads_the_same_here_and_in_the_published_code(tmp_path: Path) -> None:
    """The published code knows `rope_scaling` alone, and would take plain positions where it is missing."""
    checkpoint(tmp_path / "dream", 3, rope_scaling=YARN)
    model = rp.load_model(tmp_path / "dream")
    model.module.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert {key: written["rope_scaling"][key] for key in YARN} == YARN
    ids = torch.tensor([[1, 2, 3, 59, 5, 6]])
    assert torch.equal(rp.load_model(tmp_path / "again").logits(ids), model.logits(ids))


def test_the_base_is_written_where_the_published_code_looks_for_it(tmp_path: Path) -> None:
    """A newer transformers writes it among the rope_parameters; without `rope_theta` the published code takes 1e4."""
    rotary = {"rope_type": "default", "rope_theta": 500000.0}
    _, config, _ = checkpoint(tmp_path / "dream", 4, rope_parameters=rotary)
    del config["rope_theta"]
    (tmp_path / "dream" / "config.json").write_text(json.dumps(config))
    model = rp.load_model(tmp_path / "dream")
    model.module.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["rope_theta"] == 500000.0
    assert "rope_scaling" not in json.loads((tmp_path / "again" / "config.json").read_text())


# --- the first things that go wrong -----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the Dream checkpoint to damage."""
    return copied("dream-tiny", tmp_path / "dream")


@pytest.mark.parametrize(
    ("settings", "told", "said"),
    [
        ({}, {"mask_token_id": 151666}, r"mask token 151666 is outside the vocabulary \(0 to 255\)"),
        ({"mask_token_id": None}, {}, "names no mask token; pass mask_token_id="),
        (
            {"model_type": "llada", "n_layers": 2},
            {},
            "does not match its config: unexpected model.transformer.blocks.0.k_proj.bias",
        ),
        ({"model_type": "sdar"}, {"block_size": 4}, "does not match its config: missing .*k_norm"),
        ({"model_type": "DreamOfTomorrow"}, {}, "which neither transformers .* nor revprobe knows"),
        ({"use_mrope": True}, {}, "use_mrope=True is not supported"),
        ({"num_key_value_heads": 4}, {}, r"mismatched model.layers.0.self_attn.k_proj.bias \(\(32,\) for \(64,\)\)"),
    ],
)
def test_what_is_not_this_family_is_said_in_one_line(settings: dict, told: dict, said: str, folder: Path) -> None:
    set_in_config(folder, **settings)
    assert re.search(said, refusal(folder, **told))


def test_the_shift_is_the_familys(folder: Path) -> None:
    """The planted fault: read at the masked row itself, the answer is another."""
    pairs = pairs_at((2, 5), (5, 2), count=8, length=8, vocab=240)
    right, wrong = rp.load_model(folder), rp.load_model(folder, logit_shift=0)
    ours, other = (rp.probe_reverse_probability(model, pairs, control=False).value for model in (right, wrong))
    assert abs(ours - other) > 1e-6
