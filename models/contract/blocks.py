"""Whether a module heeds the mask of who sees whom: a later token of a block reaches back, one of a later block not."""

from __future__ import annotations

import torch

from ...errors import RevprobeError
from .called import CalledModule
from .trial import LENGTH, ordinary_ids, trial_row

# The rule is the same for all sizes, and two blocks of more tokens would cost a large model a long run.
_LARGEST = 4


def require_blocks(called: CalledModule, mask_token_id: int | None, first_row: int) -> None:
    """Runs of one row: as it is, with the last token of the first block changed, and with the first of the second.

    Each by itself: in a batch, equal rows may come out differently by rounding.

    Args:
        first_row: logits rows before that of the first token.
    Raises: RevprobeError, when a module takes no mask, a later block reaches back, or a block's own later token does
        not.
    """
    if not called.takes_padding:
        raise RevprobeError(
            f"{called.name} takes no attention_mask, so it cannot be read in blocks; leave block_size out"
        )
    assert called.block_size is not None, "asked of models that are read in blocks"
    size = min(called.block_size, _LARGEST)
    length = min(max(LENGTH, size + 1), called.max_length or LENGTH)
    if length <= size:
        return
    tried = CalledModule(called.module, called.name, size)
    ids = ordinary_ids(called, 2 * LENGTH)
    plain = trial_row(ids, 0, length, mask_token_id)
    rows = [plain]
    for place in (size - 1, size):
        other = plain.clone()
        other[place] = next((i for i in reversed(ids) if i != int(plain[place])), int(plain[place]))
        rows.append(other)
    with torch.no_grad():
        runs = [tried.run(row[None].to(called.device))[0] for row in rows]
    out = torch.stack(runs)[:, first_row : first_row + length]
    own, later = (bool((out[0, : size - 1] != out[k, : size - 1]).any()) for k in (1, 2))
    edge = bool((out[0, size - 1] != out[2, size - 1]).any())
    if later or edge:
        raise RevprobeError(
            f"{called.name}, read in blocks of {size}: a token of the next block changes logits of the block before, "
            "so the module does not heed a mask of who sees whom; leave block_size out"
        )
    if size > 1 and not own and bool((out[0] != out[2]).any()):
        raise RevprobeError(
            f"{called.name}, read in blocks of {size}: a later token of a block does not reach its earlier ones; it is "
            "causal inside: load it with objective='causal', or as the family that it belongs to"
        )
