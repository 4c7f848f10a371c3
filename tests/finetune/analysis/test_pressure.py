"""Objective terms of runs: AdamW's coming step by class, steps that are taken, pressure over checkpoints and what it
foretells, what is stored for the placeholder, and terms of text."""

import itertools
import json
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import revprobe as rp
from revprobe.finetune.analysis import masked_samples
from revprobe.finetune.analysis.adamw_map import NO_MOMENTS, NO_RUN, NO_STATE
from revprobe.finetune.analysis.asked_terms import asked_terms
from revprobe.finetune.analysis.mask_sets import MaskLaw
from revprobe.finetune.analysis.next_step import trainer_at
from revprobe.finetune.analysis.objective_steps import _RunsUpdate
from revprobe.finetune.analysis.objective_terms import taken_apart
from revprobe.finetune.analysis.pressure import ALIKE, FEW, NO_TERMS
from revprobe.finetune.analysis.reverse_gradients import LOSS
from revprobe.finetune.config.finetuning import FinetuneConfig, TinyModel
from revprobe.finetune.config.loading import parse_config
from revprobe.finetune.config.one_layer import RunConfig
from revprobe.finetune.pretraining.layouts import untrained
from revprobe.finetune.runs.one_layer import OneLayerRun, train
from revprobe.finetune.training.dataset import RowOptions, StatementRows
from revprobe.probes.figures.objective_terms import pressure_figure
from revprobe.probes.passes.plan import Plan
from tiny import drawn, word_tokenizer

BY = ["priced", "target", "evidence"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> OneLayerRun:
    """Two dozen steps at length 4 with decay, and a clip that bites."""
    training = {"steps": 24, "batch_size": 16, "warmup_steps": 3, "ema_decay": 0.8, "device": "cpu"}
    training |= {"weight_decay": 0.1, "gradient_clipping": 0.2, "learning_rate": 0.01}
    text = "name: tiny\nrelation: {length: 4, alphabet: 3}\nmodel: {d_model: 8}\n"
    config = parse_config(f"{text}training: {training}\nsnapshots: {{every: 4}}\n", RunConfig, "test")
    return train(config, tmp_path_factory.mktemp("runs") / "tiny")


# ---- AdamW ---------------------------------------------------------------------------------------------------------


def test_the_coming_step_by_class_is_adamws_formula_on_the_saved_state(run: OneLayerRun) -> None:
    """From optimizer.pt itself, parameter by parameter: rate, momentum, second moments, corrections, clip and decay.

    The second moments hold the coming gradient, as AdamW's own do.
    """
    reading = rp.objective_terms(run, step=20)
    terms = taken_apart(asked_terms(run, step=20), 1, Plan())
    state = torch.load(run.path / "checkpoints/step-000020/optimizer.pt", weights_only=True)
    model = run.load(20, "raw").module
    named = dict(model.named_parameters())
    # The Trainer puts parameters that decay into its first group, in the model's order.
    decays = [n for n, p in named.items() if p.ndim > 1]
    order = [*decays, *(n for n in named if n not in decays)]
    whole, against = terms.classes.gradient.sum(0), terms.reverse.gradient[LOSS].mean(0)
    parts, back = terms.flat.named(whole), terms.flat.named(against)
    clip, change = reading.meta["clip"], {"class": 0.0, "momentum": 0.0, "decay": 0.0}
    assert clip == pytest.approx(np.mean([min(1.0, 0.2 / norm) for norm in reading.meta["gradient_norms"]]))
    assert 0 < clip < 1, "the clip was to bite"
    for place, name in enumerate(order):
        saved = state["state"][place]
        square = 0.999 * saved["exp_avg_sq"].double() + 0.001 * (clip * parts[name].double()).square()
        root = (square / (1 - 0.999**21)).sqrt() + 1e-8
        toward = back[name] / root
        change["class"] -= 0.01 * 0.1 * clip / (1 - 0.9**21) * float((parts[name] * toward).sum())
        change["momentum"] -= 0.01 * 0.9 / (1 - 0.9**21) * float((saved["exp_avg"] * toward).sum())
        if name in decays:
            change["decay"] -= 0.01 * 0.1 * float((named[name] * back[name]).sum())
    table = rp.objective_classes(reading, "priced").set_index("priced")["change_adamw"]
    assert table["momentum"] == pytest.approx(change["momentum"], rel=1e-4)
    assert table["decay"] == pytest.approx(change["decay"], rel=1e-4)
    assert table.drop(["momentum", "decay"]).sum() == pytest.approx(change["class"], rel=1e-4)


def test_elements_without_a_gradient_so_far_do_not_explode(run: OneLayerRun, tmp_path: Path) -> None:
    """A state whose second moments are nothing in most places: classes still add up to AdamW's own step on the sum."""
    shutil.copytree(run.path, tmp_path / "young")
    young = OneLayerRun(tmp_path / "young")
    file = young.path / "checkpoints/step-000020/optimizer.pt"
    saved = torch.load(file, weights_only=True)
    for place, state in saved["state"].items():
        generator = torch.Generator().manual_seed(place)
        unseen = torch.rand(state["exp_avg_sq"].shape, generator=generator) < 0.7
        state["exp_avg_sq"][unseen] = 0.0
        state["exp_avg"][unseen] = 0.0
        state["step"] = torch.tensor(2.0)
    torch.save(saved, file)
    for dial in (None, "drop-right"):
        asked = asked_terms(young, step=20, dial=dial)
        terms = taken_apart(asked, 1, Plan())
        whole = torch.as_tensor(terms.factor) @ terms.classes.gradient.double()
        update, against = _RunsUpdate(young, terms, None)(whole), terms.reverse.gradient[LOSS].mean(0).double()
        table = rp.objective_classes(terms.reading(Plan()), "priced")
        assert table["change_adamw"].sum() == pytest.approx(float(update @ against), rel=1e-5)
        assert float(update.abs().max()) < 0.05, "five rates at most, in any element"


def test_without_a_state_there_is_no_number_but_a_reason(run: OneLayerRun) -> None:
    for step, reason in ((0, NO_MOMENTS), (8, NO_STATE)):
        table = rp.objective_classes(rp.objective_terms(run, step=step), BY)
        assert table["change_adamw"].isna().all() and table["reason"].str.contains(reason).all()
        assert "momentum" not in set(table["priced"])
    alone = rp.objective_classes(rp.objective_terms(run.load(8, "raw"), run.relation), BY)
    assert alone["change_sgd"].isna().all() and alone["reason"].str.contains(NO_RUN).all()


# ---- steps that are taken ------------------------------------------------------------------------------------------


def test_steps_taken_on_one_class_confirm_its_sign_and_size(run: OneLayerRun) -> None:
    """Plain descent at two sizes (a tenth of the step, a hundredth of the error) and the run's own AdamW."""
    files = {path: path.read_bytes() for path in sorted(run.path.rglob("*")) if path.is_file()}
    # A hundredth of the run's rate: at its own, the momentum of so young a model moves it beyond first order.
    steps = rp.objective_steps(run, step=20, learning_rate=1e-4)
    assert {path: path.read_bytes() for path in sorted(run.path.rglob("*")) if path.is_file()} == files
    plain = steps[steps["optimizer"] == "sgd"]
    small, large = (part for _, part in plain.groupby("learning_rate", sort=True))
    assert large["learning_rate"].iloc[0] == pytest.approx(10 * small["learning_rate"].iloc[0])
    assert steps["same_sign"].all()
    assert np.allclose(small["error"].abs(), large["error"].abs() / 100, rtol=0.1, atol=1e-12)
    table = rp.objective_classes(rp.objective_terms(run, step=20), BY).set_index(BY)
    adamw = steps[steps["optimizer"] == "adamw"].set_index(BY)
    # A step on one class lets that class's gradient into the second moments, the map that of them all, which is larger;
    # in so early a step they are still young.
    larger = 100 * adamw["predicted"] / table.loc[adamw.index, "change_adamw"]
    assert larger.between(0.9, 1.7).all()
    assert np.corrcoef(adamw["predicted"], table.loc[adamw.index, "change_adamw"])[0, 1] > 0.99
    expected = table.loc[adamw.index, "change_sgd"]
    assert np.allclose(100 * large.set_index(BY)["predicted"], expected, rtol=1e-4, atol=1e-9)
    whole = rp.objective_steps(run, step=20)
    assert not whole.loc[whole["optimizer"] == "adamw", "same_sign"].any(), "what is beyond first order must show"
    before = rp.objective_steps(run, step=8, by="priced")
    assert before.loc[before["optimizer"] == "adamw", "reason"].eq(NO_STATE).all()


# ---- over checkpoints ----------------------------------------------------------------------------------------------


def test_pressure_is_the_sum_of_its_classes_at_every_checkpoint(run: OneLayerRun) -> None:
    table = rp.pressure(run, steps=[0, 8, -1], dial="drop-right")
    assert sorted(set(table["step"])) == [0, 8, 24] and len(table) == 18
    at = table[table["step"] == 8].set_index("terms")
    reading = rp.objective_terms(run, step=8, dial="drop-right")
    classes = rp.objective_classes(reading, [*BY, "dropped"]).set_index([*BY, "dropped"])["pressure"]
    assert at.loc["target", "pressure"] == pytest.approx(classes["target", "hidden", "visible", False])
    assert at.loc["negative", "pressure"] == 0.0
    assert at.loc["negative", "dropped"] == pytest.approx(classes["right", "hidden", "visible", True])
    assert at.loc["all", "pressure"] == pytest.approx(reading.value)
    assert at.loc["net", "pressure"] == at.loc["target", "pressure"]
    model, pairs = run.load(8, "raw"), run.relation.pairs(run.load(8, "raw"), placements="mirror")
    leads = []
    for one in pairs.reverse:
        query = pairs.queries[one]
        seen = torch.tensor([query.token_ids])
        seen[0, query.target_positions[0]] = model.mask_token_id
        logits = model.logits(seen)[0, query.target_positions[0]]
        leads.append(float(logits[query.target[0]] - logits[0]))
    assert at["log_odds"].unique() == pytest.approx([np.mean(leads)])
    figure = pressure_figure(table)
    assert {"all terms", "reverse log-odds"} <= {trace.name for trace in figure.data}


def planted(pressure: np.ndarray, change: np.ndarray) -> pd.DataFrame:
    """A table whose log-odds change as told, by 100 steps a row."""
    steps = 100 * np.arange(len(pressure) + 1)
    odds = np.r_[0.0, np.cumsum(change)]
    return pd.DataFrame({"step": steps, "terms": "all", "pressure": np.r_[pressure, 0.0], "log_odds": odds})


def test_a_planted_pressure_foretells_and_a_shifted_one_does_not() -> None:
    rng = np.random.default_rng(0)
    pressure = rng.normal(size=24)
    found = rp.foretelling(planted(pressure, 0.3 * pressure)).iloc[0]
    assert (found["n"], found["left_out"], found["spearman"]) == (24, 1, pytest.approx(1.0))
    assert abs(found["control"]) < 0.1 and found["control_high"] < 0.6 and found["p"] == pytest.approx(1 / 24)
    late = rp.foretelling(planted(pressure, 0.3 * np.roll(pressure, 5))).iloc[0]
    assert abs(late["spearman"]) < 0.5 and late["p"] > 0.05, "the right series at the wrong time is no finding"
    # A trend in both is found at every shift but a few: the control says so, where a plain p-value would not.
    few = rp.foretelling(planted(pressure[:3], pressure[:3])).iloc[0]
    assert np.isnan(few["spearman"]) and FEW in few["reason"] and few["n"] == 3
    flat = rp.foretelling(planted(np.ones(6), pressure[:6])).iloc[0]
    assert np.isnan(flat["spearman"]) and flat["reason"] == ALIKE


def test_answers_between_checkpoints_are_read_and_gaps_are_not_bridged() -> None:
    table = planted(np.arange(5.0), np.arange(5.0))
    answers = pd.DataFrame({"step": np.arange(0, 601, 50), "weights": "raw", "question": "reverse", "extra": 0})
    answers["log_odds"] = answers["step"] ** 2 / 1e4
    found = rp.foretelling(table[:5], answers, ahead=75).iloc[0]
    assert found["n"] == 5 and found["spearman"] == pytest.approx(1.0)
    assert rp.foretelling(table, ahead=50).iloc[0]["n"] == 0, "100 steps between answers, 50 asked for"
    with pytest.raises(rp.RevprobeError, match="a step twice"):
        rp.foretelling(pd.concat([table, table]))


# ---- what is stored for the placeholder ----------------------------------------------------------------------------


def test_the_placeholders_storage_is_that_of_a_probe_that_asks_for_it(run: OneLayerRun) -> None:
    """Logits against the model's own; S by the probe; the differences pair by pair."""
    table = rp.placeholder_storage(run, steps=[-1], weights="raw").set_index(["side", "measure", "answer"])["value"]
    model = run.load(-1, "raw")
    pairs = run.relation.pairs(model, placements="mirror")
    logits: dict[str, list[list[float]]] = {"right": [], "left": []}
    for side, index in (("right", pairs.forward), ("left", pairs.reverse)):
        for one in index:
            query = pairs.queries[one]
            seen = torch.tensor([query.token_ids])
            seen[0, query.target_positions[0]] = model.mask_token_id
            row = model.logits(seen)[0, query.target_positions[0]]
            logits[side].append([float(row[query.target[0]]), float(row[0])])
    for side, values in logits.items():
        own, other = np.mean(values, axis=0)
        assert table[side, "logit", "target"] == pytest.approx(own, rel=1e-4)
        assert table[side, "logit", "placeholder"] == pytest.approx(other, rel=1e-4)
        assert table[side, "logit", "difference"] == pytest.approx(own - other, rel=1e-3)
    stored = rp.probe_stored_evidence(model, pairs)
    assert table["left", "stored", "target"] == pytest.approx(stored.value, rel=1e-6)
    assert table["left", "stored", "placeholder"] != pytest.approx(stored.value, rel=1e-2)


# ---- text ----------------------------------------------------------------------------------------------------------


NAMES = pd.DataFrame({"parent": ["Ann Low", "Cy Hill", "Ed Moss"], "child": ["Bo High", "Di Dale", "Flo Fen"]})
PLACES = ["target", "target", "left", "evidence", "evidence", "right", "end"]


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> rp.TextRelation:
    file = tmp_path_factory.mktemp("tables") / "families.csv"
    NAMES.to_csv(file, index=False)
    templates = {"P2C": "{parent} begat {child} today", "C2P": "{child} is of {parent} now"}
    return rp.from_table(file, columns=["parent", "child"], templates=templates, carrier="")


def text_model(layout: str) -> rp.ProbedModel:
    """LLaDA or Dream of two layers over these words, in float64."""
    words = {word for column in NAMES for name in NAMES[column] for word in name.split()}
    tokenizer = word_tokenizer([*sorted(words), "begat", "today", "is", "of", "now"])
    tokenizer.pad_token = "<eos>"
    config = TinyModel(layout=layout, d_model=16, n_heads=2, n_layers=2, pretraining={"steps": 1})
    module = drawn(lambda: untrained(config, tokenizer), scale=0.2, dtype=torch.float64)
    return rp.ProbedModel(module, tokenizer, objective="masked", begin_token_id=tokenizer.eos_token_id)


@pytest.mark.parametrize(("layout", "shift"), [("llada", 0), ("dream", 1)])
def test_terms_of_text_are_told_apart_by_the_statements_parts(
    layout: str, shift: int, families: rp.TextRelation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names of two tokens, an end token after the answer, a model with a shift: against all sets of masks by hand."""
    monkeypatch.setattr(masked_samples, "ENUMERATED", 7)
    model = text_model(layout)
    reading = rp.objective_terms(model, families, answer_tokens=4, control=False)
    assert reading.meta["enumerated"]
    found = rp.objective_classes(reading).set_index([*BY, "masks"])["loss"]
    rows = StatementRows(families.training_rows("P2C"), model, RowOptions(answer_tokens=4)).rows
    assert [len(row) for row in rows] == [6, 7] * 2, "bare, and filled up to four answer tokens"
    plain: dict[tuple[str, str, str, int], float] = defaultdict(float)
    for row in rows:
        free = [i for i in range(len(row)) if i >= shift]
        for size in range(1, len(free) + 1):
            for hidden in itertools.combinations(free, size):
                seen = torch.tensor([row.token_ids])
                seen[0, list(hidden)] = model.mask_token_id
                with torch.no_grad():
                    log_p = model.logits(seen)[0].log_softmax(-1)
                states = []
                for name in ("target", "evidence"):
                    own = [i for i in free if PLACES[i] == name]
                    count = sum(i in hidden for i in own)
                    states.append("visible" if not count else "hidden" if count == len(own) else "partly")
                for i in hidden:
                    priced = -float(log_p[i - shift, row.token_ids[i]])
                    plain[PLACES[i], *states, size] += (
                        MaskLaw().weight(len(free), size) * priced / len(free) / len(rows)
                    )
    assert set(found.index) == set(plain)
    for key, loss in plain.items():
        assert found[key] == pytest.approx(loss, rel=1e-9), key
    assert {"end", "partly"} <= {word for key in plain for word in key if isinstance(word, str)}
    pairs = families.pairs(model, "P2C")
    assert reading.facts == len(set(pairs.facts)) and reading.meta["kind"] == "same_target"
    with pytest.raises(rp.RevprobeError, match="leaves out placeholders"):
        rp.objective_terms(model, families, dial="drop-right")


def test_text_of_many_shapes_is_drawn_without_bias(families: rp.TextRelation, monkeypatch: pytest.MonkeyPatch) -> None:
    """More strata than draws: each is drawn as its weight asks, and no group is off by more than four errors."""
    model, groups = text_model("llada"), ["priced", "target"]
    drawn = [rp.objective_terms(model, families, answer_tokens=4, draws=150, seed=seed) for seed in range(6)]
    assert all(60 < one.meta["sequences"] < 400 for one in drawn)
    monkeypatch.setattr(masked_samples, "ENUMERATED", 7)
    exact = rp.objective_terms(model, families, answer_tokens=4)
    tables = [rp.objective_classes(one, groups).set_index(groups) for one in (*drawn, exact)]
    for name in ("pressure", "loss"):
        found = pd.concat([table[name] for table in tables[:-1]], axis=1).fillna(0.0)
        error = found.std(axis=1) / len(drawn) ** 0.5
        assert ((found.mean(axis=1) - tables[-1].loc[found.index, name]).abs() < 5 * error).all(), name
    spread = np.std([one.value for one in drawn], ddof=1)
    stated = np.mean([one.meta["sampling_error"] for one in drawn])
    assert stated / 3 < spread < 3 * stated


def test_a_fine_tunings_rows_are_its_own(tmp_path: Path) -> None:
    """Scope, entities masked together and the decoded length come from its config."""
    text = """
name: tiny
model: {tiny: {layout: llada, d_model: 16, n_heads: 2, pretraining: {steps: 2, facts: 8, batch_size: 8}}}
relation: {name: invented_names, rows: [60, 72], heldout: 0.2, direction: P2C}
objective: {whole_entity: true}
lora: {rank: 2, alpha: 4}
training: {steps: 2, batch_size: 4, device: cpu}
snapshots: {every: 2, facts: 3}
"""
    run = rp.fine_tune(parse_config(text, FinetuneConfig, "test"), tmp_path / "tiny")
    reading = rp.objective_terms(run, draws=64)
    table = rp.objective_classes(reading, BY)
    assert "end" in set(table["priced"])
    assert not (table[["target", "evidence"]] == "partly").any(axis=None), "an entity is hidden as one"
    assert reading.meta["sampling_error"] > 0 and table["loss"].gt(0).all()
    with pytest.raises(rp.RevprobeError, match="is a fine-tuning, which has no placeholders"):
        rp.pressure(run)


# ---- a run's own objective -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"rates": "t", "negatives": "drop-right", "loss": "sequence"},
        {"rates": "lambda", "negatives": "mirror", "negative_weight": 0.3},
        {"rates": "k", "negatives": "drop-left-matched"},
        {"masks": 2, "negatives": "drop-both"},
        {"masks": "single", "negatives": "mirror"},
        {"switch": {"step": 2, "negatives": "drop-right"}, "gradient_clipping": None},
    ],
)
def test_classes_add_up_to_the_loss_the_trainer_works_out(options: dict[str, object], tmp_path: Path) -> None:
    """Rates, dial, dose and divisor as the run has them: against the mean of the trainer's own loss over many draws."""
    training = {"steps": 4, "batch_size": 18, "warmup_steps": 1, "device": "cpu", "learning_rate": 0.01} | options
    text = "name: tiny\nrelation: {length: 4, alphabet: 3}\nmodel: {d_model: 8}\n"
    made = parse_config(f"{text}training: {json.dumps(training)}\nsnapshots: {{every: 2}}\n", RunConfig, "test")
    run = train(made, tmp_path / "tiny")
    reading = rp.objective_terms(run, step=2)
    assert reading.meta["dial"] == made.training.dial_at(2) != "keep"
    table = rp.objective_classes(reading)
    assert table["share"].sum() == pytest.approx(1.0)
    assert table["dropped"].any() != (made.training.masks == "single"), "one hidden token sees both letters, or is one"
    if made.training.masks == "single":
        alone = rp.pressure(run, steps=[2]).set_index("terms")
        assert alone.loc["negative", ["pressure", "reason"]].tolist() == [0.0, NO_TERMS]
        assert alone.loc["net", "pressure"] == alone.loc["target", "pressure"] != 0
    folder = run.path / "checkpoints/step-000002"
    trainer, _ = trainer_at(run, folder, run.load(2, "raw"))
    assert trainer.model is not None
    losses, rows = [], trainer.train_dataset.token_ids
    trainer.model.train()  # the phase whose masks are those of training; there is no dropout
    for step in range(2, 402):
        trainer.state.global_step = step
        with torch.no_grad():
            losses.append(float(trainer.compute_loss(trainer.model, {"input_ids": rows})))
    error = np.std(losses) / len(losses) ** 0.5
    assert abs(np.mean(losses) - reading.meta["objective_loss"]) < 4 * error
    if made.training.gradient_clipping is None:
        assert reading.meta["clip"] == 1.0
