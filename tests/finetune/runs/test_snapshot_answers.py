"""Answers over training: asked at every snapshot as at the end, without a trace, and taken again where lost."""

import shutil
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import revprobe as rp
from revprobe import RevprobeError
from revprobe.finetune.config.finetuning import FinetuneConfig
from revprobe.finetune.config.loading import dump_config, parse_config
from revprobe.finetune.runs import finetune_setup
from revprobe.finetune.runs.finetuning import FinetuneRun, fine_tune
from revprobe.finetune.training import answers_callback, trainer
from revprobe.models.peft_adapters import is_adapter_parameter
from revprobe.models.probed import ProbedModel
from revprobe.relations.evaluation import evaluate_relation
from revprobe.report.html.finetune_sections import finetune_sections
from revprobe.report.paper.table7 import match_frame, print_table7

CONFIG = """
name: tiny
model: {tiny: {layout: LAYOUT, d_model: 16, n_heads: 2, pretraining: {steps: 4, facts: 8, batch_size: 8}}}
relation: {name: invented_names, rows: [60, 72], heldout: 0.2, direction: P2C}
lora: {rank: 2, alpha: 4, dropout: 0.1}
training: {steps: 4, batch_size: 8, learning_rate: 1.0e-2, seed: 3, device: cpu}
snapshots: {every: 2, facts: 4, predictions: false}
evaluation: {EVALUATION}
"""
SIDES = [(asked, split) for split in ("train", "heldout") for asked in ("forward", "reverse")]


def config(evaluation: str = "at: snapshots", layout: str = "llada") -> FinetuneConfig:
    return parse_config(CONFIG.replace("EVALUATION", evaluation).replace("LAYOUT", layout), FinetuneConfig, "test")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> FinetuneRun:
    return fine_tune(config(), tmp_path_factory.mktemp("runs") / "tiny")


def test_snapshots_and_the_end_are_asked_of_a_copy_with_the_adapter_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    ask = finetune_setup.evaluate_relation

    def watched(model: ProbedModel, *args: Any, **options: Any) -> Any:
        asked.append([name for name, _ in model.module.named_parameters() if is_adapter_parameter(name)])
        return ask(model, *args, **options)

    monkeypatch.setattr(finetune_setup, "evaluate_relation", watched)
    done = fine_tune(config(), tmp_path / "at snapshots")
    fine_tune(config("at: last"), tmp_path / "at the end")
    assert asked == [[]] * (len(done.snapshots) + 1)


def files(run: FinetuneRun) -> dict[str, bytes]:
    return {str(p.relative_to(run.path)): p.read_bytes() for p in sorted(run.path.glob("answers/**/*.parquet"))}


def test_every_snapshot_is_asked_what_the_end_is(run: FinetuneRun) -> None:
    answers = run.answers()
    assert answers.steps == run.snapshots == [0, 2, 4]
    assert {(r.meta["step"], r.meta["asked"], r.meta["split"]) for r in answers} == {
        (step, *side) for step in (0, 2, 4) for side in SIDES
    }
    relation = rp.invented_names(rows=(60, 72), heldout=0.2)
    for step in (0, 2):  # asked anew of the checkpoint, by hand
        expected = evaluate_relation(run.load(step), relation, "P2C", max_new_tokens=run.resolved["answer_tokens"])
        for reading in expected:
            (found,) = [
                r
                for r in answers.select(step=step)
                if r.meta["asked"] == reading.meta["asked"] and r.meta["split"] == reading.meta["split"]
            ]
            assert found.frame.equals(reading.frame)
    table = run.answer_table()
    assert len(table) == 12 and set(table["step"]) == {0, 2, 4}
    assert set(table["measure"]) == {"decoded_match"}
    assert table["n"].gt(0).all()


def test_the_evaluation_is_the_last_snapshots_answers(run: FinetuneRun, tmp_path: Path) -> None:
    last = fine_tune(config("at: last"), tmp_path / "tiny")
    assert last.answers().steps == [4], "without snapshots the answers are those of the end"
    assert not (last.path / "answers").exists()
    assert {p.name: p.read_bytes() for p in (run.path / "evaluation").iterdir()} == {
        p.name: p.read_bytes() for p in (last.path / "evaluation").iterdir()
    }
    for name in (
        "checkpoints/step-000004/adapter_model.safetensors",
        "readings/step-000004/gradient_cosine.raw.parquet",
    ):
        assert (run.path / name).read_bytes() == (last.path / name).read_bytes(), "asking left a trace"


def test_answers_that_are_lost_are_taken_from_their_checkpoint(run: FinetuneRun) -> None:
    before = files(run)
    assert len(before) == 12
    (run.path / "answers" / "step-000002" / "decoded_match.reverse.train.parquet").unlink()
    shutil.rmtree(run.path / "answers" / "step-000000")
    assert not run.finished
    assert run.problem == "answers of step 0 are missing (2 snapshots lack some); run the same command again"
    with pytest.warns(UserWarning, match="missing answers of 2 steps were taken from checkpoints"):
        assert fine_tune(config(), run.path).finished
    assert files(run) == before


def test_killed_while_asking_or_after_it_ends_alike(
    run: FinetuneRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a snapshot's answers; and behind them, before the checkpoint they belong to is complete."""
    saved, complete = answers_callback.save_evaluation, trainer.complete_checkpoint

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    calls: list[int] = []

    def second(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            saved(*args)
            raise KeyboardInterrupt
        return saved(*args)

    folder = tmp_path / "tiny"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(answers_callback, "save_evaluation", second)
        fine_tune(config(), folder)
    assert [p.name for p in (folder / "answers").iterdir()] == ["step-000000"]

    def at_step_2(home: Path, step: int, **rest: Any) -> Any:
        return killed() if step == 2 else complete(home, step, **rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "complete_checkpoint", at_step_2)
        fine_tune(config(), folder)
    assert (folder / "answers" / "step-000002").is_dir(), "asked, but of a checkpoint that is not there"
    resumed = fine_tune(config(), folder)
    assert files(resumed) == files(run)


def test_fewer_facts_and_none(run: FinetuneRun, tmp_path: Path) -> None:
    few = fine_tune(config("facts: 3", "llama"), tmp_path / "few" / "tiny")
    counts = {(r.meta["asked"], r.meta["split"]): r.facts for r in few.evaluation()}
    assert counts["forward", "train"] == 3 and max(counts.values()) == 3
    asked = {side: set(r.frame["fact"]) for r in few.evaluation() for side in [(r.meta["asked"], r.meta["split"])]}
    assert asked["forward", "train"] == asked["reverse", "train"]
    none = fine_tune(config("facts: 0", "llama"), tmp_path / "none" / "tiny")
    assert none.finished and none.problem is None
    assert none.resolved["asked"] == [] and not (none.path / "evaluation").exists()
    with pytest.raises(RevprobeError, match=r"asked for no fact \(evaluation.facts: 0\), so it has no exact match"):
        none.evaluation()
    assert set(match_frame([few, none])["run"]) == {"few/tiny"}
    page, console = "".join(finetune_sections([none])), Console(record=True, width=120, file=StringIO())
    print_table7([none], console)
    for said in (page, console.export_text()):
        assert "No fact was asked of tiny (evaluation.facts: 0): no exact match was taken" in said
    assert "evaluated yet" not in page, "what is not asked for will not come"
    assert "evaluation.facts: 0" in "".join(finetune_sections([few, none])) and few.asks


def test_keys_at_their_default_are_not_written() -> None:
    """A config.yaml from before they were there is byte for byte what a run writes now."""
    plain = config("templates: null")
    assert not {"at", "facts", "candidates"} & set(plain.model_dump()["evaluation"])
    assert config().model_dump()["evaluation"]["at"] == "snapshots"
    assert parse_config(dump_config(config()), FinetuneConfig, "text") == config()


def test_ranks_among_candidates_are_taken_beside_the_answers(run: FinetuneRun, tmp_path: Path) -> None:
    ranked = fine_tune(config("at: snapshots, candidates: true"), tmp_path / "tiny")
    table = ranked.answer_table().set_index(["measure", "step", "asked", "split"])["value"]
    assert set(table.index.get_level_values("measure")) == {"decoded_match", "candidate_rank", "mean_reciprocal_rank"}
    assert set(table["candidate_rank"].index.get_level_values("step")) == {0, 2, 4}
    assert {r.name for r in ranked.evaluation()} == {"decoded_match"}
    before = files(ranked)
    shutil.rmtree(ranked.path / "answers" / "step-000002")
    with pytest.warns(UserWarning, match="missing answers of 1 steps"):
        fine_tune(config("at: snapshots, candidates: true"), ranked.path)
    assert files(ranked) == before
    assert {name: file for name, file in before.items() if "decoded_match" in name} == files(run)
    last = fine_tune(config("candidates: true"), tmp_path / "last" / "tiny")
    assert last.answers().steps == [4]
    assert {p.name for p in (last.path / "answers").iterdir()} == {"step-000004"}
