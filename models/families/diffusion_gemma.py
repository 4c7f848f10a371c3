"""DiffusionGemma: transformers' own, run as one sequence of a prompt and a canvas of random tokens.

config.json as published and as transformers saves it (`per_layer_config`) are read alike. The tower that reads images
is loaded, saved and never run.

Source: transformers' models/diffusion_gemma; the layout of google/diffusiongemma-26B-A4B-it.
"""

from __future__ import annotations

from typing import Any

from ...errors import RevprobeError
from ..canvas.one_stream import DiffusionGemmaCanvasConfig, DiffusionGemmaForMaskedDiffusion
from .family import Family, of_type
from .files import Files

_TABLE = "model.decoder.embed_tokens.weight"


def _to_config(files: Files, draws: int | None = None) -> dict[str, Any]:
    """The published settings; a table of tokens that is longer than they say counts."""
    settings, text = dict(files.settings), dict(files.settings.get("text_config") or {})
    missing = [key for key in ("text_config", "canvas_length") if not settings.get(key)]
    if missing:
        raise RevprobeError(f"config.json of {files.name!r} lacks {', '.join(missing)}; expected the published keys")
    if (rows := files.rows(_TABLE) or 0) > text.get("vocab_size", rows):
        text["vocab_size"] = rows
    return settings | {"text_config": text} | ({} if draws is None else {"draws": draws})


DIFFUSION_GEMMA = Family(
    name="DiffusionGemma",
    about="DiffusionGemma 26B-A4B, text only: a canvas behind a prompt, whose hidden places hold random tokens",
    model_class=DiffusionGemmaForMaskedDiffusion,
    recognises=of_type(DiffusionGemmaCanvasConfig.model_type),
    to_config=_to_config,
    asks=("draws",),
    embedding=_TABLE,
    published={"google/diffusiongemma-26B-A4B-it": {}},
    licence="Apache-2.0 (code); weights: see the model card",
    parity=5e-6,
)
