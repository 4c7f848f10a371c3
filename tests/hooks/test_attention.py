"""The tap sees the scores the model used: against hand-computed attention, and with faults planted."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from revprobe import RaddConfig, RaddForMaskedLM, RevprobeError, one_layer_gpt2
from revprobe.hooks.attention import AttentionRows, tap_attention
from revprobe.hooks.attention_sites import Attention, AttentionSite
from tiny import tapped


def slow_scores(call: dict) -> torch.Tensor:
    """Every score of a call, one product at a time."""
    query, key = call["query"], call["key"]
    batch, heads, seq, dim = query.shape
    scores = torch.zeros(batch, heads, seq, key.shape[2], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(seq):
                for j in range(key.shape[2]):
                    kv = h * key.shape[1] // heads
                    scores[b, h, i, j] = float(query[b, h, i].double() @ key[b, kv, j].double()) * (
                        call.get("scale") or dim**-0.5
                    )
                    if call.get("is_causal") and j > i:
                        scores[b, h, i, j] = -torch.inf
    mask = call.get("attn_mask")
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask


class Calls(nn.Module):
    """Code of somebody else, which makes one attention call."""

    def forward(self, **call) -> torch.Tensor:
        return F.scaled_dot_product_attention(**call)


def read(call: dict, rows: torch.Tensor, columns: torch.Tensor) -> AttentionRows:
    model, seq = Calls(), call["query"].shape[2]
    alone = Attention((AttentionSite(0, "", call["query"].shape[1], "sdpa"),), {"": 1}, {})
    with tap_attention(model, rows, columns, alone, (seq, call["key"].shape[2])) as tap:
        model(**call)
    return tap.layers()[0]


def random_call(kv_heads: int = 2, **extra) -> dict:
    generator = torch.Generator().manual_seed(0)
    draw = lambda heads: torch.randn(3, heads, 5, 4, generator=generator)  # noqa: E731
    return {"query": draw(2), "key": draw(kv_heads), "value": draw(kv_heads), **extra}


MASKS = {
    "no mask": {},
    "causal": {"is_causal": True},
    "boolean padding": {"attn_mask": torch.tensor([1, 1, 1, 0, 0]).bool()[None, None, None].expand(3, 1, 5, 5)},
    "additive per head": {"attn_mask": torch.linspace(-1, 0, 50).reshape(1, 2, 5, 5)},
    "two-dimensional": {"attn_mask": torch.ones(5, 5).tril().bool()},
    "scale": {"scale": 0.7},
    "grouped keys": {"kv_heads": 1, "enable_gqa": True},
}


@pytest.mark.parametrize("case", MASKS)
def test_rows_of_a_call_equal_the_slow_scores(case):
    call = random_call(**MASKS[case])
    rows, columns = torch.tensor([[0, 4], [2, 3], [4, 1]]), torch.tensor([[1, 2], [0, 4], [3, 3]])
    seen = read(call, rows, columns)
    everything = slow_scores(call)
    for b in range(3):
        expected = everything[b][:, rows[b]]
        torch.testing.assert_close(seen.score[b].double(), expected[:, :, columns[b]], atol=1e-6, rtol=0)
        torch.testing.assert_close(seen.weight[b].double(), expected.softmax(-1)[:, :, columns[b]], atol=1e-6, rtol=0)
    torch.testing.assert_close(seen.mass, torch.ones_like(seen.mass))


def test_a_fully_masked_row_has_no_weight_instead_of_nan():
    call = random_call(attn_mask=torch.zeros(5, 5).bool())
    seen = read(call, torch.tensor([[0]] * 3), torch.tensor([[1]] * 3))
    assert seen.score.isneginf().all() and (seen.weight == 0).all() and (seen.mass == 0).all()


@pytest.mark.parametrize(
    "make", [lambda: RaddForMaskedLM(RaddConfig(n_layers=3, n_heads=2)), lambda: one_layer_gpt2(n_layers=3, n_heads=2)]
)
def test_each_layer_is_seen_once_and_attributed_to_its_module(make):
    model = make().eval()
    rows, columns = torch.tensor([[2]]), torch.tensor([[0]])
    with torch.no_grad(), tapped(model, rows, columns, 4) as tap:
        model(torch.tensor([[4, 0, 30, 0]]))
    layers = tap.layers()
    assert list(layers) == [0, 1, 2] and all(call.score.shape == (1, 2, 1, 1) for call in layers.values())
    assert all(f".{layer}." in call.site for layer, call in layers.items())


def test_the_tap_changes_nothing_and_leaves_no_hook_even_when_the_model_raises():
    model = RaddForMaskedLM(RaddConfig()).eval()
    ids, at = torch.tensor([[4, 0, 30]]), torch.tensor([[0]])
    plain = model(ids).logits
    with tapped(model, at, at, 3):
        assert torch.equal(model(ids).logits, plain)
    with pytest.raises(RevprobeError), tapped(model, at, at, 3):
        model(torch.zeros(1, 99, dtype=torch.long))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_model_whose_attention_is_never_seen_says_how_to_load_it():
    with pytest.raises(RevprobeError, match="attn_implementation='sdpa'"):
        Attention((), {}, {}).require("a model")


def test_third_party_code_is_seen_without_an_adapter():
    x, at = torch.randn(1, 1, 3, 4), torch.tensor([[1]])
    seen = read({"query": x, "key": x, "value": x, "scale": 1.0}, at, at)
    torch.testing.assert_close(seen.score.flatten(), (x[0, 0, 1] @ x[0, 0, 1])[None])


def test_what_could_not_be_read_of_a_batch_names_the_model():
    x, at = torch.randn(1, 1, 3, 4), torch.tensor([[1]])
    alone = Attention((AttentionSite(0, "", 1, "sdpa"),), {"": 1}, {})
    with tap_attention(model := Calls(), at, at, alone, (4, 4)) as tap:  # a batch of four tokens
        model(query=x, key=x, value=x)
    with pytest.raises(RevprobeError, match=r"no attention of their model can be read: their model: .*blocks"):
        tap.layers("their model")


def test_a_mask_of_lowest_numbers_hides_as_one_of_minus_infinity_does():
    """Falcon adds ALiBi and the dtype's lowest number: unnoticed, a hidden position would score -3.4e38."""
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
    for lowest in (torch.finfo(torch.float32).min, float("-inf")):
        call = random_call(attn_mask=torch.zeros(5, 5).masked_fill(hidden, lowest)[None, None])
        rows, columns = torch.full((len(call["query"]), 1), 2), torch.tensor([[1, 4]]).expand(len(call["query"]), -1)
        seen = read(call, rows, columns)
        assert seen.score[..., 0].isfinite().all() and (seen.score[..., 1] == float("-inf")).all()
        assert (seen.weight[..., 1] == 0).all() and torch.allclose(seen.mass, torch.ones_like(seen.mass))
