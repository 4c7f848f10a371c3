"""What watching costs: a denoising trace against the decoding that it watches.

    python examples/benchmarks/denoising_trace.py                      # 8 layers, d = 512, 64 queries
    python examples/benchmarks/denoising_trace.py --layers 32 --heads 32 --width 4096 --vocab 126464 --dtype bfloat16

Both write the same tokens at the same positions, in the same batches; a round is one of each.
"""

from __future__ import annotations

import argparse

import torch
from measuring import Candidate, medians, show

import revprobe as rp
from revprobe.models.bases.configs import LLaDAConfig
from revprobe.models.families.llada import LLaDAForMaskedDiffusion
from revprobe.probes.decoding.decode import decode_tokens
from revprobe.probes.decoding.masked import Prompt


def make_model(asked: argparse.Namespace, device: str) -> rp.ProbedModel:
    """A LLaDA shape with random weights."""
    shape = {"d_model": asked.width, "n_layers": asked.layers, "n_heads": asked.heads}
    shape |= {"mlp_hidden_size": 3 * asked.width, "vocab_size": asked.vocab, "mask_token_id": asked.vocab - 1}
    torch.manual_seed(0)
    with torch.device(device):
        module = LLaDAForMaskedDiffusion(LLaDAConfig(**shape)).to(getattr(torch, asked.dtype)).eval()
    return rp.ProbedModel(module, objective="masked")


def make_pairs(asked: argparse.Namespace) -> rp.ReversalPairs:
    """Random tokens, the target at the end; the evidence first, or in the middle."""
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for fact in range(asked.pairs):
        ids = torch.randint(0, asked.vocab - 1, (asked.length,), generator=generator).tolist()
        target = range(asked.length - asked.tokens, asked.length)
        turned = [ids[1], ids[0], *ids[2:]]
        pairs.append(rp.ReversalPair(rp.Query(ids, target, [0]), rp.Query(turned, target, [1]), fact=str(fact)))
    return rp.ReversalPairs.from_pairs(pairs)


def ways(model: rp.ProbedModel, pairs: rp.ReversalPairs, batch: int | None) -> dict[str, Candidate]:
    """Decoding alone, and the trace with and without its control."""
    tokens = len(pairs.queries[0].target)
    prompts = [Prompt(query.token_ids[:-tokens]) for query in pairs.queries]
    lengths = [tokens] * len(prompts)
    return {
        "decode": lambda: decode_tokens(model, prompts, lengths, batch_size=batch),
        "trace": lambda: rp.trace_denoising(model, pairs, batch_size=batch),
        "trace, control=False": lambda: rp.trace_denoising(model, pairs, batch_size=batch, control=False),
    }


def main() -> None:
    """Measure, print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"layers": 8, "width": 512, "heads": 8, "vocab": 8192, "pairs": 32, "length": 16}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--tokens", type=int, default=4, help="tokens of a target, one a step")
    parser.add_argument("--batch", type=int, default=None, help="queries a batch")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    model, pairs = make_model(asked, "cuda" if torch.cuda.is_available() else "cpu"), make_pairs(asked)
    seconds = medians(ways(model, pairs, asked.batch), rounds=asked.rounds)
    size = rp.trace_denoising(model, pairs, batch_size=asked.batch).frame
    rows = [{"way": name, "seconds": s, "of decoding": s / seconds["decode"]} for name, s in seconds.items()]
    megabytes = round(float(size.memory_usage(deep=True).sum()) / 1e6, 1)
    show("denoising_trace", rows, frame_rows=len(size), frame_megabytes=megabytes, **vars(asked))


if __name__ == "__main__":
    main()
