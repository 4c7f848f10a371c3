"""Which facts are held out, and the check that training in one direction meets no other fact and no reverse statement.

Facts that share an entity stay on one side of the split: the parent of two children is trained with both or with
neither, so that no accepted answer of a held-out question was ever trained.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ..errors import RevprobeError
from ..probes.pairs.words import holds, units
from .cells import shown
from .spelling import plain_name
from .statements import Statement


def hold_out(keys: Sequence[Sequence[Hashable]], *, share: float, seed: int) -> np.ndarray:
    """Draw the facts to hold out: whole families, about `share` of all facts.

    Args:
        keys: for each fact what it has in common with others (its entities); facts with a key in common, directly or
            through others, are one family.
        share: fraction of facts in [0, 1). At least one family is held out when it is above 0.
    Returns: for each fact whether it is held out. Shapes: `fact`.
    Raises: RevprobeError, for a share out of range, and when there is one family only.
    """
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
        raise RevprobeError(f"heldout={share!r}: expected the fraction of facts to hold out, from 0 to below 1")
    held = np.zeros(len(keys), dtype=bool)
    if not share:
        return held
    family = families(keys)
    sizes = np.bincount(family)
    if len(sizes) < 2:
        raise RevprobeError(
            f"heldout={share!r}: all {len(keys)} facts hang together through shared entities, so none can be held out "
            "that training would not touch; use heldout=0, and another relation's facts as the floor"
        )
    order = np.random.default_rng(seed).permutation(len(sizes))
    quota, chosen = max(1, round(share * len(keys))), []
    for one in order:
        if sizes[one] <= quota:
            chosen.append(one)
            quota -= sizes[one]
    # Every family is larger than the quota: the smallest of them comes nearest.
    return np.isin(family, chosen or [order[np.argmin(sizes[order])]])


def families(keys: Sequence[Sequence[Hashable]]) -> np.ndarray:
    """The family of each fact, numbered in the order of first facts. Shapes: `fact`."""
    facts = np.repeat(np.arange(len(keys)), [len(k) for k in keys])
    code_of: dict[Hashable, int] = {}
    codes = np.array([code_of.setdefault(key, len(code_of)) for fact in keys for key in fact])
    size = len(keys) + len(code_of)
    links = coo_array((np.ones(len(codes)), (facts, len(keys) + codes)), shape=(size, size))
    return np.asarray(pd.factorize(connected_components(links, directed=False)[1][: len(keys)])[0])


class TextIndex:
    """Which of many texts hold two names at once, each as words of their own: an index of words, then a look.

    It holds a number for each different word of each text, or character where no blanks part words; a look-up costs
    as much as the rarest of the names' words has texts.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts
        self._at: dict[str, set[int]] = {}
        for place, text in enumerate(texts):
            for word in units(text):
                self._at.setdefault(word, set()).add(place)

    def first_with(self, names: Iterable[str]) -> int | None:
        """The first text that holds all names, or None."""
        names = list(names)
        words = {word for name in names for word in units(name)}
        if any(word not in self._at for word in words):
            return None
        sets = sorted((self._at[word] for word in words), key=len)
        places = set.intersection(*sets) if sets else set(range(len(self.texts)))
        return next((p for p in sorted(places) if all(holds(self.texts[p], name) for name in names)), None)


def require_forward_only(
    trained: Sequence[Statement],
    reverse: Sequence[Statement],
    heldout: Sequence[tuple[str, str, str]],
    name: str,
    *,
    ignore_case: bool = False,
) -> None:
    """What training must never see is not in its texts.

    Args:
        trained: the statements of the training texts.
        reverse: every statement of the other direction, of all facts and templates.
        heldout: the label and the two entities of each fact that is held out.
        name: of the relation and direction, for errors.
        ignore_case: whether names in another case are the same.
    Raises: RevprobeError, when a training text is a reverse statement of any fact, names its second entity before its
        first one, or holds both entities of a held-out fact.
    """
    reversed_texts = {_plain(statement.text): statement for statement in reverse}
    for statement in trained:
        same = reversed_texts.get(_plain(statement.text))
        if same is not None:
            raise RevprobeError(
                f"{name}: the training text {shown(statement.text)} is a reverse statement as well ({shown(same.text)} "
                f"of direction {same.direction!r}); word the two directions differently"
            )
        (start, _), (first, last) = statement.spans
        if holds(plain_name(statement.text[:start]), plain_name(statement.text[first:last])):
            raise RevprobeError(
                f"{name}: the training text {shown(statement.text)} names {shown(statement.text[first:last])} before "
                f"{shown(statement.text[slice(*statement.spans[0])])}, as the reverse direction does; change the "
                "template or leave the fact out"
            )
    index = TextIndex([plain_name(statement.text, ignore_case=ignore_case) for statement in trained])
    for label, *entities in heldout:
        place = index.first_with(plain_name(entity, ignore_case=ignore_case) for entity in entities)
        if place is not None:
            raise RevprobeError(
                f"{name}: the held-out fact {shown(label)} stands in the training text {shown(trained[place].text)}; "
                "use another seed, or leave one of the two facts out"
            )


def _plain(text: str) -> str:
    """Text without the differences that do not make it another statement."""
    return plain_name(text, ignore_case=True).rstrip(".!?。। ")
