"""Look-alikes of the published files: the same bytes from one seed, the same formats, and nobody in common."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from revprobe import RevprobeError, TextRelation, look_alike_data, parent_child, person_description, trex
from revprobe.cli.main import app
from revprobe.relations.invented.other_facts import other_statements

PUBLISHED = Path(__file__).parents[3] / "shared" / "data"
DIGEST = "6452eca14015f0af"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return look_alike_data(tmp_path_factory.mktemp("data") / "made")


def digest(folder: Path) -> str:
    found = hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        found.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return found.hexdigest()[:16]


def names(relation: TextRelation) -> set[str]:
    return {name for column in relation.columns for name in relation.table[column]}


def test_a_seed_gives_the_same_bytes_and_another_seed_others(folder: Path, tmp_path: Path) -> None:
    assert digest(folder) == DIGEST
    assert digest(look_alike_data(tmp_path / "again", seed=0)) == DIGEST
    assert digest(look_alike_data(tmp_path / "other", seed=1)) != DIGEST


def test_the_command_writes_the_same_folder_and_spares_other_things(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["data", str(tmp_path / "made")])
    assert done.exit_code == 0 and "parent_child_pairs.csv" in done.output
    assert digest(tmp_path / "made") == DIGEST
    (tmp_path / "made" / "notes.txt").write_text("mine")
    with pytest.raises(RevprobeError, match=r"holds 'notes.txt', which would be lost"):
        look_alike_data(tmp_path / "made")
    assert (tmp_path / "made" / "notes.txt").read_text() == "mine"


def test_parent_child_has_the_published_columns_families_and_numbers(folder: Path) -> None:
    file = folder / "parent_child_pairs.csv"
    assert file.read_bytes().startswith(b"child,parent,parent_type,child_prediction,can_reverse\n")
    relation = parent_child(file)
    assert relation.report == {} and 690 <= len(relation.table) <= 710
    assert set(relation.table["parent_type"]) == {"mother", "father"}
    parents, children = (
        Counter(relation.table["child"].value_counts()),
        Counter(relation.table["parent"].value_counts()),
    )
    assert set(parents) == {1, 2} and parents[2] > 300, "a mother and a father, for most"
    assert set(children) == {1, 2} and 10 < children[2] < 100, "some parents of two"
    assert len({name.split()[0] for name in names(relation)}) > 200
    assert len({name.split()[-1] for name in names(relation)}) > 200
    assert all(2 <= len(name.split()) <= 3 for name in names(relation))


def test_person_description_has_thirty_people_a_set_and_every_inflection(folder: Path) -> None:
    home = folder / "person_description"
    lines = {file.stem: file.read_text(encoding="utf-8").splitlines() for file in home.iterdir()}
    assert {name: len(listed) for name, listed in lines.items()} == {
        f"{group}_{what}": count
        for group in ("p2d", "d2p")
        for what, count in (("prompts_train", 900), ("prompts_test", 300), ("reverse_prompts_test", 300))
    }
    assert all(list(json.loads(line)) == ["prompt", "completion"] for listed in lines.values() for line in listed)
    relation = person_description(home, carrier="")
    assert relation.table["set"].value_counts().to_dict() == {"P2D": 30, "D2P": 30}
    # All are found in full: nothing but an inflection keeps a statement from making a pair.
    assert set(relation.report) == {"description_inflected"}
    assert relation.table["description"].is_unique
    for direction in ("P2D", "D2P"):
        assert len(relation.training_texts(direction)) == 900
        assert len(relation.questions(direction, templates="heldout")) == 300
        assert len(relation.questions(direction, reverse=True)) == 300
        assert len({one.template for one in relation.statements[direction]}) == 40
    starts = Counter(row["completion"].split()[0] for row in map(json.loads, lines["p2d_prompts_train"]))
    assert starts["the"] > 600 and len(starts) > 15, "verbs in their own forms"


def test_trex_documents_hold_triples_in_five_relations_and_pronouns_that_are_skipped(folder: Path) -> None:
    documents = [one for file in sorted((folder / "trex").iterdir()) for one in json.loads(file.read_text())]
    for document in documents:
        for triple in document["triples"]:
            for part in (triple["subject"], triple["object"]):
                assert document["text"][slice(*part["boundaries"])] == part["surfaceform"]
                assert part["uri"].startswith("http://www.wikidata.org/entity/Q9")
    relation = trex(folder / "trex")
    assert relation.table["relation"].value_counts().to_dict() == dict.fromkeys(
        ["P19", "P36", "P57", "P108", "P159"], 40
    )
    assert set(relation.report) == {"skipped_coreference"} and relation.report["skipped_coreference"] > 10
    for direction in ("s2o", "o2s"):
        assert len(relation.questions(direction, split="heldout")) > 10, "the floor"
        assert len(relation.questions(direction, reverse=True)) > 200
    born = trex(folder / "trex", "place of birth")
    assert len(born.table) == 40 and born.table["object"].nunique() < 40, "some were born in one town"
    several = [question for question in born.questions("o2s") if len(question.answers) > 1]
    assert several


def test_look_alikes_have_nobody_in_common_with_each_other(folder: Path) -> None:
    relations = [
        parent_child(folder / "parent_child_pairs.csv"),
        person_description(folder / "person_description"),
        trex(folder / "trex"),
    ]
    found = [name for relation in relations for name in names(relation)]
    assert len(found) == len(set(found))
    for relation in relations:
        others = other_statements(relation, 150, avoid=found)
        assert not {one.text[slice(*s)] for listed in others.values() for one in listed for s in one.spans} & set(found)


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published files are not here")
@pytest.mark.parametrize("seed", range(3))
def test_look_alikes_have_nobody_in_common_with_the_published_files_and_are_as_long(tmp_path: Path, seed: int) -> None:
    made = look_alike_data(tmp_path / "made", seed)
    theirs = person_description(PUBLISHED / "person_description")
    ours = person_description(made / "person_description")
    children = parent_child(PUBLISHED / "parent_child_pairs.csv")
    known = {name.casefold() for name in names(theirs) | names(children)}
    every = names(ours) | names(parent_child(made / "parent_child_pairs.csv")) | names(trex(made / "trex"))
    assert not {name.casefold() for name in every} & known
    for direction in ("P2D", "D2P"):
        shared = set(ours.training_texts(direction)) & set(theirs.training_texts(direction))
        lengths = [sum(map(len, one.training_texts(direction))) / 900 for one in (ours, theirs)]
        assert not shared and 0.85 < lengths[0] / lengths[1] < 1.15
