"""How a model's queries turn with position: which planes, by which angles, checked on the queries themselves.

A transformers model keeps its angles in the `inv_freq` buffer of its rotary embedding (`<layer type>_inv_freq` where
layers differ), whatever scaling made them: default, linear, dynamic, yarn, longrope, llama3. Which entries of a head
form a plane (k and k + r/2 as in Llama, or neighbours as in GPT-J), whether only part of the head turns, and whether
a layer turns at all, no buffer says. One run says it: on sequences that repeat one token each, every layer of a model
without position in its embeddings sees the same vector at every position, so its queries differ by the rotation
alone.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import RevprobeError
from ..hooks.attention import tap_queries
from ..hooks.untouched import untouched
from .probed import ProbedModel
from .structure import attention_of, parameter_roles, score_biases

REPEATS = 8  # tokens of the run that checks, or as many as the model takes; the angles compared are the last one's
TOKENS = 8  # different ones, since the embedding of a padding token may be zero
TURNS, STILL, OTHER = "rope", "no rotation", "other"
# What rounding leaves, in units of the queries' size: (at least, times the dtype's eps). Measured on four layers: right
# rotations 3e-3 in bf16 and 4e-7 in float32, queries that do not turn 0 and 4e-7.
WITHIN = {TURNS: (1e-4, 4.0), STILL: (1e-5, 1.0)}
NO_ATTENTION = "no scaled_dot_product_attention call was seen"
BRIDGED = "a TransformerLens bridge makes none; ask the model it was made from"
UNSEEN = "load with attn_implementation='sdpa'"
BY_HAND = (
    "its attention multiplies queries and keys itself, where nothing shows them turned; scores and weights are read "
    "all the same (probe_attention_correlation)"
)
ALL_ZERO = "every query is zero, so nothing shows how position reaches them"
UNCHECKED = "queries of equal tokens differ by more than a rotation: position reaches them another way"
POSITION_TABLE = "the model has a table of positions ({name}), so equal queries do not show that none reaches them"
AFTER_OTHER = "equal tokens have equal queries, but position reaches an earlier layer in a way that was not made out"
_INV_FREQ = re.compile(r"^(?:(?P<kind>\w+?)_)?inv_freq$")
_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
_GROWING = ("dynamic", "longrope")  # angles that depend on the length of the sequence


@dataclass(frozen=True)
class Rotary:
    """The rotation of one head's queries and keys.

    Attributes:
        angles: radians per token of each turning plane, slowest last, float64, `turning`.
        head_dim: entries of a query; those that no plane holds do not turn.
        start: the first turning entry.
        interleaved: planes are neighbours (2k, 2k + 1); else k and k + r/2 of the r turning entries.
        base: RoPE's base, NaN where the model names none; with scaling the angles do not follow from it alone.
        scaling: "default", "linear", "dynamic", "yarn", "longrope", "llama3", ...
        source: the buffer or setting the angles were taken from.
    """

    angles: np.ndarray
    head_dim: int
    start: int = 0
    interleaved: bool = False
    base: float = float("nan")
    scaling: str = "default"
    source: str = ""

    @property
    def frequencies(self) -> np.ndarray:
        """theta_k of all planes of the head, zero for those that do not turn. Shapes: `-> plane`."""
        return np.concatenate([self.angles, np.zeros(self.head_dim // 2 - len(self.angles))])

    @property
    def entries(self) -> np.ndarray:
        """The two entries of the head that form each plane, in the order of `frequencies`. Shapes: `-> plane 2`."""
        turning, still = self._split(np.arange(self.head_dim))
        return np.concatenate([turning, still.reshape(-1, 2)])

    def rotation(self, tokens: float) -> np.ndarray:
        """R_tokens, which turns a query or key as it stands in the model by that many positions.

        Shapes: `-> head_dim head_dim`, float64.
        """
        first, second = self.entries.T
        cos, sin = np.cos(tokens * self.frequencies), np.sin(tokens * self.frequencies)
        matrix = np.zeros((self.head_dim, self.head_dim))
        matrix[first, first], matrix[first, second] = cos, -sin
        matrix[second, first], matrix[second, second] = sin, cos
        return matrix

    def plane_energy(self, query: np.ndarray) -> np.ndarray:
        """|q_k|^2 in the order of `frequencies`, the same before and after the rotation.

        Shapes: `... head_dim -> ... plane`.
        """
        turning, still = self._split(query)
        planes = [np.square(turning).sum(-1), np.square(still.reshape(*still.shape[:-1], -1, 2)).sum(-1)]
        return np.concatenate(planes, axis=-1)

    def turned(self, query: np.ndarray, tokens: float) -> np.ndarray:
        """The query `tokens` positions later, its entries ordered by plane. Shapes: `... head_dim -> ... head_dim`."""
        turning, still = self._split(query)
        cos, sin = np.cos(tokens * self.angles), np.sin(tokens * self.angles)
        first, second = turning[..., 0], turning[..., 1]
        return np.concatenate([first * cos - second * sin, first * sin + second * cos, still], axis=-1)

    def turned_back(self, vectors: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Queries or keys as they are at position 0, each plane as one complex number, in the order of `frequencies`.

        Shapes: `... head_dim, ... -> ... plane`, complex128; positions are broadcast.
        """
        turning, still = self._split(vectors.astype(np.float64))
        planes = np.concatenate([turning, still.reshape(*still.shape[:-1], -1, 2)], axis=-2)
        return (planes[..., 0] + 1j * planes[..., 1]) * np.exp(-1j * positions[..., None] * self.frequencies)

    def _split(self, query: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Turning entries as `... turning 2`, and the rest as `... rest`."""
        stop = self.start + 2 * len(self.angles)
        part = query[..., self.start : stop]
        shape = (-1, 2) if self.interleaved else (2, len(self.angles))
        pairs = part.reshape(*part.shape[:-1], *shape)
        still = np.concatenate([query[..., : self.start], query[..., stop:]], axis=-1)
        return pairs if self.interleaved else np.moveaxis(pairs, -2, -1), still


@dataclass(frozen=True)
class LayerPositions:
    """How position reaches one layer's queries.

    Attributes:
        kind: "rope" (they turn), "no rotation" (position does not reach them: ALiBi, other biases, none), "other".
        rotary: the rotation; of the kind "other" what the model's buffers say, unchecked, None where they differ.
        heads, head_dim: of the queries.
        reason: why the kind is "other".
    """

    kind: str
    rotary: Rotary | None
    heads: int
    head_dim: int
    reason: str = ""


def layer_positions(model: ProbedModel, *, length: int | None = None) -> dict[int, LayerPositions]:
    """How position reaches the queries of each attention layer, by one run on repeated tokens.

    Args:
        length: tokens of the sequences that are asked about, for scalings that depend on it; short when None.
    Returns: layer -> its positions; empty when no SDPA call is seen.
    """
    shown = torch.linspace(0, model.vocab_size - 1, TOKENS, device=model.device).long()
    repeats = min(REPEATS, model.max_length or REPEATS)
    rows = torch.tensor([[0, repeats - 1]], device=model.device).expand(TOKENS, -1)
    attention = attention_of(model, required=False)
    with untouched(model.module), torch.no_grad(), tap_queries(model.module, rows, attention) as calls:
        model.logits(shown[:, None].expand(-1, repeats).contiguous())
    candidates = [*_candidates(model.module, repeats)]
    asked = candidates if length is None else [*_candidates(model.module, length)]
    tables = [kind for part in model.module.modules() if (kind := getattr(part, "table_dtype", None)) is not None]
    eps = max(torch.finfo(kind).eps for kind in (model.dtype, *tables))  # a rounded table turns as if in that type
    tolerance = {kind: max(least, times * eps) for kind, (least, times) in WITHIN.items()}
    found: dict[int, LayerPositions] = {}
    for layer, call in sorted(calls.items()):
        near, far = call.query.double().cpu().numpy().transpose(2, 0, 1, 3)
        places = [place for place, (owner, _) in enumerate(candidates) if owner in (None, layer)]
        pairs = [(candidates[place][1], asked[place][1]) for place in places]
        found[layer] = _positions(near, far, repeats - 1, pairs, tolerance)
    return _doubted(model.module, found)


def seen_positions(model: ProbedModel, *, length: int | None = None) -> dict[int, LayerPositions]:
    """`layer_positions` of a model in which some attention is seen. Raises: RevprobeError, when none is."""
    found = layer_positions(model, length=length)
    if not found:
        raise RevprobeError(f"{model.name}: {NO_ATTENTION}; {_why_unseen(model.module)}")
    return found


def _why_unseen(module: nn.Module) -> str:
    """What a user can do where no call was seen: a class of transformers says itself whether it can make one."""
    if any(name.endswith(".hook_attn_scores") for name, _ in module.named_modules()):
        return BRIDGED
    return UNSEEN if any(getattr(part, "_supports_sdpa", False) for part in module.modules()) else BY_HAND


def _doubted(module: nn.Module, found: dict[int, LayerPositions]) -> dict[int, LayerPositions]:
    """Take back "no rotation" where a small position signal may hide below the rounding.

    What an absolute encoding adds shrinks against the residual stream with depth and, in bf16, drowns in it.
    """
    tables = [name for name, place in parameter_roles(module).items() if place.role == "position"]
    table = next((name for name in tables if name not in score_biases(module)), None)
    doubted, other = {}, False
    for layer, positions in found.items():
        other = other or positions.kind == OTHER
        if positions.kind == STILL and (other or table):
            reason = POSITION_TABLE.format(name=table) if table else AFTER_OTHER
            positions = replace(positions, kind=OTHER, reason=reason)
        doubted[layer] = positions
    return doubted


def _positions(
    near: np.ndarray, far: np.ndarray, apart: int, candidates: list[tuple[Rotary, Rotary]], tolerance: dict[str, float]
) -> LayerPositions:
    """One layer, from its queries at two rows `apart`: what explains the difference best, if anything does.

    Shapes: `near`, `far`: `sequence heads head_dim`. `candidates`: as they are in the run, and as they are asked about.
    """
    heads, head_dim = near.shape[1:]
    size = float(np.linalg.norm(near))
    if not size:
        return LayerPositions(OTHER, None, heads, head_dim, ALL_ZERO)
    fits: list[tuple[float, Rotary | None]] = [(float(np.linalg.norm(far - near)), None)]
    for here, asked in candidates:
        free = head_dim - 2 * len(here.angles)
        starts = dict.fromkeys((0, free)) if free >= 0 else {}  # the planes may lie at either end of a head
        for start, interleaved in product(starts, (False, True)):
            rotary = replace(here, head_dim=head_dim, start=start, interleaved=interleaved)
            error = float(np.linalg.norm(rotary.turned(near, apart) - rotary.turned(far, 0.0)))
            fits.append((error, replace(rotary, angles=asked.angles)))
    least, best = min(fits, key=lambda fit: fit[0])
    kind = STILL if best is None else TURNS
    if least <= tolerance[kind] * size:
        return LayerPositions(kind, best, heads, head_dim)
    distinct = {asked.angles.tobytes(): asked for _, asked in candidates}
    alone = next(iter(distinct.values())) if len(distinct) == 1 else None
    fitting = alone is not None and 2 * len(alone.angles) <= head_dim
    stated = replace(alone, head_dim=head_dim) if alone is not None and fitting else None
    return LayerPositions(OTHER, stated, heads, head_dim, UNCHECKED)


def _candidates(module: nn.Module, length: int) -> Iterator[tuple[int | None, Rotary]]:
    """Every set of angles the model holds, with the layer that owns it (None: shared by all)."""
    config: Any = getattr(module, "config", None)
    if getattr(config, "position_encoding", None) == "rope" and hasattr(config, "rope_base"):
        # Our encoder works its angles out from the config at every run and keeps no buffer.
        dim = config.d_model // config.n_heads
        angles = config.rope_base ** (-np.arange(0, dim, 2) / dim)
        yield None, Rotary(angles, dim, base=config.rope_base, source="config.rope_base")
    for path, child in module.named_modules():
        layer = _LAYER.search(path)
        for name, _ in list(child.named_buffers(recurse=False)):
            match = _INV_FREQ.match(name)
            if match and match["kind"] != "original" and not name.endswith("original_inv_freq"):
                owner = int(layer[1]) if layer else None
                yield owner, _rotary_of(child, name, match["kind"], f"{path}.{name}", length)


def grows_with_length(module: nn.Module) -> bool:
    """Whether a rotation's angles depend on the length of the sequence, so that kept keys are turned otherwise."""
    return any(_is_growing(str(getattr(child, "rope_type", ""))) for child in module.modules())


def _is_growing(scaling: str) -> bool:
    return any(word in scaling for word in _GROWING)


def is_inverse_frequency(name: str) -> bool:
    """Whether a buffer of that name holds radians per token, or those it began with."""
    return _INV_FREQ.match(name) is not None


def follows_length(module: nn.Module, name: str) -> bool:
    """Whether a buffer holds the angles of the longest row so far; those it began with stand beside it."""
    match = _INV_FREQ.match(name)
    if match is None or name.endswith("original_inv_freq"):
        return False
    began_with = f"{match['kind']}_original_inv_freq" if match["kind"] else "original_inv_freq"
    return hasattr(module, began_with) and _is_growing(_scaling_of(module, match["kind"]))


def _scaling_of(module: nn.Module, kind: str | None) -> str:
    scaling = getattr(module, "rope_type", "default")
    return str(scaling.get(kind, "default") if isinstance(scaling, dict) else scaling)


def _rotary_of(module: nn.Module, name: str, kind: str | None, source: str, length: int) -> Rotary:
    scaling = _scaling_of(module, kind)
    if _is_growing(scaling):
        # On a copy: the embedding's own code decides, and keeps what it decided.
        module = copy.deepcopy(module)
        positions = torch.arange(length, device=getattr(module, name).device)[None]
        with torch.no_grad():
            module(torch.zeros(1, device=positions.device), positions, **({"layer_type": kind} if kind else {}))
    angles = getattr(module, name).detach().double().cpu().numpy().reshape(-1)
    config: Any = getattr(module, "config", None)
    stated = getattr(config, "rope_parameters", None) or {}
    stated = stated.get(kind, stated) if kind else stated
    base = float(stated.get("rope_theta", getattr(config, "rope_theta", float("nan"))))
    return Rotary(angles, 2 * len(angles), base=base, scaling=scaling, source=source)
