"""Runs on a Ray cluster: the bytes of one machine, no listener beyond it, and an end that leaves nothing behind.

One cluster of two nodes on the loopback interface serves most of the tests; they go one after the other in this file.
"""

import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest

import revprobe as rp
from revprobe.engines import ray as engine
from revprobe.engines import ray_cluster
from revprobe.engines.known import launcher
from revprobe.engines.launcher import Display, Work
from revprobe.engines.ray_workers import RayTeam
from revprobe.finetune.config.loading import parse_config
from revprobe.finetune.config.one_layer import SweepConfig
from revprobe.finetune.runs.sweeps import work_of
from revprobe.finetune.training.run_lock import run_lock
from tiny import gpt2

# As `connected` sets them for a cluster of its own; Ray reads them when it is imported.
SETTINGS = ray_cluster.LOOPBACK | ray_cluster.QUIET
os.environ.update(SETTINGS | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)})
ray = pytest.importorskip("ray", reason="Ray cannot be imported here; `pip install '.[ray]'` brings it")

SWEEP = """
name: grid
base:
  relation: {length: 4, alphabet: 8}
  model: {d_model: 16, dropout: 0.1}
  training: {steps: 12, batch_size: 16, warmup_steps: 2, ema_decay: 0.8, device: cpu}
  snapshots: {every: 6}
cells: [{position_encoding: alibi}, {objective: causal}]
"""
FAST = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 2}
FAST |= {"memory_monitor_refresh_ms": 0}  # what others take of this machine is not the tests' business
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
LOOPBACK_ADDRESSES = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one CPU each, which find out within two seconds that one is dead."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args=NODE | {"_system_config": FAST, "include_dashboard": False})
    made.add_node(**NODE)
    yield made
    ray.shutdown()
    made.shutdown()


def sweep_config(text: str = SWEEP) -> SweepConfig:
    return parse_config(text, SweepConfig, "test")


def silent(said: list[str] | None = None) -> Display:
    return Display(lambda work: lambda step, steps, loss: None, [].append if said is None else said.append)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run by its path, but for what says which machine and moment wrote it."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files if path.name != ".lock"}


@contextmanager
def a_node_dies(cluster: Any, when: Callable[[], bool]) -> Iterator[list[bool]]:
    """Kill one of its nodes as soon as that is so, and start another at the end; the list says whether it was."""
    killed: list[bool] = []
    over = threading.Event()

    def wait() -> None:
        while not over.wait(0.02):
            if when():
                cluster.remove_node(cluster.worker_nodes.copy().pop(), allow_graceful=False)
                killed.append(True)
                return

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()
        if killed:
            cluster.add_node(**NODE)


def test_a_sweep_whose_node_dies_has_the_bytes_of_one_here(
    cluster: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """All files of all runs, one taken up on another node; and the console has the runs' lines, without one of Ray's.

    The node dies when its run has a checkpoint; the process of the run is then alone, and ends by itself.
    """
    config = sweep_config(SWEEP.replace("steps: 12", "steps: 600").replace("every: 6", "every: 200"))
    names = [run.name for run in config.runs()]
    here = rp.run_sweep(config, out=tmp_path / "local", jobs=2)
    capfd.readouterr()
    have = lambda: all((tmp_path / "ray" / "grid" / name / "checkpoints/step-000200").is_dir() for name in names)  # noqa: E731
    with a_node_dies(cluster, have) as killed:
        there = rp.run_sweep(config, out=tmp_path / "ray", on="ray", address=cluster.address)
    out, err = capfd.readouterr()
    assert killed and out.count("its node or worker was lost; it is taken up from its last checkpoint") == 1, out
    for name in names:
        one, other = contents(here.path / name), contents(there.path / name)
        assert set(one) == set(other)
        changed = [path for path, held in one.items() if other[path] != held]
        assert not changed, f"{name}: {changed} depend on who ran it"
        assert f"{name}: started on " in out and f"{name}: finished in " in out and f"{name}: step 600/600" in out
    assert err == "" and "ray::" not in out and "raylet" not in out, err
    assert (here.path / "summary.csv").read_bytes() == (there.path / "summary.csv").read_bytes()
    assert not ray.is_initialized(), "it stayed connected"


def test_what_interrupts_a_sweep_ends_its_tasks_first(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a cluster that goes on, a task that nobody told to stop would train to its end, unheard."""
    text = SWEEP.replace("steps: 12", "steps: 100000").replace("every: 6", "every: 50000")
    interrupted: list[float] = []

    def stop(step: int, steps: int, loss: float | None) -> None:
        interrupted.append(time.monotonic())
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "GRACE_SECONDS", 60.0)  # so long it would wait for one that was not told
    works = [work_of(run) for run in sweep_config(text).runs()]
    with pytest.raises(KeyboardInterrupt):
        launcher("ray", address=cluster.address).run_all(works, tmp_path, Display(lambda work: stop, [].append))
    assert time.monotonic() - interrupted[0] < 60, "the tasks were not told to end"
    begun = [file.parent for file in tmp_path.glob("*/config.yaml")]
    assert begun
    for run in begun:
        with run_lock(run):  # raises while a child still holds the folder
            pass


# ---- probing ----


def assert_same(found: rp.Readings, alone: rp.Readings) -> None:
    """Every number, and what is said of it."""
    assert [one.name for one in found] == [one.name for one in alone] and len(found) == 3
    for one, other in zip(found, alone, strict=True):
        assert (one.n, one.undefined, one.meta) == (other.n, other.undefined, other.meta)
        np.testing.assert_allclose((one.value, *one.interval), (other.value, *other.interval), rtol=0, atol=1e-6)
        pd.testing.assert_frame_equal(one.frame, other.frame, rtol=0, atol=1e-6)


def test_a_probe_goes_on_when_a_node_dies(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers on two nodes load a model by its folder; one node is killed when the first part has been told."""
    gpt2().module.save_pretrained(tmp_path / "model")
    model = rp.load_model(tmp_path / "model")
    pairs = rp.letter_pairs(6, model=model)
    alone = rp.probe(model, pairs)
    heard: list[tuple[int, int]] = []

    def kill_one(done: int, total: int) -> None:
        if not heard:
            cluster.remove_node(cluster.worker_nodes.copy().pop(), allow_graceful=False)
        heard.append((done, total))

    start = RayTeam.start

    def start_both(team: RayTeam) -> None:
        """Else one may have begun while the other still loads, and a node is lost that had no part yet."""
        start(team)
        ray.wait(list(team.busy), num_returns=2, fetch_local=False)

    monkeypatch.setattr(RayTeam, "start", start_both)
    workers = rp.ray_workers(2, address=cluster.address)
    try:
        with pytest.warns(
            UserWarning, match=r"a worker on .* was lost \(.*\); part \d of \d+ is done again on another"
        ):
            found = rp.probe(tmp_path / "model", pairs, workers=workers, progress=kill_one)
    finally:
        cluster.add_node(**NODE)
    assert_same(found, alone)
    assert len(heard) > 2 and heard[-1][0] == heard[-1][1], "the probe was over before the node was killed"
    assert not ray.is_initialized(), "it stayed connected"


def test_a_part_that_takes_its_worker_with_it_is_not_asked_for_ever(cluster: Any) -> None:
    """What fills a node's memory fills the next one's; and more workers than there is room for are refused."""
    workers = rp.ray_workers(1, address=cluster.address)
    with workers.holding(lambda: {"held": 7}) as team:
        assert team.ask(lambda held, part: held["held"] + part, 3) == [7, 8, 9]
        with pytest.raises(ValueError, match="a question's own error"):
            team.ask(lambda held, part: int("a question's own error"), 1)
        with (
            pytest.warns(UserWarning, match="part 1 of 1 is done again on another"),
            pytest.raises(rp.RevprobeError, match=r"part 1 of 1 was lost with its worker 3 times, last on .*memory"),
        ):
            team.ask(lambda held, part: os.kill(os.getpid(), signal.SIGKILL), 1)
    with (
        pytest.raises(rp.RevprobeError, match="99 workers of 1 CPU each: the cluster has room for 2; ask for fewer"),
        rp.ray_workers(99, address=cluster.address).holding(dict),
    ):
        pass


# ---- before anything is begun ----


def test_nodes_that_are_not_alike_are_named_before_the_first_task(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another torch moves bits, and a folder that a node does not see is another folder."""
    with ray_cluster.connected(cluster.address) as connected:
        alive = [node for node in connected.nodes() if node["Alive"]]
        assert len(alive) == 2
        with pytest.raises(rp.RevprobeError, match=r"\([0-9a-f]{8}\) does not see '.*nowhere'") as lacking:
            ray_cluster.require_like_nodes(connected, [tmp_path, tmp_path / "nowhere"])
        assert str(lacking.value).count("does not see") == 2, "one folder that each node lacks"
        mine = ray_cluster.own_versions()
        monkeypatch.setattr(ray_cluster, "own_versions", lambda: mine | {"torch": "9.9"})
        with pytest.raises(rp.RevprobeError, match=re.escape(f"has torch {mine['torch']}")) as unlike:
            ray_cluster.require_like_nodes(connected, [tmp_path])
        assert all(ray_cluster.node_name(node) in str(unlike.value) for node in alive)
        assert "expected revprobe" in str(unlike.value) and "torch 9.9" in str(unlike.value)


def test_a_run_that_no_node_has_room_for_is_named(cluster: Any, tmp_path: Path) -> None:
    """A task that Ray cannot place would wait for ever."""
    config = sweep_config(SWEEP.replace("device: cpu", "device: cuda"))
    with pytest.raises(rp.RevprobeError, match="asks for device cuda, and no node of the cluster has a GPU"):
        rp.run_sweep(config, out=tmp_path, on="ray", address=cluster.address)
    assert not list((tmp_path / "grid").glob("*/config.yaml"))


@pytest.mark.parametrize(
    ("device", "threads", "expected"),
    [
        ("cpu", 1, {"num_cpus": 1, "num_gpus": 0}),
        ("cpu", 3, {"num_cpus": 3, "num_gpus": 0}),
        ("cpu", 64, {"num_cpus": 8, "num_gpus": 0}),  # threads can share a CPU; a task that fits nowhere cannot run
        ("cuda", 1, {"num_cpus": 1, "num_gpus": 1}),
        ("auto", 1, {"num_cpus": 1, "num_gpus": 1}),
    ],
)
def test_what_a_task_asks_for(device: Any, threads: int, expected: dict[str, float]) -> None:
    nodes = [
        {"Alive": True, "Resources": {"CPU": 8.0}},
        {"Alive": True, "Resources": {"CPU": 4.0, "GPU": 2.0}},
        {"Alive": False, "Resources": {"CPU": 99.0}},
    ]
    assert engine.needs_of(Work("a", "train", "", threads, device, 1), nodes) == expected
    without = engine.needs_of(Work("a", "train", "", threads, "auto", 1), nodes[:1])
    assert without["num_gpus"] == 0, "nothing is asked for that is not there"


def test_wrong_addresses_end_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(rp.RevprobeError, match="Ray's client protocol does not carry progress"):
        launcher("ray", address="ray://head:10001").run_all([work_of(sweep_config().runs()[0])], tmp_path, silent())
    with pytest.raises(rp.RevprobeError, match=r"no Ray cluster to be used at '127\.0\.0\.1:1'.*`ray start --head`"):
        launcher("ray", address="127.0.0.1:1").run_all([work_of(sweep_config().runs()[0])], tmp_path, silent())
    with pytest.raises(rp.RevprobeError, match="no Ray cluster to be used at 'head:x'"):
        launcher("ray", address="head:x").run_all([work_of(sweep_config().runs()[0])], tmp_path, silent())


def test_a_cluster_that_would_listen_to_others_is_not_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where Ray was imported before, it is too late to say where to listen."""
    monkeypatch.setattr("ray._private.ray_constants.ENABLE_RAY_CLUSTER", True)
    with pytest.raises(rp.RevprobeError, match="would listen to other machines; set it before Ray is imported"):
        launcher("ray").run_all([work_of(sweep_config().runs()[0])], tmp_path, silent())
    assert not ray.is_initialized()


def test_without_ray_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(rp.RevprobeError, match=r"Ray cannot be imported .*pip install '\.\[ray\]'"):
        launcher("ray").run_all([work_of(sweep_config().runs()[0])], tmp_path, silent())


# ---- a cluster of one's own ----


def listeners(processes: list[psutil.Process]) -> set[str]:
    """The addresses, as /proc/net writes them, that the processes listen on."""
    inodes = set()
    for process in processes:
        try:
            links = [os.readlink(entry) for entry in Path(f"/proc/{process.pid}/fd").iterdir()]
        except OSError:
            continue  # it has just ended
        inodes |= {link[len("socket:[") : -1] for link in links if link.startswith("socket:[")}
    rows = [line.split() for kind in ("tcp", "tcp6") for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]]
    return {row[1].rpartition(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes}


def test_a_cluster_started_here_listens_on_loopback_alone_and_ctrl_c_ends_it(tmp_path: Path) -> None:
    """As a user starts it: no other machine can reach it, and neither a run nor a part of Ray goes on without it."""
    text = SWEEP.replace("steps: 12", "steps: 100000").replace("every: 6", "every: 50000")
    (tmp_path / "grid.yaml").write_text(text.replace(", {objective: causal}", ""))  # one run: others are ended above
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "revprobe", "sweep", "grid.yaml", "--on", "ray"],
        cwd=tmp_path,
        env=clean | {"OMP_NUM_THREADS": "1", "HOME": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("runs/grid/*/checkpoints/step-000000")):
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline, "no run started within five minutes"
        time.sleep(0.1)
    processes = psutil.Process(child.pid).children(recursive=True)
    trainings = [process for process in processes if "train" in process.cmdline()]
    heard = listeners([psutil.Process(child.pid), *processes])
    # To the whole group, as a terminal does.
    os.killpg(child.pid, signal.SIGINT)
    out, err = child.communicate(timeout=120)
    assert trainings and not [one for one in trainings if one.is_running()], "a run went on when the sweep had ended"
    assert len(heard) > 0 and heard <= LOOPBACK_ADDRESSES, f"others can reach {heard - LOOPBACK_ADDRESSES}"
    assert child.returncode == 130, (out, err)
    assert out.endswith("run the same command again to go on\n") and err == "", (out, err)
    for run in tmp_path.glob("runs/grid/*/config.yaml"):
        with run_lock(run.parent):  # raises while a child still holds the folder
            pass
    gone, left = psutil.wait_procs(processes, timeout=20)
    assert not left and len(gone) > 5, left
    assert not (tmp_path / ".ray").exists(), "Ray has kept a token in the home folder"
