"""`revprobe models`: what can be probed, what it can be asked about, and the example configs."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

_READS = ["name", "objective", "attention", "shift", "about"]


def models() -> None:
    """List families of published models, other models, relations, and the example configs with their commands."""
    from ..models.listing import list_models
    from ..report.summary.terminal import make_console, text_table

    console, listed = make_console(), list_models()
    listed = listed.assign(shift=listed["shift"].astype("string").fillna("-"))
    of_families = listed["licence"] != ""
    console.print(text_table(listed.loc[of_families, _READS], "families of published models"))
    _files_of(listed[of_families], console)
    console.print(text_table(listed.loc[~of_families, _READS], "other models"))
    console.print(text_table(_relations(), "relations (`relation.name` of a fine-tuning, `evaluate --relation`)"))
    console.print(text_table(_examples(), "example configs, by name instead of a file"))


def _files_of(families: pd.DataFrame, console: Console) -> None:
    """Whose tokenizer, under which licence, and how close to the published code."""
    from ..models.listing import shown_parity
    from ..report.summary.terminal import text_table

    shown = families[["name", "licence"]].assign(parity=families["parity"].map(shown_parity))
    console.print(text_table(shown[["name", "parity", "licence"]], "their code and weights"))
    console.print(
        "parity: the largest difference of logits and scores to the published code's, on tiny checkpoints in float32; "
        "the files on the hub were not run"
    )
    for tokenizer, part in families.groupby("tokenizer", sort=False):
        console.print(f"tokenizer of {', '.join(part['name'])}: {tokenizer}")
    console.print("\nnames on the hub")
    for name, published in families.loc[families["published"] != "", ["name", "published"]].itertuples(index=False):
        console.print(f"{name}: {published}")
    console.print()


def _relations() -> pd.DataFrame:
    """Relation, and the first sentence of the documentation of what makes it."""
    import pandas as pd

    from ..relations.catalog import RELATIONS

    rows = [(name, re.split(r"[.:]\s", (make.__doc__ or "").strip())[0]) for name, make in RELATIONS.items()]
    return pd.DataFrame(rows, columns=["name", "about"])


def _examples() -> pd.DataFrame:
    """Example, what kind of config it is, and the command that takes it."""
    import pandas as pd

    from ..finetune.config.kinds import told_kind
    from ..finetune.config.loading import example_names, find_config, parse_yaml

    rows = []
    for name in example_names():
        found = told_kind(parse_yaml(find_config(name).read_text(encoding="utf-8"), name))
        assert found is not None, f"the example {name} is of no known kind"
        rows.append((found[0].what, name, f"revprobe {found[0].command}"))
    return pd.DataFrame(sorted(rows), columns=["kind", "name", "command"])[["name", "kind", "command"]]
