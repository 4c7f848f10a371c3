"""The tables that a model looks its tokens up in, seen by running it: a module of one's own need not name them.

Which lookups are by token is told by the rows that are asked for, never by whose tensor they come from: weights that
wait elsewhere, are computed anew for each run, or belong to an adapter are other tensors each time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RevprobeError
from .attention_calls import FunctionMode, its_path, running_modules
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
            if (looked := lookup(func, args, kwargs)) is not None:
                into.append(looked)
            return func(*args, **kwargs)

        shown = torch.tensor([tokens], device=device)
        try:
            guard = refused_writes(module.named_parameters(), type(module).__name__)
            with untouched(module), torch.no_grad(), guard, FunctionMode(watch):
                module(shown)
        except Exception:  # a smaller vocabulary, weights on disk, another call, writes into weights (wrapping says so)
            continue
        return [weight for rows, weight in lookups if _by_token([(shown, rows)])]
    return None


@dataclass
class TokenLookups:
    """Which lookups of a run are by its tokens: those of `named`, and those whose rows follow the tokens.

    Rows that count up are tokens' rows where the tokens count up as well, so the run is held against one of the same
    tokens at other places (`turned`), which the same lookups are asked for in the same order.
    Shapes: `tokens`, `turned`: `batch seq`; `rows`: what each module looked up in that other run, call by call.
    """

    tokens: Tensor
    turned: Tensor
    rows: Mapping[tuple[str, str], Sequence[Tensor]]
    named: str | None
    calls: dict[tuple[str, str], int] = field(default_factory=lambda: defaultdict(int))

    @classmethod
    def seen(
        cls, module: nn.Module, run: Callable[[Tensor], Any], tokens: Tensor, named: nn.Module | None
    ) -> TokenLookups:
        """Run the tokens with each one place further.

        Args:
            run: the run that is asked about, of other tokens.
            named: the part that the module itself names as its tokens' table.
        Raises: RevprobeError, for a module that runs on its tokens in their own order alone.
        """
        rows: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
        turned = tokens.roll(1, dims=1)
        with torch.no_grad(), running_modules(module, its_path) as running:

            def watch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                if (looked := lookup(func, args, kwargs)) is not None:
                    rows[_caller(func, running)].append(looked[0].detach().clone())
                return func(*args, **kwargs)

            try:
                with FunctionMode(watch):
                    run(turned)
            except (RevprobeError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                raise RevprobeError(
                    f"{type(module).__name__} does not run on these tokens with each one place further ({error}), so "
                    "lookups by token cannot be told from those by place; the three probes and `probe_route_edit` read "
                    "it as it is"
                ) from error
        path = next((path for path, part in module.named_modules() if part is named), None)
        return cls(tokens, turned, rows, path)

    def again(self) -> TokenLookups:
        """The same for a run from its beginning."""
        return TokenLookups(self.tokens, self.turned, self.rows, self.named)

    def by_token(self, func: Any, rows: Tensor, running: Sequence[str]) -> bool:
        """Whether the call that is made now looks its rows up by token; asked of each, in order."""
        caller = _caller(func, running)
        turn, self.calls[caller] = self.calls[caller], self.calls[caller] + 1
        if self.named is not None and self.named in running:
            return True
        others = self.rows.get(caller, ())
        return turn < len(others) and _by_token([(self.tokens, rows), (self.turned, others[turn])])


def _caller(func: Any, running: Sequence[str]) -> tuple[str, str]:
    return func.__name__, running[-1] if running else ""


def lookup(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    """The rows and the table of a call that looks rows up in a table, by any function; None for another call."""
    name = getattr(func, "__name__", "")
    rows: Any
    table: Any
    if name == "embedding":
        rows, table, _ = embedding_call(args, kwargs)
    elif name == "__getitem__":
        table, rows = args
        if isinstance(rows, tuple) and rows and all(one is ... or isinstance(one, slice) for one in rows[1:]):
            rows = rows[0]
    elif name == "index_select":
        given = dict(zip(("input", "dim", "index"), args, strict=False)) | dict(kwargs)
        table, rows = given["input"], given["index"] if given["dim"] == 0 else None
    else:
        return None
    if not isinstance(table, Tensor) or not isinstance(rows, Tensor) or table.dim() < 2:
        return None
    whole = not (rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool)
    return (rows, table) if whole and table.is_floating_point() else None


def embedding_call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Ids, table and the other arguments of a call of `F.embedding`."""
    names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    return given.pop("input"), given.pop("weight"), given


def _by_token(runs: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Whether each token of these runs was looked up in one row, and no two tokens in the same.

    Shapes: tokens, `batch seq`, and rows of each; rows of as many cells in any shape, or with the axes turned.
    """
    return any(_one_to_one([(turn(tokens), rows) for tokens, rows in runs]) for turn in (lambda t: t, lambda t: t.T))


def _one_to_one(runs: Sequence[tuple[Tensor, Tensor]]) -> bool:
    if any(tokens.numel() != rows.numel() for tokens, rows in runs):
        return False
    sides = [torch.cat([side.flatten().cpu() for side in of_runs]) for of_runs in zip(*runs, strict=True)]
    met = torch.stack(sides).unique(dim=1).shape[1]
    return all(len(side.unique()) == met for side in sides)
