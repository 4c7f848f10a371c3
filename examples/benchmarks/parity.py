"""The three probes against slow computations on every architecture of transformers; writes docs/tried.md.

    python examples/benchmarks/parity.py              # all that can be built tiny, under ten minutes of one core
    python examples/benchmarks/parity.py bert llama   # these model types only; the page is not written

A number is right if it differs by at most 1e-4 from what `parity_references` works out without the package. Whatever
else comes out is a refusal with its reason, or WRONG, which ends the script with exit status 1.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from parity_adapters import SAVED, adapted_models, saved
from parity_checks import CHECKS, PROBES, REFUSED, RIGHT, WRONG, Outcome, questions
from tiny_architectures import MASK, NotTiny, OutOfTime, architectures, at_most, tiny_model
from torch import nn

import revprobe as rp

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tried.md"
MOST_RUNS, MOST_TOKENS = 6, 36  # what wrapping may cost: forward passes, and token ids in one
SECONDS = 60  # for one model
LONGEST = 150  # characters of a reason in the table


@dataclass
class Tried:
    """One model: what each probe said, what `diagnose` said of them, and what wrapping cost."""

    name: str
    objective: str
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    said: dict[str, bool] = field(default_factory=dict)
    runs: int = 0
    tokens: int = 0
    note: str = ""

    @property
    def faults(self) -> list[str]:
        """All that must not be: wrong numbers, raw errors, a verdict of `diagnose` that differs, a costly wrapping."""
        found = [f"{probe}: {one}" for probe, one in self.outcomes.items() if one.kind == WRONG]
        kinds = {probe: one.kind for probe, one in self.outcomes.items() if probe in self.said}
        found += [f"diagnose on {probe}: {self.said[probe]}, found {k}" for probe, k in kinds.items()
                  if k in (RIGHT, REFUSED, WRONG) and self.said[probe] != (k == RIGHT)]  # fmt: skip
        costly = self.runs > MOST_RUNS or self.tokens > MOST_TOKENS
        return found + ([f"wrapping takes {self.runs} runs, the largest of {self.tokens} tokens"] if costly else [])


def try_model(name: str, objective: str, module: nn.Module, wrap: Callable[[], rp.ProbedModel] | None = None) -> Tried:
    """Wrap a module, count what that costs, and hold each probe and `diagnose` against the references.

    Args:
        wrap: makes what is probed, where that is not the module itself; the module stays the reference.
    """
    told: dict[str, Any] = {"mask_token_id": MASK, "logit_shift": 0} if objective == "masked" else {}
    tried, sizes = Tried(name, objective), list[int]()

    def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        sizes.append(0 if ids is None else ids.numel())

    counting = module.register_forward_pre_hook(count, with_kwargs=True)  # copies of the module carry it along
    try:
        model = wrap() if wrap else rp.ProbedModel(module, objective=objective, **told)
    except Exception as error:
        tried.outcomes = dict.fromkeys(PROBES, raised(error))
        return tried
    finally:
        counting.remove()
        tried.runs, tried.tokens = len(sizes), max(sizes, default=0)
    tables = [questions(objective, even) for even in (False, True)]
    for probe, check in CHECKS.items():
        try:
            found = [check(model, pairs, asked, module) for asked, pairs in tables]
            tried.outcomes[probe] = max(found, key=lambda one: (one.kind == WRONG, one.error))
        except Exception as error:
            tried.outcomes[probe] = raised(error)
    try:
        tried.said = dict(rp.diagnose(model).probes)
    except Exception as error:
        tried.outcomes["diagnose"] = raised(error)
    tried.note = "batches of equal lengths" if model.contract.equal_lengths else ""
    return tried


def raised(error: Exception) -> Outcome:
    """A refusal by name is an answer; any other exception is a fault."""
    text = " ".join(str(error).split())
    if isinstance(error, rp.RevprobeError):
        return Outcome(REFUSED, reason=text)
    return Outcome(WRONG, reason=f"{type(error).__name__}: {text}")


def within_time(name: str, objective: str, *args: Any) -> Tried:
    try:
        with at_most(SECONDS):
            return try_model(name, objective, *args)
    except OutOfTime as error:
        return Tried(name, objective, dict.fromkeys(PROBES, Outcome("left out", reason=str(error))))


def try_architectures(only: set[str], unbuilt: dict[str, str]) -> Iterator[Tried]:
    """All architectures, a class once for each objective; those that cannot be built go to `unbuilt`, with why."""
    done = set[tuple[str, str]]()
    for objective, kind, name in architectures():
        if (only and not only & {kind, name}) or (objective, name) in done:
            continue
        try:
            module = tiny_model(objective, kind, name)
        except NotTiny as error:
            unbuilt[f"{name} ({objective})"] = str(error)
            continue
        done.add((objective, name))
        unbuilt.pop(f"{name} ({objective})", None)
        yield within_time(name, objective, module)


def try_adapters(unbuilt: dict[str, str]) -> Iterator[Tried]:
    """Adapters on a module in memory, then some of them loaded from the folders they were saved in."""
    for label, objective, module in adapted_models():
        if isinstance(module, Exception):
            unbuilt[f"{label} ({objective})"] = f"{type(module).__name__}: {module}"
        else:
            yield within_time(label, objective, module)
    for label in SAVED:
        with tempfile.TemporaryDirectory() as folder:
            module, path = saved("causal", label, Path(folder))
            load = lambda path=path: rp.load_model(str(path), objective="causal")  # noqa: E731
            yield within_time(f"{label}, by load_model", "causal", module, load)


# --- the page -------------------------------------------------------------------------------------------------------


def cell(outcome: Outcome | None) -> str:
    text = str(outcome) if outcome is not None else ""
    text = text if len(text) <= LONGEST else f"{text[: LONGEST - 4].rstrip()} ..."
    return text.replace("|", "\\|").replace("<", "&lt;")


def table(tried: list[Tried]) -> str:
    lines = ["| model | objective | probability | attention | gradient | note |", "|---|---|---|---|---|---|"]
    for one in tried:
        cells = [one.name, one.objective, *(cell(one.outcomes.get(probe)) for probe in PROBES), one.note]
        if len({str(o) for o in one.outcomes.values()}) == 1 and one.outcomes["probability"].kind == REFUSED:
            cells[2:5] = [cell(one.outcomes["probability"]), "the same", "the same"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def counted(tried: list[Tried]) -> str:
    rows = ["| probe | right | refused | left out | wrong |", "|---|---|---|---|---|"]
    for probe in PROBES:
        kinds = Counter(one.outcomes[probe].kind for one in tried)
        rows.append(f"| {probe} | " + " | ".join(str(kinds[k]) for k in (RIGHT, REFUSED, "left out", WRONG)) + " |")
    return "\n".join(rows)


def verdicts(tried: list[Tried]) -> str:
    """What was found of `diagnose` and of the cost of wrapping, and where it is not as it should be."""
    said = [one for one in tried if one.said]
    apart = [f"{one.name} ({fault})" for one in said for fault in one.faults if fault.startswith("diagnose")]
    costly = [f"{one.name} ({one.runs} passes)" for one in tried if one.runs > MOST_RUNS or one.tokens > MOST_TOKENS]
    same = len(said) - len({one.split(" (")[0] for one in apart})
    return (
        f"`revprobe.diagnose` was asked of the {len(said)} models that could be wrapped, and gave the same verdict on "
        f"{same}; it differed on: {', '.join(apart) or 'none'}.\n\nWrapping should take at most {MOST_RUNS} forward "
        f"passes of at most 3 x 12 tokens; it takes more of: {', '.join(costly) or 'none'}."
    )


def page(models: list[Tried], adapters: list[Tried], unbuilt: dict[str, str]) -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "peft"))
    reasons = "\n".join(f"| {name} | {cell(Outcome('', reason=why))[2:]} |" for name, why in sorted(unbuilt.items()))
    return f"""# What was tried

Every causal and masked language model of transformers that can be built with a handful of units, with noise on every
weight, on five facts of unequal lengths and five of equal ones. Written by `python examples/benchmarks/parity.py` on
{datetime.date.today().isoformat()} with {versions}, in float32 on a CPU.

A number is "right" when it differs by at most 1e-4 from one that shares nothing with the package: probabilities from a
run of each query alone and a log-softmax in float64 (relative), gradient norms and inner products from
`torch.autograd.grad` over all parameters, one query after the other, attention weights from the model's own eager
attention, and differences of the scores of two columns from those of its log-weights. The largest error is in brackets.
"refused" is an error, or a reason in place of every number, that says why; "left out" means that there was nothing to
compare with.

{verdicts(models + adapters)}

## Architectures

{len(models)} classes:

{counted(models)}

{table(models)}

## Adapters

Of peft, on a Llama and a BERT, with noise on the adapter's weights; the right value is of peft's own forward pass. The
last ones were saved and came back through `load_model`.

{counted(adapters)}

{table(adapters)}

## Not built

What the script's small sizes do not make, and why; nothing is known of these.

| model | reason |
|---|---|
{reasons}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", help="model types or classes; 'adapters' for those; all when left out")
    only = set(parser.parse_args().only)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    unbuilt: dict[str, str] = {}
    found: list[list[Tried]] = [[], []]
    for place, source in enumerate((try_architectures(only, unbuilt), try_adapters(unbuilt))):
        if place == 1 and only and "adapters" not in only:
            break
        for one in source:
            found[place].append(one)
            said = " | ".join(str(outcome)[:LONGEST] for outcome in one.outcomes.values())
            print(f"{'FAULT' if one.faults else 'ok'} {one.name} ({one.objective}): {said}", *one.faults, flush=True)
    if not only:
        PAGE.write_text(page(*found, unbuilt), encoding="utf-8")
    return int(any(one.faults for tried in found for one in tried))


if __name__ == "__main__":
    sys.exit(main())
