"""What a reading must be held against beside shuffled facts: each a reading of its own, on the same facts.

    untrained   the same configuration with initial weights: what architecture, tokens and chance give
    neighbour   attention: the score at the token beside the evidence; gradient: the reverse query asked for the token
                beside its target. What two queries share whatever the fact
    sink        attention: the score at the position that the head attends to most, evidence aside
    parent      another model on its own pairs: the autoregressive parent of a diffusion model

Facts shuffled within groups are each reading's `control`, and stand first in its table of controls.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..errors import RevprobeError, did_you_mean, first_line
from ..models.probed import ProbedModel, as_probed
from .pairs.pairs import ReversalPairs
from .passes.beside import LEFT_OUT, NEIGHBOUR, SINK
from .readings.reading import Reading
from .statistics.paired import measured_difference, side_of

SHUFFLED, UNTRAINED, PARENT, ALL = "shuffled", "untrained", "parent", "all"
CONTROLS = (SHUFFLED, UNTRAINED, NEIGHBOUR, SINK, PARENT)
CONTROLLED = ("attention", "gradient")  # the probes that have them, by their short names
NOT_ATTENDED = "a gradient is of parameters and attends to no position"
NUMBERS = ("model", "value", "low", "high", "n", "facts", "difference", "difference_low", "difference_high")
OTHER_KIND = "asked with pairs of kind {}, so without a difference"
ON_THE_SAME = "difference: over the {:,} of {:,} pairs ({:,} facts) that have a part in both"
NONE_SHARED = "of no fact that the reading has a number of, so without a difference"

Parent = ProbedModel | nn.Module | tuple[ProbedModel | nn.Module, ReversalPairs]
# Takes the reading of a control, or says why there is none.
Reader = Callable[[], Reading] | str
Part = Callable[[Reading], Reading]


def _whole(reading: Reading) -> Reading:
    return reading


def require_controls(names: Iterable[str], parent: bool) -> tuple[str, ...]:
    """The controls that are asked for, each once and in their order; "all" without the parent where there is none.

    Raises: RevprobeError, for an unknown name, and for a parent without a model or a model without being asked for.
    """
    names = list(names)
    for name in names:
        if name not in (*CONTROLS, ALL):
            raise RevprobeError(f"unknown control {name!r}{did_you_mean(name, [*CONTROLS, ALL])}")
    if ALL in names:
        names = [name for name in CONTROLS if name != PARENT or parent]
    if PARENT in names and not parent:
        raise RevprobeError("the control 'parent' needs a model: pass parent=model, or parent=(model, its pairs)")
    if parent and PARENT not in names:
        raise RevprobeError(f"a parent is given for the controls {names}: add 'parent' to them, or leave it out")
    return tuple(name for name in CONTROLS if name in names)


@dataclass(frozen=True)
class Controls:
    """Which controls are asked for, and the model and pairs of `parent` (those of the reading when None)."""

    names: tuple[str, ...] = ()
    parent: tuple[ProbedModel, ReversalPairs | None] | None = None

    @classmethod
    def asked(
        cls, controls: str | Iterable[str], parent: Parent | None = None, *, of: Collection[str] = CONTROLLED
    ) -> Controls:
        """Read what a probe was given for `controls` and `parent`.

        Args:
            of: the probes that take part, by their short names.
        Raises: RevprobeError, for an unknown name, for a parent without a model or a model without being asked for, and
            where no probe takes part that has controls.
        """
        names = require_controls([controls] if isinstance(controls, str) else controls, parent is not None)
        if names and not {*of} & {*CONTROLLED}:
            raise RevprobeError(
                f"controls {', '.join(names)} of {', '.join(of)} alone, which has none but its shuffled facts; name "
                "'attention' or 'gradient' too, or leave controls out"
            )
        if parent is None:
            return cls(names)
        model, own = parent if isinstance(parent, tuple) else (parent, None)
        return cls(names, (as_probed(model), own))

    def beside(self, reading: Reading, readers: Mapping[str, Reader], part: Part = _whole) -> Reading:
        """The reading with a table of its controls in `meta["controls"]`; itself where none was asked for.

        Args:
            part: what of a control's reading stands beside this one, where this one is a part of what was read.
        """
        wanted = [name for name in CONTROLS if name in self.names and name != SHUFFLED]
        if not self.names:
            return reading
        rows = [_row(name, reading, readers[name], part) for name in wanted]
        return replace(reading, meta=reading.meta | {"controls": rows})


def _row(name: str, reading: Reading, reader: Reader, part: Part) -> dict[str, Any]:
    """The number of one control, and by how much the reading's differs over the facts of both."""
    row: dict[str, Any] = {"control": name} | dict.fromkeys(NUMBERS, None) | {"reason": ""}
    if isinstance(reader, str):
        return row | {"reason": reader}
    try:
        other = part(reader())
    except (RevprobeError, torch.OutOfMemoryError) as error:  # the reading itself stands; this control is not to be had
        return row | {"reason": first_line(error, with_type=not isinstance(error, RevprobeError))}
    low, high = other.interval
    row |= {"model": other.meta["model"], "value": other.value, "low": low, "high": high}
    row |= {"n": other.n, "facts": other.facts}
    said = [f"{count} {why}" for why, count in other.undefined.items()]
    missing = reading.meta["pair_count"] - other.meta["pair_count"]
    said += [f"{missing} {LEFT_OUT[name]}"] if name in LEFT_OUT and missing else []
    said += [other.caution] if other.caution else []
    if other.meta["kind"] != reading.meta["kind"]:
        return row | {"reason": "; ".join([*said, OTHER_KIND.format(other.meta["kind"])])}
    sides = (side_of(reading.name, one.frame) for one in (reading, other))
    found = measured_difference(*sides, seed=reading.seed, control=False, same_pairs=name != PARENT)
    apart = found.estimate
    row |= {"difference": apart.value, "difference_low": apart.low, "difference_high": apart.high}
    if 0 < apart.n < reading.n:
        said.append(ON_THE_SAME.format(apart.n, reading.n, apart.facts))
    said += [f"difference: {found.caution}"] if found.caution else []
    said += [NONE_SHARED] if not apart.facts and other.n and reading.n else []
    return row | {"reason": "; ".join([*said, *(f"difference: {why}" for why in found.undefined)])}
