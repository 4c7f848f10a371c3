"""Is a fact the same state in both directions? Two closed-form tests on states, and the number they come to.

    map         from states to the targets' unembedding rows, fitted on the forward states of other facts; the right
                target's place among all facts' targets, for facts that the fit has not seen
    classifier  of facts, fitted on their forward states; the right fact's place by their reverse states

Both are ridge regressions, W = argmin |X W - Y|^2 + lambda |W|^2 of states X to rows of the unembedding or to ones and
zeros for the facts. Each direction is centred on its own mean, since an offset that all facts of a direction share says
nothing of one; a reverse state with another fact's evidence on that of the reverse states as they are. Lambda is a
fixed share of the states' mean variance, so nothing is chosen by how well it does.

Shapes below: state, width, out, test (states asked about), candidate, number (rank, place, correct).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import linalg

from .estimators import Measured, reasons, with_control
from .resampling import Facts

MAP, CLASSIFIER = "map", "classifier"
NUMBERS = ("rank", "place", "correct")
FOLDS = 10  # of facts
SHUFFLES = 10
# States that vary by less than this share of their size differ by rounding alone.
_SAME = 1e-9
METHOD = f"fitted to shuffled labels, mean over {SHUFFLES} shuffles"

Places = dict[tuple[str, str], np.ndarray]  # (direction, "own", "control" or "evidence") -> `number test`


@dataclass(frozen=True)
class Questions:
    """Which states are fitted and which are asked about.

    Shapes: `forward`: `test`; `reverse`, `swapped` (the reverse question with another fact's evidence, -1 for none):
    `test`, all places among the states; `fact`, `target` (both counted from 0): `state`. Every fact that is asked
    about in reverse is asked forward.
    """

    forward: np.ndarray
    reverse: np.ndarray
    swapped: np.ndarray
    fact: np.ndarray
    target: np.ndarray

    def asked(self) -> Iterator[tuple[str, str, np.ndarray, np.ndarray]]:
        """What is asked of a fit: direction, kind, places in the table of results, states."""
        there = np.flatnonzero(self.swapped >= 0)
        yield "forward", "own", np.arange(len(self.forward)), self.forward
        yield "reverse", "own", np.arange(len(self.reverse)), self.reverse
        yield "reverse", "evidence", there, self.swapped[there]


def all_alike(states: np.ndarray) -> bool:
    """Whether the states are one and the same, so that nothing can be told from them. Shapes: `state width`."""
    return bool(states.var(0).sum() <= _SAME * np.square(states).sum(1).mean())


def ridge_fit(states: np.ndarray, ridge: float) -> Callable[[np.ndarray], np.ndarray]:
    """What fits a map from states, less their mean, to values, `state out -> width out`; nothing where all are alike.

    Args:
        ridge: lambda, as a share of the mean variance along the directions that so many states can have (times states).
    Shapes: `states`: `state width`.
    """
    if all_alike(states):
        return lambda values: np.zeros((states.shape[1], values.shape[1]))
    states, wide = states - states.mean(0), states.shape[0] <= states.shape[1]
    gram = states @ states.T if wide else states.T @ states
    factor = linalg.cho_factor(gram + ridge * np.trace(gram) / len(gram) * np.eye(len(gram)))

    def fit(values: np.ndarray) -> np.ndarray:
        solved = linalg.cho_solve(factor, values if wide else states.T @ values)
        return np.asarray(states.T @ solved if wide else solved)

    return fit


def places(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Where the right candidate stands among all: `test candidate, test -> number test`.

    Rank (1-based, ties against it), place (share of the others below it, ties half: 0.5 by chance, 1 at the top),
    correct (1 where it is alone at the top); NaN for a test of which some score is not finite.
    """
    own = scores[np.arange(len(scores)), right][:, None]
    above, ties = (scores > own).sum(1), (scores == own).sum(1) - 1
    rank = 1.0 + above + ties
    found = np.stack([rank, 1.0 - (above + 0.5 * ties) / max(scores.shape[1] - 1, 1), (rank == 1).astype(np.float64)])
    return np.where(np.isfinite(scores).all(1), found, np.nan)


def by_map(states: np.ndarray, rows: np.ndarray, asked: Questions, *, ridge: float, seed: int, null: bool) -> Places:
    """The map's places. Shapes: `states`: `state width`, `rows` (of the unembedding, by target): `target out`.

    The control is fitted to the targets of facts drawn at random, and asked for the right ones. Candidates are the
    targets of the direction that is asked.
    """
    draw, fact = np.random.default_rng(seed), asked.fact
    count = int(fact.max()) + 1
    fold = draw.permutation(np.arange(count) % min(FOLDS, count))
    target_of = np.zeros(count, dtype=np.int64)
    target_of[fact[asked.forward]] = asked.target[asked.forward]
    orders = [np.arange(count) for _ in range(1 + SHUFFLES * null)]
    for order in orders[1:]:
        there = np.unique(fact[asked.forward])
        order[there] = draw.permutation(there)
    found = _empty(asked, null)
    for number in range(int(fold.max()) + 1):
        fitted = asked.forward[fold[fact[asked.forward]] != number]
        fit = ridge_fit(states[fitted], ridge)
        for turn, order in enumerate(orders):
            # A fact's own target, where it has several forward; of a drawn fact, its last.
            of = asked.target[fitted] if not turn else target_of[order[fact[fitted]]]
            weights, middle = fit(rows[of] - rows[of].mean(0)), rows[of].mean(0)
            for direction, kind, at, some in asked.asked():
                mine = fold[fact[some]] == number
                if (turn and kind == "evidence") or not mine.any():
                    continue
                others = fitted if direction == "forward" else asked.reverse[fold[fact[asked.reverse]] != number]
                candidates = np.unique(asked.target[asked.forward if direction == "forward" else asked.reverse])
                ends = rows[candidates] - middle
                ends = ends / np.maximum(np.linalg.norm(ends, axis=1, keepdims=True), 1e-30)
                scores = (states[some[mine]] - _middle(states[others])) @ weights @ ends.T
                right = np.searchsorted(candidates, asked.target[some[mine]])
                key = (direction, "control" if turn else kind)
                found[key][:, at[mine]] += places(scores, right) / (len(orders) - 1 if turn else 1)
    return found


def by_classifier(states: np.ndarray, asked: Questions, *, ridge: float, seed: int, null: bool) -> Places:
    """The classifier's places. Shapes: `states`: `state width`.

    Reverse states are asked of what all forward states were fitted to. A forward state is asked of a fit on the other
    half of the forward states of every fact, and is NaN where its fact has but one. The control is fitted to facts
    drawn at random among the states.
    """
    draw, found = np.random.default_rng(seed), _empty(asked, null)
    _, labels = np.unique(asked.fact[asked.forward], return_inverse=True)
    names = asked.fact[asked.forward][np.unique(labels, return_index=True)[1]]
    order = np.argsort(labels, kind="stable")
    half = np.empty(len(labels), dtype=np.int64)
    half[order] = (np.arange(len(labels)) - np.searchsorted(labels[order], labels[order])) % 2
    lone = np.bincount(labels)[labels] < 2
    classes = np.eye(len(names))
    for part in (None, 0, 1):
        kept = np.flatnonzero(half != part) if part is not None else np.arange(len(labels))
        fitted = asked.forward[kept]
        if len(kept) < 2 or (part is not None and lone.all()):
            continue
        fit = ridge_fit(states[fitted], ridge)
        for turn in range(1 + SHUFFLES * null):
            values = classes[draw.permutation(labels[kept]) if turn else labels[kept]]
            weights = fit(values - values.mean(0))
            for direction, kind, at, some in asked.asked():
                if (turn and kind == "evidence") or (direction == "forward") != (part is not None):
                    continue
                mine = half == part if part is not None else np.ones(len(some), dtype=bool)
                middle = _middle(states[fitted if direction == "forward" else asked.reverse])
                scores = (states[some[mine]] - middle) @ weights + values.mean(0)
                right = np.searchsorted(names, asked.fact[some[mine]])
                key = (direction, "control" if turn else kind)
                found[key][:, at[mine]] += places(scores, right) / (SHUFFLES if turn else 1)
    for kind in ("own", *(["control"] if null else [])):
        found["forward", kind][:, lone] = np.nan
    return found


def _middle(states: np.ndarray) -> np.ndarray:
    """The mean state, NaN of none. Shapes: `state width -> width`."""
    return np.asarray(states.mean(0)) if len(states) else np.full(states.shape[1], np.nan)


def _empty(asked: Questions, null: bool) -> Places:
    """Tables to add to; NaN where a reverse question has no other evidence."""
    sizes = {"forward": len(asked.forward), "reverse": len(asked.reverse)}
    kinds = ["own", "control"] if null else ["own"]
    found = {(direction, kind): np.zeros((3, size)) for direction, size in sizes.items() for kind in kinds}
    found["reverse", "evidence"] = np.where(asked.swapped >= 0, np.zeros((3, 1)), np.nan)
    return found


def stored_once(frame: pd.DataFrame, seed: int, control: bool = True) -> Measured:
    """Share of pairs whose held-out target the map puts first by the reverse state, at the deepest layer.

    Of a part without such rows: the classifier's, or the forward direction's.
    """
    test = next(one for one in (MAP, CLASSIFIER) if (frame["test"] == one).any())
    rows = frame[frame["test"] == test]
    rows = rows[rows["direction"] == "reverse"] if (rows["direction"] == "reverse").any() else rows
    deepest = int(rows["layer"].max())
    rows = rows[rows["layer"] == deepest]
    what = "facts named by the classifier" if test == CLASSIFIER else "held-out targets that the map puts first"
    statistic = f"share of {what}, {rows['direction'].iloc[0]} states of layer {deepest}"
    values, facts = rows["correct"].to_numpy(dtype=np.float64), Facts.of_rows(rows)
    null = rows["correct_control"].to_numpy(dtype=np.float64) if "correct_control" in rows else None
    counted = np.zeros(len(rows), dtype=bool)  # undefined with the value itself
    return with_control(values, null, facts, reasons(rows), statistic, binary=True, alone=counted, method=METHOD)
