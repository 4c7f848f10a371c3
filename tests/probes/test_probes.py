"""The three probes against slow references, with their controls, planted signals, planted faults, and no trace left."""

import copy
import math
import random
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from long_cases import rest_long

import tiny
from revprobe import (
    ProbedModel,
    Query,
    ReversalPair,
    ReversalPairs,
    RevprobeError,
    letter_pairs,
    letter_tokenizer,
    letters,
    one_layer_gpt2,
    probe,
    probe_attention_correlation,
    probe_gradient_cosine,
    probe_reverse_probability,
)
from revprobe.hooks import attention as attention_hooks
from revprobe.hooks.gradients import backward as gradient_reading
from revprobe.models.bases.configs import POSITION_ENCODINGS
from revprobe.probes.passes import batches
from revprobe.probes.passes import run as passes
from revprobe.probes.statistics.estimators import pair_cosines
from revprobe.probes.statistics.resampling import derangement

mdm = partial(tiny.radd, d_model=64, scale=0.0)  # at its initial weights, unless a scale is given


def arm(seed: int = 0, spread: float = 0.2, **sizes) -> ProbedModel:
    module = tiny.drawn(lambda: one_layer_gpt2(**sizes), seed=seed, scale=spread)
    return ProbedModel(module, letter_tokenizer(), objective="causal")


# --- slow references ------------------------------------------------------------------------------------------------


def score_by_hand(model: ProbedModel, query: Query, head: int) -> float:
    """The evidence's score of one query, from q and k recomputed out of the weights in float64 (one-layer RADD)."""
    module, config = model.module, model.module.config
    weights = {name: p.detach().double() for name, p in module.named_parameters()}
    (row,), (column,) = query.target_positions, query.evidence_positions
    vectors = []
    for position, projection in ((row, "q_proj"), (column, "k_proj")):
        token = config.mask_token_id if position == row else query.token_ids[position]
        embedded = weights["embed_tokens.weight"][token]
        if config.position_encoding == "absolute":
            embedded = embedded + weights["embed_positions.weight"][position]
        centred = embedded - embedded.mean()
        normed = centred / (centred.square().mean() + config.layer_norm_eps).sqrt()
        normed = normed * weights["blocks.0.attention_norm.weight"] + weights["blocks.0.attention_norm.bias"]
        vectors.append((weights[f"blocks.0.attention.{projection}.weight"] @ normed).reshape(config.n_heads, -1)[head])
    q, k = vectors
    half, dim = len(q) // 2, len(q)
    if config.position_encoding == "rope":
        total = 0.0
        for plane in range(half):
            angle = (column - row) * 10000 ** (-2 * plane / dim)
            dot = q[plane] * k[plane] + q[plane + half] * k[plane + half]
            cross = q[plane + half] * k[plane] - q[plane] * k[plane + half]
            total += float(dot) * math.cos(angle) + float(cross) * math.sin(angle)
        return total / math.sqrt(dim)
    bias = 0.0
    if config.position_encoding == "alibi":
        bias = -abs(row - column) * 2 ** (-8 * (head + 1) / config.n_heads)
    if config.position_encoding == "scalar":
        bias = float(weights["embed_offsets.weight"][column - row + config.max_length - 1, head])
    return float(q @ k) / math.sqrt(dim) + bias


def check_scores(reading, model: ProbedModel, pairs: ReversalPairs) -> None:
    rows = reading.frame.sample(60, random_state=0)
    for row in rows.itertuples():
        for side in ("forward", "reverse"):
            expected = score_by_hand(model, getattr(pairs[row.pair], side), row.head)
            assert getattr(row, f"score_{side}") == pytest.approx(expected, abs=1e-5), (
                f"{side} score of pair {row.pair}, head {row.head}"
            )


def loss_of(model: ProbedModel, query: Query) -> torch.Tensor:
    """Mean negative log-likelihood of the target tokens of one query, run alone."""
    ids = torch.tensor([query.token_ids])
    if model.objective == "masked":
        ids[0, list(query.target_positions)] = model.mask_token_id
    logits = model.module(input_ids=ids).logits[0]
    rows = [p - model.logit_shift for p in query.target_positions]
    return F.cross_entropy(logits[rows], torch.tensor(query.target))


def gradient_by_autograd(model: ProbedModel, query: Query) -> torch.Tensor:
    parameters = list(model.module.parameters())
    grads = torch.autograd.grad(loss_of(model, query), parameters, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, grads, strict=True)]
    )


# --- agreement with the references ----------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("encoding", POSITION_ENCODINGS)
def test_scores_equal_q_and_k_recomputed_from_the_weights(encoding, heads):
    model = mdm(encoding, scale=0.1, n_heads=heads)
    pairs = letter_pairs(6, model=model, placements="grid")
    check_scores(probe_attention_correlation(model, pairs, control=False), model, pairs)


@pytest.mark.parametrize(
    "model", [mdm(e, scale=0.1) for e in POSITION_ENCODINGS] + [arm()], ids=[*POSITION_ENCODINGS, "gpt2"]
)
def test_gradient_cosines_equal_autograd_over_all_parameters(model):
    model.module.eval()
    pairs = letter_pairs(5, model=model, placements="grid")
    reading = probe_gradient_cosine(model, pairs, batch_size=40)
    sums = (
        reading.frame.assign(f=reading.frame.norm_forward**2, r=reading.frame.norm_reverse**2)
        .groupby("pair")[["inner", "f", "r"]]
        .sum()
    )
    for pair in range(0, len(pairs), 37):
        forward, reverse = (gradient_by_autograd(model, q) for q in (pairs[pair].forward, pairs[pair].reverse))
        expected = float(F.cosine_similarity(forward, reverse, dim=0))
        assert sums.inner[pair] / math.sqrt(sums.f[pair] * sums.r[pair]) == pytest.approx(expected, abs=1e-5)
        assert math.sqrt(sums.f[pair]) == pytest.approx(float(forward.norm()), rel=1e-5)


@pytest.mark.parametrize("batch_size", [None, 7])
def test_the_cross_matrix_holds_every_facts_cosine_with_every_other(batch_size, tmp_path):
    """Each cell against autograd; its diagonal is the probe's own value; it survives the disk."""
    model = mdm(scale=0.1)
    model.module.eval()
    pairs = letter_pairs(5, model=model, placements="mirror", offset=1)
    pairs = pairs.take(np.flatnonzero(np.isin(pairs.facts, list("abcd"))))
    reading = probe_gradient_cosine(model, pairs, cross=True, batch_size=batch_size)
    forward, reverse = (
        {(p.fact, p.forward.evidence_positions): gradient_by_autograd(model, getattr(p, s)) for p in pairs}
        for s in ("forward", "reverse")
    )
    for one, other in (("a", "a"), ("a", "c"), ("d", "b")):
        places = {place for fact, place in forward if fact == one}
        cosines = [float(F.cosine_similarity(forward[one, at], reverse[other, at], dim=0)) for at in places]
        assert reading.cross.loc[one, other] == pytest.approx(np.mean(cosines), abs=1e-5)
    assert np.mean(np.diag(reading.cross)) == pytest.approx(reading.value, abs=1e-6)
    loaded = type(reading).load(reading.save(tmp_path / "g.parquet"))
    np.testing.assert_allclose(loaded.cross, reading.cross)
    assert list(loaded.cross.index) == list("abcd")


@pytest.mark.parametrize("model", [mdm(scale=0.2), arm()], ids=["rope", "gpt2"])
def test_probabilities_equal_a_plain_softmax(model):
    model.module.eval()
    pairs = letter_pairs(5, model=model)
    frame = probe_reverse_probability(model, pairs).frame.set_index(["pair", "direction"])
    for pair in range(0, len(pairs), 41):
        for side in ("forward", "reverse"):
            query = getattr(pairs[pair], side)
            ids = torch.tensor([query.token_ids])
            if model.objective == "masked":
                ids[0, query.target_positions[0]] = model.mask_token_id
            distribution = (
                model.module(input_ids=ids)
                .logits[0, query.target_positions[0] - model.logit_shift]
                .double()
                .softmax(-1)
            )
            row = frame.loc[(pair, side)]
            assert row.probability == pytest.approx(distribution[query.target[0]].item(), rel=1e-5)
            assert row["rank"] == 1 + int((distribution > distribution[query.target[0]]).sum())
            assert row.argmax_match == (row["rank"] == 1)


def two_token_pairs() -> ReversalPairs:
    """Targets of two tokens and evidence of two, at several lengths, so that batches are padded."""
    made = []
    for fact in range(6):
        target, evidence = [1 + fact, 7 + fact], [30 + fact, 40 + fact]
        fill = [0] * (fact % 3)
        forward = Query([*fill, *target, 0, *evidence], [len(fill), len(fill) + 1], [len(fill) + 3, len(fill) + 4])
        reverse = Query([*evidence, 0, *target, *fill], [3, 4], [0, 1])
        made.append(ReversalPair(forward, reverse, fact=str(fact)))
    return ReversalPairs.from_pairs(made)


def log_softmax_at(model: ProbedModel, ids: list[int], row: int) -> torch.Tensor:
    return model.module(input_ids=torch.tensor([ids])).logits[0, row].log_softmax(-1)


def test_gradients_of_confident_answers_keep_their_digits(trained):
    """Near p = 1 the difference p - 1 is lost in float32, and the cosine with it, below no floor that would say so."""
    model = copy.deepcopy(trained)
    for p in model.module.final_norm.parameters():
        p.data *= 6.0
    double = copy.deepcopy(model)
    double.module.double()
    pairs = letter_pairs(5, model=model)
    frame = probe_reverse_probability(double, pairs).frame
    forward = frame[frame.direction == "forward"].probability
    assert forward.median() > 1 - 1e-6, "the answers must be confident to test anything"
    single, exact = (probe_gradient_cosine(m, pairs, control=False) for m in (model, double))
    np.testing.assert_allclose(pair_cosines(single.frame).cosine, pair_cosines(exact.frame).cosine, atol=1e-3)


def test_ties_count_against_the_target():
    """A model that gives every token the same logit ranks none of them first."""
    model = mdm()
    pairs = letter_pairs(4, model=model)
    model.module.lm_head.weight.data.zero_()
    frame = probe_reverse_probability(model, pairs).frame
    assert not frame.argmax_match.any() and (frame["rank"] == 55).all()


def test_a_model_with_constant_logits_can_be_wrapped():
    """A zero unembedding contradicts neither objective; nothing can be found out, so what was said holds."""
    model = mdm()
    model.module.lm_head.weight.data.zero_()
    assert ProbedModel(model.module, objective="masked").objective == "masked"


def test_chain_reveals_left_to_right_and_parallel_hides_all():
    model, pairs = mdm(scale=0.2), two_token_pairs()
    model.module.eval()
    for mode in ("chain", "parallel"):
        frame = probe_reverse_probability(model, pairs, mode=mode).frame.set_index(["pair", "direction"])
        for number, pair in enumerate(pairs):
            query, mask = pair.reverse, model.mask_token_id
            ids = [mask if i in query.target_positions else t for i, t in enumerate(query.token_ids)]
            first = log_softmax_at(model, ids, query.target_positions[0])[query.target[0]]
            if mode == "chain":
                ids[query.target_positions[0]] = query.target[0]
            second = log_softmax_at(model, ids, query.target_positions[1])[query.target[1]]
            assert frame.loc[(number, "reverse")].log_probability == pytest.approx(float(first + second), abs=1e-5)


def test_the_control_prices_a_target_at_another_facts_query():
    """Two facts, so the derangement is known: each target is priced at the other's masked sequence."""
    model = mdm(scale=0.3)
    model.module.eval()
    pairs = letter_pairs(4, model=model)
    pairs = pairs.take(np.flatnonzero(np.isin(pairs.facts, ["a", "b"])))
    frame = probe_reverse_probability(model, pairs).frame.set_index(["pair", "direction"])
    other = {"a": 2, "b": 1}
    for number, pair in enumerate(pairs):
        twin = next(
            q
            for q in pairs
            if q.fact != pair.fact
            and q.reverse.target_positions == pair.reverse.target_positions
            and q.reverse.evidence_positions == pair.reverse.evidence_positions
        )
        ids = [
            model.mask_token_id if i in twin.reverse.target_positions else t
            for i, t in enumerate(twin.reverse.token_ids)
        ]
        expected = log_softmax_at(model, ids, twin.reverse.target_positions[0]).exp()[other[twin.fact]]
        assert pair.reverse.target == (other[twin.fact],)
        assert frame.loc[(number, "reverse")].probability_control == pytest.approx(float(expected), rel=1e-5)


def test_causal_chains_of_several_tokens_equal_the_teacher_forced_product():
    model = arm(max_length=32)
    model.module.eval()
    made = []
    for fact in range(4):
        lower, upper = [1 + fact, 7 + fact], [30 + fact, 40 + fact]
        made.append(
            ReversalPair(
                Query([0, *lower, *upper], [3, 4], [1, 2]),
                Query([0, *upper, *lower], [3, 4], [1, 2]),
                "swapped",
                str(fact),
            )
        )
    pairs = ReversalPairs.from_pairs(made)
    frame = probe_reverse_probability(model, pairs).frame.set_index(["pair", "direction"])
    for number, pair in enumerate(pairs):
        ids = list(pair.reverse.token_ids)
        expected = sum(float(log_softmax_at(model, ids, p - 1)[ids[p]]) for p in (3, 4))
        assert frame.loc[(number, "reverse")].log_probability == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("model", [mdm(scale=0.1), arm()], ids=["rope", "gpt2"])
def test_the_fused_pass_gives_the_numbers_of_the_single_probes(model):
    pairs = letter_pairs(5, model=model, placements="mirror")
    fused = probe(model, pairs, batch_size=64)
    alone = [f(model, pairs) for f in (probe_attention_correlation, probe_gradient_cosine, probe_reverse_probability)]
    for one, other in zip(fused, alone, strict=True):
        assert one.value == pytest.approx(other.value, abs=1e-6) and one.n == other.n
        numbers = other.frame.select_dtypes("number").columns
        np.testing.assert_allclose(
            one.frame[numbers].astype(float), other.frame[numbers].astype(float), atol=2e-6, rtol=1e-4
        )


def test_layers_may_be_given_once_and_are_read_by_every_probe():
    """A generator serves one loop; the attention and the gradient probe both need it."""
    model = mdm()
    readings = probe(model, letter_pairs(5, model=model), layers=(layer for layer in [0]))
    assert set(readings["attention_correlation"].frame["layer"]) == {0}
    assert set(readings["gradient_cosine"].frame["layer"].dropna()) == {0}


def test_small_batches_and_padding_do_not_move_the_numbers():
    model, pairs = mdm(scale=0.2), two_token_pairs()
    whole, single = probe(model, pairs), probe(model, pairs, batch_size=1)
    for one, other in zip(whole, single, strict=True):
        numbers = one.frame.select_dtypes("number").columns
        np.testing.assert_allclose(
            one.frame[numbers].astype(float), other.frame[numbers].astype(float), atol=2e-6, rtol=1e-4
        )


# --- identities, controls, planted signals --------------------------------------------------------------------------


def test_alibi_identities_hold_to_1e_6():
    """Prop. 4.5 and reflection equivariance: correlation 1, reflected queries equally probable."""
    model = mdm("alibi", scale=0.1)
    readings = probe(model, letter_pairs(7, model=model, placements="mirror"))
    assert readings["attention_correlation"].value == pytest.approx(1.0, abs=1e-6)
    table = readings["reverse_probability"].measures().set_index("measure")
    assert table.value["forward_probability"] == pytest.approx(table.value["reverse_probability"], abs=1e-6)
    frame = readings["reverse_probability"].frame
    per_fact = frame.groupby(["fact", "direction"]).probability.apply(lambda p: np.sort(p.to_numpy())).unstack()
    np.testing.assert_allclose(np.stack(per_fact.forward), np.stack(per_fact.reverse), atol=1e-6)


def test_untrained_rope_correlates_as_the_theory_says():
    """Thm 4.3 at rho = 0, averaged over q and over the grid of distances: 0.68 at length 10; one draw of q scatters."""
    theta = 10000 ** (-np.arange(32) / 32)
    distances = np.arange(1, 10)
    expected = np.mean([np.cos((a + b) * theta).mean() for a in distances for b in distances])
    values = []
    for seed in range(12):
        model = mdm("rope", seed=seed)
        values.append(probe_attention_correlation(model, letter_pairs(10, model=model), control=False).value)
    assert expected == pytest.approx(0.680, abs=1e-3)
    assert 0.5 < np.mean(values) < 0.8
    assert abs(np.mean(values) - expected) < 3 * np.std(values) / math.sqrt(len(values))


def deranged(pairs: ReversalPairs, seed: int) -> ReversalPairs:
    """The same forward queries with the reverse queries of other facts: there is nothing left to find."""
    partner = derangement(pairs.facts.astype(str), pairs.groups(0), seed=100 + seed)
    return ReversalPairs(
        pairs.queries, pairs.forward, pairs.reverse[partner], pairs.facts, pairs.kind, tokenizer=pairs.tokenizer
    )


@pytest.fixture(scope="module")
def trained() -> ProbedModel:
    """A rope model that has learned the forward order at length 5, by a plain loop over the masked objective."""
    model = mdm("rope", d_model=32)
    ids = torch.tensor(letter_tokenizer()(letters(5).training_texts())["input_ids"])
    optimizer = torch.optim.AdamW(model.module.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        rows = ids[torch.randint(len(ids), (64,), generator=generator)]
        hidden = torch.rand(rows.shape, generator=generator) < torch.rand(64, 1, generator=generator)
        logits = model.module(model.hide(rows, hidden)).logits
        loss = F.cross_entropy(logits[hidden], rows[hidden])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    forward = probe_reverse_probability(model, letter_pairs(5, model=model, placements="mirror")).measures()
    assert forward.set_index("measure").value["forward_accuracy"] > 0.95
    return model


@pytest.mark.parametrize("state", rest_long(["rope", "absolute", "trained"]))
def test_with_facts_deranged_the_correlation_and_the_excess_hold_zero(state, request):
    """Twenty derangements. A 95 % interval over 26 facts misses zero more often than once in twenty, for two known
    reasons: the percentile bootstrap is short at this n, and a deranged control meets a true pair once in 25.
    """
    fixed = request.getfixturevalue("trained") if state == "trained" else None
    held = {"attention_correlation": [], "gradient_cosine": []}
    for seed in range(20):
        model = fixed or mdm(state, scale=0.05, seed=seed)
        readings = probe(model, deranged(letter_pairs(5, model=model), seed), only=["attention", "gradient"], seed=seed)
        low, high = readings["attention_correlation"].interval
        held["attention_correlation"].append(low <= 0 <= high)
        excess = readings["gradient_cosine"].excess
        held["gradient_cosine"].append(excess.low <= 0 <= excess.high)
    assert min(np.mean(values) for values in held.values()) >= 0.7, held


def test_the_true_pairing_of_an_untrained_model_stands_out_of_its_control():
    """Theory at initialisation; what training makes of it is a finding, reported and not required."""
    model = mdm("rope", scale=0.05)
    for reading in probe(model, letter_pairs(5, model=model), only=["attention", "gradient"]):
        assert reading.control.interval[1] < reading.interval[0], reading
        assert reading.excess.low > 0


def test_scores_made_equal_by_construction_are_found():
    """Planted signal: keys that do not depend on position give forward and reverse scores that are the same."""
    model = mdm("none", scale=0.1)
    pairs = letter_pairs(6, model=model)
    reading = probe_attention_correlation(model, pairs)
    np.testing.assert_allclose(reading.frame.score_forward, reading.frame.score_reverse, atol=1e-6)
    assert reading.value == pytest.approx(1.0, abs=1e-6)


def plant_shifted_rows(patch) -> None:
    true = batches.make_batch

    def shifted(model, queries, **options):
        batch = true(model, queries, **options)
        object.__setattr__(batch, "rows", (batch.rows + 1) % batch.input_ids.shape[1])
        return batch

    patch.setattr(passes, "make_batch", shifted)
    patch.setattr(batches, "is_due", lambda *_: False)  # else the first batch is found out already


def plant_wrong_head(patch) -> None:
    true = attention_hooks._weigh
    patch.setattr(attention_hooks, "_weigh", lambda *a, **k: tuple(part.roll(1, dims=1) for part in true(*a, **k)))


@pytest.mark.parametrize("plant", [plant_shifted_rows, plant_wrong_head])
def test_planted_faults_turn_the_score_check_red(plant, monkeypatch):
    model = mdm("rope", scale=0.1, n_heads=2)
    pairs = letter_pairs(6, model=model, placements="grid")
    plant(monkeypatch)
    with pytest.raises(AssertionError, match="score of pair"):
        check_scores(probe_attention_correlation(model, pairs, control=False), model, pairs)


def test_averaging_padding_in_turns_the_padding_check_red(monkeypatch):
    """Planted fault: padded target and evidence slots counted as real ones."""
    model = mdm(scale=0.2)
    one, two = two_token_pairs()[0], letter_pairs(5, model=model)[0]
    pairs = ReversalPairs.from_pairs([one, ReversalPair(two.forward, two.reverse, fact="b")])
    true = batches.make_batch

    def counted(model, queries, **options):
        batch = true(model, queries, **options)
        for name in ("is_target", "is_evidence"):
            object.__setattr__(batch, name, torch.ones_like(getattr(batch, name)))
        return batch

    alone = probe(model, pairs, batch_size=1)
    monkeypatch.setattr(passes, "make_batch", counted)
    for name in ("attention_correlation", "gradient_cosine"):
        one, other = probe(model, pairs)[name], alone[name]
        numbers = [c for c in one.frame.columns if c.startswith(("score", "inner", "norm"))]
        with pytest.raises(AssertionError):
            np.testing.assert_allclose(one.frame[numbers].astype(float), other.frame[numbers].astype(float), atol=1e-4)


# --- what is undefined, refused, and left behind --------------------------------------------------------------------


def test_facts_alone_in_their_group_have_no_control_and_are_counted():
    reading = probe_gradient_cosine(mdm(), two_token_pairs()[:1])
    assert reading.control is None and reading.undefined == {
        "no other fact in the group for the control": 1,
        "of one fact, so without an interval": 1,
    }
    assert math.isfinite(reading.value) and math.isnan(reading.interval[0])


def state_of(module: torch.nn.Module) -> list:
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in module.modules()]
    weights = [
        (p.detach().clone(), p.requires_grad, None if p.grad is None else p.grad.clone()) for p in module.parameters()
    ]
    return [hooks, weights, torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()]


def assert_same(before: list, after: list) -> None:
    assert before[0] == after[0] and before[3] == after[3] and (before[4] == after[4]).all()
    assert torch.equal(before[2], after[2])
    for (w, flag, grad), (w2, flag2, grad2) in zip(before[1], after[1], strict=True):
        assert torch.equal(w, w2) and flag == flag2 and (grad is None) == (grad2 is None)
        assert grad is None or torch.equal(grad, grad2)


@pytest.mark.parametrize("raises", [False, True])
def test_probing_leaves_no_trace(raises, monkeypatch):
    """Modes (mixed ones too), flags, gradients, hooks and every RNG; also when the probe raises in the middle."""
    model = mdm(dropout=0.3)
    model.module.train()
    model.module.final_norm.eval()
    model.module.lm_head.weight.requires_grad_(False)
    model.module.embed_tokens.weight.grad = torch.ones_like(model.module.embed_tokens.weight)
    pairs = letter_pairs(5, model=model)
    if raises:
        monkeypatch.setattr(gradient_reading, "multiply", lambda *_: 1 / 0)  # in the middle of the backward pass
    before = state_of(model.module)
    if raises:
        with pytest.raises(ZeroDivisionError):
            probe(model, pairs)
    else:
        probe(model, pairs)
    assert_same(before, state_of(model.module))


def test_logits_that_overflow_are_an_error_and_not_an_accuracy():
    """inf - inf is NaN, and NaN is greater than nothing: unchecked, every target would rank first."""
    model = mdm()
    pairs = letter_pairs(4, model=model)
    model.module.lm_head.weight.data[0] = 3e38
    model.module.final_norm.weight.data[:] = 100.0
    with pytest.raises(RevprobeError, match="NaN logits: its weights are finite, so an activation overflowed"):
        probe_reverse_probability(model, pairs)


def test_nan_weights_are_named():
    model = mdm()
    broken = copy.deepcopy(model)
    broken.module.blocks[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(RevprobeError, match=r"NaN logits: its weight 'blocks.0.mlp.up_proj.weight' holds NaN"):
        probe(broken, letter_pairs(5, model=model))


@pytest.mark.parametrize(
    ("query", "words"),
    [
        (Query([4, 0, 99], [0], [2]), "token id 99 is outside the vocabulary of RaddForMaskedLM .0 to 55."),
        (Query([4, *[0] * 80, 30], [0], [81]), "a query of 82 tokens is longer than RaddForMaskedLM takes .64."),
        (Query([53, 0, 30], [0], [2]), "a target is the mask token 53 itself"),
    ],
)
def test_queries_that_do_not_fit_the_model_are_refused(query, words):
    with pytest.raises(RevprobeError, match=words):
        probe(mdm(), ReversalPairs.from_pairs([ReversalPair(query, query)]))


def test_a_target_at_position_0_of_a_shift_1_model_gets_a_begin_token():
    """Never a negative row: with a begin token the distribution is the one after it; without one, an error."""
    model = ProbedModel(mdm(scale=0.2).module, letter_tokenizer(), objective="masked", logit_shift=1)
    pairs = ReversalPairs.from_pairs([ReversalPair(Query([4, 0, 30], [0], [2]), Query([30, 0, 4], [2], [0]))])
    frame = probe_reverse_probability(model, pairs).frame
    model.module.eval()
    expected = log_softmax_at(model, [54, 53, 0, 30], 0).exp()[4]
    assert frame[frame.direction == "forward"].probability.item() == pytest.approx(float(expected), rel=1e-5)
    model.begin_token_id = None
    with pytest.raises(RevprobeError, match="cannot predict without a begin token"):
        probe_reverse_probability(model, pairs)


def test_unknown_names_and_modes_offer_the_nearest():
    model, causal = mdm(), arm()
    pairs = letter_pairs(4, model=model)
    with pytest.raises(RevprobeError, match="unknown probe 'atention'; the closest is 'attention'"):
        probe(model, pairs, only=["atention"])
    with pytest.raises(RevprobeError, match="unknown mode 'chian'; the closest is 'chain'"):
        probe_reverse_probability(model, pairs, mode="chian")
    with pytest.raises(RevprobeError, match=r"no parameter 'lm_haed.weight'; the closest is 'lm_head.weight'"):
        probe_gradient_cosine(model, pairs, parameters=["lm_haed.weight"])
    with pytest.raises(RevprobeError, match="always prices a target token by token"):
        probe_reverse_probability(causal, letter_pairs(4, model=causal), mode="parallel")
    for size in (-1, 0):
        with pytest.raises(RevprobeError, match=f"batch_size={size}: expected a whole number of at least 1"):
            probe(model, pairs, batch_size=size)
