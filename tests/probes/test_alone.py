"""Models that change with the length or the number of queries, beyond what a short trial shows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import revprobe as rp
from revprobe import ProbedModel, Query, ReversalPair, ReversalPairs, RevprobeError
from revprobe.probes.passes.shared_out import WorkerShare
from tiny import GROUPED, MASK, drawn, language_model


def long_pairs(lengths: tuple[int, ...], swapped: bool = False) -> ReversalPairs:
    draws, pairs = np.random.default_rng(1), []
    for fact, length in enumerate(lengths):
        one, other = (draws.permutation(50)[:length].tolist() for _ in range(2))
        target = length - 1 if swapped else length - 3
        if swapped:
            other = [word for word in range(50) if word not in (one[-1], one[1])][:length]
            other[1], other[-1] = one[-1], one[1]
            pairs.append(ReversalPair(Query(one, [target], [1]), Query(other, [target], [1]), "swapped", str(fact)))
        else:
            pairs.append(ReversalPair(Query(one, [target], [1]), Query(one[::-1], [2], [length - 2]), fact=str(fact)))
    return ReversalPairs.from_pairs(pairs)


def worst(model: ProbedModel, pairs: ReversalPairs, reading: rp.Reading) -> float:
    """The largest difference from each query's own run, nats."""
    apart = []
    for row in reading.frame.itertuples():
        query = getattr(pairs[row.pair], row.direction)
        ids = torch.tensor([query.token_ids])
        if model.objective == "masked":
            ids[0, query.target_positions[0]] = MASK
        with torch.no_grad():
            out = model.module(ids)
        logits = out if isinstance(out, Tensor) else out.logits
        right = logits[0, query.target_positions[0] - model.logit_shift].double().log_softmax(-1)[query.target[0]]
        apart.append(abs(row.log_probability - float(right)))
    return max(apart)


def test_rotary_factors_of_the_longest_row_are_not_given_to_the_others():
    factors = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16}
    factors |= {"short_factor": [1.0] * 4, "long_factor": [6.0, 9.0, 20.0, 30.0], "factor": 4.0}
    config = transformers.LlamaConfig(**GROUPED, rope_parameters=factors)
    model = ProbedModel(drawn(language_model(config), scale=0.3), objective="causal")
    assert not model.contract.equal_lengths, "short rows show nothing"
    pairs = long_pairs((20, 13, 18, 12), swapped=True)
    reading = rp.probe_reverse_probability(model, pairs)
    assert worst(model, pairs, reading) < 1e-4
    assert "one differs from itself alone" in reading.meta["batches"]


class Pools(nn.Module):
    """From `start` tokens, or rows, on something else is added."""

    def __init__(self, rows: int = 99, tokens: int = 99) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head, self.rows, self.tokens = nn.Embedding(56, 16), nn.Linear(16, 56), rows, tokens

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        words = self.embed(input_ids)
        seen = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        words = words + (words * seen[..., None]).sum(1, keepdim=True) / seen.sum(1)[:, None, None]
        words = words + words.mean(1, keepdim=True) * (input_ids.shape[1] >= self.tokens)
        return self.head(words + words.mean(0, keepdim=True) * (len(input_ids) >= self.rows))


def test_what_begins_beyond_the_trials_length_is_found_by_the_first_long_batch():
    model = ProbedModel(Pools(tokens=16).eval(), objective="masked", mask_token_id=MASK, logit_shift=0)
    pairs = long_pairs((18, 17, 13, 18))
    readings = rp.probe(model, pairs, only=["probability", "gradient"])
    assert worst(model, pairs, readings["reverse_probability"]) < 1e-4 and model.contract.equal_lengths


def test_workers_that_find_it_are_asked_again_with_lengths_apart():
    """One of several processes that find out alone would leave the others' batches padded."""
    pairs = long_pairs((18, 17, 13, 18))
    own, theirs = (
        ProbedModel(Pools(tokens=16).eval(), objective="masked", mask_token_id=MASK, logit_shift=0) for _ in range(2)
    )

    class Team:
        size, asked = 2, 0

        def ask(self, question, parts, told=None):
            self.asked += 1
            return [question(theirs, part) for part in range(parts)]

    team = Team()
    readings = rp.probe(own, pairs, only=["probability", "gradient"], share=WorkerShare(team))
    assert worst(own, pairs, readings["reverse_probability"]) < 1e-4
    assert team.asked == 2 and own.contract.equal_lengths and theirs.contract.equal_lengths
    assert readings["reverse_probability"].meta["batches"].startswith("of equal lengths only")


def test_rows_that_reach_each_other_in_large_batches_are_refused():
    model = ProbedModel(Pools(rows=5).eval(), objective="masked", mask_token_id=MASK, logit_shift=0)
    pairs = long_pairs((9, 9, 9, 9))
    with pytest.raises(RevprobeError, match="would depend on the batch; use batch_size=1"):
        rp.probe_reverse_probability(model, pairs)
    assert worst(model, pairs, rp.probe_reverse_probability(model, pairs, batch_size=1)) < 1e-5


def test_rows_sorted_inside_by_their_lengths_do_not_lend_each_other_their_attention():
    class Sorts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = drawn(
                transformers.BertForMaskedLM(
                    transformers.BertConfig(
                        vocab_size=56, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
                    )
                ),
                scale=0.4,
            )

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            order = mask.sum(1).argsort(descending=True, stable=True)
            return self.inner(input_ids[order], attention_mask=mask[order]).logits[order.argsort()]

    model = ProbedModel(Sorts().eval(), objective="masked", mask_token_id=MASK, logit_shift=0)
    pairs = long_pairs((8, 11, 9, 10))
    frame = rp.probe_attention_correlation(model, pairs, control=False).frame
    for row in frame.itertuples():
        query = pairs[row.pair].forward
        ids = torch.tensor([query.token_ids])
        ids[0, query.target_positions[0]] = MASK
        model.module.inner.set_attn_implementation("eager")
        with torch.no_grad():
            weights = model.module.inner(ids, output_attentions=True).attentions[row.layer][0, row.head]
        model.module.inner.set_attn_implementation("sdpa")
        assert row.weight_forward == pytest.approx(float(weights[query.target_positions[0], 1]), abs=1e-4)


def test_a_sound_model_is_held_once_for_a_size():
    model = ProbedModel(drawn(language_model(transformers.LlamaConfig(**GROUPED))), objective="causal")
    sizes: list[int] = []
    model.module.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    pairs = long_pairs((18, 17, 13, 18), swapped=True)
    rp.probe_reverse_probability(model, pairs, control=False)
    first = list(sizes)
    sizes.clear()
    rp.probe_reverse_probability(model, pairs, control=False)
    # The last of the shortest and the last of all, before the batch.
    assert first[-3:] == [1, 1, 8] and sizes == [8]
