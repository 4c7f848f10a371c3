"""One pair down to its tokens: its queries, and the attention from the readout row to every token of them.

Readings keep scores of the evidence alone, so the checkpoint they were taken from is run once more on the two queries.
The pairs are made again from the run's config and must have the digest that the reading states; the score of the
evidence comes out of the same run and stands beside the reading's.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from ...errors import RevprobeError
from ...probes.pairs.pairs import ReversalPairs
from ...probes.passes.batches import prepare_queries
from ...probes.readings.reading import Reading
from ..asking.read_query import ReadQuery, read_query
from .folder import RunsFolder
from .held_model import HeldModel
from .listed_runs import Listed

SAME = 1e-3  # two runs of one checkpoint differ by rounding; a score further off is another model's


@dataclass(frozen=True)
class OpenedPair:
    """A pair's two queries, run through one checkpoint; `hidden` says whether the targets were masked."""

    forward: ReadQuery
    reverse: ReadQuery
    hidden: bool


class PairOpener:
    """Opens pairs of a folder's runs."""

    def __init__(self, runs: RunsFolder, held: HeldModel | None = None) -> None:
        self.held = HeldModel(runs) if held is None else held

    def open(self, run: Listed, reading: Reading, pair: int) -> OpenedPair:
        """Run the reading's checkpoint on one of its pairs.

        Args:
            reading: of attention; its step, weights and pairs are those that are opened.
        Raises: RevprobeError, as `HeldModel.pairs`, and when the pairs that the config gives are not the reading's.
        """
        step, weights = int(reading.meta.get("step") or 0), str(reading.meta.get("weights") or "raw")
        with self.held.lock:
            model, pairs = self.held.model(run, step, weights), self.held.pairs(run, step, weights)
            require_pair(pairs, reading, pair, run.key)
            queries = prepare_queries(model, pairs.queries)
            forward, reverse = (read_query(model, queries[index[pair]]) for index in (pairs.forward, pairs.reverse))
        return OpenedPair(forward, reverse, model.objective == "masked")


def require_pair(pairs: ReversalPairs, reading: Reading, pair: int, called: str) -> None:
    """Raises: RevprobeError, when these are not the reading's pairs, or there is no such pair among them."""
    if not pairs.has_digest(reading.meta.get("pairs")):
        raise RevprobeError(f"the pairs of {called}'s config are not those of this reading; its tokens are not known")
    if not 0 <= pair < len(pairs):
        raise RevprobeError(f"no pair {pair} in {called}: expected 0 to {len(pairs) - 1}")


def disagreement(opened: OpenedPair, row: pd.Series) -> float:
    """How far the evidence's scores of this run are from those of the reading's row, the larger of both directions."""
    layer, head = int(row["layer"]), int(row["head"])
    return max(
        abs(float(getattr(opened, side).scores[layer][head]) - float(row[f"score_{side}"]))
        for side in ("forward", "reverse")
    )
