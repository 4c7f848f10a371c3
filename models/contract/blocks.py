"""Whether a module heeds the mask of who sees whom: a later token of a block reaches back, one of a later block not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import RevprobeError
from .called import CalledModule
from .trial import LENGTH, ordinary_ids, rounding, trial_row
from .witness import reaching, with_gradient

# The rule is the same for all sizes, and two blocks of more tokens would cost a large model a long run.
_LARGEST = 4


def require_mask_argument(called: CalledModule) -> None:
    """Raises: RevprobeError, for a module that is read in blocks and cannot be told who sees whom."""
    if called.block_size is not None and not called.takes_padding:
        raise RevprobeError(
            f"{called.name} takes no attention_mask, so it cannot be read in blocks; leave block_size out, or let its "
            "forward take one"
        )


def require_blocks(
    called: CalledModule, mask_token_id: int | None, first_row: int, narrowed: torch.dtype | None = None
) -> None:
    """Runs of one row: as it is, with the last token of the first block changed, and with the first of the second.

    Each by itself: in a batch, equal rows may come out differently by rounding. In a mixture of experts a later token
    joins the others in their products, which rounds earlier logits otherwise: there autograd says what reaches them.
    Args:
        first_row: logits rows before that of the first token.
        narrowed: the type that products are taken in where it is narrower than the weights'.
    Raises: RevprobeError, when a later block reaches back, or a block's own later token does not.
    """
    assert called.block_size is not None, "asked of models that are read in blocks"
    size = min(called.block_size, _LARGEST)
    length = min(max(LENGTH, size + 1), called.max_length or LENGTH)
    if length <= size:
        return
    ids = ordinary_ids(called, 2 * LENGTH)
    plain = trial_row(ids, 0, length, mask_token_id).to(called.device)
    tried = CalledModule(called.module, called.name, size)
    row = _Row(tried, plain, ids, slice(first_row, first_row + length), narrowed or called.dtype)
    if row.reaches(size, size):
        raise RevprobeError(
            f"{called.name}, read in blocks of {size}: a token of the next block changes logits of the block before, "
            "so the module does not heed a mask of who sees whom; leave block_size out"
        )
    if size > 1 and not row.reaches(size - 1, size - 1) and row.reaches(size, length):
        raise RevprobeError(
            f"{called.name}, read in blocks of {size}: a later token of a block does not reach its earlier ones; it is "
            "causal inside: load it with objective='causal', or as the family that it belongs to"
        )


@dataclass(frozen=True)
class _Row:
    """One row of tokens, the ids that may stand in their places, and where the logits of the tokens are."""

    called: CalledModule
    plain: Tensor
    ids: list[int]
    rows: slice
    arithmetic: torch.dtype

    def reaches(self, place: int, earlier: int) -> bool:
        """Whether the token at a place reaches the logits of the first `earlier` tokens."""
        other = self.plain.clone()
        other[place] = next((i for i in reversed(self.ids) if i != int(other[place])), int(other[place]))
        with torch.no_grad():
            one, two = (self.called.run(row[None])[0, self.rows][:earlier] for row in (self.plain, other))
        apart = one != two  # -inf - -inf would be NaN
        if not apart.any():
            return False
        if float((one[apart].double() - two[apart].double()).abs().max()) > rounding(one, self.arithmetic):
            return True
        seen = with_gradient(
            self.called,
            self.plain[None],
            None,
            lambda out, embedded: reaching([out[0, self.rows][:earlier]], embedded)[0, place:].any(),
        )
        return seen is None or bool(seen)
