"""Files of mixtures of experts, beyond `test_first_failures.py`; and what experts, which sort the tokens of a run into
one product, make of the check of blocks.
"""

import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_files import copied, in_shards, refusal
from torch import Tensor, nn

import revprobe as rp
from revprobe.models.contract.block_masks import added_to_scores, block_mask
from tiny import FIXTURES

TOLD = {"lladamoe-tiny": {"mask_token_id": 252}, "llada2-tiny": {"mask_token_id": 246, "block_size": 4}}


def test_dense_weights_are_not_a_mixtures(tmp_path: Path) -> None:
    for name, told in TOLD.items():
        folder = copied(name, tmp_path / name)
        shutil.copy(FIXTURES / "sdar-tiny" / "model.safetensors", folder)
        assert "does not match its config: missing model.layers" in refusal(folder, **told)


def test_a_block_size_is_asked_for_where_a_family_writes_in_blocks() -> None:
    with pytest.raises(rp.RevprobeError, match=r"pass block_size=.*bidirectional=True"):
        rp.load_model(FIXTURES / "llada2-tiny", mask_token_id=246)
    assert rp.load_model(FIXTURES / "llada2-tiny", mask_token_id=246, bidirectional=True).reads == "bidirectional"


@pytest.mark.parametrize("name", TOLD)
@torch.no_grad()
def test_shards_load_as_one_file_does(name: str, tmp_path: Path) -> None:
    """The experts of a layer lie in both."""
    folder, ids = copied(name, tmp_path / name), torch.randint(240, (2, 9))
    whole = rp.load_model(folder, **TOLD[name])
    in_shards(folder)
    assert torch.equal(rp.load_model(folder, **TOLD[name]).logits(ids), whole.logits(ids))


# --- blocks of a mixture ---------------------------------------------------------------------------------------------


class CausalInside(nn.Module):
    """Puts a causal mask on top: earlier logits move by the experts' rounding alone."""

    logit_shift = 0

    def __init__(self) -> None:
        super().__init__()
        self.mixture = rp.load_model(FIXTURES / "llada2-tiny", **TOLD["llada2-tiny"]).module

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        own = added_to_scores(block_mask(input_ids.shape[1], 1), None, torch.float32)
        given = attention_mask if attention_mask is not None and attention_mask.dim() == 4 else 0
        return self.mixture(input_ids, attention_mask=own + given).logits


class Whispers(CausalInside):
    """The first token of the second block reaches every logit, by less than rounding."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        fifth = self.mixture.model.embed_tokens(input_ids)[:, 4:5].sum(-1, keepdim=True)
        return self.mixture(input_ids, attention_mask=attention_mask).logits + 1e-6 * fifth


@pytest.mark.parametrize(("module", "said"), [(CausalInside, "causal"), (Whispers, "does not heed a mask")])
@pytest.mark.parametrize("kernel", ["grouped_mm", "eager"])
def test_the_rounding_of_experts_neither_hides_nor_makes_a_reach(module: type, said: str, kernel: str) -> None:
    made = module()
    made.mixture.set_experts_implementation(kernel)
    told = TOLD["llada2-tiny"]
    assert rp.ProbedModel(made.mixture, objective="masked", **told).block_size == 4
    with pytest.raises(rp.RevprobeError, match=said):
        rp.ProbedModel(made, objective="masked", **told)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("name", TOLD)
def test_a_mixture_is_read_in_blocks_of_any_size(name: str, size: int) -> None:
    model = rp.load_model(FIXTURES / name, **TOLD[name])
    assert model.in_blocks(size).block_size == size
