"""What a fine-tuning and its sweep are made of; YAML in, checked objects out, as in `one_layer`.

    name: llada-p2c-s0
    model: {name: GSAI-ML/LLaDA-8B-Base, dtype: bfloat16}
    relation: {name: parent_child, path: parent_child_pairs.csv, direction: P2C}
    training: {epochs: 10, batch_size: 8, learning_rate: 1e-4}

A sweep has a `base` (what all runs share), `models` and `datasets` by label, the directions of each dataset, and
`seeds`; `learning_rates` gives a model, or one of its datasets, a rate of its own; `exclude` leaves some of it out.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StrictBool, StrictInt, StrictStr, model_serializer, model_validator

from ...errors import RevprobeError
from .alerts import ADAPTER, MEASURES, Alert, check_alerts
from .fields import Count, Fraction, Grown, Name, Number, Section, Seed, Size, Threads
from .kinds import FINETUNING, FINETUNING_SWEEP
from .loading import checked_config, find_config, load_config, merged, parse_config, parse_yaml
from .mistakes import require_own_names
from .objective import ObjectiveOptions
from .one_layer import SnapshotsConfig

Text = Annotated[StrictStr, Field(min_length=1)]
Rate = Annotated[Number, Field(gt=0)]
_READS = ("mask_token_id", "block_size", "bidirectional")
Templates = dict[Text, Text | list[Text]]


class Pretraining(Section):
    """What a tiny model learns before: both directions of other facts, so that it knows the templates."""

    facts: Count = 300
    steps: Count = 1000
    batch_size: Count = 64
    learning_rate: Rate = 3e-3


class TinyModel(Section):
    """A model small enough for any machine, in the published layout of a family, built and trained first."""

    layout: Literal["llada", "dream", "llama"]
    d_model: Size = 64
    n_layers: Size = 2
    n_heads: Size = 4
    # Tokens of the byte-level BPE that is learned on the relation's own words.
    vocabulary: Annotated[StrictInt, Field(ge=300)] = 600
    seed: Seed = 0
    pretraining: Pretraining = Pretraining()

    @model_validator(mode="after")
    def _fits(self) -> TinyModel:
        if self.d_model % (2 * self.n_heads):
            raise ValueError(
                f"d_model {self.d_model} and n_heads {self.n_heads} do not give an even head dimension, which RoPE "
                "needs; change one of them"
            )
        return self


class FinetunedModel(Section):
    """What is fine-tuned: a folder or hub name, or a tiny model that the run builds for itself."""

    name: Text | None = None
    tiny: TinyModel | None = None
    # None: as the checkpoint was saved.
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    # QLoRA: the base in 4 bits, on a GPU, with bitsandbytes.
    quantize: Literal["4bit"] | None = None
    # Where the checkpoint's files do not say: the mask token (its id or text), and tokens of a block or the whole text.
    mask_token_id: Annotated[StrictInt, Field(ge=0)] | Text | None = None
    block_size: Count | None = None
    bidirectional: StrictBool = False

    @model_validator(mode="after")
    def _one_source(self) -> FinetunedModel:
        if (self.name is None) == (self.tiny is None):
            raise ValueError("give exactly one of name (a folder or a hub name) and tiny (a model built here)")
        if self.tiny is not None and self.reads:
            raise ValueError(f"a tiny model knows how it reads; leave {', '.join(self.reads)} out, or name a model")
        if self.block_size is not None and self.bidirectional:
            raise ValueError(f"block_size {self.block_size} and bidirectional: true exclude each other; leave one out")
        return self

    @property
    def reads(self) -> dict[str, Any]:
        """What `load_model` is told that the checkpoint's files do not say."""
        told = {key: getattr(self, key) for key in _READS}
        return {key: value for key, value in told.items() if value not in (None, False)}

    @model_serializer(mode="wrap")
    def _only_reads_that_were_told(self, handler: Any) -> dict[str, Any]:
        # A run's config.yaml from before these were there stays the config that it is.
        return {key: value for key, value in handler(self).items() if key not in _READS or key in self.reads}


class FinetunedRelation(Section):
    """Which facts are trained on, without a direction; keys left out are the relation's own defaults."""

    name: Literal["parent_child", "person_description", "pore", "trex", "table", "invented_names"]
    path: Text | None = None
    # T-REx only: which of its relations.
    relation: Text | list[Text] | None = None
    # A table's two entity columns, and for each direction its templates.
    columns: Annotated[list[Text], Field(min_length=2, max_length=2)] | None = None
    templates: Templates | dict[Text, Templates] | None = None
    carrier: StrictStr | None = None
    heldout: Fraction | None = None
    heldout_templates: Annotated[StrictInt, Field(ge=0)] | None = None
    seed: Seed | None = None
    rows: Annotated[list[Annotated[StrictInt, Field(ge=0)]], Field(min_length=2, max_length=2)] | None = None
    duplicates: Literal["error", "merge"] | None = None
    bad_rows: Literal["error", "skip"] | None = None
    encoding: Text | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What `load_relation` takes besides name and path."""
        apart = {"name", "path", "direction", "directions"}
        return {key: value for key, value in self.model_dump().items() if key not in apart}

    @model_serializer
    def _only_what_was_said(self) -> dict[str, Any]:
        return {key: value for key, value in self if value is not None}


class RelationChoice(FinetunedRelation):
    """A relation and the direction that is trained: P2C, C2P, P2D, D2P, s2o, o2s, or a table's own."""

    direction: Text


class LoraOptions(Section):
    """The adapter: w + (alpha / rank) B A on each target."""

    rank: Count = 16
    alpha: Count = 32
    dropout: Fraction = 0.0
    # auto: all attention and MLP projections; attention or mlp: those alone; or names as peft takes them.
    targets: Literal["auto", "attention", "mlp"] | Annotated[list[Text], Field(min_length=1)] = "auto"


class FinetuneTraining(Grown):
    """How it is trained: AdamW, for so many optimizer steps or so many passes over the rows."""

    added: ClassVar = ("min_learning_rate", "adam_beta2")
    steps: Count | None = None
    epochs: Rate | None = None
    batch_size: Count = 8
    gradient_accumulation: Count = 1
    learning_rate: Rate = 1e-4
    warmup_steps: Annotated[StrictInt, Field(ge=0)] = 0
    schedule: Literal["constant", "cosine"] = "cosine"
    # Where the cosine ends.
    min_learning_rate: Annotated[Number, Field(ge=0)] = 0.0
    weight_decay: Annotated[Number, Field(ge=0)] = 0.0
    adam_beta2: Annotated[Number, Field(gt=0, lt=1)] = 0.999
    gradient_clipping: Rate = 1.0
    bf16: StrictBool = False
    gradient_checkpointing: StrictBool = False
    seed: Seed = 0
    threads: Threads = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    report_to: Literal["none", "tensorboard", "wandb"] = "none"

    @model_validator(mode="after")
    def _one_length(self) -> FinetuneTraining:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps (optimizer steps) and epochs (passes over the rows)")
        if self.min_learning_rate and (self.schedule != "cosine" or self.min_learning_rate > self.learning_rate):
            raise ValueError(
                f"training.min_learning_rate {self.min_learning_rate} is where a cosine ends, below learning_rate "
                f"{self.learning_rate}; the schedule is {self.schedule!r}"
            )
        return self

    def total_steps(self, rows: int) -> int:
        """Optimizer steps over `rows` training rows."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None, "validated: one of the two is given"
        return max(1, round(self.epochs * rows / (self.batch_size * self.gradient_accumulation)))


class FinetuneSnapshots(SnapshotsConfig):
    """When checkpoints are written and probed, and with what: one of `every`, `count`, `steps`; 0 and the last too."""

    # Whose gradients are compared: the model's own, the adapter's, or each on its own.
    parameters: Literal["all", "lora", "both"] = "both"
    # Facts whose pairs are probed; all that are trained by default.
    facts: Count | None = None
    batch_size: Count | None = None
    # False: readings are taken from the checkpoints when training is over, as weights spread by FSDP demand.
    during_training: StrictBool = True
    # Also compare what each snapshot's gradients foretell of the next step with what it changed.
    predictions: StrictBool = True


class EvaluationOptions(Grown):
    """How trained and held-out facts are asked: greedy decoding, exact match, and the rank among all candidates."""

    added: ClassVar = ("at", "facts", "candidates")
    # Tokens of an answer; those of the longest that is asked for and one to end it, by default.
    max_new_tokens: Count | None = None
    # Which wordings; those held out from training, where there are some, by default.
    templates: Literal["all", "train", "heldout"] | None = None
    batch_size: Count | None = None
    # When they are asked: after training, or at every snapshot as well.
    at: Literal["last", "snapshots"] = "last"
    # Of each side of the split so many facts at most; 0 asks none at all.
    facts: Annotated[StrictInt, Field(ge=0)] | None = None
    # Also rank the right answer among all entities that answer such a question.
    candidates: StrictBool = False


class FinetuneBase(Grown):
    """Everything about a fine-tuning but its name, model and relation."""

    added: ClassVar = ("alerts",)
    objective: ObjectiveOptions = ObjectiveOptions()
    # null: no adapter, all weights are trained.
    lora: LoraOptions | None = LoraOptions()
    training: FinetuneTraining
    snapshots: FinetuneSnapshots = FinetuneSnapshots(count=5)
    evaluation: EvaluationOptions = EvaluationOptions()
    # When it should be looked at; training is the same with and without.
    alerts: tuple[Alert, ...] = ()

    @model_validator(mode="after")
    def _alerts_can_be_crossed(self) -> FinetuneBase:
        own = {"all": MEASURES, "both": (*MEASURES, ADAPTER)}
        adapter = tuple(ADAPTER if name == "gradient_cosine" else name for name in MEASURES)
        check_alerts(self.alerts, own.get(self.snapshots.parameters, adapter), self.training.steps)
        return self

    @model_validator(mode="after")
    def _fits(self) -> FinetuneBase:
        total = self.training.steps
        late = [step for step in self.snapshots.steps or [] if total is not None and step > total]
        if late:
            raise ValueError(f"snapshots.steps has {late[0]}, but training.steps is {total}; raise one or drop one")
        if self.lora is None and self.snapshots.parameters != "all":
            raise ValueError(
                f"snapshots.parameters is {self.snapshots.parameters!r}, but lora: null trains all weights and has no "
                "adapter; use parameters: all"
            )
        return self


class FinetuneConfig(FinetuneBase):
    """One fine-tuning; it is written into the run's folder, and a resume with another is refused."""

    kind: ClassVar = FINETUNING
    name: Name
    model: FinetunedModel
    relation: RelationChoice
    # What the sweep that asked for it calls its model and its dataset, for the table over all of them.
    label: dict[Literal["model", "dataset", "variant"], Text] | None = None

    @model_validator(mode="after")
    def _can_be_read(self) -> FinetuneConfig:
        if self.model.quantize is not None and self.lora is None:
            raise ValueError(
                f"model.quantize is {self.model.quantize!r}, and weights in 4 bits are not trained; use LoRA"
            )
        if self.model.quantize is not None and self.snapshots.parameters != "lora":
            raise ValueError(
                f"snapshots.parameters is {self.snapshots.parameters!r}, but weights in 4 bits have no gradients; use "
                "parameters: lora"
            )
        return self

    @property
    def axes(self) -> dict[str, Any]:
        """What a sweep varies: model, dataset, the variant where it has some, direction, seed."""
        label = self.label or {}
        tiny = f"tiny-{self.model.tiny.layout}" if self.model.tiny is not None else None
        return {
            "model": label.get("model") or tiny or self.model.name,
            "dataset": label.get("dataset") or self.relation.name,
            **({"variant": label["variant"]} if "variant" in label else {}),
            "direction": self.relation.direction,
            "seed": self.training.seed,
        }


class Dataset(FinetunedRelation):
    """A relation of a sweep and the directions that are trained, each in a run of its own."""

    directions: Annotated[list[Text], Field(min_length=1, max_length=2)]


class FinetuneSweepConfig(Section):
    """Models x datasets x directions x variants x seeds: Table 7 of the paper, and what is varied beside it."""

    kind: ClassVar = FINETUNING_SWEEP
    name: Name
    base: FinetuneBase
    models: Annotated[dict[Name, FinetunedModel], Field(min_length=1)]
    datasets: Annotated[dict[Name, Dataset], Field(min_length=1)]
    seeds: Annotated[list[Seed], Field(min_length=1)] = [0, 1, 2]
    # model -> its rate, or dataset -> rate; the base's where neither is given.
    learning_rates: dict[Name, Rate | dict[Name, Rate]] = {}
    # What is varied besides: of each variant the keys that differ from the base, section by section; `model` and
    # `relation` among them change what it is fine-tuned from and on.
    variants: dict[Name, dict[str, Any]] = {}
    # model or dataset -> the keys that its runs have of their own, whatever the variant.
    overrides: dict[Name, dict[str, Any]] = {}
    # What of the product is not run: {model: a, variant: b} leaves out all runs of that variant of that model.
    exclude: list[dict[Literal["model", "dataset", "direction", "variant"], Text]] = []

    @model_validator(mode="after")
    def _known_labels(self) -> FinetuneSweepConfig:
        for model, rates in self.learning_rates.items():
            if model not in self.models:
                raise ValueError(f"learning_rates names the model {model!r}; expected some of {', '.join(self.models)}")
            for dataset in rates if isinstance(rates, dict) else ():
                if dataset not in self.datasets:
                    known = ", ".join(self.datasets)
                    raise ValueError(f"learning_rates.{model} names the dataset {dataset!r}; expected some of {known}")
        for label in self.overrides:
            if label not in (known_labels := [*self.models, *self.datasets]):
                raise ValueError(f"overrides names {label!r}; expected some of {', '.join(known_labels)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {self.seeds} holds one twice; each run needs a seed of its own")
        for entry in self.exclude:
            if not any(entry.items() <= cell.items() for cell in self._product()):
                labels = {key: list(dict.fromkeys(str(cell[key]) for cell in self._product())) for key in entry}
                raise ValueError(f"exclude names {entry}, none of this sweep's runs; expected of {labels}")
        if all(map(self._excluded, self._product())):
            raise ValueError("exclude leaves no run; take out the entry that names too much")
        require_own_names((run.name, run.axes) for run in self.runs())  # what else is wrong in one is told now, too
        return self

    def runs(self) -> list[FinetuneConfig]:
        """The runs, named like llada-parent-child-P2C-s0 or llada-parent-child-P2C-one-span-s0."""
        cells = [cell for cell in self._product() if not self._excluded(cell)]
        return [self._run(**cell, seed=seed) for cell in cells for seed in self.seeds]

    def _product(self) -> Iterator[dict[str, Any]]:
        for dataset, chosen in self.datasets.items():
            for direction, model, variant in product(chosen.directions, self.models, self.variants or [None]):
                yield {"model": model, "dataset": dataset, "direction": direction, "variant": variant}

    def _excluded(self, cell: dict[str, Any]) -> bool:
        return any(entry.items() <= cell.items() for entry in self.exclude)

    def _run(self, *, model: str, dataset: str, direction: str, variant: str | None, seed: int) -> FinetuneConfig:
        values = self.base.model_dump()
        relation = self.datasets[dataset].model_dump() | {"direction": direction}
        relation.pop("directions")
        values |= {"model": self.models[model].model_dump(), "relation": relation}
        rates = self.learning_rates.get(model)
        rate = rates.get(dataset) if isinstance(rates, dict) else rates
        values["training"] |= {"seed": seed} | ({} if rate is None else {"learning_rate": rate})
        own = (self.overrides.get(model), self.overrides.get(dataset), self.variants.get(variant or ""))
        for changes in filter(None, own):
            values = merged(values, changes)
        parts = [model, dataset, direction, *([] if variant is None else [variant]), f"s{seed}"]
        label = {"model": model, "dataset": dataset, **({} if variant is None else {"variant": variant})}
        values |= {"name": "-".join(parts), "label": label}
        return checked_config(values, FinetuneConfig, variant or model)


def read_finetune(source: str | Path) -> FinetuneConfig | FinetuneSweepConfig:
    """A fine-tuning's or a sweep's YAML file, or an example's name; a sweep has `models`.

    Raises: RevprobeError, as `load_config`.
    """
    path = find_config(source)
    return load_config(path, FinetuneSweepConfig) if is_sweep_text(path) else load_config(path, FinetuneConfig)


def parse_finetune(text: str, source: str) -> FinetuneConfig:
    """One fine-tuning from text. Raises: RevprobeError, as `parse_config`."""
    return parse_config(text, FinetuneConfig, source)


def is_sweep_text(path: Path) -> bool:
    """Whether a YAML file is a sweep of fine-tunings; one that is no YAML is reported by `load_config`."""
    return "models" in _keys(path)


def is_finetuning_text(path: Path) -> bool:
    """Whether a run's config.yaml is of a fine-tuning: it has a `lora` section."""
    return "lora" in _keys(path)


def _keys(path: Path) -> set[str]:
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (RevprobeError, UnicodeDecodeError):
        return set()
    return set(values) if isinstance(values, dict) else set()
