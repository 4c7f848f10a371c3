"""Numbers on maps can be read on every colour, and axes end where the data does."""

import math
from itertools import pairwise

import pytest
from plotly.colors import find_intermediate_color, hex_to_rgb

from revprobe.probes.figures.theme import CELL_INK, DIVERGING, IN_THE_DARK, MAP_BLUE, reach


def luminance(colour: tuple[float, ...]) -> float:
    """Relative luminance of sRGB (0 to 255), as WCAG 2 defines it."""
    parts = [c / 255 for c in colour]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("dark", [False, True])
def test_the_ink_of_cells_is_legible_on_every_colour_of_a_map(dark: bool) -> None:
    """At least 4.5 to 1, all along the scale, on a light page and on a dark one."""
    look = IN_THE_DARK if dark else {}
    ink = luminance(hex_to_rgb(look.get(CELL_INK, CELL_INK)))
    stops = [look.get(colour, colour) for _, colour in DIVERGING]
    assert look.get(MAP_BLUE, MAP_BLUE) == stops[-1]
    for low, high in pairwise(stops):
        for part in range(21):
            between = find_intermediate_color(hex_to_rgb(low), hex_to_rgb(high), part / 20)
            contrast = (luminance(between) + 0.05) / (ink + 0.05)
            assert contrast >= 4.5, (low, high, part, contrast)


@pytest.mark.parametrize(
    ("numbers", "wanted"),
    [
        ([0.02, 0.31, math.nan], (0.0, 0.4)),
        ([1.0, -0.05], (-0.1, 1.0)),
        ([0.3], (0.0, 0.3)),
        ([0.01], (0.0, 0.2)),
        ([-0.01], (-0.2, 0.0)),
        ([-0.1], (-0.2, 0.0)),
        ([], (0.0, 0.2)),
    ],
)
def test_an_axis_holds_zero_and_all_numbers_and_little_else(numbers: list[float], wanted: tuple[float, float]) -> None:
    low, high = wanted
    air = 0.04 * (high - low)
    assert reach(numbers) == pytest.approx([low - air, high + air])
