"""How a model answers the letters, question by question: right or wrong, and by what it was outvoted.

A masked model is asked three ways, over every placement of two letters, or over 48 of them that are spread evenly
over distances and places where there are more (from length 11 on):

    forward         the lowercase letter, from its uppercase partner to the right of it, as in training
    reverse         the lowercase letter, from its uppercase partner to the left of it
    mirror_reverse  the uppercase letter, from its lowercase partner to the right of it

and the reverse question again with 1 and 2 placeholders left of the evidence hidden as well, as training hides tokens
there. A causal model predicts the last token, whatever letter the other one asks for, forward and reverse.

An answer is right when the target has the largest logit. It is right among the letters when it has the largest of the
candidates', the 26 letters of its case: a fact can be known and yet be outvoted by the placeholder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..arguments import checked
from ..errors import RevprobeError
from ..models.one_layer import PLACEHOLDER, letter_alphabet
from ..models.probed import ProbedModel
from ..probes.pairs.pairs import ReversalPairs
from ..probes.pairs.query import Query
from ..probes.statistics.estimators import STATISTICS_VERSION
from ..probes.statistics.intervals import proportion_over_facts
from .letters import LettersRelation

QUESTIONS = ("forward", "reverse", "mirror_reverse")
EXTRAS = (0, 1, 2)
MOST_PLACEMENTS = 48
_BATCH = 4096


@dataclass(frozen=True)
class Asked:
    """Every question as the model sees it.

    Shapes: `token_ids`: query seq, mask tokens in place; `row`: query, the position whose logits answer; `target`:
    query; `candidates`: query candidate, the letters of the target's case; `question`, `extra`, `fact`: query.
    """

    token_ids: Tensor
    row: Tensor
    target: Tensor
    candidates: Tensor
    question: np.ndarray
    extra: np.ndarray
    fact: np.ndarray
    placeholder: int


@checked
def read_answers(model: ProbedModel, relation: LettersRelation) -> pd.DataFrame:
    """A model's answers to the letters, one row for each question and number of extra masks.

    Columns: question, extra (further placeholders hidden left of the evidence), n (queries), facts; then, each with
    _low and _high (95 %, over facts), accuracy and letters_only (right among the letters of the target's case); errors,
    placeholder_errors (wrong answers that are the placeholder), probability (mean of p(target)), log_odds (mean of
    log p(target) - log p(placeholder), nats), letters_log_probability (mean of log p(target) among the candidates,
    nats), statistics_version.
    Raises: RevprobeError, for a model without these letters or lengths, or whose logits are NaN.
    """
    return answers_of(model, questions(relation, model))


def answers_of(model: ProbedModel, asked: Asked) -> pd.DataFrame:
    """As `read_answers`, to questions that stand already: making them costs more than asking."""
    return summarise(asked, answer_logits(model, asked))


def questions(relation: LettersRelation, model: ProbedModel) -> Asked:
    """The queries that `read_answers` asks of this model."""
    model.require_mask_token("a table of answers")
    masked = model.objective == "masked"
    pairs = _spread(relation.pairs(model, placements="mirror"), MOST_PLACEMENTS)
    vocabulary = _vocabulary(model)
    cases = [[vocabulary[pair[case]] for pair in letter_alphabet(relation.alphabet)] for case in (0, 1)]
    listed: list[tuple[str, int, str, Query, Query]] = []  # question, extra, fact, what is seen, what is asked
    for question, index in (("forward", pairs.forward), ("reverse", pairs.reverse)):
        for fact, number in zip(pairs.facts, index, strict=True):
            query = pairs.queries[number]
            listed.append((question, 0, str(fact), query, query))
            if masked and question == "reverse":
                hidden = ((extra, _hidden_left(query, extra)) for extra in EXTRAS if extra)
                listed += [(question, extra, str(fact), seen, query) for extra, seen in hidden if seen is not None]
    if masked:
        for fact, number in zip(pairs.facts, pairs.reverse, strict=True):
            query = pairs.queries[number]
            # The same two letters where they stand in a reversed sequence; what is asked for is the other one.
            turned = Query(list(query.token_ids), list(query.evidence_positions), list(query.target_positions))
            listed.append(("mirror_reverse", 0, str(fact), turned, turned))
    return _tabled(listed, cases, vocabulary[PLACEHOLDER], model)


def _spread(pairs: ReversalPairs, most: int) -> ReversalPairs:
    """At most so many placements of each letter, evenly by distance and place."""
    queries = [pairs.queries[number] for number in pairs.forward]
    places = [(*query.target_positions, *query.evidence_positions) for query in queries]
    ordered = sorted(set(places), key=lambda place: (abs(place[1] - place[0]), place))
    chosen = {ordered[round(i)] for i in np.linspace(0, len(ordered) - 1, min(most, len(ordered)))}
    return pairs.take(np.array([i for i, place in enumerate(places) if place in chosen]))


def _hidden_left(query: Query, extra: int) -> Query | None:
    """The query with the `extra` nearest placeholders left of its evidence hidden too; None where there are too few."""
    (evidence,) = query.evidence_positions
    if evidence < extra:
        return None
    return Query(list(query.token_ids), [*range(evidence - extra, evidence), *query.target_positions], [evidence])


def _tabled(
    listed: list[tuple[str, int, str, Query, Query]], cases: list[list[int]], placeholder: int, model: ProbedModel
) -> Asked:
    token_ids = torch.tensor([seen.token_ids for _, _, _, seen, _ in listed])
    target_place = torch.tensor([query.target_positions[0] for *_, query in listed])
    target = token_ids.gather(1, target_place[:, None])[:, 0]
    if model.objective == "masked":
        for row, (_, _, _, seen, _) in enumerate(listed):
            token_ids[row, list(seen.target_positions)] = int(model.mask_token_id)  # type: ignore[arg-type]
    lower = set(cases[0])
    return Asked(
        token_ids,
        target_place - model.logit_shift,
        target,
        torch.tensor([cases[int(token) not in lower] for token in target.tolist()]),
        np.array([question for question, *_ in listed]),
        np.array([extra for _, extra, *_ in listed]),
        np.array([fact for _, _, fact, *_ in listed]),
        placeholder,
    )


@torch.no_grad()
def answer_logits(model: ProbedModel, asked: Asked) -> Tensor:
    """The logits of every answer. Shapes: `-> query vocab`, float32 on the CPU."""
    parts = []
    for ids, row in zip(asked.token_ids.split(_BATCH), asked.row.split(_BATCH), strict=True):
        logits = model.logits(ids.to(model.device))
        parts.append(logits[torch.arange(len(ids)), row.to(logits.device)].float().cpu())
    found = torch.cat(parts)
    if bool(found.isnan().any()):
        raise RevprobeError(f"{model.name}: its logits are NaN; check the weights, or lower the learning rate")
    return found


def summarise(asked: Asked, logits: Tensor) -> pd.DataFrame:
    """The table of `read_answers`, from the logits of the answers. Shapes: `query vocab`."""
    log_probability = logits.log_softmax(1)
    own = log_probability.gather(1, asked.target[:, None])[:, 0]
    among = log_probability.gather(1, asked.candidates)
    others = log_probability.masked_fill(_one_hot(asked.target, logits), float("-inf"))
    values: dict[str, Any] = {
        # A tie is no answer.
        "accuracy": own > others.amax(1),
        "letters_only": own > among.masked_fill(asked.candidates == asked.target[:, None], float("-inf")).amax(1),
        "placeholder": (log_probability.argmax(1) == asked.placeholder) & (own <= others.amax(1)),
        "probability": own.exp(),
        "log_odds": own - log_probability[:, asked.placeholder],
        "letters_log_probability": own - among.logsumexp(1),
    }
    values = {name: value.numpy() for name, value in values.items()}
    rows = []
    for question in QUESTIONS:
        for extra in EXTRAS:
            chosen = (asked.question == question) & (asked.extra == extra)
            if chosen.any():
                one = {name: value[chosen] for name, value in values.items()}
                rows.append({"question": question, "extra": extra} | _row(one, asked.fact[chosen]))
    return pd.DataFrame(rows)


def _row(values: dict[str, np.ndarray], facts: np.ndarray) -> dict[str, Any]:
    row: dict[str, Any] = {"n": len(facts), "facts": len(np.unique(facts))}
    for name in ("accuracy", "letters_only"):
        found = proportion_over_facts(values[name].astype(float), facts)
        row |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
    row |= {"errors": int((~values["accuracy"]).sum()), "placeholder_errors": int(values["placeholder"].sum())}
    means = {name: float(values[name].mean()) for name in ("probability", "log_odds", "letters_log_probability")}
    return row | means | {"statistics_version": STATISTICS_VERSION}


def _one_hot(target: Tensor, logits: Tensor) -> Tensor:
    return torch.zeros_like(logits, dtype=torch.bool).scatter(1, target[:, None], True)


def _vocabulary(model: ProbedModel) -> dict[str, int]:
    if model.tokenizer is None:
        raise RevprobeError(f"{model.name} has no tokenizer; pass tokenizer=letter_tokenizer()")
    vocabulary: dict[str, int] = model.tokenizer.get_vocab()
    return vocabulary
