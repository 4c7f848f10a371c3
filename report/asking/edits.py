"""Edits after which a question is asked again: what each does to a query, and what its control does instead.

Edits of the route are `rp.probe_route_edit`'s own. Edits of tokens are other queries, priced by
`rp.probe_reverse_probability` beside the unedited one; a change is the difference of two of its log-probabilities.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ...errors import RevprobeError, did_you_mean
from ...models.probed import ProbedModel
from ...probes.pairs.pairs import ReversalPairs
from ...probes.pairs.query import Query, ReversalPair
from ...probes.passes.route_changes import other_positions
from ...probes.probability import probe_reverse_probability
from ...probes.route_edit import NO_POSITION, probe_route_edit

EDITS = {
    "none": "none",
    "knockout": "knock out the route to the evidence",
    "transplant": "transplant the other query's route",
    "scale": "scale the route",
    "mask": "mask another token",
    "swap": "swap the evidence",
}
ROUTE = ("knockout", "transplant", "scale")
MATCHES = {"log_odds": "its log-odds", "score": "its score"}
NO_COUNTERPART = "the token chosen in the other query is not found here exactly once"
OTHER_LENGTH = "the other evidence has another number of tokens, so it fits no other places"
NO_OTHER_TOKEN = "no other token that could be masked instead"
_AT = re.compile(r"(forward|reverse|query)-(\d{1,6})")
COLUMNS = ["direction", "log_probability", "log_probability_edited", "change"]
COLUMNS += ["log_probability_control", "change_control", "control", "reason", "reason_control"]

Progress = Callable[[int, int], None]
Priced = dict[str, float]


@dataclass(frozen=True)
class Edit:
    """One edit, as it was asked for.

    Attributes:
        layer, head: where a route is edited; None for all.
        match, factor: of a transplant and of a scaling, as `rp.probe_route_edit` takes them.
        at: the token to mask, "forward-5": a direction and a place in the sequence that the model is given.
        evidence: for each direction the tokens that stand in for the evidence's.
        called: what that evidence is called.
    """

    name: str = "none"
    layer: int | None = None
    head: int | None = None
    match: str = "log_odds"
    factor: float = 2.0
    at: str | None = None
    evidence: Mapping[str, Sequence[int]] | None = None
    called: str = ""

    def __post_init__(self) -> None:
        if self.name not in EDITS:
            raise RevprobeError(f"unknown edit {self.name!r}{did_you_mean(self.name, EDITS)}")

    @property
    def place(self) -> tuple[str, int] | None:
        """Direction and place of the token to mask. Raises: RevprobeError, for what names no place."""
        if self.at is None:
            return None
        found = _AT.fullmatch(self.at)
        if found is None:
            raise RevprobeError(f"at={self.at!r}: expected a direction and a place, such as 'forward-5'")
        return found[1], int(found[2])

    @property
    def where(self) -> str:
        """The layers and heads of an edit of the route, in words."""
        layer = "all layers" if self.layer is None else f"layer {self.layer}"
        return f"{layer}, {'all heads' if self.head is None else f'head {self.head}'}"

    def options(self) -> dict[str, Any]:
        """What `rp.probe_route_edit` is called with for it."""
        options: dict[str, Any] = {"edit": self.name, "scope": "all"}
        options |= {"layers": None if self.layer is None else [self.layer]}
        options |= {"heads": None if self.head is None else [self.head]}
        options |= {"match": self.match} if self.name == "transplant" else {}
        return options | ({"factor": self.factor} if self.name == "scale" else {})


def route_numbers(
    model: ProbedModel, pair: ReversalPair, edit: Edit, *, directions: Sequence[str], progress: Progress | None = None
) -> pd.DataFrame:
    """The numbers of an edit of the route: columns COLUMNS, a row for each direction."""
    pairs = ReversalPairs.from_pairs([pair], tokenizer=model.tokenizer)
    frame = probe_route_edit(model, pairs, progress=progress or False, **edit.options()).frame
    frame = frame[frame["scope"] == "all"].assign(
        control="the same change at as many other positions, drawn once at random"
    )
    return frame[frame["direction"].isin(directions)][COLUMNS].reset_index(drop=True)


def counterpart(query: Query, token: int) -> int | None:
    """The one place outside the target where a query has a token; None where it has none or several."""
    places = [p for p, one in enumerate(query.token_ids) if one == token and p not in query.target_positions]
    return places[0] if len(places) == 1 else None


def masked_at(model: ProbedModel, query: Query, place: int) -> Query:
    """The query with one more token hidden. Raises: RevprobeError, for a place that cannot be masked."""
    if model.objective == "causal" or model.mask_token_id is None:
        raise RevprobeError(f"{model.name} is causal and has no mask token; swap the evidence or knock out its route")
    if not 0 <= place < len(query.token_ids):
        raise RevprobeError(f"no token {place}: expected 0 to {len(query.token_ids) - 1}")
    if place in query.target_positions:
        raise RevprobeError(f"token {place} is the hidden place itself; choose another")
    if query.token_ids[place] in (model.mask_token_id, model.begin_token_id):
        raise RevprobeError(f"token {place} holds no word that could be hidden; choose another")
    tokens = [*query.token_ids[:place], model.mask_token_id, *query.token_ids[place + 1 :]]
    return Query.unchecked(tokens, query.target_positions, query.evidence_positions, query.canvas_start)


def maskable(model: ProbedModel, query: Query) -> list[int]:
    """The places whose token can be hidden besides the target: all but what is hidden already."""
    return [
        place
        for place, token in enumerate(query.token_ids)
        if place not in query.target_positions and token not in (model.mask_token_id, model.begin_token_id)
    ]


def with_evidence(query: Query, evidence: Sequence[int]) -> Query:
    """The query with other tokens, as many or not, in its evidence's place.

    Raises: RevprobeError, when the evidence does not stand in one piece, or equals the target.
    """
    first, last = query.evidence_positions[0], query.evidence_positions[-1]
    if last - first + 1 != len(query.evidence_positions):
        raise RevprobeError("the evidence does not stand in one piece, so no other can take its place")
    more = len(evidence) - len(query.evidence_positions)
    tokens = [*query.token_ids[:first], *evidence, *query.token_ids[last + 1 :]]
    moved = [place + more if place > last else place for place in query.target_positions]
    return Query(tokens, moved, range(first, first + len(evidence)), query.canvas_start)


def elsewhere(model: ProbedModel, query: Query, evidence: Sequence[int]) -> Query | None:
    """The control of a swap: the other evidence's tokens at as many other places, drawn at random; None without room.

    The places are those that an edit of the route draws for its control: neither target nor evidence, nor hidden.
    """
    seen = [model.objective == "masked" or place < query.target_positions[0] for place in range(len(query.token_ids))]
    places = other_positions(query, seen, 0, model.mask_token_id)
    if not places:
        return None
    tokens = list(query.token_ids)
    for place, token in zip(places, evidence, strict=True):
        tokens[place] = token
    return Query.unchecked(tokens, query.target_positions, query.evidence_positions, query.canvas_start)


def priced(model: ProbedModel, queries: Sequence[Query], progress: Progress | None = None) -> list[float]:
    """The log-probability of each query's target, nats, by `rp.probe_reverse_probability`."""
    asked = [ReversalPair(query, query, "same_target", fact=str(place)) for place, query in enumerate(queries)]
    pairs = ReversalPairs.from_pairs(asked, tokenizer=model.tokenizer)
    frame = probe_reverse_probability(model, pairs, control=False, progress=progress or False).frame
    frame = frame[frame["direction"] == "forward"].sort_values("pair")
    return [float(value) for value in frame["log_probability"]]


def mask_numbers(model: ProbedModel, query: Query, progress: Progress | None = None) -> Priced:
    """Every other token masked in turn: {"place": log-probability}, "before" that of the query as it is."""
    places = maskable(model, query)
    values = priced(model, [query, *(masked_at(model, query, one) for one in places)], progress)
    return {"before": values[0], **{str(one): value for one, value in zip(places, values[1:], strict=True)}}


def mask_row(direction: str, query: Query, place: int | None, found: Priced) -> dict[str, Any]:
    """The numbers of masking one token beside those of masking each of the others."""
    before, row = found["before"], _row(direction, found["before"])
    if place is None:
        return row | {"reason": NO_COUNTERPART, "reason_control": NO_COUNTERPART}
    others = [
        found[str(one)]
        for one in range(len(query.token_ids))
        if one != place and one not in query.evidence_positions and str(one) in found
    ]
    row |= {"log_probability_edited": found[str(place)], "change": found[str(place)] - before}
    if not others:
        return row | {"reason_control": NO_OTHER_TOKEN}
    about = f"mean over masking each of the {len(others)} other tokens outside the evidence"
    mean = float(np.mean(others))
    return row | {"log_probability_control": mean, "change_control": mean - before, "control": about}


def swap_row(
    model: ProbedModel, direction: str, query: Query, evidence: Sequence[int], progress: Progress | None = None
) -> dict[str, Any]:
    """The numbers of another evidence, and of its tokens at other places."""
    same = len(evidence) == len(query.evidence_positions)
    control = elsewhere(model, query, evidence) if same else None
    queries = [query, with_evidence(query, evidence), *([] if control is None else [control])]
    before, after, *other = priced(model, queries, progress)
    row = _row(direction, before) | {"log_probability_edited": after, "change": after - before}
    if not other:
        return row | {"reason_control": NO_POSITION if same else OTHER_LENGTH}
    about = "the other evidence's tokens at as many other places, drawn once at random"
    return row | {"log_probability_control": other[0], "change_control": other[0] - before, "control": about}


def _row(direction: str, before: float) -> dict[str, Any]:
    nothing: dict[str, Any] = dict.fromkeys(COLUMNS[2:6], float("nan"))
    return {
        "direction": direction,
        "log_probability": before,
        **nothing,
        "control": "",
        "reason": "",
        "reason_control": "",
    }
