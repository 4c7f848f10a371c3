"""The page's tables of what moves the reverse answer: pressure of the terms, what it foretells, and what is stored."""

from __future__ import annotations

from typing import Any

import pandas as pd

from .evidence_markdown import spread_text
from .markdown import markdown_table

PRESSED = ("target", "left", "negative", "asked", "all")
ABOUT_PRESSURE = (
    "Nats per unit of learning rate, mean over seeds (lowest to highest), raw weights: positive where a step of "
    "plain descent lowers the reverse loss (docs/objective-terms.md). Target, left, negative: the terms of rows "
    "whose evidence is visible and whose target is hidden, by what is priced; asked: these three; all: the whole "
    "objective as trained; dropped: what the dial leaves out. Log-odds: of the target against the placeholder in "
    "reverse."
)
ABOUT_FORETELLING = (
    "Spearman's rank correlation, within a run and over its checkpoints, of a pressure and the change of the reverse "
    "log-odds over the next 100 steps; mean over seeds (lowest to highest). Shifts: the same with the pressure moved "
    "in time by every number of checkpoints, the mean of their 2.5 and 97.5 % over seeds: what a run's own slow course "
    "gives by itself. Outside: the runs whose correlation lies outside their shifts. Net: target and negative. No "
    "prediction was written."
)
ABOUT_STORED = (
    "Logits under mirrored placements, raw weights, mean over seeds (lowest to highest). S[v, u]: what the evidence u "
    "stores for its answer v; S[0, u]: for the placeholder; with the evidence right of the readout row (forward "
    "queries) and left of it (reverse). Control: S of the same answer on another fact's evidence, on the left. "
    "Arrives: what the evidence's position adds to the two logits, answer less placeholder (docs/objective-terms.md)."
)


def pressure_table(pressure: pd.DataFrame) -> str:
    """What presses on the reverse answer at each checkpoint, by kind of term."""
    rows = []
    keys = ["sweep", "recipe", "cell", "step"]
    for (sweep, recipe, cell, step), own in pressure.groupby(keys, sort=False):
        by = {str(name): part.sort_values("run") for name, part in own.groupby("terms")}
        row = {"recipe": recipe, "cell": cell, "sweep": sweep, "step": step, "seeds": own["run"].nunique()}
        row |= {name: spread_text(by[name]["pressure"], scale=1, digits=2) for name in PRESSED if name in by}
        row |= {"dropped": spread_text(by["all"]["dropped"], scale=1, digits=2)}
        rows.append(row | {"log-odds": spread_text(by["all"]["log_odds"], scale=1, digits=2)})
    return markdown_table(rows)


def foretelling_table(found: pd.DataFrame) -> str:
    """Whether pressure foretells the reverse answer, by cell and kind of term. `found`: rows of `rp.foretelling`."""
    rows = []
    for (recipe, cell, terms), own in found.groupby(["recipe", "cell", "terms"], sort=False):
        known = own.dropna(subset=["spearman"])
        outside = ((known["spearman"] < known["control_low"]) | (known["spearman"] > known["control_high"])).sum()
        row: dict[str, Any] = {"recipe": recipe, "cell": cell, "terms": terms, "seeds": own["run"].nunique()}
        row |= {
            "n": spread_text(own["n"], scale=1, digits=0),
            "Spearman": spread_text(own["spearman"], scale=1, digits=2),
        }
        row |= {"shifts": "-" if known.empty else f"{known.control_low.mean():.2f} to {known.control_high.mean():.2f}"}
        rows.append(
            row | {"outside": f"{outside} of {len(known)}", "reason": "; ".join(sorted({*own["reason"]} - {""}))}
        )
    return markdown_table(rows)


def stored_table(stored: pd.DataFrame) -> str:
    """What is stored for answer and placeholder, by cell and step. `stored`: rows of `rp.placeholder_storage`."""
    rows = []
    for (recipe, cell, step), own in stored.groupby(["recipe", "cell", "step"], sort=False):
        row: dict[str, Any] = {"recipe": recipe, "cell": cell, "step": step, "seeds": own["run"].nunique()}
        for side in ("right", "left"):
            at = own[own["side"] == side]
            for words, measure, answer, column in (
                ("S[v, u]", "stored", "target", "value"),
                ("S[0, u]", "stored", "placeholder", "value"),
                ("control", "stored", "target", "control"),
                ("arrives", "contribution", "difference", "value"),
            ):
                values = at.loc[(at["measure"] == measure) & (at["answer"] == answer), column]
                if column == "value" or side == "left":
                    row[f"{words} {side}"] = spread_text(values, scale=1, digits=2)
        rows.append(row)
    return markdown_table(rows)
