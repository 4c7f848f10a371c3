"""Section 6's tables as made numbers: every cell of the plan, drawn by a seed, with gaps of every kind among them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from revprobe.report.paper.section6.ablations import NOT_PREDICTED, PREDICTIONS
from revprobe.report.paper.section6.frames import FINISHED, Section6, tidy
from revprobe.report.paper.section6.plan import (
    CAUSAL,
    DATASETS,
    METHODS,
    SEEDS,
    TABLE_MODELS,
    Cell,
    ablation_cell,
    main_cell,
)

STEPS = (0, 100, 1000, 3000)
Row = dict[str, Any]
# (cell, seed, row of an answer, rank or signature) -> the row as it shall be
Change = Callable[[Cell, int, Row], Row]


def planned() -> list[Cell]:
    """Every cell of the three sweeps."""
    cells = [main_cell(model, trained) for trained in DATASETS for model in TABLE_MODELS]
    cells += [ablation_cell(variant) for variant in (*PREDICTIONS, *NOT_PREDICTED)]
    varied = {"mini-llada": ("full", "smdm", "differ", "answer-only"), "mini-llama": ("full", "answer-only")}
    for trained in (DATASETS[0], DATASETS[3]):
        cells += [Cell(METHODS, model, *trained, name) for model, names in varied.items() for name in names]
    return cells


def made(draw: int = 0, *, change: Change | None = None, gaps: bool = True) -> Section6:
    """Tables in which anything may have come out.

    Args:
        change: what a test makes of single rows.
        gaps: leave some runs out, some numbers undefined.
    """
    generator, rows = (
        np.random.default_rng(draw),
        {name: list[Row]() for name in ("runs", "answers", "ranks", "signatures")},
    )
    keep = change or (lambda cell, seed, row: row)
    for cell in planned():
        for seed in SEEDS:
            missing = gaps and generator.random() < 0.1
            axes = cell._asdict() | {"seed": seed, "run": f"{cell.words}-s{seed}"}
            status = "stopped at step 100 of 3000" if missing else FINISHED
            rows["runs"].append(
                axes | {"objective": "masked", "steps": None if missing else STEPS[-1], "status": status}
            )
            if not missing:
                for table, own in one_run(cell, generator, gaps).items():
                    rows[table] += [axes | keep(cell, seed, row) for row in own]
    return Section6(**{name: tidy(name, own) for name, own in rows.items()})


def one_run(cell: Cell, generator: np.random.Generator, gaps: bool) -> dict[str, list[Row]]:
    """Answers, ranks and signatures at every step of a run."""
    found: dict[str, list[Row]] = {"answers": [], "ranks": [], "signatures": []}
    learns, turns = generator.random() < 0.8, generator.choice([0.0, 0.04, 0.3, 0.9])
    for place, step in enumerate(STEPS):
        reach = place / (len(STEPS) - 1)
        for asked, top in (("forward", 0.98 if learns else 0.7), ("reverse", turns)):
            for split in ("train", "heldout"):
                value = min(1.0, round(reach * top * (1 if split == "train" else 0.02) + 0.03 * generator.random(), 3))
                undefined = gaps and generator.random() < 0.02
                value = np.nan if undefined else value
                about = {"step": step, "asked": asked, "split": split, "templates": "all", "n": 200, "facts": 200}
                about |= {
                    "value": value,
                    "low": value - 0.05,
                    "high": value + 0.05,
                    "control": 0.01,
                    "undefined": int(undefined),
                }
                errors = 0 if undefined else round(200 * (1 - value))
                end = int(generator.integers(0, errors + 1))
                kinds = {"end": end, "prompt": 0, "own_entity": 0, "other_entity": errors - end, "malformed": 0}
                looser = {"begins": value, "begins_low": value - 0.05, "begins_high": min(1.0, value + 0.2)}
                found["answers"].append(about | kinds | looser)
                ranked = {
                    "candidates": 150,
                    "texts": 200,
                    "chance": 1 / 150,
                    "reciprocal_rank": value,
                    "reciprocal_rank_low": value,
                }
                found["ranks"].append(about | ranked | {"value": min(1.0, value + 0.1), "reciprocal_rank_high": value})
        kind = "swapped" if cell.model in CAUSAL else "same_target"
        for measure in (
            "attention_correlation",
            "gradient_cosine",
            "reverse_probability",
            "forward_probability",
            "forward_accuracy",
        ):
            value = reach * generator.choice([0.02, 0.5, 0.8]) + 0.05 * generator.random()
            excess = value - 0.1 * generator.random()
            row = {
                "step": step,
                "kind": kind,
                "measure": measure,
                "value": value,
                "low": value - 0.03,
                "high": value + 0.03,
            }
            row |= {
                "control": value - excess,
                "excess": excess,
                "excess_low": excess - 0.05,
                "excess_high": excess + 0.05,
            }
            found["signatures"].append(row | {"n": 100, "facts": 100, "untrained_reason": "not read"})
    return found
