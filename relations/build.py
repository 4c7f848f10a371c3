"""From a table of facts to a `TextRelation`: options, repeated facts, statements, and the split."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pandas as pd

from ..errors import RevprobeError, did_you_mean
from ..probes.pairs.templates import ROLES
from .cells import FactTable, shown
from .spelling import plain_name
from .splits import TextIndex, families, hold_out
from .statements import Statement, TemplateLists, answer_in_prompt, make_statements, named_slots, read_templates
from .tables import read_table
from .text_relation import TextRelation

DUPLICATES = ("error", "merge")
_OWN_COLUMNS = ("fact", "row", "split")


class RelationOptions(TypedDict, total=False):
    """What the relations made from tables have in common; `Options` holds the defaults."""

    heldout: float
    seed: int
    heldout_templates: int
    carrier: str
    duplicates: str
    ignore_case: bool
    bad_rows: str
    rows: Sequence[int] | None
    encoding: str
    dataset_split: str
    dataset_config: str | None


@dataclass(frozen=True)
class Options:
    """The options of a relation from a table.

    Args:
        heldout: share of the facts to hold out, the floor; whole families of facts with a common entity.
        seed: draws them.
        heldout_templates: how many templates of a direction, the last ones, are kept for evaluation.
        carrier: text before every training text, question and pair.
        duplicates: "error" for a repeated fact, however spelled, and for one that has another's names the other way
            round, or "merge" to keep the first and count the others.
        ignore_case: whether names that differ by case alone are one name; where not, they are counted.
        bad_rows: "error" for a cell that cannot be used, or "skip" to leave its row out and count it.
        rows: (first, one past the last) rows of the table to use; None for all.
        encoding: of a text file.
        dataset_split, dataset_config: which part of a dataset given by name.
    """

    heldout: float = 0.1
    seed: int = 0
    heldout_templates: int = 1
    carrier: str = "Fact: "
    duplicates: str = "error"
    ignore_case: bool = False
    bad_rows: str = "error"
    rows: Sequence[int] | None = None
    encoding: str = "utf-8"
    dataset_split: str = "train"
    dataset_config: str | None = None

    @property
    def reading(self) -> dict[str, Any]:
        """The part that `read_table` takes."""
        names = ("bad_rows", "rows", "encoding", "dataset_split", "dataset_config")
        return {name: getattr(self, name) for name in names}


def read_options(options: Mapping[str, Any]) -> Options:
    """Raises: RevprobeError, for an option there is not, with the nearest."""
    known = [one.name for one in fields(Options)]
    for option in options:
        if option not in known:
            raise RevprobeError(f"unknown option {option!r} of a relation{did_you_mean(option, known)}")
    chosen = Options(**options)
    if not isinstance(chosen.ignore_case, bool):
        raise RevprobeError(f"ignore_case={chosen.ignore_case!r}: expected True or False")
    if chosen.duplicates not in DUPLICATES:
        raise RevprobeError(
            f"unknown duplicates {chosen.duplicates!r}{did_you_mean(str(chosen.duplicates), DUPLICATES)}"
        )
    return chosen


def read_facts(
    source: str | Path | pd.DataFrame,
    columns: Sequence[str],
    templates: Iterable[str | Sequence[str]],
    options: Options,
) -> FactTable:
    """The rows of a source, the entity columns and every column a template names checked."""
    two = isinstance(columns, Sequence) and not isinstance(columns, str) and len(columns) == 2
    if not two or columns[0] == columns[1]:
        raise RevprobeError(f"columns={columns!r}: expected the names of two columns, one for each entity")
    slots = [slot for slot in named_slots(templates) if slot not in ROLES]
    return read_table(source, list(dict.fromkeys([*columns, *slots])), **options.reading)


def build_relation(
    name: str,
    table: FactTable,
    columns: Sequence[str],
    groups: Sequence[tuple[Hashable, TemplateLists]],
    options: Options,
    *,
    by: str | None = None,
) -> TextRelation:
    """The relation of a table of facts.

    Args:
        groups: templates, and the value of the column `by` whose facts they word; (None, templates) words all facts.
        by: a column that facts must also have in common to be the same, or of one family.
    Raises: RevprobeError, for repeated and mirrored facts unless merged, for templates that do not fit, and when
        nothing can be held out that was asked for.
    """
    table = _labelled(_without_repeats(table, columns, by, options), columns, by)
    statements: dict[str, list[Statement]] = {}
    for value, templates in groups:
        facts = table.frame if value is None else table.frame[table.frame[by] == value]
        for direction in read_templates(templates, columns, list(table.frame.columns), options.heldout_templates):
            statements.setdefault(direction.direction, []).extend(make_statements(facts, columns, direction))
    if len(statements) != 2:
        raise RevprobeError(f"{name} has templates of the directions {list(statements)}; expected the same two for all")
    held = _held_out(table, columns, by, statements, options)
    if not options.ignore_case:
        table.flag(_differ_by_case(table, columns, by), columns[0], "differs_by_case")
    asking = {one.fact for listed in statements.values() for one in listed if answer_in_prompt(one)}
    table.flag(np.isin(np.arange(len(table.frame)), sorted(asking)), columns[0], "answer_in_prompt")
    first, second = statements
    return TextRelation(
        name=name,
        directions=(first, second),
        columns=(columns[0], columns[1]),
        table=table.frame,
        statements=statements,
        heldout={direction: held for direction in statements},
        carrier=options.carrier,
        ignore_case=options.ignore_case,
        problems=tuple(table.problems),
    )


def _without_repeats(table: FactTable, columns: Sequence[str], by: str | None, options: Options) -> FactTable:
    """The table with each fact once and in one order of names.

    Raises: RevprobeError, naming both rows, unless repeats are to be merged.
    """
    same = [*columns, *([by] if by else [])]
    frame, plain = table.frame, _spelled(table.frame, columns, by, ignore_case=options.ignore_case)
    repeated = plain.duplicated().to_numpy()
    if repeated.any() and options.duplicates == "error":
        place = int(np.flatnonzero(repeated)[0])
        values = frame[same].iloc[place].tolist()
        first = int(np.flatnonzero((plain.iloc[:place] == plain.iloc[place]).all(axis=1))[0])
        again = "again" if frame[same].iloc[first].tolist() == values else "again in another spelling"
        raise RevprobeError(
            f"{table.labels[place]}: columns {same} hold {shown(values)}, the fact of {table.labels[first]} {again} "
            f"({int(repeated.sum())} repeated in all); remove it, or say duplicates='merge'"
        )
    itself = (plain[columns[0]] == plain[columns[1]]).to_numpy()
    if itself.any() and options.bad_rows == "error":
        place = int(np.flatnonzero(itself)[0])
        raise RevprobeError(
            f"{table.labels[place]}: columns {columns[0]!r} and {columns[1]!r} hold the same name "
            f"{shown(frame[columns[0]].iloc[place])}, so the question contains its answer; remove it, or say "
            "bad_rows='skip'"
        )
    mirror = _mirrored(plain[columns[0]].tolist(), plain[columns[1]].tolist(), repeated | itself)
    if mirror and options.duplicates == "error":
        place, first = next(iter(mirror.items()))
        raise RevprobeError(
            f"{table.labels[place]}: columns {same} hold {shown(frame[same].iloc[place].tolist())}, the names of "
            f"{table.labels[first]} the other way round ({len(mirror)} such in all), so that training on both would "
            "name them in both orders; remove one, or say duplicates='merge' to keep the first"
        )
    mirrored = np.isin(np.arange(len(frame)), list(mirror))
    table.flag(repeated, columns[0], "duplicate_fact")
    table.flag(itself, columns[0], "skipped_same_entity")
    table.flag(mirrored, columns[0], "mirrored_fact")
    return table.take(np.flatnonzero(~repeated & ~itself & ~mirrored))


def _mirrored(first: Sequence[str], second: Sequence[str], left_out: np.ndarray) -> dict[int, int]:
    """Facts whose two names an earlier fact has the other way round, of whatever relation, and that fact's place.

    Trained on, they would say the earlier one's reverse: that Bo is Ann's spouse, where Ann is Bo's.
    """
    place_of: dict[tuple[str, str], int] = {}
    mirror = {}
    for place, names in enumerate(zip(first, second, strict=True)):
        if left_out[place]:
            continue
        if names[::-1] in place_of:
            mirror[place] = place_of[names[::-1]]
        else:
            place_of.setdefault(names, place)
    return mirror


def _spelled(frame: pd.DataFrame, columns: Sequence[str], by: str | None, *, ignore_case: bool) -> pd.DataFrame:
    """What tells facts apart: the entities without differences of spelling, and the column `by`."""
    plain = {column: [plain_name(name, ignore_case=ignore_case) for name in frame[column]] for column in columns}
    return pd.DataFrame(plain | ({by: frame[by].tolist()} if by else {}), dtype=object)


def _differ_by_case(table: FactTable, columns: Sequence[str], by: str | None) -> np.ndarray:
    """Facts one of whose names stands elsewhere in the table in another case, but the first of each. Shapes: `fact`."""
    first: dict[tuple[str, str], str] = {}
    differ = np.zeros(len(table.frame), dtype=bool)
    kinds = table.frame[by].tolist() if by else [""] * len(differ)
    for column in columns:
        for place, (kind, name) in enumerate(zip(kinds, table.frame[column], strict=True)):
            plain = plain_name(name)
            differ[place] |= first.setdefault((kind, plain.casefold()), plain) != plain
    return differ


def _labelled(table: FactTable, columns: Sequence[str], by: str | None) -> FactTable:
    """The table with the columns fact and row in front, and the source's own of those names renamed."""
    clash = [c for c in (*columns, *([by] if by else [])) if c in _OWN_COLUMNS]
    if clash:
        raise RevprobeError(f"column {clash[0]!r} is a name that relations use themselves; rename it, as to 'entity'")
    frame = table.frame.rename(columns={name: f"source_{name}" for name in _OWN_COLUMNS})
    parts = [frame[columns[0]], *([frame[by]] if by else []), frame[columns[1]]]
    labels = [" | ".join(values) for values in zip(*(part.tolist() for part in parts), strict=True)]
    again = pd.Series(labels).duplicated().to_numpy()
    if again.any():
        place = int(np.flatnonzero(again)[0])
        raise RevprobeError(
            f"{table.labels[place]}: the fact would be called {labels[place]!r}, as that of "
            f"{table.labels[labels.index(labels[place])]} is; leave the ' | ' out of one of their names"
        )
    frame.insert(0, "fact", labels)
    frame.insert(len(frame.columns), "row", table.labels)
    return FactTable(frame, table.labels, table.problems)


def _held_out(
    table: FactTable,
    columns: Sequence[str],
    by: str | None,
    statements: Mapping[str, Sequence[Statement]],
    options: Options,
) -> np.ndarray:
    """Which facts are held out. Those whose names stand in a trained text all the same are trained, and flagged."""
    facts = table.frame
    plain = _spelled(facts, columns, None, ignore_case=options.ignore_case)
    names = list(zip(plain[columns[0]], plain[columns[1]], strict=True))
    kinds = facts[by].tolist() if by else [""] * len(facts)
    # Facts of different relations may share an entity, but neither both nor a prompt: "Lyon is located in" asks for
    # the country and for the region, and takes either.
    prompts: list[set[str]] = [set() for _ in kinds]
    for one in (one for listed in statements.values() for one in listed):
        prompts[one.fact].add(plain_name(one.prompt, ignore_case=options.ignore_case))
    keys = [((kind, a), (kind, b), (a, b), *own) for kind, (a, b), own in zip(kinds, names, prompts, strict=True)]
    drawn = hold_out(keys, share=options.heldout, seed=options.seed)
    held, family = drawn.copy(), families(keys)
    while held.any():
        trained = (one.text for listed in statements.values() for one in listed if not held[one.fact])
        index = TextIndex([plain_name(text, ignore_case=options.ignore_case) for text in trained])
        met = [fact for fact in np.flatnonzero(held) if index.first_with(names[fact]) is not None]
        if not met:
            break
        held &= ~np.isin(family, family[met])
    if drawn.any() and not held.any():
        raise RevprobeError(
            f"heldout={options.heldout!r}: the names of every fact drawn with seed={options.seed!r} also stand in "
            "trained texts; use another seed, or heldout=0"
        )
    table.flag(drawn & ~held, columns[0], "drawn_but_trained")
    return held
