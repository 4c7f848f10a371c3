"""What the theory says of a given model, by its own angles."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
import transformers as tf

import tiny
from revprobe import (
    ProbedModel,
    RevprobeError,
    model_frequencies,
    model_theory,
    rope_asymmetric_bound,
    rope_correlation_bound,
    rope_correlation_tail,
)

radd = partial(tiny.radd, d_model=32)

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


def test_layers_with_angles_of_their_own_get_their_own() -> None:
    """Gemma 3 turns local layers by base 10,000 and global ones by 1,000,000."""
    torch.manual_seed(0)
    config = tf.Gemma3TextConfig(**SIZES | {"num_hidden_layers": 6}, head_dim=32)
    frame = model_theory(causal(tf.Gemma3ForCausalLM(config)), 20)
    expected = [rope_correlation_bound(32, 20, 1e4)] * 5 + [rope_correlation_bound(32, 20, 1e6)]
    assert frame["bound"].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("encoding", "bound"), [("alibi", 1.0), ("scalar", 1.0), ("none", 1.0), ("absolute", math.nan)]
)
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


# --- the tail, and distances that differ -----------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.05, 0.3])
def test_the_tail_is_cantellis_at_the_threshold_that_was_asked(tau: float) -> None:
    """On every layer and distance, by the function that Table 4 pins; partial rotary by the plain sums."""
    frame = model_theory(llama("default"), [2, 7, 30], tau=tau)
    expected = rope_correlation_tail(32, [2, 7, 30], tau, 500.0)
    assert frame["tail"].tolist() == pytest.approx([*expected] * 2, rel=1e-4, nan_ok=True)
    assert (frame["tau"] == tau).all()
    half = partial()
    cosines = np.array([math.cos(10 * 1e4 ** (-2 * k / 8)) for k in range(4)] + [1.0] * 4)
    mean, spread = cosines.mean(), np.square(cosines - cosines.mean()).sum() / (8 * 9)
    slow = (mean - tau) ** 2 / ((mean - tau) ** 2 + spread)
    assert model_theory(half, 5, tau=tau)["tail"].tolist() == pytest.approx([slow] * 2, rel=1e-4)


@pytest.mark.parametrize(("tau", "tail"), [(0.1, 1.0), (1.0, 1.0), (1.1, math.nan)])
def test_every_query_of_an_alibi_model_reaches_one(tau: float, tail: float) -> None:
    assert model_theory(radd("alibi"), 3, tau=tau)["tail"].tolist() == pytest.approx([tail], nan_ok=True)


def partial() -> ProbedModel:
    """Phi, half of whose sixteen entries turn."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    return causal(tf.PhiForCausalLM(tf.PhiConfig(**SIZES | {"hidden_size": 32}, rope_parameters=rope)))


def test_unequal_distances_are_the_worst_case_by_the_models_own_angles() -> None:
    """Against rotation matrices built entry by entry, with the worst of all corners of the alignment cube per query."""
    model, samples = partial(), 40
    frame = model_theory(model, [3, 21, 4], distance_reverse=[9, 50, 4], samples=samples, seed=5)
    first = frame[frame["layer"] == 0].reset_index(drop=True)
    theta = [1e4 ** (-2 * k / 8) for k in range(4)] + [0.0] * 4
    energy = np.random.default_rng(5).exponential(size=(samples, 8))
    corners = np.array(np.meshgrid(*[[0.0, 1.0]] * 8)).reshape(8, -1).T
    for row, (forward, reverse) in enumerate([(3, 9), (21, 50)]):
        far = np.array([math.cos((forward + reverse) * angle) for angle in theta])
        near = np.array([math.cos((forward - reverse) * angle) for angle in theta])
        top = (energy[:, None] * (far + corners * near)).sum(-1)
        worst = (top / (energy[:, None] * (1 + corners * far * near)).sum(-1)).min(1)
        assert first["bound"][row] == pytest.approx(worst.mean(), abs=1e-6), f"distances {forward}, {reverse}"
        assert first["bound_error"][row] == pytest.approx(worst.std(ddof=1) / math.sqrt(samples), abs=1e-6)
        assert first["no_bound"][row] == (worst < 0).mean()
        assert first["exact"][row] >= first["bound"][row] - 1e-6 or first["no_bound"][row] > 0
        assert math.isnan(first["tail"][row]) and first["distance_reverse"][row] == reverse
    assert first["bound"][2] == model_theory(model, 4)["bound"][0], "equal distances keep the closed form"
    assert first.loc[2, ["bound_error", "exact_error", "no_bound"]].tolist() == [0, 0, 0]
    full = rope_asymmetric_bound(16, 21, 50, samples=samples, seed=5)["bound"][0]
    assert abs(first["bound"][1] - full) > 0.01, "a bound by base^(-2k/d) would not know that half the head rests"


def test_queries_for_which_the_surrogate_bounds_nothing_are_counted() -> None:
    """At 21 and 50 tokens some draws are negative; the share is that of the function Table 5 rests on."""
    frame = model_theory(llama("default"), 21, distance_reverse=50, samples=200)
    expected = rope_asymmetric_bound(32, 21, 50, 500.0, samples=200)
    assert expected["negative"][0] > 0.1
    assert frame["no_bound"].tolist() == pytest.approx([expected["negative"][0]] * 2, abs=0.011)
    for name in ("exact", "exact_error", "bound"):
        assert frame[name].tolist() == pytest.approx([expected[name][0]] * 2, rel=1e-3)


def test_distances_are_broadcast_and_alibi_is_one_at_all_of_them() -> None:
    frame = model_theory(radd("alibi"), [1, 2, 3], distance_reverse=7)
    assert (
        frame["distance_reverse"].tolist() == [7, 7, 7] and (frame["bound"] == 1).all() and (frame["tail"] == 1).all()
    )
    assert (frame[["bound_error", "no_bound"]] == 0).all(axis=None) and (frame["exact"] == 1).all()
    with pytest.raises(RevprobeError, match=r"shape \(2,\), reverse of shape \(3,\)"):
        model_theory(radd("alibi"), [1, 2], distance_reverse=[1, 2, 3])
    with pytest.raises(RevprobeError, match="tau nan"):
        model_theory(radd("alibi"), 1, tau=math.nan)


def test_the_angles_asked_about_fit_the_longer_of_the_two_distances() -> None:
    """Dynamic scaling grows with the sequence: a reverse distance of 500 needs the angles of a long one."""
    model = llama("dynamic")
    long = model_theory(model, 3, distance_reverse=500, samples=20)["bound"][0]
    theta = model_frequencies(model, length=501).query("layer == 0")["frequency"]
    assert long == pytest.approx(rope_asymmetric_bound(32, 3, 500, samples=20, frequencies=theta)["bound"][0])
    short = model_frequencies(model, length=32).query("layer == 0")["frequency"]
    assert long != rope_asymmetric_bound(32, 3, 500, samples=20, frequencies=short)["bound"][0]
