"""Which estimator makes the number of which probe."""

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
