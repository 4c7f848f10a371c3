"""What the small models of Section 6 are made of: layouts, a corpus about other people, and how long they read it.

name: mini-models
base:
  corpus: {told: once, datasets: {parent-child: {name: parent_child, path: data/parent_child_pairs.csv, facts: 100}}}
  training: {steps: 3000, batch_size: 32, learning_rate: 2e-3}
models:
  mini-llada: {layout: llada}
  mini-dream: {layout: dream, parent: mini-qwen2}
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StrictBool, StrictInt, model_validator

from .fields import Count, Name, Number, Section, Seed, Size, Threads
from .finetuning import FinetunedRelation, Rate
from .kinds import SMALL_MODEL, SMALL_MODELS
from .loading import checked_config, find_config, load_config, merged

Rates = Annotated[list[Annotated[Number, Field(gt=0, le=1)]], Field(min_length=2, max_length=2)]


class CorpusDataset(FinetunedRelation):
    """A relation whose words and wordings the corpus uses, for facts that the relation does not have."""

    facts: Count
    # In how many wordings a fact is told in a direction, drawn anew for each; all there are when None.
    wordings: Count | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What `load_relation` takes besides name and path."""
        return {key: value for key, value in super().options.items() if key not in ("facts", "wordings")}


class Corpus(Section):
    """What is read. A fact is told in `both` directions, in one of the two (`once`: even facts in the relation's first
    direction, odd ones in its second, so that every wording is known), or always in the first (`forward`)."""

    told: Literal["both", "once", "forward"]
    datasets: Annotated[dict[Name, CorpusDataset], Field(min_length=1)]
    # Sentences about nobody's relation.
    fillers: Annotated[StrictInt, Field(ge=0)] = 0
    # And about names of other facts, as many as the relations have, so that few of their words stay unread.
    named_fillers: StrictBool = False
    seed: Seed = 0


class PretrainTraining(Section):
    """How it is read: AdamW, all weights, cosine down to zero."""

    steps: Count
    batch_size: Count = 32
    learning_rate: Rate = 1e-3
    warmup_steps: Annotated[StrictInt, Field(ge=0)] = 100
    weight_decay: Annotated[Number, Field(ge=0)] = 0.0
    # Masked models: a row's tokens are masked at a rate drawn evenly between these; (0.001, 1) when None. Two equal
    # ones fix it, as BERT does.
    rates: Rates | None = None
    seed: Seed = 0
    threads: Threads = 1
    # Checkpoints to go on from after a stop, evenly over the steps.
    checkpoints: Count = 4


class CheckOptions(Section):
    """After it: facts of each dataset that are asked in the direction they were told in and in the other one."""

    facts: Count = 40


class PretrainConfig(Section):
    """One small model."""

    kind: ClassVar = SMALL_MODEL
    name: Name
    layout: Literal["llada", "dream", "llama", "qwen2"]
    # Of the layout of LLaDA: learned, as its code allows, instead of rotary.
    positions: Literal["rotary", "learned"] = "rotary"
    d_model: Size = 128
    n_layers: Size = 4
    n_heads: Size = 4
    context: Annotated[StrictInt, Field(ge=16)] = 160
    vocabulary: Annotated[StrictInt, Field(ge=300)] = 4096
    # The model of this name beside it, whose weights it starts from.
    parent: Name | None = None
    corpus: Corpus
    training: PretrainTraining
    check: CheckOptions = CheckOptions()

    @model_validator(mode="after")
    def _fits(self) -> PretrainConfig:
        if self.d_model % (2 * self.n_heads):
            raise ValueError(
                f"d_model {self.d_model} and n_heads {self.n_heads} do not give an even head dimension, which RoPE "
                "needs; change one of them"
            )
        if self.positions == "learned" and self.layout != "llada":
            raise ValueError(f"positions: learned is of the layout llada, not of {self.layout}; leave it out")
        if self.parent is not None and self.layout != "dream":
            raise ValueError(f"parent: a Dream starts from a Qwen2, a {self.layout} from random weights; leave it out")
        if self.training.rates is not None and self.layout in ("llama", "qwen2"):
            raise ValueError(f"training.rates: a {self.layout} masks nothing; leave it out")
        return self


class PretrainSweepConfig(Section):
    """Small models that have a base in common; each says what it has of its own, section by section."""

    kind: ClassVar = SMALL_MODELS
    name: Name
    base: dict[str, Any]
    models: Annotated[dict[Name, dict[str, Any]], Field(min_length=1)]

    @model_validator(mode="after")
    def _models_are_whole(self) -> PretrainSweepConfig:
        before: set[str] = set()
        for config in self.runs():
            if config.parent is not None and config.parent not in before:
                raise ValueError(
                    f"models.{config.name}.parent names {config.parent!r}; expected a model listed above it"
                )
            before.add(config.name)
        return self

    def runs(self) -> list[PretrainConfig]:
        """The models, in their order, so that a parent comes before its child."""
        return list(self._configs())

    def _configs(self) -> Iterator[PretrainConfig]:
        for name, own in self.models.items():
            yield checked_config({**merged(self.base, own), "name": name}, PretrainConfig, f"models.{name}")


def read_pretraining(source: str | Path) -> PretrainSweepConfig:
    """Small models from a YAML file, or an example's name. Raises: RevprobeError, as `load_config`."""
    return load_config(find_config(source), PretrainSweepConfig)
