"""Exact match counts what is right, with the uncertainty of facts and the rate at which other facts would be right."""

import json
import random
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from tokenizers import normalizers, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from revprobe import ProbedModel, Reading, RevprobeError, decode, decoded_match, rank_candidates
from revprobe.probes.decoding.exact_match import TOO_LONG, AnswerBook, begins_with, error_of, normalized
from revprobe.probes.statistics.estimators import NO_OTHER_ANSWER
from tiny import word_tokenizer

NAMES = ["alma", "brent", "cora", "dent", "eric", "fox", "gina", "hart", "ida", "jones"]
EOS, MASK = 1, 2


@dataclass(frozen=True)
class Question:
    prompt: str
    answers: tuple[str, ...]
    fact: str
    template: int = 0
    direction: str = "P2C"


def tokenizer() -> PreTrainedTokenizerFast:
    words = [*NAMES, *(f"q{i}" for i in range(30)), "o", "'", "neil"]
    return word_tokenizer(words, split=pre_tokenizers.BertPreTokenizer(), normalizer=normalizers.Lowercase())


class Script(nn.Module):
    """A masked or causal model that answers by rote: a prompt's last token decides every word that follows.

    `says[last token of the prompt]` are the words; after them comes the end token, or `filler` where it never ends. A
    masked model told how many words to write says the first so many.
    """

    rows = 0

    def __init__(self, says: dict[str, str], filler: str = "<eos>", causal: bool = False) -> None:
        super().__init__()
        self.tokenizer, self.causal = tokenizer(), causal
        self.embed = nn.Embedding(len(self.tokenizer), 1)
        self.says = {self.tokenizer(k)["input_ids"][-1]: self.tokenizer(v)["input_ids"] for k, v in says.items()}
        self.filler = self.tokenizer.convert_tokens_to_ids(filler)
        Script.rows = 0  # of the class: probing puts a module's own attributes back

    def forward(self, input_ids, attention_mask=None):
        logits = torch.zeros(*input_ids.shape, len(self.tokenizer))
        Script.rows += len(input_ids)
        for row, ids in enumerate(input_ids.tolist()):
            asked = max((i for i, token in enumerate(ids) if token in self.says), default=None)
            if asked is None:
                continue
            words = self.says[ids[asked]]
            for at in range(asked + 1, len(ids) + 1):
                word = words[at - asked - 1] if at - asked <= len(words) else self.filler
                place = at - 1 if self.causal else at
                if place < len(ids):
                    logits[row, place, word] = 9.0
        return logits


def script(says: dict[str, str], **options) -> ProbedModel:
    module = Script(says, **options)
    kind = {"objective": "causal"} if module.causal else {"objective": "masked", "logit_shift": 0}
    return ProbedModel(module, module.tokenizer, mask_token_id=None if module.causal else MASK, check=False, **kind)


def asked(count: int, right: int) -> tuple[dict[str, str], list[Question]]:
    """`count` facts of two wordings each; the model knows the first `right` of them."""
    names = [f"{NAMES[i]} {NAMES[(i + 3) % 10]}" for i in range(count)]
    says = {f"q{i}": names[i] if i < right else "fox fox" for i in range(count)}
    return says, [Question(f"q{i % 30} q{i}", (names[i],), f"f{i}", t) for i in range(count) for t in (0, 1)]


def test_what_counts_as_the_same_text():
    assert normalized("  Alma \n BRENT ") == normalized("alma brent")
    assert normalized("Zoe\u0308") == normalized("Zo\u00eb") != normalized("Zoe")
    assert normalized("Alma Brent.") != normalized("Alma Brent"), "punctuation is part of the answer"


def slow_interval(match: list[float], facts: list[str], resamples: int = 1000) -> tuple[float, float]:
    """The bootstrap over facts as one would say it: draw facts, take all their questions, average."""
    rng, by_fact = random.Random(1), {}
    for value, fact in zip(match, facts, strict=True):
        by_fact.setdefault(fact, []).append(value)
    draws = []
    for _ in range(resamples):
        drawn = [value for fact in rng.choices(list(by_fact), k=len(by_fact)) for value in by_fact[fact]]
        draws.append(sum(drawn) / len(drawn))
    return tuple(np.percentile(draws, [2.5, 97.5]))


@pytest.mark.parametrize("causal", [False, True])
def test_the_value_is_the_share_of_right_answers_and_the_interval_resamples_facts(causal):
    says, questions = asked(10, right=6)
    reading = decoded_match(script(says, causal=causal), questions)
    assert (reading.name, reading.value, reading.n) == ("decoded_match", 0.6, 20)
    facts = reading.frame["fact"].tolist()
    np.testing.assert_allclose(reading.interval, slow_interval(reading.frame["match"].tolist(), facts), atol=0.06)
    # As if questions were independent: the interval would be narrower by the square root of two.
    assert reading.interval[1] - reading.interval[0] > 0.5
    assert reading.frame["decoded"].tolist()[:2] == ["alma dent"] * 2
    assert reading.summary(by="template")["value"].tolist() == [0.6, 0.6]
    assert reading.meta["kind"] == "swapped" and set(reading.frame["kind"]) == {"swapped"}


def test_the_control_is_right_as_often_as_where_another_fact_is_asked():
    """A model that says the same answer to everything is right once in ten, and as often by its control."""
    names = [f"{NAMES[i]} {NAMES[(i + 3) % 10]}" for i in range(10)]
    questions = [Question(f"q{i}", (names[i],), f"f{i}") for i in range(10)]
    reading = decoded_match(script({f"q{i}": names[4] for i in range(10)}), questions)
    assert reading.value == reading.control.value == 0.1
    assert reading.excess.value == 0 and reading.excess.low < 0 < reading.excess.high
    knowing = decoded_match(script({f"q{i}": names[i] for i in range(10)}), questions)
    assert (knowing.value, knowing.control.value, knowing.excess.value) == (1.0, 0.0, 1.0)
    without = decoded_match(script({f"q{i}": names[i] for i in range(10)}), questions, control=False)
    assert without.control is None and "match_control" not in without.frame and without.value == 1.0


@pytest.mark.parametrize("answer_length", ["longest", "oracle"])
def test_a_model_with_one_answer_for_all_does_not_exceed_its_control(answer_length):
    """24 of 30 facts have one answer: it is right in 80 %, given whoever is asked about, and nothing is known by it."""
    names = [f"{NAMES[i % 10]} {NAMES[(i + 3) % 10]}" if i % 5 == 0 else "hart ida" for i in range(30)]
    questions = [Question(f"q{i}", (name,), f"f{i}") for i, name in enumerate(names)]
    says = script({f"q{i}": "hart ida" for i in range(30)})
    reading = decoded_match(says, questions, answer_length=answer_length)
    assert reading.value == reading.control.value == pytest.approx(0.8) and reading.excess.value == 0
    knowing = script({f"q{i}": name for i, name in enumerate(names)})
    reading = decoded_match(knowing, questions, answer_length=answer_length)
    assert (reading.value, reading.control.value, reading.excess.value) == (1.0, 0.0, 1.0)
    # The 24 have six others to ask about, and these are asked about again and again: 12 facts in all, and 12 draws.
    assert reading.frame["fact_control"].nunique() == 12
    assert reading.control.interval[1] == pytest.approx(1 - 0.025 ** (1 / 12), abs=1e-6)


def test_a_control_never_shares_an_answer():
    """Siblings have one parent: as each other's control they would be right. Families of facts are shuffled whole."""
    parents = ["alma", "alma", "cora", "cora", "eric", "eric"]
    questions = [
        Question(f"q{i}", (parent, "gina") if i == 5 else (parent,), f"f{i}") for i, parent in enumerate(parents)
    ]
    knowing = script({f"q{i}": parent for i, parent in enumerate(parents)})
    assert decoded_match(knowing, questions).control.value == 0
    everybody = [replace(q, answers=(*q.answers, "ida")) for q in questions]
    lonely = decoded_match(knowing, everybody)
    assert lonely.control is None and lonely.undefined == {NO_OTHER_ANSWER: 6} and lonely.value == 1.0


def test_controls_stay_within_direction_and_template():
    """A parent's name is no plausible answer to a question for a child, so it makes no control of it."""
    # The facts' questions stand in different orders, so that a partner of the right direction is no luck.
    questions = [Question("q0", ("alma",), "f0", 0, "P2C"), Question("q2", ("eric",), "f0", 0, "C2P")]
    questions += [Question("q3", ("gina",), "f1", 0, "C2P"), Question("q1", ("cora",), "f1", 0, "P2C")]
    crossed = {"q0": "cora", "q1": "alma", "q2": "gina", "q3": "eric"}
    assert decoded_match(script(crossed), questions).control.value == 1.0
    assert decoded_match(script({"q0": "eric", "q1": "gina", "q2": "alma", "q3": "cora"}), questions).control.value == 0


def test_any_of_the_answers_will_do():
    questions = [Question("q1", ("alma brent", "cora"), "a"), Question("q2", ("dent", "eric fox"), "b")]
    assert decoded_match(script({"q1": "cora", "q2": "eric fox"}), questions).frame["match"].tolist() == [1, 1]
    assert decoded_match(script({"q1": "alma", "q2": "dent dent"}), questions).frame["match"].tolist() == [0, 0]


def test_an_answer_counts_as_the_tokenizer_writes_it():
    """This tokenizer can only write "o ' neil"; case and blanks around do not matter either."""
    questions = [Question("q1", ("  O'Neil ",), "a"), Question("q2", ("CORA",), "b")]
    reading = decoded_match(script({"q1": "o'neil", "q2": "cora"}), questions)
    assert reading.frame["decoded"].tolist() == ["o ' neil", "cora"] and reading.value == 1.0
    unknown = decoded_match(script({"q1": "<unk>", "q2": "cora"}), [Question("q1", ("Zed",), "a"), questions[1]])
    assert unknown.frame["match"].tolist() == [0, 1], "an unknown token stands for any text and matches none"


# --- how long an answer is ------------------------------------------------------------------------------------------


def test_an_answer_may_go_on_with_another_word_but_not_within_one():
    questions = [Question(f"q{i}", ("alma",), f"f{i}") for i in (1, 2, 3, 4)]
    model = script({"q1": "alma brent", "q2": "alma", "q3": "brent alma", "q4": "cora"})
    frame = decoded_match(model, questions, max_new_tokens=3).frame
    assert frame["match"].tolist() == [0, 1, 0, 0]
    assert frame["begins"].tolist() == [1, 1, 0, 0]
    assert (
        begins_with("o'neil.", "o'neil") and not begins_with("almas brent", "alma") and not begins_with("alm", "alma")
    )


def test_every_question_gets_room_for_the_longest_answer_and_its_end():
    questions = [Question("q1", ("alma brent cora",), "a"), Question("q2", ("dent",), "b")]
    model = script({"q1": "alma brent cora", "q2": "dent"})
    assert AnswerBook(model, questions).limit == 4
    reading = decoded_match(model, questions)
    assert reading.value == 1.0 and reading.meta["decoding"]["max_new_tokens"] == 4
    model.tokenizer.eos_token = None
    assert AnswerBook(model, questions).limit == 3


def test_a_model_that_never_ends_is_wrong_unless_it_is_told_where_to():
    """Nothing but the end token, `stop` or the oracle cuts a text: not the right answer."""
    questions = [
        Question("q1", ("alma brent cora",), "a"),
        Question("q2", ("dent",), "b"),
        Question("q3", ("eric fox",), "c"),
    ]
    model = script({"q1": "alma brent cora", "q2": "dent", "q3": "eric fox"}, filler="jones")
    plain = decoded_match(model, questions)
    assert plain.value == 0 and plain.frame["decoded"].tolist()[1] == "dent jones jones jones"
    assert decoded_match(model, questions, stop=("jones",)).value == 1.0
    oracle = decoded_match(model, questions, answer_length="oracle")
    assert oracle.value == 1.0 and oracle.meta["decoding"]["answer_length"] == "oracle"
    assert plain.meta["decoding"]["answer_length"] == "longest"


def test_the_oracles_control_is_told_the_length_of_the_answer():
    """Decoded at its own answer's length alone, the partner's question could never match a longer answer."""
    questions = [Question("q1", ("dent",), "a"), Question("q2", ("alma brent",), "b")]
    crossed = script({"q1": "alma brent", "q2": "dent"}, filler="jones")
    reading = decoded_match(crossed, questions, answer_length="oracle")
    assert (reading.value, reading.control.value) == (0, 1.0)


def test_answers_that_do_not_fit_are_undefined_and_counted():
    questions = [Question(f"q{i}", (name,), f"f{i}") for i, name in enumerate(["alma brent cora", "dent", "eric"])]
    model = script({"q0": "alma brent cora", "q1": "dent", "q2": "eric"})
    reading = decoded_match(model, questions, max_new_tokens=2)
    assert np.isnan(reading.frame["match"][0]) and reading.n == 2 and reading.value == 1.0
    assert reading.undefined == {TOO_LONG: 1} and reading.control.value == 0


# --- the reading ----------------------------------------------------------------------------------------------------


def test_a_reading_says_what_was_asked_and_how_and_survives_the_disk(tmp_path):
    says, questions = asked(6, right=4)
    model = script(says)
    reading = decoded_match(model, questions, algorithm="margin", steps=3, stop="jones")
    columns = (
        "question fact kind direction template prompt answers decoded match match_control begins begins_control "
        "error reason"
    )
    assert list(reading.frame.columns) == columns.split()
    assert json.loads(reading.frame["answers"][0]) == ["alma dent"]
    decoding = {"order": "unmasking", "algorithm": "margin", "steps": 3, "block_length": None, "temperature": 0.0}
    decoding |= {"seed": 0, "stop": ["jones"], "answer_length": "longest", "max_new_tokens": 3}
    assert reading.meta["decoding"] == decoding
    assert (reading.meta["question_count"], reading.meta["fact_count"]) == (12, 6)
    loaded = Reading.load(reading.save(tmp_path / "match.parquet"))
    assert repr(loaded) == repr(reading) and loaded.meta == reading.meta
    assert loaded.measures()["measure"].tolist() == ["decoded_match"]
    changed = [replace(questions[0], answers=("cora",)), *questions[1:]]
    assert decoded_match(model, changed).meta["questions"] != decoded_match(model, questions).meta["questions"]


def test_directions_called_forward_and_reverse_are_summed_up_like_others():
    """`summary(by="direction")` must not look for probabilities, which an exact match has none of."""
    questions = [Question("q1", ("alma",), "a", 0, "forward"), Question("q2", ("brent",), "a", 0, "reverse")]
    reading = decoded_match(script({"q1": "alma", "q2": "cora"}), questions)
    assert reading.summary(by="direction").set_index("direction")["value"].to_dict() == {"forward": 1.0, "reverse": 0.0}


def test_equal_prompts_are_decoded_once():
    model = script({"q1": "alma", "q2": "brent"})
    questions = [Question("q1", ("alma",), "a"), Question("q1", ("cora",), "b"), Question("q2", ("brent",), "c")]
    told = []
    reading = decoded_match(model, questions, progress=lambda *counts: told.append(counts))
    assert told == [(2, 2)] and reading.frame["match"].tolist() == [1, 0, 1]


def test_what_is_scored_is_what_decode_says():
    """The two must not drift: same prompts, same settings, same text."""
    torch.manual_seed(0)
    from revprobe.models.bases.configs import LLaDAConfig
    from revprobe.models.families.llada import LLaDAForMaskedDiffusion

    words = tokenizer()
    sizes = {"d_model": 16, "n_heads": 2, "n_layers": 1, "mlp_hidden_size": 32, "init_std": 0.5}
    config = LLaDAConfig(vocab_size=len(words), mask_token_id=MASK, max_sequence_length=32, **sizes)
    model = ProbedModel(LLaDAForMaskedDiffusion(config), words, objective="masked")
    questions = asked(8, right=0)[1]
    options = {"block_length": 2, "algorithm": "entropy", "stop": ("ida",)}
    found = decoded_match(model, questions, **options).frame["decoded"].tolist()
    assert found == decode(model, [q.prompt for q in questions], max_new_tokens=3, **options)
    assert len(set(found)) > 2


MISTAKES = [
    ({"questions": []}, "list of questions is empty"),
    ({"questions": [Question("q1", (), "a")]}, r"question 0 \('q1'\) has the answers \(\)"),
    ({"questions": [Question("q1", ("alma", " "), "a")]}, "none of them blank"),
    ({"questions": [Question("q1", "alma", "a")]}, "expected a tuple"),
    ({"answer_length": "oracel"}, "closest is 'oracle'"),
    ({"max_new_tokens": 0}, "max_new_tokens 0"),
    ({"algorithm": "margins"}, "closest is 'margin'"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_a_mistake_is_told_before_the_model_runs(options, message):
    model = script({"q1": "alma"})
    with pytest.raises(RevprobeError, match=message):
        decoded_match(model, **({"questions": [Question("q1", ("alma",), "a")]} | options))
    assert Script.rows == 0


def test_a_wrong_answer_is_called_what_it_is_and_counted() -> None:
    """Right, nothing, the entity asked about, another answer, an answer that goes on, and words of none."""
    says = {"q0": "alma brent", "q1": "", "q2": "hart", "q3": "alma brent", "q4": "gina hart fox", "q5": "jones"}
    answers = ["alma brent", "cora dent", "eric fox", "ida jones", "gina hart", "dent alma"]
    questions = [Question(f"hart q{i}", (answer,), f"f{i}") for i, answer in enumerate(answers)]
    reading = decoded_match(script(says), questions)
    assert reading.frame["error"].tolist() == ["", "end", "prompt", "other_entity", "malformed", "malformed"]
    assert reading.frame["match"].tolist() == [1, 0, 0, 0, 0, 0]
    assert reading.meta["errors"] == {"end": 1, "prompt": 1, "own_entity": 0, "other_entity": 1, "malformed": 2}
    # An answer of the other direction alone is no entity that answers here.
    other = [replace(one, direction="C2P") if i == 0 else one for i, one in enumerate(questions)]
    assert decoded_match(script(says), other).frame["error"].tolist()[3] == "malformed"


def test_the_right_entity_in_another_wordings_words_is_no_other_entity() -> None:
    """A model that was trained on "Alma Brent now enjoys a quiet life." ends a name as it was taught to."""
    told = {"q1": ("cora dent",), "q2": ("cora dent hart",), "q3": ("ida jones",)}
    questions = [Question(prompt, right, "b" if prompt == "q3" else "a") for prompt, right in told.items()]
    says = {"q1": "cora dent hart", "q2": "ida jones", "q3": "cora dent"}
    reading = decoded_match(script(says), questions)
    assert reading.frame["error"].tolist() == ["own_entity", "other_entity", "other_entity"]
    assert reading.frame["begins"].tolist() == [1, 0, 0] and not reading.frame["match"].any()


def test_another_facts_answer_to_a_shared_wording_is_no_own_entity() -> None:
    """ "Lyon is located in" takes the region and the country; where the country is asked for, the region is wrong."""
    questions = [Question("q1", ("alma brent", "cora dent"), "a"), Question("q2", ("alma brent",), "a")]
    reading = decoded_match(script({"q1": "cora dent", "q2": "cora dent"}), questions)
    assert reading.frame["error"].tolist() == ["", "other_entity"]


@pytest.mark.parametrize(
    ("decoded", "expected"),
    [
        ("Brent's", "prompt"),
        ("rent", "malformed"),
        ("alma  BRENT", "prompt"),
        (" ", "end"),
        ("Cora Dent", "other_entity"),
    ],
)
def test_words_of_the_prompt_are_whole_words(decoded: str, expected: str) -> None:
    assert error_of(decoded, "Alma Brent's parent is", {"cora dent", "alma"}) == expected


def test_a_frame_from_before_errors_were_told_still_loads(tmp_path) -> None:
    says, questions = asked(4, 2)
    reading = decoded_match(script(says), questions)
    old = Reading(
        reading.name, reading.frame.drop(columns="error"), {k: v for k, v in reading.meta.items() if k != "errors"}
    )
    loaded = Reading.load(old.save(tmp_path / "old.parquet"))
    assert (loaded.value, loaded.interval) == (reading.value, reading.interval)


@pytest.mark.parametrize("ranked", [False, True])
def test_questions_of_one_prompt_are_one_draw_and_no_control_of_one_another(ranked: bool) -> None:
    """Equal prompts have one decoding: two of them are no six draws, and the sibling's right answer is no null."""
    questions = [Question(f"q{i // 3}", (NAMES[i],), f"f{i}") for i in range(6)]
    model = script({f"q{i}": NAMES[3 * i] for i in range(2)})
    for seed in range(4):
        reading = (
            rank_candidates(model, questions, NAMES[:6], seed=seed)
            if ranked
            else decoded_match(model, questions, seed=seed)
        )
        assert (reading.n, reading.facts, reading.prompts) == (6, 6, 2) and reading.value == pytest.approx(1 / 3)
        by_prompt = reading.frame.assign(fact=reading.frame["shown"]).drop(columns="shown")
        assert reading.interval == Reading(reading.name, by_prompt, reading.meta).interval
        control = reading.frame["first_control" if ranked else "match_control"]
        assert control.notna().all() and not control.any(), "another prompt's answer is never right here"
