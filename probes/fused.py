"""All three probes at once: where they read the same pairs, the model runs each query once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import nn

from ..arguments import checked
from ..engines.workers import Workers
from ..errors import RevprobeError, did_you_mean
from ..models.probed import ProbedModel
from ..progress import Progress, shows_progress
from .attention import attention_controls, attention_reading, readable_layers
from .controls import Controls, Parent, Reader
from .gradient import chosen_parameters, gradient_controls, gradient_reading
from .pairs.pairs import ReversalPairs
from .passes.plan import PassResult, Plan, Share
from .passes.run import run_pass
from .passes.selection import listed
from .passes.shared_out import shared_out
from .probability import probability_reading
from .readings.reading import Reading
from .readings.readings import Readings

# The probes by the short names of `probe(only=)` and the command line.
PROBES = {"attention": "attention_correlation", "gradient": "gradient_cosine", "probability": "reverse_probability"}


def require_probes(names: Iterable[str]) -> list[str]:
    """The probe names as a list. Raises: RevprobeError, for one that does not exist; it names the nearest."""
    names = list(names)
    for name in names:
        if name not in PROBES:
            raise RevprobeError(f"unknown probe {name!r}{did_you_mean(name, PROBES)}")
    return names


def lists_read(pairs: ReversalPairs, names: Iterable[str]) -> list[tuple[list[str], ReversalPairs]]:
    """The lists that some probes read, each with the probes that share it, in their order."""
    shared: dict[int, tuple[list[str], ReversalPairs]] = {}
    common = pairs.for_probe("")  # the list of every probe that has none of its own
    for name in names:
        own = pairs.by_probe.get(name, common)
        shared.setdefault(id(own), ([], own))[0].append(name)
    return list(shared.values())


@checked
@shows_progress("queries")
def probe(
    model: ProbedModel | nn.Module | str | Path,
    pairs: ReversalPairs,
    *,
    only: Sequence[str] | None = None,
    parameters: Sequence[str] | None = None,
    mode: str = "chain",
    batch_size: int | None = None,
    layers: Iterable[int] | None = None,
    control: bool = True,
    progress: Progress | bool | None = None,
    seed: int = 0,
    share: Share | None = None,
    workers: Workers | None = None,
    controls: str | Iterable[str] = (),
    parent: Parent | None = None,
) -> Readings:
    """Attention correlation, gradient cosine and reverse probability, from one run of each query for all that read it.

    The numbers are those of the three probes run alone; see there for what they mean. `only` names some of
    "attention", "gradient", "probability". Pairs that give a probe a list of its own (`letter_pairs`, `Run.pairs`) are
    run list by list, and `progress` begins anew with each. `share` divides the work among processes (see
    `finetune.training.distributed`); each of them gets all readings. `controls` and `parent` are those of the attention
    and gradient probes (see `Reading.controls`): passes of their own, so the default is none.
    `workers`, of `ray_workers`, run the passes of the three probes in parts; `model` may be the name or folder of one,
    which each of them loads. What `controls` take is run here.
    Raises: RevprobeError, for an unknown probe, controls of none but the probability, `share` beside `workers`, and
        what `load_model`, the workers and the single probes raise.
    """
    wanted = list(PROBES) if only is None else require_probes(only)
    if not wanted:
        raise RevprobeError(f"no probe was named; expected some of {', '.join(PROBES)}")
    if share is not None and workers is not None:
        raise RevprobeError("share= and workers= both divide the work; leave one of them out")
    beside = Controls.asked(controls, parent, of=wanted)
    asked = Plan(mode=mode, parameters=parameters, control=control, batch_size=batch_size, seed=seed, progress=progress)
    with shared_out(workers, model) as (probed, by_workers):
        return _taken(probed, pairs, replace(asked, share=share or by_workers), wanted, beside, layers)


def _taken(
    model: ProbedModel,
    pairs: ReversalPairs,
    asked: Plan,
    wanted: list[str],
    beside: Controls,
    layers: Iterable[int] | None,
) -> Readings:
    """The readings of the probes that are wanted, in the order of PROBES."""
    if layers is not None:
        layers = readable_layers(model, layers) if "attention" in wanted else listed("layer", layers)
    names = chosen_parameters(model, asked.parameters, layers) if "gradient" in wanted else None
    asked = replace(asked, parameters=names)
    taken: dict[str, Reading] = {}
    makers: dict[str, Callable[[ProbedModel, PassResult, Plan], Reading]] = {
        "attention": partial(attention_reading, layers=layers),
        "gradient": gradient_reading,
        "probability": probability_reading,
    }
    for members, own in lists_read(pairs, wanted):
        attention, gradient, probability = (name in members for name in PROBES)
        plan = replace(asked, attention=attention, gradient=gradient, probability=probability)
        result = run_pass(model, own, plan)
        taken |= {name: makers[name](model, result, plan) for name in members}
    for name, readers in control_readers(model, pairs, asked, beside, layers).items():
        if name in taken:
            taken[name] = beside.beside(taken[name], readers)
    return Readings(taken[name] for name in PROBES if name in taken)


def control_readers(
    model: ProbedModel, pairs: ReversalPairs, plan: Plan, asked: Controls, layers: Iterable[int] | None = None
) -> dict[str, dict[str, Reader]]:
    """Probe -> what takes each of its controls; nothing is run here. A probability has its own control alone."""
    return {
        "attention": attention_controls(model, pairs, replace(plan, attention=True), asked, layers),
        "gradient": gradient_controls(model, pairs, replace(plan, gradient=True), asked),
    }
