"""The example of route edits runs on a run folder, and its rows are right."""

import runpy
import sys

import numpy as np
import pandas as pd
import pytest
import torch

import revprobe as rp
from revprobe.finetune.config.loading import parse_config
from revprobe.finetune.config.one_layer import RunConfig

CONFIG = """
name: NAME
relation: {length: 4, alphabet: 8}
model: {family: FAMILY, d_model: 16}
training: {steps: 2, batch_size: 16, warmup_steps: 1, ema_decay: 0.9, seed: 0, device: cpu}
snapshots: {every: 2}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A masked and a causal run of two steps: hardly trained, but complete folders."""
    path = tmp_path_factory.mktemp("runs")
    for name, family in (("masked", "radd"), ("causal", "gpt2")):
        text = CONFIG.replace("NAME", name).replace("FAMILY", family)
        rp.train(parse_config(text, RunConfig, name), path / name)
    return path


@pytest.fixture(scope="module")
def example(root):
    return runpy.run_path(str(root / "examples" / "route_edits.py"))


def test_it_prints_both_findings_of_every_run_and_saves_them(example, folder, tmp_path, monkeypatch, capsys):
    arguments = [str(folder / "masked"), str(folder / "causal"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["route_edits.py", *arguments])
    example["main"]()
    printed = capsys.readouterr().out
    assert printed.count("\n1. cutting the route: P(target | reverse) ") == 2
    assert printed.count("\n2. the forward route") == 2
    table = pd.read_csv(tmp_path / "out" / "route_edits.csv")
    assert table.groupby("run")["kind"].first().to_dict() == {"masked": "same_target", "causal": "swapped"}
    assert not table.duplicated(["run", "measure"]).any()
    masked = table[(table.run == "masked") & table.measure.str.contains("mask token")]
    assert len(masked) == 3 and not (table[table.run == "causal"].measure.str.contains("mask token")).any()


def test_replaced_evidence_is_that_of_every_other_fact_once(example, folder):
    """Against a loop over letters: the model asked with each other letter's evidence in turn."""
    path = folder / "masked"
    model = rp.load_model(path, weights="raw")
    pairs = rp.letter_pairs(length=4, model=model, placements="mirror", alphabet=8)
    found = example["replaced_log_probabilities"](model, pairs)
    assert found["another fact's"].shape == (7, len(pairs))
    everyone = {pair.reverse.evidence[0] for pair in pairs}
    for pair in range(0, len(pairs), 11):
        query = pairs[pair].reverse
        ids = torch.tensor([query.token_ids] * 7)
        ids[:, query.target_positions[0]] = model.mask_token_id
        ids[:, query.evidence_positions[0]] = torch.tensor(sorted(everyone - set(query.evidence)))
        with torch.no_grad():
            logs = model.logits(ids)[:, query.target_positions[0]].double().log_softmax(-1)[:, query.target[0]]
        np.testing.assert_allclose(np.sort(found["another fact's"][:, pair]), np.sort(logs.numpy()), atol=1e-5)


def test_a_share_is_sum_over_sum_and_undefined_without_a_gap(example):
    rng = np.random.default_rng(0)
    whole, facts = rng.normal(2.0, 0.1, 60), np.repeat(np.arange(20), 3).astype(str)
    share = example["ratio"](0.25 * whole, whole, facts)
    assert (share.value, share.n, share.facts) == (pytest.approx(0.25), 60, 20)
    assert np.isnan([share.low, share.high]).all(), "shares alike in all facts do not tell how they vary"
    noisy = example["ratio"](whole * rng.uniform(0, 1, 60), whole, facts)
    assert noisy.low < noisy.value < noisy.high
    assert np.isnan(example["ratio"](whole, rng.normal(0.0, 1.0, 60), facts).value)
    assert np.isnan(example["ratio"](whole, 1e-9 * whole, facts).value), "a gap of rounding errors is none"
