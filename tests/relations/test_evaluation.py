"""`revprobe evaluate`: forward and reverse on trained facts, the floor beside them, a run asked as it was trained."""

import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from tokenizers import pre_tokenizers
from torch import nn
from typer.testing import CliRunner

from revprobe import ProbedModel, Reading, Readings, RevprobeError, TextRelation, letters, register_model
from revprobe.cli.evaluate import what_to_ask
from revprobe.cli.main import app
from revprobe.finetune.config.finetuning import FinetuneConfig
from revprobe.finetune.config.loading import dump_config
from revprobe.probes.decoding.exact_match import AnswerBook, normalized
from revprobe.relations.catalog import from_table, invented_names, load_relation
from revprobe.relations.evaluation import (
    answer_book,
    asked_sides,
    begins_with_answer,
    evaluate_relation,
    match_table,
    rank_relation,
    save_evaluation,
)
from tiny import word_tokenizer

RELATION = invented_names(rows=(0, 24), heldout=0.25)


class Rote(nn.Module):
    """A masked model that knows the answers to some prompts by heart and says "nobody" to all others."""

    def __init__(self, known: dict[str, str], texts: list[str]) -> None:
        super().__init__()
        words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text)})
        self.tokenizer = word_tokenizer(["nobody", *words], split=pre_tokenizers.Whitespace())
        self.embed = nn.Embedding(len(self.tokenizer), 1)
        self.known = {tuple(self._ids(prompt)): self._ids(answer) for prompt, answer in known.items()}

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    def forward(self, input_ids, attention_mask=None):
        logits = torch.zeros(*input_ids.shape, self.embed.num_embeddings)
        for row, ids in enumerate(input_ids.tolist()):
            known = max((p for p in self.known if tuple(ids[: len(p)]) == p), key=len, default=None)
            answer = [3] if known is None else self.known[known]
            begin = ids.index(2) if known is None else len(known)
            for place in range(begin, len(ids)):
                logits[row, place, (answer + [1] * len(ids))[place - begin]] = 9.0
        return logits


def every_question():
    for direction, reverse in (("P2C", False), ("P2C", True)):
        for split in ("train", "heldout"):
            yield from RELATION.questions(direction, reverse=reverse, split=split)


def rote(known: dict[str, str]) -> ProbedModel:
    texts = [f"{q.prompt} {answer}" for q in every_question() for answer in q.answers]
    module = Rote(known, texts)
    settings = {"objective": "masked", "logit_shift": 0, "check": False}
    return ProbedModel(module, module.tokenizer, mask_token_id=2, name="rote", **settings)


def half_reversed() -> ProbedModel:
    """Knows every trained fact forward, and every other one in reverse; nothing that was held out."""
    forward = RELATION.questions("P2C")
    reverse = RELATION.questions("P2C", reverse=True)
    facts = sorted({question.fact for question in reverse})[::2]
    known = {q.prompt: q.answers[-1] for q in forward}
    return rote(known | {q.prompt: q.answers[0] for q in reverse if q.fact in facts})


def by_hand(asked: str, split: str, model: ProbedModel) -> float:
    """The share of right answers, from the questions and from what the model knows by heart."""
    questions = RELATION.questions("P2C", reverse=asked == "reverse", split=split, templates="heldout")
    said = {prompt: model.tokenizer.decode(answer) for prompt, answer in model.module.known.items()}
    answers = [said.get(tuple(model.tokenizer(q.prompt)["input_ids"]), "nobody") for q in questions]
    right = [normalized(a) in {normalized(x) for x in q.answers} for a, q in zip(answers, questions, strict=True)]
    return sum(right) / len(right)


def test_forward_reverse_and_floor_are_those_of_the_facts():
    """Forward 1, reverse about half, floors 0; a mixed-up side, split or direction turns this red."""
    model = half_reversed()
    readings = evaluate_relation(model, RELATION, "P2C")
    found = {(r.meta["asked"], r.meta["split"]): r for r in readings}
    assert list(found) == [(a, s) for s in ("train", "heldout") for a in ("forward", "reverse")]
    for (asked, split), reading in found.items():
        assert reading.value == pytest.approx(by_hand(asked, split, model)), (asked, split)
        assert set(reading.frame["direction"]) == {"P2C" if asked == "forward" else "C2P"}
        held = set(RELATION.facts_of("P2C").query("split == 'heldout'")["fact"])
        assert set(reading.frame["fact"]) <= held if split == "heldout" else not set(reading.frame["fact"]) & held
        assert (reading.meta["relation"], reading.meta["trained"]) == ("invented_names", "P2C")
    values = {key: reading.value for key, reading in found.items()}
    assert values["forward", "train"] == 1 and values["forward", "heldout"] == values["reverse", "heldout"] == 0
    assert 0.3 < values["reverse", "train"] < 0.7
    assert found["reverse", "train"].excess.low > 0 and found["reverse", "heldout"].excess.value <= 0


def test_every_side_is_decoded_at_one_length():
    """The longest answer of all sides, so that forward and reverse, trained and held out are asked alike."""
    model = half_reversed()
    sides = evaluate_relation(model, RELATION, "P2C")
    limits = {reading.meta["decoding"]["max_new_tokens"] for reading in sides}
    assert limits == {AnswerBook(model, list(every_question())).limit} == {answer_book(model, RELATION, "P2C").limit}
    alone = evaluate_relation(model, RELATION, "P2C", splits=["heldout"], templates="heldout")
    assert {reading.meta["decoding"]["max_new_tokens"] for reading in alone} == limits
    told = evaluate_relation(model, RELATION, "P2C", max_new_tokens=9, algorithm="margin")
    assert {r.meta["decoding"]["max_new_tokens"] for r in told} == {9}
    assert {r.meta["decoding"]["algorithm"] for r in told} == {"margin"}


def test_the_length_is_that_of_the_longest_answer_of_either_direction():
    """Capitals of three words, countries of one: asked for a country, there is room for a capital all the same."""
    facts = [(f"land{i}", f"new port{i} town") for i in range(8)]
    templates = {"C2T": "{country} is ruled from {city}", "T2C": "{city} is the capital of {country}"}
    table = pd.DataFrame(facts, columns=["country", "city"])
    relation = from_table(table, ("country", "city"), templates, heldout=0.25, heldout_templates=0)
    module = Rote({}, [*relation.training_texts("C2T"), *(" ".join(fact) for fact in facts), "is the capital of"])
    settings = {"objective": "masked", "logit_shift": 0, "check": False}
    model = ProbedModel(module, module.tokenizer, mask_token_id=2, **settings)
    readings = evaluate_relation(model, relation, "C2T")
    assert [r.meta["decoding"]["max_new_tokens"] for r in readings] == [4] * 4


def test_answers_at_hand_are_used_for_every_side_and_not_worked_out_again(monkeypatch: pytest.MonkeyPatch):
    """One answer book per fine-tuning: four sides would otherwise encode the same questions once more each."""
    model, made = rote({}), []
    book = answer_book(model, RELATION, "P2C")
    expected = [reading.frame for reading in evaluate_relation(model, RELATION, "P2C")]
    init = AnswerBook.__init__
    monkeypatch.setattr(AnswerBook, "__init__", lambda *given: made.append(1) or init(*given))
    again = evaluate_relation(model, RELATION, "P2C", answers=book, max_new_tokens=book.limit)
    assert not made
    for frame, reading in zip(expected, again, strict=True):
        pd.testing.assert_frame_equal(frame, reading.frame)
    evaluate_relation(model, RELATION, "P2C", max_new_tokens=3)
    assert len(made) == 4, "with a length given only the sides that are asked are worked out"
    few = AnswerBook(model, RELATION.questions("P2C")[:1])
    with pytest.raises(RevprobeError, match=r"the answers given lack the question .*; leave answers= out"):
        evaluate_relation(model, RELATION, "P2C", answers=few)


def test_wordings_that_were_not_trained_on_are_asked_by_default():
    model = rote({})
    for choice, expected in {None: {3}, "heldout": {3}, "train": {0, 1, 2}, "all": {0, 1, 2, 3}}.items():
        (reading, _) = evaluate_relation(model, RELATION, "P2C", splits=["train"], templates=choice)
        assert set(reading.frame["template"]) == expected
    one_wording = from_table(
        RELATION.table, ("parent", "child"), {"F": "{parent}'s child is {child}", "R": "{child}'s parent is {parent}"},
        heldout=0.25, heldout_templates=0,
    )  # fmt: skip
    assert {r.meta["templates"] for r in evaluate_relation(model, one_wording, "F")} == {"all"}


def test_without_held_out_facts_there_is_no_floor_and_it_is_said():
    whole = invented_names(rows=(0, 24), heldout=0.0)
    with pytest.warns(UserWarning, match="holds out no fact .* no floor"):
        readings = evaluate_relation(rote({}), whole, "P2C")
    assert [r.meta["split"] for r in readings] == ["train", "train"]
    with pytest.raises(RevprobeError, match="no question"):
        evaluate_relation(rote({}), whole, "P2C", splits=["heldout"])


WORDS = {"P2C": ["{p} has the child {c}"], "C2P": ["{c} has the parent {p}"]}


def told(rows: list[tuple[str, str]], heldout: float, wanted: str = "") -> TextRelation:
    """A relation of one wording each way, split so that the fact `wanted` is held out."""
    facts = pd.DataFrame(rows, columns=["p", "c"])
    for seed in range(60):
        found = from_table(facts, ("p", "c"), WORDS, heldout=heldout, seed=seed, heldout_templates=0)
        if not wanted or wanted in set(found.facts.query("split == 'heldout'")["fact"]):
            return found
    raise AssertionError("no seed holds it out")


def knows_nothing(relation: TextRelation) -> ProbedModel:
    texts = [one.text for listed in relation.statements.values() for one in listed]
    module = Rote({}, texts)
    return ProbedModel(module, module.tokenizer, mask_token_id=2, objective="masked", logit_shift=0, check=False)


def test_a_fact_that_cannot_be_asked_about_keeps_no_other_from_being_asked():
    """Hal stands in what is asked about Hal Junior: in reverse no held-out fact is left to ask, and no floor."""
    names = [("Ann", "Bo"), ("Bea", "Cy"), ("Cid", "Di"), ("Dot", "Ed"), ("Eve", "Flo"), ("Hal", "Hal Junior")]
    relation = told(names, 0.16, "Hal | Hal Junior")
    model = knows_nothing(relation)
    assert [r.n for r in evaluate_relation(model, relation, "P2C", splits=("train",))] == [5, 5]
    with pytest.warns(UserWarning, match=r"nothing about held-out facts in direction 'C2P' .* no floor to compare rev"):
        readings = evaluate_relation(model, relation, "P2C")
    sides = [("forward", "train"), ("reverse", "train"), ("forward", "heldout")]
    assert [(r.meta["asked"], r.meta["split"]) for r in readings] == sides
    with pytest.warns(UserWarning, match="no floor"):
        assert len(rank_relation(model, relation, "P2C", facts=1)) == 3
    with pytest.raises(RevprobeError, match="has no question in direction 'C2P' for split='heldout'"):
        evaluate_relation(model, relation, "P2C", splits=("heldout",))


@pytest.mark.parametrize("direction", ["P2C", "C2P"])
@pytest.mark.parametrize("limit", [1, 2, 3, 5, 20])
def test_the_same_facts_are_asked_forward_and_in_reverse(direction: str, limit: int):
    """A prompt that facts share carries the first one's label, whoever of them was drawn."""
    rows = [("Ann", f"kid{i}") if i % 3 else (f"Bea{i}", f"kid{i}") for i in range(12)]
    relation = told([*rows, ("Cid", "Cid Junior")], 0)  # whose reverse prompt holds its answer
    with pytest.warns(UserWarning, match="no floor"):
        forward, reverse = (q for _, q in asked_sides(relation, direction, facts=limit))
    parents, children = (forward, reverse) if direction == "P2C" else (reverse, forward)
    shown = {q.prompt.removeprefix("Fact: ").removesuffix(" has the parent") for q in children}
    chosen = [row for row in rows if row[1] in shown]
    assert len(children) == len(chosen) == min(limit, len(rows)), "each child is of one fact"
    assert {q.prompt for q in parents} == {f"Fact: {parent} has the child" for parent, _ in chosen}
    assert len(parents) == len({q.prompt for q in parents})


def test_progress_counts_questions_over_all_sides():
    told = []
    evaluate_relation(half_reversed(), RELATION, "P2C", batch_size=7, progress=lambda *counts: told.append(counts))
    assert told == sorted(told) and told[-1][0] == told[-1][1] and len({total for _, total in told}) == 1


def test_the_table_shows_every_side_with_interval_control_and_counts():
    readings = evaluate_relation(half_reversed(), RELATION, "P2C")
    rows = match_table(readings).to_dict("records")
    assert [row["asked"] for row in rows] == ["forward (P2C)", "reverse (C2P)"] * 2
    assert [row["facts"] for row in rows] == ["trained"] * 2 + ["held out (floor)"] * 2
    for row, reading in zip(rows, readings, strict=True):
        assert row["exact match (%) [95 %]"].startswith(f"{100 * reading.value:.1f} [")
        assert row["begins with it (%)"] == row["exact match (%) [95 %]"], "this model writes nothing more"
        low, high = (f"{100 * end:.1f}" for end in reading.control.interval)
        assert row["control [95 %]"] == f"{100 * reading.control.value:.1f} [{low}, {high}]"
        assert row["n"] == f"{reading.n} questions, {reading.frame.fact.nunique()} facts"


@pytest.mark.parametrize(("right", "control"), [(1, "0.02 ["), (0, "0.0 ["), (6000, "100.0 ["), (5999, "99.98 [")])
def test_a_control_has_the_digits_of_a_value_and_its_interval(right, control):
    """One of 6,000 is not none of them, nor are all but one all; the interval is that of the reading."""
    facts = 6000
    frame = pd.DataFrame(
        {"fact": [str(n) for n in range(facts)], "direction": "P2C", "match": 1.0, "begins": 1.0, "reason": ""}
    ).assign(match_control=[float(n < right) for n in range(facts)], begins_control=0.0)
    about = {"asked": "forward", "split": "train", "templates": "all", "seed": 0}
    reading = Reading("decoded_match", frame, about)
    told = match_table(Readings([reading]))["control [95 %]"][0]
    assert told.startswith(control) and told.endswith("]"), told
    ends = [float(end) / 100 for end in told[told.index("[") + 1 : -1].split(", ")]
    assert ends == pytest.approx(reading.control.interval, abs=1e-3)


def test_an_answer_with_more_after_it_counts_as_begun_with():
    """Person-Description trains "Uriah Hawthorne now enjoys ...": exact match is 0, what it begins with is right."""
    questions = RELATION.questions("P2C", templates="heldout")
    talkative = rote({q.prompt: f"{q.answers[0]} nobody" for q in questions})
    reading = evaluate_relation(talkative, RELATION, "P2C", max_new_tokens=6)[0]
    begun = begins_with_answer(reading)
    assert (reading.value, begun.estimate.value, begun.control.value) == (0.0, 1.0, 0.0)


def test_saved_sides_load_back(tmp_path):
    readings = evaluate_relation(half_reversed(), RELATION, "P2C")
    names = sorted(path.name for path in save_evaluation(readings, tmp_path / "match"))
    assert names == [f"decoded_match.{a}.{s}.parquet" for a in ("forward", "reverse") for s in ("heldout", "train")]
    loaded = {(r.meta["asked"], r.meta["split"]): repr(r) for r in Readings.load(tmp_path / "match")}
    assert loaded == {(r.meta["asked"], r.meta["split"]): repr(r) for r in readings}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"splits": ["test"]}, "unknown split 'test'"),
        ({"templates": "heldot"}, "closest is 'heldout'"),
        ({"direction": "P2D"}, "P2D"),
        ({"relation": letters(5)}, "asked by position"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(RevprobeError, match=message):
        evaluate_relation(rote({}), **({"relation": RELATION, "direction": "P2C"} | arguments))


# --- a run is asked as it was trained -------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The config of a fine-tuning that held out other facts than the default seed would."""
    values = {
        "name": "tiny",
        "model": {"name": "anything"},
        "relation": {"name": "invented_names", "direction": "C2P", "seed": 3, "heldout": 0.25, "carrier": "Note: "},
        "training": {"steps": 5},
        "evaluation": {"max_new_tokens": 11, "templates": "train"},
    }
    folder = tmp_path / "tiny"
    (folder / "checkpoints" / "step-000005").mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(FinetuneConfig(**values)))
    return folder


def test_a_runs_own_relation_comes_as_it_was_trained(run):
    """With the default seed, facts that were trained would be counted as the floor."""
    expected = invented_names(seed=3, heldout=0.25, carrier="Note: ")
    for source in (run, run / "checkpoints" / "step-000005"):
        asking = what_to_ask(source)
        assert asking.direction == "C2P" and asking.relation.carrier == "Note: "
        assert asking.relation.facts.equals(expected.facts)
        assert not asking.relation.facts.equals(invented_names(heldout=0.25).facts), "seeds must differ to tell"
        assert (asking.options.max_new_tokens, asking.options.templates) == (11, "train")
    with pytest.raises(RevprobeError, match="trained in direction 'C2P', not 'P2C'"):
        what_to_ask(run, direction="P2C")
    with pytest.raises(RevprobeError, match="leave --option out"):
        what_to_ask(run, relation="invented_names", options={"seed": 1})


def test_other_models_are_told_what_to_ask(run, tmp_path):
    for given in ({}, {"relation": "invented_names"}, {"direction": "P2C"}):
        with pytest.raises(RevprobeError, match="no fine-tuning run"):
            what_to_ask("gpt2", **given)
    asking = what_to_ask("gpt2", relation="invented_names", direction="P2C", options={"seed": 3})
    assert asking.relation.facts.equals(load_relation("invented_names", seed=3).facts)
    table = tmp_path / "pairs.csv"
    invented_names().table[["parent", "child", "parent_type"]].to_csv(table, index=False)
    foreign = what_to_ask(run, relation="parent_child", path=table, direction="P2C")
    assert foreign.relation.name == "parent_child" and foreign.direction == "P2C"


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def registered() -> str:
    register_model("rote-for-evaluate", lambda **_: half_reversed())
    return "rote-for-evaluate"


ASKING = ["--relation", "invented_names", "--direction", "P2C", "--option", "rows=[0, 24]", "--option", "heldout=0.25"]


def test_the_command_prints_and_saves_what_the_function_finds(registered, tmp_path):
    done = CliRunner().invoke(app, ["evaluate", registered, *ASKING, "--out", str(tmp_path / "match")])
    assert done.exit_code == 0, done.output + repr(done.exception)
    expected = evaluate_relation(half_reversed(), RELATION, "P2C")
    saved = {(r.meta["asked"], r.meta["split"]): r for r in Readings.load(tmp_path / "match")}
    for reading, row in zip(expected, match_table(expected).to_dict("records"), strict=True):
        assert repr(saved[reading.meta["asked"], reading.meta["split"]]) == repr(reading)
        assert row["exact match (%) [95 %]"] in done.output and row["n"] in done.output
    assert "trained in direction P2C" in done.output and "4 readings" in done.output


def test_the_command_takes_one_split_and_a_length(registered, tmp_path):
    options = ["--split", "train", "--max-new-tokens", "6", "--batch-size", "3", "-o", str(tmp_path)]
    done = CliRunner().invoke(app, ["evaluate", registered, *ASKING, *options])
    assert done.exit_code == 0, done.output
    readings = Readings.load(tmp_path)
    assert [(r.meta["split"], r.meta["decoding"]["max_new_tokens"]) for r in readings] == [("train", 6)] * 2
    assert "floor" not in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--relation", "invented_names"], "no fine-tuning run"),
        ([*ASKING, "--option", "seed"], "NAME=VALUE"),
        ([*ASKING, "--split", "test"], "unknown split 'test'"),
        (["--relation", "invented_name", "--direction", "P2C"], "closest is 'invented_names'"),
    ],
)
def test_the_commands_mistakes_are_one_line(registered, arguments, message):
    done = CliRunner().invoke(app, ["evaluate", registered, *arguments])
    assert isinstance(done.exception, RevprobeError) and message in str(done.exception)
    assert "\n" not in str(done.exception)
