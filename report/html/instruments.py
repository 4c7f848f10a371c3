"""What a run's folder may hold beside the three probes: how it is drawn, in which words, and the commands that take it.

A reading lies among the run's others, a table over its checkpoints beside its config. The report's tabs and the
dashboard's both draw by this one list.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from ...errors import RevprobeError, first_line
from ...finetune.runs.kept_tables import TABLES
from ...probes.figures.objective_terms import pressure_figure
from ...probes.figures.storage import foretold_figure, one_step_figure, storage_curves_figure
from ...probes.figures.theme import interval_text, message_figure, undefined_text
from ...probes.readings.reading import Reading
from ...probes.statistics.coverage import counted

STORED, EDITED = "stored_evidence", "route_edit"
MANY_HEADS = 40  # edits of more single heads than this are a heat map

# What fills a tab that is empty, in a Python that was started in the folder that the run's path begins in.
_OPENED = "import revprobe as rp\n\nrun = rp.open_run({run!r})\n"
_TAKEN = """reading = {call}
weights = reading.meta["weights"]
reading.save(run.path / "readings" / f"step-{{run.steps[-1]:06d}}" / f"{name}.{{weights}}.parquet")
"""
_KEPT = 'table = {call}\ntable.to_parquet(run.path / "{file}")\n'


@dataclass(frozen=True)
class Source:
    """What a figure is drawn of.

    Attributes:
        call: what takes it in Python; "" where runs keep it by themselves.
        tuned: that of a fine-tuning, where it is another one; None where there is none.
        masked: whether it is one of masked models alone.
        note: what is said under its figures, where that is not what the tab says.
    """

    call: str
    tuned: str | None = ""
    masked: bool = False
    note: str = ""


def _probe(call: str, *, masked: bool = False, note: str = "") -> Source:
    return Source(call, call, masked, note)


_CURVES = "What is stored on the evidence, how much of the attention it has, and what of it arrives, over training."
_ONCE = (
    "Whether the state that answers one direction holds what answers the other: read from held-out facts, beside "
    "shuffled labels, an untrained twin and other evidence (controls); bands: 95 % intervals over facts."
)
_RANKED = (
    "Each head's effect on some facts, and that of the first ones on the other facts, beside random heads of the same "
    "layers (control); bars: 95 % intervals over facts."
)
_COURSE = (
    "The pressure of the kinds of terms on the reverse answer, above that answer's log-odds, over training; dashed: "
    "control (other facts)."
)


SOURCES = {
    STORED: _probe("rp.probe_stored_evidence(run.load(), run.pairs())", masked=True),
    "storage_curves": Source("rp.storage_curves(run)", "rp.storage_curves(run, pairs=run.pairs())", True, _CURVES),
    "stored_once": _probe("rp.probe_stored_once(run.load(), run.pairs())", note=_ONCE),
    EDITED: _probe("rp.probe_route_edit(run.load(), run.pairs())"),
    "head_ranking": _probe("rp.rank_heads(run.load(), run.pairs())", note=_RANKED),
    "one_step": Source("rp.one_step_curves(rp.one_step(run))", None),
    "predictions": Source(""),
    "denoising_trace": _probe("rp.trace_denoising(run.load(), run.pairs())", masked=True),
    "logit_lens": _probe("rp.probe_logit_lens(run.load(), run.pairs(), contributions=True)"),
    "causal_trace": _probe("rp.probe_causal_trace(run.load(), run.pairs())"),
    "objective_terms": _probe("rp.objective_terms(run)", masked=True),
    "pressure": Source("rp.pressure(run)", None, True, _COURSE),
}


@dataclass(frozen=True)
class Drawing:
    """One figure of a tab: what it is drawn of, its words in a list of choices, and the options of the plot.

    Attributes:
        usual: whether a report shows it; what else there is, is asked for in Python or on the dashboard.
    """

    source: str
    words: str
    options: Mapping[str, Any] = field(default_factory=dict)
    usual: bool = True


@dataclass(frozen=True)
class Instrument:
    """A tab: its name in addresses, its words, what is said under its figures, and the figures by their names."""

    name: str
    title: str
    words: str
    note: str
    nothing: str
    drawings: Mapping[str, Drawing]

    @property
    def sources(self) -> list[str]:
        """What it shows, each once, in order."""
        return list(dict.fromkeys(one.source for one in self.drawings.values()))

    def note_of(self, source: str) -> str:
        """What is said under a figure of it."""
        return SOURCES[source].note or self.note


def _more(source: str, words: str, **options: Any) -> Drawing:
    return Drawing(source, words, options, usual=False)


_ALL = (
    Instrument(
        "storage",
        "Stored evidence",
        "Storage",
        "What the target's logit is made of, forward and reverse: the stored evidence routed to the readout row, and "
        "what reaches it otherwise; bars: 95 % intervals over facts.",
        "No run has a reading of stored evidence.",
        {
            "parts": Drawing(STORED, "parts of the target's logit"),
            "matrix": _more(STORED, "the matrix S, fact by fact", kind="matrix"),
            "curves": Drawing("storage_curves", "storage and routing over training"),
            "once": Drawing("stored_once", "whether a fact is stored once"),
        },
    ),
    Instrument(
        "edits",
        "Edited routes",
        "Edits",
        "How the target's log-probability changes when attention from the readout rows to the evidence is edited, "
        "beside the same edit of other positions (control); bars: 95 % intervals over facts.",
        "No run has a reading of an edited route.",
        {
            "reverse": Drawing(EDITED, "reverse queries"),
            "forward": _more(EDITED, "forward queries", direction="forward"),
            "ranking": Drawing("head_ranking", "heads by their effect"),
        },
    ),
    Instrument(
        "one-step",
        "One optimizer step",
        "One step",
        "What one optimizer step changes, and what the gradients say before it: the derivative along the update that "
        "is made, so that only curvature lies between the two; bands: 95 % intervals over facts.",
        "No run has a table of single steps.",
        {
            "step": Drawing("one_step", "one step from each checkpoint"),
            "foretold": Drawing("predictions", "the step after each snapshot"),
        },
    ),
    Instrument(
        "denoising",
        "Denoising",
        "Denoising",
        "The target's probability while the model fills the hidden tokens in step by step, beside the same with "
        "facts shuffled (control), and which layers look at the evidence meanwhile; bands: 95 % intervals over facts.",
        "No run has a trace of denoising.",
        {
            "steps": Drawing("denoising_trace", "probability over the steps"),
            "layers": _more("denoising_trace", "attention to the evidence by layer and step", kind="layers"),
            "heads": _more("denoising_trace", "attention by layer and head, first step", kind="heads"),
        },
    ),
    Instrument(
        "lens",
        "Logit lens",
        "Lens",
        "What the residual stream says of the target after each layer, read by the model's own unembedding, beside "
        "the same with facts shuffled (control); bands: 95 % intervals over facts.",
        "No run has a reading of the logit lens.",
        {
            "layers": Drawing("logit_lens", "by layer, both directions"),
            "heads": _more("logit_lens", "each head and MLP, reverse", kind="heads"),
            "heads-forward": _more("logit_lens", "each head and MLP, forward", kind="heads", direction="forward"),
        },
    ),
    Instrument(
        "tracing",
        "Causal tracing",
        "Tracing",
        "How much of the target's log-probability comes back when a state of the clean run is put into the query with "
        "other evidence, and beside it the same with a third fact's state (control); means over pairs.",
        "No run has a causal trace.",
        {
            "effect": Drawing("causal_trace", "effect in nats"),
            "share": _more("causal_trace", "restored share", measure="share"),
        },
    ),
    Instrument(
        "terms",
        "Terms of the objective",
        "Objective terms",
        "What each kind of term of the training objective does to the reverse answer: above 0 a step on it lowers the "
        "reverse loss. Hollow: left out of training. Bars: 95 % intervals over facts; grey: control (other facts).",
        "No run has its objective taken apart.",
        {
            "pressure": Drawing("objective_terms", "pressure on the reverse answer"),
            "change": _more("objective_terms", "change by the coming step", measure="change_adamw"),
            "share": _more("objective_terms", "share of the objective", measure="share"),
            "cosine": _more("objective_terms", "cosine with the reverse gradient", measure="cosine"),
            "course": Drawing("pressure", "pressure over training"),
        },
    ),
)
INSTRUMENTS = {one.name: one for one in _ALL}
_TABLE_FIGURES: dict[str, Callable[..., go.Figure]] = {
    "storage_curves": storage_curves_figure,
    "one_step": one_step_figure,
    "predictions": foretold_figure,
    "pressure": pressure_figure,
}


def drawn(found: Reading | pd.DataFrame, drawing: Drawing, **more: Any) -> go.Figure:
    """One reading or table as a figure; what cannot be drawn says why.

    Args:
        more: options beside the drawing's own: `weights` of `storage_curves`.
    """
    try:
        if isinstance(found, pd.DataFrame):
            return _TABLE_FIGURES[drawing.source](found, **drawing.options, **more)
        options = dict(drawing.options) | more
        if found.name == EDITED:
            single = found.frame.loc[found.frame["scope"] == "head", ["layer", "head"]].drop_duplicates()
            options["kind"] = "heatmap" if len(single) > MANY_HEADS else "intervals"
        return found.plot(**options)
    except RevprobeError as error:
        return message_figure(first_line(error, with_type=False))
    except (KeyError, ValueError, TypeError, IndexError) as error:
        return message_figure(f"This reading cannot be drawn: {first_line(error)}")


def at_place(reading: Reading, layer: int | None, head: int | None) -> Reading:
    """A reading of edits without those of other layers and heads; the edit of everything at once stays."""
    frame = reading.frame
    keep = pd.Series(True, index=frame.index)
    for column, wanted in (("layer", layer), ("head", head)):
        if wanted is not None:
            keep &= frame[column].isna() | (frame[column] == wanted)
    return reading if keep.all() else reading.part(frame[keep])


def numbers_said(found: Reading | pd.DataFrame, drawing: Drawing) -> list[str]:
    """What a figure rests on: value, interval, control, pairs and facts, and what is undefined, a line each.

    Under a figure of forward queries the pairs that were asked alone: a reading's own numbers are of the reverse ones,
    and the figure's heading has those of the forward ones.
    """
    if isinstance(found, pd.DataFrame):
        return [_sizes(found)]
    if drawing.options.get("direction") == "forward":
        return [f"asked: {counted(found.frame['pair'].nunique(), found.frame['fact'].nunique(), found.name)}"]
    said = []
    measures = found.measures().to_dict("records")
    for row in measures:
        why = undefined_text(found.undefined) if len(measures) == 1 else row["reason"]
        numbers = interval_text(*(float(row[name]) for name in ("value", "low", "high", "control")))
        numbers += f" {found.unit}" if found.unit and not math.isnan(float(row["value"])) else ""
        words = [f"{row['measure'].replace('_', ' ')} {numbers}", counted(int(row["n"]), int(row["facts"]), found.name)]
        words += [f"undefined: {why}"] if row["reason"] else []
        said.append("; ".join([", ".join(words[:2]), *words[2:], *filter(None, [row["caution"]])]))
    return said


def _sizes(table: pd.DataFrame) -> str:
    """Pairs and facts behind the rows of a table over checkpoints."""
    told, both = [], "facts" in table
    for column, one, many in (("n", "pair", "pairs"), ("facts" if both else "n", "fact", "facts"))[not both :]:
        if column in table:
            sizes = sorted({int(value) for value in table[column].astype(float) if not math.isnan(value) and value > 0})
            if sizes:
                range_ = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
                told.append(f"{range_} {one if sizes == [1] else many}")
    return f"n = {' of '.join(told)}" if told else "n is not in the table"


def why_not(source: str, *, objective: object, tuned: bool) -> str:
    """Why a run has no such thing, and cannot be asked for it; "" where it can."""
    about = SOURCES[source]
    if about.masked and objective == "causal":
        return "of masked models alone: this run's model is causal"
    if not about.call:
        return "" if tuned else "kept by fine-tunings alone, by themselves"
    return "not of fine-tunings: it takes the steps of `revprobe train`" if tuned and about.tuned is None else ""


def command(source: str, run: str, *, tuned: bool = False) -> str:
    """The Python that puts it into a run's folder; "" where the run keeps it by itself.

    Args:
        run: the run's path, from where Python is started.
    """
    about = SOURCES[source]
    call = (about.tuned if tuned else about.call) or ""
    if not call:
        return ""
    ending = _KEPT.format(call=call, file=TABLES[source]) if source in TABLES else _TAKEN.format(call=call, name=source)
    return _OPENED.format(run=run) + ending
