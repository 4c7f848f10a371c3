"""Which of all answers that could be given a model holds likeliest: the rank of the right one among the candidates.

Exact match asks for an answer and its end in one piece; a fact can be known and yet be outvoted by an end token or a
name in pieces. Here nothing is decoded: every candidate is scored, and the right one has a rank. Texts that name one
entity ("Ann Low", "Ann Low was born") are one candidate, as likely as the likeliest of them.

A masked model sees the decoder's canvas with all of it hidden, once for each prompt; a candidate's score is the sum of
log-probabilities over the whole canvas, its own tokens and end tokens behind them, so that candidates of all lengths
are scored by one run. That is what the decoder's first step sees, and no more (mean-field): positions are taken as
independent, which decoding, revealing one after the other, does not do. A causal model is scored exactly: the
log-probability of the answer and one end token behind the prompt.

Shapes below: candidate, token (positions of the canvas), vocab.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from ...arguments import checked
from ...errors import RevprobeError
from ...hooks.untouched import untouched
from ...models.probed import ProbedModel, as_probed
from ...progress import Progress, shows_progress
from ..pairs.spans import require_fast_tokenizer
from ..readings.reading import Reading
from ..statistics.resampling import derangement
from .causal import end_tokens
from .continuations import Tokens, continuation_scores
from .decode import after_begin, batches_of, encode_prompts, require_fit
from .exact_match import (
    TOO_LONG,
    AnswerBook,
    Asked,
    answer_tokens,
    described,
    families,
    joint_of,
    normalized,
    question_row,
    require_questions,
)
from .masked import Prompt, hidden_log_probabilities

MASKED = "one run with the whole canvas hidden: sum of log-probabilities over it (mean-field)"
CAUSAL = "log-probability of the answer and its end, left to right"
# A candidate is a text, or the texts that name one entity.
Candidates = Sequence[str | Sequence[str]]


@checked
@shows_progress("prompts")
def rank_candidates(
    model: ProbedModel | nn.Module,
    questions: Sequence[Asked],
    candidates: Mapping[str, Candidates] | Candidates | None = None,
    *,
    batch_size: int | None = None,
    max_new_tokens: int | None = None,
    control: bool = True,
    progress: Progress | bool | None = None,
    seed: int = 0,
    answers: AnswerBook | None = None,
) -> Reading:
    """Share of questions whose right answer is the likeliest of all candidates, and the mean reciprocal rank beside it.

    A question has one rank, the best over its accepted answers; its other accepted answers do not count against it, and
    a wrong candidate of the same score counts as ahead. The control is the rank of another fact's answer, as in
    `decoded_match`. Chance is the number of right candidates over that of all, both in the frame.

    Args:
        questions: as in `decoded_match`.
        candidates: the closed set, for each direction of the questions or one for all; the answers of the questions
            themselves are always in it, and all there is when None. Each is a text, or a list of the texts that name
            one entity: it counts once, by its likeliest text, and is right where any of them is an answer. Texts that
            are equal once normalized are one, and so are entities that have a text in common.
        batch_size: prompts (masked) or candidates (causal) per forward pass; by the size of the model when None.
        max_new_tokens: positions of a masked model's canvas; those of the longest answer of any and one for its end
            when None. Texts that do not fit are left out; `meta["candidates"]` counts, for each direction, the
            candidates (`count`), those of which no text fits (`left_out`) and the texts that were scored (`texts`).
        control: also rank another fact's answer; `seed` is that of the shuffling.
        progress: called with (prompts done, prompts in all).
        answers: an `AnswerBook` that holds the canvas's length, so that it does not depend on what is asked.

    Frame: question, fact, kind, direction, template, prompt, answers (a JSON list), candidates (how many), accepted
    (how many of them are right), rank, first (1 where rank is 1; NaN where no right one fits), first_control,
    reciprocal_rank, reciprocal_rank_control, best (the likeliest text; of a wrong candidate where tied),
    log_probability (of the right candidate's likeliest text, nats), best_log_probability, reason.
    Raises: RevprobeError, as `decoded_match`, for a model that writes in blocks (its later blocks are never predicted
        behind a hidden one), and for candidates of several lengths where the tokenizer has no end token.
    """
    model = as_probed(model)
    require_questions(questions)
    require_whole_text(model)
    ranking = _Ranking(model, questions, candidates, max_new_tokens or (answers.limit if answers else None))
    partner = ranking.partners(seed) if control else None
    rows: list[dict[str, Any]] = [{}] * len(questions)
    for done, (same, scores) in enumerate(ranking.scores(batch_size), start=1):
        for i in same:
            rows[i] = ranking.row(i, scores, None if partner is None else int(partner[i]))
        if callable(progress):
            progress(done, ranking.prompt_count)
    frame, meta = pd.DataFrame(rows), described(model, questions, control=control, seed=seed)
    meta["ranking"] = {"score": CAUSAL if model.objective == "causal" else MASKED, "max_new_tokens": ranking.length}
    meta["candidates"] = ranking.counts
    meta["statistic"] = Reading("candidate_rank", frame, meta).measured.statistic
    return Reading("candidate_rank", frame, meta)


def require_whole_text(model: ProbedModel) -> None:
    """Raises: RevprobeError, for a model whose canvas cannot be scored in one run."""
    model.require_mask_token("ranking candidates")
    if model.block_size is not None:
        raise RevprobeError(
            f"{model.name} writes in blocks of {model.block_size}, so an answer over several is not predicted in one "
            "run; ask decoded_match, or model.in_blocks(None) for the whole text"
        )


class _Ranking:
    """The candidates of each direction as tokens, and their scores."""

    def __init__(
        self,
        model: ProbedModel,
        questions: Sequence[Asked],
        candidates: Mapping[str, Candidates] | Candidates | None,
        length: int | None,
    ) -> None:
        self.model, self.questions = model, questions
        self.prompts = encode_prompts(model, [question.prompt for question in questions])
        self.answers = [{normalized(answer) for answer in question.answers} for question in questions]
        directions = dict.fromkeys(str(question.direction) for question in questions)
        self.closed = {direction: _closed_set(direction, questions, candidates) for direction in directions}
        # A control is another question's answer, of the same direction.
        self.right = [self.closed[str(q.direction)].right(own) for q, own in zip(questions, self.answers, strict=True)]
        self.tokens = self._tokenized()
        ends = end_tokens(model)
        tokenizer = require_fast_tokenizer(model)
        own: int | None = tokenizer.eos_token_id
        self.end = own if own in ends else min(ends, default=None)
        lengths = {len(row) for rows in self.tokens.values() for row in rows.values()}
        if self.end is None and len(lengths) > 1:
            raise RevprobeError(
                f"the tokenizer of {model.name} has no end token, so candidates of {min(lengths)} and {max(lengths)} "
                "tokens cannot be compared; set tokenizer.eos_token"
            )
        longest = max(lengths) + (self.end is not None)
        self.length = length or longest
        self.limit = self.length if model.objective == "masked" else longest
        # Questions of one prompt and direction are scored once.
        self.groups: dict[tuple[Prompt, str], list[int]] = {}
        for i, question in enumerate(questions):
            self.groups.setdefault((self.prompts[i], str(question.direction)), []).append(i)

    @property
    def prompt_count(self) -> int:
        return len(self.groups)

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """For each direction how many candidates there are, how many more were too long for the canvas, and texts."""
        found: dict[str, dict[str, int]] = {}
        for (direction, _, _), rows in self.tokens.items():
            entity = self.closed[direction].entity
            fits = [text for text, row in rows.items() if len(row) <= self.limit]
            count = len({entity[text] for text in fits})
            found.setdefault(
                direction, {"count": count, "left_out": len(set(entity.values())) - count, "texts": len(fits)}
            )
        return found

    def _tokenized(self) -> dict[tuple[str, str, str], dict[str, Tokens]]:
        """By direction, the last word of a prompt and its joint, each candidate's text and tokens behind it.

        Tokenizers cut words apart, so that what stands before a prompt's last word does not reach its answer.
        """
        prompts: dict[tuple[str, str, str], str] = {}
        for question in self.questions:
            prompts.setdefault(_context(question), question.prompt)
        asked = [
            (prompt, joint, text)
            for (direction, _, joint), prompt in prompts.items()
            for text in self.closed[direction].entity
        ]
        tails = answer_tokens(require_fast_tokenizer(self.model), list(dict.fromkeys(asked)))
        return {
            context: {text: tails[prompt, context[2], text] for text in self.closed[context[0]].entity}
            for context, prompt in prompts.items()
        }

    def scores(self, batch_size: int | None) -> Iterator[tuple[list[int], dict[str, float]]]:
        """For each prompt and direction the questions that ask so, and the score of every candidate that fits."""
        groups = list(self.groups.items())
        firsts = [self.questions[same[0]] for _, same in groups]
        listed = [
            {text: row for text, row in self.tokens[_context(one)].items() if len(row) <= self.limit} for one in firsts
        ]
        prompts = [after_begin(self.model, prompt) for (prompt, _), _ in groups]
        require_fit(self.model, prompts, [self.limit] * len(prompts))
        scored = self._masked if self.model.objective == "masked" else self._causal
        with untouched(self.model.module), torch.no_grad():
            for place, found in scored(prompts, [list(rows.values()) for rows in listed], batch_size):
                yield groups[place][1], dict(zip(listed[place], found.tolist(), strict=True))

    def _masked(
        self, prompts: list[Prompt], rows: list[list[Tokens]], batch_size: int | None
    ) -> Iterator[tuple[int, Tensor]]:
        mask = self.model.mask_token_id
        assert mask is not None, "a masked model names its mask token when wrapped"
        fill = 0 if self.end is None else self.end
        for batch in batches_of(self.model, prompts, [self.limit] * len(prompts), batch_size):
            found = hidden_log_probabilities(self.model, [prompts[i].blanks(self.limit, mask) for i in batch])
            for place, log_probabilities in zip(batch, found, strict=True):
                if not rows[place]:
                    yield place, torch.zeros(0)
                    continue
                table = torch.tensor([[*row, *[fill] * (self.limit - len(row))] for row in rows[place]])
                table = table.to(log_probabilities.device)
                yield place, log_probabilities.gather(1, table.T).sum(0).cpu()

    def _causal(
        self, prompts: list[Prompt], rows: list[list[Tokens]], batch_size: int | None
    ) -> Iterator[tuple[int, Tensor]]:
        before = [prompt.before for prompt in prompts]
        ended = rows if self.end is None else [[(*row, self.end) for row in own] for own in rows]
        yield from continuation_scores(self.model, before, ended, batch_size)

    def row(self, i: int, scores: Mapping[str, float], partner: int | None) -> dict[str, Any]:
        """The frame's row of a question."""
        entity, right = self.closed[str(self.questions[i].direction)].entity, self.right[i]
        held = _by_entity(scores, entity)
        rank, own = _rank(held, right)
        top = max(scores.values(), default=float("nan"))
        best = [text for text, score in scores.items() if score == top]
        wrong = [text for text in best if entity[text] not in right]
        row = question_row(i, self.questions[i])
        row |= {"candidates": len(held), "accepted": sum(one in right for one in held)}
        row |= {"rank": rank, "first": _share(rank)}
        other = float("nan")
        if partner is not None:
            other = _rank(held, self.right[partner])[0] if partner >= 0 and rank == rank else float("nan")
            row["first_control"] = _share(other)
        row["reciprocal_rank"] = 1 / rank
        if partner is not None:
            row["reciprocal_rank_control"] = 1 / other
        row |= {"best": next(iter(wrong or best), ""), "log_probability": own, "best_log_probability": top}
        return row | {"reason": "" if rank == rank else TOO_LONG}

    def partners(self, seed: int) -> np.ndarray:
        """For each question one of the same direction and template that shares no answer with its fact."""
        group = np.unique([f"{q.direction}\n{q.template}" for q in self.questions], return_inverse=True)[1]
        facts = np.array([str(question.fact) for question in self.questions])
        return derangement(families(facts, self.answers), group, seed=seed)


def _context(question: Asked) -> tuple[str, str, str]:
    return str(question.direction), question.prompt.split()[-1], joint_of(question)


@dataclass(frozen=True)
class _ClosedSet:
    """The candidates of a direction: each text once however it is spelled, and the entity it names, by number.

    `entity` is by text, `entity_of` by normalized text.
    """

    entity: dict[str, int]
    entity_of: dict[str, int]

    def right(self, answers: Iterable[str]) -> frozenset[int]:
        """The candidates that normalized `answers` name."""
        return frozenset(self.entity_of[answer] for answer in answers if answer in self.entity_of)


def _closed_set(
    direction: str, questions: Sequence[Asked], candidates: Mapping[str, Candidates] | Candidates | None
) -> _ClosedSet:
    """The candidates of a direction, the questions' own answers first."""
    given = candidates.get(direction, ()) if isinstance(candidates, Mapping) else candidates or ()
    if isinstance(given, str):
        raise RevprobeError(f"candidates {given!r}: expected a list of texts; put it in brackets")
    own = [answer for question in questions if str(question.direction) == direction for answer in question.answers]
    spelled: dict[str, str] = {}
    groups: list[set[str]] = []
    for named in (*own, *given):
        forms = {normalized(text): text.strip() for text in ([named] if isinstance(named, str) else named)}
        forms.pop("", None)
        for form, text in forms.items():
            spelled.setdefault(form, text)
        groups += [set(forms)] if forms else []
    entities = families(np.arange(len(groups)), groups).tolist()
    entity_of = {form: one for one, forms in zip(entities, groups, strict=True) for form in forms}
    return _ClosedSet({text: entity_of[form] for form, text in spelled.items()}, entity_of)


def _by_entity(scores: Mapping[str, float], entity: Mapping[str, int]) -> dict[int, float]:
    """The score of each candidate: that of its likeliest text."""
    held: dict[int, float] = {}
    for text, score in scores.items():
        held[entity[text]] = max(score, held.get(entity[text], score))
    return held


def _rank(held: Mapping[int, float], right: Collection[int]) -> tuple[float, float]:
    """The rank of the best right candidate and its score; NaN where none is among them."""
    own = max((score for one, score in held.items() if one in right), default=None)
    if own is None:
        return float("nan"), float("nan")
    ahead = sum(score >= own for one, score in held.items() if one not in right)
    return float(1 + ahead), own


def _share(rank: float) -> float:
    return float(rank == 1) if rank == rank else float("nan")
