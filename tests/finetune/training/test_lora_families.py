"""LoRA on every published family: the projections of its layers and no other, names that match nothing, and a step."""

import re

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D

import revprobe as rp
from revprobe.finetune.config.finetuning import LoraOptions
from revprobe.finetune.training.lora import add_lora, projections, target_modules
from revprobe.finetune.training.objectives import masked_diffusion_loss, step_generator
from revprobe.models.peft_adapters import is_adapter_parameter, without_wrapper
from tiny import FIXTURES, ROOT, module_at

CASES = module_at(ROOT / "tests" / "models" / "families" / "test_every_family.py").CASES
# Mixtures, and what of them takes an adapter.
EXPERTS = {name: "attention" for name in CASES if name in ("lladamoe-tiny", "llada2-tiny")}
IDS = torch.tensor([[3, 17, 42, 8, 99, 5, 60, 12], [7, 7, 1, 90, 33, 21, 4, 50]])


def loaded(name: str, dtype: str = "float32") -> rp.ProbedModel:
    """Anew: an adapter is put into the module itself."""
    return rp.load_model(FIXTURES / name, dtype=dtype, **CASES[name])


def layers_linear(model: rp.ProbedModel) -> set[str]:
    """Every linear module under a number, those that only condition a norm left out."""
    modules = model.module.named_modules()
    linear = {name for name, part in modules if isinstance(part, nn.Linear | Conv1D) and re.search(r"\.\d+\.", name)}
    return {name for name in linear if "adaLN" not in name}


@pytest.mark.parametrize("name", CASES)
def test_the_projections_are_those_of_the_layers_and_no_other(name: str) -> None:
    model = loaded(name)
    found = {path for path, kind in projections(model).items() if kind != "norm"}
    assert found == layers_linear(model)
    adapted = add_lora(model, LoraOptions(rank=2, targets=EXPERTS.get(name, "auto")))
    names = (one for one, _ in adapted.named_parameters() if ".lora_A" in one)
    reached = {one.split(".lora_A")[0].removeprefix("base_model.model.") for one in names}
    assert reached == (found if name not in EXPERTS else {path for path in found if "self_attn" in path})


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("targets", ["auto", "mlp", ["gate_proj"], ["q_proj", "gate_up_proj"]])
def test_experts_that_are_one_tensor_are_refused_by_its_name(name: str, targets: str | list[str]) -> None:
    """peft would adapt what lies beside them, or fail on a tensor of three axes."""
    model = loaded(name)
    words = r"lora\.targets '\w+': the experts of .* \(model\.layers\.\d\.mlp\.experts\."
    with pytest.raises(rp.RevprobeError, match=words):
        add_lora(model, LoraOptions(rank=2, targets=targets))
    assert not any(is_adapter_parameter(one) for one, _ in model.module.named_parameters())


@pytest.mark.parametrize("name", CASES)
def test_names_that_match_nothing_are_answered_with_all_that_there_are(name: str) -> None:
    """Published names too: a file's fused or renamed tensors are no modules here."""
    model = loaded(name)
    there = sorted({path.rpartition(".")[2] for path in projections(model)})
    (path,) = (one for one in (FIXTURES / name).glob("*.safetensors") if one.name != "reference.safetensors")
    with safe_open(path, framework="pt") as file:
        published = {key.removesuffix(".weight").rpartition(".")[2] for key in file.keys()}  # noqa: SIM118
    wrong = [*(published - set(there)), "q_prj", "lm_head", "query_key_value", "experts", "everything", "layers.0"]
    of_experts = {"gate_proj", "up_proj", "down_proj"} if name in EXPERTS else set()  # with an error of their own
    fitting = sorted(set(there) - of_experts)
    for target in set(wrong) - of_experts:
        with pytest.raises(
            rp.RevprobeError, match=rf"lora\.targets: {name} has no projection '{target}'; .*{', '.join(there)}"
        ):
            target_modules(model, [fitting[0], target])
    with pytest.raises(rp.RevprobeError, match="has no projection 'everything'"):
        add_lora(model, LoraOptions(rank=2, targets=["everything"]))
    assert not any(is_adapter_parameter(one) for one, _ in model.module.named_parameters()), "half an adapter is left"
    assert target_modules(model, fitting) == fitting


@pytest.mark.parametrize("name", CASES)
def test_one_step_trains_the_adapter_alone_and_merging_gives_what_it_gave(name: str) -> None:
    model = loaded(name, "float64")
    before = model.logits(IDS).detach()
    torch.manual_seed(0)
    adapted = add_lora(model, LoraOptions(rank=2, targets=EXPERTS.get(name, "auto")))
    frozen = {key: p.detach().clone() for key, p in adapted.named_parameters() if not is_adapter_parameter(key)}
    trained = model.with_module(without_wrapper(adapted))
    assert torch.equal(trained.logits(IDS), before), "an adapter starts at nothing"
    told = {"mask_token_id": model.mask_token_id, "logit_shift": model.logit_shift}
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    for step in range(2):  # in the first, A meets a B of zeros
        optimizer.zero_grad()
        masked_diffusion_loss(adapted, IDS, generator=step_generator(0, step), **told).backward()
        optimizer.step()
    assert all(torch.equal(p, frozen[key]) for key, p in adapted.named_parameters() if key in frozen)
    moved = [bool(p.any()) for key, p in adapted.named_parameters() if ".lora_B." in key]
    assert moved and all(moved)
    after = trained.logits(IDS).detach()
    assert float((after - before)[after.isfinite()].abs().max()) > 1e-3
    merged = model.with_module(adapted.merge_and_unload())
    torch.testing.assert_close(merged.logits(IDS), after, atol=1e-9, rtol=0)
