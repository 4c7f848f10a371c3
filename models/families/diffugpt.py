"""DiffuGPT: transformers' GPT-2 without the causal mask; position i is still predicted at row i - 1.

config.json is GPT-2's and says `gpt2`, but the tensors have other names: the model was taken apart before it was
saved. So a checkpoint is known by those, or by its `architectures`. The medium size has a mask token more than its
config says: the rows of the embedding decide. Which token is the mask stands in no file; training used an ordinary one
for the small size and the added one for the medium. A plain GPT-2 folder can be read so too, by `bidirectional=True`.

Source: Gong et al. 2025 (arXiv 2410.17891); HKUNLP/DiffuLLaMA, model.py.
"""

from __future__ import annotations

from transformers import GPT2Config, GPT2LMHeadModel

from ...errors import RevprobeError
from ..bases.bidirectional import BidirectionalDecoder
from ..bases.masked_config import MaskedDiffusionConfig
from .family import Family, published_name, rename_by
from .files import Files

_EMBED = "embed_tokens"
_PLAIN = "gpt2"
_IN_BLOCK = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
_KEY_MAP = {_EMBED: "transformer.wte", "denoise_model.wpe": "transformer.wpe"}
_KEY_MAP |= {f"denoise_model.h.{{}}.{part}": f"transformer.h.{{}}.{part}" for part in _IN_BLOCK}
_KEY_MAP |= {"denoise_model.ln_f": "transformer.ln_f"}


class DiffuGPTConfig(MaskedDiffusionConfig, GPT2Config):
    model_type = "diffugpt"


class DiffuGPTForMaskedDiffusion(BidirectionalDecoder, GPT2LMHeadModel):  # type: ignore[misc]
    config_class = DiffuGPTConfig
    logit_shift = 1
    mask_text = "[¨M¨]"  # which the tokenizer of the medium size was given

    @staticmethod
    def official_name(name: str) -> str:
        return published_name(name, _KEY_MAP)


rename_by(_KEY_MAP, DiffuGPTConfig.model_type)


def _recognises(files: Files) -> bool:
    """Any GPT-2's headers are looked into, which costs milliseconds; a file that has none is left to the loader."""
    if files.model_type != _PLAIN:
        return files.model_type == DiffuGPTConfig.model_type
    try:
        return "DiscreteDiffusionModel" in files.architectures or f"{_EMBED}.weight" in files.shapes
    except RevprobeError:
        return False


DIFFUGPT = Family(
    name="DiffuGPT",
    about="DiffuGPT small and medium; with bidirectional=True any GPT-2 folder that holds such a model",
    model_class=DiffuGPTForMaskedDiffusion,
    recognises=_recognises,
    key_map=_KEY_MAP,
    streams=True,
    embedding=f"{_KEY_MAP[_EMBED]}.weight",
    plain=_PLAIN,
    tokenizer="openai-community/gpt2",
    published={
        "diffusionfamily/diffugpt-s": {"mask_token_id": 10541},
        # Its config keeps GPT-2's 50257 tokens; the one added is the mask.
        "diffusionfamily/diffugpt-m": {"mask_token_id": 50257, "vocab_size": 50258},
    },
    licence="Apache-2.0 (code and weights)",
    parity=2e-6,
)
