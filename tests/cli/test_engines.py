"""`--on` and `--address` reach the sweep, from each command that has one."""

from collections.abc import Callable
from typing import Any

import pytest

from revprobe.errors import RevprobeError

Cli = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    "command", [["sweep", "one-layer-quick"], ["finetune", "finetune-tiny"], ["reproduce", "one-layer"]]
)
def test_each_sweeping_command_passes_its_engine_on(
    command: list[str], cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a machine with a GPU, where `reproduce` would train its runs together in this process."""
    asked: list[dict[str, Any]] = []

    def recorded(config: Any, **options: Any) -> None:
        asked.append(options)
        raise RevprobeError("recorded")

    monkeypatch.setattr("revprobe.report.run_sweep.run_sweep", recorded)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert cli(*command, "--on", "ray", "--address", "head:6379", "--jobs", "3") == (1, "", "error: recorded\n")
    assert {name: asked[0].get(name) for name in ("on", "address", "jobs")} == {
        "on": "ray",
        "address": "head:6379",
        "jobs": 3,
    }
    assert not asked[0].get("batched")
    cli(*command)
    assert asked[1]["on"] == "local" and asked[1]["address"] is None and asked[1]["jobs"] is None


def test_one_fine_tuning_has_no_engine(cli: Cli) -> None:
    code, _, err = cli("finetune", "llada-8b-parent-child", "--on", "ray")
    assert code == 1 and "is one run, which is done here" in err, err
    assert err.count("\n") == 1
