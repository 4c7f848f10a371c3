"""Pairs on disk: JSON lines, one pair each, with a first line for what was dropped when anything was.

{"fact": "d", "kind": "same_target", "forward": {"token_ids": [...], "target_positions": [...],
 "evidence_positions": [...]}, "reverse": {...}, "flags": {"shares_tokens": false, ...}}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...atomic_files import written_whole
from ...errors import RevprobeError

if TYPE_CHECKING:
    from .pairs import Query, ReversalPair, ReversalPairs


def save_pairs(pairs: ReversalPairs, path: Path) -> Path:
    """Write the pairs, whole or not at all."""
    with written_whole(path) as part, part.open("w", encoding="utf-8") as file:
        if pairs.dropped:
            file.write(json.dumps({"dropped": dict(pairs.dropped)}) + "\n")
        for i, pair in enumerate(pairs):
            sides = {side: _query_fields(getattr(pair, side)) for side in ("forward", "reverse")}
            row: dict[str, Any] = {"fact": pair.fact, "kind": pair.kind, **sides}
            if pairs.flags:
                row["flags"] = {name: np.asarray(values)[i].item() for name, values in pairs.flags.items()}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def load_pairs(path: Path, tokenizer: Any) -> ReversalPairs:
    """Read what `save_pairs` wrote. Raises: RevprobeError, naming file, line and problem."""
    from .pairs import ReversalPairs  # it needs this module

    if not path.is_file():
        raise RevprobeError(f"no pairs file at {str(path)!r}; write one with ReversalPairs.save, or use letters:LENGTH")
    pairs: list[ReversalPair] = []
    flags: list[Mapping[str, Any]] = []
    dropped: dict[str, int] = {}
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        try:
            row = json.loads(line)
            if "dropped" in row:
                dropped = {str(reason): int(count) for reason, count in row["dropped"].items()}
                continue
            pairs.append(_pair(row, number))
            flags.append(row.get("flags", {}))
            if flags[-1].keys() != flags[0].keys():
                raise ValueError(f"flags {sorted(flags[-1])}, but {sorted(flags[0])} on the lines before")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RevprobeError(
                f"{path}, line {number}: {type(error).__name__}: {error}; expected fact, kind, forward and "
                "reverse with token_ids, target_positions, evidence_positions, and the same flags on every line"
            ) from error
    if not pairs:
        raise RevprobeError(f"{path} holds no pairs; expected one JSON object per line")
    columns = {name: np.array([row[name] for row in flags]) for name in flags[0]}
    return replace(ReversalPairs.from_pairs(pairs, tokenizer=tokenizer), flags=columns, dropped=dropped)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RevprobeError(
            f"{path}: not a text file ({error.reason} at byte {error.start}); expected JSON lines in UTF-8"
        ) from error


def _pair(row: Mapping[str, Any], number: int) -> ReversalPair:
    from .pairs import Query, ReversalPair

    forward, reverse = Query(**row["forward"]), Query(**row["reverse"])
    differ = bool(row.get("flags", {}).get("different_tokens", False))
    return ReversalPair(forward, reverse, row.get("kind", "same_target"), str(row.get("fact", number)), differ)


def _query_fields(query: Query) -> dict[str, list[int]]:
    return {name: list(getattr(query, name)) for name in ("token_ids", "target_positions", "evidence_positions")}
