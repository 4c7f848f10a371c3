"""From correlation to cause: cut the route to the evidence, and give the reverse query the forward query's route.

    python examples/route_edits.py runs/one-layer-quick/rope-l10-s0 runs/one-layer-quick/alibi-l10-s0 --out findings

Two predictions about a letters run, reported whatever comes out, one row per run and measure:

1. Knocking out the route takes the reverse probability to that of the same query with its evidence replaced: by the
   evidence of every other fact in turn, by the placeholder, by the mask token (masked models).
2. Giving the reverse query the forward query's log-odds on the evidence closes part of the gap between the two.

How much of this is algebra: with ONE layer a cut query cannot tell which evidence it holds. And where values do not
depend on position (RoPE, ALiBi) and all other tokens are placeholders, the answer depends on the evidence's weight
and on how the rest is split between placeholders and the mask itself, so the transplant can miss the gap by that
split only. What could have come out otherwise there is the size of the gap; with an absolute encoding, or more
layers, the share as well.

Pairs are mirrored placements, so that forward and reverse stand at equal distances and every placement counts once.
All numbers are means over pairs with 95 % intervals over letters; probabilities are fractions, changes nats.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

import revprobe as rp
from revprobe.atomic_files import write_text
from revprobe.probes.pairs.query import Query
from revprobe.probes.statistics.intervals import FRACTION, Estimate, mean_over_facts, ratio_over_facts

PLACEHOLDER = "0"
ROUNDING = 1e-5  # nats; a smaller gap is the rounding of float32 logits (ALiBi's two queries are mirror images)
GAP = "gap: forward less reverse log-probability"
SHARE = "share of the gap closed, forward route"
SHARE_CONTROL = "share of the gap closed, same shift elsewhere (control)"


def findings(path: Path, weights: str | None, step: int) -> pd.DataFrame:
    """Both findings for one run folder: measure, value, low, high, n, and where they come from."""
    model = rp.load_model(path, step=step, weights=weights)
    relation = rp.open_run(path).config.relation
    pairs = rp.letter_pairs(relation.length, model=model, placements="mirror", alphabet=relation.alphabet)
    cut = rp.probe_route_edit(model, pairs, edit="knockout", scope="all")
    moved = rp.probe_route_edit(model, pairs, edit="transplant", scope="all")
    matched = rp.probe_route_edit(model, pairs, edit="transplant", match="score", scope="all")
    rows = [*knockout_rows(model, pairs, cut), *gap_rows(moved)]
    rows += [*transplant_rows(moved, "log-odds"), *transplant_rows(matched, "score")]
    table = pd.DataFrame([{"measure": name, **vars(estimate)} for name, estimate in rows])
    return table.assign(run=path.name, step=model.step, weights=model.weights, kind=pairs.kind)


def knockout_rows(model: rp.ProbedModel, pairs: rp.ReversalPairs, cut: rp.Reading) -> list[tuple[str, Estimate]]:
    """The cut query beside the same query with other evidence: probabilities, and differences of log-probability."""
    frame = direction_rows(cut, "reverse")
    facts = frame["fact"].to_numpy().astype(str)
    mean = lambda values: mean_over_facts(np.asarray(values, dtype=float), facts)  # noqa: E731
    rows = [
        ("reverse probability", mean_probability(frame["log_probability"], facts)),
        ("reverse probability, route cut", mean_probability(frame["log_probability_edited"], facts)),
        ("reverse probability, another route cut (control)", mean_probability(frame["log_probability_control"], facts)),
        ("change of log-probability, route cut", mean(frame["change"])),
        ("change of log-probability, another route cut (control)", mean(frame["change_control"])),
    ]
    for name, logs in replaced_log_probabilities(model, pairs).items():
        probability = mean_probability(np.log(np.exp(logs).mean(0)), facts)
        rows.append((f"reverse probability, evidence replaced by {name}", probability))
        difference = frame["log_probability_edited"].to_numpy() - logs.mean(0)
        rows.append((f"log-probability, route cut less evidence replaced by {name}", mean(difference)))
        distance = np.exp(frame["log_probability_edited"].to_numpy()) - np.exp(logs).mean(0)
        rows.append((f"probability, route cut less evidence replaced by {name}", mean(distance)))
    return rows


def replaced_log_probabilities(model: rp.ProbedModel, pairs: rp.ReversalPairs) -> dict[str, np.ndarray]:
    """Log-probability of each pair's target under its reverse query with other evidence: name -> `version pair`."""
    own = [pairs.queries[q].evidence for q in pairs.reverse]
    everyone = sorted(set(own))
    versions: dict[str, list[list[tuple[int, ...]]]] = {
        # Turned by k, every pair meets the evidence of another fact, and over all k that of every other fact.
        "another fact's": [
            [everyone[(everyone.index(one) + k) % len(everyone)] for one in own] for k in range(1, len(everyone))
        ],
        "the placeholder": [[(model.tokenizer.convert_tokens_to_ids(PLACEHOLDER),)] * len(own)],
    }
    if model.objective == "masked":
        versions["the mask token"] = [[(model.mask_token_id,)] * len(own)]
    return {
        name: np.stack([reverse_log_probability(model, pairs, tokens) for tokens in each])
        for name, each in versions.items()
    }


def reverse_log_probability(
    model: rp.ProbedModel, pairs: rp.ReversalPairs, evidence: list[tuple[int, ...]]
) -> np.ndarray:
    """The reverse queries with other tokens as evidence. Shapes: `-> pair`, nats."""
    queries = []
    for q, tokens in zip(pairs.reverse, evidence, strict=True):
        query = pairs.queries[q]
        ids = list(query.token_ids)
        for position, token in zip(query.evidence_positions, tokens, strict=True):
            ids[position] = token
        queries.append(Query.unchecked(ids, query.target_positions, query.evidence_positions))
    index = np.arange(len(pairs))
    asked = replace(pairs, queries=tuple(queries), forward=index, reverse=index)
    frame = rp.probe_reverse_probability(model, asked, control=False).frame
    return frame[frame["direction"] == "reverse"].sort_values("pair")["log_probability"].to_numpy()


def gap_rows(moved: rp.Reading) -> list[tuple[str, Estimate]]:
    """How far the reverse query falls behind the forward one, without any edit."""
    forward, reverse = direction_rows(moved, "forward"), direction_rows(moved, "reverse")
    facts = reverse["fact"].to_numpy().astype(str)
    logs = forward["log_probability"].to_numpy(), reverse["log_probability"].to_numpy()
    return [
        ("forward probability", mean_probability(logs[0], facts)),
        (GAP, mean_over_facts(logs[0] - logs[1], facts)),
    ]


def transplant_rows(moved: rp.Reading, matched: str) -> list[tuple[str, Estimate]]:
    """What the other direction's route does to a query, for the reverse one as a share of the gap."""
    forward, reverse = direction_rows(moved, "forward"), direction_rows(moved, "reverse")
    facts = reverse["fact"].to_numpy().astype(str)
    gap = forward["log_probability"].to_numpy() - reverse["log_probability"].to_numpy()
    edited, change, control = (
        reverse[column].to_numpy() for column in ("log_probability_edited", "change", "change_control")
    )
    rows = [
        ("reverse probability, forward route", mean_probability(edited, facts)),
        ("change of reverse log-probability, forward route", mean_over_facts(change, facts)),
        ("change of reverse log-probability, same shift elsewhere (control)", mean_over_facts(control, facts)),
        (SHARE, ratio(change, gap, facts)),
        (SHARE_CONTROL, ratio(control, gap, facts)),
        ("change of forward log-probability, reverse route", mean_over_facts(forward["change"].to_numpy(), facts)),
    ]
    return [(f"{name} [{matched}]", estimate) for name, estimate in rows]


def direction_rows(reading: rp.Reading, direction: str) -> pd.DataFrame:
    """The whole-route rows of one direction, in the order of the pairs."""
    frame = reading.frame
    return frame[(frame["direction"] == direction) & (frame["scope"] == "all")].sort_values("pair")


def mean_probability(logs: np.ndarray | pd.Series, facts: np.ndarray) -> Estimate:
    """The mean probability behind log-probabilities, its interval between 0 and 1."""
    return mean_over_facts(np.exp(np.asarray(logs, dtype=float)), facts, bounds=FRACTION)


def ratio(part: np.ndarray, whole: np.ndarray, facts: np.ndarray) -> Estimate:
    """Sum over sum, its interval over facts; NaN where the whole's interval holds zero: no gap to close."""
    defined = np.isfinite(part) & np.isfinite(whole)
    gap = mean_over_facts(whole[defined], facts[defined])
    if not gap.low * gap.high > 0 or abs(gap.value) < ROUNDING:
        return Estimate.undefined(int(defined.sum()), gap.facts)
    return ratio_over_facts(part, whole, facts)


def verdicts(table: pd.DataFrame) -> list[str]:
    """The two predictions in words, with their numbers."""
    row = table.set_index("measure")
    show = lambda name: f"{row.value[name]:.3g} [{row.low[name]:.3g}, {row.high[name]:.3g}]"  # noqa: E731
    cut, plain = "reverse probability, route cut", "reverse probability"
    lines = [f"1. cutting the route: P(target | reverse) {show(plain)} -> {show(cut)}"]
    for name in (n for n in table["measure"] if n.startswith("probability, route cut less")):
        replaced = name.split("replaced by ")[1]
        same = row.low[name] <= 0 <= row.high[name]
        lines.append(
            f"   with {replaced} evidence: {show(f'reverse probability, evidence replaced by {replaced}')}; difference "
            f"{show(name)}, which {'includes' if same else 'excludes'} 0"
        )
    share, control = f"{SHARE} [log-odds]", f"{SHARE_CONTROL} [log-odds]"
    if np.isnan(row.value[share]):
        return [*lines, f"2. the forward route: there is no gap to close, {show(GAP)} nats"]
    more = "more" if row.low[share] > max(0.0, row.high[control]) else "not more"
    shown = f"{show(share)} of a gap of {show(GAP)} nats"
    return [*lines, f"2. the forward route closes {shown}, {more} than the same shift elsewhere, {show(control)}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders of the letters relation")
    parser.add_argument("--weights", choices=["raw", "ema"], help="EMA where the run has it, else raw")
    parser.add_argument("--step", type=int, default=-1, help="the checkpoint; -1 is the last")
    parser.add_argument("--out", type=Path, help="a folder for route_edits.csv")
    arguments = parser.parse_args()
    tables = []
    for path in arguments.runs:
        table = findings(path, arguments.weights, arguments.step)
        tables.append(table)
        first = table.iloc[0]
        print(f"\n{first['run']}, step {first['step']}, {first['weights']} weights, {first['kind']} pairs")
        print(table[["measure", "value", "low", "high", "n", "facts"]].to_string(index=False, float_format="%.4f"))
        print("\n".join(verdicts(table)))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        # Significant digits: the ends of an interval stay apart.
        text = pd.concat(tables, ignore_index=True).to_csv(index=False, lineterminator="\n", float_format="%.7g")
        write_text(arguments.out / "route_edits.csv", text)


if __name__ == "__main__":
    main()
