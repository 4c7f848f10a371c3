"""`revprobe models`: what can be probed, and the examples."""

from __future__ import annotations


def models() -> None:
    """List what can be probed, where published models come from, and the example configs."""
    from ..finetune.config.loading import example_names
    from ..models.listing import list_models, shown_parity
    from ..report.summary.terminal import make_console, text_table

    console, listed = make_console(), list_models()
    shift = listed["shift"].astype("string").fillna("-")
    shown = listed[["name", "objective", "attention", "about"]].assign(shift=shift)
    console.print(text_table(shown[["name", "objective", "attention", "shift", "about"]], "models"))
    families = listed[listed["licence"] != ""]
    where = families[["name", "tokenizer", "licence"]].assign(parity=families["parity"].map(shown_parity))
    console.print(text_table(where[["name", "parity", "tokenizer", "licence"]], "published families"))
    console.print(
        "parity: the largest difference of logits and scores to the published code's, on tiny checkpoints in float32; "
        "the files on the hub were not run",
        soft_wrap=True,
    )
    for family, names in families.loc[families["published"] != "", ["name", "published"]].itertuples(index=False):
        console.print(f"{family}: {names}", soft_wrap=True)
    console.print(f"example sweeps: {', '.join(example_names())}", soft_wrap=True)
