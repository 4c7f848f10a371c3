"""The tokenizer beside a model's weights, or one that a caller names; no code of a model's folder is ever run.

Published checkpoints often name a tokenizer class that no library has. What such a class reads lies in tokenizer.json
all the same, and its special tokens in tokenizer_config.json, so both are read without it.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config, tokenizer_class_from_name
from transformers.utils import cached_file

from ..errors import RevprobeError, first_line, shown
from .hub import TOKENIZER_FILES, hub_options

_WHOLE = "tokenizer.json"


def chosen_tokenizer(given: Any) -> Any:
    """The tokenizer that a caller names by a folder or hub name; any other object is taken for one.

    Raises: RevprobeError, when none can be read there.
    """
    if not isinstance(given, str | Path):
        return given
    try:
        place = Path(given) if Path(given).is_dir() else str(given)
        return _read(place, **hub_options(place))
    except Exception as error:
        raise RevprobeError(
            f"tokenizer={shown(str(given))} cannot be read: {_cause(error)}; expected a folder or hub name that has one"
        ) from error


def load_tokenizer(folder: str | Path, name: str, **options: Any) -> Any:
    """The tokenizer of a folder or hub name; None when there is none, or (with a warning) when it cannot be read.

    Only text pairs need one, so a model whose tokenizer is broken is still probed by token ids.
    """
    if isinstance(folder, Path) and not any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES):
        return None
    try:
        return _read(folder, **options)
    except Exception as error:
        warnings.warn(
            f"the tokenizer of {name!r} cannot be read: {_cause(error)}; pairs of token ids work, text pairs need one: "
            "pass tokenizer=",
            stacklevel=4,
        )
        return None


def require_rows(tokenizer: Any, rows: int, name: str, *, added: bool = True) -> None:
    """Raise when a tokenizer has more tokens than a model has rows in its embedding.

    Args:
        added: count tokens beside the vocabulary too. Checkpoints of transformers' own classes may carry some that
            their model has no rows for (Gemma 3's image token in its text models).
    Raises: RevprobeError, with both numbers.
    """
    counted = len(tokenizer) if hasattr(tokenizer, "__len__") else 0
    size = counted if added else getattr(tokenizer, "vocab_size", counted)
    if size > rows:
        raise RevprobeError(
            f"the tokenizer has {size} tokens and the embedding of {name!r} {rows} rows, so it is another model's; "
            "pass tokenizer= with the model's own"
        )


def _read(place: str | Path, **options: Any) -> Any:
    """The tokenizer that lies at a place. Raises: what transformers raises; RevprobeError, when only code reads it."""
    with _types_left_alone():
        named = get_tokenizer_config(place, **options).get("tokenizer_class")
        if named is None or _has_library(str(named)):
            return AutoTokenizer.from_pretrained(place, trust_remote_code=False, **options)
        if cached_file(place, _WHOLE, _raise_exceptions_for_missing_entries=False, **options) is None:
            raise RevprobeError(
                f"its class {named!r} is code of a model's folder, which is never run, and there is no {_WHOLE} to "
                "read instead"
            )
        return PreTrainedTokenizerFast.from_pretrained(place, **options)


def _has_library(tokenizer_class: str) -> bool:
    """Whether transformers, or who registered with it, has a class of this name."""
    names = (tokenizer_class, tokenizer_class.removesuffix("Fast"), f"{tokenizer_class}Fast")
    return any(tokenizer_class_from_name(name) is not None for name in names)


@contextmanager
def _types_left_alone() -> Iterator[None]:
    """Without transformers' remarks on config.json: no model is built from it here.

    They say that a family's `model_type` is not its own, and that a key of published files has a newer name.
    """
    of_configs = logging.getLogger("transformers.configuration_utils")
    level = of_configs.level
    of_configs.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`rope_scaling` is deprecated", FutureWarning)
            yield
    finally:
        of_configs.setLevel(level)


def _cause(error: Exception) -> str:
    return first_line(error, with_type=not isinstance(error, RevprobeError))
