"""The one interface every probe speaks to, whatever the model is.

A `ProbedModel` knows how its module hides a target (mask token, or causality), at which row the logits of a
position are read (the readout row: position - logit_shift), and how the module wants to be called. What it is
told about the model is checked once, by running it: a later token must reach earlier logits when the objective
is "masked" and must not when it is "causal".
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..arguments import checked
from ..errors import RevprobeError, did_you_mean
from ..hooks.untouched import untouched
from . import introspect

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

OBJECTIVES = ("masked", "causal")
# A logit that moves by less than this many units of rounding, relative to the largest, may not have moved at all.
_ROUNDING = 64.0


class CalledModule:
    """A module and how it wants to be called: all that is needed to run it, before anything else is known of it."""

    def __init__(self, module: nn.Module, name: str | None = None) -> None:
        self.module, self.name = module, name or type(module).__name__
        parameters = inspect.signature(module.forward).parameters.values()
        self._accepts = {parameter.name for parameter in parameters}
        self._accepts_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)

    @property
    def device(self) -> torch.device:
        """Where the input goes: the first parameter's device, passing over those that wait on disk ("meta")."""
        devices = (p.device for p in self.module.parameters())
        return next((device for device in devices if device.type != "meta"), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    @property
    def vocab_size(self) -> int:
        """Rows of the input embedding, the mask token included."""
        embed = getattr(self.module, "get_input_embeddings", lambda: None)()
        if embed is not None:
            return int(embed.weight.shape[0])
        tables = [m.num_embeddings for m in self.module.modules() if isinstance(m, nn.Embedding)]
        size = introspect.config_value(self.module, "vocab_size") or max(tables, default=None)
        if size is None:
            raise RevprobeError(
                f"{self.name} has neither an embedding of tokens nor a config with vocab_size; expected a language "
                "model, which takes token ids"
            )
        return size

    @property
    def max_length(self) -> int | None:
        """The longest sequence the model takes; None when it names no limit."""
        return introspect.max_length(self.module)

    def logits(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Run the module. Shapes: `batch seq, batch seq -> batch seq vocab`.

        Raises: RevprobeError, when a padded batch meets a module without an attention_mask argument.
        """
        kwargs: dict[str, Any] = {}
        if attention_mask is not None:
            if "attention_mask" not in self._accepts and not self._accepts_any:
                raise RevprobeError(
                    f"{self.name} takes no attention_mask, so queries of different lengths cannot share a batch; use "
                    "batch_size=1"
                )
            kwargs["attention_mask"] = attention_mask
        if "use_cache" in self._accepts:
            kwargs["use_cache"] = False
        return _logits_of(self.module(input_ids, **kwargs), self.name)

    def explain_non_finite(self) -> str:
        """Name the first weight that is not finite, for the error that reports NaN logits."""
        held = ((name, p) for name, p in self.module.named_parameters() if not p.is_meta)
        bad = next((name for name, p in held if not torch.isfinite(p).all()), None)
        where = (
            f"its weight {bad!r} holds NaN or infinity"
            if bad
            else "its weights are finite, so an activation overflowed"
        )
        return f"{self.name} gives NaN logits: {where}; load a sound checkpoint or a wider dtype"


class ProbedModel(CalledModule):
    """A language model with what a probe must know about it.

    Args:
        module: called as `module(input_ids, attention_mask=...)`; returns logits `batch seq vocab`, or an object, a
            mapping or a tuple that holds them (`.logits`, `["logits"]`, first). A ProbedModel stands for its module,
            and for what is not given of tokenizer, tokens, shift and provenance.
        tokenizer: only for text pairs and for showing tokens.
        objective: "masked" (the target is hidden by the mask token) or "causal" (by the causal mask).
        mask_token_id: an id or a token's text, required for "masked"; the tokenizer's or the config's unless given.
        logit_shift: the logits for position i stand in row i - logit_shift; 1 for causal models, 0 for transformers'
            masked ones, as stated by the class of others (LLaDA 0, Dream 1); required for a masked module of one's own.
        begin_token_id: put before sequences whose target stands at position 0 of a shift-1 model; the tokenizer's or
            the config's unless given.
        name, step, weights: provenance for the readings ("weights" is "raw" or "ema").
        check: hold the objective against what the module does; False for one that was checked before.
    Raises: RevprobeError, when the objective is unknown or contradicts what the module does, or when mask token or
        shift can neither be found nor were given.
    """

    @checked
    def __init__(
        self,
        module: nn.Module | ProbedModel,
        tokenizer: Any = None,
        *,
        objective: str,
        mask_token_id: int | str | None = None,
        logit_shift: int | None = None,
        begin_token_id: int | None = None,
        name: str | None = None,
        step: int | None = None,
        weights: str | None = None,
        check: bool = True,
    ) -> None:
        if objective not in OBJECTIVES:
            raise RevprobeError(f"unknown objective {objective!r}{did_you_mean(objective, OBJECTIVES)}")
        if isinstance(module, ProbedModel):
            known, module, tokenizer = module, module.module, tokenizer or module.tokenizer
            mask_token_id = known.mask_token_id if mask_token_id is None else mask_token_id
            begin_token_id = known.begin_token_id if begin_token_id is None else begin_token_id
            logit_shift = known.logit_shift if logit_shift is None and objective == known.objective else logit_shift
            name, step, weights = name or known.name, known.step if step is None else step, weights or known.weights
        super().__init__(module, name)
        if introspect.is_empty(module):
            raise RevprobeError(f"{self.name} holds no weights (device 'meta'); load them before it is wrapped")
        self.tokenizer, self.objective, self.step, self.weights = tokenizer, objective, step, weights
        self.mask_token_id = introspect.mask_token(mask_token_id, tokenizer, module, self.vocab_size, self.name)
        self.begin_token_id = introspect.begin_token(begin_token_id, tokenizer, module, self.vocab_size, self.name)
        if objective == "masked" and self.mask_token_id is None:
            raise RevprobeError(f"{self.name} is masked but names no mask token; pass mask_token_id=")
        if check:
            self._check_direction()
        self.logit_shift = introspect.logit_shift(logit_shift, objective, module, self.name)

    def with_module(self, module: nn.Module, **provenance: Any) -> ProbedModel:
        """The same wrapping around another module of the same kind: a copy, an adapter put on, weights moved.

        Args:
            provenance: name, step or weights, where they change.
        """
        other = copy.copy(self)
        other.__dict__ |= {"module": module, **provenance}
        return other

    def hide(self, token_ids: Tensor, is_target: Tensor) -> Tensor:
        """The sequence as the model may see it: targets masked; unchanged for a causal model, which reads before them.

        Shapes: `batch seq, batch seq (bool) -> batch seq`.
        """
        if self.objective == "causal":
            return token_ids
        assert self.mask_token_id is not None, "checked when wrapped"
        return token_ids.masked_fill(is_target, self.mask_token_id)

    def to_bridge(self) -> TransformerBridge:
        """A TransformerLens view of this model, sharing its weights; see `models.bridge.to_bridge`.

        Raises: RevprobeError, when TransformerLens has no adapter for the architecture.
        """
        from .bridge import to_bridge  # TransformerLens takes seconds to import

        return to_bridge(self.module)

    def _check_direction(self) -> None:
        if not depends_on_its_input(self):
            return  # untrained or collapsed: constant logits contradict neither objective
        reaches = later_tokens_reach_back(self)
        if reaches and self.objective == "causal":
            raise RevprobeError(
                f"{self.name} was wrapped as causal, but a later token changes its earlier logits; use "
                "objective='masked'"
            )
        if not reaches and self.objective == "masked":
            raise RevprobeError(
                f"{self.name} was wrapped as masked, but no later token reaches its earlier logits; use "
                "objective='causal'"
            )

    def __repr__(self) -> str:
        size = sum(p.numel() for p in self.module.parameters())
        where = "".join(
            f", {key}={value}" for key, value in (("step", self.step), ("weights", self.weights)) if value is not None
        )
        return f"ProbedModel({self.name}, {self.objective}, logit_shift={self.logit_shift}, {size:,} parameters{where})"


def _logits_of(output: Any, name: str) -> Tensor:
    """The logits in what a module returned. Raises: RevprobeError, when there are none."""
    if not isinstance(output, Tensor):
        held = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
        output = output[0] if held is None and isinstance(output, tuple | list) and output else held
    if not isinstance(output, Tensor):
        raise RevprobeError(
            f"{name} returns no logits; expected a tensor `batch seq vocab`, or an object, mapping or tuple with it"
        )
    return output


def as_probed(model: ProbedModel | nn.Module) -> ProbedModel:
    """Wrap a bare module, finding its objective out by running it; a ProbedModel passes through.

    Raises: RevprobeError, for anything else, and for a masked module that names no mask token.
    """
    if isinstance(model, ProbedModel):
        return model
    if not isinstance(model, nn.Module):
        raise RevprobeError(f"expected a model, got {type(model).__name__}; pass an nn.Module or load_model(...)")
    return ProbedModel(model, objective="masked" if later_tokens_reach_back(CalledModule(model)) else "causal")


def _some_tokens(model: CalledModule, length: int) -> Tensor:
    """The first tokens of the vocabulary, as many as the model takes. Shapes: `-> 1 length`."""
    return torch.arange(min(length, model.max_length or length), device=model.device)[None] % model.vocab_size


def depends_on_its_input(model: CalledModule, length: int = 4) -> bool:
    """Whether changing every token moves any logit; not so with a zero unembedding.

    Raises: RevprobeError, when the logits are NaN.
    """
    first = _some_tokens(model, length)
    with untouched(model.module), torch.no_grad():
        before, after = (model.logits(ids)[0].float() for ids in (first, (first + 1) % model.vocab_size))
    if before.isnan().any():
        raise RevprobeError(model.explain_non_finite())
    return bool((before != after).any())


def later_tokens_reach_back(model: CalledModule, length: int = 4) -> bool:
    """Whether changing the last of `length` tokens moves any earlier logit.

    A small change can be rounding (experts of a causal mixture get other batches); then the gradient decides.
    Raises: RevprobeError, when the logits are NaN.
    """
    first = _some_tokens(model, length)
    second = first.clone()
    second[0, -1] = (first[0, -1] + 1) % model.vocab_size
    with untouched(model.module), torch.no_grad():
        before, after = (model.logits(ids)[0, :-1].float() for ids in (first, second))
    if before.isnan().any():
        raise RevprobeError(model.explain_non_finite())
    # Equal entries subtract to zero, but -inf - -inf is NaN: compare instead.
    moved = before != after
    if not moved.any():
        return False
    change, size = (before - after)[moved].abs().max(), before[before.isfinite()].abs().max()
    return bool(change > _ROUNDING * torch.finfo(model.dtype).eps * size) or _gradient_reaches_back(model, first)


def _gradient_reaches_back(model: CalledModule, ids: Tensor) -> bool:
    """Whether the last token's embedding has a gradient from earlier logits; True where that cannot be asked."""
    embed = getattr(model.module, "get_input_embeddings", lambda: None)()
    if embed is None or any(p.is_meta for p in model.module.parameters()):
        return True
    embedded: list[Tensor] = []

    def cut(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    handle = embed.register_forward_hook(cut)
    try:
        with untouched(model.module), torch.enable_grad():
            logits = model.logits(ids)[0, :-1].float()
            (gradient,) = torch.autograd.grad(logits[logits.isfinite()].square().sum(), embedded[0])
    finally:
        handle.remove()
    return bool(gradient[0, -1].any())
