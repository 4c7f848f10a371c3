"""Time and memory of the gradient probe against the plain per-example loop and one ordinary training step.

python examples/benchmarks/gradient_cosine.py                       # 30M parameters, 32 pairs, T = 16
python examples/benchmarks/gradient_cosine.py --size 100M --tokens 64
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from measuring import medians, megabytes, peak_extra_bytes, show
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import revprobe as rp

# Llama-shaped: hidden size, layers, heads, MLP width, vocabulary.
SIZES = {
    "1M": (128, 3, 4, 344, 2048),
    "30M": (512, 8, 8, 1376, 8192),
    "100M": (768, 12, 12, 2048, 16384),
    "1B": (2048, 18, 16, 5504, 32000),
}


@dataclass(frozen=True)
class Task:
    """A model and its pairs, and the same queries as plain tensors."""

    model: rp.ProbedModel
    pairs: rp.ReversalPairs

    @property
    def queries(self) -> Tensor:
        return torch.tensor([query.token_ids for query in self.pairs.queries], device=self.model.device)


def make_task(size: str, pairs: int, tokens: int, device: str, dtype: torch.dtype) -> Task:
    """Random weights and random tokens; the target is the last token, the evidence the first."""
    torch.manual_seed(0)
    hidden, layers, heads, wide, vocab = SIZES[size]
    shape = {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads}
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=wide, vocab_size=vocab, max_position_embeddings=2048, **shape
    )
    with torch.device(device):
        module = LlamaForCausalLM(config).to(dtype).eval()
    model = rp.ProbedModel(module, objective="causal", name=f"llama-{size}")
    made = []
    for fact in range(pairs):
        row = torch.randint(3, vocab, (tokens,)).tolist()
        swapped = [row[-1], *torch.randint(3, vocab, (tokens - 2,)).tolist(), row[0]]
        forward, reverse = (rp.Query(ids, [tokens - 1], [0]) for ids in (row, swapped))
        made.append(rp.ReversalPair(forward, reverse, "swapped", str(fact)))
    return Task(model, rp.ReversalPairs.from_pairs(made))


def losses(task: Task, ids: Tensor) -> Tensor:
    """The loss of the last token of each row. Shapes: `batch seq -> batch`."""
    logits = task.model.module(ids).logits[:, -2].float()
    return F.cross_entropy(logits, ids[:, -1], reduction="none")


def loop(task: Task) -> list[float]:
    """The plain way: two full gradients per pair, one example at a time."""
    parameters, cosines = list(task.model.module.parameters()), []
    for pair in task.pairs:
        sides = []
        for query in (pair.forward, pair.reverse):
            ids = torch.tensor([query.token_ids], device=task.model.device)
            sides.append(torch.autograd.grad(losses(task, ids).sum(), parameters))
        inner, left, right = (sum(float((a * b).sum()) for a, b in zip(x, y, strict=True)) for x, y in _couples(*sides))
        cosines.append(inner / (left * right) ** 0.5)
    return cosines


def _couples(forward: tuple[Tensor, ...], reverse: tuple[Tensor, ...]) -> list[tuple[tuple[Tensor, ...], ...]]:
    return [(forward, reverse), (forward, forward), (reverse, reverse)]


def training_step(task: Task) -> None:
    """One ordinary batched forward and backward over the same sequences, gradients of all parameters included."""
    losses(task, task.queries).sum().backward()
    task.model.module.zero_grad(set_to_none=True)


def main() -> None:
    """Measure, check that both ways agree, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="30M")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=None, help="queries per batch of the probe; all by default")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-loop", action="store_true", help="leave the slow loop out")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    task = make_task(asked.size, asked.pairs, asked.tokens, device, torch.float32)
    whole = asked.batch_size or len(task.pairs.queries)

    def ours(batch_size: int, control: bool = False) -> rp.Reading:
        return rp.probe_gradient_cosine(task.model, task.pairs, control=control, batch_size=batch_size)

    candidates = {
        "training step, batched": lambda: training_step(task),
        "probe": lambda: ours(whole),
        "probe with control": lambda: ours(whole, control=True),
        "probe, 8 queries a batch": lambda: ours(8),
    }
    if not asked.no_loop:
        candidates["per-example loop"] = lambda: loop(task)
    seconds = medians(candidates, rounds=asked.rounds)
    peaks = {name: peak_extra_bytes(run) for name, run in candidates.items()}
    parameters = sum(p.numel() for p in task.model.module.parameters())
    peaks["per-example gradients of all queries"] = len(task.pairs.queries) * parameters * 4  # float32, as formed
    rows = [
        {
            "way": name,
            "seconds": seconds.get(name, float("nan")),
            "of a training step": seconds.get(name, float("nan")) / seconds["training step, batched"],
            "loop is slower by": seconds.get("per-example loop", float("nan")) / seconds.get(name, float("nan")),
            "peak extra MB": megabytes(peak),
        }
        for name, peak in peaks.items()
    ]
    check = {} if asked.no_loop else {"largest cosine difference": _difference(task, ours(whole))}
    facts = {"size": asked.size, "parameters": parameters, "pairs": asked.pairs, "tokens": asked.tokens}
    show("gradient_cosine", rows, rounds=asked.rounds, **facts, **check)


def _difference(task: Task, reading: rp.Reading) -> float:
    """How far the probe's per-pair cosines are from the loop's."""
    from revprobe.probes.statistics.estimators import pair_cosines

    ours = pair_cosines(reading.frame)["cosine"].tolist()
    return max(abs(a - b) for a, b in zip(ours, loop(task), strict=True))


if __name__ == "__main__":
    main()
