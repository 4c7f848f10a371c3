"""Exact match of decoded answers: what a user would see, next to the probabilities that the probes read.

Answer and decoding are compared lower-cased and without blanks around them (runs of blanks inside count as one,
canonically equal Unicode as equal); any of a question's answers will do.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Collection, Sequence
from importlib.metadata import version
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import nn

from ...arguments import checked
from ...errors import RevprobeError, did_you_mean
from ...models.probed import ProbedModel, as_probed
from ...progress import Progress, shows_progress
from ..pairs.spans import Encoded, encode_texts, require_fast_tokenizer
from ..pairs.words import goes_on, has_begun
from ..readings.reading import Reading
from ..statistics.partners import partner_column
from ..statistics.resampling import SHOWN, Rights, derangement, with_shown
from .causal import end_tokens
from .decode import answer_text, decode_tokens, decoding_settings, encode_prompts, require_stops
from .masked import Prompt

ANSWER_LENGTHS = ("longest", "oracle")
TOO_LONG = "no answer fits into max_new_tokens"
# What a wrong decoding is: nothing before its end; words of the prompt, such as the entity asked about; exactly an
# answer to another question of the same direction, about the same fact and beginning as one of its own does (the right
# entity, in another wording's words) or about another; or anything else. The first that holds is named.
ERRORS = ("end", "prompt", "own_entity", "other_entity", "malformed")


@checked
@shows_progress("prompts")
def decoded_match(
    model: ProbedModel | nn.Module,
    questions: Sequence[Asked],
    *,
    batch_size: int | None = None,
    max_new_tokens: int | None = None,
    answer_length: str = "longest",
    steps: int | None = None,
    block_length: int | None = None,
    algorithm: str | None = None,
    stop: str | Sequence[str] = (),
    control: bool = True,
    progress: Progress | bool | None = None,
    seed: int = 0,
    answers: AnswerBook | None = None,
) -> Reading:
    """Share of the questions a model answers, decoding greedily, with its interval over facts.

    Questions weigh equally, so a fact with two templates counts twice. The interval is Clopper-Pearson at the effective
    number of questions: none of 20 facts means "below 17 %", not exactly 0, however many questions each has. The
    control matches a question's answers with the decoding where a fact that shares none is asked about (in the same
    direction and template): how often they are said whoever is asked about.

    A masked model fills a fixed number of positions. `answer_length="longest"` gives every question the same, the
    longest answer's tokens and one for the end token (where the tokenizer has one), or `max_new_tokens`; a model that
    was never trained to end then gets shorter answers wrong, unless `stop` ends them. "oracle" tells the model how
    many tokens the answer has, trying each length among a question's answers: an upper bound, and labelled so in
    the meta. The text is cut by the end token and `stop` only, never by looking at the answer.

    Args:
        questions: see `Asked`; each with at least one answer.
        steps, block_length, algorithm: masked models only; see `decode`.
        control: also match with the decodings of other facts' questions, shuffled by `seed`.
        answers: an `AnswerBook` of these questions and maybe of others; made here when None.

    Frame: question, fact, kind, direction, template, prompt, answers (a JSON list), decoded, match (1 or 0; NaN
    when no answer fits into max_new_tokens), match_control (NaN without a partner), begins (1 where the decoding
    begins with an answer and goes on with another word or sign, as a model does that was trained on longer texts;
    with anything where no blanks part words), begins_control, error (what a wrong decoding is, one of ERRORS; ""
    where right or undefined), reason. `meta["errors"]` counts.
    Raises: RevprobeError, as `decode` does, and for questions without an answer or none at all.
    Source: paper App. D.2 (Table 7).
    """
    model = as_probed(model)
    how = decoding_settings(model, steps=steps, block_length=block_length, algorithm=algorithm)
    stop = require_stops(stop)
    require_questions(questions)
    _require_lengths(answer_length, max_new_tokens)
    book, oracle = answers or AnswerBook(model, questions), answer_length == "oracle"
    scorer = _Scorer(model, questions, book, max_new_tokens, oracle, control, seed)
    asks = scorer.asks()
    prompts, lengths = [scorer.prompts[i] for i, _ in asks], [length for _, length in asks]
    tokens = decode_tokens(model, prompts, lengths, how, batch_size=batch_size, progress=progress)
    decoded = {ask: answer_text(model, row, stop) for ask, row in zip(asks, tokens, strict=True)}
    frame, meta = scorer.frame(decoded), described(model, questions, control=control, seed=seed)
    meta["decoding"] = {"order": "greedy, left to right"} if how is None else {"order": "unmasking", **how.describe()}
    meta["decoding"] |= {"stop": list(stop), "answer_length": answer_length, "max_new_tokens": max(lengths)}
    meta["errors"] = {error: int((frame["error"] == error).sum()) for error in ERRORS}
    meta["statistic"] = Reading("decoded_match", frame, meta).measured.statistic
    return Reading("decoded_match", frame, meta)


def _require_lengths(answer_length: str, max_new_tokens: int | None) -> None:
    if answer_length not in ANSWER_LENGTHS:
        raise RevprobeError(f"unknown answer_length {answer_length!r}{did_you_mean(answer_length, ANSWER_LENGTHS)}")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise RevprobeError(f"max_new_tokens {max_new_tokens!r}: expected at least 1 token")


class _Scorer:
    """The questions, the lengths their answers are decoded at, and who is whose control."""

    def __init__(
        self,
        model: ProbedModel,
        questions: Sequence[Asked],
        book: AnswerBook,
        max_new_tokens: int | None,
        oracle: bool,
        control: bool,
        seed: int,
    ) -> None:
        self.questions = questions
        self.prompts = encode_prompts(model, [question.prompt for question in questions])
        lacking = next((question.prompt for question in questions if asked_key(question) not in book.accepted), None)
        if lacking is not None:
            raise RevprobeError(f"the answers given lack the question {lacking!r}; leave answers= out to work them out")
        self.accepted = [book.accepted[asked_key(question)] for question in questions]
        # A book may know further questions of the same direction than are asked here.
        self.entities = book.entities
        self.lengths = [book.lengths[asked_key(question)] for question in questions]
        self.limit = max_new_tokens or book.limit
        self.oracle = oracle
        self.partner = self._partners(seed) if control else None
        # Equal prompts are decoded once, for the first question that asks so.
        first: dict[Prompt, int] = {}
        self.first = [first.setdefault(prompt, i) for i, prompt in enumerate(self.prompts)]

    def asks(self) -> list[tuple[int, int]]:
        """What is decoded: (question, length), each distinct prompt and length once."""
        wanted = [(i, length) for i in range(len(self.questions)) for length in self._own_lengths(i)]
        if self.oracle and self.partner is not None:
            wanted += [(int(j), n) for i, j in enumerate(self.partner) if j >= 0 for n in self._own_lengths(i)]
        return list(dict.fromkeys((self.first[i], length) for i, length in wanted))

    def frame(self, decoded: dict[tuple[int, int], str]) -> pd.DataFrame:
        """One row a question."""
        rows = [self._row(i, question, decoded) for i, question in enumerate(self.questions)]
        frame, partner = with_shown(pd.DataFrame(rows), self.prompts), self.partner
        return frame if partner is None else frame.assign(**partner_column(frame["fact"], partner, frame.get(SHOWN)))

    def _row(self, i: int, question: Asked, decoded: dict[tuple[int, int], str]) -> dict[str, Any]:
        texts = [decoded[self.first[i], length] for length in self._own_lengths(i)]
        right = next((text for text in texts if normalized(text) in self.accepted[i]), None)
        row = question_row(i, question) | {"decoded": texts[0] if right is None else right}
        scores = self._scores(i, i if self._fits(i) else -1, decoded)
        controls = scores if self.partner is None else self._scores(i, int(self.partner[i]), decoded)
        for name, value, control in zip(("match", "begins"), scores, controls, strict=True):
            row |= {name: value} | ({} if self.partner is None else {f"{name}_control": control})
        wrong = right is None and self._fits(i)
        row["error"] = self._error(texts[0], question, self.accepted[i]) if wrong else ""
        return row | {"reason": "" if self._fits(i) else TOO_LONG}

    def _error(self, decoded: str, question: Asked, right: Collection[str]) -> str:
        text, facts_of = normalized(decoded), self.entities[str(question.direction)]
        # A wording that several facts share has answers of them all: which is this one's, its own answers tell.
        named = any(begins_with(text, answer) or begins_with(answer, text) for answer in right)
        own = named and str(question.fact) in facts_of.get(text, ())
        return error_of(decoded, question.prompt, facts_of, is_own=own)

    def _scores(self, i: int, asked: int, decoded: dict[tuple[int, int], str]) -> tuple[float, float]:
        """Whether the decoding of question `asked` is an answer of `i`, and whether it begins with one.

        NaN where `asked` is -1. Where lengths are told, they are those of `i`'s answers.
        """
        if asked < 0:
            return float("nan"), float("nan")
        texts = [normalized(decoded[self.first[asked], length]) for length in self._own_lengths(i)]
        accepted = self.accepted[i]
        begins = any(begins_with(text, answer) for text in texts for answer in accepted)
        return float(any(text in accepted for text in texts)), float(begins)

    def _fits(self, i: int) -> bool:
        return min(self.lengths[i]) <= self.limit

    def _own_lengths(self, i: int) -> list[int]:
        """The lengths a question is decoded at."""
        if not self.oracle:
            return [self.limit]
        return [length for length in self.lengths[i] if length <= self.limit] or [self.limit]

    def _partners(self, seed: int) -> np.ndarray:
        """For each question one of the same direction and template, whose answers are wrong here, and these there.

        Siblings have the same parent: as each other's control they would be right, not wrong by chance. One prompt has
        one decoding, whichever fact it is asked for, and the answers of all of them are right.
        """
        group = np.unique([f"{q.direction}\n{q.template}" for q in self.questions], return_inverse=True)[1]
        for i in range(len(group)):
            if not self._fits(i):
                group[i] = -1 - i  # alone: neither has a control nor is one
        facts = np.array([str(question.fact) for question in self.questions])
        asked = zip(self.questions, self.accepted, strict=True)
        answers = [[f"{q.direction} {one}" for one in own] for q, own in asked]
        return derangement(facts, group, seed=seed, rights=[Rights.of(facts, answers, self.prompts)])


def question_row(i: int, question: Asked) -> dict[str, Any]:
    """What a frame says of a question."""
    return {
        "question": i,
        "fact": str(question.fact),
        "kind": "swapped",
        "direction": str(question.direction),
        "template": question.template,
        "prompt": question.prompt,
        "answers": json.dumps(list(question.answers), ensure_ascii=False),
    }


def described(model: ProbedModel, questions: Sequence[Asked], *, control: bool, seed: int) -> dict[str, Any]:
    """What the reading says about itself; no clock and no path, so that equal runs give equal files."""
    asked = [[q.prompt, list(q.answers), str(q.fact), q.template, str(q.direction)] for q in questions]
    return {
        "model": model.name,
        "objective": model.objective,
        "logit_shift": model.logit_shift,
        "kind": "swapped",
        "step": model.step,
        "weights": model.weights,
        "questions": hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16],
        "question_count": len(questions),
        "fact_count": len({str(q.fact) for q in questions}),
        "control": control,
        "seed": seed,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("revprobe", "torch", "transformers")},
    }


def require_questions(questions: Sequence[Asked]) -> None:
    if not len(questions):
        raise RevprobeError("the list of questions is empty; expected at least one")
    for place, question in enumerate(questions):
        answers = () if isinstance(question.answers, str) else tuple(question.answers)
        if not answers or not all(answer.strip() for answer in answers):
            raise RevprobeError(
                f"question {place} ({question.prompt!r}) has the answers {question.answers!r}; expected a tuple of at "
                "least one text, none of them blank"
            )


class Asked(Protocol):
    """What a question must say; `relations.text_relation.Question` does.

    `fact` labels the fact it is about, `template` its wording, `direction` that of the statement asked for. One that
    has a `joint` says what stands between prompt and answer, "" before which a quotation mark opens; a blank otherwise.
    """

    @property
    def prompt(self) -> str: ...
    @property
    def answers(self) -> tuple[str, ...]: ...
    @property
    def fact(self) -> str: ...
    @property
    def template(self) -> int: ...
    @property
    def direction(self) -> str: ...


def normalized(text: str) -> str:
    """Lower case, one blank between words and none around them, composed Unicode.

    >>> normalized("  Alma  BRENT ")
    'alma brent'
    """
    return " ".join(unicodedata.normalize("NFC", text).lower().split())


def asked_key(question: Asked) -> tuple[str, tuple[str, ...]]:
    """What an answer book finds a question by."""
    return question.prompt, tuple(question.answers)


class AnswerBook:
    """What counts as right for each question, and how many tokens it takes.

    `accepted`, by `asked_key`: the answers normalized, and as the tokenizer reads them back (one that takes "O'Neil"
    apart and joins it with blanks could never write the original). `lengths`: token counts of the answers, ascending;
    `limit`: tokens that hold the longest answer and an end token, where there is one, which is the `max_new_tokens`
    that `decoded_match` takes by itself; `entities`, by direction: all that is accepted of any of its questions, and
    of which facts.

    Raises: RevprobeError, without a fast tokenizer, or for questions without an answer.
    """

    def __init__(self, model: ProbedModel, questions: Sequence[Asked]) -> None:
        require_questions(questions)
        tokenizer = require_fast_tokenizer(model)
        asked = list(dict.fromkeys((q.prompt, joint_of(q), answer) for q in questions for answer in q.answers))
        tails = answer_tokens(tokenizer, asked)
        read_back: dict[tuple[str, str, str], list[str]] = {}
        for key, tail in tails.items():
            text = tokenizer.decode(list(tail), skip_special_tokens=False, clean_up_tokenization_spaces=False)
            # An unknown token stands for any text.
            read_back[key] = [text] if text.strip() and tokenizer.unk_token_id not in tail else []
        self.accepted = {
            asked_key(q): {normalized(form) for a in q.answers for form in (a, *read_back[q.prompt, joint_of(q), a])}
            for q in questions
        }
        self.lengths = {
            asked_key(q): sorted({max(1, len(tails[q.prompt, joint_of(q), a])) for a in q.answers}) for q in questions
        }
        self.limit = max(lengths[-1] for lengths in self.lengths.values()) + (1 if end_tokens(model) else 0)
        self.entities: dict[str, dict[str, set[str]]] = {}
        for q in questions:
            facts_of = self.entities.setdefault(str(q.direction), {})
            for text in self.accepted[asked_key(q)]:
                facts_of.setdefault(text, set()).add(str(q.fact))


def joint_of(question: Asked) -> str:
    """What stands between a question's prompt and its answer: its `joint`, a blank where it does not say."""
    return str(getattr(question, "joint", " "))


def answer_tokens(tokenizer: Any, asked: Sequence[tuple[str, str, str]]) -> dict[tuple[str, str, str], tuple[int, ...]]:
    """Of each (prompt, joint, answer) the tokens after the prompt's, as the whole text has them.

    Blanks of a joint are left out where the tokenizer has none. A text that joins the prompt's end and the answer's
    start in one token is none that a model could write behind the prompt: there they are those of the answer alone.
    """
    prompts = list(dict.fromkeys(prompt for prompt, _, _ in asked))
    before = {text: _own(e) for text, e in zip(prompts, encode_texts(tokenizer, prompts), strict=True)}
    no_blank = _has_no_blank(tokenizer, asked[0][0], asked[0][2])
    tails = [f"{joint.strip() if no_blank else joint}{answer.strip()}" for _, joint, answer in asked]
    whole = encode_texts(tokenizer, [f"{one[0]}{tail}" for one, tail in zip(asked, tails, strict=True)])
    found = {}
    for one, tail, encoded in zip(asked, tails, whole, strict=True):
        shown, own = before[one[0]], _own(encoded)
        if own[: len(shown)] != shown:
            shown, own = (), _own(encode_texts(tokenizer, [tail])[0])
        found[one] = own[len(shown) :]
    return found


def _has_no_blank(tokenizer: Any, prompt: str, answer: str) -> bool:
    """Whether a blank before the answer cannot be encoded, as in a vocabulary of letters."""
    try:
        (encoded,) = encode_texts(tokenizer, [f"{prompt} {answer.strip()}"])
        (alone,) = encode_texts(tokenizer, [f"{prompt}{answer.strip()}"])
    except RevprobeError:
        return True
    unknown = tokenizer.unk_token_id
    return unknown is not None and encoded.token_ids.count(unknown) > alone.token_ids.count(unknown)


def error_of(decoded: str, prompt: str, entities: Collection[str], *, is_own: bool = False) -> str:
    """Which of ERRORS a wrong decoding is; `entities` are normalized answers to questions of its direction.

    `is_own`: whether it is one of those to questions about the same fact.

    >>> error_of("Alma Brent", "Alma Brent's parent is", {"cora dent"})
    'prompt'
    """
    text, asked = normalized(decoded), normalized(prompt)
    if not text:
        return "end"
    places = [at for at in range(len(asked)) if asked.startswith(text, at)]
    if any(not has_begun(asked, at) and not goes_on(asked, at + len(text)) for at in places):
        return "prompt"
    return ("own_entity" if is_own else "other_entity") if text in entities else "malformed"


def begins_with(text: str, answer: str) -> bool:
    """Whether a text is an answer with anything after it but the rest of a word, where that can be told (`goes_on`)."""
    return text.startswith(answer) and not goes_on(text, len(answer))


def _own(encoded: Encoded) -> tuple[int, ...]:
    return tuple(token for token, added in zip(encoded.token_ids, encoded.is_added, strict=True) if not added)


def families(facts: np.ndarray, accepted: Sequence[Collection[str]]) -> np.ndarray:
    """Labels of facts, equal where they share an answer, directly or through others. Shapes: `question -> question`."""
    fact = np.unique(facts, return_inverse=True)[1]
    row = np.repeat(fact, [len(answers) for answers in accepted])
    listed = [answer for answers in accepted for answer in answers]
    column = np.unique(listed, return_inverse=True)[1] + fact.max() + 1
    size = int(column.max()) + 1
    graph = coo_array((np.ones(len(row)), (row, column)), shape=(size, size))
    return np.asarray(connected_components(graph, directed=False)[1])[fact]
