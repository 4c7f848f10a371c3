"""BD3-LM: MDLM's encoder, block by block.

Written from the public code's models/hf/modeling_bd3lm.py (kuleshov-group/bd3lms).

Source: Arriola et al. 2025 (arXiv 2503.09573); the layout of kuleshov-group/bd3lm-owt-block_size4.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...errors import RevprobeError
from ..contract.block_masks import WHOLE
from .family import Family, of_type
from .files import Settings
from .mdlm import LAYOUT, MDLMConfig, MDLMForMaskedDiffusion, stated_sizes


class BD3LMConfig(MDLMConfig):
    """MDLM's, and how blocks are read.

    Attributes:
        block_size: None where the file does not say; a model without `cross_attn` reads the whole sequence.
        adaln: whether the norms are adaptive.
    Raises: RevprobeError, as MDLM's, and for the autoregressive model of the same code (`causal`).
    """

    model_type = "bd3lm"

    cross_attn: bool = True
    adaln: bool = True
    causal: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.causal:
            raise RevprobeError("bd3lm config: causal=True is not supported; expected False")
        kwargs.pop("attn_backend", None)  # of the published code: flex and sdpa are one function
        super().__post_init__(**kwargs)
        if not self.cross_attn:
            self.block_size = WHOLE


class BD3LMForMaskedDiffusion(MDLMForMaskedDiffusion):
    """BD3-LM. The logits for position i stand in row i."""

    config_class = BD3LMConfig
    attention = "block"


def _check_share(share: Tensor, config: Settings) -> None:
    """The least or the largest share of a block that was masked in training; no forward pass reads it."""
    if share.numel() != 1 or not 0 <= float(share) <= 1:
        raise RevprobeError(
            f"sampling_eps_min or sampling_eps_max is {share.tolist()}: expected one share of tokens, 0 to 1; the "
            "checkpoint is of another model or a damaged one"
        )


BD3LM = Family(
    name="BD3-LM",
    about="bd3lm-owt-block_size4, 8, 16 and others in their layout",
    model_class=BD3LMForMaskedDiffusion,
    recognises=of_type(BD3LMConfig.model_type),
    to_config=stated_sizes,
    published={f"kuleshov-group/bd3lm-owt-block_size{size}": {} for size in (4, 8, 16)},
    licence="Apache-2.0 (code); weights: see the model card",
    parity=7e-6,
    **LAYOUT
    | {"constants": LAYOUT["constants"] | dict.fromkeys(("sampling_eps_min", "sampling_eps_max"), _check_share)},
)
