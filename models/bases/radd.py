"""RADD: a masked diffusion model without time conditioning, as a transformers model (Ou et al. 2025).

A pre-norm bidirectional encoder. Position enters in one of five ways: `rope` rotates queries and keys, `alibi`
adds -slope * |i - j| to the scores, `scalar` adds a learned number for each head and signed offset j - i to them (T5's
relative bias without buckets), `absolute` adds a learned vector to the embedding (so values depend on position),
`none` leaves it out. The mask token can be read but is never predicted.

Shapes below: batch, seq, heads, head_dim, d_model, vocab.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from ...errors import RevprobeError
from .configs import RaddConfig


def alibi_slopes(n_heads: int) -> Tensor:
    """The standard ALiBi slopes: 2^(-8 k / n) for k = 1..n, interleaved from the next power of two otherwise.

    Shapes: `-> heads`. Source: Press et al. 2022, Sec. 3.
    """
    power = 2 ** math.floor(math.log2(n_heads))
    slopes = [2 ** (-8 * (k + 1) / power) for k in range(power)]
    between = [2 ** (-4 * (2 * k + 1) / power) for k in range(n_heads - power)]
    return torch.tensor(slopes + between)


def alibi_bias(n_heads: int, length: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """-slope * |i - j|, symmetric in distance so that reversal leaves it unchanged. Shapes: `-> 1 heads seq seq`."""
    positions = torch.arange(length, device=device)
    distance = (positions[:, None] - positions[None, :]).abs()
    return (-alibi_slopes(n_heads).to(device)[:, None, None] * distance)[None].to(dtype)


def signed_offsets(length: int, max_length: int, *, device: torch.device) -> Tensor:
    """The row of the table of offsets for query i and key j: (j - i) + max_length - 1. Shapes: `-> seq seq`."""
    positions = torch.arange(length, device=device)
    return positions[None, :] - positions[:, None] + max_length - 1


def rope_tables(config: RaddConfig, length: int, *, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta_k, theta_k = base^(-2k/d), each plane twice as in Llama.

    Shapes: `-> 1 seq head_dim, 1 seq head_dim`, float32.
    """
    head_dim = config.d_model // config.n_heads
    theta = config.rope_base ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * theta
    angle = torch.cat((angle, angle), dim=-1)[None]
    return angle.cos(), angle.sin()


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn plane k (entries k and k + d/2, as in Llama) of each position by its angle.

    Shapes: `batch heads seq head_dim, 1 seq head_dim, 1 seq head_dim -> batch heads seq head_dim`.
    """
    first, second = states.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return states * cos[:, None].to(states.dtype) + turned * sin[:, None].to(states.dtype)


def dropout_at(config: RaddConfig, site: str) -> nn.Dropout:
    """Dropout at the config's rate where it names the site, else none."""
    return nn.Dropout(config.dropout if site in config.dropout_sites else 0.0)


class RaddAttention(nn.Module):
    """Bidirectional softmax attention through F.scaled_dot_product_attention, where the taps see it.

    The signature is that of Llama's attention, so that TransformerLens can take its place (`models.bridge`).
    """

    num_key_value_groups = 1

    def __init__(self, config: RaddConfig) -> None:
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

    def __init__(self, config: RaddConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.d_model, config.mlp_ratio * config.d_model)
        self.down_proj = nn.Linear(config.mlp_ratio * config.d_model, config.d_model)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(hidden), approximate="tanh"))


class RaddBlock(nn.Module):
    def __init__(self, config: RaddConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.attention = RaddAttention(config)
        self.mlp_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.mlp = RaddMLP(config)
        self.attention_dropout, self.mlp_dropout = dropout_at(config, "attention"), dropout_at(config, "mlp")

    def forward(self, hidden: Tensor, rope: tuple[Tensor, Tensor] | None, bias: Tensor | None) -> Tensor:
        normed = self.attention_norm(hidden)
        mixed, _ = self.attention(hidden_states=normed, position_embeddings=rope, attention_mask=bias)
        hidden = hidden + self.attention_dropout(mixed)
        return hidden + self.mlp_dropout(self.mlp(self.mlp_norm(hidden)))


class RaddForMaskedLM(PreTrainedModel):
    """RADD with an untied unembedding whose mask-token logit is -inf.

    `forward(input_ids, attention_mask=None, labels=None)` returns a MaskedLMOutput; `logits` have the shape
    `batch seq vocab`, position i predicting the token AT i (logit shift 0). `labels` use -100 for "no loss".

    A new model with `initialization="published"` starts as RADD's own code does: linear weights and biases as torch
    leaves them, U(-1/sqrt(fan_in), 1/sqrt(fan_in)); token embedding U(-1/sqrt(d_model), 1/sqrt(d_model)); the
    unembedding and its bias zero; weights AND biases of LayerNorms one. The published model rotates and has no table
    of positions or offsets; ours start like its token embedding.

    Raises: RevprobeError, for sequences longer than `max_length` (absolute encoding has no vector for them, and
        the other encodings were not trained there).
    """

    config: RaddConfig
    config_class = RaddConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, config: RaddConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        if config.position_encoding == "absolute":
            self.embed_positions = nn.Embedding(config.max_length, config.d_model)
        if config.position_encoding == "scalar":
            self.embed_offsets = nn.Embedding(2 * config.max_length - 1, config.n_heads)
        self.blocks = nn.ModuleList(RaddBlock(config) for _ in range(config.n_layers))
        self.final_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=config.head_bias)
        self.dropout = dropout_at(config, "embedding")
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
        if module is self.lm_head:
            for parameter in module.parameters():
                nn.init.zeros_(parameter)
        elif isinstance(module, nn.Linear | nn.Embedding):
            fan_in = module.in_features if isinstance(module, nn.Linear) else self.config.d_model
            for parameter in module.parameters():
                nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.ones_(module.bias)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **_: Any,
    ) -> MaskedLMOutput:
        hidden = self._embed(input_ids)
        bias = self._attention_bias(attention_mask, hidden)
        rope = (
            rope_tables(self.config, input_ids.shape[1], device=hidden.device)
            if self.config.position_encoding == "rope"
            else None
        )
        for block in self.blocks:
            hidden = block(hidden, rope, bias)
        logits = self.lm_head(self.final_norm(hidden))
        is_mask = torch.arange(self.config.vocab_size, device=logits.device) == self.config.mask_token_id
        logits = logits.masked_fill(is_mask, float("-inf"))
        loss = (
            None
            if labels is None
            else F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
        )
        return MaskedLMOutput(loss=loss, logits=logits)

    def _embed(self, input_ids: Tensor) -> Tensor:
        length = input_ids.shape[1]
        if length > self.config.max_length:
            raise RevprobeError(
                f"sequence of {length} tokens: this model takes at most {self.config.max_length}; "
                f"shorten the queries or load a model with a larger max_length"
            )
        hidden = self.embed_tokens(input_ids)
        if self.config.position_encoding == "absolute":
            hidden = hidden + self.embed_positions(torch.arange(length, device=input_ids.device)[None])
        return self.dropout(hidden)

    def _attention_bias(self, attention_mask: Tensor | None, hidden: Tensor) -> Tensor | None:
        """What position adds to the scores, and padded keys, as one additive mask; None when there is neither."""
        bias, (batch, length) = None, hidden.shape[:2]
        if self.config.position_encoding == "alibi":
            bias = alibi_bias(self.config.n_heads, length, dtype=hidden.dtype, device=hidden.device)
        if self.config.position_encoding == "scalar":
            offsets = signed_offsets(length, self.config.max_length, device=hidden.device)
            # Looked up once and then repeated over the batch: there each example's gradient of the table stands apart.
            bias = self.embed_offsets(offsets[None]).expand(batch, -1, -1, -1)
            bias = rearrange(bias, "batch query key heads -> batch heads query key").to(hidden.dtype)
        if attention_mask is not None and not attention_mask.all():
            padded = torch.zeros(attention_mask.shape, dtype=hidden.dtype, device=hidden.device)
            padded = padded.masked_fill(attention_mask == 0, float("-inf"))[:, None, None, :]
            bias = padded if bias is None else bias + padded
        return bias
