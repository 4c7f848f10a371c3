"""The storage probe: how much of the target's logit is stored on the evidence token, and how much of it arrives."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from ..arguments import checked
from ..hooks.untouched import untouched
from ..models.probed import ProbedModel, as_probed
from ..progress import Progress, shows_progress
from .attention import EVIDENCE_HIDDEN
from .pairs.pairs import ReversalPairs
from .passes.alone import in_equal_lengths_if_need_be
from .passes.asked import asked_pairs, out_of_sight, require_one_entry
from .passes.batches import in_batches, make_batch, prepare_queries, queries_per_batch
from .passes.decomposition import Decomposition, LinearizedBatch, Piece
from .passes.plan import PassResult, Plan
from .passes.prompts import null_partners
from .passes.run import describe
from .passes.selection import chosen_of, listed
from .passes.states import Tail
from .readings.reading import Reading
from .statistics.estimators import LATER_BLOCK, LATER_BLOCK_CONTROL, NO_LIKE_TARGET, NO_PARTNER
from .statistics.partners import partner_column
from .statistics.resampling import SHOWN_IN, derangement

DIFFERENT_TOKENS = "different tokens in the two directions"
NO_OTHER_TARGET = "no other target of as many tokens, for margin and rank"
# Rounding moves what is removed by about 2.5 units of the logit on average, in bfloat16 and float16 alike.
_UNITS = 4.0

Target = tuple[int, ...]


@checked
@shows_progress("queries")
def probe_stored_evidence(
    model: ProbedModel | nn.Module,
    pairs: ReversalPairs,
    *,
    batch_size: int | None = None,
    layers: Iterable[int] | None = None,
    control: bool = True,
    cross: bool = False,
    first_order: bool = False,
    progress: Progress | bool | None = None,
    seed: int = 0,
) -> Reading:
    """The stored evidence S[v, u] of target v on evidence token u, and the target's logit taken apart.

    S = W_U W_O W_V E by head, with the scales of all norms held at their measured values, along the residual stream
    alone. What a norm subtracts or adds, position vectors and biases are terms of their own; the sum is held against
    the model's own logit in every batch. A target of several tokens has the mean logit, all hidden at once; evidence of
    several tokens has the mean stored evidence and summed contributions.

    The value is the mean over pairs of S[v, u] under the reverse query, in logits, summed over layers and heads (or
    those of `layers`). The control is that of the same target on other evidence, of another fact of the group. With
    `cross=True`, `reading.cross` holds S of every fact's target (rows) on every fact's evidence (columns) under
    reverse queries; NaN where the two targets differ in length, or a fact's own S is undefined.

    Frame: one row per pair and part: pair, fact, group, kind; part, source, layer, head; for each direction weight
    (attention on the evidence, or on the others; mean over target rows), stored (unrouted), contribution (routed),
    logit, margin (S[v, u] less the largest S of the other targets on that evidence, all layers) and rank (of v among
    the targets, 1 is largest); stored_control (reverse); reason (why stored is NaN: the mask hides the evidence, or
    the directions differ in tokens), reason_margin (why margin and rank are: the same of any layer, or no other target
    has as many tokens) and reason_control. Parts: "evidence" and "others" (what a head reads there, by source:
    token, position, norm, bias, earlier layers), and what reaches the logit directly: "embed", "position", "mlp",
    "norm" (centring) and "bias". `logit_contributions(reading)` sums it up, `token_contributions` goes by position.
    The control's partner is of the same group and its target has as many tokens; where a pair has none, or the
    partner's evidence is hidden, the control's n is below the value's, `undefined` counts those pairs, and the excess
    is over the pairs that have both.
    It answers for masked models whose logits are a linear readout of the residual stream behind norms: RADD, LLaDA,
    Dream, MDLM, SDAR and the like. A nonlinear prediction head (BERT, RoBERTa, soft caps) has no such sum: with
    `first_order=True` all that follows the last layer, norms too, is replaced by its tangent at the model's own state
    (so behind a linear head this is not the exact reading; take that one there). It is called
    "stored_evidence_first_order": S and contributions are slopes, a part "tangent" holds the rest, removed_forward and
    _reverse are by how much the logit falls when what heads (of `layers`) wrote of the evidence's tokens is taken out
    of the last layer's state, remainder_forward and _reverse what slopes miss of that; NaN where S is undefined.
    Raises: RevprobeError, for pairs of kind "swapped", the only kind that causal models have (S couples one target
        with one evidence token), for a layer without attention, and for a model whose logit is no such sum: a nonlinear
        prediction head or soft-capped logits without `first_order`, or a custom kernel.
    Source: paper Sec. 4.1 (Prop. 4.1), with W_O and norms as they are on a real model.
    """
    model = as_probed(model)
    pairs = asked_pairs(model, pairs, "stored_evidence")
    require_one_entry(pairs)
    plan = Plan(control=control, batch_size=batch_size, seed=seed, progress=progress)
    tail, chosen = Tail.of(model) if first_order else None, None if layers is None else set(listed("layer", layers))
    found = in_equal_lengths_if_need_be(model, lambda: _Storage(model, pairs, plan, chosen, tail).run())
    about = describe(model, PassResult(pairs, found.partner, []), plan)
    name = "stored_evidence" + "_first_order" * first_order
    reading = Reading(name, found.frame(), about, found.cross() if cross else None)
    reading.meta.update({"statistic": reading.measured.statistic, "worst_gap": found.gap} | found.of_slopes())
    if found.layers is not None:
        reading.meta["layers"] = sorted(map(int, found.layers))
    return reading


def control_partners(pairs: ReversalPairs, logit_shift: int, *, seed: int = 0) -> np.ndarray:
    """For each pair one of another fact in its group with other targets of as many tokens; -1 where there is none.

    Its evidence is another, too, at which the pair's targets are wrong. A target can be asked for only where as many
    tokens are hidden. Shapes: `-> pair` (indices).
    """
    width = np.array([len(query.target_positions) for query in pairs.queries])
    traits = np.stack([pairs.groups(logit_shift), width[pairs.forward], width[pairs.reverse]], axis=1)
    alike = np.unique(traits, axis=0, return_inverse=True)[1].reshape(-1)
    return null_partners(pairs, alike, seed=seed)


class _Storage:
    """The state of one pass: what is asked of each query, and what came out.

    Shapes: `contribution`, `stored`, `weight`, `hidden`: `query piece`; `stored_control`: `pair piece`; `logit`:
    `query`; `scores`: `query candidate`, S of every target of the pairs on the query's evidence, NaN for those of
    another length.
    """

    def __init__(
        self, model: ProbedModel, pairs: ReversalPairs, plan: Plan, layers: set[int] | None, tail: Tail | None
    ) -> None:
        self.model, self.pairs, self.plan, self.layers, self.tail = model, pairs, plan, layers, tail
        self.queries = prepare_queries(model, pairs.queries)
        self.unseen = out_of_sight(model, self.queries)
        self.size = queries_per_batch(model, self.queries, plan.batch_size)
        partner = control_partners(pairs, model.logit_shift, seed=plan.seed)
        self.partner = partner if plan.control else np.full(len(pairs), -1)
        self.candidates: list[Target] = sorted({query.target for query in self.queries})
        self.asks = self._asks()
        self.pieces: list[Piece] = []
        self.gap = 0.0
        width = len(self.queries)
        self.logit, self.removed, self.remainder, self.rounding = (np.full(width, np.nan) for _ in range(4))
        self.scores = np.full((len(self.queries), len(self.candidates)), np.nan)

    def _asks(self) -> list[dict[Target, list[int]]]:
        """For each query the targets decomposed there, its own first, with the pairs whose control each is."""
        asks: list[dict[Target, list[int]]] = [{query.target: []} for query in self.queries]
        for pair in np.flatnonzero(self.partner >= 0):
            own = self.queries[self.pairs.reverse[pair]].target
            asks[int(self.pairs.reverse[self.partner[pair]])].setdefault(own, []).append(int(pair))
        return asks

    def run(self) -> _Storage:
        with untouched(self.model.module):
            done, lengths = 0, [len(query.token_ids) for query in self.queries]
            for numbers in in_batches(self.model, range(len(lengths)), self.size, lengths.__getitem__):
                self._run_batch(numbers)
                done += len(numbers)
                if callable(self.plan.progress):
                    self.plan.progress(done, len(lengths))
        return self

    def _run_batch(self, numbers: list[int]) -> None:
        batch = make_batch(self.model, [self.queries[q] for q in numbers])
        held = LinearizedBatch.run(self.model, batch, None if self.tail is None else self.tail.last)
        self._keep_own(held, held.decompose(batch.targets), numbers)
        if self.tail is not None:
            self._keep_remainder(held, self.tail, numbers)
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

    def _keep_own(self, held: LinearizedBatch, found: Decomposition, numbers: list[int]) -> None:
        if not self.pieces:
            self.pieces = found.pieces
            self._require_layers()
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

    @torch.no_grad()
    def _keep_remainder(self, held: LinearizedBatch, tail: Tail, numbers: list[int]) -> None:
        """By how much the target's logit falls without the evidence's tokens, and what the slopes make of it."""
        batch, fallen = held.batch, np.zeros(held.batch.targets.shape)
        for read in tail.log_probabilities(batch, held.own, held.without_evidence(self.layers)):
            without = read.layer == 0  # the other is the state as it is
            query, token = read.query[without], read.token[without]
            asked = batch.targets[query.to(batch.targets.device), token.to(batch.targets.device)]
            left = read.logits[without].gather(-1, asked.to(read.logits.device)[:, None])[:, 0]
            own = held.own[query.to(held.own.device), token.to(held.own.device)].gather(-1, asked[:, None])[:, 0]
            fallen[query.numpy(), token.numpy()] = own.double().cpu().numpy() - left.double().cpu().numpy()
        there = batch.is_target.cpu().numpy()
        self.removed[numbers] = np.where(there, fallen, 0.0).sum(1) / there.sum(1)
        tokens = self._measured() & [piece.source == "token" for piece in self.pieces]
        self.remainder[numbers] = self.contribution[numbers][:, tokens].sum(1) - self.removed[numbers]
        eps, logit = max(held.held.eps, torch.finfo(held.own.dtype).eps), self.logit[numbers]
        self.rounding[numbers] = _UNITS * eps * np.abs(logit) + np.abs(self.contribution[numbers].sum(1) - logit)

    def _measured(self) -> np.ndarray:
        """Which pieces are what the layers asked for read of the evidence. Shapes: `-> piece` (bool)."""
        of_layers = [self.layers is None or piece.layer in self.layers for piece in self.pieces]
        return np.array([piece.part == "evidence" for piece in self.pieces]) & of_layers

    def of_slopes(self) -> dict[str, Any]:
        """Where first order begins, and the remainder's size under reverse queries: means over defined pairs (logits).

        Without a defined pair n is 0 and the sizes are None.
        """
        if self.tail is None:
            return {}
        defined = self._undefined_slopes() == ""
        reverse, n = self.pairs.reverse[defined], int(defined.sum())
        missed, whole, rounding = np.abs(self.remainder[reverse]), np.abs(self.removed[reverse]), self.rounding[reverse]
        sizes: dict[str, Any] = dict.fromkeys(("mean", "largest", "removed", "rounding"))
        if n:
            sizes = {"mean": float(missed.mean()), "largest": float(missed.max()), "removed": float(whole.mean())}
            sizes["rounding"] = float(rounding.mean())
        sizes |= {"n": n, "facts": len(set(self.pairs.facts[defined]))}
        return {"first_order_behind": self.tail.last.path, "remainder": sizes}

    def _undefined_slopes(self) -> np.ndarray:
        """Why S summed over the layers asked for is undefined, so nothing is removed; "" else. Shapes: `-> pair`."""
        reasons = self._reasons()[:, self._measured()]
        return reasons[np.arange(len(reasons)), (reasons != "").argmax(1)]

    def _keep_scores(self, stored: Tensor, numbers: list[int]) -> None:
        """S of every candidate target, the mean over its tokens. Shapes: `stored`: `batch token vocab`."""
        widths = np.array([len(self.queries[q].target) for q in numbers])
        for width in set(widths):
            places = [place for place, target in enumerate(self.candidates) if len(target) == width]
            tokens = torch.tensor([self.candidates[place] for place in places], device=stored.device)
            rows = np.flatnonzero(widths == width)
            found = stored[torch.as_tensor(rows)][:, torch.arange(width), tokens].double().mean(-1)
            self.scores[np.ix_(np.array(numbers)[rows], np.array(places))] = found.cpu().numpy()

    def _require_layers(self) -> None:
        """Raises: RevprobeError, naming a layer that was asked for and has no attention."""
        there = sorted({piece.layer for piece in self.pieces if piece.layer is not None and piece.head is not None})
        chosen_of("layer", self.layers, there, model=self.model, purpose="measure")

    def frame(self) -> pd.DataFrame:
        """One row per pair and piece."""
        pairs, width = self.pairs, len(self.pieces)
        sides = {"forward": pairs.forward, "reverse": pairs.reverse}
        frame = self._by_pair(sides)
        frame = frame.loc[frame.index.repeat(width)].reset_index(drop=True)
        for place, name in enumerate(Piece._fields):
            dtype = "Int64" if name in ("layer", "head") else "str"  # both nullable: an embedding has no head
            frame.insert(4 + place, name, pd.Series([piece[place] for piece in self.pieces] * len(pairs), dtype=dtype))
        reason = self._reasons()
        for name in ("weight", "stored", "contribution"):
            for side, index in sides.items():
                values = getattr(self, name)[index]
                kept = np.where(reason == "", values, np.nan) if name == "stored" else values
                frame[f"{name}_{side}"] = kept.reshape(-1)
        frame["reason"] = reason.reshape(-1)
        if self.plan.control:
            beside = self._control_reasons()
            defined = (reason == "") & (beside == "")
            frame["stored_control"] = np.where(defined, self.stored_control, np.nan).reshape(-1)
            frame["reason_control"] = beside.reshape(-1)
        if self.layers is not None:
            frame = frame[frame["head"].notna() & frame["layer"].isin(self.layers)]
        return frame.reset_index(drop=True)

    def _by_pair(self, sides: dict[str, np.ndarray]) -> pd.DataFrame:
        """What a pair has once: logit, margin and rank, with the reason of the last two."""
        pairs = self.pairs
        own = np.array([self.candidates.index(query.target) for query in self.queries])
        margin, rank = _against_others(self.scores, own)
        alone = np.isnan(rank[pairs.forward]) | np.isnan(rank[pairs.reverse])
        undefined = self._pair_reasons()
        reason = np.where(undefined == "", np.where(alone, NO_OTHER_TARGET, ""), undefined)
        by_pair: dict[str, Any] = {"pair": np.arange(len(pairs)), "fact": pairs.facts.astype(str), "kind": pairs.kind}
        by_pair |= {"group": pairs.groups(self.model.logit_shift), **pairs.flags}
        by_pair |= partner_column(pairs.facts, self.partner, pairs.flags.get(SHOWN_IN["reverse"]))
        by_pair |= {f"logit_{side}": self.logit[index] for side, index in sides.items()}
        if self.tail is not None:
            measured = {"removed": self.removed, "remainder": self.remainder}
            told = self._undefined_slopes() == ""
            for name, values in measured.items():
                by_pair |= {f"{name}_{side}": np.where(told, values[i], np.nan) for side, i in sides.items()}
        for name, values in (("margin", margin), ("rank", rank)):
            by_pair |= {f"{name}_{side}": np.where(reason == "", values[i], np.nan) for side, i in sides.items()}
        return pd.DataFrame(by_pair | {"reason_margin": reason})

    def _reasons(self) -> np.ndarray:
        """Why S of a piece is no number of the pair's two queries; "" where it is. Shapes: `-> pair piece`."""
        pairs = self.pairs
        hidden = self.hidden[pairs.forward] | self.hidden[pairs.reverse]
        differ = np.asarray(pairs.flags.get("different_tokens", np.zeros(len(pairs), dtype=bool)), dtype=bool)
        unseen = (self.unseen[pairs.forward] | self.unseen[pairs.reverse])[:, None]
        conditions = [np.broadcast_to(differ[:, None], hidden.shape), np.broadcast_to(unseen, hidden.shape), hidden]
        reason = np.select(conditions, [DIFFERENT_TOKENS, LATER_BLOCK, EVIDENCE_HIDDEN], "")
        return np.where([piece.part == "evidence" for piece in self.pieces], reason, "")

    def _pair_reasons(self) -> np.ndarray:
        """The same for S summed over all layers and heads: any piece's reason. Shapes: `-> pair`."""
        reasons = self._reasons()
        return reasons[np.arange(len(reasons)), (reasons != "").argmax(1)]

    def _control_reasons(self) -> np.ndarray:
        """Why a piece has no control though it has S; "" where it has one. Shapes: `-> pair piece`."""
        pairs = self.pairs
        facts, groups = pairs.facts.astype(str), pairs.groups(self.model.logit_shift)
        no_partner = np.where(derangement(facts, groups, seed=self.plan.seed) < 0, NO_PARTNER, NO_LIKE_TARGET)
        other = pairs.reverse[self.partner]
        hidden = np.where(self.hidden[other], f"{EVIDENCE_HIDDEN} (control)", "")
        hidden = np.where(self.unseen[other][:, None], LATER_BLOCK_CONTROL, hidden)
        reason = np.where((self.partner < 0)[:, None], no_partner[:, None], hidden)
        return np.where([piece.part == "evidence" for piece in self.pieces], reason, "")

    def cross(self) -> pd.DataFrame:
        """S of every fact's target (rows) on every fact's evidence (columns), mean over defined reverse queries."""
        undefined = self._pair_reasons() != ""
        scores = np.where(undefined[:, None], np.nan, self.scores[self.pairs.reverse])
        facts = self.pairs.facts.astype(str)
        on_evidence = pd.DataFrame(scores).groupby(facts, sort=True).mean().T  # candidate x fact
        target = [self.candidates.index(self.queries[q].target) for q in self.pairs.reverse]
        chosen = on_evidence.loc[target].set_index(facts)
        chosen[undefined] = np.nan
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
