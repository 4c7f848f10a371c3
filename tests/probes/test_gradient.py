"""The gradient probe on whole models: what makes no difference, what is zero in theory, and splits that add up."""

import math
from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import tiny
from revprobe import ProbedModel, ReversalPair, ReversalPairs, RevprobeError, probe_gradient_cosine
from revprobe.models.structure import parameter_role
from tiny import MASK, language_model, uneven_pairs

VOCAB = 56
SIZES = tiny.SIZES | {"hidden_size": 16, "intermediate_size": 24}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 4}
GPT2 = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}
# Weights wide enough that nothing is near zero.
drawn = partial(tiny.drawn, scale=0.15, dtype=torch.float64)


def of(config: type, settings: dict = GROUPED, **more: object) -> nn.Module:
    causal = config is not transformers.BertConfig
    return language_model(config(**settings, **more), "causal" if causal else "masked")


def at_first_step() -> nn.Module:
    """Llama with adapters on two projections; their B is zero."""
    import peft

    config = peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], lora_dropout=0.1)
    module = peft.get_peft_model(drawn(of(transformers.LlamaConfig)), config)
    return module.double().eval()


MODELS = {
    "gpt2": lambda: of(transformers.GPT2Config, GPT2),
    "llama": lambda: of(transformers.LlamaConfig),
    "qwen2": lambda: of(transformers.Qwen2Config),
    "bert": lambda: of(transformers.BertConfig, SIZES),
    "gemma (scaled, tied)": lambda: of(transformers.GemmaConfig),
}


# --- what the engine leaves alone, and what makes no difference -----------------------------------------------------


NUMBERS = ["inner", "norm_forward", "norm_reverse"]


def close(one: ProbedModel, other: ProbedModel, **options: object) -> None:
    frames = [probe_gradient_cosine(model, uneven_pairs(), control=False, **options).frame for model in (one, other)]
    found, expected = (torch.as_tensor(frame[NUMBERS].to_numpy()) for frame in frames)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_gradient_checkpointing_gives_the_same_numbers(name, training):
    objective = {"objective": "causal"} if name == "llama" else {"objective": "masked", "mask_token_id": MASK}
    module = drawn(MODELS[name])
    plain, saving = (ProbedModel(deepcopy(module), **objective) for _ in range(2))
    saving.module.gradient_checkpointing_enable()
    saving.module.train(training)
    close(saving, plain)
    assert saving.module.training is training and saving.module.is_gradient_checkpointing
    assert all(p.grad is None for p in saving.module.parameters())


@pytest.mark.parametrize("size", [1, 3, 100])
def test_micro_batches_give_the_same_numbers(size):
    module = drawn(of(transformers.Qwen2Config))
    reference = probe_gradient_cosine(ProbedModel(module, objective="causal"), uneven_pairs(), batch_size=4)
    other = probe_gradient_cosine(ProbedModel(module, objective="causal"), uneven_pairs(), batch_size=size)
    for column in [*NUMBERS, "inner_control"]:
        assert reference.frame[column].to_numpy() == pytest.approx(other.frame[column].to_numpy(), rel=1e-9, abs=1e-12)


def test_training_flags_and_grads_make_no_difference_and_stay():
    module = drawn(of(transformers.Qwen2Config))
    frozen = deepcopy(module).requires_grad_(False)
    marked = frozen.model.norm.weight
    marked.grad = torch.full_like(marked, 3.0)
    close(ProbedModel(frozen, objective="causal"), ProbedModel(module, objective="causal"))
    assert not any(p.requires_grad for p in frozen.parameters()) and (marked.grad == 3.0).all()
    assert all(p.grad is None for name, p in frozen.named_parameters() if name != "model.norm.weight")


# --- zero in theory -------------------------------------------------------------------------------------------------


def test_lora_at_its_first_step_is_a_reading_and_its_a_alone_is_nan_with_a_reason():
    """B = 0: the gradient of A is zero, that of B is not."""
    model = ProbedModel(at_first_step(), objective="causal")
    adapters = [name for name, _ in model.module.named_parameters() if "lora_" in name]
    only_a = [name for name in adapters if "lora_A" in name]
    reading = probe_gradient_cosine(model, uneven_pairs(), parameters=adapters)
    assert math.isfinite(reading.value) and not reading.undefined
    frame = reading.frame[reading.frame.parameter.isin(only_a)]
    assert len(frame) == len(only_a) * 4 and (frame.norm_forward == 0).all()
    nothing = probe_gradient_cosine(model, uneven_pairs(), parameters=only_a, control=False)
    assert math.isnan(nothing.value) and nothing.undefined == {"gradient exactly zero in all of these parameters": 4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_key_biases_are_nan_with_a_reason_where_positions_do_not_rotate(dtype):
    """BERT: a key's bias adds one constant to all scores of a row, which softmax ignores."""
    model = ProbedModel(drawn(of(transformers.BertConfig, SIZES), dtype=dtype), objective="masked", mask_token_id=MASK)
    names = [name for name, _ in model.module.named_parameters() if name.endswith("key.bias")]
    reading = probe_gradient_cosine(model, uneven_pairs(), parameters=names, control=False)
    assert len(names) == 2 and math.isnan(reading.value)
    assert reading.undefined == {"gradient below the rounding floor": 4}
    assert (reading.frame.norm_forward > 0).any(), "rounding errors were to be refused here, not zeros"


def test_key_biases_under_rotary_positions_are_a_reading():
    """Qwen2: RoPE turns the bias by the key's position, so the scores it adds differ along a row: no zero."""
    module = drawn(of(transformers.Qwen2Config))
    names = [name for name, _ in module.named_parameters() if name.endswith("k_proj.bias")]
    reading = probe_gradient_cosine(ProbedModel(module, objective="causal"), uneven_pairs(), parameters=names)
    assert math.isfinite(reading.value) and not reading.undefined


# --- splits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
@pytest.mark.parametrize("by", ["parameter", "role", "layer"])
def test_splits_sum_to_the_whole(name, by):
    """Also over the parts of fused projections; against autograd's gradients, not against the frame's own sum."""
    module = drawn(MODELS[name])
    reading = probe_gradient_cosine(ProbedModel(module, objective="causal"), uneven_pairs(), control=False)
    parameters = dict(module.named_parameters())
    assert ("qkv" not in set(reading.frame.role)) and {"q", "k", "v"} <= set(reading.frame.role)
    for pair in range(4):
        queries = (uneven_pairs()[pair].forward, uneven_pairs()[pair].reverse)
        loss = [
            F.cross_entropy(module(torch.tensor([q.token_ids])).logits[0, 3:4], torch.tensor(q.target)) for q in queries
        ]
        forward, reverse = (
            dict(zip(parameters, torch.autograd.grad(x, list(parameters.values())), strict=True)) for x in loss
        )
        rows = reading.frame[reading.frame.pair == pair]
        parts = rows.groupby(by, dropna=False)[["inner"]].sum().inner
        whole = sum(float((forward[n] * reverse[n]).sum()) for n in parameters)
        assert float(parts.sum()) == pytest.approx(whole, rel=1e-9)
        square = sum(float(g.square().sum()) for g in forward.values())
        assert float((rows.norm_forward**2).groupby(rows[by], dropna=False).sum().sum()) == pytest.approx(
            square, rel=1e-9
        )
        if by == "layer":
            first = [n for n in parameters if parameter_role(n).layer == 0]
            assert float(parts[0]) == pytest.approx(
                sum(float((forward[n] * reverse[n]).sum()) for n in first), rel=1e-9
            )


@pytest.mark.parametrize("name", ["llama", "gemma (scaled, tied)", "gpt2"])
def test_the_cosine_of_a_query_with_itself_is_one_and_swapping_the_sides_changes_nothing(name):
    model = ProbedModel(drawn(MODELS[name]), objective="causal")
    pairs = uneven_pairs()
    same = ReversalPairs.from_pairs([ReversalPair(p.forward, p.forward, fact=p.fact) for p in pairs])
    assert probe_gradient_cosine(model, same, control=False).value == pytest.approx(1.0, abs=1e-12)
    swapped = ReversalPairs.from_pairs([ReversalPair(p.reverse, p.forward, fact=p.fact) for p in pairs])
    one, other = (probe_gradient_cosine(model, each, control=False) for each in (pairs, swapped))
    assert one.frame.inner.to_numpy() == pytest.approx(other.frame.inner.to_numpy(), rel=1e-9, abs=1e-13)
    assert -1 <= one.value <= 1 and one.value == pytest.approx(other.value, abs=1e-12)
    with pytest.raises(RevprobeError, match=r"no parameter 'lm_hed.weight'"):
        probe_gradient_cosine(model, pairs, parameters=["lm_hed.weight"])
