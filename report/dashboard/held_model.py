"""The one model that the dashboard holds: loaded when it is asked for, its memory looked at first, let go for another.

Model, adapter base and relation file are read only where they lie inside the dashboard's folder.
"""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import psutil

from ...errors import RevprobeError
from ...finetune.runs.finetune_setup import snapshot_pairs, text_relation
from ...finetune.runs.finetuning import FinetuneRun
from ...finetune.runs.open import open_run
from ...finetune.runs.relation_copy import RELATION
from ...models.checkpoints import checkpoint_folder
from ...models.hub import quiet_transformers
from ...models.peft_adapters import ADAPTER_CONFIG, base_of, is_adapter
from ...models.probed import ProbedModel
from ...models.registry import load_model
from ...probes.pairs.pairs import ReversalPairs
from .folder import RunsFolder
from .listed_runs import Listed

GB = 10**9
# Beside the weights: what a run of the model takes, and what reading the files does for a moment.
WORKING, RESERVE = 1.25, 200_000_000


class HeldModel:
    """The last checkpoint that was asked for, with its run's pairs; hold `lock` while its module is run."""

    def __init__(self, runs: RunsFolder) -> None:
        self.runs = runs
        self.lock = threading.RLock()  # one forward pass at a time: RNG state and hooks are the module's
        self._place: object = None
        self._model: ProbedModel | None = None
        self._pairs: ReversalPairs | None = None

    def model(self, run: Listed, step: int, weights: str) -> ProbedModel:
        """The model of a run's checkpoint.

        Raises: RevprobeError, when the checkpoint is missing or damaged, something it needs lies outside the folder, or
            there is not the memory for it.
        """
        with self.lock:
            folder = self.runs.folder_of(run)
            checkpoint, *_ = checkpoint_folder(folder, step, weights)
            place = (checkpoint, checkpoint.stat().st_mtime_ns)
            if self._model is None or self._place != place:
                self.let_go()  # the old model's memory, before the new one takes its own
                parts = self._require_inside(folder, checkpoint)
                require_memory(f"{run.key} at step {step}", parts)
                with quiet_transformers():
                    self._model = load_model(folder, step=step, weights=weights, device="cpu")
                self._place = place
            return self._model

    def pairs(self, run: Listed, step: int, weights: str) -> ReversalPairs:
        """The pairs that the run's readings of attention are taken on, made again from its config.

        Raises: RevprobeError, as `model`, and when its relation is no file inside the folder.
        """
        with self.lock:
            model = self.model(run, step, weights)
            if self._pairs is None:
                self._pairs = self._made_pairs(self.runs.folder_of(run), model)
            return self._pairs

    def let_go(self) -> None:
        """Hold nothing."""
        with self.lock:
            self._place = self._model = self._pairs = None
            gc.collect()

    def _require_inside(self, folder: Path, checkpoint: Path) -> list[Path]:
        """The folders that the weights are read from.

        Raises: RevprobeError, when the checkpoint or the base of its adapter is not wholly inside RUNS_DIR.
        """
        self.runs.require_no_way_out(folder)
        read = [checkpoint]
        if is_adapter(checkpoint):
            base = base_of(checkpoint)
            if not isinstance(base, Path):
                raise RevprobeError(
                    f"its base model {base!r} is not inside {self.runs.root}, and a dashboard reads nothing outside; "
                    "look at this pair with revprobe.load_model in a notebook"
                )
            checkpoint = self.runs.confined(base)
            self.runs.require_no_way_out(checkpoint)
            read.append(checkpoint)
        if (checkpoint / ADAPTER_CONFIG).exists():  # transformers would go and load the base that it names
            raise RevprobeError(f"{checkpoint} is a model and an adapter at once, which no run writes: not read")
        return read

    def _made_pairs(self, folder: Path, model: ProbedModel) -> ReversalPairs:
        run = open_run(folder)
        if isinstance(run, FinetuneRun) and run.config.relation.name != "invented_names":
            inside = run.config.relation.model_copy(update={"path": str(self._relation_file(run))})
            config = run.config.model_copy(update={"relation": inside})
            return snapshot_pairs(config, text_relation(config), model).for_probe("attention")
        return run.pairs(model).for_probe("attention")

    def _relation_file(self, run: FinetuneRun) -> Path:
        """The file or folder of a run's facts: that of its config, or a copy of it in the run's folder.

        Raises: RevprobeError, when neither is inside RUNS_DIR.
        """
        chosen = run.config.relation
        named = Path(chosen.path or chosen.name)
        copied = run.path / RELATION / named.name
        for file in (copied, named):
            if file.exists() and file.resolve().is_relative_to(self.runs.root):
                return file
        raise RevprobeError(
            f"its facts, {str(named)!r}, are not inside {self.runs.root}, and a dashboard reads nothing outside; copy "
            f"them to {str(copied.relative_to(self.runs.root))!r} there, or ask in sentences"
        )


def require_memory(what: str, folders: list[Path]) -> None:
    """Raises: RevprobeError, when the weights in these folders and a run of the model do not fit into free memory."""
    weights = sum(file.stat().st_size for folder in folders for file in folder.glob("*.safetensors"))
    needed, free = int(WORKING * weights) + RESERVE, psutil.virtual_memory().available
    if needed > free:
        raise RevprobeError(
            f"{what} needs about {needed / GB:.1f} GB of memory ({weights / GB:.1f} GB of weights), and "
            f"{free / GB:.1f} GB are free: not loaded; close what holds memory, or ask it on another machine"
        )
