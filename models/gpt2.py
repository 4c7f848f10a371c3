"""The autoregressive baseline: transformers' GPT-2 at the size of the one-layer experiments."""

from __future__ import annotations

from transformers import GPT2Config, GPT2LMHeadModel


def one_layer_gpt2(
    vocab_size: int = 56,
    *,
    d_model: int = 64,
    n_layers: int = 1,
    n_heads: int = 1,
    mlp_ratio: int = 4,
    dropout: float = 0.0,
    max_length: int = 64,
    bos_token_id: int | None = 54,
    pad_token_id: int | None = 55,
) -> GPT2LMHeadModel:
    """A randomly initialised GPT-2 (learned absolute positions, tied unembedding), one layer unless asked otherwise.

    Source: the paper's ARM baseline, Sec. 5 and App. D.1.
    """
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=max_length,
        n_embd=d_model,
        n_layer=n_layers,
        n_head=n_heads,
        n_inner=mlp_ratio * d_model,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=bos_token_id,
        eos_token_id=None,
        pad_token_id=pad_token_id,
    )
    return GPT2LMHeadModel(config)
