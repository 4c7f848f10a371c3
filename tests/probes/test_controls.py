"""Controls beside shuffled facts: each against its number taken by hand, and what cannot be had says why."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

import revprobe as rp
from revprobe.probes.controls import NOT_ATTENDED
from revprobe.probes.passes.batches import prepare_queries
from revprobe.probes.passes.untrained import untrained_twin
from revprobe.probes.statistics.group_correlation import group_correlation
from tiny import GROUPED, AttentionOnly, causal, drawn, gpt2, in_blocks, llama, pairs_at, radd

NAN = float("nan")


def bert() -> rp.ProbedModel:
    sizes = {key: value for key, value in GROUPED.items() if key not in ("num_key_value_heads", "head_dim")}
    module = drawn(lambda: transformers.BertForMaskedLM(transformers.BertConfig(**sizes)).eval())
    return rp.ProbedModel(module, rp.letter_tokenizer(), objective="masked")


def eager(model: rp.ProbedModel, query: rp.Query) -> np.ndarray:
    """The weights of one query alone, as transformers gives them. Shapes: `-> layer head row key`."""
    ids = torch.tensor([query.token_ids])
    hidden = torch.zeros_like(ids, dtype=torch.bool)
    hidden[0, list(query.target_positions)] = True
    attention = model.module.config._attn_implementation
    model.module.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            found = model.module(model.hide(ids, hidden), output_attentions=True).attentions
    finally:
        model.module.set_attn_implementation(attention)
    return torch.cat(found).numpy()


@pytest.mark.parametrize("made", [bert, llama], ids=["masked", "causal"])
@pytest.mark.parametrize("name", ["neighbour", "sink"])
def test_positions_beside_the_evidence_against_weights_of_each_query_alone(
    made: Callable[[], rp.ProbedModel], name: str
) -> None:
    """In logs of weights, less each row's own constant, which groups of one row and head share with nothing else."""
    model = made()
    pairs = pairs_at((2, 6), (1, 6)) if model.objective == "causal" else pairs_at((2, 5), (5, 1))
    queries = prepare_queries(model, pairs.queries)
    picked = []
    for query in queries:
        weights = eager(model, query)[:, :, query.target_positions[0] - model.logit_shift]
        if name == "sink":
            open_to = weights.copy()
            open_to[..., list(query.evidence_positions)] = -1
            at = open_to.argmax(-1)
        else:
            at = np.full(weights.shape[:2], nearest(query))
        picked.append(at)
    frame = rp.probe_attention_correlation(model, pairs, control=False).frame
    moved = {q: at for q, at in enumerate(picked)}
    scores = {side: np.full((len(pairs), picked[0].size), NAN) for side in ("forward", "reverse")}
    for side, index in (("forward", pairs.forward), ("reverse", pairs.reverse)):
        for pair, q in enumerate(index):
            for place, (layer, head) in enumerate(np.ndindex(picked[0].shape)):
                own = at_position(model, queries[q], int(moved[q][layer, head]))
                scores[side][pair, place] = own[layer, head]
    groups = frame.drop_duplicates("pair")["group"].to_numpy()
    expected = group_correlation(scores["forward"], scores["reverse"], pairs.facts.astype(str), groups, control=False)
    table = rp.probe_attention_correlation(model, pairs, controls=name).controls.set_index("control")
    assert table.loc[name, "value"] == pytest.approx(expected.value, abs=1e-5)
    assert table.loc[name, "low"] == pytest.approx(expected.low, abs=1e-4)


def nearest(query: rp.Query) -> int:
    """The token next to the evidence on the right, else on the left, that is not the target."""
    [at], taken = query.evidence_positions, {*query.target_positions, *query.evidence_positions}
    beside = (at + step * side for step in range(1, len(query.token_ids)) for side in (1, -1))
    return next(p for p in beside if 0 <= p < len(query.token_ids) and p not in taken)


def at_position(model: rp.ProbedModel, query: rp.Query, position: int) -> np.ndarray:
    """The scores of one position, from a probe of a pair whose evidence it is called. Shapes: `-> layer head`."""
    asked = rp.Query.unchecked(query.token_ids, query.target_positions, (position,))
    pair = rp.ReversalPair(asked, asked, fact="one")
    rows = rp.probe_attention_correlation(model, rp.ReversalPairs.from_pairs([pair]), control=False).frame
    return rows.pivot(index="layer", columns="head", values="score_forward").to_numpy()


@pytest.mark.parametrize("made", [radd, gpt2, in_blocks], ids=["RADD", "GPT-2", "SDAR"])
def test_the_untrained_twin_is_the_class_with_weights_drawn_anew(made: Callable[[], rp.ProbedModel]) -> None:
    model = made()
    before, state = torch.get_rng_state(), {name: p.clone() for name, p in model.module.named_parameters()}
    twin = untrained_twin(model, seed=3)
    assert torch.equal(torch.get_rng_state(), before) and not twin.module.training
    torch.manual_seed(3)
    again = type(model.module)(model.module.config)
    assert all(torch.equal(p, q) for p, q in zip(twin.module.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(p, state[name]) for name, p in model.module.named_parameters())
    assert (twin.objective, twin.logit_shift, twin.block_size) == (model.objective, model.logit_shift, model.block_size)
    pairs = rp.letter_pairs(5, model=model)
    for reading in rp.probe(model, pairs, only=["attention", "gradient"], controls=["untrained"], seed=3):
        own = rp.probe(twin, pairs, only=["attention", "gradient"], control=False).select(name=reading.name)[0]
        row = reading.controls.set_index("control").loc["untrained"]
        assert row["value"] == pytest.approx(own.value, nan_ok=True) and row["model"] == twin.name
        if np.isfinite(own.value):
            assert row["difference"] == pytest.approx(reading.value - own.value, abs=1e-9)
            assert row["difference_low"] < row["difference"] < row["difference_high"]


def test_an_adapter_is_left_out_of_the_twin_and_a_module_of_ones_own_has_none() -> None:
    adapted = get_peft_model(llama().module, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    twin = untrained_twin(rp.ProbedModel(adapted, objective="causal"))
    assert not any("lora" in name for name, _ in twin.module.named_parameters())
    own = rp.ProbedModel(drawn(AttentionOnly), objective="masked", mask_token_id=53, logit_shift=0)
    reading = rp.probe_gradient_cosine(own, pairs_at((2, 5), (5, 1)), controls="untrained")
    row = reading.controls.set_index("control").loc["untrained"]
    assert np.isnan(row["value"]) and "AttentionOnly) cannot be made anew" in row["reason"]
    assert np.isfinite(reading.value), "the reading stands"


@pytest.mark.parametrize("made", [bert, llama], ids=["masked", "causal"])
def test_the_neighbours_gradient_is_that_of_pairs_made_by_hand(made: Callable[[], rp.ProbedModel]) -> None:
    """The reverse query asks for the token beside its target; a causal model only for one behind the evidence."""
    model = made()
    pairs = pairs_at((2, 6), (1, 4)) if model.objective == "causal" else pairs_at((2, 5), (5, 1))
    by_hand = []
    for pair in pairs:
        query = pair.reverse
        [target], [evidence] = query.target_positions, query.evidence_positions
        place = target + 1 if target + 1 < len(query.token_ids) and target + 1 != evidence else target - 1
        moved = rp.Query.unchecked(query.token_ids, (place,), query.evidence_positions)
        by_hand.append(rp.ReversalPair(pair.forward, moved, fact=pair.fact, different_tokens=True))
    expected = rp.probe_gradient_cosine(model, rp.ReversalPairs.from_pairs(by_hand), control=False)
    row = rp.probe_gradient_cosine(model, pairs, controls=["neighbour", "sink"]).controls.set_index("control")
    assert row.loc["neighbour", "value"] == pytest.approx(expected.value, abs=1e-6)
    assert row.loc["sink", "reason"] == NOT_ATTENDED and np.isnan(row.loc["sink", "value"])


def test_the_parent_is_asked_its_own_pairs_and_other_kinds_get_no_difference() -> None:
    child, parent = radd(), gpt2()
    own, theirs = rp.letter_pairs(5, model=child), rp.letter_pairs(5, model=parent)
    reading = rp.probe_gradient_cosine(child, own, controls="parent", parent=(parent, theirs))
    row = reading.controls.set_index("control").loc["parent"]
    assert row["value"] == pytest.approx(rp.probe_gradient_cosine(parent, theirs, control=False).value)
    assert np.isnan(row["difference"]) and "pairs of kind swapped, so without a difference" in row["reason"]
    same = rp.probe_gradient_cosine(child, own, controls="all", parent=child).controls
    assert same["control"].tolist() == ["shuffled", "untrained", "neighbour", "sink", "parent"]
    assert abs(same.set_index("control").loc["parent", "difference"]) < 1e-9


def test_the_default_is_the_shuffle_alone_and_a_part_has_no_controls_of_the_whole(tmp_path: Path) -> None:
    model = radd()
    pairs = rp.letter_pairs(5, model=model)
    plain = rp.probe_attention_correlation(model, pairs)
    assert plain.controls["control"].tolist() == ["shuffled"] and "controls" not in plain.meta
    asked = rp.probe_attention_correlation(model, pairs, controls="all")
    assert asked.controls["control"].tolist() == ["shuffled", "untrained", "neighbour", "sink"]
    again = rp.Reading.load(asked.save(tmp_path / "reading.parquet"))
    assert again.controls.equals(asked.controls)
    assert asked.part(asked.frame).controls["control"].tolist() == ["shuffled"]


class Sinking(nn.Module):
    """Attention that sends all heads to position 0, whatever stands there, through one key that is far larger."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = drawn(lambda: AttentionOnly(heads=2))
        self.first = nn.Parameter(torch.tensor(6.0))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        states = self.inner.embed(input_ids)
        split = lambda x: x.unflatten(-1, (2, -1)).transpose(1, 2)  # noqa: E731
        query, key, value = (split(part(states)) for part in (self.inner.q, self.inner.k, self.inner.v))
        bias = torch.zeros(key.shape[2]).index_fill(0, torch.tensor([0]), 1.0) * self.first
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias.expand(1, 1, 1, -1))
        return self.inner.unembed(mixed.sum(1))


def test_a_planted_sink_is_found() -> None:
    """All weight on position 0: the sink's score is that position's, in every head and query."""
    model = rp.ProbedModel(Sinking().eval(), objective="masked", mask_token_id=53, logit_shift=0)
    pairs = pairs_at((2, 5), (5, 1))
    table = rp.probe_attention_correlation(model, pairs, controls="sink").controls.set_index("control")
    at_zero = [
        rp.ReversalPair(
            *(rp.Query.unchecked(q.token_ids, q.target_positions, (0,)) for q in (pair.forward, pair.reverse)),
            fact=pair.fact,
        )
        for pair in pairs
    ]
    expected = rp.probe_attention_correlation(model, rp.ReversalPairs.from_pairs(at_zero), control=False)
    assert table.loc["sink", "value"] == pytest.approx(expected.value, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"controls": "neighbor"}, "unknown control 'neighbor'; the closest is 'neighbour'"),
        ({"controls": ["untrained", "parent"]}, "control 'parent' needs a model: pass parent=model"),
        ({"controls": ["untrained"], "parent": "gpt2"}, "a parent is given for the controls .*: add 'parent'"),
    ],
)
def test_what_is_asked_for_wrongly_is_said_before_anything_runs(options: dict, words: str) -> None:
    model = gpt2()
    options = options | ({"parent": model} if "parent" in options else {})
    for probe in (rp.probe_attention_correlation, rp.probe_gradient_cosine, rp.probe):
        with pytest.raises(rp.RevprobeError, match=words):
            probe(model, rp.letter_pairs(5, model=model), **options)


def test_no_trace_is_left() -> None:
    model = causal(transformers.LlamaConfig(**GROUPED))
    model.module.train()
    pairs = rp.letter_pairs(5, model=model)
    random = torch.get_rng_state()
    rp.probe(model, pairs, only=["attention", "gradient"], controls="all")
    assert model.module.training and torch.equal(torch.get_rng_state(), random)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())
    assert all(p.grad is None and p.requires_grad for p in model.module.parameters())
