"""What comparing models returns: each model's numbers, and their differences over the facts that two of them share."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ...arguments import checked, checked_fields
from ...atomic_files import folder_written_whole
from ...errors import RevprobeError, did_you_mean, shown
from ..figures.theme import difference_text, interval_text
from ..statistics.estimators import STATISTICS_VERSION, Measured
from ..statistics.intervals import Estimate
from ..statistics.paired import measured_difference
from .parquet import read_reading, write_reading
from .reading import MEASURE_COLUMNS, summary_row
from .readings import Readings, folder_of_readings
from .sides import Asked, Side, cautions, incomparable, left_out, nothing_shared, undefined_on_common

if TYPE_CHECKING:
    import plotly.graph_objects as go

ALL, COMMON, DIFFERENCE = "all", "common", "difference"
COLUMNS = ["measure", "part", "model", "against", "kind", *MEASURE_COLUMNS[1:]]
# The measures of each probe, as its readings name them.
MEASURES = {
    "attention_correlation": ("attention_correlation",),
    "gradient_cosine": ("gradient_cosine",),
    "reverse_probability": ("forward_probability", "reverse_probability", "forward_accuracy", "reverse_accuracy"),
}
_NUMBERS = "comparison.parquet"


@checked_fields
@dataclass(frozen=True, eq=False, repr=False)
class ModelComparison:
    """Two or more models measured alike, and by how much each differs from those before it.

    Facts are joined by their labels. A fact is common to two models where both have a value of it, so each measure and
    each two models have common facts of their own. Readings on pairs of different kinds (same_target, swapped), or of
    different modes, stand side by side: their difference is NaN and says so.

    Args:
        readings: the readings of each model by its name, one of each probe. Those of other days and machines will do
            (`Readings.load`).
        asked: what each model was asked, by its name, as far as readings do not say it; `compare_models` takes it from
            the pairs. A label that is of two facts is a caution.
        seed: of the draws of facts behind the intervals.
    Raises: RevprobeError, for fewer than two models, and for one without readings, or with two of a probe.
    """

    readings: Mapping[str, Readings]
    asked: Mapping[str, Asked] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        require_names(self.readings)
        for name, readings in self.readings.items():
            if not len(readings):
                raise RevprobeError(f"{name!r} has no readings to compare: expected some of {', '.join(MEASURES)}")
            for probe, count in Counter(reading.name for reading in readings).items():
                if probe not in MEASURES:
                    raise RevprobeError(
                        f"{name!r}: readings of {probe!r} are not compared{did_you_mean(probe, MEASURES)}"
                    )
                if count > 1:
                    raise RevprobeError(
                        f"{name!r} has {count} readings of {probe!r}: expected one; choose with "
                        "Readings.select(step=, weights=)"
                    )

    @cached_property
    def frame(self) -> pd.DataFrame:
        """All numbers, tidy.

        Columns: measure; part ("all": a model on all its facts; "common": on those it shares with the model `against`;
        "difference": model less against, over the same facts); model; against; kind of its pairs; then those of
        `Reading.measures`. Of a difference low and high are the paired 95 % interval, control and excess are themselves
        differences, n is that of the model with fewer pairs, and undefined and reason count facts.
        """
        rows: list[dict[str, Any]] = []
        for probe, measures in MEASURES.items():
            taken = {name: readings.select(name=probe) for name, readings in self.readings.items()}
            for measure in measures:
                sides = [
                    Side(name, found[0], measure, self.asked.get(name, Asked()))
                    for name, found in taken.items()
                    if len(found)
                ]
                rows += [side.row(ALL, "") for side in sides]
                for other, own in combinations(sides, 2):
                    rows += self._between(own, other)
        return pd.DataFrame(rows, columns=COLUMNS)

    def _between(self, own: Side, other: Side) -> Iterator[dict[str, Any]]:
        """Two models on the facts of which both have a value, and the difference there."""
        shared, none = np.intersect1d(own.facts, other.facts), nothing_shared(own, other)
        both = [one.row(COMMON, beside.name, shared, none) for one, beside in ((other, own), (own, other))]
        yield from both
        if why := incomparable(own, other):
            found, reasons = Measured(Estimate.undefined(facts=len(shared))), {why: max(len(shared), 1)}
        else:
            control = all(side.reading.meta.get("control", True) for side in (own, other))
            found = measured_difference(own.values, other.values, seed=self.seed, control=control)
            reasons = undefined_on_common(both, len(shared))
        said = [found.caution, *cautions(own, other)]
        found = replace(
            found, undefined=reasons | left_out(own, other) | found.undefined, caution="; ".join(filter(None, said))
        )
        kinds = " - ".join(dict.fromkeys(side.kind for side in (own, other)))
        yield own.placed(DIFFERENCE, other.name, summary_row(found)) | {"kind": kinds}

    def table(self) -> pd.DataFrame:
        """The numbers as text for people: for each measure and each two models both of them, then the difference.

        Columns: measure, model, kind, all facts (value, interval, control), n / facts, common facts (the same on the
        facts that the two share), n / common, over the control (value less control), note.
        """
        rows: list[dict[str, Any]] = self.frame.to_dict("records")  # type: ignore[assignment]  # its columns are texts
        found = {(row["measure"], row["part"], row["model"], row["against"]): row for row in rows}
        shown_rows = []
        for row in (row for row in rows if row["part"] == DIFFERENCE):
            measure, model, against = row["measure"], row["model"], row["against"]
            for name, beside in ((against, model), (model, against)):
                whole, common = found[measure, ALL, name, ""], found[measure, COMMON, name, beside]
                shown_rows.append(_line(name, common, whole))
            shown_rows.append(_line(f"{model} - {against}", row))
        return pd.DataFrame(shown_rows)

    def plot(self, *, theme: str = "light") -> go.Figure:
        """Each model's values with their intervals and controls, and beside them the paired differences.

        Args:
            theme: "light" or "dark".
        """
        from ..figures.model_comparison import comparison_figure

        return comparison_figure(self.frame, theme=theme)

    @checked
    def save(self, folder: str | Path) -> Path:
        """Write readings and numbers as a folder, which appears by rename, whole or not at all.

        An older comparison there is replaced. Raises: RevprobeError, when something else is there.
        """
        header = {"comparison": list(self.readings), "seed": self.seed}
        header |= {"asked": {name: asdict(told) for name, told in self.asked.items()}}
        with folder_written_whole(folder, of_a_comparison) as part:
            write_reading(part / _NUMBERS, header | {"statistics_version": STATISTICS_VERSION}, self.frame)
            for place, readings in enumerate(self.readings.values()):
                readings.save(part / str(place))
        return Path(folder)

    @classmethod
    @checked
    def load(cls, folder: str | Path) -> ModelComparison:
        """Read what `save` wrote; numbers of other statistics are worked out again from the readings.

        Raises: RevprobeError, when the folder is missing, holds no comparison, or a file in it is damaged.
        """
        folder = Path(folder)
        if not (folder / _NUMBERS).is_file():
            raise RevprobeError(f"no comparison at {str(folder)!r}; expected a folder written by ModelComparison.save")
        header, frame = read_reading(folder / _NUMBERS)
        if "comparison" not in header:
            raise RevprobeError(f"{folder / _NUMBERS} holds one reading, no comparison; use Reading.load")
        readings = {name: Readings.load(folder / str(place)) for place, name in enumerate(header["comparison"])}
        made = cls(readings, {name: Asked(**told) for name, told in header["asked"].items()}, header["seed"])
        if header["statistics_version"] == STATISTICS_VERSION:
            made.__dict__["frame"] = frame
        return made

    def __repr__(self) -> str:
        lines = []
        for line in self.table().to_dict("records"):
            whole, common = (
                "" if line[counts] == "-" else f"{line[title]} (n / facts {line[counts]})"
                for title, counts in (("all facts", "n / facts"), ("common facts", "n / common"))
            )
            # Said once where all facts are common.
            numbers = [whole, "" if whole == common else f"common facts {common}" if whole else common, line["note"]]
            told = "; ".join(part for part in numbers if part not in ("", "-"))
            lines.append(f"  {line['measure']}, {line['model']} ({line['kind']}): {told}")
        return f"ModelComparison({', '.join(self.readings)}):\n" + "\n".join(lines)

    def _repr_html_(self) -> str:
        title = f"ModelComparison({', '.join(self.readings)})"
        return f"<p><code>{html.escape(title)}</code></p>{self.table().to_html(index=False, escape=True)}"


def require_names(models: Mapping[str, object]) -> None:
    """Raises: RevprobeError, for fewer than two models, and for a name that is no text or empty."""
    if len(models) < 2:
        raise RevprobeError(
            f"models to compare: {len(models)}; expected two or more, such as {{'parent': a, 'child': b}}"
        )
    for name in models:
        if not isinstance(name, str) or not name.strip():
            raise RevprobeError(f"a model is called {shown(name)}: expected a name for each, such as 'parent'")


def of_a_comparison(entry: Path) -> bool:
    """Whether an entry of a folder is of a saved comparison: its numbers, a picture of them, a model's readings."""
    return (entry.stem == "comparison" and entry.is_file()) or (entry.name.isdecimal() and folder_of_readings(entry))


def _line(name: str, common: Mapping[str, Any], whole: Mapping[str, Any] | None = None) -> dict[str, str]:
    """One row of the table."""
    line = {"measure": common["measure"].replace("_", " "), "model": name, "kind": common["kind"].replace("_", " ")}
    text = difference_text if whole is None else interval_text
    for title, counts, row in (("all facts", "n / facts", whole), ("common facts", "n / common", common)):
        line[title] = "-" if row is None else text(*(row[key] for key in ("value", "low", "high", "control")))
        line[counts] = "-" if row is None else f"{row['n']:,} / {row['facts']:,}"
    excess = [common[key] for key in ("excess", "excess_low", "excess_high")]
    line["over the control"] = "-" if np.isnan(excess[0]) else difference_text(*excess)
    notes = ["" if whole is None else whole["reason"], common["reason"], common["caution"]]
    return line | {"note": "; ".join(dict.fromkeys(filter(None, notes))) or "-"}
