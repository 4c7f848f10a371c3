"""The logit of a target as a sum: what each head read at each position, each MLP, the embedding, and the biases.

With patterns, norm scales and activations held (`hooks.linearize`) a logit is linear in what was written into the
residual stream, so z_i[v] = sum over layers, heads and positions of a_ij (g . value_j) + the direct shares of
MLPs, embedding, biases and norms, with g the derivative of the logit by the head's output along the residual stream
alone. A head's value is in turn the sum of what it was made from (its sources), of which the token embedding's share,
g . W_V E[x_j] under held scales, is the stored-evidence entry S[v, x_j] of that head.

To first order nothing behind the last layer's state s is held: there g is the derivative of the model's own tail f, and
what f gives beyond it, f(s) - f'(s) s, is a summand of its own ("tangent").

Shapes below: batch (queries), token (target tokens), heads, seq, vocab.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import RevprobeError
from ...hooks.layer_numbers import LayerNumbers
from ...hooks.linearize import hold_nonlinear
from ...hooks.linearized_pass import LinearizedAttention, LinearizedPass, push_forward
from ...hooks.states import StateSite
from ...hooks.token_tables import TokenLookups
from ...models.contract.introspect import input_embedding
from ...models.probed import ProbedModel
from ...models.structure import attention_of, layer_numbers_of
from .batches import QueryBatch, logits_at_rows, require_tokens_alone

# What a value is made from; "earlier" is what attention and MLPs of earlier layers wrote.
SOURCES = ("token", "position", "norm", "bias", "earlier")
_SOURCE_OF = {
    "embed": "token",
    "position": "position",
    "norm": "norm",
    "bias": "bias",
    "mlp": "earlier",
}
# The sum of the parts may miss the logit by this many rounding units of the parts' total size, and by no more than
# this share of it (64 units of bfloat16 would be a half).
_SLACK, _MOST = 64.0, 0.02


class Piece(NamedTuple):
    """A summand of the logit. `part`: "evidence" or "others" (what a head reads there), "head" (all it reads), embed,
    position, mlp, norm or bias (what reaches the logit directly), tangent (what the tail gives beyond its derivative);
    `source`: of what a head reads; None where it does not apply.
    """

    part: str
    source: str | None
    layer: int | None
    head: int | None


Shares = dict[Piece, tuple[Tensor, Tensor]]  # contribution and stored evidence, `batch` each
Gradients = Sequence[Tensor | None]


@dataclass(frozen=True)
class Decomposition:
    """One target's logit taken apart; a target of several tokens has the mean logit.

    Shapes: `contribution`: `batch piece`, adds up to `logit`, the model's own, `batch`; `stored`: `batch piece`, what
    a head's piece would be if the evidence had all attention (mean over its tokens), NaN unless it is the evidence's;
    `gap`: by how much the sum misses the logit, as a share of the pieces' total size, `batch`. All float64.
    """

    pieces: list[Piece]
    contribution: Tensor
    stored: Tensor
    logit: Tensor
    gap: Tensor


@dataclass
class LinearizedBatch:
    """A batch run twice, as it is and with everything nonlinear held; targets are then decomposed one after another."""

    model: ProbedModel
    batch: QueryBatch
    held: LinearizedPass
    own: Tensor  # the model's logits at the readout rows, `batch token vocab`
    logits: Tensor  # the same from the linearized pass, with its graph
    layer_of: LayerNumbers

    @classmethod
    def run(cls, model: ProbedModel, batch: QueryBatch, last: StateSite | None = None) -> LinearizedBatch:
        """Args:
            last: the last layer's state, behind which all is taken to first order, norms too; None holds it.

        Raises: RevprobeError, when tokens or attention are not seen or held, for NaN logits, or virtual tokens, and as
            `passes.alone` does where a query alone has other numbers."""
        require_tokens_alone(model, "what is stored for the tokens")
        at = torch.arange(len(batch.rows), device=batch.rows.device)[:, None], batch.rows
        with torch.no_grad():
            own = logits_at_rows(model, batch)
        attention = attention_of(model)
        shown = partial(model.logits, attention_mask=batch.attention_mask)
        tokens = TokenLookups.seen(model.module, shown, batch.input_ids, input_embedding(model.module))

        def hold(*, apart: bool) -> tuple[LinearizedPass, Tensor]:
            with hold_nonlinear(model.module, tokens, batch.rows, attention, last, apart=apart) as held:
                return held, model.logits(batch.input_ids, batch.attention_mask)[at]

        try:
            held, logits = hold(apart=True)
        except (RevprobeError, torch.OutOfMemoryError):
            raise
        except Exception:  # RoFormer turns queries and keys by rows that must be one for the whole batch
            held, logits = hold(apart=False)
        if not any(part.kind == "embed" for part in held.parts):
            raise RevprobeError(
                f"{model.name} looks its tokens up in no table that could be seen, so what is stored for them cannot be"
                " told from the rest; expected rows of a table by token id (nn.Embedding, `F.embedding`, `table[ids]`)"
            )
        unheld = Counter(site.path for site in attention.sites) - Counter(call.site for call in held.attention)
        if unheld:
            raise RevprobeError(
                f"{model.name}: the weights of {next(iter(unheld)) or 'the model'} do not meet their values in a "
                "product of two matrices (it may be an einsum), so what its heads read cannot be told apart; write it "
                "as weights @ values or by scaled_dot_product_attention (the three probes read it as it is)"
            )
        return cls(model, batch, held, own, logits, layer_numbers_of(model))

    @cached_property
    def values(self) -> list[dict[str, Tensor]]:
        """What the values of each attention call are made of, by source."""
        with torch.enable_grad():
            return [_value_shares(call, self.held) for call in self.held.attention]

    @property
    def _is_evidence(self) -> Tensor:
        """Shapes: `-> batch seq` (bool)."""
        shown = torch.zeros_like(self.batch.input_ids, dtype=torch.bool)
        columns = torch.where(self.batch.is_evidence, self.batch.columns, self.batch.columns[:, :1])
        return shown.scatter_(1, columns, True)

    def routes(self, pieces: list[Piece]) -> tuple[Tensor, Tensor]:
        """Attention of each head's piece, and whether the mask keeps all evidence from it.

        Attention is summed over the piece's positions and averaged over readout rows; NaN for other pieces.
        Shapes: `-> batch piece, batch piece` (float64, bool).
        """
        evidence, asked = self._is_evidence[:, None, None], self.batch.is_target[:, None, :]
        found: dict[tuple[str, int | None, int | None], tuple[Tensor, Tensor]] = {}
        for call in self.held.attention:
            masked = ((call.hidden | ~evidence).all(-1) | ~asked).all(-1)
            for part, keep in (("evidence", evidence), ("others", ~evidence)):
                mass = call.weight.double().masked_fill(~keep, 0.0).sum(-1).masked_fill(~asked, 0.0)
                mean = mass.sum(-1) / asked.sum(-1)
                for head in range(mean.shape[1]):
                    found[part, call.layer, call.first_head + head] = mean[:, head], masked[:, head]
        none = torch.full((len(asked),), torch.nan, dtype=torch.float64, device=asked.device)
        sides = [found.get((p.part, p.layer, p.head), (none, none > 0)) for p in pieces]
        weight, hidden = zip(*sides, strict=True)
        return torch.stack(weight, dim=1), torch.stack(hidden, dim=1)

    def decompose(self, targets: Tensor) -> Decomposition:
        """Take the logits of `targets` apart, and hold the sum against the model's own.

        Shapes: `targets`: `batch token`, read at the batch's readout rows.
        Raises: RevprobeError, when attention reaches the logit through something nonlinear, or the sum misses it.
        """
        outputs = [call.output for call in self.held.attention]
        gradients, of_parts = self._gradients(targets, outputs)
        found: Shares = {}
        for place in range(len(outputs)):
            for piece, shares in self._head_pieces(place, gradients[place]).items():
                # Two calls of the same weights (differential attention) are the same heads.
                twice = found.get(piece)
                found[piece] = shares if twice is None else (twice[0] + shares[0], twice[1] + shares[1])
        return self._completed(found, of_parts, targets)

    def by_head(self, targets: Tensor, written: Sequence[Tensor]) -> tuple[Decomposition, list[Tensor | None]]:
        """The same by head alone, whatever it read, and the direct shares of states that the held run went through.

        Args:
            written: such states, as `record_states` around `run` keeps them.
        Returns: the logit taken apart, and of each state its share, `batch` (float64); None where it has none.
        Raises: RevprobeError, as `decompose`.
        """
        calls = self.held.attention
        gradients, of_parts = self._gradients(targets, [*(call.output for call in calls), *written])
        found: Shares = {}
        for call, gradient in zip(calls, gradients[: len(calls)], strict=True):
            share = (self._direct(call.site, gradient).double() * call.output.detach().double()).sum((2, 3))
            for head, column in enumerate(share.unbind(1)):
                piece = Piece("head", None, call.layer, call.first_head + head)
                before = found[piece][0] if piece in found else 0.0
                found[piece] = column + before, torch.full_like(column, torch.nan)
        return self._completed(found, of_parts, targets), [
            None if gradient is None else (gradient.double() * state.detach().double()).flatten(1).sum(1)
            for state, gradient in zip(written, gradients[len(calls) :], strict=True)
        ]

    def _mean(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean logit of each query's target tokens. Shapes: `batch token vocab, batch token -> batch`."""
        asked = self.batch.is_target
        return _chosen(logits, targets).masked_fill(~asked, 0.0).sum(1) / asked.sum(1)

    def _gradients(self, targets: Tensor, leaves: Sequence[Tensor]) -> tuple[Gradients, Gradients]:
        """The derivatives of the targets' logits by the leaves and by the parts; None without a direct share."""
        leaves = [*leaves, *(part.values for part in self.held.parts)]
        used = [leaf for leaf in leaves if leaf.requires_grad]
        with torch.enable_grad():
            objective = self._mean(self.logits, targets).sum()
        found = iter(torch.autograd.grad(objective, used, retain_graph=True, allow_unused=True))
        gradients = [next(found) if leaf.requires_grad else None for leaf in leaves]
        first = len(leaves) - len(self.held.parts)
        return gradients[:first], gradients[first:]

    def _completed(self, found: Shares, of_parts: Gradients, targets: Tensor) -> Decomposition:
        """What heads add, with what reaches the logit beside them, held against the model's own logit."""
        for part, gradient in zip(self.held.parts, of_parts, strict=True):
            if gradient is not None:
                piece = Piece(part.kind, None, self.layer_of(part.site), None)
                share = part.shares(gradient, len(targets)).double()
                before = found[piece][0] if piece in found else 0.0
                found[piece] = share + before, torch.full_like(share, torch.nan)
        if self.held.last is not None:
            beyond = self._beyond_tail_slope(self.held.last, targets)
            found[Piece("tangent", None, None, None)] = beyond, torch.full_like(beyond, torch.nan)
        contribution, stored = (torch.stack(columns, dim=1) for columns in zip(*found.values(), strict=True))
        return self._checked(list(found), contribution, stored, self._mean(self.own, targets).double())

    def _beyond_tail_slope(self, last: Tensor, targets: Tensor) -> Tensor:
        """What the tail f makes of the last layer's state s beyond its slope: f(s) - f'(s) s. Shapes: `-> batch`."""
        with torch.enable_grad():
            logit = self._mean(self.logits, targets)
            (slope,) = torch.autograd.grad(logit.sum(), last, retain_graph=True)
        return logit.detach().double() - (slope.double() * last.detach().double()).flatten(1).sum(1)

    def _head_pieces(self, place: int, gradient: Tensor | None) -> dict[Piece, tuple[Tensor, Tensor]]:
        """Contribution and stored evidence of every head, position and source of one layer."""
        call = self.held.attention[place]
        evidence = self._is_evidence[:, None, None]
        found = {}
        for source, share in self._shares(place, gradient).items():
            routed = (share * call.weight.double()).sum(2)
            stored = share.masked_fill(~evidence, 0.0).sum((2, 3)) / evidence.sum((2, 3))
            for part, keep in (("evidence", evidence), ("others", ~evidence)):
                contribution = routed.masked_fill(~keep[:, 0], 0.0).sum(2)
                for head in range(share.shape[1]):
                    kept = stored[:, head] if part == "evidence" else torch.full_like(stored[:, head], torch.nan)
                    found[Piece(part, source, call.layer, call.first_head + head)] = contribution[:, head], kept
        return found

    def _shares(self, place: int, gradient: Tensor | None) -> dict[str, Tensor]:
        """What each position would add to the logit through each head if it had all attention of the readout row.

        Shapes: source -> `batch heads token seq`, float64. Raises: RevprobeError, without a direct share.
        """
        gradient = self._direct(self.held.attention[place].site, gradient)
        batch = torch.arange(len(gradient), device=gradient.device)[:, None]
        at_rows = gradient.transpose(1, 2)[batch, self.batch.rows].transpose(1, 2).double()
        at_rows = at_rows.masked_fill(~self.batch.is_target[:, None, :, None], 0.0)
        return {source: at_rows @ values.double().mT for source, values in self.values[place].items()}

    def _direct(self, site: str, gradient: Tensor | None) -> Tensor:
        """The derivative by what heads write. Raises: RevprobeError, when there is none along the stream alone."""
        if gradient is None:
            masked = self.model.objective == "masked" and self.held.last is None
            slope = "`probe_stored_evidence(..., first_order=True)`, its head's slope, or with " * masked
            raise RevprobeError(
                f"{self.model.name}: the heads of {site!r} reach the logit only through something nonlinear "
                f"({self._last_cut()}), so they have no direct share in it; ask it with {slope}`probe_route_edit`, "
                "`probe_logit_lens` or `probe_causal_trace`, which need none"
            )
        return gradient

    def by_position(self) -> Iterator[tuple[LinearizedAttention, dict[str, Tensor]]]:
        """Each attention call, and the shares of every position in the logits of the batch's own targets.

        Each readout row's share is in its own target's logit (not their mean). Shapes: source -> `batch heads token
        seq`, unrouted, float64. Raises: RevprobeError, as `decompose`.
        """
        self.decompose(self.batch.targets)
        asked = self.batch.is_target
        with torch.enable_grad():
            objective = _chosen(self.logits, self.batch.targets).masked_fill(~asked, 0.0).sum()
        outputs = [call.output for call in self.held.attention]
        gradients = torch.autograd.grad(objective, outputs, retain_graph=True, allow_unused=True)
        for place, call in enumerate(self.held.attention):
            yield call, self._shares(place, gradients[place])

    def _last_cut(self) -> str:
        last = next((part for part in reversed(self.held.parts) if part.kind == "mlp"), None)
        return "an unseen function" if last is None else f"{last.function}, in {last.site or self.model.name!r}"

    def _checked(self, pieces: list[Piece], contribution: Tensor, stored: Tensor, logit: Tensor) -> Decomposition:
        total, size = contribution.sum(1), contribution.abs().sum(1)
        gap = (total - logit).abs() / size.clamp(min=torch.finfo(torch.float64).tiny)
        worst = int(gap.argmax())
        if not gap[worst] <= min(_SLACK * self.held.eps, _MOST):
            apart = f"{self.model.name}: the parts add up to {float(total[worst]):.6g}, the logit is "
            apart += f"{float(logit[worst]):.6g}; "
            if gap[worst] <= _SLACK * self.held.eps:
                raise RevprobeError(
                    f"{apart}numbers rounded to {self.held.eps:.1g} alone can be so far apart, and too far to be read; "
                    "ask the model in float32 (dtype=torch.float32)"
                )
            raise RevprobeError(
                f"{apart}something between them is neither linear nor held, so this architecture "
                "cannot be decomposed (a custom autograd function does that; so do experts that sort the tokens of a "
                "whole batch: try batch_size=1)"
            )
        return Decomposition(pieces, contribution, stored, logit, gap)

    def stored_logits(self) -> Tensor:
        """The stored evidence of every token of the vocabulary, summed over layers and heads: sum of S[:, u].

        The mean over evidence tokens. Shapes: `-> batch token vocab`.
        Raises: RevprobeError, when the model's own tail is not held and cannot be differentiated twice.
        """
        evidence, pushed = self._is_evidence, []
        for call, values in zip(self.held.attention, self.values, strict=True):
            mean = (values["token"] * evidence[:, None, :, None]).sum(2) / evidence.sum(1)[:, None, None]
            at_rows = mean[:, None].expand(-1, self.batch.rows.shape[1], -1, -1).clone()  # batch token heads dim
            pushed.append(self._written(call, at_rows))
        try:
            with torch.enable_grad():
                return push_forward(self.logits, [call.output for call in self.held.attention], pushed)
        except RuntimeError as error:
            if self.held.last is None or type(error) is not RuntimeError:  # out of memory is one of its own
                raise
            raise RevprobeError(
                f"{self.model.name}: what follows its last layer cannot be differentiated twice (a custom kernel: "
                f"{error}), so it has no slopes; `probe_route_edit` and `probe_logit_lens` run it as it is"
            ) from error

    def without_evidence(self, layers: Collection[int] | None = None) -> tuple[Tensor, Tensor]:
        """The last layer's state at the readout rows, without what heads wrote there of the evidence's tokens.

        That is what those of `layers` (None: all) wrote along the residual stream, norms' scales held up to that state;
        taken out of all these layers at once.
        Returns: the state so, and as it is. Shapes: `-> batch token width, batch token width`.
        """
        assert self.held.last is not None, "a run that was given the last layer's state"
        evidence, pushed = self._is_evidence, []
        for call, values in zip(self.held.attention, self.values, strict=True):
            kept = evidence & (layers is None or call.layer in layers)
            weight = call.weight.masked_fill(~kept[:, None, None], 0.0).to(values["token"].dtype)
            pushed.append(self._written(call, (weight @ values["token"]).transpose(1, 2)))
        with torch.enable_grad():
            moved = push_forward(self.held.last, [call.output for call in self.held.attention], pushed)
        at = torch.arange(len(evidence), device=evidence.device)[:, None], self.batch.rows
        state = self.held.last.detach()[at]
        return state - moved[at], state

    def _written(self, call: LinearizedAttention, at_rows: Tensor) -> Tensor:
        """What heads write at the readout rows of targets, and nothing elsewhere.

        Shapes: `at_rows`: `batch token heads dim`; `-> batch heads seq dim`.
        """
        batch = torch.arange(len(at_rows), device=at_rows.device)[:, None]
        written = torch.zeros_like(call.output).transpose(1, 2)
        kept = at_rows.masked_fill(~self.batch.is_target[..., None, None], 0.0)
        written.index_put_((batch, self.batch.rows), kept.to(written.dtype), accumulate=True)
        return written.transpose(1, 2)


def _value_shares(call: LinearizedAttention, held: LinearizedPass) -> dict[str, Tensor]:
    """What a value is made from. Shapes: source -> `batch heads seq dim`; they add up to the value."""
    leaves = [(_SOURCE_OF[part.kind], part.values) for part in held.parts]
    leaves += [("earlier", earlier.output) for earlier in held.attention]
    reached = torch.autograd.grad(call.value.sum(), [leaf for _, leaf in leaves], retain_graph=True, allow_unused=True)
    used = [pair for pair, gradient in zip(leaves, reached, strict=True) if gradient is not None]
    shares = {"token": torch.zeros_like(call.value)}
    for source in SOURCES:
        chosen = [leaf for name, leaf in used if name == source]
        if chosen:
            shares[source] = push_forward(call.value, chosen, [leaf.detach() for leaf in chosen])
    return {source: call.by_head(share.detach()) for source, share in shares.items()}


def _chosen(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.gather(-1, targets[..., None])[..., 0]
