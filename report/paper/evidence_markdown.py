"""The tables of the page about negative evidence: verdicts, every cell, switches, prices, and the published recipe.

Every cell of the sweep has a row, run or not, and names its recipe.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from .evidence_runs import FINISHED
from .markdown import markdown_table
from .predictions import judged, overall
from .published_recipe import joint_test, places, wandering
from .reproduce import NOT_RUN, model_name, records
from .rules import CANNOT, EQUAL, FAILS, FORWARD, GATE, MARGIN, VERDICTS, interval

WORDS = (
    "- A **sequence** is placeholders (one token, which is no letter) and two letters, the lowercase one left of its "
    "uppercase partner. The **reverse** question shows the uppercase letter (the evidence) and asks for the lowercase "
    "one (the target) to its right, where no training sequence has it; the **mirrored** one asks for the uppercase "
    "letter left of the lowercase one. **Letters-only**: is the right letter ahead of the other 25, whatever the "
    "placeholder gets? A causal model reads the last place alone: forward the uppercase letter after its partner, in "
    "reverse the lowercase one.\n"
    "- A **dial** says which terms of the loss are priced in rows that show the evidence and hide the target. "
    "**keep**: all. **drop-right**: all but the hidden placeholders right of the evidence; **drop-left**, "
    "**drop-both** likewise; **matched** dials drop as many as the side with fewer has. **mirror**: the reflection of "
    "drop-right, in rows that show the lowercase letter and hide the uppercase one. **drop-after**: drop-right's "
    "counterpart for causal models, tokens after the second letter. **single**, **two**, **three masks**: so many "
    "tokens of each row are hidden. **dose**: what drop-right drops is weighted by 0.03, 0.1 or 0.3 instead of 0. "
    "**then**: the dial changes in mid-training, the rest goes on.\n"
    "- **Recipe W**: N(0, 0.02), rate 1e-3 after a warm-up of 500 steps, loss per token, no dropout, 5,000 steps of "
    "128 rows (length 20: 6,000; scalar: 15,000). **Recipe P**: RADD's published one, scaled (torch's own "
    "initialisation, rate 3e-4, rates t, loss summed over tokens, dropout 0.02 after attention and MLP). Both at a "
    "constant rate and d = 64. A **cell** is named like its runs, without the seed (`rope-l10-published-drop-right`: "
    "RoPE, length 10, recipe P, dial drop-right). **Averaged weights**: the exponential average at 0.9999, warmed up; "
    "a causal model has raw ones alone. The older sweep at the end of the page is called **decayed rate**."
)
RULES = (
    "The unit is the run, its statistic the mean over the answers read in the second half of its training, averaged "
    "weights (a causal model has raw ones alone); *stays* takes the minimum there. A threshold claim holds if every "
    f"planned seed passes, fails if any misses by more than {MARGIN:g}, and is *{CANNOT}* otherwise, also while seeds "
    "are missing; a claim of no change holds if the 90 % t-interval of the differences, paired by seed, lies within "
    f"±{EQUAL:g}, and fails if it lies outside altogether. A seed counts where its forward accuracy is at least "
    f"{FORWARD:g}, and in a switch where there is something to recover (below 0.5 at the switch) or to lose (above); "
    f"where none counts the verdict is *{GATE}*. Prediction 0 says *every cell*, so it fails where the causal model's "
    "cells fail; they and the masked models' are judged by themselves beside it. Verdicts on raw weights stand beside "
    "and decide nothing. Time to fade is the first reading from which on the reverse accuracy is below 0.5 for good, 0"
    " where it never was above."
)
SEEN = (
    "Seen before the predictions were written: prototypes of one seed each, by other code. Without the right-hand "
    "terms RoPE answered backwards at 1.00 (lengths 10 and 20) and the absolute encoding at 0.99; with them both "
    "ended low; among the 26 letters 99 % were right even where accuracy was 0, and every error was the placeholder; "
    "a mirror dial raised the mirror question alone; scalar positions stood at 1.00 after 2,500 steps, their "
    "negatives not yet fitted. Of recipe P only whether its forward accuracy passes the gate (another seed)."
)
ABOUT_CELLS = (
    "Per cent, mean over seeds (lowest to highest seed; one number where they are alike to its digits), averaged "
    "weights unless raw is said. Stays: the lowest reading of any seed in the second half. Placeholder: share of the "
    "wrong reverse answers that are the placeholder. +1, +2: the reverse question with so many further masks left of "
    "the evidence. Mirror: the uppercase letter asked from its lowercase partner on the right. A run that switches "
    "is averaged across its switch here; see the next section. A causal model is asked another question forward and in "
    "reverse (docs/probes.md), and has no mirrored one."
)
ABOUT_PRICE = (
    "Of the last checkpoint, averaged weights (a causal model: raw). Keep's loss: the whole objective in nats per "
    "token on rows and masks that are the same for all models of a length (the causal model's: of the next token); "
    "the difference to keep is paired by seed, with its 90 % t-interval over seeds. Entropy: what the sequences "
    "themselves come to. Negatives: mean p(placeholder) where the target is hidden and the evidence left of it "
    "visible (causal: after the second letter). Ill-formed: share of sequences sampled token by token in random "
    "order from all-masked that are none of the training's; backwards: of all samples, those that are one read "
    "backwards."
)
ABOUT_LOG = (
    "Means over seeds. Clipped: share of steps whose gradient was longer than the limit; norm: median before the "
    "clip; loss: last tenth of the steps, in the recipe's own unit (W nats per token, P per sequence); dropped: "
    "terms a step, and their share of the weight (sum of 1/t) of a batch. Then the three probes at the last "
    "checkpoint, value / control."
)
ABOUT_SWITCHES = (
    "Per cent, mean over seeds (lowest to highest), so many steps after the switch; both go on from the same "
    "checkpoint, optimizer and random states. The average of the weights lags: after 500 steps 58 % of it are newer "
    "than the switch, after 1,000 steps 81 %."
)
ABOUT_PLACES = (
    "Per cent. Among all our checkpoints and seeds, how many reverse accuracies lie below the paper's (percentile), "
    "in a distribution of that width; wider than 40 points would hold almost any number and is *not informative*. "
    "Two choices of checkpoints: the second half of training, and all at which forward accuracy is at least 0.97. "
    "The paper's step, rate and weights are not known."
)
ABOUT_WANDERING = (
    "Per cent. Spread: standard deviation of reverse accuracy over the checkpoints of the second half, mean over "
    "seeds; range: the widest lowest-to-highest of any seed."
)
RUNS = "Each finished run, per cent, by the same statistics (`-`: not asked, or no wrong answer):"
RUN_COLUMNS = {
    "forward": "forward",
    "reverse": "reverse",
    "lowest": "reverse_lowest",
    "letters-only": "letters_only",
    "placeholder": "placeholder_share",
    "mirror": "mirror_reverse",
}
_AFTER = (0, 50, 100, 250, 500, 1000)


def evidence_sections(runs: pd.DataFrame, answers: pd.DataFrame) -> dict[str, str]:
    """The sections of the negative-evidence sweep, title to text."""
    parts = judged(runs, answers)
    plain = runs[(runs["length"] == 10) & (runs["masks"] == "rate") & runs["switch_dial"].isna() & runs["clip"].notna()]
    plain = plain[plain["dial"].isin(["keep", "drop-right", "mirror", "drop-after"]) & plain["dose"].isin([0.0, 1.0])]
    return {
        "Words": WORDS,
        "Which predictions hold?": f"{RULES}\n\n{SEEN}\n\n{verdict_table(overall(parts))}\n{parts_table(parts)}",
        "How does each dial answer?": f"{ABOUT_CELLS}\n\nLength 10, the three dials:\n\n{cells_table(plain)}\nEvery "
        f"cell:\n\n{cells_table(runs)}\n{unfinished(runs)}\n{RUNS}\n\n{runs_table(runs)}",
        "What does a switch in mid-training do?": f"{ABOUT_SWITCHES}\n\n{switches_table(runs, answers)}",
        "What does a dial cost?": f"{ABOUT_PRICE}\n\n{price_table(runs)}",
        "How did training go, and what do the probes read?": f"{ABOUT_LOG}\n\n{log_table(runs)}",
    }


def published_sections(runs: pd.DataFrame, answers: pd.DataFrame, others: pd.DataFrame | None = None) -> dict[str, str]:
    """The sections of the published recipe's sweep. `others`: runs whose wandering is shown beside."""
    found = places(runs, answers)
    joint = joint_test(runs, found)
    both = runs if others is None else pd.concat([runs, others], ignore_index=True)
    return {
        "Does Table 1 come out under the published recipe?": f"{ABOUT_PLACES}\n\n{places_table(found)}\n"
        f"{joint_table(joint)}",
        "Does reverse accuracy wander?": f"{ABOUT_WANDERING}\n\n{wandering_table(wandering(both))}",
        "How does each cell of the published recipe answer?": f"{ABOUT_CELLS}\n\n{cells_table(runs)}\n"
        f"{unfinished(runs)}\n{RUNS}\n\n{runs_table(runs)}",
    }


# ---- predictions ----


def verdict_table(table: pd.DataFrame) -> str:
    """Predictions by recipe, what failed first, each with what keeps it from holding; those without a cell last."""
    order = {word: place for place, word in enumerate((FAILS, CANNOT, GATE, NOT_RUN))}
    rows = sorted(
        records(table), key=lambda row: (row["planned"] == 0, order.get(row["verdict"], len(order)), row["prediction"])
    )
    return markdown_table(
        [
            {
                "recipe": row["recipe"],
                "prediction": f"{row['prediction']}. {row['claim']}",
                "verdict": f"**{row['verdict']}**" if row["planned"] else f"{NOT_RUN} (no such cell)",
                "what keeps it from holding": row["why"] or "-",
                "raw weights": row["raw"],
                "runs that count": f"{row['n']} of {row['planned']}",
            }
            for row in rows
        ]
    )


def parts_table(parts: pd.DataFrame) -> str:
    """All of them, what failed first, with the numbers that decide."""
    keys = ["recipe", "prediction", "claim", "cell"]
    raw = parts[parts["weights"] == "raw"].set_index(keys)["verdict"].to_dict()
    rows = []
    for row in sorted(records(parts[parts["weights"] == "ema"]), key=lambda row: VERDICTS.index(row["verdict"])):
        shown = {name: row[name] for name in ("recipe", "prediction", "cell", "claim", "verdict")}
        shown |= {"raw": raw[tuple(row[name] for name in keys)], "n": f"{row['n']} of {row['planned']}"}
        rows.append(shown | {"numbers": row["numbers"]})
    return markdown_table(rows)


# ---- cells ----


def by_cell(runs: pd.DataFrame) -> Iterable[tuple[dict[str, Any], pd.DataFrame, pd.DataFrame]]:
    """Each cell: its name and seeds, its finished rows on the weights that decide, and on raw ones."""
    for (recipe, cell), own in runs.groupby(["recipe", "cell"], sort=False):
        decide = own[(own["weights"] == "ema") | (own["objective"] == "causal")]
        done = decide[decide["status"] == FINISHED].sort_values("seed")
        raw = own[(own["weights"] == "raw") & (own["status"] == FINISHED)].sort_values("seed")
        yield {"recipe": recipe, "cell": cell, "seeds": f"{len(done)} of {len(decide)}"}, done, raw


def spread_text(values: Any, *, scale: float = 100.0, digits: int = 1) -> str:
    """Mean (lowest to highest); "-" without a value, NaN where one is undefined.

    >>> spread_text([0.1, 0.3])
    '20.0 (10.0 to 30.0)'
    """
    found = scale * np.asarray(list(values), dtype=float)
    if not len(found):
        return "-"
    if np.isnan(found).any():
        return "NaN" if np.isnan(found).all() else f"{np.nanmean(found):.{digits}f} ({np.isfinite(found).sum()} seeds)"
    mean, low, high = (f"{value:.{digits}f}" for value in (found.mean(), found.min(), found.max()))
    return mean if low == high else f"{mean} ({low} to {high})"


def _column(rows: pd.DataFrame, name: str) -> pd.Series:
    return rows[name] if name in rows else pd.Series(np.nan, rows.index)


def cells_table(runs: pd.DataFrame) -> str:
    """The answers of every cell."""
    rows = []
    for row, done, raw in by_cell(runs):
        shown = {
            "forward": spread_text(_column(done, "forward")),
            "reverse": spread_text(_column(done, "reverse")),
            "stays": _least(_column(done, "reverse_lowest")),
            "reverse, raw": spread_text(_column(raw, "reverse")),
            "letters-only": spread_text(_column(done, "letters_only")),
            "placeholder": _share(done),
            "+1": spread_text(_column(done, "reverse_1")),
            "+2": spread_text(_column(done, "reverse_2")),
            "mirror": spread_text(_column(done, "mirror_reverse")),
        }
        rows.append(row | shown)
    return markdown_table(rows)


def _least(values: pd.Series) -> str:
    """The lowest seed in per cent; which seeds that is of, where some are undefined."""
    if not len(values) or values.isna().all():
        return "-" if not len(values) else "NaN"
    return f"{100 * values.min():.1f}" + (f" ({values.count()} seeds)" if values.hasnans else "")


def _over_control(values: pd.Series, controls: pd.Series) -> str:
    """Mean value / mean control, of the seeds that have a value; an undefined seed lends no control."""
    if not len(values):
        return "-"
    told = []
    for known in (values, controls.where(values.notna())):
        lost = f" ({known.count()} seeds)" if known.hasnans else ""
        told.append("NaN" if known.isna().all() else f"{known.mean():.2f}{lost}")
    return " / ".join(told)


def _share(done: pd.DataFrame) -> str:
    if len(done) and (done["reverse_errors"] == 0).all():
        return "no errors"
    return spread_text(_column(done, "placeholder_share"))


def unfinished(runs: pd.DataFrame) -> str:
    """The runs that are in no number, by reason and cell."""
    left = runs[runs["status"] != FINISHED].drop_duplicates("run")
    if left.empty:
        return "Every run of the sweep is in the table.\n"
    lines = []
    for reason, own in left.groupby("status", sort=False):
        cells = (
            f"{cell} ({', '.join(f's{seed}' for seed in sorted(of_cell['seed']))})"
            for cell, of_cell in own.groupby("cell", sort=False)
        )
        lines.append(f"- {reason}: {', '.join(cells)}")
    return "Not in the numbers:\n\n" + "\n".join(lines) + "\n"


def runs_table(runs: pd.DataFrame) -> str:
    """Every finished run by itself."""
    rows = []
    for row, done, raw in by_cell(runs):
        beside = raw.set_index("run")["reverse"]
        for one in records(done):
            shown = {"recipe": row["recipe"], "run": one["run"]}
            for words, column in RUN_COLUMNS.items():
                shown[words] = f"{100 * one[column]:.1f}" if pd.notna(one.get(column)) else "-"
            rows.append(shown | {"reverse, raw": f"{100 * beside[one['run']]:.1f}"})
    return markdown_table(rows)


def price_table(runs: pd.DataFrame) -> str:
    """What each dial costs."""
    rows = []
    keep = runs[(runs["dial"] == "keep") & runs["switch_dial"].isna() & (runs["masks"] == "rate")]
    for row, done, _ in by_cell(runs):
        shown = {
            "keep's loss": spread_text(_column(done, "keep_loss"), scale=1, digits=4),
            "less keep": _less_keep(done, keep),
            "entropy": f"{done['entropy'].iloc[0]:.4f}" if len(done) else "-",
            "negatives": spread_text(_column(done, "negative_probability"), scale=1, digits=3),
            "ill-formed, %": spread_text(_column(done, "ill_formed")),
            "backwards, %": spread_text(_column(done, "reversed_order")),
            "n (rows, negatives, samples)": _counts(done),
        }
        rows.append(row | shown)
    return markdown_table(rows)


def _less_keep(done: pd.DataFrame, keep: pd.DataFrame) -> str:
    """Keep's loss less that of the same model, recipe and seed under keep."""
    if done.empty:
        return "-"
    axes = ["recipe", "objective", "position_encoding", "length", "clip", "seed", "weights"]
    merged = done.merge(keep, on=axes, suffixes=("", "_keep"))
    if merged.empty or (merged["run"] == merged["run_keep"]).all():
        return "-"
    apart = (merged["keep_loss"] - merged["keep_loss_keep"]).dropna()
    low, high = interval(list(apart))
    return f"{apart.mean():+.5f} [{low:+.5f}, {high:+.5f}]" if len(apart) > 1 else spread_text(apart, scale=1, digits=5)


def _counts(done: pd.DataFrame) -> str:
    if done.empty:
        return "-"
    return ", ".join(f"{int(done[name].iloc[0])}" for name in ("rows", "negatives", "samples"))


def log_table(runs: pd.DataFrame) -> str:
    """What the steps did, and what the probes read at the end."""
    rows = []
    for row, done, _ in by_cell(runs):
        shown = {
            "clipped, %": spread_text(_column(done, "share_clipped")),
            "norm": spread_text(_column(done, "gradient_norm"), scale=1, digits=2),
            "loss": spread_text(_column(done, "loss_at_end"), scale=1, digits=3),
            "dropped terms": spread_text(_column(done, "dropped_terms"), scale=1),
            "dropped weight, %": spread_text(_column(done, "dropped_share"), digits=2),
        }
        for name in ("attention_correlation", "gradient_cosine", "reverse_probability"):
            value, control = _column(done, name), _column(done, f"{name}_control")
            shown[name.replace("_", " ")] = _over_control(value, control)
        rows.append(row | shown)
    return markdown_table(rows)


def switches_table(runs: pd.DataFrame, answers: pd.DataFrame) -> str:
    """Both questions, so many steps after a switch, on both kinds of weights."""
    rows = []
    for (recipe, cell, weights), own in runs[runs["switch_dial"].notna()].groupby(
        ["recipe", "cell", "weights"], sort=False
    ):
        done, first = own[own["status"] == FINISHED], own.iloc[0]
        at = int(first["switch_step"])
        for question in ("reverse", "mirror_reverse"):
            row = {"recipe": recipe, "cell": cell, "switch": f"{first['dial']} → {first['switch_dial']}"}
            row |= {"weights": weights, "question": question, "seeds": f"{len(done)} of {len(own)}"}
            read = _answers(answers, done["run"], str(weights), question)
            values = {f"+{after}": spread_text(read[read["step"] == at + after]["accuracy"]) for after in _AFTER}
            rows.append(row | values)
    return markdown_table(rows)


def _answers(answers: pd.DataFrame, names: pd.Series, weights: str, question: str) -> pd.DataFrame:
    if answers.empty:
        return pd.DataFrame({"step": [], "accuracy": []})
    chosen = answers["run"].isin(names) & (answers["weights"] == weights) & (answers["question"] == question)
    return answers[chosen & (answers["extra"] == 0)]


# ---- the published recipe ----


def places_table(found: pd.DataFrame) -> str:
    """Where the paper's numbers lie among ours."""
    rows = []
    for row in records(found):
        ran = row["n"] > 0
        shown: dict[str, Any] = {"recipe": "P", "model": model_name(row), "L": row["length"]}
        shown |= {"paper": f"{row['paper']:.1f}", "weights": row["weights"], "checkpoints": row["scope"]}
        shown |= {"lowest": f"{row['lowest']:.1f}" if ran else "-", "highest": f"{row['highest']:.1f}" if ran else "-"}
        shown |= {"width": f"{row['width']:.1f}" if ran else "-"}
        shown |= {"percentile": f"{row['percentile']:.0f}" if ran else "-", "reads": row["reads"]}
        rows.append(shown | {"seeds": f"{row['seeds']} of {row['planned']}", "n": row["n"]})
    return markdown_table(rows)


def joint_table(joint: pd.DataFrame) -> str:
    """The joint test."""
    rows = []
    for row in records(joint):
        of_four = f"{row['inside']} inside, {row['not_informative']} not informative, {row['not_run']} not run"
        shown = {"weights": row["weights"], "checkpoints": row["scope"], "RoPE's four values": of_four}
        shown |= {"RoPE above absolute": f"{row['above']} of {row['pairs']} pairs"}
        rows.append(shown | {"joint test": f"**{row['verdict']}**", "numbers": row["numbers"]})
    asked = "Joint test (recipe P): all four inside, and RoPE above the absolute encoding in every seed."
    return f"{asked}\n\n{markdown_table(rows)}"


def wandering_table(table: pd.DataFrame) -> str:
    """Spread and range by rate and width."""
    rows = []
    for row in records(table):
        ran = row["seeds"] > 0
        shown = {name: row[name] for name in ("recipe", "cell")}
        shown |= {"rate": f"{row['learning_rate']:g}", "d": row["d_model"], "weights": row["weights"]}
        shown |= {"seeds": f"{row['seeds']} of {row['planned']}"}
        for name in ("reverse", "spread", "range"):
            shown[name] = f"{100 * row[name]:.1f}" if ran else "-"
        rows.append(shown)
    return markdown_table(rows)
