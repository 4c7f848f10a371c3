"""A model in which a layer's weights outweigh its activations, queries for it, and the memory a call takes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

import revprobe as rp
from revprobe.models.bases.configs import LLaDAConfig
from revprobe.models.families.llada import LLaDAForMaskedDiffusion

WIDTH, VOCABULARY = 384, 512


def model(layers: int) -> rp.ProbedModel:
    torch.manual_seed(0)
    config = LLaDAConfig(
        d_model=WIDTH,
        n_heads=4,
        n_kv_heads=4,
        n_layers=layers,
        mlp_hidden_size=3 * WIDTH,
        embedding_size=VOCABULARY,
        vocab_size=VOCABULARY,
        mask_token_id=VOCABULARY - 2,
        pad_token_id=VOCABULARY - 3,
        eos_token_id=VOCABULARY - 3,
    )
    return rp.ProbedModel(LLaDAForMaskedDiffusion(config).eval(), objective="masked", name="wide")


def pairs(count: int, tokens: int) -> rp.ReversalPairs:
    """Random queries: evidence and target, with the same tokens between them, in either order."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for fact in range(count):
        ids = torch.randint(10, VOCABULARY - 10, (tokens,), generator=generator).tolist()
        forward, reverse = rp.Query(ids, [tokens - 1], [0]), rp.Query(ids[::-1], [0], [tokens - 1])
        made.append(rp.ReversalPair(forward, reverse, fact=str(fact)))
    return rp.ReversalPairs.from_pairs(made)


def peak_extra(run: Callable[[], object]) -> int:
    """The most bytes alive at once beyond those before, from the allocator's own events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    assert record.profiler is not None
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
