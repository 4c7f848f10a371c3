"""Collecting the sweeps about negative evidence: finished runs into tables, the others by name, prices read once."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from revprobe.finetune.analysis.price import read_price
from revprobe.finetune.config.loading import load_config, parse_config
from revprobe.finetune.config.one_layer import SweepConfig
from revprobe.finetune.runs.one_layer import train
from revprobe.finetune.runs.open import open_run
from revprobe.report.paper import evidence_figures, evidence_runs

SWEEP = """\
name: negative-evidence
base:
  relation: {length: 5, alphabet: 2}
  model: {d_model: 8}
  training: {steps: 6, batch_size: 8, warmup_steps: 1, device: cpu, ema_decay: 0.9, gradient_clipping: 0.5}
  snapshots: {steps: [6], answers: {every: 1}}
variants:
  - {name: drop-right, training: {negatives: drop-right, negative_weight: 0.25}}
  - {name: then-mirror, training: {steps: 8, switch: {step: 6, negatives: mirror}}, snapshots: {steps: [6, 8]}}
  - {name: published, model: {initialization: published, head_bias: true}, training: {loss: sequence, rates: t}}
cells:
  - {position_encoding: rope, variant: [base, drop-right, then-mirror, published], seed: [0, 1]}
  - {objective: causal, seed: 0}
"""
RAN = ["rope-l5-s0", "rope-l5-s0-drop-right", "rope-l5-s0-then-mirror", "rope-l5-s0-published", "arm-l5-s0"]


@pytest.fixture(scope="module")
def script(root: Path) -> Iterator[ModuleType]:
    """`collect_negative_evidence`, imported as the scripts import each other."""
    sys.path.insert(0, str(root / "examples"))
    try:
        import collect_negative_evidence

        yield collect_negative_evidence
    finally:
        sys.path.remove(str(root / "examples"))
        for name in ("collect_negative_evidence", "collect_results", "results_table"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def sweep() -> SweepConfig:
    return parse_config(SWEEP, SweepConfig, "tiny")


@pytest.fixture(scope="module")
def folder(sweep: SweepConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five runs that finished and one that stopped; the others were never started."""
    folder = tmp_path_factory.mktemp("negative-evidence")
    (folder / "sweep.yaml").write_text(SWEEP)
    by_name = {run.name: run for run in sweep.runs()}
    for name in RAN:
        train(by_name[name], folder / name)

    def stop(step: int, steps: int, loss: float | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(by_name["rope-l5-s1"], folder / "rope-l5-s1", listener=stop)
    return folder


@pytest.fixture
def collected(
    script: ModuleType, sweep: SweepConfig, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Path, list[str]]]:
    """What the script leaves behind, and of which checkpoints it has read a price."""
    priced: list[str] = []

    def noted(model: Any, relation: Any) -> Any:
        priced.append(f"{model.name} {model.weights}")
        return read_price(model, relation, rows=200, samples=50)

    monkeypatch.setattr(evidence_runs, "read_price", noted)
    import collect_results

    for module in (script, collect_results):
        monkeypatch.setattr(module, "load_config", lambda name, kind: sweep)
    monkeypatch.setattr(sys, "argv", ["collect", str(folder), "--out", str(tmp_path), "--commit", "c" * 40])
    script.main()
    yield tmp_path, priced


def runs_of(out: Path) -> pd.DataFrame:
    return pd.read_parquet(out / "negative_evidence_runs.parquet").set_index(["run", "weights"])


def test_every_run_has_its_rows_with_axes_and_status(collected: tuple[Path, list[str]], sweep: SweepConfig) -> None:
    runs = runs_of(collected[0])
    assert set(runs.index.get_level_values("run")) == {run.name for run in sweep.runs()}
    own = runs.loc[("rope-l5-s0-drop-right", "ema")]
    assert (own["recipe"], own["dial"], own["cell"]) == ("W", "drop-right", "rope-l5-drop-right")
    assert own["dose"] == 0.25 and runs.loc[("rope-l5-s0", "raw"), "dose"] == 1
    switch = runs.loc[("rope-l5-s0-then-mirror", "raw")]
    assert (switch["dial"], switch["switch_dial"], switch["switch_step"]) == ("keep", "mirror", 6)
    assert runs.loc[("rope-l5-s0-published", "ema"), "recipe"] == "P"
    assert [weights for run, weights in runs.index if run == "arm-l5-s0"] == ["raw"]
    status = {run: runs.loc[run]["status"].iloc[0] for run in runs.index.get_level_values("run")}
    assert {run for run, said in status.items() if said == "finished"} == set(RAN)
    assert "stopped at step 0 of 6" in status["rope-l5-s1"] and status["rope-l5-s1-published"] == "not run"


def test_the_numbers_are_those_of_the_run(collected: tuple[Path, list[str]], folder: Path) -> None:
    """Statistics over the answers read after half of the training; log, readings and price of the run's own files."""
    out, _ = collected
    run = open_run(folder / "rope-l5-s0-drop-right")
    own = runs_of(out).loc[("rope-l5-s0-drop-right", "ema")]
    answers = run.answers()
    late = answers[(answers["weights"] == "ema") & (answers["step"] > 3)]
    assert sorted(late["step"].unique()) == [4, 5, 6] and own["readings"] == 3
    reverse = late[(late["question"] == "reverse") & (late["extra"] == 0)]
    assert own["reverse"] == pytest.approx(reverse["accuracy"].mean(), abs=1e-6)
    assert own["reverse_lowest"] == pytest.approx(reverse["accuracy"].min(), abs=1e-6)
    assert own["letters_only"] == pytest.approx(reverse["letters_only"].mean(), abs=1e-6)
    share = reverse["placeholder_errors"].sum() / reverse["errors"].sum()
    assert own["placeholder_share"] == pytest.approx(share, abs=1e-6)
    log = run.steps_log()
    assert own["share_clipped"] == pytest.approx((log["gradient_norm"] > 0.5).mean())
    assert own["dropped_share"] == pytest.approx(log["dropped_weight"].sum() / (6 * 8 * 5), rel=1e-5)
    last = run.readings().select(step=6, weights="ema", name="gradient_cosine")[0]
    assert own["gradient_cosine"] == pytest.approx(last.value, abs=1e-6)
    price = read_price(run.load(weights="ema"), run.relation, rows=200, samples=50)
    assert own["keep_loss"] == pytest.approx(price.keep_loss, rel=1e-6) and own["samples"] == 50
    table = pd.read_parquet(out / "negative_evidence_answers.parquet")
    assert set(table["run"]) == set(RAN)
    kept = table[(table["run"] == "rope-l5-s0-drop-right")].drop(columns="run")
    keys = ["weights", "question", "extra", "step"]
    wanted = answers.sort_values(keys, ignore_index=True)
    found = kept.sort_values(keys, ignore_index=True)[list(wanted.columns)]
    pd.testing.assert_frame_equal(found, wanted, check_dtype=False, rtol=1e-6)


def test_prices_of_the_same_checkpoints_are_read_once(
    collected: tuple[Path, list[str]], script: ModuleType, folder: Path
) -> None:
    """Given again, the command reads no price; a checkpoint with other bytes is priced anew, and only that."""
    out, priced = collected
    assert len(priced) == 2 * 4 + 1
    before = (out / "negative_evidence_runs.parquet").read_bytes()
    script.main()
    assert len(priced) == 9 and (out / "negative_evidence_runs.parquet").read_bytes() == before
    sums = folder / "rope-l5-s0" / "checkpoints" / "step-000006" / evidence_runs.SUMS
    written = sums.read_bytes()
    try:
        sums.write_bytes(written + b"\n")
        script.main()
    finally:
        sums.write_bytes(written)
    assert len(priced) == 11 and all(name.startswith("rope-l5-s0 ") for name in priced[9:])


def test_a_command_that_was_stopped_keeps_the_prices_it_has_read(
    script: ModuleType, sweep: SweepConfig, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    priced: list[str] = []

    def noted(model: Any, relation: Any) -> Any:
        if len(priced) == 5:
            raise KeyboardInterrupt
        priced.append(model.name)
        return read_price(model, relation, rows=200, samples=50)

    monkeypatch.setattr(evidence_runs, "read_price", noted)
    monkeypatch.setattr(script, "AT_A_TIME", 1)
    monkeypatch.setattr(script, "load_config", lambda name, kind: sweep)
    with pytest.raises(KeyboardInterrupt):
        script.collect(folder, "negative-evidence", tmp_path)
    assert not (tmp_path / "negative_evidence_runs.parquet").exists()
    again: list[str] = []
    monkeypatch.setattr(
        evidence_runs, "read_price", lambda m, r: (again.append(m.name), read_price(m, r, rows=200, samples=50))[1]
    )
    script.collect(folder, "negative-evidence", tmp_path)
    assert len(again) == 5, "two runs on both weights are known, of the third one kind was lost"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "negative_evidence_answers.parquet",
        "negative_evidence_runs.parquet",
    ]


def test_the_page_names_its_origin_and_every_cell(collected: tuple[Path, list[str]], sweep: SweepConfig) -> None:
    out, _ = collected
    noted = json.loads((out / "negative_evidence.json").read_text())["sweeps"]["negative-evidence"]
    assert noted["finished"] == [run.name for run in sweep.runs() if run.name in RAN]
    assert noted["not_run"]["rope-l5-s1-published"] == "not run" and noted["trained_at_commit"] == "c" * 40
    assert len(noted["file_sha256"]) == 64 and noted["versions"][0]["torch"] == torch.__version__
    text = (out / "README.md").read_text()
    assert text.splitlines()[2].startswith("**Predictions.** Of ") and "](reverse_over_training.svg)" in text
    assert "Pressure by class over training: not run" in text
    for run in sweep.runs():
        assert f"| {evidence_runs.axes_of(run)['cell']} |" in text, run.name
    assert (out / "reverse_over_training.svg").read_text().startswith("<svg")


def test_pressure_is_drawn_where_it_was_collected(
    collected: tuple[Path, list[str]], script: ModuleType, tmp_path: Path
) -> None:
    """A table of `rp.pressure` with sweep, recipe and cell gives the second figure; three checkpoints are no curve."""
    import results_table

    rows = [
        {"run": f"rope-l10-s{seed}", "step": step, "terms": name, "pressure": value}
        for seed in (0, 1)
        for step in (0, 500, 1000, 2000)
        for name, value in {"target": 1.0 + seed, "negative": -2.0, "left": 0.1, "all": -1.0 + seed}.items()
    ]
    table = pd.DataFrame(rows).assign(
        sweep="negative-evidence", cell="rope-l10", recipe="W", log_odds=-1.0, dropped=0.0
    )
    table.to_parquet(tmp_path / "negative_evidence_pressure.parquet")
    results_table.write_readme(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "](pressure_by_class.svg)" in text and "Pressure by class over training: not run" not in text
    drawing = (tmp_path / "pressure_by_class.svg").read_text()
    assert drawing.count('fill="none" stroke=') == 3 + 1, "three sums, and the frame"
    assert "rope-l10, recipe W" in drawing
    table = pd.read_parquet(tmp_path / "negative_evidence_pressure.parquet")
    assert evidence_figures.pressure_figure(table[table["step"] < 2000]) is None
    row = next(line for line in text.splitlines() if line.startswith("| W | rope-l10 |") and "| 500 |" in line)
    assert "| 1.50 (1.00 to 2.00) |" in row and "| -2.00 |" in row


def test_another_sweeps_folder_and_an_empty_one_are_refused(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sweep.yaml").write_text(SWEEP.replace("name: negative-evidence", "name: mine"))
    monkeypatch.setattr(sys, "argv", ["collect", str(tmp_path), "--out", str(tmp_path / "out")])
    with pytest.raises(
        SystemExit, match="holds the sweep 'mine'; expected one of pressure, negative-evidence, one-layer-published"
    ):
        script.main()
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    with pytest.raises(SystemExit, match="no finished run of negative-evidence"):
        script.main()
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", ["negative-evidence", "one-layer-published"])
def test_the_committed_tables_are_of_the_configured_runs(root: Path, script: ModuleType, name: str) -> None:
    """Every run of the config has a row, finished or with its reason, and a finished one all its answers."""
    results = root / "examples" / "results"
    files = [results / f"{script.SWEEPS[name]}_{kind}.parquet" for kind in ("runs", "answers")]
    if not files[0].is_file():  # then the page says so
        assert "has not been collected" in (results / "README.md").read_text(encoding="utf-8")
        return
    runs, answers = (pd.read_parquet(file) for file in files)
    configs = {run.name: run for run in load_config(name, SweepConfig).runs()}
    assert set(runs["run"]) == set(configs) and files[1].stat().st_size < 4_000_000
    noted = json.loads((results / script.PROVENANCE).read_text())["sweeps"][name]
    assert set(noted["finished"]) == set(runs.loc[runs["status"] == "finished", "run"]) == set(answers["run"])
    for (run, weights), own in answers.groupby(["run", "weights"]):
        config = configs[str(run)]
        assert sorted(own["step"].unique()) == config.answer_steps, run
        row = runs[(runs["run"] == run) & (runs["weights"] == weights)].iloc[0]
        again = evidence_runs.statistics(own, config.training.steps)
        for column, value in again.items():
            assert np.isclose(float(row[column]), float(value), rtol=1e-5, atol=1e-6, equal_nan=True), (run, column)


PRESSING = """\
name: pressure
base:
  relation: {length: 4, alphabet: 3}
  model: {d_model: 8}
  training: {steps: 12, batch_size: 8, warmup_steps: 1, device: cpu, ema_decay: 0.9}
  snapshots: {every: 2, answers: {every: 1}}
cells:
  - {position_encoding: rope, seed: [0, 1]}
"""


def test_what_presses_foretells_and_is_stored_is_collected_and_drawn(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the sweep `pressure`, run by run, as the functions themselves give it; what is known of a run is kept."""
    import results_table

    import revprobe as rp

    sweep, folder, out = parse_config(PRESSING, SweepConfig, "tiny"), tmp_path / "pressure", tmp_path / "out"
    folder.mkdir()
    (folder / "sweep.yaml").write_text(PRESSING)
    train(sweep.runs()[0], folder / sweep.runs()[0].name)
    monkeypatch.setattr(script, "load_config", lambda name, kind: sweep)
    monkeypatch.setitem(script.PRESSED, "pressure", ("rope-l4",))
    monkeypatch.setattr(script, "STORED_EVERY", 4)
    monkeypatch.setattr(sys, "argv", ["collect", str(folder), "--out", str(out), "--commit", "c" * 40])
    script.main()
    tables = {name: pd.read_parquet(out / f"negative_evidence_{name}.parquet") for name in script.READERS}
    assert all(set(table["run"]) == {"rope-l4-s0"} and set(table["cell"]) == {"rope-l4"} for table in tables.values())
    run = open_run(folder / "rope-l4-s0")
    foretold = rp.foretelling(rp.pressure(run.path, draws=script.DRAWS), run.answers())
    pd.testing.assert_frame_equal(tables["foretelling"][list(foretold)], foretold, check_dtype=False)
    assert set(tables["storage"]["step"]) == {4, 8, 12} and set(tables["storage"]["weights"]) == {"raw"}
    text = (out / "README.md").read_text()
    assert "](pressure_by_class.svg)" in text
    for title, _, _ in results_table.PRESSURE_TABLES.values():
        assert f"## {title}" in text
    stored = tables["storage"].query("step == 8 and side == 'left' and measure == 'stored' and answer == 'placeholder'")
    line = next(line for line in text.split("What is stored")[1].splitlines() if line.startswith("| W | rope-l4 | 8 |"))
    assert f"| {stored['value'].item():.2f} |" in line
    train(sweep.runs()[1], folder / sweep.runs()[1].name)
    monkeypatch.setitem(script.READERS, "storage", lambda run, _: pd.DataFrame({"read_again": [run.path.name]}))
    script.main()
    again = pd.read_parquet(out / "negative_evidence_storage.parquet")
    assert again["read_again"].dropna().tolist() == ["rope-l4-s1"], "the first run's was kept"
    assert len(again) == len(tables["storage"]) + 1
