"""The two training losses, and the generators their masks are drawn from.

Masks are drawn inside the loss, from a generator seeded by (seed, step, micro-step, process): a resumed run then
draws exactly what the uninterrupted one would have. A collator draws one batch ahead of the step it serves, so its
draws would differ after a resume.

Which tokens may be masked, and which are masked together, is told by two tables beside the ids: `maskable` (the
response only, never a begin token) and `leader` (the position whose draw decides, so that an entity's tokens share
one).

Shapes below: batch, seq, vocab.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import RevprobeError
from .block_diffusion import block_logits, draw_block_masks

EPS = 1e-3
# Phases of a step's generators: its masks, those of an evaluation, and what a dial of negatives picks.
TRAINING, EVALUATION, PICKS = 0, 1, 2


def step_generator(
    seed: int, step: int, micro_step: int = 0, process: int = 0, phase: int = TRAINING
) -> torch.Generator:
    """A CPU generator that belongs to one micro-batch of one training step, and to nothing else.

    Args:
        step: optimizer steps done so far.
        micro_step: batches done inside this step (gradient accumulation).
        process: rank of this process.
        phase: TRAINING, EVALUATION or PICKS, so that neither of the others shifts the training masks.
    """
    # SeedSequence mixes: neighbouring steps and seeds get unrelated streams, which seed + step would not.
    (mixed,) = np.random.SeedSequence([seed, step, micro_step, process, phase]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(mixed))


def draw_masks(
    shape: tuple[int, int],
    *,
    generator: torch.Generator,
    eps: float = EPS,
    highest: float = 1.0,
    antithetic: bool = False,
    leader: Tensor | None = None,
    rates: str = "independent",
    masks: str | int = "rate",
) -> tuple[Tensor, Tensor]:
    """Draw which tokens of each row are masked, and what its loss is divided by.

    Shapes: `-> batch, batch seq (bool)`, on the CPU whatever the model's device, so that draws do not depend on it.
    Args:
        leader: `batch seq`, for each token the position whose draw decides (its own for a token that is masked
            alone): tokens of one leader are masked together, each still with the row's probability. None: every
            token alone.
        eps, highest: "independent" rates lie between them.
        antithetic: of "independent" rates, spread them evenly over (eps, highest); each rate keeps its uniform
            distribution, the batch's loss varies less (Sahoo et al. 2024, App. C.3).
        rates: "independent": t ~ U(eps, highest) a row, which is both the probability of a mask and the divisor.
            "t", "lambda" and "k" are RADD's (Ou et al. 2025; its losses.py): t spread evenly by one offset over the
            batch, masks with probability (1 - eps) t, divisor t; lambda one draw in each of `batch` strata of (0, 1),
            probability and divisor; k ~ U{1..L} independent, so many masks, divisor k / L. The expected weights of a
            set of masks are the same for lambda and k; those of t are smaller by its eps.
        masks: "rate" draws by the rates; "single" or a number masks exactly so many, divisor number / L.
    """
    batch, seq = shape
    if masks != "rate" or rates == "k":
        if masks == "rate":
            count = torch.randint(1, seq + 1, (batch,), generator=generator)
        else:
            count = torch.full((batch,), 1 if masks == "single" else int(masks))
        order = torch.rand(batch, seq, generator=generator).argsort(1).argsort(1)
        return count / seq, order < count[:, None]
    if rates == "lambda":
        # A rate of exactly zero masks nothing and would divide nothing by nothing.
        uniform = (torch.rand(batch, generator=generator) + torch.arange(batch)) / batch
        rate = uniform.clamp(min=torch.finfo(torch.float32).tiny)
    else:
        if antithetic or rates == "t":
            uniform = (torch.rand(1, generator=generator) + torch.arange(batch) / batch) % 1
        else:
            uniform = torch.rand(batch, generator=generator)
        rate = eps + (highest - eps) * uniform
    drawn = torch.rand(batch, seq, generator=generator)
    if leader is not None:
        drawn = drawn.gather(1, leader.cpu())
    probability = (1 - eps) * rate if rates == "t" else rate
    return rate, drawn < probability[:, None]


def draw_spans(allowed: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw one contiguous span of masks a row, inside what is allowed, and what the row's loss is divided by.

    The span's length is uniform from 1 to the longest run of allowed tokens, its place uniform among those where a span
    of this length fits. The divisor is length / L, L being the allowed tokens: a row's loss is the mean cross-entropy
    of its span. Unlike masks drawn by a rate, spans give no bound on a likelihood.

    Shapes: `batch seq (bool) -> batch, batch seq (bool)`, on the CPU; every row allows at least one token.
    """
    allowed = allowed.cpu()
    batch, seq = allowed.shape
    run = torch.zeros(batch, seq + 1, dtype=torch.long)  # allowed tokens in a row from here on
    for column in range(seq - 1, -1, -1):
        run[:, column] = (run[:, column + 1] + 1) * allowed[:, column]
    run = run[:, :-1]
    uniform = torch.rand(batch, 2, generator=generator, dtype=torch.float64)
    length = (uniform[:, 0] * run.amax(1)).long() + 1
    fits = run >= length[:, None]
    number = (uniform[:, 1] * fits.sum(1)).long()
    start = (fits & (fits.cumsum(1) == number[:, None] + 1)).int().argmax(1)
    place = torch.arange(seq)
    span = (place >= start[:, None]) & (place < (start + length)[:, None])
    return length / allowed.sum(1), span


def price_masks(
    logits: Tensor,
    token_ids: Tensor,
    is_masked: Tensor,
    rate: Tensor,
    n_tokens: Tensor | int | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """The loss of each row under one masking draw: (1/t) * sum over masked tokens of cross-entropy / L.

    Shapes: `batch seq vocab, batch seq, batch seq (bool), batch, batch, batch seq -> batch`.
    Args:
        logits: scores for the token AT each position.
        token_ids: the clean ids.
        rate: of each row, or of each token where its block has one of its own (`batch seq`).
        n_tokens: L of each row; the sequence length when None (no padding). 1 gives nats per sequence.
        weights: of each term; 1 when None.
    Returns: nats per token; a row without a mask is 0. Its mean over draws bounds the negative log-likelihood per
        token from above.
    Source: lambda-DCE of Ou et al. 2025 (RADD), up to normalisation; Nie et al. 2025 (LLaDA), Sec. 2.1.
    """
    losses = F.cross_entropy(logits.flatten(0, 1).float(), token_ids.flatten(), reduction="none").view_as(token_ids)
    # masked_fill, not a product: an infinite loss at a visible position must not turn the row into NaN.
    priced = losses.masked_fill(~is_masked if weights is None else ~is_masked | (weights == 0), 0.0)
    priced = priced if weights is None else priced * weights
    total = (priced / rate).sum(1) if rate.ndim == 2 else priced.sum(1) / rate
    return total / (token_ids.shape[1] if n_tokens is None else n_tokens)


def masked_diffusion_loss(
    model: nn.Module,
    token_ids: Tensor,
    *,
    generator: torch.Generator,
    mask_token_id: int,
    eps: float = EPS,
    highest: float = 1.0,
    antithetic: bool = False,
    attention_mask: Tensor | None = None,
    maskable: Tensor | None = None,
    leader: Tensor | None = None,
    logit_shift: int = 0,
    rates: str = "independent",
    masks: str | int = "rate",
    per: str = "token",
    weigh: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    block_size: int | None = None,
) -> Tensor:
    """The masked-diffusion loss of a batch, with masks drawn here from `generator`.

    Shapes: `batch seq -> ` (a scalar, nats per token or per sequence, mean over rows). Padded positions
    (attention_mask 0) are never masked and do not count towards L.
    Args:
        maskable: `batch seq` (bool), what may be masked; L counts these tokens alone. The response of each row gives
            LLaDA's supervised objective (Nie et al. 2025, Sec. 2.3). None: every token.
        logit_shift: position i is predicted at row i - logit_shift (1 for Dream). The first `logit_shift` positions
            have no such row: they are never masked and do not count.
        leader, rates, masks, eps, highest: as in `draw_masks`; masks may also be "span", see `draw_spans`.
        per: "token" divides a row's sum by L, "sequence" does not.
        weigh: from the clean ids, what is masked and the divisors, the weight of each term.
        block_size: of a model that writes in blocks: a noised copy is priced beside the clean one, each block at a rate
            of its own, see `block_diffusion`; only with "independent" rates and no `weigh`. None: the whole text.
    Raises: RevprobeError, for ids that are no `batch seq` table or hold the mask token, and a row with nothing to mask.
    """
    _require_table(token_ids)
    if bool((token_ids == mask_token_id).any()):
        raise RevprobeError(
            f"the training ids contain the mask token {mask_token_id}; pass clean sequences, masks are drawn here"
        )
    shape = token_ids.shape[0], token_ids.shape[1]
    drawing: dict[str, Any] = {"generator": generator, "eps": eps, "highest": highest, "leader": leader}
    counted = _counted(token_ids, attention_mask, maskable, logit_shift)
    if block_size is not None:
        _require_plain_rates(rates, masks, weigh, block_size)
        rate, is_masked = draw_block_masks(shape, block_size, antithetic=antithetic, **drawing)
    elif masks == "span":
        rate, is_masked = draw_spans(counted, generator)
    else:
        rate, is_masked = draw_masks(shape, antithetic=antithetic, rates=rates, masks=masks, **drawing)
    rate, is_masked = rate.to(token_ids.device), is_masked.to(token_ids.device) & counted
    noised = token_ids.masked_fill(is_masked, mask_token_id)
    if block_size is None:
        logits = _logits(model, noised, attention_mask)
    else:
        logits = block_logits(model, noised, token_ids, block_size, attention_mask)
    logits = logits_at_their_position(logits, logit_shift)
    weights = None if weigh is None else weigh(token_ids, is_masked, rate)
    divisor = 1 if per == "sequence" else counted.sum(1)
    return price_masks(logits, token_ids, is_masked, rate, divisor, weights).mean()


def logits_at_their_position(logits: Tensor, logit_shift: int) -> Tensor:
    """Logits moved to the position they predict: row i - shift becomes row i, and the first rows repeat row 0.

    Shapes: `batch seq vocab -> batch seq vocab`.
    Source: Dream's own sampler (Ye et al. 2025), which moves its logits right by one.
    """
    if not logit_shift:
        return logits
    return torch.cat([logits[:, :1].expand(-1, logit_shift, -1), logits[:, :-logit_shift]], dim=1)


def causal_loss(
    model: nn.Module,
    token_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    maskable: Tensor | None = None,
    per: str = "token",
    weights: Tensor | None = None,
) -> Tensor:
    """Next-token cross-entropy over every position that has a next token.

    Shapes: `batch seq -> ` (a scalar, nats per predicted token, mean over all of them). Padded targets
    (attention_mask 0) do not count, nor do those outside `maskable` (the response alone) where it is given.
    Args:
        per: "sequence" sums over the tokens of a row, and takes the mean over rows.
        weights: `batch seq`, of each token as a target; the divisor stays.
    Raises: RevprobeError, for ids that are not a `batch seq` table of at least two columns.
    """
    _require_table(token_ids, columns=2)
    logits = _logits(model, token_ids, attention_mask)[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1).float(), token_ids[:, 1:].flatten(), reduction="none")
    if weights is not None:
        of_targets = weights[:, 1:].flatten()
        losses = losses.masked_fill(of_targets == 0, 0.0) * of_targets
    if attention_mask is None and maskable is None:
        return losses.mean() if per == "token" else losses.sum() / len(token_ids)
    counts = _counted(token_ids, attention_mask, maskable, 1)[:, 1:].flatten()
    return losses.masked_fill(~counts, 0.0).sum() / (counts.sum() if per == "token" else len(token_ids))


def priced_tokens(token_ids: Tensor, attention_mask: Tensor | None = None, maskable: Tensor | None = None) -> int:
    """How many tokens `causal_loss` divides by. Raises: RevprobeError, for a row without any."""
    if attention_mask is None and maskable is None:
        return len(token_ids) * (token_ids.shape[1] - 1)
    return int(_counted(token_ids, attention_mask, maskable, 1)[:, 1:].sum())


def _counted(token_ids: Tensor, attention_mask: Tensor | None, maskable: Tensor | None, shift: int) -> Tensor:
    """The positions that are predicted: not padding, inside `maskable`, and with a row to be read at."""
    counted = torch.ones_like(token_ids, dtype=torch.bool) if maskable is None else maskable.bool().clone()
    counted[:, :shift] = False
    if attention_mask is not None:
        counted &= attention_mask.bool()
    empty = ~counted.any(1)
    if bool(empty.any()):
        row = int(empty.nonzero()[0, 0])
        raise RevprobeError(
            f"row {row} of a batch ({token_ids[row].tolist()}) has no token to predict; expected at least one in each"
        )
    return counted


def _logits(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    # No attention_mask unless the caller padded: passing all ones costs a mask per layer and may pick a slower kernel.
    extra: dict[str, Any] = {} if attention_mask is None else {"attention_mask": attention_mask}
    output = model(input_ids=input_ids, **extra)
    return output if isinstance(output, Tensor) else output.logits


def _require_plain_rates(rates: str, masks: str | int, weigh: Any, block_size: int) -> None:
    if (rates, masks, weigh) != ("independent", "rate", None):
        raise RevprobeError(
            f"rates={rates!r}, masks={masks!r} or a dial of negatives in blocks of {block_size}: expected independent "
            "rates, one a block; leave them out, or train on the whole text"
        )


def _require_table(token_ids: Tensor, columns: int = 1) -> None:
    if token_ids.ndim != 2 or token_ids.shape[0] == 0 or token_ids.shape[1] < columns:
        raise RevprobeError(
            f"training ids of shape {tuple(token_ids.shape)}: expected (batch, seq), batch >= 1 and seq >= {columns}"
        )
