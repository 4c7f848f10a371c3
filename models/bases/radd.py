"""The encoder that RADD, MDLM and BD3-LM share, and RADD itself (Ou et al. 2025), as transformers models.

A pre-norm bidirectional encoder. Position enters in one of five ways: `rope` rotates queries and keys, `alibi`
adds -slope * |i - j| to the scores, `scalar` adds a learned number for each head and signed offset j - i to them (T5's
relative bias without buckets), `absolute` adds a learned vector to the embedding (so values depend on position),
`none` leaves it out. The mask token can be read but is never predicted.

With `adaln` the norms are adaptive (Peebles & Xie 2023): a condition, a vector of `cond_dim` numbers, shifts and scales
what they give, and gates what attention and MLP add. It is made for the noise level, which these models are not told:
it is that of level 0, the same for every token.

Shapes below: batch, seq, heads, head_dim, d_model, cond_dim, vocab.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from ...errors import RevprobeError
from .configs import RaddConfig
from .positions import alibi_bias, rope_tables, rotate, signed_offsets


def additive_mask(attention_mask: Tensor | None, hidden: Tensor) -> Tensor | None:
    """What a mask adds to the scores; None where it hides nothing.

    Shapes: `batch seq` (0 or False: padding, which no query sees) `-> batch 1 1 seq`; `batch 1 seq seq`, which query
    sees which key, as it stands: fractions are added, of booleans True may be seen. Batches may be 1.
    Raises: RevprobeError, for any other mask.
    """
    if attention_mask is None:
        return None
    (batch, length), shape = hidden.shape[:2], tuple(attention_mask.shape)
    fractions, by_query = attention_mask.is_floating_point(), len(shape) == 4
    fits = shape[0] in (1, batch) and shape[-1] == length and (shape[2] in (1, length) if by_query else len(shape) == 2)
    if not fits or (by_query and not fractions and attention_mask.dtype is not torch.bool):
        raise RevprobeError(
            f"attention_mask {shape} of {attention_mask.dtype}: expected ({batch}, {length}) with 0 at padding, or "
            f"({batch}, 1, {length}, {length}) of fractions, which are added to the scores, or of booleans, True where "
            "a query sees a key"
        )
    if by_query and fractions:
        return attention_mask.to(hidden.dtype)
    if not by_query and attention_mask.all():
        return None
    unseen = attention_mask == 0
    unseen = unseen if by_query else unseen[:, None, None, :]
    return torch.zeros(unseen.shape, dtype=hidden.dtype, device=hidden.device).masked_fill(unseen, -math.inf)


def dropout_at(config: Any, site: str) -> nn.Dropout:
    """Dropout at the config's rate where it names the site, else none."""
    return nn.Dropout(config.dropout if site in config.dropout_sites else 0.0)


class RaddAttention(nn.Module):
    """Bidirectional softmax attention through F.scaled_dot_product_attention, where the taps see it.

    The signature is that of Llama's attention, so that TransformerLens can take its place (`models.bridge`).
    """

    num_key_value_groups = 1

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.n_heads, self.dropout = config.n_heads, dropout_at(config, "attention_weights")
        self.head_dim = config.d_model // config.n_heads
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.k_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.v_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.o_proj = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        projections = (self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states))
        query, key, value = (
            rearrange(p, "batch seq (heads dim) -> batch heads seq dim", heads=self.n_heads) for p in projections
        )
        if position_embeddings is not None:
            query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)
        dropout = self.dropout.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, dropout_p=dropout)
        return self.o_proj(rearrange(mixed, "batch heads seq dim -> batch seq (heads dim)")), None


class RaddMLP(nn.Module):
    """Linear, GELU (tanh), Linear, with `mlp_ratio` times the width inside."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.d_model, config.mlp_ratio * config.d_model)
        self.down_proj = nn.Linear(config.mlp_ratio * config.d_model, config.d_model)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(hidden), approximate="tanh"))


def layer_norm(config: Any) -> nn.LayerNorm:
    return nn.LayerNorm(config.d_model, eps=config.layer_norm_eps, bias=config.norm_bias)


class RaddBlock(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.attention_norm = layer_norm(config)
        self.attention = RaddAttention(config)
        self.mlp_norm = layer_norm(config)
        self.mlp = RaddMLP(config)
        self.attention_dropout, self.mlp_dropout = dropout_at(config, "attention"), dropout_at(config, "mlp")

    def forward(self, hidden: Tensor, rope: tuple[Tensor, Tensor] | None, bias: Tensor | None) -> Tensor:
        normed = self.attention_norm(hidden)
        mixed, _ = self.attention(hidden_states=normed, position_embeddings=rope, attention_mask=bias)
        hidden = hidden + self.attention_dropout(mixed)
        return hidden + self.mlp_dropout(self.mlp(self.mlp_norm(hidden)))


class Modulation(nn.Linear):
    """The condition's shift and scale of a norm, and its gate of what is made of that; all zero in a new model.

    Shapes: `batch 1 cond_dim -> batch 1 (parts d_model)`.
    """

    def __init__(self, config: Any, parts: int) -> None:
        super().__init__(config.cond_dim, parts * config.d_model)


def modulate(normed: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Shapes: `batch seq d_model, batch 1 d_model, batch 1 d_model -> batch seq d_model`."""
    return normed * (1 + scale) + shift


class AdaptiveBlock(RaddBlock):
    """A block whose norms the condition shifts and scales, and whose attention and MLP it gates."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.adaLN_modulation = Modulation(config, 6)

    def forward(  # type: ignore[override]
        self, hidden: Tensor, rope: tuple[Tensor, Tensor] | None, bias: Tensor | None, condition: Tensor
    ) -> Tensor:
        parts = self.adaLN_modulation(condition).chunk(6, dim=-1)
        (shift, scale, gate), (mlp_shift, mlp_scale, mlp_gate) = parts[:3], parts[3:]
        normed = modulate(self.attention_norm(hidden), shift, scale)
        mixed, _ = self.attention(hidden_states=normed, position_embeddings=rope, attention_mask=bias)
        hidden = hidden + self.attention_dropout(gate * mixed)
        normed = modulate(self.mlp_norm(hidden), mlp_shift, mlp_scale)
        return hidden + self.mlp_dropout(mlp_gate * self.mlp(normed))


class NoiseLevel(nn.Module):
    """The embedding of noise level 0, which stands for all levels in a model that is not told them.

    Of its features, the cosines and sines of level times frequency, all cosines are 1 and all sines 0. They come with
    the batch of the hidden states, so that each example's gradient stands apart.
    Shapes: `batch seq d_model -> batch 1 cond_dim`.
    Source: kuleshov-group/mdlm, models/dit.py, TimestepEmbedder.
    """

    cosines = 128  # and as many sines

    def __init__(self, cond_dim: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2 * self.cosines, cond_dim), nn.Linear(cond_dim, cond_dim)

    def forward(self, hidden: Tensor) -> Tensor:
        is_cosine = torch.arange(2 * self.cosines, device=hidden.device) < self.cosines
        features = is_cosine.to(hidden.dtype).expand(len(hidden), 1, -1)
        return F.silu(self.second(F.silu(self.first(features))))


class MaskedEncoder(PreTrainedModel):
    """The encoder with an untied unembedding whose mask-token logit is -inf.

    `forward(input_ids, attention_mask=None, labels=None, position_ids=None)` returns a MaskedLMOutput; `logits` have
    the shape `batch seq vocab`, position i predicting the token AT i (logit shift 0). `attention_mask` says what is
    padding, or which query sees which key (`additive_mask`). `position_ids` (`batch seq`, or a batch of 1) are 0, 1,
    ... unless given; a noised and a clean copy side by side take the same ones. `labels` use -100 for "no loss".

    A new model with `initialization="published"` starts as the published code does: linear weights and biases as torch
    leaves them, U(-1/sqrt(fan_in), 1/sqrt(fan_in)); token embedding U(-1/sqrt(d_model), 1/sqrt(d_model)); the
    unembedding and its bias zero, modulations as well; weights AND biases of LayerNorms one. The published models
    rotate and have no table of positions or offsets; ours start like their token embedding.

    Raises: RevprobeError, for sequences longer than `max_length`, or positions beyond it (absolute encoding has no
        vector for them, and the other encodings were not trained there), and for masks and positions of another shape.
    """

    main_input_name = "input_ids"
    base_model_prefix = ""
    _supports_sdpa = True

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        c: Any = config
        self.embed_tokens = nn.Embedding(c.vocab_size, c.d_model)
        if c.position_encoding == "absolute":
            self.embed_positions = nn.Embedding(c.max_position_embeddings, c.d_model)
        if c.position_encoding == "scalar":
            self.embed_offsets = nn.Embedding(2 * c.max_position_embeddings - 1, c.n_heads)
        if c.adaln:
            self.sigma_map = NoiseLevel(c.cond_dim)
        self.blocks = nn.ModuleList((AdaptiveBlock if c.adaln else RaddBlock)(c) for _ in range(c.n_layers))
        self.final_norm = layer_norm(c)
        if c.adaln:
            self.final_adaLN_modulation = Modulation(c, 2)
        self.lm_head = nn.Linear(c.d_model, c.vocab_size, bias=c.head_bias)
        self.dropout = dropout_at(c, "embedding")
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if self.config.initialization == "published":
            return self._init_as_published(module)
        # N(0, 0.02) everywhere: zero-initialised output layers stall RoPE for thousands of steps.
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    def _init_as_published(self, module: nn.Module) -> None:
        # Source: ML-GSAI/RADD, model/transformer.py; kaiming_uniform with a = sqrt(5) is U(-1/sqrt(fan_in), ...).
        if module is self.lm_head or isinstance(module, Modulation):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)
        elif isinstance(module, nn.Linear | nn.Embedding):
            fan_in = module.in_features if isinstance(module, nn.Linear) else self.config.d_model
            for parameter in module.parameters():
                nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5)
        elif isinstance(module, nn.LayerNorm):
            for parameter in module.parameters():
                nn.init.ones_(parameter)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    @property
    def block_size(self) -> int | str | None:
        """Tokens of a block, where `load_model` was told some; None: every token sees every other."""
        return getattr(self.config, "block_size", None)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        **_: Any,
    ) -> MaskedLMOutput:
        positions = self._positions(input_ids, position_ids)
        hidden = self._embed(input_ids, positions)
        bias = self._attention_bias(attention_mask, positions, hidden)
        rope = rope_tables(self.config, positions) if self.config.position_encoding == "rope" else None
        condition = [self.sigma_map(hidden)] if self.config.adaln else []
        for block in self.blocks:
            hidden = block(hidden, rope, bias, *condition)
        hidden = self.final_norm(hidden)
        if self.config.adaln:
            hidden = modulate(hidden, *self.final_adaLN_modulation(*condition).chunk(2, dim=-1))
        logits = self.lm_head(hidden)
        is_mask = torch.arange(self.config.vocab_size, device=logits.device) == self.config.mask_token_id
        logits = logits.masked_fill(is_mask, float("-inf"))
        loss = (
            None
            if labels is None
            else F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
        )
        return MaskedLMOutput(loss=loss, logits=logits)

    def _positions(self, input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
        """Shapes: `batch seq, batch seq or None -> batch seq`, a batch of 1 where all are alike."""
        (batch, length), limit = input_ids.shape, self.config.max_position_embeddings
        if position_ids is None:
            if length > limit:
                raise RevprobeError(
                    f"sequence of {length} tokens: this model takes at most {limit}; "
                    f"shorten the queries or load a model with a larger max_length"
                )
            return torch.arange(length, device=input_ids.device)[None]
        if position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != length:
            raise RevprobeError(
                f"position_ids {tuple(position_ids.shape)}: expected one for each token, ({batch}, {length})"
            )
        first, last = int(position_ids.min()), int(position_ids.max())
        if first < 0 or last >= limit:
            raise RevprobeError(
                f"position_ids from {first} to {last}: this model has positions 0 to {limit - 1}; give others or "
                "load a model with a larger max_length"
            )
        return position_ids

    def _embed(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        hidden = self.embed_tokens(input_ids)
        if self.config.position_encoding == "absolute":
            hidden = hidden + self.embed_positions(positions)
        return self.dropout(hidden)

    def _attention_bias(self, attention_mask: Tensor | None, positions: Tensor, hidden: Tensor) -> Tensor | None:
        """What position adds to the scores, and the mask, as one additive mask; None when there is neither."""
        bias, mask = None, additive_mask(attention_mask, hidden)
        if self.config.position_encoding == "alibi":
            bias = alibi_bias(self.config.n_heads, positions, dtype=hidden.dtype)
        if self.config.position_encoding == "scalar":
            offsets = signed_offsets(positions, self.config.max_position_embeddings)
            # Looked up once and then repeated over the batch: there each example's gradient of the table stands apart.
            bias = self.embed_offsets(offsets).expand(len(hidden), -1, -1, -1)
            bias = rearrange(bias, "batch query key heads -> batch heads query key").to(hidden.dtype)
        return mask if bias is None else bias if mask is None else bias + mask


class RaddForMaskedLM(MaskedEncoder):
    """RADD: the encoder without a condition."""

    config: RaddConfig
    config_class = RaddConfig

    def __init__(self, config: RaddConfig) -> None:
        if config.published_layout:  # `from_pretrained` would find none of its tensors, and draw them all
            raise RevprobeError("this is the config.json of RADD's published code; load_model(FOLDER_OR_NAME) reads it")
        super().__init__(config)
