"""Readings of several models are told apart, in lines, in lists and on pages; two of one name are refused."""

import re

import pytest

from revprobe import Readings, RevprobeError
from tiny import made_probabilities

ABOUT = {"objective": "masked", "kind": "same_target", "weights": "raw"}


def of(model: str, draw: int, step: int | None = None) -> object:
    return made_probabilities(draw, "abcdefghij", ABOUT | {"model": model, "step": step})


def test_two_models_of_one_name_are_no_line() -> None:
    """A class name is no name: two `LlamaForCausalLM` were a line with two points at one place."""
    with pytest.raises(
        RevprobeError, match=r"of 'LlamaForCausalLM' stands twice: expected one number .* name="
    ) as told:
        Readings([of("LlamaForCausalLM", 0), of("LlamaForCausalLM", 5)]).plot()
    assert "\n" not in str(told.value)
    with pytest.raises(RevprobeError, match="stands twice at step 10"):
        Readings([of("a", 0, 0), of("a", 1, 10), of("a", 2, 10)]).plot()
    names = {one.name for one in Readings([of("a", 0), of("b", 5)]).plot().data if one.meta.get("part") == "value"}
    assert len(names) == 2
    Readings([of("a", 0, 0), of("a", 1, 10), of("b", 2, 10)]).plot()


def test_several_models_are_named_beside_their_numbers() -> None:
    both, one = Readings([of("first", 0), of("second", 5)]), Readings([of("first", 0)])
    page = both._repr_html_()
    rows = re.findall(r"<td>(first|second)</td>", page)
    assert rows.count("first") == rows.count("second") == 4, "every number of each"
    lines = repr(both).splitlines()
    assert lines[1].startswith("  first: Reading(") and lines[2].startswith("  second: Reading(")
    assert "first" not in repr(one).splitlines()[1].partition("Reading(")[0], "one model needs no name"
    assert both.measures().columns.tolist() == one.measures().columns.tolist()
