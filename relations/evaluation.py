"""Forward and reverse exact match of one model on one relation, as in the paper's Table 7, with the floor beside them.

Trained facts are asked in both directions, in wordings that were not trained on where the relation has such; facts
that were held out are asked the same and show what the model says without having been told.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from ..errors import RevprobeError, did_you_mean
from ..models.probed import ProbedModel, as_probed
from ..probes.decoding.candidates import rank_candidates
from ..probes.decoding.exact_match import AnswerBook, decoded_match
from ..probes.figures.theme import interval_text, undefined_text
from ..probes.readings.reading import Reading
from ..probes.readings.readings import Readings
from ..probes.statistics.estimators import Measured
from ..probes.statistics.measures import measure
from ..progress import Progress, shows_progress
from .letters import LettersRelation
from .text_relation import Question, TextRelation

ASKED = ("forward", "reverse")
SPLITS = ("train", "heldout")
TEMPLATES = ("train", "heldout", "all")


@shows_progress("questions")
def evaluate_relation(
    model: ProbedModel | nn.Module,
    relation: TextRelation | LettersRelation,
    direction: str,
    *,
    splits: Sequence[str] = SPLITS,
    templates: str | None = None,
    facts: int | None = None,
    max_new_tokens: int | None = None,
    answers: AnswerBook | None = None,
    progress: Progress | bool | None = None,
    **decoding: Any,
) -> Readings:
    """`decoded_match` forward and reverse on trained and on held-out facts: one reading for each side.

    Args:
        direction: the direction that was trained, e.g. "P2C"; reverse questions are of the other one.
        splits: "train", "heldout" or both.
        templates: "train", "heldout" or "all"; None asks in held-out wordings where a direction has some, else in all.
        facts: at most so many of each split, the same forward and reverse, of those that both ask about; asked are
            the questions of their own statements, whichever fact's label one that several share carries.
        max_new_tokens: the same for every side; that of the longest answer of any when None.
        answers: the relation's `answer_book`, where it is at hand.
        progress: called with (questions done, questions in all) over all sides.
        decoding: passed on to `decoded_match` (steps=, block_length=, algorithm=, stop=, batch_size=, ...).
    Returns: readings whose meta says `asked` ("forward" or "reverse"), `split`, `templates`, `relation` and `trained`
        (the direction of training).
    Raises: RevprobeError, for an unknown split, choice of templates or direction, and as `decoded_match` does.
    Warns: when the relation holds out no fact, or asks none of them in a direction (all prompts contain their answers),
        so that there is no floor; that side is left out.
    Source: paper Sec. 6, App. D.2 (Table 7).
    """
    model = as_probed(model)
    if isinstance(relation, LettersRelation):
        raise RevprobeError("letters are asked by position, not in text; probe_reverse_probability has their accuracy")
    sides = asked_sides(relation, direction, splits=splits, templates=templates, facts=facts)
    if answers is None and not max_new_tokens:
        # Of every side, asked or not: the length of a masked model's answers must not depend on what else is asked.
        answers = answer_book(model, relation, direction)
    total = sum(len(questions) for _, questions in sides)
    before, done, readings = 0, 0, []
    for about, questions in sides:
        before, done = done, done + len(questions)
        options = {
            **decoding,
            "max_new_tokens": max_new_tokens or (answers.limit if answers else None),
            "answers": answers,
            "progress": _part_of(progress, before, done, total),
        }
        reading = decoded_match(model, questions, **options)
        reading.meta.update({"relation": relation.name, "trained": direction, **about})
        readings.append(reading)
    return Readings(readings)


def rank_relation(
    model: ProbedModel | nn.Module,
    relation: TextRelation,
    direction: str,
    *,
    splits: Sequence[str] = SPLITS,
    templates: str | None = None,
    facts: int | None = None,
    **ranking: Any,
) -> Readings:
    """`rank_candidates` forward and reverse on trained and on held-out facts, asked as `evaluate_relation` asks.

    The candidates are the entities that answer questions of that direction about trained facts, however few are asked,
    and those of the facts that are asked: held-out facts have their own among them too. An entity counts once, however
    many wordings name it: "Ann Low" and "Ann Low was born" are one, and either is right where the other is.

    Args:
        direction, splits, templates, facts: as in `evaluate_relation`.
        ranking: passed on to `rank_candidates`.
    Returns: readings labelled as those of `evaluate_relation`.
    """
    readings = []
    for about, questions in asked_sides(relation, direction, splits=splits, templates=templates, facts=facts):
        reverse, asked = about["asked"] == "reverse", {answer for one in questions for answer in one.answers}
        candidates = relation.entities(direction, reverse=reverse, split="train")
        if about["split"] != "train":
            own = relation.entities(direction, reverse=reverse, split=about["split"])
            candidates += [texts for texts in own if not asked.isdisjoint(texts)]
        reading = rank_candidates(model, questions, candidates, **ranking)
        reading.meta.update({"relation": relation.name, "trained": direction, **about})
        readings.append(reading)
    return Readings(readings)


def answer_book(model: ProbedModel, relation: TextRelation, direction: str) -> AnswerBook:
    """What counts as right for every question about the relation, in either direction and split.

    Raises: RevprobeError, as `decoded_match` does.
    """
    return AnswerBook(model, all_questions(relation, direction))


def all_questions(relation: TextRelation, direction: str) -> list[Question]:
    """Every question about the relation, in either direction and split: the longest answer is one of theirs."""
    splits = sorted(set(relation.facts_of(direction)["split"]))
    sides = [(split, reverse) for split in splits for reverse in (False, True)]
    told: list[dict[str, Any]] = [{"reverse": reverse, "split": split} for split, reverse in sides]
    # A fact whose prompts all contain its answer is asked nowhere, and keeps no other from being asked.
    asked = [relation.questions(direction, **one) for one in told if relation.has_questions(direction, **one)]
    return [question for questions in asked for question in questions]


def match_table(readings: Readings) -> pd.DataFrame:
    """What `evaluate_relation` found, as text for people: one row for each side, in per cent."""
    rows = []
    for reading in readings:
        about, measured = reading.meta, reading.measured
        begun = begins_with_answer(reading).estimate
        null, excess = reading.control, reading.excess
        rows.append(
            {
                "asked": f"{about['asked']} ({'/'.join(sorted(set(reading.frame['direction'])))})",
                "facts": {"train": "trained", "heldout": "held out (floor)"}[about["split"]],
                "wordings": {"heldout": "held out", "train": "trained"}.get(about["templates"], "all"),
                "exact match (%) [95 %]": interval_text(reading.value, *reading.interval, percent=True),
                "begins with it (%)": interval_text(begun.value, begun.low, begun.high, percent=True),
                "control [95 %]": "-" if null is None else interval_text(null.value, *null.interval, percent=True),
                "excess [95 %]": "-"
                if excess is None
                else interval_text(excess.value, excess.low, excess.high, percent=True),
                "wrong answers": ", ".join(f"{n} {error}" for error, n in about.get("errors", {}).items() if n) or "-",
                "n": f"{reading.n:,} questions, {reading.facts:,} facts",
                "undefined": "; ".join(filter(None, (undefined_text(measured.undefined), measured.caution))) or "-",
            }
        )
    return pd.DataFrame(rows)


def begins_with_answer(reading: Reading) -> Measured:
    """The looser score of the same decodings: an answer, whatever follows it (as Berglund et al. 2024 count)."""
    looser = {"match": reading.frame["begins"]}
    if "begins_control" in reading.frame:
        looser["match_control"] = reading.frame["begins_control"]
    return measure("decoded_match", reading.frame.assign(**looser), seed=reading.seed)


def save_evaluation(readings: Readings, folder: Path) -> list[Path]:
    """Write each reading as `decoded_match.<asked>.<split>.parquet`, every file whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    return [
        reading.save(folder / f"{reading.name}.{reading.meta['asked']}.{reading.meta['split']}.parquet")
        for reading in readings
    ]


def asked_sides(
    relation: TextRelation,
    direction: str,
    *,
    splits: Sequence[str] = SPLITS,
    templates: str | None = None,
    facts: int | None = None,
) -> list[tuple[dict[str, str], list[Question]]]:
    """What `evaluate_relation` asks, labelled (asked, split, templates): forward and reverse for each split.

    Raises, warns: as `evaluate_relation`.
    """
    for name, value, known in [("split", split, SPLITS) for split in splits] + [("templates", templates, TEMPLATES)]:
        if value is not None and value not in known:
            raise RevprobeError(f"unknown {name} {value!r}{did_you_mean(value, known)}")
    directions = dict(zip(ASKED, (direction, relation.opposite(direction)), strict=True))
    there = set(relation.facts_of(direction)["split"])
    if "heldout" in splits and "heldout" not in there and len(splits) > 1:
        # Asked for alone, held-out facts that are not there are an error instead, that of `questions`.
        warnings.warn(
            f"{relation.name} holds out no fact of direction {direction!r}, so there is no floor to compare with",
            stacklevel=3,
        )
        splits = [split for split in splits if split in there]
    if facts is not None and facts < 1:
        raise RevprobeError(f"facts={facts!r}: expected at least 1, or None for all")
    sides: list[tuple[dict[str, str], list[Question]]] = []
    for split in splits:
        found = []
        for asked, statement in directions.items():
            wording = templates or ("heldout" if relation.has_heldout_templates(statement) else "all")
            told: dict[str, Any] = {"reverse": asked == "reverse", "split": split, "templates": wording}
            if split == "heldout" and len(splits) > 1 and not relation.has_questions(direction, **told):
                warnings.warn(
                    f"{relation.name} asks nothing about held-out facts in direction {statement!r} (every prompt "
                    f"contains its answer), so there is no floor to compare {asked} with",
                    stacklevel=3,
                )
                continue
            about = {"asked": asked, "split": split, "templates": wording}
            found.append((about, relation.questions(direction, **told)))
        sides += found if facts is None else _of_facts(relation, direction, found, facts)
    return sides


def _of_facts(
    relation: TextRelation, direction: str, sides: list[tuple[dict[str, str], list[Question]]], limit: int
) -> list[tuple[dict[str, str], list[Question]]]:
    """The questions that the statements of at most so many facts ask, the same facts in every call and on every side.

    Drawn are facts that are asked about on all sides; where there are none, on each side others.
    """
    labels, facts = relation.table["fact"].tolist(), relation.facts_of(direction)
    asking: list[dict[str, set[str]]] = []  # for each side the prompts of each fact
    for _, questions in sides:
        asked = {one.prompt for one in questions}
        asking.append({})
        for one in relation.statements[questions[0].direction]:
            if (prompt := relation.carrier + one.prompt) in asked:
                asking[-1].setdefault(labels[one.fact], set()).add(prompt)
    everywhere = set.intersection(*map(set, asking)) if asking else set()
    found = []
    for (about, questions), own in zip(sides, asking, strict=True):
        there = facts.loc[facts["split"] == about["split"], "fact"].tolist()
        drawn = (there[place] for place in np.random.default_rng(0).permutation(len(there)))
        chosen = [label for label in drawn if label in (everywhere or own)][:limit]
        prompts = {prompt for label in chosen for prompt in own[label]}
        found.append((about, [one for one in questions if one.prompt in prompts]))
    return found


def _part_of(progress: Progress | bool | None, before: int, after: int, total: int) -> Progress | None:
    """One side's progress as a part of all of them, counted in questions."""
    if not callable(progress):
        return None
    return lambda done, asked: progress(before + (after - before) * done // asked, total)
