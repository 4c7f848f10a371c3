"""What the commands that load a model share: options of `load_model` as `--load NAME=VALUE`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import RevprobeError, did_you_mean

if TYPE_CHECKING:
    from ..models.probed import ProbedModel

Load = Annotated[
    list[str] | None,
    typer.Option("--load", help="An option of load_model, NAME=VALUE, such as block_size=32; repeatable."),
]


# As messages and Python write them; JSON has them in small letters.
_PYTHON = {"True": True, "False": False, "None": None}


def named_values(given: Iterable[str] | None, option: str, such_as: str) -> dict[str, Any]:
    """`--load block_size=32` as keywords: numbers, lists, true and True as what they are, anything else as text.

    Raises: RevprobeError, for what is no NAME=VALUE.
    """
    values = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise RevprobeError(f"{option} {text!r}: expected NAME=VALUE, such as {such_as}")
        try:
            values[name] = _PYTHON[value] if value in _PYTHON else json.loads(value)
        except ValueError:
            values[name] = value
    return values


def load_options(given: Iterable[str] | None, **own: Any) -> dict[str, Any]:
    """What `load_model` is asked for: by `--load`, and by options that a command has of its own.

    Raises: RevprobeError, for one that is given both ways.
    """
    values = named_values(given, "--load", "block_size=32 or mask_token_id=151669")
    for name in values:
        if name in own:
            raise RevprobeError(f"--load {name}=...: this command has --{name} of its own; use that")
    return own | values


def load_named(source: str, **options: Any) -> ProbedModel:
    """`load_model`. Raises: RevprobeError, as it does, and for a config in a model's place."""
    from ..models.registry import load_model

    no_config(source)
    return load_model(source, **options)


def no_config(source: str) -> None:
    """Raises: RevprobeError, for a config in the place of a model or of a run's folder."""
    from ..finetune.config.loading import require_no_config

    require_no_config(source)


def options_by_model(given: Iterable[str] | None, models: Iterable[str], **own: Any) -> dict[str, dict[str, Any]]:
    """`--load OPTION=VALUE` for all of several models, `--load NAME:OPTION=VALUE` for one of them.

    Raises: RevprobeError, for a name that no model has, and as `load_options`.
    """
    by_model: dict[str, list[str]] = {name: [] for name in models}
    for text in given or ():
        left, equals, value = text.partition("=")
        name, colon, option = left.rpartition(":")
        if colon and name not in by_model:
            raise RevprobeError(f"--load {text!r}: {name!r} is none of the models{did_you_mean(name, by_model)}")
        for options in [by_model[name]] if colon else by_model.values():
            options.append(f"{option}{equals}{value}")
    return {name: load_options(options, **own) for name, options in by_model.items()}
