"""A question and a pair of questions.

A `Query` is a clean sequence with the positions of its target and of its evidence. A `ReversalPair` asks for one
fact twice, in the order it was trained in and in the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from operator import index as whole
from typing import Any

from ...arguments import fitted
from ...errors import RevprobeError, did_you_mean, shown

KINDS = ("same_target", "swapped")


@dataclass(frozen=True)
class Query:
    """A clean sequence, the positions of the target (asked for) and of the evidence (given).

    The model's wrapper hides the target; the tokens here are what it should have been. `token_ids` may be ints or
    a 1-D tensor; positions are sorted. `canvas_start` is for models that write on a canvas behind a prompt: the tokens
    before it are the prompt. 1, the default, makes a begin token the prompt, which probes put in front where a query
    has none.

    >>> Query([4, 0, 0, 30], target_positions=[0], evidence_positions=[3]).target
    (4,)

    Raises: RevprobeError, when a position is outside the sequence, target or evidence is empty, they overlap, or
        their tokens are the same (then the question contains its answer), or a target stands in the prompt.
    """

    token_ids: tuple[int, ...]
    target_positions: tuple[int, ...]
    evidence_positions: tuple[int, ...]
    canvas_start: int = 1

    def __init__(
        self,
        token_ids: Iterable[int],
        target_positions: Iterable[int],
        evidence_positions: Iterable[int],
        canvas_start: int = 1,
    ) -> None:
        object.__setattr__(self, "token_ids", _whole_numbers("token_ids", token_ids))
        object.__setattr__(
            self, "target_positions", tuple(sorted(_whole_numbers("target_positions", target_positions)))
        )
        evidence = _whole_numbers("evidence_positions", evidence_positions)
        object.__setattr__(self, "evidence_positions", tuple(sorted(evidence)))
        object.__setattr__(self, "canvas_start", _whole_numbers("canvas_start", [canvas_start])[0])
        self._validate()

    @property
    def target(self) -> tuple[int, ...]:
        """The token ids asked for."""
        return tuple(self.token_ids[p] for p in self.target_positions)

    @property
    def evidence(self) -> tuple[int, ...]:
        """The token ids of the evidence."""
        return tuple(self.token_ids[p] for p in self.evidence_positions)

    def _validate(self) -> None:
        for part, positions in (("target", self.target_positions), ("evidence", self.evidence_positions)):
            if not positions:
                raise RevprobeError(f"query {list(self.token_ids)} has no {part} position; name at least one")
            if not 0 <= positions[0] <= positions[-1] < len(self.token_ids):
                raise RevprobeError(
                    f"{part} positions {list(positions)} leave the sequence of {len(self.token_ids)} tokens; expected "
                    f"0 to {len(self.token_ids) - 1}"
                )
            if len(set(positions)) < len(positions):
                raise RevprobeError(f"{part} positions {list(positions)} name a position twice; each token counts once")
        if self.canvas_start < 1 or (self.canvas_start > 1 and self.target_positions[0] < self.canvas_start):
            raise RevprobeError(
                f"canvas_start={self.canvas_start} with a target at position {self.target_positions[0]}: expected at "
                "least one token of prompt, and the target behind the prompt"
            )
        shared = set(self.target_positions) & set(self.evidence_positions)
        if shared:
            raise RevprobeError(f"position {min(shared)} is both target and evidence; the evidence must stay visible")
        if self.target == self.evidence:
            raise RevprobeError(
                f"evidence equals target (tokens {list(self.target)}), so the question contains its answer; choose "
                "another pair"
            )

    def as_row(self) -> dict[str, Any]:
        """Its fields, for a file; where the canvas starts only if it is not behind the first token."""
        row = asdict(self)
        return row if self.canvas_start != 1 else {key: one for key, one in row.items() if key != "canvas_start"}

    @classmethod
    def unchecked(
        cls,
        token_ids: Sequence[int],
        target_positions: Sequence[int],
        evidence_positions: Sequence[int],
        canvas_start: int = 1,
    ) -> Query:
        """A query that skips the checks, for steps on the way to a target whose tokens need not make sense together."""
        query = cls.__new__(cls)
        object.__setattr__(query, "canvas_start", canvas_start)
        for name, value in zip(
            ("token_ids", "target_positions", "evidence_positions"),
            (token_ids, target_positions, evidence_positions),
            strict=True,
        ):
            object.__setattr__(query, name, tuple(value))
        return query


@dataclass(frozen=True)
class ReversalPair:
    """One fact asked in the trained order (`forward`) and in the other (`reverse`).

    `different_tokens` is the opt-out from the check below: the two queries name the same words by different tokens.
    Probabilities remain comparable as those of words; the theory's bounds and the shared column of S do not apply.
    `tokens` are the strings of the token ids, where they are known, and `flags` what a list said of the pair (see
    `ReversalPairs`); equal pairs may differ in them.

    Raises: RevprobeError, for the kind "same_target", when the two queries differ in target or evidence tokens;
        for "swapped", when one's target is not the other's evidence.
    """

    forward: Query
    reverse: Query
    kind: str = "same_target"
    fact: str = ""
    different_tokens: bool = False
    tokens: Mapping[int, str] = field(default_factory=dict, compare=False, repr=False)
    flags: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def from_text(cls, *_: object, **__: object) -> ReversalPair:
        """Renamed: `rp.pair_from_text`, with the same arguments. Raises: RevprobeError, saying so."""
        raise RevprobeError("ReversalPair.from_text is now revprobe.pair_from_text, with the same arguments")

    def __post_init__(self) -> None:
        require_kind(self.kind)
        for side in ("forward", "reverse"):
            if not isinstance(getattr(self, side), Query):
                fitted(side, getattr(self, side), Query)
        if self.different_tokens is not True and self.different_tokens is not False:
            object.__setattr__(self, "different_tokens", fitted("different_tokens", self.different_tokens, bool))
        if self.different_tokens:
            return
        same = (self.forward.target, self.forward.evidence) == (self.reverse.target, self.reverse.evidence)
        swapped = (self.forward.target, self.forward.evidence) == (self.reverse.evidence, self.reverse.target)
        if not (same if self.kind == "same_target" else swapped):
            expected = (
                "the same target and evidence tokens"
                if self.kind == "same_target"
                else "target and evidence tokens exchanged"
            )
            raise RevprobeError(
                f"pair {self.fact!r} of kind {self.kind!r} needs {expected}, got target {list(self.forward.target)} / "
                f"evidence {list(self.forward.evidence)} "
                f"forward and target {list(self.reverse.target)} / evidence {list(self.reverse.evidence)} in reverse; "
                "align the tokens or use the other kind"
            )


def require_kind(kind: str) -> None:
    if not isinstance(kind, str) or kind not in KINDS:
        raise RevprobeError(f"unknown kind of pair {shown(kind)}{did_you_mean(str(kind), KINDS)}")


def _whole_numbers(name: str, given: Iterable[int]) -> tuple[int, ...]:
    """Ids or positions as they are kept. Raises: RevprobeError, for anything else."""
    try:
        return tuple(whole(one) for one in given)
    except TypeError:
        return tuple(fitted(name, given, Iterable[int]))
