"""The families, and the files of a folder or hub name read as what they are."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers import __version__ as version
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from ...errors import RevprobeError
from .a2d import A2D
from .bd3lm import BD3LM
from .diffugpt import DIFFUGPT
from .diffullama import DIFFULLAMA
from .diffusion_gemma import DIFFUSION_GEMMA
from .dream import DREAM
from .family import Family, PublishedFiles
from .fast_dllm import FAST_DLLM
from .files import Files
from .llada import LLADA
from .llada2 import LLADA2
from .llada_moe import LLADA_MOE
from .mdlm import MDLM
from .nemotron import NEMOTRON
from .radd import RADD
from .sdar import SDAR
from .smdm import SMDM

# The first that recognises the files reads them.
FAMILIES: tuple[Family, ...] = (
    RADD,
    LLADA_MOE,
    LLADA,
    DREAM,
    *A2D,
    DIFFUGPT,
    DIFFULLAMA,
    *SMDM,
    MDLM,
    SDAR,
    BD3LM,
    FAST_DLLM,
    LLADA2,
    NEMOTRON,
    DIFFUSION_GEMMA,
)

# model_type -> why its checkpoints are not read, of those that are known.
NOT_READ = {
    "nemotron_labs_diffusion_vlm": "it reads images too, through a vision tower whose layout is not established; its "
    "relatives without images are read (nvidia/Nemotron-Labs-Diffusion-3B, 8B and 14B)",
}


def read_config(
    place: str | Path, *, bidirectional: bool = False, asked: dict[str, Any] | None = None, **options: Any
) -> tuple[PreTrainedConfig, PublishedFiles | None]:
    """The config of a folder or hub name, and its files where they are a family's.

    Args:
        bidirectional: read a plain transformers folder as the family that is made of its class.
        asked: what the user said beside the files; what a family takes of it is taken out.
        options: of `from_pretrained`, for the hub.
    Raises: RevprobeError, when there is no such family, or one that is known and not read; what transformers raises
        for a file that is missing, no JSON, or of an architecture it does not know.
    Warns: where the files name code of their own for what transformers' class of that type reads.
    """
    files = Files.at(place, **options)
    family = family_of(files, bidirectional=bidirectional)
    if family is not None:
        said = {key: asked.pop(key) for key in family.asks if asked and key in asked}
        config = family.config(files, **said)
        return config, PublishedFiles(family, files, config)
    # False, not None: None would ask on the terminal whether to run the repository's code.
    config = AutoConfig.from_pretrained(place, trust_remote_code=False, **options)
    if code := code_passed_over(files.settings):
        warnings.warn(
            f"{files.name!r}: its config.json names {code}, code of its own that is never run; transformers' own "
            f"{files.model_type} is read, which may be another model (one that attends in both directions, for one)",
            stacklevel=2,
        )
    if config._attn_implementation not in (None, "eager", "sdpa"):
        config._attn_implementation = None  # a kernel that nothing can look into; who wants it names it
    return config, None


def family_of(files: Files, *, bidirectional: bool = False) -> Family | None:
    """The family whose files these are; None for transformers' own.

    Raises: RevprobeError, for a type that only code of its folder reads; for one of transformers' that is asked for as
        bidirectional where no family is made so, and a family's that is causal.
    """
    found = next((one for one in FAMILIES if files.name in one.published or one.recognises(files)), None)
    if found is None:
        _require_known(files)
    if found is not None and bidirectional and found.objective == "causal":
        raise RevprobeError(f"bidirectional=True: {files.name!r} is a causal model ({found.name}); leave it out")
    if found is not None or not bidirectional:
        return found
    found = next((one for one in FAMILIES if one.plain and one.plain == files.model_type), None)
    if found is None:
        plain = ", ".join(one.plain for one in FAMILIES if one.plain)
        raise RevprobeError(
            f"bidirectional=True: {files.name!r} is of type {files.model_type or 'unknown'!r}, and no diffusion family "
            f"is made of it; {f'those of type {plain} can be read so' if plain else 'leave bidirectional out'}"
        )
    return found


def code_passed_over(settings: Mapping[str, Any]) -> str | None:
    """The language model's code that a config.json names, where it is not what transformers has of that type.

    A repository may carry the code that transformers took over: a class of the same name in modeling_TYPE.py.

    >>> code_passed_over({"model_type": "llama", "auto_map": {"AutoModel": "modeling_both.LlamaBothWays"}})
    'modeling_both.LlamaBothWays'
    >>> code_passed_over({"model_type": "phi3", "auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}})
    """
    kind, named = str(settings.get("model_type", "")), settings.get("auto_map")
    heads: dict[str, Any] = {
        "AutoModelForMaskedLM": MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        "AutoModelForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "AutoModel": MODEL_MAPPING_NAMES,
    }
    for head, own in heads.items():
        code = named.get(head) if isinstance(named, Mapping) else None
        if isinstance(code, str) and code.rpartition("--")[2] != f"modeling_{kind}.{own.get(kind)}":
            return code
    return None


def _require_known(files: Files) -> None:
    """Raise for files that neither a family nor transformers reads, without their code."""
    code = files.settings.get("auto_map")
    if reason := NOT_READ.get(files.model_type):
        raise RevprobeError(f"{files.name!r} is of type {files.model_type!r}: {reason}")
    if files.model_type in CONFIG_MAPPING or not (files.model_type or code):
        return  # what transformers says of a config without a type is clear
    own = f"its own code ({', '.join(sorted(map(str, code)))} of its auto_map) is never run; " if code else ""
    names = ", ".join(one.name for one in FAMILIES)
    raise RevprobeError(
        f"{files.name!r} is of type {files.model_type or 'unknown'!r}, which neither transformers {version} nor "
        f"revprobe knows; {own}the diffusion families that load are {names} (rp.list_models()); wrap a model that you "
        "built yourself with ProbedModel(module, objective=...)"
    )


def family_of_config(config: PreTrainedConfig) -> Family | None:
    """The family whose class takes a config; None for transformers' own."""
    return next((one for one in FAMILIES if type(config) is one.model_class.config_class), None)
