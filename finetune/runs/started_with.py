"""What a fine-tuning was started with: digests of its rows, pairs, facts and base, which a resume is held against.

A run's config names its facts and its base, and both can change under those names. What was trained on the one and goes
on with the other is neither run, so it is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from ...errors import RevprobeError
from ...models.checkpoints import checkpoint_steps
from ...models.peft_adapters import BASE
from ...relations.text_relation import TextRelation
from ..config.finetuning import FinetuneConfig
from ..training.checkpointing import checksum
from ..training.dataset import TokenRow
from .relation_copy import copy_of, differs_from_copy

DIGESTS, BASE_SHA256 = "digests", "base_sha256"
# What runs of before say of their rows, pairs and model as well.
_TOLD = ("objective", "logit_shift", "block_size", "steps", "rows", "answer_tokens", "targets", "pairs", "kind")
_WORDS = {"rows": "training rows", "pairs": "probed pairs", "facts": "facts", "base": "base model"}


def digests(
    config: FinetuneConfig, relation: TextRelation, rows: Iterable[TokenRow], pairs: str, folder: Path
) -> dict[str, Any]:
    """What is held against later: each digest, and as runs of before had it the sha256 of a base in one file.

    Args:
        pairs: their own digest.
        folder: the run's, which holds the base that it built for itself.
    """
    weights = base_digests(config, folder)
    plain = f"{SAFE_WEIGHTS_NAME} "
    told = [one.removeprefix(plain) for one in weights if one.startswith(plain)]
    own = {BASE_SHA256: told[0]} if told and config.model.tiny is None and Path(str(config.model.name)).is_dir() else {}
    found = {"rows": _sha256(map(repr, rows)), "pairs": pairs, "facts": facts_digest(relation)}
    return own | {DIGESTS: found | ({"base": _sha256(weights)} if weights else {})}


def base_digests(config: FinetuneConfig, folder: Path) -> list[str]:
    """The config and the weights that training starts from, a line each; a snapshot of the hub goes by its commit."""
    name = str(config.model.name)
    source = folder / BASE if config.model.tiny is not None else Path(name)
    if source.is_dir():
        files = [source / CONFIG_NAME, *source.glob("*.safetensors")]
        return sorted(f"{file.name} {checksum(file)}" for file in files if file.is_file())
    cached = try_to_load_from_cache(name, CONFIG_NAME) if config.model.tiny is None else None
    return [f"commit {Path(cached).parent.name}"] if isinstance(cached, str) else []


def facts_digest(relation: TextRelation) -> str:
    """Of every statement in order, and of which facts are held out or unused in which direction."""
    told = [repr(one) for direction in relation.directions for one in relation.statements[direction]]
    split = [
        f"{kind} {direction} {part[direction].tolist()}"
        for kind, part in (("heldout", relation.heldout), ("unused", relation.unused))
        for direction in sorted(part)
    ]
    return _sha256([repr(relation.carrier), *told, *split])


def require_same_start(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any], config: FinetuneConfig) -> None:
    """Hold what a run with a checkpoint goes on with against what it was started with.

    Args:
        before, now: the run's resolved.json, and what it would be. Runs of before have no digests there: of them the
            counts are compared, the sha256 of the base, and their own copy of the facts.
    Raises: RevprobeError, naming what changed, and where the run's own copy is.
    """
    if not before or not checkpoint_steps(folder):
        return
    kept, found = before.get(DIGESTS), now[DIGESTS]
    if kept is None:
        changed = ["base model"] if before.get(BASE_SHA256, now.get(BASE_SHA256)) != now.get(BASE_SHA256) else []
        changed += ["facts"] if differs_from_copy(folder, config.relation.path) else []
    else:
        changed = [words for key, words in _WORDS.items() if kept.get(key) != found.get(key)]
    counts = [key for key in _TOLD if key in before and key in now and before[key] != now[key]]
    changed += [f"{key} {before[key]} -> {now[key]}" for key in counts]
    if changed:
        raise RevprobeError(
            f"{folder} was started with other data: {', '.join(changed)} changed; {_way_out(folder, config, changed)}, "
            "or choose another name or folder"
        )


def _way_out(folder: Path, config: FinetuneConfig, changed: list[str]) -> str:
    """What to put back, by the names of the config."""
    ways = []
    if "facts" in changed:
        copy = copy_of(folder, config.relation.path)
        source = config.relation.path or config.relation.name
        ways.append(f"restore {source}" + ("" if copy is None else f" (the run's own copy is {copy})"))
    if "base model" in changed:
        ways.append(f"restore {folder / BASE if config.model.tiny is not None else config.model.name}")
    return " and ".join(ways) or "restore the versions in versions.json and the base's tokenizer"


def _sha256(parts: Iterable[str]) -> str:
    state = hashlib.sha256()
    for part in parts:
        state.update(part.encode() + b"\0")
    return state.hexdigest()
