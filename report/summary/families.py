"""Which runs are seeds of one thing, and what each such family is called where others have its name.

Runs are seeds of each other where their configs differ in nothing but the seed (`family_of`) and their seeds differ:
a second run of the same seed is no second seed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import pandas as pd


@dataclass(frozen=True)
class Seed:
    """One run as one seed of a line or a cell.

    Attributes:
        label: what that is called by (model, dataset, direction).
        variant: what its sweep calls it besides; "" without.
        family: `family_of` its config; "" where that is not known.
        seed: as text; None where that is not known.
    """

    label: Hashable
    variant: str
    family: str
    seed: str | None


def variants_of(runs: Mapping[str, Seed]) -> dict[str, str]:
    """The variant of each run, made such that only seeds of each other share label and variant.

    It stays what it is but where one label has several families, which are told by the folder they stand in or what
    their runs are called, and for runs that share their seed with another of their family, each of which has its name.

    Args:
        runs: by their paths, or their names where these differ.

    >>> one, other = Seed("llada", "", "a", "0"), Seed("llada", "", "b", "0")
    >>> variants_of({"low/llada-s0": one, "high/llada-s0": other})
    {'low/llada-s0': 'low', 'high/llada-s0': 'high'}
    """
    own = _twins(runs)
    lines: dict[tuple[Any, ...], list[str]] = {}
    for run, one in runs.items():
        lines.setdefault((one.label, one.variant, one.family, own[run]), []).append(run)
    families: dict[tuple[Hashable, str], set[str]] = {}
    for label, variant, family, _ in lines:
        families.setdefault((label, variant), set()).add(family)
    found: dict[str, str] = {}
    for label in dict.fromkeys(one.label for one in runs.values()):
        of_label = {key: members for key, members in lines.items() if key[0] == label}
        needs = {key: bool(key[3]) or len(families[key[:2]]) > 1 for key in of_label}
        names = {key: ([] if needs[key] else [""]) + _beside(members, key[3]) for key, members in of_label.items()}
        whole = {key: [", ".join(filter(None, [key[1], name])) for name in own] for key, own in names.items()}
        told = _first_that_tell(whole)
        found |= {run: told[key] for key, members in of_label.items() for run in members}
    return {run: found[run] for run in runs}


def lines_of(measures: pd.DataFrame, names: Mapping[str, str]) -> pd.Series:
    """What each row of single runs' measures is drawn under where seeds are one line, no two families alike.

    Args:
        measures: rows with run (its path or key), family, weights, kind and, where it is known, seed.
        names: what each run is called.
    Returns: texts like `rope-l10 (3 seeds)`, with the seeds that have such a row; one run alone keeps its name.
    """
    runs = measures.drop_duplicates("run")
    seeds = runs["seed"].map(_text) if "seed" in runs else [None] * len(runs)
    known = zip(runs["run"], runs["family"], seeds, strict=True)
    all_runs = {str(run): Seed("", "", str(family), seed) for run, family, seed in known}
    line = {run: (all_runs[run].family, own) for run, own in _twins(all_runs).items()}
    members = {key: [run for run in all_runs if line[run] == key] for key in dict.fromkeys(line.values())}
    called = {key: [names.get(run, run) for run in own] for key, own in members.items()}
    # What they share, with ever more of their folders, then all their names.
    stems = _first_that_tell(
        {
            key: [stem_of(called[key]), *_tails(own), ", ".join(called[key]), ", ".join(own)]
            for key, own in members.items()
        }
    )
    made = pd.Series(index=measures.index, dtype=object)
    of_line = measures["run"].map(line)
    for (key, _, _), part in measures.groupby([of_line, "weights", "kind"], sort=False, dropna=False):
        there = list(dict.fromkeys(part["run"]))
        alone = names.get(there[0], there[0])
        made.loc[part.index] = alone if len(there) == 1 else f"{stems[key]} ({len(there)} seeds)"
    return made


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """Each path's last parts, so many that no two are alike.

    >>> short_names(["runs/low/s0", "runs/high/s0", "runs/low/s1"])
    {'runs/low/s0': 'low/s0', 'runs/high/s0': 'high/s0', 'runs/low/s1': 's1'}
    """
    return _first_that_tell({path: _tails([path]) for path in dict.fromkeys(paths)})


def stem_of(names: Sequence[str]) -> str:
    """What runs that differ in their seed are called together; one alone keeps its name.

    >>> stem_of(["rope-l10-s0", "rope-l10-s1"]), stem_of(["first", "second"])
    ('rope-l10', 'first ...')
    """
    if len(names) == 1:
        return names[0]
    stems = {name.rpartition("-s")[0] if name.rpartition("-s")[2].isdecimal() else name for name in names}
    return stems.pop() if len(stems) == 1 else f"{names[0]} ..."


def _twins(runs: Mapping[str, Seed]) -> dict[str, str]:
    """Of each run its own key where another that is called the same has its family and seed; else ""."""
    seeds = Counter((one.label, one.variant, one.family, one.seed) for one in runs.values())
    alike = {run: seeds[one.label, one.variant, one.family, one.seed] > 1 for run, one in runs.items()}
    return {run: run if alike[run] and one.seed is not None else "" for run, one in runs.items()}


def _beside(runs: Sequence[str], twin: str) -> list[str]:
    """Names for runs beside a label that says what they are of: the folder where all stand, then what they share."""
    folders = {str(PurePath(run).parent) for run in runs}
    inside = [] if twin or len(folders) > 1 or folders == {"."} else _tails(folders)
    return [*inside, *_tails(runs), ", ".join(PurePath(run).name for run in runs), ", ".join(runs)]


def _tails(paths: Iterable[str]) -> list[str]:
    """What the ends of some paths share, from the last part alone to all of them."""
    parts = [PurePath(path).parts for path in paths]
    return [
        stem_of(["/".join(own[-depth:]) for own in parts]) for depth in range(1, max(map(len, parts), default=0) + 1)
    ]


def _first_that_tell(candidates: Mapping[Any, Sequence[str]]) -> dict[Any, str]:
    """For each the first of its candidates that no other is called by; the last ones must differ."""
    at = dict.fromkeys(candidates, 0)
    while True:
        chosen = {key: candidates[key][place] for key, place in at.items()}
        counts = Counter(chosen.values())
        shared = [key for key, name in chosen.items() if counts[name] > 1 and at[key] + 1 < len(candidates[key])]
        if not shared:
            return chosen
        at |= {key: at[key] + 1 for key in shared}


def _text(seed: Any) -> str | None:
    return None if pd.isna(seed) else str(seed)
