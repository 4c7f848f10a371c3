"""The verdicts of Section 6 in miniature, once more: plain pandas on the tables, by the words of the YAML alone.

Nothing here asks the package how to judge. Made tables now; whatever runs are committed, both must say the same.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from made_section6 import made

from revprobe.finetune.config.finetuning import FinetuneSweepConfig
from revprobe.finetune.config.loading import load_config
from revprobe.report.paper.section6.ablations import NOT_PREDICTED, PREDICTIONS, ablation_claims
from revprobe.report.paper.section6.frames import Section6
from revprobe.report.paper.section6.main_claims import main_claims
from revprobe.report.paper.section6.other_claims import other_claims
from revprobe.report.paper.section6.plan import DATASETS, DROP_ORDER, EXEMPT_MODELS, PLANNED, SEEDS, TABLE_MODELS
from revprobe.report.paper.section6.sentences import Told

PLAIN = {"sweep": "section6", "model": "mini-llada", "dataset": "parent-child", "direction": "P2C", "variant": ""}
LIMIT = 1e-6


def only(table: pd.DataFrame, **chosen: object) -> pd.DataFrame:
    chosen.setdefault("variant", "")
    keys = list(chosen)
    asked = (id(table), *keys)
    if asked not in GROUPED:  # the table is kept too, so that no other gets its id
        GROUPED[asked] = (table, dict(list(table.groupby(keys, sort=False))))
    return GROUPED[asked][1].get(tuple(chosen.values()), table.iloc[:0])


GROUPED: dict[tuple[object, ...], tuple[pd.DataFrame, dict[object, pd.DataFrame]]] = {}


def at_end(found: Section6, asked: str, seed: int, **cell: object) -> float | None:
    """Exact match on trained facts in the last row of a finished run; None of another."""
    run = only(found.runs, seed=seed, **cell)
    if run.empty or run["status"].iloc[0] != "finished":
        return None
    rows = only(found.answers, seed=seed, asked=asked, split="train", **cell)
    rows = rows[rows["step"] == run["steps"].iloc[0]]
    return float(rows["value"].iloc[0]) if len(rows) else np.nan


def of_ablation(found: Section6, variant: str, asked: str, seed: int) -> float | None:
    cell = PLAIN | ({} if variant == "plain" else {"sweep": "section6-ablations", "variant": variant})
    return at_end(found, asked, seed, **cell)


def ablation_verdict(found: Section6, variant: str, seed: int) -> str:
    reverse = of_ablation(found, variant, "reverse", seed)
    forward = of_ablation(found, variant, "forward", seed)
    if reverse is None or forward is None:
        return "not run"
    if not variant.startswith("never-") and not forward >= 0.9 - LIMIT:
        return "cannot be told"
    plain = of_ablation(found, "plain", "reverse", seed)
    keep = of_ablation(found, "bare-keep", "reverse", seed)
    plain, keep = (np.nan if value is None else value for value in (plain, keep))
    signatures = only(
        found.signatures, sweep="section6-ablations", variant=variant, seed=seed, measure="forward_accuracy"
    )
    in_place = signatures.sort_values("step")["value"].iloc[-1] if len(signatures) else np.nan
    # Each: a number, and the lowest and the highest that it may be, with whether the end itself may be.
    ranges = {
        "whole-entity": [(reverse - plain, LIMIT * 2, 9)],
        "one-span": [(reverse - plain, LIMIT * 2, 9)],
        "never-first": [(reverse, -9, 0.05), (in_place, -9, 0.05)],
        "never-second": [(forward, -9, 0.05), (reverse - plain, -0.10, 0.10)],
        "response-only": [(reverse, -9, 0.05)],
        "end-unpriced": [(reverse - plain, -0.10, 0.10)],
        "bare-keep": [(reverse, -9, 0.20 - 2 * LIMIT)],
        "bare-drop-right": [(reverse - keep, 0.20, 9)],
        "bare-mirror": [(reverse - keep, -0.10, 0.10)],
        "absolute": [(reverse - plain, -9, -LIMIT * 2)],
        "low-rates": [(reverse - plain, -9, -LIMIT * 2)],
        "high-rates": [(reverse - plain, -0.05, 9)],
        "read-both": [(reverse - plain, 0.20, 9)],
        "read-forward": [(reverse, -9, 0.05)],
    }[variant]
    if any(value < low - LIMIT or value > high + LIMIT for value, low, high in ranges):
        return "fails"
    return "cannot be told" if any(np.isnan(value) for value, _, _ in ranges) else "holds"


TABLES = {f"made {draw}": made(draw) for draw in range(2)} | {"made whole": made(9, gaps=False)}


@pytest.fixture(params=[*TABLES, "committed"])
def found(request: pytest.FixtureRequest, root: Path) -> Section6:
    return TABLES[request.param] if request.param in TABLES else Section6.read(root / "examples" / "results")


def test_every_ablation_by_seed(found: Section6) -> None:
    said = {claim.name: {one.seed: one.verdict for one in claim.seeds} for claim in ablation_claims(found)}
    for variant in PREDICTIONS:
        assert said[variant] == {seed: ablation_verdict(found, variant, seed) for seed in SEEDS}, variant


def main(found: Section6, model: str, dataset: str, direction: str, seed: int, asked: str = "reverse") -> float | None:
    return at_end(found, asked, seed, sweep="section6", model=model, dataset=dataset, direction=direction, variant="")


def not_learned(found: Section6, models: list[str], dataset: str, direction: str, seed: int) -> bool:
    forward = [
        main(found, model, dataset, direction, seed, "forward") for model in models if model not in EXEMPT_MODELS
    ]
    return any(not value >= 0.9 - LIMIT for value in forward if value is not None)


def t1(found: Section6, dataset: str, direction: str, seed: int) -> str:
    models = ["mini-llada", "mini-dream", "mini-llama", "mini-qwen2"]
    values = [main(found, model, dataset, direction, seed) for model in models]
    if any(value is None for value in values):
        return "not run"
    if not_learned(found, models, dataset, direction, seed):
        return "cannot be told"
    llada, dream, llama, qwen = (float(value) for value in values if value is not None)
    apart = np.array([llada - llama, llada - qwen, dream - llama, dream - qwen])
    return "fails" if (apart <= LIMIT).any() else "cannot be told" if np.isnan(apart).any() else "holds"


def t2(found: Section6, model: str, dataset: str, direction: str, seed: int) -> str:
    value = main(found, model, dataset, direction, seed)
    if value is None:
        return "not run"
    if not_learned(found, [model], dataset, direction, seed) or np.isnan(value):
        return "cannot be told"
    return "holds" if value <= 0.05 + LIMIT else "fails"


def t3(found: Section6, dataset: str, direction: str, seed: int) -> str:
    mlm, llada = (main(found, model, dataset, direction, seed) for model in ("mini-mlm", "mini-llada"))
    if mlm is None or llada is None:
        return "not run"
    if not_learned(found, ["mini-llada"], dataset, direction, seed) or not llada > 0.05 + LIMIT or np.isnan(mlm):
        return "cannot be told"
    return "holds" if mlm >= llada / 2 - LIMIT else "fails"


def reached(found: Section6, model: str, dataset: str, direction: str, seed: int) -> int | None:
    chosen = {"sweep": "section6", "model": model, "dataset": dataset, "direction": direction, "variant": ""}
    rows = only(found.answers, seed=seed, asked="forward", split="train", **chosen)
    steps = rows.loc[rows["value"] >= 0.9 - LIMIT, "step"]
    return int(steps.min()) if len(steps) else None


def t4(found: Section6, model: str, dataset: str, direction: str, seed: int) -> str:
    if main(found, model, dataset, direction, seed) is None:
        return "not run"
    start = reached(found, model, dataset, direction, seed)
    if start is None or not_learned(found, [model], dataset, direction, seed):
        return "cannot be told"
    rows = only(found.signatures, sweep="section6", model=model, dataset=dataset, direction=direction, seed=seed)
    rows = rows[(rows["step"] >= start) & rows["measure"].isin(["attention_correlation", "gradient_cosine"])]
    if (rows["excess"] <= LIMIT).any():
        return "fails"
    return "holds" if len(rows) and (rows["excess_low"] > LIMIT).all() else "cannot be told"


def t5(found: Section6, model: str, dataset: str, direction: str, seed: int) -> str:
    if main(found, model, dataset, direction, seed) is None:
        return "not run"
    start = reached(found, model, dataset, direction, seed)
    if start is None or not_learned(found, [model], dataset, direction, seed):
        return "cannot be told"
    chosen = {"sweep": "section6", "model": model, "dataset": dataset, "direction": direction, "variant": ""}
    rows = only(found.answers, seed=seed, asked="reverse", split="train", **chosen).sort_values("step")
    curve = rows.loc[rows["step"] >= start, "value"].astype(float)
    if len(curve) < 2:
        return "cannot be told"
    if ((curve.cummax() - curve) > 0.20 + LIMIT).any():
        return "fails"
    return "cannot be told" if curve.isna().any() else "holds"


def test_the_main_tables_predictions_by_seed(found: Section6) -> None:
    said = {(claim.name, claim.cell): {one.seed: one.verdict for one in claim.seeds} for claim in main_claims(found)}
    expected = {}
    for dataset, direction in DATASETS:
        of_dataset = f"{dataset} ({direction})"
        if dataset == "parent-child":
            expected["T1", of_dataset] = {seed: t1(found, dataset, direction, seed) for seed in SEEDS}
        expected["T3", of_dataset] = {seed: t3(found, dataset, direction, seed) for seed in SEEDS}
        for model in TABLE_MODELS:
            rules = {"T5": t5} | ({"T2": t2} if model in ("mini-llama", "mini-qwen2") else {"T4": t4})
            for name, rule in rules.items():
                own = {seed: rule(found, model, dataset, direction, seed) for seed in SEEDS}
                expected[name, f"{model}, {of_dataset}"] = own
    assert said == expected


def test_what_the_paper_says_by_seed(found: Section6) -> None:
    """Which side of Table 7 is higher; the numbers once more as the paper's text has them."""
    printed = """76.7 48.3 62.0 50.0 89.9 15.9 89.9 0.5|87.7 43.7 83.0 54.0 95.9 6.9 89.0 1.4
    |72.7 99.5 54.3 99.8 72.7 3.5 70.7 2.2|99.7 41.3 100.0 27.2 83.0 1.8 80.0 1.5
    |92.3 81.5 83.0 35.0 87.3 2.8 89.8 2.3"""
    said = {
        claim.cell: {one.seed: one.verdict for one in claim.seeds}
        for claim in other_claims(found)
        if claim.name == "side"
    }
    assert len(said) == 20
    for line, (dataset, direction) in zip(printed.split("|"), DATASETS, strict=True):
        numbers = [float(number) for number in line.split()]
        for place, model in enumerate(["mini-llada", "mini-dream", "mini-llama", "mini-qwen2"]):
            higher = np.sign(numbers[2 * place] - numbers[2 * place + 1])
            for seed in SEEDS:
                both = [main(found, model, dataset, direction, seed, asked) for asked in ("forward", "reverse")]
                if both[0] is None or both[1] is None:
                    expected = "not run"
                else:
                    apart = higher * (both[0] - both[1])
                    told = not np.isnan(apart) and both[0] >= 0.9 - LIMIT
                    expected = "cannot be told" if not told else "holds" if apart > LIMIT else "fails"
                assert said[f"{model}, {dataset} ({direction})"][seed] == expected


def test_a_cell_that_never_learned_forward_contradicts_nobody(found: Section6) -> None:
    """Whatever a source says of a cell: below 90 % forward in a seed it neither holds nor fails there."""
    for claim in other_claims(found):
        model, _, rest = claim.cell.rpartition(", ")
        label, direction = (rest or claim.cell).rstrip(")").split(" (")
        if claim.name == "outvoted":
            forward = {seed: of_ablation(found, "bare-keep", "forward", seed) for seed in SEEDS}
            low = {seed for seed, value in forward.items() if value is not None and not value >= 0.9 - LIMIT}
        else:
            models = [model] if model else ["mini-llada", "mini-dream", "mini-llama", "mini-qwen2"]
            low = {seed for seed in SEEDS if not_learned(found, models, label, direction, seed)}
        said = {one.verdict for one in claim.seeds if one.seed in low}
        assert said <= {"cannot be told", "not run"}, (claim.name, claim.cell, low)


def test_made_tables_meet_every_verdict() -> None:
    """The comparison above would prove little on tables in which one word is never said."""
    tables = [*TABLES.values(), *(made(draw) for draw in range(10, 16))]
    said: dict[str, set[str]] = {name: set() for name in [*PREDICTIONS, "T1", "T2", "T3", "T4", "T5"]}
    for found in tables:
        for claim in (*ablation_claims(found), *main_claims(found)):
            if claim.name in said:
                said[claim.name] |= set(claim.verdicts)
    # Some claims seldom meet some words: what needs no forward answer can be told, four models are rarely in order.
    for word in ("holds", "fails", "cannot be told", "not run"):
        assert sum(word in words for words in said.values()) >= 0.7 * len(said), (word, said)
    assert all(len(words) >= 2 for words in said.values()), said


def test_the_plan_is_that_of_the_yaml(root: Path) -> None:
    """Models, datasets, seeds, variants, exempt cells and the words of every prediction."""
    main_text = (root / "examples" / "section6.yaml").read_text()
    main_yaml = yaml.safe_load(main_text)
    assert set(main_yaml["models"]) == set(TABLE_MODELS) and tuple(main_yaml["seeds"]) == SEEDS
    datasets = [(name, direction) for name, one in main_yaml["datasets"].items() for direction in one["directions"]]
    assert datasets == [tuple(trained) for trained in DATASETS]
    for claim in ("T1", "T2", "T3", "T4", "T5"):
        assert f"#   {claim}  " in main_text
    text = (root / "examples" / "section6_ablations.yaml").read_text()
    values = yaml.safe_load(text)
    assert set(values["variants"]) == {*PREDICTIONS, *NOT_PREDICTED}
    assert tuple(values["seeds"]) == SEEDS and values["datasets"]["parent-child"]["directions"] == ["P2C"]
    predicted = [line.split()[1] for line in text.splitlines() if line.startswith("#   ") and line[4] != " "]
    planned = {name: len(load_config(name, FinetuneSweepConfig).runs()) for name in PLANNED}
    assert planned == PLANNED and list(PLANNED) == list(DROP_ORDER)
    assert predicted == list(PREDICTIONS), "each prediction of the YAML is judged, and no other"


@pytest.mark.parametrize(("value", "said"), [(0.0, True), (0.04, True), (0.5, False)])
def test_a_floor_that_decides_predictions_by_itself_is_told(value: float, said: bool) -> None:
    """At 0 % nothing is below plain, and what was foretold to be at the floor is: neither says what the recipe does."""
    found = made()
    answers = found.answers.copy()
    plain = (answers[list(PLAIN)] == pd.Series(PLAIN)).all(axis=1) & (answers["asked"] == "reverse")
    assert plain.any(), "plain's reverse answers are in the made tables"
    answers.loc[plain, "value"] = value
    assert ("Plain itself is at the floor" in Told(replace(found, answers=answers)).recipe()) is said
