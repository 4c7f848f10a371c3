"""Which terms of a loss are left out: the dials of negative evidence, for letters and for bare pairs told in text.

Training sees the lowercase letter (the target) left of its uppercase partner (the evidence). A row whose evidence is
visible and whose target is hidden also prices its masked placeholders. Those right of the evidence say "placeholder"
where, seen from the evidence, a reversed query asks for the target: they are negative evidence about the reverse
answer. A dial leaves some of these terms out and touches nothing else: their cross-entropy is multiplied by a weight
(0 unless asked otherwise), while divisor, rates and masks stay as they are.

    keep                the objective as it is
    drop-right          placeholders right of the evidence
    drop-left           placeholders left of the evidence
    drop-both           both
    drop-right-matched  as many of the right ones as there are on the side with fewer, at random; so drop-left-matched
    mirror              where the uppercase letter is hidden and the lowercase visible: placeholders left of the latter.
                        Reflection and exchange of cases map it onto drop-right, so counts and weights are alike; it is
                        negative evidence about the mirrored question alone
    drop-after          causal models: tokens after the second letter

Bare pairs in text ("A B", nothing else) have names of several tokens for letters, the first named for the lowercase
one, and end tokens that fill a row up for placeholders. An entity is hidden when all of its tokens are, and visible
when any is not: a term beside half of a name is negative evidence too. With single letters that is the same.

Shapes below: batch, seq, vocab.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Of each token: what it is in a sequence of letters. Mask, begin and padding are OTHER.
PLACEHOLDER, LOWER, UPPER, OTHER = 0, 1, 2, 3


def letter_kinds(alphabet: int) -> Tensor:
    """PLACEHOLDER, LOWER, UPPER or OTHER by token id, in the ids of `letter_tokenizer`. Shapes: `-> vocab`."""
    return torch.tensor([PLACEHOLDER, *[LOWER] * alphabet, *[UPPER] * alphabet, *[OTHER] * 3])


def dropped_terms(dial: str, kinds: Tensor, is_masked: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The terms that a dial leaves out.

    Shapes: `batch seq, batch seq (bool) -> batch seq (bool)`.
    Args:
        kinds: of the clean tokens, see `letter_kinds`; every row has a letter of each case, or several tokens of each.
        is_masked: what is hidden and priced. A causal model's dial does not ask.
        generator: what the matched dials pick with; nothing else is drawn from it.
    """
    place = torch.arange(kinds.shape[1], device=kinds.device)
    lower, upper = kinds == LOWER, kinds == UPPER
    before, (first, last) = _edges(lower)[0], _edges(upper)
    if dial == "drop-after":
        return place > last
    hidden = is_masked & (kinds == PLACEHOLDER)
    lower_hidden, upper_hidden = ((is_masked | ~own).all(1, keepdim=True) for own in (lower, upper))
    if dial == "mirror":
        return hidden & (place < before) & upper_hidden & ~lower_hidden
    evidence_alone = lower_hidden & ~upper_hidden
    left, right = (hidden & side & evidence_alone for side in (place < first, place > last))
    if dial in ("drop-left-matched", "drop-right-matched"):
        count = torch.minimum(left.sum(1), right.sum(1))
        return _picked(left if dial == "drop-left-matched" else right, count, generator)
    chosen = {"keep": torch.zeros_like(left), "drop-left": left, "drop-right": right, "drop-both": left | right}
    return chosen[dial]


def _edges(own: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the last place of a row's own tokens. Shapes: `batch seq (bool) -> batch 1, batch 1`."""
    first = own.int().argmax(1, keepdim=True)
    return first, own.shape[1] - 1 - own.flip(1).int().argmax(1, keepdim=True)


def _picked(terms: Tensor, count: Tensor, generator: torch.Generator | None) -> Tensor:
    """`count` of each row's terms, at random. Shapes: `batch seq (bool), batch -> batch seq (bool)`."""
    order = torch.rand(terms.shape, generator=generator).masked_fill(~terms, 2.0).argsort(1).argsort(1)
    return terms & (order < count[:, None])


@dataclass(frozen=True)
class Negatives:
    """A run's dial, as a training config names it.

    Args:
        alphabet: how many letter pairs, which says what each token is; None for text, whose rows say it themselves.
        dial: before `switch_step` (always when None); `switch_dial` from then on.
        weight: what a dropped term's cross-entropy is multiplied by.
    """

    alphabet: int | None = None
    dial: str = "keep"
    weight: float = 0.0
    switch_step: int | None = None
    switch_dial: str = "keep"

    @property
    def always_keeps(self) -> bool:
        """Whether no step leaves anything out."""
        return self.dial == "keep" and (self.switch_step is None or self.switch_dial == "keep")

    def dial_at(self, step: int) -> str:
        """The dial of the step that follows `step` steps."""
        return self.switch_dial if self.switch_step is not None and step >= self.switch_step else self.dial

    def dropped(
        self,
        step: int,
        token_ids: Tensor,
        is_masked: Tensor,
        generator: torch.Generator,
        kinds: Tensor | None = None,
    ) -> Tensor:
        """The terms left out at this step; `kinds` of the tokens where no alphabet tells them.

        Shapes: `batch seq, batch seq (bool), batch seq -> batch seq (bool)`, on the CPU.
        """
        if kinds is None:
            assert self.alphabet is not None, "rows of text say what their tokens are"
            kinds = letter_kinds(self.alphabet)[token_ids.cpu()]
        return dropped_terms(self.dial_at(step), kinds.cpu(), is_masked.cpu(), generator)
