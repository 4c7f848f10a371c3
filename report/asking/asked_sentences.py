"""The questions that a run was asked, as sentences with marks: what one starts from before typing one's own."""

from __future__ import annotations

import json
from collections.abc import Iterable

from ...probes.readings.reading import Reading

Sentences = tuple[str, str]  # forward and reverse


def asked_sentences(answers: Iterable[Reading], objective: str) -> dict[str, Sentences]:
    """Forward and reverse sentence of each fact that was asked both ways, by the fact and its split.

    The answer stands behind its prompt. A masked model's hidden name is the one that the forward sentence names first,
    in both; a causal model's is the answer. Facts whose names do not stand in their sentences once each are left out.

    Args:
        answers: exact matches, as a run keeps them: with `asked` and `split` in their meta.
    """
    prompts: dict[str, dict[str, tuple[str, list[str]]]] = {}
    for reading in answers:
        side, split = str(reading.meta.get("asked")), str(reading.meta.get("split"))
        if "prompt" not in reading.frame:
            continue
        for row in reading.frame[["fact", "prompt", "answers"]].itertuples():
            called = f"{row.fact} ({'held out' if split == 'heldout' else 'trained'})"
            prompts.setdefault(called, {}).setdefault(side, (str(row.prompt), list(json.loads(str(row.answers)))))
    found: dict[str, Sentences] = {}
    for called, sides in prompts.items():
        names = called.rpartition(" (")[0].split(" | ")
        if len(names) != 2 or not {"forward", "reverse"} <= set(sides):
            continue
        first = next((name for name in names if name in sides["forward"][0]), names[0])
        second = names[1] if first == names[0] else names[0]
        forward = _marked(*sides["forward"], first, second, hides_answer=objective == "causal")
        reverse = _marked(*sides["reverse"], second, first, hides_answer=True)
        if forward and reverse:
            found[called] = (forward, reverse)
    return found


def _marked(prompt: str, answers: list[str], named: str, answer: str, *, hides_answer: bool) -> str:
    """The prompt with its answer, both names marked; "" where that cannot be told."""
    if answer not in answers or prompt.count(named) != 1 or set("[]{}") & set(prompt + answer):
        return ""
    given, hidden = ("{" + named + "}", f"[{answer}]") if hides_answer else (f"[{named}]", "{" + answer + "}")
    return f"{prompt.replace(named, given)} {hidden}"
