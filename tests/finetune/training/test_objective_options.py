"""What else a fine-tuning's loss can be: spans, entities that are never masked, ranges of rates, end tokens, dials of
bare pairs. Distributions by enumeration, losses by slow loops."""

import itertools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Trainer

from revprobe import ProbedModel, RevprobeError
from revprobe.finetune.config.finetuning import FinetuneConfig, TinyModel
from revprobe.finetune.config.loading import dump_config, parse_config
from revprobe.finetune.pretraining.layouts import train_tokenizer, untrained
from revprobe.finetune.runs.finetune_setup import FORWARD_UNTRAINED, build_finetuning, prepare, row_options
from revprobe.finetune.training.dataset import PadRows, RowOptions, StatementRows
from revprobe.finetune.training.distributed import ProcessGroup
from revprobe.finetune.training.negatives import LOWER, OTHER, PLACEHOLDER, UPPER, dropped_terms
from revprobe.finetune.training.objectives import draw_masks, draw_spans, masked_diffusion_loss, step_generator
from tiny import ROOT, drawn, in_blocks

CONFIG = """
name: tiny
model: {tiny: {layout: LAYOUT, d_model: 16, n_heads: 2, pretraining: {steps: 2, facts: 8, batch_size: 8}}}
relation: {RELATION, rows: [60, 72], heldout: 0.2, direction: P2C}
objective: {OBJECTIVE}
lora: {rank: 2, alpha: 4}
training: {steps: 2, batch_size: 8, learning_rate: 1.0e-2, seed: 3, device: cpu}
snapshots: {steps: [0], facts: 4, predictions: false}
evaluation: {max_new_tokens: 12}
"""
NAMES = ROOT / "relations" / "data" / "invented_names.csv"
BARE = (
    f"name: table, path: {NAMES}, columns: [parent, child], duplicates: merge, carrier: ' ', "
    "templates: {P2C: '{parent} {child}', C2P: '{child} {parent}'}"
)


def config(objective: str = "", layout: str = "llada", relation: str = "name: invented_names") -> FinetuneConfig:
    text = CONFIG.replace("OBJECTIVE", objective).replace("LAYOUT", layout).replace("RELATION", relation)
    return parse_config(text, FinetuneConfig, "test")


@dataclass(frozen=True)
class Says:
    """A training statement made by hand."""

    text: str
    spans: tuple[tuple[int, int], tuple[int, int]]
    prompt_length: int
    fact: str = "Ann Low"


ANN = Says("Fact: Ann Low's child is Bo High", ((6, 13), (25, 32)), 24)
PAIR = Says(" Ann Low Bo High", ((1, 8), (9, 16)), 8)


@pytest.fixture(scope="module")
def models() -> dict[str, ProbedModel]:
    tokenizer: PreTrainedTokenizerFast = train_tokenizer([ANN.text, PAIR.text], 300)
    made = {}
    for layout in ("llada", "dream", "llama"):
        module = drawn(lambda layout=layout: untrained(TinyModel(layout=layout, d_model=16, n_heads=2), tokenizer))
        objective = "causal" if layout == "llama" else "masked"
        made[layout] = ProbedModel(module, tokenizer, objective=objective, name=layout)
    return made


def said(model: ProbedModel, row: Any, which: Any) -> str:
    return model.tokenizer.decode([t for t, keep in zip(row.token_ids, which, strict=True) if keep])


# ---- spans ----


@pytest.mark.parametrize("allowed", ["111", "110111", "0101", "1", "0011100"])
def test_spans_are_drawn_as_stated(allowed: str) -> None:
    """Length uniform up to the longest run, place uniform among those that fit: every span by its exact probability."""
    row = torch.tensor([c == "1" for c in allowed])
    longest = max(len(part) for part in allowed.split("0"))
    fits = {n: [i for i in range(len(allowed) - n + 1) if "0" not in allowed[i : i + n]] for n in range(1, longest + 1)}
    expected = {(i, n): 1 / longest / len(starts) for n, starts in fits.items() for i in starts}
    count = 20_000
    rate, spans = draw_spans(row.expand(count, -1), torch.Generator().manual_seed(0))
    found: Counter[tuple[int, int]] = Counter()
    for span in spans.tolist():
        places = [i for i, masked in enumerate(span) if masked]
        assert places == list(range(places[0], places[-1] + 1)), "not contiguous"
        found[places[0], len(places)] += 1
    assert set(found) == set(expected)
    for span, share in expected.items():
        assert abs(found[span] / count - share) <= 5 * (share * (1 - share) / count) ** 0.5, span
    assert torch.allclose(rate, spans.sum(1) / row.sum())


def test_rows_of_a_batch_have_spans_of_their_own() -> None:
    allowed = torch.tensor([[True] * 6, [True, True, False, False, False, False]]).repeat(50, 1)
    _, spans = draw_spans(allowed, torch.Generator().manual_seed(1))
    assert not (spans & ~allowed).any()
    assert len({tuple(row) for row in spans[::2].tolist()}) > 10


class Logits(torch.nn.Module):
    """Logits that depend on what is shown, row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(9, 9, generator=torch.Generator().manual_seed(0)))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.table[input_ids] + self.table[input_ids].mean(1, keepdim=True)


def test_a_spans_loss_is_its_mean_cross_entropy() -> None:
    ids = torch.tensor([[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]])
    maskable = torch.tensor([[False, True, True, True, True], [True, True, False, True, True]])
    model, seed = Logits(), torch.Generator().manual_seed
    loss = masked_diffusion_loss(model, ids, generator=seed(4), mask_token_id=8, maskable=maskable, masks="span")
    _, spans = draw_spans(maskable, seed(4))
    total = 0.0
    for row in range(2):
        shown = ids[row].clone()
        shown[spans[row]] = 8
        logits = model(shown[None])[0].double()
        terms = [-logits[i].log_softmax(-1)[ids[row, i]].item() for i in range(5) if spans[row, i]]
        total += sum(terms) / len(terms) / 2
    assert loss.item() == pytest.approx(total, rel=1e-5)


# ---- rates ----


def test_rates_lie_evenly_between_their_bounds() -> None:
    count = 20_000
    rate, masked = draw_masks((count, 10), generator=torch.Generator().manual_seed(0), eps=0.2, highest=0.6)
    assert 0.2 <= rate.min() < 0.2005 and 0.5995 < rate.max() <= 0.6
    shares = torch.histc(rate, bins=4, min=0.2, max=0.6) / count
    assert (shares - 0.25).abs().max() < 5 * (0.25 * 0.75 / count) ** 0.5
    assert abs(masked.float().mean() - 0.4) < 0.005
    fixed, masked = draw_masks((count, 10), generator=torch.Generator().manual_seed(0), eps=0.15, highest=0.15)
    assert torch.allclose(fixed, torch.tensor(0.15)) and abs(masked.float().mean() - 0.15) < 0.004


def test_the_default_rates_draw_the_bits_they_drew() -> None:
    generator = torch.Generator().manual_seed(3)
    uniform = torch.rand(4, generator=generator)
    rate, _ = draw_masks((4, 6), generator=torch.Generator().manual_seed(3))
    assert torch.equal(rate, 1e-3 + (1 - 1e-3) * uniform)


# ---- rows ----


@pytest.mark.parametrize(("which", "kept"), [("first", " Ann Low"), ("second", " Bo High")])
@pytest.mark.parametrize("layout", ["llada", "llama"])
def test_an_entity_that_is_never_masked(models: dict[str, ProbedModel], layout: str, which: str, kept: str) -> None:
    model = models[layout]
    for row in StatementRows([ANN], model, RowOptions(answer_tokens=12, never_mask=which)).rows:
        assert said(model, row, [not may for may in row.maskable]) == kept
        assert list(row.leader) == list(range(len(row)))


def test_never_masking_and_whole_entities_go_together(models: dict[str, ProbedModel]) -> None:
    row, _ = StatementRows([ANN], models["llada"], RowOptions(True, True, 12, "first")).rows
    assert len(set(row.leader)) < len(row)
    assert said(models["llada"], row, row.maskable) == " Bo High"


@pytest.mark.parametrize("layout", ["llada", "dream"])
def test_end_tokens_are_priced_shown_or_absent(models: dict[str, ProbedModel], layout: str) -> None:
    model = models[layout]
    priced = StatementRows([ANN], model, RowOptions(answer_tokens=12)).rows
    shown = StatementRows([ANN], model, RowOptions(answer_tokens=12, end_padding="unpriced")).rows
    absent = StatementRows([ANN], model, RowOptions(answer_tokens=12, end_padding="absent")).rows
    assert [r.token_ids for r in shown] == [r.token_ids for r in priced]
    assert said(model, shown[1], [not may for may in shown[1].maskable]).endswith("<|end|>")
    assert "<|end|>" not in said(model, shown[1], shown[1].maskable)
    assert [r.token_ids for r in absent] == [priced[0].token_ids]


def test_a_causal_rows_end_token(models: dict[str, ProbedModel]) -> None:
    model, asked = models["llama"], {"answer_tokens": 12}
    (priced,) = StatementRows([ANN], model, RowOptions(**asked)).rows
    (shown,) = StatementRows([ANN], model, RowOptions(**asked, end_padding="unpriced")).rows
    (absent,) = StatementRows([ANN], model, RowOptions(**asked, end_padding="absent")).rows
    assert shown.token_ids == priced.token_ids and not shown.maskable[-1] and all(shown.maskable[:-1])
    assert absent.token_ids == priced.token_ids[:-1]


def test_bare_pairs_say_what_their_tokens_are_on_both_sides(models: dict[str, ProbedModel]) -> None:
    model = models["llada"]
    rows = StatementRows([PAIR], model, RowOptions(answer_tokens=9, pad_sides="both", bare="this key")).rows
    names = {kind: [said(model, row, [k == kind for k in row.kinds]) for row in rows] for kind in (LOWER, UPPER)}
    assert names == {LOWER: [" Ann Low"] * 3, UPPER: [" Bo High"] * 3}
    ends = [[i for i, k in enumerate(row.kinds) if k == PLACEHOLDER] for row in rows]
    count = 9 - len(model.tokenizer(" Bo High")["input_ids"])
    size = len(rows[0])
    assert ends == [[], list(range(size, size + count)), list(range(count))]
    assert all(
        row.token_ids[i] == model.tokenizer.eos_token_id for row, own in zip(rows, ends, strict=True) for i in own
    )
    assert PadRows(2)(rows)["kinds"][0, size:].tolist() == [OTHER] * count


def test_rows_with_a_template_are_refused_by_it(models: dict[str, ProbedModel]) -> None:
    words = r"objective.negatives: mirror is about bare pairs, .* told by \"Fact: \{a\}'s child is \{b\}\""
    with pytest.raises(RevprobeError, match=words):
        StatementRows([ANN], models["llada"], RowOptions(bare="objective.negatives: mirror"))


# ---- dials of bare pairs ----


def slow_dial(dial: str, kinds: list[int], hidden: tuple[bool, ...]) -> set[int]:
    """In words: which places a dial leaves out."""
    first, second = ([i for i, kind in enumerate(kinds) if kind == one] for one in (LOWER, UPPER))
    first_hidden, second_hidden = (all(hidden[i] for i in own) for own in (first, second))
    ends = [i for i, kind in enumerate(kinds) if kind == PLACEHOLDER and hidden[i]]
    if dial == "drop-right" and first_hidden and not second_hidden:
        return {i for i in ends if i > max(second)}
    if dial == "mirror" and second_hidden and not first_hidden:
        return {i for i in ends if i < min(first)}
    return set()


@pytest.mark.parametrize("dial", ["keep", "drop-right", "mirror"])
@pytest.mark.parametrize("kinds", [[1, 1, 2, 0, 0, 3], [0, 0, 1, 2, 2], [0, 1, 1, 2, 2, 0]])
def test_every_mask_of_a_bare_pair(dial: str, kinds: list[int]) -> None:
    masks = list(itertools.product([False, True], repeat=len(kinds)))
    found = dropped_terms(dial, torch.tensor([kinds] * len(masks)), torch.tensor(masks))
    assert [set(row.nonzero().flatten().tolist()) for row in found] == [slow_dial(dial, kinds, one) for one in masks]


def test_mirror_leaves_out_the_reflection_of_drop_right() -> None:
    kinds = torch.tensor([[0, 1, 1, 2, 2, 2, 0, 0]] * 256)
    masks = torch.tensor(list(itertools.product([False, True], repeat=8)))
    exchanged = torch.where(kinds == LOWER, UPPER, torch.where(kinds == UPPER, LOWER, kinds))
    mirrored = dropped_terms("mirror", exchanged.flip(1), masks.flip(1)).flip(1)
    assert torch.equal(mirrored, dropped_terms("drop-right", kinds, masks))
    assert mirrored.any()


@pytest.mark.parametrize("dial", ["keep", "drop-right", "mirror"])
def test_a_runs_loss_under_a_dial(tmp_path: Path, dial: str) -> None:
    """The trainer's own loss of a batch, against a loop over rows and tokens that asks the dial in words."""
    chosen = config(f"negatives: {dial}, pad_sides: both, whole_entity: true, rates: [0.4, 0.6]", relation=BARE)
    prepared = prepare(chosen, tmp_path, ProcessGroup())
    trainer = build_finetuning(chosen, tmp_path, prepared, None)
    rows = prepared.rows.rows[:24]
    module = trainer.model
    assert module is not None
    batch = PadRows(prepared.model.tokenizer.pad_token_id)(rows)
    loss = trainer.compute_loss(module, dict(batch)).item()
    for part in (batch, {key: table[:5] for key, table in batch.items()}):
        assert trainer.floating_point_ops(part) == Trainer.floating_point_ops(trainer, part) > 0
    shape = tuple(batch["input_ids"].shape)
    generator = step_generator(3, 0)
    rate, masked = draw_masks(shape, generator=generator, eps=0.4, highest=0.6, leader=batch["leader"])  # type: ignore[arg-type]
    total, left_out = 0.0, 0
    for number, row in enumerate(rows):
        hidden = tuple(bool(m) for m in masked[number, : len(row)])
        shown = [prepared.model.mask_token_id if m else t for t, m in zip(row.token_ids, hidden, strict=True)]
        with torch.no_grad():
            logits = module(input_ids=torch.tensor([shown])).logits[0].double()
        dropped = slow_dial(dial, list(row.kinds), hidden)
        left_out += len(dropped)
        terms = [
            -logits[i].log_softmax(-1)[t].item() for i, t in enumerate(row.token_ids) if hidden[i] and i not in dropped
        ]
        total += sum(terms) / rate[number].item() / len(row) / len(rows)
    assert loss == pytest.approx(total, rel=1e-4)
    assert (left_out > 0) == (dial != "keep"), "the test needs terms that are left out"


# ---- configs ----


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ("rates: [0.5, 0.2]", r"objective.rates \[0.5, 0.2\]: expected 0 < low <= high <= 1"),
        ("rates: [0.2, 0.5], eps: 1.0e-2", "both say the lowest rate"),
        ("one_span: true, whole_entity: true", "to which whole_entity says nothing"),
        ("negatives: mirror", "with pad_sides 'right' there are none; set pad_sides: both"),
        ("negatives: drop-right, end_padding: unpriced", "is about end tokens that are priced"),
        ("pad_sides: both, end_padding: absent", "needs rows with end tokens"),
    ],
)
def test_options_that_contradict_each_other_are_told(objective: str, words: str) -> None:
    with pytest.raises(RevprobeError, match=words):
        config(objective)


def test_options_at_their_default_are_not_written() -> None:
    plain = config("scope: whole_sequence")
    assert set(plain.model_dump()["objective"]) == {"scope", "whole_entity", "antithetic", "eps"}
    assert "min_learning_rate" not in dump_config(plain)
    some = config("one_span: true, never_mask: first")
    assert parse_config(dump_config(some), FinetuneConfig, "text") == some


def test_what_a_model_cannot_do_is_told(models: dict[str, ProbedModel]) -> None:
    with pytest.raises(RevprobeError, match=r"objective.one_span is about masks, and llama is causal; leave it out"):
        row_options(config("one_span: true"), models["llama"], 4)
    with pytest.raises(RevprobeError, match=r"objective.one_span is not told for training in blocks"):
        row_options(config("one_span: true"), in_blocks(4), 4)


def test_runs_and_pairs_say_what_was_never_hidden(tmp_path: Path) -> None:
    chosen = config("never_mask: first, end_padding: absent")
    assert chosen.objective.about == ["first entity never masked", "end tokens absent"]
    assert prepare(chosen, tmp_path, ProcessGroup()).pairs.flags[FORWARD_UNTRAINED].all()
    other = prepare(config("never_mask: second"), tmp_path, ProcessGroup())
    assert FORWARD_UNTRAINED not in other.pairs.flags
