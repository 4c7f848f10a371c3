"""How the cost of the gradient probe grows with the model and with the length of its queries, as a table and a plot.

    python examples/benchmarks/gradient_scaling.py                          # 30M, 100M, 1B; T = 16, 64, 256
    python examples/benchmarks/gradient_scaling.py --sizes 30M --rounds 3 --plot scaling.html

Every cell holds 1,024 tokens in one batch (32 pairs at T = 16, 2 at T = 256), so that the forward and backward passes
cost about the same at every T and what grows is the products. Each cell's probe and training step run in turn.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import plotly.graph_objects as go
import torch
from gradient_cosine import SIZES, make_task, training_step
from measuring import machine, medians, megabytes, peak_extra_bytes, show

import revprobe as rp

TOKENS_A_BATCH = 1024


def cell(size: str, tokens: int, rounds: int) -> dict[str, object]:
    """Probe and training step over the same sequences."""
    pairs = max(1, TOKENS_A_BATCH // (2 * tokens))
    task = make_task(size, pairs, tokens, "cuda" if torch.cuda.is_available() else "cpu", torch.float32)
    candidates = {
        "step": lambda: training_step(task),
        "probe": lambda: rp.probe_gradient_cosine(task.model, task.pairs, control=False, batch_size=2 * pairs),
    }
    seconds = medians(candidates, rounds=rounds)
    peaks = {name: peak_extra_bytes(run) for name, run in candidates.items()}
    parameters = sum(p.numel() for p in task.model.module.parameters())
    return {
        "size": size,
        "parameters": parameters,
        "T": tokens,
        "pairs": pairs,
        "training step, s": seconds["step"],
        "probe, s": seconds["probe"],
        "of a training step": seconds["probe"] / seconds["step"],
        "step peak MB": megabytes(peaks["step"]),
        "probe peak MB": megabytes(peaks["probe"]),
        "of per-example gradients": peaks["probe"] / (2 * pairs * parameters * 4),
    }


def plot(rows: list[dict[str, object]]) -> go.Figure:
    """Cost in training steps over T, one line for each model size."""
    figure = go.Figure()
    for size in dict.fromkeys(row["size"] for row in rows):
        line = [row for row in rows if row["size"] == size]
        figure.add_scatter(
            x=[row["T"] for row in line],
            y=[row["of a training step"] for row in line],
            mode="lines+markers",
            name=f"{line[0]['parameters'] / 1e6:,.0f}M parameters",  # type: ignore[operator]
        )
    figure.update_xaxes(type="log", title="tokens in a query", tickvals=sorted({row["T"] for row in rows}))
    figure.update_yaxes(title="probe / training step (seconds)", rangemode="tozero")
    figure.update_layout(
        template="plotly_white",
        width=720,
        height=420,
        title={"text": f"Gradient probe, 1,024 tokens a batch<br><sub>{machine()}</sub>"},
    )
    return figure


def main() -> None:
    """Measure every cell, print, and write the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["30M", "100M", "1B"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[16, 64, 256])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--plot", type=Path, default=None, help="an .html file, or a picture where kaleido is installed"
    )
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    rows = [cell(size, tokens, asked.rounds) for size in asked.sizes for tokens in asked.tokens]
    show("gradient_scaling", rows, rounds=asked.rounds)
    if asked.plot is not None:
        figure = plot(rows)
        figure.write_html(asked.plot) if asked.plot.suffix == ".html" else figure.write_image(asked.plot, scale=2)


if __name__ == "__main__":
    main()
