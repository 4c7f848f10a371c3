"""Fine-tuning runs: what is trained on, what a run leaves behind, resuming after SIGKILL, and Table 7 from its runs."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForMaskedLM

import revprobe as rp
from revprobe import ProbedModel, RevprobeError
from revprobe.cli.finetune import finetune as command
from revprobe.finetune.config.finetuning import FinetuneConfig, FinetuneSweepConfig, read_finetune
from revprobe.finetune.config.loading import dump_config, load_config, parse_config
from revprobe.finetune.pretraining.layouts import train_tokenizer
from revprobe.finetune.pretraining.tiny_models import build_tiny
from revprobe.finetune.runs.finetune_setup import FORWARD_UNTRAINED, prepare
from revprobe.finetune.runs.finetuning import FinetuneRun, fine_tune
from revprobe.finetune.runs.sweeps import open_sweep
from revprobe.finetune.training.dataset import PadRows, RowOptions, StatementRows
from revprobe.finetune.training.distributed import ProcessGroup
from revprobe.finetune.training.probe_callback import logged_values
from revprobe.models.peft_adapters import is_adapter_parameter
from revprobe.relations.catalog import invented_names
from revprobe.report.html.finetune_sections import finetune_sections
from revprobe.report.html.report import write_report
from revprobe.report.paper.figure4 import figure4, pooled, run_colours, with_axes
from revprobe.report.paper.table7 import cell_text, match_frame, table7

CONFIG = """
name: NAME
model: {tiny: {layout: LAYOUT, d_model: 16, n_heads: 2, pretraining: {steps: 4, facts: 8, batch_size: 8}}}
relation: {name: invented_names, rows: [60, 72], heldout: 0.2, direction: P2C}
lora: {rank: 2, alpha: 4, dropout: 0.1}
training: {steps: 6, batch_size: 8, learning_rate: 1.0e-2, seed: 3, device: cpu}
snapshots: {every: 3, facts: 9}
"""


def config(layout: str = "llada", text: str = CONFIG, **objective: Any) -> FinetuneConfig:
    made = parse_config(text.replace("NAME", "tiny").replace("LAYOUT", layout), FinetuneConfig, "test")
    return made.model_copy(update={"objective": made.objective.model_copy(update=objective)})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FinetuneRun]:
    """One finished run of each layout, untrained but for a few steps."""
    home = tmp_path_factory.mktemp("runs")
    return {layout: fine_tune(config(layout), home / layout) for layout in ("llada", "dream", "llama")}


# ---- a run ----


@pytest.mark.parametrize(("layout", "kind"), [("llada", "same_target"), ("dream", "same_target"), ("llama", "swapped")])
def test_a_run_leaves_readings_adapters_predictions_and_answers(
    runs: dict[str, FinetuneRun], layout: str, kind: str
) -> None:
    run = runs[layout]
    assert run.finished
    assert run.problem is None
    assert run.steps == run.snapshots == [0, 3, 6]
    measures = run.readings().measures()
    assert set(measures["kind"]) == {kind}
    assert set(measures["step"]) == {0, 3, 6}
    assert {"attention_correlation", "gradient_cosine", "lora_gradient_cosine", "reverse_probability"} <= set(
        measures["measure"]
    )
    predictions = pd.read_parquet(run.path / "predictions.parquet")
    assert set(predictions["step"]) == {0, 3, 6}
    asked = {(r.meta["asked"], r.meta["split"]) for r in run.evaluation()}
    assert asked == {(side, split) for side in ("forward", "reverse") for split in ("train", "heldout")}
    assert run.resolved["objective"] == ("causal" if layout == "llama" else "masked")
    assert run.resolved["logit_shift"] == int(layout != "llada")


@pytest.mark.parametrize("layout", ["llada", "llama"])
def test_load_model_puts_the_steps_adapter_on_the_base_and_its_readings_are_the_runs(
    runs: dict[str, FinetuneRun], layout: str
) -> None:
    """Another step's adapter, or the bare base, gives other numbers."""
    run = runs[layout]
    values = {}
    for step in (0, 3, 6):
        model = rp.load_model(run.path, step=step)
        assert (model.step, model.name) == (step, layout)
        pairs = relation_of(run).pairs(model, "P2C", limit=9)
        values[step] = rp.probe_reverse_probability(model, pairs).value
        stored = run.readings().select(name="reverse_probability", step=step)[0]
        assert values[step] == stored.value
    assert len(set(values.values())) == 3


def test_the_checkpoints_adapter_is_plain_pefts(runs: dict[str, FinetuneRun]) -> None:
    run = runs["llada"]
    base = AutoModelForMaskedLM.from_pretrained(run.path / "base")
    plain = PeftModel.from_pretrained(base, run.path / "checkpoints" / "step-000006").eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, rp.load_model(run.path).logits(ids))


def relation_of(run: FinetuneRun) -> Any:
    return invented_names(**run.config.relation.options)


def test_open_run_knows_a_fine_tuning_and_a_finished_one_is_returned_untouched(runs: dict[str, FinetuneRun]) -> None:
    run = runs["dream"]
    assert isinstance(rp.open_run(run.path), FinetuneRun)
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.name != ".lock"}
    assert fine_tune(config("dream"), run.path).finished
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.name != ".lock"} == before


def test_a_lost_reading_and_a_lost_evaluation_are_taken_again(tmp_path: Path) -> None:
    run = fine_tune(config("llama"), tmp_path / "tiny")
    lost = run.path / "readings" / "step-000003" / "gradient_cosine.raw.parquet"
    expected = rp.Reading.load(lost).value
    answers = {p.name: p.read_bytes() for p in (run.path / "evaluation").iterdir()}
    lost.unlink()
    for file in (run.path / "evaluation").iterdir():
        file.unlink()
    (run.path / "evaluation").rmdir()
    said = "1 of 12 readings are missing (readings/step-000003/gradient_cosine.raw.parquet)"
    assert run.problem == f"{said}; run the same command again to take them from their checkpoints"
    with pytest.warns(UserWarning, match="missing readings of step 3 were taken from its checkpoint"):
        assert fine_tune(config("llama"), run.path).finished
    assert rp.Reading.load(lost).value == expected
    assert {p.name: p.read_bytes() for p in (run.path / "evaluation").iterdir()} == answers


def test_a_config_that_differs_is_refused(runs: dict[str, FinetuneRun]) -> None:
    with pytest.raises(RevprobeError, match=r"objective.whole_entity: False -> True \(old -> new\); restore the old"):
        fine_tune(config(whole_entity=True), runs["llada"].path)


@pytest.mark.long
def test_training_learns_the_forward_direction_of_an_arm(tmp_path: Path) -> None:
    """The loss that is minimised is the right one, through the adapter alone."""
    text = CONFIG.replace("d_model: 16", "d_model: 64").replace("steps: 4, facts: 8", "steps: 250, facts: 12")
    text = text.replace("rank: 2, alpha: 4, dropout: 0.1", "rank: 16, alpha: 32").replace("steps: 6", "steps: 300")
    text = text.replace("1.0e-2", "3.0e-3").replace("every: 3", "steps: [0]").replace("size: 8,", "size: 16,")
    text += "evaluation: {templates: train}\n"
    run = fine_tune(config("llama", text), tmp_path / "run")
    found = match_frame([run]).set_index(["asked", "split"])["value"]
    probability = {
        step: run.readings().select(name="reverse_probability", step=step)[0].measures().set_index("measure")["value"]
        for step in (0, 300)
    }
    # Some parents have two children, and either may be named: the probability of one is then half at most.
    assert probability[300]["forward_probability"] > 0.3 > 0.01 > probability[0]["forward_probability"]
    assert found["forward", "train"] >= 0.8 > 0.5 > found["forward", "heldout"]


def test_the_options_of_large_models_train_and_probe(tmp_path: Path) -> None:
    """bf16 weights and autocast, checkpointed activations, accumulation, epochs, whole entities together."""
    text = CONFIG.replace("{tiny:", "{dtype: bfloat16, tiny:").replace("every: 3", "steps: [0], parameters: lora")
    text = text.replace("steps: 6,", "epochs: 1, gradient_accumulation: 2, bf16: true, gradient_checkpointing: true,")
    run = fine_tune(config("dream", text, whole_entity=True, antithetic=True), tmp_path / "run")
    assert run.finished
    assert run.resolved["steps"] == round(run.resolved["rows"] / 16)
    measures = run.readings().measures()
    assert "lora_gradient_cosine" in set(measures["measure"])
    assert "gradient_cosine" not in set(measures["measure"])
    assert {r.meta["dtype"] for r in run.readings()} == {"bfloat16"}
    first, last = (rp.load_model(run.path, step=step).module for step in (0, -1))
    moved = [bool((a != b).any()) for a, b in zip(first.parameters(), last.parameters(), strict=True)]
    names = [name for name, _ in first.named_parameters()]
    assert all(is_adapter_parameter(name) for name, did in zip(names, moved, strict=True) if did)
    assert sum(moved) > len([name for name in names if ".lora_B." in name]) / 2


# ---- killed and resumed ----

DRIVER = """
import json, os, signal, sys
from pathlib import Path
from revprobe.finetune.runs import finetuning
from revprobe.finetune.training import trainer
from revprobe.finetune.config.loading import parse_config
from revprobe.finetune.config.finetuning import FinetuneConfig

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def nth(function, count):
    calls = []
    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == count:
            die()
        return function(*args, **kwargs)
    return counted

MOMENTS = {
    "between two snapshots": (trainer.ForwardOnlyTrainer, "training_step", 5),
    "after the weights, before the optimizer": (trainer.ForwardOnlyTrainer, "_save_optimizer_and_scheduler", 2),
    "before the evaluation": (finetuning, "save_evaluation", 1),
}

def in_a_fork(config, folder, moment=None):
    pid = os.fork()
    if pid == 0:
        if moment is not None:
            owner, name, count = MOMENTS[moment]
            setattr(owner, name, nth(getattr(owner, name), count))
        try:
            finetuning.fine_tune(config, folder)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]

config = parse_config(sys.argv[1], FinetuneConfig, "argument")
home = Path(sys.argv[2])
report = {"": [in_a_fork(config, home / "undisturbed" / "tiny")]}
for number, moment in enumerate(MOMENTS):
    folder = home / str(number) / "tiny"
    report[moment] = [in_a_fork(config, folder, moment), in_a_fork(config, folder)]
print(json.dumps(report))
"""


def outcome(run: Path) -> dict[str, bytes]:
    """What two equal runs must share: readings, answers, predictions, and the last adapter."""
    files = [*run.glob("readings/**/*.parquet"), *run.glob("evaluation/*"), run / "predictions.parquet"]
    files += run.glob("checkpoints/step-000006/*.safetensors")
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(files)}


@pytest.mark.long
def test_a_run_killed_and_resumed_ends_at_the_same_adapter_and_readings(tmp_path: Path) -> None:
    """Masks or dropout that depend on when the process started, or a base built anew otherwise, break it."""
    arguments = [dump_config(config()), str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-P", "-c", DRIVER, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    fates = json.loads(done.stdout.splitlines()[-1])
    assert fates.pop("") == [0], done.stderr
    expected = outcome(tmp_path / "undisturbed" / "tiny")
    assert len(expected) == 3 * 4 + 4 + 1 + 1, sorted(expected)
    for number, (moment, fate) in enumerate(fates.items()):
        assert fate == [signal.SIGKILL, 0], f"{moment}: killed, then resumed, ended with {fate}\n{done.stderr}"
        found = outcome(tmp_path / str(number) / "tiny")
        assert found.keys() == expected.keys(), moment
        differ = [name for name in expected if found[name] != expected[name]]
        assert not differ, f"killed {moment}: {differ} differ from the undisturbed run"


# ---- what is trained on ----


@dataclass(frozen=True)
class Says:
    """A training statement made by hand."""

    text: str
    spans: tuple[tuple[int, int], tuple[int, int]]
    prompt_length: int
    fact: str = "Ann Low"


ANN = Says("Fact: Ann Low's child is Bo High", ((6, 13), (25, 32)), 24)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ProbedModel]:
    """Tiny bases, barely trained, of a relation's words and ANN's."""
    home = tmp_path_factory.mktemp("bases")
    relation = invented_names(rows=(60, 72))
    made = {}
    for layout in ("llada", "dream", "llama"):
        tiny = config(layout).model.tiny
        assert tiny is not None
        made[layout] = rp.load_model(build_tiny(tiny, relation, home / layout))
    return made


def shown(model: ProbedModel, row: Any, which: list[bool]) -> str:
    return model.tokenizer.decode([t for t, keep in zip(row.token_ids, which, strict=True) if keep])


def test_masked_rows_come_bare_and_filled_to_the_answers_length(base: dict[str, ProbedModel]) -> None:
    model = base["llada"]
    bare, filled = StatementRows([ANN], model, RowOptions(answer_tokens=12)).rows
    assert model.tokenizer.decode(bare.token_ids) == ANN.text
    answer = model.tokenizer(" Bo High")["input_ids"]
    extra = filled.token_ids[len(bare) :]
    assert filled.token_ids[: len(bare)] == bare.token_ids
    assert set(extra) == {model.tokenizer.eos_token_id}
    assert len(extra) == 12 - len(answer)
    assert all(bare.maskable) and all(filled.maskable)
    assert list(bare.leader) == list(range(len(bare)))


def test_a_causal_row_ends_with_one_end_token(base: dict[str, ProbedModel]) -> None:
    model = base["llama"]
    (row,) = StatementRows([ANN], model, RowOptions(answer_tokens=12)).rows
    assert row.token_ids == (*model.tokenizer(ANN.text)["input_ids"], model.tokenizer.eos_token_id)


def test_response_only_masks_the_answer_and_its_end_alone(base: dict[str, ProbedModel]) -> None:
    model = base["llada"]
    bare, filled = StatementRows([ANN], model, RowOptions(response_only=True, answer_tokens=12)).rows
    assert shown(model, bare, list(bare.maskable)) == " Bo High"
    assert shown(model, filled, list(filled.maskable)).startswith(" Bo High<|end|>")


def test_a_shifted_models_first_position_is_never_masked(base: dict[str, ProbedModel]) -> None:
    (bare, _) = StatementRows([ANN], base["dream"], RowOptions(answer_tokens=12)).rows
    assert list(bare.maskable) == [False] + [True] * (len(bare) - 1)


def test_an_entitys_tokens_share_a_leader(base: dict[str, ProbedModel]) -> None:
    """Each entity its own; the words between alone."""
    model = base["llada"]
    bare, _ = StatementRows([ANN], model, RowOptions(whole_entity=True, answer_tokens=12)).rows
    offsets = model.tokenizer(ANN.text, return_offsets_mapping=True)["offset_mapping"]
    together = [
        [i for i, (first, last) in enumerate(offsets) if first < end and last > start] for start, end in ANN.spans
    ]
    for tokens in together:
        assert {bare.leader[i] for i in tokens} == {tokens[0]}
        assert len(tokens) > 1, "the test needs an entity of several tokens"
    alone = set(range(len(bare))) - set(together[0]) - set(together[1])
    assert all(bare.leader[i] == i for i in alone)


def test_rows_of_different_lengths_are_padded_and_say_so(base: dict[str, ProbedModel]) -> None:
    rows = StatementRows([ANN], base["llada"], RowOptions(whole_entity=True, answer_tokens=12)).rows
    batch = PadRows(pad_token_id=2)(rows)
    short, long = map(len, rows)
    assert batch["input_ids"].shape == (2, long)
    assert batch["attention_mask"].sum(1).tolist() == [short, long]
    assert not batch["maskable"][0, short:].any()
    assert batch["leader"][0, short:].tolist() == list(range(short, long))
    plain = PadRows(2)(StatementRows([ANN], base["llama"]).rows)
    assert set(plain) == {"input_ids"}, "tables that say nothing cost time"


def test_what_cannot_be_trained_on_is_named(base: dict[str, ProbedModel]) -> None:
    model = base["llada"]
    long = Says("Fact: Ann Low's child is " + "Bo" * 200, ((6, 13), (25, 425)), 24)
    with pytest.raises(
        RevprobeError, match=r"fact 'Ann Low': \"Fact: .* takes \d+ tokens, but llada takes at most 128"
    ):
        StatementRows([long], model)
    with pytest.raises(RevprobeError, match=r"fact 'Ann Low': the prompt \"Fact: Ann Low's chi\" is .* not so in"):
        StatementRows([Says(ANN.text, ANN.spans, 19)], model)
    with pytest.raises(RevprobeError, match="no training statement"):
        StatementRows([], model)
    endless = train_tokenizer([ANN.text], 300)
    endless.eos_token = None
    with pytest.raises(RevprobeError, match=r"no end token, so no answer could end; set tokenizer.eos_token"):
        StatementRows([ANN], ProbedModel(model.module, endless, objective="masked"))


def test_training_reads_forward_statements_of_trained_facts_only(tmp_path: Path) -> None:
    """Tokens back to text: no statement of the other direction, no held-out fact, no wording that is held out."""
    chosen = config()
    prepared = prepare(chosen, tmp_path, ProcessGroup())
    texts = {prepared.model.tokenizer.decode(row.token_ids).replace("<|end|>", "") for row in prepared.rows.rows}
    assert texts == set(prepared.relation.training_texts("P2C"))
    assert not texts & set(prepared.relation.training_texts("C2P"))
    held = prepared.relation.facts.query("split == 'heldout'")
    assert len(held)
    assert not any(
        parent in text and child in text
        for parent, child in zip(held["parent"], held["child"], strict=True)
        for text in texts
    )


def test_response_only_is_said_by_the_run_its_pairs_and_its_report(tmp_path: Path) -> None:
    text = CONFIG.replace("steps: 6", "steps: 2").replace("every: 3", "steps: [0]")
    run = fine_tune(config("llada", text, scope="response_only"), tmp_path / "run")
    assert run.axes["objective"] == "masked (response only)"
    for reading in run.readings():
        assert reading.frame[FORWARD_UNTRAINED].all(), reading.name
    assert "Trained on the response only: run." in "".join(finetune_sections([run]))
    causal = prepare(config("llama", scope="response_only"), tmp_path / "llama", ProcessGroup())
    assert FORWARD_UNTRAINED not in causal.pairs.flags, "an ARM's forward query asks for what the response is"


# ---- tiny models ----


@pytest.mark.parametrize("layout", ["llada", "dream", "llama"])
def test_a_tiny_base_is_a_checkpoint_like_any_other(base: dict[str, ProbedModel], layout: str) -> None:
    model = base[layout]
    assert model.objective == ("causal" if layout == "llama" else "masked")
    assert model.logit_shift == int(layout != "llada")
    assert model.tokenizer.decode(model.tokenizer(ANN.text)["input_ids"]) == ANN.text
    assert not any(is_adapter_parameter(name) for name, _ in model.module.named_parameters())


# ---- tracking ----


def test_probe_values_are_logged_under_stable_names(runs: dict[str, FinetuneRun]) -> None:
    logged = logged_values(runs["llada"].readings().select(step=3))
    names = ["attention_correlation", "gradient_cosine", "lora_gradient_cosine"]
    names += [f"{side}_{what}" for side in ("forward", "reverse") for what in ("probability", "accuracy")]
    assert set(logged) == {f"probe/{name}{end}" for name in names for end in ("", "_control")}
    assert logged["probe/gradient_cosine"] == runs["llada"].readings().select(step=3, name="gradient_cosine")[0].value


def test_a_tracker_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("revprobe.finetune.runs.finetune_setup.find_spec", lambda name: None)
    text = CONFIG.replace("device: cpu", "device: cpu, report_to: tensorboard")
    with pytest.raises(RevprobeError, match=r"training.report_to is 'tensorboard', which is not installed"):
        fine_tune(config("llama", text), tmp_path / "run")


# ---- configs ----


def test_the_examples_are_right_and_their_runs_are_named_after_what_differs() -> None:
    tiny, table = read_finetune("finetune-tiny"), read_finetune("table7")
    assert isinstance(tiny, FinetuneSweepConfig) and isinstance(table, FinetuneSweepConfig)
    assert [run.name for run in tiny.runs()] == [f"{layout}-names-P2C-s0" for layout in ("llada", "dream", "llama")]
    runs = table.runs()
    assert len(runs) == 5 * 5 * 3
    assert len({run.name for run in runs}) == len(runs)
    assert all(parse_config(dump_config(run), FinetuneConfig, "again") == run for run in runs)


def test_a_learning_rate_of_its_own_reaches_its_runs_alone() -> None:
    table = load_config("table7", FinetuneSweepConfig)
    changed = table.model_copy(update={"learning_rates": {"llada": 2e-4, "dream": {"trex": 3e-4}}})
    rates = {(r.axes["model"], r.axes["dataset"]): r.training.learning_rate for r in changed.runs()}
    assert rates["llada", "trex"] == rates["llada", "parent-child"] == 2e-4
    assert (rates["dream", "trex"], rates["dream", "parent-child"]) == (3e-4, 1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("rank: 2", "rnk: 2"), r"unknown key 'lora.rnk'; the closest is 'rank' \(in lora\)"),
        (("direction: P2C", "directon: P2C"), "unknown key 'relation.directon'; the closest is 'direction'"),
        (("steps: 6", "steps: 6, epochs: 2"), "training: give exactly one of steps .* and epochs"),
        (("LAYOUT, d_model: 16", "LAYOUT, d_model: 18"), "model.tiny: d_model 18 and n_heads 2 do not give an even"),
        (("model: {tiny", "model: {quantize: 4bit, tiny"), "snapshots.parameters is 'both', but weights in 4 bits"),
        (("every: 3", "steps: [7]"), "snapshots.steps has 7, but training.steps is 6; raise one or drop one"),
        (("invented_names, rows", "invented_nams, rows"), "relation.name is 'invented_nams'; expected .*; the closest"),
    ],
)
def test_a_wrong_config_says_what_is_wrong(change: tuple[str, str], words: str) -> None:
    text = CONFIG.replace(*change).replace("NAME", "tiny").replace("LAYOUT", "llada")
    with pytest.raises(RevprobeError, match=words) as raised:
        parse_config(text, FinetuneConfig, "test")
    assert "\n" not in str(raised.value)


def test_an_unknown_direction_is_told_before_a_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(RevprobeError, match="has no direction 'P2D'; the closest is 'P2C'"):
        fine_tune(config("llada", CONFIG.replace("direction: P2C", "direction: P2D")), tmp_path / "run")
    assert not (tmp_path / "run" / "base").exists()


def test_epochs_become_steps_of_the_rows_there_are() -> None:
    training = config("llada", CONFIG.replace("steps: 6,", "epochs: 2, gradient_accumulation: 3,")).training
    assert training.total_steps(rows=120) == round(2 * 120 / (8 * 3))


# ---- Table 7 ----


def some_matches(values: dict[str, list[float]]) -> pd.DataFrame:
    """Matches of one dataset, by "model asked", a value per seed."""
    rows = []
    for label, per_seed in values.items():
        model, asked = label.split()
        for seed, value in enumerate(per_seed):
            rows.append({"model": model, "dataset": "names", "direction": "P2C", "seed": seed, "asked": asked})
            rows[-1] |= {"split": "train", "value": value, "low": value - 0.1, "high": value + 0.1, "n": 9, "facts": 3}
    return pd.DataFrame(rows)


def test_table7_shows_mean_and_spread_over_seeds() -> None:
    """By hand: 0.2, 0.4, 0.9 have mean 0.5 and sample standard deviation 0.3606."""
    values = {"a forward": [0.2, 0.4, 0.9], "a reverse": [0.5], "b forward": [math.nan, 0.25, 0.75]}
    shown = table7(some_matches(values))
    row = shown.iloc[0].to_dict()
    assert row["trained on"] == "names (P2C)"
    assert row["a Fwd."] == "50.0 ± 36.1 [3.9, 96.1] (3 seeds, n = 27, 3 facts)"
    assert row["a Rev."] == "50.0 [40.0, 60.0] (n = 9, 3 facts)"
    assert row["b Fwd."] == "50.0 ± 35.4 [1.3, 98.7] (2 seeds, 1 undefined, n = 18, 3 facts)"
    assert row["b Rev."] == "not run"


def test_questions_of_a_cell_are_counted_where_seeds_were_asked_unlike_numbers() -> None:
    """Their mean times the seeds is 8 but for its last digit, which was cut to 7."""
    counts = [1, 1, 1, 1, 2, 2]
    part = some_matches({"a forward": [0.5] * 6}).assign(n=counts)
    assert "n = 8, 3 facts)" in cell_text(part)


def test_figure4_pools_seeds_and_nothing_else() -> None:
    rows = [
        {"model": m, "kind": k, "seed": s, "step": 0, "measure": "x", "value": v}
        for m, k, s, v in [("a", "same_target", 0, 0.2), ("a", "same_target", 1, 0.6), ("b", "swapped", 0, 0.9)]
    ]
    frame = pd.DataFrame(rows).assign(task="d (P2C)", variant="", control=0.1, low=0.15, high=0.95, n=9, facts=3)
    frame["reason"] = ""
    table = pooled(frame).set_index("model")
    assert table.loc["a", ["mean", "low", "high", "seeds"]].tolist() == pytest.approx([0.4, 0.2, 0.6, 2])
    assert table.loc["b", ["mean", "low", "high", "seeds"]].tolist() == pytest.approx([0.9, 0.15, 0.95, 1]), "facts"
    bare = pooled(frame.assign(low=math.nan, high=math.nan)).set_index("model")
    assert bare.loc["b", ["low", "high"]].isna().all() and bare.loc["a", "low"] == 0.2, "no interval, no band"
    gone = pooled(frame.assign(value=math.nan, reason=["", "few facts", "one fact"])).set_index("model")
    assert gone.loc["a", "seeds"] == 0 and gone.loc["a", "reason"] == "few facts", "undefined is told, not dropped"


def test_a_seed_without_a_value_lends_the_others_neither_control_nor_count() -> None:
    rows = [{"seed": 0, "value": 0.5, "control": 0.1, "low": 0.4, "high": 0.7, "n": 90, "facts": 30, "reason": ""}]
    rows += [{"seed": 1, "value": math.nan, "control": 0.9, "n": 0, "facts": 0, "reason": "few facts"}]
    frame = pd.DataFrame(rows).assign(model="a", task="d", variant="", kind="k", measure="gradient_cosine", step=0)
    row = pooled(frame).iloc[0]
    assert row[["mean", "low", "high", "control"]].tolist() == pytest.approx([0.5, 0.4, 0.7, 0.1])
    assert row[["n", "n_most", "facts", "facts_most"]].tolist() == [90, 90, 30, 30]
    assert row[["seeds", "undefined", "reason"]].tolist() == [1, 1, "few facts"]
    last = pooled(frame.iloc[::-1]).iloc[0]  # the interval is that of the seed that has one, whichever comes first
    assert last[["low", "high"]].tolist() == pytest.approx([0.4, 0.7])
    both = pooled(frame.assign(value=0.5, n=[9, 90], facts=[3, 30])).iloc[0]
    assert both[["n", "n_most", "facts", "facts_most", "undefined"]].tolist() == [9, 90, 3, 30, 0]
    drawn = figure4(frame.assign(run=["s0", "s1"]))
    said = next(trace.hovertext[0] for trace in drawn.data if trace.meta["part"] == "value")
    assert "n = 90 pairs of 30 facts" in said and "1 of 2 seeds undefined: few facts" in said and "control 0.10" in said


def test_runs_of_one_seed_are_no_seeds_of_one_line() -> None:
    """Two learning rates without a label of their own were drawn as a mean "of 2 seeds"."""
    about = {"model": "a", "dataset": "d", "direction": "P2C", "variant": None}
    axes = {"slow": about | {"seed": 0}, "fast": about | {"seed": 0}, "other": about | {"seed": 1}}
    made = with_axes(pd.DataFrame({"run": list(axes)}), axes)
    assert made["variant"].tolist() == ["slow", "fast", ""] and set(made["task"]) == {"d (P2C)"}
    apart = with_axes(pd.DataFrame({"run": ["slow", "other"]}), {name: axes[name] for name in ("slow", "other")})
    assert apart["variant"].tolist() == ["", ""], "two seeds of one line"


def test_fourteen_models_have_fourteen_colours_and_controls_need_no_attention() -> None:
    measures = made_signatures(*((name, "d", "", 0) for name in "abcdefghijklmn"))
    assert len(set(run_colours(measures).values())) == 14
    row = {"run": "a-d--s0", "control": "untrained", "measure": "gradient_cosine", "value": 0.2, "step": 0}
    beside = pd.DataFrame([row]).assign(model="a", task="d", variant="", kind="swapped")
    drawn = figure4(measures[measures["measure"].eq("gradient_cosine")], beside)
    assert [trace.name for trace in drawn.data if trace.meta["part"] == "key"], "no axes at the first place: a crash"


def made_signatures(*runs: tuple[str, str, str, int]) -> pd.DataFrame:
    """Every measure of some runs (model, dataset, variant, seed) at two steps, as a report has them."""
    measures = ["attention_correlation", "gradient_cosine", "lora_gradient_cosine"]
    measures += ["reverse_probability", "forward_probability"]
    rows = [
        {"run": f"{m}-{d}-{v}-s{seed}", "model": m, "task": d, "variant": v, "step": step, "measure": name}
        for m, d, v, seed in runs
        for name in measures
        for step in (0, 10)
    ]
    about = {"weights": "raw", "kind": "swapped", "value": 0.5, "control": 0.1, "low": 0.4, "high": 0.7, "reason": ""}
    return pd.DataFrame(rows).assign(**about, n=9, facts=3)


def values_of(figure: Any) -> list[Any]:
    return [trace for trace in figure.data if (trace.meta or {}).get("part") == "value"]


def test_figure4_has_a_band_of_one_seed_too_and_a_dash_has_one_meaning() -> None:
    """With one seed the curves stood bare; a dotted line was the adapter in one panel and the forward question in
    another.
    """
    drawn = figure4(made_signatures(("a", "d", "", 0)))
    bands = [trace for trace in drawn.data if trace.fill == "toself"]
    assert len(bands) == 5 and all({0.4, 0.7} <= set(trace.y) for trace in bands)
    controls = [trace for trace in drawn.data if trace.meta["part"] == "control"]
    assert len(controls) == 5 and {trace.line.dash for trace in controls} == {"dash"}, "each panel has its control"
    lines = values_of(drawn)
    assert {trace.line.dash for trace in lines} == {None} and len({trace.yaxis for trace in lines}) == 5
    assert "95 % over facts, 1 seed" in lines[0].hovertext[0] and "9 pairs of 3 facts" in lines[0].hovertext[0]
    titles = [note.text for note in drawn.layout.annotations]
    assert len(titles) == 5 and all("n = 9 pairs of 3 facts" in title for title in titles)


def test_a_model_has_one_colour_and_what_shares_it_has_its_own_marker() -> None:
    """One colour a series ran out of colours, and a model's dataset took that of another model."""
    measures = made_signatures(("a", "d", "", 0), ("a", "d", "", 1), ("a", "e", "", 0), ("b", "d", "", 0))
    colours = run_colours(measures)
    assert colours["a-d--s0"] == colours["a-d--s1"] == colours["a-e--s0"] != colours["b-d--s0"]
    lines = values_of(figure4(measures))
    looks = {trace.name: (trace.line.color, trace.marker.symbol) for trace in lines}
    assert len(lines) == 3 * 5 and len(set(looks.values())) == len(looks) == 3
    assert [looks[name][0] for name in looks] == [colours["a-d--s0"]] * 2 + [colours["b-d--s0"]]
    variants = run_colours(made_signatures(("a", "d", "plain", 0), ("a", "d", "mirror", 0), ("a", "e", "plain", 0)))
    assert variants["a-d-plain-s0"] == variants["a-e-plain-s0"] != variants["a-d-mirror-s0"], "of one model, by variant"


def test_an_undefined_step_is_a_cross_that_says_why() -> None:
    measures = made_signatures(("a", "d", "", 0))
    gone = measures["step"].eq(10) & measures["measure"].eq("gradient_cosine")
    measures.loc[gone, ["value", "low", "high"]] = math.nan
    measures.loc[gone, "reason"] = "9 × below the floor"
    crosses = [trace for trace in figure4(measures).data if (trace.meta or {}).get("part") == "undefined"]
    assert [list(trace.x) for trace in crosses] == [[10]] and "below the floor" in crosses[0].hovertext[0]


def test_the_report_of_fine_tunings_has_one_figure_of_every_run(runs: dict[str, FinetuneRun], tmp_path: Path) -> None:
    """Two figures said the same in other colours; the tables' dots are the figure's colours."""
    records = [run.record() for run in runs.values()]
    page = write_report(records, tmp_path / "report.html", sections=finetune_sections(list(runs.values()))).read_text()
    assert "fig4" not in page and page.count('id="signatures"') == 1
    blocks = dict(re.findall(r'<script type="application/json" id="([\w-]+)-data">(.*?)</script>', page, re.S))
    drawn, colours = json.loads(blocks["signatures"])["data"], json.loads(blocks["colours"])
    lines = [trace for trace in drawn if trace["meta"]["part"] == "value"]
    assert len(lines) == len(records) * 5  # a correlation, two cosines, two probabilities
    assert sum(bool(trace["showlegend"]) for trace in lines) == len(records)
    cosine = runs["llada"].readings().select(name="gradient_cosine", step=6)[0].value
    assert any(trace["y"][-1] == pytest.approx(cosine, abs=1e-4) for trace in lines if trace["xaxis"] == "x2")
    for run in records:
        own = [trace["line"]["color"] for trace in lines if trace["meta"]["model"] == run.axes["model"]]
        assert set(own) == {colours[f"run {run.name}"]} == {colours[f"model {run.axes['model']}"]}
        assert f'data-dot="run {run.name}"' in page and f'data-dot="model {run.axes["model"]}"' in page
    assert "Colour: position encoding" not in page and '<th scope="col">length</th>' not in page


SWEEP = """
name: small
base:
  lora: {rank: 2}
  training: {steps: 2, batch_size: 8, device: cpu}
  snapshots: {steps: [0], facts: 9, predictions: false}
models:
  llama: {tiny: {layout: llama, d_model: 16, n_heads: 2, pretraining: {steps: 2, facts: 8, batch_size: 8}}}
datasets:
  names: {name: invented_names, rows: [60, 72], heldout: 0.2, directions: [C2P]}
seeds: [0, 1]
"""


@pytest.mark.long
def test_the_command_runs_a_sweep_and_reports_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Children in processes of their own; the second call skips what is finished."""
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(SWEEP)
    command("small.yaml", jobs=2, out=Path("runs"))
    out = capsys.readouterr().out
    assert "exact match (%), trained facts" in out and "held-out facts (the floor)" in out
    page = Path("runs/small/report.html").read_text()
    for words in ("Exact match (Table 7)", "llama Fwd.", "names (C2P)", "2 seeds", 'id="signatures"', "(Fig. 4)"):
        assert words in page
    summary = open_sweep("runs/small").summary()
    assert set(summary["run"]) == {"llama-names-C2P-s0", "llama-names-C2P-s1"}
    assert set(summary["seed"]) == {0, 1}
    command("small.yaml", jobs=1, out=Path("runs"))
    assert capsys.readouterr().out.count("finished already, skipped") == 2
