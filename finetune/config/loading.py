"""From a YAML file, or the name of an example, to a checked config and back; what is wrong is one line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from ...errors import RevprobeError, did_you_mean, first_line
from .fields import Section
from .kinds import another_kind, told_kind, way_on
from .mistakes import explain

Kind = TypeVar("Kind", bound=Section)
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def example_names() -> list[str]:
    """Configs that come with the package and can be named instead of a file, e.g. "one-layer-quick"."""
    named = (path for path in EXAMPLES.glob("*.yaml") if "\nname: " in path.read_text(encoding="utf-8"))
    return sorted(path.stem.replace("_", "-") for path in named)  # without fsdp.yaml, which is accelerate's


def find_config(source: str | Path) -> Path:
    """The file a user means by `source`: a path, or the name of an example.

    Raises: RevprobeError, when there is neither; it names the nearest example.
    """
    path = Path(source)
    if path.is_file():
        return path
    if str(source) in example_names():
        return EXAMPLES / f"{str(source).replace('-', '_')}.yaml"
    if path.is_dir():
        inside = next((path / name for name in ("config.yaml", "sweep.yaml") if (path / name).is_file()), None)
        fix = "give the YAML file itself" if inside is None else f"its config is {inside}"
        raise RevprobeError(f"{str(source)!r} is a folder; expected a YAML file: {fix}")
    raise RevprobeError(
        f"no config file {str(source)!r}, and no example of that name{did_you_mean(str(source), example_names())}"
    )


def require_no_config(source: str | Path) -> None:
    """Tell a config, or the name of an example, that is given where a model or a run's folder belongs.

    Raises: RevprobeError, with the command that takes it first.
    """
    path = Path(source)
    if path.suffix not in (".yaml", ".yml") and (path.exists() or str(source) not in example_names()):
        return
    if path.suffix in (".yaml", ".yml") and not path.is_file():
        return
    values = parse_yaml(find_config(source).read_text(encoding="utf-8", errors="replace"), str(source))
    found = told_kind(values) if isinstance(values, dict) else None
    if found is None:
        raise RevprobeError(f"{str(source)!r} is a YAML file; expected the folder of a run or of a model, or its name")
    kind, key = found
    raise RevprobeError(
        f"{source} is {kind.what} (it has {key!r}); {way_on(kind, str(source))}, then give a run's folder"
    )


def load_config(source: str | Path | Mapping[str, Any], kind: type[Kind]) -> Kind:
    """Read a YAML file (or an example by name), or a mapping of the same keys, as a RunConfig or a SweepConfig.

    Raises: RevprobeError, one line: for a mistyped key its dotted path, the file and the nearest valid key; for a
        wrong value the key, the value and what was expected.
    """
    if isinstance(source, Mapping):
        return checked_config(dict(source), kind, "the config")
    path = find_config(source)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RevprobeError(
            f"{path}: not a text file ({error.reason} at byte {error.start}); expected YAML in UTF-8"
        ) from error
    return parse_config(text, kind, str(path))


def parse_config(text: str, kind: type[Kind], source: str) -> Kind:
    """As `load_config`, from text; `source` names it in errors."""
    return checked_config(parse_yaml(text, source), kind, source)


def checked_config(values: Any, kind: type[Kind], source: str) -> Kind:
    """Plain values as a config. Raises: RevprobeError, as `load_config`."""
    if not isinstance(values, dict):
        raise RevprobeError(
            f"{source}: expected the keys {', '.join(kind.model_fields)}, got {type(values).__name__}; see examples/"
        )
    wrong = None if kind.kind is None else another_kind(values, kind.kind, source)
    if wrong is not None:
        raise RevprobeError(wrong)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise RevprobeError(explain(error, kind, source)) from error


def dump_config(config: BaseModel) -> str:
    """The config as YAML that `load_config` reads back to an equal one."""
    values = config.model_dump(mode="json")
    first = {"name": values["name"]} if "name" in values else {}
    return dump_yaml(first | values)


def dump_yaml(values: Mapping[str, Any], **options: Any) -> str:
    """Plain values as YAML from which `parse_yaml` reads the same: text that looks like a number is quoted.

    Args:
        options: of PyYAML's dump (width=, allow_unicode=).
    """
    return yaml.dump(dict(values), Dumper=_ConfigDumper, sort_keys=False, **options)


def merged(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Two nested mappings as one; what the second says holds.

    >>> merged({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}})
    {'a': {'b': 1, 'c': 3}}
    """
    both = dict(base)
    for key, value in own.items():
        old = both.get(key)
        both[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return both


def parse_yaml(text: str, source: str) -> Any:
    """Text to plain values. Raises: RevprobeError, with the line number, for text that is not YAML or repeats a key."""
    try:
        return yaml.load(text, Loader=_ConfigLoader)
    except RecursionError:
        raise RevprobeError(f"{source}: nested deeper than any config is; expected sections of plain values") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RevprobeError(
            f"{source}: {where}not valid YAML: {problem}; compare with examples/one_layer_quick.yaml"
        ) from error


class _ConfigLoader(yaml.SafeLoader):
    """PyYAML, but the second of two equal keys is an error (PyYAML keeps it in silence) and 1e-3 is a number.

    ruamel.yaml was tried: as YAML 1.2 it reads `yes`, `010` and `12:30` otherwise than configs of version 0.1 mean
    them, as YAML 1.1 it reads `y` as true and warns of 1e-3, and PyYAML would still be needed for writing.
    """

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception as error:  # a date of month 13, `!!int x`: PyYAML lets whatever its parsers raise through
            raise yaml.constructor.ConstructorError(
                problem=f"{node.value!r} is no {node.tag.rpartition(':')[2]} ({first_line(error)}); put it in quotes",
                problem_mark=node.start_mark,
            ) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                what = "mapping" if isinstance(key, yaml.MappingNode) else "list"
                raise yaml.constructor.ConstructorError(
                    problem=f"a {what} stands where a key or a plain value is expected; put text that holds braces or "
                    'brackets in quotes, as in "{{ run }}"',
                    problem_mark=key.start_mark,
                )
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"key {key.value!r} stands twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _ConfigDumper(yaml.SafeDumper):
    """PyYAML's, quoting what `_ConfigLoader` would not read back as text."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """U+0085 ends a line in YAML; where all of Unicode may stand PyYAML writes it bare, and reads back a blank."""
        return self.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\x85" in text else None)


_ConfigDumper.add_representer(str, _ConfigDumper.represent_text)


# YAML 1.1, which PyYAML speaks, wants a dot and a sign (1.0e-3 but not 1e-3); YAML 1.2 does not.
for _kind in (_ConfigLoader, _ConfigDumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )
