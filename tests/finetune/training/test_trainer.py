"""Training: what is trained on, what is saved, what is averaged, and that probing it changes nothing."""

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from long_cases import rest_long
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

import revprobe as rp
from revprobe.finetune.config.loading import parse_config
from revprobe.finetune.config.one_layer import RunConfig
from revprobe.finetune.runs.one_layer import build_model, train
from revprobe.finetune.runs.run import Run
from revprobe.finetune.training import checkpointing as saving
from revprobe.finetune.training.ema import MovingAverage, warmed_decay
from revprobe.finetune.training.objectives import causal_loss, masked_diffusion_loss, step_generator
from revprobe.finetune.training.probe_callback import ProbeCallback, take_readings
from revprobe.finetune.training.trainer import ForwardOnlyTrainer, Permutations, TokenRows
from revprobe.models.checkpoints import step_name
from revprobe.models.contract import contract
from revprobe.models.contract.called import CalledModule
from revprobe.models.contract.trial import Trial
from revprobe.probes.fused import PROBES
from revprobe.relations.catalog import letters


def config(
    family: str = "radd",
    model: str = "d_model: 16, dropout: 0.1",
    every: int = 10,
    alphabet: int = 26,
    **training: Any,
) -> RunConfig:
    """A run that takes about a second."""
    keys = {"steps": 20, "batch_size": 16, "warmup_steps": 2, "ema_decay": 0.8, "device": "cpu"} | training
    text = f"name: tiny\nrelation: {{length: 4, alphabet: {alphabet}}}\nmodel: {{family: {family}, {model}}}\n"
    return parse_config(f"{text}training: {keys}\nsnapshots: {{every: {every}}}\n", RunConfig, "test")


def rows(length: int = 4) -> tuple[Any, Tensor]:
    """The letters tokenizer and the training rows."""
    tokenizer = rp.letter_tokenizer()
    return tokenizer, torch.tensor(tokenizer(letters(length).training_texts())["input_ids"])


def trainer(folder: Path, model: PreTrainedModel, *, objective: str = "masked", **options: Any) -> ForwardOnlyTrainer:
    """A ForwardOnlyTrainer on the letters of length 4; options beginning with `arg_` go to TrainingArguments."""
    arguments = {key[4:]: options.pop(key) for key in list(options) if key.startswith("arg_")}
    lean = {"report_to": "none", "disable_tqdm": True, "remove_unused_columns": False, "save_strategy": "no"}
    settings = {"max_steps": 6, "per_device_train_batch_size": 8, "use_cpu": True} | lean | arguments
    args = TrainingArguments(output_dir=str(folder), **settings)
    tokenizer, token_ids = rows()
    return ForwardOnlyTrainer(
        model=model,
        args=args,
        train_dataset=TokenRows(token_ids),
        processing_class=tokenizer,
        objective=objective,
        **options,
    )


def tiny_model(family: str = "radd", seed: int = 0) -> PreTrainedModel:
    set_seed(seed)
    return build_model(config(family))[0]


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def files(run: Run) -> dict[str, bytes]:
    """All readings of a run, byte for byte."""
    return {str(p.relative_to(run.path)): p.read_bytes() for p in sorted(run.path.glob("readings/*/*.parquet"))}


# ---- what is trained on ----


def test_every_batch_holds_forward_sequences_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One reversed sequence in training, and the reverse reading measures memory."""
    seen: list[Tensor] = []

    def record(model: nn.Module, token_ids: Tensor, **options: Any) -> Tensor:
        seen.append(token_ids.clone())
        return masked_diffusion_loss(model, token_ids, **options)

    monkeypatch.setattr("revprobe.finetune.training.trainer.masked_diffusion_loss", record)
    trainer(tmp_path, tiny_model()).train()
    tokenizer, _ = rows()
    texts = ["".join(tokenizer.convert_ids_to_tokens(row)) for batch in seen for row in batch.tolist()]
    assert len(texts) == 6 * 8
    for text in texts:
        lower = next(c for c in text if c.islower())
        assert text.index(lower) < text.index(lower.upper()), text
        assert sorted(text) == sorted("00" + lower + lower.upper()), text


def test_permutations_leave_no_gap_and_drop_no_row() -> None:
    """A short last batch that is dropped would hide rows; one that is trained on would weigh them more."""
    drawn = list(Permutations(rows=5, total=22, seed=3))
    assert len(drawn) == 22
    for start in (0, 5, 10, 15):
        assert sorted(drawn[start : start + 5]) == [0, 1, 2, 3, 4]
    assert drawn[:5] != drawn[5:10] or drawn[5:10] != drawn[10:15], "every pass has the same order"
    assert drawn == list(Permutations(rows=5, total=22, seed=3))
    assert drawn != list(Permutations(rows=5, total=22, seed=4))


def test_accumulated_micro_batches_draw_masks_of_their_own_and_are_averaged(tmp_path: Path) -> None:
    """One SGD step over two micro-batches equals the mean of two gradients taken by hand."""
    model, twin = tiny_model().eval(), tiny_model().eval()
    options = {"arg_optim": "sgd", "arg_learning_rate": 0.5, "arg_max_grad_norm": 0.0, "arg_max_steps": 1}
    made = trainer(tmp_path, model, **options, arg_gradient_accumulation_steps=2, arg_seed=5)
    model.train = lambda mode=True: model  # type: ignore[method-assign]  # no dropout, so that the step can be redone
    made.train()
    _, token_ids = rows()
    order = list(Permutations(len(token_ids), 16, seed=5))
    for micro, chosen in enumerate((order[:8], order[8:])):
        # The Trainer saw an eval-mode model, whose masks come from the evaluation's stream.
        draw = step_generator(5, 0, micro, phase=1)
        loss = masked_diffusion_loss(twin, token_ids[chosen], generator=draw, mask_token_id=53)
        (loss / 2).backward()
    for (name, trained), by_hand in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert by_hand.grad is not None
        assert torch.allclose(trained, by_hand - 0.5 * by_hand.grad, atol=1e-6), name


@pytest.mark.parametrize("family", rest_long(["radd", "gpt2"]))
def test_training_learns_the_forward_direction(tmp_path: Path, family: str) -> None:
    """The loss that is minimised is the right one: the trained direction is answered."""
    steps = 500
    training = {"steps": steps, "batch_size": 64, "learning_rate": 5e-3, "warmup_steps": 30, "ema_decay": 0.98}
    quick = config(
        family, model="d_model: 32", every=steps, alphabet=6 if family == "radd" else 26, **training, schedule="cosine"
    )
    run = train(quick, tmp_path / "run")
    last = run.readings().measures().query(f"measure == 'forward_accuracy' and step == {steps}")
    assert len(last) == (2 if family == "radd" else 1)
    assert (last["value"] >= 0.95).all(), last


def test_a_loss_that_is_not_finite_stops_the_run_and_is_explained(tmp_path: Path) -> None:
    """Silence here would save NaN weights and probe them."""
    with pytest.raises(rp.RevprobeError, match=r"training loss is (nan|inf) at step 10; lower learning_rate"):
        train(config(learning_rate=1e30, warmup_steps=0), tmp_path / "run")
    run = rp.open_run(tmp_path / "run")
    assert run.steps == [0]
    assert "training loss is" in (run.problem or "")


# ---- seeds ----


def test_equal_configs_give_equal_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    first, again = train(config(), tmp_path / "a" / "tiny"), train(config(), tmp_path / "b" / "tiny")
    assert len(files(first)) == 3 * 3 * 2
    assert files(first) == files(again)
    other = train(config(seed=1), tmp_path / "c" / "tiny")
    assert not set(files(first).values()) & set(files(other).values())


def test_threads_of_the_run_are_pinned_and_given_back(tmp_path: Path) -> None:
    """Sums of floats depend on how they are split, so a run must not depend on its surroundings."""
    torch.set_num_threads(2)
    seen: list[int] = []
    run = train(config(), tmp_path / "run", listener=lambda step, steps, loss: seen.append(torch.get_num_threads()))
    assert set(seen) == {1}
    assert torch.get_num_threads() == 2
    assert {reading.meta["threads"] for reading in run.readings()} == {1}


# ---- the average ----


def test_the_average_follows_its_slow_definition() -> None:
    """d_n = min(decay, (1 + n) / (10 + n)); the first update copies."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    average = MovingAverage(model, 0.9)
    expected = None
    for update in range(1, 200):
        with torch.no_grad():
            model.weight.copy_(torch.randn(2, 3))
        average.update_parameters(model)
        d = min(0.9, (1 + update) / (10 + update))
        current = model.weight.detach().double()
        expected = current if expected is None else d * expected + (1 - d) * current
        assert torch.allclose(average.module.weight.double(), expected, atol=1e-5)
        assert int(average.n_averaged) == update
    assert warmed_decay(0.9, 80) == 0.9
    assert warmed_decay(0.9999, 1) == 2 / 11


def test_only_masked_models_keep_an_average(tmp_path: Path) -> None:
    assert trainer(tmp_path / "a", tiny_model(), ema_decay=0.9).ema is not None
    assert trainer(tmp_path / "b", tiny_model("gpt2"), objective="causal", ema_decay=0.9).ema is None
    run = train(config("gpt2"), tmp_path / "run")
    assert {r.meta["weights"] for r in run.readings()} == {"raw"}
    assert not list(run.path.glob("**/ema"))
    with pytest.raises(rp.RevprobeError, match=r"ema decay 1.5: expected a number between 0 and 1"):
        MovingAverage(nn.Linear(1, 1), 1.5)


# ---- probing changes nothing ----


class Vandal(ProbeCallback):
    """A probe without manners: it draws random numbers, leaves gradients and switches modes."""

    def _wrap(self, module: nn.Module, **provenance: Any) -> Any:
        torch.rand(7)
        np.random.rand(7)
        random.random()
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        module.train()
        return super()._wrap(module, **provenance)


@pytest.mark.parametrize("callback", [ProbeCallback, Vandal])
@pytest.mark.parametrize("family", rest_long(["radd", "gpt2"]))
def test_training_ends_at_the_same_bits_with_and_without_probing(
    tmp_path: Path, family: str, callback: type[ProbeCallback]
) -> None:
    """Dropout is on and rows are shuffled, so one random number too many shows; so does one left-over gradient."""
    objective = "masked" if family == "radd" else "causal"
    ends: list[dict[str, Tensor]] = []
    averages: list[dict[str, Tensor]] = []
    # Built before the Trainers, which seed the generators that training draws from.
    model = rp.ProbedModel(tiny_model(family), rp.letter_tokenizer(), objective=objective)
    pairs = rp.letter_pairs(4, model=model, placements="mirror")
    for probed in (False, True):
        made = trainer(tmp_path / str(probed), tiny_model(family), objective=objective, ema_decay=0.9, snapshots=[0, 3])
        if probed:
            made.add_callback(callback(pairs, steps=[1, 3, 6], ema=made.ema))
        made.train()
        ends.append(bits(made.model))
        averages.append(bits(made.ema.module) if made.ema else {})
    assert same_bits(*ends), "probing changed the weights"
    assert same_bits(*averages), "probing changed the average"
    assert rp.Readings.load(tmp_path / "True" / "readings").steps == [0, 1, 3, 6]


def test_the_callback_works_in_a_plain_trainer(tmp_path: Path) -> None:
    """transformers' Trainer, its own loss and its own checkpoints: readings at step 0, each checkpoint and the end."""
    tokenizer, token_ids = rows()
    data = [{"input_ids": row, "labels": row} for row in token_ids]
    pairs = rp.letter_pairs(4, model=rp.ProbedModel(tiny_model("gpt2"), tokenizer, objective="causal"))
    ends = []
    for probed in (False, True):
        args = TrainingArguments(
            output_dir=str(tmp_path / str(probed)),
            max_steps=5,
            save_steps=2,
            per_device_train_batch_size=8,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        )
        made = Trainer(model=tiny_model("gpt2"), args=args, train_dataset=data)
        if probed:
            made.add_callback(ProbeCallback({"probability": pairs}))
        made.train()
        ends.append(bits(made.model))
    assert same_bits(*ends)
    readings = rp.Readings.load(tmp_path / "True" / "readings")
    assert readings.steps == [0, 2, 4, 5]
    assert {(r.name, r.meta["weights"], r.meta["model"]) for r in readings} == {("reverse_probability", "raw", "True")}


def test_an_unknown_probe_is_named_before_training_starts() -> None:
    model = rp.ProbedModel(tiny_model(), rp.letter_tokenizer(), objective="masked")
    with pytest.raises(rp.RevprobeError, match="unknown probe 'atention'; the closest is 'attention'"):
        ProbeCallback({"atention": rp.letter_pairs(4, model=model)})


# ---- what is saved ----


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished masked run that several tests look at."""
    return train(config(), tmp_path_factory.mktemp("finished") / "tiny")


@pytest.mark.parametrize("step", [0, 10, 20])
@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_a_checkpoint_holds_exactly_the_weights_its_reading_used(finished: Run, step: int, weights: str) -> None:
    """Probing the saved checkpoint gives the saved reading, bit for bit."""
    model = rp.load_model(finished.path, step=step, weights=weights)
    again = take_readings(model, finished.pairs())
    for reading in again:
        saved = finished.readings().select(name=reading.name, step=step, weights=weights)
        assert len(saved) == 1
        assert saved[0].frame.equals(reading.frame), reading.name
        assert saved[0].meta["pairs"] == reading.meta["pairs"]


def test_the_run_folder_is_as_documented(finished: Run) -> None:
    assert finished.steps == finished.readings().steps == [0, 10, 20]
    assert finished.axes == {"objective": "masked", "position_encoding": "rope", "length": 4, "seed": 0}
    assert finished.problem is None
    assert finished.config == config()
    with_state = [
        step for step in finished.steps if list(finished.path.glob(f"checkpoints/{step_name(step)}/optimizer.pt"))
    ]
    assert with_state == [10, 20], "the last two checkpoints can be resumed from, the older ones keep no state"
    assert not list(finished.path.glob("**/training_args.bin")), "a pickle that nothing reads"
    assert not list(finished.path.glob("**/checkpoint-*"))
    names = {p.name for p in (finished.path / "readings" / "step-000010").iterdir()}
    probes = ("attention_correlation", "gradient_cosine", "reverse_probability")
    assert names == {f"{probe}.{weights}.parquet" for probe in probes for weights in ("raw", "ema")}


def test_transformers_alone_loads_what_a_run_saved(finished: Run, tmp_path: Path) -> None:
    """`AutoModelForMaskedLM.from_pretrained(path)` after `import revprobe`, raw and averaged; the ARM likewise."""
    folder = finished.path / "checkpoints" / "step-000020"
    tokenizer, token_ids = rows()
    for path, weights in ((folder, "raw"), (folder / "ema", "ema")):
        plain = AutoModelForMaskedLM.from_pretrained(path).eval()
        ours = rp.load_model(finished.path, weights=weights)
        assert torch.equal(plain(token_ids[:4]).logits, ours.logits(token_ids[:4]))
    arm = train(config("gpt2"), tmp_path / "arm")
    plain = AutoModelForCausalLM.from_pretrained(arm.path / "checkpoints" / "step-000020").eval()
    assert plain(token_ids[:4]).logits.shape == (4, 4, len(tokenizer))


def test_readings_are_written_before_their_checkpoint_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a complete checkpoint implies its readings, and a resume from it loses none."""
    seen: list[tuple[int, bool, bool]] = []

    def spy(run: Path, step: int, **options: Any) -> Path:
        readings = (run / "readings" / step_name(step)).is_dir()
        seen.append((step, readings, (run / "checkpoints" / step_name(step)).exists()))
        return saving.complete_checkpoint(run, step, **options)

    monkeypatch.setattr("revprobe.finetune.training.trainer.complete_checkpoint", spy)
    train(config(), tmp_path / "run")
    assert seen == [(0, True, False), (10, True, False), (20, True, False)]


def test_what_a_kill_leaves_behind_is_removed_and_nothing_else(tmp_path: Path) -> None:
    """Readings ahead of the last complete checkpoint belong to steps that are trained again."""
    for folder in (
        "checkpoints/step-000010",
        "checkpoints/step-000020",
        "checkpoints/checkpoint-30",
        "checkpoints/mine",
        "readings/step-000010",
        "readings/step-000020",
        "readings/.step-000030.part",
        "readings/mine",
    ):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "checkpoints/step-000010/COMPLETE").touch()
    removed = {str(p.relative_to(tmp_path)) for p in saving.remove_unfinished(tmp_path)}
    assert removed == {
        "checkpoints/step-000020",
        "checkpoints/checkpoint-30",
        "readings/step-000020",
        "readings/.step-000030.part",
    }
    assert (tmp_path / "readings/mine").is_dir()
    assert (tmp_path / "checkpoints/mine").is_dir()


def test_snapshots_of_a_masked_model_use_the_stated_pairs() -> None:
    """Grid for the correlation, every distance equally often for the cosine, every placement once for accuracy."""
    model = rp.ProbedModel(tiny_model(), rp.letter_tokenizer(), objective="masked")
    pairs = {name: letters(4).pairs(model).for_probe(name) for name in PROBES}
    assert {name: len(p) for name, p in pairs.items()} == {
        "attention": 26 * 9,
        "gradient": 26 * 3,
        "probability": 26 * 6,
    }
    asked = [query for pair in pairs["probability"] for query in (pair.forward, pair.reverse)]
    assert len(set(asked)) == 2 * 26 * 6, "a placement is missing or counted twice"
    arm = rp.ProbedModel(tiny_model("gpt2"), rp.letter_tokenizer(), objective="causal")
    swapped = letters(4).pairs(arm).for_probe("probability")
    assert swapped.kind == "swapped"
    assert {pair.forward.target_positions for pair in swapped} == {(3,)}


def test_losses_of_trainer_and_objective_agree(tmp_path: Path) -> None:
    """compute_loss hands over the ids as they are; a causal model's rows get no begin token."""
    model = tiny_model("gpt2").eval()
    made = trainer(tmp_path, model, objective="causal")
    _, token_ids = rows()
    assert torch.equal(made.compute_loss(model, {"input_ids": token_ids}), causal_loss(model, token_ids))
    with pytest.raises(rp.RevprobeError, match="unknown objective 'maskd'; the closest is 'masked'"):
        trainer(tmp_path, model, objective="maskd")


def test_probe_names_are_those_of_the_documentation() -> None:
    """Users write these names in mappings of pairs and on the command line."""
    assert list(PROBES) == ["attention", "gradient", "probability"]


def test_a_run_checks_once_which_way_its_model_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each check is six forward passes; the answer cannot change while the run trains."""
    checks: list[str] = []
    judge = contract.run_trial

    def counted(model: CalledModule, mask_token_id: int | None) -> Trial:
        checks.append(model.name)
        return judge(model, mask_token_id)

    monkeypatch.setattr(contract, "run_trial", counted)
    train(config(), tmp_path / "run")
    assert len(checks) == 1, f"checked {len(checks)} times"
    checks.clear()
    model = rp.ProbedModel(tiny_model(), rp.letter_tokenizer(), objective="masked")
    pairs = {"probability": rp.letter_pairs(4, model=model, placements="mirror")}
    made = trainer(tmp_path / "found_out", tiny_model())
    made.add_callback(ProbeCallback(pairs, steps=[1, 2, 3]))
    checks.clear()
    made.train()
    assert len(checks) == 1, f"a callback that finds the objective out checked {len(checks)} times"


# ---- readings that went missing ----


@pytest.mark.parametrize("family", ["radd", "gpt2"])
def test_missing_readings_are_taken_again_byte_for_byte(tmp_path: Path, family: str) -> None:
    """A run is finished when every snapshot x probe x weights is there; the weights for the lost ones still are."""
    run = train(config(family), tmp_path / "tiny")
    whole = files(run)
    lost = [
        "readings/step-000010/gradient_cosine.raw.parquet",
        "readings/step-000020/reverse_probability.raw.parquet",
        "readings/step-000020/attention_correlation.raw.parquet",
    ]
    lost += [f"readings/step-000000/{path.name}" for path in (run.path / "readings" / "step-000000").iterdir()]
    for name in lost:
        (run.path / name).unlink()
    (run.path / "readings" / "step-000000").rmdir()
    kept = {path: path.stat().st_mtime_ns for path in run.path.glob("readings/*/*.parquet")}
    assert not run.finished
    assert f"{len(lost)} of {len(whole)} readings are missing (readings/step-000000/" in (run.problem or "")
    assert run.record().problem == run.problem
    with pytest.warns(UserWarning, match=f"{len(lost)} missing readings were taken from their checkpoints"):
        again = train(config(family), run.path)
    assert again.finished and again.problem is None
    assert files(again) == whole
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items()), (
        "readings that were there were rewritten"
    )


def test_a_reading_lost_with_its_checkpoint_is_named(tmp_path: Path) -> None:
    """It cannot be taken again; the others are, and the run does not pass for whole."""
    run = train(config("gpt2"), tmp_path / "tiny")
    shutil.rmtree(run.path / "checkpoints" / "step-000010")
    assert run.finished, "its readings are what a finished run owes"
    lost, other = (run.path / "readings" / step_name(step) / "gradient_cosine.raw.parquet" for step in (10, 0))
    lost.unlink()
    other.unlink()
    with pytest.raises(rp.RevprobeError, match=r"1 of 9 readings are missing .* checkpoint of step 10 with them; del"):
        train(config("gpt2"), run.path)
    assert other.is_file() and not run.finished
    assert "checkpoint of step 10" in (run.problem or "")


def test_losses_logged_after_a_resume_are_those_of_a_run_that_never_stopped(tmp_path: Path) -> None:
    """A checkpoint in the middle of a mean keeps no sum: the mean ends there, in both."""
    options = {"arg_max_steps": 12, "arg_logging_steps": 4, "arg_save_steps": 6, "arg_save_strategy": "steps"}

    def logged(made: ForwardOnlyTrainer, resume: Path | None = None) -> list[tuple[int, float]]:
        made.train(resume_from_checkpoint=None if resume is None else str(resume))
        return [(entry["step"], entry["loss"]) for entry in made.state.log_history if "loss" in entry]

    whole = logged(trainer(tmp_path / "whole", tiny_model(), **options))
    assert [step for step, _ in whole] == [4, 6, 8, 12] and len({loss for _, loss in whole}) == 4
    stopped = next((tmp_path / "whole").rglob("step-*6"))
    assert logged(trainer(tmp_path / "resumed", tiny_model(), **options), stopped) == whole
