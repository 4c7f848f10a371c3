"""LoRA: which projections it finds, adapters that plain peft reads back, and readings that merging does not change."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from revprobe import ProbedModel, Query, Readings, ReversalPairs, RevprobeError, load_model
from revprobe.finetune.config.finetuning import LoraOptions
from revprobe.finetune.training.lora import add_lora, projections, quantization, target_modules
from revprobe.finetune.training.probe_callback import take_readings
from revprobe.models.peft_adapters import is_adapter_parameter, without_wrapper
from tiny import FIXTURES, pairs_at

OPTIONS = LoraOptions(rank=4, alpha=8)
PAIRS = pairs_at((4, 1), (1, 4), count=12, length=6, vocab=240)


def adapted(name: str) -> tuple[ProbedModel, PeftModel]:
    """A fixture with an adapter whose B is not zero: an adapter fresh from peft changes nothing."""
    model = load_model(FIXTURES / name)
    torch.manual_seed(1)
    peft_model = add_lora(model, OPTIONS)
    for parameter_name, parameter in peft_model.named_parameters():
        if ".lora_B." in parameter_name:
            nn.init.normal_(parameter, std=0.1)
    assert isinstance(peft_model, PeftModel)
    return model, peft_model.eval()


def wrapped(module: nn.Module, like: ProbedModel) -> ProbedModel:
    told = {"mask_token_id": like.mask_token_id, "logit_shift": like.logit_shift}
    return ProbedModel(without_wrapper(module), objective=like.objective, **told, begin_token_id=like.begin_token_id)


# ---- which projections ----


@pytest.mark.parametrize("name", ["llada-tiny", "dream-tiny"])
def test_the_projections_are_every_linear_module_of_the_layers_and_no_other(name: str) -> None:
    """A lost MLP projection or an adapted unembedding turns this red."""
    model = load_model(FIXTURES / name)
    found = projections(model)
    linear = {n for n, m in model.module.named_modules() if isinstance(m, nn.Linear)}
    assert set(found) == linear - {"lm_head"}
    ends = {kind: {n.rpartition(".")[2] for n, k in found.items() if k == kind} for kind in ("attention", "mlp")}
    assert ends == {
        "attention": {"q_proj", "k_proj", "v_proj", "o_proj"},
        "mlp": {"gate_proj", "up_proj", "down_proj"},
    }
    assert target_modules(model) == sorted(ends["attention"] | ends["mlp"])
    assert target_modules(model, "mlp") == sorted(ends["mlp"])


def test_gpt2s_fused_transposed_projections_are_found() -> None:
    """Conv1D is no nn.Linear; `c_proj` names one module in the attention and another in the MLP."""
    module = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=16))
    model = ProbedModel(module, objective="causal")
    assert target_modules(model) == ["c_attn", "c_fc", "c_proj"]
    attention = target_modules(model, "attention")
    assert attention == [f"transformer.h.{i}.attn.{name}" for i in (0, 1) for name in ("c_attn", "c_proj")]
    peft_model = add_lora(model, LoraOptions(rank=2, targets="attention"))
    adapted_modules = {n.split(".lora_A")[0] for n, _ in peft_model.named_parameters() if ".lora_A" in n}
    assert adapted_modules == {f"base_model.model.{name}" for name in attention}


class Oddly(nn.Module):
    """A masked model in which no module has a telling name."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Embedding(32, 8)
        self.stages = nn.ModuleList(
            nn.ModuleDict({"one": Mixing(), "two": nn.Linear(8, 8), "three": nn.Linear(8, 8)}) for _ in range(2)
        )
        self.last = nn.Linear(8, 32)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.first(input_ids)
        for stage in self.stages:
            hidden = hidden + stage["one"](hidden)
            hidden = hidden + stage["three"](torch.relu(stage["two"](hidden)))
        return self.last(hidden)


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.alpha, self.beta = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        q, k, v = self.alpha(hidden)[:, None].chunk(3, -1)
        return self.beta(nn.functional.scaled_dot_product_attention(q, k, v)[:, 0])


def test_projections_are_found_where_attention_is_computed_whatever_their_names() -> None:
    torch.manual_seed(0)
    model = ProbedModel(Oddly(), objective="masked", mask_token_id=31, logit_shift=0)
    found = projections(model)
    assert {n for n, kind in found.items() if kind == "attention"} == {
        f"stages.{i}.one.{name}" for i in (0, 1) for name in ("alpha", "beta")
    }
    assert {n for n, kind in found.items() if kind == "mlp"} == {
        f"stages.{i}.{n}" for i in (0, 1) for n in ("two", "three")
    }
    peft_model = add_lora(model, LoraOptions(rank=2))
    assert sum(".lora_A" in name for name, _ in peft_model.named_parameters()) == 8


def test_targets_by_name_are_taken_and_unknown_ones_answered_with_the_nearest() -> None:
    model = load_model(FIXTURES / "llada-tiny")
    assert target_modules(model, ["q_proj", "v_proj"]) == ["q_proj", "v_proj"]
    with pytest.raises(
        RevprobeError, match=r"lora.targets: llada-tiny has no projection 'q_prj'; the closest is 'q_proj'"
    ):
        target_modules(model, ["q_prj"])


MIXTURES = {
    "lladamoe-tiny": {"mask_token_id": 252},
    "llada2-tiny": {"mask_token_id": 246, "block_size": 4},
}


@pytest.mark.parametrize("targets", ["auto", "mlp", ["q_proj", "gate_proj"], ["down_proj"], ["gate_up_proj"]])
@pytest.mark.parametrize("name", MIXTURES)
def test_experts_in_one_tensor_are_refused_by_name(name: str, targets: str | list[str]) -> None:
    """An adapter on dense layers and shared experts alone would pass for one on the whole MLP."""
    model = load_model(FIXTURES / name, **MIXTURES[name])
    with pytest.raises(
        RevprobeError, match=r"lora.targets .* one tensor a layer \(model.layers.*use 'attention'"
    ) as caught:
        target_modules(model, targets)
    assert ("shared_experts.gate_proj" in str(caught.value)) == (name == "llada2-tiny")


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixtures_attention_and_what_lies_beside_its_experts_are_adapted(name: str) -> None:
    model = load_model(FIXTURES / name, **MIXTURES[name])
    found = projections(model)
    targets = target_modules(model, "attention")
    assert targets == ["k_proj", "o_proj", "q_proj", "v_proj"]
    beside = ["mlp.up_proj", "shared_experts.gate_proj"] if name == "llada2-tiny" else []
    peft_model = add_lora(model, LoraOptions(rank=2, targets=[*targets, *beside]))
    inside = [n.split(".lora_A")[0].removeprefix("base_model.model.") for n, _ in peft_model.named_parameters()]
    wanted = {n for n, kind in found.items() if kind == "attention" or n.endswith(tuple(beside or ["nothing"]))}
    assert {n for n in inside if n in found} == wanted


def test_only_the_adapter_is_trained_and_it_starts_at_nothing() -> None:
    model = load_model(FIXTURES / "llada-tiny")
    ids = torch.arange(6)[None]
    with torch.no_grad():
        before = model.logits(ids)
    torch.manual_seed(0)
    peft_model = add_lora(model, OPTIONS)
    assert all(p.requires_grad == is_adapter_parameter(n) for n, p in peft_model.named_parameters())
    with torch.no_grad():
        assert torch.equal(wrapped(peft_model, model).logits(ids), before)


def test_four_bits_need_a_gpu_and_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert quantization(None, torch.bfloat16, on_cpu=True) == {}
    with pytest.raises(RevprobeError, match=r"model.quantize '4bit' needs a CUDA GPU"):
        quantization("4bit", torch.bfloat16, on_cpu=True)
    monkeypatch.setattr("revprobe.finetune.training.lora.find_spec", lambda name: None)
    with pytest.raises(RevprobeError, match="needs bitsandbytes, which is not installed; `pip install bitsandbytes`"):
        quantization("4bit", torch.bfloat16, on_cpu=False)


# ---- saved adapters ----


@pytest.mark.parametrize("name", ["llada-tiny", "dream-tiny"])
def test_a_saved_adapter_loads_in_plain_peft_and_in_load_model(name: str, tmp_path: Path) -> None:
    """Difference 0.0: the same tensors on the same base."""
    model, peft_model = adapted(name)
    peft_model.save_pretrained(tmp_path / "adapter")
    ids = torch.randint(0, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = peft_model(input_ids=ids).logits
        bare = load_model(FIXTURES / name)
        assert float((bare.logits(ids) - expected).abs().max()) > 1e-2, "the adapter changes nothing: the test is blind"
        again = PeftModel.from_pretrained(load_model(FIXTURES / name).module, tmp_path / "adapter").eval()
        assert torch.equal(again(input_ids=ids).logits, expected)
        loaded = load_model(tmp_path / "adapter")
        assert torch.equal(loaded.logits(ids), expected)
    assert (loaded.objective, loaded.logit_shift) == (model.objective, model.logit_shift)
    assert loaded.mask_token_id == model.mask_token_id


@pytest.mark.parametrize("name", ["llada-tiny", "dream-tiny"])
def test_merging_gives_the_same_readings(name: str) -> None:
    """All three probes to 1e-4, over the model's own parameters."""
    model, peft_model = adapted(name)
    before = take_readings(wrapped(peft_model, model), PAIRS)
    after = take_readings(wrapped(peft_model.merge_and_unload(), model), PAIRS)
    assert [r.name for r in before] == [r.name for r in after]
    plain = take_readings(load_model(FIXTURES / name), PAIRS)
    for one, other, bare in zip(before, after, plain, strict=True):
        numbers = [r.measures().select_dtypes("number").to_numpy(float) for r in (one, other, bare)]
        assert abs(numbers[0] - numbers[1]).max() < 1e-4, f"{one!r} merged is {other!r}"
        assert abs(numbers[0] - numbers[2]).max() > 1e-4, f"{one.name}: the adapter changes nothing"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    _, peft_model = adapted("llada-tiny")
    peft_model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_damaged_or_foreign_adapter_is_named(saved: Path) -> None:
    """peft alone leaves a missing tensor at its random start, and warns at best."""
    weights = load_file(saved / "adapter_model.safetensors")
    first = sorted(weights)[0]
    save_file({n: t for n, t in weights.items() if n != first}, saved / "adapter_model.safetensors")
    with pytest.raises(RevprobeError, match=r"adapter .* is of another model: base_model.*lora_A.weight do not match"):
        load_model(saved)
    (saved / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(RevprobeError, match=r"cannot put the adapter .* on its base model"):
        load_model(saved)
    (saved / "adapter_model.safetensors").rename(saved / "adapter_model.bin")
    with pytest.raises(RevprobeError, match=r"holds no adapter_model.safetensors; an adapter is read from safetensors"):
        load_model(saved)


def test_an_adapter_without_a_base_is_named(saved: Path) -> None:
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(RevprobeError, match="names no base model"):
        load_model(saved)
    (saved / "adapter_config.json").write_text("{")
    with pytest.raises(RevprobeError, match=r"adapter_config.json is damaged"):
        load_model(saved)


def test_a_base_beside_the_run_is_taken_before_the_path_that_was_saved(saved: Path, tmp_path: Path) -> None:
    """A run's folder can be moved: the absolute path in its adapters is then wrong."""
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/nowhere/at/all"}))
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000003"
    shutil.copytree(saved, checkpoint)
    shutil.copytree(FIXTURES / "llada-tiny", tmp_path / "run" / "base")
    (checkpoint / "COMPLETE").touch()
    model = load_model(tmp_path / "run")
    assert (model.step, model.weights, model.name) == (3, "raw", "run")
    assert any(is_adapter_parameter(name) for name, _ in model.module.named_parameters())


# ---- readings by owner ----


def by_name(readings: Readings) -> dict[str, pd.DataFrame]:
    return {r.name: r.frame for r in readings}


def test_both_gradients_come_from_one_pass_and_equal_those_taken_alone() -> None:
    model, peft_model = adapted("llada-tiny")
    probed, pairs = wrapped(peft_model, model), PAIRS
    both, own, lora = (by_name(take_readings(probed, pairs, parameters=p)) for p in ("both", "all", "lora"))
    assert set(both) == {*own, "lora_gradient_cosine"} == {*lora, "gradient_cosine"}
    pd.testing.assert_frame_equal(both["gradient_cosine"], own["gradient_cosine"])
    pd.testing.assert_frame_equal(both["lora_gradient_cosine"], lora["lora_gradient_cosine"])
    assert not both["gradient_cosine"]["parameter"].map(is_adapter_parameter).any()
    assert both["lora_gradient_cosine"]["parameter"].map(is_adapter_parameter).all()
    reading = next(r for r in take_readings(probed, pairs, parameters="lora") if r.name == "lora_gradient_cosine")
    slow = slow_cosine(probed, pairs)
    assert reading.value == pytest.approx(slow, abs=1e-5)
    assert reading.meta["parameters"] == "lora"


def slow_cosine(model: ProbedModel, pairs: ReversalPairs) -> float:
    """The mean cosine of the adapter's gradients, one backward pass per query."""
    parameters = [p for n, p in model.module.named_parameters() if is_adapter_parameter(n)]

    def gradient(query: Query) -> Tensor:
        ids = torch.tensor([query.token_ids])
        hidden = ids.clone()
        hidden[0, list(query.target_positions)] = int(model.mask_token_id or 0)
        rows = [p - model.logit_shift for p in query.target_positions]
        loss = nn.functional.cross_entropy(model.logits(hidden)[0, rows], torch.tensor(query.target))
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    pairs_of = [(gradient(pair.forward), gradient(pair.reverse)) for pair in pairs]
    return float(torch.stack([nn.functional.cosine_similarity(f, r, dim=0) for f, r in pairs_of]).mean())


def test_an_adapter_that_is_not_there_cannot_be_read() -> None:
    model = load_model(FIXTURES / "llada-tiny")
    with pytest.raises(RevprobeError, match="llada-tiny has no LoRA parameters; use parameters='all'"):
        take_readings(model, PAIRS, parameters="lora")
    with pytest.raises(RevprobeError, match="unknown parameters 'lorra'; the closest is 'lora'"):
        take_readings(model, PAIRS, parameters="lorra")


def test_a_users_own_adapter_is_probed_without_its_wrapper() -> None:
    """ProbeCallback meets PeftModels of any script; their readings' parameters are named as the bare model's."""
    module = load_model(FIXTURES / "llada-tiny").module
    peft_model = get_peft_model(module, LoraConfig(r=2, target_modules=["q_proj"]))
    assert without_wrapper(peft_model) is module
    assert without_wrapper(module) is module
