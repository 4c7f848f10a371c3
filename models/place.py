"""Where a model lies that a user names: a run's checkpoint, a folder, a file, or a name on the hub."""

from __future__ import annotations

from pathlib import Path

from ..errors import RevprobeError, nearest
from .checkpoints import EMA, checkpoint_folder, has_checkpoints, step_of
from .families.files import name_in_cache


def place_of(source: str | Path, step: int, weights: str | None) -> tuple[str | Path, str, int | None, str | None]:
    """Folder (or hub name), display name, step and weights of what `source` names."""
    path, name = Path(source), str(source)
    if has_checkpoints(path):
        folder, run_step, which = checkpoint_folder(path, step, weights)
        return folder, path.resolve().name, run_step, which
    if path.is_dir():
        path = path.resolve()
        checkpoint = path.parent if path.name == EMA else path
        at_step = step_of(checkpoint)
        if at_step is None:
            _require_no_choice(name, step, weights)
            return path, name_in_cache(path) or path.name, None, None
        # Inside a run its step and weights are read off the path.
        which = "ema" if path.name == EMA else "raw"
        if weights not in (None, which):
            raise RevprobeError(f"{path} holds {which} weights, not {weights!r}; name the run folder to choose")
        if step not in (-1, at_step):
            raise RevprobeError(f"{path} is of step {at_step}, not {step}; name the run folder to choose")
        return path, checkpoint.parent.parent.name, at_step, which
    if path.is_file():
        _require_no_choice(name, step, weights)
        return path.absolute(), path.stem, None, None  # a link of the hub's cache leads to a file without a suffix
    # A model on the hub is `name` or `owner/name`, and there is no folder called `owner` here.
    is_path = isinstance(source, Path) or path.is_absolute() or name.startswith(".") or name.count("/") > 1
    if is_path or ("/" in name and path.parent.is_dir()):
        folders = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        near = nearest(path.name, folders, 1)
        where = f"; the closest is {str(path.parent / near[0])!r}" if near else "; check the path"
        raise RevprobeError(f"no model folder at {name!r}{where}")
    _require_no_choice(name, step, weights)
    return name, name, None, None


def _require_no_choice(name: str, step: int, weights: str | None) -> None:
    """A model that is no run has one step and one kind of weights."""
    for option, value, default in (("step", step, -1), ("weights", weights, None)):
        if value != default:
            raise RevprobeError(
                f"{option}={value!r}: {name!r} is a model and no run with checkpoints to choose from; leave {option} "
                "out, or name the run's folder"
            )
