"""What the theory says of a given model: its own angles, found in its own queries, and the bound beside the scores."""

import copy
import math

import numpy as np
import pytest
import torch
import transformers as tf

from revprobe import (
    ProbedModel,
    Query,
    RaddConfig,
    RaddForMaskedLM,
    ReversalPair,
    ReversalPairs,
    RevprobeError,
    letter_pairs,
    letter_tokenizer,
    model_theory,
    probe_attention_correlation,
    probe_gradient_cosine,
    rope_correlation_bound,
    with_bounds,
)
from revprobe.models.rotary import Rotary, layer_positions

SIZES = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
TOKENS = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
SCALINGS = {
    "default": {"rope_theta": 500.0},
    "linear": {"factor": 4.0, "rope_theta": 500.0},
    "yarn": {"factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 32},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 1e4,
    },
    "dynamic": {"factor": 4.0, "rope_theta": 1e4},
}


def radd(encoding: str = "rope", **sizes) -> ProbedModel:
    torch.manual_seed(0)
    module = RaddForMaskedLM(RaddConfig(position_encoding=encoding, **{"d_model": 32} | sizes))
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return ProbedModel(module, letter_tokenizer(), objective="masked")


def causal(module: torch.nn.Module) -> ProbedModel:
    return ProbedModel(module.eval(), objective="causal")


def llama(scaling: str) -> ProbedModel:
    torch.manual_seed(0)
    parameters = {"rope_type": scaling, **SCALINGS[scaling]}
    return causal(tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, rope_parameters=parameters)))


def angles_of_tables(embedding: torch.nn.Module, length: int) -> np.ndarray:
    """The angle of one token, from the cos and sin the embedding hands to attention, not from its buffer."""
    cos, sin = embedding(torch.zeros(1), torch.arange(length)[None])
    half = cos.shape[-1] // 2
    return torch.atan2(sin[0, 1, :half], cos[0, 1, :half]).double().numpy()


@pytest.mark.parametrize("scaling", SCALINGS)
def test_scaled_angles_are_those_the_model_turns_by(scaling: str) -> None:
    model = llama(scaling)
    frame = model_theory(model, [3, 20])
    theta = angles_of_tables(model.module.model.rotary_emb, 21)
    slow = [np.mean(np.cos(2 * distance * theta)) for distance in (3, 20)]
    assert frame["bound"].tolist() == pytest.approx(slow * 2, abs=1e-5), "two layers x two distances"
    assert frame["checked"].all() and (frame["scaling"] == scaling).all()
    assert (frame["base"] == SCALINGS[scaling]["rope_theta"]).all()
    if scaling not in ("default", "dynamic"):  # dynamic scales nothing within the trained length
        unscaled = rope_correlation_bound(32, 20, SCALINGS[scaling]["rope_theta"])
        assert abs(frame["bound"][1] - unscaled) > 1e-3, "the scaling must reach the bound"


def test_dynamic_angles_depend_on_the_length_that_is_asked_about() -> None:
    """And asking leaves the model's own buffer as it was."""
    model = llama("dynamic")
    before = model.module.model.rotary_emb.inv_freq.clone()
    long = model_theory(model, 3, length=512)["bound"][0]
    assert torch.equal(model.module.model.rotary_emb.inv_freq, before), "the buffer was grown"
    theta = angles_of_tables(copy.deepcopy(model.module.model.rotary_emb), 512)
    assert long == pytest.approx(np.cos(6 * theta).mean(), abs=1e-5)
    assert long != pytest.approx(model_theory(model, 3)["bound"][0], abs=1e-3)


def test_entries_that_do_not_turn_are_planes_with_angle_zero() -> None:
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}
    sizes = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
    model = causal(tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**sizes, rope_parameters=rope)))
    frame = model_theory(model, 5)
    slow = (sum(math.cos(10 * 1e4 ** (-2 * k / 8)) for k in range(4)) + 12) / 16
    assert frame["bound"].tolist() == pytest.approx([slow] * 2, abs=1e-5)
    assert frame["planes"].tolist() == [16, 16] and frame["turning"].tolist() == [4, 4]


def test_planes_of_neighbours_and_layers_without_rotation_are_told_apart() -> None:
    """Cohere interleaves its planes, SmolLM3 leaves every fourth layer unturned; both embed the padding token as 0."""
    torch.manual_seed(0)
    cohere = layer_positions(causal(tf.CohereForCausalLM(tf.CohereConfig(**SIZES, **TOKENS))))
    assert [found.rotary.interleaved for found in cohere.values()] == [True, True]
    plain = layer_positions(llama("default"))
    assert [found.rotary.interleaved for found in plain.values()] == [False, False]
    smol = tf.SmolLM3Config(**SIZES | {"num_hidden_layers": 4}, **TOKENS)
    frame = model_theory(causal(tf.SmolLM3ForCausalLM(smol)), 20)
    assert frame["encoding"].tolist() == ["rope"] * 3 + ["no rotation"]
    assert frame["bound"][3] == 1.0 and (frame["bound"][:3] < 0.9).all()


def test_layers_with_angles_of_their_own_get_their_own() -> None:
    """Gemma 3 turns local layers by base 10,000 and global ones by 1,000,000."""
    torch.manual_seed(0)
    config = tf.Gemma3TextConfig(**SIZES | {"num_hidden_layers": 6}, head_dim=32)
    frame = model_theory(causal(tf.Gemma3ForCausalLM(config)), 20)
    expected = [rope_correlation_bound(32, 20, 1e4)] * 5 + [rope_correlation_bound(32, 20, 1e6)]
    assert frame["bound"].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("encoding", "bound"), [("alibi", 1.0), ("none", 1.0), ("absolute", math.nan)])
def test_encodings_that_do_not_turn(encoding: str, bound: float) -> None:
    frame = model_theory(radd(encoding), [1, 9])
    assert frame["bound"].tolist() == pytest.approx([bound] * 2, nan_ok=True)
    assert (frame["reason"] != "").all() == math.isnan(bound), "NaN comes with its reason"


def test_asking_leaves_no_trace() -> None:
    model = llama("yarn")
    module = model.module.train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state = torch.get_rng_state()
    model_theory(model, [1, 2])
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and module.training
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())


def test_a_model_whose_queries_are_never_seen_is_an_error() -> None:
    model = llama("default")
    model.module.set_attn_implementation("eager")
    with pytest.raises(RevprobeError, match="load with attn_implementation='sdpa'"):
        model_theory(model, 1)
    with pytest.raises(RevprobeError, match=r"distance -1\.0"):
        model_theory(llama("default"), -1)


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
            assert np.allclose(np.square(rotary.turned(query, 5)).sum(-1), np.square(query).sum(-1))


# --- the bound beside the measurement --------------------------------------------------------------------------------


def test_the_bound_of_a_head_is_that_of_the_masks_query() -> None:
    """One layer: q = W_Q norm(e_M) by hand from the weights, before RoPE, head by head."""
    model = radd(n_heads=2)
    pairs = letter_pairs(length=6, model=model)
    bounded = probe_attention_correlation(model, pairs, bounds=True).frame
    weights = {name: p.detach().double().numpy() for name, p in model.module.named_parameters()}
    embedded = weights["embed_tokens.weight"][model.mask_token_id]
    normed = (embedded - embedded.mean()) / math.sqrt(embedded.var() + model.module.config.layer_norm_eps)
    normed = normed * weights["blocks.0.attention_norm.weight"] + weights["blocks.0.attention_norm.bias"]
    query = (weights["blocks.0.attention.q_proj.weight"] @ normed).reshape(2, 16)
    theta = 1e4 ** (-np.arange(8) / 8)
    equal = bounded[bounded["bound_reason"] == ""]
    assert set(equal["offset_forward"]) == {1, 2, 3, 4, 5} and len(equal) == 26 * 5 * 2
    for (head, distance), rows in equal.groupby(["head", "offset_forward"]):
        energy = query[head, :8] ** 2 + query[head, 8:] ** 2
        slow = (energy * np.cos(2 * distance * theta)).sum() / energy.sum()
        for column in ("bound_forward", "bound_reverse"):
            assert np.allclose(rows[column], slow, atol=1e-5), f"{column}, head {head}, distance {distance}"
        assert np.allclose(rows["bound_mean"], rope_correlation_bound(16, distance), atol=1e-12)


def test_what_has_no_bound_is_nan_with_its_reason() -> None:
    model = radd()
    frame = with_bounds(probe_attention_correlation(model, pairs := letter_pairs(5, model=model)), model, pairs).frame
    unequal = frame["offset_forward"] != -frame["offset_reverse"]
    assert unequal.any() and frame.loc[unequal, "bound_reason"].str.contains("equal distances").all()
    assert (frame["bound_forward"].isna() == unequal).all() and (frame["bound_mean"].isna() == unequal).all()
    alibi = radd("alibi")
    frame = with_bounds(probe_attention_correlation(alibi, pairs), alibi, pairs).frame
    assert frame["bound_mean"].isna().all()
    assert frame.loc[~unequal, "bound_reason"].str.contains("do not turn").all()


@pytest.mark.parametrize(
    ("forward", "reverse", "kind", "words"),
    [
        (Query([1, 2, 0, 30], [0, 1], [3]), Query([30, 0, 1, 2], [2, 3], [0]), "same_target", "several tokens"),
        (Query([1, 0, 30], [0], [2]), Query([1, 0, 30], [2], [0]), "swapped", "kind same_target"),
    ],
)
def test_pairs_outside_the_theorem_have_no_bound(forward, reverse, kind: str, words: str) -> None:
    model = radd()
    pairs = ReversalPairs.from_pairs([ReversalPair(forward, reverse, kind=kind)])
    frame = with_bounds(probe_attention_correlation(model, pairs, control=False), model, pairs).frame
    assert frame["bound_forward"].isna().all() and frame["bound_reason"].str.contains(words).all()


def test_bounds_are_added_only_to_the_reading_they_belong_to() -> None:
    model = radd()
    pairs = letter_pairs(4, model=model)
    reading = probe_attention_correlation(model, pairs)
    with pytest.raises(RevprobeError, match="was taken with pairs"):
        with_bounds(reading, model, letter_pairs(5, model=model))
    with pytest.raises(RevprobeError, match="expected one of probe_attention_correlation"):
        with_bounds(probe_gradient_cosine(model, pairs), model, pairs)
    with pytest.raises(RevprobeError, match="add them with with_bounds"):
        reading.plot(kind="bounds")
    bounded = with_bounds(reading, model, pairs, batch_size=3)
    assert (bounded.value, bounded.interval) == (reading.value, reading.interval), "the scores are the same"
    whole = with_bounds(reading, model, pairs)
    assert np.allclose(bounded.frame["bound_forward"], whole.frame["bound_forward"], atol=1e-6, equal_nan=True)


def test_the_figure_draws_each_heads_bound_and_the_mean_as_lines_of_their_own(tmp_path) -> None:
    """Every drawn number against the frame; also after a round trip through parquet."""
    model = radd(n_heads=2)
    pairs = letter_pairs(5, model=model)
    bounded = with_bounds(probe_attention_correlation(model, pairs), model, pairs)
    bounded = type(bounded).load(bounded.save(tmp_path / "reading.parquet"))
    figure = bounded.plot(kind="bounds")
    traces = {trace.name: trace for trace in figure.data}
    equal = bounded.frame[bounded.frame["bound_reason"] == ""]
    for head in (0, 1):
        rows = equal[equal["head"] == head].groupby("offset_forward")
        assert np.allclose(traces[f"bound, layer 0, head {head}'s query"].y, rows["bound_forward"].mean(), atol=1e-6)
        measured = [part["score_forward"].corr(part["score_reverse"]) for _, part in rows]
        assert np.allclose(traces[f"measured, layer 0, head {head}"].y, measured, atol=1e-6)
        assert list(traces[f"measured, layer 0, head {head}"].x) == [1, 2, 3, 4]
    assert np.allclose(traces["bound, mean over queries"].y, rope_correlation_bound(16, [1, 2, 3, 4]))
    assert len(figure.data) == 5
    one = bounded.plot(kind="bounds", head=1)
    assert one.data[0].name == "measured, layer 0, head 1" and len(one.data) == 3
    assert "interval below the head's bound in" in figure.layout.title.text


def test_without_a_bound_the_figure_says_why() -> None:
    model = radd("alibi")
    pairs = letter_pairs(4, model=model)
    figure = with_bounds(probe_attention_correlation(model, pairs), model, pairs).plot(kind="bounds")
    text = " ".join(note.text for note in figure.layout.annotations)
    assert "queries do not turn with position" in text and not figure.data
