"""What `load_model` takes, as a table: the families of diffusion models, transformers' own, and registered names."""

from __future__ import annotations

from typing import Any

import pandas as pd

from ..arguments import checked
from .families.known import FAMILIES
from .registry import registered

# Name -> objective, attention, logit shift and what it is, of models that are not a family's.
_BUILT_IN: dict[str, tuple[str, str, int | None, str]] = {
    "gpt2": ("causal", "causal", 1, "GPT-2 of any size, trained by `revprobe train` or loaded from transformers"),
    "LoRA adapter": (
        "its base's",
        "its base's",
        None,
        "a folder that peft wrote, or a run of `revprobe finetune`; put on its base",
    ),
    "any transformers causal LM": ("causal", "causal", 1, "a folder or hub name with safetensors weights"),
    "any transformers masked LM": (
        "masked",
        "full",
        0,
        "a folder or hub name with safetensors weights and a mask token",
    ),
}
_COLUMNS = ("name", "objective", "attention", "shift", "noise", "about", "tokenizer", "licence", "parity", "published")


@checked
def list_models() -> pd.DataFrame:
    """What `load_model` takes: the families of diffusion models, transformers' own, and registered names.

    Columns: name; objective; attention ("full": every token sees every other; "block": finished blocks and its own;
    "either": the files do not say which of the two; "causal"); shift (1: row i - 1 predicts token i; 0: row i does);
    noise ("mask": a token is hidden by the mask token; "uniform": by a random one; empty for causal models); about. Of
    families also: tokenizer ("its own", or the public one it uses); licence, of code and weights; parity, the
    largest difference of logits and scores to the published code's on a tiny checkpoint in float32; published, names on
    the hub. Their real files were not at hand: see docs/models.md.
    """
    rows: list[tuple[Any, ...]] = [
        (
            family.name,
            family.objective,
            family.attention,
            family.logit_shift,
            family.noise if family.objective == "masked" else "",
            family.about,
            family.tokenizer or "its own",
            family.licence,
            family.parity,
            ", ".join(family.published),
        )
        for family in FAMILIES
    ]
    rows += [
        (name, *what, "mask" if what[0] == "masked" else "", about, "", "", None, "")
        for name, (*what, about) in _BUILT_IN.items()
    ]
    for name, loader in registered().items():
        about = (loader.__doc__ or "registered by the user").splitlines()[0]
        rows.append((name, "", "", None, "", about, "", "", None, ""))
    return pd.DataFrame(rows, columns=list(_COLUMNS)).astype({"shift": "Int64"})


def shown_parity(parity: float) -> str:
    """As the tables show it.

    >>> [shown_parity(apart) for apart in (0.0, 3e-6, float("nan"))]
    ['0', '3e-6', 'not run']
    """
    return "not run" if pd.isna(parity) else f"{parity:.0e}".replace("e-0", "e-") if parity else "0"
