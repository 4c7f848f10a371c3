"""The families, and the files of a folder or hub name read as what they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from ...errors import RevprobeError
from .a2d import A2D
from .bd3lm import BD3LM
from .diffugpt import DIFFUGPT
from .diffullama import DIFFULLAMA
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
)

# model_type -> why its checkpoints are not read, of those that are known.
NOT_READ = {
    "nemotron_labs_diffusion_vlm": "it reads images too, through a vision tower whose layout is not established; its "
    "relatives without images are read (nvidia/Nemotron-Labs-Diffusion-3B, 8B and 14B)",
    "diffusion_gemma": "it hides tokens behind random ones and has no mask token, by which queries here hide their "
    "target; models with a mask token are read",
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
    """
    files = Files.at(place, **options)
    family = family_of(files, bidirectional=bidirectional)
    if family is not None:
        said = {key: asked.pop(key) for key in family.asks if asked and key in asked}
        config = family.config(files, **said)
        return config, PublishedFiles(family, files, config)
    if files.model_type in NOT_READ:
        raise RevprobeError(f"{files.name!r} is of type {files.model_type!r}: {NOT_READ[files.model_type]}")
    # False, not None: None would ask on the terminal whether to run the repository's code.
    return AutoConfig.from_pretrained(place, trust_remote_code=False, **options), None


def family_of(files: Files, *, bidirectional: bool = False) -> Family | None:
    """The family whose files these are; None for transformers' own.

    Raises: RevprobeError, when a folder that transformers knows is asked for as bidirectional, and no family is made
        so; when a family's is, and it is causal.
    """
    found = next((one for one in FAMILIES if files.name in one.published or one.recognises(files)), None)
    if found is not None and bidirectional and found.objective == "causal":
        raise RevprobeError(f"bidirectional=True: {files.name!r} is a causal model ({found.name}); leave it out")
    if found is not None or not bidirectional:
        return found
    found = next((one for one in FAMILIES if one.plain and one.plain == files.model_type), None)
    if found is None:
        plain = ", ".join(one.plain for one in FAMILIES if one.plain)
        raise RevprobeError(
            f"bidirectional=True: {files.name!r} is of type {files.model_type or 'unknown'!r}, and no diffusion family "
            f"is made of it; those of type {plain} can be read so"
        )
    return found


def family_of_config(config: PreTrainedConfig) -> Family | None:
    """The family whose class takes a config; None for transformers' own."""
    return next((one for one in FAMILIES if type(config) is one.model_class.config_class), None)
