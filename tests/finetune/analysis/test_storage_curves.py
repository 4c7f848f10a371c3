"""Storage over training and single optimizer steps, on a run of a dozen steps: against the run's own next checkpoint,
autograd's gradients, and probes taken by hand.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import revprobe as rp
from revprobe.finetune.analysis.next_step import next_step
from revprobe.finetune.analysis.one_step import NO_RATE, PAST_END, SWAPPED, follow, one_step, one_step_curves
from revprobe.finetune.analysis.storage_curves import storage_curves
from revprobe.finetune.config.finetuning import FinetuneConfig
from revprobe.finetune.config.loading import parse_config
from revprobe.finetune.config.one_layer import RunConfig
from revprobe.finetune.runs.finetune_setup import text_relation
from revprobe.finetune.runs.finetuning import fine_tune
from revprobe.finetune.runs.one_layer import train
from revprobe.finetune.runs.run import Run
from revprobe.probes.figures.storage import one_step_figure, storage_curves_figure
from revprobe.probes.statistics.by_part import evidence_by_pair
from revprobe.probes.statistics.estimators import STATISTICS_VERSION
from revprobe.probes.statistics.resampling import derangement
from revprobe.probes.storage import probe_stored_evidence


def config(family: str = "radd") -> RunConfig:
    """Dropout, weight decay, clipping that bites, a cosine schedule and an average: all that a step is made of."""
    training = {"steps": 12, "batch_size": 16, "warmup_steps": 3, "ema_decay": 0.8, "device": "cpu"}
    training |= {"weight_decay": 0.1, "gradient_clipping": 0.2, "schedule": "cosine", "learning_rate": 0.01}
    text = f"name: tiny\nrelation: {{length: 4, alphabet: 6}}\nmodel: {{family: {family}, d_model: 16, dropout: 0.1}}\n"
    return parse_config(f"{text}training: {training}\nsnapshots: {{steps: [5, 11]}}\n", RunConfig, "test")


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
                assert row[f"observed{ending}"] == pytest.approx(came, abs=1e-10)
    start, end = (evidence_by_pair(probe_stored_evidence(m, pairs)) for m in (step.before, step.after))
    stored = table.loc["stored"]
    assert np.allclose(stored["observed"], end["stored_reverse"] - start["stored_reverse"], atol=1e-14)
    assert np.allclose(stored["observed_control"], end["stored_control"] - start["stored_control"], atol=1e-14)
    assert stored["predicted"].notna().all()


def s_by_hand(model: rp.ProbedModel, target: int, query: rp.Query) -> torch.Tensor:
    """S[target, evidence] of one-layer RADD under a query, with both norms' scales as functions of the weights, by
    autograd: gain W_O W_V (gamma E[u] / deviation at u), summed over heads.
    """
    m, block = model.module, model.module.blocks[0]
    (row,), (place,) = query.target_positions, query.evidence_positions
    ids = torch.tensor([query.token_ids])
    ids[0, row] = model.mask_token_id
    ends: list[torch.Tensor] = []
    handle = m.final_norm.register_forward_pre_hook(lambda _, args: ends.append(args[0][0, row]))
    m(ids)
    handle.remove()
    scale = lambda x, norm: (x.var(correction=0) + norm.eps).rsqrt() * norm.weight  # noqa: E731
    gain = scale(ends[0], m.final_norm) * m.lm_head.weight[target]
    token = m.embed_tokens.weight[query.token_ids[place]]  # the stream holds nothing else there: no position vectors
    value = block.attention.v_proj.weight @ (token * scale(token, block.attention_norm))
    return gain @ (block.attention.o_proj.weight @ value)


@pytest.mark.parametrize("at", [5, 11])
def test_the_prediction_of_s_is_its_gradient_times_the_update(run: Run, at: int) -> None:
    """Against autograd through S written out, for the pair's own evidence and for its partner's."""
    step = next_step(run, at)
    pairs = rp.letter_pairs(4, model=step.before, placements="mirror", alphabet=6)
    table = follow(step, pairs).set_index(["quantity", "pair"]).loc["stored"]
    partner = derangement(pairs.facts.astype(str), pairs.groups(0), seed=0)
    named = {name: p.requires_grad_(True) for name, p in step.before.module.named_parameters()}
    for pair in range(0, len(pairs), 5):
        own = pairs[pair].reverse
        for query, ending in ((own, ""), (pairs[int(partner[pair])].reverse, "_control")):
            with torch.enable_grad():
                value = s_by_hand(step.before, own.target[0], query)
            grads = torch.autograd.grad(value, list(named.values()), allow_unused=True)
            expected = sum(
                float((g * step.update[n]).sum()) for n, g in zip(named, grads, strict=True) if g is not None
            )
            assert abs(expected) > 1e-5, "nothing moves S"
            if not ending:
                assert value.item() == pytest.approx(table.loc[pair, "before"], abs=1e-10)
            assert table.loc[pair, f"predicted{ending}"] == pytest.approx(expected, rel=1e-6)


def mixed_pairs() -> rp.ReversalPairs:
    """Six facts of one group, targets and evidence of one and of two tokens in turn, in sequences of four."""
    pairs = []
    for fact in range(6):
        first, second, other, last = ((fact + k) % 12 for k in (0, 5, 7, 2))
        width = 1 + fact % 2
        tokens, swapped = [first, second, other, last], [other, last, first, second]
        queries = (
            rp.Query(tokens, range(width), range(2, 2 + width)),
            rp.Query(swapped, range(2, 2 + width), range(width)),
        )
        pairs.append(rp.ReversalPair(*queries, fact=str(fact)))
    return rp.ReversalPairs.from_pairs(pairs)


def test_controls_meet_targets_of_as_many_tokens(run: Run) -> None:
    """Every pair has its control, though half of its group asks for more or fewer tokens; one by autograd's model."""
    step, pairs = next_step(run, 11), mixed_pairs()
    assert len(set(pairs.groups(0))) == 1
    table = follow(step, pairs)
    assert table[["observed", "observed_control", "predicted", "predicted_control"]].notna().all().all()
    partner = derangement(pairs.facts.astype(str), np.arange(6) % 2, seed=0)
    losses = table[table["quantity"] == "reverse_loss"].set_index("pair")
    for pair in range(6):
        own, asked = pairs[pair].reverse, pairs[int(partner[pair])].reverse
        rows, values = list(asked.target_positions), []
        ids = torch.tensor([asked.token_ids])
        ids[0, rows] = step.before.mask_token_id
        for model in (step.before, step.after):
            with torch.no_grad():
                logs = model.module(ids).logits[0, rows].log_softmax(-1)
            values.append(-logs[range(len(rows)), list(own.target)].mean().item())
        assert losses.loc[pair, "observed_control"] == pytest.approx(values[1] - values[0], abs=1e-12)
    lonely = one_step_curves(one_step(run, steps=[11], pairs=pairs[:4]))
    assert set(lonely["n"]) == set(lonely["n_control"]) == {4}
    lonely = one_step_curves(one_step(run, steps=[11], pairs=pairs.take(np.array([0, 1, 2]))))
    assert set(lonely["n"]) == {3}
    assert set(lonely["n_control"]) == {2}, "the one with two tokens has no partner, and that is said"


def test_the_runs_last_step_has_no_next_one(run: Run) -> None:
    """Left out unless asked for, and then undefined, with the reason; a rate of one's own takes a step there too."""
    assert sorted(set(one_step(run)["step"])) == [0, 5, 11]
    table = one_step(run, steps=[-1])
    assert set(table["step"]) == {12}
    assert table[["before", "observed", "predicted", "observed_control", "learning_rate"]].isna().all().all()
    curves = one_step_curves(table)
    assert curves["quantity"].tolist() == ["stored", "forward_loss", "reverse_loss"]
    assert set(curves["reason"]) == {PAST_END}
    assert set(curves["n"]) == {0}
    assert one_step_curves(one_step(run, steps=[12], learning_rate=1e-3))["observed"].ne(0).all()
    with pytest.raises(rp.RevprobeError, match=r"step 12 is the last of .*; pass learning_rate= to take another"):
        next_step(run)


def test_an_empty_list_of_steps_and_empty_curves_are_named(run: Run) -> None:
    for call in (one_step, storage_curves):
        with pytest.raises(rp.RevprobeError, match="steps is an empty list; expected some of 0, 5, 11, 12"):
            call(run, steps=[])
    for draw, curves in (
        (storage_curves_figure, storage_curves(run, steps=[0])),
        (one_step_figure, one_step_curves(one_step(run, steps=[0]))),
    ):
        with pytest.raises(rp.RevprobeError, match="the curves have no rows"):
            draw(curves.iloc[:0])
    with pytest.raises(rp.RevprobeError, match="the table has no rows"):
        one_step_curves(one_step(run, steps=[0]).iloc[:0])


@pytest.mark.parametrize("quantity", ["stored", "reverse_loss"])
def test_first_order_is_exact_for_a_small_step_and_misses_by_its_square(run: Run, quantity: str) -> None:
    """Halving the rate of a fresh step halves prediction and change, and quarters what lies between them."""
    curves = []
    for rate in (1e-4, 5e-5):
        found = one_step_curves(one_step(run, steps=[5], learning_rate=rate)).set_index("quantity")
        curves.append(found.loc[quantity])
    assert curves[0]["predicted"] / curves[1]["predicted"] == pytest.approx(2, rel=1e-3)
    assert curves[0]["error"] / curves[1]["error"] == pytest.approx(4, rel=0.05)
    assert curves[1]["slope"] == pytest.approx(1, abs=2e-2)
    assert curves[1]["correlation"] > 0.999


def test_curves_are_means_over_pairs_and_the_slope_is_least_squares(run: Run) -> None:
    table = one_step(run, steps=[11])
    curves = one_step_curves(table).set_index("quantity")
    part = table[table["quantity"] == "reverse_loss"]
    row = curves.loc["reverse_loss"]
    for name in ("before", "observed", "predicted", "observed_control"):
        assert row[name] == pytest.approx(part[name].mean())
        assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]
    assert row["slope"] == pytest.approx(np.linalg.lstsq(part[["predicted"]], part["observed"], rcond=None)[0][0])
    assert row["slope_low"] <= row["slope"] <= row["slope_high"]
    assert row["correlation"] == pytest.approx(part["observed"].corr(part["predicted"]))
    assert row["excess"] == pytest.approx((part["observed"] - part["observed_control"]).mean())
    assert row["n"] == row["n_control"] == len(part) and row["facts"] == part["fact"].nunique()
    assert (curves["statistics_version"] == STATISTICS_VERSION).all()
    alike = table.assign(predicted=0.25, fact=np.where(table["quantity"] == "stored", "one", table["fact"]))
    why = one_step_curves(alike).set_index("quantity")["reason"]
    assert why["reverse_loss"] == "predicted: the same for every fact, so without an interval"
    assert why["stored"].endswith("of one fact, so without an interval")
    numbers = ["observed", "predicted"]
    gone = table.assign(**table[numbers].where(table["pair"] != 3))
    row, kept = one_step_curves(gone).set_index("quantity").loc["reverse_loss"], part[part["pair"] != 3]
    assert row["n"] == len(kept)
    assert row["slope"] == pytest.approx(np.linalg.lstsq(kept[["predicted"]], kept["observed"], rcond=None)[0][0])


def test_a_warm_up_starts_at_rate_zero_where_nothing_moves_and_nothing_is_compared(run: Run) -> None:
    curves = one_step_curves(one_step(run, steps=[0]))
    assert (curves["observed"] == 0).all()
    assert curves["slope"].isna().all()
    assert set(curves["reason"]) == {NO_RATE}
    asked = one_step_curves(one_step(run, steps=[0], learning_rate=1e-3)).set_index("quantity")
    assert (asked["observed"] != 0).all()
    assert not asked["reason"].any()


def test_a_causal_run_has_losses_and_no_entry_of_s(causal_run: Run) -> None:
    curves = one_step_curves(one_step(causal_run, steps=[11])).set_index("quantity")
    assert np.isnan(curves.loc["stored", "observed"])
    assert curves.loc["stored", "reason"] == SWAPPED
    assert np.isfinite(curves.loc["reverse_loss", "predicted"])
    step = next_step(causal_run, 11)
    taken = rp.load_model(causal_run.path, step=12, weights="raw").module
    for after, expected in zip(step.after.module.parameters(), taken.parameters(), strict=True):
        assert torch.equal(after.float(), expected), "tied weights, GPT-2"
    with pytest.raises(rp.RevprobeError, match="is causal: pairs of kind 'swapped' do not share an entry of S"):
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
    assert (stored["n"], stored["facts"]) == (reading.n, reading.facts) == (len(pairs), 6)
    assert (curves["statistics_version"] == STATISTICS_VERSION).all() and (curves["facts"] <= curves["n"]).all()
    assert (curves["low"].isna() == (curves["reason"] != "")).all(), "no interval without a reason"
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
    last = storage_curves(run, steps=[-1, 12])
    assert set(zip(last["step"], last["weights"], strict=True)) == {(12, "raw"), (12, "ema")}
    assert not last.duplicated(["step", "weights", "curve", "direction"]).any()
    pd.testing.assert_frame_equal(last, storage_curves(run, steps=[12]))
    with pytest.raises(rp.RevprobeError, match="no checkpoint at step 7"):
        storage_curves(run, steps=[7])
    with pytest.raises(rp.RevprobeError, match="no checkpoint at step 7"):
        one_step(run, steps=[7])


def test_a_run_without_checkpoints_is_named(tmp_path: Path) -> None:
    from revprobe.finetune.config.loading import dump_config

    (tmp_path / "config.yaml").write_text(dump_config(config()))
    for call in (storage_curves, one_step):
        with pytest.raises(rp.RevprobeError, match="has no complete checkpoint"):
            call(tmp_path)


def test_figures_hold_the_numbers_of_the_curves(run: Run) -> None:
    curves = storage_curves(run, steps=[5, 12])
    figure = storage_curves_figure(curves, weights="raw")
    assert figure.layout.title.text.startswith(f"<b>{run.path.name}</b> (raw weights)<br>")
    lines = [trace for trace in figure.data if trace.mode == "lines+markers"]
    assert len(lines) == 6, "forward and reverse of storage, route and contribution"
    wanted = curves[(curves["weights"] == "raw") & (curves["curve"] == "weight") & (curves["direction"] == "reverse")]
    assert any(np.allclose(trace.y, wanted.sort_values("step")["value"]) for trace in lines)
    control = [trace for trace in figure.data if trace.name == "control"]
    assert len(control) == 1, "S has a control, under the reverse query"
    steps = one_step_curves(one_step(run, steps=[5, 11]))
    drawn = one_step_figure(steps)
    assert drawn.layout.title.text.startswith(f"<b>{run.path.name}</b>: what one optimizer step changes<br>")
    older = [storage_curves_figure(curves.drop(columns="model")), one_step_figure(steps.drop(columns="model"))]
    assert all(one.layout.title.text.startswith("<b>model</b>") for one in older), "what older versions wrote is drawn"
    lines = [trace for trace in drawn.data if trace.mode == "lines+markers"]
    assert len(lines) == 6, "observed and predicted of S and of two losses"
    for name in ("observed", "predicted"):
        drawn_lines = [trace for trace in lines if trace.name == name]
        for trace, quantity in zip(drawn_lines, ("stored", "forward_loss", "reverse_loss"), strict=True):
            wanted = steps[steps["quantity"] == quantity].sort_values("step")[name]
            assert np.array_equal(np.array(trace.y, dtype=float), wanted), f"{name} of {quantity}"
    controls = [trace for trace in drawn.data if trace.name == "control"]
    wanted = steps[steps["quantity"] == "reverse_loss"].sort_values("step")["observed_control"]
    assert np.array_equal(np.array(controls[2].y, dtype=float), wanted)
    with pytest.raises(rp.RevprobeError, match="no 'emma' weights among the curves"):
        storage_curves_figure(curves, weights="emma")
    with pytest.raises(rp.RevprobeError, match=r"curves lack the columns \['quantity'"):
        one_step_figure(curves)


# ---- fine-tunings ----------------------------------------------------------------------------------------------------

FINETUNING = """
name: tiny
model: {tiny: {layout: llada, d_model: 16, n_heads: 2, pretraining: {steps: 2, facts: 8, batch_size: 8}}}
relation: {name: invented_names, rows: [60, 72], heldout: 0.2, direction: P2C}
training: {steps: 2, batch_size: 4, device: cpu}
snapshots: {count: 2, facts: 4}
evaluation: {max_new_tokens: 2}
"""


def test_a_fine_tuning_has_storage_curves_of_given_pairs_and_no_steps_to_take(tmp_path: Path) -> None:
    """Its checkpoints are adapters; the curves are the probe's numbers on base and adapter."""
    finetuning = fine_tune(parse_config(FINETUNING, FinetuneConfig, "test"), tmp_path / "tiny")
    with pytest.raises(
        rp.RevprobeError, match="is a fine-tuning, which has no letters to ask; pass same_target pairs="
    ):
        storage_curves(finetuning)
    with pytest.raises(
        rp.RevprobeError, match="is a fine-tuning; one_step takes the steps of runs that `revprobe train`"
    ):
        one_step(finetuning)
    model = rp.load_model(finetuning.path, step=2)
    pairs = text_relation(finetuning.config).pairs(model, "P2C", limit=4)
    curves = storage_curves(finetuning, pairs=pairs)
    assert sorted(set(curves["step"])) == finetuning.steps
    stored = curves.set_index(["step", "curve", "direction"]).loc[(2, "stored", "reverse")]
    assert stored["value"] == pytest.approx(probe_stored_evidence(model, pairs, control=False).value, rel=1e-5)
