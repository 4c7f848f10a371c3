"""Fast-dLLM v2: transformers' Qwen2, block by block, with Qwen2's shift.

Row i - 1 predicts token i. The first token of a block is read in the last row of the finished block before it: it is
next-token prediction, so whatever lies in the block itself is not seen there.

Source: Wu et al. 2025 (arXiv 2509.26328); the layout of Efficient-Large-Model/Fast_dLLM_v2_7B.
"""

from __future__ import annotations

from typing import Any

from transformers import Qwen2Config, Qwen2ForCausalLM

from ..bases.bidirectional import BidirectionalDecoder
from ..bases.masked_config import MaskedDiffusionConfig
from .family import Family, of_type
from .files import Files


class FastDLLMConfig(MaskedDiffusionConfig, Qwen2Config):
    model_type = "Fast_dLLM_Qwen"


class FastDLLMForMaskedDiffusion(BidirectionalDecoder, Qwen2ForCausalLM):  # type: ignore[misc]
    config_class = FastDLLMConfig
    attention = "block"
    logit_shift = 1
    mask_text = "|<MASK>|"


def _to_config(files: Files) -> dict[str, Any]:
    return {"block_size": files.settings.get("bd_size")} | dict(files.settings)


FAST_DLLM = Family(
    name="Fast-dLLM v2",
    about="Fast_dLLM_v2 1.5B and 7B",
    model_class=FastDLLMForMaskedDiffusion,
    recognises=of_type(FastDLLMConfig.model_type),
    to_config=_to_config,
    published={f"Efficient-Large-Model/Fast_dLLM_v2_{size}": {"mask_token_id": 151665} for size in ("1.5B", "7B")},
    licence="Apache-2.0 (code), Apache-2.0 (weights)",
    parity=3e-6,
)
