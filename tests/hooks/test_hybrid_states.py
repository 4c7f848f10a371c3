"""Which state is which where a block holds more than attention and an MLP: Mamba, convolution, bottleneck, pooling."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import revprobe as rp
from revprobe.hooks.state_survey import NO_ATTENTION
from revprobe.hooks.states import EMBEDDED, change_states, record_states
from revprobe.models.structure import states_of
from tiny import GROUPED, MASK, SIZES, causal, drawn, language_model

FOUR = {**SIZES, "num_hidden_layers": 4, "num_key_value_heads": 2}
MAMBA = {"mamba_d_state": 8, "mamba_n_groups": 1, "mamba_n_heads": 4}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 16}


def jamba() -> transformers.PreTrainedConfig:
    every = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    return transformers.JambaConfig(
        **FOUR, **every, num_experts=2, mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False
    )


def zamba2() -> transformers.PreTrainedConfig:
    kinds = {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "num_mem_blocks": 1}
    heads = {"n_mamba_heads": 4, "mamba_headdim": 16, "mamba_d_state": 8, "mamba_ngroups": 1}
    sizes = {key: value for key, value in FOUR.items() if key != "num_key_value_heads"}
    return transformers.Zamba2Config(**sizes, **kinds, **heads, use_mamba_kernels=False)


# name -> config, and {layer: path} of what attention and the MLP write, by hand from transformers' own code
HYBRIDS: dict[str, tuple[Callable[[], Any], dict[int, str], dict[int, str]]] = {
    "Jamba": (
        jamba,
        {n: f"model.layers.{n}.self_attn.o_proj" for n in (1, 3)},
        {n: f"model.layers.{n}.feed_forward" for n in range(4)},
    ),
    "LFM2": (
        lambda: transformers.Lfm2Config(**FOUR, layer_types=["conv", "full_attention"] * 2),
        {n: f"model.layers.{n}.self_attn.out_proj" for n in (1, 3)},
        {n: f"model.layers.{n}.feed_forward" for n in range(4)},
    ),
    "Falcon-H1": (  # Mamba and attention side by side in every block
        lambda: transformers.FalconH1Config(**GROUPED, **MAMBA, mamba_d_ssm=32, mamba_d_head=8),
        {n: f"model.layers.{n}.self_attn.o_proj" for n in (0, 1)},
        {n: f"model.layers.{n}.feed_forward" for n in (0, 1)},
    ),
    "Zamba2": (  # attention and MLP of one set of weights, in two blocks
        zamba2,
        {n: f"model.layers.{n}.shared_transformer.self_attn.o_proj" for n in (1, 3)},
        {n: f"model.layers.{n}.shared_transformer.feed_forward.down_proj" for n in (1, 3)},
    ),
    "MiniMax": (
        lambda: transformers.MiniMaxConfig(
            **GROUPED, num_local_experts=4, layer_types=["linear_attention", "full_attention"]
        ),
        {1: "model.layers.1.self_attn.o_proj"},
        {n: f"model.layers.{n}.mlp" for n in (0, 1)},
    ),
}


@pytest.mark.parametrize("name", HYBRIDS)
def test_what_attention_writes_is_looked_for_where_there_is_attention(name: str) -> None:
    """A Mamba layer's output projection is named as attention's are, and is not what attention writes."""
    config, attention, mlp = HYBRIDS[name]
    states = states_of(causal(config()))
    assert {layer: site.path for layer, site in states.of("attention").items()} == attention
    assert {layer: site.path for layer, site in states.of("head").items()} == attention
    assert {layer: site.path for layer, site in states.of("mlp").items()} == mlp
    none = [layer for layer in range(max(attention) + 1) if layer not in attention]
    assert states.missing("attention") == states.missing("head") == dict.fromkeys(none, NO_ATTENTION)


@contextmanager
def moved(module: nn.Module) -> Any:
    """Something added to what a module returns; not in proportion, since a norm may follow."""
    more = lambda out: out + torch.arange(out.shape[-1]).sin()  # noqa: E731
    handle = module.register_forward_hook(
        lambda _, __, out: (more(out[0]), *out[1:]) if type(out) is tuple else more(out)
    )
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("name", ["Jamba", "Falcon-H1", "Zamba2"])
def test_with_what_attention_writes_held_nothing_of_attention_counts_and_the_rest_does(name: str) -> None:
    """By values: attention's values moved, or (beside it) the state-space part, with the site held."""
    model = causal(HYBRIDS[name][0](), scale=0.3)
    site = states_of(model).of("attention")[1]
    ids = torch.tensor([[4, 0, 7, 30, 2, 9]])
    block = model.module.get_submodule("model.layers.1")
    beside = next((part for path, part in block.named_modules() if path.split(".")[-1] == "mamba"), None)
    with torch.no_grad(), record_states(model.module, [site]) as own:
        plain = model.logits(ids)
    held = {site: lambda _: own[site].clone()}
    values = model.module.get_submodule(site.path.replace("o_proj", "v_proj"))
    with torch.no_grad(), change_states(model.module, held), moved(values):
        torch.testing.assert_close(model.logits(ids), plain, atol=1e-4, rtol=1e-4)
    with torch.no_grad(), moved(values):
        assert not torch.allclose(model.logits(ids), plain, atol=1e-3), "attention counts"
    if beside is not None:
        with torch.no_grad(), change_states(model.module, held), moved(beside):
            assert not torch.allclose(model.logits(ids), plain, atol=1e-3), "the state-space part is no attention"


def masked(config: transformers.PreTrainedConfig) -> rp.ProbedModel:
    module = drawn(lambda: language_model(config, "masked"), scale=0.3)
    return rp.ProbedModel(module, rp.letter_tokenizer(), objective="masked", mask_token_id=MASK)


def test_a_bottleneck_that_is_added_inside_is_not_what_attention_writes() -> None:
    """MobileBERT adds the block's bottleneck to its attention, in the part that attends, as wide as the stream here."""
    sizes = {"embedding_size": 16, "intra_bottleneck_size": 32, "num_feedforward_networks": 2}
    model = masked(transformers.MobileBertConfig(**SIZES, **sizes))
    paths = {layer: site.path for layer, site in states_of(model).of("attention").items()}
    assert paths == {n: f"mobilebert.encoder.layer.{n}.attention.output.dense" for n in (0, 1)}


class AddsBottleneck(nn.Module):
    """A block whose attention adds what another part made of the stream, under a name that no role is known for."""

    def __init__(self, adds: bool) -> None:
        super().__init__()
        self.narrow, self.mixing = nn.Linear(32, 32), Mixing(adds)

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        return stream + self.mixing(stream, self.narrow(stream))


class Mixing(nn.Module):
    def __init__(self, adds: bool) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.last = (nn.Linear(32, 32) for _ in range(4))
        self.adds = adds

    def forward(self, stream: torch.Tensor, narrow: torch.Tensor) -> torch.Tensor:
        split = lambda part: part(stream).unflatten(-1, (4, 8)).transpose(1, 2)  # noqa: E731
        mixed = nn.functional.scaled_dot_product_attention(split(self.q_proj), split(self.k_proj), split(self.v_proj))
        return self.last(mixed.transpose(1, 2).flatten(-2)) + narrow * self.adds


class Bottlenecked(nn.Module):
    def __init__(self, adds: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(56, 32), nn.Linear(32, 56)
        self.layers = nn.ModuleList([AddsBottleneck(adds), AddsBottleneck(adds)])

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        stream = self.embed(input_ids)
        for layer in self.layers:
            stream = layer(stream)
        return self.head(stream)


@pytest.mark.parametrize("adds", [True, False])
def test_a_part_that_adds_what_another_part_made_is_no_output_of_attention(adds: bool) -> None:
    model = rp.ProbedModel(
        drawn(lambda: Bottlenecked(adds), scale=0.2), objective="masked", mask_token_id=MASK, logit_shift=0
    )
    assert list(states_of(model).of("attention")) == ([] if adds else [0, 1])


def test_the_first_state_of_a_decoder_behind_a_pooled_encoder_is_no_embedding() -> None:
    """Funnel's encoder layers run on fewer tokens and have no state; what its decoder is given is far from layer -1."""
    sizes = {"vocab_size": 56, "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48, "pad_token_id": 55}
    model = masked(transformers.FunnelConfig(**sizes, block_sizes=[1, 1]))
    assert list(states_of(model).of("residual")) == [2, 3]
    assert EMBEDDED not in states_of(model).of("residual")
