"""Many pairs, part by part: the numbers of one call, files that appear one by one, and memory that does not grow."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import revprobe as rp
from revprobe.probes import in_parts
from revprobe.probes.pairs.pair_parts import PairParts
from tiny import gpt2, in_blocks, radd

SAME = ["value", "low", "high", "n", "facts"]


@pytest.fixture(scope="module")
def model() -> rp.ProbedModel:
    return radd()


@pytest.fixture(scope="module")
def pairs(model: rp.ProbedModel) -> rp.ReversalPairs:
    every = rp.letter_pairs(6, model=model, placements="all", alphabet=12).for_probe("probability")
    return every.sample(110)


@pytest.mark.parametrize("size", [9, 50, 10_000])
def test_the_numbers_are_those_of_one_call(
    model: rp.ProbedModel, pairs: rp.ReversalPairs, size: int, tmp_path: Path
) -> None:
    """Of every probe value, interval, n and facts, in parts that cut facts and groups; rows too, but for controls."""
    table = rp.probe_in_parts(model, pairs, tmp_path / "parts", size=size)
    whole = rp.probe(model, pairs)
    expected = pd.concat([reading.measures() for reading in whole], ignore_index=True)
    assert table["measure"].tolist() == expected["measure"].tolist()
    np.testing.assert_allclose(table[SAME].astype(float), expected[SAME].astype(float), rtol=1e-5, atol=1e-7)
    for reading in whole:
        rows = pd.read_parquet(tmp_path / "parts" / reading.name)
        keys = [key for key in ("pair", "direction", "layer", "head", "parameter") if key in rows]
        rows, own = (frame.sort_values(keys, ignore_index=True) for frame in (rows, reading.frame))
        assert len(rows) == len(own) and rows["pair"].nunique() == len(pairs)
        plain = [c for c in own.select_dtypes("float") if not c.endswith("_control")]
        np.testing.assert_allclose(rows[plain], own[plain], rtol=1e-4, atol=1e-6)
        if "group" in own:  # numbered otherwise, but the same groups
            assert rows.groupby("group")["offset_forward"].nunique().eq(1).all()
            assert rows["group"].nunique() == own["group"].nunique()
    # Shuffled scores are those of one call; a derangement within parts is another one, where a part has two facts.
    same = slice(None) if size > len(pairs) else table["measure"] == "attention_correlation"
    controls = ["control", "control_low", "control_high", "excess"]
    np.testing.assert_allclose(table.loc[same, controls].astype(float), expected.loc[same, controls].astype(float))
    assert table["control"].notna().all()


def test_queries_out_of_sight_of_two_parts_are_no_one_prompt(tmp_path: Path) -> None:
    """Each is one with no other; by their places alone, the first of one part was the first of the next."""
    pairs = []
    for i in range(20):
        fact = f"f{i:02}"
        near = rp.Query([45, 20 + i, i], [2], [1]), rp.Query([45, i, 20 + i], [1], [2])
        far = rp.Query([45, 20 + i, 46, 47, 48, i], [5], [1]), rp.Query([45, i, 46, 47, 48, 20 + i], [1], [5])
        pairs += [rp.ReversalPair(*near, fact=fact), rp.ReversalPair(*far, fact=fact)]
    asked = rp.ReversalPairs.from_pairs(pairs)
    only = ("attention", "probability")
    whole = rp.probe(in_blocks(4, scale=0.4), asked, only=only, progress=False).measures()
    table = rp.probe_in_parts(in_blocks(4, scale=0.4), asked, tmp_path / "parts", size=10, only=only, progress=False)
    same = [*SAME, "caution"]
    pd.testing.assert_frame_equal(table[same], whole[same], check_dtype=False, rtol=1e-5)
    assert table["undefined"].max() == 20 and not table["caution"].any()


def test_a_causal_model_and_pairs_in_a_file_are_read_as_they_are_needed(tmp_path: Path) -> None:
    model = gpt2()
    pairs = rp.letter_pairs(5, model=model, alphabet=8).for_probe("gradient")
    file = pairs.save(tmp_path / "pairs.jsonl")
    told: list[tuple[int, int]] = []
    from_file = rp.probe_in_parts(model, file, tmp_path / "a", size=3, progress=lambda *at: told.append(at))
    in_memory = rp.probe_in_parts(model, pairs, tmp_path / "b", size=3)
    pd.testing.assert_frame_equal(from_file, in_memory)
    assert told[-1] == (len(pairs), len(pairs)) and [done for done, _ in told] == sorted(done for done, _ in told)
    parts = list(PairParts(file, 3))
    assert [len(part) for part in parts[:-1]] == [3] * (len(parts) - 1)
    assert [str(fact) for part in parts for fact in part.facts] == [str(fact) for fact in pairs.facts]
    assert parts[0].tokens and parts[0].tokens == {t: pairs.tokens[t] for t in parts[0].tokens}


def test_a_folder_that_was_begun_is_gone_on_with(
    model: rp.ProbedModel, pairs: rp.ReversalPairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended in the third part, it leaves two; the next call probes the others alone and ends with the same numbers."""
    whole = rp.probe_in_parts(model, pairs, tmp_path / "whole", size=20, only=["attention", "probability"])
    calls: list[int] = []

    def ends_at(last: int):
        def probe(model, part, **options):
            calls.append(len(part))
            if len(calls) == last:
                raise KeyboardInterrupt
            return rp.probe(model, part, **options)

        return probe

    begun = {"size": 20, "only": ["attention", "probability"]}
    monkeypatch.setattr(in_parts, "probe", ends_at(3))
    with pytest.raises(KeyboardInterrupt):
        rp.probe_in_parts(model, pairs, tmp_path / "ended", **begun)
    there = {path: path.stat().st_mtime_ns for path in (tmp_path / "ended").rglob("*.parquet")}
    assert len(there) == 4 and not (tmp_path / "ended" / "measures.csv").exists()
    calls.clear()
    monkeypatch.setattr(in_parts, "probe", ends_at(0))
    again = rp.probe_in_parts(model, pairs, tmp_path / "ended", **begun)
    assert len(calls) == -(-len(pairs) // 20) - 2
    assert {path: path.stat().st_mtime_ns for path in there} == there
    pd.testing.assert_frame_equal(again, whole)
    assert (tmp_path / "ended" / "measures.csv").read_text() == (tmp_path / "whole" / "measures.csv").read_text()
    # What a writer that died in a part has left is a part that is not there.
    next(iter(there)).unlink()
    calls.clear()
    pd.testing.assert_frame_equal(rp.probe_in_parts(model, pairs, tmp_path / "ended", **begun), whole)
    assert len(calls) == 1


def test_another_question_is_refused(model: rp.ProbedModel, pairs: rp.ReversalPairs, tmp_path: Path) -> None:
    rp.probe_in_parts(model, pairs, tmp_path / "a", size=40, only=["probability"])
    with pytest.raises(rp.RevprobeError, match=r"of another question \(seed 0, not 1"):
        rp.probe_in_parts(model, pairs, tmp_path / "a", size=40, only=["probability"], seed=1)
    with pytest.raises(rp.RevprobeError, match="was taken on other pairs"):
        rp.probe_in_parts(model, pairs[1:], tmp_path / "a", size=40, only=["probability"])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years")
    with pytest.raises(rp.RevprobeError, match="holds no parts of a probe"):
        rp.probe_in_parts(model, pairs, tmp_path / "other")
    with pytest.raises(rp.RevprobeError, match="two pairs in a part"):
        rp.probe_in_parts(model, pairs, tmp_path / "b", size=1)
    with pytest.raises(rp.RevprobeError, match="no pairs file"):
        rp.probe_in_parts(model, tmp_path / "none.jsonl", tmp_path / "c")
    own = rp.letter_pairs(6, model=model, alphabet=12)
    if own.by_probe:
        with pytest.raises(rp.RevprobeError, match="pairs of their own"):
            rp.probe_in_parts(model, own, tmp_path / "d")
    file = tmp_path / "mixed.jsonl"
    pairs.save(file)
    lines = [line for line in file.read_text().splitlines() if "token_ids" in line][:6]
    file.write_text("\n".join([*lines[:3], *(json.dumps({**json.loads(line), "flags": {}}) for line in lines[3:])]))
    if json.loads(lines[0]).get("flags"):
        with pytest.raises(rp.RevprobeError, match="probe them apart"):
            rp.probe_in_parts(model, file, tmp_path / "e", size=3)


def test_another_model_of_the_same_name_is_refused(tmp_path: Path) -> None:
    """Folders that end alike, modules of one class, another type or step: the first difference is named."""
    pairs = rp.letter_pairs(5, model=gpt2(), alphabet=8).for_probe("gradient")
    for home, scale in (("a", 0.2), ("b", 0.3)):
        gpt2(scale=scale).module.save_pretrained(tmp_path / home / "model")
    asked = {"size": 5, "only": ["probability"]}

    def begin(model: rp.ProbedModel | Path) -> pd.DataFrame:
        return rp.probe_in_parts(model, pairs, tmp_path / "rows", **asked)

    def ended() -> None:
        for path in sorted((tmp_path / "rows").rglob("part-*"))[1:]:
            path.unlink()

    first = begin(tmp_path / "a" / "model")
    ended()
    with pytest.raises(
        rp.RevprobeError, match=r"question \(weights_digest '\w{16}', not '\w{16}'\); choose another fol"
    ):
        begin(tmp_path / "b" / "model")
    half = rp.load_model(tmp_path / "a" / "model", dtype="bfloat16")
    with pytest.raises(rp.RevprobeError, match=r"question \(dtype 'float32', not 'bfloat16'\)"):
        begin(half)
    same = rp.load_model(tmp_path / "a" / "model")
    with pytest.raises(rp.RevprobeError, match=r"question \(step None, not 7\)"):
        begin(same.with_module(same.module, step=7))
    pd.testing.assert_frame_equal(begin(same), first)

    shutil.rmtree(tmp_path / "rows")
    begin(gpt2())
    ended()
    with pytest.raises(rp.RevprobeError, match="weights_digest"):
        begin(gpt2(scale=0.3))
    begin(gpt2())


def test_the_same_weights_in_another_setting_are_another_question(tmp_path: Path) -> None:
    """An adapter's scaling or rotary angles, which no weight tells; and folders that stated none of it."""
    pairs = rp.letter_pairs(5, model=gpt2(), alphabet=8).for_probe("gradient")
    asked = {"size": 5, "only": ["probability"]}
    first, other = gpt2(), gpt2()
    other.module.transformer.h[0].attn.scaling = 0.5
    rp.probe_in_parts(first, pairs, tmp_path / "rows", **asked)
    with pytest.raises(rp.RevprobeError, match=r"question \(settings_digest '\w{16}', not '\w{16}'\)"):
        rp.probe_in_parts(other, pairs, tmp_path / "rows", **asked)
    said = tmp_path / "rows" / "parts.json"
    older = json.loads(said.read_text())
    older.pop("settings_digest")
    said.write_text(json.dumps(older))
    with pytest.raises(rp.RevprobeError, match=r"parts of an older version, which did not state the model's settings"):
        rp.probe_in_parts(first, pairs, tmp_path / "rows", **asked)


def test_rows_beyond_the_last_pair_are_refused(model: rp.ProbedModel, pairs: rp.ReversalPairs, tmp_path: Path) -> None:
    """Or the folder would hold more rows than its numbers are of; more pairs are gone on with."""
    asked = {"size": 10, "only": ["probability"]}
    rp.probe_in_parts(model, pairs[:30], tmp_path / "rows", **asked)
    with pytest.raises(rp.RevprobeError, match=r"part-00002.parquet is not of these pairs, which make 2 parts; .* del"):
        rp.probe_in_parts(model, pairs[:20], tmp_path / "rows", **asked)
    table = rp.probe_in_parts(model, pairs[:50], tmp_path / "rows", **asked)
    assert pd.read_parquet(tmp_path / "rows" / "reverse_probability")["pair"].nunique() == 50
    assert table["n"].max() == 50


@pytest.mark.parametrize("text", ["", "\n", '{"dropped": {}, "tokens": {}}\n'])
def test_a_file_of_no_pairs_is_told_as_by_load(model: rp.ProbedModel, text: str, tmp_path: Path) -> None:
    file = tmp_path / "none.jsonl"
    file.write_text(text)
    with pytest.raises(rp.RevprobeError, match="holds no pairs; expected one JSON object per line") as plain:
        rp.ReversalPairs.load(file)
    with pytest.raises(rp.RevprobeError) as told:
        rp.probe_in_parts(model, file, tmp_path / "rows")
    assert str(told.value) == str(plain.value) and not (tmp_path / "rows").exists()


@pytest.mark.parametrize("kept", [0, 3, 100, -100])
def test_a_part_that_was_cut_off_is_said_to_be_deleted(
    model: rp.ProbedModel, pairs: rp.ReversalPairs, kept: int, tmp_path: Path
) -> None:
    asked = {"size": 10, "only": ["probability"]}
    whole = rp.probe_in_parts(model, pairs[:20], tmp_path / "rows", **asked)
    path = tmp_path / "rows" / "reverse_probability" / "part-00001.parquet"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(rp.RevprobeError, match=r"part-00001.parquet is damaged \(.*\); delete it and run the same"):
        rp.probe_in_parts(model, pairs[:20], tmp_path / "rows", **asked)
    path.unlink()
    pd.testing.assert_frame_equal(rp.probe_in_parts(model, pairs[:20], tmp_path / "rows", **asked), whole)


def test_no_more_than_a_part_of_a_file_is_held(
    model: rp.ProbedModel, pairs: rp.ReversalPairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lines parsed before a part is probed are those of that part and of the ones before it."""
    file, parsed, seen = pairs.save(tmp_path / "pairs.jsonl"), [0], []
    made = rp.ReversalPair.__post_init__

    def counting(self: rp.ReversalPair) -> None:
        parsed[0] += 1
        made(self)

    def probe(model, part, **options):
        seen.append(parsed[0])
        found = rp.probe(model, part, **options)
        parsed[0] = seen[-1]  # a probe makes none that count
        return found

    monkeypatch.setattr(rp.ReversalPair, "__post_init__", counting)
    monkeypatch.setattr(in_parts, "probe", probe)
    rp.probe_in_parts(model, file, tmp_path / "parts", size=10, only=["attention"])
    assert seen == [min(10 * (n + 1), len(pairs)) for n in range(len(seen))]


@pytest.mark.parametrize("control", [True, False])
def test_the_folder_is_one_table_with_the_columns_of_every_part(
    model: rp.ProbedModel, control: bool, tmp_path: Path
) -> None:
    """Pandas takes the columns of the first file: a later part's prompts, targets and reasons were left out."""
    asked = [(i, 20 + i) for i in range(10)] + [(10 + i, 40 + i // 5) for i in range(10)] + [(0, 50), (1, 50)]
    pairs = rp.ReversalPairs.from_pairs(
        rp.ReversalPair(rp.Query([53, k, 51, c, 52], [3], [1]), rp.Query([53, c, 51, k, 52], [1], [3]), fact=f"{c} {k}")
        for c, k in asked
    )
    folder = tmp_path / "parts"
    rp.probe_in_parts(model, pairs, folder, size=10, control=control, progress=False)
    for name in ("attention_correlation", "gradient_cosine", "reverse_probability"):
        files = sorted((folder / name).glob("*.parquet"))
        rows, parts = pd.read_parquet(folder / name), [pd.read_parquet(file) for file in files]
        assert len(files) == 3 and all(set(part.columns) == set(rows.columns) for part in parts)
        assert not rows.isna().any()["shown"] and ("reason_control" in rows) == (control and name[0] != "a")
        apart = rows[rows["pair"] < 10]
        assert (apart["shown"] == apart["fact"]).all() and (apart["reason"] == "").all()
        of_one = rows[rows["pair"].between(10, 14)]
        assert set(of_one["shown"]) == set(of_one["shown_forward"]) == {"10 40"}
        assert rp.Reading.load(files[0]).prompts == 0
    counts = rows.groupby(rows["pair"] // 10)["targets"].max().tolist()
    assert counts == [1, 5, 2]


def test_facts_that_controls_ask_about_for_many_are_drawn_in_parts_too(model: rp.ProbedModel, tmp_path: Path) -> None:
    """16 facts with one target, 4 with another; the second part has facts of a target each, and names no partner."""
    target = [0] * 16 + [1] * 4 + list(range(2, 22))
    pairs = rp.ReversalPairs.from_pairs(
        rp.ReversalPair(
            rp.Query([53, 30 + k % 20, 51, c, 52], [3], [1]),
            rp.Query([53, c, 51, 30 + k % 20, 52], [1], [3]),
            fact=str(k),
        )
        for k, c in enumerate(target)
    )
    parts = tmp_path / "parts"
    table = rp.probe_in_parts(model, pairs, parts, size=20, only=["gradient", "probability"], progress=False)
    firsts = [
        rp.Reading.load(parts / name / "part-00000.parquet") for name in ("gradient_cosine", "reverse_probability")
    ]
    assert all(one.frame["fact_control"].nunique() < 20 for one in firsts)
    alone = rp.probe(model, pairs[:20], only=["gradient", "probability"])
    one = rp.probe_in_parts(
        model, pairs[:20], tmp_path / "one", size=20, only=["gradient", "probability"], progress=False
    )
    expected = pd.concat([reading.measures() for reading in alone], ignore_index=True)
    ends = ["control_low", "control_high", "excess_low", "excess_high"]
    np.testing.assert_allclose(one[ends].astype(float), expected[ends].astype(float), rtol=1e-5, atol=1e-7)
    rows = pd.read_parquet(parts / "reverse_probability")
    assert (rows["fact_control"].notna() == (rows["pair"] < 20)).all()
    assert table["control_low"].notna().all()
