"""What a page is made of, once: the same blocks become Markdown here and HTML in `report/html/`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..markdown import markdown_table

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Text:
    """A paragraph; `lead` says in a word or two what it is about."""

    text: str
    lead: str = ""

    def markdown(self) -> str:
        return f"**{self.lead}.** {self.text}" if self.lead else self.text


@dataclass(frozen=True)
class Items:
    """Sentences one below the other."""

    items: Sequence[str]

    def markdown(self) -> str:
        return "\n".join(f"- {item}" for item in self.items)


@dataclass(frozen=True)
class Table:
    """Rows with the same keys; `empty` is said where there are none."""

    rows: Sequence[Row]
    empty: str = "Not run."

    def markdown(self) -> str:
        return markdown_table(self.rows).rstrip("\n") if self.rows else self.empty


@dataclass(frozen=True)
class Figure:
    """A drawing in a file of its own beside a Markdown page, within an HTML one."""

    file: str
    words: str
    svg: str

    def markdown(self) -> str:
        return f"![{self.words}]({self.file})"


Block = Text | Items | Table | Figure


@dataclass(frozen=True)
class Section:
    """A heading and its blocks; the first section of a page has none."""

    title: str
    blocks: Sequence[Block] = field(default_factory=list)

    def markdown(self) -> str:
        head = [f"## {self.title}"] if self.title else []
        return "\n\n".join([*head, *(block.markdown() for block in self.blocks)])
