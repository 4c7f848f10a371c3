"""Taking out of runs what names a machine, its user and where files lie on it, before anything of them is handed on.

A path keeps its last part (`.../llada-tiny`), a user's name becomes USER and a host's HOST. The texts of facts and
tokens are data: only this machine's own folders are taken out of them, so a fact that is called as the user stays.
"""

from __future__ import annotations

import getpass
import html
import json
import os
import platform
import re
import socket
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
from markupsafe import Markup
from pandas.api.types import is_numeric_dtype

from ...finetune.runs.record import RunRecord
from ...probes.readings.reading import Reading
from ...probes.readings.readings import Readings

T = TypeVar("T")

USER, HOST = "USER", "HOST"
# Names that thousands of machines share: they tell nothing, and are words that a page is made of.
NOBODY = {"root", "user", "users", "home", "admin", "guest", "nobody", "default", "ubuntu", "debian", "runner"}
NOBODY |= {"docker", "jovyan", "localhost", "local", "host", "vm", "data", "test", "app", ""}
# What readings say in words of their own, which a name could equal.
KEPT = {"weights", "kind", "objective", "statistic", "dtype", "position_encoding", "asked", "split", "direction"}
SURE = 4  # letters of a name that is looked for in a finished page, where packed numbers are text as well
_PART = r"[^\s'\"`,;:()\[\]{}<>|\\/]"
_QUOTED = re.compile(r"(?P<mark>['\"`])(?P<path>(?:/|[A-Za-z]:[\\/]|\\\\)[^'\"`\n]+)(?P=mark)")
_POSIX = re.compile(rf"(?:file://|(?<![\w.~/<\-]))(?P<path>(?:/{_PART}+){{2,}}/?)")
_WINDOWS = re.compile(r"(?<!\w)(?P<path>(?:[A-Za-z]:|\\\\)[\\/]?[^\s'\"`,;:()\[\]{}<>|/]+\\[^\s'\"`,;:()\[\]{}<>|]*)")
# Below a known folder a blank belongs to the path where the word behind it leads on to another part.
_BELOW = rf"(?:[/\\](?:{_PART}| (?={_PART}+[/\\]))*)*"
# A value that is a path and nothing else may hold blanks; a sentence that begins with one has other marks besides.
_WHOLE = re.compile(r"(?:file://)?/[^\n;:('\"]+|[A-Za-z]:[\\/][^\n;:('\"]*|\\\\[^\n;:('\"]+")


class Private:
    """What is not to be handed on.

    Args:
        folders: of the runs; as they are and as they resolve, beside this user's home.
    """

    def __init__(self, *folders: Path) -> None:
        own = [*folders, *_own_folders()]
        places = {str(place) for one in own for place in (one.absolute(), one.resolve()) if len(place.parts) > 1}
        self.folders = sorted(places, key=len, reverse=True)
        self.names = {name: USER for name in _users(folders)} | {name: HOST for name in _hosts()}
        self.said: dict[str, str] = {}  # each path that was found, and what stands for it

    def text(self, text: str) -> str:
        """Plain text without paths and names."""
        return self._without_names(self.paths(text))

    def paths(self, text: str) -> str:
        """Plain text with `.../name` for each absolute path."""
        text = self._without_folders(text)
        text = _QUOTED.sub(lambda found: f"{found['mark']}{self._shortened(found['path'])}{found['mark']}", text)
        for pattern in (_WINDOWS, _POSIX):
            text = pattern.sub(lambda found: self._shortened(found["path"]), text)
        return text

    def value(self, value: T, key: object = None) -> T:
        """Plain values, however nested, without paths and names; under a key of KEPT without paths alone."""
        return self._value(value, key)

    def markup(self, part: Markup) -> Markup:
        """A finished part of a page: the paths found until now and the folders, as they are, escaped, or in JSON."""
        text = str(part)
        for path in sorted(self.said, key=len, reverse=True):
            for shown in dict.fromkeys((path, html.escape(path), json.dumps(path)[1:-1])):
                text = text.replace(shown, self.said[path])
        sure = {name: instead for name, instead in self.names.items() if len(name) >= SURE}
        return Markup(_named(self._without_folders(text), sure))  # it was markup, and no mark is added

    def record(self, record: RunRecord) -> RunRecord:
        """A run as the pages show it."""
        axes = {name: self.value(value, name) for name, value in record.axes.items()}
        readings = Readings(self.reading(one) for one in record.readings)
        problem = None if record.problem is None else self.text(record.problem)
        tables = {name: self.frame(table) for name, table in record.tables.items()}
        name, config = self.text(record.name), self.value(dict(record.config))
        return replace(record, name=name, axes=axes, config=config, readings=readings, problem=problem, tables=tables)

    def reading(self, reading: Reading) -> Reading:
        """A reading with the same numbers; nothing is worked out again."""
        meta, frame = self.value(reading.meta), self.frame(reading.frame)
        if meta == reading.meta and frame is reading.frame:
            return reading
        made = replace(reading, meta=meta, frame=frame)
        made.__dict__.update(
            {name: reading.__dict__[name] for name in ("measured", "_measures") if name in reading.__dict__}
        )
        return made

    def frame(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Rows whose texts hold none of the folders, and a model's name no other path; the same where nothing is."""
        changed = {}
        for name in frame.columns:
            if is_numeric_dtype(frame[name]):
                continue
            rule = self.text if name == "model" else self._without_folders
            texts = [one for one in frame[name].unique() if isinstance(one, str)] if _plain(frame[name]) else []
            instead = {one: new for one in texts if (new := rule(one)) != one}
            if instead:
                changed[name] = frame[name].map(lambda one, new=instead: new.get(one, one))
        return frame.assign(**changed) if changed else frame

    def left_in(self, text: str) -> str | None:
        """The first folder of this machine that a text still names; None where it names none."""
        return next((one for one in self.folders if re.search(_folder_pattern(one), text)), None)

    def _value(self, value: Any, key: object = None) -> Any:
        if isinstance(value, str):
            told = self._shortened(value) if _WHOLE.fullmatch(value) else self.paths(value)
            return told if key in KEPT else self._without_names(told)
        if isinstance(value, Mapping):
            return {self._value(name): self._value(inner, name) for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._value(inner, key) for inner in value)
        return self._value(str(value), key) if isinstance(value, os.PathLike) else value

    def _without_folders(self, text: str) -> str:
        for folder in self.folders:
            if folder in text:
                text = re.sub(_folder_pattern(folder) + _BELOW, self._shortened_match, text)
        return text

    def _without_names(self, text: str) -> str:
        return _named(text, self.names)

    def _shortened_match(self, found: re.Match[str]) -> str:
        return self._shortened(found[0])

    def _shortened(self, path: str) -> str:
        last = re.split(r"[/\\]", path.rstrip("/\\"))[-1]
        own = {str(place) for one in _own_folders() for place in (one, one.resolve())}
        short = "..." if not last or path.rstrip("/\\") in own else f".../{self._without_names(last)}"
        self.said[path] = short
        return short


def _folder_pattern(folder: str) -> str:
    return rf"(?<![\w.~\-]){re.escape(folder)}(?![\w\-])"


def _named(text: str, names: Mapping[str, str]) -> str:
    """A text with other words for the names that stand in it as words."""
    for name, instead in names.items():
        if name.lower() in text.lower():
            text = re.sub(rf"(?<![^\W_]){re.escape(name)}(?![^\W_])", instead, text, flags=re.IGNORECASE)
    return text


def _plain(column: pd.Series) -> bool:
    """Whether a column holds texts, and no lists, which cannot be told apart by `unique`."""
    return not any(isinstance(one, list | dict) or hasattr(one, "__array__") for one in column.head(1))


def _own_folders() -> list[Path]:
    with suppress(RuntimeError):
        return [Path.home()]
    return []


def _users(folders: Iterable[Path]) -> list[str]:
    """The user, as the system and the folders name them."""
    found = [home.name for home in _own_folders()]
    with suppress(KeyError, OSError, ImportError):
        found.append(getpass.getuser())
    for folder in folders:
        with suppress(KeyError, OSError, NotImplementedError):
            found.append(folder.owner())
    return _telling(found)


def _hosts() -> list[str]:
    """The machine, with and without its domain."""
    whole = [socket.gethostname(), platform.node(), os.environ.get("HOSTNAME", "")]
    return _telling([*whole, *(name.partition(".")[0] for name in whole)])


def _telling(names: Iterable[str]) -> list[str]:
    return sorted({name for name in names if name.lower() not in NOBODY and len(name) > 1}, key=len, reverse=True)
