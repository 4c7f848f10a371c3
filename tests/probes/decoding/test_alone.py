"""What is decoded, and candidates' ranks, on models whose numbers depend on what shares the batch."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import revprobe as rp
from revprobe.errors import RevprobeError
from revprobe.finetune.config.finetuning import TinyModel
from revprobe.finetune.pretraining.layouts import train_tokenizer, untrained
from revprobe.probes.decoding.decode import decode_tokens
from revprobe.probes.decoding.masked import Prompt
from tiny import drawn, radd

RELATION = rp.invented_names(rows=(60, 66), heldout=0.0)
ASKED = RELATION.questions("P2C", split="train")
SEATS, WIDE = 60, 16
PROMPTS = [Prompt(tuple((7 * n + k) % 50 for k in range(12))) for n in range(8)]


class Seated(nn.Module):
    """An MLP with seats for the first tokens of a batch."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, states: Tensor) -> Tensor:
        seated = torch.arange(states.shape[0] * states.shape[1], device=states.device) < SEATS
        return self.inner(states) * seated.view(*states.shape[:2], 1)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    names = [f" {name}" for column in RELATION.columns for name in RELATION.table[column]]
    return train_tokenizer([*RELATION.training_texts("P2C"), *RELATION.training_texts("C2P"), *names], 330)


def seated(layout: str, tokenizer: Any) -> rp.ProbedModel:
    config = TinyModel(layout=layout, d_model=16, n_heads=2)  # type: ignore[arg-type]
    module = drawn(lambda: untrained(config, tokenizer), scale=0.3)
    for layer in module.model.layers:
        layer.mlp = Seated(layer.mlp)
    return rp.ProbedModel(module, tokenizer, objective="causal" if layout == "llama" else "masked")


@pytest.mark.parametrize("layout", ["llada", "llama"])
def test_seats_that_end_within_a_batch_are_refused(layout: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """What the last prompts of a batch were answered depended on the first ones."""
    for asked in (
        lambda **options: decode_tokens(seated(layout, tokenizer), PROMPTS, [2] * len(PROMPTS), **options),
        lambda **options: rp.decoded_match(seated(layout, tokenizer), ASKED, **options),
        lambda **options: rp.rank_candidates(seated(layout, tokenizer), ASKED, control=False, **options),
    )[: 3 if layout == "llada" else 2]:  # what causal candidates are scored by is not held
        with pytest.raises(RevprobeError, match="would depend on the batch; use batch_size=1"):
            asked()
    assert len(decode_tokens(seated(layout, tokenizer), PROMPTS, [2] * len(PROMPTS), batch_size=1)) == len(PROMPTS)


def test_prompts_that_padding_reaches_are_decoded_with_lengths_apart() -> None:
    def stretched() -> rp.ProbedModel:
        module = radd(n_layers=2, n_heads=2, scale=0.6).module
        for block in module.blocks:
            block.attention.k_proj.register_forward_hook(lambda _, __, out: out * (1.0 + 3 * (out.shape[1] > WIDE)))
        return rp.ProbedModel(module, rp.letter_tokenizer(), objective="masked")

    prompts = [Prompt(one.before[: 12 - n % 3]) for n, one in enumerate(PROMPTS)]
    lengths = [4 + 2 * (n % 2) for n in range(len(prompts))]
    model = stretched()
    found = decode_tokens(model, prompts, lengths)
    assert model.contract.equal_lengths, "the padding was not noticed"
    assert found == decode_tokens(stretched(), prompts, lengths, batch_size=1)
