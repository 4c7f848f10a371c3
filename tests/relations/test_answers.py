"""The answers of a letters model against a loop over placements, one query at a time."""

import math
from itertools import combinations
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import revprobe as rp
from revprobe.models.one_layer import letter_tokenizer, one_layer_gpt2
from revprobe.relations import answers
from revprobe.relations.answers import read_answers
from tiny import drawn

LENGTH, LETTERS = 5, 4
RELATION = rp.letters(LENGTH, LETTERS)
VOCABULARY = letter_tokenizer(LETTERS).get_vocab()


def masked_model(seed: int = 0) -> rp.ProbedModel:
    torch.manual_seed(seed)
    config = rp.RaddConfig(
        vocab_size=len(VOCABULARY),
        mask_token_id=VOCABULARY["<mask>"],
        bos_token_id=VOCABULARY["<bos>"],
        pad_token_id=VOCABULARY["<pad>"],
        d_model=16,
        max_length=LENGTH,
        initializer_range=0.4,
    )
    return rp.ProbedModel(rp.RaddForMaskedLM(config).eval(), letter_tokenizer(LETTERS), objective="masked", name="m")


def causal_model() -> rp.ProbedModel:
    torch.manual_seed(1)
    module = drawn(one_layer_gpt2(len(VOCABULARY), d_model=16, max_length=LENGTH, bos_token_id=None, pad_token_id=None))
    return rp.ProbedModel(module.eval(), letter_tokenizer(LETTERS), objective="causal", name="c")


def ask(model: rp.ProbedModel, shown: str, hidden: set[int], row: int, target: str, candidates: str) -> dict[str, Any]:
    """One query by itself."""
    ids = [VOCABULARY["<mask>"] if i in hidden else VOCABULARY[c] for i, c in enumerate(shown)]
    with torch.no_grad():
        scores = model.module(input_ids=torch.tensor([ids])).logits[0, row].double()
    chances = scores.softmax(0)
    own = float(chances[VOCABULARY[target]])
    among = {c: float(chances[VOCABULARY[c]]) for c in candidates}
    best = int(chances.argmax())
    return {
        "accuracy": best == VOCABULARY[target],
        "letters_only": max(among, key=lambda c: among[c]) == target,
        "placeholder": best == VOCABULARY["0"],
        "probability": own,
        "log_odds": float((chances[VOCABULARY[target]] / chances[VOCABULARY["0"]]).log()),
        "letters_log_probability": float(torch.tensor(own / sum(among.values())).log()),
    }


def slow(model: rp.ProbedModel) -> pd.DataFrame:
    """Every question in words."""
    lower, upper = "abcd", "ABCD"
    rows: list[dict[str, Any]] = []

    def add(question: str, extra: int, *query: Any) -> None:
        rows.append({"question": question, "extra": extra} | ask(model, *query))

    for low, up in zip(lower, upper, strict=True):
        for left, right in combinations(range(LENGTH), 2):
            forward, backward = ["0"] * LENGTH, ["0"] * LENGTH
            forward[left], forward[right] = low, up
            backward[left], backward[right] = up, low
            seen, turned = "".join(forward), "".join(backward)
            if model.objective == "causal":
                if right == LENGTH - 1:
                    add("forward", 0, seen, set(), right - 1, up, upper)
                    add("reverse", 0, turned, set(), right - 1, low, lower)
                continue
            add("forward", 0, seen, {left}, left, low, lower)
            for extra in (0, 1, 2):
                if left >= extra:
                    hidden = {right, *range(left - extra, left)}
                    add("reverse", extra, turned, hidden, right, low, lower)
            add("mirror_reverse", 0, turned, {left}, left, up, upper)
    return pd.DataFrame(rows)


@pytest.mark.parametrize("make", [masked_model, causal_model])
def test_every_number_is_that_of_single_queries(make: Any) -> None:
    model = make()
    found = read_answers(model, RELATION).set_index(["question", "extra"])
    groups = slow(model).groupby(["question", "extra"])
    assert set(found.index) == set(groups.groups)
    for place, own in groups:
        row = found.loc[place]
        assert row["n"] == len(own) and row["facts"] == LETTERS
        for name in ("accuracy", "letters_only", "probability", "log_odds", "letters_log_probability"):
            assert float(row[name]) == pytest.approx(own[name].mean(), abs=1e-5), (place, name)
        assert row["errors"] == (~own["accuracy"]).sum()
        assert row["placeholder_errors"] == (own["placeholder"] & ~own["accuracy"]).sum()
        assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]
        assert row["accuracy_high"] > row["accuracy_low"]


def test_an_answer_outvoted_by_the_placeholder_is_still_known_among_the_letters() -> None:
    model = masked_model()

    class Outvoted(nn.Module):
        """Says the placeholder first and the letter that belongs to the one shown second."""

        def __init__(self) -> None:
            super().__init__()
            self.config, self.weight = model.module.config, nn.Parameter(torch.zeros(1))
            self.mix = nn.Linear(1, 1)

        def forward(self, input_ids: Tensor, **_: Any) -> Any:
            logits = torch.zeros(*input_ids.shape, len(VOCABULARY)) + self.weight
            for row, ids in enumerate(input_ids.tolist()):
                for token in ids:
                    if 1 <= token <= 2 * LETTERS:
                        logits[row, :, (token + LETTERS - 1) % (2 * LETTERS) + 1] = 1.0
            logits[..., 0] = 2.0
            return type("Output", (), {"logits": logits})()

    outvoted = rp.ProbedModel(
        Outvoted(),
        letter_tokenizer(LETTERS),
        objective="masked",
        mask_token_id=VOCABULARY["<mask>"],
        logit_shift=0,
        check=False,
    )
    found = read_answers(outvoted, RELATION)
    assert (found["accuracy"] == 0).all() and (found["letters_only"] == 1).all()
    assert (found["placeholder_errors"] == found["n"]).all()
    assert found["log_odds"].to_numpy() == pytest.approx([-1.0] * len(found))


def test_a_tie_is_no_answer() -> None:
    model = masked_model()
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.zero_()
    found = read_answers(model, RELATION)
    assert (found["accuracy"] == 0).all() and (found["letters_only"] == 0).all()
    assert found["letters_log_probability"].to_numpy() == pytest.approx([-math.log(LETTERS)] * len(found))


def test_long_sequences_are_asked_at_placements_spread_over_all_distances() -> None:
    relation = rp.letters(20, 3)
    torch.manual_seed(0)
    tokenizer = letter_tokenizer(3)
    config = rp.RaddConfig(vocab_size=len(tokenizer), mask_token_id=tokenizer.mask_token_id, d_model=8, max_length=20)
    config.bos_token_id, config.pad_token_id = tokenizer.bos_token_id, tokenizer.pad_token_id
    model = rp.ProbedModel(rp.RaddForMaskedLM(config).eval(), tokenizer, objective="masked")
    asked = answers.questions(relation, model)
    for question in answers.QUESTIONS:
        chosen = (asked.question == question) & (asked.extra == 0)
        assert chosen.sum() == 3 * answers.MOST_PLACEMENTS
        rows = asked.token_ids[torch.tensor(chosen)]
        shown = (rows != 0).nonzero()[:, 1].view(len(rows), 2)
        distances = (shown[:, 1] - shown[:, 0]).tolist()
        assert set(distances) >= set(range(1, 17))  # of 19, the last of which have one to three placements each


def test_logits_that_are_nan_are_refused() -> None:
    model = masked_model()
    with torch.no_grad():
        model.module.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(rp.RevprobeError, match="NaN"):
        read_answers(model, RELATION)
