"""The three probes over more pairs than memory should hold the rows of: part by part, each part's rows a file.

    folder/parts.json                                what was asked, of which weights; another question is refused
    folder/attention_correlation/part-00000.parquet  rows of the first pairs; the folder is one table to pandas
    folder/measures.csv                              the numbers of all parts together

A part is probed by `probe`, with facts shuffled within the part. What is kept of it are the numbers that the statistics
rest on: two scores of each pair and head, one row of a pair's gradients, two of its probabilities.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from ..arguments import checked
from ..atomic_files import write_text
from ..engines.workers import Workers
from ..errors import RevprobeError, first_line
from ..models.probed import ProbedModel
from ..models.weights_digest import settings_digest, weights_digest
from ..progress import Progress, shows_progress
from .fused import PROBES, probe, require_probes
from .pairs.pair_parts import PairParts
from .pairs.pairs import ReversalPairs
from .passes.asked import asked_pairs
from .passes.prompts import shown_queries
from .passes.run import place_of
from .passes.shared_out import shared_out
from .readings.reading import Reading
from .readings.readings import Readings
from .statistics.estimators import ScoreTables, score_correlation
from .statistics.partners import PARTNER
from .statistics.resampling import SHOWN, SHOWN_COLUMNS, Facts, kin

_ASKED, _MEASURES = "parts.json", "measures.csv"
_SETTINGS = "settings_digest"
_PROBABILITY = ["pair", "fact", "direction", "probability", "argmax_match"]
_PROBABILITY += ["probability_control", "argmax_match_control", "reason", "reason_control", "targets", PARTNER]


@checked
@shows_progress("pairs")
def probe_in_parts(
    model: ProbedModel | nn.Module | str | Path,
    pairs: ReversalPairs | str | Path,
    folder: str | Path,
    *,
    size: int = 5000,
    only: Sequence[str] | None = None,
    parameters: Sequence[str] | None = None,
    mode: str = "chain",
    batch_size: int | None = None,
    control: bool = True,
    progress: Progress | bool | None = None,
    seed: int = 0,
    workers: Workers | None = None,
) -> pd.DataFrame:
    """`probe` for many pairs: `size` of them at a time, whose rows go to a folder, so that memory does not hold them.

    Each part's files appear whole, and a folder that was begun is gone on with: parts that are there are read, not
    probed again. `pandas.read_parquet(folder / "attention_correlation")` has the rows of all parts, with pairs and
    groups numbered through (`shown` and its like are of the part; the numbers are over prompts of all parts). The
    numbers are those of `probe`, but that gradients and probabilities have facts of their part for a control, whatever
    those of other parts hold for right, and targets of one shown query are seen within a part. Memory grows by what the
    numbers rest on: 16 bytes for each pair and head, some hundred for each pair; files are read as needed.

    Args:
        pairs: a list for all probes, or a JSONL file of `ReversalPairs.save`.
        folder: new, empty, or begun by the same call. It states digests of weights and settings: another model is
            refused, also of the same name.
        size: pairs of a part; no fact's partner is sought beyond it.
        progress: called with the pairs that are done and all of them.
    Returns: what `Reading.measures` says of all pairs together, a row for each number, with the probe's name and what
        it was taken of: weights, and kind of pairs.
    Raises: RevprobeError, for a folder that holds anything else, the parts of another question, of other or more pairs,
        or a damaged part; for no pairs; a size below 2; and as `probe`.
    """
    wanted = list(PROBES) if only is None else require_probes(only)
    if not wanted or size < 2:
        raise RevprobeError(f"only={only!r}, size={size}: expected at least one probe, and two pairs in a part")
    with shared_out(workers, model) as (probed, share):
        parts = PairParts(pairs if isinstance(pairs, ReversalPairs) else Path(pairs), size, probed.tokenizer)
        options: dict[str, Any] = {"mode": mode, "batch_size": batch_size, "control": control, "seed": seed}
        options["parameters"] = None if parameters is None else list(parameters)
        names = [PROBES[name] for name in PROBES if name in wanted]
        store = _Parts(Path(folder), names)
        store.require({**_told_of(probed), "probes": names, "size": size, **options})
        store.require_no_more(-(-parts.count // size))
        kept, done = _Kept(), 0
        for number, part in enumerate(parts):
            tell = None if not callable(progress) else _told(progress, done, len(part), parts.count)
            readings = store.read(number, part) or store.write(
                number, probe(probed, part, only=wanted, progress=tell or False, share=share, **options), done
            )
            kept.add(readings, names)
            kept.see(probed, part)
            done += len(part)
            if callable(progress):
                progress(done, parts.count)
    table = kept.measures(names)
    write_text(store.folder / _MEASURES, table.to_csv(index=False))
    return table


def _told_of(model: ProbedModel) -> dict[str, Any]:
    """What tells a model from others, the most telling first: a name may stand for several."""
    place = place_of(model)
    told = {"model": model.name, "step": model.step, "weights": model.weights}
    told |= {"dtype": place["dtype"], "weight_dtype": place.get("weight_dtype", place["dtype"])}
    told |= {"objective": model.objective, "reads": model.reads, "logit_shift": model.logit_shift}
    told |= {"mask_token_id": model.mask_token_id, "begin_token_id": model.begin_token_id}
    return told | {"weights_digest": weights_digest(model.module), _SETTINGS: settings_digest(model.module)}


def _told(progress: Progress, done: int, size: int, count: int) -> Callable[[int, int], None]:
    """What a part's probe tells, in pairs of all parts."""
    return lambda queries, of: progress(done + size * queries // max(of, 1), count)


@dataclass
class _Parts:
    """The files of the parts, and the numbers of the groups so far, by their offsets."""

    folder: Path
    names: list[str]
    groups: dict[tuple[int, int], int] = field(default_factory=dict)

    def require(self, asked: dict[str, Any]) -> None:
        """Say what is asked, in a folder that holds nothing else. Raises: RevprobeError, when it does."""
        said = self.folder / _ASKED
        if not said.is_file():
            if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
                raise RevprobeError(f"{str(self.folder)!r} holds no parts of a probe; choose a new or an empty folder")
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(said, json.dumps(asked, indent=1) + "\n")
            return
        before = json.loads(said.read_text(encoding="utf-8"))
        if _SETTINGS not in before:
            raise RevprobeError(
                f"{str(self.folder)!r} holds parts of an older version, which did not state the model's settings "
                "(config, rotary angles, scalings of adapters): they may be another model's; choose another folder"
            )
        if other := [f"{key} {before.get(key)!r}, not {one!r}" for key, one in asked.items() if before.get(key) != one]:
            raise RevprobeError(
                f"{str(self.folder)!r} holds parts of another question ({other[0]}); choose another folder"
            )

    def require_no_more(self, count: int) -> None:
        """Raises: RevprobeError, when there are rows of parts beyond so many: the pairs were more when it was begun."""
        ours = {self._path(name, number) for name in self.names for number in range(count)}
        there = {path for name in self.names for path in (self.folder / name).glob("part-*")}
        if beyond := there - ours:
            raise RevprobeError(
                f"{min(beyond)} is not of these pairs, which make {count} parts; choose another folder, or delete it"
            )

    def _path(self, name: str, number: int) -> Path:
        return self.folder / name / f"part-{number:05d}.parquet"

    def read(self, number: int, pairs: ReversalPairs) -> Readings | None:
        """The readings of a part that is there. Raises: RevprobeError, when they are of other pairs."""
        paths = [self._path(name, number) for name in self.names]
        if not all(path.is_file() for path in paths):
            return None
        readings = Readings(_loaded(path) for path in paths)
        for path, reading in zip(paths, readings, strict=True):
            if not pairs.has_digest(reading.meta["pairs"]):
                raise RevprobeError(f"{path} was taken on other pairs; choose another folder")
            self._number(reading.frame)
        return readings

    def write(self, number: int, readings: Readings, first: int) -> Readings:
        """Keep a part, with its pairs numbered from `first` on, and its groups by all parts so far."""
        written = []
        for reading in readings:
            columns = {"pair": reading.frame["pair"] + first} | self._number(reading.frame) | _lacking(reading)
            path = self._path(reading.name, number)
            path.parent.mkdir(exist_ok=True)
            written.append(reading.with_columns(**columns))
            written[-1].save(path)
        return Readings(written)

    def _number(self, frame: pd.DataFrame) -> dict[str, np.ndarray]:
        if "group" not in frame:
            return {}
        offsets = frame[["offset_forward", "offset_reverse"]].to_numpy()
        own, inverse = np.unique(offsets, axis=0, return_inverse=True)
        numbers = [self.groups.setdefault((int(a), int(b)), len(self.groups)) for a, b in own]
        return {"group": np.array(numbers)[inverse.reshape(-1)]}


def _lacking(reading: Reading) -> dict[str, Any]:
    """Columns that some parts have and this one needs not, with what their absence says.

    Pandas reads a folder by the columns of its first file, and leaves out what only others have without a word.
    """
    frame, columns = reading.frame, dict[str, Any](reason="")
    if reading.meta.get("control", True) and reading.name != "attention_correlation":  # whose control are shuffles
        columns |= {"reason_control": "", PARTNER: pd.Series(pd.NA, index=frame.index, dtype="str")}
    if reading.name == "reverse_probability":
        columns["targets"] = 1
    columns |= dict.fromkeys(SHOWN_COLUMNS, frame["fact"])
    return {name: values for name, values in columns.items() if name not in frame}


def _loaded(path: Path) -> Reading:
    """Raises: RevprobeError, when a part cannot be read; it lies in our folder, so it may be deleted."""
    try:
        return Reading.load(path)
    except RevprobeError as error:
        reason = first_line(error.__cause__) if error.__cause__ else "no reading of revprobe"
        raise RevprobeError(f"{path} is damaged ({reason}); delete it and run the same command again") from error


@dataclass
class _Kept:
    """What the numbers of all parts rest on."""

    scores: list[ScoreTables] = field(default_factory=list)
    facts: list[np.ndarray] = field(default_factory=list)
    shown: tuple[list[bytes], list[bytes]] = field(default_factory=lambda: ([], []))
    queries: int = 0
    rows: dict[str, list[pd.DataFrame]] = field(default_factory=dict)
    meta: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, readings: Readings, names: Sequence[str]) -> None:
        for name, reading in zip(names, readings, strict=True):
            self.meta.setdefault(name, dict(reading.meta))
            if name == "attention_correlation":
                self.scores.append(ScoreTables.of(reading.frame))
            else:
                own = _summed(reading.frame) if name == "gradient_cosine" else _priced(reading.frame)
                self.rows.setdefault(name, []).append(own)

    def see(self, model: ProbedModel, part: ReversalPairs) -> None:
        """Hold what the model is shown of a part: facts of two parts may share a prompt."""
        asked = asked_pairs(model, part, "")
        self.facts.append(asked.facts.astype(str))
        shown = shown_queries(model, asked, first=self.queries)
        self.queries += len(asked.queries)
        for kept, found in zip(self.shown, shown, strict=True):
            kept += [sha256(repr(one).encode()).digest() for one in found]

    def drawn(self) -> dict[str, Facts]:
        """The facts of all parts, and what is drawn of them in numbers of both directions, and of each."""
        labels = np.concatenate(self.facts)
        sides = [self.shown, *([side] for side in self.shown)]
        either, *apart = (kin(labels, *some) for some in sides)
        found = {SHOWN: Facts.of(labels, either, (apart[0], apart[1]))}
        return found | {name: Facts.of(labels, one) for name, one in zip(SHOWN_COLUMNS[1:], apart, strict=True)}

    def measures(self, names: Sequence[str]) -> pd.DataFrame:
        return pd.concat([self._of(name) for name in names], ignore_index=True)

    def _of(self, name: str) -> pd.DataFrame:
        meta, facts = self.meta[name], self.drawn()
        if name != "attention_correlation":
            rows = pd.concat(self.rows.pop(name), ignore_index=True)
            why = [column for column in ("reason", "reason_control") if column in rows]
            rows[why] = rows[why].fillna("")  # parts of older versions lack such columns where they have no reason
            rows = rows.assign(**{name: one.unit[rows["pair"].to_numpy()] for name, one in facts.items()})
            reading = Reading(name, rows, meta)
        else:
            tables, self.scores = ScoreTables.joined(self.scores, facts[SHOWN]), []
            reading = Reading(name, pd.DataFrame(), meta)
            reading.__dict__["measured"] = score_correlation(tables, reading.seed, meta.get("control", True))
        return reading.measures().assign(probe=name, weights=meta.get("weights"), kind=meta.get("kind"))


def _summed(frame: pd.DataFrame) -> pd.DataFrame:
    """One row of a pair, over all parameters, of which its cosine is that of the rows."""
    names = [str(column) for column in frame.columns]
    squared = [column for column in names if column.startswith(("norm_", "floor_"))]
    inner = [column for column in names if column.startswith("inner")]
    told = [column for column in ("reason", "reason_control", PARTNER) if column in frame]
    values = frame[["pair", "fact", *told, *inner]].assign(**{c: frame[c].astype(float) ** 2 for c in squared})
    by_pair = values.groupby("pair", sort=True)
    sums = by_pair[[*inner, *squared]].sum(min_count=1)
    sums[squared] = np.sqrt(sums[squared])
    return by_pair[["fact", *told]].first().join(sums).reset_index()


def _priced(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[[column for column in _PROBABILITY if column in frame]]
