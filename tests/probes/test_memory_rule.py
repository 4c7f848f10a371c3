"""What the exact probes hold beyond the weights: activations and single layers' products, never a full gradient.

The rule behind the figures at 8B: extra bytes grow with the tokens that are run at once, and hardly with the depth. It
is held here at a width at which a layer's weights outweigh its activations, so a buffer of every weight would show.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import revprobe as rp
from wide import WIDTH, model, pairs, peak_extra

# Of each byte of weights that a model has more: what the probes may hold more. A full gradient is 1.
SHARE = 0.25
# Of each token that is run at once, in numbers of float32 a layer: inputs, outputs and MLP of one layer, twice.
PER_TOKEN = 45 * WIDTH


def weights(probed: rp.ProbedModel) -> int:
    return sum(p.numel() * p.element_size() for p in probed.module.parameters())


PROBES: dict[str, Callable[..., object]] = {
    "gradient": lambda probed, asked: rp.probe_gradient_cosine(probed, asked),
    "fused": lambda probed, asked: rp.probe(probed, asked),
}


def grown(probe: Callable[..., object], shallow: int = 2, deep: int = 6) -> float:
    """Extra bytes that the deeper model needs, as a share of the bytes of weights it has more."""
    asked = pairs(4, 4)
    small, large = model(shallow), model(deep)
    needed = [peak_extra(lambda probed=probed: probe(probed, asked)) for probed in (small, large)]
    return (needed[1] - needed[0]) / (weights(large) - weights(small))


@pytest.mark.parametrize("name", PROBES)
def test_depth_adds_no_gradient_of_the_weights(name: str) -> None:
    assert grown(PROBES[name]) < SHARE


def test_a_full_gradient_beside_the_probe_would_show() -> None:
    """The check above, with a buffer of every weight planted for as long as the probe runs."""

    def with_buffers(probed: rp.ProbedModel, asked: rp.ReversalPairs) -> None:
        held = [torch.empty_like(parameter) for parameter in probed.module.parameters()]
        PROBES["gradient"](probed, asked)
        del held

    assert grown(with_buffers) > 1.0 > SHARE


@pytest.mark.parametrize("name", PROBES)
def test_extra_bytes_follow_the_tokens_that_are_run_at_once(name: str) -> None:
    """Twice the tokens, at most twice the activations: nothing is held for tokens by tokens by weights."""
    probed = model(2)
    few, many = (peak_extra(lambda tokens=tokens: PROBES[name](probed, pairs(4, tokens))) for tokens in (8, 24))
    layers, queries = 2, 8
    per_token = (many - few) / (16 * queries)
    assert 0 < per_token < layers * PER_TOKEN * 4, "bytes of float32"
