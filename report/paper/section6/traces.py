"""Inside one trained model of Section 6: where the answer is made, asked forwards and backwards, layer by layer."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from ....finetune.runs.finetuning import FinetuneRun
from ....probes.deep.causal_trace import probe_causal_trace
from ....probes.deep.denoising import trace_denoising
from ....probes.figures.theme import interval_text, rounded
from ....probes.readings.reading import Reading
from ..reproduce import records
from .blocks import Block, Row, Table, Text
from .frames import Section6, tidy
from .plan import LEARNED, MAIN, SEEDS
from .verdicts import passes, per_cent

SITES = ("residual", "attention", "mlp")
CAUSAL, DENOISING = "causal trace", "denoising trace"
NOTHING = 1e-3  # nats: an interval within this of zero is rounding, of a state that does not reach the answer
ABOUT = (
    "{run}, weights of step {step}{forward}, the probes' questions about {facts} trained facts. Causal trace: the "
    "evidence is replaced by another fact's, then one clean state is put back; nats of the target's "
    "log-probability that return, mean and 95 % interval over facts, and in brackets what a third fact's state "
    "does. Denoising trace: the probability of the right token, at each step of writing the answer, with another "
    "fact's in brackets."
)


def traced(run: FinetuneRun) -> pd.DataFrame:
    """The traces of a finished run's last weights over its probed pairs, one row for each direction and place.

    Raises: RevprobeError, for a model that does not denoise, and as the two probes.
    """
    model = run.load()
    pairs = run.pairs(model)
    read: list[tuple[str, str, Reading, list[str]]] = [
        (CAUSAL, site, probe_causal_trace(model, pairs, site=site), ["direction", "layer", "part"]) for site in SITES
    ]
    read.append((DENOISING, "", trace_denoising(model, pairs), ["direction", "step"]))
    rows: list[dict[str, Any]] = []
    for instrument, site, reading, by in read:
        about = {"run": run.name, "weights_step": run.snapshots[-1], "instrument": instrument, "site": site}
        rows += [about | row for row in records(reading.summary(by=by))]
    return tidy("traces", rows)


def blocks(found: Section6) -> list[Block]:
    """The traces as tables; or that none was taken."""
    table = found.traces
    if table.empty:
        return [Text("Not run: `python examples/section6_traces.py RUN` takes them of a finished run.")]
    first = table.iloc[0]
    about = ABOUT.format(
        run=first["run"], step=first["weights_step"], facts=table["facts"].max(), forward=_forward(found, first["run"])
    )
    causal, denoising = table[table["instrument"] == CAUSAL], table[table["instrument"] == DENOISING]
    return [Text(about), Table(_by_place(causal)), Table(_by_step(denoising))]


def _forward(found: Section6, run: str) -> str:
    """How much the traced run answers forwards: where it is below 90 % it stands for none that has learned."""
    for cell in found.cells(MAIN):
        for seed in SEEDS:
            value = found.last(cell, seed, "forward") if found.run(cell, seed) == run else None
            if value is not None:
                low = "" if passes(value, ">=", LEARNED) else ", below 90 %"
                return f" (forward exact match {per_cent(value)} %{low})"
    return ""


def _by_place(table: pd.DataFrame) -> list[Row]:
    """A row for each site, part and direction; a column for each layer."""
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in records(table):
        key = (row["site"], row["part"], row["direction"])
        empty = dict.fromkeys(map(_layer, sorted(set(table["layer"]))), "-")
        own = rows.setdefault(key, dict(zip(("site", "part", "asked"), key, strict=True)) | empty)
        own[_layer(row["layer"])] = _cell(row, 1)
    return [rows[key] for key in sorted(rows, key=lambda key: (SITES.index(key[0]), *key[1:]))]


def _layer(layer: int) -> str:
    """The stream that the first block is given has the number -1."""
    return "input" if layer < 0 else f"layer {layer}"


def _by_step(table: pd.DataFrame) -> list[Row]:
    rows: dict[str, dict[str, Any]] = {}
    for row in records(table):
        empty = dict.fromkeys((f"step {step}" for step in sorted(set(table["step"]))), "-")
        own = rows.setdefault(row["direction"], {"asked": row["direction"]} | empty)
        own[f"step {row['step']}"] = _cell(row, 3)
    return list(rows.values())


def _cell(row: dict[str, Any], digits: int) -> str:
    """Value, interval, control and n; a number without an interval says so."""
    if pd.isna(row["value"]):
        return f"undefined ({row['reason']})"
    low, high = float(row["low"]), float(row["high"])
    if row["instrument"] == CAUSAL and max(-low, high) < NOTHING:
        told = f"below {NOTHING:g}"
    else:
        told = interval_text(float(row["value"]), low, high, digits=digits)
    if math.isnan(low) and row["reason"]:
        told += f" ({row['reason']})"
    control = "-" if pd.isna(row["control"]) else rounded(float(row["control"]), digits)
    return f"{told} ({control}; n = {row['n']})"
