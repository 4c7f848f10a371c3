"""Storage over training and single optimizer steps, on a run of a dozen steps: against the run's own next checkpoint,
autograd's gradients, and probes taken by hand.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import revprobe as rp
from revprobe.finetune.config import RunConfig, parse_config
from revprobe.finetune.one_step import NO_RATE, SWAPPED, follow, next_step, one_step, one_step_curves
from revprobe.finetune.runs import Run, train
from revprobe.finetune.storage_curves import storage_curves
from revprobe.probes.statistics import derangement
from revprobe.probes.storage import evidence_by_pair, probe_stored_evidence
from revprobe.probes.storage_figures import one_step_figure, storage_curves_figure


def config(family: str = "radd") -> RunConfig:
    """Dropout, weight decay, clipping that bites, a cosine schedule and an average: all that a step is made of."""
    training = {"steps": 12, "batch_size": 16, "warmup_steps": 3, "ema_decay": 0.8, "device": "cpu"}
    training |= {"weight_decay": 0.1, "gradient_clipping": 0.2, "schedule": "cosine", "learning_rate": 0.01}
    text = f"name: tiny\nrelation: {{length: 4, alphabet: 6}}\nmodel: {{family: {family}, d_model: 16, dropout: 0.1}}\n"
    return parse_config(f"{text}training: {training}\nsnapshots: {{steps: [5, 11]}}\n", RunConfig, "test")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(config(), tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="module")
def causal_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(config("gpt2"), tmp_path_factory.mktemp("runs") / "tiny-arm")


def files(run: Run) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(run.path.rglob("*")) if p.is_file()}


# ---- one step --------------------------------------------------------------------------------------------------------


def test_the_step_from_a_saved_state_is_the_step_the_run_took(run: Run) -> None:
    """Bit for bit the next checkpoint: rows, masks, dropout, clipping, AdamW's state, decay and schedule."""
    step = next_step(run, 11)
    taken = rp.load_model(run.path, step=12, weights="raw").module
    assert step.optimizer == "saved"
    for (name, after), expected in zip(step.after.module.named_parameters(), taken.parameters(), strict=True):
        assert torch.equal(after.float(), expected), f"{name} differs from the run's own step"
    assert max(float(u.abs().max()) for u in step.update.values()) > 1e-4, "a step that moves nothing proves nothing"


def test_a_fresh_optimizer_takes_adamws_first_step_at_the_schedules_rate(run: Run) -> None:
    """Step 5 keeps no state. A first Adam step moves every weight by the rate, towards the gradient's sign."""
    step = next_step(run, 5)
    rate = 0.01 * 0.5 * (1 + np.cos(np.pi * (5 - 3) / (12 - 3)))
    assert step.optimizer == "fresh"
    assert step.learning_rate == pytest.approx(rate)
    weight = step.before.module.lm_head.weight
    moved = (step.update["lm_head.weight"] + rate * 0.1 * weight).abs()  # decay taken out
    # A logit's gradient is never zero here, so each entry moves by rate x g / (|g| + eps).
    assert moved.median().item() == pytest.approx(rate, rel=1e-3)
    assert moved.max().item() <= rate * (1 + 1e-4)


def test_taking_steps_leaves_run_files_and_generators_as_they_were(run: Run) -> None:
    before, random = files(run), torch.get_rng_state()
    numbers = np.random.get_state()[1].copy()
    first, second = (one_step(run, steps=[11]) for _ in range(2))
    pd.testing.assert_frame_equal(first, second)
    assert files(run) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert (np.random.get_state()[1] == numbers).all()


def test_predictions_are_gradient_times_update_and_changes_are_differences(run: Run) -> None:
    """Every pair by plain autograd in float64, its control by hand, S by probing before and after."""
    step = next_step(run, 5)
    pairs = rp.letter_pairs(4, model=step.before, placements="mirror", alphabet=6)
    table = follow(step, pairs).set_index(["quantity", "pair"])
    partner = derangement(pairs.facts.astype(str), pairs.groups(0), seed=0)

    def loss(model: rp.ProbedModel, asked: rp.Query, target: int) -> torch.Tensor:
        (row,) = asked.target_positions
        ids = torch.tensor([asked.token_ids])
        ids[0, row] = model.mask_token_id
        return -model.module(ids).logits[0, row].log_softmax(-1)[target]

    for pair in range(0, len(pairs), 4):
        for side in ("forward", "reverse"):
            own, (target,) = getattr(pairs[pair], side), getattr(pairs[pair], side).target
            other = getattr(pairs[int(partner[pair])], side)
            for asked, ending in ((own, ""), (other, "_control")):
                named = dict(step.before.module.named_parameters())
                before = loss(step.before, asked, target)
                grads = torch.autograd.grad(before, list(named.values()))
                predicted = sum(float((g * step.update[n]).sum()) for n, g in zip(named, grads, strict=True))
                came = (loss(step.after, asked, target) - before).item()
                row = table.loc[(f"{side}_loss", pair)]
                assert row[f"predicted{ending}"] == pytest.approx(predicted, abs=1e-10)
                assert row[f"came{ending}"] == pytest.approx(came, abs=1e-10)
    start, end = (evidence_by_pair(probe_stored_evidence(m, pairs)) for m in (step.before, step.after))
    stored = table.loc["stored"]
    assert np.allclose(stored["came"], end["stored_reverse"] - start["stored_reverse"], atol=1e-14)
    assert np.allclose(stored["came_control"], end["stored_control"] - start["stored_control"], atol=1e-14)
    assert stored["predicted"].isna().all()


def test_first_order_is_exact_for_a_small_step_and_misses_by_its_square(run: Run) -> None:
    """Halving the rate of a fresh step halves prediction and change, and quarters what lies between them."""
    curves = []
    for rate in (1e-4, 5e-5):
        found = one_step_curves(one_step(run, steps=[5], learning_rate=rate)).set_index("quantity")
        curves.append(found.loc["reverse_loss"])
    assert curves[0]["predicted"] / curves[1]["predicted"] == pytest.approx(2, rel=1e-3)
    assert curves[0]["error"] / curves[1]["error"] == pytest.approx(4, rel=0.05)
    assert curves[1]["slope"] == pytest.approx(1, abs=2e-2)
    assert curves[1]["correlation"] > 0.999


def test_curves_are_means_over_pairs_and_the_slope_is_least_squares(run: Run) -> None:
    table = one_step(run, steps=[11])
    curves = one_step_curves(table).set_index("quantity")
    part = table[table["quantity"] == "reverse_loss"]
    row = curves.loc["reverse_loss"]
    for name in ("before", "came", "predicted", "came_control"):
        assert row[name] == pytest.approx(part[name].mean())
        assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]
    assert row["slope"] == pytest.approx(np.linalg.lstsq(part[["predicted"]], part["came"], rcond=None)[0][0])
    assert row["slope_low"] <= row["slope"] <= row["slope_high"]
    assert row["correlation"] == pytest.approx(part["came"].corr(part["predicted"]))
    assert row["excess"] == pytest.approx((part["came"] - part["came_control"]).mean())
    assert row["n"] == len(part)


def test_a_warm_up_starts_at_rate_zero_where_nothing_moves_and_nothing_is_compared(run: Run) -> None:
    curves = one_step_curves(one_step(run, steps=[0]))
    assert (curves["came"] == 0).all()
    assert curves["slope"].isna().all()
    assert set(curves["reason"]) == {NO_RATE}
    asked = one_step_curves(one_step(run, steps=[0], learning_rate=1e-3)).set_index("quantity")
    assert (asked["came"] != 0).all()
    assert not asked["reason"].any()


def test_a_causal_run_has_losses_and_no_entry_of_s(causal_run: Run) -> None:
    curves = one_step_curves(one_step(causal_run, steps=[11])).set_index("quantity")
    assert np.isnan(curves.loc["stored", "came"])
    assert curves.loc["stored", "reason"] == SWAPPED
    assert np.isfinite(curves.loc["reverse_loss", "predicted"])
    step = next_step(causal_run, 11)
    taken = rp.load_model(causal_run.path, step=12, weights="raw").module
    for after, expected in zip(step.after.module.parameters(), taken.parameters(), strict=True):
        assert torch.equal(after.float(), expected), "tied weights, GPT-2"
    with pytest.raises(rp.RevprobeError, match="is causal: its pairs of kind 'swapped' do not share an entry of S"):
        storage_curves(causal_run)


# ---- over training ---------------------------------------------------------------------------------------------------


def test_curves_are_the_probes_own_numbers_at_every_checkpoint(run: Run) -> None:
    before = files(run)
    curves = storage_curves(run)
    assert files(run) == before
    assert sorted(set(curves["step"])) == [0, 5, 11, 12]
    assert set(curves["weights"]) == {"raw", "ema"}
    assert set(curves["kind"]) == {"same_target"}
    key = ["step", "weights", "curve", "direction"]
    assert not curves.duplicated(key).any()
    at = curves.set_index(key)
    model = rp.load_model(run.path, step=11, weights="ema")
    pairs = rp.letter_pairs(4, model=model, placements="mirror", alphabet=6)
    reading = probe_stored_evidence(model, pairs)
    stored, table = at.loc[(11, "ema", "stored", "reverse")], evidence_by_pair(reading)
    assert (stored["value"], stored["low"], stored["high"]) == pytest.approx((reading.value, *reading.interval))
    assert stored["control"] == pytest.approx(reading.control.value)
    route = rp.probe_attention_correlation(model, pairs, control=False).frame
    for side in ("forward", "reverse"):
        assert at.loc[(11, "ema", "weight", side), "value"] == pytest.approx(route[f"weight_{side}"].mean(), abs=1e-6)
        for curve in ("margin", "rank", "contribution"):
            assert at.loc[(11, "ema", curve, side), "value"] == pytest.approx(table[f"{curve}_{side}"].mean())


def test_steps_weights_and_pairs_can_be_chosen(run: Run) -> None:
    model = rp.load_model(run.path, step=5, weights="raw")
    pairs = rp.letter_pairs(4, model=model, placements="mirror", alphabet=4)
    curves = storage_curves(run.path, steps=[5], weights="raw", pairs=pairs)
    assert set(zip(curves["step"], curves["weights"], strict=True)) == {(5, "raw")}
    assert set(curves["n"]) == {len(pairs)}
    with pytest.raises(rp.RevprobeError, match="no checkpoint at step 7"):
        storage_curves(run, steps=[7])
    with pytest.raises(rp.RevprobeError, match="no checkpoint at step 7"):
        one_step(run, steps=[7])


def test_a_run_without_checkpoints_is_named(tmp_path: Path) -> None:
    from revprobe.finetune.config import dump_config

    (tmp_path / "config.yaml").write_text(dump_config(config()))
    for call in (storage_curves, one_step):
        with pytest.raises(rp.RevprobeError, match="has no complete checkpoint"):
            call(tmp_path)


def test_figures_hold_the_numbers_of_the_curves(run: Run) -> None:
    curves = storage_curves(run, steps=[5, 12])
    figure = storage_curves_figure(curves, weights="raw")
    lines = [trace for trace in figure.data if trace.mode == "lines+markers"]
    assert len(lines) == 6, "forward and reverse of storage, route and contribution"
    wanted = curves[(curves["weights"] == "raw") & (curves["curve"] == "weight") & (curves["direction"] == "reverse")]
    assert any(np.allclose(trace.y, wanted.sort_values("step")["value"]) for trace in lines)
    control = [trace for trace in figure.data if trace.name == "control"]
    assert len(control) == 1, "S has a control, under the reverse query"
    steps = one_step_curves(one_step(run, steps=[5, 11]))
    drawn = one_step_figure(steps)
    lines = [trace for trace in drawn.data if trace.mode == "lines+markers"]
    assert len(lines) == 5, "came and predicted of two losses, came of S"
    with pytest.raises(rp.RevprobeError, match="no 'emma' weights among the curves"):
        storage_curves_figure(curves, weights="emma")
    with pytest.raises(rp.RevprobeError, match=r"curves lack the columns \['quantity'"):
        one_step_figure(curves)
