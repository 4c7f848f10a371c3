"""Statements: a fact said in one direction by one template, its entities' places in the text kept.

A direction's template names one entity first and the other later: what stands before the second entity is the prompt,
and the entity itself, with what follows it, the completion that training teaches and evaluation asks for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from ..errors import RevprobeError, did_you_mean
from ..probes.pairs.templates import ROLES, Span, Template, parse_template
from ..probes.pairs.words import holds
from .spelling import plain_name

_SLOT = re.compile(r"{([^{}!:]*)}")

# For each of two directions its template, or a list of them.
TemplateLists = Mapping[str, str | Sequence[str]]


@dataclass(frozen=True)
class Statement:
    """One fact in one wording.

    Args:
        fact: its row in the relation's table.
        direction: "P2C", for instance.
        template: its number within the direction.
        is_heldout: whether the template is kept out of training.
        text: prompt and completion, without a carrier.
        spans: the characters of the first and of the second entity, in the order of the text.
        prompt_length: characters before the completion.
        answers: what counts as the completion, the entity first.
        wording: the template it came from, its target the relation's first entity; None where the text does not name
            both entities as the table writes them, so that no pair can be made from it.
    """

    fact: int
    direction: str
    template: int
    is_heldout: bool
    text: str
    spans: tuple[Span, Span]
    prompt_length: int
    answers: tuple[str, ...]
    wording: Template | None

    @property
    def prompt(self) -> str:
        """What a question asks: no blank at its end."""
        return self.text[: self.prompt_length]

    @property
    def joint(self) -> str:
        """The blanks between the prompt and what completes it; none after an opening bracket, or in Chinese."""
        rest = self.text[self.prompt_length :]
        return rest[: len(rest) - len(rest.lstrip())]


@dataclass(frozen=True)
class DirectionTemplates:
    """A direction's templates and how many of them, the last ones, are held out from training."""

    direction: str
    templates: tuple[Template, ...]
    heldout: int

    def is_heldout(self, place: int) -> bool:
        return place >= len(self.templates) - self.heldout


def read_templates(
    templates: TemplateLists, columns: Sequence[str], slots: Sequence[str], heldout: int
) -> tuple[DirectionTemplates, DirectionTemplates]:
    """The templates of the two directions, checked.

    Args:
        templates: direction -> its templates; the first direction names the first column first.
        columns: the two entity columns; slots may be called by these, or {target} and {evidence} in this order.
        slots: every column a slot may name.
        heldout: how many of a direction's templates to hold out, the last ones; at least one is always trained.
    Raises: RevprobeError, naming the template, for a missing, unknown or repeated slot and for the wrong order.
    """
    if not isinstance(templates, Mapping) or len(templates) != 2:
        raise RevprobeError(f"templates={templates!r}: expected two directions, each with a template or a list of them")
    if isinstance(heldout, bool) or not isinstance(heldout, int) or heldout < 0:
        raise RevprobeError(f"heldout_templates={heldout!r}: expected a whole number from 0")
    roles = dict(zip(ROLES, columns, strict=True))
    parsed = []
    for place, (direction, sources) in enumerate(templates.items()):
        listed = [sources] if isinstance(sources, str) else list(sources)
        if not listed:
            raise RevprobeError(f"direction {direction!r} has no template; expected at least one")
        order = ROLES if place == 0 else ROLES[::-1]
        found = tuple(_template(source, direction, roles, slots, order) for source in listed)
        parsed.append(DirectionTemplates(str(direction), found, min(heldout, len(found) - 1)))
    return parsed[0], parsed[1]


def _template(
    source: str, direction: str, roles: Mapping[str, str], slots: Sequence[str], order: tuple[str, ...]
) -> Template:
    for role, column in roles.items():
        if isinstance(source, str) and not any(f"{{{slot}}}" in source for slot in (role, column)):
            raise RevprobeError(
                f"template {source!r} of direction {direction!r} has no slot {{{column}}}; put it in once"
            )
    try:
        template = parse_template(source, columns=slots, roles=roles)
    except RevprobeError as error:
        raise RevprobeError(f"direction {direction!r}: {error}") from None
    if template.order != order:
        first, second = (roles[role] for role in order)
        raise RevprobeError(
            f"template {source!r} of direction {direction!r} names {{{second}}} first; expected {{{first}}} before "
            f"{{{second}}}, since a direction is the order in which the entities are named"
        )
    return template


def make_statements(facts: pd.DataFrame, columns: Sequence[str], direction: DirectionTemplates) -> list[Statement]:
    """Every fact in every wording of one direction; `facts` is indexed by the number of the fact."""
    roles = dict(zip(ROLES, columns, strict=True))
    needed = {slot for template in direction.templates for slot in template.slots}
    cells = {slot: facts[roles.get(slot, slot)].tolist() for slot in sorted({*needed, *ROLES})}
    return [
        fill_statement(template, {slot: column[row] for slot, column in cells.items()}, fact, direction, place)
        for place, template in enumerate(direction.templates)
        for row, fact in enumerate(facts.index.tolist())
    ]


def fill_statement(
    template: Template, values: Mapping[str, str], fact: int, direction: DirectionTemplates, place: int
) -> Statement:
    """One fact through one template: the second entity and what follows it are the completion."""
    filled = template.fill(values)
    spans = (filled.spans[template.order[0]], filled.spans[template.order[1]])
    entity, rest = filled.text[slice(*spans[1])], filled.text[spans[1][0] :].strip()
    return Statement(
        fact=fact,
        direction=direction.direction,
        template=place,
        is_heldout=direction.is_heldout(place),
        text=filled.text,
        spans=spans,
        prompt_length=len(filled.text[: spans[1][0]].rstrip()),
        answers=tuple(dict.fromkeys((entity, rest))),
        wording=template,
    )


def named_slots(templates: Iterable[str | Sequence[str]]) -> list[str]:
    """The names in braces of lists of templates, each once; what cannot be parsed names none here."""
    texts = [text for listed in templates for text in ([listed] if isinstance(listed, str) else listed)]
    found = (_SLOT.findall(text.replace("{{", "").replace("}}", "")) for text in texts if isinstance(text, str))
    return list(dict.fromkeys(name for names in found for name in names))


def answer_in_prompt(statement: Statement) -> bool:
    """Whether a question contains what it asks for, as words of its own."""
    return holds(plain_name(statement.prompt), plain_name(statement.text[slice(*statement.spans[1])]))


def slot_source(template: Template, *, swap: bool) -> str:
    """A template as text with {target} and {evidence} slots, the two exchanged when `swap`."""
    names = dict(zip(ROLES, ROLES[::-1] if swap else ROLES, strict=True))
    return "".join(
        text.replace("{", "{{").replace("}", "}}") + (f"{{{names.get(slot, slot)}}}" if slot is not None else "")
        for text, slot in template.parts
    )


def require_direction(direction: str, directions: Sequence[str], name: str) -> None:
    """Raises: RevprobeError, for a direction the relation does not have."""
    if direction not in directions:
        raise RevprobeError(f"{name} has no direction {direction!r}{did_you_mean(str(direction), directions)}")
