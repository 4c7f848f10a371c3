"""Names come out of a file as its dialect has them, or are refused or counted; never changed without a word."""

import json
from pathlib import Path

import pytest

from revprobe import RevprobeError, TextRelation, from_table, trex

WORDING = {"P2C": "{parent}'s child is {child}", "C2P": "{child}'s parent is {parent}"}


def load(folder: Path, name: str, text: str, **options) -> TextRelation:
    (folder / name).write_bytes(text.encode())
    return from_table(folder / name, ("parent", "child"), WORDING, heldout=0, **options)


@pytest.mark.parametrize(
    ("name", "lines", "parent", "report"),
    [
        ("a.tsv", '"Weird Al" Yankovic\tAnn\n', '"Weird Al" Yankovic', {}),
        ("a.tsv", '"Weird ""Al"" Yankovic"\tAnn\n', 'Weird "Al" Yankovic', {}),
        ("a.tsv", '"Weird Al"\tAnn\n', "Weird Al", {"quotes_taken_off": 1}),
        ("a.tsv", '"Al\tAnn\nBo\tCy\n', '"Al', {}),
        ("a.csv", '"Hale, Bo", "Di, Jr."\n', "Hale, Bo", {"blanks_before_quotes": 1}),
        ("a.csv", '"Hale, ""Bo"", Jr.", Di\n', 'Hale, "Bo", Jr.', {"stripped_blanks": 1}),
        ("a.csv", 'Al,"Di, ""Di"""\nB,C\n', "Al", {}),
        ("a.csv", ' "Al", "Di"\nB, "C"\n', "Al", {"blanks_before_quotes": 3}),
        ("a.tsv", 'Al\t "Di"\nB, "b"\tC\n', "Al", {"blanks_before_quotes": 1, "quotes_taken_off": 1}),
        ("a.csv", 'Al, Di\n B,   "C"\n', "Al", {"stripped_blanks": 2, "blanks_before_quotes": 1}),
        ("a.csv", 'Ann "Annie" Lee,Bo\n', 'Ann "Annie" Lee', {}),
        ("a.csv", "AC\\DC,Bo\n", "AC\\DC", {"backslash": 1}),
        ("a.csv", "A" * 300_000 + ",Bo\n", "A" * 300_000, {}),
    ],
)
def test_quotation_marks_stand_as_the_files_dialect_has_them(tmp_path: Path, name, lines, parent, report) -> None:
    """csv.reader alone reads the first as Weird Al Yankovic, and cells above its limit not at all."""
    header = "parent,child\n".replace(",", "\t" if name == "a.tsv" else ",")
    relation = load(tmp_path, name, header + lines)
    assert relation.facts["parent"][0] == parent and relation.report == report


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("a.csv", 'parent,child\nA,B\n"Weird Al" Y,Bo\n', r"row 1 \(line 3\): column 'parent' holds '\"Weird Al\" Y"),
        ("a.csv", 'parent,child\nAnn,"Bob \\"B\\" Hale"\n', r"row 0 \(line 2\): column 'child' holds .*doub"),
        ("a.csv", 'parent,child\nBob \\"B\\" H,Bo\n', r"row 0 \(line 2\): column 'parent' holds .* with the escape"),
        ("a.csv", 'parent,child\n"Cy,Di\n' + "E,F\n" * 60_000, r"row 0 \(line 2\): column 'parent' holds '\"Cy,Di'"),
        ("a.tsv", 'parent\tchild\n"A ""B"""\tC\n"D" E\tF\n', r"row 1 \(line 3\): column 'parent' holds '\"D\" E"),
        ("a.jsonl", '{"parent": "A", "parent": "B", "child": "C"}', r"row 0 \(line 1\) .*'parent' stands twice"),
        ("a.jsonl", '{"parent": "A\\ud83d", "child": "C"}', r"row 0 \(line 1\): column 'parent' .*half of a character"),
    ],
)
def test_what_fits_no_dialect_is_named_by_row_and_column(tmp_path: Path, name: str, text: str, match: str) -> None:
    with pytest.raises(RevprobeError, match=match) as raised:
        load(tmp_path, name, text)
    assert len(str(raised.value)) < 500, "a long cell is shortened"


def test_a_cell_over_several_lines_is_counted(tmp_path: Path) -> None:
    """A stray mark that another one closes lines later has swallowed the rows between."""
    relation = load(tmp_path, "a.csv", 'parent,child,note\nA,B,"x\nC,D,y\nE,F,z"\nG,H,w\n')
    assert relation.report == {"cell_over_lines": 1}


def test_entities_found_by_coreference_are_skipped_and_counted(tmp_path: Path) -> None:
    """ "It" is a novel where an entity linker says so, and a pronoun where coreference does or nobody tells."""

    def triple(subject: str, annotator: str | None, place: str) -> dict:
        found = {"surfaceform": subject, "boundaries": [0, 2], **({"annotator": annotator} if annotator else {})}
        told = {"surfaceform": place, "annotator": "Wikidata_Spotlight_Entity_Linker"}
        return {"subject": found, "predicate": {"uri": "http://www.wikidata.org/prop/direct/P19"}, "object": told}

    triples = [
        triple("He", "Simple_Coreference", "Kasto"),
        triple("She", None, "Plint"),
        triple("It", "Wikidata_Spotlight_Entity_Linker", "Oslo"),
        triple("Ann Lee", None, "Yarrow"),
    ]
    file = tmp_path / "t.json"
    file.write_text(json.dumps([{"triples": triples}]))
    relation = trex(file, heldout=0)
    assert relation.facts["subject"].tolist() == ["It", "Ann Lee"]
    assert relation.report == {"skipped_coreference": 2}
    assert relation.problem_table["detail"].tolist() == ["'He'", "'She'"]
    file.write_text(json.dumps([{"triples": triples[:2]}]))
    with pytest.raises(RevprobeError, match="all 2 triples name an entity by coreference"):
        trex(file)
