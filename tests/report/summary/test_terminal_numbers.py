"""What a terminal says of numbers: the control like its value, nothing of other checkpoints, names as they are."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from revprobe import Reading, Readings
from revprobe.finetune.runs.record import RunRecord, summary_frame
from revprobe.probes.figures.theme import interval_text
from revprobe.report.summary.terminal import print_final, print_readings, read_summary
from tiny import made_probabilities

ABOUT = {"model": "m", "step": 3, "weights": "raw", "kind": "same_target", "objective": "masked"}


def small(value: float, control: float) -> Reading:
    """A reading of probabilities about `value`, beside a control about `control`."""
    made, draw = made_probabilities(0, [f"f{at}" for at in range(40)], ABOUT), np.random.default_rng(0)
    size = len(made.frame)
    spread = {name: one * draw.uniform(0.9, 1.1, size) for name, one in (("", value), ("_control", control))}
    frame = made.frame.assign(**{f"probability{name}": one for name, one in spread.items()})
    return Reading(made.name, frame, made.meta)


def printed(readings: Readings, width: int) -> str:
    console = Console(width=width, markup=False, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_readings(readings, "t", console)
    return console.export_text()


@pytest.mark.parametrize(("value", "control"), [(3e-5, 4e-4), (4e-4, 3e-5), (2e-9, 5e-8), (0.9996, 0.99951)])
@pytest.mark.parametrize("width", [90, 240])
def test_a_control_is_written_as_its_value_is(value: float, control: float, width: int) -> None:
    """Beside 3.0e-5 stood "0.000", of a control of 4e-4: the order was the other way round."""
    reading = small(value, control)
    row = reading.measures().set_index("measure").loc["reverse_probability"]
    words = interval_text(row["control"], row["control_low"], row["control_high"])
    shown = printed(Readings([reading]), width).replace("\n", " ")
    assert all(part in shown for part in words.split(" [")[0:1]) and "0.000" not in shown
    assert words.partition(" ")[0] in shown and words.partition("[")[2].partition(",")[0] in shown


def test_the_legend_of_probabilities_writes_the_control_as_the_values() -> None:
    reading = small(3e-5, 4e-4)
    names = [trace.name for trace in reading.plot().data]
    assert names[2].startswith("control (reverse, shuffled facts): mean 3.9") or "e-4" in names[2], names
    assert "e-5" in names[1] and "0.00" not in names[2]
    frame = small(0.5, 0.5).frame
    hits = np.arange(len(frame)) >= 2  # one miss in each direction
    nearly = Reading(reading.name, frame.assign(argmax_match=hits), ABOUT)
    accuracy = nearly.measures().set_index("measure").loc["reverse_accuracy"]
    text = interval_text(accuracy["value"], accuracy["low"], accuracy["high"], percent=True)
    assert f"accuracy {text} %" in nearly.plot().data[1].name


def summary(**columns: object) -> pd.DataFrame:
    """Two checkpoints of a run with one measure, the first with a caution of its own."""
    rows = [
        {"run": "r", "objective": "masked", "position_encoding": "rope", "length": 10, "seed": 0, "step": step}
        | {"weights": "raw", "kind": "same_target", "measure": "reverse_probability", "value": 0.5, "low": 0.4}
        | {"high": 0.6, "n": 20, "facts": 20, "control": 0.1, "undefined": 0, "reason": math.nan, "caution": caution}
        for step, caution in ((0, "few facts at step 0"), (10, math.nan))
    ]
    return pd.DataFrame(rows).assign(**columns)


def final(table: pd.DataFrame) -> str:
    console = Console(width=200, markup=False, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_final(table, console)
    return console.export_text()


def test_what_was_never_measured_is_not_undefined() -> None:
    """A run without gradients said "undefined" of them; that is said of what has no number, and why."""
    assert "undefined" not in final(summary())
    told = final(summary(value=math.nan, low=math.nan, high=math.nan, reason="20 constant"))
    assert told.count("undefined") == 1 and "reverse probability: 20 constant" in told


def test_cautions_are_those_of_the_last_checkpoint() -> None:
    assert "few facts at step 0" not in final(summary())
    assert "few facts of the last" in final(summary(caution=[math.nan, "few facts of the last"]))


@pytest.mark.parametrize("name", ["0010", "1e3", "nan", "True", "2026-01-02", "-"])
def test_a_run_keeps_its_name_whatever_it_looks_like(name: str, tmp_path: Path) -> None:
    """Read without kinds, run 0010 was 10."""
    readings = Readings([made_probabilities(0, "abcdefghij", ABOUT)])
    record = RunRecord(name, {"objective": "masked", "position_encoding": "1", "length": 10, "seed": 0}, {}, readings)
    written = summary_frame([record])
    written.to_csv(tmp_path / "summary.csv", index=False)
    read = read_summary(tmp_path)
    assert read["run"].unique().tolist() == [name] and read["position_encoding"].unique().tolist() == ["1"]
    assert read["seed"].tolist() == written["seed"].tolist() and f"{name} " in final(read)
