"""Writes into weights, stopped before they are made: a trial of an unknown module may run code that changes it.

    with refused_writes(module.named_parameters(), "the model") as refused:
        module(ids)            # raises at an operation that would write into a parameter
    refused.found              # its name, also where the module caught the error itself

Every operation of torch says in its schema which arguments it writes into; that covers what goes past the version
counter (`weight.data.mul_(...)`), views, and arrays that share a parameter's memory. `weight.data = ...` is no
operation, and leaves the memory as it was (`tensor_places`). What is written past torch (arrays over the same memory,
compiled graphs, kernels of others) is not seen here.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from ..errors import RevprobeError
from .tensor_places import where_it_lies


class refused_writes(TorchDispatchMode):  # a verb, as torch's own context managers are
    """Raise RevprobeError, naming the tensor, at an operation that writes into one of `tensors`; `found` keeps it."""

    # Operators on functions (cond, flex_attention) come by as one, and may go on.
    supports_higher_order_operators = True

    def __init__(self, tensors: Iterable[tuple[str, Tensor]], name: str) -> None:
        super().__init__()
        self.name, self.found = name, ""
        self._written_by: dict[Any, list[tuple[int, str]]] = {}  # operation -> the arguments that it writes into
        # Held: freed memory would be given to others, who may write into it.
        self._held = [(path, plain.detach()) for path, tensor in tensors for plain in _plain(tensor)]
        spans = sorted((*span, path) for path, tensor in self._held if (span := _span(tensor)) is not None)
        self._spans: list[tuple[int, int, str]] = []
        for start, end, path in spans:  # tied weights and views of one another become one
            if self._spans and start < self._spans[-1][1]:
                first, last, known = self._spans[-1]
                self._spans[-1] = (first, max(last, end), known)
            else:
                self._spans.append((start, end, path))
        self._starts = [start for start, *_ in self._spans]

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled modules run as they are: their graphs tell autograd themselves what they write into."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in self._written_by:
            # An operator on functions has none: what its functions do comes by one by one.
            arguments = enumerate(getattr(getattr(func, "_schema", None), "arguments", ()))
            written = [(n, a.name) for n, a in arguments if a.alias_info is not None and a.alias_info.is_write]
            self._written_by[func] = written
        for place, name in self._written_by[func]:
            given = args[place] if place < len(args) else kwargs.get(name)
            for tensor in given if isinstance(given, list | tuple) else [given]:
                self._require_other(tensor)
        return func(*args, **kwargs)

    def _require_other(self, tensor: object) -> None:
        for plain in _plain(tensor) if isinstance(tensor, Tensor) else ():
            span = _span(plain)
            before = bisect_right(self._starts, span[1] - 1) - 1 if span is not None else -1
            if span is not None and before >= 0 and self._spans[before][1] > span[0]:
                self.found = self.found or self._spans[before][2]
                raise writes_into(self.name, self.found)


def writes_into(name: str, path: str) -> RevprobeError:
    """The error for a model that changes one of its own weights."""
    return RevprobeError(
        f"{name} writes into its own {path!r} when it is run in eval mode, so no two runs read the same model; keep "
        "state out of its forward pass (an embedding's max_norm: shorten its rows once, and set it to None), or, where "
        "it does so once, run it once in eval mode before it is wrapped"
    )


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that hold the numbers: of a quantised or spread one, those inside it."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for key in tensor.__tensor_flatten__()[0]:
        if isinstance(part := getattr(tensor, key), Tensor):  # not the mesh that it is spread over
            yield from _plain(part)


def _span(tensor: Tensor) -> tuple[int, int] | None:
    """First byte and the one after the last; None of a tensor without memory."""
    place = where_it_lies(tensor)
    if place is None or not tensor.numel():
        return None
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return (start, start + (last + 1) * tensor.element_size()) if start else None
