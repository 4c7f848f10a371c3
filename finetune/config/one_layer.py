"""What a run and a sweep are made of: YAML in, checked objects out, and one clear line when a key is wrong.

    name: rope-l10-s0
    relation: {name: letters, length: 10}
    model: {family: radd, position_encoding: rope, d_model: 64}
    training: {steps: 5000, batch_size: 128, learning_rate: 1e-3}
    snapshots: {count: 12}

A sweep has a `base` (a run without a name) and `cells`, each a grid over objective, position_encoding, length, seed.
It may name `variants`, changes to the base such as {name: wide, model: {d_model: 128}}, and a cell the ones it takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

import numpy as np
from pydantic import (
    BeforeValidator,
    Field,
    StrictBool,
    StrictInt,
    ValidationError,
    model_serializer,
    model_validator,
)

from ...errors import did_you_mean
from .alerts import MEASURES, Alert, check_alerts
from .fields import Count, Fraction, Grown, Length, Name, Names, Number, Section, Seed, Size, Threads, as_listed
from .kinds import RUN, SWEEP
from .mistakes import explain

PositionEncoding = Literal["rope", "alibi", "absolute", "none", "scalar"]
# The controls that need no other model; see `probes.controls`.
SnapshotControl = Literal["shuffled", "untrained", "neighbour", "sink", "all"]
DropoutSite = Literal["embedding", "attention_weights", "attention", "mlp"]
Rates = Literal["independent", "t", "lambda", "k"]
Dial = Literal[
    "keep",
    "drop-right",
    "drop-left",
    "drop-both",
    "drop-right-matched",
    "drop-left-matched",
    "mirror",
    "drop-after",
]
Objective = Literal["masked", "causal"]
# The dials that say something about an objective.
DIALS: dict[str, list[str]] = {
    "masked": [dial for dial in get_args(Dial) if dial != "drop-after"],
    "causal": ["keep", "drop-after"],
}
# How a cell names the base itself among its variants.
AS_BASE = "base"


_RADD_ONLY = ("initialization", "head_bias", "dropout_sites")


class RelationConfig(Section):
    """Which facts are trained, in the forward direction only."""

    name: Literal["letters"] = "letters"
    length: Length = 10
    alphabet: Annotated[StrictInt, Field(ge=2)] = 26


class ModelConfig(Section):
    """What is trained: RADD (masked diffusion) or GPT-2 (causal), and its size."""

    family: Literal["radd", "gpt2"] = "radd"
    # None is the family's own: rope for RADD; GPT-2 has learned absolute positions and no other.
    position_encoding: PositionEncoding | None = None
    d_model: Size = 64
    n_layers: Size = 1
    n_heads: Size = 1
    mlp_ratio: Size = 4
    dropout: Fraction = 0.0
    # RADD only. normal: N(0, 0.02) throughout; published: what RADD's own code starts from.
    initialization: Literal["normal", "published"] = "normal"
    head_bias: StrictBool = False
    dropout_sites: tuple[DropoutSite, ...] = ("embedding", "attention_weights", "attention", "mlp")

    @model_validator(mode="before")
    @classmethod
    def _own_position_encoding(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("position_encoding") is None:
            return {**given, "position_encoding": "absolute" if given.get("family") == "gpt2" else "rope"}
        return given

    @model_validator(mode="after")
    def _fits(self) -> ModelConfig:
        if self.family == "gpt2" and self.position_encoding != "absolute":
            raise ValueError(
                f"gpt2 with position_encoding {self.position_encoding!r}: it has learned absolute positions only; "
                "leave the key out, or use family radd"
            )
        changed = [key for key in _RADD_ONLY if getattr(self, key) != type(self).model_fields[key].default]
        if self.family == "gpt2" and changed:
            raise ValueError(f"gpt2 with {changed[0]}: only radd has it; leave the key out")
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model {self.d_model} is not divisible by n_heads {self.n_heads}; change one of them")
        if self.position_encoding == "rope" and (self.d_model // self.n_heads) % 2:
            raise ValueError(f"rope needs an even head dimension, got {self.d_model // self.n_heads}; change d_model")
        return self

    @property
    def objective(self) -> Objective:
        return "masked" if self.family == "radd" else "causal"


class SwitchConfig(Section):
    """From step `step` on, other negatives, everything else as it was: {step: 5000, negatives: drop-right}."""

    step: Count
    negatives: Dial


class TrainingConfig(Section):
    """How it is trained. AdamW throughout; `steps` are optimizer steps."""

    steps: Count
    batch_size: Count = 128
    learning_rate: Annotated[Number, Field(gt=0)] = 1e-3
    warmup_steps: Annotated[StrictInt, Field(ge=0)] = 500
    # After the warm-up: constant, or a cosine down to zero at the last step.
    schedule: Literal["constant", "cosine"] = "constant"
    weight_decay: Annotated[Number, Field(ge=0)] = 0.0
    # null clips nothing.
    gradient_clipping: Annotated[Number, Field(gt=0)] | None = 1.0
    # Masked models only; null keeps no average.
    ema_decay: Annotated[Number, Field(gt=0, lt=1)] | None = 0.999
    # The loss of a row: its mean over tokens, or their sum (which is what RADD clips the gradient of).
    loss: Literal["token", "sequence"] = "token"
    # How masking rates are drawn, and how many tokens are masked: by the rate, one ("single"), or exactly so many.
    # See `finetune.training.objectives`.
    rates: Rates = "independent"
    masks: Literal["rate", "single"] | Annotated[StrictInt, Field(ge=1)] = "rate"
    # Which terms of the loss are left out, or weighted; see `finetune.training.negatives`.
    negatives: Dial = "keep"
    negative_weight: Fraction = 0.0
    switch: SwitchConfig | None = None
    seed: Seed = 0
    # Threads of this run. Results depend on it in the last bits, so it belongs to the run and not to the machine.
    threads: Threads = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @model_validator(mode="after")
    def _switches_within_training(self) -> TrainingConfig:
        if self.switch is not None and self.switch.step >= self.steps:
            raise ValueError(f"switch.step {self.switch.step} is not before training.steps, {self.steps}")
        if self.masks != "rate" and self.rates != "independent":
            raise ValueError(f"rates {self.rates!r} with masks {self.masks!r}: no rate is drawn then; leave one out")
        return self

    def dial_at(self, step: int) -> Dial:
        """The negatives that the step after `step` steps is taken with."""
        return self.switch.negatives if self.switch is not None and step >= self.switch.step else self.negatives


class StepsConfig(Section):
    """Steps of a training: one of `every`, `count`, `steps`. Step 0 and the last always are."""

    every: Count | None = None
    count: Count | None = None
    steps: list[Annotated[StrictInt, Field(ge=0)]] | None = None

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if sum(rule is not None for rule in (self.every, self.count, self.steps)) != 1:
            raise ValueError("give exactly one of every (each N steps), count (log-spaced) or steps (a list)")
        return self

    @model_serializer
    def _only_the_rule(self) -> dict[str, Any]:
        return {key: value for key, value in self if value is not None}

    def resolve(self, total: int) -> list[int]:
        """The steps themselves, ascending, from 0 to `total`.

        `count` spaces that many steps evenly in the logarithm between total / 100 and total, so that the early
        steps, where most changes, are seen closely.

        >>> StepsConfig(every=400).resolve(1000)
        [0, 400, 800, 1000]
        >>> StepsConfig(count=3).resolve(1000)
        [0, 10, 100, 1000]
        """
        if self.every is not None:
            chosen = list(range(0, total, self.every))
        elif self.count is not None:
            chosen = [round(step) for step in np.geomspace(max(1, total / 100), total, self.count).tolist()]
        else:
            chosen = list(self.steps or [])
        return sorted({0, *chosen, total})


class SnapshotsConfig(StepsConfig):
    """When checkpoints are written and probed; `answers` are further steps at which the answers alone are read.

    `controls`: what signatures are held against beside shuffled facts, at every snapshot: passes of their own. A name
    by itself is a list of one.
    """

    answers: StepsConfig | None = None
    controls: Annotated[tuple[SnapshotControl, ...] | None, BeforeValidator(as_listed)] = None


class BaseConfig(Grown):
    """Everything about a run but its name."""

    added: ClassVar = ("alerts",)
    relation: RelationConfig = RelationConfig()
    model: ModelConfig = ModelConfig()
    training: TrainingConfig
    snapshots: SnapshotsConfig = SnapshotsConfig(count=12)
    # When it should be looked at; training is the same with and without.
    alerts: tuple[Alert, ...] = ()

    @model_validator(mode="after")
    def _alerts_can_be_crossed(self) -> BaseConfig:
        check_alerts(self.alerts, MEASURES, self.training.steps)
        return self

    @model_validator(mode="after")
    def _snapshots_within_training(self) -> BaseConfig:
        rules = {"snapshots.steps": self.snapshots, "snapshots.answers.steps": self.snapshots.answers}
        for key, rule in rules.items():
            late = [step for step in (rule and rule.steps) or [] if step > self.training.steps]
            if late:
                raise ValueError(
                    f"{key} has {late[0]}, but training.steps is {self.training.steps}; raise one or drop one"
                )
        return self

    @property
    def snapshot_steps(self) -> list[int]:
        """The steps at which this run is checkpointed and probed."""
        return self.snapshots.resolve(self.training.steps)

    @property
    def answer_steps(self) -> list[int]:
        """The steps at which its answers are read: the snapshots', and those asked for besides."""
        more = self.snapshots.answers.resolve(self.training.steps) if self.snapshots.answers else []
        return sorted({*self.snapshot_steps, *more})


class RunConfig(BaseConfig):
    """One training run; `train` writes it into the run's folder and refuses to resume with another."""

    kind: ClassVar = RUN
    name: Name

    @model_validator(mode="after")
    def _objective_has_the_dial(self) -> RunConfig:
        training, objective = self.training, self.model.objective
        for dial in [training.negatives, *([training.switch.negatives] if training.switch else [])]:
            if dial not in DIALS[objective]:
                raise ValueError(f"negatives {dial!r} for a {objective} model{did_you_mean(dial, DIALS[objective])}")
        if objective == "causal" and (training.rates, training.masks) != ("independent", "rate"):
            raise ValueError("training.rates and training.masks are a masked model's; leave them out for gpt2")
        if isinstance(training.masks, int) and training.masks > self.relation.length:
            raise ValueError(
                f"training.masks is {training.masks}, but the sequences have {self.relation.length} tokens"
            )
        return self

    @property
    def axes(self) -> dict[str, Any]:
        """What a sweep varies: objective, position_encoding, length, seed."""
        return {
            "objective": self.model.objective,
            "position_encoding": self.model.position_encoding,
            "length": self.relation.length,
            "seed": self.training.seed,
        }


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) or value is None else [value]


class Cell(Section):
    """A grid: every combination of the listed values is one run. An axis left out keeps the base's value."""

    objective: Annotated[list[Objective] | None, BeforeValidator(_as_list)] = None
    position_encoding: Annotated[list[PositionEncoding] | None, BeforeValidator(_as_list)] = None
    length: Annotated[list[Length] | None, BeforeValidator(_as_list)] = None
    seed: Annotated[list[Seed] | None, BeforeValidator(_as_list)] = None
    # Names of the sweep's variants, or "base" for the base as it is; "wide+drop-right" is both, in this order. The base
    # alone when left out.
    variant: Annotated[list[Names] | None, BeforeValidator(_as_list)] = None

    def combinations(self, base: BaseConfig) -> Iterator[tuple[Objective, PositionEncoding | None, int, int]]:
        """The (objective, position_encoding, length, seed) of each run."""
        objectives = self.objective or [base.model.objective]
        lengths, seeds = self.length or [base.relation.length], self.seed or [base.training.seed]
        for objective in objectives:
            own = base.model.position_encoding if objective == base.model.objective else None
            encodings: list[PositionEncoding | None] = [*self.position_encoding] if self.position_encoding else [own]
            yield from product([objective], encodings, lengths, seeds)


class Variant(Section):
    """A named change to the base, e.g. {name: wide, model: {d_model: 128}}; its runs are called rope-l10-s0-wide."""

    name: Name
    model: dict[str, Any] = {}
    training: dict[str, Any] = {}
    # Takes the place of the base's.
    snapshots: dict[str, Any] = {}

    @model_validator(mode="after")
    def _leaves_the_axes_alone(self) -> Variant:
        for section, keys in (("model", ("family", "position_encoding")), ("training", ("seed",))):
            for key in keys:
                if key in getattr(self, section):
                    raise ValueError(f"variant {self.name!r} sets {section}.{key}, which the cells set; say it there")
        if self.name == AS_BASE or not (self.model or self.training or self.snapshots):
            raise ValueError(
                f"variant {self.name!r} changes nothing, or is called {AS_BASE!r}; expected a name of its own and some "
                "keys of model, training or snapshots"
            )
        return self

    def apply(self, base: BaseConfig) -> BaseConfig:
        """The base with this change. Raises: ValueError, one line, when the changed base is not valid."""
        values = base.model_dump()
        values["model"] |= self.model
        values["training"] |= self.training
        values["snapshots"] = self.snapshots or values["snapshots"]
        try:
            return BaseConfig(**values)
        except ValidationError as error:
            raise ValueError(explain(error, BaseConfig, f"variant {self.name!r}")) from error


class SweepConfig(Section):
    """Many runs that differ in objective, position encoding, length, seed or a named variant, and in nothing else."""

    kind: ClassVar = SWEEP
    name: Name
    base: BaseConfig
    variants: list[Variant] = []
    cells: Annotated[list[Cell], Field(min_length=1)]

    @model_validator(mode="after")
    def _every_variant_is_known(self) -> SweepConfig:
        known = [AS_BASE, *(variant.name for variant in self.variants)]
        twice = [name for name in known if known.count(name) > 1]
        if twice:
            raise ValueError(f"two variants are called {twice[0]!r}; give each a name of its own")
        for wanted in (name for cell in self.cells for names in cell.variant or [] for name in names.split("+")):
            if wanted not in known:
                raise ValueError(f"a cell asks for the variant {wanted!r}{did_you_mean(wanted, known)}")
        return self

    @model_validator(mode="after")
    def _no_run_twice(self) -> SweepConfig:
        names = [run.name for run in self.runs()]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"the cells ask for {', '.join(twice)} more than once; let each run stand in one cell")
        return self

    def runs(self) -> list[RunConfig]:
        """The runs in the order of the cells, named like rope-l10-s0 or arm-l10-s0, and rope-l10-s0-wide."""
        variants = {variant.name: variant for variant in self.variants}
        found = []
        for cell in self.cells:
            for names in cell.variant or [AS_BASE]:
                changed, suffix = self.base, ""
                for variant in (variants[name] for name in names.split("+") if name != AS_BASE):
                    changed, suffix = variant.apply(changed), f"{suffix}-{variant.name}"
                for objective, encoding, length, seed in cell.combinations(self.base):
                    values = changed.model_dump()
                    family = "radd" if objective == "masked" else "gpt2"
                    values["model"] |= {"family": family, "position_encoding": encoding}
                    values["relation"]["length"], values["training"]["seed"] = length, seed
                    if objective == "causal":  # it has of the base what a causal model can have
                        values["model"] = {k: v for k, v in values["model"].items() if k not in _RADD_ONLY}
                        values["training"] |= {"rates": "independent", "masks": "rate"}
                    stem = "arm" if objective == "causal" else ModelConfig(**values["model"]).position_encoding
                    name = f"{stem}-l{length}-s{seed}{suffix}"
                    try:
                        found.append(RunConfig(name=name, **values))
                    except ValidationError as error:
                        raise ValueError(explain(error, RunConfig, f"run {name!r}")) from error
        return found
