"""Whether the three probes can be trusted on a model: each thing they take for granted, measured, in one table.

`diagnose(model)` shows the contract the model was held to when it was wrapped, and tries the probes on a few pairs of
ordinary tokens against slow computations that share nothing with them: each query run by itself, the model's own eager
attention, plain autograd. Numbers between models in other kernels and types are rounding, measured and never judged.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import psutil
import torch
from torch import Tensor, nn

from ..arguments import checked
from ..errors import RevprobeError, first_line
from ..hooks.untouched import set_eval_mode, untouched
from ..models.contract.introspect import config_value
from ..models.contract.skeleton import skeleton
from ..models.contract.trial import ordinary_ids
from ..models.families.known import FAMILIES
from ..models.probed import ProbedModel, as_probed
from ..models.registry import load_model
from ..models.structure import attention_of
from ..progress import Progress, counted, shows_progress
from .attention import probe_attention_correlation
from .gradient import probe_gradient_cosine
from .pairs.pairs import ReversalPairs
from .pairs.query import Query, ReversalPair
from .passes.batches import QueryBatch, make_batch, prepare_queries
from .passes.draws import mean_likelihood
from .passes.likelihood import mean_nll, readout
from .probability import probe_reverse_probability
from .readings.reading import Reading

OK, HANDLED, MEASURED, NOT_RUN, REFUSED = "ok", "handled", "measured", "not run", "refused"
# Agreement asked of a probe with the slow computation, in float32; elsewhere a multiple of the type's own rounding.
_AGREES, _ROUNDINGS = 1e-4, 64.0
_FACTS, _LENGTH = 4, 8
# What plain gradients of one query, or another copy of the weights, may take of the memory that is free.
_SHARE = 0.5


class Line(NamedTuple):
    """One check: what came out, its size where it has one, and what it means."""

    check: str
    result: str
    measured: float
    note: str


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """The table of one model's checks, and which of the three probes can be trusted on it.

    `table`: check, result ("ok", "handled", "measured", "not run" or "refused"), measured (in standard deviations of
    the logits unless the note says otherwise; NaN without a size), note.
    """

    model: str
    table: pd.DataFrame
    probes: Mapping[str, bool]

    @property
    def trustworthy(self) -> bool:
        """Whether all three probes answer, and agree with the slow computations."""
        return all(self.probes.values())

    @property
    def verdict(self) -> str:
        failing = [name for name, fine in self.probes.items() if not fine]
        if not failing:
            return "all three probes can be trusted on it"
        return f"not to be trusted or not to be had on it: {', '.join(failing)}"

    def shown(self) -> pd.DataFrame:
        """The table as people read it: sizes of two digits, nothing where there is none."""
        sizes = ["" if np.isnan(value) else f"{value:.2g}" for value in self.table["measured"]]
        return self.table.assign(measured=sizes)

    def __repr__(self) -> str:
        with pd.option_context("display.width", 200, "display.max_colwidth", None):
            return f"{self.model}: {self.verdict}\n{self.shown().to_string(index=False, justify='left')}"

    def _repr_html_(self) -> str:
        return f"<p>{escape(self.model)}: {escape(self.verdict)}</p>{self.shown().to_html(index=False, escape=True)}"


@checked
@shows_progress("checks")
def diagnose(model: ProbedModel | nn.Module | str | Path, *, progress: Progress | bool | None = None) -> Diagnosis:
    """Try everything the probes take for granted on a model, before any number is taken of it.

    Args:
        model: a wrapped model, a module, or what `load_model` takes.
        progress: called with (checks done, checks in all) of the three probes; None shows a bar, False nothing.
    Raises: RevprobeError, when a name or folder names no model. A model that cannot be wrapped is a line of the table.
    """
    try:
        probed = as_probed(load_model(model) if isinstance(model, str | Path) else model)
    except RevprobeError as error:
        if isinstance(model, str | Path):
            raise
        return Diagnosis(type(model).__name__, _table([Line("wrapping", REFUSED, float("nan"), str(error))]), _NONE)
    with untouched(probed.module):
        return _Examination(probed, progress).diagnosis()


_NONE = dict.fromkeys(("attention", "gradient", "probability"), False)


def some_pairs(model: ProbedModel) -> ReversalPairs:
    """A few pairs of ordinary tokens in both orders, of the kind that fits the model."""
    length = min(_LENGTH, model.max_length or _LENGTH)
    length -= int(model.canvas_length is not None and length < _LENGTH)  # a begin token goes before them
    if length < 4:
        raise RevprobeError(f"{model.name} takes {length} tokens; a pair needs 4")
    ids = [i for i in ordinary_ids(model, 2 * _LENGTH) if i != model.mask_token_id]
    if len(ids) < 3:
        raise RevprobeError(f"{model.name} has {len(ids)} ordinary tokens; pairs to try it on need 3")
    asked, given = _places(model, length)
    pairs = []
    for fact in range(_FACTS):
        one, other = ([ids[(fact * step + k) % len(ids)] for k in range(length)] for step in (1, 2))
        one[asked], one[given] = ids[(fact + 2) % len(ids)], ids[fact % len(ids)]
        if model.objective == "masked":
            other[asked], other[given] = one[given], one[asked]
            forward, reverse = Query(one, [asked], [given]), Query(other, [given], [asked])
            pairs.append(ReversalPair(forward, reverse, fact=str(fact)))
        else:
            other[1], other[-1] = one[-1], one[1]
            forward, reverse = Query(one, [length - 1], [1]), Query(other, [length - 1], [1])
            pairs.append(ReversalPair(forward, reverse, kind="swapped", fact=str(fact)))
    return ReversalPairs.from_pairs(pairs)


def _places(model: ProbedModel, length: int) -> tuple[int, int]:
    """Where a forward query has its target and its evidence; both in one block of a model that is read in blocks.

    Raises: RevprobeError, when no block has room for them and for their readout rows.
    """
    if model.objective == "causal":
        return length - 1, 1
    size = model.block_size
    if size is None:
        return 1, length - 2
    for start in range((length - 1) // size * size, -1, -size):
        first, last = max(1, start + model.logit_shift), min(start + size, length) - 1
        if first < last:
            return first, last
    raise RevprobeError(
        f"{model.name} in blocks of {size}: of no pair the evidence is in sight in both orders; try "
        "model.in_blocks(None), or larger blocks"
    )


class _Examination:
    """The checks of one model, in the order of the table."""

    def __init__(self, model: ProbedModel, progress: Progress | bool | None = None) -> None:
        self.model, self.contract, self.progress = model, model.contract, progress
        narrow = self.contract.narrowed or model.dtype
        self.agrees = _AGREES if narrow.itemsize >= 4 else _ROUNDINGS * torch.finfo(narrow).eps
        self.answers = dict(_NONE)

    def diagnosis(self) -> Diagnosis:
        lines = [*self._wrapping()]
        try:
            self.pairs = some_pairs(self.model)
        except RevprobeError as error:
            lines.append(Line("pairs", REFUSED, float("nan"), str(error)))
        else:
            lines += [*self._probes(), *self._other_arithmetic()]
        return Diagnosis(self.model.name, _table(lines), self.answers)

    def _wrapping(self) -> Iterator[Line]:
        model, contract, size = self.model, self.contract, self.contract.measured
        hidden = f"hidden by token {model.mask_token_id}" if model.objective == "masked" else "hidden by causality"
        hidden = hidden if model.canvas_length is None else "hidden by random tokens"
        reads = f"{model.objective}, targets {hidden}, read at row i - {model.logit_shift}"
        yield Line("objective", OK, size.get("later tokens", float("nan")), f"{reads}; how far a later token moves it")
        yield Line("reads", OK, float("nan"), _way(model))
        if contract.reaches_back is None:
            yield Line("direction", NOT_RUN, float("nan"), "its logits do not depend on its input yet")
        routed = "; experts sort other rows' tokens in, so equal to rounding only" if contract.routed else ""
        yield Line("other rows", OK, size.get("other rows", float("nan")), f"their content moves nothing{routed}")
        yield Line("batch size", MEASURED, size.get("batch size", float("nan")), "a row alone and in a batch: rounding")
        apart = contract.equal_lengths
        note = f"{apart}: batches are formed of equal lengths only" if apart else "what stands behind it moves nothing"
        yield Line("padding", HANDLED if apart else OK, size.get("padding", float("nan")), note)
        if not apart:
            yield Line("alone", MEASURED, size.get("alone", float("nan")), "a row padded and alone: rounding")
        placed = contract.placement
        if any((placed.logits, placed.rows_more, placed.columns_more)):
            more = f"{placed.rows_more} rows and {placed.columns_more} columns beside the tokens', which start at row "
            yield Line("virtual tokens", HANDLED, float("nan"), f"{more}{placed.rows} and column {placed.columns}")
        kind = "text and token ids" if model.tokenizer is not None else "token ids only: no tokenizer"
        if model.tokenizer is None and model.tokenizer_source is not None:
            kind += f"; tokenizer={model.tokenizer_source!r} has the family's"
        yield Line("pairs", OK, float("nan"), kind)

    def _probes(self) -> Iterator[Line]:
        checks: dict[str, Callable[[], Iterator[Line]]] = {
            "probability": self._probability,
            "attention": self._attention,
            "gradient": self._gradient,
        }
        for name, check in counted(list(checks.items()), self.progress):
            try:
                lines = list(check())
            except Exception as error:  # a line of the table, whatever it is
                told = str(error) if isinstance(error, RevprobeError) else first_line(error)
                lines = [Line(name, REFUSED, float("nan"), told)]
            self.answers[name] = not any(line.result == REFUSED for line in lines)
            yield from lines

    def _judged(self, check: str, apart: float, note: str) -> Line:
        """A probe's number against the slow one; `apart` is relative."""
        fine = apart <= self.agrees
        return Line(check, OK if fine else REFUSED, apart, note if fine else f"{note}: they disagree, so do not use it")

    def _probability(self) -> Iterator[Line]:
        frame = probe_reverse_probability(self.model, self.pairs, control=False).frame
        places = frame[["pair", "direction"]].to_numpy().tolist()
        alone = [self._log_probability(getattr(self.pairs[pair], direction)) for pair, direction in places]
        apart = float(np.abs(frame["log_probability"] - alone).max())
        yield self._judged("probability", apart, "log-probability of a target in a batch and by a run of its own, nats")

    def _attention(self) -> Iterator[Line]:
        reading = probe_attention_correlation(self.model, self.pairs, control=False)
        frame = reading.frame
        seen = sorted(frame.loc[frame["reason"] == "", "layer"].unique())
        if not seen:
            raise RevprobeError("no layer's attention can be read")
        yield Line("attention", OK, float("nan"), f"read of {len(seen)} layer{'s' * (len(seen) > 1)}: {_ranges(seen)}")
        for path, reason in reading.meta.get("left_out", {}).items():
            yield Line("attention left out", HANDLED, float("nan"), f"{path}: {reason}")
        yield self._eager(reading)

    def _eager(self, reading: Reading) -> Line:
        """The weights beside those of transformers' eager attention, on a copy that shares the parameters."""
        check, nan, module = "attention weights", float("nan"), self.model.module
        sites = {site.source for site in attention_of(self.model).sites}
        if sites == {"softmax"} or not getattr(module, "_supports_sdpa", False):
            return Line(check, NOT_RUN, nan, "it has one way of attending; what is read gives its output")
        try:
            with skeleton(module, self.model.name) as copied:
                if copied is module:
                    return Line(check, NOT_RUN, nan, "no copy of it can be made")
                eager: Any = copied
                eager.set_attn_implementation("eager")
                other = self.model.with_module(copied)
                if {site.source for site in attention_of(other).sites} == sites:
                    return Line(check, NOT_RUN, nan, "it computes attention in one way, whatever it is set to")
                weights = probe_attention_correlation(other, self.pairs, control=False).frame
        except Exception as error:  # whatever the other implementation raises
            return Line(check, NOT_RUN, nan, f"its eager attention does not run: {first_line(error)}")
        frame = reading.frame
        if len(weights) != len(frame):
            return Line(check, REFUSED, nan, "eager attention shows other layers or heads")
        sides = [f"weight_{side}" for side in ("forward", "reverse")]
        own, other_way = frame[sides].to_numpy(), weights[sides].to_numpy()
        both = np.isfinite(own) & np.isfinite(other_way)
        if not both.any():
            return Line(check, NOT_RUN, nan, "its eager attention shows none of these weights")
        apart = float(np.abs(own - other_way)[both].max())
        return self._judged(check, apart, "weights, as loaded and by eager attention")

    def _gradient(self) -> Iterator[Line]:
        reading = probe_gradient_cosine(self.model, self.pairs, control=False)
        share, missing = reading.meta["coverage"]["share"], reading.meta["coverage"]["not_covered"]
        note = "".join(f"; {len(names)} {reason}" for reason, names in missing.items())
        yield Line("parameters", OK, float(share), f"share of the parameters covered{note}")
        alone = reading.meta.get("one_by_one", {})
        if alone:
            first = next(iter(alone))
            yield Line("one by one", HANDLED, float(len(alone)), f"parameters read query by query: {first}, ...")
        yield self._autograd(reading)

    def _autograd(self, reading: Reading) -> Line:
        """The first pair's cosine beside plain autograd's."""
        parameters = [p for _, p in self._named()]
        needed = 2 * sum(p.numel() * max(4, p.element_size()) for p in parameters)
        if needed > _SHARE * _free(self.model.device):
            return Line("gradients", NOT_RUN, float("nan"), f"plain gradients take {needed / 1e9:.1f} GB")
        for parameter in parameters:
            parameter.requires_grad_(True)  # put back when the examination ends
        with torch.enable_grad():
            one, other = (
                torch.autograd.grad(self._loss(query), parameters, materialize_grads=True)
                for query in (self.pairs[0].forward, self.pairs[0].reverse)
            )
        inner, *norms = (_inner(*two) for two in ((one, other), (one, one), (other, other)))
        expected = inner / (norms[0] * norms[1]) ** 0.5 if min(norms) > 0 else float("nan")
        frame = reading.frame[reading.frame["pair"] == 0]
        norms_by = frame.groupby("parameter")["norm_forward"].apply(lambda each: float((each**2).sum() ** 0.5))
        plain = {name: float(g.double().norm()) for (name, _), g in zip(self._named(), one, strict=True)}
        worst = max(abs(norm - plain[str(name)]) for name, norm in norms_by.items()) / norms[0] ** 0.5
        mine = frame["inner"].sum() / (frame["norm_forward"].pow(2).sum() * frame["norm_reverse"].pow(2).sum()) ** 0.5
        note = "cosine of a pair and norms of every parameter, and by plain autograd"
        return self._judged("gradients", max(abs(mine - expected), worst), note)

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.module.named_parameters() if p.is_floating_point()]

    def _other_arithmetic(self) -> Iterator[Line]:
        """How far the logits move in bfloat16 (a float32 model) or float32 (any other)."""
        kind = torch.bfloat16 if self.model.dtype == torch.float32 else torch.float32
        check = f"in {str(kind).removeprefix('torch.')}"
        held = sum(p.numel() for p in self.model.module.parameters()) * kind.itemsize
        if held > _SHARE * _free(self.model.device):
            yield Line(check, NOT_RUN, float("nan"), f"another copy of the weights takes {held / 1e9:.1f} GB")
            return
        batch = self._batch(self.pairs[0].forward)
        try:
            other = self.model.with_module(set_eval_mode(copy.deepcopy(self.model.module).to(kind)))
            with torch.no_grad():
                one, two = (m.logits(batch.input_ids).double() for m in (self.model, other))
        except Exception as error:  # a copy or a kernel that there is not
            yield Line(check, NOT_RUN, float("nan"), f"it does not run so: {first_line(error)}")
            return
        finite = one.isfinite() & two.isfinite()
        moved = float((one - two)[finite].abs().max()) / (float(one[finite].std()) or 1.0)
        yield Line(check, MEASURED, moved, "how far the logits move: rounding of the narrower type")

    def _loss(self, query: Query) -> Tensor:
        """Mean negative log-likelihood of a query by a run of its own, nats; over draws of random tokens as well."""
        batch = self._batch(query)
        return mean_nll(readout(self.model, batch), batch).mean()

    def _log_probability(self, query: Query) -> float:
        """Of its one target token, by a run of its own, nats."""
        batch = self._batch(query)
        with torch.no_grad():
            mean = mean_likelihood(readout(self.model, batch), batch.draws, range(batch.draws))
        return -float(mean_nll(mean, batch.row(0)))

    def _batch(self, query: Query) -> QueryBatch:
        return make_batch(self.model, prepare_queries(self.model, [query]), in_draws=True)


def _way(model: ProbedModel) -> str:
    """Which way it reads, in words; of a causal model also whether its files could have been read the other way."""
    if model.objective == "masked":
        if model.canvas_length is not None:
            return (
                f"{model.reads}: a token of the canvas sees all of it and the prompt, which is read from left to right"
            )
        whole = model.block_size is None
        return f"{model.reads}: a token sees {'every other' if whole else 'finished blocks and its own'}"
    of_type = config_value(model.module, "model_type")
    made = [family.name for family in FAMILIES if family.plain and family.plain == of_type]
    other = f"; a folder that holds {made[0]} says the same and is loaded with bidirectional=True" if made else ""
    return f"left to right, as its files say{other}"


def _inner(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> float:
    return sum(float((a.double() * b.double()).sum()) for a, b in zip(one, other, strict=True))


def _table(lines: list[Line]) -> pd.DataFrame:
    return pd.DataFrame(lines, columns=list(Line._fields))


def _free(device: torch.device) -> int:
    """Bytes of free memory on the device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else int(psutil.virtual_memory().available)


def _ranges(numbers: list[int]) -> str:
    """Whole numbers as a reader writes them.

    >>> _ranges([0, 1, 2, 5])
    '0 to 2, 5'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
