"""The one file that every peer's process reads: weights, queries, products asked for, and their float64 answers.

A query's loss is the negative log-likelihood of its last token. The answers are autograd's on the model in float64, one
query at a time, for each parameter, so that a way that covers only some of them is held against those.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import LlamaConfig, LlamaForCausalLM

# Llama-shaped: hidden size, layers, heads, MLP width, vocabulary.
SIZES = {
    "tiny": (32, 2, 2, 64, 128),
    "30M": (512, 8, 8, 1376, 8192),
    "110M": (768, 12, 12, 2048, 16384),
}
HELD = 4 * 10**9  # bytes of float64 gradients at once


@dataclass(frozen=True)
class Inputs:
    """Shapes: ids `query seq`; left, right `product`; answers {parameter: `product`}, float64.

    attention: {T: (ids `batch seq`, weights `layer batch head` of `row_and_column(T)`, float64)}.
    """

    model: LlamaForCausalLM
    ids: Tensor
    left: Tensor
    right: Tensor
    answers: dict[str, Tensor]
    attention: dict[int, tuple[Tensor, Tensor]]
    facts: dict[str, Any]


class Float64(TorchFunctionMode):
    """While open, what asks for float32 (transformers' norms, rotations and eager softmax do) gets float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wide = lambda value: torch.float64 if value is torch.float32 else value  # noqa: E731
        if func is Tensor.float:
            func = Tensor.double
        return func(*map(wide, args), **{key: wide(value) for key, value in (kwargs or {}).items()})


def row_and_column(length: int) -> tuple[int, int]:
    """The readout row and the evidence column of an attention query."""
    return length - 2, 1


def losses(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Shapes: `batch seq -> batch`, nats."""
    logits = model(ids, use_cache=False).logits[:, -2]
    return F.cross_entropy(logits, ids[:, -1], reduction="none")


def products_of(queries: int, kind: str) -> tuple[Tensor, Tensor]:
    """Which gradients are multiplied: each with itself and within pairs (0, 1), (2, 3), ...; or all with all (gram)."""
    if kind == "gram":
        left, right = torch.triu_indices(queries, queries)
        return left, right
    every, firsts = torch.arange(queries), torch.arange(0, queries, 2)
    return torch.cat([every, firsts]), torch.cat([every, firsts + 1])


def write_inputs(
    path: Path, size: str, *, queries: int, tokens: int, kind: str, lengths: list[int], batch: int, seed: int = 0
) -> None:
    """Draw weights and queries by the seed, work the answers out in float64, write one safetensors file."""
    torch.manual_seed(seed)
    hidden, layers, heads, wide, vocab = SIZES[size]
    shape = {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads}
    config = {"hidden_size": hidden, "intermediate_size": wide, "vocab_size": vocab, "max_position_embeddings": 8192}
    config["initializer_range"] = hidden**-0.5  # scores of about 1: attention that is not the same everywhere
    model = LlamaForCausalLM(LlamaConfig(**shape, **config)).eval()
    kept = {f"weights.{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    kept["ids"] = torch.randint(3, vocab, (queries, tokens))
    kept["ids"][1::2, [0, -1]] = kept["ids"][::2, [-1, 0]]  # a pair asks for the one's first token and the other's
    kept["left"], kept["right"] = products_of(queries, kind)
    for length in lengths:
        kept[f"attention.ids.{length}"] = torch.randint(3, vocab, (batch, length))
    exact = model.double()
    with Float64():
        found = gradient_answers(exact, kept["ids"], kept["left"], kept["right"]) if queries else {}
        kept |= {f"answers.{name}": tensor for name, tensor in found.items()}
        exact.set_attn_implementation("eager")
        for length in lengths:
            kept[f"attention.weights.{length}"] = attention_answer(exact, kept[f"attention.ids.{length}"])
    parameters = sum(p.numel() for p in model.parameters())
    facts = {"size": size, "parameters": parameters, "queries": queries, "tokens": tokens, "products": kind}
    facts |= {"seed": seed, "batch": batch, "loss": "negative log-likelihood of the last token, nats"}
    save_file(kept, path, {"config": json.dumps({**shape, **config}), "facts": json.dumps(facts)})


def gradient_answers(model: LlamaForCausalLM, ids: Tensor, left: Tensor, right: Tensor) -> dict[str, Tensor]:
    """Products of the gradients of single queries, for each parameter."""
    later = torch.maximum(left, right)
    last = [int(later[(left == query) | (right == query)].max()) for query in range(len(ids))]
    most = max(sum(last[q] >= query for q in range(query + 1)) for query in range(len(ids)))
    found: dict[str, Tensor] = {}
    for group in _groups(model, HELD // (8 * most)):
        answers = torch.zeros(len(group), len(left), dtype=torch.float64)
        held: dict[int, tuple[Tensor, ...]] = {}
        for query in range(len(ids)):
            held[query] = torch.autograd.grad(losses(model, ids[query : query + 1]).sum(), list(group.values()))
            for n in torch.nonzero(later == query)[:, 0].tolist():
                couples = zip(held[int(left[n])], held[int(right[n])], strict=True)
                answers[:, n] = torch.stack([(x * y).sum() for x, y in couples])
            held = {q: gradients for q, gradients in held.items() if last[q] > query}
        found |= dict(zip(group, answers, strict=True))
    return found


def _groups(model: LlamaForCausalLM, most: int) -> list[dict[str, Tensor]]:
    """The parameters in groups of at most so many numbers, or one parameter: gradients of a group are held together."""
    groups: list[dict[str, Tensor]] = [{}]
    for name, parameter in model.named_parameters():
        if groups[-1] and sum(p.numel() for p in groups[-1].values()) + parameter.numel() > most:
            groups.append({})
        groups[-1][name] = parameter
    return groups


@torch.no_grad()
def attention_answer(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Weights of the readout row on the evidence column, by eager attention, of which one layer is held at a time."""
    row, column = row_and_column(ids.shape[1])
    found: list[Tensor] = []

    def keep(module: Any, args: Any, output: tuple[Tensor, Tensor]) -> None:
        found.append(output[1][:, :, row, column].clone())

    handles = [layer.self_attn.register_forward_hook(keep) for layer in model.model.layers]
    try:
        model(ids, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(found)


def read_inputs(path: Path) -> Inputs:
    """Read what `write_inputs` wrote; the model is float32 and in eval mode."""
    with safe_open(path, "pt") as file:
        about = file.metadata()
        parts: dict[str, dict[str, Tensor]] = {"weights": {}, "answers": {}, "attention": {}, "": {}}
        for key in file.keys():  # noqa: SIM118, not a dict
            part, _, name = key.partition(".")
            parts[part if name else ""][name or part] = file.get_tensor(key)
    model = LlamaForCausalLM(LlamaConfig(**json.loads(about["config"]))).eval()
    model.load_state_dict(parts["weights"])
    seen, plain = parts["attention"], parts[""]
    lengths = sorted(int(name.removeprefix("ids.")) for name in seen if name.startswith("ids."))
    attention = {length: (seen[f"ids.{length}"], seen[f"weights.{length}"]) for length in lengths}
    facts = json.loads(about["facts"])
    return Inputs(model, plain["ids"], plain["left"], plain["right"], parts["answers"], attention, facts)
