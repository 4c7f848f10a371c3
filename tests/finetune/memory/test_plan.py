"""The memory plan: shapes alone against counted bytes of real steps, and the published sizes."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForMaskedLM,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from typer.testing import CliRunner

import revprobe as rp
from revprobe.cli.main import app
from revprobe.finetune.config.finetuning import FinetuneConfig, read_finetune
from revprobe.finetune.memory.from_config import (
    plan_finetuning,
    plan_table,
    require_room,
)
from revprobe.finetune.memory.live_bytes import LiveBytes, fused_attention
from revprobe.finetune.memory.plan import GB, RESERVE, MemoryPlan, plan_memory
from revprobe.finetune.training.objectives import masked_diffusion_loss
from revprobe.finetune.training.prediction_callback import FirstOrderPrediction
from revprobe.models.bases.configs import DreamConfig, LLaDAConfig
from revprobe.models.families.dream import DreamForMaskedDiffusion
from revprobe.models.families.llada import LLaDAForMaskedDiffusion
from revprobe.models.probed import ProbedModel
from revprobe.models.published import published_config
from tiny import FIXTURES
from wide import peak_extra

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCH, TOKENS = 8, 48


def build(kind: str, device: str, *, lora: bool = True) -> nn.Module:
    """A model of a few million parameters, so that shapes and not odds and ends decide."""
    torch.manual_seed(0)
    with torch.device(device):
        if kind == "dream":
            size = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}
            ids = {"vocab_size": 700, "mask_token_id": 699, "bos_token_id": 698, "pad_token_id": 0, "eos_token_id": 0}
            module: Any = DreamForMaskedDiffusion(DreamConfig(**size, intermediate_size=512, **ids))
        else:
            size = {"d_model": 128, "n_heads": 4, "n_layers": 4, "mlp_hidden_size": 384}
            ids = {"vocab_size": 2000, "mask_token_id": 1999, "pad_token_id": 0, "eos_token_id": 0}
            module = LLaDAForMaskedDiffusion(LLaDAConfig(**size, **ids))
        if lora:
            module = get_peft_model(module, LoraConfig(r=8, target_modules=TARGETS))
    return module


def held(*tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def counted_training(module: nn.Module, checkpointing: bool) -> int:
    """Bytes alive at the peak of the second LoRA step, with gradients accumulated from a first micro-batch."""
    if checkpointing:
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    ids = torch.randint(1, 600, (BATCH, TOKENS))
    shift = getattr(module, "logit_shift", 0)
    generator = torch.Generator().manual_seed(0)
    mask = int(module.config.mask_token_id)  # type: ignore[union-attr,arg-type]

    def micro_batch() -> None:
        masked_diffusion_loss(module, ids, generator=generator, mask_token_id=mask, logit_shift=shift).backward()

    micro_batch()
    optimizer.step()
    state = [t for s in optimizer.state.values() for t in s.values()]
    gradients = [p.grad for p in trained]
    extra = peak_extra(lambda: (micro_batch(), optimizer.step()))
    return held(*module.parameters(), *module.buffers(), *state, *gradients) + extra


def pairs_of(tokens: int, count: int) -> rp.ReversalPairs:
    generator = torch.Generator().manual_seed(0)
    made = []
    for fact in range(count):
        draw = lambda size: torch.randint(3, 600, (size,), generator=generator).tolist()  # noqa: E731
        target, evidence, fill = draw(2), draw(2), draw(tokens - 5)
        forward = rp.Query([3, *target, *fill, *evidence], [1, 2], [tokens - 2, tokens - 1])
        reverse = rp.Query([3, *evidence, *fill, *target], [tokens - 2, tokens - 1], [1, 2])
        made.append(rp.ReversalPair(forward, reverse, fact=str(fact)))
    return rp.ReversalPairs.from_pairs(made)


# ---- against counted bytes ----


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["llada", "dream"])
def test_training_needs_what_was_planned(kind: str, checkpointing: bool) -> None:
    """Within 20 % in all, and within 20 % of what is not weights: leaving activations out would pass the first."""
    plan = plan_memory(build(kind, "meta"), batch=BATCH, tokens=TOKENS, checkpointing=checkpointing)
    module = build(kind, "cpu").train()
    counted = counted_training(module, checkpointing)
    weights = held(*module.parameters(), *module.buffers())
    assert plan.peak("training") == pytest.approx(counted, rel=0.2)
    assert plan.peak("training") - weights == pytest.approx(counted - weights, rel=0.2)
    assert (plan.parameters, plan.trained) == (
        sum(p.numel() for p in module.parameters()),
        sum(p.numel() for p in module.parameters() if p.requires_grad),
    )


@pytest.mark.parametrize(("kind", "queries"), [("llada", 15), ("dream", 9)])
def test_probing_needs_what_was_planned(kind: str, queries: int) -> None:
    """The fused pass of all three probes over all parameters, adapters included; whole pairs fill a batch exactly."""
    plan = plan_memory(build(kind, "meta"), batch=1, tokens=TOKENS, probe_batch=queries)
    module = build(kind, "cpu").eval()
    model = ProbedModel(module, objective="masked", check=False)
    pairs = pairs_of(TOKENS, queries // 2)
    counted = peak_extra(lambda: rp.probe(model, pairs, batch_size=queries))
    weights, trained = held(*module.parameters(), *module.buffers()), plan.trained
    planned = plan.peak("probing") - 2 * 4 * trained  # no optimizer here
    assert planned == pytest.approx(weights + counted, rel=0.2)
    assert planned - weights == pytest.approx(counted, rel=0.2)


def test_the_prediction_needs_what_was_planned(tmp_path: Any) -> None:
    """What the callback holds beside a step: the tensors it makes, counted while it measures."""
    plan = plan_memory(build("llada", "meta"), batch=1, tokens=TOKENS, probe_batch=15)
    module = build("llada", "cpu").eval()
    trained = [p for p in module.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    optimizer.step()
    wrapping = {"objective": "masked", "check": False}
    callback = FirstOrderPrediction(pairs_of(TOKENS, 5), tmp_path / "p.parquet", steps=[0], batch_size=15, **wrapping)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    control, at = TrainerControl(), {"model": module, "optimizer": optimizer}
    callback.on_train_begin(args, TrainerState(), control, **at)

    def step() -> None:
        callback.on_pre_optimizer_step(args, TrainerState(), control, **at)
        optimizer.step()
        callback.on_optimizer_step(args, TrainerState(), control, **at)

    counted = peak_extra(step)
    rows = [size for phase, what, size in plan.rows if phase == "prediction" and what.startswith(("copies", "a run"))]
    assert len(rows) == 2 and len(callback.table) == 2
    assert sum(rows) == pytest.approx(counted, rel=0.2)


# ---- what counts ----


def test_live_bytes_are_those_alive_at_once() -> None:
    """By hand: views cost nothing, what is dropped is given back, what was there before is not counted."""
    with torch.device("meta"):
        before = torch.zeros(1000)
        with LiveBytes([before]) as count:
            first = before + 1
            assert count.live == 4000
            second = first[:10].double()
            assert count.live == 4080
            del first
            assert (count.live, count.peak) == (80, 4080)
            before.view(10, 100).t()
            assert (count.live, count.peak) == (80, 4080)
            del second
        assert count.live == 0


def test_fused_attention_keeps_no_scores_and_is_put_back() -> None:
    plain = torch.nn.functional.scaled_dot_product_attention
    query = torch.zeros(2, 4, 512, 8, device="meta", requires_grad=True)
    with fused_attention(), LiveBytes([query]) as count:
        output = torch.nn.functional.scaled_dot_product_attention(query, query, query)
        assert output.shape == query.shape
        assert count.live == 4 * (2 * 4 * 512 * 8 + 2 * 4 * 512), "an output and one number a row"
        output.sum().backward()
    assert query.grad is not None and query.grad.shape == query.shape
    assert torch.nn.functional.scaled_dot_product_attention is plain
    real = torch.randn(1, 1, 3, 4)
    with fused_attention():
        assert torch.equal(torch.nn.functional.scaled_dot_product_attention(real, real, real), plain(real, real, real))


def test_checkpointing_and_smaller_batches_need_less() -> None:
    """The two things to turn when a plan does not fit."""
    module = build("llada", "meta")
    grads = [p.requires_grad for p in module.parameters()]

    def peak(**options: Any) -> int:
        return plan_memory(module, **({"batch": 8, "tokens": 64} | options)).peak("training")

    assert peak(checkpointing=True) < 0.6 * peak()
    assert peak(batch=4) < 0.6 * peak() + 0.5 * held(*module.parameters())
    four = plan_memory(module, batch=8, tokens=64, four_bit=True)
    assert four.peak() < plan_memory(module, batch=8, tokens=64).peak()
    assert [p.requires_grad for p in module.parameters()] == grads
    assert all(p.grad is None for p in module.parameters())
    assert not any(getattr(m, "gradient_checkpointing", False) for m in module.modules())


def test_rows_add_up_to_the_peaks() -> None:
    plan = plan_memory(build("dream", "meta"), batch=2, tokens=16)
    frame = plan.to_frame()
    assert list(frame.columns) == ["training", "probing", "prediction"]
    for phase in frame.columns:
        assert frame.loc["tensors in all", phase] == plan.peak(phase) == frame[phase].iloc[:-1].sum()
    assert plan.peak() == frame.loc["tensors in all"].max()
    assert plan.headroom(10 * GB) == 10 * GB - plan.peak() - RESERVE
    assert (frame.iloc[:-1] >= 0).all().all()


def test_a_phase_that_is_not_planned_has_no_column() -> None:
    """Runs without predictions: their plan is a table as any other."""
    plan = plan_memory(build("llada", "meta"), batch=2, tokens=16, prediction=False)
    assert list(plan.to_frame().columns) == ["training", "probing"]
    assert plan.to_frame().loc["tensors in all"].max() == plan.peak()
    assert list(plan_table(plan, 10 * GB).columns) == ["what", "training", "probing"]


def test_what_cannot_be_planned_is_said() -> None:
    with pytest.raises(rp.RevprobeError, match=r"holds numbers; build the model inside `with torch.device\('meta'\)`"):
        plan_memory(build("llada", "cpu"), batch=1, tokens=8)
    frozen = build("llada", "meta", lora=False)
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(rp.RevprobeError, match="no parameter trains"):
        plan_memory(frozen, batch=1, tokens=8)


# ---- the published models, and configs ----


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("GSAI-ML/LLaDA-8B-Base", 8_015_581_184), ("Dream-org/Dream-v0-Base-7B", 7_615_616_512)],
)
def test_published_shapes_have_the_published_sizes(name: str, parameters: int) -> None:
    config = published_config(name)
    assert config is not None
    with torch.device("meta"):
        module = AutoModelForMaskedLM.from_config(config)
    assert sum(p.numel() for p in module.parameters()) == parameters


def test_the_example_for_llada_fits_on_48_gb() -> None:
    """From shapes alone, offline: weights by hand from the published size, the adapters from rank and shapes."""
    example: Any = read_finetune("llada-8b-parent-child")
    plan = plan_finetuning(example, tokens=64)
    rows = {(phase, what): size for phase, what, size in plan.rows}
    rotary = 64 * 4 * 2
    assert rows["training", "weights"] == pytest.approx(2 * 8_015_581_184 + rotary, abs=1024)
    adapters = 16 * 32 * (4 * (4096 + 4096) + 3 * (4096 + 12288))
    assert plan.trained == adapters
    assert rows["training", "adapters"] == 4 * adapters == rows["training", "gradients"]
    assert rows["training", "AdamW's two moments"] == 8 * adapters
    inputs = 32 * 8 * 64 * 4096 * 2
    assert rows["training", "activations kept for the backward pass"] == pytest.approx(inputs, rel=0.1)
    assert plan.headroom(48 * GB) > 10 * GB
    require_room(plan, 48 * GB, example)
    with pytest.raises(rp.RevprobeError, match=r"needs 2\d\.\d GB and there are 20\.0: lower snapshots.batch_size, or"):
        require_room(plan, 20 * GB, example)


KEYS: tuple[str, ...] = ("training.batch_size", "gradient_checkpointing", "snapshots.batch_size", "predictions: false")
KEYS += ("model.dtype: bfloat16", "model.quantize: 4bit", "lora: {rank: 16}")
PASSES = {*KEYS[:3]}


def planned(lora: dict[str, int] | None, model: dict[str, str], **snapshots: Any) -> FinetuneConfig:
    relation = {"name": "invented_names", "direction": "P2C"}
    told = {"every": 2, "parameters": "all" if lora is None else "lora"} | snapshots
    named = {"name": "GSAI-ML/LLaDA-8B-Base"} | model
    training = {"steps": 2, "batch_size": 4}
    return FinetuneConfig(name="p", model=named, relation=relation, lora=lora, training=training, snapshots=told)


@cache
def plan_of(config: str) -> MemoryPlan:
    return plan_finetuning(FinetuneConfig.model_validate_json(config), tokens=64)


@pytest.mark.parametrize(
    ("lora", "model", "memory", "told"),
    [
        # All weights stay wide and whole; where they and their moments are too much, no batch is small enough.
        (None, {}, 40, {KEYS[6]}),
        (None, {"dtype": "float32"}, 200, {KEYS[3], KEYS[6]}),
        ({"rank": 2}, {"dtype": "float32"}, 30, {KEYS[4], KEYS[5]}),
        ({"rank": 2}, {}, 15, {KEYS[5]}),  # published in bfloat16
        ({"rank": 2}, {}, 18, PASSES | {KEYS[3], KEYS[5]}),
        ({"rank": 2}, {"quantize": "4bit"}, 8, PASSES | {KEYS[3]}),
        ({"rank": 2}, {"quantize": "4bit"}, 5, set()),
    ],
)
def test_the_way_out_is_one_that_the_config_may_take(
    lora: dict[str, int] | None, model: dict[str, str], memory: int, told: set[str]
) -> None:
    config = planned(lora, model)
    with pytest.raises(rp.RevprobeError, match=f"GB and there are {memory}.0: .*take a smaller model") as raised:
        require_room(plan_of(config.model_dump_json()), memory * GB, config)
    assert {key for key in KEYS if key in str(raised.value)} == told
    if KEYS[5] in told:
        planned(lora, model | {"quantize": "4bit"})
    if KEYS[6] in told:
        planned({"rank": 16}, model, parameters="lora")


def test_four_bits_are_named_with_what_they_need() -> None:
    """A config refuses them beside gradients of all weights."""
    config = planned({"rank": 2}, {}, parameters="all")
    with pytest.raises(rp.RevprobeError, match=r"4bit with snapshots\.parameters: lora"):
        require_room(plan_finetuning(config, tokens=64), 15 * GB, config)


def config(tmp_path: Path, model: str, more: str = "") -> Path:
    path = tmp_path / "plan.yaml"
    relation = "relation: {name: invented_names, direction: P2C}"
    path.write_text(f"name: p\nmodel: {model}\n{relation}\ntraining: {{steps: 2, batch_size: 4{more}}}\n")
    return path


@pytest.mark.parametrize(
    "model", [f"{{name: {FIXTURES / 'llada-tiny'}}}", f"{{name: {FIXTURES / 'dream-tiny'}}}", "{tiny: {layout: llama}}"]
)
def test_the_command_prints_the_plan_of_any_model(tmp_path: Path, model: str) -> None:
    """A folder with a config.json, or a model that the run builds; tokens from the relation's own texts."""
    found = CliRunner().invoke(app, ["plan", str(config(tmp_path, model))])
    assert found.exit_code == 0, found.output + str(found.exception)
    for words in ("weights", "adapters", "AdamW's two moments", "headroom", "from the longest text of"):
        assert words in found.output, words


def test_the_command_fails_where_it_does_not_fit(tmp_path: Path) -> None:
    path = config(tmp_path, f"{{name: {FIXTURES / 'llada-tiny'}}}")
    found = CliRunner().invoke(app, ["plan", str(path), "--memory", "0.5", "--tokens", "12"])
    assert isinstance(found.exception, rp.RevprobeError) and "there are 0.5: set model.dtype" in str(found.exception)
    assert "headroom" in found.output and "12 tokens" in found.output


def test_a_model_that_has_no_config_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("revprobe.models.published.hub_options", lambda source: {"local_files_only": True})
    with pytest.raises(rp.RevprobeError, match=r"no config.json for 'someone/unheard-of' .*GSAI-ML/LLaDA-8B-Base"):
        plan_finetuning(read_finetune(config(tmp_path, "{name: someone/unheard-of}")))  # type: ignore[arg-type]
