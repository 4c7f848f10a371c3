"""Causal traces against hooks by hand, TransformerLens and a slow loop over denoising steps; a head planted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from long_cases import rest_long
from torch import Tensor, nn

import revprobe as rp
import tiny
from revprobe.errors import RevprobeError
from revprobe.hooks.state_survey import NO_ATTENTION, NO_HEADS
from revprobe.probes.decoding.decode import decode_tokens
from revprobe.probes.decoding.forced import forced_steps
from revprobe.probes.decoding.masked import Prompt, unmasking
from revprobe.probes.deep import causal_trace
from revprobe.probes.deep.other_evidence import other_evidence
from revprobe.probes.deep.trace_frame import (
    NO_OTHER,
    NO_PART,
    NO_THIRD,
    TOO_CLOSE,
    ZERO_CLEAN,
    ZERO_CONTROL,
    ZERO_CORRUPTED,
    ZERO_PATCHED,
    Entry,
    trace_frame,
)
from revprobe.probes.passes import state_runs
from revprobe.probes.statistics.causal_trace import place_means
from revprobe.probes.statistics.estimators import LATER_BLOCK
from revprobe.probes.statistics.resampling import kin
from tiny import FIXTURES, GROUPED, causal, in_blocks, pairs_at, radd

SITES = ("residual", "attention", "mlp", "head")
PARTS = ("target", "evidence", "template", "all")
gpt2, llama = (partial(make, scale=0.3) for make in (tiny.gpt2, tiny.llama))
MODELS: dict[str, Callable[[], rp.ProbedModel]] = {
    "RADD": lambda: radd(n_layers=2, n_heads=2, scale=0.3),
    "LLaDA": lambda: rp.load_model(FIXTURES / "llada-tiny"),
    "Dream": lambda: rp.load_model(FIXTURES / "dream-tiny"),
    "GPT-2": gpt2,
    "Llama": llama,
    "SDAR": lambda: in_blocks(8, scale=0.3),
}


def wordy(*, targets: int = 2, evidence: int = 2, count: int = 4, kind: str = "same_target") -> rp.ReversalPairs:
    """Pairs of one group whose queries differ in length, evidence before the target, several tokens of each."""
    draw = torch.Generator().manual_seed(1)
    pairs = []
    for fact in range(count):
        ids = torch.randperm(50, generator=draw)[: targets + evidence + 8].tolist()
        target, known, rest = ids[:targets], ids[targets : targets + evidence], ids[targets + evidence :]
        queries = []
        for direction in range(2):
            asked, given = (known, target) if kind == "swapped" and direction else (target, known)
            tokens = [*rest[:2], *given, rest[2 + direction], *asked, *rest[4 : 5 + (fact + direction) % 3]]
            start = 3 + len(given)
            queries.append(rp.Query(tokens, range(start, start + len(asked)), range(2, 2 + len(given))))
        pairs.append(rp.ReversalPair(*queries, kind=kind, fact=str(fact)))
    return rp.ReversalPairs.from_pairs(pairs)


# --- slow references ------------------------------------------------------------------------------------------------


def modules_of(model: rp.ProbedModel, site: str, layer: int) -> nn.Module:
    """Where a state lies in transformers' own Llama classes, named by hand."""
    block = model.module.model.layers[layer]
    return {"residual": block, "attention": block.self_attn.o_proj, "mlp": block.mlp, "head": block.self_attn.o_proj}[
        site
    ]


@contextmanager
def hooked(module: nn.Module, site: str, change: Callable[[Tensor], Tensor]) -> Any:
    """A hook of this test's own at what a module returns, or what the projection of heads is given."""

    def given(_: nn.Module, args: Any) -> Any:
        return (change(args[0]), *args[1:])

    def returned(_: nn.Module, __: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    handle = module.register_forward_pre_hook(given) if site == "head" else module.register_forward_hook(returned)
    try:
        yield
    finally:
        handle.remove()


def conditionals(model: rp.ProbedModel, query: rp.Query, mode: str) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """What is run for one query: (ids shown, (readout row, token) pairs read)."""
    ids, shift = list(query.token_ids), model.logit_shift
    reads = [(p - shift, ids[p]) for p in query.target_positions]
    hide = lambda hidden: [model.mask_token_id if p in hidden else t for p, t in enumerate(ids)]  # noqa: E731
    if mode == "parallel":
        return [(hide(query.target_positions), reads)]
    return [(hide(query.target_positions[k:]), [read]) for k, read in enumerate(reads)]


def swapped_in(ids: Sequence[int], query: rp.Query, evidence: Sequence[int]) -> list[int]:
    given = dict(zip(query.evidence_positions, evidence, strict=True))
    return [given.get(p, token) for p, token in enumerate(ids)]


def priced(model: rp.ProbedModel, ids: Sequence[int], reads: Sequence[tuple[int, int]]) -> float:
    with torch.no_grad():
        logits = model.logits(torch.tensor([ids]))[0].double().log_softmax(-1)
    return sum(float(logits[row, token]) for row, token in reads)


def patched_by_hand(
    model: rp.ProbedModel,
    shown: tuple[Sequence[int], Sequence[int]],
    reads: Sequence[tuple[int, int]],
    at: Sequence[int],
    site: str,
    layer: int,
    head: int | None,
) -> float:
    """log P in the second sequence with the first one's state at `at`, each run alone."""
    module, kept = modules_of(model, site, layer), {}

    def keep(state: Tensor) -> Tensor:
        kept["state"] = state.clone()
        return state

    def put(state: Tensor) -> Tensor:
        changed = state.clone()
        width = state.shape[-1] // 4
        features = slice(None) if head is None else slice(head * width, (head + 1) * width)
        for position in at:
            changed[:, position, features] = kept["state"][:, position, features]
        return changed

    with hooked(module, site, keep):
        priced(model, shown[0], reads)
    with hooked(module, site, put):
        return priced(model, shown[1], reads)


def positions_by_hand(query: rp.Query, reads: Sequence[tuple[int, int]], part: str) -> list[int]:
    rows, evidence = {row for row, _ in reads}, set(query.evidence_positions)
    everything = set(range(len(query.token_ids)))
    named = {"target": rows, "evidence": evidence, "template": everything - rows - evidence, "all": everything}
    return sorted(named[part])


@pytest.mark.parametrize("mode", ["chain", "parallel"])
@pytest.mark.parametrize("site", rest_long(SITES))
@pytest.mark.parametrize("name", ["LLaDA", "Dream"])
def test_a_trace_equals_hooks_by_hand(name: str, site: str, mode: str) -> None:
    """Every layer, head and part of padded queries with targets and evidence of two tokens, and the control."""
    model, pairs = MODELS[name](), wordy()
    reading = rp.probe_causal_trace(model, pairs, site=site, positions=PARTS, mode=mode, batch_size=7, layers=[0, 1])
    other, third = other_evidence(pairs, model.logit_shift)
    assert (other >= 0).all() and (third >= 0).all()
    for row in reading.frame[reading.frame["pair"] == 1].to_dict("records"):
        pair, direction = row["pair"], row["direction"]
        query = getattr(pairs[pair], direction)
        given = [getattr(pairs[int(one[pair])], direction).evidence for one in (other, third)]
        head = None if pd.isna(row["head"]) else row["head"]
        clean = corrupted = own = control = 0.0
        for ids, reads in conditionals(model, query, mode):
            wrong, thirds = (swapped_in(ids, query, evidence) for evidence in given)
            at = positions_by_hand(query, reads, row["part"])
            clean, corrupted = clean + priced(model, ids, reads), corrupted + priced(model, wrong, reads)
            own += patched_by_hand(model, (ids, wrong), reads, at, site, row["layer"], head)
            control += patched_by_hand(model, (thirds, wrong), reads, at, site, row["layer"], head)
        assert row["log_probability"] == pytest.approx(clean, abs=1e-5)
        assert row["log_probability_corrupted"] == pytest.approx(corrupted, abs=1e-5)
        assert row["effect"] == pytest.approx(own - corrupted, abs=2e-5)
        assert row["effect_control"] == pytest.approx(control - corrupted, abs=2e-5)
        if abs(clean - corrupted) >= 0.5:
            assert row["share"] == pytest.approx((own - corrupted) / (clean - corrupted), abs=1e-4)
        else:
            assert np.isnan(row["share"]) and row["reason_share"] == TOO_CLOSE
    assert reading.frame["effect"].abs().max() > 0.01


LENS = {
    "residual": "blocks.{}.hook_resid_post",
    "attention": "blocks.{}.hook_attn_out",
    "mlp": "blocks.{}.hook_mlp_out",
    "head": "blocks.{}.attn.hook_z",
}


def put_in(state: Tensor, hook: Any, *, cache: Any, at: Sequence[int], head: int | None) -> Tensor:
    """A hook for TransformerLens: the cached state at some positions, of one head (of 8 features) or of all."""
    wide = lambda one: one.reshape(*one.shape[:2], -1, 8 if head is not None else state.shape[-1])  # noqa: E731
    changed, kept = wide(state).clone(), wide(cache[hook.name])
    changed[:, at, head or 0] = kept[:, at, head or 0]
    return changed.reshape(state.shape)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
def test_activation_patching_of_transformer_lens_gives_the_same(name: str, site: str) -> None:
    model, pairs = MODELS[name](), wordy(evidence=1)
    bridge = model.to_bridge()
    reading = rp.probe_causal_trace(model, pairs, site=site, positions=PARTS, layers=[0, 1], control=False)
    other, _ = other_evidence(pairs, model.logit_shift)
    for row in reading.frame[reading.frame["pair"] == 1].to_dict("records"):
        query = getattr(pairs[row["pair"]], row["direction"])
        ids = list(query.token_ids)
        reads = [(p - 1, ids[p]) for p in query.target_positions]
        wrong = swapped_in(ids, query, getattr(pairs[int(other[row["pair"]])], row["direction"]).evidence)
        at = positions_by_hand(query, reads, row["part"])
        with torch.no_grad():
            _, cache = bridge.run_with_cache(torch.tensor([ids]))
            put = partial(put_in, cache=cache, at=at, head=None if pd.isna(row["head"]) else row["head"])
            hooks = [(LENS[site].format(row["layer"]), put)]
            logits = bridge.run_with_hooks(torch.tensor([wrong]), fwd_hooks=hooks)[0].double().log_softmax(-1)
        found = sum(float(logits[place, token]) for place, token in reads)
        assert row["log_probability_patched"] == pytest.approx(found, abs=1e-5), row
    assert reading.frame["effect"].abs().max() > 0.01


# --- identities -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["same_target", "swapped"])
@pytest.mark.parametrize("name", MODELS)
def test_everything_put_back_restores_everything_and_so_does_the_last_row(name: str, kind: str) -> None:
    """Identities, no findings: the whole stream at any layer, the evidence's embedding, the last layer's own row."""
    model, pairs = MODELS[name](), wordy(kind=kind, count=5)
    reading = rp.probe_causal_trace(model, pairs, positions=PARTS)
    frame = reading.frame[reading.frame["reason"] == ""]
    assert {*frame["layer"]} == {-1, 0, 1}
    whole = frame["log_probability"] - frame["log_probability_corrupted"]
    everything = (frame["part"] == "all") | ((frame["part"] == "evidence") & (frame["layer"] == -1))
    everything |= (frame["part"] == "target") & (frame["layer"] == 1)
    assert np.allclose(frame.loc[everything, "effect"], whole[everything], atol=1e-4)
    shares = frame.loc[everything, "share"].dropna()
    assert np.allclose(shares, 1.0, atol=1e-3) and (frame["share"].notna() == (whole.abs() >= 0.5)).all()
    beside = frame[(frame["layer"] == 1) & frame["part"].isin(["evidence", "template"])]
    assert np.allclose(beside["effect"], 0.0, atol=1e-4), "behind the last layer only the row is read"


def test_bfloat16_restores_as_well() -> None:
    model = rp.ProbedModel(llama().module.to(torch.bfloat16), rp.letter_tokenizer(), objective="causal")
    frame = rp.probe_causal_trace(model, wordy(), positions="all").frame
    assert np.allclose(frame["effect"], frame["log_probability"] - frame["log_probability_corrupted"], atol=0.05)


# --- planted --------------------------------------------------------------------------------------------------------


def test_the_wired_head_and_the_copying_layer_are_found() -> None:
    model, pairs = tiny.wired()
    heads = rp.probe_causal_trace(model, pairs, site="head")
    means = place_means(heads.frame, ["layer", "head", "part"], "effect").set_index(["layer", "head", "part"])["value"]
    assert means[1, 0, "target"] > 3.0
    assert np.allclose(means.drop((1, 0, "target")), 0.0, atol=1e-5)
    assert place_means(heads.frame, ["layer", "head", "part"], "share").set_index(["layer", "head", "part"])["value"][
        1, 0, "target"
    ] == pytest.approx(1.0, abs=1e-4)
    control = place_means(heads.frame, ["layer", "head", "part"], "effect_control")["value"]
    assert control.max() < 0.5, "a third fact's state brings another answer"
    stream = rp.probe_causal_trace(model, pairs)
    shares = place_means(stream.frame, ["layer", "part"], "share").set_index(["layer", "part"])["value"]
    for layer, wanted in ((-1, (1, 0)), (0, (1, 0)), (1, (0, 1))):  # layer 0 is a copy
        assert [shares[layer, part] for part in ("evidence", "target")] == pytest.approx(wanted, abs=1e-4)
    assert stream.excess is not None and stream.excess.low > 0


def test_a_planted_null_moves_nothing_and_has_no_share() -> None:
    model, pairs = tiny.wired(carries=False)
    reading = rp.probe_causal_trace(model, pairs, site="head")
    assert np.allclose(reading.frame["effect"], 0.0, atol=1e-5) and reading.value == pytest.approx(0.0, abs=1e-6)
    assert reading.frame["share"].isna().all() and set(reading.frame["reason_share"]) == {TOO_CLOSE}
    assert set(reading.frame["reason"]) == {""}


def test_a_state_of_another_row_turns_this_red(monkeypatch: pytest.MonkeyPatch) -> None:
    """The donors are told apart: with the third fact's state as the clean one, the wired head restores nothing."""
    model, pairs = tiny.wired()
    keep = state_runs._Group._plain
    monkeypatch.setattr(
        state_runs._Group,
        "_plain",
        lambda self, queries, donor=None, members=(): keep(
            self, queries, None if donor is None else 1 - donor, members
        ),
    )
    assert rp.probe_causal_trace(model, pairs, site="head", positions="target", heads=[0], layers=[1]).value < 1.0


# --- denoising ------------------------------------------------------------------------------------------------------


def longer(model: rp.ProbedModel, length: int, count: int = 4, start: int = 4) -> rp.ReversalPairs:
    draw = torch.Generator().manual_seed(2)
    pairs = []
    for fact in range(count):
        ids = torch.randperm(50, generator=draw)[: length + 6].tolist()
        target, known, rest = ids[:length], ids[length], ids[length + 1 :]
        queries = [
            rp.Query([*rest[:at], known, *rest[at : start - 1], *target, *rest[3:]], range(start, start + length), [at])
            for at in (0, 1)
        ]
        pairs.append(rp.ReversalPair(*queries, fact=str(fact)))
    return rp.ReversalPairs.from_pairs(pairs)


def writing_by_hand(model: rp.ProbedModel, query: rp.Query, counts: Sequence[tuple[int, int, int]], rule: str) -> list:
    """(ids shown, (row, token) read) of each step: the surest positions by a rule written out here."""
    hidden, steps = list(query.target_positions), []
    for first, last, count in counts:
        ids = [model.mask_token_id if p in hidden else t for p, t in enumerate(query.token_ids)]
        logits = model.logits(torch.tensor([ids]))[0].double()
        logits[:, model.mask_token_id] = -torch.inf
        p = logits.softmax(-1)
        inside = [at for at in query.target_positions[first:last] if at in hidden]
        rows = {at: p[at - model.logit_shift] for at in inside}
        sure = {
            at: float(row.max()) if rule == "confidence" else float((row[row > 0] * row[row > 0].log()).sum())
            for at, row in rows.items()
        }
        chosen = sorted(sorted(inside, key=lambda at: -sure[at])[:count])
        steps.append((ids, [(at - model.logit_shift, query.token_ids[at]) for at in chosen]))
        hidden = [at for at in hidden if at not in chosen]
    return steps


@pytest.mark.parametrize(
    ("name", "options", "counts"),
    rest_long(
        [
            ("LLaDA", {"steps": 2}, [(0, 5, 3), (0, 5, 2)]),
            ("Dream", {"steps": 3, "algorithm": "confidence"}, [(0, 5, 2), (0, 5, 2), (0, 5, 1)]),
            ("LLaDA", {"steps": 4, "block_length": 3}, [(0, 3, 2), (0, 3, 1), (3, 5, 1), (3, 5, 1)]),
            ("Dream", {"steps": 5}, [(0, 5, 1)] * 5),
        ],
        keep=2,
    ),
)
def test_the_state_put_back_at_one_step_equals_a_slow_loop(name: str, options: dict[str, Any], counts: Any) -> None:
    """The order is the clean query's, written out by hand; the state goes in at one step, alone and unbatched."""
    model, pairs = MODELS[name](), longer(MODELS[name](), 5)
    rule = options.get("algorithm", "entropy" if model.logit_shift else "confidence")
    reading = rp.probe_causal_trace(model, pairs, site="attention", positions=PARTS, batch_size=6, **options)
    other, _ = other_evidence(pairs, model.logit_shift)
    for row in reading.frame[reading.frame["pair"] == 1].to_dict("records"):
        query = getattr(pairs[row["pair"]], row["direction"])
        evidence = getattr(pairs[int(other[row["pair"]])], row["direction"]).evidence
        with torch.no_grad():
            steps = writing_by_hand(model, query, counts, rule)
        assert row["revealed"] == len(steps[row["step"] - 1][1])
        corrupted = [priced(model, swapped_in(ids, query, evidence), reads) for ids, reads in steps]
        whole = list(corrupted)
        ids, reads = steps[row["step"] - 1]
        at = positions_by_hand(query, reads, row["part"])
        shown = ids, swapped_in(ids, query, evidence)
        whole[row["step"] - 1] = patched_by_hand(model, shown, reads, at, "attention", row["layer"], None)
        assert row["log_probability_corrupted"] == pytest.approx(sum(corrupted), abs=2e-5)
        assert row["log_probability"] == pytest.approx(sum(priced(model, *step) for step in steps), abs=2e-5)
        assert row["effect"] == pytest.approx(sum(whole) - sum(corrupted), abs=2e-5)
    steps_of = reading.frame.groupby(["pair", "direction", "layer", "part"], observed=True)["revealed"]
    assert (steps_of.sum() == 5).all() and (steps_of.size() == len(counts)).all()


@pytest.mark.parametrize("name", ["LLaDA", "Dream", "SDAR"])
def test_what_the_decoder_writes_is_written_in_the_decoders_own_order(name: str) -> None:
    """With the decoder's answer for the target, forced steps show the model the very canvases that decoding does."""
    model = MODELS[name]()
    pairs = longer(model, 6, start=5)
    how = unmasking(model, steps=4)
    prompts = [Prompt(q.token_ids[:5], q.token_ids[11:]) for q in pairs.queries]
    shown: list[tuple[int, ...]] = []
    watch = model.module.register_forward_pre_hook(
        lambda _, args, kwargs: shown.extend(map(tuple, (args[0] if args else kwargs["input_ids"]).tolist())),
        with_kwargs=True,
    )
    answers = decode_tokens(model, prompts, [6] * len(prompts), how, batch_size=1)
    decoded = [list(one) for one in shown]
    queries = [
        rp.Query.unchecked([*p.before, *answer, *p.after], range(5, 11), q.evidence_positions)
        for p, answer, q in zip(prompts, answers, pairs.queries, strict=True)
    ]
    shown.clear()
    steps, forwards = forced_steps(model, queries, how, 1)
    watch.remove()
    assert sorted(map(tuple, decoded)) == sorted(shown) and forwards == len(shown)
    for query, own in zip(queries, steps, strict=True):
        assert sorted(at for step in own for at in step.target_positions) == list(range(5, 11))
        assert all(step.token_ids[at] == query.token_ids[at] for step in own for at in step.target_positions)


@pytest.mark.parametrize("name", ["LLaDA", "SDAR"])
def test_effects_of_single_steps_add_up_to_the_state_put_back_throughout(name: str) -> None:
    """One token a step left to right (blocks of one) is the chain."""
    model = MODELS[name]()
    pairs = longer(model, 3)
    chain = rp.probe_causal_trace(model, pairs, positions=["target", "template"]).frame
    by_step = rp.probe_causal_trace(model, pairs, positions=["target", "template"], steps=3, block_length=1).frame
    keys = ["pair", "direction", "layer", "part"]
    summed = by_step[by_step["reason"] == ""].groupby(keys, observed=True)["effect"].sum()
    wanted = chain[chain["reason"] == ""].set_index(keys)["effect"]
    assert len(summed) == len(wanted) > 0
    assert np.allclose(summed.loc[wanted.index], wanted, atol=1e-4)


# --- what is undefined ----------------------------------------------------------------------------------------------


def test_without_another_or_a_third_fact_the_reason_is_said() -> None:
    model = MODELS["LLaDA"]()
    alone = rp.probe_causal_trace(model, wordy(count=1))
    assert np.isnan(alone.value) and alone.undefined == {NO_OTHER: 1} and alone.frame["log_probability"].isna().all()
    two = rp.probe_causal_trace(model, wordy(count=2))
    assert two.n == 2 and two.control is None and two.undefined[NO_THIRD] == 2
    assert two.frame["effect_control"].isna().all() and set(two.frame["reason_control"]) == {NO_THIRD}


def test_evidence_of_another_length_or_that_holds_the_target_stands_in_for_none() -> None:
    """Four facts of one group: d has less evidence, and b's holds the target of c."""

    def made(fact: str, evidence: Sequence[int], target: int) -> rp.ReversalPair:
        filled = [*evidence, 7][:2]
        queries = [
            rp.Query([*front, *filled, 9, target], [5], range(2, 2 + len(evidence))) for front in ([1, 2], [2, 1])
        ]
        return rp.ReversalPair(*queries, fact=fact)

    pairs = rp.ReversalPairs.from_pairs(
        [made("a", [11, 12], 30), made("b", [13, 14], 31), made("c", [15, 16], 13), made("d", [17], 32)]
    )
    assert len(set(pairs.groups(0))) == 1
    found = [{"abcd"[one] for one in both if one >= 0} for both in zip(*other_evidence(pairs, 0), strict=True)]
    assert found == [{"b", "c"}, {"a", "c"}, {"a"}, set()]


def sharing(facts: int = 12, of: int = 2) -> rp.ReversalPairs:
    """Pairs of one group, `of` facts with one target."""
    pairs = [
        rp.ReversalPair(
            rp.Query([1, 10 + i, 2, 3, 30 + i // of, 4], [4], [1]),
            rp.Query([5, 30 + i // of, 3, 10 + i, 2], [1], [3]),
            fact=f"{i:02d}",
        )
        for i in range(facts)
    ]
    return rp.ReversalPairs.from_pairs(pairs)


def test_a_fact_with_the_same_target_stands_in_for_none() -> None:
    """Its evidence would leave the answer right, and as the third fact's restore it: a control like a value."""
    pairs = sharing()
    target = [pair.forward.target for pair in pairs]
    for seed in range(5):
        for chosen in other_evidence(pairs, 0, seed=seed):
            assert all(target[one] != target[pair] for pair, one in enumerate(chosen.tolist()) if one >= 0)
            assert (chosen >= 0).all()
    assert all((one < 0).all() for one in other_evidence(sharing(4, 4), 0)), "one target alone has no other"
    lens = rp.probe_logit_lens(radd(n_layers=2), pairs).frame
    assert (lens["reason_control"] == "").all() and not np.isclose(lens["gain"], lens["gain_control"])[
        lens["layer"] > 0
    ].any()
    once = rp.probe_stored_once(radd(n_layers=2), pairs, untrained=False)
    wrong = once.meta["controls"][1]
    assert wrong["control"] == "evidence" and wrong["n"] == len(pairs)


def test_kin_are_joined_through_others_and_facts_without_keep_their_names() -> None:
    facts = np.array(["d", "c", "b", "a", "c"])
    assert kin(facts, [1, 2, 3, 4, 2]).tolist() == facts.tolist()
    assert kin(facts, [1, 1, 2, 3, 2], [5, 6, 7, 8, 9]).tolist() == ["b", "b", "b", "a", "b"]
    assert kin(facts, [1, 2, 3, 4, 5], [6, 7, 8, 6, 9]).tolist() == ["a", "c", "b", "a", "c"]


def test_substitutes_are_of_the_group_and_new() -> None:
    pairs = rp.letter_pairs(5, model=radd(), alphabet=5)
    other, third = other_evidence(pairs, 0, seed=3)
    groups = pairs.groups(0)
    for pair in range(len(pairs)):
        for one in (other[pair], third[pair]):
            assert groups[one] == groups[pair] and pairs.facts[one] != pairs.facts[pair]
        trio = [pairs[int(one)].forward.evidence for one in (pair, other[pair], third[pair])]
        assert len(set(trio)) == 3
    assert not np.array_equal(other, other_evidence(pairs, 0, seed=4)[0])


def test_evidence_in_a_later_block_is_nan_and_the_other_direction_is_not() -> None:
    model = in_blocks(4, scale=0.3)
    reading = rp.probe_causal_trace(model, pairs_at((6, 1), (1, 6), count=4))
    rows = reading.frame.set_index("direction")
    assert set(rows.loc["forward", "reason"]) == {LATER_BLOCK} and rows.loc["forward", "effect"].isna().all()
    assert set(rows.loc["reverse", "reason"]) == {""} and reading.n == 4


def test_layers_without_the_state_are_nan_rows_with_their_reason() -> None:
    heads = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    model = causal(transformers.Qwen3_5TextConfig(**GROUPED | heads | {"num_hidden_layers": 4}), scale=0.3)
    reading = rp.probe_causal_trace(model, wordy(), site="head", layers=[1, 3])
    frame, why = reading.frame, {1: NO_ATTENTION, 3: NO_HEADS}
    assert {layer: {*rows["reason"]} for layer, rows in frame.groupby("layer")} == {k: {v} for k, v in why.items()}
    assert np.isnan(reading.value) and reading.undefined == {" / ".join(sorted((NO_ATTENTION, NO_HEADS))): 4}
    assert reading.meta["layers_without_state"] == [1, 3] and set(reading.frame["layer"]) == {1, 3}
    assert rp.probe_causal_trace(model, wordy(), site="mlp", layers=[0]).n == 4


def test_a_part_without_a_token_is_said() -> None:
    pairs = [
        rp.ReversalPair(rp.Query([10 + i, 30 + i], [1], [0]), rp.Query([30 + i, 10 + i], [0], [1]), fact=str(i))
        for i in range(3)
    ]
    reading = rp.probe_causal_trace(MODELS["RADD"](), rp.ReversalPairs.from_pairs(pairs), positions=PARTS)
    reasons = reading.frame.groupby("part", observed=True)["reason"].agg(set)
    assert reasons["template"] == {NO_PART} and all(reasons[part] == {""} for part in ("target", "evidence", "all"))


def test_probability_0_is_a_reason() -> None:
    """The mask's logit of a RADD is -inf; here that of one target is, depending on what stands at position 1."""

    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = MODELS["RADD"]().module
            self.config = self.inner.config

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            logits = self.inner(input_ids, attention_mask=attention_mask).logits
            never = nn.functional.one_hot(torch.full_like(input_ids, self.token), logits.shape[-1]).bool()
            return logits.masked_fill(never & self.when(input_ids)[:, None, None], -torch.inf)

        token, when = 0, staticmethod(lambda ids: ids[:, 0] < 0)

    module = Silent().eval()
    model = rp.ProbedModel(module, rp.letter_tokenizer(), objective="masked", logit_shift=0)
    _, pairs = tiny.wired()
    module.token = 30
    for when, wanted in (
        (lambda ids: (ids[:, 1] == 10) | (ids[:, 3] == 10), (ZERO_CLEAN, "")),
        (lambda ids: (ids[:, 1] != 10) & (ids[:, 3] != 10), ("", ZERO_CORRUPTED)),
    ):
        module.when = when
        frame = rp.probe_causal_trace(model, pairs, positions="target").frame
        first, (clean, corrupted) = frame[frame["pair"] == 0], wanted
        assert set(first["reason"]) == {corrupted} and set(first["reason_share"]) <= {clean or corrupted}
        assert first["share"].isna().all() and first["effect"].isna().all() == bool(corrupted)


# --- the rest of the contract ---------------------------------------------------------------------------------------


def test_probability_0_with_a_state_put_back_is_a_reason_of_that_place_alone() -> None:
    pairs = pairs_at((1, 5), (5, 1), count=1)
    entry = Entry(0, "reverse", "", "", (0,), (0,))
    patched = np.array([[[-1.0, -2.0], [-np.inf, -2.0], [-1.0, -np.inf]]])
    found = state_runs.StateResult(np.array([-0.5]), np.array([-3.0]), patched)
    places = [state_runs.Place(layer, None, "all") for layer in range(3)]
    frame = trace_frame(pairs, [entry], found, places, {}, ["all"]).set_index("layer")
    assert frame["reason"].tolist() == ["", ZERO_PATCHED, ""] and np.isnan(frame.loc[1, "effect"])
    assert frame["reason_control"].tolist() == ["", ZERO_PATCHED, ZERO_CONTROL]
    assert frame.loc[0, ["effect", "effect_control"]].tolist() == [2.0, 1.0] and np.isnan(
        frame.loc[2, "effect_control"]
    )


def test_numbers_do_not_depend_on_the_batch_and_forwards_are_those_that_ran() -> None:
    model, pairs = MODELS["Dream"](), wordy()
    run: list[int] = []
    watch = model.module.register_forward_pre_hook(
        lambda _, args, kwargs: run.append(len(args[0] if args else kwargs["input_ids"])), with_kwargs=True
    )
    seen: list[tuple[int, int]] = []
    small = rp.probe_causal_trace(model, pairs, site="head", batch_size=1, progress=lambda *at: seen.append(at))
    counted = sum(run)
    watch.remove()
    queries, tokens, places = 8, 2, 2 * 4 * 3
    assert small.meta["forwards"] == queries * tokens * (3 + 2 * places) == seen[-1][0] == seen[-1][1]
    assert 0 <= counted - small.meta["forwards"] < 60, "and the few that look at the model once"
    large = rp.probe_causal_trace(model, pairs, site="head")
    pd.testing.assert_frame_equal(small.frame, large.frame, atol=1e-5)
    without = rp.probe_causal_trace(model, pairs, site="head", control=False)
    assert without.control is None and "effect_control" not in without.frame
    assert without.meta["forwards"] == queries * tokens * (2 + places)


@pytest.mark.parametrize("name", MODELS)
def test_the_model_comes_out_as_it_went_in_also_when_it_raises(name: str) -> None:
    model, pairs = MODELS[name](), wordy()
    model.module.train()
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    state = torch.random.get_rng_state()

    def stop(*_: int) -> None:
        raise ZeroDivisionError

    rp.probe_causal_trace(model, pairs, site="head")
    with pytest.raises(ZeroDivisionError):
        rp.probe_causal_trace(model, pairs, progress=stop)
    assert model.module.training and torch.equal(state, torch.random.get_rng_state())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())
    assert all(torch.equal(value, model.module.state_dict()[key]) for key, value in before.items())
    assert all(p.grad is None and p.requires_grad for p in model.module.parameters())


def test_a_reading_survives_saving_and_its_numbers_are_the_means(tmp_path: Any) -> None:
    model, pairs = MODELS["LLaDA"](), wordy(count=6)
    reading = rp.probe_causal_trace(model, pairs, site="mlp")
    again = rp.Reading.load(reading.save(tmp_path / "trace.parquet"))
    pd.testing.assert_frame_equal(again.frame, reading.frame)
    assert (again.value, again.interval, again.meta) == (reading.value, reading.interval, reading.meta)
    reverse = reading.frame[reading.frame["direction"] == "reverse"]
    assert reading.value == pytest.approx(reverse.groupby("pair")["effect"].mean().mean())
    assert reading.control is not None
    assert reading.control.value == pytest.approx(reverse.groupby("pair")["effect_control"].mean().mean())
    table = reading.summary(by=["direction", "layer", "part"]).set_index(["direction", "layer", "part"])
    means = place_means(reading.frame, ["direction", "layer", "part"], "effect")
    for row in means.to_dict("records"):
        one = table.loc[(row["direction"], row["layer"], row["part"])]
        wanted = [one[name] for name in ("value", "low", "high", "n")]
        assert [row[name] for name in ("value", "low", "high", "n")] == pytest.approx(wanted, nan_ok=True)


def test_the_figures_show_the_means() -> None:
    model, pairs = MODELS["LLaDA"](), longer(MODELS["LLaDA"](), 4)
    stream = rp.probe_causal_trace(model, pairs)
    figure = stream.plot()
    assert [a.text for a in figure.layout.annotations] == [
        f"<b>{one}</b>" for one in ("forward", "forward control", "reverse", "reverse control")
    ]
    means = place_means(stream.frame[stream.frame["direction"] == "reverse"], ["layer", "part"], "effect")
    shown = figure.data[2]
    for row in means.to_dict("records"):
        at = (
            list(shown.y).index("embedded" if row["layer"] < 0 else str(row["layer"])),
            list(shown.x).index(row["part"]),
        )
        assert shown.z[at[0]][at[1]] == pytest.approx(row["value"])
    by_step = rp.probe_causal_trace(model, pairs, steps=2, control=False).plot()
    assert len(by_step.data) == 2 and list(by_step.data[0].x) == ["1", "2"]
    heads = rp.probe_causal_trace(model, pairs, site="head")
    assert list(heads.plot(part="evidence", measure="share", theme="dark").data[0].x) == ["0", "1", "2", "3"]
    with pytest.raises(RevprobeError, match="drawn with by 'heads'"):
        stream.plot(by="heads")
    with pytest.raises(RevprobeError, match="without a head to draw by: measure it with site='head'"):
        stream.plot(by="head")
    with pytest.raises(RevprobeError, match="without the part 'all': measure it with positions="):
        stream.plot(part="all")
    null, null_pairs = tiny.wired(carries=False)
    nothing = rp.probe_causal_trace(null, null_pairs).plot(measure="share")
    assert "No defined share" in nothing.layout.annotations[0].text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"site": "heads"}, "unknown site 'heads'.*'head'"),
        ({"positions": "evidnce"}, "unknown positions 'evidnce'.*'evidence'"),
        ({"positions": []}, r"positions \[\]: expected some of"),
        ({"heads": [0]}, "has no say at site='residual'"),
        ({"layers": [7]}, "no layer 7 to trace"),
        ({"site": "head", "heads": [9]}, "no head 9 to trace"),
        ({"block_length": 2}, "block_length=2 has no say without steps="),
        ({"steps": 2, "mode": "parallel"}, "has no say with steps=2"),
        ({"steps": 0}, "steps 0"),
        ({"mode": "both"}, "unknown mode 'both'"),
    ],
)
def test_a_wrong_option_says_what_was_expected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RevprobeError, match=message):
        rp.probe_causal_trace(MODELS["LLaDA"](), wordy(), **options)


def test_a_causal_model_does_not_denoise_and_a_target_may_be_in_pieces() -> None:
    with pytest.raises(RevprobeError, match="does not denoise"):
        rp.probe_causal_trace(gpt2(), wordy(), steps=2)
    pieces = rp.ReversalPairs.from_pairs(
        [rp.ReversalPair(*[rp.Query([i, 2, 3, 4 + i, 5, 6 + i], [3, 5], [0])] * 2, fact=str(i)) for i in range(10, 14)]
    )
    for model in (in_blocks(4), MODELS["LLaDA"]()):  # of the first the pieces lie in two blocks
        assert rp.probe_causal_trace(model, pieces, steps=2).n == 4
    assert causal_trace.POSITIONS == ("target", "evidence", "template")
