"""Objective terms of fine-tunings: the rows, the rates and the parameters are those that the run trains."""

import itertools
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from scipy import integrate

import revprobe as rp
from revprobe.finetune.analysis import masked_samples
from revprobe.finetune.analysis.asked_terms import asked_terms
from revprobe.finetune.analysis.mask_sets import MaskLaw
from revprobe.finetune.analysis.masked_samples import Objective
from revprobe.finetune.config.finetuning import FinetuneConfig, TinyModel
from revprobe.finetune.config.loading import dump_config, parse_config
from revprobe.finetune.pretraining.layouts import untrained
from revprobe.finetune.runs.finetune_setup import prepare
from revprobe.finetune.runs.finetuning import FinetuneRun
from revprobe.finetune.training.dataset import RowOptions, StatementRows
from revprobe.finetune.training.distributed import ProcessGroup
from tiny import drawn, word_tokenizer

TEXT = """
name: tiny
model: {tiny: {layout: llada, d_model: 16, n_heads: 2, pretraining: {steps: 2, facts: 8, batch_size: 8}}}
relation: {name: invented_names, rows: [60, 68], heldout: 0.0, direction: P2C}
lora: {rank: 2, alpha: 4}
training: {steps: 2, batch_size: 4, learning_rate: 1.0e-2, device: cpu}
snapshots: {every: 2, facts: 3, predictions: false, during_training: false}
evaluation: {facts: 0}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> FinetuneRun:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    return rp.fine_tune(parse_config(TEXT, FinetuneConfig, "test"), folder, listener=False)


def with_objective(run: FinetuneRun, options: dict[str, Any], folder: Path) -> FinetuneRun:
    """The same folder, as if its config had asked for this objective."""
    shutil.copytree(run.path, folder / "tiny")
    config = FinetuneConfig.model_validate(run.config.model_dump() | {"objective": options})
    (folder / "tiny" / "config.yaml").write_text(dump_config(config))
    return FinetuneRun(folder / "tiny")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"eps": 0.3},
        {"rates": [0.15, 0.15]},
        {"rates": [0.2, 0.6], "whole_entity": True},
        {"never_mask": "first"},
        {"never_mask": "second", "eps": 0.1},
        {"end_padding": "absent", "antithetic": True},
        {"end_padding": "unpriced", "scope": "response_only"},
    ],
)
def test_rows_and_rates_are_those_of_the_runs_own_trainer(
    run: FinetuneRun, options: dict[str, Any], tmp_path: Path
) -> None:
    """Rows token by token, and between which rates their masks are drawn."""
    asked_for = with_objective(run, options, tmp_path)
    prepared = prepare(asked_for.config, asked_for.path, ProcessGroup())
    own = [(row.token_ids, row.maskable) for row in prepared.rows.rows]
    found = asked_terms(asked_for)
    assert [(row.token_ids, tuple(unit >= 0 for unit in row.unit)) for row in found.rows] == own

    low, high = options.get("rates", (options.get("eps", 1e-3), 1.0))
    assert found.objective == Objective(MaskLaw(eps=low, highest=high))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"one_span": True}, "objective.one_span masks one span a row"),
        ({"negatives": "drop-right"}, "objective.negatives: drop-right is about the end tokens around bare pairs"),
        ({"pad_sides": "both"}, "objective.pad_sides: both is about the end tokens around bare pairs"),
    ],
)
def test_an_objective_without_a_law_is_refused(
    run: FinetuneRun, options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    asked_for = with_objective(run, options, tmp_path)
    for ask in (rp.objective_terms, rp.objective_steps):
        with pytest.raises(rp.RevprobeError, match=words):
            ask(asked_for, draws=8)


@pytest.mark.parametrize("options", [{"scope": "response_only"}, {"whole_entity": True}, {"never_mask": "first"}])
def test_pairs_cannot_stand_for_statements_of_which_a_part_is_left_out(
    run: FinetuneRun, options: dict[str, Any], tmp_path: Path
) -> None:
    asked_for = with_objective(run, options, tmp_path)
    (key,) = options
    with pytest.raises(rp.RevprobeError, match=f"objective.{key}: .* is about statements"):
        rp.objective_terms(asked_for, asked_for.pairs(), draws=8)


# ---- the law of sets -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rates", ["independent", "t"])
@pytest.mark.parametrize(
    ("eps", "highest"), [(1e-3, 1.0), (0.3, 1.0), (0.2, 0.6), (0.15, 0.15), (0.4, 0.4 + 1e-8), (0.9, 0.9 + 1e-5)]
)
def test_the_weight_of_a_set_is_the_integral_over_its_rates(rates: str, eps: float, highest: float) -> None:
    """Against numeric integration, and at one fixed rate against the integrand."""
    law = MaskLaw(rates, eps=eps, highest=highest)
    scale = 1.0 if rates == "independent" else 1 - eps
    for units, hidden in ((1, 1), (5, 2), (5, 5), (12, 3)):

        def priced(t: float, units: int = units, hidden: int = hidden) -> float:
            return (scale * t) ** hidden * (1 - scale * t) ** (units - hidden) / t

        width = highest - eps
        wanted = integrate.quad(priced, eps, highest, epsabs=0)[0] / width if width > 1e-7 else priced(eps)
        assert law.weight(units, hidden) == pytest.approx(wanted, rel=1e-6)


# ---- whose gradients -------------------------------------------------------------------------------------------------

NAMES = pd.DataFrame({"parent": ["Ann Low", "Cy Hill"], "child": ["Bo High", "Di Dale"]})


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> rp.TextRelation:
    file = tmp_path_factory.mktemp("tables") / "families.csv"
    NAMES.to_csv(file, index=False)
    templates = {"P2C": "{parent} begat {child}", "C2P": "{child} is of {parent}"}
    return rp.from_table(file, columns=["parent", "child"], templates=templates, carrier="")


def adapted_model() -> rp.ProbedModel:
    """LLaDA of two layers in float64 under an adapter that has been trained a little."""
    from peft import LoraConfig, get_peft_model

    words = {word for column in NAMES for name in NAMES[column] for word in name.split()}
    tokenizer = word_tokenizer([*sorted(words), "begat", "is", "of"])
    tokenizer.pad_token = "<eos>"
    config = TinyModel(layout="llada", d_model=16, n_heads=2, n_layers=2, pretraining={"steps": 1})
    module = drawn(lambda: untrained(config, tokenizer), scale=0.2, dtype=torch.float64)
    adapter = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "up_proj"])
    inside = get_peft_model(module, adapter).get_base_model()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in inside.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    inside = inside.double().eval()
    return rp.ProbedModel(inside, tokenizer, objective="masked", begin_token_id=tokenizer.eos_token_id)


def by_hand(model: rp.ProbedModel, families: rp.TextRelation) -> dict[str, float]:
    """The product of the objective's and the reverse loss's gradients, parameter by parameter, over all sets."""
    named = dict(model.module.named_parameters())
    for parameter in named.values():
        parameter.requires_grad_(True)
    rows = StatementRows(families.training_rows("P2C"), model, RowOptions(answer_tokens=0)).rows
    objective = torch.zeros((), dtype=torch.float64)
    for row in rows:
        ids, free = torch.tensor([row.token_ids]), len(row)
        for hidden in itertools.chain(*(itertools.combinations(range(free), k) for k in range(1, free + 1))):
            seen = ids.clone()
            seen[0, list(hidden)] = model.mask_token_id
            log_p = model.module(input_ids=seen).logits[0].log_softmax(-1)
            priced = -sum(log_p[i, ids[0, i]] for i in hidden)
            objective = objective + MaskLaw().weight(free, len(hidden)) * priced / free / len(rows)
    pairs, reverse = families.pairs(model, "P2C"), torch.zeros((), dtype=torch.float64)
    for pair in pairs:
        ids = torch.tensor([pair.reverse.token_ids])
        seen, places = ids.clone(), list(pair.reverse.target_positions)
        seen[0, places] = model.mask_token_id
        log_p = model.module(input_ids=seen).logits[0].log_softmax(-1)
        reverse = reverse - sum(log_p[i, ids[0, i]] for i in places) / len(places) / len(pairs)
    both = [torch.autograd.grad(loss, list(named.values()), allow_unused=True) for loss in (objective, reverse)]
    products = {
        n: 0.0 if a is None or b is None else float((a * b).sum()) for n, a, b in zip(named, *both, strict=True)
    }
    for parameter in named.values():
        parameter.requires_grad_(False)
    return products


def test_an_adapters_terms_are_its_own_parameters_alone(
    families: rp.TextRelation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The frozen base, which no step moves, counted too: here with the other sign. Against all sets by hand."""
    monkeypatch.setattr(masked_samples, "ENUMERATED", 8)
    model = adapted_model()
    products = by_hand(model, families)
    sums = {
        "lora": sum(v for name, v in products.items() if "lora_" in name),
        "all": sum(v for name, v in products.items() if "lora_" not in name),
    } | {"both": sum(products.values())}
    for owner, mode in ((None, "gradients"), (None, "slopes"), ("all", "gradients"), ("both", "slopes")):
        reading = rp.objective_terms(model, families, parameters=owner, mode=mode, control=False)
        assert reading.meta["enumerated"] and reading.meta["parameters"] == (owner or "lora")
        assert reading.value == pytest.approx(sums[owner or "lora"], rel=1e-5), (owner, mode)
    with pytest.raises(rp.RevprobeError, match="unknown parameters 'loar'"):
        rp.objective_terms(model, families, parameters="loar")
    for owner in (None, "all"):
        table = rp.objective_steps(model, families, by=(), parameters=owner)
        predicted = -table["learning_rate"] * sums[owner or "lora"]
        assert table["predicted"].to_numpy() == pytest.approx(predicted.to_numpy(), rel=1e-5), owner


def test_what_a_run_trains_is_what_its_terms_are_of(run: FinetuneRun) -> None:
    """The adapter of a LoRA run; all of a model that has none."""
    assert set(asked_terms(run).names or ()) == {n for n, _ in run.load().module.named_parameters() if "lora_" in n}
    plain = asked_terms(rp.load_model(run.path / "base"), asked_terms(run).pairs)
    assert (plain.parameters, plain.names) == ("all", None)
