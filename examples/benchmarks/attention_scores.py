"""Time and memory of reading one row of attention scores, against the other ways there are.

python examples/benchmarks/attention_scores.py                      # 8 layers, d = 512, T = 128, 512, 1024
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from measuring import Candidate, medians, megabytes, peak_extra_bytes, show
from transformers import LlamaConfig, LlamaForCausalLM

import revprobe as rp
from revprobe.hooks.attention import tap_attention
from revprobe.models.structure import attention_of

BATCH, LAYERS, WIDTH, HEADS = 8, 8, 512, 8


def make_model() -> LlamaForCausalLM:
    """A Llama-shaped model with random weights, its attention through sdpa."""
    torch.manual_seed(0)
    shape = {"hidden_size": WIDTH, "intermediate_size": 1376, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS}
    config = LlamaConfig(**shape, **heads, vocab_size=2048, max_position_embeddings=2048)
    return LlamaForCausalLM(config).eval()


def ways(model: LlamaForCausalLM, length: int, device: str) -> dict[str, Candidate]:
    """The plain forward, ours, eager attention's own output, and TransformerLens' score hooks."""
    ids = torch.randint(0, 2048, (BATCH, length), device=device)
    rows, columns = (torch.full((BATCH, 1), place, device=device) for place in (length - 2, 1))
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    probed = rp.ProbedModel(model, objective="causal")
    bridge: Any = probed.to_bridge()

    def tapped() -> Any:
        with tap_attention(model, rows, columns, attention_of(probed), (length, length)) as tap:
            model(ids, use_cache=False)
        return tap.layers()

    def lens() -> Any:
        return bridge.run_with_cache(ids, names_filter=lambda name: name.endswith("hook_attn_scores"))

    return {
        "plain forward": lambda: model(ids, use_cache=False),
        "revprobe tap, one row": tapped,
        "eager, output_attentions": lambda: eager(ids, output_attentions=True, use_cache=False),
        "TransformerLens, score hooks": lens,
    }


@torch.no_grad()
def main() -> None:
    """Measure every length, print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 1024])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make_model().to(device)
    rows = []
    for length in asked.lengths:
        candidates = ways(model, length, device)
        seconds = medians(candidates, rounds=asked.rounds)
        for name, run in candidates.items():
            ratio = seconds[name] / seconds["plain forward"]
            peak = megabytes(peak_extra_bytes(run))
            rows.append({"T": length, "way": name, "seconds": seconds[name], "of plain": ratio, "peak extra MB": peak})
    show("attention_scores", rows, rounds=asked.rounds, batch=BATCH, layers=LAYERS, d_model=WIDTH)


if __name__ == "__main__":
    main()
