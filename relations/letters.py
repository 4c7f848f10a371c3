"""The letters relation (paper Sec. 5, App. D.1), and the pairs that probe it in both directions.

A sequence of length L holds one lowercase letter, its uppercase partner to the right of it, and placeholders `0`
elsewhere. Only this order is ever trained on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from ..arguments import checked
from ..errors import RevprobeError, did_you_mean
from ..models.one_layer import PLACEHOLDER, letter_alphabet, letter_tokenizer
from ..models.probed import ProbedModel, as_probed
from ..probes.pairs.pairs import ReversalPairs
from ..probes.pairs.query import Query
from ..probes.pairs.same_block import in_one_block

PLACEMENTS = ("grid", "mirror", "all")
# placements="all" grows with the fourth power of the length; beyond this many pairs it is refused.
MOST_PAIRS = 200_000

Places = tuple[int, int]  # the positions of the lowercase and of the uppercase letter


@dataclass(frozen=True)
class LettersRelation:
    """Letter pairs at one sequence length; `letters(length)` makes it.

    `facts` has the columns fact, target (lowercase), evidence (uppercase), one row per letter.
    """

    length: int
    alphabet: int = 26
    name: str = "letters"

    def __post_init__(self) -> None:
        if not isinstance(self.length, int) or self.length < 2:
            raise RevprobeError(
                f"letters of length {self.length!r}: expected a whole number of at least 2, one place for each letter "
                "of a pair"
            )
        letter_alphabet(self.alphabet)

    @property
    def facts(self) -> pd.DataFrame:
        pairs = letter_alphabet(self.alphabet)
        return pd.DataFrame(
            {
                "fact": [low for low, _ in pairs],
                "target": [low for low, _ in pairs],
                "evidence": [up for _, up in pairs],
            }
        )

    @checked
    def training_texts(self, direction: str = "forward") -> list[str]:
        """Every placement of every pair, the lowercase letter before its uppercase partner, e.g. "0d00D".

        Forward is the only direction there is: asking for another raises.
        """
        if direction != "forward":
            raise RevprobeError(f"the letters relation is trained in the direction 'forward' only, got {direction!r}")
        texts = []
        for lower, upper in letter_alphabet(self.alphabet):
            for left, right in combinations(range(self.length), 2):
                characters = [PLACEHOLDER] * self.length
                characters[left], characters[right] = lower, upper
                texts.append("".join(characters))
        return texts

    @checked
    def pairs(
        self,
        model: ProbedModel | nn.Module,
        direction: str = "forward",
        *,
        placements: str | None = None,
        offset: int | None = None,
        same_block: bool = False,
    ) -> ReversalPairs:
        """The pairs that probe what `direction` trained, those of each probe by default; see `letter_pairs`."""
        if direction != "forward":
            raise RevprobeError(f"the letters relation is trained in the direction 'forward' only, got {direction!r}")
        model = as_probed(model)
        if placements is not None and placements not in PLACEMENTS:
            raise RevprobeError(f"unknown placements {placements!r}{did_you_mean(placements, PLACEMENTS)}")
        _require_fit(model, self.length, self.alphabet)
        tokenizer = model.tokenizer or letter_tokenizer(self.alphabet)
        if placements is None and offset is None:
            pairs = self.pairs_by_probe(model.objective, tokenizer)
        else:
            pairs = self._placed(model.objective, tokenizer, placements or "grid", offset)
        return in_one_block(pairs, model, tokenizer.get_vocab()[PLACEHOLDER]) if same_block else pairs

    def pairs_by_probe(self, objective: str, tokenizer: Any) -> ReversalPairs:
        """The pairs that each probe reads at a run's snapshots; `letter_pairs` says which, and why.

        Args:
            objective: "masked" or "causal", which decides the kind of pair.
            tokenizer: has a token for every letter.
        """
        first = 0 if objective == "masked" else None
        own = {
            "attention": self._placed(objective, tokenizer, "grid"),
            "gradient": self._placed(objective, tokenizer, "mirror", first),
        }
        return replace(self._placed(objective, tokenizer, "mirror"), by_probe=own)

    def _placed(self, objective: str, tokenizer: Any, placements: str, offset: int | None = None) -> ReversalPairs:
        """One list of pairs, by where its letters stand."""
        length = self.length
        if objective == "causal":
            if offset is not None:
                raise RevprobeError(
                    f"offset {offset!r} for a causal model: its target stands at the last position; leave offset out"
                )
            forward = [(place, length - 1) for place in range(length - 1)]
        else:
            start = 0 if placements == "grid" and offset is None else offset
            if start is not None and not 0 <= start <= length - 2:
                raise RevprobeError(
                    f"offset {start!r} leaves no room for a pair at length {length}; expected 0 to {length - 2}"
                )
            forward = [place for place in combinations(range(length), 2) if start is None or place[0] == start]
        reverse = [(high, low) for low, high in forward]
        return _pair_up(self, objective, tokenizer, forward, reverse, placements)


@checked
def letters(length: int, alphabet: int = 26) -> LettersRelation:
    """The letters relation at one sequence length. Raises: RevprobeError, for a length below 2."""
    return LettersRelation(length, alphabet)


@checked
def letter_pairs(
    length: int,
    *,
    model: ProbedModel | nn.Module,
    placements: str | None = None,
    offset: int | None = None,
    alphabet: int = 26,
    same_block: bool = False,
) -> ReversalPairs:
    """Forward and reverse queries about letter pairs, for a masked or a causal model.

    A masked model is asked for the lowercase letter given the uppercase one, in the trained order and in the
    other (kind "same_target"). A causal model is asked for whatever stands at the last position: the uppercase
    letter given the lowercase one forward, and the roles exchanged in reverse (kind "swapped"). There, and only
    there, its forward conditional is deterministic: at earlier positions the next token may be a placeholder.

    By default each probe reads the pairs that runs use for it, so that its numbers are theirs: the attention
    correlation the grid, since it needs every combination of distances; the gradient cosine the mirrored placements
    that begin the sequence, every distance equally often; the probability and all other probes every placement
    once in each direction ("mirror"), so that averages weigh placements equally. What comes back is this last list,
    with the others in its `by_probe`.

    Args:
        length: tokens per sequence, at least 2.
        model: decides the kind of pair and provides the vocabulary.
        placements: one list for all probes. "grid", every forward distance x reverse distance x letter, the left letter
            at index `offset`; "mirror", the same two positions swapped, over all positions (or the left letter at
            `offset`); "all", every forward x every reverse placement. A causal model's target is last in every
            placement, so for it "mirror" holds one pair per distance.
        offset: index of the left letter of one list, of the grid where no placements are named; 0 for the grid unless
            given. Causal pairs take none.
        alphabet: how many letter pairs; 26 facts make small groups.
        same_block: put placeholders before a sequence until both letters share a block of the model as it is read
            (`model.block_size`), so that it sees both ways; see the columns `filled_forward`, `filled_reverse`. Where
            every token sees every other there is nothing to do.
    Raises: RevprobeError, for an unknown placement, too many pairs, or a model without these letters or lengths.
    """
    return letters(length, alphabet).pairs(model, placements=placements, offset=offset, same_block=same_block)


def _pair_up(
    relation: LettersRelation,
    objective: str,
    tokenizer: Any,
    forward: list[Places],
    reverse: list[Places],
    placements: str,
) -> ReversalPairs:
    """All pairs of placements for every letter, "mirror" taking each placement with its own mirror image."""
    combine = (
        [(i, i) for i in range(len(forward))]
        if placements == "mirror"
        else list(product(range(len(forward)), range(len(reverse))))
    )
    count = len(combine) * relation.alphabet
    if count > MOST_PAIRS:
        raise RevprobeError(
            f"placements={placements!r} at length {relation.length} makes {count:,} pairs, more than {MOST_PAIRS:,}; "
            "use 'grid' or 'mirror'"
        )
    token_id = tokenizer.get_vocab()
    alphabet = letter_alphabet(relation.alphabet)
    causal = objective == "causal"
    # Which letter (0 lowercase, 1 uppercase) is the target, forward and in reverse.
    asked = [(1 if causal else 0, place) for place in forward] + [(0, place) for place in reverse]
    queries = []
    for lower, upper in alphabet:
        for target, place in asked:
            tokens = [token_id[PLACEHOLDER]] * relation.length
            tokens[place[0]], tokens[place[1]] = token_id[lower], token_id[upper]
            queries.append(Query(tokens, [place[target]], [place[1 - target]]))
    per_letter = len(forward) + len(reverse)
    first = np.arange(len(alphabet))[:, None] * per_letter
    forward_index = (first + np.array([f for f, _ in combine])).reshape(-1)
    reverse_index = (first + len(forward) + np.array([r for _, r in combine])).reshape(-1)
    facts = np.repeat(np.array([lower for lower, _ in alphabet], dtype=object), len(combine))
    kind = "swapped" if causal else "same_target"
    return ReversalPairs(tuple(queries), forward_index, reverse_index, facts, kind, tokenizer=tokenizer)


def _require_fit(model: ProbedModel, length: int, alphabet: int) -> None:
    """The model takes sequences this long and has a token for every letter."""
    if model.max_length is not None and length > model.max_length:
        raise RevprobeError(
            f"letters of length {length}: {model.name} takes at most {model.max_length} tokens; use a shorter length"
        )
    vocabulary = model.tokenizer.get_vocab() if model.tokenizer is not None else letter_tokenizer(alphabet).get_vocab()
    wanted = [PLACEHOLDER, *(letter for pair in letter_alphabet(alphabet) for letter in pair)]
    absent = [letter for letter in wanted if letter not in vocabulary or vocabulary[letter] >= model.vocab_size]
    if absent:
        raise RevprobeError(
            f"{model.name} has no token for {absent[0]!r} ({len(absent)} of {len(wanted)} absent from its "
            "vocabulary); it was not trained on this alphabet"
        )
