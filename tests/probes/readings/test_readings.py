"""Readings say what they are, split and recombine, and survive the disk whole or not at all."""

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from revprobe import (
    ProbedModel,
    Reading,
    Readings,
    RevprobeError,
    letter_pairs,
    letter_tokenizer,
    probe,
)
from revprobe.probes.statistics.estimators import pair_cosines
from tiny import radd

COLUMNS = {
    "attention_correlation": "pair group layer head offset_forward offset_reverse distance_forward distance_reverse "
    "score_forward score_reverse weight_forward weight_reverse",
    "gradient_cosine": "pair parameter role layer inner norm_forward norm_reverse",
    "reverse_probability": "pair direction probability log_probability rank argmax_match",
}


@pytest.fixture(scope="module")
def model() -> ProbedModel:
    module = radd(n_layers=2, n_heads=2).module
    return ProbedModel(module, letter_tokenizer(), objective="masked", name="tiny", step=500, weights="ema")


@pytest.fixture(scope="module")
def readings(model) -> Readings:
    return probe(model, letter_pairs(5, model=model))


def test_frames_have_the_documented_columns_and_meta_says_where_they_come_from(readings):
    for reading in readings:
        assert set(COLUMNS[reading.name].split()) <= set(reading.frame.columns)
        meta = reading.meta
        assert set(reading.frame.kind) == {"same_target"}
        assert (meta["model"], meta["step"], meta["weights"], meta["kind"]) == ("tiny", 500, "ema", "same_target")
        assert (
            meta["dtype"] == "float32" and meta["versions"]["torch"] and meta["statistic"] and len(meta["pairs"]) == 16
        )


def test_every_number_shows_with_its_interval_n_and_control(readings):
    for reading in readings:
        shown = repr(reading)
        for number in (reading.value, *reading.interval, reading.control.value, reading.excess.value):
            assert f"{number:.4g}" in shown
        assert f"n = {reading.n:,} pairs of {reading.facts} facts" in shown


def test_a_control_over_fewer_pairs_shows_its_own_n(readings):
    """An excess over half the pairs is not value minus control of the whole."""
    whole = readings["reverse_probability"]
    assert "(n = " not in repr(whole)
    rows = (whole.frame["direction"] == "reverse") & (whole.frame["pair"] < 3)
    control = whole.frame["probability_control"].mask(rows)
    part = Reading(whole.name, whole.frame.assign(probability_control=control), whole.meta)
    fewer = f"(n = {whole.n - 3:,} pairs of "
    assert repr(part).count(fewer) == 2 and part.control.n == part.excess.n == whole.n - 3


def test_roles_and_layers_split_the_whole_gradient(readings):
    """Inner products and squared norms over roles add up to those over all parameters, pair by pair."""
    frame = readings["gradient_cosine"].frame
    assert set(frame.role) == {"embed", "q", "k", "v", "o", "mlp", "norm", "unembed"}
    parts = sum(
        pair_cosines(part).cosine
        * np.sqrt(
            part.groupby("pair").norm_forward.apply(lambda n: (n**2).sum())
            * part.groupby("pair").norm_reverse.apply(lambda n: (n**2).sum())
        )
        for _, part in frame.groupby("role")
    )
    whole = frame.groupby("pair").inner.sum()
    np.testing.assert_allclose(parts, whole, rtol=1e-6, atol=1e-12)


def test_summaries_measure_each_part_on_its_own(readings):
    gradient, attention = readings["gradient_cosine"], readings["attention_correlation"]
    by_role = gradient.summary(by="role").set_index("role")
    q_only = Reading("gradient_cosine", gradient.frame[gradient.frame.role == "q"], gradient.meta)
    assert by_role.value["q"] == q_only.value and by_role.low["q"] == q_only.interval[0]
    by_head = attention.summary(by=["layer", "head"])
    assert len(by_head) == 4 and by_head.value.mean() == pytest.approx(attention.value, abs=1e-9)
    by_direction = readings["reverse_probability"].summary(by="direction").set_index("direction")
    frame = readings["reverse_probability"].frame
    assert by_direction.value["forward"] == pytest.approx(frame[frame.direction == "forward"].probability.mean())
    assert by_direction.value["reverse"] == readings["reverse_probability"].value
    with pytest.raises(RevprobeError, match="no column 'rol' in the gradient_cosine frame; the closest is 'role'"):
        gradient.summary(by="rol")


def test_a_part_of_a_probability_is_that_of_its_reverse_queries(readings):
    """Else one column would mean two things: forward in parts that hold forward rows only, reverse elsewhere."""
    reading = readings["reverse_probability"]
    reverse = reading.frame[reading.frame.direction == "reverse"]
    by_rank = reading.summary(by="rank").set_index("rank")
    expected = reverse.groupby("rank").probability.mean()
    assert by_rank.value.dropna().to_dict() == pytest.approx(expected.to_dict())
    assert by_rank.n.sum() == len(reverse)


def test_measures_are_tidy_and_complete(readings):
    table = readings.measures()
    numbers = "value n facts low high control control_low control_high excess excess_low excess_high"
    numbers += " undefined reason caution"
    assert list(table.columns) == ["step", "weights", "kind", "measure", *numbers.split()]
    answers = {f"{side}_{what}" for side in ("forward", "reverse") for what in ("probability", "accuracy")}
    assert set(table.measure) == {"attention_correlation", "gradient_cosine"} | answers
    frame = readings["reverse_probability"].frame
    forward = frame[frame.direction == "forward"]
    assert table.set_index("measure").value["forward_accuracy"] == pytest.approx(forward.argmax_match.mean())


def test_a_reading_comes_back_from_disk_as_it_was(readings, tmp_path):
    for reading in readings:
        again = Reading.load(reading.save(tmp_path / f"{reading.name}.parquet"))
        pd.testing.assert_frame_equal(again.frame, reading.frame, check_dtype=False)
        assert again.meta == json.loads(json.dumps(reading.meta))
        assert again.__dict__["measured"] == reading.measured == Reading(again.name, again.frame, again.meta).measured
        pd.testing.assert_frame_equal(again.measures(), reading.measures())


def test_equal_readings_are_equal_files(model, tmp_path):
    pairs = letter_pairs(4, model=model)
    files = [probe(model, pairs)["gradient_cosine"].save(tmp_path / f"{i}.parquet").read_bytes() for i in range(2)]
    assert files[0] == files[1]


def test_a_step_folder_appears_whole_or_not_at_all(readings, tmp_path, monkeypatch):
    folder = readings.save(tmp_path / "step-000500")
    assert sorted(p.name for p in folder.iterdir()) == [f"{r}.ema.parquet" for r in sorted(COLUMNS)]
    assert Readings.load(tmp_path).steps == [500] and len(Readings.load(folder)) == 3

    def dies(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(pq, "write_table", dies)
    with pytest.raises(OSError, match="disk full"):
        readings.save(tmp_path / "step-000600")
    assert not (tmp_path / "step-000600").exists() and len(Readings.load(tmp_path)) == 3


def test_damaged_and_foreign_files_are_named(readings, tmp_path):
    path = readings[0].save(tmp_path / "a.parquet")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(RevprobeError, match=r"a.parquet is damaged .*delete it and run the same command again"):
        Reading.load(path)
    pq.write_table(pa.table({"x": [1]}), tmp_path / "b.parquet")
    with pytest.raises(RevprobeError, match="parquet but not a reading"):
        Reading.load(tmp_path / "b.parquet")
    with pytest.raises(RevprobeError, match="no reading at"):
        Reading.load(tmp_path / "c.parquet")
    with pytest.raises(RevprobeError, match="no readings at"):
        Readings.load(tmp_path / "nowhere")


def test_a_file_that_is_not_ours_is_never_called_ours(readings, tmp_path):
    """Deleting is advised of what bears our mark alone; a user's own table is no damaged reading."""
    mine = tmp_path / "people.csv"
    mine.write_text("parent,child\nAnn,Bo\n")
    pq.write_table(pa.table({"x": list(range(999))}), tmp_path / "cut.parquet")
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(cut.read_bytes()[:-9])
    for path, words in (
        (mine, "people.csv is no reading of revprobe; expected a parquet"),
        (cut, "if a run of revprobe"),
    ):
        with pytest.raises(RevprobeError, match=words) as raised:
            Reading.load(path)
        assert path == cut or "delete" not in str(raised.value)
    path = readings[0].save(tmp_path / "a.parquet")
    path.write_bytes(path.read_bytes()[:-4] + b"XXXX")
    with pytest.raises(RevprobeError, match=r"a.parquet is damaged \(.*\); delete it and run"):
        Reading.load(path)


def test_no_flipped_byte_passes_for_a_reading(readings, tmp_path):
    """Parquet pages carry checksums and the whole carries a digest: a damaged file is refused or reads as it was."""
    reading = readings["attention_correlation"]
    sound = reading.save(tmp_path / "a.parquet").read_bytes()
    rng, refused = np.random.default_rng(0), 0
    for place in rng.integers(0, len(sound), 60):
        damaged = bytearray(sound)
        damaged[place] ^= 1 << rng.integers(8)
        (tmp_path / "b.parquet").write_bytes(damaged)
        try:
            again = Reading.load(tmp_path / "b.parquet")
        except RevprobeError as error:
            refused += "is damaged" in str(error) or "not a reading" in str(error)
            continue
        pd.testing.assert_frame_equal(again.frame, reading.frame, check_dtype=False)
        assert again.measured == reading.measured
    assert refused > 30


def test_readings_are_chosen_by_name_step_and_weights(readings):
    assert readings.select(name="gradient_cosine")[0] is readings["gradient_cosine"]
    assert len(readings.select(step=-1, weights="ema")) == 3 and len(readings.select(weights="raw")) == 0
    with pytest.raises(
        RevprobeError, match="0 readings named 'gradient_cosin' among 3; the closest is 'gradient_cosine'"
    ):
        readings["gradient_cosin"]


def test_text_from_data_is_escaped_in_the_notebook_view(readings):
    frame = readings[2].frame.assign(fact="<script>alert(1)</script>")
    assert "<script>" not in Reading("reverse_probability", frame, readings[2].meta)._repr_html_()


def test_without_control_none_is_claimed(model):
    for reading in probe(model, letter_pairs(4, model=model), control=False):
        assert (
            reading.control is None
            and reading.excess is None
            and not any("control" in c for c in reading.frame.columns)
        )
        assert reading.measures().control.isna().all()


def test_layers_narrow_attention_and_gradient(model):
    readings = probe(model, letter_pairs(4, model=model), layers=[1])
    assert set(readings["attention_correlation"].frame.layer) == {1}
    assert set(readings["gradient_cosine"].frame.layer) == {1}
    with pytest.raises(RevprobeError, match=r"no layer 7 to read in .*: expected some of 0, 1"):
        probe(model, letter_pairs(4, model=model), layers=[7])
    with pytest.raises(RevprobeError, match=r"layers \[7\] hold none of the parameters"):
        probe(model, letter_pairs(4, model=model), layers=[7], only=["gradient"])
