"""Gradients of large models and long queries: blocks run again in the backward pass, and the numbers stay the same.

The reference is the same probe with everything held, whose own reference is autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pandas as pd
import peft
import pytest
import torch
from torch import Tensor, nn

import revprobe as rp
import tiny
import wide
from revprobe.hooks.gradients import run_again as again_file
from revprobe.hooks.gradients.run_again import RunsOtherwise, run_again, that_can
from revprobe.hooks.layer_numbers import outermost_blocks
from revprobe.probes.passes import batches
from revprobe.probes.passes.batches import GradientBatch, gradient_batch


def with_lora() -> rp.ProbedModel:
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    module = peft.get_peft_model(tiny.llama().module, config)
    return rp.ProbedModel(module.eval(), objective="causal")


MODELS: dict[str, Callable[[], rp.ProbedModel]] = {
    "radd": tiny.radd,
    "gpt2 (tied, fused)": tiny.gpt2,
    "llama (keeps a cache)": tiny.llama,
    "llama, eager": lambda: tiny.llama("eager"),
    "lora": with_lora,
    "read in blocks": tiny.in_blocks,
    "bridge": lambda: tiny.bridged(tiny.gpt2()),
}


@pytest.fixture
def little_room(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Room for two short queries; how many blocks run again in each batch."""
    monkeypatch.setattr(batches, "_room", lambda model: 20)
    seen: list[int] = []
    counted = lambda module, blocks, adopting=(): noted(that_can(module, blocks, adopting))  # noqa: E731

    def noted(found: list[nn.Module]) -> list[nn.Module]:
        seen.append(len(found))
        return found

    monkeypatch.setattr("revprobe.probes.passes.run.that_can", counted)
    return seen


def frames(model: rp.ProbedModel, pairs: rp.ReversalPairs) -> dict[str, pd.DataFrame]:
    together = {str(n): one.frame for n, one in enumerate(rp.probe(model, pairs))}
    return {"alone": rp.probe_gradient_cosine(model, pairs).frame} | together


@pytest.mark.parametrize("name", MODELS)
def test_readings_are_those_with_everything_held(name: str, request: pytest.FixtureRequest) -> None:
    model, pairs = MODELS[name](), tiny.text_like_pairs()
    held = frames(model, pairs)
    seen = request.getfixturevalue("little_room")
    again = frames(model, pairs)
    assert seen and all(seen), "blocks ran again"
    for probe, frame in held.items():
        # Batches are of other sizes, whose products round otherwise: by their factors, which may cancel each other.
        pd.testing.assert_frame_equal(again[probe], frame, rtol=2e-5, atol=5e-6)


class Counts(nn.Module):
    """A block with a memory, which is no buffer and no attribute of its own: what it adds depends on `change`."""

    def __init__(self, change: Callable[[int], float]) -> None:
        super().__init__()
        self.linear, self.runs, self.change = nn.Linear(8, 8), [0], change

    def forward(self, states: Tensor) -> Tensor:
        self.runs[0] += 1
        return states + self.linear(states).tanh() * self.change(self.runs[0])


def stack_of(*blocks: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"layers": nn.ModuleList(blocks)})


def fails(run: int) -> float:
    if run > 1:
        raise ValueError("only once")
    return 1.0


@pytest.mark.parametrize("change", [lambda run: 1.0 + 0.1 * run, fails], ids=["other values", "an error"])
def test_a_block_that_does_something_else_the_second_time_is_told(change: Callable[[int], float]) -> None:
    module = stack_of(Counts(lambda run: 1.0), Counts(change))
    states = torch.randn(2, 3, 8)
    with pytest.raises(RunsOtherwise, match="again"), run_again(module, outermost_blocks(module)):
        out = states
        for block in outermost_blocks(module):
            out = block(out)
        out.sum().backward()


class Swaps(nn.Module):
    """A block that hands its rows on in another order the second time: the sum of what it gives is the same."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.runs = nn.Linear(8, 8), [0]

    def forward(self, states: Tensor) -> Tensor:
        self.runs[0] += 1
        return self.linear(states).tanh().roll(self.runs[0] - 1, 0)


def test_rows_that_come_in_another_order_the_second_time_are_told() -> None:
    module = stack_of(Swaps())
    with pytest.raises(RunsOtherwise, match="other values"), run_again(module, outermost_blocks(module)):
        outermost_blocks(module)[0](torch.randn(2, 3, 8)).sum().backward()


def no_memory(run: int) -> float:
    if run > 1:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 15728640 bytes")
    return 1.0


def test_memory_that_runs_out_is_not_answered_by_holding_more() -> None:
    module = stack_of(Counts(no_memory))
    with pytest.raises(RuntimeError, match="can't allocate"), run_again(module, outermost_blocks(module)):
        outermost_blocks(module)[0](torch.randn(2, 3, 8)).sum().backward()


def test_it_is_held_instead_and_read_right(little_room: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that fails when it runs again costs a run, and no number."""
    model, pairs = tiny.llama(), tiny.text_like_pairs()
    right = frames(model, pairs)
    assert any(little_room), "blocks ran again"
    failed: list[str] = []

    def same(first: Any, again: Any) -> bool:
        failed.append("once")
        return False

    monkeypatch.setattr(again_file, "_same", same)
    for probe, frame in frames(model, pairs).items():
        pd.testing.assert_frame_equal(frame, right[probe], rtol=2e-5, atol=1e-6)
    assert len(failed) == 2, "once for each of the two probes, and then everything is held"


def test_no_trace_is_left_also_after_an_error(little_room: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs = tiny.llama(), tiny.text_like_pairs()
    before = [(module, dict(vars(module))) for module in model.module.modules()]
    caches = model.module.config.use_cache
    rp.probe_gradient_cosine(model, pairs)

    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr("revprobe.hooks.gradients.recorder.find_order", broken)
    with pytest.raises(ZeroDivisionError):
        rp.probe_gradient_cosine(model, pairs)
    assert any(little_room), "blocks ran again"
    assert caches is True and model.module.config.use_cache is True
    for module, held in before:
        assert vars(module).keys() == held.keys(), "no forward function of the probe's stays"


def test_what_cannot_run_again_is_left_alone() -> None:
    holds = nn.Sequential(nn.Linear(8, 8))
    holds.register_parameter("scale", nn.Parameter(torch.ones(8)))
    module = stack_of(Counts(lambda run: 1.0), holds, Counts(lambda run: 1.0))
    first, second, third = outermost_blocks(module)
    assert that_can(module, [first, second, third]) == [first, third], "a block with parameters of its own is not"
    assert that_can(module, [first, second, third], {"layers.2"}) == [first], "nor one that uses its children's"
    compiled = nn.ModuleDict({"layers": nn.ModuleList([torch.compile(first), third])})
    assert that_can(compiled, outermost_blocks(compiled)) == []


def test_a_layer_more_takes_a_part_of_what_holding_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same batches: what lies inside of blocks is not held, but for the inputs of modules with weights."""
    pairs = wide.pairs(4, 24)
    grown = []
    for again in (False, True):
        monkeypatch.setattr("revprobe.probes.passes.run.gradient_batch", lambda *_, a=again: GradientBatch(8, again=a))
        peaks = []
        for layers in (2, 8):
            model = wide.model(layers)
            rp.probe_gradient_cosine(model, pairs)  # the order of rows is asked once
            peaks.append(wide.peak_extra(lambda model=model: rp.probe_gradient_cosine(model, pairs)))
        grown.append(peaks[1] - peaks[0])
    assert 0 < grown[1] < 0.5 * grown[0]


@pytest.mark.parametrize(
    ("length", "asked", "queries", "again"),
    [
        (16, None, 8, False),
        (64, None, 2, False),
        (65, None, 4, True),
        (300, None, 2, True),
        (300, 1, 1, True),
        (300, 3, 3, True),
        (300, 4, 4, False),
        (64, 1, 1, False),
    ],
)
def test_blocks_of_a_large_model_run_again_where_a_pair_and_its_control_do_not_fit(
    length: int, asked: int | None, queries: int, again: bool
) -> None:
    """At 8.1 billion weights on a CPU; who asks for larger batches has the memory for them."""
    model: Any = SimpleNamespace(
        module=nn.Linear(90_000, 90_000, device="meta"), device=torch.device("cpu"), draws=1, canvas_length=None
    )
    query = rp.Query(list(range(length)), [length - 1], [0])
    assert gradient_batch(model, [query], asked) == GradientBatch(queries, again)
