"""What a storage reading holds, summed up: one row per pair, or one per part of the logit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import pandas as pd

from ...arguments import checked
from ...errors import RevprobeError
from .intervals import mean_over_facts
from .resampling import SHOWN_COLUMNS, Facts

REST = "rest"


class StoredReading(Protocol):
    """A reading of stored evidence, as far as its parts need it."""

    @property
    def frame(self) -> pd.DataFrame: ...
    @property
    def meta(self) -> dict[str, Any]: ...


def remainder_text(meta: Mapping[str, Any]) -> str:
    """How much slopes miss of what removing the evidence's tokens shows; "" of a reading that is exact.

    >>> one = {"mean": 0.021, "largest": 0.1, "removed": 0.52, "rounding": 1e-7, "n": 3, "facts": 3}
    >>> remainder_text({"remainder": one})
    'remainder 0.021 (largest 0.1) of 0.52 logits removed (3 pairs, 3 facts)'
    >>> remainder_text({"remainder": one | {"rounding": 0.03}})
    'remainder 0.021 (largest 0.1) of 0.52 logits removed (3 pairs, 3 facts), within the rounding of 0.03'
    """
    if "remainder" not in meta:
        return ""
    one = meta["remainder"]
    if not one["n"]:
        return "remainder undefined, as S is for every pair"
    told = f"remainder {one['mean']:.2g} (largest {one['largest']:.2g}) of {one['removed']:.2g} logits removed"
    told += f" ({one['n']} pairs, {one['facts']} facts)"
    return told + f", within the rounding of {one['rounding']:.2g}" * (one["mean"] <= one["rounding"])


def evidence_by_pair(reading: StoredReading) -> pd.DataFrame:
    """What the evidence holds and what of it arrives: one row per pair, summed over the reading's layers and heads.

    Columns: pair, fact (and shown and its like, where the reading has them), stored_control, reason, reason_margin,
    reason_control, and for each direction stored (S[v, u]), weight (the mean over heads), contribution (the evidence
    position's whole value, routed), logit, margin and rank.
    """
    frame = reading.frame[reading.frame["part"] == "evidence"]
    tokens = frame[frame["source"] == "token"].groupby("pair", sort=True)
    sides = ("forward", "reverse")
    stored = [c for c in ("stored_forward", "stored_reverse", "stored_control") if c in frame]
    undefined = tokens[stored].count().lt(tokens.size(), axis=0)  # a head that is undefined leaves the sum undefined
    of = [name for name in ("fact", *SHOWN_COLUMNS) if name in frame]
    table = tokens[[*of, *(f"{n}_{s}" for n in ("logit", "margin", "rank") for s in sides)]].first()
    for reason in (c for c in ("reason", "reason_margin", "reason_control") if c in frame):
        table[reason] = tokens[reason].agg(lambda reasons: next(filter(None, reasons), ""))  # of any head
    table = table.join(tokens[stored].sum().mask(undefined)).join(tokens[[f"weight_{s}" for s in sides]].mean())
    contribution = frame.groupby("pair", sort=True)[[f"contribution_{s}" for s in sides]].sum()
    return table.join(contribution).reset_index().reindex(columns=["pair", *table.columns, *contribution.columns])


@checked
def logit_contributions(reading: StoredReading) -> pd.DataFrame:
    """What the logit is made of, on average: one row per part, source and layer, and the logit itself.

    Of a reading taken with `layers=`, the part "rest" is all that was not measured (other layers, MLPs, embedding,
    norms and biases): the logit less the measured parts. So the rows before "logit" always add up to it.

    Columns: part, source, layer; for each direction the mean contribution over pairs, in logits, with low and high (95
    %, over facts); n (pairs) and facts.
    Raises: RevprobeError, for a reading of another probe, which has no parts.
    """
    if "part" not in reading.frame.columns:
        raise RevprobeError(
            "this reading holds no parts of a logit; expected what probe_stored_evidence returns, and no other probe"
        )
    keys = ["part", "source", "layer"]
    sides = [f"contribution_{side}" for side in ("forward", "reverse")]
    of = [name for name in ("pair", "fact", *SHOWN_COLUMNS) if name in reading.frame]
    summed = reading.frame.groupby([*keys, *of], dropna=False, sort=False)[sides].sum().reset_index()
    whole = reading.frame.groupby("pair").first().reset_index()
    logits = {side: whole[side.replace("contribution", "logit")] for side in sides}
    whole = whole.assign(part="logit", source=None, layer=pd.array([pd.NA] * len(whole), dtype="Int64"), **logits)
    parts = [summed, whole[summed.columns]]
    if reading.meta.get("layers") is not None:
        measured = summed.groupby("pair")[sides].sum().reindex(whole["pair"]).to_numpy()
        parts.insert(1, whole[summed.columns].assign(part=REST, **(whole[sides] - measured)))
    rows = []
    for key, part in pd.concat(parts).groupby(keys, dropna=False, sort=False):
        row: dict[str, Any] = dict(zip(keys, key, strict=True))
        for side in ("forward", "reverse"):
            facts = Facts.of_rows(part, side)
            found = mean_over_facts(part[f"contribution_{side}"].to_numpy(float), facts)
            row |= {side: found.value, f"{side}_low": found.low, f"{side}_high": found.high}
        row |= {"n": len(part), "facts": facts.sizes["facts"]}
        rows.append(row)
    return pd.DataFrame(rows).astype({"layer": "Int64"})
