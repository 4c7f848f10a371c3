"""Several models asked about the same facts: an autoregressive parent and its diffusion child, or any others.

    ask = lambda model: relation.pairs(model, "P2C", kind="swapped")
    rp.compare_models({"AR parent": "Qwen/Qwen2.5-7B", "diffusion child": "Dream-org/Dream-v0-Base-7B"}, ask)

Tokenizers differ, so each model has pairs of its own; what joins them is the label of the fact.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..arguments import checked, fitted
from ..errors import RevprobeError, did_you_mean
from ..models.peft_adapters import own_parameters
from ..models.probed import ProbedModel
from ..models.registry import load_model
from ..progress import shows_progress
from .fused import PROBES, probe, require_probes
from .pairs.display import shown_query
from .pairs.pairs import ReversalPairs
from .readings.model_comparison import ModelComparison, require_names
from .readings.readings import Readings
from .readings.sides import Asked

Model = ProbedModel | nn.Module | str | Path
# A model's pairs, or what makes them once it is loaded.
PairsOf = ReversalPairs | Callable[[ProbedModel], ReversalPairs]


@checked
@shows_progress("queries", reads=lambda name, done, total: (done, total, name))
def compare_models(
    models: Mapping[str, Model],
    pairs: PairsOf | Mapping[str, PairsOf],
    *,
    only: Sequence[str] | None = None,
    mode: str = "chain",
    batch_size: int | None = None,
    control: bool = True,
    seed: int = 0,
    device: torch.device | str | int | None = None,
    load: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Callable[[str, int, int], None] | bool | None = None,
) -> ModelComparison:
    """Take the same readings of two or more models, and their differences over the facts that two models share.

    Args:
        models: name -> a model, a module, or what `load_model` takes; these are loaded one after the other, so that
            only one is in memory. Each model is compared with those before it: name the parent first.
        pairs: of all models, or of each by its name; a function makes them of the model. They are joined by the labels
            of their facts, so these must mean the same in all lists. A difference is between pairs of one kind: a
            causal model's are swapped, so ask a masked one the same with `relation.pairs(..., kind="swapped")`.
        only, mode, batch_size, control, seed: as in `probe`; the seed is also that of the draws behind the intervals.
            Gradients are of each model's own parameters; those of an adapter on it are left out.
        device: where models that are loaded here are put.
        load: name -> options of `load_model` beside the device, for what a model's files do not say:
            `{"diffusion child": {"block_size": 32, "mask_token_id": 151669}}`.
        progress: called with the model's name, queries done and queries in all; None shows a bar, False nothing.
    Raises: RevprobeError, for fewer than two models, pairs or options that are not those of the models, and whatever
        loading and the probes raise, with the model's name before it.
    """
    require_names(models)
    if only is not None and not require_probes(only):
        raise RevprobeError(f"no probe was named; expected some of {', '.join(PROBES)}")
    asked, loading = _pairs_by_model(models, pairs), load or {}
    _require_models(loading, models, "options")
    options: dict[str, Any] = {"only": only, "mode": mode, "batch_size": batch_size, "control": control, "seed": seed}
    readings: dict[str, Readings] = {}
    told: dict[str, Asked] = {}
    for name, model in models.items():
        options["progress"] = partial(progress, name) if callable(progress) else None
        try:
            own = {"device": device} | dict(loading.get(name, {}))
            readings[name], told[name] = _read(model, asked[name], own, options)
        except RevprobeError as error:
            raise RevprobeError(f"{name}: {error}") from error
    return ModelComparison(readings, told, seed)


def _read(model: Model, pairs: PairsOf, loading: dict[str, Any], options: dict[str, Any]) -> tuple[Readings, Asked]:
    """One model's readings and what it was asked. A model that was loaded here is gone when this returns."""
    if not isinstance(model, str | Path):
        loading = {key: value for key, value in loading.items() if key != "device"}  # it stays where it is
    probed = load_model(model, **loading)
    own = fitted("pairs", pairs(probed) if callable(pairs) else pairs, ReversalPairs)
    longest = max(len(query.target) for one in (own, *own.by_probe.values()) for query in one.queries)
    readings = probe(probed, own, parameters=own_parameters(probed.module), **options)
    return readings, Asked(fact_words(own), longest)


def _pairs_by_model(models: Mapping[str, Model], pairs: PairsOf | Mapping[str, PairsOf]) -> Mapping[str, PairsOf]:
    """The pairs of each model. Raises: RevprobeError, for names that are not those of the models."""
    if not isinstance(pairs, Mapping):
        return dict.fromkeys(models, pairs)
    _require_models(pairs, models, "pairs")
    for name in models:
        if name not in pairs:
            raise RevprobeError(f"no pairs of {name!r}: name some for each of {', '.join(map(str, models))}")
    return pairs


def _require_models(named: Iterable[str], models: Mapping[str, Model], what: str) -> None:
    """Raises: RevprobeError, for a name that no model has."""
    for name in named:
        if name not in models:
            raise RevprobeError(f"{what} of {name!r}, but no model is called so{did_you_mean(str(name), models)}")


def fact_words(pairs: ReversalPairs) -> dict[str, str]:
    """What each fact is about: its target and evidence by letters and digits alone, in either order.

    Tokenizers differ in blanks, case and accents; these must not make two facts of one. Empty without a tokenizer.

    >>> from revprobe import Query, ReversalPair, letter_tokenizer
    >>> queries = Query([1, 2, 27], [1], [2]), Query([27, 2, 1], [1], [0])
    >>> made = [ReversalPair(*queries, fact="a")]
    >>> fact_words(ReversalPairs.from_pairs(made, tokenizer=letter_tokenizer()))
    {'a': 'a | b'}
    """
    words: dict[str, str] = {}
    for one in (pairs, *pairs.by_probe.values()):
        if one.tokenizer is None:
            continue
        for fact, query in zip(one.facts.astype(str).tolist(), one.forward, strict=True):
            if fact not in words:
                told = shown_query(one.queries[query], one.tokenizer)
                words[fact] = " | ".join(sorted(_letters(told[part]) for part in ("target", "evidence")))
    return words


def _letters(text: str) -> str:
    plain = unicodedata.normalize("NFKD", text).casefold()
    return "".join(character for character in plain if character.isalnum()) or text
