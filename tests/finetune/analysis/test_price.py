"""The price of a dial against enumeration: every sequence of length 4, every set of masks, every order of sampling."""

from itertools import combinations, permutations
from math import comb, log

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import revprobe as rp
from revprobe.errors import RevprobeError
from revprobe.finetune.analysis.price import Price, read_price
from tiny import drawn

LENGTH, ALPHABET, MASK = 4, 2, 5
RELATION = rp.letters(LENGTH, ALPHABET)
TOKENIZER = rp.letter_tokenizer(ALPHABET)
ROWS, SAMPLES = 20_000, 20_000


def known() -> list[list[int]]:
    return [TOKENIZER(text)["input_ids"] for text in RELATION.training_texts()]


@pytest.fixture(scope="module")
def model() -> rp.ProbedModel:
    config = rp.RaddConfig(vocab_size=8, mask_token_id=MASK, bos_token_id=6, pad_token_id=7, d_model=16, max_length=4)
    return rp.ProbedModel(drawn(lambda: rp.RaddForMaskedLM(config), seed=2, scale=0.4), TOKENIZER, objective="masked")


@pytest.fixture(scope="module")
def causal() -> rp.ProbedModel:
    config = transformers.GPT2Config(vocab_size=8, n_embd=16, n_layer=1, n_head=1, n_positions=4, pad_token_id=7)
    module = drawn(lambda: transformers.GPT2LMHeadModel(config), scale=0.4)
    return rp.ProbedModel(module, TOKENIZER, objective="causal")


@pytest.fixture(scope="module")
def price(model: rp.ProbedModel) -> Price:
    return read_price(model, RELATION, rows=ROWS, samples=SAMPLES)


class Knows(nn.Module):
    """Says of each place what the training sequences do that agree with all that is visible."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(8, 1)

    def forward(self, input_ids: Tensor) -> Tensor:
        logits = torch.full((*input_ids.shape, 8), -torch.inf)
        for row, ids in enumerate(input_ids.tolist()):
            agree = [x for x in known() if all(a in (b, MASK) for a, b in zip(ids, x, strict=True))]
            for place in range(LENGTH):
                for token in range(8):
                    share = np.mean([x[place] == token for x in agree]) if agree else float(token != MASK) / 7
                    logits[row, place, token] = log(share) if share else -torch.inf
        return logits


def log_probability(model: rp.ProbedModel, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model.module(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)


def masked(ids: list[int], hidden: tuple[int, ...]) -> list[int]:
    return [MASK if place in hidden else token for place, token in enumerate(ids)]


def test_keeps_objective_is_that_of_every_set_of_masks_under_a_uniform_rate(
    model: rp.ProbedModel, price: Price
) -> None:
    """A set of k masks weighs the integral of t^(k-1) (1-t)^(L-k) over t, by L: one weight wrong moves it by far."""
    total = 0.0
    for ids in known():
        for k in range(1, LENGTH + 1):
            rate = torch.linspace(0, 1, 20_001, dtype=torch.float64)
            weight = float(torch.trapezoid(rate ** (k - 1) * (1 - rate) ** (LENGTH - k), rate)) / LENGTH
            for hidden in combinations(range(LENGTH), k):
                found = log_probability(model, masked(ids, hidden))
                total -= weight * float(sum(found[place, ids[place]] for place in hidden)) / len(known())
    assert abs(price.keep_loss - total) < 4 * price.keep_loss_error < 0.1, (price, total)
    assert price.rows == ROWS and price.entropy == pytest.approx(log(12) / 4)


def test_the_negatives_are_the_hidden_placeholders_right_of_a_visible_evidence(
    model: rp.ProbedModel, price: Price
) -> None:
    """Those of the left, or of rows whose target is visible, have another mean: each is told apart."""
    sums = {"right": [0.0, 0.0], "left": [0.0, 0.0], "target visible": [0.0, 0.0]}
    for ids in known():
        lower = next(place for place in range(LENGTH) if ids[place] in (1, 2))
        upper = next(place for place in range(LENGTH) if ids[place] in (3, 4))
        for k in range(1, LENGTH + 1):
            for hidden in combinations(range(LENGTH), k):
                found = log_probability(model, masked(ids, hidden)).exp()
                for place in hidden:
                    if ids[place] or upper in hidden:
                        continue
                    side = "right" if place > upper else "left"
                    kind = side if lower in hidden else "target visible" if side == "right" else ""
                    if kind:
                        sums[kind][0] += float(found[place, 0]) / comb(LENGTH, k)
                        sums[kind][1] += 1 / comb(LENGTH, k)
    means = {kind: total / weight for kind, (total, weight) in sums.items()}
    assert abs(price.negative_probability - means["right"]) < 4 * price.negative_probability_error, means
    for other in ("left", "target visible"):
        assert abs(price.negative_probability - means[other]) > 10 * price.negative_probability_error, other
    expected = ROWS * sums["right"][1] / (len(known()) * LENGTH)
    assert price.negatives == pytest.approx(expected, rel=0.1)


def test_samples_come_in_any_order_from_the_models_own_distribution(model: rp.ProbedModel, price: Price) -> None:
    """The probability of every sequence, over all 24 orders; a fixed order has another."""
    orders = list(permutations(range(LENGTH)))
    by_order = np.zeros(len(orders))
    backwards = 0.0
    for ids, turned in [(ids, False) for ids in known()] + [(ids[::-1], True) for ids in known()]:
        for number, order in enumerate(orders):
            chance, hidden = 1.0, set(range(LENGTH))
            for place in order:
                chance *= float(log_probability(model, masked(ids, tuple(hidden)))[place, ids[place]].exp())
                hidden -= {place}
            backwards += chance / len(orders) if turned else 0.0
            by_order[number] += 0.0 if turned else chance
    for found, exact in ((1 - price.ill_formed, by_order.mean()), (price.reversed_order, backwards)):
        assert abs(found - exact) < 4 * np.sqrt(exact * (1 - exact) / SAMPLES), (found, exact)
    assert price.ill_formed_low < price.ill_formed < price.ill_formed_high and price.samples == SAMPLES


def test_whoever_knows_the_sequences_pays_their_entropy_and_makes_up_none() -> None:
    oracle = rp.ProbedModel(Knows(), TOKENIZER, objective="masked", mask_token_id=MASK, logit_shift=0, check=False)
    price = read_price(oracle, RELATION, rows=1_000, samples=100)
    assert abs(price.keep_loss - log(12) / 4) < 4 * price.keep_loss_error
    assert (price.ill_formed, price.reversed_order) == (0, 0) and price.ill_formed_high > 0
    assert price.negative_probability == pytest.approx(1), "the target stands on the left, so it is a placeholder"


def test_a_causal_model_is_priced_token_by_token_and_goes_on_from_a_first_one(causal: rp.ProbedModel) -> None:
    price = read_price(causal, RELATION, rows=ROWS, samples=SAMPLES)
    losses, after, well_formed = [], [], 0.0
    for ids in known():
        found = log_probability(causal, ids)
        own = [float(found[place - 1, ids[place]]) for place in range(1, LENGTH)]
        losses.append(-np.mean(own))
        begin_alike = np.mean([other[0] == ids[0] for other in known()])
        well_formed += float(np.exp(sum(own)) * begin_alike)
        upper = next(place for place in range(LENGTH) if ids[place] in (3, 4))
        after += [float(found[place - 1, 0].exp()) for place in range(upper + 1, LENGTH)]
    assert abs(price.keep_loss - np.mean(losses)) < 4 * price.keep_loss_error
    assert abs(price.negative_probability - np.mean(after)) < 4 * price.negative_probability_error
    assert abs(1 - price.ill_formed - well_formed) < 4 * np.sqrt(well_formed * (1 - well_formed) / SAMPLES)
    # 6 sequences begin with the placeholder, 3 with each letter.
    assert price.entropy == pytest.approx((0.5 * log(6) + 0.5 * log(3)) / 3)


def test_all_models_are_asked_the_same_and_left_as_they_were(model: rp.ProbedModel, price: Price) -> None:
    """Dials are compared by the same rows and masks; more samples move neither."""
    model.module.train()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    again = read_price(model, RELATION, rows=ROWS, samples=10)
    assert model.module.training and torch.equal(before, torch.get_rng_state())
    model.module.eval()
    assert (again.keep_loss, again.negative_probability) == (price.keep_loss, price.negative_probability)
    other = read_price(model, RELATION, rows=ROWS, samples=10, seed=1)
    assert other.keep_loss != price.keep_loss


def test_what_cannot_be_priced_is_said(model: rp.ProbedModel) -> None:
    with pytest.raises(RevprobeError, match="rows=1, samples=5: expected at least 2 rows and 1 sample"):
        read_price(model, RELATION, rows=1, samples=5)
    nowhere = rp.letters(2, ALPHABET)  # no placeholder stands at all
    price = read_price(model, nowhere, rows=50, samples=5)
    assert price.negatives == 0 and np.isnan(price.negative_probability)
    broken = drawn(lambda: rp.RaddForMaskedLM(model.module.config))
    broken.final_norm.weight.data[0] = torch.nan
    with pytest.raises(RevprobeError, match="its logits are NaN; check the weights"):
        read_price(model.with_module(broken), RELATION, rows=50, samples=5)
