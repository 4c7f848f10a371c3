"""Typed sentences as questions: `Fact: [Ann]'s child is {Bob}` hides Ann and gives Bob as the evidence.

The marks are those that a pair is shown with: the hidden name in [brackets], the evidence in {braces}, once each.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from ...errors import RevprobeError, shown
from ...models.probed import ProbedModel
from ...probes.pairs.query import Query, ReversalPair
from ...probes.pairs.spans import SpanError
from ...probes.pairs.text import pair_from_text

LONGEST = 500  # letters of a sentence that is taken
EXAMPLE = "Fact: [Ann Lee]'s child is {Bob Lee}"
_MARKS = re.compile(r"\[([^\[\]{}]*)\]|\{([^\[\]{}]*)\}")


@dataclass(frozen=True)
class Sentence:
    """A sentence with its marks read: the template has them as the slots "hidden" and "given"."""

    template: str
    hidden: str
    given: str

    def __str__(self) -> str:
        return self.template.replace("{hidden}", f"[{self.hidden}]").replace("{given}", f"{{{self.given}}}")

    @property
    def hidden_last(self) -> bool:
        """Whether the hidden place stands behind the evidence."""
        return self.template.index("{hidden}") > self.template.index("{given}")

    def slots(self, hidden: str, given: str) -> str:
        """The template with other names for its two slots."""
        first, second = ("given", "hidden") if self.hidden_last else ("hidden", "given")
        before, rest = self.template.split(f"{{{first}}}")
        between, after = rest.split(f"{{{second}}}")
        names = {"hidden": hidden, "given": given}
        return f"{before}{{{names[first]}}}{between}{{{names[second]}}}{after}"


def read_sentence(text: str, *, called: str = "the sentence") -> Sentence:
    """Read the marks of a typed sentence.

    Raises: RevprobeError, for one that is too long, or whose hidden place or evidence is not marked exactly once.
    """
    if len(text) > LONGEST:
        raise RevprobeError(f"{called} has {len(text):,} letters; expected at most {LONGEST:,}")
    text = " ".join(text.split())
    found = list(_MARKS.finditer(text))
    hidden = [one[1].strip() for one in found if one[1] is not None]
    given = [one[2].strip() for one in found if one[2] is not None]
    plain = _MARKS.sub("", text)
    if len(hidden) != 1 or len(given) != 1 or not hidden[0] or not given[0] or set("[]{}") & set(plain):
        raise RevprobeError(
            f"{called} {shown(text)}: expected one hidden name in [brackets] and one given in {{braces}}, such as "
            f"{EXAMPLE!r}"
        )
    template = _MARKS.sub(lambda one: "{hidden}" if one[1] is not None else "{given}", text)
    return Sentence(template, hidden[0], given[0])


def typed_pair(model: ProbedModel, forward: str, reverse: str = "") -> ReversalPair:
    """The pair that two typed sentences ask, or one sentence twice where the second is empty.

    A masked model is asked for the same hidden name from the same evidence in both (kind "same_target"); a causal
    model, which reads only what stands before, for what each sentence ends with (kind "swapped").
    Raises: RevprobeError, for sentences that cannot be read or do not ask of one fact, and as `pair_from_text`.
    """
    one = read_sentence(forward, called="the forward sentence")
    if not reverse.strip():
        query = sentence_query(model, one)
        return ReversalPair(query, query, "same_target", fact=f"{one.hidden} | {one.given}")
    other = read_sentence(reverse, called="the reverse sentence")
    names, theirs = (one.hidden, one.given), (other.hidden, other.given)
    if model.objective == "causal":
        for called, sentence in (("forward", one), ("reverse", other)):
            _require_in_sight(sentence, called)
        if names != theirs[::-1]:
            raise RevprobeError(
                f"forward hides {one.hidden!r} given {one.given!r}, reverse {other.hidden!r} given {other.given!r}: a "
                "causal model is asked for what each sentence ends with, so the reverse hides what forward gives"
            )
        made: dict[str, Any] = {"target": one.given, "evidence": one.hidden}
        templates = one.slots("evidence", "target"), other.slots("target", "evidence")
    else:
        if names != theirs:
            raise RevprobeError(
                f"forward hides {one.hidden!r} given {one.given!r}, reverse {other.hidden!r} given {other.given!r}: a "
                "masked model is asked for the same hidden name from the same evidence in both"
            )
        made = {"target": one.hidden, "evidence": one.given}
        templates = one.slots("target", "evidence"), other.slots("target", "evidence")
    if one.hidden_last == other.hidden_last and model.objective == "masked":
        raise RevprobeError("the two names stand in the same order in both sentences; the reverse has the other order")
    try:
        return pair_from_text(*templates, **made, model=model, fact=f"{made['target']} | {made['evidence']}")
    except SpanError as error:
        if error.reason != "different_tokens":
            raise
        where = str(error).partition(", but must be")[0]
        raise RevprobeError(f"{where}; begin both sentences with the same word, such as 'Fact: '") from None


def sentence_query(model: ProbedModel, sentence: Sentence) -> Query:
    """The query of one sentence. Raises: RevprobeError, as `pair_from_text`."""
    turned = replace(sentence, template=sentence.slots("given", "hidden"))  # the other order, read and left aside
    if model.objective == "causal":
        _require_in_sight(sentence, "typed")
        names: dict[str, Any] = {"target": sentence.given, "evidence": sentence.hidden}
        templates = sentence.slots("evidence", "target"), turned.slots("evidence", "target")
    else:
        names = {"target": sentence.hidden, "evidence": sentence.given}
        templates = sentence.slots("target", "evidence"), turned.slots("target", "evidence")
    return pair_from_text(*templates, **names, model=model, allow_different_tokens=True).forward


def _require_in_sight(sentence: Sentence, called: str) -> None:
    if not sentence.hidden_last:
        raise RevprobeError(
            f"the {called} sentence hides {sentence.hidden!r} before its evidence {sentence.given!r}, and a causal "
            "model reads only what stands before; put the hidden name last"
        )
