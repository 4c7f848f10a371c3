"""Runs over each other: seeds as bands, nothing mixed that must not be, and Table 7 as a heat table."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import revprobe
from revprobe import Reading, Readings, RevprobeError
from revprobe.finetune.config.loading import dump_config
from revprobe.finetune.config.one_layer import ModelConfig, RelationConfig, RunConfig, TrainingConfig
from revprobe.report.html.report import write_report
from revprobe.report.paper.table7 import table7, table7_figure
from revprobe.report.summary.compare import compare
from tiny import made_probabilities


def probability(draw: int, step: int, weights: str) -> Reading:
    about = {"model": "toy", "objective": "masked", "kind": "same_target", "step": step, "weights": weights}
    return made_probabilities(draw, "abcdefghij" * 2, about)


def run(folder: Path, encoding: str, seed: int, steps: tuple[int, ...] = (0, 10)) -> Path:
    """A run folder with readings, as training would leave it."""
    name = f"{encoding}-l10-s{seed}"
    config = RunConfig(
        name=name,
        relation=RelationConfig(length=10),
        model=ModelConfig(position_encoding=encoding),
        training=TrainingConfig(steps=10, seed=seed),
    )
    path = folder / name
    (path / "readings").mkdir(parents=True)
    (path / "config.yaml").write_text(dump_config(config))
    for step in steps:
        made = [probability(100 * seed + step + place, step, which) for place, which in enumerate(("raw", "ema"))]
        Readings(made).save(path / "readings" / f"step-{step:06d}")
    return path


def parts(figure: Any, part: str, axis: str = "y4") -> dict[str, list[float]]:
    return {one.name: list(one.y) for one in figure.data if one.meta["part"] == part and one.yaxis == axis}


def value(path: Path, step: int, weights: str) -> float:
    return revprobe.open_run(path).readings().select(step=step, weights=weights)[0].value


def test_seeds_are_bands_and_encodings_lines(tmp_path: Path) -> None:
    """The line is the mean over seeds and the band their range; a step that one seed lacks is left out and named."""
    rope = [run(tmp_path, "rope", 0), run(tmp_path, "rope", 1, (0,)), run(tmp_path, "rope", 2)]
    alibi = run(tmp_path, "alibi", 0)
    figure = compare([*rope, alibi])
    lines, bands = parts(figure, "value"), parts(figure, "band")
    label = "rope-l10 (3 seeds) (EMA, same target)"
    values = [value(path, 0, "ema") for path in rope]
    assert lines[label] == pytest.approx([np.mean(values)])
    assert bands[label][:2] == pytest.approx([min(values), max(values)])
    assert lines["alibi-l10-s0 (EMA, same target)"] == pytest.approx([value(alibi, step, "ema") for step in (0, 10)])
    assert "rope-l10 (3 seeds): step 10 left out, which not all 3 seeds have reached" in figure.layout.title.text
    raw = parts(compare([*rope, alibi], bands="facts", weights="raw"), "value")
    assert sorted(raw) == sorted(f"{path.name} (raw, same target)" for path in [*rope, alibi])
    assert raw["rope-l10-s2 (raw, same target)"] == pytest.approx([value(rope[2], step, "raw") for step in (0, 10)])
    dark = compare([alibi], theme="dark")
    assert dark.layout.template.layout.paper_bgcolor == "#16191D"


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    one = run(tmp_path, "rope", 0)
    with pytest.raises(RevprobeError, match="asked for twice"):
        compare([one, str(one)])
    with pytest.raises(RevprobeError, match="bands='seed'; the closest is 'seeds'"):
        compare([one], bands="seed")
    with pytest.raises(RevprobeError, match="no run at"):
        compare([tmp_path / "nothing"])
    with pytest.raises(RevprobeError, match="none of 0 runs has a reading"):
        compare([])


def test_table_7_as_a_heat_table_shades_the_means_and_writes_the_cells() -> None:
    """Colour is the mean over seeds in per cent, the words are those of the table; a cell that was not run has none."""
    rows = []
    for model, seed, forward in (("llada", 0, 0.9), ("llada", 1, 0.7), ("gpt2", 0, 1.0)):
        for asked, number in (("forward", forward), ("reverse", forward / 2)):
            about = {"run": f"{model}-{seed}", "objective": "masked", "model": model, "dataset": "<b>pc</b>"}
            about |= {"direction": "P2C", "seed": seed, "asked": asked, "split": "train", "templates": "seen"}
            rows.append(about | {"value": number, "low": 0.0, "high": 1.0, "n": 10, "facts": 5, "control": 0.0})
    rows.append(rows[-1] | {"dataset": "pd", "model": "llada", "value": 0.25, "asked": "forward"})
    matches = pd.DataFrame(rows)
    cells = table7_figure(matches).data[0]
    words = table7(matches)
    assert list(cells.x) == list(words.columns[1:]) == ["llada Fwd.", "llada Rev.", "gpt2 Fwd.", "gpt2 Rev."]
    assert cells.z[0] == pytest.approx((80.0, 40.0, 100.0, 50.0))
    assert cells.z[1][0] == pytest.approx(25.0) and cells.z[1][2] is None, "a model that was not run has no shade"
    assert words["llada Fwd."][0].endswith("(2 seeds, n = 20, 5 facts)"), "seeds, questions and facts beside it"
    assert cells.text[0][0].replace("<br>", " ") == words["llada Fwd."][0] and cells.text[0][0].count("<br>") == 2
    assert cells.y[0] == "&lt;b&gt;pc&lt;/b&gt; (P2C)"
    with pytest.raises(RevprobeError, match="split 'trian'; the closest is 'train'"):
        table7_figure(matches, "trian")


def test_a_damaged_reading_is_left_out_of_the_report_and_named(tmp_path: Path) -> None:
    """The sound checkpoints stay to be looked at; the file that was cut off is the run's problem."""
    path = run(tmp_path, "rope", 0, (0, 10, 20))
    cut = path / "readings" / "step-000010" / "reverse_probability.ema.parquet"
    cut.write_bytes(cut.read_bytes()[:1000])
    reported = revprobe.open_run(path).record()
    assert len(reported.readings) == 5 and reported.readings.select(weights="ema").steps == [0, 20]
    assert reported.problem is not None
    assert "1 of 6 files of readings are left out" in reported.problem and cut.name in reported.problem
    page = write_report([reported], tmp_path / "report.html").read_text()
    assert "1 of 6 files of readings are left out" in page
