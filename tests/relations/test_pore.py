"""PORE's layout, on small files written as its own are."""

import json
from pathlib import Path

import pytest

from revprobe import RevprobeError, pore
from revprobe.relations.catalog import load_relation

FACTS = [
    ("Orm Shipping", "CEO", "Ada Quill", "company"),
    ("Bell's Mills", "CEO", "Ben O'Tarn", "company"),
    ("The Lathe's CEO is Out", "CEO", "Cy Stone Jr.", "company"),
    ("Vey Press", "CEO", "Di Moor", "company"),  # a blank too many in one file
]


def write(folder: Path, **changes: list[str]) -> Path:
    folder.mkdir()
    sentences = {
        "positive": [f"{first}'s {relation} is {second}." for first, relation, second, _ in FACTS],
        "negative": [f"{second}'s {inverse} is {first}." for first, _, second, inverse in FACTS],
    } | changes
    sentences["negative"] = [one.replace(" is Vey", " is  Vey") for one in sentences["negative"]]
    for direction, listed in sentences.items():
        records = [{"prompt": sentence, "completion": ""} for sentence in listed]
        (folder / f"standard_{direction}_train_dataset.json").write_text(json.dumps(records))
    return folder


def test_both_files_together_tell_the_entities(tmp_path: Path) -> None:
    relation = pore(write(tmp_path / "Company_Ceo"), heldout=0, carrier="")
    assert relation.directions == ("positive", "negative") and relation.report == {}
    assert relation.table[["first", "relation", "second", "inverse"]].to_numpy().tolist() == [
        list(one) for one in FACTS
    ]
    texts = relation.training_texts("positive")
    assert texts[0] == "Orm Shipping's CEO is Ada Quill" and "The CEO of Bell's Mills is Ben O'Tarn" in texts
    assert "Ada Quill's company is Orm Shipping" in relation.training_texts("negative")
    questions = relation.questions("positive", reverse=True, templates="heldout")
    assert next((q.prompt, q.answers[0]) for q in questions) == ("As for Ada Quill, the company is", "Orm Shipping")
    same = load_relation("pore", tmp_path / "Company_Ceo", heldout=0.25)
    assert same.facts["split"].value_counts().to_dict() == {"train": 3, "heldout": 1}


def test_what_does_not_belong_together_is_named(tmp_path: Path) -> None:
    wrong = write(tmp_path / "a", negative=["Ada Quill's company is Vey Press."] * 4)
    with pytest.raises(RevprobeError, match=r"a, row 0: \"Orm Shipping's CEO is Ada Quill\.\" and .* one fact"):
        pore(wrong)
    with pytest.raises(RevprobeError, match=r"its files have {'positive': 4, 'negative': 1} sentences"):
        pore(write(tmp_path / "b", negative=["Ada Quill's company is Orm Shipping."]))
    (wrong / "standard_positive_train_dataset.json").write_text('[{"text": "x"}]')
    with pytest.raises(RevprobeError, match=r"row 0: no text under 'prompt'"):
        pore(wrong)
    with pytest.raises(RevprobeError, match="is a file; expected the folder of one dataset"):
        pore(wrong / "standard_positive_train_dataset.json")
    with pytest.raises(RevprobeError, match=r"pore needs a file that does not come with revprobe: .*lzc-nazarite/PORE"):
        pore()
