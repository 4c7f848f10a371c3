"""The model hub, asked once whether it answers.

The hub's own client would try every file six times, for half a minute each.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.utils import get_session
from huggingface_hub.utils import logging as hub_logging
from transformers.utils import find_adapter_config_file
from transformers.utils import logging as transformers_logging

from ..errors import RevprobeError, first_line

_SECONDS = 5.0
# One of them is there where a folder holds a tokenizer; the others say more of it.
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model")
_BESIDE = ("added_tokens.json", "special_tokens_map.json", "chat_template*")


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
    wanted = ["config.json", "*.safetensors", "*.safetensors.index.json", *TOKENIZER_FILES, *_BESIDE]
    return _downloaded(name, wanted, **options)


def _downloaded(name: str, wanted: list[str], **options: Any) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, **options))
    except Exception as error:  # whatever the client raises: no such repository, no network, a full disk
        raise RevprobeError(
            f"cannot download {name!r}: {first_line(error)}; check the name and the network, or give a folder"
        ) from error


def adapter_from_hub(name: str, **options: Any) -> Path | None:
    """The folder of the local cache that holds a hub name's adapter and its tokenizer; None where it has no adapter.

    transformers would put it on a base by itself, from pickled weights too, and say nothing of a missing tensor.
    Raises: RevprobeError, when its files cannot be had.
    """
    try:
        found = find_adapter_config_file(name, **options)
    except Exception:  # no such name, no network: the model's own config is asked for next, and says so
        return None
    if found is None:
        return None
    wanted = ["adapter_config.json", "adapter*.safetensors", "reads.json", *TOKENIZER_FILES, *_BESIDE]
    return _downloaded(name, wanted, **options)
