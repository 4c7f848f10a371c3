"""A checkpoint's tensors must be exactly the model's: none missing, none left over, none of another size.

transformers alone would fill a gap at random and print a report; a probe would then measure noise.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ...errors import RevprobeError

_IN_A_LAYER = re.compile(r"\.\d+\.")
_SHOWN = 5


@contextmanager
def without_report() -> Iterator[None]:
    """Load without transformers' table of tensors that do not match: `require_match` names them on one line.

    Load with `ignore_mismatched_sizes=True`, or it stops before it has told which tensors are of another size. A table
    of conversions that failed stays, since the error that follows refers to it.
    """
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_is_no_report)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
            yield
    finally:
        logger.removeFilter(_is_no_report)


def _is_no_report(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    told_again = "LOAD REPORT" in text or "checkpoint seem corrupted" in text
    return "CONVERSION" in text or not told_again


def require_match(
    info: Mapping[str, Any], source: object, *, strict: bool = True, official: Callable[[str], str] = str
) -> None:
    """Raise unless the checkpoint had exactly the tensors of the model.

    Args:
        info: `output_loading_info` of `from_pretrained`: missing_keys, unexpected_keys, mismatched_keys.
        strict: False lets tensors outside the layers be left over (BERT's pooler, another task's head: published
            checkpoints carry them), with a warning that names them.
        official: turns a tensor's name here into its name in the checkpoint, for the message.
    Raises: RevprobeError, naming the tensors.
    """
    outside: list[str] = []
    keys = {kind: sorted(info[f"{kind}_keys"]) for kind in ("missing", "unexpected")}
    shapes = {name: f" ({tuple(found)} for {tuple(asked)})" for name, found, asked in info["mismatched_keys"]}
    keys["mismatched"] = sorted(shapes)
    if not strict:
        outside = [name for name in keys["unexpected"] if not _IN_A_LAYER.search(name)]
        keys["unexpected"] = [name for name in keys["unexpected"] if name not in outside]
    wrong = [f"{kind} {listed(names, official, shapes)}" for kind, names in keys.items() if names]
    if wrong:
        raise RevprobeError(
            f"{source} does not match its config: {'; '.join(wrong)}; it is a checkpoint of another model or a "
            "damaged one"
        )
    if outside:
        warnings.warn(
            f"{source}: {listed(outside, official)} left over; the language model has no place for them", stacklevel=2
        )


def require_tied(model: Any, source: object) -> None:
    """transformers parts a head that differs from the embedding, whatever the config says; published code does not.

    Held to are classes that say they tie the two, which a config's default does not tell.
    Raises: RevprobeError, when the two should be one tensor.
    """
    head: Any = getattr(model.get_output_embeddings(), "weight", None)
    embed: Any = getattr(model.get_input_embeddings(), "weight", None)
    if not getattr(model.config, "tie_word_embeddings", False) or head is embed or head is None or embed is None:
        return
    if head.is_meta or embed.is_meta or not head.is_floating_point() or not embed.is_floating_point():
        return
    names = [name for name, one in model.named_parameters(remove_duplicate=False) if one is head]
    said = getattr(model, "_tied_weights_keys", None) or ()
    if not any(re.search(pattern, name) for name in names for pattern in said):
        return
    if not torch.equal(head, embed.to(head.device)):
        raise RevprobeError(
            f"{source}: its head differs from its embedding, which its config says are one; where the head is its own, "
            'set "tie_word_embeddings": false there'
        )


def listed(names: Sequence[str], official: Callable[[str], str] = str, shapes: Mapping[str, str] | None = None) -> str:
    """Published names, each once, with what they are called here and the shapes where these are wrong."""
    here: dict[str, list[str]] = {}
    for name in names:
        here.setdefault(official(name), []).append(name)
    shown = [
        published + ("" if ours == [published] else f" (here {', '.join(ours)})") + (shapes or {}).get(ours[0], "")
        for published, ours in list(here.items())[:_SHOWN]
    ]
    rest = f" and {len(here) - _SHOWN} more" if len(here) > _SHOWN else ""
    return ", ".join(shown) + rest
