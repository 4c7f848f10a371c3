"""Lists of reversal pairs, in columns, and as JSON lines on disk.

`ReversalPairs` keeps many pairs in columns: queries that occur in several pairs are stored, and later run, once. A file
holds one pair a line, after a first line for what was dropped and for the strings of the token ids:

{"dropped": {}, "tokens": {"4": "d", ...}}
{"fact": "d", "kind": "same_target", "forward": {"token_ids": [...], "target_positions": [...],
 "evidence_positions": [...]}, "reverse": {...}, "flags": {"shares_tokens": false, ...}}

A pair of a list that one probe alone reads says which: "probe": "attention".

A little long, since a list, its table and its file are read together.
"""

from __future__ import annotations

import functools
import html
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import pandas as pd

from ...arguments import checked, checked_fields, fitted
from ...atomic_files import written_whole
from ...errors import RevprobeError, did_you_mean, shown
from .digest import canonical, digest_of
from .display import STYLES, shown_query, tokens_html
from .query import Query, ReversalPair, require_kind
from .token_strings import UNSAID, joined_strings, token_strings

# The probes that may read a list of their own, by their short names.
READERS = ("attention", "gradient", "probability")


Places = np.ndarray | Sequence[int] | Sequence[bool]


def places_among(count: int, given: Any) -> np.ndarray:
    """The places that indices, or a true or false for each of `count`, name. Raises: RevprobeError, if they do not."""
    chosen = np.asarray(given)
    if not chosen.size:
        chosen = chosen.astype(np.int64)
    expected = f"expected places from {-count} to {count - 1}, or {count} of true and false"
    if chosen.ndim != 1 or chosen.dtype.kind not in "biu":
        raise RevprobeError(f"pairs by {shown(given)}: {expected}")
    if chosen.dtype.kind == "b":
        if len(chosen) != count:
            raise RevprobeError(f"pairs by {len(chosen)} of true and false: {expected}")
        return np.flatnonzero(chosen)
    outside = chosen[(chosen < -count) | (chosen >= count)]
    if len(outside):
        raise RevprobeError(f"pair {outside[0]} of {count}: {expected}")
    return chosen % count


@checked_fields
@dataclass(frozen=True, eq=False, repr=False)
class ReversalPairs(Sequence[ReversalPair]):
    """Many pairs of one kind, in columns; `ReversalPairs([pair, ...])` is `ReversalPairs.from_pairs([pair, ...])`.

    Args:
        queries: the distinct queries.
        forward, reverse: for each pair the index of its two queries, `pair`.
        facts: for each pair the label of its fact; intervals are over facts, and derangements pair different
            facts, so pairs of one fact must share a label.
        kind: "same_target" (both ask for the same target from the same evidence, in opposite order) or "swapped"
            (the reverse query exchanges the roles).
        flags: further columns for `to_frame`, one value per pair; those of true and false are counted by `report`.
            `different_tokens` marks pairs whose two queries may differ in their tokens (see `ReversalPair`).
        tokenizer: shows tokens, and says what the ids are called where `tokens` does not.
        dropped: how many pairs were left out when these were made, by reason.
        tokens: token id -> the string that the tokenizer these were made with has for it. A probe refuses a model whose
            tokenizer has another one. Empty where it is not known, as in files of version 0.1.
        by_probe: the lists of the probes that do not read this one, by their short names (`letter_pairs` says why);
            `for_probe(name)` is what a probe reads. Some of the pairs (a slice, `take`) are one list for all probes.
    Raises: RevprobeError, when the list is empty, the columns disagree in length, or a probe's list does not fit.
    """

    queries: tuple[Query, ...]
    forward: np.ndarray
    reverse: np.ndarray
    facts: np.ndarray
    kind: str = "same_target"
    flags: Mapping[str, np.ndarray] = field(default_factory=dict)
    tokenizer: Any = None
    dropped: Mapping[str, int] = field(default_factory=dict)
    tokens: Mapping[int, str] = field(default_factory=lambda: UNSAID)
    by_probe: Mapping[str, ReversalPairs] = field(default_factory=dict)

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
        if self.tokens is UNSAID:
            object.__setattr__(self, "tokens", token_strings(self.tokenizer, self.token_ids))
        for name, own in self.by_probe.items():
            _require_own_list(name, own, self.kind)

    @classmethod
    def from_pairs(cls, pairs: Iterable[ReversalPair], *, tokenizer: Any = None) -> ReversalPairs:
        """Collect pairs, storing equal queries once, with the flags that all of them have.

        How many were dropped (`dropped`) is known of a list alone. Raises: RevprobeError, when empty or of mixed kinds.
        """
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
        shared = [name for name in (pairs[0].flags if pairs else ()) if all(name in pair.flags for pair in pairs)]
        flags = {name: np.array([pair.flags[name] for pair in pairs]) for name in shared}
        flags |= {"different_tokens": differ} if differ.any() or "different_tokens" in flags else {}
        made = cls(tuple(index), forward, reverse, facts, kinds.pop() if kinds else "same_target", flags, tokenizer)
        return replace(made, tokens={**made.tokens, **joined_strings(pair.tokens for pair in pairs)})

    @classmethod
    def accepts(cls, given: object) -> ReversalPairs:
        """What a probe may be given for pairs: a list of pairs, or one. Raises: RevprobeError, for anything else."""
        return cls.from_pairs([given] if isinstance(given, ReversalPair) else given)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.forward)

    @overload
    def __getitem__(self, index: int) -> ReversalPair: ...
    @overload
    def __getitem__(self, index: slice | Places) -> ReversalPairs: ...
    def __getitem__(self, index: int | slice | Places) -> ReversalPair | ReversalPairs:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        if not isinstance(index, int | np.integer) or isinstance(index, bool):
            return self.take(index)  # type: ignore[arg-type]  # which refuses a single true or false
        if not -len(self) <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        forward, reverse = self.queries[self.forward[index]], self.queries[self.reverse[index]]
        flags = {name: np.asarray(values)[index] for name, values in self.flags.items()}
        differ = bool(flags.get("different_tokens", False))
        return ReversalPair(forward, reverse, self.kind, str(self.facts[index]), differ, self.tokens, flags)

    def __iter__(self) -> Iterator[ReversalPair]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        counts = f"{len(self):,} pairs of {len(set(self.facts)):,} facts, {len(self.queries):,} queries"
        report = dict(self.report)
        differ = report.pop("different_tokens", 0)
        opted_out = f", {differ:,} with different tokens in the two directions" if differ else ""
        opted_out += "".join(f", {count:,} {name.replace('_', ' ')}" for name, count in report.items())
        own = "".join(f"; {name} reads {len(pairs)} pairs of its own" for name, pairs in self.by_probe.items())
        return f"ReversalPairs({counts}, kind={self.kind!r}{opted_out}{own})"

    def for_probe(self, name: str) -> ReversalPairs:
        """The one list that a probe reads: its own in `by_probe`, else these pairs."""
        return self.by_probe.get(name, replace(self, by_probe={}) if self.by_probe else self)

    @cached_property
    def token_ids(self) -> list[int]:
        """The distinct token ids of all queries, ascending."""
        return sorted({token for query in self.queries for token in query.token_ids})

    def take(self, pairs: Places) -> ReversalPairs:
        """Some of the pairs, by index (from the end if negative) or by a true or false for each, with their queries.

        Raises: RevprobeError, for anything else, and for none.
        """
        pairs = places_among(len(self), pairs)
        used, inverse = np.unique(np.concatenate([self.forward[pairs], self.reverse[pairs]]), return_inverse=True)
        queries = tuple(self.queries[i] for i in used)
        flags = {name: values[pairs] for name, values in self.flags.items()}
        forward, reverse = inverse[: len(pairs)], inverse[len(pairs) :]
        facts = self.facts[pairs]
        about = (self.kind, flags, self.tokenizer, self.dropped, self.tokens)
        return ReversalPairs(queries, forward, reverse, facts, *about)

    @checked
    def sample(self, n: int, seed: int = 0) -> ReversalPairs:
        """So many of the pairs, drawn at random without replacement, in their order; one list for all probes.

        Raises: RevprobeError, for fewer than one or more than there are.
        """
        if not 1 <= n <= len(self):
            raise RevprobeError(f"n={n}: expected 1 to {len(self)}, the pairs there are")
        return self.take(np.sort(np.random.default_rng(seed).permutation(len(self))[:n]))

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
        """Sixteen hex digits that change when a query, a pairing, a fact label or the kind does; of this list alone.

        A reading's `meta["pairs"]` is that of the list it was taken on, `for_probe(...)`.
        """
        return digest_of(self.kind, canonical(self.queries, self.forward, self.reverse), [*map(str, self.facts)])

    def has_digest(self, digest: object) -> bool:
        """Whether a digest is of this list: also one of older versions, which changed with the order that queries are
        stored in."""
        as_stored = (self.queries, self.forward, self.reverse)
        return digest == self.digest or digest == digest_of(self.kind, as_stored, [*map(str, self.facts)])

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
            lists = {"": self, **self.by_probe}
            said = joined_strings(pairs.tokens for pairs in lists.values())
            used = {str(t): said[t] for pairs in lists.values() for t in pairs.token_ids if t in said}
            if self.dropped or used:
                file.write(json.dumps({"dropped": dict(self.dropped), "tokens": used}) + "\n")
            for name, pairs in lists.items():
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in pairs._rows(name))
        return path

    def _rows(self, probe: str) -> Iterator[dict[str, Any]]:
        """The lines of a file, one for each pair; `probe` alone reads them, unless it is empty."""
        for i, pair in enumerate(self):
            row: dict[str, Any] = {"fact": pair.fact, "kind": pair.kind}
            row |= {"forward": pair.forward.as_row(), "reverse": pair.reverse.as_row()}
            if self.flags:
                row["flags"] = {name: np.asarray(values)[i].item() for name, values in self.flags.items()}
            yield row | ({"probe": probe} if probe else {})

    @classmethod
    @checked
    def load(cls, path: str | Path, *, tokenizer: Any = None) -> ReversalPairs:
        """Read pairs written by `save`. Raises: RevprobeError, naming file, line and problem."""
        path = Path(path)
        if not path.is_file():
            raise RevprobeError(
                f"no pairs file at {str(path)!r}; write one with ReversalPairs.save, or use letters:LENGTH"
            )
        text = _read_text(path).removesuffix("\n")
        # A line ends at "\n" alone: names hold separators of their own.
        lists, said = read_lines(path, enumerate(text.split("\n") if text else [], start=1))
        if "" not in lists:
            raise RevprobeError(f"{path} holds no pairs; expected one JSON object per line")
        made = {name: rows.pairs(tokenizer=tokenizer, **said) for name, rows in lists.items()}
        return replace(made.pop(""), by_probe=made)

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


_from_columns = ReversalPairs.__init__


@functools.wraps(_from_columns)
def _from_either(self: ReversalPairs, queries: Any = (), *columns: Any, **about: Any) -> None:
    """Of a list of pairs alone, what `from_pairs` makes of it; else the columns as they are given."""
    if columns or not {*about} <= {"tokenizer"}:
        _from_columns(self, queries, *columns, **about)
    else:
        self.__dict__.update(ReversalPairs.from_pairs(queries, **about).__dict__)


ReversalPairs.__init__ = _from_either  # type: ignore[method-assign]


@dataclass
class PairRows:
    """The lines of a file that are one list."""

    made: list[ReversalPair] = field(default_factory=list)
    flags: list[Mapping[str, Any]] = field(default_factory=list)

    def add(self, pair: ReversalPair, flags: Mapping[str, Any]) -> None:
        if self.flags and flags.keys() != self.flags[0].keys():
            raise ValueError(f"flags {sorted(flags)}, but {sorted(self.flags[0])} on the lines before")
        self.made.append(pair)
        self.flags.append(flags)

    def pairs(self, **about: Any) -> ReversalPairs:
        columns = {name: np.array([row[name] for row in self.flags]) for name in self.flags[0]}
        return replace(ReversalPairs.from_pairs(self.made), flags=columns, **about)


def read_lines(path: Path, lines: Iterable[tuple[int, str]]) -> tuple[dict[str, PairRows], dict[str, Any]]:
    """Numbered lines of a file as lists by the probe that alone reads them, "" for all; and what the first line says.

    Raises: RevprobeError, naming file, line and problem.
    """
    lists: dict[str, PairRows] = {}
    said: dict[str, Any] = {}
    for number, line in lines:
        try:
            row = json.loads(line)
            if "dropped" in row:
                said["dropped"] = {str(reason): int(count) for reason, count in row["dropped"].items()}
                said["tokens"] = {int(token): str(text) for token, text in row.get("tokens", {}).items()}
                continue
            forward, reverse = Query(**row["forward"]), Query(**row["reverse"])
            differ = bool(row.get("flags", {}).get("different_tokens", False))
            kind, fact = row.get("kind", "same_target"), str(row.get("fact", number))
            fact.encode()  # a lone surrogate has no place in a file of readings
            marks = row.get("flags", {})
            if uneven := [name for name, one in marks.items() if isinstance(one, list | dict)]:
                raise ValueError(f"flag {uneven[0]!r} is {shown(marks[uneven[0]])}, not one value")
            pair = ReversalPair(forward, reverse, kind, fact, differ)
            lists.setdefault(row.get("probe", ""), PairRows()).add(pair, marks)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RevprobeError(
                f"{path}, line {number}: {type(error).__name__}: {error}; expected fact, kind, forward and "
                "reverse with token_ids, target_positions, evidence_positions, and the same flags on every line"
            ) from error
    return lists, {"dropped": {}, "tokens": {}} | said


def _require_own_list(probe: str, pairs: ReversalPairs, kind: str) -> None:
    if probe not in READERS:
        raise RevprobeError(f"no probe {probe!r} reads pairs of its own{did_you_mean(probe, READERS)}")
    if not isinstance(pairs, ReversalPairs) or pairs.by_probe or pairs.kind != kind:
        raise RevprobeError(f"by_probe[{probe!r}] is {pairs!r}: expected one list of pairs of the kind {kind!r}")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RevprobeError(
            f"{path}: not a text file ({error.reason} at byte {error.start}); expected JSON lines in UTF-8"
        ) from error
