"""Tiny models in the published layouts of LLaDA, Dream and Llama, with their own tokenizer, trained on other facts.

They stand where the 8B models would: the same classes, checkpoint files and commands, at a size for which two minutes
of two cores are enough. A tiny model knows the relation's templates in both directions before it is fine-tuned, from
facts that are invented for it: the relation's own words, recombined into names that none of its facts has.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerFast, set_seed

from ...models.probed import ProbedModel
from ...relations.catalog import TextRelation, TrainingText
from ...relations.invented.other_facts import other_statements
from ..config.finetuning import TinyModel
from ..training.arguments import training_arguments
from ..training.dataset import PadRows, RowOptions, StatementRows, padding_id
from ..training.trainer import ForwardOnlyTrainer
from .layouts import CAUSAL, train_tokenizer, untrained


def build_tiny(config: TinyModel, relation: TextRelation, folder: Path, *, answer_tokens: int | None = None) -> Path:
    """Build, pretrain and save a tiny model; a folder that is there already is kept. Seeds torch, numpy and random.

    Args:
        relation: what it will be fine-tuned on; its words make the tokenizer, and names for other facts.
        folder: appears by rename, config, weights and tokenizer in it.
        answer_tokens: positions of an answer that rows are filled up to; by the longest name when None.
    Returns: the folder.
    """
    if folder.is_dir():
        return folder
    told = other_statements(relation, config.pretraining.facts, config.seed, mixed=True)
    statements = [statement for direction in relation.directions for statement in told[direction]]
    # The relation's own names stand behind its carrier for the tokenizer alone: no statement of it is among the texts.
    own = [f"{relation.carrier}{name}" for column in relation.columns for name in relation.table[column]]
    tokenizer = train_tokenizer([statement.text for statement in statements] + own, config.vocabulary)
    set_seed(config.seed)
    module = untrained(config, tokenizer)
    working = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(working, ignore_errors=True)
    _pretrain(module, tokenizer, statements, config, working, answer_tokens)
    module.save_pretrained(working)
    tokenizer.save_pretrained(working)
    working.rename(folder)
    return folder


def _pretrain(
    module: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    statements: Sequence[TrainingText],
    config: TinyModel,
    folder: Path,
    answer_tokens: int | None,
) -> None:
    """Train all weights on the statements, with the objective of the layout."""
    masked = config.layout not in CAUSAL
    probed = ProbedModel(module, tokenizer, objective="masked" if masked else "causal", check=False)
    ends = [statement.text[statement.prompt_length :] for statement in statements]
    # The longest completion and one token to end it.
    longest = answer_tokens or max(map(len, tokenizer(ends, add_special_tokens=False)["input_ids"])) + 1
    rows = StatementRows(statements, probed, RowOptions(answer_tokens=longest))
    learning = config.pretraining
    arguments = training_arguments(
        folder / "training",
        steps=learning.steps,
        schedule="cosine",
        per_device_train_batch_size=learning.batch_size,
        learning_rate=learning.learning_rate,
        warmup_steps=learning.steps // 10,
        seed=config.seed,
    )
    trainer = ForwardOnlyTrainer(
        model=module,
        args=arguments,
        train_dataset=rows,
        data_collator=PadRows(padding_id(tokenizer)),
        objective=probed.objective,
        logit_shift=probed.logit_shift if masked else 0,
        antithetic=True,
    )
    trainer.train()
    shutil.rmtree(folder / "training", ignore_errors=True)
    module.eval()
