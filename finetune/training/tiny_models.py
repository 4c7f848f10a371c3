"""Tiny models in the published layouts of LLaDA, Dream and Llama, with their own tokenizer, trained on other facts.

They stand where the 8B models would: the same classes, checkpoint files and commands, at a size for which two minutes
of two cores are enough. A tiny model knows the relation's templates in both directions before it is fine-tuned, from
facts that are invented for it: the relation's own words, recombined into names that none of its facts has.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, set_seed

from ...models.bases.configs import DreamConfig, LLaDAConfig
from ...models.families.dream import DreamForMaskedDiffusion
from ...models.families.llada import LLaDAForMaskedDiffusion
from ...models.probed import ProbedModel
from ...relations.catalog import TextRelation, TrainingText
from ...relations.invented.other_facts import other_statements
from ..config.finetuning import TinyModel
from .arguments import training_arguments
from .dataset import PadRows, RowOptions, StatementRows, padding_id
from .trainer import ForwardOnlyTrainer

_BEGIN, _END, _PAD, _MASK = "<|begin|>", "<|end|>", "<|pad|>", "<|mask|>"
_CONTEXT = 128


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


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE over these texts, with begin, end, padding and mask tokens; it adds none of them by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[_BEGIN, _END, _PAD, _MASK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    special = {"bos_token": _BEGIN, "eos_token": _END, "pad_token": _PAD, "mask_token": _MASK}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=_CONTEXT, **special)


def untrained(config: TinyModel, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The model of a layout with random weights, from torch's current random state."""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    inner, rotation = 4 * config.d_model, {"rope_type": "default", "rope_theta": 10000.0}
    if config.layout == "llada":
        return LLaDAForMaskedDiffusion(
            LLaDAConfig(
                d_model=config.d_model,
                n_heads=config.n_heads,
                n_layers=config.n_layers,
                mlp_hidden_size=inner,
                max_sequence_length=_CONTEXT,
                rope_theta=10000.0,
                vocab_size=len(tokenizer),
                mask_token_id=tokenizer.mask_token_id,
                **ids,
            )
        )
    size: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_heads,
        "intermediate_size": inner,
        "max_position_embeddings": _CONTEXT,
        "rope_parameters": rotation,
        **ids,
    }
    if config.layout == "dream":
        return DreamForMaskedDiffusion(DreamConfig(mask_token_id=tokenizer.mask_token_id, **size))
    return LlamaForCausalLM(LlamaConfig(**size))


def _pretrain(
    module: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    statements: Sequence[TrainingText],
    config: TinyModel,
    folder: Path,
    answer_tokens: int | None,
) -> None:
    """Train all weights on the statements, with the objective of the layout."""
    masked = config.layout != "llama"
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
