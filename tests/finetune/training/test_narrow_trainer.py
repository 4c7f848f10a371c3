"""A Trainer that computes in bfloat16 is probed in the dtype of its weights: its rounding reaches no reading."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed

import revprobe as rp
from revprobe.finetune.training.answers_callback import SnapshotAnswers
from revprobe.finetune.training.probe_callback import in_its_own_dtype
from revprobe.probes.readings.readings import Readings


class Letters(torch.utils.data.Dataset):
    """Some training texts, with the labels that a causal model's own loss takes."""

    def __init__(self) -> None:
        self.ids = torch.tensor(rp.letter_tokenizer()(rp.letters(4).training_texts()[:24])["input_ids"])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


class Watching(TrainerCallback):
    """Last of the callbacks: the weights around each step, and the forward that the Trainer runs."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.forwards: set[int] = set()

    def _keep(self, model: nn.Module) -> None:
        self.weights.append({name: value.clone() for name, value in model.state_dict().items()})
        self.forwards.add(id(vars(model)["forward"]))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **at: Any) -> None:
        self._keep(at["model"])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **at: Any) -> None:
        self._keep(at["model"])


def made(folder: Path, *callbacks: TrainerCallback) -> tuple[Trainer, rp.ReversalPairs]:
    set_seed(0)
    tokenizer = rp.letter_tokenizer()
    model: Any = rp.one_layer_gpt2(vocab_size=len(tokenizer), d_model=16, n_heads=2, max_length=4)
    settings: dict[str, Any] = {"max_steps": 2, "per_device_train_batch_size": 8, "use_cpu": True, "report_to": "none"}
    settings |= {"disable_tqdm": True, "save_strategy": "no", "learning_rate": 1e-5, "bf16": True}
    args = TrainingArguments(output_dir=str(folder), **settings)
    trainer = Trainer(model=model, args=args, train_dataset=Letters(), callbacks=list(callbacks))
    pairs = rp.letter_pairs(4, model=rp.ProbedModel(model, tokenizer, objective="causal")).sample(12, seed=0)
    return trainer, pairs


def test_what_is_observed_in_bf16_is_the_change_of_the_weights_own_losses(tmp_path: Path) -> None:
    """In a user's own Trainer, against float32 copies of the weights around each step; the autocast stays in place."""
    trainer, pairs = made(tmp_path)
    tokenizer, watching = rp.letter_tokenizer(), Watching()
    wrapping: dict[str, Any] = {"tokenizer": tokenizer, "objective": "causal", "logit_shift": 1}
    trainer.add_callback(rp.ProbeCallback(pairs, steps=[0, 1], **wrapping))
    trainer.add_callback(rp.FirstOrderPrediction(pairs, steps=[0, 1], **wrapping))
    trainer.add_callback(watching)
    trainer.train()
    assert len(watching.forwards) == 1, "the wrapped forward is put back each time"

    def copy_of(weights: dict[str, Tensor]) -> rp.ProbedModel:
        config: Any = trainer.model.config  # type: ignore[union-attr]
        module = GPT2LMHeadModel(config).eval()
        module.load_state_dict(weights)
        return rp.ProbedModel(module, tokenizer, objective="causal")

    def reverse_losses(weights: dict[str, Tensor]) -> np.ndarray:
        model, found = copy_of(weights), []
        with torch.no_grad():
            for pair in pairs:
                ids = torch.tensor([list(pair.reverse.token_ids)])
                log_p = model.module.double()(input_ids=ids).logits[0].log_softmax(-1)
                places = pair.reverse.target_positions
                found.append(-np.mean([float(log_p[i - 1, ids[0, i]]) for i in places]))
        return np.array(found)

    table = pd.read_parquet(tmp_path / "predictions.parquet").set_index(["step", "direction"])
    for step in (0, 1):
        before, after = (reverse_losses(weights).mean() for weights in watching.weights[2 * step : 2 * step + 2])
        row = table.loc[(step, "reverse")]
        assert row["loss"] == pytest.approx(before, rel=1e-5)
        # A change of a thousandth: bfloat16 would have rounded it to steps of a hundredth.
        assert abs(after - before) < 2e-3
        assert row["observed"] == pytest.approx(after - before, abs=2e-6)
        assert row["predicted"] == pytest.approx(after - before, rel=0.1)
    readings = Readings.load(tmp_path / "readings")
    for reading in rp.probe(copy_of(watching.weights[2]), pairs, progress=False):
        (taken,) = readings.select(name=reading.name, step=1)
        assert taken.meta["dtype"] == "float32" and taken.value == reading.value, reading.name


def test_answers_are_asked_in_the_weights_dtype_and_a_failure_puts_the_autocast_back(tmp_path: Path) -> None:
    """Of a snapshot's questions, and whatever they raise."""
    trainer, _ = made(tmp_path)
    seen: list[torch.dtype] = []

    def ask(model: rp.ProbedModel) -> Readings:
        inside: list[torch.dtype] = []
        handle = model.module.lm_head.register_forward_hook(lambda _, a, out: inside.append(out.dtype))
        model.logits(torch.tensor([[1, 2, 3]]))
        handle.remove()
        seen.extend(inside)
        raise RuntimeError("asked")

    trainer.add_callback(
        SnapshotAnswers(ask, tmp_path / "answers", steps=[1], tokenizer=rp.letter_tokenizer(), objective="causal")
    )
    with pytest.raises(RuntimeError, match="asked"):
        trainer.train()
    model: Any = trainer.model
    assert seen == [torch.float32]
    wrapped = vars(model)["forward"]
    with pytest.raises(KeyError), in_its_own_dtype(model):
        assert "forward" not in vars(model)
        raise KeyError
    assert vars(model)["forward"] is wrapped
    plain: Any = rp.one_layer_gpt2(vocab_size=8, d_model=16, n_heads=2, max_length=4)
    with in_its_own_dtype(plain):
        assert "forward" not in vars(plain), "nothing is put around it in float32"
