"""Let a model answer in its own way: a masked one by unmasking, a causal one by greedy `generate`.

A prompt is encoded as the probes encode text, special tokens included; what the tokenizer puts after a text stands
after a masked model's answer and is left out for a causal one. The answer ends at the first end token (the
tokenizer's eos, pad or sep; those of the config where the tokenizer calls them special), then at the first of the
`stop` strings. A masked model fills exactly `max_new_tokens` positions, so one that was never shown an end token
fills them all with text: give `stop`, or the answer's own length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ...arguments import checked
from ...errors import RevprobeError
from ...hooks.untouched import untouched
from ...models.probed import ProbedModel, as_probed
from ...progress import Progress, shows_progress
from ..pairs.query import Query
from ..pairs.spans import encode_texts, require_fast_tokenizer
from ..passes.alone import in_equal_lengths_if_need_be
from ..passes.batches import make_batch, queries_per_batch
from .causal import continue_greedily, end_tokens, generator_of
from .masked import Prompt, Unmasking, schedule_of, unmask, unmasking


@checked
@shows_progress("prompts")
def decode(
    model: ProbedModel | nn.Module,
    prompts: Sequence[str],
    *,
    max_new_tokens: int | Sequence[int],
    steps: int | None = None,
    block_length: int | None = None,
    algorithm: str | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    batch_size: int | None = None,
    progress: Progress | bool | None = None,
) -> list[str]:
    """What the model writes after each prompt, without the blanks around it; the model comes out as it went in.

    Args:
        max_new_tokens: how many tokens to write, for all prompts or for each; a masked model fills exactly so many
            positions and then ends at its end token, a causal one may end before.
        steps, block_length, algorithm, temperature, seed: masked models only; see `masked.Unmasking`. A causal
            model decodes greedily.
        stop: strings that end an answer; they are no part of it.
        batch_size: prompts per forward pass; by the size of the model when None.
        progress: called with (prompts done, prompts in all).
    Raises: RevprobeError, for an empty prompt, one that does not fit the model with its answer, a setting that is out
        of range or not this kind of model's, a model without a tokenizer, or NaN logits.
    """
    model = as_probed(model)
    settings = {"steps": steps, "block_length": block_length, "algorithm": algorithm}
    how = decoding_settings(model, **settings, temperature=temperature, seed=seed)
    stop = require_stops(stop)
    encoded = encode_prompts(model, prompts)
    lengths = answer_lengths(max_new_tokens, len(encoded))
    tokens = decode_tokens(model, encoded, lengths, how, batch_size=batch_size, progress=progress)
    return [answer_text(model, row, stop) for row in tokens]


def decoding_settings(model: ProbedModel, **given: Any) -> Unmasking | None:
    """How a masked model will unmask; None for a causal model, which has nothing to choose.

    Raises: RevprobeError, for a setting that is out of range, or given to a causal model.
    """
    if model.objective == "masked":
        return unmasking(model, **given)
    unused = [name for name in ("steps", "block_length", "algorithm") if given.get(name) is not None]
    unused += ["temperature"] if given.get("temperature") else []
    if unused:
        raise RevprobeError(
            f"{unused[0]}={given[unused[0]]!r} for {model.name}: a causal model decodes greedily, left to right; leave "
            f"{unused[0]} out"
        )
    return None


def encode_prompts(model: ProbedModel, prompts: Sequence[str]) -> list[Prompt]:
    """Tokens around each answer. Raises: RevprobeError, without a fast tokenizer, or for a prompt without a token."""
    tokenizer = require_fast_tokenizer(model)
    if isinstance(prompts, str):
        raise RevprobeError(f"prompts {prompts!r}: expected a list of texts; put it in brackets")
    encoded = []
    for place, text in enumerate(encode_texts(tokenizer, prompts) if len(prompts) else []):
        own = [i for i, added in enumerate(text.is_added) if not added]
        if not own:
            raise RevprobeError(f"prompt {place} ({text.text!r}) has no token; expected a text that asks for something")
        after = () if model.objective == "causal" else text.token_ids[own[-1] + 1 :]
        encoded.append(Prompt(text.token_ids[: own[-1] + 1], after))
    return encoded


def answer_lengths(max_new_tokens: int | Sequence[int], count: int) -> list[int]:
    """One length a prompt. Raises: RevprobeError, for a length below 1, or another number of lengths than prompts."""
    lengths = [max_new_tokens] * count if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if len(lengths) != count:
        raise RevprobeError(f"{len(lengths)} max_new_tokens for {count} prompts; expected one number, or one for each")
    short = next((length for length in lengths if length < 1), None)
    if short is not None:
        raise RevprobeError(f"max_new_tokens {short!r}: expected at least 1 token")
    return lengths


def require_stops(stop: str | Sequence[str]) -> tuple[str, ...]:
    """The stop strings. Raises: RevprobeError, for an empty one, which would end every answer at once."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in stops:
        raise RevprobeError("stop '' ends every answer before it begins; leave it out or name a string such as '\\n'")
    return stops


def decode_tokens(
    model: ProbedModel,
    prompts: Sequence[Prompt],
    lengths: Sequence[int],
    how: Unmasking | None = None,
    *,
    batch_size: int | None = None,
    progress: Progress | bool | None = None,
) -> list[list[int]]:
    """The token ids written after each prompt, everything after an end token included for masked models.

    Raises: RevprobeError, when a prompt and its answer do not fit the model, or its logits are NaN.
    """
    if not prompts:
        return []
    model.require_mask_token("decoding")
    prompts = [after_begin(model, prompt) for prompt in prompts]
    require_fit(model, prompts, lengths)
    if model.objective == "masked":
        how = how or unmasking(model)
        for before, length in sorted({(len(p.before), n) for p, n in zip(prompts, lengths, strict=True)}):
            schedule_of(model, how, range(before, before + length))  # refused before the model runs
    return in_equal_lengths_if_need_be(model, lambda: _written(model, prompts, lengths, how, batch_size, progress))


def _written(
    model: ProbedModel,
    prompts: Sequence[Prompt],
    lengths: Sequence[int],
    how: Unmasking | None,
    batch_size: int | None,
    progress: Progress | bool | None,
) -> list[list[int]]:
    answers: list[list[int]] = [[] for _ in prompts]
    done = 0
    with untouched(model.module), torch.no_grad():
        for batch in batches_of(model, prompts, lengths, batch_size):
            asked, wanted = [prompts[i] for i in batch], [lengths[i] for i in batch]
            _hold(model, asked, wanted)
            if how is not None:
                assert model.mask_token_id is not None, "a masked model names its mask token when wrapped"
                texts = [p.blanks(n, model.mask_token_id) for p, n in zip(asked, wanted, strict=True)]
                written = unmask(model, texts, how, batch)
            else:
                written = continue_greedily(model, [list(prompt.before) for prompt in asked], wanted)
            for place, answer in zip(batch, written, strict=True):
                answers[place] = answer
            done += len(batch)
            if callable(progress):
                progress(done, len(prompts))
    return answers


def _hold(model: ProbedModel, prompts: Sequence[Prompt], lengths: Sequence[int]) -> None:
    """Hold a batch of the prompts, with something in the place of their answers, against some of them alone.

    A masked model is asked for every token of an answer, as in its first step; a causal one, which writes them one by
    one, for the last.
    """
    if model.objective == "causal":
        lengths = [max(lengths)] * len(lengths)  # `generate` writes as much for all
    queries = []
    for prompt, length in zip(prompts, lengths, strict=True):
        filled = [*prompt.before, *[*prompt.before, 0][:1] * length, *prompt.after]
        first, last = len(prompt.before), len(prompt.before) + length - 1
        places = range(first, last + 1) if model.objective == "masked" else (last,)
        queries.append(Query.unchecked(filled, places, (last,)))
    make_batch(model, queries, changed=True)


def answer_text(model: ProbedModel, tokens: Sequence[int], stop: Sequence[str] = ()) -> str:
    """The answer in written tokens: up to the first end token, then to the first stop string, blanks stripped.

    Other special tokens stay in it, and an id the tokenizer does not have stands as "<126400>": an answer is
    compared with what the model wrote, not with what reads well.
    """
    ends = end_tokens(model)
    kept = list(tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))])
    read = partial(model.tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    pieces = model.tokenizer.convert_ids_to_tokens(kept)
    if None in pieces:  # embeddings are often wider than the vocabulary, and decoding drops ids beyond it in silence
        each = zip(kept, pieces, strict=True)
        text = "".join(f"<{token}>" if piece is None else read([token]) for token, piece in each)
    else:
        text = read(kept)
    cuts = [place for mark in stop if (place := text.find(mark)) >= 0]
    return text[: min(cuts, default=len(text))].strip()


def after_begin(model: ProbedModel, prompt: Prompt) -> Prompt:
    """The prompt, or the begin token where a shift-1 model would have no row to read its first answer token at."""
    if prompt.before or not model.logit_shift:
        return prompt
    if model.begin_token_id is None:
        raise RevprobeError(
            f"an empty prompt for {model.name} (logit_shift 1), which predicts nothing without a begin token; pass "
            "begin_token_id="
        )
    return Prompt((model.begin_token_id,), prompt.after)


def require_fit(model: ProbedModel, prompts: Sequence[Prompt], lengths: Sequence[int]) -> None:
    """Every token is in the vocabulary, and every prompt leaves room for its answer."""
    for place, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        tokens = [*prompt.before, *prompt.after]
        wrong = next((token for token in tokens if not 0 <= token < model.vocab_size), None)
        if wrong is not None:
            raise RevprobeError(
                f"prompt {place} has token id {wrong}, outside the vocabulary of {model.name} (0 to "
                f"{model.vocab_size - 1}); its tokenizer is another model's"
            )
        if model.max_length is not None and len(tokens) + length > model.max_length:
            raise RevprobeError(
                f"prompt {place} has {len(tokens)} tokens and {length} are to follow, more than {model.name} takes "
                f"({model.max_length}); shorten the prompt or max_new_tokens"
            )


def batches_of(
    model: ProbedModel, prompts: Sequence[Prompt], lengths: Sequence[int], batch_size: int | None
) -> Iterator[list[int]]:
    """Indices of prompts that run together, short ones first; of one length where padding is better avoided.

    `generate` needs padding on the left, which moves learned positions and is ignored by some architectures: prompts
    of one length need none. So do those of a model whose padding would reach real tokens.
    """
    sizes = [
        len(p.before) if model.objective == "causal" else len(p.before) + n + len(p.after)
        for p, n in zip(prompts, lengths, strict=True)
    ]
    longest = max(len(p.before) + n + len(p.after) for p, n in zip(prompts, lengths, strict=True))
    size = queries_per_batch(model, [Query.unchecked(range(longest), (), ())], batch_size)
    apart = bool(model.contract.equal_lengths)
    apart |= model.objective == "causal" and generator_of(model.module) is not None
    batch: list[int] = []
    for place in sorted(range(len(prompts)), key=lambda i: (sizes[i], lengths[i])):
        if batch and (len(batch) == size or (apart and sizes[place] != sizes[batch[0]])):
            yield batch
            batch = []
        batch.append(place)
    yield batch
