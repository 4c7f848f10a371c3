"""From the folders of runs to the tables of Section 6: what is finished, and why the rest is not."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ....errors import RevprobeError, first_line
from ....finetune.config.finetuning import FinetuneConfig, FinetuneSweepConfig
from ....finetune.config.places import DATA, elsewhere, same_elsewhere
from ....finetune.config.pretraining import PretrainConfig, PretrainSweepConfig
from ....finetune.runs.finetuning import FinetuneRun
from ....finetune.runs.pretraining import PretrainedModel
from ....finetune.runs.run import PROBLEM, VERSIONS, is_run
from ....probes.readings.reading import Reading
from ....probes.statistics.estimators import STATISTICS_VERSION
from ....relations.evaluation import begins_with_answer
from ....relations.invented.look_alike import look_alike_data
from ..reproduce import records
from .frames import BEGINS, FINISHED, NOT_FINISHED, NOT_RUN, Section6, tidy

Tell = Callable[[str], None]
Sweeps = Mapping[str, tuple[FinetuneSweepConfig, Path]]
Models = tuple[PretrainSweepConfig, Path]
_ROOT = r"(?:~[\w-]*|[A-Za-z]:)?[/\\]"
_QUOTED_PATH = re.compile(rf"(?P<quote>['\"`]){_ROOT}(?:[^'\"`\n]*[/\\])?(?P<name>[^'\"`/\\\n]+)[/\\]?(?P=quote)")
_BARE_PATH = re.compile(rf"(?<![\w/\\.…~%]){_ROOT}(?:[\w.@+~-]+[/\\]+)*(?P<name>[\w.@+~-]*\w)[/\\]?")
# Answers of a finished run, by what the reading is called.
_TABLE_OF = {"decoded_match": "answers", "candidate_rank": "ranks"}


def collect(sweeps: Sweeps, models: Models, data: Path = DATA, tell: Tell = lambda text: None) -> Section6:
    """Read every planned run and model; those that are not finished stand there as such.

    A run belongs to its plan wherever its model and data lay and on whatever device it was trained.

    Args:
        sweeps: what each is planned to be and the folder of its runs, by what the tables call it ("section6", ...).
        models: the same of the small models.
        data: the folder that the plans call data, for its hashes.
        tell: called with a line for each run that is read.
    Raises: RevprobeError, for a reading that is damaged.
    """
    rows: dict[str, list[dict[str, Any]]] = {"runs": [], "answers": [], "ranks": [], "signatures": []}
    about: dict[str, Any] = {}
    told = {config.name: _model(PretrainedModel(models[1] / config.name), config) for config in models[0].runs()}
    for name, (planned, folder) in sweeps.items():
        finished, left_out = [], {}
        for config in planned.runs():
            run, status = FinetuneRun(folder / config.name), _status(folder / config.name, config)
            axes = {"variant": ""} | config.axes | {"sweep": name, "run": config.name}
            resolved = run.resolved if status == FINISHED else {}
            of_plan = {"status": status} | _planned(config, told)
            of_plan["weights"] = resolved.get("base_sha256", of_plan["weights"])  # older runs do not say
            rows["runs"].append(axes | {key: resolved.get(key) for key in ("objective", "steps")} | of_plan)
            if status != FINISHED:
                left_out[config.name] = status
                continue
            for table, found in _read(run).items():
                rows[table] += [axes | row for row in found]
            finished.append(config.name)
            tell(f"{name}: {config.name}")
        versions = _versions(folder / run for run in finished)
        about[name] = {"command": f"revprobe finetune {planned.name}", "versions": versions}
        about[name] |= {"finished": finished, "not_run": left_out}
    about |= {"mini-models": {"command": f"revprobe pretrain {models[0].name}"}, "data": data_of(sweeps, models, data)}
    about["statistics_version"] = STATISTICS_VERSION
    return Section6(**{name: tidy(name, own) for name, own in rows.items()}, models=told, about=about)


def _planned(config: FinetuneConfig, models: Mapping[str, Any]) -> dict[str, str]:
    """What says later whether a run is still the one that is planned: its config, and which weights it starts from."""
    values = config.model_dump(mode="json")
    values["training"].pop("device")  # where, not what
    name = Path(str(config.model.name)).parent.name
    weights = models.get(name, {}).get("sha256", {}).get("model.safetensors", "")
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return {"config": digest, "weights_of": name, "weights": weights}


def _status(path: Path, config: FinetuneConfig) -> str:
    """Finished, not run, not finished (also while it is being trained), or why it ended early."""
    try:
        if not is_run(path):
            return NOT_RUN
        run = FinetuneRun(path)
        if not same_elsewhere(config, run.config):
            return "a run of another config lies in its folder"
        return FINISHED if run.finished else _unfinished(path)
    except (RevprobeError, FileNotFoundError) as error:
        return without_folders(first_line(error, with_type=False))


def _unfinished(path: Path) -> str:
    """Why a run or a model ended early, where it did."""
    problem = path / PROBLEM
    if not problem.is_file():
        return NOT_FINISHED
    told = problem.read_text(encoding="utf-8", errors="replace").strip().partition("\n")[0]
    return f"failed: {without_folders(told)}"


def without_folders(text: str) -> str:
    """A message whose absolute paths are their last names: tables that are passed on say nothing of a machine.

    >>> without_folders("no file '/home/me/my runs/x.csv' (see /tmp/log.txt), 1/2 of https://a.b/c read")
    "no file '…/x.csv' (see …/log.txt), 1/2 of https://a.b/c read"
    """
    quoted = _QUOTED_PATH.sub(lambda found: f"{found['quote']}…/{found['name']}{found['quote']}", text)
    return _BARE_PATH.sub(lambda found: f"…/{found['name']}", quoted)


def _read(run: FinetuneRun) -> dict[str, list[dict[str, Any]]]:
    """The rows of a finished run, by table."""
    found: dict[str, list[dict[str, Any]]] = {"answers": [], "ranks": [], "signatures": []}
    for reading in run.answers() if run.asks else ():
        row = _numbers(reading) | {key: reading.meta.get(key) for key in ("step", "asked", "split", "templates")}
        table = _TABLE_OF.get(reading.name)
        if table == "answers":
            row |= reading.meta.get("errors", {}) | _begins(reading)
        if table == "ranks":
            row |= _among_candidates(reading)
        if table is not None:
            found[table].append(row)
    for reading in run.readings():
        beside = {key: reading.meta.get(key) for key in ("step", "kind")}
        found["signatures"] += [row | beside for row in records(reading.measures())]
    return found


def _numbers(reading: Reading) -> dict[str, Any]:
    return records(reading.measures())[0]


def _begins(reading: Reading) -> dict[str, float]:
    """The looser score of the same decodings; nothing where a frame of before it was told has none."""
    if "begins" not in reading.frame:
        return {}
    looser = begins_with_answer(reading).estimate
    return {name: getattr(looser, key) for key, name in BEGINS.items()}


def _among_candidates(reading: Reading) -> dict[str, Any]:
    """What there was to choose from, and the mean reciprocal rank."""
    frame = reading.frame
    row: dict[str, Any] = {"candidates": int(frame["candidates"].max()) if len(frame) else None}
    counted = [one["texts"] for one in reading.meta.get("candidates", {}).values() if "texts" in one]
    row["texts"] = max(counted, default=None)
    row["chance"] = float((frame["accepted"] / frame["candidates"]).mean())
    measures = reading.measures().set_index("measure")
    if "mean_reciprocal_rank" in measures.index:
        for name, column in (("", "value"), ("_low", "low"), ("_high", "high")):
            row[f"reciprocal_rank{name}"] = measures.loc["mean_reciprocal_rank", column]
    return row


def _versions(runs: Iterable[Path]) -> list[dict[str, str]]:
    """The software that runs were started with; one entry when it was the same for all."""
    texts = {(run / VERSIONS).read_text(encoding="utf-8") for run in runs}
    return [json.loads(text) for text in sorted(texts)]


def _model(made: PretrainedModel, config: PretrainConfig) -> dict[str, Any]:
    """A small model's record, minutes in place of seconds; or that there is none."""
    if not is_run(made.path):
        return {"status": NOT_RUN}
    if not same_elsewhere(config, made.config):
        return {"status": "a model of another config lies in its folder"}
    if not made.finished:
        return {"status": _unfinished(made.path)}
    record = made.record
    seconds = record.pop("seconds")
    return record | {"status": FINISHED, "core_minutes": round(seconds["cpu"] / 60, 1)}


# ---- which data ----


def data_of(sweeps: Sweeps, models: Models, data: Path = DATA) -> dict[str, Any]:
    """Of each file or folder that a config names: its hash, and whether it is `revprobe data`'s look-alike."""
    relations = [chosen for planned, _ in sweeps.values() for chosen in planned.datasets.values()]
    corpora = [chosen for config in models[0].runs() for chosen in config.corpus.datasets.values()]
    paths = dict.fromkeys(str(chosen.path) for chosen in (*relations, *corpora) if chosen.path)
    if not paths:
        return {}
    with tempfile.TemporaryDirectory() as working:
        alike = look_alike_data(Path(working) / "data")
        of_look_alikes = {file.name: digest(file) for file in alike.iterdir()}
    found = {}
    for path in paths:
        sha256 = digest(elsewhere(path, {DATA: data}))
        found[path] = {"sha256": sha256, "look_alike": sha256 is not None and sha256 in of_look_alikes.values()}
    return found


def digest(path: Path) -> str | None:
    """sha256 of a file, or of a folder's files with their names; None where there is neither."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    if not path.is_dir():
        return None
    lines = [f"{file.name} {digest(file)}\n" for file in sorted(path.iterdir()) if file.is_file()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
