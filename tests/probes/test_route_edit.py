"""Route edits against models run by hand, with the scores read back by the tap, and what the probe refuses to say."""

import copy
import math
import random
from functools import partial

import numpy as np
import pytest
import torch
import transformers

import tiny
from revprobe import (
    ProbedModel,
    Query,
    RaddForMaskedLM,
    Reading,
    ReversalPair,
    ReversalPairs,
    RevprobeError,
    edit_attention,
    letter_pairs,
    load_model,
    probe_route_edit,
)
from revprobe.models.bases.configs import POSITION_ENCODINGS
from revprobe.probes.attention import EVIDENCE_HIDDEN
from revprobe.probes.passes import route_changes, route_runs
from revprobe.probes.passes.route_changes import other_positions
from revprobe.probes.route_edit import NO_POSITION, NO_STRENGTH, ONLY_KEY, ZERO_AFTER, ZERO_BEFORE, ZERO_CONTROL
from revprobe.probes.statistics.coverage import ONE_FACT
from tiny import FIXTURES, GROUPED, bridged, causal, tapped

# Scores far from zero, so that an edit moves what is priced.
radd = partial(tiny.radd, n_layers=2, n_heads=2, scale=0.3)
gpt2, llama = (partial(make, scale=0.3) for make in (tiny.gpt2, tiny.llama))
MODELS = {
    **{e: (lambda e=e: radd(e)) for e in POSITION_ENCODINGS},
    "rope bridged": lambda: bridged(radd()),
    "gpt2": gpt2,
    "llama": llama,
    "llama eager": lambda: llama("eager"),
    "llada": lambda: load_model(FIXTURES / "llada-tiny"),
    "dream": lambda: load_model(FIXTURES / "dream-tiny"),
}


def wordy_pairs(model: ProbedModel, *, facts: int = 3, targets: int = 2, evidence: int = 2) -> ReversalPairs:
    """Pairs of unequal lengths with targets and evidence of several tokens, evidence before the target if causal."""
    draw = random.Random(0)
    pairs = []
    for fact in range(facts):
        ids = draw.sample(range(1, min(model.vocab_size, 50)), targets + evidence + 6)
        target, known, rest = ids[:targets], ids[targets : targets + evidence], ids[targets + evidence :]
        first = Query([*rest[:2], *known, rest[2], *target], _from(3 + evidence, targets), _from(2, evidence))
        second = Query(
            [*rest[2:4], *known, *rest[3 : 5 + fact % 2], *target, *([] if model.objective == "causal" else [rest[5]])],
            _from(4 + evidence + fact % 2, targets),
            _from(2, evidence),
        )
        pairs.append(ReversalPair(first, second, fact=str(fact)))
    return ReversalPairs.from_pairs(pairs)


def _from(start: int, count: int) -> list[int]:
    return list(range(start, start + count))


# --- slow references ------------------------------------------------------------------------------------------------


def steps_by_hand(model: ProbedModel, query: Query, mode: str) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """What is run for one query: (ids shown, (readout row, token) pairs read)."""
    ids, shift = list(query.token_ids), model.logit_shift
    reads = [(p - shift, ids[p]) for p in query.target_positions]
    if model.objective == "causal":
        return [(ids, reads)]
    hide = lambda hidden: [model.mask_token_id if p in hidden else t for p, t in enumerate(ids)]  # noqa: E731
    if mode == "parallel":
        return [(hide(query.target_positions), reads)]
    return [(hide(query.target_positions[k:]), [read]) for k, read in enumerate(reads)]


def price_by_hand(model: ProbedModel, query: Query, mode: str, at=None, bias=float("-inf"), **where) -> float:
    """Log-probability of the query's target, each step run alone, `at` edited from every readout row."""
    total = 0.0
    for ids, reads in steps_by_hand(model, query, mode):
        rows = [[row for row, _ in reads]]
        with torch.no_grad():
            if at is None:
                logits = model.logits(torch.tensor([ids]))[0]
            else:
                with edit_attention(model, rows, [list(at)], bias, **where):
                    logits = model.logits(torch.tensor([ids]))[0]
        total += sum(float(logits[row].double().log_softmax(-1)[token]) for row, token in reads)
    return total


def drawn_by_hand(model: ProbedModel, query: Query, seed: int = 0) -> list[int]:
    """Where the control stands in a model without windows: any position that the first readout row may see."""
    causal = model.objective == "causal"
    end = query.target_positions[0] - model.logit_shift + 1 if causal else len(query.token_ids)
    taken = {*query.target_positions, *query.evidence_positions}
    free = [p for p in range(end) if p not in taken and query.token_ids[p] != model.mask_token_id]
    draw = np.random.default_rng([seed, *query.token_ids, *query.target_positions, *query.evidence_positions])
    return sorted(draw.choice(free, size=len(query.evidence_positions), replace=False).tolist())


def row_of(reading: Reading, pair: int, direction: str, **where):
    frame = reading.frame.query("pair == @pair and direction == @direction")
    wanted = {"scope": "all"} | where
    for column, value in wanted.items():
        frame = frame[frame[column] == value]
    assert len(frame) == 1
    return frame.iloc[0]


@pytest.mark.parametrize(
    ("name", "mode"), [(name, "chain") for name in MODELS] + [("rope", "parallel"), ("dream", "parallel")]
)
def test_a_knockout_equals_every_step_run_alone_with_the_route_cut(name, mode):
    """Padding, several target and evidence tokens, scopes, and the control at the positions that were drawn."""
    model = MODELS[name]()
    pairs = wordy_pairs(model, facts=2)
    reading = probe_route_edit(model, pairs, mode=mode, batch_size=7)
    assert reading.undefined == {} and reading.n == 2
    for pair in range(2):
        for direction in ("forward", "reverse"):
            query = getattr(pairs[pair], direction)
            before, whole = price_by_hand(model, query, mode), row_of(reading, pair, direction)
            evidence, elsewhere = query.evidence_positions, drawn_by_hand(model, query)
            assert whole.log_probability == pytest.approx(before, abs=1e-5)
            after = price_by_hand(model, query, mode, evidence)
            assert whole.change == pytest.approx(after - before, abs=2e-5) and abs(whole.change) > 1e-4
            other = price_by_hand(model, query, mode, elsewhere)
            assert whole.change_control == pytest.approx(other - before, abs=2e-5)
            head = row_of(reading, pair, direction, scope="head", layer=1, head=1)
            after = price_by_hand(model, query, mode, evidence, layers=[1], heads=[1])
            assert head.change == pytest.approx(after - before, abs=2e-5)
            layer = row_of(reading, pair, direction, scope="layer", layer=0)
            after = price_by_hand(model, query, mode, evidence, layers=[0])
            assert layer.log_probability_edited == pytest.approx(after, abs=2e-5)


def test_a_knockout_in_radd_equals_the_model_with_the_key_masked_by_hand(monkeypatch):
    """Without any of this package's hooks: the bias of every layer gets -inf from the readout row to the evidence."""
    model = radd("alibi")
    pairs = letter_pairs(4, model=model)
    reading = probe_route_edit(model, pairs, scope="all", control=False)
    own = RaddForMaskedLM._attention_bias
    for pair in range(0, len(pairs), 17):
        query = pairs[pair].reverse
        (target,), (evidence,) = query.target_positions, query.evidence_positions
        cut = torch.zeros(4, 4)
        cut[target, evidence] = float("-inf")
        ids = torch.tensor([query.token_ids])
        ids[0, target] = model.mask_token_id
        with monkeypatch.context() as patched, torch.no_grad():
            patched.setattr(RaddForMaskedLM, "_attention_bias", lambda *a, cut=cut: own(*a) + cut)
            expected = model.module(ids).logits[0, target].double().log_softmax(-1)[query.target[0]]
        assert row_of(reading, pair, "reverse").log_probability_edited == pytest.approx(float(expected), abs=1e-5)


@pytest.fixture
def seen(monkeypatch):
    """What the tap reads in every batch the probe runs: (query batch, layer -> all scores of the readout rows)."""
    found, own = [], route_runs.readout

    def watched(model, batch):
        everything = torch.arange(batch.input_ids.shape[1])[None].expand(len(batch.rows), -1)
        with tapped(model, batch.rows, everything, batch.input_ids.shape[1]) as tap:
            result = own(model, batch)
        found.append((batch, {layer: call.score.double() for layer, call in tap.layers().items()}))
        return result

    monkeypatch.setattr(route_runs, "readout", watched)
    return found


def strengths(batch, scores: torch.Tensor, place: int, match: str) -> torch.Tensor:
    """Log-odds or score of the evidence set, key by key in plain Python. Shapes: `-> head row`."""
    evidence = batch.columns[place][batch.is_evidence[place]].tolist()
    rows = []
    for head in range(scores.shape[1]):
        rows.append([])
        for row in range(int(batch.is_target[place].sum())):
            line = scores[place, head, row].tolist()
            inside = math.log(sum(math.exp(s) for j, s in enumerate(line) if j in evidence))
            outside = math.log(sum(math.exp(s) for j, s in enumerate(line) if j not in evidence))
            rows[-1].append(inside - outside if match == "log_odds" else inside)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("match", ["log_odds", "score"])
@pytest.mark.parametrize("name", ["rope", "alibi", "llama", "llama eager", "gpt2", "dream", "rope bridged"])
def test_after_a_transplant_each_row_has_the_other_querys_route(name, match, seen):
    """Read back by the tap, in all layers and heads: 1e-5 from the donor's unedited run; weights within the set and
    among the others keep their ratios in the first layer.
    """
    model = MODELS[name]()
    pairs = wordy_pairs(model, facts=1)
    mode = "chain" if model.objective == "causal" else "parallel"
    probe_route_edit(model, pairs, edit="transplant", match=match, mode=mode, scope="all", control=False)
    (plain, before), (edited, after) = seen
    assert list(before) == [0, 1] and plain.input_ids.shape == edited.input_ids.shape
    for layer in before:
        for place in range(2):
            donor = strengths(plain, before[layer], 1 - place, match)
            own = strengths(plain, before[layer], place, match)
            got = strengths(edited, after[layer], place, match)
            torch.testing.assert_close(got, donor, atol=1e-5, rtol=0)
            assert (own - donor).abs().max() > 1e-2, "nothing was there to transplant"
            if layer == 0:
                check_only_a_shift(edited, place, after[0] - before[0], moved=donor - own, match=match)


def check_only_a_shift(batch, place: int, change: torch.Tensor, moved: torch.Tensor, match: str) -> None:
    evidence = batch.columns[place][batch.is_evidence[place]].tolist()
    for row in range(int(batch.is_target[place].sum())):
        line = change[place, :, row].nan_to_num()  # -inf minus -inf
        others = [j for j in range(line.shape[-1]) if j not in evidence]
        assert line[:, others].abs().max() < 1e-5
        torch.testing.assert_close(line[:, evidence], moved[:, [row]].expand(-1, len(evidence)), atol=1e-5, rtol=0)


def test_scaling_multiplies_the_odds_and_its_control_the_odds_of_other_positions(seen):
    model = radd("rope")
    query = wordy_pairs(model, facts=1)[0].forward
    pairs = ReversalPairs.from_pairs([ReversalPair(query, query)])
    probe_route_edit(model, pairs, edit="scale", factor=3.0, mode="parallel", scope="all")
    (_, before), (_, after) = seen
    moved = (after[0] - before[0][[0, 0]]).exp()
    expected = torch.ones_like(moved)
    expected[0, ..., list(query.evidence_positions)] = 3.0
    expected[1, ..., drawn_by_hand(model, query)] = 3.0
    torch.testing.assert_close(moved, expected, atol=1e-4, rtol=0)


def test_identity_edits_change_nothing():
    """Scaling by 1, and transplanting a query's own route into itself."""
    model = radd("absolute")
    query = wordy_pairs(model, facts=1)[0].forward
    same = ReversalPairs.from_pairs([ReversalPair(query, query)])
    assert probe_route_edit(model, same, edit="scale", factor=1.0).frame.change.abs().max() < 1e-12
    assert probe_route_edit(model, same, edit="transplant").frame.change.abs().max() < 1e-5


def test_in_one_layer_a_cut_query_cannot_tell_which_evidence_it_holds():
    """With one layer the readout row reads the evidence through this route alone; with two it also reads its traces."""
    for layers, equal in ((1, True), (2, False)):
        model = radd("rope", n_layers=layers)
        pairs = letter_pairs(5, model=model)
        other = [
            Query(
                [q.token_ids[p] if p not in q.evidence_positions else 40 for p in range(5)],
                q.target_positions,
                q.evidence_positions,
            )
            for q in pairs.queries
        ]
        replaced = ReversalPairs(tuple(other), pairs.forward, pairs.reverse, pairs.facts)
        first, second = (probe_route_edit(model, p, scope="all", control=False).frame for p in (pairs, replaced))
        gap = (first.log_probability_edited - second.log_probability_edited).abs().max()
        assert (gap < 1e-5) == equal
        assert (first.log_probability - second.log_probability).abs().max() > 1e-2


# --- controls, undefined numbers, bookkeeping -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rope", "gpt2", "dream"])
def test_the_control_draws_other_visible_positions_and_all_of_them_in_time(name):
    model = MODELS[name]()
    query = wordy_pairs(model, facts=1)[0].reverse
    visible = np.ones(len(query.token_ids), dtype=bool)
    visible[[0, -1]] = False
    taken = {*query.target_positions, *query.evidence_positions}
    allowed = {p for p in range(1, len(visible) - 1) if p not in taken}
    drawn = [other_positions(query, visible, seed, model.mask_token_id) for seed in range(200)]
    assert all(len(positions) == len(set(positions)) == 2 for positions in drawn)
    assert {p for positions in drawn for p in positions} == allowed
    assert drawn[0] == other_positions(query, visible, 0, model.mask_token_id), "the same seed draws the same positions"


def test_a_causal_control_stands_where_every_readout_row_sees_it(monkeypatch):
    query, model, drawn = Query(list(range(1, 10)), [4, 5], [1]), gpt2(), set()
    watched = lambda *arguments: drawn.update(found := other_positions(*arguments)) or found  # noqa: E731
    monkeypatch.setattr(route_runs, "other_positions", watched)
    pairs = ReversalPairs.from_pairs([ReversalPair(query, query)])
    for seed in range(30):
        probe_route_edit(model, pairs, scope="all", seed=seed)
    assert drawn == {0, 2, 3}, "the first readout row is 3; later tokens are hidden from it"


def test_a_masked_position_is_never_a_control():
    query = Query([1, 53, 2, 3, 53], [0], [2])
    assert {other_positions(query, [True] * 5, seed, 53) for seed in range(30)} == {(3,)}


def test_no_position_for_the_control_is_nan_and_counted():
    model = radd()
    pair = ReversalPair(Query([1, 2], [0], [1]), Query([2, 1], [1], [0]))
    reading = probe_route_edit(model, ReversalPairs.from_pairs([pair]), scope="all")
    assert math.isfinite(reading.value) and reading.control is None
    assert reading.frame.edited.eq(1.0).all() and reading.frame.edited_control.isna().all()
    assert reading.frame.change_control.isna().all() and set(reading.frame.reason_control) == {NO_POSITION}
    assert reading.undefined == {NO_POSITION: 1, ONE_FACT: 1}


def causal_pair(length: int, target: int, evidence: int) -> ReversalPairs:
    ids = list(range(10, 10 + length))
    query = Query(ids, [target], [evidence])
    return ReversalPairs.from_pairs([ReversalPair(query, query)])


def windowed(tokens: int) -> ProbedModel:
    """Mistral of two layers, whose rows see this many tokens."""
    return causal(transformers.MistralConfig(**GROUPED, sliding_window=tokens))


def test_evidence_that_is_all_a_row_sees_or_that_it_cannot_see_is_nan_with_the_reason():
    model = gpt2()
    alone = probe_route_edit(model, causal_pair(4, target=1, evidence=0))
    assert math.isnan(alone.value) and set(alone.frame.reason) == {ONLY_KEY} and alone.n == 0
    hidden = probe_route_edit(windowed(2), causal_pair(6, target=5, evidence=0))
    assert math.isnan(hidden.value) and set(hidden.frame.reason) == {EVIDENCE_HIDDEN}
    assert hidden.undefined == {EVIDENCE_HIDDEN: 1} and (hidden.frame.edited == 0.0).all()
    for one, at in ((model, 1), (windowed(2), 5)):
        moved = probe_route_edit(one, causal_pair(6, target=at, evidence=0), edit="transplant")
        assert set(moved.frame.reason) == {NO_STRENGTH}
    assert set(alone.frame.reason_control) == {ONLY_KEY}


def without_token(model: ProbedModel, below: float) -> ProbedModel:
    """The model with every logit below some number at -inf, as masked vocabularies have them."""
    model.module.lm_head.register_forward_hook(lambda _, __, out: out.masked_fill(out < below, float("-inf")))
    return model


@pytest.mark.filterwarnings("error")
def test_probability_0_before_the_edit_is_a_reason_and_not_a_silent_nan():
    model = gpt2()
    pairs = letter_pairs(4, model=model)
    token = pairs[0].reverse.target[0]
    hide = lambda _, __, out: out.index_fill(-1, torch.tensor([token]), float("-inf"))  # noqa: E731
    model.module.lm_head.register_forward_hook(hide)
    frame = probe_route_edit(model, pairs, scope="all").frame
    gone = frame.apply(lambda row: getattr(pairs[row.pair], row.direction).target[0] == token, axis=1)
    assert 0 < gone.sum() < len(frame) and (frame.log_probability[gone] == -math.inf).all()
    assert (frame.reason == ZERO_BEFORE).equals(gone) and (frame.reason_control == ZERO_BEFORE).equals(gone)
    assert frame.change.isna().equals(gone) and frame.change_control.isna().equals(gone)
    assert (frame.log_probability_edited[gone] == -math.inf).all()


@pytest.mark.filterwarnings("error")
def test_probability_0_under_an_edit_enters_no_mean_and_says_which_edit():
    """Logits below the lowest one that the target has in any plain run are hidden, so that only edits get there."""
    plain = gpt2()
    pairs = wordy_pairs(plain, targets=1)
    logits = []
    for query in pairs.queries:
        out = plain.logits(torch.tensor([query.token_ids])).detach()[0, query.target_positions[0] - 1]
        logits.append(float(out[query.target[0]]))
    model = without_token(gpt2(), min(logits) - 1e-4)
    free = probe_route_edit(plain, pairs).frame
    reading = probe_route_edit(model, pairs)
    frame = reading.frame
    fell, control_fell = frame.log_probability_edited == -math.inf, frame.log_probability_control == -math.inf
    assert 0 < fell.sum() < len(frame) and (control_fell & ~fell).any()
    assert np.isfinite(frame.log_probability).all() and (free.reason == "").all()
    assert (frame.reason == np.where(fell, ZERO_AFTER, "")).all() and frame.change.isna().equals(fell)
    assert (frame.reason_control == np.select([fell, control_fell], [ZERO_AFTER, ZERO_CONTROL], "")).all()
    assert frame.change_control.isna().equals(fell | control_fell)
    assert not np.isinf(reading.summary(by=["direction", "scope", "layer", "head"])["value"]).any()


def test_a_window_that_hides_the_evidence_in_one_layer_leaves_half_of_the_edit():
    config = transformers.Qwen2Config(
        **GROUPED, use_sliding_window=True, sliding_window=2, layer_types=["full_attention", "sliding_attention"]
    )
    model = causal(config, scale=0.3)
    reading = probe_route_edit(model, causal_pair(8, target=6, evidence=1))
    frame = reading.frame[reading.frame.direction == "reverse"]
    assert frame.query("scope == 'all'").edited.tolist() == [0.5] and math.isfinite(reading.value)
    windowed = frame.query("scope != 'all' and layer == 1")
    assert windowed.change.isna().all() and set(windowed.reason) == {EVIDENCE_HIDDEN}
    only_full = frame.query("scope == 'layer' and layer == 0").change.item()
    assert reading.value == pytest.approx(only_full, abs=1e-9)


def test_layers_without_softmax_attention_are_nan_rows_with_the_reason():
    heads = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    config = transformers.Qwen3_5TextConfig(**GROUPED | {"num_hidden_layers": 4}, **heads)
    model = causal(config, scale=0.3)
    pairs = causal_pair(6, target=5, evidence=1)
    reading = probe_route_edit(model, pairs, scope="layer")
    assert len(reading.frame) == 2 * (1 + 4), "one row for each direction and edit"
    reasons = reading.frame.query("direction == 'reverse' and scope == 'layer'").set_index("layer").reason
    assert reasons.to_dict() == {3: "", **{n: f"layer {n} has no softmax attention" for n in range(3)}}
    assert math.isfinite(reading.value) and reading.meta["layers_without_attention"] == [0, 1, 2]
    some = probe_route_edit(model, pairs, scope="all", layers=[0, 3])
    assert (some.meta["layers"], some.meta["layers_without_attention"]) == ([3], [0])
    silent = r"layer 0 of .* has no softmax attention to edit: expected some of 3$"
    for call in (lambda: probe_route_edit(model, pairs, layers=[0]), lambda: opened(edit_attention, model, layers=[0])):
        with pytest.raises(RevprobeError, match=silent):
            call()


def opened(edit, model: ProbedModel, **options) -> None:
    with edit(model, [[1]], [[0]], **options):
        pass


def test_equal_cells_run_once_and_every_scope_has_its_rows():
    done = []
    one = radd(n_layers=1, n_heads=1)
    pairs = letter_pairs(4, model=one)
    reading = probe_route_edit(one, pairs, progress=lambda now, total: done.append((now, total)))
    queries = len(pairs.queries)
    assert done[-1] == (3 * queries, 3 * queries), "plain, edited and control; layer 0 and its head are the same edit"
    changes = reading.frame.pivot(index=["pair", "direction"], columns="scope", values="change")
    assert (changes["all"] == changes["layer"]).all() and (changes["all"] == changes["head"]).all()
    counts = {scope: len(probe_route_edit(radd(), pairs, scope=scope).frame) for scope in ("all", "layer", "head")}
    assert counts == {"all": 2 * len(pairs), "layer": 2 * 3 * len(pairs), "head": 2 * 7 * len(pairs)}


@pytest.mark.parametrize("edit", ["knockout", "transplant"])
def test_a_batch_prepares_the_layers_of_its_own_cells_alone(edit, monkeypatch):
    """A deep model has hundreds of cells; each batch used to look at all of them in all layers."""
    made, own = [], route_changes.RouteChange.__init__
    watched = lambda self, *a, **k: made.append((a, k)) or own(self, *a, **k)  # noqa: E731
    monkeypatch.setattr(route_changes.RouteChange, "__init__", watched)
    model = radd(n_layers=3)
    pairs = ReversalPairs.from_pairs([wordy_pairs(model, targets=1)[0]])
    probe_route_edit(model, pairs, edit=edit, batch_size=1, control=False)
    cells = [[0, 1, 2], [0], [1], [2], *([n] for n in (0, 0, 1, 1, 2, 2))]
    assert [sorted(a[4]) for a, _ in made] == cells * 2
    assert [sorted(k["wanted"]) for _, k in made] == (cells if edit == "transplant" else [[]] * 10) * 2
    assert [int(sum(heads.sum() for heads in a[4].values())) for a, _ in made] == [6, 2, 2, 2, *[1] * 6] * 2


def test_layers_and_heads_choose_what_is_edited_also_in_the_whole_route():
    model = radd()
    pairs = wordy_pairs(model)
    reading = probe_route_edit(model, pairs, layers=[1], heads=[0])
    assert set(reading.frame.layer.dropna()) == {1} and set(reading.frame["head"].dropna()) == {0}
    query = pairs[0].reverse
    expected = price_by_hand(model, query, "chain", query.evidence_positions, layers=[1], heads=[0])
    assert row_of(reading, 0, "reverse").log_probability_edited == pytest.approx(expected, abs=1e-5)
    assert (reading.meta["layers"], reading.meta["heads"]) == ([1], [0])


@pytest.mark.parametrize("edit", ["knockout", "transplant"])
def test_numbers_do_not_depend_on_the_batch(edit):
    model = radd()
    pairs = wordy_pairs(model)
    frames = [probe_route_edit(model, pairs, edit=edit, batch_size=size).frame for size in (1, 5, None)]
    for other in frames[1:]:
        np.testing.assert_allclose(frames[0].change, other.change, atol=1e-5)
        np.testing.assert_allclose(frames[0].change_control, other.change_control, atol=1e-5)


def test_targets_of_different_lengths_share_a_batch():
    """A padded readout row points at row 0, which must stay as it is: in layer 1 row 0 would be read."""
    model = radd("absolute")
    short = ReversalPair(Query([1, 2, 3, 4, 5], [2], [4]), Query([6, 5, 7, 3, 8], [3], [1]), fact="short")
    pairs = ReversalPairs.from_pairs([short, *wordy_pairs(model, facts=1)])
    reading = probe_route_edit(model, pairs, mode="parallel", scope="all")
    for direction in ("forward", "reverse"):
        query = getattr(short, direction)
        expected = price_by_hand(model, query, "parallel", query.evidence_positions)
        assert row_of(reading, 0, direction).log_probability_edited == pytest.approx(expected, abs=1e-5)


def test_swapped_pairs_of_unequal_targets_take_the_mean_route(seen):
    model = gpt2()
    forward = Query([1, 2, 3, 4, 5, 6], [4, 5], [1])
    reverse = Query([9, 5, 6, 3, 2], [4], [1, 2])
    pairs = ReversalPairs.from_pairs([ReversalPair(forward, reverse, kind="swapped")])
    reading = probe_route_edit(model, pairs, edit="transplant", scope="all", control=False)
    (plain, before), (edited, after) = seen
    donor = strengths(plain, before[0], 0, "log_odds")
    torch.testing.assert_close(
        strengths(edited, after[0], 1, "log_odds"), donor.mean(1, keepdim=True), atol=1e-5, rtol=0
    )
    own = strengths(plain, before[0], 1, "log_odds")
    torch.testing.assert_close(strengths(edited, after[0], 0, "log_odds"), own.expand(-1, 2), atol=1e-5, rtol=0)
    assert set(reading.frame.kind) == {"swapped"} and reading.meta["kind"] == "swapped"


def test_the_value_is_the_mean_reverse_change_of_the_whole_route_and_survives_saving(tmp_path):
    model = radd()
    pairs = letter_pairs(4, model=model)
    reading = probe_route_edit(model, pairs)
    rows = reading.frame.query("direction == 'reverse' and scope == 'all'")
    assert reading.value == pytest.approx(rows.change.mean()) and reading.n == len(pairs)
    assert reading.control.value == pytest.approx(rows.change_control.mean())
    assert reading.excess.value == pytest.approx((rows.change - rows.change_control).mean())
    assert reading.interval[0] < reading.value < reading.interval[1]
    summary = reading.summary(by=["direction", "scope", "layer", "head"])
    forward = summary.query("direction == 'forward' and scope == 'head' and layer == 1 and head == 0")
    part = reading.frame.query("direction == 'forward' and scope == 'head' and layer == 1 and head == 0")
    assert forward.value.item() == pytest.approx(part.change.mean())
    loaded = Reading.load(reading.save(tmp_path / "route.parquet"))
    assert repr(loaded) == repr(reading) and loaded.frame.equals(reading.frame)
    assert "other positions" in reading.control.method and "deranged" not in reading.control.method


def test_the_figures_show_the_summary(tmp_path):
    model = radd()
    reading = probe_route_edit(model, letter_pairs(4, model=model), edit="scale")
    summary = reading.summary(by=["direction", "scope", "layer", "head"]).query("direction == 'reverse'")
    figure = reading.plot()
    control, value = figure.data
    assert len(value.x) == 1 + 2 + 4 and value.x[-1] == reading.value and control.x[-1] == reading.control.value
    assert value.y[-1].startswith("all at once") and value.y[0].startswith("layer 1, head 1")
    (heat,) = reading.plot(kind="heatmap").data
    expected = summary.query("scope == 'head' and layer == 0 and head == 1").value.item()
    assert heat.z[0][1] == pytest.approx(expected) and heat.zmax == -heat.zmin
    with pytest.raises(RevprobeError, match="kind 'heat'"):
        reading.plot(kind="heat")
    alone = probe_route_edit(gpt2(), causal_pair(4, target=1, evidence=0))
    assert ONLY_KEY in alone.plot().layout.annotations[0].text
    (only,) = probe_route_edit(model, letter_pairs(4, model=model), control=False).plot().data
    assert only.name == "evidence"
    whole = probe_route_edit(model, letter_pairs(4, model=model), scope="all")
    assert "measure with scope='head'" in whole.plot(kind="heatmap").layout.annotations[0].text


def test_the_figures_count_what_their_own_direction_lacks():
    """Forward, the evidence stands too far back to be seen: in one pair of three, then in all."""
    model = windowed(6)
    hidden = ReversalPair(
        Query([5, 1, 2, 6, 7, 8, 9, 4, 11, 3], [9], [0]), Query([6, 5, 7, 3, 8], [3], [1]), fact="hidden"
    )
    reading = probe_route_edit(model, ReversalPairs.from_pairs([hidden, *wordy_pairs(model, facts=2)]))
    forward, reverse = (reading.plot(direction=one).layout.title.text for one in ("forward", "reverse"))
    forward, reverse = (title.replace("<br>", " ") for title in (forward, reverse))  # a long line goes on below
    assert forward.endswith("n = 2 pairs of 2 facts, 1 undefined") and reverse.endswith("n = 3 pairs of 3 facts")
    alone = probe_route_edit(model, ReversalPairs.from_pairs([hidden]))
    assert math.isfinite(alone.value)
    for kind in ("intervals", "heatmap"):  # one pair, in whatever number of heads
        text = alone.plot(kind=kind, direction="forward").layout.annotations[0].text
        assert text == f"No defined change: 1 × {EVIDENCE_HIDDEN}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"edit": "knock-out"}, "unknown edit 'knock-out'.*knockout"),
        ({"match": "odds"}, "unknown match 'odds'"),
        ({"scope": "heads"}, "unknown scope 'heads'.*head"),
        ({"edit": "scale", "factor": 0.0}, "factor 0.0: expected a positive number; edit='knockout'"),
        ({"edit": "scale", "factor": True}, "factor=True: expected a number"),
        ({"edit": "scale", "factor": "2"}, "factor='2': expected a number"),
        ({"factor": 3.0}, "factor=3.0 has no say in edit='knockout': leave it out, or use edit='scale'"),
        ({"edit": "scale", "match": "score"}, "match='score' has no say in edit='scale'.*edit='transplant'"),
        ({"layers": 3}, r"layers=3: expected a list of whole numbers or None, such as layers=\[3\]"),
        ({"heads": 1}, r"heads=1: expected a list of whole numbers or None, such as heads=\[1\]"),
        ({"layers": [0.5]}, r"layers=\[0.5\]: expected a list of whole numbers"),
        ({"layers": []}, r"no layer list \[\] to edit"),
        ({"layers": [5]}, "no layer 5 to edit"),
        ({"heads": [-1]}, "no head -1 to edit"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"mode": "chains"}, "mode 'chains'"),
    ],
)
def test_a_wrong_option_says_what_was_expected(options, message):
    model = radd()
    with pytest.raises(RevprobeError, match=message):
        probe_route_edit(model, letter_pairs(4, model=model), **options)


def test_a_numpy_number_is_a_factor_and_numpy_layers_survive_saving(tmp_path):
    model = radd()
    pairs = wordy_pairs(model)
    options = {"edit": "scale", "scope": "all"}
    reading = probe_route_edit(model, pairs, factor=np.float32(3.0), layers=np.array([0, 1]), **options)
    assert reading.frame.equals(probe_route_edit(model, pairs, factor=3, **options).frame)
    assert Reading.load(reading.save(tmp_path / "route.parquet")).meta["layers"] == [0, 1]


def test_the_model_comes_out_as_it_went_in_also_when_it_raises():
    model = radd()
    model.module.train()
    model.module.embed_tokens.weight.grad = torch.ones_like(model.module.embed_tokens.weight)
    before, state = copy.deepcopy(model.module.state_dict()), torch.random.get_rng_state()
    probe_route_edit(model, wordy_pairs(model), edit="transplant")
    with pytest.raises(ZeroDivisionError):
        probe_route_edit(model, wordy_pairs(model), progress=lambda *_: 1 / 0)
    assert all(torch.equal(before[name], value) for name, value in model.module.state_dict().items())
    assert all(m.training for m in model.module.modules()) and torch.equal(state, torch.random.get_rng_state())
    assert (model.module.embed_tokens.weight.grad == 1).all()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())


def test_a_control_that_moves_the_evidence_turns_this_red(monkeypatch):
    """The planted fault: the control edits the evidence itself."""
    model = radd()
    pairs = wordy_pairs(model)
    honest = probe_route_edit(model, pairs, scope="all").frame
    own = route_changes.RouteChange.__init__
    monkeypatch.setattr(
        route_changes.RouteChange,
        "__init__",
        lambda self, edit, evidence, at, *a, **k: own(self, edit, evidence, evidence, *a, **k),
    )
    faulty = probe_route_edit(model, pairs, scope="all").frame
    assert (honest.change - honest.change_control).abs().min() > 1e-6
    assert np.allclose(faulty.change, faulty.change_control, atol=1e-6)
