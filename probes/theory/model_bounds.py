"""What the theory promises for a given model: at given distances, and beside the scores that were measured.

The angles are the model's own, scaled or partial as they are; entries of a head that do not turn count as planes with
angle 0. With yarn's and longrope's `attention_factor`, queries and keys are meant as the score sees them, after it.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from torch import nn

from ...arguments import checked
from ...errors import RevprobeError
from ...hooks.attention import tap_queries
from ...hooks.untouched import untouched
from ...models.probed import ProbedModel, as_probed
from ...models.rotary import (
    OTHER,
    STILL,
    TURNS,
    LayerPositions,
    Rotary,
    grows_with_length,
    layer_positions,
    seen_positions,
)
from ...models.structure import attention_of
from ...progress import Progress, shows_progress
from ..pairs.pairs import ReversalPairs
from ..pairs.query import Query
from ..passes.alone import in_equal_lengths_if_need_be
from ..passes.batches import in_batches, logits_at_rows, make_batch, prepare_queries, queries_per_batch
from ..readings.reading import Reading
from .checks import distance_pairs, number
from .score_correlation import alibi_correlation, mean_bound, rope_asymmetric_bound, rope_query_bound, tail_bound

COLUMNS = ["layer", "heads", "head_dim", "encoding", "base", "scaling", "planes", "turning", "checked", "distance"]
COLUMNS += ["distance_reverse", "bound", "bound_error", "exact", "exact_error", "no_bound", "tau", "tail", "reason"]
PROMISED = ["bound", "bound_error", "exact", "exact_error", "no_bound", "tail"]
BOUNDS = ["bound_forward", "bound_reverse", "bound_mean", "bound_reason"]
SWAPPED = "the bound is about one target asked both ways (kind same_target)"
TOKENS_DIFFER = "the two queries name evidence or target by different tokens"
SEVERAL_TOKENS = "a score averaged over several tokens has no one distance"
UNEQUAL = "the bound needs equal distances on opposite sides"
NOT_TURNED = "queries do not turn with position (ALiBi, other biases or none): no bound by RoPE"
ANGLES_DIFFER = "the two queries turn by different angles, as their lengths differ"
NOT_SEEN = "queries of this layer are not seen (no scaled_dot_product_attention call)"

Turning = dict[int, dict[int, Rotary]]  # layer -> tokens of a query -> how it is turned there


@checked
def model_frequencies(model: ProbedModel | nn.Module, *, length: int | None = None) -> pd.DataFrame:
    """The angle by which one token turns each plane of each layer's queries, and what is known of it.

    Args:
        length: as in `model_theory`; short when None.
    Returns: one row per attention layer and plane: layer, encoding (as in `model_theory`), plane, first, second (the
        entries of a head that form it; NA where that was not made out), frequency (radians per token; 0 for a plane
        that does not turn, NaN where it is not known), base (NaN where the model names none; with scaling the
        frequencies do not follow from it alone), scaling, source (the buffer or setting of the model), checked (found
        in the layer's own queries), reason (why not). A layer's frequencies are what `frequencies=` takes elsewhere.
    Raises: RevprobeError, when no attention can be seen.
    """
    model = as_probed(model)
    frames = []
    for layer, found in seen_positions(model, length=length).items():
        rotary, planes = found.rotary, found.head_dim // 2
        unturned = np.zeros(planes) if found.kind == STILL else np.full(planes, np.nan)
        entries = rotary.entries if rotary and found.kind == TURNS else np.arange(2 * planes).reshape(-1, 2)
        first, second = (pd.array(column, dtype="Int64") for column in entries.T)
        if found.kind == OTHER:
            first[:], second[:] = pd.NA, pd.NA
        columns = {"layer": layer, "encoding": found.kind, "plane": np.arange(planes), "first": first, "second": second}
        columns |= {"frequency": rotary.frequencies if rotary else unturned, "base": rotary.base if rotary else np.nan}
        columns |= {"scaling": rotary.scaling if rotary else "", "source": rotary.source if rotary else ""}
        frames.append(pd.DataFrame(columns | {"checked": found.kind != OTHER, "reason": found.reason}))
    return pd.concat(frames, ignore_index=True)


@checked
def model_theory(
    model: ProbedModel | nn.Module,
    distances: ArrayLike,
    *,
    distance_reverse: ArrayLike | None = None,
    tau: float = 0.1,
    length: int | None = None,
    samples: int = 4_000,
    seed: int = 0,
) -> pd.DataFrame:
    """What the theory promises for this model at given forward and reverse distances.

    Args:
        distances: tokens between readout row and evidence: of the forward query, and of the reverse one too unless
            `distance_reverse` is given, which is broadcast with it.
        tau: threshold of the share of queries.
        length: tokens of the sequence, for scalings whose angles depend on it (dynamic, longrope); the longest distance
            and one more when None.
        samples, seed: random queries of the bound at unequal distances.
    Returns: one row per attention layer and pair of distances: layer, heads, head_dim, encoding ("rope"; "no rotation":
        ALiBi, other biases or none, where the correlation is exactly 1; "other"), base (NaN where the model names
        none), scaling, planes, turning (planes that turn), checked (the angles were found in the layer's own
        queries), distance, distance_reverse, bound (least mean correlation over queries; at unequal distances the mean
        surrogate of `rope_asymmetric_bound`) with bound_error (its standard error; 0 for a closed form), exact (mean
        correlation at the worst alignment) with exact_error, no_bound (share of queries whose surrogate is negative
        and bounds nothing; 0 at equal distances, where it is the correlation), tau, tail (least share of queries at or
        above tau: 1 where the correlation is exactly 1 and tau at most that; NaN where tau is not below the bound or
        the distances differ), reason (why bound is NaN, or what was not checked).
    Raises: RevprobeError, when no attention can be seen, for a negative distance, distances that do not broadcast, a
        tau that is not finite, or fewer than 2 samples for unequal distances.
    Source: paper Thm. 4.3, Prop. 4.5, App. B.2 and B.3.
    """
    model = as_probed(model)
    number("tau", tau, -np.inf)
    pairs = distance_pairs(distances, distances if distance_reverse is None else distance_reverse)
    forward, reverse = (np.atleast_1d(part).ravel() for part in pairs)
    longest = int(max(forward.max(initial=0), reverse.max(initial=0)))
    frames = []
    for layer, found in seen_positions(model, length=longest + 1 if length is None else length).items():
        rotary = found.rotary
        columns = {"layer": layer, "heads": found.heads, "head_dim": found.head_dim, "encoding": found.kind}
        columns |= {"base": rotary.base if rotary else np.nan, "scaling": rotary.scaling if rotary else ""}
        columns |= {"planes": found.head_dim // 2, "turning": np.count_nonzero(rotary.angles) if rotary else 0}
        columns |= {"checked": found.kind != OTHER, "reason": found.reason}
        columns |= {"distance": forward, "distance_reverse": reverse, "tau": tau}
        columns |= _promised(found, forward, reverse, tau, samples, seed)
        frames.append(pd.DataFrame(columns)[COLUMNS])
    return pd.concat(frames, ignore_index=True)


def _promised(
    found: LayerPositions, forward: np.ndarray, reverse: np.ndarray, tau: float, samples: int, seed: int
) -> dict[str, np.ndarray]:
    """The columns PROMISED of one layer. Shapes: `distance, distance -> distance` each."""
    if found.kind != STILL and found.rotary is None:
        return {name: np.full(len(forward), np.nan) for name in PROMISED}
    promised = {name: np.zeros(len(forward)) for name in PROMISED}
    if found.rotary is None:
        promised["bound"] = promised["exact"] = alibi_correlation(forward, reverse)
        promised["tail"][:] = 1.0 if tau <= 1 else np.nan
        return promised
    theta, equal = found.rotary.frequencies, forward == reverse
    promised["bound"] = mean_bound(theta, forward)
    promised["exact"] = promised["bound"].copy()  # alignment 0 is the worst, and there the correlation is the bound
    promised["tail"] = np.where(equal, tail_bound(theta, forward, tau), np.nan)
    if not equal.all():
        apart = forward[~equal], reverse[~equal]
        worst = rope_asymmetric_bound(2 * len(theta), *apart, samples=samples, seed=seed, frequencies=theta)
        for name in ("bound", "bound_error", "exact", "exact_error"):
            promised[name][~equal] = worst[name]
        promised["no_bound"][~equal] = worst["negative"]
    return promised


@checked
@shows_progress("queries")
def with_bounds(
    reading: Reading,
    model: ProbedModel | nn.Module,
    pairs: ReversalPairs,
    *,
    batch_size: int | None = None,
    progress: Progress | bool | None = None,
) -> Reading:
    """An attention reading with RoPE's lower bound beside each score: then `.plot(kind="bounds")` draws both.

    The theorem has one query for both directions. In a one-layer model the mask's query is that; deeper, the two
    prompts give two queries, and the bound of each stands in its own column. Where angles depend on the length of the
    sequence (dynamic, longrope), those of each query's own length are taken, begin tokens counted.

    Args:
        reading: of `probe_attention_correlation` on this model and these pairs; the bounds are those of its layers.
        batch_size: queries of one run; chosen by the model's size when None.
        progress: called with (queries done, queries in all); None shows a bar, False nothing.
    Returns: the reading, its frame with the columns bound_forward, bound_reverse (sum_k w_k cos(2 D theta_k), w from
        the forward or the reverse query at its readout row), bound_mean (its mean over random queries), bound_reason
        (why they are NaN: pairs of another kind, unequal distances, several tokens, a layer that RoPE does not turn,
        two queries that it turns by different angles).
    Raises: RevprobeError, when the reading is not an attention reading of these pairs and this checkpoint.
    Source: paper App. A.3 and Thm. 4.3.
    """
    model = as_probed(model)
    pairs = pairs.for_probe("attention")
    _require_reading_of(reading, model, pairs)
    pair_reasons = reasons_without_bound(pairs, model.logit_shift)
    eligible = np.flatnonzero(pair_reasons == "")
    positions = _positions_by_length(model, {len(query.token_ids) for query in prepare_queries(model, pairs.queries)})
    whole = positions[max(positions)]
    keys = reading.frame[["pair", "layer", "head"]]
    asked = set(keys["layer"])
    turning: Turning = {
        layer: {length: rotary for length, of in positions.items() if (rotary := of[layer].rotary)}
        for layer, found in whole.items()
        if layer in asked and found.kind == TURNS and found.rotary
    }
    bounds = pd.DataFrame(np.nan, index=range(len(keys)), columns=BOUNDS[:3]).assign(bound_reason="")
    if len(eligible) and turning:
        parts = _bounds_by_pair(model, pairs, eligible, turning, batch_size, progress)
        bounds = keys.merge(parts, on=["pair", "layer", "head"], how="left")[BOUNDS]
    by_kind = {TURNS: "", STILL: NOT_TURNED}
    reason_of = {layer: by_kind.get(found.kind, found.reason) for layer, found in whole.items()}
    reasons = keys["layer"].map(lambda layer: reason_of.get(layer, NOT_SEEN)).to_numpy(dtype=object)
    reasons = np.where(reasons == "", bounds["bound_reason"].fillna(""), reasons)
    reasons = np.where(pair_reasons[keys["pair"]] != "", pair_reasons[keys["pair"]], reasons)
    columns = {name: bounds[name].to_numpy() for name in BOUNDS[:3]} | {"bound_reason": reasons}
    return reading.with_columns(**columns)  # the scores are the same: no second jackknife


def _positions_by_length(model: ProbedModel, lengths: set[int]) -> dict[int, dict[int, LayerPositions]]:
    """How position reaches each layer's queries in sequences of each length: layers of each."""
    if grows_with_length(model.module):
        return {length: layer_positions(model, length=length) for length in sorted(lengths)}
    return dict.fromkeys(lengths, layer_positions(model, length=max(lengths)))


def _require_reading_of(reading: Reading, model: ProbedModel, pairs: ReversalPairs) -> None:
    if reading.name != "attention_correlation":
        raise RevprobeError(f"bounds for a reading of {reading.name!r}: expected one of probe_attention_correlation")
    # A digest of an older version is of these pairs, too.
    own = reading.meta.get("pairs")
    found = {
        "pairs": own if pairs.has_digest(own) else pairs.digest,
        "model": model.name,
        "step": model.step,
        "weights": model.weights,
    }
    for name, value in found.items():
        if reading.meta.get(name) != value:
            raise RevprobeError(
                f"the reading was taken with {name} {reading.meta.get(name)!r}, not {value!r}; pass the model and the "
                "pairs it was taken on"
            )


def reasons_without_bound(pairs: ReversalPairs, logit_shift: int) -> np.ndarray:
    """Why the bound does not apply to a pair, "" where it does. Shapes: `-> pair`."""
    forward, reverse = pairs.offsets(logit_shift)
    several = np.array([len(query.target_positions) + len(query.evidence_positions) > 2 for query in pairs.queries])
    differ = np.asarray(pairs.flags.get("different_tokens", np.zeros(len(pairs))), dtype=bool)
    conditions = [
        np.full(len(pairs), pairs.kind != "same_target"),
        differ,
        several[pairs.forward] | several[pairs.reverse],
        (forward != -reverse) | (forward == 0),
    ]
    reasons = np.select(conditions, [SWAPPED, TOKENS_DIFFER, SEVERAL_TOKENS, UNEQUAL], default="")
    return reasons.astype(object)


def _bounds_by_pair(
    model: ProbedModel,
    pairs: ReversalPairs,
    eligible: np.ndarray,
    turning: Turning,
    size: int | None,
    progress: Progress | bool | None,
) -> pd.DataFrame:
    """Bounds of pairs of one target and one evidence token at opposite offsets, one row per pair, layer and head."""
    distance = np.abs(pairs.offsets(model.logit_shift)[0])[eligible]
    forward, reverse = pairs.forward[eligible], pairs.reverse[eligible]
    queries = prepare_queries(model, pairs.queries)  # all of them, as they were read: one may ask for a begin token
    by_query = np.full(len(queries), np.nan)
    by_query[forward], by_query[reverse] = distance, distance
    run = lambda: _bounds_by_query(model, queries, by_query, turning, size, progress)  # noqa: E731
    length = np.array([len(query.token_ids) for query in queries])
    parts = []
    for layer, values in in_equal_lengths_if_need_be(model, run).items():
        angles = {number: turning[layer][number].frequencies for number in np.unique(length)}
        mean, alike = np.empty(len(eligible)), np.empty(len(eligible), dtype=bool)
        for place, (one, other) in enumerate(zip(length[forward], length[reverse], strict=True)):
            mean[place] = mean_bound(angles[one], distance[place])
            alike[place] = one == other or np.array_equal(angles[one], angles[other])
        heads = values.shape[1]
        columns = {"pair": np.repeat(eligible, heads), "layer": layer, "head": np.tile(np.arange(heads), len(eligible))}
        bounds = {"bound_forward": values[forward], "bound_reverse": values[reverse]}
        bounds["bound_mean"] = np.repeat(mean[:, None], heads, axis=1)
        columns |= {name: np.where(alike[:, None], bound, np.nan).ravel() for name, bound in bounds.items()}
        columns["bound_reason"] = np.repeat(np.where(alike, "", ANGLES_DIFFER), heads)
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def _bounds_by_query(
    model: ProbedModel,
    queries: list[Query],
    distance: np.ndarray,
    turning: Turning,
    size: int | None,
    progress: Progress | bool | None,
) -> dict[int, np.ndarray]:
    """The q-specific bound of each prepared query at its distance, NaN without one. Shapes: layer -> `query head`."""
    chosen = np.flatnonzero(~np.isnan(distance))
    size = queries_per_batch(model, [queries[q] for q in chosen], size)
    found: dict[int, np.ndarray] = {}
    done = 0
    with untouched(model.module), torch.no_grad():
        for numbers in in_batches(model, chosen.tolist(), size, lambda q: len(queries[q].token_ids)):
            batch = make_batch(model, [queries[q] for q in numbers])
            with tap_queries(model.module, batch.attention_rows, attention_of(model)) as calls:
                logits_at_rows(model, batch)
            length = np.array([len(queries[q].token_ids) for q in numbers])
            for layer, rotary_of in turning.items():
                query = calls[layer].query[:, :, 0].double().cpu().numpy()
                table = found.setdefault(layer, np.full((len(queries), query.shape[1]), np.nan))
                for own in np.unique(length):
                    here, rotary = length == own, rotary_of[int(own)]
                    energy, rows = rotary.plane_energy(query[here]), np.array(numbers)[here]
                    table[rows] = rope_query_bound(energy, distance[rows, None], frequencies=rotary.frequencies)
            done += len(numbers)
            if callable(progress):
                progress(done, len(chosen))
    return found
