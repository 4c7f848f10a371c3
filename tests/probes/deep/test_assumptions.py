"""The assumption audit against plain loops over projections by hand; assumptions planted to hold, and to fail."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from torch import Tensor, nn

import revprobe as rp
import tiny
from revprobe.errors import RevprobeError
from revprobe.models.rotary import UNCHECKED, Rotary
from revprobe.probes.attention import EVIDENCE_HIDDEN
from revprobe.probes.deep.assumption_frame import SAME_KEY
from revprobe.probes.deep.assumptions import ALONE, LENGTHS, NO_PLANES, ONE_SIDE
from revprobe.probes.passes.batches import make_batch, prepare_queries
from revprobe.probes.statistics.estimators import LATER_BLOCK
from revprobe.probes.theory.gradient_flow import rope_rotation
from revprobe.probes.theory.key_covariance import (
    CrossPlane,
    alignment,
    centred,
    cross_plane,
    measured_bound,
    traces,
    verdict,
    worse,
)
from revprobe.probes.theory.model_bounds import SEVERAL_TOKENS, SWAPPED, UNEQUAL
from revprobe.probes.theory.score_correlation import rope_frequencies
from tiny import FIXTURES, GROUPED, MASK, causal, in_blocks, pairs_at, text_like_pairs

radd = partial(tiny.radd, n_layers=2, n_heads=2, scale=0.3)
gpt2, llama = (partial(make, scale=0.3) for make in (tiny.gpt2, tiny.llama))
MIRRORED = partial(pairs_at, (1, 4), (7, 4), length=9)
BEFORE = partial(pairs_at, (1, 7), (3, 7), length=9)  # for causal models


def heads_of(reading: rp.Reading) -> pd.DataFrame:
    """One row per layer, head and direction."""
    rows = reading.frame.drop_duplicates(["layer", "head", "direction"])
    return rows.set_index(["layer", "head", "direction"])


# --- against loops over what the projections give, before any rotation ------------------------------------------------

PARTS = {"RADD": ("blocks.{}.attention.q_proj", "blocks.{}.attention.k_proj")}
PLAIN = ("model.layers.{}.self_attn.q_proj", "model.layers.{}.self_attn.k_proj")
NORMED = ("model.layers.{}.self_attn.q_norm", "model.layers.{}.self_attn.k_norm")
BY_HAND: dict[str, tuple[Callable[[], rp.ProbedModel], Any]] = {
    "RADD": (radd, MIRRORED),
    "LLaDA": (lambda: rp.load_model(FIXTURES / "llada-tiny"), MIRRORED),
    "Dream": (lambda: rp.load_model(FIXTURES / "dream-tiny"), partial(pairs_at, (1, 5), (7, 5), length=9)),
    "SDAR": (partial(in_blocks, scale=0.3), partial(pairs_at, (4, 5), (6, 5), length=9)),
    "Llama": (llama, BEFORE),
}


def by_hand(
    model: rp.ProbedModel, query: rp.Query, layer: int, names: tuple[str, str]
) -> tuple[np.ndarray, np.ndarray]:
    """The readout row's queries and the evidence's keys, neither turned yet. Shapes: `-> head dim, head dim`."""
    kept, handles = {}, []
    for part, name in zip("qk", names, strict=True):
        child = model.module.get_submodule(name.format(layer))
        see = lambda _, __, out, part=part: kept.update({part: out.detach().double()})  # noqa: E731
        handles.append(child.register_forward_hook(see))
    batch = make_batch(model, prepare_queries(model, [query]))
    with torch.no_grad():
        model.logits(batch.input_ids)
    for handle in handles:
        handle.remove()
    heads = getattr(model.module.config, "num_attention_heads", None) or model.module.config.n_heads
    dim = getattr(model.module.config, "head_dim", None) or model.module.config.hidden_size // heads
    q, k = (kept[part].reshape(*kept[part].shape[:2], -1, dim) for part in "qk")  # norms give heads apart already
    k = k.repeat_interleave(heads // k.shape[2], dim=2)
    return [q[0, batch.rows[0, 0]].numpy(), k[0, batch.columns[0, 0]].numpy()]


def slow(keys: list[np.ndarray], queries: list[np.ndarray], distance: float, base: float) -> dict[str, Any]:
    """One head's numbers, one fact and plane at a time. The planes are entries k and k + dim / 2."""
    facts, dim = len(keys), len(keys[0])
    planes, theta = dim // 2, base ** (-np.arange(0, dim, 2) / dim)
    apart = [key - sum(keys) / facts for key in keys]
    covariance = sum(np.outer(x, x) for x in apart)
    inside, numbers = 0.0, {}
    rho, trace, share = [], [], []
    for k in range(planes):
        at = [k, k + planes]
        inside += np.square(covariance[np.ix_(at, at)]).sum()
        trace.append(np.trace(covariance[np.ix_(at, at)]))
        along = 0.0
        for x, q in zip(apart, queries, strict=True):
            u = q[at] / np.linalg.norm(q[at])
            across = np.array([-u[1], u[0]])
            along += (x[at] @ u) ** 2 - (x[at] @ across) ** 2
        rho.append(along / trace[-1])
        share.append(np.mean([(q[at] @ q[at]) / (q @ q) for q in queries]))
    numbers["cross_share"] = 1 - inside / np.square(covariance).sum()
    numbers |= {"rho": rho, "trace": np.array(trace) / np.mean(trace), "query_share": share}
    numbers["trace_spread"] = np.std(numbers["trace"])
    squares = [sum(((q[[k, k + planes]] @ q[[k, k + planes]]) / (q @ q)) ** 2 for k in range(planes)) for q in queries]
    numbers["query_concentration"] = np.mean(squares) * (planes + 1) / 2
    mean = sum(queries) / facts
    numbers["query_mean_share"] = mean @ mean / np.mean([q @ q for q in queries])
    turned, back = (rope_rotation(dim, d, angles=theta) for d in (distance, -distance))
    exact = []
    for q in queries:
        both = q @ turned @ covariance @ back.T @ q
        exact.append(both / np.sqrt((q @ turned @ covariance @ turned.T @ q) * (q @ back @ covariance @ back.T @ q)))
    numbers["exact"] = np.mean(exact)
    numbers["bound_assumed"] = np.mean(np.cos(2 * distance * theta))
    return numbers


@pytest.mark.parametrize("name", BY_HAND)
def test_every_number_equals_plain_loops_over_the_projections(name: str) -> None:
    """Biases, q/k norms, shared keys, padded batches; a wrong row, head, plane or angle would show."""
    made, asked = BY_HAND[name]
    model, pairs = made(), asked(count=9, vocab=48)
    reading = rp.audit_assumptions(model, pairs, batch_size=4, permutations=40)
    frame = reading.frame.set_index(["layer", "head", "direction"]).sort_index()
    names = NORMED if name == "SDAR" else PARTS.get(name, PLAIN)
    config = model.module.config
    base = getattr(config, "rope_base", None) or config.rope_parameters["rope_theta"]
    distance = 0 if name == "Llama" else abs(int(pairs.offsets(model.logit_shift)[0][0]))
    for layer in (0, 1):
        vectors = {
            side: [by_hand(model, getattr(pair, side), layer, names) for pair in pairs]
            for side in ("forward", "reverse")
        }
        for head in range(len(vectors["forward"][0][0])):
            for side, found in vectors.items():
                wanted = slow([k[head] for _, k in found], [q[head] for q, _ in found], distance, base)
                rows = frame.loc[(layer, head, side)]
                for column, value in wanted.items():
                    if name == "Llama" and column in ("exact", "bound_assumed"):
                        assert rows[column].isna().all()
                        continue
                    close = {"rtol": 2e-3, "atol": 2e-5}
                    np.testing.assert_allclose(rows[column], np.broadcast_to(value, len(rows)), **close, err_msg=column)
            kf, kr = ([k[head] for _, k in vectors[side]] for side in vectors)
            kf, kr = (np.array(one) - np.mean(one, axis=0) for one in (kf, kr))
            match = (kf * kr).sum() / np.sqrt((kf**2).sum() * (kr**2).sum())
            assert frame.loc[(layer, head, "forward"), "key_match"].iloc[0] == pytest.approx(match, abs=1e-4)
            cosine = [
                f[head] @ r[head] / np.sqrt((f[head] @ f[head]) * (r[head] @ r[head]))
                for (f, _), (r, _) in zip(*vectors.values(), strict=True)
            ]
            assert frame.loc[(layer, head, "reverse"), "query_match"].iloc[0] == pytest.approx(
                np.mean(cosine), abs=1e-4
            )


def test_the_measured_bound_is_the_least_correlation_over_admissible_alignments() -> None:
    """By search over rho in the box from min(rho, 0) to 1, not by the closed form's argument."""
    rng, theta, distance = np.random.default_rng(0), rope_frequencies(8), 3.0
    q = rng.normal(size=(1, 1, 4)) + 1j * rng.normal(size=(1, 1, 4))
    adverse, trace = np.array([[-0.6, 0.0, -0.2, 0.0]]), np.array([[0.5, 1.5, 1.2, 0.8]])
    ours = measured_bound(q, adverse, trace, np.array([distance]), theta)[0, 0]
    u = np.abs(q[0, 0]) ** 2 * trace[0]
    rho = adverse[0] + (1 - adverse[0]) * np.concatenate(
        [rng.uniform(size=(4000, 4)), rng.integers(0, 2, size=(500, 4))]
    )
    cosine = np.cos(2 * distance * theta)
    every = (u * (cosine + rho)).sum(1) / (u * (1 + rho * cosine)).sum(1)
    assert ours == pytest.approx(every.min(), abs=1e-12) and (every >= ours - 1e-12).all()


def test_in_a_one_layer_model_the_exact_correlation_is_the_measured_one() -> None:
    """One query, one key for both directions: then q' R S R q is the attention probe's correlation itself."""
    model = tiny.radd(n_heads=2, d_model=16, scale=0.3)
    pairs = rp.letter_pairs(6, model=model, alphabet=20)
    mirrored = rp.letter_pairs(6, model=model, alphabet=20, placements="mirror")  # nearer offsets have more pairs
    both = heads_of(rp.audit_assumptions(model, mirrored))
    np.testing.assert_allclose(both["exact"], both["correlation"], atol=2e-5)
    reading = rp.audit_assumptions(model, pairs)
    heads = heads_of(reading)
    np.testing.assert_allclose(heads["exact"], heads["correlation"], atol=2e-5)
    np.testing.assert_allclose(heads[["key_match", "query_match", "query_mean_share"]], 1, atol=1e-5)
    plain = rp.probe_attention_correlation(model, pairs).frame
    equal = plain[plain["offset_forward"] == -plain["offset_reverse"]]
    wanted = rp.Reading("attention_correlation", equal, {}).summary(by=["layer", "head"])
    ours = heads.xs("forward", level="direction")
    for column, name in (("correlation", "value"), ("correlation_low", "low"), ("correlation_high", "high")):
        np.testing.assert_allclose(ours[column], wanted[name], atol=1e-5)
    assert reading.meta["pairs_audited"] == equal["pair"].nunique() == reading.n
    assert reading.meta["pairs_left_out"] == {UNEQUAL: len(pairs.for_probe("attention")) - reading.n}


# --- the null, by simulation ------------------------------------------------------------------------------------------


def planes(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(size=shape) + 1j * rng.normal(size=shape)


@pytest.mark.parametrize("strata", [1, 4])
def test_the_null_holds_one_head_in_twenty_outside_when_planes_are_independent(strata: int) -> None:
    """Traces unequal and blocks stretched, facts fewer than entries, centred in several strata: still 5 %."""
    rng, stratum = np.random.default_rng(0), np.arange(28) % strata
    keys = (planes(rng, 28, 800, 8).real + 0.4j * planes(rng, 28, 800, 8).real) * np.linspace(0.5, 2, 8)
    outside, over = [], []
    for part in range(8):  # each with permutations of its own
        chosen = centred(keys[:, 100 * part : 100 * part + 100], stratum)
        found = cross_plane(chosen, rope_frequencies(16), stratum, permutations=200, seed=part)
        outside.append((found.share < found.null_low) | (found.share > found.null_high))
        over.append(found.share - found.null)
    assert 0.03 < np.mean(outside) < 0.08, np.mean(outside)
    assert abs(np.mean(over)) < 4 * np.std(over) / 800**0.5


def test_the_null_equals_permutations_one_by_one() -> None:
    rng = np.random.default_rng(1)
    keys = centred(planes(rng, 15, 1, 3), np.zeros(15))
    theta = np.array([1.0, 0.1, 0.0])
    found = cross_plane(keys, theta, np.zeros(15), permutations=2000, seed=0)
    slow_null = []
    for _ in range(2000):
        columns = []
        for k in range(3):
            order = rng.permutation(15)
            columns += [keys[order, 0, k].real, keys[order, 0, k].imag]
        covariance = np.cov(np.array(columns), bias=True)
        inside = sum(np.square(covariance[2 * k : 2 * k + 2, 2 * k : 2 * k + 2]).sum() for k in range(3))
        slow_null.append(1 - inside / np.square(covariance).sum())
    assert found.null[0] == pytest.approx(np.mean(slow_null), abs=4 * np.std(slow_null) / 2000**0.5)
    edges = np.percentile(slow_null, [2.5, 97.5])
    np.testing.assert_allclose([found.null_low[0], found.null_high[0]], edges, atol=0.02)


def test_the_interval_is_the_jackknife_of_the_share() -> None:
    rng, theta = np.random.default_rng(2), np.array([1.0, 0.3, 0.0, 0.0])
    keys = planes(rng, 12, 1, 4)
    found = cross_plane(keys, theta, np.zeros(12), permutations=0, seed=0)

    def share(some: np.ndarray) -> float:
        real = np.array([[part for z in row for part in (z.real, z.imag)] for row in some[:, 0]])
        covariance = real.T @ real
        blocks = [slice(0, 2), slice(2, 4), slice(4, 8)]  # the planes that do not turn are one
        return 1 - sum(np.square(covariance[b, b]).sum() for b in blocks) / np.square(covariance).sum()

    without = np.array([share(np.delete(keys, fact, axis=0)) for fact in range(12)])
    width = 2.200985 * np.sqrt(11 / 12 * np.square(without - without.mean()).sum())
    assert found.share[0] == pytest.approx(share(keys))
    edges = max(share(keys) - width, 0.0), min(share(keys) + width, 1.0)
    assert (found.low[0], found.high[0]) == pytest.approx(edges, rel=1e-5) and edges[1] < 1


def test_intervals_of_alignment_and_trace_hold_the_truth() -> None:
    rng, facts = np.random.default_rng(3), 60
    q = np.exp(1j * rng.uniform(size=(1, 400, 4)))
    along = np.sqrt([1.4, 1.0, 0.7, 1.0]) * rng.normal(size=(facts, 400, 4))
    across = np.sqrt([0.6, 1.0, 1.3, 1.0]) * rng.normal(size=(facts, 400, 4))
    scale = np.sqrt([0.5, 1.0, 1.5, 1.0])
    keys = (along + 1j * across) * q * scale
    truth = {"rho": [0.4, 0.0, -0.3, 0.0], "trace": [0.5, 1.0, 1.5, 1.0]}
    for name, found in (("rho", alignment(keys, np.broadcast_to(q**2, keys.shape))), ("trace", traces(keys))):
        value, low, high = found
        np.testing.assert_allclose(value.mean(0), truth[name], atol=0.03)
        covered = ((low <= truth[name]) & (high >= truth[name])).mean(0)
        assert ((covered > 0.91) & (covered < 0.995)).all(), (name, covered)


# --- planted in a model ----------------------------------------------------------------------------------------------


class Planted(nn.Module):
    """One layer, one head: keys by token, queries by the token and the first one of the sequence, turned by RoPE."""

    def __init__(self, keys: np.ndarray, queries: np.ndarray, vocab: int) -> None:
        super().__init__()
        self.dim, facts = keys.shape[1], len(keys)
        self.embed = nn.Embedding.from_pretrained(
            0.5 * torch.randn(vocab, 3 * self.dim, generator=torch.Generator().manual_seed(0))
        )
        query, key, _ = self.embed.weight.split(self.dim, dim=-1)
        query[:facts] = torch.tensor(queries, dtype=torch.float32)
        key[facts : 2 * facts] = torch.tensor(keys, dtype=torch.float32)
        query[3 * facts] = 0.0  # the mask: there the query is the first token's alone
        self.out = nn.Linear(self.dim, vocab, bias=False)
        self.register_buffer("inv_freq", torch.tensor(rope_frequencies(self.dim), dtype=torch.float32))

    def turned(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[1])[:, None] * self.inv_freq
        first, second = x.chunk(2, dim=-1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)[:, None]

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        query, key, value = self.embed(input_ids).split(self.dim, dim=-1)
        query, key = self.turned(query + query[:, :1]), self.turned(key)
        return self.out(nn.functional.scaled_dot_product_attention(query, key, value[:, None])[:, 0])


def planted(keys: np.ndarray, queries: np.ndarray) -> tuple[rp.ProbedModel, rp.ReversalPairs]:
    """A model with these keys and queries (`fact plane`, complex), and pairs at distance 2 on either side."""
    facts = len(keys)
    vocab, mask = 3 * facts + 2, 3 * facts
    spread = lambda z: np.concatenate([z.real, z.imag], axis=1)  # noqa: E731
    module = Planted(spread(keys), spread(queries), vocab).eval()
    model = rp.ProbedModel(module, objective="masked", mask_token_id=mask, logit_shift=0)
    pairs = []
    for fact in range(facts):
        target, evidence, filler = 2 * facts + fact, facts + fact, 3 * facts + 1
        queries_ = (
            rp.Query([fact, filler, filler, target, filler, evidence], [3], [5]),
            rp.Query([fact, evidence, filler, target, filler, filler], [3], [1]),
        )
        pairs.append(rp.ReversalPair(*queries_, fact=str(fact)))
    return model, rp.ReversalPairs.from_pairs(pairs)


def audited(keys: np.ndarray, queries: np.ndarray) -> pd.Series:
    reading = rp.audit_assumptions(*planted(keys, queries))
    found = heads_of(reading)
    assert len(found) == 2 and found["verdict"].nunique() == 1
    return found.iloc[0]


def test_keys_that_satisfy_the_assumption_hold() -> None:
    """In all but the few draws that the null's 95 % leaves out; this is not one head that was picked."""
    draws = [np.random.default_rng(seed) for seed in range(10)]
    every = [audited(planes(rng, 200, 8), planes(rng, 200, 8)) for rng in draws]
    kept = [found for found in every if found["verdict"] == "holds"]
    assert len(kept) >= 8
    found = kept[0]
    assert found["why"] == "" and found["correlation"] == pytest.approx(found["exact"], abs=0.1)
    assert found["null_low"] <= found["cross_share"] <= found["null_high"]
    assert found["bound_measured"] == pytest.approx(found["bound_assumed"], abs=0.05)
    assert found["bound_assumed"] == pytest.approx(rp.rope_correlation_bound(16, 2))
    assert found["query_concentration"] == pytest.approx(1, abs=0.15) and found["query_mean_share"] < 0.03


def test_covariance_across_planes_fails() -> None:
    rng = np.random.default_rng(6)
    keys = planes(rng, 200, 8)
    keys[:, 1::2] = 0.7 * keys[:, 1::2] + 0.7 * keys[:, ::2]
    found = audited(keys, planes(rng, 200, 8))
    assert found["verdict"] == "fails" and found["why"] == "cross-plane covariance above the null"
    assert found["cross_share"] > found["null_high"] + 0.05


def test_keys_across_the_query_lower_the_bound_and_those_along_it_do_not() -> None:
    rng = np.random.default_rng(7)
    queries = planes(rng, 200, 8)
    unit = queries / np.abs(queries)
    free = rng.normal(size=(2, 200, 8))
    adverse = audited((0.3 * free[0] + 1j * free[1]) * unit, queries)
    aligned = audited((free[0] + 0.3j * free[1]) * unit, queries)
    assert adverse["verdict"] == "fails" and adverse["why"].startswith("the bound moves by -0.")
    assert adverse["bound_measured"] < adverse["bound_assumed"] - 0.2
    assert aligned["verdict"] == "holds", "rho in [0, 1] is what the assumption allows"


def test_unequal_traces_and_one_sided_queries_move_the_bound() -> None:
    rng = np.random.default_rng(8)
    loud = np.r_[6.0, np.ones(7)]
    for keys, queries in (
        (planes(rng, 200, 8) * loud, planes(rng, 200, 8)),
        (planes(rng, 200, 8), planes(rng, 200, 8) * loud),
    ):
        found = audited(keys, queries)
        assert found["verdict"] == "fails" and "the bound moves by -" in found["why"]
    assert found["query_concentration"] > 2


def test_few_facts_cannot_tell_whatever_they_show() -> None:
    rng = np.random.default_rng(9)
    keys = planes(rng, 31, 8)
    keys[:, 1:] = keys[:, :1]
    found = audited(keys, planes(rng, 31, 8))
    assert found["verdict"] == "cannot tell" and found["facts_needed"] == 32 and "31 facts" in found["why"]
    assert found["cross_share"] > found["null_high"], "the numbers stand all the same"
    assert audited(np.concatenate([keys, keys[:1]]), planes(rng, 32, 8))["verdict"] == "fails"


def test_the_verdict_follows_its_rule() -> None:
    share = np.array([0.2, 0.31, 0.09, 0.2, 0.2])
    edges = np.full((5, 5), 0.2), np.full(5, 0.1), np.full(5, 0.3)
    cross = CrossPlane(share, *edges[0][:3], edges[1], edges[2])
    measured = np.array([0.549, 0.5, 0.5, 0.551, np.nan])
    found, why = verdict(cross, np.full(5, 0.5), measured, 16, 8)
    assert found.tolist() == ["holds", "fails", "fails", "fails", "fails"]
    assert [word.split(";")[0] for word in why[1:4]] == [
        "cross-plane covariance above the null",
        "cross-plane covariance below the null",
        "the bound moves by +0.051",
    ]
    assert set(verdict(cross, np.full(5, 0.5), measured, 15, 8)[0]) == {"cannot tell"}
    one = np.array(["holds", "holds", "fails", "holds", None], dtype=object)
    other = np.array(["holds", "fails", "cannot tell", None, "fails"], dtype=object)
    assert worse(one, other).tolist() == worse(other, one).tolist() == ["holds", "fails", "cannot tell", None, None]


# --- families, kinds of pairs, and what is undefined ----------------------------------------------------------------

FAMILIES: dict[str, tuple[Callable[[], rp.ProbedModel], Callable[[], rp.ReversalPairs], str, str]] = {
    "RADD": (radd, partial(MIRRORED, count=40), "", ""),
    "RADD, ALiBi": (lambda: radd("alibi"), MIRRORED, NO_PLANES, NO_PLANES),
    "LLaDA": (BY_HAND["LLaDA"][0], partial(MIRRORED, ragged=True), "", ""),
    "Dream": (BY_HAND["Dream"][0], partial(pairs_at, (1, 5), (7, 5), length=9), "", ""),
    "GPT-2": (gpt2, BEFORE, UNCHECKED, UNCHECKED),
    "Llama": (llama, BEFORE, "", ONE_SIDE),
    "SDAR": (in_blocks, partial(pairs_at, (4, 5), (6, 5), length=9), "", ""),
    "SDAR, a later block": (in_blocks, partial(pairs_at, (9, 4), (4, 9), length=12), LATER_BLOCK, LATER_BLOCK),
    "several tokens": (radd, lambda: several_tokens(), "", SEVERAL_TOKENS),
    "texts": (llama, text_like_pairs, "", ONE_SIDE),
    "unequal distances": (radd, partial(pairs_at, (1, 4), (6, 4)), "", UNEQUAL),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_audited_and_nothing_is_undefined_without_a_reason(name: str) -> None:
    made, asked, reason, reason_bound = FAMILIES[name]
    reading = rp.audit_assumptions(made(), asked(), permutations=40)
    frame = reading.frame
    assert len(frame) and (frame["cross_share"].isna() == (frame["reason"] != "")).all()
    assert (frame["verdict"].isna() == (frame["reason_bound"] != "")).all()
    assert (frame["bound_assumed"].isna() == (frame["reason_bound"] != "")).all()
    for column, words in (("reason", reason), ("reason_bound", reason_bound)):
        assert all(str(found).startswith(words) for found in frame[column]), set(frame[column])
    assert bool(reading.undefined) == bool(reason) and np.isnan(reading.value) == bool(reason)
    assert (frame["plane"].isna() == frame["rho"].isna()).all()
    if name in ("RADD, ALiBi", "GPT-2"):
        assert frame["correlation"].notna().all(), "scores there are, planes there are none"
    assert reading.plot().to_json() and reading.plot(kind="planes").to_json()


def several_tokens() -> rp.ReversalPairs:
    """Evidence of two tokens on either side of the target, facts at one place each."""
    generator, pairs = torch.Generator().manual_seed(3), []
    for fact in range(9):
        target, *evidence = torch.randperm(50, generator=generator)[:3].tolist()
        queries = rp.Query([1, target, *evidence], [1], [2, 3]), rp.Query([*evidence, 4, target], [3], [0, 1])
        pairs.append(rp.ReversalPair(*queries, fact=str(fact)))
    return rp.ReversalPairs.from_pairs(pairs)


def test_pairs_of_letters_that_swap_roles_have_no_bound_and_no_verdict() -> None:
    for model in (llama(), radd()):
        pairs = rp.letter_pairs(6, model=model, alphabet=12)
        if model.objective == "masked":
            swapped = [(rp.Query([n, 1, 30 + n], [0], [2]), rp.Query([n, 1, 30 + n], [2], [0])) for n in range(12)]
            made = [rp.ReversalPair(*both, kind="swapped", fact=str(n)) for n, both in enumerate(swapped)]
            pairs = rp.ReversalPairs.from_pairs(made)
        frame = rp.audit_assumptions(model, pairs, permutations=40).frame
        assert set(frame["reason_bound"]) == {ONE_SIDE if model.objective == "causal" else SWAPPED}
        assert frame["verdict"].isna().all() and frame["cross_share"].notna().all()


def test_scaled_and_partial_rotations_are_turned_back_by_the_models_own_angles() -> None:
    """The same evidence at two places has one key in the first layer, whatever scales or splits the rotation."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}
    partly = transformers.StableLmConfig(**{**GROUPED, "partial_rotary_factor": 0.5})
    for config in (transformers.LlamaConfig(**GROUPED, rope_parameters=yarn), partly):
        reading = rp.audit_assumptions(causal(config, scale=0.3), BEFORE(count=20), layers=[0])
        first = heads_of(reading)
        np.testing.assert_allclose(first["key_match"], 1, atol=1e-5)
        assert (reading.frame["frequency"] == 0).any() == (config is partly)


def test_angles_that_depend_on_the_length_are_turned_back_for_queries_of_one_length_only() -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0], "factor": 4.0}
    longrope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 11, **factors}
    model = causal(transformers.LlamaConfig(**GROUPED, rope_parameters=longrope), scale=0.3)
    for length in (11, 12):
        even = rp.audit_assumptions(model, pairs_at((1, 9), (3, 9), length=length, count=20), layers=[0])
        assert even.frame["reason"].eq("").all()
        np.testing.assert_allclose(even.frame["key_match"], 1, atol=1e-5)
    uneven = pairs_at((1, 9), (3, 9), length=12, count=20, ragged=True)
    odd = rp.audit_assumptions(model, uneven, layers=[0]).frame
    assert set(odd["reason"]) == {LENGTHS} and odd["cross_share"].isna().all()


def windowed() -> rp.ProbedModel:
    """Two layers, of which the second sees three tokens to each side."""
    window = {"global_attn_every_n_layers": 2, "local_attention": 6, "cls_token_id": 54, "sep_token_id": 54}
    config = transformers.ModernBertConfig(**tiny.SIZES, **window)
    module = tiny.drawn(lambda: tiny.language_model(config, "masked"), scale=0.3)
    return rp.ProbedModel(module, rp.letter_tokenizer(), objective="masked", mask_token_id=MASK)


def test_a_layer_is_audited_on_the_pairs_whose_evidence_its_mask_shows() -> None:
    """What it would make of a key that it never meets is no finding."""
    model, count = windowed(), 12
    near, far = (
        [
            rp.ReversalPair(
                rp.Query([7, *[1] * 6, 40 + fact, *[1] * apart, 10 + fact, *[2] * (9 - apart)], [7], [8 + apart]),
                rp.Query([7, *[2] * (9 - apart), 10 + fact, *[1] * apart, 40 + fact, *[1] * 6], [11], [10 - apart]),
                fact=str(fact),
            )
            for fact in range(count)
        ]
        for apart in (1, 6)
    )
    audit = partial(rp.audit_assumptions, model, permutations=40, seed=3)
    both, of_near, of_far = (audit(rp.ReversalPairs.from_pairs(some)) for some in ([*near, *far], near, far))
    second = [reading.frame[reading.frame["layer"] == 1].reset_index(drop=True) for reading in (both, of_near, of_far)]
    pd.testing.assert_frame_equal(second[0], second[1], check_categorical=False)
    assert second[1]["reason"].eq("").all() and second[1]["correlation"].notna().all()
    assert second[2]["reason"].eq(EVIDENCE_HIDDEN).all() and second[2]["pairs"].eq(0).all()
    assert second[2][["cross_share", "correlation", "bound_assumed"]].isna().all(axis=None)
    assert second[2]["verdict"].isna().all()
    first = both.frame[both.frame["layer"] == 0]
    assert first["pairs"].eq(2 * count).all() and first["correlation"].notna().all()
    assert both.meta["pairs_hidden"] == of_far.meta["pairs_hidden"] == {"1": count}
    assert of_near.meta["pairs_hidden"] == {}
    # The attention probe finds the same of them, head by head.
    probed = rp.probe_attention_correlation(model, rp.ReversalPairs.from_pairs([*near, *far]))
    seen = probed.summary(by=["layer", "head"])
    wanted = heads_of(both)["correlation"].xs("forward", level="direction")
    found = seen.set_index(["layer", "head"])["value"].loc[wanted.index]
    np.testing.assert_allclose(wanted, found, atol=1e-6)


def test_partial_rotation_is_read_as_one_still_block() -> None:
    """Covariance among entries that no angle tells apart does not cross planes."""
    rng = np.random.default_rng(0)
    keys = planes(rng, 300, 1, 4)
    keys[:, :, 3] = keys[:, :, 2]
    moving = cross_plane(keys, np.array([1.0, 0.5, 0.2, 0.1]), np.zeros(300), permutations=40, seed=0)
    still = cross_plane(keys, np.array([1.0, 0.5, 0.0, 0.0]), np.zeros(300), permutations=40, seed=0)
    assert moving.share[0] > 0.3 > 0.05 > still.share[0]


def test_turning_back_undoes_the_rotation() -> None:
    rng = np.random.default_rng(0)
    for interleaved, start in ((False, 0), (True, 4), (False, 4)):
        rotary = Rotary(np.array([1.0, 0.1]), 8, start=start, interleaved=interleaved)
        key = rng.normal(size=8)
        there = rotary.turned_back(rotary.rotation(7) @ key, np.array(7))
        np.testing.assert_allclose(there, rotary.turned_back(key, np.array(0)), atol=1e-12)
        first, second = rotary.entries.T
        np.testing.assert_allclose(there, key[first] + 1j * key[second], atol=1e-12)


def test_facts_asked_elsewhere_are_compared_among_themselves() -> None:
    """Two layouts make two strata; a fact alone in its layout is left out, and counted."""
    both = [
        *MIRRORED(count=12),
        *pairs_at((2, 4), (6, 4), length=9, count=8),
        *pairs_at((3, 4), (5, 4), length=9, count=1),
    ]
    renamed = [rp.ReversalPair(one.forward, one.reverse, fact=str(n)) for n, one in enumerate(both)]
    reading = rp.audit_assumptions(radd(), rp.ReversalPairs.from_pairs(renamed), permutations=40)
    assert reading.meta["strata"] == 2 and reading.facts == 20 and reading.meta["pairs_left_out"] == {ALONE: 1}
    assert reading.frame["facts_needed"].iloc[0] == 16 and set(reading.frame["verdict"]) <= {"holds", "fails"}


def test_keys_that_do_not_vary_are_undefined() -> None:
    pairs = [
        rp.ReversalPair(rp.Query([f, 40, 2, t], [3], [1]), rp.Query([f, 2, 3, t, 4, 40], [3], [5]), fact=str(f))
        for f, t in zip(range(10), range(20, 30), strict=True)
    ]
    reading = rp.audit_assumptions(radd(), rp.ReversalPairs.from_pairs(pairs), permutations=40)
    first = reading.frame[reading.frame["layer"] == 0]
    assert set(first["reason"]) == {SAME_KEY} and first["cross_share"].isna().all() and first["verdict"].isna().all()
    assert reading.frame.loc[reading.frame["layer"] == 1, "cross_share"].notna().all()


def test_options_and_errors() -> None:
    model, pairs = radd(), MIRRORED(count=12)
    whole = rp.audit_assumptions(model, pairs, permutations=40)
    some = rp.audit_assumptions(model, pairs, permutations=40, layers=[1], batch_size=5)
    kept = whole.frame[whole.frame["layer"] == 1].reset_index(drop=True)
    numbers = kept.select_dtypes("float").columns
    np.testing.assert_allclose(some.frame[numbers], kept[numbers], atol=1e-4)
    done: list[tuple[int, int]] = []
    rp.audit_assumptions(model, pairs, permutations=40, batch_size=20, progress=lambda *at: done.append(at))
    assert done == [(20, 24), (24, 24)]
    for permutations in (0, 39, 2.5):
        with pytest.raises(RevprobeError, match="whole number"):
            rp.audit_assumptions(model, pairs, permutations=permutations)  # type: ignore[arg-type]
    with pytest.raises(RevprobeError, match="no layer 9 to audit"):
        rp.audit_assumptions(model, pairs, layers=[9])
    with pytest.raises(RevprobeError, match="no scaled_dot_product_attention call was seen"):
        rp.audit_assumptions(llama("eager"), BEFORE())


def test_a_model_that_cannot_be_read_is_refused_with_what_helps() -> None:
    bridge = rp.ProbedModel(radd().to_bridge(), objective="masked", mask_token_id=MASK, logit_shift=0)
    with pytest.raises(RevprobeError, match="a TransformerLens bridge makes none; ask the model it was made from"):
        rp.audit_assumptions(bridge, MIRRORED(count=2))
    config = transformers.GPTJConfig(vocab_size=60, n_embd=16, n_layer=2, n_head=2, rotary_dim=4, n_positions=32)
    with pytest.raises(RevprobeError, match="multiplies queries and keys itself") as caught:
        rp.audit_assumptions(causal(config), BEFORE())
    assert "sdpa'" not in str(caught.value), "GPT-J has no such implementation to load"


def test_logits_that_are_not_numbers_are_an_error_and_no_reading() -> None:
    model = radd()
    with torch.no_grad():
        next(p for name, p in model.module.named_parameters() if "embed" in name).fill_(torch.nan)
    with pytest.raises(RevprobeError, match=r"NaN|not finite|non-finite"):
        rp.audit_assumptions(model, MIRRORED(count=2))


def test_bfloat16_is_close() -> None:
    numbers = [
        rp.audit_assumptions(tiny.radd(scale=0.3, dtype=dtype), MIRRORED(count=20), permutations=40).value
        for dtype in (None, torch.bfloat16)
    ]
    assert numbers[1] == pytest.approx(numbers[0], rel=0.05)


def test_no_trace_is_left() -> None:
    model = radd()
    before, random = {k: v.clone() for k, v in model.module.state_dict().items()}, torch.get_rng_state()
    model.module.train()
    rp.audit_assumptions(model, MIRRORED(), permutations=40)
    assert model.module.training and torch.equal(random, torch.get_rng_state())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())


def test_the_reading_survives_a_file_and_is_drawn(tmp_path: Path) -> None:
    reading = rp.audit_assumptions(radd(), MIRRORED(count=40))
    again = rp.Reading.load(reading.save(tmp_path / "audit.parquet"))
    pd.testing.assert_frame_equal(again.frame, reading.frame, check_dtype=False, check_categorical=False)
    assert (again.value, again.interval, again.control) == (reading.value, reading.interval, reading.control)
    assert again.plot().to_json() == reading.plot().to_json()
    table = reading.summary(by=["layer", "head"])
    assert len(table) == 4 and table["control"].notna().all() and reading.excess is not None
    one = heads_of(reading).loc[(1, 0)]
    row = table[(table["layer"] == 1) & (table["head"] == 0)].iloc[0]
    for column, mean in (("value", "cross_share"), ("low", "cross_low"), ("control_high", "null_high")):
        assert row[column] == pytest.approx(one[mean].mean())
    maps = [trace for trace in reading.plot(theme="dark").data if trace.type == "heatmap"]
    over = one["cross_share"].mean() - one["null"].mean()
    assert maps[1].z[1][0] == pytest.approx(over)
    counts = reading.frame.drop_duplicates(["layer", "head"])["verdict"].value_counts()
    assert {trace.name for trace in reading.plot().data} >= {f"fails: {counts.get('fails', 0)}"}
    drawn = reading.plot(kind="planes", layer=1, head=1).data[0]
    rows = reading.frame.set_index(["layer", "head", "direction"]).sort_index().loc[(1, 1, "forward")]
    np.testing.assert_allclose(drawn.y, rows["rho"])
    for options, words in (
        ({"kind": "head"}, "assumption plot of kind 'head'"),
        ({"layer": 0}, "has no say at kind='heads'"),
        ({"kind": "planes", "layer": 7}, "no layer 7 in this reading"),
    ):
        with pytest.raises(RevprobeError, match=words):
            reading.plot(**options)
