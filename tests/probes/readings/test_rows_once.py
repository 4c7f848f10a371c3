"""Frames of several readings are not one: their pairs are numbered from 0 in each."""

import numpy as np
import pandas as pd
import pytest

import revprobe as rp
from revprobe.probes.statistics.measures import ESTIMATORS, KEYS
from tiny import radd, wired

PROBES = {
    "attention": rp.probe_attention_correlation,
    "gradient": rp.probe_gradient_cosine,
    "probability": rp.probe_reverse_probability,
    "storage": rp.probe_stored_evidence,
    "lens": rp.probe_logit_lens,
    "route edit": rp.probe_route_edit,
    "trace": rp.probe_causal_trace,
    "denoising": rp.trace_denoising,
    "stored once": rp.probe_stored_once,
}


@pytest.mark.parametrize("name", PROBES)
def test_frames_put_together_are_refused_and_those_of_one_call_are_not(name: str) -> None:
    """The last row of a pair was taken (attention), or products of two pairs summed (gradients), without a word."""
    model, pairs = wired()
    reading = PROBES[name](model, pairs, progress=False)
    both = pd.concat([reading.frame, reading.frame], ignore_index=True)
    with pytest.raises(rp.RevprobeError, match=r"stands twice in this frame of .*probe all pairs in one call"):
        rp.Reading(reading.name, both, reading.meta)
    shuffled = rp.Reading(reading.name, reading.frame.sample(frac=1, random_state=0), reading.meta)
    assert shuffled.value == pytest.approx(reading.value, nan_ok=True)


def test_the_message_names_the_rows() -> None:
    reading = rp.probe_attention_correlation(radd(), rp.letter_pairs(4, model=radd(), alphabet=4), progress=False)
    frame = pd.concat([reading.frame, reading.frame.iloc[[5, 2]]])
    pair = reading.frame["pair"].iloc[5]
    told = rf"^pair {pair}, layer 0, head 0 stands twice in this frame of attention_correlation \(2 such rows\): every"
    with pytest.raises(rp.RevprobeError, match=told):
        rp.Reading(reading.name, frame, reading.meta)


def test_numbered_through_they_are_what_one_call_gives() -> None:
    """Pairs and groups; a group of two offsets would correlate across positions."""
    model = radd()
    pairs = rp.letter_pairs(5, model=model, alphabet=10).for_probe("attention")
    whole = rp.probe_attention_correlation(model, pairs, progress=False)
    half = len(pairs) // 2
    parts = [rp.probe_attention_correlation(model, some, progress=False) for some in (pairs[:half], pairs[half:])]
    first, second = (part.frame for part in parts)
    numbered = pd.concat([first, second.assign(pair=second["pair"] + half)], ignore_index=True)
    offsets = ["offset_forward", "offset_reverse"]
    apart = numbered.groupby("group")[offsets].nunique().gt(1).any(axis=None)
    if apart:
        with pytest.raises(rp.RevprobeError, match="group 0 of this frame of attention_correlation is of several"):
            rp.Reading(whole.name, numbered, whole.meta)
    groups = np.unique(numbered[offsets].to_numpy(), axis=0, return_inverse=True)[1].reshape(-1)
    joined = rp.Reading(whole.name, numbered.assign(group=groups), whole.meta)
    assert (joined.value, joined.n, joined.facts) == (pytest.approx(whole.value), whole.n, whole.facts)


def test_every_estimator_says_what_its_rows_are_told_by() -> None:
    assert set(KEYS) == set(ESTIMATORS)
