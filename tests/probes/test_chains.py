"""How a target of several tokens is priced left to right: against a loop over runs, in how many, in what batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import revprobe as rp
from revprobe.probes.passes.batches import queries_per_batch
from revprobe.probes.passes.plan import Plan
from revprobe.probes.passes.run import _Pass
from tiny import FIXTURES

TOKENS = 3


def pairs(tokens: int = TOKENS, facts: int = 5) -> rp.ReversalPairs:
    """Evidence at 0 or 1, the target at the end; no two targets alike, so that each query is priced for two."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for fact in range(facts):
        ids = torch.randint(8, 60, (9,), generator=generator).tolist()
        target = range(9 - tokens, 9)
        found.append(
            rp.ReversalPair(
                rp.Query(ids, target, [0]), rp.Query([ids[1], ids[0], *ids[2:]], target, [1]), fact=str(fact)
            )
        )
    return rp.ReversalPairs.from_pairs(found)


def by_hand(model: rp.ProbedModel, query: rp.Query, target: tuple[int, ...]) -> tuple[float, int]:
    """Log-probability and worst rank: the target hidden, then its tokens shown one after the other, a run each."""
    tokens = torch.tensor([query.token_ids])
    tokens[0, list(query.target_positions)] = model.mask_token_id
    total, worst = 0.0, 0
    for place, token in zip(query.target_positions, target, strict=True):
        logs = model.logits(tokens, None)[0, place - model.logit_shift].double().log_softmax(-1)
        total, worst = total + logs[token].item(), max(worst, int((logs >= logs[token]).sum()))
        tokens[0, place] = token
    return total, worst


@contextmanager
def counted_rows(model: rp.ProbedModel) -> Iterator[list[int]]:
    """The sequences of every run of the model."""
    rows: list[int] = []
    hook = model.module.register_forward_hook(
        lambda module, args, kwargs, output: rows.append(len(first(args, kwargs))), with_kwargs=True
    )
    try:
        yield rows
    finally:
        hook.remove()


def first(args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> Tensor:
    return args[0] if args else kwargs["input_ids"]


@pytest.mark.parametrize("name", ["llada-tiny", "dream-tiny"])
@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_it_is_the_product_of_runs_that_reveal_one_token_after_the_other(name: str, batch_size: int | None) -> None:
    model, asked = rp.load_model(FIXTURES / name), pairs()
    frame = rp.probe_reverse_probability(model, asked, batch_size=batch_size).frame
    frame = frame[frame["direction"] == "reverse"]
    with torch.no_grad():
        for row, pair in zip(frame.itertuples(), asked, strict=True):
            value, rank = by_hand(model, pair.reverse, pair.reverse.target)
            assert abs(row.log_probability - value) < 1e-5 and row.rank == rank


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_what_the_query_alone_tells_is_not_run_again(tokens: int) -> None:
    """A run of each query, and for its own target and the control's one for each token after the first."""
    model, asked = rp.load_model(FIXTURES / "llada-tiny"), pairs(tokens)
    rp.probe(model, asked)  # what is found out about a model once has been found out
    with counted_rows(model) as rows:
        rp.probe_reverse_probability(model, asked)
    later = 2 * (tokens - 1) * len(asked.queries)
    assert sum(rows) == len(asked.queries) + later
    with counted_rows(model) as fused:
        rp.probe(model, asked)
    with counted_rows(model) as others:
        rp.probe(model, asked, only=["attention", "gradient"])
    assert sum(fused) == sum(others) + later


def test_processes_that_share_a_pass_agree_wherever_a_query_was_run() -> None:
    model, asked = rp.load_model(FIXTURES / "llada-tiny"), pairs()
    whole = rp.probe_reverse_probability(model, asked).frame.query("direction == 'reverse'")
    plan = Plan(probability=True, control=True, batch_size=2)
    parts = [_Pass(model, asked, plan, part, 3).run().likelihoods.answers for part in range(3)]
    assert sum(map(len, parts)) == 4 * len(asked), "each request once"
    together = {request: answer for part in parts for request, answer in part.items()}
    for row, query, pair in zip(whole.itertuples(), asked.reverse.tolist(), asked, strict=True):
        assert abs(together[query, pair.reverse.target][0] - row.log_probability) < 1e-5


@pytest.mark.parametrize(
    ("width", "device", "length", "queries"),
    [
        (100, "cpu", 16, 512),
        (90_000, "cpu", 16, 8),
        (90_000, "cpu", 64, 2),
        (90_000, "cuda", 64, 8),
        (90_000, "cpu", 300, 2),
    ],
)
def test_a_large_models_batches_shrink_to_few_tokens(width: int, device: str, length: int, queries: int) -> None:
    """At 8.1 billion weights; a batch of 512 tokens with gradients took 6 GiB beside the 8 billion of LLaDA."""
    model: Any = SimpleNamespace(
        module=torch.nn.Linear(width, width, device="meta"), device=torch.device(device), draws=1, canvas_length=None
    )
    asked = [rp.Query(list(range(length)), [length - 1], [0])]
    assert queries_per_batch(model, asked) == queries
    assert queries_per_batch(model, asked, batch_size=3) == 3
