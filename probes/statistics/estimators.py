"""From a reading's tidy frame to its number: one estimator per probe, applied to the whole frame or to a part.

    attention_correlation   mean within-group correlation of forward and reverse scores
    candidate_rank          share of questions whose right answer is the likeliest candidate
    decoded_match           share of questions whose decoded answer is right
    gradient_cosine         mean per-pair cosine of the forward and reverse loss gradients (or of an adapter's alone)
    reverse_probability     mean probability of the target under the reverse query
    stored_evidence         mean stored evidence under the reverse query, summed over layers and heads

Each comes with a control (forward queries against reverse queries of another fact of the same group), with counts of
what is undefined, by reason, and with a word of caution where its facts are so few that its intervals were seen to
cover too little. Other probes' stand in files of their own; `measures.py` lists all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from .coverage import ONE_ASKED, caution, caution_of, counted, first_caution, missing_interval
from .group_correlation import LEAST_FACTS, group_correlation
from .intervals import COSINE, FRACTION, Bounds, Estimate, difference_over_facts, mean_over_facts, proportion_over_facts
from .partners import PARTNER, asks_about_one, count_of_partners, over_partners, partners_of, partners_of_pairs
from .resampling import SHOWN_COLUMNS, Facts

# Raised whenever the same frame comes to another number or interval; readings of another are worked out anew.
STATISTICS_VERSION = 6

ALONE = "alone in its group, so without a correlation"
BELOW_FLOOR = "gradient below the rounding floor"
LATER_BLOCK = "evidence in a later block"
LATER_BLOCK_CONTROL = f"{LATER_BLOCK} (control)"
NO_GRADIENT = "gradient exactly zero in all of these parameters"
NO_PARTNER = "no other fact in the group for the control"
# Wrong: no fact of the list that shares the other's evidence or prompt has that target.
NO_LIKE_TARGET = "no other fact in the group has another target of as many tokens, wrong here as this one is there"
NO_UNLIKE = "no other fact in the group has another target, wrong here as this one is wrong there"
NO_OTHER_ANSWER = "no other question of its direction and wording has another prompt and other answers, for the control"
NO_VARIANCE = "no variance within the group"
NOT_FINITE = "not finite"
TWO_PAIRS = "two pairs, whose correlation is 1 or -1 whatever they are"
SMALL_GROUP = f"group of fewer than {LEAST_FACTS} facts"


@dataclass(frozen=True)
class Control:
    """What the measure shows when facts are shuffled: the null it has to be read against.

    `interval` is 95 %: over shuffles for the correlation (what chance pairings give), over facts otherwise.
    """

    value: float
    interval: tuple[float, float]
    n: int
    method: str
    facts: int = 0
    prompts: int = 0

    @property
    def estimate(self) -> Estimate:
        """The control as a number with its interval."""
        return Estimate(self.value, *self.interval, self.n, self.facts, self.prompts)

    @classmethod
    def of(cls, estimate: Estimate, method: str) -> Control:
        """A number with its interval as a control."""
        found = estimate
        return cls(found.value, (found.low, found.high), found.n, method, found.facts, found.prompts)

    def __repr__(self) -> str:
        # Readings of older versions count the facts of a control as 0.
        size = (
            counted(self.n, self.facts, prompts=self.prompts) if self.facts or not self.n else f"n = {self.n:,} pairs"
        )
        return f"Control({self.value:.4g} [{self.interval[0]:.4g}, {self.interval[1]:.4g}], {size}, {self.method})"


@dataclass(frozen=True)
class Measured:
    """An estimate, its control, the excess over it, what was left out, and what they must be read with."""

    estimate: Estimate
    control: Control | None = None
    excess: Estimate | None = None
    undefined: dict[str, int] = field(default_factory=dict)
    statistic: str = ""
    caution: str = ""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Measured:
        """The inverse of `dataclasses.asdict`, through JSON (where NaN is a number and tuples are lists)."""
        control, excess = values["control"], values["excess"]
        if control is not None:
            control = Control(**control | {"interval": tuple(control["interval"])})
        excess = None if excess is None else Estimate(**excess)
        kept = values | {"estimate": Estimate(**values["estimate"]), "control": control, "excess": excess}
        return cls(**kept)


@dataclass(frozen=True)
class ScoreTables:
    """What a correlation of attention scores rests on, without the frame it stands in.

    Shapes: `forward`, `reverse`: `pair head`; `facts`, `groups`: `pair`. `heads`: (layer, head) of each column;
    `undefined`: rows without a score, by reason (pairs, where the evidence lies in a later block).
    """

    heads: list[tuple[Any, ...]]
    forward: np.ndarray
    reverse: np.ndarray
    facts: Facts
    groups: np.ndarray
    undefined: dict[str, int]

    @classmethod
    def of(cls, frame: pd.DataFrame) -> ScoreTables:
        """The tables of an attention reading's frame."""
        by_head = frame.groupby(["layer", "head"], sort=True, dropna=False)
        heads = by_head.ngroup().to_numpy()
        pairs, pair = np.unique(frame["pair"].to_numpy(), return_inverse=True)
        scores = []
        for column in ("score_forward", "score_reverse"):
            table = np.full((len(pairs), heads.max() + 1), np.nan)
            table[pair, heads] = frame[column].to_numpy(dtype=np.float64)
            scores.append(table)
        first = np.unique(pair, return_index=True)[1]
        facts, groups = Facts.of_pairs(frame), frame["group"].to_numpy()[first]
        undefined = reasons(frame)
        if LATER_BLOCK in undefined:  # the same for every layer and head of a pair
            undefined[LATER_BLOCK] = frame.loc[frame["reason"] == LATER_BLOCK, "pair"].nunique()
        names = [tuple(key) for key in by_head.size().index]
        return cls(names, scores[0], scores[1], facts, groups, undefined)

    @classmethod
    def joined(cls, parts: Sequence[ScoreTables], facts: Facts) -> ScoreTables:
        """The tables of further and further pairs, of these facts, as one; NaN for a head that a part has not."""
        heads = sorted({head for part in parts for head in part.heads})
        place = {head: column for column, head in enumerate(heads)}
        scores = [np.full((sum(len(part.facts) for part in parts), len(heads)), np.nan) for _ in range(2)]
        row, undefined = 0, Counter[str]()
        for part in parts:
            columns = [place[head] for head in part.heads]
            for table, own in zip(scores, (part.forward, part.reverse), strict=True):
                table[row : row + len(own), columns] = own
            row += len(part.facts)
            undefined.update(part.undefined)
        groups = np.concatenate([part.groups for part in parts])
        return cls(heads, scores[0], scores[1], facts, groups, dict(undefined))


def attention_correlation(frame: pd.DataFrame, seed: int, control: bool = True) -> Measured:
    """Correlation over pairs, per group and head; see `group_correlation`."""
    return score_correlation(ScoreTables.of(frame), seed, control)


def score_correlation(tables: ScoreTables, seed: int, control: bool = True) -> Measured:
    """The same of the tables."""
    facts, groups = tables.facts, tables.groups
    found = group_correlation(tables.forward, tables.reverse, facts, groups, control=control, seed=seed)
    estimate = Estimate(found.value, found.low, found.high, found.n, found.facts, found.prompts)
    counts = {NO_VARIANCE: found.constant, SMALL_GROUP: found.small, ALONE: found.alone}
    if np.isnan(found.value) and not found.alone and not found.constant and found.n == 2:
        counts[TWO_PAIRS] = 2
    counts[NO_PARTNER] = found.lonely if control else 0
    undefined = tables.undefined | {reason: count for reason, count in counts.items() if count}
    few = caution_of("correlation", estimate)
    if not found.null.size:
        return explained(Measured(estimate, None, None, undefined, found.statistic, few), len(facts))
    # A round of shuffles averages 0 but for the last bit, which would read as a control.
    null = round(float(found.null.mean()), 12) + 0.0
    low, high = (float(edge) for edge in np.percentile(found.null, [2.5, 97.5]))
    method = f"{found.null.size} shuffles of facts within groups"
    beside = Control(null, (low, high), found.n, method, found.facts, found.prompts)
    excess = replace(estimate, value=found.value - null, low=found.low - null, high=found.high - null)
    return explained(Measured(estimate, beside, excess, undefined, found.statistic, few), len(facts))


def gradient_cosine(frame: pd.DataFrame, seed: int, control: bool = True) -> Measured:
    """Per pair, sum over the frame's parameters, then the cosine; mean and interval over pairs."""
    table = pair_cosines(frame)
    cosine, facts = table["cosine"].to_numpy(), Facts.of_rows(table)
    without_gradient = table["without_gradient"].to_numpy()
    reasons = pair_reasons(frame, "reason") if "reason" in frame else {}
    below = int((np.isnan(cosine) & ~without_gradient).sum()) - sum(reasons.values())
    counts = reasons | {NO_GRADIENT: int(without_gradient.sum()), BELOW_FLOOR: below}
    undefined = {reason: count for reason, count in counts.items() if count}
    statistic = "mean per-pair cosine"
    if "cosine_control" not in table:
        return with_control(cosine, None, facts, undefined, statistic, bounds=COSINE)
    alone = frame["norm_control"].isna()
    if "reason_control" in frame:
        alone &= (frame["reason"] == "") & (frame["reason_control"] == "")
        undefined |= control_reasons(frame)
    null, lonely = table["cosine_control"].to_numpy(), alone.groupby(frame["pair"]).any().to_numpy()
    partners = partners_of(table)
    return with_control(cosine, null, facts, undefined, statistic, bounds=COSINE, alone=lonely, partners=partners)


def pair_cosines(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per pair: its fact (and `shown` and its like), the cosine over the frame's parameters, and the control's.

    NaN where a norm does not exceed its rounding floor, or the frame gives a reason; `without_gradient` where one is
    zero (modules that never ran).
    """
    columns = [c for c in frame.columns if c.startswith(("norm_", "floor_"))]
    squared = frame.assign(**{c: frame[c].astype(float) ** 2 for c in columns})
    inner = [c for c in frame.columns if c.startswith("inner")]
    of = [name for name in ("fact", PARTNER, *SHOWN_COLUMNS) if name in frame]
    told = dict.fromkeys(of, "first") | dict.fromkeys([*columns, *inner], "sum")
    sums = squared.groupby("pair", sort=True).agg(told)
    without_gradient = (sums["norm_forward"] == 0) | (sums["norm_reverse"] == 0)
    if "reason" in frame:  # sums of NaN are 0
        without_gradient &= frame["reason"].eq("").groupby(frame["pair"], sort=True).all()
    cosine = _cosine(sums, "inner", "reverse")
    table = sums[of].assign(cosine=cosine, without_gradient=without_gradient)
    if "inner_control" in frame:
        # A pair without a partner has NaN in every row; pandas sums that to 0, which the floor test turns back to NaN.
        table["cosine_control"] = _cosine(sums, "inner_control", "control")
    return table


def _cosine(sums: pd.DataFrame, inner: str, other: str) -> np.ndarray:
    forward, reverse = np.sqrt(sums["norm_forward"].to_numpy()), np.sqrt(sums[f"norm_{other}"].to_numpy())
    above_floor = (forward > np.sqrt(sums["floor_forward"].to_numpy())) & (
        reverse > np.sqrt(sums[f"floor_{other}"].to_numpy())
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(above_floor, sums[inner].to_numpy() / (forward * reverse), np.nan)


def reverse_probability(frame: pd.DataFrame, seed: int, control: bool = True) -> Measured:
    """Mean probability of the target under the reverse queries of the frame."""
    return direction_mean(frame, "reverse", "probability")


def decoded_match(frame: pd.DataFrame, seed: int, control: bool = True) -> Measured:
    """Share of questions whose decoded answer is right; its control asks about another fact."""
    return _over_questions(frame, "match", "exact match, mean over questions", binary=True)


def candidate_rank(frame: pd.DataFrame, seed: int, control: bool = True) -> Measured:
    """Share of questions whose right answer ranks first among the candidates; the control asks about another fact."""
    return _over_questions(frame, "first", "right answer ranked first, over questions", binary=True)


def mean_reciprocal_rank(frame: pd.DataFrame) -> Measured:
    """Mean over questions of 1 / rank among the candidates, beside that where another fact is asked."""
    return _over_questions(frame, "reciprocal_rank", "mean reciprocal rank", bounds=FRACTION)


def _over_questions(frame: pd.DataFrame, column: str, statistic: str, **kind: Any) -> Measured:
    values = frame[column].to_numpy(dtype=np.float64)
    null = frame[f"{column}_control"].to_numpy(dtype=np.float64) if f"{column}_control" in frame else None
    facts, partners = Facts.of_rows(frame), partners_of(frame)
    lonely = NO_OTHER_ANSWER
    return with_control(values, null, facts, reasons(frame), statistic, lonely=lonely, partners=partners, **kind)


def stored_evidence(frame: pd.DataFrame, seed: int, control: bool = True) -> Measured:
    """Mean over pairs of S[v, u] under the reverse query, summed over the frame's layers and heads."""
    rows = frame[(frame["part"] == "evidence") & (frame["source"] == "token")]
    columns = [column for column in ("stored_reverse", "stored_control") if column in rows]
    by_pair = rows.groupby("pair", sort=True)
    # A head that is undefined leaves the sum undefined.
    undefined = rows[columns].isna().groupby(rows["pair"], sort=True).any()
    table = by_pair[columns].sum().mask(undefined)
    values, facts = table["stored_reverse"].to_numpy(dtype=np.float64), Facts.of_pairs(rows, "reverse")
    statistic = "mean stored evidence under the reverse query, summed over layers and heads (logits)"
    counts = pair_reasons(rows, "reason")
    if "stored_control" not in table:
        return with_control(values, None, facts, counts, statistic)
    null = table["stored_control"].to_numpy(dtype=np.float64)
    alone = None
    if "reason_control" in rows:
        counts |= pair_reasons(rows[rows["pair"].isin(table.index[np.isfinite(values)])], "reason_control")
        alone = np.zeros(len(table), dtype=bool)  # counted just now, by reason
    return with_control(values, null, facts, counts, statistic, alone=alone, partners=partners_of_pairs(rows))


def direction_mean(frame: pd.DataFrame, direction: str, column: str) -> Measured:
    """Mean of `column` ("probability" or "argmax_match") over one direction; its control asks other facts' queries."""
    rows = frame[frame["direction"] == direction]
    if rows.empty:
        return Measured(Estimate.undefined(), undefined={f"no {direction} query in this part": 1})
    values, facts = rows[column].to_numpy(dtype=np.float64), Facts.of_rows(rows)
    null = rows[f"{column}_control"].to_numpy(dtype=np.float64) if f"{column}_control" in rows else None
    statistic, binary = f"mean {direction} {column}", column == "argmax_match"
    undefined, alone = reasons(rows), None
    if null is not None and "reason_control" in rows:
        undefined |= control_reasons(rows)
        alone = np.isnan(null) & np.isfinite(values) & rows["reason_control"].eq("").to_numpy()
    kind: dict[str, Any] = {"bounds": FRACTION, "binary": binary, "alone": alone, "partners": partners_of(rows)}
    found = with_control(values, null, facts, undefined, statistic, **kind)
    return replace(found, caution="; ".join(filter(None, [found.caution, _several_right(rows[np.isfinite(values)])])))


def _several_right(rows: pd.DataFrame) -> str:
    """A word of caution on pairs that ask what others ask as well, and hold something else for right."""
    targets = rows["targets"].fillna(1).to_numpy() if "targets" in rows else np.ones(1)  # rows of a part may lack it
    if not (several := int((targets > 1).sum())):
        return ""
    return (
        f"{several:,} of {len(rows):,} pairs show a query that has other right targets too (up to {targets.max():.0f} "
        "to a query): one of them ranks first at most, and their probabilities sum to 1 at most"
    )


def with_control(
    values: np.ndarray,
    null: np.ndarray | None,
    facts: np.ndarray | Facts,
    undefined: dict[str, int],
    statistic: str,
    *,
    bounds: Bounds | None = None,
    binary: bool = False,
    alone: np.ndarray | None = None,
    compared: np.ndarray | None = None,
    lonely: str = NO_PARTNER,
    method: str = "one derangement of facts within groups",
    partners: np.ndarray | None = None,
) -> Measured:
    """The mean of `values` beside that of `null`, between bounds or a proportion where they are 0 or 1 (`binary`).

    `alone` marks pairs without a partner (all NaN of `null` if None), `lonely` says why they have none; `compared` is
    what each pair's control is held against, where that is not all of its value. `partners` are the facts that
    controls ask about, where some are asked about for several.
    """
    facts = Facts.of(facts)
    mean = proportion_over_facts if binary else lambda part, of: mean_over_facts(part, of, bounds=bounds)
    estimate = mean(values, facts)
    kind = "proportion" if binary else "mean"
    few = first_caution(kind, estimate)
    lost = int((~np.isfinite(values)).sum()) - sum(undefined.values())
    undefined = undefined | ({NOT_FINITE: lost} if lost > 0 else {})
    if null is None:
        return explained(Measured(estimate, None, None, undefined, statistic, few), len(values))
    within = FRACTION if binary else bounds
    there = np.isfinite(null)
    floor = over_partners(lambda of: mean(null, of), facts, partners, there, within)
    without_partner = int((np.isnan(null) & np.isfinite(values) if alone is None else alone).sum())
    undefined = undefined | ({lonely: without_partner} if without_partner else {})
    if not floor.n:
        return explained(Measured(estimate, None, None, undefined, statistic, few), len(values))
    control = Control.of(floor, method)
    own = values if compared is None else compared
    excess = over_partners(
        lambda of: difference_over_facts(own, null, of, bounds=within, binary=binary),
        facts,
        partners,
        there & np.isfinite(own),
        None if within is None else (within[0] - within[1], within[1] - within[0]),
    )
    # Facts without a partner have a value and no control: the excess may rest on fewer.
    few = first_caution(kind, estimate, floor, excess)
    asked = count_of_partners(facts, partners, there)
    few = few or caution(kind, asked, floor.n, of="facts that controls ask about")
    found = Measured(estimate, control, excess, undefined, statistic, few)
    return explained(found, len(values), one_asked=asks_about_one(facts, partners, there))


def explained(measured: Measured, rows: int, *, one_asked: bool = False) -> Measured:
    """No NaN goes without a reason and a count: what lacks a value, or an interval, says why."""
    undefined = dict(measured.undefined)
    if np.isnan(measured.estimate.value) and not undefined:
        undefined[NOT_FINITE] = rows
    own, control = missing_interval(measured.estimate), measured.control
    beside = None if control is None else control.estimate
    for found, whose in ((measured.estimate, ""), (beside, " (control)"), (measured.excess, "")):
        reason = "" if found is None else missing_interval(found)
        reason = ONE_ASKED if reason and one_asked and found is not measured.estimate else reason
        if found is not None and reason and not (whose and reason == own):  # which then is said of both
            undefined[reason + whose] = found.n
    return replace(measured, undefined=undefined)


def reasons(frame: pd.DataFrame) -> dict[str, int]:
    if "reason" not in frame:
        return {}
    counts = frame["reason"].replace("", np.nan).value_counts()
    return {str(reason): int(count) for reason, count in counts.items()}


def pair_reasons(frame: pd.DataFrame, column: str) -> dict[str, int]:
    """Pairs (not rows) by the reason of any of their rows."""
    return reasons(frame[frame[column] != ""].drop_duplicates("pair").assign(reason=lambda rows: rows[column]))


def control_reasons(frame: pd.DataFrame) -> dict[str, int]:
    """Pairs that have a value of their own and no control, by the reason."""
    return pair_reasons(frame[frame["reason"] == ""], "reason_control")
