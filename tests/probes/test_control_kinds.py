"""Controls on queries and models of every kind: several tokens, begin tokens, blocks, adapters, lists of one's own."""

import copy
from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model

import revprobe as rp
from revprobe.models.peft_adapters import without_wrapper
from revprobe.probes.controls import Controls
from revprobe.probes.passes.untrained import untrained_twin
from tiny import GROUPED, MASK, causal, gpt2, in_blocks, language_model, llama, pairs_at, radd

PROBES = {"attention": rp.probe_attention_correlation, "gradient": rp.probe_gradient_cosine}


def row(reading: rp.Reading, name: str) -> dict:
    return reading.controls.set_index("control").loc[name].to_dict()


def asked(
    queries: Sequence[tuple[Sequence[int], Sequence[int], Sequence[int]]], fact: str, kind: str = "same_target"
) -> rp.ReversalPair:
    forward, reverse = (rp.Query.unchecked(tuple(tokens), tuple(t), tuple(e)) for tokens, t, e in queries)
    return rp.ReversalPair(forward, reverse, kind, fact, different_tokens=True)


def drawn_tokens(count: int, facts: int = 10) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randperm(50, generator=generator)[:count].tolist() for _ in range(facts)]


def test_pairs_without_a_neighbour_are_left_out_counted_and_move_no_other() -> None:
    """Of every third pair the reverse query is evidence and target alone."""
    model = radd()
    pairs, by_hand = [], {"attention": [], "gradient": []}
    for fact, tokens in enumerate(drawn_tokens(6)):
        forward = (tokens, [1], [4])
        if fact % 3 == 0:
            pairs.append(asked([forward, ([tokens[4], tokens[1]], [1], [0])], str(fact)))
            continue
        backward = tokens[:1] + tokens[4:5] + tokens[2:4] + tokens[1:2] + tokens[5:]
        pairs.append(asked([forward, (backward, [4], [1])], str(fact)))
        by_hand["attention"].append(asked([(tokens, [1], [5]), (backward, [4], [2])], str(fact)))
        by_hand["gradient"].append(asked([forward, (backward, [5], [1])], str(fact)))
    for name, probe in PROBES.items():
        expected = probe(model, rp.ReversalPairs.from_pairs(by_hand[name]), control=False)
        found = row(probe(model, rp.ReversalPairs.from_pairs(pairs), controls="neighbour"), "neighbour")
        assert found["value"] == pytest.approx(expected.value, abs=1e-6) and found["facts"] == 6
        assert "4 pairs have no other tokens in sight beside it, and are left out" in found["reason"]
    lone = rp.ReversalPairs.from_pairs(pairs[:1])
    for probe in PROBES.values():
        assert row(probe(model, lone, controls="neighbour"), "neighbour")["reason"].startswith(
            "all pairs have no other"
        )


def test_the_neighbour_of_a_causal_model_is_in_sight() -> None:
    """The token behind the target is as near to the evidence as one before it, and the readout row never sees it."""
    model = llama()
    pairs, by_hand = [], []
    for fact, tokens in enumerate(drawn_tokens(9)):
        backward = tokens[:2] + tokens[3:5] + tokens[2:3] + tokens[5:]
        pairs.append(asked([(tokens, [5], [3, 4]), (backward, [5], [3, 4])], str(fact), "swapped"))
        by_hand.append(asked([(tokens, [5], [1, 2]), (backward, [5], [1, 2])], str(fact), "swapped"))
    reading = rp.probe_attention_correlation(model, rp.ReversalPairs.from_pairs(pairs), controls="neighbour")
    expected = rp.probe_attention_correlation(model, rp.ReversalPairs.from_pairs(by_hand), control=False)
    assert row(reading, "neighbour")["value"] == pytest.approx(expected.value, abs=1e-6)


def test_the_sink_is_a_position_that_every_target_token_sees() -> None:
    """Not the first of two target tokens, to which the second attends most where heads are sharp."""
    model = llama(scale=1.0)
    pairs = []
    for fact, tokens in enumerate(drawn_tokens(9)):
        backward = tokens[:1] + tokens[2:4] + tokens[1:2] + tokens[4:]
        pairs.append(asked([(tokens, [4, 5], [2, 3]), (backward, [4, 5], [1, 2])], str(fact), "swapped"))
    made = rp.ReversalPairs.from_pairs(pairs)
    sink = row(rp.probe_attention_correlation(model, made, controls="sink", layers=[0]), "sink")
    assert sink["n"] == len(pairs) and sink["reason"] == ""
    assert sink["value"] == pytest.approx(sink_by_hand(model, pairs), abs=1e-5)


def sink_by_hand(model: rp.ProbedModel, pairs: list[rp.ReversalPair]) -> float:
    """Layer 0, from eager weights: in logs less a constant of each row, which one group has alike in all positions."""
    correlations = []
    tables = [[best_scores(model, query) for query in (pair.forward, pair.reverse)] for pair in pairs]
    scores = np.array(tables)  # pair side head
    for head in range(scores.shape[2]):
        correlations.append(np.corrcoef(scores[:, 0, head], scores[:, 1, head])[0, 1])
    return float(np.mean(correlations))


def best_scores(model: rp.ProbedModel, query: rp.Query) -> list[float]:
    """Each head's mean score at the position that its readout rows attend to most. Shapes: `-> head`."""
    ids = torch.tensor([query.token_ids])
    layer = model.module.model.layers[0]
    with torch.no_grad():
        states = layer.input_layernorm(model.module.model.embed_tokens(ids))
        cos, sin = model.module.model.rotary_emb(states, torch.arange(ids.shape[1])[None])
        split = lambda x: x.view(1, ids.shape[1], -1, 8).transpose(1, 2)  # noqa: E731
        q, k = split(layer.self_attn.q_proj(states)), split(layer.self_attn.k_proj(states))
        q, k = transformers.models.llama.modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
        scores = (q @ k.repeat_interleave(2, 1).mT / 8**0.5)[0]
    rows = [position - 1 for position in query.target_positions]
    future = torch.ones(len(scores[0]), len(scores[0]), dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)[:, rows].mean(1)
    seen = [p for p in range(rows[0] + 1) if p not in query.evidence_positions]
    picked = [seen[int(head[seen].argmax())] for head in weights]
    return [float(scores[head][rows, position].mean()) for head, position in enumerate(picked)]


@pytest.mark.parametrize(("size", "place"), [(None, 2), (4, 5)], ids=["whole", "blocks"])
def test_a_begin_token_put_before_counts_for_blocks_and_is_never_asked_for(size: int | None, place: int) -> None:
    """The reverse target stands at position 0, so all queries begin with token 54 and blocks end one token earlier."""
    model = in_blocks(size, shift=1)
    pairs, by_hand = [], []
    for fact, tokens in enumerate(drawn_tokens(8)):
        backward = [tokens[6], *tokens[1:3], tokens[0], *tokens[3:6], tokens[7]]
        pairs.append(asked([(tokens, [6], [0]), (backward, [0], [3])], str(fact)))
        by_hand.append(asked([([54, *tokens], [7], [1]), ([54, *backward], [place], [4])], str(fact)))
    given = rp.ReversalPairs.from_pairs(pairs)
    found = row(rp.probe_gradient_cosine(model, given, controls="neighbour"), "neighbour")
    expected = rp.probe_gradient_cosine(model, rp.ReversalPairs.from_pairs(by_hand), control=False)
    assert found["value"] == pytest.approx(expected.value, abs=1e-6) and found["n"] == expected.n > 0


def test_a_hidden_token_is_no_neighbour_to_ask_for() -> None:
    """Queries that show the mask token beside their target, as half-written answers do."""
    model = radd()
    pairs, by_hand = [], []
    for fact, tokens in enumerate(drawn_tokens(7)):
        backward = [*tokens[:3], tokens[4], MASK, tokens[5], tokens[1]]
        pairs.append(asked([(tokens, [4], [1]), (backward, [3], [6])], str(fact)))
        by_hand.append(asked([(tokens, [4], [1]), (backward, [2], [6])], str(fact)))
    found = row(rp.probe_gradient_cosine(model, rp.ReversalPairs.from_pairs(pairs), controls="neighbour"), "neighbour")
    expected = rp.probe_gradient_cosine(model, rp.ReversalPairs.from_pairs(by_hand), control=False)
    assert found["value"] == pytest.approx(expected.value, abs=1e-6)


def test_groups_of_a_neighbour_are_by_its_own_distance() -> None:
    """Where the evidence ends a query the neighbour stands before it: two places, which a head may like unequally."""
    model = radd("alibi")
    pairs, by_hand = [], []
    for fact, tokens in enumerate(drawn_tokens(8, facts=24)):
        sides, moved = [], []
        for length in (8, 8 - fact % 2):
            sides.append((tokens[:length], [3], [6]))
            moved.append((tokens[:length], [3], [7 if length == 8 else 5]))
        pairs.append(asked(sides, str(fact)))
        by_hand.append(asked(moved, str(fact)))
    found = row(
        rp.probe_attention_correlation(model, rp.ReversalPairs.from_pairs(pairs), controls="neighbour"), "neighbour"
    )
    expected = rp.probe_attention_correlation(model, rp.ReversalPairs.from_pairs(by_hand), control=False)
    assert found["value"] == pytest.approx(expected.value, abs=1e-6)


def test_padded_batches_give_what_queries_alone_give() -> None:
    model, pairs = llama(), pairs_at((2, 6), (1, 6), ragged=True)
    for probe in PROBES.values():
        together, alone = (probe(model, pairs, controls="all", batch_size=size).controls for size in (None, 1))
        assert np.allclose(together["value"], alone["value"], atol=1e-5, equal_nan=True)


def test_probes_of_lists_of_their_own_have_the_controls_of_their_lists() -> None:
    model = radd()
    pairs = rp.letter_pairs(5, model=model)
    assert pairs.by_probe, "letters give the attention probe a list of its own"
    for reading in rp.probe(model, pairs, only=["attention", "gradient"], controls=["neighbour", "untrained"]):
        name = reading.name.split("_")[0]
        alone = PROBES[name](model, pairs.for_probe(name), controls=["all"])
        for control in ("neighbour", "untrained"):
            expected = row(alone, control)["value"]
            assert row(reading, control)["value"] == pytest.approx(expected, abs=1e-6, nan_ok=True)


# --- the untrained twin ---------------------------------------------------------------------------------------------


def test_a_twin_in_bfloat16_keeps_what_its_model_keeps_in_float32() -> None:
    module = language_model(transformers.LlamaConfig(**GROUPED), dtype=torch.bfloat16).eval()
    twin = untrained_twin(rp.ProbedModel(module, rp.letter_tokenizer(), objective="causal"))
    assert {p.dtype for p in twin.module.parameters()} == {torch.bfloat16}
    for (name, own), made in zip(module.named_buffers(), twin.module.buffers(), strict=True):
        assert own.dtype == made.dtype and torch.equal(own, made), name
    pairs = rp.letter_pairs(5, model=twin)
    reading = rp.probe_attention_correlation(rp.ProbedModel(module, objective="causal"), pairs, controls="all")
    assert np.isfinite(reading.controls["value"]).all()


@pytest.mark.parametrize("wrapped", [True, False], ids=["PeftModel", "adapter inside"])
def test_the_twin_of_an_adapted_model_reads_the_parameters_by_their_names_in_the_base(wrapped: bool) -> None:
    base = llama()
    made = get_peft_model(
        copy.deepcopy(base.module),
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, modules_to_save=["lm_head"]),
    )
    module = made if wrapped else without_wrapper(made)
    model = rp.ProbedModel(module, rp.letter_tokenizer(), objective="causal")
    pairs = rp.letter_pairs(5, model=base)
    reading = rp.probe_gradient_cosine(model, pairs, layers=[1], controls="untrained")
    expected = rp.probe_gradient_cosine(untrained_twin(base), pairs, layers=[1], control=False)
    assert row(reading, "untrained")["value"] == pytest.approx(expected.value, abs=1e-6)
    lora = [name for name, _ in module.named_parameters() if "lora" in name]
    alone = row(rp.probe_gradient_cosine(model, pairs, parameters=lora, controls="untrained"), "untrained")
    assert np.isnan(alone["value"]) and "adapters are left out" in alone["reason"]


def test_the_twin_of_a_prompted_model_has_no_virtual_tokens() -> None:
    base = gpt2()
    prompted = get_peft_model(
        copy.deepcopy(base.module), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    )
    model = rp.ProbedModel(prompted, rp.letter_tokenizer(), objective="causal")
    pairs = rp.letter_pairs(5, model=base)
    for probe in PROBES.values():
        expected = probe(untrained_twin(base), pairs, control=False)
        assert row(probe(model, pairs, controls="untrained"), "untrained")["value"] == pytest.approx(
            expected.value, abs=1e-6
        )


def test_a_model_that_its_configuration_does_not_make_has_no_twin() -> None:
    model = gpt2()
    model.module.transformer.h[0].mlp.c_fc.weight = torch.nn.Parameter(torch.randn(16, 32))
    model.module.transformer.h[0].mlp.c_fc.nf = 32
    model.module.transformer.h[0].mlp.c_fc.bias = torch.nn.Parameter(torch.randn(32))
    model.module.transformer.h[0].mlp.c_proj.weight = torch.nn.Parameter(torch.randn(32, 16))
    reading = rp.probe_gradient_cosine(model, rp.letter_pairs(5, model=model), controls="untrained")
    assert "parameter 'transformer.h.0.mlp.c_fc.weight' is of another shape" in row(reading, "untrained")["reason"]


# --- the table ------------------------------------------------------------------------------------------------------


def test_what_was_not_shuffled_stands_in_the_table_with_its_reason() -> None:
    model = radd()
    pairs = rp.letter_pairs(5, model=model)
    without = rp.probe_gradient_cosine(model, pairs, control=False, controls=["shuffled", "sink"]).controls
    assert without["control"].tolist() == ["shuffled", "sink"] and without["value"].dtype == np.float64
    assert without["reason"][0] == "not taken: control=False"
    lone = rp.probe_attention_correlation(model, pairs.for_probe("attention")[:1]).controls
    assert np.isnan(lone["value"][0]) and lone["reason"][0] == "no group has two facts to shuffle"
    two = rp.probe_attention_correlation(model, pairs_at((2, 5), (5, 1), count=2)).controls
    assert np.isnan(two["value"][0]) and two["reason"][0] == "the reading has no number, so neither has its shuffle"


def test_a_neighbour_behind_a_window_is_not_called_evidence() -> None:
    """The evidence is the last that a window of four reaches, and its two nearest free tokens stand before it."""
    model = causal(transformers.MistralConfig(**GROUPED, sliding_window=4))
    pairs = []
    for fact, tokens in enumerate(drawn_tokens(8)):
        backward = [tokens[1], tokens[0], *tokens[2:]]
        pairs.append(asked([(tokens, [4, 5, 6], [2, 3]), (backward, [4, 5, 6], [2, 3])], str(fact), "swapped"))
    reading = rp.probe_attention_correlation(model, rp.ReversalPairs.from_pairs(pairs), controls="neighbour")
    found = row(reading, "neighbour")
    assert "neighbour hidden by the attention mask" in found["reason"], found


def test_a_parent_asked_about_other_facts_says_that_there_is_no_difference() -> None:
    model, pairs = radd(), pairs_at((2, 5), (5, 1), count=20)
    reading = rp.probe_gradient_cosine(model, pairs[:10], controls="parent", parent=(model, pairs[10:]))
    found = row(reading, "parent")
    assert np.isfinite(found["value"]) and np.isnan(found["difference"]) and "of no fact that" in found["reason"]


def test_too_few_facts_are_said_of_a_control_and_of_its_difference() -> None:
    model, pairs = radd(), pairs_at((2, 5), (5, 1), count=2)
    found = row(rp.probe_gradient_cosine(model, pairs, controls="untrained"), "untrained")
    assert "facts" in found["reason"] and "difference: " in found["reason"]


def test_a_control_without_variance_in_some_groups_is_compared_on_the_others_and_counts_them() -> None:
    """Eight facts in four places; beside the evidence of two places every head gives the same score."""

    def reading(flat: tuple[int, ...], model: str) -> rp.Reading:
        draw = np.random.default_rng(0)
        group, fact = np.repeat(np.arange(4), 8), np.tile(np.arange(8), 4)
        x = draw.normal(size=32)
        y = np.where(group < 2, x, -x) + 0.2 * draw.normal(size=32)
        columns = {"pair": np.arange(32), "fact": fact.astype(str), "group": group, "layer": 0, "head": 0}
        columns |= {"score_forward": np.where(np.isin(group, flat), 1.0, x), "score_reverse": y, "reason": ""}
        about = {"model": model, "kind": "same_target", "pair_count": 32, "seed": 0}
        return rp.Reading("attention_correlation", pd.DataFrame(columns), about)

    own, other = reading((), "own"), reading((2, 3), "beside")
    asked = Controls(("neighbour",)).beside(own, {"neighbour": lambda: other})
    found = row(asked, "neighbour")
    assert (found["n"], found["facts"]) == (16, 8) and "2 no variance within the group" in found["reason"]
    assert found["difference"] == pytest.approx(0, abs=1e-12), "the same scores where both have a correlation"
    assert "difference: over the 16 of 32 pairs (8 facts) that have a part in both" in found["reason"]
