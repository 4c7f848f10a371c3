"""`revprobe models`: what can be probed, and the examples."""

from __future__ import annotations


def models() -> None:
    """List what can be probed, and the example configs."""
    from ..finetune.config.loading import example_names
    from ..models.registry import list_models
    from ..report.summary.terminal import make_console, text_table

    console = make_console()
    console.print(text_table(list_models(), "models"))
    console.print(f"example sweeps: {', '.join(example_names())}", soft_wrap=True)
