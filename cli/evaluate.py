"""`revprobe evaluate`: forward and reverse exact match by decoding, asked as the run itself says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import RevprobeError
from .loading import Load, load_options, named_values
from .running import quick_imports

if TYPE_CHECKING:
    from ..finetune.config.finetuning import EvaluationOptions, FinetuneConfig
    from ..relations.catalog import LettersRelation, TextRelation


def evaluate(
    model: Annotated[str, typer.Argument(help="A run, a checkpoint folder, an adapter, a hub name.")],
    relation: Annotated[str | None, typer.Option(help="A relation's name; a fine-tuning run's own by default.")] = None,
    direction: Annotated[
        str | None, typer.Option(help="The direction that was trained, such as P2C; a run knows its own.")
    ] = None,
    path: Annotated[Path | None, typer.Option(help="The relation's published file or folder.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", help="The relation's options in training, NAME=VALUE, such as seed=1; repeatable."),
    ] = None,
    split: Annotated[str, typer.Option(help="Which facts: train, heldout (the floor) or both.")] = "both",
    templates: Annotated[
        str | None, typer.Option(help="Wordings: train, heldout or all; held-out ones where there are some.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for the readings, one parquet file for each side.")
    ] = None,
    step: Annotated[int, typer.Option(help="A run's checkpoint: a step, or -1 for the last.")] = -1,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Prompts per forward pass.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens to write; those of the longest answer, and its end, by default.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    load: Load = None,
) -> None:
    """Score forward and reverse exact match by decoding: on trained facts, and on held-out ones as the floor."""
    with quick_imports():
        from ..finetune.config.loading import require_no_config
        from ..finetune.runs.progress import shown_probes
        from ..models.registry import load_model
        from ..relations.evaluation import SPLITS, evaluate_relation, match_table, save_evaluation
        from ..report.summary.terminal import OF_EVALUATION, make_console, text_table

    if out is not None:
        out.mkdir(parents=True, exist_ok=True)  # a wrong --out is told before anything is decoded
    require_no_config(model)
    options = named_values(option, "--option", "seed=1 or heldout=0.2")
    asking = what_to_ask(model, relation=relation, path=path, direction=direction, options=options)
    probed = load_model(model, **load_options(load, step=step, device=device))
    console, bar = make_console(), f"{probed.name}, {asking.relation.name}"
    with shown_probes([bar], console) as listener:
        readings = evaluate_relation(
            probed,
            asking.relation,
            asking.direction,
            splits=SPLITS if split == "both" else (split,),
            templates=templates or asking.options.templates,
            max_new_tokens=max_new_tokens or asking.options.max_new_tokens,
            batch_size=batch_size or asking.options.batch_size,
            progress=None if listener is None else lambda done, total: listener(bar, done, total),
        )
    title = f"{bar}, trained in direction {asking.direction}"
    console.print(text_table(match_table(readings), title, OF_EVALUATION))
    if out is not None:
        save_evaluation(readings, out)
        console.print(f"{len(readings)} readings: {out}", soft_wrap=True)


@dataclass(frozen=True)
class Asking:
    """What `revprobe evaluate` asks: a relation, the direction that was trained, and how answers are decoded."""

    relation: TextRelation | LettersRelation
    direction: str
    options: EvaluationOptions


def what_to_ask(
    source: str | Path,
    *,
    relation: str | None = None,
    path: str | Path | None = None,
    direction: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Asking:
    """The relation to ask a model about; a fine-tuning run's own comes exactly as it was trained on.

    Another seed or share would hold out other facts than training did, and count trained ones as the floor.

    Args:
        source: the model as `load_model` takes it; a run, or a checkpoint of one, brings its config.
        relation, path, direction, options: as `load_relation` takes them; a run's own when None.
    Raises: RevprobeError, when the relation or the direction is told by neither, or a run was trained otherwise.
    """
    from ..finetune.config.finetuning import EvaluationOptions
    from ..relations.catalog import load_relation

    config = _run_config(Path(source))
    if config is None or relation not in (None, config.relation.name):
        if relation is None or direction is None:
            raise RevprobeError(
                f"{str(source)!r} is no fine-tuning run, which would say what it was trained on; name a relation "
                "(--relation) and the direction that was trained (--direction)"
            )
        return Asking(load_relation(relation, path, **(options or {})), direction, EvaluationOptions())
    trained = config.relation
    if direction not in (None, trained.direction):
        raise RevprobeError(
            f"{str(source)!r} was trained in direction {trained.direction!r}, not {direction!r}; leave --direction out"
        )
    if options:
        raise RevprobeError(
            f"{str(source)!r} says itself how its relation was made, got {dict(options)}; leave --option out"
        )
    made = load_relation(trained.name, trained.path if path is None else path, **trained.options)
    return Asking(made, trained.direction, config.evaluation)


def _run_config(source: Path) -> FinetuneConfig | None:
    """The config of the fine-tuning run that a folder is, or is a checkpoint of."""
    from ..finetune.config.finetuning import FinetuneConfig, is_finetuning_text
    from ..finetune.config.loading import load_config
    from ..finetune.runs.run import CONFIG

    for folder in (source, source.parent.parent):
        if source.is_dir() and (folder / CONFIG).is_file() and is_finetuning_text(folder / CONFIG):
            return load_config(folder / CONFIG, FinetuneConfig)
    return None
