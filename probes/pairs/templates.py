"""Templates such as "{target}'s child is {evidence}": read once, filled for every row, each slot's place kept.

A template names the target and the evidence once each, and any further columns as often as it likes. Filling one
remembers where each of the two ended up, in characters, so that nothing is ever searched for afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from string import Formatter

from ...errors import RevprobeError, did_you_mean

ROLES = ("target", "evidence")
_EXAMPLE = '"{target}\'s child is {evidence}"'

Span = tuple[int, int]  # first character, one past the last


@dataclass(frozen=True)
class Filled:
    """A template with its slots filled: the text, and where the target and the evidence stand in it."""

    text: str
    spans: Mapping[str, Span]


@dataclass(frozen=True)
class Template:
    """A template in parts: a literal and the slot after it (None at the end). `parse_template` makes and checks it."""

    source: str
    parts: tuple[tuple[str, str | None], ...]

    @property
    def slots(self) -> list[str]:
        return [slot for _, slot in self.parts if slot is not None]

    @property
    def order(self) -> tuple[str, ...]:
        """Target and evidence as they follow each other in the text."""
        return tuple(slot for slot in self.slots if slot in ROLES)

    def fill(self, values: Mapping[str, str], carrier: str = "") -> Filled:
        """The text of one row, behind the carrier."""
        text, spans = carrier, {}
        for literal, slot in self.parts:
            text += literal
            if slot is not None:
                if slot in ROLES:
                    spans[slot] = (len(text), len(text) + len(values[slot]))
                text += values[slot]
        return Filled(text, spans)


def parse_template(source: str, *, columns: Iterable[str], roles: Mapping[str, str]) -> Template:
    """Read one template.

    Args:
        source: literal text with slots in braces; `{{` and `}}` are literal braces.
        columns: what else a slot may name.
        roles: the columns of target and evidence; a slot may name these columns instead of the roles.
    Raises: RevprobeError, for unbalanced braces, a format in a slot, an unknown slot, a missing or repeated
        target or evidence, and slots that touch (where one entity ends would be anybody's guess).
    """
    if not isinstance(source, str):
        raise RevprobeError(f"template {source!r} is {type(source).__name__}, expected text such as {_EXAMPLE}")
    try:
        fields = list(Formatter().parse(source))
    except ValueError as error:
        raise RevprobeError(f"template {source!r}: {error}; write literal braces as {{{{ and }}}}") from error
    alias = {column: role for role, column in roles.items()} | {role: role for role in ROLES}
    parts = []
    for literal, name, form, conversion in fields:
        if form or conversion:
            raise RevprobeError(f"template {source!r}: slot {name!r} has a format, but is filled as it stands; drop it")
        parts.append((literal, None if name is None else alias.get(name, name)))
    template = Template(source, tuple(parts))
    _require_slots(template, [*ROLES, *columns])
    return template


def pair_templates(
    forward: str | Sequence[str], reverse: str | Sequence[str], *, columns: Iterable[str], roles: Mapping[str, str]
) -> list[tuple[Template, Template]]:
    """Forward and reverse templates, paired one by one; a single one is paired with each of the other side.

    Raises: RevprobeError, for lists of different lengths, for templates that cannot be read (`parse_template`), and
        when forward and reverse do not name target and evidence in opposite orders.
    """
    columns = list(columns)
    lists = [[side] if isinstance(side, str) or not isinstance(side, Sequence) else side for side in (forward, reverse)]
    sides = [[parse_template(source, columns=columns, roles=roles) for source in side] for side in lists]
    counts = [len(side) for side in sides]
    if 0 in counts or (counts[0] != counts[1] and 1 not in counts):
        raise RevprobeError(
            f"{counts[0]} forward and {counts[1]} reverse templates: expected as many of each (they are paired one "
            "by one), or one on a side (it is paired with all of the other)"
        )
    first, *others = (t for side in sides for t in side)
    for place, template in enumerate(others, start=1):
        is_forward = place < counts[0]
        if (template.order == first.order) != is_forward:
            raise RevprobeError(
                f"templates {first.source!r} and {template.source!r} must name target and evidence in "
                f"{'the same order, both being forward' if is_forward else 'opposite orders, the second being reverse'}"
            )
    longest = max(counts)
    return list(zip(*(side * (longest // len(side)) for side in sides), strict=True))


def _require_slots(template: Template, known: list[str]) -> None:
    for slot in template.slots:
        if slot not in known:
            raise RevprobeError(f"template {template.source!r} has an unknown slot {slot!r}{did_you_mean(slot, known)}")
    for role in ROLES:
        count = template.slots.count(role)
        if count != 1:
            raise RevprobeError(
                f"template {template.source!r} names the {role} {count} times; expected one slot {{{role}}}, as in "
                f"{_EXAMPLE}"
            )
    for (_, before), (literal, after) in zip(template.parts, template.parts[1:], strict=False):
        if not literal and after is not None:
            raise RevprobeError(
                f"template {template.source!r}: the slots {{{before}}} and {{{after}}} touch, so it is ambiguous "
                "where one ends; put text or a space between them"
            )
