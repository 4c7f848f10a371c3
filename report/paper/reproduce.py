"""The paper's one-layer tables beside ours: every cell with its spread over seeds, and its claims with a verdict.

Everything is worked out from one tidy frame, the measures of the finished runs of a sweep. A cell without a finished
run is "not run", one whose runs gave no number "undefined", one outside its tolerance "outside". Nothing here chooses
a configuration or leaves a run out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ...errors import RevprobeError, did_you_mean
from ...finetune.config.loading import load_config
from ...finetune.config.one_layer import Cell, RunConfig, SweepConfig
from ...finetune.runs.open import is_finished, open_run
from ...probes.readings.reading import MEASURE_COLUMNS
from ...probes.statistics.estimators import STATISTICS_VERSION
from ...probes.statistics.intervals import FRACTION, Estimate, at_least_over_facts, mean_over_facts, proportion
from .comparisons import all_pass, passes
from .printed_values import ARM_REVERSE_TOLERANCE, one_layer_cells

AXES = ["objective", "position_encoding", "length", "seed"]
COLUMNS = ["run", *AXES, "step", "weights", "kind", *MEASURE_COLUMNS, "statistics_version"]
MODEL = ["objective", "position_encoding", "length"]
QUANTITIES = ("accuracy", "probability")
SIGNATURES = ("attention_correlation", "gradient_cosine")
DEVICES = ("cpu", "cuda", "auto")
WITHIN, OUTSIDE, NOT_RUN, UNDEFINED = "within", "outside", "not run", "undefined"
HOLDS, SO_FAR, FAILS = "holds", "holds so far", "does not hold"


@dataclass(frozen=True)
class Reproduction:
    """What `compare` returns; each a tidy frame, fractions throughout.

    Attributes:
        cells: one row per printed cell x quantity x weights.
        seeds: the numbers behind them, one row per run x measure x weights, at each run's last step.
        signatures: attention correlation and gradient cosine of each model and length against their controls.
        claims: the paper's claims about the one-layer models, each with its verdict.
        curves: every measure at every checkpoint, over seeds.
    """

    cells: pd.DataFrame
    seeds: pd.DataFrame
    signatures: pd.DataFrame
    claims: pd.DataFrame
    curves: pd.DataFrame

    @property
    def frames(self) -> dict[str, pd.DataFrame]:
        """The frames by name, as they are written to CSV."""
        return {name: getattr(self, name) for name in ("cells", "seeds", "signatures", "claims", "curves")}


def one_layer_sweep(*, seeds: int = 3, lengths: Sequence[int] | None = None, device: str = "cpu") -> SweepConfig:
    """The sweep of Tables 1 and 2 with seeds 0 to `seeds` - 1, at some of its lengths (all of them when None).

    Raises: RevprobeError, for a length the tables do not have, fewer than one seed, or an unknown device.
    """
    full = load_config("one-layer", SweepConfig)
    known = sorted({run.relation.length for run in full.runs()})
    if wrong := [length for length in lengths or [] if length not in known]:
        raise RevprobeError(f"length {wrong[0]} is not in Tables 1 and 2; expected some of {known}")
    if seeds < 1:
        raise RevprobeError(f"seeds={seeds!r}: expected at least 1")
    if device not in DEVICES:
        raise RevprobeError(f"unknown device {device!r}{did_you_mean(device, DEVICES)}")
    last = max(run.training.seed for run in full.runs())
    cells = []
    for cell in full.cells:
        kept = [length for length in cell.length or [full.base.relation.length] if lengths is None or length in lengths]
        own = cell.seed or [full.base.training.seed]
        # Further seeds go where the last one is, so that the order of the runs stays what it is.
        wanted = [seed for seed in own if seed < seeds] + (list(range(last + 1, seeds)) if last in own else [])
        if kept and wanted:
            cells.append(Cell(**cell.model_dump() | {"length": kept, "seed": wanted}))
    base = full.base.model_copy(update={"training": full.base.training.model_copy(update={"device": device})})
    return SweepConfig(name=full.name, base=base, cells=cells)


def collect_measures(folder: str | Path, runs: Iterable[RunConfig]) -> tuple[pd.DataFrame, dict[str, str]]:
    """All numbers of the finished runs in `folder`, at every checkpoint, and why each of the others is left out.

    A run belongs to its config wherever it was trained: the device may differ.

    Returns: a frame with the columns of COLUMNS, and the reasons by run name.
    """
    parts, left_out = [], {}
    for config in runs:
        path = Path(folder) / config.name
        try:
            if is_finished(path, on_device_of(path, config)):
                measures = open_run(path).readings().measures()
                about: dict[str, Any] = {"run": config.name, "statistics_version": STATISTICS_VERSION} | config.axes
                parts.append(measures.assign(**about)[COLUMNS])
                continue
            left_out[config.name] = open_run(path).problem or "a run of another config lies in its folder"
        except RevprobeError as error:
            left_out[config.name] = str(error) if path.is_dir() else NOT_RUN
    frame = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=COLUMNS)
    return frame.astype({"length": "Int64", "seed": "Int64", "step": "Int64", "n": "Int64", "facts": "Int64"}), left_out


def on_device_of(path: Path, config: RunConfig) -> RunConfig:
    """`config` with the device of the run at `path`. Raises: RevprobeError, when there is no run."""
    training = config.training.model_copy(update={"device": open_run(path).config.training.device})
    return config.model_copy(update={"training": training})


def compare(measures: pd.DataFrame, *, seeds: int = 3) -> Reproduction:
    """Tables 1 and 2, the signatures of Figure 3 and the claims, from the measures of finished runs.

    Args:
        measures: as `collect_measures` returns them.
        seeds: how many were asked for; fewer finished ones are shown as such.
    """
    last = measures[measures["step"] == measures.groupby("run")["step"].transform("max")]
    cells = [
        cell | {"quantity": quantity, "weights": weights} | _cell(last, cell, quantity, weights)
        for cell in records(one_layer_cells())
        for quantity in QUANTITIES
        for weights in (("raw", "ema") if cell["objective"] == "masked" else ("raw",))
    ]
    keys = [*MODEL, "kind", "weights", "measure", "step"]
    untrained = measures[measures["step"] == 0]
    return Reproduction(
        cells=pd.DataFrame(cells),
        seeds=last.sort_values([*MODEL, "seed", "weights", "measure"], ignore_index=True),
        signatures=_signatures(last, untrained),
        claims=_Claims(last, untrained, seeds).table(),
        curves=_curves(measures, keys).sort_values(keys, ignore_index=True),
    )


def model_name(model: Mapping[str, Any]) -> str:
    """How the tables call a model: "RoPE", "ALiBi", "absolute" or "ARM"."""
    names = {"rope": "RoPE", "alibi": "ALiBi"}
    encoding = model["position_encoding"]
    return "ARM" if model["objective"] == "causal" else names.get(encoding, encoding)


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a frame as dicts."""
    return [{str(column): value for column, value in row.items()} for row in frame.to_dict("records")]


# ---- Tables 1 and 2 ----


def _cell(last: pd.DataFrame, cell: dict[str, Any], quantity: str, weights: str) -> dict[str, Any]:
    """Ours: mean over seeds, its spread, and whether the mean is within the cell's tolerance."""
    own = _at(last, cell, weights, f"{cell['direction']}_{quantity}")
    values = own["value"].to_numpy(float)
    mean = float(values.mean()) if len(values) else math.nan
    difference = mean - cell["paper"]
    interval = over_seeds(own, binary=quantity == "accuracy")
    within = passes(abs(difference), "<=", cell["tolerance"])
    return {
        "ours": mean,
        "seeds": len(values),
        # Questions per seed.
        "n": int(own["n"].min()) if len(values) else 0,
        "facts": int(own["facts"].min()) if len(values) else 0,
        # Between seeds; one seed has none.
        "spread": float(values.std(ddof=1)) if len(values) > 1 else math.nan,
        "low": interval.low,
        "high": interval.high,
        "lowest": float(values.min()) if len(values) else math.nan,
        "highest": float(values.max()) if len(values) else math.nan,
        "difference": difference,
        "status": NOT_RUN if not len(values) else UNDEFINED if math.isnan(mean) else WITHIN if within else OUTSIDE,
    }


def _curves(measures: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Mean, spread, lowest and highest over the seeds of each model and checkpoint, and how many seeds these are."""
    grouped = measures.groupby(keys, sort=False)["value"]
    curves = grouped.agg(
        value="mean", spread="std", lowest="min", highest="max", seeds="size", defined="count"
    ).reset_index()
    # As in a cell, undefined in one seed is undefined: a mean over the others would jump where none of them does.
    told = ["value", "spread", "lowest", "highest"]
    curves.loc[curves["defined"] < curves["seeds"], told] = math.nan
    return curves.drop(columns="defined")


def over_seeds(rows: pd.DataFrame, *, binary: bool) -> Estimate:
    """The mean of a fraction over seeds, n questions each, with its 95 % interval; one seed keeps its own over facts.

    The interval is never narrower than theirs over facts (`at_least_over_facts`).
    `binary`: shares of questions, whose interval is Clopper-Pearson's; else mean probabilities.
    """
    values = rows["value"].to_numpy(float)
    if not len(values) or np.isnan(values).any():
        return Estimate.undefined()
    if len(values) == 1:
        one = rows.iloc[0]
        return Estimate(values[0], float(one["low"]), float(one["high"]), int(one["n"]), int(one["facts"]))
    found = (
        proportion(values, np.full(len(values), rows["n"].to_numpy(float).mean()))
        if binary
        else mean_over_facts(values, np.arange(len(values)), bounds=FRACTION)
    )
    return at_least_over_facts(found, (values, rows["low"].to_numpy(float), rows["high"].to_numpy(float)))


def _at(frame: pd.DataFrame, model: dict[str, Any], weights: str, measure: str) -> pd.DataFrame:
    """The rows of one model, length, weights and measure, by seed."""
    chosen = (frame["weights"] == weights) & (frame["measure"] == measure)
    for axis in MODEL:
        chosen &= frame[axis] == model[axis]
    return frame[chosen].sort_values("seed")


# ---- Figure 3 ----


def _signatures(last: pd.DataFrame, untrained: pd.DataFrame) -> pd.DataFrame:
    """One row per model, length, weights and signature: means over seeds, and how many stand above their control, of
    those that have an interval (`decided`).

    `excess_untrained` is the excess of the same models at step 0: what no training made.
    """
    own = last[last["measure"].isin(SIGNATURES)]
    rows = []
    for key, part in own.groupby([*MODEL, "kind", "weights", "measure"], sort=False):
        row = dict(zip([*MODEL, "kind", "weights", "measure"], key, strict=True))
        row |= {name: part[name].mean(skipna=False) for name in ("value", "control", "excess")}
        row |= {"spread": part["value"].std(ddof=1), "excess_low": part["excess_low"].min(skipna=False)}
        before = _at(untrained, row, str(row["weights"]), str(row["measure"]))
        row["excess_untrained"] = before[before["seed"].isin(part["seed"])]["excess"].mean(skipna=False)
        above = [passes(low, ">", 0.0) for low in part["excess_low"]]
        row |= {"seeds": len(part), "above_control": above.count(True), "decided": len(above) - above.count(None)}
        rows.append(row)
    columns = [*MODEL, "kind", "weights", "measure", "value", "spread", "control", "excess", "excess_low"]
    columns.append("excess_untrained")
    return pd.DataFrame(rows, columns=[*columns, "seeds", "above_control", "decided"])


# ---- claims ----


@dataclass(frozen=True)
class _Claims:
    """The paper's claims, each in every seed there is.

    Attributes:
        last: the measures at each run's last step.
        untrained: those of the same models at step 0.
        seeds: how many were asked for.
    """

    last: pd.DataFrame
    untrained: pd.DataFrame
    seeds: int

    def table(self) -> pd.DataFrame:
        """Each claim for raw and EMA weights: what was asked, in how many seeds it holds, and the verdict over them."""
        models = records(one_layer_cells()[MODEL].drop_duplicates())
        masked = [model for model in models if model["objective"] == "masked"]
        rope = [model for model in masked if model["position_encoding"] == "rope"]
        # Symmetric ALiBi makes the two queries mirror images: its cosine of 1 is an identity and no claim under test.
        no_identity = [model for model in masked if model["position_encoding"] != "alibi"]
        rows = []
        for weights in ("raw", "ema"):
            rows += [self.above_control(model, weights, SIGNATURES[0]) for model in rope]
            rows += [self.above_control(model, weights, SIGNATURES[1]) for model in no_identity]
            rows += [self.rises(model, weights) for model in rope]
            rows += [self.ordering(length, weights, quantity) for length in (10, 20) for quantity in QUANTITIES]
        for model in models:
            if model["objective"] == "causal":
                rows += [self.arm_stays_low(model, quantity) for quantity in QUANTITIES]
        return pd.DataFrame(
            rows, columns=["claim", "length", "weights", "holds_in", "seeds", "low", "high", "verdict", "detail"]
        )

    def verdict(
        self, claim: str, length: object, weights: str, held: Sequence[bool | None], detail: str
    ) -> dict[str, Any]:
        """A claim holds when it does in every seed asked for, and does not when one seed is against it.

        Args:
            held: of each seed; None where its numbers are undefined, which is neither for nor against: without a seed
                against it, the claim is undefined, and `seeds` counts the others.
        """
        decided = [one for one in held if one is not None]
        verdict = UNDEFINED if (whole := all_pass(held)) is None else FAILS if not whole else SO_FAR
        if not held:
            verdict = NOT_RUN
        elif whole and len(held) >= self.seeds:
            verdict = HOLDS
        row: dict[str, Any] = {"claim": claim, "length": length, "weights": weights, "holds_in": sum(decided)}
        share = proportion(np.array(decided, dtype=float))
        row |= {"low": share.low, "high": share.high}
        if len(decided) < len(held):
            detail = f"{detail}; undefined in {len(held) - len(decided)} of {len(held)} seeds"
        if 0 < len(held) < self.seeds:
            detail = f"{detail}; {len(held)} of {self.seeds} seeds"
        return row | {"seeds": len(decided), "verdict": verdict, "detail": detail if held else ""}

    def above_control(self, model: dict[str, Any], weights: str, measure: str) -> dict[str, Any]:
        """Figure 3 (left, middle), with the excess of the untrained models: what that explains no training made."""
        own, before = (_at(frame, model, weights, measure) for frame in (self.last, self.untrained))
        excesses = [f"{row.excess:.3f} [{row.excess_low:.3f}, {row.excess_high:.3f}]" for row in own.itertuples()]
        claim = f"{model_name(model)}: {measure.replace('_', ' ')} above its control, interval excludes zero"
        held = [passes(low, ">", 0.0) for low in own["excess_low"]]
        start = ", ".join(f"{row.excess:.3f}" for row in before.itertuples() if row.seed in set(own["seed"]))
        detail = f"excess by seed: {', '.join(excesses)}; untrained: {start or 'not read'}"
        return self.verdict(claim, model["length"], weights, held, detail)

    def rises(self, model: dict[str, Any], weights: str) -> dict[str, Any]:
        """Figure 3 (right): the reverse probability after training against that of the same untrained model.

        It must stand above its control too: who has learned only that answers are lowercase letters rises as well.
        """
        own = records(_at(self.last, model, weights, "reverse_probability"))
        before = {row["seed"]: row for row in records(_at(self.untrained, model, weights, "reverse_probability"))}
        blind = [row["seed"] for row in own if row["seed"] not in before]
        pairs = [(row, before[row["seed"]]) for row in own if row["seed"] in before]
        held = [
            all_pass([passes(row["low"] - start["high"], ">", 0.0), passes(row["excess_low"], ">", 0.0)])
            for row, start in pairs
        ]
        moved = [f"{start['value']:.3f} -> {row['value']:.3f} (excess {row['excess']:.3f})" for row, start in pairs]
        claim = f"{model_name(model)}: reverse probability above that of step 0 and above its control, intervals apart"
        detail = f"by seed: {', '.join(moved)}" + (f"; without a reading at step 0: seeds {blind}" if blind else "")
        return self.verdict(claim, model["length"], weights, held, detail)

    def ordering(self, length: int, weights: str, quantity: str) -> dict[str, Any]:
        """Table 2: absolute < RoPE < ALiBi, seed by seed; a seed counts when all three were run."""
        models = [
            {"objective": "masked", "position_encoding": encoding, "length": length}
            for encoding in ("absolute", "rope", "alibi")
        ]
        found = [_at(self.last, model, weights, f"reverse_{quantity}").set_index("seed")["value"] for model in models]
        table = pd.concat(found, axis=1, join="inner")
        held = [all_pass([passes(step, ">", 0.0) for step in np.diff(values)]) for values in table.to_numpy(float)]
        shown = [" / ".join(f"{value:.3f}" for value in values) for values in table.to_numpy(float)]
        means = " / ".join(f"{value:.3f}" for value in table.mean(skipna=False).to_numpy(float))
        detail = f"absolute / rope / alibi: means {means}; by seed: {', '.join(shown)}"
        return self.verdict(f"reverse {quantity}: absolute < RoPE < ALiBi", length, weights, held, detail)

    def arm_stays_low(self, model: dict[str, Any], quantity: str) -> dict[str, Any]:
        """The autoregressive model's reverse cells, all printed as 0.00."""
        values = _at(self.last, model, "raw", f"reverse_{quantity}")["value"].to_numpy(float)
        held = [passes(value, "<=", ARM_REVERSE_TOLERANCE) for value in values]
        detail = f"by seed: {', '.join(f'{value:.4f}' for value in values)}"
        claim = f"ARM: reverse {quantity} at most {ARM_REVERSE_TOLERANCE:.0%}"
        return self.verdict(claim, model["length"], "raw", held, detail)
