"""One look at a model: which of its attention calls can be read, and as which layer.

`survey_attention` holds its runs (`attention_look`) against each other. A call is read where it is self-attention over
the query's own tokens with the weights that the model uses; every other is left out with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .attention_calls import FAR_BELOW, Layout, matrix_rows
from .attention_look import SEQUENCES, UNSEEN, Look, SeenCall, look_thrice
from .attention_sites import Attention, AttentionSite

CENTRED = "its scores are given relative to each row's largest, so the scores themselves are not seen"
CROSS = "cross attention or shifted keys: its keys are not made from the tokens that its queries are made from"
SHIFTED = "its rows and columns are not the query's own tokens, but shifted, pooled or cut into blocks"
REORDERED = "its rows and columns are the query's tokens in another order (reversed, sorted, interleaved)"
MEMORY = "its keys or its queries are not made from the query's tokens"
UNEVEN = "its calls differ from one run to the next"
OTHER_STREAM = (
    "the model attends across two streams of tokens (an encoder and a decoder, or a shifted input), so a readout row "
    "is no row of this attention"
)
FOREIGN = (CROSS, SHIFTED)


def survey_attention(
    module: nn.Module,
    run: Callable[[Tensor], Any],
    shown: tuple[Tensor, Tensor],
    *,
    layer_of: Callable[[str], int | None],
    virtual: tuple[int, int] = (0, 0),
) -> Attention:
    """Look at the attention of `module` in three runs of three short sequences.

    Args:
        run: makes one forward pass of token ids.
        shown: the sequences of both runs, `3 seq` each, different ones; the second has other ids in row 1, at
            `attention_look.places_of`.
        layer_of: the layer of a module's path.
        virtual: rows and key columns that stand before the query's own in every call (prompt and prefix adapters).
    """
    length = shown[0].shape[1]
    size = length + virtual[0], length + virtual[1]
    tokens = (shown[0] != shown[1])[1].nonzero()[:, 0].tolist()
    changed = [token + virtual[0] for token in tokens]
    first, second, natural = look_thrice(module, run, shown, changed, size, layer_of)
    places = Places(frozenset(), frozenset(changed), _embedded(second, length, virtual[0]))
    others = {(call.path, call.turn): call for call in second.calls}
    used = {(call.path, call.turn): call.reason for call in natural.calls}
    kept: list[tuple[SeenCall, Layout, tuple[int, int]]] = []
    failed: list[tuple[SeenCall, str]] = []
    told, passed_on = True, False
    for call in first.calls:
        other = others.get((call.path, call.turn))
        if other is None or other.shape != call.shape:
            failed.append((call, UNEVEN))
            continue
        layout, shift, reason, moves = judge(call, other, first, places)
        if call is first.calls[0] and layout is not None:
            places = places._replace(first=_read_elsewhere(changed, shift[0], virtual[0], shown[0][0]))
        told, passed_on = told and moves is not None, passed_on or bool(moves)
        if layout is not None and not call.is_sdpa and used.get((call.path, call.turn)):
            layout, reason = None, used[call.path, call.turn]
        if layout is not None and not call.is_sdpa and is_centred(call, layout):
            layout, reason = None, CENTRED
        if layout is None:
            failed.append((call, reason))
        else:
            kept.append((call, layout, shift))
    if any(reason in FOREIGN for _, reason in failed):
        failed += [(call, OTHER_STREAM) for call, *_ in kept]
        kept = []
    numbers = _numbered([call for call, *_ in kept])
    sites = _sites(kept, numbers, first)
    read = {site.path for site in sites}
    left_out = {call.path if call.path not in read else f"{call.path} (call {call.turn + 1})": r for call, r in failed}
    left_out |= {path: UNSEEN for path in sorted(first.unseen) if path not in read}
    told &= passed_on or len(set(numbers)) < 2
    return Attention(tuple(sites), dict(first.counts), left_out, told=told)


def _numbered(calls: Sequence[SeenCall]) -> list[int]:
    """The layer of each call: that of the numbered module it was made in, or the order of the modules that attend.

    By order where a numbered module runs several times (shared layers), or nothing is numbered. Modules that are given
    the very same input are one layer: heads in modules of their own.
    """
    runs: dict[int, set[tuple[str, int]]] = {}
    for call in calls:
        if call.block is not None:
            runs.setdefault(call.block[0], set()).add(call.block[1:])
    shared = any(len(entries) > 1 for entries in runs.values())
    numbers: list[int] = []
    fresh = 0 if shared else max(runs, default=-1) + 1
    last: SeenCall | None = None
    for call in calls:
        if call.block is not None and not shared:
            numbers.append(call.block[0])
            continue
        same = last is not None and (
            (call.path, call.entry) == (last.path, last.entry) or (call.given is not None and call.given is last.given)
        )
        fresh += 0 if same or last is None else 1
        numbers.append(fresh)
        last = call
    return numbers


def _sites(
    kept: Sequence[tuple[SeenCall, Layout, tuple[int, int]]], numbers: Sequence[int], look: Look
) -> list[AttentionSite]:
    sites: list[AttentionSite] = []
    made: dict[int, list[tuple[SeenCall, AttentionSite]]] = {}
    for (call, layout, shift), layer in zip(kept, numbers, strict=True):
        flat = layout.flat(call.tensors[0], SEQUENCES)
        assert flat is not None, "judged by this layout"
        earlier = made.setdefault(layer, [])
        twin = next((site for other, site in earlier if _same_weights(other, call)), None)
        heads = flat.shape[1]
        after = sum(site.heads for _, site in earlier if not site.repeats)
        extra = (flat.shape[2] - look.rows, call.keys - look.keys)
        site = AttentionSite(
            layer,
            call.path,
            heads,
            "sdpa" if call.is_sdpa else "softmax",
            call.turn,
            first_head=after if twin is None else twin.first_head,
            repeats=twin is not None,
            layout=layout,
            extra=extra,
            shift=shift,
        )
        earlier.append((call, site))
        sites.append(site)
    return sites


def _same_weights(one: SeenCall, other: SeenCall) -> bool:
    pairs = [*zip(one.tensors, other.tensors, strict=True), *zip(one.how, other.how, strict=True)]
    return one.is_sdpa == other.is_sdpa and all(_equal(a, b) for a, b in pairs)


def _equal(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return type(one) is type(other) and one == other


# --- judging ---------------------------------------------------------------------------------------------------------


class Places(NamedTuple):
    """The query's rows that were changed, virtual ones counted.

    `first`: where the first call read another token in sequence 0, known once that call has been judged; `tokens`: in
    sequence 1; `embedded`: in sequence 2, what each embedding may have changed, by what may stand before the tokens.
    """

    first: frozenset[int]
    tokens: frozenset[int]
    embedded: tuple[frozenset[int], ...]

    def of(self, sequence: int) -> Sequence[frozenset[int]]:
        return self.embedded if sequence == 2 else (self.tokens if sequence else self.first,)


def _embedded(look: Look, length: int, virtual: int) -> tuple[frozenset[int], ...]:
    """Of an embedding of more than the query's tokens it is not known whether the others stand before or behind."""
    return tuple(
        frozenset(place - before + virtual for place in places if 0 <= place - before < length)
        for places, width in look.embedded
        for before in range(max(width - length, 0) + 1)
    )


def _read_elsewhere(changed: Sequence[int], shift: int, virtual: int, ids: Tensor) -> frozenset[int]:
    """The query's rows that read the token before in the first call, where that is another token."""
    rows = [row - shift for row in changed if row - shift - virtual > 0]
    return frozenset(row for row in rows if int(ids[row - virtual]) != int(ids[row - virtual - 1]))


class Judged(NamedTuple):
    """The layout in which a call is the query's own self-attention and its shift, else the reason.

    `moves`: whether what the first call writes moves this one; None where its scores are constants, which contradict
    nothing (zero-initialised queries).
    """

    layout: Layout | None
    shift: tuple[int, int]
    reason: str
    moves: bool | None = False


def judge(before: SeenCall, after: SeenCall, look: Look, places: Places) -> Judged:
    """Hold one call of the first run against the same of the second."""
    if before.reason:
        return Judged(None, (0, 0), before.reason)
    reason = look.size_of(before)
    fitting: list[tuple[int, Judged]] = []
    for layout in before.found:
        moved = _moved(before, after, layout)
        if moved is None:
            continue
        extra_rows, extra_keys = moved[0].shape[1] - look.rows, moved[1].shape[1] - look.keys
        if extra_keys < 0:
            continue
        shift, why = _judge_moved(moved, (extra_rows, extra_keys), look, places)
        if not why:
            rows, keys, *told = moved
            constant = not (rows.any() or keys.any()) or not all(side.any() for side in told)
            moves = None if constant else bool(rows[0].any() or keys[0].any())
            fitting.append((int(rows[1].sum()) + int(keys[1].sum()), Judged(layout, shift, "", moves)))
        reason = why or reason
    if not fitting:
        return Judged(None, (0, 0), reason)
    # With as many heads as sequences either axis may be the sequences': taken for them, heads show all that moved.
    return min(fitting, key=lambda fit: fit[0])[1]


def _judge_moved(
    moved: tuple[Tensor, Tensor, Tensor, Tensor], extra: tuple[int, int], look: Look, places: Places
) -> tuple[tuple[int, int], str]:
    """Hold the rows and columns that differ against what self-attention over the query's own tokens would show.

    Shapes: `moved`: rows and keys that differ, and whether each could have been told: `sequence rows`, `sequence keys`.
    """
    rows, keys, rows_told, keys_told = moved
    ahead = (0, look.keys - look.rows)  # virtual keys before the query's own
    shift, token = [], min(places.tokens, default=0)
    for side, more, before in ((rows, extra[0], 0), (keys, extra[1], ahead[1])):
        first = int(side[1].nonzero()[0]) if side[1].any() else token + before
        shift.append(min(max(first - token - before, 0), more))
    own = [side[:, start : start + look.rows] for side, start in ((rows, shift[0]), (keys, shift[1] + ahead[1]))]
    told = [
        side[:, start : start + look.rows] for side, start in ((rows_told, shift[0]), (keys_told, shift[1] + ahead[1]))
    ]
    if not rows.any() and not keys.any():
        return (shift[0], shift[1]), ""  # constant scores contradict nothing
    both = told[0] & told[1]
    if not told[0].any() or not told[1].any():
        return (shift[0], shift[1]), ""
    if not own[0].any() or not own[1].any():
        return (0, 0), MEMORY
    for sequence in (0, 2):
        if ((own[0] != own[1]) & both)[sequence].any():
            return (0, 0), CROSS
    if ((own[0] != own[1]) & both)[1].any():
        return (0, 0), SHIFTED
    for sequence in (1, 0, 2):
        here = (own[0] | own[1])[sequence]
        # The first call may write nothing yet, and a stream need not begin at an embedding.
        if (sequence == 1 or here.any()) and (why := _misplaced(here, both[sequence], places.of(sequence))):
            return (0, 0), why
    return (shift[0], shift[1]), ""


def _misplaced(moved: Tensor, told: Tensor, changed: Sequence[frozenset[int]]) -> str:
    """Why the rows that differ are none of the sets of rows that may have been changed; empty where they are.

    More may differ: convolutions and linear attention hand changes on.
    """
    found, known = set(moved.nonzero()[:, 0].tolist()), set(told.nonzero()[:, 0].tolist())
    if not changed or any(rows & known <= found for rows in changed):
        return ""
    for rows in changed:
        along = ({row + by for row in rows} for by in range(-len(moved), len(moved)))
        if len(rows) == len(found) and not any(found == {*there} & {*range(len(moved))} for there in along):
            return REORDERED
    return SHIFTED


def _moved(before: SeenCall, after: SeenCall, layout: Layout) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Rows and keys that differ between two runs, and whether they could have been told."""
    first = [layout.flat(one, SEQUENCES) for one in before.tensors]
    second = [layout.flat(one, SEQUENCES) for one in after.tensors]
    if any(one is None for one in (*first, *second)):
        return None
    if before.is_sdpa:
        sides = [(a != b).any(-1).any(1) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
        # What is the same at every token says nothing (queries of zero weights).
        told = [(one != one[:1, :, :1]).any() for one in first if one is not None]
        return sides[0], sides[1], told[0].expand(sides[0].shape), told[1].expand(sides[1].shape)
    assert first[0] is not None and second[0] is not None, "checked above"
    return _moved_in_matrix(first[0], second[0])


def _moved_in_matrix(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """The same from whole score matrices: a changed query moves its row, a changed key its column.

    A row counts as moved where it differs outside the columns that may have moved, and the other way round; where a
    mask hides all such cells it cannot be told.
    """
    everything = torch.arange(first.shape[2], device=first.device).expand(len(first), -1)
    seen = matrix_rows(first, everything)
    visible = seen.isfinite().any(1)
    differs = (first != second).any(1) & visible
    if any(_is_constant(seen, axis, first.dtype) for axis in (2, 3)):
        none = torch.zeros_like(visible[:, :, 0]), torch.zeros_like(visible[:, 0])
        return differs.any(2), differs.any(1), *none
    square = min(first.shape[2], first.shape[3])
    rows_told, keys_told = torch.ones_like(visible[:, :, 0]), torch.ones_like(visible[:, 0])
    rows_moved, keys_moved = torch.zeros_like(rows_told), torch.zeros_like(keys_told)
    for n in range(len(first)):
        at_most = differs[n].sum(1), differs[n].sum(0)
        # Candidates: cells of the diagonal; without them, whatever differs most.
        diagonal = differs[n].diagonal().clone()
        rows = torch.zeros_like(rows_moved[n])
        keys = torch.zeros_like(keys_moved[n])
        rows[:square], keys[:square] = diagonal, diagonal
        if first.shape[2] != first.shape[3]:
            rows, keys = at_most[0] * 2 > visible[n].sum(1), at_most[1] * 2 > visible[n].sum(0)
        outside = differs[n] & ~rows[:, None] & ~keys[None, :]
        if outside.any():
            rows, keys = rows | outside.any(1), keys | outside.any(0)
        beside_rows, beside_keys = visible[n] & ~keys[None, :], visible[n] & ~rows[:, None]
        rows_moved[n] = rows & (differs[n] & beside_rows).any(1)
        keys_moved[n] = keys & (differs[n] & beside_keys).any(0)
        rows_told[n] = beside_rows.any(1) | ~rows
        keys_told[n] = beside_keys.any(0) | ~keys
        keys_moved[n] |= keys & ~keys_told[n]
        rows_moved[n] |= rows & ~rows_told[n]
    return rows_moved, keys_moved, rows_told, keys_told


def _is_constant(seen: Tensor, axis: int, dtype: torch.dtype) -> bool:
    """Whether scores are the same along an axis, as those of queries (or keys) that no token moves yet.

    Shapes: `seen`: `sequence heads rows keys`, -inf where a mask hides.
    """
    hidden = seen.isneginf()
    apart = seen.amax(axis) - seen.masked_fill(hidden, torch.inf).amin(axis)
    rounding = max(torch.finfo(dtype).eps, 16 * torch.finfo(torch.float32).eps)  # from row to row of one product
    return not bool((apart > rounding * seen.masked_fill(hidden, 0.0).abs().max()).any())


def is_centred(call: SeenCall, layout: Layout) -> bool:
    """Whether every row's largest score is exactly 0, with others below."""
    scores = layout.flat(call.tensors[0], SEQUENCES)
    if scores is None:
        return False
    return bool((scores.amax(-1) == 0).all() and (scores.masked_fill(scores < -FAR_BELOW, 0.0) != 0).any())
