"""How position reaches a model's queries, found on the queries: kinds, planes and angles, in float32 and in bf16."""

import math

import numpy as np
import pytest
import torch
import transformers as tf

import tiny
from revprobe import (
    ProbedModel,
    RaddConfig,
    RaddForMaskedLM,
    RevprobeError,
    letter_tokenizer,
    model_frequencies,
    model_theory,
)
from revprobe.models import rotary as rotary_file
from revprobe.models.rotary import Rotary, layer_positions

SIZES = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
TOKENS = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
DTYPES = [torch.float32, torch.bfloat16]
KINDS = [*((e, "no rotation") for e in ("alibi", "scalar", "none")), ("rope", "rope")]


def radd(encoding: str, dtype: torch.dtype, *, table: float = 1.0, layers: int = 4) -> ProbedModel:
    module = tiny.radd(encoding, n_layers=layers, n_heads=2, d_model=64).module
    if encoding == "absolute":
        module.embed_positions.weight.data *= table
    return ProbedModel(module.to(dtype), objective="masked")


def causal(module: torch.nn.Module) -> ProbedModel:
    return ProbedModel(module.eval(), objective="causal")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("table", [1.0, 0.1, 0.03, 0.003])
def test_a_small_table_of_positions_is_not_taken_for_none(dtype: torch.dtype, table: float) -> None:
    """In bf16 the queries of a table x 0.03 differ by less than a bf16 rotation's own error, deeper layers by 0.008."""
    frame = model_theory(radd("absolute", dtype, table=table), 5)
    assert frame["encoding"].tolist() == ["other"] * 4 and not frame["checked"].any()
    assert frame["bound"].isna().all() and (frame["reason"] != "").all(), "no bound of 1.0 may be concluded"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("encoding", "kind"), KINDS)
def test_what_can_be_made_out_still_is(dtype: torch.dtype, encoding: str, kind: str) -> None:
    """The stricter tolerance refuses no right model, four layers deep."""
    found = layer_positions(radd(encoding, dtype))
    assert [one.kind for one in found.values()] == [kind] * 4, {layer: one.reason for layer, one in found.items()}


def add_wave(model: ProbedModel, size: float) -> None:
    """Positions that come from no parameter, so that no role names them."""
    wave = size * torch.sin(torch.arange(64)[:, None] * torch.linspace(0.1, 1, 64)).to(model.dtype)
    model.module.embed_tokens.register_forward_hook(lambda module, args, out: out + wave[: out.shape[1]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0.1, 0.01])
def test_a_small_wave_of_positions_is_seen_on_the_queries_alone(dtype: torch.dtype, size: float) -> None:
    """At 0.01 it moves the first queries by 0.06, eight times the eps of bf16 and half of what was once let pass."""
    model = radd("none", dtype)
    add_wave(model, size)
    assert [one.kind for one in layer_positions(model).values()] == ["other"] * 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_later_layer_is_cleared_after_one_that_was_not_made_out(dtype: torch.dtype, monkeypatch) -> None:
    """A signal that the first layer shows is in the residual stream of the second, however little is seen of it there.

    The second layer's norm hides the wave from its queries.
    """
    model = radd("none", dtype, layers=2)
    add_wave(model, 0.2)
    norm = model.module.blocks[1].attention_norm
    norm.weight.data.zero_(), norm.bias.data.fill_(1.0)
    found = layer_positions(model)
    assert [one.kind for one in found.values()] == ["other", "other"], found
    assert found[1].reason == rotary_file.AFTER_OTHER
    monkeypatch.setattr(rotary_file, "_doubted", lambda module, found: found)
    assert layer_positions(model)[1].kind == "no rotation", "the second layer alone shows nothing"


def test_the_reason_names_the_table() -> None:
    found = layer_positions(radd("absolute", torch.bfloat16, table=0.003))
    assert "embed_positions.weight" in found[0].reason


def test_planes_of_neighbours_and_layers_without_rotation_are_told_apart() -> None:
    """Cohere interleaves its planes, SmolLM3 leaves every fourth layer unturned; both embed the padding token as 0."""
    torch.manual_seed(0)
    cohere = layer_positions(causal(tf.CohereForCausalLM(tf.CohereConfig(**SIZES, **TOKENS))))
    assert [found.rotary.interleaved for found in cohere.values()] == [True, True]
    plain = layer_positions(causal(tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES))))
    assert [found.rotary.interleaved for found in plain.values()] == [False, False]
    smol = tf.SmolLM3Config(**SIZES | {"num_hidden_layers": 4}, **TOKENS)
    frame = model_theory(causal(tf.SmolLM3ForCausalLM(smol)), 20)
    assert frame["encoding"].tolist() == ["rope"] * 3 + ["no rotation"]
    assert frame["bound"][3] == 1.0 and (frame["bound"][:3] < 0.9).all()


def test_plane_energy_reads_the_entries_of_each_plane() -> None:
    """Both layouts, with the turning part first or last: plane 1 is named by its two entries."""
    query = np.random.default_rng(0).normal(size=(3, 16))
    angles = 100.0 ** (-np.arange(6) / 6)
    for start in (0, 4):
        for interleaved in (False, True):
            rotary = Rotary(angles, 16, start=start, interleaved=interleaved)
            energy = rotary.plane_energy(query)
            assert energy.shape == (3, 8) and np.allclose(energy.sum(-1), np.square(query).sum(-1))
            entries = [start + 2, start + 3] if interleaved else [start + 1, start + 7]
            assert np.allclose(energy[:, 1], np.square(query[:, entries]).sum(-1)), "plane 1 by its entries"
            assert rotary.entries[1].tolist() == entries
            assert np.allclose(np.square(rotary.turned(query, 5)).sum(-1), np.square(query).sum(-1))


@pytest.mark.parametrize("start", [0, 4])
@pytest.mark.parametrize("interleaved", [False, True])
def test_the_rotation_matrix_turns_each_plane_where_it_lies(start: int, interleaved: bool) -> None:
    """Block by block from the layout in words; what no plane holds is left alone."""
    angles, tokens = np.array([1.0, 0.3, 0.05]), 7
    matrix = Rotary(angles, 10, start=start, interleaved=interleaved).rotation(tokens)
    slow = np.eye(10)
    for plane, angle in enumerate(angles):
        pair = [start + 2 * plane, start + 2 * plane + 1] if interleaved else [start + plane, start + plane + 3]
        cos, sin = math.cos(tokens * angle), math.sin(tokens * angle)
        slow[np.ix_(pair, pair)] = [[cos, -sin], [sin, cos]]
    assert np.allclose(matrix, slow, atol=1e-15)


# --- the frequencies of a model as a table ---------------------------------------------------------------------------


def test_the_frequencies_of_a_model_plane_by_plane() -> None:
    """Half of Phi's head turns, by entries k and k + 4; Gemma 3's layers have bases of their own."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    sizes = {**SIZES, "hidden_size": 32, "num_hidden_layers": 1}
    frame = model_frequencies(causal(tf.PhiForCausalLM(tf.PhiConfig(**sizes, rope_parameters=rope))))
    expected = [1e4 ** (-2 * k / 8) for k in range(4)] + [0.0] * 4
    assert frame["frequency"].tolist() == pytest.approx(expected, rel=1e-5)
    assert frame["plane"].tolist() == list(range(8)) and frame["checked"].all()
    assert frame["first"].tolist() == [0, 1, 2, 3, 8, 10, 12, 14]
    assert frame["second"].tolist() == [4, 5, 6, 7, 9, 11, 13, 15]
    assert (frame["base"] == 1e4).all() and frame["source"].str.endswith("inv_freq").all()
    gemma = model_frequencies(causal(tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**SIZES | {"num_hidden_layers": 6}))))
    by_layer = gemma[gemma["plane"] == 1].set_index("layer")["frequency"]
    planes = len(gemma) // 6
    assert by_layer.tolist() == pytest.approx([1e4 ** (-1 / planes)] * 5 + [1e6 ** (-1 / planes)], rel=1e-5)


def test_what_is_not_known_of_a_frequency_is_not_a_number() -> None:
    still = model_frequencies(radd("alibi", torch.float32, layers=1))
    assert (still["frequency"] == 0).all() and still["checked"].all(), "no plane turns, and that was seen"
    other = model_frequencies(radd("absolute", torch.float32, layers=1))
    assert other["frequency"].isna().all() and other["first"].isna().all() and not other["checked"].any()
    assert other["reason"].str.contains("another way").all()


def test_a_bridge_is_sent_back_to_the_model_it_was_made_from() -> None:
    """It has no attn_implementation to choose, so that remedy would lead nowhere."""
    torch.manual_seed(0)
    radd_model = ProbedModel(RaddForMaskedLM(RaddConfig(d_model=16)), letter_tokenizer(), objective="masked")
    bridge = ProbedModel(
        radd_model.to_bridge(), letter_tokenizer(), objective="masked", mask_token_id=53, logit_shift=0
    )
    with pytest.raises(RevprobeError, match="ask the model it was made from") as caught:
        model_theory(bridge, 3)
    assert "attn_implementation" not in str(caught.value)
    module = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES))
    module.set_attn_implementation("eager")
    with pytest.raises(RevprobeError, match="load with attn_implementation='sdpa'"):
        model_frequencies(causal(module))
