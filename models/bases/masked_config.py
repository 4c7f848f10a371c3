"""What a masked diffusion model's config has beside that of the transformers class it is built on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ...errors import RevprobeError
from ..contract.block_masks import WHOLE


def require_only(config: Any, only: Mapping[str, Any], given: Mapping[str, Any], called: str = "") -> None:
    """Raise for a setting of a file that asks for what the class cannot do, at the top or among those of rotation.

    Args:
        only: setting -> the value that the class can do; a file that says none or null asks for nothing.
        given: settings that are no fields of the config.
        called: what the message calls the config; its class by default.
    Raises: RevprobeError, naming the setting, its value and the one that is expected.
    """
    rotary = (getattr(config, "rope_parameters", None), given.get("rope_scaling"))
    for key, known in only.items():
        asked = [given.get(key, getattr(config, key, None)), *(one.get(key) for one in rotary if isinstance(one, dict))]
        for value in asked:
            if value not in (None, known):
                name = called or type(config).__name__
                raise RevprobeError(f"{name}: {key}={value!r} is not supported; expected {known!r}")


class MaskedDiffusionConfig:
    """Put before the config class of transformers.

    Attributes:
        mask_token_id: None where the checkpoint's config does not say; `load_model` writes down what it was told.
        block_size: tokens of a block; "whole" where every token sees every other, None where that is not known.
        only: setting -> the value that the class can do, of those that could be asked for otherwise.
    Raises: RevprobeError, for a block size that is neither, or another value of a setting in `only`: transformers'
        class would not say that it leaves it out.
    """

    is_causal = False
    mask_token_id: int | None = None
    block_size: int | str | None = None
    only: ClassVar[Mapping[str, Any]] = {"use_sliding_window": False, "partial_rotary_factor": 1}

    def __post_init__(self, **kwargs: Any) -> None:
        given = kwargs.get("block_size")
        if not (given is None or given == WHOLE or (isinstance(given, int) and given > 0)):
            raise RevprobeError(f"block_size {given!r}: expected a whole number of tokens above 0, or {WHOLE!r}")
        require_only(self, self.only, kwargs)
        if hasattr(self, "layer_types"):
            vars(self)["layer_types"] = None  # a sliding layer of the parent's gets the same mask as the others
        super().__post_init__(**kwargs)  # type: ignore[misc]
        self.use_cache = False  # published files say true, for their own samplers
