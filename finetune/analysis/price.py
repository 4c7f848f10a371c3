"""What a dial of negative evidence costs: whoever leaves terms out of the loss may have trained an order-blind model.

    price = rp.read_price(run.load(), run.relation)

Three numbers, of any model of the letters, whatever it was trained with: keep's whole objective, whether it still
believes the terms that a dial leaves out, and whether what it makes up from nothing is a sequence at all.

Rows and masks are the same for all models of one length and alphabet. Of a row k ~ U{1..L} tokens are hidden at random,
which is how training hides them once at least one is (a rate uniform in (0, 1) gives every count alike), and the row's
loss, weighted by L / k, is the mean of its hidden tokens' cross-entropy: the objective itself, without the variance of
its weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...arguments import checked
from ...errors import RevprobeError
from ...hooks.untouched import untouched
from ...models.one_layer import letter_tokenizer
from ...models.probed import ProbedModel
from ...probes.statistics.intervals import proportion
from ...progress import Progress, counted, shows_progress
from ...relations.letters import LettersRelation
from ..training.block_diffusion import require_one_block
from ..training.negatives import dropped_terms, letter_kinds
from ..training.objectives import draw_masks, logits_at_their_position

ROWS, SAMPLES = 8192, 1024
# Streams of the one seed: neither number of rows nor of samples moves the other's draws.
_EVALUATION, _SAMPLING = 0, 1
_BATCH = 2048


@dataclass(frozen=True)
class Price:
    """What `read_price` found.

    Attributes:
        keep_loss: nats per token, with its standard error over `rows`, most of which all models of one length share.
        entropy: of the training sequences (a causal model's: given their first token), nats per token: what keep_loss
            is for a model that knows them and nothing else.
        negative_probability: mean p("placeholder") over `negatives` terms right of the visible evidence, target hidden,
            with its standard error (clustered by row). A causal model's are its tokens after the second letter.
        ill_formed: share of `samples` sampled sequences that are none of the training's, with its 95 % interval.
        reversed_order: share of them that are one, read backwards.
    """

    keep_loss: float
    keep_loss_error: float
    rows: int
    entropy: float
    negative_probability: float
    negative_probability_error: float
    negatives: int
    ill_formed: float
    ill_formed_low: float
    ill_formed_high: float
    reversed_order: float
    samples: int


@checked
@shows_progress("parts")
def read_price(
    model: ProbedModel,
    relation: LettersRelation,
    *,
    rows: int = ROWS,
    samples: int = SAMPLES,
    seed: int = 0,
    progress: Progress | bool | None = None,
) -> Price:
    """Keep's objective, what the model says of right-hand negatives, and what it makes up from all-masked.

    A masked model samples in random order, one token at a time, from its own distribution at that place. A causal one
    samples from left to right after a first token of the training's, which it does not predict; its objective is that
    of the next token.
    Args:
        rows: how many training sequences are drawn, with replacement.
        samples: how many sequences are sampled.
        seed: of rows, masks and samples.
        progress: called with (done, in all) of the batches of rows, then of the places sampled; None shows a bar, False
            nothing.
    Returns: a `Price`; losses in nats per token, the rest fractions.
    Raises: RevprobeError, for fewer than 2 rows or 1 sample, or a model whose logits are NaN.
    """
    if rows < 2 or samples < 1:
        raise RevprobeError(f"rows={rows!r}, samples={samples!r}: expected at least 2 rows and 1 sample")
    require_one_block(model, "read_price")
    known = torch.tensor(letter_tokenizer(relation.alphabet)(relation.training_texts())["input_ids"])
    with untouched(model.module), torch.no_grad():
        generator = _generator(seed, _EVALUATION)
        token_ids = known[torch.randint(len(known), (rows,), generator=generator)]
        losses, counts, believed, negatives = _priced(model, token_ids, relation.alphabet, generator, progress)
        sampled = sampled_sequences(model, known, samples, _generator(seed, _SAMPLING), progress)
    keep_loss, negative = _mean_of_rows(losses, counts), _mean_of_rows(believed, negatives)
    names = {tuple(row) for row in known.tolist()}
    wrong = np.array([tuple(row) not in names for row in sampled.tolist()], dtype=float)
    backwards = float(np.mean([tuple(reversed(row)) in names for row in sampled.tolist()]))
    ill_formed = proportion(wrong)
    return Price(
        *keep_loss,
        rows,
        _entropy(known, model.objective),
        *negative,
        int(negatives.sum()),
        ill_formed.value,
        ill_formed.low,
        ill_formed.high,
        backwards,
        samples,
    )


def _entropy(known: Tensor, objective: str) -> float:
    """Nats per predicted token, every sequence alike. Shapes: `sequence seq ->`."""
    if objective == "masked":
        return float(np.log(len(known)) / known.shape[1])
    # What follows a first token: of the sequences that begin with it, one.
    begin_alike = known[:, 0].unique(return_counts=True)[1].double()
    return float((begin_alike / len(known) * begin_alike.log()).sum() / (known.shape[1] - 1))


def _generator(seed: int, stream: int) -> torch.Generator:
    (mixed,) = np.random.SeedSequence([seed, stream]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(mixed))


def _priced(
    model: ProbedModel,
    token_ids: Tensor,
    alphabet: int,
    generator: torch.Generator,
    progress: Progress | bool | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Each row's loss and its divisor; the sum of p("placeholder") over its right-hand negatives, and their number.

    Shapes: `batch seq -> batch, batch, batch, batch`.
    """
    kinds = letter_kinds(alphabet)[token_ids]
    if model.objective == "masked":
        shape = (token_ids.shape[0], token_ids.shape[1])
        _, is_masked = draw_masks(shape, generator=generator, rates="k")
        negative = dropped_terms("drop-right", kinds, is_masked)
    else:
        is_masked = torch.ones_like(token_ids, dtype=torch.bool)
        is_masked[:, 0] = False  # no token stands before it
        negative = dropped_terms("drop-after", kinds, is_masked)
    nats = []
    batches = list(zip(token_ids.split(_BATCH), is_masked.split(_BATCH), strict=True))
    for ids, hidden in counted(batches, progress):
        logits = model.logits(model.hide(ids, hidden).to(model.device)).float().cpu()
        at_place = logits_at_their_position(logits, model.logit_shift)
        nats.append(-at_place.log_softmax(2).gather(2, ids[:, :, None])[:, :, 0].double())
    loss = torch.cat(nats)
    if bool(loss[is_masked].isnan().any()):
        raise RevprobeError(f"{model.name}: its logits are NaN; check the weights, or lower the learning rate")
    count = is_masked.sum(1)
    # A row's loss is the mean over what it hides; every row counts alike.
    own = loss.masked_fill(~is_masked, 0.0).sum(1) / count
    believed = (-loss).exp().masked_fill(~negative, 0.0).sum(1)
    return own.numpy(), np.ones(len(own)), believed.numpy(), negative.sum(1).double().numpy()


def _mean_of_rows(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Sum over sum, and its standard error over rows, linearised. NaN without anything to divide by."""
    total = counts.sum()
    if not total:
        return float("nan"), float("nan")
    value = sums.sum() / total
    residual = sums - value * counts
    return float(value), float(np.sqrt(len(sums) / (len(sums) - 1) * (residual**2).sum()) / total)


def sampled_sequences(
    model: ProbedModel,
    known: Tensor,
    count: int,
    generator: torch.Generator,
    progress: Progress | bool | None = None,
) -> Tensor:
    """Sequences from the model's own distribution, one token at a time; see `read_price`.

    Shapes: `sequence seq -> sample seq`. `known` are the training's, for their length and a causal model's first token.
    """
    length, rows = known.shape[1], torch.arange(count)
    if model.objective == "masked":
        assert model.mask_token_id is not None, "checked when wrapped"
        ids = torch.full((count, length), model.mask_token_id)
        order = torch.rand(count, length, generator=generator).argsort(1)
    else:
        ids = known[torch.randint(len(known), (count,), generator=generator)].clone()
        order = torch.arange(1, length).expand(count, -1)
    for place in counted(order.T, progress):
        logits = torch.cat([model.logits(part.to(model.device)).float().cpu() for part in ids.split(_BATCH)])
        own = model.without_mask(logits[rows, (place - model.logit_shift).clamp(min=0)])
        ids[rows, place] = torch.multinomial(own.softmax(1), 1, generator=generator)[:, 0]
    return ids
