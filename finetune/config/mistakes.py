"""A config that is wrong or has changed, in one line: the key, the file, the nearest valid key; old and new values."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from ...errors import did_you_mean, nearest


def explain(error: ValidationError, kind: type[BaseModel], source: str) -> str:
    """One line about every problem of a config, numbered where there are several.

    Args:
        kind: the model that was validated against; its fields are the valid keys.
        source: the file's name, which opens the line.
    """
    problems = error.errors(include_url=False)
    # A mistyped key is the cause of a "missing" one: name it first.
    problems.sort(key=lambda problem: problem["type"] != "extra_forbidden")
    said = [_said(dict(problem), kind) for problem in problems]
    if len(said) == 1:
        return f"{source}: {said[0]}"
    return f"{source}: {len(said)} problems: " + "; ".join(f"({n}) {one}" for n, one in enumerate(said, start=1))


def _said(first: dict[str, Any], kind: type[BaseModel]) -> str:
    place = tuple(first["loc"])
    key, message = dotted(place), str(first["msg"])
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r}{_nearest_key(place, kind)}"
    if first["type"] == "missing":
        return f"{key!r} is missing; add it"
    if first["type"] == "value_error":  # our own validators already say value, expectation and fix
        return (f"{key}: " if key else "") + message.removeprefix("Value error, ")
    return f"{key} is {first['input']!r}; expected {_expectation(first, message)}"


def _expectation(problem: dict[str, Any], message: str) -> str:
    """pydantic's message as a noun, with the nearest choice where there are choices."""
    if problem["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return "a section with keys of its own"
    if problem["type"] == "string_pattern_mismatch":
        return "letters, digits, '.', '_' and '-' only, since it names a folder"
    if problem["type"] == "literal_error":
        expected = problem["ctx"]["expected"]  # 'rope', 'alibi' or 'none'
        near = nearest(str(problem["input"]), re.findall(r"'([^']*)'", expected), 1)
        return f"{expected}; the closest is {near[0]!r}" if near else expected
    return message.removeprefix("Input should be ").removeprefix("a valid ").replace("Input should have", "with")


def _nearest_key(place: tuple[Any, ...], kind: type[BaseModel]) -> str:
    """The valid key most like the one at `place`: the same key in another section, else the nearest in its own."""
    unknown = str(place[-1])
    elsewhere = [dotted(path) for path in _paths(kind) if path[-1] == unknown]
    if elsewhere:
        return f"; the closest is {elsewhere[0]!r}"
    section = kind
    for part in place[:-1]:
        if isinstance(part, int):  # a position in a list of sections: the section is the same
            continue
        field = section.model_fields.get(part)
        nested = None if field is None else next(_models(field.annotation), None)
        if nested is None:
            return ""
        section = nested
    parent = dotted(place[:-1])
    return did_you_mean(unknown, section.model_fields) + (f" (in {parent})" if parent else "")


def _paths(kind: type[BaseModel], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key of a config, with the sections above it."""
    for name, field in kind.model_fields.items():
        yield (*above, name)
        for nested in _models(field.annotation):
            yield from _paths(nested, (*above, name))


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The config sections inside an annotation such as `list[Cell] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)


def dotted(place: tuple[Any, ...]) -> str:
    """A place in a config as one writes it.

    >>> dotted(("cells", 0, "seed", 1))
    'cells[0].seed[1]'
    """
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def differences(old: BaseModel, new: BaseModel) -> list[str]:
    """The keys in which two configs differ, as "training.seed: 0 -> 1"."""
    before, after = dict(_leaves(old.model_dump(mode="json"))), dict(_leaves(new.model_dump(mode="json")))
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return [f"{dotted(key)}: {before.get(key)!r} -> {after.get(key)!r}" for key in keys]


def _leaves(values: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*above, key))
        else:
            yield (*above, key), value


def require_own_names(named: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """Hold the names of a sweep's runs, each with what tells it apart, against each other: a run's folder has its name.

    Raises: ValueError, for two of one name.
    """
    known: dict[str, Mapping[str, Any]] = {}
    for name, axes in named:
        if name in known:
            fix = "name it once" if known[name] == axes else "rename one of their labels"
            raise ValueError(f"{dict(known[name])} and {dict(axes)} are both the run {name!r}; {fix}")
        known[name] = axes
