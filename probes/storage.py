"""The storage probe: how much of the target's logit is stored on the evidence token, and how much of it arrives."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from ..errors import RevprobeError
from ..hooks.untouched import untouched
from ..models.probed import ProbedModel, as_probed
from .attention import EVIDENCE_HIDDEN
from .batches import default_batch_size, make_batch, prepare_queries
from .decomposition import Decomposition, HeldBatch, Piece
from .pairs import ReversalPairs
from .passes import PassResult, Plan, Progress, describe
from .readings import Reading
from .statistics import derangement, mean_over_facts

DIFFERENT_TOKENS = "different tokens in the two directions"

Target = tuple[int, ...]


def probe_stored_evidence(
    model: ProbedModel | nn.Module,
    pairs: ReversalPairs,
    *,
    batch_size: int | None = None,
    layers: Iterable[int] | None = None,
    control: bool = True,
    cross: bool = False,
    progress: Progress | None = None,
    seed: int = 0,
) -> Reading:
    """The stored evidence S[v, u] of target v on evidence token u, and the target's logit taken apart.

    S = W_U W_O W_V E by head, with the scales of all norms held at their measured values, along the residual stream
    alone (no detour through later layers). What a norm subtracts or adds, position vectors and biases are terms of
    their own, so the contributions of a query add up to its logit; that sum is held against the model's own logit in
    every batch. A target of several tokens has the mean logit, all hidden at once; evidence of several tokens has the
    mean stored evidence and summed contributions.

    The value is the mean over pairs of S[v, u] under the reverse query, in logits, summed over layers and heads (or
    those of `layers`). The control is that of the same target on the evidence of another fact of the group. With
    `cross=True`, `reading.cross` holds S of every fact's target (rows) on every fact's evidence (columns) under
    reverse queries.

    Frame: one row per pair and part: pair, fact, group, kind; part, source, layer, head; for each direction weight
    (attention on the evidence, or on the others), stored (unrouted), contribution (routed), logit, margin (S[v, u]
    less the largest S of the other targets on that evidence, all layers) and rank (of v among the targets, 1 is
    largest); stored_control (reverse); reason. Parts: "evidence" and "others" (what a head reads there, by source:
    token, position, norm, bias, earlier layers), and what reaches the logit directly: "embed", "position", "mlp",
    "norm" (centring) and "bias". `logit_contributions(reading)` sums it up.
    Raises: RevprobeError, for pairs of kind "swapped" (S couples one target with one evidence token), and for a model
        whose logit is no such sum: soft-capped logits, a nonlinear prediction head, or a custom kernel.
    Source: paper Sec. 4.1 (Prop. 4.1), with W_O and norms as they are on a real model.
    """
    model = as_probed(model)
    if not isinstance(pairs, ReversalPairs):
        pairs = ReversalPairs.from_pairs(pairs)
    if pairs.kind != "same_target":
        raise RevprobeError(f"pairs of kind {pairs.kind!r} do not share an entry of S; use same_target pairs")
    plan = Plan(control=control, batch_size=batch_size, seed=seed, progress=progress)
    found = _Storage(model, pairs, plan).run()
    frame = found.frame()
    if layers is not None:
        frame = _of_layers(frame, set(layers))
    result = PassResult(pairs, found.partner, [])
    reading = Reading(
        "stored_evidence", frame.reset_index(drop=True), describe(model, result, plan), found.cross() if cross else None
    )
    reading.meta.update({"statistic": reading.measured.statistic, "worst_gap": found.gap})
    return reading


def _of_layers(frame: pd.DataFrame, layers: set[int]) -> pd.DataFrame:
    """The rows of some layers' heads. Raises: RevprobeError, when there is none."""
    heads = frame[frame["part"].isin(["evidence", "others"])]
    kept = heads[heads["layer"].isin(layers)]
    if kept.empty:
        there = sorted(set(heads["layer"]))
        raise RevprobeError(f"no attention in layers {sorted(layers)}; expected some of {there[0]} to {there[-1]}")
    return kept


def evidence_by_pair(reading: Reading) -> pd.DataFrame:
    """What the evidence holds and what of it arrives: one row per pair, summed over the reading's layers and heads.

    Columns: pair, fact, stored_control, reason, and for each direction stored (S[v, u]), weight (the mean over
    heads), contribution (the evidence position's whole value, routed), logit, margin and rank.
    """
    frame = reading.frame[reading.frame["part"] == "evidence"]
    tokens = frame[frame["source"] == "token"].groupby("pair", sort=True)
    sides = ("forward", "reverse")
    stored = [c for c in ("stored_forward", "stored_reverse", "stored_control") if c in frame]
    undefined = tokens[stored].count().lt(tokens.size(), axis=0)  # a head that is undefined leaves the sum undefined
    table = tokens[["fact", *(f"{n}_{s}" for n in ("logit", "margin", "rank") for s in sides)]].first()
    table["reason"] = tokens["reason"].agg(lambda reasons: next(filter(None, reasons), ""))  # of any head
    table = table.join(tokens[stored].sum().mask(undefined)).join(tokens[[f"weight_{s}" for s in sides]].mean())
    contribution = frame.groupby("pair", sort=True)[[f"contribution_{s}" for s in sides]].sum()
    return table.join(contribution).reset_index().reindex(columns=["pair", *table.columns, *contribution.columns])


def logit_contributions(reading: Reading) -> pd.DataFrame:
    """What the logit is made of, on average: one row per part, source and layer, and the logit itself.

    Columns: part, source, layer, and for each direction the mean contribution over pairs, in logits, with low and
    high (95 %, over facts).
    """
    keys = ["part", "source", "layer"]
    sides = [f"contribution_{side}" for side in ("forward", "reverse")]
    summed = reading.frame.groupby([*keys, "pair", "fact"], dropna=False, sort=False)[sides].sum().reset_index()
    whole = reading.frame.groupby("pair").first().reset_index()
    logits = {side: whole[side.replace("contribution", "logit")] for side in sides}
    whole = whole.assign(part="logit", source=None, layer=pd.array([pd.NA] * len(whole), dtype="Int64"), **logits)
    rows = []
    for key, part in pd.concat([summed, whole[summed.columns]]).groupby(keys, dropna=False, sort=False):
        row: dict[str, Any] = dict(zip(keys, key, strict=True))
        facts = part["fact"].to_numpy().astype(str)
        for side in ("forward", "reverse"):
            found = mean_over_facts(part[f"contribution_{side}"].to_numpy(float), facts, seed=reading.seed)
            row |= {side: found.value, f"{side}_low": found.low, f"{side}_high": found.high}
        rows.append(row)
    return pd.DataFrame(rows).astype({"layer": "Int64"})


class _Storage:
    """The state of one pass: what is asked of each query, and what came out.

    Shapes: `contribution`, `stored`, `weight`, `hidden`: `query piece`; `stored_control`: `pair piece`; `logit`:
    `query`; `scores`: `query candidate`, S of every target of the pairs on the query's evidence, NaN for those of
    another length.
    """

    def __init__(self, model: ProbedModel, pairs: ReversalPairs, plan: Plan) -> None:
        self.model, self.pairs, self.plan = model, pairs, plan
        self.queries = prepare_queries(model, pairs.queries)
        if plan.batch_size is not None and plan.batch_size < 1:
            raise RevprobeError(f"batch_size {plan.batch_size!r}: expected at least 1 query")
        self.size = plan.batch_size or default_batch_size(model, self.queries)
        partner = derangement(pairs.facts.astype(str), pairs.groups(model.logit_shift), seed=plan.seed)
        self.partner = partner if plan.control else np.full(len(pairs), -1)
        self.candidates: list[Target] = sorted({query.target for query in self.queries})
        self.asks = self._asks()
        self.pieces: list[Piece] = []
        self.gap = 0.0
        self.logit = np.full(len(self.queries), np.nan)
        self.scores = np.full((len(self.queries), len(self.candidates)), np.nan)

    def _asks(self) -> list[dict[Target, list[int]]]:
        """For each query the targets decomposed there, its own first, with the pairs whose control each is."""
        asks: list[dict[Target, list[int]]] = [{query.target: []} for query in self.queries]
        for pair in np.flatnonzero(self.partner >= 0):
            own = self.queries[self.pairs.reverse[pair]].target
            other = int(self.pairs.reverse[self.partner[pair]])
            if len(own) == len(self.queries[other].target):
                asks[other].setdefault(own, []).append(int(pair))
        return asks

    def run(self) -> _Storage:
        with untouched(self.model.module):
            for start in range(0, len(self.queries), self.size):
                numbers = list(range(start, min(start + self.size, len(self.queries))))
                self._run_batch(numbers)
                if self.plan.progress is not None:
                    self.plan.progress(numbers[-1] + 1, len(self.queries))
        return self

    def _run_batch(self, numbers: list[int]) -> None:
        batch = make_batch(self.model, [self.queries[q] for q in numbers])
        held = HeldBatch.run(self.model, batch)
        self._keep_own(held, held.decompose(batch.targets), numbers)
        self._keep_scores(held.stored_logits(), numbers)
        for turn in range(max(len(self.asks[q]) for q in numbers)):
            asked = [list(self.asks[q])[min(turn, len(self.asks[q]) - 1)] for q in numbers]
            if any(self.asks[q][target] for q, target in zip(numbers, asked, strict=True)):
                targets = batch.targets.clone()
                for row, target in enumerate(asked):
                    targets[row, : len(target)] = torch.tensor(target)
                found = held.decompose(targets).stored.cpu().numpy()
                for row, (q, target) in enumerate(zip(numbers, asked, strict=True)):
                    self.stored_control[self.asks[q][target]] = found[row]

    def _keep_own(self, held: HeldBatch, found: Decomposition, numbers: list[int]) -> None:
        if not self.pieces:
            self.pieces = found.pieces
            shape = len(self.queries), len(found.pieces)
            self.contribution, self.stored, self.weight = (np.full(shape, np.nan) for _ in range(3))
            self.hidden = np.zeros(shape, dtype=bool)
            self.stored_control = np.full((len(self.pairs), shape[1]), np.nan)
        assert found.pieces == self.pieces, "every batch of a model has the same pieces"
        weight, hidden = held.routes(found.pieces)
        kept = (self.contribution, found.contribution), (self.stored, found.stored)
        for table, values in (*kept, (self.weight, weight), (self.hidden, hidden), (self.logit, found.logit)):
            table[numbers] = values.cpu().numpy()
        self.gap = max(self.gap, float(found.gap.max()))

    def _keep_scores(self, stored: Tensor, numbers: list[int]) -> None:
        """S of every candidate target, the mean over its tokens. Shapes: `stored`: `batch token vocab`."""
        widths = np.array([len(self.queries[q].target) for q in numbers])
        for width in set(widths):
            places = [place for place, target in enumerate(self.candidates) if len(target) == width]
            tokens = torch.tensor([self.candidates[place] for place in places], device=stored.device)
            rows = np.flatnonzero(widths == width)
            found = stored[torch.as_tensor(rows)][:, torch.arange(width), tokens].double().mean(-1)
            self.scores[np.ix_(np.array(numbers)[rows], np.array(places))] = found.cpu().numpy()

    def frame(self) -> pd.DataFrame:
        """One row per pair and piece."""
        pairs, width = self.pairs, len(self.pieces)
        own = np.array([self.candidates.index(query.target) for query in self.queries])
        margin, rank = _against_others(self.scores, own)
        sides = {"forward": pairs.forward, "reverse": pairs.reverse}
        by_pair: dict[str, Any] = {"pair": np.arange(len(pairs)), "fact": pairs.facts.astype(str), "kind": pairs.kind}
        by_pair |= {"group": pairs.groups(self.model.logit_shift), **pairs.flags}
        for name, values in (("logit", self.logit), ("margin", margin), ("rank", rank)):
            by_pair |= {f"{name}_{side}": values[index] for side, index in sides.items()}
        frame = pd.DataFrame(by_pair)
        frame = frame.loc[frame.index.repeat(width)].reset_index(drop=True)
        for place, name in enumerate(Piece._fields):
            dtype = "Int64" if name in ("layer", "head") else "str"  # both nullable: an embedding has no head
            frame.insert(4 + place, name, pd.Series([piece[place] for piece in self.pieces] * len(pairs), dtype=dtype))
        for name in ("weight", "stored", "contribution"):
            table = getattr(self, name)
            frame = frame.assign(**{f"{name}_{side}": table[index].reshape(-1) for side, index in sides.items()})
        if self.plan.control:
            frame["stored_control"] = self.stored_control.reshape(-1)
        return self._with_reasons(frame)

    def _with_reasons(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Stored evidence that is no number of the two queries is NaN, with the reason."""
        hidden = (self.hidden[self.pairs.forward] | self.hidden[self.pairs.reverse]).reshape(-1)
        differ = frame.get("different_tokens", pd.Series(False, index=frame.index)).to_numpy(bool)
        evidence = (frame["part"] == "evidence").to_numpy()
        reason = np.where(differ, DIFFERENT_TOKENS, np.where(hidden, EVIDENCE_HIDDEN, ""))
        reason = np.where(evidence, reason, "")
        stored = [column for column in frame if str(column).startswith("stored")]
        frame.loc[reason != "", stored] = np.nan
        return frame.assign(reason=reason)

    def cross(self) -> pd.DataFrame:
        """S of every fact's target (rows) on every fact's evidence (columns), mean over reverse queries."""
        reverse = pd.DataFrame(self.scores[self.pairs.reverse], columns=range(len(self.candidates)))
        facts = self.pairs.facts.astype(str)
        on_evidence = reverse.groupby(facts, sort=True).mean().T  # candidate x fact
        target = [self.candidates.index(self.queries[q].target) for q in self.pairs.reverse]
        chosen = on_evidence.loc[target].set_index(facts)
        return chosen.groupby(level=0, sort=True).mean()


def _against_others(scores: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Margin over the best other candidate and 1-based rank; NaN without another. Shapes: `query candidate, query`."""
    rows = np.arange(len(scores))
    mine = scores[rows, own]
    others = scores.copy()
    others[rows, own] = np.nan
    alone = np.isnan(others).all(1)
    best = np.where(alone, np.nan, np.nanmax(np.where(alone[:, None], 0.0, others), axis=1))
    rank = np.where(alone, np.nan, 1 + (others >= mine[:, None]).sum(1))
    return mine - best, rank
