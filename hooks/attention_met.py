"""Whether the weights that a tap reads are those that meet the values, in the very run that is read.

The look (`attention_look`) is over a few tokens, and what a model does with weights may begin beyond: a window, the
largest few, a gate. So each tap holds the rows that it reads, and those alone, against what the run does with them: an
SDPA call's own output against the weights on its values, and a softmax's rows against what is multiplied behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .attention_calls import LOG_SOFTMAX, Layout, at_rows, canonical, layouts, reproduces, sdpa_call
from .attention_sites import AttentionSite


@dataclass(eq=False)  # one of a site and run, whatever its weights
class Awaited:
    """One softmax's weights, from when they are computed until they are seen to meet values.

    Shapes: `weights`: `batch heads rows keys` at `at` (`batch rows`). `keep`: what is done once they have met.
    """

    site: AttentionSite
    weights: Tensor
    at: Tensor
    shape: tuple[int, ...]
    size: tuple[int, int]
    keep: Callable[[], None]

    @classmethod
    def of(
        cls,
        site: AttentionSite,
        func: Any,
        result: Tensor,
        at: Tensor,
        size: tuple[int, int],
        keep: Callable[[], None],
    ) -> Awaited:
        """Rows of a softmax's result; `size`: query rows and key columns of the query's own tokens."""
        flat = site.layout.flat(result.detach(), len(at))
        assert flat is not None, "its input was read in this layout"
        weights = at_rows(flat, at)  # a copy: what is written into the result shows
        weights = weights.exp() if func in LOG_SOFTMAX else weights
        return cls(site, weights, at, tuple(result.shape), size, keep)

    def met(self, side: Tensor) -> bool:
        """Whether these are the rows of what is multiplied, in whatever layout, sinks' columns dropped or not."""
        return any(self._same(flat) for flat in self._flat(side))

    def _flat(self, side: Tensor) -> Iterator[Tensor]:
        """Shapes: `-> batch heads rows keys`, the likeliest first."""
        batch, keys = len(self.at), self.weights.shape[3]
        if tuple(side.shape) == self.shape and (flat := self.site.layout.flat(side, batch)) is not None:
            yield flat
        if side.numel() not in (whole := _count(self.shape), whole // keys * self.size[1]):
            return
        for axis in reversed(range(side.dim())):
            if side.shape[axis] in (keys, self.size[1]):
                found: list[Layout] = layouts(side.shape, axis, batch, self.size[0])
                yield from (flat for layout in found if (flat := layout.flat(side, batch)) is not None)

    def _same(self, flat: Tensor) -> bool:
        if flat.shape[1] != self.weights.shape[1] or flat.shape[2] <= int(self.at.max()):
            return False
        expected = self.weights[..., : flat.shape[3]].to(flat.dtype)
        # A row that sees nothing is NaN here, and whatever the model makes of it behind.
        return bool(((at_rows(flat, self.at) == expected) | expected.isnan()).all())


def _count(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


@dataclass
class Meetings:
    """The softmaxes of a run whose weights have met no values yet, the latest last."""

    waiting: list[Awaited] = field(default_factory=list)

    def mixed(self, args: tuple[Any, ...]) -> None:
        """See what goes into a product."""
        if not self.waiting:
            return
        for side in tree_leaves(args):
            if isinstance(side, Tensor) and side.is_floating_point() and side.dim() > 1:
                one = next((one for one in reversed(self.waiting) if one.met(side.detach())), None)
                if one is not None:
                    self.waiting.remove(one)
                    one.keep()
                    return


def gives_output(
    site: AttentionSite, call: tuple[Any, dict[str, Any]], scores: Tensor, output: Tensor, at: Tensor
) -> bool:
    """Whether an SDPA call's output at some rows is that of the weights worked out for them.

    Shapes: `scores`: `batch heads rows keys`; `at`: `batch rows`.
    """
    given, flat = canonical(sdpa_call(*call), site.layout, len(at)), site.layout.flat(output.detach(), len(at))
    if given is None or flat is None:
        return False
    sees = scores.isfinite().any(-1, keepdim=True)  # a row that sees nothing has no weights to hold
    return reproduces(scores, given["value"].detach(), torch.where(sees, at_rows(flat, at), torch.nan))
