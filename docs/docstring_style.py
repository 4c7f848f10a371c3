"""Docstrings of this code base as Markdown, for the reference.

A docstring here is prose with labelled parts that follow each other without a blank line: `Shapes:`, `Args:`,
`Frame:`, `Returns:`, `Raises:`, `Source:` and a few more. Parts of named items (Args) become lists, the others
paragraphs with the label in bold, examples become code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

LISTS = ("Args", "Attributes", "Edits")
LABELS = (*LISTS, "Columns", "Frame", "Raises", "Returns", "Shapes", "Source", "Warns")
_LABEL = re.compile(rf"({'|'.join(LABELS)}):(?: (.*))?$")
# A label may also follow a sentence on the same line.
_INLINE = re.compile(rf"(?<=[.;`)]) (?=(?:{'|'.join(LABELS)}): )")
_ITEM = re.compile(r"    (\S[\w*, ]*): (.*)$")


def as_markdown(docstring: str) -> str:
    """The docstring as Markdown.

    >>> print(as_markdown("Load it. Raises: KeyError, when gone.\\nArgs:\\n    a, b: two\\n        numbers < 3."))
    Load it.
    <BLANKLINE>
    **Raises:** KeyError, when gone.
    <BLANKLINE>
    **Args:**
    <BLANKLINE>
    - **a, b**: two numbers &lt; 3.
    """
    blocks: list[str] = []
    for block in re.split(r"\n\s*\n", docstring.strip("\n")):
        if block.startswith("    "):
            blocks.append(block)  # code
        elif block.startswith(">>> "):
            blocks.append(f"```pycon\n{block}\n```")
        else:
            blocks += _parts(block)
    return "\n\n".join(blocks)


def _parts(block: str) -> Iterator[str]:
    """The paragraphs and lists of one block of lines."""
    lines = [part for line in block.splitlines() for part in ([line] if line[:1] == " " else _INLINE.split(line))]
    place = 0
    while place < len(lines):
        label = _LABEL.match(lines[place])
        if label and label[1] in LISTS and not label[2]:
            end = _end(lines, place, lambda line: line[:1] == " ")
            yield f"**{label[1]}:**"
            yield "\n".join(_items(lines[place + 1 : end]))
        else:
            end = _end(lines, place, lambda line: not _LABEL.match(line))
            text = " ".join(line.strip() for line in [label[2] if label else lines[place], *lines[place + 1 : end]])
            yield f"**{label[1]}:** {_escaped(text)}" if label else _escaped(text)
        place = end


def _end(lines: list[str], start: int, belongs: Any) -> int:
    return next((n for n in range(start + 1, len(lines)) if not belongs(lines[n])), len(lines))


def _items(lines: list[str]) -> Iterator[str]:
    """One list item per named item, its continuation lines joined."""
    items: list[str] = []
    for line in lines:
        if named := _ITEM.match(line):
            items.append(f"**{named[1]}**: {named[2]}")
        elif items:
            items[-1] += " " + line.strip()
        else:
            items.append(line.strip())
    yield from (f"- {_escaped(item)}" for item in items)


def _escaped(text: str) -> str:
    """`<` is a sign here, never the start of a tag; code spans show it as it is anyway."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;") for part in parts)


class DocstringStyle(griffe.Extension):
    """Rewrites every docstring of the package once it is read."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        for found in _objects(pkg):
            if found.docstring is not None:
                found.docstring.value = as_markdown(found.docstring.value)


def _objects(parent: griffe.Object) -> Iterator[griffe.Object]:
    yield parent
    for member in parent.members.values():
        if isinstance(member, griffe.Object):  # not an alias: its target is reached where it is defined
            yield from _objects(member)
