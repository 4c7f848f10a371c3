"""The first-order prediction: exact as the step shrinks, AdamW's own step worked out ahead, and no trace left."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments, set_seed

import revprobe as rp
from revprobe.finetune.training.adamw_update import adamw_update
from revprobe.finetune.training.prediction_callback import COLUMNS, NO_STEP_FOLLOWS, FirstOrderPrediction
from revprobe.finetune.training.trainer import ForwardOnlyTrainer, TokenRows
from revprobe.models.probed import ProbedModel
from revprobe.probes.passes.batches import make_batch, prepare_queries
from revprobe.probes.passes.slopes import loss_slopes
from revprobe.probes.statistics.estimators import STATISTICS_VERSION
from revprobe.relations.catalog import letters


def tiny(family: str = "radd", dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> PreTrainedModel:
    set_seed(0)
    tokenizer = rp.letter_tokenizer()
    if family == "gpt2":
        return rp.one_layer_gpt2(vocab_size=len(tokenizer), d_model=16, n_heads=2, max_length=4, dropout=dropout).to(
            dtype
        )
    size = {"d_model": 16, "n_heads": 2, "n_layers": 1, "max_length": 4, "dropout": dropout}
    ids = {"vocab_size": len(tokenizer), "mask_token_id": tokenizer.mask_token_id}
    return rp.RaddForMaskedLM(rp.RaddConfig(**ids, **size)).to(dtype)


def with_lora(model: PreTrainedModel) -> nn.Module:
    names = [name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=sorted({*names} - {"lm_head"})))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)  # zero at first: half of the slopes would vanish
    return adapted


def pairs_for(model: nn.Module, objective: str = "masked") -> rp.ReversalPairs:
    probed = ProbedModel(model, rp.letter_tokenizer(), objective=objective, logit_shift=int(objective == "causal"))
    return rp.letter_pairs(4, model=probed, placements="mirror")


def trainer(folder: Path, model: nn.Module, objective: str = "masked", **arguments: Any) -> ForwardOnlyTrainer:
    settings: dict[str, Any] = {"max_steps": 4, "per_device_train_batch_size": 8, "use_cpu": True, "report_to": "none"}
    settings |= {"disable_tqdm": True, "remove_unused_columns": False, "save_strategy": "no", "learning_rate": 1e-3}
    args = TrainingArguments(output_dir=str(folder), **(settings | arguments))
    tokenizer = rp.letter_tokenizer()
    rows = TokenRows(torch.tensor(tokenizer(letters(4).training_texts())["input_ids"]))
    return ForwardOnlyTrainer(
        model=model, args=args, train_dataset=rows, processing_class=tokenizer, objective=objective
    )


def predicted(folder: Path, model: nn.Module, objective: str = "masked", **arguments: Any) -> pd.DataFrame:
    """Train a few steps with the callback, after steps 0, 1 and 3; the table it wrote."""
    made = trainer(folder, model, objective, **arguments)
    made.add_callback(FirstOrderPrediction(pairs_for(model, objective), steps=[0, 1, 3], objective=objective))
    made.train()
    return pd.read_parquet(folder / "predictions.parquet")


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# ---- slopes ----


def slow_slopes(model: ProbedModel, pairs: rp.ReversalPairs, along: dict[str, Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Losses and slopes query by query: one unbatched backward pass each, then the product parameter by parameter."""
    parameters = dict(model.module.named_parameters())
    losses, slopes = [], []
    for query in prepare_queries(model, pairs.queries):
        batch = make_batch(model, [query])
        logits = model.logits(batch.input_ids)[0]
        rows = [position - model.logit_shift for position in query.target_positions]
        terms = [-logits[row].double().log_softmax(-1)[t] for row, t in zip(rows, query.target, strict=True)]
        loss = torch.stack(terms).mean()
        grads = torch.autograd.grad(loss, [parameters[name] for name in along], allow_unused=True)
        found = [
            (g.double() * along[name].double()).sum() for g, name in zip(grads, along, strict=True) if g is not None
        ]
        losses.append(loss.item())
        slopes.append(float(torch.stack(found).sum()))
    return np.array(losses), np.array(slopes)


@pytest.mark.parametrize("by", ["forward mode", "query by query"])
@pytest.mark.parametrize("kind", ["radd", "gpt2", "lora"])
def test_slopes_are_those_of_one_backward_pass_a_query(kind: str, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways, tied weights and adapters included; a batch that mixes queries up turns it red."""
    if by == "query by query":

        def refuse(*_: Any) -> Any:
            raise NotImplementedError("no forward-mode rule")

        monkeypatch.setattr("revprobe.probes.passes.slopes._forward_mode", refuse)
    objective = "causal" if kind == "gpt2" else "masked"
    module = tiny("gpt2" if kind == "gpt2" else "radd", torch.float64)
    module = with_lora(module).double() if kind == "lora" else module
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    model = ProbedModel(module.eval(), rp.letter_tokenizer(), objective=objective, logit_shift=int(kind == "gpt2"))
    pairs = pairs_for(module, objective).take(np.arange(12))
    generator = torch.Generator().manual_seed(2)
    along = {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in trained.items()}
    flags = [p.requires_grad for p in module.parameters()]
    found = loss_slopes(model, prepare_queries(model, pairs.queries), [along, {}], batch_size=5)
    loss, slope = slow_slopes(model, pairs, along)
    assert np.abs(slope).max() > 1e-3, "the directions do nothing"
    np.testing.assert_allclose(found.loss, loss, rtol=1e-9)
    np.testing.assert_allclose(found.slope[0], slope, rtol=1e-7, atol=1e-12)
    assert (found.slope[1] == 0).all(), "no direction, no slope"
    assert [p.requires_grad for p in module.parameters()] == flags
    assert all(p.grad is None for p in module.parameters())


# ---- the step ahead ----


@pytest.mark.parametrize(
    "options",
    [
        {"fused": True},
        {"foreach": False, "amsgrad": True, "weight_decay": 0.3},
        {"foreach": True, "maximize": True, "betas": (0.5, 0.7), "eps": 1e-3},
    ],
)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
def test_the_step_ahead_is_the_step_the_optimizer_makes(kind: Any, options: dict[str, Any]) -> None:
    """At the first step, where there is no state, and with state; parameters without gradient stay put."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(4)), nn.Parameter(torch.ones(2))]
    optimizer = kind([{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.02}], lr=0.1, **options)
    for _ in range(4):
        for parameter in parameters[:2]:
            parameter.grad = torch.randn_like(parameter)
        ahead = adamw_update(optimizer)
        before = [p.detach().clone() for p in parameters]
        optimizer.step()
        assert set(ahead) == {id(p) for p in parameters[:2]}
        for parameter, was in zip(parameters[:2], before, strict=False):
            torch.testing.assert_close(ahead[id(parameter)], parameter.detach() - was, rtol=1e-5, atol=5e-7)
        assert torch.equal(parameters[2], before[2])


def test_an_optimizer_without_a_formula_says_so() -> None:
    with pytest.raises(rp.RevprobeError, match="no formula for SGD; expected torch's Adam or AdamW"):
        adamw_update(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))


# ---- in training ----


def test_sgd_in_closed_form(tmp_path: Path) -> None:
    """One plain SGD step moves by -rate * gradient: the prediction is -rate * <pair's gradient, training gradient>."""
    model = tiny(dtype=torch.float64)
    made = trainer(tmp_path, model, optim="sgd", max_grad_norm=0.0, max_steps=1, learning_rate=0.25)
    pairs = pairs_for(model)
    seen: dict[str, Tensor] = {}
    twin = ProbedModel(tiny(dtype=torch.float64).eval(), rp.letter_tokenizer(), objective="masked")

    class Spy(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, model: nn.Module, **at: Any) -> None:
            seen.update({name: p.grad.clone() for name, p in model.named_parameters()})

    made.add_callback(Spy())
    made.add_callback(FirstOrderPrediction(pairs, steps=[0]))
    made.train()
    table = pd.read_parquet(tmp_path / "predictions.parquet").set_index("direction")
    loss, slope = slow_slopes(twin, pairs, seen)
    for direction, index in (("forward", pairs.forward), ("reverse", pairs.reverse)):
        assert table.loc[direction, "predicted"] == pytest.approx(-0.25 * slope[index].mean(), rel=1e-6)
        assert table.loc[direction, "loss"] == pytest.approx(loss[index].mean(), rel=1e-9)
    norm = torch.stack([g.square().sum() for g in seen.values()]).sum().sqrt()
    assert table["update_norm"].to_numpy() == pytest.approx(0.25 * float(norm), rel=1e-6)
    assert table["predicted_by_adamw"].isna().all()
    assert (table["reason"] == "predicted_by_adamw: no formula for SGD; expected torch's Adam or AdamW").all()
    assert (table["n"] == len(pairs)).all()
    assert set(table["optimizer"]) == {"SGD"}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw_torch"])
def test_the_prediction_becomes_exact_as_the_step_shrinks(tmp_path: Path, optimizer: str) -> None:
    """The error is of second order: ten times smaller steps, a hundred times smaller errors."""
    errors, shares = [], []
    # Adam's first steps move every weight by the rate, however small its gradient: the same error at smaller rates.
    for rate in (1e-2, 1e-3, 1e-4) if optimizer == "sgd" else (1e-4, 1e-5, 1e-6):
        options = {"optim": optimizer, "learning_rate": rate, "weight_decay": 0.1}
        table = predicted(tmp_path / str(rate), tiny(dtype=torch.float64), **options)
        row = table[(table["step"] == 0) & (table["direction"] == "reverse")].iloc[0]
        errors.append(abs(row["error"]))
        shares.append(row["observed"] / row["predicted"])
        assert row["error"] == pytest.approx(row["observed"] - row["predicted"], rel=1e-6, abs=1e-12)
    assert errors[0] / errors[1] > 30 and errors[1] / errors[2] > 30, errors
    assert abs(shares[-1] - 1) < 1e-2, shares


@pytest.mark.parametrize("kind", ["radd", "lora", "gpt2"])
def test_the_step_ahead_predicts_what_the_made_step_does(tmp_path: Path, kind: str) -> None:
    """Clipping, warm-up, weight decay and accumulation are all in the update that is worked out before the step."""
    objective = "causal" if kind == "gpt2" else "masked"
    model = tiny("gpt2" if kind == "gpt2" else "radd")
    model = with_lora(model) if kind == "lora" else model
    schedule = {"warmup_steps": 3, "lr_scheduler_type": "cosine", "weight_decay": 0.1, "max_grad_norm": 0.05}
    table = predicted(tmp_path, model, objective, **schedule, gradient_accumulation_steps=2)
    assert list(table.columns) == COLUMNS
    assert sorted(table["step"]) == [0, 0, 1, 1, 3, 3]
    first = table[table["step"] == 0]
    assert (first["update_norm"] == 0).all() and (first["observed"] == 0).all(), "the warm-up starts at rate 0"
    assert first["observed_low"].isna().all(), "a change that is 0 for every fact has no interval"
    assert first["reason"].str.contains("observed, .*: the same for every fact, so without an interval").all()
    later = table[table["step"] > 0]
    assert (later["facts"] > 1).all() and (later["facts"] <= later["n"]).all()
    assert (table["statistics_version"] == STATISTICS_VERSION).all()
    assert (later["predicted"].abs() > 1e-6).all()
    np.testing.assert_allclose(later["predicted_by_adamw"], later["predicted"], rtol=2e-3, atol=1e-7)
    assert (later["reason"] == "").all()
    assert later["n"].min() > 0 and later["learning_rate"].between(0, 1e-3, inclusive="right").all()
    for name in ("predicted", "observed", "predicted_control", "observed_control"):
        assert (later[f"{name}_low"] <= later[name]).all() and (later[name] <= later[f"{name}_high"]).all(), name


def test_the_control_prices_the_target_at_another_facts_query(tmp_path: Path) -> None:
    """By hand: the same loss with the tokens of another fact around the target. Its prediction becomes exact too."""
    table = predicted(tmp_path, tiny(dtype=torch.float64), learning_rate=1e-5)
    reverse = table[(table["direction"] == "reverse") & (table["step"] == 3)].iloc[0]
    assert reverse["observed_control"] == pytest.approx(reverse["predicted_control"], rel=1e-2)
    assert reverse["observed_control"] != pytest.approx(reverse["observed"], rel=1e-3), (
        "the control asks the pairs' own queries"
    )


@pytest.mark.parametrize(
    ("kind", "optimizer"), [("radd", "adamw_torch_fused"), ("lora", "adamw_torch_fused"), ("gpt2", "sgd")]
)
def test_training_ends_at_the_same_bits_with_and_without_the_callback(
    tmp_path: Path, kind: str, optimizer: str
) -> None:
    """Dropout draws random numbers, so one draw too many shows; so does a weight that is put back with one bit lost."""
    objective, ends = "causal" if kind == "gpt2" else "masked", []
    for measured in (False, True):
        model = tiny("gpt2" if kind == "gpt2" else "radd", dropout=0.1)
        model = with_lora(model) if kind == "lora" else model
        made = trainer(tmp_path / str(measured), model, objective, optim=optimizer, weight_decay=0.1)
        if measured:
            pairs = pairs_for(tiny("gpt2" if kind == "gpt2" else "radd"), objective)
            made.add_callback(FirstOrderPrediction(pairs, steps=range(5), objective=objective))
        set_seed(made.args.seed)
        made.train()
        ends.append(
            bits(model)
            | {
                f"optimizer.{n}.{k}": v
                for n, s in made.optimizer.state_dict()["state"].items()
                for k, v in s.items()
                if isinstance(v, Tensor)
            }
        )
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_measurement_that_fails_leaves_the_weights_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny()
    made = trainer(tmp_path, model)
    made.add_callback(FirstOrderPrediction(pairs_for(model), steps=[1]))
    seen: list[dict[str, Tensor]] = []

    class Spy(TrainerCallback):
        def on_optimizer_step(self, *_: Any, model: nn.Module, **at: Any) -> None:
            seen.append(bits(model))

    made.callback_handler.callbacks.insert(0, Spy())

    def fail(*_: Any, **__: Any) -> Any:
        raise rp.RevprobeError("planted")

    monkeypatch.setattr("revprobe.finetune.training.prediction_callback.loss_slopes", fail)
    with pytest.raises(rp.RevprobeError, match="planted"):
        made.train()
    assert all(torch.equal(seen[-1][name], tensor) for name, tensor in bits(model).items())


def test_snapshots_follow_the_checkpoints_and_the_last_has_no_step_after_it(tmp_path: Path) -> None:
    """NaN with a reason, not a missing row; and a resumed run keeps the rows it had and measures its own step again."""
    model = tiny()
    saving = {"save_strategy": "steps", "save_steps": 2}
    made = trainer(tmp_path, model, **saving)
    made.add_callback(FirstOrderPrediction(pairs_for(model), control=False))
    made.train()
    table = pd.read_parquet(tmp_path / "predictions.parquet")
    assert list(table["step"]) == [0, 0, 2, 2, 4, 4]
    last = table[table["step"] == 4]
    assert last[["predicted", "observed"]].isna().all().all() and (last["reason"] == NO_STEP_FOLLOWS).all()
    assert (last["n"] == 0).all()
    assert table["predicted_control"].isna().all(), "no control was asked for"
    longer = trainer(tmp_path, tiny(), **saving, max_steps=6)
    longer.add_callback(FirstOrderPrediction(pairs_for(model), control=False))
    longer.train(resume_from_checkpoint=True)
    again = pd.read_parquet(tmp_path / "predictions.parquet")
    assert list(again["step"]) == [0, 0, 2, 2, 4, 4, 6, 6]
    pd.testing.assert_frame_equal(again[again["step"] < 4], table[table["step"] < 4])
    assert again[again["step"] == 4]["observed"].notna().all()
    assert not list(tmp_path.glob(".predictions*")), "a half-written file"


def test_rows_of_the_first_statistics_are_kept_as_such(tmp_path: Path) -> None:
    """A table written before facts were counted: a resumed run keeps its rows, under the version they were made."""
    model = tiny()
    saving = {"save_strategy": "steps", "save_steps": 2}
    made = trainer(tmp_path, model, **saving)
    made.add_callback(FirstOrderPrediction(pairs_for(model), control=False))
    made.train()
    file = tmp_path / "predictions.parquet"
    pd.read_parquet(file).drop(columns=["facts", "statistics_version"]).to_parquet(file)
    longer = trainer(tmp_path, tiny(), **saving, max_steps=6)
    longer.add_callback(FirstOrderPrediction(pairs_for(model), control=False))
    longer.train(resume_from_checkpoint=True)
    table = pd.read_parquet(file)
    versions = table.groupby("step")["statistics_version"].unique().map(list).to_dict()
    assert versions == {0: [1], 2: [1], 4: [STATISTICS_VERSION], 6: [STATISTICS_VERSION]}
    assert table[table["step"] < 4]["facts"].isna().all() and (table[table["step"] == 4]["facts"] > 1).all()


def test_what_is_not_pairs_is_refused() -> None:
    with pytest.raises(rp.RevprobeError, match=r"^pairs=\{'gradient': 1\}: expected a list of ReversalPair"):
        FirstOrderPrediction({"gradient": 1})  # type: ignore[arg-type]


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "predictions.parquet").write_bytes(b"PAR1 and then nothing")
    callback = FirstOrderPrediction(pairs_for(tiny()))
    with pytest.raises(rp.RevprobeError, match=r"predictions.parquet is damaged .*delete it"):
        callback._rows_before(3, tmp_path / "predictions.parquet")
