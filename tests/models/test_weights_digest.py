"""The digest of a model's weights changes with any of them, and with nothing else."""

import copy
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from revprobe.models import weights_digest as file
from revprobe.models.weights_digest import settings_digest, weights_digest
from tiny import gpt2, llama

BLOCK = "transformer.h.1.attn.c_attn.weight"


def swapped(module: nn.Module) -> None:
    weight = module.get_parameter(BLOCK)
    weight.data[[0, 1]] = weight.data[[1, 0]]


def nudged(module: nn.Module) -> None:
    module.get_parameter(BLOCK).data[5, 7] += 1e-3


def narrowed(module: nn.Module) -> None:
    module.get_submodule("transformer.ln_f").to(torch.bfloat16)


def renamed(module: nn.Module) -> None:
    layer = module.get_submodule("transformer")
    layer.ln_g = layer.ln_f
    del layer.ln_f


def reshaped(module: nn.Module) -> None:
    weight = module.get_parameter(BLOCK)
    weight.data = weight.data.view(weight.shape[1], weight.shape[0])


def buffered(module: nn.Module) -> None:
    module.register_buffer("scale", torch.ones(()))


@pytest.mark.parametrize("change", [swapped, nudged, narrowed, renamed, reshaped, buffered])
def test_every_change_of_a_weight_is_seen(change: Callable[[nn.Module], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """One entry among all, two rows in each other's place, a type, a name, a shape."""
    monkeypatch.setattr(file, "_AT_A_TIME", 1000)
    module = gpt2().module
    before = weights_digest(module)
    monkeypatch.setattr(file, "_AT_A_TIME", 2**20)
    assert weights_digest(copy.deepcopy(module)) == weights_digest(gpt2().module) == before
    change(module)
    assert weights_digest(module) != before


def test_an_adapter_is_seen_and_whether_it_is_on() -> None:
    plain = weights_digest(gpt2().module)
    tuned = peft.get_peft_model(gpt2().module, peft.LoraConfig(r=2, target_modules=["c_attn"]))
    begun = weights_digest(tuned)
    tuned.add_adapter("other", peft.LoraConfig(r=2, target_modules=["c_attn"]))
    added = weights_digest(tuned)
    tuned.set_adapter("other")
    other = weights_digest(tuned)
    with tuned.disable_adapter():
        assert len({plain, begun, added, other, weights_digest(tuned)}) == 5
    assert weights_digest(tuned) == other
    next(p for name, p in tuned.named_parameters() if "lora_B.other" in name).data += 1
    assert weights_digest(tuned) != other


def test_a_weight_on_disk_and_one_of_two_tensors_are_read_as_far_as_they_go() -> None:
    assert weights_digest(nn.Linear(3, 2, device="meta")) != weights_digest(nn.Linear(2, 3, device="meta"))

    def pair(second: float) -> nn.Module:
        module = nn.Module()
        module.weight = nn.Parameter(TwoTensor(torch.ones(2, 3), torch.full((2, 3), second)))
        return module

    assert weights_digest(pair(1.0)) == weights_digest(pair(1.0)) != weights_digest(pair(2.0))


def lora() -> nn.Module:
    return peft.get_peft_model(llama().module, peft.LoraConfig(r=2, target_modules=["q_proj"]))


def scaled(module: nn.Module) -> None:
    next(part for part in module.modules() if hasattr(part, "scaling") and hasattr(part, "lora_A")).scaling[
        "default"
    ] = 7


def turned(module: nn.Module) -> None:
    next(part for name, part in module.named_modules() if name.endswith("rotary_emb")).inv_freq.mul_(0.5)


def divided(module: nn.Module) -> None:
    next(part for name, part in module.named_modules() if name.endswith("self_attn")).scaling *= 2


def configured(module: nn.Module) -> None:
    module.config.rope_parameters = {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0}


def another_activation(module: nn.Module) -> None:
    next(part for name, part in module.named_modules() if name.endswith("mlp")).act_fn = nn.ReLU()


@pytest.mark.parametrize("change", [scaled, turned, divided, configured, another_activation])
def test_every_setting_that_moves_answers_is_seen_beside_the_weights(change: Callable[[nn.Module], None]) -> None:
    """Parts of one model were gone on with by another with the same weights."""
    module = lora()
    before = settings_digest(module)
    assert settings_digest(copy.deepcopy(module)) == settings_digest(lora()) == before
    weights = weights_digest(module)
    change(module)
    assert settings_digest(module) != before and weights_digest(module) == weights


def test_where_a_model_lies_and_how_it_was_used_is_no_setting(tmp_path: Path) -> None:
    module = llama().module
    before = settings_digest(module)
    module.save_pretrained(tmp_path / "here")
    module.train().gradient_checkpointing_enable()
    module(torch.arange(9)[None])
    module.config.use_cache = False
    assert settings_digest(module.eval()) == before
    loaded = [type(module).from_pretrained(tmp_path / "here") for _ in range(2)]
    loaded[1].config.name_or_path = loaded[1].name_or_path = "there"
    assert settings_digest(loaded[0]) == settings_digest(loaded[1])


def layers_turn(kind: str) -> nn.Module:
    """A model whose sliding and full layers turn differently, the full ones by angles that grow with the row."""
    full = {"rope_type": kind, "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}
    if kind == "longrope":
        full |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = Gemma3TextConfig(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": full,
        },
    )
    torch.manual_seed(0)
    return Gemma3ForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_angles_of_a_type_of_layers_that_follow_the_row_are_no_setting(kind: str) -> None:
    """Parts were refused as another model's once a longer row had been run; other angles are another model still."""
    module, other = layers_turn(kind), layers_turn(kind)
    before = settings_digest(module)
    assert before == settings_digest(other)
    rotary = next(part for name, part in module.named_modules() if name.endswith("rotary_emb"))
    angles = rotary.full_attention_inv_freq.clone()
    with torch.no_grad():
        module(torch.arange(40)[None])
    assert not torch.equal(rotary.full_attention_inv_freq, angles), "the row was long enough to move them"
    assert settings_digest(module) == before
    changed = next(part for name, part in other.named_modules() if name.endswith("rotary_emb"))
    changed.sliding_attention_inv_freq.mul_(0.5)
    assert settings_digest(other) != before
