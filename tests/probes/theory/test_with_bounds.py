"""RoPE's bound beside the measured scores: of which query, by which angles, for which layers."""

import math
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import transformers as tf

import tiny
from revprobe import (
    ProbedModel,
    Query,
    ReversalPair,
    ReversalPairs,
    RevprobeError,
    letter_pairs,
    letter_tokenizer,
    probe_attention_correlation,
    probe_gradient_cosine,
    rope_correlation_bound,
    with_bounds,
)
from revprobe.models.families.sdar import SDARConfig, SDARForMaskedDiffusion
from revprobe.probes.passes import asked
from revprobe.probes.theory import model_bounds as model_theory_file
from tiny import drawn

radd = partial(tiny.radd, d_model=32)


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


# --- deeper models: each query, each layer, each plane its own -------------------------------------------------------


SIZES = {"vocab_size": 50, "intermediate_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 64}
TOKENS = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
MASK, DISTANCES = 49, (2, 3, 5)


def mirrored(shift: int, seed: int) -> ReversalPairs:
    """The same target and evidence, which stands D tokens after the readout row and before it, for each D."""
    rng = np.random.default_rng(seed)
    pairs = []
    for distance in DISTANCES:
        forward, reverse = rng.integers(1, 40, size=(2, 9)).tolist()
        at = {"forward": (1, 1 - shift + distance), "reverse": (8, 8 - shift - distance)}
        for tokens, (target, evidence) in ((forward, at["forward"]), (reverse, at["reverse"])):
            tokens[target], tokens[evidence] = 41 + distance, 40
        queries = (
            Query(tokens, [at[side][0]], [at[side][1]]) for side, tokens in (("forward", forward), ("reverse", reverse))
        )
        pairs.append(ReversalPair(*queries))
    return ReversalPairs.from_pairs(pairs)


def bidirectional_gemma() -> ProbedModel:
    """Two layers of four heads on two key heads; the first turns by base 10,000, the second by 1,000,000."""
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64}
    heads = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = tf.Gemma3TextConfig(**SIZES, **TOKENS, **kinds, **heads, use_bidirectional_attention=True)
    module = drawn(lambda: tf.Gemma3ForCausalLM(config), scale=0.2)
    return ProbedModel(module, objective="masked", mask_token_id=MASK, logit_shift=0)


def partial_phi() -> ProbedModel:
    """Two layers; the first eight of a head's sixteen entries turn."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    heads = {"hidden_size": 32, "num_attention_heads": 2}
    config = tf.PhiConfig(**SIZES, **TOKENS, **heads, rope_parameters=rope)
    return ProbedModel(drawn(lambda: tf.PhiForCausalLM(config), scale=0.2), objective="causal")


def query_by_hand(model: ProbedModel, query: Query, layer: int) -> np.ndarray:
    """W_Q h at the readout row before RoPE, of one query run alone. Shapes: `-> head dim`."""
    ids = list(query.token_ids)
    if model.objective == "masked":
        ids[query.target_positions[0]] = MASK
    attention = model.module.model.layers[layer].self_attn
    seen = []
    hook = attention.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    with torch.no_grad():
        model.module(torch.tensor([ids]))
    hook.remove()
    hidden = seen[0]["hidden_states"][0, query.target_positions[0] - model.logit_shift]
    flat = attention.q_proj.weight @ hidden
    flat = flat if attention.q_proj.bias is None else flat + attention.q_proj.bias
    heads = flat.detach().double().reshape(-1, 16).numpy()
    if not hasattr(attention, "q_norm"):
        return heads
    size = np.sqrt(np.square(heads).mean(-1, keepdims=True) + model.module.config.rms_norm_eps)
    return heads / size * (1 + attention.q_norm.weight.detach().double().numpy())


@pytest.mark.parametrize("family", ["gemma", "phi"])
def test_the_bound_is_of_each_sides_query_by_its_layers_angles_and_planes(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deeper than one layer the two prompts give two queries; layers turn by angles of their own; part of a head rests.

    A bound_reverse of the forward query, layer 0's angles in layer 1, or entries paired across the head turn this red.
    """
    gemma = family == "gemma"
    model = bidirectional_gemma() if gemma else partial_phi()
    # No causal model may be asked these pairs; Phi alone turns part of a head, and its queries do not hang on the mask.
    monkeypatch.setattr(asked, "_require_evidence_in_sight", lambda model, pairs: None)
    half = 8 if gemma else 4  # plane k is entries k and k + half; what lies beyond the turning part rests
    pairs = mirrored(model.logit_shift, seed=1)
    frame = with_bounds(probe_attention_correlation(model, pairs, control=False), model, pairs).frame
    assert (frame["bound_reason"] == "").all() and set(frame["layer"]) == {0, 1}
    for row in frame.to_dict("records"):
        base = 1e4 if row["layer"] == 0 or not gemma else 1e6
        theta = base ** (-np.arange(half) / half)
        pair = pairs[row["pair"]]
        for side, query in (("forward", pair.forward), ("reverse", pair.reverse)):
            q = query_by_hand(model, query, row["layer"])[row["head"]]
            turning = (q[:half] ** 2 + q[half : 2 * half] ** 2) @ np.cos(2 * row["offset_forward"] * theta)
            slow = (turning + (q[2 * half :] ** 2).sum()) / (q @ q)
            assert row[f"bound_{side}"] == pytest.approx(slow, abs=1e-5), f"{side} of {row}"
        mean = (np.cos(2 * row["offset_forward"] * theta).sum() + (8 - half)) / 8
        assert row["bound_mean"] == pytest.approx(mean, abs=1e-6)
    deeper = frame[frame["layer"] == 1]
    assert (deeper["bound_forward"] - deeper["bound_reverse"]).abs().max() > 0.05, "one query would hide an exchange"


# --- angles that depend on the length ---------------------------------------------------------------------------------

SHORT, LONG, LIMIT = [1.0] * 4, [6.0, 9.0, 20.0, 30.0], 16  # longrope's divisors of up to so many tokens, and of more


def stretched(shift: int = 0) -> ProbedModel:
    """One layer of two heads, whose angles are others beyond 16 tokens."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": LIMIT, "factor": 4.0}
    rope |= {"short_factor": SHORT, "long_factor": LONG}
    sizes = {"vocab_size": 56, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    config = SDARConfig(**sizes, bos_token_id=54, eos_token_id=54, pad_token_id=55, rope_parameters=rope)
    module = drawn(lambda: SDARForMaskedDiffusion(config), scale=0.3)
    wrapping = {"mask_token_id": 53, "block_size": "whole", "begin_token_id": 54, "logit_shift": shift}
    return ProbedModel(module, letter_tokenizer(), objective="masked", **wrapping)


def mirrored_at(place: int, forward: int, reverse: int, fact: int) -> ReversalPair:
    """A target at `place` and evidence three tokens behind it, and the other way round, in queries of two lengths."""
    draw, sides = np.random.default_rng(fact), []
    for length, target, evidence in ((forward, place, place + 3), (reverse, place + 3, place)):
        tokens = draw.integers(1, 20, length).tolist()
        tokens[target], tokens[evidence] = 27 + fact, 20 + fact
        sides.append(Query(tokens, [target], [evidence]))
    return ReversalPair(*sides, fact=str(fact))


@pytest.mark.parametrize("size", [None, 1])
def test_each_query_has_the_angles_of_its_own_length(size: int | None) -> None:
    """Asked of the longest for all, the short queries' bound was 0.88 and is 0.95."""
    lengths = [(8, 8), (LIMIT, LIMIT), (LIMIT + 1, LIMIT + 1), (24, 24), (9, 12), (20, 24), (LIMIT, LIMIT + 1), (24, 8)]
    made = [mirrored_at(2, *two, fact=fact) for fact, two in enumerate(lengths)]
    model = stretched()
    found = bounded(model, made, size)
    plain = 1e4 ** (-np.arange(4) / 4)
    for fact, (two, pair) in enumerate(zip(lengths, made, strict=True)):
        rows = found[found["pair"] == fact]
        if (two[0] > LIMIT) != (two[1] > LIMIT):
            assert rows["bound_reason"].eq(model_theory_file.ANGLES_DIFFER).all()
            assert rows[["bound_forward", "bound_reverse", "bound_mean"]].isna().all(axis=None)
            continue
        assert rows["bound_reason"].eq("").all()
        theta = plain / (LONG if two[0] > LIMIT else SHORT)
        # Their distances are 3 on opposite sides, behind a readout row at the target.
        np.testing.assert_allclose(rows["bound_mean"], np.cos(6 * theta).mean(), atol=1e-6)
        alone = bounded(model, [pair], 1)
        for column in ("bound_forward", "bound_reverse", "bound_mean"):
            np.testing.assert_allclose(rows[column], alone[column], atol=1e-5)


def test_a_begin_token_counts_for_all_queries_where_one_asks_for_it() -> None:
    """The target of the first stands at position 0, so that the second is read behind a begin token as well."""
    # A row before the target, evidence is 4 tokens away in one direction and 4 in the other.
    first, second = Query([40, 1, 2, 3, 30], [0], [4]), Query([1, 2, 3, 30, 4, 40], [5], [3])
    made = [ReversalPair(first, second, fact="0")]
    for fact, length in enumerate((LIMIT - 1, LIMIT), 1):
        tokens = [int(token) for token in np.random.default_rng(fact).integers(1, 20, length)]
        forward, reverse = [*tokens], [*tokens]
        forward[3], forward[6], reverse[9], reverse[4] = 27 + fact, 20 + fact, 27 + fact, 20 + fact
        made.append(ReversalPair(Query(forward, [3], [6]), Query(reverse, [9], [4]), fact=str(fact)))
    found = bounded(stretched(shift=1), made, None)
    plain = 1e4 ** (-np.arange(4) / 4)
    for fact, divisors in ((1, SHORT), (2, LONG)):  # with the begin token they are of 16 and of 17 tokens
        rows = found[found["pair"] == fact]
        np.testing.assert_allclose(rows["bound_mean"], np.cos(8 * plain / divisors).mean(), atol=1e-6)


def bounded(model: ProbedModel, made: list[ReversalPair], size: int | None) -> pd.DataFrame:
    pairs = ReversalPairs.from_pairs(made)
    return with_bounds(probe_attention_correlation(model, pairs, control=False), model, pairs, batch_size=size).frame


# --- which layers and how many at a time -----------------------------------------------------------------------------


def test_bounds_are_worked_out_at_the_batch_size_and_for_the_layers_that_were_asked(monkeypatch) -> None:
    """Each run holds at most three queries (but for the check of the angles), and layer 0 is not priced."""
    model, calls, sizes = radd(n_layers=2), [], []
    pairs = letter_pairs(4, model=model)
    whole = probe_attention_correlation(model, pairs, bounds=True).frame
    bound = model_theory_file.rope_query_bound
    monkeypatch.setattr(model_theory_file, "rope_query_bound", lambda *a, **k: calls.append(1) or bound(*a, **k))
    hook = model.module.embed_tokens.register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[0].shape)))
    reading = probe_attention_correlation(model, pairs, batch_size=3, layers=[1], bounds=True)
    hook.remove()
    assert set(reading.frame["layer"]) == {1}
    runs = [size for size in sizes if size[1] == 4]
    assert runs and max(size[0] for size in runs) == 3, sizes
    assert len(calls) == len(runs) / 2, "half the runs are the bounds', one bound of one layer for each"
    expected = whole.loc[whole["layer"] == 1, "bound_reverse"]
    assert np.allclose(reading.frame["bound_reverse"], expected, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("bounds", [False, True])
def test_a_layer_the_model_lacks_is_named(bounds: bool) -> None:
    model = radd(n_layers=2)
    pairs = letter_pairs(4, model=model)
    with pytest.raises(RevprobeError, match=r"no layer 7 to read in .*: expected some of 0, 1"):
        probe_attention_correlation(model, pairs, layers=[0, 7], bounds=bounds)
    with pytest.raises(RevprobeError, match=r"no layer list \[\]"):
        probe_attention_correlation(model, pairs, layers=[], bounds=bounds)
    with pytest.raises(RevprobeError, match="layers=1: expected a list of"):
        probe_attention_correlation(model, pairs, layers=1, bounds=bounds)
    narrowed = probe_attention_correlation(model, pairs, layers=iter([1]), bounds=bounds)
    assert set(narrowed.frame["layer"]) == {1}, "a generator is read once and serves both passes"
