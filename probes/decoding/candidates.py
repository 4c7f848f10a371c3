"""Which of all answers that could be given a model holds likeliest: the rank of the right one among the candidates.

Exact match asks for an answer and its end in one piece; a fact can be known and yet be outvoted by an end token or a
name in pieces. Here nothing is decoded: every candidate is scored, and the right one has a rank. Texts that name one
entity ("Ann Low", "Ann Low was born") are one candidate, as likely as the likeliest of them.

A masked model sees the decoder's canvas with all of it hidden, once for each prompt; a candidate's score is the sum of
log-probabilities over the whole canvas, its own tokens and ends behind them, so that candidates of all lengths
are scored by one run. That is what the decoder's first step sees, and no more (mean-field): positions are taken as
independent, which decoding, revealing one after the other, does not do. A causal model is scored exactly: the
log-probability of the answer and an end behind the prompt. An end is any of the tokens that end an answer when
decoding (eos, sep, pad): its probability is the sum of theirs, that decoding stops there.

Shapes below: candidate, token (positions of the canvas), vocab.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
from ..statistics.partners import partner_column
from ..statistics.resampling import SHOWN, Rights, derangement, with_shown
from .causal import end_tokens
from .closed_set import Candidates, Fitting, closed_set, rank_of
from .continuations import Tokens, continuation_scores
from .decode import after_begin, batches_of, encode_prompts, require_fit
from .exact_match import (
    TOO_LONG,
    AnswerBook,
    Asked,
    answer_tokens,
    described,
    joint_of,
    normalized,
    question_row,
    require_questions,
)
from .masked import Prompt, hidden_log_probabilities

UNWRITABLE = "the tokenizer has no tokens for any answer, or only its unknown one"
MASKED = "one run with the whole canvas hidden: sum of log-probabilities over it (mean-field)"
# The direction of a question, the last word of its prompt, and its joint: where its candidates are of the same tokens.
Context = tuple[str, str, str]
_END = -1  # in a table of tokens: any that ends an answer
CAUSAL = "log-probability of the answer and its end, left to right"


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
    a wrong candidate of the same score counts as ahead. The control is the rank of the same answers where another fact
    is asked about, as in `decoded_match`. Chance is the number of right candidates over that of all, both in the frame.

    Args:
        questions: as in `decoded_match`.
        candidates: the closed set, for each direction of the questions or one for all; the answers of the questions
            themselves are always in it, and all there is when None. Each is a text, or a list of the texts that name
            one entity: it counts once, by its likeliest text, and is right where any of them is an answer. Texts that
            are equal once normalized are one, and so are entities that have a text in common.
        batch_size: prompts (masked) or candidates (causal) per forward pass; by the size of the model when None.
        max_new_tokens: positions of a masked model's canvas; those of the longest answer of any and one for its end
            when None. Texts that do not fit are left out, and those that hold the tokenizer's unknown token, which
            stands for any text; `meta["candidates"]` counts, for each direction, the candidates (`count`), those of
            which no text fits (`left_out`) or can be written (`unwritable`), and the texts that were scored (`texts`).
        control: also rank where another fact is asked about; `seed` is that of the shuffling.
        progress: called with (prompts done, prompts in all).
        answers: an `AnswerBook` that holds the canvas's length, so that it does not depend on what is asked.

    Frame: question, fact, kind, direction, template, prompt, answers (a JSON list), candidates (how many), accepted
    (how many of them are right), rank, first (1 where rank is 1; NaN where no right one is left), first_control,
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
    elsewhere = np.full(len(questions), np.nan)
    for done, (same, scores) in enumerate(ranking.scores(batch_size), start=1):
        for asked in same:
            rows[asked] = ranking.row(asked, scores)
            for i in [] if partner is None else np.flatnonzero(partner == asked).tolist():
                elsewhere[i] = ranking.rank(i, asked, scores)[0]
        if callable(progress):
            progress(done, ranking.prompt_count)
    frame = _with_control(with_shown(pd.DataFrame(rows), ranking.prompts), elsewhere, partner)
    meta = described(model, questions, control=control, seed=seed)
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
        self.closed = {direction: closed_set(direction, questions, candidates) for direction in directions}
        # A control is another question's answer, of the same direction.
        self.right = [self.closed[str(q.direction)].right(own) for q, own in zip(questions, self.answers, strict=True)]
        self.tokens = self._tokenized()
        self.ends = sorted(end_tokens(model))
        lengths = {len(row) for rows in self.tokens.values() for row in rows.values()}
        if not self.ends and len(lengths) > 1:
            raise RevprobeError(
                f"the tokenizer of {model.name} has no end token, so candidates of {min(lengths)} and {max(lengths)} "
                "tokens cannot be compared; set tokenizer.eos_token"
            )
        longest = max(lengths, default=1) + bool(self.ends)
        self.length = length or longest
        self.limit = self.length if model.objective == "masked" else longest
        self.fitting = {
            context: Fitting.of(self.closed[context[0]], rows, self.limit) for context, rows in self.tokens.items()
        }
        # The candidates that have a text of known tokens.
        self.writable = {
            context: {self.closed[context[0]].entity_of[normalized(text)] for text in rows}
            for context, rows in self.tokens.items()
        }
        # Questions of one prompt and direction are scored once.
        self.groups: dict[tuple[Prompt, str], list[int]] = {}
        for i, question in enumerate(questions):
            self.groups.setdefault((self.prompts[i], str(question.direction)), []).append(i)

    @property
    def prompt_count(self) -> int:
        return len(self.groups)

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """For each direction how many candidates there are, how many more were left out and why, and texts."""
        found: dict[str, dict[str, int]] = {}
        for context, fitting in self.fitting.items():
            closed, count, written = self.closed[context[0]], len(fitting.entities), len(self.writable[context])
            own = {"count": count, "left_out": written - count, "texts": len(fitting.texts)}
            unwritable = len(set(closed.entity_of.values())) - written
            found.setdefault(context[0], own | ({"unwritable": unwritable} if unwritable else {}))
        return found

    def _tokenized(self) -> dict[Context, dict[str, Tokens]]:
        """By direction, the last word of a prompt and its joint, each candidate's text and tokens behind it.

        A text without tokens, or with the unknown one, is left out: what would be scored is not that text. Tokenizers
        cut words apart, so that what stands before a prompt's last word does not reach its answer.
        """
        prompts: dict[Context, str] = {}
        for question in self.questions:
            prompts.setdefault(_context(question), question.prompt)
        asked = [
            (prompt, joint, text)
            for (direction, _, joint), prompt in prompts.items()
            for text in self.closed[direction].texts
        ]
        tokenizer = require_fast_tokenizer(self.model)
        found = answer_tokens(tokenizer, list(dict.fromkeys(asked)))
        tails = {one: tail for one, tail in found.items() if tail and tokenizer.unk_token_id not in tail}
        return {
            (direction, word, joint): {
                text: tails[prompt, joint, text]
                for text in self.closed[direction].texts
                if (prompt, joint, text) in tails
            }
            for (direction, word, joint), prompt in prompts.items()
        }

    def scores(self, batch_size: int | None) -> Iterator[tuple[list[int], np.ndarray]]:
        """For each prompt and direction the questions that ask so, and the score of every text that fits.

        Shapes: `text`, those of the `fitting` of the questions' context.
        """
        groups = list(self.groups.items())
        contexts = [_context(self.questions[same[0]]) for _, same in groups]
        prompts = [after_begin(self.model, prompt) for (prompt, _), _ in groups]
        require_fit(self.model, prompts, [self.limit] * len(prompts))
        scored = self._masked if self.model.objective == "masked" else self._causal
        with untouched(self.model.module), torch.no_grad():
            for place, found in scored(prompts, contexts, batch_size):
                yield groups[place][1], found.double().numpy()

    def _masked(
        self, prompts: list[Prompt], contexts: list[Context], batch_size: int | None
    ) -> Iterator[tuple[int, Tensor]]:
        mask = self.model.mask_token_id
        assert mask is not None, "a masked model names its mask token when wrapped"
        tables = {
            context: torch.tensor([[*row, *[_END] * (self.limit - len(row))] for row in fitting.tokens])
            for context, fitting in self.fitting.items()
        }
        for batch in batches_of(self.model, prompts, [self.limit] * len(prompts), batch_size):
            found = hidden_log_probabilities(self.model, [prompts[i].blanks(self.limit, mask) for i in batch])
            for place, log_probabilities in zip(batch, found, strict=True):
                table = tables[contexts[place]]
                if not len(table):
                    yield place, torch.zeros(0)
                    continue
                tokens = table.T.to(log_probabilities.device)
                own = log_probabilities.gather(1, tokens.clamp(min=0))
                ended = log_probabilities[:, self.ends].logsumexp(1) if self.ends else own.new_zeros(len(own))
                yield place, own.where(tokens != _END, ended[:, None]).sum(0).cpu()

    def _causal(
        self, prompts: list[Prompt], contexts: list[Context], batch_size: int | None
    ) -> Iterator[tuple[int, Tensor]]:
        before = [prompt.before for prompt in prompts]
        rows = [self.fitting[context].tokens for context in contexts]
        yield from continuation_scores(self.model, before, rows, batch_size, ends=self.ends)

    def rank(self, i: int, asked: int, scores: np.ndarray) -> tuple[float, float]:
        """The rank of question `i`'s answers where question `asked` is asked, and their log-probability there.

        Shapes: `scores`, those at `asked`: `text`.
        """
        fitting = self.fitting[_context(self.questions[asked])]
        return rank_of(fitting.held(scores), fitting.is_right(self.right[i]))

    def row(self, i: int, scores: np.ndarray) -> dict[str, Any]:
        """The frame's row of a question. Shapes: `scores`: `text`."""
        context = _context(self.questions[i])
        fitting = self.fitting[context]
        held, right = fitting.held(scores), fitting.is_right(self.right[i])
        rank, own = rank_of(held, right)
        top = float(scores.max()) if len(scores) else float("nan")
        best = np.flatnonzero(scores == top)
        wrong = best[~right[fitting.entity[best]]]
        likeliest = next((fitting.texts[place] for place in (*wrong, *best)), "")
        row = question_row(i, self.questions[i])
        row |= {"candidates": len(held), "accepted": int(right.sum())}
        row |= {"rank": rank, "first": float(rank == 1) if rank == rank else rank, "reciprocal_rank": 1 / rank}
        row |= {"best": likeliest, "log_probability": own, "best_log_probability": top}
        lost = UNWRITABLE if self.right[i].isdisjoint(self.writable[context]) else TOO_LONG
        return row | {"reason": "" if rank == rank else lost}

    def partners(self, seed: int) -> np.ndarray:
        """For each question one of the same direction and template, whose answers are wrong here, and these there."""
        group = np.unique([f"{q.direction}\n{q.template}" for q in self.questions], return_inverse=True)[1]
        facts = np.array([str(question.fact) for question in self.questions])
        answers = [[(str(q.direction), one) for one in own] for q, own in zip(self.questions, self.right, strict=True)]
        return derangement(facts, group, seed=seed, rights=[Rights.of(facts, answers, self.prompts)])


def _context(question: Asked) -> Context:
    return str(question.direction), question.prompt.split()[-1], joint_of(question)


def _with_control(frame: pd.DataFrame, elsewhere: np.ndarray, partner: np.ndarray | None) -> pd.DataFrame:
    """The frame with what each question's answers rank where its partner is asked. Shapes: `question, question`."""
    if partner is None:
        return frame
    rank = np.where(frame["rank"].notna(), elsewhere, np.nan)
    beside = {"first": np.where(np.isnan(rank), np.nan, rank == 1), "reciprocal_rank": 1 / rank}
    for name, values in beside.items():
        frame.insert(list(frame.columns).index(name) + 1, f"{name}_control", values)
    return frame.assign(**partner_column(frame["fact"], partner, frame.get(SHOWN)))
