"""DiffuLLaMA: transformers' Llama without the causal mask; position i is still predicted at row i - 1.

A folder of it is a plain Llama's, file by file: nothing in it says that the model was trained on to see later tokens.
So the published names load as what they are, and a folder does with `bidirectional=True`; without, it loads as the
causal model it says it is. The mask is an ordinary token that stands in no file.

Source: Gong et al. 2025 (arXiv 2410.17891); HKUNLP/DiffuLLaMA, inf_diffullama.py.
"""

from __future__ import annotations

from transformers import LlamaConfig, LlamaForCausalLM

from ..bases.bidirectional import BidirectionalDecoder
from ..bases.masked_config import MaskedDiffusionConfig
from .family import Family, of_type


class DiffuLlamaConfig(MaskedDiffusionConfig, LlamaConfig):
    model_type = "diffullama"


class DiffuLlamaForMaskedDiffusion(BidirectionalDecoder, LlamaForCausalLM):  # type: ignore[misc]
    config_class = DiffuLlamaConfig
    logit_shift = 1


DIFFULLAMA = Family(
    name="DiffuLLaMA",
    about="DiffuLLaMA 7B by its name; with bidirectional=True any Llama folder that holds such a model",
    model_class=DiffuLlamaForMaskedDiffusion,
    recognises=of_type(DiffuLlamaConfig.model_type),
    plain="llama",
    tokenizer="TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",  # Llama 2's, as DiffuLLaMA's own is
    published={"diffusionfamily/diffullama": {"mask_token_id": 811}},
    licence="Apache-2.0 (code and weights, by their README; made from Llama 2)",
    parity=3e-6,
)
