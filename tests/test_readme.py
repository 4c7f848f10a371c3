"""One number: README's snippet, its command line, the report and a run's own readings say the same of a checkpoint.

README's own text is run as it stands, where a run of two steps stands for the demo's: the table in it was made by the
report of such a run.
"""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import revprobe as rp
from revprobe.cli.main import main
from revprobe.finetune.config.one_layer import RunConfig
from revprobe.probes.figures.theme import interval_text
from revprobe.probes.fused import PROBES
from revprobe.report.html.report import write_report
from revprobe.report.summary.tables import MEASURES

RUN = Path("runs/one-layer-quick/rope-l10-s0")
NUMBERS = ["value", "n", "low", "high", "control"]
SINGLE = {
    "attention_correlation": rp.probe_attention_correlation,
    "gradient_cosine": rp.probe_gradient_cosine,
    "reverse_probability": rp.probe_reverse_probability,
}


@pytest.fixture(scope="module")
def readme(root: Path) -> str:
    return (root / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def ran(readme: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run where README's is, of its length and letters, and what README's first snippet and command leave behind."""
    home = tmp_path_factory.mktemp("home")
    training = {"steps": 2, "batch_size": 8, "warmup_steps": 1, "threads": 1, "device": "cpu", "ema_decay": 0.5}
    config = {"name": RUN.name, "relation": {"length": 10}, "model": {"d_model": 8}, "training": training}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        rp.train(RunConfig(**config, snapshots={"steps": [1]}), RUN)
        write_report([rp.open_run(RUN).record()], RUN / "report.html")
        names: dict[str, Any] = {}
        exec(compile(snippet(readme), "README.md", "exec"), names)
        patch.setattr(sys, "argv", [*shlex.split(command(readme)), "--out", "taken"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        names |= {
            "taken": rp.Readings.load("taken"),
            "summary": pd.read_csv(RUN / "summary.csv"),
            "run": rp.open_run(RUN),
        }
        names["stored"] = names["run"].readings()
        names["by_hand"] = rp.probe(names["model"], rp.letter_pairs(length=10, model=names["model"]))
    return names


def snippet(readme: str) -> str:
    """README's first block of Python."""
    return re.findall(r"^```python\n(.*?)^```$", readme, re.M | re.S)[0]


def command(readme: str) -> str:
    """README's call of `revprobe probe`, without its comment."""
    (line,) = re.findall(r"^revprobe probe .*$", readme, re.M)
    return line.split("#")[0].strip()


def numbers(measures: pd.DataFrame) -> pd.DataFrame:
    return measures.set_index("measure")[NUMBERS].loc[list(MEASURES)]


def test_readme_snippet_command_report_and_run_give_one_number(ran: dict[str, Any]) -> None:
    """To the last bit, with the same n: a probe that read other pairs than the run would show in both."""
    report = ran["summary"].query("step == 2 and weights == 'ema'")
    expected = numbers(report)
    assert expected["n"].to_dict() == {
        "forward_accuracy": 1170,
        "reverse_accuracy": 1170,
        "forward_probability": 1170,
        "reverse_probability": 1170,
        "attention_correlation": 2106,
        "gradient_cosine": 234,
    }
    stored = ran["stored"].select(step=2, weights="ema")
    for source in (stored, ran["readings"], ran["by_hand"], ran["taken"]):
        found = numbers(source.measures())
        pd.testing.assert_frame_equal(found, expected, check_dtype=False, rtol=1e-12)
        for (_, one), (_, other) in zip(found.iterrows(), expected.iterrows(), strict=True):
            shown = [interval_text(row.value, row.low, row.high, row.control) for row in (one, other)]
            assert shown[0] == shown[1]
    for name in PROBES.values():
        frames = [source[name].frame for source in (stored, ran["readings"], ran["by_hand"], ran["taken"])]
        assert all(frame.equals(frames[0]) for frame in frames), name


@pytest.mark.parametrize("name", PROBES.values())
def test_a_single_probe_reads_the_same_pairs(ran: dict[str, Any], name: str) -> None:
    reading = SINGLE[name](ran["model"], ran["pairs"])
    stored = ran["stored"].select(name=name, step=2, weights="ema")[0]
    assert reading.meta["pairs"] == stored.meta["pairs"] and reading.n == stored.n
    assert reading.value == pytest.approx(stored.value, abs=1e-12)


def test_readme_and_guide_use_the_runs_own_pairs(root: Path, readme: str) -> None:
    """The calls that the test above runs, in README and in what repeats it."""
    call = f'rp.open_run("{RUN}").pairs()'
    assert call in snippet(readme) and command(readme).endswith(f"{RUN} --pairs letters:10")
    assert call in (root / "__init__.py").read_text(encoding="utf-8")
    quick = (root / "docs" / "quick-start.md").read_text(encoding="utf-8")
    assert f'run = rp.open_run("{RUN}")\npairs = run.pairs()' in quick
    assert "run.pairs()" in (root / "examples" / "01_one_layer.ipynb").read_text(encoding="utf-8")
