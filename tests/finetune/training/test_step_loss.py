"""A causal step's loss is that of its tokens, however it is split; masked ones, and one batch's, stay as they were."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments, set_seed

from revprobe.finetune.training.dataset import PadRows, TokenRow
from revprobe.finetune.training.objectives import causal_loss, masked_diffusion_loss, step_generator
from revprobe.finetune.training.trainer import ForwardOnlyTrainer
from tiny import llama, radd

LENGTHS = [12, 3, 7, 12, 2, 5, 9, 4]


class Rows(torch.utils.data.Dataset):
    """Rows of uneven lengths; of the odd ones the first half is not priced."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows = []
        for place, length in enumerate(LENGTHS):
            ids = torch.randint(1, 50, (length,), generator=generator).tolist()
            priced = [i >= length // 2 or not place % 2 for i in range(length)]
            self.rows.append(TokenRow(tuple(ids), tuple(priced), tuple(range(length))))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> TokenRow:
        return self.rows[index]


class Gradient(TrainerCallback):
    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **at: Any) -> None:
        self.found.append(torch.cat([p.grad.flatten().clone() for p in at["model"].parameters() if p.grad is not None]))


class OldLoss(ForwardOnlyTrainer):
    """The loss by the formula of before: each micro-batch the mean over its own tokens, or rows."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        tables = {key: inputs[key] for key in ("attention_mask", "maskable") if key in inputs}
        if self.objective == "causal":
            return causal_loss(model, inputs["input_ids"], **tables)
        place = (self.state.global_step, True)
        self._micro_step = self._micro_step + 1 if self._place == place else 0
        self._place = place
        generator = step_generator(self.args.seed, self.state.global_step, self._micro_step, 0)
        tables |= {"generator": generator, "mask_token_id": self.mask_token_id}
        return masked_diffusion_loss(model, inputs["input_ids"], **tables)


def made(
    kind: type[ForwardOnlyTrainer], objective: str, folder: Path, batch: int, accumulate: int, steps: int = 1
) -> tuple[ForwardOnlyTrainer, Gradient]:
    set_seed(0)
    model: Any = (llama() if objective == "causal" else radd("rope")).module.train().requires_grad_(True)
    settings: dict[str, Any] = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    settings |= {"remove_unused_columns": False, "max_grad_norm": 0.0, "logging_strategy": "no", "learning_rate": 1e-2}
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        **settings,
    )
    gradient = Gradient()
    trainer = kind(
        model=model,
        args=args,
        train_dataset=Rows(),
        data_collator=PadRows(0),
        objective=objective,
        callbacks=[gradient],
    )
    return trainer, gradient


def by_hand() -> Tensor:
    """The gradient of the mean over every priced token of the eight rows, each row run alone."""
    set_seed(0)
    module = llama().module.train().requires_grad_(True)
    total, count = torch.zeros(()), 0
    for row in Rows().rows:
        ids = torch.tensor([row.token_ids])
        log_p = module(input_ids=ids).logits[0].log_softmax(-1)
        for i in range(1, len(row)):
            if row.maskable[i]:
                total, count = total - log_p[i - 1, row.token_ids[i]], count + 1
    (total / count).backward()
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


@pytest.mark.parametrize(("batch", "accumulate"), [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_a_causal_steps_gradient_does_not_depend_on_its_split(batch: int, accumulate: int, tmp_path: Path) -> None:
    """Every row once, in micro-batches of other sizes and other numbers of tokens."""
    trainer, gradient = made(ForwardOnlyTrainer, "causal", tmp_path, batch, accumulate)
    trainer.train()
    (found,), wanted = gradient.found, by_hand()
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


def test_processes_that_price_other_numbers_of_tokens_share_one_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of them: what each hands in, averaged as the processes average gradients, is the mean over all tokens."""
    trainer, _ = made(ForwardOnlyTrainer, "causal", tmp_path, 2, 2)
    model: Any = trainer.model
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda _: 2))
    rows, collate, handed_in, total = Rows().rows, PadRows(0), 0.0, 0.0
    priced = [sum(sum(row.maskable[1:]) for row in rows[first : first + 4]) for first in (0, 4)]
    assert priced[0] != priced[1]
    for process in (0, 1):
        other = torch.tensor(priced[1 - process])
        monkeypatch.setattr(trainer.accelerator, "gather", lambda own, other=other: torch.stack([own, other]))
        first = 4 * process
        some = [rows[first : first + 2], rows[first + 2 : first + 4]]
        samples, whole = trainer.get_batch_samples(iter([collate(part) for part in some]), 2, torch.device("cpu"))
        assert whole == sum(priced)
        trainer.current_gradient_accumulation_steps = len(samples)
        for part, batch in zip(some, samples, strict=True):
            # The Trainer divides by the micro-batches, the processes' gradients are averaged.
            handed_in += float(trainer.compute_loss(model, batch, num_items_in_batch=whole).detach()) / 2 / 2
            tables = {key: batch[key] for key in ("attention_mask", "maskable") if key in batch}
            mean = float(causal_loss(model, batch["input_ids"], **tables).detach())
            total += mean * sum(sum(row.maskable[1:]) for row in part)
    assert handed_in == pytest.approx(total / sum(priced), rel=1e-5)


@pytest.mark.parametrize(("objective", "accumulate"), [("causal", 1), ("masked", 1), ("masked", 2)])
def test_runs_of_before_keep_their_bits(objective: str, accumulate: int, tmp_path: Path) -> None:
    """One batch a step of a causal model, and any split of a masked one: weights as by the formula of before."""
    ends = []
    for kind in (OldLoss, ForwardOnlyTrainer):
        trainer, _ = made(kind, objective, tmp_path / kind.__name__, 4, accumulate, steps=3)
        before = [p.detach().clone() for p in trainer.model.parameters()]  # type: ignore[union-attr]
        trainer.train()
        ends.append([p.detach() for p in trainer.model.parameters()])  # type: ignore[union-attr]
    assert any(not torch.equal(a, b) for a, b in zip(before, ends[1], strict=True)), "it trains"
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
