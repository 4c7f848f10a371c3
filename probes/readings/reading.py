"""What a probe returns: one number with its interval, its n, its control and the tidy frame it came from."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from ...arguments import checked, checked_fields
from ...errors import RevprobeError, did_you_mean
from ...progress import Progress, counted_together, shows_progress
from ..figures.theme import interval_text, rounded
from ..statistics.by_part import remainder_text
from ..statistics.by_role import in_network_order
from ..statistics.coverage import counted
from ..statistics.estimators import STATISTICS_VERSION, Control, Measured, direction_mean, mean_reciprocal_rank
from ..statistics.intervals import Estimate
from ..statistics.measures import measure, require_rows_once, unit_of
from .parquet import read_reading, write_reading

if TYPE_CHECKING:
    import plotly.graph_objects as go


MEASURE_COLUMNS = ["measure", "value", "n", "facts", "low", "high", "control", "control_low", "control_high"]
MEASURE_COLUMNS += ["excess", "excess_low", "excess_high", "undefined", "reason", "caution"]
CONTROL_COLUMNS = ["control", "model", "value", "low", "high", "n", "facts"]
CONTROL_COLUMNS += ["difference", "difference_low", "difference_high", "reason"]
_COMPACT = {name: (name, f"{prefix}low", f"{prefix}high") for name, prefix in (("value", ""), ("control", "control_"))}
NOT_SHUFFLED, NO_SHUFFLE = "not taken: control=False", "no group has two facts to shuffle"
NOT_DEFINED = "the reading has no number, so neither has its shuffle"


@checked_fields
@dataclass(frozen=True, eq=False, repr=False)
class Reading:
    """One probe's result on one model.

    Attributes:
        name: "attention_correlation", "gradient_cosine", "reverse_probability", "decoded_match" for decoded answers,
            "candidate_rank" for ranked ones, or that of another instrument.
        frame: the rows behind the number; its columns are described at the probe.
        meta: model, objective, kind, step, weights ("raw", "ema"), pairs (digest), statistic, versions, dtype, threads.
        cross: the fact x fact matrix of a gradient probe with `cross=True`, else None.
        statistics_version: that of its file; its numbers are always of this version's statistics, see `recomputed`.
        value, interval, n, facts, prompts, control, excess, undefined, caution: the properties, all of `frame`.
    Raises: RevprobeError, for a frame in which a pair, or a layer, head, ... of it, stands twice.
    """

    name: str
    frame: pd.DataFrame
    meta: dict[str, Any]
    cross: pd.DataFrame | None = None
    statistics_version: int = STATISTICS_VERSION

    def __post_init__(self) -> None:
        require_rows_once(self.name, self.frame)

    @cached_property
    def measured(self) -> Measured:
        """Estimate, control, excess and what was left out, from the frame."""
        return self._measure(self.frame)

    def _measure(self, part: pd.DataFrame) -> Measured:
        if part.empty:
            raise RevprobeError(f"this reading of {self.name} has no rows, so it has no number; expected some")
        try:
            return measure(self.name, part, seed=self.seed, control=self.meta.get("control", True))
        except KeyError as error:
            raise RevprobeError(
                f"the frame has no column {error}, so it is not one of {self.name}; expected what that probe returns"
            ) from error

    def _forward_mean(self, part: pd.DataFrame) -> Measured:
        return direction_mean(part, "forward", "probability")

    @property
    def seed(self) -> int:
        """The seed of the shuffles."""
        return int(self.meta.get("seed", 0))

    @property
    def value(self) -> float:
        """The reading's number; NaN when undefined (see `undefined` for why)."""
        return self.measured.estimate.value

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval, over facts; over prompts where these are fewer."""
        return self.measured.estimate.low, self.measured.estimate.high

    @property
    def unit(self) -> str:
        """Of the value: "nats", "logits" or "share"; "" for a correlation, a cosine or a probability."""
        return unit_of(self.name, self.measured.statistic)

    @property
    def n(self) -> int:
        """Pairs behind the value (questions of answers, reverse queries of objective terms)."""
        return self.measured.estimate.n

    @property
    def facts(self) -> int:
        """Facts behind the value."""
        return self.measured.estimate.facts

    @property
    def prompts(self) -> int:
        """In how many sets facts share prompts (the frame's `shown`), if fewer: its interval's draws; else 0."""
        return self.measured.estimate.prompts

    @property
    def control(self) -> Control | None:
        """The same measure with facts shuffled; None when it was not asked for or no group has two facts."""
        return self.measured.control

    @property
    def excess(self) -> Estimate | None:
        """Value minus control, with an interval; the finding is whether it excludes zero."""
        return self.measured.excess

    @property
    def controls(self) -> pd.DataFrame:
        """What the number is held against, a row for each control that was asked for by `controls=`.

        Columns: control ("shuffled": facts within groups, the reading's own `control`; "untrained"; "neighbour";
        "sink"; "parent": see `probes.controls`), model, value, low, high (95 %, over facts; of "shuffled" over shuffles
        for a correlation), n (pairs), facts; difference (this reading's number less the control's over the facts that
        both have, difference_low, difference_high: paired, 95 %); reason (why there is no number or difference, or what
        is undefined, left out or to be read with caution). Without any but the first it holds "shuffled" alone.
        """
        own = {"control": "shuffled", "model": self.meta.get("model"), "reason": ""}
        if (shuffled := self.control) is None:
            nothing = NOT_DEFINED if self.facts > 1 and self.value != self.value else NO_SHUFFLE
            own["reason"] = nothing if self.meta.get("control", True) else NOT_SHUFFLED
        else:
            excess, (low, high) = self.excess or Estimate.undefined(), shuffled.interval
            own |= {"value": shuffled.value, "low": low, "high": high, "n": shuffled.n, "facts": shuffled.facts}
            own |= {"difference": excess.value, "difference_low": excess.low, "difference_high": excess.high}
            less = f"difference: over {excess.n:,} of {self.n:,} pairs ({excess.facts:,} facts)"
            own["reason"] = "; ".join(filter(None, [less * (0 < excess.n < self.n), self.caution]))
        table = pd.DataFrame([own, *self.meta.get("controls", [])], columns=CONTROL_COLUMNS)
        whole = dict.fromkeys(("n", "facts"), "Int64")
        return table.astype(whole | {name: "float64" for name in CONTROL_COLUMNS[2:5] + CONTROL_COLUMNS[7:10]})

    @property
    def undefined(self) -> dict[str, int]:
        """What is NaN, counted by reason."""
        return self.measured.undefined

    @property
    def caution(self) -> str:
        """What the numbers must be read with; else empty.

        Facts so few that intervals were seen to cover too little; pairs whose mean, or whose control and excess, leaves
        out some of their layers, heads, places or positions.
        """
        return self.measured.caution

    @property
    def draw_error(self) -> float | None:
        """The standard error that the value has from the random tokens drawn, in `meta["draws"]` draws.

        NaN where there was one draw, or for some of the rows; None for a model that draws nothing. Facts' intervals do
        not hold it, since the same tokens stand under every query.
        """
        if "draws" not in self.meta:
            return None
        return float(self.meta.get("draw_errors", {}).get(self.name, "nan"))

    @property
    def recomputed(self) -> bool:
        """Whether its file held numbers of other statistics, so that they were worked out again from the frame."""
        return self.statistics_version != STATISTICS_VERSION

    @checked
    @shows_progress("parts")
    def summary(
        self,
        by: str | list[str] | None = None,
        *,
        compact: bool = False,
        progress: Progress | bool | None = None,
    ) -> pd.DataFrame:
        """The number for each value of the column(s) `by`, or for all rows.

        Columns: by..., value, n (pairs), facts, low, high, control, control_low, control_high, excess, excess_low,
        excess_high, undefined (how many), reason (of each, counted) and caution. A probability is that of the reverse
        queries, unless `by` tells the directions apart.
        Args:
            compact: for reading, within 80 columns: by..., value and control as text with their intervals, n/facts
                (pairs and facts), and undef. (how many are undefined; why stands in the whole summary).
            progress: called with (values of `by` done, values in all); None shows a bar, False nothing.
        Raises: RevprobeError, for a column the frame lacks.
        """
        keys = [by] if isinstance(by, str) else list(by or [])
        for key in keys:
            if key not in self.frame.columns:
                raise RevprobeError(
                    f"no column {key!r} in the {self.name} frame{did_you_mean(key, self.frame.columns)}"
                )
        if not keys:
            whole = [summary_row(self.measured)]
            return compact_table(whole, []) if compact else pd.DataFrame(whole)
        rows: list[dict[str, Any]] = []
        parts = self.frame.groupby(keys, sort=True, dropna=False)
        for value, part in counted_together(parts.ngroups, progress)(parts):
            # A probability is that of the reverse queries, except where the directions are told apart.
            by_direction = self.name == "reverse_probability" and "direction" in keys
            forward = by_direction and set(part["direction"]) == {"forward"}
            measured = self._forward_mean(part) if forward else self._measure(part)
            rows.append(dict(zip(keys, value, strict=True)) | summary_row(measured))
        if "role" in keys:
            order = pd.DataFrame(rows).sort_values(keys, key=in_network_order, kind="stable").index
            rows = [rows[place] for place in order]
        return compact_table(rows, keys) if compact else pd.DataFrame(rows)

    def measures(self) -> pd.DataFrame:
        """Everything this reading reports, tidy.

        Columns: measure, and those of `summary`.

        The probability reading gives four: forward and reverse, probability and accuracy (fraction of pairs whose
        target is the argmax at every target position); ranked candidates give the mean reciprocal rank beside theirs.
        """
        return self._measures.copy()

    @cached_property
    def _measures(self) -> pd.DataFrame:
        if self.name == "candidate_rank":
            both = {self.name: self.measured, "mean_reciprocal_rank": mean_reciprocal_rank(self.frame)}
            return pd.DataFrame([_measure_row(name, measured) for name, measured in both.items()])
        if self.name != "reverse_probability":
            return pd.DataFrame([_measure_row(self.name, self.measured)])
        asked = [
            (d, column, name)
            for column, name in (("probability", "probability"), ("argmax_match", "accuracy"))
            for d in ("forward", "reverse")
        ]
        return pd.DataFrame(
            [_measure_row(f"{d}_{name}", direction_mean(self.frame, d, column)) for d, column, name in asked]
        )

    def plot(self, **options: Any) -> go.Figure:
        """This reading as a plotly figure, for `theme="light"` or "dark"; a wrong option names those there are.

        Args:
            options: of attention, `kind="scatter"` (each pair's two scores, less their group's mean, which is what the
                statistic sees), "heatmap" (by distance), "heads" (by layer and head), "bounds" (over RoPE's bound, for
                a reading that `with_bounds` gave) or "controls" (all that the number is held against), `layer=`,
                `head=`, `pairs=` (those it was taken on, whose text then stands on the hover); of gradients,
                `by="role"` or another column, or `kind="layers"` or "controls"; of probabilities, `bins=`.
                Denoising traces: `kind="steps"`, "layers" or "heads" (at `step=`). Logit lens: `kind="layers"` or
                "heads" (of a `direction=`). Causal traces: `by="part"`, "head" or "step", `part="target"` and the like,
                `measure="effect"` or "share". Stored once: `number="correct"` or "place". Audits: `kind="heads"`, or
                "planes" (of a `layer=` and `head=`). Route edits: `kind="intervals"` or "heatmap", `direction=`. Stored
                evidence: `kind="parts"` or "matrix". Objective terms: `by=`, `measure=`. Rankings of heads: none.
        Raises: RevprobeError, when the reading or an option is not known.
        """
        from ..figures.plot import plot_reading

        return plot_reading(self, **options)

    def part(self, frame: pd.DataFrame) -> Reading:
        """The reading of some of its rows, every number worked out from them, without those of the whole alone."""
        meta = {key: one for key, one in self.meta.items() if key not in ("controls", "draw_errors", "remainder")}
        return Reading(self.name, frame, meta, statistics_version=self.statistics_version)

    def with_columns(self, **columns: Any) -> Reading:
        """This reading with further columns in its frame, on which none of its numbers depends."""
        further = Reading(self.name, self.frame.assign(**columns), self.meta, self.cross, self.statistics_version)
        further.__dict__["measured"] = self.measured
        return further

    @checked
    def save(self, path: str | Path) -> Path:
        """Write frame and meta as one parquet file, whole or not at all."""
        path = Path(path)
        header: dict[str, Any] = {"name": self.name, "meta": self.meta, "measured": asdict(self.measured)}
        header["statistics_version"] = STATISTICS_VERSION
        header["measures"] = self._measures.to_dict("records")
        split = None if self.cross is None else self.cross.to_json(orient="split", double_precision=15)
        header["cross"] = None if split is None else json.loads(split)
        write_reading(path, header, self.frame)
        return path

    @classmethod
    @checked
    def load(cls, path: str | Path) -> Reading:
        """Read what `save` wrote; numbers of other statistics are worked out again from the frame (`recomputed`).

        Raises: RevprobeError, when the file is missing, damaged or not a reading.
        """
        header, frame = read_reading(Path(path))
        cross = None if header["cross"] is None else pd.DataFrame(**header["cross"], dtype=float)
        # Version 0.1 wrote none, and its statistics are the first.
        reading = cls(header["name"], frame, header["meta"], cross, header.get("statistics_version", 1))
        if not reading.recomputed:
            # The numbers as they were worked out when saved: shuffling a run's readings again takes a minute.
            reading.__dict__["measured"] = Measured.from_dict(header["measured"])
            reading.__dict__["_measures"] = pd.DataFrame(header["measures"], columns=MEASURE_COLUMNS)
        return reading

    def _beside(self, number: Control | Estimate, low: float, high: float, unit: str = "") -> str:
        """A number with its interval, and its own n where that is not the reading's."""
        own = f" ({counted(number.n, number.facts, self.name, number.prompts)})" if number.n != self.n else ""
        return f"{number.value:.4g} [{low:.4g}, {high:.4g}]{unit}{own}"

    def __repr__(self) -> str:
        low, high = self.interval
        null = self.control
        control = f", control={self._beside(null, *null.interval)}" if null else ", control=None"
        if self.excess is not None:
            control += f", excess={self._beside(self.excess, self.excess.low, self.excess.high)}"
        left_out = f", undefined={self.undefined}" if self.undefined else ""
        left_out += f", caution={self.caution!r}" if self.caution else ""
        left_out += f", recomputed from statistics {self.statistics_version}" if self.recomputed else ""
        where = "".join(
            f", {key}={self.meta[key]}" for key in ("kind", "step", "weights") if self.meta.get(key) is not None
        )
        if (coverage := self.meta.get("coverage")) is not None:
            where += f", {coverage['share']:.1%} of the parameters"
        if self.draw_error is not None:
            where += f", draw_error={self.draw_error:.2g} over {self.meta['draws']} draws"
        where += "".join(f", {told}" for told in [remainder_text(self.meta)] if told)
        unit = f" {self.unit}" if self.unit else ""
        sample = counted(self.n, self.facts, self.name, self.prompts)
        numbers = f"{self.value:.4g} [{low:.4g}, {high:.4g}]{unit}, {sample}"
        return f"Reading({self.name}={numbers}{control}{left_out}{where})"

    def _repr_html_(self) -> str:
        shown = {name: html.escape(text) for name, text in self._told().items()}
        told = "".join(f"<tr><th>{name}</th><td>{text}</td></tr>" for name, text in shown.items())
        rows = self.frame.head(8).to_html(index=False, escape=True)
        return f"<table>{told}</table>{rows}<p>{len(self.frame):,} rows</p>"

    def _told(self) -> dict[str, str]:
        """What a person asks of a reading first, in words."""
        meta, null, over, unit = self.meta, self.control, self.excess, f" {self.unit}" if self.unit else ""
        step = None if meta.get("step") is None else f"step {meta['step']:,}"
        told: dict[str, Any] = {self.name: self._beside(self.measured.estimate, *self.interval, unit)}
        told["control"] = f"{self._beside(null, *null.interval, unit)}, {null.method}" if null else "none"
        told["excess"] = over and self._beside(over, over.low, over.high, unit)
        told["sample"] = counted(self.n, self.facts, self.name, self.prompts)
        told["model"] = ", ".join(
            str(one) for one in (meta.get("model"), step, meta.get("weights"), meta.get("kind")) if one
        )
        told["undefined"] = "; ".join(f"{count:,} {why}" for why, count in self.undefined.items())
        told["first order"] = remainder_text(meta)
        told["caution"] = self.caution
        return {name: text for name, text in told.items() if text}


def summary_row(measured: Measured) -> dict[str, Any]:
    control = measured.control or Control(float("nan"), (float("nan"), float("nan")), 0, "")
    estimate = measured.estimate
    excess = measured.excess or Estimate.undefined()
    row: dict[str, Any] = {"value": estimate.value, "n": estimate.n, "facts": estimate.facts}
    row |= {"low": estimate.low, "high": estimate.high}
    row |= {"control": control.value, "control_low": control.interval[0], "control_high": control.interval[1]}
    row |= {"excess": excess.value, "excess_low": excess.low, "excess_high": excess.high}
    reason = "; ".join(f"{count} {why}" for why, count in measured.undefined.items())
    return row | {"undefined": sum(measured.undefined.values()), "reason": reason, "caution": measured.caution}


def compact_table(rows: Iterable[Mapping[str, Any]], keys: Sequence[str]) -> pd.DataFrame:
    """Rows of a summary as people read them: numbers with their intervals as text, then the sample."""
    shown = []
    for row in rows:
        numbers = {name: _text(*(row[column] for column in columns)) for name, columns in _COMPACT.items()}
        sample = {"n/facts": f"{row['n']}/{row['facts']}", "undef.": row["undefined"]}
        shown.append({key: row[key] for key in keys} | numbers | sample)
    return pd.DataFrame(shown)


def _text(value: float, low: float, high: float) -> str:
    """Two digits, or more where a number would read as a bound of its kind that it is not: 0.997 is not 1."""
    numbers, places = [one for one in (value, low, high) if abs(one) != 1], range(2, 7)
    apart = next((n for n in places if all(abs(float(rounded(one, n))) != 1 for one in numbers)), None)
    return interval_text(value, low, high, digits=apart)


def _measure_row(name: str, measured: Measured) -> dict[str, Any]:
    row = summary_row(measured)
    return {"measure": name} | {key: row[key] for key in MEASURE_COLUMNS[1:]}
