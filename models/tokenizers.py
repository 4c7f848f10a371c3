"""The tokenizer beside a model's weights, read without remote code, and never missed in silence."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ..errors import first_line

_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model")


def load_tokenizer(folder: str | Path, name: str, **options: Any) -> Any:
    """The tokenizer of a folder or hub name; None when there is none, or (with a warning) when it cannot be read.

    Only text pairs need one, so a model whose tokenizer is broken is still probed by token ids.
    """
    if isinstance(folder, Path) and not any(any(folder.glob(pattern)) for pattern in _FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
    except Exception as error:
        warnings.warn(
            f"the tokenizer of {name!r} cannot be read: {first_line(error)}; pairs of token ids work, text pairs need "
            "one: pass tokenizer= to ProbedModel",
            stacklevel=3,
        )
        return None
