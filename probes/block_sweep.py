"""Block size as a dial: one set of pairs read by one masked model from token by token to all at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from ..arguments import checked
from ..errors import RevprobeError
from ..models.peft_adapters import own_parameters
from ..models.probed import ProbedModel, as_probed
from ..progress import shows_progress
from .fused import probe
from .pairs.pairs import ReversalPairs
from .passes.asked import asked_pairs
from .passes.batches import prepare_queries
from .readings.block_sweep import BlockSweep, Size, size_text


@checked
@shows_progress("queries", reads=lambda size, done, total: (done, total, size_text(size)))
def block_sweep(
    model: ProbedModel | nn.Module,
    pairs: ReversalPairs,
    *,
    sizes: Sequence[int | None] | None = None,
    only: Sequence[str] | None = None,
    mode: str = "chain",
    batch_size: int | None = None,
    control: bool = True,
    seed: int = 0,
    progress: Callable[[Size, int, int], None] | bool | None = None,
) -> BlockSweep:
    """Read one set of pairs with a masked model's attention in blocks of several sizes, from causal to whole.

    At size 1 every token sees itself and those before it, as in a causal model; at None every token sees every other.
    A model was trained with one of these masks (`model.reads`); any other is a dial on it, not a model of its own.
    Pairs of kind same_target have one direction whose evidence stands behind the target: at size 1 none of them has
    both queries in sight, and the correlation and the cosine begin at the first size that shows some. Pairs of kind
    swapped, with the target last, are in sight at every size.

    Args:
        sizes: tokens of a block, None for the whole text; powers of two up to the longest query, then None, by default.
        only, mode, batch_size, control, seed: as in `probe`; the seed is also that of the draws behind the intervals.
        progress: called with the size, queries done and queries in all; None shows a bar, False nothing.
    Raises: RevprobeError, for a causal model, a size below 1, one named twice, and whatever the probes raise.
    """
    model = as_probed(model)
    if model.objective == "causal":
        raise RevprobeError(
            f"{model.name} is causal and reads token by token at every size; expected a masked model, or the same "
            "weights loaded as one"
        )
    asked = _sizes(model, pairs, only) if sizes is None else _ordered(sizes)
    options: dict[str, Any] = {"only": only, "mode": mode, "batch_size": batch_size, "control": control, "seed": seed}
    readings = {}
    for size in asked:
        told = partial(progress, size) if callable(progress) else None
        read = model.in_blocks(size)
        readings[size] = probe(read, pairs, parameters=own_parameters(read.module), progress=told, **options)
    return BlockSweep(readings, seed)


def _sizes(model: ProbedModel, pairs: ReversalPairs, only: Sequence[str] | None) -> list[Size]:
    """Powers of two up to the longest query as it is run, then the whole text."""
    lists = [asked_pairs(model, pairs, name) for name in only or ["", *pairs.by_probe]]
    longest = max(len(q.token_ids) for one in lists for q in prepare_queries(model, one.queries))
    powers: list[Size] = [2**power for power in range(longest.bit_length()) if 2**power <= longest]
    return [*powers, None]


def _ordered(sizes: Sequence[Size]) -> list[Size]:
    """Ascending, None last. Raises: RevprobeError, for none, one named twice, or one that is no size."""
    wrong = [size for size in sizes if size is not None and (isinstance(size, bool) or size < 1)]
    if wrong or not len(sizes):
        raise RevprobeError(f"sizes {list(sizes)!r}: expected whole numbers of at least 1, or None for the whole text")
    twice = [size for size in sizes if list(sizes).count(size) > 1]
    if twice:
        raise RevprobeError(f"size {size_text(twice[0])} is named twice; each is read once")
    return sorted(sizes, key=lambda size: float("inf") if size is None else size)
