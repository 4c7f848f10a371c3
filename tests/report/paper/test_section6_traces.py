"""What is traced inside one trained model of Section 6, and the tables that show it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

import revprobe as rp
from revprobe.report.paper.section6.frames import Section6
from revprobe.report.paper.section6.page import markdown
from revprobe.report.paper.section6.traces import CAUSAL, SITES, blocks, traced
from tiny import FIXTURES, pairs_at


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    """Of a tiny LLaDA in the place of a finished run."""
    model, pairs = rp.load_model(FIXTURES / "llada-tiny"), pairs_at((2, 5), (5, 2), count=14, length=8)
    run: Any = SimpleNamespace(name="a-run", snapshots=[0, 7], load=lambda: model, pairs=lambda model: pairs)
    return traced(run)


def test_every_site_part_and_layer_is_there_as_the_probe_reads_it(table: pd.DataFrame) -> None:
    model, pairs = rp.load_model(FIXTURES / "llada-tiny"), pairs_at((2, 5), (5, 2), count=14, length=8)
    assert set(table["run"]) == {"a-run"} and set(table["weights_step"]) == {7}
    causal = table[table["instrument"] == CAUSAL]
    assert set(causal["site"]) == set(SITES) and set(causal["direction"]) == {"forward", "reverse"}
    assert set(causal.loc[causal["site"] == "residual", "layer"]) == {-1, 0, 1}
    frame = rp.probe_causal_trace(model, pairs, site="mlp").frame
    own = frame[(frame["direction"] == "reverse") & (frame["part"] == "target") & (frame["layer"] == 1)]
    row = causal[
        (causal["site"] == "mlp") & (causal["direction"] == "reverse") & (causal["part"] == "target")
    ].set_index("layer")
    assert np.isclose(row.loc[1, "value"], own["effect"].mean(), rtol=1e-4)
    assert row.loc[1, "n"] == own["effect"].notna().sum()


def test_the_tables_survive_the_file_and_stand_on_the_page(table: pd.DataFrame, tmp_path: Path) -> None:
    found = Section6(traces=table)
    found.write(tmp_path)
    again = Section6.read(tmp_path)
    pd.testing.assert_frame_equal(again.traces, table)
    about, places, steps = (block.markdown() for block in blocks(again))
    assert "a-run, weights of step 7" in about and "14 trained facts" in about
    lines = places.splitlines()
    assert "| input | layer 0 | layer 1 |" in lines[0] and len(lines) == 2 + len(SITES) * 3 * 2
    assert all("n = " in line for line in lines[2:]) and lines[2].startswith("| residual |")
    assert "step 1" in steps and "forward" in steps and "reverse" in steps
    assert places in markdown(again)


def test_a_cell_without_a_number_says_why(table: pd.DataFrame) -> None:
    first = table.index[table["instrument"] == CAUSAL][0]
    broken = table.copy()
    broken.loc[first, ["value", "low", "high"]] = np.nan
    broken.loc[first, "reason"] = "the reason"
    assert "undefined (the reason)" in blocks(Section6(traces=broken))[1].markdown()


def test_no_cell_shows_an_interval_of_no_width(table: pd.DataFrame) -> None:
    """What no state can move differs from zero by rounding; a narrow interval gets the digits that show its width."""
    first = table.index[table["instrument"] == CAUSAL][0]
    for low, value, high, told in (
        (-3e-7, -1e-8, 2e-7, "below 0.001 ("),
        (0.031, 0.033, 0.034, "0.033 [0.031, 0.034] ("),
        (-0.02, -0.003, 0.01, "-0.00 [-0.02, 0.01] (".replace("-0.00", "0.00")),
    ):
        near = table.copy()
        near.loc[first, ["low", "value", "high"]] = (low, value, high)
        assert told in blocks(Section6(traces=near))[1].markdown()


def test_without_traces_the_page_names_the_command() -> None:
    assert "examples/section6_traces.py" in blocks(Section6())[0].markdown()
