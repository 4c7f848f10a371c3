"""Forward and reverse queries, and lists of them.

A `Query` is a clean sequence with the positions of its target and of its evidence. A `ReversalPair` asks for one
fact twice, in the order it was trained in and in the other. `ReversalPairs` keeps many of them in columns:
queries that occur in several pairs are stored, and later run, once. The three stand in one file, a little long,
because each is defined by the one before; how pairs are shown, stored and made from text are files of their own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import index as whole
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import pandas as pd

from ...errors import RevprobeError, did_you_mean
from .display import pair_frame, pair_html
from .pair_files import load_pairs, save_pairs

if TYPE_CHECKING:
    from torch import nn

    from ...models.probed import ProbedModel

KINDS = ("same_target", "swapped")


@dataclass(frozen=True)
class Query:
    """A clean sequence, the positions of the target (asked for) and of the evidence (given).

    The model's wrapper hides the target; the tokens here are what it should have been. `token_ids` may be ints or
    a 1-D tensor; positions are sorted.

    >>> Query([4, 0, 0, 30], target_positions=[0], evidence_positions=[3]).target
    (4,)

    Raises: RevprobeError, when a position is outside the sequence, target or evidence is empty, they overlap, or
        their tokens are the same (then the question contains its answer).
    """

    token_ids: tuple[int, ...]
    target_positions: tuple[int, ...]
    evidence_positions: tuple[int, ...]

    def __init__(
        self, token_ids: Iterable[int], target_positions: Iterable[int], evidence_positions: Iterable[int]
    ) -> None:
        object.__setattr__(self, "token_ids", tuple(whole(token) for token in token_ids))
        object.__setattr__(self, "target_positions", tuple(sorted(whole(p) for p in target_positions)))
        object.__setattr__(self, "evidence_positions", tuple(sorted(whole(p) for p in evidence_positions)))
        self._validate()

    @property
    def target(self) -> tuple[int, ...]:
        """The token ids asked for."""
        return tuple(self.token_ids[p] for p in self.target_positions)

    @property
    def evidence(self) -> tuple[int, ...]:
        """The token ids of the evidence."""
        return tuple(self.token_ids[p] for p in self.evidence_positions)

    def _validate(self) -> None:
        for part, positions in (("target", self.target_positions), ("evidence", self.evidence_positions)):
            if not positions:
                raise RevprobeError(f"query {list(self.token_ids)} has no {part} position; name at least one")
            if not 0 <= positions[0] <= positions[-1] < len(self.token_ids):
                raise RevprobeError(
                    f"{part} positions {list(positions)} leave the sequence of {len(self.token_ids)} tokens; expected "
                    f"0 to {len(self.token_ids) - 1}"
                )
            if len(set(positions)) < len(positions):
                raise RevprobeError(f"{part} positions {list(positions)} name a position twice; each token counts once")
        shared = set(self.target_positions) & set(self.evidence_positions)
        if shared:
            raise RevprobeError(f"position {min(shared)} is both target and evidence; the evidence must stay visible")
        if self.target == self.evidence:
            raise RevprobeError(
                f"evidence equals target (tokens {list(self.target)}), so the question contains its answer; choose "
                "another pair"
            )

    @classmethod
    def unchecked(
        cls, token_ids: Sequence[int], target_positions: Sequence[int], evidence_positions: Sequence[int]
    ) -> Query:
        """A query that skips the checks, for steps on the way to a target whose tokens need not make sense together."""
        query = cls.__new__(cls)
        for name, value in zip(
            ("token_ids", "target_positions", "evidence_positions"),
            (token_ids, target_positions, evidence_positions),
            strict=True,
        ):
            object.__setattr__(query, name, tuple(value))
        return query


@dataclass(frozen=True)
class ReversalPair:
    """One fact asked in the trained order (`forward`) and in the other (`reverse`).

    `different_tokens` is the opt-out from the check below: the two queries name the same words by different tokens.
    Probabilities remain comparable as those of words; the theory's bounds and the shared column of S do not apply.

    Raises: RevprobeError, for the kind "same_target", when the two queries differ in target or evidence tokens;
        for "swapped", when one's target is not the other's evidence.
    """

    forward: Query
    reverse: Query
    kind: str = "same_target"
    fact: str = ""
    different_tokens: bool = False

    @classmethod
    def from_text(
        cls,
        forward: str,
        reverse: str,
        *,
        target: str,
        evidence: str,
        model: ProbedModel | nn.Module,
        slots: Mapping[str, str] | None = None,
        carrier: str = "",
        fact: str = "",
        allow_different_tokens: bool = False,
    ) -> ReversalPair:
        """One pair from two templates such as "{target}'s child is {evidence}", aligned by the model's tokenizer.

        `slots` fills further slots; the rest is as in `pairs_from_frame`, which makes many pairs from a table.
        Raises: RevprobeError, as `pairs_from_frame` does.
        """
        from .text import pair_from_text  # it needs this module, and a model

        values = {**(slots or {}), "target": target, "evidence": evidence}
        options = {"carrier": carrier, "fact": fact, "allow_different_tokens": allow_different_tokens}
        return pair_from_text(forward, reverse, values, model, **options)

    def __post_init__(self) -> None:
        _require_kind(self.kind)
        if self.different_tokens:
            return
        same = (self.forward.target, self.forward.evidence) == (self.reverse.target, self.reverse.evidence)
        swapped = (self.forward.target, self.forward.evidence) == (self.reverse.evidence, self.reverse.target)
        if not (same if self.kind == "same_target" else swapped):
            expected = (
                "the same target and evidence tokens"
                if self.kind == "same_target"
                else "target and evidence tokens exchanged"
            )
            raise RevprobeError(
                f"pair {self.fact!r} of kind {self.kind!r} needs {expected}, got target {list(self.forward.target)} / "
                f"evidence {list(self.forward.evidence)} "
                f"forward and target {list(self.reverse.target)} / evidence {list(self.reverse.evidence)} in reverse; "
                "align the tokens or use the other kind"
            )


@dataclass(frozen=True, eq=False, repr=False)
class ReversalPairs(Sequence[ReversalPair]):
    """Many pairs of one kind, in columns.

    Args:
        queries: the distinct queries.
        forward, reverse: for each pair the index of its two queries, `pair`.
        facts: for each pair the label of its fact; the bootstrap resamples facts, and derangements pair
            different facts, so pairs of one fact must share a label.
        kind: "same_target" (both ask for the same target from the same evidence, in opposite order) or "swapped"
            (the reverse query exchanges the roles).
        flags: further columns for `to_frame`, one value per pair; those of true and false are counted by `report`.
            `different_tokens` marks pairs whose two queries may differ in their tokens (see `ReversalPair`).
        tokenizer: only to show tokens.
        dropped: how many pairs were left out when these were made, by reason.
    Raises: RevprobeError, when the list is empty or the columns disagree in length.
    """

    queries: tuple[Query, ...]
    forward: np.ndarray
    reverse: np.ndarray
    facts: np.ndarray
    kind: str = "same_target"
    flags: Mapping[str, np.ndarray] = field(default_factory=dict)
    tokenizer: Any = None
    dropped: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require_kind(self.kind)
        lengths = {len(self.forward), len(self.reverse), len(self.facts), *(len(v) for v in self.flags.values())}
        if lengths == {0}:
            raise RevprobeError("the list of pairs is empty; a probe needs at least one pair")
        if len(lengths) > 1:
            raise RevprobeError(
                f"columns of {sorted(lengths)} pairs: expected one length for forward, reverse, facts and flags"
            )

    @classmethod
    def from_pairs(cls, pairs: Iterable[ReversalPair], *, tokenizer: Any = None) -> ReversalPairs:
        """Collect pairs, storing equal queries once. Raises: RevprobeError, when empty or of mixed kinds."""
        pairs = list(pairs)
        kinds = {pair.kind for pair in pairs}
        if len(kinds) > 1:
            raise RevprobeError(
                "pairs of both kinds in one list; same_target and swapped readings are never averaged, so probe them "
                "apart"
            )
        index: dict[Query, int] = {}
        forward = np.array([index.setdefault(pair.forward, len(index)) for pair in pairs], dtype=np.int64)
        reverse = np.array([index.setdefault(pair.reverse, len(index)) for pair in pairs], dtype=np.int64)
        facts = np.array([pair.fact or str(i) for i, pair in enumerate(pairs)], dtype=object)
        differ = np.array([pair.different_tokens for pair in pairs], dtype=bool)
        flags = {"different_tokens": differ} if differ.any() else {}
        return cls(tuple(index), forward, reverse, facts, kinds.pop() if kinds else "same_target", flags, tokenizer)

    def __len__(self) -> int:
        return len(self.forward)

    @overload
    def __getitem__(self, index: int) -> ReversalPair: ...
    @overload
    def __getitem__(self, index: slice) -> ReversalPairs: ...
    def __getitem__(self, index: int | slice) -> ReversalPair | ReversalPairs:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        forward, reverse = self.queries[self.forward[index]], self.queries[self.reverse[index]]
        differ = "different_tokens" in self.flags and bool(self.flags["different_tokens"][index])
        return ReversalPair(forward, reverse, self.kind, str(self.facts[index]), differ)

    def __iter__(self) -> Iterator[ReversalPair]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        counts = f"{len(self)} pairs of {len(set(self.facts))} facts, {len(self.queries)} queries"
        differ = self.report.get("different_tokens")
        opted_out = f", {differ} with different tokens in the two directions" if differ else ""
        return f"ReversalPairs({counts}, kind={self.kind!r}{opted_out})"

    def take(self, pairs: np.ndarray) -> ReversalPairs:
        """Some of the pairs, by index, with only the queries they use."""
        used, inverse = np.unique(np.concatenate([self.forward[pairs], self.reverse[pairs]]), return_inverse=True)
        queries = tuple(self.queries[i] for i in used)
        flags = {name: values[pairs] for name, values in self.flags.items()}
        forward, reverse = inverse[: len(pairs)], inverse[len(pairs) :]
        facts = self.facts[pairs]
        return ReversalPairs(queries, forward, reverse, facts, self.kind, flags, self.tokenizer, self.dropped)

    def offsets(self, logit_shift: int) -> tuple[np.ndarray, np.ndarray]:
        """Signed offsets, first evidence token minus first readout row, forward and reverse. Shapes: `pair, pair`."""
        offset = np.array([q.evidence_positions[0] - (q.target_positions[0] - logit_shift) for q in self.queries])
        return offset[self.forward], offset[self.reverse]

    def distances(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens from target to evidence, between their nearest edges, forward and reverse. Shapes: `pair, pair`."""
        distance = np.array([_edge_distance(q) for q in self.queries])
        return distance[self.forward], distance[self.reverse]

    def groups(self, logit_shift: int) -> np.ndarray:
        """The group of each pair: its (forward offset, reverse offset), numbered. Shapes: `pair`."""
        offsets = np.stack(self.offsets(logit_shift), axis=1)
        return np.unique(offsets, axis=0, return_inverse=True)[1].reshape(-1)

    @property
    def report(self) -> dict[str, int]:
        """How many pairs carry each flag, and how many were dropped why; empty when nothing was flagged."""
        flagged = {name: np.asarray(values) for name, values in self.flags.items()}
        counts = {name: int(values.sum()) for name, values in flagged.items() if values.dtype == bool}
        counts |= {f"dropped_{reason}": count for reason, count in self.dropped.items()}
        return {name: count for name, count in counts.items() if count}

    @property
    def digest(self) -> str:
        """Sixteen hex digits that change when a query, a pairing, a fact label or the kind does."""
        state = hashlib.sha256(self.kind.encode())
        for query in self.queries:
            state.update(repr((query.token_ids, query.target_positions, query.evidence_positions)).encode())
        state.update(np.stack([self.forward, self.reverse]).astype("<i8").tobytes())
        state.update(json.dumps([str(fact) for fact in self.facts]).encode())
        return state.hexdigest()[:16]

    def to_frame(self) -> pd.DataFrame:
        """One row per pair and direction: what is asked, token by token, with target in [brackets] and evidence in
        {braces}; distances and flags. A blank that belongs to a token is shown as `␣`.
        """
        return pair_frame(self)

    def save(self, path: str | Path) -> Path:
        """Write the pairs as JSON lines (whole or not at all), to be read by `load` and `revprobe probe --pairs`."""
        return save_pairs(self, Path(path))

    @classmethod
    def load(cls, path: str | Path, *, tokenizer: Any = None) -> ReversalPairs:
        """Read pairs written by `save`. Raises: RevprobeError, naming file, line and problem."""
        return load_pairs(Path(path), tokenizer)

    def _repr_html_(self, limit: int = 20) -> str:
        """The first pairs as a table, target and evidence tokens coloured; all text escaped."""
        return pair_html(self, limit)


def _require_kind(kind: str) -> None:
    if kind not in KINDS:
        raise RevprobeError(f"unknown kind of pair {kind!r}{did_you_mean(kind, KINDS)}")


def _edge_distance(query: Query) -> int:
    return min(
        abs(t - e)
        for t in (query.target_positions[0], query.target_positions[-1])
        for e in (query.evidence_positions[0], query.evidence_positions[-1])
    )
