"""A run's folder, whichever of the two kinds it holds."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from ...arguments import checked
from ...errors import RevprobeError, did_you_mean
from ..config.finetuning import FinetuneConfig, is_finetuning_text
from ..config.loading import checked_config, parse_yaml
from ..config.one_layer import RunConfig
from .finetuning import FinetuneRun
from .one_layer import OneLayerRun
from .run import CONFIG, Run, is_run


@checked
def open_run(path: str | Path) -> Run:
    """Open a run folder. Raises: RevprobeError, when it is none; it names the nearest run beside it."""
    path = Path(path)
    if not is_run(path):
        beside = [str(p) for p in path.parent.glob("*") if is_run(p)] if path.parent.is_dir() else []
        hint = did_you_mean(str(path), beside) if beside else "; expected a folder written by `revprobe train`"
        raise RevprobeError(f"no run at {str(path)!r}{hint}")
    return FinetuneRun(path) if is_finetuning_text(path / CONFIG) else OneLayerRun(path)


def open_read_run(path: Path, text: str) -> Run:
    """As `open_run`, for one whose config.yaml has been read already: a list of many runs opens each file once.

    Raises: RevprobeError, for a text that is no run's config.
    """
    source = str(path / CONFIG)
    values = parse_yaml(text, source)
    run: Run
    if isinstance(values, dict) and "lora" in values:
        run = FinetuneRun(path)
        run.__dict__["config"] = checked_config(values, FinetuneConfig, source)  # where `cached_property` keeps it
    else:
        run = OneLayerRun(path)
        run.__dict__["config"] = checked_config(values, RunConfig, source)
    return run


def is_finished(path: str | Path, config: BaseModel) -> bool:
    """Whether a folder holds this very run, complete. Raises: RevprobeError, when its config.yaml is damaged."""
    return is_run(path) and open_run(path).config == config and open_run(path).finished
