"""Alerts: told when a checkpoint crosses them, with interval and threshold, once, and again at the end."""

import io
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import revprobe as rp
from revprobe import Readings, RevprobeError
from revprobe.finetune.config.alerts import ADAPTER, MEASURES, Alert
from revprobe.finetune.config.finetuning import FinetuneConfig
from revprobe.finetune.config.loading import dump_config, parse_config
from revprobe.finetune.config.one_layer import RunConfig, SweepConfig
from revprobe.finetune.runs.alerts import ALERTS, CROSSED, UNDEFINED, AlertWarning, Watch, history, judge
from revprobe.finetune.runs.record import RunRecord
from revprobe.report.html.report import write_report
from revprobe.report.summary.alerts import alert_lines, alerts_table
from tiny import made_probabilities, module_at

made = module_at(Path(__file__).parents[2] / "report" / "html" / "report_runs.py")
TRAINING = {"steps": 10, "batch_size": 8, "warmup_steps": 0, "device": "cpu"}
ABOUT: dict[str, Any] = {"model": {"d_model": 8}, "relation": {"length": 4, "alphabet": 9}, "snapshots": {"every": 5}}
ALWAYS = {"measure": "forward_accuracy", "below": 1.5}


def config(**more: Any) -> RunConfig:
    return RunConfig(name="one", training=TRAINING, **ABOUT, **more)


def readings(*values: float, weights: str = "raw") -> Readings:
    """Reverse probabilities of ten facts, one value a checkpoint, every tenth step; NaN is undefined."""
    found = []
    for place, value in enumerate(values):
        about = {"kind": "same_target", "objective": "masked", "step": 10 * place, "weights": weights}
        reading = made_probabilities(place, list("abcdefghij"), about)
        reverse = reading.frame["direction"] == "reverse"
        reading.frame.loc[reverse, "probability"] = value
        reading.frame.loc[reverse & (reading.frame["pair"] % 2 == 0), "probability"] = value * 0.9
        reading.frame.loc[reverse, "reason"] = "evidence hidden" if math.isnan(value) else ""
        found.append(rp.Reading(reading.name, reading.frame, reading.meta))
    return Readings(found)


def written(folder: Path, found: Readings) -> None:
    for step in found.steps:
        found.select(step=step).save(folder / "readings" / f"step-{step:06d}")


RULE = Alert(measure="reverse_probability", below=0.5, after=10)


@pytest.mark.parametrize(
    ("alert", "words"),
    [
        ({"measure": "forward_acuracy", "below": 0.9}, r"closest is 'forward_accuracy' \(of attention_correlation, "),
        ({"measure": "loss", "below": 0.9}, "alerts has the measure 'loss'; expected one of attention_correlation, "),
        ({"measure": ADAPTER, "below": 0.9}, f"alerts has the measure '{ADAPTER}'"),
        ({"measure": "forward_accuracy"}, "neither for forward_accuracy; give one of below and above"),
        ({"measure": "forward_accuracy", "below": 0.1, "above": 0.9}, "below: 0.1 and above: 0.9 for forward_accuracy"),
        ({"measure": "forward_accuracy", "below": "low"}, r"alerts\[0\].below is 'low'; expected"),
        ({"measure": "forward_accuracy", "under": 0.1}, r"unknown key 'alerts\[0\].under'"),
        ({"measure": "forward_accuracy", "below": 0.1, "after": -1}, r"alerts\[0\].after is -1; expected"),
        ({"measure": "forward_accuracy", "below": 0.1, "after": 11}, "after: 11, but training.steps is 10"),
    ],
)
def test_a_wrong_rule_is_told_in_one_line(alert: dict[str, Any], words: str) -> None:
    import yaml

    text = yaml.safe_dump(config().model_dump(mode="json") | {"alerts": [alert]})
    with pytest.raises(RevprobeError, match=words) as told:
        parse_config(text, RunConfig, "a.yaml")
    assert "\n" not in str(told.value)


def test_rules_are_kept_and_their_absence_is_not_written() -> None:
    """A config.yaml from before there were alerts stays the config that it is; a sweep hands its own on."""
    assert "alerts" not in dump_config(config())
    ruled = config(alerts=[ALWAYS])
    assert parse_config(dump_config(ruled), RunConfig, "x") == ruled
    base = {"training": TRAINING, **ABOUT, "alerts": [ALWAYS]}
    sweep = SweepConfig(name="s", base=base, cells=[{"seed": [0, 1]}])  # type: ignore[arg-type]
    assert [run.alerts for run in sweep.runs()] == [(Alert(**ALWAYS),)] * 2  # type: ignore[arg-type]


@pytest.mark.parametrize(("parameters", "there"), [("both", True), ("lora", True), ("all", False)])
def test_a_fine_tuning_has_the_adapters_cosine_where_it_takes_it(parameters: str, there: bool) -> None:
    values = {"name": "f", "model": {"name": "gpt2"}, "relation": {"name": "parent_child", "direction": "P2C"}}
    values |= {"training": {"steps": 10}, "snapshots": {"every": 5, "parameters": parameters}}
    values["alerts"] = [{"measure": ADAPTER, "above": 0.9}]
    if there:
        assert FinetuneConfig.model_validate(values).alerts[0].measure == ADAPTER
    else:
        with pytest.raises(ValueError, match=f"alerts has the measure '{ADAPTER}'"):
            FinetuneConfig.model_validate(values)


def test_the_measures_are_those_of_the_readings() -> None:
    assert set(MEASURES) == set(made.readings(0).measures()["measure"])


def test_a_crossing_says_value_interval_threshold_and_step() -> None:
    found = readings(0.1, 0.9, 0.3)
    (one,) = judge([RULE], found.select(step=20))
    row = found.select(step=20).measures().set_index("measure").loc["reverse_probability"]
    assert (one.state, one.row["low"], one.row["high"]) == (CROSSED, row["low"], row["high"])
    interval = f"[{row['low']:.2f}, {row['high']:.2f}]"
    assert one.text.startswith(f"reverse probability {row['value']:.2f} {interval} (control "), one.text
    assert "of 10 facts at step 20 (raw weights) crosses the alert 'reverse probability below 0.5 from step 10 on'" in (
        one.text
    )
    assert not one.text.endswith("the interval holds the threshold")
    near = Alert(measure="reverse_probability", below=float(row["high"]) - 1e-6)
    assert judge([near], found.select(step=20))[0].text.endswith("; the interval holds the threshold")
    above = Alert(measure="reverse_probability", above=0.2)
    assert [one.state for one in judge([above, RULE], found.select(step=20))] == [CROSSED, CROSSED]
    assert judge([RULE], found.select(step=0)) == [], "before its first step a rule is not asked"
    assert judge([RULE], found.select(step=10))[0].state is None


def test_the_averaged_weights_speak_where_there_are_some() -> None:
    both = Readings([*readings(0.1, 0.1), *readings(0.9, 0.9, weights="ema")])
    (one,) = judge([RULE], both.select(step=10))
    assert (one.state, one.row["weights"]) == (None, "ema")


def test_an_undefined_reading_is_told_and_passes_no_rule() -> None:
    for rule in (RULE, Alert(measure="reverse_probability", above=0.5)):
        (one,) = judge([rule], readings(0.9, math.nan).select(step=10))
        assert one.state == UNDEFINED
        assert "undefined (10 evidence hidden) at step 10 (raw weights) cannot be held against the alert" in one.text


def test_each_crossing_is_told_once_also_by_a_resumed_run(tmp_path: Path) -> None:
    """Not at every checkpoint that stays across; again where it had come back; and nothing that was told before."""
    every, said = readings(0.1, 0.3, 0.2, 0.9, 0.3, math.nan), list[str]()
    watch = Watch(tmp_path / "r", [RULE], said.append)
    steps = []
    for step in every.steps:
        written(tmp_path / "r", every.select(step=step))
        before = len(said)
        watch.look()
        watch.look()
        steps += [step] * (len(said) - before)
        lines = (tmp_path / "r" / ALERTS).read_text().splitlines()
        held = [one.text for one in watch.last if one.state]
        assert [line.partition(" (since step ")[0] for line in lines] == held, "what stands at the last checkpoint"
        assert bool(lines) == (step in (10, 20, 40, 50)), "empty where every rule holds"
    assert steps == [10, 40, 50], said
    watch.end()
    assert said[-1].startswith("r: ended with 1 of 1 alerts: reverse probability undefined") and len(said) == 4
    again: list[str] = []
    resumed = Watch(tmp_path / "r", [RULE], again.append)
    resumed.look()
    resumed.end()
    assert again == [], "nothing is new"
    later = readings(0.1, 0.3, 0.2, 0.9, 0.3, math.nan, math.nan, 0.2)
    written(tmp_path / "r", later.select(step=60))
    resumed.look()
    assert again == [], "it was undefined before the stop"
    written(tmp_path / "r", later.select(step=70))
    resumed.look()
    assert len(again) == 1 and "at step 70" in again[0]


def test_training_warns_at_the_checkpoint_and_at_the_end(tmp_path: Path) -> None:
    """Steps 5 and 10 come out alike, so one is told; a finished run that is asked for again tells nothing."""
    ruled = config(alerts=[ALWAYS | {"after": 5}, {"measure": "gradient_cosine", "above": 1.5}])
    with pytest.warns(AlertWarning) as told:
        run = rp.train(ruled, tmp_path / "one", listener=False)
    texts = [str(one.message) for one in told if issubclass(one.category, AlertWarning)]
    assert len(texts) == 2 and "at step 5 (ema weights) crosses" in texts[0], texts
    assert texts[1].startswith("one: ended with 1 of 2 alerts: ") and "at step 10" in texts[1]
    assert texts[1].endswith("(since step 5)")
    with warnings.catch_warnings():
        warnings.simplefilter("error", AlertWarning)
        rp.train(ruled, tmp_path / "one", listener=False)
    assert "1 of 2 alerts crossed" in repr(run)
    assert "alerts" not in repr(rp.train(config(), tmp_path / "two", listener=False))
    (line,) = alert_lines([run.record()])
    assert line.startswith("alert: one: forward accuracy ")


def test_the_report_lists_every_rule_and_marks_what_is_crossed(tmp_path: Path) -> None:
    evil = "<script>x</script>"
    rules = [RULE, Alert(measure="forward_accuracy", below=0.0), Alert(measure="gradient_cosine", below=0.5)]
    found = {"alerts": [one.model_dump() for one in rules]}
    record = RunRecord(evil, {}, found, readings(0.1, 0.3, 0.2), None)
    table = alerts_table([record, RunRecord("none", {}, {}, readings(0.1), None)])
    assert table["state"].tolist() == [CROSSED, "holds", "not asked yet"]
    assert table["since step"].tolist() == ["10", "0", "-"], "0.3 at step 10 was the first"
    page = write_report([record], tmp_path / "report.html").read_text()
    part = page[page.index('id="section-alerts"') : page.index("</section>", page.index('id="section-alerts"'))]
    assert "1 of 3 alerts are crossed" in part and part.count('class="problem"') == 1 and "<script>x" not in part
    assert history(rules, Readings([])) == []
    without = write_report([RunRecord("a", {}, {}, readings(0.1))], tmp_path / "b.html")
    assert "section-alerts" not in without.read_text()


@pytest.mark.parametrize("batched", [False, True])
def test_a_sweep_is_told_of_its_runs_alerts(tmp_path: Path, batched: bool) -> None:
    """Each run is a process of its own, or a part of one batch; the sweep's terminal tells, once each, and at ends."""
    base = {"training": TRAINING, **ABOUT, "alerts": [ALWAYS]}
    sweep = SweepConfig(name="s", base=base, cells=[{"position_encoding": ["rope"], "seed": [0]}])  # type: ignore
    console = Console(file=io.StringIO(), width=400)
    rp.run_sweep(sweep, out=tmp_path, console=console, batched=batched)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert printed.count("rope-l4-s0: forward accuracy") == 1 and "crosses the alert" in printed, printed
    assert printed.count("rope-l4-s0: ended with 1 of 1 alerts") == 1, printed


def test_a_fine_tuning_tells_its_alerts_too(tmp_path: Path) -> None:
    tiny = {"layout": "dream", "d_model": 16, "n_layers": 2, "n_heads": 2}
    config = FinetuneConfig(
        name="tuned",
        model={"tiny": tiny | {"pretraining": {"facts": 10, "steps": 2, "batch_size": 4}}},  # type: ignore[arg-type]
        relation={"name": "invented_names", "direction": "P2C"},  # type: ignore[arg-type]
        training={"steps": 2, "batch_size": 4, "device": "cpu"},  # type: ignore[arg-type]
        snapshots={"count": 2, "facts": 6},  # type: ignore[arg-type]
        evaluation={"max_new_tokens": 2},  # type: ignore[arg-type]
        alerts=[{"measure": ADAPTER, "below": 1.5, "after": 1}],  # type: ignore[arg-type]
    )
    with pytest.warns(AlertWarning) as told:
        rp.fine_tune(config, tmp_path / "tuned", listener=False)
    texts = [str(one.message) for one in told if issubclass(one.category, AlertWarning)]
    assert texts and texts[0].startswith("tuned: lora gradient cosine "), texts
    assert texts[-1].startswith("tuned: ended with 1 of 1 alerts: lora gradient cosine") and "at step 2" in texts[-1]
