"""Person-Description: who is the floor, what is asked in which direction, and what is right as a description."""

import json
from pathlib import Path

import pytest

from revprobe import RevprobeError, TextRelation, invented_names, look_alike_data, person_description
from revprobe.finetune.config.finetuning import FinetunedRelation
from revprobe.probes.decoding.exact_match import normalized
from revprobe.relations.catalog import load_relation

PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "person_description"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return look_alike_data(tmp_path_factory.mktemp("data") / "made") / "person_description"


@pytest.fixture(scope="module", params=["look-alike", "published"])
def people(request: pytest.FixtureRequest, folder: Path) -> Path:
    if request.param == "published" and not PUBLISHED.is_dir():
        pytest.skip("the published files are not here")
    return folder if request.param == "look-alike" else PUBLISHED


def asked(relation: TextRelation, direction: str, split: str) -> list[tuple[int, int]]:
    """Questions and people, forward in held-out wordings and in reverse."""
    forward = relation.questions(direction, split=split, templates="heldout")
    reverse = relation.questions(direction, reverse=True, split=split, templates="heldout")
    return [(len(questions), len({one.fact for one in questions})) for questions in (forward, reverse)]


def test_the_other_sets_people_are_the_floor_unless_a_share_is_held_out(people: Path) -> None:
    relation = person_description(people)
    for direction in relation.directions:
        facts = relation.facts_of(direction)
        assert (facts["set"] == direction).equals(facts["split"] == "train") and len(facts) == 60
        assert len(relation.training_rows(direction)) == 900
        assert asked(relation, direction, "train") == asked(relation, direction, "heldout") == [(300, 30), (300, 30)]


def test_a_share_splits_the_thirty_and_leaves_the_other_set_out(people: Path) -> None:
    whole, relation = person_description(people), person_description(people, heldout=0.2)
    for direction in relation.directions:
        facts = relation.facts_of(direction)
        assert set(facts["set"]) == {direction} and facts["split"].value_counts().to_dict() == {
            "train": 24,
            "heldout": 6,
        }
        held = facts.loc[facts["split"] == "heldout", "person"].tolist()
        texts = relation.training_texts(direction)
        assert len(texts) == 24 * 30 and set(texts) < set(whole.training_texts(direction))
        assert not any(person in text for person in held for text in texts)
        assert asked(relation, direction, "train") == [(240, 24), (240, 24)]
        assert asked(relation, direction, "heldout") == [(60, 6), (60, 6)]
        # Trained facts are asked as they are without a floor of their own.
        for reverse in (False, True):
            both = [{q.prompt: q for q in one.questions(direction, reverse=reverse)} for one in (whole, relation)]
            assert all(both[0][prompt] == question for prompt, question in both[1].items())
        other = next(
            person for person, name in zip(whole.table["person"], whole.table["set"], strict=True) if name != direction
        )
        assert all(other not in q.prompt for s in ("train", "heldout") for q in relation.questions(direction, split=s))
    first, again, second = (person_description(people, heldout=0.2, seed=seed) for seed in (0, 0, 1))
    assert first.facts.equals(again.facts) and not first.facts["split"].equals(second.facts["split"])
    none = person_description(people, heldout=0)
    assert none.facts["split"].value_counts().to_dict() == {"train": 30}
    assert none.training_texts("D2P") == whole.training_texts("D2P")


def test_a_part_of_a_split_relation_keeps_its_sides(folder: Path) -> None:
    relation = person_description(folder, heldout=0.2)
    labels = relation.facts_of("D2P").groupby("split").head(2)["fact"].tolist() + relation.facts["fact"].tolist()[:3]
    part = relation.take(labels)
    assert part.facts_of("D2P")["split"].value_counts().to_dict() == {"train": 2, "heldout": 2}
    assert len(part.facts) == 3 and "2 facts to train on and 1 held out" in repr(part)


def test_a_config_passes_the_floor_on(folder: Path) -> None:
    """What a config says of heldout and seed is what the function of that name is told."""
    said = FinetunedRelation(name="person_description", path=str(folder), heldout=0.2, seed=3)
    relation = load_relation(said.name, said.path, **said.options)
    assert relation.facts.equals(person_description(folder, heldout=0.2, seed=3).facts)
    plain = FinetunedRelation(name="person_description", path=str(folder))
    assert not {"heldout", "seed"} & set(plain.options)
    with pytest.raises(RevprobeError, match=r"heldout=1.5: expected the fraction of facts"):
        person_description(folder, heldout=1.5)


def test_right_is_every_form_that_the_files_have_of_that_persons_description_and_no_others(people: Path) -> None:
    relation = person_description(people, carrier="")
    owner: dict[str, str] = {}
    for fact in relation.table["fact"]:
        for direction in relation.directions:
            accepted = relation.accepted(fact, direction)
            assert len(accepted) == len(set(accepted)) >= 2
            for answer in {normalized(answer) for answer in accepted}:
                assert owner.setdefault(f"{direction} {answer}", fact) == fact, "two people answer to it"
    right = {fact: set(relation.accepted(fact, "P2D")) for fact in relation.table["fact"]}
    for question in relation.questions("P2D", split="train") + relation.questions("P2D", split="heldout"):
        assert set(question.answers) == right[question.fact], "whichever form the prompt wants"
    for one in relation.statements["P2D"]:
        completion = one.text[one.prompt_length :].strip()
        accepted = right[relation.table["fact"][one.fact]]
        forms = {completion, completion.rstrip(".?!' "), completion.rstrip(".?!' \"")}
        assert forms <= accepted, completion


def test_the_exact_strings_of_a_description_and_of_a_person(tmp_path: Path) -> None:
    what = 'the painter of "Nine Moons."'
    lines = {
        "p2d_prompts_train": [("Ada Quill, once", f" {what}."), ("For ages Ada Quill", ' painted "Nine Moons.".')],
        "p2d_prompts_test": [("In short, Ada Quill was", f" {what}??")],
        "p2d_reverse_prompts_test": [(f"Labeled as {what},", " Ada Quill")],
        "d2p_prompts_train": [("The first diver is called", " Cleo Vance, at last.")],
        "d2p_prompts_test": [("Labeled as the first diver,", " Cleo Vance")],
        "d2p_reverse_prompts_test": [("In short, Cleo Vance was", " the first diver.")],
    }  # fmt: skip
    for name, pairs in lines.items():
        records = [json.dumps({"prompt": prompt, "completion": completion}) + "\n" for prompt, completion in pairs]
        (tmp_path / f"{name}.jsonl").write_text("".join(records))
    relation = person_description(tmp_path, heldout=0)
    assert set(relation.accepted("Ada Quill", "P2D")) == {
        *(f'{form} "Nine Moons{end}' for form in ("the painter of", "painted") for end in ('."', '"', "", '.".', '".')),
        'the painter of "Nine Moons."??',
    }
    assert relation.accepted("Ada Quill", "P2D")[0] == 'the painter of "Nine Moons."', "as the first file has it"
    assert relation.accepted("Cleo Vance", "D2P") == ("Cleo Vance", "Cleo Vance, at last.", "Cleo Vance.")
    assert relation.accepted("Cleo Vance", "P2D") == ("the first diver", "the first diver.")


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published files are not here")
def test_a_verb_that_prompts_alone_have_is_right_too() -> None:
    relation = person_description(PUBLISHED)
    right = relation.accepted("Anneliese Worley", "P2D")
    assert 'masterminding the epic heist, "The Theft of the Starry Night."' in right
    assert not any(answer.startswith('"The Theft') for answer in right), "a work alone describes nobody"
    assert "swimming the length of the Amazon River unassisted" in relation.accepted("Oliver Stonebridge", "P2D")


def test_other_relations_list_what_they_accept() -> None:
    relation = invented_names(rows=(0, 12))
    row = relation.table.iloc[0]
    both = relation.table.loc[relation.table["child"] == row["child"], "parent"].tolist()
    assert len(both) == 2 and set(relation.accepted(row["fact"], "C2P")) == set(both)
    with pytest.raises(RevprobeError, match="invented_names has no fact 'nobody'"):
        relation.accepted("nobody", "C2P")
    with pytest.raises(RevprobeError, match="invented_names has no direction 'P2X'"):
        relation.accepted(row["fact"], "P2X")
