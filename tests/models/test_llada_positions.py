"""LLaDA with learned positions (`rope: false` in the published config), against the published formula written out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from revprobe import Query, ReversalPair, ReversalPairs, load_model, probe_gradient_cosine
from revprobe.models.bases.configs import LLaDAConfig
from revprobe.models.families.llada import LLaDAForMaskedDiffusion
from revprobe.models.probed import ProbedModel
from revprobe.models.rotary import layer_positions


@pytest.fixture
def model() -> LLaDAForMaskedDiffusion:
    torch.manual_seed(0)
    config = LLaDAConfig(
        d_model=16,
        n_heads=2,
        n_layers=2,
        mlp_hidden_size=24,
        max_sequence_length=12,
        rope=False,
        vocab_size=20,
        mask_token_id=19,
        init_std=0.3,
    )
    return LLaDAForMaskedDiffusion(config).eval()


def by_hand(model: LLaDAForMaskedDiffusion, ids: torch.Tensor) -> torch.Tensor:
    """Embedding plus position, then blocks without any rotation. Shapes: `batch seq -> batch seq vocab`."""

    def norm(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return states * torch.rsqrt(states.square().mean(-1, keepdim=True) + 1e-5) * weight

    tensors = dict(model.named_parameters())
    states = tensors["model.embed_tokens.weight"][ids] + tensors["model.wpe.weight"][: ids.shape[1]]
    for layer in range(2):
        part = {name.removeprefix(f"model.layers.{layer}."): p for name, p in tensors.items() if f".{layer}." in name}
        normed = norm(states, part["input_layernorm.weight"])
        q, k, v = (
            (normed @ part[f"self_attn.{name}_proj.weight"].T).unflatten(-1, (2, 8)).transpose(1, 2) for name in "qkv"
        )
        mixed = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v
        states = states + mixed.transpose(1, 2).flatten(-2) @ part["self_attn.o_proj.weight"].T
        normed = norm(states, part["post_attention_layernorm.weight"])
        gate = F.silu(normed @ part["mlp.gate_proj.weight"].T) * (normed @ part["mlp.up_proj.weight"].T)
        states = states + gate @ part["mlp.down_proj.weight"].T
    return norm(states, tensors["model.norm.weight"]) @ tensors["lm_head.weight"].T


def test_logits_are_those_of_the_formula(model: LLaDAForMaskedDiffusion) -> None:
    ids = torch.randint(0, 19, (3, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, by_hand(model, ids), atol=1e-5)
    moved = model(input_ids=ids.flip(1)).logits.flip(1)
    assert not torch.allclose(moved, by_hand(model, ids), atol=1e-2)  # position matters


def test_a_saved_checkpoint_has_the_published_names_and_loads_again(
    model: LLaDAForMaskedDiffusion, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "model.transformer.wpe.weight" in set(file.keys())
    ids = torch.arange(9)[None]
    loaded = load_model(tmp_path)
    assert loaded.objective == "masked"
    with torch.no_grad():
        assert torch.equal(loaded.module(input_ids=ids).logits, model(input_ids=ids).logits)
        embedded = model.get_input_embeddings()(ids)
        assert torch.equal(model(inputs_embeds=embedded).logits, model(input_ids=ids).logits)


def test_padding_changes_nothing(model: LLaDAForMaskedDiffusion) -> None:
    probed = ProbedModel(model, objective="masked", mask_token_id=19)
    ids = torch.tensor([[4, 5, 6, 7, 0, 0]])
    seen = torch.tensor([[1, 1, 1, 1, 0, 0]])
    with torch.no_grad():
        padded, alone = probed.logits(ids, seen), probed.logits(ids[:, :4])
    assert torch.allclose(padded[:, :4], alone, atol=1e-5)


def test_a_model_that_turns_has_no_table_of_positions() -> None:
    plain = LLaDAForMaskedDiffusion(LLaDAConfig(d_model=16, n_heads=2, n_layers=1, vocab_size=20, mask_token_id=19))
    assert not any("wpe" in name for name, _ in plain.named_parameters())


def test_position_is_told_to_reach_queries_by_the_embeddings(model: LLaDAForMaskedDiffusion) -> None:
    """Neither a rotation nor none: bounds would be drawn for the first, and shared storage be said of the second."""
    found = layer_positions(ProbedModel(model, objective="masked", mask_token_id=19))
    assert {one.kind for one in found.values()} == {"other"} and all(one.reason for one in found.values())


def test_the_gradient_of_the_table_of_positions_is_that_of_autograd(model: LLaDAForMaskedDiffusion) -> None:
    """One table serves all rows at once: its gradient must still be each query's own."""
    queries = [Query([1, 2, 3, 4, 5], [1], [3]), Query([1, 4, 3, 2, 5], [3], [1]), Query([2, 7, 4, 9], [0], [2])]
    pairs = ReversalPairs([ReversalPair(queries[0], queries[1]), ReversalPair(queries[2], queries[1])])
    frame = probe_gradient_cosine(ProbedModel(model, objective="masked", mask_token_id=19), pairs, control=False).frame

    def gradient(query: Query) -> torch.Tensor:
        ids = torch.tensor([query.token_ids])
        (place,) = query.target_positions
        shown = ids.clone()
        shown[0, place] = 19
        logits = model(input_ids=shown).logits[0, place]
        loss = F.cross_entropy(logits[None], ids[0, place][None])
        return torch.autograd.grad(loss, model.model.wpe.weight)[0]

    forward, reverse = [gradient(queries[0]), gradient(queries[2])], gradient(queries[1])
    rows = frame[frame["parameter"] == "model.wpe.weight"].sort_values("pair")
    assert rows["role"].tolist() == ["position", "position"]
    assert rows["inner"].tolist() == pytest.approx([float((one * reverse).sum()) for one in forward], rel=1e-4)
    assert rows["norm_forward"].tolist() == pytest.approx([float(one.norm()) for one in forward], rel=1e-4)
