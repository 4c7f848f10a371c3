"""The command line: what each command leaves behind, and that every bad input ends in one clear line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import revprobe as rp
from revprobe.finetune.config.loading import parse_config
from revprobe.finetune.config.one_layer import RunConfig, SweepConfig
from revprobe.finetune.training.run_lock import run_lock
from revprobe.probes.figures.theme import interval_text
from revprobe.report.summary.terminal import readings_table

MODEL = "model: {d_model: 16, dropout: 0.1}"
TRAINING = "training: {steps: 12, batch_size: 16, warmup_steps: 2, ema_decay: 0.8, device: cpu}"
RUN = f"name: tiny\nrelation: {{length: 4}}\n{MODEL}\n{TRAINING}\nsnapshots: {{every: 6}}\n"
SWEEP = (
    f"name: grid\nbase:\n  relation: {{length: 4}}\n  {MODEL}\n  {TRAINING}\n  snapshots: {{every: 6}}\n"
    "cells:\n  - {position_encoding: alibi}\n  - {objective: causal}\n"
)

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests that damage it copy it first."""
    return rp.train(parse_config(RUN, RunConfig, "test"), tmp_path_factory.mktemp("trained") / "tiny").path


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """A run of one's own to damage."""
    return Path(shutil.copytree(trained, tmp_path / "tiny"))


def assert_one_line(result: tuple[int, str, str], *words: str) -> None:
    """Exit code 1 and a single line on stderr that holds the words."""
    code, _, err = result
    assert code == 1, result
    assert err.startswith("error: "), err
    assert err.count("\n") == 1, f"more than one line:\n{err}"
    for word in words:
        assert word in err, err


# ---- help ----


def test_python_m_revprobe_shows_help_with_examples() -> None:
    """The entry point of the package, as a user without the script on the path starts it."""
    done = subprocess.run([sys.executable, "-P", "-m", "revprobe", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "revprobe sweep one-layer-quick --jobs 2" in " ".join(done.stdout.split())
    for command in ("train", "probe", "sweep", "report", "models"):
        assert command in done.stdout


@pytest.mark.parametrize("command", ["train", "probe", "sweep", "report", "models"])
def test_every_command_has_an_example(cli: Cli, command: str) -> None:
    code, out, _ = cli(command, "--help")
    assert code == 0
    assert f"revprobe {command}" in " ".join(out.split()).split("Example", 1)[1]


def test_wrong_usage_exits_with_2(cli: Cli) -> None:
    for arguments in (
        ["probe", "x"],
        ["nonsense"],
        ["sweep", "one-layer-quick", "--jobs", "0"],
        ["train", "a", "--ot"],
    ):
        code, _, err = cli(*arguments)
        assert code == 2, (arguments, err)
        assert "Traceback" not in err


def test_version(cli: Cli) -> None:
    assert cli("--version")[:2] == (0, f"revprobe {rp.__version__}\n")


# ---- commands that work ----


def test_train_writes_a_run_and_skips_it_the_second_time(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(RUN)
    code, out, err = cli("train", "tiny.yaml", "--out", "there")
    assert (code, err) == (0, "")
    assert "step 12/12" in out
    assert "forward accuracy" in " ".join(out.split())
    assert rp.open_run(tmp_path / "there" / "tiny").finished
    code, out, err = cli("train", "tiny.yaml", "--out", "there")
    assert (code, out, err) == (0, "tiny: finished already, skipped (there/tiny)\n", "")


def test_probe_of_a_run_gives_the_readings_of_its_last_snapshot(cli: Cli, trained: Path, tmp_path: Path) -> None:
    """--pairs letters:4 means the very pairs the snapshots used, so the numbers can be compared."""
    code, out, err = cli("probe", trained, "--pairs", "letters:4", "--out", "readings")
    assert (code, err) == (0, "")
    again, saved = (
        rp.Readings.load(tmp_path / "readings"),
        rp.open_run(trained).readings().select(step=12, weights="ema"),
    )
    assert len(again) == 3
    for reading in again:
        assert reading.frame.equals(saved[reading.name].frame), reading.name
        assert reading.name.replace("_", " ") in " ".join(out.split())
    code, out, _ = cli(
        "probe", trained, "--pairs", "letters:4", "--probes", "probability", "--step", 0, "--weights", "raw"
    )
    assert code == 0
    assert "gradient" not in out


def test_probe_takes_pairs_from_a_file(cli: Cli, trained: Path, tmp_path: Path) -> None:
    rp.letter_pairs(4, model=rp.load_model(trained), placements="mirror").save(tmp_path / "pairs.jsonl")
    code, out, err = cli("probe", trained, "--pairs", "pairs.jsonl", "--probes", "attention,probability")
    assert (code, err) == (0, "")
    assert "reverse probability" in " ".join(out.split())


def test_probe_shows_the_excess_over_the_control(trained: Path) -> None:
    """A value beside its control leaves the finding, whether the difference excludes zero, to the reader."""
    reading = rp.open_run(trained).readings().select(name="attention_correlation", step=12, weights="ema")
    table = readings_table(reading, "title")
    cells = {str(column.header): str(next(iter(column.cells))) for column in table.columns}
    excess = reading[0].excess
    assert excess is not None
    assert cells["value - control [95 %]"] == interval_text(excess.value, excess.low, excess.high)
    model = rp.load_model(trained)
    pairs = rp.letter_pairs(4, model=model)
    table = readings_table(rp.probe(model, pairs, only=["attention"], control=False), "title")
    cells = {str(column.header): str(next(iter(column.cells))) for column in table.columns}
    assert (cells["control [95 %]"], cells["value - control [95 %]"]) == ("-", "-")


def test_a_bad_out_is_named_before_anything_is_probed(
    cli: Cli, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half an hour of probing whose readings cannot be written is lost."""

    def never(*args: object, **options: object) -> None:
        raise AssertionError("probed before --out was tried")

    monkeypatch.setattr("revprobe.finetune.training.probe_callback.take_readings", never)
    (tmp_path / "file").write_text("mine")
    for out in ("file", "file/inside"):
        assert_one_line(cli("probe", trained, "--pairs", "letters:4", "--out", out), "cannot use", "file")
    assert (tmp_path / "file").read_text() == "mine"
    if os.geteuid():  # root may write anywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        result = cli("probe", trained, "--pairs", "letters:4", "--out", "locked")
        assert_one_line(result, "cannot use", "locked", "choose a folder you may write to")


def test_report_of_a_run_writes_both_files(cli: Cli, copied: Path) -> None:
    code, out, err = cli("report", copied)
    assert (code, err) == (0, "")
    assert "report.html" in out
    assert "plotly" in (copied / "report.html").read_text()
    header = "run,objective,position_encoding,length,seed,step,weights,kind,measure,value,n,facts,low,high,control"
    header += ",undefined,reason,caution,statistics_version"
    assert (copied / "summary.csv").read_text().splitlines()[0] == header


def test_models_lists_families_and_examples(cli: Cli) -> None:
    code, out, _ = cli("models")
    assert code == 0
    for word in ("radd", "gpt2", "one-layer-quick"):
        assert word in out


# ---- bad input ----


def test_a_missing_model_is_named(cli: Cli, trained: Path) -> None:
    assert_one_line(cli("probe", "./tinny", "--pairs", "letters:4"), "no model folder at './tinny'")
    assert_one_line(
        cli("probe", trained, "--pairs", "letters:4", "--step", 7), "has no checkpoint at step 7; it has 0, 6, 12"
    )
    assert_one_line(cli("report", "nowhere"), "no sweep at 'nowhere'")


def test_a_truncated_checkpoint_is_named(cli: Cli, copied: Path) -> None:
    weights = copied / "checkpoints" / "step-000012" / "ema" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    assert_one_line(cli("probe", copied, "--pairs", "letters:4"), "cannot load the weights", "cut off")
    (copied / "checkpoints" / "step-000012" / "COMPLETE").unlink()
    assert_one_line(
        cli("probe", copied, "--pairs", "letters:4", "--step", 12), "has no checkpoint at step 12; it has 0, 6"
    )


def test_pickled_weights_are_refused(cli: Cli, copied: Path) -> None:
    folder = copied / "checkpoints" / "step-000012"
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert_one_line(cli("probe", copied, "--pairs", "letters:4", "--weights", "raw"), "pickled", "safetensors")


def test_nan_weights_are_named(cli: Cli, copied: Path) -> None:
    path = copied / "checkpoints" / "step-000012" / "ema" / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"][:] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    assert_one_line(cli("probe", copied, "--pairs", "letters:4"), "NaN", "lm_head.weight")


def test_a_config_for_another_model_is_named(cli: Cli, copied: Path) -> None:
    path = copied / "checkpoints" / "step-000012" / "ema" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"d_model": 32}))
    assert_one_line(cli("probe", copied, "--pairs", "letters:4"), "another model")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--pairs", "letters:9"], ["letters of length 9", "at most 4 tokens"]),
        (["--pairs", "letters:4", "--alphabet", "40"], ["has no token for", "absent from its vocabulary"]),
        (["--pairs", "letters:four"], ["'letters:four': expected letters:LENGTH"]),
        (["--pairs", "letters:4", "--probes", "atention"], ["unknown probe 'atention'; the closest is 'attention'"]),
        (["--pairs", "letters:4", "--probes", ","], ["names no probe"]),
        (
            ["--pairs", "letters:4", "--placements", "mirrored"],
            ["unknown placements 'mirrored'; the closest is 'mirror'"],
        ),
        (["--pairs", "letters:4", "--weights", "mean"], ["has no 'mean' weights; it has raw and ema"]),
        (["--pairs", "absent.jsonl"], ["no pairs file at 'absent.jsonl'"]),
        (["--pairs", "letters:4", "--device", "foo"], ["device 'foo' cannot be used here", "expected one of cpu"]),
        (["--pairs", "letters:4", "--device", "cuda:99"], ["device 'cuda:99' cannot be used here"]),
    ],
)
def test_a_wrong_question_to_a_good_model_is_answered(
    cli: Cli, trained: Path, arguments: list[str], words: list[str]
) -> None:
    assert_one_line(cli("probe", trained, *arguments), *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["holds no pairs"]),
        ("{not json", ["pairs.jsonl, line 1"]),
        (
            '{"forward": {"token_ids": [5, 5], "target_positions": [0], "evidence_positions": [1]}}',
            ["evidence equals target"],
        ),
        (
            '{"fact": "x", "forward": {"token_ids": [1, 99], "target_positions": [0], "evidence_positions": [1]},'
            ' "reverse": {"token_ids": [99, 1], "target_positions": [1], "evidence_positions": [0]}}',
            ["99", "vocabulary"],
        ),
    ],
)
def test_a_wrong_pairs_file_is_explained(cli: Cli, trained: Path, tmp_path: Path, text: str, words: list[str]) -> None:
    (tmp_path / "pairs.jsonl").write_text(text)
    assert_one_line(cli("probe", trained, "--pairs", "pairs.jsonl"), *words)


def test_a_pairs_file_that_is_not_text_is_named(cli: Cli, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_bytes(b'{"fact": "\xe9t\xe9"}')
    result = cli("probe", trained, "--pairs", "pairs.jsonl")
    assert_one_line(result, "pairs.jsonl: not a text file", "byte 10", "expected JSON lines in UTF-8")


def test_missing_readings_are_named_by_the_report_and_taken_by_train(cli: Cli, copied: Path, tmp_path: Path) -> None:
    """A checkpoint alone does not make a run whole."""
    (tmp_path / "tiny.yaml").write_text(RUN)
    lost = copied / "readings" / "step-000006" / "gradient_cosine.raw.parquet"
    before = lost.read_bytes()
    lost.unlink()
    result = cli("report", copied)
    assert_one_line(result, "1 of 18 readings are missing (readings/step-000006/gradient_cosine.raw.parquet)")
    assert "readings are missing" in (copied / "report.html").read_text()
    with pytest.warns(UserWarning, match="1 missing readings were taken"):  # main prints it as a note; pytest keeps it
        assert cli("train", "tiny.yaml", "--out", tmp_path)[0] == 0
    assert lost.read_bytes() == before
    assert "finished already" in cli("train", "tiny.yaml", "--out", tmp_path)[1]


def test_a_corrupted_reading_is_named_by_the_report(cli: Cli, copied: Path) -> None:
    path = copied / "readings" / "step-000006" / "gradient_cosine.raw.parquet"
    path.write_bytes(path.read_bytes()[:50])
    assert_one_line(
        cli("report", copied), "gradient_cosine.raw.parquet is damaged", "delete it and run the same command again"
    )
    assert "gradient_cosine.raw.parquet is damaged" in (copied / "report.html").read_text(), "the page must say so too"


def test_a_mistyped_key_names_key_file_and_nearest(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(RUN.replace("batch_size", "batchsize"))
    assert_one_line(
        cli("train", "tiny.yaml"), "tiny.yaml: unknown key 'training.batchsize'; the closest is 'batch_size'"
    )


def test_an_unwritable_run_folder_is_named(cli: Cli, tmp_path: Path) -> None:
    """A file where the folder should be stands for every reason: it holds for root, whom permissions do not stop."""
    (tmp_path / "tiny.yaml").write_text(RUN)
    (tmp_path / "runs").write_text("not a folder")
    result = cli("train", "tiny.yaml")
    assert_one_line(result, "cannot use", "runs")
    assert (tmp_path / "runs").read_text() == "not a folder"


def test_another_config_for_a_run_shows_the_difference(cli: Cli, copied: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(RUN.replace("steps: 12", "steps: 13"))
    assert_one_line(cli("train", "tiny.yaml", "--out", tmp_path), "training.steps: 12 -> 13 (old -> new)")


def test_debug_shows_the_traceback(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REVPROBE_DEBUG", "1")
    with pytest.raises(rp.RevprobeError, match="no sweep at 'nowhere'"):
        cli("report", "nowhere")


# ---- sweeps ----


@pytest.mark.long
def test_a_sweep_runs_side_by_side_skips_finished_runs_and_survives_a_failing_one(cli: Cli, tmp_path: Path) -> None:
    """One run's folder is in the way at first: the other must finish, the report be written, the failure be named."""
    (tmp_path / "grid.yaml").write_text(SWEEP)
    sweep = tmp_path / "runs" / "grid"
    (sweep / "arm-l4-s0").mkdir(parents=True)
    (sweep / "arm-l4-s0" / "notes.txt").write_text("mine")
    result = cli("sweep", "grid.yaml", "--jobs", 2)
    assert_one_line(result, "1 of 2 runs failed (arm-l4-s0: ", "it holds 'notes.txt'")
    assert (sweep / "report.html").is_file()
    assert rp.open_run(sweep / "alibi-l4-s0").finished

    shutil.rmtree(sweep / "arm-l4-s0")
    code, out, err = cli("sweep", "grid.yaml", "--jobs", 2)
    assert (code, err) == (0, "")
    assert "alibi-l4-s0: finished already, skipped" in out
    assert "arm-l4-s0: finished in" in out
    assert str(Path("runs/grid/report.html")) in out

    reading = sweep / "arm-l4-s0" / "readings" / "step-000012" / "gradient_cosine.raw.parquet"
    whole = reading.read_bytes()
    reading.write_bytes(whole[:60])
    assert_one_line(
        cli("report", sweep), "1 of 2 runs are not whole (arm-l4-s0: ", "gradient_cosine.raw.parquet is damaged"
    )
    assert "alibi-l4-s0" in (sweep / "summary.csv").read_text(), "one damaged file took the other run with it"
    reading.write_bytes(whole)

    summary = rp.open_sweep(sweep).summary()
    assert set(summary["run"]) == {"alibi-l4-s0", "arm-l4-s0"}
    alone = rp.train(parse_config(SWEEP, SweepConfig, "test").runs()[0], tmp_path / "alone" / "alibi-l4-s0")
    for path in alone.path.glob("readings/*/*.parquet"):
        twin = sweep / "alibi-l4-s0" / path.relative_to(alone.path)
        assert twin.read_bytes() == path.read_bytes(), f"{path.name} depends on who ran beside it"


@pytest.mark.long
def test_a_sweep_takes_other_cells_and_refuses_another_base(cli: Cli, tmp_path: Path) -> None:
    """sweep.yaml overwritten in silence would put finished runs of the old base into the new one's report."""
    one = SWEEP.replace("  - {objective: causal}\n", "")
    sweep = tmp_path / "runs" / "grid"
    (tmp_path / "grid.yaml").write_text(one)
    assert cli("sweep", "grid.yaml")[0] == 0
    written = (sweep / "sweep.yaml").read_text()
    (tmp_path / "grid.yaml").write_text(one.replace("steps: 12", "steps: 13"))
    result = cli("sweep", "grid.yaml")
    assert_one_line(result, "another base: training.steps: 12 -> 13 (old -> new); restore the old values")
    assert (sweep / "sweep.yaml").read_text() == written
    (tmp_path / "grid.yaml").write_text(SWEEP)
    code, out, err = cli("sweep", "grid.yaml")
    assert (code, err) == (0, "")
    assert "alibi-l4-s0: finished already, skipped" in out

    # A run of another kind under the name of one of the sweep's: shown with what differs, not as one of its kind.
    other = sweep / "arm-l4-s0" / "config.yaml"
    other.write_text(other.read_text().replace("dropout: 0.1", "dropout: 0.2"))
    words = "another run than the sweep's: model.dropout: 0.1 -> 0.2 (sweep -> run)"
    assert_one_line(cli("report", sweep), "1 of 2 runs are not whole (arm-l4-s0: ", words)
    problems = {run.name: run.problem for run in rp.open_sweep(sweep).records()}
    assert problems["alibi-l4-s0"] is None and words in (problems["arm-l4-s0"] or "")


@pytest.mark.long
def test_a_sweep_passes_on_what_its_runs_note(cli: Cli, tmp_path: Path) -> None:
    """A run that starts anew, or takes readings again, says so on its stderr, which the sweep reads."""
    (tmp_path / "grid.yaml").write_text(SWEEP.replace("  - {position_encoding: alibi}\n", ""))
    assert cli("sweep", "grid.yaml")[0] == 0
    (tmp_path / "runs/grid/arm-l4-s0/readings/step-000006/gradient_cosine.raw.parquet").unlink()
    code, out, err = cli("sweep", "grid.yaml")
    assert (code, err) == (0, "")
    assert "arm-l4-s0: note: " in out and "1 missing readings were taken from their checkpoints" in out


def test_ctrl_c_stops_a_sweep_and_its_children(tmp_path: Path) -> None:
    """Children left behind would write beside the next attempt."""
    (tmp_path / "grid.yaml").write_text(SWEEP.replace("steps: 12", "steps: 100000").replace("every: 6", "every: 50000"))
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "revprobe", "sweep", "grid.yaml", "--jobs", "2"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A suite that was itself started in the background (`make test &`) ignores Ctrl-C, and its children with it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    runs = [tmp_path / "runs" / "grid" / name for name in ("alibi-l4-s0", "arm-l4-s0")]
    deadline = time.monotonic() + 120
    while not all((run / "checkpoints" / "step-000000").exists() for run in runs):
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline, "the children did not start within two minutes"
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130, (out, err)
    assert "run the same command again to go on" in out
    assert "Traceback" not in err
    for run in runs:
        with run_lock(run):  # raises while a child still holds the folder
            pass


@pytest.mark.parametrize("module", ["typer", "torch", "revprobe.finetune.config.loading"])
def test_ctrl_c_during_start_up_is_one_line(module: str, tmp_path: Path) -> None:
    """While the command line, torch or the config is being imported, long before there is a run's folder."""
    code = (
        "import builtins, runpy, signal, os, sys\n"
        # A shell that starts the tests in the background leaves it ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "before = builtins.__import__\n"
        "def watched(name, *rest, **named):\n"
        f"    if name == {module.split('.')[-1]!r} or name.endswith('.'.join({module!r}.split('.')[-2:])):\n"
        "        builtins.__import__ = before; os.kill(os.getpid(), signal.SIGINT)\n"
        "    return before(name, *rest, **named)\n"
        "builtins.__import__ = watched\n"
        "sys.argv = ['revprobe', 'train', 'one-layer-quick']\n"
        "runpy.run_module('revprobe', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "stopped\n")
    assert not list(tmp_path.iterdir())
