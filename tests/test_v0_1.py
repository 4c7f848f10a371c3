"""What version 0.1 wrote stays readable: runs, adapters, readings, pairs and configs give the numbers they gave."""

import io
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import revprobe as rp
from revprobe.finetune.config.finetuning import FinetuneConfig, FinetuneSweepConfig
from revprobe.finetune.config.loading import EXAMPLES, load_config
from revprobe.finetune.config.one_layer import RunConfig, SweepConfig
from revprobe.probes.figures.storage import one_step_figure
from revprobe.probes.statistics.measures import current_columns
from revprobe.report.html.finetune_sections import finetune_sections
from revprobe.report.html.report import write_report
from tiny import FIXTURES

HOME = FIXTURES / "v0_1"
EXPECTED: dict[str, Any] = json.loads((HOME / "expected.json").read_text())
KINDS = {"run": RunConfig, "sweep": SweepConfig, "finetune": FinetuneConfig, "finetune_sweep": FinetuneSweepConfig}
# Another machine's kernels round differently; a value that the code moves differs by far more.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def then(name: str) -> pd.DataFrame:
    """A table as version 0.1 gave it."""
    return pd.read_json(io.StringIO(json.dumps(EXPECTED[name])), orient="split")


def same_values(now: pd.DataFrame, before: pd.DataFrame, **tolerance: float) -> None:
    """Values, counts and means of controls: intervals and the correlation's null are those of today's statistics."""
    moved = [name for name in before if name.startswith(("low", "high", "excess", "control_")) or name.endswith("_low")]
    moved += [name for name in before if name.endswith("_high") and name not in moved]
    before, now = before.drop(columns=moved), now[list(before.drop(columns=moved))]
    if "control" in before:
        null = (now["measure"] == "attention_correlation").to_numpy()
        before = before.assign(control=before["control"].mask(null))
        assert (now["control"][null].abs() < 1e-9).all(), "centred"
        now = now.assign(control=now["control"].mask(null))
    same_numbers(now, before, **tolerance)


def same_numbers(now: pd.DataFrame, before: pd.DataFrame, **tolerance: float) -> None:
    now = pd.read_json(io.StringIO(now.to_json(orient="split", double_precision=15)), orient="split")
    pd.testing.assert_frame_equal(now, before, check_dtype=False, **tolerance or CLOSE)


@pytest.mark.parametrize("name", sorted(EXPECTED["configs"]))
def test_every_config_parses_to_the_values_it_had(name: str) -> None:
    """A reader that takes `1e-3`, `yes` or a date for something else turns this red, and so does a changed default."""
    if name.startswith("examples/"):
        file = EXAMPLES / name.removeprefix("examples/")
        text = file.read_text()
        kind = FinetuneConfig if "lora:" in text else SweepConfig
        kind = FinetuneSweepConfig if "\nmodels:" in text else kind
    else:
        file, kind = HOME / "configs" / f"{name}.yaml", KINDS[name]
    now = load_config(file, kind).model_dump(mode="json")
    assert as_it_was(now, EXPECTED["configs"][name]) == EXPECTED["configs"][name]


# Keys that configs have got since, at the values by which nothing is trained otherwise.
SINCE: dict[str, Any] = {
    "initialization": "normal",
    "head_bias": False,
    "dropout_sites": ["embedding", "attention_weights", "attention", "mlp"],
    "loss": "token",
    "rates": "independent",
    "masks": "rate",
    "negatives": "keep",
    "negative_weight": 0.0,
    "switch": None,
    "answers": None,
    "snapshots": {},
    "variants": {},
    "overrides": {},
    "exclude": [],
}


def as_it_was(now: Any, before: Any) -> Any:
    """A config without the keys that its older self lacks, which must stand at what they were without being said."""
    if isinstance(now, dict) and isinstance(before, dict):
        added = {key: value for key, value in now.items() if key not in before}
        assert added == {key: SINCE[key] for key in added}
        return {key: as_it_was(value, before[key]) for key, value in now.items() if key in before}
    if isinstance(now, list) and isinstance(before, list) and len(now) == len(before):
        return [as_it_was(*both) for both in zip(now, before, strict=True)]
    return now


@pytest.mark.parametrize("path", sorted((HOME / "readings").glob("*.parquet")), ids=lambda path: path.stem)
def test_every_kind_of_reading_loads_with_its_value_and_draws(path: Path) -> None:
    reading, expected = rp.Reading.load(path), EXPECTED[path.stem]
    assert reading.name == path.stem
    assert reading.value == pytest.approx(expected["value"], abs=1e-9)
    assert reading.n == expected["n"]
    # Its interval was a bootstrap of four letters, kept as text; today's is worked out from the frame, and said to be.
    low, high = reading.interval
    assert reading.recomputed and "recomputed from statistics 1" in repr(reading)
    assert low < expected["interval"][0] and expected["interval"][1] < high + 1e-6
    assert reading.plot().data, "the figure is empty"


@pytest.mark.parametrize("name", ["pairs", "text_pairs"])
def test_pairs_load_with_the_digest_they_had(name: str) -> None:
    pairs = rp.ReversalPairs.load(HOME / f"{name}.jsonl")
    assert (pairs.digest, len(pairs)) == (EXPECTED["pairs"][name]["digest"], EXPECTED["pairs"][name]["n"])


@pytest.mark.parametrize("name", ["attention_correlation", "gradient_cosine", "reverse_probability", "stored_evidence"])
def test_a_run_probed_again_gives_the_frame_it_gave(name: str) -> None:
    """Weights, pairs and probes together: the frame in the file was taken by version 0.1 on this checkpoint."""
    model = rp.load_model(HOME / "tiny-sweep" / "rope-l4-s0", step=-1, weights="ema")
    pairs = rp.ReversalPairs.load(HOME / "pairs.jsonl")
    probe = {
        "attention_correlation": rp.probe_attention_correlation,
        "gradient_cosine": rp.probe_gradient_cosine,
        "reverse_probability": rp.probe_reverse_probability,
        "stored_evidence": rp.probe_stored_evidence,
    }[name]
    stored = rp.Reading.load(HOME / "readings" / f"{name}.parquet").frame
    taken = probe(model, pairs).frame
    if name == "reverse_probability":  # it says by now why a control is lacking; here none is
        assert taken.pop("reason_control").eq("").all()
    pd.testing.assert_frame_equal(taken, stored[list(taken)], **CLOSE)


def test_a_sweep_opens_and_its_report_holds_the_same_numbers(tmp_path: Path) -> None:
    sweep = rp.open_sweep(HOME / "tiny-sweep")
    assert [run.problem for run in sweep.runs] == [None, None]
    same_values(sweep.summary(), then("summary"), rtol=1e-9, atol=1e-9)
    write_report(sweep.records(), tmp_path / "report.html", title="of version 0.1")
    same_values(pd.read_csv(tmp_path / "summary.csv"), then("summary"), rtol=1e-6, atol=1e-9)
    stored = pd.read_csv(HOME / "tiny-sweep" / "summary.csv")
    same_values(pd.read_csv(tmp_path / "summary.csv"), stored, rtol=1e-6, atol=1e-9)
    assert "written under other statistics (version 1)" in (tmp_path / "report.html").read_text()


def test_a_run_killed_under_v0_1_is_taken_up_and_ends_with_the_readings_it_ended_with(tmp_path: Path) -> None:
    """The checkpoint of step 20 is cut off, so training goes on from step 10 with the state saved there."""
    run = tmp_path / "half"
    shutil.copytree(HOME / "half", run)
    assert not rp.open_run(run).finished
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that other versions started it, where they did, and where it goes on from
        done = rp.train(HOME / "configs" / "run.yaml", run)
    assert done.finished
    assert done.steps == [0, 10, 20]
    same_values(done.readings().measures(), then("half, resumed"), **CLOSE)


def test_a_lora_run_loads_with_its_adapter_its_readings_and_its_answers() -> None:
    run = rp.open_run(HOME / "lora")
    assert run.finished
    same_values(run.readings().measures(), then("lora"), rtol=1e-9, atol=1e-9)
    model = rp.load_model(run.path, step=4)
    pairs = rp.ReversalPairs.load(HOME / "text_pairs.jsonl", tokenizer=model.tokenizer)
    taken = rp.probe_reverse_probability(model, pairs)
    assert 0 < taken.value < 1
    assert {r.meta["asked"] for r in run.evaluation()} == {"forward", "reverse"}
    assert len(pd.read_parquet(run.path / "predictions.parquet"))


@pytest.mark.filterwarnings("error")
def test_single_steps_written_by_v0_1_are_summed_up_as_they_were() -> None:
    """`came` is now `observed`; a figure of curves that were saved under the old name draws too."""
    steps = pd.read_csv(HOME / "one_step.csv", keep_default_na=False, na_values=[""])
    curves = then("one_step")
    # No reason is an empty one, whatever CSV makes of it.
    told = current_columns(curves).astype({"reason": object}).fillna({"reason": ""})
    newer = ["facts", "statistics_version"]
    assert (rp.one_step_curves(steps)["facts"] == 8).all() and (told["statistics_version"] == 1).all()
    same_values(rp.one_step_curves(steps).drop(columns=newer), told.drop(columns=newer), rtol=1e-9, atol=1e-12)
    assert "observed" in rp.one_step_curves(steps) and "came" in curves
    assert len(one_step_figure(curves).data) == len(one_step_figure(current_columns(curves)).data) > 0


def test_predictions_written_by_v0_1_stand_in_the_report() -> None:
    run = rp.open_run(HOME / "lora")
    table = pd.read_parquet(run.path / "predictions.parquet")
    assert {"came", "ahead"} <= set(table)
    assert {"observed", "predicted_by_adamw", "observed_low"} <= set(current_columns(table))
    shown = "".join(finetune_sections([run]))
    assert "observed change (nats)" in shown and f"{table['came'].iloc[0]:+.2e}" in shown


def test_a_run_gives_its_pairs_to_its_own_kind_of_model_alone() -> None:
    """A causal model would be asked other questions than those that the run's readings answer."""
    masked, causal = (rp.open_run(HOME / "tiny-sweep" / name) for name in ("rope-l4-s0", "arm-l4-s0"))
    assert masked.pairs(masked.load()).digest == masked.pairs().digest
    for run, model, kinds in ((masked, causal.load(), "causal.* masked"), (causal, masked.load(), "masked.* causal")):
        with pytest.raises(rp.RevprobeError, match=rf"is {kinds} models; give one of the run's"):
            run.pairs(model)
