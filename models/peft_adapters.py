"""Adapters of peft on a model: which parameters are theirs, and a saved adapter put back on its base.

A checkpoint of fine-tuning holds the adapter alone, as peft writes it. Its base is named in `adapter_config.json`; a
run that built its own base keeps it in RUN/base, so that a run's folder can be moved. Most kinds put their weights
inside the model's layers; learned prompts (prompt, prefix and p-tuning) stand beside it, in peft's wrapper.
"""

from __future__ import annotations

import filecmp
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import nn

from ..atomic_files import write_text
from ..errors import RevprobeError, first_line
from .checkpoints import CHECKPOINTS, EMA, step_of

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# How the base was loaded for training, where its files do not say; beside the adapter.
READS = "reads.json"
# The model that a run built for itself, beside its checkpoints.
BASE = "base"
# What peft puts before its weights' names (`peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING`), and its prompts.
_ADAPTED = re.compile(
    r"(^|\.)((ada|beft|boft|c3a|cartridge|cpt|deft|delora|fourierft|frod|glora|gralora|hada|hira|hra|ia3|lily|lora|lokr|"
    r"miss|oft|osf|peanut|poly|psoft|p?vera|randlora|road|shadow|shira|tinylora|unilora|vblora|waveft|xlora|adamss|"
    r"adaption_prompt|trainable_tokens)_|prompt_encoder\.|adaption_\w+$)"
)
_TABLES = ("embed_tokens.weight", "lm_head.weight", "wte.weight", "word_embeddings.weight", "embeddings.weight")
_LANGUAGE_TASKS = (None, "CAUSAL_LM", "FEATURE_EXTRACTION")
# Kinds whose wrapper does part of the work in its own forward pass.
_IN_THE_WRAPPER = ("POLY", "XLORA")


def is_adapter_parameter(name: str) -> bool:
    """Whether a parameter belongs to an adapter of peft.

    >>> is_adapter_parameter("model.layers.0.mlp.up_proj.lora_A.default.weight")
    True
    """
    return _ADAPTED.search(name) is not None


def adapter_parameters(module: nn.Module) -> list[str]:
    """The parameters of peft's adapters on a module; none where there is no adapter, whatever names it uses."""
    return [n for n, _ in module.named_parameters() if is_adapter_parameter(n)] if has_adapter(module) else []


def has_adapter(module: nn.Module) -> bool:
    """Whether adapters of peft, learned prompts among them, are on a module: also those that have no weights' names."""
    return any(hasattr(part, "peft_config") or hasattr(part, "adapter_layer_names") for part in module.modules())


def own_parameters(module: nn.Module) -> list[str] | None:
    """A model's parameters without those of its adapters; None where there is no adapter, for all of them."""
    adapters = adapter_parameters(module)
    return [name for name, _ in module.named_parameters() if name not in adapters] if adapters else None


def without_wrapper(module: nn.Module) -> nn.Module:
    """The transformers model inside a PeftModel, its adapter active; other modules, and learned prompts, as they are.

    Its parameters then have the names they have without an adapter, so that readings can be compared. The model inside
    learned prompts is the base alone, which never sees them; and an activated LoRA's wrapper is what looks for the
    tokens that call it, without which it does nothing.
    """
    config = getattr(module, "active_peft_config", None) if hasattr(module, "peft_config") else None
    if config is None or config.is_prompt_learning or str(config.peft_type).rpartition(".")[2] in _IN_THE_WRAPPER:
        return module
    if getattr(config, "alora_invocation_tokens", None):
        return module
    inside: Any = module
    return inside.get_base_model()


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter; the base's own config may lie beside it, but not its weights.

    Raises: RevprobeError, for a folder that holds both, of which only one can be meant.
    """
    if not isinstance(folder, Path) or not (folder / ADAPTER_CONFIG).is_file():
        return False
    if any(folder.glob("model*.safetensors*")):
        raise RevprobeError(
            f"{folder} holds an adapter ({ADAPTER_CONFIG}) and a whole model's weights; keep the one that is meant in "
            "a folder of its own"
        )
    return True


def base_of(adapter: Path) -> str | Path:
    """The model an adapter was trained on: the folder or hub name its config states, or the one that its run built.

    A run's own base, RUN/base, is that of RUN/checkpoints/step-N alone, wherever the run's folder was moved to; a
    folder of that name beside other adapters is any model.
    Raises: RevprobeError, when the config is damaged or names no base, or names another base than the run has.
    """
    stated = _stated(adapter).get("base_model_name_or_path")
    checkpoint = adapter.parent if adapter.name == EMA else adapter
    built = checkpoint.parent.parent / BASE
    if checkpoint.parent.name == CHECKPOINTS and step_of(checkpoint) is not None and built.is_dir():
        if stated and _is_other(str(stated), built):
            raise RevprobeError(
                f"{adapter / ADAPTER_CONFIG} names the base {str(stated)!r}, and its run's folder has another, "
                f"{built}; delete base_model_name_or_path from it where the run's is meant, else copy the adapter to a "
                "folder outside the run"
            )
        return built
    if not stated:
        raise RevprobeError(
            f"{adapter / ADAPTER_CONFIG} names no base model; load the base yourself and use peft's PeftModel"
        )
    return Path(stated) if Path(stated).is_dir() else str(stated)


def base_revision(adapter: Path, base: str | Path, asked: str | None) -> str | None:
    """The revision to load an adapter's base at: the one its config pins, of a base on the hub; else what was asked.

    Raises: RevprobeError, when another was asked for than is pinned, or the config is damaged.
    """
    pinned = _stated(adapter).get("revision")
    if isinstance(base, Path) or not pinned:
        return asked
    if asked not in (None, pinned):
        raise RevprobeError(
            f"revision={asked!r}: {adapter / ADAPTER_CONFIG} pins its base {base!r} to {pinned!r}; leave revision out, "
            "or change it there"
        )
    return str(pinned)


def _stated(adapter: Path) -> dict[str, Any]:
    """What adapter_config.json says. Raises: RevprobeError, when it is damaged."""
    try:
        return dict(json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise RevprobeError(
            f"{adapter / ADAPTER_CONFIG} is damaged ({first_line(error)}); expected the file that peft writes"
        ) from error


def _is_other(stated: str, built: Path) -> bool:
    """Whether what an adapter's config names is there and is not the base that its run built, or a copy of it.

    A run states its base by the path it had then, RUN/base, which is gone where the run was moved or another folder is
    the current one.
    """
    if not Path(stated).is_dir():
        paths = [kind(stated) for kind in (PurePosixPath, PureWindowsPath)]
        return not any(path.is_absolute() or path.name == BASE for path in paths)
    there = [
        {p.name: p for p in place.iterdir() if p.suffix in (".safetensors", ".json")} for place in (Path(stated), built)
    ]
    names = [{name for name in found if name == "config.json" or name.endswith(".safetensors")} for found in there]
    return names[0] != names[1] or not all(
        filecmp.cmp(there[0][name], there[1][name], shallow=False) for name in names[0]
    )


def write_reads(adapter: Path, reads: Mapping[str, Any]) -> None:
    """Note beside an adapter what `load_model` was told of its base: mask token, block size, or bidirectional."""
    write_text(adapter / READS, json.dumps(dict(reads)) + "\n")


def noted_reads(adapter: Path) -> dict[str, Any]:
    """What `write_reads` noted; empty where nothing was. Raises: RevprobeError, when the file is damaged."""
    file = adapter / READS
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise RevprobeError(
            f"{file} is damaged ({first_line(error)}); expected what the run was told of its base, as in config.yaml"
        ) from error


def put_on(module: nn.Module, adapter: Path, tokenizer: Any = None) -> nn.Module:
    """The module with a saved adapter active on it, frozen and in eval mode.

    Args:
        tokenizer: the adapter's own; tokens it adds need rows in the base's embedding, which the adapter must bring.
    Raises: RevprobeError, when the adapter's weights are pickled, missing, cut off or of another model, when it is not
        a language model's, when the tokenizer has tokens that neither base nor adapter has rows for, or when the base
        has an adapter already.
    """
    if has_adapter(module):
        # peft would put the second's weights where the first's are, under the same name.
        raise RevprobeError(
            f"the base of the adapter {adapter} has an adapter itself, which the second would overwrite; merge the "
            "first into its base (peft's merge_and_unload), save that, and name its folder as base_model_name_or_path"
        )
    from peft import PeftModel, get_peft_model_state_dict  # seconds to import, and only adapters need it
    from safetensors import safe_open

    if not (adapter / ADAPTER_WEIGHTS).is_file():
        raise RevprobeError(f"{adapter} holds no {ADAPTER_WEIGHTS}; an adapter is read from safetensors only")
    try:
        with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as weights:
            saved = set(weights.keys())
            rows = {weights.get_slice(key).get_shape()[0] for key in saved if key.endswith(_TABLES)}
        _require_own_names(module, saved, adapter)
        _make_room(module, rows, tokenizer, adapter)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by names that it is renaming
            adapted: Any = PeftModel.from_pretrained(module, adapter)
    except RevprobeError:
        raise
    except Exception as error:
        raise RevprobeError(f"cannot put the adapter {adapter} on its base model: {first_line(error)}") from error
    # peft leaves a missing tensor at its initial value, and one too many unread; both are another model's adapter.
    wrong = sorted((set(get_peft_model_state_dict(adapted)) ^ saved) - _whole_tables(adapted, saved, adapter))
    if wrong:
        raise RevprobeError(f"the adapter {adapter} is of another model: {', '.join(wrong[:3])} do not match")
    if adapted.active_peft_config.task_type not in _LANGUAGE_TASKS:
        raise RevprobeError(
            f"the adapter {adapter} was trained for {adapted.active_peft_config.task_type}, whose head is no language "
            "model's; probe an adapter of CAUSAL_LM"
        )
    return without_wrapper(adapted).eval()


def _whole_tables(adapted: nn.Module, saved: set[str], adapter: Path) -> set[str]:
    """Tables of tokens that the file holds beside the adapter (save_embedding_layers=True), and that were read."""
    from safetensors import safe_open

    held, read = adapted.state_dict(), set()
    with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as weights:
        for name in saved:
            if name.endswith(_TABLES) and name in held:
                own = weights.get_tensor(name).to(held[name])
                read |= {name} if torch.equal(own, held[name]) else set()
    return read


def _require_own_names(module: nn.Module, saved: set[str], adapter: Path) -> None:
    """Raise for an adapter trained on a family's published code, whose modules have other names than ours."""
    official = getattr(module, "official_name", str)
    ours = {name for name, _ in module.named_modules()}
    theirs = tuple(f"{official(name)}." for name in sorted(ours) if official(name) not in ours)
    strange = [name for name in sorted(saved) if name.removeprefix("base_model.model.").startswith(theirs)]
    if theirs and strange:
        raise RevprobeError(
            f"the adapter {adapter} was trained on the published code, whose modules have other names ({strange[0]}); "
            "merge it there (peft's merge_and_unload) and load what that saves"
        )


def _make_room(module: nn.Module, rows: set[int], tokenizer: Any, adapter: Path) -> None:
    """Widen the base's token table to what the adapter brings. Raises: RevprobeError, for tokens without a row."""
    table: Any = module
    there = int(table.get_input_embeddings().weight.shape[0])
    needed = max([there, *rows])
    if needed > there:
        table.resize_token_embeddings(needed, mean_resizing=False)  # every row of it is in the adapter's file
    if tokenizer is not None and len(tokenizer) > needed:
        raise RevprobeError(
            f"the tokenizer beside {adapter} has {len(tokenizer)} tokens, but its base has rows for {there} and the "
            "adapter brings none; save the adapter with save_embedding_layers=True"
        )
