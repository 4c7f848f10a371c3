"""Every figure says how many pairs its numbers rest on, and of how many facts."""

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import plotly.graph_objects as go
import pytest

import revprobe as rp
from revprobe.probes.figures.theme import samples_text
from revprobe.probes.readings.reading import Reading
from revprobe.probes.readings.readings import Readings
from tiny import FIXTURES, pairs_at, radd

COUNTED = re.compile(r"n = [\d,]+(?: to [\d,]+)? pairs? of (?:[\d,]+ to )?[\d,]+ facts?\b")
MODEL, PAIRS = cache(radd), cache(lambda: pairs_at((1, 5), (5, 1), count=10))


@cache
def taken(name: str) -> Reading:
    """One reading for all of its figures."""
    ask = {"attention": rp.probe_attention_correlation, "gradient": rp.probe_gradient_cosine}
    ask |= {"probability": rp.probe_reverse_probability, "audit": rp.audit_assumptions}
    ask |= {"trace": rp.probe_causal_trace, "denoising": rp.trace_denoising, "once": rp.probe_stored_once}
    more: dict[str, Callable[..., Reading]] = {
        "bounds": lambda model, pairs: rp.with_bounds(taken("attention"), model, pairs),
        "stored": lambda model, pairs: rp.probe_stored_evidence(model, pairs, cross=True),
        "route": lambda model, pairs: rp.probe_route_edit(model, pairs, edit="knockout", scope="head"),
        "lens": lambda model, pairs: rp.probe_logit_lens(model, pairs, contributions=True),
        "adapter": lambda *_: rp.open_run(FIXTURES / "v0_1" / "lora").readings()[2],
    }
    return (ask | more)[name](MODEL(), PAIRS())


DRAWN: list[tuple[str, dict[str, Any]]] = [
    *(("attention", {"kind": kind}) for kind in ("scatter", "heatmap", "heads", "controls")),
    ("bounds", {"kind": "bounds"}),
    *((name, {"kind": kind}) for name in ("gradient", "adapter") for kind in ("intervals", "layers", "controls")),
    ("probability", {}),
    *(("stored", {"kind": kind}) for kind in ("parts", "matrix")),
    *(("route", {"kind": kind}) for kind in ("intervals", "heatmap")),
    *(("lens", {"kind": kind}) for kind in ("layers", "heads")),
    ("trace", {}),
    ("audit", {"kind": "heads"}),
    *(("denoising", {"kind": kind}) for kind in ("steps", "layers", "heads")),
    *(("once", {"number": number}) for number in ("correct", "place")),
]


@pytest.mark.parametrize(
    ("name", "options"), DRAWN, ids=lambda one: one if isinstance(one, str) else "-".join(one.values())
)
def test_a_figure_counts_pairs_and_facts(name: str, options: dict[str, Any]) -> None:
    figure = taken(name).plot(**options)
    assert COUNTED.search(words(figure)), words(figure)


def test_readings_over_steps_count_them_too() -> None:
    figure = Readings([taken("attention"), taken("gradient"), taken("probability")]).plot()
    titles = [one.text for one in figure.layout.annotations if one.yref == "paper" and "<b>" in one.text]
    assert len(titles) == 4 and all(COUNTED.search(title) for title in titles), titles


def words(figure: go.Figure) -> str:
    """All that stands on a figure without a pointer over it."""
    axes = [axis.title.text for axis in (*figure.select_xaxes(), *figure.select_yaxes())]
    said = [figure.layout.title.text, *(one.text for one in figure.layout.annotations), *axes]
    return " | ".join(filter(None, said)).replace("<br>", " ")


@pytest.mark.parametrize(
    ("pairs", "facts", "text"),
    [
        ([2106, 702, float("nan")], [26, 26], "n = 702 to 2,106 pairs of 26 facts"),
        ([1], [1], "n = 1 pair of 1 fact"),
        ([90], [8, 9], "n = 90 pairs of 8 to 9 facts"),
        ([], [], "n = 0 pairs of 0 facts"),
    ],
)
def test_sizes_are_told_from_the_least_to_the_greatest(pairs: list[float], facts: list[float], text: str) -> None:
    assert samples_text(pairs, facts) == text
