"""Training rows from statements: tokens, which of them may be masked, and which are masked together.

A statement is encoded as the probes encode theirs, so that what is trained is what is probed. Its answer has to end
somewhere for decoding to stop: a causal model's row gets one end token. A masked model decodes a fixed number of
positions, so each of its statements gives two rows, one bare, as the probes ask it, and one filled up with end tokens
to the decoded length, as LLaDA's own fine-tuning does. End tokens that are shown and not priced, or not there at all,
teach no end: what is decoded then ends where the base model ends by itself, if it does.

Rows of bare pairs ("A B" and nothing else) say of each token whether it fills the row up or belongs to the first or the
second entity, for the dials of negative evidence. They may be filled up on either side, a row for each: behind the pair
alone, the mirrored dial has nothing to leave out.

Shapes below: row, batch, seq.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...errors import RevprobeError
from ...models.probed import ProbedModel
from ...probes.pairs.spans import Encoded, SpanError, encode_texts, entity_positions, require_fast_tokenizer
from ...probes.pairs.templates import ROLES, Filled, Span
from .negatives import LOWER, OTHER, PLACEHOLDER, UPPER


class TrainingStatement(Protocol):
    """What a relation's training text says of itself; see `TrainingText` in `relations/text_relation`.

    `spans` are the characters of the two entities in the order of the text, `prompt_length` those before the answer.
    """

    @property
    def text(self) -> str: ...
    @property
    def spans(self) -> tuple[Span, Span]: ...
    @property
    def fact(self) -> str: ...
    @property
    def prompt_length(self) -> int: ...


@dataclass(frozen=True)
class TokenRow:
    """One row: its ids, what may be masked (or priced), for each token the position whose draw masks it, and in bare
    pairs its kind (see `negatives`)."""

    token_ids: tuple[int, ...]
    maskable: tuple[bool, ...]
    leader: tuple[int, ...]
    kinds: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class RowOptions:
    """What of a statement is trained.

    Args:
        response_only: price the answer alone; the prompt is never masked.
        whole_entity: mask an entity's tokens together.
        answer_tokens: positions a masked model decodes; its answers are filled up to so many with end tokens.
        never_mask: "first" or "second": this entity of the statement is neither masked nor priced.
        end_padding: end tokens are "priced", "unpriced" (shown, never masked), or "absent" (no such rows; a causal
            model's row has no end token).
        pad_sides: "both" adds, for each row that is filled up behind a bare pair, one filled up before it.
        bare: refuse statements that are not a bare pair, naming this key, and say the kinds of their tokens.
    """

    response_only: bool = False
    whole_entity: bool = False
    answer_tokens: int = 0
    never_mask: str | None = None
    end_padding: str = "priced"
    pad_sides: str = "right"
    bare: str | None = None


class StatementRows(Dataset[TokenRow]):
    """The rows of a relation's training statements, as a model's tokenizer and objective want them.

    Raises: RevprobeError, for no statements, a tokenizer without offsets or end token, a statement that is longer
        than the model's context, whose prompt is not the beginning of its tokens, or that has nothing to predict.
    """

    def __init__(
        self, statements: Sequence[TrainingStatement], model: ProbedModel, options: RowOptions = RowOptions()
    ) -> None:
        if not statements:
            raise RevprobeError("no training statement; a relation needs at least one fact that is not held out")
        self.model, self.options = model, options
        self.tokenizer = require_fast_tokenizer(model)
        if self.tokenizer.eos_token_id is None:
            raise RevprobeError(
                f"the tokenizer of {model.name} has no end token, so no answer could end; set tokenizer.eos_token"
            )
        texts = encode_texts(self.tokenizer, [statement.text for statement in statements])
        prompts = encode_texts(self.tokenizer, [one.text[: one.prompt_length] for one in statements])
        self.rows: list[TokenRow] = []
        self.origins: list[int] = []  # the place of each row's statement among them
        for place, (statement, text, prompt) in enumerate(zip(statements, texts, prompts, strict=True)):
            made = self._rows_of(statement, text, prompt)
            self.rows += made
            self.origins += [place] * len(made)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> TokenRow:
        return self.rows[index]

    def _rows_of(self, statement: TrainingStatement, text: Encoded, prompt: Encoded) -> list[TokenRow]:
        """The rows of one statement: bare, and with its end; for a causal model the latter alone."""
        # The prompt's own tokens must come before the answer's first one, as decoding gives them.
        own = [token for token, added in zip(prompt.token_ids, prompt.is_added, strict=True) if not added]
        begin = next(i for i, added in enumerate(text.is_added) if not added)
        answer = begin + len(own)
        if list(text.token_ids[begin:answer]) != own:
            raise RevprobeError(
                f"fact {statement.fact!r}: the prompt {prompt.text!r} is {list(prompt.pieces)} alone, but not so in "
                f"{text.text!r} ({list(text.pieces)}); end the prompt at a blank"
            )
        last = max(i for i, added in enumerate(text.is_added) if not added) + 1
        asked = self.options
        if asked.bare:
            _require_bare(statement, asked.bare)
        entities = self._entities(statement, text) if asked.whole_entity or asked.never_mask or asked.bare else []
        masked = self.model.objective == "masked"
        missing = max(0, asked.answer_tokens - (last - answer) if masked else 1)
        ends = [(0, 0), (0, missing)] if masked else [(0, missing)]
        if asked.pad_sides == "both":
            ends.append((missing, 0))
        if asked.end_padding == "absent":
            ends = [(0, 0)]
        return [self._row(text, (begin, last), counts, answer, entities, statement) for counts in dict.fromkeys(ends)]

    def _row(
        self,
        text: Encoded,
        own: tuple[int, int],
        ends: tuple[int, int],
        answer: int,
        entities: list[list[int]],
        statement: TrainingStatement,
    ) -> TokenRow:
        """A text with so many end tokens before and behind its own, inside what the tokenizer adds."""
        (begin, last), (left, right), asked = own, ends, self.options
        end = self.tokenizer.eos_token_id
        ids, before, behind = list(text.token_ids), [end] * left, [end] * right
        ids = [*ids[:begin], *before, *ids[begin:last], *behind, *ids[last:]]
        is_end = [begin <= i < begin + left or last + left <= i < last + left + right for i in range(len(ids))]
        given = text.is_added
        added = [*given[:begin], *[False] * left, *given[begin:last], *[False] * right, *given[last:]]
        limit = self.model.max_length
        if limit is not None and len(ids) > limit:
            raise RevprobeError(
                f"fact {statement.fact!r}: {statement.text!r} takes {len(ids)} tokens, but {self.model.name} takes at "
                f"most {limit}; shorten it or leave the fact out"
            )
        entities = [[i + left for i in entity] for entity in entities]
        # A masked position before the first logits row (shift 1) has nowhere to be predicted at.
        readable = self.model.logit_shift if self.model.objective == "masked" else 0
        first = max(answer + left if asked.response_only else 0, readable)
        never = set(entities[("first", "second").index(asked.never_mask)]) if asked.never_mask else set()
        never |= {i for i, one in enumerate(is_end) if one and asked.end_padding == "unpriced"}
        maskable = [not a and i >= first and i not in never for i, a in enumerate(added)]
        if not any(maskable):
            raise RevprobeError(f"fact {statement.fact!r}: {statement.text!r} has no token to predict; check the text")
        leader, kinds = list(range(len(ids))), [PLACEHOLDER if one else OTHER for one in is_end]
        for kind, entity in zip((LOWER, UPPER), entities, strict=False):
            for position in entity:
                leader[position] = entity[0] if asked.whole_entity else position
                kinds[position] = kind
        return TokenRow(tuple(ids), tuple(maskable), tuple(leader), tuple(kinds) if asked.bare else ())

    def _entities(self, statement: TrainingStatement, text: Encoded) -> list[list[int]]:
        filled = Filled(text.text, dict(zip(ROLES, statement.spans, strict=True)))
        try:
            return [entity_positions(self.tokenizer, text, filled, role) for role in ROLES]
        except SpanError as error:
            raise RevprobeError(f"fact {statement.fact!r}: {error}") from error


def _require_bare(statement: TrainingStatement, key: str) -> None:
    """Raises: RevprobeError, for a statement with words beside its two names."""
    text, ((start, end), (second, last)) = statement.text, statement.spans
    if text[:start].strip() or text[end:second] != " " or text[last:].strip():
        wording = text[:start] + "{a}" + text[end:second] + "{b}" + text[last:]
        raise RevprobeError(
            f"{key} is about bare pairs, whose template is '{{a}} {{b}}' with nothing else, but fact "
            f"{statement.fact!r} is told by {wording!r}; leave {key} out, or give the relation that template"
        )


@dataclass(frozen=True)
class PadRows:
    """Collate rows of different lengths: padded on the right, where causal positions do not feel it.

    `attention_mask`, `maskable`, `leader` and `kinds` are given only where they say something, since a mask costs time.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[TokenRow]) -> dict[str, Tensor]:
        seq = max(map(len, rows))
        lengths = torch.tensor([len(row) for row in rows])
        table = {
            "input_ids": torch.tensor([[*row.token_ids, *[self.pad_token_id] * (seq - len(row))] for row in rows]),
            "maskable": torch.tensor([[*row.maskable, *[False] * (seq - len(row))] for row in rows]),
            "leader": torch.tensor([[*row.leader, *range(len(row), seq)] for row in rows]),
        }
        if rows[0].kinds:
            table["kinds"] = torch.tensor([[*row.kinds, *[OTHER] * (seq - len(row))] for row in rows])
        if bool((lengths < seq).any()):
            table["attention_mask"] = (torch.arange(seq) < lengths[:, None]).long()
        if bool(table["maskable"].all()):
            del table["maskable"]
        if bool((table["leader"] == torch.arange(seq)).all()):
            del table["leader"]
        return table


def padding_id(tokenizer: Any) -> int:
    """What pads a row; any id would do, since padding is attended to by nothing and never predicted."""
    return int(next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None))
