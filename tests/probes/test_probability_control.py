"""Whose query the control of a probability prices a target at: one that asks for something else."""

import numpy as np
import pytest
import torch
from torch import nn

import revprobe as rp
from revprobe.probes.passes.likelihood import target_partners
from tiny import MASK, gpt2, in_blocks


class Knows(nn.Module):
    """Answers every query with the right one of two answers, 40 where the word before is even, else 41; sure of it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(56, 56)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        answer = 40 + input_ids[:, :1] % 2
        later = self.embed(input_ids).mean(1, keepdim=True)  # a masked model sees what comes after
        return 30.0 * nn.functional.one_hot(answer.expand_as(input_ids), 56) + 0.1 * later


def many_to_one(answers: list[list[int]]) -> rp.ReversalPairs:
    """Fact i is asked for answers[i] by word 10 + i."""
    pairs = []
    for i, answer in enumerate(answers):
        query = rp.Query([10 + i, 2, *answer, 3], range(2, 2 + len(answer)), [0])
        pairs.append(rp.ReversalPair(query, query, fact=str(i)))
    return rp.ReversalPairs.from_pairs(pairs)


def test_facts_with_the_same_answer_are_no_control_of_one_another():
    """Of a model that is always right the control would be half right: it has to be wrong throughout."""
    model = rp.ProbedModel(Knows().eval(), objective="masked", mask_token_id=MASK, logit_shift=0)
    pairs = many_to_one([[40 + i % 2] for i in range(10)])
    for seed in range(5):
        reading = rp.probe_reverse_probability(model, pairs, seed=seed)
        assert reading.value == pytest.approx(1.0) and reading.frame["probability_control"].max() < 1e-6
        assert reading.frame["probability_control"].notna().all()


def test_an_answer_of_other_length_is_passed_over_where_another_will_do():
    pairs = many_to_one([[20], [21, 22], [23], [24, 25], [20]])
    for seed in range(5):
        for partner in target_partners(pairs, 0, seed=seed).values():
            targets = [pairs.queries[q].target for q in pairs.reverse]
            assert all(other >= 0 for other in partner)
            assert all(len(targets[i]) == len(targets[o]) and targets[i] != targets[o] for i, o in enumerate(partner))
    assert (target_partners(many_to_one([[20], [20], [21, 22]]), 0)["forward"] == -1).all()


def test_distinct_answers_have_the_partners_they_had():
    """The shuffle of facts of the other probes, so that no number moves where no two facts share an answer."""
    from revprobe.probes.statistics.resampling import derangement

    pairs = many_to_one([[20 + i] for i in range(7)])
    found = target_partners(pairs, 0, seed=3)
    for partner in found.values():
        np.testing.assert_array_equal(partner, derangement(pairs.facts.astype(str), pairs.groups(0), seed=3))


def shown(query: rp.Query, *, causal: bool) -> str:
    """What a model sees of a query, as text."""
    words = ["?" if p in query.target_positions else str(token) for p, token in enumerate(query.token_ids)]
    return " ".join(words[: query.target_positions[0]] if causal else words)


@pytest.mark.parametrize("causal", [False, True])
def test_targets_of_one_shown_query_are_counted_and_cautioned(causal: bool):
    """A model that knows both parents of every child cannot rank both first: half right reads as half known."""
    answers = [[20], [21], [22], [23], [23], [24, 25], [24], [26], [27], [28]]
    asked_by = [10, 10, 11, 11, 11, 12, 12, 13, 14, 14]
    pairs = []
    for i, (answer, by) in enumerate(zip(answers, asked_by, strict=True)):
        query = rp.Query([by, 2, *answer, 3], range(2, 2 + len(answer)), [0])
        pairs.append(rp.ReversalPair(query, query, fact=str(i)))
    listed = rp.ReversalPairs.from_pairs(pairs)
    model = gpt2() if causal else rp.ProbedModel(Knows().eval(), objective="masked", mask_token_id=MASK, logit_shift=0)
    reading = rp.probe_reverse_probability(model, listed)
    rows = reading.frame[reading.frame["direction"] == "reverse"]
    views = [shown(pair.reverse, causal=causal) for pair in pairs]
    slow = [len({tuple(other) for other, view in zip(answers, views, strict=True) if view == own}) for own in views]
    # "24" and "24 25" begin alike: a causal model may hold both likeliest; a masked one sees how many are hidden.
    slow[5:7] = [1, 1]
    assert rows["targets"].tolist() == slow == [2, 2, 2, 2, 2, 1, 1, 1, 2, 2]
    assert "7 of 10 pairs show a query that has other right targets too (up to 2 to a query)" in reading.caution
    cautions = reading.measures().set_index("measure")["caution"]
    assert all("7 of 10 pairs" in cautions[name] for name in cautions.index) and len(cautions) == 4
    for same in ({0, 1}, {8, 9}):
        assert rows["argmax_match"].to_numpy()[sorted(same)].sum() <= 1
    assert reading.summary(by="direction")["caution"].str.contains("7 of 10 pairs").all()


def test_without_such_targets_there_is_no_column_and_no_caution():
    reading = rp.probe_reverse_probability(gpt2(), many_to_one([[20 + i] for i in range(20)]))
    assert "targets" not in reading.frame and reading.caution == ""


def test_queries_without_a_number_show_no_other_targets():
    """Their evidence is out of sight: all that is seen of them is their template, and none has a probability."""
    pairs = rp.ReversalPairs.from_pairs(
        rp.ReversalPair(
            rp.Query([45, 20 + i, 46, 47, 48, i], [5], [1]), rp.Query([45, i, 46, 47, 48, 20 + i], [1], [5])
        )
        for i in range(10)
    )
    reading = rp.probe_reverse_probability(in_blocks(4), pairs)
    assert reading.n == 0 and "targets" not in reading.frame and reading.caution == ""
