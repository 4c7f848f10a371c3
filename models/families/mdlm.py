"""MDLM: RADD's encoder with adaptive norms, which the noise level conditions that the model is not told.

Written from the public code's models/dit.py (kuleshov-group/mdlm); logits equal that code's to 2e-5 in float32, but at
the mask token: it is never predicted, so its logit is -inf here, where the public sampler adds -1e6.

Source: Sahoo et al. 2024 (arXiv 2406.07524); the layout of kuleshov-group/mdlm-owt.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from ...errors import RevprobeError
from ..bases.bidirectional import BidirectionalDecoder
from ..bases.configs import require_sizes
from ..bases.masked_config import MaskedDiffusionConfig
from ..bases.radd import MaskedEncoder
from .family import Family, of_type
from .files import Files
from .radd import FUSED, GPT2_TOKENIZER, KEY_MAP, ROPE_BASE, rotation_check

_MUST_SAY = ("vocab_size", "hidden_dim", "n_blocks", "n_heads")


class MDLMConfig(MaskedDiffusionConfig, PreTrainedConfig):
    """The published config.json, key by key; the encoder's names read through `attribute_map`.

    Attributes:
        mask_token_id: the last token unless given.
    Raises: RevprobeError, for a model that is told the noise level, or sizes that do not fit each other.
    """

    model_type = "mdlm"
    attribute_map = {
        "d_model": "hidden_dim",
        "hidden_size": "hidden_dim",
        "n_layers": "n_blocks",
        "num_hidden_layers": "n_blocks",
        "num_attention_heads": "n_heads",
        "max_position_embeddings": "model_length",
    }
    # Of the encoder, and fixed in the published code.
    position_encoding, rope_base, mlp_ratio, layer_norm_eps = "rope", ROPE_BASE, 4, 1e-5
    norm_bias, head_bias, adaln = False, True, True
    dropout_sites, initialization = ("attention", "mlp"), "published"

    vocab_size: int = 50258
    hidden_dim: int = 768
    n_blocks: int = 12
    n_heads: int = 12
    cond_dim: int = 128
    model_length: int = 1024
    dropout: float = 0.1
    time_conditioning: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.time_conditioning:
            raise RevprobeError(
                f"{self.model_type} config: time_conditioning=True is not supported, since what such a model predicts "
                "depends on a noise level that no query names; expected False"
            )
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = False  # the published code ties nothing, whatever a file says
        if self.mask_token_id is None:
            self.mask_token_id = self.vocab_size - 1
        require_sizes(self, width="hidden_dim")


class MDLMForMaskedDiffusion(BidirectionalDecoder, MaskedEncoder):  # type: ignore[misc]
    """MDLM. The logits for position i stand in row i."""

    config_class = MDLMConfig


def stated_sizes(files: Files) -> dict[str, Any]:
    """The published settings. Raises: RevprobeError, when one of the sizes is not among them; none is guessed."""
    missing = [key for key in _MUST_SAY if key not in files.settings]
    if missing:
        raise RevprobeError(f"config.json of {files.name!r} lacks {', '.join(missing)}; expected the published keys")
    # The repository's code reads other names than what is saved here.
    return {key: value for key, value in files.settings.items() if key != "auto_map"}


_ADDED = {
    "sigma_map.mlp.0": "sigma_map.first",
    "sigma_map.mlp.2": "sigma_map.second",
    "blocks.{}.adaLN_modulation": "blocks.{}.adaLN_modulation",
    "output_layer.adaLN_modulation": "final_adaLN_modulation",
}
LAYOUT: dict[str, Any] = {
    "key_map": {f"backbone.{published}": ours for published, ours in (KEY_MAP | _ADDED).items()},
    "fused": {f"backbone.{published}": parts for published, parts in FUSED.items()},
    "constants": {
        "backbone.rotary_emb.inv_freq": rotation_check(lambda config: config["hidden_dim"] // config["n_heads"])
    },
    "tokenizer": GPT2_TOKENIZER,
}
MDLM = Family(
    name="MDLM",
    about="mdlm-owt and others in its layout",
    model_class=MDLMForMaskedDiffusion,
    recognises=of_type(MDLMConfig.model_type),
    to_config=stated_sizes,
    published={f"kuleshov-group/mdlm-{kind}": {} for kind in ("owt", "noeos-owt")},
    licence="Apache-2.0 (code), Apache-2.0 (weights)",
    parity=6e-6,
    **LAYOUT,
)
