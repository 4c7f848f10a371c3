"""The full fact x fact matrix of gradient cosines: forward query of one fact against reverse query of another."""

from __future__ import annotations

import numpy as np
import pandas as pd

from ..errors import RevprobeError
from ..models.probed import ProbedModel
from .pairs.pairs import ReversalPairs
from .passes.batches import default_batch_size
from .passes.run import Plan, run_pass

# Queries run about (facts / batch) times each; beyond this many cells that is hours.
MOST_CELLS = 250_000


def cross_cosines(model: ProbedModel, pairs: ReversalPairs, plan: Plan) -> pd.DataFrame:
    """Cosine of every forward gradient with every reverse gradient of the same group, averaged over groups.

    Returns: facts (forward) x facts (reverse); the diagonal is what the probe reports, NaN where two facts share no
        group or a norm is below its rounding level.
    Raises: RevprobeError, when there are more than MOST_CELLS combinations.
    """
    left, right = _combinations(model, pairs, plan.batch_size)
    # Labels that sort as the combinations are ordered, block by block, so that batches share queries.
    places = np.array([f"{n:09d}" for n in range(len(left))], dtype=object)
    crossed = ReversalPairs(pairs.queries, pairs.forward[left], pairs.reverse[right], places, pairs.kind)
    summed = Plan(
        gradient=True,
        parameters=plan.parameters,
        control=False,
        batch_size=plan.batch_size,
        seed=plan.seed,
        progress=plan.progress,
        summed=True,
    )
    result = run_pass(model, crossed, summed)
    forward, reverse = result.norm[crossed.forward, 0], result.norm[crossed.reverse, 0]
    loud = (forward > result.floor[crossed.forward, 0]) & (reverse > result.floor[crossed.reverse, 0])
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = np.where(loud, result.inner[:, 0] / (forward * reverse), np.nan)
    facts = pairs.facts.astype(str)
    table = pd.DataFrame({"forward": facts[left], "reverse": facts[right], "cosine": cosine})
    return table.pivot_table(index="forward", columns="reverse", values="cosine", aggfunc="mean")


def _combinations(model: ProbedModel, pairs: ReversalPairs, batch_size: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Every ordered couple of pairs of one group, in blocks that fit a batch."""
    groups = pairs.groups(model.logit_shift)
    cells = int((np.bincount(groups) ** 2).sum())
    if cells > MOST_CELLS:
        raise RevprobeError(
            f"cross=True over {len(pairs)} pairs makes {cells:,} combinations, over {MOST_CELLS:,}; take fewer"
        )
    order = np.argsort(groups, kind="stable")
    couples = [
        np.stack(np.meshgrid(members, members, indexing="ij"), -1).reshape(-1, 2)
        for members in np.split(order, np.cumsum(np.bincount(groups))[:-1])
    ]
    left, right = np.concatenate(couples).T
    block = max(1, (batch_size or default_batch_size(model, pairs.queries)) // 2)
    rank = np.empty(len(pairs), dtype=int)
    rank[order] = np.arange(len(pairs))
    blocked = np.lexsort((rank[right], rank[left], rank[right] // block, rank[left] // block))
    return left[blocked], right[blocked]
