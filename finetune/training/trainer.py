"""transformers' Trainer with the two objectives of this package and checkpoints that are whole or absent.

What differs from a plain Trainer: masks are drawn in the loss from the step's own generator; rows come in gapless
permutations (no short or dropped batch at the end of a pass); an average of the weights is kept; a checkpoint is
written under the Trainer's own name, then completed, marked and renamed in one go to `step-000500`; a checkpoint at
step 0 is written as well. Everything else (accumulation, distribution, clipping, logging, resume) is the Trainer's.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, RandomSampler, Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from ...atomic_files import require_held
from ...errors import RevprobeError, did_you_mean
from ...models.checkpoints import CHECKPOINTS, EMA, step_of
from ...models.families.files import require_shards_inside
from ...models.peft_adapters import write_reads
from ...models.probed import OBJECTIVES
from .block_diffusion import require_positions
from .checkpointing import (
    FROM_THE_ONE_BEFORE,
    changed_file,
    complete_checkpoint,
    has_other_names,
    missing_state,
    resume_from,
    resuming,
)
from .ema import MovingAverage
from .negatives import Negatives
from .objectives import EPS, PICKS, causal_loss, masked_diffusion_loss, priced_tokens, step_generator
from .step_log import StepLog


class TokenRows(Dataset[Tensor]):
    """A table of token ids, handed out a batch at a time: one indexing call instead of one per row.

    Shapes: `rows seq`.
    """

    def __init__(self, token_ids: Tensor) -> None:
        if token_ids.ndim != 2 or token_ids.shape[0] == 0:
            raise RevprobeError(
                f"training ids of shape {tuple(token_ids.shape)}: expected (rows, seq) with at least one row"
            )
        self.token_ids = token_ids

    def __len__(self) -> int:
        return len(self.token_ids)

    def __getitem__(self, index: int) -> Tensor:
        return self.token_ids[index]

    def __getitems__(self, indices: list[int]) -> Tensor:
        return self.token_ids[indices]


def collate_rows(rows: Tensor | list[Tensor]) -> dict[str, Tensor]:
    """What the Trainer hands to the loss; `TokenRows` has stacked the batch already."""
    return {"input_ids": rows if isinstance(rows, Tensor) else torch.stack(rows)}


class Permutations(Sampler[int]):
    """Row numbers of one random permutation after another, without a gap, `total` of them.

    A batch may span the end of one pass and the start of the next, so every row is seen equally often and no short
    batch is dropped or trained on. Order depends on the seed alone.
    """

    def __init__(self, rows: int, total: int, seed: int) -> None:
        self.rows, self.total, self.seed = rows, total, seed

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        return iter(RandomSampler(range(self.rows), num_samples=self.total, generator=generator))


class ForwardOnlyTrainer(Trainer):
    """A Trainer for rows of token ids, masked-diffusion or causal.

    Args:
        objective: "masked" or "causal".
        mask_token_id: what masked positions show; taken from the model's config when None.
        ema_decay: keep an average of the weights (`.ema`) and save it in `step-000500/ema`; None keeps none. Causal
            models keep none: their readings are on the weights as they are.
        snapshots: steps at which a checkpoint is written; None leaves that to `args.save_strategy`.
        eps, highest, antithetic, logit_shift, rates, masks, per, block_size: see `masked_diffusion_loss`.
        reads: how an adapter's base was loaded, where its files do not say; written beside each adapter.
        negatives: terms of the loss that are left out, of letters or of rows that say their `kinds`; None: none.
        step_log: told of every step, and saved with every checkpoint.
        others: as in `transformers.Trainer`; `data_collator` defaults to `collate_rows`.
    Raises: RevprobeError, for an unknown objective or a masked model without a mask token.
    """

    # The loss is a mean over its batch (or a share of the step's): the Trainer divides it by the accumulation steps.
    loss_is_scaled_for_ga = False
    # Floating-point operations, as the Trainer counts them.
    _per_token: int | None = None

    def __init__(
        self,
        *args: Any,
        objective: str,
        mask_token_id: int | None = None,
        ema_decay: float | None = None,
        snapshots: Collection[int] | None = None,
        eps: float = EPS,
        highest: float = 1.0,
        antithetic: bool = False,
        logit_shift: int = 0,
        rates: str = "independent",
        masks: str | int = "rate",
        per: str = "token",
        block_size: int | None = None,
        reads: Mapping[str, Any] | None = None,
        negatives: Negatives | None = None,
        step_log: StepLog | None = None,
        **others: Any,
    ) -> None:
        if objective not in OBJECTIVES:
            raise RevprobeError(f"unknown objective {objective!r}{did_you_mean(objective, OBJECTIVES)}")
        self.objective: str = objective
        self.eps, self.highest, self.antithetic, self.logit_shift = eps, highest, antithetic, logit_shift
        self.rates, self.masks, self.per = rates, masks, per
        self.block_size, self.reads = block_size, reads
        self.negatives = None if negatives is None or negatives.always_keeps else negatives
        self.step_log = step_log
        # Of the step being taken: its loss, the terms left out, and the sum of their 1/t.
        self._taken: tuple[Tensor | float, int, float] = (0.0, 0, 0.0)
        # Where the last masks were drawn, (step, training?), and how many batches there have drawn before.
        self._place, self._micro_step = (-1, True), 0
        self.resumed = False
        others.setdefault("data_collator", collate_rows)
        # First among the callbacks: it says where checkpoints are due before a ProbeCallback asks.
        others["callbacks"] = [_Snapshots(self, snapshots), *(others.get("callbacks") or [])]
        super().__init__(*args, **others)
        for default in (PrinterCallback, ProgressCallback):
            self.remove_callback(default)
        model = self.model
        assert model is not None, "Trainer.__init__ raises without a model"
        config = getattr(model, "config", None)
        self.mask_token_id = getattr(config, "mask_token_id", None) if mask_token_id is None else mask_token_id
        if objective == "masked" and self.mask_token_id is None:
            raise RevprobeError(f"{type(model).__name__} names no mask token; pass mask_token_id=")
        if block_size is not None:
            require_positions(model)
        self.ema = MovingAverage(model, ema_decay) if ema_decay is not None and objective == "masked" else None

    # ---- loss ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective's loss on `inputs["input_ids"]`.

        `attention_mask` is there where the rows are padded, `maskable` and `leader` where not every token is masked,
        or not alone; see `masked_diffusion_loss`.
        """
        tables: dict[str, Any] = {key: inputs[key] for key in ("attention_mask", "maskable", "leader") if key in inputs}
        if self.objective == "causal":
            tables.pop("leader", None)  # nothing is masked, so nothing is masked together
            if self.negatives is not None:
                everything = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
                tables["weights"] = self._weights(inputs["input_ids"], everything)
            loss = causal_loss(model, inputs["input_ids"], per=self.per, **tables)
            if num_items_in_batch is not None and (share := self._share(inputs, int(num_items_in_batch))) != 1:
                loss = loss * share
        else:
            assert self.mask_token_id is not None, "checked in __init__"
            loss = masked_diffusion_loss(
                model,
                inputs["input_ids"],
                generator=self._next_generator(model.training),
                mask_token_id=self.mask_token_id,
                eps=self.eps,
                highest=self.highest,
                antithetic=self.antithetic,
                logit_shift=self.logit_shift,
                rates=self.rates,
                masks=self.masks,
                per=self.per,
                weigh=None if self.negatives is None else partial(self._weights, kinds=inputs.get("kinds")),
                block_size=self.block_size,
                **tables,
            )
        self._taken = (loss.detach(), *self._taken[1:])
        return (loss, {"loss": loss}) if return_outputs else loss

    def _share(self, inputs: Mapping[str, Any], priced: int) -> float:
        """What the mean of a micro-batch is multiplied by, of a step that prices so many tokens in all.

        The Trainer takes the mean over micro-batches and processes; a step's loss is that over its tokens.
        """
        return _priced(inputs) * self.current_gradient_accumulation_steps * self.args.world_size / priced

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """A step's micro-batches and, where a causal step is split, the tokens that all of it prices."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        alone = len(samples) <= 1 and self.args.world_size == 1
        if alone or self.objective != "causal" or self.per != "token":  # a mean over rows, all of which count alike
            return samples, None
        priced = torch.tensor(sum(map(_priced, samples)), device=device)
        return samples, int(self.accelerator.gather(priced).sum())

    def _weights(
        self, token_ids: Tensor, is_masked: Tensor, rate: Tensor | None = None, kinds: Tensor | None = None
    ) -> Tensor:
        """The weight of each term under the run's dial; picks come from a generator of their own."""
        assert self.negatives is not None, "asked only where there is a dial"
        step, seed = self.state.global_step, self.args.seed
        generator = step_generator(seed, step, self._micro_step, self.args.process_index, phase=PICKS)
        dropped = self.negatives.dropped(step, token_ids, is_masked, generator, kinds)
        divisors = torch.ones(len(token_ids)) if rate is None else rate.cpu()
        self._taken = (self._taken[0], int(dropped.sum()), float((dropped.sum(1) / divisors).sum()))
        weights = torch.ones(dropped.shape).masked_fill(dropped, self.negatives.weight)
        return weights.to(token_ids.device)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        # The Trainer counts the parameters at every step, which takes a small model 6 % of its time.
        tokens = inputs["input_ids"].numel()
        if self._per_token is None:
            self._per_token = super().floating_point_ops(inputs) // tokens
        return self._per_token * tokens

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # Reached once a step, with the norm before the clip; where nothing is clipped it is worked out here.
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.step_log is not None:
            loss, dropped, weight = self._taken
            self.step_log.add(self.state.global_step + 1, float(loss), float(norm), dropped, weight)
            self._taken = (0.0, 0, 0.0)
        return norm

    def _next_generator(self, training: bool) -> torch.Generator:
        """The generator of this micro-batch; counting starts anew at every step, so a resumed run counts alike."""
        place = (self.state.global_step, training)
        self._micro_step = self._micro_step + 1 if self._place == place else 0
        self._place = place
        step, process = self.state.global_step, self.args.process_index
        return step_generator(self.args.seed, step, self._micro_step, process, phase=int(not training))

    # ---- rows ----

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[Any] | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.max_steps <= 0:  # asked for in epochs: their ends matter then
            return super()._get_train_sampler(train_dataset)
        total = self.args.max_steps * self.get_total_train_batch_size(self.args)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return Permutations(len(dataset), total, seed)  # type: ignore[arg-type]  # map-style: it has a length

    # ---- checkpoints ----

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> TrainOutput:
        """As in Trainer; `True` resumes from the newest checkpoint of `args.output_dir` that can be resumed from.

        Raises: RevprobeError, when there is none, or it is cut off or of another model.
        Warns: when it is not the last one.
        """
        if resume_from_checkpoint is True:
            run = Path(self.args.output_dir or ".")
            checkpoint = resume_from(run)
            if checkpoint is None:
                raise RevprobeError(
                    f"nothing to resume in {run}: it has no complete checkpoint with optimizer, scheduler and RNG "
                    "state; train without resuming"
                )
            resume_from_checkpoint = str(checkpoint)
        self.resumed = bool(resume_from_checkpoint)
        if self.step_log is not None:
            self.step_log.resume(step_of(Path(resume_from_checkpoint)) or 0 if resume_from_checkpoint else 0)
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _get_output_dir(self, trial: Any) -> str:
        return str(Path(super()._get_output_dir(trial)) / CHECKPOINTS)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        require_held(Path(self._get_output_dir(trial)))  # the Trainer's own files are not written whole
        if self.step_log is not None:
            self.step_log.save()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # every rank has put its RNG state into the folder that is renamed now
        if self.args.should_save:
            folder, step = Path(self._get_output_dir(trial)), self.state.global_step
            working = folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"
            complete_checkpoint(folder.parent, step, working=working, add=self._add_to)

    def _add_to(self, checkpoint: Path) -> None:
        if self.reads:
            write_reads(checkpoint, self.reads)
        if self.ema is not None:
            self.ema.save(checkpoint / EMA, self.processing_class)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        missing = missing_state(folder)
        if missing:
            raise RevprobeError(
                f"cannot resume from {folder}: it has no {' and no '.join(missing)}; {FROM_THE_ONE_BEFORE}"
            )
        for weights in (folder, folder / EMA):
            require_shards_inside(weights)
        with resuming(folder, "its weights or trainer_state.json"):
            whole: Any = self.model if model is None else model
            if self.is_fsdp_enabled or not has_other_names(folder, whole):
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            else:  # saved under the published names, which only its class reads back
                options: dict[str, Any] = {"dtype": whole.dtype, "output_loading_info": True}
                loaded, found = type(whole).from_pretrained(folder, **options)
                self._issue_warnings_after_load(SimpleNamespace(**found))
                whole.load_state_dict(loaded.state_dict())
            step = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
        if self.ema is not None:
            self.ema.load(folder / EMA, updates=step)
        # Last: what cannot even be read has said so in words of its own.
        changed = changed_file(folder)
        if changed is not None:
            raise RevprobeError(
                f"cannot resume from {folder}: {changed} is damaged (its bytes are not those that were written); "
                f"{FROM_THE_ONE_BEFORE}"
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with resuming(checkpoint, "optimizer.pt", "scheduler.pt"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        names = sorted(path.name for path in Path(checkpoint).glob("rng_state*.pth")) if checkpoint else []
        with resuming(checkpoint, *names):
            super()._load_rng_state(checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Stop where the Trainer would warn, and go on with whatever the missing tensors held."""
        tied = set(getattr(self.model, "_tied_weights_keys", None) or ())
        wrong = sorted({*load_result.missing_keys, *load_result.unexpected_keys} - tied)
        if wrong:
            raise RevprobeError(f"the checkpoint holds another model's weights: {', '.join(wrong[:3])} do not match")


def _priced(inputs: Mapping[str, Any]) -> int:
    """Tokens that the causal loss of a micro-batch is a mean over."""
    return priced_tokens(inputs["input_ids"], inputs.get("attention_mask"), inputs.get("maskable"))


class _Snapshots(TrainerCallback):
    """Says when a ForwardOnlyTrainer's checkpoints are due, writes the one at step 0, and feeds the average."""

    def __init__(self, trainer: ForwardOnlyTrainer, steps: Collection[int] | None) -> None:
        self.trainer, self.steps = trainer, None if steps is None else frozenset(steps)

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # Here, not in on_train_begin: by now every callback's readings at step 0 are written, and the loader has
        # not drawn from the generator whose state the checkpoint keeps.
        trainer = self.trainer
        if state.global_step == 0 and self.steps is not None and 0 in self.steps and not trainer.resumed:
            trainer._save_checkpoint(trainer.model_wrapped, None)
            trainer.control = trainer.callback_handler.on_save(args, state, control)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.trainer.ema is not None and self.trainer.model is not None:
            self.trainer.ema.update_parameters(self.trainer.model)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.steps is not None and state.global_step in self.steps:
            loss = self.trainer._tr_loss
            if not torch.isfinite(loss):
                raise RevprobeError(
                    f"the training loss is {loss.item()} at step {state.global_step}; "
                    "lower learning_rate or raise warmup_steps"
                )
            control.should_save = True
        if control.should_save:
            # A logged loss is the mean since the last; a checkpoint does not keep its sum, so it ends the mean as well.
            control.should_log = True
