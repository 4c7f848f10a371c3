"""One pass over the queries for all three probes: the model runs each query once, whatever is asked of it.

A batch holds whole pairs (with the reverse query of the control's pair), since gradient products need both sides
at once; scores and probabilities are kept per query and joined to pairs afterwards. Only multi-token targets in
chain mode, and their controls, need further runs.

Shapes below: query (distinct queries), pair, parameter, token (target tokens).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import RevprobeError, did_you_mean
from ...hooks.attention import AttentionTap
from ...hooks.gradients.backward import Products, Selection, part_labels
from ...hooks.gradients.graph import adopted_parameters
from ...hooks.gradients.one_by_one import read_one_by_one
from ...hooks.gradients.recorder import GradientRecorder, record_gradients
from ...hooks.gradients.run_again import RunsOtherwise, run_again, that_can
from ...hooks.gradients.spread_weights import WholeWeights, require_units
from ...hooks.layer_numbers import outermost_blocks
from ...hooks.untouched import untouched
from ...models.families.known import code_passed_over
from ...models.probed import ProbedModel
from ...models.structure import attention_of, fused_parts
from ..pairs.pairs import ReversalPairs
from .alone import PaddingReaches
from .asked import asked_pairs, out_of_sight, tokens_note
from .batches import QueryBatch, gradient_batch, in_batches, make_batch, prepare_queries, queries_per_batch, tapped
from .draws import every_two, kept_draws, mean_floor, mean_products, mean_rows
from .likelihood import Likelihoods, mean_nll, readout, run_chains
from .plan import Part, PassResult, Plan, Work, part_of
from .prompts import null_partners

DIFFERENT_LENGTHS = "queries of different lengths, which cannot share a batch of this model"


def run_pass(model: ProbedModel, pairs: ReversalPairs, plan: Plan) -> PassResult:
    """Run every query once and collect what the plan asks for; the model comes out as it went in.

    Raises: RevprobeError, for empty pairs, pairs and queries that do not fit the model, NaN logits, gradients under
        `torch.inference_mode`, or (with attention) a model whose attention is never seen.
    """
    if plan.gradient and (
        torch.is_inference_mode_enabled() or any(p.is_inference() for p in model.module.parameters())
    ):
        raise RevprobeError(
            "no gradient is recorded under torch.inference_mode(), nor of a model made under it; expected ordinary "
            "tensors, so call the gradient probe (and load the model) outside of it"
        )
    require_units(model.module)
    if plan.share is not None and model.draws > 1:
        raise RevprobeError(f"{model.name}: draws of random tokens are not divided among processes; probe it in one")

    def prepared(part: int = 0, parts: int = 1) -> _Pass:
        return _Pass(model, pairs, plan, part, parts)

    def work(part: int, parts: int) -> PassResult:
        return prepared(part, parts).run()

    try:
        if plan.share is None:
            return work(0, 1)
        return plan.share(Work(model, pairs, plan, work, lambda: prepared().result))
    except PaddingReaches as error:
        if plan.share is not None:  # the other processes went on
            raise RevprobeError(f"{model.name}: {error}; give pairs whose queries are of equal length") from None
        model.contract = replace(model.contract, equal_lengths=str(error))
        return work(0, 1)


def run_part(model: ProbedModel, pairs: ReversalPairs, plan: Plan, part: int, parts: int) -> Part:
    """One part of a pass, in a process that another one asked for it.

    Raises: as `run_pass`; PaddingReaches, which the one that asks takes for all parts.
    """
    return part_of(_Pass(model, pairs, plan, part, parts).run())


class _Pass:
    """The state of one pass: the checked queries, the partners, and the result being filled.

    Of its batches, those numbered `part`, `part + parts`, ... are run.
    """

    def __init__(self, model: ProbedModel, pairs: ReversalPairs, plan: Plan, part: int, parts: int) -> None:
        pairs = asked_pairs(model, pairs, plan.reader)
        self.model, self.pairs, self.plan, self.part, self.of = model, pairs, plan, part, parts
        self.queries = prepare_queries(model, pairs.queries)
        self.lengths = np.array([len(query.token_ids) for query in self.queries])
        self.batch_size = queries_per_batch(model, self.queries, plan.batch_size)
        room = gradient_batch(model, self.queries, plan.batch_size)
        self.again = outermost_blocks(model.module) if plan.gradient and room.again else []
        self.pair_size = room.queries if self.again else self.batch_size
        if parts > 1:  # at least one batch for each
            share = max(2, -(-len(self.queries) // parts))
            self.batch_size, self.pair_size = min(self.batch_size, share), min(self.pair_size, share)
        self.apart = bool(model.contract.equal_lengths)
        self.attention = attention_of(model) if plan.attention else None
        partner = null_partners(pairs, pairs.groups(model.logit_shift), seed=plan.seed)
        self.partner = partner if plan.control else np.full(len(pairs), -1)
        self.weights = WholeWeights(model.module) if plan.gradient else None
        self.selected = select_parameters(model.module, plan.parameters, self.weights) if self.weights else {}
        self.parts = fused_parts(model.module) if plan.gradient else {}
        self.adopted: dict[str, dict[str, nn.Parameter]] | None = None
        labels = [label for name in self.selected for label in part_labels(name, self.parts)]
        labels = ["all"] if plan.summed else labels
        unseen, place = out_of_sight(model, self.queries), place_of(model)
        self.result = PassResult(pairs, self.partner, labels, unseen=unseen, place=place)
        if plan.probability:
            self.result.likelihoods = Likelihoods.of(
                model, self.queries, pairs, plan.mode, control=plan.control, seed=plan.seed
            )
        self.done, self.to_do = np.zeros(len(self.queries), dtype=bool), len(self.queries)
        if plan.gradient:
            self._allocate_products()
        every, *fewer = kept_draws(model.draws)
        self.result.without = [self.result.empty_copy(kept) for kept in fewer]
        self.by_draws = [(self.result, every), *zip(self.result.without, fewer, strict=True)]

    def run(self) -> PassResult:
        with untouched(self.model.module), torch.set_grad_enabled(self.plan.gradient):
            batches = list(self._batches())[self.part :: self.of]
            self.to_do = len({query for queries, _ in batches for query in queries.tolist()})
            for queries, pairs in batches:
                self._run_batch(queries, pairs)
            if self.result.likelihoods is not None:
                with torch.no_grad():
                    every = [one.likelihoods for one, _ in self.by_draws if one.likelihoods is not None]
                    run_chains(every, self.batch_size, self.part, self.of)
        return self.result

    def _allocate_products(self) -> None:
        columns = len(self.result.parameters)
        self.result.inner = np.full((len(self.pairs), columns), np.nan)
        self.result.inner_control = np.full((len(self.pairs), columns), np.nan)
        self.result.norm = np.full((len(self.queries), columns), np.nan)
        self.result.floor = np.full((len(self.queries), columns), np.nan)

    def _batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Queries of each batch and, for gradients, the pairs that are whole in it."""
        if self.plan.gradient:
            yield from self._pair_batches()
            return
        for numbers in in_batches(self.model, range(len(self.queries)), self.batch_size, self.lengths.__getitem__):
            yield np.array(numbers), np.array([], dtype=int)

    def _pair_batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Greedy batches of whole pairs, facts together: at least one pair, at most `pair_size` distinct queries."""
        queries: dict[int, None] = {}
        members: list[int] = []
        along, lengths = self._along_cycle(), self._one_length()
        for pair in along[np.argsort(lengths[along], kind="stable")]:
            wanted = [int(self.pairs.forward[pair]), int(self.pairs.reverse[pair])]
            wanted += [int(self.pairs.reverse[self.partner[pair]])] if self.partner[pair] >= 0 else []
            fresh = [q for q in wanted if q not in queries]
            full = len(queries) + len(fresh) > self.pair_size
            if members and (full or lengths[pair] != lengths[members[0]]):
                yield np.array(list(queries)), np.array(members)
                queries, members, fresh = {}, [], wanted
            queries.update(dict.fromkeys(fresh))
            members.append(int(pair))
        yield np.array(list(queries)), np.array(members)

    def _one_length(self) -> np.ndarray:
        """The length of all queries of a pair and its control; 0 where they differ or where it makes no difference."""
        sides = [self.pairs.forward, self.pairs.reverse, self.pairs.reverse[self.partner]]
        sides[2] = np.where(self.partner >= 0, sides[2], sides[0])
        lengths = self.lengths[np.stack(sides)]
        return np.where(self.apart & (np.ptp(lengths, axis=0) == 0), lengths[0], 0)

    def _along_cycle(self) -> np.ndarray:
        """Pairs ordered so that a fact is followed by its control's fact: batches then share reverse queries."""
        fact = np.unique(self.pairs.facts.astype(str), return_inverse=True)[1]
        partnered = self.partner >= 0
        following = np.full(fact.max() + 1, -1)
        following[fact[partnered]] = fact[self.partner[partnered]]
        rank, place = np.full(len(following), -1), 0
        for start in range(len(following)):
            current = start
            while current >= 0 and rank[current] < 0:
                rank[current], place = place, place + 1
                current = int(following[current])
        return np.argsort(rank[fact], kind="stable")

    def _run_batch(self, queries: np.ndarray, pairs: np.ndarray) -> None:
        if not self.apart or np.ptp(self.lengths[queries]) == 0:
            try:
                self._run_together(queries, pairs, gradient=self.plan.gradient)
            except RunsOtherwise:
                self.again = []
                self._run_together(queries, pairs, gradient=self.plan.gradient)
            return
        for numbers in in_batches(self.model, queries.tolist(), self.batch_size, self.lengths.__getitem__):
            self._run_together(np.array(numbers), np.array([], dtype=int), gradient=False)
        self._keep_products(self._alone(queries), queries, pairs)

    def _run_together(self, queries: np.ndarray, pairs: np.ndarray, *, gradient: bool) -> None:
        batch = make_batch(self.model, [self.queries[q] for q in queries], in_draws=True, attention=self.attention)
        with ExitStack() as stack:
            if gradient and self.again:
                blocks = that_can(self.model.module, self.again, self._adopted())
                stack.enter_context(run_again(self.model.module, blocks))
            recorder = self._recorder(stack, queries) if gradient else None
            tapping = None if self.attention is None else tapped(self.model, batch, self.attention)
            with tapping or nullcontext() as tap:
                logits = readout(self.model, batch)
            if recorder is not None:
                self._keep_products(partial(recorder.backward, mean_nll(logits, batch)), queries, pairs)
                self.result.reached.update(recorder.reached)
        if tap is not None:
            self._keep_scores(tap, batch, queries)
        for result, _ in self.by_draws:
            if result.likelihoods is not None:
                result.likelihoods.from_run(logits.detach(), queries)
        self.done[queries] = True
        if callable(self.plan.progress):
            self.plan.progress(int(self.done.sum()), self.to_do)

    def _loss_of(self, queries: np.ndarray) -> Callable[[int], Tensor]:
        """The loss of one of the queries in one of the draws, run by itself."""

        def loss_of(n: int) -> Tensor:
            query, draw = divmod(n, self.model.draws)
            alone = make_batch(self.model, [self.queries[queries[query]]], in_draws=True).row(draw)
            return mean_nll(readout(self.model, alone), alone)[0]

        return loss_of

    def _alone(self, queries: np.ndarray) -> Callable[[Tensor, Tensor], Products]:
        """What multiplies gradients of queries that cannot share a batch."""
        weights = self.weights
        assert weights is not None, "gradients are asked for"
        selection = Selection(self.selected, self.parts, self._adopted(), weights)
        self.result.one_by_one.update(dict.fromkeys(self.selected, DIFFERENT_LENGTHS))

        def products(left: Tensor, right: Tensor) -> Products:
            names, loss_of = list(self.selected), self._loss_of(queries)
            for parameter in self.selected.values():
                weights.require_grad(parameter)  # put back with everything else when the pass ends
            rows = len(queries) * self.model.draws
            found = read_one_by_one(self.model.module, selection, names, loss_of, (left, right), rows)
            moved = {label for label, inner in found.inner.items() if bool(inner.any())}
            self.result.reached.update(name for label, name in selection.owners.items() if label in moved)
            return found

        return products

    def _recorder(self, stack: ExitStack, queries: np.ndarray) -> GradientRecorder:
        adopted, unread = self._adopted(), self.result.one_by_one
        recording = record_gradients(
            self.model.module,
            self.selected,
            len(queries) * self.model.draws,
            parts=self.parts,
            adopted=adopted,
            loss_of=self._loss_of(queries),
            unread=unread,
            weights=self.weights,
        )
        return stack.enter_context(recording)

    def _adopted(self) -> dict[str, dict[str, nn.Parameter]]:
        """Parameters that are used without calling their module, found by one run of the first query."""
        if self.adopted is None:
            first = make_batch(self.model, self.queries[:1], in_draws=True)
            run = lambda: self.model.logits(first.input_ids, first.attention_mask).sum()  # noqa: E731
            self.adopted = adopted_parameters(self.model.module, self.selected, run, self.weights)
        return self.adopted

    def _keep_scores(self, tap: AttentionTap, batch: QueryBatch, queries: np.ndarray) -> None:
        """Scores averaged over readout rows and evidence tokens, weights summed over evidence tokens."""
        cell = (batch.is_target[:, :, None] & batch.is_evidence[:, None, :])[:, None]
        rows = batch.is_target.sum(1)[:, None]
        for result, _ in self.by_draws:
            result.without_attention |= dict(tap.attention.without) | tap.missing()
            result.left_out |= dict(tap.attention.left_out) | tap.left_out
        for layer, call in tap.layers(self.model.name).items():
            score = call.score.masked_fill(~cell, 0.0).sum((2, 3)) / cell.sum((2, 3))
            weight = call.weight.masked_fill(~cell, 0.0).sum((2, 3)) / rows
            for result, draws in self.by_draws:
                for kept, values in ((result.score, score), (result.weight, weight)):
                    table = kept.setdefault(layer, np.full((len(self.queries), values.shape[1]), np.nan))
                    table[queries] = mean_rows(values, batch.draws, draws)

    def _keep_products(
        self, multiply: Callable[[Tensor, Tensor], Products], queries: np.ndarray, pairs: np.ndarray
    ) -> None:
        """Norms of every query and inner products of every pair of the batch, with its control's; of mean gradients."""
        place = np.full(len(self.queries), -1)
        place[queries] = np.arange(len(queries))
        partner = self.partner[pairs]
        controlled = pairs[partner >= 0]
        left = np.concatenate([place[self.pairs.forward[pairs]], place[self.pairs.forward[controlled]], place[queries]])
        right = np.concatenate(
            [place[self.pairs.reverse[pairs]], place[self.pairs.reverse[self.partner[controlled]]], place[queries]]
        )
        count, (first, last) = self.model.draws, (len(pairs), len(pairs) + len(controlled))
        found = multiply(every_two(left, count, first=True), every_two(right, count, first=False))
        products = self._columns(found.inner)
        floors = np.sqrt(self._columns({label: floor**2 for label, floor in found.floor.items()}))
        for result, kept in self.by_draws:
            values = mean_products(products, count, kept)
            result.inner[pairs], result.inner_control[controlled] = values[:first], values[first:last]
            result.norm[queries] = np.sqrt(np.maximum(values[last:], 0.0))
            result.floor[queries] = mean_floor(floors, count, kept)

    def _columns(self, by_label: Mapping[str, Tensor]) -> np.ndarray:
        """One column per parameter, or their sum. Shapes: `-> row parameter`, float64."""
        values = torch.stack([column.double().cpu() for column in by_label.values()], dim=1).numpy()
        return values.sum(1, keepdims=True) if self.plan.summed else values


def select_parameters(module: nn.Module, names: Sequence[str] | None, weights: WholeWeights) -> dict[str, nn.Parameter]:
    """The named parameters as they run, all of them when None; tied ones once.

    Raises: RevprobeError, for an unknown name, or weights that `device_map` left on disk or in offloaded memory.
    """
    everything = dict(module.named_parameters())
    unknown = [name for name in names or [] if name not in everything]
    if unknown:
        raise RevprobeError(f"no parameter {unknown[0]!r}{did_you_mean(unknown[0], everything)}")
    away = [name for name in everything if everything[name].is_meta]
    if away:
        raise RevprobeError(
            f"parameter {away[0]!r} is on disk or offloaded ({len(away)} in all), so no gradient passes through it; "
            "load with a device_map that holds every weight"
        )
    chosen = everything if names is None else {name: everything[name] for name in names}
    # Whole numbers have no gradient, nor have tensors without entries (experts of which there are none).
    return {name: weights.of(p) for name, p in chosen.items() if p.is_floating_point() and p.numel()}


def describe(model: ProbedModel, result: PassResult, plan: Plan) -> dict[str, Any]:
    """What every reading of a pass says about itself; no clock and no path, so that equal runs give equal files."""
    from importlib.metadata import version

    return {
        "model": model.name,
        "objective": model.objective,
        "logit_shift": model.logit_shift,
        **({} if model.block_size is None else {"block_size": model.block_size}),
        **({} if model.canvas_length is None else {"canvas_length": model.canvas_length, "draws": model.draws}),
        "kind": result.pairs.kind,
        "step": model.step,
        "weights": model.weights,
        "pairs": result.pairs.digest,
        "tokens": tokens_note(model, result.pairs),
        "pair_count": len(result.pairs),
        "fact_count": len(set(result.pairs.facts)),
        "control": plan.control,
        "seed": plan.seed,
        **(result.place or place_of(model)),
        **({"left_out": dict(result.left_out)} if result.left_out else {}),
        "versions": {name: version(name) for name in ("revprobe", "torch", "transformers")},
    } | ({"batches": f"of equal lengths only: {apart}"} if (apart := model.contract.equal_lengths) else {})


def place_of(model: ProbedModel) -> dict[str, Any]:
    """What a pass here is computed on and in; of types that of products, and the weights' own where it is another."""
    told = {**_arithmetic(model), "device": model.device.type, "threads": torch.get_num_threads()}
    module: Any = model.module
    settings = module.config.to_dict() if type(module).__module__.startswith("transformers.") else {}
    code = code_passed_over(settings)
    return told if code is None else told | {"code_not_run": code}


def _arithmetic(model: ProbedModel) -> dict[str, Any]:
    kind, contract = model.device.type, model.contract
    narrow = model.dtype if contract.ambient or contract.narrowed is None else contract.narrowed
    if torch.is_autocast_enabled(kind):
        narrow = min(narrow, torch.get_autocast_dtype(kind), key=lambda dtype: dtype.itemsize)
    name = str(narrow).removeprefix("torch.")
    weights = str(model.dtype).removeprefix("torch.")
    return {"dtype": name} if name == weights else {"dtype": name, "weight_dtype": weights}
