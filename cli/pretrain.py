"""`revprobe pretrain`: the small models of Section 6, made here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .running import Out, interruptible, quick_imports


def pretrain(
    config: Annotated[str, typer.Argument(help="Small models in a YAML file, or an example's name: mini-models.")],
    only: Annotated[
        list[str] | None, typer.Option("--only", help="Of the models these alone, and their parents; repeat it.")
    ] = None,
    out: Out = Path("runs"),
) -> None:
    """Make small models in published layouts, each trained on a corpus about other people, skipping finished ones.

    Goes on where it was stopped. Each model's folder has its weights, the losses and hashes, and what it answers of the
    corpus in the direction a fact was told in and in the other one.
    """
    with quick_imports():
        from ..finetune.config.pretraining import read_pretraining
        from ..finetune.runs.pretraining import chosen_models, pretrain, pretrained_table
        from ..finetune.runs.progress import shown_progress
        from ..report.summary.terminal import make_console, text_table

    console = make_console()
    sweep = read_pretraining(config)
    folder = out / sweep.name
    with interruptible(console):
        for one in chosen_models(sweep, only):
            with shown_progress(one.name, console) as listener:
                pretrain(one, folder / one.name, listener=listener)
    console.print(text_table(pretrained_table(sweep, folder), sweep.name))
