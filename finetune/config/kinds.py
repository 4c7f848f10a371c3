"""Which kind of config a file is, told by keys that only this kind has, and the command that takes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ConfigKind:
    """A kind of config file.

    Attributes:
        what: in words, "a sweep of one-layer runs".
        command: the command that takes it.
        call: the function of `revprobe` that takes it from Python; empty where there is none.
        marks: keys, dotted in sections, that no other kind has. The kinds are tried in order, so one that stands
            later may have keys of an earlier one.
        one: a single run, which its command also reads from stdin.
    """

    what: str
    command: str
    call: str
    marks: tuple[str, ...]
    one: bool = False


# The key of fine-tunings' sweeps and of small models both; the latter have marks that come before.
_MODELS = "models"
SWEEP = ConfigKind("a sweep of one-layer runs", "sweep", "rp.run_sweep", ("cells", "base.relation"))
SMALL_MODELS = ConfigKind("a list of small models", "pretrain", "", ("base.corpus", "base.layout"))
SMALL_MODEL = ConfigKind("one small model", "pretrain", "", ("corpus", "layout"))
_OF_FINETUNING_SWEEPS = ("datasets", "base.lora", "base.evaluation", _MODELS)
FINETUNING_SWEEP = ConfigKind("a sweep of fine-tunings", "finetune", "rp.run_sweep", _OF_FINETUNING_SWEEPS)
_OF_FINETUNINGS = ("lora", "evaluation", "model.tiny", "model.name", "relation.direction", "relation.path")
FINETUNING = ConfigKind("a fine-tuning", "finetune", "rp.fine_tune", _OF_FINETUNINGS, one=True)
_OF_RUNS = ("model.family", "model.position_encoding", "relation.length")
RUN = ConfigKind("a one-layer run", "train", "rp.train", _OF_RUNS, one=True)
ACCELERATE = ConfigKind(
    "a config of accelerate", "accelerate launch --config_file", "", ("compute_environment", "distributed_type")
)
KINDS = (SWEEP, SMALL_MODELS, SMALL_MODEL, FINETUNING_SWEEP, FINETUNING, RUN, ACCELERATE)
# What a single run has at the top and a sweep has not: too little to tell a one-layer run from a fine-tuning.
_OF_ONE = ("relation", "model", "training", "snapshots")


def told_kind(values: Mapping[str, Any]) -> tuple[ConfigKind, str] | None:
    """The kind that values are of, and the key that says so; None where none does.

    >>> kind, key = told_kind({"name": "x", "relation": {"length": 10}})
    >>> kind.what, kind.command, key
    ('a one-layer run', 'train', 'relation.length')
    """
    for kind in KINDS:
        for key in kind.marks:
            section, _, inner = key.rpartition(".")
            held = values.get(section) if section else values
            if isinstance(held, Mapping) and inner in held:
                return kind, key
    return None


def another_kind(values: Mapping[str, Any], wanted: ConfigKind, source: str) -> str | None:
    """What to say of values that are not of the kind that was wanted; None where they may be.

    Args:
        wanted: the kind that the command takes.
        source: the file they are from, "stdin", or "the config" for values given in Python.
    """
    found = told_kind(values)
    if found is None and not wanted.one:
        key = next((key for key in _OF_ONE if key in values), None)
        found = None if key is None else (RUN, key)
    if found is None or found[0] == wanted or (wanted == SMALL_MODELS and found[1] == _MODELS):
        return None
    kind, key = found
    return f"{source} is {kind.what} (it has {key!r}); {way_on(kind, source)}"


def way_on(kind: ConfigKind, source: str) -> str:
    """What to do with a config of this kind from where it is."""
    if kind == SMALL_MODEL:
        return "put it under 'models' of a file for `revprobe pretrain`, as examples/mini_models.yaml does"
    if kind == ACCELERATE:
        return f"use `{kind.command} {source} ...`"
    if source == "the config" and kind.call:
        return f"use `{kind.call}`"
    if source == "stdin" and not kind.one:
        return f"write it to a file and use `revprobe {kind.command} FILE`"
    where = {"stdin": "-", "the config": "FILE"}.get(source, source)
    return f"use `revprobe {kind.command} {where}`"
