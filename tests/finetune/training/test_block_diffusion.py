"""Training in blocks: the loss of a noised copy beside a clean one against each block run alone behind its prefix."""

from pathlib import Path
from typing import Any

import pytest
import torch
from blocks_alone import run_alone
from torch import Tensor

import revprobe as rp
from revprobe import RevprobeError
from revprobe.finetune.config.finetuning import FinetuneConfig, TinyModel
from revprobe.finetune.config.loading import dump_config, parse_config
from revprobe.finetune.memory.from_config import plan_finetuning
from revprobe.finetune.pretraining.tiny_models import build_tiny
from revprobe.finetune.runs.finetuning import fine_tune
from revprobe.finetune.training.block_diffusion import block_logits, draw_block_masks
from revprobe.finetune.training.objectives import masked_diffusion_loss, price_masks
from revprobe.models.families.a2d import A2DQwen3Config, A2DQwen3ForMaskedDiffusion
from revprobe.relations.catalog import invented_names
from tiny import MASK, in_blocks

EPS = 1e-3


def rows(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 50, (len(lengths), max(lengths)), generator=generator)
    return ids, (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


def slow_loss(
    model: rp.ProbedModel, ids: Tensor, lengths: list[int], masked: Tensor, rate: Tensor, counted: Tensor, size: int
) -> Tensor:
    """Every noised block of every row by itself, behind its clean prefix, with a mask that is written out by hand; with
    shift 1 a block's first token in the last row of the block before.
    """
    shift, total = model.logit_shift, []
    for row, length in enumerate(lengths):
        clean = ids[row, :length].tolist()
        hidden = masked[row, :length] & counted[row, :length]
        noised = [MASK if gone else token for token, gone in zip(clean, hidden.tolist(), strict=True)]
        starts = range(0, length, size)
        logs = [run_alone(model, clean[:first] + noised[first : first + size], size)[0] for first in starts]
        losses = [
            -logs[(i - shift) // size][i - shift, clean[i]] / float(rate[row, i]) for i in range(length) if hidden[i]
        ]
        total.append(sum(losses, torch.zeros((), dtype=torch.float64)) / int(counted[row].sum()))
    return torch.stack(total).mean()


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("size", [1, 3, 4, 20])
@pytest.mark.parametrize("lengths", [[11, 11], [11, 6, 2, 8]])
def test_the_loss_is_that_of_each_block_alone_behind_its_clean_prefix(
    shift: int, size: int, lengths: list[int]
) -> None:
    model = in_blocks(size, shift=shift)
    ids, there = rows(lengths)
    draw = {"generator": torch.Generator().manual_seed(5), "eps": EPS}
    rate, masked = draw_block_masks(tuple(ids.shape), size, **draw)
    counted = there.bool().clone()
    counted[:, :shift] = False
    assert (masked & counted).any()
    padded = None if min(lengths) == max(lengths) else there
    loss = masked_diffusion_loss(
        model.module,
        ids,
        generator=torch.Generator().manual_seed(5),
        mask_token_id=MASK,
        attention_mask=padded,
        logit_shift=shift,
        block_size=size,
    )
    expected = slow_loss(model, ids, lengths, masked, rate, counted, size)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=2e-5)
    parameters = list(model.module.parameters())
    pairs = zip(
        torch.autograd.grad(loss, parameters, materialize_grads=True),
        torch.autograd.grad(expected, parameters, materialize_grads=True),
        strict=True,
    )
    left, right = (torch.cat([g.flatten().double() for g in side]) for side in zip(*pairs, strict=True))
    assert float((left - right).norm() / right.norm()) < 2e-5


@pytest.mark.parametrize("shift", [0, 1])
def test_entities_masked_as_one_and_the_response_alone_are_priced_so_in_blocks_too(shift: int) -> None:
    model, size, lengths = in_blocks(4, shift=shift), 4, [11, 11]
    ids, _ = rows(lengths, seed=2)
    leader = torch.arange(11).repeat(2, 1)
    leader[:, 3:6] = 3  # over the border of two blocks
    maskable = torch.ones_like(ids, dtype=torch.bool)
    maskable[:, :3] = False
    rate, masked = draw_block_masks((2, 11), size, generator=torch.Generator().manual_seed(1), eps=EPS, leader=leader)
    assert all(len(set(table[row, 3:6].tolist())) == 1 for table in (rate, masked) for row in range(2))
    counted = maskable.clone()
    counted[:, :shift] = False
    loss = masked_diffusion_loss(
        model.module,
        ids,
        generator=torch.Generator().manual_seed(1),
        mask_token_id=MASK,
        maskable=maskable,
        leader=leader,
        logit_shift=shift,
        block_size=size,
    )
    expected = slow_loss(model, ids, lengths, masked, rate, counted, size)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=2e-5)


@pytest.mark.parametrize("antithetic", [False, True])
def test_each_block_has_a_uniform_rate_of_its_own_and_tokens_are_masked_at_it(antithetic: bool) -> None:
    generator, rates, masked = torch.Generator().manual_seed(0), [], []
    for _ in range(400):
        rate, mask = draw_block_masks((8, 10), 4, generator=generator, eps=EPS, antithetic=antithetic)
        rates.append(rate)
        masked.append(mask)
    rate, mask = torch.cat(rates), torch.cat(masked)
    assert torch.equal(rate[:, 0], rate[:, 3]) and torch.equal(rate[:, 8], rate[:, 9])
    assert not torch.equal(rate[:, 3], rate[:, 4])
    for column in (0, 4, 8):
        assert float(rate[:, column].mean()) == pytest.approx(0.5, abs=0.03)
        assert float(rate[:, column].std()) == pytest.approx(12**-0.5, abs=0.02)
    error = float(((mask.double() - rate) ** 2).mean() - (rate * (1 - rate)).mean())
    assert abs(error) < 0.005 and abs(float((mask.double() - rate).mean())) < 0.01
    if antithetic:
        assert float(rates[0][:, ::4].flatten().sort().values.diff().max()) < 1.5 / 24


def test_a_clean_token_of_a_later_block_or_of_the_own_one_changes_no_noised_logit() -> None:
    """Were the answer visible in the clean half, the loss would be nothing."""
    model, (ids, _) = in_blocks(4), rows([12])
    noised = ids.clone()
    noised[:, 4:8] = MASK
    with torch.no_grad():
        plain = block_logits(model.module, noised, ids, 4)[0, 4:8]
        for place in range(12):
            other = ids.clone()
            other[0, place] = (other[0, place] + 1) % 50
            moved = block_logits(model.module, noised, other, 4)[0, 4:8]
            assert torch.equal(plain, moved) == (place >= 4)


def test_one_block_over_the_whole_row_is_the_whole_loss() -> None:
    model, (ids, _) = in_blocks(None), rows([9, 9])
    rate = torch.tensor([0.3, 0.8])
    masked = torch.rand(ids.shape, generator=torch.Generator().manual_seed(3)) < rate[:, None]
    noised = ids.masked_fill(masked, MASK)
    with torch.no_grad():
        whole = price_masks(model.module(noised).logits, ids, masked, rate)
        blocks = block_logits(model.module, noised, ids, 9)
        each = price_masks(blocks, ids, masked, rate[:, None].expand(ids.shape))
    torch.testing.assert_close(whole, each, rtol=1e-5, atol=1e-6)


def test_what_has_no_meaning_in_blocks_is_refused() -> None:
    model, (ids, _) = in_blocks(4), rows([8])
    about: dict[str, Any] = {"generator": torch.Generator(), "mask_token_id": MASK, "block_size": 4}
    with pytest.raises(RevprobeError, match="expected independent rates, one a block"):
        masked_diffusion_loss(model.module, ids, rates="lambda", **about)
    with pytest.raises(RevprobeError, match=r"trained in blocks of 4, a noised copy .*in_blocks\(None\)"):
        rp.objective_terms(model, rp.letters(5))
    with pytest.raises(RevprobeError, match="read_price takes the loss of one masked sequence apart"):
        rp.read_price(model, rp.letters(5))


# ---- a run ----

CONFIG = """
name: blocks
model: {name: BASE, MORE}
relation: {name: invented_names, rows: [60, 72], heldout: 0.2, direction: P2C}
lora: {rank: 2, alpha: 4}
training: {steps: 4, batch_size: 8, learning_rate: 1.0e-2, seed: 3, device: cpu}
snapshots: {every: 2, facts: 9}
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An A2D folder, which says neither how long a block is nor which token is the mask."""
    home = tmp_path_factory.mktemp("base")
    relation = invented_names(rows=[60, 72], heldout=0.2)
    build_tiny(
        TinyModel(layout="llada", d_model=16, n_heads=2, pretraining={"steps": 1, "facts": 8}), relation, home / "llada"
    )
    there = rp.load_model(home / "llada")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = A2DQwen3Config(vocab_size=there.vocab_size, num_key_value_heads=2, head_dim=8, **sizes)
    torch.manual_seed(0)
    A2DQwen3ForMaskedDiffusion(config).save_pretrained(home / "a2d")
    there.tokenizer.save_pretrained(home / "a2d")
    (home / "mask").write_text(str(there.mask_token_id))
    return home


def config(base: Path, more: str) -> FinetuneConfig:
    mask = (base / "mask").read_text()
    text = CONFIG.replace("BASE", str(base / "a2d")).replace("MORE", f"mask_token_id: {mask}, {more}")
    return parse_config(text, FinetuneConfig, "test")


@pytest.mark.parametrize(("more", "size"), [("block_size: 4", 4), ("bidirectional: true", None)])
def test_a_run_trains_and_reloads_as_it_was_told_to_read(base: Path, tmp_path: Path, more: str, size: Any) -> None:
    run = fine_tune(config(base, more), tmp_path / "run")
    assert run.finished and run.resolved.get("block_size") == size
    for model in (run.load(), rp.load_model(run.path), rp.open_run(run.path).load(2)):
        assert model.block_size == size and model.mask_token_id == int((base / "mask").read_text())
    for reading in run.readings():
        assert reading.meta.get("block_size") == size
    stored = run.readings().select(name="reverse_probability", step=4)[0]
    again = rp.probe_reverse_probability(run.load(), run.pairs(run.load()))
    assert again.value == pytest.approx(stored.value, rel=1e-5, nan_ok=True)
    assert fine_tune(config(base, more), run.path).finished, "the same config takes it up"
    if size is not None:
        with pytest.raises(RevprobeError, match="block_size"):
            fine_tune(config(base, "block_size: 8"), run.path)


def test_a_base_that_does_not_say_how_it_reads_is_asked_for_by_name(base: Path, tmp_path: Path) -> None:
    text = CONFIG.replace("BASE", str(base / "a2d")).replace(", MORE", "")
    with pytest.raises(RevprobeError, match=r"pass block_size= |mask_token_id="):
        fine_tune(parse_config(text, FinetuneConfig, "test"), tmp_path / "run")


def test_options_that_were_not_given_are_not_written_and_those_that_clash_are_refused(base: Path) -> None:
    text = CONFIG.replace("BASE", "gpt2").replace(", MORE", "")
    plain = parse_config(text, FinetuneConfig, "test")
    assert "block_size" not in dump_config(plain) and "mask_token_id" not in dump_config(plain)
    told = config(base, "block_size: 4")
    assert parse_config(dump_config(told), FinetuneConfig, "again") == told
    with pytest.raises(RevprobeError, match="exclude each other"):
        config(base, "block_size: 4, bidirectional: true")


def test_a_plan_in_blocks_counts_the_noised_copy_and_the_clean_one(base: Path) -> None:
    blocks = plan_finetuning(config(base, "block_size: 4"), tokens=10)
    whole = plan_finetuning(config(base, "bidirectional: true"), tokens=20)
    assert blocks.to_frame().equals(whole.to_frame())
    assert any("a noised copy beside a clean one" in line for line in blocks.about)
