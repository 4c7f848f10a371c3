"""Runs trained together: each ends where it would have alone, and leaves the folder it would have left alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import revprobe as rp
from revprobe.finetune.config.loading import parse_config
from revprobe.finetune.config.one_layer import RunConfig, SweepConfig
from revprobe.finetune.runs.batched import Batch, groups_of_one_shape, train_together
from revprobe.finetune.runs.one_layer import train
from revprobe.finetune.runs.open import open_run
from revprobe.finetune.runs.progress import Listener
from revprobe.finetune.runs.run import PROBLEM
from revprobe.finetune.training.checkpointing import READINGS
from revprobe.finetune.training.stacked_models import clip_each
from revprobe.models.checkpoints import checkpoint_folder, checkpoint_steps, step_name

STEPS = 50


def configs(cells: str, steps: int = STEPS, dropout: float = 0.0, **training: Any) -> list[RunConfig]:
    """Tiny runs. Weight decay, clipping and the schedule are all at work, so that leaving one out shows."""
    keys = {"steps": steps, "batch_size": 16, "learning_rate": 3e-3, "warmup_steps": 5, "schedule": "cosine"}
    keys |= {"weight_decay": 0.1, "gradient_clipping": 0.5, "ema_decay": 0.9, "device": "cpu"} | training
    text = (
        f"name: grid\nbase:\n  relation: {{length: 4, alphabet: 5}}\n  model: {{d_model: 16, dropout: {dropout}}}\n"
        f"  training: {keys}\n  snapshots: {{every: {steps // 2}}}\ncells:\n{cells}\n"
    )
    return parse_config(text, SweepConfig, "test").runs()


MASKED = "- {position_encoding: rope, seed: [0, 1]}\n- {position_encoding: [alibi, absolute]}"
CAUSAL = "- {objective: causal, seed: 1}"


def stop_at(last: int) -> Listener:
    """A listener that stops the training, as Ctrl-C does."""

    def stop(step: int, steps: int, loss: float | None) -> None:
        if step >= last:
            raise KeyboardInterrupt

    return stop


def recorder(told: list[int]) -> Listener:
    """A listener that keeps the steps it is told of."""
    return lambda step, steps, loss: told.append(step)


def cut_off(file: Path) -> None:
    """What a full disk or a lost power leaves of a file."""
    file.write_bytes(file.read_bytes()[:100])


def poison(patch: pytest.MonkeyPatch, name: str, at: int) -> None:
    """Make one number of one run's weights NaN before step `at` + 1, whichever batch the run is in."""
    plain = Batch.take_step

    def take_step(batch: Batch, token_ids: Tensor) -> Tensor:
        for place, member in enumerate(batch.members):
            if member.run.path.name == name and batch.step == at:
                with torch.no_grad():
                    batch.stack.weights[0][place].view(-1)[0] = float("nan")
        return plain(batch, token_ids)

    patch.setattr(Batch, "take_step", take_step)


def weights(run: Path, step: int = -1, kind: str = "raw") -> dict[str, Tensor]:
    return load_file(checkpoint_folder(run, step, kind)[0] / "model.safetensors")


def apart(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """The largest difference between two sets of weights, which must be the same set."""
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same five runs, trained one by one in `alone` and together in `together`."""
    home = tmp_path_factory.mktemp("both")
    made = configs(f"{MASKED}\n{CAUSAL}")
    for config in made:
        train(config, home / "alone" / config.name)
    assert train_together(made, home / "together") == {}
    return home


@pytest.mark.parametrize("name", [config.name for config in configs(f"{MASKED}\n{CAUSAL}")])
def test_training_together_equals_training_alone(both: Path, name: str) -> None:
    """Another row order or mask, clipping across models, decay on a norm, a schedule off by one: all far above."""
    kinds = ["raw"] if name.startswith("arm") else ["raw", "ema"]
    for kind in kinds:
        alone, together = (weights(both / way / name, kind=kind) for way in ("alone", "together"))
        assert apart(alone, together) < 1e-5, kind
        assert apart(weights(both / "together" / name, 0, kind), together) > 0.01, "nothing was trained"
        assert apart(weights(both / "together" / name, 0, kind), weights(both / "alone" / name, 0, kind)) == 0


def test_runs_of_other_seeds_or_encodings_did_not_move_together(both: Path) -> None:
    """The comparison above would pass too if every run of a batch trained the first one's model."""
    seeds = [weights(both / "together" / f"rope-l4-s{seed}") for seed in (0, 1)]
    assert apart(*seeds) > 0.01
    assert apart(seeds[0], weights(both / "together" / "alibi-l4-s0")) > 0.01


def test_a_run_trained_together_is_an_ordinary_run(both: Path) -> None:
    """The same files, the same readings up to rounding, finished, reported, and resumed by nothing."""
    for name in ("rope-l4-s1", "absolute-l4-s0", "arm-l4-s1"):
        alone, together = (both / way / name for way in ("alone", "together"))
        listed = [sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()) for run in (alone, together)]
        assert listed[0] == listed[1]
        run = open_run(together)
        assert run.finished and run.problem is None
        ours, theirs = run.readings().measures(), open_run(alone).readings().measures()
        assert (ours[["measure", "step", "weights", "n"]] == theirs[["measure", "step", "weights", "n"]]).all(axis=None)
        probability = ours["measure"].str.endswith("probability")
        assert (ours["value"] - theirs["value"])[probability].abs().max() < 1e-5
        assert train(run.config, together).path == together
        model = rp.load_model(together)
        assert model.name and model.objective == run.config.model.objective


def test_a_batch_that_was_stopped_is_taken_up_together_or_alone(both: Path, tmp_path: Path) -> None:
    """Optimizer, schedule and average are in the checkpoint: from it either way reaches the uninterrupted end."""
    made = configs("- {position_encoding: [rope, absolute]}")

    for way in ("together", "alone"):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("revprobe.finetune.runs.batched.EVERY_SECONDS", 0.0)
            train_together(made, tmp_path / way, listeners={made[0].name: stop_at(STEPS // 2 + 1)})
        assert checkpoint_steps(tmp_path / way / made[0].name) == [0, STEPS // 2]
        if way == "together":
            assert train_together(made, tmp_path / way) == {}
        else:
            for config in made:
                train(config, tmp_path / way / config.name)
        for config in made:
            for kind in ("raw", "ema"):
                ended = weights(tmp_path / way / config.name, kind=kind)
                assert apart(ended, weights(both / "alone" / config.name, kind=kind)) < 1e-5, (way, kind)


def test_a_stopped_batch_with_dropout_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    """The batch's own dropout stream is in the checkpoints."""
    made = configs("- {seed: [0, 1]}", steps=10, dropout=0.2)

    assert train_together(made, tmp_path / "straight") == {}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("revprobe.finetune.runs.batched.EVERY_SECONDS", 0.0)
        train_together(made, tmp_path / "stopped", listeners={made[1].name: stop_at(7)})
    assert train_together(made, tmp_path / "stopped") == {}
    for config in made:
        assert apart(*(weights(tmp_path / way / config.name) for way in ("straight", "stopped"))) == 0
    assert apart(weights(tmp_path / "straight" / made[0].name), weights(tmp_path / "straight" / made[1].name)) > 1e-3


def test_dropout_differs_between_the_models_of_a_batch(tmp_path: Path) -> None:
    """With one mask for all, two runs of the same seed would stay equal; here they must not."""
    (config,) = configs("- {seed: 0}", steps=2, dropout=0.5)
    twins = [config, config.model_copy(update={"name": "twin"})]
    assert train_together(twins, tmp_path) == {}
    first, second = (tmp_path / twin.name for twin in twins)
    assert apart(weights(first, 0), weights(second, 0)) == 0
    assert apart(weights(first), weights(second)) > 1e-4


def test_clipping_is_per_model() -> None:
    """One model's large gradient must not shrink its neighbour's."""
    torch.manual_seed(0)
    stacked = [torch.nn.Parameter(torch.randn(3, 4, 5)), torch.nn.Parameter(torch.randn(3, 6))]
    for weight in stacked:
        weight.grad = torch.randn_like(weight) * torch.tensor([0.01, 1.0, 100.0]).view(3, *[1] * (weight.ndim - 1))
    expected = []
    for model in range(3):
        own = [torch.nn.Parameter(weight[model].detach()) for weight in stacked]
        for parameter, weight in zip(own, stacked, strict=True):
            assert weight.grad is not None
            parameter.grad = weight.grad[model].clone()
        torch.nn.utils.clip_grad_norm_(own, 0.5)
        expected.append([parameter.grad for parameter in own])
    clip_each(stacked, 0.5)
    for model in range(3):
        for weight, gradient in zip(stacked, expected[model], strict=True):
            assert weight.grad is not None and gradient is not None
            torch.testing.assert_close(weight.grad[model], gradient)


def test_groups_hold_runs_of_one_shape() -> None:
    """Seeds and encodings go together; another length, width, family or rate does not."""
    made = configs("- {position_encoding: [rope, alibi], length: [4, 6], seed: [0, 1]}\n- {objective: causal}")
    made += [config.model_copy(update={"name": "fast"}) for config in configs("- {seed: 5}", learning_rate=0.1)]
    named = [[config.name for config in group] for group in groups_of_one_shape(made)]
    assert named == [
        ["rope-l4-s0", "rope-l4-s1", "alibi-l4-s0", "alibi-l4-s1"],
        ["rope-l6-s0", "rope-l6-s1", "alibi-l6-s0", "alibi-l6-s1"],
        ["arm-l4-s0"],
        ["fast"],
    ]


def test_a_group_that_fails_says_so_and_does_not_stop_the_next(tmp_path: Path) -> None:
    """A rate that overflows: the problem is in the answer and in the run's folder, and the ARM is trained."""
    made = configs("- {seed: 0}", steps=4, learning_rate=1e30, warmup_steps=0) + configs(
        "- {objective: causal}", steps=4
    )
    problems = train_together(made, tmp_path)
    assert list(problems) == ["rope-l4-s0"]
    assert "the training loss of rope-l4-s0 is nan at step 2; lower learning_rate" in problems["rope-l4-s0"]
    assert open_run(tmp_path / "rope-l4-s0").problem == problems["rope-l4-s0"]
    assert open_run(tmp_path / "arm-l4-s0").finished


def test_a_run_whose_loss_breaks_leaves_the_others_of_its_batch_at_their_bits(both: Path, tmp_path: Path) -> None:
    """It alone fails, named and with its step, and goes on from its checkpoint when it is asked for again."""
    made = configs(MASKED)
    name = made[1].name
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, name, at=30)
        problems = train_together(made, tmp_path)
    assert problems == {
        name: f"the training loss of {name} is nan at step 31; lower learning_rate or raise warmup_steps"
    }
    assert open_run(tmp_path / name).problem == problems[name]
    assert checkpoint_steps(tmp_path / name) == [0, STEPS // 2]
    for other in {config.name for config in made} - {name}:
        assert open_run(tmp_path / other).finished and not (tmp_path / other / PROBLEM).exists()
        for kind in ("raw", "ema"):
            ended = weights(tmp_path / other, kind=kind)
            assert apart(ended, weights(both / "together" / other, kind=kind)) == 0, "the broken run moved it"
            assert apart(ended, weights(both / "alone" / other, kind=kind)) < 1e-5
    assert train_together(made, tmp_path) == {}
    assert apart(weights(tmp_path / name), weights(both / "alone" / name)) < 1e-5
    assert open_run(tmp_path / name).finished and not (tmp_path / name / PROBLEM).exists()


def test_a_run_that_breaks_again_does_not_stop_the_others_of_a_resumed_batch(
    both: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stands at an earlier checkpoint than they do, is tried again like any failed run, and fails alone."""
    made = configs(MASKED)
    poison(monkeypatch, made[0].name, at=10)
    monkeypatch.setattr("revprobe.finetune.runs.batched.EVERY_SECONDS", 0.0)
    told: dict[str, list[int]] = {config.name: [] for config in made}
    listeners: dict[str, Listener] = {name: recorder(steps) for name, steps in told.items()}
    with pytest.raises(KeyboardInterrupt):
        train_together(made, tmp_path, listeners=listeners | {made[-1].name: stop_at(STEPS // 2 + 1)})
    assert told[made[0].name][-1] == STEPS // 2 - 1, "told of a run that has failed"
    assert told[made[1].name][-1] == STEPS // 2 + 1
    assert "at step 11; lower" in str(open_run(tmp_path / made[0].name).problem), "not written at once"
    assert [checkpoint_steps(tmp_path / config.name)[-1] for config in made] == [0, *[STEPS // 2] * 3]

    assert list(train_together(made, tmp_path, listeners=listeners)) == [made[0].name]
    assert told[made[0].name][-1] == STEPS // 2 - 1, "a batch of failed runs only trains on"
    for config in made[1:]:
        assert apart(weights(tmp_path / config.name), weights(both / "alone" / config.name)) < 1e-5


def test_a_damaged_state_stops_its_own_run_alone(both: Path, tmp_path: Path) -> None:
    """Of a batch to take up, one optimizer and one random state are cut off, and a folder takes no readings."""
    made = configs(MASKED)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("revprobe.finetune.runs.batched.EVERY_SECONDS", 0.0)
        train_together(made, tmp_path, listeners={made[0].name: stop_at(STEPS // 2 + 1)})
    runs = [tmp_path / config.name for config in made]
    for run, file in zip(runs[:2], ("rng_state.pth", "optimizer.pt"), strict=True):
        cut_off(checkpoint_folder(run, weights="raw")[0] / file)
    (runs[2] / READINGS / step_name(STEPS)).touch()  # where a folder will have to go
    problems = train_together(made, tmp_path)
    assert list(problems) == [run.name for run in runs[:3]]
    damaged = ("rng_state.pth is damaged", "optimizer.pt is damaged", "expected a folder to write")
    for run, said in zip(runs[:3], damaged, strict=True):
        assert said in problems[run.name] and open_run(run).problem == problems[run.name]
        assert checkpoint_steps(run) == [0, STEPS // 2]
    assert apart(weights(runs[3]), weights(both / "alone" / runs[3].name)) < 1e-5
    left = Batch([open_run(runs[0]), open_run(runs[3])], {})
    assert left.config == open_run(runs[3]).config, "what the batch shares is that of a run in it"


def test_readings_that_cannot_be_taken_again_stop_their_own_run_alone(tmp_path: Path) -> None:
    """Two trained runs lack a reading and one of them its weights too; the other and the next group are served."""
    made = configs("- {seed: [0, 1]}\n- {objective: causal}", steps=4)
    damaged, whole, next_group = (tmp_path / config.name for config in made)
    assert train_together(made[:2], tmp_path) == {}
    lost = [run / open_run(run).expected_readings[-1].file for run in (damaged, whole)]  # of the last step, averaged
    before = lost[1].read_bytes()
    for file in lost:
        file.unlink()
    cut_off(checkpoint_folder(damaged, weights="ema")[0] / "model.safetensors")
    for _ in range(2):  # asking again changes nothing
        problems = train_together(made, tmp_path)
        assert list(problems) == [damaged.name]
        assert "bytes are not those that were written" in problems[damaged.name]
        assert open_run(damaged).problem == problems[damaged.name]
        assert lost[1].read_bytes() == before and open_run(whole).finished
        assert open_run(next_group).finished


DIALS = [
    {"negatives": "drop-right"},
    {"negatives": "mirror", "negative_weight": 0.5},
    {"negatives": "drop-left-matched"},
    {"masks": 2},
    {"masks": "single", "negatives": "drop-both"},
    {"rates": "lambda", "gradient_clipping": None},
    {"rates": "t"},
    {"rates": "k"},
    {"switch": {"step": 20, "negatives": "drop-right"}},
]


@pytest.mark.long
def test_dials_rates_and_masks_train_together_as_alone(tmp_path: Path) -> None:
    """In one batch, summed over tokens; what each step did is logged alike."""
    base = configs("- {position_encoding: [rope, scalar]}", loss="sequence", gradient_clipping=0.5)
    made = [
        RunConfig(**config.model_dump(exclude={"name", "training"}), name=f"{config.name}-{number}", training=changed)
        for config in base
        for number, dial in enumerate(DIALS)
        for changed in [config.training.model_dump() | dial]
    ]
    assert len(groups_of_one_shape(made)) == 1
    assert train_together(made, tmp_path / "together", readings=False) == {}
    for config in made[:: len(made) // 9 - 1 or 1]:
        train(config, tmp_path / "alone" / config.name)
        alone, together = (tmp_path / way / config.name for way in ("alone", "together"))
        for kind in ("raw", "ema"):
            assert apart(weights(alone, kind=kind), weights(together, kind=kind)) < 1e-5
        one, two = open_run(alone), open_run(together)
        log, other = one.steps_log(), two.steps_log()
        whole = ["step", "clipped", "dropped"]
        assert list(log["step"]) == list(range(1, STEPS + 1)) and (log[whole] == other[whole]).all(axis=None)
        assert (log.astype(float) - other.astype(float)).abs().max().max() < 1e-3
        answers, others = one.answers(), two.answers()
        assert (answers["probability"] - others["probability"]).abs().max() < 1e-5
        assert two.missing_readings and not one.missing_readings
    # What was left out is taken from the checkpoints, as after any loss.
    with pytest.warns(UserWarning, match="missing readings were taken"):
        assert not train(config, together).missing_readings
