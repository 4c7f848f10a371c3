"""The one interface every probe speaks to, whatever the model is.

A `ProbedModel` knows how its module hides a target (mask token, or causality), at which row the logits of a
position are read (the readout row: position - logit_shift), and how the module wants to be called. What it is
told about the model is checked once, by running it: a later token must reach earlier logits when the objective
is "masked" and must not when it is "causal".
"""

from __future__ import annotations

import copy
import html
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..arguments import checked
from ..errors import RevprobeError, did_you_mean, shown
from .contract import introspect
from .contract.block_masks import WHOLE
from .contract.called import CalledModule
from .contract.contract import Contract, contract_of, state_of
from .tokenizers import chosen_tokenizer, require_rows

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

OBJECTIVES = ("masked", "causal")


class ProbedModel(CalledModule):
    """A language model with what a probe must know about it.

    Args:
        module: called as `module(input_ids, attention_mask=...)`; returns logits `batch seq vocab`, or an object, a
            mapping or a tuple that holds them (`.logits`, `["logits"]`, first). A ProbedModel stands for its module,
            and for what is not given of tokenizer, tokens, shift and provenance.
        tokenizer: only for text pairs and for showing tokens; the module's own where it has one, as a bridge has.
        objective: "masked" (the target is hidden by the mask token) or "causal" (by the causal mask).
        mask_token_id: an id or a token's text, required for "masked"; the tokenizer's or the config's unless given.
        logit_shift: the logits for position i stand in row i - logit_shift; 1 for causal models, 0 for transformers'
            masked ones, as stated by the class of others (LLaDA 0, Dream 1); required for a masked module of one's own.
        block_size: the model writes block by block: a query sees finished blocks of so many tokens, and its own. The
            config's unless given; "whole": every token sees every other.
        begin_token_id: put before sequences whose target stands at position 0 of a shift-1 model; the tokenizer's or
            the config's unless given.
        name, step, weights: provenance for the readings ("weights" is "raw" or "ema").
        check: find out what the module does by running it (`models.contract`), once per module; False for one that
            cannot be run, whose rows, padding and direction are then taken for granted.
    Raises: RevprobeError, when the objective is unknown or contradicts what the module does, or when mask token or
        shift can neither be found nor were given.
    """

    tokenizer: Any
    objective: str
    mask_token_id: int | None
    begin_token_id: int | None
    logit_shift: int
    step: int | None
    weights: str | None
    contract: Contract
    # Where the model's tokenizer is to be had, of a family whose checkpoints bring none; `load_model` says it.
    tokenizer_source: str | None = None

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
        block_size: int | str | None = None,
        name: str | None = None,
        step: int | None = None,
        weights: str | None = None,
        check: bool = True,
    ) -> None:
        if objective not in OBJECTIVES:
            raise RevprobeError(f"unknown objective {objective!r}{did_you_mean(objective, OBJECTIVES)}")
        if isinstance(module, ProbedModel):
            known = module
            tokenizer = tokenizer or known.tokenizer
            mask_token_id = known.mask_token_id if mask_token_id is None else mask_token_id
            begin_token_id = known.begin_token_id if begin_token_id is None else begin_token_id
            logit_shift = known.logit_shift if logit_shift is None and objective == known.objective else logit_shift
            if block_size is None and objective == known.objective:
                block_size = known.block_size or WHOLE
            self.tokenizer_source = known.tokenizer_source
            name, step, weights = name or known.name, known.step if step is None else step, weights or known.weights
        inner: Any = module.module if isinstance(module, ProbedModel) else module
        tokenizer = introspect.own_tokenizer(inner) if tokenizer is None else tokenizer
        super().__init__(inner, name)
        self.block_size = introspect.block_size(block_size, objective, inner, self.name)
        if check and introspect.is_empty(inner):
            raise RevprobeError(f"{self.name} holds no weights (device 'meta'); load them before it is wrapped")
        self.tokenizer, self.objective, self.step, self.weights = tokenizer, objective, step, weights
        self.mask_token_id = introspect.mask_token(mask_token_id, tokenizer, inner, self.vocab_size, self.name)
        self.begin_token_id = introspect.begin_token(begin_token_id, tokenizer, inner, self.vocab_size, self.name)
        if objective == "masked" and self.mask_token_id is None:
            raise RevprobeError(f"{self.name} is masked but names no mask token; pass mask_token_id=")
        self.contract = contract_of(self, self._hiding) if check else Contract.taken_for_granted()
        self._state = state_of(inner) if check else None
        self._check_direction()
        self.logit_shift = introspect.logit_shift(logit_shift, objective, inner, self.name)

    def in_blocks(self, size: int | None) -> ProbedModel:
        """The same model read in blocks of another size; None: every token sees every other.

        A query of a masked model sees the finished blocks and its own: size 1 is how a causal model reads. A diffusion
        model was trained with one size, and any other is a dial.
        Raises: RevprobeError, for a causal model, a size below 1, or a module that does not heed such a mask.
        """
        return ProbedModel(self, objective=self.objective, block_size=WHOLE if size is None else size)

    def with_module(self, module: nn.Module, **provenance: Any) -> ProbedModel:
        """The same wrapping around another module of the same kind: a copy, an adapter put on, weights moved.

        Args:
            provenance: name, step or weights, where they change.
        """
        other = copy.copy(self)
        other.__dict__ |= {"module": module, **provenance}
        other._state = None if self._state is None else state_of(module)
        return other

    @property
    def _hiding(self) -> int | None:
        """The token that hides targets."""
        return self.mask_token_id if self.objective == "masked" else None

    def current(self) -> ProbedModel:
        """Itself, held to its contract again if its module's parts, settings or adapters are others since, or if
        no token moved another's logits yet.

        Raises: RevprobeError, as when it was wrapped.
        """
        if self._state is None:
            return self
        if (state := state_of(self.module)) != self._state or self.contract.reaches_back is None:
            try:
                self.contract, self._state = contract_of(self, self._hiding), state
            except RevprobeError as error:
                if error.__cause__ is None:
                    raise
                return self  # it cannot be run as it is now, which the caller's own run will say
            self._check_direction()
        return self

    def wants_begin(self, token_ids: Sequence[int], canvas_start: int = 1) -> bool:
        """Whether a query of a model with a canvas lacks the begin token that is its prompt."""
        return self.canvas_length is not None and canvas_start == 1 and token_ids[0] != self.begin_token_id

    def require_mask_token(self, what: str) -> None:
        """Raises: RevprobeError, for a model of random tokens, of which `what` would take one sight of them for all."""
        if self.canvas_length is not None:
            raise RevprobeError(
                f"{self.name} hides tokens behind random ones, and {what} needs a mask token; such a model is read by "
                "the three probes (rp.probe), as means over draws of its random tokens"
            )

    def hide(self, token_ids: Tensor, is_target: Tensor) -> Tensor:
        """The sequence as the model may see it: targets masked; unchanged for a causal model, which reads before them.

        A model of random tokens sees those of its first draw; the others have the ids that follow.

        Shapes: `batch seq, batch seq (bool) -> batch seq`.
        """
        if self.objective == "causal":
            return token_ids
        assert self.mask_token_id is not None, "checked when wrapped"
        return token_ids.masked_fill(is_target, self.mask_token_id)

    def without_mask(self, logits: Tensor) -> Tensor:
        """The logits with the mask token's at -inf: it is read, never written. Shapes: `... vocab -> ... vocab`.

        A model whose embedding has a row more than its unembedding has no logit for it.
        """
        mask = self.mask_token_id
        if mask is None or mask >= logits.shape[-1]:
            return logits
        return logits.index_fill(-1, torch.tensor([mask], device=logits.device), -torch.inf)

    def to_bridge(self) -> TransformerBridge:
        """A TransformerLens view of this model, sharing its weights and its tokenizer; see `models.bridge.to_bridge`.

        Raises: RevprobeError, when TransformerLens has no adapter for the architecture.
        Warns: for a model that is read in blocks: called by itself, the bridge lets every token see every other.
        """
        from .bridge import to_bridge  # TransformerLens takes seconds to import

        bridge = to_bridge(self.module)
        bridge.tokenizer = self.tokenizer
        if self.block_size is not None:
            warnings.warn(
                f"{self.name} is read in blocks of {self.block_size}; its bridge, called without a mask, as a whole: "
                f"ProbedModel(bridge, objective='masked', block_size={self.block_size}) reads it in blocks",
                stacklevel=2,
            )
        return bridge

    @property
    def max_length(self) -> int | None:
        """The longest sequence the model takes beside an adapter's virtual tokens; None when it names no limit."""
        limit = super().max_length
        return None if limit is None else limit - self.contract.placement.columns_more

    def logits(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Run the module. Shapes: `batch seq, batch seq -> batch seq vocab`, one row for each token of the input.

        Where padding would reach real tokens, rows of different lengths run apart, and padded rows are 0.
        """
        if hasattr(self.module, "peft_config"):
            self.current()  # another adapter brings other virtual tokens
        first, length = self.contract.placement.logits, input_ids.shape[1]
        if attention_mask is None or not self.contract.equal_lengths:
            return self.run(input_ids, attention_mask)[:, first : first + length]
        out: Tensor | None = None
        seen = attention_mask.bool()
        lengths = seen.sum(1)
        for size in lengths.unique().tolist():
            rows, places = (seen & (lengths == size)[:, None]).nonzero(as_tuple=True)
            logits = self.run(input_ids[rows, places].view(-1, size))[:, first : first + size]
            out = logits.new_zeros(*input_ids.shape, logits.shape[-1]) if out is None else out
            out = out.index_put((rows, places), logits.flatten(0, 1))
        assert out is not None, "a batch has rows"
        return out

    def _check_direction(self) -> None:
        """Hold the objective against what the module does."""
        reaches = self.contract.reaches_back
        if self.objective == "causal" and not self.contract.sees_itself:
            raise RevprobeError(
                f"{self.name} was wrapped as causal, but its logits at row i do not see token i: it shifts its input "
                "inside; wrap a module that takes the tokens as they are"
            )
        if reaches and self.objective == "causal":
            raise RevprobeError(
                f"{self.name} was wrapped as causal, but a later token changes its earlier logits; use "
                "objective='masked'"
            )
        if reaches is False and self.objective == "masked" and self.block_size != 1:
            raise RevprobeError(
                f"{self.name} was wrapped as masked, but no later token reaches its earlier logits; use "
                "objective='causal'"
            )

    def __repr__(self) -> str:
        size = sum(p.numel() for p in self.module.parameters())
        where = "".join(
            f", {key}={value}" for key, value in (("step", self.step), ("weights", self.weights)) if value is not None
        )
        tokens = "no tokenizer" if self.tokenizer is None else f"tokenizer {type(self.tokenizer).__name__}"
        return (
            f"ProbedModel({self.name}, {self.objective}{self.reads and f' ({self.reads})'}, "
            f"logit_shift={self.logit_shift}, {self._shape()}{size:,} parameters, {tokens}{where})"
        )

    def _shape(self) -> str:
        """Layers x heads as the config has them, without running the model; empty where it does not say."""
        config = getattr(self.module, "config", None)
        names = (("num_hidden_layers", "n_layers"), ("num_attention_heads", "n_heads"))
        layers, heads = (next((getattr(config, n) for n in some if hasattr(config, n)), None) for some in names)
        known = isinstance(layers, int) and isinstance(heads, int)
        return f"{layers} layer{'s' * (layers != 1)} x {heads} head{'s' * (heads != 1)}, " if known else ""

    def _repr_html_(self) -> str:
        name, _, rest = repr(self).removeprefix("ProbedModel(").removesuffix(")").partition(", ")
        told = "".join(f"<tr><td>{html.escape(one)}</td></tr>" for one in rest.split(", "))
        return f"<table><tr><th>{html.escape(name)}</th></tr>{told}</table>"

    @property
    def reads(self) -> str:
        """Which way a masked model was read: in both directions, in blocks, on a canvas; empty for a causal one."""
        if self.objective == "causal":
            return ""
        if self.canvas_length is not None:
            return f"canvas of {self.canvas_length} tokens behind a prompt, {self.draws} draws of random tokens"
        if self.block_size is None:
            return "bidirectional"
        finished = ", causal where finished" if introspect.finished_blocks(self.module) == "causal" else ""
        return f"in blocks of {self.block_size}{finished}"


def as_probed(model: ProbedModel | nn.Module, tokenizer: Any = None) -> ProbedModel:
    """Wrap a bare module, finding its objective out by running it; a ProbedModel passes through.

    Args:
        tokenizer: instead of the model's own; a folder or hub name to read it from will do.
    Raises: RevprobeError, for anything else, for a masked module that names no mask token, and for a tokenizer that
        cannot be read or has more tokens than the model.
    """
    if tokenizer is not None:
        given, tokenizer = tokenizer, chosen_tokenizer(tokenizer)
        if not hasattr(tokenizer, "get_vocab"):
            raise RevprobeError(f"tokenizer={shown(given)}: expected a tokenizer, or the folder or hub name of one")
    if isinstance(model, ProbedModel):
        model = model.current()
        if tokenizer is None:
            return model
        require_rows(tokenizer, model.vocab_size, model.name)
        return ProbedModel(model, tokenizer, objective=model.objective)
    if not isinstance(model, nn.Module):
        raise RevprobeError(f"expected a model, got {type(model).__name__}; pass an nn.Module or load_model(...)")
    called = CalledModule(model)
    tokenizer = introspect.own_tokenizer(model) if tokenizer is None else tokenizer
    require_rows(tokenizer, called.vocab_size, called.name)
    mask = introspect.mask_token(None, tokenizer, model, called.vocab_size, called.name)
    reaches = contract_of(called, mask).reaches_back
    stated = {True: "masked", False: "causal"}.get(reaches) if reaches is not None else introspect.objective(model)
    if stated is None:
        raise RevprobeError(
            f"no token of {called.name} moves another's logits yet (weights still zero?), so it cannot be told which "
            "way it reads; use ProbedModel(module, objective='masked' or 'causal')"
        )
    return ProbedModel(model, tokenizer, objective=stated)
