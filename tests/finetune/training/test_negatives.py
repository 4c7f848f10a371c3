"""The dials of negative evidence: which terms each leaves out, and that nothing else moves."""

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from long_cases import rest_long
from torch import Tensor

from revprobe.finetune.config.one_layer import DIALS, RunConfig
from revprobe.finetune.runs.forks import take_prefix
from revprobe.finetune.runs.one_layer import OneLayerRun, build_trainer, train
from revprobe.finetune.runs.open import open_run
from revprobe.finetune.runs.run import claim_run
from revprobe.finetune.training import objectives
from revprobe.finetune.training.negatives import LOWER, PLACEHOLDER, UPPER, Negatives, dropped_terms, letter_kinds
from revprobe.finetune.training.step_log import read_table
from revprobe.finetune.training.trainer import ForwardOnlyTrainer
from revprobe.models.one_layer import letter_tokenizer

# Length 4, written out: text, hidden positions, and for each dial the positions left out.
BY_HAND: list[tuple[str, str, dict[str, set[int]]]] = [
    ("a0A0", "m..m", {"drop-right": {3}, "drop-both": {3}}),
    ("a0A0", "mm.m", {"drop-right": {3}, "drop-left": {1}, "drop-both": {1, 3}}),
    ("a0A0", "mmmm", {}),  # the evidence is hidden as well
    ("a0A0", ".m.m", {}),  # the target is visible
    ("aA00", "m.mm", {"drop-right": {2, 3}, "drop-both": {2, 3}}),
    ("00aA", "mmm.", {"drop-left": {0, 1}, "drop-both": {0, 1}}),
    ("0a0A", "m.mm", {"mirror": {0}}),
    ("0aA0", "m.mm", {"mirror": {0}}),
    ("a0A0", ".mmm", {}),  # nothing stands left of the lowercase letter
]
PLAIN = ("keep", "drop-right", "drop-left", "drop-both", "mirror")


def kinds_of(text: str) -> Tensor:
    return torch.tensor([[PLACEHOLDER if c == "0" else LOWER if c.islower() else UPPER for c in text]])


@pytest.mark.parametrize(("text", "hidden", "expected"), BY_HAND)
def test_the_terms_left_out_are_those_written_down(text: str, hidden: str, expected: dict[str, set[int]]) -> None:
    is_masked = torch.tensor([[c == "m" for c in hidden]])
    for dial in PLAIN:
        found = dropped_terms(dial, kinds_of(text), is_masked)[0].nonzero().flatten().tolist()
        assert set(found) == expected.get(dial, set()), dial


def slow(dial: str, text: str, hidden: tuple[bool, ...]) -> set[int]:
    """The same, in words: a loop over positions."""
    low, high = (next(i for i, c in enumerate(text) if test(c)) for test in (str.islower, str.isupper))
    left_out = set()
    for place, character in enumerate(text):
        if character != "0" or not hidden[place]:
            continue
        negative, mirrored = hidden[low] and not hidden[high], hidden[high] and not hidden[low]
        right, left = negative and place > high, negative and place < high
        if (dial in ("drop-right", "drop-both") and right) or (dial in ("drop-left", "drop-both") and left):
            left_out.add(place)
        if dial == "mirror" and mirrored and place < low:
            left_out.add(place)
    return left_out


def every_row(length: int) -> list[tuple[str, tuple[bool, ...]]]:
    """Every placement under every mask."""
    texts = []
    for low, high in itertools.combinations(range(length), 2):
        texts.append("".join({low: "a", high: "A"}.get(i, "0") for i in range(length)))
    return list(itertools.product(texts, itertools.product([False, True], repeat=length)))


@pytest.mark.parametrize("dial", PLAIN)
def test_every_row_of_length_5(dial: str) -> None:
    rows = every_row(5)
    kinds = torch.cat([kinds_of(text) for text, _ in rows])
    found = dropped_terms(dial, kinds, torch.tensor([hidden for _, hidden in rows]))
    assert [set(row.nonzero().flatten().tolist()) for row in found] == [slow(dial, *row) for row in rows]
    assert bool(found.any()) == (dial != "keep")


def test_reflection_and_exchange_of_cases_map_mirror_onto_drop_right() -> None:
    rows = every_row(6)
    kinds = torch.cat([kinds_of(text) for text, _ in rows])
    is_masked = torch.tensor([hidden for _, hidden in rows])
    exchanged = torch.where(kinds == LOWER, UPPER, torch.where(kinds == UPPER, LOWER, kinds))
    mirrored = dropped_terms("mirror", exchanged.flip(1), is_masked.flip(1)).flip(1)
    assert torch.equal(mirrored, dropped_terms("drop-right", kinds, is_masked))


@pytest.mark.parametrize(("dial", "side"), [("drop-right-matched", "drop-right"), ("drop-left-matched", "drop-left")])
def test_matched_dials_pick_as_many_of_a_side_as_the_other_has(dial: str, side: str) -> None:
    rows = every_row(7) * 3
    kinds = torch.cat([kinds_of(text) for text, _ in rows])
    is_masked = torch.tensor([hidden for _, hidden in rows])
    left, right = (dropped_terms(one, kinds, is_masked) for one in ("drop-left", "drop-right"))
    count = torch.minimum(left.sum(1), right.sum(1))
    picked = [dropped_terms(dial, kinds, is_masked, torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    for found in picked:
        assert torch.equal(found.sum(1), count) and not bool((found & ~dropped_terms(side, kinds, is_masked)).any())
    assert not torch.equal(*picked)
    # Each term of a side is as likely as the others of its row.
    choices = dropped_terms(side, kinds, is_masked)
    wanted = (count / choices.sum(1).clamp(min=1))[:, None] * choices
    draws = [dropped_terms(dial, kinds, is_masked, torch.Generator().manual_seed(s)).float() for s in range(400)]
    assert (torch.stack(draws).mean(0) - wanted).abs().max() < 0.12


def test_a_causal_dial_leaves_out_what_follows_the_second_letter() -> None:
    everything = torch.ones(1, 5, dtype=torch.bool)
    assert dropped_terms("drop-after", kinds_of("0aA00"), everything)[0].tolist() == [False] * 3 + [True] * 2


def test_kinds_are_those_of_the_tokenizer() -> None:
    tokenizer = letter_tokenizer(5)
    kinds = letter_kinds(5)
    assert len(kinds) == len(tokenizer)
    assert torch.equal(kinds[torch.tensor(tokenizer("0bB0")["input_ids"])][None], kinds_of("0bB0"))


def test_a_switch_takes_effect_from_its_step_on() -> None:
    negatives = Negatives(5, "keep", switch_step=3, switch_dial="mirror")
    assert [negatives.dial_at(step) for step in range(5)] == ["keep"] * 3 + ["mirror"] * 2
    assert not negatives.always_keeps and Negatives(5).always_keeps


# ---- in training ----


def config(name: str, **training: Any) -> RunConfig:
    keys = {"steps": 6, "batch_size": 16, "warmup_steps": 2, "device": "cpu"} | training
    sizes = {"d_model": 16, "dropout": 0.3}
    relation = {"length": 5, "alphabet": 5}
    return RunConfig(name=name, relation=relation, model=sizes, training=keys, snapshots={"every": 6})


def draws(folder: Path, dial: str, monkeypatch: pytest.MonkeyPatch, **training: Any) -> tuple[list[Any], Any]:
    """What a run draws at each step: rows, masks, divisors, and torch's own state, of which dropout draws."""
    seen: list[Any] = []
    plain = objectives.price_masks

    def price(logits: Tensor, ids: Tensor, is_masked: Tensor, rate: Tensor, *others: Any) -> Tensor:
        seen.append((ids.clone(), is_masked.clone(), rate.clone(), torch.get_rng_state(), others[0]))
        return plain(logits, ids, is_masked, rate, *others)

    asked = config(dial, negatives=dial, **training)
    run = open_or_make(folder / dial, asked)
    trainer, *_ = build_trainer(run, None)
    with monkeypatch.context() as patch:
        patch.setattr(objectives, "price_masks", price)
        trainer.train()
    return seen, trainer


def open_or_make(path: Path, asked: RunConfig) -> OneLayerRun:
    path.mkdir(parents=True)
    run = OneLayerRun(path)
    claim_run(run, asked)
    return run


@pytest.mark.parametrize("dial", [dial for dial in DIALS["masked"] if dial != "keep"])
def test_rows_masks_rates_divisors_and_dropout_are_those_of_keep(
    dial: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, _ = draws(tmp_path, "keep", monkeypatch)
    other, trainer = draws(tmp_path, dial, monkeypatch)
    assert len(kept) == len(other) == 6
    for one, two in zip(kept, other, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    log = trainer.step_log.rows
    assert sum(row["dropped"] for row in log) > 0 and all(row["dropped_weight"] >= row["dropped"] for row in log)


@pytest.mark.parametrize("weight", [0.0, 0.25])
def test_the_loss_is_keeps_less_the_weighted_terms(weight: float, tmp_path: Path) -> None:
    """Against a loop over rows and tokens, with the run's own first draw."""
    run = open_or_make(tmp_path / "run", config("run", negatives="drop-right", negative_weight=weight, loss="sequence"))
    trainer, *_ = build_trainer(run, None)
    assert isinstance(trainer, ForwardOnlyTrainer) and trainer.model is not None
    model = trainer.model.eval()
    ids = next(iter(trainer.get_train_dataloader()))["input_ids"]
    trainer._place, trainer._micro_step = (0, True), -1
    model.training = True  # which generator draws; no module drops anything
    found = trainer.compute_loss(model, {"input_ids": ids})
    rate, is_masked = objectives.draw_masks((16, 5), generator=objectives.step_generator(0, 0))
    with torch.no_grad():
        logits = model(ids.masked_fill(is_masked, trainer.mask_token_id)).logits.log_softmax(-1)
    texts = ["".join(letter_tokenizer(5).convert_ids_to_tokens(row.tolist())) for row in ids]
    total = 0.0
    for row, text in enumerate(texts):
        left_out = slow("drop-right", text, tuple(is_masked[row].tolist()))
        for place in is_masked[row].nonzero().flatten().tolist():
            term = -float(logits[row, place, ids[row, place]]) / float(rate[row])
            total += term * (weight if place in left_out else 1.0)
    assert float(found) == pytest.approx(total / 16, rel=1e-5)


def test_a_switch_goes_on_from_the_run_beside_it_to_the_same_bits(tmp_path: Path) -> None:
    switched = {"steps": 9, "switch": {"step": 6, "negatives": "drop-right"}}
    beside, alone = tmp_path / "beside", tmp_path / "alone"
    train(config("parent"), beside / "parent")
    for folder in (beside, alone):
        asked = config("then", **switched)
        train(asked, folder / "then")
    one, two = (open_run(folder / "then") for folder in (beside, alone))
    assert one.finished and one.steps == two.steps == [0, 6, 9]
    weights = [run.load(9, kind).module.state_dict() for run in (one, two) for kind in ("raw", "ema")]
    for first, second in ((0, 2), (1, 3)):
        assert all(torch.equal(weights[first][key], weights[second][key]) for key in weights[0])
    for read in ("answers", "steps_log"):
        assert getattr(one, read)().equals(getattr(two, read)())
    assert one.steps_log()["dropped"].tolist()[:6] == [0] * 6 and one.steps_log()["dropped"].sum() > 0
    # The first steps were not taken again.
    taken, own = (path / "checkpoints/step-000006/SHA256SUMS" for path in (beside / "then", beside / "parent"))
    assert taken.read_bytes() == own.read_bytes()


def test_a_copy_that_was_cut_off_is_made_again_and_ends_at_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the first checkpoint copied and the one to go on from."""
    asked = config("then", steps=9, switch={"step": 6, "negatives": "drop-right"})
    train(config("parent"), tmp_path / "parent")
    train(asked, tmp_path / "whole")
    copied, plain = [], shutil.copytree

    def cut_off(source: Path, target: Path, *others: Any, **options: Any) -> Any:
        if Path(target).suffix == ".part":  # not the folders inside
            copied.append(source)
        if len(copied) == 4:  # readings and checkpoint of step 0, readings of step 6
            raise KeyboardInterrupt
        return plain(source, target, *others, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "copytree", cut_off)
        train(asked, tmp_path / "then")
    assert not open_run(tmp_path / "then").finished
    train(asked, tmp_path / "then")
    one, two = (open_run(tmp_path / name) for name in ("then", "whole"))
    assert one.finished and not list((tmp_path / "then").rglob("*.part"))
    weights = [run.load(9, "raw").module.state_dict() for run in (one, two)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert one.answers().equals(two.answers()) and one.steps_log().equals(two.steps_log())


@pytest.mark.parametrize(
    "changed", rest_long([{"learning_rate": 2e-3}, {"seed": 1}, {"negatives": "mirror"}, {"schedule": "cosine"}])
)
def test_a_run_that_is_another_before_the_switch_gives_nothing(changed: dict[str, Any], tmp_path: Path) -> None:
    train(config("parent"), tmp_path / "parent")
    asked = config("then", **({"steps": 9, "switch": {"step": 6, "negatives": "drop-right"}} | changed))
    (tmp_path / "then").mkdir()
    assert take_prefix(tmp_path / "then", asked) is None and not list((tmp_path / "then").iterdir())


@pytest.mark.parametrize(
    ("of_parent", "of_child", "goes_on"),
    rest_long(
        [
            ({}, {"answers": {"every": 3}}, False),
            ({"answers": {"every": 3}}, {"answers": {"every": 3}}, True),
            ({"answers": {"every": 3}}, {"answers": {"every": 2}}, False),
            ({"answers": {"every": 1}}, {"answers": {"every": 3}}, True),
            ({"answers": {"every": 3}}, {}, True),
        ],
        2,
    ),
)
def test_a_run_without_the_answers_that_are_asked_for_gives_nothing(
    of_parent: dict[str, Any], of_child: dict[str, Any], goes_on: bool, tmp_path: Path
) -> None:
    """Answers of steps before the switch are asked of the run itself then; after it they could not be had."""
    plain = config("parent"), config("then", steps=9, switch={"step": 6, "negatives": "drop-right"})
    parent, child = (
        RunConfig.model_validate(made.model_dump() | {"snapshots": {"every": 6} | snapshots})
        for made, snapshots in zip(plain, (of_parent, of_child), strict=True)
    )
    train(parent, tmp_path / "parent", listener=False)
    (tmp_path / "then").mkdir()
    taken = take_prefix(tmp_path / "then", child)
    assert (taken is not None) == goes_on
    if goes_on and child.answer_steps:
        kept = read_table(tmp_path / "then" / "answers.parquet")["step"]
        assert set(kept) == {step for step in child.answer_steps if step <= 6}


def test_a_switch_between_snapshots_takes_its_steps_itself(tmp_path: Path) -> None:
    """A checkpoint of an earlier step has no optimizer state, and one of a later step is past the switch."""
    train(config("parent"), tmp_path / "parent")
    asked = config("then", steps=9, switch={"step": 4, "negatives": "drop-right"})
    assert take_prefix(tmp_path / "then", asked) is None
    run = train(asked, tmp_path / "then")
    assert run.finished and run.steps_log()["dropped"].tolist()[:4] == [0] * 4
