"""What a module is made of: each parameter's role, the layout of fused projections, its layers, and where it attends.

Roles: embed, position, q, k, v, qkv (fused, layout undeclared), o, mlp, norm, unembed, other. They only group
what is reported; no number depends on them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..arguments import checked
from ..errors import RevprobeError, did_you_mean, shown
from ..hooks.attention_look import places_of
from ..hooks.attention_sites import Attention
from ..hooks.attention_survey import survey_attention
from ..hooks.gradients.rules import has_rule
from ..hooks.layer_numbers import LayerNumbers, layer_numbers
from ..hooks.state_survey import survey_states
from ..hooks.states import States
from .contract.trial import ordinary_ids

# A learned number for each offset, added to the scores and nowhere else: no embedding holds it.
_SCORE_BIASES = r"(embed_offsets|relative_attention_bias)"
# First match wins; matched against the parameter's path without the final ".weight"/".bias".
_PATTERNS: tuple[tuple[str, str], ...] = (
    ("position", rf"(wpe|embed_positions|position_embeddings|pos_emb\w*|{_SCORE_BIASES})$"),
    ("norm", r"(\w*norm\w*|ln_\w+|ln\d|LayerNorm)$"),
    ("unembed", r"((\w*lm_head|head)(\.\w+)*|unembed|decoder|embed_out|\w*predictions(\.\w+)*|vocab_\w+)$"),
    ("embed", r"(embed_tokens|wte|word_embeddings|tok_embeddings|token_type_embeddings|embed|embed_in|embeddings)$"),
    ("qkv", r"(c_attn|in_proj_qkv|qkv\w*|Wqkv|query_key_value)$"),
    ("q", r"(q_proj|q_lin|query|q)$"),
    ("k", r"(k_proj|k_lin|key|k)$"),
    ("v", r"(v_proj|v_lin|value|v)$"),
    ("o", r"(o_proj|out_proj|out_lin|attn_out|attn\.(c_proj|Wo)|\w*(attention|attn)\.(output\.)?dense)$"),
    ("mlp", r"((mlp|ffn)(\.\w+)*|fc\d|intermediate\.dense|output\.dense|(up|down|gate)_proj|dense_\w+)$"),
)
_LAYER = re.compile(r"\.(\d+)\.")
_WRAPPERS = re.compile(
    r"(\.base_layer|\.lora_(embedding_)?[AB](\.\w+)?|\.lora_magnitude_vector\.\w+|\.modules_to_save\.\w+|"
    r"\.original_module|\.(weight|bias))+$"
)
# Enough tokens that no other size of a model is likely to be the same.
LOOK_TOKENS = 11
_ATTENTION: WeakKeyDictionary[nn.Module, tuple[tuple[tuple[int, int], int], Attention]] = WeakKeyDictionary()
_NUMBERS: WeakKeyDictionary[nn.Module, tuple[int, LayerNumbers]] = WeakKeyDictionary()
_STATES: WeakKeyDictionary[nn.Module, tuple[int, States]] = WeakKeyDictionary()
ORDERS = ("blocked", "per_head")
# model_type of the config -> (pattern of the module's path, order of its output features):
#   blocked   all of q, then all of k, then all of v
#   per_head  q, k, v of the first head, then of the second, ...
_FUSED: dict[str, tuple[str, str]] = {
    "gpt2": (r"attn\.c_attn$", "blocked"),
    "diffugpt": (r"attn\.c_attn$", "blocked"),
    "modernbert": (r"attn\.Wqkv$", "blocked"),
    "phi3": (r"self_attn\.qkv_proj$", "blocked"),
    "gpt_neox": (r"attention\.query_key_value$", "per_head"),
    "bloom": (r"self_attention\.query_key_value$", "per_head"),
}


@dataclass(frozen=True)
class ParameterRole:
    """Where a parameter sits: its role and the index of its layer (None outside the layers)."""

    role: str
    layer: int | None


def parameter_role(name: str) -> ParameterRole:
    """The role of a parameter by its path, e.g. "blocks.0.attention.q_proj.weight".

    >>> parameter_role("blocks.0.attention.q_proj.weight")
    ParameterRole(role='q', layer=0)
    >>> parameter_role("transformer.wpe.weight")
    ParameterRole(role='position', layer=None)
    """
    path = _WRAPPERS.sub("", name)
    role = next((role for role, pattern in _PATTERNS if re.search(rf"(^|\.){pattern}", path)), "other")
    layer = _LAYER.search(name)
    return ParameterRole(role, int(layer[1]) if layer else None)


def parameter_roles(module: nn.Module) -> dict[str, ParameterRole]:
    """The role of every parameter, tied ones once under their first name."""
    return {name: parameter_role(name) for name, _ in module.named_parameters()}


def score_biases(module: nn.Module) -> list[str]:
    """The parameters that give a learned number for each offset, which is added to the scores and nowhere else."""
    names = [name for name, _ in module.named_parameters()]
    return [name for name in names if re.search(rf"(^|\.){_SCORE_BIASES}$", _WRAPPERS.sub("", name))]


class Runs(Protocol):
    """What is asked of a model here: a module, and how it is run on token ids (`models.probed.CalledModule`)."""

    module: nn.Module

    @property
    def device(self) -> torch.device: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def max_length(self) -> int | None: ...
    def logits(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor: ...


def attention_of(model: Runs, *, required: bool = True) -> Attention:
    """Where a model attends, as three runs of three short sequences show; looked at once for each module.

    Looked at again when the module's parts or its attention implementation have changed, and each time while its scores
    are constants (zero-initialised queries): what they are made from shows only once they have been trained.
    Args:
        required: whether some of it must be readable.
    Raises: RevprobeError, when no attention can be read, and some is required.
    """
    contract = getattr(model, "contract", None)
    virtual = contract.placement.ahead if contract is not None else (0, 0)  # of prompt and prefix adapters
    state = (virtual, _structure(model.module))
    known = _ATTENTION.get(model.module)
    if known is None or known[0] != state:
        known = state, _surveyed(model, virtual)
        if known[1].told:
            _ATTENTION[model.module] = known
        else:
            _ATTENTION.pop(model.module, None)
    return known[1].require(getattr(model, "name", "the model")) if required else known[1]


def states_of(model: Runs) -> States:
    """Where a model's states lie: the residual stream, what is written into it, what its heads read; looked at once.

    Raises: RevprobeError, for a model with virtual tokens, whose states are more than the query's.
    """
    state = _structure(model.module)
    known = _STATES.get(model.module)
    if known is None or known[0] != state:
        first, second = _short_sequences(model)
        names = [name for name, _ in model.module.named_parameters(remove_duplicate=False)]  # shared blocks have theirs
        roles = {_WRAPPERS.sub("", name): parameter_role(name).role for name in names}
        shown = first[:1], second[1:2]
        attention, numbers = attention_of(model), layer_numbers_of(model)
        known = state, survey_states(model.module, model.logits, shown, attention, numbers, roles)
        _STATES[model.module] = known
    return known[1]


def layer_numbers_of(model: Runs) -> LayerNumbers:
    """How the layers of a model are numbered; found once for each module, by one short run where that is needed."""
    state = _structure(model.module)
    known = _NUMBERS.get(model.module)
    if known is None or known[0] != state:
        ids = _short_sequences(model)[0][:1]
        known = state, layer_numbers(model.module, lambda: model.logits(ids))
        _NUMBERS[model.module] = known
    return known[1]


def _structure(module: nn.Module) -> int:
    """Changes with the modules that a model is made of and with the attention implementation it is set to."""
    parts = [(name, type(part)) for name, part in module.named_modules()]
    configs = {id(config): config for _, part in module.named_modules() if (config := getattr(part, "config", None))}
    chosen = [getattr(config, "_attn_implementation", None) for config in configs.values()]
    return hash((*parts, *map(str, chosen)))


def _short_sequences(model: Runs) -> tuple[Tensor, Tensor]:
    """Three sequences of ordinary ids, and the same with some ids of the second changed."""
    length = min(LOOK_TOKENS, model.max_length or LOOK_TOKENS)
    usual = [i for i in ordinary_ids(model, 3 * length) if i != getattr(model, "mask_token_id", None)] or [0]
    ids = torch.tensor([usual[(7 * n + n * n) % len(usual)] for n in range(3 * length)]).reshape(3, length)
    other = ids.clone()
    for place in places_of(length)[0]:
        other[1, place] = next((one for one in reversed(usual) if one != int(ids[1, place])), int(ids[1, place]))
    return ids.to(model.device), other.to(model.device)


def _surveyed(model: Runs, virtual: tuple[int, int]) -> Attention:
    numbers = layer_numbers_of(model)
    found = survey_attention(model.module, model.logits, _short_sequences(model), layer_of=numbers, virtual=virtual)
    stated = dict(getattr(model.module, "not_read", {}))
    return replace(found, without=_silent(model.module, found, numbers), left_out=stated | dict(found.left_out))


def _silent(module: nn.Module, attention: Attention, numbers: LayerNumbers) -> dict[int, str]:
    """The layers beside those that are read, in the same list of layers, and why they are not.

    Qwen3.5 alternates softmax and linear attention: its linear layers make no call and stand here.
    """
    by_path = all(numbers(site.path) is not None for site in attention.sites)
    beside = set(numbers.blocks(module, [site.path for site in attention.sites])) if by_path else set()
    reasons = {numbers(path): reason for path, reason in attention.left_out.items()}
    return {
        layer: f"layer {layer}: {reasons[layer]}" if layer in reasons else f"layer {layer} has no softmax attention"
        for layer in sorted(beside - set(attention.heads))
    }


@checked
def declare_fused(model_type: str, pattern: str, order: str) -> None:
    """Say how the fused projections of an architecture are laid out.

    Args:
        model_type: of its transformers config.
        pattern: a regular expression that the path of each fused module matches.
        order: "blocked" or "per_head".
    Raises: RevprobeError, for an unknown order or a pattern that is no regular expression.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise RevprobeError(
            f"pattern={shown(pattern)} is no regular expression: {error}; escape it or close it"
        ) from error
    if order not in ORDERS:
        raise RevprobeError(f"unknown order {order!r} of a fused projection{did_you_mean(order, ORDERS)}")
    _FUSED[model_type] = (pattern, order)


def fused_parts(module: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The output features of q, k and v in every fused projection whose layout is declared.

    Returns: parameter name -> {"q": indices, "k": indices, "v": indices}; empty for other architectures.
    """
    config = getattr(module, "config", None)
    declared = _FUSED.get(getattr(config, "model_type", None) or "")
    if declared is None:
        return {}
    pattern, order = declared
    parts: dict[str, dict[str, Tensor]] = {}
    for path, child in module.named_modules():
        if isinstance(child, nn.Linear | Conv1D) and has_rule(child) and re.search(pattern, path):
            features = child.weight.shape[1] if isinstance(child, Conv1D) else child.weight.shape[0]
            split = _split(features, config, order, path)
            parts |= {f"{path}.{name}": split for name, _ in child.named_parameters(recurse=False)}
    return parts


def _split(features: int, config: Any, order: str, path: str) -> dict[str, Tensor]:
    """Feature indices of q, k and v. Grouped keys make k and v narrower than q.

    Raises: RevprobeError, when so many features do not come apart that way.
    """
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    parts = 3 * heads if order == "per_head" else heads + 2 * groups
    if features % parts:
        raise RevprobeError(
            f"{path} has {features} output features, which are no q, k and v of {heads} heads in the order {order!r} "
            f"({parts} parts); declare_fused with a pattern that leaves it out, or the other order"
        )
    every = torch.arange(features)
    if order == "per_head":
        per_head = every.reshape(heads, 3, -1)
        return {part: per_head[:, i].reshape(-1) for i, part in enumerate("qkv")}
    width = features // parts
    sizes = [heads * width, groups * width, groups * width]
    return dict(zip("qkv", every.split(sizes), strict=True))
