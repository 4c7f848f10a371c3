"""DiffusionGemma: a prompt that is encoded from left to right, and a canvas of tokens that all see each other and it.

transformers runs an encoder over the prompt and a decoder over the canvas, which attends to the encoder's keys and
values beside its own. The two share every weight but one number a layer (`layer_scalar`), and the canvas goes on with
the prompt's positions. So they are one pass over one sequence [prompt | canvas] with a mask of who sees whom, which is
how it is run here: transformers' own layers, each attention call over the query's own tokens, each weight with all its
uses.

    a prompt token sees    itself and the prompt before it; in sliding layers the last `sliding_window` of these
    a canvas token sees    the whole canvas and the whole prompt; in sliding layers its last `sliding_window` - 1 tokens

Logits and scores equal those of transformers' DiffusionGemmaForBlockDiffusion to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModel, DiffusionGemmaConfig
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import (
    DiffusionGemmaBlockDiffusionOutputWithPast,
    DiffusionGemmaDecoderModel,
    DiffusionGemmaMultimodalEmbedder,
    DiffusionGemmaPreTrainedModel,
)

from ...errors import RevprobeError
from ..bases.bidirectional import BidirectionalDecoder
from ..bases.experts import GroupedExperts
from ..bases.masked_config import MaskedDiffusionConfig
from ..contract.block_masks import added_to_scores
from .noise import UNIFORM, in_noise

# Of an attention mask that says where the canvas begins: else each row's first token is its prompt.
PROMPT, CANVAS = 1, 2


class DiffusionGemmaCanvasConfig(MaskedDiffusionConfig, DiffusionGemmaConfig):
    """The published config.json, key by key.

    Attributes:
        draws: how often the canvas is filled with random tokens, for readings that are means over them.
    Raises: RevprobeError, for an encoder that has weights of its own or sees ahead, or a number of draws below 1.
    """

    model_type = "diffusion_gemma"
    only = {"tie_word_embeddings": True}
    text_config: Any = None
    vision_config: Any = None
    draws: int = 8

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.draws, int) or self.draws < 1:
            raise RevprobeError(f"draws={self.draws!r}: expected at least 1 draw of the random tokens on the canvas")
        super().__post_init__(**kwargs)
        if self.text_config.use_bidirectional_attention == "all":
            raise RevprobeError(
                f"{type(self).__name__}: use_bidirectional_attention='all' is not supported, since a prompt is read "
                "from left to right here; expected 'vision' or null"
            )


class _Part(GroupedExperts, DiffusionGemmaPreTrainedModel):  # type: ignore[misc]
    """Of a model whose experts run as the whole's."""


class _LayerScalar(nn.Module):
    """All that a layer of the encoder does not share with the decoder's."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_scalar = nn.Buffer(torch.ones(1))


class _Encoder(_Part):
    """What the encoder has beside the decoder's weights. The tower that reads images is held and never run."""

    def __init__(self, config: DiffusionGemmaCanvasConfig) -> None:
        super().__init__(config)
        self.language_model = nn.Module()
        self.language_model.layers = nn.ModuleList(_LayerScalar() for _ in range(config.text_config.num_hidden_layers))
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.embed_vision = DiffusionGemmaMultimodalEmbedder(config.vision_config, config.text_config)


class _OneStream(_Part):
    def __init__(self, config: DiffusionGemmaCanvasConfig) -> None:
        super().__init__(config)
        self.encoder = _Encoder(config)
        self.decoder = DiffusionGemmaDecoderModel(config)
        decoder: Any = self.decoder
        decoder.config = config.text_config  # by which transformers finds whose attention it sets

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        self.decoder.embed_tokens = value


@dataclass(frozen=True)
class _Sequence:
    """A batch of [prompt | canvas]. Shapes: `ids`, `positions`, `canvas` (bool): `batch seq`; `sees`: who may be seen,
    by its prompt and by its canvas, `batch seq (bool)` each.
    """

    ids: Tensor
    positions: Tensor
    canvas: Tensor
    sees: tuple[Tensor, Tensor]

    def attends(self, window: int | None) -> Tensor:
        """Who sees whom. Shapes: `-> batch seq seq (bool)`."""
        place = torch.arange(self.ids.shape[1], device=self.ids.device)
        back = place[:, None] - place[None, :]
        prompt = (back >= 0) & (back < (window or len(place)))
        first = self.canvas.int().argmax(1)[:, None]
        near = self.canvas | (place >= first - (window or len(place) + 1) + 1)
        by_prompt, by_canvas = self.sees
        ahead = ~self.canvas[:, None, :]
        return torch.where(
            self.canvas[:, :, None], (near & by_canvas)[:, None, :], prompt & ahead & by_prompt[:, None, :]
        )


class DiffusionGemmaForMaskedDiffusion(BidirectionalDecoder, _Part):  # type: ignore[misc]
    """DiffusionGemma, text only. The logits for canvas position i stand in row i; a prompt's rows are -inf, since
    nothing is predicted there.

    A token id of `vocab_size` and beyond is a hidden place of the canvas (see `noise`).
    """

    config_class = DiffusionGemmaCanvasConfig
    noise = UNIFORM
    # Path -> why the attention there is not read.
    not_read = {
        "model.encoder.language_model": "the encoder has the decoder's weights and is run as the prompt's rows of its "
        "layers, at which nothing is predicted",
        "model.encoder.vision_tower": "it reads images, and queries are text",
    }
    _tied_weights_keys = {"lm_head.weight": "model.decoder.embed_tokens.weight"}

    def __init__(self, config: DiffusionGemmaCanvasConfig) -> None:
        super().__init__(config)
        for kernel in ("_attn_implementation", "_experts_implementation"):
            # Layers ask the text's own config, which transformers tells only where it is a whole model's.
            setattr(config.text_config, kernel, getattr(config, kernel))
        self.model = _OneStream(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    @property
    def vocab_size(self) -> int:
        return int(self.config.text_config.vocab_size)

    @property
    def hidden_id(self) -> int:
        """The token id of a hidden place in the first draw; those of the others follow."""
        return self.vocab_size

    @property
    def canvas_length(self) -> int:
        """Tokens of the canvas: those of a query behind its prompt, and random ones up to here."""
        return int(self.config.canvas_length)

    @property
    def draws(self) -> int:
        return int(self.config.draws)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        decoder_position_ids: Tensor | None = None,
        self_conditioning_logits: Tensor | None = None,
        use_cache: bool = False,
    ) -> DiffusionGemmaBlockDiffusionOutputWithPast:
        """Run a batch of whole sequences, or as transformers' class is called: prompts, and their canvases apart.

        Shapes: `batch seq -> batch seq vocab`, or `batch prompt, batch canvas -> batch canvas vocab`.
        Args:
            attention_mask: 0 for padding; where it has a 2, the canvas is what has one; else a row's first token is its
                prompt.
            position_ids: by default counted over what is not padding.
            self_conditioning_logits: of the step before, `batch canvas vocab`; with `decoder_input_ids` alone.
        Raises: RevprobeError, for a hidden place that is not on the canvas, or a canvas that is none.
        """
        if decoder_input_ids is None:
            seen = _whole(input_ids, attention_mask, position_ids)
        else:
            masks, places = (attention_mask, decoder_attention_mask), (position_ids, decoder_position_ids)
            seen = _joined(input_ids, decoder_input_ids, masks, places)
        hidden = self._run(self._without_noise(seen), self_conditioning_logits)
        start = 0 if decoder_input_ids is None else input_ids.shape[1]
        logits = self.lm_head(hidden[:, start:]).to(torch.float32)
        cap = self.config.text_config.final_logit_softcapping
        logits = (torch.tanh(logits / cap) * cap).masked_fill(~seen.canvas[:, start:, None], -torch.inf)
        return DiffusionGemmaBlockDiffusionOutputWithPast(
            logits=logits, encoder_last_hidden_state=hidden[:, :start] if start else None
        )

    def _without_noise(self, seen: _Sequence) -> _Sequence:
        """The random tokens put in. Raises: RevprobeError, for a hidden place where there is no canvas."""
        places = seen.canvas.cumsum(1) - 1
        hidden = (seen.ids >= self.vocab_size) & (seen.sees[0] | seen.sees[1])  # padding may hold anything
        if bool((hidden & ~(seen.canvas & (places < self.canvas_length))).any()):
            raise RevprobeError(
                f"a token is hidden outside the canvas, which has {self.canvas_length} tokens behind the prompt; only "
                "what stands there can be asked for, so shorten the query or end its prompt earlier (canvas_start)"
            )
        ids = in_noise(seen.ids, places, self.canvas_length, self.vocab_size)
        return _Sequence(ids, seen.positions, seen.canvas, seen.sees)

    def _run(self, seen: _Sequence, conditioning: Tensor | None) -> Tensor:
        """Shapes: `-> batch seq width`."""
        decoder, text = self.model.decoder, self.config.text_config
        embedded = decoder.embed_tokens(seen.ids)
        signal = torch.zeros_like(embedded)
        if conditioning is not None:
            table = decoder.embed_tokens.weight
            soft = conditioning.softmax(-1, dtype=torch.float32).to(table.dtype) @ table
            signal[:, -soft.shape[1] :] = soft * decoder.embed_tokens.embed_scale.to(soft.dtype)
        canvas = seen.canvas[..., None]
        hidden = torch.where(canvas, decoder.self_conditioning(embedded, signal), embedded)
        kinds = set(text.layer_types)
        window = {"sliding_attention": text.sliding_window}
        masks = {
            kind: added_to_scores(_or_itself(seen.attends(window.get(kind))), None, hidden.dtype) for kind in kinds
        }
        turns = {kind: decoder.rotary_emb(hidden, seen.positions, kind) for kind in kinds}
        scalars = [part.layer_scalar for part in self.model.encoder.language_model.layers]
        for layer, scalar, kind in zip(decoder.layers, scalars, text.layer_types, strict=True):
            own = {"layer_scalar": torch.where(canvas, layer.layer_scalar, scalar)}
            given = {"position_embeddings": turns[kind], "attention_mask": masks[kind]}
            hidden = functional_call(layer, own, (hidden,), given)
        return decoder.norm(hidden)


def _whole(ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> _Sequence:
    """Sequences that hold prompt and canvas."""
    valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    counted = valid.cumsum(1) - 1
    on_canvas = torch.zeros_like(valid) if mask is None else torch.eq(mask, CANVAS)
    canvas = on_canvas if bool(on_canvas.any()) else valid & (counted > 0)
    return _Sequence(ids, counted.clamp(min=0) if positions is None else positions, canvas, (valid, valid))


def _joined(
    prompt: Tensor,
    canvas: Tensor,
    masks: tuple[Tensor | None, Tensor | None],
    positions: tuple[Tensor | None, Tensor | None],
) -> _Sequence:
    """Prompts and canvases as transformers takes them: each with a mask and positions of its own.

    Shapes: `batch prompt, batch canvas, (batch prompt, batch (prompt canvas)), (batch prompt, batch canvas)`.
    """
    ids = torch.cat([prompt, canvas], dim=1)
    every = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    length = prompt.shape[1]
    at = [every[:, :length], every[:, length:]]
    at = [own if given is None else given.expand_as(own) for own, given in zip(at, positions, strict=True)]
    by_canvas = torch.ones_like(ids, dtype=torch.bool) if masks[1] is None else masks[1].bool()
    by_prompt = torch.ones_like(prompt, dtype=torch.bool) if masks[0] is None else masks[0].bool()
    by_prompt = torch.cat([by_prompt, torch.zeros_like(canvas, dtype=torch.bool)], dim=1)
    return _Sequence(ids, torch.cat(at, dim=1), every >= length, (by_prompt, by_canvas))


def _or_itself(sees: Tensor) -> Tensor:
    """Who would see nothing (padding) sees itself: an attention of nothing is NaN."""
    alone = torch.eye(sees.shape[-1], dtype=torch.bool, device=sees.device)
    return sees | (alone & ~sees.any(-1, keepdim=True))
