"""Kill a run with SIGKILL at any moment, run the same command again: the readings are those of a run left alone."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from revprobe import RevprobeError, open_run, train
from revprobe.finetune.config.loading import parse_config
from revprobe.finetune.config.one_layer import RunConfig
from revprobe.finetune.runs.one_layer import build_model
from revprobe.finetune.training.arguments import training_arguments
from revprobe.finetune.training.run_lock import run_lock
from revprobe.finetune.training.trainer import ForwardOnlyTrainer, TokenRows

CONFIG = """
name: tiny
relation: {length: 4, alphabet: 8}
model: {family: FAMILY, d_model: 16, dropout: 0.1}
training: {steps: 30, batch_size: 16, warmup_steps: 5, ema_decay: 0.9, seed: 3, device: cpu}
snapshots: {every: 10}
"""

# Runs in a process of its own. Each killed or resumed training is a fork of it, so torch is imported once; in a
# killed one `doomed(moment)` makes the process send itself SIGKILL when it gets to that moment.
DRIVER = """
import json, os, signal, sys
from pathlib import Path
from revprobe.finetune.runs import one_layer, run as runs
from revprobe.finetune.training import checkpointing as saving, probe_callback as snapshots, trainer
from revprobe.finetune.config.loading import parse_config
from revprobe.finetune.config.one_layer import RunConfig
from revprobe.probes.readings import reading
from transformers import Trainer

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def nth(function, count, then=die, before=True):
    calls = []
    def counted(*args, **kwargs):
        calls.append(1)
        if before and len(calls) == count:
            then(*args, **kwargs)
        result = function(*args, **kwargs)
        if not before and len(calls) == count:
            then(*args, **kwargs)
        return result
    return counted

MOMENTS = {
    # name: (object, attribute, which call dies, before or after the call)
    "after the config, before anything else": (runs, "software", 1, True),
    "before anything is trained": (snapshots.Readings, "save", 1, True),
    "between two snapshots": (trainer.ForwardOnlyTrainer, "training_step", 17, True),
    "inside a readings folder": (reading.Reading, "save", 8, True),
    "after the readings, before the checkpoint": (trainer.ForwardOnlyTrainer, "_save_checkpoint", 2, True),
    "after the weights, before the optimizer": (trainer.ForwardOnlyTrainer, "_save_optimizer_and_scheduler", 3, True),
    "after the Trainer's checkpoint, before the average": (trainer.MovingAverage, "save", 2, True),
    "before the mark": (saving, "_remove", 3, True),
    "after the mark, before the rename": (saving.Path, "touch", 3, False),
    "after the checkpoint, before the older one is slimmed": (saving, "prune_optimizer_state", 3, True),
    "after the last step, before its checkpoint": (trainer.ForwardOnlyTrainer, "_save_checkpoint", 4, True),
}

def in_a_fork(config, folder, moment=None):
    pid = os.fork()
    if pid == 0:
        if moment is not None:
            owner, name, count, before = MOMENTS[moment]
            setattr(owner, name, nth(getattr(owner, name), count, before=before))
        try:
            one_layer.train(config, folder)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]

config = parse_config(sys.argv[1], RunConfig, "argument")
home = Path(sys.argv[2])
moments = [m for m in json.loads(sys.argv[3]) or MOMENTS]
report = {"": [in_a_fork(config, home / "undisturbed" / "tiny")]}
for number, moment in enumerate(moments):
    folder = home / str(number) / "tiny"
    report[moment] = [in_a_fork(config, folder, moment), in_a_fork(config, folder)]
print(json.dumps(report))
"""


def run_driver(family: str, home: Path, moments: list[str]) -> dict[str, list[int]]:
    """What became of every process: its wait status, 9 when SIGKILL ended it."""
    arguments = [CONFIG.replace("FAMILY", family), str(home), json.dumps(moments)]
    done = subprocess.run(
        [sys.executable, "-P", "-c", DRIVER, *arguments], capture_output=True, text=True, env=one_thread(), timeout=600
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def outcome(run: Path) -> dict[str, bytes]:
    """Every byte that two equal runs must share: all readings, and the last weights, raw and averaged."""
    files = [*run.glob("readings/**/*"), *run.glob("checkpoints/step-000030/**/*.safetensors")]
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(files) if path.is_file()}


@pytest.mark.long
def test_a_run_killed_at_any_moment_ends_at_the_same_bits(tmp_path: Path) -> None:
    """Masks from the collator, a reading that disturbs the RNG, a half-written checkpoint taken up: each breaks it."""
    fates = run_driver("radd", tmp_path, [])
    expected = outcome(tmp_path / "undisturbed" / "tiny")
    assert fates.pop("") == [0]
    assert len(expected) == 4 * 6 + 2, sorted(expected)  # 4 snapshots x 3 probes x raw and ema; two sets of weights
    for number, (moment, fate) in enumerate(fates.items()):
        assert fate == [signal.SIGKILL, 0], f"{moment}: killed, then resumed, ended with {fate}"
        found = outcome(tmp_path / str(number) / "tiny")
        assert found.keys() == expected.keys(), moment
        differ = [name for name in expected if found[name] != expected[name]]
        assert not differ, f"killed {moment}: {differ} differ from the undisturbed run"


@pytest.mark.long
def test_a_killed_causal_run_ends_at_the_same_bits(tmp_path: Path) -> None:
    """The tied unembedding is saved once; a resume that misses it, or warns, is not the same run."""
    moments = ["between two snapshots", "after the weights, before the optimizer"]
    fates = run_driver("gpt2", tmp_path, moments)
    assert fates == {"": [0], **{moment: [signal.SIGKILL, 0] for moment in moments}}
    expected = outcome(tmp_path / "undisturbed" / "tiny")
    assert len(expected) == 4 * 3 + 1, sorted(expected)
    for number in range(len(moments)):
        assert outcome(tmp_path / str(number) / "tiny") == expected


def test_the_command_killed_from_outside_resumes_by_the_same_command(tmp_path: Path) -> None:
    """`revprobe train` in a process of its own, SIGKILL at whatever moment the second snapshot appears."""
    (tmp_path / "tiny.yaml").write_text(CONFIG.replace("FAMILY", "radd"))
    command = [sys.executable, "-P", "-m", "revprobe", "train", "tiny.yaml", "--out", "runs"]
    run = tmp_path / "runs" / "tiny"
    child = subprocess.Popen(command, cwd=tmp_path, env=one_thread(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    while not (run / "readings" / "step-000010").exists():
        assert child.poll() is None, child.communicate()[0].decode()
        assert time.monotonic() < deadline, "no snapshot within two minutes"
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert not open_run(run).finished
    done = subprocess.run(command, cwd=tmp_path, env=one_thread(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    undisturbed = train(tmp_path / "tiny.yaml", tmp_path / "undisturbed" / "tiny")
    assert outcome(run) == outcome(undisturbed.path)


# ---- what a resume refuses ----


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """A run that was stopped after its snapshot at step 0."""
    run = tmp_path / "tiny"

    def stop(step: int, steps: int, loss: float | None) -> None:
        if step > 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config(), run, listener=stop)
    return run


def config(**training: object) -> RunConfig:
    made = parse_config(CONFIG.replace("FAMILY", "radd"), RunConfig, "test")
    return made.model_copy(update={"training": made.training.model_copy(update=training)})


def test_a_resume_with_another_config_shows_the_difference_and_changes_nothing(stopped: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in stopped.rglob("*") if path.name != ".lock"}
    words = r"training.learning_rate: 0.001 -> 0.01, training.seed: 3 -> 4 \(old -> new\); restore the old values"
    with pytest.raises(RevprobeError, match=words):
        train(config(seed=4, learning_rate=0.01), stopped)
    assert {path: path.stat().st_mtime_ns for path in stopped.rglob("*") if path.name != ".lock"} == before


def test_a_run_that_another_process_writes_is_left_alone(stopped: Path) -> None:
    """Two writers would delete each other's half-written checkpoints."""
    with run_lock(stopped), pytest.raises(RevprobeError, match="being written by another process; wait for it"):
        train(config(), stopped)


def test_a_truncated_checkpoint_is_named_and_nothing_is_lost(stopped: Path) -> None:
    """Training on from random weights, as the bare Trainer would for a missing tensor, is the silent alternative."""
    weights = stopped / "checkpoints" / "step-000000" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(RevprobeError, match=r"cannot resume from .*step-000000: .*; delete that checkpoint's folder"):
        train(config(), stopped)
    assert open_run(stopped).steps == [0]
    assert "cannot resume from" in (open_run(stopped).problem or "")
    weights.unlink()
    with pytest.raises(RevprobeError, match=r"cannot resume from .*step-000000: its weights or trainer_state.json"):
        train(config(), stopped)


def test_a_truncated_average_is_named(stopped: Path) -> None:
    weights = stopped / "checkpoints" / "step-000000" / "ema" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(RevprobeError, match=r"averaged weights in .*step-000000/ema: .*; delete the checkpoint's fold"):
        train(config(), stopped)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
@pytest.mark.parametrize("rest", [0, 60])
def test_a_truncated_state_is_named_and_the_fix_works(stopped: Path, name: str, rest: int) -> None:
    """The line names the file; deleting the folder it names lets the same command finish the run."""
    checkpoint = stopped / "checkpoints" / "step-000000"
    (checkpoint / name).write_bytes((checkpoint / name).read_bytes()[:rest])
    words = rf"cannot resume from .*step-000000: .*{name} is damaged .*; delete that checkpoint's folder to resume"
    with pytest.raises(RevprobeError, match=words) as raised:
        train(config(), stopped)
    assert "\n" not in str(raised.value)
    shutil.rmtree(checkpoint)
    assert train(config(), stopped).finished


def test_another_processors_instructions_are_told_as_another_version_is(
    stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They move bits: the run goes on, and says that it may not end at those it would have."""
    assert json.loads((stopped / "versions.json").read_text())["cpu"] == torch.backends.cpu.get_cpu_capability()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    with pytest.warns(UserWarning, match="cpu .* -> another.*its bits may differ"):
        assert train(config(), stopped).finished


@pytest.mark.parametrize("text", ["", '{"torch": "2', "[1]"])
def test_a_damaged_versions_file_is_named(stopped: Path, text: str) -> None:
    (stopped / "versions.json").write_text(text)
    with pytest.raises(RevprobeError, match=r"versions.json is damaged .*; delete it to go on with the software"):
        train(config(), stopped)
    (stopped / "versions.json").unlink()
    assert train(config(), stopped).finished


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, to be copied and damaged."""
    return train(config(), tmp_path_factory.mktemp("finished") / "tiny").path


@pytest.fixture
def damaged(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "tiny"))


def test_a_run_without_its_last_checkpoint_resumes_from_the_one_before(finished: Path, damaged: Path) -> None:
    """It has to keep optimizer, scheduler and RNG: without them training goes on, to other numbers, in silence."""
    shutil.rmtree(damaged / "checkpoints" / "step-000030")
    first: list[int] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(config(), damaged, listener=lambda step, steps, loss: first.append(step))
    assert first[0] == 20
    assert outcome(damaged) == outcome(finished)


def test_a_run_without_a_resumable_checkpoint_says_so_and_starts_anew(finished: Path, damaged: Path) -> None:
    for step in (20, 30):
        shutil.rmtree(damaged / "checkpoints" / f"step-0000{step}")
    first: list[int] = []
    with pytest.warns(UserWarning, match=r"step-000010 has no optimizer.pt and .*: training goes on from step 0"):
        train(config(), damaged, listener=lambda step, steps, loss: first.append(step))
    assert first[0] == 0
    assert outcome(damaged) == outcome(finished)
    with_state = [path.parent.name for path in sorted(damaged.glob("checkpoints/*/optimizer.pt"))]
    assert with_state == ["step-000020", "step-000030"]


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_one_missing_state_file_is_enough_to_go_back_a_checkpoint(finished: Path, damaged: Path, name: str) -> None:
    """transformers skips each of the three on its own."""
    shutil.rmtree(damaged / "checkpoints" / "step-000030")
    (damaged / "checkpoints" / "step-000020" / name).unlink()
    with pytest.warns(UserWarning, match=rf"step-000020 has no {name[:9]}.*: training goes on from step 0"):
        train(config(), damaged)
    assert outcome(damaged) == outcome(finished)


def test_a_trainer_told_to_resume_from_a_slim_checkpoint_refuses(finished: Path, tmp_path: Path) -> None:
    """A folder named by hand is not replaced by another one."""
    model, _ = build_model(config())
    made = ForwardOnlyTrainer(
        model=model,
        args=training_arguments(tmp_path, steps=30, seed=3),
        train_dataset=TokenRows(torch.zeros(4, 4, dtype=torch.long)),
        objective="masked",
    )
    with pytest.raises(RevprobeError, match=r"cannot resume from .*step-000010: it has no optimizer.pt and no sched"):
        made.train(str(finished / "checkpoints" / "step-000010"))
    with pytest.raises(RevprobeError, match=r"nothing to resume in .*; train without resuming"):
        made.train(True)


def test_weights_of_another_model_are_not_resumed_from(stopped: Path) -> None:
    """The Trainer would warn and train on: its missing tensors keep their random values."""
    weights = stopped / "checkpoints" / "step-000000" / "model.safetensors"
    tensors = load_file(weights)
    tensors["blocks.0.stranger.weight"] = tensors.pop("lm_head.weight")
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(
        RevprobeError, match=r"another model's weights: blocks.0.stranger.weight, lm_head.weight do not"
    ):
        train(config(), stopped)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth", "ema/model.safetensors"])
def test_bytes_that_were_not_written_are_not_resumed_from(stopped: Path, name: str) -> None:
    """One bit of a weight reads as another number: without checksums training goes on from it in silence."""
    file = stopped / "checkpoints" / "step-000000" / name
    content = bytearray(file.read_bytes())
    content[-100 if name.endswith("safetensors") else len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(RevprobeError, match=rf"cannot resume from .*step-000000: .*{name} is damaged") as raised:
        train(config(), stopped)
    assert "delete that checkpoint's folder" in str(raised.value)


def test_a_checkpoint_without_checksums_is_resumed_as_it_was(stopped: Path) -> None:
    (stopped / "checkpoints" / "step-000000" / "SHA256SUMS").unlink()
    assert train(config(), stopped).finished


def test_a_folder_that_is_no_run_is_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("five years of work")
    with pytest.raises(RevprobeError, match=r"is not a run and not empty \(it holds 'thesis.tex'\); choose another"):
        train(config(), tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "five years of work"


def test_a_finished_run_is_returned_untouched(stopped: Path) -> None:
    train(config(), stopped)
    before = {path: path.stat().st_mtime_ns for path in stopped.rglob("*") if path.is_file() and path.name != ".lock"}
    assert train(config(), stopped).finished
    assert {
        path: path.stat().st_mtime_ns for path in stopped.rglob("*") if path.is_file() and path.name != ".lock"
    } == before
