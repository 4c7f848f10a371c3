"""What a caller may pass: each argument of a public function is held to its annotation before the function runs.

`@checked` is the one place where that is done, so that a text where a list belongs, a table where pairs belong or half
a seed ends in one line whichever function it is passed to, and a new function needs no checks of its own:

    @checked
    def probe(model: ProbedModel | nn.Module, pairs: ReversalPairs, *, layers: Iterable[int] | None = None, ...)

    probe(model, pairs, layers="all")   # RevprobeError: layers='all': expected a list of whole numbers or None

Valid arguments arrive as they were given, but for whole numbers of numpy and torch, which become Python's, and for
iterators, which become lists. A class may say what stands for one of its own: `accepts(value)` returns it, or raises.
"""

from __future__ import annotations

import collections.abc
import functools
import inspect
import operator
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

from .errors import RevprobeError, UnknownArgument, did_you_mean, shown

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

# Whole numbers of these names have bounds wherever they are taken; others stay in what numpy and torch can hold.
BOUNDS = {"batch_size": (1, 2**63 - 1), "seed": (0, 2**63 - 1), "jobs": (1, 2**15), "alphabet": (1, 2**15)}
BOUNDS |= dict.fromkeys(("vocab_size", "max_length"), (1, 2**24))
BOUNDS |= dict.fromkeys(("d_model", "n_layers", "n_heads", "mlp_ratio"), (1, 2**17))
ANY_WHOLE = (-(2**63), 2**63 - 1)
# What to do about a wrong argument, where its kind alone does not say it.
FIXES = {
    "model": "pass an nn.Module, or what load_model(...) returns",
    "module": "pass an nn.Module; load_model(...) makes one of a folder or a name",
    "pairs": "make them with letter_pairs, pairs_from_frame or ReversalPairs.from_pairs",
    "query": "pass pairs[0] or a Query",
    "question": "pass pairs[0] or a Query",
    "questions": "make them with relation.questions(...)",
    "reading": "pass what a probe returned",
    "figure": "pass what reading.plot() returned",
    "workers": "make them with ray_workers(4)",
    "rows": "name positions for each sequence, such as rows=[[9]]",
    "columns": "name them one by one, such as [[0]] for positions or ['parent', 'child'] for a table",
}
_WORDS: dict[Any, tuple[str, str]] = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("text", "texts"),
    bool: ("True or False", "True or False"),
    Path: ("a path", "paths"),
}
_LISTS = {list, tuple, set} | {getattr(collections.abc, name) for name in ("Iterable", "Sequence", "Collection")}
_MISFIT = object()  # what `_fitted` gives for a value that is none of the kind


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """The function, its arguments held to their annotations; Python's own TypeError where one is missing.

    Raises: RevprobeError, naming the first argument that does not fit, what was expected, and a fix; where no argument
        has that name a TypeError as well, with the nearest name.
    """
    signature = inspect.signature(function)
    kinds: dict[str, Any] = {}

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            _require_known(function.__qualname__, signature, kwargs)
            return function(*args, **kwargs)  # in Python's words, which name the function
        if not kinds:  # not when the function is defined: what it names may be defined below it
            kinds.update(_kinds(function))
        for name, value in bound.arguments.items():
            kind = kinds.get(name, Any)
            if kind is not Any and value is not signature.parameters[name].default:
                bound.arguments[name] = fitted(name, value, kind)
        return function(*bound.args, **bound.kwargs)

    return call


def _require_known(name: str, signature: inspect.Signature, given: Mapping[str, Any]) -> None:
    known = [one.name for one in signature.parameters.values() if one.kind is not inspect.Parameter.POSITIONAL_ONLY]
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in signature.parameters.values()):
        return
    for unknown in (one for one in given if one not in known):
        raise UnknownArgument(f"{name}() got an unexpected keyword argument {unknown!r}{did_you_mean(unknown, known)}")


def checked_fields(kind: type[T]) -> type[T]:
    """A dataclass, what it is made of held to its fields' annotations. Not for those that are made by the thousand."""
    kind.__init__ = checked(kind.__init__)  # type: ignore[method-assign]
    return kind


def fitted(name: str, value: Any, kind: Any) -> Any:
    """The value as an argument of this name and kind. Raises: RevprobeError, when it is none."""
    found = _fitted(value, kind, BOUNDS.get(name, ANY_WHOLE))
    if found is not _MISFIT:
        return found
    expected = f"expected {_words(kind, name)}"
    if isinstance(value, str | os.PathLike) and Path in typing.get_args(kind):
        expected = "expected a name or a path, its parts of 1 to 255 characters"
    fix = _as_list(name, value, kind) or (f"; {FIXES[name]}" if name in FIXES else "")
    plain = isinstance(value, str | int | float | list | tuple | dict | set | type(None) | os.PathLike)
    raise RevprobeError(
        f"{name}={shown(value)}: {expected}{fix}" if plain else f"{name}: {expected}, got {shown(value)}{fix}"
    )


def _as_list(name: str, value: Any, kind: Any) -> str:
    """The fix for one thing where a list of them is expected."""
    one = [value]
    return f", such as {name}={shown(one)}" if _fitted(one, kind, BOUNDS.get(name, ANY_WHOLE)) is not _MISFIT else ""


def _kinds(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotation of each parameter, evaluated; those of `*args` and `**kwargs` are for the function to check."""
    inner = inspect.unwrap(function)
    collected = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    found = {}
    for name, parameter in inspect.signature(inner).parameters.items():
        kind = parameter.annotation
        if parameter.kind in collected or kind is inspect.Parameter.empty:
            continue
        found[name] = eval(kind, inner.__globals__) if isinstance(kind, str) else kind  # our own source
    return found or {"": Any}


def _fitted(value: Any, kind: Any, bounds: tuple[int, int] = ANY_WHOLE) -> Any:
    """The value as one of the kind, or _MISFIT."""
    origin = typing.get_origin(kind) or kind
    if kind is Any or isinstance(kind, TypeVar):
        return value
    if kind is None or kind is type(None):
        return None if value is None else _MISFIT
    if _is_array_like(kind):
        return value if _holds_numbers(value) else _MISFIT
    if origin in (typing.Union, types.UnionType):
        return _fitted_union(value, typing.get_args(kind), bounds)
    if origin is Literal:
        same = (isinstance(value, type(option)) and value == option for option in typing.get_args(kind))
        return value if any(same) else _MISFIT
    if origin in _LISTS:
        return _fitted_list(value, kind, bounds)
    if origin is collections.abc.Callable:
        return value if callable(value) else _MISFIT
    if origin in (dict, Mapping):
        return _fitted_mapping(value, kind)
    if kind in _SCALARS:
        return _SCALARS[kind](value, bounds)
    return _fitted_class(value, origin)


def _fitted_union(value: Any, options: Iterable[Any], bounds: tuple[int, int]) -> Any:
    # Those that say themselves what stands for them come last: they raise.
    options = sorted(options, key=lambda option: hasattr(option, "accepts"))
    if any(isinstance(option, type) and isinstance(value, option) for option in options if hasattr(option, "accepts")):
        return value
    if Path in options and isinstance(value, str | os.PathLike):  # a name or a path: it must be able to be one
        return value if _is_path(value) else _MISFIT
    found = (_fitted(value, option, bounds) for option in options)
    return next((one for one in found if one is not _MISFIT), _MISFIT)


def _fitted_list(value: Any, kind: Any, bounds: tuple[int, int]) -> Any:
    """A list of fitting things: the value itself where they are as they were, never a text, a mapping or a table."""
    if isinstance(value, str | bytes | Mapping | type) or hasattr(value, "columns"):
        return _MISFIT
    if getattr(value, "ndim", 1) == 0:
        return _MISFIT
    try:
        given = list(value)
    except TypeError:
        return _MISFIT
    parts = typing.get_args(kind)
    if typing.get_origin(kind) is tuple and Ellipsis not in parts:  # so many, each of its own kind
        if len(parts) != len(given):
            return _MISFIT
        fitting = [_fitted(one, part, bounds) for one, part in zip(given, parts, strict=True)]
    else:
        fitting = [_fitted(one, parts[0], bounds) for one in given] if parts else given
    if any(one is _MISFIT for one in fitting):
        return _MISFIT
    same = hasattr(value, "__len__") and all(one is other for one, other in zip(given, fitting, strict=True))
    return value if same else fitting


def _fitted_mapping(value: Any, kind: Any) -> Any:
    """A mapping, whose values are looked at and left as they are."""
    if not isinstance(value, Mapping):
        return _MISFIT
    inner = (typing.get_args(kind) or (Any, Any))[1]
    return _MISFIT if any(_fitted(one, inner) is _MISFIT for one in value.values()) else value


def _fitted_class(value: Any, kind: Any) -> Any:
    if not isinstance(kind, type):
        return value  # a kind of annotation that no argument has had so far
    if getattr(kind, "_is_protocol", False):
        wanted = [name for name in vars(kind) if not name.startswith("_")]
        # Statically: asking for the value would work out a reading's interval.
        missing = [name for name in wanted if inspect.getattr_static(value, name, _MISFIT) is _MISFIT]
        return _MISFIT if missing else value
    if isinstance(value, kind):
        return value
    accepts = getattr(kind, "accepts", None)
    return _MISFIT if accepts is None else accepts(value)


def _whole(value: Any, bounds: tuple[int, int]) -> Any:
    if isinstance(value, bool):
        return _MISFIT
    try:
        number = operator.index(value)
    except TypeError:
        return _MISFIT
    return number if bounds[0] <= number <= bounds[1] else _MISFIT


def _number(value: Any, _: tuple[int, int]) -> Any:
    if isinstance(value, bool | str) or getattr(value, "ndim", 0) > 0 or not hasattr(value, "__float__"):
        return _MISFIT
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return _MISFIT
    # numpy has no function for a whole number that fits none of its own
    return number if isinstance(value, int) and abs(value) > ANY_WHOLE[1] else value


def _truth(value: Any, _: tuple[int, int]) -> Any:
    return bool(value) if isinstance(value, bool) or type(value).__name__ in ("bool_", "bool") else _MISFIT


def _is_path(value: Any) -> bool:
    """Whether text can name a file or folder: not empty, no NUL, no part that no file system takes."""
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else ""
    return (
        isinstance(text, str)
        and "\0" not in text
        and 0 < len(text) < 4096
        and all(len(part.encode("utf-8", "replace")) <= 255 for part in text.split(os.sep))
    )


_SCALARS: dict[Any, Callable[[Any, tuple[int, int]], Any]] = {
    int: _whole,
    float: _number,
    bool: _truth,
    str: lambda value, _: value if isinstance(value, str) else _MISFIT,
    Path: lambda value, _: value if _is_path(value) else _MISFIT,
}


def _is_array_like(kind: Any) -> bool:
    """Whether an annotation is numpy's ArrayLike, told without importing numpy for those who have no use for it."""
    return any("_SupportsArray" in str(part) for part in typing.get_args(kind))


def _holds_numbers(value: Any) -> bool:
    import numpy as np

    if isinstance(value, str | bytes | Mapping | type(None)):
        return False
    try:
        return np.asarray(value).dtype.kind in "iuf"
    except (TypeError, ValueError, RuntimeError):
        return False


def _words(kind: Any, name: str, many: bool = False) -> str:
    """A kind of argument in words, "a list of whole numbers or None"."""
    origin, parts = typing.get_origin(kind) or kind, typing.get_args(kind)
    low, high = BOUNDS.get(name, ANY_WHOLE)
    if kind is int and not many and low > ANY_WHOLE[0]:
        return f"a whole number {f'from {low} to {high}' if high < ANY_WHOLE[1] else f'of at least {low}'}"
    if kind in _WORDS:
        return _WORDS[kind][many]
    if kind is None or kind is type(None):
        return "None"
    if _is_array_like(kind):
        return "a number or an array of numbers"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_words(part, name, many) for part in parts))
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin is tuple and parts and Ellipsis not in parts:
        return f"({', '.join(_words(part, name) for part in parts)})"
    if origin in _LISTS:
        inner = next((part for part in parts if part is not Ellipsis), Any)
        return "a list" if inner is Any else f"a list of {_words(inner, name, many=True)}"
    if origin is collections.abc.Callable:
        return "a function"
    if origin in (dict, Mapping):
        return "a mapping" if not parts or parts[1] is Any else f"a mapping of {_words(parts[1], name, many=True)}"
    called = getattr(origin, "__name__", str(origin))
    return called if many or called.endswith("s") else f"{'an' if called[0] in 'AEIOU' else 'a'} {called}"
