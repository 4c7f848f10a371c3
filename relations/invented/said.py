"""A made-up fact in one wording."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..statements import Statement
from ..text_relation import TrainingText


class Frame(NamedTuple):
    """A wording without its entities: the text before, between and behind them, and the characters by which the
    completion begins before the second one.
    """

    before: str
    between: str
    behind: str
    lead: int


def frame_of(statement: Statement) -> Frame:
    """The wording of a statement, as it stands around its entities."""
    (start, end), (second, last) = statement.spans
    text = statement.text
    return Frame(text[:start], text[end:second], text[last:], second - statement.prompt_length)


@dataclass(frozen=True)
class Said:
    """Two entities in a wording."""

    frame: Frame
    first: str
    second: str

    def text(self, fact: str, carrier: str) -> TrainingText:
        """It as training reads it, behind the carrier."""
        before = carrier + self.frame.before
        start = len(before)
        second = start + len(self.first) + len(self.frame.between)
        spans = ((start, start + len(self.first)), (second, second + len(self.second)))
        text = before + self.first + self.frame.between + self.second + self.frame.behind
        return TrainingText(text, spans, fact, second - self.frame.lead)
