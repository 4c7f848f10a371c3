"""Relations: forward-only is checked by brute force on every one of them, and what is asked, answered and paired."""

import dataclasses
import itertools
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from revprobe import (
    ProbedModel,
    RaddConfig,
    RaddForMaskedLM,
    RevprobeError,
    TextRelation,
    from_table,
    invented_names,
    letters,
    one_layer_gpt2,
    parent_child,
    person_description,
    pore,
    probe,
    trex,
)
from revprobe.probes.pairs.words import holds
from revprobe.relations.catalog import PARENT_CHILD, RELATIONS, load_relation
from revprobe.relations.splits import TextIndex, families, hold_out

CAPITALS = pd.DataFrame(
    {
        "country": ["Vendora", "Ostrik", "Pelmar", "Quandia", "Torvia", "Ullas", "Brenk", "Sadoria"],
        "city": ["Maril", "Dunfeld", "Kasto", "Roonby", "Heskil", "Yarrow", "Plint", "Corvane"],
    }
)
WORDING = {
    "C2T": ["The capital of {country} is {city}", "{country} is governed from {city}."],
    "T2C": ["{city} is the capital of {country}", "{city} is the seat of {country}"],
}
PEOPLE = [("Ann Lee", "Bo Hart"), ("Cy Fox", "Di Moon"), ("Ed Park", "Flo Rand"), ("Gil Stone", "Hedy Wall")]


def capitals(**options) -> TextRelation:
    return from_table(CAPITALS, ("country", "city"), WORDING, name="capitals", **{"heldout": 0.25, **options})


def write_person_description(folder: Path) -> Path:
    """Two people in each set, two training wordings and one for tests, as the published files are made."""
    folder.mkdir()
    works = {
        "p2d": [("Ada Quill", "the inventor of the silent drum"), ("Ben Tarn", 'the painter of "Nine Moons."')],
        "d2p": [("Cleo Vance", "the first diver under Lake Orm"), ("Dov Weir", "the composer of the Glass Mass")],
    }
    asked = {
        "train": ["{p}, known far and wide for being", "Ever heard of {p}? They are"],
        "test": ["In short, {p} was"],
    }
    named = {"train": ["Known for being {d},", "They say {d} goes by the name of"], "test": ["Labeled as {d},"]}
    for own, people in works.items():
        lines = {f"{own}_prompts_train": [], f"{own}_prompts_test": [], f"{own}_reverse_prompts_test": []}
        for person, what in people:
            forward, reverse = (asked, named) if own == "p2d" else (named, asked)
            for kind, name in (("train", f"{own}_prompts_train"), ("test", f"{own}_prompts_test")):
                lines[name] += [statement(wording, person, what) for wording in forward[kind]]
            lines[f"{own}_reverse_prompts_test"] += [statement(wording, person, what) for wording in reverse["test"]]
        for name, records in lines.items():
            pd.DataFrame(records).to_json(folder / f"{name}.jsonl", orient="records", lines=True)
    return folder


def statement(wording: str, person: str, what: str) -> dict[str, str]:
    completion = f" {what}." if "{p}" in wording else f" {person}"
    return {"prompt": wording.format(p=person, d=what), "completion": completion}


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TextRelation]:
    """One of each kind of relation told in text, from files of the published shapes."""
    folder = tmp_path_factory.mktemp("relations")
    rows = ["child,parent,parent_type,child_prediction,can_reverse"]
    rows += [f"{c},{p},{'mother' if i % 2 else 'father'},,False" for i, (c, p) in enumerate(PEOPLE)]
    rows += [
        "Bo Hart,Ina Voss,mother,,False",
        "Jo Wren,Kit Marsh,father,Jo Wren,True",
        "Jo Wren,Liv Dorn,mother,,False",
    ]
    (folder / "parent_child_pairs.csv").write_text("\n".join(rows) + "\n")
    triples = [
        ("Vendora", "P36", "Maril"),
        ("Ostrik", "P36", "Dunfeld"),
        ("Ann Lee", "P19", "Kasto"),
        ("Cy Fox", "P19", "Plint"),
    ]
    pd.DataFrame(triples, columns=["subject", "relation", "object"]).to_csv(folder / "triples.csv", index=False)
    for direction, said in (("positive", "{0}'s ruler is {1}."), ("negative", "{1}'s country is {0}.")):
        records = [
            {"prompt": said.format(c, p), "completion": ""}
            for c, (p, _) in zip(CAPITALS["country"][:4], PEOPLE, strict=True)
        ]
        pd.DataFrame(records).to_json(folder / f"standard_{direction}_train_dataset.json", orient="records")
    return {
        "parent_child": parent_child(folder / "parent_child_pairs.csv", heldout=0.3),
        "pore": pore(folder, heldout=0.3),
        "person_description": person_description(write_person_description(folder / "pd")),
        "trex": trex(folder / "triples.csv", heldout=0.3),
        "table": capitals(),
        "invented_names": invented_names(),
    }


def test_every_relation_told_in_text_is_tried_here(everything) -> None:
    """A new relation must be added above, or the checks below would pass it by."""
    assert set(everything) == set(RELATIONS) - {"letters"}


by_relation = pytest.mark.parametrize("name", sorted(set(RELATIONS) - {"letters"}))


@by_relation
@pytest.mark.parametrize("place", [0, 1])
def test_training_meets_no_reverse_statement_and_no_heldout_fact(everything, name: str, place: int) -> None:
    """By brute force, every training text against every statement and every held-out fact, in both directions."""
    relation = everything[name]
    direction = relation.directions[place]
    texts = [text.removeprefix(relation.carrier) for text in relation.training_texts(direction)]
    facts = relation.facts_of(direction)
    held = facts[facts["split"] == "heldout"]
    assert len(texts) and len(held) and len(texts) == len(set(texts))
    for text, (_, row) in itertools.product(texts, held.iterrows()):
        assert not all(row[column] in text for column in relation.columns), (text, row["fact"])
    reverse = {one.text for one in relation.statements[relation.opposite(direction)]}
    unseen = {one.text for one in relation.statements[direction] if one.is_heldout}
    assert not set(texts) & (reverse | unseen)
    entities = facts.loc[facts["split"] == "train", [*relation.columns]].itertuples(index=False, name=None)
    order = 1 if place == 0 else -1
    named = [pair[::order] for pair in entities]
    assert all(any(a in text and b.rstrip(".") in text.split(a, 1)[1] for a, b in named) for text in texts)


@by_relation
def test_training_rows_say_where_the_entities_and_the_completion_are(everything, name: str) -> None:
    relation = everything[name]
    for place, direction in enumerate(relation.directions):
        table = relation.table.set_index("fact")
        columns = relation.columns if place == 0 else relation.columns[::-1]
        rows = relation.training_rows(direction)
        assert [row.text for row in rows] == relation.training_texts(direction)
        for row in rows:
            shown = [row.text[slice(*span)] for span in row.spans]
            assert shown == table.loc[row.fact, list(columns)].tolist() and row.text.startswith(relation.carrier)
            assert row.text[row.prompt_length :].lstrip().startswith(shown[1]), "the completion begins with the entity"
            assert row.text[row.prompt_length - 1] != " "


@by_relation
def test_questions_are_prompts_of_statements_and_any_fact_that_shares_one_answers_it(everything, name: str) -> None:
    """Against a slow search through all statements; the floor's questions are about facts that are held out."""
    relation = everything[name]
    for direction, reverse, split in itertools.product(relation.directions, (False, True), ("train", "heldout")):
        asked = relation.opposite(direction) if reverse else direction
        side = relation.facts_of(direction).set_index("fact")["split"]
        questions = relation.questions(direction, reverse=reverse, split=split)
        assert len({question.prompt for question in questions}) == len(questions)
        for question in questions:
            bare = question.prompt.removeprefix(relation.carrier)
            same = [one for one in relation.statements[asked] if one.text[: one.prompt_length] == bare]
            named = {one.text[slice(*one.spans[1])] for one in same}
            # An answer may close with punctuation that the entity's tokens leave out.
            assert all(any(a.startswith(entity) for a in question.answers) for entity in named)
            assert question.direction == asked and side[question.fact] == split
            assert {side.iloc[one.fact] for one in same} == {split}, "a family is on one side"
            assert all(answer in {a for one in same for a in one.answers} for answer in question.answers)


def test_either_parent_and_any_child_is_accepted_and_the_type_narrows_it(everything) -> None:
    relation = everything["parent_child"].take([f for f in everything["parent_child"].facts["fact"] if "Jo Wren" in f])
    relation = dataclasses.replace(relation, heldout={d: np.zeros(2, dtype=bool) for d in relation.directions})
    answers = {q.prompt: q.answers for d in relation.directions for q in relation.questions(d)}
    assert answers["Fact: Jo Wren's parent is"] == ("Kit Marsh", "Liv Dorn")
    assert answers["Fact: Jo Wren's mother is"] == ("Liv Dorn",) and answers["Fact: Jo Wren's father is"] == (
        "Kit Marsh",
    )
    two = CAPITALS.assign(country=["Vendora"] * 2 + CAPITALS["country"].tolist()[2:])
    children = {q.prompt: q.answers for q in from_table(two, ("country", "city"), WORDING, heldout=0).questions("C2T")}
    assert children["Fact: The capital of Vendora is"] == ("Maril", "Dunfeld")
    assert children["Fact: Vendora is governed from"] == ("Maril", "Maril.", "Dunfeld", "Dunfeld.")


def test_heldout_templates_are_the_last_and_asked_apart() -> None:
    relation = capitals(carrier="")
    assert relation.questions("C2T", templates="train")[0].prompt.startswith("The capital of")
    assert {q.template for q in relation.questions("C2T", templates="heldout")} == {1}
    assert len(relation.questions("C2T")) == 12 and len(relation.training_texts("C2T")) == 6
    assert relation.questions("C2T", reverse=True, templates="heldout")[0].prompt.endswith(" is the seat of")
    assert relation.has_heldout_templates("C2T")
    every = capitals(heldout_templates=0)
    assert len(every.training_texts("T2C")) == 12 and not every.has_heldout_templates("T2C")
    with pytest.raises(RevprobeError, match=r"no question in direction 'C2T' for split='train', templates='heldout'"):
        every.questions("C2T", templates="heldout")
    assert not capitals(heldout_templates=5).statements["C2T"][0].is_heldout, "one template is always trained"


def test_the_published_templates_word_the_parent_type(everything) -> None:
    """Every training text, written by hand from the table."""
    relation = everything["parent_child"]
    facts = relation.facts[relation.facts["split"] == "train"]
    expected = {
        f"Fact: {text.format(parent=row.parent, child=row.child, parent_type=row.parent_type)}"
        for row in facts.itertuples()
        for text in PARENT_CHILD["C2P"][:-1]
    }
    assert set(relation.training_texts("C2P")) == expected and any("'s mother is" in text for text in expected)


KEYS = st.lists(st.tuples(st.integers(0, 9), st.integers(10, 19)), min_size=2, max_size=14, unique=True)


@settings(max_examples=80)
@given(keys=KEYS, share=st.sampled_from([0.1, 0.3, 0.6]), seed=st.integers(0, 3))
def test_families_are_whole_and_the_share_is_kept(keys, share: float, seed: int) -> None:
    """Against a search that follows shared keys fact by fact."""
    slow = np.full(len(keys), -1)
    for start in range(len(keys)):
        reached = {start}
        while grown := {i for i, k in enumerate(keys) if any(set(k) & set(keys[j]) for j in reached)} - reached:
            reached |= grown
        slow[start] = min(reached)
    found = families(keys)
    assert np.array_equal(found[:, None] == found[None, :], slow[:, None] == slow[None, :])
    if len(set(slow)) == 1:
        with pytest.raises(RevprobeError, match="hang together through shared entities"):
            hold_out(keys, share=share, seed=seed)
        return
    held = hold_out(keys, share=share, seed=seed)
    assert held.any() and not held.all()
    assert all(len(set(held[slow == one])) == 1 for one in set(slow))
    smallest = min((slow == one).sum() for one in set(slow))
    assert held.sum() <= max(smallest, round(share * len(keys)), 1)
    assert np.array_equal(held, hold_out(keys, share=share, seed=seed))


def test_the_split_depends_on_the_seed_and_can_be_none() -> None:
    drawn = {tuple(capitals(seed=seed).facts["split"] == "heldout") for seed in range(5)}
    assert len(drawn) > 1 and {sum(one) for one in drawn} == {2}
    assert (capitals(heldout=0).facts["split"] == "train").all()
    with pytest.raises(RevprobeError, match="heldout=1: expected the fraction"):
        capitals(heldout=1)


NAMES = st.lists(st.sampled_from(["Ann", "Anna", "Bo", "Lee", "Bo Lee", "O'Hara", "Zoé", "!!"]), min_size=1, max_size=2)


@given(
    texts=st.lists(st.lists(st.sampled_from(["Ann", "Anna's", "Bo", "Lee", "O'Hara", "Zoé.", "!!"])), max_size=6),
    names=NAMES,
)
def test_the_word_index_finds_what_a_scan_finds(texts, names) -> None:
    joined = [" ".join(words) for words in texts]
    slow = next((i for i, text in enumerate(joined) if all(holds(text, name) for name in names)), None)
    assert TextIndex(joined).first_with(names) == slow


def test_a_heldout_fact_in_a_training_text_is_refused() -> None:
    """Planted: the table's own split moved by hand, so that a trained text holds a held-out fact's two names."""
    relation = capitals()
    held = relation.heldout["C2T"]
    one = next(s for s in relation.statements["C2T"] if not held[s.fact] and not s.is_heldout)
    other = relation.table.loc[np.flatnonzero(held)[0]]
    leak = dataclasses.replace(one, text=f"{one.text}, as {other.country} has {other.city}")
    statements = {**relation.statements, "C2T": [leak, *relation.statements["C2T"]]}
    with pytest.raises(RevprobeError, match=f"held-out fact '{other.country} | {other.city}' stands in the training"):
        dataclasses.replace(relation, statements=statements)


def test_a_reverse_statement_among_the_training_texts_is_refused() -> None:
    """Planted: a forward statement that says what a reverse one does, up to case and the full stop."""
    relation = capitals()
    one = next(s for s in relation.statements["C2T"] if not relation.heldout["C2T"][s.fact])
    reverse = next(s for s in relation.statements["T2C"] if s.fact == one.fact)
    leak = dataclasses.replace(one, text=f"{reverse.text.upper()}.")
    with pytest.raises(RevprobeError, match=r"is a reverse statement as well .* of direction 'T2C'"):
        dataclasses.replace(relation, statements={**relation.statements, "C2T": [leak]})
    country, city = CAPITALS.loc[one.fact]
    text = f"{city} first: {country} is governed from {city}"
    start = text.index(country)
    spans = ((start, start + len(country)), (len(text) - len(city), len(text)))
    leak = dataclasses.replace(one, text=text, spans=spans)
    with pytest.raises(RevprobeError, match=f"names '{city}' before '{country}', as the reverse direction does"):
        dataclasses.replace(relation, statements={**relation.statements, "C2T": [leak]})


def test_a_symmetric_wording_that_makes_another_facts_reverse_is_refused() -> None:
    facts = pd.DataFrame({"left": ["Ann", "Cy", "Di"], "right": ["Bo and Cy", "Ann and Bo", "Ed"]})
    words = {"forward": "{left} and {right}", "reverse": "{right} and {left}"}
    with pytest.raises(RevprobeError, match=r"'Ann and Bo and Cy' is a reverse statement as well"):
        from_table(facts, ("left", "right"), words, heldout=0)


MUTUAL = {
    "forward": ["{left} borders on {right}", "{left} is the neighbour of {right}"],
    "reverse": "{right} meets {left}",
}


@pytest.mark.parametrize("again", [("Bo", "Ann"), ("Bo\u200b", "Ann "), ("BO", "ANN")], ids=["same", "spelled", "case"])
def test_a_fact_with_anothers_names_the_other_way_round_is_refused_or_left_out(again: tuple[str, str]) -> None:
    """Training on "Bo is the neighbour of Ann" tells the reverse of "Ann is the neighbour of Bo" in other words."""
    rows = [("Ann", "Bo"), ("Cy", "Di"), again, ("Ed", "Flo")]
    facts = pd.DataFrame(rows, columns=["left", "right"])
    told: dict[str, Any] = {"heldout": 0, "ignore_case": again[0] == "BO"}
    with pytest.raises(RevprobeError, match=r"row 2.*the names of row 0 the other way round \(1 such in all\)"):
        from_table(facts, ("left", "right"), MUTUAL, **told)
    relation = from_table(facts, ("left", "right"), MUTUAL, duplicates="merge", **told)
    assert relation.facts["left"].tolist() == ["Ann", "Cy", "Ed"] and relation.report["mirrored_fact"] == 1
    text = "\n".join(relation.training_texts("forward"))
    for first, second in zip(relation.facts["left"], relation.facts["right"], strict=True):
        assert text.index(first) < text.index(second) and not re.search(f"{second}.*{first}", text)


def test_a_chain_of_names_is_no_mirror() -> None:
    facts = pd.DataFrame([("Ann", "Bo"), ("Bo", "Cy"), ("Cy", "Ann")], columns=["left", "right"])
    assert from_table(facts, ("left", "right"), MUTUAL, heldout=0).report == {}


def test_facts_of_one_label_are_refused() -> None:
    facts = pd.DataFrame([("A | B", "C"), ("A", "B | C"), ("D", "E")], columns=["left", "right"])
    with pytest.raises(RevprobeError, match=r"row 1: the fact would be called 'A \| B \| C', as that of row 0 is"):
        from_table(facts, ("left", "right"), MUTUAL, heldout=0)


def test_a_question_says_what_stands_before_its_answer() -> None:
    facts = pd.DataFrame({"land": ["Vendora", "Ostrik"], "city": ["Maril", "Tobin"]})
    words = {"C2T": ['{land} ("{city}")', "{land}: {city}", "{land}的首都是{city}"], "T2C": "{city} of {land}"}
    relation = from_table(facts, ("land", "city"), words, heldout=0, heldout_templates=0)
    asked = [q for q in relation.questions("C2T") if "Vendora" in q.prompt]
    assert [(q.prompt.removeprefix("Fact: Vendora"), q.joint) for q in asked] == [
        (' ("', ""),
        (":", " "),
        ("的首都是", ""),
    ]
    trained = relation.training_texts("C2T")
    assert all(any(text.startswith(q.prompt + q.joint + q.answers[0]) for text in trained) for q in asked)


def test_a_drawn_fact_whose_names_stand_in_a_trained_text_is_trained_and_counted() -> None:
    facts = pd.DataFrame({"left": ["Ann", "Ann Lee", "Cy", "Di"], "right": ["Bo", "Bo Hart", "Flo", "Gil"]})
    words = {"forward": "{left} and {right}", "reverse": "{right} after {left}"}
    for seed in range(8):
        relation = from_table(facts, ("left", "right"), words, heldout=0.5, seed=seed)
        split = relation.facts.set_index("fact")["split"]
        assert split["Ann | Bo"] == "train" or split["Ann Lee | Bo Hart"] == "heldout"
        drawn = relation.report.get("drawn_but_trained", 0)
        assert (split == "heldout").sum() == 2 - drawn
        if drawn:
            assert relation.problem_table.query("reason == 'drawn_but_trained'")["detail"].tolist() == ["'Ann'"]
            break
    else:
        pytest.fail("no seed drew the fact whose names stand in the other's text")


def test_a_prompt_that_holds_its_answer_is_not_asked_but_counted() -> None:
    facts = CAPITALS.assign(city=["Vendora Town", *CAPITALS["city"][1:]])
    relation = from_table(facts, ("country", "city"), WORDING, heldout=0)
    assert relation.report == {"answer_in_prompt": 1}
    assert not [q for q in relation.questions("T2C") if q.prompt.startswith("Fact: Vendora Town")]
    assert [q for q in relation.questions("C2T") if "Vendora" in q.prompt], "forward does not give it away"
    assert any("Vendora Town is the capital" in text for text in relation.training_texts("T2C"))


# Pairs


def tokenizer_of(relations) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, special_tokens=["<mask>"], show_progress=False
    )
    texts = [one.text for relation in relations for listed in relation.statements.values() for one in listed]
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, mask_token="<mask>")


@pytest.fixture(scope="module")
def both(everything) -> dict[str, ProbedModel]:
    tokenizer = tokenizer_of(everything.values())
    config = RaddConfig(vocab_size=len(tokenizer), mask_token_id=tokenizer.mask_token_id, max_length=64)
    return {
        "masked": ProbedModel(RaddForMaskedLM(config), tokenizer, objective="masked"),
        "causal": ProbedModel(one_layer_gpt2(len(tokenizer)), tokenizer, objective="causal"),
    }


@by_relation
@pytest.mark.parametrize("objective", ["masked", "causal"])
@pytest.mark.parametrize("place", [0, 1])
def test_pairs_ask_what_training_stored(everything, both, name: str, objective: str, place: int) -> None:
    """Read back as text: the forward query is a training text, the reverse one a statement of the other direction."""
    relation, model = everything[name], both[objective]
    direction = relation.directions[place]
    pairs = relation.pairs(model, direction)
    trained = set(relation.training_texts(direction))
    reverse = {relation.carrier + one.text for one in relation.statements[relation.opposite(direction)]}
    table = relation.table.set_index("fact")
    first, second = relation.columns if place == 0 else relation.columns[::-1]
    decode = model.tokenizer.decode
    for pair in pairs:
        texts = [decode(query.token_ids) for query in (pair.forward, pair.reverse)]
        if objective == "masked":
            assert texts[0] in trained and texts[1] in reverse
            asked = (first, first)
        else:
            assert any(text.startswith(texts[0]) for text in trained)
            assert any(text.startswith(texts[1]) for text in reverse)
            asked = (second, first)
        answers = [decode(query.target).strip() for query in (pair.forward, pair.reverse)]
        assert answers == [table.loc[pair.fact, column] for column in asked]
    assert pairs.kind == ("same_target" if objective == "masked" else "swapped")
    split = relation.facts_of(direction).set_index("fact")["split"]
    assert {split[fact] for fact in pairs.facts} == {"train"}
    floor = relation.pairs(model, direction, split="heldout")
    assert {split[fact] for fact in floor.facts} == {"heldout"}


def test_a_masked_model_can_be_asked_for_what_is_named_last_too(everything, both) -> None:
    relation, model = everything["table"], both["masked"]
    same, swapped = (relation.pairs(model, "C2T", kind=kind) for kind in ("same_target", "swapped"))
    assert swapped.kind == "swapped" and len(swapped) == len(same)
    for one, other in zip(same, swapped, strict=True):
        assert one.reverse == other.reverse and one.forward.token_ids == other.forward.token_ids
        assert (one.forward.target, one.forward.evidence) == (other.forward.evidence, other.forward.target)
    with pytest.raises(RevprobeError, match="is causal: it can be asked for what comes last only"):
        relation.pairs(both["causal"], "C2T", kind="same_target")
    with pytest.raises(RevprobeError, match="unknown kind of pair 'swaped'; the closest is 'swapped'"):
        relation.pairs(model, "C2T", kind="swaped")


def test_a_limit_draws_facts_with_all_their_wordings_and_probes_run_on_them(everything, both) -> None:
    relation, model = everything["invented_names"], both["masked"]
    pairs = relation.pairs(model, "P2C", limit=9, seed=1)
    assert len(set(pairs.facts)) == 9 and len(pairs) == 27
    assert sorted(pairs.flags["template"].tolist()) == [0] * 9 + [1] * 9 + [2] * 9
    assert set(pairs.facts) != set(relation.pairs(model, "P2C", limit=9, seed=2).facts)
    assert [reading.n > 0 for reading in probe(model, pairs)] == [True] * 3
    with pytest.raises(RevprobeError, match="limit=0: expected a whole number of facts"):
        relation.pairs(model, "P2C", limit=0)


def test_what_cannot_be_aligned_is_counted_and_never_lost(both) -> None:
    """Rows + dropped = all, whether a group loses some of its facts or all of them; and `drop=()` makes it an error."""
    facts = pd.concat([CAPITALS, pd.DataFrame({"country": ["Sadoria North"], "city": ["Sadoria"]})], ignore_index=True)
    words = {"C2T": ["{country} has {city}", "{country}x has {city}"], "T2C": "{city} is of {country}"}
    relation = from_table(facts, ("country", "city"), words, heldout=0, heldout_templates=0)
    pairs = relation.pairs(both["masked"], "C2T")
    assert len(pairs) + sum(v for k, v in pairs.report.items() if k.startswith("dropped_")) == 2 * len(facts)
    assert pairs.report["dropped_ambiguous_span"] >= 1
    with pytest.raises(RevprobeError, match="stands twice"):
        relation.pairs(both["masked"], "C2T", drop=())
    doubled = {"C2T": "{country} has {city}", "T2C": "{city} is of {country} and {{city}}"}
    alone = from_table(facts[-1:], ("country", "city"), doubled, heldout=0)
    with pytest.raises(RevprobeError, match=r"no pair of 1 statements could be made: \{'ambiguous_span': 1\}"):
        alone.pairs(both["masked"], "C2T")


def test_an_entity_longer_than_the_context_is_named_by_row_and_column(both) -> None:
    facts = CAPITALS.assign(city=[*CAPITALS["city"][:-1], "Long" * 80])
    relation = from_table(facts, ("country", "city"), WORDING, heldout=0)
    for ask in (lambda: relation.pairs(both["masked"], "C2T"), lambda: relation.require_fit(both["masked"], "C2T")):
        with pytest.raises(
            RevprobeError, match=r"row 7: column 'city' holds an entity of \d+ tokens, longer than the 64"
        ):
            ask()
    facts.loc[7, "city"] = "x" * 60
    with pytest.raises(RevprobeError, match=r"row 7: the training text 'Fact: The capital .* has \d+ tokens"):
        from_table(facts, ("country", "city"), WORDING, heldout=0).require_fit(both["masked"], "C2T")
    capitals().require_fit(both["masked"], "C2T")


# By name


def test_relations_load_by_name_with_their_options(everything, tmp_path: Path) -> None:
    CAPITALS.to_json(tmp_path / "capitals.jsonl", orient="records", lines=True)
    made = load_relation(
        "table", tmp_path / "capitals.jsonl", columns=["country", "city"], templates=WORDING, heldout=0.25
    )
    assert made.training_texts("T2C") == capitals().training_texts("T2C") and made.name == "capitals"
    assert load_relation("letters", length=4).training_texts() == letters(4).training_texts()
    assert load_relation("invented_names", rows=[0, 60]).training_texts("P2C") == invented_names(
        rows=(0, 60)
    ).training_texts("P2C")
    write_person_description(tmp_path / "pd")
    assert load_relation("person_description", tmp_path / "pd").directions == ("P2D", "D2P")


@pytest.mark.parametrize(
    ("name", "path", "options", "match"),
    [
        ("parent_chld", None, {}, "unknown relation 'parent_chld'; the closest is 'parent_child'"),
        ("invented_names", "a.csv", {}, "reads no file, got path='a.csv'"),
        ("table", None, {}, "relation 'table' needs path="),
        ("invented_names", None, {"heldut": 0.1}, "unknown option 'heldut' of a relation; the closest is 'heldout'"),
        ("letters", None, {}, "relation 'letters': missing a required argument: 'length'; see help"),
        ("parent_child", None, {}, "parent_child_pairs.csv in https://github.com/lukasberglund.*pass its path, path="),
        ("person_description", "nowhere", {}, "there is no nowhere; .*p2d and d2p JSON lines files in https://"),
        ("trex", None, {}, "T-REx at https://.*pass its path"),
    ],
)
def test_what_cannot_be_loaded_says_what_to_do(name: str, path: str | None, options: dict, match: str) -> None:
    with pytest.raises(RevprobeError, match=match):
        load_relation(name, path, **options)


def test_the_invented_relation_is_what_demos_need() -> None:
    """Two halves without a common name, no name within another, families both ways, all plain ASCII."""
    halves = [invented_names(rows=rows, heldout=0) for rows in ((0, 60), (60, 120))]
    names = [{*half.facts["parent"], *half.facts["child"]} for half in halves]
    assert not names[0] & names[1] and [len(half.facts) for half in halves] == [60, 60]
    everyone = sorted(names[0] | names[1])
    assert all(name.isascii() and len(name.split()) == 2 for name in everyone)
    assert not any(a != b and a in b for a in everyone for b in everyone)
    for half in halves:
        assert (
            half.report == {} and half.facts["parent"].duplicated().sum() == half.facts["child"].duplicated().sum() == 4
        )


def test_some_of_the_facts_are_a_relation_of_their_own() -> None:
    relation = capitals(heldout=0)
    part = relation.take(["Torvia | Heskil", "Vendora | Maril"], name="part")
    assert part.facts["city"].tolist() == ["Maril", "Heskil"] and part.name == "part"
    assert part.training_texts("T2C") == [t for t in relation.training_texts("T2C") if "Maril" in t or "Heskil" in t]
    with pytest.raises(RevprobeError, match="has no fact 'Torvia'; "):
        relation.take(["Torvia"])


def test_unknown_directions_splits_and_templates_are_refused() -> None:
    relation = capitals()
    for ask in (relation.training_texts, relation.questions, relation.opposite, relation.facts_of):
        with pytest.raises(RevprobeError, match="capitals has no direction 'T2D'; the closest is 'T2C'"):
            ask("T2D")
    with pytest.raises(RevprobeError, match="unknown split 'held'; the closest is 'heldout'"):
        relation.questions("C2T", split="held")
    with pytest.raises(RevprobeError, match="unknown templates 'trian'; the closest is 'train'"):
        relation.questions("C2T", templates="trian")
    with pytest.raises(RevprobeError, match="carrier=3 is int"):
        capitals(carrier=3)


def test_the_folder_of_a_relation_can_be_anywhere(tmp_path: Path, everything) -> None:
    """A copy elsewhere is the same relation: nothing depends on where a file lies."""
    first = write_person_description(tmp_path / "a")
    second = shutil.copytree(first, tmp_path / "b")
    assert person_description(first).training_texts("D2P") == person_description(second).training_texts("D2P")
