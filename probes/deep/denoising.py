"""The denoising trace: what the answer rests on, step by step, while a masked diffusion model writes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from ...arguments import checked
from ...errors import RevprobeError, did_you_mean
from ...hooks.attention_sites import Attention
from ...models.probed import ProbedModel, as_probed
from ...models.structure import attention_of
from ...progress import Progress, shows_progress
from ..attention import EVIDENCE_HIDDEN
from ..decoding.masked import ALGORITHMS, Unmasking, unmasking
from ..pairs.pairs import ReversalPairs
from ..passes.asked import asked_pairs, out_of_sight
from ..passes.batches import prepare_queries
from ..passes.likelihood import no_partner, target_partners
from ..passes.plan import PassResult, Plan
from ..passes.run import describe
from ..passes.selection import chosen_of
from ..readings.reading import Reading
from ..statistics.estimators import LATER_BLOCK, LATER_BLOCK_CONTROL
from ..statistics.partners import PARTNER, partner_column
from ..statistics.resampling import SHOWN_IN
from .denoising_steps import NOT_BEGUN, WRITTEN, Trace, read_layers, trace_steps

STATES = ("written", "open", "waiting", "not begun")
BLOCK_NOT_BEGUN = "its block is not begun"
Target = tuple[int, ...]


@checked
@shows_progress("queries")
def trace_denoising(
    model: ProbedModel | nn.Module,
    pairs: ReversalPairs,
    *,
    steps: int | None = None,
    block_length: int | None = None,
    remasking: str | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int | None = None,
    layers: Iterable[int] | None = None,
    control: bool = True,
    progress: Progress | bool | None = None,
) -> Reading:
    """Let the model write each query's target in its own way, the rest of the query shown, and look at every step.

    The decoder is that of `decode`, so the tokens are the same; what is still masked is read before each step reveals
    something. The value is the probability of the target when it was written: at each target position that which the
    model gave to the target's token in the step that revealed the position (whatever stood there afterwards), mean over
    the positions of a pair and over pairs, of the reverse queries; `summary(by="direction")` has the forward ones
    beside them. The control prices the target where another fact is asked about, whose own is another of as many
    tokens: at the same positions of the same steps, or as it was written there, where that was earlier.

    Args:
        steps, block_length, temperature, seed: as in `decode`; the seed also shuffles the facts.
        remasking: which positions come first, `decode`'s `algorithm`.
        layers: whose attention is kept, all when None.
        progress: called with (queries done, queries in all).

    Frame: pair, fact, kind, direction, step (from 1), part, and then for
        part "answer", a row for each position that is masked as the step begins: position (in the query), state
            ("open": it may be revealed now; "waiting": for a later block of the answer; "not begun": so is its block of
            the model), log_probability (nats) and probability of the target's token over the whole vocabulary, rank
            (from 1, ties against it), probability_control; where the step revealed it token (id), text and match (1 if
            it is the target's token).
        part "attention", a row for each layer and head: layer, head, score (pre-softmax) and weight of the evidence,
            seen from the readout rows of the positions that are still masked (in a model with blocks, of those begun):
            the score a mean over these rows and the evidence's tokens, the weight a sum over tokens, mean over rows.
        reason, reason_control: why a number is missing. A target of several tokens has a row for each, not a sum.
    Raises: RevprobeError, for a causal model, which does not denoise, a setting that is out of range, a layer the model
        lacks, or queries that do not fit the model.
    Source: the order of unmasking is Nie et al. 2025 (arXiv 2502.09992), App. B.4.
    """
    model = as_probed(model)
    given = {"steps": steps, "block_length": block_length, "algorithm": remasking}
    how = _how(model, **given, temperature=temperature, seed=seed)
    pairs = asked_pairs(model, pairs, "denoising")
    queries = prepare_queries(model, pairs.queries)
    attention = attention_of(model)
    wanted = chosen_of("layer", layers, sorted({*attention.heads, *attention.without}), model=model, purpose="read")
    read = read_layers(attention, wanted)
    asks = _Asked.of(pairs, model.logit_shift, control, seed)
    trace = trace_steps(model, queries, asks.targets, how, read, batch_size, progress)
    silent = {layer: why for layer, why in attention.without.items() if layer in wanted} | trace.unread
    frame = _Table(model, pairs, trace, asks, read, silent, out_of_sight(model, queries)).frame()
    plan = Plan(control=control, seed=seed)
    reading = Reading("denoising_trace", frame, describe(model, PassResult(pairs, np.array([]), []), plan))
    reading.meta.update({"decoding": how.describe(), "layers": wanted, "layers_without_attention": sorted(silent)})
    reading.meta["statistic"] = reading.measured.statistic
    return reading


def _how(model: ProbedModel, **given: Any) -> Unmasking:
    """How the model will write. Raises: RevprobeError, for a causal model, or a setting out of range."""
    if model.objective == "causal":
        raise RevprobeError(
            f"{model.name} is a causal model, which does not denoise: it writes left to right, each token once; use "
            "probe_reverse_probability, or a masked model"
        )
    if (named := given["algorithm"]) not in (None, *ALGORITHMS):
        raise RevprobeError(f"unknown remasking {named!r}{did_you_mean(named, ALGORITHMS)}")
    return unmasking(model, **given)


@dataclass(frozen=True)
class _Asked:
    """The targets priced at each query's positions, and where each pair's own is priced for its control.

    Shapes: `partner` (the pair whose query that is, -1 for none), `place` (that of the pair's target among those priced
    there), `why` (the reason for none): `pair side`.
    """

    targets: list[list[Target]]
    partner: np.ndarray | None
    place: np.ndarray
    why: np.ndarray

    @classmethod
    def of(cls, pairs: ReversalPairs, logit_shift: int, control: bool, seed: int) -> _Asked:
        targets: list[dict[Target, int]] = [{query.target: 0} for query in pairs.queries]
        why, place = np.full((len(pairs), 2), "", dtype=object), np.full((len(pairs), 2), -1)
        if not control:
            return cls([list(asked) for asked in targets], None, place, why)
        partners = target_partners(pairs, logit_shift, seed=seed)
        for side, (index, name) in enumerate(((pairs.forward, "forward"), (pairs.reverse, "reverse"))):
            partner = partners[name]
            why[:, side] = no_partner(pairs, logit_shift, partner, seed=seed)
            for pair in np.flatnonzero(partner >= 0).tolist():
                priced = targets[int(index[partner[pair]])]
                place[pair, side] = priced.setdefault(pairs.queries[index[pair]].target, len(priced))
        found = np.stack([partners["forward"], partners["reverse"]], axis=1)
        return cls([list(asked) for asked in targets], found, place, why)

    def columns(self, pairs: ReversalPairs) -> dict[str, np.ndarray]:
        """The column `fact_control`, where either direction has one. Shapes: `-> pair side`."""
        if self.partner is None:
            return {}
        shown = [pairs.flags.get(name) for name in SHOWN_IN.values()]
        sides = [partner_column(pairs.facts, one, of) for one, of in zip(self.partner.T, shown, strict=True)]
        if not any(sides):
            return {}
        return {PARTNER: np.where(self.partner < 0, "", pairs.facts.astype(str)[self.partner])}


@dataclass
class _Table:
    """From the trace to the frame. An item is a pair and one of its two queries: `2 pair + side`."""

    model: ProbedModel
    pairs: ReversalPairs
    trace: Trace
    asked: _Asked
    attention: Attention
    silent: Mapping[int, str]
    unseen: np.ndarray

    def frame(self) -> pd.DataFrame:
        """Answers first, then attention; each in the order of pair, direction and step.

        A model of 32 layers and 32 heads has 204,800 rows of attention for each step of 100 pairs, so columns are as
        narrow as their numbers allow, and texts are categories.
        """
        query = np.stack([self.pairs.forward, self.pairs.reverse], 1).reshape(-1)
        answers, heads = self._answers(query), self._heads(query)
        attention = self._attention(query, heads)
        count = [len(part["item"]) for part in (answers, attention)]
        item, step = (np.concatenate([part[name] for part in (answers, attention)]) for name in ("item", "step"))
        pair, facts = item // 2, np.unique(self.pairs.facts.astype(str), return_inverse=True)
        columns: dict[str, Any] = {"pair": pair.astype(np.int32)}
        columns["fact"] = _category(facts[1][pair], facts[0])
        columns["kind"] = _category(np.zeros(len(item), dtype=np.int8), [self.pairs.kind])
        columns["direction"] = _category(item % 2, ["forward", "reverse"])
        columns["step"] = (step + 1).astype(np.int16)
        columns["part"] = _category(np.repeat([0, 1], count), ["answer", "attention"])
        whole = {"position": "Int32", "token": "Int32", "layer": "Int16", "head": "Int16"}
        names = [name for name in (*answers, *attention) if name not in ("item", "step")]
        for name in dict.fromkeys(names):
            parts = [answers.get(name), attention.get(name)]
            columns[name] = _joined(parts, count, whole.get(name))
        columns |= {name: np.asarray(values)[pair] for name, values in self.pairs.flags.items()}
        columns |= {name: pd.Categorical(one[pair, item % 2]) for name, one in self.asked.columns(self.pairs).items()}
        return pd.DataFrame(columns)

    def _answers(self, query: np.ndarray) -> dict[str, Any]:
        """Columns of the rows of what is masked as a step begins."""
        trace = self.trace
        item, step, at = (trace.state[query] != WRITTEN).nonzero()
        own, unseen = query[item], self.unseen[query[item]]
        cell = own, step, at
        position = np.full((len(self.pairs.queries), trace.state.shape[2]), -1)
        target = position.copy()
        for number, asked in enumerate(self.pairs.queries):
            position[number, : len(asked.target)], target[number, : len(asked.target)] = (
                asked.target_positions,
                asked.target,
            )
        state, written, missing = trace.state[cell], trace.written[cell], trace.written[cell] < 0
        logs = np.where(unseen, np.nan, trace.log_probability[*cell, 0])
        columns: dict[str, Any] = {"item": item, "step": step, "position": position[own, at]}
        columns["state"] = _category(state, STATES)
        columns["log_probability"] = logs.astype(np.float32)
        columns["probability"] = np.exp(logs).astype(np.float32)
        columns["rank"] = np.where(unseen, np.nan, trace.rank[cell]).astype(np.float32)
        reason = np.select([unseen, state == NOT_BEGUN], [LATER_BLOCK, BLOCK_NOT_BEGUN], "").astype(object)
        null, why = self._elsewhere(query, item, step, at)
        if self.asked.partner is not None:
            columns["probability_control"] = np.where(reason == "", null, np.nan).astype(np.float32)
        columns["token"] = np.where(missing, -1, written)
        columns["text"] = _texts(self.model, self.pairs, written)
        columns["match"] = np.where(missing, np.nan, written == target[own, at]).astype(np.float32)
        columns["reason"] = pd.Categorical(reason)
        if self.asked.partner is not None:
            columns["reason_control"] = pd.Categorical(np.where(reason == "", why, reason))
        return columns

    def _elsewhere(
        self, query: np.ndarray, item: np.ndarray, step: np.ndarray, at: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The probability of each row's target where its partner is asked, and why there is none.

        Shapes: `query`: `item`; `item`, `step`, `at` (the target position), results: `row`.
        """
        if self.asked.partner is None:
            return np.full(len(item), np.nan), np.full(len(item), "", dtype=object)
        trace, partner = self.trace, self.asked.partner.reshape(-1)[item]
        place, why = self.asked.place.reshape(-1)[item], self.asked.why.reshape(-1)[item]
        other = query[2 * np.maximum(partner, 0) + item % 2]
        masked = (trace.state != WRITTEN).sum(1)  # from the first step on
        then = np.minimum(step, masked[other, at] - 1)
        null = np.exp(trace.log_probability[other, then, at, np.maximum(place, 0)])
        silent = [partner < 0, self.unseen[other], np.isnan(null)]
        why = np.select(silent, [why, LATER_BLOCK_CONTROL, f"{BLOCK_NOT_BEGUN} (control)"], "").astype(object)
        return np.where(why == "", null, np.nan), why

    def _heads(self, query: np.ndarray) -> list[tuple[int, int, int]]:
        """(layer, head, column of the trace) of every row of attention; -1 where a layer has none."""
        read = [(layer, head) for layer, heads in self.attention.heads.items() for head in range(heads)]
        most = max(self.attention.heads.values())
        found = [(layer, head, column) for column, (layer, head) in enumerate(read)]
        beside = [layer for layer in self.silent if layer not in self.attention.heads]
        return sorted(found + [(layer, head, -1) for layer in beside for head in range(most)])

    def _attention(self, query: np.ndarray, heads: list[tuple[int, int, int]]) -> dict[str, Any]:
        """Columns of the rows of what the still-masked rows attend to."""
        trace, (layer, head, column) = self.trace, np.array(heads).T
        item, step = (np.arange(trace.state.shape[1]) < trace.steps[query][:, None]).nonzero()
        score, weight = (
            np.where(column < 0, np.float32(np.nan), part[query[item], step][:, column]).reshape(-1)
            for part in (trace.score, trace.weight)
        )
        unseen = np.repeat(self.unseen[query[item]], len(heads))
        why = np.array([self.silent.get(int(one), "") for one in layer], dtype=object)
        reasons, code = np.unique(["", LATER_BLOCK, EVIDENCE_HIDDEN, *why], return_inverse=True)
        unread = np.isnan(weight)
        score[unseen | ~np.isfinite(score)], weight[unseen] = np.nan, np.nan
        own = np.tile(code[3:], len(item))
        chosen = np.select([unseen, unread, np.isnan(score)], [code[1], own, code[2]], code[0])
        return {
            "item": np.repeat(item, len(heads)),
            "step": np.repeat(step, len(heads)),
            "layer": np.tile(layer, len(item)),
            "head": np.tile(head, len(item)),
            "score": score,
            "weight": weight,
            "reason": _category(chosen, reasons),
        }


def _category(codes: np.ndarray, names: Sequence[str] | np.ndarray) -> pd.Categorical:
    return pd.Categorical.from_codes(codes, pd.Index(names))


def _joined(parts: list[Any], count: list[int], whole: str | None) -> Any:
    """A column of both parts, from one or both: texts as categories, whole numbers with gaps, or floats with NaN."""
    if any(isinstance(part, pd.Categorical) for part in parts):
        filled = [
            _category(np.full(size, -1), [""]) if part is None else part
            for part, size in zip(parts, count, strict=True)
        ]
        return pd.api.types.union_categoricals(filled)
    if whole is not None:
        numbers = np.concatenate([np.full(n, -1) if p is None else p for p, n in zip(parts, count, strict=True)])
        width = np.dtype(whole.lower())
        return pd.arrays.IntegerArray(numbers.astype(width), numbers < 0)
    return np.concatenate(
        [np.full(n, np.nan, np.float32) if p is None else p for p, n in zip(parts, count, strict=True)]
    )


def _texts(model: ProbedModel, pairs: ReversalPairs, tokens: np.ndarray) -> pd.Categorical:
    """The tokens as their tokenizer calls them; those of no name by their number. -1 stays empty."""
    ids, code = np.unique(tokens, return_inverse=True)
    names = {-1: ""}
    for token in ids[ids >= 0].tolist():
        known = hasattr(model.tokenizer, "convert_ids_to_tokens")
        name = pairs.tokens.get(token) or (model.tokenizer.convert_ids_to_tokens(token) if known else None)
        names[token] = str(name or token)
    texts = pd.Categorical([names[token] for token in ids.tolist()])
    shown = np.where(ids < 0, -1, texts.codes)
    return _category(shown[code], list(texts.categories))
