"""All three probes in one pass: the model runs each query once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from ..arguments import checked
from ..errors import RevprobeError, did_you_mean
from ..models.probed import ProbedModel, as_probed
from .attention import attention_reading, readable_layers
from .gradient import chosen_parameters, gradient_reading
from .pairs.pairs import ReversalPairs
from .passes.plan import Plan, Progress, Share
from .passes.run import run_pass
from .passes.selection import listed
from .probability import probability_reading
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


@checked
def probe(
    model: ProbedModel | nn.Module,
    pairs: ReversalPairs,
    *,
    only: Sequence[str] | None = None,
    parameters: Sequence[str] | None = None,
    mode: str = "chain",
    batch_size: int | None = None,
    layers: Iterable[int] | None = None,
    control: bool = True,
    progress: Progress | None = None,
    seed: int = 0,
    share: Share | None = None,
) -> Readings:
    """Attention correlation, gradient cosine and reverse probability of the same pairs, from one run of each query.

    The numbers are those of the three probes run alone; see there for what they mean. `only` names some of
    "attention", "gradient", "probability". `share` divides the work among processes (see
    `finetune.training.distributed`); each of them gets all readings.
    Raises: RevprobeError, for an unknown probe, and whatever the single probes raise.
    """
    model = as_probed(model)
    wanted = list(PROBES) if only is None else require_probes(only)
    if not wanted:
        raise RevprobeError(f"no probe was named; expected some of {', '.join(PROBES)}")
    if layers is not None:
        layers = readable_layers(model, layers) if "attention" in wanted else listed("layer", layers)
    names = chosen_parameters(model, parameters, layers) if "gradient" in wanted else None
    plan = Plan(
        **{name: name in wanted for name in PROBES},
        mode=mode,
        parameters=names,
        control=control,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
        share=share,
    )
    result = run_pass(model, pairs, plan)
    makers = {
        "attention": lambda: attention_reading(model, result, plan, layers),
        "gradient": lambda: gradient_reading(model, result, plan),
        "probability": lambda: probability_reading(model, result, plan),
    }
    return Readings(makers[name]() for name in PROBES if name in wanted)
