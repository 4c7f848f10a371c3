"""Adapters of peft on one causal and one masked model, with noise on their weights: `adapted_models()`."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from tiny_architectures import NOISE, tiny_model
from torch import nn

BASES = {"causal": ("llama", "LlamaForCausalLM"), "masked": ("bert", "BertForMaskedLM")}
# Saved, and loaded again by folder.
SAVED = ("LoRA", "IA3", "prompt tuning", "LN tuning")


def configs(objective: str) -> dict[str, Any]:
    """One config of every kind, for the names of the base's modules."""
    first, second = ("q_proj", "v_proj") if objective == "causal" else ("query", "value")
    norms = ["input_layernorm"] if objective == "causal" else ["LayerNorm"]
    at: dict[str, Any] = {"target_modules": [first, second]}
    at["task_type"] = "CAUSAL_LM" if objective == "causal" else "FEATURE_EXTRACTION"
    prompt = {"task_type": at["task_type"], "num_virtual_tokens": 3}
    return {
        "LoRA": peft.LoraConfig(r=4, **at),
        "DoRA": peft.LoraConfig(r=4, use_dora=True, **at),
        "IA3": peft.IA3Config(feedforward_modules=[], **at),
        "LoHa": peft.LoHaConfig(r=4, **at),
        "LoKr": peft.LoKrConfig(r=4, **at),
        "VeRA": peft.VeraConfig(r=4, target_modules=[first], task_type=at["task_type"]),
        "OFT": peft.OFTConfig(r=0, oft_block_size=4, **at),
        "BOFT": peft.BOFTConfig(boft_block_size=4, **at),
        "AdaLoRA": peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, **at),
        "HRA": peft.HRAConfig(r=4, **at),
        "FourierFT": peft.FourierFTConfig(n_frequency=20, **at),
        "LN tuning": peft.LNTuningConfig(target_modules=norms, task_type=at["task_type"]),
        "prompt tuning": peft.PromptTuningConfig(**prompt),
        "prefix tuning": peft.PrefixTuningConfig(**prompt),
        "p-tuning": peft.PromptEncoderConfig(encoder_hidden_size=16, **prompt),
    }


def adapted_models() -> Iterator[tuple[str, str, nn.Module | Exception]]:
    """Kind, objective and adapted model, or what peft raised while it was made."""
    for objective, (kind, name) in BASES.items():
        base = tiny_model(objective, kind, name)
        for label, config in configs(objective).items():
            try:
                yield label, objective, adapted(copy.deepcopy(base), config)
            except Exception as error:
                yield label, objective, error


def adapted(base: Any, config: Any) -> nn.Module:
    """The base with the adapter on it, and noise on the adapter's weights; in eval mode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += NOISE * torch.randn_like(parameter)
    return model.eval()


def saved(objective: str, label: str, folder: Path) -> tuple[nn.Module, Path]:
    """An adapted model in memory, and the folder of its adapter beside that of its base."""
    base = tiny_model(objective, *BASES[objective])
    base.save_pretrained(folder / "base")
    loaded = type(base).from_pretrained(folder / "base")
    model: Any = adapted(loaded, configs(objective)[label])
    model.save_pretrained(folder / "adapter")
    return model, folder / "adapter"
