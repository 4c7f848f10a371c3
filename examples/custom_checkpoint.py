"""Probe a model class of your own: written here, saved and loaded here, known to `load_model` by a name.

    python examples/custom_checkpoint.py

A probe needs three things of a model: logits, attention that goes through `F.scaled_dot_product_attention` (or a
`softmax` over `batch heads rows columns`), and to be told what running it cannot show: the mask token, and at which
row a token is predicted.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_model as read_weights
from safetensors.torch import save_model
from torch import Tensor, nn

import revprobe as rp

MASK, WIDTH, HEADS = 53, 32, 2


class Attention(nn.Module):
    """Two heads, one fused projection, no position in the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        batch, seq, _ = hidden.shape
        query, key, value = self.qkv(hidden).view(batch, seq, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).reshape(batch, seq, WIDTH))


class MyMaskedModel(nn.Module):
    """A two-layer masked model as a research repository would have it: no config, no transformers, bare logits."""

    def __init__(self, vocabulary: int = 56, longest: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, WIDTH), nn.Embedding(longest, WIDTH)
        self.layers = nn.ModuleList(Attention() for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, vocabulary, bias=False)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
        hidden = self.tokens(ids) + self.places(torch.arange(ids.shape[1], device=ids.device)[None])
        for layer in self.layers:
            hidden = hidden + layer(hidden, mask)
        return self.head(self.norm(hidden))


@rp.register_model("my-masked-model")
def load_my_model(path: str | Path, **wrapping: Any) -> rp.ProbedModel:
    """A two-layer masked model of my own, from its safetensors file."""
    module = MyMaskedModel()
    read_weights(module, str(path))
    # Running the module shows that it is bidirectional; that it predicts position i at row i is for us to say.
    settings = {"objective": "masked", "mask_token_id": MASK, "logit_shift": 0, "name": "my-masked-model", **wrapping}
    return rp.ProbedModel(module.eval(), rp.letter_tokenizer(), **settings)


def main() -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        save_model(MyMaskedModel(), f"{folder}/model.safetensors")
        model = rp.load_model("my-masked-model", path=f"{folder}/model.safetensors")
    print(model)
    for reading in rp.probe(model, rp.letter_pairs(length=5, model=model)):
        print(reading)


if __name__ == "__main__":
    main()
