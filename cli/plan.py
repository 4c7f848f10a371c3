"""`revprobe plan`: the memory that a fine-tuning and its probes need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ..errors import RevprobeError

if TYPE_CHECKING:
    from ..finetune.config.finetuning import FinetuneConfig
    from ..finetune.memory.plan import MemoryPlan

MOST_TOKENS = 2**22


def plan(
    config: Annotated[str, typer.Argument(help="A fine-tuning's or its sweep's YAML file, or an example's name.")],
    memory: Annotated[
        float | None, typer.Option(min=0, help="GB (10^9 bytes) there are; this machine's GPU or 48 by default.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=2, help="Tokens of the longest row; worked out from the relation by default.")
    ] = None,
) -> None:
    """Work out the memory that a fine-tuning and its probes need, from shapes alone; exit code 1 when it is too much.

    Loads no weights, and for the published LLaDA and Dream checkpoints needs no network.
    """
    from ..finetune.config.finetuning import FinetuneConfig, read_finetune
    from ..finetune.memory.from_config import require_room, those_to_plan
    from ..finetune.memory.plan import GB
    from ..report.summary.terminal import make_console

    if memory is not None and not memory < 1e9:
        raise RevprobeError(f"--memory {memory}: expected GB (10^9 bytes) of one machine, such as 48")
    if tokens is not None and tokens > MOST_TOKENS:
        raise RevprobeError(f"--tokens {tokens}: expected the tokens of one row, at most {MOST_TOKENS:,}")
    chosen, console = read_finetune(config), make_console()
    runs = [chosen] if isinstance(chosen, FinetuneConfig) else those_to_plan(chosen.runs())
    given = None if memory is None else int(memory * GB)
    for run, (planned, there) in [(run, show_plan(run, console, given, tokens)) for run in runs]:
        require_room(planned, there, run)


def show_plan(
    config: FinetuneConfig, console: Console, memory: int | None = None, tokens: int | None = None
) -> tuple[MemoryPlan, int]:
    """Print a config's memory plan; returns it with the bytes it is held against."""
    from ..finetune.memory.from_config import memory_here, plan_finetuning, plan_table
    from ..finetune.memory.plan import GB
    from ..report.summary.terminal import text_table

    there, of = memory_here() if memory is None else (memory, "as asked")
    planned = plan_finetuning(config, tokens=tokens)
    console.print(text_table(plan_table(planned, there), f"memory of {config.name} against {there / GB:.1f} GB ({of})"))
    for line in planned.about:
        console.print(line)
    return planned, there
