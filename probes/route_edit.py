"""The causal probe: what happens to the answer when the route to the evidence is cut, moved or scaled?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from ..arguments import checked
from ..errors import RevprobeError, did_you_mean
from ..hooks.attention_sites import Attention
from ..models.probed import ProbedModel, as_probed
from ..models.structure import attention_of
from ..progress import Progress, shows_progress
from .attention import EVIDENCE_HIDDEN
from .edits import choose_heads, choose_layers
from .pairs.pairs import ReversalPairs
from .pairs.query import Query
from .passes.asked import asked_pairs, out_of_sight
from .passes.batches import prepare_queries, queries_per_batch, require_tokens_alone
from .passes.likelihood import Likelihoods
from .passes.plan import PassResult, Plan
from .passes.route_changes import EDITS, MATCHES
from .passes.route_runs import CONTROL, EVIDENCE, Cell, RouteEdit, RouteResult, RouteRuns
from .passes.run import describe
from .passes.selection import listed
from .readings.reading import Reading
from .statistics.estimators import LATER_BLOCK
from .statistics.resampling import SHOWN_IN

SCOPES = ("all", "layer", "head")
ONLY_KEY = "the evidence is all that the readout row sees"
NO_STRENGTH = "the evidence is hidden, or alone, in one of the two queries"
NO_POSITION = "no other visible positions for the control"
UNEVEN = "the control could not be made in every row, head and layer of the edit"
ZERO_BEFORE = "probability 0 before the edit"
ZERO_AFTER = "probability 0 under the edit"
ZERO_CONTROL = "probability 0 under the control's edit"
MATCH, FACTOR = "log_odds", 2.0
NUMBERS = ("log_probability", "log_probability_edited", "change", "log_probability_control", "change_control")


@checked
@shows_progress("runs")
def probe_route_edit(
    model: ProbedModel | nn.Module,
    pairs: ReversalPairs,
    *,
    edit: str = "knockout",
    match: str = MATCH,
    factor: float = FACTOR,
    scope: str = "head",
    mode: str = "chain",
    batch_size: int | None = None,
    layers: Iterable[int] | None = None,
    heads: Iterable[int] | None = None,
    control: bool = True,
    progress: Progress | bool | None = None,
    seed: int = 0,
) -> Reading:
    """Change the attention from readout rows to the evidence and see how the target's log-probability changes.

    The value is the mean change over pairs, in nats, of the reverse query with all chosen layers and heads edited at
    once. The control makes the same change to the scores of other positions, as many as the evidence has tokens, in
    the same rows, heads and layers: those in which the evidence is visible (windows and chunks hide it from some).
    They are drawn at random per query among the positions that are visible in all of these, unmasked and neither
    target nor evidence; in a causal model the draw may fall on the begin token, often an attention sink.

    Edits:
        knockout: the evidence's scores become -inf at the readout rows.
        transplant: the reverse query runs with the log-odds that the forward query's row has on its evidence (its
            score less logsumexp of the other scores), in the same layer and head, and the forward query with those of
            the reverse. Donors are runs without edits. Evidence of several tokens counts as one set: all its scores
            shift by one constant. Row k of a target takes over row k of the other; where the targets differ in length
            (swapped pairs), every row takes the mean. `match="score"` matches the score itself (logsumexp over the
            set), and leaves the competition of the other keys as it is. The control's shift is worked out in the
            control's own run: beyond the first edited layer its scores are no longer those of the edited run.
        scale: the odds of the evidence are multiplied by `factor` (log(factor) is added to its scores).

    Args:
        scope: which sets of heads are edited, one after the other: "all" (everything chosen at once), "layer" (and
            each layer), "head" (and each head): 2, 2 (1 + layers), 2 (1 + layers + layers x heads) runs per query.
        mode: "chain" or "parallel", as in `probe_reverse_probability`; every readout row is edited.
        layers, heads: what is edited, all when None.

    Frame: pair, fact, kind, direction (of the query that is edited), scope, layer, head (missing: all chosen),
    log_probability, log_probability_edited, change, log_probability_control, change_control (nats), edited (the
    fraction of rows, layers and heads that had a route to edit), edited_control (the fraction in which the control
    was made, the same wherever change_control is defined), reason, reason_control. A change from or to probability 0
    has no finite size: it is undefined, and the log-probabilities stay. Chosen layers without softmax attention are
    in meta["layers_without_attention"] and, unless scope is "all", NaN rows.
    Raises: RevprobeError, for an unknown option, one that the edit does not use, a layer or head the model lacks, or
        queries that do not fit the model.
    Source: paper Sec. 4.2, where the route is the attention weight from the readout row to the evidence.
    """
    model = as_probed(model)
    plan = Plan(mode=mode, control=control, batch_size=batch_size, seed=seed, progress=progress)
    done = _RouteProbe(model, pairs, plan, _require_edit(edit, match, factor), _one_of("scope", scope, SCOPES))
    return done.reading(layers, heads)


@dataclass
class _RouteProbe:
    """One call of the probe: from options to jobs, and from results to the frame."""

    model: ProbedModel
    pairs: ReversalPairs
    plan: Plan
    edit: RouteEdit
    scope: str
    unseen: np.ndarray = field(init=False)  # queries whose evidence lies in a later block

    def reading(self, layers: Iterable[int] | None, heads: Iterable[int] | None) -> Reading:
        model, plan = self.model, self.plan
        require_tokens_alone(model, "the positions that an edit and its control may stand at")
        self.pairs = asked_pairs(model, self.pairs, "route_edit")
        queries = prepare_queries(model, self.pairs.queries)
        self.unseen = out_of_sight(model, queries)
        attention = attention_of(model)
        asked = None if layers is None else listed("layer", layers)
        without_attention = [layer for layer in attention.without if asked is None or layer in asked]
        chosen = choose_layers(
            model, attention, None if asked is None else [n for n in asked if n not in without_attention] or asked
        )
        kept = choose_heads(model, attention, heads)
        cells = _cells({layer: attention.heads[layer] for layer in chosen}, kept, self.scope)
        result, unit_of = self._run(queries, attention, cells)
        silent = {layer: attention.without[layer] for layer in without_attention} if self.scope != "all" else {}
        frame = self._frame(result, cells, unit_of, silent)
        reading = Reading("route_edit", frame, describe(model, PassResult(self.pairs, np.array([]), []), plan))
        options: dict[str, Any] = {"edit": self.edit.name, "scope": self.scope, "mode": plan.mode}
        options |= {"layers": chosen, "heads": kept, "layers_without_attention": without_attention}
        options |= {"match": self.edit.match} if self.edit.name == "transplant" else {}
        options |= {"factor": self.edit.factor} if self.edit.name == "scale" else {}
        reading.meta.update(options | {"statistic": reading.measured.statistic})
        return reading

    def _run(
        self, queries: Sequence[Query], attention: Attention, cells: Sequence[Cell]
    ) -> tuple[RouteResult, dict[str, np.ndarray]]:
        """Run everything; the unit of each pair is given by direction."""
        pricing = Likelihoods.of(self.model, queries, self.pairs, self.plan.mode)
        parallel = self.plan.mode == "parallel"
        steps = [[q] if parallel else list(pricing.conditionals(i, q.target)) for i, q in enumerate(queries)]
        sides = {"forward": self.pairs.forward, "reverse": self.pairs.reverse}
        donors = {"forward": self.pairs.reverse, "reverse": self.pairs.forward}
        donors = donors if self.edit.name == "transplant" else sides
        units: dict[tuple[int, int], int] = {}
        unit_of = {
            side: np.array(
                [units.setdefault((int(q), int(d)), len(units)) for q, d in zip(own, donors[side], strict=True)]
            )
            for side, own in sides.items()
        }
        distinct = list({cell.members: cell for cell in cells}.values())
        size = queries_per_batch(self.model, queries, self.plan.batch_size)
        seed = self.plan.seed if self.plan.control else None
        runs = RouteRuns(
            self.model, attention, self.edit, queries, steps, list(units), distinct, size, seed, self.plan.progress
        )
        result = runs.run()
        # A single layer of one head is the same edit in all three scopes: it ran once.
        place = [[cell.members for cell in distinct].index(cell.members) for cell in cells]
        spread = (part[:, place] for part in (result.after, result.emptied, result.asked, result.left))
        return RouteResult(result.before, *spread), unit_of

    def _frame(
        self,
        result: RouteResult,
        cells: Sequence[Cell],
        unit_of: dict[str, np.ndarray],
        without_attention: Mapping[int, str],
    ) -> pd.DataFrame:
        parts = [
            self._cell_frame(result, direction, unit_of[direction], place, cell)
            for direction in ("forward", "reverse")
            for place, cell in enumerate(cells)
        ]
        nothing: dict[str, float] = dict.fromkeys(NUMBERS[1:], np.nan) | {"edited": 0.0, "edited_control": 0.0}
        unedited = [part.assign(**nothing) for part in parts[:: len(cells)]]
        for layer, why in without_attention.items():
            parts += [part.assign(scope="layer", layer=layer, reason=why, reason_control=why) for part in unedited]
        frame = pd.concat(parts, ignore_index=True)
        frame = frame.astype({"layer": "Int64", "head": "Int64"})
        frame = frame.sort_values(["pair", "direction"], kind="stable", ignore_index=True)
        controls = ["log_probability_control", "change_control", "edited_control", "reason_control"]
        return frame if self.plan.control else frame.drop(columns=controls)

    def _cell_frame(
        self, result: RouteResult, direction: str, units: np.ndarray, place: int, cell: Cell
    ) -> pd.DataFrame:
        """One direction and cell: each pair's own numbers, NaN with the reason where the edit has no meaning."""
        sides = self.pairs.forward, self.pairs.reverse
        index, donor = sides if direction == "forward" else sides[::-1]
        unseen = self.unseen[index] | (self.unseen[donor] & (self.edit.name == "transplant"))
        before, after = np.where(self.unseen[index], np.nan, result.before[index]), result.after[units, place]
        asked, left, emptied = (part[units, place] for part in (result.asked, result.left, result.emptied))
        with np.errstate(invalid="ignore"):  # without a control run nothing was asked
            made = 1.0 - left / asked
        failed = _failures(self.edit.name, made, emptied)
        failed[unseen] = LATER_BLOCK
        logs = np.where(failed != "", np.nan, after)
        reasons = _reasons(failed, before, logs)
        with np.errstate(invalid="ignore"):  # of probability 0
            changes = np.where(reasons == "", logs - before[:, None], np.nan)
        # A transplant's number is of the prompts of both directions, whichever it answers.
        of_both = SHOWN_IN.values() if self.edit.name == "transplant" else ()
        numbers = (before, logs[:, EVIDENCE], changes[:, EVIDENCE], logs[:, CONTROL], changes[:, CONTROL])
        return pd.DataFrame(
            {
                "pair": np.arange(len(index)),
                "fact": self.pairs.facts.astype(str),
                "kind": self.pairs.kind,
                "direction": direction,
                "scope": cell.scope,
                "layer": pd.array([cell.layer] * len(index), dtype="Int64"),
                "head": pd.array([cell.head] * len(index), dtype="Int64"),
                **dict(zip(NUMBERS, numbers, strict=True)),
                "edited": made[:, EVIDENCE],
                "edited_control": made[:, CONTROL],
                "reason": reasons[:, EVIDENCE],
                "reason_control": reasons[:, CONTROL],
                **{name: values for name, values in self.pairs.flags.items() if name not in of_both},
            }
        )


def _failures(edit: str, made: np.ndarray, emptied: np.ndarray) -> np.ndarray:
    """Why an edit was not made, "" where it was; a control counts only if it was made as often as the edit itself.

    Shapes: `made` (fraction of rows, heads and layers), `emptied`: `pair side -> pair side`.
    """
    nothing = NO_STRENGTH if edit == "transplant" else EVIDENCE_HIDDEN
    own = np.select([emptied[:, EVIDENCE], made[:, EVIDENCE] == 0.0], [ONLY_KEY, nothing], "").astype(object)
    uneven = (made[:, CONTROL] != made[:, EVIDENCE]) | emptied[:, CONTROL]
    control = np.select([own != "", np.isnan(made[:, CONTROL]), uneven], [own, NO_POSITION, UNEVEN], "")
    return np.stack([own, control], 1).astype(object)


def _reasons(failed: np.ndarray, before: np.ndarray, logs: np.ndarray) -> np.ndarray:
    """Why a change is undefined, "" where it is not; a control is undefined wherever its edit is.

    Shapes: `failed`: `pair side`, `before`: `pair`, `logs` (log-probabilities under the edit): `pair side`; returns
    `pair side`.
    """
    under = np.where(np.isneginf(logs), np.array([ZERO_AFTER, ZERO_CONTROL]), "")
    zero = np.where(np.isneginf(before)[:, None], ZERO_BEFORE, under)
    own, control = np.where(failed != "", failed, zero).T
    return np.stack([own, np.where(own != "", own, control)], 1)


def _cells(layers: Mapping[int, int], heads: Sequence[int], scope: str) -> list[Cell]:
    """Everything at once, then each layer, then each head, as far as the scope goes. `layers`: layer -> its heads."""
    members = {layer: [(layer, head) for head in heads if head < most] for layer, most in layers.items()}
    cells = [Cell("all", None, None, frozenset(one for layer in members.values() for one in layer))]
    if scope != "all":
        cells += [Cell("layer", layer, None, frozenset(inside)) for layer, inside in members.items()]
    if scope == "head":
        cells += [Cell("head", *one, frozenset([one])) for inside in members.values() for one in inside]
    return [cell for cell in cells if cell.members]


def _require_edit(edit: str, match: str, factor: float) -> RouteEdit:
    number = isinstance(factor, Real) and not isinstance(factor, bool)
    if not (number and factor > 0 and math.isfinite(factor)):
        raise RevprobeError(f"factor {factor!r}: expected a positive number; edit='knockout' cuts a route")
    made = RouteEdit(_one_of("edit", edit, EDITS), _one_of("match", match, MATCHES), float(factor))
    for what, value, default, user in (("match", match, MATCH, "transplant"), ("factor", factor, FACTOR, "scale")):
        if value != default and edit != user:
            raise RevprobeError(f"{what}={value!r} has no say in edit={edit!r}: leave it out, or use edit={user!r}")
    return made


def _one_of(what: str, value: str, known: Sequence[str]) -> str:
    if value not in known:
        raise RevprobeError(f"unknown {what} {value!r}{did_you_mean(value, known)}")
    return value
