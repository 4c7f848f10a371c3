"""Turn a name or a folder into a `ProbedModel`: runs, local checkpoints, hub names, and a user's own loaders.

Only safetensors weights are read, no code from a model repository is executed, and a checkpoint that lacks a
tensor or brings one too many is an error that names it (transformers alone would fill the gap at random).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING
from transformers.utils import logging as transformers_logging

from ..errors import RevprobeError, did_you_mean
from . import radd  # noqa: F401 - registers RADD with the Auto classes
from .checkpoints import EMA, checkpoint_folder, is_run, step_of
from .probed import ProbedModel, as_probed

__all__ = ["ProbedModel", "as_probed", "list_models", "load_model", "quiet_transformers", "register_model"]

Loader = Callable[..., ProbedModel | nn.Module]
_LOADERS: dict[str, Loader] = {}
_BUILT_IN = {
    "radd": ("masked", "one-layer (or deeper) masked diffusion model, trained by `revprobe train`"),
    "gpt2": ("causal", "GPT-2 of any size, trained by `revprobe train` or loaded from transformers"),
    "any transformers causal LM": ("causal", "a folder or hub name with safetensors weights"),
    "any transformers masked LM": ("masked", "a folder or hub name with safetensors weights and a mask token"),
}


def register_model(name: str, loader: Loader | None = None) -> Callable[[Loader], Loader] | Loader:
    """Make `load_model(name)` call `loader(**options)`, which returns a ProbedModel or a module; also a decorator.

    >>> @register_model("my-model")
    ... def load_mine(**options): ...

    Raises: RevprobeError, when the name is taken by another loader.
    """
    if loader is None:
        return lambda function: register_model(name, function)  # type: ignore[return-value]
    if _LOADERS.get(name, loader) is not loader:
        raise RevprobeError(f"a model named {name!r} is registered already; choose another name")
    _LOADERS[name] = loader
    return loader


def list_models() -> pd.DataFrame:
    """What `load_model` takes: built-in families and registered names. Columns: name, objective, about."""
    rows = [(name, objective, about) for name, (objective, about) in _BUILT_IN.items()]
    rows += [
        (name, "", (loader.__doc__ or "registered by the user").splitlines()[0]) for name, loader in _LOADERS.items()
    ]
    return pd.DataFrame(rows, columns=["name", "objective", "about"])


def load_model(
    source: str | Path,
    *,
    step: int = -1,
    weights: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    objective: str | None = None,
    **options: Any,
) -> ProbedModel:
    """Load a model for probing.

    Args:
        source: a registered name, a run folder, a folder with config.json and safetensors, or a hub name.
        step, weights: which checkpoint of a run; the last, and its average where it has one, by default.
        dtype, device: as in transformers; the checkpoint's dtype and the CPU by default.
        objective: only where the config fits both a causal and a masked language model.
        options: passed on to the loader or to `from_pretrained`.
    Raises: RevprobeError, when there is nothing to load, the weights are pickled, truncated or do not match the
        config, or the objective cannot be found out.
    """
    if str(source) in _LOADERS:
        return _placed(as_probed(_LOADERS[str(source)](**options)), dtype, device)
    folder, name, at_step, which = _locate(source, step, weights)
    config = _read_config(folder, name)
    objective = objective or _objective(config, name)
    module = _load_module(folder, config, objective, name, dtype, options)
    probed = ProbedModel(module, _load_tokenizer(folder), objective=objective, name=name, step=at_step, weights=which)
    return _placed(probed, None, device)


def _locate(source: str | Path, step: int, weights: str | None) -> tuple[str | Path, str, int | None, str | None]:
    """Folder (or hub name), display name, step and weights of what `source` names."""
    path = Path(source)
    if path.is_dir():
        if is_run(path):
            folder, at_step, which = checkpoint_folder(path, step, weights)
            return folder, path.resolve().name, at_step, which
        return _locate_folder(path.resolve(), weights)
    if isinstance(source, Path) or path.is_absolute() or str(source).count("/") > 1 or str(source).startswith("."):
        siblings = [str(path.parent / p.name) for p in path.parent.glob("*")] if path.parent.is_dir() else []
        raise RevprobeError(f"no model folder at {str(source)!r}{did_you_mean(str(source), siblings)}")
    return str(source), str(source), None, None


def _locate_folder(path: Path, weights: str | None) -> tuple[Path, str, int | None, str | None]:
    """A plain model folder; inside a run its step and weights are read off the path."""
    checkpoint = path.parent if path.name == EMA else path
    at_step = step_of(checkpoint)
    if at_step is None:
        return path, path.name, None, None
    which = "ema" if path.name == EMA else "raw"
    if weights not in (None, which):
        raise RevprobeError(f"{path} holds {which} weights, not {weights!r}; name the run folder to choose")
    return path, checkpoint.parent.parent.name, at_step, which


def _read_config(folder: str | Path, name: str) -> PreTrainedConfig:
    if isinstance(folder, Path) and not (folder / "config.json").is_file():
        raise RevprobeError(
            f"{folder} is no model folder: it has no config.json; name a run, a checkpoint or a hub model"
        )
    try:
        return AutoConfig.from_pretrained(folder)
    except RevprobeError:
        raise
    except Exception as error:
        known = sorted([*_LOADERS, "gpt2"])
        hint = (
            ""
            if isinstance(folder, Path)
            else f"; registered models: {', '.join(known)}{did_you_mean(name, known) if _LOADERS else ''}"
        )
        raise RevprobeError(f"cannot read the config of {name!r}: {_first_line(error)}{hint}") from error


def _objective(config: PreTrainedConfig, name: str) -> str:
    """What the checkpoint says it is (its architectures), else what its config class can only be."""
    classes = {
        "masked": getattr(MODEL_FOR_MASKED_LM_MAPPING.get(type(config), None), "__name__", None),
        "causal": getattr(MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None), "__name__", None),
    }
    stated = set(config.architectures or [])
    fits = [o for o, class_name in classes.items() if class_name in stated] or [
        o for o, class_name in classes.items() if class_name
    ]
    if len(fits) == 1:
        return fits[0]
    problem = (
        "fits neither a masked nor a causal language model"
        if not fits
        else "fits both a masked and a causal language model"
    )
    raise RevprobeError(f"{name!r} ({type(config).__name__}) {problem}; pass objective='masked' or 'causal'")


def _load_module(
    folder: str | Path, config: PreTrainedConfig, objective: str, name: str, dtype: Any, options: dict[str, Any]
) -> nn.Module:
    auto = AutoModelForMaskedLM if objective == "masked" else AutoModelForCausalLM
    if isinstance(folder, Path):
        _refuse_pickles(folder)
    try:
        with quiet_transformers():
            settings = {
                "config": config,
                "dtype": dtype or "auto",
                "use_safetensors": True,
                "output_loading_info": True,
            }
            loaded: Any = auto.from_pretrained(folder, **settings, **options)
            module, info = loaded
    except Exception as error:
        raise RevprobeError(
            f"cannot load the weights of {name!r} from {folder}: {_first_line(error)}; the checkpoint is missing, cut "
            "off, or of another model"
        ) from error
    keys = ("missing_keys", "unexpected_keys", "mismatched_keys")
    wrong = [f"{key.split('_')[0]} {', '.join(sorted(str(k) for k in info[key])[:5])}" for key in keys if info[key]]
    if wrong:
        raise RevprobeError(
            f"{folder} does not match its config: {'; '.join(wrong)}; it is a checkpoint of another model or a "
            "damaged one"
        )
    return module.eval()


def _refuse_pickles(folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
    if pickles:
        raise RevprobeError(
            f"{folder} holds only pickled weights ({pickles[0]}), which can run code when read; convert them to "
            "safetensors"
        )
    raise RevprobeError(
        f"{folder} holds no model.safetensors; the checkpoint is missing or was cut off while being saved"
    )


def _load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer beside the weights; None when there is none, since only text pairs need it."""
    if isinstance(folder, Path) and not (any(folder.glob("tokenizer*")) or any(folder.glob("vocab*"))):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception:
        return None


def _placed(model: ProbedModel, dtype: Any, device: Any) -> ProbedModel:
    if dtype is not None:
        model.module.to(dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype))
    if device is not None:
        model.module.to(device)
    return model


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' own progress bars; long work here shows bars of its own."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
