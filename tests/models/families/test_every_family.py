"""Every published family, held to the outputs of its reference code: logits, scores, blocks, training masks; the three
probes, gradients and a save round trip. Loaded with no option beyond those that a user must give.

`tests/fixtures/<name>/reference.safetensors` holds the outputs (float32, CPU). Seen: below 6e-6; the tolerance is 2e-5.
"""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from plain_gradients import worst_product_error
from safetensors.torch import load_file
from torch import Tensor

import revprobe as rp
from revprobe.models.contract.block_masks import added_to_scores, training_mask
from tiny import FIXTURES, pairs_at, tapped

CLOSE = 2e-5
# fixture -> what its files do not say
CASES = {
    "llada-tiny": {},
    "dream-tiny": {},
    "radd-tiny": {},
    "mdlm-tiny": {},
    "bd3lm-tiny": {},
    "sdar-tiny": {},
    "fastdllm2-tiny": {"mask_token_id": 253},
    "a2d-qwen3-mdlm-tiny": {"mask_token_id": 254, "bidirectional": True},
    "a2d-qwen3-bd3lm-tiny": {"mask_token_id": 254, "block_size": 4},
    "a2d-qwen2-mdlm-tiny": {"mask_token_id": 254, "bidirectional": True},
    "a2d-qwen2-bd3lm-tiny": {"mask_token_id": 254, "block_size": 4},
    "a2d-llama-mdlm-tiny": {"mask_token_id": 254, "bidirectional": True},
    "diffugpt-tiny": {"mask_token_id": 105},
    "diffullama-tiny": {"mask_token_id": 81, "bidirectional": True},
    "smdm-tiny": {"n_heads": 4},
    "lladamoe-tiny": {"mask_token_id": 252},
    "llada2-tiny": {"mask_token_id": 246, "block_size": 4},
}
SHIFTED = {"dream-tiny", "fastdllm2-tiny", "diffugpt-tiny", "diffullama-tiny"}
BLOCKS = ["bd3lm-tiny", "sdar-tiny", "fastdllm2-tiny", "a2d-qwen3-bd3lm-tiny", "a2d-qwen2-bd3lm-tiny", "llada2-tiny"]
# Inside one block of four, so that models that write in blocks see their evidence.
PAIRS = pairs_at((6, 5), (5, 6), count=9, length=8, vocab=100, ragged=True)


@cache
def reference(name: str) -> dict[str, Tensor]:
    return load_file(FIXTURES / name / "reference.safetensors")


@cache
def loaded(name: str) -> rp.ProbedModel:
    return rp.load_model(FIXTURES / name, **CASES[name])


def apart(ours: Tensor, theirs: Tensor, mask_token_id: int) -> float:
    """The largest difference; the mask's own logit, which some of ours have at -inf, is left out."""
    kept = torch.arange(ours.shape[-1]) != mask_token_id
    return float((ours - theirs)[..., kept].abs().max())


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits_equal_the_reference_with_and_without_padding(name: str) -> None:
    model, expected = loaded(name), reference(name)
    ids, mask = expected["input_ids"], expected["attention_mask"]
    whole = model.in_blocks(None)
    assert apart(whole.logits(ids), expected["logits_nomask"], model.mask_token_id) < CLOSE
    padded = whole.logits(ids, mask)[mask.bool()]
    assert apart(padded, expected["logits"][mask.bool()], model.mask_token_id) < CLOSE
    assert (model.objective, model.logit_shift) == ("masked", int(name in SHIFTED))
    assert model.reads == ("in blocks of 4" if name in BLOCKS else "bidirectional")
    assert model.reads in repr(model)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_scores_equal_the_reference_in_every_layer_and_head(name: str) -> None:
    model, ids = loaded(name).in_blocks(None), reference(name)["input_ids"][:1]
    assert worst_score_error(model, ids, reference(name)["scores_row0"]) < CLOSE


def left_padded(name: str) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """A2D's own reading in blocks: positions are counted over valid tokens, and padding sees itself alone.

    Returns: ids, what the bare module is given beside them, which tokens are valid.
    """
    expected = reference(name)
    sees = expected["block_attention_mask"].bool()
    valid = sees.any(-1)
    sees = sees | (torch.eye(sees.shape[-1], dtype=torch.bool) & ~valid[..., None])
    added = torch.zeros(sees.shape).masked_fill(~sees, -torch.inf)[:, None]
    given = {"attention_mask": added, "position_ids": expected["block_position_ids"]}
    return expected["block_input_ids"], given, valid


@torch.no_grad()
def scores(model: rp.ProbedModel, ids: Tensor, **given: Tensor) -> Tensor:
    """Of one row, in all layers and heads; -inf where a row does not see a column. `given`: to the bare module."""
    everywhere = torch.arange(ids.shape[1])[None]
    with tapped(model, everywhere, everywhere, ids.shape[1]) as tap:
        model.module(ids, **given) if given else model.logits(ids)
    return torch.stack([call.score[0] for _, call in sorted(tap.layers().items())])


def worst_score_error(model: rp.ProbedModel, ids: Tensor, expected: Tensor, **given: Tensor) -> float:
    """Over all layers, heads, rows and the columns that a row sees."""
    seen = scores(model, ids, **given)
    assert seen.shape == expected.shape
    return float((seen - expected)[seen.isfinite()].abs().max())


@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_blocks_equal_the_reference_and_hide_what_it_hides(name: str) -> None:
    model, expected = loaded(name), reference(name)
    assert max(block_errors(name)) < CLOSE
    if "block_input_ids" in expected:
        ids, _, valid = left_padded(name)
        for row, there in enumerate(valid):
            assert (~there).sum() % 4 == 0, "so that the blocks of the row alone are those of the padded one"
            alone = model.logits(ids[row, there][None])[0]
            assert apart(alone, expected["block_logits"][row, there], model.mask_token_id) < CLOSE
        return
    for seen in scores(model, expected["input_ids"][:1]).isfinite().flatten(0, 1):
        assert torch.equal(seen, expected["block_attention_mask"].bool())


@torch.no_grad()
def block_errors(name: str) -> list[float]:
    """Of logits, padded rows and scores in blocks: through the wrapper, or with the reference's left-padded rows."""
    model, expected = loaded(name), reference(name)
    if "block_input_ids" in expected:
        ids, given, valid = left_padded(name)
        one = {key: value[:1] for key, value in given.items()}
        out = model.module(ids, **given).logits[valid]
        logits = apart(out, expected["block_logits"][valid], model.mask_token_id)
        return [logits, worst_score_error(model, ids[:1], expected["block_scores_row0"], **one)]
    ids, mask = expected["input_ids"], expected["attention_mask"]
    padded, there = model.logits(ids, mask)[mask.bool()], expected["block_logits_padded"][mask.bool()]
    return [
        apart(model.logits(ids), expected["block_logits"], model.mask_token_id),
        apart(padded, there, model.mask_token_id),
        worst_score_error(model, ids[:1], expected["block_scores_row0"]),
    ]


@pytest.mark.parametrize("name", BLOCKS)
def test_training_masks_equal_the_reference(name: str) -> None:
    expected = reference(name)
    length = expected["train_input_ids"].shape[1] // 2
    assert torch.equal(training_mask(length, 4), expected["train_attention_mask"].bool())
    assert max(training_errors(name)) < CLOSE


@torch.no_grad()
def training_errors(name: str) -> list[float]:
    """Of logits and scores of a noised copy beside the clean one."""
    model, expected = loaded(name), reference(name)
    ids, positions = expected["train_input_ids"], expected["train_position_ids"]
    length = ids.shape[1] // 2
    given = {"attention_mask": added_to_scores(training_mask(length, 4), None, torch.float32)}
    out = model.module(ids, **given, position_ids=positions).logits[:, :length]
    given["position_ids"] = positions[:1]
    return [
        apart(out, expected["train_logits"], model.mask_token_id),
        worst_score_error(model, ids[:1], expected["train_scores_row0"], **given),
    ]


@pytest.mark.parametrize("name", CASES)
def test_three_probes_answer(name: str) -> None:
    attention, gradient, probability = rp.probe(loaded(name), PAIRS)
    assert np.isfinite(attention.value) and np.isfinite(gradient.value) and 0 < probability.value < 1
    assert attention.undefined == gradient.undefined == probability.undefined == {}
    assert {reading.n for reading in (attention, gradient, probability)} == {9}


@pytest.mark.parametrize("name", CASES)
def test_it_is_diagnosed_as_trustworthy_and_says_which_way_it_reads(name: str) -> None:
    found = rp.diagnose(loaded(name))
    assert found.trustworthy, repr(found)
    assert ("in blocks of 4" in repr(found)) == (name in BLOCKS)


@pytest.mark.parametrize("name", CASES)
def test_gradient_products_equal_autograd(name: str) -> None:
    model = loaded(name)
    ids = reference(name)["input_ids"].clamp(max=model.vocab_size - 2)
    places, targets = torch.tensor([2, 5, 6]), torch.tensor([7, 8, 9])
    hidden = torch.arange(ids.shape[1]) == places[:, None]
    shown, rows = model.hide(ids, hidden), places - model.logit_shift

    def loss(which: slice) -> Tensor:
        logits = model.logits(shown[which])
        read = logits[torch.arange(len(logits)), rows[which]]
        return torch.nn.functional.cross_entropy(read, targets[which], reduction="none")

    parameters = dict(model.module.named_parameters())
    assert worst_product_error(model.module, parameters, loss, 3) < 1e-5


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_what_is_saved_loads_again_without_options(name: str, tmp_path: Path) -> None:
    model, ids = loaded(name), reference(name)["input_ids"]
    model.module.save_pretrained(tmp_path)
    again = rp.load_model(tmp_path)
    assert torch.equal(again.logits(ids), model.logits(ids))
    same = ("objective", "mask_token_id", "logit_shift", "block_size", "vocab_size")
    assert [getattr(again, key) for key in same] == [getattr(model, key) for key in same]


# They see the whole text, and nobody has to say so.
WHOLE = [name for name, told in CASES.items() if name not in BLOCKS and "bidirectional" not in told]


@pytest.mark.parametrize("name", WHOLE)
def test_a_dial_is_no_property_of_what_is_saved(name: str, tmp_path: Path) -> None:
    """Read in blocks of two when it is loaded, it is saved as what it is."""
    model = rp.load_model(FIXTURES / name, **CASES[name], block_size=2)
    model.module.save_pretrained(tmp_path)
    assert (model.reads, rp.load_model(tmp_path).reads) == ("in blocks of 2", "bidirectional")
