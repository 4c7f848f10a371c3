"""Which layers or heads a user asked for: as whole numbers, and only such as the model has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import index as whole

from ...errors import RevprobeError
from ...models.probed import ProbedModel

_SHOWN = 12


def listed(what: str, asked: Iterable[int]) -> list[int]:
    """Layers or heads as whole numbers, ascending, each once. Raises: RevprobeError, for anything else."""
    try:
        return sorted({whole(one) for one in asked})
    except TypeError as error:
        raise RevprobeError(f"{what}s {asked!r}: expected a list of whole numbers, such as {what}s=[0]") from error


def chosen_of(
    what: str,
    asked: Iterable[int] | None,
    there: Sequence[int],
    *,
    model: ProbedModel,
    purpose: str,
    without_attention: Sequence[int] = (),
) -> list[int]:
    """The layers or heads asked for among those that are `there`, all of them when None.

    Args:
        purpose: what they are wanted for, as in "no layer 7 to edit".
        without_attention: layers without softmax attention, which the error then says.
    Raises: RevprobeError, for one that is not there, or none at all.
    """
    if asked is None:
        return list(there)
    chosen = listed(what, asked)
    wrong = [one for one in chosen if one not in there]
    if wrong or not chosen:
        named = f"{what} {wrong[0]!r}" if wrong else f"{what} list []"
        some = ", ".join(map(str, sorted(there)[:_SHOWN])) + (", ..." if len(there) > _SHOWN else "")
        if wrong and wrong[0] in without_attention:
            raise RevprobeError(
                f"{named} of {model.name} has no softmax attention to {purpose}: expected some of {some}"
            )
        raise RevprobeError(f"no {named} to {purpose} in {model.name}: expected some of {some}")
    return chosen
