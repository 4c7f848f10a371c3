"""Lists of reversal pairs, in columns, and as JSON lines on disk.

`ReversalPairs` keeps many pairs in columns: queries that occur in several pairs are stored, and later run, once. A file
holds one pair a line, after a first line for what was dropped when anything was:

{"fact": "d", "kind": "same_target", "forward": {"token_ids": [...], "target_positions": [...],
 "evidence_positions": [...]}, "reverse": {...}, "flags": {"shares_tokens": false, ...}}

A little long, since a list, its table and its file are read together.
"""

from __future__ import annotations

import hashlib
import html
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import pandas as pd

from ...arguments import checked, checked_fields, fitted
from ...atomic_files import written_whole
from ...errors import RevprobeError, shown
from .display import STYLES, shown_query, tokens_html
from .query import Query, ReversalPair, require_kind


@checked_fields
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
        require_kind(self.kind)
        lengths = {len(self.forward), len(self.reverse), len(self.facts), *(len(v) for v in self.flags.values())}
        if lengths == {0}:
            raise RevprobeError("the list of pairs is empty; a probe needs at least one pair")
        if len(lengths) > 1:
            raise RevprobeError(
                f"columns of {sorted(lengths)} pairs: expected one length for forward, reverse, facts and flags"
            )
        for side, index in (("forward", self.forward), ("reverse", self.reverse)):
            wrong = np.flatnonzero((index < 0) | (index >= len(self.queries))) if index.dtype.kind in "iu" else [0]
            if len(wrong):
                raise RevprobeError(
                    f"pair {wrong[0]} names {side} query {index[wrong[0]]!r}; expected 0 to {len(self.queries) - 1}, "
                    "its place in queries"
                )

    @classmethod
    def from_pairs(cls, pairs: Iterable[ReversalPair], *, tokenizer: Any = None) -> ReversalPairs:
        """Collect pairs, storing equal queries once. Raises: RevprobeError, when empty or of mixed kinds."""
        pairs = list(fitted("pairs", pairs, Iterable[ReversalPair]))
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

    @classmethod
    def accepts(cls, given: object) -> ReversalPairs:
        """What a probe may be given for pairs: a list of pairs, or one. Raises: RevprobeError, for anything else."""
        return cls.from_pairs([given] if isinstance(given, ReversalPair) else given)  # type: ignore[arg-type]

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
        edges = np.array([[(p[0], p[-1]) for p in (q.target_positions, q.evidence_positions)] for q in self.queries])
        # From either end of the target to either end of the evidence: `query edge edge`.
        distance = np.abs(edges[:, 0, :, None] - edges[:, 1, None, :]).min((1, 2))
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
        shown = [shown_query(query, self.tokenizer) for query in self.queries]
        frames = []
        for direction, index, distance in zip(
            ("forward", "reverse"), (self.forward, self.reverse), self.distances(), strict=True
        ):
            columns = {"pair": np.arange(len(self)), "fact": self.facts, "direction": direction, "kind": self.kind}
            columns |= {key: [shown[i][key] for i in index] for key in ("query", "target", "evidence")}
            frames.append(pd.DataFrame(columns | {"distance": distance} | dict(self.flags)))
        return pd.concat(frames).sort_values(["pair", "direction"], kind="stable").reset_index(drop=True)

    @checked
    def save(self, path: str | Path) -> Path:
        """Write the pairs as JSON lines (whole or not at all), to be read by `load` and `revprobe probe --pairs`."""
        path = Path(path)
        with written_whole(path) as part, part.open("w", encoding="utf-8") as file:
            if self.dropped:
                file.write(json.dumps({"dropped": dict(self.dropped)}) + "\n")
            for i, pair in enumerate(self):
                row: dict[str, Any] = {"fact": pair.fact, "kind": pair.kind}
                row |= {"forward": asdict(pair.forward), "reverse": asdict(pair.reverse)}
                if self.flags:
                    row["flags"] = {name: np.asarray(values)[i].item() for name, values in self.flags.items()}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        return path

    @classmethod
    @checked
    def load(cls, path: str | Path, *, tokenizer: Any = None) -> ReversalPairs:
        """Read pairs written by `save`. Raises: RevprobeError, naming file, line and problem."""
        path = Path(path)
        if not path.is_file():
            raise RevprobeError(
                f"no pairs file at {str(path)!r}; write one with ReversalPairs.save, or use letters:LENGTH"
            )
        pairs: list[ReversalPair] = []
        flags: list[Mapping[str, Any]] = []
        dropped: dict[str, int] = {}
        for number, line in enumerate(_read_text(path).splitlines(), start=1):
            try:
                row = json.loads(line)
                if "dropped" in row:
                    dropped = {str(reason): int(count) for reason, count in row["dropped"].items()}
                    continue
                forward, reverse = Query(**row["forward"]), Query(**row["reverse"])
                differ = bool(row.get("flags", {}).get("different_tokens", False))
                kind, fact = row.get("kind", "same_target"), str(row.get("fact", number))
                pairs.append(ReversalPair(forward, reverse, kind, fact, differ))
                fact.encode()  # a lone surrogate has no place in a file of readings
                flags.append(row.get("flags", {}))
                if uneven := [name for name, one in flags[-1].items() if isinstance(one, list | dict)]:
                    raise ValueError(f"flag {uneven[0]!r} is {shown(flags[-1][uneven[0]])}, not one value")
                if flags[-1].keys() != flags[0].keys():
                    raise ValueError(f"flags {sorted(flags[-1])}, but {sorted(flags[0])} on the lines before")
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise RevprobeError(
                    f"{path}, line {number}: {type(error).__name__}: {error}; expected fact, kind, forward and "
                    "reverse with token_ids, target_positions, evidence_positions, and the same flags on every line"
                ) from error
        if not pairs:
            raise RevprobeError(f"{path} holds no pairs; expected one JSON object per line")
        columns = {name: np.array([row[name] for row in flags]) for name in flags[0]}
        return replace(cls.from_pairs(pairs, tokenizer=tokenizer), flags=columns, dropped=dropped)

    def _repr_html_(self, limit: int = 20) -> str:
        """The first pairs as a table, target and evidence tokens coloured; all text escaped."""
        rows = "".join(
            f"<tr><td>{html.escape(pair.fact)}</td><td>{tokens_html(pair.forward, self.tokenizer)}</td>"
            f"<td>{tokens_html(pair.reverse, self.tokenizer)}</td></tr>"
            for pair in self[:limit]
        )
        more = f"<p>... and {len(self) - limit} more</p>" if len(self) > limit else ""
        parts = " ".join(f'<span style="{style}">{part}</span>' for part, style in STYLES.items())
        counted = "".join(f"; {html.escape(name)}: {count}" for name, count in self.report.items())
        legend = f"<p>{html.escape(repr(self))}: {parts}{counted}</p>"
        return f"{legend}<table><tr><th>fact</th><th>forward</th><th>reverse</th></tr>{rows}</table>{more}"


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RevprobeError(
            f"{path}: not a text file ({error.reason} at byte {error.start}); expected JSON lines in UTF-8"
        ) from error
