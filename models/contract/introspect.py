"""What a model says about itself: mask token, begin token, logit shift, context length.

Each is found in what was given, in the model's class, its config or its tokenizer, or it is asked for; none is
guessed from a name. `logit_shift` on the class states the shift of a family (Dream: 1).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from ...errors import RevprobeError, did_you_mean, nearest, shown
from .block_masks import WHOLE


def config_value(module: nn.Module, key: str) -> Any:
    """A setting of the module's config, of its text part where it has several; None when it has none."""
    config = getattr(_inner(module), "config", None)
    text_part = getattr(config, "get_text_config", None)
    return getattr(text_part() if callable(text_part) else config, key, None)


def own_tokenizer(module: nn.Module) -> Any:
    """The tokenizer that a module carries, as a TransformerLens bridge does; None when it has none."""
    found = getattr(module, "tokenizer", None)
    return found if callable(found) and hasattr(found, "get_vocab") else None


def _mask_id(given: int | str | None, tokenizer: Any) -> int | None:
    """The mask token as given by its id, or by its text. Raises: RevprobeError, for a text that is no token."""
    if not isinstance(given, str):
        return given
    vocabulary = {} if tokenizer is None else tokenizer.get_vocab()
    if given not in vocabulary:
        near = did_you_mean(given, vocabulary) if nearest(given, vocabulary) else "; pass its id, a whole number"
        where = "there is no tokenizer to look it up in" if tokenizer is None else "the tokenizer has no such token"
        raise RevprobeError(f"mask_token_id={shown(given)}: {where}{near}")
    return int(vocabulary[given])


def mask_token(given: int | str | None, tokenizer: Any, module: nn.Module, vocab_size: int, name: str) -> int | None:
    """The mask token's id: as given, else as tokenizer and config say; None when none of them names one.

    A tokenizer says it by its own mask token, and by the token that the model's class states as its family's
    (`mask_text`): published tokenizers list that one without calling it their mask.
    A model that has no logit for its mask token (SMDM) says which it is, and takes no other. One of uniform noise has
    none: its module takes an id beyond the vocabulary for a hidden place (`canvas.noise`).
    Raises: RevprobeError, when config, tokenizer and family disagree, when what is given is none that config or family
        say, or the id is outside the vocabulary or not the model's only one.
    """
    if (hidden := hidden_by_noise(module)) is not None:
        if given not in (None, hidden):
            raise RevprobeError(
                f"{name}: mask_token_id={shown(given)}: it has no mask token, and hides tokens behind random ones; "
                "leave mask_token_id out"
            )
        return hidden
    given, own = _mask_id(given, tokenizer), getattr(tokenizer, "mask_token_id", None)
    of_model = _stated_masks(tokenizer, module)
    stated = ({} if own is None else {"the tokenizer's mask token": own}) | of_model
    told = ", ".join(f"{what} is {one}" for what, one in stated.items())
    if given is None and len({*stated.values()}) > 1:
        raise RevprobeError(f"{name}: {told}; say which with mask_token_id=")
    known = next(iter(stated.values()), None) if given is None else given
    if known is not None and not 0 <= known < vocab_size:
        fix = "pass mask_token_id=" if given is None else "expected the id of its mask token"
        raise RevprobeError(f"{name}: mask token {known} is outside the vocabulary (0 to {vocab_size - 1}); {fix}")
    only = getattr(_inner(module), "mask_row", None)
    if known is not None and only not in (None, known):
        raise RevprobeError(
            f"{name}: mask token {known}: its mask token is {only}, the only one it has no logit for; leave "
            "mask_token_id out"
        )
    # One outside the vocabulary is left over from a larger model, and says nothing against another; nor does a default.
    held_to = any(0 <= one < vocab_size for one in of_model.values()) and not _by_default(module)
    if given is not None and held_to and given not in stated.values():
        raise RevprobeError(f"{name}: mask_token_id={given}, but {told}; leave it out, or correct what says otherwise")
    return known


def hidden_by_noise(module: nn.Module) -> int | None:
    """The id by which a module of uniform noise takes a hidden place; None for any other."""
    inner = _inner(module)
    return int(inner.hidden_id) if getattr(inner, "noise", "mask") == "uniform" else None  # type: ignore[arg-type]


def canvas_length(module: nn.Module) -> int | None:
    """Tokens of the canvas that a module writes on behind a prompt; None for any other."""
    inner = _inner(module)
    return None if hidden_by_noise(module) is None else int(inner.canvas_length)  # type: ignore[arg-type]


def draws(module: nn.Module) -> int:
    """How many fillings with random tokens a module's answers are means over; 1 where nothing is random."""
    return 1 if hidden_by_noise(module) is None else int(_inner(module).draws)  # type: ignore[arg-type]


def _stated_masks(tokenizer: Any, module: nn.Module) -> dict[str, int]:
    """The mask token as the config says it, and as the vocabulary lists the family's, each where there is one."""
    text = getattr(_inner(module), "mask_text", None)
    listed = tokenizer.get_vocab().get(text) if text is not None and hasattr(tokenizer, "get_vocab") else None
    # XLM and FlauBERT keep their mask as `mask_index`; their `mask_token_id` is a default, and their begin token.
    index = config_value(module, "mask_index")
    in_config = config_value(module, "mask_token_id") if index is None else index
    found = {"the config's": in_config, f"the family's, {text!r},": listed}
    return {what: one for what, one in found.items() if one is not None}


def _by_default(module: nn.Module) -> bool:
    """Whether the config's mask token is what a class of transformers has where a file says nothing (XLM: 0)."""
    kind = type(getattr(_inner(module), "config", None))
    default = getattr(kind, "mask_token_id", None) if kind.__module__.startswith("transformers.") else None
    return default is not None and default == config_value(module, "mask_token_id")


def begin_token(given: int | None, tokenizer: Any, module: nn.Module, vocab_size: int, name: str) -> int | None:
    """The begin token's id: as given, else the tokenizer's, else the config's.

    A config's default from a larger vocabulary (a small GPT-2 keeps 50256) names no token and counts as none.
    Raises: RevprobeError, when the given id is outside the vocabulary.
    """
    if given is not None and not 0 <= given < vocab_size:
        raise RevprobeError(f"{name}: begin token {given} is outside the vocabulary (0 to {vocab_size - 1})")
    known = (given, getattr(tokenizer, "bos_token_id", None), config_value(module, "bos_token_id"))
    return next((value for value in known if value is not None and 0 <= value < vocab_size), None)


def logit_shift(given: int | None, objective: str, module: nn.Module, name: str) -> int:
    """How many rows before position i its logits stand: as given, as the class states, or as its kind implies.

    Causal models predict the next token: 1. transformers' masked language models predict in place: 0. Any other
    bidirectional module may do either (LLaDA 0, Dream 1), and running it cannot tell.
    Raises: RevprobeError, when it cannot be told, or cannot be.
    """
    inner = _inner(module)
    stated = getattr(inner, "logit_shift", None) if given is None else given
    if stated is None and objective == "causal":
        return 1
    if stated is None and isinstance(inner, PreTrainedModel) and type(inner.config) in MODEL_FOR_MASKED_LM_MAPPING:
        kind: Any = MODEL_FOR_MASKED_LM_MAPPING[type(inner.config)]  # what AutoModelForMaskedLM loads for it
        stated = 0 if isinstance(inner, kind) else None
    if stated is None:
        raise RevprobeError(
            f"cannot tell at which row {name} predicts a masked token; pass logit_shift=0 (row i predicts token i) or "
            "logit_shift=1 (row i predicts token i + 1, as in models converted from causal ones)"
        )
    if stated not in (0, 1):
        raise RevprobeError(
            f"logit_shift {stated!r}: expected 0 (row i predicts token i) or 1 (row i predicts token i + 1)"
        )
    if objective == "causal" and stated == 0:
        raise RevprobeError(f"logit_shift 0 reads {name} at the target itself, which a causal model sees there; pass 1")
    return int(stated)


def block_size(given: int | str | None, objective: str, module: nn.Module, name: str) -> int | None:
    """Tokens of a block: as given, else as a model says that writes in blocks; None where every token sees every other.

    Such a model's class states its `attention`. Elsewhere the name means other things: a context length in nanoGPT.
    Raises: RevprobeError, when it is no size, cannot be told, or the model is causal.
    """
    inner = _inner(module)
    if hidden_by_noise(module) is not None and given not in (None, WHOLE):
        raise RevprobeError(
            f"{name}: block_size={given!r}: its canvas is one block, read as a whole; leave block_size out"
        )
    stated, attention = given, getattr(inner, "attention", "full")
    if stated is None and objective == "masked" and attention in _UNTOLD:
        stated = getattr(inner, "block_size", None)
        if stated is None:
            raise RevprobeError(
                f"{name}: {_UNTOLD[attention]}; pass block_size= with its number of tokens, or bidirectional=True "
                f"(block_size={WHOLE!r}) where every token sees every other"
            )
    if stated is None or stated == WHOLE:
        return None
    if not isinstance(stated, int) or isinstance(stated, bool) or stated < 1:
        raise RevprobeError(f"{name}: block_size={stated!r}: expected a whole number of tokens above 0, or {WHOLE!r}")
    if objective != "masked":
        raise RevprobeError(f"{name} is causal and reads token by token; leave block_size out, or load it as masked")
    return stated


def finished_blocks(module: nn.Module) -> str:
    """How a model that is read in blocks reads those that are finished: "whole", or "causal"."""
    return str(getattr(_inner(module), "finished_blocks", "whole"))


# What a class says of its attention where its config must say the block size, and does not.
_UNTOLD = {
    "block": "it writes block by block, and its config does not say how long a block is",
    "either": "its files do not say whether it writes block by block or sees the whole text at once",
}


def objective(module: nn.Module) -> str | None:
    """What the module's class says it is: by its own `objective`, or as one of transformers' heads; None otherwise."""
    inner = _inner(module)
    stated = getattr(inner, "objective", None)
    if isinstance(stated, str):
        return stated
    if isinstance(inner, PreTrainedModel):
        for name, heads in (("masked", MODEL_FOR_MASKED_LM_MAPPING), ("causal", MODEL_FOR_CAUSAL_LM_MAPPING)):
            kind: Any = heads.get(type(inner.config), None)
            if kind is not None and isinstance(inner, kind):
                return name
    return None


def max_length(module: nn.Module) -> int | None:
    """The longest sequence the config allows; None when it names no limit, or one below 1 (XLNet's -1: none).

    RoBERTa counts positions from its padding token's id on, so its table is longer than its context. A model that
    writes on a canvas takes that, behind a prompt of one token.
    """
    if (canvas := canvas_length(module)) is not None:
        return 1 + canvas
    limit = config_value(module, "max_position_embeddings")
    words = input_embedding(module)
    for part in module.modules():
        if isinstance(part, nn.Embedding) and part is not words and part.num_embeddings == limit:
            limit -= 0 if part.padding_idx is None else part.padding_idx + 1
            break
    return limit if limit is not None and limit > 0 else None


def input_embedding(module: nn.Module) -> Any:
    """The table of token embeddings, as transformers' `get_input_embeddings` gives it; None without one."""
    try:
        embed = getattr(module, "get_input_embeddings", lambda: None)()
    except (NotImplementedError, AttributeError):
        return None
    return embed if isinstance(getattr(embed, "weight", None), Tensor) else None


def special_ids(module: nn.Module) -> set[int]:
    """Token ids that mean something to the model itself: those its config names, and those its tables pad with."""
    config = getattr(_inner(module), "config", None)
    named = vars(config) if config is not None else {}
    stated = [v for key, v in named.items() if key.endswith(("_token_id", "_token_ids", "_index", "_idx"))]
    ids = {i for value in stated for i in (value if isinstance(value, list | tuple) else [value])}
    ids |= {part.padding_idx for part in module.modules() if isinstance(part, nn.Embedding)}
    return {i for i in ids if isinstance(i, int)}


def is_empty(module: nn.Module) -> bool:
    """Whether all of a module's parameters wait for their numbers, and no hook of accelerate's will bring them."""
    first = next(module.parameters(), None)
    if first is None or not all(parameter.is_meta for parameter in module.parameters()):
        return False
    return not any(hasattr(part, "_hf_hook") for part in module.modules())


def _inner(module: nn.Module) -> nn.Module:
    """The transformers model inside a wrapper (peft, a TransformerLens bridge's `original_model`); else the module."""
    original = getattr(module, "original_model", None)
    found = (part for part in module.modules() if isinstance(part, PreTrainedModel))
    return next(found, original if isinstance(original, nn.Module) else module)
