"""The first things that go wrong with LLaDA-MoE's and LLaDA2's files: one line each, and none runs their code; and what
experts, which sort the tokens of a run into one product, make of the check of blocks."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import revprobe as rp
from revprobe.models.contract.block_masks import added_to_scores, block_mask
from tiny import FIXTURES

TOLD = {"lladamoe-tiny": {"mask_token_id": 252}, "llada2-tiny": {"mask_token_id": 246, "block_size": 4}}
OTHER = {"lladamoe-tiny": "llada2-tiny", "llada2-tiny": "lladamoe-tiny"}
WEIGHTS, CODE = "model.safetensors", "modeling.py"


def cut_off(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])


def shards(folder: Path) -> list[Path]:
    """Two files and their index, as large checkpoints have them."""
    tensors = sorted(load_file(folder / WEIGHTS).items())
    (folder / WEIGHTS).unlink()
    paths = [folder / f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    parts = [dict(tensors[n::2]) for n in (0, 1)]  # the experts of a layer lie in both
    for path, part in zip(paths, parts, strict=True):
        save_file(part, path, {"format": "pt"})
    names = {name: path.name for path, part in zip(paths, parts, strict=True) for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return paths


def one_shard_cut_off(folder: Path) -> None:
    second = shards(folder)[1]
    second.write_bytes(second.read_bytes()[:-1000])


def one_shard_missing(folder: Path) -> None:
    shards(folder)[1].unlink()


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def code_only(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / CODE).write_text("raise SystemExit('this code was run')")


def another_familys_weights(folder: Path) -> None:
    shutil.copy(FIXTURES / OTHER[folder.name] / WEIGHTS, folder / WEIGHTS)


def dense_weights(folder: Path) -> None:
    shutil.copy(FIXTURES / "sdar-tiny" / WEIGHTS, folder / WEIGHTS)


DAMAGES: dict[Callable[[Path], None], str] = {
    cut_off: "cut off",
    one_shard_cut_off: "cut off",
    one_shard_missing: r"names 'model-\d+-of-\d+\.safetensors', which is not there",
    pickled: r"only pickled weights \(pytorch_model.bin\).*convert them once, which runs none",
    code_only: "holds no model.safetensors",
    another_familys_weights: "does not match its config",
    dense_weights: "does not match its config: missing model.layers",
}


@pytest.fixture(params=TOLD)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of a checkpoint, under its own name, to damage."""
    made = tmp_path / request.param
    made.mkdir()
    for name in ("config.json", WEIGHTS):
        shutil.copy(FIXTURES / request.param / name, made / name)
    return made


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused_in_one_line(damage: Callable[[Path], None], folder: Path) -> None:
    damage(folder)
    with pytest.raises(rp.RevprobeError, match=DAMAGES[damage]) as caught:
        rp.load_model(folder, **TOLD[folder.name])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"mask_token_id": 256}, "outside the vocabulary"),
        ({"mask_token_id": "[MASK]"}, "no tokenizer to look it up in"),
        ({"mask_token_id": None}, "mask_token_id="),
        ({"objective": "causal"}, "leave objective out"),
    ],
)
def test_what_is_told_wrongly_or_not_at_all_is_asked_for(told: dict, said: str, folder: Path) -> None:
    with pytest.raises(rp.RevprobeError, match=said) as caught:
        rp.load_model(folder, **(TOLD[folder.name] | told))
    assert "\n" not in str(caught.value)


def test_a_block_size_is_asked_for_where_a_family_writes_in_blocks() -> None:
    with pytest.raises(rp.RevprobeError, match=r"pass block_size=.*bidirectional=True"):
        rp.load_model(FIXTURES / "llada2-tiny", mask_token_id=246)
    assert rp.load_model(FIXTURES / "llada2-tiny", mask_token_id=246, bidirectional=True).reads == "bidirectional"


@torch.no_grad()
def test_shards_load_as_one_file_does(folder: Path) -> None:
    whole = rp.load_model(folder, **TOLD[folder.name])
    shards(folder)
    ids = torch.randint(240, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(rp.load_model(folder, **TOLD[folder.name]).logits(ids), whole.logits(ids))


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
