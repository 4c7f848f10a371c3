"""`revprobe reproduce`: what is compared with the paper, what is marked, and what a claim needs to hold."""

import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from typer.testing import CliRunner

import revprobe as rp
from revprobe.cli.main import app
from revprobe.finetune.config.loading import dump_config, load_config, parse_config
from revprobe.finetune.config.one_layer import SweepConfig
from revprobe.report.paper.markdown import MARK, markdown_table, one_layer_markdown, spread_markdown, theory_markdown
from revprobe.report.paper.printed_values import one_layer_cells
from revprobe.report.paper.reproduce import COLUMNS, _Claims, collect_measures, compare, one_layer_sweep, over_seeds
from revprobe.report.run_sweep import RunsFailed

MEASURES = ["forward_accuracy", "reverse_accuracy", "forward_probability", "reverse_probability"]
MEASURES += ["attention_correlation", "gradient_cosine"]
Value = Callable[[str, int, int, int, str], float]


def measures(
    value: Value, *, seeds: int = 3, lengths: tuple[int, ...] = (10, 20), excess_low: float = 0.1
) -> pd.DataFrame:
    """Runs with the number `value(model, length, seed, step, measure)`, at steps 0 and 100, both kinds of weights."""
    rows: list[dict[str, Any]] = []
    for model in ("rope", "alibi", "absolute", "arm"):
        for length in lengths:
            for seed in range(seeds):
                axes = {"objective": "causal" if model == "arm" else "masked", "length": length, "seed": seed}
                axes |= {"position_encoding": "absolute" if model == "arm" else model}
                for step in (0, 100):
                    for weights in ("raw",) if model == "arm" else ("raw", "ema"):
                        for measure in MEASURES:
                            number = value(model, length, seed, step, measure)
                            row = {"run": f"{model}-l{length}-s{seed}", **axes, "step": step, "weights": weights}
                            row |= {"kind": "same_target", "measure": measure, "value": number, "n": 26, "facts": 26}
                            row |= {"low": number - 0.01, "high": number + 0.01, "control": 0.0, "excess": 0.2}
                            row |= {"control_low": 0.0, "control_high": 0.0, "excess_low": excess_low}
                            rows.append(row | {"excess_high": 0.3})
    return pd.DataFrame(rows).reindex(columns=COLUMNS)


def like_the_paper(model: str, length: int, seed: int, step: int, measure: str) -> float:
    """The printed numbers, each seed a little off; at step 0 nothing is known."""
    if step == 0:
        return 0.02
    if measure.startswith("forward"):
        return 0.98
    if model == "arm":
        return 0.001 * seed
    return {"absolute": 0.12 if length == 10 else 0.28, "rope": 0.43 if length == 10 else 0.56, "alibi": 0.99}[
        model
    ] + 0.01 * (seed - 1)


def cell(frame: pd.DataFrame, **wanted: Any) -> pd.Series:
    """The one row of a frame with these values."""
    for name, value in wanted.items():
        frame = frame[frame[name] == value]
    assert len(frame) == 1, f"{len(frame)} rows for {wanted}"
    return frame.iloc[0]


# ---- what the paper prints ----


def test_every_printed_cell_is_there_once() -> None:
    """16 numbers in Table 1, 12 in Table 2; the cells both tables print agree to the digits of Table 2 in reverse."""
    cells = one_layer_cells()
    assert cells.groupby("table").size().to_dict() == {1: 16, 2: 12}
    assert not cells.duplicated(["table", "objective", "position_encoding", "length", "direction"]).any()
    assert cells["paper"].between(0, 1).all()
    for length in (10, 20):
        shared = cells[(cells["position_encoding"] == "rope") & (cells["length"] == length)]
        reverse = shared[shared["direction"] == "reverse"]["paper"].tolist()
        assert round(reverse[0], 3) == reverse[1], length
    arm = cells[(cells["objective"] == "causal") & (cells["direction"] == "reverse")]
    assert (arm["paper"] == 0).all() and (arm["tolerance"] == 0.01).all()


# ---- cells ----


def test_a_cell_holds_the_mean_over_seeds_its_spread_and_the_difference() -> None:
    """Against plain Python on the same three numbers."""
    by_seed = {0: 0.31, 1: 0.52, 2: 0.40}
    frame = measures(lambda model, length, seed, step, measure: by_seed[seed] if step else 0.99)
    own = cell(
        compare(frame).cells,
        table=1, position_encoding="rope", length=10, direction="reverse", quantity="accuracy", weights="ema",
    )  # fmt: skip
    assert math.isclose(own["ours"], statistics.mean(by_seed.values()))
    assert math.isclose(own["spread"], statistics.stdev(by_seed.values()))
    assert math.isclose(own["difference"], statistics.mean(by_seed.values()) - 0.431)
    assert (own["seeds"], own["lowest"], own["highest"], own["status"]) == (3, 0.31, 0.52, "within")


@pytest.mark.parametrize(
    ("ours", "status"),
    [
        (0.431, "within"),
        (0.531, "within"),
        (0.532, "outside"),
        (0.331, "within"),
        (0.33, "outside"),
        (math.nan, "undefined"),
    ],
)
def test_a_cell_outside_its_tolerance_is_marked(ours: float, status: str) -> None:
    frame = measures(lambda model, length, seed, step, measure: ours, seeds=1)
    wanted = {"table": 1, "position_encoding": "rope", "length": 10, "direction": "reverse"}
    own = cell(compare(frame).cells, **wanted, quantity="probability", weights="raw")
    assert own["status"] == status
    assert math.isnan(own["spread"]), "one seed has no spread"


def test_only_the_last_step_is_compared() -> None:
    """Taking the best checkpoint instead would be tuning on the reverse side."""
    calm, tempting = (
        measures(lambda model, length, seed, step, measure, early=early: 0.2 if step else early)  # type: ignore[misc]
        for early in (0.1, 0.43)
    )
    pd.testing.assert_frame_equal(compare(calm).cells, compare(tempting).cells)
    assert not compare(calm).curves.equals(compare(tempting).curves), "the curve shows every step"


def test_what_was_not_run_is_said_and_takes_nothing_else_away() -> None:
    """No run at all, one seed of three, and one length of four."""
    empty = compare(pd.DataFrame(columns=COLUMNS))
    assert set(empty.cells["status"]) == {"not run"} and set(empty.claims["verdict"]) == {"not run"}
    some = compare(measures(like_the_paper, seeds=2, lengths=(10,)))
    assert set(some.claims["verdict"]) == {"holds so far", "not run"}, "two of three seeds decide nothing for a claim"
    assert some.claims[some.claims["seeds"] == 2]["detail"].str.endswith("; 2 of 3 seeds").all()
    assert set(some.cells[some.cells["length"] == 10]["status"]) == {"within"}
    assert set(some.cells[some.cells["length"] > 10]["status"]) == {"not run"}
    text = one_layer_markdown(some, seeds=3)
    (line,) = (line for line in text.splitlines() if line.startswith("| 1 | RoPE, L = 10 | reverse"))
    assert line.endswith("| 2 of 3 | 26 | 26 |") and "42.5 ± 0.7 [28.9, 57.0] (-0.6)" in line and MARK not in line
    (line,) = (line for line in text.splitlines() if line.startswith("| 1 | ARM, L = 40 | reverse"))
    assert line == "| 1 | ARM, L = 40 | reverse | 0.00 | not run | - | not run | - | 0 of 3 | - | - |"


def test_the_page_marks_every_cell_outside_and_no_other() -> None:
    """RoPE's reverse cells moved far off: their numbers carry the mark, each in its own column."""

    def off(model: str, length: int, seed: int, step: int, measure: str) -> float:
        wrong = model == "rope" and length == 20 and measure == "reverse_accuracy"
        return 0.01 if wrong else like_the_paper(model, length, seed, step, measure)

    result = compare(measures(off))
    outside = result.cells[result.cells["status"] == "outside"]
    assert len(outside) == 4, "two tables x raw and EMA"
    text = one_layer_markdown(result, seeds=3).split("## Claims")[0]
    assert text.count(MARK) - text.split("| table |")[0].count(MARK) == 4
    assert re.search(r"1\.0 ± 0\.0 \[[\d., ]+\] \(-54\.7\) ✗", text)


# ---- claims ----


def test_the_claims_hold_when_the_numbers_are_the_papers() -> None:
    claims = compare(measures(like_the_paper)).claims
    run = claims[claims["length"].isin([10, 20])]
    assert len(run) > 20
    wrong = run[run["verdict"] != "holds"]
    assert wrong.empty, wrong
    assert set(claims[claims["length"] > 20]["verdict"]) == {"not run"}


def fails(claim: str, value: Value = like_the_paper, length: int = 20, **options: Any) -> pd.Series:
    """The row of a claim that no longer holds, on the raw weights."""
    frame = compare(measures(value, **options)).claims
    chosen = frame[frame["claim"].str.startswith(claim) & (frame["weights"] == "raw") & (frame["length"] == length)]
    row = cell(chosen, verdict="does not hold")
    return row


def test_one_seed_against_a_claim_is_enough_and_is_counted() -> None:
    """An ordering of means would hide it."""

    def swapped(model: str, length: int, seed: int, step: int, measure: str) -> float:
        if (model, length, seed, step) == ("rope", 20, 1, 100) and measure == "reverse_accuracy":
            return 0.05
        return like_the_paper(model, length, seed, step, measure)

    row = fails("reverse accuracy: absolute < RoPE < ALiBi", swapped)
    assert (row["holds_in"], row["seeds"]) == (2, 3)
    assert "0.280 / 0.050 / 0.990" in row["detail"]


def test_claims_over_seeds_have_the_interval_of_that_many_seeds() -> None:
    """By the binomial's own definition: at either end, the observed count or a further one has 2.5 %."""
    for held, seeds in ((3, 3), (0, 3), (2, 3), (1, 1), (4, 5)):
        seen = [True] * held + [False] * (seeds - held)
        row = _Claims(pd.DataFrame(), pd.DataFrame(), 3).verdict("a", 10, "raw", seen, "")
        at_least = stats.binom.sf(held - 1, seeds, row["low"])
        at_most = stats.binom.cdf(held, seeds, row["high"])
        assert row["low"] == 0 if held == 0 else at_least == pytest.approx(0.025)
        assert row["high"] == 1 if held == seeds else at_most == pytest.approx(0.025)
        assert row["low"] < row["high"]
    result = compare(measures(like_the_paper))
    holds = result.claims[(result.claims["holds_in"] == 3) & (result.claims["seeds"] == 3)]
    assert len(holds) and holds["low"].to_numpy() == pytest.approx(0.025 ** (1 / 3)) and (holds["high"] == 1).all()
    text = one_layer_markdown(result, seeds=3)
    assert "| holds | 3 of 3 [29, 100] % |" in text and "| 3 of 3 |" not in text.split("## Claims")[1]
    untried = result.claims[result.claims["verdict"] == "not run"]
    assert untried[["low", "high"]].isna().all(axis=None)


def test_cells_alike_in_all_seeds_are_not_certain() -> None:
    """100.0 ± 0.0 over three seeds is what 29 % to 100 % can give; one seed keeps its interval over facts."""
    sure = lambda model, length, seed, step, measure: 1.0  # noqa: E731
    several, one = compare(measures(sure)).cells, compare(measures(sure, seeds=1)).cells
    accuracy = several[(several["quantity"] == "accuracy") & (several["seeds"] == 3)]
    assert len(accuracy) and accuracy["low"].to_numpy() == pytest.approx(0.025 ** (1 / 3))
    run = several[several["seeds"] > 0]
    assert (run["low"] < run["high"]).all(), "mean probabilities too"
    single = one[one["seeds"] == 1]
    assert single["low"].to_numpy() == pytest.approx(0.99) and (single["facts"] == 26).all()
    rates = np.array([0.5, 0.6, 0.7])
    singles = pd.DataFrame({"value": rates, "low": rates - 0.01, "high": rates + 0.01, "n": 1000, "facts": 26})
    spread = over_seeds(singles, binary=True)
    # Korn & Graubard by hand: three seeds, p (1 - p) over the squared standard error, by the t quantiles' ratio.
    freedom = min(2, 1.5 * ((rates - 0.6) ** 2).sum() ** 2 / ((rates - 0.6) ** 4).sum())
    size = max(0.24 / (rates.var(ddof=1) / 3) * (stats.t.ppf(0.975, 2999) / stats.t.ppf(0.975, freedom)) ** 2, 3)
    assert spread.low == pytest.approx(stats.beta.ppf(0.025, 0.6 * size, 0.4 * size + 1))
    of_facts = over_seeds(singles.assign(low=0.0, high=1.0), binary=True)
    assert (of_facts.low, of_facts.high) == (0.0, 1.0), "never narrower than theirs over facts"


def test_each_claim_can_fail() -> None:
    """An interval that reaches zero, an ARM above 1 %, a probability no higher than untrained."""
    assert fails("RoPE: attention correlation", excess_low=-0.01)["holds_in"] == 0
    assert fails("RoPE: reverse probability above", excess_low=0.0)["holds_in"] == 0, "no better than its control"

    def leaky(model: str, length: int, seed: int, step: int, measure: str) -> float:
        arm = model == "arm" and measure == "reverse_accuracy"
        return 0.0101 if arm and step else like_the_paper(model, length, seed, step, measure)

    assert fails("ARM: reverse accuracy at most 1%", leaky)["holds_in"] == 0
    assert fails("RoPE: reverse probability above", lambda m, length, s, step, measure: 0.02)["holds_in"] == 0


def undefined_in(*seeds: int) -> pd.DataFrame:
    """Runs of the paper's numbers; what these seeds measured has none, at the last step."""
    frame = measures(like_the_paper, lengths=(10,))
    lost = frame["seed"].isin(seeds) & (frame["step"] == 100)
    return frame.assign(**{name: frame[name].mask(lost) for name in ("value", "low", "excess", "excess_low")})


def test_a_seed_without_a_number_is_neither_for_nor_against_a_claim() -> None:
    """It was counted as against, and a claim that two seeds bear out did not hold."""
    claims = compare(undefined_in(1)).claims
    run = claims[claims["length"] == 10]
    assert len(run) > 10 and set(run["verdict"]) == {"undefined"}, "above control, rises, ordering, and the ARM"
    assert (run["holds_in"] == 2).all() and (run["seeds"] == 2).all()
    assert run["detail"].str.endswith("; undefined in 1 of 3 seeds").all()
    assert run["low"].to_numpy() == pytest.approx(0.025**0.5), "the interval of two seeds"
    nothing = compare(undefined_in(0, 1, 2))
    assert set(nothing.claims[nothing.claims["length"] == 10]["verdict"]) == {"undefined"}
    text = one_layer_markdown(nothing, seeds=3).split("## Claims")[1]
    assert "| undefined | - |" in text and "0 of 0" not in text
    against = undefined_in(1)
    against.loc[against["seed"] == 2, ["excess_low", "low"]] = -0.1
    row = compare(against).claims.iloc[0]
    assert (row["verdict"], row["holds_in"], row["seeds"]) == ("does not hold", 1, 2), "one against it decides"


def test_what_is_undefined_in_one_seed_is_undefined_over_seeds() -> None:
    """In the curves as in the cells: a mean over the others was told as that of three seeds."""
    found = compare(undefined_in(1))
    assert set(found.cells[found.cells["length"] == 10]["status"]) == {"undefined"}
    last, first = (found.curves[found.curves["step"] == step] for step in (100, 0))
    assert last[["value", "spread", "lowest", "highest"]].isna().all(axis=None) and (last["seeds"] == 3).all()
    assert first["value"].notna().all() and (first["seeds"] == 3).all()
    signatures = found.signatures
    assert (signatures["above_control"] == 2).all() and (signatures["decided"] == 2).all()
    text = one_layer_markdown(found, seeds=3)
    assert "| RoPE, L = 10 | ema | 2 ± 0 | undefined |" in text.split("## Reverse accuracy")[1]
    assert "| 2 of 2 [16, 100] % |" in text.split("## Signatures")[1]


def test_a_value_on_its_tolerance_is_within_in_the_files_digits_too() -> None:
    """1 % of the ARM, as single precision may have it: a little above."""
    for value in (0.01, float(np.nextafter(np.float32(0.01), np.float32(1)))):
        frame = measures(lambda m, length, seed, step, measure, own=value: own)  # type: ignore[misc]
        claims = compare(frame).claims
        own = claims[claims["claim"].str.startswith("ARM: reverse accuracy") & (claims["length"] == 10)]
        assert set(own["verdict"]) == {"holds"}


def test_signatures_stand_beside_their_controls() -> None:
    signatures = compare(measures(like_the_paper, excess_low=-0.5)).signatures
    row = cell(
        signatures, objective="masked", position_encoding="rope", length=20, weights="ema", measure="gradient_cosine"
    )
    assert (row["seeds"], row["above_control"]) == (3, 0)
    assert math.isclose(row["excess"], 0.2) and math.isclose(row["excess_low"], -0.5) and row["control"] == 0
    assert math.isclose(row["value"], 0.56) and math.isclose(row["excess_untrained"], 0.2)


def test_identities_are_no_claims_under_test() -> None:
    claims = compare(measures(like_the_paper)).claims
    assert not claims["claim"].str.startswith("ALiBi").any()
    told = claims[claims["claim"].str.startswith("RoPE: gradient cosine") & (claims["verdict"] == "holds")]
    assert told["detail"].str.contains("; untrained: 0.200, 0.200, 0.200").all() and len(told)


# ---- pages ----


def test_the_theory_page_marks_the_cells_outside() -> None:
    cells = pd.DataFrame(
        {
            "table": [3, 5], "row": ["Minimum bound"] * 2, "column": ["d = 64"] * 2, "paper": [0.337, 0.275],
            "ours": [0.3364, 0.19], "difference": [-0.0006, -0.085], "within": [True, False], "note": ["a", "b | c"],
        }
    )  # fmt: skip
    text = theory_markdown(cells)
    assert "| 3 | Minimum bound, d = 64 | 0.337 | 0.336 | -0.0006 | a |" in text
    assert f"| 5 | Minimum bound, d = 64 | 0.275 | 0.190 | -0.0850 {MARK} | b \\| c |" in text
    assert "2 cells, 1 outside" in text


def test_the_spread_page_shows_the_whole_curve() -> None:
    """Each checkpoint is one bar; the best one is shown with its step and takes the place of none."""
    frame = measures(lambda model, length, seed, step, measure: 0.9 if step == 0 else 0.3, seeds=1, lengths=(10,))
    text = spread_markdown(frame[frame["run"] == "rope-l10-s0"])
    assert (
        "| rope-l10-s0 | raw | 100 | 30.0 | 30.0 [29.0, 31.0] | 0.30 [0.29, 0.31] | 30.0 to 30.0 | 90.0 (0) | █▃ |"
        in text
    )
    lost = frame[frame["run"] == "rope-l10-s0"]
    lost = lost.assign(value=lost["value"].where((lost["step"] > 0) | (lost["weights"] == "ema")))
    assert "| 30.0 (100) |  ▃ |" in spread_markdown(lost), "an undefined checkpoint is a blank, not the best one"
    assert markdown_table([]) == "(none)\n"


# ---- the sweep and the command ----


def test_the_sweep_is_the_committed_one_restricted() -> None:
    """Every number of a run but its seed is that of one_layer.yaml."""
    full = load_config("one-layer", SweepConfig)
    assert one_layer_sweep().runs() == full.runs()
    names = [run.name for run in one_layer_sweep(seeds=1, lengths=[20]).runs()]
    assert names == ["rope-l20-s0", "absolute-l20-s0", "alibi-l20-s0", "arm-l20-s0"]
    assert len(one_layer_sweep(seeds=5, lengths=[40]).runs()) == 10
    assert {run.training.device for run in one_layer_sweep(device="cuda").runs()} == {"cuda"}
    with pytest.raises(
        rp.RevprobeError, match=r"length 15 is not in Tables 1 and 2; expected some of \[10, 20, 30, 40\]"
    ):
        one_layer_sweep(lengths=[10, 15])
    with pytest.raises(rp.RevprobeError, match="unknown device 'gpu'"):
        one_layer_sweep(device="gpu")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """`reproduce one-layer` with runs of two steps; everything else is as it is."""
    text = (
        "name: one-layer\nbase:\n  relation: {length: 10, alphabet: 2}\n  model: {d_model: 8}\n"
        "  training: {steps: 2, batch_size: 8, warmup_steps: 1, device: cpu}\n  snapshots: {steps: [0]}\n"
        "cells:\n- {position_encoding: [rope, alibi], length: [10, 20], seed: [0, 1, 2]}\n"
        "- {objective: causal, length: 10, seed: [0, 1, 2]}\n"
    )
    sweep = parse_config(text, SweepConfig, "tiny")
    monkeypatch.setattr("revprobe.report.paper.reproduce.load_config", lambda source, kind: sweep)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "one-layer"


def test_the_command_trains_what_is_asked_and_tables_what_there_is(tiny: Path) -> None:
    """Its cells are the readings of its runs; the others are not run; a second call trains nothing."""
    command = ["reproduce", "one-layer", "--lengths", "10", "--seeds", "1", "--batched"]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.output
    cells = pd.read_csv(tiny / "cells.csv")
    reading = rp.open_run(tiny / "rope-l10-s0").readings().select(name="reverse_probability", step=-1, weights="ema")[0]
    wanted = {"table": 1, "position_encoding": "rope", "length": 10, "direction": "reverse", "weights": "ema"}
    assert math.isclose(cell(cells, **wanted, quantity="probability")["ours"], reading.value)
    assert set(cells[cells["length"] == 20]["status"]) == {"not run"}
    assert sorted(path.name for path in tiny.iterdir() if path.is_dir()) == [
        "alibi-l10-s0",
        "arm-l10-s0",
        "rope-l10-s0",
    ]
    page = (tiny / "reproduction.md").read_text()
    assert page.startswith("# Tables 1 and 2 and Figure 3 of the paper\n\n## Tables 1 and 2\n")
    assert {path.name for path in tiny.glob("*.csv")} == {
        "cells.csv", "claims.csv", "curves.csv", "seeds.csv", "signatures.csv", "summary.csv",
    }  # fmt: skip
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0 and again.output.count("finished already, skipped") == 3
    assert (tiny / "reproduction.md").read_text() == page
    measured, left_out = collect_measures(tiny, one_layer_sweep().runs())
    assert set(measured["run"]) == {"rope-l10-s0", "alibi-l10-s0", "arm-l10-s0"}
    assert left_out["rope-l20-s2"] == "not run" and len(left_out) == 12


def test_a_run_that_failed_is_named_and_the_others_are_tabled(tiny: Path) -> None:
    """The command ends with an error, after the table of what is whole was written."""
    (tiny / "alibi-l10-s0").mkdir(parents=True)
    (tiny / "alibi-l10-s0" / "notes.txt").write_text("mine")
    done = CliRunner().invoke(app, ["reproduce", "one-layer", "--lengths", "10", "--seeds", "1", "--batched"])
    assert isinstance(done.exception, RunsFailed) and "alibi-l10-s0" in str(done.exception)
    cells = pd.read_csv(tiny / "cells.csv")
    assert cell(
        cells, table=1, objective="causal", length=10, direction="forward", quantity="accuracy", weights="raw"
    )["seeds"] == 1  # fmt: skip


@pytest.mark.long
def test_runs_side_by_side_are_tabled_on_any_device_and_a_stopped_one_is_taken_up(tiny: Path) -> None:
    """The default path: a process per run; then tables alone, asked for another device than the runs had."""
    command = ["reproduce", "one-layer", "--lengths", "10", "--seeds", "1", "--jobs", "2"]
    rope, alibi, _ = one_layer_sweep(seeds=1, lengths=[10]).runs()

    def stop(step: int, steps: int, loss: float | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rp.train(rope, tiny / rope.name, listener=stop)
    (tiny / "sweep.yaml").write_text(dump_config(one_layer_sweep(seeds=1, lengths=[10])))
    none = CliRunner().invoke(app, [*command, "--table-only"])
    assert isinstance(none.exception, rp.RevprobeError) and "no finished run in" in str(none.exception)
    assert not (tiny / "cells.csv").exists(), "a table of nothing must not take the place of a table"
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    page = (tiny / "reproduction.md").read_text()
    assert page.count("| 1 of 3 |") == 0 and page.count("| 1 of 1 | 90 |") == 6, "rope in two tables, alibi in one"
    other = CliRunner().invoke(app, [*command, "--table-only", "--device", "cuda"])
    assert other.exit_code == 0 and (tiny / "reproduction.md").read_text() == page
    assert rp.open_run(tiny / alibi.name).config.training.device == "cpu"


def test_another_base_is_refused_before_any_table_is_touched(tiny: Path) -> None:
    """Training on another device than the folder was begun with would mix two kinds of runs."""
    command = ["reproduce", "one-layer", "--lengths", "10", "--seeds", "1", "--batched"]
    assert CliRunner().invoke(app, command).exit_code == 0
    cells = (tiny / "cells.csv").read_bytes()
    refused = CliRunner().invoke(app, [*command, "--device", "auto"])
    assert "training.device" in str(refused.exception) and not isinstance(refused.exception, RunsFailed)
    assert (tiny / "cells.csv").read_bytes() == cells


def test_the_command_refuses_in_one_line(tiny: Path) -> None:
    for arguments, words in (
        (["--lengths", "10,x"], "--lengths '10,x': 'x' is no length"),
        (["--table-only"], "no runs at 'runs/one-layer'"),
        (["--lengths", "15"], "length 15 is not in Tables 1 and 2"),
    ):
        done = CliRunner().invoke(app, ["reproduce", "one-layer", *arguments])
        assert words in str(done.exception), arguments


def test_the_theory_command_writes_every_cell(tmp_path: Path) -> None:
    """Tables 3 and 4 to the printed digit; what lies outside is said."""
    done = CliRunner().invoke(app, ["reproduce", "theory", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    cells = pd.read_csv(tmp_path / "theory.csv")
    assert cells.groupby("table").size().to_dict() == {3: 3, 4: 30, 5: 3}
    assert cells[cells["table"] < 5]["within"].all()
    page = (tmp_path / "reproduction.md").read_text()
    assert page.count("\n| ") == 1 + 1 + len(cells)
    assert page.count(f"{MARK} |") == int((~cells["within"]).sum())
