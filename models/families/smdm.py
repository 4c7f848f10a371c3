"""SMDM: masked diffusion models of 6M to 2.1B parameters, and the autoregressive twins trained beside them.

A checkpoint is one bare safetensors file in lit-gpt's layout, without a config: layers, width, MLP and vocabulary
follow from the shapes of its tensors, and the number of key groups from the rows of `attn.attn.weight` once the number
of heads is known. That is taken from a config.json beside the file (`n_head`), from the file's own metadata, or from
the list of published sizes; else it is asked for (`n_heads=`). Masked models and their twins differ in one row: the
embedding of a masked one has a row more than its unembedding, for the mask token.

Source: Nie et al. 2024 (arXiv 2410.18514); ML-GSAI/SMDM, lit_gpt/{diffmodel,model,config}.py, files of nieshen/SMDM.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ...errors import RevprobeError
from ..bases.lit_llama import LitLlamaForCausalLM, LitLlamaForMaskedDiffusion
from .family import Family, Fused
from .files import Files, bare_weights

# Heads of the published sizes by (layers, width, MLP); as many key groups as heads in all of them.
_HEADS = {
    (6, 256, 1024): 4,
    (8, 384, 1536): 6,
    (8, 512, 2048): 8,
    (9, 576, 2304): 9,
    (10, 640, 2560): 10,
    (13, 640, 2560): 10,
    (16, 640, 1600): 8,
    (12, 768, 3072): 12,
    (15, 768, 3072): 12,
    (18, 768, 3072): 12,
    (14, 896, 3584): 14,
    (16, 896, 3584): 14,
    (18, 896, 3584): 14,
    (16, 1024, 4096): 16,
    (18, 1024, 4096): 16,
    (20, 1024, 4096): 16,
    (18, 1280, 5120): 10,
    (21, 1280, 5120): 10,
    (18, 1408, 5632): 11,
    (24, 1280, 5120): 10,
    (21, 1408, 5632): 11,
    (19, 1536, 6144): 12,
    (24, 1408, 5632): 11,
    (22, 1536, 6144): 12,
    (25, 1536, 6144): 12,
    (20, 1792, 7168): 14,
    (24, 1792, 7168): 14,
    (22, 2048, 8192): 16,
    (25, 2048, 8192): 16,
    (28, 2176, 8704): 17,
}
_LENGTH, _EPS = 2048, 1e-5  # of all published sizes
_EMBED, _UNEMBED = "transformer.wte.weight", "lm_head.weight"
_FUSED, _GATE = "transformer.h.{}.attn.attn.weight", "transformer.h.{}.mlp.swiglu.w1.weight"
_BLOCK = re.compile(r"transformer\.h\.(\d+)\.(attn\.attn|mlp\.swiglu\.w1)\.weight")


def _in_lit_gpt_layout(files: Files) -> bool:
    """A file says nothing of itself; a config.json beside it may hold lit-gpt's sizes, and names no class."""
    return not files.model_type and any(map(_BLOCK.fullmatch, files.shapes))


def _recognises(model_class: type[PreTrainedModel], more_rows: Callable[[int], bool]) -> Callable[[Files], bool]:
    """What is saved here, or lit-gpt's layout with so many more rows in the embedding than in the unembedding."""

    def recognises(files: Files) -> bool:
        if files.model_type == model_class.config_class.model_type:  # type: ignore[union-attr]
            return True
        return _in_lit_gpt_layout(files) and more_rows((files.rows(_EMBED) or 0) - (files.rows(_UNEMBED) or 0))

    return recognises


def _to_config(files: Files, n_heads: int | None = None, rotary: str | None = None) -> dict[str, Any]:
    """Our settings. Raises: RevprobeError, for sizes that do not fit each other, or heads that stand nowhere."""
    asked = {} if rotary is None else {"rotary": rotary}
    if not files.model_type:
        return _sizes(files, n_heads) | asked
    own = files.settings.get("num_attention_heads")
    if n_heads not in (None, own):
        raise RevprobeError(f"n_heads={n_heads!r}: the config of {files.name!r} says {own}; leave n_heads out")
    return dict(files.settings) | asked


def _sizes(files: Files, n_heads: int | None) -> dict[str, Any]:
    several = bare_weights(files.place) if isinstance(files.place, Path) else []
    if several:  # one alone would have been read as that file
        names = ", ".join(path.name for path in several)
        raise RevprobeError(f"{files.place} holds {len(several)} checkpoints: {names}; give the path of one")
    said: dict[str, Any] = {**files.notes, **files.settings}
    embed, unembed = _shape(files, _EMBED), _shape(files, _UNEMBED)
    if embed[0] - unembed[0] not in (0, 1):
        raise RevprobeError(
            f"{files.name!r}: {_EMBED} has {embed[0]} rows and {_UNEMBED} {unembed[0]}; expected one row more (a "
            "masked model's, for the mask token) or as many (its autoregressive twin's)"
        )
    width, mlp = embed[1], _shape(files, _GATE.format(0))[0]
    layers = 1 + max(int(found[1]) for found in map(_BLOCK.fullmatch, files.shapes) if found)
    rows = _shape(files, _FUSED.format(0))[0]
    stated = _stated_heads(n_heads, said.get("n_head"), (layers, width, mlp))
    heads, groups = _heads(files.name, stated, (layers, width, mlp), rows)
    if int(said.get("n_query_groups", groups)) != groups:
        raise RevprobeError(
            f"{files.name!r}: n_query_groups {said['n_query_groups']} is stated, and the {rows} rows of "
            f"{_FUSED.format(0)} are {groups} of {heads} heads; the file or what is stated is of another model"
        )
    return {
        "vocab_size": unembed[0],
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": int(said.get("block_size", _LENGTH)),
        "rms_norm_eps": float(said.get("norm_eps", _EPS)),
        "tie_word_embeddings": False,
    }


def _shape(files: Files, name: str) -> tuple[int, ...]:
    """Of a matrix. Raises: RevprobeError, for a tensor that is not there, or is none."""
    shape = files.shapes.get(name, ())
    if len(shape) != 2:
        what = f"has the shape {shape}, and should be a matrix" if shape else "is missing"
        raise RevprobeError(f"{files.name!r}: {name} {what}; the file is of another model or a damaged one")
    return shape


def _stated_heads(asked: int | None, said: Any, sizes: tuple[int, int, int]) -> Any:
    """The number of heads as asked for, as the files say, or as published models of these sizes have.

    Raises: RevprobeError, for no whole number, or one that the files contradict. Warns: of another than published.
    """
    if asked is None:
        return said if said is not None else _HEADS.get(sizes)
    if not isinstance(asked, int) or isinstance(asked, bool):
        raise RevprobeError(f"n_heads={asked!r}: expected a whole number")
    if said is not None and int(said) != asked:
        raise RevprobeError(f"n_heads={asked}: the files say n_head {said}; leave n_heads out")
    if said is None and _HEADS.get(sizes, asked) != asked:
        published = f"published models of (layers, width, MLP) {sizes} have {_HEADS[sizes]}"
        warnings.warn(f"n_heads={asked}: {published}; leave n_heads out unless this is another", stacklevel=2)
    return asked


def _heads(name: str, stated: Any, sizes: tuple[int, int, int], rows: int) -> tuple[int, int]:
    """Heads and key groups. Raises: RevprobeError, when their number stands nowhere or does not fit the rows."""
    fitting = {heads: _groups(heads, sizes[1], rows) for heads in range(1, sizes[1] // 2 + 1)}
    fitting = {heads: groups for heads, groups in fitting.items() if groups}
    fits = ", ".join(map(str, fitting)) or "none"
    if stated is None:
        raise RevprobeError(
            f"{name!r} does not say how many heads it has, and its (layers, width, MLP) {sizes} are none of the "
            f"published sizes; pass n_heads= (its shapes fit {fits})"
        )
    if (groups := fitting.get(int(stated))) is None:
        raise RevprobeError(
            f"n_heads={stated}: the {rows} rows of {_FUSED.format(0)} at a width of {sizes[1]} do not fit so many "
            f"heads; pass n_heads= ({fits} fit)"
        )
    return int(stated), groups


def _groups(heads: int, width: int, rows: int) -> int:
    """The key groups of so many heads; 0 where the rows are not those of such heads, or these cannot turn."""
    dim, rest = divmod(width, heads)
    if rest or dim % 2 or rows % dim:
        return 0
    groups, odd = divmod(rows // dim - heads, 2)
    return groups if groups > 0 and not odd and heads % groups == 0 else 0


def _by_group(fused: Tensor, config: Any, parts: int) -> Sequence[Tensor]:
    """Each key group in turn: the queries of its heads, then its key, then its value."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    shared = heads // groups
    if fused.dim() != 2 or fused.shape[0] % (heads + 2 * groups):
        return []
    rows = fused.unflatten(0, (groups, shared + 2, -1))
    return [part.flatten(0, 2) for part in rows.split((shared, 1, 1), dim=1)]


def _family(
    name: str,
    about: str,
    model_class: type[PreTrainedModel],
    more_rows: Callable[[int], bool],
    parity: float | None = None,
) -> Family:
    block, ours = "transformer.h.{}", "model.layers.{}"
    return Family(
        name=name,
        about=about,
        model_class=model_class,
        recognises=_recognises(model_class, more_rows),
        to_config=_to_config,
        asks=("n_heads", "rotary"),
        embedding="",  # a masked model's has a row more than its logits, for the mask token
        key_map={
            "transformer.wte": "model.embed_tokens",
            f"{block}.norm_1": f"{ours}.input_layernorm",
            f"{block}.attn.proj": f"{ours}.self_attn.o_proj",
            f"{block}.norm_2": f"{ours}.post_attention_layernorm",
            f"{block}.mlp.swiglu.w1": f"{ours}.mlp.gate_proj",
            f"{block}.mlp.swiglu.w2": f"{ours}.mlp.up_proj",
            f"{block}.mlp.swiglu.w3": f"{ours}.mlp.down_proj",
            "transformer.ln_f": "model.norm",
        },
        fused={f"{block}.attn.attn": Fused([f"{ours}.self_attn.{letter}_proj" for letter in "qkv"], _by_group)},
        # Llama 2's, under the name that the published code reads it from.
        tokenizer="TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
        licence="Apache-2.0 (code); weights: see the model card",
        parity=parity,
    )


SMDM = (
    _family(
        "SMDM",
        "one bare file of nieshen/SMDM: 6M to 2.1B, and those fine-tuned for GSM8K, ShareGPT and reversal",
        LitLlamaForMaskedDiffusion,
        lambda more: more != 0,
        parity=4e-6,
    ),
    _family(
        "SMDM AR twin", "the autoregressive models trained beside SMDM's", LitLlamaForCausalLM, lambda more: more == 0
    ),
)
