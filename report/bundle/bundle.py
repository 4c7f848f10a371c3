"""A run, a sweep, or a folder of both as a static folder for a co-author or a web host.

    index.html        the runs with their state, and what the files are
    report.html       the report, one file that asks nothing of a network
    summary.csv       every number of every checkpoint; controls.csv where there are some
    readings.parquet  the rows behind them, tidy
    configs/          what each run was asked to be
    versions.json     the software that took them

It is made of the runs as `private.py` tells them, and appears whole or not at all; the runs are only read.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from markupsafe import Markup
from plotly.offline import get_plotlyjs

from ...arguments import checked
from ...atomic_files import folder_written_whole, require_replaceable, write_text
from ...errors import RevprobeError
from ...finetune.config.loading import dump_yaml
from ...finetune.runs.finetuning import EVALUATION
from ...finetune.runs.run import VERSIONS, software
from ...finetune.training.checkpointing import ANSWERED, READINGS
from ...progress import Progress, shows_progress
from ..html.report import CONTROLS, write_report
from ..run_sweep import REPORT
from ..summary.terminal import read_summary
from .gathered import Gathered, gather
from .index import index, size_text
from .private import Private
from .rows import write_rows

INDEX, SUMMARY, ROWS, CONFIGS, SOFTWARE = "index.html", "summary.csv", "readings.parquet", "configs", "versions.json"
PARTS = {
    REPORT: "figures, tables with intervals and controls; opens without a network",
    SUMMARY: "every number of every checkpoint, tidy",
    CONTROLS: "what the numbers are held against besides shuffled facts",
    ROWS: "the rows behind the numbers, of all runs in one tidy table",
    CONFIGS: "what each run was asked to be, as YAML",
    SOFTWARE: "the software that the runs were taken with",
}
MARK = "revprobe bundle"  # the first key of versions.json: what tells a bundle from any other folder
PAGE, MOST_IN_PAGE = 400_000, 12_000_000  # bytes of a report beside plotly.js, and most that it holds of readings
RESERVED = {"con", "prn", "aux", "nul", *(f"{name}{at}" for name in ("com", "lpt") for at in range(1, 10))}
LONGEST = 100  # letters of a file's name


@checked
@shows_progress("runs")
def write_bundle(
    path: str | Path,
    folder: str | Path,
    *,
    say: Callable[[str], None] = print,
    progress: Progress | bool | None = None,
) -> dict[str, int]:
    """Write the bundle of a run, a sweep or a folder of both; about how large it will be is said first.

    Args:
        path: of what is handed on; it is only read.
        folder: to write; a bundle there is replaced, a folder of anything else is not.
        say: is told the size, before and after.
    Returns: the bytes of each file, by its path in the folder.
    Raises: RevprobeError, when there are no runs, the folder holds anything else, or the disk is full; nothing is
        written then.
    """
    path, folder = Path(path), Path(folder)
    require_replaceable(folder, _ours)
    if not path.is_dir():
        raise RevprobeError(f"no folder at {str(path)!r}; expected that of a run, of a sweep, or one of several")
    _say_size(path, folder, say)
    private = Private(path)
    runs, sections = gather(path, private, progress)
    with _filled(folder) as working:
        _fill(working, private.text(path.resolve().name), runs, sections)
        _write_software(working, runs, private)
        _require_nothing_private(working, private)
        sizes = _sizes(working)
    say(f"bundle: {len(sizes)} files, {size_text(sum(sizes.values()))}; open {folder / INDEX}")
    return sizes


def file_names(names: Sequence[str]) -> dict[str, str]:
    """A file for each run, under a name that every system and web host takes, different also where case tells nothing.

    >>> file_names(["rope s0", "ROPE s0", "../../etc/con"])
    {'rope s0': 'rope-s0.yaml', 'ROPE s0': 'ROPE-s0-2.yaml', '../../etc/con': 'etc-con.yaml'}
    """
    given: dict[str, str] = {}
    for name in names:
        safe = re.sub(r"[^A-Za-z0-9_-]+", "-", name)[:LONGEST].strip("-") or "run"
        safe = f"run-{safe}" if safe.lower() in RESERVED else safe
        taken, count, own = {other.lower() for other in given.values()}, 1, f"{safe}.yaml"
        while own.lower() in taken:
            count += 1
            own = f"{safe}-{count}.yaml"
        given[name] = own
    return given


def about_size(path: Path) -> int:
    """Bytes that a bundle will have, more or less, from the sizes of the files that it is made of."""
    held = {READINGS, EVALUATION, ANSWERED}
    rows = sum(file.stat().st_size for file in path.rglob("*.parquet") if held & set(file.relative_to(path).parts))
    return rows + len(get_plotlyjs()) + PAGE + min(rows, MOST_IN_PAGE)


def _say_size(path: Path, folder: Path, say: Callable[[str], None]) -> None:
    """Raises: RevprobeError, when the disk has less left."""
    size = about_size(path)
    above = next(one for one in folder.absolute().parents if one.is_dir())
    free = shutil.disk_usage(above).free
    if free < size:
        raise RevprobeError(
            f"a bundle of {str(path)!r} takes about {size_text(size)} and {str(above)!r} has {size_text(free)} left; "
            "choose a folder on another disk"
        )
    say(f"bundle: up to about {size_text(size)} will be written to {folder}")


def _ours(entry: Path) -> bool:
    """Whether an entry of a folder is part of a bundle: by its name, and by the mark beside it."""
    if entry.name == CONFIGS:
        known = entry.is_dir() and all(one.is_file() and one.suffix == ".yaml" for one in entry.iterdir())
    else:
        known = entry.is_file() and entry.name in {INDEX, *PARTS}
    with suppress(OSError, ValueError):
        return known and MARK in json.loads((entry.parent / SOFTWARE).read_text(encoding="utf-8"))
    return False


@contextmanager
def _filled(folder: Path) -> Iterator[Path]:
    try:
        with folder_written_whole(folder, _ours) as working:
            yield working
    except OSError as error:
        raise RevprobeError(f"cannot write the bundle {str(folder)!r}: {error}; expected a writable folder") from error


def _fill(working: Path, title: str, runs: Sequence[Gathered], sections: Sequence[Markup]) -> None:
    """Write everything but the versions."""
    write_report([one.record for one in runs], working / REPORT, title=title, sections=sections)
    owned = [(one.name, reading) for one in runs for reading in (*one.record.readings, *one.answers)]
    rows = write_rows(owned, working / ROWS) if owned else 0
    configs = file_names([one.name for one in runs])
    (working / CONFIGS).mkdir()
    for one in runs:
        text = dump_yaml(_plain(one.record.config), allow_unicode=True, width=110)
        write_text(working / CONFIGS / configs[one.name], text)
    sizes = _sizes(working) | {SOFTWARE: 0}
    parts = []
    for name, what in PARTS.items():
        own = [size for file, size in sizes.items() if file.partition("/")[0] == name]
        if own:
            parts.append((name, what, sum(own)))
    page = index(title, runs, read_summary(working), configs=configs, parts=parts, rows=rows)
    write_text(working / INDEX, page)


def _write_software(working: Path, runs: Sequence[Gathered], private: Private) -> None:
    """What wrote the bundle, what each run was started with, and what its readings were taken with."""
    found = {}
    for one in runs:
        began = None
        if one.run is not None:
            with suppress(OSError, ValueError):
                began = json.loads((one.run.path / VERSIONS).read_text(encoding="utf-8"))
        taken: list[Any] = []
        for reading in one.record.readings:
            if (versions := reading.meta.get("versions")) is not None and versions not in taken:
                taken.append(versions)
        found[one.name] = private.value({"started with": began, "readings taken with": taken})
    write_text(working / SOFTWARE, json.dumps({MARK: software(), "runs": found}, indent=2) + "\n")


def _plain(config: Mapping[str, Any]) -> Any:
    """A config of nothing but what YAML has."""
    return json.loads(json.dumps(dict(config), default=str))


def _sizes(working: Path) -> dict[str, int]:
    found = sorted(file for file in working.rglob("*") if file.is_file())
    return {file.relative_to(working).as_posix(): file.stat().st_size for file in found}


def _require_nothing_private(working: Path, private: Private) -> None:
    """Raises: RevprobeError, when a page or table still names a folder of this machine."""
    for file in working.rglob("*"):
        if file.suffix in (".html", ".csv", ".yaml", ".json"):
            left = private.left_in(file.read_text(encoding="utf-8").replace(get_plotlyjs(), ""))
            if left is not None:
                raise RevprobeError(
                    f"{file.name} would name {left!r}, so no bundle is written; rename what a run calls by that "
                    "folder, or give the runs another place"
                )
