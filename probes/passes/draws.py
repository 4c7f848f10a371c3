"""Means over draws of random tokens, of a model that has these in place of a mask token, and those without each draw.

Such a model answers differently for each filling of its canvas, so a reading is a mean over a stated number of them:

    probability   of the mean distribution over draws, at each step of a chain
    score, weight their means over draws
    gradient      of the mean loss over draws

The same draws stand under every query. A reading without one of them says how far the number rests on it: the jackknife
makes the draws' standard error out of these (`standard_error`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def kept_draws(draws: int) -> list[list[int]]:
    """All draws, and then all but each in turn; of one draw none can be left out."""
    every = list(range(draws))
    return [every] + ([every[:n] + every[n + 1 :] for n in every] if draws > 1 else [])


def mean_likelihood(log_probabilities: Tensor, draws: int, kept: Sequence[int]) -> Tensor:
    """The logarithm of the mean probability. Shapes: `(query draw) ... -> query ...`."""
    if draws == 1:
        return log_probabilities
    by_draw = log_probabilities.unflatten(0, (-1, draws))[:, list(kept)]
    return by_draw.logsumexp(1) - torch.tensor(len(kept), dtype=by_draw.dtype).log()


def mean_rows(values: Tensor, draws: int, kept: Sequence[int]) -> np.ndarray:
    """Shapes: `(query draw) ... -> query ...`, float64."""
    return values.double().unflatten(0, (-1, draws))[:, list(kept)].mean(1).cpu().numpy()


def every_two(indices: np.ndarray, draws: int, *, first: bool) -> Tensor:
    """Rows of examples for each two draws of a product's sides. Shapes: `product -> (product draw draw)`."""
    one, other = np.divmod(np.arange(draws**2), draws)
    return torch.as_tensor((indices[:, None] * draws + (one if first else other)).reshape(-1))


def mean_products(values: np.ndarray, draws: int, kept: Sequence[int]) -> np.ndarray:
    """Products of mean gradients, from those of each two draws. Shapes: `(product draw draw) c -> product c`."""
    by_draw = values.reshape(-1, draws, draws, values.shape[-1])
    return by_draw[:, list(kept)][:, :, list(kept)].mean((1, 2))


def mean_floor(floors: np.ndarray, draws: int, kept: Sequence[int]) -> np.ndarray:
    """The rounding level of a mean gradient: roundings add like a random walk. Shapes: `(query draw) c -> query c`."""
    by_draw = floors.reshape(-1, draws, floors.shape[-1])[:, list(kept)]
    return np.sqrt((by_draw**2).sum(1)) / len(kept)


def standard_error(without: np.ndarray) -> np.ndarray:
    """The draws' standard error of a number, from its values without each draw; that of a mean, if it is one.

    Shapes: `draw ... -> ...`. Source: Efron and Tibshirani 1993, An introduction to the bootstrap, Sec. 11.2.
    """
    draws = len(without)
    return np.sqrt((draws - 1) / draws * ((without - without.mean(0)) ** 2).sum(0))
