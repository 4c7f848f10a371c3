"""What a fine-tuning was started with: digests of its rows, pairs, facts and base, which a resume is held against.

A run's config names its facts and its base, and both can change under those names. What was trained on the one and goes
on with the other is neither run, so it is refused. The base is known by what was loaded, not by files: a folder, the
newest checkpoint of a run, a name on the hub and a loader of the user's are held to it alike, and what lies beside the
weights may change.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from ...errors import RevprobeError
from ...models.checkpoints import CHECKPOINTS, checkpoint_steps, step_name
from ...models.peft_adapters import BASE
from ...models.probed import ProbedModel
from ...models.registry import registered
from ...models.tokenizers import load_tokenizer
from ...models.weights_digest import settings_digest, weights_digest
from ...relations.text_relation import TextRelation
from ..config.finetuning import FinetuneConfig
from ..training.checkpointing import checksum
from ..training.dataset import TokenRow
from .relation_copy import copy_of, differs_from_copy
from .run import other_versions

DIGESTS, BASE_SHA256 = "digests", "base_sha256"
# Which formulas a run is trained, read and asked by: one more with each change of one, told by `_other_formulas`.
FORMULAS, FORMULAS_NOW = "formulas", 2
# What no version reads otherwise of the same files: another one is another run, whatever software it is read with.
_TOKENS = ("mask_token_id", "mask_token", "begin_token_id")
# What runs of before say of their rows, pairs and model as well.
_COUNTS = ("steps", "rows", "answer_tokens", "targets", "pairs", "kind")
_TOLD = ("objective", "logit_shift", "block_size", *_COUNTS, *_TOKENS)
_WEIGHTS, _SETTINGS, _FILES = "weights", "settings", "base"  # the last of runs of before alone
_WORDS = {"rows": "training rows", "pairs": "probed pairs", "facts": "facts"}
_WORDS |= dict.fromkeys((_WEIGHTS, _SETTINGS, _FILES), "base model")


def digests(
    config: FinetuneConfig,
    relation: TextRelation,
    model: ProbedModel,
    rows: Iterable[TokenRow],
    pairs: str,
    folder: Path,
) -> dict[str, Any]:
    """What is held against later: each digest, and beside them the sha256 of a base that is one file.

    Args:
        model: the base as it was loaded, before anything is trained.
        pairs: their own digest.
        folder: the run's, which holds the base that it built for itself.
    """
    source = None if config.model.tiny is not None else _folder_of_base(config, folder)
    file = None if source is None else source / SAFE_WEIGHTS_NAME
    own = {BASE_SHA256: checksum(file)} if file is not None and file.is_file() else {}
    found = {"rows": _sha256(map(repr, rows)), "pairs": pairs, "facts": facts_digest(relation)}
    return own | {FORMULAS: FORMULAS_NOW, DIGESTS: found | base_digests(model)}


def base_digests(model: ProbedModel) -> dict[str, str]:
    """The base's weights, every byte of them, and how they are read: settings, mask, shift, begin token, blocks.

    It takes about a tenth of the time of loading: 0.7 s beside 6 s for 107 M parameters on one core.
    """
    reads = (model.objective, model.mask_token_id, model.logit_shift, model.begin_token_id, model.block_size)
    read = _sha256([settings_digest(model.module), repr(reads)])
    return {_WEIGHTS: weights_digest(model.module), _SETTINGS: read}


def _folder_of_base(config: FinetuneConfig, folder: Path) -> Path | None:
    """The folder that the base's files are read from, where the config says one by itself."""
    name = str(config.model.name)
    source = folder / BASE if config.model.tiny is not None else Path(name)
    return source if source.is_dir() and name not in registered() else None


def _digest_of_before(config: FinetuneConfig, folder: Path) -> dict[str, str]:
    """What runs of before kept of a base: the config and the weights of a folder, file by file.

    A base on the hub went by its commit, which moves without the weights: it tells nothing.
    """
    source = _folder_of_base(config, folder)
    files = () if source is None else (source / CONFIG_NAME, *source.glob("*.safetensors"))
    lines = sorted(f"{file.name} {checksum(file)}" for file in files if file.is_file())
    return {_FILES: _sha256(lines)} if lines else {}


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
        before, now: the run's resolved.json, and what it would be. What both have is compared. Runs of before have no
            digests there: of them the counts are compared, the sha256 of the base, and their own copy of the facts.
            Where it does not say the mask token, or is gone, the newest checkpoint's own tokenizer and config do.
    Raises: RevprobeError, naming what changed, and where the run's own copy is.
    Warns: where the base's settings alone are others and the software is too, which may read the same files otherwise;
        and where what follows is by other formulas than what is there.
    """
    if not checkpoint_steps(folder):
        return
    if before and (others := _other_formulas(before, now, config)):
        warnings.warn(
            f"{folder} was started by other formulas, or before they had a number: {'; '.join(others)}; to hold its "
            "steps against each other, train it anew in another folder",
            stacklevel=5,
        )
    changed = _other_data(folder, before, now, config) if before else []
    # A base that is read as a whole notes no block size; a run whose notes are gone says nothing at all.
    whole: dict[str, Any] = {"block_size": None}
    was, here = {**whole, **before} if before else {}, {**whole, **now}
    if here.get("objective") == "masked" and "mask_token" not in was:
        was = _mask_of_checkpoint(folder, config, was.get("mask_token_id")) | was
    moved = [key for key in _TOLD if key in was and key in here and was[key] != here[key]]
    changed += [_moved(key, was[key], here[key]) for key in moved]
    if changed:
        raise RevprobeError(
            f"{folder} was started with other data: {', '.join(changed)} changed; {_way_out(folder, config, changed)}, "
            "or choose another name or folder"
        )


def _other_data(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any], config: FinetuneConfig) -> list[str]:
    """Which of rows, pairs, facts and base are others, in words. Warns: as `require_same_start`, of settings alone."""
    kept, found = before.get(DIGESTS), now[DIGESTS]
    if kept is None:
        changed = ["base model"] if before.get(BASE_SHA256, now.get(BASE_SHA256)) != now.get(BASE_SHA256) else []
        return changed + (["facts"] if differs_from_copy(folder, config.relation.path) else [])
    found = found | (_digest_of_before(config, folder) if _FILES in kept else {})
    differ = [key for key in _WORDS if key in kept and key in found and kept[key] != found[key]]
    if differ == [_SETTINGS] and (newer := other_versions(folder)):
        warnings.warn(
            f"{folder}: the base's settings are not those it was started with, which other versions may read "
            f"otherwise ({', '.join(newer)}); restore them, or see that its config.json is the same",
            stacklevel=6,
        )
        return []
    return list(dict.fromkeys(_WORDS[key] for key in differ))


def mask_told(model: ProbedModel) -> dict[str, Any]:
    """The mask token by its id, and by its text: the same id may stand for another token in another vocabulary."""
    return _named(model.mask_token_id, model.tokenizer)


def _named(mask: int | None, tokenizer: Any) -> dict[str, Any]:
    text = None if mask is None or tokenizer is None else tokenizer.convert_ids_to_tokens(mask)
    return {"mask_token_id": mask, "mask_token": text}


def _mask_of_checkpoint(folder: Path, config: FinetuneConfig, known: int | None) -> dict[str, Any]:
    """The mask token that a run's newest checkpoint was trained with, as far as its files say; empty where they do not.

    They are read as a base's are: what the config tells, else the tokenizer's own, else the config.json's of a whole
    model. A loader of the user's may say otherwise than its tokenizer, so nothing is told of its runs.
    Args:
        known: the id, where resolved.json has it.
    """
    told, checkpoint = config.model.mask_token_id, folder / CHECKPOINTS / step_name(checkpoint_steps(folder)[-1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one that is damaged is told where the checkpoint is taken up
        tokenizer, file = load_tokenizer(checkpoint, str(checkpoint)), checkpoint / CONFIG_NAME
    if tokenizer is None or str(config.model.name) in registered():
        return {}
    mask = tokenizer.get_vocab().get(told) if isinstance(told, str) else told
    if mask is None:
        mask = tokenizer.mask_token_id
    if mask is None and file.is_file():
        with suppress(ValueError, AttributeError):
            mask = json.loads(file.read_text(encoding="utf-8")).get("mask_token_id")
    mask = mask if known is None else known
    return {} if mask is None else _named(mask, tokenizer)


def _moved(key: str, was: Any, now: Any) -> str:
    """What was told, before and now, in words; a token as a literal, since any letter may stand in it."""
    return f"{key} {was!r} -> {now!r}" if key == "mask_token" else f"{key} {was} -> {now}"


def _other_formulas(before: Mapping[str, Any], now: Mapping[str, Any], config: FinetuneConfig) -> list[str]:
    """What this run would be computed otherwise than it was until here; runs of before the number say none."""
    was = before.get(FORMULAS, 0)
    if was == FORMULAS_NOW:
        return []
    if was > FORMULAS_NOW:
        return [f"those of a later version (number {was}, not {FORMULAS_NOW})"]
    told = _before_numbers(now, config) if was < 1 else []
    if config.evaluation.facts != 0:
        told.append("controls of exact match and ranks now ask about another fact, once for another fact's answer")
    return told


def _before_numbers(now: Mapping[str, Any], config: FinetuneConfig) -> list[str]:
    """What was otherwise before formulas had a number."""
    training, told = config.training, []
    split = training.gradient_accumulation > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1
    if now.get("objective") == "causal" and split:
        told.append("the loss is now a mean over a step's tokens, once a mean of its parts' means")
    if training.bf16 and config.lora is None:
        told.append("readings are now in the dtype of the weights, once in bfloat16")
    if config.evaluation.facts:
        told.append(f"facts: {config.evaluation.facts} now draws facts that are asked both ways, once others")
    return told


def _way_out(folder: Path, config: FinetuneConfig, changed: list[str]) -> str:
    """What to put back, by the names of the config."""
    ways = []
    if "facts" in changed:
        copy = copy_of(folder, config.relation.path)
        source = config.relation.path or config.relation.name
        ways.append(f"restore {source}" + ("" if copy is None else f" (the run's own copy is {copy})"))
    if "base model" in changed:
        name, own = str(config.model.name), config.model.tiny is not None
        called = f"have the loader registered as {name!r} return the same base anew at each call"
        back = called if not own and name in registered() else f"restore {folder / BASE if own else name}"
        ways.append(back + (" or the versions in versions.json" if other_versions(folder) else ""))
    if not ways and all(one.startswith(_TOKENS) for one in changed):
        files = f"restore the tokenizer and config.json of {folder / BASE if config.model.tiny else config.model.name}"
        return files + (" or the versions in versions.json" if other_versions(folder) else "")
    return " and ".join(ways) or "restore the versions in versions.json and the base's tokenizer"


def _sha256(parts: Iterable[str]) -> str:
    state = hashlib.sha256()
    for part in parts:
        state.update(part.encode() + b"\0")
    return state.hexdigest()
