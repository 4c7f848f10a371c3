"""The command line of fine-tuning: `revprobe finetune`, and what is done with its runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import RevprobeError

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder that gets a folder of the config's name.")]


def finetune(
    config: Annotated[str, typer.Argument(help="A fine-tuning's or its sweep's YAML file, or an example's name.")],
    jobs: Annotated[
        int, typer.Option("--jobs", "-j", min=1, help="Runs of a sweep side by side, each in a process of its own.")
    ] = 1,
    out: Out = Path("runs"),
) -> None:
    """Fine-tune a model on one direction of a relation, probe it at every snapshot, and score both directions."""


def evaluate(
    model: Annotated[str, typer.Argument(help="A run, a checkpoint folder, an adapter, a hub name.")],
    relation: Annotated[str, typer.Option(help="A relation's name, such as parent_child or invented_names.")],
    direction: Annotated[str, typer.Option(help="The direction that was trained, such as P2C.")],
    path: Annotated[Path | None, typer.Option(help="The relation's published file or folder.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option", help="How the relation was made for training, NAME=VALUE, such as seed=1; repeatable."
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Which facts: train, heldout (the floor) or both.")] = "both",
    templates: Annotated[
        str | None,
        typer.Option(help="Wordings: train, heldout or all; held-out ones by default, where there are some."),
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
) -> None:
    """Score forward and reverse exact match by decoding: on trained facts, and on held-out ones as the floor."""
    from .finetune.evaluation import SPLITS, evaluate_relation, match_table, save_evaluation
    from .finetune.progress import shown_probes
    from .finetune.relations import load_relation
    from .finetune.terminal import make_console, text_table
    from .models.registry import load_model

    if out is not None:
        out.mkdir(parents=True, exist_ok=True)  # a wrong --out is told before anything is decoded
    facts = load_relation(relation, path, **_relation_options(option or []))
    probed = load_model(model, step=step, device=device)
    console, bar = make_console(), f"{probed.name}, {relation}"
    with shown_probes([bar], console) as listener:
        readings = evaluate_relation(
            probed,
            facts,
            direction,
            splits=SPLITS if split == "both" else (split,),
            templates=templates,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            progress=None if listener is None else lambda done, total: listener(bar, done, total),
        )
    console.print(text_table(match_table(readings), f"{bar}, trained in direction {direction}"))
    if out is not None:
        save_evaluation(readings, out)
        console.print(f"{len(readings)} readings: {out}", soft_wrap=True)


def _relation_options(given: list[str]) -> dict[str, Any]:
    """`--option seed=1` as keywords: numbers, true, false and lists as JSON, anything else as the text it is."""
    options = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise RevprobeError(f"--option {text!r}: expected NAME=VALUE, such as seed=1 or heldout=0.2")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options
