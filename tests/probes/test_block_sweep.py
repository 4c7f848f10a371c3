"""Block size as a dial: the curve, its common pairs and its paired differences, against runs of the bare module."""

import math
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from blocks_alone import chain_alone, gradient_alone, random_pairs, seen_by_hand

import revprobe as rp
from revprobe.models.families.a2d import A2DLlamaConfig, A2DLlamaForMaskedDiffusion
from revprobe.probes.readings.block_sweep import NOT_AT_ALL_SIZES
from revprobe.probes.statistics.estimators import LATER_BLOCK
from tiny import in_blocks, llama, radd


def cosine_alone(model, pair, size):
    left, right = (gradient_alone(model, q, size) for q in (pair.forward, pair.reverse))
    return float(left @ right / left.norm() / right.norm())


@pytest.mark.parametrize("shift", [0, 1])
def test_the_curve_is_that_of_the_pairs_in_sight_at_every_size(shift):
    model, pairs = in_blocks(4, shift=shift), random_pairs(16, length=11)
    sizes = [2, 4, 8, None]
    sweep = rp.block_sweep(model, pairs, sizes=[None, 8, 2, 4])
    assert sweep.sizes == sizes
    seen = {s: [all(seen_by_hand(q, s or 99, shift) for q in (p.forward, p.reverse)) for p in pairs] for s in sizes}
    common = np.all(list(seen.values()), axis=0)
    assert 0 < common.sum() < len(pairs)
    rows = sweep.frame.query("measure == 'gradient_cosine'")
    alone = {}
    for size in sizes:
        row = rows[(rows["part"] == "common") & (rows["size"].isna() if size is None else rows["size"].eq(size))].iloc[
            0
        ]
        alone[size] = [cosine_alone(model, p, size or 99) for p, kept in zip(pairs, common, strict=True) if kept]
        assert row["value"] == pytest.approx(np.mean(alone[size]), abs=1e-5)
        assert (row["n"], row["visible"]) == (common.sum(), sum(seen[size]))
        counts = {LATER_BLOCK: len(pairs) - sum(seen[size]), NOT_AT_ALL_SIZES: sum(seen[size]) - common.sum()}
        for reason, count in counts.items():
            assert (f"{count} {reason}" in row["reason"]) == (count > 0)
    for before, size in pairwise(sizes):
        found = sweep.difference("gradient_cosine", size, before)
        assert found["value"] == pytest.approx(np.mean(alone[size]) - np.mean(alone[before]), abs=1e-5)
        assert found["n"] == common.sum()
    visible = rows[(rows["part"] == "visible") & rows["size"].eq(8)].iloc[0]
    expected = [cosine_alone(model, p, 8) for p, kept in zip(pairs, seen[8], strict=True) if kept]
    assert visible["value"] == pytest.approx(np.mean(expected), abs=1e-5)


def test_a_probability_asks_for_its_own_direction_alone():
    """A reverse query in sight at size 1 counts, though its forward query is not."""
    model, pairs = in_blocks(4), rp.letter_pairs(5, model=in_blocks(None), placements="mirror", alphabet=6)
    sweep = rp.block_sweep(model, pairs, sizes=[1, 4, None], only=["probability", "gradient"])
    reverse = sweep.frame.query("measure == 'reverse_probability' and part == 'common'")
    assert (reverse["n"] == len(pairs)).all() and (reverse["visible"] == len(pairs)).all()
    for row in reverse.itertuples():
        size = 99 if pd.isna(row.size) else row.size
        expected = np.mean([math.exp(chain_alone(model, p.reverse, size)) for p in pairs])
        assert row.value == pytest.approx(expected, rel=1e-4)
    forward = sweep.frame.query("measure == 'forward_probability' and part == 'common'").set_index("size")
    assert forward.loc[1, "visible"] == 0 and math.isnan(forward.loc[1, "value"]), "the evidence stands behind"
    assert forward.loc[1, "reason"] == f"{len(pairs)} {LATER_BLOCK}"
    # Sizes that show no pair at all take none from the others.
    assert forward.loc[4, "n"] == forward.loc[4, "visible"] > 0
    cosine = sweep.frame.query("measure == 'gradient_cosine' and part == 'difference'").set_index("size")
    assert math.isnan(cosine.loc[4, "value"]) and not math.isnan(cosine[cosine.index.isna()]["value"].iloc[0])


def test_size_1_is_the_causal_parent_and_whole_is_the_model_itself():
    """The same weights as a causal Llama, read one row later: swapped pairs, which a causal model sees."""
    parent = llama()
    config = A2DLlamaConfig(**parent.module.config.to_diff_dict(), mask_token_id=53)
    child = A2DLlamaForMaskedDiffusion(config).eval()
    child.load_state_dict(parent.module.state_dict())
    told = {"objective": "masked", "mask_token_id": 53, "begin_token_id": 54}
    whole = rp.ProbedModel(child, rp.letter_tokenizer(), block_size="whole", logit_shift=1, **told)
    pairs = rp.letter_pairs(6, model=parent)
    sweep = rp.block_sweep(whole, pairs, sizes=[1, None])
    for mine, theirs in ((sweep.readings[1], rp.probe(parent, pairs)), (sweep.readings[None], rp.probe(whole, pairs))):
        for one, other in zip(mine, theirs, strict=True):
            assert one.name == other.name and one.value == pytest.approx(other.value, abs=2e-5), one.name


@pytest.mark.parametrize("shift", [0, 1])
def test_sizes_by_default_are_powers_of_two_to_the_longest_query_then_whole(shift):
    model = in_blocks(None, shift=shift)
    sweep = rp.block_sweep(
        model, rp.letter_pairs(6, model=model, placements="mirror", alphabet=4), only=["probability"]
    )
    assert sweep.sizes == [1, 2, 4, None]
    own = rp.probe_reverse_probability(model, rp.letter_pairs(6, model=model, placements="mirror", alphabet=4))
    assert sweep.readings[None][0].value == pytest.approx(own.value, rel=1e-5)


def test_a_sweep_is_shown_drawn_and_saved(tmp_path):
    model = in_blocks(4)
    pairs = rp.letter_pairs(6, model=model, placements="mirror", alphabet=8)
    sweep = rp.block_sweep(model, pairs, sizes=[1, 2, 4, None])
    assert repr(sweep).startswith("BlockSweep(1, 2, 4, whole):") and LATER_BLOCK in repr(sweep)
    assert "<table" in sweep._repr_html_()
    figure = sweep.plot(theme="dark")
    lines = [trace for trace in figure.data if trace.mode == "lines+markers" and not trace.name.startswith("control")]
    assert len(lines) == 4
    cosines = sweep.frame.query("measure == 'gradient_cosine' and part == 'common'")["value"].to_numpy()
    drawn = np.array(next(t for t in lines if t.name == "gradient cosine").y, dtype=float)
    np.testing.assert_array_equal(drawn, cosines)
    back = rp.BlockSweep.load(sweep.save(tmp_path / "sweep"))
    pd.testing.assert_frame_equal(back.frame, sweep.frame)
    assert back.sizes == sweep.sizes and repr(back) == repr(sweep)
    sweep.save(tmp_path / "sweep")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "kept.txt").write_text("mine")
    with pytest.raises(rp.RevprobeError, match="which would be lost"):
        sweep.save(tmp_path / "other")
    with pytest.raises(rp.RevprobeError, match="no block sweep at"):
        rp.BlockSweep.load(tmp_path / "other")


def test_a_size_without_neighbours_is_drawn_with_its_interval_and_its_control():
    """An area between sizes would have no width there, and a line of one point no length."""
    model = in_blocks(4)
    sweep = rp.block_sweep(model, rp.letter_pairs(6, model=model, alphabet=8), sizes=[1, None])
    rows = sweep.frame.query("measure == 'gradient_cosine' and part == 'common'").iloc[-1]
    by_name = {trace.name: trace for trace in sweep.plot().data}
    for name, number, ends in (
        ("gradient cosine", "value", ("low", "high")),
        ("control of gradient cosine", "control", ("control_low", "control_high")),
    ):
        drawn = by_name[name]
        assert math.isnan(drawn.y[0]) and drawn.y[1] == rows[number] and "markers" in drawn.mode
        assert drawn.y[1] - drawn.error_y.arrayminus[1] == pytest.approx(rows[ends[0]])
        assert drawn.y[1] + drawn.error_y.array[1] == pytest.approx(rows[ends[1]])


def test_labels_of_many_sizes_do_not_run_into_each_other():
    model = in_blocks(4)
    pairs = rp.letter_pairs(12, model=model, placements="mirror", alphabet=26)
    figure = rp.block_sweep(model, pairs, sizes=[*range(1, 13), None], only=["probability"]).plot()
    labels = figure.layout.xaxis.ticktext
    shown = [text for text in labels if text]
    assert len(labels) == 13 and labels[-1].startswith("whole") and figure.layout.xaxis.tickangle == 0
    room = 290 / len(shown)  # pixels for each
    assert 8 * max(len(line) for text in shown for line in text.split("<br>")) < room
    assert figure.layout.width <= 784, "a page of 800 pixels has margins"


@pytest.mark.parametrize("encoding", ["rope", "alibi", "absolute"])
def test_a_one_layer_model_is_swept_too(encoding):
    """RADD has a mask argument of its own; whole is the model as it is, and a probability is its bare module's."""
    model = radd(encoding)
    pairs = rp.letter_pairs(5, model=model, placements="mirror", alphabet=4)
    sweep = rp.block_sweep(model, pairs, sizes=[1, 2, None])
    for reading, own in zip(sweep.readings[None], rp.probe(model, pairs), strict=True):
        assert reading.value == pytest.approx(own.value, rel=1e-5)
    for size in (1, 2):
        for row in sweep.readings[size]["reverse_probability"].frame.query("direction == 'reverse'").itertuples():
            expected = chain_alone(model, pairs[row.pair].reverse, size)
            assert row.log_probability == pytest.approx(expected, abs=1e-5)


def test_what_is_no_size_or_no_masked_model_is_refused_in_one_line():
    model = in_blocks(4)
    pairs = rp.letter_pairs(5, model=model, placements="mirror", alphabet=3)
    for sizes, words in (([], "expected whole numbers"), ([0], "expected whole numbers"), ([2, 2], "size 2 is named")):
        with pytest.raises(rp.RevprobeError, match=words):
            rp.block_sweep(model, pairs, sizes=sizes)
    with pytest.raises(rp.RevprobeError, match="is causal and reads token by token at every size"):
        rp.block_sweep(llama(), pairs)
    with pytest.raises(rp.RevprobeError, match="no size 16 in this sweep; expected two of 2, whole"):
        rp.block_sweep(model, pairs, sizes=[2, None], only=["probability"]).difference("reverse_probability", 16, None)
    with pytest.raises(rp.RevprobeError, match="expected some at each size"):
        rp.BlockSweep({})


def test_the_command_line_takes_sizes_and_writes_the_folder(tmp_path):
    from typer.testing import CliRunner

    from revprobe.cli.main import app

    model = in_blocks(4)
    model.module.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    words = ["block-sweep", str(tmp_path / "model"), "--pairs", "letters:5", "--probes", "probability"]
    untold = CliRunner().invoke(app, words)
    assert untold.exit_code != 0 and "pass block_size=" in str(untold.exception)
    words += ["--load", "block_size=4"]
    done = CliRunner().invoke(app, [*words, "--sizes", "2,whole", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert rp.BlockSweep.load(tmp_path / "out").sizes == [2, None]
    assert (tmp_path / "out" / "block_sweep.html").is_file()
    told = CliRunner().invoke(
        app, [*words, "--sizes", "whole", "--load", "mask_token_id=53", "--load", "dtype=float64"]
    )
    assert told.exit_code == 0, told.output
    wrong = CliRunner().invoke(app, [*words, "--sizes", "2,none"])
    assert wrong.exit_code != 0 and "expected whole numbers and 'whole'" in str(wrong.exception)
    probed = CliRunner().invoke(app, ["probe", *words[1:4], "--load", "block_size=4"])
    assert probed.exit_code == 0, probed.output
    said = " ".join(probed.output.split())
    assert "model (masked, in blocks of 4), letters:5" in said, "which way it was read"
    assert "evidence in a later block" in said, "why pairs have no number"
