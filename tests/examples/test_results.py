"""The committed results: the page is drawn from the numbers beside it, and the numbers say where they come from."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

from revprobe.finetune.config.loading import load_config, parse_config
from revprobe.finetune.config.one_layer import SweepConfig
from revprobe.finetune.runs.one_layer import train
from revprobe.report.paper.reproduce import COLUMNS

SWEEPS = {"one-layer": "one_layer.parquet", "robustness": "robustness.parquet"}


@pytest.fixture(scope="module")
def results(root: Path) -> Path:
    return root / "examples" / "results"


@pytest.fixture(scope="module")
def scripts(root: Path) -> Iterator[tuple[ModuleType, ModuleType]]:
    """`collect_results` and `results_table`, imported as the scripts import each other."""
    sys.path.insert(0, str(root / "examples"))
    try:
        import collect_results
        import results_table

        yield collect_results, results_table
    finally:
        sys.path.remove(str(root / "examples"))
        for name in ("collect_results", "results_table"):
            sys.modules.pop(name, None)


def test_the_committed_page_is_drawn_from_the_committed_numbers(
    results: Path, scripts: tuple[ModuleType, ModuleType]
) -> None:
    """A number changed by hand on either side turns this red; `python examples/results_table.py` draws it anew."""
    page = scripts[1]
    assert page.readme(results) == (results / "README.md").read_text(encoding="utf-8")
    drawings = page.figures(results)
    # Section 6's figures stand beside a page of their own.
    assert set(drawings) == {path.name for path in results.glob("*.svg") if not path.name.startswith("section6")}
    for name, drawing in drawings.items():
        assert drawing == (results / name).read_text(encoding="utf-8"), name
    readme = (results.parents[1] / "README.md").read_text(encoding="utf-8")
    assert page.with_section(readme, page.checked_section(results)) == readme


def test_readme_says_what_came_out_in_ten_lines_and_one_figure(root: Path) -> None:
    text = (root / "README.md").read_text(encoding="utf-8")
    section = text.split("## The paper, checked\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.strip() and not line.startswith(("<!--", "!["))]
    assert len(lines) <= 10 and section.count("![") == 1, lines
    (figure,) = re.findall(r"!\[[^]]+\]\(([^)]+)\)", section)
    assert (root / figure).is_file()


def test_every_run_is_either_in_the_numbers_or_listed_as_not_run(
    results: Path, scripts: tuple[ModuleType, ModuleType]
) -> None:
    provenance = json.loads((results / "provenance.json").read_text())
    for name, sweep in provenance["sweeps"].items():
        frame, config = pd.read_parquet(results / SWEEPS[name]), load_config(name, SweepConfig)
        # Read under the first statistics, which did not count what is undefined.
        newer = {"undefined", "reason", "caution"}
        assert list(frame.columns) == [column for column in COLUMNS if column not in newer]
        finished = {run.name for run in config.runs()} - set(sweep["not_run"])
        assert finished == set(sweep["finished"]) == set(frame["run"]), name
        assert sweep["config_sha256"] == scripts[0].base_digest(config)
        assert sweep["versions"] and {"torch", "revprobe"} <= set(sweep["versions"][0])
        assert (results / SWEEPS[name]).stat().st_size < 3_000_000
        assert len(sweep["trained_at_commit"]) == 40
    assert len(provenance["collected_at_commit"]) == 40


def test_no_committed_interval_is_of_no_width(results: Path, root: Path) -> None:
    """A lower end equal to the upper one claims certainty; n, facts and the statistics' version stand beside each."""
    tables = {path.name: pd.read_csv(path) for path in results.glob("*.csv")}
    tables |= {path.name: pd.read_parquet(path) for path in results.glob("*.parquet")}
    evidence = {name for name in tables if name.startswith(("negative_evidence", "one_layer_published"))}
    section6 = {
        name for name in tables if name.startswith("section6")
    }  # of facts in text, its version in section6.json
    assert len(set(tables) - evidence - section6) == 5
    for name, table in tables.items():
        if name not in section6:
            assert table["facts"].eq(26).all() and table["statistics_version"].notna().all(), name
        lows = [column for column in table if column.endswith("low")]
        for low in lows:
            high = f"{low.removesuffix('low')}high"
            # At seven digits the ends of a probability near 1 may meet; the page shows no interval there.
            met = name in section6 and (table[low] == table[high]) & (table[low] > 1 - 1e-5)
            assert (table[low].isna() | (table[low] < table[high]) | met).all(), f"{name}: {low}"
    curves = tables["storage_curves.csv"]
    assert (curves["low"].isna() == curves["reason"].notna()).all(), "no interval without a reason"
    pages = [root / "README.md", *(root / "docs").glob("*.md"), *results.glob("*.md")]
    number = r"[+-]?[\d.]+(?:e[+-]?\d+)?"
    for page in pages:
        ends = re.findall(rf"\d[^|\[]{{0,8}}\[({number}), ({number})\]", page.read_text(encoding="utf-8"))
        assert not [pair for pair in ends if float(pair[0]) == float(pair[1])], page.name


def test_the_route_edits_are_of_runs_in_the_tables_and_agree_with_them(results: Path) -> None:
    """The unedited reverse probability is the tables' own, over the same placements and weights, to rounding."""
    edits, tables = (pd.read_csv(results / "route_edits.csv"), pd.read_parquet(results / "one_layer.parquet"))
    assert set(edits["run"]) <= set(tables["run"]) and edits.groupby("run")["n"].nunique().eq(1).all()
    plain = edits[edits["measure"] == "reverse probability"].set_index("run")
    last = tables[(tables["measure"] == "reverse_probability") & (tables["step"] == 20000)]
    for run, row in plain.iterrows():
        wanted = last[(last["run"] == run) & (last["weights"] == row["weights"])].iloc[0]
        assert row["value"] == pytest.approx(wanted["value"], abs=2e-6) and row["n"] == wanted["n"], run
    defined = edits.dropna(subset=["value", "low"])
    assert (defined["low"] <= defined["value"] + 1e-6).all() and (defined["value"] <= defined["high"] + 1e-6).all()
    # A gap that is not there has no share: ALiBi's two queries are mirror images.
    no_share = edits[edits["value"].isna()]
    assert set(no_share["measure"].str.split(",").str[0]) == {"share of the gap closed"}
    assert no_share["run"].str.startswith("alibi").all()


def test_the_page_averages_route_edits_over_seeds(scripts: tuple[ModuleType, ModuleType], tmp_path: Path) -> None:
    rows = [("gap", 1.0, 0.5, 1.5, 26, f"rope-l10-s{seed}") for seed in (0, 1)]
    rows += [("gap", 2.0, 1.8, 2.6, 26, "rope-l10-s2"), ("share", float("nan"), 0.0, 0.0, 26, "alibi-l10-s0")]
    pd.DataFrame(rows, columns=["measure", "value", "low", "high", "n", "run"]).to_csv(tmp_path / "r.csv", index=False)
    text = scripts[1]._route_edits(tmp_path / "r.csv")
    assert "| gap | 1.3333 [0.5000, 2.6000] | - |" in text and "| share | - | NaN |" in text
    assert "rope-l10 3 seeds, n = 26, alibi-l10 1 seeds, n = 26." in text


def test_the_storage_numbers_are_of_runs_in_the_tables_with_interval_n_and_control(results: Path) -> None:
    tables = pd.read_parquet(results / "one_layer.parquet")
    curves, steps = (pd.read_csv(results / name) for name in ("storage_curves.csv", "one_step.csv"))
    assert set(curves["run"]) == set(steps["run"]) <= set(tables["run"])
    for run, own in curves.groupby("run"):
        assert set(own["step"]) == set(tables[tables["run"] == run]["step"]), f"{run}: every checkpoint"
    stored = curves[(curves["curve"] == "stored") & (curves["direction"] == "reverse")]
    assert stored[["low", "high", "n", "control", "control_low", "control_high"]].notna().all(axis=None)
    assert (
        steps[["observed_low", "observed_high", "n", "observed_control", "predicted", "slope"]].notna().all(axis=None)
    )
    assert not steps.duplicated(["run", "step", "quantity"]).any()


def test_the_page_counts_the_seeds_in_which_a_step_does_what_is_expected(
    scripts: tuple[ModuleType, ModuleType], tmp_path: Path
) -> None:
    """S has to rise and a loss to fall, each with its whole interval; two of three do, then one."""
    columns = [
        "quantity",
        "observed",
        "observed_low",
        "observed_high",
        "observed_control",
        "slope",
        "correlation",
        "run",
    ]
    rows: list[tuple[object, ...]] = []
    for seed, low in enumerate((0.1, 0.2, -0.1)):
        rows.append(("stored", low + 0.1, low, low + 0.2, 0.0, 1.0, 0.5, f"rope-l10-s{seed}"))
        rows.append(("reverse_loss", 0.15 - low, 0.05 - low, 0.19 - low, 0.0, 1.0, 0.5, f"rope-l10-s{seed}"))
    frame = pd.DataFrame(rows, columns=columns).assign(step=5, optimizer="saved", n=26)
    frame.to_csv(tmp_path / "one_step.csv", index=False)
    text = scripts[1]._one_step(tmp_path / "one_step.csv")
    assert (
        "| rope-l10 | 5 | saved | stored | 0.167 [-0.100, 0.400] | 0.000 | 2 of 3 [9, 99] % | 1.00 | 0.50 | 26 |"
        in text
    )
    assert "| rope-l10 | 5 | saved | reverse_loss | 0.083 [-0.150, 0.290] | 0.000 | 1 of 3 [1, 91] % |" in text


def test_every_committed_run_has_every_number_with_its_interval_at_every_checkpoint(results: Path) -> None:
    """Six measures, raw and EMA (ARM: raw), at each snapshot of its config."""
    for name, file in SWEEPS.items():
        if not (results / file).is_file():
            continue
        frame = pd.read_parquet(results / file)
        for run in load_config(name, SweepConfig).runs():
            own = frame[frame["run"] == run.name]
            if own.empty:
                continue
            kinds = ["raw", "ema"] if run.model.objective == "masked" else ["raw"]
            assert len(own) == len(run.snapshot_steps) * len(kinds) * 6, run.name
            assert not own.duplicated(["step", "weights", "measure"]).any()
            defined = own[own["value"].notna()]
            assert (defined["low"] <= defined["value"] + 1e-6).all() and (
                defined["value"] <= defined["high"] + 1e-6
            ).all()
            assert (defined["n"] > 0).all()
            assert own[own["step"] == run.training.steps]["value"].notna().all(), f"{run.name} ends undefined"


def test_a_folder_without_runs_leaves_the_collected_numbers_alone(
    scripts: tuple[ModuleType, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one_layer.parquet").write_bytes(b"numbers")
    monkeypatch.setattr(sys, "argv", ["collect", str(tmp_path / "mistyped"), "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"no finished run of one-layer in '.*mistyped'; nothing was written"):
        scripts[0].main()
    assert [path.name for path in tmp_path.iterdir()] == ["one_layer.parquet"]
    assert (tmp_path / "one_layer.parquet").read_bytes() == b"numbers"


def test_collecting_leaves_unfinished_runs_out_and_says_so(
    scripts: tuple[ModuleType, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run finished, one stopped, one never started: the first is in the page, the others are named."""
    text = (
        "name: one-layer\nbase:\n  relation: {length: 10, alphabet: 2}\n  model: {d_model: 8}\n"
        "  training: {steps: 2, batch_size: 4, device: cpu}\n  snapshots: {steps: [0]}\n"
        "cells: [{position_encoding: rope, seed: [0, 1, 2]}]\n"
    )
    sweep = parse_config(text, SweepConfig, "tiny")
    collect, page = scripts
    monkeypatch.setattr(collect, "load_config", lambda name, kind: sweep)
    done, stopped, _ = sweep.runs()
    finished = train(done, tmp_path / "runs" / done.name)

    def stop(step: int, steps: int, loss: float | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(stopped, tmp_path / "runs" / stopped.name, listener=stop)
    monkeypatch.setattr(sys, "argv", ["collect", str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    collect.main()
    provenance = json.loads((tmp_path / "out" / "provenance.json").read_text())["sweeps"]["one-layer"]
    assert provenance["finished"] == ["rope-l10-s0"]
    assert provenance["not_run"]["rope-l10-s2"] == "not run"
    assert "stopped at step 0 of 2" in provenance["not_run"]["rope-l10-s1"]
    frame = pd.read_parquet(tmp_path / "out" / "one_layer.parquet")
    expected = finished.readings().measures()
    pd.testing.assert_series_equal(frame["value"], expected["value"].astype(float), check_names=False, atol=1e-6)
    text = (tmp_path / "out" / "README.md").read_text()
    assert text == page.readme(tmp_path / "out")
    assert "1 runs finished on cpu" in text
    assert "## Spread over configurations\n\nnot run" in text and "## Causal edits of the route\n\nnot run" in text
    assert "| 1 of 3 | 90 |" in text and "Not in the tables: rope-l10-s1, rope-l10-s2." in text
