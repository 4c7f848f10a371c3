"""Turn a name or a folder into a `ProbedModel`: runs, local checkpoints, hub names, and a user's own loaders.

Only safetensors weights are read, no code from a model repository is executed, and a checkpoint that lacks a
tensor or brings one too many is an error that names it (transformers alone would fill the gap at random).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from ..arguments import checked
from ..errors import RevprobeError, did_you_mean, first_line, shown
from .checkpoints import has_checkpoints
from .contract import introspect
from .contract.block_masks import WHOLE
from .contract.called import CalledModule
from .families.family import PublishedFiles
from .families.files import Files, config_beside, weight_files
from .families.known import family_of, family_of_config, read_config
from .hub import adapter_from_hub, download, hub_options, quiet_transformers
from .load_options import checked_choices, placed, require_no_subfolder
from .peft_adapters import base_of, base_revision, is_adapter, noted_reads, put_on
from .place import place_of
from .probed import ProbedModel, as_probed
from .strict_loading import conversion, load_weights, require_no_pickles
from .tokenizers import chosen_tokenizer, load_tokenizer, require_rows

__all__ = ["ProbedModel", "as_probed", "load_model", "quiet_transformers", "register_model", "registered"]

Loader = Callable[..., ProbedModel | nn.Module]
_LOADERS: dict[str, Loader] = {}


@checked
def register_model(name: str, loader: Loader | None = None) -> Callable[[Loader], Loader] | Loader:
    """Make `load_model(name)` call `loader(**options)`, which returns a ProbedModel or a module; also a decorator.

    The loader gets what `load_model` was given, except dtype and device, which are applied to what it returns.

    >>> @register_model("my-model")
    ... def load_mine(**options): ...

    Raises: RevprobeError, when the name is taken by another loader, or the loader is a model itself.
    """
    if isinstance(loader, nn.Module):
        raise RevprobeError(
            f"loader: expected a function that returns the model, got {shown(loader)}; pass lambda **options: model"
        )
    if loader is None:
        return lambda function: register_model(name, function)  # type: ignore[return-value]
    if _LOADERS.get(name, loader) is not loader:
        raise RevprobeError(f"a model named {name!r} is registered already; choose another name")
    _LOADERS[name] = loader
    return loader


def registered() -> Mapping[str, Loader]:
    """The users' loaders by name."""
    return _LOADERS


@checked
def load_model(
    source: str | Path | ProbedModel | nn.Module,
    *,
    step: int = -1,
    weights: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | int | None = None,
    objective: str | None = None,
    mask_token_id: int | str | None = None,
    logit_shift: int | None = None,
    begin_token_id: int | None = None,
    block_size: int | str | None = None,
    bidirectional: bool = False,
    tokenizer: Any = None,
    **options: Any,
) -> ProbedModel:
    """Load a model for probing.

    Args:
        source: a registered name, a run folder, a folder with config.json and safetensors, a hub name, or the folder
            or hub name of an adapter, which is put on the base it states, at the revision it pins. A module or a
            ProbedModel comes back wrapped, without options.
        step, weights: which checkpoint of a run; the last, and its average where it has one, by default.
        dtype, device: as in transformers (torch_dtype= too); the checkpoint's dtype and the CPU by default.
        objective: only where the config fits both a causal and a masked language model.
        mask_token_id, logit_shift, begin_token_id: only where neither class, config nor tokenizer tells; a
            mask token by its id or its text.
        block_size: tokens of a block, for a model that writes block by block and whose config does not say it; also a
            dial for other masked models. "whole": every token sees every other.
        bidirectional: every token sees every other; where a family has both kinds (A2D), and of a plain Llama or GPT-2
            folder that holds a diffusion model (DiffuLLaMA, DiffuGPT), which its files do not say.
        tokenizer: a folder or hub name to read it from, or a tokenizer; the checkpoint's own by default.
        options: what a family asks for beside these (SMDM: n_heads); the rest goes to the loader or to
            `from_pretrained` (device_map=, attn_implementation=, ...).
    Raises: RevprobeError, when there is nothing to load, an option is not known or does not apply, the weights are
        pickled, truncated or do not match the config, objective, mask token or shift cannot be found out, the tokenizer
        asked for cannot be read or has more tokens than the model, or the device is none that torch has here.
    Warns: when there is a tokenizer that cannot be read, with the reason; only text pairs need it.
    """
    dtype = checked_choices(dtype, device, objective, options)
    block_size = _whole(block_size) if bidirectional else block_size
    given: dict[str, Any] = {"mask_token_id": mask_token_id, "logit_shift": logit_shift}
    given |= {"begin_token_id": begin_token_id, "block_size": block_size}
    known = given | {"step": None if step == -1 else step, "weights": weights, "objective": objective}
    known |= {"tokenizer": tokenizer, "bidirectional": bidirectional or None} | options
    asked = {key: value for key, value in known.items() if value is not None}
    if not isinstance(source, str | Path):
        moved = {"dtype": dtype, "device": device}
        return _loaded_already(source, asked | {key: one for key, one in moved.items() if one is not None})
    if str(source) in _LOADERS:
        return placed(_from_loader(str(source), asked), dtype, device)
    folder, name, at_step, which = place_of(source, step, weights)
    folder = _adapter_or(folder, options)
    if isinstance(folder, Path) and is_adapter(folder):
        options |= {"tokenizer": tokenizer} | ({"bidirectional": True} if bidirectional else {})
        adapted = _adapted(folder, name, dtype, objective, given, options, {"step": at_step, "weights": which})
        return placed(adapted, None, device)
    given |= {"name": name, "step": at_step, "weights": which}
    options |= {"bidirectional": bidirectional}
    return placed(_from_files(folder, dtype, objective, tokenizer, given, options), None, device)


def _from_files(
    folder: str | Path,
    dtype: Any,
    objective: str | None,
    tokenizer: Any,
    given: dict[str, Any],
    options: dict[str, Any],
) -> ProbedModel:
    """A folder's or hub name's model with the tokenizer asked for, or its own. `given`: what ProbedModel is told."""
    name = given["name"]
    with quiet_transformers():
        hub = {key: options.pop(key) for key in _ON_THE_HUB if key in options}
        config, published = _read_config(folder, name, options, hub)
        objective = objective or stated_objective(config, name)
        kind = _class_of(config, objective, name, published)
        if objective == "causal" and (mask := given["mask_token_id"]) is not None:
            raise RevprobeError(
                f"mask_token_id={mask!r}: {name!r} is a causal model, from which order hides; leave it out, or pass "
                "bidirectional=True where the files hold a diffusion model (DiffuLLaMA, DiffuGPT)"
            )
        if published is not None and published.family.translates and isinstance(folder, str):
            folder, hub = download(folder, **hub), {}
        elif published is not None and isinstance(published.files.place, Path):
            folder = published.files.place  # one bare file, of a folder that holds no other
        options = hub | options
        try:
            module: Any = load_weights(folder, config, kind, published, dtype=dtype or "auto", **options)
        except RevprobeError:
            raise
        except Exception as error:
            raise RevprobeError(_why_not_loaded(error, folder, name, options)) from error
        beside = folder.parent if isinstance(folder, Path) and folder.is_file() else folder
        own = load_tokenizer(beside, name, **hub) if tokenizer is None else chosen_tokenizer(tokenizer)
    rows = CalledModule(module).vocab_size
    require_rows(own, rows, name, added=tokenizer is not None or published is not None)
    mask = introspect.mask_token(given["mask_token_id"], own, module, rows, name)
    _write_down(module.config, given | {"mask_token_id": mask if introspect.hidden_by_noise(module) is None else None})
    probed = ProbedModel(module, own, objective=objective, **given)
    probed.tokenizer_source = None if published is None else published.family.tokenizer_source
    return probed


def _adapter_or(name: str | Path, options: dict[str, Any]) -> str | Path:
    """The folder of a hub name's adapter; any other place as it is. How the hub is to be asked goes into `options`."""
    require_no_subfolder(options, name)
    if isinstance(name, Path):
        return name
    with quiet_transformers():
        options |= {} if "local_files_only" in options else hub_options(name)
        found = adapter_from_hub(name, **{key: options[key] for key in _ON_THE_HUB if key in options})
    if found is not None:
        options.pop("revision", None)  # the adapter's, and its base has one of its own
    return found or name


def _adapted(
    folder: Path, name: str, dtype: Any, objective: str | None, given: dict[str, Any], options: Any, which: Any
) -> ProbedModel:
    """An adapter on its base, read as it was trained, with the adapter's own tokenizer where it brings one."""
    noted = noted_reads(folder)
    if given["block_size"] is None and "bidirectional" not in options:
        given["block_size"] = noted.get("block_size")
        options |= {"bidirectional": True} if noted.get("bidirectional") else {}
    if given["mask_token_id"] is None:
        given["mask_token_id"] = noted.get("mask_token_id")
    place = base_of(folder)
    if revision := base_revision(folder, place, options.get("revision")):
        options |= {"revision": revision}
    base = load_model(place, dtype=dtype, objective=objective, **given, **options)
    with quiet_transformers():
        own = load_tokenizer(folder, name) if options["tokenizer"] is None else base.tokenizer
    module = put_on(base.module, folder, own)
    known = {key: getattr(base, key) if value is None else value for key, value in given.items()}
    known["block_size"] = known["block_size"] or (WHOLE if base.objective == "masked" else None)
    tokenizer = base.tokenizer if own is None else own
    probed = ProbedModel(module, tokenizer, objective=base.objective, name=name, **known, **which)
    probed.tokenizer_source = base.tokenizer_source
    return probed


def _whole(block_size: int | str | None) -> str:
    """What `bidirectional=True` says of blocks. Raises: RevprobeError, when another size was given beside it."""
    if block_size not in (None, WHOLE):
        raise RevprobeError(
            f"bidirectional=True lets every token see every other, and block_size={block_size!r} does not; leave one "
            "of them out"
        )
    return WHOLE


def _write_down(config: PreTrainedConfig, given: dict[str, Any]) -> None:
    """Keep in a family's config how its files were asked to be read, so that what is saved of the model says it.

    Blocks only of a family that may write in them: of others they are a way to read it, and nothing of the model's.
    """
    family = family_of_config(config)
    if family is None:
        return
    if given["mask_token_id"] is not None and getattr(config, "mask_token_id", None) is None:
        config.mask_token_id = given["mask_token_id"]
    if given["block_size"] is not None and family.attention in ("block", "either"):
        config.block_size = given["block_size"]


def _loaded_already(model: ProbedModel | nn.Module, options: Mapping[str, Any]) -> ProbedModel:
    for option in options:
        raise RevprobeError(
            f"{option}= does not apply to a model that is loaded already; use ProbedModel(module, tokenizer, "
            "objective=...) to say what it is, and module.to(...) to move it"
        )
    return as_probed(model)


def _from_loader(name: str, options: dict[str, Any]) -> ProbedModel:
    """What a user's loader returns. Raises: RevprobeError, when it does not take an option, fails, or returns else."""
    loader, called = _LOADERS[name], f"the loader registered as {name!r}"
    with suppress(ValueError):  # of a builtin, which tells no signature
        try:
            signature(loader).bind(**options)
        except TypeError as error:
            raise RevprobeError(
                f"{called} does not take what load_model was given: {error}; let it take **options"
            ) from None
    try:
        made = loader(**options)
    except RevprobeError:
        raise
    except Exception as error:
        raise RevprobeError(f"{called} failed: {first_line(error)}; call it by itself to see where") from error
    if not isinstance(made, ProbedModel | nn.Module):
        raise RevprobeError(f"{called} returned {shown(made)}; expected an nn.Module or a ProbedModel")
    return as_probed(made)


def _read_config(
    folder: str | Path, name: str, options: dict[str, Any], hub: dict[str, Any]
) -> tuple[PreTrainedConfig, PublishedFiles | None]:
    """What the files say; options of `load_model` that a family takes are taken out of `options`."""
    if isinstance(folder, Path) and folder.is_file() and not _stands_alone(folder):
        require_no_pickles(folder)
        raise RevprobeError(
            f"{str(folder)!r} is a file; expected the folder of a run or of a model, or a hub name (a single "
            "safetensors file only of a family that is published so: SMDM)"
        )
    if isinstance(folder, Path) and not config_beside(folder).is_file() and family_of(Files.at(folder)) is None:
        inside = sorted(p.name for p in folder.iterdir() if has_checkpoints(p) or (p / "config.json").is_file())
        some = ", ".join(str(folder / one) for one in inside[:3]) + (", ..." if len(inside) > 3 else "")
        if not inside:
            require_no_pickles(folder)
        raise RevprobeError(
            f"{folder} is no model but a folder of {len(inside)}; name one of them: {some}"
            if inside
            else f"{folder} is no model folder: it has no config.json; name a run, a checkpoint or a hub model"
        )
    try:
        return read_config(folder, bidirectional=options.pop("bidirectional"), asked=options, **hub)
    except RevprobeError:
        raise
    except Exception as error:
        known = sorted([*_LOADERS, "gpt2"])
        where, hint = "", ""
        if not isinstance(folder, Path):
            where = f", which is no folder here and no registered model ({', '.join(known)})"
            hint = did_you_mean(name, known) if _LOADERS else "; check the name or the path"
            hint += "; of a repository of single files (SMDM's) download one and give its path"
        why = first_line(error).rstrip(".")
        raise RevprobeError(f"cannot read the config of {name!r}{where}: {why}{hint}") from error


def _stands_alone(path: Path) -> bool:
    """Whether a file is a model: weights of a family that is published so, no part of a folder of another."""
    files = Files.at(path) if weight_files(path) else None
    return files is not None and not files.model_type and family_of(files) is not None


def stated_objective(config: PreTrainedConfig, name: str) -> str:
    """What the checkpoint says it is (its architectures), else what its classes can only be: "masked" or "causal".

    Raises: RevprobeError, when the config fits neither, or both.
    """
    if (family := family_of_config(config)) is not None:
        return "causal" if family.causal_class is not None and config.is_causal is True else family.objective
    classes = {
        "masked": MODEL_FOR_MASKED_LM_MAPPING.get(type(config), None),
        "causal": MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None),
    }
    known = {objective: kind for objective, kind in classes.items() if kind is not None}
    declared = {getattr(kind, "objective", None) for kind in known.values()}
    if len(declared) == 1 and (objective := declared.pop()):
        return str(objective)
    stated = set(config.architectures or [])
    if _attends_both_ways(config, known):
        return "masked"
    fits = [objective for objective, kind in known.items() if getattr(kind, "__name__", None) in stated] or list(known)
    if len(fits) == 1:
        return fits[0]
    if not fits:
        raise RevprobeError(f"{name!r} ({type(config).__name__}) {_NEITHER}")
    raise RevprobeError(
        f"{name!r} ({type(config).__name__}) fits both a masked and a causal language model; pass objective='masked' "
        "or 'causal'"
    )


def _attends_both_ways(config: PreTrainedConfig, objectives: Collection[str]) -> bool:
    """Whether a causal model's config takes its mask away (`"is_causal": false`), and it has no masked class."""
    return "causal" in objectives and "masked" not in objectives and getattr(config, "is_causal", None) is False


# Options of `from_pretrained` that say where on the hub, for config and tokenizer as for the weights.
_ON_THE_HUB = ("revision", "cache_dir", "token", "local_files_only")
_NEITHER = (
    "is neither a masked nor a causal language model to transformers (an encoder-decoder, a classifier or another "
    "task's model); expected one of these, or wrap a module of your own with ProbedModel(module, objective=...)"
)


def _class_of(config: PreTrainedConfig, objective: str, name: str, published: PublishedFiles | None) -> Any:
    """The class to load this config with as what was asked for. Raises: RevprobeError, saying what there is."""
    if published is not None:
        family = published.family
        if (kind := family.class_for(objective)) is not None:
            return kind
        raise RevprobeError(
            f"objective={objective!r}: {name!r} is {family.name}, a {family.objective} model; leave objective out"
        )
    classes = {"masked": MODEL_FOR_MASKED_LM_MAPPING, "causal": MODEL_FOR_CAUSAL_LM_MAPPING}
    there = [kind for kind, known in classes.items() if known.get(type(config), None) is not None]
    if objective == "masked" and _attends_both_ways(config, there):
        return AutoModelForCausalLM
    if objective not in there:
        what = f"has no {objective} language model in transformers; pass objective={there[0]!r}" if there else _NEITHER
        raise RevprobeError(f"{name!r} ({type(config).__name__}) {what}")
    return AutoModelForMaskedLM if objective == "masked" else AutoModelForCausalLM


def _why_not_loaded(error: Exception, folder: str | Path, name: str, options: dict[str, Any]) -> str:
    """What `from_pretrained` stumbled over, with a fix: an option that nobody knows, or has, else the checkpoint."""
    for option in options:
        if isinstance(error, TypeError) and f"argument '{option}'" in str(error):
            known = [key for key, one in signature(load_model).parameters.items() if one.kind is one.KEYWORD_ONLY]
            near = did_you_mean(
                option, [*known, "attn_implementation", "device_map", "revision", "quantization_config"]
            )
            return f"load_model and from_pretrained have no option {option!r}{near}"
    if isinstance(error, OSError) and "use_safetensors" in str(error):
        how = conversion("pytorch_model*.bin", "model.safetensors")
        return f"{name!r} has no model.safetensors; where it has pickled weights, download and convert them: `{how}`"
    cause = f"cannot load the weights of {name!r} from {folder}: {first_line(error)}"
    passed_on = {key: one for key, one in options.items() if key != "local_files_only"}
    if passed_on and not isinstance(error, SafetensorError | OSError):
        return f"{cause}; it was asked for with {shown(passed_on)}: leave these out or change them"
    return f"{cause}; the checkpoint is missing, cut off, or of another model"
