"""The objective taken apart: against plain loops over all masks, plain autograd, the paper's algebra and real steps."""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import integrate
from torch import Tensor, nn

import revprobe as rp
from revprobe.finetune.analysis import class_gradients, masked_samples, objective_terms
from revprobe.finetune.analysis.class_gradients import dropped_share
from revprobe.finetune.analysis.mask_sets import MaskLaw
from revprobe.finetune.training.negatives import dropped_terms, letter_kinds
from revprobe.finetune.training.objectives import draw_masks
from revprobe.probes.statistics.estimators import NO_GRADIENT
from revprobe.probes.storage import control_partners
from tiny import AttentionOnly, drawn

ALPHABET, PLACEHOLDER = 3, 0
MASK, VOCAB = 7, 10  # of letter_tokenizer(3): 0, a b c, A B C, mask, begin, padding
Key = tuple[str, str, str, int, bool]


def letters_model(module: nn.Module | None = None, **options: object) -> rp.ProbedModel:
    """Two layers in float64, over three letters."""
    tokens = {"vocab_size": VOCAB, "mask_token_id": MASK, "bos_token_id": 8, "pad_token_id": 9}
    sizes = {"d_model": 16, "n_layers": 2, "max_length": 8} | options
    if module is None:
        module = drawn(lambda: rp.RaddForMaskedLM(rp.RaddConfig(**tokens, **sizes)), scale=0.3, dtype=torch.float64)
    about = {"objective": "masked", "mask_token_id": MASK, "logit_shift": 0}
    # The paper's tables are read at few tokens, so there is little for the check of a module to find.
    return rp.ProbedModel(module, rp.letter_tokenizer(ALPHABET), check=not isinstance(module, StoredMatrix), **about)


def test_the_sum_over_classes_is_that_of_their_stack_in_float64() -> None:
    """Without the stack: one gradient more is held, in float64."""
    found = class_gradients.ClassGradients(torch.zeros(7))
    factors = np.array([1.0, 0.0, 0.1, 1 / 3])
    for masks in range(4):
        found.place(class_gradients.TermClass("target", "hidden", "visible", masks, False))
        found.gradients[masks] += torch.randn(7, generator=torch.Generator().manual_seed(masks))
    expected = sum(
        factor * gradient.numpy().astype(np.float64) for factor, gradient in zip(factors, found.gradients, strict=True)
    )
    held = [gradient.clone() for gradient in found.gradients]
    total = found.weighted_sum(factors)
    assert total.dtype == torch.float64
    np.testing.assert_allclose(total.numpy(), expected, rtol=1e-14)
    assert all(map(torch.equal, found.gradients, held)), "they stay what they are"


def test_without_a_run_no_sum_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step's coming update alone needs it."""
    monkeypatch.setattr(class_gradients.ClassGradients, "weighted_sum", None)
    model = letters_model()
    assert len(rp.objective_terms(model, rp.letters(4, ALPHABET)).frame)


# --- the slow way ---------------------------------------------------------------------------------------------------


def rows(length: int) -> Iterator[tuple[list[int], int, int]]:
    """Ids, and the positions of the two letters."""
    for letter in range(ALPHABET):
        for low, high in itertools.combinations(range(length), 2):
            ids = [PLACEHOLDER] * length
            ids[low], ids[high] = 1 + letter, 1 + ALPHABET + letter
            yield ids, low, high


def rate_weight(length: int, hidden: int, eps: float = 1e-3) -> float:
    """E[t^m (1 - t)^(L - m) / t] over t ~ U(eps, 1), by quadrature."""
    value = integrate.quad(lambda t: t**hidden * (1 - t) ** (length - hidden) / t, eps, 1, epsabs=1e-14)[0]
    return float(value / (1 - eps))


def plain_terms(model: rp.ProbedModel, length: int, dial: Callable[..., bool]) -> dict[Key, Tensor]:
    """The loss of every class, with its graph, from one run of the model for every row and every set of masks."""
    found: dict[Key, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
    texts = list(rows(length))
    for ids, low, high in texts:
        for size in range(1, length + 1):
            for hidden in itertools.combinations(range(length), size):
                seen = torch.tensor([[MASK if i in hidden else token for i, token in enumerate(ids)]])
                log_p = model.logits(seen)[0].log_softmax(-1)
                states = ["hidden" if i in hidden else "visible" for i in (low, high)]
                for i in hidden:
                    part = {low: "target", high: "evidence"}.get(i, "left" if i < high else "right")
                    key = (part, *states, size, dial(part, i, low, states))
                    found[key] = found[key] - rate_weight(length, size) * log_p[i, ids[i]] / length / len(texts)
    return found


def reverse_losses(
    model: rp.ProbedModel, length: int, letter: int, evidence: int | None = None
) -> tuple[Tensor, Tensor]:
    """The mean reverse loss of one letter (under another's evidence), and its letters-only part."""
    whole, among = [], []
    for left, right in itertools.combinations(range(length), 2):
        ids = [PLACEHOLDER] * length
        ids[left], ids[right] = 1 + ALPHABET + (letter if evidence is None else evidence), MASK
        logits = model.logits(torch.tensor([ids]))[0, right]
        whole.append(-logits.log_softmax(-1)[1 + letter])
        among.append(-logits[1 : 1 + ALPHABET].log_softmax(-1)[letter])
    return torch.stack(whole).mean(), torch.stack(among).mean()


def gradient(model: rp.ProbedModel, loss: Tensor) -> Tensor:
    parameters = list(model.module.parameters())
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in zip(found, parameters, strict=True)]
    )


def keep(*_: object) -> bool:
    return False


def drop_right(part: str, place: int, low: int, states: list[str]) -> bool:
    return part == "right" and states == ["hidden", "visible"]


def mirror(part: str, place: int, low: int, states: list[str]) -> bool:
    return part == "left" and place < low and states == ["visible", "hidden"]


# --- what holds -----------------------------------------------------------------------------------------------------


def held_against_loops(model: rp.ProbedModel, length: int, dial: str, is_dropped: Callable[..., bool]) -> None:
    """Every class of a reading is that of the slow way: loss, norm, products with the reverse loss and its parts."""
    reading = rp.objective_terms(model, rp.letters(length, ALPHABET), dial=dial)
    table = rp.objective_classes(reading).set_index(["priced", "target", "evidence", "masks", "dropped"])
    plain = plain_terms(model, length, is_dropped)
    assert set(table.index) == set(plain), "other classes than by hand"
    partner = control_partners(rp.letters(length, ALPHABET).pairs(model, placements="mirror"), 0)
    facts = rp.letters(length, ALPHABET).pairs(model, placements="mirror").facts.astype(str)
    other = {fact: facts[partner[list(facts).index(fact)]] for fact in "abc"}
    losses = [reverse_losses(model, length, letter) for letter in range(ALPHABET)]
    elsewhere = [reverse_losses(model, length, n, "abc".index(other["abc"[n]]))[0] for n in range(ALPHABET)]
    whole, among = (gradient(model, torch.stack(part).mean()) for part in zip(*losses, strict=True))
    control = gradient(model, torch.stack(elsewhere).mean())
    sums = {"loss": 0.0, "pressure": 0.0}
    for key, loss in plain.items():
        own = gradient(model, loss)
        expected = {"loss": loss.item(), "pressure": (own @ whole).item(), "letters": (own @ among).item()}
        expected |= {"margin": (own @ (whole - among)).item(), "control": (own @ control).item()}
        expected["cosine"] = (own @ whole / own.norm() / whole.norm()).item()
        for name, value in expected.items():
            assert table.loc[key, name] == pytest.approx(value, rel=1e-6, abs=1e-12), f"{name} of {key}"
        for name in sums:
            sums[name] += 0.0 if key[-1] else expected[name]
    # The sum rule, whose right side is one gradient of the whole objective.
    trained = sum(loss for key, loss in plain.items() if not key[-1])
    assert sums["pressure"] == pytest.approx((gradient(model, trained) @ whole).item(), rel=1e-6)
    assert reading.value == pytest.approx(sums["pressure"], rel=1e-6)
    assert reading.meta["objective_loss"] == pytest.approx(sums["loss"], rel=1e-6)


@pytest.mark.parametrize(("dial", "by_hand"), [("keep", keep), ("drop-right", drop_right), ("mirror", mirror)])
def test_every_class_is_that_of_plain_loops_and_plain_autograd(dial: str, by_hand: Callable[..., bool]) -> None:
    """Two layers, float64, length 4 and under each dial: all rows, all sets of masks, one run of the model each."""
    held_against_loops(letters_model(), 4, dial, by_hand)


def test_a_planted_swap_of_labels_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above must be able to fail: left and right exchanged turns it red."""
    swapped = ("target", "evidence", "right", "left", "end", "other")
    monkeypatch.setattr(class_gradients, "PARTS", swapped)
    with pytest.raises(AssertionError):
        held_against_loops(letters_model(), 3, "keep", keep)


@pytest.mark.parametrize("rates", ["independent", "t", "lambda", "k"])
def test_the_weight_of_a_set_is_what_drawing_gives(rates: str) -> None:
    """Closed forms against draws: the mean 1/t over rows whose hidden tokens are just those."""
    random, count, length = np.random.default_rng(0), 200_000, 4
    rate = 1e-3 + (1 - 1e-3) * random.random(count)
    hidden = random.random((count, length)) < rate[:, None]
    if rates == "independent":
        rate, hidden = (x.numpy() for x in draw_masks((count, length), generator=torch.Generator().manual_seed(0)))
    elif rates == "t":
        hidden = random.random((count, length)) < (1 - 1e-3) * rate[:, None]
    elif rates == "lambda":
        rate = 1 - random.random(count)
        hidden = random.random((count, length)) < rate[:, None]
    elif rates == "k":
        rate = random.integers(1, length + 1, count) / length
        hidden = random.random((count, length)).argsort(1).argsort(1) < rate[:, None] * length
    for size in range(1, length + 1):
        these = hidden[:, :size].all(1) & ~hidden[:, size:].any(1)
        values = np.where(these, 1 / rate, 0.0)
        error = values.std() / count**0.5
        assert abs(values.mean() - MaskLaw(rates).weight(length, size)) < 4 * error, f"{size} hidden"


def test_lambda_and_k_weigh_alike_and_t_loses_what_its_eps_says() -> None:
    for length, size in itertools.product((3, 4, 10), (1, 2, 3)):
        exact = 1 / (size * math.comb(length, size))
        assert (
            MaskLaw("lambda").weight(length, size)
            == MaskLaw("k").weight(length, size)
            == pytest.approx(exact, rel=1e-6)
        )
    lost = 1 - MaskLaw("t").weight(10, 1) * 10
    assert lost == pytest.approx(9e-3, rel=0.01), "sets of one mask lose about (L - 1) x 1e-3"
    assert MaskLaw(masks="single").weight(4, 1) == 1.0 and MaskLaw(masks="single").weight(4, 2) == 0.0
    assert MaskLaw(masks=2).weight(4, 2) == pytest.approx(4 / 2 / 6)


def test_drawn_sets_agree_with_enumerated_ones_within_their_stated_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Length 6, once enumerated and once drawn: no group is off by more than four of its standard errors."""
    model, relation = letters_model(), rp.letters(6, ALPHABET)
    by = ["priced", "target", "evidence"]
    drawn = rp.objective_terms(model, relation, draws=600)
    assert not drawn.meta["enumerated"] and drawn.meta["sampling_error"] > 0
    monkeypatch.setattr(masked_samples, "ENUMERATED", 6)
    exact = rp.objective_terms(model, relation)
    assert exact.meta["enumerated"] and exact.meta["sampling_error"] == 0.0
    assert abs(drawn.value - exact.value) < 4 * drawn.meta["sampling_error"]
    tables = [rp.objective_classes(one, by).set_index(by) for one in (drawn, exact)]
    off = (tables[0]["pressure"] - tables[1]["pressure"]).abs() / tables[0]["sampling_error"].replace(0.0, np.nan)
    assert off.max() < 4 and off.notna().sum() > 8, off
    exactly = tables[0]["sampling_error"] == 0
    assert np.allclose(tables[0]["pressure"][exactly], tables[1]["pressure"][exactly], rtol=1e-6)
    assert np.allclose(tables[0]["cosine"], tables[1]["cosine"], atol=0.1)


def test_a_small_step_on_one_class_changes_the_reverse_loss_as_foretold() -> None:
    """-lr times the pressure, against a step that is really taken on one class alone, at two sizes."""
    model, relation = letters_model(), rp.letters(4, ALPHABET)
    table = rp.objective_classes(rp.objective_terms(model, relation), ["priced", "target", "evidence"])
    table = table.set_index(["priced", "target", "evidence"])
    plain = plain_terms(model, 4, keep)

    def reverse() -> float:
        with torch.no_grad():
            return float(torch.stack([reverse_losses(model, 4, n)[0] for n in range(ALPHABET)]).mean())

    parameters, steps = list(model.module.parameters()), {}
    for group in (("target", "hidden", "visible"), ("right", "hidden", "visible")):
        loss = sum(one for key, one in plain.items() if key[:3] == group)
        steps[group] = torch.autograd.grad(loss, parameters, retain_graph=True)
    before = reverse()
    for group, own in steps.items():
        for size in (1e-4, 1e-5):
            with torch.no_grad():
                for p, g in zip(parameters, own, strict=True):
                    p.sub_(size * g)
                change = reverse() - before
                for p, g in zip(parameters, own, strict=True):
                    p.add_(size * g)
            assert change == pytest.approx(-size * table.loc[group, "pressure"], rel=300 * size), f"{group} at {size}"


class StoredMatrix(nn.Module):
    """z_i = a S[:, u]: the evidence alone is attended to, more from its left than from its right; S is all there is."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, VOCAB)
        torch.manual_seed(0)
        self.embed.weight.data = 0.5 * torch.randn(VOCAB, VOCAB, dtype=torch.float64)

    def forward(self, input_ids: Tensor) -> Tensor:
        place = torch.arange(input_ids.shape[1])
        upper = (input_ids > ALPHABET) & (input_ids <= 2 * ALPHABET)
        weight = (0.4 + 0.3 * (place[:, None] < place[None]).double()) * upper[:, None]
        return weight @ self.embed(input_ids)


def test_the_shared_column_presses_the_right_way_by_as_much_as_the_theorem_says() -> None:
    """Prop. 4.1 and Thm 4.6: gradients of S[:, u] are a_u (p - 1_v), so a target term with its evidence visible and
    the reverse loss of that fact have the product a_f a_r <p_f - 1_v, p_r - 1_v>, which is positive."""
    model = letters_model(StoredMatrix())
    length, weights = 3, model.module.embed.weight
    reading = rp.objective_terms(model, rp.letters(length, ALPHABET))
    one_mask = reading.frame[(reading.frame["priced"] == "target") & (reading.frame["evidence"] == "visible")]
    one_mask = one_mask[one_mask["masks"] == 1].set_index("fact")["inner"]
    for letter, name in enumerate("abc"):
        column = weights[1 + ALPHABET + letter].detach()  # S[:, u], stored by token
        own = torch.nn.functional.one_hot(torch.tensor(1 + letter), VOCAB)
        forward, reverse = ((share * column).softmax(0) - own for share in (0.7, 0.4))
        expected = rate_weight(length, 1) / length / ALPHABET * 0.7 * 0.4 * float(forward @ reverse)
        assert one_mask[name] == pytest.approx(expected, rel=1e-9)
        assert one_mask[name] > 0
        v, others = 1 + letter, [w for w in range(VOCAB) if w != 1 + letter]
        p = [(share * column).softmax(0) for share in (0.7, 0.4)]
        identity = (1 - p[0][v]) * (1 - p[1][v]) + (p[0][others] * p[1][others]).sum()
        assert float(forward @ reverse) == pytest.approx(float(identity), rel=1e-9)


def test_where_order_is_not_seen_target_terms_are_the_reverse_loss_itself() -> None:
    """Without positions the forward and the reverse query have one score (correlation 1) and one answer: the target's
    terms with all else visible are a multiple of the reverse loss, so their cosine is 1."""
    torch.manual_seed(0)
    model = letters_model(AttentionOnly().double())
    table = rp.objective_classes(rp.objective_terms(model, rp.letters(3, 3)))
    chosen = table[(table["priced"] == "target") & (table["evidence"] == "visible") & (table["masks"] == 1)]
    assert chosen["cosine"].item() == pytest.approx(1.0, abs=1e-9)
    assert chosen["pressure_low"].item() > 0


class BlindRight(nn.Module):
    """Nothing is learned from tokens right of an uppercase letter where its lowercase partner is seen too."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = module

    def forward(self, input_ids: Tensor) -> Tensor:
        logits = self.inner(input_ids=input_ids).logits
        upper = (input_ids > ALPHABET) & (input_ids <= 2 * ALPHABET)
        lower = ((input_ids > 0) & (input_ids <= ALPHABET)).any(1, keepdim=True)
        right = (upper.int().cumsum(1) > 0) & lower
        return torch.where(right[..., None], logits.detach(), logits)


def test_a_planted_class_without_gradient_is_zero_and_has_no_cosine() -> None:
    model = letters_model(BlindRight(letters_model().module))
    table = rp.objective_classes(rp.objective_terms(model, rp.letters(4, ALPHABET)))
    planted = table[(table["priced"] == "right") & (table["evidence"] == "visible") & (table["target"] == "visible")]
    assert len(planted) == 2 and (planted["loss"] > 0).all()
    assert (planted["pressure"] == 0).all() and planted["cosine"].isna().all()
    assert planted["reason"].str.contains(NO_GRADIENT).all()
    assert table["cosine"].notna().sum() == len(table) - len(planted)


def test_matched_dials_drop_each_term_as_often_as_they_pick_it() -> None:
    """The share of a term in the dropped class is the mean over many picks."""
    ids = torch.tensor([[0, 1, 0, 4, 0, 0], [1, 0, 0, 0, 4, 0]])
    kinds, hidden = letter_kinds(ALPHABET)[ids], torch.ones(2, 6, dtype=torch.bool) & (ids != 4)
    generator = torch.Generator().manual_seed(0)
    for dial in ("drop-left-matched", "drop-right-matched"):
        picks = torch.stack([dropped_terms(dial, kinds, hidden, generator) for _ in range(2000)]).double().mean(0)
        assert torch.allclose(dropped_share(dial, kinds, hidden), picks, atol=0.05)


def test_the_reading_is_one_like_the_others(tmp_path: object) -> None:
    """It is saved and loaded, drawn, and leaves the model as it was."""
    model = letters_model()
    before = {name: p.clone() for name, p in model.module.named_parameters()}
    reading = rp.objective_terms(model, rp.letters(4, ALPHABET), dial="drop-right")
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.module.named_parameters())
    again = rp.Reading.load(reading.save(tmp_path / "terms.parquet"))  # type: ignore[operator]
    pd.testing.assert_frame_equal(rp.objective_classes(again), rp.objective_classes(reading))
    assert again.value == reading.value and again.control is not None and reading.facts == ALPHABET
    assert reading.plot().data and reading.plot(by=["target", "evidence"]).data
    by_role = rp.objective_classes(reading, ["priced", "target", "evidence", "masks", "role"])
    whole = rp.objective_classes(reading)
    assert by_role["pressure"].sum() == pytest.approx(whole["pressure"].sum(), rel=1e-9)


def test_one_direction_carried_forward_gives_the_same_products() -> None:
    """The way of large models, which forms no class's gradient, against the way that holds them all; drawn as well."""
    model = letters_model()
    for length in (4, 6):
        relation = rp.letters(length, ALPHABET)
        held, carried = (rp.objective_terms(model, relation, mode=mode, draws=100) for mode in ("gradients", "slopes"))
        assert carried.meta["sampling_error"] == pytest.approx(held.meta["sampling_error"], rel=1e-6)
        tables = [
            rp.objective_classes(one).set_index(["priced", "target", "evidence", "masks"]) for one in (held, carried)
        ]
        for name in ("loss", "share", "pressure", "letters", "margin", "control", "sampling_error"):
            assert np.allclose(tables[1].loc[tables[0].index, name], tables[0][name], rtol=1e-6, atol=1e-12), name
        assert tables[1]["cosine"].isna().all() and tables[1]["reason"].str.contains("were not held").all()
        assert carried.value == pytest.approx(held.value, rel=1e-6) and np.isnan(carried.interval[0])


def test_wrong_questions_are_told() -> None:
    model = letters_model()
    with pytest.raises(rp.RevprobeError, match="says nothing of what it is trained on"):
        rp.objective_terms(model)
    with pytest.raises(rp.RevprobeError, match="unknown dial 'drop-rigth'; the closest is 'drop-right'"):
        rp.objective_terms(model, rp.letters(3, ALPHABET), dial="drop-rigth")
    with pytest.raises(rp.RevprobeError, match="no grouping 'layer'"):
        rp.objective_classes(rp.objective_terms(model, rp.letters(3, ALPHABET)), "layer")
    assert objective_terms.DRAWS > 0
