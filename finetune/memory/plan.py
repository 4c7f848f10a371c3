"""What a fine-tuning, LoRA or full, and its probes need in memory, worked out from shapes before anything is loaded.

A training step and a probing pass are run through on the meta device, where tensors have shapes and no memory, and
the bytes alive at once are counted (`live_bytes`). What is not tensors (the CUDA context, the allocator's slack) is a
flat reserve, and mixed precision by autocast is not run through: a bfloat16 base with float32 adapters is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from ...arguments import checked
from ...errors import RevprobeError
from ...hooks.gradients.products import _CHUNK
from ...hooks.gradients.run_again import run_again, that_can
from ...hooks.layer_numbers import outermost_blocks
from ...hooks.untouched import untouched
from ...models.contract.called import CalledModule
from ...models.peft_adapters import adapter_parameters
from ...probes.pairs.query import Query
from ...probes.passes.batches import ONE_PAIR, GradientBatch, gradient_batch, queries_per_batch
from .live_bytes import AnsweredYes, LiveBytes, fused_attention

GB = 10**9
# The CUDA context with its kernels, and what the caching allocator holds beyond the tensors.
RESERVE = 1_500_000_000
# NF4 with doubly quantized scales: bytes a weight (Dettmers et al. 2023, Sec. 3).
_FOUR_BIT = 4.127 / 8
PHASES = ("training", "probing", "prediction")
_KEPT, _WORKING = "activations kept for the backward pass", "logits, loss and the layer at work"
_SLOPES = "a run with slopes"
_OF_A_PASS = (_KEPT, _WORKING, _SLOPES)
# Target tokens a query is taken to have: only their rows of the logits are read, in float64.
_TARGETS = 2


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by phase and purpose; the phases follow each other, so the largest decides.

    Attributes:
        rows: (phase, what, bytes), adding up to the phase's peak.
        parameters, trained: how many parameters there are, adapters included, and how many of them train.
        about: what was assumed, one line each.
    """

    rows: tuple[tuple[str, str, int], ...]
    parameters: int
    trained: int
    about: tuple[str, ...] = ()

    def peak(self, phase: str | None = None) -> int:
        """The bytes of tensors alive at once in a phase; in the largest when None."""
        phases = PHASES if phase is None else (phase,)
        return max(sum(size for where, _, size in self.rows if where == each) for each in phases)

    def held(self, phase: str) -> int:
        """The bytes of a phase that are there however few rows or queries run at once."""
        return sum(size for where, what, size in self.rows if where == phase and what not in _OF_A_PASS)

    def headroom(self, memory: int) -> int:
        """What `memory` bytes leave beyond the largest phase and the reserve; negative when it does not fit."""
        return memory - self.peak() - RESERVE

    def to_frame(self) -> pd.DataFrame:
        """One row for each purpose, one column for each phase that was planned, in bytes, and the sums."""
        frame = pd.DataFrame(self.rows, columns=["phase", "what", "bytes"])
        order = list(dict.fromkeys(frame["what"]))
        table = frame.pivot_table(index="what", columns="phase", values="bytes", aggfunc="sum", fill_value=0)
        table = table.reindex(index=order, columns=[phase for phase in PHASES if phase in table])
        table.loc["tensors in all"] = table.sum()
        return table.astype("int64")


@checked
def plan_memory(
    module: nn.Module,
    *,
    batch: int,
    tokens: int,
    checkpointing: bool = False,
    objective: str = "masked",
    probe_batch: int | None = None,
    probe_tokens: int | None = None,
    prediction: bool = True,
    four_bit: bool = False,
) -> MemoryPlan:
    """The memory of training a module, of probing it, and of the first-order prediction at its snapshots.

    Args:
        module: on the meta device, with its adapter if it has one; what requires grad trains, with AdamW.
        batch, tokens: rows of one forward pass while training (without accumulation), and tokens of a row.
        checkpointing: whether layers are run again in the backward pass instead of keeping their activations.
        probe_batch, probe_tokens: queries of a probe's batch and tokens of a query; the probes' own default, and
            `tokens`, when None.
        prediction: whether a `FirstOrderPrediction` is taken at the snapshots.
        four_bit: whether frozen linear weights are held in 4 bits (QLoRA).
    Raises: RevprobeError, for a module that is not on the meta device, or none of whose parameters trains.
    """
    away = next((name for name, p in module.named_parameters() if not p.is_meta), None)
    if away is not None:
        raise RevprobeError(
            f"parameter {away!r} holds numbers; build the model inside `with torch.device('meta')` to plan for it"
        )
    trained = [p for p in module.parameters() if p.requires_grad]
    if not trained:
        raise RevprobeError("no parameter trains; add an adapter (peft) or set requires_grad")
    probe_tokens = probe_tokens or tokens
    query = Query.unchecked(range(probe_tokens), (0,), (1,))
    room = gradient_batch(CalledModule(module), [query], probe_batch)
    room = room._replace(queries=max(room.queries, ONE_PAIR))  # however large, a pair and its control run together
    sloping = queries_per_batch(CalledModule(module), [query], probe_batch)
    theirs = set(adapter_parameters(module))
    adapters = sum(_size(p) for name, p in module.named_parameters() if name in theirs)
    always = {
        "weights": _weights(module, four_bit) - adapters,
        "adapters": adapters,
        "AdamW's two moments": 2 * sum(_size(p) for p in trained),
    }
    gradients = {"gradients": sum(_size(p) for p in trained)}
    phases: dict[str, dict[str, int]] = {}
    with AnsweredYes():
        phases["training"] = always | gradients | _training(module, batch, tokens, checkpointing, objective)
        phases["probing"] = always | _probing(module, room, probe_tokens)
        if prediction:
            phases["prediction"] = always | gradients | _predicting(module, trained, sloping, probe_tokens)
    rows = tuple((phase, what, size) for phase, found in phases.items() for what, size in found.items())
    about = (
        f"training: {batch} rows of {tokens} tokens at once, {'with' if checkpointing else 'without'} checkpointing",
        f"probing: {room.queries} queries of {probe_tokens} tokens at once, gradients of all parameters"
        + (", layers run again" if room.again else ""),
    )
    return MemoryPlan(rows, sum(p.numel() for p in module.parameters()), sum(p.numel() for p in trained), about)


def _training(module: nn.Module, batch: int, tokens: int, checkpointing: bool, objective: str) -> dict[str, int]:
    """One forward and backward pass, the gradients of an earlier micro-batch being there already."""
    ids = torch.zeros(batch, tokens, dtype=torch.long, device="meta")
    made = [p for p in module.parameters() if p.requires_grad and p.grad is None]
    for parameter in made:
        parameter.grad = torch.empty_like(parameter)
    known = [*module.parameters(), *module.buffers(), ids, *(p.grad for p in module.parameters() if p.grad is not None)]
    modes = [(m, m.training) for m in module.modules()]
    try:
        module.train()
        with fused_attention(), _checkpointed(module, checkpointing), LiveBytes(known) as count:
            logits = _logits(module, ids)
            kept = count.live - logits.untyped_storage().nbytes()
            if objective == "causal":
                logits, ids = logits[:, :-1], ids[:, 1:]
            # As the objectives price a batch, without looking at values.
            loss = cross_entropy(logits.flatten(0, 1).float(), ids.flatten(), reduction="none").sum()
            del logits
            loss.backward()
    finally:
        for m, mode in modes:
            m.training = mode
        for parameter in made:
            parameter.grad = None
    return {_KEPT: kept, _WORKING: count.peak - kept}


def _probing(module: nn.Module, room: GradientBatch, tokens: int) -> dict[str, int]:
    """The fused pass with gradients of all parameters: activations of every layer, in eval mode; where layers run
    again, what goes into their modules.

    The backward pass goes to the embeddings alone, as the recorder's does, and factors of gradients are let go one
    module after the other. The most is at work at the unembedding, with its factors in float32, or where a layer's
    factors are paired.
    """
    batch = room.queries
    ids = torch.zeros(batch, tokens, dtype=torch.long, device="meta")
    known = [*module.parameters(), *module.buffers(), ids]
    calls = _Calls(module)
    blocks = that_can(module, outermost_blocks(module)) if room.again else []
    with untouched(module), fused_attention(), calls, run_again(module, blocks):
        for parameter in module.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        with LiveBytes(known) as count:
            logits = _logits(module, ids)
            kept = count.live - logits.untyped_storage().nbytes()
            copied = 0 if logits.element_size() >= 4 else 4 * logits.numel()
            log_probabilities = logits[:, :_TARGETS].double().log_softmax(-1)
            losses = -log_probabilities[..., 0].mean(1)
            del logits, log_probabilities
            (first,) = torch.autograd.grad(losses.sum(), [calls.first()])
            del first
    pairs = min(2 * batch, max(1, _CHUNK // (tokens * calls.widest)))
    # Of the last layer only the readout rows have gradients; by the one before, the last one's activations are gone.
    paired = 4 * pairs * tokens * 2 * calls.widths - kept // calls.layers
    return {_KEPT: kept, _WORKING: max(count.peak - kept + copied, paired)}


def _predicting(module: nn.Module, trained: Sequence[Tensor], batch: int, tokens: int) -> dict[str, int]:
    """Copies of what trains (before, after, the update made, the one foretold), and a run with slopes beside values."""
    ids = torch.zeros(batch, tokens, dtype=torch.long, device="meta")
    along = {name: torch.empty_like(p) for name, p in module.named_parameters() if p.requires_grad}
    known = [*module.parameters(), *module.buffers(), ids, *along.values()]
    # Without `fused_attention`: the run with slopes takes the plain kernel, which makes all scores.
    with untouched(module), torch.no_grad(), LiveBytes(known) as count, forward_ad.dual_level():
        parameters = dict(module.named_parameters())
        moved = {name: forward_ad.make_dual(parameters[name].detach(), slope) for name, slope in along.items()}
        output = functional_call(module, moved, (), {"input_ids": ids})
        logits = output if isinstance(output, Tensor) else output.logits
        log_probabilities = logits[:, :_TARGETS].double().log_softmax(-1)
        del output, logits, log_probabilities
    return {
        "copies of what trains": 4 * sum(_size(p, least=4) for p in trained),
        _SLOPES: count.peak,
    }


class _Calls:
    """While entered: the output of the first embedding; besides, how many layers there are, and how wide."""

    def __init__(self, module: nn.Module) -> None:
        self.layers = int(getattr(getattr(module, "config", None), "num_hidden_layers", None) or 1)
        head: Any = getattr(module, "get_output_embeddings", lambda: None)()
        self.embeddings = [part for part in module.modules() if isinstance(part, nn.Embedding)]
        linear = [p for p in module.modules() if isinstance(p, nn.Linear) and p is not head]
        self.widest = max((max(part.weight.shape) for part in linear), default=1)
        self.widths = max((sum(part.weight.shape) for part in linear), default=2)
        # A module with parameters has what goes into it held for its gradient, whether its layer runs again or not.
        self.owners = [part for part in module.modules() if next(part.parameters(recurse=False), None) is not None]
        self._found: list[Tensor] = []
        self._held: list[Any] = []
        self._handles: list[Any] = []

    def __enter__(self) -> _Calls:
        keep = lambda part, args, output: self._found.append(output)  # noqa: E731
        self._handles = [part.register_forward_hook(keep) for part in self.embeddings]
        self._handles += [part.register_forward_pre_hook(self._hold) for part in self.owners]
        return self

    def _hold(self, part: nn.Module, args: tuple[Any, ...]) -> None:
        if len(self._held) < len(self.owners):  # not what goes in again
            self._held.append(args)

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._held.clear()

    def first(self) -> Tensor:
        assert self._found, "a language model looks its tokens up"
        return self._found[0]


def _logits(module: nn.Module, ids: Tensor) -> Tensor:
    output = module(input_ids=ids)
    return output if isinstance(output, Tensor) else output.logits


class _checkpointed:  # reads as a verb in `with`
    """Gradient checkpointing as the Trainer switches it on, for as long as it is entered."""

    def __init__(self, module: Any, wanted: bool) -> None:
        self.module, self.wanted = module, wanted

    def __enter__(self) -> None:
        if self.wanted:
            self.module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def __exit__(self, *_: Any) -> None:
        if self.wanted:
            self.module.gradient_checkpointing_disable()


def _weights(module: nn.Module, four_bit: bool) -> int:
    """Parameters and buffers, each storage once; frozen linear weights in 4 bits where asked for."""
    sizes: dict[int, int] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
    if four_bit:
        head: Any = getattr(module, "get_output_embeddings", lambda: None)()
        for part in module.modules():
            if isinstance(part, nn.Linear) and part is not head and not part.weight.requires_grad:
                sizes[part.weight.untyped_storage()._cdata] = int(part.weight.numel() * _FOUR_BIT)
    return sum(sizes.values())


def _size(tensor: Tensor, least: int = 0) -> int:
    return tensor.numel() * max(tensor.element_size(), least)
