"""Whether a fact is stored once: both tests against explicit inverses, and models wired to hold facts once or twice."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import accelerate
import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import revprobe as rp
import tiny
from revprobe.errors import RevprobeError
from revprobe.hooks.states import record_states
from revprobe.models.structure import states_of
from revprobe.probes.deep import stored_once
from revprobe.probes.deep.stored_once import (
    ASKED_FORWARD,
    NO_CENTRE,
    NO_EVIDENCE,
    NO_UNEMBEDDING,
    ONE_FORWARD,
    SAME_STATE,
    TOO_FEW,
)
from revprobe.probes.passes.batches import make_batch, prepare_queries
from revprobe.probes.passes.states import states_of_queries
from revprobe.probes.passes.untrained import untrained_twin
from revprobe.probes.statistics.estimators import LATER_BLOCK
from revprobe.probes.statistics.stored_once import Questions, all_alike, by_classifier, by_map, places, ridge_fit
from tiny import FIXTURES, in_blocks, pairs_at

radd = partial(tiny.radd, n_layers=2, n_heads=2, scale=0.3)
gpt2, llama = (partial(make, scale=0.3) for make in (tiny.gpt2, tiny.llama))
MODELS: dict[str, Callable[[], rp.ProbedModel]] = {
    "RADD": radd,
    "GPT-2": gpt2,
    "Llama": llama,
    "bfloat16": lambda: llama(dtype=torch.bfloat16),
    "SDAR": in_blocks,
    "LLaDA": lambda: rp.load_model(FIXTURES / "llada-tiny"),
    "Dream": lambda: rp.load_model(FIXTURES / "dream-tiny"),
}


def asked(model: rp.ProbedModel, count: int = 12) -> rp.ReversalPairs:
    """Pairs with padding; what a causal model is asked for stands last."""
    if model.block_size is not None:
        return pairs_at((5, 4), (4, 5), count=count, length=9, ragged=True)
    return pairs_at((1, 8), (4, 8), count=count, length=10, ragged=True)


# --- the two tests, slowly ------------------------------------------------------------------------------------------


def states_by_hand(model: rp.ProbedModel, query: rp.Query) -> np.ndarray:
    """The second block's output at the readout row, the query run alone."""
    batch = make_batch(model, prepare_queries(model, [query]))
    blocks = next(m for _, m in model.module.named_modules() if isinstance(m, nn.ModuleList) and len(m) == 2)
    kept: list[Tensor] = []
    hook = blocks[1].register_forward_hook(lambda _, __, out: kept.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model.logits(batch.input_ids)
    hook.remove()
    return kept[0][0, batch.rows[0]].double().mean(0).numpy()


def weights_by_hand(states: np.ndarray, values: np.ndarray, ridge: float) -> np.ndarray:
    centred = states - states.mean(0)
    penalty = ridge * np.trace(centred.T @ centred) / min(centred.shape)
    inverse = np.linalg.inv(centred.T @ centred + penalty * np.eye(centred.shape[1]))
    return inverse @ centred.T @ (values - values.mean(0))


@pytest.mark.parametrize("ridge", [0.1, 1.0])
@pytest.mark.parametrize("name", ["RADD", "GPT-2", "Llama", "LLaDA", "Dream"])
def test_both_tests_equal_normal_equations_written_out(name: str, ridge: float) -> None:
    model = MODELS[name]()
    pairs = asked(model)
    reading = rp.probe_stored_once(model, pairs, ridge=ridge, layers=[1], untrained=False, control=False)
    frame = reading.frame.set_index(["test", "direction", "pair"])
    forward, reverse = (
        np.stack([states_by_hand(model, getattr(pair, side)) for pair in pairs]) for side in ("forward", "reverse")
    )
    facts = np.unique(pairs.facts.astype(str), return_inverse=True)[1]
    named = weights_by_hand(forward, np.eye(12)[facts], ridge)
    scores = (reverse - reverse.mean(0)) @ named
    for pair, fact in enumerate(facts):
        rank = 1 + sum(scores[pair, other] >= scores[pair, fact] for other in range(12) if other != fact)
        assert frame.loc[("classifier", "reverse", pair), "rank"] == rank
    head = model.module.get_output_embeddings().weight.detach().double().numpy()
    targets = [pair.forward.target[0] for pair in pairs]
    assert targets == [pair.reverse.target[0] for pair in pairs]
    fold = np.random.default_rng(0).permutation(np.arange(12) % 10)[facts]
    for direction, states in (("forward", forward), ("reverse", reverse)):
        for pair in range(12):
            others = [one for one in range(12) if fold[one] != fold[pair]]
            seen = head[[targets[one] for one in others]]
            found = (states[pair] - states[others].mean(0)) @ weights_by_hand(forward[others], seen, ridge)
            ends = {token: head[token] - seen.mean(0) for token in targets}
            cosine = {token: found @ end / np.linalg.norm(end) for token, end in ends.items()}
            rank = 1 + sum(cosine[token] >= cosine[targets[pair]] for token in cosine if token != targets[pair])
            row = frame.loc[("map", direction, pair)]
            assert (row["rank"], row["correct"]) == (rank, float(rank == 1))
            assert row["place"] == pytest.approx(1 - (rank - 1) / (len(ends) - 1))


def test_a_fit_is_the_same_whether_states_are_more_or_fewer_than_their_width() -> None:
    draw = np.random.default_rng(0)
    for shape in ((5, 9), (9, 5), (7, 7)):
        states, values = draw.normal(size=shape), draw.normal(size=(shape[0], 3))
        values -= values.mean(0)
        np.testing.assert_allclose(ridge_fit(states, 0.3)(values), weights_by_hand(states, values, 0.3), atol=1e-10)
    assert not ridge_fit(np.full((5, 3), 0.1), 0.3)(np.ones((5, 2))).any(), "nothing is told from states all alike"


def test_ties_count_against_the_rank_and_half_in_the_place() -> None:
    scores = np.array([[3.0, 1.0, 3.0, 0.0, 5.0], [0.0] * 5, [1.0, 2.0, 0.0, 0.0, 0.0]])
    rank, place, correct = places(scores, np.array([0, 2, 1]))
    assert rank.tolist() == [3, 5, 1] and correct.tolist() == [0, 0, 1]
    assert place.tolist() == [1 - 1.5 / 4, 0.5, 1.0]
    assert all_alike(np.ones((4, 3)) * 7.1) and not all_alike(np.eye(3))
    scores[1, 3] = np.nan
    assert np.isnan(places(scores, np.array([0, 2, 1]))).tolist() == [[False, True, False]] * 3


@pytest.mark.parametrize("swapped", [(3,), (3, 4), (0, 3, 7), tuple(range(24))])
def test_other_evidence_is_centred_on_reverse_states_as_they_are_however_few_have_it(swapped: tuple[int, ...]) -> None:
    """Centred on themselves, two in one fold had no centre and one had none but itself."""
    draw, facts = np.random.default_rng(7), 24
    states, rows = draw.normal(size=(3 * facts, 9)), draw.normal(size=(facts, 5))
    fact = np.tile(np.arange(facts), 3)
    other = np.full(facts, -1)
    other[list(swapped)] = 2 * facts + np.array(swapped)
    asked = Questions(np.arange(facts), np.arange(facts, 2 * facts), other, fact, fact)
    forward, reverse = states[:facts], states[facts : 2 * facts]
    fold = np.random.default_rng(0).permutation(np.arange(facts) % 10)
    mapped = by_map(states, rows, asked, ridge=0.1, seed=0, null=False)["reverse", "evidence"]
    named = by_classifier(states, asked, ridge=0.1, seed=0, null=False)["reverse", "evidence"]
    of_facts = weights_by_hand(forward, np.eye(facts), 0.1)
    for one in range(facts):
        if one not in swapped:
            assert np.isnan([mapped[:, one], named[:, one]]).all()
            continue
        kept = fold != fold[one]
        ends = rows - rows[kept].mean(0)
        found = (states[2 * facts + one] - reverse[kept].mean(0)) @ weights_by_hand(forward[kept], rows[kept], 0.1)
        scores = (found @ ends.T) / np.linalg.norm(ends, axis=1), (states[2 * facts + one] - reverse.mean(0)) @ of_facts
        for table, score in zip((mapped, named), scores, strict=True):
            rank = 1 + (score > score[one]).sum()
            np.testing.assert_allclose(table[:, one], [rank, 1 - (rank - 1) / (facts - 1), rank == 1])


def test_reverse_states_of_one_fold_alone_have_no_number_and_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """The facts of the other fold are asked the same way twice, so that they have no reverse states to count from."""
    monkeypatch.setattr("revprobe.probes.statistics.stored_once.FOLDS", 2)
    fold = np.random.default_rng(0).permutation(np.arange(FACTS) % 2)
    names = sorted(str(u) for u in range(FACTS))  # facts are counted by their names
    made = []
    for u in range(FACTS):
        forward = rp.Query([u, 40, 20 + u, 54], [2], [0])
        reverse = forward if fold[names.index(str(u))] else rp.Query([55, 20 + u, 40, u], [1], [3])
        made.append(rp.ReversalPair(forward, reverse, fact=str(u)))
    model = rp.ProbedModel(Holds("once").eval(), objective="masked", mask_token_id=53, logit_shift=0)
    frame = rp.probe_stored_once(model, rp.ReversalPairs.from_pairs(made), untrained=False).frame
    rows = frame[(frame["test"] == "map") & (frame["direction"] == "reverse") & (frame["layer"] == 0)]
    assert set(rows["reason"]) == set(rows["reason_evidence"]) == {NO_CENTRE, ASKED_FORWARD}
    assert rows[["rank", "place", "correct", "rank_evidence", "place_evidence"]].isna().all(axis=None)


# --- planted --------------------------------------------------------------------------------------------------------

FACTS, TARGET, FILLER = 16, 8, 4


class Holds(nn.Module):
    """One block with uniform attention, which writes a fact's target at every row where it reads the fact's evidence.

    The stream has a part for evidence (one-hot, fact by fact), one for targets (random rows, which the unembedding
    reads), one that tells all other tokens apart, and one for the token that marks a reverse question. `once`: the
    target's row in both directions; `twice`: in reverse another fact's row; `carries`: the evidence itself and no
    target, in both.
    """

    def __init__(self, how: str) -> None:
        super().__init__()
        width, draw = FACTS + TARGET + FILLER + 1, torch.Generator().manual_seed(5)
        rows = torch.randn(FACTS, TARGET, generator=draw)
        self.how = how
        self.embed, self.layers = nn.Embedding(56, width), nn.ModuleList([nn.Module()])
        self.embed.weight.data.zero_()
        self.embed.weight.data[:FACTS, :FACTS] = torch.eye(FACTS)
        self.embed.weight.data[FACTS:, -1 - FILLER : -1].normal_(0, 1, generator=draw)
        self.embed.weight.data[55, -1] = 1.0
        self.lm_head = nn.Linear(width, 56, bias=False)
        self.lm_head.weight.data.normal_(0, 0.1, generator=draw)
        self.lm_head.weight.data[20 : 20 + FACTS, FACTS : FACTS + TARGET] = rows
        self.layers[0] = self.Block(width, rows, how, draw)

    class Block(nn.Module):
        def __init__(self, width: int, rows: Tensor, how: str, draw: torch.Generator) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width, bias=False) for _ in range(3))
            for projection in (self.q_proj, self.k_proj):  # not quite uniform: attention is found by what moves it
                projection.weight.data = 1e-2 * torch.randn(width, width, generator=draw)
            self.v_proj.weight.data = torch.eye(width)
            self.forward_o, self.reverse_o = (nn.Linear(width, width, bias=False) for _ in range(2))
            other = rows[torch.randperm(FACTS, generator=draw)] if how == "twice" else rows
            for projection, written in ((self.forward_o, rows), (self.reverse_o, other)):
                projection.weight.data.zero_()
                if how == "carries":
                    projection.weight.data[:FACTS, :FACTS] = torch.eye(FACTS)
                else:
                    projection.weight.data[FACTS : FACTS + TARGET, :FACTS] = written.T

        def forward(self, states: Tensor) -> Tensor:
            q, k, v = (one(states)[:, None] for one in (self.q_proj, self.k_proj, self.v_proj))
            read = nn.functional.scaled_dot_product_attention(q, k, v)[:, 0]
            return states + torch.where(read[..., -1:] > 0.05, self.reverse_o(read), self.forward_o(read))

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.lm_head(self.layers[0](self.embed(input_ids)))


def holding(how: str, **options: object) -> rp.Reading:
    """Facts u with target 20 + u, asked with token 55 in reverse; three fillers each, so several queries a fact."""
    module = Holds(how).eval()
    model = rp.ProbedModel(module, objective="masked", mask_token_id=53, logit_shift=0)
    pairs = [
        rp.ReversalPair(
            rp.Query([u, filler, 20 + u, 54], [2], [0]), rp.Query([55, 20 + u, filler, u], [1], [3]), fact=str(u)
        )
        for u in range(FACTS)
        for filler in (40, 41, 42)
    ]
    return rp.probe_stored_once(model, rp.ReversalPairs.from_pairs(pairs), **options)


def correct(reading: rp.Reading, test: str, direction: str, ending: str = "") -> float:
    rows = reading.frame[(reading.frame["test"] == test) & (reading.frame["direction"] == direction)]
    return float(rows.loc[rows["layer"] == 0, f"correct{ending}"].mean())


def test_facts_held_once_are_found_in_the_direction_that_no_fit_has_seen() -> None:
    reading = holding("once")
    assert reading.value == 1.0 and reading.n == 48 and reading.facts == FACTS
    assert all(correct(reading, test, side) == 1.0 for test in ("map", "classifier") for side in ("forward", "reverse"))
    assert reading.control.value < 0.25 and reading.excess.low > 0.5
    assert correct(reading, "map", "reverse", "_evidence") == 0.0, "the other evidence's target is read instead"
    assert correct(reading, "classifier", "reverse", "_evidence") == 0.0
    beside = reading.controls.set_index("control")
    assert beside.loc["evidence", "value"] == 0.0 and beside.loc["evidence", "difference_low"] > 0.5
    assert np.isnan(beside.loc["untrained", "value"]) and "cannot be made anew" in beside.loc["untrained", "reason"]


def test_facts_held_twice_are_not() -> None:
    """Each direction is told apart by itself, in reverse by rows that belong to others."""
    reading = holding("twice")
    assert reading.value < 0.25 and correct(reading, "classifier", "reverse") < 0.25
    assert correct(reading, "map", "forward") == correct(reading, "classifier", "forward") == 1.0


def test_a_model_that_carries_the_evidence_alone_passes_the_classifier_and_not_the_map() -> None:
    """Why the value is the map's, and the classifier is read beside the untrained twin."""
    reading = holding("carries")
    assert correct(reading, "classifier", "reverse") == 1.0
    assert reading.value < 0.25 and correct(reading, "map", "forward") < 0.25


def test_the_untrained_twin_is_asked_the_same() -> None:
    model = radd()
    pairs = rp.letter_pairs(5, model=model, alphabet=9)
    own = rp.probe_stored_once(model, pairs, seed=3)
    twin = rp.probe_stored_once(untrained_twin(model, 3), pairs, seed=3, untrained=False)
    for number in ("rank", "place", "correct"):
        np.testing.assert_array_equal(own.frame[f"{number}_untrained"], twin.frame[number])
    assert own.controls.set_index("control").loc["untrained", "value"] == pytest.approx(twin.value)
    assert twin.frame["place_untrained"].isna().all() and set(twin.frame["reason_untrained"]) <= {
        "not asked for",
        SAME_STATE,
    }


# --- families, options, and what is undefined -----------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_family_is_read_and_nothing_is_undefined_without_a_reason(name: str) -> None:
    model = MODELS[name]()
    reading = rp.probe_stored_once(model, asked(model))
    frame = reading.frame
    for column, reason in (("place", "reason"), ("place_untrained", "reason_untrained")):
        assert (frame[column].isna() == (frame[reason] != "")).all()
    assert (frame["place_evidence"].isna() == (frame["reason_evidence"] != "")).all()
    assert np.isfinite(reading.value) and frame["place"].dropna().between(0, 1).all()
    assert set(frame[frame["layer"] == 1]["reason"]) == {"", ONE_FORWARD}


def test_targets_of_several_tokens_and_swapped_pairs_are_read() -> None:
    generator, made = torch.Generator().manual_seed(1), []
    for fact in range(10):
        ids = torch.randperm(50, generator=generator)[:8].tolist()
        queries = (rp.Query(ids, [5, 6], [1]), rp.Query([*ids[2:4], *ids[:2], *ids[4:]], [5, 6], [3]))
        made.append(rp.ReversalPair(*queries, fact=str(fact)))
    reading = rp.probe_stored_once(radd(), rp.ReversalPairs.from_pairs(made))
    assert reading.n == 10 and np.isfinite(reading.value) and reading.meta["target_rows"] == "mean"
    model = gpt2()
    swapped = rp.letter_pairs(5, model=model, alphabet=9)
    assert swapped.kind == "swapped" and np.isfinite(rp.probe_stored_once(model, swapped).value)


@pytest.mark.parametrize("width", [2, 4])
def test_a_causal_state_has_read_no_token_of_its_target(width: int) -> None:
    """Rows behind the first read the target, by which a model that was never trained tells it."""
    draw, count, made = np.random.default_rng(0), 40, []
    config = transformers.GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=0)
    torch.manual_seed(0)
    model = rp.ProbedModel(transformers.GPT2LMHeadModel(config).eval(), objective="causal")
    drawn = draw.permutation(np.arange(10, 400))[: count * 2 * width].reshape(count, 2, -1)
    for fact, (one, other) in enumerate(drawn.tolist()):
        places = [*range(width + 3, 2 * width + 3)], [*range(1, width + 1)]
        sides = rp.Query([1, *one, 2, 3, *other], *places), rp.Query([4, *other, 5, 6, *one], *places)
        made.append(rp.ReversalPair(*sides, kind="swapped", fact=str(fact)))
    pairs = rp.ReversalPairs.from_pairs(made)
    reading = rp.probe_stored_once(model, pairs, untrained=False)
    assert reading.meta["target_rows"] == "first" and reading.value <= 0.1, "chance is 0.025"
    site = states_of(model).of("residual")[1]
    queries = prepare_queries(model, pairs.queries)
    found = states_of_queries(model, queries, [site], 16, lambda _: None)[0]
    for query, state in zip(queries, found, strict=True):
        before = torch.tensor([query.token_ids[: query.target_positions[0]]])
        with torch.no_grad(), record_states(model.module, [site]) as alone:
            model.module(before)
        np.testing.assert_allclose(state, alone[site][0, -1].numpy(), atol=1e-5)


def test_what_has_no_number_says_why() -> None:
    few = rp.probe_stored_once(radd(), asked(radd(), count=7))
    assert np.isnan(few.value) and few.undefined == {TOO_FEW: 7} and set(few.frame["reason"]) == {TOO_FEW}
    same = rp.probe_stored_once(radd(), asked(radd())).frame
    assert set(same[same["layer"] == -1]["reason"]) == {SAME_STATE}, "the mask's embedding is the same for every fact"
    module = Holds("once").eval()
    module.get_output_embeddings = lambda: None  # type: ignore[method-assign]
    model = rp.ProbedModel(module, objective="masked", mask_token_id=53, logit_shift=0)
    rowless = rp.probe_stored_once(model, asked(model))
    assert np.isnan(rowless.value) and rowless.undefined == {NO_UNEMBEDDING: 12}
    hidden = rp.probe_stored_once(in_blocks(), pairs_at((9, 4), (4, 9), count=9, length=12))
    assert set(hidden.frame["reason"]) == {LATER_BLOCK} and np.isnan(hidden.value)


def test_evidence_as_long_as_no_other_and_queries_asked_both_ways_are_left_out() -> None:
    pairs = list(asked(radd()))
    ids = list(pairs[0].forward.token_ids)
    longer = rp.Query(ids, [8], [1, 2]), rp.Query([ids[0], *ids[3:6], *ids[1:3], *ids[6:]], [8], [4, 5])
    pairs[0] = rp.ReversalPair(*longer, fact="0")
    pairs[1] = rp.ReversalPair(pairs[1].forward, pairs[1].forward, fact="1")
    frame = rp.probe_stored_once(radd(), rp.ReversalPairs.from_pairs(pairs), untrained=False).frame
    last = frame[(frame["layer"] == 1) & (frame["direction"] == "reverse")].set_index(["test", "pair"])
    assert set(last.xs(0, level="pair")["reason_evidence"]) == {NO_EVIDENCE}
    assert set(last.xs(1, level="pair")["reason"]) == {ASKED_FORWARD}


def test_options_and_errors() -> None:
    model, pairs = radd(), asked(radd())
    whole = rp.probe_stored_once(model, pairs)
    some = rp.probe_stored_once(model, pairs, layers=[1], batch_size=3)
    kept = whole.frame[whole.frame["layer"] == 1].reset_index(drop=True)
    assert some.frame.drop(columns="layer").equals(kept.drop(columns="layer"))
    bare = rp.probe_stored_once(model, pairs, control=False, untrained=False)
    assert bare.control is None and "rank_control" not in bare.frame and bare.value == whole.value
    done: list[tuple[int, int]] = []
    rp.probe_stored_once(model, pairs, batch_size=20, progress=lambda *at: done.append(at))
    assert done == [(20, 72), (36, 72), (56, 72), (72, 72)]
    for ridge in (0.0, -1.0, float("nan")):
        with pytest.raises(RevprobeError, match="expected a positive number"):
            rp.probe_stored_once(model, pairs, ridge=ridge)
    with pytest.raises(RevprobeError, match="no layer 9 to read"):
        rp.probe_stored_once(model, pairs, layers=[9])


def test_no_trace_is_left() -> None:
    model = radd()
    before, random = {k: v.clone() for k, v in model.module.state_dict().items()}, torch.get_rng_state()
    model.module.train()
    rp.probe_stored_once(model, asked(model))
    assert model.module.training and torch.equal(random, torch.get_rng_state())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())


def test_the_reading_survives_a_file_and_is_drawn(tmp_path: Path) -> None:
    reading = rp.probe_stored_once(radd(), rp.letter_pairs(5, model=radd(), alphabet=9))
    again = rp.Reading.load(reading.save(tmp_path / "once.parquet"))
    assert again.frame.equals(reading.frame) and again.controls.equals(reading.controls)
    table = reading.summary(by=["test", "direction", "layer"])
    assert len(table) == 12 and table["control"].notna().sum() == 8
    figure = reading.plot(theme="dark")
    assert {trace.name for trace in figure.data} >= {"forward states", "reverse states", "reverse, untrained twin"}
    drawn = next(t for t in reading.plot().data if t.name == "reverse states" and t.hovertext)
    rows = reading.frame[(reading.frame["test"] == "map") & (reading.frame["direction"] == "reverse")]
    wanted = rows.groupby("layer")["correct"].mean().to_numpy()
    np.testing.assert_allclose(drawn.y, wanted)
    assert reading.plot(number="place").data
    with pytest.raises(RevprobeError, match="stored-once plot of number 'ranks'"):
        reading.plot(number="ranks")


def test_the_rows_of_an_adapted_unembedding_are_those_of_the_merged_one() -> None:
    """peft's layer calls the base's weight its own: the map would lead to rows that the model does not read by."""
    pairs = tiny.pairs_at((1, 4), (2, 4), count=12, length=8)
    adapter = LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    torch.manual_seed(3)
    adapted = get_peft_model(tiny.llama(scale=0.3).module, adapter).eval()
    merged = copy.deepcopy(adapted).merge_and_unload().eval()
    models = [rp.ProbedModel(one, rp.letter_tokenizer(), objective="causal") for one in (adapted, merged)]
    rows = [stored_once._unembedding(model, [(3,), (7, 9)]) for model in models]
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-5)
    own = adapted.get_output_embeddings().weight.detach()[3].numpy()
    assert np.abs(own - rows[1][0]).max() > 0.1, "the adapter counts"
    found, wanted = (rp.probe_stored_once(model, pairs, untrained=False).frame for model in models)
    pd.testing.assert_frame_equal(found[["rank", "place"]], wanted[["rank", "place"]])


def test_weights_that_wait_elsewhere_give_the_same_numbers() -> None:
    """The unembedding's weight is without numbers until it runs."""
    pairs, model = tiny.pairs_at((1, 4), (2, 4), count=12, length=8), llama()
    waiting = accelerate.cpu_offload(copy.deepcopy(model.module), execution_device=torch.device("cpu"))
    assert waiting.get_output_embeddings().weight.is_meta
    offloaded = rp.ProbedModel(waiting, rp.letter_tokenizer(), objective="causal")
    found, wanted = (rp.probe_stored_once(one, pairs, untrained=False).frame for one in (offloaded, model))
    pd.testing.assert_frame_equal(found, wanted)
