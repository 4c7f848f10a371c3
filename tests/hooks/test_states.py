"""Where states lie: against transformers' own outputs, TransformerLens' hooks, hooks by hand, and planted faults."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import revprobe as rp
from revprobe.errors import RevprobeError
from revprobe.hooks.state_survey import MORE, NO_ATTENTION, NO_BLOCK, NO_HEADS, NO_MLP
from revprobe.hooks.states import EMBEDDED, KINDS, change_states, record_states
from revprobe.models.structure import states_of
from tiny import FIXTURES, GROUPED, MASK, SIZES, bridged, causal, drawn, gpt2, language_model, llama


def masked(config: transformers.PreTrainedConfig) -> rp.ProbedModel:
    module = drawn(lambda: language_model(config, "masked"))
    return rp.ProbedModel(module, rp.letter_tokenizer(), objective="masked")


IDS = torch.tensor([[4, 0, 7, 30, 2, 9], [4, 1, 31, 8, 3, 5]])

MODELS: dict[str, Callable[[], rp.ProbedModel]] = {
    "GPT-2": gpt2,
    "Llama": llama,
    "Gemma 2": lambda: causal(transformers.Gemma2Config(**GROUPED)),
    "GPT-NeoX": lambda: causal(transformers.GPTNeoXConfig(**SIZES)),
    "BLOOM": lambda: causal(transformers.BloomConfig(**SIZES)),
    "gpt-oss": lambda: causal(
        transformers.GptOssConfig(**GROUPED, num_local_experts=4, layer_types=["full_attention"] * 2)
    ),
    "BERT": lambda: masked(transformers.BertConfig(**SIZES)),
    "ModernBERT": lambda: masked(transformers.ModernBertConfig(**SIZES | {"pad_token_id": 0})),
    "DeBERTa": lambda: masked(
        transformers.DebertaV2Config(**SIZES, pos_att_type=["p2c", "c2p"], relative_attention=True)
    ),
    **{
        name: lambda name=name: rp.load_model(FIXTURES / name)
        for name in ("llada-tiny", "dream-tiny", "radd-tiny", "mdlm-tiny", "bd3lm-tiny", "sdar-tiny")
    },
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> rp.ProbedModel:
    return MODELS[request.param]()


def recorded(model: rp.ProbedModel, kind: str) -> dict[int, Tensor]:
    sites = states_of(model).of(kind)
    with torch.no_grad(), record_states(model.module, list(sites.values())) as found:
        model.logits(IDS)
    return {layer: found[site] for layer, site in sites.items()}


def test_every_layer_of_these_has_every_state(model: rp.ProbedModel) -> None:
    states = states_of(model)
    assert not states.without
    assert list(states.of("residual")) == [EMBEDDED, 0, 1]
    assert all(list(states.of(kind)) == [0, 1] for kind in KINDS[1:])


def test_the_state_of_another_sequence_brings_its_logits(model: rp.ProbedModel) -> None:
    """At every layer, by a hook of this test's own; and half of the layers' state does not."""
    sites = states_of(model).of("residual")
    with torch.no_grad():
        states = recorded(model, "residual")
        wanted = model.logits(IDS).nan_to_num(neginf=0.0)
        for layer, site in sites.items():
            child = model.module.get_submodule(site.path)
            swapped = states[layer].flip(0)
            found = with_state(model, child, swapped, before=site.before)
            torch.testing.assert_close(found.nan_to_num(neginf=0.0), wanted.flip(0), atol=1e-4, rtol=1e-4)


def with_state(model: rp.ProbedModel, child: nn.Module, state: Tensor, *, before: bool) -> Tensor:
    """The logits when a module returns `state`, or is given it."""

    def give(_: nn.Module, args: Any, kwargs: Any) -> Any:
        return ((state, *args[1:]), kwargs) if args else ((), kwargs | {"hidden_states": state})

    def hand_on(_: nn.Module, __: Any, output: Any) -> Any:
        return (state, *output[1:]) if isinstance(output, tuple) else state

    given = child.register_forward_pre_hook(give, with_kwargs=True) if before else None
    handle = given or child.register_forward_hook(hand_on)
    try:
        return model.logits(IDS)
    finally:
        handle.remove()


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "llada-tiny", "dream-tiny", "GPT-NeoX"])
def test_the_stream_is_the_sum_of_what_is_written_into_it(name: str) -> None:
    """Of blocks that add what attention and MLP write, with no norm between; and heads make what attention writes."""
    model = MODELS[name]()
    residual, attention, mlp, head = (recorded(model, kind) for kind in KINDS)
    for layer in (0, 1):
        torch.testing.assert_close(residual[layer], residual[layer - 1] + attention[layer] + mlp[layer])
        projection = model.module.get_submodule(states_of(model).of("head")[layer].path)
        with torch.no_grad():
            torch.testing.assert_close(projection(head[layer].flatten(-2)), attention[layer])


def test_the_residual_stream_is_what_transformers_calls_hidden_states() -> None:
    model = llama()
    with torch.no_grad():
        hidden = model.module(IDS, output_hidden_states=True).hidden_states
        last = recorded(model, "residual")[1]
        for layer, state in list(recorded(model, "residual").items())[:2]:
            torch.testing.assert_close(state, hidden[layer + 1], rtol=0, atol=0)
        torch.testing.assert_close(model.module.model.norm(last), hidden[-1], rtol=0, atol=0)


LENS = {
    "residual": "blocks.{}.hook_resid_post",
    "attention": "blocks.{}.hook_attn_out",
    "mlp": "blocks.{}.hook_mlp_out",
    "head": "blocks.{}.attn.hook_z",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("made", [gpt2, llama], ids=["GPT-2", "Llama"])
def test_transformer_lens_caches_the_same(made: Callable[[], rp.ProbedModel], kind: str) -> None:
    model = made()
    _, cache = model.to_bridge().run_with_cache(IDS)
    for layer, state in recorded(model, kind).items():
        if layer != EMBEDDED:
            theirs = cache[LENS[kind].format(layer)].reshape(state.shape)
            torch.testing.assert_close(theirs, state, atol=1e-5, rtol=1e-4)


def test_a_bridge_has_the_same_states() -> None:
    model = llama()
    theirs, ours = (recorded(one, "residual") for one in (bridged(model), model))
    assert sorted(theirs) == sorted(ours)
    for layer, state in ours.items():
        torch.testing.assert_close(theirs[layer], state, atol=1e-5, rtol=1e-4)


# --- what is not there, and faults planted ---------------------------------------------------------------------------


class SecondStream(nn.Module):
    """Every block reads the embedding beside the state."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config
        self.mix = nn.Linear(16, 16)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        aside = self.mix(self.inner.get_input_embeddings()(input_ids))
        block = self.inner.transformer.h[1]
        handle = block.register_forward_pre_hook(lambda _, args: (args[0] + aside, *args[1:]))
        try:
            return self.inner(input_ids, attention_mask=attention_mask)
        finally:
            handle.remove()


def test_layers_before_a_second_stream_joins_have_no_residual_site() -> None:
    torch.manual_seed(0)
    model = rp.ProbedModel(SecondStream(gpt2().module).eval(), objective="causal")
    states = states_of(model)
    assert states.missing("residual") == {EMBEDDED: MORE, 0: MORE} and list(states.of("residual")) == [1]
    assert list(states.of("attention")) == [0, 1], "what is written is there all the same"


@pytest.mark.parametrize(
    ("config", "kinds", "reason"),
    [
        (transformers.AlbertConfig(**SIZES, embedding_size=16), KINDS, NO_BLOCK),  # one block, run twice
        (transformers.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32), ("mlp",), NO_MLP),  # tokens in a row
    ],
)
def test_what_a_model_lacks_is_said(config: transformers.PreTrainedConfig, kinds: tuple[str, ...], reason: str) -> None:
    model = masked(config) if isinstance(config, transformers.AlbertConfig) else causal(config)
    states = states_of(model)
    for kind in KINDS:
        assert states.missing(kind) == (dict.fromkeys((0, 1), reason) if kind in kinds else {})


def test_heads_that_are_gated_before_the_projection_are_none() -> None:
    """Qwen3.5 multiplies what its heads read by a gate, and its linear layers have no heads."""
    heads = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    states = states_of(causal(transformers.Qwen3_5TextConfig(**GROUPED | heads | {"num_hidden_layers": 4})))
    assert states.missing("head") == {0: NO_ATTENTION, 1: NO_ATTENTION, 2: NO_ATTENTION, 3: NO_HEADS}
    assert list(states.of("residual")) == [EMBEDDED, 0, 1, 2, 3]


def test_half_precision_is_looked_at_as_well() -> None:
    model = rp.ProbedModel(llama().module.to(torch.bfloat16), objective="causal")
    assert not states_of(model).without


def test_no_trace_is_left_and_a_site_that_is_not_reached_is_said(model: rp.ProbedModel) -> None:
    sites = [site for kind in KINDS for site in states_of(model).of(kind).values()]
    with pytest.raises(ZeroDivisionError), change_states(model.module, {site: lambda state: None for site in sites}):
        raise ZeroDivisionError
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())
    with pytest.raises(RevprobeError, match="was never reached"), record_states(model.module, sites):
        pass


def test_only_what_is_changed_changes() -> None:
    """The head's own slice is swapped, the others stay; and a mask token's model hands its changes on."""
    model = MODELS["llada-tiny"]()
    ids = torch.tensor([[5, model.mask_token_id, 9, 12]])
    site = states_of(model).of("head")[1]
    seen: dict[Any, Tensor] = {}

    def without_head(state: Tensor) -> Tensor:
        changed = state.clone()
        changed[:, :, 1] = 0.0
        seen["given"] = state
        return changed

    projection = model.module.get_submodule(site.path)
    with torch.no_grad(), record_states(model.module, [states_of(model).of("attention")[1]]) as written:
        model.logits(ids)
        own = next(iter(written.values()))
        with change_states(model.module, {site: without_head}):
            model.logits(ids)
        share = torch.zeros_like(seen["given"])
        share[:, :, 1] = seen["given"][:, :, 1]
        torch.testing.assert_close(next(iter(written.values())), own - projection(share.flatten(-2)))
    assert model.mask_token_id != MASK


# --- what is written is all that the part writes, and nothing else ---------------------------------------------------


def written(model: rp.ProbedModel, ids: Tensor) -> dict[str, dict[int, Tensor]]:
    states = states_of(model)
    kinds = {kind: states.of(kind) for kind in ("residual", "attention", "mlp")}
    with torch.no_grad(), record_states(model.module, [s for some in kinds.values() for s in some.values()]) as found:
        model.logits(ids)
    return {kind: {layer: found[site] for layer, site in some.items()} for kind, some in kinds.items()}


@pytest.mark.parametrize(
    ("config", "objective"),
    [
        (transformers.FalconConfig(**SIZES), "causal"),  # adds the attention to what its MLP returned, in its place
        (transformers.BloomConfig(**SIZES), "causal"),  # its MLP is given the stream, and adds it
        (transformers.MptConfig(vocab_size=56, d_model=32, n_layers=2, n_heads=4, max_seq_len=64), "causal"),  # too
        (transformers.RobertaPreLayerNormConfig(**SIZES), "masked"),  # its dense layer sits in a part that adds it
        (transformers.PhiConfig(**SIZES), "causal"),
        (
            transformers.GPTJConfig(vocab_size=56, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64),
            "causal",
        ),
        (transformers.MixtralConfig(**GROUPED, num_local_experts=4), "causal"),
    ],
    ids=lambda one: getattr(one, "model_type", ""),
)
def test_what_is_written_adds_up_to_the_stream_also_where_a_part_adds_the_stream_itself(
    config: transformers.PreTrainedConfig, objective: str
) -> None:
    model = masked(config) if objective == "masked" else causal(config)
    found = written(model, IDS)
    for layer in (0, 1):
        before, after = found["residual"][layer - 1], found["residual"][layer]
        torch.testing.assert_close(
            before + found["attention"][layer] + found["mlp"][layer], after, atol=1e-4, rtol=1e-4
        )


class OwnAttention(nn.Module):
    def __init__(self, adds: bool) -> None:
        super().__init__()
        self.adds, self.qkv, self.out = adds, nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, state: Tensor) -> Tensor:
        query, key, value = (one.unflatten(-1, (2, 8)).transpose(1, 2) for one in self.qkv(state).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(1, 2).flatten(2)) + self.adds * state  # type: ignore[no-any-return]


class OwnMLP(nn.Module):
    def __init__(self, adds: bool) -> None:
        super().__init__()
        self.adds, self.up, self.down = adds, nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, state: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(state))) + self.adds * state  # type: ignore[no-any-return]


class OwnBlock(nn.Module):
    """A block of someone's own: attention and MLP add the stream themselves, or two MLPs write beside each other."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.attn, self.mlp = how, OwnAttention(how == "adds"), OwnMLP(how == "adds")
        self.shared = nn.ModuleDict({"mlp": nn.Linear(16, 16)})

    def forward(self, state: Tensor) -> Tensor:
        if self.how == "adds":
            return self.mlp(self.attn(state))  # type: ignore[no-any-return]
        state = state + self.attn(state)
        beside = self.shared["mlp"](state) if self.how == "two" else 0.0
        return state + self.mlp(state) + beside  # type: ignore[no-any-return]


class Own(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(56, 16), nn.Linear(16, 56)
        self.blocks = nn.ModuleList([OwnBlock(how) for _ in range(2)])

    def forward(self, input_ids: Tensor) -> Tensor:
        state = self.embed(input_ids)
        for block in self.blocks:
            state = block(state)
        return self.head(state)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("how", "attention", "mlp"),
    [("plain", "attn", "mlp"), ("adds", None, "mlp.down"), ("two", "attn", None)],
)
def test_a_part_of_ones_own_that_adds_the_stream_or_is_half_of_an_mlp_is_not_taken_for_what_it_writes(
    how: str, attention: str | None, mlp: str | None
) -> None:
    module = drawn(lambda: Own(how), scale=0.3)
    states = states_of(rp.ProbedModel(module, objective="masked", mask_token_id=MASK, logit_shift=0))
    for kind, path in (("attention", attention), ("mlp", mlp)):
        found = [site.path for site in states.of(kind).values()]
        assert found == ([] if path is None else [f"blocks.{layer}.{path}" for layer in (0, 1)])
        assert bool(states.missing(kind)) == (path is None)


def test_a_gate_of_the_attention_is_no_part_of_the_mlp() -> None:
    """AFMoE calls it `gate_proj`."""
    states = states_of(
        causal(transformers.AfmoeConfig(**GROUPED | {"num_dense_layers": 2, "moe_intermediate_size": 16}))
    )
    assert [site.path for site in states.of("mlp").values()] == ["model.layers.0.mlp", "model.layers.1.mlp"]


def test_shared_experts_are_not_all_of_an_mlp() -> None:
    """A.X-K1 has a norm among its experts, so that the shared ones alone are an MLP by name."""
    sizes = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    groups = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    config = transformers.AXK1Config(**{**SIZES, **sizes, **experts, **groups})
    sites = states_of(causal(config)).of("mlp")
    assert [site.path for site in sites.values()] == ["model.layers.0.mlp", "model.layers.1.mlp"]
