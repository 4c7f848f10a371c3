"""The control of a route edit where masks hide the evidence from some layers or rows: the same change, or no number."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from long_cases import rest_long

import tiny
from revprobe import ProbedModel, Query, ReversalPair, ReversalPairs, probe_route_edit
from revprobe.probes.attention import EVIDENCE_HIDDEN
from revprobe.probes.passes import route_runs
from revprobe.probes.route_edit import NO_POSITION, UNEVEN
from tiny import language_model, tapped

SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FULL, WINDOW = "full_attention", "sliding_attention"


def model_of(config, objective: str = "causal", kernel: str = "sdpa") -> ProbedModel:
    """A model whose weights are the same in every call, none near its initial value."""
    module = tiny.drawn(lambda: language_model(config, objective, attn_implementation=kernel), scale=0.3)
    mask = {"mask_token_id": 59, "logit_shift": 0} if objective == "masked" else {}
    return ProbedModel(module, objective=objective, **mask)


def qwen(
    kernel: str = "sdpa", window: int = 3, layers: tuple[str, ...] = (FULL, WINDOW, WINDOW, WINDOW)
) -> ProbedModel:
    options = {"use_sliding_window": True, "sliding_window": window, "layer_types": list(layers)}
    return model_of(transformers.Qwen2Config(**SIZES | {"num_hidden_layers": len(layers)}, **options), kernel=kernel)


def mistral() -> ProbedModel:
    return model_of(transformers.MistralConfig(**SIZES | {"num_hidden_layers": 2}, sliding_window=4))


def gemma() -> ProbedModel:
    options = {"sliding_window": 4, "layer_types": [WINDOW, FULL], "query_pre_attn_scalar": 4}
    return model_of(transformers.Gemma2Config(**SIZES | {"num_hidden_layers": 2}, **options), kernel="eager")


def chunked() -> ProbedModel:
    """Llama 4 attends within chunks of 8 tokens in all but every fourth layer."""
    options = {"num_local_experts": 1, "intermediate_size_mlp": 32, "attention_chunk_size": 8}
    return model_of(transformers.Llama4TextConfig(**SIZES, **options))


def modernbert() -> ProbedModel:
    sizes = {name: value for name, value in SIZES.items() if name not in ("num_key_value_heads", "head_dim")}
    options = {"local_attention": 6, "global_attn_every_n_layers": 2, "sep_token_id": 2, "cls_token_id": 1}
    return model_of(transformers.ModernBertConfig(**sizes, **options), "masked")


MODELS = {
    "qwen": qwen,
    "qwen eager": lambda: qwen("eager"),
    "mistral": mistral,
    "gemma eager": gemma,
    "llama 4": chunked,
    "modernbert": modernbert,
}


def query(length: int, targets: list[int], evidence: list[int]) -> Query:
    return Query(list(range(3, 3 + length)), targets, evidence)


def pairs_of(*queries: Query) -> ReversalPairs:
    return ReversalPairs.from_pairs(
        [ReversalPair(q, q, fact=str(n), different_tokens=True) for n, q in enumerate(queries)]
    )


@pytest.fixture
def batches(monkeypatch):
    """What the tap reads in every batch the probe runs: (query batch, layer -> visible keys of its readout rows)."""
    found, own = [], route_runs.readout

    def watched(model, batch):
        everything = torch.arange(batch.input_ids.shape[1])[None].expand(len(batch.rows), -1)
        with tapped(model, batch.rows, everything, batch.input_ids.shape[1]) as tap:
            result = own(model, batch)
        found.append((batch, {layer: call.score.isfinite() for layer, call in tap.layers().items()}))
        return result

    monkeypatch.setattr(route_runs, "readout", watched)
    return found


def cuts(plain, edited, places: tuple[int, int]) -> dict[tuple[int, int, int], set[int]]:
    """What a knockout cut in one sequence: (layer, head, readout row) -> positions."""
    (before_batch, before), (batch, after) = plain, edited
    there, here = places
    rows = int(batch.is_target[here].sum())
    assert before_batch.rows[there, :rows].equal(batch.rows[here, :rows])
    width = min(before_batch.input_ids.shape[1], batch.input_ids.shape[1])
    return {
        (layer, head, int(batch.rows[here, row])): {
            p for p in range(width) if before[layer][there, head, row, p] and not after[layer][here, head, row, p]
        }
        for layer in before
        for head in range(before[layer].shape[1])
        for row in range(rows)
    }


QUERIES = {
    "everywhere": query(20, [19], [17]),
    "in few layers": query(20, [19], [2]),
    "in part": query(20, [19], [10, 16]),
    "from one of two rows": query(22, [19, 20], [17]),
}


@pytest.mark.parametrize("seed", rest_long([0, 1, 2]))
@pytest.mark.parametrize(
    ("name", "case"),
    [(n, c) for n in MODELS for c in QUERIES if (n, c) != ("mistral", "in few layers")],  # a window in every layer
)
def test_the_control_cuts_as_many_keys_in_the_same_layers_heads_and_rows(name, case, seed, batches):
    """Read by the tap from the model's own masks, beside a longer query that pads the batch."""
    model, asked = MODELS[name](), QUERIES[case]
    beside = query(24, [23], [21])
    reading = probe_route_edit(model, pairs_of(asked, beside), scope="all", mode="chain", seed=seed, batch_size=99)
    plain, edited = batches
    steps = len(asked.target_positions) if model.objective == "masked" else 1
    drawn = set()
    for step in range(steps):
        own = cuts(plain, edited, (step, 2 * step))
        other = cuts(plain, edited, (step, 2 * step + 1))
        assert any(own.values()) and set().union(*own.values()) <= set(asked.evidence_positions)
        assert {cell: len(positions) for cell, positions in own.items()} == {c: len(p) for c, p in other.items()}
        taken = {*asked.evidence_positions, *asked.target_positions}
        assert not taken & set().union(*other.values())
        drawn |= set().union(*other.values())
    assert len(drawn) <= len(asked.evidence_positions), "the steps of a query share its control"
    frame = reading.frame[reading.frame.pair == 0]
    assert (frame.reason == "").all() and (frame.reason_control == "").all() and frame.change_control.notna().all()
    assert frame.edited.equals(frame.edited_control) and (frame.edited > 0).all()


def test_the_control_is_drawn_from_all_positions_that_every_edited_layer_shows():
    """Evidence at 17, read from row 18: windows of three leave 16 and 18; cut in the full layer alone, all others."""
    for layers, expected in ((None, {16, 18}), ([0], set(range(17)) | {18}), ([0, 1], {16, 18})):
        assert drawn(qwen(), layers, facts=20) == expected


def drawn(model: ProbedModel, layers, facts: int) -> set[int]:
    """Every position drawn for the same places of so many facts, which differ in their first token, under six seeds."""
    recorder, found = route_runs.RouteRuns._draw_controls, set()
    plain = QUERIES["everywhere"]
    pairs = pairs_of(*(replace(plain, token_ids=(first, *plain.token_ids[1:])) for first in range(30, 30 + facts)))
    with pytest.MonkeyPatch.context() as patched:

        def watched(self):
            recorder(self)
            found.update(p for positions in self.elsewhere for p in positions)

        patched.setattr(route_runs.RouteRuns, "_draw_controls", watched)
        for seed in range(6):
            probe_route_edit(model, pairs, scope="all", layers=layers, seed=seed)
    return found


def test_too_few_positions_beside_the_evidence_are_a_reason():
    reading = probe_route_edit(qwen(), pairs_of(query(20, [19], [16, 17])), scope="all")
    assert math.isfinite(reading.value) and reading.control is None
    assert set(reading.frame.reason_control) == {NO_POSITION} and reading.frame.edited_control.isna().all()


def test_a_layer_that_hides_the_evidence_has_neither_edit_nor_control():
    frame = probe_route_edit(qwen(), pairs_of(QUERIES["in few layers"]), scope="layer").frame
    whole, full, *windows = (part for _, part in frame.fillna({"layer": -1}).groupby("layer"))
    assert (whole.edited == 0.25).all() and (whole.edited_control == 0.25).all()
    np.testing.assert_allclose(whole.change_control, full.change_control, atol=1e-12)
    for part in windows:
        assert (part.edited_control == 0.0).all() and part.change_control.isna().all()
        assert set(part.reason) == set(part.reason_control) == {EVIDENCE_HIDDEN}


@pytest.mark.parametrize("edit", ["knockout", "scale", "transplant"])
def test_a_control_in_fewer_layers_than_the_edit_is_no_number(edit, monkeypatch):
    """The planted fault: the control stands where only the full layer sees it."""
    monkeypatch.setattr(route_runs, "other_positions", lambda *_: (3,))
    first, second = QUERIES["everywhere"], query(18, [17], [15])
    pairs = ReversalPairs.from_pairs([ReversalPair(first, second, different_tokens=True)])
    frame = probe_route_edit(qwen(), pairs, edit=edit, scope="layer").frame
    whole = frame[frame.scope == "all"]
    assert (whole.edited == 1.0).all() and whole.change.notna().all()
    assert (whole.edited_control == 0.25).all() and whole.change_control.isna().all()
    assert set(whole.reason_control) == {UNEVEN}
    full = frame[frame.layer == 0]
    assert full.change_control.notna().all() and (full.edited_control == 1.0).all()
