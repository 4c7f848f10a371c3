"""Small models made here: built, trained on a corpus about other people, asked about it, in a folder each.

MODEL/config.yaml, versions.json, problem.txt    as in any run
MODEL/model/             config, weights and tokenizer; `load_model(MODEL/model)`
MODEL/pretraining.json   corpus, losses, seconds of the processor, hashes, and what the model answers of the corpus
MODEL/answers/           those answers: <dataset>.<direction>.<told or untold>.parquet
MODEL/checkpoints/       only while it is trained
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerFast, set_seed

from ...atomic_files import write_text
from ...errors import RevprobeError, did_you_mean, first_line
from ...models.checkpoints import CHECKPOINTS
from ...models.hub import quiet_transformers
from ...models.probed import ProbedModel
from ...models.registry import load_model
from ...probes.decoding.exact_match import decoded_match
from ...probes.readings.reading import Reading
from ..config.loading import load_config
from ..config.pretraining import PretrainConfig, PretrainSweepConfig
from ..pretraining.corpus import PretrainingCorpus
from ..pretraining.layouts import CAUSAL, train_tokenizer, untrained
from ..pretraining.rows import CorpusRows, LikeLengths
from ..training.arguments import training_arguments
from ..training.checkpointing import remove_unfinished, resume_from
from ..training.dataset import PadRows, padding_id
from ..training.objectives import EPS
from ..training.run_lock import run_lock
from ..training.trainer import ForwardOnlyTrainer
from .progress import Listener, ProgressCallback
from .run import CONFIG, claim_run, noting_problems, pinned_threads, software

MODEL, RECORD, ANSWERS = "model", "pretraining.json", "answers"
# Beside them until the record holds both.
_SECONDS, _TRAINED = "seconds.json", "trained.json"
# How many losses the record keeps, evenly over the steps.
_LOSSES = 50


@dataclass(frozen=True)
class PretrainedModel:
    """A small model's folder, finished or not."""

    path: Path

    @cached_property
    def config(self) -> PretrainConfig:
        return load_config(self.path / CONFIG, PretrainConfig)

    @property
    def finished(self) -> bool:
        """Whether it is trained, saved and asked."""
        return (self.path / RECORD).is_file()

    @property
    def record(self) -> dict[str, Any]:
        """What it came to. Raises: RevprobeError, before it is finished and when the file is damaged."""
        try:
            return dict(json.loads((self.path / RECORD).read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise RevprobeError(f"{self.path} is not finished; run `revprobe pretrain` again to go on") from None
        except (ValueError, TypeError) as error:
            raise RevprobeError(f"{self.path / RECORD} is damaged ({first_line(error)}); delete it") from error

    def load(self, **options: Any) -> ProbedModel:
        """The model."""
        return load_model(self.path / MODEL, **options)


def pretrain(config: PretrainConfig, folder: Path, *, listener: Listener | None = None) -> PretrainedModel:
    """Make one small model, or take it up where it stopped; a finished one is returned as it is.

    Seeds torch, numpy and random: they do not come out as they went in.

    Args:
        folder: the model's; a parent's is the folder of its name beside it.
        listener: called with (step, steps, loss) about once a second.
    Raises: RevprobeError, for a folder of another config, a parent that is not finished or of another tokenizer, and
        as `load_relation`.
    """
    made = PretrainedModel(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with run_lock(folder):
        claim_run(made, config)
        if made.finished:
            return made
        with noting_problems(folder), pinned_threads(config.training.threads), quiet_transformers():
            corpus = PretrainingCorpus.of(config.corpus)
            tokenizer = train_tokenizer(corpus.for_tokenizer, config.vocabulary, config.context, as_qwen2=True)
            if not (folder / MODEL).is_dir():
                _train(config, folder, corpus, tokenizer, listener)
            _require_same_tokens(made, corpus, tokenizer)
            _conclude(made, config, corpus)
    return made


class _CorpusTrainer(ForwardOnlyTrainer):
    """A ForwardOnlyTrainer that reads rows of like length together."""

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[Any] | None:
        rows = self.train_dataset
        assert isinstance(rows, CorpusRows), "it is made with them"
        size = self.get_total_train_batch_size(self.args)
        return LikeLengths(rows.lengths, self.args.max_steps * size, size, self.args.seed)


def _train(
    config: PretrainConfig,
    folder: Path,
    corpus: PretrainingCorpus,
    tokenizer: PreTrainedTokenizerFast,
    listener: Listener | None,
) -> None:
    """Train all weights from the newest checkpoint or from the start, and save the model."""
    training, masked = config.training, config.layout not in CAUSAL
    set_seed(training.seed)
    module = _start(config, folder, tokenizer)
    probed = ProbedModel(module, tokenizer, objective="masked" if masked else "causal", check=False)
    rows = CorpusRows(corpus, probed)
    arguments = training_arguments(
        folder,
        steps=training.steps,
        schedule="cosine",
        per_device_train_batch_size=training.batch_size,
        learning_rate=training.learning_rate,
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        seed=training.seed,
    )
    low, high = training.rates or (EPS, 1.0)
    trainer = _CorpusTrainer(
        model=module,
        args=arguments,
        train_dataset=rows,
        data_collator=PadRows(padding_id(tokenizer)),
        processing_class=tokenizer,
        objective=probed.objective,
        logit_shift=probed.logit_shift if masked else 0,
        antithetic=masked,
        eps=low,
        highest=high,
        snapshots=[round(training.steps * (n + 1) / training.checkpoints) for n in range(training.checkpoints)],
    )
    if listener is not None:
        trainer.add_callback(ProgressCallback(listener))
    remove_unfinished(folder)
    checkpoint = resume_from(folder)
    with _counted_seconds(folder):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    module.eval()
    logged = [(one["step"], one["loss"]) for one in trainer.state.log_history if "loss" in one]
    every = max(1, len(logged) // _LOSSES)
    tokens = sum(rows.lengths) / len(rows)
    about = {"rows": len(rows), "tokens_a_row": round(tokens, 2), "losses": logged[::-1][::every][::-1]}
    working = folder / f".{MODEL}.part"
    shutil.rmtree(working, ignore_errors=True)
    module.save_pretrained(working)
    tokenizer.save_pretrained(working)
    write_text(folder / _TRAINED, json.dumps(about))
    working.rename(folder / MODEL)


def _start(config: PretrainConfig, folder: Path, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Random weights, or the parent's."""
    module = untrained(config, tokenizer, context=config.context, rope=config.positions == "rotary")
    if config.parent is not None:
        parent = PretrainedModel(folder.parent / config.parent)
        if not parent.finished:
            raise RevprobeError(f"{config.name} starts from {config.parent}, which is not finished; make that first")
        loaded = parent.load()
        if loaded.tokenizer.get_vocab() != tokenizer.get_vocab():
            raise RevprobeError(
                f"{config.name} and {config.parent} have different tokenizers; give both the same corpus and vocabulary"
            )
        module.load_state_dict(loaded.module.state_dict())
    return module


@contextmanager
def _counted_seconds(folder: Path) -> Iterator[None]:
    """Add the seconds of the processor and of the clock to those of earlier attempts, killed ones left out."""
    file = folder / _SECONDS
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"cpu": 0.0, "clock": 0.0}
    cpu, clock = time.process_time(), time.monotonic()
    try:
        yield
    finally:
        spent = {"cpu": time.process_time() - cpu, "clock": time.monotonic() - clock}
        write_text(file, json.dumps({key: round(before[key] + value, 1) for key, value in spent.items()}))


def _require_same_tokens(made: PretrainedModel, corpus: PretrainingCorpus, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise unless the tokenizer that is read from the folder is the one that was trained with."""
    texts, read = corpus.for_tokenizer, made.load().tokenizer
    if read(texts)["input_ids"] != tokenizer(texts)["input_ids"]:
        raise RevprobeError(
            f"the tokenizer in {made.path / MODEL} reads as {type(read).__name__} and splits texts otherwise than the "
            "model was trained with; delete the folder, and report it"
        )


def _conclude(made: PretrainedModel, config: PretrainConfig, corpus: PretrainingCorpus) -> None:
    """Ask the model about its corpus, and write the record, which makes it finished."""
    model = made.load()
    answers = {
        f"{label}.{direction}.{'told' if told else 'untold'}": reading
        for label, direction, told, reading in _answers(model, corpus, config.check.facts)
    }
    (made.path / ANSWERS).mkdir(exist_ok=True)
    for name, reading in answers.items():
        reading.save(made.path / ANSWERS / f"{name}.parquet")
    files = sorted((made.path / MODEL).iterdir())
    record = {
        "name": config.name,
        "parameters": sum(p.numel() for p in model.module.parameters()),
        "corpus": {"told": config.corpus.told, "sha256": corpus.digest, "parts": corpus.summary()},
        **json.loads((made.path / _TRAINED).read_text(encoding="utf-8")),
        "seconds": json.loads((made.path / _SECONDS).read_text(encoding="utf-8")),
        "answers": {name: _numbers(reading) for name, reading in answers.items()},
        "sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
        "versions": software(),
    }
    write_text(made.path / RECORD, json.dumps(record, indent=2) + "\n")
    shutil.rmtree(made.path / CHECKPOINTS, ignore_errors=True)
    for name in (_SECONDS, _TRAINED):
        (made.path / name).unlink(missing_ok=True)


def _answers(model: ProbedModel, corpus: PretrainingCorpus, facts: int) -> Iterator[tuple[str, str, bool, Reading]]:
    for label, told in corpus.datasets.items():
        for direction in told.relation.directions:
            for known in (True, False):
                questions = told.questions(direction, told=known, facts=facts)
                if questions:
                    yield label, direction, known, decoded_match(model, questions)


def _numbers(reading: Reading) -> dict[str, Any]:
    low, high = reading.interval
    control = None if reading.control is None else reading.control.value
    return {"value": reading.value, "low": low, "high": high, "n": reading.n, "control": control}


def chosen_models(sweep: PretrainSweepConfig, only: Sequence[str] | None) -> list[PretrainConfig]:
    """The models asked for and the parents they start from, in the sweep's order.

    Raises: RevprobeError, for a name the sweep does not have.
    """
    by_name = {one.name: one for one in sweep.runs()}
    for name in only or ():
        if name not in by_name:
            raise RevprobeError(f"{sweep.name} has no model {name!r}{did_you_mean(name, by_name)}")
    wanted = set(only or by_name)
    wanted |= {parent for name in wanted if (parent := by_name[name].parent) is not None}
    return [one for name, one in by_name.items() if name in wanted]


def pretrained_table(sweep: PretrainSweepConfig, folder: Path) -> pd.DataFrame:
    """What the finished models came to, as text: parameters, minutes of one core, last loss, and what they answer."""
    rows = []
    for config in sweep.runs():
        made = PretrainedModel(folder / config.name)
        if made.finished:
            record = made.record
            answers = {name: f"{100 * found['value']:.0f} %" for name, found in record["answers"].items()}
            minutes = record["seconds"]["cpu"] / 60
            about = {"parameters": f"{record['parameters']:,}", "core minutes": f"{minutes:.1f}"}
            rows.append({"model": config.name, **about, "loss": f"{record['losses'][-1][1]:.3f}", **answers})
    return pd.DataFrame(rows).fillna("-")
