"""What a masked diffusion model's config has beside that of the transformers class it is built on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ...errors import RevprobeError
from ..contract.block_masks import WHOLE

_ONLY: dict[str, Any] = {"use_sliding_window": False}


class MaskedDiffusionConfig:
    """Put before the config class of transformers.

    Attributes:
        mask_token_id: None where the checkpoint's config does not say; `load_model` writes down what it was told.
        block_size: tokens of a block; "whole" where every token sees every other, None where that is not known.
        only: setting -> the value that the class can do, of those that could be asked for otherwise.
    Raises: RevprobeError, for a block size that is neither, sliding windows, which the published code ignores, or
        another value of a setting in `only`.
    """

    is_causal = False
    mask_token_id: int | None = None
    block_size: int | str | None = None
    only: ClassVar[Mapping[str, Any]] = {}

    def __post_init__(self, **kwargs: Any) -> None:
        given = kwargs.get("block_size")
        if not (given is None or given == WHOLE or (isinstance(given, int) and given > 0)):
            raise RevprobeError(f"block_size {given!r}: expected a whole number of tokens above 0, or {WHOLE!r}")
        rotary = getattr(self, "rope_parameters", None) or {}
        for key, known in (_ONLY | dict(self.only)).items():
            value = kwargs.get(key, getattr(self, key, rotary.get(key)))
            if value not in (None, known):
                raise RevprobeError(f"{type(self).__name__}: {key}={value!r} is not supported; expected {known!r}")
        if hasattr(self, "layer_types"):
            vars(self)["layer_types"] = None  # a sliding layer of the parent's gets the same mask as the others
        super().__post_init__(**kwargs)  # type: ignore[misc]
        self.use_cache = False  # published files say true, for their own samplers
