"""The benchmarks of large models, many pairs and other libraries, at tiny sizes: each runs, and its numbers hold."""

import importlib
import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import revprobe as rp
from revprobe.finetune.config.finetuning import read_finetune
from revprobe.finetune.pretraining.layouts import train_tokenizer
from revprobe.finetune.runs.finetune_setup import text_relation
from tiny import ROOT

BENCHMARKS = ROOT / "examples" / "benchmarks"
linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux' /proc")


@pytest.fixture
def script() -> Iterator[Callable[[str], ModuleType]]:
    """Imports a benchmark by its name; what they share is beside them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module
    for path in BENCHMARKS.glob("*.py"):
        sys.modules.pop(path.stem, None)


@linux
def test_many_pairs_have_one_number_in_both_ways(script: Callable[[str], ModuleType]) -> None:
    """And parts leave more on disk, the more there are."""
    many, asked = script("many_pairs"), Namespace(threads=1, tokens=8, size=50, probes=["attention"])
    parts, whole, more = (many.measure(*at, asked) for at in (("in parts", 60), ("all at once", 60), ("in parts", 120)))
    assert abs(parts["value"] - whole["value"]) < 1e-6 and parts["value"] != more["value"]
    assert more["MB on disk"] > parts["MB on disk"] > 0 == whole["MB on disk"]
    assert all(0 < row["seconds"] < 60 and row["resident MB before"] > 100 for row in (parts, whole, more))
    assert 0 < more["end told at half, of the true"] < 3 and whole["end told at half, of the true"] != parts["seconds"]


def test_gradients_of_long_queries_take_more_than_a_forward_pass(script: Callable[[str], ModuleType]) -> None:
    short, long = (
        {row["way"]: row for row in script("many_pairs").long_query(tokens, Namespace(rounds=1))}
        for tokens in (32, 128)
    )
    assert short["plain forward"]["of a forward"] == 1.0
    for table in (short, long):
        assert table["gradient cosine"]["peak extra MB"] > table["plain forward"]["peak extra MB"] > 0
    assert long["attention, one row"]["peak extra MB"] > 2 * short["attention, one row"]["peak extra MB"]


@linux
def test_a_checkpoint_of_the_published_layout_is_loaded_and_its_memory_seen(
    script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    """Written in shards under the published names; the weights are those of the shape, and reading them costs less."""
    loading = script("large_loading")
    config = loading.config_for("GSAI-ML/LLaDA-8B-Base", None, True)
    total = loading.write_checkpoint(tmp_path, config, torch.bfloat16, 10_000_000)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) == 3 and total < sum(path.stat().st_size for path in shards) < 1.01 * total
    loaded, read = (loading.measure(way, tmp_path, "warm", 16, 1) for way in ("load", "read"))
    assert loaded["weights"] == total and loaded["seconds"] >= loaded["load"] > 0 < loaded["first forward"]
    assert loaded["resident beyond"] > total / 2 and read["resident beyond"] < loaded["resident beyond"]


def test_without_room_on_disk_nothing_is_written(
    script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading = script("large_loading")
    asked = Namespace(shape="GSAI-ML/LLaDA-8B-Base", tiny=False, scratch=tmp_path)
    monkeypatch.setattr(loading.shutil, "disk_usage", lambda _: Namespace(free=39 * loading.GB))
    with pytest.raises(SystemExit, match=r"39\.0 GB free; expected 40\.1 GB"):
        loading.checkpoint_rows(None, torch.bfloat16, asked)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def inputs(script: Callable[[str], ModuleType], tmp_path: Path) -> Callable[..., Any]:
    """The shared file of the peers at a tiny size, read back."""

    def made(kind: str, lengths: Sequence[int] = (), queries: int = 4) -> Any:
        told = {"queries": queries, "tokens": 8, "kind": kind, "lengths": list(lengths), "batch": 2}
        script("peer_inputs").write_inputs(tmp_path / "inputs.safetensors", "tiny", **told)
        return script("peer_inputs").read_inputs(tmp_path / "inputs.safetensors")

    return made


@pytest.mark.parametrize(("kind", "products"), [("pairs", 6), ("gram", 10)])
def test_every_way_to_gradient_products_has_the_answers_of_float64(
    script: Callable[[str], ModuleType], inputs: Callable[..., Any], kind: str, products: int
) -> None:
    """On all parameters; and once a weight has moved, each way says something else."""
    given, rows_of = inputs(kind), script("peer_rows")
    step, *rows = rows_of.times(given, "plain", 1)
    assert step["way"] == "training step" and step["times"] == 1.0 and step["low"] <= step["seconds"] <= step["high"]
    assert len(rows) == (5 if kind == "pairs" else 4)
    for row in rows:
        assert row["largest error"] < 1e-5 and row["parameters"] == 1.0, row
        assert row["products"] == f"{products} of {products}" and row["times"] == row["seconds"] / step["seconds"], row
    with torch.no_grad():
        given.model.model.layers[0].mlp.up_proj.weight[0] += 1.0
    moved = script("peer_gradients").gradient_ways(given, "plain")
    assert all(rows_of.agreement(given, run())["largest error"] > 1e-3 for run in moved.values())


def test_ways_that_hold_all_gradients_are_not_run_where_memory_is_too_small(
    script: Callable[[str], ModuleType], inputs: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They say how much they would take; ours holds none, and is run."""
    given, gradients = inputs("gram"), script("peer_gradients")
    monkeypatch.setattr(gradients.psutil, "virtual_memory", lambda: Namespace(total=4 * given.facts["parameters"] * 4))
    _, ours, *others = script("peer_rows").times(given, "plain", 1)
    assert ours["way"] == "revprobe, record_gradients" and ours["largest error"] < 1e-5
    assert len(others) == 3 and all(row["not run"].startswith("not run: 4 gradients are") for row in others)


def test_every_readout_has_the_weights_of_float64(
    script: Callable[[str], ModuleType], inputs: Callable[..., Any]
) -> None:
    """Of the row and the column that were asked for, whose weights are not those of their neighbours."""
    given = inputs("pairs", [16], queries=0)
    rows = script("peer_rows").times(given, "plain", 1)
    assert [row["way"] for row in rows[:2]] == ["plain forward", "revprobe, tap"] and len(rows) == 5
    assert all(row["largest error"] < 1e-6 and row["heads"] == 1.0 for row in rows[1:]), rows
    answer = given.attention[16][1]
    assert answer.dtype == torch.float64 and answer.shape == (2, 2, 2)
    assert answer.max() - answer.min() > 0.01, "uniform attention would agree with anything"


@linux
def test_a_peak_is_of_what_a_way_holds_at_once_and_not_of_what_it_held_before(
    script: Callable[[str], ModuleType],
) -> None:
    """In a process that keeps nothing it freed, as `peers.py` starts it."""
    code = """
import torch, peer_rows
def twice():
    torch.ones(16_000_000); torch.ones(8_000_000)
kept = torch.ones(8_000_000)
print(peer_rows.peak_of(twice, lambda: torch.ones(64_000_000)))
"""
    peers = script("peers")
    environment = peers.environment_of_a_process(peak=True)
    said = subprocess.run([sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True)
    assert not said.returncode, said.stderr
    assert abs(float(said.stdout) - 64) < 4, (
        "one of 64 MB, beside neither the later, the kept nor the one of the warm-up"
    )


def test_answers_in_float64_stay_so_where_a_model_asks_for_float32(script: Callable[[str], ModuleType]) -> None:
    wide = torch.tensor([1.0, 1e-12], dtype=torch.float64)
    with script("peer_inputs").Float64():
        found = [wide.to(torch.float32), wide.float(), wide.softmax(0, dtype=torch.float32)]
    assert {one.dtype for one in found} == {torch.float64} and wide.float().dtype == torch.float32


def asked_of_peers(folder: Path) -> Namespace:
    return Namespace(folder=folder, out=folder / "rows.jsonl", rounds=1, threads=1)


def test_a_peer_that_cannot_be_installed_is_not_run_and_its_version_is_told(
    script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = "nowhere @ file:///no/such/place/nowhere-9.9-py3-none-any.whl"
    monkeypatch.setitem(script("peer_environments").PEERS, "nowhere", [nowhere])
    [row] = script("peers").measured(script("peers").Task.of("pairs-tiny", 4, 8), "nowhere", asked_of_peers(tmp_path))
    assert row["not run"].startswith(f"{nowhere}: ERROR: ") and "nowhere-9.9" in row["not run"].split(": ERROR: ")[1]
    assert not (tmp_path / "nowhere" / "complete").exists()


def test_peers_go_on_where_they_were_ended(
    script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times and memory that are there are not measured again, what was not run is, and one row has both."""
    peers, asked = script("peers"), asked_of_peers(tmp_path)
    calls: list[str] = []
    memory: list[dict[str, Any]] = [{"way": "step", "not run": "plain: MemoryError"}, {"way": "step", "peak MB": 3.0}]

    def answers(call: list[str], way: str, peer: str) -> list[dict[str, Any]]:
        calls.append(way)
        whole = {"seconds": 1.0, "low": 1.0, "high": 2.0, "times": 1.0}
        return [memory.pop(0)] if "--peak" in call else [{"way": "step", **whole}, {"way": "other", "not run": "large"}]

    monkeypatch.setattr(peers, "_answers", answers)
    task = peers.Task.of("pairs-tiny", 4, 8)
    for _ in range(3):
        for row in list(peers.measured(task, "plain", asked)):
            with asked.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"task": task.name, "peer": "plain", **row}) + "\n")
    assert calls == ["all", "step", "step"]
    step, other = peers.finished(peers.read_rows(asked.out))
    assert step["seconds"] == 1.0 and step["peak MB"] == 3.0 and "not run" not in step and other["not run"] == "large"
    table = script("peer_tables").tables(peers.read_rows(asked.out)).splitlines()
    assert table[0] == "`pairs-tiny`" and "| plain | step | 1 | 1 (1 to 2) | 3 | - | - | - |" in table
    assert "| plain | other | not run: large | - | - | - | - | - |" in table


def test_what_is_said_of_a_table_is_of_ways_that_cover_everything(script: Callable[[str], ModuleType]) -> None:
    """A partial way that is faster does not win, and where ours is behind, the factor is told."""

    def row(way: str, times: float, peak: float, share: float = 1.0, products: str = "6 of 6") -> dict[str, Any]:
        more = {"parameters": share, "products": products, "largest error": 0.0}
        return {"peer": "plain", "way": way, "times": times, "peak MB": peak, **more}

    verdict = script("peer_tables").verdict
    ours, loop = row("revprobe, probe", 1.0, 50.0), row("loop", 2.0, 25.0)
    partial = [row("part", 0.5, 1.0, share=0.9), row("norms", 0.5, 1.0, products="4 of 6")]
    assert verdict([ours, loop, *partial]) == (
        "Of what covers everything: beside plain, fastest: revprobe, probe, least memory: loop (ours 2 times that)."
    )
    assert verdict([ours, *partial]) == "Of what covers everything: beside plain, nothing else covers everything."


def test_the_peers_tables_are_those_of_the_rows(script: Callable[[str], ModuleType]) -> None:
    """README's block is what `peers.py --tables` makes of the committed rows."""
    peers, readme = script("peers"), (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    rows = peers.read_rows(BENCHMARKS / "peers.jsonl")
    assert script("peer_tables").with_tables(readme, rows) == readme
    assert (
        script("peer_tables").with_tables(readme, [{"task": "pairs-9", "peer": "p", "way": "w", "not run": "n"}])
        != readme
    )


def test_what_ray_adds_is_of_further_runs_alone(
    script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run of a sweep is longer by the start of a worker, and not counted; failed runs are no times."""
    overhead = script("ray_overhead")
    clock = iter(
        [0.0, 1.0, 2.0, 3.0, 100.0, 150.0, 151.5, 153.0, 200.0, 201.0, 202.0, 203.0, 300.0, 350.0, 351.5, 353.0]
    )
    failing: dict[str, str] = {}

    class Engine:
        def run_all(self, these: list[Any], folder: Path, display: Any) -> dict[str, str]:
            for work in these:
                display.say(f"{work.name}: started")
                display.say(f"{work.name}: finished in 0:00:01")
            return failing

    monkeypatch.setattr(overhead.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(overhead, "connected", lambda address: nullcontext())
    monkeypatch.setattr(overhead, "LocalLauncher", Engine)
    monkeypatch.setattr(overhead, "RayLauncher", lambda jobs: Engine())
    row = overhead.sweeps("one-layer", 2)
    assert row["local"] == {"median": 1.0, "low": 1.0, "high": 1.0, "n": 4}
    assert row["ray"] == {"median": 1.5, "low": 1.5, "high": 1.5, "n": 4} and row["ray adds"] == 0.5
    assert len({work.name for work in overhead.works("one-layer", 3)}) == 3
    failing["one"], clock = "its error", iter(range(9))
    with pytest.raises(RuntimeError, match="its error"):
        overhead.ends(Engine(), overhead.works("empty", 1))


def test_an_empty_run_is_a_process_that_any_engine_starts(script: Callable[[str], ModuleType]) -> None:
    overhead = script("ray_overhead")
    first, second = overhead.ends(overhead.LocalLauncher(), overhead.works("empty", 2))
    assert 0 < first < second


@linux
def test_one_step_is_probed_twice_from_one_load_and_held_against_its_plan(
    script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The structure of the 8B run at two layers; at this size libraries, and not what was planned, are the memory."""
    large = script("large_finetune")
    monkeypatch.setattr(large.resource, "setrlimit", lambda *_: None)  # this process has other tests to do
    asked = Namespace(shape="GSAI-ML/LLaDA-8B-Base", layers=None, tiny=True, tokens=64, limit=22.0)
    row = large.measure(asked, tmp_path)
    run = rp.open_run(tmp_path / "run")
    assert row["loads"] == 1 and run.finished and run.steps == run.snapshots == [0, 1]
    assert run.resolved["rows"] == run.resolved["pairs"] == 4 and run.config.training.gradient_checkpointing
    assert row["decoding"] == "skipped (evaluation.facts: 0)" and not (run.path / "evaluation").exists()
    assert 0 < row["measured GB"] == pytest.approx(row["of the plan"] * row["planned GB"], rel=0.01)
    tensors = [name for file in run.path.rglob("*.safetensors") for name in load_file(file)]
    assert tensors and all("lora_" in name for name in tensors), "the base is not copied"
    assert not (run.path / "base").exists() and row["folder GB"] < 0.002


def test_rows_of_the_large_run_are_as_long_as_they_say(script: Callable[[str], ModuleType]) -> None:
    """With the script's tokenizer every statement, either way round, has the tokens that the plan is asked for."""
    large = script("large_finetune")
    relation = text_relation(read_finetune(large.CONFIG))
    texts = [text for direction in relation.directions for text in relation.training_texts(direction)]
    tokenizer = train_tokenizer(texts, large.VOCABULARY)
    assert len(texts) == 8 and {len(tokenizer(text)["input_ids"]) for text in texts} == {64}


@linux
def test_a_run_beyond_its_limit_ends_with_its_plan(script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    """The row is there all the same: what was planned, and that it was too much."""
    large = script("large_finetune")
    asked = Namespace(shape="GSAI-ML/LLaDA-8B-Base", layers=1, tiny=True, tokens=64, limit=1.0, scratch=tmp_path)
    row = large.row_of(asked)
    assert row["the plan says"] == "does not fit" and row["planned GB"] > 2 and row["layers"] == 1
    assert row["ended"].startswith("with exit code") and "measured GB" not in row
    assert not list(tmp_path.iterdir()), "nothing is left behind"


@pytest.mark.long
def test_what_somebody_new_types_works_as_it_stands(tmp_path: Path) -> None:
    """From a clone: report, its picture, README's snippet and command, an own GPT-2; the demo's run is of two steps."""
    command = [sys.executable, str(BENCHMARKS / "first_time.py"), "--quick"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    steps = [row["step"] for row in told["rows"]]
    assert len(steps) == 9 and steps[-1] == "in all"
    assert all(row["seconds"] > 0 for row in told["rows"])
