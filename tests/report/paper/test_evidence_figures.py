"""The figure over training: every panel says how many seeds its lines are of, and the legend what a dial is."""

from xml.etree import ElementTree

import pytest
from made_sweeps import made

from revprobe.report.paper.evidence_figures import reverse_figure


def texts(drawing: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(drawing).iter("{http://www.w3.org/2000/svg}text")]


def test_every_panel_names_model_recipe_and_seeds() -> None:
    found = texts(reverse_figure(*made()))
    models = ("RoPE", "absolute", "causal", "RoPE, switched to")
    titles = {f"{model}, recipe {recipe}, n = 5" for model in models for recipe in "WP"}
    assert titles | {"scalar positions, recipe W, n = 5"} <= set(found)
    assert "not run" not in found and "no such runs" not in found
    assert "drop-right (causal: drop-after): not the placeholders right of the uppercase letter" in found


@pytest.mark.parametrize(("dial", "said"), [("mirror", "n = 5, 5, 0"), ("keep", "n = 0, 5, 5")])
def test_a_dial_without_runs_is_counted_as_none(dial: str, said: str) -> None:
    found = texts(reverse_figure(*made(ran=lambda axes: axes["dial"] != dial)))
    assert f"RoPE, recipe W, {said}" in found


def test_without_any_run_the_panels_say_so() -> None:
    found = texts(reverse_figure(*made(ran=lambda axes: axes["recipe"] == "W")))
    assert found.count("not run") == 4 and "RoPE, recipe P, n = 0" in found
