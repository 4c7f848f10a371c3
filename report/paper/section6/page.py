"""The page of Section 6 in miniature, from its tables alone: findings first, then every cell with its n."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ....atomic_files import write_text
from ....probes.statistics.coverage import FEWEST
from ..markdown import folded
from . import tables, traces
from .blocks import Block, Figure, Items, Section, Table, Text
from .figures import figures
from .frames import Section6
from .plan import MAIN
from .sentences import Told

TITLE = "Section 6 in miniature: forward-only fine-tuning of small models"
PAGE = "section6.md"
ABOUT_QUICK = (
    "This is the quick variant of `revprobe reproduce section6 --quick`: {quick}. It shows that the whole path works, "
    "from pretraining to this page, and **is no result**: no number or verdict below says anything about the paper."
)
WORDS = (
    "**Forward**: exact match (decoded greedily, lower-cased, blanks stripped) on the questions that a trained "
    "direction answers; **reverse**: on those of the other direction, about the same facts, whose reverse "
    "statements were never trained. **Floor**: the same about held-out facts, never trained in any direction. A "
    "cell is mean ± standard deviation over seeds, its 95 % interval over seeds (of one seed over facts), the "
    "seeds that are in it, n questions over them and the facts of each seed. Three seeds that are all at 0 % do "
    "not tell what a fourth would be, and their interval allows for seeds that answer all or nothing: 0 to 70.8 %, "
    "and 29.2 to 100 % where all are at 100 %. All seeds are asked about the same facts, so no interval over seeds "
    "is narrower than the seeds' own over facts, on average. Where seeds have many questions each, such intervals "
    f"were seen to hold the truth 90 % of the time only from {FEWEST['proportion'][math.inf]} seeds on: what one "
    "seed in four does may be missing among three. Seeds vary the fine-tuning: those of a cell start from one "
    "pretrained model. †k: in k seeds forward is below 90 % or undefined at the last step; such a cell stands with "
    "its forward value, never tuned or dropped (mini-mlm and the never-mask ablations are exempt by design). Which "
    "texts count as a right description stands in `docs/relations.md`. **Ranked first**: the right answer is the "
    "likeliest of all candidates."
)
# The readings of runs that were trained at these commits counted facts that a model is shown as one prompt apart.
COUNTED_APART = {
    "2d40a2fa3e9c88f8b040552197155b92c3efa34f",
    "a21ca3ad7fa8555a273007457a136ed603da34bf",
    "e0daec659f719193ca77b4ec57971dd83b7393b1",
    "76d0b072329fcc40c3194a183f66b2727d54a5d8",
}
ABOUT_PROMPTS = (
    "A hidden target leaves siblings, or the two parents of a child, one prompt: the 100 facts that the probes are "
    "asked about are 71 prompts to a causal model (Parent-Child) and 88 to a masked one (P2C; C2P: 100), of T-REx "
    "92 and 98. Most readings here were taken when such facts still counted as drawn apart: there the intervals of "
    "the signatures, of their excess over the control (on which T4 rests) and what *rose* or *fell* are somewhat "
    "too narrow, and some facts' controls met their own prompt or evidence."
)
ABOUT_LOOK_ALIKE = (
    "trex is the look-alike that `revprobe data` writes, not the published sample, and is asked in a wording that was "
    "not trained, which models this small do not carry over: its cells say little about direction."
)
WRONG = (
    "Wrong answers: end, nothing stands before the end; prompt, words of the question; own entity, another answer "
    "about the fact; other entity, another fact's answer; malformed, anything else."
)
ABOUT_BEGINS = (
    "A looser score of the same decodings, on which no verdict rests: right where a decoding begins with a right "
    'answer and goes on with another word or sign. D2P trains on sentences that go on behind the name ("NAME now '
    'enjoys a quiet life") and asks for the name alone: a model that has learned whose description it is, and ends '
    "as it was taught to, has no exact match. Not collected: of runs whose answers were no longer at hand."
)
READINGS = (
    "Two readings of each cell: at the last step, the same for all, here; and at the first checkpoint of at least "
    "90 % forward, below, since what is answered backwards depends on when one stops."
)
ABOUT_PAPER = (
    "The paper's values are of 8B models and a pattern to compare, never a target: which side is higher. Its Table 7 "
    "is printed in full in the text at hand; its ranks, rates and steps are not. Per cent, means over seeds; a seed "
    "*holds* where the side that the paper has higher is higher here, and *cannot be told* below 90 % forward. Where "
    "nothing is answered backwards, forward is higher by itself. mini-mlm has no counterpart."
)
ABOUT_RANKS = (
    "Reverse questions about trained facts at the last step. Control: the rank with facts shuffled; chance: "
    "right candidates over all, per cent. A candidate is an entity, as likely as the likeliest text that names it; "
    "where their number is one of texts, each text is one, as in the first runs: of Parent-Child each names another "
    "entity, elsewhere the right one in other words may stand ahead of the right answer. Held-out facts ranked first "
    "is the floor of the rank; they have the trained facts' answers and their own as candidates, so that a model "
    "which prefers what it was trained on ranks none of them first."
)
ABOUT_SIGNATURES = (
    "Masked models are asked for the same target from the same evidence in either order (same target), causal models "
    "another question (swapped roles): the two kinds are not compared with each other. Value and 95 % interval over "
    "facts at the last step, seed by seed; before: step 0; control: facts shuffled, mean over seeds; above control: "
    "in how many seeds the interval of the excess lies above 0. Untrained twin: the same configuration with initial "
    "weights on the same pairs; it may stand high on its own, and a signature needs to be held against it (mini-mlm's "
    "is mini-llada's: one configuration). The control says that a signature is of these facts, not that fine-tuning "
    "made it: before stands beside it. The autoregressive twins are mini-llama and mini-qwen2."
)
ABOUT_VERDICTS = (
    "Each prediction, written in the YAML before the runs, seed by seed: *holds*, *fails*, *cannot be told* or *not "
    "run*. T1 to T5 cannot be told where a cell that is compared is below 90 % forward at its last step (mini-mlm "
    "need not be above); T4 and T5 also where it has never reached 90 %, T4 where an interval of the excess is not "
    "clear of 0, T5 where there is one such checkpoint alone, T3 where mini-llada's reverse is at the floor. An "
    "ablation cannot be told where its own cell is below 90 % forward and the prediction needs it; plain may be "
    "below, and its forward answers then stand beside it. Nothing is told by a number that is undefined. Where no "
    "other verdict was possible the reason stands beside it. Numbers in per cent."
)
ABOUT_ABLATIONS = (
    "mini-llada, P2C; what is changed is the variant's name (`examples/section6_ablations.yaml`), and what has to "
    "change with it: bare-* have no template and price padding on both sides, one-span draws its rates one by one, "
    "absolute and read-* start from another pretrained model, llama-read-* are mini-llama, held against its own "
    "cell. Plain is the main table's cell; its seeds are paired with the ablations'. First entity in place: the "
    "probes' forward query, \"[M]'s child is B\". A null of end-unpriced says nothing about the one-layer claim; "
    f"its decodings do not end as nothing taught them to, so exact match says nothing of what it knows. {WRONG}"
)
ABOUT_METHODS = (
    "Two models, P2C and D2P; smdm and differ are recipes of masked models, so mini-llama has none of them. LoRA "
    "is the main table's cell; the steps of a recipe in epochs are its own. Begins with it: the looser score of "
    f"*Answers that go on*. {WRONG}"
)
ABOUT_MODELS = (
    "What the small models learned before, on other people. Told facts, asked in both directions; untold facts are the "
    "floor. Weights are not committed: the command makes them, and these are their hashes."
)
ABOUT_MADE_AGAIN = (
    "‡k: in k seeds it starts from a small model that was made again, by the same command and of the same corpus, to "
    "other bytes, as sums are rounded otherwise on another processor or with other software. Such a model is one of "
    "another seed: what it answers before is in the table of small models, and seeds of a cell with some of both, or "
    "rows beside each other, differ by more than what their names say."
)
ABOUT_STARTS = "These runs start from a small model made again:"
ABOUT_TRAINING = "Forward / reverse exact match on trained facts, per cent, means over seeds, by optimizer step."


def sections(found: Section6) -> list[Section]:
    """The page's sections, the findings first."""
    told = Told(found)
    return [
        Section("", _findings(told)),
        Section("Words", [Text(_words(found))]),
        *_answers(found, told),
        Section("Signatures", [Text(ABOUT_SIGNATURES), Table(tables.signatures(found))]),
        Section("Which predictions hold?", [Text(ABOUT_VERDICTS), Table(tables.verdicts(told.main))]),
        Section("What the paper and the one-layer results say", [Table(tables.verdicts(told.others))]),
        Section(
            "What of the recipe decides?",
            [
                Text(ABOUT_ABLATIONS),
                Table(tables.ablations(found, told.ablations)),
                Text("What decides each verdict:"),
                Table(tables.verdicts(told.ablations)),
            ],
        ),
        Section("LoRA, all weights, and recipes of others", [Text(ABOUT_METHODS), Table(tables.methods(found))]),
        Section("Inside one trained model", traces.blocks(found)),
        Section("The small models", _small_models(found)),
        Section("Not run", _left(found)),
        Section("Where the numbers come from", origin(found.about)),
    ]


def _words(found: Section6) -> str:
    """What the words mean, and what is to be known of these runs."""
    commits = str(found.about.get(MAIN, {}).get("trained_at_commit") or "").split(", ")
    apart = not COUNTED_APART.isdisjoint(commits)
    return WORDS + f" {ABOUT_PROMPTS}" * apart + f" {ABOUT_MADE_AGAIN}" * bool(found.from_made_again)


def _look_alike(found: Section6) -> str:
    """Said of T-REx where the published sample was not at hand."""
    trex = found.about.get("data", {}).get("data/trex", {})
    return f" {ABOUT_LOOK_ALIKE}" if trex.get("look_alike") else ""


def _findings(told: Told) -> list[Block]:
    """Four sentences, what contradicts under the first; then the figures."""
    quick = told.found.about.get("quick")
    sentences: list[Block] = [Text(ABOUT_QUICK.format(quick=quick), "No result")] if quick else []
    sentences.append(Text(told.contradictions(), "Predictions"))
    if failed := told.failures():
        sentences.append(Items(failed))
    sentences += [
        Text(told.table_7(), "Table 7"),
        Text(told.routes(), "Routes and ranks"),
    ]
    if ranked := told.ranked_first():
        sentences.append(Items(ranked))
    sentences.append(Text(told.recipe(), "Recipe"))
    sentences.append(Text(f"{told.coverage()} No configuration was chosen by what is on this page."))
    drawings = figures(told.found)
    if not drawings:
        return [*sentences, Text("Figures 4 and 6: not run.")]
    return [*sentences, *(Figure(file, words, svg) for file, (words, svg) in drawings.items())]


def _answers(found: Section6, told: Told) -> list[Section]:
    return [
        Section("Table 7 at the last step", [Text(READINGS + _look_alike(found)), Table(tables.table_7(found))]),
        Section("Table 7 at the first checkpoint of 90 % forward", [Table(tables.table_7(found, first=True))]),
        Section("Answers that go on", [Text(ABOUT_BEGINS), Table(tables.begins(found))]),
        Section("The floor: facts never trained", [Table(tables.table_7(found, split="heldout"))]),
        Section(
            "Beside the paper",
            [Text(ABOUT_PAPER + _look_alike(found)), Table(tables.beside_the_paper(found, told.others))],
        ),
        Section("Rank among the candidates", [Text(ABOUT_RANKS), Table(tables.ranks(found))]),
        Section("Reverse against forward over training", [Text(ABOUT_TRAINING), Table(tables.over_training(found))]),
    ]


def _small_models(found: Section6) -> list[Block]:
    blocks: list[Block] = [Text(ABOUT_MODELS), Table(tables.models(found))]
    if again := tables.made_again(found):
        blocks += [Text(ABOUT_STARTS), Items(again)]
    return blocks


def _left(found: Section6) -> list[Block]:
    left = tables.not_run(found)
    if found.runs.empty:
        return [Text("Nothing has been collected; every cell above says so.")]
    return [Items(left)] if left else [Text("Every planned run is in the tables.")]


def origin(about: dict[str, Any]) -> list[Block]:
    """Commands, commits, software and data, as they were collected."""
    if not about:
        return [Text("Nothing has been collected: `revprobe reproduce section6`, then `examples/collect_section6.py`.")]
    lines = []
    if about.get("collected_at_commit"):
        lines.append(f"Collected {about['collected']} at commit {about['collected_at_commit']}.")
    for name, sweep in about.items():
        if not isinstance(sweep, dict) or "command" not in sweep:
            continue
        line = f"`{sweep['command']}`"
        if "finished" in sweep:
            line += f": {len(sweep['finished'])} runs finished, {len(sweep['not_run'])} not"
        versions = "; ".join(
            ", ".join(f"{key} {value}" for key, value in one.items()) for one in sweep.get("versions", [])
        )
        line += f" ({versions})" if versions else ""
        if sweep.get("trained_at_commit"):
            line += f", trained at commit {sweep['trained_at_commit']}"
        if sweep.get("unchanged_since"):
            line += (
                f"; its YAML, comments and all (sha256 {sweep['file_sha256'][:12]}), is unchanged since "
                f"{sweep['unchanged_since']}, commit {sweep['unchanged_since_commit']}"
            )
        lines.append(f"{name}: {line}.")
    lines += [f"{path}: {_data(one)}." for path, one in about.get("data", {}).items()]
    return [Items(lines)]


def _data(one: dict[str, Any]) -> str:
    if one["sha256"] is None:
        return "not at hand when this was collected"
    kind = "the look-alike that `revprobe data` writes" if one["look_alike"] else "no look-alike"
    return f"{kind}, sha256 {one['sha256'][:12]}"


def title(found: Section6) -> str:
    """The page's heading, which says so where the numbers are no result."""
    return f"{TITLE} (quick variant, no result)" if found.about.get("quick") else TITLE


def markdown(found: Section6) -> str:
    """The whole page."""
    parts: Sequence[str] = [f"# {title(found)}", *(section.markdown() for section in sections(found))]
    return folded("\n\n".join(part.strip() for part in parts) + "\n")


def write_markdown(found: Section6, folder: Path) -> Path:
    """The page and its figures, each whole or not at all; returns the page."""
    for file, (_, svg) in figures(found).items():
        write_text(folder / file, svg)
    write_text(folder / PAGE, markdown(found))
    return folder / PAGE
