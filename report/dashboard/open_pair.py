"""One pair down to its tokens: its queries, and the attention from the readout row to every token of them.

Readings keep scores of the evidence alone, so the checkpoint they were taken from is run once more on the two queries.
The pairs are made again from the run's config and must have the digest that the reading states; the score of the
evidence comes out of the same run and stands beside the reading's. Model, adapter base and relation file are read only
where they lie inside the dashboard's folder.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ...errors import RevprobeError
from ...finetune.runs.finetuning import FinetuneRun
from ...finetune.runs.open import open_run
from ...models.checkpoints import checkpoint_folder
from ...models.hub import quiet_transformers
from ...models.peft_adapters import ADAPTER_CONFIG, base_of, is_adapter
from ...models.probed import ProbedModel
from ...models.registry import load_model
from ...probes.pairs.pairs import ReversalPairs
from ...probes.passes.batches import prepare_queries
from ...probes.readings.reading import Reading
from ..asking.read_query import ReadQuery, read_query
from .folder import RunsFolder
from .listed_runs import Listed

SAME = 1e-3  # two runs of one checkpoint differ by rounding; a score further off is another model's


@dataclass(frozen=True)
class OpenedPair:
    """A pair's two queries, run through one checkpoint; `hidden` says whether the targets were masked."""

    forward: ReadQuery
    reverse: ReadQuery
    hidden: bool


class PairOpener:
    """Opens pairs of a folder's runs; keeps the last checkpoint loaded."""

    def __init__(self, runs: RunsFolder) -> None:
        self.runs = runs
        self._lock = threading.Lock()  # one forward pass at a time: RNG state and hooks are the module's
        self._held: tuple[object, ProbedModel, ReversalPairs] | None = None

    def open(self, run: Listed, reading: Reading, pair: int) -> OpenedPair:
        """Run the reading's checkpoint on one of its pairs.

        Args:
            reading: of attention; its step, weights and pairs are those that are opened.
        Raises: RevprobeError, when the checkpoint is missing or damaged, something it needs lies outside the folder,
            or the pairs that the config gives are not the reading's.
        """
        step, weights = int(reading.meta.get("step") or 0), str(reading.meta.get("weights") or "raw")
        with self._lock:
            model, pairs = self._loaded(run, step, weights)
            if pairs.digest != reading.meta.get("pairs"):
                raise RevprobeError(
                    f"the pairs of {run.key}'s config are not those of this reading; its tokens are not known"
                )
            if not 0 <= pair < len(pairs):
                raise RevprobeError(f"no pair {pair} in {run.key}: expected 0 to {len(pairs) - 1}")
            queries = prepare_queries(model, pairs.queries)
            forward, reverse = (read_query(model, queries[index[pair]]) for index in (pairs.forward, pairs.reverse))
        return OpenedPair(forward, reverse, model.objective == "masked")

    def _loaded(self, run: Listed, step: int, weights: str) -> tuple[ProbedModel, ReversalPairs]:
        folder = self.runs.folder_of(run)
        checkpoint, *_ = checkpoint_folder(folder, step, weights)
        place = (checkpoint, checkpoint.stat().st_mtime_ns)
        if self._held is None or self._held[0] != place:
            self._held = None  # the old model's memory, before the new one takes its own
            self._require_inside(folder, checkpoint)
            with quiet_transformers():
                model = load_model(folder, step=step, weights=weights, device="cpu")
                self._held = (place, model, self._pairs(folder, model))
        return self._held[1], self._held[2]

    def _require_inside(self, folder: Path, checkpoint: Path) -> None:
        """Raises: RevprobeError, when the checkpoint or the base of its adapter is not wholly inside RUNS_DIR."""
        self.runs.require_no_way_out(folder)
        if is_adapter(checkpoint):
            base = base_of(checkpoint)
            if not isinstance(base, Path):
                raise RevprobeError(
                    f"its base model {base!r} is not inside {self.runs.root}, and a dashboard reads nothing outside; "
                    "look at this pair with revprobe.load_model in a notebook"
                )
            checkpoint = self.runs.confined(base)
            self.runs.require_no_way_out(checkpoint)
        if (checkpoint / ADAPTER_CONFIG).exists():  # transformers would go and load the base that it names
            raise RevprobeError(f"{checkpoint} is a model and an adapter at once, which no run writes: not read")

    def _pairs(self, folder: Path, model: ProbedModel) -> ReversalPairs:
        run = open_run(folder)
        chosen = run.config.relation
        if isinstance(run, FinetuneRun) and chosen.name != "invented_names":
            if chosen.path is None or not Path(chosen.path).exists():
                raise RevprobeError(
                    f"its relation {chosen.name!r} is no file inside {self.runs.root}, and a dashboard reads nothing "
                    "outside; its tokens are not known here"
                )
            self.runs.confined(Path(chosen.path))
        return run.pairs(model).for_probe("attention")


def disagreement(opened: OpenedPair, row: pd.Series) -> float:
    """How far the evidence's scores of this run are from those of the reading's row, the larger of both directions."""
    layer, head = int(row["layer"]), int(row["head"])
    return max(
        abs(float(getattr(opened, side).scores[layer][head]) - float(row[f"score_{side}"]))
        for side in ("forward", "reverse")
    )
