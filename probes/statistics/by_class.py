"""What a reading of objective terms holds, summed up: its number, and one row per class of terms or coarser grouping.

A row's product is with the gradient of a mean reverse loss: that of one fact over its queries, or that of all facts at
once, which has no facts to draw from and so no interval.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import pandas as pd

from ...arguments import checked
from ...errors import RevprobeError, did_you_mean
from .by_role import in_network_order
from .coverage import ONE_FACT, missing_intervals
from .estimators import (
    NO_GRADIENT,
    NO_PARTNER,
    NOT_FINITE,
    STATISTICS_VERSION,
    Control,
    Measured,
    explained,
    with_control,
)
from .intervals import Estimate, difference_over_facts, mean_over_facts
from .resampling import SHOWN, Facts

CLASS = ("priced", "target", "evidence", "masks", "dropped")
GROUPINGS = (*CLASS, "role")
BELOW_ERROR = "gradient below the error of the draw: raise draws"
SEVERAL_CLASSES = "cosines by role are those of single classes"
NO_OBJECTIVE = "of the step alone, whatever the gradient is"
NOT_HELD = "the gradients of classes were not held"
NO_RATE = "no learning rate is known"
OF_THE_MEAN = "one gradient, that of the mean over facts, so without an interval"
SIZES = ("queries", "facts", "queries_control", "facts_control")
# What frames of one gradient called their only fact before they had a column for how many it is of.
_SEVERAL = r"^mean of (\d+) facts$"


class TermsReading(Protocol):
    """A reading of objective terms, as far as its classes need it."""

    @property
    def frame(self) -> pd.DataFrame: ...
    @property
    def meta(self) -> dict[str, Any]: ...
    @property
    def cross(self) -> pd.DataFrame | None: ...


def objective_terms(frame: pd.DataFrame, seed: int, control: bool = True) -> Measured:
    """Per fact, sum over the frame's classes and roles, as the dial weights them; mean and interval over facts.

    In the result n counts reverse queries, whose mean each fact's number is.
    """
    rows = frame[frame["loss"].notna()]  # not what an optimizer's step does whatever the gradient is
    columns = [column for column in ("inner", "inner_control") if column in rows]
    summed = rows[columns].mul(rows["factor"], axis=0).groupby(rows["fact"], sort=True).sum(min_count=1)
    values, facts = summed["inner"].to_numpy(dtype=np.float64), facts_by_label(rows)
    statistic = "pressure on the reverse answer: <gradient of the objective, gradient of the reverse loss>, over facts"
    null = summed["inner_control"].to_numpy(dtype=np.float64) if "inner_control" in summed else None
    sizes = sizes_of_facts(rows)
    return _of_queries(with_control(values, null, facts, {}, statistic), sizes, values, null)


@checked
def objective_classes(reading: TermsReading, by: str | Iterable[str] = CLASS) -> pd.DataFrame:
    """The classes of a reading of objective terms, or coarser groups of them, summed.

    Args:
        by: what tells groups apart, some of priced, target, evidence, masks, dropped, role. Terms that the dial leaves
            out are always told apart from those it keeps.
    Columns: by..., factor (what the dial multiplies the group by), loss (the group's part of the objective, before the
        factor), share (of the objective, after it); then, each a mean over facts with _low and _high (95 %), pressure
        (inner product with the gradient of the reverse loss; positive where a step on the group lowers it), letters and
        margin (with its two parts), control (other facts' reverse queries) and excess; sampling_error (the standard
        error of the pressure over draws of masks, 0 where all were enumerated); cosine (with the gradient of the mean
        reverse loss); change_sgd (-learning rate x factor x pressure: nats per step of plain gradient descent) and
        change_adamw with _low and _high, change_adamw_letters, change_adamw_margin (under the run's coming step);
        n (facts), reason (what is NaN, and why), statistics_version.
    The groups "momentum" and "decay" hold what that step does whatever the gradient is: with them the changes by AdamW
    add up to the whole step's.
    Raises: RevprobeError, for a reading of another probe, or an unknown grouping.
    """
    frame = reading.frame
    if "class_number" not in frame.columns:
        raise RevprobeError("this reading holds no classes of terms; expected what objective_terms returns")
    keys = [by] if isinstance(by, str) else list(by)
    for key in keys:
        if key not in GROUPINGS:
            raise RevprobeError(f"no grouping {key!r}{did_you_mean(str(key), GROUPINGS)}")
    if bool(frame["dropped"].any()) and "dropped" not in keys:
        keys.append("dropped")
    if "priced" not in keys and bool(frame["loss"].isna().any()):
        frame = frame[frame["loss"].notna()]  # the step's own parts are of no visibility and no number of masks
    groups = frame.groupby(keys, sort=True, dropna=False) if keys else [((), frame)]
    rows = [dict(zip(keys, key, strict=True)) | _group(reading, part, "role" in keys) for key, part in groups]
    table = pd.DataFrame(rows).assign(statistics_version=STATISTICS_VERSION)
    if "role" not in keys:
        return table
    return table.sort_values(keys, key=in_network_order, kind="stable", ignore_index=True)


def _group(reading: TermsReading, part: pd.DataFrame, one_role: bool) -> dict[str, Any]:
    """The numbers of one group."""
    by_fact, meta, nan = part.groupby("fact", sort=True), reading.meta, float("nan")
    facts = facts_by_label(part)

    def over_facts(column: str) -> np.ndarray:
        return (
            by_fact[column].sum(min_count=1).to_numpy(dtype=np.float64) if column in part else np.full(len(facts), nan)
        )

    columns = {"pressure": "inner", "letters": "inner_letters", "margin": "inner_margin", "control": "inner_control"}
    columns |= {f"change_{name}": name for name in ("adamw", "adamw_letters", "adamw_margin")}
    values = {name: over_facts(column) for name, column in columns.items()}
    found = {name: mean_over_facts(value, facts) for name, value in values.items()}
    found["excess"] = difference_over_facts(values["pressure"], values["control"], facts)
    of_step = bool(part["loss"].isna().all())
    first = part.drop_duplicates("class_number")
    loss, factor = nan if of_step else float(first["loss"].sum()), float(part["factor"].iloc[0])
    row: dict[str, Any] = {"factor": factor, "loss": loss, "share": factor * loss / (meta["objective_loss"] or nan)}
    for name, one in found.items():
        row |= {name: one.value} | _edges(name, one)
    cosine, why = (nan, "") if of_step else _cosine(reading, part, found["pressure"].value, one_role)
    row |= {"cosine": cosine, "change_sgd": -meta["learning_rate"] * factor * row["pressure"]}
    row |= {"sampling_error": nan if of_step else _sampling_error(meta, first["class_number"].to_numpy())}
    if one_role:
        row["sampling_error"] = nan  # it is told along all parameters
    sizes, lacking = sizes_of_facts(part), missing_intervals(found)
    if of_one_gradient(sizes):
        lacking = lacking.replace(ONE_FACT, OF_THE_MEAN)
    reasons = [NO_OBJECTIVE if of_step else "", why and f"cosine: {why}", lacking]
    reasons.append(f"change_sgd: {NO_RATE}" if np.isnan(meta["learning_rate"]) and not of_step else "")
    reasons.append(f"change_adamw: {meta['reason_adamw']}" if meta["reason_adamw"] else "")
    counting = np.isfinite(values["change_adamw" if of_step else "pressure"])
    return row | {"n": int(sizes["facts"][counting].sum()), "reason": "; ".join(filter(None, reasons))}


def facts_by_label(rows: pd.DataFrame) -> Facts:
    """The facts of some rows, each once, sorted by label, with what is drawn."""
    first = rows.drop_duplicates("fact").sort_values("fact")
    return Facts.of(first["fact"].to_numpy().astype(str), first[SHOWN].to_numpy() if SHOWN in first else None)


def _edges(name: str, found: Estimate) -> dict[str, float]:
    return {f"{name}_low": found.low, f"{name}_high": found.high}


def _cosine(reading: TermsReading, part: pd.DataFrame, inner: float, one_role: bool) -> tuple[float, str]:
    """Of the group's gradient with that of the mean reverse loss, and why there is none."""
    chosen = np.unique(part["class_number"])
    by_role = part.drop_duplicates(["class_number", "role"])
    reverse = float((by_role.drop_duplicates("role")["norm_reverse"] ** 2).sum())
    if one_role and len(chosen) > 1:
        return float("nan"), SEVERAL_CLASSES
    if one_role:
        squared = float((by_role["norm"] ** 2).sum())
    else:
        if reading.cross is None:
            return float("nan"), NOT_HELD
        squared = float(reading.cross.to_numpy()[np.ix_(chosen, chosen)].sum())
    if squared <= 0 or reverse == 0:
        # Products of drawn gradients, less what the draw adds, can come out below zero.
        return float("nan"), NO_GRADIENT if squared == 0 or reverse == 0 else BELOW_ERROR
    return inner / float(np.sqrt(squared * reverse)), ""


def _sampling_error(meta: dict[str, Any], chosen: np.ndarray) -> float:
    """The standard error over replicates of the classes' summed products."""
    along = np.array(meta["deviations"])[chosen.astype(int)].sum(0)
    return float(np.sqrt((along**2).sum() / (len(along) * (len(along) - 1))))


def sizes_of_facts(rows: pd.DataFrame) -> pd.DataFrame:
    """How many reverse queries and facts stand behind each fact's rows and behind its control: SIZES, by fact, sorted.

    Frames of older versions do not say: their facts count as one query each.
    """
    first = rows.drop_duplicates("fact").set_index("fact").sort_index()
    if "queries" in first:
        return first.reindex(columns=list(SIZES)).fillna(0).astype(np.int64)
    several = first.index.to_series().astype(str).str.extract(_SEVERAL, expand=False)
    facts = pd.to_numeric(several).fillna(1).astype(np.int64)
    there = facts * (rows["inner_control"].notna().groupby(rows["fact"]).any() if "inner_control" in rows else 0)
    return pd.DataFrame({"queries": facts, "facts": facts, "queries_control": there, "facts_control": there})


def of_one_gradient(sizes: pd.DataFrame) -> bool:
    """Whether the facts have no gradients of their own, but that of their mean alone."""
    return bool((sizes["facts"] > 1).any())


def counted_in_queries(found: Estimate, sizes: pd.DataFrame, *, of: str = "") -> Estimate:
    """An estimate over the facts of `sizes` with its n in queries; `of` is "_control" for that of the control."""
    return replace(found, n=int(sizes[f"queries{of}"].sum()), facts=int(sizes[f"facts{of}"].sum()))


def _of_queries(found: Measured, sizes: pd.DataFrame, values: np.ndarray, null: np.ndarray | None) -> Measured:
    """The numbers with their samples, and what is undefined, in queries."""
    valued, queries = np.isfinite(values), sizes["queries"].to_numpy()
    lost = {NOT_FINITE: int(queries[~valued].sum())}
    estimate, control, excess = counted_in_queries(found.estimate, sizes[valued]), found.control, found.excess
    if null is not None:
        both = valued & np.isfinite(null)
        beside = np.where(both, sizes["queries_control"], 0)
        lost[NO_PARTNER] = int((queries - beside)[valued].sum())
        if control is not None and excess is not None:
            own = counted_in_queries(control.estimate, sizes[np.isfinite(null)], of="_control")
            control = Control.of(own, control.method)
            excess = counted_in_queries(excess, sizes[both])
    undefined = {reason: count for reason, count in lost.items() if count}
    measured = replace(found, estimate=estimate, control=control, excess=excess, undefined=undefined)
    if not of_one_gradient(sizes):
        return explained(measured, len(values))
    whole = {} if np.isnan(estimate.value) else {OF_THE_MEAN: estimate.n}
    return replace(measured, undefined=undefined | whole, caution="")  # which is of intervals
