"""Other facts: none of the relation's, in its words and wordings, and nothing that the relation would not say."""

import hashlib
import json
import re
from pathlib import Path

import pandas as pd
import pytest

from revprobe import RevprobeError, TextRelation, from_table, invented_names, person_description, trex
from revprobe.relations.catalog import PARENT_CHILD
from revprobe.relations.invented.other_facts import other_statements

PUBLISHED = Path(__file__).parents[3] / "shared" / "data"
# What they make, and the verb; the last has none, as "the top-ranked racer in ..." has none.
ROLES = {"inventor": "invent", "painter": "paint", "explorer": "explor", "recorder": "record", "keeper": ""}
WORKS = ["the silent drum", 'the mural "Nine Moons."', "a bridge of glass", "the floating mill", "an isle of salt"]
# The other set's: no two people make the same.
LESSER = [re.sub(r"^(the|an?) ", r"\g<1> lesser ", work).replace("an lesser", "a lesser") for work in WORKS]


def names(relation: TextRelation) -> set[str]:
    return {name for column in relation.columns for name in relation.table[column]}


def write_people(folder: Path) -> Path:
    """Five people a set: the roles "the painter of" and "the famous X who painted", one of them without a verb."""
    people = {
        "p2d": ["Ada Quill", "Ben Tarn", "Cy Stone", "Di Moor", "Eva Lund"],
        "d2p": ["Flo Gray", "Gus Hale", "Hal Iver", "Ivy Jost", "Jo Karr"],
    }
    folder.mkdir()

    def forms(place: int, group: str) -> dict[str, str]:
        role, verb = list(ROLES.items())[place]
        work = (WORKS if group == "p2d" else LESSER)[place]
        usual = f"the {role} of {work}" if group == "p2d" or not verb else f"the famous {role} who {verb}ed {work}"
        verbs = {"doing": f"{verb}ing {work}", "done": f"{verb}ed {work}"}
        return {"usual": usual} | (verbs if verb else {"doing": f"being {usual}", "done": f"was {usual}"})

    told = {
        "P2D": [("{p}, known far and wide as", "{usual}."), ("They call {p} the one who", "{done}.")],
        "D2P": [("Known as {usual},", "{p} is calm."), ("{Usual} is called", "{p}."), ("Praised for {doing},", "{p}")],
    }
    asked = {
        "P2D": [("In short, {p} was", "{usual}."), ("People praise {p} for", "{doing}."), ("Oh, {p} who", "{done}.")],
        "D2P": [("Labeled as {usual},", "{p}"), ("Famous for {doing},", "{p}")],
    }
    for group, other in (("p2d", "d2p"), ("d2p", "p2d")):
        files = {
            f"{group}_prompts_train": told[group.upper()],
            f"{group}_prompts_test": asked[group.upper()],
            f"{group}_reverse_prompts_test": asked[other.upper()],
        }
        for name, pairs in files.items():
            lines = []
            for place, person in enumerate(people[group]):
                said = forms(place, group)
                said = said | {"p": person, "Usual": said["usual"][0].upper() + said["usual"][1:]}
                lines += [
                    json.dumps({"prompt": prompt.format(**said), "completion": " " + completion.format(**said)})
                    for prompt, completion in pairs
                ]
            (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_other_facts_are_none_of_the_relations_and_say_every_wording() -> None:
    relation = invented_names(rows=(60, 90))
    for mixed in (False, True):
        found = other_statements(relation, 20, mixed=mixed)
        assert list(found) == ["P2C", "C2P"]
        statements = [one for listed in found.values() for one in listed]
        entities = {one.text[slice(*span)] for one in statements for span in one.spans}
        assert len(entities) == 40 and not entities & names(relation)
        words = {word for name in names(relation) for word in name.split()}
        assert {word for name in entities for word in name.split()} <= words
        for direction, listed in found.items():
            assert not {one.text for one in listed} & set(relation.training_texts(direction))
            assert {one.fact for one in listed} == {f"other {number}" for number in range(20)}
            # Four wordings; mixed facts are told of a mother and of a father where {parent_type} stands.
            assert len(listed) == 20 * (4 + mixed * {"P2C": 1, "C2P": 2}[direction])
        for one in statements:
            answer = one.text[one.prompt_length :]
            assert answer.startswith(" ") and answer.strip() == one.text[slice(*one.spans[1])]
    with pytest.raises(RevprobeError, match=r"column 'parent' make \d+ other names, fewer than the 20 wanted"):
        other_statements(relation.take(list(relation.table["fact"])[:1]), 20)
    with pytest.raises(RevprobeError, match="count=0: expected how many"):
        other_statements(relation, 0)


def test_a_fact_is_of_one_kind_and_keeps_its_names_in_both_directions() -> None:
    relation = invented_names()
    found = other_statements(relation, 30, seed=4)
    for number in range(30):
        texts = [one.text for listed in found.values() for one in listed if one.fact == f"other {number}"]
        assert len({word for text in texts for word in ("mother", "father") if f" {word} of " in text}) == 1
        first, second = (
            {tuple(one.text[slice(*span)] for span in one.spans) for one in listed if one.fact == f"other {number}"}
            for listed in found.values()
        )
        assert len(first) == 1 and {pair[::-1] for pair in second} == first


def test_what_tiny_models_were_pretrained_on_stays_what_it_was() -> None:
    """The digest of the statements as they were made when the committed results were."""
    found = other_statements(invented_names(), 300, mixed=True)
    told = "\n".join(f"{one.text}|{one.spans}|{one.fact}|{one.prompt_length}" for d in found for one in found[d])
    assert hashlib.sha256(told.encode()).hexdigest()[:16] == "a452af95555b9684"


def test_triples_keep_their_relation_and_names_of_one_word_are_made_of_two(tmp_path: Path) -> None:
    born = ["Ann Lee,Kasto", "Bo Hart,Plint", "Cy Fox,Yarrow", "Di Moon,Oslo"]
    towns = ["Vendora,Maril", "Ostrik,Dunfeld", "Pelmar,Roonby", "Torvia,Heskil"]
    rows = [(*one.split(","), name) for name, listed in (("P19", born), ("P36", towns)) for one in listed]
    pd.DataFrame(rows, columns=["subject", "object", "relation"]).to_csv(tmp_path / "t.csv", index=False)
    relation = trex(tmp_path / "t.csv", heldout=0)
    found = other_statements(relation, 12)
    born = [one for one in found["s2o"] if " was born in " in one.text]
    capitals = [one for one in found["s2o"] if "capital of" in one.text]
    assert len({one.fact for one in born}) == len({one.fact for one in capitals}) == 6
    firsts = {name.split()[0] for name, *_ in rows[:4]}
    for one in born:
        person, place = (one.text[slice(*span)] for span in one.spans)
        assert person.split()[0] in firsts and len(person.split()) == 2
        assert place not in names(relation)
        starts = ("Ka", "Pli", "Ya", "O")
        assert place.startswith(starts) and place[0].isupper(), place
    assert not {one.text[slice(*s)] for d in found for one in found[d] for s in one.spans} & names(relation)


def require_descriptions(relation: TextRelation, found: dict) -> None:
    """Other people and descriptions, one of each a fact, every sentence in the grammar of the relation's own."""
    people, own = set(relation.table["person"]), set(relation.table["description"])
    assert not any(person in one.text for listed in found.values() for one in listed for person in people)
    described: dict[str, set[str]] = {}
    named: dict[str, set[str]] = {}
    for place, (direction, listed) in enumerate(found.items()):
        seen = {}
        for one in listed:
            spans = [one.text[slice(*span)] for span in one.spans]
            named.setdefault(one.fact, set()).add(spans[place])
            described.setdefault(one.fact, set()).add(spans[1 - place][0].lower() + spans[1 - place][1:])
            seen.setdefault(one.fact, []).append(one)
            end = one.spans[1 - place][1]
            # A title that opens closes, once.
            assert one.text.count('"') % 2 == 0 and not re.search(r'""|\.\.', one.text), one.text
            assert one.text[one.prompt_length] == " " and end <= len(one.text)
        wordings = len({one.template for one in relation.statements[direction]})
        assert {len(of_fact) for of_fact in seen.values()} == {wordings}
    assert all(len(one) == 1 for one in named.values()), "a person a fact"
    assert len(set.union(*named.values())) == len(named)
    usual = [next(form for form in forms if form.startswith("the ")) for forms in described.values()]
    assert len(set(usual)) == len(usual) and not set(usual) & own


def test_descriptions_are_made_of_a_role_and_a_work_and_inflected_as_each_wording_wants(tmp_path: Path) -> None:
    relation = person_description(write_people(tmp_path / "pd"), carrier="")
    found = other_statements(relation, 12)
    require_descriptions(relation, found)
    works = {*WORKS, *LESSER}
    for one in found["P2D"]:
        text = one.text[slice(*one.spans[1])] + ('."' if one.text.count('"') else "")
        work = next(work for work in works if text.endswith(work))
        role = text.removesuffix(work)
        if "known far and wide as" in one.text or "In short" in one.text:
            assert re.fullmatch(r"the (\w+ of|famous \w+ who \w+ed) ", role), one.text
            continue
        lacking = "the keeper of "
        assert role == lacking or re.fullmatch(r"\w+ing " if "praise" in one.text else r"\w+ed ", role), one.text
        instead = " for being " if "praise" in one.text else " who was "
        assert (instead in one.text) == (role == lacking), one.text
        assert one.text[one.prompt_length :].strip().startswith(("being ", "was ") if role == lacking else role)
    assert any(one.text.startswith("The ") for one in found["D2P"])
    with pytest.raises(RevprobeError, match=r"descriptions of person_description make \d+ others, fewer than the 85"):
        other_statements(relation, 85)


@pytest.mark.skipif(not (PUBLISHED / "person_description").is_dir(), reason="the published files are not here")
def test_the_published_descriptions_make_hundreds_of_others() -> None:
    relation = person_description(PUBLISHED / "person_description")
    found = other_statements(relation, 400)
    require_descriptions(relation, found)
    assert len(found["P2D"]) == len(found["D2P"]) == 400 * 40
    assert sum("crafted" in one.text for one in found["P2D"]) > 100


def test_a_table_whose_slots_make_every_fact_a_kind_of_its_own_still_has_other_facts() -> None:
    table = pd.DataFrame(
        {
            "parent": ["Ann Lee", "Bo Hart", "Cy Fox", "Di Moon"],
            "child": ["Ed Park", "Flo Rand", "Gil Stone", "Ida Wall"],
            "parent_type": ["mother", "father", "sire", "dam"],
        }
    )
    relation = from_table(table, ("parent", "child"), PARENT_CHILD, heldout=0)
    found = other_statements(relation, 4)
    assert len(found["P2C"]) == 16 and {
        k for k in ("mother", "father", "sire", "dam") for o in found["P2C"] if f"the {k} of" in o.text
    } == {"mother", "father", "sire", "dam"}
