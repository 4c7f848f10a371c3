"""One query as a strip of tokens, coloured by where the model looks when it answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
import torch
from torch import nn

from ...arguments import checked
from ...errors import RevprobeError
from ...hooks.attention import tap_attention
from ...hooks.untouched import untouched
from ...models.probed import ProbedModel, as_probed
from ...models.structure import attention_of
from ..pairs.display import token_texts
from ..pairs.query import Query, ReversalPair
from ..passes.batches import make_batch, prepare_queries
from ..passes.likelihood import readout
from .theme import FORWARD, OKABE_ITO, TEMPLATE, heading, plain, with_theme
from .training_curves import series_words

MARKS = {"target": OKABE_ITO["orange"], "evidence": OKABE_ITO["sky"]}
HOVER = {"target": "target (hidden from the model)", "evidence": "evidence"}
PER_LINE = 16  # tokens


@checked
def token_strip(
    model: ProbedModel | nn.Module,
    query: Query | ReversalPair,
    *,
    layer: int | None = None,
    head: int | None = None,
    theme: str = "light",
) -> go.Figure:
    """Draw a query's tokens coloured by the attention that its readout position pays them, 0 to 1.

    Target and evidence are framed; the target is what a masked model does not see. The weights are post-softmax, the
    mean over the readout rows of a longer target, and over heads and layers where none is chosen. A pair has a strip
    for each direction. The model is left as it was.

    Args:
        query: one query, or a pair of them.
        layer, head: whose attention, the mean over all when None.
        theme: "light" or "dark".
    Raises: RevprobeError, when the layer or head does not exist, or no attention is seen.
    """
    model = as_probed(model)
    sides = (
        {"forward": query.forward, "reverse": query.reverse} if isinstance(query, ReversalPair) else {"query": query}
    )
    figure, start = go.Figure(), 0
    ticks: list[tuple[int, str]] = []
    for side, one in sides.items():
        prepared = prepare_queries(model, [one])[0]
        weights = readout_attention(model, prepared, layer=layer, head=head)
        ticks.append((start, side))
        start = _add_strip(figure, prepared, weights, token_texts(prepared.token_ids, model.tokenizer), start) + 1
    figure.update_xaxes(visible=False, range=[-0.6, PER_LINE - 0.4])
    places, names = [place for place, _ in ticks], [name for _, name in ticks]
    figure.update_yaxes(tickvals=places, ticktext=names, autorange="reversed", showgrid=False, showline=False, ticks="")
    where = "mean over layers" if layer is None else f"layer {layer}"
    where += ", mean over heads" if head is None else f", head {head}"
    step = "" if model.step is None else f", step {model.step:,}"
    which = f" ({series_words(model.weights, None)})" if model.weights else ""
    told = (f"<b>{plain(model.name)}</b>{step}{which}", f"Attention from the readout position ({where})")
    title = heading(*told, "framed: target, hidden from the model (orange), evidence (blue)")
    size = {"height": 150 + 46 * start, "width": 110 + 62 * PER_LINE, "margin": {"t": 100, "b": 20}}
    return with_theme(figure.update_layout(template=TEMPLATE, title=title, **size), theme)


def readout_attention(
    model: ProbedModel, query: Query, *, layer: int | None = None, head: int | None = None
) -> np.ndarray:
    """The weight that the readout position of a prepared query pays each of its tokens. Shapes: `-> token`.

    Raises: RevprobeError, when the layer or head does not exist, or no attention is seen.
    """
    batch = make_batch(model, [query])
    columns = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)[None]
    at = batch.attention_rows, columns + batch.ahead[1]
    tapped = tap_attention(model.module, *at, attention_of(model), batch.size)
    with untouched(model.module), torch.no_grad(), tapped as tap:
        readout(model, batch)
    found = {number: call.weight[0].mean(1).double().cpu().numpy() for number, call in tap.layers(model.name).items()}
    if layer is not None and layer not in found:
        raise RevprobeError(f"layer {layer!r} has no attention that is seen: expected one of {sorted(found)}")
    chosen = list(found.values()) if layer is None else [found[layer]]
    heads = min(len(one) for one in chosen)
    if head is not None and not 0 <= head < heads:
        raise RevprobeError(f"no head {head!r}: expected 0 to {heads - 1}")
    return np.mean([one.mean(0) if head is None else one[head] for one in chosen], axis=0)


def _add_strip(figure: go.Figure, query: Query, weights: np.ndarray, texts: Sequence[str], start: int) -> int:
    """Draw the tokens in lines of PER_LINE from line `start` on; returns the line after the last."""
    parts = dict.fromkeys(query.target_positions, "target") | dict.fromkeys(query.evidence_positions, "evidence")
    lines = -(-len(texts) // PER_LINE)
    for line in range(lines):
        row = slice(line * PER_LINE, (line + 1) * PER_LINE)
        shown, weight = texts[row], weights[row].tolist()
        hover = [
            f"token {at}: {plain(text)} {HOVER.get(parts.get(at, ''), '')}<br>attention {paid:.4f}"
            for at, (text, paid) in enumerate(zip(shown, weight, strict=True), row.start)
        ]
        white_to_blue = {"colorscale": [[0, "#FFFFFF"], [1, FORWARD]], "zmin": 0, "zmax": 1}
        bar = {"showscale": start + line == 0, "colorbar": {"title": {"text": "weight"}, "thickness": 12}}
        cells = go.Heatmap(z=[weight], y=[start + line], text=[[plain(text, limit=9) for text in shown]])
        cells.update(
            hovertext=[hover], hoverinfo="text", xgap=4, ygap=6, texttemplate="%{text}", **white_to_blue, **bar
        )
        figure.add_trace(cells)
    for position, part in parts.items():
        x, y = position % PER_LINE, start + position // PER_LINE
        box = {"x0": x - 0.46, "x1": x + 0.46, "y0": y - 0.42, "y1": y + 0.42}
        figure.add_shape(type="rect", **box, line={"color": MARKS[part], "width": 3})
    return start + lines
