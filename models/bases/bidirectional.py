"""What makes a masked-diffusion model out of a causal decoder of transformers: no causal mask, and a logit shift.

A mixin put before the decoder class. transformers builds the attention mask from `config.is_causal`, for sdpa, eager
and padded batches alike; the flag on the attention modules serves code that calls them alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig

from ...errors import RevprobeError
from .matching import require_match, require_tied, without_report


class BidirectionalDecoder:
    """Every token attends to every token. `logit_shift` is 1 where the model kept the decoder's habit of predicting
    position i at row i - 1, else 0.

    Raises: RevprobeError, when the config asks for a causal mask.
    """

    objective = "masked"
    # "full": every token sees every other; "block": finished blocks and its own, as the config says; "either": nothing
    # in the files says which of the two.
    attention = "full"
    # How a token of a finished block sees its block: "whole", or "causal", only what stands before it.
    finished_blocks = "whole"
    config_class: Any = None
    logit_shift = 0
    # The mask token as the family's tokenizers list it, also where they do not call it their mask.
    mask_text: str | None = None
    # The checkpoint's own name of a tensor, for error messages.
    official_name: Callable[[str], str] = staticmethod(str)

    def __init__(self, config: PreTrainedConfig) -> None:
        if getattr(config, "is_causal", False) is not False:
            raise RevprobeError(
                f"{type(self).__name__} attends in both directions, but its config has "
                f"is_causal={config.is_causal!r}; remove the key or load the causal class"
            )
        super().__init__(config)  # type: ignore[call-arg]
        for part in self.modules():  # type: ignore[attr-defined]
            if hasattr(part, "is_causal"):
                part.is_causal = False
        # Inferred from the class's name otherwise, and then shifted whatever the model predicts at row i.
        self.loss_type = "ForCausalLM" if self.logit_shift else "ForMaskedLM"

    @property
    def block_size(self) -> int | str | None:
        """Tokens of a block; None where the config does not say, or the family does not read in blocks."""
        return getattr(self.config, "block_size", None)  # type: ignore[attr-defined]

    @classmethod
    def can_generate(cls) -> bool:
        """False: left-to-right `generate` is not how a masked model writes."""
        return False

    @classmethod
    def from_pretrained(cls, source: Any, *args: Any, output_loading_info: bool = False, **options: Any) -> Any:
        """As in transformers, but safetensors only, and the tensors must be exactly the model's.

        Raises: RevprobeError, naming tensors that are missing, left over or of another size.
        """
        options |= {"use_safetensors": True, "ignore_mismatched_sizes": True}  # they are named below
        load = super().from_pretrained  # type: ignore[misc]
        with without_report():
            model, info = load(source, *args, output_loading_info=True, **options)
        held = model.state_dict()  # of experts that are not there: a tensor without entries misses nothing
        info["missing_keys"] = {key for key in info["missing_keys"] if key not in held or held[key].numel()}
        if source is not None:  # tensors that were given one by one are held to by whoever knows where they are from
            require_match(info, source, official=cls.official_name)
        require_tied(model, source or cls.__name__)
        return (model, info) if output_loading_info else model
