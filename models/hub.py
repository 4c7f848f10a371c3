"""The model hub, asked once whether it answers: its client would try every file six times, for half a minute each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.utils import get_session
from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging as transformers_logging

_SECONDS = 5.0


def hub_options(source: str | Path) -> dict[str, Any]:
    """What `from_pretrained` needs for `source`: the local cache alone, where a hub name meets a hub out of reach."""
    if isinstance(source, Path) or constants.HF_HUB_OFFLINE or _hub_answers():
        return {}
    return {"local_files_only": True}


def _hub_answers() -> bool:
    try:
        status = get_session().head(constants.ENDPOINT, timeout=_SECONDS).status_code
    except Exception:  # whatever the client's transport raises: no network, no name, a proxy that refuses
        return False
    return status < 500 and status != 429  # these, too, are what the client would try again and again


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
