"""A module and how it wants to be called: all that is needed to run it, before anything else is known of it."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import RevprobeError
from ...hooks.token_tables import token_tables
from . import introspect
from .block_masks import added_to_scores, block_mask, finished_causal_mask


class CalledModule:
    """A module that takes `batch seq` token ids and gives a row of logits for each of them.

    `block_size`: its queries see finished blocks of so many tokens and their own; None: what the module itself does.
    """

    module: nn.Module
    block_size: int | None = None
    mask_token_id: int | None = None  # what hides tokens, once that is known

    def __init__(self, module: nn.Module, name: str | None = None, block_size: int | None = None) -> None:
        self.module, self.name, self.block_size = module, name or type(module).__name__, block_size
        self._rows: dict[tuple[int, ...], int] = {}  # of the tokens' table, by the sizes of all: they may be resized
        parameters = inspect.signature(module.forward).parameters.values()
        self._accepts = {parameter.name for parameter in parameters}
        self._accepts_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)

    @property
    def device(self) -> torch.device:
        """Where the input goes: the first parameter's device, passing over those that wait on disk ("meta")."""
        devices = (p.device for p in self.module.parameters())
        return next((device for device in devices if device.type != "meta"), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Of the first parameter that holds fractions."""
        first = next(self.module.parameters()).dtype
        return next((p.dtype for p in self.module.parameters() if p.is_floating_point()), first)

    @property
    def vocab_size(self) -> int:
        """Rows of the input embedding, the mask token included."""
        embed = introspect.input_embedding(self.module)
        if embed is not None:
            return int(embed.weight.shape[0])
        size = introspect.config_value(self.module, "vocab_size") or self._rows_looked_up()
        if size is None:
            raise RevprobeError(
                f"{self.name} has neither an embedding of tokens nor a config with vocab_size; expected a language "
                "model, which takes token ids"
            )
        return size

    def _rows_looked_up(self) -> int | None:
        """Rows of the table that tokens are looked up in; None without a table.

        A table of positions may be the longer one, and an MLP as wide as it: the module is run to see.
        """
        sizes = tuple(m.num_embeddings for m in self.module.modules() if isinstance(m, nn.Embedding))
        if len(set(sizes)) < 2:
            return next(iter(sizes), None)
        if sizes in self._rows:
            return self._rows[sizes]
        seen = [len(table) for table in token_tables(self.module, self.device) or []]
        heads = {m.out_features for m in self.module.modules() if isinstance(m, nn.Linear)}
        known = seen or sizes
        rows = max([size for size in known if size in heads] or known)
        if seen:  # weights that wait on disk may come later
            self._rows[sizes] = rows
        return rows

    @property
    def max_length(self) -> int | None:
        """The longest sequence the model takes; None when it names no limit."""
        return introspect.max_length(self.module)

    @property
    def canvas_length(self) -> int | None:
        """Tokens that stand behind a prompt, random ones where none are given; None for a model without a canvas."""
        return introspect.canvas_length(self.module)

    @property
    def draws(self) -> int:
        """How many fillings with random tokens a reading is a mean over; 1 for a model with a mask token."""
        return introspect.draws(self.module)

    @property
    def takes_padding(self) -> bool:
        """Whether the module has an argument for an attention mask, or takes any."""
        return "attention_mask" in self._accepts or self._accepts_any

    def run(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits as the module gives them. Shapes: `batch seq, batch seq -> batch rows vocab`."""
        kwargs: dict[str, Any] = {}
        if self.block_size is not None:
            sees = self._sees(input_ids, attention_mask, self.block_size)
            attention_mask = added_to_scores(sees, attention_mask, self.dtype).expand(len(input_ids), -1, -1, -1)
        if attention_mask is not None:
            kwargs["attention_mask"] = attention_mask
        if "use_cache" in self._accepts:
            kwargs["use_cache"] = False
        with uncompiled():
            return self.logits_in(self.module(input_ids, **kwargs))

    def _sees(self, input_ids: Tensor, attention_mask: Tensor | None, size: int) -> Tensor:
        """Who sees whom, padding apart. Shapes: `batch seq, batch seq or None -> seq seq or batch seq seq (bool)`."""
        if self.mask_token_id is not None and introspect.finished_blocks(self.module) == "causal":
            hidden = input_ids == self.mask_token_id
            # Padding may have the mask token's id, and leaves no block unfinished.
            return finished_causal_mask(hidden if attention_mask is None else hidden & attention_mask.bool(), size)
        return block_mask(input_ids.shape[1], size, device=input_ids.device)

    def logits_in(self, output: Any) -> Tensor:
        """The logits in what the module returned: named so, or the first of a tuple that is as wide as the vocabulary.

        Raises: RevprobeError, when there are none.
        """
        if not isinstance(output, Tensor):
            held = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
            if held is None and isinstance(output, tuple | list):
                tables = [one for one in output if isinstance(one, Tensor) and one.dim() == 3]
                fitting = (one for one in tables if one.shape[-1] == self.vocab_size)
                held = next(fitting, tables[0] if tables else None)
            output = held
        if not isinstance(output, Tensor):
            raise RevprobeError(
                f"{self.name} returns no logits; expected a tensor `batch seq vocab`, or an object, mapping or tuple "
                "with it"
            )
        return output

    def logits(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The same; a `ProbedModel`, which knows where the tokens stand, gives one row for each of them."""
        return self.run(input_ids, attention_mask)

    def explain_non_finite(self) -> str:
        """Name the first weight that is not finite, for the error that reports NaN logits."""
        held = ((name, p) for name, p in self.module.named_parameters() if not p.is_meta)
        bad = next((name for name, p in held if not torch.isfinite(p).all()), None)
        where = (
            f"its weight {bad!r} holds NaN or infinity"
            if bad
            else "its weights are finite, so an activation overflowed"
        )
        return f"{self.name} gives NaN logits: {where}; load a sound checkpoint or a wider dtype"


@contextmanager
def uncompiled() -> Iterator[None]:
    """What torch.compile compiled runs as it was written inside: graphs pass over hooks, taps and edits.

    The stance is torch's, of all threads at once: the first that comes in notes that of before, and the last that
    leaves puts it back. Nothing is compiled where torch's compiler was never imported, which takes seconds.
    """
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with _LOCK:
        if not _Inside.passes:
            _Inside.stance = torch.compiler.set_stance("force_eager")
        _Inside.passes += 1
    try:
        yield
    finally:
        with _LOCK:
            _Inside.passes -= 1
            if not _Inside.passes:
                _Inside.stance.__exit__(None, None, None)


class _Inside:
    """The passes that run now, and what gives back the compiler's stance of before the first of them."""

    passes = 0
    stance: Any = None


_LOCK = threading.Lock()


def require_numbers(called: CalledModule, logits: Tensor) -> Tensor:
    """The logits. Raises: RevprobeError, when one of them is NaN."""
    if logits.isnan().any():
        raise RevprobeError(called.explain_non_finite())
    return logits
