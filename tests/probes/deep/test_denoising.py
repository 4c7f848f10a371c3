"""A denoising trace is what a slow loop sees, writes what `decode` writes, and finds what was planted.

The slow loop below runs one query at a time, without padding, and works out every attention matrix in place of the
kernel; it knows neither the tap nor the canvas.
"""

import math
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from long_cases import rest_long

import revprobe as rp
from revprobe.models.bases.configs import LLaDAConfig
from revprobe.models.families.llada import LLaDAForMaskedDiffusion
from revprobe.probes.attention import EVIDENCE_HIDDEN
from revprobe.probes.decoding.decode import decode_tokens
from revprobe.probes.decoding.masked import ALGORITHMS, Prompt, unmasking
from revprobe.probes.deep.denoising import BLOCK_NOT_BEGUN
from revprobe.probes.passes.batches import prepare_queries
from revprobe.probes.statistics.denoising import attention_table, steps_table
from revprobe.probes.statistics.estimators import LATER_BLOCK, NO_LIKE_TARGET, NO_PARTNER
from tiny import FIXTURES, AttentionOnly, drawn, gpt2, in_blocks, llama, pairs_at, radd, text_like_pairs

MODELS = {
    "llada": lambda: rp.load_model(FIXTURES / "llada-tiny"),
    "dream": lambda: rp.load_model(FIXTURES / "dream-tiny"),
    "rope": lambda: radd("rope", n_layers=2, n_heads=2),
    "alibi": lambda: radd("alibi", n_layers=2, n_heads=2),
    "absolute": lambda: radd("absolute", n_layers=2, n_heads=2),
    "blocks": lambda: in_blocks(4, scale=0.3),
    "blocks, shift 1": lambda: in_blocks(4, shift=1, scale=0.3),
}
every_model = pytest.mark.parametrize("name", MODELS)


# --- the slow loop --------------------------------------------------------------------------------------------------


def slow_kernel(seen: list[torch.Tensor]):
    """Attention written out, each call's scores (`heads rows keys`) kept."""

    def attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        per = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(per, 1), value.repeat_interleave(per, 1)
        scores = query @ key.transpose(-1, -2) * (scale or query.shape[-1] ** -0.5)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask
        seen.append(scores[0])
        return scores.softmax(-1) @ value

    return attend


@torch.no_grad()
def slow_trace(model, query, shown, *, steps=None, block_length=None, algorithm=None):
    """(answer rows, attention rows) of one query: what `trace_denoising` must have for it.

    shown: the query with the positions that a user named, where a begin token was put before it.
    """
    ids = list(query.token_ids)
    for place in query.target_positions:
        ids[place] = model.mask_token_id
    algorithm = algorithm or ("entropy" if model.logit_shift else "confidence")
    groups = groups_of(model, query.target_positions, block_length)
    plan = [(group, take) for group, share in zip(groups, shares(groups, steps), strict=True) for take in share]
    answers, heads = [], []
    for step, (group, take) in enumerate(plan, start=1):
        seen: list[torch.Tensor] = []
        with mock.patch.object(F, "scaled_dot_product_attention", slow_kernel(seen)):
            logits = model.logits(torch.tensor([ids]))[0].double()
        masked = [p for p in query.target_positions if ids[p] == model.mask_token_id]
        now = [p for p in group if p in masked]
        size = model.block_size or 10**6
        begun = [p for p in masked if (p - model.logit_shift) // size <= (max(now) - model.logit_shift) // size]
        surest, choice = [], {}
        for place in now:
            row = logits[place - model.logit_shift].clone()
            row[model.mask_token_id] = -math.inf
            logs = row.log_softmax(-1)[None]
            choice[place] = int(logs.argmax())
            surest.append((-float(ALGORITHMS[algorithm](logs, torch.tensor([choice[place]]))), place))
        revealed = [place for _, place in sorted(surest)[:take]]
        for place in masked:
            target = query.token_ids[place]
            row = logits[place - model.logit_shift]
            found = {"step": step, "position": shown.target_positions[query.target_positions.index(place)]}
            found["state"] = "open" if place in now else "waiting" if place in begun else "not begun"
            found["log_probability"] = float(row.log_softmax(-1)[target]) if place in begun else math.nan
            found["rank"] = int((row >= row[target]).sum()) if place in begun else math.nan
            found["token"] = choice[place] if place in revealed else -1
            answers.append(found)
        rows, evidence = [p - model.logit_shift for p in begun], list(query.evidence_positions)
        for layer, scores in enumerate(seen):
            weights = scores.softmax(-1)
            for head in range(len(scores)):
                cell = {"step": step, "layer": layer, "head": head}
                cell["score"] = float(scores[head][rows][:, evidence].mean())
                cell["weight"] = float(weights[head][rows][:, evidence].sum(-1).mean())
                heads.append(cell)
        for place in revealed:
            ids[place] = choice[place]
    return pd.DataFrame(answers), pd.DataFrame(heads)


def groups_of(model, places, block_length):
    """The positions that are finished together, one after the other."""
    if model.block_size is None:
        size = block_length or len(places)
        return [places[start : start + size] for start in range(0, len(places), size)]
    size = block_length or model.block_size
    groups: dict[tuple, list[int]] = {}
    for place in places:
        groups.setdefault((place // size, model.logit_shift and place % model.block_size == 0), []).append(place)
    return list(groups.values())


def shares(groups, steps):
    """How many tokens each step of each group reveals; one a step, or spread evenly over steps and groups."""
    if steps is None or steps >= sum(map(len, groups)):
        return [[1] * len(group) for group in groups]
    found = []
    for number, group in enumerate(groups):
        own = steps // len(groups) + (number < steps % len(groups))
        found.append([len(group) // own + (k < len(group) % own) for k in range(own)])
    return [[take for take in share if take] for share in found]


def scattered(count=6, length=13, wide=3):
    """Pairs whose targets stand apart, the evidence before, between or behind them; lengths differ."""
    generator = torch.Generator().manual_seed(5)
    pairs = []
    for fact in range(count):
        queries, ids = [], torch.randperm(50, generator=generator)[: length + wide + 1].tolist()
        evidence, target, rest = ids[:1], ids[1 : 1 + wide], ids[1 + wide :]
        for side in range(2):
            size = length - (fact + side) % 2
            places = sorted((torch.randperm(size - 1, generator=generator)[: wide + 1] + 1).tolist())
            at = places.pop((fact + 2 * side) % (wide + 1))
            tokens = rest[:size]
            tokens[at] = evidence[0]
            for place, token in zip(places, target, strict=True):
                tokens[place] = token
            queries.append(rp.Query(tokens, places, [at]))
        pairs.append(rp.ReversalPair(*queries, fact=str(fact)))
    return rp.ReversalPairs.from_pairs(pairs)


@every_model
@pytest.mark.parametrize(
    "options", rest_long([{}, {"steps": 2}, {"block_length": 2}, {"remasking": "margin"}]), ids=str
)
def test_a_trace_is_what_the_slow_loop_sees_step_by_step(name, options):
    """Scattered targets in padded batches against one query at a time: a row, a step, a mask or a mean that is off by
    anything turns this red.
    """
    model = MODELS[name]()
    pairs = scattered()
    if model.block_size and options == {"steps": 2}:
        options = {"steps": 3}  # three tokens may stand in three blocks
    frame = rp.trace_denoising(model, pairs, batch_size=5, **options).frame
    slow = {key: value for key, value in options.items() if key != "remasking"}
    slow["algorithm"] = options.get("remasking")
    prepared, differ = prepare_queries(model, pairs.queries), 0
    for pair in range(len(pairs)):
        for side, index in (("forward", pairs.forward), ("reverse", pairs.reverse)):
            number = int(index[pair])
            answers, heads = slow_trace(model, prepared[number], pairs.queries[number], **slow)
            own = frame[(frame["pair"] == pair) & (frame["direction"] == side)]
            found = own[own["part"] == "answer"].sort_values(["step", "position"])
            assert found["state"].tolist() == answers["state"].tolist()
            assert found["token"].fillna(-1).tolist() == answers["token"].tolist()
            out_of_sight = set(own["reason"]) == {LATER_BLOCK}
            if out_of_sight:
                assert own[["log_probability", "rank", "score", "weight"]].isna().all(axis=None)
                continue
            for column, apart in (("log_probability", 1e-4), ("rank", 0)):
                np.testing.assert_allclose(found[column], answers[column].astype(float), atol=apart, rtol=0)
            found = own[own["part"] == "attention"].sort_values(["step", "layer", "head"])
            assert (
                found[["step", "layer", "head"]].to_numpy(int).tolist()
                == heads[["step", "layer", "head"]].values.tolist()
            )
            np.testing.assert_allclose(found["weight"], heads["weight"], atol=2e-5, rtol=0)
            hidden = found["reason"] == EVIDENCE_HIDDEN
            np.testing.assert_allclose(found.loc[~hidden, "score"], heads.loc[~hidden.to_numpy(), "score"], atol=1e-4)
            differ += answers["step"].max() > 1
    assert differ, "some queries must be in sight and take several steps"


# --- the same tokens as the decoder ---------------------------------------------------------------------------------


def at_the_end(count=7):
    """Pairs whose targets end their texts, of unequal lengths, and all their prompts in the order of the queries."""
    generator = torch.Generator().manual_seed(8)
    pairs = []
    for fact in range(count):
        ids = torch.randperm(50, generator=generator)[:14].tolist()
        target, evidence, rest = ids[:3], ids[3:4], ids[4:]
        size = 4 + fact % 3
        forward, reverse = [*evidence, *rest[:size], *target], [rest[0], *evidence, *rest[1:size], *target]
        queries = [rp.Query(t, range(len(t) - 3, len(t)), [at]) for t, at in ((forward, 0), (reverse, 1))]
        pairs.append(rp.ReversalPair(*queries, fact=str(fact)))
    return rp.ReversalPairs.from_pairs(pairs)


def written(frame, pairs):
    """The tokens of each query by its number, in the order of their positions."""
    found = {}
    rows = frame[(frame["part"] == "answer") & frame["token"].notna()].sort_values("position")
    for (pair, side), own in rows.groupby(["pair", "direction"]):
        found[int((pairs.forward if side == "forward" else pairs.reverse)[pair])] = own["token"].tolist()
    return [found[number] for number in range(len(pairs.queries))]


@every_model
def test_it_writes_the_tokens_that_the_decoder_writes(name):
    model, pairs = MODELS[name](), at_the_end()
    prompts = [Prompt(query.token_ids[:-3]) for query in pairs.queries]
    settings = [{}, {"steps": 3, "block_length": 1}, {"temperature": 1.0, "seed": 3}, {"algorithm": "margin"}]
    settings += [] if model.block_size else [{"steps": 2}, {"steps": 1}]
    answers = []
    for given in settings:
        told = {"remasking" if key == "algorithm" else key: value for key, value in given.items()}
        frame = rp.trace_denoising(model, pairs, batch_size=4, **told).frame
        expected = decode_tokens(model, prompts, [3] * len(prompts), unmasking(model, **given))
        assert written(frame, pairs) == expected, given
        answers.append(expected)
    assert len({str(answer) for answer in answers}) > 1, "settings must matter here"


def test_its_words_are_those_of_decode():
    """Text prompts, through the public names on both sides."""
    model = radd("rope", n_layers=2, n_heads=2, scale=0.5)
    pairs = at_the_end()
    texts = ["".join(model.tokenizer.convert_ids_to_tokens(list(query.token_ids[:-3]))) for query in pairs.queries]
    said = rp.decode(model, texts, max_new_tokens=3)
    frame = rp.trace_denoising(model, pairs).frame
    rows = frame[frame["token"].notna()].sort_values("position")
    words = rows.groupby(["pair", "direction"])["text"].apply(lambda part: "".join(part.astype(str)))
    for pair in range(len(pairs)):
        for side, index in (("forward", pairs.forward), ("reverse", pairs.reverse)):
            assert words[pair, side] == said[int(index[pair])]


# --- what is planted is found ---------------------------------------------------------------------------------------

FACTS, EVIDENCE, FIRST, SECOND = 10, 20, 30, 40  # ids of fact n: EVIDENCE + n says FIRST + n, which says SECOND + n


def wired(carries: bool) -> rp.ProbedModel:
    """One-hot embeddings; head 0 of two carries the evidence to a mask, and, once it stands there, the first token.

    carries: else no head attends to anything rather than to another, and fillers alone have values.
    """
    module = drawn(lambda: AttentionOnly(heads=2, dim=56), scale=0.0)
    with torch.no_grad():
        for part in (module.q, module.k, module.v):
            part.weight.zero_()
        module.embed.weight.copy_(torch.eye(56))
        module.unembed.weight.copy_(10 * torch.eye(56))
        module.k.weight[:56] = torch.eye(56)
        if carries:
            module.q.weight[EVIDENCE : EVIDENCE + FACTS, 53] = 8 * math.sqrt(56)
            module.q.weight[FIRST : FIRST + FACTS, 53] = 16 * math.sqrt(56)
            for fact in range(FACTS):
                module.v.weight[FIRST + fact, EVIDENCE + fact] = 1.0
                module.v.weight[SECOND + fact, FIRST + fact] = 1.0
        else:
            module.v.weight[:10, :10] = torch.randn(10, 10)
    return rp.ProbedModel(module, objective="masked", mask_token_id=53, logit_shift=0)


def planted_pairs():
    pairs = []
    for fact in range(FACTS):
        fillers = [fact % 10, (fact + 3) % 10, (fact + 5) % 10]
        target, evidence = [FIRST + fact, SECOND + fact], EVIDENCE + fact
        forward = rp.Query([*fillers, evidence, *target], [4, 5], [3])
        reverse = rp.Query([*target, evidence, *fillers], [0, 1], [2])
        pairs.append(rp.ReversalPair(forward, reverse, fact=str(fact)))
    return rp.ReversalPairs.from_pairs(pairs)


def test_a_head_that_carries_the_evidence_is_seen_at_the_step_in_which_it_does():
    reading = rp.trace_denoising(wired(True), planted_pairs())
    frame, alone = reading.frame, math.exp(10) / (math.exp(10) + 55)
    assert reading.value == pytest.approx(alone, abs=0.01) and reading.control.value < 1e-3
    assert reading.excess.low > 0.3 and set(frame["match"].dropna()) == {1.0}
    answers = frame[frame["part"] == "answer"]
    for row in answers.itertuples():
        first = row.position in (4, 0)
        says_it = row.step == 1 if first else row.step == 2
        assert (row.rank == 1) == says_it and (row.probability > 0.9) == says_it
        assert (not pd.isna(row.token)) == says_it
    weight = frame[frame["part"] == "attention"].groupby(["direction", "head", "step"])["weight"].mean()
    for side in ("forward", "reverse"):
        assert weight[side, 0, 1] == pytest.approx(math.exp(8) / (math.exp(8) + 5), abs=1e-4)
        assert weight[side, 0, 2] < 1e-3, "the first token has taken over"
        assert weight[side, 1, 1] == pytest.approx(1 / 6, abs=1e-6) == weight[side, 1, 2]


def test_a_model_that_lets_every_fact_be_shows_no_excess_and_no_route():
    reading = rp.trace_denoising(wired(False), planted_pairs())
    assert reading.value == pytest.approx(reading.control.value, abs=1e-7)
    assert reading.frame["weight"].dropna().sub(1 / 6).abs().max() < 1e-6
    assert reading.frame["match"].dropna().eq(0).all()


# --- numbers and their reasons --------------------------------------------------------------------------------------


def test_the_first_step_of_one_token_is_what_the_probes_read():
    """Probability, rank, score and weight as `probe_reverse_probability` and the attention probe have them."""
    model = MODELS["llada"]()
    pairs = pairs_at((2, 5), (5, 2), count=9, length=8, vocab=240, ragged=True)
    reading = rp.trace_denoising(model, pairs, seed=4)
    other = rp.probe_reverse_probability(model, pairs, seed=4)
    found = reading.frame[reading.frame["part"] == "answer"].sort_values(["pair", "direction"])
    expected = other.frame.sort_values(["pair", "direction"])
    for column in ("probability", "log_probability", "rank"):
        np.testing.assert_allclose(found[column], expected[column], rtol=1e-4, atol=1e-7)
    assert reading.value == pytest.approx(other.value, rel=1e-4)
    assert reading.interval == pytest.approx(other.interval, rel=1e-3)
    scores = rp.probe_attention_correlation(model, pairs).frame.sort_values(["pair", "layer", "head"])
    for side in ("forward", "reverse"):
        own = reading.frame.query("part == 'attention' and direction == @side").sort_values(["pair", "layer", "head"])
        for column in ("score", "weight"):
            np.testing.assert_allclose(own[column], scores[f"{column}_{side}"], atol=1e-5)


def test_the_control_prices_the_target_where_the_partner_is_asked_at_the_same_step():
    """Of every query, at every step: its own target at the partner's query, as that one is written."""
    from revprobe.probes.statistics.resampling import derangement

    model, pairs = MODELS["rope"](), at_the_end()
    frame = rp.trace_denoising(model, pairs, seed=2).frame
    asked = rp.ReversalPairs.from_pairs(  # the partner's queries, priced for the own target
        [
            rp.ReversalPair(
                *(
                    rp.Query(with_target(other, query.target), other.target_positions, other.evidence_positions)
                    for query, other in ((own.forward, partner.forward), (own.reverse, partner.reverse))
                ),
                fact=own.fact,
            )
            for own, partner in pairs_with_partners(pairs, derangement, seed=2)
        ]
    )
    numbers = [pair for pair, _ in enumerate(pairs) if partner_of(pairs, derangement, 2)[pair] >= 0]
    other = rp.trace_denoising(model, asked, control=False).frame
    own = frame[(frame["part"] == "answer") & frame["pair"].isin(numbers)]
    assert "probability_control" not in other and len(own)
    there = other[other["part"] == "answer"].set_index(["pair", "direction", "position"])
    earlier = 0
    for row in own.itertuples():
        place = getattr(pairs[row.pair], row.direction).target_positions.index(row.position)
        number = numbers.index(row.pair)
        position = getattr(asked[number], row.direction).target_positions[place]
        seen = there.loc[[(number, row.direction, position)]]
        last = seen[seen["step"] <= row.step].iloc[-1]
        earlier += last["step"] < row.step
        assert row.probability_control == pytest.approx(last["probability"], rel=1e-5)
    assert earlier, "no target position was written earlier where the partner is asked, so that case is not met"
    alone = frame[(frame["part"] == "answer") & ~frame["pair"].isin(numbers)]
    assert set(alone["reason_control"]) <= {NO_PARTNER} and alone["probability_control"].isna().all()


def with_target(query, target):
    tokens = list(query.token_ids)
    for place, token in zip(query.target_positions, target, strict=True):
        tokens[place] = token
    return tokens


def partner_of(pairs, derangement, seed):
    return derangement(pairs.facts.astype(str), pairs.groups(0), seed=seed)


def pairs_with_partners(pairs, derangement, seed):
    partner = partner_of(pairs, derangement, seed)
    return [(pairs[pair], pairs[int(other)]) for pair, other in enumerate(partner) if other >= 0]


def test_what_has_no_number_says_why():
    """Evidence in a later block, a block not begun, a control of another length or of the same target."""
    model = in_blocks(4)
    behind = [rp.Query([10 + n, 1, 2, 3, 4, 20 + n], [0], [5]) for n in range(3)]
    before = [rp.Query([1, 20 + n, 2, 10 + n], [3], [1]) for n in range(3)]
    pairs = rp.ReversalPairs.from_pairs(
        [rp.ReversalPair(f, r, fact=str(n)) for n, (f, r) in enumerate(zip(before, behind, strict=True))]
    )
    reading = rp.trace_denoising(model, pairs)
    reverse = reading.frame[reading.frame["direction"] == "reverse"]
    assert set(reverse["reason"]) == {LATER_BLOCK} and math.isnan(reading.value)
    assert reading.undefined == {LATER_BLOCK: 3} and reverse["token"].notna().sum() == 3
    assert reverse[["probability", "probability_control", "rank", "score", "weight"]].isna().all(axis=None)
    assert reading.summary(by="direction").set_index("direction").loc["forward", "n"] == 3
    wide = rp.Query([1, 2, 7, 3, 30, 31], [3, 4, 5], [2])
    trace = rp.trace_denoising(model, rp.ReversalPairs.from_pairs([rp.ReversalPair(wide, wide, fact="a")])).frame
    first = trace[(trace["step"] == 1) & (trace["direction"] == "forward")]
    assert first["state"].dropna().tolist() == ["open", "not begun", "not begun"]
    assert first["reason"].tolist()[:3] == ["", BLOCK_NOT_BEGUN, BLOCK_NOT_BEGUN]
    assert set(trace["reason_control"].dropna()) == {NO_PARTNER, BLOCK_NOT_BEGUN}


def test_the_control_is_another_target_as_long_wherever_there_is_one():
    """The next of the facts in their order may ask for the same target, or for more tokens: one after it serves."""
    model = radd("rope")
    made = [([10], 20), ([11, 12], 21), ([10], 22), ([10], 23), ([13], 24), ([14, 15], 25)]
    pairs = []
    for fact, (target, evidence) in enumerate(made):
        query = rp.Query([evidence, 1, *target, 2], range(2, 2 + len(target)), [0])
        pairs.append(rp.ReversalPair(query, query, fact=str(fact)))
    for seed in range(5):
        frame = rp.trace_denoising(model, rp.ReversalPairs.from_pairs(pairs), seed=seed).frame
        answers = frame[frame["part"] == "answer"]
        assert set(answers["reason_control"]) == {""} and answers["probability_control"].notna().all()
        first = answers[answers["pair"].isin([0, 2, 3]) & (answers["step"] == 1)]  # fact 4 is all there is for these
        ids = torch.tensor([[24, 1, model.mask_token_id, 2]])
        with torch.no_grad():
            wanted = float(model.logits(ids)[0, 2].double().softmax(-1)[10])
        for row in first.itertuples():
            assert row.probability_control == pytest.approx(wanted, rel=1e-5) and row.fact_control == "4"
    none = rp.trace_denoising(model, rp.ReversalPairs.from_pairs([pairs[0], pairs[1], pairs[2]]))
    answers = none.frame[none.frame["part"] == "answer"]
    assert set(answers["reason_control"]) == {NO_LIKE_TARGET} and none.control is None
    assert sum(none.undefined.values()) >= 3 and not math.isnan(none.value)


def test_layers_are_chosen_and_others_refused():
    model, pairs = MODELS["llada"](), text_like_pairs()
    whole = rp.trace_denoising(model, pairs).frame.query("part == 'attention' and layer == 1")
    part = rp.trace_denoising(model, pairs, layers=[1]).frame.query("part == 'attention'")
    pd.testing.assert_frame_equal(
        part.reset_index(drop=True), whole.reset_index(drop=True), check_categorical=False, atol=1e-6
    )
    with pytest.raises(rp.RevprobeError, match="no layer 7 to read"):
        rp.trace_denoising(model, pairs, layers=[7])


@pytest.mark.parametrize("build", [gpt2, llama])
def test_a_causal_model_does_not_denoise_and_one_line_says_so(build):
    with pytest.raises(rp.RevprobeError, match="is a causal model, which does not denoise") as told:
        rp.trace_denoising(build(), text_like_pairs())
    assert "\n" not in str(told.value)


def test_settings_are_those_of_the_decoder():
    model, pairs = MODELS["rope"](), scattered()
    for options, words in (
        ({"steps": 1, "block_length": 1}, "every block takes at least one step"),
        ({"remasking": "confidnce"}, "closest is 'confidence'"),
        ({"temperature": -1.0}, "temperature -1.0"),
    ):
        with pytest.raises(rp.RevprobeError, match=words):
            rp.trace_denoising(model, pairs, **options)
    told: list[tuple[int, int]] = []
    reading = rp.trace_denoising(model, pairs, steps=2, batch_size=5, progress=lambda *counts: told.append(counts))
    assert told == [(5, 12), (10, 12), (12, 12)] and reading.meta["decoding"]["steps"] == 2


def test_swapped_pairs_of_unequal_targets_and_low_precision():
    """Forward asks for two tokens, reverse for one; bfloat16 stays within its rounding."""
    pairs = []
    for fact in range(6):
        long, short = [10 + fact, 20 + fact], [30 + fact]
        forward = rp.Query([*short, 1, *long, 2], [2, 3], [0])
        reverse = rp.Query([*long, 3, *short, 4], [3], [0, 1])
        pairs.append(rp.ReversalPair(forward, reverse, kind="swapped", fact=str(fact)))
    pairs = rp.ReversalPairs.from_pairs(pairs)
    full = rp.trace_denoising(radd("rope", n_layers=2), pairs)
    steps = full.frame.groupby("direction")["step"].max()
    assert steps.to_dict() == {"forward": 2, "reverse": 1}
    narrow = rp.trace_denoising(radd("rope", n_layers=2, dtype=torch.bfloat16), pairs)
    assert narrow.value == pytest.approx(full.value, abs=0.02) and narrow.meta["dtype"] == "bfloat16"


def test_a_trace_leaves_the_model_as_it_was():
    model, pairs = MODELS["llada"](), scattered()
    model.module.train()
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.module.modules()]
    random = torch.get_rng_state()
    rp.trace_denoising(model, pairs, temperature=1.0)
    assert model.module.training and torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.module.modules()]
    assert all(p.requires_grad and p.grad is None for p in model.module.parameters())


# --- tables, files and figures --------------------------------------------------------------------------------------


def test_the_curve_ends_at_the_reading_and_the_maps_cells_are_means_over_pairs():
    model, pairs = MODELS["rope"](), scattered()
    reading = rp.trace_denoising(model, pairs)
    table, frame = steps_table(reading.frame).set_index(["direction", "step"]), reading.frame
    last = frame["step"].max()
    assert table.loc[("reverse", last), "value"] == pytest.approx(reading.value, abs=1e-6)
    assert table.loc[("reverse", last), ["low", "high"]].tolist() == pytest.approx(reading.interval, abs=1e-6)
    first = (
        frame.query("part == 'answer' and step == 1 and direction == 'forward'").groupby("pair")["probability"].mean()
    )
    assert table.loc[("forward", 1), "value"] == pytest.approx(first.mean(), abs=1e-6)
    kept = []  # step 2, by hand: what was written in step 1 stays
    for _, own in frame.query("part == 'answer' and direction == 'reverse'").groupby("pair"):
        at = own[own["step"] == 2].set_index("position")["probability"].to_dict()
        gone = own[(own["step"] == 1) & own["token"].notna()].set_index("position")["probability"].to_dict()
        kept.append(np.mean([*at.values(), *gone.values()]))
    assert table.loc[("reverse", 2), "value"] == pytest.approx(np.mean(kept), abs=1e-6)
    cells = attention_table(frame, ["direction", "layer", "step"]).set_index(["direction", "layer", "step"])
    own = frame.query("part == 'attention' and direction == 'forward' and layer == 1 and step == 2")
    assert cells.loc[("forward", 1, 2), "value"] == pytest.approx(own["weight"].mean(), abs=1e-6)
    by = reading.summary(by=["part", "direction", "step"]).set_index(["part", "direction", "step"])["value"]
    assert by["attention", "forward", 1] == pytest.approx(
        frame.query("part == 'attention' and direction == 'forward' and step == 1")["weight"].mean(), abs=1e-6
    )


def test_a_saved_trace_comes_back_and_is_drawn(tmp_path):
    reading = rp.trace_denoising(MODELS["blocks"](), scattered())
    again = rp.Reading.load(reading.save(tmp_path / "trace.parquet"))
    pd.testing.assert_frame_equal(again.frame, reading.frame, check_categorical=False)
    assert again.value == reading.value and again.undefined == reading.undefined
    curves = again.plot()
    names = {trace.name for trace in curves.data}
    assert {"forward", "reverse", "forward: facts shuffled (undefined)"} <= names, "the facts differ in length"
    shown = steps_table(reading.frame).query("direction == 'reverse'")["value"].tolist()
    (line,) = [trace for trace in curves.data if trace.name == "reverse"]
    assert list(line.y) == pytest.approx(shown, nan_ok=True)
    for kind in ("layers", "heads"):
        maps = again.plot(kind=kind, theme="dark")
        assert [trace.type for trace in maps.data] == ["heatmap", "heatmap"]
    with pytest.raises(rp.RevprobeError, match="no step 9 in this trace"):
        again.plot(kind="heads", step=9)
    with pytest.raises(rp.RevprobeError, match="denoising plot of kind 'layer'"):
        again.plot(kind="layer")


def test_a_frame_of_a_deep_models_size_stays_small():
    """LLaDA's shape at small width, 100 pairs: so many bytes a step that sixteen steps stay under 200 MB."""
    sizes = {"d_model": 64, "n_heads": 32, "n_layers": 32, "mlp_hidden_size": 64, "max_sequence_length": 64}
    torch.manual_seed(0)
    module = LLaDAForMaskedDiffusion(LLaDAConfig(vocab_size=260, mask_token_id=259, **sizes)).eval()
    model = rp.ProbedModel(module, objective="masked", mask_token_id=259, check=False)
    pairs = pairs_at((2, 5), (5, 2), count=100, length=8, vocab=250)
    reading = rp.trace_denoising(model, pairs)
    assert len(reading.frame) == 200 + 2 * 100 * 32 * 32
    assert 16 * reading.frame.memory_usage(deep=True).sum() < 200e6


def test_a_misspelt_remasking_is_called_by_the_name_it_was_given_under() -> None:
    with pytest.raises(rp.RevprobeError, match="unknown remasking 'confidance'; the closest is 'confidence'"):
        rp.trace_denoising(radd(), pairs_at((1, 5), (5, 1), count=2), remasking="confidance")
