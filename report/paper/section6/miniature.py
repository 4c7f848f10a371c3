"""Section 6 in miniature as `revprobe reproduce section6` makes it: plans, folders, and the quick variant."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ....errors import RevprobeError
from ....finetune.config.finetuning import FinetuneConfig, FinetuneSweepConfig
from ....finetune.config.loading import checked_config, load_config, merged
from ....finetune.config.places import DATA, MODELS, elsewhere, placed
from ....finetune.config.pretraining import PretrainConfig, PretrainSweepConfig
from ....finetune.runs.pretraining import chosen_models
from ....relations.invented.look_alike import look_alike_data
from . import plan
from .collect import Tell, collect
from .frames import FINISHED, Section6
from .page import write_markdown
from .plan import ABLATIONS, DATASETS, DROP_ORDER, MAIN, METHODS

# What `--only` says of each sweep.
PARTS = {"main": MAIN, "ablations": ABLATIONS, "methods": METHODS}
QUICK = (
    "one dataset, one direction, one seed, models of 2 layers and width 64 that read little, fine-tuned for few steps "
    "on a look-alike of the published file"
)
# The quick variant: so much of each plan, and so small. Of the values below none was chosen by an answer.
_QUICK_MODELS: dict[str, Any] = {
    "d_model": 64,
    "n_layers": 2,
    "vocabulary": 800,
    "corpus": {"fillers": 20},
    "training": {"steps": 800, "batch_size": 16, "warmup_steps": 40},
    "check": {"facts": 10},
}
_QUICK_ROWS, _QUICK_FACTS = [0, 40], 30
_QUICK_BASE: dict[str, Any] = {
    "training": {"steps": 400, "epochs": None, "warmup_steps": 40},
    "snapshots": {"steps": [100], "every": None, "count": None, "facts": 16},
    "evaluation": {"facts": 8},
}
_QUICK_VARIANTS = {ABLATIONS: ("one-span", "read-both"), METHODS: ("full",)}
_QUICK_METHOD_MODEL = "mini-llada"


@dataclass(frozen=True)
class Miniature:
    """Three sweeps and the small models they start from, in one folder.

    OUT/mini-models/NAME, OUT/section6/RUN, OUT/section6-ablations/RUN, OUT/section6-methods/RUN, and the page.

    Attributes:
        models, sweeps: as the files in examples/ have them, whatever folder they are run in.
        out: the folder of all of it.
        data: the published files or their look-alikes; of the quick variant its own, written when it is missing.
        device: where runs are fine-tuned.
        quick: whether this is the quick variant, whose numbers are no result.
    """

    models: PretrainSweepConfig
    sweeps: tuple[FinetuneSweepConfig, ...]
    out: Path
    data: Path
    device: str = "cpu"
    quick: bool = False

    @classmethod
    def of(
        cls, out: Path, *, data: Path = DATA, only: Sequence[str] = (), device: str = "cpu", quick: bool = False
    ) -> Miniature:
        """The plans of examples/.

        Args:
            only: of "main", "ablations" and "methods" these alone; all when empty.
        """
        names = [name for name in DROP_ORDER if not only or name in [PARTS[part] for part in only]]
        models = load_config(plan.MODELS, PretrainSweepConfig)
        sweeps = tuple(load_config(name, FinetuneSweepConfig) for name in names)
        if quick:
            models, sweeps = quick_models(models), tuple(map(quick_sweep, sweeps))
        return cls(models, sweeps, out, out / DATA if quick else data, device, quick)

    @cached_property
    def places(self) -> dict[Path, Path]:
        """Where what the plans call runs/mini-models and data lies."""
        return {MODELS: self.models_folder, DATA: self.data}

    @property
    def models_folder(self) -> Path:
        return self.out / self.models.name

    def require_data(self) -> None:
        """Write the quick variant's look-alikes; of the others raise RevprobeError where a file is missing."""
        named = [chosen.path for config in self.models.runs() for chosen in config.corpus.datasets.values()]
        named += [chosen.path for sweep in self.sweeps for chosen in sweep.datasets.values()]
        files = dict.fromkeys(elsewhere(path, self.places) for path in named if path)
        if self.quick and not self.data.exists():
            look_alike_data(self.data)
        if missing := [str(file) for file in files if not file.exists()]:
            raise RevprobeError(
                f"no {' and no '.join(missing)}; give the folder of the published files (--data), or write look-alikes "
                f"with `revprobe data {self.data}`"
            )

    def sweeps_to_run(self) -> Iterator[FinetuneSweepConfig]:
        """The sweeps as they are run here: on this device, with models and data where they lie."""
        for sweep in self.sweeps:
            training = sweep.base.training.model_copy(update={"device": self.device})
            on_device = sweep.model_copy(update={"base": sweep.base.model_copy(update={"training": training})})
            yield placed(on_device, self.places)

    def models_of(self, sweep: FinetuneSweepConfig) -> list[PretrainConfig]:
        """The small models that a sweep (as it is run here) starts from, and the parents of these, to be made here."""
        named = dict.fromkeys(self._model_of(run) for run in sweep.runs())
        needed = [name for name in named if name is not None]
        return [placed(config, self.places) for config in (chosen_models(self.models, needed) if needed else ())]

    def runs_without(self, sweep: FinetuneSweepConfig, missing: Collection[str]) -> list[str]:
        """The names of a sweep's runs (as it is run here) that start from none of the `missing` small models."""
        return [run.name for run in sweep.runs() if self._model_of(run) not in missing]

    def _model_of(self, run: FinetuneConfig) -> str | None:
        """The small model that a run starts from; None where it starts from another."""
        folders = {str(self.models_folder / config.name / "model"): config.name for config in self.models.runs()}
        return folders.get(str(run.model.name))

    def collect(self, tell: Tell = lambda text: None) -> Section6:
        """What has been run in the folder. Raises: RevprobeError, for a reading that is damaged."""
        sweeps = {sweep.name: (sweep, self.out / sweep.name) for sweep in self.sweeps}
        found = collect(sweeps, (self.models, self.models_folder), self.data, tell)
        return replace(found, about=found.about | {"quick": QUICK}) if self.quick else found

    def write(self, found: Section6) -> list[Path]:
        """The tables and the page with its figures; returns the page first.

        Raises: RevprobeError, where no run is finished: a page of nothing must not take the place of a page.
        """
        if not (found.runs["status"] == FINISHED).any():
            raise RevprobeError(f"no finished run in {str(self.out)!r}; no page was written")
        return [write_markdown(found, self.out), *found.write(self.out)]


def quick_models(full: PretrainSweepConfig) -> PretrainSweepConfig:
    """The same models, small, one dataset read for few steps."""
    base, label = merged(full.base, _QUICK_MODELS), DATASETS[0].dataset
    read = base["corpus"]["datasets"][label] | {"rows": _QUICK_ROWS, "facts": _QUICK_FACTS}
    base["corpus"] |= {"datasets": {label: read}}
    own = {name: _without_sizes(values) for name, values in full.models.items()}
    return checked_config({"name": full.name, "base": base, "models": own}, PretrainSweepConfig, "the quick models")


def _without_sizes(own: dict[str, Any]) -> dict[str, Any]:
    """What makes a model another than the base, without how long and how fast it reads."""
    training = {key: value for key, value in own.get("training", {}).items() if key not in _QUICK_MODELS["training"]}
    kept = {key: value for key, value in own.items() if key not in _QUICK_MODELS or key == "corpus"}
    return kept | ({"training": training} if training else {})


def quick_sweep(full: FinetuneSweepConfig) -> FinetuneSweepConfig:
    """The same sweep on one dataset, direction and seed, with few variants and few steps."""
    values = full.model_dump()
    trained, chosen = DATASETS[0], _QUICK_VARIANTS.get(full.name, ())
    dataset = values["datasets"][trained.dataset] | {"rows": _QUICK_ROWS, "directions": [trained.direction]}
    values |= {"base": merged(values["base"], _QUICK_BASE), "datasets": {trained.dataset: dataset}, "seeds": [0]}
    values |= {"variants": {name: own for name, own in full.variants.items() if name in chosen}}
    values |= {"learning_rates": {}, "exclude": []}
    if full.name == METHODS:
        values["models"] = {_QUICK_METHOD_MODEL: values["models"][_QUICK_METHOD_MODEL]}
    labels = [*values["models"], *values["datasets"]]
    values["overrides"] = {label: own for label, own in full.overrides.items() if label in labels}
    return checked_config(values, FinetuneSweepConfig, f"the quick {full.name}")
