"""Correlations by distance count the pairs of any head, as the reading does on the pairs of each cell."""

import numpy as np
import pandas as pd
import pytest

from revprobe.probes.statistics.by_distance import DISTANCES, cell_correlations, unit_correlations


def scores(facts: int, heads: int, seed: int) -> pd.DataFrame:
    """Three groups at two distances; a sixth of the scores is missing, in each head that of other pairs."""
    draw, rows, pair = np.random.default_rng(seed), [], 0
    for group in range(3):
        place = {"distance_forward": group // 2, "distance_reverse": 1 + group // 2}
        place |= {"offset_forward": group, "offset_reverse": -group}
        for fact in range(facts):
            for head in range(heads):
                forward, reverse = draw.normal(size=2)
                if group == 0 and head == 1 and seed % 2:
                    forward = reverse = 1.0  # without variance
                where = {"pair": pair, "fact": str(fact), "group": group, "layer": head // 2, "head": head % 2}
                score = {"score_forward": forward if draw.random() > 1 / 6 else np.nan, "score_reverse": reverse}
                rows.append(where | score | place)
            pair += 1
    return pd.DataFrame(rows)


def pairs_behind(part: pd.DataFrame) -> int:
    """The pairs with a score in some head's group that has a part in the value, one set after the other."""
    large, pooled = set(), {}
    for head, own in part.dropna(subset=["score_forward"]).groupby(["layer", "head"]):
        free = 0
        for _, group in own.groupby("group"):
            varies = group["score_forward"].nunique() > 1 and group["score_reverse"].nunique() > 1
            if group["fact"].nunique() >= 8 and varies:
                large |= {*group["pair"]}
            free += len(group) - 1
            pooled.setdefault(head, set()).update(group["pair"] if varies else [])
        if free < 2:
            pooled.pop(head, None)
    return len(large or set().union(*pooled.values()))


@pytest.mark.parametrize("by", [(), ("layer",), ("layer", "head")])
@pytest.mark.parametrize(("facts", "heads"), [(12, 4), (5, 3), (3, 2), (2, 3)])
def test_a_cell_counts_each_pair_that_some_head_has(facts: int, heads: int, by: tuple[str, ...]) -> None:
    """The most pairs that any one head has are fewer, where each lacks others."""
    more = 0
    for seed in range(6):
        frame = scores(facts, heads, seed)
        units = unit_correlations(frame)
        for row in cell_correlations(units, by).dropna(subset=["value"]).to_dict("records"):
            part = frame
            for column in (*by, *DISTANCES):
                part = part[part[column] == row[column]]
            assert row["n"] == pairs_behind(part)
            of_one_head = part.dropna(subset=["score_forward"]).groupby(["layer", "head"])["pair"].nunique()
            more += row["n"] > of_one_head.max()
    assert more or by == ("layer", "head") or facts < 5, "several heads have more pairs than any one of them"
