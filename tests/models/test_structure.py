"""Fused projections come apart where their layout is declared, and the parts are really q, k and v."""

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from revprobe import ProbedModel, RevprobeError, letter_pairs, letter_tokenizer, probe_gradient_cosine
from revprobe.models import structure
from revprobe.models.structure import declare_fused, fused_parts
from tiny import drawn, tapped

HEADS = {"num_hidden_layers": 2, "num_attention_heads": 4}
SIZES = {"vocab_size": 56, "hidden_size": 16, "intermediate_size": 32, **HEADS}
IDS = {"pad_token_id": 55, "bos_token_id": 54, "eos_token_id": None}
MODERN = {"pad_token_id": 55, "bos_token_id": 54, "eos_token_id": 54, "cls_token_id": 54, "sep_token_id": 54}
FUSED = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=56, n_embd=16, n_layer=2, n_head=4, **IDS)),
    "modernbert": lambda: ModernBertForMaskedLM(ModernBertConfig(**SIZES, **MODERN)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, **IDS)),
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=56, hidden_size=16, n_layer=2, n_head=4, **IDS)),
    "phi3 (grouped keys)": lambda: Phi3ForCausalLM(Phi3Config(**SIZES, num_key_value_heads=2, **IDS)),
}


def score_of(module: torch.nn.Module) -> torch.Tensor:
    """Scores of layer 0 at one row and column. Shapes: `-> heads`."""
    at = torch.tensor([[2]]), torch.tensor([[1]])
    with torch.no_grad(), tapped(module, *at, 4) as tap:
        module(torch.tensor([[4, 0, 30, 5]]))
    return tap.layers()[0].score[0, :, 0, 0]


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("part", ["q", "k"])
def test_zeroing_a_part_zeroes_the_score_and_the_other_parts_do_not(name, part):
    """With q (or k) zero every content score is zero; with v zero the scores stay as they were."""
    whole = score_of(drawn(FUSED[name]))
    for zeroed, expected in ((part, None), ("v", whole)):
        module = drawn(FUSED[name])
        for parameter, split in fused_parts(module).items():
            weight = module.get_parameter(parameter)
            features = split[zeroed]
            (weight.data.T if weight.dim() == 2 and name == "gpt2" else weight.data)[features] = 0.0
        if expected is None:
            # Bloom's score keeps its ALiBi term; it is that of the untouched position.
            bias = score_of(module)
            assert (bias.abs() < 1e-6).all() or (name == "bloom" and (bias != whole).all())
        else:
            torch.testing.assert_close(score_of(module), expected)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "phi3 (grouped keys)"])
def test_the_parts_are_slices_of_the_autograd_gradient_and_add_up_to_the_whole(name):
    module = drawn(FUSED[name])
    model = ProbedModel(module, letter_tokenizer(), objective="causal")
    pairs = letter_pairs(5, model=model)[:3]
    frame = probe_gradient_cosine(model, pairs, control=False).frame
    parts = fused_parts(module)
    fused = next(iter(parts))
    query = pairs[0].forward
    logits = module(torch.tensor([query.token_ids])).logits[0, query.target_positions[0] - 1]
    loss = torch.nn.functional.cross_entropy(logits[None], torch.tensor(query.target))
    (gradient,) = torch.autograd.grad(loss, [module.get_parameter(fused)])
    by_feature = gradient.T if name == "gpt2" and gradient.dim() == 2 else gradient
    rows = frame[(frame.parameter == fused) & (frame.pair == 0)].set_index("role")
    assert set(rows.index) == {"q", "k", "v"}
    for role, features in parts[fused].items():
        assert rows.norm_forward[role] == pytest.approx(float(by_feature[features].norm()), rel=1e-4, abs=1e-7)
    assert (rows.norm_forward**2).sum() == pytest.approx(float(gradient.norm() ** 2), rel=1e-5)


def test_an_undeclared_layout_stays_whole_and_a_declared_one_comes_apart(monkeypatch):
    monkeypatch.setattr(structure, "_FUSED", {})
    model = ProbedModel(drawn(FUSED["gpt2"]), letter_tokenizer(), objective="causal")
    pairs = letter_pairs(5, model=model)[:2]
    assert "qkv" in set(probe_gradient_cosine(model, pairs, control=False).frame.role)
    declare_fused("gpt2", r"attn\.c_attn$", "blocked")
    assert {"q", "k", "v"} <= set(probe_gradient_cosine(model, pairs, control=False).frame.role)
    with pytest.raises(RevprobeError, match="unknown order 'blockd' of a fused projection; the closest is 'blocked'"):
        declare_fused("gpt2", "x", "blockd")


def test_separate_projections_have_no_parts():
    config = LlamaConfig(**SIZES, **IDS)
    assert fused_parts(LlamaForCausalLM(config)) == {}
