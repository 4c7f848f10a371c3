"""The tables that a model looks its tokens up in, seen by running it: a module of one's own need not name them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .attention_calls import FunctionMode
from .untouched import untouched
from .weight_writes import refused_writes

# Tokens come again at other places, behind others, in runs of other lengths. The second is for a vocabulary of two.
SHOWN = ((0, 1, 2, 3, 1, 0, 3, 3, 2, 0), (0, 1, 0, 0, 1, 1, 0))


def token_tables(module: nn.Module, device: torch.device) -> list[Tensor] | None:
    """The weights that are looked up by token: each token has a row of its own, wherever it stands.

    So a table of positions, segments or padding is none, however long, and one is that is looked up with shifted ids.
    None where the module does not run on token ids alone. Leaves no trace.
    """
    for tokens in SHOWN:
        lookups: list[tuple[Tensor, Tensor]] = []

        def watch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], into: Any = lookups) -> Any:
            if getattr(func, "__name__", "") == "embedding":
                ids, weight, _ = embedding_call(args, kwargs)
                into.append((ids.detach().flatten().cpu(), weight))
            return func(*args, **kwargs)

        try:
            guard = refused_writes(module.named_parameters(), type(module).__name__)
            with untouched(module), torch.no_grad(), guard, FunctionMode(watch):
                module(torch.tensor([tokens], device=device))
        except Exception:  # a smaller vocabulary, weights on disk, another call, writes into weights (wrapping says so)
            continue
        return [weight for ids, weight in lookups if _by_token(ids.tolist(), tokens)]
    return None


def embedding_call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Ids, table and the other arguments of a call of `F.embedding`."""
    names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    return given.pop("input"), given.pop("weight"), given


def _by_token(rows: list[int], tokens: Sequence[int]) -> bool:
    """Whether each token was looked up in one row, and no two tokens in the same."""
    seen = set(zip(tokens, rows, strict=False))
    return len(rows) == len(tokens) and len(seen) == len({row for _, row in seen}) == len(set(tokens))
