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

from ..errors import RevprobeError
from ..hooks.queries import tap_queries
from ..hooks.untouched import untouched
from ..models.probed import ProbedModel, as_probed
from ..models.rotary import NO_ATTENTION, OTHER, STILL, TURNS, LayerPositions, Rotary, layer_positions
from .batches import default_batch_size, make_batch, prepare_queries
from .pairs import Query, ReversalPairs
from .readings import Reading
from .theory import alibi_correlation, mean_bound, rope_query_bound, tail_bound

COLUMNS = ["layer", "heads", "head_dim", "encoding", "base", "scaling", "planes", "turning", "checked", "distance"]
COLUMNS += ["bound", "tau", "tail", "reason"]
BOUNDS = ["bound_forward", "bound_reverse", "bound_mean", "bound_reason"]
SWAPPED = "the bound is about one target asked both ways (kind same_target)"
TOKENS_DIFFER = "the two queries name evidence or target by different tokens"
SEVERAL_TOKENS = "a score averaged over several tokens has no one distance"
UNEQUAL = "the bound needs equal distances on opposite sides"
NOT_TURNED = "queries do not turn with position (ALiBi, other biases or none): no bound by RoPE"
NOT_SEEN = "queries of this layer are not seen (no scaled_dot_product_attention call)"


def model_theory(
    model: ProbedModel | nn.Module, distances: ArrayLike, *, tau: float = 0.1, length: int | None = None
) -> pd.DataFrame:
    """What the theory promises for this model at equal forward and reverse distances.

    Args:
        distances: tokens between readout row and evidence, on either side.
        tau: threshold of the share of queries.
        length: tokens of the sequence, for scalings whose angles depend on it (dynamic, longrope); the longest distance
            and one more when None.
    Returns: one row per attention layer and distance: layer, heads, head_dim, encoding ("rope"; "no rotation": ALiBi,
        other biases or none, where the correlation is exactly 1; "other"), base (NaN where the model names none),
        scaling, planes, turning (planes that turn), checked (the angles were found in the layer's own queries),
        distance, bound (least mean correlation over queries), tau, tail (least share of queries at or above tau; NaN
        where tau is not below the bound), reason (why bound is NaN, or what was not checked).
    Raises: RevprobeError, when no attention can be seen, or for a negative distance.
    Source: paper Thm. 4.3, Prop. 4.5, App. B.2.
    """
    model = as_probed(model)
    tokens = np.atleast_1d(np.asarray(distances, dtype=np.float64)).ravel()
    alibi_correlation(tokens)  # refuses negative distances before the model runs
    layers = layer_positions(model, length=int(tokens.max()) + 1 if length is None and tokens.size else length)
    if not layers:
        raise RevprobeError(f"{model.name}: {NO_ATTENTION}")
    return pd.concat([_layer_frame(layer, found, tokens, tau) for layer, found in layers.items()], ignore_index=True)


def _layer_frame(layer: int, found: LayerPositions, distances: np.ndarray, tau: float) -> pd.DataFrame:
    rotary = found.rotary
    undefined = np.full(len(distances), np.nan)
    if found.kind == STILL:
        bound, tail = alibi_correlation(distances), np.where(tau <= 1, 1.0, undefined)
    elif rotary is None:
        bound, tail = undefined, undefined
    else:
        bound, tail = (
            mean_bound(rotary.frequencies, distances),
            tail_bound(rotary.frequencies, distances, tau),
        )
    columns = {
        "layer": layer,
        "heads": found.heads,
        "head_dim": found.head_dim,
        "encoding": found.kind,
        "base": rotary.base if rotary else np.nan,
        "scaling": rotary.scaling if rotary else "",
        "planes": found.head_dim // 2,
        "turning": int(np.count_nonzero(rotary.angles)) if rotary else 0,
        "checked": found.kind != OTHER,
        "distance": distances,
        "bound": bound,
        "tau": tau,
        "tail": tail,
        "reason": found.reason,
    }
    return pd.DataFrame(columns)[COLUMNS]


def with_bounds(
    reading: Reading, model: ProbedModel | nn.Module, pairs: ReversalPairs, *, batch_size: int | None = None
) -> Reading:
    """An attention reading with RoPE's lower bound beside each score: then `.plot(kind="bounds")` draws both.

    The theorem has one query for both directions. In a one-layer model the mask's query is that; deeper, the two
    prompts give two queries, and the bound of each stands in its own column.

    Args:
        reading: of `probe_attention_correlation` on this model and these pairs.
    Returns: the reading, its frame with the columns bound_forward, bound_reverse (sum_k w_k cos(2 D theta_k), w from
        the forward or the reverse query at its readout row), bound_mean (its mean over random queries), bound_reason
        (why they are NaN: pairs of another kind, unequal distances, several tokens, a layer that RoPE does not turn).
    Raises: RevprobeError, when the reading is not an attention reading of these pairs and this checkpoint.
    Source: paper App. A.3 and Thm. 4.3.
    """
    model = as_probed(model)
    _require_reading_of(reading, model, pairs)
    pair_reasons = _pair_reasons(pairs, model.logit_shift)
    eligible = np.flatnonzero(pair_reasons == "")
    positions = layer_positions(model, length=max(len(query.token_ids) for query in pairs.queries))
    turning = {layer: found.rotary for layer, found in positions.items() if found.kind == TURNS and found.rotary}
    keys = reading.frame[["pair", "layer", "head"]]
    if len(eligible) and turning:
        parts = _bounds_by_pair(model, pairs.take(eligible), eligible, turning, batch_size)
        bounds = keys.merge(parts, on=["pair", "layer", "head"], how="left")[BOUNDS[:3]]
    else:
        bounds = pd.DataFrame(np.nan, index=range(len(keys)), columns=BOUNDS[:3])
    layer_reasons = keys["layer"].map(lambda layer: _layer_reason(positions.get(layer)))
    reasons = np.where(pair_reasons[keys["pair"]] != "", pair_reasons[keys["pair"]], layer_reasons)
    columns = {name: bounds[name].to_numpy() for name in BOUNDS[:3]} | {"bound_reason": reasons}
    bounded = Reading(reading.name, reading.frame.assign(**columns), reading.meta, reading.cross)
    bounded.__dict__["measured"] = reading.measured  # the scores are the same: no second bootstrap
    return bounded


def _require_reading_of(reading: Reading, model: ProbedModel, pairs: ReversalPairs) -> None:
    if reading.name != "attention_correlation":
        raise RevprobeError(f"bounds for a reading of {reading.name!r}: expected one of probe_attention_correlation")
    found = {"pairs": pairs.digest, "model": model.name, "step": model.step, "weights": model.weights}
    for name, value in found.items():
        if reading.meta.get(name) != value:
            raise RevprobeError(
                f"the reading was taken with {name} {reading.meta.get(name)!r}, not {value!r}; pass the model and the "
                "pairs it was taken on"
            )


def _pair_reasons(pairs: ReversalPairs, logit_shift: int) -> np.ndarray:
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


def _layer_reason(found: LayerPositions | None) -> str:
    if found is None:
        return NOT_SEEN
    return "" if found.kind == TURNS else NOT_TURNED if found.kind == STILL else found.reason


def _bounds_by_pair(
    model: ProbedModel, pairs: ReversalPairs, numbers: np.ndarray, turning: dict[int, Rotary], size: int | None
) -> pd.DataFrame:
    """Bounds of pairs of one target and one evidence token at opposite offsets, one row per pair, layer and head."""
    distance = np.abs(pairs.offsets(model.logit_shift)[0])
    by_query = np.zeros(len(pairs.queries))
    by_query[pairs.forward], by_query[pairs.reverse] = distance, distance
    bounds = _bounds_by_query(model, pairs.queries, by_query, turning, size)
    parts = []
    for layer, values in bounds.items():
        heads = values.shape[1]
        columns = {"pair": np.repeat(numbers, heads), "layer": layer, "head": np.tile(np.arange(heads), len(pairs))}
        columns |= {"bound_forward": values[pairs.forward].ravel(), "bound_reverse": values[pairs.reverse].ravel()}
        columns["bound_mean"] = np.repeat(mean_bound(turning[layer].frequencies, distance), heads)
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def _bounds_by_query(
    model: ProbedModel, queries: tuple[Query, ...], distance: np.ndarray, turning: dict[int, Rotary], size: int | None
) -> dict[int, np.ndarray]:
    """The q-specific bound of each query at its distance. Shapes: layer -> `query head`."""
    prepared = prepare_queries(model, queries)
    size = size or default_batch_size(model, prepared)
    found: dict[int, list[np.ndarray]] = {layer: [] for layer in turning}
    with untouched(model.module), torch.no_grad():
        for start in range(0, len(prepared), size):
            batch = make_batch(model, prepared[start : start + size])
            with tap_queries(model.module, batch.rows) as tap:
                model.logits(batch.input_ids, batch.attention_mask)
            calls, apart = tap.layers(), distance[start : start + size, None]
            for layer, rotary in turning.items():
                energy = rotary.plane_energy(calls[layer].query[:, :, 0].double().cpu().numpy())
                found[layer].append(rope_query_bound(energy, apart, frequencies=rotary.frequencies))
    return {layer: np.concatenate(parts) for layer, parts in found.items()}
