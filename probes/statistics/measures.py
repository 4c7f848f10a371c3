"""Which estimator makes the number of which probe, what tells its rows apart, and what older tables call theirs."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pandas as pd

from ...errors import RevprobeError, did_you_mean
from .assumptions import assumption_audit
from .by_class import objective_terms
from .causal_trace import causal_trace, head_ranking, route_edit
from .denoising import denoising_trace
from .estimators import (
    Measured,
    attention_correlation,
    candidate_rank,
    decoded_match,
    gradient_cosine,
    reverse_probability,
    stored_evidence,
)
from .lens import logit_lens
from .stored_once import stored_once


def first_order_evidence(frame: pd.DataFrame, seed: int, control: bool) -> Measured:
    """Stored evidence of slopes, where the logit is no sum."""
    found = stored_evidence(frame, seed, control)
    return replace(found, statistic=found.statistic.replace("mean stored", "mean first-order stored"))


ESTIMATORS: dict[str, Callable[[pd.DataFrame, int, bool], Measured]] = {
    "assumption_audit": assumption_audit,
    "attention_correlation": attention_correlation,
    "candidate_rank": candidate_rank,
    "causal_trace": causal_trace,
    "decoded_match": decoded_match,
    "denoising_trace": denoising_trace,
    "gradient_cosine": gradient_cosine,
    "head_ranking": head_ranking,
    "logit_lens": logit_lens,
    "lora_gradient_cosine": gradient_cosine,  # the same over an adapter's parameters alone
    "objective_terms": objective_terms,
    "reverse_probability": reverse_probability,
    "route_edit": route_edit,
    "stored_evidence": stored_evidence,
    "stored_evidence_first_order": first_order_evidence,
    "stored_once": stored_once,
}


# What tells the rows of a frame apart. An estimator that met two rows of one pair would take the last, or their sum.
_GRADIENT = ("pair", "parameter", "role")
_QUESTION = ("question",)
_STORED = ("pair", "part", "source", "layer", "head")
KEYS: dict[str, tuple[str, ...]] = {
    "assumption_audit": ("layer", "head", "direction", "plane"),
    "attention_correlation": ("pair", "layer", "head"),
    "candidate_rank": _QUESTION,
    "causal_trace": ("pair", "direction", "step", "layer", "head", "part"),
    "decoded_match": _QUESTION,
    "denoising_trace": ("pair", "direction", "step", "part", "position", "layer", "head"),
    "gradient_cosine": _GRADIENT,
    "head_ranking": ("pair", "layer", "head"),
    "logit_lens": ("pair", "direction", "site", "layer", "head"),
    "lora_gradient_cosine": _GRADIENT,
    "objective_terms": ("fact", "class_number", "role"),
    "reverse_probability": ("pair", "direction"),
    "route_edit": ("pair", "direction", "scope", "layer", "head"),
    "stored_evidence": _STORED,
    "stored_evidence_first_order": _STORED,
    "stored_once": ("pair", "test", "direction", "layer"),
}


def require_rows_once(name: str, frame: pd.DataFrame) -> None:
    """Raises: RevprobeError, for a frame of probe `name` in which two rows are of one pair (and layer, head, ...), or
    one group is of two offsets, as in a frame that was put together from several readings."""
    keys = [key for key in KEYS.get(name, ()) if key in frame]
    if not keys or keys[0] != KEYS[name][0]:
        return
    again = frame.duplicated(keys)
    if again.any():
        first = frame.loc[again.to_numpy(), keys].iloc[0]
        told = ", ".join(f"{key} {value}" for key, value in first.items() if not pd.isna(value))
        raise RevprobeError(f"{told} stands twice in this frame of {name} ({int(again.sum()):,} such rows){_JOIN}")
    of_group = ["group", "offset_forward", "offset_reverse"]
    if name == "attention_correlation" and set(of_group) <= {*frame.columns}:
        groups = frame[of_group].drop_duplicates()
        several = groups.loc[groups["group"].duplicated().to_numpy(), "group"]
        if len(several):
            raise RevprobeError(f"group {several.iloc[0]} of this frame of {name} is of several offsets{_JOIN}")


_JOIN = (
    ": every reading numbers its pairs and groups from 0, so frames of several are not one; probe all pairs in one "
    "call, keep readings of several models in rp.Readings, or number `pair` (and `group`) through before joining them"
)

# In what the number is counted where neither its name nor the statistic's last word, "(nats)", says so.
UNITS = dict.fromkeys(("assumption_audit", "decoded_match", "stored_once"), "share")
_UNIT = re.compile(r"\((nats|logits)\)$")


def unit_of(name: str, statistic: str) -> str:
    """The unit of a probe's number: "nats", "logits", "share", or "" for a correlation, a cosine, a probability."""
    found = _UNIT.search(statistic)
    return found[1] if found else UNITS.get(name, "")


def measure(name: str, frame: pd.DataFrame, *, seed: int = 0, control: bool = True) -> Measured:
    """The number of probe `name` over `frame`. Raises: RevprobeError, for an unknown probe.

    `control=False` spares the correlation its shuffles; the other probes measure theirs or do not, and the
    frame says which.
    """
    if name not in ESTIMATORS:
        raise RevprobeError(f"unknown probe {name!r}{did_you_mean(name, ESTIMATORS)}")
    return ESTIMATORS[name](frame, seed, control)


# Names of columns in tables of version 0.1: `ahead` was the prediction by AdamW's formula before the step, `came` the
# change that was observed.
_RENAMED = {"came": "observed", "ahead": "predicted_by_adamw"}


def current_columns(table: pd.DataFrame) -> pd.DataFrame:
    """The table with today's column names; one that has them already comes back as it is.

    >>> list(current_columns(pd.DataFrame(columns=["came_low", "predicted"])))
    ['observed_low', 'predicted']
    """

    def renamed(column: str) -> str:
        first, underscore, rest = str(column).partition("_")
        return f"{_RENAMED[first]}{underscore}{rest}" if first in _RENAMED else column

    table = table.rename(columns=renamed)
    if "n" in table and "statistics_version" not in table:  # of the first statistics, which did not count facts
        table = table.assign(facts=float("nan"), statistics_version=1)
    return table
