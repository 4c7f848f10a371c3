"""The verdicts on the committed runs, once more: plain pandas on the answers, by the text of the rules alone.

Nothing here asks `rules` or `predictions` how to judge; whichever runs have been collected, both must say the same.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from revprobe.report.paper.predictions import judged, overall

Tables = tuple[pd.DataFrame, pd.DataFrame]
# Each dial, the question that it raises, and the one that it leaves.
DIALS = (("drop-right", "reverse", "mirror_reverse"), ("mirror", "mirror_reverse", "reverse"))
# By seed: None where it was not run, NaN where it does not count.
Values = dict[int, float | None]


@pytest.fixture(scope="module")
def tables(root: Path) -> Tables:
    folder = root / "examples" / "results"
    return tuple(pd.read_parquet(folder / f"negative_evidence_{name}.parquet") for name in ("runs", "answers"))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def parts(tables: Tables) -> pd.DataFrame:
    return judged(*tables)


def read(
    tables: Tables, cell: str, question: str, number: Callable[[pd.Series], float], *, column: str = "accuracy"
) -> Values:
    """A number of each seed's answers after half of its training; averaged weights, of a causal model the raw ones."""
    runs, answers = tables
    weights = "raw" if cell.startswith("arm") else "ema"
    found: Values = {}
    for _, run in runs[(runs["cell"] == cell) & (runs["weights"] == weights)].iterrows():
        if run["status"] != "finished":
            found[run["seed"]] = None
            continue
        own = answers[(answers["run"] == run["run"]) & (answers["weights"] == weights) & (answers["extra"] == 0)]
        late = own[own["step"] > run["steps"] / 2].set_index("question")
        gate = late.loc["forward", "accuracy"].mean() >= 0.97
        found[run["seed"]] = number(late.loc[question, column]) if gate else np.nan
    assert found, f"no such cell: {cell}"
    return found


def bounded(values: Values, passes: Callable[[float], bool], misses: Callable[[float], bool]) -> str:
    ran = [value for value in values.values() if value is not None]
    counted = [value for value in ran if not np.isnan(value)]
    if any(misses(value) for value in counted):
        return "fails"
    if not ran or not counted:
        return "gate not met" if ran else "not run"
    return "holds" if len(counted) == len(values) and all(passes(value) for value in counted) else "cannot tell"


def above(values: Values, limit: float) -> str:
    return bounded(values, lambda value: value > limit, lambda value: value < limit - 0.1 - 1e-9)


def below(values: Values, limit: float) -> str:
    return bounded(values, lambda value: value < limit, lambda value: value > limit + 0.1 + 1e-9)


def unchanged(values: Values, keep: Values) -> str:
    """Within 15 points either way by Student's 90 % interval of the differences, paired by seed."""
    apart: Values = {}
    for seed, value in values.items():
        other = keep.get(seed)
        apart[seed] = None if value is None or other is None else value - other
    counted = [value for value in apart.values() if value is not None and not np.isnan(value)]
    low, high = (np.nan, np.nan)
    if len(counted) > 1:
        low, high = stats.t.interval(0.90, len(counted) - 1, loc=np.mean(counted), scale=stats.sem(counted))
    return bounded(apart, lambda _: bool(low >= -0.15 and high <= 0.15), lambda _: bool(low > 0.15 or high < -0.15))


def switched(
    tables: Tables, cell: str, number: Callable[[pd.Series], float], premise: Callable[[float], bool]
) -> Values:
    """A number of the averaged weights' reverse answers in the 1,000 steps after the switch at 5,000."""
    found = read(tables, cell, "reverse", lambda late: 0.0)
    runs, answers = tables
    for _, run in runs[(runs["cell"] == cell) & (runs["weights"] == "ema")].iterrows():
        own = answers[(answers["run"] == run["run"]) & (answers["weights"] == "ema") & (answers["extra"] == 0)]
        curve = own[own["question"] == "reverse"].set_index("step")["accuracy"]
        if found[run["seed"]] == 0.0:
            after = curve[(curve.index > 5000) & (curve.index <= 6000)]
            found[run["seed"]] = number(after) if premise(curve[5000]) else np.nan
    return found


def said(parts: pd.DataFrame, recipe: str, prediction: str, cell: str, claim: str) -> str:
    chosen = parts[(parts["weights"] == "ema") & (parts["recipe"] == recipe) & (parts["prediction"] == prediction)]
    (verdict,) = chosen[(chosen["cell"] == cell) & chosen["claim"].str.startswith(claim)]["verdict"]
    return str(verdict)


@pytest.mark.parametrize(("recipe", "named"), [("W", ""), ("P", "-published")])
def test_what_drop_right_and_mirror_do(tables: Tables, parts: pd.DataFrame, recipe: str, named: str) -> None:
    """Predictions 1 to 3: the lowest reading of what stays, means of what is raised, paired differences of the rest."""
    for encoding, prediction in (("rope", "1"), ("absolute", "2")):
        for length in ("l10", "l20"):
            keep = f"{encoding}-{length}{named}{'-l20' if length == 'l20' else ''}"
            cell = f"{keep}-drop-right"
            stays = above(read(tables, cell, "reverse", min), 0.9)
            assert said(parts, recipe, prediction, cell, "reverse stays") == stays, cell
            for dial, own, other in (
                ("drop-right", "reverse", "mirror_reverse"),
                ("mirror", "mirror_reverse", "reverse"),
            ):
                cell = f"{keep}-{dial}"
                raised = above(read(tables, cell, own, np.mean), 0.9)
                assert said(parts, recipe, "3", cell, f"{dial} raises") == raised, cell
                left = unchanged(read(tables, cell, other, np.mean), read(tables, keep, other, np.mean))
                assert said(parts, recipe, "3", cell, f"{dial} moves") == left, cell


@pytest.mark.parametrize(("recipe", "named"), [("W", ""), ("P", "-published")])
def test_what_switches_do(tables: Tables, parts: pd.DataFrame, recipe: str, named: str) -> None:
    faded, answering = (lambda start: start < 0.5), (lambda start: start >= 0.5)
    cell = f"rope-l10{named}-then-drop-right"
    assert said(parts, recipe, "4", cell, "recovers") == above(switched(tables, cell, max, faded), 0.9)
    cell = f"rope-l10{named}-drop-right-then-keep"
    assert said(parts, recipe, "4", cell, "fades") == below(switched(tables, cell, min, answering), 0.5)
    cell = f"rope-l10{named}-then-mirror"
    assert said(parts, recipe, "4", cell, "does not recover") == below(switched(tables, cell, max, faded), 0.5)


def test_two_masks_the_causal_model_and_scalar_positions(tables: Tables, parts: pd.DataFrame) -> None:
    """Predictions 6 and 7, and the open test's two claims about answers."""
    two = "rope-l10-two-masks"
    assert said(parts, "W", "6", two, "reverse") == below(read(tables, two, "reverse", np.mean), 0.5)
    two = f"{two}-drop-right"
    assert said(parts, "W", "6", two, "reverse") == above(read(tables, two, "reverse", np.mean), 0.9)
    for recipe, named in (("W", ""), ("P", "-published")):
        cell = f"arm-l10{named}-drop-after"
        assert said(parts, recipe, "7", cell, "reverse") == below(read(tables, cell, "reverse", np.mean), 0.005)
    cell = "scalar-l10-long"
    assert said(parts, "W", "open", cell, "fades") == below(read(tables, cell, "reverse", np.mean), 0.5)
    cell = f"{cell}-drop-right"
    assert said(parts, "W", "open", cell, "drop-right beside") == above(read(tables, cell, "reverse", np.mean), 0.9)


@pytest.mark.parametrize("recipe", ["W", "P"])
def test_prediction_0_is_of_every_cell(tables: Tables, parts: pd.DataFrame, recipe: str) -> None:
    """Letters-only, and the placeholder's share of the errors of the second half; a run without errors passes."""
    runs, _ = tables
    found: dict[str, set[str]] = {"masked": set(), "causal": set()}
    for cell, rows in runs[runs["recipe"] == recipe].groupby("cell"):
        letters = read(tables, str(cell), "reverse", np.mean, column="letters_only")
        errors = read(tables, str(cell), "reverse", np.sum, column="errors")
        outvoted = read(tables, str(cell), "reverse", np.sum, column="placeholder_errors")
        share: Values = {}
        for seed, number in errors.items():
            share[seed] = None if number is None else 1.0 if number == 0 else float(outvoted[seed]) / number  # type: ignore[arg-type]
        both = [bounded(one, lambda x: x >= 0.95, lambda x: x < 0.85 - 1e-9) for one in (letters, share)]
        worst = next(word for word in ("fails", "cannot tell", "gate not met", "not run", "holds") if word in both)
        objective = rows["objective"].iloc[0]
        assert said(parts, recipe, f"0 ({objective})", str(cell), "letters-only") == worst, cell
        found[objective].add(worst)
    table = overall(parts)
    whole = table[(table["recipe"] == recipe) & (table["prediction"] == "0")]["verdict"].item()
    every = found["masked"] | found["causal"]
    assert whole == ("fails" if "fails" in every else "holds" if every == {"holds"} else whole)
