"""Runs trained together: each ends where it would have alone, and leaves the folder it would have left alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import revprobe as rp
from revprobe.finetune.batched import groups_of_one_shape, train_together
from revprobe.finetune.config import RunConfig, SweepConfig, parse_config
from revprobe.finetune.model_stack import clip_each
from revprobe.finetune.runs import open_run, train
from revprobe.models.checkpoints import checkpoint_folder, checkpoint_steps

STEPS = 50


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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

    def stop(step: int, steps: int, loss: float | None) -> None:
        if step >= STEPS // 2 + 1:
            raise KeyboardInterrupt

    for way in ("together", "alone"):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("revprobe.finetune.batched.EVERY_SECONDS", 0.0)
            train_together(made, tmp_path / way, listeners={made[0].name: stop})
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

    def stop(step: int, steps: int, loss: float | None) -> None:
        if step >= 7:
            raise KeyboardInterrupt

    assert train_together(made, tmp_path / "straight") == {}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("revprobe.finetune.batched.EVERY_SECONDS", 0.0)
        train_together(made, tmp_path / "stopped", listeners={made[1].name: stop})
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
