"""The model hub, asked once whether it answers, and the tokenizer beside a model's weights or elsewhere.

The hub's own client would try every file six times, for half a minute each.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.utils import get_session
from huggingface_hub.utils import logging as hub_logging
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from ..errors import RevprobeError, first_line

_SECONDS = 5.0
_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model")  # one of them is there where a folder holds a tokenizer


def hub_options(source: str | Path) -> dict[str, Any]:
    """What `from_pretrained` needs for `source`: the local cache alone, where a hub name meets a hub out of reach."""
    if isinstance(source, Path) or constants.HF_HUB_OFFLINE:
        return {}
    try:
        status = get_session().head(constants.ENDPOINT, timeout=_SECONDS).status_code
        answers = status < 500 and status != 429  # these, too, are what the client would try again and again
    except Exception:  # whatever the client's transport raises: no network, no name, a proxy that refuses
        answers = False
    return {} if answers else {"local_files_only": True}


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars (long work here shows bars of its own) and the hub client's retry lines."""
    shown, level = transformers_logging.is_progress_bar_enabled(), hub_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        hub_logging.set_verbosity(level)
        if shown:
            transformers_logging.enable_progress_bar()


def download(name: str, **options: Any) -> Path:
    """The folder of the local cache that holds a hub model's config, safetensors and tokenizer.

    Raises: RevprobeError, when they are neither on the hub nor in the cache.
    """
    wanted = ["config.json", "*.safetensors", "*.safetensors.index.json", *_FILES]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, **options))
    except Exception as error:  # whatever the client raises: no such repository, no network, a full disk
        raise RevprobeError(
            f"cannot download {name!r}: {first_line(error)}; check the name and the network, or give a folder"
        ) from error


def chosen_tokenizer(given: Any) -> Any:
    """The tokenizer that a caller names by a folder or hub name; any other object is taken for one.

    Raises: RevprobeError, when none can be read there.
    """
    if not isinstance(given, str | Path):
        return given
    place = Path(given) if Path(given).is_dir() else str(given)
    try:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False, **hub_options(place))
    except Exception as error:
        raise RevprobeError(
            f"tokenizer={str(given)!r} cannot be read: {first_line(error)}; expected a folder or hub name that has one"
        ) from error


def require_rows(tokenizer: Any, rows: int, name: str) -> None:
    """Raises: RevprobeError, when a tokenizer has more tokens than a model has rows in its embedding."""
    size = len(tokenizer) if hasattr(tokenizer, "__len__") else 0
    if size > rows:
        raise RevprobeError(
            f"the tokenizer has {size} tokens and the embedding of {name!r} {rows} rows, so it is another model's; "
            "pass tokenizer= with the model's own"
        )


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
            "one: pass tokenizer=",
            stacklevel=4,
        )
        return None
