"""Three runs of a model that show which of its tokens each attention call is about; `attention_survey` judges them.

Runs of three short sequences. In the first two, every call is answered as if each token attended to itself alone, so
that nothing passes from token to token through attention. The second run makes three changes, one for each sequence:

    0   some tokens read the one before them in the first call: what the first call writes is changed there
    1   some tokens are other ones
    2   the embeddings of some tokens are changed, of other tokens each time that the sequence is embedded

Then only the rows (queries) and columns (keys) of changed tokens can differ between the runs, to the bit, in every
layer at once. A call is self-attention over the query's own tokens exactly if the same rows and columns differ, those
of the tokens that were changed. A shifted input, pooling, blocks and tokens in another order differ elsewhere, and
cross attention differs in rows without columns. Whether the weights are those that the model uses is seen as well: an
SDPA call's own output is compared with the weights' on its values, and the answer to a softmax (ones where a token
meets itself) must come back unchanged where the values are mixed. What keeps ones and zeros as they are changes other
weights (the largest two kept, squares, a decay): the third run leaves every softmax its own, and they must come back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .attention_calls import (
    LOG_SOFTMAX,
    MOST_EXTRA,
    FunctionMode,
    Layout,
    Uncentred,
    call_rows,
    canonical,
    is_attention_call,
    is_product,
    layouts,
    reproduces,
    running_modules,
    sdpa_call,
    softmaxed,
)
from .untouched import untouched

SEQUENCES = 3
# What is changed at each place: nothing (a), the token in sequence 1 (b), the embedding in 2 (c), both (d). No stretch
# of this word reads the same backwards, none stands twice in a row: a call whose tokens are reversed, rolled along or
# exchanged with the next ones, all of them or any stretch, has changes where there were none. So has one that takes
# every other token first, or two halves in turn.
_PLACES = "abcdacbdabc"
UNUSED = "a softmax whose weights multiply no values"
CHANGED = "its softmax weights are changed before they meet the values (mixed across heads, gated, renormalised)"
UNSEEN = "the weights that multiply its values come from no softmax that is seen"
OUTPUT = "the weights worked out from its query, key and mask do not give its own output"


def places_of(length: int) -> tuple[list[int], list[int]]:
    """Where sequences of so many tokens are changed: the tokens of sequences 0 and 1, the embeddings of sequence 2."""
    word = _PLACES[:length]
    tokens, embeddings = ([place for place, change in enumerate(word) if change in some] for some in ("bd", "cd"))
    return tokens or [0], embeddings


@dataclass
class SeenCall:
    """One call of one run: where it was made, and its tensors.

    `entry`: how often the module at `path` had been entered; `block`: layer and entry of the outermost numbered module
    that was running; `given`: what the module at `path` was given first.
    """

    path: str
    turn: int
    entry: int
    block: tuple[int, str, int] | None
    given: Any
    tensors: tuple[Tensor, ...]
    shape: tuple[int, ...]
    found: list[Layout]
    keys: int
    reason: str = ""
    how: tuple[float | None, bool, Tensor | None] = (None, False, None)  # scale, causality and mask of an SDPA call

    @property
    def is_sdpa(self) -> bool:
        return len(self.tensors) == 2


@dataclass
class Look:
    """What one run of the survey sees, and what it answers.

    `rows`, `keys`: of a call over these sequences; `changed`: the rows of the tokens that this run changes in sequences
    0 and 1; `embedded`: the places that were changed in sequence 2 each time it was embedded, and of how many;
    `natural`: every call is left its own answer, and only what meets the values is watched.
    """

    rows: int
    keys: int
    layer_of: Callable[[str], int | None]
    changed: Sequence[int] | None = None
    natural: bool = False
    calls: list[SeenCall] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    unseen: set[str] = field(default_factory=set)
    running: list[tuple[str, int, Any]] = field(default_factory=list)
    entered: Counter[str] = field(default_factory=Counter)
    embedded: list[tuple[list[int], int]] = field(default_factory=list)
    uncentred: Uncentred = field(default_factory=Uncentred)
    waiting: list[tuple[SeenCall, Tensor]] = field(default_factory=list)

    # ---- what is running ----

    @contextmanager
    def watching(self, module: nn.Module) -> Iterator[None]:
        with running_modules(module, self._note) as self.running, FunctionMode(self.make):
            yield

    def _note(self, path: str, arguments: Any) -> tuple[str, int, Any]:
        """A module that is entered: its path, how often it was, and what it is given first."""
        self.entered[path] += 1
        given = next((one for one in tree_leaves(arguments) if isinstance(one, Tensor)), None)
        return path, self.entered[path], given

    @property
    def _block(self) -> tuple[int, str, int] | None:
        numbered = ((self.layer_of(name), name, entry) for name, entry, _ in self.running)
        return next(((n, name, entry) for n, name, entry in numbered if n is not None), None)

    # ---- torch calls ----

    def make(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if is_attention_call(func) and self.running:
            path, entry, given = self.running[-1]
            turn, self.counts[path] = self.counts[path], self.counts[path] + 1
            seen = SeenCall(path, turn, entry, self._block, given, (), (), [], 0)
            if func is F.scaled_dot_product_attention:
                return self._sdpa(seen, func, sdpa_call(args, kwargs))
            return self._softmax(seen, func, args, kwargs)
        name = getattr(func, "__name__", "")
        if is_product(func):
            self._mixing(args)
        result = func(*args, **kwargs)
        if name == "embedding" and self.changed is not None:
            result = self._embedding(args, kwargs, result)
        return self.uncentred.note(func, args, result)

    def _embedding(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> Tensor:
        """Change some tokens of sequence 2, other ones each time that the sequences are embedded."""
        ids = args[0] if args else kwargs["input"]
        if ids.dim() != 2 or len(ids) != SEQUENCES or (ids == ids[:1]).all() or not result.is_floating_point():
            return result
        length = ids.shape[1]
        at = [(place + len(self.embedded)) % length for place in places_of(length)[1]]
        self.embedded.append((at, length))
        result = result.clone()
        result[2, at] = result[2, at] * -0.5 + 1.0
        return result

    # ---- answers: every token attends to itself ----

    def _sdpa(self, seen: SeenCall, func: Any, call: dict[str, Any]) -> Tensor:
        query, key, value = (call[name] for name in ("query", "key", "value"))
        seen.tensors, seen.shape, seen.keys = (query.detach(), key.detach()), tuple(query.shape), key.shape[-2]
        seen.found = layouts(query.shape, query.dim() - 1, SEQUENCES, self.rows, row_axis=query.dim() - 2)
        mask = call.get("attn_mask")
        seen.how = call.get("scale"), bool(call.get("is_causal")), None if mask is None else mask.detach()
        self.calls.append(seen)
        output: Tensor = func(**call)
        if self.natural:
            return output
        own = next((canonical(call, layout, SEQUENCES) for layout in seen.found), None)
        if own is None or seen.keys < self.keys:
            seen.reason = self.size_of(seen)
            return output
        if self.changed is None and not self._reproduces(own, seen.found[0].flat(output, SEQUENCES)):
            seen.reason = OUTPUT
        heads = own["query"].shape[1]
        values = own["value"].repeat_interleave(heads // own["value"].shape[1], dim=1)
        rows = torch.arange(own["query"].shape[2], device=value.device)
        reads = self._reads(rows, values.shape[2])[:, None, :, None].expand(-1, heads, -1, values.shape[-1])
        return seen.found[0].back(values.gather(2, reads)).to(output.dtype)

    def _reproduces(self, call: dict[str, Any], output: Tensor | None) -> bool:
        rows = torch.arange(call["query"].shape[2], device=call["query"].device).expand(SEQUENCES, -1)
        return output is not None and reproduces(call_rows(call, rows), call["value"], output)

    def _reads(self, rows: Tensor, keys: int) -> Tensor:
        """The key that each row reads: its own token's. Shapes: `rows -> sequence rows`."""
        own = (rows + max(self.keys - self.rows, 0)).clamp(max=keys - 1).expand(SEQUENCES, -1).clone()
        if self.changed is not None and len(self.calls) == 1:
            before = [row - 1 for row in self.changed]
            own[0, self.changed] = own[0, before]  # in sequence 0 the first call is answered otherwise
        return own

    def size_of(self, seen: SeenCall) -> str:
        return (
            f"attention over a tensor {seen.shape} with {seen.keys} keys for {SEQUENCES} sequences of {self.rows} "
            "tokens: other tokens than the query's (cross attention, pooling, blocks)"
        )

    def _softmax(self, seen: SeenCall, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        result: Tensor = func(*args, **kwargs)
        softmax = softmaxed(func, args, kwargs)
        if softmax is None or softmax[0].dim() < 3:
            return result
        scores, axis = self.uncentred.scores(softmax[0]), softmax[1]
        seen.tensors, seen.shape, seen.keys = (scores.detach().clone(),), tuple(scores.shape), scores.shape[axis]
        if 0 <= seen.keys - self.keys <= MOST_EXTRA:
            seen.found = layouts(scores.shape, axis, SEQUENCES, self.rows)
        if not seen.found:
            if scores.dim() > 3:  # routers and vocabularies have no heads
                seen.reason = self.size_of(seen)
                self.calls.append(seen)
            return result
        self.calls.append(seen)
        if self.natural:
            # Copies, here and below: what is written into the weights themselves is a change as well.
            self.waiting.append((seen, result.detach().exp() if func in LOG_SOFTMAX else result.detach().clone()))
            seen.reason = UNUSED
            return result
        layout = seen.found[0]
        flat = layout.flat(result, SEQUENCES)
        assert flat is not None, "the layout is the tensor's own"
        reads = self._reads(torch.arange(flat.shape[2], device=flat.device), flat.shape[3])
        answer = F.one_hot(reads, flat.shape[3])[:, None].expand(flat.shape)
        answer = layout.back(answer.to(result.dtype)).contiguous()
        self.waiting.append((seen, answer.clone()))
        if self.changed is None:
            seen.reason = UNUSED  # until it is seen to be used
        return answer.log() if func in LOG_SOFTMAX else answer

    def _mixing(self, args: tuple[Any, ...]) -> None:
        """A matrix product: is one side the answer to a softmax, or weights of unknown origin?"""
        if self.changed is not None:
            return
        for side in tree_leaves(args):
            if not isinstance(side, Tensor) or not side.is_floating_point() or side.dim() < 2:
                continue
            if self._is_answer(side.detach()):
                return
            if side.shape[-2:] == (self.rows, self.keys) and side.dim() > 2 and self._may_weigh(side.detach()):
                late = next((seen for seen, _ in reversed(self.waiting) if seen.reason == UNUSED), None)
                if late is not None and self.running and _near(late.path, self.running[-1][0]):
                    late.reason = CHANGED
                elif self.running:
                    self.unseen.add(self.running[-1][0])

    def _is_answer(self, side: Tensor) -> bool:
        for seen, answer in reversed(self.waiting):
            same = _same_numbers if self.natural else _same
            if seen.reason == UNUSED and same(side, answer, self.rows, self.keys):
                seen.reason = ""
                return True
        return False

    @staticmethod
    def _may_weigh(side: Tensor) -> bool:
        return bool((side >= 0).all() and side.any() and not (side == side.flatten()[0]).all())


def _near(path: str, other: str) -> bool:
    """Whether two modules are one, or one is inside the other."""
    return path == other or path.startswith(f"{other}.") or other.startswith(f"{path}.") or not path or not other


def _same(side: Tensor, answer: Tensor, rows: int, keys: int) -> bool:
    """Whether what is mixed with values is the answer to a softmax: ones on the diagonal, sinks' columns dropped."""
    if side.shape == answer.shape:
        return bool((side == answer).all())
    if side.dim() == answer.dim() and side.shape[:-1] == answer.shape[:-1] and side.shape[-1] == keys:
        return bool((side == answer[..., :keys]).all())
    square = side.dim() > 1 and side.shape[-1] == side.shape[-2] == rows == keys
    return square and side.numel() == answer.numel() and bool((side == torch.eye(rows, device=side.device)).all())


def _same_numbers(side: Tensor, answer: Tensor, rows: int, keys: int) -> bool:
    """Whether what is mixed with values are the very weights, in whatever layout, sinks' columns dropped."""
    answer = answer.to(side.dtype)
    if side.shape != answer.shape and answer.shape[-1] > keys and side.shape[-1] == keys:
        answer = answer[..., :keys]
    return side.numel() == answer.numel() and torch.equal(side.flatten().sort().values, answer.flatten().sort().values)


def look_thrice(
    module: nn.Module,
    run: Callable[[Tensor], Any],
    shown: tuple[Tensor, Tensor],
    changed: Sequence[int],
    size: tuple[int, int],
    layer_of: Callable[[str], int | None],
) -> tuple[Look, Look, Look]:
    """Both runs, and one in which every call is left its own answer. The module comes out as it went in.

    Shapes: `shown`: `3 seq` twice, rows that differ; the second differs from the first in row 1 alone.
    Args:
        changed: the rows of a call, of the tokens that differ there.
    """
    looks = []
    with untouched(module), torch.no_grad():
        for ids, rows, natural in ((shown[0], None, False), (shown[1], changed, False), (shown[0], None, True)):
            look = Look(size[0], size[1], layer_of, rows, natural)
            with look.watching(module):
                run(ids)
            looks.append(look)
    return looks[0], looks[1], looks[2]
