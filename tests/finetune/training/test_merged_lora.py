"""A LoRA merged in a copy: it answers as the model does, which stays as it was, and what may not be merged is not."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from revprobe.finetune.training import merged_lora as module_under_test
from revprobe.finetune.training.merged_lora import merged_lora
from revprobe.models.peft_adapters import is_adapter_parameter, without_wrapper
from revprobe.models.probed import ProbedModel, as_probed
from tiny import GROUPED, drawn, language_model

PROJECTIONS: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
IDS = torch.randint(5, 50, (3, 7), generator=torch.Generator().manual_seed(0))


def llama() -> nn.Module:
    return drawn(language_model(transformers.LlamaConfig(**GROUPED)))


def opt() -> nn.Module:
    """Its linear modules have biases."""
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
    return drawn(transformers.OPTForCausalLM(transformers.OPTConfig(**sizes, word_embed_proj_dim=32)))


def gpt2() -> nn.Module:
    """Its projections are Conv1D."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50, "n_positions": 40}
    return drawn(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)))


def moved(module: nn.Module, scale: float = 0.3) -> Any:
    """With adapter weights as training would have made them."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if is_adapter_parameter(name):
                parameter.add_(scale * torch.randn_like(parameter))
    return module.eval()


def with_lora(base: nn.Module, **options: Any) -> Any:
    return moved(peft.get_peft_model(base, peft.LoraConfig(**{"r": 4, **PROJECTIONS, **options})))


def two_at_once() -> nn.Module:
    module = with_lora(llama())
    module.add_adapter("second", peft.LoraConfig(r=2, **PROJECTIONS))
    module.base_model.set_adapter(["default", "second"])
    return moved(module)


MERGED: dict[str, Callable[[], nn.Module]] = {
    "LoRA": lambda: with_lora(llama()),
    "unwrapped": lambda: without_wrapper(with_lora(llama())),
    "DoRA": lambda: with_lora(llama(), use_dora=True),
    "rank-stabilized": lambda: with_lora(llama(), use_rslora=True),
    "whole modules beside it": lambda: with_lora(llama(), modules_to_save=["lm_head"]),
    "biases of its own": lambda: with_lora(opt(), target_modules=["fc1"], lora_bias=True),
    "Conv1D": lambda: with_lora(gpt2(), target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    "two at once": two_at_once,
    "float64": lambda: with_lora(llama()).double(),
}


@pytest.mark.parametrize("kind", MERGED)
def test_a_merged_copy_answers_as_the_model_and_leaves_it_alone(kind: str) -> None:
    """Every weight of the model is the same tensor with the same bits after, and no weight of the copy is adapted."""
    model = as_probed(MERGED[kind]())
    before = {name: (tensor, tensor.detach().clone()) for name, tensor in model.module.named_parameters()}
    with torch.no_grad():
        plain = model.logits(IDS)
        other = merged_lora(model)
        torch.testing.assert_close(other.logits(IDS), plain, atol=2e-5, rtol=1e-5)
        assert torch.equal(model.logits(IDS), plain)
    assert other.module is not model.module and (other.name, other.objective) == (model.name, model.objective)
    assert not any("lora_" in name for name, _ in other.module.named_parameters())
    after = dict(model.module.named_parameters())
    assert list(after) == list(before)
    for name, (tensor, values) in before.items():
        assert after[name] is tensor and torch.equal(tensor, values), name
    adapted = [p for part in model.module.modules() if hasattr(part, "lora_A") for p in part.base_layer.parameters()]
    ours, theirs = ({id(p) for p in m.module.parameters()} for m in (model, other))
    assert adapted and len(theirs - ours) == len(adapted), "nothing but what was adapted is copied"


class Own(nn.Module):
    """A causal model of one's own whose projection is used in a way of its own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.table, self.head = kind, nn.Embedding(50, 16), nn.Linear(16, 50)
        self.q_proj: nn.Module = Scaled(16, 16) if kind == "scaled" else nn.Linear(16, 16)
        if kind == "weight norm":
            self.q_proj = parametrizations.weight_norm(self.q_proj)
        if kind == "old weight norm":
            self.q_proj = nn.utils.weight_norm(self.q_proj)
        if kind == "held apart":
            self.weights = [self.q_proj.weight]

    def forward(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        states = self.table(input_ids).cumsum(1)
        found = states + self.q_proj(states)
        if self.kind == "held apart":
            found = found + functional.linear(states, self.weights[0])
        return self.head(found)


class Scaled(nn.Linear):
    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return 3 * super().forward(given).tanh()


def own(kind: str) -> nn.Module:
    return moved(peft.get_peft_model(Own(kind), peft.LoraConfig(r=4, target_modules=["q_proj"])))


def tied() -> nn.Module:
    base = llama()
    base.config.tie_word_embeddings = True
    base.tie_weights()
    return with_lora(base, target_modules=["lm_head"])


def changed(change: Callable[[Any], object]) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        module = with_lora(llama())
        change(module)
        return module

    return made


def hold_a_lock(module: Any) -> None:
    module.base_model.model.held = threading.Lock()


def narrow_adapter(module: Any) -> None:
    for name, parameter in module.named_parameters():
        if is_adapter_parameter(name):
            parameter.data = parameter.data.to(torch.bfloat16)


def wrap_forward(module: Any) -> None:
    part = module.base_model.model.model.layers[0].mlp
    part.forward = part.forward


LEFT: dict[str, Callable[[], nn.Module]] = {
    "no adapter": llama,
    "IA3": lambda: peft.get_peft_model(
        llama(), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    ),
    "prompt": lambda: peft.get_peft_model(
        llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    ),
    "half precision": changed(lambda module: module.to(torch.bfloat16)),
    "an adapter in half precision": changed(narrow_adapter),
    "tied": tied,
    "switched off": changed(lambda module: module.base_model.disable_adapter_layers()),
    "merged already": changed(lambda module: module.merge_adapter()),
    "a bias that no base has": lambda: with_lora(llama(), lora_bias=True),
    "a lock": changed(hold_a_lock),
    "a hook": changed(lambda module: module.base_model.model.lm_head.register_forward_hook(lambda *_: None)),
    "a forward of its own": changed(wrap_forward),
    **{kind: lambda kind=kind: own(kind) for kind in ("scaled", "weight norm", "old weight norm", "held apart")},
}


@pytest.mark.parametrize("kind", LEFT)
def test_what_may_not_be_merged_is_asked_as_it_is(kind: str) -> None:
    model = as_probed(without_wrapper(LEFT[kind]()))
    assert merged_lora(model) is model


def test_large_adapted_weights_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    model = as_probed(with_lora(llama()))
    assert merged_lora(model) is not model
    monkeypatch.setattr(module_under_test, "_MOST", 100)
    assert merged_lora(model) is model


def test_a_model_that_takes_no_such_row_is_asked_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = as_probed(with_lora(gpt2(), target_modules=["c_attn"], fan_in_fan_out=True))
    monkeypatch.setattr(module_under_test, "_TOKENS", 41)  # of 40 positions
    assert merged_lora(model) is model


def test_the_plain_model_of_ones_own_is_merged() -> None:
    """What `LEFT` refuses of it is refused for the way its weight is used."""
    model = as_probed(without_wrapper(own("plain")))
    assert isinstance(model, ProbedModel) and merged_lora(model) is not model
