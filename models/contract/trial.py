"""The few short runs a module is judged by, and what was seen in them.

    plain     three different rows of n tokens
    changed   the same, but for the last token of the first row and the first token of the last
    alone     the middle row by itself
    padded    that row padded to T tokens, between two rows of T tokens
    refilled  the same, but for what stands behind the padding and for the second half of the first row

Runs of equal shapes do the same arithmetic, so in them a row's logits stay equal to the bit unless something reaches
them; only a mixture of experts sorts other rows' tokens into the same products. Then autograd is asked: what does not
reach a logit has a gradient of exactly zero.

Tokens are ordinary ones, from the middle of the vocabulary: special ids mean something of their own to some models
(XLM works lengths out from its padding id). The mask token alone stands in every row, as it does in every query.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import RevprobeError, first_line
from ...hooks.attention_calls import FunctionMode, sdpa_call, softmaxed
from . import introspect
from .called import CalledModule, require_numbers

LENGTH, PADDING = 12, 4  # tokens of the longest run, and how many of them are padding
# A change below this many units of rounding, relative to the largest logit, may be rounding: autograd decides.
_ROUNDING = 64.0
_MIXED = (F.linear, torch.matmul, torch.bmm, torch.addmm, Tensor.matmul, Tensor.__matmul__, F.conv1d)


@dataclass(frozen=True)
class FirstAttention:
    """The first attention call of a run.

    Shapes: `query`: `3 heads rows dim`, `key`: `3 heads columns dim`; or `score`: `3 heads rows columns`.
    """

    query: Tensor | None = None
    key: Tensor | None = None
    score: Tensor | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Query rows and key columns."""
        if self.score is not None:
            return self.score.shape[-2], self.score.shape[-1]
        assert self.query is not None and self.key is not None
        return self.query.shape[-2], self.key.shape[-2]


@dataclass(frozen=True)
class Run:
    """One run of the module. Shapes: `ids`, `mask`: `rows tokens`; `logits`: `rows tokens_out vocab`."""

    ids: Tensor
    logits: Tensor
    mask: Tensor | None = None
    attention: FirstAttention | None = None
    dtypes: frozenset[torch.dtype] = frozenset()


@dataclass(frozen=True)
class Trial:
    """The runs of one module; `refusal` says why it could not be run with padding, `drew` whether it drew at random."""

    called: CalledModule
    plain: Run
    changed: Run
    alone: Run
    padded: Run | None = None
    refilled: Run | None = None
    refusal: str = ""
    drew: bool = False

    @property
    def tokens(self) -> int:
        return self.plain.ids.shape[1]

    @property
    def spread(self) -> float:
        """Standard deviation of the finite logits: the unit differences are measured in."""
        logits = self.plain.logits
        return float(logits[logits.isfinite()].float().std(correction=0))

    @property
    def arithmetic(self) -> torch.dtype:
        """The narrowest floating type that its products were taken in: autocast narrows them below the weights'."""
        return min(self.plain.dtypes or {self.called.dtype}, key=lambda kind: kind.itemsize)

    def moved(self, one: Tensor, other: Tensor) -> float:
        """The largest difference of two tables of logits, in spreads; 0.0 only where they are equal to the bit."""
        apart = one != other  # -inf - -inf would be NaN
        if not apart.any():
            return 0.0
        return float((one[apart].double() - other[apart].double()).abs().max()) / (self.spread or 1.0)

    def may_be_rounding(self, moved: float) -> bool:
        return moved * (self.spread or 1.0) <= rounding(self.plain.logits, self.arithmetic)


def rounding(logits: Tensor, arithmetic: torch.dtype) -> float:
    """By how much rounding may move some logits, products being taken in a type."""
    return _ROUNDING * torch.finfo(arithmetic).eps * float(logits[logits.isfinite()].abs().max())


class _HasTokens(Protocol):
    module: nn.Module

    @property
    def vocab_size(self) -> int: ...


def ordinary_ids(called: _HasTokens, count: int) -> list[int]:
    """Token ids that mean nothing special, from the middle of the vocabulary outwards; fewer where there are fewer."""
    middle, special = called.vocab_size // 2, introspect.special_ids(called.module)
    outwards = sorted(range(max(0, middle - 64), min(called.vocab_size, middle + 64)), key=lambda i: abs(i - middle))
    usual = [i for i in outwards if i not in special]
    return (usual if len(usual) > 1 else outwards)[:count]


def run_trial(called: CalledModule, mask_token_id: int | None = None) -> Trial:
    """Make the runs: five forward passes of at most 3 rows x 12 tokens.

    Raises: RevprobeError, for a module that cannot be run, gives no row of logits for its tokens, or gives NaN.
    """
    longest = min(LENGTH, called.max_length or LENGTH)
    tokens = max(min(2, longest), longest - PADDING)
    words = _Words(ordinary_ids(called, 2 * LENGTH), mask_token_id)
    plain = torch.stack([words.row(start, tokens) for start in range(3)])
    changed = plain.clone()
    changed[0, -1], changed[2, 0] = words.other(plain[0, -1]), words.other(plain[2, 0])
    before = _random_states(called.device)
    first, second, alone = (_run(called, ids.to(called.device)) for ids in (plain, changed, plain[1:2]))
    trial = Trial(called, first, second, alone)
    trial = replace(trial, drew=_random_states(called.device) != before)
    if tokens == longest or not called.takes_padding:
        return replace(trial, refusal="" if called.takes_padding else "takes no attention_mask")
    mask = torch.ones(3, longest, dtype=torch.long, device=called.device)
    mask[1, tokens:] = 0
    padded = torch.stack([words.row(start, longest) for start in (3, 0, 4)])
    padded[1] = torch.cat([plain[1], torch.zeros(longest - tokens, dtype=torch.long)])
    refilled = padded.clone()
    refilled[0, longest // 2 :] = torch.stack([words.other(i) for i in padded[0, longest // 2 :]])
    refilled[1, tokens:] = words.row(LENGTH, longest - tokens)  # none of the row's own words
    try:
        runs = [_run(called, ids.to(called.device), mask) for ids in (padded, refilled)]
    except RevprobeError as error:
        return replace(trial, refusal=f"cannot run a padded batch ({error})")
    return replace(trial, padded=runs[0], refilled=runs[1])


def trial_row(ids: list[int], start: int, length: int, mask_token_id: int | None) -> Tensor:
    """A row of `length` of some ids, from number `start` on; the mask token stands second in four and more."""
    return _Words(ids, mask_token_id).row(start, length)


class _Words:
    """Rows of token ids, the mask token second in those of four and more."""

    def __init__(self, ids: list[int], mask_token_id: int | None) -> None:
        self.ids, self.mask = ids, mask_token_id

    def row(self, start: int, length: int) -> Tensor:
        row = torch.tensor([self.ids[(start + k) % len(self.ids)] for k in range(length)], dtype=torch.long)
        if self.mask is not None and length >= 4:
            row[1] = self.mask
        return row

    def other(self, token: Tensor) -> Tensor:
        """Another id than this one."""
        return torch.tensor(next((i for i in reversed(self.ids) if i != int(token)), int(token)))


def _random_states(device: torch.device) -> tuple[object, ...]:
    """The states of the generators that a forward pass may draw from."""
    states = [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
    name, keys, *rest = np.random.get_state(legacy=True)
    return (*(state.numpy().tobytes() for state in states), random.getstate(), name, np.asarray(keys).tobytes(), *rest)


def _run(called: CalledModule, ids: Tensor, mask: Tensor | None = None) -> Run:
    seen = _Watch(len(ids))
    try:
        with torch.no_grad(), FunctionMode(seen.watch):
            logits = called.run(ids, mask)
    except RevprobeError:
        raise
    except Exception as error:
        raise RevprobeError(
            f"{called.name} cannot be run on {len(ids)} x {ids.shape[1]} token ids: {first_line(error)}; expected a "
            "language model that takes input_ids and gives logits"
        ) from error
    if not isinstance(logits, Tensor) or logits.dim() != 3 or len(logits) != len(ids):
        raise RevprobeError(
            f"{called.name} gives {tuple(getattr(logits, 'shape', ())) or type(logits).__name__} for {len(ids)} x "
            f"{ids.shape[1]} token ids; expected logits of shape batch x tokens x vocabulary"
        )
    return Run(ids, require_numbers(called, logits.detach()), mask, seen.first, frozenset(seen.dtypes))


class _Watch:
    """Keeps the first attention call of a run, and the types its products are taken in."""

    def __init__(self, batch: int) -> None:
        self.batch, self.dtypes = batch, set[torch.dtype]()
        self.first: FirstAttention | None = None

    def watch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.first is None and func is F.scaled_dot_product_attention:
            call = sdpa_call(args, kwargs)
            self._keep(query=call["query"], key=call["key"])
        elif self.first is None and (found := softmaxed(func, args, kwargs)) is not None and found[1] == 3:
            self._keep(score=found[0])
        out = func(*args, **kwargs)
        if func in _MIXED and isinstance(out, Tensor) and out.is_floating_point():
            self.dtypes.add(out.dtype)
        return out

    def _keep(self, **tensors: Tensor) -> None:
        if all(tensor.dim() == 4 and len(tensor) == self.batch for tensor in tensors.values()):
            self.first = FirstAttention(**{name: tensor.detach().clone() for name, tensor in tensors.items()})
