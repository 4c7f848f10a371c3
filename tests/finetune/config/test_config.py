"""Configs: what a wrong one says, what a right one means, and that both examples are right."""

from pathlib import Path

import pytest

from revprobe import RevprobeError
from revprobe.finetune.config.loading import dump_config, example_names, find_config, load_config, parse_config
from revprobe.finetune.config.mistakes import differences
from revprobe.finetune.config.one_layer import RunConfig, SweepConfig

RUN = "name: mine\nrelation: {length: 6}\ntraining: {steps: 100}\n"
SWEEP = "name: grid\nbase: {training: {steps: 5}}\n"


def run(text: str = "") -> RunConfig:
    return parse_config(RUN + text, RunConfig, "my.yaml")


def sweep(cells: str) -> SweepConfig:
    return parse_config(f"{SWEEP}cells:\n{cells}", SweepConfig, "my.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "training: {steps: 1, learning_rat: 1}",
            "my.yaml: unknown key 'training.learning_rat'; the closest is 'learning_rate'",
        ),
        (
            "training: {stps: 1}",
            "2 problems: (1) unknown key 'training.stps'; the closest is 'steps' (in training); (2) ",
        ),
        ("training: {steps: 1}\nmodle: {}", "unknown key 'modle'; the closest is 'model'"),
        ("training: {steps: 1}\nseed: 3", "unknown key 'seed'; the closest is 'training.seed'"),
        ("training: {}", "'training.steps' is missing"),
        ("training: {steps: '100'}", "training.steps is '100'; expected integer"),
        ("training: {steps: yes}", "training.steps is True; expected integer"),
        ("training: {steps: 0}", "training.steps is 0; expected greater than or equal to 1"),
        ("training: {steps: 1, ema_decay: 1.5}", "training.ema_decay is 1.5; expected less than 1"),
        ("training: {steps: 1, learning_rate: true}", "training.learning_rate is True; expected number"),
        ("training: {steps: 1, learning_rate: '1e-3'}", "training.learning_rate is '1e-3'; expected number"),
        ("training: {steps: 1, learning_rate: .inf}", "training.learning_rate is inf; expected a finite number"),
        ("training: {steps: 1, weight_decay: no}", "training.weight_decay is False; expected number"),
        ("training: {steps: 1, gradient_clipping: yes}", "training.gradient_clipping is True; expected number"),
        ("training: {steps: 1, ema_decay: '0.9'}", "training.ema_decay is '0.9'; expected number"),
        ("training: {steps: 1}\nmodel: {dropout: no}", "model.dropout is False; expected number"),
        ("training: {steps: 1, seed: 5000000000}", "training.seed is 5000000000; expected less than or equal to 4294"),
        ("training: {steps: 1, device: gpu}", "training.device is 'gpu'; expected 'auto', 'cpu' or 'cuda'"),
        ("training: 3", "training is 3; expected a section with keys of its own"),
        ("training: {steps: 1}\nmodel: {family: gtp2}", "expected 'radd' or 'gpt2'; the closest is 'gpt2'"),
        ("training: {steps: 1}\nmodel: {position_encoding: rpoe}", "'scalar'; the closest is 'rope'"),
        ("training: {steps: 1}\nmodel: {family: gpt2, position_encoding: rope}", "learned absolute positions only"),
        ("training: {steps: 1}\nmodel: {d_model: 10, n_heads: 3}", "d_model 10 is not divisible by n_heads 3"),
        ("training: {steps: 1}\nmodel: {d_model: 3}", "rope needs an even head dimension, got 3"),
        ("training: {steps: 1}\nrelation: {length: 1}", "relation.length is 1; expected greater than or equal to 2"),
        ("training: {steps: 1}\nsnapshots: {every: 1, count: 2}", "give exactly one of every"),
        ("training: {steps: 5}\nsnapshots: {steps: [9]}", "snapshots.steps has 9, but training.steps is 5"),
        (
            "training: {steps: 5}\nsnapshots: {every: 1, answers: {steps: [9]}}",
            "snapshots.answers.steps has 9, but training.steps is 5",
        ),
        ("training: {steps: 5, negatives: drop-rigth}", "the closest is 'drop-right'"),
        ("training: {steps: 5, negatives: drop-after}", "negatives 'drop-after' for a masked model"),
        ("training: {steps: 5, switch: {step: 5, negatives: mirror}}", "switch.step 5 is not before training.steps, 5"),
        ("training: {steps: 5, masks: 11}", "training.masks is 11, but the sequences have 10 tokens"),
        ("training: {steps: 5, masks: 2, rates: k}", "rates 'k' with masks 2: no rate is drawn then"),
        (
            "training: {steps: 5, rates: k}\nmodel: {family: gpt2}",
            "training.rates and training.masks are a masked model's",
        ),
        ("training: {steps: 5}\nmodel: {family: gpt2, head_bias: true}", "gpt2 with head_bias: only radd has it"),
        ("training: {steps: 1}\ntraining: {steps: 2}", "line 3: not valid YAML: key 'training' stands twice"),
        ("training: {steps: 1", "not valid YAML"),
    ],
)
def test_a_wrong_run_config_says_so_in_one_line(text: str, words: str) -> None:
    """Key with its path, file, and the nearest valid key; or the value and what was expected."""
    with pytest.raises(RevprobeError) as raised:
        parse_config(f"name: mine\n{text}", RunConfig, "my.yaml")
    message = str(raised.value)
    assert message.startswith("my.yaml: ")
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        ("- {position_encodin: rope}", "unknown key 'cells[0].position_encodin'; the closest is 'position_encoding'"),
        ("- {seed: [0, x]}", "cells[0].seed[1] is 'x'; expected integer"),
        ("- {seed: [0, 4294967296]}", "cells[0].seed[1] is 4294967296; expected less than or equal to 4294967295"),
        ("- {seed: 0}\n- {position_encoding: rope}", "the cells ask for rope-l10-s0 more than once"),
        ("- {objective: causal, position_encoding: rope}", "learned absolute positions only"),
        ("- {objective: masekd}", "the closest is 'masked'"),
    ],
)
def test_a_wrong_sweep_config_says_so_in_one_line(cells: str, words: str) -> None:
    with pytest.raises(RevprobeError) as raised:
        sweep(cells)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("1.0e-3", 1e-3), ("1", 1.0), ("2.5E2", 250.0)])
def test_numbers_are_numbers_however_they_are_written(text: str, value: float) -> None:
    """YAML 1.1 takes 1e-3 for text, and text is refused."""
    made = parse_config(f"name: mine\ntraining: {{steps: 1, learning_rate: {text}}}", RunConfig, "my.yaml")
    assert made.training.learning_rate == value
    largest = parse_config("name: mine\ntraining: {steps: 1, seed: 4294967295}", RunConfig, "my.yaml")
    assert largest.training.seed == 2**32 - 1


def test_a_name_that_is_no_folder_name_is_refused() -> None:
    """It becomes a folder: `../x` would leave the runs folder."""
    with pytest.raises(RevprobeError, match=r"name is '\.\./x'; expected letters, digits"):
        parse_config("name: ../x\ntraining: {steps: 1}", RunConfig, "my.yaml")


def test_a_missing_file_names_the_nearest_example(tmp_path: Path) -> None:
    with pytest.raises(RevprobeError, match=r"no config file 'one-layer-quik', and no example .* 'one-layer-quick'"):
        load_config("one-layer-quik", SweepConfig)
    binary = tmp_path / "weights.bin"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RevprobeError, match=r"weights.bin: not a text file"):
        load_config(binary, RunConfig)
    empty = tmp_path / "empty.yaml"
    empty.touch()
    with pytest.raises(RevprobeError, match=r"empty.yaml: expected the keys relation, model, .*, got NoneType"):
        load_config(empty, RunConfig)


def test_a_sweep_given_to_train_and_a_run_given_to_sweep_name_the_right_command() -> None:
    with pytest.raises(
        RevprobeError, match=r"is a sweep of one-layer runs \(it has 'cells'\); use `revprobe sweep my.yaml`"
    ):
        parse_config(f"{SWEEP}cells: [{{seed: 0}}]", RunConfig, "my.yaml")
    with pytest.raises(RevprobeError, match=r"a one-layer run \(it has .*\); use `revprobe train my.yaml`"):
        parse_config(RUN, SweepConfig, "my.yaml")


def test_a_dumped_config_reads_back_equal() -> None:
    """Else a run could not be resumed with the config it wrote itself."""
    for text in (
        "",
        "snapshots: {every: 7}\n",
        "snapshots: {steps: [3, 50]}\n",
        "model: {family: gpt2, dropout: 0.1}\n",
    ):
        assert parse_config(dump_config(run(text)), RunConfig, "again") == run(text)
    grid = sweep("- {position_encoding: [rope, alibi], seed: [0, 1]}\n- {objective: causal, length: [4, 8]}\n")
    assert parse_config(dump_config(grid), SweepConfig, "again") == grid


def test_differences_show_old_and_new_values() -> None:
    assert differences(run(), run()) == []
    changed = run("snapshots: {every: 7}\n")
    assert differences(run(), changed) == ["snapshots.count: 12 -> None", "snapshots.every: None -> 7"]


@pytest.mark.parametrize(
    ("rule", "steps"),
    [
        ("{every: 40}", [0, 40, 80, 100]),
        ("{every: 100}", [0, 100]),
        ("{steps: [3, 50]}", [0, 3, 50, 100]),
        ("{count: 3}", [0, 1, 10, 100]),
        ("{count: 1}", [0, 1, 100]),
    ],
)
def test_snapshots_always_hold_step_0_and_the_last(rule: str, steps: list[int]) -> None:
    assert run(f"snapshots: {rule}\n").snapshot_steps == steps


def test_a_grid_names_its_runs_and_sets_its_axes() -> None:
    grid = sweep("- {position_encoding: [rope, alibi], seed: [0, 1]}\n- {objective: causal, length: [4, 8]}\n")
    made = {made.name: made for made in grid.runs()}
    assert list(made) == ["rope-l10-s0", "rope-l10-s1", "alibi-l10-s0", "alibi-l10-s1", "arm-l4-s0", "arm-l8-s0"]
    assert made["alibi-l10-s1"].axes == {
        "objective": "masked",
        "position_encoding": "alibi",
        "length": 10,
        "seed": 1,
    }
    assert made["arm-l8-s0"].axes == {"objective": "causal", "position_encoding": "absolute", "length": 8, "seed": 0}
    for one in made.values():
        assert one.training.model_copy(update={"seed": 0}) == grid.base.training


def test_a_variant_changes_what_it_names_and_nothing_else() -> None:
    """Its runs carry its name; the base stands beside it only where a cell asks for it."""
    grid = parse_config(
        f"{SWEEP}variants:\n- {{name: wide, model: {{d_model: 128}}}}\n- {{name: longer, training: {{steps: 9}}}}\n"
        "cells:\n- {seed: [0, 1], variant: [base, wide]}\n- {objective: causal, variant: longer}\n",
        SweepConfig,
        "my.yaml",
    )
    made = {made.name: made for made in grid.runs()}
    assert list(made) == ["rope-l10-s0", "rope-l10-s1", "rope-l10-s0-wide", "rope-l10-s1-wide", "arm-l10-s0-longer"]
    assert differences(made["rope-l10-s1"], made["rope-l10-s1-wide"]) == [
        "model.d_model: 64 -> 128",
        "name: 'rope-l10-s1' -> 'rope-l10-s1-wide'",
    ]
    assert made["arm-l10-s0-longer"].training.steps == 9
    assert made["arm-l10-s0-longer"].model.family == "gpt2"
    assert parse_config(dump_config(grid), SweepConfig, "again") == grid


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        ("{name: a, model: {d_modle: 3}}", "variant 'a': unknown key 'model.d_modle'; the closest is 'd_model'"),
        ("{name: a, model: {d_model: 3}}", "variant 'a': model: rope needs an even head dimension, got 3"),
        ("{name: a, training: {seed: 3}}", "variant 'a' sets training.seed, which the cells set"),
        ("{name: b, training: {steps: 3}}", "a cell asks for the variant 'a'; expected one of b, base"),
        ("{name: base, training: {steps: 3}}", "variant 'base' changes nothing, or is called 'base'"),
        ("{name: a}", "variant 'a' changes nothing"),
        ("{name: a, model: {d_model: 8}}, {name: a, model: {d_model: 4}}", "two variants are called 'a'"),
    ],
)
def test_a_wrong_variant_says_so_in_one_line(variant: str, words: str) -> None:
    with pytest.raises(RevprobeError) as raised:
        parse_config(f"{SWEEP}variants: [{variant}]\ncells: [{{variant: a}}]\n", SweepConfig, "my.yaml")
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_examples_are_the_sweeps_the_documentation_promises() -> None:
    """Found by name from wherever the package lies; nothing but the axes differs between runs."""
    finetunings = ["finetune-tiny", "llada-8b-parent-child", "table7", "smdm-reversal", "differ"]
    finetunings += ["causal-all-tokens", "causal-completion-only"]
    small = ["mini-models", "section6", "section6-ablations", "section6-methods"]
    one_layer = ["negative-evidence", "one-layer", "one-layer-published", "one-layer-quick", "pressure", "robustness"]
    assert example_names() == sorted([*finetunings, *one_layer, *small])
    quick = load_config("one-layer-quick", SweepConfig)
    assert quick.name == "one-layer-quick"
    assert [made.name for made in quick.runs()] == ["rope-l10-s0", "alibi-l10-s0", "absolute-l10-s0", "arm-l10-s0"]
    full = load_config(find_config("one-layer"), SweepConfig)
    names = {made.name for made in full.runs()}
    expected = {f"{kind}-l{length}" for kind in ("rope", "arm") for length in (10, 20, 30, 40)}
    expected |= {f"{kind}-l{length}" for kind in ("absolute", "alibi") for length in (10, 20)}
    assert names == {f"{name}-s{seed}" for name in expected for seed in range(3)}
    assert full.base.training.steps > quick.base.training.steps
    spread = load_config("robustness", SweepConfig)
    assert spread.base == full.base, "the spread is around the configuration of the tables"
    assert spread.runs()[0] == full.runs()[0], "its base run is the one of the tables, and need not be trained twice"
    assert [made.name for made in spread.runs()][1:] == [f"rope-l10-s0-{one.name}" for one in spread.variants]
    assert all(len(one.model) + len(one.training) == 1 for one in spread.variants), "one number at a time"


def test_variants_compose_with_a_plus_sign_and_may_read_at_other_steps() -> None:
    text = (
        f"{SWEEP}variants:\n- {{name: wide, model: {{d_model: 128, head_bias: true}}}}\n"
        "- {name: drop-right, training: {negatives: drop-right}, snapshots: {every: 5, answers: {every: 1}}}\n"
        "- {name: drop-after, training: {negatives: drop-after}}\n"
        "cells:\n- {variant: [wide+drop-right, base]}\n- {objective: causal, variant: [wide+drop-after]}\n"
    )
    both, base, causal = parse_config(text, SweepConfig, "my.yaml").runs()
    assert (both.name, base.name, causal.name) == (
        "rope-l10-s0-wide-drop-right",
        "rope-l10-s0",
        "arm-l10-s0-wide-drop-after",
    )
    assert (both.model.d_model, both.training.negatives) == (128, "drop-right")
    assert both.snapshot_steps == [0, 5] and both.answer_steps == [0, 1, 2, 3, 4, 5]
    assert base.answer_steps == base.snapshot_steps
    assert (causal.model.d_model, causal.model.head_bias, causal.training.negatives) == (128, False, "drop-after")
    with pytest.raises(RevprobeError, match="run 'arm-l10-s0-drop-right': negatives 'drop-right' for a causal model"):
        parse_config(text.replace("wide+drop-after", "drop-right"), SweepConfig, "my.yaml")
    with pytest.raises(RevprobeError, match="asks for the variant 'wde'; the closest is 'wide'"):
        parse_config(text.replace("wide+drop-right", "drop-right+wde"), SweepConfig, "my.yaml")


def test_the_sweeps_of_negative_evidence_and_the_published_recipe_are_what_their_pages_say() -> None:
    runs = {run.name: run for run in load_config("negative-evidence", SweepConfig).runs()}
    for encoding in ("rope", "absolute"):
        for recipe in ("", "-published"):
            for dial in ("", "-drop-right", "-mirror", "-drop-left", "-drop-both", "-single"):
                assert all(f"{encoding}-l10-s{seed}{recipe}{dial}" in runs for seed in range(5))
    published = runs["rope-l10-s0-published-drop-right"]
    alike = load_config("one-layer-published", SweepConfig).base
    assert published.model == alike.model
    own = {"steps", "warmup_steps", "negatives"}
    assert published.training.model_dump(exclude=own) == alike.training.model_dump(exclude=own)
    # The share of the steps that 2,500 is of 400,000.
    for config in (published.training, alike.training):
        assert config.warmup_steps == pytest.approx(config.steps * 2500 / 400_000, abs=0.5)
