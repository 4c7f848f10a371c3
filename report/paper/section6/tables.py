"""The tables of the page, each a list of rows of texts; a cell that was not run stands there and says so."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from ....probes.figures.theme import interval_text, rounded
from .ablations import IN_PLACE, NOT_PREDICTED, PREDICTIONS, R, number, plain_cell
from .cells import NOT_ASKED, at_last, at_reached, by_seed, cell_words, lacking, mean, seed_rows
from .frames import FINISHED, KINDS, Section6, times_made, weights_of
from .other_claims import SIDE, counterpart
from .plan import (
    DATASETS,
    METHODS,
    PLAIN,
    SEEDS,
    TABLE_7,
    TABLE_MODELS,
    Cell,
    Trained,
    ablation_cell,
    main_cell,
)
from .verdicts import Claim, per_cent, probability

Rows = list[dict[str, Any]]
SIDES = {"forward": "Fwd.", "reverse": "Rev."}
SIGNATURES = {
    "attention_correlation": "attention correlation",
    "gradient_cosine": "gradient cosine",
    "lora_gradient_cosine": "adapter's gradient cosine",
    "reverse_probability": "reverse probability",
    "forward_probability": "forward probability",
}


def table_7(found: Section6, *, split: str = "train", first: bool = False) -> Rows:
    """Table 7's layout: at the last step, or at the `first` checkpoint of at least 90 % forward."""
    at = at_reached if first else at_last
    rows = []
    for trained in DATASETS:
        row = {"trained on": trained.words}
        for model in TABLE_MODELS:
            cell = main_cell(model, trained)
            if first:
                row[f"{model} step"] = by_seed(
                    [_step(found.reached(cell, seed)) for seed in SEEDS], percent=False, digits=0
                )
            for asked, short in SIDES.items():
                row[f"{model} {short}"] = cell_words(found, cell, asked, split, at)
        rows.append(row)
    return rows


def begins(found: Section6) -> Rows:
    """The looser score in Table 7's layout, at the last step: what begins with a right answer."""
    rows = []
    for trained in DATASETS:
        row = {"trained on": trained.words}
        for model in TABLE_MODELS:
            cell = main_cell(model, trained)
            row |= {f"{model} {short}": _begins(found, cell, asked) for asked, short in SIDES.items()}
        rows.append(row)
    return rows


def _begins(found: Section6, cell: Cell, asked: str) -> str:
    """The looser score of a cell at its last step, or whether it was not collected or not run."""
    if seed_rows(found, cell, asked, table="begins"):
        return cell_words(found, cell, asked, table="begins")
    none = lacking(found, cell, at_last)
    return "not collected" if none == NOT_ASKED else none


def _step(step: int | None) -> float | None:
    return None if step is None else float(step)


def beside_the_paper(found: Section6, claims: Iterable[Claim]) -> Rows:
    """Which side is higher, printed and found, by dataset and model."""
    same = {claim.cell: claim.verdicts for claim in claims if claim.plain.startswith(SIDE)}
    rows = []
    for trained in DATASETS:
        for model, (forward, reverse) in TABLE_7[trained].items():
            cell = main_cell(model, trained)
            means = {asked: mean([found.last(cell, seed, asked) for seed in SEEDS]) for asked in SIDES}
            ours = f"{per_cent(means['forward'])} / {per_cent(means['reverse'])}"
            missing = all(found.status(cell, seed) != FINISHED for seed in SEEDS)
            row = {
                "trained on": trained.words,
                "paper": counterpart(model),
                "printed Fwd. / Rev.": f"{forward} / {reverse}",
            }
            row |= {"here": model, "found Fwd. / Rev.": lacking(found, cell, at_last) if missing else ours}
            rows.append(row | {"same side higher": counted(same.get(cell.words, []))})
    return rows


def counted(verdicts: Sequence[str]) -> str:
    """Verdicts with how many seeds have each: "holds 2, fails 1"."""
    counts = {word: list(verdicts).count(word) for word in dict.fromkeys(verdicts)}
    return ", ".join(f"{word} {count}" for word, count in counts.items()) or "not run"


def ranks(found: Section6) -> Rows:
    """The right answer's rank among all candidates, beside exact match, asked backwards of trained facts."""
    rows = []
    for trained in DATASETS:
        for model in TABLE_MODELS:
            cell = main_cell(model, trained)
            row: dict[str, Any] = {"trained on": trained.words, "model": model}
            row["reverse exact match"] = cell_words(found, cell, "reverse")
            own = seed_rows(found, cell, "reverse", table="ranks")
            row["ranked first"] = cell_words(found, cell, "reverse", table="ranks")
            row["reciprocal rank"] = by_seed([one["reciprocal_rank"] for one in own], percent=False, digits=2) or "-"
            row["control"] = per_cent(mean([one["control"] for one in own])) if own else "-"
            row |= _among(own, "")
            row["held-out facts ranked first"] = cell_words(found, cell, "reverse", "heldout", table="ranks")
            rows.append(row | _among(seed_rows(found, cell, "reverse", "heldout", table="ranks"), "held-out "))
    return rows


def _among(ranked: Sequence[dict[str, Any]], side: str) -> dict[str, str]:
    """Among how many candidates, and how often chance would rank a right one first."""
    if not ranked:
        return {f"{side}chance": "-", f"{side}candidates": "-"}
    chance = per_cent(mean([one["chance"] for one in ranked]))
    of_texts = " texts" * any(pd.isna(one["texts"]) for one in ranked)
    count = max(int(one["candidates"]) for one in ranked)
    return {f"{side}chance": chance, f"{side}candidates": f"{count}{of_texts}"}


def over_training(found: Section6) -> Rows:
    """Forward / reverse exact match at every snapshot, means over the seeds that have it."""
    steps = sorted({int(step) for step in found.answers.loc[found.answers["sweep"] == "section6", "step"]})
    rows = []
    for trained in DATASETS:
        for model in TABLE_MODELS:
            cell = main_cell(model, trained)
            n = sum(found.status(cell, seed) == FINISHED for seed in SEEDS)
            row: dict[str, Any] = {"trained on": trained.words, "model": model, "seeds": f"{n} of {len(SEEDS)}"}
            for step in steps:
                values = {asked: _at(found, cell, asked, step) for asked in SIDES}
                none = all(value is None for value in values["forward"])
                row[f"{step:,}"] = "-" if none else " / ".join(_whole(mean(own)) for own in values.values())
            rows.append(row)
    return rows


def _at(found: Section6, cell: Cell, asked: str, step: int) -> list[float | None]:
    rows = [found.curve(cell, seed, asked).get(step) for seed in SEEDS]
    return [None if row is None else float(row["value"]) for row in rows]


def _whole(value: float) -> str:
    return "undefined" if math.isnan(value) else f"{100 * value:.0f}"


def signatures(found: Section6) -> Rows:
    """The probes before fine-tuning and at the last step, beside their controls; masked and causal pairs are named."""
    rows = []
    for trained in DATASETS:
        for model in TABLE_MODELS:
            for measure, words in SIGNATURES.items():
                rows.append(_signature(found, main_cell(model, trained), measure, words))
    return rows


def _signature(found: Section6, cell: Cell, measure: str, words: str) -> dict[str, Any]:
    curves = [list(found.curve(cell, seed, measure, table="signatures").values()) for seed in SEEDS]
    row: dict[str, Any] = {"trained on": f"{cell.dataset} ({cell.direction})", "model": cell.model, "measure": words}
    last = [curve[-1] for curve in curves if curve]
    if not last:
        nothing = dict.fromkeys(("pairs", "before, by seed", "control before", "untrained twin"), "-")
        return (
            row
            | {"last step, by seed": lacking(found, cell, at_last)}
            | nothing
            | {"control": "-", "above control": "-", "n": "-"}
        )
    first = [curve[0] if curve else None for curve in curves]
    told = _probability if measure.endswith("_probability") else _interval
    row["last step, by seed"] = "; ".join(told(curve[-1]) if curve else "-" for curve in curves)
    row["pairs"] = ", ".join(dict.fromkeys(str(one["kind"]).replace("_", " ") for one in last))
    number = probability if measure.endswith("_probability") else _number
    row["before, by seed"] = ", ".join("-" if one is None else number(float(one["value"])) for one in first)
    row["control before"] = number(mean([float(one["control"]) for one in first if one is not None and _has(one)]))
    row["untrained twin"] = _twins(found, cell, measure)
    row["control"] = number(mean([float(one["control"]) for one in last if _has(one)]))
    row["above control"] = _above([float(one["excess_low"]) for one in last])
    return row | {"n": ", ".join(dict.fromkeys(f"{int(one['n'])} ({int(one['facts'])} facts)" for one in last))}


def _has(row: dict[str, Any]) -> bool:
    """Whether a seed has a value: one without lends the others no control."""
    return not math.isnan(float(row["value"]))


def _above(lows: Sequence[float]) -> str:
    """How many seeds lie above their control, of those that can be held against it; the others are not against."""
    decided = [low for low in lows if not math.isnan(low)]
    lost = f", {len(lows) - len(decided)} undefined" if len(decided) < len(lows) else ""
    return f"{sum(low > 0 for low in decided)} of {len(decided)}{lost}" if decided else "not compared"


def _twins(found: Section6, cell: Cell, measure: str) -> str:
    """Value and interval of each seed's untrained twin; an adapter has none."""
    if measure.startswith("lora"):
        return "has no adapter"
    rows = [found.twin(cell, seed, measure) for seed in SEEDS]
    told = _probability if measure.endswith("_probability") else _interval
    return "; ".join("-" if row is None else told(row) for row in rows) if any(rows) else "not read"


def _interval(row: dict[str, Any]) -> str:
    told = interval_text(float(row["value"]), float(row["low"]), float(row["high"]))
    return f"{told} ({row['reason']})" if told == "undefined" and row["reason"] else told


def _probability(row: dict[str, Any]) -> str:
    value, low, high = (probability(float(row[key])) for key in ("value", "low", "high"))
    return _interval(row) if value == "undefined" else f"{value} [{low}, {high}]"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else rounded(value, 2)


def verdicts(claims: Iterable[Claim], *, of: bool = True) -> Rows:
    """A row for each claim and cell, a column for each seed: the verdict, then what decides."""
    rows = []
    for claim in claims:
        row = {"": claim.name} if of else {}
        row |= {"claim": claim.plain, "cell": claim.cell}
        rows.append(row | {f"s{one.seed}": f"**{one.verdict}** ({one.told})" for one in claim.seeds})
    return rows


def ablations(found: Section6, claims: Sequence[Claim]) -> Rows:
    """Every ablation with its numbers and its verdict per seed; the plain cell first, what was not predicted last."""
    by_name = {claim.name: claim for claim in claims}
    return [
        _varied(found, ablation_cell(variant), variant, by_name.get(variant))
        for variant in (PLAIN, *PREDICTIONS, *NOT_PREDICTED)
    ]


def _varied(found: Section6, cell: Cell, variant: str, claim: Claim | None) -> dict[str, Any]:
    row: dict[str, Any] = {"variant": variant, "prediction": "-" if claim is None else claim.plain}
    row |= (
        {f"s{one.seed}": f"**{one.verdict}**" for one in claim.seeds} if claim else {f"s{seed}": "-" for seed in SEEDS}
    )
    row |= {"forward": cell_words(found, cell, "forward"), "reverse": cell_words(found, cell, "reverse")}
    row |= _at_reached(found, cell)
    plain = [found.last(plain_cell(variant), seed, R) for seed in SEEDS]
    apart = [_less(number(found, variant, R, seed), other) for seed, other in zip(SEEDS, plain, strict=True)]
    row["reverse less plain's, points by seed"] = by_seed(apart)
    row["ranked first"] = cell_words(found, cell, "reverse", table="ranks")
    row["floor, reverse"] = cell_words(found, cell, "reverse", "heldout")
    row["first entity in place, by seed"] = by_seed([number(found, variant, IN_PLACE, seed) for seed in SEEDS])
    return row | {"wrong answers backwards": wrong_answers(found, cell)}


def _at_reached(found: Section6, cell: Cell) -> dict[str, str]:
    """The other reading of a cell: where 90 % forward is reached first."""
    steps = by_seed([_step(found.reached(cell, seed)) for seed in SEEDS], percent=False, digits=0)
    return {"step at 90 %": steps, "reverse at 90 %": cell_words(found, cell, "reverse", at=at_reached)}


def _less(own: float | None, other: float | None) -> float | None:
    return None if own is None or other is None else own - other


def wrong_answers(found: Section6, cell: Cell) -> str:
    """What the wrong reverse answers of all seeds are, at the last step: empty, words of the prompt, ..."""
    rows = seed_rows(found, cell, "reverse")
    counts = {
        kind: sum(int(row[kind]) for row in rows if row[kind] == row[kind] and row[kind] is not None) for kind in KINDS
    }
    told = [f"{count} {kind.replace('_', ' ')}" for kind, count in counts.items() if count]
    return ", ".join(told) or ("-" if not rows else "none")


def methods(found: Section6) -> Rows:
    """LoRA (the main table's cells), all weights, and recipes of others, on the same two directions."""
    planned = list(found.cells(METHODS))
    mains = dict.fromkeys(main_cell(cell.model, Trained(cell.dataset, cell.direction)) for cell in planned)
    rows = []
    for plain in mains:
        beside = [cell for cell in planned if cell[1:4] == plain[1:4]]
        for cell in (plain, *beside):
            row = {"trained on": f"{cell.dataset} ({cell.direction})", "model": cell.model}
            row |= {"method": cell.variant or "lora", "steps": _steps(found, cell)}
            row |= {SIDES[asked]: cell_words(found, cell, asked) for asked in SIDES}
            row |= {"Fwd., begins with it": _begins(found, cell, "forward")}
            row |= _at_reached(found, cell)
            row |= {"floor, reverse": cell_words(found, cell, "reverse", "heldout")}
            row |= {"ranked first backwards": cell_words(found, cell, "reverse", table="ranks")}
            rows.append(row | {"wrong answers backwards": wrong_answers(found, cell)})
    return rows


def _steps(found: Section6, cell: Cell) -> str:
    known = dict.fromkeys(steps for seed in SEEDS if (steps := found.steps(cell, seed)) is not None)
    return ", ".join(f"{steps:,}" for steps in known) or "-"


def models(found: Section6) -> Rows:
    """The small models: what they cost, and what they answer of their corpus, told facts and untold ones."""
    rows = []
    again = [(f"{name}, made again", one) for name, told in found.models.items() for one in times_made(told)[1:]]
    for name, record in (*found.models.items(), *again):
        row: dict[str, Any] = {"model": name, "told": "-", "parameters": "-", "core minutes": "-", "last loss": "-"}
        row |= {"told facts, told direction / other": "-", "untold facts": "-", "weights (sha256)": record["status"]}
        if record["status"] == FINISHED:
            answers = record["answers"]
            row |= {"told": record["corpus"]["told"], "parameters": f"{record['parameters']:,}"}
            row |= {"core minutes": record["core_minutes"], "last loss": f"{record['losses'][-1][1]:.3f}"}
            row |= {"told facts, told direction / other": _answered(answers, "told")}
            row |= {"untold facts": _answered(answers, "untold")}
            row["weights (sha256)"] = weights_of(record)[:16] or "-"
        rows.append(row)
    return rows


def made_again(found: Section6) -> list[str]:
    """The finished runs that start from a small model made again to other bytes, by model and bytes."""
    return [f"{name} of {digest[:16]}: {', '.join(own)}" for (name, digest), own in found.from_made_again.items()]


def _answered(answers: dict[str, Any], known: str) -> str:
    """By dataset and direction, in per cent, with how many questions."""
    own = {name.rsplit(".", 1)[0]: one for name, one in answers.items() if name.rsplit(".", 1)[1] == known}
    return "; ".join(f"{name} {per_cent(_float(one['value']))} (n = {one['n']})" for name, one in own.items()) or "-"


def _float(value: float | None) -> float:
    return math.nan if value is None else float(value)


def not_run(found: Section6) -> list[str]:
    """The planned runs that are in no number, by sweep and reason."""
    lines = []
    left = found.runs[found.runs["status"] != FINISHED]
    planned = {str(name): len(own) for name, own in found.runs.groupby("sweep")}
    for (sweep, status), own in left.groupby(["sweep", "status"], sort=False):
        everything = len(own) == planned[str(sweep)]
        lines.append(f"{sweep}, {status}: {f'all {len(own)} runs' if everything else ', '.join(own['run'])}")
    return lines
