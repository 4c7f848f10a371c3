"""How a causal model writes: greedily, left to right, through transformers' `generate` where it has one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.generation import GenerationMixin

from ...errors import RevprobeError
from ...models.contract.introspect import config_value
from ...models.peft_adapters import without_wrapper
from ...models.probed import ProbedModel


def generator_of(module: nn.Module) -> Any:
    """What has transformers' `generate` for this causal module; None where there is none.

    A peft model's own method rewrites its base's generation config: the base, adapters in place, is asked instead.
    """
    found: Any = without_wrapper(module)  # learned prompts stay in their wrapper, which takes no cache
    can = getattr(found, "can_generate", lambda: False)
    return found if isinstance(found, GenerationMixin) and can() else None


def continue_greedily(model: ProbedModel, prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
    """Greedy continuations by a causal model, each up to its length or its first end token."""
    ends = end_tokens(model)
    generator = generator_of(model.module)
    if generator is None:
        return _greedy(model, prompts, lengths, ends)
    ids = torch.tensor(prompts, device=model.device)
    settings: dict[str, Any] = {"do_sample": False, "num_beams": 1, "use_cache": True, "max_new_tokens": max(lengths)}
    settings |= {"eos_token_id": sorted(ends) or None, "pad_token_id": min(ends, default=0)}
    # Greedy means the likeliest token: a checkpoint's own repetition penalty and the like stay out of it.
    own, generator.generation_config = generator.generation_config, GenerationConfig()
    try:
        config = GenerationConfig(**settings)
        written = generator.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    finally:
        generator.generation_config = own
    rows = written[:, ids.shape[1] :].tolist()
    return [_until(row[:length], ends) for row, length in zip(rows, lengths, strict=True)]


def _greedy(model: ProbedModel, prompts: list[list[int]], lengths: list[int], ends: frozenset[int]) -> list[list[int]]:
    """The likeliest next token again and again, for modules without `generate`; no cache, so quadratic in length.

    Padding stands to the right, where a causal model cannot see it, so no mask is needed; a model in which it counts
    nevertheless gets prompts of one length, which stay so.
    """
    rows, goals = [list(prompt) for prompt in prompts], [len(p) + n for p, n in zip(prompts, lengths, strict=True)]
    unfinished = list(range(len(rows)))
    while unfinished:
        width = max(len(rows[i]) for i in unfinished)
        ids = torch.tensor([rows[i] + [0] * (width - len(rows[i])) for i in unfinished], device=model.device)
        last = torch.tensor([len(rows[i]) - 1 for i in unfinished], device=model.device)
        logits = model.logits(ids)[torch.arange(len(unfinished), device=model.device), last]
        if logits.isnan().any():
            raise RevprobeError(model.explain_non_finite())
        for i, token in zip(unfinished, logits.argmax(-1).tolist(), strict=True):
            rows[i].append(token)
        unfinished = [i for i in unfinished if len(rows[i]) < goals[i] and rows[i][-1] not in ends]
    return [_until(row[len(prompt) :], ends) for row, prompt in zip(rows, prompts, strict=True)]


def _until(tokens: list[int], ends: frozenset[int]) -> list[int]:
    """The tokens up to the first end token, that one included."""
    return tokens[: next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))]


def end_tokens(model: ProbedModel) -> frozenset[int]:
    """The ids that end an answer: the tokenizer's eos, pad and sep, and the config's that are special tokens to it.

    A config's default is not taken at its word: in a small vocabulary its eos, 2, may be a word.
    """
    tokenizer = model.tokenizer
    named = [getattr(tokenizer, f"{role}_token_id", None) for role in ("eos", "pad", "sep")]
    special = set() if tokenizer is None else set(tokenizer.all_special_ids)
    special |= {token for token, added in getattr(tokenizer, "added_tokens_decoder", {}).items() if added.special}
    generation = getattr(generator_of(model.module), "generation_config", None)
    for value in (config_value(model.module, "eos_token_id"), getattr(generation, "eos_token_id", None)):
        several = value if isinstance(value, list | tuple) else [value]
        named += [token for token in several if tokenizer is None or token in special]
    return frozenset(t for t in named if t is not None and t != model.mask_token_id and 0 <= t < model.vocab_size)
