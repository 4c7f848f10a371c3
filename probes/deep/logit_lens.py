"""The logit lens: at which layer does the readout row's state already say the answer, forward and in reverse?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from ...arguments import checked
from ...errors import RevprobeError
from ...hooks.states import EMBEDDED, record_states
from ...hooks.untouched import untouched
from ...models.probed import ProbedModel, as_probed
from ...models.structure import attention_of, states_of
from ...progress import Progress, shows_progress
from ..pairs.pairs import ReversalPairs
from ..passes.alone import in_equal_lengths_if_need_be
from ..passes.asked import asked_pairs, out_of_sight
from ..passes.batches import (
    QueryBatch,
    in_batches,
    make_batch,
    prepare_queries,
    queries_per_batch,
    require_tokens_alone,
)
from ..passes.decomposition import LinearizedBatch
from ..passes.likelihood import no_partner, target_partners
from ..passes.plan import PassResult, Plan
from ..passes.run import describe
from ..passes.selection import chosen_of
from ..passes.states import Tail, rows_of_states
from ..readings.reading import Reading
from ..statistics.estimators import LATER_BLOCK, LATER_BLOCK_CONTROL
from ..statistics.partners import partner_column
from ..statistics.resampling import SHOWN_IN

NO_EMBEDDING = "no state before the first block, from which a gain could be counted"
NO_HEAD = "no head of the layer is read"
NO_SUM = "the logit is no sum of what heads and MLPs write"
NOT_DIRECT = "it reaches the logit through something nonlinear alone"
OWN_TOKENS = "later rows of a causal model have read the tokens of another target"

NUMBERS = ["log_probability", "rank", "entropy", "gain", "logit"]
NUMBERS += ["log_probability_control", "gain_control", "logit_control"]
Target = tuple[int, ...]
Place = tuple[str, int, int | None]  # site, layer, head


@checked
@shows_progress("queries")
def probe_logit_lens(
    model: ProbedModel | nn.Module,
    pairs: ReversalPairs,
    *,
    contributions: bool = False,
    batch_size: int | None = None,
    layers: Iterable[int] | None = None,
    control: bool = True,
    progress: Progress | bool | None = None,
    seed: int = 0,
) -> Reading:
    """Read the target's log-probability from the state of the readout row after each layer.

    Every state goes through the model's own final norm, prediction head, soft-caps and unembedding: it is put in the
    place of the last layer's output, and the model goes on from there. The last layer's own states are among those of
    every batch, at other tokens than their own, and are held against the model's logits (1e-5 of the largest in
    float32; the worst is `meta["worst_gap"]`). Layer -1 is the embedding.

    The value is the mean log-probability that the reverse target gains from the embedding to the last layer, in nats:
    what all layers together add to what the mask token (or, in a causal model, the token before the target) says by
    itself. It is defined for every pair, also where the target never comes first, and `summary(by="layer")` spreads it
    over the layers. The control reads the target from the states of another fact's query (of the group, with another
    target of as many tokens, which is wrong here as this one is there): what a model says whoever is asked about is no
    gain over it.

    Args:
        contributions: also what each head and each MLP adds to the target's logit directly, along the residual stream
            alone (`probe_stored_evidence` takes that further apart); further runs with everything nonlinear held, and a
            backward pass for each target; query by query where a whole batch is no sum (experts that sort its tokens).
        layers: which are read, all when None; -1 is the embedding. A gain is from the embedding whatever is chosen.

    Frame: pair, fact, kind, direction, site ("residual", "head" or "mlp"), layer, head (missing but for heads),
    log_probability (nats; of several target tokens their sum: at the last layer that of
    `probe_reverse_probability(mode="parallel")` of a masked model, which sees them all hidden at once, and of
    `mode="chain"` of a causal one, whose rows have read the target's tokens before theirs), rank (1-based, the worst
    over tokens), entropy (nats; mean over tokens), gain (nats), logit (of a state, the target's; of a head or an MLP,
    what it adds to it; mean over tokens), and log_probability_control, gain_control, logit_control; reason,
    reason_control. Heads and MLPs have a logit alone. Evidence in a later block, a layer without a residual state, and
    contributions to a logit that is no sum are NaN with that reason (`meta["no_contributions"]` says what it is).
    Cost: 1 + layers x target tokens / tokens forwards per query.
    Raises: RevprobeError, for a layer the model lacks, a model whose last layer's state is not what its logits are
        made from, one that does not treat every token by itself behind it, or virtual tokens.
    Source: nostalgebraist 2020, "interpreting GPT: the logit lens".
    """
    model = as_probed(model)
    require_tokens_alone(model, "the states of the query's tokens")
    pairs = asked_pairs(model, pairs, "logit_lens")
    plan = Plan(control=control, batch_size=batch_size, seed=seed, progress=progress)
    lens = in_equal_lengths_if_need_be(model, lambda: _Lens(model, pairs, plan, layers, contributions).run())
    reading = Reading("logit_lens", lens.frame(), describe(model, PassResult(pairs, np.array([]), []), plan))
    reading.meta.update({"statistic": reading.measured.statistic, "worst_gap": lens.tail.gap, "layers": lens.layers})
    reading.meta.update({"no_contributions": lens.no_sum} if lens.no_sum else {})
    return reading


class _Lens:
    """The state of one pass: what is read from each query's states, and what came out.

    Shapes: `log`, `logit`: `query layer ask`; `rank`, `entropy`: `query layer`; `added`: `query place ask`. An ask is
    a target priced at the query: its own first, then those of the pairs whose partner is asked there.
    """

    def __init__(
        self, model: ProbedModel, pairs: ReversalPairs, plan: Plan, layers: Iterable[int] | None, contributions: bool
    ) -> None:
        self.model, self.pairs, self.plan, self.contributions = model, pairs, plan, contributions
        self.queries = prepare_queries(model, pairs.queries)
        self.unseen = out_of_sight(model, self.queries)
        self.tail = Tail.of(model)
        self.states = states_of(model)
        residual, self.missing = self.states.of("residual"), self.states.missing("residual")
        there = sorted({*residual, *self.missing})
        self.layers = chosen_of("layer", layers, there, model=model, purpose="read")
        # The embedding is what gains are counted from, the last layer what the tail is held against.
        self.read = [one for one in residual if one in (EMBEDDED, self.tail.last.layer) or one in self.layers]
        self.sites = [residual[layer] for layer in self.read]
        partners = target_partners(pairs, model.logit_shift, seed=plan.seed)
        self.partner = {side: one if plan.control else np.full_like(one, -1) for side, one in partners.items()}
        self.sides = {"forward": pairs.forward, "reverse": pairs.reverse}
        self.asks = self._asks()
        self.places, self.silent = self._places()
        self.no_sum, self.one_by_one = "", False
        count, most = len(self.queries), max(map(len, self.asks))
        self.log, self.logit = np.zeros((2, count, len(self.read), most))
        self.rank, self.entropy = np.zeros((2, count, len(self.read)))
        self.added = np.full((count, len(self.places), most), np.nan)

    def _asks(self) -> list[list[Target]]:
        asks: list[dict[Target, None]] = [{query.target: None} for query in self.queries]
        for side, index in self.sides.items():
            for pair in np.flatnonzero(self.partner[side] >= 0):
                target = self.queries[index[pair]].target
                if self.model.objective == "masked" or len(target) == 1:
                    asks[index[self.partner[side][pair]]][target] = None
        return [list(targets) for targets in asks]

    def _places(self) -> tuple[list[Place], dict[Place, str]]:
        """The heads and MLPs of the chosen layers, and those that cannot be read, with the reason."""
        if not self.contributions:
            return [], {}
        attention, mlps, without = attention_of(self.model), self.states.of("mlp"), self.states.missing("mlp")
        heads: list[Place] = [("head", layer, n) for layer, most in attention.heads.items() for n in range(most)]
        places: list[Place] = [*heads, *(("mlp", layer, None) for layer in mlps)]
        silent: dict[Place, str] = {("head", layer, None): why for layer, why in attention.without.items()}
        silent |= {("mlp", layer, None): why for layer, why in without.items()}
        kept = [place for place in places if place[1] in self.layers]
        return kept, {place: why for place, why in silent.items() if place[1] in self.layers}

    def run(self) -> _Lens:
        size, done = queries_per_batch(self.model, self.queries, self.plan.batch_size), 0
        lengths = [len(query.token_ids) for query in self.queries]
        with untouched(self.model.module), torch.no_grad():
            for numbers in in_batches(self.model, range(len(lengths)), size, lengths.__getitem__):
                batch, own, states = rows_of_states(self.model, [self.queries[q] for q in numbers], self.sites)
                wanted = self._wanted(batch, numbers)
                self._read_states(batch, own, states, numbers, wanted)
                if self.places and not self.no_sum:
                    self._take_apart(batch, numbers, wanted)
                done += len(numbers)
                if callable(self.plan.progress):
                    self.plan.progress(done, len(lengths))
        return self

    def _wanted(self, batch: QueryBatch, numbers: Sequence[int]) -> torch.Tensor:
        """The token ids of every ask; where a query has fewer, its own target's. Shapes: `-> query token ask`."""
        most = max(len(self.asks[q]) for q in numbers)
        wanted = batch.targets.cpu()[..., None].repeat(1, 1, most)
        for row, q in enumerate(numbers):
            for place, target in enumerate(self.asks[q]):
                wanted[row, : len(target), place] = torch.tensor(target)
        return wanted

    def _read_states(
        self,
        batch: QueryBatch,
        own: torch.Tensor,
        states: Sequence[torch.Tensor],
        numbers: Sequence[int],
        wanted: torch.Tensor,
    ) -> None:
        asked, at = batch.is_target.cpu(), np.array(numbers)
        share = 1.0 / asked.sum(1).double()
        for read in self.tail.log_probabilities(batch, own, states):
            kept = asked[read.query, read.token]
            query, token, layer = read.query[kept], read.token[kept], read.layer[kept]
            logs, logits = (t[kept.to(t.device)] for t in (read.log_probabilities, read.logits))
            tokens = wanted[query, token].to(logs.device)
            chosen, weight = logs.gather(1, tokens), share[query]
            rank, entropy = (logs >= chosen[:, :1]).sum(-1), torch.special.entr(logs.exp()).sum(-1)
            place = at[query.numpy()], layer.numpy()
            asks = place[0][:, None], place[1][:, None], np.arange(tokens.shape[1])[None]
            np.add.at(self.log, asks, chosen.cpu().numpy())
            np.add.at(self.logit, asks, (logits.double().gather(1, tokens).cpu() * weight[:, None]).numpy())
            np.add.at(self.entropy, place, (entropy.cpu() * weight).numpy())
            np.maximum.at(self.rank, place, rank.cpu().numpy())

    def _take_apart(self, batch: QueryBatch, numbers: Sequence[int], wanted: torch.Tensor) -> None:
        """What heads and MLPs add to the logits of every ask; nothing, where the logit is no such sum.

        Experts that sort the tokens of a whole batch make sums of one query alone, so a batch is asked query by query
        before that is said, and those after it as well.
        """
        if not self.one_by_one:
            try:
                return self._share_out(batch, numbers, wanted)
            except RevprobeError:
                self.one_by_one = True
        try:
            for row, number in enumerate(numbers):
                alone = make_batch(self.model, [self.queries[number]])
                self._share_out(alone, [number], wanted[row : row + 1, : alone.targets.shape[1]])
        except RevprobeError as error:  # the model itself ran: what failed is taking its logits apart
            self.no_sum, self.added[:] = str(error), np.nan

    def _share_out(self, batch: QueryBatch, numbers: Sequence[int], wanted: torch.Tensor) -> None:
        """Raises: RevprobeError, where the logits of the batch cannot be taken apart."""
        mlps = self.states.of("mlp")
        chosen = [mlps[layer] for site, layer, _ in self.places if site == "mlp"]
        with record_states(self.model.module, chosen) as written:
            held = LinearizedBatch.run(self.model, batch)
        states = [written[site] for site in chosen]
        for ask in range(wanted.shape[2]):
            found, shares = held.by_head(wanted[..., ask].to(batch.targets.device), states)
            values: dict[Place, torch.Tensor | None] = {
                ("head", piece.layer, piece.head): column
                for piece, column in zip(found.pieces, found.contribution.unbind(1), strict=True)
                if piece.part == "head" and piece.layer is not None
            }
            values |= {("mlp", site.layer, None): share for site, share in zip(chosen, shares, strict=True)}
            for place, one in enumerate(self.places):
                column = values.get(one)
                if column is not None:
                    self.added[numbers, place, ask] = column.cpu().numpy()

    # ---- what came out ----

    def frame(self) -> pd.DataFrame:
        """One row per pair, direction and layer, and per head and MLP where they were asked for."""
        parts = [part for direction in self.sides for part in self._of_direction(direction)]
        frame = pd.concat(parts, ignore_index=True)
        frame = frame.sort_values(["pair", "direction"], kind="stable", ignore_index=True)
        without = [*(name for name in NUMBERS if name.endswith("_control")), "reason_control"]
        return frame if self.plan.control else frame.drop(columns=without)

    def _of_direction(self, direction: str) -> Iterator[pd.DataFrame]:
        index = self.sides[direction]
        ask, elsewhere = self._control_asks(direction), index[self.partner[direction]]
        known = (ask >= 0) & ~self.unseen[elsewhere]

        def beside(name: str, table: np.ndarray) -> dict[str, np.ndarray]:
            """The target's numbers, here and at the partner's query. Shapes: `table`: `query place ask`."""
            own, other = table[index, :, 0], table[elsewhere, :, np.maximum(ask, 0)]
            return {name: own, f"{name}_control": np.where(known[:, None], other, np.nan)}

        place = [self.read.index(layer) if layer in self.read else -1 for layer in self.layers]
        there = np.array(place) >= 0
        began = self.log[:, [self.read.index(EMBEDDED)]] if EMBEDDED in self.read else np.full((1, 1, 1), np.nan)
        numbers = beside("log_probability", self.log) | beside("gain", self.log - began) | beside("logit", self.logit)
        numbers |= {"rank": self.rank[index], "entropy": self.entropy[index]}
        numbers = {name: np.where(there, values[:, place], np.nan) for name, values in numbers.items()}
        why = [self.missing.get(layer, "" if EMBEDDED in self.read else NO_EMBEDDING) for layer in self.layers]
        yield self._rows(direction, [("residual", layer, None) for layer in self.layers], numbers, why)
        if self.places:
            nothing = np.isnan(self.added[..., 0]).all(0)
            why = [(NO_SUM if self.no_sum else NOT_DIRECT) if none else "" for none in nothing]
            yield self._rows(direction, self.places, beside("logit", self.added), why)
        if self.silent:
            yield self._rows(direction, list(self.silent), {}, list(self.silent.values()))

    def _control_asks(self, direction: str) -> np.ndarray:
        """Which of its partner's query's asks is each pair's own target; -1 without one. Shapes: `-> pair`."""
        index, partner = self.sides[direction], self.partner[direction]
        targets = [self.queries[q].target for q in index]
        asks = [self.asks[index[other]] if other >= 0 else [] for other in partner]
        return np.array([one.index(own) if own in one else -1 for one, own in zip(asks, targets, strict=True)])

    def _no_control(self, direction: str) -> np.ndarray:
        """Why a pair has no control; "" where it has one. Shapes: `-> pair`."""
        partner = self.partner[direction]
        alone = no_partner(self.pairs, self.model.logit_shift, partner, seed=self.plan.seed)
        unseen = self.unseen[self.sides[direction][partner]]
        silent = [partner < 0, self._control_asks(direction) < 0, unseen]
        return np.select(silent, [alone, OWN_TOKENS, LATER_BLOCK_CONTROL], "").astype(object)

    def _rows(
        self, direction: str, places: Sequence[Place], numbers: Mapping[str, np.ndarray], why: Sequence[str]
    ) -> pd.DataFrame:
        """Rows of one direction, pair by pair. Shapes: each of `numbers`: `pair place`; `why` (reasons): `place`."""
        index, shape = self.sides[direction], (len(self.pairs), len(places))
        unseen = np.broadcast_to(self.unseen[index][:, None], shape)
        reason = np.where(unseen, LATER_BLOCK, np.array(why, dtype=object))
        site, layer, head = zip(*places, strict=True)
        columns: dict[str, Any] = {"pair": np.repeat(np.arange(shape[0]), shape[1])}
        columns |= {"fact": np.repeat(self.pairs.facts.astype(str), shape[1]), "kind": self.pairs.kind}
        columns |= {"direction": direction, "site": np.tile(site, shape[0])}
        columns |= {
            "layer": pd.array(layer * shape[0], dtype="Int64"),
            "head": pd.array(head * shape[0], dtype="Int64"),
        }
        for name in NUMBERS:
            values = np.broadcast_to(numbers.get(name, np.nan), shape)
            columns[name] = np.where(unseen, np.nan, values).reshape(-1)
        columns["reason"] = reason.reshape(-1)
        columns["reason_control"] = np.where(reason == "", self._no_control(direction)[:, None], reason).reshape(-1)
        once, shown = dict(self.pairs.flags), self.pairs.flags.get(SHOWN_IN[direction])
        once |= partner_column(self.pairs.facts, self.partner[direction], shown)
        return pd.DataFrame(columns | {name: np.repeat(np.asarray(values), shape[1]) for name, values in once.items()})
