"""The memory plan: shapes alone against counted bytes of real steps, and the published sizes."""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile

import revprobe as rp
from revprobe.finetune.memory_plan import plan_memory
from revprobe.finetune.objectives import masked_diffusion_loss
from revprobe.models.dream import DreamConfig, DreamForMaskedDiffusion
from revprobe.models.llada import LLaDAConfig, LLaDAForMaskedDiffusion
from revprobe.models.probed import ProbedModel

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCH, TOKENS = 8, 48


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most bytes alive at once during `run` beyond those before, from the allocator's own events."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


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
    extra = peak_bytes(lambda: (micro_batch(), optimizer.step()))
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
    print(kind, checkpointing, plan.peak("training") / 1e6, counted / 1e6, weights / 1e6)
    assert plan.peak("training") == pytest.approx(counted, rel=0.2)
    assert plan.peak("training") - weights == pytest.approx(counted - weights, rel=0.2)


@pytest.mark.parametrize(("kind", "queries"), [("llada", 15), ("dream", 9)])
def test_probing_needs_what_was_planned(kind: str, queries: int) -> None:
    """The fused pass of all three probes over all parameters, adapters included; whole pairs fill a batch exactly."""
    plan = plan_memory(build(kind, "meta"), batch=1, tokens=TOKENS, probe_batch=queries)
    module = build(kind, "cpu").eval()
    model = ProbedModel(module, objective="masked", check=False)
    pairs = pairs_of(TOKENS, queries // 2)
    counted = peak_bytes(lambda: rp.probe(model, pairs, batch_size=queries))
    weights, trained = held(*module.parameters(), *module.buffers()), plan.trained
    planned = plan.peak("probing") - 2 * 4 * trained  # no optimizer here
    print(kind, queries, "probing", planned / 1e6, (weights + counted) / 1e6, weights / 1e6)
    assert planned == pytest.approx(weights + counted, rel=0.2)
    assert planned - weights == pytest.approx(counted, rel=0.2)
