"""The training losses against slow, obvious versions: every mask enumerated, every logarithm taken by hand."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.integrate import quad
from torch import Tensor, nn

from revprobe import RaddConfig, RaddForMaskedLM, RevprobeError
from revprobe.finetune.training.objectives import (
    EPS,
    causal_loss,
    draw_masks,
    masked_diffusion_loss,
    price_masks,
    step_generator,
)

VOCAB, LENGTH, MASK = 4, 3, 3
Price = Callable[..., Tensor]


@pytest.fixture
def model() -> nn.Module:
    """A RADD over the tokens 0, 1, 2 and the mask; double, so that only the formula can be wrong."""
    torch.manual_seed(0)
    config = RaddConfig(
        vocab_size=VOCAB, mask_token_id=MASK, bos_token_id=None, pad_token_id=None, d_model=8, initializer_range=0.5
    )
    return RaddForMaskedLM(config).double().eval()


def all_masks() -> list[list[bool]]:
    return [list(mask) for mask in itertools.product([False, True], repeat=LENGTH)]


def slow_row_loss(model: nn.Module, row: list[int], mask: list[bool], rate: float) -> float:
    """(1/t) * sum over masked tokens of -log p / L, one token at a time."""
    shown = torch.tensor([[MASK if hidden else token for token, hidden in zip(row, mask, strict=True)]])
    scores = model(shown).logits[0].tolist()
    total = 0.0
    for position, token in enumerate(row):
        if mask[position]:
            normalizer = sum(math.exp(score) for score in scores[position])
            total -= math.log(math.exp(scores[position][token]) / normalizer)
    return total / rate / len(row)


def expected_loss(model: nn.Module, row: list[int], rate: float) -> float:
    """The mean of the row's loss over all masks at masking rate t."""
    chance = [rate ** sum(mask) * (1 - rate) ** (LENGTH - sum(mask)) for mask in all_masks()]
    losses = [slow_row_loss(model, row, mask, rate) for mask in all_masks()]
    return sum(c * loss for c, loss in zip(chance, losses, strict=True))


def enumerated(price: Price, model: nn.Module, row: list[int], rate: float) -> Tensor:
    """The same mean through the function under test, all masks in one batch."""
    masks = torch.tensor(all_masks())
    ids = torch.tensor([row]).expand(len(masks), -1)
    losses = price(model(ids.masked_fill(masks, MASK)).logits, ids, masks, torch.full((len(masks),), rate).double())
    count = masks.sum(1)
    return (losses * rate**count * (1 - rate) ** (LENGTH - count)).sum()


@pytest.mark.parametrize("rate", [0.05, 0.5, 1.0])
def test_the_expected_loss_is_that_of_all_masks_enumerated(model: nn.Module, rate: float) -> None:
    """A wrong weight, length, sign or position moves it."""
    for row in ([0, 1, 2], [2, 2, 0]):
        assert enumerated(price_masks, model, row, rate).item() == pytest.approx(
            expected_loss(model, row, rate), abs=1e-6
        )


FAULTS: dict[str, Price] = {
    "1/t forgotten": lambda logits, ids, mask, rate: price_masks(logits, ids, mask, torch.ones_like(rate)),
    "divided by the masked count": lambda logits, ids, mask, rate: price_masks(
        logits, ids, mask, rate, mask.sum(1).clamp(min=1)
    ),
    "visible tokens priced": lambda logits, ids, mask, rate: price_masks(logits, ids, torch.ones_like(mask), rate),
    "logits of the neighbour": lambda logits, ids, mask, rate: price_masks(logits.roll(1, dims=1), ids, mask, rate),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_in_the_loss_is_seen(model: nn.Module, fault: str) -> None:
    """The enumeration itself: it must tell these apart, or it proves nothing."""
    found = enumerated(FAULTS[fault], model, [0, 1, 2], 0.5).item()
    assert abs(found - expected_loss(model, [0, 1, 2], 0.5)) > 1e-2


def test_the_gradient_is_p_minus_target_over_t_and_l_at_masked_positions_only() -> None:
    """d loss / d logits = (softmax - onehot) / (t L), zero where nothing is hidden."""
    torch.manual_seed(1)
    logits = torch.randn(2, LENGTH, VOCAB, dtype=torch.double, requires_grad=True)
    ids = torch.tensor([[0, 1, 2], [2, 0, 0]])
    mask, rate = torch.tensor([[True, False, True], [False, False, False]]), torch.tensor([0.4, 0.7]).double()
    # price_masks computes in float32, as training does.
    price_masks(logits, ids, mask, rate).sum().backward()
    onehot = nn.functional.one_hot(ids, VOCAB)
    expected = (logits.softmax(-1) - onehot) * mask[..., None] / (rate[:, None, None] * LENGTH)
    assert logits.grad is not None
    assert torch.allclose(logits.grad, expected.detach(), atol=1e-6)
    assert torch.equal(logits.grad[1], torch.zeros(LENGTH, VOCAB).double()), "a row without a mask contributes 0"


def test_the_loss_of_a_batch_is_the_mean_over_its_own_draws(model: nn.Module) -> None:
    """masked_diffusion_loss draws from the generator it is given, and from nothing else."""
    ids = torch.tensor([[0, 1, 2], [2, 2, 0], [1, 0, 0], [0, 0, 1]])
    torch.manual_seed(7)
    loss = masked_diffusion_loss(model, ids, generator=step_generator(0, 5), mask_token_id=MASK)
    rate, mask = draw_masks((4, LENGTH), generator=step_generator(0, 5))
    slow = [
        slow_row_loss(model, row, hidden, t)
        for row, hidden, t in zip(ids.tolist(), mask.tolist(), rate.tolist(), strict=True)
    ]
    assert loss.item() == pytest.approx(sum(slow) / 4, abs=1e-6)
    torch.manual_seed(8)
    again = masked_diffusion_loss(model, ids, generator=step_generator(0, 5), mask_token_id=MASK)
    assert torch.equal(loss, again)


class Constant(nn.Module):
    """The same logits at every position of every input: then the expected loss is the cross-entropy, at any t."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return torch.tensor([0.5, -1.0, 2.0, float("-inf")]).expand(*input_ids.shape, VOCAB)


@pytest.mark.parametrize("antithetic", [False, True])
def test_the_loss_is_unbiased(antithetic: bool) -> None:
    """E over t and masks of (1/t) * masked cross-entropy / L is the plain cross-entropy per token."""
    ids = torch.tensor([[0, 1, 2]]).expand(20_000, -1)
    losses = [
        masked_diffusion_loss(
            Constant(), ids, generator=step_generator(0, step), mask_token_id=MASK, antithetic=antithetic
        ).item()
        for step in range(20)
    ]
    plain = nn.functional.cross_entropy(Constant()(ids[:1])[0], ids[0]).item()
    mean, spread = torch.tensor(losses).mean().item(), torch.tensor(losses).std().item()
    assert abs(mean - plain) < 4 * spread / 20**0.5, f"{mean} against {plain}"


def test_masking_rates_are_uniform_and_tokens_are_masked_at_their_rate() -> None:
    """Rates below eps would divide by almost zero; masks that ignore the rate would bias the loss."""
    rate, mask = draw_masks((50_000, 8), generator=step_generator(0, 0), eps=0.1)
    assert rate.min() >= 0.1
    assert rate.max() <= 1.0
    assert rate.mean().item() == pytest.approx(0.55, abs=0.005)
    for low in (0.1, 0.4, 0.7):
        chosen = (rate > low) & (rate < low + 0.3)
        assert mask[chosen].float().mean().item() == pytest.approx(rate[chosen].mean().item(), abs=0.005)
    spread, _ = draw_masks((100, 8), generator=step_generator(0, 0), eps=0.0, antithetic=True)
    assert torch.allclose(spread.sort().values.diff(), torch.full((99,), 0.01), atol=1e-5)


def test_every_place_in_training_has_masks_of_its_own() -> None:
    """Equal streams at two steps, micro-steps, processes or seeds would train on the same masks twice."""
    places = itertools.product(range(2), range(3), range(2), range(2), range(2))
    draws = {tuple(draw_masks((4, 16), generator=step_generator(*place))[0].tolist()) for place in places}
    assert len(draws) == 48
    same = [draw_masks((4, 16), generator=step_generator(1, 2, 3, 4))[1] for _ in range(2)]
    assert torch.equal(*same)


def test_padding_changes_nothing(model: nn.Module) -> None:
    """A padded row is priced like the row alone: pads are never masked and do not count towards L."""
    ids, attention = torch.tensor([[0, 1, 2, 0, 0]]), torch.tensor([[1, 1, 1, 0, 0]])
    loss = masked_diffusion_loss(
        model, ids, generator=step_generator(0, 3), mask_token_id=MASK, attention_mask=attention
    )
    rate, mask = draw_masks((1, 5), generator=step_generator(0, 3))
    assert loss.item() == pytest.approx(slow_row_loss(model, [0, 1, 2], mask[0, :3].tolist(), rate.item()), abs=1e-6)


class Table(nn.Module):
    """Logits that stand in a table, whatever the input."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.logits


def test_the_causal_loss_prices_each_next_token() -> None:
    """Unshifted logits would price each token by the row that has seen it."""
    torch.manual_seed(2)
    logits, ids = torch.randn(2, LENGTH, VOCAB), torch.tensor([[0, 1, 2], [2, 2, 0]])
    log_p = logits.log_softmax(-1)
    terms = [-log_p[row, i, ids[row, i + 1]].item() for row in range(2) for i in range(LENGTH - 1)]
    assert causal_loss(Table(logits), ids).item() == pytest.approx(sum(terms) / 4, abs=1e-6)
    unshifted = nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).item()
    assert abs(unshifted - sum(terms) / 4) > 1e-2
    padded = causal_loss(Table(logits), ids, attention_mask=torch.tensor([[1, 1, 1], [1, 1, 0]]))
    assert padded.item() == pytest.approx(sum(terms[:3]) / 3, abs=1e-6)


def test_wrong_training_rows_are_refused(model: nn.Module) -> None:
    draw = step_generator(0, 0)
    with pytest.raises(RevprobeError, match=r"contain the mask token 3; pass clean sequences"):
        masked_diffusion_loss(model, torch.tensor([[0, MASK, 1]]), generator=draw, mask_token_id=MASK)
    with pytest.raises(RevprobeError, match=r"shape \(3,\): expected \(batch, seq\)"):
        masked_diffusion_loss(model, torch.tensor([0, 1, 2]), generator=draw, mask_token_id=MASK)
    with pytest.raises(RevprobeError, match=r"shape \(2, 1\): expected .* seq >= 2"):
        causal_loss(model, torch.tensor([[0], [1]]))


# ---- entities, responses, shifted logits ----

# Tokens 0 and 2 of the row are one entity: they are masked together.
UNITS = [[0, 2], [1]]
LEADER = [0, 1, 0]
ROW = [2, 0, 1]


def expected_over_rates(model: nn.Module, row: list[int], units: list[list[int]], counted: list[int]) -> float:
    """The row's expected loss, t ~ U(eps, 1) integrated out: every subset of the units is masked in turn.

    A subset of k out of n units has probability t^k (1-t)^(n-k); its loss is 1/t times the sum of -log p over L.
    """
    total = 0.0
    for chosen in itertools.product([False, True], repeat=len(units)):
        hidden = [any(take and i in unit for take, unit in zip(chosen, units, strict=True)) for i in range(len(row))]
        hidden = [is_hidden and i in counted for i, is_hidden in enumerate(hidden)]
        nats = slow_row_loss(model, row, hidden, rate=1.0) * len(row) / len(counted)
        k, n = sum(chosen), len(units)
        weight, _ = quad(lambda t, k=k, n=n: t ** (k - 1) * (1 - t) ** (n - k), EPS, 1.0, epsabs=1e-12)
        total += nats * weight / (1 - EPS)
    return total


def mean_loss(model: nn.Module, row: list[int], **options: Any) -> tuple[float, float]:
    """The loss's mean over many draws, and its standard error."""
    ids = torch.tensor([row]).expand(4_000, -1)
    tables = {key: value.expand(4_000, -1) for key, value in options.items()}
    with torch.no_grad():
        losses = torch.tensor(
            [
                masked_diffusion_loss(
                    model, ids, generator=step_generator(0, step), mask_token_id=MASK, antithetic=True, **tables
                ).item()
                for step in range(15)
            ]
        )
    return losses.mean().item(), (losses.std() / len(losses) ** 0.5).item()


@pytest.mark.parametrize(
    ("units", "counted", "options"),
    [
        ([[0], [1], [2]], [0, 1, 2], {}),
        (UNITS, [0, 1, 2], {"leader": torch.tensor([LEADER])}),
        ([[0], [1], [2]], [2], {"maskable": torch.tensor([[False, False, True]])}),
    ],
    ids=["whole sequence", "whole entity", "response only"],
)
def test_the_loss_is_that_of_every_mask_and_rate_enumerated(
    model: nn.Module, units: list[list[int]], counted: list[int], options: dict[str, Tensor]
) -> None:
    """4-token vocabulary, length 3: the mean over draws against the sum over masks, rates integrated out."""
    expected = expected_over_rates(model, ROW, units, counted)
    mean, error = mean_loss(model, ROW, **options)
    assert error < 0.01 * expected, f"too few draws to tell: {error} of {expected}"
    assert abs(mean - expected) < 4 * error, f"{mean} against {expected}, standard error {error}"


def test_the_three_ways_of_masking_have_different_losses(model: nn.Module) -> None:
    """Else the test above could not tell them apart."""
    singles = [[0], [1], [2]]
    found = [
        expected_over_rates(model, ROW, singles, [0, 1, 2]),
        expected_over_rates(model, ROW, UNITS, [0, 1, 2]),
        expected_over_rates(model, ROW, singles, [2]),
    ]
    assert min(abs(a - b) / a for a, b in itertools.combinations(found, 2)) > 0.05, found


def test_tokens_of_one_leader_are_masked_together_at_their_rate() -> None:
    """Each still at rate t; others on their own."""
    leader = torch.tensor([LEADER]).expand(40_000, -1)
    rate, mask = draw_masks((40_000, 3), generator=step_generator(0, 0), leader=leader)
    assert torch.equal(mask[:, 0], mask[:, 2])
    assert not torch.equal(mask[:, 0], mask[:, 1])
    for low in (0.0, 0.5):
        part = (rate > low) & (rate < low + 0.5)
        shares = mask[part].float().mean(0)
        assert torch.allclose(shares, rate[part].mean().expand(3), atol=0.015), shares


def test_a_leader_of_its_own_changes_no_draw() -> None:
    """Runs without entities must keep their masks, bit for bit."""
    own = torch.arange(6).expand(4, -1)
    plain, told = (draw_masks((4, 6), generator=step_generator(3, 1), leader=leader) for leader in (None, own))
    assert torch.equal(plain[0], told[0])
    assert torch.equal(plain[1], told[1])


@pytest.mark.parametrize(("response_only", "moved"), [(False, [True, True]), (True, [False, True])])
def test_the_gradient_moves_both_entities_unless_the_prompt_is_left_out(response_only: bool, moved: list[bool]) -> None:
    """The first entity's logits must be trained: the probes' forward query asks for it."""
    torch.manual_seed(0)
    table = Table(torch.randn(64, 3, VOCAB).requires_grad_())
    maskable = {"maskable": torch.tensor([[False, False, True]]).expand(64, -1)} if response_only else {}
    ids = torch.tensor([[0, 1, 2]]).expand(64, -1)
    masked_diffusion_loss(table, ids, generator=step_generator(0, 0), mask_token_id=MASK, **maskable).backward()
    assert table.logits.grad is not None
    size = table.logits.grad.abs().sum((0, 2))
    assert [bool(size[position] > 0) for position in (0, 2)] == moved


class Recorded(nn.Module):
    """Logits from a table, and what was shown."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits, self.seen = logits, torch.empty(0)

    def forward(self, input_ids: Tensor) -> Tensor:
        self.seen = input_ids
        return self.logits


def test_a_shifted_model_is_priced_one_row_earlier_and_never_at_its_first_position() -> None:
    """Dream: the token at i is predicted at row i - 1; by hand, over many draws."""
    torch.manual_seed(0)
    logits, ids = torch.randn(256, 3, VOCAB), torch.tensor([[0, 1, 2]]).expand(256, -1)
    model = Recorded(logits)
    loss = masked_diffusion_loss(model, ids, generator=step_generator(0, 2), mask_token_id=MASK, logit_shift=1)
    rate, _ = draw_masks((256, 3), generator=step_generator(0, 2))
    hidden = model.seen == MASK
    assert not hidden[:, 0].any()
    assert hidden[:, 1:].any(0).all()
    log_p = logits.log_softmax(-1)
    by_hand = [
        -sum(log_p[row, i - 1, ids[row, i]].item() for i in (1, 2) if hidden[row, i]) / rate[row].item() / 2
        for row in range(256)
    ]
    assert loss.item() == pytest.approx(sum(by_hand) / 256, rel=1e-5)
    unshifted = masked_diffusion_loss(model, ids, generator=step_generator(0, 2), mask_token_id=MASK)
    assert abs(unshifted.item() - loss.item()) > 1e-2


def test_the_causal_loss_can_price_the_response_alone() -> None:
    torch.manual_seed(2)
    logits, ids = torch.randn(1, LENGTH, VOCAB), torch.tensor([[0, 1, 2]])
    loss = causal_loss(Table(logits), ids, maskable=torch.tensor([[False, False, True]]))
    assert loss.item() == pytest.approx(-logits.log_softmax(-1)[0, 1, 2].item(), abs=1e-6)


def test_a_row_with_nothing_to_predict_is_named(model: nn.Module) -> None:
    nothing = torch.tensor([[True, True, True], [False, False, False]])
    ids = torch.tensor([[0, 1, 2], [2, 1, 0]])
    with pytest.raises(RevprobeError, match=r"row 1 of a batch \(\[2, 1, 0\]\) has no token to predict"):
        masked_diffusion_loss(model, ids, generator=step_generator(0, 0), mask_token_id=MASK, maskable=nothing)


# ---- RADD's three ways of drawing rates ----


def expected_weight(rates: str, length: int, count: int) -> float:
    """What a set of `count` masks weighs on average, E[1/divisor; exactly this set]."""
    if rates == "lambda":
        return math.exp(math.lgamma(count) + math.lgamma(length - count + 1) - math.lgamma(length + 1))
    if rates == "k":
        return 1 / length / math.comb(length, count) * length / count
    density = 1 / (1 - EPS)
    probability = lambda t: (1 - EPS) * t  # noqa: E731
    return (
        density
        * quad(lambda t: probability(t) ** count * (1 - probability(t)) ** (length - count) / t, EPS, 1, epsabs=1e-13)[
            0
        ]
    )


@pytest.mark.parametrize("length", [2, 4, 7])
def test_lambda_and_k_weigh_every_set_of_masks_alike(length: int) -> None:
    for count in range(1, length + 1):
        assert expected_weight("lambda", length, count) == pytest.approx(expected_weight("k", length, count), rel=1e-12)
    # By the code's own draws: strata this fine integrate to 1e-6, and k / L stands for every count.
    rate, _ = draw_masks((200_000, length), generator=torch.Generator().manual_seed(0), rates="lambda")
    wide = rate.double()
    for count in range(1, length + 1):
        found = (wide ** (count - 1) * (1 - wide) ** (length - count)).mean()
        assert float(found) == pytest.approx(expected_weight("lambda", length, count), abs=1e-6)


@pytest.mark.parametrize("length", [2, 4, 10])
def test_ts_eps_takes_from_single_masks_what_its_closed_form_says(length: int) -> None:
    edges = ((1 - EPS * (1 - EPS)) ** length - EPS**length) / (1 - EPS)
    single = expected_weight("t", length, 1) * length
    assert single == pytest.approx(edges, rel=1e-9)
    assert 1 - single == pytest.approx((length - 1) * EPS, rel=0.02)
    rate, _ = draw_masks((400_000, length), generator=torch.Generator().manual_seed(0), rates="t")
    probability = (1 - EPS) * rate.double()
    found = (probability * (1 - probability) ** (length - 1) / rate.double()).mean() * length
    assert float(found) == pytest.approx(single, abs=5e-6)


@pytest.mark.parametrize("rates", ["t", "lambda", "k", "independent"])
def test_each_way_of_drawing_masks_at_its_probability_and_divides_by_its_divisor(rates: str) -> None:
    """Every set of masks is seen as often as it should be, each weighted by its divisor (a 5 sigma bound)."""
    length, batch = 3, 400_000
    rate, is_masked = draw_masks((batch, length), generator=torch.Generator().manual_seed(1), rates=rates)
    for count in range(1, length + 1):
        chosen = is_masked[:, :count].all(1) & ~is_masked[:, count:].any(1)
        weights = chosen / rate
        error = float(weights.std()) / math.sqrt(batch)
        expected = expected_weight("lambda" if rates == "independent" else rates, length, count)
        slack = 5 * error + (length * EPS * expected if rates == "independent" else 0.0)
        assert abs(float(weights.mean()) - expected) < slack


def test_the_rates_are_spread_as_radds() -> None:
    batch = 64
    generator = torch.Generator().manual_seed(0)
    t, _ = draw_masks((batch, 4), generator=generator, rates="t")
    steps = t.sort().values.diff()
    assert torch.allclose(steps, torch.full_like(steps, (1 - EPS) / batch), atol=1e-6)  # one offset for all
    drawn, _ = draw_masks((batch, 4), generator=generator, rates="lambda")
    assert torch.equal((drawn * batch).floor(), torch.arange(batch).float())  # one in each stratum
    assert (drawn.diff() - 1 / batch).abs().max() > 1e-4  # each anew
    divisor, is_masked = draw_masks((batch, 4), generator=generator, rates="k")
    assert torch.equal(is_masked.sum(1), (divisor * 4).round().long()) and len(divisor.unique()) == 4


@pytest.mark.parametrize(("masks", "count"), [("single", 1), (1, 1), (2, 2), (4, 4)])
def test_exactly_so_many_masks_are_priced_as_their_share(masks: str | int, count: int) -> None:
    divisor, is_masked = draw_masks((5000, 4), generator=torch.Generator().manual_seed(0), masks=masks)
    assert bool((is_masked.sum(1) == count).all()) and bool((divisor == count / 4).all())
    assert (is_masked.float().mean(0) - count / 4).abs().max() < 0.04


def test_a_loss_per_sequence_is_the_one_per_token_times_the_tokens(model: nn.Module) -> None:
    ids = torch.tensor([[1, 2, 0], [2, 2, 1]])
    settings: dict[str, Any] = {"mask_token_id": MASK}
    token, sequence = (
        masked_diffusion_loss(model, ids, generator=torch.Generator().manual_seed(3), per=per, **settings)
        for per in ("token", "sequence")
    )
    assert float(sequence) == pytest.approx(3 * float(token), rel=1e-6)
    each, summed = (causal_loss(model, ids, per=per) for per in ("token", "sequence"))
    assert float(summed) == pytest.approx(2 * float(each), rel=1e-6)
