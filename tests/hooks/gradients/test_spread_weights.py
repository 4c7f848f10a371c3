"""A model whose weights FSDP2 spreads over two processes gives every process the reading of a whole one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tiny import module_at

SCRIPT = Path(__file__).with_name("spread_processes.py")
SIZE = 2
CASES = module_at(SCRIPT).CASES


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two processes has seen."""
    folder = tmp_path_factory.mktemp("spread")
    command = [sys.executable, "-P", str(SCRIPT), str(folder)]
    running = [
        subprocess.Popen([*command, str(rank), str(SIZE)], stderr=subprocess.PIPE, text=True) for rank in range(SIZE)
    ]
    try:
        said = [process.communicate(timeout=300)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(said)
    return [json.loads((folder / f"told-{rank}.json").read_text()) for rank in range(SIZE)]


@pytest.mark.parametrize("case", CASES)
def test_every_probe_gives_what_it_gives_of_a_whole_model(told: list[dict[str, Any]], case: str) -> None:
    """Each row of each reading, to rounding; in both processes."""
    assert {"gradient", "attention", "probability"} <= set(told[0][case])
    assert case != "radd" or {"route", "lens", "trace"} < set(told[0][case])
    for seen in told:
        for probe, found in seen[case].items():
            assert found["n"] > 0
            assert found["difference"] < 1e-5, (case, probe, found)
            assert found["one by one"][0] == found["one by one"][1], (case, probe)


@pytest.mark.parametrize("case", CASES)
def test_the_model_is_left_in_pieces_with_its_flags_and_values(told: list[dict[str, Any]], case: str) -> None:
    assert all(found["left"] for seen in told for found in seen[case].values())


def test_what_is_read_one_query_at_a_time_is_among_the_cases(told: list[dict[str, Any]]) -> None:
    """Else that path would be unproven here."""
    assert told[0]["lengths apart"]["gradient"]["one by one"][0], "queries that cannot share a batch"


def test_a_bare_module_is_taken_as_it_is(told: list[dict[str, Any]]) -> None:
    assert all(seen["bare"] == pytest.approx(seen["bare alone"], abs=1e-6) for seen in told)


def test_what_reads_weights_outside_of_a_forward_pass_says_so(told: list[dict[str, Any]]) -> None:
    for seen in told:
        assert "is spread over processes, and an attribution of logits reads whole weights" in seen["stored"]
        assert "is spread over processes, and objective_terms reads whole weights" in seen["terms"]


def test_pieces_that_nothing_gathers_are_refused(told: list[dict[str, Any]]) -> None:
    """Tensor parallelism: its activations are pieces too."""
    for seen in told:
        assert "up_proj.weight' is a piece of a weight that no unit of fully_shard gathers" in seen["tensor parallel"]
