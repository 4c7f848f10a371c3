"""Two processes give the reading of one: pairs are shared out, gathered, and written once."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
from torch import nn

import revprobe as rp
from revprobe.finetune.training.distributed import ProcessGroup, require_whole
from revprobe.finetune.training.probe_callback import take_readings
from revprobe.probes.passes.plan import PassResult, Plan, merged, part_of
from revprobe.probes.passes.run import run_pass
from tiny import module_at

SCRIPT = Path(__file__).with_name("two_processes.py")
SIZE = 2


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The models and pairs that the two processes use, for this one."""
    return module_at(SCRIPT)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two gloo processes have done everything that is looked at here."""
    folder = tmp_path_factory.mktemp("together")
    command = [sys.executable, "-P", str(SCRIPT), str(folder)]
    running = [
        subprocess.Popen([*command, str(rank), str(SIZE)], stderr=subprocess.PIPE, text=True) for rank in range(SIZE)
    ]
    try:
        told = [process.communicate(timeout=300)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(told)
    return folder


def seen(folder: Path, rank: int) -> dict[str, Any]:
    return json.loads((folder / f"seen-{rank}.json").read_text())


def assert_same(found: rp.Reading, alone: rp.Reading, tolerance: float = 1e-5) -> None:
    """Value, interval, control, excess, n, reasons and every row."""
    assert found.name == alone.name
    for part in (found, alone):
        assert part.n > 0
    numbers = [
        (reading.value, *reading.interval)
        + ((reading.control.value, *reading.control.interval) if reading.control else ())
        + ((reading.excess.value, reading.excess.low, reading.excess.high) if reading.excess else ())
        for reading in (found, alone)
    ]
    np.testing.assert_allclose(*numbers, atol=tolerance, rtol=0, err_msg=found.name)
    about = [{key: value for key, value in reading.meta.items() if key != "tokens"} for reading in (found, alone)]
    assert (found.n, found.undefined, about[0]) == (alone.n, alone.undefined, about[1])
    pd.testing.assert_frame_equal(found.frame, alone.frame, rtol=0, atol=tolerance)


# ---- readings ----


@pytest.mark.parametrize("what", ["long", "letters"])
def test_two_processes_take_the_reading_of_one(together: Path, script: ModuleType, what: str) -> None:
    """Chains of several tokens, controls whose partner another process ran, and lists shorter than the team."""
    model, pairs = script.long_names() if what == "long" else (script.letter_model(), None)
    alone = take_readings(model, script.probed_lists(model) if pairs is None else pairs)
    for rank in range(SIZE):
        found = rp.Readings.load(together / f"{what}-{rank}")
        assert len(found) == len(alone) == 3
        for reading in alone:
            assert_same(found[reading.name], reading)


def test_the_work_is_shared_and_not_done_twice(together: Path, script: ModuleType) -> None:
    _, pairs = script.long_names()
    each = [seen(together, rank)["queries"] for rank in range(SIZE)]
    assert max(each) < len(pairs.queries), "one process ran everything"
    assert sum(each) >= len(pairs.queries), "some query was run by none"


@pytest.mark.parametrize("parts", [2, 3, 50])
def test_parts_put_together_are_the_whole(script: ModuleType, parts: int) -> None:
    """Without processes: every part run in turn, then merged; more parts than batches leave some with nothing."""
    model, pairs = script.long_names()
    plan = Plan(attention=True, probability=True, gradient=True)

    def in_turn(work: Any) -> PassResult:
        results = [work(part, parts) for part in range(parts)]
        return merged(results[-1], [part_of(result) for result in results])

    whole = run_pass(model, pairs, plan)
    again = run_pass(model, pairs, Plan(attention=True, probability=True, gradient=True, share=in_turn))
    assert whole.likelihoods is not None and again.likelihoods is not None
    assert again.likelihoods.answers.keys() == whole.likelihoods.answers.keys()
    for ask, (value, rank) in whole.likelihoods.answers.items():
        assert (
            again.likelihoods.answers[ask][0] == pytest.approx(value, abs=1e-5)
            and again.likelihoods.answers[ask][1] == rank
        )
    for name in ("inner", "inner_control", "norm", "floor"):
        np.testing.assert_allclose(getattr(again, name), getattr(whole, name), atol=1e-6, rtol=1e-4, err_msg=name)
    assert again.score.keys() == whole.score.keys() == {0, 1}
    for layer in whole.score:
        np.testing.assert_allclose(again.score[layer], whole.score[layer], atol=1e-6)
        np.testing.assert_allclose(again.weight[layer], whole.weight[layer], atol=1e-6)


def test_a_part_that_is_lost_is_missed(script: ModuleType) -> None:
    """The comparison above would pass if merging filled gaps with anything; it leaves NaN."""
    model, pairs = script.long_names()

    def forgetful(work: Any) -> PassResult:
        return merged(work(0, 2), [part_of(work(0, 2))])

    result = run_pass(model, pairs, Plan(attention=True, gradient=True, share=forgetful))
    assert np.isnan(result.inner).any() and np.isnan(result.score[0]).any()


# ---- training ----


def test_a_run_of_two_processes_writes_each_reading_once(together: Path, script: ModuleType) -> None:
    first, second = (seen(together, rank) for rank in range(SIZE))
    assert first["saved"] == [f"step-{step:06d}" for step in script.STEPS]
    assert second["saved"] == []
    assert first["world"] == SIZE and first["sum"] == second["sum"], "the two trained apart"
    readings = rp.Readings.load(together / "run" / "readings")
    assert readings.steps == list(script.STEPS)
    assert len(readings) == len(script.STEPS) * 3 * 2


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_its_readings_are_those_of_its_checkpoints(together: Path, script: ModuleType, weights: str) -> None:
    """One process probes what two have trained, averaged and saved."""
    readings = rp.Readings.load(together / "run" / "readings")
    for step in script.STEPS:
        model = rp.load_model(together / "run", step=step, weights=weights)
        for reading in take_readings(model, script.probed_lists(model)):
            (found,) = readings.select(name=reading.name, step=step, weights=weights)
            assert_same(found, reading)


def test_its_predictions_are_those_of_its_checkpoints(together: Path, script: ModuleType) -> None:
    """The losses before a step are those of the checkpoint the step started from, one process or two."""
    table = pd.read_parquet(together / "run" / "predictions.parquet")
    assert list(table["step"]) == [step for step in script.STEPS for _ in range(2)]
    for step in script.STEPS[:-1]:
        model = rp.load_model(together / "run", step=step, weights="raw")
        pairs = script.probed_lists(model)["gradient"]
        frame = rp.probe_reverse_probability(model, pairs).frame
        for direction in ("forward", "reverse"):
            row = table[(table["step"] == step) & (table["direction"] == direction)].iloc[0]
            losses = -frame[frame["direction"] == direction]["log_probability"]
            assert row["loss"] == pytest.approx(losses.mean(), abs=1e-5)
            assert row["n"] == len(pairs) and row["observed"] != 0
            assert row["predicted_by_adamw"] == pytest.approx(row["predicted"], rel=2e-3, abs=1e-7)
    np.testing.assert_allclose(table["error"], table["observed"] - table["predicted"], atol=1e-7)


# ---- failures ----


def test_a_failure_of_one_process_is_told_to_all(together: Path) -> None:
    """Else the others would wait for a part that never comes."""
    assert seen(together, 1)["failure"] == "planted on the second"
    assert seen(together, 0)["failure"] == "process 1 of 2 failed: RevprobeError: planted on the second"
    assert [seen(together, rank)["first"] for rank in range(SIZE)] == ["by 0", "by 0"]


def test_what_the_first_does_it_does_alone(together: Path, script: ModuleType) -> None:
    """A Trainer inside must not wait for gradients of a process that waits for its result; nor change what follows."""
    assert [seen(together, rank)["alone"] for rank in range(SIZE)] == [1, 1]
    assert rp.Readings.load(together / "alone" / "readings").steps == list(script.STEPS)
    assert seen(together, 0)["world"] == SIZE


def test_alone_nothing_is_gathered() -> None:
    team = ProcessGroup()
    assert team.gather(lambda: 3) == [3] and team.on_rank_zero(lambda: "x") == "x"
    with pytest.raises(ZeroDivisionError):
        team.gather(lambda: 1 // 0)


def test_sharded_weights_are_refused(script: ModuleType) -> None:
    """A probe of one rank's pieces would read noise."""
    whole, pieces = nn.Linear(2, 2), nn.Linear(2, 2)
    require_whole(whole)
    pieces.weight.placements = ("Shard(0)",)  # type: ignore[attr-defined]  # as torch's DTensor has
    with pytest.raises(rp.RevprobeError, match=r"parameter 'weight' is sharded over processes \(FSDP"):
        require_whole(pieces)
    assert math.isfinite(float(whole.weight.sum()))
