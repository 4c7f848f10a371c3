"""Config files as other checkpoints of the families have them: settings that are left out, written otherwise, or ask
for what the class does not do. Each is read as the published code reads it, or refused by name.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from long_cases import rest_long
from safetensors.torch import load_file, save_file
from torch import Tensor

import revprobe as rp
from tiny import FIXTURES, pairs_at

# fixture -> what its files do not say
CASES = {
    "llada-tiny": {},
    "dream-tiny": {},
    "sdar-tiny": {},
    "fastdllm2-tiny": {"mask_token_id": 253},
    "a2d-qwen3-bd3lm-tiny": {"mask_token_id": 254, "block_size": 4},
    "a2d-qwen2-mdlm-tiny": {"mask_token_id": 254, "bidirectional": True},
    "a2d-llama-mdlm-tiny": {"mask_token_id": 254, "bidirectional": True},
    "diffullama-tiny": {"mask_token_id": 81, "bidirectional": True},
    "diffugpt-tiny": {"mask_token_id": 105},
    "mdlm-tiny": {},
    "bd3lm-tiny": {},
    "lladamoe-tiny": {"mask_token_id": 252},
    "llada2-tiny": {"mask_token_id": 246, "block_size": 4},
}
DECODERS = list(CASES)[:8]  # all of whose heads turn
IDS = torch.tensor([[3, 17, 42, 8, 99, 5, 60, 12, 7]])


def folder_of(name: str, place: Path, settings: dict | None = None, weights: dict[str, Tensor] | None = None) -> Path:
    """A copy with other settings (None: left out), and other tensors where some are given."""
    place.mkdir()
    config = json.loads((FIXTURES / name / "config.json").read_text()) | (settings or {})
    (place / "config.json").write_text(json.dumps({key: one for key, one in config.items() if one is not None}))
    if weights is None:
        shutil.copy(FIXTURES / name / "model.safetensors", place / "model.safetensors")
    else:
        save_file(weights, place / "model.safetensors", {"format": "pt"})
    return place


@torch.no_grad()
def apart(one: rp.ProbedModel, other: rp.ProbedModel) -> float:
    first, second = one.logits(IDS), other.logits(IDS)
    return float((first - second)[first.isfinite()].abs().max())


def refused(place: Path, name: str, said: str) -> None:
    with pytest.raises(rp.RevprobeError, match=said) as caught:
        rp.load_model(place, **CASES[name])
    assert "\n" not in str(caught.value)


# --- what the class does not do --------------------------------------------------------------------------------------

PARTLY = {
    "beside the others": {"partial_rotary_factor": 0.5},
    "as newer releases write it": {
        "partial_rotary_factor": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
}


@pytest.mark.parametrize("way", PARTLY)
@pytest.mark.parametrize("name", DECODERS)
def test_heads_that_turn_in_part_are_refused_where_the_class_turns_them_whole(
    name: str, way: str, tmp_path: Path
) -> None:
    """Llama and Qwen of transformers leave the setting out without a word: logits were off by their own size."""
    refused(folder_of(name, tmp_path / "m", PARTLY[way]), name, "partial_rotary_factor=0.5 is not supported")


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}},
        {"rope_theta": None, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ],
)
def test_llada_turns_by_its_base_alone(settings: dict, tmp_path: Path) -> None:
    """Its published code has no scaled positions; transformers' Llama would have scaled them."""
    refused(folder_of("llada-tiny", tmp_path / "m", settings), "llada-tiny", "type='(linear|yarn)' is not supported")


# --- what is left out or written otherwise ---------------------------------------------------------------------------


def test_llada_without_a_base_has_that_of_the_published_code(tmp_path: Path) -> None:
    """10000, the default of its configuration_llada.py; the 8B models state theirs, 500000."""
    left_out = rp.load_model(folder_of("llada-tiny", tmp_path / "m", {"rope_theta": None}))
    assert apart(left_out, rp.load_model(folder_of("llada-tiny", tmp_path / "s", {"rope_theta": 10000}))) == 0
    assert apart(left_out, rp.load_model(FIXTURES / "llada-tiny")) > 1e-2
    left_out.module.save_pretrained(tmp_path / "again")
    assert apart(left_out, rp.load_model(tmp_path / "again")) == 0


CALLED = {"return_dict": False, "output_attentions": True, "output_hidden_states": True}


@pytest.mark.parametrize("name", rest_long(CASES, 5))
def test_how_other_code_called_the_model_is_not_taken_over(name: str, tmp_path: Path) -> None:
    """Tuples would come out, and weights that sdpa does not give; and no such model could be saved."""
    model = rp.load_model(folder_of(name, tmp_path / "m", CALLED), **CASES[name])
    assert apart(model, rp.load_model(FIXTURES / name, **CASES[name])) < 1e-5
    model.module.save_pretrained(tmp_path / "again")
    assert apart(model, rp.load_model(tmp_path / "again")) < 1e-5


@pytest.mark.parametrize(
    ("name", "setting", "whole"), [("llada2-tiny", "routed_scaling_factor", 2), ("sdar-tiny", "rms_norm_eps", 1)]
)
def test_a_whole_number_may_stand_for_a_fraction(name: str, setting: str, whole: int, tmp_path: Path) -> None:
    one, other = (
        rp.load_model(folder_of(name, tmp_path / kind.__name__, {setting: kind(whole)}), **CASES[name])
        for kind in (int, float)
    )
    assert apart(one, other) == 0


def test_a_setting_of_another_type_is_named_with_its_type(tmp_path: Path) -> None:
    """The first line of what transformers raises only announces the second."""
    refused(folder_of("sdar-tiny", tmp_path / "m", {"hidden_size": "64"}), "sdar-tiny", "expected int, got str")


def test_windows_that_the_published_a2d_leaves_out_are_left_out(tmp_path: Path) -> None:
    windows = {"use_sliding_window": True, "sliding_window": 2, "max_window_layers": 0}
    for name in ("a2d-qwen3-bd3lm-tiny", "a2d-qwen2-mdlm-tiny", "a2d-llama-mdlm-tiny"):
        model = rp.load_model(folder_of(name, tmp_path / name, windows), **CASES[name])
        assert apart(model, rp.load_model(FIXTURES / name, **CASES[name])) == 0


def test_a_config_of_the_published_radd_may_name_its_type(tmp_path: Path) -> None:
    model = rp.load_model(folder_of("radd-tiny", tmp_path / "m", {"model_type": "radd"}))
    assert apart(model, rp.load_model(FIXTURES / "radd-tiny")) == 0


@pytest.mark.parametrize("name", ["mdlm-tiny", "bd3lm-tiny"])
def test_the_head_of_mdlm_is_its_own_whatever_the_config_says_of_ties(name: str, tmp_path: Path) -> None:
    model = rp.load_model(folder_of(name, tmp_path / "m", {"tie_word_embeddings": True}))
    assert apart(model, rp.load_model(FIXTURES / name)) < 1e-5


# --- mixtures of experts ---------------------------------------------------------------------------------------------


def without_shared(*, empty: bool) -> dict[str, Tensor]:
    """LLaDA2's weights without the experts that every token passes; `empty`: as tensors of no rows, as its code saves
    a number of 0."""
    weights = load_file(FIXTURES / "llada2-tiny" / "model.safetensors")
    shared = {key: tensor for key, tensor in weights.items() if ".shared_experts." in key}
    kept = {key: tensor for key, tensor in weights.items() if key not in shared}
    none = {key: t[:, :0] if "down" in key else t[:0] for key, t in shared.items()}
    return kept | ({key: tensor.contiguous() for key, tensor in none.items()} if empty else {})


@pytest.mark.parametrize("count", rest_long([0, None]))
@pytest.mark.parametrize("empty", [False, True])
def test_llada2_without_shared_experts(count: int | None, empty: bool, tmp_path: Path, recwarn) -> None:
    """They add nothing: as where what they give is multiplied by zero."""
    name = "llada2-tiny"
    settings = {"num_shared_experts": count}
    model = rp.load_model(folder_of(name, tmp_path / "m", settings, without_shared(empty=empty)), **CASES[name])
    assert not list(recwarn)
    weights = load_file(FIXTURES / name / "model.safetensors")
    silent = {key: t * 0 if ".shared_experts.down_proj" in key else t for key, t in weights.items()}
    expected = rp.load_model(folder_of(name, tmp_path / "silent", {}, silent), **CASES[name])
    assert apart(model, expected) < 1e-5
    model.module.save_pretrained(tmp_path / "again")
    assert apart(model, rp.load_model(tmp_path / "again")) == 0
    pairs = pairs_at((6, 5), (5, 6), count=9, length=8, vocab=100)
    kept = [name for name, _ in expected.module.named_parameters() if ".shared_experts." not in name]
    theirs = rp.probe_gradient_cosine(expected, pairs, parameters=kept)
    assert rp.probe_gradient_cosine(model, pairs).value == pytest.approx(theirs.value, abs=1e-6)


def test_shared_experts_that_the_config_does_not_count_are_no_experts_to_leave_out(tmp_path: Path) -> None:
    refused(folder_of("llada2-tiny", tmp_path / "m", {"num_shared_experts": 0}), "llada2-tiny", "shared_experts")


@pytest.mark.parametrize("name", rest_long(["lladamoe-tiny", "llada2-tiny"]))
def test_experts_that_are_moved_to_float64_run(name: str) -> None:
    """torch multiplies in groups up to float32, and the kernel was chosen when the weights were read."""
    moved, read = rp.load_model(FIXTURES / name, **CASES[name]), None
    moved.module.to(torch.float64)
    read = rp.load_model(FIXTURES / name, dtype="float64", **CASES[name])
    assert apart(moved, read) < 1e-12
    pairs = pairs_at((6, 5), (5, 6), count=9, length=8, vocab=100)
    ours, theirs = (rp.probe_gradient_cosine(one, pairs).value for one in (moved, read))
    assert ours == pytest.approx(theirs, abs=1e-12)


def test_the_base_of_a_llada_moe_may_stand_among_those_of_rotation(tmp_path: Path) -> None:
    name, rotary = "lladamoe-tiny", {"rope_type": "default", "rope_theta": 50000.0}
    model = rp.load_model(
        folder_of(name, tmp_path / "m", {"rope_theta": None, "rope_parameters": rotary}), **CASES[name]
    )
    assert apart(model, rp.load_model(FIXTURES / name, **CASES[name])) == 0
    model.module.save_pretrained(tmp_path / "again")
    assert apart(model, rp.load_model(tmp_path / "again")) == 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"moe_layer_freq": 1}, "moe_layer_freq=1 does not say of each of 2 layers"),
        ({"expert_intermediate_size": None}, "does not say expert_intermediate_size"),
        ({"moe_layer_freq": [0, 1], "dense_intermediate_size": None}, "does not say dense_intermediate_size"),
    ],
)
def test_what_a_llada_moe_does_not_say_of_its_layers_is_named(settings: dict, said: str, tmp_path: Path) -> None:
    refused(folder_of("lladamoe-tiny", tmp_path / "m", settings), "lladamoe-tiny", said)


# --- what a user said ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "size"), [("sdar-tiny", 2), ("sdar-tiny", "whole"), ("bd3lm-tiny", 2)])
def test_blocks_that_were_asked_for_are_those_of_what_is_saved(name: str, size: int | str, tmp_path: Path) -> None:
    """Also where the config says others (SDAR's may still say 4 for a model of 8): read again, the model would have
    given other numbers without a word."""
    model = rp.load_model(FIXTURES / name, **CASES.get(name, {}) | {"block_size": size})
    model.module.save_pretrained(tmp_path / "again")
    again = rp.load_model(tmp_path / "again")
    assert again.block_size == model.block_size == (None if size == "whole" else size)
    assert apart(model, again) < 1e-5
    assert rp.load_model(tmp_path / "again", block_size=5).block_size == 5, "and may be asked for otherwise again"


@pytest.mark.parametrize("kind", ["llada", "dream", "radd", "mdlm", "diffugpt", "lladamoe"])
def test_blocks_are_a_dial_for_a_family_that_reads_the_whole_and_are_not_saved(kind: str, tmp_path: Path) -> None:
    """What is saved is the model, which knows no blocks; the wrapper says in which it is read."""
    name = f"{kind}-tiny"
    model = rp.load_model(FIXTURES / name, **CASES.get(name, {}) | {"block_size": 3})
    assert model.block_size == 3 and "in blocks of 3" in repr(model)
    model.module.save_pretrained(tmp_path / "again")
    again = rp.load_model(tmp_path / "again")
    assert again.block_size is None and "bidirectional" in repr(again)
    assert apart(model, again.in_blocks(3)) < 1e-5


@pytest.mark.parametrize("name", rest_long(["radd-tiny", *(name for name in CASES if name != "diffullama-tiny")], 5))
def test_an_adapter_that_peft_saves_says_where_its_base_is(name: str, tmp_path: Path) -> None:
    """peft reads the base's config again by our class, and its place from the model. (Llama's files do not say that
    they are DiffuLLaMA's, so an adapter on them is a causal model's unless the user says so too.)"""
    from peft import LoraConfig, get_peft_model

    told = CASES.get(name, {})
    model = rp.load_model(FIXTURES / name, **told)
    torch.manual_seed(0)
    adapted: torch.nn.Module = get_peft_model(
        model.module, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    )
    adapted.eval().save_pretrained(tmp_path / "adapter")  # type: ignore[operator]
    again = rp.load_model(tmp_path / "adapter", **told)
    assert apart(rp.ProbedModel(model, objective="masked").with_module(adapted), again) < 1e-4
    assert apart(rp.load_model(FIXTURES / name, **told), again) > 1e-2
