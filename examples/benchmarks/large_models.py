"""All three probes on LLaDA-8B and Dream-7B shapes: seconds and peak memory, beside a plain forward of the same batch.

    python examples/benchmarks/large_models.py                # bf16 random weights built on the GPU, 32 pairs
    python examples/benchmarks/large_models.py --tiny         # the same path with small shapes, also on a CPU

The weights are random: times and memory do not depend on them, and nothing is downloaded.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from measuring import medians, peak_extra_bytes, show

import revprobe as rp
from revprobe.models.bases.configs import DreamConfig, LLaDAConfig
from revprobe.models.families.dream import DreamForMaskedDiffusion
from revprobe.models.families.llada import LLaDAForMaskedDiffusion

# The published shapes; the defaults of the two configs are those of the 8B and 7B checkpoints where they agree.
LLADA_8B = {"d_model": 4096, "n_heads": 32, "n_kv_heads": 32, "n_layers": 32, "mlp_hidden_size": 12288}
LLADA_8B |= {"embedding_size": 126464, "vocab_size": 126464, "mask_token_id": 126336}
DREAM_7B = {"hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4, "num_hidden_layers": 28}
DREAM_7B |= {"intermediate_size": 18944, "vocab_size": 152064, "mask_token_id": 151666, "bos_token_id": 151665}
SMALL_LLADA = {"d_model": 64, "n_heads": 4, "n_kv_heads": 4, "n_layers": 2, "mlp_hidden_size": 192}
SMALL_LLADA |= {
    "embedding_size": 512,
    "vocab_size": 512,
    "mask_token_id": 510,
    "pad_token_id": 509,
    "eos_token_id": 509,
}
SMALL_DREAM = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
SMALL_DREAM |= {"intermediate_size": 160, "vocab_size": 512, "mask_token_id": 510, "bos_token_id": 511}
SMALL_DREAM |= {"pad_token_id": 509, "eos_token_id": 509}


def build(name: str, tiny: bool, device: str) -> rp.ProbedModel:
    """A model of the published shape with random bf16 weights, made on the device."""
    shapes = {"LLaDA-8B": (LLADA_8B, SMALL_LLADA), "Dream-7B": (DREAM_7B, SMALL_DREAM)}
    settings: dict[str, Any] = shapes[name][int(tiny)]
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            if name == "LLaDA-8B":
                module: Any = LLaDAForMaskedDiffusion(LLaDAConfig(**settings))
            else:
                module = DreamForMaskedDiffusion(DreamConfig(**settings))
    finally:
        torch.set_default_dtype(before)
    return rp.ProbedModel(module.eval(), objective="masked", name=name)


def make_pairs(model: rp.ProbedModel, count: int, tokens: int) -> rp.ReversalPairs:
    """Random queries with two-token targets and evidence, the reverse ones with both exchanged in place."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for fact in range(count):
        draw = lambda size: torch.randint(3, 500, (size,), generator=generator).tolist()  # noqa: E731
        target, evidence, fill = draw(2), draw(2), draw(tokens - 5)
        places = [1, 2], [tokens - 2, tokens - 1]
        forward = rp.Query([3, *target, *fill, *evidence], *places)
        reverse = rp.Query([3, *evidence, *fill, *target], *reversed(places))
        made.append(rp.ReversalPair(forward, reverse, fact=str(fact)))
    return rp.ReversalPairs.from_pairs(made)


def main() -> None:
    """Measure every model, print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a machine without a large GPU")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not asked.tiny:
        parser.error("no GPU here: the published shapes need about 24 GiB of GPU memory; use --tiny")
    rows = [row for name in ("LLaDA-8B", "Dream-7B") for row in measure(name, asked, device)]
    show("large_models", rows, pairs=asked.pairs, tokens=asked.tokens, rounds=asked.rounds, tiny=asked.tiny)


def measure(name: str, asked: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    """The plain forward of all queries, each probe alone, and the fused pass."""
    model = build(name, asked.tiny, device)
    pairs = make_pairs(model, asked.pairs, asked.tokens)
    ids = torch.tensor([query.token_ids for query in pairs.queries], device=device)
    weights = sum(p.numel() * p.element_size() for p in model.module.parameters())

    def forward() -> None:
        with torch.no_grad():
            model.logits(ids)

    candidates = {
        "plain forward": forward,
        "attention": lambda: rp.probe_attention_correlation(model, pairs),
        "gradient": lambda: rp.probe_gradient_cosine(model, pairs),
        "probability": lambda: rp.probe_reverse_probability(model, pairs),
        "probe(), all three": lambda: rp.probe(model, pairs),
        "probe(), parallel mode": lambda: rp.probe(model, pairs, mode="parallel"),
    }
    seconds = medians(candidates, rounds=asked.rounds)
    plain = seconds["plain forward"]
    gib = {way: (weights + peak_extra_bytes(run)) / 2**30 for way, run in candidates.items()}
    return [
        {"model": name, "way": way, "seconds": seconds[way], "of plain": seconds[way] / plain, "peak GiB": gib[way]}
        for way in candidates
    ]


if __name__ == "__main__":
    main()
