"""The figure of measured correlations over RoPE's bounds: what is drawn, what is counted, and what is left out."""

from functools import partial

import numpy as np
import pandas as pd
import pytest

import tiny
from revprobe import (
    Reading,
    letter_pairs,
    probe_attention_correlation,
    rope_correlation_bound,
    with_bounds,
)
from revprobe.probes.figures.bounds import MOST_IN_LAYER

radd = partial(tiny.radd, d_model=32)


def test_the_figure_draws_each_heads_bound_and_the_mean_as_lines_of_their_own(tmp_path) -> None:
    """Every drawn number against the frame; also after a round trip through parquet."""
    model = radd(n_heads=2)
    pairs = letter_pairs(5, model=model)
    bounded = with_bounds(probe_attention_correlation(model, pairs), model, pairs)
    bounded = type(bounded).load(bounded.save(tmp_path / "reading.parquet"))
    figure = bounded.plot(kind="bounds")
    traces = {trace.name: trace for trace in figure.data}
    equal = bounded.frame[bounded.frame["bound_reason"] == ""]
    for head in (0, 1):
        rows = equal[equal["head"] == head].groupby("offset_forward")
        assert np.allclose(traces[f"bound, layer 0, head {head}"].y, rows["bound_forward"].mean(), atol=1e-6)
        measured = [part["score_forward"].corr(part["score_reverse"]) for _, part in rows]
        assert np.allclose(traces[f"measured, layer 0, head {head}"].y, measured, atol=1e-6)
        assert list(traces[f"measured, layer 0, head {head}"].x) == [1, 2, 3, 4]
    assert np.allclose(traces["bound, mean over queries"].y, rope_correlation_bound(16, [1, 2, 3, 4]))
    assert len(figure.data) == 5
    one = bounded.plot(kind="bounds", head=1)
    assert one.data[0].name == "measured, layer 0, head 1" and len(one.data) == 3
    assert "interval below the head's bound in" in figure.layout.title.text


def test_without_a_bound_the_figure_says_why() -> None:
    model = radd("alibi")
    pairs = letter_pairs(4, model=model)
    figure = with_bounds(probe_attention_correlation(model, pairs), model, pairs).plot(kind="bounds")
    text = " ".join(note.text for note in figure.layout.annotations)
    assert "queries do not turn with position" in text and not figure.data


@pytest.fixture(scope="module")
def one_head() -> Reading:
    """A bounded reading of one layer and one head, distances 1 to 4; scores are the model's own."""
    model = radd()
    pairs = letter_pairs(5, model=model)
    reading = with_bounds(probe_attention_correlation(model, pairs), model, pairs)
    return altered(reading, reading.frame[reading.frame["bound_reason"] == ""])


def altered(reading: Reading, *frames: pd.DataFrame) -> Reading:
    return Reading(reading.name, pd.concat(frames, ignore_index=True), reading.meta)


def title(reading: Reading, **options) -> str:
    return reading.plot(kind="bounds", **options).layout.title.text


def test_the_title_counts_the_cells_whose_interval_lies_below_the_bound(one_head) -> None:
    """The bound is moved above every r at one distance of four, and below every r at the others."""
    frame = one_head.frame
    height = np.where(frame["offset_forward"] == 2, 1.5, -1.5)
    moved = altered(one_head, frame.assign(bound_forward=height, bound_reverse=height))
    assert "interval below the head's bound in 1 of 4 cells" in title(moved)
    assert "not counted" not in title(moved)


def test_a_bound_that_is_no_one_number_is_drawn_as_a_band_and_not_counted(one_head) -> None:
    """Forward and reverse queries, or facts, that give different bounds; a mean of them would be a made-up line."""
    frame = one_head.frame
    apart = frame["offset_forward"] >= 3
    first = frame["fact"] == frame["fact"].iloc[0]
    forward = pd.Series(np.where(frame["offset_forward"] == 2, 1.5, -1.5), frame.index)
    reverse = forward.where(~apart, forward - 0.2)
    reverse = reverse.where(~(apart & first), forward - 0.6)
    moved = altered(one_head, frame.assign(bound_forward=forward, bound_reverse=reverse))
    figure = moved.plot(kind="bounds")
    text = figure.layout.title.text.replace("<br>", " ")
    assert "interval below the head's bound in 1 of 2 cells" in text
    assert "; 2 not counted, whose queries give bounds that differ by up to 0.60" in text
    traces = {trace.name: trace for trace in figure.data}
    facts = frame["fact"].nunique()
    mean = -1.5 - (0.2 * (facts - 1) + 0.6) / facts / 2
    assert traces["bound, layer 0, head 0"].y == pytest.approx((-1.5, 1.5, mean, mean))
    span = traces["bounds, layer 0, head 0: least to greatest"]
    edges = [y for x, y in zip(span.x, span.y, strict=True) if x == 4]
    assert sorted(edges) == pytest.approx([-2.1, -1.5])
    assert span.fill == "toself" and not span.showlegend
    assert "-2.100 to -1.500" in traces["bound, layer 0, head 0"].hovertext[3]


def test_many_heads_are_drawn_a_layer_at_a_time_and_the_title_says_so(one_head) -> None:
    near = one_head.frame[one_head.frame["offset_forward"] <= 2]
    many = altered(one_head, *(near.assign(layer=layer, head=head) for layer in (3, 4, 9) for head in range(4)))
    assert "layer 3 of 3 drawn; layer= chooses another" in title(many)
    drawn = {trace.name for trace in many.plot(kind="bounds").data if trace.name.startswith("measured")}
    assert drawn == {f"measured, layer 3, head {head}" for head in range(4)}
    chosen = many.plot(kind="bounds", layer=9)
    assert "measured, layer 9, head 0" in {trace.name for trace in chosen.data}
    assert "drawn;" not in chosen.layout.title.text, "nothing is left out of the layer that was asked for"


def test_every_head_of_a_layer_has_a_look_of_its_own_and_what_is_too_many_is_said(one_head) -> None:
    one = one_head.frame[one_head.frame["offset_forward"] == 1]
    heads = altered(one_head, *(one.assign(head=head) for head in range(MOST_IN_LAYER + 2)))
    figure = heads.plot(kind="bounds")
    looks = [(trace.line.color, trace.marker.symbol) for trace in figure.data if trace.name.startswith("measured")]
    assert len(looks) == len(set(looks)) == MOST_IN_LAYER
    assert "#000000" not in {colour for colour, _ in looks}, "black is the line of the mean"
    assert f"heads 0 to {MOST_IN_LAYER - 1} of {MOST_IN_LAYER + 2} drawn; head= chooses another" in (
        figure.layout.title.text
    )


def test_offsets_of_both_signs_are_one_distance(one_head) -> None:
    """Evidence ahead of the forward query in one group and behind it in another: one point, the mean of both r."""
    frame = one_head.frame
    turned = frame.assign(offset_forward=-frame["offset_forward"], offset_reverse=-frame["offset_reverse"])
    turned = turned.assign(group=100 + frame["group"], pair=1000 + frame["pair"])
    turned["score_forward"] = turned["score_forward"] ** 2  # so that the two groups' r differ
    figure = altered(one_head, frame, turned).plot(kind="bounds")
    measured = figure.data[0]
    assert list(measured.x) == [1, 2, 3, 4], "one point at each distance"
    both = [
        [part["score_forward"].corr(part["score_reverse"]) for _, part in rows.groupby("offset_forward")]
        for rows in (frame, turned)
    ]
    assert np.allclose(measured.y, (np.array(both[0]) + np.array(both[1][::-1])) / 2, atol=1e-6)
    assert not np.allclose(both[0], both[1][::-1], atol=1e-3)
