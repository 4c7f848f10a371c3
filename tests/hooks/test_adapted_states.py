"""States of models with adapters in their layers: those of the model that the adapter is merged into."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import revprobe as rp
from revprobe.hooks.states import KINDS, record_states
from revprobe.models.structure import states_of
from tiny import FIXTURES, GROUPED, SIZES, causal, drawn, gpt2, language_model, llama, pairs_at

IDS = torch.tensor([[4, 0, 7, 30, 2, 9], [4, 1, 31, 8, 3, 5]])
EVERY = {"target_modules": "all-linear"}
ADAPTERS: dict[str, Callable[[], peft.PeftConfig]] = {
    "LoRA": lambda: peft.LoraConfig(r=4, **EVERY),
    "DoRA": lambda: peft.LoraConfig(r=4, use_dora=True, **EVERY),
    "LoRA with whole modules": lambda: peft.LoraConfig(
        r=4, target_modules=["q_proj", "o_proj", "down_proj"], modules_to_save=["lm_head", "up_proj"]
    ),
    "LoRA on one layer": lambda: peft.LoraConfig(r=4, target_modules=["o_proj"], layers_to_transform=[1]),
    "IA3": lambda: peft.IA3Config(target_modules=["k_proj", "o_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LoHa": lambda: peft.LoHaConfig(r=4, target_modules=["q_proj", "o_proj", "up_proj", "down_proj"]),
    "LoKr": lambda: peft.LoKrConfig(r=4, target_modules=["q_proj", "o_proj", "up_proj", "down_proj"]),
}
MODELS: dict[str, Callable[[], rp.ProbedModel]] = {
    "GPT-2": gpt2,
    "GPT-NeoX": lambda: causal(transformers.GPTNeoXConfig(**SIZES)),
    "BLOOM": lambda: causal(transformers.BloomConfig(**SIZES)),
    "Gemma 2": lambda: causal(transformers.Gemma2Config(**GROUPED)),
    "BERT": lambda: rp.ProbedModel(
        drawn(lambda: language_model(transformers.BertConfig(**SIZES), "masked")),
        rp.letter_tokenizer(),
        objective="masked",
    ),
    **{name: lambda name=name: rp.load_model(FIXTURES / name) for name in ("llada-tiny", "dream-tiny", "sdar-tiny")},
}


def adapted(base: rp.ProbedModel, config: peft.PeftConfig) -> tuple[rp.ProbedModel, rp.ProbedModel]:
    """A model with an adapter that moves its answers, and the same with the adapter merged into its weights."""
    wrapped: Any = peft.get_peft_model(base.module, config).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    options: dict[str, Any] = {"objective": base.objective, "logit_shift": base.logit_shift}
    options |= {"mask_token_id": base.mask_token_id} if base.objective == "masked" else {}
    merged = copy.deepcopy(wrapped).merge_and_unload().eval()
    return rp.ProbedModel(wrapped, **options), rp.ProbedModel(merged, **options)


def recorded(model: rp.ProbedModel) -> dict[tuple[str, int], Tensor]:
    sites = {(kind, layer): site for kind in KINDS for layer, site in states_of(model).of(kind).items()}
    with torch.no_grad(), record_states(model.module, list(sites.values())) as found:
        model.logits(IDS)
    return {place: found[site].clone() for place, site in sites.items()}


def compare(base: rp.ProbedModel, config: peft.PeftConfig) -> None:
    places = set(recorded(base))
    with_adapter, merged = adapted(base, config)
    found, wanted = recorded(with_adapter), recorded(merged)
    assert set(found) == set(wanted) == places and not states_of(with_adapter).without
    for place, state in wanted.items():
        torch.testing.assert_close(
            found[place], state, atol=2e-5, rtol=2e-5, msg=lambda text, at=place: f"{at}: {text}"
        )


@pytest.mark.parametrize("kind", ADAPTERS)
def test_every_kind_of_adapter_on_llama(kind: str) -> None:
    compare(llama(), ADAPTERS[kind]())


@pytest.mark.parametrize("name", MODELS)
def test_lora_on_every_linear_layer_of_every_layout(name: str) -> None:
    model = MODELS[name]()
    linear = [path.rpartition(".")[2] for path, one in model.module.named_modules() if is_linear(one)]
    head = model.module.get_output_embeddings() if hasattr(model.module, "get_output_embeddings") else None
    last = next((path.rpartition(".")[2] for path, one in model.module.named_modules() if one is head), None)
    targets = sorted(set(linear) - {last, "decoder", "dense_out"})
    compare(model, peft.LoraConfig(r=4, target_modules=targets, fan_in_fan_out=name == "GPT-2"))


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | transformers.pytorch_utils.Conv1D)


@pytest.mark.parametrize("site", ["attention", "mlp", "head"])
def test_a_causal_trace_of_an_adapted_model_is_that_of_the_merged_one(site: str) -> None:
    with_adapter, merged = adapted(rp.load_model(FIXTURES / "llada-tiny"), ADAPTERS["LoRA"]())
    asked = pairs_at((2, 5), (5, 2), count=6, length=8)
    found, wanted = (rp.probe_causal_trace(one, asked, site=site).frame for one in (with_adapter, merged))
    assert found["effect"].notna().any()
    torch.testing.assert_close(
        torch.tensor(found["effect"].to_numpy(float)),
        torch.tensor(wanted["effect"].to_numpy(float)),
        atol=1e-5,
        rtol=1e-4,
        equal_nan=True,
    )
