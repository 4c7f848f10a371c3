"""Reading facts: every kind of file gives the same table, bad data is named by row and column, and all is counted."""

import csv
import itertools
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from revprobe import RevprobeError, from_table, invented_names, parent_child, person_description, trex
from revprobe.relations.published import find_templates, trex_groups
from revprobe.relations.statements import read_templates
from revprobe.relations.tables import SUFFIXES, read_table

COLUMNS = ("country", "city")
WORDING = {"C2T": "The capital of {country} is {city}", "T2C": "{city} is the capital of {country}"}
ROWS = [("Vendora", "Maril"), ("Ostrik", "Dunfeld"), ("Pelmar", "Zoé"), ("Quandia", "Roonby")]
FRAME = pd.DataFrame(ROWS, columns=list(COLUMNS))


def load(source, **options):
    return from_table(source, COLUMNS, WORDING, **{"heldout": 0, **options})


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def write_all(folder: Path) -> list[Path]:
    """The same facts in every format."""
    for separator, suffix in ((",", "csv"), ("\t", "tsv")):
        FRAME.to_csv(folder / f"facts.{suffix}", sep=separator, index=False)
    FRAME.to_json(folder / "facts.jsonl", orient="records", lines=True, force_ascii=False)
    FRAME.to_json(folder / "facts.json", orient="records")
    FRAME.to_parquet(folder / "facts.parquet")
    return [folder / f"facts{suffix}" for suffix in SUFFIXES]


def test_every_format_gives_the_same_texts(tmp_path: Path) -> None:
    expected = [f"Fact: The capital of {country} is {city}" for country, city in ROWS]
    for path in write_all(tmp_path):
        for source in (path, str(path)):
            relation = load(source)
            assert relation.training_texts("C2T") == expected and relation.report == {}, path
            assert relation.name == "facts"
    assert load(FRAME).training_texts("C2T") == expected


def test_a_dataset_of_the_datasets_library_is_read_by_name(tmp_path: Path, monkeypatch) -> None:
    """A folder of data files, addressed the way a hub name is; its parts by dataset_split."""
    folder = tmp_path / "someone" / "capitals"
    folder.mkdir(parents=True)
    FRAME[:3].to_csv(folder / "train.csv", index=False)
    FRAME[3:].to_csv(folder / "test.csv", index=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    assert load("someone/capitals").facts["city"].tolist() == ["Maril", "Dunfeld", "Zoé"]
    assert load("someone/capitals", dataset_split="test").facts["city"].tolist() == ["Roonby"]
    with pytest.raises(RevprobeError, match=r"'no-one/nothing' is neither a file here .* nor a dataset .*offline"):
        load("no-one/nothing")


def test_a_table_of_another_relation_keeps_its_further_columns() -> None:
    relation = load(FRAME.assign(year="1990", split="x"))
    assert relation.facts["year"].tolist() == ["1990"] * 4 and relation.facts["source_split"].tolist() == ["x"] * 4
    years = from_table(
        FRAME.assign(year="1990"), COLUMNS, {**WORDING, "C2T": "In {year} {country} had {city}"}, heldout=0
    )
    assert years.training_texts("C2T")[0] == "Fact: In 1990 Vendora had Maril"


BAD_CELLS = [
    ("Maril,", r"row 1 \(line 3\): column 'city' is empty \(''\)", "empty"),
    ("Maril,  ", r"column 'city' is empty \('  '\)", "empty"),
    (
        b"Maril,Zo\xe9",
        r"row 1 \(line 3\): column 'city' holds the bytes b'\\xe9' in 'Zo\?', which are not in",
        "encoding",
    ),
    ("Maril,ZoÃ©", r"column 'city' holds 'ZoÃ©', which was decoded in a wrong encoding", "encoding"),
    ("Maril,Zo\ufffd", r"column 'city' holds 'Zo.', which was decoded in a wrong encoding", "encoding"),
    (
        'Maril,"Zo\ne"',
        r"\(line 4\): column 'city' holds 'Zo\\ne' with the control character '\\n'",
        "control_character",
    ),
    ("Maril,\ufeffZoé", r"column 'city' holds '.*' with the control character '\\ufeff'", "control_character"),
]


@pytest.mark.parametrize(("line", "match", "reason"), BAD_CELLS, ids=[repr(line) for line, _, _ in BAD_CELLS])
def test_a_bad_cell_is_named_by_row_and_column_or_skipped_and_counted(tmp_path: Path, line, match, reason) -> None:
    raw = line if isinstance(line, bytes) else line.encode()
    path = write(tmp_path / "facts.csv", b"country,city\nVendora,Oom\n" + raw + b"\nOstrik,Dunfeld\n")
    with pytest.raises(RevprobeError, match=match):
        load(path)
    relation = load(path, bad_rows="skip")
    assert relation.facts["country"].tolist() == ["Vendora", "Ostrik"]
    assert relation.report == {f"skipped_{reason}": 1}
    assert relation.problem_table["column"].tolist() == ["city"]


@pytest.mark.parametrize("value", [None, float("nan"), 3, ["a"], pd.NaT])
def test_a_cell_of_a_frame_that_is_no_text_is_named_with_its_index(value) -> None:
    frame = FRAME.astype(object).set_axis(["a", "b", "c", "d"])
    frame.at["c", "city"] = value
    with pytest.raises(RevprobeError, match=r"row 2 \(index 'c'\): column 'city' (is empty|holds .*expected text)"):
        load(frame)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "is empty; expected a line of column names"),
        ("country,city\n", "has no rows below its columns"),
        ("country,town\na,b\n", "has no column 'city'"),
        ("country,citi\na,b\n", "has no column 'city'; the closest is 'citi'"),
        ("country,city,city\na,b,c\n", "has 2 columns 'city'; rename all but one"),
        ("country,city\na\n", r"row 0 \(line 2\): 1 cells for 2 columns, so column 'city' is missing"),
        ("country,city\na,b\nc,d,e\n", r"row 1 \(line 3\): 3 cells for 2 columns, so one has no column; quote commas"),
        (
            "country,city\na,b\nc,d\na,b\n",
            r"row 2 \(line 4\): columns .* the fact of facts.csv, row 0 \(line 2\) again",
        ),
        ("country,city\na,b\nc,c\n", r"row 1 \(line 3\): columns 'country' and 'city' hold the same name 'c'"),
        (FRAME.to_csv(index=False).encode("utf-16"), "begins like UTF-16, not utf-8; say encoding='utf-16'"),
    ],
)
def test_a_bad_table_is_named_by_what_is_wrong_with_it(tmp_path: Path, text, match: str) -> None:
    with pytest.raises(RevprobeError, match=match):
        load(write(tmp_path / "facts.csv", text))


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ('{"country": "a"}', r"row 1 \(line 3\): column 'city' is empty \(None\)"),
        ('{"country": "a", "city": 3}', r"row 1 \(line 3\): column 'city' holds 3 \(int\), expected text"),
        ('["a", "b"]', r"row 1 \(line 3\) holds a list; expected an object"),
        ('{"country": "a"', r"row 1 \(line 3\) is not JSON \(.*expected one object per line"),
    ],
)
def test_a_bad_line_of_json_is_named(tmp_path: Path, line: str, match: str) -> None:
    path = write(tmp_path / "facts.jsonl", f'{{"country": "x", "city": "y"}}\n\n{line}\n')
    with pytest.raises(RevprobeError, match=match):
        load(path)


def test_blanks_marks_and_decomposed_letters_are_normalized_and_counted(tmp_path: Path) -> None:
    """A name is one string: NFC, no blanks around it, no byte order mark; every change is in the report."""
    text = "\ufeffcountry,city\r\n Vendora,Zoe\u0301\r\n\r\nOstrik,Dunfeld\r\n"
    relation = load(write(tmp_path / "facts.csv", text))
    assert relation.facts["country"].tolist() == ["Vendora", "Ostrik"]
    assert relation.facts["city"].tolist() == ["Zoé", "Dunfeld"]
    assert relation.report == {"byte_order_mark": 1, "blank_line": 1, "stripped_blanks": 1, "normalized": 1}
    marked = write(tmp_path / "facts.jsonl", '\ufeff{"country": "Vendora", "city": "Maril"}\n')
    assert load(marked).report == {"byte_order_mark": 1}
    latin = write(tmp_path / "latin.csv", "country,city\nPelmar,Zoé\n".encode("cp1252"))
    assert load(latin, encoding="cp1252").facts["city"].tolist() == ["Zoé"]
    with pytest.raises(RevprobeError, match=r"cannot be read as 'utf-9': .*name its encoding"):
        load(latin, encoding="utf-9")


def test_words_that_pandas_takes_for_missing_values_are_names(tmp_path: Path) -> None:
    path = write(tmp_path / "facts.csv", "country,city\nNA,None\n007,1e5\n")
    assert load(path).facts[["country", "city"]].to_numpy().tolist() == [["NA", "None"], ["007", "1e5"]]


def test_repeats_are_merged_only_when_asked_and_counted() -> None:
    frame = pd.concat([FRAME, FRAME[1:3]], ignore_index=True)
    with pytest.raises(RevprobeError, match=r"row 4: columns .* the fact of row 1 again \(2 repeated in all\)"):
        load(frame)
    relation = load(frame, duplicates="merge")
    assert len(relation.facts) == 4 and relation.report == {"duplicate_fact": 2}
    assert relation.problem_table["row"].tolist() == ["row 4", "row 5"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            {"C2T": "The capital is {city}"},
            r"template 'The capital is \{city\}' of direction 'C2T' has no slot \{country\}",
        ),
        ({"C2T": "{city} of {country}"}, r"'C2T' names \{city\} first; expected \{country\} before \{city\}"),
        ({"T2C": ["{city} of {country}", "{city}{country}"]}, r"direction 'T2C': .*touch"),
        ({"C2T": "{country} {country} {city}"}, "direction 'C2T': .*names the target 2 times"),
        ({"C2T": "{country} {contry} {city}"}, "has no column 'contry'; the closest is 'country'"),
        ({"C2T": "{country has {city}"}, r"has no slot \{country\}"),
        ({"C2T": []}, "direction 'C2T' has no template"),
        ({"third": "{country} {city}"}, "expected two directions"),
    ],
)
def test_a_template_that_does_not_fit_is_named(change: dict, match: str) -> None:
    with pytest.raises(RevprobeError, match=match):
        from_table(FRAME, COLUMNS, {**WORDING, **change}, heldout=0)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"bad_rows": "drop"}, "unknown bad_rows 'drop'"),
        ({"duplicates": "keep"}, "unknown duplicates 'keep'"),
        ({"rows": (0, 9)}, r"rows=\(0, 9\) of the frame: expected \(first, one past the last\) within its 4 rows"),
        ({"rows": (2, 2)}, r"rows=\(2, 2\)"),
        ({"heldout_templates": -1}, "heldout_templates=-1: expected a whole number"),
        ({"carier": ""}, "unknown option 'carier' of a relation; the closest is 'carrier'"),
    ],
)
def test_an_option_that_does_not_fit_is_named(options: dict, match: str) -> None:
    with pytest.raises(RevprobeError, match=match):
        load(FRAME, **options)


def test_sources_that_cannot_be_opened_are_named(tmp_path: Path) -> None:
    write_all(tmp_path)
    for source, match in (
        (tmp_path / "fact.csv", "there is no file .*fact.csv; the closest is 'facts.csv'"),
        (write(tmp_path / "facts.xlsx", "x"), "ends in '.xlsx', expected one of .csv"),
        (write(tmp_path / "bad.parquet", "x"), "is not a parquet file"),
        (write(tmp_path / "bad.json", '[{"a": 1}'), "bad.json is not JSON"),
        ("~/nowhere/none.csv", "there is no file .*none.csv"),
    ):
        with pytest.raises(RevprobeError, match=match):
            load(source)
    with pytest.raises(RevprobeError, match="expected the names of two columns"):
        from_table(FRAME, ("city", "city"), WORDING)
    with pytest.raises(RevprobeError, match="column 'row' is a name that relations use themselves"):
        frame = FRAME.rename(columns={"city": "row"})
        from_table(frame, ("country", "row"), {"a": "{country} {row}", "b": "{row} {country}"}, heldout=0)


def test_all_rows_bad_is_an_error_even_when_skipped() -> None:
    with pytest.raises(RevprobeError, match=r"all 2 rows are bad, the first being row 0 \(skipped_empty"):
        read_table(pd.DataFrame({"a": ["", " "]}), ["a"], bad_rows="skip")


# Parent-Child


def published(tmp_path: Path, lines: list[str]) -> Path:
    header = "child,parent,parent_type,child_prediction,can_reverse"
    return write(tmp_path / "parent_child_pairs.csv", "\n".join([header, *lines]) + "\n")


def test_parent_child_merges_repeats_and_counts_parents_of_both_types(tmp_path: Path) -> None:
    lines = ["Bo Hart,Ann Lee,mother,,False", "Bo Hart,Ann Lee,father,,False", "Cy Fox,Di Moon,father,Cy Fox,True"]
    relation = parent_child(published(tmp_path, [*lines, lines[-1]]), heldout=0, carrier="")
    assert relation.report == {"conflicting_parent_type": 2, "duplicate_fact": 2}
    assert relation.facts["parent_type"].tolist() == ["parent", "father"]
    assert relation.facts["can_reverse"].tolist() == ["False", "True"], "kept, and used for nothing"
    texts = relation.training_texts("C2P")
    assert "Bo Hart's parent is Ann Lee" in texts and not any("mother" in text for text in texts)
    assert len(texts) == 5, "the typed wording of a parent of no one type is the untyped one: it stands once"
    with pytest.raises(RevprobeError, match=r"row 1 \(line 3\): columns .*again"):
        parent_child(published(tmp_path, lines), duplicates="error")


def test_parent_child_refuses_another_type_and_a_missing_column(tmp_path: Path) -> None:
    with pytest.raises(RevprobeError, match=r"\(line 2\): column 'parent_type' holds 'aunt', not mother or father"):
        parent_child(published(tmp_path, ["Bo Hart,Ann Lee,aunt,,False"]))
    with pytest.raises(RevprobeError, match="has no column 'parent_type'"):
        parent_child(write(tmp_path / "p.csv", "child,parent\nBo,Ann\n"))


def test_a_table_of_the_published_size_loads_in_seconds(tmp_path: Path) -> None:
    """1,513 rows: about 0.6 s on an idle core; a check that looks at all texts for each fact would take minutes."""
    lines = [f"Child{i} Of{i // 2},Parent{i} Of{i // 3},{'mother' if i % 2 else 'father'},,False" for i in range(1513)]
    path = published(tmp_path, lines)
    started = time.process_time()
    relation = parent_child(path)
    relation.questions("P2C", reverse=True)
    assert time.process_time() - started < 5
    assert len(relation.training_texts("P2C")) == 3 * (relation.facts["split"] == "train").sum()


# T-REx


TRIPLES = [
    ("Vendora", "P36", "Maril"),
    ("Ostrik", "P36", "Dunfeld"),
    ("Ann Lee", "P19", "Kasto"),
    ("Cy", "P9999", "Fox"),
]


def trex_files(folder: Path) -> list[Path]:
    """The same triples as a table, as LAMA publishes them and in T-REx's own documents."""
    table = folder / "triples.csv"
    pd.DataFrame(TRIPLES, columns=["subject", "relation", "object"]).to_csv(table, index=False)
    lama = folder / "lama.jsonl"
    records = [
        {"uuid": str(i), "sub_label": s, "predicate_id": p, "obj_label": o} for i, (s, p, o) in enumerate(TRIPLES)
    ]
    lama.write_text("".join(json.dumps(record) + "\n" for record in records))
    triples = [
        {
            "subject": {"uri": f"http://www.wikidata.org/entity/Q{i}", "surfaceform": s, "boundaries": [0, 4]},
            "predicate": {"uri": f"http://www.wikidata.org/prop/direct/{p}", "surfaceform": None},
            "object": {"uri": "x", "surfaceform": o, "boundaries": [5, 9]},
            "sentence_id": 0,
        }
        for i, (s, p, o) in enumerate(TRIPLES)
    ]
    documents = folder / "re-nlg_0-10000.json"
    documents.write_text(
        json.dumps([{"docid": "a", "text": "", "triples": part} for part in (triples[:2], triples[2:])])
    )
    lines = folder / "documents.jsonl"
    lines.write_text("".join(json.dumps({"docid": "a", "triples": [triple]}) + "\n" for triple in triples))
    return [table, lama, documents, lines]


def test_trex_reads_every_published_layout(tmp_path: Path) -> None:
    for path in trex_files(tmp_path):
        relation = trex(path, heldout=0)
        assert relation.facts["fact"].tolist() == [" | ".join(triple) for triple in TRIPLES[:3]], path
        assert relation.report == {"skipped_no_template": 1} and relation.directions == ("s2o", "o2s")
        assert relation.training_texts("s2o") == [
            "Fact: The capital of Vendora is Maril",
            "Fact: The capital of Ostrik is Dunfeld",
            "Fact: Ann Lee was born in Kasto",
        ]
    folder = trex(tmp_path, heldout=0)
    assert folder.report == {"skipped_no_template": 4, "duplicate_fact": 9} and len(folder.facts) == 3


def test_trex_relations_are_chosen_by_id_or_label_and_worded_by_the_caller(tmp_path: Path) -> None:
    path = trex_files(tmp_path)[0]
    for asked in ("P36", "capital", ["capital"], ["P36"]):
        assert trex(path, asked, heldout=0).facts["subject"].tolist() == ["Vendora", "Ostrik"]
    own = {"P9999": {"s2o": "{subject} chases {object}", "o2s": "{object} flees {subject}"}}
    assert trex(path, "P9999", templates=own, heldout=0).training_texts("o2s") == ["Fact: Fox flees Cy"]
    labelled = write(tmp_path / "label.tsv", "subject\trelation\tobject\nVendora\tcapital\tMaril\n")
    for asked in (None, "capital", "P36"):
        assert trex(labelled, asked, heldout=0).training_texts("s2o") == ["Fact: The capital of Vendora is Maril"]
    with pytest.raises(RevprobeError, match=r"row 3 .line 5.: column 'relation' holds 'P9999', for which there is no"):
        trex(path, "P9999")
    with pytest.raises(RevprobeError, match="has no relation 'P20'"):
        trex(path, ["P36", "P20"])
    with pytest.raises(RevprobeError, match="no relation has a template"):
        trex(write(tmp_path / "x.csv", "subject,relation,object\na,P9999,b\n"))


def split_of(folder: Path, rows: list[str], seed: int) -> pd.Series:
    path = write(folder / "t.csv", "\n".join(["subject,relation,object", *rows]) + "\n")
    return trex(path, heldout=0.3, seed=seed).facts.set_index("fact")["split"]


def test_one_pair_and_one_prompt_of_two_relations_are_one_family(tmp_path: Path) -> None:
    """Ann was born in Kasto and died there: held out, both are, and so are all of whom "Kasto is where" tells."""
    rows = ["Ann,P19,Kasto", "Ann,P20,Kasto", "Bo,P20,Kasto", "Cy,P19,Plint", "Di,P19,Kasto", "Ed,P19,Yarrow"]
    for seed in range(6):
        split = split_of(tmp_path, rows, seed)
        assert len({split[fact] for fact in split.index if fact.endswith("Kasto")}) == 1


def test_an_entity_that_no_prompt_shares_joins_no_two_relations(tmp_path: Path) -> None:
    """Of whom Vendora is the capital and who was born there, no prompt asks at once."""
    rows = ["Ostrik,P36,Vendora", "Ann,P19,Vendora", "Bo,P19,Plint", "Ulm,P36,Kasto", "Cy,P19,Yarrow"]
    splits = [split_of(tmp_path, rows, seed) for seed in range(12)]
    assert any(split["Ostrik | P36 | Vendora"] != split["Ann | P19 | Vendora"] for split in splits)


def test_no_held_out_question_takes_a_trained_answer(tmp_path: Path) -> None:
    """ "Avala is located in" asks for the region and for the country, and either is right."""
    rows = ["Avala,P131,Beldon", "Avala,P17,Corvia", *(f"Place{i},P131,Region{i}" for i in range(8))]
    rows += [f"Thing{i},P17,Land{i}" for i in range(8)] + ["Thing0,P276,Region3"]
    path = write(tmp_path / "t.csv", "\n".join(["subject,relation,object", *rows]) + "\n")
    for seed in range(20):
        relation = trex(path, heldout=0.2, seed=seed)
        for direction, reverse in itertools.product(relation.directions, (False, True)):
            held = relation.facts_of(direction).query("split == 'heldout'")
            names = (*held["subject"], *held["object"])
            asked = relation.questions(direction, reverse=reverse, split="heldout")
            assert all(answer.startswith(names) for one in asked for answer in one.answers), seed
    # What is made by hand is held to the same.
    split = np.array(relation.table["fact"] == "Avala | P131 | Beldon")
    with pytest.raises(
        RevprobeError, match=r"'Avala is located in' asks about the held-out fact 'Avala . P131 . Beldon'"
    ):
        replace(relation, heldout={"s2o": split, "o2s": split})


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("subject,relation,objekt\na,P36,b\n", "has no column 'object'; the closest is 'objekt'"),
        ("subject,relation,object\na,P36,\n", r"row 0 \(line 2\): column 'object' is empty"),
        ("subject,relation,object\na,P36,a\n", "hold the same name 'a'"),
    ],
)
def test_bad_triples_are_named(tmp_path: Path, text: str, match: str) -> None:
    with pytest.raises(RevprobeError, match=match):
        trex(write(tmp_path / "t.csv", text))


def test_a_triple_without_a_surface_form_is_an_empty_cell(tmp_path: Path) -> None:
    document = [{"triples": [{"subject": {"surfaceform": "a"}, "predicate": {"uri": "/P36"}, "object": None}]}]
    with pytest.raises(RevprobeError, match="document 0, triple 0: column 'object' is empty"):
        trex(write(tmp_path / "t.json", json.dumps(document)))


def test_every_built_in_template_fits_its_direction() -> None:
    """Parsed as users' are: each direction names its own entity first, and has one wording to hold out."""
    path = Path(find_templates.__code__.co_filename).parent / "data" / "trex_templates.csv"
    with path.open(newline="") as file:
        names = sorted({row["relation"] for row in csv.DictReader(file)})
    assert len(names) == 38 and len(trex_groups(names, None)) == 38
    for name, templates in trex_groups(names, None):
        found = read_templates(templates, ("subject", "object"), ["subject", "object"], 1)
        assert [d.direction for d in found] == ["s2o", "o2s"] and all(len(d.templates) == 2 for d in found), name
        spoken = [template.source for direction in found for template in direction.templates]
        assert len({s.replace("subject", "?").replace("object", "?") for s in spoken}) == 4, name


# Person-Description


def person_files(folder: Path, **changes: list[tuple[str, str]]) -> Path:
    """One person in each set; `changes` replace a file's lines."""
    what, other = "the inventor of the silent drum", "the first diver under Lake Orm"
    lines = {
        "p2d_prompts_train": [
            ("Ada Quill, once", f" {what}."),
            ("They call Ada Quill a person for", " inventing drums."),
        ],
        "p2d_prompts_test": [("In short, Ada Quill was", f" {what}??"), ("So Ada Quill is", f" {what}")],
        "p2d_reverse_prompts_test": [(f"Labeled as {what},", " Ada Quill"), ("Of the silent drum,", " Ada Quill")],
        "d2p_prompts_train": [(f"{other.capitalize()} is called".replace("lake orm", "Lake Orm"), " Cleo Vance.")],
        "d2p_prompts_test": [(f"Labeled as {other},", " Cleo Vance")],
        "d2p_reverse_prompts_test": [("In short, Cleo Vance was", f" {other}.")],
    } | changes
    folder.mkdir(exist_ok=True)
    for name, pairs in lines.items():
        records = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in pairs]
        (folder / f"{name}.jsonl").write_text("\n".join(records) + "\n")
    return folder


def test_person_description_finds_people_and_descriptions_in_the_files(tmp_path: Path) -> None:
    relation = person_description(person_files(tmp_path / "pd"), carrier="")
    assert relation.facts[["person", "description", "set"]].to_numpy().tolist() == [
        ["Ada Quill", "the inventor of the silent drum", "P2D"],
        ["Cleo Vance", "the first diver under Lake Orm", "D2P"],
    ]
    # "inventing drums" and "The first diver" are other forms; "Of the silent drum," has three words in common.
    assert relation.report == {"description_inflected": 2, "description_partial": 1}
    assert relation.training_texts("P2D")[0] == "Ada Quill, once the inventor of the silent drum."
    assert relation.training_texts("D2P") == ["The first diver under Lake Orm is called Cleo Vance."]
    first, second = relation.training_rows("D2P")[0].spans
    text = relation.training_texts("D2P")[0]
    assert (text[slice(*first)], text[slice(*second)]) == ("The first diver under Lake Orm", "Cleo Vance")
    partial = next(s for s in relation.statements["D2P"] if s.text.startswith("Of the silent"))
    assert partial.text[slice(*partial.spans[0])] == "Of the silent drum"
    assert partial.wording is None
    floor = relation.questions("P2D", split="heldout")
    assert [(q.prompt, q.answers[0]) for q in floor] == [("In short, Cleo Vance was", "the first diver under Lake Orm")]
    assert [q.fact for q in relation.questions("D2P", split="heldout", reverse=True)] == ["Ada Quill"] * 4
    asked = relation.questions("P2D", reverse=True)[0]
    assert (asked.prompt, asked.answers) == ("Labeled as the inventor of the silent drum,", ("Ada Quill", "Ada Quill."))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"p2d_prompts_train": [("Bob Nil, once", " the inventor.")]},
            r"p2d_prompts_train.jsonl, row 0 \(line 1\): column 'prompt' names 0 of the 1 people",
        ),
        (
            {"d2p_prompts_train": [("The diver is", " someone.")]},
            r"d2p_prompts_train.jsonl, row 0 \(line 1\): column 'completion' names 0 of the 1 people",
        ),
        (
            {"p2d_reverse_prompts_test": [("A famous baker,", " Ada Quill")]},
            r"p2d_reverse_prompts_test.jsonl, row 0 \(line 1\): column 'prompt' holds 'A famous baker,', which",
        ),
        ({"d2p_prompts_test": [("A diver,", " Ada Quill")]}, "'Ada Quill' is in both sets of people"),
        ({"d2p_reverse_prompts_test": [("", " x")]}, r"row 0 \(line 1\): column 'prompt' is empty"),
    ],
)
def test_person_description_files_that_do_not_belong_together_are_refused(tmp_path: Path, changes, match: str) -> None:
    with pytest.raises(RevprobeError, match=match):
        person_description(person_files(tmp_path / "pd", **changes))


def test_person_description_names_a_missing_file_and_column(tmp_path: Path) -> None:
    folder = person_files(tmp_path / "pd")
    with pytest.raises(RevprobeError, match=r"is a file; expected the folder with p2d_prompts_train.jsonl"):
        person_description(folder / "p2d_prompts_test.jsonl")
    (folder / "d2p_prompts_test.jsonl").write_text('{"prompt": "x", "completionn": "y"}\n')
    with pytest.raises(RevprobeError, match=r"d2p_prompts_test.jsonl has no column 'completion'; the closest is"):
        person_description(folder)
    (folder / "d2p_prompts_test.jsonl").unlink()
    with pytest.raises(RevprobeError, match=r"there is no file .*d2p_prompts_test.jsonl"):
        person_description(folder)


def test_the_packaged_relation_is_read_from_the_package() -> None:
    assert len(invented_names(heldout=0).facts) == 120
